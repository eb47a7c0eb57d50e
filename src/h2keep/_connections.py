"""What every front door has behind it: checked settings, and a pool for the event loop that asks.

The one way from a client or a transport to the runner.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from h2keep.errors import UnsupportedProtocol
from h2keep.keepalive import Keepalive
from h2keep.protocol.headers import request_fields
from h2keep.runner.dial import DialOptions, Origin, SocketOption
from h2keep.runner.eventloop import native_loop
from h2keep.runner.pool import Limits, Pool, PoolRequest, Timeout

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterable, Iterable

    from h2keep.runner.connection import EventHook
    from h2keep.runner.stream import Http2Stream

__all__ = ["Connections"]


class Connections:
    """Connections made in one way, for one event loop at a time."""

    def __init__(
        self,
        ssl_context: ssl.SSLContext,
        *,
        keepalive: Keepalive | None,
        engine: str,
        limits: Limits | None,
        http1: bool,
        uds: str | None,
        local_address: str | None,
        socket_options: Iterable[SocketOption] | None,
        event_hook: EventHook | None,
    ) -> None:
        if keepalive is not None and not isinstance(keepalive, Keepalive):
            raise TypeError(f"keepalive: {keepalive!r} is not a Keepalive")
        if limits is not None and not isinstance(limits, Limits):
            raise TypeError(f"limits: {limits!r} is not a Limits")
        if uds is not None and not isinstance(uds, str):
            raise TypeError(f"uds: {uds!r} is not a str")
        if local_address is not None:
            _check_address(local_address)
        if engine != "h2":
            raise ValueError(f"engine: {engine!r} is not one of: 'h2'")
        alpn = ("h2", "http/1.1") if http1 else ("h2",)
        ssl_context.set_alpn_protocols(list(alpn))
        self._options = DialOptions(ssl_context, alpn, uds, local_address, tuple(socket_options or ()))
        self._keepalive = Keepalive() if keepalive is None else keepalive
        self._limits = Limits() if limits is None else limits
        self._http1 = http1
        self._hook = event_hook
        self._loop: object = None
        self._pool: Pool | None = None

    async def send(
        self,
        method: bytes,
        origin: Origin,
        authority: bytes,
        target: bytes,
        fields: Iterable[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes] | None,
        timeout: Timeout,
    ) -> Http2Stream:
        """Send a request and wait for the head of its response."""
        if origin.scheme == "http" and self._http1:
            raise UnsupportedProtocol(
                f"{origin}: http:// is HTTP/1.1 here, which has no PINGs; with http1=False it is HTTP/2 with prior "
                "knowledge"
            )
        head, content_length = request_fields(method, origin.scheme.encode("ascii"), authority, target, fields)
        return await self._running_pool().request(PoolRequest(origin, head, content_length, body, timeout))

    async def aclose(self) -> None:
        """Close everything. Idempotent; a client that is used again afterwards starts anew."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.aclose()

    def _running_pool(self) -> Pool:
        loop = native_loop()
        if self._pool is None or self._loop is not loop:
            if self._pool is not None:
                raise RuntimeError("this client's connections belong to another event loop: use one client per loop")
            self._loop = loop
            self._pool = Pool(self._options, self._keepalive, self._limits, self._hook)
        return self._pool


def _check_address(local_address: str) -> None:
    """A name would have to be resolved, and binding to it would block the event loop meanwhile."""
    try:
        ipaddress.ip_address(local_address)
    except ValueError as error:
        raise ValueError(f"local_address: {local_address!r} is not an IP address") from error
