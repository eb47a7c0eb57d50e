"""The transports behind both adapters: the arguments of httpx's own, and connections that stay alive.

How requests cross over is `_bridge.py`'s affair; here is what they are made of, and what serves those that HTTP/2
doesn't carry.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from h2keep import errors
from h2keep._bridge import AsyncBridge, Bridge, Forwarded, Requests, limits_of, origin_of
from h2keep._connections import Connections
from h2keep._fallback import Fallback, OwnTransports, Where
from h2keep._library import extensions_of
from h2keep._recurring import Recurring
from h2keep.keepalive import Keepalive
from h2keep.runner.limits import Limits
from h2keep.runner.request import REPLAY_BUFFER

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable

    from h2keep._library import AnyStream
    from h2keep.runner.dial import SocketOption
    from h2keep.runner.request import Head
    from h2keep.runner.stats import EventHook

__all__ = ["AsyncTransport", "Transport"]


class _Transport(Requests):
    """A transport whose HTTP/2 connections stay alive.

    Takes the arguments of httpx's own, so that replacing the class name is the whole migration, and:

    * `keepalive`: when to send PINGs, and when to give a connection up (K1).
    * `engine`: the HTTP/2 codec: "h2", or "ngh2" (nghttp2), which takes less CPU and needs `h2keep[fast]`.
    * `replay_buffer`: how many bytes of a streamed body are kept until the response starts, so that a request which the
      server provably didn't process can be sent to another connection (K24).
    * `max_connection_age`: seconds after which a connection is replaced, in use or not; None for never (K22).
    * `event_hook`: called with `ConnectionStats` and an event whenever something happens to a connection (K20), in the
      context (contextvars) in which the transport was made.
    * `run_in_thread`, for asynchronous transports: connections live on a background thread's event loop, so that PINGs
      go on while the application blocks its own.

    `limits` that are given are obeyed, httpx's keepalive_expiry of 5 s included; without any, connections are kept for
    300 s. `http1=False` makes http:// URLs HTTP/2 with prior knowledge, and refuses TLS servers without h2. Else these
    servers, http:// URLs and requests with `Upgrade` are served by the library's own transport, made with the same
    arguments, which has no PINGs but TCP keepalive (K18); `http2=False` leaves everything to it. Without `proxy`, and
    unless `uds` is given, `trust_env` has the proxies of the environment used: the library's client reads these
    variables no more when it is given a transport. Responses that came by HTTP/2 are of a subclass of the library's
    `Response`, which differs in nothing but that it reads a body faster that has come already.
    """

    #: The library's class that this one stands for.
    _KIND: ClassVar[str]

    def __init__(
        self,
        verify: ssl.SSLContext | str | bool = True,
        cert: Any = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = True,
        limits: Any = None,
        proxy: Any = None,
        uds: str | None = None,
        local_address: str | None = None,
        retries: int = 0,
        socket_options: Iterable[SocketOption] | None = None,
        *,
        keepalive: Keepalive | None = None,
        engine: str = "h2",
        replay_buffer: int = REPLAY_BUFFER,
        max_connection_age: float | None = None,
        event_hook: EventHook | None = None,
        run_in_thread: bool = False,
    ) -> None:
        if not http1 and not http2:
            raise ValueError("http1, http2: with neither there is nothing left to speak")
        context = self._library.module.create_ssl_context(verify=verify, cert=cert, trust_env=trust_env)
        options: tuple[SocketOption, ...] = tuple(socket_options or ())
        proxy_for = self._library.proxy_for(proxy, trust_env=trust_env and uds is None)
        self._known = Recurring()
        self._connections = Connections(
            context,
            keepalive=keepalive,
            engine=engine,
            limits=_limits(limits, max_connection_age),
            http1=http1,
            uds=uds,
            local_address=local_address,
            socket_options=options,
            retries=retries,
            replay_buffer=replay_buffer,
            event_hook=event_hook,
            run_in_thread=run_in_thread,
            proxy_for=proxy_for,
        )
        self._fallback = Fallback(self._library.name, http1=http1, http2=http2, uds=uds, proxy_for=proxy_for)
        own: dict[str, Any] = {"verify": context, "trust_env": trust_env, "uds": uds, "local_address": local_address}
        own |= {"retries": retries, "socket_options": options, "http1": True, "http2": False}
        module = self._library.module
        self._own = OwnTransports(
            getattr(module, self._KIND),
            module.Proxy,
            own if limits is None else own | {"limits": limits},
            Keepalive() if keepalive is None else keepalive,
        )

    def _address(self, request: Any) -> tuple[str, bytes, int | None, str | None]:
        url = request.url
        return url.scheme, url.raw_host, url.port, request.extensions.get("sni_hostname")

    def _target(self, request: Any) -> bytes:
        given: bytes | None = request.extensions.get("target")
        target: bytes = request.url.raw_path if given is None else given
        return target

    def _fields(self, request: Any) -> list[tuple[bytes, bytes]]:
        fields: list[tuple[bytes, bytes]] = request.headers.raw
        return fields

    def _head(self, request: Any, where: Where, given: Forwarded) -> Head:
        method = request.method.encode("ascii", "replace")
        authority = given.host or request.url.netloc
        return self._connections.head(method, origin_of(*where), authority, self._target(request), given.fields)

    def _response(self, stream: AnyStream, body: Any) -> Any:
        return self._library.response(
            status_code=stream.status,
            headers=stream.headers,
            stream=body,
            extensions=extensions_of(stream),
        )


class AsyncTransport(_Transport, AsyncBridge):
    """`_Transport` as an `AsyncBaseTransport`; usable from several event loops, each with connections of its own."""

    _KIND = "AsyncHTTPTransport"

    async def _leave(self, request: Any, where: Where) -> Any:
        self._fallback.tell(where)
        try:
            return await self._own.aserve(request, where, self._fallback.proxy(where))
        except errors.H2KeepError as error:
            raise self._library.translate(error) from error.__cause__

    async def aclose(self) -> None:
        """AsyncBaseTransport. Idempotent."""
        try:
            await super().aclose()
        finally:
            await self._own.aclose()


class Transport(_Transport, Bridge):
    """`_Transport` as a `BaseTransport`, for any number of threads; the connections live on a background thread."""

    _KIND = "HTTPTransport"

    def _leave(self, request: Any, where: Where) -> Any:
        self._fallback.tell(where)
        try:
            return self._own.serve(request, where, self._fallback.proxy(where))
        except errors.H2KeepError as error:
            raise self._library.translate(error) from error.__cause__

    def close(self) -> None:
        """BaseTransport. Idempotent."""
        try:
            super().close()
        finally:
            self._own.close()


def _limits(given: Any, max_connection_age: float | None) -> Limits:
    return replace(Limits() if given is None else limits_of(given), max_connection_age=max_connection_age)
