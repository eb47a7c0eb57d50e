"""One candidate does one workload in this process, and one line of JSON on standard output says what it cost.

python -m benchmarks.worker --url URL --stats HOST:PORT --ca FILE rr h2keep-httpx2@uvloop concurrency=16 seconds=3
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import sys
import traceback
from pathlib import Path

import anyio

from benchmarks import blocking, codec
from benchmarks.candidates import CANDIDATES, Target
from benchmarks.workloads import WORKLOADS, Metrics, Parameters


def _parameter(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__)
    parser.add_argument("scenario", choices=[*WORKLOADS, *blocking.WORKLOADS, "codec"])
    parser.add_argument("candidate", metavar="NAME[@LOOP]")
    parser.add_argument("parameters", nargs="*", type=_parameter, metavar="NAME=NUMBER")
    parser.add_argument("--url", default="https://localhost:1")
    parser.add_argument("--stats", default="")
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--cpu", type=int, help="run on this core alone")
    parser.add_argument("--profile", help="write cProfile's statistics to this file")
    parser.add_argument("--probe", action="store_true", help="only make the client, to see whether that is possible")
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})

    parameters = Parameters(dict(options.parameters), options.stats)
    most, ping = parameters.values.get("max_connections"), parameters.values.get("ping")
    target = Target(options.url, options.ca, None if most is None else int(most), ping)
    name, _, loop = options.candidate.partition("@")

    def report(metrics: Metrics) -> None:
        print(json.dumps(metrics), flush=True)

    async def measure() -> None:
        if (loop or "asyncio") not in CANDIDATES[name].loops:
            raise ValueError(f"{name} can't run on {loop!r}")
        async with CANDIDATES[name].open(target) as client:
            # Before the client is closed: what goes wrong there must not hide what was measured.
            report({} if options.probe else await WORKLOADS[options.scenario](client, parameters))

    def measure_blocking() -> None:
        with blocking.CANDIDATES[name](target) as client:
            metrics = {} if options.probe else blocking.WORKLOADS[options.scenario](client, parameters)
            report(metrics)
            if metrics.get("failed"):
                # Threads may be stuck in a client that would wait for them.
                sys.stdout.flush()
                os._exit(0)

    def run() -> None:
        if options.scenario == "codec":
            make = codec.CANDIDATES[name]
            make()
            report({} if options.probe else codec.codec(make, parameters))
        elif options.scenario in blocking.WORKLOADS:
            measure_blocking()
        elif loop == "trio":
            anyio.run(measure, backend="trio")
        else:
            anyio.run(measure, backend_options={"use_uvloop": loop == "uvloop"})

    profile = cProfile.Profile()
    try:
        if options.profile is None:
            run()
        else:
            profile.runcall(run)
    except Exception as error:  # noqa: BLE001
        # The last line is what the tables say; a group's own would be a ruled line.
        traceback.print_exc()
        sys.exit(_reason(error))
    finally:
        if options.profile is not None:
            profile.dump_stats(options.profile)


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    main()
