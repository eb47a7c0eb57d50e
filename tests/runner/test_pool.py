"""The pool over sockets: shared dials, the queue, the limits, several origins, and the end."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from hyperframe import frame as frames

import h2keep
from support.clock import virtual_time
from support.leaks import running_tasks
from support.pools import assert_at_rest, connections_of, pool_of
from support.raw import Peer, RawServer, answering, task_group

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]

STREAMS = frames.SettingsFrame.MAX_CONCURRENT_STREAMS


def client(*, max_connections: int | None = 100, **options: Any) -> h2keep.AsyncClient:
    options.setdefault("limits", h2keep.Limits(max_connections=max_connections))
    options.setdefault("timeout", None)
    return h2keep.AsyncClient(http1=False, **options)


class Requests:
    """Requests in tasks of their own: which have ended, in which order, and how."""

    def __init__(self, c: h2keep.AsyncClient, url: str, tasks: Any) -> None:
        self.done: list[int] = []
        self.errors: dict[int, h2keep.H2KeepError] = {}
        self.cancels: dict[int, anyio.CancelScope] = {}
        self._changed = anyio.Event()
        self._client, self._url, self._tasks = c, url, tasks

    def start(self, *numbers: int, url: str | None = None, **options: Any) -> None:
        for number in numbers:
            self._tasks.start_soon(self._run, number, url or self._url, options)

    async def start_in_order(self, *numbers: int, **options: Any) -> None:
        """Trio starts tasks in any order."""
        for number in numbers:
            self.start(number, **options)
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()

    async def finish(self, count: int) -> None:
        """Wait until so many have ended."""
        while len(self.done) + len(self.errors) < count:
            self._changed = anyio.Event()
            await self._changed.wait()

    async def _run(self, number: int, url: str, options: dict[str, Any]) -> None:
        with anyio.CancelScope() as self.cancels[number]:
            try:
                response = await self._client.get(f"{url}/{number}", **options)
            except h2keep.H2KeepError as error:
                self.errors[number] = error
            else:
                assert response.content == b"ok"
                self.done.append(number)
            self._changed.set()


async def serve(peer: Peer) -> None:
    await answering()(peer)


# Dials are shared


@pytest.mark.parametrize(("requests", "connections"), [(1, 1), (100, 1), (101, 2), (250, 3)])
async def test_dials_are_shared(requests: int, connections: int) -> None:
    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        server.serve(answering(delay=1.0), {STREAMS: 100})
        outcomes = Requests(c, server.url, tasks)
        outcomes.start(*range(requests))
        await anyio.sleep(0.5)
        assert len(server.peers) == connections
        assert all(len(peer.requests) <= 100 for peer in server.peers)
        await anyio.sleep(1.0)
        assert sorted(outcomes.done) == list(range(requests))
        assert len(server.peers) == connections
        assert_at_rest(c)


async def test_requests_join_a_dial_that_is_under_way(server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)
        outcomes.start(0)
        peer = await server.accept()
        outcomes.start(*range(1, 50))
        await anyio.sleep(1.0)
        await peer.handshake()
        tasks.start_soon(serve, peer)
        await anyio.sleep(1.0)
        assert sorted(outcomes.done) == list(range(50))
        assert len(server.peers) == 1


async def test_4096_requests_at_once_all_finish() -> None:
    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        server.serve(answering(delay=2.0), {STREAMS: 100})
        outcomes = Requests(c, server.url, tasks)
        outcomes.start(*range(4096))
        await outcomes.finish(4096)
        assert not outcomes.errors
        assert len(server.peers) == 41
        assert_at_rest(c)


async def test_4096_requests_on_one_connection_all_finish() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        server.serve(answering(delay=1.0), {STREAMS: 256})
        outcomes = Requests(c, server.url, tasks)
        outcomes.start(*range(4096))
        await outcomes.finish(4096)
        assert not outcomes.errors
        assert len(server.peers) == 1
        paths = [request.path for request in server.peers[0].requests.values()]
        assert sorted(paths) == sorted(f"/{number}" for number in range(4096))
        assert_at_rest(c)


async def test_a_refused_dial_fails_all_its_waiters_once_with_errors_of_their_own() -> None:
    async with client() as c, task_group() as tasks:
        async with RawServer.listen() as server:
            url = server.url
        outcomes = Requests(c, url, tasks)
        outcomes.start(*range(150))
        await anyio.sleep(0.1)
        assert sorted(outcomes.errors) == list(range(150))
        assert {type(error) for error in outcomes.errors.values()} == {h2keep.ConnectError}
        assert all(error.unprocessed for error in outcomes.errors.values())
        assert len(set(map(id, outcomes.errors.values()))) == 150
        assert len({id(error.__traceback__) for error in outcomes.errors.values()}) == 150
        assert not pool_of(c)._origins


async def test_a_failed_dial_is_not_remembered() -> None:
    async with client() as c:
        async with RawServer.listen() as server:
            port, url = server.port, server.url
        with pytest.raises(h2keep.ConnectError, match="refused"):
            await c.get(url)
        async with RawServer.listen() as server:
            assert port != server.port
            server.serve(answering())
            assert (await c.get(server.url)).content == b"ok"


async def test_who_asks_again_at_once_after_a_failed_dial_is_not_forgotten_with_the_others(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    ended = []

    async def insist(c: h2keep.AsyncClient, url: str) -> None:
        with pytest.raises(h2keep.ConnectError):
            await c.get(url)
        ended.append((await c.get(url)).content)

    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl) as c, task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(insist, c, server.url)
        (await server.accept()).abort()
        peer = await server.accept()
        await anyio.sleep(1.0)
        assert len(server.peers) == 2
        await peer.handshake()
        tasks.start_soon(serve, peer)
        await anyio.sleep(1.0)
        assert ended == [b"ok"] * 5
        server.serve(answering())
        assert (await c.get(server.url)).content == b"ok"
        # It has found the connection that there is.
        assert len(server.peers) == 2
        assert_at_rest(c)


async def test_aclose_ends_those_who_asked_again_at_once_after_a_failed_dial(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    ended = []

    async def insist(c: h2keep.AsyncClient, url: str) -> None:
        for _ in range(2):
            with pytest.raises(h2keep.ConnectError) as caught:
                await c.get(url)
        ended.append(str(caught.value))

    async with RawServer.listen(server_ssl) as server, task_group() as tasks:
        async with client(verify=client_ssl) as c:
            for _ in range(5):
                tasks.start_soon(insist, c, server.url)
            (await server.accept()).abort()
            await server.accept()
            await anyio.sleep(1.0)
        await anyio.sleep(1.0)
        assert ended == ["the client was closed"] * 5


async def test_a_cancelled_waiter_does_not_stall_the_others(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start_in_order(*range(5))
        peer = await server.accept()
        for number in (0, 2):
            outcomes.cancels[number].cancel()
        await anyio.sleep(0.1)
        await peer.handshake()
        tasks.start_soon(serve, peer)
        await anyio.sleep(0.1)
        assert sorted(outcomes.done) == [1, 3, 4]
        assert len(peer.requests) == 3
        assert_at_rest(c)


async def test_a_dial_whose_waiters_are_all_gone_serves_the_next_request(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)
        outcomes.start(0)
        peer = await server.accept()
        outcomes.cancels[0].cancel()
        await anyio.sleep(0.1)
        await peer.handshake()
        tasks.start_soon(serve, peer)
        await anyio.sleep(0.1)
        assert_at_rest(c)
        assert (await c.get(server.url)).content == b"ok"
        assert len(server.peers) == 1


@pytest.mark.parametrize("connect", [None, 60.0])
async def test_a_dial_that_leads_nowhere_does_not_outlive_its_waiters_for_long(
    connect: float | None, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with (
        RawServer.listen(server_ssl) as server,
        client(verify=client_ssl, max_connections=1, timeout=h2keep.Timeout(connect, None, None, None)) as c,
        task_group() as tasks,
    ):
        outcomes = Requests(c, server.url, tasks)
        outcomes.start(0)
        await server.accept()
        await anyio.sleep(20.0)
        outcomes.cancels[0].cancel()
        await anyio.sleep(3.0)
        outcomes.start(1)
        await anyio.sleep(10.0)
        # What has come since has a dial of its own.
        assert len(server.peers) == 1
        with anyio.fail_after(1.0):
            peer = await server.accept()
        await peer.handshake()
        tasks.start_soon(serve, peer)
        await outcomes.finish(1)
        assert outcomes.done == [1]
        assert len(server.peers) == 2
        assert_at_rest(c)


async def test_impatient_requests_do_not_fail_for_ever_while_a_patient_one_waits_for_a_dial_that_leads_nowhere(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start_in_order(0, timeout=None)
        await server.accept()
        for number in (1, 2):
            await outcomes.start_in_order(number, timeout=h2keep.Timeout(connect=5.0))
            await outcomes.finish(number)
        await anyio.sleep(1.0)
        await outcomes.start_in_order(3, timeout=h2keep.Timeout(connect=5.0))
        peer = await server.accept()
        await peer.handshake()
        tasks.start_soon(serve, peer)
        await outcomes.finish(4)
        assert (sorted(outcomes.done), sorted(outcomes.errors)) == ([0, 3], [1, 2])
        assert_at_rest(c)


async def test_a_line_that_is_slow_to_connect_is_given_the_time_though_others_always_give_up(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)

        async def give_up() -> None:
            for number in range(1, 10):
                await outcomes.start_in_order(number, timeout=h2keep.Timeout(connect=1.0))
                await anyio.sleep(3.0)

        await outcomes.start_in_order(0, timeout=None)
        await server.accept()
        tasks.start_soon(give_up)
        peer = await server.accept()
        # More than any attempt had at first.
        await anyio.sleep(15.0)
        assert len(outcomes.errors) > 5
        await peer.handshake()
        tasks.start_soon(serve, peer)
        await outcomes.finish(10)
        assert 0 in outcomes.done
        assert len(server.peers) == 2


async def test_an_impatient_request_does_not_end_the_dial_that_a_patient_one_waits_for(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start_in_order(0, timeout=h2keep.Timeout(connect=1.0))
        await server.accept()
        await outcomes.start_in_order(1, timeout=h2keep.Timeout(connect=10.0))
        await outcomes.start_in_order(2, timeout=None)
        # The dial was begun for the first; it ends with its timeout, and another begins for the others.
        peer = await server.accept()
        await anyio.sleep(4.0)
        assert isinstance(outcomes.errors.pop(0), h2keep.ConnectTimeout)
        assert not outcomes.errors
        await peer.handshake()
        tasks.start_soon(serve, peer)
        await anyio.sleep(0.1)
        assert sorted(outcomes.done) == [1, 2]
        assert len(server.peers) == 2
        assert_at_rest(c)


async def test_a_dial_lasts_as_long_as_the_most_patient_of_its_waiters_allows(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl) as c, task_group() as tasks:
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start_in_order(0, timeout=h2keep.Timeout(connect=1.0))
        await server.accept()
        await outcomes.start_in_order(1, timeout=h2keep.Timeout(connect=2.0))
        await outcomes.start_in_order(2, timeout=h2keep.Timeout(connect=8.0))
        await anyio.sleep(7.0)
        assert sorted(outcomes.errors) == [0, 1]
        assert len(server.peers) <= 2
        await anyio.sleep(1.5)
        assert sorted(outcomes.errors) == [0, 1, 2]
        assert {type(error) for error in outcomes.errors.values()} == {h2keep.ConnectTimeout}


# The queue


async def test_the_queue_is_served_in_order_and_nobody_overtakes() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        server.serve(answering(delay=1.0), {STREAMS: 3})
        await c.get(server.url)
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start_in_order(*range(20))
        for number in (5, 6, 7, 19):
            outcomes.cancels[number].cancel()
        await anyio.sleep(100.0)
        # Those that are answered in one moment may end in any order.
        served = [number for number in range(20) if number not in (5, 6, 7, 19)]
        paths = [request.path for request in server.peers[0].requests.values()]
        assert paths[1:] == [f"/{number}" for number in served]
        assert sorted(outcomes.done) == served
        assert len(server.peers) == 1
        assert_at_rest(c)


async def test_a_stream_limit_lowered_below_what_is_open_and_raised_again() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        server.serve(answering(delay=10.0), {STREAMS: 10})
        await c.get(server.url)
        (peer,) = server.peers
        outcomes = Requests(c, server.url, tasks)
        outcomes.start(*range(10))
        await anyio.sleep(5.0)
        await peer.send(peer.settings_frame({STREAMS: 2}))
        outcomes.start(*range(10, 20))
        await anyio.sleep(5.5)
        assert len(outcomes.done) == 10
        assert len(peer.requests) == 1 + 10 + 2
        await peer.send(peer.settings_frame({STREAMS: 5}))
        await anyio.sleep(0.1)
        assert len(peer.requests) == 1 + 10 + 5
        await anyio.sleep(30.0)
        assert sorted(outcomes.done) == list(range(20))
        assert len(server.peers) == 1
        assert_at_rest(c)


async def test_a_connection_that_allows_no_streams_any_more_makes_way() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        server.serve(answering(delay=10.0), {STREAMS: 10})
        await c.get(server.url)
        (peer,) = server.peers
        outcomes = Requests(c, server.url, tasks)
        outcomes.start(0)
        await anyio.sleep(5.0)
        await peer.send(peer.settings_frame({STREAMS: 0}))
        await anyio.sleep(0.1)
        outcomes.start(1)
        await anyio.sleep(4.0)
        assert len(server.peers) == 1
        await anyio.sleep(15.0)
        assert outcomes.done == [0, 1]
        assert len(server.peers) == 2
        assert peer.ended
        assert_at_rest(c)


async def test_connections_are_added_up_to_the_limit_and_the_queue_gets_the_rest() -> None:
    async with RawServer.listen() as server, client(max_connections=3) as c, task_group() as tasks:
        server.serve(answering(delay=10.0), {STREAMS: 100})
        outcomes = Requests(c, server.url, tasks)
        outcomes.start(*range(450))
        await anyio.sleep(5.0)
        assert [len(peer.requests) for peer in server.peers] == [100, 100, 100]
        await anyio.sleep(20.0)
        assert len(outcomes.done) == 450
        assert len(server.peers) == 3
        assert_at_rest(c)


async def test_a_lost_connection_leaves_the_queue_to_a_new_one() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        server.serve(answering(delay=10.0), {STREAMS: 1})
        await c.get(server.url)
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start_in_order(0, 1, 2)
        await anyio.sleep(0.1)
        server.peers[0].abort()
        await anyio.sleep(0.1)
        assert isinstance(outcomes.errors.pop(0), h2keep.ConnectionLost)
        await anyio.sleep(5.0)
        assert not outcomes.errors
        assert len(server.peers) == 2


async def test_a_connection_that_is_closing_is_never_chosen() -> None:
    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        server.serve(answering())
        for _ in range(20):
            await c.get(server.url)
            await server.peers[-1].eof()
            # The request and the EOF race; whichever is first, the request must not end up on the dead connection.
            outcomes = Requests(c, server.url, tasks)
            outcomes.start(0)
            await anyio.sleep(0.1)
            assert outcomes.done == [0] or isinstance(outcomes.errors[0], h2keep.ConnectionLost)
            await c.get(server.url)
        assert_at_rest(c)


# Timeouts


async def test_waiting_for_a_dial_is_a_connect_timeout_and_waiting_for_room_a_pool_timeout() -> None:
    timeout = h2keep.Timeout(connect=3.0, pool=7.0, read=None)
    async with (
        RawServer.listen(backlog=1) as server,
        client(max_connections=1, timeout=timeout) as c,
        task_group() as tasks,
    ):
        outcomes = Requests(c, server.url, tasks)
        server.serve(answering(delay=100.0), {STREAMS: 1})
        outcomes.start(0)
        await anyio.sleep(0.1)
        outcomes.start(1)
        await anyio.sleep(6.8)
        assert not outcomes.errors
        await anyio.sleep(0.4)
        assert isinstance(outcomes.errors[1], h2keep.PoolTimeout)
        assert outcomes.errors[1].unprocessed
        assert "7.0 s (pool timeout)" in str(outcomes.errors[1])


async def test_beyond_what_the_dials_will_bring_waiting_is_for_room(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    timeout = h2keep.Timeout(connect=3.0, pool=1.0, read=None)
    async with (
        RawServer.listen(server_ssl) as server,
        client(max_connections=1, timeout=timeout, verify=client_ssl) as c,
        task_group() as tasks,
    ):
        outcomes = Requests(c, server.url, tasks)
        await outcomes.start_in_order(*range(102))
        await server.accept()
        await anyio.sleep(2.0)
        assert {type(error) for error in outcomes.errors.values()} == {h2keep.PoolTimeout}
        assert sorted(outcomes.errors) == [100, 101]
        await anyio.sleep(1.5)
        assert len(outcomes.errors) == 102
        assert {type(outcomes.errors[number]) for number in range(100)} == {h2keep.ConnectTimeout}


async def test_a_request_that_timed_out_in_the_queue_leaves_no_trace() -> None:
    timeout = h2keep.Timeout(read=None, pool=1.0)
    async with RawServer.listen() as server, client(max_connections=1, timeout=timeout) as c, task_group() as tasks:
        server.serve(answering(delay=10.0), {STREAMS: 1})
        await c.get(server.url)
        outcomes = Requests(c, server.url, tasks)
        outcomes.start(0)
        await anyio.sleep(0.1)
        outcomes.start(1, 2, 3)
        await anyio.sleep(2.0)
        assert sorted(outcomes.errors) == [1, 2, 3]
        await anyio.sleep(10.0)
        assert outcomes.done == [0]
        assert len(server.peers[0].requests) == 2
        assert_at_rest(c)


# Several origins


async def test_an_unused_connection_makes_way_for_another_origin() -> None:
    async with (
        RawServer.listen() as one,
        RawServer.listen() as other,
        client(max_connections=1) as c,
        task_group() as tasks,
    ):
        for server in (one, other):
            server.serve(answering(delay=1.0))
        for _ in range(3):
            await c.get(one.url)
            await c.get(other.url)
        assert len(one.peers) == len(other.peers) == 3
        assert all(peer.ended and peer.error is None for peer in (*one.peers, *other.peers[:-1]))
        outcomes = Requests(c, one.url, tasks)
        outcomes.start(0)
        outcomes.start(1, url=other.url)
        await anyio.sleep(10.0)
        assert sorted(outcomes.done) == [0, 1]
        assert_at_rest(c)


async def test_starved_origins_get_their_turn_in_order() -> None:
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(RawServer.listen()) for _ in range(5)]
        c = await stack.enter_async_context(client(max_connections=2))
        tasks = await stack.enter_async_context(task_group())
        for server in servers:
            server.serve(answering(delay=10.0))
        outcomes = Requests(c, servers[0].url, tasks)
        for number, server in enumerate(servers):
            outcomes.start(number, url=server.url)
            await anyio.sleep(0.01)
        # One that gave up must not hold up those behind it.
        outcomes.cancels[2].cancel()
        await anyio.sleep(100.0)
        assert outcomes.done == [0, 1, 3, 4]
        assert [len(server.peers) for server in servers] == [1, 1, 0, 1, 1]
        assert_at_rest(c)


async def test_a_failed_dial_makes_room_for_a_starved_origin(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with (
        RawServer.listen(server_ssl) as silent,
        RawServer.listen(server_ssl) as other,
        client(max_connections=1, verify=client_ssl) as c,
        task_group() as tasks,
    ):
        other.serve(answering())
        outcomes = Requests(c, silent.url, tasks)
        outcomes.start(0, timeout=h2keep.Timeout(connect=2.0))
        await silent.accept()
        outcomes.start(1, url=other.url)
        await anyio.sleep(1.5)
        assert not outcomes.done
        await anyio.sleep(1.0)
        assert isinstance(outcomes.errors[0], h2keep.ConnectTimeout)
        assert outcomes.done == [1]


# Unused connections


@pytest.mark.parametrize("limit", [0, 1, 2])
async def test_no_more_unused_connections_are_kept_than_allowed(limit: int) -> None:
    limits = h2keep.Limits(max_keepalive_connections=limit)
    async with RawServer.listen() as server, client(limits=limits) as c, task_group() as tasks:
        server.serve(answering(delay=1.0), {STREAMS: 100})
        outcomes = Requests(c, server.url, tasks)
        outcomes.start(*range(350))
        await anyio.sleep(5.0)
        assert len(outcomes.done) == 350
        assert len(server.peers) == 4
        assert len(connections_of(c)) == limit
        assert sum(not peer.ended for peer in server.peers) == limit
        assert all(peer.error is None for peer in server.peers)


@pytest.mark.parametrize("expiry", [0.0, 5.0, 300.0])
async def test_keepalive_expiry_counts_from_the_last_use(expiry: float) -> None:
    async with RawServer.listen() as server, client(limits=h2keep.Limits(keepalive_expiry=expiry)) as c:
        server.serve(answering())
        await c.get(server.url)
        if expiry:
            await anyio.sleep(expiry - 0.1)
            assert not server.peers[0].ended
            async with c.stream("GET", server.url):
                # In use is whatever has a response that was not closed.
                await anyio.sleep(expiry + 1.0)
                assert not server.peers[0].ended
            await anyio.sleep(expiry - 0.1)
            assert not server.peers[0].ended
        await anyio.sleep(0.2)
        assert server.peers[0].ended
        assert not connections_of(c)


# The end


async def _fails(
    c: h2keep.AsyncClient, url: str, kind: type[h2keep.H2KeepError], seen: list[Any], **options: Any
) -> None:
    with pytest.raises(kind) as caught:
        await c.request("POST" if options else "GET", url, **options)
    seen.append(caught.value)


async def test_aclose_fails_requests_in_flight_says_goodbye_and_leaves_no_task(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    finished = []

    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"x"
            await anyio.sleep_forever()
        finally:
            finished.append(True)

    async def hold(peer: Peer) -> None:
        peer.auto_close_notify = False
        await answering(delay=1000.0)(peer)

    async with RawServer.listen(server_ssl) as server, RawServer.listen(server_ssl) as deaf, task_group() as tasks:
        server.serve(hold, {STREAMS: 2})
        before = running_tasks()
        c = client(verify=client_ssl, max_connections=2)
        seen: list[Any] = []
        tasks.start_soon(_fails, c, server.url, h2keep.ConnectionLost, seen)
        await anyio.sleep(0.1)
        tasks.start_soon(lambda: _fails(c, server.url, h2keep.ConnectionLost, seen, content=body()))
        await anyio.sleep(0.1)
        # These wait: one for a dial that never ends, the others for room.
        tasks.start_soon(_fails, c, deaf.url, h2keep.ConnectError, seen)
        await deaf.accept()
        tasks.start_soon(_fails, c, server.url, h2keep.ConnectError, seen)
        await anyio.sleep(0.1)
        assert not seen
        own = running_tasks() - before
        await c.aclose()
        assert not [task for task in own & running_tasks() if _is_h2keeps(task)]
        await anyio.sleep(0.1)
        assert len(seen) == 4
        assert all("closed" in str(error) for error in seen)
        assert [error.unprocessed for error in seen].count(True) == 2
        assert finished == [True]
        (peer,) = server.peers
        assert peer.ended
        # EOF came after close_notify; without, TLS would have complained.
        assert peer.error is None
        assert len(peer.seen(frames.GoAwayFrame)) == 1


def _is_h2keeps(task: Any) -> bool:
    """The client's own tasks, as told from those of the test and of the server."""
    coroutine = task.get_coro() if hasattr(task, "get_coro") else task.coro
    return "h2keep" in getattr(getattr(coroutine, "cr_code", None), "co_filename", "")


async def test_aclose_twice_at_once_and_in_a_row() -> None:
    async with RawServer.listen() as server:
        server.serve(answering())
        c = client()
        await c.aclose()
        await c.get(server.url)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(c.aclose)
            tasks.start_soon(c.aclose)
        await c.aclose()
        await anyio.sleep(0.1)
        assert server.peers[0].ended
        assert len(server.peers[0].seen(frames.GoAwayFrame)) == 1


async def test_a_pool_can_be_closed_by_two_at_once() -> None:
    async with RawServer.listen() as server:
        server.serve(answering())
        c = client()
        await c.get(server.url)
        pool = pool_of(c)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.aclose)
            tasks.start_soon(pool.aclose)
        await c.aclose()


async def test_a_client_can_be_used_again_after_aclose_and_without_a_context() -> None:
    async with RawServer.listen() as server:
        server.serve(answering())
        c = client()
        for number in range(3):
            assert (await c.get(server.url)).content == b"ok"
            assert (await c.get(server.url)).content == b"ok"
            assert len(server.peers) == number + 1
            await c.aclose()


async def test_aclose_that_is_cancelled_has_closed_everything_all_the_same() -> None:
    async with RawServer.listen() as server:
        server.serve(answering())
        c = client()
        await c.get(server.url)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await c.aclose()
        await anyio.sleep(0.1)
        assert server.peers[0].ended


async def test_a_response_that_is_being_read_fails_at_aclose_after_what_had_come() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        await peer.respond(1, body=b"half", end_stream=False)

    async with RawServer.listen() as server:
        server.serve(handler)
        c = client()
        async with c.stream("GET", server.url) as response:
            await anyio.sleep(0.1)
            await c.aclose()
            chunks = response.aiter_bytes()
            assert await anext(chunks) == b"half"
            with pytest.raises(h2keep.ConnectionLost, match="closed by this side"):
                await anext(chunks)


async def test_requests_without_a_context_over_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with RawServer.listen(uds=path) as server:
        server.serve(answering(delay=0.1))
        c = client(uds=path)
        async with anyio.create_task_group() as tasks:
            for _ in range(250):
                tasks.start_soon(c.get, "http://localhost/")
        assert sum(len(peer.requests) for peer in server.peers) == 250
        assert_at_rest(c)
        await c.aclose()
