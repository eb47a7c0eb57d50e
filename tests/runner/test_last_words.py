"""The end of a connection: what the peer said last is heard, and what the client says last is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from hyperframe import frame as frames

from h2keep.runner import driver
from runner.test_streams import settle
from support.clock import virtual_time
from support.pools import connections_of
from support.raw import abort, answering, task_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from h2keep.runner.connection import Http2Connection
    from runner.conftest import Ends

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]


@pytest.fixture(params=["callbacks", "tasks"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of asyncio's drivers; trio has one alone."""
    if request.param == "tasks":

        def tasks(connection: Http2Connection, _loop: object) -> driver.AnyioDriver:
            return driver.AnyioDriver(connection)

        monkeypatch.setattr(driver, "CallbackDriver", tasks)


async def test_k8_a_response_that_came_before_the_socket_failed_is_read_though_writing_finds_out_first(
    ends: Ends,
) -> None:
    bodies: list[bytes] = []

    async def call() -> None:
        bodies.append((await c.get(server.url)).content)

    async with ends.listen() as server, ends.client() as c, task_group() as tasks:
        tasks.start_soon(call)
        peer = await server.accept()
        await peer.handshake()
        await peer.request()
        await settle()
        [connection] = connections_of(c)
        await peer.respond(1, body=bytes(50_000))
        abort(peer.sock)
        # Somebody writes before the loop has looked at the socket again.
        connection.ping()
        await settle()
        assert bodies == [bytes(50_000)]


async def test_k24_goaway_that_came_before_the_socket_failed_counts_though_writing_finds_out_first(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering())
        await c.get(server.url)
        [connection] = connections_of(c)
        [peer] = server.peers
        await peer.send(frames.GoAwayFrame(0, last_stream_id=1))
        abort(peer.sock)
        assert (await c.get(server.url)).content == b"ok"
        assert len(server.peers) == 2
        assert connection.protocol.closed


async def test_a_body_whose_response_came_first_is_sent_to_its_end_before_the_goodbye(ends: Ends) -> None:
    go_on = anyio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await go_on.wait()
        yield b"last"

    async def call() -> None:
        async with c.stream("POST", server.url, content=body()) as response:
            await settle()
            go_on.set()
            # Whoever has read it all is taken to be done with the request, too.
            await anyio.sleep(1)
            assert await response.aread() == b"ok"

    async with ends.listen() as server, ends.client() as c, task_group() as tasks:
        tasks.start_soon(call)
        peer = await server.accept()
        await peer.handshake()
        request = await peer.request()
        await peer.until(lambda: request.received == 5)
        await peer.send(frames.GoAwayFrame(0, last_stream_id=1))
        await peer.respond(1, body=b"ok")
        assert await request.complete() == b"firstlast"
