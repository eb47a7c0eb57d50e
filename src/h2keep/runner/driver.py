"""Moves one connection's bytes on any event loop that anyio knows.

Three tasks a connection, however many requests: the *reader* is always in its receive, never writes and never runs
under a deadline; the *writer* alone sends; the *timer* does no I/O. None of them raises: whatever ends one ends the
connection, and the connection's end ends all three. Stopping awaits nothing, so it works from a finally block, from a
loop that is shutting down, and on a dead peer.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import checkpoint

from h2keep.runner.pacing import WritePacer

if sys.platform == "linux":
    import fcntl
    import termios

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from h2keep.runner.connection import Http2Connection

__all__ = ["AnyioDriver"]

#: What one read may bring, in bytes: less while it takes long to digest, as a flood of tiny frames does, else more.
_FIRST_READ = 64 * 1024
_LEAST_READ = 4 * 1024
_MOST_READ = 256 * 1024
#: What one wake of the reader or the writer may take before others run (K23): bytes, and seconds.
_TURN = 1024 * 1024
_TURN_SECONDS = 0.005
_NOTSENT_LOWAT: int | None = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else None)


class AnyioDriver:
    """Runs a connection's three tasks; see `h2keep.runner.connection.Driver`."""

    def __init__(self, connection: Http2Connection) -> None:
        self._connection = connection
        self._loop = connection.loop
        self._socket = connection.transport.socket
        self._writer = self._loop.parker()
        self._timer = self._loop.parker()
        self._pacer = WritePacer()
        self._stopped = False
        self._running = 0
        self._gone = anyio.Event()
        self._unsent = b""
        self._written = 0
        self._upload_mark = 0
        self._acknowledged = 0
        connection.driver = self

    def start(self) -> None:
        """Start the tasks. Raises `ConnectError` if the loop is shutting down."""
        self._bound_kernel_buffer()
        for run in (self._read, self._write, self._keep_time):
            self._loop.spawn(self._guarded(run), ended=self._task_ended)
            self._running += 1

    async def wait_stopped(self) -> None:
        """Wait until the socket is closed and every task is gone."""
        if self._running:
            await self._gone.wait()

    # Driver

    def wake_writer(self) -> None:
        """Driver."""
        self._writer.unpark()

    def wake_timer(self) -> None:
        """Driver."""
        self._timer.unpark()

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
        # RuntimeError: no event loop runs here any more; then no task waits on this socket either.
        with contextlib.suppress(RuntimeError):
            anyio.notify_closing(sock)
        sock.close()
        self._writer.unpark()
        self._timer.unpark()

    def reap(self) -> None:
        """Driver."""
        self._stopped = True
        self._socket.close()

    def _farewell(self) -> None:
        """GOAWAY and close_notify, as far as the kernel takes them."""
        connection = self._connection
        data = self._unsent + connection.next_write(_TURN) + connection.transport.security.close()
        if data:
            self._socket.send(data)

    # Tasks

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
                # Without the three of us the connection is nothing.
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

    async def _read(self) -> None:
        sock, connection, time = self._socket, self._connection, self._loop.time
        size, turn, turn_began = _FIRST_READ, 0, time()
        # What came together with the end of the TLS handshake is no longer in the socket.
        connection.bytes_came(b"")
        while not self._stopped:
            try:
                data = sock.recv(size)
            except BlockingIOError:
                data = None
            if data == b"":
                connection.ended()
                return
            more = data is not None and len(data) == size
            if data is not None:
                began = time()
                connection.bytes_came(data)
                turn += len(data)
                took = time() - began
                if took > _TURN_SECONDS:
                    size = max(size // 2, _LEAST_READ)
                elif more and took < _TURN_SECONDS / 4:
                    size = min(size * 2, _MOST_READ)
            if not more:
                if self._stopped:
                    return
                await anyio.wait_readable(sock)
                turn, turn_began = 0, time()
            elif turn >= _TURN or time() - turn_began >= _TURN_SECONDS:
                await checkpoint()
                turn, turn_began = 0, time()

    async def _write(self) -> None:
        sock, connection, time = self._socket, self._connection, self._loop.time
        turn, turn_began = 0, time()
        while not self._stopped:
            if not self._unsent:
                body_before = connection.protocol.body_bytes_sent
                self._unsent = connection.next_write(self._pacer.budget)
                if connection.protocol.body_bytes_sent != body_before:
                    self._upload_mark = self._written + len(self._unsent)
            if not self._unsent:
                self._pacer.note_idle()
                await self._writer.park()
                turn, turn_began = 0, time()
                continue
            try:
                sent = sock.send(self._unsent)
            except BlockingIOError:
                await anyio.wait_writable(sock)
                turn, turn_began = 0, time()
                continue
            self._unsent = self._unsent[sent:]
            self._written += sent
            now = time()
            if self._pacer.note_written(sent, now):
                self._bound_kernel_buffer()
            turn += sent
            if turn >= _TURN or now - turn_began >= _TURN_SECONDS:
                await checkpoint()
                turn, turn_began = 0, time()

    async def _keep_time(self) -> None:
        connection, time = self._connection, self._loop.time
        while not self._stopped:
            deadline = connection.next_deadline()
            connection.timer_armed_for = deadline
            if deadline is None:
                await self._timer.park()
                continue
            with anyio.CancelScope(deadline=deadline):
                await self._timer.park()
                continue
            # The reader's turn before judgement (K7).
            await checkpoint()
            await checkpoint()
            if time() >= deadline and not self._stopped:
                connection.deadline_due(upload_progressed=self._upload_progressed())

    # The socket's own figures

    def _upload_progressed(self) -> bool:
        """Whether the peer's TCP acknowledged more of an upload since the last look (K4)."""
        unacknowledged = _unacknowledged(self._socket)
        if unacknowledged is None:
            return False
        uploading = self._acknowledged < self._upload_mark
        before, self._acknowledged = self._acknowledged, self._written - unacknowledged
        return uploading and self._acknowledged > before

    def _bound_kernel_buffer(self) -> None:
        if _NOTSENT_LOWAT is not None and self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, self._pacer.budget)


def _unacknowledged(sock: socket.socket) -> int | None:
    """Bytes that the peer's TCP has not acknowledged, None where that can't be read."""
    if sys.platform == "linux":
        size: int = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]
        return size
    if sys.platform == "darwin":
        so_nwrite = 0x1024
        return sock.getsockopt(socket.SOL_SOCKET, so_nwrite)
    return None
