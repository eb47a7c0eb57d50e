"""GOAWAY: what the server promised to finish finishes, the rest goes elsewhere, and so does the next request.

What may be sent again is `test_replay.py`'s affair; here it is kept from it where its error is to be seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from support.clock import virtual_time
from support.pools import assert_at_rest, connections_of
from support.raw import Peer, RawServer, answering, task_group

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("every_engine", "leak_check")]

NO_ERROR, INTERNAL_ERROR, ENHANCE_YOUR_CALM = 0, 2, 11
MAX_STREAM_ID = 2**31 - 1


def client(**options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(http1=False, timeout=None, **options)


class Outcomes:
    """Requests in tasks of their own, and what became of them."""

    def __init__(self, c: h2keep.AsyncClient, url: str, tasks: Any) -> None:
        self.bodies: dict[int, bytes] = {}
        self.errors: dict[int, h2keep.H2KeepError] = {}
        self._client, self._url, self._tasks = c, url, tasks

    def start(self, number: int, **options: Any) -> None:
        self._tasks.start_soon(self._run, number, options)

    async def _run(self, number: int, options: dict[str, Any]) -> None:
        method = "POST" if options else "GET"
        try:
            response = await self._client.request(method, f"{self._url}/{number}", **options)
        except h2keep.H2KeepError as error:
            self.errors[number] = error
        else:
            self.bodies[number] = response.content


async def unrepeatable(body: bytes = b"once") -> AsyncIterator[bytes]:
    """A body that can't be sent again, for clients with `replay_buffer=0`."""
    yield body


async def requests(peer: Peer, count: int) -> None:
    for _ in range(count):
        await peer.request()


async def test_k17_responses_in_flight_finish_new_requests_go_elsewhere_and_the_connection_closes_itself() -> None:
    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        outcomes = Outcomes(c, server.url, tasks)
        for number in range(3):
            outcomes.start(number)
        old = await server.accept()
        await old.handshake()
        await requests(old, 3)
        await old.goaway(5)
        await anyio.sleep(0.1)
        server.serve(answering(b"new"))
        assert (await c.get(server.url)).content == b"new"
        assert len(server.peers) == 2
        # Long beyond both keepalive timeouts: a draining connection is watched like any other.
        await anyio.sleep(100.0)
        assert old.pings
        for stream_id in (1, 3):
            await old.respond(stream_id, body=b"old")
        await anyio.sleep(0.1)
        assert not old.ended
        await old.respond(5, body=b"old")
        await anyio.sleep(0.1)
        assert outcomes.bodies == dict.fromkeys(range(3), b"old")
        assert old.ended
        assert old.error is None
        assert len(old.seen(frames.GoAwayFrame)) == 1
        assert (await c.get(server.url)).content == b"new"
        assert len(server.peers) == 2
        # The unused one had to prove itself (K9), for which a hedge waits a little.
        await anyio.sleep(1.0)
        assert_at_rest(c)


async def test_k24_streams_above_the_last_one_are_unprocessed_and_the_others_go_on() -> None:
    async with RawServer.listen() as server, client(replay_buffer=0) as c, task_group() as tasks:
        outcomes = Outcomes(c, server.url, tasks)
        for number in range(4):
            outcomes.start(number, content=unrepeatable())
        peer = await server.accept()
        await peer.handshake()
        await requests(peer, 4)
        await peer.until(lambda: all(request.ended for request in peer.requests.values()))
        await peer.goaway(3, ENHANCE_YOUR_CALM, b"calm \xff down")
        await anyio.sleep(0.1)
        failed = [peer.requests[stream_id].path for stream_id in (5, 7)]
        assert sorted(f"/{number}" for number in outcomes.errors) == sorted(failed)
        for error in outcomes.errors.values():
            assert isinstance(error, h2keep.ConnectionGoingAway)
            assert error.unprocessed
            assert (error.last_stream_id, error.error_code, error.debug_data) == (3, 11, b"calm \xff down")
            assert server.url in str(error)
        assert len(set(map(id, outcomes.errors.values()))) == 2
        await peer.respond(1, body=b"a")
        await peer.respond(3, body=b"b")
        await anyio.sleep(0.1)
        assert sorted(outcomes.bodies.values()) == [b"a", b"b"]
        assert not peer.seen(frames.RstStreamFrame)
        assert peer.ended
        assert len(server.peers) == 1
        assert not connections_of(c)


async def test_k24_the_two_step_farewell_of_servers_loses_nothing() -> None:
    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        outcomes = Outcomes(c, server.url, tasks)
        outcomes.start(0)
        outcomes.start(1)
        old = await server.accept()
        await old.handshake()
        await requests(old, 2)
        await old.goaway(MAX_STREAM_ID)
        await anyio.sleep(0.1)
        assert not outcomes.errors
        server.serve(answering(b"new"))
        outcomes.start(2)
        await anyio.sleep(0.1)
        await old.goaway(3)
        await old.respond(3, body=b"old")
        await old.respond(1, body=b"old")
        await anyio.sleep(0.1)
        assert outcomes.bodies == {0: b"old", 1: b"old", 2: b"new"}
        assert old.ended


async def test_goaway_and_the_rest_of_a_response_in_one_read() -> None:
    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        outcomes = Outcomes(c, server.url, tasks)
        outcomes.start(0)
        peer = await server.accept()
        await peer.handshake()
        await peer.request()
        await peer.send(
            peer.headers_frame(1),
            frames.DataFrame(1, b"before "),
            frames.GoAwayFrame(0, 1, NO_ERROR, b"bye"),
            frames.PingFrame(0, b"afterbye"),
            frames.DataFrame(1, b"after", flags=["END_STREAM"]),
        )
        await anyio.sleep(0.1)
        assert outcomes.bodies == {0: b"before after"}
        assert peer.ended
        assert not connections_of(c)


async def test_replies_that_were_queued_when_goaway_came_still_go_out() -> None:
    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        outcomes = Outcomes(c, server.url, tasks)
        outcomes.start(0)
        peer = await server.accept()
        await peer.handshake()
        await peer.request()
        await peer.send(frames.PingFrame(0, b"pingping"), frames.GoAwayFrame(0, 1, NO_ERROR, b""))
        await peer.expect(frames.PingFrame, opaque_data=b"pingping", flags={"ACK"})
        await peer.respond(1, body=b"fine")
        await anyio.sleep(0.1)
        assert outcomes.bodies == {0: b"fine"}


async def test_an_upload_goes_on_after_goaway() -> None:
    async def body() -> AsyncIterator[bytes]:
        for number in range(20):
            yield bytes([number]) * 10_000
            await anyio.sleep(1.0)

    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        outcomes = Outcomes(c, server.url, tasks)
        outcomes.start(0, content=body())
        peer = await server.accept()
        await peer.handshake()
        request = await peer.request()
        await peer.goaway(1)
        assert len(await request.complete()) == 200_000
        await peer.respond(1, body=b"done")
        await anyio.sleep(0.1)
        assert outcomes.bodies == {0: b"done"}
        assert peer.ended


async def test_k24_an_upload_above_the_last_stream_that_cannot_be_repeated_is_stopped() -> None:
    finished = []

    async def body() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(10_000)
                await anyio.sleep(1.0)
        finally:
            finished.append(True)

    async with RawServer.listen() as server, client(replay_buffer=9_999) as c, task_group() as tasks:
        outcomes = Outcomes(c, server.url, tasks)
        outcomes.start(0, content=body())
        peer = await server.accept()
        await peer.handshake()
        request = await peer.request()
        await peer.until(lambda: request.received > 0)
        await peer.goaway(0)
        await anyio.sleep(0.1)
        assert finished == [True]
        assert outcomes.errors[0].unprocessed
        assert peer.ended


async def test_requests_that_wait_in_the_queue_move_to_a_new_connection() -> None:
    limits = h2keep.Limits(max_connections=2)
    async with RawServer.listen() as server, client(limits=limits) as c, task_group() as tasks:
        outcomes = Outcomes(c, server.url, tasks)
        outcomes.start(0)
        old = await server.accept()
        await old.handshake({frames.SettingsFrame.MAX_CONCURRENT_STREAMS: 1})
        await old.request()
        await anyio.sleep(0.1)
        outcomes.start(1)
        second = await server.accept()
        await second.handshake({frames.SettingsFrame.MAX_CONCURRENT_STREAMS: 1})
        await second.request()
        await anyio.sleep(0.1)
        outcomes.start(2)
        outcomes.start(3)
        await anyio.sleep(0.1)
        server.serve(answering(b"new"))
        await second.goaway(1)
        await second.respond(1, body=b"second")
        await anyio.sleep(0.1)
        assert outcomes.bodies == {1: b"second", 2: b"new", 3: b"new"}
        assert len(server.peers) == 3
        await old.respond(1, body=b"old")
        await anyio.sleep(0.1)
        assert outcomes.bodies[0] == b"old"
        assert_at_rest(c)


async def test_an_idle_connection_that_is_told_to_go_closes_in_good_order_and_is_not_used_again(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl) as c:
        server.serve(answering())
        await c.get(server.url)
        old = server.peers[0]
        old.auto_close_notify = False
        await old.goaway(1, NO_ERROR, b"idle for too long")
        await anyio.sleep(0.1)
        assert old.ended
        # EOF after the client's own close_notify, not in its place.
        assert old.error is None
        assert len(old.seen(frames.GoAwayFrame)) == 1
        assert not connections_of(c)
        assert (await c.get(server.url)).content == b"ok"
        assert len(server.peers) == 2


async def test_k24_goaway_with_an_error_then_eof_fails_what_was_promised_with_the_loss() -> None:
    async with RawServer.listen() as server, client(replay_buffer=0) as c, task_group() as tasks:
        outcomes = Outcomes(c, server.url, tasks)
        outcomes.start(0, content=unrepeatable())
        outcomes.start(1, content=unrepeatable())
        peer = await server.accept()
        await peer.handshake()
        await requests(peer, 2)
        await peer.until(lambda: all(request.ended for request in peer.requests.values()))
        await peer.goaway(1, INTERNAL_ERROR, b"on fire")
        await peer.eof()
        await anyio.sleep(0.1)
        kinds = sorted((type(error).__name__, error.unprocessed) for error in outcomes.errors.values())
        assert kinds == [("ConnectionGoingAway", True), ("ConnectionLost", False)]
        assert not connections_of(c)


async def test_a_response_that_ended_before_goaway_and_close_is_still_read() -> None:
    async with RawServer.listen() as server, client() as c:

        async def handler(peer: Peer) -> None:
            await peer.request()
            await peer.respond(1, body=b"complete")
            await peer.goaway(1)

        server.serve(handler)
        async with c.stream("GET", server.url) as response:
            await anyio.sleep(1.0)
            assert not connections_of(c)
            assert await response.aread() == b"complete"
