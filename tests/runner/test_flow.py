"""Much data over sockets: both ways at once, beside responses that nobody reads, and faster than is good for others."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import select
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint
from hyperframe import frame as frames

import h2keep
from h2keep.protocol.flow import CONNECTION_GROWTH, CONNECTION_WINDOW, INITIAL_WINDOW, MAX_STREAMS, MAX_WINDOW
from h2keep.runner import driver
from h2keep.runner.driver import _FIRST_READ
from support.clock import virtual_time
from support.pools import assert_at_rest, connections_of
from support.raw import Peer, RawRequest, RawServer, task_group

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import AsyncIterator, Callable

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("every_engine", "leak_check")]

MIB = 1024 * 1024
SETTINGS = frames.SettingsFrame
LARGEST_WINDOW = 2**31 - 1
ENHANCE_YOUR_CALM = 11
#: Under virtual time nothing must be due while megabytes are on their way: the kernel's own time is not virtual.
OFF = h2keep.Keepalive(read_idle_timeout=None)


def client(**options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(http1=False, timeout=None, **options)


# Both ways at once


async def passes(count: int) -> None:
    for _ in range(count):
        await checkpoint()


async def test_k6_an_echoing_server_that_reads_nothing_while_it_writes_meets_no_deadlock(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    size = 50 * MIB
    chunk = 128 * 1024
    sent, received = hashlib.sha256(), hashlib.sha256()
    produced = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal produced
        for number in range(size // chunk):
            piece = bytes([number % 251]) * chunk
            sent.update(piece)
            produced += chunk
            yield piece

    async def echo(peer: Peer) -> None:
        peer.auto_window = False
        await peer.send(frames.WindowUpdateFrame(0, LARGEST_WINDOW - 65_535))
        request = await peer.request()
        await peer.respond(1, end_stream=False)
        echoed = 0
        while not request.ended or request.body:
            await peer.until(lambda: bool(request.body) or request.ended)
            piece = bytes(request.body[:chunk])
            del request.body[: len(piece)]
            # Like a server of one thread: what it has read is written before it reads on.
            for start in range(0, len(piece), 16_384):
                part = piece[start : start + 16_384]
                await peer.until(lambda: peer._room(1) >= len(part))  # noqa: B023
                peer.stop_reading()
                await peer.send_data(1, part)
                peer.resume_reading()
            echoed += len(piece)
            if piece and not request.ended:
                await peer.send(frames.WindowUpdateFrame(1, len(piece)))
        await peer.send_data(1, b"", end_stream=True)
        assert echoed == size

    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl) as c:
        server.serve(echo, {SETTINGS.INITIAL_WINDOW_SIZE: 2 * MIB})
        async with c.stream("POST", server.url, content=body()) as response:
            before = -1
            while produced != before:
                before = produced
                await anyio.sleep(0.1)
            # Nothing moves, since nobody reads: far less than all was taken from the iterator.
            assert 0 < produced < 10 * MIB
            total = 0
            async for piece in response.aiter_bytes():
                total += len(piece)
                received.update(piece)
        assert total == produced == size
        assert received.digest() == sent.digest()
        assert_at_rest(c)


async def test_k6_a_server_that_stops_reading_still_gets_its_responses_read() -> None:
    async with RawServer.listen(receive_buffer=65_536) as server, client() as c, task_group() as tasks:
        bodies: dict[str, bytes] = {}
        got, posted = anyio.Event(), anyio.Event()

        async def get() -> None:
            bodies["GET"] = (await c.get(server.url)).content
            got.set()

        async def upload() -> None:
            bodies["POST"] = (await c.post(server.url, content=bytes(30 * MIB))).content
            posted.set()

        tasks.start_soon(get)
        peer = await server.accept()
        peer.keep_bodies = False
        await peer.handshake({SETTINGS.INITIAL_WINDOW_SIZE: LARGEST_WINDOW})
        await peer.send(frames.WindowUpdateFrame(0, LARGEST_WINDOW - 65_535))
        await peer.request()
        tasks.start_soon(upload)
        await peer.request()
        peer.stop_reading()
        (connection,) = connections_of(c)
        before = -1
        while connection.protocol.body_bytes_sent != before:
            before = connection.protocol.body_bytes_sent
            await anyio.sleep(0.1)
        # The client's writer is blocked in the middle of the upload.
        assert before < 30 * MIB
        await peer.respond(1, body=b"x" * 100_000)
        with anyio.fail_after(60.0):
            await got.wait()
        assert bodies == {"GET": b"x" * 100_000}
        peer.resume_reading()
        await peer.requests[3].complete()
        await peer.respond(3, body=b"done")
        with anyio.fail_after(60.0):
            await posted.wait()
        assert bodies["POST"] == b"done"


# Responses that nobody reads


def _promised(peer: Peer, request: RawRequest, consumed: int) -> int:
    """What the client has promised to take on a stream: credit outstanding, and bytes that were sent and not read."""
    updates = peer.seen(frames.WindowUpdateFrame, request.stream_id)
    return INITIAL_WINDOW + sum(frame.window_increment for frame in updates) - consumed


async def _grow(peer: Peer, request: RawRequest, size: int) -> None:
    """Send a response's head and so many bytes of its body, as the client's windows allow."""
    await peer.respond(request.stream_id, end_stream=False)
    await peer.send_data(request.stream_id, bytes(size))


async def _fill(peer: Peer, request: RawRequest) -> int:
    """Send as much as the client has promised to take on this stream."""
    room = peer._room(request.stream_id)
    await peer.send_data(request.stream_id, bytes(room))
    return room


@virtual_time
async def test_k23_a_download_and_small_requests_beside_responses_that_nobody_reads() -> None:
    readers = 3
    read_each = 40 * MIB
    unread = MAX_STREAMS - 2
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(RawServer.listen())
        c = await stack.enter_async_context(client(keepalive=OFF))
        tasks = await stack.enter_async_context(task_group())
        tasks.start_soon(c.get, server.url)
        peer = await server.accept()
        # A round trip of a tenth of a second; after that time stands still, so every stream looks fast, and grows.
        peer.auto_ack_settings = False
        await peer.handshake({SETTINGS.MAX_CONCURRENT_STREAMS: MAX_STREAMS})
        await anyio.sleep(0.1)
        await peer.send(frames.SettingsFrame(0, flags=["ACK"]))
        peer.auto_ack_settings = True
        await peer.respond((await peer.request()).stream_id)
        await anyio.sleep(0.01)

        # Some responses are read for a while, so that their windows grow to the utmost, and then no more.
        consumed: dict[int, int] = {}
        held = []
        for _ in range(readers):
            opening = c.stream("GET", server.url)
            began = anyio.Event()

            async def respond(began: anyio.Event = began) -> None:
                request = await peer.request()
                began.set()
                await _grow(peer, request, read_each)

            tasks.start_soon(respond)
            response = await stack.enter_async_context(opening)
            held.append(response)
            got = 0
            while got < read_each:
                got += len(await response._source.receive())
            consumed[response.stream_id] = got
        # The others are never looked at.
        for _ in range(unread - readers):

            async def begin() -> None:
                request = await peer.request()
                await peer.respond(request.stream_id, end_stream=False)

            tasks.start_soon(begin)
            held.append(await stack.enter_async_context(c.stream("GET", server.url)))
        await anyio.sleep(0.01)
        requests = [peer.requests[response.stream_id] for response in held]
        windows = [peer._stream_windows[request.stream_id] for request in requests]
        grown = [_promised(peer, request, consumed.get(request.stream_id, 0)) for request in requests]
        assert max(grown) > MAX_WINDOW // 2
        assert sum(grown) - len(grown) * INITIAL_WINDOW <= CONNECTION_GROWTH
        assert sum(grown) <= CONNECTION_WINDOW - 2 * INITIAL_WINDOW
        assert sum(windows) <= sum(grown)
        room = sum([await _fill(peer, request) for request in requests])
        assert all(peer._stream_windows[request.stream_id] == 0 for request in requests)
        (connection,) = connections_of(c)
        inner = connection.protocol._streams.values()
        while sum(len(stream.buffer) for stream in inner) < room:
            await checkpoint()
        sizes = [stream.window.size for stream in inner if stream.window]
        assert max(sizes) == MAX_WINDOW
        assert sum(sizes) <= 64 * MIB
        assert sum(len(stream.buffer) for stream in inner) <= 64 * MIB
        assert connection.protocol.free_slots == 2

        # And yet: a PING is answered, a download runs, small requests come and go.
        await peer.ping()
        tasks.start_soon(_serve_rest, peer)
        done = anyio.Event()

        async def download() -> None:
            total = 0
            async with c.stream("GET", f"{server.url}/large") as response:
                async for chunk in response.aiter_bytes():
                    total += len(chunk)
            assert total == 64 * MIB
            done.set()

        tasks.start_soon(download)
        small = 0
        while not done.is_set() or small < 20:
            response = await c.post(f"{server.url}/small", content=b"question" * 1000)
            assert response.content == b"answer"
            small += 1
        await peer.ping()
        assert len(server.peers) == 1


async def _serve_rest(peer: Peer) -> None:
    async def answer(request: RawRequest) -> None:
        body = b"answer" if request.path == "/small" else bytes(64 * MIB)
        await request.complete()
        await peer.respond(request.stream_id, body=body)

    async with task_group() as tasks:
        while True:
            tasks.start_soon(answer, await peer.request())


@virtual_time
async def test_responses_that_ended_large_and_unread_keep_what_their_windows_had_grown_by() -> None:
    rounds = 6
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(RawServer.listen())
        c = await stack.enter_async_context(client(keepalive=OFF))
        tasks = await stack.enter_async_context(task_group())
        tasks.start_soon(c.get, server.url)
        peer = await server.accept()
        peer.auto_ack_settings = False
        await peer.handshake({SETTINGS.MAX_CONCURRENT_STREAMS: MAX_STREAMS})
        await anyio.sleep(0.1)
        await peer.send(frames.SettingsFrame(0, flags=["ACK"]))
        await peer.respond((await peer.request()).stream_id)
        await anyio.sleep(0.01)

        async def begin() -> None:
            request = await peer.request()
            await peer.respond(request.stream_id, end_stream=False)

        responses = []
        for _ in range(rounds):
            tasks.start_soon(begin)
            responses.append(await stack.enter_async_context(c.stream("GET", server.url)))
        (connection,) = connections_of(c)
        for response in responses:
            size = 40 * MIB
            tasks.start_soon(peer.send_data, response.stream_id, bytes(size))
            got = 0
            while got < size:
                got += len(await response._source.receive())
            await passes(20)
            await _fill(peer, peer.requests[response.stream_id])
            await peer.send_data(response.stream_id, b"", end_stream=True)
            ended = connection.protocol._streams[response.stream_id]
            while not ended.ended:
                await checkpoint()
        buffered = sum(len(inner.buffer) for inner in connection.protocol._streams.values())
        assert 16 * MIB < buffered <= CONNECTION_GROWTH + rounds * INITIAL_WINDOW
        assert sum([len(await response.aread()) for response in responses]) == buffered
        await anyio.sleep(0.01)
        assert connection.protocol._growth.available == CONNECTION_GROWTH


#: Blocks as a download allocates and frees them, and the page faults that each MiB of them takes.
_BULK = """
import resource, sys
from h2keep.runner import driver

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "kept":
    before = faults()
    driver._keep_freed_memory()
    assert faults() - before < 20, "memory was touched"
elif sys.argv[1] == "as it was":
    # glibc's thresholds as they are before anything large is freed, which some Pythons do as they start.
    import ctypes
    for threshold in (-1, -3):
        ctypes.CDLL(None).mallopt(threshold, 128 * 1024)
for size in (64, 256):
    before = faults()
    for _ in range(200):
        blocks = [bytearray(size * 1024) for _ in range(1024 // size)]
        del blocks
    print((faults() - before) / 200)
"""


async def test_memory_that_downloads_free_is_kept_at_hand() -> None:
    async def measured(how: str) -> list[float]:
        process = await anyio.run_process([sys.executable, "-c", _BULK, how], stderr=None)
        return [float(line) for line in process.stdout.split()]

    assert max(await measured("kept")) < 16
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        # Else there would be no need for it: a MiB is 256 pages.
        assert max(await measured("as it was")) > 128


# Bounds on what one peer can make us do (K23)


@virtual_time
async def test_k23_more_than_1000_unsent_replies_end_the_connection_with_enhance_your_calm() -> None:
    async with RawServer.listen() as server, client() as c:

        async def handler(peer: Peer) -> None:
            await peer.request()
            await peer.send(*(frames.PingFrame(0, b"%08d" % number) for number in range(1001)))
            await peer.expect(frames.GoAwayFrame, error_code=ENHANCE_YOUR_CALM)

        server.serve(handler)
        with pytest.raises(h2keep.RemoteProtocolError, match="faster than it takes them"):
            await c.get(server.url)
        await anyio.sleep(0.01)
        assert server.peers[0].ended
        assert not connections_of(c)


@virtual_time
async def test_k12_k23_as_many_pings_as_are_answered_in_time_are_answered() -> None:
    async with RawServer.listen() as server, client() as c:

        async def handler(peer: Peer) -> None:
            await peer.request()
            for _ in range(5):
                await peer.send(*(frames.PingFrame(0, b"%08d" % number) for number in range(900)))
                await anyio.sleep(0.01)
            await peer.respond(1, body=b"fine")

        server.serve(handler)
        assert (await c.get(server.url)).content == b"fine"
        acks = [frame.opaque_data for frame in server.peers[0].seen(frames.PingFrame) if "ACK" in frame.flags]
        assert acks == [b"%08d" % number for number in range(900)] * 5


async def test_k23_replies_that_a_blocked_writer_cannot_send_end_the_connection() -> None:
    async with RawServer.listen(receive_buffer=65_536) as server, client() as c, task_group() as tasks:
        failed = anyio.Event()

        async def upload() -> None:
            with pytest.raises(h2keep.RemoteProtocolError, match="faster than it takes them"):
                await c.post(server.url, content=bytes(30 * MIB))
            failed.set()

        tasks.start_soon(upload)
        peer = await server.accept()
        peer.keep_bodies = False
        await peer.handshake({SETTINGS.INITIAL_WINDOW_SIZE: LARGEST_WINDOW})
        await peer.send(frames.WindowUpdateFrame(0, LARGEST_WINDOW - 65_535))
        await peer.request()
        peer.stop_reading()
        (connection,) = connections_of(c)
        before = -1
        while connection.protocol.body_bytes_sent != before:
            before = connection.protocol.body_bytes_sent
            # Longer than TCP waits before it asks whether the window is still closed.
            await anyio.sleep(0.3)
        for _ in range(11):
            await peer.send(*(frames.PingFrame(0, b"pingping") for _ in range(100)))
            await anyio.sleep(0.01)
        with anyio.fail_after(60.0):
            await failed.wait()
        assert not connections_of(c)


def _blast(sock: socket.socket, data: bytes) -> None:
    """From a thread: write it all, as fast as the other side reads."""
    view = memoryview(data)
    while view:
        select.select([], [sock], [], 10.0)
        with contextlib.suppress(BlockingIOError):
            view = view[sock.send(view) :]


class Ticker:
    """Another task of the application: looks at a number at each of its turns."""

    def __init__(self, look: Callable[[], int]) -> None:
        self._look = look
        self._seen = [look()]

    async def run(self) -> None:
        while True:
            self._seen.append(self._look())
            await checkpoint()

    def steps(self) -> list[int]:
        """By how much the number rose from turn to turn, where it rose."""
        return [after - before for before, after in pairwise(self._seen) if after > before]


async def test_k23_a_flood_of_tiny_frames_leaves_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    # A flood that lasts for many turns of the usual length would take seconds.
    monkeypatch.setattr(driver, "_TURN_SECONDS", 0.001)
    # Like frames in a row would be taken at once, and cost next to nothing.
    unlike = frames.DataFrame(1, b"x").serialize() + frames.DataFrame(1, b"x", flags=["PADDED"]).serialize()
    flood = unlike * 43_000 + frames.DataFrame(1, b"", flags=["END_STREAM"]).serialize()
    async with RawServer.listen() as server, client() as c, task_group() as tasks:

        async def handler(peer: Peer) -> None:
            await peer.request()
            await peer.respond(1, end_stream=False)
            await anyio.to_thread.run_sync(_blast, peer.sock, flood)

        server.serve(handler)
        async with c.stream("GET", server.url) as response:
            (connection,) = connections_of(c)
            inner = connection.protocol._streams[1]
            ticker = Ticker(lambda: len(inner.buffer))
            tasks.start_soon(ticker.run)
            while not inner.ended:
                await checkpoint()
            steps = ticker.steps()
            # No more than a few first reads can hold, and less after one has taken long.
            assert max(steps) * len(unlike) // 2 <= 3 * _FIRST_READ
            # Twice that on average is what a fast engine comes to, which is done long before its time is up.
            assert len(steps) > len(flood) // (2 * _FIRST_READ)
            assert len(await response.aread()) == 86_000


async def test_k23_an_upload_that_the_socket_takes_at_once_leaves_others_their_turns() -> None:
    size = 64 * MIB

    def drain(sock: socket.socket) -> int:
        taken = 0
        while select.select([sock], [], [], 0.5)[0]:
            with contextlib.suppress(BlockingIOError):
                taken += len(sock.recv(4 * MIB))
        return taken

    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        tasks.start_soon(lambda: c.post(server.url, content=bytes(size)))
        peer = await server.accept()
        await peer.handshake({SETTINGS.INITIAL_WINDOW_SIZE: LARGEST_WINDOW})
        await peer.request()
        peer.stop_reading()
        await peer.send(frames.WindowUpdateFrame(0, LARGEST_WINDOW - 65_535))
        (connection,) = connections_of(c)
        ticker = Ticker(lambda: connection.protocol.body_bytes_sent)
        tasks.start_soon(ticker.run)
        assert await anyio.to_thread.run_sync(drain, peer.sock) > size - MIB
        # Trio runs tasks in any order: between two turns of this one the writer may have two of its own.
        assert max(ticker.steps()) <= 3 * MIB
