"""Detection of dead connections over real sockets, with and without TLS, under virtual time: K2 to K8, K11 to K17."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep.protocol import events
from support.clock import virtual_time
from support.raw import answering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from runner.conftest import Ends
    from support.raw import Peer

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]

SETTINGS = frames.SettingsFrame
#: A peer's windows that never stop an upload.
WIDE_OPEN = {SETTINGS.INITIAL_WINDOW_SIZE: 2**31 - 1}


async def outcome(call: Callable[..., Awaitable[h2keep.Response]], *args: Any, **options: Any) -> Any:
    """What came of a request: its response, or the error that it raised."""
    try:
        return await call(*args, **options)
    except h2keep.H2KeepError as error:
        return error


async def gather(*calls: Callable[[], Awaitable[Any]]) -> list[tuple[float, Any]]:
    """Run all at once: when each ended, and what it returned."""
    results: list[tuple[float, Any]] = [(0.0, None)] * len(calls)

    async def run(index: int) -> None:
        result = await outcome(calls[index])
        results[index] = anyio.current_time(), result

    async with anyio.create_task_group() as tasks:
        for index in range(len(calls)):
            tasks.start_soon(run, index)
    return results


def black_hole(peer: Peer) -> None:
    """From now on the peer's machine is gone: nothing is read, nothing is said."""
    peer.auto_ack_pings = peer.auto_ack_settings = peer.auto_window = False
    peer.stop_reading()


# A slow answer


async def test_k3_k15_a_slow_answer_sees_pings_after_jittered_intervals(ends: Ends) -> None:
    async with ends.listen() as server, ends.client(keepalive=h2keep.Keepalive()) as c, ends.client(
        keepalive=h2keep.Keepalive()
    ) as other:  # fmt: skip
        server.serve(answering(b"at last", delay=1800.0))
        began = anyio.current_time()
        answers = await gather(lambda: c.get(server.url), lambda: other.get(server.url))
        assert [response.content for _, response in answers] == [b"at last"] * 2
        series = [[began, *(ping.at for ping in peer.pings)] for peer in server.peers]
        for times in series:
            gaps = [after - before for before, after in itertools.pairwise(times)]
            # The ACK comes at once, so each PING is the beginning of the next silence.
            assert all(27.0 - 0.01 <= gap <= 30.0 + 0.01 for gap in gaps)
            assert 60 <= len(gaps) <= 66
            assert max(gaps) - min(gaps) > 0.5
        assert series[0][1:] != series[1][1:]


async def test_k3_each_ping_has_bytes_of_its_own(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering(delay=301.0))
        response = await c.get(server.url)
        payloads = [ping.payload for ping in server.peers[0].pings]
        assert len(payloads) == len(set(payloads)) == 10
        assert all(len(payload) == 8 for payload in payloads)
        assert response.connection.rtt_best == response.connection.rtt_last == pytest.approx(0.0, abs=0.01)


async def test_k3_an_ack_that_matches_nothing_is_life_and_otherwise_ignored(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c, anyio.create_task_group() as tasks:
        tasks.start_soon(c.get, server.url)
        peer = await server.accept()
        await peer.handshake()
        request = await peer.request()
        began = anyio.current_time()
        await anyio.sleep(20.0)
        await peer.send(frames.PingFrame(0, b"mistaken", flags=["ACK"]))
        await peer.expect(frames.PingFrame, flags=set())
        assert anyio.current_time() - began == pytest.approx(50.0, abs=0.01)
        await peer.respond(request.stream_id)


async def test_k3_data_puts_the_ping_off(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c, anyio.create_task_group() as tasks:
        tasks.start_soon(c.get, server.url)
        peer = await server.accept()
        await peer.handshake()
        request = await peer.request()
        await peer.respond(request.stream_id, end_stream=False)
        for _ in range(20):
            await anyio.sleep(29.0)
            await peer.send_data(request.stream_id, b"x")
        assert not peer.pings
        await peer.send_data(request.stream_id, b"", end_stream=True)


async def test_k11_while_idle_pings_go_on_between_requests_and_find_the_dead(ends: Ends) -> None:
    seen: list[Any] = []
    keepalive = h2keep.Keepalive(while_idle=True, jitter=0.0)
    async with ends.listen() as server, ends.client(
        keepalive=keepalive, event_hook=lambda _, event: seen.append(event)
    ) as c:  # fmt: skip
        server.serve(answering())
        began = anyio.current_time()
        await c.get(server.url)
        await anyio.sleep(301.0)
        peer = server.peers[0]
        assert [round(ping.at - began) for ping in peer.pings] == list(range(30, 301, 30))
        await c.get(server.url)
        black_hole(peer)
        await anyio.sleep(46.0)
        closed = seen[-1]
        assert isinstance(closed, events.ConnectionClosed)
        assert isinstance(closed.error, h2keep.PingTimeout)
        before = anyio.current_time()
        assert (await c.get(server.url)).content == b"ok"
        # The dead one is known to be dead: nobody waits for it, nobody hedges.
        assert anyio.current_time() - before < 0.01
        assert len(server.peers) == 2


async def test_k11_the_last_streams_end_disarms_a_ping_not_yet_sent(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering(delay=29.0))
        await c.get(server.url)
        await anyio.sleep(600.0)
        assert not server.peers[0].pings


async def test_k11_an_outstanding_ping_is_judged_though_the_last_stream_is_closed(ends: Ends) -> None:
    seen: list[Any] = []
    async with ends.listen() as server, ends.client(event_hook=lambda _, event: seen.append(event)) as c:
        began = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(c.get, server.url)
            peer = await server.accept()
            await peer.handshake()
            black_hole(peer)
            await anyio.sleep(35.0)
            tasks.cancel_scope.cancel()
        await anyio.sleep(11.0)
        assert isinstance(seen[-1], events.ConnectionClosed)
        assert seen[-1].at - began == pytest.approx(45.0, abs=0.1)


async def test_k12_the_servers_pings_are_answered_whether_or_not_anybody_reads(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:

        async def send_more_than_anybody_reads(peer: Peer) -> None:
            request = await peer.request()
            await peer.respond(request.stream_id, body=b"x" * 10_000_000)

        server.serve(send_more_than_anybody_reads)
        async with c.stream("GET", server.url) as response:
            peer = server.peers[0]
            await anyio.sleep(10.0)
            assert await peer.ping() == pytest.approx(0.0, abs=0.001)
            assert response.connection.open_streams == 1
        await anyio.sleep(10.0)
        assert response.connection.open_streams == 0
        assert await peer.ping(b"nobodyis") == pytest.approx(0.0, abs=0.001)


# A dead peer


async def test_k4_k8_all_streams_of_a_dead_connection_fail_at_once_and_say_why(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering(delay=40.0))
        began = anyio.current_time()
        await c.get(server.url)
        peer = server.peers[0]
        assert len(peer.pings) == 1
        black_hole(peer)
        results = await gather(*[lambda: c.get(server.url)] * 6)
        for at, error in results:
            assert type(error) is h2keep.PingTimeout
            assert at - began == pytest.approx(85.0, abs=0.1)
            assert error.last_life == pytest.approx(began + 40.0, abs=0.01)
            assert error.ping_sent_at == pytest.approx(began + 70.0, abs=0.01)
            assert error.rtt == pytest.approx(0.0, abs=0.01)
            assert not error.unprocessed
            assert str(error) == (
                f"{server.url}: the connection is dead: nothing came for 45.0 s, 15.0 s of them after a PING "
                "(read_idle_timeout=30.0, ping_timeout=15.0); whether the request was processed is unknown"
            )
        assert len({id(error) for _, error in results}) == 6
        server.peers[0].resume_reading()
        # RST and not FIN: nothing lingers for a peer that is gone.
        with pytest.raises(anyio.EndOfStream):
            await peer.until(lambda: False)
        assert isinstance(peer.error, ConnectionResetError)
        before = anyio.current_time()
        await c.get(server.url)
        assert anyio.current_time() - before == pytest.approx(40.0, abs=0.01)
        assert len(server.peers) == 2


async def test_k4_detection_never_takes_less_than_ping_timeout_after_the_ping(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c, anyio.create_task_group() as tasks:
        tasks.start_soon(c.get, server.url)
        peer = await server.accept()
        peer.auto_ack_pings = False
        await peer.handshake()
        request = await peer.request()
        await peer.expect(frames.PingFrame)
        await anyio.sleep(14.9)
        # Not the ACK: any byte will do (K2).
        await peer.respond(request.stream_id, end_stream=False)
        await peer.expect(frames.PingFrame)
        await anyio.sleep(14.9)
        await peer.send_data(request.stream_id, b"", end_stream=True)


async def test_k8_what_was_received_is_handed_out_before_the_loss(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:

        async def answer_in_part(peer: Peer) -> None:
            await peer.respond((await peer.request()).stream_id, body=b"complete", trailers=[("x-checksum", "1")])
            await peer.respond((await peer.request()).stream_id, body=b"begun", end_stream=False)
            await peer.respond((await peer.request()).stream_id, end_stream=False)
            black_hole(peer)

        server.serve(answer_in_part)
        async with contextlib.AsyncExitStack() as stack:
            complete, begun, empty = [await stack.enter_async_context(c.stream("GET", server.url)) for _ in range(3)]
            await anyio.sleep(46.0)
            assert isinstance(complete.connection.error, h2keep.PingTimeout)
            assert await complete.aread() == b"complete"
            assert complete.trailers["x-checksum"] == "1"
            chunks = begun.aiter_bytes()
            assert await anext(chunks) == b"begun"
            with pytest.raises(h2keep.PingTimeout):
                await anext(chunks)
            with pytest.raises(h2keep.PingTimeout):
                await empty.aread()


async def test_k8_a_body_iterator_that_is_being_pulled_is_closed(ends: Ends) -> None:
    closed: list[float] = []

    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await anyio.sleep_forever()
        finally:
            closed.append(anyio.current_time())

    async with ends.listen() as server, ends.client() as c, anyio.create_task_group() as tasks:

        async def upload() -> None:
            with pytest.raises(h2keep.PingTimeout):
                await c.post(server.url, content=body())

        tasks.start_soon(upload)
        peer = await server.accept()
        await peer.handshake()
        request = await peer.request()
        await peer.until(lambda: request.body == b"first")
        black_hole(peer)
        began = anyio.current_time()
        await anyio.sleep(44.0)
        assert not closed
        await anyio.sleep(2.0)
        assert closed == [pytest.approx(began + 45.0, abs=0.1)]


@pytest.mark.parametrize("end", ["eof", "close", "abort"])
async def test_k8_an_end_is_a_connection_lost_and_not_a_ping_timeout(ends: Ends, end: str) -> None:
    async with ends.listen() as server, ends.client() as c:

        async def vanish(peer: Peer) -> None:
            await peer.request()
            await anyio.sleep(40.0)
            if end == "eof":
                await peer.eof()
            else:
                getattr(peer, end)()

        server.serve(vanish)
        [(at, error)] = await gather(lambda: c.get(server.url))
        assert type(error) is h2keep.ConnectionLost
        assert at == pytest.approx(40.0, abs=0.1)
        assert error.last_life == pytest.approx(40.0 if ends.server_ssl and end == "eof" else 30.0, abs=0.1)
        assert error.ping_sent_at == pytest.approx(30.0, abs=0.1)
        reason = "failed: [Errno 104] Connection reset by peer" if end == "abort" else "was closed by the server"
        assert f"{server.url}: the connection {reason} (last byte" in str(error)


async def test_k8_requests_in_the_queue_move_on_to_a_new_connection(ends: Ends) -> None:
    limits = h2keep.Limits(max_connections=1, keepalive_expiry=None)
    async with ends.listen() as server, ends.client(limits=limits) as c:

        async def first_vanishes(peer: Peer) -> None:
            if peer is server.peers[0]:
                await peer.request()
                black_hole(peer)
            else:
                await answering(b"moved on")(peer)

        async def late() -> h2keep.Response:
            # By now the server's SETTINGS have come.
            await anyio.sleep(1.0)
            return await c.get(server.url)

        server.serve(first_vanishes, {SETTINGS.MAX_CONCURRENT_STREAMS: 1})
        (lost_at, lost), *others = await gather(lambda: c.get(server.url), *[late] * 2)
        assert isinstance(lost, h2keep.PingTimeout)
        assert lost_at == pytest.approx(45.0, abs=0.1)
        for at, response in others:
            assert response.content == b"moved on"
            assert at == pytest.approx(45.0, abs=0.1)


# Life, below everything


async def test_k2_k4_a_trickle_is_life_though_no_frame_record_or_ack_completes(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:

        async def trickle(peer: Peer) -> None:
            request = await peer.request()
            await peer.respond(request.stream_id, end_stream=False)
            frame = frames.DataFrame(request.stream_id, b"slow" * 25, flags=["END_STREAM"])
            # A byte just before each PING's deadline; the whole takes an hour and more.
            await peer.trickle(frame.serialize(), interval=44.0)

        server.serve(trickle)
        async with c.stream("GET", server.url) as response:
            assert await response.aread() == b"slow" * 25
        assert anyio.current_time() > 3600.0
        assert response.connection.pings_sent == len(server.peers[0].pings) > 100
        # The last one's came behind the last byte.
        assert response.connection.pings_acked <= 1


async def test_k2_k4_a_trickle_that_ends_is_silence(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:

        async def trickle(peer: Peer) -> None:
            request = await peer.request()
            head = peer.headers_frame(request.stream_id, end_stream=True).serialize()
            with peer.holding_replies():
                wire = peer.encrypt(head)
                for byte in wire[:5]:
                    await anyio.sleep(40.0)
                    await peer.send_ciphertext(bytes([byte]))
                await peer.until(lambda: False)

        server.serve(trickle)
        [(at, error)] = await gather(lambda: c.get(server.url))
        assert isinstance(error, h2keep.PingTimeout)
        assert error.last_life == pytest.approx(200.0, abs=0.1)
        assert at == pytest.approx(245.0, abs=0.1)


# Blocked writes


@pytest.mark.parametrize("body_is", ["bytes", "iterator"])
async def test_k6_a_peer_that_stops_reading_an_upload_is_found_and_the_uploader_released(
    ends: Ends, body_is: str
) -> None:
    pulled: list[int] = []
    closed: list[float] = []

    async def chunks() -> AsyncIterator[bytes]:
        try:
            while True:
                pulled.append(1)
                yield b"x" * 100_000
        finally:
            closed.append(anyio.current_time())

    async with ends.listen(receive_buffer=8_192) as server, ends.client() as c:

        async def stop_reading(peer: Peer) -> None:
            peer.keep_bodies = False
            await peer.send(frames.WindowUpdateFrame(0, 2**31 - 1 - 65_535))
            request = await peer.request()
            await peer.until(lambda: request.received > 1_000_000)
            black_hole(peer)

        server.serve(stop_reading, WIDE_OPEN)
        body: Any = chunks() if body_is == "iterator" else b"x" * 50_000_000
        [(at, error)] = await gather(lambda: c.post(server.url, content=body))
        assert isinstance(error, h2keep.PingTimeout)
        assert error.ping_sent_at == pytest.approx(at - 15.0, abs=0.1)
        assert error.last_life == pytest.approx(at - 45.0, abs=0.1)
        assert not server.peers[0].pings
        if body_is == "iterator":
            assert closed == [pytest.approx(at, abs=0.1)]
            # The socket, and what a writer may hold ahead, took some; the rest was never asked for.
            assert len(pulled) < 200


async def test_k6_an_upload_that_waits_for_window_alone_is_no_loss(ends: Ends) -> None:
    responses: list[h2keep.Response] = []
    async with ends.listen() as server, ends.client() as c, anyio.create_task_group() as tasks:

        async def upload() -> None:
            responses.append(await c.post(server.url, content=b"x" * 75_000))

        tasks.start_soon(upload)
        peer = await server.accept()
        peer.auto_window = False
        await peer.handshake()
        request = await peer.request()
        await peer.until(lambda: request.received == 65_535)
        await anyio.sleep(590.0)
        await peer.send(frames.WindowUpdateFrame(0, 10_000), frames.WindowUpdateFrame(request.stream_id, 10_000))
        await request.complete()
        await peer.respond(request.stream_id, body=b"patience")
    [response] = responses
    assert response.content == b"patience"
    assert response.connection.pings_acked == len(peer.pings) == 19
