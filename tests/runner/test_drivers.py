"""Both drivers on asyncio, where there is a choice: the one of callbacks, and that of tasks, which Windows gets.

trio has the latter alone, and runs every other test in this folder with it, as asyncio does with callbacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hyperframe import frame as frames

import h2keep
from h2keep.runner import driver
from support.clock import VIRTUAL_BACKENDS
from support.leaks import running_tasks
from support.pools import connections_of
from support.raw import Peer, answering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from h2keep.runner.connection import Http2Connection
    from runner.conftest import Ends

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", VIRTUAL_BACKENDS[:1], indirect=True),
    pytest.mark.usefixtures("leak_check"),
]

MIB = 1024 * 1024


@pytest.fixture(params=["callbacks", "tasks"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[driver.SocketDriver]:
    if request.param == "callbacks":
        return driver.CallbackDriver

    def tasks(connection: Http2Connection, _loop: object) -> driver.AnyioDriver:
        return driver.AnyioDriver(connection)

    monkeypatch.setattr(driver, "CallbackDriver", tasks)
    return driver.AnyioDriver


async def test_it_is_the_one_that_is_meant(ends: Ends, kind: type[driver.SocketDriver]) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering())
        await c.get(server.url)
        [connection] = connections_of(c)
        assert type(connection.driver) is kind


async def test_much_data_goes_out_and_comes_in(ends: Ends) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(64 * 1024)

    async def serve(peer: Peer) -> None:
        request = await peer.request()
        assert len(await request.complete()) == 4 * MIB
        await peer.respond(request.stream_id, body=bytes(4 * MIB))

    # Under virtual time nothing must be due while megabytes are on their way: the kernel's own time is not virtual.
    async with ends.listen() as server, ends.client(keepalive=h2keep.Keepalive(read_idle_timeout=None)) as c:
        server.serve(serve)
        async with c.stream("POST", server.url, content=body()) as response:
            assert sum([len(chunk) async for chunk in response.aiter_bytes()]) == 4 * MIB


async def test_a_request_that_is_alone_is_written_at_once_where_that_takes_no_task(
    ends: Ends, kind: type[driver.SocketDriver]
) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering())
        await c.get(server.url)
        [connection] = connections_of(c)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(c.get, server.url)
            await checkpoint()
            waiting = [stream for stream in connection.protocol._streams.values() if stream.fields is not None]
            assert connection.protocol.open_streams == 3
            assert len(waiting) == (2 if kind is driver.CallbackDriver else 3)
        assert connection.requests == 4


async def test_an_upload_goes_on_when_the_socket_takes_more_again(ends: Ends) -> None:
    async def serve(peer: Peer) -> None:
        request = await peer.request()
        peer.stop_reading()
        await anyio.sleep(5.0)
        peer.resume_reading()
        await peer.respond(request.stream_id, body=b"%d" % len(await request.complete()))

    async with ends.listen() as server, ends.client(keepalive=h2keep.Keepalive(read_idle_timeout=None)) as c:
        server.serve(serve, {frames.SettingsFrame.INITIAL_WINDOW_SIZE: 64 * MIB})
        assert (await c.post(server.url, content=bytes(16 * MIB))).content == b"%d" % (16 * MIB)


async def test_k3_k7_a_dead_peer_is_found(ends: Ends) -> None:
    async def die(peer: Peer) -> None:
        await peer.request()
        peer.stop_reading()

    async with ends.listen() as server, ends.client() as c:
        server.serve(die)
        began = anyio.current_time()
        with pytest.raises(h2keep.PingTimeout):
            await c.get(server.url)
        assert anyio.current_time() - began == pytest.approx(45.0, abs=0.1)


async def test_k7_bytes_that_came_while_the_loop_was_blocked_are_read_before_judgement(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering(delay=100.0))
        # Each PING is answered, but by a peer on this very loop, whose time jumps.
        assert (await c.get(server.url)).content == b"ok"
        [peer] = server.peers
        assert len(peer.pings) == 3


async def test_k4_the_socket_is_asked_about_an_upload_only_while_there_is_one(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    def look(_socket: object) -> int:
        looks.append(anyio.current_time())
        return 0

    monkeypatch.setattr(driver, "_unacknowledged", look)
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering(delay=100.0))
        await c.get(server.url)
        assert len(server.peers[0].pings) == 3
        assert looks == []
        await c.post(server.url, content=b"little")
        # At the first PING all of it turns out to have arrived.
        assert len(looks) == 1


async def test_k4_what_was_written_before_an_upload_is_no_progress_of_it(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ends.listen() as server, ends.client() as c, anyio.create_task_group() as tasks:
        server.serve(answering())
        await c.get(server.url)
        [connection] = connections_of(c)
        its_driver = connection.driver
        assert isinstance(its_driver, driver.SocketDriver)
        before = its_driver._written
        # Of what follows the peer's TCP acknowledges nothing.
        monkeypatch.setattr(driver, "_unacknowledged", lambda _socket: its_driver._written - before)
        server.peers[0].stop_reading()

        async def upload() -> None:
            with pytest.raises(h2keep.PingTimeout):
                await c.post(server.url, content=bytes(16 * MIB))

        tasks.start_soon(upload)
        await anyio.wait_all_tasks_blocked()
        assert its_driver._written > before
        began = anyio.current_time()
        assert connection.ping()
        await its_driver.wait_stopped()
        assert anyio.current_time() - began == pytest.approx(15.0, abs=0.1)


async def test_no_failure_inside_leaves_a_request_waiting(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering())
        await c.get(server.url)
        [connection] = connections_of(c)

        def fail(*_: Any) -> bytes:
            raise ZeroDivisionError("a bug")

        with monkeypatch.context() as broken:
            broken.setattr(type(connection.protocol), "receive_data", fail)
            with pytest.raises(h2keep.ConnectionLost, match="a bug"):
                await c.get(server.url)
        assert (await c.get(server.url)).content == b"ok"
        assert len(server.peers) == 2


async def test_closing_leaves_neither_task_nor_timer(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering())
        await c.get(server.url)
        [connection] = connections_of(c)
        await c.aclose()
        assert not [task for task in running_tasks() if "SocketDriver" in repr(task)]
        assert connection.transport.socket.fileno() == -1
        before = len(server.peers[0].pings)
        await anyio.sleep(3600.0)
        assert len(server.peers[0].pings) == before
