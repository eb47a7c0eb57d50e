"""Sending again what a server provably didn't process (K24): when, when not, and with every byte of its body.

The cases are small scripts of a server that run through three front doors: the asynchronous client on asyncio and
trio, the synchronous client, and a transport of httpx2. The rest looks into what may happen between two attempts.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import pytest
from anyio.lowlevel import checkpoint
from hyperframe import frame as frames

import h2keep
import h2keep.httpx2
from h2keep.runner.request import REPLAY_BUFFER
from support.background import eventually, nothing_left
from support.clock import virtual_time
from support.leaks import no_leaks
from support.pools import assert_at_rest, pool_of
from support.raw import GONE, Peer, RawServer, task_group
from support.threaded import threaded

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from h2keep.runner.connection import Http2Connection
    from support.raw import RawRequest

on_virtual_time = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]

STREAMS = frames.SettingsFrame.MAX_CONCURRENT_STREAMS
NO_ERROR, INTERNAL_ERROR, REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM, HTTP_1_1_REQUIRED = 0, 2, 7, 8, 11, 13
MAX_STREAM_ID = 2**31 - 1
WIDE_OPEN = {frames.SettingsFrame.INITIAL_WINDOW_SIZE: 2**31 - 1}
#: Both quick enough for real time, and unhurried enough for a busy machine.
KEEPALIVE = h2keep.Keepalive(read_idle_timeout=0.5, ping_timeout=0.5)


def async_client(**options: Any) -> h2keep.AsyncClient:
    defaults: dict[str, Any] = {"verify": False, "timeout": None}
    return h2keep.AsyncClient(http1=False, keepalive=KEEPALIVE, **defaults | options)


def blocking_client(**options: Any) -> h2keep.Client:
    return h2keep.Client(verify=False, http1=False, keepalive=KEEPALIVE, timeout=None, **options)


def httpx2_client(**options: Any) -> httpx2.AsyncClient:
    transport = h2keep.httpx2.AsyncKeepaliveTransport(verify=False, http1=False, keepalive=KEEPALIVE, **options)
    return httpx2.AsyncClient(transport=transport, timeout=None)


# Bodies


@dataclass
class Chunks:
    """What a body's iterator gives, and what became of it."""

    count: int = 30
    size: int = 10_000
    #: Seconds between two chunks.
    delay: float = 0.002
    given: list[bytes] = field(default_factory=list)
    #: The tasks or threads that pulled.
    pullers: set[Any] = field(default_factory=set)
    begun: int = 0
    finished: int = 0

    @property
    def whole(self) -> bytes:
        return b"".join(bytes([number % 256]) * self.size for number in range(self.count))

    def _next(self, puller: Any) -> bytes:
        self.pullers.add(puller)
        chunk = bytes([len(self.given) % 256]) * self.size
        self.given.append(chunk)
        return chunk

    def blocking(self) -> Iterator[bytes]:
        self.begun += 1
        try:
            for _ in range(self.count):
                yield self._next(threading.current_thread())
                time.sleep(self.delay)
        finally:
            self.finished += 1

    async def asynchronous(self) -> AsyncIterator[bytes]:
        self.begun += 1
        try:
            for _ in range(self.count):
                yield self._next(anyio.get_current_task().id)
                await anyio.sleep(self.delay)
        finally:
            self.finished += 1

    def assert_pulled_once(self) -> None:
        """Every chunk but once and in order, by one task or thread, and the generator came to its end."""
        assert (self.begun, self.finished, len(self.pullers)) == (1, 1, 1)
        assert len(self.given) <= self.count
        assert b"".join(self.given) == self.whole[: len(self.given) * self.size]


# What a server does on one connection


async def answer(peer: Peer) -> None:
    """Answer every request with its own body."""

    async def echo(request: RawRequest) -> None:
        with contextlib.suppress(*GONE):
            await peer.respond(request.stream_id, body=b"echo:" + await request.complete())

    async with task_group() as tasks:
        while True:
            tasks.start_soon(echo, await peer.request())


async def go_away(peer: Peer, code: int = NO_ERROR, debug: bytes = b"") -> None:
    """Process nothing of what has come."""
    await (await peer.request()).complete()
    await peer.goaway(0, code, debug)
    await peer.until(lambda: False)


async def go_away_in_mid_upload(peer: Peer) -> None:
    request = await peer.request()
    await peer.until(lambda: request.received > 0)
    await peer.goaway(0)
    await peer.until(lambda: False)


async def go_away_before_the_body(peer: Peer) -> None:
    await peer.request()
    await peer.goaway(0)
    await peer.until(lambda: False)


async def go_away_in_two_steps(peer: Peer) -> None:
    """As servers do that wait a round trip for requests under way."""
    await (await peer.request()).complete()
    await peer.goaway(MAX_STREAM_ID)
    await anyio.sleep(0.05)
    await peer.goaway(0)
    await peer.until(lambda: False)


async def refuse(peer: Peer) -> None:
    while True:
        request = await peer.request()
        await request.complete()
        await peer.rst(request.stream_id, REFUSED_STREAM)


async def refuse_and_go_away(peer: Peer) -> None:
    first = await peer.request()
    await first.complete()
    await peer.rst(first.stream_id, REFUSED_STREAM)
    await (await peer.request()).complete()
    await peer.goaway(0)
    await peer.until(lambda: False)


async def refuse_once(peer: Peer) -> None:
    request = await peer.request()
    await request.complete()
    await peer.rst(request.stream_id, REFUSED_STREAM)
    await answer(peer)


async def refuse_after_1xx(peer: Peer) -> None:
    request = await peer.request()
    await request.complete()
    await peer.send(peer.headers_frame(request.stream_id, 103))
    await peer.rst(request.stream_id, REFUSED_STREAM)
    await answer(peer)


async def refuse_after_the_head(peer: Peer) -> None:
    request = await peer.request()
    await request.complete()
    await peer.send(peer.headers_frame(request.stream_id, 200))
    await peer.rst(request.stream_id, REFUSED_STREAM)
    await answer(peer)


async def reset(peer: Peer, code: int) -> None:
    request = await peer.request()
    await request.complete()
    await peer.rst(request.stream_id, code)
    await answer(peer)


async def end(peer: Peer) -> None:
    await (await peer.request()).complete()
    await peer.eof()
    await peer.until(lambda: False)


async def abort(peer: Peer) -> None:
    await (await peer.request()).complete()
    peer.abort()


async def promise_and_end(peer: Peer) -> None:
    """GOAWAY that includes the request, then nothing of it."""
    request = await peer.request()
    await request.complete()
    await peer.goaway(request.stream_id)
    await peer.eof()
    await peer.until(lambda: False)


async def fall_silent(peer: Peer) -> None:
    await (await peer.request()).complete()
    peer.auto_ack_pings = False
    await peer.until(lambda: False)


async def break_the_rules(peer: Peer) -> None:
    await (await peer.request()).complete()
    await peer.send(frames.DataFrame(99, b"on a stream that never was"))
    await peer.until(lambda: False)


@dataclass
class Script:
    """What the server does on its first, second ... connection; what it did on the last it does on all that follow."""

    steps: tuple[Callable[[Peer], Awaitable[None]], ...]
    peers: list[Peer] = field(default_factory=list)

    async def __call__(self, peer: Peer) -> None:
        self.peers.append(peer)
        await self.steps[min(len(self.peers), len(self.steps)) - 1](peer)

    @property
    def requests(self) -> list[int]:
        """How many requests came, by connection."""
        return [len(peer.requests) for peer in self.peers]


@dataclass(frozen=True)
class Case:
    """What happens to one POST."""

    #: The server's steps.
    steps: tuple[Callable[[Peer], Awaitable[None]], ...]
    #: How many requests come, by connection.
    requests: list[int]
    #: None if there is an answer; else the error, and its `unprocessed`.
    error: type[h2keep.H2KeepError] | None = None
    unprocessed: bool = False
    says: str = ""
    #: The kinds of bodies with which this happens.
    bodies: tuple[str, ...] = ("bytes", "stream")
    replay_buffer: int = REPLAY_BUFFER


Lost, Reset, GoingAway = h2keep.ConnectionLost, h2keep.StreamReset, h2keep.ConnectionGoingAway
MOVED = [1, 1]

CASES = {
    # Provably not processed: sent again.
    "goaway": Case((go_away, answer), MOVED, bodies=("none", "bytes", "stream")),
    "goaway with an error and debug data": Case(
        (partial(go_away, code=ENHANCE_YOUR_CALM, debug=b"\xff busy"), answer), MOVED
    ),
    "goaway in mid-upload": Case((go_away_in_mid_upload, answer), MOVED),
    "goaway in two steps": Case((go_away_in_two_steps, answer), MOVED),
    "goaway three times": Case((go_away, go_away, go_away, answer), [1, 1, 1, 1]),
    "goaway before the body": Case((go_away_before_the_body, answer), MOVED, bodies=("late",), replay_buffer=0),
    "refused": Case((refuse_once,), [2], bodies=("none", "bytes", "stream")),
    "refused, then goaway": Case((refuse_and_go_away, answer), [2, 1]),
    "goaway, then refused": Case((go_away, refuse_once), [1, 2]),
    "a body of exactly what is kept": Case((go_away, answer), MOVED, bodies=("stream",), replay_buffer=300_000),
    # Provably not processed, but not again.
    "a body that was not kept": Case(
        (go_away, answer), [1], GoingAway, True, "GOAWAY", bodies=("stream",), replay_buffer=299_999
    ),
    "a body of which nothing is kept, in mid-upload": Case(
        (go_away_in_mid_upload, answer), [1], GoingAway, True, bodies=("stream",), replay_buffer=0
    ),
    "goaway for ever": Case((go_away,), [1, 1, 1, 1], GoingAway, True, "4 attempts were made"),
    "refused for ever": Case((refuse,), [4], Reset, True, "4 attempts were made"),
    "a server that wants HTTP/1.1": Case((partial(go_away, code=HTTP_1_1_REQUIRED),), [1], GoingAway, True),
    # Perhaps processed: never again.
    "refused after 1xx": Case((refuse_after_1xx,), [1], Reset, says="REFUSED_STREAM"),
    "refused after the head": Case((refuse_after_the_head,), [1], Reset, says="REFUSED_STREAM"),
    "reset": Case((partial(reset, code=CANCEL),), [1], Reset, says="CANCEL"),
    "reset with an internal error": Case((partial(reset, code=INTERNAL_ERROR),), [1], Reset),
    "end of file": Case((end,), [1], Lost, says="closed by the server", bodies=("none", "bytes", "stream")),
    "TCP reset": Case((abort,), [1], Lost),
    "goaway with a promise, then end of file": Case((promise_and_end,), [1], Lost),
    "silence": Case((fall_silent,), [1], h2keep.PingTimeout, says="is unknown"),
    "a broken rule": Case((break_the_rules,), [1], h2keep.RemoteProtocolError),
}

WHAT = [pytest.param(case, body, id=f"{name}-{body}") for name, case in CASES.items() for body in case.bodies]


def body_of(kind: str, chunks: Chunks, *, blocking: bool) -> Any:
    if kind in ("stream", "late"):
        return chunks.blocking() if blocking else chunks.asynchronous()
    return chunks.whole if kind == "bytes" else None


class Late(Chunks):
    """A body that begins only when its request has moved."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script

    def blocking(self) -> Iterator[bytes]:
        eventually(lambda: len(self._script.peers) == 2)
        yield from super().blocking()

    async def asynchronous(self) -> AsyncIterator[bytes]:
        # By then it has.
        await anyio.sleep(1.0)
        async for chunk in super().asynchronous():
            yield chunk


def check(case: Case, script: Script, kind: str, chunks: Chunks, outcome: Any) -> None:
    """The outcome is what it should be, and nothing was sent too often, or in part."""
    assert script.requests == case.requests
    if case.error is None:
        assert outcome == b"echo:" + (b"" if kind == "none" else chunks.whole)
    else:
        assert type(outcome).__mro__[type(outcome).__module__ != "h2keep.errors"] is case.error
        assert outcome.unprocessed is case.unprocessed
        assert case.says in str(outcome)
        if len(case.requests) == 1 and case.requests[0] == 1:
            assert "attempts" not in str(outcome)
    # Each attempt began with the body's first byte, and none had a byte too much.
    for peer in script.peers:
        for request in peer.requests.values():
            assert chunks.whole.startswith(bytes(request.body))
    if kind in ("stream", "late"):
        chunks.assert_pulled_once()
        assert (len(chunks.given) == chunks.count) or case.error is not None


class TestAsyncClient:
    pytestmark = on_virtual_time

    @pytest.mark.parametrize(("case", "kind"), WHAT)
    async def test_k24_only_what_was_not_processed_is_sent_again_and_all_of_it(self, case: Case, kind: str) -> None:
        script = Script(case.steps)
        chunks = Late(script) if kind == "late" else Chunks()
        async with (
            RawServer.listen() as server,
            async_client(replay_buffer=case.replay_buffer) as client,
        ):
            server.serve(script)
            outcome: Any
            try:
                body = body_of(kind, chunks, blocking=False)
                outcome = (await client.post(server.url, content=body)).content
            except h2keep.H2KeepError as error:
                outcome = error
            await anyio.sleep(1.0)
            check(case, script, kind, chunks, outcome)
            assert_at_rest(client)


class TestHttpx2:
    pytestmark = on_virtual_time

    @pytest.mark.parametrize(("case", "kind"), WHAT)
    async def test_k24_only_what_was_not_processed_is_sent_again_and_all_of_it(self, case: Case, kind: str) -> None:
        script = Script(case.steps)
        chunks = Late(script) if kind == "late" else Chunks()
        async with RawServer.listen() as server, httpx2_client(replay_buffer=case.replay_buffer) as client:
            server.serve(script)
            outcome: Any
            try:
                body = body_of(kind, chunks, blocking=False)
                outcome = (await client.post(server.url, content=body)).content
            except httpx2.TransportError as error:
                outcome = error
            await anyio.sleep(1.0)
            check(case, script, kind, chunks, outcome)


class TestClient:
    @pytest.mark.parametrize(("case", "kind"), WHAT)
    def test_k24_only_what_was_not_processed_is_sent_again_and_all_of_it(self, case: Case, kind: str) -> None:
        script = Script(case.steps)
        chunks = Late(script) if kind == "late" else Chunks()
        with (
            nothing_left(),
            threaded(script) as server,
            blocking_client(replay_buffer=case.replay_buffer) as client,
        ):
            outcome: Any
            try:
                body = body_of(kind, chunks, blocking=True)
                outcome = client.post(server.url, content=body).content
            except h2keep.H2KeepError as error:
                outcome = error
            check(case, script, kind, chunks, outcome)

    def test_k22_k24_in_threads_connections_that_age_and_are_retired_fail_no_request(self) -> None:
        processed: list[str] = []

        async def process_some(peer: Peer) -> None:
            for number in range(30):
                request = await peer.request()
                await request.complete()
                processed.append(request.path)
                if number == 29:
                    await peer.goaway(request.stream_id)
                await peer.respond(request.stream_id, body=b"ok")
            await peer.until(lambda: False)

        def work(worker: int) -> list[bytes]:
            answers = []
            for number in range(60):
                answers.append(client.post(f"{server.url}/{worker}/{number}", content=b"x" * 100).content)
                time.sleep(0.01)
            return answers

        limits = h2keep.Limits(max_connections=1, max_connection_age=0.2)
        with (
            nothing_left(),
            threaded(process_some) as server,
            blocking_client(limits=limits) as client,
            ThreadPoolExecutor(8) as executor,
        ):
            assert [answers for worker in executor.map(work, range(8)) for answers in worker] == [b"ok"] * 480
            assert len(processed) == len(set(processed)) == 480
            assert len(server.peers) >= 16


# What was never handed to the engine, and what was never opened at all


async def stop_reading(peer: Peer) -> None:
    """The first request's body fills every buffer of the kernel's, so that what comes behind it is never encoded."""
    await peer.send(frames.WindowUpdateFrame(0, WIDE_OPEN[frames.SettingsFrame.INITIAL_WINDOW_SIZE] - 65_535))
    await peer.request()
    peer.stop_reading()
    await peer.until(lambda: False)


def is_blocked(connection: Http2Connection) -> bool:
    """Whether the kernel takes no more of what is to be sent."""
    before = connection.protocol.body_bytes_sent
    time.sleep(0.3)
    return bool(connection.driver._unsent) and connection.protocol.body_bytes_sent == before  # type: ignore[attr-defined]


async def end_when_asked_for_life(peer: Peer) -> None:
    """Answer, then end at the PING that is to show whether the connection lives."""
    request = await peer.request()
    await peer.respond(request.stream_id, body=b"echo:")
    peer.auto_ack_pings = False
    await peer.until(lambda: bool(peer.pings))
    await peer.eof()
    await peer.until(lambda: False)


class TestNeverSent:
    @pytest.mark.anyio
    @virtual_time
    @pytest.mark.parametrize("door", ["h2keep", "httpx2"])
    async def test_k24_a_request_that_was_never_encoded_on_a_lost_connection_moves(self, door: str) -> None:
        script = Script((stop_reading, answer))
        make: Any = async_client if door == "h2keep" else httpx2_client
        async with no_leaks(), RawServer.listen(receive_buffer=4096) as server, make() as client:
            server.serve(script, WIDE_OPEN)
            outcomes: list[Any] = []

            async def post(body: bytes) -> None:
                try:
                    outcomes.append((await client.post(server.url, content=body)).content)
                except h2keep.H2KeepError as error:
                    outcomes.append(error)

            async with anyio.create_task_group() as tasks:
                # More than the kernel takes.
                tasks.start_soon(post, bytes(20_000_000))
                peer = await server.peer(0)
                await peer.until(lambda: len(peer.requests) == 1)
                await anyio.sleep(0.1)
                for _ in range(5):
                    tasks.start_soon(post, b"small")
                await anyio.sleep(0.1)
                script.peers[0].abort()
            assert script.requests == [1, 5]
            (lost,) = [outcome for outcome in outcomes if isinstance(outcome, h2keep.ConnectionLost)]
            assert not lost.unprocessed
            assert outcomes.count(b"echo:small") == 5

    def test_k24_a_request_that_was_never_encoded_on_a_lost_connection_moves_in_threads_too(self) -> None:
        script = Script((stop_reading, answer))
        outcomes: list[Any] = []

        def post(body: bytes) -> None:
            try:
                outcomes.append(client.post(server.url, content=body).content)
            except h2keep.H2KeepError as error:
                outcomes.append(error)

        keepalive = h2keep.Keepalive(read_idle_timeout=60.0)
        with (
            nothing_left(),
            threaded(script, settings=WIDE_OPEN, receive_buffer=4096) as server,
            h2keep.Client(verify=False, http1=False, timeout=None, keepalive=keepalive) as client,
        ):
            threads = [threading.Thread(target=post, args=[bytes(20_000_000)])]
            threads[0].start()
            eventually(lambda: script.requests == [1])
            lease = client._connections._lease
            assert lease is not None
            (connection,) = lease.pool()._states
            eventually(partial(is_blocked, connection))
            small = [threading.Thread(target=post, args=[b"small"]) for _ in range(5)]
            for thread in small:
                thread.start()
            eventually(lambda: connection.requests == 6)
            server.call(script.peers[0].abort)
            for thread in (*threads, *small):
                thread.join(10.0)
        assert script.requests == [1, 5]
        (lost,) = [outcome for outcome in outcomes if isinstance(outcome, h2keep.ConnectionLost)]
        assert not lost.unprocessed
        assert outcomes.count(b"echo:small") == 5

    @pytest.mark.anyio
    @virtual_time
    @pytest.mark.parametrize("door", ["h2keep", "httpx2"])
    async def test_k9_k24_after_a_failed_verification_the_request_is_sent_once_on_another_connection(
        self, door: str
    ) -> None:
        script = Script((end_when_asked_for_life, answer))
        make: Any = async_client if door == "h2keep" else httpx2_client
        async with no_leaks(), RawServer.listen() as server, make() as client:
            server.serve(script)
            await client.get(server.url)
            await anyio.sleep(1.0)
            chunks = Chunks()
            response = await client.post(server.url, content=chunks.asynchronous())
            assert response.content == b"echo:" + chunks.whole
            chunks.assert_pulled_once()
            assert script.requests == [1, 1]

    def test_k9_k24_after_a_failed_verification_the_request_is_sent_once_in_threads_too(self) -> None:
        script = Script((end_when_asked_for_life, answer))
        with nothing_left(), threaded(script) as server, blocking_client() as client:
            client.get(server.url)
            time.sleep(0.6)
            chunks = Chunks()
            assert client.post(server.url, content=chunks.blocking()).content == b"echo:" + chunks.whole
            chunks.assert_pulled_once()
            assert script.requests == [1, 1]


# Between two attempts


class Task:
    """A request in a task of its own, and what became of it."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.outcome: Any = None
        self.ended = anyio.Event()

    async def run(self, client: h2keep.AsyncClient, url: str, **options: Any) -> None:
        with self.scope:
            try:
                self.outcome = (await client.post(url, **options)).content
            except Exception as error:  # noqa: BLE001
                self.outcome = error
            self.ended.set()


async def steps(number: int) -> None:
    for _ in range(number):
        await checkpoint()


@pytest.mark.anyio
@virtual_time
@pytest.mark.usefixtures("leak_check")
class TestBetweenAttempts:
    async def test_k24_what_the_iterator_gives_during_the_dial_is_sent_though_it_is_more_than_may_be_kept(
        self, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        go_on = [anyio.Event(), anyio.Event()]
        taken = []

        async def body() -> AsyncIterator[bytes]:
            yield b"0123456789"
            for number, event in enumerate(go_on):
                await event.wait()
                taken.append(number)
                yield b"%d" % number * 5000

        async with (
            RawServer.listen(server_ssl) as server,
            async_client(verify=client_ssl, replay_buffer=10) as client,
            task_group() as tasks,
        ):
            task = Task()
            tasks.start_soon(partial(task.run, client, server.url, content=body()))
            old = await server.accept()
            await old.handshake()
            request = await old.request()
            await old.until(lambda: request.received == 10)
            await old.goaway(0)
            # Until its TLS handshake there is no connection.
            new = await server.accept()
            for event in go_on:
                event.set()
            await anyio.sleep(0.1)
            assert taken == [0]
            await new.handshake()
            again = await new.request()
            await again.complete()
            assert bytes(again.body) == b"0123456789" + b"0" * 5000 + b"1" * 5000
            await new.respond(again.stream_id, body=b"all of it")
            await anyio.sleep(0.1)
            assert task.outcome == b"all of it"
            assert_at_rest(client)

    async def test_k24_in_a_back_off_the_iterator_is_pulled_once_and_no_byte_is_lost(self) -> None:
        started = anyio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield b"a" * 100
            await started.wait()
            yield b"b" * 100
            yield b"c" * 100

        async def refuse_at_once(peer: Peer) -> None:
            request = await peer.request()
            await peer.until(lambda: request.received == 100)
            await peer.rst(request.stream_id, REFUSED_STREAM)
            await answer(peer)

        async with RawServer.listen() as server, async_client(replay_buffer=100) as client, task_group() as tasks:
            server.serve(refuse_at_once)
            task = Task()
            tasks.start_soon(partial(task.run, client, server.url, content=body()))
            peer = await server.peer(0)
            await peer.until(lambda: len(peer.requests) == 1 and peer.requests[1].received == 100)
            await steps(10)
            assert pool_of(client).busy
            started.set()
            await anyio.sleep(1.0)
            assert task.outcome == b"echo:" + b"a" * 100 + b"b" * 100 + b"c" * 100
            assert_at_rest(client)
            assert not pool_of(client).busy

    @pytest.mark.parametrize("when", range(12))
    @pytest.mark.parametrize("step", [go_away, refuse_once])
    async def test_k24_giving_up_at_any_moment_sends_no_more_and_leaves_nothing(
        self, step: Callable[[Peer], Awaitable[None]], when: int
    ) -> None:
        chunks = Chunks(count=3)
        async with RawServer.listen() as server, async_client() as client, task_group() as tasks:
            script = Script((step, answer))
            server.serve(script)
            await anyio.sleep(0.1)
            task = Task()
            tasks.start_soon(partial(task.run, client, server.url, content=chunks.asynchronous()))
            peer = await server.peer(0)
            await peer.until(lambda: len(peer.requests) == 1 and peer.requests[1].ended)
            await steps(when)
            task.scope.cancel()
            await anyio.sleep(0.4)
            # The answer may have been there already.
            assert task.outcome in (None, b"echo:" + chunks.whole)
            assert (chunks.begun, chunks.finished) == (1, 1)
            open_requests = [
                request
                for peer in script.peers
                for request in peer.requests.values()
                if not request.ended and request.reset is None
            ]
            assert not open_requests
            assert (await client.post(server.url, content=b"next")).content == b"echo:next"
            assert_at_rest(client)
            assert len(pool_of(client)._moves) == 0

    async def test_k24_a_request_that_is_given_up_in_the_step_in_which_it_would_be_opened_is_not(self) -> None:
        async with RawServer.listen() as server, async_client(limits=ONE_CONNECTION) as client, task_group() as tasks:
            tried = Task()
            tasks.start_soon(partial(tried.run, client, server.url, content=b"tried"))
            peer = await server.accept()
            await peer.handshake({STREAMS: 1})
            first = await peer.request()
            await first.complete()
            # Refused, its place is taken, and it queues.
            waiting = Task()
            tasks.start_soon(partial(waiting.run, client, server.url, content=b"waiting"))
            await anyio.sleep(0.1)
            await peer.rst(first.stream_id, REFUSED_STREAM)
            second = await peer.request()
            await second.complete()
            await anyio.sleep(1.0)
            (state,) = pool_of(client)._origins.values()
            assert state.waiting == 1
            # In one step it is given up, and there is room for it.
            (waiter,) = state.queue
            assert waiter.again is not None
            waiter.again.close()
            pool_of(client)._serve(state)
            assert (state.waiting, len(state.queue)) == (0, 0)
            tried.scope.cancel()
            await peer.respond(second.stream_id, body=b"fine")
            await anyio.sleep(0.1)
            assert waiting.outcome == b"fine"
            assert len(peer.requests) == 2
            assert_at_rest(client)

    @pytest.mark.parametrize("backoff", [False, True])
    async def test_k24_an_iterator_that_fails_meanwhile_is_its_requesters_affair(self, backoff: bool) -> None:
        go_on = anyio.Event()
        failure = RuntimeError("no more")

        async def body() -> AsyncIterator[bytes]:
            yield b"x"
            await go_on.wait()
            raise failure

        async with RawServer.listen() as server, async_client() as client, task_group() as tasks:
            task = Task()
            tasks.start_soon(partial(task.run, client, server.url, content=body()))
            old = await server.accept()
            await old.handshake()
            request = await old.request()
            await old.until(lambda: request.received == 1)
            await (old.rst(request.stream_id, REFUSED_STREAM) if backoff else old.goaway(0))
            await steps(5)
            go_on.set()
            server.serve(answer)
            await anyio.sleep(1.0)
            assert task.outcome is failure
            assert len(old.requests) == 1
            assert sum(len(peer.requests) for peer in server.peers) <= 2
            assert_at_rest(client)

    @pytest.mark.parametrize("declared", [4, 20])
    @pytest.mark.parametrize("backoff", [False, True])
    async def test_k24_a_body_that_turns_out_to_contradict_its_length_meanwhile_is_an_error(
        self, declared: int, backoff: bool, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        go_on = anyio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield b"12"
            await go_on.wait()
            yield b"345678"

        async with (
            RawServer.listen(server_ssl) as server,
            async_client(verify=client_ssl) as client,
            task_group() as tasks,
        ):
            task = Task()
            headers = {"content-length": str(declared)}
            tasks.start_soon(partial(task.run, client, server.url, content=body(), headers=headers))
            peer = await server.accept()
            await peer.handshake()
            request = await peer.request()
            await peer.until(lambda: request.received == 2)
            if backoff:
                await peer.rst(request.stream_id, REFUSED_STREAM)
                await steps(5)
                go_on.set()
            else:
                await peer.goaway(0)
                peer = await server.accept()
                go_on.set()
                await anyio.sleep(0.1)
                await peer.handshake()
            await anyio.sleep(0.4)
            assert isinstance(task.outcome, h2keep.LocalProtocolError)
            assert "Content-Length" in str(task.outcome)
            assert not any(request.ended for peer in server.peers for request in peer.requests.values())
            assert_at_rest(client)

    async def test_k24_timeouts_begin_anew_on_the_other_connection(self) -> None:
        async def go_away_late(peer: Peer) -> None:
            await (await peer.request()).complete()
            await anyio.sleep(4.0)
            await peer.goaway(0)
            await peer.until(lambda: False)

        async def answer_late(peer: Peer) -> None:
            request = await peer.request()
            await anyio.sleep(4.0)
            await peer.respond(request.stream_id, body=b"late")
            await peer.until(lambda: False)

        timeout = h2keep.Timeout(connect=5.0, read=5.0, write=5.0, pool=5.0)
        async with RawServer.listen() as server, async_client(timeout=timeout) as client:
            server.serve(Script((go_away_late, go_away_late, answer_late)))
            began = anyio.current_time()
            assert (await client.post(server.url, content=b"x")).content == b"late"
            assert anyio.current_time() - began == pytest.approx(12.0, abs=0.1)
        async with RawServer.listen() as server, async_client(timeout=timeout) as client:
            server.serve(Script((go_away_late, fall_silent_but_for_pings)))
            began = anyio.current_time()
            with pytest.raises(h2keep.ReadTimeout) as caught:
                await client.post(server.url, content=b"x")
            assert anyio.current_time() - began == pytest.approx(9.0, abs=0.1)
            assert not caught.value.unprocessed

    async def test_k24_if_no_other_connection_can_be_made_that_is_the_error_and_why_one_was_needed_its_cause(
        self,
    ) -> None:
        async with async_client() as client:
            async with RawServer.listen() as server:

                async def only(peer: Peer) -> None:
                    server.stop_listening()
                    await go_away(peer)

                server.serve(only)
                with pytest.raises(h2keep.ConnectError, match="refused") as caught:
                    await client.post(server.url, content=b"x")
            assert caught.value.unprocessed
            assert isinstance(caught.value.__cause__, OSError | h2keep.ConnectionGoingAway)
            assert_at_rest(client)

    async def test_k24_waiting_for_another_connection_is_under_the_pool_timeout(self) -> None:
        timeout = h2keep.Timeout(connect=None, read=None, write=None, pool=3.0)
        async with (
            RawServer.listen() as server,
            async_client(limits=ONE_CONNECTION, timeout=timeout) as client,
            task_group() as tasks,
        ):
            refused, waiting = Task(), Task()
            tasks.start_soon(partial(refused.run, client, server.url, content=b"refused"))
            peer = await server.accept()
            await peer.handshake({STREAMS: 1})
            first = await peer.request()
            await anyio.sleep(0.1)
            tasks.start_soon(partial(waiting.run, client, server.url, content=b"waiting", timeout=None))
            await anyio.sleep(0.1)
            began = anyio.current_time()
            await peer.rst(first.stream_id, REFUSED_STREAM)
            second = await peer.request()
            await refused.ended.wait()
            assert 3.0 <= anyio.current_time() - began <= 3.2
            assert isinstance(refused.outcome, h2keep.PoolTimeout)
            assert refused.outcome.unprocessed
            assert isinstance(refused.outcome.__cause__, h2keep.StreamReset)
            await peer.respond(second.stream_id, body=b"fine")
            await anyio.sleep(0.1)
            assert waiting.outcome == b"fine"
            assert_at_rest(client)

    @pytest.mark.parametrize("when", range(8))
    @pytest.mark.parametrize("step", [go_away, refuse])
    async def test_k24_closing_the_client_meanwhile_ends_it_unprocessed(
        self, step: Callable[[Peer], Awaitable[None]], when: int
    ) -> None:
        async def deaf(peer: Peer) -> None:
            await peer.until(lambda: False)

        async with RawServer.listen() as server, task_group() as tasks:
            client = async_client()
            script = Script((step, deaf))
            server.serve(script)
            task = Task()
            chunks = Chunks(count=3)
            tasks.start_soon(partial(task.run, client, server.url, content=chunks.asynchronous()))
            peer = await server.peer(0)
            await peer.until(lambda: len(peer.requests) == 1 and peer.requests[1].ended)
            await steps(when)
            pool = pool_of(client)
            await client.aclose()
            assert not pool._tasks
            assert len(pool._moves) == 0
            await anyio.sleep(1.0)
            assert isinstance(task.outcome, h2keep.H2KeepError)
            # Whoever heard of the refusal, and was not sent since, is told so.
            assert task.outcome.unprocessed or isinstance(task.outcome, h2keep.ConnectionLost)
            assert chunks.finished == 1

    async def test_k24_many_requests_move_and_each_is_processed_once(self) -> None:
        processed: list[str] = []

        async def process_some(peer: Peer) -> None:
            """Twenty, then GOAWAY; what comes behind it is not processed."""
            async with task_group() as tasks:

                async def work(request: RawRequest) -> None:
                    await request.complete()
                    processed.append(request.path)
                    await anyio.sleep(0.1)
                    with contextlib.suppress(*GONE):
                        await peer.respond(request.stream_id, body=b"ok")

                for _ in range(20):
                    request = await peer.request()
                    tasks.start_soon(work, request)
                await peer.goaway(request.stream_id)
                await peer.until(lambda: False)

        limits = h2keep.Limits(max_connections=2)
        async with RawServer.listen() as server, async_client(limits=limits) as client:
            server.serve(process_some, {STREAMS: 20})
            answers = []

            async def work(worker: int) -> None:
                for number in range(50):
                    response = await client.post(f"{server.url}/{worker}/{number}", content=b"x" * number)
                    answers.append(response.content)

            async with anyio.create_task_group() as tasks:
                for worker in range(16):
                    tasks.start_soon(work, worker)
            assert answers == [b"ok"] * 800
            assert len(processed) == len(set(processed)) == 800
            assert len(server.peers) >= 40
            await anyio.sleep(1.0)
            assert_at_rest(client)
            pool = pool_of(client)
            assert (pool._count._free, len(pool._moves)) == (0, 0)

    async def test_k24_refused_requests_are_sent_again_after_growing_jittered_pauses(self) -> None:
        seen: dict[str, list[float]] = {}

        async def refuse_and_note(peer: Peer) -> None:
            while True:
                request = await peer.request()
                seen.setdefault(request.path, []).append(anyio.current_time())
                await peer.rst(request.stream_id, REFUSED_STREAM)

        async with RawServer.listen() as server, async_client() as client:
            server.serve(refuse_and_note)

            async def fail(number: int) -> None:
                with pytest.raises(h2keep.StreamReset, match="4 attempts were made"):
                    await client.get(f"{server.url}/{number}")

            async with anyio.create_task_group() as tasks:
                for number in range(50):
                    tasks.start_soon(fail, number)
            assert len(server.peers) == 1
            assert_at_rest(client)
        pauses = [[later - earlier for earlier, later in itertools.pairwise(at)] for at in seen.values()]
        assert [len(own) for own in pauses] == [3] * 50
        for number, longest in enumerate((0.1, 0.2, 0.4)):
            drawn = [own[number] for own in pauses]
            assert all(0.0 <= pause <= longest + 0.01 for pause in drawn)
            assert max(drawn) > longest / 2
            assert len({round(pause, 4) for pause in drawn}) > 25

    async def test_k24_an_exit_waits_for_requests_on_their_way(self) -> None:
        async with RawServer.listen() as server, async_client() as client, task_group() as tasks:
            server.serve(refuse_once)
            task = Task()
            tasks.start_soon(partial(task.run, client, server.url, content=b"x"))
            peer = await server.peer(0)
            await peer.until(lambda: len(peer.requests) == 1 and peer.requests[1].ended)
            pool = pool_of(client)
            while len(pool._moves) == 0:
                await checkpoint()
            # Nothing is open, nothing waits in a queue, and what is unused may be closed.
            assert pool.busy
            pool.close_idle()
            await anyio.sleep(1.0)
            assert task.outcome == b"echo:x"
            assert not pool.busy


ONE_CONNECTION = h2keep.Limits(max_connections=1)


async def fall_silent_but_for_pings(peer: Peer) -> None:
    await (await peer.request()).complete()
    await peer.until(lambda: False)


# What is kept of a body


@pytest.mark.anyio
@virtual_time
@pytest.mark.usefixtures("leak_check")
class TestKeptBodies:
    @pytest.mark.parametrize("kind", ["bytes", "stream"])
    async def test_k24_a_body_is_let_go_of_when_the_response_starts(self, kind: str) -> None:
        chunk = b"".join([b"large", bytes(100_000)])
        before = sys.getrefcount(chunk)

        async def stream() -> AsyncIterator[bytes]:
            yield chunk

        async def respond_in_part(peer: Peer) -> None:
            request = await peer.request()
            await request.complete()
            held.append(sys.getrefcount(chunk))
            await peer.respond(request.stream_id, body=b"begun", end_stream=False)
            await peer.until(lambda: False)

        held: list[int] = []
        async with RawServer.listen() as server, async_client() as client:
            server.serve(respond_in_part)
            async with client.stream("POST", server.url, content=chunk if kind == "bytes" else stream()) as response:
                assert response.status_code == 200
                await anyio.sleep(0.1)
                gc.collect()
                assert held[0] > before
                assert sys.getrefcount(chunk) == before

    @pytest.mark.parametrize("end", ["given up", "failed"])
    async def test_k24_a_body_is_let_go_of_when_its_request_ends_without_a_response(self, end: str) -> None:
        chunk = b"".join([b"large", bytes(100_000)])
        before = sys.getrefcount(chunk)

        async def stream() -> AsyncIterator[bytes]:
            yield chunk

        async with RawServer.listen() as server, async_client() as client, task_group() as tasks:
            server.serve(partial(reset, code=CANCEL) if end == "failed" else fall_silent_but_for_pings)
            task = Task()
            tasks.start_soon(partial(task.run, client, server.url, content=stream()))
            await anyio.sleep(0.1)
            task.scope.cancel()
            await anyio.sleep(0.1)
            task.outcome = None
            gc.collect()
            assert sys.getrefcount(chunk) == before
            assert_at_rest(client)

    async def test_k24_many_small_chunks_take_little_more_than_their_bytes(self) -> None:
        count = 100_000
        go_away_now = anyio.Event()

        async def body() -> AsyncIterator[bytes]:
            for number in range(count):
                yield b"%d" % (number % 10)
            go_away_now.set()
            yield b"end"

        async def go_away_when_told(peer: Peer) -> None:
            await peer.request()
            await go_away_now.wait()
            await peer.goaway(0)
            await peer.until(lambda: False)

        async with RawServer.listen() as server, async_client() as client, task_group() as tasks:
            server.serve(Script((go_away_when_told, answer)))
            task = Task()
            tracemalloc.start()
            try:
                tasks.start_soon(partial(task.run, client, server.url, content=body()))
                await go_away_now.wait()
                kept = sum(
                    statistic.size
                    for statistic in tracemalloc.take_snapshot().statistics("filename")
                    if statistic.traceback[0].filename.endswith("runner/stream.py")
                )
            finally:
                tracemalloc.stop()
            assert kept < 5 * count
            await anyio.sleep(1.0)
            assert task.outcome == b"echo:" + b"0123456789" * (count // 10) + b"end"

    async def test_k24_small_chunks_after_a_move_are_kept_for_the_next_one(self) -> None:
        moved = [anyio.Event(), anyio.Event()]

        async def body() -> AsyncIterator[bytes]:
            yield b"one "
            await moved[0].wait()
            yield b"two "
            await moved[1].wait()
            yield b"three"

        async def go_away_after(peer: Peer, size: int) -> None:
            request = await peer.request()
            await peer.until(lambda: request.received == size)
            await peer.goaway(0)
            await peer.until(lambda: False)

        async def first(peer: Peer) -> None:
            await go_away_after(peer, 4)

        async def second(peer: Peer) -> None:
            moved[0].set()
            await go_away_after(peer, 8)

        async def third(peer: Peer) -> None:
            moved[1].set()
            await answer(peer)

        async with RawServer.listen() as server, async_client() as client:
            server.serve(Script((first, second, third)))
            assert (await client.post(server.url, content=body())).content == b"echo:one two three"
