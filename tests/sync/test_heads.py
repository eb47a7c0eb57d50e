"""A response's head is its caller's as soon as it is there, with connections on the background loop too."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import httpx2
import pytest

import h2keep
import h2keep.httpx2
from support.threaded import threaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.raw import Peer
    from support.threaded import ThreadedServer

#: Until the head, and between it and the body, in seconds; nothing here takes long.
PATIENCE = 5.0


@pytest.fixture
def server() -> Iterator[ThreadedServer]:
    """Answers with a head at once, and with the body when `send_body` is called."""

    async def answer(peer: Peer) -> None:
        while True:
            request = await peer.request()
            await peer.respond(request.stream_id, end_stream=False)

    with threaded(answer) as server:
        yield server


def send_body(server: ThreadedServer) -> None:
    server.call(server.peers[0].send_data, 1, b"body")
    server.call(lambda: server.peers[0].send_data(1, b"", end_stream=True))


@contextlib.contextmanager
def plain(**options: Any) -> Iterator[Callable[..., Any]]:
    with h2keep.Client(**options, timeout=PATIENCE) as client:
        yield client.stream


@contextlib.contextmanager
def through_httpx2(**options: Any) -> Iterator[Callable[..., Any]]:
    with httpx2.Client(transport=h2keep.httpx2.KeepaliveTransport(**options), timeout=PATIENCE) as client:
        yield client.stream


@pytest.mark.parametrize("front", [plain, through_httpx2])
def test_a_thread_gets_the_head_before_there_is_a_body(server: ThreadedServer, front: Any) -> None:
    with front(http1=False, verify=False) as stream, stream("GET", server.url) as response:
        assert response.status_code == 200
        send_body(server)
        assert response.read() == b"body"


@pytest.mark.parametrize("with_body", [False, True])
def test_so_does_one_that_sends_a_body(server: ThreadedServer, with_body: bool) -> None:
    content = iter([b"a", b"b"]) if with_body else None
    with (
        h2keep.Client(http1=False, verify=False, timeout=PATIENCE) as client,
        client.stream("POST", server.url, content=content) as response,
    ):
        assert response.status_code == 200
        send_body(server)
        assert list(response.iter_bytes()) == [b"body"]


@pytest.mark.anyio
async def test_so_does_a_task(server: ThreadedServer) -> None:
    async with (
        h2keep.AsyncClient(http1=False, verify=False, timeout=PATIENCE, run_in_thread=True) as client,
        client.stream("GET", server.url) as response,
    ):
        assert response.status_code == 200
        await anyio.to_thread.run_sync(send_body, server)
        assert await response.aread() == b"body"


def test_k21_between_the_head_and_a_look_at_the_body_no_read_clock_runs(server: ThreadedServer) -> None:
    with (
        h2keep.Client(http1=False, verify=False, timeout=PATIENCE) as client,
        client.stream("GET", server.url) as response,
    ):
        stream: Any = response._source._stream
        # Its answer means that the head has been dealt with.
        server.call(server.peers[0].ping)
        assert not stream._awaited
        send_body(server)
        assert response.read() == b"body"
