"""What a connection shows of itself: to event hooks, and to those who hold a response (K20)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from h2keep.errors import H2KeepError
    from h2keep.protocol.events import ConnectionEvent
    from h2keep.runner.connection import Http2Connection

__all__ = ["ConnectionStats", "EventHook"]


class ConnectionStats:
    """A connection's figures, always as they are now (K20). Times are seconds on its event loop's clock."""

    __slots__ = ("_connection",)

    http_version = "HTTP/2"
    #: Not so of what is in this place where there is no HTTP/2.
    pings_possible = True

    def __init__(self, connection: Http2Connection) -> None:
        self._connection = connection

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items())
        return f"ConnectionStats({figures})"

    def as_dict(self) -> dict[str, Any]:
        """All figures at this moment."""
        return {name: getattr(self, name) for name, kind in vars(type(self)).items() if isinstance(kind, property)}

    @property
    def origin(self) -> str:
        """As in "https://example.com:443"."""
        return str(self._connection.origin)

    @property
    def open_streams(self) -> int:
        """Streams that are open."""
        return self._connection.protocol.open_streams

    @property
    def requests(self) -> int:
        """Requests opened so far."""
        return self._connection.requests

    @property
    def pings_sent(self) -> int:
        """PINGs sent, for whatever reason."""
        return self._connection.protocol.keepalive.pings_sent

    @property
    def pings_acked(self) -> int:
        """PINGs whose ACK came."""
        return self._connection.protocol.keepalive.pings_acked

    @property
    def rtt_last(self) -> float | None:
        """The last round-trip time in seconds, None before the first sample."""
        return self._connection.protocol.keepalive.rtt_last

    @property
    def rtt_best(self) -> float | None:
        """The lowest round-trip time."""
        return self._connection.protocol.keepalive.rtt_best

    @property
    def rtt_smoothed(self) -> float | None:
        """The smoothed round-trip time (RFC 6298)."""
        return self._connection.protocol.keepalive.rtt_smoothed

    @property
    def ready_at(self) -> float:
        """When the transport was ready."""
        return self._connection.protocol.keepalive.ready_at

    @property
    def last_life(self) -> float:
        """When the last byte came from the peer."""
        return self._connection.protocol.keepalive.last_life

    @property
    def last_ping_at(self) -> float | None:
        """When the last PING was queued."""
        return self._connection.protocol.keepalive.last_ping_at

    @property
    def interval(self) -> float | None:
        """read_idle_timeout in force (K13 may have raised it), None if keepalive is off."""
        return self._connection.protocol.keepalive.interval

    @property
    def error(self) -> H2KeepError | None:
        """Why the connection is over, None while it isn't or if it ended in good order."""
        return self._connection.protocol.error


#: Is called with the connection's figures and what happened.
EventHook: TypeAlias = Callable[[ConnectionStats, "ConnectionEvent"], object]
