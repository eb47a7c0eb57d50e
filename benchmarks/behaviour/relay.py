"""The network between client and server: a TCP relay on loopback that can fail in every way that a path can.

What a failed path would have dropped is withheld, not thrown away: once the client is gone, `release` delivers it, so
that the server can tell what the client had sent into the dark. Nobody could see the difference before that. As on a
real path the sender notices that nothing is taken any more only when buffers are full.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

_HOST = "127.0.0.1"
_CHUNK = 65536
_BUFFER = 131072
#: What a thin link holds of each direction, in bytes, and how often it lets a piece through.
_THIN_BUFFER = 8192
_THIN_TICKS = 50
_CLOG_ATTEMPTS = 4


class Way(enum.Enum):
    """A direction."""

    UP = "up"  # towards the server
    DOWN = "down"  # towards the client


@dataclass
class Pipe:
    """One direction of one flow."""

    source: socket.socket
    sink: socket.socket
    rate: float | None
    #: Set while bytes may pass.
    open: asyncio.Event = field(default_factory=asyncio.Event)
    #: How many bytes had come, by when.
    came: list[tuple[int, float]] = field(default_factory=list)
    #: How many bytes were let through, by when.
    passed: list[tuple[int, float]] = field(default_factory=list)
    #: How many bytes had been let through when the rest was released.
    delivered: int = 0
    waiting: deque[bytes] = field(default_factory=deque)
    held: int = 0
    ended: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """Let both ends look again."""
        self.changed.set()
        self.changed = asyncio.Event()


class Flow:
    """A client's connection and the relay's own to the server."""

    def __init__(self, client: socket.socket, server: socket.socket, rates: dict[Way, float | None]) -> None:
        self.port: int = server.getsockname()[1]
        self.pipes = {
            Way.UP: Pipe(client, server, rates[Way.UP]),
            Way.DOWN: Pipe(server, client, rates[Way.DOWN]),
        }
        self._sockets = (client, server)
        self._began = time.monotonic()
        self._task: asyncio.Task[object] | None = None

    @property
    def last_byte(self) -> float:
        return max((pipe.came[-1][1] for pipe in self.pipes.values() if pipe.came), default=self._began)

    async def run(self) -> None:
        """Carry bytes both ways until both have ended."""
        self._task = asyncio.current_task()
        try:
            async with asyncio.TaskGroup() as tasks:
                for pipe in self.pipes.values():
                    tasks.create_task(self._fill(pipe))
                    tasks.create_task(self._drain(pipe))
        except* OSError:
            self.reset()
        finally:
            for end in self._sockets:
                end.close()

    async def _fill(self, pipe: Pipe) -> None:
        loop = asyncio.get_running_loop()
        room = _BUFFER if pipe.rate is None else _THIN_BUFFER
        while True:
            while pipe.held >= room:
                await pipe.changed.wait()
            try:
                data = await loop.sock_recv(pipe.source, min(_CHUNK, room))
            except OSError:
                # A reset. Where the path is dead nobody hears of it.
                if pipe.open.is_set():
                    raise
                data = b""
            if not data:
                pipe.ended = True
                pipe.wake()
                return
            total = (pipe.came[-1][0] if pipe.came else 0) + len(data)
            pipe.came.append((total, time.monotonic()))
            pipe.waiting.append(data)
            pipe.held += len(data)
            pipe.wake()

    async def _drain(self, pipe: Pipe) -> None:
        while True:
            await pipe.open.wait()
            if pipe.waiting:
                await self._pass(pipe, pipe.waiting.popleft())
            elif pipe.ended:
                with contextlib.suppress(OSError):
                    pipe.sink.shutdown(socket.SHUT_WR)
                return
            else:
                await pipe.changed.wait()

    async def _pass(self, pipe: Pipe, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        step = len(data) if pipe.rate is None else max(1, int(pipe.rate / _THIN_TICKS))
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            if pipe.rate is not None:
                await asyncio.sleep(len(piece) / pipe.rate)
            await pipe.open.wait()
            await loop.sock_sendall(pipe.sink, piece)
            pipe.held -= len(piece)
            pipe.passed.append(((pipe.passed[-1][0] if pipe.passed else 0) + len(piece), time.monotonic()))
            pipe.wake()

    def shut(self, *ways: Way) -> None:
        """Nothing passes any more in these directions."""
        for way in ways:
            self.pipes[way].open.clear()

    def release(self) -> None:
        """Deliver to the server what was withheld from it, at once."""
        for pipe in self.pipes.values():
            pipe.delivered = pipe.passed[-1][0] if pipe.passed else 0
            pipe.rate = None
            pipe.open.set()
            pipe.wake()

    def reset(self) -> None:
        """RST to both sides."""
        for end in self._sockets:
            if end.fileno() != -1:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if self._task is not None:
            self._task.cancel()


class Relay:
    """Listens on `host` at `port`, and connects to `target`; an asynchronous context manager.

    `forget_after`: seconds of silence after which a flow is dead for good, while others live. `rates`: bytes a second.
    `clogged`: no connection is accepted; SYNs go unanswered until `heal`.
    """

    def __init__(
        self,
        target: int,
        *,
        forget_after: float | None = None,
        rates: dict[Way, float | None] | None = None,
        clogged: bool = False,
        host: str = _HOST,
        forgot: Callable[[], object] = lambda: None,
    ) -> None:
        self.target = target
        self.flows: list[Flow] = []
        self._forget_after = forget_after
        self._rates = rates or dict.fromkeys(Way)
        self._clogged = clogged
        self._host = host
        self._forgot = forgot
        self._shut: tuple[Way, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        self._fillers: list[socket.socket] = []

    async def __aenter__(self) -> Self:
        self._listener = socket.socket()
        if any(self._rates.values()):
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _THIN_BUFFER)
        self._listener.bind((self._host, 0))
        self._listener.listen(0 if self._clogged else 128)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        if self._clogged:
            await self._clog()
        else:
            self._start(self._accept())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sock in (self._listener, *self._fillers):
            sock.close()

    def shut(self, *ways: Way) -> None:
        """From now on nothing passes in these directions, or in none, on no flow that there is or will be."""
        self._shut = ways or tuple(Way)
        for flow in self.flows:
            flow.shut(*self._shut)

    def forget(self) -> None:
        """Nothing passes any more on the flows that there are; new ones live."""
        for flow in self.flows:
            flow.shut(*Way)

    def heal(self) -> None:
        """New connections work again; what was dead stays dead."""
        self._shut = ()
        if self._clogged:
            self._clogged = False
            for filler in self._fillers:
                filler.close()
            self._start(self._accept())

    def reset(self) -> None:
        """RST on every flow."""
        for flow in self.flows:
            flow.reset()

    def release(self) -> None:
        """Deliver all that was withheld."""
        for flow in self.flows:
            flow.release()

    async def _clog(self) -> None:
        """Fill the queue of connections that wait to be accepted: the kernel then drops further SYNs."""
        loop = asyncio.get_running_loop()
        for _ in range(_CLOG_ATTEMPTS):
            filler = socket.socket()
            filler.setblocking(False)
            self._fillers.append(filler)
            try:
                await asyncio.wait_for(loop.sock_connect(filler, (self._host, self.port)), 0.2)
            except TimeoutError:
                return
        raise RuntimeError("the kernel accepts connections beyond the listener's backlog")

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self._listener)
            self._start(self._relay(client))

    async def _relay(self, client: socket.socket) -> None:
        server = socket.socket()
        server.setblocking(False)
        if self._rates[Way.DOWN] is not None:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _THIN_BUFFER)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.get_running_loop().sock_connect(server, (_HOST, self.target))
        except OSError:
            client.close()
            server.close()
            return
        flow = Flow(client, server, self._rates)
        for way in Way:
            if way not in self._shut:
                flow.pipes[way].open.set()
        self.flows.append(flow)
        if self._forget_after is not None:
            self._look_at_clock(flow, self._forget_after)
        await flow.run()

    def _look_at_clock(self, flow: Flow, limit: float) -> None:
        """Forget the flow if it was silent for too long, else look again when it may have been."""
        if (left := flow.last_byte + limit - time.monotonic()) > 0:
            asyncio.get_running_loop().call_later(left, self._look_at_clock, flow, limit)
        else:
            flow.shut(*Way)
            self._forgot()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
