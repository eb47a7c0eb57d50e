"""The one bridge between httpx's world and ours: requests out, and responses in.

`Bridge` and `AsyncBridge` carry requests, for whoever says where these go and what their responses look like
(`_transport.py`, `_httpcore.py`); what they need of the library they have from `_library.py`.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

from h2keep import errors
from h2keep._fallback import Where
from h2keep.protocol.headers import CONNECTION_SPECIFIC, check_fields
from h2keep.runner.dial import Origin
from h2keep.runner.limits import Limits
from h2keep.runner.request import Head, Timeout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

    from h2keep._connections import Connections
    from h2keep._fallback import Body, Fallback
    from h2keep._library import AnyStream, BlockingTrace, Library, Trace
    from h2keep._recurring import Recurring

__all__ = [
    "AsyncBridge",
    "Bridge",
    "Forwarded",
    "Requests",
    "limits_of",
    "origin_of",
    "timeout_of",
]

_NOT_FORWARDED = CONNECTION_SPECIFIC | {b"host"}
_NO_TIMEOUT = Timeout(None, None, None, None)
#: As `_library` names the other phases that `trace` is told of.
_HEAD = "http2.receive_response_headers"
_LENGTH_NAMES = (b"Content-Length", b"content-length")


@dataclass(slots=True)
class _Known:
    """What is known of requests that say the same."""

    where: Where
    given: Forwarded
    #: Once one of them has been found to be in order.
    head: Head | None = None


class Requests(ABC):
    """Requests of one kind, and responses to match: httpx's own, or those of httpcore beneath it."""

    _library: Library
    _connections: Connections
    _fallback: Fallback

    #: What is known of a client's requests, by all that they say but for the length of their bodies.
    _known: Recurring[_Known]

    @abstractmethod
    def _address(self, request: Any) -> tuple[str, bytes, int | None, str | None]:
        """Where it goes, as in `Where`."""

    @abstractmethod
    def _target(self, request: Any) -> bytes:
        """Its path and query."""

    @abstractmethod
    def _fields(self, request: Any) -> list[tuple[bytes, bytes]]:
        """Its fields, as they are written in HTTP/1.1."""

    @abstractmethod
    def _head(self, request: Any, where: Where, given: Forwarded) -> Head:
        """What a request says that goes there, and has these fields."""

    @abstractmethod
    def _response(self, stream: AnyStream, body: Any) -> Any:
        """A response whose body is one of the library's response streams."""

    def _look_up(self, request: Any) -> tuple[_Known, bytes | None]:
        """What is known of such requests, and the length of this one's body if that is declared last, as httpx does."""
        fields = self._fields(request)
        length = None
        if fields and fields[-1][0] in _LENGTH_NAMES:
            *fields, (_, length) = fields
        address = self._address(request)
        target = self._target(request)
        key = request.method, target, *address, *fields
        known = self._known.get(key)
        if known is None:
            known = _Known(Where(*address), forwarded(fields))
            self._known.offer(key, known, len(target) + sum(map(len, itertools.chain.from_iterable(fields))))
        return known, length

    def _head_of(self, request: Any, known: _Known, length: bytes | None) -> Head:
        """As `_head`, for the many requests that are as others before."""
        head = known.head
        if head is None:
            head = known.head = self._head(request, known.where, known.given)
        origin, fields, declared = head
        if length is None:
            return Head(origin, fields.copy(), declared)
        field = b"content-length", length
        if declared is None:
            fields = fields.copy()
            return Head(origin, fields, check_fields([field], into=fields))
        # Two of them, which must say the same.
        return self._head(request, known.where, known.given._replace(fields=[*known.given.fields, field]))


class AsyncBridge(Requests):
    """Requests out and responses in, for whoever has connections; usable from several event loops."""

    @abstractmethod
    async def _leave(self, request: Any, where: Where) -> Any:
        """Have the library serve what HTTP/2 doesn't carry."""

    async def handle_async_request(self, request: Any) -> Any:
        """AsyncBaseTransport."""
        known, length = self._look_up(request)
        where = known.where
        if self._fallback.carries(where, upgrade=known.given.upgrade):
            body = self._library.body(request.stream)
            try:
                return await self._send(request, known, length, body)
            except errors.H2KeepError as error:
                if not self._fallback.takes_over(where, error, body):
                    raise
        return await self._leave(request, where)

    async def _send(self, request: Any, known: _Known, length: bytes | None, body: bytes | Body) -> Any:
        trace: Trace | None = request.extensions.get("trace")
        if trace is not None:
            await trace(f"{_HEAD}.started", {"request": request})
        try:
            head, timeout = self._head_of(request, known, length), timeout_of(request.extensions.get("timeout"))
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
        known, length = self._look_up(request)
        where = known.where
        if self._fallback.carries(where, upgrade=known.given.upgrade):
            body = self._library.body(request.stream)
            try:
                return self._send(request, known, length, body)
            except errors.H2KeepError as error:
                if not self._fallback.takes_over(where, error, body):
                    raise
        return self._leave(request, where)

    def _send(self, request: Any, known: _Known, length: bytes | None, body: bytes | Body) -> Any:
        trace: BlockingTrace | None = request.extensions.get("trace")
        if trace is not None:
            trace(f"{_HEAD}.started", {"request": request})
        try:
            head, timeout = self._head_of(request, known, length), timeout_of(request.extensions.get("timeout"))
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
