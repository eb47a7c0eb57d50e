"""The one bridge between httpx's world and ours: requests in, responses and exceptions out.

`Library` holds what is taken from httpx or httpx2; `Bridge` and `AsyncBridge` carry requests, for whoever says where
these go and what their responses look like (`_transport.py`, `_httpcore.py`). What the bridge raises is an instance of
h2keep's exception and of its httpx counterpart.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self, TypeAlias, cast

from h2keep import errors
from h2keep._fallback import Body, Where
from h2keep._proxies import always, from_environment
from h2keep.protocol.headers import CONNECTION_SPECIFIC
from h2keep.runner.dial import Origin
from h2keep.runner.limits import Limits
from h2keep.runner.proxy import Proxy
from h2keep.runner.request import Timeout

if TYPE_CHECKING:
    from types import ModuleType, TracebackType

    from h2keep._connections import Connections
    from h2keep._fallback import Fallback
    from h2keep._proxies import ProxyFor
    from h2keep.runner.exchange import AwaitableExchange, BlockingExchange
    from h2keep.runner.request import Head
    from h2keep.runner.stream import Http2Stream

__all__ = [
    "AnyStream",
    "AsyncBridge",
    "Bridge",
    "Forwarded",
    "Library",
    "Requests",
    "extensions_of",
    "limits_of",
    "origin_of",
    "timeout_of",
]

_NOT_FORWARDED = CONNECTION_SPECIFIC | {b"host"}
_NO_TIMEOUT = Timeout(None, None, None, None)
#: The phases that `trace` is told of, by httpcore's names; each begins with `.started` and ends with another word.
_HEAD = "http2.receive_response_headers"
_BODY = "http2.receive_response_body"
_CLOSING = "http2.response_closed"
Trace: TypeAlias = Callable[[str, dict[str, Any]], Awaitable[None]]
BlockingTrace: TypeAlias = Callable[[str, dict[str, Any]], None]
AnyStream: TypeAlias = "Http2Stream | AwaitableExchange | BlockingExchange"


class Library:
    """httpx or httpx2, as far as the bridge needs it."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.name = module.__name__
        self.response_stream: type = type(
            "ResponseStream", (_ResponseStream, module.AsyncByteStream), {"library": self}
        )
        self.blocking_response_stream: type = type(
            "BlockingResponseStream", (_BlockingResponseStream, module.SyncByteStream), {"library": self}
        )
        self._classes: dict[type[errors.H2KeepError], type[errors.H2KeepError]] = {}

    def body(self, source: Any) -> bytes | Body:
        """A request's body: as bytes where it is known in full."""
        return b"".join(source) if isinstance(source, self.module.ByteStream) else Body(source)

    def proxy_for(self, proxy: Any, *, trust_env: bool) -> ProxyFor | None:
        """The proxy of each origin: the one given, as the library's transports take it, else the environment's."""
        make_context = functools.partial(self.module.create_ssl_context, trust_env=trust_env)
        if proxy is None:
            return from_environment(make_context, networks=self.name != "httpx") if trust_env else None
        if isinstance(proxy, (str, self.module.URL)):
            proxy = self.module.Proxy(proxy)
        if isinstance(proxy, self.module.Proxy):
            # Those for SOCKS proxies get nothing else there, either.
            used = {} if proxy.url.scheme.startswith("socks") else {"ssl_context": proxy.ssl_context}
            proxy = Proxy(str(proxy.url), auth=proxy.auth, headers=proxy.headers.raw if used else (), **used)
        return always(proxy, make_context)

    def translate(self, error: errors.H2KeepError) -> errors.H2KeepError:
        """The same error as an instance of both families, with its message, attributes, cause and context."""
        kind = type(error)
        both = self._classes.get(kind) or self._join(kind)
        own = both.__new__(both)
        own.args = error.args
        own.__dict__.update(error.__dict__, _request=None)
        own.__cause__ = error.__cause__
        return own.with_traceback(error.__traceback__)

    def _join(self, kind: type[errors.H2KeepError]) -> type[errors.H2KeepError]:
        """Make the class that belongs to both families."""

        def reduce(error: errors.H2KeepError) -> tuple[Any, ...]:
            # For pickle and copy: the class itself has no name that could be imported.
            return _restore, (self.name, kind, error.args), error.__dict__

        members = {"__module__": __name__, "__reduce__": reduce}
        both = self._classes[kind] = type(kind.__name__, (kind, self._counterpart(kind)), members)
        return both

    def _counterpart(self, kind: type[errors.H2KeepError]) -> type[Exception]:
        """httpx's class of the same name; where httpx has none, that of the nearest base."""
        for base in kind.__mro__:
            found = getattr(self.module, base.__name__, None)
            if found is not None and base is not Exception:
                counterpart: type[Exception] = found
                return counterpart
        transport_error: type[Exception] = self.module.TransportError
        return transport_error

    async def refuse(self, error: errors.H2KeepError, trace: Trace | None, phase: str) -> NoReturn:
        """Raise the error's translation, with the error's own cause and nothing of the bridge in between."""
        translated = self.translate(error)
        if trace is not None:
            await trace(f"{phase}.failed", {"exception": translated})
        raise translated from error.__cause__

    def told(self, error: errors.H2KeepError, trace: BlockingTrace | None, phase: str) -> errors.H2KeepError:
        """The error's translation, which the trace is told of."""
        translated = self.translate(error)
        if trace is not None:
            trace(f"{phase}.failed", {"exception": translated})
        return translated


def _restore(library: str, kind: type[errors.H2KeepError], args: tuple[Any, ...]) -> errors.H2KeepError:
    front_door = importlib.import_module(f"h2keep.{library}")
    bare = kind.__new__(kind, *args)
    translated: errors.H2KeepError = front_door.library.translate(bare)
    return translated


class _ResponseStream:
    """The response's body, as httpx pulls it."""

    library: Library

    def __init__(self, stream: Http2Stream | AwaitableExchange, request: Any, trace: Trace | None) -> None:
        self._stream = stream
        self._request = request
        self._trace = trace
        self._started = False
        self._ended = False

    def __del__(self, is_finalizing: Any = sys.is_finalizing) -> None:
        # Forgotten before its end: its stream would stay open for ever.
        if not is_finalizing():
            self._stream.give_up()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        trace = self._trace
        if not self._started:
            self._started = True
            if trace is not None:
                await trace(f"{_BODY}.started", {"request": self._request})
            chunk = self._stream.take_whole()
            self._ended = chunk is not None
        else:
            chunk = b"" if self._ended else None
        if chunk is None:
            try:
                chunk = await self._stream.receive()
            except errors.H2KeepError as error:
                await self.library.refuse(error, trace, _BODY)
        if not chunk:
            if trace is not None:
                await trace(f"{_BODY}.complete", {"return_value": None})
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """AsyncByteStream."""
        self._stream.close()
        if self._trace is not None:
            await self._trace(f"{_CLOSING}.started", {"request": self._request})
            await self._trace(f"{_CLOSING}.complete", {"return_value": None})


class _BlockingResponseStream:
    """The response's body, as httpx pulls it in a thread."""

    library: Library

    def __init__(self, stream: BlockingExchange, request: Any, trace: BlockingTrace | None) -> None:
        self._stream = stream
        self._request = request
        self._trace = trace

    def __del__(self, is_finalizing: Any = sys.is_finalizing) -> None:
        # As above.
        if not is_finalizing():
            self._stream.give_up()

    def __iter__(self) -> Iterator[bytes]:
        trace = self._trace
        if trace is not None:
            trace(f"{_BODY}.started", {"request": self._request})
        try:
            whole = self._stream.take_whole()
            if whole:
                yield whole
            elif whole is None:
                while chunk := self._stream.receive():
                    yield chunk
        except errors.H2KeepError as error:
            raise self.library.told(error, trace, _BODY) from error.__cause__
        if trace is not None:
            trace(f"{_BODY}.complete", {"return_value": None})

    def close(self) -> None:
        """SyncByteStream."""
        if self._trace is not None:
            self._trace(f"{_CLOSING}.started", {"request": self._request})
        self._stream.close()
        if self._trace is not None:
            self._trace(f"{_CLOSING}.complete", {"return_value": None})


class NetworkStream:
    """The `network_stream` extension: the connection's facts. Reading and writing are the connection's own affair."""

    def __init__(self, stream: AnyStream) -> None:
        self._transport = stream.connection.transport

    def get_extra_info(self, info: str) -> Any:
        """ "ssl_object", "socket", "client_addr" or "server_addr"; None for anything else."""
        sock = self._transport.socket
        match info:
            case "ssl_object":
                return self._transport.security.ssl_object
            case "socket":
                return sock
        # OSError: the connection has ended since.
        with contextlib.suppress(OSError):
            match info:
                case "client_addr":
                    return sock.getsockname()
                case "server_addr":
                    return sock.getpeername()
        return None


class Requests(ABC):
    """Requests of one kind, and responses to match: httpx's own, or those of httpcore beneath it."""

    _library: Library
    _connections: Connections
    _fallback: Fallback

    @abstractmethod
    def _where(self, request: Any) -> Where:
        """Where it goes."""

    @abstractmethod
    def _fields(self, request: Any) -> list[tuple[bytes, bytes]]:
        """Its fields, as they are written in HTTP/1.1."""

    @abstractmethod
    def _head(self, request: Any, where: Where, given: Forwarded) -> Head:
        """What a request says that goes there, and has these fields."""

    @abstractmethod
    def _response(self, stream: AnyStream, body: Any) -> Any:
        """A response whose body is one of the library's response streams."""


class AsyncBridge(Requests):
    """Requests out and responses in, for whoever has connections; usable from several event loops."""

    @abstractmethod
    async def _leave(self, request: Any, where: Where) -> Any:
        """Have the library serve what HTTP/2 doesn't carry."""

    async def handle_async_request(self, request: Any) -> Any:
        """AsyncBaseTransport."""
        where, given = self._where(request), forwarded(self._fields(request))
        if self._fallback.carries(where, upgrade=given.upgrade):
            body = self._library.body(request.stream)
            try:
                return await self._send(request, where, given, body)
            except errors.H2KeepError as error:
                if not self._fallback.takes_over(where, error, body):
                    raise
        return await self._leave(request, where)

    async def _send(self, request: Any, where: Where, given: Forwarded, body: bytes | Body) -> Any:
        trace: Trace | None = request.extensions.get("trace")
        if trace is not None:
            await trace(f"{_HEAD}.started", {"request": request})
        try:
            head, timeout = self._head(request, where, given), timeout_of(request.extensions.get("timeout"))
            stream = await self._connections.send(head, cast("Any", body), timeout)
        except errors.H2KeepError as error:
            await self._library.refuse(error, trace, _HEAD)
        if trace is not None:
            try:
                await trace(f"{_HEAD}.complete", {"return_value": (stream.status, stream.headers)})
            except BaseException:
                stream.close()
                raise
        return self._response(stream, self._library.response_stream(stream, request, trace))

    async def aclose(self) -> None:
        """AsyncBaseTransport. Idempotent."""
        await self._connections.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.aclose()


class Bridge(Requests):
    """The same for any number of threads; the connections live on a background thread."""

    @abstractmethod
    def _leave(self, request: Any, where: Where) -> Any:
        """Have the library serve what HTTP/2 doesn't carry."""

    def handle_request(self, request: Any) -> Any:
        """BaseTransport."""
        where, given = self._where(request), forwarded(self._fields(request))
        if self._fallback.carries(where, upgrade=given.upgrade):
            body = self._library.body(request.stream)
            try:
                return self._send(request, where, given, body)
            except errors.H2KeepError as error:
                if not self._fallback.takes_over(where, error, body):
                    raise
        return self._leave(request, where)

    def _send(self, request: Any, where: Where, given: Forwarded, body: bytes | Body) -> Any:
        trace: BlockingTrace | None = request.extensions.get("trace")
        if trace is not None:
            trace(f"{_HEAD}.started", {"request": request})
        try:
            head, timeout = self._head(request, where, given), timeout_of(request.extensions.get("timeout"))
            stream = self._connections.send_blocking(head, body, timeout)
        except errors.H2KeepError as error:
            raise self._library.told(error, trace, _HEAD) from error.__cause__
        if trace is not None:
            try:
                trace(f"{_HEAD}.complete", {"return_value": (stream.status, stream.headers)})
            except BaseException:
                stream.close()
                raise
        return self._response(stream, self._library.blocking_response_stream(stream, request, trace))

    def close(self) -> None:
        """BaseTransport. Idempotent."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self.close()


def extensions_of(stream: AnyStream) -> dict[str, Any]:
    """The response's extensions."""
    return {
        "http_version": b"HTTP/2",
        "stream_id": stream.id,
        "network_stream": NetworkStream(stream),
        "h2keep": stream.connection.stats,
    }


def limits_of(given: Any) -> Limits:
    """httpx's limits as ours. Raises `ValueError` for such as make no sense."""
    return Limits(given.max_connections, given.max_keepalive_connections, given.keepalive_expiry)


class Forwarded(NamedTuple):
    """What HTTP/2 carries of a request's fields, which httpx writes for HTTP/1.1."""

    fields: list[tuple[bytes, bytes]]
    #: The Host field's value, None if there is none.
    host: bytes | None
    #: Whether it wants another protocol, such as WebSocket.
    upgrade: bool


def forwarded(raw: Iterable[tuple[bytes, bytes]]) -> Forwarded:
    """See `Forwarded`."""
    host, upgrade = None, False
    fields = []
    for name, value in raw:
        name = name.lower()
        if name not in _NOT_FORWARDED:
            fields.append((name, value))
        elif name == b"host":
            host = value
        elif name == b"upgrade":
            upgrade = True
    return Forwarded(fields, host, upgrade)


def timeout_of(given: Mapping[str, float | None] | None) -> Timeout:
    """The `timeout` extension: what it doesn't name waits for ever, as in httpx."""
    if given is None:
        return _NO_TIMEOUT
    return _timeout(given.get("connect"), given.get("read"), given.get("write"), given.get("pool"))


#: Checked once: nearly all requests of a client have the same.
_timeout = functools.lru_cache(maxsize=64)(Timeout)


@functools.lru_cache(maxsize=256)
def origin_of(scheme: str, raw_host: bytes, port: int | None, server_hostname: str | None) -> Origin:
    """The origin. Raises `UnsupportedProtocol` for a URL that leads nowhere."""
    if not scheme:
        raise errors.UnsupportedProtocol("url: it must begin with 'https://' or 'http://', and name a host")
    if scheme not in ("http", "https"):
        raise errors.UnsupportedProtocol(f"url: the scheme {scheme!r} is not 'https' or 'http'")
    if not raw_host:
        raise errors.UnsupportedProtocol(f"url: there is no host after {scheme!r}")
    if port == 0:
        raise errors.UnsupportedProtocol("url: nothing can listen on port 0")
    if port is None:
        port = 443 if scheme == "https" else 80
    return Origin(scheme, raw_host.decode("ascii"), port, server_hostname)
