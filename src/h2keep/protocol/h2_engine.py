"""The default codec, on python-hyper's h2: the one module that imports it.

h2's state machines, its HPACK, its settings, its windows and its validation are in charge; what it receives is cut
into frames here and handed over one by one, and HEADERS and DATA take the shortest way in and out. That is how some
sharp edges, for a client that outlives trouble, are dulled:

* Events that precede a bad frame are not lost, and a frame's length is checked before its body is buffered.
* Any received GOAWAY closes h2's state machine and drops its unsent bytes. The bytes are taken out before, and the
  state is put back after: streams that the peer promised to finish do finish.
* A frame that comes late, for a stream that was reset, is discarded (its header block still passes through HPACK, its
  length is reported as credit); h2 would answer each with one more RST_STREAM.
* A malformed response ends its stream, not the connection (RFC 9113, section 8.1.1).
* h2 counts open streams by walking them on every request, formats every received frame for a trace log that nobody
  reads, validates equal headers again and again, and makes three objects a stream, which the garbage collector goes
  through while a request waits. None of it happens here.

Much of this leans on attributes that h2 doesn't document: the version range in pyproject.toml is what the contract
tests in tests/protocol/test_h2_contract.py passed on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import h2.stream
import h2.utilities
import h2.windows
import hpack
import hyperframe.exceptions
from hyperframe import frame as frames

from h2keep.errors import RemoteProtocolError
from h2keep.protocol.engine import EngineHandler, ErrorCode, ResetStreams, Violation
from h2keep.protocol.framing import (
    ACK,
    CONTINUATION,
    DATA,
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
    frame_header,
    header_frames,
    objection_to_greeting,
    parse_on,
    payload,
    unpack_header,
)
from h2keep.protocol.hpack_memory import DecodedBlock, Decoder, Encoder

if TYPE_CHECKING:
    from h2keep.protocol.events import Headers

__all__ = ["H2Engine"]


_KNOWN_SETTINGS = frozenset(h2.settings.SettingCodes)
_NOT_MODIFIED = 304
_HEAD = b"HEAD"

_Inputs = h2.stream.StreamInputs
_SEND_HEADERS, _SEND_DATA, _SEND_END = _Inputs.SEND_HEADERS, _Inputs.SEND_DATA, _Inputs.SEND_END_STREAM
_RECV_HEADERS, _RECV_END = _Inputs.RECV_HEADERS, _Inputs.RECV_END_STREAM
_OPEN, _CLOSED = h2.stream.StreamState.OPEN, h2.stream.StreamState.CLOSED
_BY_RESET = (h2.stream.StreamClosedBy.SEND_RST_STREAM, h2.stream.StreamClosedBy.RECV_RST_STREAM)
#: The states in which a response comes.
_RECEIVING = (_OPEN, h2.stream.StreamState.HALF_CLOSED_LOCAL)

_CONFIG = h2.config.H2Configuration(
    client_side=True,
    header_encoding=None,
    # What goes out is checked once, in headers.py; what comes in, by `_validate`.
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
    validate_inbound_headers=False,
    normalize_inbound_headers=False,
)


class _Stream(  # type: ignore[misc]
    h2.stream.H2Stream, h2.stream.H2StreamStateMachine, h2.windows.WindowManager
):
    """h2's stream, which is its own state machine and its own receive window, after a request's HEADERS."""

    def __init__(self, stream_id: int, method: bytes, receive_window: int, send_window: int) -> None:
        self.stream_id = stream_id
        self.request_method = method
        self.max_window_size = self.current_window_size = receive_window
        self.outbound_flow_control_window = send_window

    @property
    def state_machine(self) -> _Stream:  # type: ignore[override]
        return self

    @property
    def _inbound_window_manager(self) -> _Stream:  # type: ignore[override]
        return self


def _share_beginnings() -> None:
    """What h2 gives every stream at its beginning becomes the class's: an object holds only what differs from that."""
    stream = h2.stream.H2Stream(1, _CONFIG, 0, 0)
    stream.state_machine.process_input(_SEND_HEADERS)
    for part in (stream, stream.state_machine, stream._inbound_window_manager):  # noqa: SLF001
        for name, value in vars(part).items():
            if name not in vars(_Stream):
                setattr(_Stream, name, value)


_share_beginnings()


class H2Engine:
    """An `Engine` on h2."""

    def __init__(self, handler: EngineHandler, *, initial_window: int, connection_window: int) -> None:
        self._handler = handler
        self._partial = b""
        self._greeted = False
        self._out = b""
        # The header block that is being assembled: its stream, whether it ends it, and its parts.
        self._block = BlockAssembly()
        self._encoder = Encoder()
        self._decoder = Decoder(MAX_HEADER_BLOCK)
        self.max_concurrent_streams: int | None = None
        self.max_frame_size = MAX_FRAME_SIZE
        self._h2 = self._configured(initial_window)
        self._streams = cast("dict[int, _Stream]", self._h2.streams)
        self._receive_window = initial_window
        self._send_window = self._h2.remote_settings.initial_window_size
        self._reset = ResetStreams()
        self._h2.initiate_connection()
        self._h2.state_machine.state = h2.connection.ConnectionState.CLIENT_OPEN
        self.send_window_update(0, connection_window - 65_535)

    def _configured(self, initial_window: int) -> h2.connection.H2Connection:
        connection = h2.connection.H2Connection(_CONFIG)
        codes = h2.settings.SettingCodes
        connection.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                codes.ENABLE_PUSH: 0,
                codes.INITIAL_WINDOW_SIZE: initial_window,
                codes.MAX_HEADER_LIST_SIZE: MAX_HEADER_BLOCK,
            },
        )
        connection.encoder = self._encoder
        connection.decoder = self._decoder
        return connection

    # Receiving

    def receive(self, data: bytes) -> None:
        amid = self._partial or self._block.stream_id or not self._greeted
        if len(data) == 17 and data.startswith(PING_ACK) and not amid:
            self._handler.on_ping_acknowledged(data[9:])
            return
        try:
            self._partial = parse_on(self._parse_frames, self._partial, data)
        except Violation as error:
            self._fail(error.error_code, str(error), error.__cause__)

    def _parse_frames(self, data: bytes, start: int) -> bytes:
        """Act on the frames from `start` on; what is left over, as the rest of its frame hasn't come."""
        end = len(data)
        if not self._greeted and end >= 9:
            self._greet(data)
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
            if kind == DATA and not flags and stream_id in self._streams:
                body, stop = data_run(data, start, stop, self._room(stream_id))
            else:
                body = data[start + 9 : stop]
            self._receive_frame(kind, flags, stream_id, body)
            start = stop
        return data[start:]

    def _greet(self, data: bytes) -> None:
        objection = objection_to_greeting(data)
        if objection is not None:
            self._fail(ErrorCode.PROTOCOL_ERROR, objection)
        self._greeted = True

    def _receive_frame(self, kind: int, flags: int, stream_id: int, body: bytes) -> None:
        if self._block.stream_id:
            self._block.check(kind, stream_id)
        if kind not in UNDERSTOOD:
            return
        if stream_id and stream_id not in self._streams:
            self._receive_stray(kind, flags, stream_id, body)
        elif kind == DATA and stream_id:
            self._receive_data(flags, stream_id, body)
        elif kind in (HEADERS, CONTINUATION) and stream_id:
            block = self._block.add(kind, flags, stream_id, body)
            if block is not None:
                self._receive_headers(stream_id, block)
        elif kind == WINDOW_UPDATE:
            self._receive_window_update(flags, stream_id, body)
        elif kind == PING and flags & ACK and len(body) == 8 and not stream_id:
            self._handler.on_ping_acknowledged(body)
        else:
            self._receive_control(kind, flags, stream_id, body)

    def _receive_window_update(self, flags: int, stream_id: int, body: bytes) -> None:
        increment = int.from_bytes(body) & 0x7FFF_FFFF
        owner = self._streams[stream_id] if stream_id else self._h2
        if len(body) == 4 and 0 < increment <= LARGEST_WINDOW - owner.outbound_flow_control_window:
            owner.outbound_flow_control_window += increment
            self._handler.on_window_opened(stream_id)
            return
        if len(body) == 4:
            # Without the reserved bit, which hyperframe would count in.
            body = increment.to_bytes(4)
        # What is wrong with it is h2's to say. It comes back where that is one stream's affair, which it has reset.
        self._feed(self._parse(WINDOW_UPDATE, flags, stream_id, body))
        self._tidy(stream_id)
        error = RemoteProtocolError("the server overflowed the stream's flow-control window")
        self._handler.on_stream_error(stream_id, ErrorCode.FLOW_CONTROL_ERROR, error)

    def _receive_data(self, flags: int, stream_id: int, body: bytes) -> None:
        length = len(body)
        if flags & PADDED:
            body = payload(PADDED, body)
        end_stream = bool(flags & END_STREAM)
        self._charge(length)
        stream = self._streams[stream_id]
        try:
            if stream.headers_received and stream.state in _RECEIVING:
                # What h2 does then, but for the event, which nobody reads.
                stream.window_consumed(length)
                stream._track_content_length(len(body), end_stream)  # noqa: SLF001
                if end_stream:
                    stream.process_input(_RECV_END)
            else:
                stream.receive_data(body, end_stream, length)
        except (h2.exceptions.FlowControlError, h2.exceptions.StreamClosedError) as error:
            self._fail(int(error.error_code), _reason(error), error)
        except h2.exceptions.ProtocolError as error:
            # A body before its head, or one that belies its Content-Length.
            self._handler.on_discarded(length)
            self._stream_error(stream_id, error)
            return
        if end_stream:
            self._tidy(stream_id)
        self._handler.on_data(stream_id, body, length, end_stream)

    def _room(self, stream_id: int) -> int:
        """How much DATA on the stream breaks no rule."""
        stream = self._streams[stream_id]
        if not stream.headers_received:
            return 0
        room = min(
            stream.current_window_size,
            self._h2._inbound_flow_control_window_manager.current_window_size,  # noqa: SLF001
        )
        declared = stream._expected_content_length  # noqa: SLF001
        return room if declared is None else min(room, declared - stream._actual_content_length)  # noqa: SLF001

    def _charge(self, length: int) -> None:
        """DATA came, for whatever stream: the connection's window pays, padding included."""
        try:
            self._h2._inbound_flow_control_window_manager.window_consumed(length)  # noqa: SLF001
        except h2.exceptions.FlowControlError as error:
            self._fail(ErrorCode.FLOW_CONTROL_ERROR, _reason(error), error)

    def _decode(self, block: bytes) -> DecodedBlock:
        try:
            return self._decoder.fields(block)
        except hpack.OversizedHeaderListError as error:
            self._fail(ErrorCode.ENHANCE_YOUR_CALM, f"more header fields than allowed: {error}", error)
        except hpack.HPACKError as error:
            self._fail(ErrorCode.COMPRESSION_ERROR, f"a header block that can't be decoded: {error}", error)

    def _receive_headers(self, stream_id: int, block: bytes) -> None:
        decoded = self._decode(block)
        end_stream = self._block.ends
        stream = self._streams[stream_id]
        if decoded.response and not (end_stream or stream.headers_received) and stream.state in _RECEIVING:
            stream.process_input(_RECV_HEADERS)
            status, length = decoded.response
            stream._expected_content_length = 0 if stream.request_method == _HEAD else length  # noqa: SLF001
            self._handler.on_response(stream_id, status, decoded.fields[1:], False)
            return
        declared = stream._expected_content_length  # noqa: SLF001
        try:
            event = stream.receive_headers(decoded.fields, end_stream, None)[1][0]
            self._validate(decoded, event)
            if end_stream:
                self._check_length(stream, decoded, event, declared)
        except h2.exceptions.StreamClosedError as error:
            self._fail(int(error.error_code), _reason(error), error)
        except h2.exceptions.ProtocolError as error:
            self._stream_error(stream_id, error)
            return
        if end_stream:
            self._tidy(stream_id)
        if isinstance(event, h2.events.TrailersReceived):
            self._handler.on_trailers(stream_id, decoded.fields.copy())
            return
        # Validated: `:status` comes first and is the only pseudo-field.
        status, fields = int(decoded.fields[0][1]), decoded.fields[1:]
        if isinstance(event, h2.events.ResponseReceived):
            if status == _NOT_MODIFIED:
                # Its Content-Length is that of a body that doesn't come (RFC 9113, section 8.1.1).
                stream._expected_content_length = 0  # noqa: SLF001
            if stream.request_method != _HEAD:
                decoded.response = status, stream._expected_content_length  # noqa: SLF001
            self._handler.on_response(stream_id, status, fields, end_stream)
        else:
            self._handler.on_informational(stream_id, status, fields)

    def _validate(self, decoded: DecodedBlock, event: h2.events.Event) -> None:
        """h2's own validation of what came in, once for each list of fields and kind of block."""
        kind = type(event)
        if kind in decoded.valid_as:
            return
        trailers = kind is h2.events.TrailersReceived
        flags = h2.utilities.HeaderValidationFlags(
            is_client=True, is_trailer=trailers, is_response_header=not trailers, is_push_promise=False
        )
        for _ in h2.utilities.validate_headers(decoded.fields, flags):
            pass
        if not trailers and not _is_status(decoded.fields[0][1]):
            raise h2.exceptions.ProtocolError(f"Invalid :status {decoded.fields[0][1]!r}")
        decoded.valid_as.add(kind)

    def _check_length(
        self, stream: h2.stream.H2Stream, decoded: DecodedBlock, event: h2.events.Event, declared: int | None
    ) -> None:
        """A body that ends with header fields must have its declared length too; h2 looks at DATA frames alone."""
        if isinstance(event, h2.events.ResponseReceived):
            declared = stream._expected_content_length  # noqa: SLF001
            if int(decoded.fields[0][1]) == _NOT_MODIFIED:
                return
        length = stream._actual_content_length  # noqa: SLF001
        if declared is not None and declared != length:
            raise h2.exceptions.InvalidBodyLengthError(declared, length)

    def _parse(self, kind: int, flags: int, stream_id: int, body: bytes) -> frames.Frame:
        try:
            frame = frames.FRAMES[kind](stream_id)
            frame.parse_flags(flags)
            frame.parse_body(memoryview(body))
        except hyperframe.exceptions.HyperframeError as error:
            too_short = isinstance(error, hyperframe.exceptions.InvalidFrameError)
            code = ErrorCode.FRAME_SIZE_ERROR if too_short else ErrorCode.PROTOCOL_ERROR
            self._fail(code, f"a malformed frame: {_reason(error)}", error)
        return frame

    def _feed(self, frame: frames.Frame) -> None:
        """Have h2 act on a frame."""
        connection = self._h2
        try:
            replies, _ = connection._frame_dispatch_table[type(frame)](frame)  # noqa: SLF001
        except h2.exceptions.ProtocolError as error:
            self._fail(int(error.error_code), _reason(error), error)
        connection._prepare_for_sending(replies)  # noqa: SLF001

    def _receive_control(self, kind: int, flags: int, stream_id: int, body: bytes) -> None:
        frame: Any = self._parse(kind, flags, stream_id, body)
        if kind == GOAWAY:
            self._receive_goaway(frame)
            return
        if kind == SETTINGS:
            # h2 would keep each unknown one, and the peer has 65,536 of them.
            frame.settings = {code: value for code, value in frame.settings.items() if code in _KNOWN_SETTINGS}
        self._feed(frame)
        if kind == SETTINGS:
            self._receive_settings(frame, flags)
        elif kind == RST_STREAM:
            self._tidy(stream_id)
            self._handler.on_reset(stream_id, frame.error_code)
        else:
            # A PING, that is: h2 has refused PUSH_PROMISE.
            self._handler.on_reply_queued()

    def _receive_settings(self, frame: frames.SettingsFrame, flags: int) -> None:
        if flags & ACK:
            self._handler.on_settings_acknowledged()
            return
        code = h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS
        self.max_concurrent_streams = frame.settings.get(code, self.max_concurrent_streams)
        self.max_frame_size = self._h2.max_outbound_frame_size
        self._send_window = self._h2.remote_settings.initial_window_size
        self._handler.on_reply_queued()
        self._handler.on_settings()

    def _receive_goaway(self, frame: frames.GoAwayFrame) -> None:
        self._out = self.drain()
        state = self._h2.state_machine.state
        self._feed(frame)
        self._h2.state_machine.state = state
        self._handler.on_goaway(frame.last_stream_id & 0x7FFF_FFFF, frame.error_code, bytes(frame.additional_data))

    # Streams that are not open

    def _receive_stray(self, kind: int, flags: int, stream_id: int, body: bytes) -> None:
        """A frame on a stream that is over, or never was."""
        if not stream_id & 1 or stream_id > self._h2.highest_outbound_stream_id:
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
                # Nobody reads it, but the peer's HPACK encoder has moved on, and our decoder must follow.
                self._decode(block)
                self._handler.on_discarded(0)
        else:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a frame of type {kind} on stream {stream_id}")

    def _tidy(self, stream_id: int) -> None:
        """Drop a stream that is closed in both directions, as h2 would when it next walks them all."""
        stream = self._streams.get(stream_id)
        if stream is not None and stream.state is _CLOSED:
            del self._streams[stream_id]
            if stream.stream_closed_by in _BY_RESET:
                self._reset.add(stream_id)

    def _stream_error(self, stream_id: int, error: h2.exceptions.ProtocolError) -> None:
        """A malformed response: the end of one stream."""
        # h2 may have closed the stream already, but without a word to the peer.
        self._out = self.drain() + frames.RstStreamFrame(stream_id, error_code=ErrorCode.PROTOCOL_ERROR).serialize()
        self.forget(stream_id)
        reason = RemoteProtocolError(f"the server sent a malformed response: {_reason(error)}")
        reason.__cause__ = error
        self._handler.on_stream_error(stream_id, ErrorCode.PROTOCOL_ERROR, reason)

    def _fail(self, error_code: int, reason: str, cause: BaseException | None = None) -> NoReturn:
        self.send_goaway(error_code, b"")
        raise RemoteProtocolError(f"the server broke HTTP/2: {reason}") from cause

    # Sending

    def send_request(self, stream_id: int, headers: Headers, end_stream: bool) -> bytes:
        stream = _Stream(stream_id, headers[0][1], self._receive_window, self._send_window)
        self._streams[stream_id] = stream
        self._h2.highest_outbound_stream_id = stream_id
        if end_stream:
            stream.process_input(_SEND_END)
        return header_frames(stream_id, self._encoder.block(headers), end_stream)

    def send_trailers(self, stream_id: int, headers: Headers) -> bytes:
        stream = self._streams[stream_id]
        stream.process_input(_SEND_HEADERS)
        stream.process_input(_SEND_END)
        self._tidy(stream_id)
        return header_frames(stream_id, self._encoder.block(headers), end_stream=True)

    def send_data(self, stream_id: int, data: bytes | memoryview, end_stream: bool) -> bytes:
        stream = self._streams[stream_id]
        length = len(data)
        if stream.state is not _OPEN:
            stream.process_input(_SEND_DATA)
        stream.outbound_flow_control_window -= length
        self._h2.outbound_flow_control_window -= length
        if end_stream:
            stream.process_input(_SEND_END)
            self._tidy(stream_id)
        return frame_header(length, DATA, END_STREAM if end_stream else 0, stream_id)

    def send_reset(self, stream_id: int, error_code: int) -> None:
        self._h2.reset_stream(stream_id, error_code)
        self._tidy(stream_id)

    def forget(self, stream_id: int) -> None:
        stream = self._streams[stream_id]
        stream.state = _CLOSED
        stream.stream_closed_by = h2.stream.StreamClosedBy.SEND_RST_STREAM
        self._tidy(stream_id)

    def send_ping(self, payload: bytes) -> None:
        # Behind what h2 has queued: on a fresh connection that is the preface.
        self._out = self.drain() + frame_header(len(payload), PING, 0, 0) + payload

    def send_window_update(self, stream_id: int, increment: int) -> None:
        self._h2.increment_flow_control_window(increment, stream_id or None)

    def send_goaway(self, error_code: int, debug_data: bytes) -> None:
        state = self._h2.state_machine.state
        self._h2.close_connection(error_code, debug_data)
        self._h2.state_machine.state = state

    def send_window(self, stream_id: int) -> int:
        return self._streams[stream_id].outbound_flow_control_window

    def connection_window(self) -> int:
        return self._h2.outbound_flow_control_window

    def room(self, stream_id: int) -> int:
        return min(self._streams[stream_id].outbound_flow_control_window, self._h2.outbound_flow_control_window)

    def drain(self) -> bytes:
        data = self._h2.data_to_send()
        if self._out:
            data = self._out + data
            self._out = b""
        return data


def _is_status(value: bytes) -> bool:
    return len(value) == 3 and value.isdigit()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
