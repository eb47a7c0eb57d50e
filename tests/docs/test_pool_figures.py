"""The tables in docs/pool.md are what `python -m benchmarks.pool` has written, and say what the page says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import pool

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "pool.md"


@pytest.fixture(scope="module")
def report() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "pool.json").read_text())
    return found


def test_the_numbers_on_the_page_are_those_that_were_measured(report: Mapping[str, Any], tmp_path: Path) -> None:
    written = tmp_path / "pool.md"
    shutil.copy(PAGE, written)
    pool.write_tables(written, report)
    assert written.read_text() == PAGE.read_text()


@pytest.mark.parametrize("figure", pool.FIGURES)
def test_no_request_of_h2keeps_failed_or_was_processed_twice(report: Mapping[str, Any], figure: str) -> None:
    ours = {name: result for name, result in report["figures"][figure].items() if "h2keep" in name}
    assert len(ours) == 4
    for result in ours.values():
        assert result["requests"] == result["processed"] == 20_000
        assert (result["failed"], result["failures"], result["twice"]) == (0, {}, 0)
        assert result["goodbyes" if figure == "goaway" else "reloads"] >= 5


def test_a_page_without_marks_is_left_alone(report: Mapping[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="has no marks"):
        pool.write_tables(page, report)
    assert page.read_text() == "nothing\n"
