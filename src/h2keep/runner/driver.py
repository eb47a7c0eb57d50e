"""Moves one connection's bytes on any event loop.

`start_driver` picks the driver. `AnyioDriver` runs on whatever anyio knows: a task that reads, one that writes and one
that keeps time. `CallbackDriver` does the same by asyncio's own callbacks, which cost less, with a single task that
does nothing but notice the loop's end. Either way the reader never writes and is never kept waiting, the writer alone
sends, and whatever ends one ends the connection. Nothing here raises. Stopping awaits nothing, so it works from a
finally block, from a loop that is shutting down, and on a dead peer.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import socket
import struct
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import checkpoint

from h2keep.runner.eventloop import AsyncioLoop
from h2keep.runner.pacing import WritePacer

if sys.platform == "linux":
    import fcntl
    import termios

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from h2keep.runner.connection import Http2Connection

__all__ = ["start_driver"]

#: What one read may bring, in bytes: less while it takes long to digest, as a flood of tiny frames does, else more.
_FIRST_READ = 64 * 1024
_LEAST_READ = 4 * 1024
_MOST_READ = 256 * 1024
#: What the process keeps of freed memory once it reads in bulk, in bytes at most.
_KEPT = 8 * 1024 * 1024
#: Fewer bytes don't take long, whatever they are, and say nothing about the socket's rate: no reason to look at the
#: clock.
_TRIFLE = 1024
#: What the reader or the writer may take before others run (K23): bytes, and seconds.
_TURN = 1024 * 1024
_TURN_SECONDS = 0.005
_NOTSENT_LOWAT: int | None = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else None)


def start_driver(connection: Http2Connection) -> None:
    """Give the connection the driver that suits its event loop. Raises `ConnectError` if that is shutting down."""
    loop = connection.loop
    driver: SocketDriver
    # asyncio's usual loop on Windows can't watch sockets; what anyio does about that is its own affair.
    if isinstance(loop, AsyncioLoop) and sys.platform != "win32":
        driver = CallbackDriver(connection, loop)
    else:
        driver = AnyioDriver(connection)
    connection.driver = driver
    driver.start()


class _Sent(enum.Enum):
    """How the writer's turn ended."""

    ALL = enum.auto()
    #: The socket takes no more for now.
    BLOCKED = enum.auto()
    #: Others are to run first.
    TURN_OVER = enum.auto()
    #: The socket takes no more at all.
    FAILED = enum.auto()


# In Python 3.11 a member costs as much to look up in its enumeration as a call of a function.
_ALL, _BLOCKED, _TURN_OVER, _FAILED = _Sent


class SocketDriver(ABC):
    """What both drivers have in common: a `h2keep.runner.connection.Driver`. Subclasses say who runs when."""

    __slots__ = (
        "_acknowledged", "_body_taken", "_connection", "_failure", "_gone", "_loop", "_pacer", "_protocol",
        "_read_size", "_running", "_socket", "_stopped", "_unsent", "_upload_mark", "_written",
    )  # fmt: skip

    def __init__(self, connection: Http2Connection) -> None:
        self._connection = connection
        self._protocol = connection.protocol
        self._loop = connection.loop
        self._socket = connection.transport.socket
        self._pacer = WritePacer()
        self._stopped = False
        self._running = 0
        self._gone = anyio.Event()
        self._read_size = _FIRST_READ
        self._unsent: Sequence[bytes | memoryview] = ()
        #: Why the socket takes no more at all.
        self._failure: OSError | None = None
        self._written = 0
        self._body_taken = 0
        self._upload_mark = 0
        self._acknowledged = 0

    @abstractmethod
    def start(self) -> None:
        """Begin. Raises `ConnectError` if the loop is shutting down."""

    @abstractmethod
    def wake_writer(self) -> None:
        """Driver."""

    def write_now(self) -> None:
        """Driver. No sooner than else where writing is the business of a task."""
        self.wake_writer()

    @abstractmethod
    def expect_requests(self) -> None:
        """Driver."""

    @abstractmethod
    def wake_timer(self) -> None:
        """Driver."""

    @abstractmethod
    def _let_go(self) -> None:
        """Watch the socket no more, and keep no time."""

    def _spawn(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._loop.spawn(self._guarded(run), ended=self._task_ended)
        self._running += 1

    def _guarded(self, run: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], Coroutine[Any, Any, None]]:
        async def guarded() -> None:
            cause: Exception | None = None
            try:
                await run()
            except GeneratorExit:
                # The loop was dropped with this task in it: there is nothing left to tell, only to close.
                self.reap()
                raise
            except Exception as error:  # noqa: BLE001
                # Nobody awaits this task: its failure becomes the connection's end, and its requests' error.
                cause = error
            except BaseException:
                if not self._stopped:
                    self._connection.loop_ended()
                raise
            finally:
                # Without its tasks the connection is nothing.
                if not self._stopped:
                    self._connection.ended(cause)

        return guarded

    def _task_ended(self) -> None:
        self._running -= 1
        if not self._stopped:
            # It was cancelled before it began.
            self._connection.loop_ended()
        if not self._running:
            self._gone.set()

    # Driver

    async def wait_stopped(self) -> None:
        """Driver."""
        if self._running:
            await self._gone.wait()

    def stop(self, *, abort: bool) -> None:
        """Driver. Everything here is synchronous; what a last non-blocking send doesn't take is lost."""
        if self._stopped:
            return
        self._stopped = True
        sock = self._socket
        # OSError: the peer is gone already, so there is nobody to say goodbye to.
        with contextlib.suppress(OSError):
            if abort:
                # RST in the place of FIN: nothing lingers for a peer that is gone.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self._farewell()
        # RuntimeError: no event loop runs here any more; then nobody waits on this socket either.
        with contextlib.suppress(RuntimeError):
            self._let_go()
        # The writer may be about to hand it over.
        self._unsent = ()
        sock.close()

    def reap(self) -> None:
        """Driver."""
        self._stopped = True
        self._socket.close()

    def _farewell(self) -> None:
        """GOAWAY and close_notify, as far as the kernel takes them."""
        connection = self._connection
        last = connection.next_write(_TURN, self._loop.time())
        data = b"".join([*self._unsent, *last, connection.transport.security.close()])
        if data:
            self._socket.send(data)

    # Turns

    def _receive(self) -> bool:
        """Read what there is, for a turn at most; whether it ended before the socket was empty."""
        connection, time = self._connection, self._loop.time
        turn, began = 0, 0.0
        while not self._stopped:
            size = self._read_size
            try:
                data = self._socket.recv(size)
            except BlockingIOError:
                return False
            if not data:
                connection.ended(self._failure)
                return False
            if len(data) < _TRIFLE:
                connection.bytes_came(data)
                return False
            received = time()
            began = began or received
            connection.bytes_came(data)
            now = time()
            if now - received > _TURN_SECONDS:
                self._read_size = max(size // 2, _LEAST_READ)
            elif len(data) == size and now - received < _TURN_SECONDS / 4:
                self._read_size = min(size * 2, _MOST_READ)
                _keep_freed_memory()
            if len(data) < size:
                return False
            turn += len(data)
            if turn >= _TURN or now - began >= _TURN_SECONDS:
                return True
        return False

    def _send(self) -> _Sent:
        """Write what there is, for a turn at most."""
        connection, time = self._connection, self._loop.time
        turn, began = 0, time()
        now, more = began, True
        while not self._stopped:
            if not self._unsent:
                if not more:
                    self._pacer.note_idle()
                    return _ALL
                self._unsent = connection.next_write(self._pacer.budget, now)
            sent, obstacle = 0, None
            try:
                sent, self._unsent = _send(self._socket, self._unsent)
            except BlockingIOError:
                obstacle = _BLOCKED
            except OSError as error:
                self._failure, obstacle = error, _FAILED
            # The rest isn't done before the peer can begin to work on it.
            body = self._protocol.body_bytes_sent
            if body != self._body_taken:
                self._body_taken = body
                if self._acknowledged >= self._upload_mark:
                    # What was written before an upload is no part of it.
                    self._acknowledged = self._written
                self._upload_mark = self._written + sent + sum(map(len, self._unsent))
            more = connection.write_taken()
            if self._stopped:
                break
            if obstacle is not None:
                return obstacle
            self._written += sent
            if sent < _TRIFLE and not (self._unsent or more):
                self._pacer.note_idle()
                return _ALL
            now = time()
            if self._pacer.note_written(sent, now):
                self._bound_kernel_buffer()
            turn += sent
            if turn >= _TURN or now - began >= _TURN_SECONDS:
                return _TURN_OVER
        return _ALL

    def _read_the_last(self) -> bool:
        """Read, for a turn, what came before the socket failed; whether there is more. If not, that was the end.

        It may be whole responses (K8), or a GOAWAY that says which requests weren't processed (K24).
        """
        if self._receive():
            return True
        if not self._stopped:
            self._connection.ended(self._failure)
        return False

    # The socket's own figures

    def _upload_progressed(self) -> bool:
        """Whether the peer's TCP acknowledged more of an upload since the last look (K4)."""
        before = self._acknowledged
        if before >= self._upload_mark:
            return False
        unacknowledged = _unacknowledged(self._socket)
        if unacknowledged is None:
            return False
        self._acknowledged = max(before, self._written - unacknowledged)
        return self._acknowledged > before

    def _bound_kernel_buffer(self) -> None:
        if _NOTSENT_LOWAT is not None and self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, self._pacer.budget)


class AnyioDriver(SocketDriver):
    """Three tasks: the reader is always in its receive, the writer alone sends, the timer does no I/O."""

    __slots__ = ("_timer", "_writer")

    def __init__(self, connection: Http2Connection) -> None:
        super().__init__(connection)
        self._writer = self._loop.parker()
        self._timer = self._loop.parker()

    def start(self) -> None:
        """SocketDriver."""
        self._bound_kernel_buffer()
        for run in (self._read, self._write, self._keep_time):
            self._spawn(run)

    def _let_go(self) -> None:
        self._writer.unpark()
        self._timer.unpark()
        anyio.notify_closing(self._socket)

    def wake_writer(self) -> None:
        """Driver."""
        self._writer.unpark()

    def expect_requests(self) -> None:
        """Driver. The writer could run before those who make them."""

    def wake_timer(self) -> None:
        """Driver."""
        self._timer.unpark()

    async def _read(self) -> None:
        # What came together with the end of the TLS handshake is no longer in the socket.
        self._connection.bytes_came(b"")
        while not self._stopped:
            if self._receive():
                await checkpoint()
            elif not self._stopped:
                await anyio.wait_readable(self._socket)

    async def _write(self) -> None:
        while not self._stopped:
            sent = self._send()
            if sent is _BLOCKED:
                await anyio.wait_writable(self._socket)
            elif sent is _TURN_OVER:
                await checkpoint()
            elif sent is _FAILED:
                while self._read_the_last():
                    await checkpoint()
            elif not self._stopped:
                await self._writer.park()

    async def _keep_time(self) -> None:
        connection, time = self._connection, self._loop.time
        while not self._stopped:
            deadline = self._protocol.next_deadline()
            connection.timer_armed_for = deadline
            if deadline is None:
                await self._timer.park()
                continue
            with anyio.CancelScope(deadline=deadline):
                await self._timer.park()
                continue
            now = time()
            if self._protocol.judgement_due(now):
                # The reader's turn before it (K7).
                await checkpoint()
                await checkpoint()
                now = time()
            if not self._stopped:
                connection.deadline_due(now, upload_progressed=self._upload_progressed())


class CallbackDriver(SocketDriver):
    """asyncio's callbacks: the loop watches the socket all the time, and calls when there is something to do."""

    __slots__ = ("_alarm", "_alarms", "_asyncio", "_blocked", "_context", "_end", "_writing")

    def __init__(self, connection: Http2Connection, loop: AsyncioLoop) -> None:
        super().__init__(connection)
        self._asyncio = loop.native
        self._context = loop.callback_context
        self._end = self._loop.parker()
        self._alarms = loop.alarms
        self._alarm: float | None = None
        #: `_write` is going to be called, soon or when the socket takes more.
        self._writing = False
        self._blocked = False

    def start(self) -> None:
        """SocketDriver."""
        self._bound_kernel_buffer()
        self._spawn(self._await_end)
        self._soon(self._greet)
        self.wake_writer()
        self.wake_timer()

    async def _await_end(self) -> None:
        while not self._stopped:
            await self._end.park()

    def _let_go(self) -> None:
        if self._alarm is not None:
            self._alarms.let_sleep(self, self._alarm)
        self._end.unpark()
        self._asyncio.remove_reader(self._socket)
        if self._blocked:
            self._asyncio.remove_writer(self._socket)

    def _soon(self, step: Callable[[], None]) -> None:
        self._asyncio.call_soon(self._run, step, context=self._context)

    def _run(self, step: Callable[[], object]) -> None:
        """Take a step, unless it is too late for it; what goes wrong is the connection's end."""
        if self._stopped:
            return
        try:
            step()
        except Exception as error:  # noqa: BLE001
            # Nobody calls this but the loop: the failure becomes the connection's end, and its requests' error.
            self._connection.ended(error)
        except BaseException:
            if not self._stopped:
                self._connection.loop_ended()
            raise

    # Reading

    def _greet(self) -> None:
        # The loop copies the context in which it is told to watch, which is the callbacks'.
        # If the socket isn't empty after a turn the loop calls again.
        self._asyncio.add_reader(self._socket, self._run, self._receive)
        # What came together with the end of the TLS handshake is no longer in the socket.
        self._connection.bytes_came(b"")

    # Writing

    def wake_writer(self) -> None:
        """Driver. Whatever else happens in the same turn of the loop is written with it."""
        # A loop that was closed with its tasks in it is told things by their finally blocks.
        if not (self._writing or self._asyncio.is_closed()):
            self._writing = True
            self._soon(self._write)

    def write_now(self) -> None:
        """Driver. A turn of the loop sooner."""
        if not self._writing:
            self._writing = True
            self._run(self._write)

    def expect_requests(self) -> None:
        """Driver. The loop calls in the order of asking: first those who have been woken, then the writer."""
        self.wake_writer()

    def _write(self) -> None:
        sent = self._send()
        if sent is _BLOCKED:
            if not self._blocked:
                self._blocked = True
                # A request's task may be what writes, and in its context, but for itself, anyio knows no event loop.
                self._context.copy().run(self._asyncio.add_writer, self._socket, self._run, self._write)
            return
        if self._blocked and not self._stopped:
            self._blocked = False
            self._asyncio.remove_writer(self._socket)
        if sent is _TURN_OVER:
            self._soon(self._write)
        elif sent is _FAILED:
            # Not here and now: it may be the very making of a request that writes. Nobody writes any more.
            self._soon(self._finish_reading)
        else:
            self._writing = False

    def _finish_reading(self) -> None:
        if self._read_the_last():
            self._soon(self._finish_reading)

    # Time

    def wake_timer(self) -> None:
        """Driver."""
        if self._alarm is not None:
            self._alarms.let_sleep(self, self._alarm)
            self._alarm = None
        deadline = self._connection.timer_armed_for = self._protocol.next_deadline()
        if deadline is not None and not self._asyncio.is_closed():
            self._alarm = deadline
            self._alarms.wake(self, deadline)

    def time_is_up(self, moment: float) -> None:
        """Sleeper."""
        if moment == self._alarm:
            self._alarm = None
            self._run(self._look_at_time)

    def _look_at_time(self) -> None:
        now = self._loop.time()
        if self._protocol.judgement_due(now):
            # The reader's turn before it (K7): two passes of the loop.
            self._soon(lambda: self._soon(lambda: self._act(self._loop.time())))
        else:
            self._act(now)

    def _act(self, now: float) -> None:
        # A PING leaves at once: unlike a request it has no company to wait for.
        writes, self._writing = not self._writing, True
        self._connection.deadline_due(now, upload_progressed=self._upload_progressed())
        if writes:
            self._write()
        if not self._stopped:
            self.wake_timer()


@functools.cache
def _keep_freed_memory() -> None:
    """Reading in bulk allocates and frees memory all the time: have glibc keep it at hand.

    It returns to the kernel what is free at the heap's end above twice the largest block that it saw freed, and each
    page costs a fault when it is needed again. Blocks beyond its threshold of 128 KiB come from the kernel, untouched:
    this one costs two system calls and no memory. Other allocators don't mind.
    """
    bytes(_KEPT // 2)


def _send(sock: socket.socket, pieces: Sequence[bytes | memoryview]) -> tuple[int, Sequence[bytes | memoryview]]:
    """Hand over as much of the pieces as the socket takes at once; how many bytes that is, and what remains."""
    if not pieces:
        return 0, pieces
    if len(pieces) == 1 or sys.platform == "win32":
        sent = sock.send(pieces[0])
        if sent == len(pieces[0]):
            return sent, pieces[1:] or ()
    else:
        sent = sock.sendmsg(pieces)
    return sent, _after(pieces, sent)


def _after(pieces: Sequence[bytes | memoryview], taken: int) -> Sequence[bytes | memoryview]:
    """What follows so many bytes of the pieces."""
    for index, piece in enumerate(pieces):
        if taken < len(piece):
            return [memoryview(piece)[taken:], *pieces[index + 1 :]]
        taken -= len(piece)
    return ()


def _unacknowledged(sock: socket.socket) -> int | None:
    """Bytes that the peer's TCP has not acknowledged, None where that can't be read."""
    if sys.platform == "linux":
        size: int = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]
        return size
    if sys.platform == "darwin":
        so_nwrite = 0x1024
        return sock.getsockopt(socket.SOL_SOCKET, so_nwrite)
    return None
