"""What keepalive costs, shows and leaves alone, over real sockets under virtual time: K13, K14, K17, K20 and K21."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep.keepalive import PingPurpose
from h2keep.protocol import events
from support.clock import virtual_time
from support.leaks import running_tasks
from support.raw import RawServer, answering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from runner.conftest import Ends
    from support.raw import Peer

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]

SETTINGS = frames.SettingsFrame
WIDE_OPEN = {SETTINGS.INITIAL_WINDOW_SIZE: 2**31 - 1}
ENHANCE_YOUR_CALM = 0xB


# Punishment


async def test_k13_the_other_connections_of_the_origin_slow_down_at_once(
    plain_ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        plain_ends.listen() as server,
        RawServer.listen() as elsewhere,
        plain_ends.client(replay_buffer=0) as c,
    ):
        server.serve(answering(delay=400.0), {SETTINGS.MAX_CONCURRENT_STREAMS: 1})
        elsewhere.serve(answering(delay=400.0))
        intervals: list[float | None] = []

        async def get(url: str) -> None:
            intervals.append((await c.get(url)).connection.interval)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_is_going_away, c, server.url)
            await anyio.sleep(1.0)
            tasks.start_soon(get, server.url)
            tasks.start_soon(get, elsewhere.url)
            # Three PINGs without progress, and the last one's was one too many.
            await anyio.sleep(95.0)
            await server.peers[0].goaway(0, ENHANCE_YOUR_CALM, b"less, please")
            await anyio.sleep(0.1)
            counted = [len(server.peers[1].pings), len(elsewhere.peers[0].pings)]
            await anyio.sleep(240.0)
            assert len(server.peers[1].pings) - counted[0] == 4
            assert len(elsewhere.peers[0].pings) - counted[1] == 8
        assert sorted(interval or 0.0 for interval in intervals) == [30.0, 60.0]
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.name == "h2keep"
    assert "read_idle_timeout goes from 30 s to 60 s" in warning.getMessage()
    assert "middleboxes" not in warning.getMessage()


async def test_k13_above_a_minute_the_warning_tells_of_middleboxes(
    plain_ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    async with plain_ends.listen() as server, plain_ends.client(replay_buffer=0) as c:
        for expected in (60.0, 120.0, 240.0, 330.0, 330.0):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_is_going_away, c, server.url)
                peer = await server.accept()
                await peer.handshake()
                await (await peer.request()).complete()
                await peer.goaway(0, ENHANCE_YOUR_CALM, b"too_many_pings")
            assert f" to {expected:g} s for this origin" in caplog.messages[-1]
            assert ("middleboxes may now forget the connection" in caplog.messages[-1]) == (expected > 60)


async def test_k13_other_reasons_for_calm_change_nothing_and_are_logged(
    plain_ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "h2keep")
    async with plain_ends.listen() as server, plain_ends.client(replay_buffer=0) as c:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_is_going_away, c, server.url)
            peer = await server.accept()
            await peer.handshake()
            await (await peer.request()).complete()
            await anyio.sleep(35.0)
            await peer.goaway(0, ENHANCE_YOUR_CALM, b"too_many_resets")
        server.serve(answering())
        assert (await c.get(server.url)).connection.interval == 30.0
    assert "b'too_many_resets'" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def _once() -> AsyncIterator[bytes]:
    yield b"a body of which nothing is kept can't be sent again (K24)"


async def _is_going_away(c: h2keep.AsyncClient, url: str) -> None:
    with pytest.raises(h2keep.ConnectionGoingAway):
        await c.post(url, content=_once())


# Cost and ends


async def test_k14_as_many_tasks_for_a_hundred_streams_as_for_one(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c, contextlib.AsyncExitStack() as stack:

        async def begin_to_answer(peer: Peer) -> None:
            while True:
                await peer.respond((await peer.request()).stream_id, end_stream=False)

        server.serve(begin_to_answer)
        first = await stack.enter_async_context(c.stream("GET", server.url))
        tasks = running_tasks()
        for _ in range(99):
            await stack.enter_async_context(c.stream("GET", server.url))
        assert first.connection.open_streams == 100
        assert running_tasks() == tasks
        await anyio.sleep(1000.0)
        assert running_tasks() == tasks
        # One PING for all of them.
        assert len(server.peers[0].pings) == 33


async def test_k17_after_a_goaway_pings_go_on_while_a_stream_is_open(ends: Ends) -> None:
    async with ends.listen() as server, ends.client(keepalive=h2keep.Keepalive(while_idle=True, jitter=0.0)) as c:

        async def go_away(peer: Peer) -> None:
            request = await peer.request()
            await peer.goaway(request.stream_id)
            await anyio.sleep(100.0)
            await peer.respond(request.stream_id, body=b"promised")
            with contextlib.suppress(anyio.EndOfStream):
                await peer.until(lambda: False)

        server.serve(go_away)
        assert (await c.get(server.url)).content == b"promised"
        await anyio.sleep(100.0)
        [peer] = server.peers
        assert len(peer.pings) == 3
        assert peer.ended
        assert peer.error is None


async def test_k17_after_a_goaway_a_dead_peer_is_still_found(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:

        async def go_away_and_die(peer: Peer) -> None:
            request = await peer.request()
            await peer.goaway(request.stream_id)
            peer.stop_reading()

        server.serve(go_away_and_die)
        began = anyio.current_time()
        with pytest.raises(h2keep.PingTimeout):
            await c.get(server.url)
        assert anyio.current_time() - began == pytest.approx(45.0, abs=0.1)


def tasks_of_connections() -> list[str]:
    return [repr(task) for task in running_tasks() if "SocketDriver" in repr(task)]


@pytest.mark.parametrize("end", ["closed", "lost", "ended by the server"])
async def test_k14_k17_no_task_outlives_its_connection(ends: Ends, end: str, anyio_backend_name: str) -> None:
    async with ends.listen() as server, ends.client(keepalive=h2keep.Keepalive(while_idle=True)) as c:
        server.serve(answering())
        await c.get(server.url)
        [peer] = server.peers
        # However many requests there are: asyncio's callbacks need but one, which notices the loop's end.
        assert len(tasks_of_connections()) == {"asyncio": 1, "trio": 3}[anyio_backend_name]
        if end == "closed":
            await c.aclose()
        elif end == "lost":
            peer.stop_reading()
            await anyio.sleep(60.0)
        else:
            await peer.eof()
            await anyio.sleep(1.0)
        assert not tasks_of_connections()
        # No PING of a timer that was forgotten (K3 would have sent one).
        before = len(peer.pings)
        peer.resume_reading()
        await anyio.sleep(60.0)
        assert len(peer.pings) - before <= (end == "lost")


# Observable


async def test_k20_the_figures_of_a_connection(ends: Ends) -> None:
    seen: list[tuple[h2keep.ConnectionStats, Any]] = []
    async with ends.listen() as server, ends.client(event_hook=lambda *args: seen.append(args)) as c:
        server.serve(answering(delay=70.0))
        began = anyio.current_time()
        response = await c.get(server.url)
        stats = response.connection
        assert stats.origin == server.url
        assert (stats.requests, stats.open_streams) == (1, 0)
        assert (stats.pings_sent, stats.pings_acked) == (2, 2)
        assert stats.last_life == pytest.approx(began + 70.0, abs=0.01)
        assert stats.last_ping_at == pytest.approx(began + 60.0, abs=0.01)
        assert stats.ready_at == pytest.approx(began, abs=0.01)
        assert stats.rtt_last is not None
        assert 0.0 <= (stats.rtt_best or 0.0) <= (stats.rtt_smoothed or 0.0) <= 0.01
        assert stats.interval == 30.0
        assert stats.error is None
        assert f"pings_sent={stats.pings_sent}" in repr(stats)
        server.peers[0].stop_reading()
        with pytest.raises(h2keep.PingTimeout):
            await c.get(server.url)
        assert isinstance(stats.error, h2keep.PingTimeout)
        assert stats.as_dict()["requests"] == 2
    assert [(type(event), stats.origin) for stats, event in seen] == [
        (kind, server.url)
        for kind in [
            events.ConnectionReady,
            *[events.PingSent, events.PingAcknowledged] * 2,
            events.PingSent,
            events.ConnectionClosed,
        ]
    ]
    purposes = [event.purpose for _, event in seen if isinstance(event, events.PingSent)]
    assert purposes == [PingPurpose.IDLE] * 3
    closed = seen[-1][1]
    assert isinstance(closed.error, h2keep.PingTimeout)
    assert closed.at == pytest.approx(began + 115.0, abs=0.1)


async def test_k20_every_ping_at_debug_and_every_loss_at_info(
    plain_ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with plain_ends.listen() as server, plain_ends.client() as c:
        server.serve(answering(delay=31.0))
        await c.get(server.url)
        server.peers[0].stop_reading()
        with pytest.raises(h2keep.PingTimeout):
            await c.get(server.url)
        await c.get(server.url)
        await server.peers[1].goaway(1, 0, b"bye")
        await anyio.sleep(1.0)
    records = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "h2keep"]
    ping, ack = ("DEBUG", f"{server.url}: PING (idle)"), ("DEBUG", f"{server.url}: PING acknowledged after 0.0 ms")
    [loss] = [record for record in records if record[0] == "INFO" and "the connection is dead" in record[1]]
    goaway = ("INFO", f"{server.url}: GOAWAY, error code 0, b'bye'")
    assert records == [ping, ack, ping, loss, ping, ack, goaway]


async def test_k20_pings_are_logged_from_when_that_is_asked_for(
    plain_ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with plain_ends.listen() as server, plain_ends.client() as c:
        server.serve(answering(delay=130.0))

        async def switch() -> None:
            await anyio.sleep(70.0)
            assert len(server.peers[0].pings) == 2
            assert "PING" not in caplog.text
            caplog.set_level("DEBUG")
            await anyio.sleep(30.0)
            assert caplog.text.count("PING (idle)") == caplog.text.count("PING acknowledged") == 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(switch)
            await c.get(server.url)


# Timeouts belong to streams


async def test_k21_a_read_timeout_fires_amid_ping_acks_and_touches_no_other_stream(ends: Ends) -> None:
    quick = h2keep.Keepalive(read_idle_timeout=2.0, ping_timeout=2.0)
    async with ends.listen() as server, ends.client(keepalive=quick) as c:
        server.serve(answering(b"in time", delay=50.0))
        began = anyio.current_time()
        ended: dict[str, float] = {}

        async def hurried() -> None:
            with pytest.raises(h2keep.ReadTimeout, match=r"no response came on the stream within 20.0 s"):
                await c.get(server.url, timeout=h2keep.Timeout(read=20.0))
            ended["hurried"] = anyio.current_time() - began

        async def patient() -> None:
            assert (await c.get(server.url)).content == b"in time"
            ended["patient"] = anyio.current_time() - began

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hurried)
            tasks.start_soon(patient)
        assert ended["hurried"] == pytest.approx(20.0, abs=0.1)
        assert ended["patient"] == pytest.approx(50.0, abs=0.1)
        peer = server.peers[0]
        assert len(peer.pings) >= 24
        assert [rst.error_code for rst in peer.seen(frames.RstStreamFrame)] == [8]
        assert len(server.peers) == 1


async def test_k21_another_streams_data_does_not_restart_the_clock(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:

        async def talk_to_one(peer: Peer) -> None:
            first, _ = await peer.request(), await peer.request()
            await peer.respond(first.stream_id, end_stream=False)
            for _ in range(60):
                await anyio.sleep(1.0)
                await peer.send_data(first.stream_id, b"x")
            await peer.send_data(first.stream_id, b"", end_stream=True)

        server.serve(talk_to_one)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(c.get, server.url)
            await anyio.sleep(0.1)
            began = anyio.current_time()
            with pytest.raises(h2keep.ReadTimeout):
                await c.get(server.url, timeout=h2keep.Timeout(read=5.0))
            assert anyio.current_time() - began == pytest.approx(5.0, abs=0.1)


async def test_k21_the_read_clock_stands_still_while_the_consumer_does_not_wait(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:

        async def answer_in_two_parts(peer: Peer) -> None:
            request = await peer.request()
            await peer.respond(request.stream_id, body=b"first", end_stream=False)
            await anyio.sleep(100.0)
            await peer.send_data(request.stream_id, b"second", end_stream=True)

        server.serve(answer_in_two_parts)
        async with c.stream("GET", server.url, timeout=h2keep.Timeout(read=5.0)) as response:
            chunks = response.aiter_bytes()
            await anyio.sleep(50.0)
            assert await anext(chunks) == b"first"
            await anyio.sleep(46.0)
            assert await anext(chunks) == b"second"


async def test_k21_the_read_clock_does_not_run_before_the_request_is_out(ends: Ends) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(10):
            await anyio.sleep(3.0)
            yield b"x"

    async with ends.listen() as server, ends.client() as c:
        server.serve(answering(delay=1.9))
        response = await c.post(server.url, content=body(), timeout=h2keep.Timeout(read=2.0, write=2.0))
        assert response.content == b"ok"


@pytest.mark.parametrize(
    ("obstacle", "text"),
    [
        ("stream", "the stream's flow-control window took no bytes within 7.0 s"),
        ("connection", "the connection's flow-control window took no bytes within 7.0 s"),
        ("socket", "the socket took no bytes within 7.0 s"),
    ],
)
async def test_k21_a_write_timeout_says_what_was_in_the_way(ends: Ends, obstacle: str, text: str) -> None:
    async with ends.listen(receive_buffer=8_192) as server, ends.client() as c:

        async def block(peer: Peer) -> None:
            peer.keep_bodies = peer.auto_window = False
            if obstacle != "connection":
                await peer.send(frames.WindowUpdateFrame(0, 2**31 - 1 - 65_535))
            if obstacle == "socket":
                await peer.request()
                peer.stop_reading()
            with contextlib.suppress(anyio.EndOfStream):
                await peer.until(lambda: False)

        server.serve(block, {} if obstacle == "stream" else WIDE_OPEN)
        began = anyio.current_time()
        with pytest.raises(h2keep.WriteTimeout, match=text) as caught:
            await c.post(server.url, content=b"x" * 30_000_000, timeout=h2keep.Timeout(read=None, write=7.0))
        assert anyio.current_time() - began == pytest.approx(7.0, abs=0.5)
        assert not caught.value.unprocessed


async def test_k21_every_byte_handed_over_restarts_the_write_clock(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c, anyio.create_task_group() as tasks:

        async def upload() -> None:
            timeout = h2keep.Timeout(read=None, write=7.0)
            response = await c.post(server.url, content=b"x" * 100_000, timeout=timeout)
            assert response.content == b"all of it"

        tasks.start_soon(upload)
        peer = await server.accept()
        peer.auto_window = False
        await peer.handshake()
        request = await peer.request()
        began = anyio.current_time()
        while not request.ended:
            await anyio.sleep(6.0)
            await peer.send(frames.WindowUpdateFrame(0, 7_000), frames.WindowUpdateFrame(request.stream_id, 7_000))
            await anyio.sleep(0.1)
        await peer.respond(request.stream_id, body=b"all of it")
        assert anyio.current_time() - began == pytest.approx(30.5, abs=0.1)


async def test_k21_two_timeouts_in_a_row_retire_a_connection_but_not_its_streams(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering(b"in flight", delay=60.0))
        results: list[bytes] = []

        async def patient() -> None:
            results.append((await c.get(server.url)).content)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(patient)
            for _ in range(2):
                with pytest.raises(h2keep.ReadTimeout):
                    await c.get(server.url, timeout=h2keep.Timeout(read=5.0))
            assert len(server.peers) == 1
            with pytest.raises(h2keep.ReadTimeout):
                await c.get(server.url, timeout=h2keep.Timeout(read=5.0))
            assert len(server.peers) == 2
        assert results == [b"in flight"]
        await anyio.sleep(1.0)
        # Its last stream has ended, and nothing new will come.
        assert server.peers[0].seen(frames.GoAwayFrame)
        assert server.peers[0].ended


async def test_k21_progress_between_two_timeouts_forgives_the_first(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:

        async def answer_every_other(peer: Peer) -> None:
            while True:
                await peer.request()
                await peer.respond((await peer.request()).stream_id)

        server.serve(answer_every_other)
        for _ in range(5):
            with pytest.raises(h2keep.ReadTimeout):
                await c.get(server.url, timeout=h2keep.Timeout(read=5.0))
            await c.get(server.url)
        assert len(server.peers) == 1
