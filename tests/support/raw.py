"""A raw-frame HTTP/2 server that does exactly what a test says, misbehaviour included.

    async with RawServer.listen(server_ssl) as server:
        ...                                             # start the client in a task; server.url is where to
        peer = await server.accept()                    # TCP only: nothing was read, nothing was sent
        await peer.handshake({SettingsFrame.MAX_CONCURRENT_STREAMS: 1})
        request = await peer.request()
        await peer.respond(request.stream_id, body=b"hello")

It runs in the test's own event loop, on non-blocking sockets, without threads or name resolution: on asyncio, trio,
and under virtual time. After `handshake` a peer reads in the background; it acknowledges SETTINGS and PINGs and gives
flow-control credit back, unless told not to (`auto_...`), and keeps every frame. Frames are hyperframe's, and nothing
checks what a test sends. A client that goes away shows as `anyio.EndOfStream`.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import anyio
import hpack
from hyperframe import frame as frames

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping

    from anyio.abc import TaskGroup

__all__ = ["GONE", "PREFACE", "Peer", "Ping", "RawRequest", "RawServer", "abort", "answering", "close", "task_group"]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_CHUNK = 65_536
_MAX_FRAME = 16_384
_INITIAL_WINDOW = 65_535
#: What using a connection that is gone raises.
GONE = (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError)

F = TypeVar("F", bound=frames.Frame)


class Ping(NamedTuple):
    """A PING that came: when, by the event loop's clock, and its 8 bytes."""

    at: float
    payload: bytes


@dataclass(eq=False)
class RawRequest:
    """A request: its head as it came, and its body as far as it has come."""

    peer: Peer = field(repr=False)
    stream_id: int
    fields: list[tuple[str, str]]
    body: bytearray = field(default_factory=bytearray, repr=False)
    #: Bytes of body that came, kept or not.
    received: int = 0
    trailers: list[tuple[str, str]] = field(default_factory=list)
    #: END_STREAM came.
    ended: bool = False
    #: The error code, if RST_STREAM came.
    reset: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The head as a dict, pseudo-headers included; of a repeated field the last."""
        return dict(self.fields)

    @property
    def method(self) -> str:
        return self.headers[":method"]

    @property
    def path(self) -> str:
        return self.headers[":path"]

    async def complete(self) -> bytes:
        """Wait for END_STREAM; the whole body."""
        await self.peer.until(lambda: self.ended)
        return bytes(self.body)


class Peer:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None, tasks: TaskGroup) -> None:
        self.sock = sock
        #: Answer PINGs, SETTINGS, and TLS's goodbye; give flow-control credit back on receipt.
        self.auto_ack_pings = True
        self.auto_ack_settings = True
        self.auto_close_notify = True
        self.auto_window = True
        #: Keep the payloads of DATA frames; switch it off for large uploads.
        self.keep_bodies = True
        #: Every frame, every PING that is no ACK, and every request that came.
        self.frames: list[frames.Frame] = []
        self.pings: list[Ping] = []
        self.requests: dict[int, RawRequest] = {}
        self.client_settings: dict[int, int] = {}
        #: Nothing more will come; `error` is the reason, if there is one beyond EOF and `close`.
        self.ended = False
        self.error: Exception | None = None
        self.encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()
        self._tasks = tasks
        self._plain_in = bytearray()
        self._tls_in = ssl.MemoryBIO()
        self._tls_out = ssl.MemoryBIO()
        self._tls = None if context is None else context.wrap_bio(self._tls_in, self._tls_out, server_side=True)
        self._tls_ready = False
        self._outgoing = bytearray()
        self._blocked = anyio.Event()
        self._changed = anyio.Event()
        self._may_read = anyio.Event()
        self._may_read.set()
        self._held: list[frames.Frame] | None = None
        self._next_frame = 0
        self._unseen: deque[tuple[RawRequest, int]] = deque()
        self._block: tuple[frames.HeadersFrame, bytearray] | None = None
        self._window = _INITIAL_WINDOW
        self._stream_windows: dict[int, int] = {}
        tasks.start_soon(self._write_in_background)

    # Beginning

    async def tls_handshake(self) -> None:
        """TLS only; `handshake` does it where it wasn't done."""
        if self._tls is None or self._tls_ready:
            return
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._put(self._tls_out.read())
                data = await self._receive_ciphertext()
                if not data:
                    self._end()
                    raise anyio.EndOfStream from None
                self._tls_in.write(data)
            except ssl.SSLError as error:
                self._put(self._tls_out.read())
                self._end(error)
                raise anyio.EndOfStream from error
            else:
                break
        self._tls_ready = True
        self._put(self._tls_out.read())

    async def handshake(self, settings: Mapping[int, int] | None = None) -> None:
        """TLS, our SETTINGS, the client's preface and SETTINGS and, unless told not to, their ACK."""
        await self.tls_handshake()
        await self.send(self.settings_frame(settings or {}))
        while len(self._plain_in) < len(PREFACE):
            data = await self.receive_bytes()
            if not data:
                raise anyio.EndOfStream
            self._plain_in += data
        if not self._plain_in.startswith(PREFACE):
            raise AssertionError(f"the client began with {bytes(self._plain_in[:40])!r}")
        del self._plain_in[: len(PREFACE)]
        self._decoder.max_allowed_table_size = (settings or {}).get(frames.SettingsFrame.HEADER_TABLE_SIZE, 4096)
        self._tasks.start_soon(self._read_in_background)
        await self.expect(frames.SettingsFrame, skip=False, flags=set())

    @property
    def alpn(self) -> str | None:
        """What TLS agreed on."""
        return None if self._tls is None else self._tls.selected_alpn_protocol()

    # Receiving

    def stop_reading(self) -> None:
        """Take nothing from the socket any more: the client's writes will fill the buffers, then block."""
        self._may_read = anyio.Event()

    def resume_reading(self) -> None:
        self._may_read.set()

    async def receive_bytes(self) -> bytes:
        """Bytes as they come, decrypted; b"" at their end. Only before `handshake`, which reads all that follows."""
        while True:
            if self._tls is None:
                return await self._receive_ciphertext()
            plain = bytearray()
            ended = False
            try:
                # At once, too: the first bytes may have come together with the end of the handshake.
                while piece := self._tls.read(_CHUNK):
                    plain += piece
                # The client's close_notify is an empty read, or an error once we have sent our own.
                ended = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                ended = True
            if ended and self.auto_close_notify:
                self._say_goodbye()
            self._put(self._tls_out.read())
            if plain or ended:
                return bytes(plain)
            data = await self._receive_ciphertext()
            if not data:
                return data
            self._tls_in.write(data)

    async def _receive_ciphertext(self) -> bytes:
        while self.sock.fileno() != -1:
            while not self._may_read.is_set():
                await self._may_read.wait()
            try:
                return self.sock.recv(_CHUNK)
            except BlockingIOError:
                await anyio.wait_readable(self.sock)
            except OSError as error:
                self._end(error)
                return b""
        return b""

    async def _read_in_background(self) -> None:
        try:
            self._take_frames()
            while data := await self.receive_bytes():
                self._plain_in += data
                self._take_frames()
        except (ssl.SSLError, anyio.ClosedResourceError) as error:
            self._end(error)
        finally:
            self._end()

    def _end(self, error: Exception | None = None) -> None:
        self.ended = True
        self.error = self.error or error
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _take_frames(self) -> None:
        while len(self._plain_in) >= 9:
            frame, length = frames.Frame.parse_frame_header(memoryview(bytes(self._plain_in[:9])))
            if len(self._plain_in) < 9 + length:
                break
            frame.parse_body(memoryview(bytes(self._plain_in[9 : 9 + length])))
            del self._plain_in[: 9 + length]
            self._take(frame)
        self._notify()

    def _take(self, frame: frames.Frame) -> None:
        self.frames.append(frame)
        ack = "ACK" in frame.flags
        if isinstance(frame, frames.HeadersFrame):
            self._block = frame, bytearray(frame.data)
        elif isinstance(frame, frames.ContinuationFrame) and self._block is not None:
            self._block[1].extend(frame.data)
        elif isinstance(frame, frames.DataFrame):
            self._take_data(frame)
        elif isinstance(frame, frames.PingFrame) and not ack:
            self.pings.append(Ping(anyio.current_time(), frame.opaque_data))
            if self.auto_ack_pings:
                self._reply(frames.PingFrame(0, frame.opaque_data, flags=["ACK"]))
        elif isinstance(frame, frames.SettingsFrame) and not ack:
            self._take_settings(frame)
        elif isinstance(frame, frames.WindowUpdateFrame):
            if frame.stream_id == 0:
                self._window += frame.window_increment
            elif frame.stream_id in self._stream_windows:
                self._stream_windows[frame.stream_id] += frame.window_increment
        elif isinstance(frame, frames.RstStreamFrame) and frame.stream_id in self.requests:
            self.requests[frame.stream_id].reset = frame.error_code
        if "END_HEADERS" in frame.flags and self._block is not None:
            self._take_head(*self._block)
            self._block = None

    def _take_head(self, first: frames.HeadersFrame, block: bytearray) -> None:
        decoded = self._decoder.decode(bytes(block), raw=True)
        # Whatever a client sends can be looked at: what is not UTF-8 becomes surrogates.
        fields = [(_text(name), _text(value)) for name, value in decoded]
        request = self.requests.get(first.stream_id)
        if request is None:
            request = self.requests[first.stream_id] = RawRequest(self, first.stream_id, fields)
            self._unseen.append((request, len(self.frames)))
            self._stream_windows[first.stream_id] = self.client_settings.get(
                frames.SettingsFrame.INITIAL_WINDOW_SIZE, _INITIAL_WINDOW
            )
        else:
            request.trailers = fields
        request.ended = "END_STREAM" in first.flags

    def _take_data(self, frame: frames.DataFrame) -> None:
        request = self.requests[frame.stream_id]
        size = frame.flow_controlled_length
        request.received += len(frame.data)
        request.ended = "END_STREAM" in frame.flags
        if self.keep_bodies:
            request.body += frame.data
        else:
            frame.data = b""
        if self.auto_window and size:
            streams = [0] if request.ended else [0, frame.stream_id]
            self._reply(*(frames.WindowUpdateFrame(stream_id, size) for stream_id in streams))

    def _take_settings(self, frame: frames.SettingsFrame) -> None:
        known = frames.SettingsFrame
        before = self.client_settings.get(known.INITIAL_WINDOW_SIZE, _INITIAL_WINDOW)
        self.client_settings.update(frame.settings)
        change = self.client_settings.get(known.INITIAL_WINDOW_SIZE, _INITIAL_WINDOW) - before
        for stream_id in self._stream_windows:
            self._stream_windows[stream_id] += change
        if known.HEADER_TABLE_SIZE in frame.settings:
            self.encoder.header_table_size = min(frame.settings[known.HEADER_TABLE_SIZE], 4096)
        if self.auto_ack_settings:
            self._reply(frames.SettingsFrame(0, flags=["ACK"]))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition, on what came, holds; `EndOfStream` if it can't any more."""
        while not condition():
            if self.ended:
                raise anyio.EndOfStream
            await self._changed.wait()

    async def receive(self) -> frames.Frame:
        """The next frame, of whatever kind; `frames` has those before it."""
        await self.until(lambda: len(self.frames) > self._next_frame)
        frame = self.frames[self._next_frame]
        self._next_frame += 1
        return frame

    async def expect(self, kind: type[F], *, skip: bool = True, **attributes: Any) -> F:
        """The next frame of this kind whose attributes have these values.

        Others are passed over, or with `skip=False` are a failure. `flags` must be a set, and match exactly.
        """
        while True:
            frame = await self.receive()
            matches = all(_attribute(frame, name) == value for name, value in attributes.items())
            if isinstance(frame, kind) and matches:
                return frame
            if not skip:
                raise AssertionError(f"expected {kind.__name__} with {attributes}, got {frame!r}")

    async def request(self) -> RawRequest:
        """The next request that nobody has asked for yet, once its head is complete; its body may still be coming.

        `receive` goes on after the head, if it isn't beyond it already.
        """
        await self.until(lambda: bool(self._unseen))
        request, position = self._unseen.popleft()
        self._next_frame = max(self._next_frame, position)
        return request

    def seen(self, kind: type[F], stream_id: int | None = None) -> list[F]:
        """The frames of one kind that came so far, on one stream or on any."""
        return [frame for frame in self.frames if isinstance(frame, kind) and stream_id in (None, frame.stream_id)]

    # Sending

    async def send(self, *sent: frames.Frame) -> None:
        """Frames, in one write; returns when the kernel has taken them."""
        await self.send_bytes(b"".join(frame.serialize() for frame in sent))

    async def send_bytes(self, data: bytes) -> None:
        """Bytes that need not be frames, nor whole ones."""
        await self.send_ciphertext(self.encrypt(data))

    def encrypt(self, data: bytes) -> bytes:
        """The TLS records that carry `data`; without TLS `data` itself. Records must be sent in their order."""
        if self._tls is None or not data:
            return data
        self._tls.write(data)
        return self._tls_out.read()

    async def send_ciphertext(self, data: bytes) -> None:
        """Bytes as they are, below TLS."""
        if self.sock.fileno() != -1:
            self._put(data)
        while self._outgoing:
            await self._changed.wait()
        if self.sock.fileno() == -1:
            raise anyio.ClosedResourceError
        if self.error is not None:
            raise anyio.BrokenResourceError from self.error

    async def trickle(self, data: bytes, *, interval: float, size: int = 1) -> None:
        """Send `data`, as TLS records if there is TLS, in pieces of `size` bytes, one every `interval` seconds."""
        with self.holding_replies():
            wire = self.encrypt(data)
            for start in range(0, len(wire), size):
                await self.send_ciphertext(wire[start : start + size])
                if start + size < len(wire):
                    await anyio.sleep(interval)

    @contextlib.contextmanager
    def holding_replies(self) -> Iterator[None]:
        """Automatic replies wait until the end of this, lest they come in the middle of a half-sent frame or record."""
        if self._held is not None:
            raise RuntimeError("replies are being held already")
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            self._reply(*held)

    def _reply(self, *replies: frames.Frame) -> None:
        if self._held is not None:
            self._held.extend(replies)
        elif self.sock.fileno() != -1:
            self._put(self.encrypt(b"".join(frame.serialize() for frame in replies)))

    def _put(self, data: bytes) -> None:
        """Queue bytes for the wire, and send what it takes now; the rest goes in the background."""
        self._outgoing += data
        self._flush()

    def _flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self.sock.send(self._outgoing)]
        except BlockingIOError:
            self._blocked.set()
        except OSError as error:
            self._outgoing.clear()
            self._end(error)

    async def _write_in_background(self) -> None:
        with contextlib.suppress(anyio.ClosedResourceError):
            while True:
                await self._blocked.wait()
                self._blocked = anyio.Event()
                if self.sock.fileno() == -1:
                    return
                await anyio.wait_writable(self.sock)
                self._flush()
                self._notify()

    # Messages

    @staticmethod
    def settings_frame(settings: Mapping[int, int]) -> frames.SettingsFrame:
        frame = frames.SettingsFrame(0)
        frame.settings = dict(settings)
        return frame

    def headers_frame(
        self,
        stream_id: int,
        status: int | None = 200,
        headers: Iterable[tuple[str, str]] = (),
        *,
        end_stream: bool = False,
    ) -> frames.HeadersFrame:
        """A head in one frame; `status=None` makes trailers."""
        fields = [*([] if status is None else [(":status", str(status))]), *headers]
        flags = ["END_HEADERS", "END_STREAM"] if end_stream else ["END_HEADERS"]
        return frames.HeadersFrame(stream_id, self.encoder.encode(fields), flags=flags)

    async def respond(
        self,
        stream_id: int,
        status: int = 200,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        end_stream: bool = True,
        trailers: Iterable[tuple[str, str]] = (),
    ) -> None:
        """A response, within the client's windows; what fits goes in one write. Stops if the client resets it."""
        trailers = list(trailers)
        head = self.headers_frame(stream_id, status, headers, end_stream=end_stream and not body and not trailers)
        await self._send_body([head], stream_id, body, end_stream=end_stream and not trailers)
        if trailers:
            await self.send(self.headers_frame(stream_id, None, trailers, end_stream=end_stream))

    async def send_data(self, stream_id: int, data: bytes, *, end_stream: bool = False) -> None:
        """DATA within the client's windows; to break them, `send` frames."""
        await self._send_body([], stream_id, data, end_stream=end_stream)

    async def _send_body(self, ready: list[frames.Frame], stream_id: int, body: bytes, *, end_stream: bool) -> None:
        if not body and end_stream and not ready:
            ready.append(frames.DataFrame(stream_id, b"", flags=["END_STREAM"]))
        start = 0
        while start < len(body):
            size = min(len(body) - start, _MAX_FRAME, self._room(stream_id))
            if size <= 0:
                await self.send(*ready)
                ready.clear()
                await self.until(lambda: self._room(stream_id) > 0 or self._is_reset(stream_id))
                if self._is_reset(stream_id):
                    return
                continue
            last = end_stream and start + size == len(body)
            ready.append(frames.DataFrame(stream_id, body[start : start + size], flags=["END_STREAM"] if last else []))
            start += size
            self._window -= size
            self._stream_windows[stream_id] -= size
        await self.send(*ready)

    def _room(self, stream_id: int) -> int:
        return min(self._window, self._stream_windows.setdefault(stream_id, _INITIAL_WINDOW))

    def _is_reset(self, stream_id: int) -> bool:
        return stream_id in self.requests and self.requests[stream_id].reset is not None

    async def ping(self, payload: bytes = b"raw-ping") -> float:
        """PING the client; the seconds until its ACK."""
        began = anyio.current_time()
        already = len(self.frames)
        await self.send(frames.PingFrame(0, payload))

        def acknowledged() -> bool:
            return any(
                isinstance(frame, frames.PingFrame) and "ACK" in frame.flags and frame.opaque_data == payload
                for frame in self.frames[already:]
            )

        await self.until(acknowledged)
        return anyio.current_time() - began

    async def rst(self, stream_id: int, code: int = 0) -> None:
        """RST_STREAM."""
        await self.send(frames.RstStreamFrame(stream_id, code))

    async def goaway(self, last_stream_id: int, code: int = 0, debug: bytes = b"") -> None:
        """GOAWAY; the connection stays open."""
        await self.send(frames.GoAwayFrame(0, last_stream_id, code, debug))

    # Ends

    async def eof(self, *, close_notify: bool = True) -> None:
        """End our direction only, with TLS's own goodbye or, rudely, without."""
        if close_notify:
            self._say_goodbye()
        await self.send_ciphertext(self._tls_out.read())
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def _say_goodbye(self) -> None:
        if self._tls is not None:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()

    def close(self) -> None:
        """FIN, and nothing is read any more."""
        close(self.sock)
        self._outgoing.clear()
        self._end()

    def abort(self) -> None:
        """RST; what wasn't sent is lost."""
        abort(self.sock)
        self.close()


def _text(raw: bytes | str) -> str:
    return raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else raw


def _attribute(frame: frames.Frame, name: str) -> object:
    value = getattr(frame, name, None)
    return set(value) if name == "flags" and value is not None else value


class RawServer:
    """Listens on 127.0.0.1, or on a unix socket; see the module's docstring."""

    #: What the server's end of a connection is: a `Peer`, or one that does more.
    kind: type[Peer] = Peer

    def __init__(self, listener: socket.socket, context: ssl.SSLContext | None, tasks: TaskGroup) -> None:
        self._listener = listener
        self._context = context
        self._tasks = tasks
        self._accepting = anyio.Lock()
        self._accepted = anyio.Event()
        #: Every connection that was accepted, those that ended too.
        self.peers: list[Peer] = []
        is_tcp = listener.family == socket.AF_INET
        self.port: int = listener.getsockname()[1] if is_tcp else 0
        authority = f"127.0.0.1:{self.port}" if is_tcp else "localhost"
        #: Where clients find it.
        self.url = f"{'http' if context is None else 'https'}://{authority}"

    @classmethod
    @contextlib.asynccontextmanager
    async def listen(
        cls,
        ssl: ssl.SSLContext | None = None,
        *,
        uds: str | None = None,
        backlog: int = 128,
        receive_buffer: int | None = None,
    ) -> AsyncIterator[RawServer]:
        """A server for the length of the context: afterwards its tasks and sockets are gone.

        With `receive_buffer` (SO_RCVBUF) a peer that stops reading blocks the client after that many bytes or so.
        """
        listener = socket.socket(socket.AF_INET if uds is None else socket.AF_UNIX)
        try:
            if receive_buffer is not None:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            listener.bind(("127.0.0.1", 0) if uds is None else uds)
            listener.listen(backlog)
            listener.setblocking(False)
            async with task_group() as tasks:
                server = cls(listener, ssl, tasks)
                try:
                    yield server
                finally:
                    for peer in server.peers:
                        peer.close()
        finally:
            close(listener)

    async def accept(self) -> Peer:
        """The next connection, untouched: the next step is its `handshake`."""
        async with self._accepting:
            while True:
                if self._listener.fileno() == -1:
                    raise anyio.ClosedResourceError
                try:
                    sock, _ = self._listener.accept()
                except BlockingIOError:
                    await anyio.wait_readable(self._listener)
                else:
                    break
        sock.setblocking(False)
        if sock.family == socket.AF_INET:
            # Nagle's algorithm waits in real time, of which virtual time knows nothing.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = self.kind(sock, self._context, self._tasks)
        self.peers.append(peer)
        self._accepted.set()
        self._accepted = anyio.Event()
        return peer

    async def peer(self, index: int) -> Peer:
        """The connection of this number, as soon as `serve` or somebody else has accepted it."""
        while len(self.peers) <= index:
            await self._accepted.wait()
        return self.peers[index]

    def serve(self, handler: Callable[[Peer], Awaitable[Any]], settings: Mapping[int, int] | None = None) -> None:
        """From now on accept every connection, shake hands, and run the handler in a task of its own.

        A handler may end by the client's going away; any other error of its ends the `listen` context with it.
        """

        async def handle(peer: Peer) -> None:
            try:
                await peer.handshake(settings)
                await handler(peer)
            except* GONE:
                # In a group with it, perhaps, the cancellation of the handler's own tasks, which goes on.
                pass

        async def accept_for_ever() -> None:
            with contextlib.suppress(anyio.ClosedResourceError):
                while True:
                    self._tasks.start_soon(handle, await self.accept())

        self._tasks.start_soon(accept_for_ever)

    def stop_listening(self) -> None:
        """Refuse further connections."""
        close(self._listener)


def answering(
    body: bytes = b"ok", *, status: int = 200, headers: Iterable[tuple[str, str]] = (), delay: float = 0.0
) -> Callable[[Peer], Awaitable[None]]:
    """A handler for `serve` that answers all requests alike, each `delay` seconds after its end."""
    headers = list(headers)

    async def answer(request: RawRequest) -> None:
        with contextlib.suppress(*GONE):
            await request.complete()
            await anyio.sleep(delay)
            await request.peer.respond(request.stream_id, status, headers, body)

    async def handler(peer: Peer) -> None:
        async with task_group() as tasks:
            while True:
                tasks.start_soon(answer, await peer.request())

    return handler


@contextlib.asynccontextmanager
async def task_group() -> AsyncIterator[TaskGroup]:
    """A task group that cancels its tasks at its end, and raises a lone error as itself, not as a group of one."""
    try:
        async with anyio.create_task_group() as tasks:
            try:
                yield tasks
            finally:
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        lone = group.exceptions[0]
    else:
        return
    raise lone


def close(sock: socket.socket) -> None:
    """Close a socket, and wake whoever waits for it."""
    if sock.fileno() != -1:
        anyio.notify_closing(sock)
        sock.close()


def abort(sock: socket.socket) -> None:
    """Close a TCP socket with RST."""
    if sock.fileno() != -1:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        close(sock)
