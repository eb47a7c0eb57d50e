"""The standalone asynchronous client: few names, those of httpx.

A thin layer over the pool: it turns URLs, headers and bodies into requests, and mailboxes into responses. Cookies,
redirects and authentication are not here; who wants them uses the httpx2 adapter.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from h2keep._messages import BaseClient, BaseResponse, Headers, HeaderTypes, LineSplitter, Prepared, TimeoutTypes

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from types import EllipsisType, TracebackType

    from h2keep.runner.exchange import AwaitableExchange
    from h2keep.runner.stream import Http2Stream

__all__ = ["AsyncClient", "Headers", "Response"]

Content: TypeAlias = bytes | str | Iterable[bytes] | AsyncIterable[bytes]


class Response(BaseResponse):
    """A response whose body comes as it is read. Always used up: read to its end, or closed."""

    _source: Http2Stream | AwaitableExchange

    async def aread(self) -> bytes:
        """Read the body to its end."""
        if self._content is None:
            self._use_up()
            chunks = []
            while chunk := await self._source.receive():
                chunks.append(chunk)
            self._content = b"".join(chunks)
        return self._content

    def aiter_bytes(self) -> AsyncIterator[bytes]:
        """The body as it comes: whatever waits is one chunk."""
        return self._chunks()

    def aiter_lines(self) -> AsyncIterator[str]:
        r"""The body's lines without their ends, each as soon as it is complete; \n, \r\n and \r end a line."""
        return _Lines(self._chunks(), LineSplitter(self._charset()))

    def _chunks(self) -> _Chunks:
        if self._content is None:
            self._use_up()
        return _Chunks(self, self._source, self._content)

    async def aclose(self) -> None:
        """Be done with it; the stream is reset if the body has not ended. Idempotent."""
        self._source.close()


# No generators, and no context made of one: trio complains of those that are left in the middle, as these may be, and
# at a loop's end it finalises them before the application's own generators that use them.


class _Chunks:
    def __init__(self, response: Response, stream: Http2Stream | AwaitableExchange, content: bytes | None) -> None:
        # Kept, as it would give its stream up when it is forgotten.
        self._response = response
        self._stream = stream
        self._content = content

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._content is None:
            chunk = await self._stream.receive()
        else:
            chunk, self._content = self._content, b""
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        self._stream.close()


class _Streaming:
    def __init__(self, send: Callable[[], Awaitable[Response]]) -> None:
        self._send: Callable[[], Awaitable[Response]] | None = send
        self._response: Response | None = None

    async def __aenter__(self) -> Response:
        # Let go of, as it holds the request's body, which the response may outlive by hours.
        send, self._send = self._send, None
        if send is None:
            raise RuntimeError("a streamed request can be sent but once: call stream() again")
        self._response = await send()
        return self._response

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._response is not None:
            await self._response.aclose()


class _Lines:
    def __init__(self, chunks: _Chunks, splitter: LineSplitter) -> None:
        self._chunks = chunks
        self._splitter = splitter
        self._lines: deque[str] = deque()
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while not self._lines:
            if self._ended:
                raise StopAsyncIteration
            try:
                self._lines.extend(self._splitter.feed(await anext(self._chunks)))
            except StopAsyncIteration:
                self._ended = True
                self._lines.extend(self._splitter.end())
        return self._lines.popleft()

    async def aclose(self) -> None:
        await self._chunks.aclose()


class AsyncClient(BaseClient):
    """HTTP/2 with PING keepalive, on asyncio and trio.

    Usable with and without `async with`; one client is for many requests, and shares connections between them.

    * `keepalive`: when to send PINGs, and when to give a connection up (K1); `read_idle_timeout=None` in it: never.
    * `verify`: True for the system's trust store, a path to a CA file or directory, False for no verification, or an
      `ssl.SSLContext`, in which nothing is changed but the ALPN protocols.
    * `cert`: a client certificate: a path, or (certificate, key) or (certificate, key, password).
    * `engine`: the HTTP/2 codec: "h2", or "ngh2" (nghttp2), which takes less CPU and needs `h2keep[fast]`.
    * `limits`, `timeout`: see `Limits` and `Timeout`; a number is a timeout for each of the four phases.
    * `http1`: whether the origin may speak HTTP/1.1; False also makes http:// URLs HTTP/2 with prior knowledge.
    * `uds`: the path of a unix socket to connect to in the place of TCP. `local_address`, `socket_options`: for TCP.
    * `proxy`: a URL or a `Proxy` through which every origin is reached.
    * `trust_env`: whether to read the environment, now: SSL_CERT_FILE and SSL_CERT_DIR; and, unless `proxy` or `uds` is
      given, HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, as httpx2 does.
    * `headers`: sent with every request, unless the request has its own.
    * `retries`: how often a failed attempt to connect is repeated, after 0, 0.5, 1, 2 ... seconds.
    * `replay_buffer`: how many bytes of a streamed body are kept until the response starts, so that a request which the
      server provably didn't process can be sent to another connection (K24).
    * `event_hook`: called with `ConnectionStats` and an event whenever something happens to a connection (K20).
    * `run_in_thread`: connections live on a background thread's event loop, so that PINGs go on while the application
      blocks its own.


    The hook runs in the context (contextvars) in which the client was made. One client can be used from several event
    loops: each has connections of its own. Raises ValueError, TypeError or `OSError` for arguments that can't be used.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; requests in flight fail. Idempotent."""
        await self._connections.aclose()

    async def request(
        self,
        method: str,
        url: str,
        *,
        content: Content | None = None,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: HeaderTypes = (),
        timeout: TimeoutTypes | EllipsisType = ...,
        extensions: Mapping[str, Any] | None = None,
    ) -> Response:
        """Send a request and read the whole response.

        `content` is bytes, str (as UTF-8), or an (async) iterable of bytes, which is never buffered whole; `json` is
        anything `json.dumps` takes. A `Host` header becomes `:authority`, while TCP and TLS go to the URL's host;
        the extension `sni_hostname` overrides the name for TLS. Raises the errors of `h2keep.errors`.
        """
        # No more coroutines than needed: each is gone through at every step that its innermost one takes.
        stream = await self._open(self._prepare(method, url, content, json, params, headers, timeout, extensions))
        whole = stream.take_whole()
        response = Response(stream, whole)
        if whole is None:
            await response.aread()
        return response

    def stream(
        self,
        method: str,
        url: str,
        *,
        content: Content | None = None,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: HeaderTypes = (),
        timeout: TimeoutTypes | EllipsisType = ...,
        extensions: Mapping[str, Any] | None = None,
    ) -> AbstractAsyncContextManager[Response]:
        """Send a request; its body is read inside the context, and given up where the context ends."""
        return _Streaming(
            functools.partial(self._send, method, url, content, json, params, headers, timeout, extensions)
        )

    def get(self, url: str, **options: Any) -> Coroutine[Any, Any, Response]:
        """GET; options as for `request`."""
        return self.request("GET", url, **options)

    def head(self, url: str, **options: Any) -> Coroutine[Any, Any, Response]:
        """HEAD; options as for `request`."""
        return self.request("HEAD", url, **options)

    def options(self, url: str, **options: Any) -> Coroutine[Any, Any, Response]:
        """OPTIONS; options as for `request`."""
        return self.request("OPTIONS", url, **options)

    def post(self, url: str, **options: Any) -> Coroutine[Any, Any, Response]:
        """POST; options as for `request`."""
        return self.request("POST", url, **options)

    def put(self, url: str, **options: Any) -> Coroutine[Any, Any, Response]:
        """PUT; options as for `request`."""
        return self.request("PUT", url, **options)

    def patch(self, url: str, **options: Any) -> Coroutine[Any, Any, Response]:
        """PATCH; options as for `request`."""
        return self.request("PATCH", url, **options)

    def delete(self, url: str, **options: Any) -> Coroutine[Any, Any, Response]:
        """DELETE; options as for `request`."""
        return self.request("DELETE", url, **options)

    async def _send(self, *request: Any) -> Response:
        return Response(await self._open(self._prepare(*request)))

    def _open(self, prepared: Prepared) -> Awaitable[Http2Stream | AwaitableExchange]:
        head, body, timeout = prepared
        if body is not None and not isinstance(body, (bytes, AsyncIterable)):
            body = _as_async(body)
        return self._connections.send(head, body, timeout)


async def _as_async(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
