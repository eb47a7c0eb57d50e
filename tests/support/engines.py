"""Which HTTP/2 codec the tests run on, for those that don't name one: all of them ask for the default, "h2"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from h2keep.protocol import engines

if TYPE_CHECKING:
    import pytest

__all__ = ["ENGINES", "stand_in_for_the_default"]

_AS_SHIPPED = dict(engines._ENGINES)
ENGINES = sorted(_AS_SHIPPED)


def stand_in_for_the_default(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have whoever asks for the default engine get this one."""
    monkeypatch.setitem(engines._ENGINES, engines.DEFAULT_ENGINE, _AS_SHIPPED[engine])
