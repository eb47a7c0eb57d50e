"""The clients that are compared, each behind the same three calls.

The calls are as thin as they can be, so that what is measured is the client: `chunks` and `lines` hand out the client's
own iterators. Every candidate has a timeout of a minute, as real applications do, and otherwise its defaults.
"""

from __future__ import annotations

import ssl
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    import httpx2
    import pyreqwest.client
    import pyreqwest.response

    import h2keep

TIMEOUT = 60.0
HEADERS = {"content-type": "application/json"}


class Client(Protocol):
    """One client and its one connection."""

    async def post(self, path: str, body: bytes) -> bytes: ...

    def chunks(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...

    def lines(self, path: str, *, live: bool = False) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        """`live`: each is wanted as soon as it has come."""
        ...


@dataclass(frozen=True)
class Candidate:
    """How to make a client, and the event loops that it runs on."""

    open: Callable[[str, Path], AbstractAsyncContextManager[Client]]
    loops: frozenset[str] = frozenset({"asyncio", "uvloop", "trio"})


class HttpxLike:
    """A client of httpx or httpx2, whose names are the same, or h2keep's own, which took them over."""

    def __init__(self, client: Any, base: str) -> None:
        self._client = client
        self._base = base

    async def post(self, path: str, body: bytes) -> bytes:
        response = await self._client.post(self._base + path, content=body, headers=HEADERS)
        content: bytes = response.content
        return content

    @asynccontextmanager
    async def chunks(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._client.stream("GET", self._base + path) as response:
            yield response.aiter_bytes()

    @asynccontextmanager
    async def lines(self, path: str, *, live: bool = False) -> AsyncIterator[AsyncIterator[str]]:
        async with self._client.stream("GET", self._base + path) as response:
            yield response.aiter_lines()


class Pyreqwest:
    """pyreqwest's own client. It has no line iterator: `_split` is the shortest one that is right."""

    def __init__(self, client: pyreqwest.client.Client, base: str) -> None:
        self._client = client
        self._base = base

    async def post(self, path: str, body: bytes) -> bytes:
        response = await self._client.post(self._base + path).headers(HEADERS).body_bytes(body).build().send()
        return bytes(await response.bytes())

    @asynccontextmanager
    async def chunks(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._client.get(self._base + path).build_streamed() as response:
            yield self._chunks(response.body_reader)

    @asynccontextmanager
    async def lines(self, path: str, *, live: bool = False) -> AsyncIterator[AsyncIterator[str]]:
        # By default a body is held back until it is over or 64 KiB of it are there. Without that, its HTTP/2 takes a
        # flood of small frames for an attack and ends the connection: so each case is given the way that suits it.
        request = self._client.get(self._base + path)
        if live:
            request = request.streamed_read_buffer_limit(0)
        async with request.build_streamed() as response:
            yield self._split(response.body_reader)

    @staticmethod
    async def _chunks(reader: pyreqwest.response.ResponseBodyReader) -> AsyncIterator[bytes]:
        while (chunk := await reader.read_chunk()) is not None:
            yield bytes(chunk)

    @staticmethod
    async def _split(reader: pyreqwest.response.ResponseBodyReader) -> AsyncIterator[str]:
        rest = b""
        while (chunk := await reader.read_chunk()) is not None:
            *lines, rest = (rest + bytes(chunk)).split(b"\n")
            for line in lines:
                yield line.decode()
        if rest:
            yield rest.decode()


def trust(ca: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(ca))


def _pyreqwest_client(ca: Path) -> pyreqwest.client.Client:
    from pyreqwest.client import ClientBuilder

    builder = ClientBuilder().http2(True).add_root_certificate_pem(ca.read_bytes())
    return builder.timeout(timedelta(seconds=TIMEOUT)).build()


@asynccontextmanager
async def _h2keep(base: str, ca: Path) -> AsyncIterator[Client]:
    from h2keep import AsyncClient

    client: h2keep.AsyncClient
    async with AsyncClient(verify=trust(ca)) as client:
        yield HttpxLike(client, base)


@asynccontextmanager
async def _h2keep_httpx2(base: str, ca: Path) -> AsyncIterator[Client]:
    import httpx2

    from h2keep.httpx2 import AsyncKeepaliveTransport

    async with httpx2.AsyncClient(transport=AsyncKeepaliveTransport(verify=trust(ca)), timeout=TIMEOUT) as client:
        yield HttpxLike(client, base)


@asynccontextmanager
async def _h2keep_httpx(base: str, ca: Path) -> AsyncIterator[Client]:
    import httpx

    from h2keep.httpx import AsyncKeepaliveTransport

    async with httpx.AsyncClient(transport=AsyncKeepaliveTransport(verify=trust(ca)), timeout=TIMEOUT) as client:
        yield HttpxLike(client, base)


@asynccontextmanager
async def _httpx2(base: str, ca: Path) -> AsyncIterator[Client]:
    import httpx2

    async with httpx2.AsyncClient(http2=True, verify=trust(ca), timeout=TIMEOUT) as client:
        yield HttpxLike(client, base)


@asynccontextmanager
async def _httpx(base: str, ca: Path) -> AsyncIterator[Client]:
    import httpx

    async with httpx.AsyncClient(http2=True, verify=trust(ca), timeout=TIMEOUT) as client:
        yield HttpxLike(client, base)


@asynccontextmanager
async def _pyreqwest(base: str, ca: Path) -> AsyncIterator[Client]:
    async with _pyreqwest_client(ca) as client:
        yield Pyreqwest(client, base)


@asynccontextmanager
async def _pyreqwest_httpx(base: str, ca: Path) -> AsyncIterator[Client]:
    import httpx
    from pyreqwest.compatibility.httpx import HttpxTransport

    async with httpx.AsyncClient(transport=HttpxTransport(_pyreqwest_client(ca)), timeout=TIMEOUT) as client:
        yield HttpxLike(client, base)


@asynccontextmanager
async def _null_httpx2(base: str, ca: Path) -> AsyncIterator[Client]:
    """No network at all: what httpx2 itself costs, which no transport can save."""
    import httpx2

    async with httpx2.AsyncClient(transport=_null_transport(), timeout=TIMEOUT) as client:
        yield HttpxLike(client, base)


def _null_transport() -> httpx2.AsyncBaseTransport:
    import httpx2

    event = b'data: {"i":12345,"ns":1234567890123456789,"delta":"token"}\n\n'

    class Body(httpx2.AsyncByteStream):
        """A body in pieces of up to 16 KiB, the largest frame that servers send by default."""

        def __init__(self, unit: bytes, count: int) -> None:
            self._unit = unit
            self._count = count

        async def __aiter__(self) -> AsyncIterator[bytes]:
            per_piece = max(1, 16384 // len(self._unit))
            piece = self._unit * per_piece
            for _ in range(self._count // per_piece):
                yield piece
            yield self._unit * (self._count % per_piece)

    class Null(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            params = request.url.params
            body = Body(event, int(params["count"])) if "count" in params else Body(b"x", int(params["size"]))
            return httpx2.Response(200, headers=[(b"content-type", b"application/json")], stream=body)

    return Null()


NOT_TRIO = frozenset({"asyncio", "uvloop"})
CANDIDATES: Mapping[str, Candidate] = {
    "h2keep": Candidate(_h2keep),
    "h2keep-httpx2": Candidate(_h2keep_httpx2),
    "h2keep-httpx": Candidate(_h2keep_httpx),
    "httpx2": Candidate(_httpx2),
    "httpx": Candidate(_httpx),
    "pyreqwest": Candidate(_pyreqwest, NOT_TRIO),
    "pyreqwest-httpx": Candidate(_pyreqwest_httpx, NOT_TRIO),
    "null-httpx2": Candidate(_null_httpx2),
}
