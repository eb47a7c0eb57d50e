"""A middlebox on loopback: a TCP relay that forgets the flows on which no byte passed for a while.

A load balancer, NAT or firewall keeps an entry for each flow and drops it when the flow was silent for too long. It
tells neither side; what they send from then on it drops too, and neither can tell that from a peer that takes its time.
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["BytesDropped", "BytesPassed", "Event", "FlowForgotten", "FlowOpened", "Middlebox", "Towards"]

_HOST = "127.0.0.1"
_READ_SIZE = 65536


class Towards(enum.Enum):
    """Which way bytes went."""

    SERVER = "server"
    CLIENT = "client"


@dataclass(frozen=True, slots=True)
class FlowOpened:
    """A client connected."""

    flow: int
    at: float


@dataclass(frozen=True, slots=True)
class BytesPassed:
    """Bytes came and were passed on."""

    flow: int
    towards: Towards
    count: int
    at: float


@dataclass(frozen=True, slots=True)
class BytesDropped:
    """Bytes came on a flow that is forgotten; nobody is told."""

    flow: int
    towards: Towards
    count: int
    at: float


@dataclass(frozen=True, slots=True)
class FlowForgotten:
    """From now on this flow's bytes are dropped."""

    flow: int
    at: float


Event: TypeAlias = FlowOpened | BytesPassed | BytesDropped | FlowForgotten


class Middlebox:
    """A relay to `target` that listens on `port`: an asynchronous context manager, for asyncio.

    `forget_after` is the silence in seconds after which a flow is forgotten. `listener` is told synchronously of
    everything that happens; an event's `at` is the event loop's time, its `flow` counts the connections from 1.
    """

    port: int

    def __init__(self, target: tuple[str, int], forget_after: float, listener: Callable[[Event], object]) -> None:
        self._target = target
        self._forget_after = forget_after
        self._tell = listener
        self._vanished = False
        self._flows: list[_Flow] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, _HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for flow in self._flows:
            flow.abort()
        # The transports close their sockets in the loop's next round.
        await asyncio.sleep(0)

    def vanish(self) -> None:
        """Let the server disappear: nothing comes from it any more, and all that is sent to it is dropped."""
        self._vanished = True
        for flow in self._flows:
            flow.forget()
            flow.leave_server()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        flow = _Flow(len(self._flows) + 1, self._forget_after, self._tell, reader, writer)
        self._flows.append(flow)
        task = asyncio.get_running_loop().create_task(flow.relay(None if self._vanished else self._target))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Flow:
    """One client's connection, and the relay's own to the server.

    Once the flow is forgotten nothing crosses any more: neither bytes nor the news that one side has closed.
    """

    def __init__(
        self,
        number: int,
        forget_after: float,
        tell: Callable[[Event], object],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._number = number
        self._forget_after = forget_after
        self._tell = tell
        self._reader = reader
        self._writers = [writer]
        self._loop = asyncio.get_running_loop()
        self._last_byte = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._forgotten = False
        self._ended = False

    async def relay(self, target: tuple[str, int] | None) -> None:
        """Pass bytes on both ways until both sides have closed; without a target, drop all that the client sends."""
        (client,) = self._writers
        self._tell(FlowOpened(self._number, self._loop.time()))
        try:
            if target is None:
                self.forget()
                await self._pump(self._reader, client, Towards.SERVER)
            else:
                self._look_at_clock()
                reader, server = await asyncio.open_connection(*target)
                self._writers.append(server)
                async with asyncio.TaskGroup() as pumps:
                    pumps.create_task(self._pump(self._reader, server, Towards.SERVER))
                    pumps.create_task(self._pump(reader, client, Towards.CLIENT))
        except OSError:
            # There is no server. The client learns it as it would without us.
            client.transport.abort()
        finally:
            self._ended = True
            if self._timer is not None:
                self._timer.cancel()
            if not self._forgotten:
                for writer in self._writers:
                    writer.close()

    def forget(self) -> None:
        """Drop everything from now on."""
        if not self._forgotten and not self._ended:
            self._forgotten = True
            self._tell(FlowForgotten(self._number, self._loop.time()))

    def leave_server(self) -> None:
        """Close the relay's own connection."""
        for writer in self._writers[1:]:
            writer.transport.abort()

    def abort(self) -> None:
        """Close both connections, whatever is still to be written."""
        for writer in self._writers:
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, towards: Towards) -> None:
        """Carry bytes one way until there are no more."""
        try:
            while data := await reader.read(_READ_SIZE):
                now = self._loop.time()
                if self._forgotten:
                    self._tell(BytesDropped(self._number, towards, len(data), now))
                    continue
                self._last_byte = now
                self._tell(BytesPassed(self._number, towards, len(data), now))
                writer.write(data)
                await writer.drain()
            if not self._forgotten:
                writer.write_eof()
        except OSError:
            # A reset, from the side that is read or from the one that is written to: the other side gets one too.
            if not self._forgotten:
                self.abort()

    def _look_at_clock(self) -> None:
        """Forget the flow if it was silent for too long, else look again when it may have been."""
        due = self._last_byte + self._forget_after
        if self._loop.time() >= due:
            self.forget()
        else:
            self._timer = self._loop.call_at(due, self._look_at_clock)
