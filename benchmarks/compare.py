"""Two commits of h2keep, measured in turns in one run, as a ratio: what a change costs or brings.

Each commit's source goes to a temporary folder, and the workers import h2keep from there. All else, the benchmarks
included, is of the work tree: only h2keep differs.
"""

from __future__ import annotations

import io
import math
import subprocess
import sys
import tarfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from benchmarks.measure import ROOT, Setting
from benchmarks.server import Placement, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.plan import Case


@contextmanager
def source(commit: str) -> Iterator[Path]:
    """A folder to import a commit's h2keep from."""
    if commit == ".":
        yield ROOT / "src"
        return
    archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode != 0:
        sys.exit(archive.stderr.decode().strip())
    with TemporaryDirectory(prefix="h2keep-compare-") as directory:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as content:
            content.extractall(directory, filter="data")
        path = Path(directory, "src")
        _check(path)
        yield path


def _check(path: Path) -> None:
    """What is installed must not hide what is to be measured."""
    command = [sys.executable, "-c", "import h2keep; print(h2keep.__file__)"]
    found = subprocess.run(command, env={"PYTHONPATH": str(path)}, capture_output=True, text=True, check=True).stdout
    if not Path(found.strip()).is_relative_to(path):
        raise RuntimeError(f"h2keep comes from {found.strip()}, not from {path}")


def compare(
    commits: tuple[str, str],
    cases: Sequence[Case],
    candidates: Sequence[str],
    placement: Placement,
    *,
    rounds: int,
    at_least: float,
    quick: bool,
) -> int:
    """Print how much better the second is, over 1 being better; 1 if anything is below the bound, or failed."""
    passed = True
    with prepare() as kit, ExitStack() as stack:
        settings = [Setting(kit, placement, quick, stack.enter_context(source(commit))) for commit in commits]
        print(f"{commits[1]} against {commits[0]}, {rounds} rounds; above 1 is better, at least {at_least:g} is asked")
        for case in cases:
            for candidate in (name for name in candidates if name.partition("@")[0] in case.candidates):
                ratios = _ratios(settings, case, candidate, rounds)
                passed &= bool(ratios) and median(ratios) >= at_least
                print(f"  {_line(case, candidate, ratios, at_least)}", flush=True)
    return 0 if passed else 1


def _ratios(settings: Sequence[Setting], case: Case, candidate: str, rounds: int) -> list[float]:
    """Round by round, as what ran side by side shared the machine's mood; each round the other one begins."""
    column = case.columns[0]
    ratios: list[float] = []
    for number in range(rounds):
        values = [math.nan, math.nan]
        for index in (0, 1) if number % 2 else (1, 0):
            outcome = settings[index].measure(case, candidate)
            if isinstance(outcome, str):
                print(f"{case.name}, {candidate}: {outcome}", file=sys.stderr)
            else:
                values[index] = outcome[column.metric]
        before, after = values
        if before > 0 and after > 0:
            ratios.append(before / after if column.lower else after / before)
    return ratios


def _line(case: Case, candidate: str, ratios: Sequence[float], at_least: float) -> str:
    name = f"{case.name}  {candidate}".ljust(40)
    if not ratios:
        return f"{name} no result"
    word = "pass" if median(ratios) >= at_least else "SLOWER"
    return f"{name} {median(ratios):.3f}  [{min(ratios):.3f} .. {max(ratios):.3f}]  {case.columns[0].title}  {word}"
