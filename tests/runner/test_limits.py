"""Limits, ours and the server's: streams a connection, connections, unused ones, stream numbers, and great numbers.

`test_pool.py` has the queue's ordinary life; here are its edges.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep.protocol import connection as protocol_connection
from h2keep.protocol.h2_engine import H2Engine
from h2keep.runner.connection import Http2Connection
from h2keep.runner.tasks import Tasks
from support.clock import virtual_time
from support.pools import assert_at_rest, connections_of, pool_of
from support.raw import GONE, Peer, RawServer, answering, task_group

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from support.raw import RawRequest

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]

STREAMS = frames.SettingsFrame.MAX_CONCURRENT_STREAMS


def client(**limits: Any) -> h2keep.AsyncClient:
    timeout = limits.pop("timeout", None)
    return h2keep.AsyncClient(verify=False, http1=False, timeout=timeout, limits=h2keep.Limits(**limits))


class Requests:
    """Requests in tasks of their own, and what became of them."""

    def __init__(self, c: h2keep.AsyncClient, url: str, tasks: Any) -> None:
        self.done: list[int] = []
        self.errors: dict[int, h2keep.H2KeepError] = {}
        self.cancels: dict[int, anyio.CancelScope] = {}
        self._client, self._url, self._tasks = c, url, tasks

    async def start(self, *numbers: int) -> None:
        """In this order, which trio's scheduler wouldn't keep."""
        for number in numbers:
            self._tasks.start_soon(self._run, number)
            await anyio.sleep(0.001)

    async def _run(self, number: int) -> None:
        with anyio.CancelScope() as self.cancels[number]:
            try:
                await self._client.get(f"{self._url}/{number}")
            except h2keep.H2KeepError as error:
                self.errors[number] = error
            else:
                self.done.append(number)


def numbers(peer: Peer) -> list[int]:
    """The requests that came, in their order."""
    return [int(request.path[1:]) for request in peer.requests.values() if request.path != "/"]


def concurrent(peers: list[Peer]) -> Any:
    """A handler that answers after a second, and a list of how many requests were open at once, by connection."""
    most: dict[Peer, int] = dict.fromkeys(peers, 0)

    async def handler(peer: Peer) -> None:
        open_requests = 0
        most[peer] = 0

        async def answer(request: RawRequest) -> None:
            nonlocal open_requests
            open_requests += 1
            most[peer] = max(most[peer], open_requests)
            await anyio.sleep(1.0)
            open_requests -= 1
            await peer.respond(request.stream_id, body=b"ok")

        async with task_group() as tasks:
            while True:
                tasks.start_soon(answer, await peer.request())

    return handler, most


# The server's limit of concurrent streams


@pytest.mark.parametrize("limit", [1, 7, 100, 1000])
async def test_a_server_never_sees_more_streams_than_it_allows(limit: int) -> None:
    handler, most = concurrent([])
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        server.serve(handler, {STREAMS: limit})
        await c.get(server.url)
        outcomes = Requests(c, server.url, tasks)
        count = 3 * min(limit, 256) + 5
        await outcomes.start(*range(count))
        await anyio.sleep(count / limit * 1.1 + 5.0)
        assert len(outcomes.done) == count
        assert not outcomes.errors
        # At most 256, whatever a server allows.
        assert list(most.values()) == [min(limit, 256)]
        assert numbers(server.peers[0]) == list(range(count))
        assert_at_rest(c)


async def test_before_a_servers_settings_no_more_than_a_hundred_are_sent_and_the_rest_obeys_its_limit() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(*range(300))
        peer = await server.accept()
        await anyio.sleep(1.0)
        assert sum(connection.protocol.open_streams for connection in connections_of(c)) == 100
        await peer.handshake({STREAMS: 150})
        await anyio.sleep(1.0)
        assert len(peer.requests) == 150
        tasks.start_soon(_answer_all, peer)
        await anyio.sleep(1.0)
        assert sorted(outcomes.done) == list(range(300))
        assert numbers(peer) == list(range(300))


async def _answer_all(peer: Peer) -> None:
    try:
        await answering()(peer)
    except* GONE:
        pass


async def test_a_limit_of_none_at_first_is_waited_for() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        server.serve(answering(delay=1.0), {STREAMS: 10})
        await c.get(server.url)
        (peer,) = server.peers
        outcomes = Requests(c, server.url, tasks)
        # One keeps the connection in use; there is no room for others, on this connection or another.
        await outcomes.start(0)
        await peer.send(peer.settings_frame({STREAMS: 0}))
        await anyio.sleep(0.1)
        await outcomes.start(1, 2, 3)
        await anyio.sleep(0.5)
        assert (len(server.peers), numbers(peer)) == (1, [0])
        await peer.send(peer.settings_frame({STREAMS: 2}))
        await anyio.sleep(0.1)
        # Of two the first is still open.
        assert numbers(peer) == [0, 1]
        await anyio.sleep(5.0)
        assert outcomes.done == [0, 1, 2, 3]
        assert numbers(peer) == [0, 1, 2, 3]
        assert_at_rest(c)


async def test_a_limit_of_none_for_too_long_is_a_pool_timeout() -> None:
    timeout = h2keep.Timeout(connect=5.0, read=None, write=None, pool=3.0)
    async with RawServer.listen() as server, client(max_connections=1, timeout=timeout) as c, task_group() as tasks:
        server.serve(answering(delay=20.0), {STREAMS: 10})
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(0)
        peer = await server.peer(0)
        await anyio.sleep(0.1)
        await peer.send(peer.settings_frame({STREAMS: 0}))
        await anyio.sleep(0.1)
        await outcomes.start(1, 2)
        await anyio.sleep(2.8)
        assert not outcomes.errors
        await anyio.sleep(0.4)
        assert sorted(outcomes.errors) == [1, 2]
        for error in outcomes.errors.values():
            assert isinstance(error, h2keep.PoolTimeout)
            assert error.unprocessed
            assert "3.0 s (pool timeout)" in str(error)
        # What was open when the limit fell goes on.
        await anyio.sleep(20.0)
        assert outcomes.done == [0]
        assert numbers(peer) == [0]
        assert_at_rest(c)


async def test_a_server_that_allows_none_from_the_first_settings_on() -> None:
    timeout = h2keep.Timeout(connect=5.0, read=None, write=None, pool=3.0)
    async with RawServer.listen() as server, client(max_connections=1, timeout=timeout) as c, task_group() as tasks:
        server.serve(answering(), {STREAMS: 0})
        outcomes = Requests(c, server.url, tasks)
        # The first may have left before the SETTINGS came.
        await outcomes.start(0)
        # Less than the second after which another connection is tried.
        await anyio.sleep(0.5)
        (peer,) = server.peers
        assert outcomes.done == [0] or not peer.requests
        await peer.send(peer.settings_frame({STREAMS: 5}))
        await anyio.sleep(0.1)
        await outcomes.start(1, 2)
        await anyio.sleep(1.0)
        assert sorted(outcomes.done) == [0, 1, 2]
        assert len(server.peers) == 1
        assert_at_rest(c)


async def test_a_limit_that_falls_below_what_is_open_and_rises_in_flight() -> None:
    handler, most = concurrent([])
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        server.serve(handler, {STREAMS: 100})
        await c.get(server.url)
        (peer,) = server.peers
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(*range(50))
        await peer.send(peer.settings_frame({STREAMS: 3}))
        await anyio.sleep(0.1)
        await outcomes.start(*range(50, 60))
        await anyio.sleep(0.2)
        assert len(numbers(peer)) == 50
        # The fifty end, and no more than three take their places.
        most[peer] = 0
        await anyio.sleep(0.8)
        assert numbers(peer) == list(range(53))
        assert [number for number in range(50) if number not in outcomes.done] == []
        await peer.send(peer.settings_frame({STREAMS: 8}))
        await anyio.sleep(0.1)
        assert numbers(peer) == list(range(58))
        await anyio.sleep(5.0)
        assert sorted(outcomes.done) == list(range(60))
        assert_at_rest(c)


# The queue


async def test_those_who_leave_the_queue_leave_the_others_in_order() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        server.serve(answering(delay=1.0), {STREAMS: 2})
        await c.get(server.url)
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(*range(30))
        gone = {2, 3, 10, 11, 12, 28, 29}
        for number in gone:
            outcomes.cancels[number].cancel()
        await anyio.sleep(40.0)
        assert numbers(server.peers[0]) == [number for number in range(30) if number not in gone]
        assert not server.peers[0].seen(frames.RstStreamFrame)
        assert_at_rest(c)


async def test_those_who_give_up_behind_somebody_who_waits_take_no_room() -> None:
    timeout = h2keep.Timeout(connect=None, read=None, write=None, pool=None)
    async with RawServer.listen() as server, client(max_connections=1, timeout=timeout) as c, task_group() as tasks:
        server.serve(answering(delay=10_000.0), {STREAMS: 1})
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start(0)
        await anyio.sleep(0.1)
        # This one waits for hours; thousands come behind it, and go.
        await outcomes.start(1)
        (state,) = pool_of(c)._origins.values()
        for _ in range(20):
            with anyio.move_on_after(1.0):
                async with anyio.create_task_group() as crowd:
                    for _ in range(100):
                        crowd.start_soon(c.get, server.url)
        assert state.waiting == 1
        assert len(state.queue) < 200
        await anyio.sleep(21_000.0)
        assert outcomes.done == [0, 1]
        assert len(server.peers[0].requests) == 2
        assert_at_rest(c)


async def test_a_second_connection_is_made_only_when_the_first_is_full() -> None:
    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        server.serve(answering(delay=10.0), {STREAMS: 5})
        await c.get(server.url)
        outcomes = Requests(c, server.url, tasks)
        for count in range(1, 6):
            await outcomes.start(count)
            await anyio.sleep(0.1)
            assert len(server.peers) == 1
        await outcomes.start(6)
        await anyio.sleep(0.1)
        assert [len(peer.requests) for peer in server.peers] == [6, 1]
        await anyio.sleep(20.0)
        await c.get(server.url)
        assert len(server.peers) == 2
        assert_at_rest(c)


# Connections, as httpx counts them


async def test_max_connections_counts_those_of_all_origins_together() -> None:
    async with (
        RawServer.listen() as one,
        RawServer.listen() as other,
        client(max_connections=3) as c,
        task_group() as tasks,
    ):
        for server in (one, other):
            server.serve(answering(delay=10.0), {STREAMS: 1})
            await c.get(server.url)
        here, there = Requests(c, one.url, tasks), Requests(c, other.url, tasks)
        for number in range(3):
            await here.start(number)
            await there.start(number)
            await anyio.sleep(0.1)
        assert len(one.peers) + len(other.peers) == 3
        assert len(connections_of(c)) == 3
        await anyio.sleep(100.0)
        assert (here.done, there.done) == ([0, 1, 2], [0, 1, 2])
        assert len(connections_of(c)) <= 3
        assert_at_rest(c)


async def test_the_longest_unused_are_closed_beyond_max_keepalive_connections() -> None:
    servers = 4
    async with client(max_keepalive_connections=2) as c, task_group() as tasks:
        listening = []
        for _ in range(servers):
            server = await _enter(tasks)
            server.serve(answering())
            await c.get(server.url)
            listening.append(server)
            await anyio.sleep(1.0)
        assert [server.peers[0].ended for server in listening] == [True, True, False, False]
        # Used again it is the one used last.
        await c.get(listening[2].url)
        await c.get(listening[0].url)
        await anyio.sleep(0.1)
        assert [server.peers[-1].ended for server in listening] == [False, True, False, True]
        assert [len(server.peers) for server in listening] == [2, 1, 1, 1]


async def _enter(tasks: Any) -> RawServer:
    """A server for as long as the task group runs."""

    async def serve(*, task_status: Any) -> None:
        async with RawServer.listen() as server:
            task_status.started(server)
            await anyio.sleep_forever()

    server: RawServer = await tasks.start(serve)
    return server


async def test_an_unused_connection_expires_after_keepalive_expiry_and_a_used_one_never() -> None:
    async with RawServer.listen() as server, client(keepalive_expiry=5.0) as c, task_group() as tasks:
        server.serve(answering(delay=60.0))
        tasks.start_soon(c.get, server.url)
        await anyio.sleep(59.0)
        assert not server.peers[0].ended
        await anyio.sleep(5.9)
        assert not server.peers[0].ended
        await anyio.sleep(0.2)
        assert server.peers[0].ended
        assert server.peers[0].error is None


async def test_requests_one_after_the_other_have_one_task_look_for_the_end_of_their_connections_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spawned: list[object] = []
    spawn = Tasks.spawn

    def noted(tasks: Tasks, run: Callable[[], Coroutine[None, None, None]]) -> None:
        spawned.append(run)
        spawn(tasks, run)

    monkeypatch.setattr(Tasks, "spawn", noted)
    async with RawServer.listen() as server, client(keepalive_expiry=5.0) as c:
        server.serve(answering())
        for _ in range(20):
            await c.get(server.url)
    # One more dials.
    assert len(spawned) == 2


# Stream numbers


async def test_before_stream_numbers_run_out_there_is_a_fresh_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c:
        server.serve(answering(delay=1.0))
        await c.get(server.url)
        (connection,) = connections_of(c)
        highest = protocol_connection._HIGHEST_STREAM_ID
        if not isinstance(connection.protocol._engine, H2Engine):
            # nghttp2 counts the ids one by one, and nobody waits for a thousand million.
            highest = 100_001
            monkeypatch.setattr(protocol_connection, "_HIGHEST_STREAM_ID", highest)
        connection.protocol._next_stream_id = highest - 4
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(c.get, server.url)
        old, new = server.peers
        assert list(old.requests) == [1, highest - 4, highest - 2, highest]
        assert len(new.requests) == 7
        # The one without numbers ended in good order with its last stream.
        await anyio.sleep(0.1)
        assert old.ended
        assert old.error is None
        assert len(old.seen(frames.GoAwayFrame)) == 1
        assert_at_rest(c)


# Great numbers


async def _burst(count: int) -> tuple[float, int, list[Peer]]:
    """So many requests at once: CPU seconds, and bytes by which the process grew."""
    async with (
        RawServer.listen() as server,
        client(max_connections=100, max_keepalive_connections=None) as c,
    ):
        server.serve(answering(), {STREAMS: 100})
        done = peak = 0

        async def one() -> None:
            nonlocal done, peak
            assert (await c.get(server.url)).content == b"ok"
            done += 1
            if done % 500 == 1:
                peak = max(peak, _resident())

        gc.collect()
        before = _resident()
        began = time.process_time()
        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(one)
        took = time.process_time() - began
        assert done == count
        assert_at_rest(c)
        return took, peak - before, server.peers


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


async def test_sixteen_thousand_requests_at_once_finish_at_a_flat_cost_in_bounded_memory() -> None:
    await _burst(500)
    few = min([(await _burst(1_000))[0] for _ in range(2)]) / 1_000
    took, grew, peers = await _burst(16_000)
    assert len(peers) <= 100
    assert sum(len(peer.requests) for peer in peers) == 16_000
    # Both ends, and 16,000 tasks of the test's, are in it; what grows with the square would be 16 times as much.
    assert took / 16_000 < 4 * few
    assert grew < 16_000 * 25_000


async def test_the_steps_of_a_request_do_not_depend_on_how_many_wait() -> None:
    """Counted, not timed: calls of the pool's and the connection's functions."""
    assert await _calls(2_000) / 2_000 < 1.5 * await _calls(200) / 200


async def _calls(count: int) -> int:
    async with RawServer.listen() as server, client(max_connections=2) as c:
        server.serve(answering(), {STREAMS: 50})
        await c.get(server.url)
        calls = 0

        def note(frame: Any, event: str, _: Any) -> None:
            nonlocal calls
            if event == "call" and "h2keep" in frame.f_code.co_filename:
                calls += 1

        sys.setprofile(note)
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(count):
                    tasks.start_soon(c.get, server.url)
        finally:
            sys.setprofile(None)
        return calls


@pytest.mark.parametrize("connections", [10, 100])
async def test_k9_of_many_requests_that_meet_many_unverified_connections_not_each_asks_all_of_them(
    connections: int,
) -> None:
    async with (
        RawServer.listen() as server,
        client(max_connections=connections, max_keepalive_connections=None, keepalive_expiry=None) as c,
        task_group() as tasks,
    ):
        server.serve(answering(delay=1.0), {STREAMS: 10})
        outcomes = Requests(c, server.url, tasks)
        # One after another, as those that come together share what a connection is expected to take.
        await outcomes.start(*range(10 * connections))
        await anyio.sleep(60.0)
        assert len(outcomes.done) == 10 * connections
        before = list(server.peers)
        asked = 0

        def note(frame: Any, event: str, _: Any) -> None:
            nonlocal asked
            if event == "call" and frame.f_code is Http2Connection.verify.__code__:
                asked += 1

        sys.setprofile(note)
        try:
            async with anyio.create_task_group() as crowd:
                for _ in range(9 * connections):
                    crowd.start_soon(c.get, server.url)
        finally:
            sys.setprofile(None)
        # All at the beginning, then those that are left whenever one has answered, whatever the number of requests.
        assert connections <= asked <= connections * (connections + 1) / 2
        assert server.peers == before
