"""What stands in the place of httpcore's pools in the transports that are made while h2keep is installed.

The bridge of `_transport` one level lower: httpcore's requests in, httpcore's responses out, h2keep's exceptions, which
httpx passes on as they are. What can't be HTTP/2 goes to the pool that the transport would have had without us.
"""

from __future__ import annotations

import importlib
import logging
import time
from typing import TYPE_CHECKING, Any

import anyio

from h2keep import errors
from h2keep._connections import Connections
from h2keep._transport import (
    AsyncBridge,
    Bridge,
    Library,
    Parts,
    Requests,
    extensions_of,
    limits_of,
    origin_of,
    split_host,
    timeout_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from h2keep._transport import AnyStream
    from h2keep.keepalive import Keepalive

__all__ = ["AsyncPool", "Http1Origins", "Pool", "http1_origins", "pool_for"]

log = logging.getLogger("h2keep")

#: How long a server is believed to speak no HTTP/2, in seconds.
_MEMORY_SECONDS = 600.0
#: Origins remembered at most.
_MEMORY_SIZE = 1024
#: The module of httpcore that each library stands on.
_CORES = {"httpx": "httpcore", "httpx2": "httpcore2"}
#: RFC 9113, section 7.
_HTTP_1_1_REQUIRED = 0xD


class Http1Origins:
    """The origins that were found to speak no HTTP/2, for a while each; shared by all pools of the process."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._until: dict[object, float] = {}

    def __contains__(self, origin: object) -> bool:
        until = self._until.get(origin)
        return until is not None and self._now() < until

    def add(self, origin: object) -> bool:
        """Remember an origin; whether it is a new one. Those that have been forgotten since are none."""
        is_new = self._until.pop(origin, None) is None
        self._until[origin] = self._now() + _MEMORY_SECONDS
        if len(self._until) > _MEMORY_SIZE:
            self._until.pop(next(iter(self._until)), None)
        return is_new


http1_origins = Http1Origins()


def pool_for(
    name: str, stock: Any, keepalive: Keepalive, options: Mapping[str, Any], *, limited: bool
) -> AsyncPool | Pool:
    """What to put in the place of `stock`, the pool that the library `name` has made with the same `options`.

    `limited` tells whether the limits are the author's own; else connections are kept as long as h2keep keeps them.
    Raises `ValueError` or `TypeError` for options that httpx takes and h2keep doesn't.
    """
    connections = Connections(
        options["verify"],
        keepalive=keepalive,
        engine="h2",
        limits=limits_of(options["limits"]) if limited else None,
        http1=not _only_http2(options),
        uds=options["uds"],
        local_address=options["local_address"],
        socket_options=options["socket_options"],
        event_hook=None,
    )
    library = importlib.import_module(f"h2keep.{name}").library
    kind = AsyncPool if hasattr(stock, "handle_async_request") else Pool
    return kind(library, stock, connections, options)


def _only_http2(options: Mapping[str, Any]) -> bool:
    return bool(options["http2"]) and not options["http1"]


class _StandIn(Requests):
    """What both pools have; and all that `stock` has besides, for programs that look into transports."""

    def __init__(self, library: Library, stock: Any, connections: Connections, options: Mapping[str, Any]) -> None:
        self._library = library
        self._stock = stock
        self._connections = connections
        self._only_http2 = _only_http2(options)
        self._retries: int = options["retries"]
        self._uds = options["uds"]
        self._make_response = importlib.import_module(_CORES[library.name]).Response

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_stock" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._stock, name)

    def __repr__(self) -> str:
        return f"<h2keep in the place of {self._stock!r}>"

    def _is_ours(self, request: Any) -> bool:
        """Whether the request is to be tried with HTTP/2."""
        if self._only_http2:
            return True
        url = request.url
        if url.scheme != b"https" or (url.host, url.port, self._uds) in http1_origins:
            return False
        # Upgrade is HTTP/1.1's (RFC 9113, section 8.6): who sends it wants a WebSocket.
        return not any(len(name) == 7 and name.lower() == b"upgrade" for name, _ in request.headers)

    def _parts(self, request: Any) -> Parts:
        url, extensions = request.url, request.extensions
        origin = origin_of(url.scheme.decode("ascii"), url.host, url.port, extensions.get("sni_hostname"))
        authority, fields = split_host(request.headers)
        return (
            request.method,
            origin,
            authority or _authority(url),
            url.target,
            fields,
            self._library.whole(request.stream),
            timeout_of(extensions.get("timeout")),
        )

    def _response(self, stream: AnyStream, body: Any) -> Any:
        extensions = extensions_of(stream)
        return self._make_response(stream.status, headers=stream.headers, content=body, extensions=extensions)

    def _watch_body(self, request: Any) -> None:
        """Only if connecting may have to be tried again."""
        if self._retries and not isinstance(request.stream, self._library.module.ByteStream):
            request.stream = _Untouched(request.stream)

    def _is_untouched(self, body: Any) -> bool:
        """Whether the request can be sent again."""
        return isinstance(body, self._library.module.ByteStream) or (isinstance(body, _Untouched) and not body.begun)

    def _next_try(self, request: Any, error: errors.H2KeepError, failures: int) -> float | None:
        """In how many seconds to look again where the request should go; None if the error is the last word."""
        if isinstance(error, errors.HTTP2NotSupported):
            return self._leave_to_stock(request, error)
        if getattr(error, "error_code", None) == _HTTP_1_1_REQUIRED:
            return self._leave_to_stock(request, error) if self._is_untouched(request.stream) else None
        if not isinstance(error, errors.ConnectError) or not error.unprocessed or failures > self._retries:
            return None
        # As in httpcore: 0, 0.5, 1, 2, 4 s ...
        return (0.5 * 2 ** (failures - 2) if failures > 1 else 0.0) if self._is_untouched(request.stream) else None

    def _leave_to_stock(self, request: Any, error: errors.H2KeepError) -> float | None:
        if self._only_http2:
            return None
        url = request.url
        if http1_origins.add((url.host, url.port, self._uds)):
            log.warning("%s. Until then %s's own transport serves it, without PINGs", error, self._library.name)
        return 0.0


class Pool(_StandIn, Bridge):
    """In the place of httpcore's `ConnectionPool`."""

    def handle_request(self, request: Any) -> Any:
        """RequestInterface."""
        self._watch_body(request)
        failures = 0
        while self._is_ours(request):
            try:
                return super().handle_request(request)
            except errors.H2KeepError as error:
                failures += 1
                delay = self._next_try(request, error, failures)
                if delay is None:
                    raise
            if delay:
                time.sleep(delay)
        return self._stock.handle_request(request)

    def close(self) -> None:
        """RequestInterface. Idempotent."""
        try:
            super().close()
        finally:
            self._stock.close()


class AsyncPool(_StandIn, AsyncBridge):
    """In the place of httpcore's `AsyncConnectionPool`."""

    async def handle_async_request(self, request: Any) -> Any:
        """AsyncRequestInterface."""
        self._watch_body(request)
        failures = 0
        while self._is_ours(request):
            try:
                return await super().handle_async_request(request)
            except errors.H2KeepError as error:
                failures += 1
                delay = self._next_try(request, error, failures)
                if delay is None:
                    raise
            if delay:
                await anyio.sleep(delay)
        return await self._stock.handle_async_request(request)

    async def aclose(self) -> None:
        """AsyncRequestInterface. Idempotent."""
        try:
            await super().aclose()
        finally:
            await self._stock.aclose()


def _authority(url: Any) -> bytes:
    host: bytes = b"[%b]" % url.host if b":" in url.host else url.host
    return host if url.port is None else b"%b:%d" % (host, url.port)


class _Untouched:
    """A request's body, and whether anybody has begun with it."""

    def __init__(self, body: Any) -> None:
        self._body = body
        self.begun = False

    def __iter__(self) -> Iterator[bytes]:
        self.begun = True
        return iter(self._body)

    def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun = True
        return aiter(self._body)
