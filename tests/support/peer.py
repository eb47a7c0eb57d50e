"""A raw-frame HTTP/2 server that does exactly what a test says, misbehaviour included.

It runs in the test's own event loop, on non-blocking sockets, without threads or name resolution, so it works under
virtual time too. A `Peer` reads in the background (as long as `reading`), answers SETTINGS and PINGs by itself unless
told not to, and keeps every frame for the test to look at.
"""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
import hpack
from anyio.abc import TaskGroup
from hyperframe import frame as frames

__all__ = ["Peer", "RawRequest", "RawServer", "serve"]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
F = TypeVar("F", bound=frames.Frame)


@dataclass
class RawRequest:
    """A request's head as it came."""

    stream_id: int
    fields: dict[str, str]
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False


class Peer:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None) -> None:
        self.sock = sock
        #: Answer PINGs, acknowledge SETTINGS, give flow-control credit back.
        self.auto_ping = True
        self.auto_settings = True
        self.auto_window = True
        #: Every frame that came, and when each PING (not ACK) did.
        self.frames: list[frames.Frame] = []
        self.pings: list[float] = []
        self.requests: dict[int, RawRequest] = {}
        self.closed = anyio.Event()
        self.encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = None if context is None else context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._buffer = bytearray()
        self._gate = anyio.Event()
        self._gate.set()
        self._changed = anyio.Event()
        self._served: set[int] = set()

    # Reading

    def stop_reading(self) -> None:
        """Take nothing from the socket any more."""
        self._gate = anyio.Event()

    def resume_reading(self) -> None:
        self._gate.set()

    async def _receive_bytes(self) -> bytes:
        while True:
            await self._gate.wait()
            try:
                return self.sock.recv(65_536)
            except BlockingIOError:
                await anyio.wait_readable(self.sock)
            except ConnectionError:
                return b""

    async def _receive_plain(self) -> bytes:
        data = await self._receive_bytes()
        if self._tls is None or not data:
            return data
        self._incoming.write(data)
        plain = b""
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while True:
                plain += self._tls.read(65_536)
        return plain or await self._receive_plain()

    async def start(self, settings: dict[int, int] | None) -> None:
        """TLS, the preface, and our SETTINGS."""
        if self._tls is not None:
            while True:
                try:
                    self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    await self.send_ciphertext(self._outgoing.read())
                    self._incoming.write(await self._receive_bytes())
                else:
                    break
            await self.send_ciphertext(self._outgoing.read())
        while len(self._buffer) < len(PREFACE):
            self._buffer += await self._receive_plain()
        assert self._buffer.startswith(PREFACE)
        del self._buffer[: len(PREFACE)]
        ours = frames.SettingsFrame(0)
        ours.settings = settings or {}
        await self.send(ours)

    async def read_for_ever(self) -> None:
        """Take in frames until the connection ends."""
        try:
            while data := await self._receive_plain():
                self._buffer += data
                while (parsed := self._next_frame()) is not None:
                    await self._handle(parsed)
        except (OSError, ssl.SSLError, anyio.ClosedResourceError):
            pass
        finally:
            self.closed.set()
            self._notify()

    def _next_frame(self) -> frames.Frame | None:
        if len(self._buffer) < 9:
            return None
        parsed, length = frames.Frame.parse_frame_header(memoryview(bytes(self._buffer[:9])))
        if len(self._buffer) < 9 + length:
            return None
        parsed.parse_body(memoryview(bytes(self._buffer[9 : 9 + length])))
        del self._buffer[: 9 + length]
        return parsed

    async def _handle(self, parsed: frames.Frame) -> None:
        self.frames.append(parsed)
        ack = "ACK" in parsed.flags
        if isinstance(parsed, frames.HeadersFrame):
            fields = {str(name): str(value) for name, value in self._decoder.decode(parsed.data)}
            self.requests[parsed.stream_id] = RawRequest(parsed.stream_id, fields)
        elif isinstance(parsed, frames.DataFrame):
            self.requests[parsed.stream_id].body += parsed.data
            if self.auto_window and parsed.flow_controlled_length:
                for stream_id in (0, parsed.stream_id):
                    await self.send(frames.WindowUpdateFrame(stream_id, parsed.flow_controlled_length))
        elif isinstance(parsed, frames.PingFrame) and not ack:
            self.pings.append(anyio.current_time())
            if self.auto_ping:
                await self.send(frames.PingFrame(0, parsed.opaque_data, flags=["ACK"]))
        elif isinstance(parsed, frames.SettingsFrame) and not ack and self.auto_settings:
            await self.send(frames.SettingsFrame(0, flags=["ACK"]))
        if "END_STREAM" in parsed.flags:
            self.requests[parsed.stream_id].ended = True
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition, on what came, holds."""
        while not condition():
            assert not self.closed.is_set(), "the client closed the connection"
            await self._changed.wait()

    async def request(self) -> RawRequest:
        """The next request that nobody has asked for yet; its body may still be coming."""
        await self.until(lambda: len(self.requests) > len(self._served))
        stream_id = next(stream_id for stream_id in self.requests if stream_id not in self._served)
        self._served.add(stream_id)
        return self.requests[stream_id]

    def seen(self, kind: type[F], stream_id: int | None = None) -> list[F]:
        """The frames of one kind that came, on one stream or on any."""
        return [f for f in self.frames if isinstance(f, kind) and stream_id in (None, f.stream_id)]

    # Writing

    async def send(self, *sent: frames.Frame) -> None:
        await self.send_raw(b"".join(f.serialize() for f in sent))

    async def send_raw(self, data: bytes) -> None:
        """Bytes that need not be frames."""
        await self.send_ciphertext(self.encrypt(data))

    def encrypt(self, data: bytes) -> bytes:
        """The TLS records that carry `data`, to be sent as the test pleases."""
        if self._tls is None:
            return data
        self._tls.write(data)
        return self._outgoing.read()

    async def send_ciphertext(self, data: bytes) -> None:
        while data:
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                await anyio.wait_writable(self.sock)

    def head(self, stream_id: int, status: int = 200, *, end: bool = False, **fields: str) -> frames.Frame:
        """A response's head as a frame."""
        block = self.encoder.encode([(":status", str(status)), *fields.items()])
        return frames.HeadersFrame(stream_id, block, flags=["END_HEADERS", "END_STREAM"] if end else ["END_HEADERS"])

    async def respond(self, stream_id: int, body: bytes = b"", status: int = 200, *, end: bool = True) -> None:
        """A response; the body must fit into the windows."""
        out = [self.head(stream_id, status, end=end and not body)]
        pieces = [body[start : start + 16_384] for start in range(0, len(body), 16_384)]
        for number, piece in enumerate(pieces, 1):
            out.append(frames.DataFrame(stream_id, piece, flags=["END_STREAM"] if end and number == len(pieces) else []))
        await self.send(*out)

    async def goaway(self, last_stream_id: int, code: int = 0, debug: bytes = b"") -> None:
        await self.send(frames.GoAwayFrame(0, last_stream_id, code, debug))

    # Ends

    def abort(self) -> None:
        """RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """FIN."""
        with contextlib.suppress(RuntimeError):
            anyio.notify_closing(self.sock)
        self.sock.close()


class RawServer:
    """Accepts connections on 127.0.0.1, or on a unix socket."""

    def __init__(self, listener: socket.socket, context: ssl.SSLContext | None, tasks: TaskGroup) -> None:
        self._listener = listener
        self._context = context
        self._tasks = tasks
        self.peers: list[Peer] = []
        #: SETTINGS that connections accepted from now on begin with.
        self.settings: dict[int, int] | None = None
        self.url = ""

    async def accept_socket(self) -> socket.socket:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(self._listener)
            else:
                sock.setblocking(False)
                if sock.family != socket.AF_UNIX:
                    # Nagle's algorithm waits in real time, which virtual time knows nothing of.
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock

    async def accept(self) -> Peer:
        """The next connection, with its handshake done and its reading begun."""
        peer = Peer(await self.accept_socket(), self._context)
        self.peers.append(peer)
        await peer.start(self.settings)
        self._tasks.start_soon(peer.read_for_ever)
        return peer

    def stop_listening(self) -> None:
        """Refuse further connections."""
        with contextlib.suppress(RuntimeError):
            anyio.notify_closing(self._listener)
        self._listener.close()

    def handle(self, handler: Callable[[Peer], Awaitable[Any]]) -> None:
        """Run the handler for each connection that comes."""

        async def guarded(peer: Peer) -> None:
            with contextlib.suppress(OSError, AssertionError) if peer.closed.is_set() else contextlib.nullcontext():
                await handler(peer)

        async def accept_for_ever() -> None:
            with contextlib.suppress(anyio.ClosedResourceError):
                while True:
                    self._tasks.start_soon(guarded, await self.accept())

        self._tasks.start_soon(accept_for_ever)

    def answer(self, body: bytes = b"ok", delay: float = 0.0) -> None:
        """Answer every request on every connection."""

        async def handler(peer: Peer) -> None:
            async def one(request: RawRequest) -> None:
                await peer.until(lambda: request.ended)
                await anyio.sleep(delay)
                with contextlib.suppress(OSError, ssl.SSLError):
                    await peer.respond(request.stream_id, body)

            with contextlib.suppress(AssertionError):
                while True:
                    self._tasks.start_soon(one, await peer.request())

        self.handle(handler)


@contextlib.asynccontextmanager
async def serve(
    context: ssl.SSLContext | None = None, *, uds: str | None = None, backlog: int = 128
) -> AsyncIterator[RawServer]:
    """A server for the length of the context; everything of it is gone afterwards."""
    if uds is None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(uds)
        listener.listen()
    listener.setblocking(False)
    async with anyio.create_task_group() as tasks:
        server = RawServer(listener, context, tasks)
        scheme = "http" if context is None else "https"
        server.url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}" if uds is None else f"{scheme}://localhost"
        try:
            yield server
        finally:
            tasks.cancel_scope.cancel()
            for sock in (listener, *(peer.sock for peer in server.peers)):
                if sock.fileno() != -1:
                    with contextlib.suppress(RuntimeError):
                        anyio.notify_closing(sock)
                    sock.close()


def never(_: object = None) -> float:
    """For waiting until cancelled: `await anyio.sleep(never())`."""
    return math.inf
