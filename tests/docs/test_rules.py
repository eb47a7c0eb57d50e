"""docs/rules.md has all rules, and the tests that it names are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from docs.update_rules import ROOT, RULES, fill, find_tests, parse, rules_shown_by

if TYPE_CHECKING:
    from pathlib import Path

COUNT = 25
HINT = "run: python tests/docs/update_rules.py"

TEXT = RULES.read_text(encoding="utf-8")
SHOWN_BY = {rule.number: rule.shown_by for rule in parse(TEXT)}
TESTS = find_tests()


def test_every_rule_has_a_heading_in_order() -> None:
    assert [rule.number for rule in parse(TEXT)] == list(range(1, COUNT + 1))


def test_every_rule_has_one_list_of_tests() -> None:
    assert [number for number, tests in SHOWN_BY.items() if tests is None] == []
    assert TEXT.count("\nShown by:") == COUNT


def test_every_test_that_is_listed_exists() -> None:
    listed = {test for tests in SHOWN_BY.values() for test in tests or ()}
    assert sorted(listed - set(TESTS)) == [], HINT


def test_every_test_named_after_a_rule_is_listed_under_it() -> None:
    claims = [(number, test) for test in TESTS for number in rules_shown_by(test)]
    assert [claim for claim in claims if not 1 <= claim[0] <= COUNT] == [], "there is no such rule"
    assert [(number, test) for number, test in claims if test not in (SHOWN_BY[number] or ())] == [], HINT


@pytest.mark.parametrize("number", range(1, COUNT + 1))
def test_every_rule_is_shown_by_a_test(number: int) -> None:
    assert SHOWN_BY[number], f"no test is named after it (test_k{number}_...); if there is one, {HINT}"


def test_the_lists_are_generated() -> None:
    assert fill(TEXT, TESTS) == TEXT, HINT


def test_k19_the_readme_says_what_a_ping_cannot_do() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "PING" in readme
    for timeout in ("ALB", "stream_idle_timeout", "3,600 s"):
        assert timeout in readme


# The generator


def test_filling_replaces_lists_and_nothing_else() -> None:
    before = (
        "# T\n\n## K1 — A\n\nText.\n\nShown by: no test yet.\n\n# S\n\n## K2 — B\n\n- `text`\n\nShown by:\n\n- `old`\n"
    )
    tests = ["tests/test_b.py::test_k1_k2_y", "tests/test_a.py::TestX::test_x_k1", "tests/test_a.py::test_none_k1x"]
    after = (
        "# T\n\n## K1 — A\n\nText.\n\nShown by:\n\n- `tests/test_a.py::TestX::test_x_k1`\n"
        "- `tests/test_b.py::test_k1_k2_y`\n\n# S\n\n## K2 — B\n\n- `text`\n\nShown by:\n\n"
        "- `tests/test_b.py::test_k1_k2_y`\n"
    )
    assert fill(before, tests) == after
    assert fill(after, tests) == after
    assert fill(after, []) == before.replace("Shown by:\n\n- `old`", "Shown by: no test yet.")
    assert [(rule.number, rule.title, len(rule.shown_by or ())) for rule in parse(after)] == [(1, "A", 2), (2, "B", 1)]


def test_finding_tests_looks_where_pytest_does(tmp_path: Path) -> None:
    (tmp_path / "tests" / "deep").mkdir(parents=True)
    (tmp_path / "tests" / "deep" / "test_a.py").write_text(
        "import sys\n"
        "if sys.platform == 'linux':\n"
        "    def test_k2_under_if() -> None: ...\n"
        "class TestThings:\n"
        "    async def test_method(self) -> None: ...\n"
        "def helper() -> None:\n"
        "    def test_k1_inside() -> None: ...\n"
    )
    (tmp_path / "tests" / "helper.py").write_text("def test_k3_no() -> None: ...\n")
    assert find_tests(tmp_path) == [
        "tests/deep/test_a.py::TestThings::test_method",
        "tests/deep/test_a.py::test_k2_under_if",
    ]
