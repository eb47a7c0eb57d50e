"""`python -m h2keep` is the program `h2keep`."""

from __future__ import annotations

from h2keep.cli import main

if __name__ == "__main__":
    main(prog_name="h2keep")
