"""The fast codec, on ngh2, a binding of nghttp2: the one module that imports it, and only where it was asked for.

nghttp2 is in charge of header blocks: of HPACK both ways, of what makes a response's fields well-formed, and of their
sequence (interim responses, head, trailers). It sees nothing else, since it would act on it by itself, or cost more
than it does:

* It would answer control frames and give credit when it thinks fit, close streams at a GOAWAY, and end the session with
  the last of them. Frames, windows, and what concerns the connection alone are dealt with here.
* ngh2 makes an object and a copy of each DATA frame, and tells neither its length with padding nor, of one that it
  ignores, anything at all. Bodies and their declared lengths are dealt with here.
* To it every request ends with its head. That the stream is over it learns from an RST_STREAM that no peer sent, with
  the next header block (`_tell_end`); trailers that go out are coded here, as literals.
* Requests get the ids that nghttp2 counts. An id that was never used, because its request was dropped, is used up
  there without a byte (`_skip_to`).

What it wants to send beside the requests that it was asked for is its verdict on the header block before, and doesn't
leave as it is.

ngh2 is young: the version range is what the contract tests in tests/protocol/test_ngh2_contract.py passed on, and
another version is refused at import, not met in mid-flight.
"""

from __future__ import annotations

import operator
import struct
from typing import TYPE_CHECKING, Any, NoReturn

import ngh2

from h2keep.errors import RemoteProtocolError
from h2keep.protocol.engine import EngineHandler, ErrorCode, ResetStreams
from h2keep.protocol.framing import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    LARGEST_WINDOW,
    MAX_CONTINUATIONS,
    MAX_FRAME_SIZE,
    MAX_HEADER_BLOCK,
    PADDED,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    UNDERSTOOD,
    WINDOW_UPDATE,
    data_run,
    frame_header,
    objection_to_greeting,
    parse_on,
    unpack_header,
)

if TYPE_CHECKING:
    from h2keep.protocol.events import Headers

__all__ = ["Ngh2Engine"]

_LOWEST_VERSION, _FIRST_UNKNOWN_VERSION = (0, 3), (0, 4)

_SETTING = struct.Struct(">HL")
_LONG = struct.Struct(">L")
_TWO_LONGS = struct.Struct(">LL")
_RESET = struct.Struct(">HBBBLL")
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_PING_HEADER = frame_header(8, PING, 0, 0)

_DEFAULT_WINDOW = 65_535

# Settings (RFC 9113, section 6.5.2, and RFC 8441).
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE = 1, 2, 3, 4
_SETTING_MAX_FRAME_SIZE, _MAX_HEADER_LIST_SIZE, _ENABLE_CONNECT_PROTOCOL = 5, 6, 8

_NO_LIMIT = 2**32 - 1
#: The most that the encoder's table may hold, in bytes, whatever the peer allows.
_LARGEST_TABLE = 4_096
_CONFIGURATION = ngh2.Configuration(
    peer_max_concurrent_streams=_NO_LIMIT,
    max_send_header_block_length=2**30,
    max_deflate_dynamic_table_size=_LARGEST_TABLE,
    max_continuations=MAX_CONTINUATIONS,
    # These two by the clock, and bytes that are the same must have the same outcome; K23 has bounds of its own.
    glitch_rate_limit=(2**63, 2**63),
    stream_reset_rate_limit=(2**63, 2**63),
    max_inbound_header_list_size=MAX_HEADER_BLOCK,
    # Never reached: each field counts for 32 bytes at least.
    max_inbound_header_count=MAX_HEADER_BLOCK,
)
#: What nghttp2 is told of our SETTINGS. Frames and windows may be as large as they can be, since the limits are here.
_SETTINGS_WITHIN = {
    _ENABLE_PUSH: 0,
    _INITIAL_WINDOW_SIZE: LARGEST_WINDOW,
    _SETTING_MAX_FRAME_SIZE: 2**24 - 1,
    _MAX_HEADER_LIST_SIZE: MAX_HEADER_BLOCK,
}
_SECRET = b"proxy-authorization"
_name_of = operator.itemgetter(0)
_PLACEHOLDER: Headers = []
#: Streams whose end nghttp2 isn't told yet, at most.
_MAX_UNTOLD = 256
_FILLER = bytes(64 * 1024)
#: A frame's flags without END_STREAM, as bytes.
_OPEN_ENDED = [bytes([flags & ~END_STREAM]) for flags in range(256)]
_NOT_MODIFIED = 304

_ResponseReceived, _InformationalReceived = ngh2.ResponseReceived, ngh2.InformationalResponseReceived
_TrailersReceived = ngh2.TrailersReceived
_MESSAGES = frozenset({_ResponseReceived, _InformationalReceived, _TrailersReceived})


def _check_version() -> None:
    version = ngh2.__version__
    major, minor = (int(part) for part in version.split(".")[:2])
    if not _LOWEST_VERSION <= (major, minor) < _FIRST_UNKNOWN_VERSION:
        raise ImportError(
            f"h2keep's engine 'ngh2' works with ngh2 0.3, not with {version}: pip install 'h2keep[fast]'", name="ngh2"
        )


_check_version()


class _Stream:
    """An open stream: its windows, which of its ends have come or gone, and how long the response's body must be."""

    __slots__ = (
        "answered",
        "bodiless",
        "body_left",
        "declared",
        "receive_window",
        "received_end",
        "send_window",
        "sent_end",
    )

    def __init__(self, send_window: int, receive_window: int, sent_end: bool, bodiless: bool) -> None:
        self.send_window = send_window
        self.receive_window = receive_window
        self.sent_end = sent_end
        self.received_end = False
        #: A final response head came.
        self.answered = False
        #: The answer to HEAD: its Content-Length is that of a body that doesn't come.
        self.bodiless = bodiless
        #: The body's declared length, and what of it hasn't come yet; None if none was declared.
        self.declared: int | None = None
        self.body_left: int | None = None


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
        self.max_frame_size = MAX_FRAME_SIZE
        self._initial_receive_window = initial_window
        self._initial_send_window = _DEFAULT_WINDOW
        self._receive_window = _DEFAULT_WINDOW
        self._send_window = _DEFAULT_WINDOW
        self._streams: dict[int, _Stream] = {}
        #: Closed by a reset, oldest first.
        self._reset = ResetStreams()
        self._next_id = 1
        #: RST_STREAM for streams that are over, for nghttp2 alone.
        self._untold: list[bytes] = []
        #: Sizes of the encoder's table since the last header block that went out: the smallest, the last.
        self._table_sizes: tuple[int, ...] = ()
        self._session = self._started()
        settings = {
            _HEADER_TABLE_SIZE: 4_096,
            _ENABLE_PUSH: 0,
            _INITIAL_WINDOW_SIZE: initial_window,
            _SETTING_MAX_FRAME_SIZE: MAX_FRAME_SIZE,
            _ENABLE_CONNECT_PROTOCOL: 0,
            _MAX_HEADER_LIST_SIZE: MAX_HEADER_BLOCK,
        }
        self._out += [_PREFACE, _frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*item) for item in settings.items()))]
        self.send_window_update(0, connection_window - _DEFAULT_WINDOW)

    def _started(self) -> ngh2.Connection:
        """A session whose greetings are behind it: nothing of them reaches the wire."""
        session = ngh2.Connection(ngh2.Role.CLIENT, _CONFIGURATION)
        session.initiate_connection(_SETTINGS_WITHIN)
        session.set_local_window_size(LARGEST_WINDOW)
        session.receive_data(_frame(SETTINGS, 0, 0, b"") + _frame(SETTINGS, ACK, 0, b""))
        session.data_to_send()
        session.events()
        return session

    # Receiving

    def receive(self, data: bytes) -> None:
        self._partial = parse_on(self._parse, self._partial, data)

    def _parse(self, data: bytes, start: int) -> bytes:
        """Act on the frames from `start` on; what is left over, as the rest of its frame hasn't come."""
        end = len(data)
        if not self._greeted and end >= 9:
            self._greet(data)
        streams = self._streams
        while end - start >= 9:
            high, low, kind, flags, stream_id = unpack_header(data, start)
            length = (high << 8) | low
            if length > MAX_FRAME_SIZE:
                reason = f"a frame of {length} bytes, above the limit of {MAX_FRAME_SIZE}"
                self._fail(ErrorCode.FRAME_SIZE_ERROR, reason)
            stop = start + 9 + length
            if end < stop:
                break
            stream_id &= 0x7FFF_FFFF
            stream = streams.get(stream_id)
            if stream is None or self._block_stream:
                self._receive_frame(kind, flags, stream_id, stream, data[start:stop])
            elif kind == DATA:
                if flags or not stream.answered:
                    body = data[start + 9 : stop]
                else:
                    body, stop = data_run(data, start, stop, self._room(stream))
                self._receive_data(flags, stream_id, stream, body)
            elif kind == HEADERS and flags & END_HEADERS:
                self._receive_headers(stream_id, stream, data[start:stop], flags)
            else:
                self._receive_frame(kind, flags, stream_id, stream, data[start:stop])
            start = stop
        return data[start:]

    def _greet(self, data: bytes) -> None:
        objection = objection_to_greeting(data)
        if objection is not None:
            self._fail(ErrorCode.PROTOCOL_ERROR, objection)
        self._greeted = True

    def _receive_frame(self, kind: int, flags: int, stream_id: int, stream: _Stream | None, frame: bytes) -> None:
        """Any frame but DATA on an open stream."""
        if self._block_stream and (kind != CONTINUATION or stream_id != self._block_stream):
            self._fail(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted by another frame")
        if kind not in UNDERSTOOD:
            return
        if not stream_id:
            self._receive_control(kind, flags, frame[9:])
        elif stream is None:
            self._receive_stray(kind, flags, stream_id, frame)
        elif kind in (HEADERS, CONTINUATION):
            block = self._assemble(kind, flags, stream_id, frame)
            if block is not None:
                self._receive_headers(stream_id, stream, block, self._block_flags)
        elif kind == RST_STREAM:
            self._receive_reset(stream_id, frame)
        elif kind == WINDOW_UPDATE:
            self._receive_credit(stream_id, stream, frame[9:])
        else:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a malformed frame: type {kind} on stream {stream_id}")

    def _receive_data(self, flags: int, stream_id: int, stream: _Stream, body: bytes) -> None:
        length = len(body)
        if flags & PADDED:
            if not length or body[0] >= length:
                self._fail(ErrorCode.PROTOCOL_ERROR, "a malformed frame: more padding than it has room for")
            body = body[1 : length - body[0]]
        self._charge(length)
        if stream.received_end:
            self._fail(ErrorCode.STREAM_CLOSED, f"DATA on stream {stream_id} after its end")
        stream.receive_window -= length
        if stream.receive_window < 0:
            self._fail(ErrorCode.FLOW_CONTROL_ERROR, f"more DATA on stream {stream_id} than its window allows")
        end_stream = flags & END_STREAM != 0
        if not stream.answered:
            self._handler.on_discarded(length)
            self._stream_error(stream_id, "a body before its head")
            return
        if stream.body_left is not None:
            stream.body_left -= len(body)
            if stream.body_left < 0 or (end_stream and stream.body_left):
                self._handler.on_discarded(length)
                self._stream_error(stream_id, f"a body that is not as long as it said ({stream.declared} bytes)")
                return
        if end_stream:
            self._tell_end(stream_id)
            self._note_end(stream_id, stream)
        self._handler.on_data(stream_id, body, length, end_stream)

    def _room(self, stream: _Stream) -> int:
        """How much DATA on the stream breaks no rule."""
        room = min(stream.receive_window, self._receive_window)
        return room if stream.body_left is None else min(room, stream.body_left)

    def _charge(self, length: int) -> None:
        """DATA came, for whatever stream: the connection's window pays, padding included."""
        self._receive_window -= length
        if self._receive_window < 0:
            self._fail(ErrorCode.FLOW_CONTROL_ERROR, "more DATA than the connection's window allows")

    def _assemble(self, kind: int, flags: int, stream_id: int, frame: bytes) -> bytes | None:
        """All frames of a header block, None while CONTINUATIONs are due (bounds: K23)."""
        if kind == HEADERS:
            self._block_flags = flags
            if flags & END_HEADERS:
                return frame
            self._block_stream = stream_id
            # What is not of the block; if there isn't even as much as that, nghttp2 will say so.
            self._block_size = -(5 if flags & PRIORITY else 0)
            if flags & PADDED and len(frame) > 9:
                self._block_size -= 1 + frame[9]
        elif not self._block_stream:
            self._fail(ErrorCode.PROTOCOL_ERROR, "a CONTINUATION without a header block")
        parts = self._block_parts
        parts.append(frame)
        self._block_size += len(frame) - 9
        if len(parts) > 1 + MAX_CONTINUATIONS or self._block_size > MAX_HEADER_BLOCK:
            self._fail(
                ErrorCode.ENHANCE_YOUR_CALM,
                f"a header block above {MAX_HEADER_BLOCK} bytes or {MAX_CONTINUATIONS} CONTINUATIONs",
            )
        if not flags & END_HEADERS:
            return None
        self._block_stream = 0
        self._block_parts = []
        return b"".join(parts)

    def _judge(self, block: bytes) -> Any:
        """What nghttp2 makes of a header block: its event; None if it has an objection, or if the stream is over."""
        session = self._session
        if self._untold:
            self._untold.append(block)
            block = b"".join(self._untold)
            self._untold.clear()
        try:
            session.receive_data(block)
        except ngh2.DenialOfServiceError as error:
            self._fail(ErrorCode.ENHANCE_YOUR_CALM, f"more header fields than allowed: {error}", error)
        except ngh2.NGH2Error as error:
            self._fail(ErrorCode.PROTOCOL_ERROR, str(error), error)
        # What it has to say of the streams that are over comes before.
        for event in reversed(session.events()):
            if type(event) in _MESSAGES:
                return event
        if session.want_write:
            self._look_for_goaway(session.data_to_send())
            session.events()
        return None

    def _look_for_goaway(self, output: bytes) -> None:
        """nghttp2 gives up on the connection if it says so; an objection to a stream is put in our own words."""
        start = 0
        while start < len(output):
            high, low, kind, _, _ = unpack_header(output, start)
            stop = start + 9 + ((high << 8) | low)
            if kind == GOAWAY:
                _, error_code = _TWO_LONGS.unpack_from(output, start + 9)
                reason = output[start + 17 : stop].decode("ascii", "replace")
                self._fail(error_code, reason or "a header block that can't be decoded")
            start = stop

    def _receive_headers(self, stream_id: int, stream: _Stream, block: bytes, flags: int) -> None:
        if stream.received_end:
            self._fail(ErrorCode.STREAM_CLOSED, f"HEADERS on stream {stream_id} after its end")
        end_stream = flags & END_STREAM != 0
        if end_stream and stream.declared and not stream.body_left:
            self._pretend_body(stream_id, stream.declared)
        event = self._judge(block)
        if event is None:
            self._stream_error(stream_id, "header fields that HTTP/2 doesn't allow")
            return
        if end_stream:
            # nghttp2 has seen both ends.
            self._note_end(stream_id, stream)
        kind = type(event)
        if kind is _ResponseReceived:
            # Validated: `:status` comes first and is the only pseudo-field.
            (_, code), *fields = event.headers
            status = int(code)
            stream.answered = True
            if not end_stream:
                stream.declared = stream.body_left = _declared_length(status, fields, stream.bodiless)
            self._handler.on_response(stream_id, status, fields, end_stream)
        elif kind is _TrailersReceived:
            self._handler.on_trailers(stream_id, list(event.headers))
        else:
            (_, code), *fields = event.headers
            self._handler.on_informational(stream_id, int(code), fields)

    def _pretend_body(self, stream_id: int, length: int) -> None:
        """nghttp2 takes no trailers before the body that was declared; how long it really was is known here."""
        session = self._session
        for start in range(0, length, len(_FILLER)):
            session.receive_data(_frame(DATA, 0, stream_id, _FILLER[: length - start]))
            session.events()
        session.data_to_send()

    def _receive_reset(self, stream_id: int, frame: bytes) -> None:
        if len(frame) != 13:
            self._fail(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM of another length than 4 bytes")
        self.forget(stream_id)
        self._handler.on_reset(stream_id, _LONG.unpack_from(frame, 9)[0])

    def _receive_credit(self, stream_id: int, stream: _Stream | None, body: bytes) -> None:
        if len(body) != 4:
            self._fail(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE of another length than 4 bytes")
        increment = _LONG.unpack(body)[0]
        if not 1 <= increment <= LARGEST_WINDOW:
            self._fail(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of no bytes")
        if stream is None:
            self._send_window += increment
            if self._send_window > LARGEST_WINDOW:
                self._fail(ErrorCode.FLOW_CONTROL_ERROR, "it overflowed the connection's flow-control window")
        elif stream.send_window + increment > LARGEST_WINDOW:
            self.send_reset(stream_id, ErrorCode.FLOW_CONTROL_ERROR)
            error = RemoteProtocolError("the server overflowed the stream's flow-control window")
            self._handler.on_stream_error(stream_id, ErrorCode.FLOW_CONTROL_ERROR, error)
            return
        else:
            stream.send_window += increment
        self._handler.on_window_opened(stream_id)

    def _receive_control(self, kind: int, flags: int, body: bytes) -> None:
        """A frame on the connection itself."""
        if kind == PING:
            if len(body) != 8:
                self._fail(ErrorCode.FRAME_SIZE_ERROR, "PING of another length than 8 bytes")
            if flags & ACK:
                self._handler.on_ping_acknowledged(body)
            else:
                self._out.append(_frame(PING, ACK, 0, body))
                self._handler.on_reply_queued()
        elif kind == WINDOW_UPDATE:
            self._receive_credit(0, None, body)
        elif kind == SETTINGS:
            self._receive_settings(flags, body)
        elif kind == GOAWAY:
            if len(body) < 8:
                self._fail(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY of less than 8 bytes")
            last_stream_id, error_code = _TWO_LONGS.unpack_from(body)
            self._handler.on_goaway(last_stream_id & 0x7FFF_FFFF, error_code, body[8:])
        else:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a malformed frame: type {kind} on no stream")

    def _receive_settings(self, flags: int, body: bytes) -> None:
        if flags & ACK:
            if body:
                self._fail(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS that acknowledge and set at once")
            self._handler.on_settings_acknowledged()
            return
        if len(body) % 6:
            self._fail(ErrorCode.FRAME_SIZE_ERROR, f"SETTINGS of {len(body)} bytes")
        settings = dict(_SETTING.iter_unpack(body))
        self._check_settings(settings)
        self.max_concurrent_streams = settings.get(_MAX_CONCURRENT_STREAMS, self.max_concurrent_streams)
        self.max_frame_size = settings.get(_SETTING_MAX_FRAME_SIZE, self.max_frame_size)
        window = settings.get(_INITIAL_WINDOW_SIZE)
        if window is not None:
            for stream in self._streams.values():
                stream.send_window += window - self._initial_send_window
                if stream.send_window > LARGEST_WINDOW:
                    self._fail(ErrorCode.FLOW_CONTROL_ERROR, "it overflowed a stream's flow-control window")
            self._initial_send_window = window
        if _HEADER_TABLE_SIZE in settings:
            # The one setting that is nghttp2's affair.
            size = settings[_HEADER_TABLE_SIZE]
            self._session.receive_data(_frame(SETTINGS, 0, 0, _SETTING.pack(_HEADER_TABLE_SIZE, size)))
            self._session.data_to_send()
            self._session.events()
            size = min(size, _LARGEST_TABLE)
            self._table_sizes = min([*self._table_sizes, size]), size
        self._out.append(_frame(SETTINGS, ACK, 0, b""))
        self._handler.on_reply_queued()
        self._handler.on_settings()

    def _check_settings(self, settings: dict[int, int]) -> None:
        """The ranges of RFC 9113, section 6.5.2, and RFC 8441, section 3."""
        if settings.get(_INITIAL_WINDOW_SIZE, 0) > LARGEST_WINDOW:
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

    def _receive_stray(self, kind: int, flags: int, stream_id: int, frame: bytes) -> None:
        """A frame on a stream that is over, or never was."""
        if not stream_id & 1 or stream_id >= self._next_id:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a frame on stream {stream_id}, which was never opened")
        if kind in (RST_STREAM, WINDOW_UPDATE):
            # Sent before the peer knew that the stream is over (RFC 9113, section 5.1).
            return
        if stream_id not in self._reset:
            self._fail(ErrorCode.STREAM_CLOSED, f"a frame on stream {stream_id} after its end")
        if kind == DATA:
            self._charge(len(frame) - 9)
            self._handler.on_discarded(len(frame) - 9)
        elif kind in (HEADERS, CONTINUATION):
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

    def _tell_end(self, stream_id: int) -> None:
        """Have nghttp2 let go of a stream, in front of the next header block."""
        untold = self._untold
        untold.append(_RESET.pack(0, 4, RST_STREAM, 0, stream_id, ErrorCode.CANCEL))
        if len(untold) > _MAX_UNTOLD:
            self._session.receive_data(b"".join(untold))
            self._session.events()
            untold.clear()

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
        self._table_sizes = ()
        bodiless = headers[0][1] == b"HEAD"
        self._streams[stream_id] = _Stream(
            self._initial_send_window, self._initial_receive_window, end_stream, bodiless
        )
        self._session.send_request(_hiding(headers), end_stream=True)
        head = self._session.data_to_send()
        return head if end_stream else head[:4] + _OPEN_ENDED[head[4]] + head[5:]

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
            self._finish(stream_id, stream)
        return frame_header(length, DATA, END_STREAM if end_stream else 0, stream_id)

    def send_trailers(self, stream_id: int, headers: Headers) -> bytes:
        block = b"".join(
            [_prefixed(size, 5, 0x20) for size in self._table_sizes]
            # Never indexed, so that the table stays what nghttp2 knows (RFC 7541, section 6.2.3).
            + [b"\x10" + _string(name) + _string(value) for name, value in headers]
        )
        self._table_sizes = ()
        self._finish(stream_id, self._streams[stream_id])
        parts = [block[start : start + MAX_FRAME_SIZE] for start in range(0, len(block), MAX_FRAME_SIZE)] or [b""]
        output = _frame(HEADERS, END_STREAM | (END_HEADERS if len(parts) == 1 else 0), stream_id, parts[0])
        for part in parts[1:]:
            output += _frame(CONTINUATION, END_HEADERS if part is parts[-1] else 0, stream_id, part)
        return output

    def _finish(self, stream_id: int, stream: _Stream) -> None:
        """The request is complete."""
        stream.sent_end = True
        if stream.received_end:
            del self._streams[stream_id]

    def send_reset(self, stream_id: int, error_code: int) -> None:
        self.forget(stream_id)
        self._out.append(_frame(RST_STREAM, 0, stream_id, _LONG.pack(error_code)))

    def forget(self, stream_id: int) -> None:
        del self._streams[stream_id]
        self._tell_end(stream_id)
        self._reset.add(stream_id)

    def send_ping(self, payload: bytes) -> None:
        self._out.append(_PING_HEADER + payload)

    def send_window_update(self, stream_id: int, increment: int) -> None:
        if stream_id:
            self._streams[stream_id].receive_window += increment
        else:
            self._receive_window += increment
        self._out.append(_frame(WINDOW_UPDATE, 0, stream_id, _LONG.pack(increment)))

    def send_goaway(self, error_code: int, debug_data: bytes) -> None:
        self._out.append(_frame(GOAWAY, 0, 0, _TWO_LONGS.pack(0, error_code) + debug_data))

    def send_window(self, stream_id: int) -> int:
        return self._streams[stream_id].send_window

    def connection_window(self) -> int:
        return self._send_window

    def room(self, stream_id: int) -> int:
        return min(self._streams[stream_id].send_window, self._send_window)

    def drain(self) -> bytes:
        if not self._out:
            return b""
        data = b"".join(self._out)
        self._out.clear()
        return data


def _frame(kind: int, flags: int, stream_id: int, body: bytes) -> bytes:
    return frame_header(len(body), kind, flags, stream_id) + body


def _hiding(headers: Headers) -> Headers:
    """Keep out of the table what could be guessed in there (RFC 7541, section 7.1.3).

    nghttp2 does so with `authorization` and short cookies of its own accord.
    """
    if _SECRET in map(_name_of, headers):
        return [ngh2.NeverIndexedHeader(*field) if field[0] == _SECRET else field for field in headers]
    return headers


def _declared_length(status: int, fields: Headers, bodiless: bool) -> int | None:
    """How long the body of a response must be, None if it may have any length (RFC 9113, section 8.1.1)."""
    if bodiless or status == _NOT_MODIFIED:
        return 0
    for name, value in fields:
        if name == b"content-length":
            # nghttp2 has seen that it is a number, and the only one.
            return int(value)
    return None


def _prefixed(value: int, bits: int, pattern: int) -> bytes:
    """An integer with a prefix of so many bits, after a bit pattern (RFC 7541, section 5.1)."""
    most = 2**bits - 1
    if value < most:
        return bytes([pattern | value])
    encoded = bytearray([pattern | most])
    value -= most
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _string(value: bytes) -> bytes:
    """A string literal (RFC 7541, section 5.2), not Huffman-coded."""
    return _prefixed(len(value), 7, 0) + value
