"""A Python client in a process of its own: python -m benchmarks.behaviour.worker CLIENT --ca FILE ...

Orders come as lines of JSON on standard input: `request` (with `id`, `method`, `url`, `upload` bytes) and `block` (for
`seconds`, with the interpreter's lock held, so that no thread of Python's runs). What became of each request goes out
as a line of JSON. Times are those of the monotonic clock.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.behaviour.adapters import ASYNC, BLOCKING, BlockingFetch, Fetch, Patience

if TYPE_CHECKING:
    from collections.abc import Mapping


def tell(event: str, **facts: object) -> None:
    # In one piece, whichever thread it is.
    os.write(1, json.dumps({"event": event, "at": time.monotonic(), **facts}).encode() + b"\n")


def tell_error(order: Mapping[str, Any], error: BaseException) -> None:
    tell("error", id=order["id"], type=type(error).__name__, message=str(error)[:200])


def block(seconds: float) -> None:
    """Sleep as code does that keeps Python's lock."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


async def run_async(fetch: Fetch) -> None:
    async def request(order: Mapping[str, Any]) -> None:
        try:
            status, size = await fetch(order["method"], order["url"], bytes(order["upload"]))
        except Exception as error:  # noqa: BLE001
            tell_error(order, error)
        else:
            tell("answer", id=order["id"], status=status, size=size)

    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks: set[asyncio.Task[None]] = set()
    tell("ready")
    while line := await reader.readline():
        order = json.loads(line)
        if order["do"] == "block":
            block(order["seconds"])
        else:
            tasks.add(asyncio.create_task(request(order)))


def run_blocking(fetch: BlockingFetch) -> None:
    def request(order: Mapping[str, Any]) -> None:
        try:
            status, size = fetch(order["method"], order["url"], bytes(order["upload"]))
        except Exception as error:  # noqa: BLE001
            tell_error(order, error)
        else:
            tell("answer", id=order["id"], status=status, size=size)

    tell("ready")
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "block":
            block(order["seconds"])
        else:
            threading.Thread(target=request, args=(order,), daemon=True).start()


async def amain(client: str, ca: Path, patience: Patience) -> None:
    async with ASYNC[client](ca, patience) as fetch:
        await run_async(fetch)
        # Without farewells, which could wait for a dead peer.
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.behaviour.worker")
    parser.add_argument("client", choices=[*ASYNC, *BLOCKING])
    parser.add_argument("--ca", type=Path, required=True)
    for name in ("idle", "ping", "connect", "read"):
        parser.add_argument(f"--{name}", type=float, required=True, help="seconds")
    options = parser.parse_args()
    patience = Patience(options.idle, options.ping, options.connect, options.read)
    if options.client in BLOCKING:
        with BLOCKING[options.client](options.ca, patience) as fetch:
            run_blocking(fetch)
            os._exit(0)
    else:
        asyncio.run(amain(options.client, options.ca, patience))


if __name__ == "__main__":
    main()
