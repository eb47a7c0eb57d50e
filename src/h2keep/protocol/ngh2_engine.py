"""The fast codec, on ngh2, a binding of nghttp2: the one module that imports it, and only where it was asked for.

nghttp2 is in charge of HPACK, of the states of streams and of what makes a response well-formed. Frames are cut here,
and what concerns the connection alone (SETTINGS, PING, GOAWAY, WINDOW_UPDATE, both directions' windows) stays here, so
that nghttp2 acts on nothing by itself:

* It would answer and give credit when it thinks fit, close streams at a GOAWAY, and end the session with the last of
  them. It sees no such frame. Its own receive windows are opened as far as they go, and whatever it has to say beside
  what it was asked for is taken as its verdict on the frame before.
* ngh2 reports neither a frame's length with its padding, nor what became of a frame that it ignored. So one frame is
  handed over at a time, and frames on streams that are over are discarded here.
* Requests get the ids that nghttp2 counts. An id that was never used, because its request was dropped, is used up
  there without a byte (`_skip_to`).

ngh2 is young: the version range is what the tests in tests/protocol/test_ngh2_contract.py passed on, and another
version is refused at import, not met in mid-flight.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NoReturn

import ngh2

from h2keep.errors import RemoteProtocolError
from h2keep.protocol.engine import EngineHandler, ErrorCode

if TYPE_CHECKING:
    from h2keep.protocol.events import Headers

__all__ = ["Ngh2Engine"]

_LOWEST_VERSION, _FIRST_UNKNOWN_VERSION = (0, 3), (0, 4)

_HEADER = struct.Struct(">HBBBL")
_SETTING = struct.Struct(">HL")
_LONG = struct.Struct(">L")
_TWO_LONGS = struct.Struct(">LL")
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_MAX_FRAME_SIZE = 16_384
_MAX_HEADER_BLOCK = 64 * 1024
_MAX_CONTINUATIONS = 64
_MAX_WINDOW = 2**31 - 1
_DEFAULT_WINDOW = 65_535
#: Streams that were reset are remembered, so that late frames are told from nonsense; no more than this many.
_MAX_REMEMBERED = 2**16

# Frame types and flags (RFC 9113, section 6).
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM = _ACK = 0x1
_END_HEADERS = 0x4
_PADDED = 0x8
_PRIORITY = 0x20
# PRIORITY, ALTSVC and extension frames ask nothing of a client and are skipped (RFC 9113, section 5.5).
_UNDERSTOOD = frozenset(range(10)) - {2}

# Settings (RFC 9113, section 6.5.2, and RFC 8441).
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE = 1, 2, 3, 4
_SETTING_MAX_FRAME_SIZE, _MAX_HEADER_LIST_SIZE, _ENABLE_CONNECT_PROTOCOL = 5, 6, 8

_NO_LIMIT = 2**32 - 1
_CONFIGURATION = ngh2.Configuration(
    peer_max_concurrent_streams=_NO_LIMIT,
    max_send_header_block_length=2**30,
    max_continuations=_MAX_CONTINUATIONS,
    # These two by the clock, and bytes that are the same must have the same outcome; K23 has bounds of its own.
    glitch_rate_limit=(2**63, 2**63),
    stream_reset_rate_limit=(2**63, 2**63),
    max_inbound_header_list_size=_MAX_HEADER_BLOCK,
    # Never reached: each field counts for 32 bytes at least.
    max_inbound_header_count=_MAX_HEADER_BLOCK,
)
#: What nghttp2 is told of our SETTINGS: limits that it must not apply, since they are applied here.
_SETTINGS_WITHIN = {
    _ENABLE_PUSH: 0,
    _INITIAL_WINDOW_SIZE: _MAX_WINDOW,
    _SETTING_MAX_FRAME_SIZE: 2**24 - 1,
    _MAX_HEADER_LIST_SIZE: _MAX_HEADER_BLOCK,
}
_SECRET = b"proxy-authorization"
_PLACEHOLDER: Headers = []

_ResponseReceived = ngh2.ResponseReceived
_DataReceived = ngh2.DataReceived


def _check_version() -> None:
    version = ngh2.__version__
    major, minor = (int(part) for part in version.split(".")[:2])
    if not _LOWEST_VERSION <= (major, minor) < _FIRST_UNKNOWN_VERSION:
        raise ImportError(
            f"h2keep's engine 'ngh2' works with ngh2 0.3, not with {version}: pip install 'h2keep[fast]'", name="ngh2"
        )


_check_version()


class _Stream:
    """An open stream: its windows, and which of its ends have come or gone."""

    __slots__ = ("answered", "receive_window", "received_end", "send_window", "sent_end")

    def __init__(self, send_window: int, receive_window: int, sent_end: bool) -> None:
        self.send_window = send_window
        self.receive_window = receive_window
        self.sent_end = sent_end
        self.received_end = False
        #: A final response head came.
        self.answered = False


class Ngh2Engine:
    """An `Engine` on ngh2."""

    def __init__(self, handler: EngineHandler, *, initial_window: int, connection_window: int) -> None:
        self._handler = handler
        self._partial = b""
        self._greeted = False
        self._out: list[bytes] = []
        # The frames of the header block that is being assembled, their stream, and how long the block is so far.
        self._block_stream = 0
        self._block_flags = 0
        self._block_parts: list[bytes] = []
        self._block_size = 0
        self.max_concurrent_streams: int | None = None
        self.max_frame_size = _MAX_FRAME_SIZE
        self._initial_receive_window = initial_window
        self._initial_send_window = _DEFAULT_WINDOW
        self._receive_window = _DEFAULT_WINDOW
        self._send_window = _DEFAULT_WINDOW
        self._streams: dict[int, _Stream] = {}
        #: Closed by a reset, oldest first.
        self._reset: dict[int, None] = {}
        self._next_id = 1
        self._session = self._started()
        settings = {
            _HEADER_TABLE_SIZE: 4_096,
            _ENABLE_PUSH: 0,
            _INITIAL_WINDOW_SIZE: initial_window,
            _SETTING_MAX_FRAME_SIZE: _MAX_FRAME_SIZE,
            _ENABLE_CONNECT_PROTOCOL: 0,
            _MAX_HEADER_LIST_SIZE: _MAX_HEADER_BLOCK,
        }
        self._out += [_PREFACE, _frame(_SETTINGS, 0, 0, b"".join(_SETTING.pack(*item) for item in settings.items()))]
        self.send_window_update(0, connection_window - _DEFAULT_WINDOW)

    def _started(self) -> ngh2.Connection:
        """A session whose greetings are behind it: nothing of them reaches the wire."""
        session = ngh2.Connection(ngh2.Role.CLIENT, _CONFIGURATION)
        session.initiate_connection(_SETTINGS_WITHIN)
        session.set_local_window_size(_MAX_WINDOW)
        session.receive_data(_frame(_SETTINGS, 0, 0, b"") + _frame(_SETTINGS, _ACK, 0, b""))
        session.data_to_send()
        session.events()
        return session

    # Receiving

    def receive(self, data: bytes) -> None:
        if self._partial:
            data = self._partial + data
        start, end = 0, len(data)
        if not self._greeted and end >= 9:
            self._greet(data)
        unpack = _HEADER.unpack_from
        view = memoryview(data)
        while end - start >= 9:
            high, low, kind, flags, stream_id = unpack(data, start)
            length = (high << 8) | low
            if length > _MAX_FRAME_SIZE:
                reason = f"a frame of {length} bytes, above the limit of {_MAX_FRAME_SIZE}"
                self._fail(ErrorCode.FRAME_SIZE_ERROR, reason)
            stop = start + 9 + length
            if end < stop:
                break
            self._receive_frame(kind, flags, stream_id & 0x7FFF_FFFF, view[start:stop])
            start = stop
        self._partial = data[start:]

    def _greet(self, data: bytes) -> None:
        """The first frame must be SETTINGS (RFC 9113, section 3.4)."""
        if data.startswith(b"HTTP/1."):
            self._fail(ErrorCode.PROTOCOL_ERROR, "it answers in HTTP/1.1")
        if data[3] != _SETTINGS or data[4] & _ACK:
            self._fail(ErrorCode.PROTOCOL_ERROR, "its first frame is not SETTINGS")
        self._greeted = True

    def _receive_frame(self, kind: int, flags: int, stream_id: int, frame: memoryview) -> None:
        if self._block_stream and (kind != _CONTINUATION or stream_id != self._block_stream):
            self._fail(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted by another frame")
        if kind not in _UNDERSTOOD:
            return
        if not stream_id:
            self._receive_control(kind, flags, bytes(frame[9:]))
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            self._receive_stray(kind, flags, stream_id, frame)
        elif kind == _DATA:
            self._receive_data(flags, stream_id, stream, frame)
        elif kind in (_HEADERS, _CONTINUATION):
            block = self._assemble(kind, flags, stream_id, frame)
            if block is not None:
                self._receive_headers(stream_id, stream, block)
        elif kind == _RST_STREAM:
            self._receive_reset(stream_id, bytes(frame))
        elif kind == _WINDOW_UPDATE:
            self._receive_credit(stream_id, stream, bytes(frame[9:]))
        else:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a frame of type {kind} on a stream")

    def _receive_data(self, flags: int, stream_id: int, stream: _Stream, frame: memoryview) -> None:
        length = len(frame) - 9
        if flags & _PADDED and (not length or frame[9] >= length):
            self._fail(ErrorCode.PROTOCOL_ERROR, "more padding than there is frame")
        self._charge(length)
        if stream.received_end:
            self._fail(ErrorCode.STREAM_CLOSED, f"DATA on stream {stream_id} after its end")
        stream.receive_window -= length
        if stream.receive_window < 0:
            self._fail(ErrorCode.FLOW_CONTROL_ERROR, f"more DATA on stream {stream_id} than its window allows")
        if not stream.answered:
            self._handler.on_discarded(length)
            self._stream_error(stream_id, "a body before its head")
            return
        event = self._judge(frame)
        if type(event) is not _DataReceived:
            self._handler.on_discarded(length)
            self._stream_error(stream_id, "a body that belies its Content-Length, or that must not be there")
            return
        if self._session.want_write:
            # Credit beyond what was ever promised, once in a gigabyte.
            self._session.data_to_send()
        end_stream = bool(flags & _END_STREAM)
        if end_stream:
            self._note_end(stream_id, stream)
        self._handler.on_data(stream_id, event.data, length, end_stream)

    def _charge(self, length: int) -> None:
        """DATA came, for whatever stream: the connection's window pays, padding included."""
        self._receive_window -= length
        if self._receive_window < 0:
            self._fail(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the connection's window allows")

    def _assemble(self, kind: int, flags: int, stream_id: int, frame: memoryview) -> bytes | memoryview | None:
        """All frames of a header block, None while CONTINUATIONs are due (bounds: K23)."""
        if kind == _HEADERS:
            self._block_flags = flags
            if flags & _END_HEADERS:
                return frame
            self._block_stream = stream_id
            # What is not of the block; if there isn't even as much as that, nghttp2 will say so.
            self._block_size = -(5 if flags & _PRIORITY else 0)
            if flags & _PADDED and len(frame) > 9:
                self._block_size -= 1 + frame[9]
        elif not self._block_stream:
            self._fail(ErrorCode.PROTOCOL_ERROR, "a CONTINUATION without a header block")
        parts = self._block_parts
        parts.append(bytes(frame))
        self._block_size += len(frame) - 9
        if len(parts) > 1 + _MAX_CONTINUATIONS or self._block_size > _MAX_HEADER_BLOCK:
            self._fail(
                ErrorCode.ENHANCE_YOUR_CALM,
                f"a header block above {_MAX_HEADER_BLOCK} bytes or {_MAX_CONTINUATIONS} CONTINUATIONs",
            )
        if not flags & _END_HEADERS:
            return None
        self._block_stream = 0
        self._block_parts = []
        return b"".join(parts)

    def _judge(self, frames: bytes | memoryview) -> ngh2.Event | None:
        """What nghttp2 makes of a frame, or of a whole header block: its event, None if it makes nothing of it.

        An objection to the stream is no event; the caller tells it from a frame that was ignored by knowing better.
        """
        session = self._session
        try:
            session.receive_data(frames)
        except ngh2.DenialOfServiceError as error:
            self._fail(ErrorCode.ENHANCE_YOUR_CALM, f"more header fields than allowed: {error}", error)
        except ngh2.NGH2Error as error:
            self._fail(ErrorCode.PROTOCOL_ERROR, str(error), error)
        events = session.events()
        if events:
            return events[0]
        if session.want_write:
            self._look_for_goaway(session.data_to_send())
            session.events()
        return None

    def _look_for_goaway(self, output: bytes) -> None:
        """nghttp2 gave up on the connection if it says so; what else it says has been said better by then."""
        start = 0
        while start < len(output):
            high, low, kind, _, _ = _HEADER.unpack_from(output, start)
            stop = start + 9 + ((high << 8) | low)
            if kind == _GOAWAY:
                _, error_code = _TWO_LONGS.unpack_from(output, start + 9)
                reason = output[start + 17 : stop].decode("ascii", "replace")
                self._fail(error_code, reason or "a header block that can't be decoded")
            start = stop

    def _receive_headers(self, stream_id: int, stream: _Stream, block: bytes | memoryview) -> None:
        if stream.received_end:
            self._fail(ErrorCode.STREAM_CLOSED, f"HEADERS on stream {stream_id} after its end")
        event = self._judge(block)
        end_stream = bool(self._block_flags & _END_STREAM)
        if end_stream and event is not None:
            self._note_end(stream_id, stream)
        kind = type(event)
        if kind is _ResponseReceived:
            stream.answered = True
            fields = event.headers  # type: ignore[union-attr]
            self._handler.on_response(stream_id, int(fields[0][1]), list(fields[1:]), end_stream)
        elif kind is ngh2.InformationalResponseReceived:
            fields = event.headers  # type: ignore[union-attr]
            self._handler.on_informational(stream_id, int(fields[0][1]), list(fields[1:]))
        elif kind is ngh2.TrailersReceived:
            self._handler.on_trailers(stream_id, list(event.headers))  # type: ignore[union-attr]
        else:
            self._stream_error(stream_id, "header fields that HTTP/2 doesn't allow")

    def _receive_reset(self, stream_id: int, frame: bytes) -> None:
        if len(frame) != 13:
            self._fail(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM of another length than 4 bytes")
        self._judge(frame)
        self._let_go(stream_id)
        self._handler.on_reset(stream_id, _LONG.unpack_from(frame, 9)[0])

    def _receive_credit(self, stream_id: int, stream: _Stream | None, body: bytes) -> None:
        if len(body) != 4:
            self._fail(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE of another length than 4 bytes")
        increment = _LONG.unpack(body)[0]
        if not 1 <= increment <= _MAX_WINDOW:
            self._fail(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of no bytes")
        if stream is None:
            self._send_window += increment
            if self._send_window > _MAX_WINDOW:
                self._fail(ErrorCode.FLOW_CONTROL_ERROR, "it overflowed the connection's flow-control window")
        elif stream.send_window + increment > _MAX_WINDOW:
            self.send_reset(stream_id, ErrorCode.FLOW_CONTROL_ERROR)
            error = RemoteProtocolError("the server overflowed the stream's flow-control window")
            self._handler.on_stream_error(stream_id, ErrorCode.FLOW_CONTROL_ERROR, error)
            return
        else:
            stream.send_window += increment
        self._handler.on_window_opened(stream_id)

    def _receive_control(self, kind: int, flags: int, body: bytes) -> None:
        """A frame on the connection itself."""
        if kind == _PING:
            if len(body) != 8:
                self._fail(ErrorCode.FRAME_SIZE_ERROR, "PING of another length than 8 bytes")
            if flags & _ACK:
                self._handler.on_ping_acknowledged(body)
            else:
                self._out.append(_frame(_PING, _ACK, 0, body))
                self._handler.on_reply_queued()
        elif kind == _WINDOW_UPDATE:
            self._receive_credit(0, None, body)
        elif kind == _SETTINGS:
            self._receive_settings(flags, body)
        elif kind == _GOAWAY:
            if len(body) < 8:
                self._fail(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY of less than 8 bytes")
            last_stream_id, error_code = _TWO_LONGS.unpack_from(body)
            self._handler.on_goaway(last_stream_id & 0x7FFF_FFFF, error_code, body[8:])
        else:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a frame of type {kind} on no stream")

    def _receive_settings(self, flags: int, body: bytes) -> None:
        if flags & _ACK:
            if body:
                self._fail(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS that acknowledge and set at once")
            self._handler.on_settings_acknowledged()
            return
        if len(body) % 6:
            self._fail(ErrorCode.FRAME_SIZE_ERROR, f"SETTINGS of {len(body)} bytes")
        settings = dict(_SETTING.iter_unpack(body))
        self._check_settings(settings)
        self.max_concurrent_streams = settings.get(_MAX_CONCURRENT_STREAMS, self.max_concurrent_streams)
        window = settings.get(_INITIAL_WINDOW_SIZE)
        if window is not None:
            for stream in self._streams.values():
                stream.send_window += window - self._initial_send_window
                if stream.send_window > _MAX_WINDOW:
                    self._fail(ErrorCode.FLOW_CONTROL_ERROR, "it overflowed a stream's flow-control window")
            self._initial_send_window = window
        if _HEADER_TABLE_SIZE in settings:
            # The one setting that is nghttp2's affair.
            size = _SETTING.pack(_HEADER_TABLE_SIZE, settings[_HEADER_TABLE_SIZE])
            self._session.receive_data(_frame(_SETTINGS, 0, 0, size))
            self._session.data_to_send()
            self._session.events()
        self._out.append(_frame(_SETTINGS, _ACK, 0, b""))
        self._handler.on_reply_queued()
        self._handler.on_settings()

    def _check_settings(self, settings: dict[int, int]) -> None:
        """The ranges of RFC 9113, section 6.5.2, and RFC 8441, section 3."""
        if settings.get(_INITIAL_WINDOW_SIZE, 0) > _MAX_WINDOW:
            self._fail(ErrorCode.FLOW_CONTROL_ERROR, "SETTINGS with an INITIAL_WINDOW_SIZE that is none")
        allowed = {
            _ENABLE_PUSH: range(1),
            _SETTING_MAX_FRAME_SIZE: range(16_384, 2**24),
            _ENABLE_CONNECT_PROTOCOL: range(2),
        }
        for code, values in allowed.items():
            if code in settings and settings[code] not in values:
                self._fail(ErrorCode.PROTOCOL_ERROR, f"SETTINGS with {settings[code]} for setting {code}")

    # Streams that are not open

    def _receive_stray(self, kind: int, flags: int, stream_id: int, frame: memoryview) -> None:
        """A frame on a stream that is over, or never was."""
        if not stream_id & 1 or stream_id >= self._next_id:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a frame on stream {stream_id}, which was never opened")
        if kind in (_RST_STREAM, _WINDOW_UPDATE):
            # Sent before the peer knew that the stream is over (RFC 9113, section 5.1).
            return
        if stream_id not in self._reset:
            self._fail(ErrorCode.STREAM_CLOSED, f"a frame on stream {stream_id} after its end")
        if kind == _DATA:
            self._charge(len(frame) - 9)
            self._handler.on_discarded(len(frame) - 9)
        elif kind in (_HEADERS, _CONTINUATION):
            block = self._assemble(kind, flags, stream_id, frame)
            if block is not None:
                # Nobody reads it, but the peer's HPACK encoder has moved on, and our decoder must follow.
                self._judge(block)
                self._handler.on_discarded(0)
        else:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a frame of type {kind} on stream {stream_id}")

    def _note_end(self, stream_id: int, stream: _Stream) -> None:
        stream.received_end = True
        if stream.sent_end:
            del self._streams[stream_id]

    def _let_go(self, stream_id: int) -> None:
        """A reset closed the stream."""
        del self._streams[stream_id]
        self._reset[stream_id] = None
        if len(self._reset) > _MAX_REMEMBERED:
            del self._reset[next(iter(self._reset))]

    def _stream_error(self, stream_id: int, reason: str) -> None:
        """A malformed response: the end of one stream."""
        self.send_reset(stream_id, ErrorCode.PROTOCOL_ERROR)
        error = RemoteProtocolError(f"the server sent a malformed response: {reason}")
        self._handler.on_stream_error(stream_id, ErrorCode.PROTOCOL_ERROR, error)

    def _fail(self, error_code: int, reason: str, cause: Exception | None = None) -> NoReturn:
        self.send_goaway(error_code, b"")
        raise RemoteProtocolError(f"the server broke HTTP/2: {reason}") from cause

    # Sending

    def send_request(self, stream_id: int, headers: Headers, end_stream: bool) -> bytes:
        if stream_id != self._next_id:
            self._skip_to(stream_id)
        self._next_id = stream_id + 2
        self._streams[stream_id] = _Stream(self._initial_send_window, self._initial_receive_window, end_stream)
        self._session.send_request(_hiding(headers), end_stream=end_stream)
        return self._session.data_to_send()

    def _skip_to(self, stream_id: int) -> None:
        """Use up the ids before this one: requests that are cancelled before they are encoded leave no trace."""
        session = self._session
        for unused in range(self._next_id, stream_id, 2):
            session.send_request(_PLACEHOLDER, end_stream=True)
            session.reset_stream(unused)
            session.data_to_send()
        session.events()

    def send_data(self, stream_id: int, data: bytes | memoryview, end_stream: bool) -> bytes:
        stream = self._streams[stream_id]
        length = len(data)
        stream.send_window -= length
        self._send_window -= length
        if end_stream:
            # nghttp2 makes an empty frame of it; on the wire it goes with the data.
            self._session.end_stream(stream_id)
            self._session.data_to_send()
            self._finish(stream_id, stream)
        return _HEADER.pack(length >> 8, length & 0xFF, _DATA, _END_STREAM if end_stream else 0, stream_id)

    def send_trailers(self, stream_id: int, headers: Headers) -> bytes:
        self._session.send_trailers(stream_id, _hiding(headers))
        output = self._session.data_to_send()
        self._finish(stream_id, self._streams[stream_id])
        return output

    def _finish(self, stream_id: int, stream: _Stream) -> None:
        """The request is complete."""
        stream.sent_end = True
        if stream.received_end:
            self._session.events()
            del self._streams[stream_id]

    def send_reset(self, stream_id: int, error_code: int) -> None:
        self.forget(stream_id)
        self._out.append(_frame(_RST_STREAM, 0, stream_id, _LONG.pack(error_code)))

    def forget(self, stream_id: int) -> None:
        session = self._session
        session.reset_stream(stream_id)
        session.data_to_send()
        session.events()
        self._let_go(stream_id)

    def send_ping(self, payload: bytes) -> None:
        self._out.append(_frame(_PING, 0, 0, payload))

    def send_window_update(self, stream_id: int, increment: int) -> None:
        if stream_id:
            self._streams[stream_id].receive_window += increment
        else:
            self._receive_window += increment
        self._out.append(_frame(_WINDOW_UPDATE, 0, stream_id, _LONG.pack(increment)))

    def send_goaway(self, error_code: int, debug_data: bytes) -> None:
        self._out.append(_frame(_GOAWAY, 0, 0, _TWO_LONGS.pack(0, error_code) + debug_data))

    def send_window(self, stream_id: int) -> int:
        return self._streams[stream_id].send_window

    def connection_window(self) -> int:
        return self._send_window

    def drain(self) -> bytes:
        if not self._out:
            return b""
        data = b"".join(self._out)
        self._out.clear()
        return data


def _frame(kind: int, flags: int, stream_id: int, body: bytes) -> bytes:
    return _HEADER.pack(len(body) >> 8, len(body) & 0xFF, kind, flags, stream_id) + body


def _hiding(headers: Headers) -> Headers:
    """Keep out of the table what could be guessed in there (RFC 7541, section 7.1.3).

    nghttp2 does so with `authorization` and short cookies of its own accord.
    """
    if any(name == _SECRET for name, _ in headers):
        return [ngh2.NeverIndexedHeader(*field) if field[0] == _SECRET else field for field in headers]
    return headers
