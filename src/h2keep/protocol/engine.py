"""The boundary between the connection and an HTTP/2 codec.

An `Engine` knows frames, HPACK, stream states and both directions' flow-control windows; it knows neither time nor
policy. It calls an `EngineHandler` while it parses, in the order of the frames. Control frames gather in a buffer that
`drain` empties; requests and bodies are returned as they are framed, since their order is the caller's (K5).
Everything that is peculiar to one library stays behind this line.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from h2keep.errors import RemoteProtocolError
    from h2keep.protocol.events import Headers

__all__ = ["Engine", "EngineHandler", "ErrorCode", "ResetStreams", "Violation"]


class ResetStreams:
    """The last streams that were reset: late frames for these are no offence (RFC 9113, section 5.4.2)."""

    __slots__ = ("_ids",)

    #: Many more than can be reset within a round trip.
    _MOST = 4_096

    def __init__(self) -> None:
        self._ids: OrderedDict[int, None] = OrderedDict()

    def add(self, stream_id: int) -> None:
        """It was reset, by either side."""
        self._ids[stream_id] = None
        if len(self._ids) > self._MOST:
            self._ids.popitem(last=False)

    def __contains__(self, stream_id: int) -> bool:
        return stream_id in self._ids


class Violation(Exception):
    """The peer broke HTTP/2, which ends the connection. An engine's parts raise it, and the engine tells the peer."""

    def __init__(self, error_code: int, reason: str) -> None:
        super().__init__(reason)
        self.error_code = error_code


class ErrorCode:
    """The error codes of RFC 9113, section 7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class EngineHandler(Protocol):
    """What an engine reports while it parses, frame by frame.

    A `RemoteProtocolError` that one of these raises ends the connection: the engine stops there and passes it on. None
    calls back into `Engine.receive`. Streams are those that the engine was asked to open and that aren't over yet.
    """

    def on_informational(self, stream_id: int, status: int, headers: Headers) -> None:
        """An interim response came."""

    def on_response(self, stream_id: int, status: int, headers: Headers, end_stream: bool) -> None:
        """A final response head came."""

    def on_trailers(self, stream_id: int, headers: Headers) -> None:
        """Trailers came, and with them the stream's end."""

    def on_data(self, stream_id: int, data: bytes, flow_length: int, end_stream: bool) -> None:
        """DATA came on an open stream, after its head; `flow_length` counts padding too."""

    def on_discarded(self, flow_length: int) -> None:
        """DATA or (0) HEADERS came for a stream that is gone: only the connection's credit matters."""

    def on_reset(self, stream_id: int, error_code: int) -> None:
        """The peer reset an open stream."""

    def on_stream_error(self, stream_id: int, error_code: int, error: RemoteProtocolError) -> None:
        """The peer broke a rule that concerns one stream alone; the engine has let go of that stream."""

    def on_settings(self) -> None:
        """The peer's SETTINGS are in force (windows, frame size, concurrency)."""

    def on_settings_acknowledged(self) -> None:
        """The peer acknowledged our SETTINGS."""

    def on_ping_acknowledged(self, payload: bytes) -> None:
        """A PING ACK came, ours or not."""

    def on_window_opened(self, stream_id: int) -> None:
        """WINDOW_UPDATE: there is more room to send, on a stream or (0) on the connection."""

    def on_reply_queued(self) -> None:
        """The engine queued a reply of its own accord (the ACK of a PING or of SETTINGS; K23)."""

    def on_goaway(self, last_stream_id: int, error_code: int, debug_data: bytes) -> None:
        """GOAWAY came. The engine goes on serving streams up to `last_stream_id`."""


class Engine(Protocol):
    """A client-side HTTP/2 codec."""

    #: How many streams the peer allows at once, None before it said so.
    max_concurrent_streams: int | None
    #: The largest DATA payload that the peer accepts in one frame.
    max_frame_size: int

    def receive(self, data: bytes) -> None:
        """Parse bytes from the peer and report to the handler.

        Raises `RemoteProtocolError` at the first violation that ends the connection; everything before it has been
        reported, and the GOAWAY that answers it is queued.
        """

    def send_request(self, stream_id: int, headers: Headers, end_stream: bool) -> bytes:
        """Encode a request: the frames to send. Stream ids must rise."""

    def send_data(self, stream_id: int, data: bytes | memoryview, end_stream: bool) -> bytes:
        """Frame at most min(window, max_frame_size) bytes: what to send before `data` itself."""

    def send_trailers(self, stream_id: int, headers: Headers) -> bytes:
        """Encode a request's trailers, which end it: the frames to send."""

    def send_reset(self, stream_id: int, error_code: int) -> None:
        """Reset an open stream and let go of it; what still comes for it is discarded."""

    def forget(self, stream_id: int) -> None:
        """Let go of a stream without telling the peer, who has said that it won't be served."""

    def send_ping(self, payload: bytes) -> None:
        """Queue a PING."""

    def send_window_update(self, stream_id: int, increment: int) -> None:
        """Give the peer more credit, on a stream or (0) on the connection."""

    def send_goaway(self, error_code: int, debug_data: bytes) -> None:
        """Say goodbye. Streams in flight go on."""

    def send_window(self, stream_id: int) -> int:
        """How many bytes the stream's own window lets us send; may be negative (RFC 9113, section 6.9.2)."""

    def connection_window(self) -> int:
        """How many bytes the connection's window lets us send."""

    def room(self, stream_id: int) -> int:
        """How many bytes both windows let us send on the stream."""

    def drain(self) -> bytes:
        """Take the control frames that are queued for the peer."""
