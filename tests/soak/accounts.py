"""What every soak has: the server's process, a list of what went wrong, and looks for what is left behind."""

from __future__ import annotations

import collections
import faulthandler
import gc
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import anyio.to_thread

import h2keep
from h2keep.protocol.connection import Connection
from h2keep.protocol.flow import CONNECTION_WINDOW
from h2keep.protocol.stream import Stream
from h2keep.runner.connection import Http2Connection
from h2keep.runner.exchange import Exchange
from h2keep.runner.origin import Waiter
from h2keep.runner.pool import Pool
from h2keep.runner.stream import Http2Stream
from soak.clients import CONNECTIONS, Request
from support.background import background_threads
from support.leaks import open_sockets
from support.pools import assert_pool_at_rest

if TYPE_CHECKING:
    import random

    from h2keep.runner.background import Lease
    from soak.clients import Door

__all__ = ["BOUND", "WORKERS", "Far", "Storm", "Violations", "open_streams"]

#: No request may take longer, in seconds: more than what its timeouts, its attempts and the line's stalls allow.
BOUND = 45.0
#: Tasks or threads that make requests.
WORKERS = 12
_KINDS_OF_OBJECTS = (Connection, Stream, Http2Connection, Http2Stream, Exchange, Pool)
#: Credit that may be on its way back to the server.
_CREDIT_DUE = 1024 * 1024


class Violations:
    """What was wrong."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def add(self, text: str) -> None:
        self.seen.append(text)
        print("VIOLATION", text, file=sys.stderr, flush=True)  # noqa: T201


class Far:
    """The server's process."""

    def __init__(self, seed: int) -> None:
        command = [sys.executable, "-m", "soak.server", str(seed)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.hello = json.loads(self._process.stdout.readline())
        self._lock = threading.Lock()

    def order(self, word: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    async def aorder(self, word: str) -> Any:
        return await anyio.to_thread.run_sync(self.order, word)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Storm:
    """What asynchronous and threaded storms share: accounts, and looks for what is left."""

    def __init__(self, kind: str, seed: int, far: Far, violations: Violations) -> None:
        self.kind, self.seed, self.far, self.violations = kind, seed, far, violations
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.numbers = iter(range(10**9))
        self.generation = 0
        self.closed = False
        #: What each worker asked for last.
        self.latest: dict[int, Request] = {}
        #: When each worker began with what it does.
        self.began: dict[int, float] = {}
        self.snapshot = ""

    def request(self, chance: random.Random, door: Door, *, calm: bool = False) -> Request:
        request = Request(chance, f"{self.seed}-{self.generation}-{next(self.numbers)}", door.base, calm=calm)
        self.latest[id(chance)] = request
        return request

    def failed(self, door: Door, chance: random.Random, error: BaseException, what: str) -> None:
        """A request ended so."""
        self.outcomes[f"{what}: {type(error).__name__}"] += 1
        if isinstance(error, TimeoutError) and not isinstance(error, h2keep.H2KeepError):
            request = self.latest.get(id(chance))
            fates = None if request is None else self.far.order(request.name)
            figures = request and {**vars(request), "headers": len(request.headers)}
            self.violations.add(f"hangs: {what}, {figures}, which the server has as {fates}\n{self.snapshot}")
        elif not door.is_expected(error, closed=self.closed):
            self.violations.add(f"{what}: {''.join(traceback.format_exception(error))}")

    def look_at(self, report: dict[str, Any]) -> None:
        """The server's own account."""
        for text in report["violations"]:
            self.violations.add(text)

    def look_at_pool(self, pool: Pool) -> None:
        """At any moment: the limits hold."""
        draining = sum(len(state.draining) for state in pool._origins.values())
        hedges = len(pool._origins)
        count = pool._count
        counted = len(pool._states) - count._free + count.dials
        if counted > CONNECTIONS + hedges or len(pool._states) > 2 * CONNECTIONS + hedges + draining:
            self.violations.add(f"{len(pool._states)} connections, {draining} draining, {count.dials} dials")

    def look_at_meeting(self, errors: list[Exception]) -> None:
        """In the calm: requests fail no more."""
        if errors:
            text = "".join(traceback.format_exception(errors[0]))
            self.violations.add(f"in the calm {len(errors)} requests failed: {text}")

    def look_at_background(self, lease: Lease) -> None:
        """In the calm: the pool on the background loop is at rest."""
        failures: list[AssertionError | None] = []

        def look() -> None:
            try:
                assert_pool_at_rest(lease.pool())
            except AssertionError as error:
                failures.append(error)
            else:
                failures.append(None)

        for _ in range(100):
            gc.collect()
            failures.clear()
            lease.loop.post(look)
            while not failures:
                time.sleep(0.01)
            if failures[0] is None:
                return
            time.sleep(0.05)
        self.violations.add(f"not at rest: {''.join(traceback.format_exception(failures[0]))}\n{open_streams()}")

    def look_at_server(self) -> None:
        """In the calm: the server has no stream open, and the windows of connections are what they were."""
        for _ in range(100):
            report = self.far.order("report")
            if not report["open"] and all(window >= CONNECTION_WINDOW - _CREDIT_DUE for window in report["windows"]):
                return
            # The last RST_STREAM, or credit, may be on its way.
            time.sleep(0.05)
        seen = f"open streams {report['open']}, and windows of {report['windows']}"
        self.violations.add(f"the server has {seen}\n{open_streams()}")

    def join(self, threads: list[threading.Thread]) -> None:
        """All of them end."""
        patience = time.monotonic() + BOUND
        for thread in threads:
            thread.join(max(patience - time.monotonic(), 0.1))
            if thread.is_alive():
                self.violations.add(f"hangs: {thread}\n{open_streams()}")
                faulthandler.dump_traceback()
                os._exit(1)

    def leftovers(self, sockets: set[str]) -> list[object]:
        """Sockets, threads and objects that are still there."""
        gc.collect()
        left: list[object] = [thing for thing in gc.get_objects() if isinstance(thing, _KINDS_OF_OBJECTS)]
        return left + background_threads() + list(set(open_sockets().values()) - sockets) + gc.garbage

    def look_around(self, sockets: set[str]) -> None:
        """After the end: nothing is left."""
        patience = time.monotonic() + 5
        while left := self.leftovers(sockets):
            if time.monotonic() > patience:
                chains = [[type(referrer).__name__ for referrer in gc.get_referrers(thing)][:8] for thing in left[:5]]
                counts = collections.Counter(type(thing).__name__ for thing in left)
                self.violations.add(f"left: {counts}, referred to by {chains}; {left[-5:]}")
                break
            del left
            time.sleep(0.02)


def open_streams() -> str:
    """All that is open in this process."""
    lines = []
    for pool in [thing for thing in gc.get_objects() if isinstance(thing, Pool)]:
        figures = {name: getattr(pool, name) for name in ("_closed", "_states", "_starved")}
        lines.append(f"pool: {figures} dials={pool._count.dials} moves={len(pool._moves)}")
        lines += [f"  {state}" for state in list(pool._origins.values())]
    for waiter in [thing for thing in gc.get_objects() if isinstance(thing, Waiter)]:
        if not (waiter.gone or waiter.stream or waiter.error):
            lines.append(f"waits: {dict(waiter.request.fields).get(b'x-id')!r}, {waiter.request.timeout}")
    for connection in [thing for thing in gc.get_objects() if isinstance(thing, Http2Connection)]:
        protocol = connection.protocol
        lines.append(
            f"{connection.stats} closed={protocol.closed} max={protocol.max_streams} held={protocol._held_slots} "
            f"goaway={protocol.goaway} allowance={protocol._outbox.allowance}"
        )
        for stream in list(protocol._streams.values()):
            figures = {
                name: getattr(stream, name) for name in type(stream).__slots__ if name not in ("chunks", "buffer")
            }
            lines.append(f"  {figures} buffered={len(stream.buffer)}")
    return "\n".join(lines)
