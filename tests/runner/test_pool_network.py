"""The pool before servers that are short of streams: those that allow few or none, lower their limit, or refuse.

`test_limits.py` has servers that are patient with what comes before their SETTINGS; these are not.
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from support.clock import virtual_time
from support.pools import assert_at_rest, pool_of
from support.raw import GONE, Peer, RawServer, answering, task_group

if TYPE_CHECKING:
    import ssl

    from support.raw import RawRequest

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]

STREAMS = frames.SettingsFrame.MAX_CONCURRENT_STREAMS
REFUSED_STREAM = 7


def client(**limits: Any) -> h2keep.AsyncClient:
    timeout = h2keep.Timeout(connect=5.0, read=None, write=None, pool=limits.pop("pool", None))
    verify = limits.pop("verify", False)
    return h2keep.AsyncClient(verify=verify, http1=False, timeout=timeout, limits=h2keep.Limits(**limits))


class Requests:
    """Requests in tasks of their own, and what became of them."""

    def __init__(self, c: h2keep.AsyncClient, url: str, tasks: Any) -> None:
        self.done: list[int] = []
        self.errors: dict[int, h2keep.H2KeepError] = {}
        self._client, self._url, self._tasks = c, url, tasks

    async def start(self, *numbers: int) -> None:
        """In this order, which trio's scheduler wouldn't keep."""
        for number in numbers:
            await self._tasks.start(self._run, number)

    def start_together(self, count: int) -> None:
        for number in range(count):
            self._tasks.start_soon(self._run, number)

    async def _run(self, number: int, *, task_status: Any = anyio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        try:
            await self._client.post(f"{self._url}/{number}", content=b"x")
        except h2keep.H2KeepError as error:
            self.errors[number] = error
        else:
            self.done.append(number)


def numbers(peer: Peer) -> list[int]:
    """The requests that came, in their order."""
    return [int(request.path[1:]) for request in peer.requests.values()]


class Strict:
    """A handler that refuses what is beyond its limit, as real servers do, and answers the rest after a second."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.refused = 0

    async def __call__(self, peer: Peer) -> None:
        busy = 0

        async def answer(request: RawRequest) -> None:
            nonlocal busy
            await anyio.sleep(1.0)
            busy -= 1
            await peer.respond(request.stream_id, body=b"ok")

        async with task_group() as tasks:
            while True:
                request = await peer.request()
                if busy >= self.limit:
                    self.refused += 1
                    await peer.rst(request.stream_id, REFUSED_STREAM)
                else:
                    busy += 1
                    tasks.start_soon(answer, request)


# A server that allows nothing


async def test_a_server_that_allows_none_from_the_first_settings_on_is_waited_for() -> None:
    handler = Strict(0)
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        server.serve(handler, {STREAMS: 0})
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(*range(5))
        await anyio.sleep(100.0)
        assert not outcomes.done
        assert not outcomes.errors
        # It is asked again now and then, less and less often; but nothing more is sent that it can only refuse.
        assert 2 <= len(server.peers) <= 10
        assert not any(peer.requests for peer in server.peers[1:])
        handler.limit = 2
        last = server.peers[-1]
        await last.send(last.settings_frame({STREAMS: 2}))
        await anyio.sleep(5.0)
        assert sorted(outcomes.done) == list(range(5))
        assert numbers(last) == list(range(5))
        assert_at_rest(c)


@pytest.mark.parametrize("connections", [1, 100])
async def test_a_server_that_allows_none_for_too_long_is_a_pool_timeout(connections: int) -> None:
    handler = Strict(0)
    async with RawServer.listen() as server, client(max_connections=connections, pool=3.0) as c, task_group() as tasks:
        server.serve(handler, {STREAMS: 0})
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(*range(5))
        await anyio.sleep(2.5)
        assert not outcomes.errors
        await anyio.sleep(1.0)
        assert sorted(outcomes.errors) == list(range(5))
        for error in outcomes.errors.values():
            assert isinstance(error, h2keep.PoolTimeout)
            assert error.unprocessed
            assert "3.0 s (pool timeout)" in str(error)
        # The next one meets what is known by now; if another connection is tried for it, that takes its time, too.
        await outcomes.start(5)
        await anyio.sleep(2.8)
        assert 5 not in outcomes.errors
        await anyio.sleep(5.5)
        assert isinstance(outcomes.errors[5], h2keep.PoolTimeout)
        assert outcomes.errors[5].unprocessed
        assert len(server.peers) <= 5
        assert not any(peer.requests for peer in server.peers[1:])
        await anyio.sleep(10.0)
        assert_at_rest(c)


async def test_a_server_that_refuses_all_before_it_allows_some() -> None:
    handler = Strict(0)
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(*range(5))
        peer = await server.accept()
        # All have left before the server says that it allows none.
        await anyio.sleep(0.1)
        await peer.handshake({STREAMS: 0})
        tasks.start_soon(_handle, handler, peer)
        await anyio.sleep(0.5)
        assert handler.refused == 5
        assert not outcomes.errors
        handler.limit = 5
        await peer.send(peer.settings_frame({STREAMS: 5}))
        await anyio.sleep(2.0)
        assert sorted(outcomes.done) == list(range(5))
        assert handler.refused == 5
        assert len(server.peers) == 1
        assert_at_rest(c)


async def _handle(handler: Strict, peer: Peer) -> None:
    try:
        await handler(peer)
    except* GONE:
        pass


# A server that allows few


async def test_what_has_not_left_when_the_limit_falls_goes_to_other_connections() -> None:
    async with (
        RawServer.listen(receive_buffer=4096) as server,
        client(max_connections=3, pool=60.0) as c,
        task_group() as tasks,
    ):
        tasks.start_soon(_upload, c, server.url)
        old = await server.accept()
        # More than the kernel takes: what comes behind it stays here.
        await old.handshake({frames.SettingsFrame.INITIAL_WINDOW_SIZE: 2**31 - 1})
        await old.send(frames.WindowUpdateFrame(0, 2**31 - 1 - 65_535))
        await old.request()
        old.stop_reading()
        await anyio.sleep(0.1)
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(*range(5))
        await anyio.sleep(1.0)
        assert len(server.peers) == 1
        server.serve(answering(delay=1.0), {STREAMS: 1})
        await old.send(old.settings_frame({STREAMS: 1}))
        await anyio.sleep(10.0)
        assert sorted(outcomes.done) == list(range(5))
        assert len(old.requests) == 1
        assert sorted(number for peer in server.peers[1:] for number in numbers(peer)) == list(range(5))
        assert len(server.peers) == 3
        tasks.cancel_scope.cancel()


async def _upload(c: h2keep.AsyncClient, url: str) -> None:
    await c.post(url, content=bytes(20_000_000))


async def test_small_connections_are_filled_up_to_max_connections_and_no_further() -> None:
    handler = Strict(1)
    async with RawServer.listen() as server, client(max_connections=4) as c, task_group() as tasks:
        server.serve(handler, {STREAMS: 1})
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(*range(20))
        await anyio.sleep(10.0)
        assert sorted(outcomes.done) == list(range(20))
        assert len(server.peers) == 4
        # Those that had left before the first connection's SETTINGS came.
        assert handler.refused <= 19
        before = handler.refused
        await outcomes.start(*range(20, 40))
        await anyio.sleep(10.0)
        assert sorted(outcomes.done) == list(range(40))
        assert handler.refused == before
        assert_at_rest(c)


async def test_of_many_connections_only_the_first_learns_of_the_limit_by_refusals() -> None:
    handler = Strict(10)
    async with RawServer.listen() as server, client(max_connections=10) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(*range(100))
        first = await server.accept()
        # All have left.
        await anyio.sleep(0.1)
        await first.handshake({STREAMS: 10})
        tasks.start_soon(_handle, handler, first)
        server.serve(handler, {STREAMS: 10})
        await outcomes.start(*range(100, 500))
        await anyio.sleep(30.0)
        assert sorted(outcomes.done) == list(range(500))
        assert handler.refused == 90
        assert len(server.peers) == 10
        assert_at_rest(c)


async def test_as_many_dials_as_the_queue_needs_of_connections_as_small_as_the_last() -> None:
    handler = Strict(5)
    async with RawServer.listen() as server, client(max_connections=50) as c, task_group() as tasks:
        server.serve(handler, {STREAMS: 5})
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(0)
        await anyio.sleep(2.0)
        assert outcomes.done == [0]
        # Five go to the one that there is.
        await outcomes.start(*range(1, 42))
        await anyio.sleep(0.5)
        assert len(server.peers) == 9
        await anyio.sleep(1.0)
        assert sorted(outcomes.done) == list(range(42))
        assert handler.refused == 0
        assert_at_rest(c)


async def test_whoever_finds_no_room_on_the_connection_that_was_made_waits_for_room(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with (
        RawServer.listen(server_ssl) as server,
        client(verify=client_ssl, max_connections=2) as c,
        task_group() as tasks,
    ):
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(0)
        old = await server.accept()
        await old.handshake({STREAMS: 4})
        await anyio.sleep(0.1)
        tasks.start_soon(_answer_late, old)
        # Of seven three go there, and four are promised to the next one, which turns out to have room for one.
        await outcomes.start(*range(1, 8))
        new = await server.accept()
        await old.send(old.settings_frame({STREAMS: 1}))
        await anyio.sleep(0.1)
        await new.handshake({STREAMS: 1})
        tasks.start_soon(_answer_late, new)
        await anyio.sleep(8.0)
        assert not outcomes.errors
        await anyio.sleep(100.0)
        assert sorted(outcomes.done) == list(range(8))
        assert_at_rest(c)


async def _answer_late(peer: Peer) -> None:
    try:
        await answering(delay=20.0)(peer)
    except* GONE:
        pass


# Order, and who is asked


async def test_requests_that_come_back_go_before_those_that_came_later() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(*range(6))
        old = await server.accept()
        await old.handshake({STREAMS: 6})
        for _ in range(6):
            await old.request()
        await anyio.sleep(0.1)
        await outcomes.start(*range(6, 12))
        server.serve(answering(delay=1.0), {STREAMS: 1})
        await old.goaway(3)
        await old.respond(1, body=b"ok")
        await old.respond(3, body=b"ok")
        await anyio.sleep(20.0)
        assert sorted(outcomes.done) == list(range(12))
        assert numbers(server.peers[1])[:1] + sorted(numbers(server.peers[1])[1:]) == list(range(2, 12))
        assert numbers(server.peers[1]) == list(range(2, 12))
        assert_at_rest(c)


@pytest.mark.parametrize("overloaded", [0, 1])
async def test_k24_a_refused_request_goes_to_another_connection_if_there_is_one(overloaded: int) -> None:
    async with RawServer.listen() as server, client(max_connections=2) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(0)
        for number in range(2):
            await (await server.accept()).handshake({STREAMS: 1})
            await outcomes.start(number + 1)
        await anyio.sleep(0.1)
        for peer in server.peers:
            await peer.send(peer.settings_frame({STREAMS: 10}))
        await anyio.sleep(0.1)
        before = [numbers(peer) for peer in server.peers]
        busy, other = server.peers[overloaded], server.peers[1 - overloaded]
        # Both have room; the one that refuses does so with all that it has.
        for request in list(busy.requests.values()):
            await busy.rst(request.stream_id, REFUSED_STREAM)
        await anyio.sleep(1.0)
        assert numbers(busy) == before[overloaded]
        assert sorted(numbers(other)) == sorted(before[0] + before[1])
        for request in list(other.requests.values()):
            await other.respond(request.stream_id)
        await anyio.sleep(0.1)
        assert sorted(outcomes.done) == sorted(before[0] + before[1])
        assert_at_rest(c)


async def test_k24_a_refused_request_is_not_sent_again_at_once() -> None:
    at: dict[str, list[float]] = {}

    async def refuse(peer: Peer) -> None:
        while True:
            request = await peer.request()
            at.setdefault(request.path, []).append(anyio.current_time())
            await peer.rst(request.stream_id, REFUSED_STREAM)

    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        server.serve(refuse)
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(*range(50))
        await anyio.sleep(5.0)
        assert len(outcomes.errors) == 50
        for times in at.values():
            pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
            assert [pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2), strict=True)] == [True] * 3
        assert_at_rest(c)


# A server that says goodbye before anything else


@pytest.mark.parametrize("count", [1, 250])
async def test_k24_a_server_whose_every_connection_begins_with_goaway(count: int) -> None:
    async def goodbye(peer: Peer) -> None:
        await peer.goaway(0, 0, b"not today")
        await peer.until(lambda: False)

    async with RawServer.listen() as server, client(max_connections=2) as c, task_group() as tasks:
        server.serve(goodbye)
        outcomes = Requests(c, server.url, tasks)
        outcomes.start_together(count)
        await anyio.sleep(10.0)
        assert len(outcomes.errors) == count
        for error in outcomes.errors.values():
            assert isinstance(error, h2keep.ConnectionGoingAway)
            assert error.unprocessed
            assert error.debug_data == b"not today"
            assert "4 attempts were made" in str(error)
        # Four for all, or for each hundred of which two went together.
        assert 4 <= len(server.peers) <= 4 * (count // 100 + 1)
        assert_at_rest(c)


# All of it


@pytest.mark.parametrize("seed", range(2))
async def test_k24_whatever_a_server_does_with_its_limits_nothing_is_processed_twice_or_forgotten(seed: int) -> None:
    chance = random.Random(seed)
    processed: list[str] = []

    async def fickle(peer: Peer) -> None:
        """Its limit changes all the time; what is beyond it is refused, and after sixty requests it says goodbye."""
        limit = chance.choice([1, 3, 10])
        busy = came = 0

        async def change() -> None:
            nonlocal limit
            while True:
                await anyio.sleep(chance.random() * 0.05)
                limit = chance.choice([0, 1, 2, 5, 20])
                await peer.send(peer.settings_frame({STREAMS: limit}))

        async def answer(request: RawRequest) -> None:
            nonlocal busy
            await anyio.sleep(chance.random() * 0.02)
            busy -= 1
            await peer.respond(request.stream_id, body=b"ok")

        async with task_group() as tasks:
            tasks.start_soon(change)
            while came < 60:
                request = await peer.request()
                await request.complete()
                came += 1
                if busy >= limit:
                    await peer.rst(request.stream_id, REFUSED_STREAM)
                    continue
                busy += 1
                processed.append(request.path)
                tasks.start_soon(answer, request)
            await peer.goaway(request.stream_id)
            await peer.until(lambda: False)

    errors: dict[str, h2keep.H2KeepError] = {}

    async def work(worker: int) -> None:
        for number in range(20):
            path = f"/{worker}/{number}"
            try:
                await c.post(server.url + path, content=b"x" * 100)
            except h2keep.H2KeepError as error:
                errors[path] = error

    async with RawServer.listen() as server, client(max_connections=3) as c:
        server.serve(fickle, {STREAMS: 100})
        async with anyio.create_task_group() as tasks:
            for worker in range(16):
                tasks.start_soon(work, worker)
        assert len(processed) == len(set(processed))
        # Four refusals in a row may happen to a request, and then it is told so.
        assert set(processed).isdisjoint(errors)
        assert len(processed) + len(errors) == 16 * 20
        assert len(errors) < 16
        for error in errors.values():
            assert error.unprocessed
            assert "4 attempts were made" in str(error)
        # Pauses between dials may go on for a while.
        await anyio.sleep(120.0)
        assert_at_rest(c)
        assert len(pool_of(c)._moves) == 0
