"""One candidate does one workload in this process, and one line of JSON on standard output says what it cost.

python -m benchmarks.worker --url URL --stats HOST:PORT --ca FILE rr h2keep-httpx2 concurrency=16 warmup=1 seconds=3
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
from pathlib import Path

import anyio

from benchmarks import blocking
from benchmarks.candidates import CANDIDATES
from benchmarks.workloads import WORKLOADS, Parameters


def _parameter(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__)
    parser.add_argument("scenario", choices=[*WORKLOADS, *blocking.WORKLOADS])
    parser.add_argument("candidate", choices=CANDIDATES)
    parser.add_argument("parameters", nargs="*", type=_parameter, metavar="NAME=NUMBER")
    parser.add_argument("--url", required=True)
    parser.add_argument("--stats", required=True)
    parser.add_argument("--ca", required=True, type=Path)
    parser.add_argument("--loop", default="asyncio", choices=["asyncio", "uvloop", "trio"])
    parser.add_argument("--cpu", type=int, help="run on this core alone")
    parser.add_argument("--profile", help="write cProfile's statistics to this file")
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})

    parameters = Parameters(dict(options.parameters), options.stats)

    async def measure() -> None:
        candidate = CANDIDATES[options.candidate]
        async with candidate.open(options.url, options.ca) as client:
            metrics = await WORKLOADS[options.scenario](client, parameters)
            # Before the client is closed: what goes wrong there must not hide what was measured.
            print(json.dumps(metrics), flush=True)

    def measure_blocking() -> None:
        with blocking.CANDIDATES[options.candidate](options.url, options.ca) as client:
            print(json.dumps(blocking.WORKLOADS[options.scenario](client, parameters)), flush=True)

    def run() -> None:
        if options.scenario in blocking.WORKLOADS:
            measure_blocking()
        elif options.loop == "trio":
            anyio.run(measure, backend="trio")
        else:
            anyio.run(measure, backend_options={"use_uvloop": options.loop == "uvloop"})

    if options.profile is None:
        run()
        return
    profile = cProfile.Profile()
    try:
        profile.runcall(run)
    finally:
        profile.dump_stats(options.profile)


if __name__ == "__main__":
    main()
