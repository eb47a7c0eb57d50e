"""The standalone client for threads: `AsyncClient` without async, on one background event loop a process.

Many threads share one client and its connections, whose PINGs go on whatever the threads do. Bodies flow both ways
without being buffered whole, and a body's iterator runs in the thread that made the request.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from h2keep._messages import BaseClient, BaseResponse, HeaderTypes, LineSplitter, Prepared, TimeoutTypes

if TYPE_CHECKING:
    from types import EllipsisType, TracebackType

    from h2keep.runner.exchange import BlockingExchange

__all__ = ["Client", "SyncResponse"]

Content: TypeAlias = bytes | str | Iterable[bytes]


class SyncResponse(BaseResponse):
    """`Response` for threads. Always used up: read to its end, or closed."""

    _source: BlockingExchange

    def read(self) -> bytes:
        """Read the body to its end."""
        if self._content is None:
            self._use_up()
            chunks = []
            try:
                while chunk := self._source.receive():
                    chunks.append(chunk)
            except BaseException:
                # KeyboardInterrupt may come between two chunks.
                self._source.close()
                raise
            self._content = b"".join(chunks)
        return self._content

    def iter_bytes(self) -> Iterator[bytes]:
        """The body as it comes: whatever waits is one chunk."""
        if self._content is not None:
            yield self._content
            return
        self._use_up()
        try:
            while chunk := self._source.receive():
                yield chunk
        finally:
            self._source.close()

    def iter_lines(self) -> Iterator[str]:
        r"""The body's lines without their ends, each as soon as it is complete; \n, \r\n and \r end a line."""
        splitter = LineSplitter(self._charset())
        for chunk in self.iter_bytes():
            yield from splitter.feed(chunk)
        yield from splitter.end()

    def close(self) -> None:
        """Be done with it; the stream is reset if the body has not ended. Idempotent."""
        self._source.close()


class Client(BaseClient):
    """HTTP/2 with PING keepalive, for threads; arguments as for `AsyncClient`, of which it needs no `run_in_thread`.

    Usable with and without `with`, from any number of threads at once, and on both sides of a fork. KeyboardInterrupt
    in a thread that waits gives its request up (RST_STREAM) and is raised at once.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; requests in flight fail. Idempotent."""
        self._connections.close()

    def request(
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
    ) -> SyncResponse:
        """Send a request and read the whole response; see `AsyncClient.request`."""
        stream = self._open(self._prepare(method, url, content, json, params, headers, timeout, extensions))
        whole = stream.take_whole()
        response = SyncResponse(stream, whole)
        if whole is None:
            response.read()
        return response

    @contextmanager
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
    ) -> Iterator[SyncResponse]:
        """Send a request; its body is read inside the context, and given up where the context ends."""
        response = self._send(method, url, content, json, params, headers, timeout, extensions)
        try:
            yield response
        finally:
            response.close()

    def get(self, url: str, **options: Any) -> SyncResponse:
        """GET; options as for `request`."""
        return self.request("GET", url, **options)

    def head(self, url: str, **options: Any) -> SyncResponse:
        """HEAD; options as for `request`."""
        return self.request("HEAD", url, **options)

    def options(self, url: str, **options: Any) -> SyncResponse:
        """OPTIONS; options as for `request`."""
        return self.request("OPTIONS", url, **options)

    def post(self, url: str, **options: Any) -> SyncResponse:
        """POST; options as for `request`."""
        return self.request("POST", url, **options)

    def put(self, url: str, **options: Any) -> SyncResponse:
        """PUT; options as for `request`."""
        return self.request("PUT", url, **options)

    def patch(self, url: str, **options: Any) -> SyncResponse:
        """PATCH; options as for `request`."""
        return self.request("PATCH", url, **options)

    def delete(self, url: str, **options: Any) -> SyncResponse:
        """DELETE; options as for `request`."""
        return self.request("DELETE", url, **options)

    def _send(self, *request: Any) -> SyncResponse:
        return SyncResponse(self._open(self._prepare(*request)))

    def _open(self, prepared: Prepared) -> BlockingExchange:
        head, body, timeout = prepared
        if isinstance(body, AsyncIterable):
            raise TypeError(f"content: {type(body).__name__} is an async iterable, which needs an AsyncClient")
        return self._connections.send_blocking(head, body, timeout)
