"""Connections that get too old, and servers that retire theirs: nobody notices (K22), and nobody starves."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import pytest
from hyperframe import frame as frames

import h2keep
import h2keep.httpx2
from support.clock import virtual_time
from support.leaks import running_tasks
from support.pools import assert_at_rest, connections_of, pool_of
from support.raw import GONE, Peer, RawServer, answering, task_group

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

    from support.raw import RawRequest

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]

STREAMS = frames.SettingsFrame.MAX_CONCURRENT_STREAMS
MAX_STREAM_ID = 2**31 - 1
AGE = 100.0


def client(
    *,
    max_connections: int | None = 100,
    max_keepalive_connections: int | None = 20,
    age: float | None = AGE,
    **options: Any,
) -> h2keep.AsyncClient:
    limits = h2keep.Limits(
        max_connections=max_connections,
        max_keepalive_connections=max_keepalive_connections,
        keepalive_expiry=None,
        max_connection_age=age,
    )
    defaults: dict[str, Any] = {"verify": False, "timeout": None, "keepalive": h2keep.Keepalive(jitter=0.0)}
    return h2keep.AsyncClient(http1=False, limits=limits, **defaults | options)


class Load:
    """Requests one after another, at a steady pace, for as long as the task group runs."""

    def __init__(self, c: h2keep.AsyncClient, url: str, pause: float = 1.0) -> None:
        self.answers: list[bytes] = []
        self.errors: list[Exception] = []
        self.longest = 0.0
        self._client, self._url, self._pause = c, url, pause

    async def run(self) -> None:
        while True:
            began = anyio.current_time()
            try:
                self.answers.append((await self._client.get(self._url)).content)
            except h2keep.H2KeepError as error:
                self.errors.append(error)
            self.longest = max(self.longest, anyio.current_time() - began)
            await anyio.sleep(self._pause)


# Connections that are too old


@pytest.mark.parametrize("max_connections", [1, None])
async def test_k22_a_connection_in_use_is_replaced_and_no_request_notices(max_connections: int | None) -> None:
    async with RawServer.listen() as server, client(max_connections=max_connections) as c, task_group() as tasks:
        server.serve(answering())
        load = Load(c, server.url)
        tasks.start_soon(load.run)
        await anyio.sleep(1000.0)
        assert not load.errors
        assert len(load.answers) >= 990
        assert load.longest < 0.1
        # Ten lives of 90 to 100 s.
        assert len(server.peers) in (10, 11, 12)
        assert all(peer.ended and peer.error is None for peer in server.peers[:-1])
        assert all(len(peer.seen(frames.GoAwayFrame)) == 1 for peer in server.peers[:-1])
        assert len(connections_of(c)) == 1
        tasks.cancel_scope.cancel()
    assert_counts_nothing(c)


def assert_counts_nothing(c: h2keep.AsyncClient) -> None:
    pool = pool_of(c)
    assert (pool._count._free, pool._count.dials, len(pool._ages), len(pool._tasks)) == (0, 0, 0, 0)


async def test_k22_the_age_is_jittered_by_up_to_a_tenth_less() -> None:
    ends: list[float] = []

    async def answer_and_note_the_end(peer: Peer) -> None:
        try:
            await answering()(peer)
        finally:
            ends.append(anyio.current_time())

    async with RawServer.listen() as server, contextlib.AsyncExitStack() as stack:
        server.serve(answer_and_note_the_end)
        for _ in range(30):
            await (await stack.enter_async_context(client())).get(server.url)
        await anyio.sleep(101.0)
    assert len(ends) == 30
    assert 90.0 <= min(ends) < max(ends) <= 100.1
    assert max(ends) - min(ends) > 3.0
    assert len({round(at, 2) for at in ends}) > 15


@pytest.mark.parametrize("used", [False, True])
async def test_k22_only_a_connection_in_use_is_replaced(used: bool) -> None:
    async with RawServer.listen() as server, client() as c:
        server.serve(answering())
        await c.get(server.url)
        await anyio.sleep(85.0)
        if used:
            # Within read_idle_timeout of the age, be it 90 or 100 s.
            await c.get(server.url)
        await anyio.sleep(20.0)
        assert server.peers[0].ended
        assert server.peers[0].error is None
        assert len(server.peers) == 1 + used
        assert len(connections_of(c)) == used
        assert (await c.get(server.url)).content == b"ok"
        assert len(server.peers) == 2


async def test_k22_a_waiting_request_is_use_enough() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:

        async def hold(peer: Peer) -> None:
            request = await peer.request()
            if len(server.peers) > 1:
                await peer.respond(request.stream_id, body=b"second")
            await peer.until(lambda: False)

        server.serve(hold, {STREAMS: 1})
        answers: list[bytes] = []

        async def get() -> None:
            answers.append((await c.get(server.url)).content)

        tasks.start_soon(get)
        await anyio.sleep(40.0)
        tasks.start_soon(get)
        await anyio.sleep(40.0)
        assert not answers
        await anyio.sleep(21.0)
        assert answers == [b"second"]
        assert len(server.peers) == 2
        assert not server.peers[0].ended
        assert not server.peers[0].seen(frames.GoAwayFrame)


async def test_k22_an_old_connection_says_goaway_only_after_its_last_stream() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:

        async def slow_first(peer: Peer) -> None:
            async with task_group() as answers:

                async def respond(request: RawRequest) -> None:
                    await anyio.sleep(500.0 if request.path == "/slow" else 0.0)
                    await peer.respond(request.stream_id, body=b"ok")

                while True:
                    answers.start_soon(respond, await peer.request())

        server.serve(slow_first)
        answers: list[tuple[float, bytes]] = []

        async def get() -> None:
            body = (await c.get(f"{server.url}/slow")).content
            answers.append((anyio.current_time(), body))

        tasks.start_soon(get)
        load = Load(c, server.url)
        tasks.start_soon(load.run)
        await anyio.sleep(499.0)
        old = server.peers[0]
        assert not old.seen(frames.GoAwayFrame)
        assert not old.ended
        # It is watched like any other, though new requests go to others.
        assert len(old.pings) >= 12
        assert len(old.requests) <= 102
        await anyio.sleep(2.0)
        assert [(round(at), body) for at, body in answers] == [(500, b"ok")]
        assert len(old.seen(frames.GoAwayFrame)) == 1
        assert old.ended
        assert old.error is None
        assert not load.errors
        tasks.cancel_scope.cancel()
    assert_counts_nothing(c)


async def test_k22_the_old_connection_takes_requests_until_the_new_ones_settings_came() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        load = Load(c, server.url)
        tasks.start_soon(load.run)
        old = await server.accept()
        await old.handshake()
        tasks.start_soon(_until_gone, answering(), old)
        await anyio.sleep(80.0)
        new = await server.accept()
        began = anyio.current_time()
        await anyio.sleep(5.0)
        before = len(old.requests)
        assert before >= 84
        await new.handshake()
        assert anyio.current_time() - began == pytest.approx(5.0)
        tasks.start_soon(_until_gone, answering(), new)
        await anyio.sleep(5.0)
        assert len(old.requests) <= before + 1
        assert len(new.requests) >= 4
        assert old.ended
        assert load.longest < 0.1
        assert not load.errors
        tasks.cancel_scope.cancel()
    assert_counts_nothing(c)


async def _until_gone(handler: Callable[[Peer], Awaitable[None]], peer: Peer) -> None:
    try:
        await handler(peer)
    except* GONE:
        pass


async def test_k22_a_replacement_that_says_nothing_is_given_up_and_tried_again() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:
        load = Load(c, server.url)
        tasks.start_soon(load.run)
        old = await server.accept()
        await old.handshake()
        tasks.start_soon(_until_gone, answering(), old)
        mute = await server.accept()
        mute_since = anyio.current_time()
        good = await server.accept()
        # 10 s for the connection, and a second's pause.
        assert anyio.current_time() - mute_since == pytest.approx(11.0, abs=0.1)
        assert mute.sock.recv(1 << 16)
        await good.handshake()
        tasks.start_soon(_until_gone, answering(), good)
        await anyio.sleep(5.0)
        assert old.ended
        assert good.requests
        assert not load.errors
        assert load.longest < 0.1
        tasks.cancel_scope.cancel()
    assert_counts_nothing(c)


async def test_k22_while_no_replacement_can_be_made_the_old_connection_goes_on_and_the_pauses_grow(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    attempts: list[float] = []

    async def fail_the_rest(server: RawServer) -> None:
        while True:
            # A failed TLS handshake is a failed attempt that the server can count.
            peer = await server.accept()
            attempts.append(anyio.current_time())
            peer.close()

    async with (
        RawServer.listen(server_ssl) as server,
        client(verify=client_ssl, max_connections=1) as c,
        task_group() as tasks,
    ):
        load = Load(c, server.url)
        tasks.start_soon(load.run)
        old = await server.accept()
        await old.handshake()
        tasks.start_soon(_until_gone, answering(), old)
        tasks.start_soon(fail_the_rest, server)
        await anyio.sleep(600.0)
        assert not load.errors
        assert len(load.answers) >= 590
        assert load.longest < 0.1
        assert not old.ended
        pauses = [round(later - earlier) for earlier, later in itertools.pairwise(attempts)]
        assert pauses[:7] == [1, 2, 4, 8, 16, 32, 60]
        assert set(pauses[6:]) == {60}
        tasks.cancel_scope.cancel()
    assert_counts_nothing(c)


async def test_k22_when_it_falls_out_of_use_while_no_replacement_can_be_made_it_closes() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c:

        async def only(peer: Peer) -> None:
            server.stop_listening()
            await answering()(peer)

        server.serve(only)
        while anyio.current_time() < 105.0:
            await c.get(server.url)
            await anyio.sleep(5.0)
        assert not server.peers[0].ended
        await anyio.sleep(100.0)
        assert server.peers[0].ended
        assert_at_rest(c)
        assert_counts_nothing(c)


async def test_k22_if_the_old_connection_dies_first_the_replacement_serves_who_waits(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with (
        RawServer.listen(server_ssl) as server,
        client(verify=client_ssl, max_connections=1) as c,
        task_group() as tasks,
    ):
        load = Load(c, server.url)
        tasks.start_soon(load.run)
        old = await server.accept()
        await old.handshake()
        tasks.start_soon(_until_gone, answering(), old)
        new = await server.accept()
        # The dial is under way; nobody may cancel it, as those who come now rely on it.
        await old.eof()
        await anyio.sleep(3.0)
        answered = len(load.answers)
        assert await _refuses_to_come(server)
        await new.handshake()
        tasks.start_soon(_until_gone, answering(), new)
        await anyio.sleep(5.0)
        assert len(load.answers) >= answered + 4
        assert not load.errors
        tasks.cancel_scope.cancel()
    assert_counts_nothing(c)


async def _refuses_to_come(server: RawServer) -> bool:
    """Whether no further connection is made."""
    with anyio.move_on_after(0.1):
        await server.accept()
        return False
    return True


async def test_k17_k22_nothing_waits_for_the_age_of_a_connection_that_is_gone() -> None:
    async with RawServer.listen() as server, client(age=10_000.0) as c:

        async def answer_and_end(peer: Peer) -> None:
            await peer.request()
            await peer.respond(1, body=b"ok")
            await peer.eof()
            await peer.until(lambda: False)

        server.serve(answer_and_end)
        before = running_tasks()
        for _ in range(20):
            await c.get(server.url)
            await anyio.sleep(0.1)
        pool = pool_of(c)
        assert not pool._states
        assert not pool._tasks
        left = [task for task in running_tasks() - before if "h2keep" in repr(task)]
        assert not left
        assert len(server.peers) == 20


async def test_k22_where_no_unused_connection_is_kept_the_old_one_is_replaced_all_the_same() -> None:
    async with RawServer.listen() as server, client(max_keepalive_connections=0) as c, task_group() as tasks:
        server.serve(answering(delay=3.0))
        # Always two under way.
        loads = [Load(c, server.url, pause=0.0) for _ in range(2)]
        for load in loads:
            tasks.start_soon(load.run)
            await anyio.sleep(1.5)
        await anyio.sleep(500.0)
        assert not any(load.errors for load in loads)
        assert max(load.longest for load in loads) < 3.1
        assert 5 <= len(server.peers) <= 13
        assert sum(not peer.ended for peer in server.peers) <= 2
        tasks.cancel_scope.cancel()
    assert_counts_nothing(c)


async def test_k22_closing_the_client_during_a_replacement_leaves_nothing() -> None:
    async with RawServer.listen() as server, task_group() as tasks:
        c = client()
        load = Load(c, server.url)
        tasks.start_soon(load.run)
        old = await server.accept()
        await old.handshake()
        tasks.start_soon(_until_gone, answering(), old)
        await server.accept()
        pool = pool_of(c)
        await anyio.sleep(0.1)
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await c.aclose()
            assert not pool._tasks
            assert not pool._states
            assert (pool._count._free, pool._count.dials, len(pool._ages)) == (0, 0, 0)


# Draining connections and the limits


async def drain(peer: Peer, hold: float) -> None:
    """Say GOAWAY behind the first request, which is answered after `hold` seconds."""
    request = await peer.request()
    await peer.goaway(request.stream_id)
    await anyio.sleep(hold)
    await peer.respond(request.stream_id, body=b"ok")
    await peer.until(lambda: False)


async def test_k22_draining_connections_do_not_count_up_to_two_at_least() -> None:
    async with RawServer.listen() as server, client(max_connections=1, age=None) as c, task_group() as tasks:

        async def handler(peer: Peer) -> None:
            await drain(peer, 100.0)

        server.serve(handler)
        ended: list[float] = []

        async def get() -> None:
            await c.get(server.url)
            ended.append(round(anyio.current_time()))

        for number in range(4):
            tasks.start_soon(get)
            await anyio.sleep(1.0)
            assert len(server.peers) == min(number + 1, 3)
        # The third fills max_connections, so the fourth waits for the first to end.
        await anyio.sleep(95.0)
        assert len(server.peers) == 3
        await anyio.sleep(2.0)
        assert len(server.peers) == 4
        assert pool_of(c)._count._free == 2
        await anyio.sleep(150.0)
        assert ended == [100, 101, 102, 200]
        assert pool_of(c)._count._free == 0
        assert_at_rest(c)


async def test_k22_each_origin_has_its_own_draining_connections() -> None:
    async with RawServer.listen() as one, RawServer.listen() as other, task_group() as tasks:

        async def handler(peer: Peer) -> None:
            await drain(peer, 100.0)

        async with client(max_connections=3, age=None) as c:
            for server in (one, other):
                server.serve(handler)
                for _ in range(3):
                    tasks.start_soon(c.get, server.url)
                    await anyio.sleep(0.1)
            assert (len(one.peers), len(other.peers)) == (3, 3)
            assert pool_of(c)._count._free == 6
            tasks.start_soon(c.get, one.url)
            await anyio.sleep(0.1)
            assert len(one.peers) == 4
            assert pool_of(c)._count._free == 6
            await anyio.sleep(250.0)
            assert pool_of(c)._count._free == 0
            assert_at_rest(c)


@pytest.mark.parametrize("why", ["goaway", "wedged"])
async def test_k22_another_origin_that_waits_gets_the_place_of_a_draining_connection(why: str) -> None:
    async with (
        RawServer.listen() as one,
        RawServer.listen() as other,
        client(max_connections=1, age=None) as c,
        task_group() as tasks,
    ):
        other.serve(answering())
        answers: list[bytes] = []

        async def get(url: str) -> None:
            answers.append((await c.get(url)).content)

        tasks.start_soon(get, one.url)
        peer = await one.accept()
        await peer.handshake()
        await peer.request()
        tasks.start_soon(get, other.url)
        await anyio.sleep(10.0)
        assert not answers
        if why == "goaway":
            await peer.goaway(1)
        else:
            for _ in range(2):
                await get_with_timeout(c, one.url)
        await anyio.sleep(0.1)
        assert answers == [b"ok"]
        await peer.respond(1, body=b"late")
        await anyio.sleep(0.1)
        assert answers == [b"ok", b"late"]
        assert_at_rest(c)


async def get_with_timeout(c: h2keep.AsyncClient, url: str) -> None:
    with pytest.raises(h2keep.ReadTimeout):
        await c.get(url, timeout=h2keep.Timeout(read=5.0))


async def test_k21_k22_a_connection_wedged_behind_a_live_proxy_is_left_and_does_not_starve_who_comes() -> None:
    async with RawServer.listen() as server, client(max_connections=1, age=None) as c, task_group() as tasks:

        async def wedged_at_first(peer: Peer) -> None:
            """PINGs are answered for ever; requests only on the second connection, and the upload in flight goes on."""
            if len(server.peers) > 1:
                await answering()(peer)
            await peer.until(lambda: False)

        server.serve(wedged_at_first)
        outcomes: list[Any] = []

        async def upload() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b"x" * 100
                await anyio.sleep(10.0)

        async def post() -> None:
            outcomes.append(await c.post(server.url, content=upload()))

        tasks.start_soon(post)
        await anyio.sleep(1.0)
        for _ in range(2):
            await get_with_timeout(c, server.url)
        (old,) = server.peers
        began = anyio.current_time()
        for _ in range(20):
            assert (await c.get(server.url)).content == b"ok"
        assert anyio.current_time() - began < 0.1
        assert len(server.peers) == 2
        await anyio.sleep(500.0)
        # What was in flight on it goes on: its body still flows.
        assert old.requests[1].received > 5_000
        assert not old.ended
        assert len(old.requests) == 3
        assert (await c.get(server.url)).content == b"ok"
        assert len(server.peers) == 2


# Servers and load balancers that retire their connections


class Balancer:
    """Ends each connection gracefully after some time, as load balancers do: GOAWAY in two steps, then silence."""

    def __init__(self, every: float, work: float, *, rude: bool = False) -> None:
        self.every, self.work, self.rude = every, work, rude
        self.processed: list[str] = []
        #: The last stream that each connection still processes.
        self._last: dict[Peer, int] = {}

    async def __call__(self, peer: Peer) -> None:
        async with task_group() as tasks:
            tasks.start_soon(self._retire, peer)
            while True:
                request = await peer.request()
                if request.stream_id <= self._last.get(peer, MAX_STREAM_ID):
                    tasks.start_soon(self._process, request)

    async def _retire(self, peer: Peer) -> None:
        await anyio.sleep(self.every)
        if not self.rude:
            await peer.goaway(MAX_STREAM_ID)
            await anyio.sleep(0.05)
        self._last[peer] = max(peer.requests, default=0)
        await peer.goaway(self._last[peer])

    async def _process(self, request: RawRequest) -> None:
        self.processed.append(request.path)
        await anyio.sleep(self.work)
        await request.peer.respond(request.stream_id, body=b"ok")


@pytest.mark.parametrize("rude", [False, True], ids=["two steps", "at once"])
@pytest.mark.parametrize(("every", "work"), [(3.0, 0.5), (10.0, 15.0), (0.5, 0.4)])
async def test_k22_k24_a_balancer_that_retires_connections_fails_and_starves_nobody(
    every: float, work: float, rude: bool
) -> None:
    balancer = Balancer(every, work, rude=rude)
    async with RawServer.listen() as server, client(max_connections=1, age=None) as c:
        server.serve(balancer)
        longest = 0.0

        async def worker(number: int) -> None:
            nonlocal longest
            for turn in range(30):
                began = anyio.current_time()
                assert (await c.get(f"{server.url}/{number}/{turn}")).content == b"ok"
                longest = max(longest, anyio.current_time() - began)

        async with anyio.create_task_group() as tasks:
            for number in range(16):
                tasks.start_soon(worker, number)
        assert len(balancer.processed) == len(set(balancer.processed)) == 480
        assert len(server.peers) > 2
        # Nobody waited for anything but work, and, with more than two of them draining, for the first of these.
        assert longest < 2 * work + 0.5
        await anyio.sleep(every + 1.0)
        assert not pool_of(c)._states
        assert_counts_nothing(c)


async def test_k22_a_transports_connections_are_replaced_too() -> None:
    transport = h2keep.httpx2.AsyncKeepaliveTransport(verify=False, http1=False, max_connection_age=AGE)
    async with RawServer.listen() as server, httpx2.AsyncClient(transport=transport, timeout=None) as c:
        server.serve(answering())
        while anyio.current_time() < 450.0:
            assert (await c.get(server.url)).content == b"ok"
            await anyio.sleep(3.0)
        assert len(server.peers) == 5
        assert [peer.ended for peer in server.peers] == [True] * 4 + [False]


async def test_k22_while_as_many_drain_as_may_an_old_connection_goes_on() -> None:
    async with RawServer.listen() as server, client(max_connections=1) as c, task_group() as tasks:

        async def first_is_slow(peer: Peer) -> None:
            async with task_group() as answers:

                async def respond(request: RawRequest) -> None:
                    await anyio.sleep(1000.0 if request.stream_id == 1 else 0.0)
                    await peer.respond(request.stream_id, body=b"ok")

                while True:
                    answers.start_soon(respond, await peer.request())

        server.serve(first_is_slow)
        loads = [Load(c, server.url) for _ in range(8)]
        for load in loads:
            tasks.start_soon(load.run)
            # Each connection's first request is for ever, so each takes one of them.
            await anyio.sleep(50.0)
        await anyio.sleep(500.0)
        # Two drain, so the third may grow as old as it has to.
        assert len(server.peers) == 3
        assert not any(peer.ended for peer in server.peers)
        assert pool_of(c)._count._free == 2
        # Loads begin with a request, so those of the three are waiting; the others go on.
        assert sum(len(load.answers) > 100 for load in loads) == 5
        await anyio.sleep(300.0)
        assert server.peers[0].ended
        assert len(server.peers) >= 4
        assert not any(load.errors for load in loads)
        tasks.cancel_scope.cancel()
    assert_counts_nothing(c)
