"""One client under one fault, from fresh processes to a record."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.behaviour.adapters import Patience
from benchmarks.behaviour.faults import SEVERAL, Fault
from benchmarks.behaviour.heartbeat import LATE, heartbeat, waited
from benchmarks.behaviour.judge import Attempt, Record
from benchmarks.behaviour.relay import Relay, Way

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from benchmarks.behaviour.network import Network
    from benchmarks.server import Kit

ROOT = Path(__file__).parent.parent.parent
GO_CLIENT = ROOT / "benchmarks" / ".build" / "behaviourclient"
READ_IDLE_TIMEOUT = 1.0
PING_TIMEOUT = 1.0
CONNECT_TIMEOUT = 2.0
#: Seconds after the fault after which a request that has neither answer nor error hangs.
CUTOFF = 8.0
#: What the stage may take to be set, the next request to be answered, the rest to be counted.
SETTING_UP = 20.0
PROBE = 3.0
COUNTING = 3.0
SIZE = 20
#: How finely the times of bytes are kept, in seconds.
RESOLUTION = 0.04


class CellError(Exception):
    """The stage could not be set: what was seen says nothing about the client."""


class Asked:
    """A request that the client was told to make."""

    def __init__(self, cell: Cell, attempt: Attempt) -> None:
        self.id = attempt.id
        self._cell = cell
        self._attempt = attempt

    @property
    def ended(self) -> bool:
        return self._attempt.ended is not None

    async def settled(self) -> None:
        """Wait for its end, or the cut-off."""
        await self._cell.settled(self)


class Process:
    """A server or a client: orders go in, events come out."""

    def __init__(self, process: asyncio.subprocess.Process, told: Callable[[dict[str, Any]], object]) -> None:
        self.process = process
        self._task = asyncio.create_task(self._listen(told))

    @classmethod
    async def start(cls, command: Sequence[str], told: Callable[[dict[str, Any]], object]) -> Process:
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        pipe = asyncio.subprocess.PIPE
        return cls(
            await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe), told
        )

    async def _listen(self, told: Callable[[dict[str, Any]], object]) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            told(json.loads(line))

    def order(self, do: str, **facts: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **facts}).encode() + b"\n")

    def signal(self, number: signal.Signals) -> None:
        if self.process.returncode is None:
            # `send_signal` could take the exit status away from the event loop.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.process.wait()
        await self._task


class Cell:
    """The stage: server, relay and client; and what scripts may do on it."""

    relay: Relay

    def __init__(self, fault: Fault, client: str, kit: Kit, network: Network | None = None) -> None:
        self._fault = fault
        self._network = network
        self._host = "127.0.0.1" if network is None else network.host
        self._client = client
        self._kit = kit
        self._events: list[dict[str, Any]] = []
        self._attempts: list[Attempt] = []
        self._asked: list[Asked] = []
        self._changed = asyncio.Event()
        self._faulted: float | None = None
        self._disturbed = 0.0
        #: A server that was stopped wakes late.
        self._may_be_late = False
        self.forgotten: list[float] = []

    # What scripts may do

    def happens(self, at: float | None = None) -> None:
        """The fault happens, now or `at` a moment just gone by."""
        self._faulted = time.monotonic() if at is None else at

    def request(self, *, wait: float, upload: int = 0) -> Asked:
        return self._ask("POST", f"/answer?size={SIZE}&wait={wait}", SIZE, upload)

    async def warm_up(self) -> None:
        """A request before anything fails, so that there is a connection."""
        await self.request(wait=0).settled()
        if self._attempts[-1].outcome != "ok":
            raise CellError(f"{self._fault.name}, {self._client}: the first request failed: {self._attempts[-1].error}")

    def download(self, *, size: int, piece: int, interval: float) -> Asked:
        return self._ask("GET", f"/stream?size={size}&piece={piece}&interval={interval}", size, 0)

    async def several(self, *, wait: float, count: int = SEVERAL) -> None:
        """Requests that the server is busy with, all of them, and that it will answer after `wait` seconds."""
        asked = {self.request(wait=wait).id for _ in range(count)}
        await self.until(lambda: asked <= {e["id"] for e in self._events if e["event"] == "taken"})

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that is bound to happen."""
        try:
            async with asyncio.timeout(SETTING_UP):
                await self._until(condition)
        except TimeoutError:
            raise CellError(f"{self._fault.name}, {self._client}: what the fault needs did not come about") from None

    async def settled(self, *asked: Asked) -> None:
        """Wait until these requests have ended, by default all; or up to the cut-off."""
        began = time.monotonic() if self._faulted is None else self._faulted
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, began + CUTOFF - time.monotonic())):
                await self._until(lambda: all(one.ended for one in asked or self._asked))

    async def shut(self, *ways: Way) -> None:
        """The path fails in these directions, by default in both, for whatever connection there is or will be."""
        if self._network is None:
            self.relay.shut(*ways)
        else:
            await self._network.shut(*ways)

    def bytes_of(self, event: str, request: int) -> int:
        """How much of a request's body came to the server, or of its answer was sent."""
        return max((e["bytes"] for e in self._events if e["event"] == event and e["id"] == request), default=0)

    async def order_server(self, what: str) -> None:
        self._server.order(what)
        await self.until(lambda: any(e["event"] == "obeyed" and e["order"] == what for e in self._events))

    def signal_server(self, number: signal.Signals) -> None:
        self._may_be_late = True
        self._server.signal(number)

    async def kill_server(self) -> None:
        await self._server.kill()

    def block(self, seconds: float) -> None:
        self._worker.order("block", seconds=seconds)

    async def freeze(self, seconds: float) -> None:
        """Stop the client's process for a while."""
        self._worker.signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self._worker.signal(signal.SIGCONT)

    # The course of things

    async def run(self) -> Record:
        """Set the stage, play the script, see what comes of it."""
        beats = asyncio.create_task(heartbeat(self._note_late))
        try:
            return await self._run()
        finally:
            beats.cancel()

    async def _run(self) -> Record:
        self._server = await self._start_server()
        try:
            async with Relay(
                self._port,
                forget_after=self._fault.forget_after,
                rates={way: self._fault.rates.get(way) for way in Way},
                clogged=self._fault.clogged and self._network is None,
                host=self._host,
                forgot=self._note_forgotten,
            ) as self.relay:
                self._worker = await Process.start(self._worker_command(), self._note)
                try:
                    await self.until(lambda: any(e["event"] == "ready" for e in self._events))
                    before = waited(self._worker.process.pid)
                    await self._fault.script(self)
                    await self.settled()
                    self._note_late(waited(self._worker.process.pid) - before)
                    await self._probe()
                finally:
                    await self._worker.kill()
                await self._count()
                return self._record()
        finally:
            await self._server.kill()

    async def _probe(self) -> None:
        """Let new connections work, and make another request."""
        self.relay.heal()
        if self._network is not None:
            await self._network.heal()
        if self._server.process.returncode is None:
            self._server.signal(signal.SIGCONT)
        else:
            self._server = await self._start_server()
            self.relay.target = self._port
        asked = self.request(wait=0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE):
                await self._until(lambda: asked.ended)

    async def _count(self) -> None:
        """Deliver to the server what the path swallowed, so that it is counted."""
        self._counted = time.monotonic()
        self._server.order("audit")
        self.relay.release()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COUNTING):
                await self._until(
                    lambda: (
                        {flow.port for flow in self.relay.flows}
                        <= {event["port"] for event in self._events if event["event"] == "closed"}
                    )
                )

    async def _start_server(self) -> Process:
        command = [sys.executable, "-m", "benchmarks.behaviour.server", "--cert", str(self._kit.cert)]
        server = await Process.start([*command, "--window", str(self._fault.window)], self._note)
        already = len(self._events)
        await self.until(lambda: any(e["event"] == "listening" for e in self._events[already:]))
        self._port: int = next(e["port"] for e in self._events[already:] if e["event"] == "listening")
        return server

    def _worker_command(self) -> list[str]:
        patience = Patience(READ_IDLE_TIMEOUT, PING_TIMEOUT, CONNECT_TIMEOUT, self._fault.read)
        options = {
            "ca": self._kit.ca,
            "idle": patience.read_idle_timeout,
            "ping": patience.ping_timeout,
            "connect": patience.connect,
            "read": patience.read,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        prefix = [] if self._network is None else self._network.prefix
        if self._client == "go":
            return [*prefix, str(GO_CLIENT), *arguments, f"--clock={time.time() - time.monotonic()}"]
        return [*prefix, sys.executable, "-m", "benchmarks.behaviour.worker", self._client, *arguments]

    def _ask(self, method: str, target: str, size: int, upload: int) -> Asked:
        attempt = Attempt(len(self._attempts) + 1, time.monotonic(), size)
        self._attempts.append(attempt)
        url = f"https://{self._host}:{self.relay.port}{target}&id={attempt.id}"
        self._worker.order("request", id=attempt.id, method=method, url=url, upload=upload)
        self._asked.append(Asked(self, attempt))
        return self._asked[-1]

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        if event["event"] in ("answer", "error"):
            attempt = self._attempts[event["id"] - 1]
            attempt.ended = event["at"]
            attempt.status, attempt.received = event.get("status"), event.get("size")
            if event["event"] == "error":
                attempt.error = (event["type"], event["message"])
        elif event["event"] == "late" and not self._may_be_late:
            self._note_late(event["by"])
        self._wake()

    def _note_late(self, by: float) -> None:
        if by > LATE:
            self._disturbed = max(self._disturbed, by)

    def _note_forgotten(self) -> None:
        self.forgotten.append(time.monotonic())
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    # What was seen

    def _arrivals(self) -> Mapping[int, int]:
        arrived = Counter(event["id"] for event in self._events if event["event"] == "request")
        arrived.subtract(event["id"] for event in self._events if event["event"] == "refused")
        return arrived

    def _record(self) -> Record:
        assert self._faulted is not None
        zero = self._faulted
        *attempts, probe = self._attempts
        for attempt in attempts:
            # What came only after the cut-off was repaired by what the next request needs.
            if attempt.ended is not None and attempt.ended > probe.started:
                attempt.ended = attempt.status = attempt.received = attempt.error = None
        for attempt in self._attempts:
            attempt.started -= zero
            if attempt.ended is not None:
                attempt.ended -= zero
        end = probe.started
        up: list[float] = []
        down: list[float] = []
        swallowed: list[float] = []
        for flow in self.relay.flows:
            pipe = flow.pipes[Way.UP]
            for total, at in pipe.came:
                (up if total <= pipe.delivered else swallowed).append(at - zero)
            down += [at - zero for _, at in flow.pipes[Way.DOWN].passed]
        return Record(
            self._fault.name,
            self._client,
            attempts,
            probe,
            dict(self._arrivals()),
            sorted(at for at in self._pings(zero) if at < end or at >= self._counted - zero),
            self._disturbed,
            *(_thinned(times, end) for times in (up, down, swallowed)),
        )

    def _pings(self, zero: float) -> Iterator[float]:
        flows = {flow.port: flow for flow in self.relay.flows}
        for event in self._events:
            if event["event"] == "ping":
                came = flows[event["port"]].pipes[Way.UP].came
                yield came[bisect.bisect_left(came, (event["offset"], 0.0))][1] - zero


def _thinned(times: Iterable[float], end: float) -> list[float]:
    """The moments before `end`, as close together as an eye can tell apart."""
    return sorted({round(at / RESOLUTION) * RESOLUTION for at in times if at < end})
