"""The fast codec: nghttp2 has header blocks (`ngh2_blocks.py`), all else of HTTP/2 is here.

Frames, windows, streams, bodies with their declared lengths, and what concerns the connection alone are simple, and
dealt with in fewer steps than it takes to tell nghttp2 of them.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NoReturn

from h2keep.errors import RemoteProtocolError
from h2keep.protocol.engine import EngineHandler, ErrorCode, ResetStreams, Violation
from h2keep.protocol.framing import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    LARGEST_WINDOW,
    MAX_FRAME_SIZE,
    MAX_HEADER_BLOCK,
    PADDED,
    PING,
    PING_ACK,
    RST_STREAM,
    SETTINGS,
    UNDERSTOOD,
    WINDOW_UPDATE,
    BlockAssembly,
    data_run,
    frame,
    frame_header,
    header_frames,
    objection_to_greeting,
    parse_on,
    payload,
    unpack_header,
)
from h2keep.protocol.ngh2_blocks import FINAL, HeaderBlocks, Message

if TYPE_CHECKING:
    from h2keep.protocol.events import Headers

__all__ = ["Ngh2Engine"]

_SETTING = struct.Struct(">HL")
_LONG = struct.Struct(">L")
_TWO_LONGS = struct.Struct(">LL")
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_PING_HEADER = frame_header(8, PING, 0, 0)

_DEFAULT_WINDOW = 65_535

# Settings (RFC 9113, section 6.5.2, and RFC 8441).
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE = 1, 2, 3, 4
_SETTING_MAX_FRAME_SIZE, _MAX_HEADER_LIST_SIZE, _ENABLE_CONNECT_PROTOCOL = 5, 6, 8

_HEAD = b"HEAD"


class _Stream:
    """An open stream: its windows, which of its ends have come or gone, and what `HeaderBlocks` knows of it."""

    __slots__ = (
        "answered",
        "body_left",
        "declared",
        "judged",
        "method",
        "number",
        "receive_window",
        "received_end",
        "send_window",
        "sent_end",
    )

    def __init__(self, send_window: int, receive_window: int, sent_end: bool, method: bytes) -> None:
        self.send_window = send_window
        self.receive_window = receive_window
        self.sent_end = sent_end
        self.received_end = False
        # An `Exchange`.
        self.method = method
        self.answered = False
        self.declared: int | None = None
        self.body_left: int | None = None
        self.number = 0
        self.judged = False


class Ngh2Engine:
    """An `Engine` on ngh2."""

    def __init__(self, handler: EngineHandler, *, initial_window: int, connection_window: int) -> None:
        self._handler = handler
        self._partial = b""
        self._greeted = False
        self._out: list[bytes] = []
        self._block = BlockAssembly()
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
        self._blocks = HeaderBlocks()
        settings = {
            _HEADER_TABLE_SIZE: 4_096,
            _ENABLE_PUSH: 0,
            _INITIAL_WINDOW_SIZE: initial_window,
            _SETTING_MAX_FRAME_SIZE: MAX_FRAME_SIZE,
            _ENABLE_CONNECT_PROTOCOL: 0,
            _MAX_HEADER_LIST_SIZE: MAX_HEADER_BLOCK,
        }
        self._out += [_PREFACE, frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*item) for item in settings.items()))]
        self.send_window_update(0, connection_window - _DEFAULT_WINDOW)

    # Receiving

    def receive(self, data: bytes) -> None:
        amid = self._partial or self._block.stream_id or not self._greeted
        if len(data) == 17 and data.startswith(PING_ACK) and not amid:
            self._handler.on_ping_acknowledged(data[9:])
            return
        try:
            self._partial = parse_on(self._parse, self._partial, data)
        except Violation as error:
            self._fail(error.error_code, str(error), error.__cause__)

    def _parse(self, data: bytes, start: int) -> bytes:
        """Act on the frames from `start` on; what is left over, as the rest of its frame hasn't come."""
        end = len(data)
        if not self._greeted and end >= 9:
            self._greet(data)
        streams, block = self._streams, self._block
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
            if stream is None or block.stream_id:
                self._receive_frame(kind, flags, stream_id, stream, data[start + 9 : stop])
            elif kind == DATA:
                if flags or not stream.answered:
                    body = data[start + 9 : stop]
                else:
                    body, stop = data_run(data, start, stop, self._room(stream))
                self._receive_data(flags, stream_id, stream, body)
            elif kind == HEADERS and flags == END_HEADERS:
                self._receive_headers(stream_id, stream, data[start + 9 : stop], False)
            else:
                self._receive_frame(kind, flags, stream_id, stream, data[start + 9 : stop])
            start = stop
        return data[start:]

    def _greet(self, data: bytes) -> None:
        objection = objection_to_greeting(data)
        if objection is not None:
            self._fail(ErrorCode.PROTOCOL_ERROR, objection)
        self._greeted = True

    def _receive_frame(self, kind: int, flags: int, stream_id: int, stream: _Stream | None, body: bytes) -> None:
        """Any frame but DATA on an open stream."""
        if self._block.stream_id:
            self._block.check(kind, stream_id)
        if kind not in UNDERSTOOD:
            return
        if not stream_id:
            self._receive_control(kind, flags, body)
        elif stream is None:
            self._receive_stray(kind, flags, stream_id, body)
        elif kind in (HEADERS, CONTINUATION):
            block = self._block.add(kind, flags, stream_id, body)
            if block is not None:
                self._receive_headers(stream_id, stream, block, self._block.ends)
        elif kind == RST_STREAM:
            self._receive_reset(stream_id, body)
        elif kind == WINDOW_UPDATE:
            self._receive_credit(stream_id, stream, body)
        else:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a malformed frame: type {kind} on stream {stream_id}")

    def _receive_data(self, flags: int, stream_id: int, stream: _Stream, body: bytes) -> None:
        length = len(body)
        if flags & PADDED:
            body = payload(PADDED, body)
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
            self._blocks.end(stream)
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

    def _receive_headers(self, stream_id: int, stream: _Stream, block: bytes, end_stream: bool) -> None:
        if stream.received_end:
            self._fail(ErrorCode.STREAM_CLOSED, f"HEADERS on stream {stream_id} after its end")
        known = self._blocks.responses.get(block)
        if known is not None and not (end_stream or stream.answered):
            self._receive_response(stream_id, stream, known)
            return
        message = self._blocks.judge(stream, block, end_stream)
        if message is None:
            self._stream_error(stream_id, "header fields that HTTP/2 doesn't allow")
            return
        if end_stream and stream.body_left:
            self._stream_error(stream_id, f"a body that is not as long as it said ({stream.declared} bytes)")
            return
        if end_stream:
            # nghttp2 has seen both ends.
            self._note_end(stream_id, stream)
        if not message.status:
            self._handler.on_trailers(stream_id, message.fields)
        elif message.status < FINAL:
            self._handler.on_informational(stream_id, message.status, message.fields)
        elif end_stream:
            self._handler.on_response(stream_id, message.status, message.fields, True)
        else:
            self._receive_response(stream_id, stream, message)

    def _receive_response(self, stream_id: int, stream: _Stream, message: Message) -> None:
        """A final response's head, after which more is to come."""
        status, fields, length = message
        stream.answered = True
        stream.declared = stream.body_left = 0 if stream.method == _HEAD else length
        self._handler.on_response(stream_id, status, fields.copy(), False)

    def _receive_reset(self, stream_id: int, body: bytes) -> None:
        if len(body) != 4:
            self._fail(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM of another length than 4 bytes")
        self.forget(stream_id)
        self._handler.on_reset(stream_id, _LONG.unpack(body)[0])

    def _receive_credit(self, stream_id: int, stream: _Stream | None, body: bytes) -> None:
        if len(body) != 4:
            self._fail(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE of another length than 4 bytes")
        increment = _LONG.unpack(body)[0] & 0x7FFF_FFFF
        if not increment:
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
                self._out.append(frame(PING, ACK, 0, body))
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
            self._blocks.resize(settings[_HEADER_TABLE_SIZE])
        self._out.append(frame(SETTINGS, ACK, 0, b""))
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

    def _receive_stray(self, kind: int, flags: int, stream_id: int, body: bytes) -> None:
        """A frame on a stream that is over, or never was."""
        if not stream_id & 1 or stream_id >= self._next_id:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a frame on stream {stream_id}, which was never opened")
        if kind in (RST_STREAM, WINDOW_UPDATE):
            # Sent before the peer knew that the stream is over (RFC 9113, section 5.1).
            return
        if stream_id not in self._reset:
            self._fail(ErrorCode.STREAM_CLOSED, f"a frame on stream {stream_id} after its end")
        if kind == DATA:
            self._charge(len(body))
            self._handler.on_discarded(len(body))
        elif kind in (HEADERS, CONTINUATION):
            block = self._block.add(kind, flags, stream_id, body)
            if block is not None:
                self._blocks.skim(block)
                self._handler.on_discarded(0)
        else:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a frame of type {kind} on stream {stream_id}")

    def _note_end(self, stream_id: int, stream: _Stream) -> None:
        stream.received_end = True
        if stream.sent_end:
            del self._streams[stream_id]

    def _stream_error(self, stream_id: int, reason: str) -> None:
        """A malformed response: the end of one stream."""
        self.send_reset(stream_id, ErrorCode.PROTOCOL_ERROR)
        error = RemoteProtocolError(f"the server sent a malformed response: {reason}")
        self._handler.on_stream_error(stream_id, ErrorCode.PROTOCOL_ERROR, error)

    def _fail(self, error_code: int, reason: str, cause: BaseException | None = None) -> NoReturn:
        self.send_goaway(error_code, b"")
        raise RemoteProtocolError(f"the server broke HTTP/2: {reason}") from cause

    # Sending

    def send_request(self, stream_id: int, headers: Headers, end_stream: bool) -> bytes:
        self._next_id = stream_id + 2
        stream = _Stream(self._initial_send_window, self._initial_receive_window, end_stream, headers[0][1])
        self._streams[stream_id] = stream
        return header_frames(stream_id, self._blocks.request(stream, headers), end_stream)

    def send_data(self, stream_id: int, data: bytes | memoryview, end_stream: bool) -> bytes:
        stream = self._streams[stream_id]
        length = len(data)
        stream.send_window -= length
        self._send_window -= length
        if end_stream:
            self._finish(stream_id, stream)
        return frame_header(length, DATA, END_STREAM if end_stream else 0, stream_id)

    def send_trailers(self, stream_id: int, headers: Headers) -> bytes:
        self._finish(stream_id, self._streams[stream_id])
        return header_frames(stream_id, self._blocks.trailers(headers), end_stream=True)

    def _finish(self, stream_id: int, stream: _Stream) -> None:
        """The request is complete."""
        stream.sent_end = True
        if stream.received_end:
            del self._streams[stream_id]

    def send_reset(self, stream_id: int, error_code: int) -> None:
        self.forget(stream_id)
        self._out.append(frame(RST_STREAM, 0, stream_id, _LONG.pack(error_code)))

    def forget(self, stream_id: int) -> None:
        self._blocks.end(self._streams.pop(stream_id))
        self._reset.add(stream_id)

    def send_ping(self, payload: bytes) -> None:
        self._out.append(_PING_HEADER + payload)

    def send_window_update(self, stream_id: int, increment: int) -> None:
        if stream_id:
            self._streams[stream_id].receive_window += increment
        else:
            self._receive_window += increment
        self._out.append(frame(WINDOW_UPDATE, 0, stream_id, _LONG.pack(increment)))

    def send_goaway(self, error_code: int, debug_data: bytes) -> None:
        self._out.append(frame(GOAWAY, 0, 0, _TWO_LONGS.pack(0, error_code) + debug_data))

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
