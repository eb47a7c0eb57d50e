"""Fills the "Shown by:" lists of docs/rules.md from the names of the tests.

A test that shows a rule has the rule's number in its name: `test_k7_...`, or `test_k7_k25_...` if it shows two. After
adding, renaming, moving or removing such a test run `python tests/docs/update_rules.py`.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["ROOT", "RULES", "Rule", "fill", "find_tests", "parse", "rules_shown_by"]

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "docs" / "rules.md"

_HEADING = re.compile(r"## K(\d+) — (.+)")
_LABEL = "Shown by:"
_NONE = f"{_LABEL} no test yet."
_ENTRY = re.compile(r"- `(.+)`")
#: Not `_(\d+)_`: in `test_k7_k25_late` one underscore stands between two numbers.
_NUMBER = re.compile(r"_k(\d+)(?=_|$)")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, as docs/rules.md has it."""

    number: int
    title: str
    #: Ids of tests as pytest takes them; None if there is no "Shown by:" line at all.
    shown_by: tuple[str, ...] | None


def parse(text: str) -> list[Rule]:
    """The rules in docs/rules.md, in its order."""
    rules: list[Rule] = []
    for block in re.split(r"^(?=#)", text, flags=re.MULTILINE):
        lines = block.splitlines()
        heading = _HEADING.fullmatch(lines[0]) if lines else None
        if heading is None:
            continue
        shown_by = None
        for at, line in enumerate(lines):
            if line.startswith(_LABEL):
                shown_by = tuple(entry[1] for entry in map(_ENTRY.fullmatch, lines[at + 1 :]) if entry)
        rules.append(Rule(int(heading[1]), heading[2], shown_by))
    return rules


def find_tests(root: Path = ROOT) -> list[str]:
    """The ids of all tests under root/tests, as in `tests/protocol/test_x.py::TestClass::test_y`."""
    return sorted(
        {
            f"{path.relative_to(root).as_posix()}::{name}"
            for path in (root / "tests").rglob("test_*.py")
            for name in _test_names(ast.parse(path.read_text(encoding="utf-8"), str(path)).body)
        }
    )


def _test_names(body: Iterable[ast.AST], prefix: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("test"):
                yield prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield from _test_names(node.body, f"{prefix}{node.name}::")
        else:
            # Tests may stand under an `if sys.platform == ...`.
            yield from _test_names(ast.iter_child_nodes(node), prefix)


def rules_shown_by(test: str) -> list[int]:
    """The numbers of the rules that a test claims to show by its function's name."""
    return [int(number) for number in _NUMBER.findall(test.rpartition("::")[2])]


def fill(text: str, tests: Iterable[str]) -> str:
    """docs/rules.md with every "Shown by:" list made anew."""
    shown_by: dict[int, list[str]] = {}
    for test in sorted(tests):
        for number in rules_shown_by(test):
            shown_by.setdefault(number, []).append(test)
    lines: list[str] = []
    number = 0
    in_old_list = False
    for line in text.splitlines():
        if line.startswith("#"):
            heading = _HEADING.fullmatch(line)
            number = int(heading[1]) if heading else 0
        if in_old_list and (not line or _ENTRY.fullmatch(line)):
            continue
        in_old_list = bool(number) and line.startswith(_LABEL)
        if not in_old_list:
            lines.append(line)
        elif number in shown_by:
            lines += [_LABEL, "", *(f"- `{test}`" for test in shown_by[number]), ""]
        else:
            lines += [_NONE, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> None:
    """Rewrite docs/rules.md and say which rules no test shows."""
    text = fill(RULES.read_text(encoding="utf-8"), find_tests())
    RULES.write_text(text, encoding="utf-8")
    bare = [f"K{rule.number}" for rule in parse(text) if not rule.shown_by]
    sys.stdout.write(f"No test yet shows {', '.join(bare)}.\n" if bare else "Every rule is shown by a test.\n")


if __name__ == "__main__":
    main()
