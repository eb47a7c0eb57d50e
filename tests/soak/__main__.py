"""Clients that do everything at once, over a network that fails in every way: nothing may hang, leak, or be sent twice.

    python -m soak KIND --seed 7 --seconds 60

prints what was seen as JSON and ends with 1 if a promise was broken. One run is a row of *generations*: a client, a
storm of requests on it, and its end, in mid-traffic or after a calm in which it must have all it ever had: room on as
many connections as its limits allow, and full windows.

A KIND is where-door-engine, as in `trio-httpx2-ngh2`. Where: `asyncio`, `uvloop` or `trio`, each also with `+thread`
(connections on the background loop); `loops`, several that share a client; `threads`; `forks`, which are threads that
fork. The door is `h2keep`, `httpx` or `httpx2`. A seed decides what is done, by whom and when; who gets there first it
doesn't.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import sys
import threading
import time
import traceback
import warnings
from typing import Any

import anyio

from soak.accounts import Far, Violations
from soak.clients import Door
from soak.loops import AsyncStorm, LoopStorm
from soak.threads import ThreadStorm


def _rss() -> int:
    """Memory in use now, in KiB; 0 where there is no /proc."""
    with contextlib.suppress(FileNotFoundError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4
    return 0


def _hear_complaints(violations: Violations) -> None:
    """Whatever Python itself would only write to stderr is a violation."""

    class Ears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                violations.add(f"logged: {self.format(record)}")

    # Trio says so of any generator; those are httpx's, and it is the soak that forgets them.
    warnings.filterwarnings("ignore", "Async generator 'httpx", ResourceWarning)
    logging.getLogger().addHandler(Ears())
    sys.unraisablehook = lambda args: violations.add(
        f"unraisable: {args.err_msg} {args.object!r} {''.join(traceback.format_exception(args.exc_value))}"
    )
    threading.excepthook = lambda args: violations.add(
        f"in a thread: {''.join(traceback.format_exception(args.exc_value))}"
    )


async def _run_async(storm: AsyncStorm, options: dict[str, Any], door: str, engine: str, seconds: float) -> list[int]:
    ends = time.monotonic() + seconds
    chance = random.Random(storm.seed)
    rss = []
    while True:
        length = min(chance.choice((0.5, 1.5, 3.0)), max(ends - time.monotonic(), 0.5))
        made = Door(door, engine, storm.far.hello, chance, **options)
        abrupt = chance.random() < 0.4
        await storm.run_generation(made, length, chance, abrupt=abrupt)
        rss.append(_rss())
        # The last one ends in a calm.
        if (time.monotonic() > ends and not abrupt) or storm.violations.seen:
            return rss


def _run_threads(storm: Any, door: str, engine: str, seconds: float, *, forks: bool = False) -> list[int]:
    ends = time.monotonic() + seconds
    chance = random.Random(storm.seed)
    rss = []
    while True:
        length = min(chance.choice((0.5, 1.5, 3.0)), max(ends - time.monotonic(), 0.5))
        made = Door(door, engine, storm.far.hello, chance)
        abrupt = chance.random() < 0.4
        if isinstance(storm, LoopStorm):
            storm.run_all(made, length, chance, abrupt=abrupt)
        else:
            storm.run_generation(made, length, chance, abrupt=abrupt, forks=forks)
        rss.append(_rss())
        if (time.monotonic() > ends and not abrupt) or storm.violations.seen:
            return rss


BACKENDS = {"asyncio": ("asyncio", {}), "uvloop": ("asyncio", {"use_uvloop": True}), "trio": ("trio", {})}


def run(kind: str, seed: int, seconds: float) -> dict[str, Any]:
    """One soak; see the module's docstring."""
    violations = Violations()
    _hear_complaints(violations)
    far = Far(seed)
    loop, door, engine = kind.split("-")
    storm: Any
    options = {}
    if loop.endswith("+thread"):
        loop = loop.removesuffix("+thread")
        options = {"run_in_thread": True}
    try:
        if loop in BACKENDS:
            backend, backend_options = BACKENDS[loop]
            storm = AsyncStorm(kind, seed, far, violations)
            rss = anyio.run(
                _run_async, storm, options, door, engine, seconds, backend=backend, backend_options=backend_options
            )
        elif loop == "loops":
            storm = LoopStorm(kind, seed, far, violations)
            rss = _run_threads(storm, door, engine, seconds)
        else:
            storm = ThreadStorm(kind, seed, far, violations)
            rss = _run_threads(storm, door, engine, seconds, forks=loop == "forks")
        report = far.order("report")
    finally:
        far.close()
    return {
        "kind": kind,
        "seed": seed,
        "violations": violations.seen,
        "generations": storm.generation,
        "outcomes": dict(storm.outcomes),
        "requests": report["requests"],
        "processed": report["processed"],
        "moved": report["moved"],
        "faults": report["faults"],
        "rss": rss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    result = run(options.kind, options.seed, options.seconds)
    print(json.dumps(result, indent=1))  # noqa: T201
    sys.exit(bool(result["violations"]))


if __name__ == "__main__":
    main()
