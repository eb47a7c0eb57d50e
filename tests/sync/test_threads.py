"""Many threads on one client, and the background loop beside threads that compute or sleep."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import ssl
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import h2keep
from h2keep.cli.middlebox import Middlebox
from h2keep.runner import background
from h2keep.runner.feed import Feed
from support.background import eventually, run_script
from support.raw import GONE, answering
from support.threaded import threaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.raw import Peer, RawRequest
    from support.servers import Server


def client(**options: Any) -> h2keep.Client:
    return h2keep.Client(**{"http1": False, "timeout": 20.0, **options})


def spin(seconds: float) -> None:
    """Hold the interpreter's lock as much as a computing thread can."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def in_threads(count: int, work: Callable[[int], object]) -> list[Any]:
    """Do the work in so many threads at once; their results, or the first error."""
    with concurrent.futures.ThreadPoolExecutor(count) as executor:
        return list(executor.map(work, range(count)))


class TestSharing:
    def test_neither_of_two_threads_that_read_one_response_hangs(self) -> None:
        async def answer_in_part(peer: Peer) -> None:
            await peer.respond((await peer.request()).stream_id, end_stream=False)

        def read(_number: int) -> str:
            with pytest.raises((RuntimeError, h2keep.ReadError)) as caught:
                # As an httpx transport's response does each time that it is iterated over.
                response._source.receive()
            return caught.type.__name__

        with (
            threaded(answer_in_part) as server,
            client(timeout=None) as own,
            own.stream("GET", server.url) as response,
        ):
            assert sorted(in_threads(2, read)) == ["ReadError", "RuntimeError"]

    def test_many_threads_share_one_connection(self) -> None:
        barrier = threading.Barrier(50)

        def work(number: int) -> bytes:
            barrier.wait(20)
            return own.post(server.url, content=b"%d" % number).content

        with threaded(answering(delay=0.05)) as server, client() as own:
            own.get(server.url)
            assert in_threads(50, work) == [b"ok"] * 50
            assert len(server.peers) == 1
            assert len(server.peers[0].requests) == 51

    def test_a_cold_start_by_many_threads_dials_once(self) -> None:
        barrier = threading.Barrier(50)

        def work(number: int) -> bytes:
            barrier.wait(20)
            return own.get(server.url).content

        with threaded(answering()) as server, client() as own:
            assert in_threads(50, work) == [b"ok"] * 50
            assert len(server.peers) == 1

    @pytest.mark.parametrize("computing", [False, True])
    def test_callers_that_were_woken_together_run_first_unless_a_thread_computes(
        self, computing: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        yields: list[float] = []

        def make_way() -> None:
            yields.append(time.monotonic())
            # As long as a computing thread would keep the interpreter.
            time.sleep(0.05 if computing else 0)

        def work(_: int) -> None:
            for _ in range(10):
                barrier.wait(20)
                assert own.get(server.url).content == b"ok"

        monkeypatch.setattr(background, "_yield", make_way)
        barrier = threading.Barrier(10)
        with threaded(answering()) as server, client() as own:
            own.get(server.url)
            in_threads(10, work)
        assert yields
        if computing:
            assert all(after - before >= 1.0 for before, after in itertools.pairwise(yields))

    def test_threads_do_not_get_each_others_answers(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        def work(number: int) -> bool:
            return all(
                own.post(f"{granian.url}/echo", content=b"%d-%d" % (number, turn)).json()["body"] == f"{number}-{turn}"
                for turn in range(20)
            )

        with client(verify=client_ssl) as own:
            assert all(in_threads(16, work))

    def test_clients_come_and_go_in_many_threads(self) -> None:
        # A context of its own each would be most of the work.
        context = ssl.create_default_context()

        def work(number: int) -> bool:
            for _ in range(10):
                with client(verify=context) as own:
                    assert own.get(server.url).content == b"ok"
            return True

        with threaded(answering()) as server:
            assert all(in_threads(8, work))

    def test_close_ends_what_other_threads_wait_for(self) -> None:
        async def handler(peer: Peer) -> None:
            while True:
                request = await peer.request()
                if request.path == "/head":
                    await peer.respond(request.stream_id, body=b"first", end_stream=False)

        def wait_for_head(number: int) -> None:
            own.get(server.url)

        def wait_for_body(number: int) -> None:
            own.get(f"{server.url}/head")

        def wait_with_upload(number: int) -> None:
            own.post(server.url, content=endless())

        def endless() -> Iterator[bytes]:
            while True:
                time.sleep(0.01)
                yield b"x"

        def work(number: int) -> BaseException | None:
            try:
                (wait_for_head, wait_for_body, wait_with_upload)[number % 3](number)
            except h2keep.H2KeepError as error:
                return error
            return None

        own = client(timeout=None)
        with threaded(handler) as server, concurrent.futures.ThreadPoolExecutor(9) as executor:
            futures = [executor.submit(work, number) for number in range(9)]
            eventually(lambda: server.peers and len(server.peers[0].requests) == 9, "all requests came")
            own.close()
            errors = [future.result(10) for future in futures]
        assert all("closed" in str(error) for error in errors), errors

    def test_close_ends_what_waits_for_a_connection(self) -> None:
        async def handler(peer: Peer) -> None:
            await anyio.sleep_forever()

        limits = h2keep.Limits(max_connections=1)
        own = client(timeout=None, limits=limits)
        with (
            threaded(handler, settings={3: 1}) as server,
            concurrent.futures.ThreadPoolExecutor(5) as executor,
        ):
            futures = [executor.submit(own.get, server.url) for _ in range(5)]
            eventually(lambda: server.peers and server.peers[0].requests, "one request came")
            pool: Any = own._connections._lease._pool  # type: ignore[union-attr]

            def asking() -> int:
                waiting: int = sum(state.waiting for state in list(pool._origins.values()))
                opened: int = sum(connection.protocol.open_streams for connection in list(pool._states))
                return waiting + opened

            # Whoever asks after the close has a pool that is new.
            eventually(lambda: asking() == 5, "all have asked")
            own.close()
            errors = [future.exception(10) for future in futures]
        assert all(isinstance(error, h2keep.H2KeepError) for error in errors), errors
        assert all("closed" in str(error) for error in errors), errors


class TestKeepalive:
    @pytest.mark.parametrize("busy", [time.sleep, spin])
    def test_k3_pings_go_on_while_the_caller_is_busy(self, busy: Callable[[float], None]) -> None:
        async def handler(peer: Peer) -> None:
            request = await peer.request()
            await peer.respond(request.stream_id, body=b"first", end_stream=False)
            await peer.until(lambda: len(peer.pings) >= 4)
            await peer.send_data(request.stream_id, b"second", end_stream=True)
            await anyio.sleep_forever()

        keepalive = h2keep.Keepalive(0.2, 5.0, jitter=0.0)
        with (
            threaded(handler) as server,
            client(keepalive=keepalive) as own,
            own.stream("GET", server.url) as response,
        ):
            chunks = response.iter_bytes()
            assert next(chunks) == b"first"
            busy(1.5)
            # In the thread that was busy, nothing else ran.
            assert len(server.peers[0].pings) >= 3
            assert response.connection.pings_acked >= 2
            assert b"".join(chunks) == b"second"

    def test_k3_a_sleeping_caller_survives_the_middlebox(self) -> None:
        async def relay(port: int, started: concurrent.futures.Future[int], stop: anyio.Event) -> None:
            async with Middlebox(("127.0.0.1", port), 0.6, lambda _event: None) as box:
                started.set_result(box.port)
                await stop.wait()
            stopped.set()

        async def handler(peer: Peer) -> None:
            while True:
                request = await peer.request()
                peer._tasks.start_soon(answer, request)

        async def answer(request: RawRequest) -> None:
            with contextlib.suppress(*GONE):
                await anyio.sleep(1.5)
                await request.peer.respond(request.stream_id, body=b"at last")

        def outcome(keepalive: h2keep.Keepalive) -> object:
            with client(keepalive=keepalive, timeout=h2keep.Timeout(read=2.5)) as own:
                try:
                    return own.get(f"http://127.0.0.1:{started.result(10)}").content
                except h2keep.H2KeepError as error:
                    return type(error)

        started: concurrent.futures.Future[int] = concurrent.futures.Future()
        stopped = threading.Event()
        with threaded(handler) as server:
            stop = server.call(anyio.Event)
            server.soon(relay, int(server.url.rpartition(":")[2]), started, stop)
            assert outcome(h2keep.Keepalive(0.2, 5.0)) == b"at last"
            assert outcome(h2keep.Keepalive(None)) is h2keep.ReadTimeout
            server.call(stop.set)
            assert stopped.wait(10)

    def test_k4_k8_a_dead_connection_frees_every_thread(self) -> None:
        async def handler(peer: Peer) -> None:
            peer.auto_ack_pings = False
            await anyio.sleep_forever()

        def work(number: int) -> BaseException | None:
            try:
                own.get(server.url)
            except h2keep.H2KeepError as error:
                return error
            return None

        with (
            threaded(handler) as server,
            client(keepalive=h2keep.Keepalive(0.2, 0.3), timeout=None) as own,
        ):
            errors = in_threads(10, work)
        assert {type(error) for error in errors} == {h2keep.PingTimeout}
        # Each thread has its own, whose traceback is its own.
        assert len({id(error) for error in errors}) == 10


class TestBetweenThreads:
    """Moments that no load hits for certain."""

    def test_what_is_rung_for_by_an_answer_is_answered(self) -> None:
        share = background.lease(lambda: pytest.fail("no pool is wanted"))
        answered = threading.Event()

        def ring_twice() -> None:
            share.loop.ring(lambda: share.loop.ring(answered.set))
            share.loop.ring(lambda: None)

        share.loop.post(ring_twice)
        assert answered.wait(10)
        share.end()
        share.wait_ended()

    def test_a_chunk_that_comes_right_before_the_end_is_not_lost(self) -> None:
        class Late(deque[Any]):
            """Looks empty for the last time while its chunk and the end come."""

            looks = 0

            def __len__(self) -> int:
                self.looks += 1
                found = super().__len__()
                if self.looks == 2:
                    feed.push(b"last")
                    feed.finish()
                return found

        class Here:
            def post(self, job: Callable[[], object]) -> None:
                job()

        feed = Feed(Here(), lambda: None)  # type: ignore[arg-type]
        feed._chunks = Late()

        async def take() -> list[Any]:
            return [chunk async for chunk in feed]

        assert asyncio.run(take()) == [b"last"]

    def test_room_is_told_of_even_if_the_body_became_full_just_now(self) -> None:
        class Filling(deque[Any]):
            """Takes more at the moment at which a chunk is taken from it."""

            def popleft(self) -> Any:
                chunk = super().popleft()
                if not told:
                    feed.push(b"y")
                    assert feed.full
                return chunk

        class Here:
            def post(self, job: Callable[[], object]) -> None:
                job()

        told: list[bool] = []
        feed = Feed(Here(), lambda: told.append(True))  # type: ignore[arg-type]
        feed._chunks = Filling()
        feed.push(b"x" * (256 * 1024 - 1))
        asyncio.run(anext(feed))
        assert told

    def test_an_interrupted_call_of_the_loop_does_not_silence_it(self) -> None:
        share = background.lease(lambda: pytest.fail("no pool is wanted"))
        ran = threading.Event()
        original = share.loop._asyncio.call_soon_threadsafe

        def interrupted(*args: Any, **options: Any) -> Any:
            share.loop._asyncio.call_soon_threadsafe = original  # type: ignore[method-assign]
            raise KeyboardInterrupt

        share.loop._asyncio.call_soon_threadsafe = interrupted  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyboardInterrupt):
            share.loop.post(lambda: None)
        share.loop.post(ran.set)
        assert ran.wait(10)
        share.end()
        share.wait_ended()


STRESS = """
import gc, random, ssl, sys, threading, time
import h2keep

url, ca = sys.argv[1:]
THREADS, ROUNDS, REQUESTS = 100, 10, 20
own = h2keep.Client(verify=ssl.create_default_context(cafile=ca), http1=False, timeout=60.0)
lock = threading.Lock()
fates = dict.fromkeys(["complete", "uploaded", "left", "unread", "timed out"], 0)

def request(dice):
    fate = dice.random()
    if fate < 0.6:
        assert len(own.get(url + "/download?size=1000").content) == 1000
        return "complete"
    if fate < 0.7:
        assert own.post(url + "/upload", content=iter([b"x" * 2000] * 3)).json()["size"] == 6000
        return "uploaded"
    if fate < 0.8:
        with own.stream("GET", url + "/download?size=200000") as response:
            next(response.iter_bytes())
        return "left"
    if fate < 0.9:
        with own.stream("GET", url + "/stall?seconds=30"):
            return "unread"
    try:
        own.get(url + "/slow?seconds=30", timeout=h2keep.Timeout(60.0, dice.random() * 0.05, 60.0, 60.0))
    except h2keep.ReadTimeout:
        return "timed out"
    raise AssertionError("an answer before its time")

def work(seed):
    dice = random.Random(seed)
    results = [request(dice) for _ in range(REQUESTS)]
    with lock:
        for result in results:
            fates[result] += 1

sizes = []
for turn in range(ROUNDS):
    threads = [threading.Thread(target=work, args=(turn * THREADS + number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # None of the round's ends is still under way.
    time.sleep(0.2)
    gc.collect()
    # Not the resident size: what glibc keeps for threads that have ended is its own affair.
    sizes.append(sys.getallocatedblocks())
    assert threading.active_count() == 2, threading.enumerate()
assert sum(fates.values()) == THREADS * ROUNDS * REQUESTS, fates
assert all(fates.values()), fates
pools = [own._connections._lease._pool]
connections = list(pools[0]._states)
assert len(connections) <= 8, connections
deadline = time.monotonic() + 10
while any(connection.protocol.open_streams or connection._streams for connection in connections):
    assert time.monotonic() < deadline, [connection.stats for connection in connections]
    time.sleep(0.05)
tasks = len(__import__("asyncio").all_tasks(own._connections._lease.loop._asyncio))
assert tasks <= 3 * len(connections) + 1, tasks
own.close()
assert threading.active_count() == 1, threading.enumerate()
print(*sizes)
"""


@pytest.mark.timeout(120)
def test_a_hundred_threads_with_cancellations_and_timeouts_leave_nothing(granian: Server, ca_path: Path) -> None:
    result = run_script(STRESS, granian.url, ca_path, dev=False, timeout=100.0)
    assert (result.returncode, result.stderr) == (0, "")
    sizes = [int(size) for size in result.stdout.split()]
    assert len(sizes) == 10
    # The first round fills caches.
    assert max(sizes[1:]) <= 1.05 * sizes[1], sizes
