"""A bad line: carries TCP connections to a server, and does to them at random whatever networks do."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import socket
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from support.raw import abort, close

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["BadLine"]

_CHUNK = 65_536
#: How long a line that has gone silent is kept, in seconds.
_SILENCE = 4.0
#: Bytes that a line which cuts its input to crumbs does that to at a time; more would but take time.
_CRUMBLED = 2_000


class _Wire:
    """One connection: its ends, the client's and the server's, and what is wrong with the way between them."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.ends = near, far
        #: For what comes from each end: it is lost; it has to wait.
        self.swallows = [False, False]
        self.clear = [asyncio.Event(), asyncio.Event()]
        for event in self.clear:
            event.set()
        self.latency = 0.0
        self.crumb = 0
        self.garbles = False
        #: It never works again.
        self.lost = False


class BadLine:
    """Listens on a port of its own; fair until `set_weather`."""

    def __init__(self, port: int, seed: int, *, garbles: bool) -> None:
        self._to = port
        self._random = random.Random(seed + 1)
        self._garbles = garbles
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1_000)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._violence = 0.0
        self._changed = asyncio.Event()
        #: How often each thing was done.
        self.faults: collections.Counter[str] = collections.Counter()

    def set_weather(self, violence: float) -> None:
        """Begin a storm, or end it with 0, which takes those wires with it that never work again."""
        self._violence = violence
        self._changed.set()
        self._changed = asyncio.Event()

    async def carry(self) -> None:
        """Carry connections until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            async with anyio.create_task_group() as tasks:
                while True:
                    near, _ = await loop.sock_accept(self._listener)
                    tasks.start_soon(self._connect, near)
        finally:
            self._listener.close()

    async def _connect(self, near: socket.socket) -> None:
        chance = self._random.random
        far = socket.socket()
        try:
            for end in (near, far):
                end.setblocking(False)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if chance() < 0.03 * self._violence:
                self.faults["refused"] += 1
                abort(near)
                return
            if chance() < 0.05 * self._violence:
                self.faults["slow to connect"] += 1
                await anyio.sleep(self._random.expovariate(3))
            await asyncio.get_running_loop().sock_connect(far, ("127.0.0.1", self._to))
            async with anyio.create_task_group() as tasks:
                wire = _Wire(near, far)
                tasks.start_soon(self._spoil, wire, tasks.cancel_scope)
                async with anyio.create_task_group() as both:
                    both.start_soon(self._direct, wire, 0)
                    both.start_soon(self._direct, wire, 1)
                tasks.cancel_scope.cancel()
        except* OSError:
            pass
        finally:
            close(near)
            close(far)

    async def _direct(self, wire: _Wire, origin: int) -> None:
        loop = asyncio.get_running_loop()
        source, sink = wire.ends[origin], wire.ends[1 - origin]
        while data := await loop.sock_recv(source, _CHUNK):
            if wire.swallows[origin]:
                continue
            await wire.clear[origin].wait()
            if wire.latency:
                await anyio.sleep(wire.latency)
            if wire.garbles:
                wire.garbles = False
                spoilt = bytearray(data)
                spoilt[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
                data = bytes(spoilt)
            # It may change meanwhile.
            size = wire.crumb
            if size:
                for start in range(0, min(len(data), _CRUMBLED), size):
                    await loop.sock_sendall(sink, data[start : min(start + size, _CRUMBLED)])
                    await anyio.lowlevel.checkpoint()
                data = data[_CRUMBLED:]
            await loop.sock_sendall(sink, data)
        if wire.swallows[origin]:
            # The end is lost as everything else.
            await anyio.sleep(_SILENCE)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    # What goes wrong

    async def _spoil(self, wire: _Wire, end: anyio.CancelScope) -> None:
        faults: list[tuple[int, Callable[[_Wire], Awaitable[bool]]]] = [
            (3, self._reset),
            (2, self._close),
            (2, self._half_close),
            (3, self._go_silent),
            (8, self._stall),
            (5, self._delay),
            (5, self._crumble),
            (1, self._garble),
        ]
        weights, kinds = zip(*faults, strict=True)
        over = False
        if self._random.random() < 0.1 * self._violence:
            # In the middle of the handshake.
            await anyio.sleep(self._random.expovariate(200))
            self.faults["early end"] += 1
            over = await self._random.choice((self._reset, self._close, self._half_close, self._go_silent))(wire)
        while not over:
            if not self._violence:
                if wire.lost:
                    break
                wire.latency = wire.crumb = 0
                await self._changed.wait()
                continue
            changed = self._changed
            with anyio.move_on_after(_SILENCE if wire.lost else self._random.expovariate(1.5 * self._violence)):
                await changed.wait()
                continue
            if wire.lost:
                break
            fault = self._random.choices(kinds, weights)[0]
            self.faults[fault.__name__.strip("_")] += 1
            over = await fault(wire)
        abort(wire.ends[0])
        end.cancel()

    async def _reset(self, wire: _Wire) -> bool:
        abort(wire.ends[0])
        if self._random.random() < 0.5:
            abort(wire.ends[1])
        return True

    async def _close(self, wire: _Wire) -> bool:
        for end in wire.ends:
            close(end)
        return True

    async def _half_close(self, wire: _Wire) -> bool:
        """One end hears no more, and is heard."""
        wire.lost = True
        which = self._random.randrange(2)
        wire.swallows[1 - which] = True
        with contextlib.suppress(OSError):
            wire.ends[which].shutdown(socket.SHUT_WR)
        return False

    async def _go_silent(self, wire: _Wire) -> bool:
        wire.lost = True
        for origin in self._random.choice(((0,), (1,), (0, 1))):
            if self._random.random() < 0.5:
                wire.swallows[origin] = True
            else:
                wire.clear[origin].clear()
        return False

    async def _stall(self, wire: _Wire) -> bool:
        which = self._random.choice(((0,), (1,), (0, 1)))
        for origin in which:
            wire.clear[origin].clear()
        await anyio.sleep(self._random.uniform(0.05, 1.2))
        for origin in which:
            wire.clear[origin].set()
        return False

    async def _delay(self, wire: _Wire) -> bool:
        wire.latency = self._random.choice((0, 0.001, 0.005, 0.02))
        return False

    async def _crumble(self, wire: _Wire) -> bool:
        wire.crumb = self._random.choice((0, 1, 7, 100))
        return False

    async def _garble(self, wire: _Wire) -> bool:
        wire.garbles = self._garbles
        return False
