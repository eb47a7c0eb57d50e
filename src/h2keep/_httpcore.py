"""What stands in the place of httpcore's pools in the transports that are made while h2keep is installed.

The bridge of `_transport` one level lower: httpcore's requests in, httpcore's responses out, h2keep's exceptions, which
httpx passes on as they are. What can't be HTTP/2 goes to the pool that the transport would have had without us.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from h2keep._bridge import (
    AsyncBridge,
    Bridge,
    Requests,
    limits_of,
    origin_of,
)
from h2keep._connections import Connections
from h2keep._fallback import Fallback, Where, marked, tcp_keepalive
from h2keep._library import extensions_of
from h2keep._recurring import Recurring

if TYPE_CHECKING:
    from collections.abc import Mapping

    from h2keep._bridge import Forwarded
    from h2keep._library import AnyStream, Library
    from h2keep.keepalive import Keepalive
    from h2keep.runner.request import Head

__all__ = ["AsyncPool", "Pool", "pool_for"]

#: The module of httpcore that each library stands on.
_CORES = {"httpx": "httpcore", "httpx2": "httpcore2"}


def pool_for(
    name: str, stock: Any, keepalive: Keepalive, options: Mapping[str, Any], *, limited: bool
) -> AsyncPool | Pool:
    """What to put in the place of `stock`, the pool that the library `name` has made with the same `options`.

    `limited` tells whether the limits are the author's own; else connections are kept as long as h2keep keeps them.
    Raises `ValueError` or `TypeError` for options that httpx takes and h2keep doesn't, ImportError for SOCKS proxies
    without python-socks.
    """
    library = importlib.import_module(f"h2keep.{name}").library
    proxy = options["proxy"]
    # The environment's are the clients' own affair, who give them to transports as arguments.
    proxy_for = None if proxy is None else library.proxy_for(proxy, trust_env=options["trust_env"])
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
        retries=options["retries"],
        proxy_for=proxy_for,
    )
    fallback = Fallback(name, http1=not _only_http2(options), uds=options["uds"], proxy_for=proxy_for)
    # The transport has seen to it; httpcore gives the socket to a proxy no options.
    has_tcp_keepalive = options["uds"] is None and proxy_for is None and bool(tcp_keepalive(keepalive))
    kind = AsyncPool if hasattr(stock, "handle_async_request") else Pool
    return kind(library, stock, connections, fallback, has_tcp_keepalive=has_tcp_keepalive)


def _only_http2(options: Mapping[str, Any]) -> bool:
    # http2=False, their default, is not obeyed: nobody can tell it from no choice.
    return bool(options["http2"]) and not options["http1"]


class _StandIn(Requests):
    """What both pools have; and all that `stock` has besides, for programs that look into transports."""

    def __init__(
        self,
        library: Library,
        stock: Any,
        connections: Connections,
        fallback: Fallback,
        *,
        has_tcp_keepalive: bool,
    ) -> None:
        self._library = library
        self._stock = stock
        self._known = Recurring()
        self._connections = connections
        self._fallback = fallback
        self._tcp_keepalive = has_tcp_keepalive
        self._make_response = importlib.import_module(_CORES[library.name]).Response

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_stock" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._stock, name)

    def __repr__(self) -> str:
        return f"<h2keep in the place of {self._stock!r}>"

    def _address(self, request: Any) -> tuple[str, bytes, int | None, str | None]:
        url = request.url
        return url.scheme.decode("ascii"), url.host, url.port, request.extensions.get("sni_hostname")

    def _target(self, request: Any) -> bytes:
        target: bytes = request.url.target
        return target

    def _fields(self, request: Any) -> list[tuple[bytes, bytes]]:
        fields: list[tuple[bytes, bytes]] = request.headers
        return fields

    def _head(self, request: Any, where: Where, given: Forwarded) -> Head:
        authority = given.host or _authority(request.url)
        return self._connections.head(request.method, origin_of(*where), authority, request.url.target, given.fields)

    def _response(self, stream: AnyStream, body: Any) -> Any:
        extensions = extensions_of(stream)
        return self._make_response(stream.status, headers=stream.headers, content=body, extensions=extensions)


class Pool(_StandIn, Bridge):
    """In the place of httpcore's `ConnectionPool`."""

    def _leave(self, request: Any, where: Where) -> Any:
        self._fallback.tell(where)
        return marked(self._stock.handle_request(request), where, tcp_keepalive=self._tcp_keepalive)

    def close(self) -> None:
        """RequestInterface. Idempotent."""
        try:
            super().close()
        finally:
            self._stock.close()


class AsyncPool(_StandIn, AsyncBridge):
    """In the place of httpcore's `AsyncConnectionPool`."""

    async def _leave(self, request: Any, where: Where) -> Any:
        self._fallback.tell(where)
        return marked(await self._stock.handle_async_request(request), where, tcp_keepalive=self._tcp_keepalive)

    async def aclose(self) -> None:
        """AsyncRequestInterface. Idempotent."""
        try:
            await super().aclose()
        finally:
            await self._stock.aclose()


def _authority(url: Any) -> bytes:
    host: bytes = b"[%b]" % url.host if b":" in url.host else url.host
    return host if url.port is None else b"%b:%d" % (host, url.port)
