"""The tests' own tools, tested: if one of these fails, don't trust the others."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import h2.config
import h2.connection
import h2.events
import httpx2
import pytest
from hyperframe import frame as frames

from support.clock import virtual_time
from support.leaks import no_leaks, open_sockets
from support.raw import Peer, RawRequest, RawServer, answering, task_group

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterator

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

both = pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])


# Time


@virtual_time
async def test_an_hour_passes_at_once() -> None:
    assert anyio.current_time() == 0.0
    began = time.monotonic()
    with anyio.move_on_after(3600.0):
        await anyio.sleep(7200.0)
    assert anyio.current_time() == pytest.approx(3600.0)
    assert time.monotonic() - began < 1.0


@virtual_time
@both
async def test_a_response_after_an_hour(server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, tls: bool) -> None:
    async with RawServer.listen(server_ssl if tls else None) as server:
        server.serve(answering(b"hello", delay=3600.0))
        async with httpx2.AsyncClient(verify=client_ssl, http2=True, http1=False, timeout=None) as client:
            response = await client.post(server.url, content=b"question")
        assert (response.http_version, response.status_code, response.content) == ("HTTP/2", 200, b"hello")
        assert anyio.current_time() == pytest.approx(3600.0)


@contextlib.contextmanager
def _pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        other, _ = listener.accept()
        with other:
            one.setblocking(False)
            other.setblocking(False)
            yield one, other


@virtual_time
async def test_time_stands_still_while_the_kernel_holds_bytes() -> None:
    with _pair() as (one, other):
        # The kernel keeps them for 0.2 s, as it does those behind a lost packet.
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        one.send(b"late")
        with anyio.fail_after(1.0):
            await anyio.wait_readable(other)
        assert other.recv(10) == b"late"
        assert anyio.current_time() == 0.0


@virtual_time
async def test_bytes_that_nobody_reads_hold_up_no_time() -> None:
    with _pair() as (one, other):
        with contextlib.suppress(BlockingIOError):
            while True:
                one.send(bytes(100_000))
        began = time.monotonic()
        for _ in range(100):
            other.send(b"x")
            await anyio.sleep(1.0)
            assert one.recv(10) == b"x"
        assert time.monotonic() - began < 10.0


# The raw server, and h2 as its client


class Client:
    """h2 on an anyio stream, with the least that the tests need."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self.stream = stream
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration())
        self.h2.initiate_connection()
        self.events: list[h2.events.Event] = []

    async def flush(self) -> None:
        await self.stream.send(self.h2.data_to_send())

    async def get(self, *, end_stream: bool = True) -> None:
        head = [(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", "/")]
        self.h2.send_headers(self.h2.get_next_available_stream_id(), head, end_stream=end_stream)
        await self.flush()

    async def wait_for(self, kind: type[h2.events.Event]) -> h2.events.Event:
        """The next event of this kind."""
        while True:
            while self.events:
                if isinstance(event := self.events.pop(0), kind):
                    return event
            self.events += self.h2.receive_data(await self.stream.receive())
            if data := self.h2.data_to_send():
                await self.stream.send(data)


class Connected:
    """A raw server with one connection, its handshake done."""

    def __init__(self, server: RawServer, peer: Peer, client: Client) -> None:
        self.server, self.peer, self.client = server, peer, client

    async def request(self, *, end_stream: bool = True) -> RawRequest:
        await self.client.get(end_stream=end_stream)
        return await self.peer.request()


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
async def wire(
    request: pytest.FixtureRequest, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> AsyncIterator[Connected]:
    client_ssl.set_alpn_protocols(["h2"])
    async with RawServer.listen(server_ssl if request.param else None) as server, task_group() as tasks:
        peers: list[Peer] = []

        async def accept() -> None:
            peers.append(await server.accept())
            await peers[0].handshake({frames.SettingsFrame.MAX_CONCURRENT_STREAMS: 7})

        tasks.start_soon(accept)
        tls = {"ssl_context": client_ssl, "tls_hostname": "localhost"} if request.param else {}
        stream = await anyio.connect_tcp("127.0.0.1", server.port, **tls)  # type: ignore[call-overload]
        try:
            client = Client(stream)
            await client.flush()
            await client.wait_for(h2.events.SettingsAcknowledged)
            assert peers[0].alpn == ("h2" if request.param else None)
            yield Connected(server, peers[0], client)
        finally:
            await anyio.aclose_forcefully(stream)


async def test_a_request_and_its_response(wire: Connected) -> None:
    assert wire.client.h2.remote_settings.max_concurrent_streams == 7
    assert wire.peer.client_settings[frames.SettingsFrame.ENABLE_PUSH] == 1
    request = await wire.request(end_stream=False)
    assert (request.method, request.path, request.headers[":authority"]) == ("GET", "/", "localhost")
    wire.client.h2.send_data(request.stream_id, b"question")
    wire.client.h2.send_headers(request.stream_id, [("x-last", "1")], end_stream=True)
    await wire.client.flush()
    assert await request.complete() == b"question"
    assert request.trailers == [("x-last", "1")]
    await wire.peer.respond(1, 201, [("x-a", "b")], b"answer", trailers=[("x-z", "y")])
    head = await wire.client.wait_for(h2.events.ResponseReceived)
    assert isinstance(head, h2.events.ResponseReceived)
    assert head.headers == [(b":status", b"201"), (b"x-a", b"b")]
    data = await wire.client.wait_for(h2.events.DataReceived)
    assert isinstance(data, h2.events.DataReceived)
    assert data.data == b"answer"
    await wire.client.wait_for(h2.events.TrailersReceived)


async def test_frames_one_by_one(wire: Connected) -> None:
    request = await wire.request(end_stream=False)
    wire.client.h2.ping(b"12345678")
    wire.client.h2.reset_stream(1, 8)
    await wire.client.flush()
    ping = await wire.peer.receive()
    assert isinstance(ping, frames.PingFrame)
    rst = await wire.peer.expect(frames.RstStreamFrame, stream_id=1, error_code=8)
    assert request.reset == 8
    assert wire.peer.seen(frames.RstStreamFrame, 1) == [rst]
    wire.client.h2.ping(b"87654321")
    await wire.client.flush()
    with pytest.raises(AssertionError, match="expected RstStreamFrame"):
        await wire.peer.expect(frames.RstStreamFrame, skip=False)
    await anyio.aclose_forcefully(wire.client.stream)
    with pytest.raises(anyio.EndOfStream):
        await wire.peer.receive()
    assert wire.peer.ended


async def test_a_client_that_says_goodbye_is_answered(wire: Connected) -> None:
    await wire.client.stream.aclose()
    await wire.peer.until(lambda: wire.peer.ended)
    assert wire.peer.error is None


async def test_heads_in_many_frames(wire: Connected) -> None:
    head = [(":method", "GET"), (":scheme", "https"), (":authority", "localhost"), (":path", "/"), ("x", "ü" * 20_000)]
    wire.client.h2.send_headers(1, head, end_stream=True)
    await wire.client.flush()
    request = await wire.peer.request()
    assert request.headers["x"] == "ü" * 20_000
    assert request.ended
    assert wire.peer.seen(frames.ContinuationFrame)


async def test_pings_both_ways(wire: Connected) -> None:
    wire.client.h2.ping(b"12345678")
    await wire.client.flush()
    await wire.client.wait_for(h2.events.PingAckReceived)
    assert [ping.payload for ping in wire.peer.pings] == [b"12345678"]
    assert 0 <= anyio.current_time() - wire.peer.pings[0].at < 5
    wire.peer.auto_ack_pings = False
    wire.client.h2.ping(b"87654321")
    await wire.client.flush()
    await wire.peer.expect(frames.PingFrame, opaque_data=b"87654321")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wire.client.wait_for, h2.events.PingReceived)
        assert 0 <= await wire.peer.ping() < 5
    assert not [event for event in wire.client.events if isinstance(event, h2.events.PingAckReceived)]


async def test_bodies_obey_the_clients_windows(wire: Connected) -> None:
    request = await wire.request()
    received = 0
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wire.peer.respond, request.stream_id, 200, (), b"x" * 300_000)
        while received < 300_000:
            event = await wire.client.wait_for(h2.events.DataReceived)
            assert isinstance(event, h2.events.DataReceived)
            received += len(event.data)
            wire.client.h2.acknowledge_received_data(event.flow_controlled_length, 1)
            await wire.client.flush()
    await wire.client.wait_for(h2.events.StreamEnded)


async def test_a_response_stops_when_its_stream_is_reset(wire: Connected) -> None:
    request = await wire.request()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wire.peer.respond, request.stream_id, 200, (), b"x" * 300_000)
        await wire.client.wait_for(h2.events.DataReceived)
        wire.client.h2.reset_stream(1)
        await wire.client.flush()


async def test_credit_is_given_or_withheld(wire: Connected) -> None:
    request = await wire.request(end_stream=False)
    wire.client.h2.send_data(1, b"x" * 1000)
    await wire.client.flush()
    await wire.client.wait_for(h2.events.WindowUpdated)
    wire.peer.auto_window = wire.peer.keep_bodies = False
    wire.client.h2.send_data(1, b"y" * 500, end_stream=True)
    await wire.client.flush()
    assert await request.complete() == b"x" * 1000
    assert request.received == 1500
    await wire.peer.respond(1)
    await wire.client.wait_for(h2.events.StreamEnded)
    assert wire.client.h2.outbound_flow_control_window == 65_535 - 500


async def test_a_trickle_keeps_replies_back(wire: Connected) -> None:
    await wire.request()
    sizes = []
    async with anyio.create_task_group() as tasks:
        response = wire.peer.headers_frame(1, end_stream=True).serialize()
        tasks.start_soon(lambda: wire.peer.trickle(response, interval=0.002, size=2))
        while wire.peer._held is None:
            await anyio.lowlevel.checkpoint()
        wire.client.h2.ping(b"12345678")
        await wire.client.flush()
        events: list[h2.events.Event] = []
        while not any(isinstance(event, h2.events.PingAckReceived) for event in events):
            data = await wire.client.stream.receive()
            sizes.append(len(data))
            events += wire.client.h2.receive_data(data)
    kinds = [type(event) for event in events]
    assert kinds == [h2.events.ResponseReceived, h2.events.StreamEnded, h2.events.PingAckReceived]
    assert wire.peer.alpn == "h2" or len(sizes) > 2


async def test_a_peer_that_stops_reading_blocks_the_client(wire: Connected) -> None:
    wire.peer.stop_reading()
    with anyio.move_on_after(0.2) as scope:
        while True:
            await wire.client.stream.send(frames.PingFrame(0, b"12345678").serialize() * 1000)
    assert scope.cancelled_caught
    assert len(wire.peer.pings) < 20_000


async def test_a_peer_that_reads_again_catches_up(wire: Connected) -> None:
    wire.peer.stop_reading()
    wire.client.h2.ping(b"12345678")
    await wire.client.flush()
    await anyio.sleep(0.05)
    assert not wire.peer.pings
    wire.peer.resume_reading()
    await wire.client.wait_for(h2.events.PingAckReceived)


async def test_ends(wire: Connected) -> None:
    await wire.request()
    await wire.peer.goaway(1, 2, b"bye")
    gone = await wire.client.wait_for(h2.events.ConnectionTerminated)
    assert isinstance(gone, h2.events.ConnectionTerminated)
    assert (gone.last_stream_id, gone.error_code, gone.additional_data) == (1, 2, b"bye")
    await wire.peer.rst(1, 8)
    await wire.client.stream.receive()
    await wire.peer.eof()
    with pytest.raises(anyio.EndOfStream):
        await wire.client.stream.receive()


async def test_an_abrupt_end(wire: Connected) -> None:
    wire.peer.abort()
    with pytest.raises(anyio.BrokenResourceError):
        await wire.client.stream.receive()
    with pytest.raises(anyio.ClosedResourceError):
        await wire.peer.send(frames.PingFrame(0, b"12345678"))


async def test_writing_to_a_client_that_is_gone_fails() -> None:
    async with RawServer.listen() as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            peer = await server.accept()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            async with anyio.create_task_group() as tasks:

                async def write() -> None:
                    with pytest.raises(anyio.BrokenResourceError):
                        await peer.send_bytes(b"x" * 20_000_000)

                tasks.start_soon(write)
                await anyio.sleep(0.05)
                sock.close()


async def test_a_handlers_error_is_the_tests() -> None:
    async def handler(peer: Peer) -> None:
        raise ZeroDivisionError

    async def run() -> None:
        async with RawServer.listen() as server:
            server.serve(handler)
            async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:
                await stream.send(h2_preface())
                await anyio.sleep(10)

    with pytest.raises(ZeroDivisionError):
        await run()


def h2_preface() -> bytes:
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    return connection.data_to_send()


async def test_a_client_that_goes_away_is_no_handlers_error() -> None:
    done = anyio.Event()

    async def handler(peer: Peer) -> None:
        try:
            await peer.request()
        finally:
            done.set()

    async with RawServer.listen() as server:
        server.serve(handler)
        async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:
            await stream.send(h2_preface())
            assert (await server.peer(0)) is server.peers[0]
        await done.wait()
        server.stop_listening()
        with pytest.raises(OSError, match="All connection attempts failed"):
            await anyio.connect_tcp("127.0.0.1", server.port)


async def test_a_client_that_distrusts_the_certificate(server_ssl: ssl.SSLContext) -> None:
    async with RawServer.listen(server_ssl) as server:
        server.serve(answering())
        async with httpx2.AsyncClient(http2=True) as client:
            with pytest.raises(httpx2.ConnectError):
                await client.get(server.url)
        await server.peers[0].until(lambda: server.peers[0].ended)
        assert not server.peers[0].requests


async def test_many_requests_on_many_connections(server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
    async with RawServer.listen(server_ssl) as server:
        server.serve(answering(b"x" * 100_000), {frames.SettingsFrame.MAX_CONCURRENT_STREAMS: 3})
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(_get_some, server.url, client_ssl)
        assert len(server.peers) == 3


async def _get_some(url: str, context: ssl.SSLContext) -> None:
    async with httpx2.AsyncClient(verify=context, http2=True) as client:
        for _ in range(3):
            assert len((await client.get(url)).content) == 100_000


# Leaks


async def test_leaks_are_seen() -> None:
    with pytest.raises(AssertionError, match="left behind"):
        async with no_leaks():
            sock = socket.socket()
    assert sock.fileno() in open_sockets()
    sock.close()
    async with anyio.create_task_group() as tasks:
        with pytest.raises(AssertionError, match="left behind"):
            async with no_leaks():
                tasks.start_soon(anyio.sleep, 10)
        tasks.cancel_scope.cancel()
