"""Responses: what has been read of them, how often that can be done, and what becomes of them afterwards."""

from __future__ import annotations

import copy
import gzip
import pickle
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from support.fronts import Front
from support.raw import RawServer, answering

if TYPE_CHECKING:
    import ssl

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]


async def _get(
    front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, body: bytes, *headers: tuple[str, str]
) -> Any:
    async with RawServer.listen(server_ssl) as server, front.client(verify=client_ssl) as client:
        server.serve(answering(body, headers=headers))
        return await client.get(server.url)


@pytest.mark.parametrize("body", [b"", b"a body", b"x" * 200_000])
async def test_read(front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, body: bytes) -> None:
    response = await _get(front, server_ssl, client_ssl, body)
    assert isinstance(response, front.module.Response)
    assert repr(response) == "<Response [200 OK]>"
    assert response.content == body
    assert (response.is_closed, response.is_stream_consumed, response.num_bytes_downloaded) == (True, True, len(body))
    assert timedelta() < response.elapsed < timedelta(seconds=30)
    if front.threaded:
        assert response.read() is response.content
        assert b"".join(response.iter_bytes()) == body
        with pytest.raises(front.module.StreamConsumed):
            next(response.iter_raw())
    else:
        assert await response.aread() is response.content
        assert b"".join([chunk async for chunk in response.aiter_bytes()]) == body
        with pytest.raises(front.module.StreamConsumed):
            await anext(response.aiter_raw())


async def test_encoded(front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
    packed = gzip.compress(b"a body")
    response = await _get(front, server_ssl, client_ssl, packed, ("content-encoding", "gzip"))
    assert response.content == b"a body"
    assert response.num_bytes_downloaded == len(packed)


async def test_streamed_and_read_late(front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
    async def for_loops(client: Any) -> None:
        async with client.stream("GET", url) as response:
            assert await response.aread() == b"a body"
        async with client.stream("GET", url) as response:
            assert [chunk async for chunk in response.aiter_raw()] == [b"a body"]
            with pytest.raises(front.module.StreamConsumed):
                await response.aread()
        async with client.stream("GET", url) as response:
            await response.aclose()
            with pytest.raises(front.module.StreamClosed):
                await response.aread()

    def for_threads(client: Any) -> None:
        with client.stream("GET", url) as response:
            assert response.read() == b"a body"
        with client.stream("GET", url) as response:
            assert list(response.iter_raw()) == [b"a body"]
            with pytest.raises(front.module.StreamConsumed):
                response.read()
        with client.stream("GET", url) as response:
            response.close()
            with pytest.raises(front.module.StreamClosed):
                response.read()

    async with RawServer.listen(server_ssl) as server, front.client(verify=client_ssl) as client:
        server.serve(answering(b"a body"))
        url = server.url
        await client.do(for_threads, for_loops)


async def test_a_hooks_own_stream(front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
    """Programs put something around the stream, to count or to change what comes."""
    base = front.module.SyncByteStream if front.threaded else front.module.AsyncByteStream

    class Loud(base):  # type: ignore[misc, valid-type]
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __iter__(self) -> Any:
            return (chunk.upper() for chunk in self._stream)

        async def __aiter__(self) -> Any:
            async for chunk in self._stream:
                yield chunk.upper()

        def close(self) -> None:
            self._stream.close()

        async def aclose(self) -> None:
            await self._stream.aclose()

    def wrap(response: Any) -> None:
        response.stream = Loud(response.stream)

    hooks = {"event_hooks": {"response": [front.hook(wrap)]}}
    async with RawServer.listen(server_ssl) as server, front.client(verify=client_ssl, client=hooks) as client:
        server.serve(answering(b"a body"))
        assert (await client.get(server.url)).content == b"A BODY"


async def test_pickled_and_copied(front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
    response = await _get(front, server_ssl, client_ssl, b"a body", ("x-a", "b"))
    for other in (pickle.loads(pickle.dumps(response)), copy.copy(response)):
        # It can be read where there is no h2keep.
        assert type(other) is front.module.Response
        assert (other.content, other.headers["x-a"], other.request.method) == (b"a body", "b", "GET")
        assert (other.is_closed, other.extensions) == (True, {})


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("front", [Front("httpx", False), Front("httpx2", True)], ids=str)
async def test_a_small_body_needs_no_iterator(
    front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the versions of the libraries that there are; with others it may take longer, and no more."""
    monkeypatch.setattr(front.module.Response, "iter_raw", None)
    monkeypatch.setattr(front.module.Response, "aiter_raw", None)
    assert (await _get(front, server_ssl, client_ssl, b"a body")).content == b"a body"
