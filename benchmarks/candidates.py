"""The clients that are compared, each behind the same few calls.

The calls are as thin as they can be, so that what is measured is the client: `chunks` and `lines` hand out the client's
own iterators. Every candidate has a timeout of a minute, as real applications do, and otherwise its defaults, unless a
workload asks for something else (`Target`).
"""

from __future__ import annotations

import functools
import http.client
import itertools
import ssl
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from benchmarks.floor import Upload

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
    from pathlib import Path

    import httpx2
    import pyreqwest.client
    import pyreqwest.response

TIMEOUT = 60.0
HEADERS = {"content-type": "application/json"}
PIECE = 256 * 1024


@dataclass(frozen=True)
class Target:
    """Where the server is, and what a workload wants of a client beyond its defaults."""

    url: str
    ca: Path
    #: For those whose limit is one of connections: pyreqwest's is one of requests, and aiohttp's comes to the same.
    max_connections: int | None = None
    #: Seconds after which a connection without traffic is sent a PING, if the client can do that.
    ping: float | None = None

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca))


class Client(Protocol):
    """One client; paths may also be whole URLs."""

    async def post(self, path: str, body: bytes) -> bytes: ...

    def chunks(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...

    def lines(self, path: str, *, live: bool = False) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        """`live`: each is wanted as soon as it has come."""
        ...


@dataclass(frozen=True)
class Candidate:
    """How to make a client, and what it needs."""

    open: Callable[[Target], AbstractAsyncContextManager[Client]]
    loops: frozenset[str] = frozenset({"asyncio", "uvloop", "trio"})
    http1: bool = False


class _Client:
    """What the clients below have in common: a client of the library's, and where paths start."""

    def __init__(self, client: Any, base: str) -> None:
        self._client = client
        self._base = base

    def _url(self, path: str) -> str:
        return self._base + path if path.startswith("/") else path


class HttpxLike(_Client):
    """A client of httpx or httpx2, whose names are the same, or h2keep's own, which took them over."""

    async def post(self, path: str, body: bytes) -> bytes:
        response = await self._client.post(self._url(path), content=body, headers=HEADERS)
        content: bytes = response.content
        return content

    @asynccontextmanager
    async def chunks(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._client.stream("GET", self._url(path)) as response:
            yield response.aiter_bytes()

    @asynccontextmanager
    async def lines(self, path: str, *, live: bool = False) -> AsyncIterator[AsyncIterator[str]]:
        async with self._client.stream("GET", self._url(path)) as response:
            yield response.aiter_lines()


def calmly(path: str, interval: str) -> str:
    """The path of events that don't come much faster than pyreqwest takes them.

    Its HTTP/2 ends the connection, as under an attack, if some 5,000 small frames have come that nobody has read.
    """
    return f"{path}&interval={interval}" if path.startswith("/events") and "interval" not in path else path


class Pyreqwest(_Client):
    """pyreqwest's own client. It has no line iterator: `_split` is the shortest one that is right."""

    _INTERVAL = "1500ns"

    async def post(self, path: str, body: bytes) -> bytes:
        response = await self._client.post(self._url(path)).headers(HEADERS).body_bytes(body).build().send()
        return bytes(await response.bytes())

    @asynccontextmanager
    async def chunks(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._client.get(self._url(calmly(path, self._INTERVAL))).build_streamed() as response:
            yield self._chunks(response.body_reader)

    @asynccontextmanager
    async def lines(self, path: str, *, live: bool = False) -> AsyncIterator[AsyncIterator[str]]:
        # By default a body is held back until it is over or 64 KiB of it are there. Without that it is too slow for a
        # flood of small frames, and ends the connection: so each case is given the way that suits it.
        request = self._client.get(self._url(calmly(path, self._INTERVAL)))
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


class PyreqwestHttpx(HttpxLike):
    """pyreqwest's transport in httpx's client."""

    _INTERVAL = "1us"

    @asynccontextmanager
    async def lines(self, path: str, *, live: bool = False) -> AsyncIterator[AsyncIterator[str]]:
        async with super().lines(calmly(path, self._INTERVAL), live=live) as lines:
            yield lines


class Niquests(_Client):
    """niquests' asynchronous session."""

    async def post(self, path: str, body: bytes) -> bytes:
        response = await self._client.post(self._url(path), data=body, headers=HEADERS)
        content: bytes = response.content
        return content

    @asynccontextmanager
    async def chunks(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        response = await self._client.get(self._url(path), stream=True)
        try:
            yield await response.iter_content(PIECE)
        finally:
            await response.close()

    @asynccontextmanager
    async def lines(self, path: str, *, live: bool = False) -> AsyncIterator[AsyncIterator[str]]:
        response = await self._client.get(self._url(path), stream=True)
        try:
            yield _decoded(response.iter_lines())
        finally:
            await response.close()


class HyperHttp(_Client):
    """hyperhttp's client: its responses stream unless they are read whole."""

    async def post(self, path: str, body: bytes) -> bytes:
        response = await self._client.post(self._url(path), content=body, headers=HEADERS)
        content: bytes = await response.aread()
        return content

    @asynccontextmanager
    async def chunks(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        async with await self._client.get(self._url(path)) as response:
            yield response.aiter_bytes()

    @asynccontextmanager
    async def lines(self, path: str, *, live: bool = False) -> AsyncIterator[AsyncIterator[str]]:
        async with await self._client.get(self._url(path)) as response:
            yield response.aiter_lines()


class Aiohttp(_Client):
    """aiohttp, which speaks HTTP/1.1 over as many connections as there are requests at once."""

    async def post(self, path: str, body: bytes) -> bytes:
        async with self._client.post(self._url(path), data=body, headers=HEADERS) as response:
            content: bytes = await response.read()
            return content

    @asynccontextmanager
    async def chunks(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._client.get(self._url(path)) as response:
            yield response.content.iter_any()

    @asynccontextmanager
    async def lines(self, path: str, *, live: bool = False) -> AsyncIterator[AsyncIterator[str]]:
        async with self._client.get(self._url(path)) as response:
            yield _decoded(response.content)


async def _decoded(lines: AsyncIterable[bytes]) -> AsyncIterator[str]:
    async for line in lines:
        yield line.decode()


class RawTls:
    """No HTTP client at all: one blocking TLS socket, one buffer, HTTP/1.1 by hand. Nobody else is on this loop.

    Uploads have a connection of their own (`floor.py`).
    """

    def __init__(self, target: Target) -> None:
        url = urlsplit(target.url)
        assert url.hostname is not None
        self._connection = http.client.HTTPSConnection(url.hostname, url.port, context=target.trust(), timeout=TIMEOUT)
        self._connect_upload = functools.partial(Upload, target.url, target.trust(), TIMEOUT)
        self._upload: Upload | None = None

    def close(self) -> None:
        self._connection.close()
        if self._upload is not None:
            self._upload.close()

    async def post(self, path: str, body: bytes) -> bytes:
        return self.post_blocking(path, body)

    def post_blocking(self, path: str, body: bytes) -> bytes:
        if path == "/sink":
            self._upload = self._upload or self._connect_upload()
            return self._upload.send(len(body))
        self._connection.request("POST", path, body, HEADERS)
        return self._connection.getresponse().read()

    @asynccontextmanager
    async def chunks(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        yield self._chunks(path)

    async def _chunks(self, path: str) -> AsyncIterator[bytes]:
        for chunk in self.copy(path):
            yield chunk

    def copy(self, path: str) -> Iterator[bytes]:
        """A body as the TLS socket hands it out, 256 KiB at most."""
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        rest = response.length or 0
        while rest > 0 and (chunk := response.read1(PIECE)):
            rest -= len(chunk)
            yield chunk
        response.close()

    def lines(self, path: str, *, live: bool = False) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        raise NotImplementedError("there is no such floor")


def h2keep_options(target: Target, engine: str, limits: Any) -> dict[str, Any]:
    """The arguments that h2keep's clients and transports share; `limits` makes them as the front door takes them."""
    from h2keep import Keepalive

    options: dict[str, Any] = {"verify": target.trust()}
    if engine != "h2":
        options["engine"] = engine
    if target.max_connections is not None:
        most = target.max_connections
        options["limits"] = limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=300.0)
    if target.ping is not None:
        options["keepalive"] = Keepalive(read_idle_timeout=target.ping, while_idle=True)
    return options


def httpx_limits(target: Target, limits: Any) -> dict[str, Any]:
    """As httpx's and httpx2's own clients take them."""
    if target.max_connections is None:
        return {}
    most = target.max_connections
    return {"limits": limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=300.0)}


def _pyreqwest_client(target: Target) -> pyreqwest.client.Client:
    from pyreqwest.client import ClientBuilder

    builder = ClientBuilder().http2(True).add_root_certificate_pem(target.ca.read_bytes())
    if target.ping is not None:
        builder = builder.http2_keep_alive_interval(timedelta(seconds=target.ping)).http2_keep_alive_while_idle(True)
    return builder.timeout(timedelta(seconds=TIMEOUT)).build()


@asynccontextmanager
async def _h2keep(engine: str, target: Target) -> AsyncIterator[Client]:
    from h2keep import AsyncClient, Limits

    async with AsyncClient(timeout=TIMEOUT, **h2keep_options(target, engine, Limits)) as client:
        yield HttpxLike(client, target.url)


@asynccontextmanager
async def _h2keep_httpx2(engine: str, target: Target) -> AsyncIterator[Client]:
    import httpx2

    from h2keep.httpx2 import AsyncKeepaliveTransport

    transport = AsyncKeepaliveTransport(**h2keep_options(target, engine, httpx2.Limits))
    async with httpx2.AsyncClient(transport=transport, timeout=TIMEOUT) as client:
        yield HttpxLike(client, target.url)


@asynccontextmanager
async def _h2keep_httpx(engine: str, target: Target) -> AsyncIterator[Client]:
    import httpx

    from h2keep.httpx import AsyncKeepaliveTransport

    transport = AsyncKeepaliveTransport(**h2keep_options(target, engine, httpx.Limits))
    async with httpx.AsyncClient(transport=transport, timeout=TIMEOUT) as client:
        yield HttpxLike(client, target.url)


@asynccontextmanager
async def _httpx2(target: Target) -> AsyncIterator[Client]:
    import httpx2

    options = httpx_limits(target, httpx2.Limits)
    async with httpx2.AsyncClient(http2=True, verify=target.trust(), timeout=TIMEOUT, **options) as client:
        yield HttpxLike(client, target.url)


@asynccontextmanager
async def _httpx(target: Target) -> AsyncIterator[Client]:
    import httpx

    options = httpx_limits(target, httpx.Limits)
    async with httpx.AsyncClient(http2=True, verify=target.trust(), timeout=TIMEOUT, **options) as client:
        yield HttpxLike(client, target.url)


@asynccontextmanager
async def _pyreqwest(target: Target) -> AsyncIterator[Client]:
    async with _pyreqwest_client(target) as client:
        yield Pyreqwest(client, target.url)


@asynccontextmanager
async def _pyreqwest_httpx(target: Target) -> AsyncIterator[Client]:
    import httpx
    from pyreqwest.compatibility.httpx import HttpxTransport

    async with httpx.AsyncClient(transport=HttpxTransport(_pyreqwest_client(target)), timeout=TIMEOUT) as client:
        yield PyreqwestHttpx(client, target.url)


@asynccontextmanager
async def _niquests(target: Target) -> AsyncIterator[Client]:
    import niquests

    async with niquests.AsyncSession(timeout=TIMEOUT) as session:
        # Else REQUESTS_CA_BUNDLE has precedence over what is said here.
        session.trust_env = False
        session.verify = str(target.ca)
        yield Niquests(session, target.url)


@asynccontextmanager
async def _hyperhttp(target: Target) -> AsyncIterator[Client]:
    import hyperhttp

    async with hyperhttp.Client(verify=str(target.ca), timeout=TIMEOUT) as client:
        yield HyperHttp(client, target.url)


@asynccontextmanager
async def _aiohttp(target: Target) -> AsyncIterator[Client]:
    import aiohttp

    connector = aiohttp.TCPConnector(ssl=target.trust())
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Aiohttp(session, target.url)


@asynccontextmanager
async def _raw_tls(target: Target) -> AsyncIterator[Client]:
    with closing(RawTls(target)) as client:
        yield client


@asynccontextmanager
async def _null_httpx2(target: Target) -> AsyncIterator[Client]:
    """No network at all: what httpx2 itself costs, which no transport can save."""
    import httpx2

    async with httpx2.AsyncClient(transport=_null_transport(), timeout=TIMEOUT) as client:
        yield HttpxLike(client, target.url)


def _null_transport() -> httpx2.AsyncBaseTransport:
    import httpx2

    class Body(httpx2.AsyncByteStream):
        def __init__(self, pieces: Iterator[bytes]) -> None:
            self._pieces = pieces

        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece in self._pieces:
                yield piece

    class Null(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            body = Body(null_body(request.url.params))
            return httpx2.Response(200, headers=[(b"content-type", b"application/json")], stream=body)

    return Null()


def null_body(params: Mapping[str, str]) -> Iterator[bytes]:
    """What the server would have sent, in pieces of up to 16 KiB, the largest frame that servers send by default."""
    unit = b'data: {"i":12345,"ns":1234567890123456789,"delta":"token"}\n\n' if "count" in params else b"x"
    count = int(params["count"] if "count" in params else params["size"])
    per_piece = max(1, 16384 // len(unit))
    yield from itertools.repeat(unit * per_piece, count // per_piece)
    yield unit * (count % per_piece)


ASYNCIO = frozenset({"asyncio", "uvloop"})
CANDIDATES: Mapping[str, Candidate] = {
    "h2keep": Candidate(functools.partial(_h2keep, "h2")),
    "h2keep-ngh2": Candidate(functools.partial(_h2keep, "ngh2")),
    "h2keep-httpx2": Candidate(functools.partial(_h2keep_httpx2, "h2")),
    "h2keep-httpx2-ngh2": Candidate(functools.partial(_h2keep_httpx2, "ngh2")),
    "h2keep-httpx": Candidate(functools.partial(_h2keep_httpx, "h2")),
    "h2keep-httpx-ngh2": Candidate(functools.partial(_h2keep_httpx, "ngh2")),
    "httpx2": Candidate(_httpx2),
    "httpx": Candidate(_httpx),
    "pyreqwest": Candidate(_pyreqwest, ASYNCIO),
    "pyreqwest-httpx": Candidate(_pyreqwest_httpx, ASYNCIO),
    "niquests": Candidate(_niquests, ASYNCIO),
    "hyperhttp": Candidate(_hyperhttp, ASYNCIO),
    "aiohttp": Candidate(_aiohttp, ASYNCIO, http1=True),
    "null-httpx2": Candidate(_null_httpx2),
    "raw-tls": Candidate(_raw_tls, http1=True),
}
