"""Ours or the library's own: which requests HTTP/2 carries, and what becomes of the others.

The transports of `_transport` and the pools of `_httpcore` ask here. An origin that was found to speak no HTTP/2 is
remembered for a while, by the whole process. What else the transports need is here too: the library's own transports,
made when they are needed, and TCP keepalive for them (K18).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from h2keep.errors import ConnectError, HTTP2NotSupported, UnsupportedProtocol
from h2keep.runner import eventloop
from h2keep.runner.dial import Origin, SocketOption

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

    from h2keep._proxies import ProxyFor
    from h2keep.errors import H2KeepError
    from h2keep.keepalive import Keepalive
    from h2keep.runner.proxy import Proxy

__all__ = ["Body", "Fallback", "Http1Origins", "OwnTransports", "Where", "WithoutPings", "marked", "tcp_keepalive"]

log = logging.getLogger("h2keep")

#: How long a server is believed to speak no HTTP/2, in seconds.
_MEMORY_SECONDS = 600.0
#: Origins remembered at most.
_MEMORY_SIZE = 1024
#: What Linux takes for TCP keepalive.
_MOST_SECONDS = 32_767
_MOST_PROBES = 127
#: RFC 9113, section 7.
_HTTP_1_1_REQUIRED = 0xD
#: With these HTTP/2 is not tried.
_HTTP1_SCHEMES = ("http", "ws", "wss")


class Where(NamedTuple):
    """Where a request goes, as its URL and its extensions have it."""

    scheme: str
    host: bytes
    port: int | None
    server_hostname: str | None

    def __str__(self) -> str:
        host = b"[%b]" % self.host if b":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{host.decode('ascii', 'replace')}{port}"


class Http1Origins:
    """The origins that were found to speak no HTTP/2, for a while each; shared by all pools of the process."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._until: dict[object, float] = {}

    def __bool__(self) -> bool:
        return bool(self._until)

    def __contains__(self, origin: object) -> bool:
        until = self._until.get(origin)
        return until is not None and self._now() < until

    def add(self, origin: object) -> bool:
        """Remember an origin; whether it is a new one. Those that have been forgotten since are none."""
        is_new = self._until.pop(origin, None) is None
        self._until[origin] = self._now() + _MEMORY_SECONDS
        if len(self._until) > _MEMORY_SIZE:
            # A copy: other threads may add to it meanwhile.
            self._until.pop(next(iter(list(self._until))), None)
        return is_new


http1_origins = Http1Origins()
#: Of these the log has told.
_told = Http1Origins()


class Body:
    """A request's body that can be had but once, and whether anybody has begun with it."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.begun = False

    def __iter__(self) -> Iterator[bytes]:
        self.begun = True
        return iter(self._source)

    def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun = True
        return aiter(self._source)


class Fallback:
    """What one transport leaves to the library's own. Decides for each request, without I/O."""

    def __init__(
        self,
        library: str,
        *,
        http1: bool,
        http2: bool = True,
        uds: str | None = None,
        proxy_for: ProxyFor | None = None,
    ) -> None:
        self._library = library
        self._http1 = http1
        self._http2 = http2
        self._uds = uds
        self._proxy_for = proxy_for

    def carries(self, where: Where, *, upgrade: bool) -> bool:
        """Whether HTTP/2 is to be tried. So it is for what nobody can carry: we are the ones to say so.

        `upgrade`: the request has such a field, which is HTTP/1.1's (RFC 9113, section 8.6): it wants a WebSocket.
        """
        if not self._http1:
            return True
        if not self._http2 or where.scheme in _HTTP1_SCHEMES or (http1_origins and self._key(where) in http1_origins):
            return False
        return not upgrade

    def takes_over(self, where: Where, error: H2KeepError, body: bytes | Body) -> bool:
        """Whether a request that met this error is to go the library's way; those after it will in any case."""
        required = getattr(error, "error_code", None) == _HTTP_1_1_REQUIRED
        if not self._http1 or not (required or isinstance(error, HTTP2NotSupported)):
            return False
        if http1_origins.add(self._key(where)):
            log.warning(
                "%s. Until then %s's own transport serves it, without PINGs; TCP keepalive is weaker",
                error,
                self._library,
            )
        return isinstance(body, bytes) or not body.begun

    def proxy(self, where: Where) -> Proxy | None:
        """The proxy on the way there."""
        return None if self._proxy_for is None else self._proxy_for(_origin(where))

    def tell(self, where: Where) -> None:
        """Have the log tell once of an origin that gets no PINGs because of how the program has asked."""
        reason = "http:// is HTTP/1.1 here" if self._http2 else "http2=False"
        if (where.scheme == "http" or not self._http2) and _told.add(self._key(where)):
            log.info(
                "%s: %s: %s's own transport serves it, without PINGs; TCP keepalive is weaker",
                where,
                reason,
                self._library,
            )

    def _key(self, where: Where) -> object:
        # By another way, or under another name, it may be another server.
        proxy = self.proxy(where)
        return _origin(where), self._uds, None if proxy is None else str(proxy)


def _origin(where: Where) -> Origin:
    default = 443 if where.scheme in ("https", "wss") else 80
    port = default if where.port is None else where.port
    return Origin(where.scheme, where.host.decode("ascii", "replace"), port, where.server_hostname)


@dataclass(frozen=True, slots=True)
class WithoutPings:
    """The `h2keep` extension of a response that came without HTTP/2, in the place of `ConnectionStats`."""

    #: As in "http://localhost:8080".
    origin: str
    #: As in "HTTP/1.1".
    http_version: str
    #: TCP keepalive is set on the connection (K18).
    tcp_keepalive: bool
    pings_possible: ClassVar[bool] = False


def tcp_keepalive(keepalive: Keepalive) -> list[SocketOption]:
    """Socket options by which TCP asks the peer when a PING would have; none if keepalive is off (K18)."""
    if keepalive.read_idle_timeout is None:
        return []
    interval = _seconds(int(keepalive.ping_timeout / 3))
    settings = {
        # macOS has another name for it.
        "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE": _seconds(keepalive.read_idle_timeout),
        "TCP_KEEPINTVL": interval,
        "TCP_KEEPCNT": min(max(3, round(keepalive.ping_timeout / interval)), _MOST_PROBES),
    }
    known = [(getattr(socket, name), value) for name, value in settings.items() if hasattr(socket, name)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *((socket.IPPROTO_TCP, name, value) for name, value in known)]


def marked(response: Any, where: Where, *, tcp_keepalive: bool) -> Any:
    """The library's own response, with the extension that tells of it."""
    version = response.extensions.get("http_version", b"HTTP/1.1").decode("ascii", "replace")
    response.extensions["h2keep"] = WithoutPings(str(_origin(where)), version, tcp_keepalive)
    return response


def _seconds(value: float) -> int:
    return min(max(1, round(value)), _MOST_SECONDS)


class OwnTransports:
    """The library's own transports: one for each proxy, and for each event loop where these matter; any thread's.

    `kind` is their class, `make_proxy` the library's, and `options` what they are made with.
    """

    def __init__(self, kind: Any, make_proxy: Any, options: Mapping[str, Any], keepalive: Keepalive) -> None:
        self._kind = kind
        self._make_proxy = make_proxy
        # A unix socket knows nothing of TCP.
        self._tcp_keepalive = tcp_keepalive(keepalive) if options["uds"] is None else []
        # Those that the user gives come last, and so they hold.
        self._options = {**options, "socket_options": [*self._tcp_keepalive, *options["socket_options"]]}
        self._lock = threading.Lock()
        self._made: dict[tuple[object, Proxy | None], Any] = {}
        _all[id(self)] = self

    def serve(self, request: Any, where: Where, proxy: Proxy | None) -> Any:
        """A response, with an extension of ours. Raises `UnsupportedProtocol` if the library lacks what it needs."""
        watched = self._watched(request, proxy, _trace)
        response = self._get(proxy, None).handle_request(watched)
        return marked(response, where, tcp_keepalive=bool(self._tcp_keepalive))

    async def aserve(self, request: Any, where: Where, proxy: Proxy | None) -> Any:
        """As `serve`."""
        watched = self._watched(request, proxy, _atrace)
        own = self._get(proxy, eventloop.native_loop())
        return marked(await own.handle_async_request(watched), where, tcp_keepalive=bool(self._tcp_keepalive))

    def _get(self, proxy: Proxy | None, loop: object) -> Any:
        """The transport for this way, in this event loop (as its backend knows it)."""
        key = (loop, proxy)
        found = self._made.get(key)
        if found is None:
            with self._lock:
                for other in list(self._made):
                    # Nothing else tells us that a loop has ended, and it would be kept for ever.
                    if other[0] is not None and eventloop.wrap(other[0]).is_dead():
                        self._made.pop(other, None)
                found = self._made.get(key)
                if found is None:
                    found = self._made[key] = self._make(proxy)
        return found

    def _make(self, proxy: Proxy | None) -> Any:
        if proxy is None:
            return self._kind(**self._options)
        given = self._make_proxy(str(proxy), auth=proxy.auth, headers=proxy.headers, ssl_context=proxy.ssl_context)
        try:
            return self._kind(**self._options, proxy=given)
        except ImportError as error:
            raise UnsupportedProtocol(f"{proxy}: HTTP/1.1 through this proxy needs more: {error}") from error

    def _watched(self, request: Any, proxy: Proxy | None, make_trace: Any) -> Any:
        """The request, which sees to TCP keepalive itself where there is a proxy: its socket gets no options."""
        if proxy is None or not self._tcp_keepalive:
            return request
        trace = make_trace(self._tcp_keepalive, request.extensions.get("trace"))
        extensions = {**request.extensions, "trace": trace}
        kind = type(request)
        return kind(request.method, request.url, headers=request.headers, stream=request.stream, extensions=extensions)

    def close(self) -> None:
        """Close all of them. Who is used again afterwards starts anew."""
        made, self._made = self._made, {}
        with contextlib.ExitStack() as stack:
            for transport in made.values():
                stack.callback(transport.close)

    async def aclose(self) -> None:
        """The same; those of other event loops are told to, and not waited for."""
        made, self._made = self._made, {}
        here = eventloop.native_loop()
        async with contextlib.AsyncExitStack() as stack:
            for (loop, _), transport in made.items():
                if loop is here:
                    stack.push_async_callback(transport.aclose)
                else:
                    _close_elsewhere(loop, transport)

    def forget(self) -> object:
        """This is a child process, and what there is belongs to its parent; it must be kept for ever."""
        made, self._made = self._made, {}
        self._lock = threading.Lock()
        return made


def _close_elsewhere(native: object, transport: Any) -> None:
    loop = eventloop.wrap(native)

    async def close() -> None:
        # Nobody is there to be told.
        with contextlib.suppress(Exception):
            await transport.aclose()

    def start() -> None:
        with contextlib.suppress(ConnectError):
            loop.spawn(close)

    # RuntimeError: that loop has ended.
    with contextlib.suppress(RuntimeError):
        loop.call_from_thread(start)


def _trace(options: list[SocketOption], told: Callable[[str, Any], None] | None) -> Callable[[str, Any], None]:
    """A `trace` extension that sets socket options, and tells whom the user wants to be told."""

    def trace(event: str, info: Any) -> None:
        _set_on_connected(options, event, info)
        if told is not None:
            told(event, info)

    return trace


def _atrace(
    options: list[SocketOption], told: Callable[[str, Any], Awaitable[None]] | None
) -> Callable[[str, Any], Awaitable[None]]:
    async def trace(event: str, info: Any) -> None:
        _set_on_connected(options, event, info)
        if told is not None:
            await told(event, info)

    return trace


def _set_on_connected(options: list[SocketOption], event: str, info: Any) -> None:
    if event.endswith(".connect_tcp.complete"):
        connected = info["return_value"].get_extra_info("socket")
        for option in options:
            # It may have ended already; and this is no reason for a request to fail.
            with contextlib.suppress(OSError):
                connected.setsockopt(*option)


#: By id. A WeakSet can't be walked while other threads add to it.
_all: weakref.WeakValueDictionary[int, OwnTransports] = weakref.WeakValueDictionary()


def _after_fork_in_child() -> None:
    # As in `_connections`: what finalisers do would reach into what both processes share.
    made = [found.forget() for reference in _all.valuerefs() if (found := reference()) is not None]
    if any(made):
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
