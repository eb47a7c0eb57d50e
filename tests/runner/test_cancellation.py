"""One of 100 requests is cancelled at every step of its life; the other 99 and the pool must not notice.

A step is one pass of the scheduler. Nobody sleeps while a request lives, so counting passes from its start until it is
over meets every await point: in the queue, in the dial, in the upload, before the head, in the body, at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hyperframe import frame as frames

import h2keep
from h2keep.runner.stream import Http2Stream
from support.clock import VIRTUAL_BACKENDS, virtual_time
from support.pools import assert_at_rest, pool_of
from support.raw import GONE, Peer, RawRequest, RawServer, answering, task_group

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

STREAMS = frames.SettingsFrame.MAX_CONCURRENT_STREAMS
NO_ERROR, CANCEL = 0, 8
OTHERS = 99
PHASES = ("opening", "uploading", "waiting", "reading")
#: More steps than any request's life has.
FOR_EVER = 2000


def client(**options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(http1=False, timeout=None, **options)


async def passes(count: int) -> None:
    for _ in range(count):
        await checkpoint()


async def settle() -> None:
    """Until everything that is on its way has arrived."""
    await passes(20)
    await anyio.sleep(0.01)


# The server: an answer in several pieces, some passes apart


async def _answer(request: RawRequest) -> None:
    peer, stream_id = request.peer, request.stream_id
    with contextlib.suppress(*GONE):
        await peer.until(lambda: request.ended or request.reset is not None)
        await passes(3)
        for part in (peer.headers_frame(stream_id), b"a" * 100, b"b" * 20_000, request.path.encode()):
            if request.reset is not None:
                return
            if isinstance(part, bytes):
                await peer.send_data(stream_id, part, end_stream=part[:1] == b"/")
            else:
                await peer.send(part)
            if request.path == "/victim":
                await passes(3)


async def serve(peer: Peer) -> None:
    async with task_group() as tasks:
        while True:
            tasks.start_soon(_answer, await peer.request())


def expected(path: str) -> bytes:
    return b"a" * 100 + b"b" * 20_000 + path.encode()


# The client: one run


@pytest.fixture
def closes(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, int], list[int]]:
    """For each stream the codes of the RST_STREAM frames that the server must see, as known when it was closed."""
    seen: dict[tuple[Any, int], list[int]] = {}
    close = Http2Stream.close

    def watched(stream: Http2Stream) -> None:
        if not stream._released:
            inner = stream.connection.protocol._streams.get(stream.id)
            due = inner is not None and inner.open and inner.sent_at is not None
            code = NO_ERROR if stream.ended else CANCEL
            seen[stream.connection, stream.id] = [code] if due else []
        close(stream)

    monkeypatch.setattr(Http2Stream, "close", watched)
    return seen


@dataclass
class Run:
    """100 requests, of which one is cancelled after a number of steps."""

    client: h2keep.AsyncClient
    url: str
    bodies_begun: int = 0
    bodies_ended: int = 0
    answers: dict[str, bytes] = field(default_factory=dict)
    cancelled: bool = False
    reading: bool = False
    phase_cancelled: str = ""
    over: anyio.Event = field(default_factory=anyio.Event)

    async def body(self) -> AsyncIterator[bytes]:
        self.bodies_begun += 1
        try:
            for size in (10, 70_000, 30_000):
                yield bytes(size)
                await passes(2)
        finally:
            self.bodies_ended += 1

    async def victim(self) -> None:
        try:
            async with self.client.stream("POST", f"{self.url}/victim", content=self.body()) as response:
                self.reading = True
                await checkpoint()
                self.answers["/victim"] = b"".join([chunk async for chunk in response.aiter_bytes()])
                await checkpoint()
        finally:
            self.over.set()

    async def other(self, number: int) -> None:
        path = f"/{number}"
        response = await self.client.post(self.url + path, content=b"x" if number % 2 else None)
        self.answers[path] = response.content

    async def in_scope(self, steps: int) -> None:
        """Cancel through a cancel scope around the victim."""
        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()

            async def victim() -> None:
                with scope:
                    await self.victim()

            self._start(tasks, victim)
            await self._count(steps)
            scope.cancel()
        self.cancelled = scope.cancelled_caught

    async def natively(self, steps: int) -> None:
        """Cancel the victim's task, as asyncio alone has it."""
        async with anyio.create_task_group() as tasks:
            started: list[asyncio.Task[None]] = []

            async def victim() -> None:
                started.append(asyncio.ensure_future(self.victim()))
                await asyncio.wait(started)

            self._start(tasks, victim)
            while not started:
                await checkpoint()
            await self._count(steps)
            self.cancelled = started[0].cancel()

    def _start(self, tasks: Any, victim: Callable[[], Any]) -> None:
        for number in range(OTHERS // 2):
            tasks.start_soon(self.other, number)
        tasks.start_soon(victim)
        for number in range(OTHERS // 2, OTHERS):
            tasks.start_soon(self.other, number)

    async def _count(self, steps: int) -> None:
        for _ in range(steps):
            if self.over.is_set():
                break
            await checkpoint()
        self.phase_cancelled = self.phase

    @property
    def phase(self) -> str:
        if self.reading:
            return "reading"
        if self.bodies_ended:
            return "waiting"
        return "uploading" if self.bodies_begun else "opening"

    def check(self) -> None:
        """Everybody's answer is right, and the victim's if it has one."""
        if not self.cancelled:
            assert self.answers.pop("/victim") == expected("/victim")
        self.answers.pop("/victim", None)
        assert self.answers == {f"/{number}": expected(f"/{number}") for number in range(OTHERS)}
        assert self.bodies_begun == self.bodies_ended <= 1


def check_resets(server: RawServer, closes: dict[tuple[Any, int], list[int]]) -> None:
    """The server saw RST_STREAM exactly for those that had been sent and weren't over, and once for each."""
    resets = Counter(
        (peer.sock.getpeername()[1] if peer.sock.fileno() != -1 else None, frame.stream_id, frame.error_code)
        for peer in server.peers
        for frame in peer.seen(frames.RstStreamFrame)
    )
    due = Counter(
        (connection.transport.socket.getsockname()[1], stream_id, code)
        for (connection, stream_id), codes in closes.items()
        for code in codes
    )
    assert resets == due


async def run_all(
    make_client: Callable[[], h2keep.AsyncClient],
    server: RawServer,
    closes: dict[tuple[Any, int], list[int]],
    *,
    fresh: bool,
    native: bool = False,
) -> Counter[str]:
    """Run the scenario with the cancellation at every step until the request ends before it; steps by phase."""
    phases: Counter[str] = Counter()
    c = make_client()
    try:
        for steps in range(FOR_EVER):
            run = Run(c, server.url)
            await (run.natively if native else run.in_scope)(steps)
            await settle()
            phases[run.phase_cancelled] += run.cancelled
            run.check()
            check_resets(server, closes)
            assert_at_rest(c)
            if not run.cancelled and run.over.is_set():
                return phases
            if fresh:
                closes.clear()
                pool = pool_of(c)
                await c.aclose()
                assert not pool._tasks
                await anyio.sleep(0.01)
                assert all(peer.ended and peer.error is None for peer in server.peers)
                for peer in server.peers:
                    peer.close()
                server.peers.clear()
                c = make_client()
        raise AssertionError("the request never ended by itself")
    finally:
        pool = pool_of(c)
        await c.aclose()
        assert not pool._tasks


@virtual_time
async def test_cancelling_one_of_100_at_every_step_on_a_connection_with_room(closes: Any) -> None:
    async with RawServer.listen() as server:
        server.serve(serve, {STREAMS: 256})
        c = client()
        await c.get(server.url + "/0")
        phases = await run_all(lambda: c, server, closes, fresh=False)
        assert min(phases[phase] for phase in PHASES) > 0
        assert len(server.peers) == 1


@virtual_time
async def test_cancelling_one_of_100_at_every_step_in_a_queue(closes: Any) -> None:
    async with RawServer.listen() as server:
        server.serve(serve, {STREAMS: 30})
        c = client(limits=h2keep.Limits(max_connections=1))
        await c.get(server.url + "/0")
        phases = await run_all(lambda: c, server, closes, fresh=False)
        assert min(phases[phase] for phase in PHASES) > 0
        assert phases["opening"] > 4
        assert len(server.peers) == 1


@virtual_time
async def test_cancelling_one_of_100_at_every_step_of_a_dial(
    closes: Any, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server:
        server.serve(serve, {STREAMS: 256})
        phases = await run_all(lambda: client(verify=client_ssl), server, closes, fresh=True)
        assert min(phases[phase] for phase in PHASES) > 0
        assert phases["opening"] > 3


@pytest.mark.parametrize("anyio_backend", VIRTUAL_BACKENDS[:1], indirect=True)
async def test_cancelling_the_task_itself_at_every_step(closes: Any) -> None:
    async with RawServer.listen() as server:
        server.serve(serve, {STREAMS: 256})
        phases = await run_all(client, server, closes, fresh=True, native=True)
        assert min(phases[phase] for phase in PHASES) > 0


@virtual_time
@pytest.mark.parametrize("seed", range(5))
async def test_cancelling_half_of_100_at_random_steps_leaves_the_other_half(closes: Any, seed: int) -> None:
    chance = random.Random(seed)
    async with RawServer.listen() as server, client(limits=h2keep.Limits(max_connections=2)) as c:
        server.serve(serve, {STREAMS: 20})
        answers: dict[int, bytes] = {}
        survivors = set(range(0, 100, 2))

        async def body() -> AsyncIterator[bytes]:
            yield bytes(30_000)
            await checkpoint()
            yield bytes(30_000)

        async def one(number: int) -> None:
            path = f"/{number}"
            with anyio.CancelScope() as scope:
                if number not in survivors:
                    tasks.start_soon(_cancel_after, scope, chance.randrange(150))
                response = await c.post(server.url + path, content=body() if number % 3 else None)
                assert response.content == expected(path)
                answers[number] = response.content

        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(one, number)
        await settle()
        assert survivors <= set(answers)
        check_resets(server, closes)
        assert_at_rest(c)


async def _cancel_after(scope: anyio.CancelScope, steps: int) -> None:
    await passes(steps)
    scope.cancel()


@virtual_time
async def test_a_cancelled_upload_ends_its_iterator_before_the_client_is_used_again() -> None:
    ended = []

    async def body() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(10_000)
                await anyio.sleep(0.03)
        finally:
            ended.append(True)

    async with RawServer.listen() as server, client() as c:
        server.serve(answering())
        for number in range(10):
            with anyio.move_on_after(1.0):
                await c.post(server.url, content=body())
            await anyio.sleep(0.01)
            assert len(ended) == number + 1
            assert (await c.get(server.url)).content == b"ok"
        await anyio.sleep(0.01)
        assert [frame.error_code for frame in server.peers[0].seen(frames.RstStreamFrame)] == [CANCEL] * 10
        assert len(server.peers) == 1
        assert_at_rest(c)


@pytest.mark.parametrize("anyio_backend", VIRTUAL_BACKENDS[:1], indirect=True)
async def test_an_iterator_that_awaits_something_cancelled_fails_its_request() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        other = asyncio.ensure_future(asyncio.sleep(1000.0))
        other.cancel()
        await other

    async with RawServer.listen() as server, client() as c:
        server.serve(answering())
        with anyio.fail_after(60.0), pytest.raises(h2keep.WriteError) as caught:
            await c.post(server.url, content=body())
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        assert (await c.get(server.url)).content == b"ok"
        assert_at_rest(c)
