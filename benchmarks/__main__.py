"""python -m benchmarks run | report | compare | profile: see README.md."""

from __future__ import annotations

import argparse
import itertools
import json
import pstats
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.compare import compare
from benchmarks.measure import ROOT, TOO_SLOW, Setting, about, sampler
from benchmarks.plan import CASES, Case
from benchmarks.report import records, tables, verdicts
from benchmarks.server import Placement, prepare, serve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PLACEMENTS = {
    "pinned": "client on one core, server on the others",
    "free": "client and server wherever the system puts them",
}
#: Metrics of memory.
MEMORY = ("grown", "grown_mib", "resident_kib")
PAGE = ROOT / "docs" / "performance.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of h2keep.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_run, _add_report, _add_compare, _add_profile):
        add(commands)
    options = parser.parse_args()
    run: Any = options.run
    return int(run(options))


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="measure, print tables and figures; exit 0 whatever they are")
    run.add_argument("--scenario", nargs="+", metavar="NAME", help="scenarios (rr) or cases (rr@16); default: all")
    run.add_argument(
        "--candidates", nargs="+", metavar="NAME[@LOOP]", help="instead of each case's own; loops: uvloop, trio"
    )
    run.add_argument("--rounds", type=int, help="default: 5, or 1 with --quick")
    run.add_argument(
        "--quick", action="store_true", help="short and few: for looking whether all works, not for figures"
    )
    run.add_argument(
        "--patience",
        type=int,
        default=0,
        metavar="N",
        help="measure again, up to N times, while other processes disturb; default: 0",
    )
    run.add_argument("--minutes", type=float, metavar="N", help="begin no round that would not end within so many")
    run.add_argument("--profile-missed", action="store_true", help="sample the workers behind each missed figure")
    run.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured to FILE, after each round")
    _add_placement(run)
    run.set_defaults(run=_run)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="make docs/performance.md and its plots of a run's JSON")
    report.add_argument(
        "results", type=Path, nargs="+", metavar="RESULTS.json", help="of a case in several files, the last one counts"
    )
    report.add_argument("--output", type=Path, default=PAGE, metavar="FILE", help="default: docs/performance.md")
    report.set_defaults(run=_report)


def _add_compare(commands: Any) -> None:
    comparison = commands.add_parser(
        "compare", help="two commits, interleaved in one run; exit 1 if the second is slower than allowed"
    )
    comparison.add_argument("before", help="a commit, or . for the work tree as it is")
    comparison.add_argument("after")
    comparison.add_argument(
        "--scenario", nargs="+", default=["rr@16", "rr@1", "download", "threads@16"], metavar="NAME"
    )
    comparison.add_argument("--candidates", nargs="+", default=["h2keep", "h2keep-httpx2"], metavar="NAME[@LOOP]")
    comparison.add_argument("--rounds", type=int, default=7)
    comparison.add_argument("--at-least", type=float, default=0.97, metavar="RATIO", help="default: 0.97")
    comparison.add_argument("--quick", action="store_true", help="as for run")
    _add_placement(comparison)
    comparison.set_defaults(run=_compare)


def _add_profile(commands: Any) -> None:
    profile = commands.add_parser("profile", help="run one worker under cProfile and print the top functions")
    profile.add_argument("case", help="a case (rr@16) or a scenario, whose first case is meant")
    profile.add_argument("candidate", metavar="NAME[@LOOP]")
    profile.add_argument("--sort", default="tottime", choices=["tottime", "cumtime", "ncalls"])
    profile.add_argument("--top", type=int, default=40)
    profile.add_argument(
        "--flame", type=Path, metavar="FILE", help="sample with py-spy instead: SVG, or stacks if .txt"
    )
    _add_placement(profile)
    profile.set_defaults(run=_profile)


def _add_placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--placement",
        nargs="+",
        default=["pinned"],
        choices=PLACEMENTS,
        help="; ".join(f"{name}: {meaning}" for name, meaning in PLACEMENTS.items()),
    )


def _cases(names: Sequence[str] | None) -> list[Case]:
    if names is None:
        return list(CASES)
    unknown = [name for name in names if not any(name in (case.name, case.scenario) for case in CASES)]
    if unknown:
        sys.exit(f"no such scenario: {', '.join(unknown)}; there are {', '.join(case.name for case in CASES)}")
    return [case for case in CASES if case.name in names or case.scenario in names]


@dataclass
class Session:
    """All that one run finds out."""

    setting: Mapping[str, Setting]
    cases: Sequence[Case]
    asked: Sequence[str] | None
    patience: int
    results: dict[str, dict[str, dict[str, list[Mapping[str, float] | None]]]] = field(default_factory=dict)
    failures: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, object] = field(default_factory=dict)
    _slow: set[tuple[str, str, str]] = field(default_factory=set)
    _took: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def probe(self) -> None:
        """Find out who can't take part at all; one that can't as a blocking client only is told of per case."""
        seen: set[str] = set()
        setting = next(iter(self.setting.values()))
        for case, candidate in ((each, name) for each in self.cases for name in self._candidates(each)):
            if candidate not in seen and (why := setting.missing(case, candidate)) is not None:
                self.unavailable[candidate] = why
                print(f"{candidate}: not available: {why}", file=sys.stderr)
            seen.add(candidate)

    def round(self, number: int) -> None:
        for case, (placement, setting) in itertools.product(self.cases, self.setting.items()):
            candidates = [name for name in self._candidates(case) if name not in self.unavailable]
            rows = self.results.setdefault(placement, {}).setdefault(case.name, {name: [] for name in candidates})
            # Each round begins with another one, so that nobody always comes first.
            first = number % max(len(candidates), 1)
            started = time.monotonic()
            for candidate in (*candidates[first:], *candidates[:first]):
                if case.takes_part(candidate, number):
                    rows[candidate].append(self._measure(f"round {number}", placement, setting, case, candidate))
            print(f"round {number}, {placement}, {case.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)

    def _measure(
        self, when: str, placement: str, setting: Setting, case: Case, candidate: str
    ) -> Mapping[str, float] | None:
        key = (placement, case.name, candidate)
        if key in self._slow:
            return None
        started = time.monotonic()
        outcome = setting.measure_calmly(case, candidate, self.patience)
        self._took[key] = time.monotonic() - started
        if not isinstance(outcome, str):
            return outcome
        if outcome.startswith(TOO_SLOW):
            # It would cost every round as much.
            self._slow.add(key)
        self.failures.setdefault(placement, {}).setdefault(case.name, {})[candidate] = outcome
        print(f"{when}, {placement}, {case.name}, {candidate}: {outcome}", file=sys.stderr)
        return None

    def expected(self, number: int) -> float:
        """Seconds that a round will take, going by what its measurements took last time."""
        cases = {case.name: case for case in self.cases}
        keys = (key for key in self._took if key not in self._slow)
        return sum(self._took[key] for key in keys if cases[key[1]].takes_part(key[2], number))

    def _candidates(self, case: Case) -> Sequence[str]:
        if self.asked is None:
            return case.candidates
        known = {name.partition("@")[0] for name in case.candidates}
        return [name for name in self.asked if name.partition("@")[0] in known]

    def profile_missed(self) -> None:
        """Sample h2keep's workers behind the missed figures, unless these are of memory, which samples don't show."""
        for placement, results in self.results.items():
            missed = [item.figure for item in verdicts(results, self.unavailable) if item.word == "MISS"]
            for value in (value for figure in missed for value in figure.values()):
                key = f"{value.case} {value.candidate}"
                ours = value.candidate.startswith("h2keep") and value.metric not in MEMORY
                if ours and key not in self.profiles:
                    case = next(case for case in self.cases if case.name == value.case)
                    self.profiles[key] = self.setting[placement].profile(case, value.candidate)


def _run(options: argparse.Namespace) -> int:
    cases = _cases(options.scenario)
    rounds: int = options.rounds or (1 if options.quick else 5)
    facts = about() | {"placement": options.placement, "quick": options.quick, "patience": options.patience}
    started = time.monotonic()
    with prepare() as kit:
        settings = {name: Setting(kit, Placement.named(name), options.quick) for name in options.placement}
        session = Session(settings, cases, options.candidates, options.patience)
        session.probe()
        for number in range(1, rounds + 1):
            session.round(number)
            facts["rounds"] = number
            _write(options.json, facts, session, quick=options.quick)
            elapsed = time.monotonic() - started
            print(f"round {number} of {rounds} done after {elapsed:.0f} s", file=sys.stderr)
            if options.minutes is not None and elapsed + session.expected(number + 1) > options.minutes * 60:
                print("the next one would not end in time", file=sys.stderr)
                break
        if options.profile_missed:
            session.profile_missed()
            _write(options.json, facts, session, quick=options.quick)
    for placement, measured in session.results.items():
        print(f"== {placement}: {PLACEMENTS[placement]}\n")
        failures = session.failures.get(placement, {})
        print(tables(cases, measured, failures, session.unavailable, quick=options.quick), end="\n\n")
    return 0


def _write(file: Path | None, facts: Mapping[str, object], session: Session, *, quick: bool) -> None:
    if file is None:
        return
    report = {
        "about": facts,
        "cases": {case.name: case.numbers(quick=quick) for case in session.cases},
        "results": _rounded(session.results),
        "figures": {name: records(measured, session.unavailable) for name, measured in session.results.items()},
        "failures": session.failures,
        "unavailable": session.unavailable,
        "profiles": session.profiles,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Six digits: more would only make the file large."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _report(options: argparse.Namespace) -> int:
    # Only here: plots need a library that measuring does not.
    from benchmarks.page import amended, write_page

    write_page(amended([json.loads(file.read_text()) for file in options.results]), options.output)
    print(f"wrote {options.output}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    placement = Placement.named(options.placement[0])
    commits = (options.before, options.after)
    cases = _cases(options.scenario)
    return compare(
        commits,
        cases,
        options.candidates,
        placement,
        rounds=options.rounds,
        at_least=options.at_least,
        quick=options.quick,
    )


def _profile(options: argparse.Namespace) -> int:
    case = _cases([options.case])[0]
    with prepare() as kit, TemporaryDirectory() as directory:
        setting = Setting(kit, Placement.named(options.placement[0]), quick=False)
        with serve(kit, setting.placement, case.demands) as server:
            command = setting.worker(server, case, options.candidate)
            if setting.placement.client is not None:
                command += ["--cpu", str(setting.placement.client)]
            if options.flame is not None:
                subprocess.run(sampler(options.flame) + command, cwd=ROOT, check=True)
                return 0
            file = Path(directory, "profile")
            subprocess.run([*command, "--profile", str(file)], cwd=ROOT, check=True)
        pstats.Stats(str(file)).sort_stats(options.sort).print_stats(options.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
