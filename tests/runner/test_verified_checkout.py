"""Connections that must prove themselves before their next request, over real sockets: K9 by its letters, and K10."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep.protocol import events
from runner.conftest import Ends
from support.clock import virtual_time
from support.raw import GONE, Peer, RawServer, answering, task_group

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Mapping

    from anyio.abc import TaskGroup

    from support.raw import Ping, RawRequest

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]

STREAMS = frames.SettingsFrame.MAX_CONCURRENT_STREAMS
ONE = h2keep.Limits(max_connections=1, keepalive_expiry=None)


class Link:
    """A raw server whose wire can be slow.

    It answers a request for "/7" after 7 seconds with the number of the connection.
    """

    def __init__(self, server: RawServer, client: h2keep.AsyncClient, tasks: TaskGroup) -> None:
        self.server, self.client, self._tasks = server, client, tasks
        self.settings: Mapping[int, int] = {}
        #: Seconds before further handshakes (of TLS) begin, and before ACKs of SETTINGS and of PINGs.
        self.handshake_delay = 0.0
        self.rtt = 0.0
        self.ack_delay = 0.0
        #: Paths in the order of their coming.
        self.order: list[str] = []
        #: What the client's event hook was told.
        self.seen: list[events.ConnectionEvent] = []

    def hook(self, _stats: h2keep.ConnectionStats, event: events.ConnectionEvent) -> None:
        self.seen.append(event)

    async def run(self) -> None:
        with contextlib.suppress(anyio.ClosedResourceError):
            while True:
                self._tasks.start_soon(self._serve, await self.server.accept())

    async def _serve(self, peer: Peer) -> None:
        peer.auto_ack_pings = peer.auto_ack_settings = False
        try:
            await anyio.sleep(self.handshake_delay)
            await peer.handshake(self.settings)
            await anyio.sleep(self.rtt)
            await peer.send(frames.SettingsFrame(0, flags=["ACK"]))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._acknowledge, peer)
                while True:
                    request = await peer.request()
                    self.order.append(request.path)
                    tasks.start_soon(self._answer, request)
        except* GONE:
            pass

    async def _answer(self, request: RawRequest) -> None:
        peer = request.peer
        await anyio.sleep(float(request.path[1:].partition("?")[0] or 0))
        if request.reset is None:
            await peer.respond(request.stream_id, body=b"%d" % self.server.peers.index(peer))

    async def _acknowledge(self, peer: Peer) -> None:
        acknowledged: list[Ping] = []
        while True:
            await peer.until(lambda: len(peer.pings) > len(acknowledged))
            ping = peer.pings[len(acknowledged)]
            acknowledged.append(ping)
            await anyio.sleep(self.ack_delay)
            await peer.send(frames.PingFrame(0, ping.payload, flags=["ACK"]))

    async def get(self, path: str = "/", **options: Any) -> tuple[bytes, float]:
        """The number of the connection that served it, and the seconds that took, to a tenth."""
        began = anyio.current_time()
        response = await self.client.get(self.server.url + path, **options)
        return response.content, round(anyio.current_time() - began, 1)

    def start(self, path: str = "/") -> None:
        """A request in the background."""
        self._tasks.start_soon(self.get, path)

    async def fall_silent(self) -> Peer:
        """Make one connection, and wait until it must prove itself."""
        content, _ = await self.get()
        assert content == b"0"
        await anyio.sleep(31.0)
        self.order.clear()
        return self.server.peers[0]


@contextlib.asynccontextmanager
async def linked(ends: Ends, **options: Any) -> AsyncIterator[Link]:
    links: list[Link] = []
    async with (
        ends.listen() as server,
        ends.client(event_hook=lambda *args: links[0].hook(*args), **options) as client,
        task_group() as tasks,
    ):
        links.append(Link(server, client, tasks))
        tasks.start_soon(links[0].run)
        yield links[0]


@pytest.fixture
def tls_ends(server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> Ends:
    return Ends(server_ssl, client_ssl)


# K9


async def test_k9a_k9b_one_ping_for_all_who_wait_and_its_ack_serves_them_in_order(ends: Ends) -> None:
    async with linked(ends) as link:
        peer = await link.fall_silent()
        link.ack_delay = 0.15
        paths = [f"/?{number}" for number in range(20)]
        for path in paths:
            link.start(path)
            await anyio.sleep(0.001)
        assert not link.order
        assert await link.get("/?last") == (b"0", 0.1)
        assert link.order == [*paths, "/?last"]
        assert len(peer.pings) == 1
        await anyio.sleep(60.0)
        assert len(link.server.peers) == 1


async def test_k9a_an_outstanding_ping_of_k3_serves_for_verification(ends: Ends) -> None:
    async with linked(ends, limits=ONE) as link:
        assert await link.get() == (b"0", 0.0)
        link.ack_delay = 10.0
        link.start("/60")
        await anyio.sleep(32.0)
        # It was sent two seconds ago.
        assert await link.get() == (b"0", 8.0)
        assert len(link.server.peers[0].pings) == 1


async def test_k9b_any_life_will_do(ends: Ends) -> None:
    async with linked(ends) as link:
        peer = await link.fall_silent()
        link.ack_delay = 12.0
        link.start()
        await anyio.sleep(0.1)
        assert not link.order
        await peer.send(frames.WindowUpdateFrame(0, 1))
        await anyio.sleep(0.0)
        await peer.until(lambda: len(peer.requests) == 2)
        assert anyio.current_time() == pytest.approx(31.1, abs=0.01)


@pytest.mark.parametrize("end", ["goaway", "eof", "abort"])
async def test_k9b_k24_a_goodbye_is_no_life_to_open_requests_on(ends: Ends, end: str) -> None:
    async with linked(ends) as link:
        peer = await link.fall_silent()
        link.ack_delay = 12.0

        async def end_soon() -> None:
            await anyio.sleep(0.1)
            if end == "goaway":
                await peer.goaway(1)
            elif end == "eof":
                await peer.eof()
            else:
                peer.abort()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end_soon)
            # Nobody waits for the hedge any more.
            assert await link.get() == (b"1", 0.1)
        assert len(peer.requests) == 1


async def test_k9c_a_dial_begins_after_200_ms(ends: Ends) -> None:
    async with linked(ends) as link:
        peer = await link.fall_silent()
        peer.stop_reading()
        assert await link.get() == (b"1", 0.2)
        peer.resume_reading()
        await peer.until(lambda: len(peer.pings) == 1)
        assert len(peer.requests) == 1


async def test_k9c_a_dial_begins_after_three_round_trips_if_these_are_longer(ends: Ends) -> None:
    async with linked(ends) as link:
        link.rtt = 0.5
        peer = await link.fall_silent()
        link.rtt = 0.0
        peer.stop_reading()
        link.start()
        await anyio.sleep(0.7)
        # The time counts from the first in the queue.
        assert await link.get() == (b"1", 0.8)
        assert len(link.server.peers) == 2


async def test_k9c_the_dial_may_exceed_max_connections_by_one(ends: Ends) -> None:
    async with linked(ends, limits=ONE) as link:
        peer = await link.fall_silent()
        peer.stop_reading()
        for _ in range(5):
            link.start()
        assert await link.get() == (b"1", 0.2)
        assert len(link.server.peers) == 2
        # The new one is in use, so the old one makes way at once (K9d).
        peer.resume_reading()
        await peer.until(lambda: bool(peer.seen(frames.GoAwayFrame)))


async def test_k9c_no_dial_exceeds_max_connections_while_a_stream_is_open_on_the_old_one(ends: Ends) -> None:
    async with linked(ends, limits=ONE) as link:
        link.start("/100")
        await anyio.sleep(1.0)
        link.ack_delay = 9.0
        await anyio.sleep(30.0)
        assert await link.get() == (b"0", 8.0)
        assert len(link.server.peers) == 1


async def test_k9c_a_stream_on_the_old_one_forbids_no_dial_within_max_connections(ends: Ends) -> None:
    async with linked(ends) as link:
        link.start("/100")
        await anyio.sleep(1.0)
        link.ack_delay = 9.0
        await anyio.sleep(30.0)
        assert await link.get() == (b"1", 0.2)


async def test_k9d_the_old_one_may_win_and_both_stay(tls_ends: Ends) -> None:
    # With TLS, because the kernel alone ends a dial without it.
    async with linked(tls_ends) as link:
        await link.fall_silent()
        link.ack_delay, link.handshake_delay = 1.0, 3.0
        assert await link.get() == (b"0", 1.0)
        await anyio.sleep(5.0)
        assert [peer.ended for peer in link.server.peers] == [False, False]
        assert await link.get() == (b"1", 0.0)


async def test_k9d_over_the_limit_the_one_without_open_streams_is_closed(tls_ends: Ends) -> None:
    async with linked(tls_ends, limits=ONE) as link:
        old = await link.fall_silent()
        link.ack_delay, link.handshake_delay = 1.0, 3.0
        link.start("/100")
        await anyio.sleep(3.5)
        new = link.server.peers[1]
        await anyio.sleep(0.1)
        assert new.ended
        assert len(old.requests) == 2
        assert not old.seen(frames.GoAwayFrame)
        assert await link.get() == (b"0", 0.0)


async def test_k9d_among_other_origins_the_old_one_of_this_origin_makes_way(plain_ends: Ends) -> None:
    limits = h2keep.Limits(max_connections=2, keepalive_expiry=None)
    async with linked(plain_ends, limits=limits) as link, RawServer.listen() as another:
        another.serve(answering())
        await link.client.get(another.url)
        old = await link.fall_silent()
        old.stop_reading()
        assert await link.get() == (b"1", 0.2)
        old.resume_reading()
        await anyio.sleep(0.1)
        assert old.ended
        assert not another.peers[0].ended


async def test_k9e_a_failed_dial_fails_nobody_while_the_ping_is_outstanding(ends: Ends) -> None:
    async with linked(ends) as link:
        await link.fall_silent()
        link.server.stop_listening()
        link.ack_delay = 10.0
        assert await link.get() == (b"0", 10.0)


async def test_k9e_a_failed_ping_fails_nobody_while_a_dial_runs(tls_ends: Ends) -> None:
    async with linked(tls_ends) as link:
        peer = await link.fall_silent()
        peer.stop_reading()
        link.handshake_delay = 20.0
        assert await link.get() == (b"1", 20.2)
        assert [type(event.error) for event in link.seen if isinstance(event, events.ConnectionClosed)] == [
            h2keep.PingTimeout
        ]


async def test_k9e_a_dial_that_fails_after_the_ping_has_it_as_its_cause(tls_ends: Ends) -> None:
    async with linked(tls_ends) as link:
        peer = await link.fall_silent()
        peer.stop_reading()
        link.handshake_delay = 60.0
        began = anyio.current_time()
        with pytest.raises(h2keep.ConnectTimeout, match=r"within 30.0 s") as caught:
            await link.get(timeout=h2keep.Timeout(connect=30.0, pool=None))
        assert anyio.current_time() - began == pytest.approx(30.2, abs=0.1)
        assert isinstance(caught.value.__cause__, h2keep.PingTimeout)
        assert caught.value.unprocessed


async def test_k9e_a_loss_of_long_ago_is_no_cause(tls_ends: Ends) -> None:
    async with linked(tls_ends) as link:
        link.start("/100000")
        await anyio.sleep(1.0)
        # The first takes no more requests, and the second dies unused.
        await link.server.peers[0].goaway(1)
        await anyio.sleep(0.1)
        assert await link.get() == (b"1", 0.0)
        link.server.peers[1].abort()
        await anyio.sleep(3600.0)
        link.server.stop_listening()
        with pytest.raises(h2keep.ConnectError, match="refused") as caught:
            await link.get()
        assert not isinstance(caught.value.__cause__, h2keep.ConnectionLost)


async def test_k9f_waiting_for_life_counts_against_the_pool_timeout(ends: Ends) -> None:
    async with linked(ends, limits=ONE) as link:
        link.start("/100")
        await anyio.sleep(1.0)
        link.ack_delay = 10.0
        await anyio.sleep(30.0)
        began = anyio.current_time()
        with pytest.raises(h2keep.PoolTimeout, match=r"within 3 s \(pool timeout\); 1 connections are open") as caught:
            await link.get(timeout=h2keep.Timeout(connect=1, read=None, pool=3))
        assert anyio.current_time() - began == pytest.approx(3.0, abs=0.01)
        assert caught.value.unprocessed
        # Only the one who was in a hurry gave up.
        assert await link.get() == (b"0", 6.0)
        assert "/100" in link.order


async def test_k9f_the_hedge_counts_against_the_connect_timeout(tls_ends: Ends) -> None:
    async with linked(tls_ends) as link:
        await link.fall_silent()
        link.ack_delay, link.handshake_delay = 10.0, 60.0
        # The dial is over after a second, which is no reason not to wait for life.
        assert await link.get(timeout=h2keep.Timeout(connect=1.0, pool=11.0)) == (b"0", 10.0)


async def test_k9g_verification_is_independent_of_k11_but_not_of_keepalive_itself(ends: Ends) -> None:
    off = h2keep.Keepalive(read_idle_timeout=None)
    async with linked(ends, keepalive=off) as link:
        peer = await link.fall_silent()
        await anyio.sleep(3600.0)
        assert await link.get() == (b"0", 0.0)
        assert not peer.pings


@pytest.mark.parametrize(("read_idle_timeout", "silence", "pings"), [(5.0, 4.9, 0), (5.0, 5.1, 1), (300.0, 31.0, 1)])
async def test_k9_a_connection_is_unverified_after_the_configured_time_or_30_seconds(
    ends: Ends, read_idle_timeout: float, silence: float, pings: int
) -> None:
    keepalive = h2keep.Keepalive(read_idle_timeout=read_idle_timeout, jitter=0.0)
    async with linked(ends, keepalive=keepalive) as link:
        await link.get()
        await anyio.sleep(silence)
        assert await link.get() == (b"0", 0.0)
        assert len(link.server.peers[0].pings) == pings


async def test_k9_nobody_waits_for_life_that_nobody_asked_for(ends: Ends) -> None:
    async with linked(ends) as link:
        peer = await link.fall_silent()
        link.ack_delay = 0.15
        with anyio.move_on_after(0.1):
            await link.get()
        await anyio.sleep(20.0)
        # The request was never sent, its PING's ACK made the connection good for the next.
        assert len(peer.requests) == 1
        assert len(link.server.peers) == 1
        assert await link.get() == (b"0", 0.0)
        assert len(peer.pings) == 1


# K10


async def cancelled_after(link: Link, seconds: float, path: str = "/1000") -> None:
    with anyio.move_on_after(seconds) as scope:
        await link.get(path)
    assert scope.cancelled_caught


async def test_k10_a_request_given_up_after_silence_puts_its_connection_to_the_test(ends: Ends) -> None:
    async with linked(ends, limits=ONE) as link:
        assert await link.get() == (b"0", 0.0)
        peer = link.server.peers[0]
        link.ack_delay = 0.1
        await cancelled_after(link, 2.0)
        assert await link.get() == (b"0", 0.1)
        [rst] = peer.seen(frames.RstStreamFrame)
        [ping] = peer.seen(frames.PingFrame)
        assert rst.error_code == 8
        # In one go, the RST first.
        assert peer.frames.index(ping) == peer.frames.index(rst) + 1


async def test_k10_its_slot_stays_taken_until_life_comes(ends: Ends) -> None:
    async with linked(ends, limits=ONE) as link:
        link.settings = {STREAMS: 1}
        assert await link.get() == (b"0", 0.0)
        link.ack_delay = 0.1
        await cancelled_after(link, 2.0)
        # With its only slot taken it is unverified, and not merely full: it is waited for, not replaced.
        assert await link.get() == (b"0", 0.1)
        assert len(link.server.peers) == 1


@pytest.mark.parametrize("why", ["soon", "life"])
async def test_k10_a_request_given_up_soon_or_after_life_proves_nothing(ends: Ends, why: str) -> None:
    async with linked(ends) as link:
        assert await link.get() == (b"0", 0.0)
        peer = link.server.peers[0]
        if why == "soon":
            await cancelled_after(link, 0.9)
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancelled_after, link, 5.0)
                await anyio.sleep(1.0)
                await peer.send(frames.PingFrame(0, b"12345678"))
        assert await link.get() == (b"0", 0.0)
        assert len(peer.seen(frames.RstStreamFrame)) == 1
        assert not peer.pings


async def test_k10_no_second_ping_until_progress(ends: Ends) -> None:
    async with linked(ends) as link:
        assert await link.get() == (b"0", 0.0)
        peer = link.server.peers[0]
        await cancelled_after(link, 2.0)
        await anyio.sleep(0.01)
        assert len(peer.pings) == 1
        # The ACK is life, so requests go on, but not the answer that would prove the server behind it.
        await cancelled_after(link, 2.0)
        await anyio.sleep(0.01)
        assert len(peer.pings) == 1
        assert len(peer.seen(frames.RstStreamFrame)) == 2
        # K9's is another matter, and the answer is progress.
        assert await link.get() == (b"0", 0.0)
        assert len(peer.pings) == 2
        await cancelled_after(link, 2.0)
        await anyio.sleep(0.01)
        assert len(peer.pings) == 3


async def test_k10_streams_in_flight_are_not_touched(ends: Ends) -> None:
    async with linked(ends) as link:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link.get, "/20")
            await anyio.sleep(1.0)
            link.ack_delay = 5.0
            await cancelled_after(link, 2.0)
        assert [request.reset for request in link.server.peers[0].requests.values()] == [None, 8]


async def test_k10_a_request_that_was_never_sent_leaves_no_trace(ends: Ends) -> None:
    async with linked(ends) as link:
        peer = await link.fall_silent()
        link.ack_delay = 5.0
        link.server.stop_listening()
        await cancelled_after(link, 2.0)
        await anyio.sleep(10.0)
        assert len(peer.requests) == 1
        assert not peer.seen(frames.RstStreamFrame)
