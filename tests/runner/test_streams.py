"""Requests and responses as a user sees them: bodies both ways, early ends, resets, and iterators that fail.

Both ends live in the test's loop and time is virtual, so what a test sends is all that happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hyperframe import frame as frames

import h2keep
from h2keep.protocol.outbox import HIGH_WATER
from support.clock import virtual_time
from support.pools import assert_at_rest, pool_of
from support.raw import Peer, RawRequest, RawServer, answering, task_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("every_engine", "leak_check")]

INITIAL_WINDOW = 65_535
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 0, 1, 2, 7, 8, 11


def client(**options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(http1=False, timeout=None, **options)


async def settle(seconds: float = 0.01) -> None:
    """Until everything that can happen without further waiting has happened."""
    for _ in range(20):
        await checkpoint()
    await anyio.sleep(seconds)


class Source:
    """A body iterator that tells how far it was pulled, and whether it was brought to its end."""

    def __init__(self, *chunks: bytes | Exception, endless: bool = False) -> None:
        self.chunks = chunks
        self.endless = endless
        self.pulled = 0
        self.finished = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for chunk in self.chunks:
                if isinstance(chunk, Exception):
                    await settle()
                    raise chunk
                self.pulled += len(chunk)
                yield chunk
            if self.endless:
                await anyio.sleep_forever()
        finally:
            self.finished = True


# Bodies that go out


async def _agen() -> AsyncIterator[bytes]:
    for chunk in (b"spam ", b"", b"eggs"):
        yield chunk
        await anyio.sleep(0.1)


def _gen() -> Iterator[bytes]:
    yield b"spam "
    yield b"eggs"


@pytest.mark.parametrize(
    ("make", "length"),
    [
        (lambda: b"spam eggs", "9"),
        (lambda: "spam eggs", "9"),
        (lambda: bytearray(b"spam eggs"), "9"),
        (lambda: memoryview(b"spam eggs"), "9"),
        (_agen, None),
        (_gen, None),
        (lambda: [b"spam ", b"eggs"], None),
        (lambda: [bytearray(b"spam "), memoryview(b"-eggs-")[1:5]], None),
        (lambda: [memoryview(b"spxaxmx xexgxgxs")[:2], memoryview(b"axmx xexgxgxs")[::2]], None),
    ],
    ids=["bytes", "str", "bytearray", "memoryview", "async", "generator", "list", "buffers", "strided"],
)
async def test_a_body_of_any_kind_arrives_as_it_is(make: Callable[[], Any], length: str | None) -> None:
    async with RawServer.listen() as server, client() as c:
        server.serve(answering())
        await c.post(server.url, content=make())
        request = server.peers[0].requests[1]
        assert (bytes(request.body), request.ended) == (b"spam eggs", True)
        assert request.headers.get("content-length") == length


@pytest.mark.parametrize("content", [None, b"", [], [b"", b""]], ids=["none", "bytes", "list", "chunks"])
async def test_an_empty_body_ends_the_stream(content: Any) -> None:
    async with RawServer.listen() as server, client() as c:
        server.serve(answering())
        assert (await c.post(server.url, content=content)).content == b"ok"
        request = server.peers[0].requests[1]
        assert (request.received, request.ended) == (0, True)


async def test_a_buffer_that_the_iterator_uses_again_is_sent_as_it_was() -> None:
    async def body() -> AsyncIterator[memoryview]:
        buffer = bytearray(1000)
        for number in range(50):
            buffer[:] = bytes([number]) * 1000
            yield memoryview(buffer)

    async with RawServer.listen() as server, client() as c:
        server.serve(answering())
        await c.post(server.url, content=body())
        assert bytes(server.peers[0].requests[1].body) == b"".join(bytes([number]) * 1000 for number in range(50))


async def test_an_iterator_is_pulled_no_further_than_the_high_water_mark_while_the_window_is_closed() -> None:
    chunk = 8 * 1024
    source = Source(*[bytes(chunk)] * 100)
    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        tasks.start_soon(lambda: c.post(server.url, content=source))
        peer = await server.accept()
        peer.auto_window = False
        await peer.handshake()
        request = await peer.request()
        await anyio.sleep(20.0)
        assert request.received == INITIAL_WINDOW
        assert HIGH_WATER < source.pulled - request.received <= HIGH_WATER + chunk
        await peer.send(frames.WindowUpdateFrame(0, 2**30), frames.WindowUpdateFrame(1, 2**30))
        assert len(await request.complete()) == source.pulled == 100 * chunk
        await settle()
        assert source.finished


@pytest.mark.parametrize("obstacle", ["stream", "connection"])
async def test_a_large_body_of_bytes_waits_for_either_window(obstacle: str) -> None:
    body = bytes(range(256)) * 4096
    async with RawServer.listen() as server, client() as c, task_group() as tasks:
        tasks.start_soon(lambda: c.post(server.url, content=body))
        peer = await server.accept()
        peer.auto_window = False
        await peer.handshake()
        request = await peer.request()
        await settle()
        one, other = (1, 0) if obstacle == "stream" else (0, 1)
        await peer.send(frames.WindowUpdateFrame(other, 2**30))
        await settle()
        while not request.ended:
            before = request.received
            await peer.send(frames.WindowUpdateFrame(one, 100_000))
            await settle()
            assert request.received - before == min(100_000, len(body) - before)
        assert bytes(request.body) == body


# Responses


async def test_interim_responses_are_passed_over_and_trailers_are_kept() -> None:
    async with RawServer.listen() as server, client() as c:

        async def handler(peer: Peer) -> None:
            request = await peer.request()
            await peer.send(
                peer.headers_frame(1, 100),
                peer.headers_frame(1, 103, [("link", "</style.css>")]),
            )
            await request.complete()
            await peer.respond(1, 200, [("x-kind", "final")], b"body", trailers=[("grpc-status", "0"), ("a", "b")])

        server.serve(handler)
        response = await c.post(server.url, content=[b"x"])
        assert (response.status_code, response.content) == (200, b"body")
        assert response.headers.raw == [(b"x-kind", b"final")]
        assert response.trailers.raw == [(b"grpc-status", b"0"), (b"a", b"b")]


@pytest.mark.parametrize(
    ("method", "status", "headers"),
    [("HEAD", 200, [("content-length", "5000")]), ("GET", 204, []), ("GET", 304, [("content-length", "5000")])],
)
async def test_responses_without_a_body_end_with_their_head(
    method: str, status: int, headers: list[tuple[str, str]]
) -> None:
    async with RawServer.listen() as server, client() as c:
        server.serve(answering(b"", status=status, headers=headers))
        response = await c.request(method, server.url)
        assert (response.status_code, response.content) == (status, b"")
        assert_at_rest(c)


@pytest.mark.parametrize("ending", ["flag", "empty frame", "trailers"])
async def test_a_response_ends_with_its_last_data_an_empty_frame_or_trailers(ending: str) -> None:
    async with RawServer.listen() as server, client() as c:

        async def handler(peer: Peer) -> None:
            await peer.request()
            await peer.respond(1, body=b"spam", end_stream=False)
            await anyio.sleep(1.0)
            if ending == "trailers":
                await peer.send(peer.headers_frame(1, None, [("x", "y")], end_stream=True))
            else:
                await peer.send_data(1, b"" if ending == "empty frame" else b" eggs", end_stream=True)

        server.serve(handler)
        response = await c.get(server.url)
        assert response.content == (b"spam eggs" if ending == "flag" else b"spam")
        assert not server.peers[0].seen(frames.RstStreamFrame)
        assert_at_rest(c)


# Delivery


async def test_what_came_since_the_last_look_is_one_chunk_and_what_comes_alone_is_one() -> None:
    async with RawServer.listen() as server, client() as c:
        go_on = anyio.Event()

        async def handler(peer: Peer) -> None:
            await peer.request()
            await peer.respond(1, end_stream=False)
            for number in range(100):
                await peer.send_data(1, b"%02d" % number)
                await anyio.sleep(0.01)
            await go_on.wait()
            for number in range(10):
                await peer.send_data(1, b"%02d" % number)
                await anyio.sleep(0.01)
            await peer.send_data(1, b"", end_stream=True)

        server.serve(handler)
        async with c.stream("GET", server.url) as response:
            await anyio.sleep(2.0)
            chunks = response.aiter_bytes()
            assert await anext(chunks) == b"".join(b"%02d" % number for number in range(100))
            go_on.set()
            assert [chunk async for chunk in chunks] == [b"%02d" % number for number in range(10)]


async def test_frames_that_come_in_one_read_are_one_chunk() -> None:
    async with RawServer.listen() as server, client() as c:

        async def handler(peer: Peer) -> None:
            await peer.request()
            await peer.respond(1, end_stream=False)
            await anyio.sleep(1.0)
            await peer.send(*(frames.DataFrame(1, b"x" * 10) for _ in range(500)))
            await anyio.sleep(1.0)
            await peer.send_data(1, b"y", end_stream=True)

        server.serve(handler)
        async with c.stream("GET", server.url) as response:
            assert [len(chunk) async for chunk in response.aiter_bytes()] == [5000, 1]


async def test_lines_that_come_singly_are_delivered_singly() -> None:
    async with RawServer.listen() as server, client() as c:

        async def handler(peer: Peer) -> None:
            await peer.request()
            await peer.respond(1, end_stream=False)
            for number in range(20):
                await peer.send_data(1, b"data: %d\n\n" % number)
                await anyio.sleep(1.0)
            await peer.send_data(1, b"", end_stream=True)

        server.serve(handler)
        began = anyio.current_time()
        async with c.stream("GET", server.url) as response:
            moments = [
                (line, round(anyio.current_time() - began)) async for line in response.aiter_lines() if line != ""
            ]
        assert moments == [(f"data: {number}", number) for number in range(20)]


# Leaving early


@pytest.mark.parametrize("read_some", [False, True])
async def test_k23_closing_early_resets_once_late_frames_are_credited_and_the_connection_stays(
    read_some: bool,
) -> None:
    late = 70
    async with RawServer.listen() as server, client() as c:

        async def handler(peer: Peer) -> None:
            await peer.request()
            await peer.respond(1, body=b"beginning", end_stream=False)
            await peer.expect(frames.RstStreamFrame)
            data = frames.DataFrame(1, bytes(16_384))
            for _ in range(late):
                await peer.send(data)
            await peer.send(peer.headers_frame(1, None, [("trailer", "late")], end_stream=True))
            await answering()(peer)

        server.serve(handler)
        async with c.stream("GET", server.url) as response:
            if read_some:
                chunks = response.aiter_bytes()
                assert await anext(chunks) == b"beginning"
                await chunks.aclose()  # type: ignore[attr-defined]
            await settle()
        await settle()
        assert (await c.get(server.url)).content == b"ok"
        (peer,) = server.peers
        assert [frame.error_code for frame in peer.seen(frames.RstStreamFrame)] == [CANCEL]
        credit = [frame.window_increment for frame in peer.seen(frames.WindowUpdateFrame, 0)]
        assert sum(credit[1:]) > late * 16_384 - 1024 * 1024
        assert not peer.seen(frames.WindowUpdateFrame, 1)
        assert_at_rest(c)


async def test_a_response_that_is_complete_but_unread_is_closed_without_a_word() -> None:
    async with RawServer.listen() as server, client() as c:
        server.serve(answering(b"x" * 1000))
        async with c.stream("GET", server.url):
            await settle()
        assert not server.peers[0].seen(frames.RstStreamFrame)
        assert_at_rest(c)


async def test_reading_after_closing_is_an_error_that_says_so() -> None:
    async with RawServer.listen() as server, client() as c:
        server.serve(answering(b"x" * 1000))
        async with c.stream("GET", server.url) as response:
            pass
        with pytest.raises(h2keep.ReadError, match="was closed before"):
            await response.aread()


# Early responses


async def _answer_early(peer: Peer, *, reset: int | None) -> None:
    peer.auto_window = False
    request = await peer.request()
    await peer.until(lambda: request.received == INITIAL_WINDOW)
    await peer.respond(request.stream_id, 413, body=b"too large")
    if reset is not None:
        await peer.rst(request.stream_id, reset)
    await answering()(peer)


@pytest.mark.parametrize("together", [False, True], ids=["bytes", "iterator"])
async def test_k21_an_early_response_and_a_reset_without_error_are_a_success(together: bool) -> None:
    source = Source(*[bytes(10_000)] * 100)
    async with RawServer.listen() as server, client() as c:

        async def handler(peer: Peer) -> None:
            await _answer_early(peer, reset=NO_ERROR)

        server.serve(handler)
        response = await c.post(server.url, content=source if together else bytes(1_000_000))
        assert (response.status_code, response.content) == (413, b"too large")
        await settle()
        assert source.finished == together
        assert_at_rest(c)
        assert (await c.get(server.url)).content == b"ok"
        assert len(server.peers) == 1
        assert not server.peers[0].seen(frames.RstStreamFrame)


async def test_an_early_response_that_was_read_to_its_end_stops_the_upload() -> None:
    source = Source(*[bytes(10_000)] * 100)
    async with RawServer.listen() as server, client() as c:

        async def handler(peer: Peer) -> None:
            await _answer_early(peer, reset=None)

        server.serve(handler)
        assert (await c.post(server.url, content=source)).status_code == 413
        await settle()
        assert source.finished
        assert [frame.error_code for frame in server.peers[0].seen(frames.RstStreamFrame)] == [NO_ERROR]
        assert_at_rest(c)
        assert (await c.get(server.url)).content == b"ok"


async def test_a_response_that_begins_early_is_read_while_the_upload_goes_on() -> None:
    async with RawServer.listen() as server, client() as c:

        async def echo(peer: Peer) -> None:
            request = await peer.request()
            await peer.respond(1, end_stream=False)
            sent = 0
            while not request.ended or sent < len(request.body):
                await peer.until(lambda: len(request.body) > sent or request.ended)  # noqa: B023
                chunk = bytes(request.body[sent:])
                await peer.send_data(1, chunk)
                sent += len(chunk)
            await peer.send_data(1, b"", end_stream=True)

        server.serve(echo)
        answers: list[bytes] = []
        answered = [anyio.Event() for _ in range(11)]

        async def conversation() -> AsyncIterator[bytes]:
            for number in range(10):
                yield b"%d" % number
                await answered[number].wait()

        async with c.stream("POST", server.url, content=conversation()) as response:
            async for chunk in response.aiter_bytes():
                answers.append(chunk)
                answered[len(answers) - 1].set()
        assert answers == [b"%d" % number for number in range(10)]
        assert_at_rest(c)


async def test_a_slot_that_an_upload_frees_after_its_response_serves_the_queue() -> None:
    limits = h2keep.Limits(max_connections=1)
    go_on = anyio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await go_on.wait()
        yield b"last"

    async def handler(peer: Peer) -> None:
        await peer.request()
        await peer.respond(1, body=b"early")
        await answering()(peer)

    async with RawServer.listen() as server, client(limits=limits) as c:
        server.serve(handler, {frames.SettingsFrame.MAX_CONCURRENT_STREAMS: 1})
        async with c.stream("POST", server.url, content=body()) as response, task_group() as tasks:
            await settle()
            answers: list[bytes] = []

            async def second() -> None:
                answers.append((await c.get(server.url)).content)

            tasks.start_soon(second)
            await settle()
            assert not answers
            go_on.set()
            await settle()
            assert answers == [b"ok"]
            assert await response.aread() == b"early"


# Resets by the server


@pytest.mark.parametrize(
    ("code", "before", "unprocessed"),
    [
        (REFUSED_STREAM, None, True),
        (REFUSED_STREAM, 100, False),
        (REFUSED_STREAM, 200, False),
        (NO_ERROR, None, False),
        (PROTOCOL_ERROR, None, False),
        (INTERNAL_ERROR, 200, False),
        (CANCEL, 200, False),
        (ENHANCE_YOUR_CALM, None, False),
        (0xDEAD, None, False),
    ],
)
async def test_k24_a_reset_fails_its_request_alone_and_only_a_refusal_is_unprocessed(
    code: int, before: int | None, unprocessed: bool
) -> None:
    async def once() -> AsyncIterator[bytes]:
        yield b"once"

    async def handler(peer: Peer) -> None:
        request = await peer.request()
        await request.complete()
        if before is not None:
            await peer.send(peer.headers_frame(request.stream_id, before))
        await peer.rst(request.stream_id, code)
        await answering()(peer)

    # A body of which nothing is kept can't be sent again, so a refusal is to be seen, too.
    async with RawServer.listen() as server, client(replay_buffer=0) as c:
        server.serve(handler)
        with pytest.raises(h2keep.StreamReset) as caught:
            await c.post(server.url, content=once())
        assert (caught.value.error_code, caught.value.unprocessed) == (code, unprocessed)
        assert server.url in str(caught.value)
        assert (await c.get(server.url)).content == b"ok"
        assert len(server.peers) == 1
        assert len(server.peers[0].requests) == 2
        assert not server.peers[0].seen(frames.RstStreamFrame)
        assert_at_rest(c)


async def test_k8_bytes_that_came_before_a_reset_are_handed_out_first() -> None:
    async def handler(peer: Peer) -> None:
        await peer.request()
        await peer.respond(1, body=b"half", end_stream=False)
        await peer.rst(1, INTERNAL_ERROR)

    async with RawServer.listen() as server, client() as c:
        server.serve(handler)
        async with c.stream("GET", server.url) as response:
            await settle()
            chunks = response.aiter_bytes()
            assert await anext(chunks) == b"half"
            with pytest.raises(h2keep.StreamReset, match="INTERNAL_ERROR"):
                await anext(chunks)
        assert_at_rest(c)


@pytest.mark.parametrize("waits", ["for room", "for itself"])
async def test_a_reset_in_mid_upload_ends_the_iterator(waits: str) -> None:
    source = Source(*[bytes(10_000)] * (100 if waits == "for room" else 1), endless=True)

    async def handler(peer: Peer) -> None:
        peer.auto_window = False
        await peer.request()
        await settle()
        await peer.rst(1, CANCEL)
        await answering()(peer)

    async with RawServer.listen() as server, client() as c:
        server.serve(handler)
        with pytest.raises(h2keep.StreamReset):
            await c.post(server.url, content=source)
        await settle()
        assert source.finished
        assert (await c.get(server.url)).content == b"ok"
        assert_at_rest(c)


# Iterators that fail


class Oops(Exception):
    """What a user's own code raises."""


@pytest.mark.parametrize("chunks", [0, 1, 3, 40], ids=["at once", "after one", "after three", "behind the mark"])
async def test_a_body_iterators_own_exception_reaches_the_caller_and_resets_that_stream_alone(chunks: int) -> None:
    failure = Oops("no more")
    source = Source(*[b"x" * 5000] * chunks, failure)
    async with RawServer.listen() as server, client() as c:
        server.serve(answering(b"fine", delay=5.0))
        async with task_group() as tasks:
            neighbour: list[bytes] = []

            async def other() -> None:
                neighbour.append((await c.get(server.url)).content)

            tasks.start_soon(other)
            await settle()
            with pytest.raises(Oops) as caught:
                await c.post(server.url, content=source)
            assert caught.value is failure
            assert source.finished
            await anyio.sleep(10.0)
            assert neighbour == [b"fine"]
        assert (await c.get(server.url)).content == b"fine"
        (peer,) = server.peers
        assert [(frame.stream_id, frame.error_code) for frame in peer.seen(frames.RstStreamFrame)] == [(3, CANCEL)]
        assert_at_rest(c)


async def test_a_request_whose_iterator_fails_before_anything_was_sent_is_never_sent() -> None:
    async def body() -> AsyncIterator[bytes]:
        raise Oops
        yield b""

    async with RawServer.listen() as server, client() as c:
        server.serve(answering())
        await c.get(server.url)
        for _ in range(20):
            with pytest.raises(Oops):
                await c.post(server.url, content=body())
        await c.get(server.url)
        (peer,) = server.peers
        sent = [request for request in peer.requests.values() if request.method == "POST"]
        assert [request.reset for request in sent] == [CANCEL] * len(sent)
        assert_at_rest(c)


async def test_a_sync_generators_exception_reaches_the_caller_and_its_finally_ran() -> None:
    finished = []

    def body() -> Iterator[bytes]:
        try:
            yield b"x"
            raise Oops
        finally:
            finished.append(True)

    async with RawServer.listen() as server, client() as c:
        server.serve(answering())
        with pytest.raises(Oops):
            await c.post(server.url, content=body())
        assert finished == [True]
        assert (await c.get(server.url)).content == b"ok"


async def test_an_iterator_that_fails_after_the_head_of_the_response_fails_the_reading() -> None:
    go_on = anyio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        await go_on.wait()
        raise Oops

    async def handler(peer: Peer) -> None:
        await peer.request()
        await peer.respond(1, body=b"half", end_stream=False)
        await answering()(peer)

    async with RawServer.listen() as server, client() as c:
        server.serve(handler)
        async with c.stream("POST", server.url, content=body()) as response:
            chunks = response.aiter_bytes()
            assert await anext(chunks) == b"half"
            go_on.set()
            with pytest.raises(Oops):
                await anext(chunks)
        await settle()
        assert [frame.error_code for frame in server.peers[0].seen(frames.RstStreamFrame)] == [CANCEL]
        assert (await c.get(server.url)).content == b"ok"


@pytest.mark.parametrize(
    ("content", "declared", "complaint"),
    [
        (b"12345", "4", "longer than its Content-Length by at least 1 bytes"),
        (b"12345", "6", "1 bytes shorter than its Content-Length"),
        (None, "6", "no body, but its Content-Length is 6"),
        ([b"123", b"45"], "4", "longer than its Content-Length by at least 1 bytes"),
        ([b"123", b"45"], "6", "1 bytes shorter than its Content-Length"),
        ([], "1", "1 bytes shorter than its Content-Length"),
        ([b"123", "45"], "5", "gave a str"),
        ([b"123", None], "5", "gave a NoneType"),
    ],
)
async def test_a_body_that_contradicts_its_length_or_kind_resets_its_stream_alone(
    content: Any, declared: str, complaint: str
) -> None:
    async with RawServer.listen() as server, client(limits=h2keep.Limits(keepalive_expiry=60.0)) as c:
        server.serve(answering())
        await c.get(server.url)
        with pytest.raises(h2keep.LocalProtocolError, match=complaint):
            await c.post(server.url, content=content, headers={"content-length": declared})
        assert_at_rest(c)
        assert (await c.get(server.url)).content == b"ok"
        await settle()
        (peer,) = server.peers
        failed = [request for request in peer.requests.values() if request.method == "POST"]
        assert [request.reset for request in failed] == [CANCEL] * len(failed)
        assert not any(request.ended for request in failed)
        assert not failed or isinstance(content, list)
        await anyio.sleep(61.0)
        assert peer.ended
        assert not pool_of(c)._states


async def test_malformed_fields_are_refused_before_anything_is_sent() -> None:
    async with RawServer.listen() as server, client() as c:
        server.serve(answering())
        await c.get(server.url)
        with pytest.raises(h2keep.LocalProtocolError) as caught:
            await c.get(server.url, headers={"bad name": "x"})
        assert caught.value.unprocessed
        assert_at_rest(c)
        assert (await c.get(server.url)).content == b"ok"
        assert len(server.peers[0].requests) == 2


async def test_a_malformed_response_fails_its_request_alone() -> None:
    async def handler(peer: Peer) -> None:
        first, second = await peer.request(), await peer.request()
        await peer.send(peer.headers_frame(first.stream_id, None, [("no", "status")]))
        await peer.respond(second.stream_id, body=b"fine")

    async with RawServer.listen() as server, client() as c:
        server.serve(handler)
        answers: list[Any] = []

        async def one() -> None:
            try:
                answers.append((await c.get(server.url)).content)
            except h2keep.RemoteProtocolError as error:
                answers.append(type(error))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            tasks.start_soon(one)
        assert sorted(answers, key=str) == [h2keep.RemoteProtocolError, b"fine"]
        await settle()
        assert [frame.error_code for frame in server.peers[0].seen(frames.RstStreamFrame)] == [PROTOCOL_ERROR]
        assert_at_rest(c)


async def test_a_hundred_uploads_at_once_arrive_whole() -> None:
    async with RawServer.listen() as server, client() as c:

        async def answer(request: RawRequest) -> None:
            body = await request.complete()
            await request.peer.respond(request.stream_id, body=b"%d %d" % (len(body), body[-1]))

        async def handler(peer: Peer) -> None:
            async with task_group() as tasks:
                while True:
                    tasks.start_soon(answer, await peer.request())

        server.serve(handler)
        answers: dict[int, bytes] = {}

        async def one(number: int) -> None:
            source = Source(*[bytes([number]) * 1111] * number)
            answers[number] = (await c.post(server.url, content=source)).content

        async with anyio.create_task_group() as tasks:
            for number in range(1, 101):
                tasks.start_soon(one, number)
        assert answers == {number: b"%d %d" % (1111 * number, number) for number in range(1, 101)}
        assert len(server.peers) == 1
        assert_at_rest(c)
