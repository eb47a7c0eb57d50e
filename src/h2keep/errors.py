"""Every exception that h2keep raises.

One tree, rooted in `H2KeepError`. The names are those of httpx where httpx has one, so that an adapter maps
each class to exactly one counterpart. Every exception says through `unprocessed` whether a retry is safe.
Nothing here knows about sockets, frames or httpx; third-party exceptions appear only as `__cause__`.
"""

from __future__ import annotations

import copy
from typing import Any

__all__ = [
    "ConnectError",
    "ConnectTimeout",
    "ConnectionGoingAway",
    "ConnectionLost",
    "H2KeepError",
    "HTTP2NotSupported",
    "LocalProtocolError",
    "PingTimeout",
    "PoolTimeout",
    "ProtocolError",
    "ProxyError",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "StreamReset",
    "UnsupportedProtocol",
    "WriteError",
    "WriteTimeout",
]


class H2KeepError(Exception):
    """Base of all errors raised by h2keep."""

    #: True: the server provably did nothing with the request, so sending it again is safe.
    #: False: it may have been processed.
    unprocessed: bool

    def __init__(self, message: str, *, unprocessed: bool = False) -> None:
        super().__init__(message)
        self.unprocessed = unprocessed

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is otherwise rebuilt by calling its class with `args`, without what the class wants by name.
        return _rebuild, (type(self), self.args), self.__dict__

    def for_request(self, *, unprocessed: bool) -> H2KeepError:
        """A copy to raise in one of several requests that share this fate.

        Raising one instance in many tasks would pile their tracebacks onto each other, and whether a
        request was processed differs from one request to the next.
        """
        own = copy.copy(self)
        own.unprocessed = unprocessed
        own.__traceback__ = None
        own.__cause__ = self.__cause__
        return own


def _rebuild(kind: type[H2KeepError], args: tuple[Any, ...]) -> H2KeepError:
    """What pickle and copy make an error from; its attributes follow."""
    return kind.__new__(kind, *args)


class ConnectError(H2KeepError):
    """No connection could be made: name resolution, TCP, TLS, or ALPN without HTTP/2."""

    def __init__(self, message: str, *, unprocessed: bool = True) -> None:
        super().__init__(message, unprocessed=unprocessed)


class ConnectTimeout(ConnectError):
    """No connection was ready (TCP, TLS and the server's SETTINGS) within the connect timeout."""


class HTTP2NotSupported(ConnectError):
    """The server was reached, and does not speak HTTP/2. Nothing of the request was sent, nor was its body begun."""

    def __init__(self, message: str, *, alpn: str | None, unprocessed: bool = True) -> None:
        super().__init__(message, unprocessed=unprocessed)
        #: The protocol that the server chose in ALPN, None if none.
        self.alpn = alpn


class PoolTimeout(H2KeepError):
    """No connection had room for the request within the pool timeout."""

    def __init__(self, message: str, *, unprocessed: bool = True) -> None:
        super().__init__(message, unprocessed=unprocessed)


class ReadError(H2KeepError):
    """The connection failed while the response was outstanding."""


class ReadTimeout(H2KeepError):
    """The stream brought no response head or body bytes within the read timeout (K21)."""


class WriteError(H2KeepError):
    """The connection failed while the request was being written."""


class WriteTimeout(H2KeepError):
    """Body bytes were ready but could not be handed over within the write timeout (K21)."""


class ProtocolError(H2KeepError):
    """Somebody broke the rules of HTTP/2."""


class LocalProtocolError(ProtocolError):
    """The request itself is invalid: header fields, or a body that contradicts its Content-Length."""


class RemoteProtocolError(ProtocolError):
    """The server sent something that HTTP/2 forbids, or ended the stream or the connection."""


class ProxyError(H2KeepError):
    """The proxy refused the tunnel, or dropped it before anything came through it."""

    def __init__(self, message: str, *, status: int | None = None, unprocessed: bool = True) -> None:
        super().__init__(message, unprocessed=unprocessed)
        #: The status of the proxy's answer to CONNECT, None if there was none.
        self.status = status


class UnsupportedProtocol(H2KeepError):
    """The URL's scheme is missing or not one that h2keep speaks."""

    def __init__(self, message: str, *, unprocessed: bool = True) -> None:
        super().__init__(message, unprocessed=unprocessed)


class ConnectionLost(ReadError):
    """The connection ended (EOF, RST, TLS alert, silence) while the request was open.

    Times are seconds on the monotonic clock of the connection's event loop.
    """

    def __init__(
        self,
        message: str,
        *,
        unprocessed: bool = False,
        last_life: float | None = None,
        ping_sent_at: float | None = None,
        rtt: float | None = None,
    ) -> None:
        super().__init__(message, unprocessed=unprocessed)
        #: When the last byte came from the peer.
        self.last_life = last_life
        #: When the last PING was queued, None if none was.
        self.ping_sent_at = ping_sent_at
        #: The smoothed round-trip time seen before, in seconds, None if never measured.
        self.rtt = rtt


class PingTimeout(ConnectionLost):
    """Nothing at all came within ping_timeout after a PING: the connection is dead (K4, K8)."""


class StreamReset(RemoteProtocolError):
    """The server reset this stream; the connection lives on."""

    def __init__(self, message: str, *, error_code: int, unprocessed: bool = False) -> None:
        super().__init__(message, unprocessed=unprocessed)
        #: The RST_STREAM frame's error code (RFC 9113, section 7).
        self.error_code = error_code


class ConnectionGoingAway(RemoteProtocolError):
    """The server said GOAWAY and will not answer this request."""

    def __init__(
        self,
        message: str,
        *,
        last_stream_id: int,
        error_code: int,
        debug_data: bytes,
        unprocessed: bool = False,
    ) -> None:
        super().__init__(message, unprocessed=unprocessed)
        #: The highest stream that the server may have processed.
        self.last_stream_id = last_stream_id
        #: The GOAWAY frame's error code (RFC 9113, section 7).
        self.error_code = error_code
        #: The GOAWAY frame's opaque debug data, untouched.
        self.debug_data = debug_data
