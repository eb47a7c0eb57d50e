"""The default codec, on python-hyper's h2: the one module that imports it.

h2 is a fine codec with some sharp edges for a client that outlives trouble. All are dulled here:

* Input is cut into frames before h2 sees it, one frame a call, so events that precede a bad frame are not lost, and a
  frame's length is checked before its body is buffered.
* Any received GOAWAY closes h2's state machine and drops its unsent bytes. The bytes are taken out before, and the
  state is put back after: streams that the peer promised to finish do finish.
* A frame that comes late, for a stream that we reset, is discarded here (its header block still passes through
  HPACK, its length is reported as credit); h2 would answer each with one more RST_STREAM.
* A malformed response ends its stream, not the connection (RFC 9113, section 8.1.1).
* h2 counts open streams by walking them on every request, and formats every received frame for a trace log that
  nobody reads, whole DATA payloads included. Neither happens here.

Some of this leans on attributes that h2 doesn't document: the version range in pyproject.toml is what the contract
tests in tests/protocol/test_h2_contract.py passed on.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NoReturn, cast

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import h2.stream
import hpack
import hyperframe.exceptions
from hyperframe import frame as frames

from h2keep.errors import RemoteProtocolError
from h2keep.protocol.engine import EngineHandler, ErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h2keep.protocol.events import Headers

__all__ = ["H2Engine"]

_HEADER = struct.Struct(">HBBBL")
_MAX_FRAME_SIZE = 16_384
_MAX_HEADER_BLOCK = 64 * 1024
_MAX_CONTINUATIONS = 64
# A larger table, though the peer may allow it, costs more in hpack's linear search than it saves in bytes.
_MAX_ENCODER_TABLE = 4_096
_GOAWAY_LENGTH = 17
_END_STREAM = 0x1
_ACK = 0x1
_END_HEADERS = 0x4
_PADDED = 0x8

_SENSITIVE_IF_SHORT = b"cookie"


def _silent(frame_type: type[frames.Frame]) -> type[frames.Frame]:
    """A frame class whose repr is cheap: h2 builds one for every frame that it receives."""
    return type(frame_type.__name__, (frame_type,), {"__repr__": object.__repr__})


_DATA = _silent(frames.DataFrame)
_HEADERS = _silent(frames.HeadersFrame)
_RST_STREAM = _silent(frames.RstStreamFrame)
_SETTINGS = _silent(frames.SettingsFrame)
_PING = _silent(frames.PingFrame)
_GOAWAY = _silent(frames.GoAwayFrame)
_WINDOW_UPDATE = _silent(frames.WindowUpdateFrame)
_PUSH_PROMISE = _silent(frames.PushPromiseFrame)
_CONTINUATION = _silent(frames.ContinuationFrame)
# PRIORITY, ALTSVC and extension frames ask nothing of a client and are skipped (RFC 9113, section 5.5).
_FRAME_TYPES = {
    cast("int", frame_type.type): frame_type
    for frame_type in (
        _DATA,
        _HEADERS,
        _RST_STREAM,
        _SETTINGS,
        _PING,
        _GOAWAY,
        _WINDOW_UPDATE,
        _PUSH_PROMISE,
        _CONTINUATION,
    )
}


class _OneFrame:
    """Stands in for h2's frame buffer: what is "received" is one frame, already parsed."""

    max_frame_size = 0
    _frame: frames.Frame | None = None

    def add_data(self, frame: frames.Frame) -> None:
        self._frame = frame

    def __iter__(self) -> Iterator[frames.Frame]:
        if self._frame is not None:
            frame, self._frame = self._frame, None
            yield frame


class _Decoder(hpack.Decoder):
    """Remembers whether the last block was understood: if so, what is wrong with it concerns its stream alone."""

    intact = True

    def decode(self, data: bytes, raw: bool = False) -> Any:
        self.intact = False
        fields = super().decode(data, raw)
        self.intact = True
        return fields


class _H2Connection(h2.connection.H2Connection):
    def _open_streams(self, remainder: int) -> int:
        # h2 asks in order to enforce MAX_CONCURRENT_STREAMS and to tidy up; both are done elsewhere, in O(1).
        return 0


class H2Engine:
    """An `Engine` on h2."""

    def __init__(self, handler: EngineHandler, *, initial_window: int, connection_window: int) -> None:
        self._handler = handler
        self._partial = b""
        self._block: frames.HeadersFrame | None = None
        self._block_parts: list[bytes] = []
        self._out = b""
        self.max_concurrent_streams: int | None = None
        self.max_frame_size = _MAX_FRAME_SIZE
        self._h2 = self._configured(initial_window)
        self._streams = self._h2.streams
        self._h2.initiate_connection()
        self.send_window_update(0, connection_window - 65_535)

    @staticmethod
    def _configured(initial_window: int) -> _H2Connection:
        connection = _H2Connection(
            h2.config.H2Configuration(
                client_side=True,
                header_encoding=None,
                # Checked once, in headers.py.
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        codes = h2.settings.SettingCodes
        connection.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                codes.ENABLE_PUSH: 0,
                codes.INITIAL_WINDOW_SIZE: initial_window,
                codes.MAX_HEADER_LIST_SIZE: _MAX_HEADER_BLOCK,
            },
        )
        decoder = _Decoder()
        decoder.max_header_list_size = _MAX_HEADER_BLOCK
        connection.decoder = decoder
        connection.incoming_buffer = cast("Any", _OneFrame())
        for silent in _FRAME_TYPES.values():
            connection._frame_dispatch_table[silent] = connection._frame_dispatch_table[  # noqa: SLF001
                cast("type[frames.Frame]", silent.__base__)
            ]
        return connection

    # Receiving

    def receive(self, data: bytes) -> None:
        if self._partial:
            data = self._partial + data
        start, end = 0, len(data)
        while end - start >= 9:
            high, low, kind, flags, stream_id = _HEADER.unpack_from(data, start)
            length = (high << 8) | low
            if length > _MAX_FRAME_SIZE:
                self._fail(6, f"a frame of {length} bytes, above the limit of {_MAX_FRAME_SIZE}")  # FRAME_SIZE_ERROR
            if end - start < 9 + length:
                break
            self._receive_frame(kind, flags, stream_id & 0x7FFF_FFFF, data[start + 9 : start + 9 + length])
            start += 9 + length
        self._partial = data[start:]

    def _receive_frame(self, kind: int, flags: int, stream_id: int, body: bytes) -> None:
        if self._block is not None and (kind != frames.ContinuationFrame.type or stream_id != self._block.stream_id):
            self._fail(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted by another frame")
        frame_type = _FRAME_TYPES.get(kind)
        if frame_type is None:
            return
        if stream_id and stream_id not in self._streams:
            self._receive_stray(frame_type, flags, stream_id, body)
            return
        frame = self._parse(frame_type, flags, stream_id, body)
        if frame_type is _DATA:
            self._receive_data(cast("frames.DataFrame", frame), flags)
        elif frame_type is _HEADERS or frame_type is _CONTINUATION:
            block = self._assemble(frame, flags)
            if block is not None:
                self._receive_headers(block)
        else:
            self._receive_control(frame, flags)

    def _parse(self, frame_type: type[frames.Frame], flags: int, stream_id: int, body: bytes) -> frames.Frame:
        try:
            frame = frame_type(stream_id)
            frame.parse_flags(flags)
            if frame_type is _DATA and not flags & _PADDED:
                frame = cast("frames.DataFrame", frame)
                frame.data = body
                frame.body_len = len(body)
            else:
                frame.parse_body(memoryview(body))
        except hyperframe.exceptions.HyperframeError as error:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a malformed frame: {error}", error)
        return frame

    def _feed(self, frame: frames.Frame) -> list[h2.events.Event]:
        try:
            return self._h2.receive_data(cast("Any", frame))
        except h2.exceptions.ProtocolError as error:
            # h2 has queued the GOAWAY.
            raise RemoteProtocolError(f"the server broke HTTP/2: {_reason(error)}") from error

    def _receive_data(self, frame: frames.DataFrame, flags: int) -> None:
        state = self._h2.state_machine.state
        try:
            self._h2.receive_data(cast("Any", frame))
        except (h2.exceptions.FlowControlError, h2.exceptions.StreamClosedError) as error:
            raise RemoteProtocolError(f"the server broke HTTP/2: {_reason(error)}") from error
        except h2.exceptions.ProtocolError as error:
            # A body before its head, or one that belies its Content-Length.
            self._handler.on_discarded(frame.flow_controlled_length)
            self._stream_error(frame.stream_id, state, error)
            return
        end_stream = bool(flags & _END_STREAM)
        if end_stream:
            self._tidy(frame.stream_id)
        self._handler.on_data(frame.stream_id, frame.data, frame.flow_controlled_length, end_stream)

    def _assemble(self, frame: frames.Frame, flags: int) -> frames.HeadersFrame | None:
        """The whole header block as one frame, None while CONTINUATIONs are due (bounds: K23)."""
        if self._block is None:
            if not isinstance(frame, frames.HeadersFrame):
                self._fail(ErrorCode.PROTOCOL_ERROR, "a CONTINUATION without a header block")
            if flags & _END_HEADERS:
                return frame
            self._block = frame
            self._block_parts = []
        data: bytes = cast("Any", frame).data
        self._block_parts.append(data)
        if len(self._block_parts) > _MAX_CONTINUATIONS or sum(map(len, self._block_parts)) > _MAX_HEADER_BLOCK:
            self._fail(
                ErrorCode.ENHANCE_YOUR_CALM,
                f"a header block above {_MAX_HEADER_BLOCK} bytes or {_MAX_CONTINUATIONS} CONTINUATIONs",
            )
        if not flags & _END_HEADERS:
            return None
        block, self._block = self._block, None
        block.data = b"".join(self._block_parts)
        block.flags.add("END_HEADERS")
        return block

    def _receive_headers(self, frame: frames.HeadersFrame) -> None:
        stream_id = frame.stream_id
        state = self._h2.state_machine.state
        try:
            event = self._h2.receive_data(cast("Any", frame))[0]
        except h2.exceptions.ProtocolError as error:
            if not cast("_Decoder", self._h2.decoder).intact or isinstance(error, h2.exceptions.StreamClosedError):
                raise RemoteProtocolError(f"the server broke HTTP/2: {_reason(error)}") from error
            self._stream_error(stream_id, state, error)
            return
        end_stream = "END_STREAM" in frame.flags
        if end_stream:
            self._tidy(stream_id)
        if isinstance(event, h2.events.ResponseReceived):
            status, fields = _split_status(event.headers)
            self._handler.on_response(stream_id, status, fields, end_stream)
        elif isinstance(event, h2.events.InformationalResponseReceived):
            status, fields = _split_status(event.headers)
            self._handler.on_informational(stream_id, status, fields)
        else:
            self._handler.on_trailers(stream_id, cast("h2.events.TrailersReceived", event).headers)

    def _receive_control(self, frame: frames.Frame, flags: int) -> None:
        stream_id = frame.stream_id
        if isinstance(frame, frames.WindowUpdateFrame):
            for event in self._feed(frame):
                if isinstance(event, h2.events.StreamReset):
                    self._tidy(stream_id)
                    error = RemoteProtocolError("the server overflowed the stream's flow-control window")
                    self._handler.on_stream_error(stream_id, ErrorCode.FLOW_CONTROL_ERROR, error)
                    return
            self._handler.on_window_opened(stream_id)
        elif isinstance(frame, frames.PingFrame):
            self._feed(frame)
            if flags & _ACK:
                self._handler.on_ping_acknowledged(frame.opaque_data)
            else:
                self._handler.on_reply_queued()
        elif isinstance(frame, frames.SettingsFrame):
            self._receive_settings(frame, flags)
        elif isinstance(frame, frames.GoAwayFrame):
            self._receive_goaway(frame)
        else:
            self._feed(frame)
            if isinstance(frame, frames.RstStreamFrame):
                self._tidy(stream_id)
                self._handler.on_reset(stream_id, frame.error_code)

    def _receive_settings(self, frame: frames.SettingsFrame, flags: int) -> None:
        self._feed(frame)
        if flags & _ACK:
            self._handler.on_settings_acknowledged()
            return
        connection = self._h2
        if connection.encoder.header_table_size > _MAX_ENCODER_TABLE:
            connection.encoder.header_table_size = _MAX_ENCODER_TABLE
        if h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS in frame.settings:
            self.max_concurrent_streams = frame.settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS]
        self.max_frame_size = min(connection.max_outbound_frame_size, _MAX_FRAME_SIZE)
        self._handler.on_reply_queued()
        self._handler.on_settings()

    def _receive_goaway(self, frame: frames.GoAwayFrame) -> None:
        self._out = self.drain()
        state = self._h2.state_machine.state
        self._feed(frame)
        self._h2.state_machine.state = state
        self._handler.on_goaway(frame.last_stream_id, frame.error_code, bytes(frame.additional_data))

    # Streams that are not open

    def _receive_stray(self, frame_type: type[frames.Frame], flags: int, stream_id: int, body: bytes) -> None:
        """A frame on a stream that is over, or never was."""
        if not stream_id & 1 or stream_id > self._h2.highest_outbound_stream_id:
            self._fail(ErrorCode.PROTOCOL_ERROR, f"a frame on stream {stream_id}, which was never opened")
        if frame_type is _RST_STREAM or frame_type is _WINDOW_UPDATE:
            # Sent before the peer knew that the stream is over (RFC 9113, section 5.1).
            return
        if not self._h2._stream_is_closed_by_reset(stream_id):  # noqa: SLF001
            self._fail(ErrorCode.STREAM_CLOSED, f"a frame on stream {stream_id} after its end")
        if frame_type is _DATA:
            # Padding included: the whole payload was charged to the connection's window.
            self._h2._inbound_flow_control_window_manager.window_consumed(len(body))  # noqa: SLF001
            self._handler.on_discarded(len(body))
            return
        block = self._assemble(self._parse(frame_type, flags, stream_id, body), flags)
        if block is not None:
            # Unread, but the peer's HPACK encoder has moved on, and our decoder must follow.
            try:
                self._h2.decoder.decode(block.data, raw=True)
            except hpack.HPACKError as error:
                self._fail(9, f"a header block that can't be decoded: {error}", error)  # COMPRESSION_ERROR

    def _tidy(self, stream_id: int) -> None:
        """Drop a stream that is closed in both directions, as h2 would when it next walks them all."""
        stream = self._streams.get(stream_id)
        if stream is not None and stream.closed:
            del self._streams[stream_id]
            self._h2._closed_streams[stream_id] = stream.closed_by  # noqa: SLF001

    def _stream_error(
        self, stream_id: int, state: h2.connection.ConnectionState, error: h2.exceptions.ProtocolError
    ) -> None:
        """Turn what h2 takes for the connection's end into the end of one stream."""
        self._h2.state_machine.state = state
        self._out = self.drain()[:-_GOAWAY_LENGTH]
        reason = RemoteProtocolError(f"the server sent a malformed response: {_reason(error)}")
        reason.__cause__ = error
        if self._streams[stream_id].closed:
            # h2 closed the stream without a word to the peer.
            reset = frames.RstStreamFrame(stream_id, error_code=ErrorCode.PROTOCOL_ERROR)
            self._out += reset.serialize()
            self.forget(stream_id)
        else:
            self.send_reset(stream_id, ErrorCode.PROTOCOL_ERROR)
        self._handler.on_stream_error(stream_id, ErrorCode.PROTOCOL_ERROR, reason)

    def _fail(self, error_code: int, reason: str, cause: Exception | None = None) -> NoReturn:
        self.send_goaway(error_code, b"")
        raise RemoteProtocolError(f"the server broke HTTP/2: {reason}") from cause

    # Sending

    def send_request(self, stream_id: int, headers: Headers, end_stream: bool) -> None:
        self._h2.send_headers(stream_id, _indexable(headers), end_stream)

    def send_data(self, stream_id: int, data: bytes | memoryview, end_stream: bool) -> None:
        self._h2.send_data(stream_id, data, end_stream)
        if end_stream:
            self._tidy(stream_id)

    def send_trailers(self, stream_id: int, headers: Headers) -> None:
        self._h2.send_headers(stream_id, _indexable(headers), end_stream=True)
        self._tidy(stream_id)

    def send_reset(self, stream_id: int, error_code: int) -> None:
        if stream_id in self._streams:
            self._h2.reset_stream(stream_id, error_code)
            self._tidy(stream_id)

    def forget(self, stream_id: int) -> None:
        machine = self._streams[stream_id].state_machine
        machine.state = h2.stream.StreamState.CLOSED
        machine.stream_closed_by = h2.stream.StreamClosedBy.SEND_RST_STREAM
        self._tidy(stream_id)

    def send_ping(self, payload: bytes) -> None:
        self._h2.ping(payload)

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

    def drain(self) -> bytes:
        data = self._h2.data_to_send()
        if self._out:
            data = self._out + data
            self._out = b""
        return data


def _split_status(headers: Any) -> tuple[int, Headers]:
    """The status and the other fields; h2 has checked that ``:status`` comes first and is the only one."""
    return int(headers[0][1]), headers[1:]


def _indexable(headers: Headers) -> Headers:
    """Keep short cookies out of HPACK's table, where their values could be guessed (RFC 7541, section 7.1.3)."""
    if any(name == _SENSITIVE_IF_SHORT for name, _ in headers):
        return [
            hpack.NeverIndexedHeaderTuple(name, value)
            if name == _SENSITIVE_IF_SHORT and len(value) < 20
            else (name, value)
            for name, value in headers
        ]
    return headers


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
