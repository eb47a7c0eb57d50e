"""The runner with keepalive's real defaults, under virtual time: nobody waits, and nothing is sped up."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep.protocol import events
from support.clock import virtual_time
from support.raw import RawServer, answering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]

STREAMS = frames.SettingsFrame.MAX_CONCURRENT_STREAMS


def client(**options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(http1=False, timeout=None, keepalive=h2keep.Keepalive(jitter=0.0), **options)


async def test_k3_an_answer_after_half_an_hour_arrives() -> None:
    async with RawServer.listen() as server, client() as c:
        server.serve(answering(b"at last", delay=1799.0))
        began = anyio.current_time()
        response = await c.post(server.url, content=b"question")
        assert response.content == b"at last"
        assert anyio.current_time() - began == pytest.approx(1799.0, abs=0.1)
        pings = server.peers[0].pings
        assert [round(ping.at - began) for ping in pings] == list(range(30, 1800, 30))
        assert response.connection.pings_sent == response.connection.pings_acked == len(pings)


async def test_k4_k8_silence_for_ever_is_a_ping_timeout_after_45_seconds() -> None:
    async with RawServer.listen() as server, client() as c:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_fails_after, c, server.url, 45.0)
            tasks.start_soon(_fails_after, c, server.url, 45.0)
            peer = await server.accept()
            peer.auto_ack_pings = False
            await peer.handshake()
        assert len(server.peers) == 1
        server.serve(answering())
        assert (await c.get(server.url)).content == b"ok"
        assert len(server.peers) == 2


async def _fails_after(c: h2keep.AsyncClient, url: str, seconds: float) -> None:
    began = anyio.current_time()
    with pytest.raises(h2keep.PingTimeout) as caught:
        await c.get(url)
    assert anyio.current_time() - began == pytest.approx(seconds, abs=0.1)
    assert not caught.value.unprocessed


async def test_k11_an_unused_connection_is_left_alone() -> None:
    async with RawServer.listen() as server, client(limits=h2keep.Limits(keepalive_expiry=None)) as c:
        server.serve(answering())
        await c.get(server.url)
        await anyio.sleep(3600.0)
        assert not server.peers[0].pings


async def test_k9_a_long_unused_connection_must_answer_before_it_is_used() -> None:
    async with RawServer.listen() as server, client(limits=h2keep.Limits(keepalive_expiry=None)) as c:
        server.serve(answering())
        await c.get(server.url)
        await anyio.sleep(31.0)
        assert (await c.get(server.url)).content == b"ok"
        assert len(server.peers) == 1
        assert len(server.peers[0].pings) == 1


async def test_k9_a_connection_that_died_unused_costs_a_hedge_and_no_failure() -> None:
    async with RawServer.listen() as server, client(limits=h2keep.Limits(keepalive_expiry=None)) as c:
        server.serve(answering())
        await c.get(server.url)
        await anyio.sleep(31.0)
        server.peers[0].stop_reading()
        began = anyio.current_time()
        assert (await c.get(server.url)).content == b"ok"
        assert anyio.current_time() - began == pytest.approx(0.2, abs=0.01)
        assert len(server.peers) == 2
        assert not server.peers[0].seen(frames.HeadersFrame, 3)


async def test_k9_if_neither_the_old_nor_a_new_connection_works_the_dials_error_has_the_loss_as_cause() -> None:
    seen: list[Any] = []
    limits = h2keep.Limits(keepalive_expiry=None)
    async with client(limits=limits, event_hook=lambda stats, event: seen.append(event)) as c:
        async with RawServer.listen() as server:
            server.serve(answering())
            await c.get(server.url)
            url = server.url
            await anyio.sleep(31.0)
            server.peers[0].stop_reading()
            server.stop_listening()
            began = anyio.current_time()
            with pytest.raises(h2keep.ConnectError) as caught:
                await c.get(url)
            assert anyio.current_time() - began == pytest.approx(15.0, abs=1.0)
            assert isinstance(caught.value.__cause__, h2keep.PingTimeout)
            assert caught.value.unprocessed
        assert any(isinstance(event, events.ConnectionClosed) for event in seen)


async def test_unused_connections_are_closed_after_keepalive_expiry() -> None:
    async with RawServer.listen() as server, client(limits=h2keep.Limits(keepalive_expiry=60.0)) as c:
        server.serve(answering())
        await c.get(server.url)
        await anyio.sleep(59.0)
        await c.get(server.url)
        await anyio.sleep(59.0)
        assert not server.peers[0].ended
        await anyio.sleep(2.0)
        assert server.peers[0].ended
        assert len(server.peers[0].seen(frames.GoAwayFrame)) == 1


async def test_k13_an_origin_that_punishes_pings_is_asked_half_as_often(caplog: pytest.LogCaptureFixture) -> None:
    async with RawServer.listen() as server, client(replay_buffer=0) as c:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_is_going_away, c, server.url)
            peer = await server.accept()
            await peer.handshake()
            await (await peer.request()).complete()
            await anyio.sleep(100.0)
            await peer.goaway(0, 0xB, b"too_many_pings")
        server.serve(answering(delay=200.0))
        response = await c.get(server.url)
        assert response.connection.interval == 60.0
        assert len(server.peers[1].pings) == 3
        assert "read_idle_timeout goes from 30 s to 60 s" in caplog.text


async def test_k13_an_hour_of_good_conduct_reaches_connections_that_are_open() -> None:
    async with RawServer.listen() as server, client(replay_buffer=0) as c:
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(_is_going_away, c, server.url)
                peer = await server.accept()
                await peer.handshake()
                await (await peer.request()).complete()
                await peer.goaway(0, 0xB, b"too_many_pings")
                await anyio.sleep(0.1)
        server.serve(answering(delay=9000.0))
        began = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(c.get, server.url)
            peer = await server.peer(2)
            await anyio.sleep(8990.0)
            pings = [ping.at - began for ping in peer.pings]
            tasks.cancel_scope.cancel()
        gaps = {at: round(later - at) for at, later in itertools.pairwise(pings)}
        assert {gap for at, gap in gaps.items() if at < 3480.0} == {120}
        assert {gap for at, gap in gaps.items() if 3720.0 < at < 7140.0} == {60}
        assert {gap for at, gap in gaps.items() if at > 7260.0} == {30}


async def test_k13_an_hour_of_good_conduct_reaches_an_unused_connection_with_its_next_request() -> None:
    limits = h2keep.Limits(keepalive_expiry=None)
    async with RawServer.listen() as server, client(replay_buffer=0, limits=limits) as c:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_is_going_away, c, server.url)
            peer = await server.accept()
            await peer.handshake()
            await (await peer.request()).complete()
            await peer.goaway(0, 0xB, b"too_many_pings")
        server.serve(answering())
        assert (await c.get(server.url)).connection.interval == 60.0
        await anyio.sleep(3500.0)
        assert (await c.get(server.url)).connection.interval == 60.0
        await anyio.sleep(200.0)
        assert (await c.get(server.url)).connection.interval == 30.0
        assert len(server.peers) == 2


async def _once() -> AsyncIterator[bytes]:
    yield b"a body of which nothing is kept can't be sent again (K24)"


async def _is_going_away(c: h2keep.AsyncClient, url: str) -> None:
    with pytest.raises(h2keep.ConnectionGoingAway) as caught:
        await c.post(url, content=_once())
    assert caught.value.unprocessed


async def test_k20_the_hook_and_the_log_tell_of_every_ping(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "h2keep")
    seen: list[Any] = []

    def hook(stats: h2keep.ConnectionStats, event: Any) -> None:
        seen.append((stats.origin, type(event).__name__))
        if len(seen) == 2:
            raise ValueError("a hook's failure is the hook's")

    async with RawServer.listen() as server, client(event_hook=hook) as c:
        server.serve(answering(delay=31.0))
        await c.get(server.url)
    assert seen == [
        (server.url, name) for name in ("ConnectionReady", "PingSent", "PingAcknowledged", "ConnectionClosed")
    ]
    assert f"{server.url}: PING (idle)" in caplog.text
    assert "PING acknowledged after" in caplog.text
    assert "the event hook failed on PingSent" in caplog.text


async def test_k21_ping_acks_do_not_hold_back_a_streams_read_timeout() -> None:
    keepalive = h2keep.Keepalive(read_idle_timeout=5.0, ping_timeout=5.0)
    timeout = h2keep.Timeout(read=60.0)
    async with RawServer.listen() as server, h2keep.AsyncClient(http1=False, keepalive=keepalive, timeout=timeout) as c:
        server.serve(answering(delay=10_000.0))
        began = anyio.current_time()
        with pytest.raises(h2keep.ReadTimeout, match=r"within 60.0 s"):
            await c.get(server.url)
        assert anyio.current_time() - began == pytest.approx(60.0, abs=0.1)
        assert len(server.peers[0].pings) >= 11
        peer = server.peers[0]
        await peer.until(lambda: bool(peer.seen(frames.RstStreamFrame)))


async def test_k21_a_wedged_connection_is_left_after_two_timeouts() -> None:
    timeout = h2keep.Timeout(read=5.0)
    async with RawServer.listen() as server, h2keep.AsyncClient(http1=False, timeout=timeout) as c:
        server.serve(answering(delay=10_000.0))
        for _ in range(3):
            with pytest.raises(h2keep.ReadTimeout):
                await c.get(server.url)
        assert len(server.peers) == 2


async def test_a_blocked_origin_runs_into_the_pool_timeout() -> None:
    limits = h2keep.Limits(max_connections=1)
    async with (
        RawServer.listen() as server,
        h2keep.AsyncClient(http1=False, limits=limits, timeout=h2keep.Timeout(read=None)) as c,
    ):
        server.serve(answering(delay=100.0), {STREAMS: 1})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(c.get, server.url)
            await anyio.sleep(1.0)
            began = anyio.current_time()
            with pytest.raises(h2keep.PoolTimeout, match="1 connections are open"):
                await c.get(server.url)
            assert anyio.current_time() - began == pytest.approx(5.0, abs=0.1)


async def test_requests_beyond_the_stream_limit_wait_their_turn() -> None:
    limits = h2keep.Limits(max_connections=1)
    async with RawServer.listen() as server, h2keep.AsyncClient(http1=False, limits=limits, timeout=None) as c:
        server.serve(answering(delay=10.0), {STREAMS: 2})
        order: list[int] = []

        async def one(number: int) -> None:
            await c.get(server.url)
            order.append(number)

        await c.get(server.url)
        async with anyio.create_task_group() as tasks:
            for number in range(6):
                tasks.start_soon(one, number)
                await anyio.sleep(0.001)
        assert order == list(range(6))
        assert len(server.peers) == 1


async def test_a_server_that_accepts_and_says_nothing_runs_into_the_connect_timeout(
    client_ssl: Any,
) -> None:
    async with RawServer.listen() as server, h2keep.AsyncClient(verify=client_ssl) as c:
        began = anyio.current_time()
        with pytest.raises(h2keep.ConnectTimeout, match="connect timeout") as caught:
            await c.get(server.url.replace("http", "https"))
        assert anyio.current_time() - began == pytest.approx(5.0, abs=0.1)
        assert caught.value.unprocessed
