"""One asynchronous client on several event loops: a pool for each, and none outlives its loop for long."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import pytest
import trio

import h2keep
import h2keep.httpx2
from support.background import eventually, run_script
from support.raw import answering
from support.threaded import threaded

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from support.raw import Peer


def client(**options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(**{"http1": False, "timeout": 20.0, **options})


async def get(own: h2keep.AsyncClient, url: str) -> bytes:
    return (await own.get(url)).content


async def head_only(peer: Peer) -> None:
    while True:
        request = await peer.request()
        await peer.respond(request.stream_id, body=b"first", end_stream=False)


def run_raw(main: Callable[[], Coroutine[Any, Any, Any]], *, close: bool = True) -> asyncio.AbstractEventLoop:
    """A loop that cancels nothing at its end."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    if close:
        loop.close()
    return loop


RUNS: dict[str, Callable[..., Any]] = {
    "asyncio.run": asyncio.run,
    "trio.run": lambda coroutine: trio.run(_await, coroutine),
    "anyio.run": lambda coroutine: anyio.run(_await, coroutine),
}


async def _await(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await coroutine


@pytest.mark.parametrize("second", RUNS)
@pytest.mark.parametrize("first", RUNS)
def test_one_loop_after_the_other(first: str, second: str) -> None:
    with threaded(answering()) as server:
        own = client()
        for run in (RUNS[first], RUNS[second], RUNS[first]):
            assert run(get(own, server.url)) == b"ok"
            assert run(get(own, server.url)) == b"ok"
        assert len(server.peers) == 6
        # The last one's, and that is dead.
        assert len(own._connections._pools) == 1
        RUNS[first](own.aclose())
        assert not own._connections._pools
        eventually(lambda: all(peer.ended for peer in server.peers), "all connections are closed")


def test_a_hundred_loops_leave_no_pools() -> None:
    with threaded(answering()) as server:
        own = client()
        for turn in range(100):
            run = asyncio.run if turn % 2 else RUNS["trio.run"]
            assert run(get(own, server.url)) == b"ok"
            assert len(own._connections._pools) == 1
        asyncio.run(own.aclose())


def test_loops_in_several_threads_at_once() -> None:
    together = threading.Barrier(4)

    async def work() -> None:
        for _ in range(20):
            assert await get(own, server.url) == b"ok"

    def run(how: str) -> None:
        together.wait(10)
        try:
            RUNS[how](work())
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    failures: list[BaseException] = []
    with threaded(answering()) as server:
        own = client()
        threads = [threading.Thread(target=run, args=(how,)) for how in ("asyncio.run", "trio.run") * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(server.peers) == 4
        asyncio.run(own.aclose())


def test_a_loop_closed_without_cancelling_anything() -> None:
    with threaded(answering()) as server:
        own = client()
        run_raw(lambda: get(own, server.url))
        assert asyncio.run(get(own, server.url)) == b"ok"
        # The first loop's was closed at the second's first request.
        eventually(lambda: server.peers[0].ended, "the first connection is closed")
        asyncio.run(own.aclose())


def test_a_loop_closed_in_the_middle_of_a_response() -> None:
    async def begin() -> None:
        response = await own._send("GET", server.url)
        chunks = response.aiter_bytes()
        assert await anext(chunks) == b"first"
        tasks.append(asyncio.get_running_loop().create_task(_await(anext(chunks))))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        # asyncio tells of the test's own task, too.
        tasks[0]._log_destroy_pending = False  # type: ignore[attr-defined]

    tasks: list[asyncio.Task[Any]] = []
    with threaded(head_only) as server:
        own = client()
        run_raw(begin)
        tasks.clear()
        gc.collect()
        asyncio.run(own.aclose())
        eventually(lambda: server.peers[0].ended, "the connection is closed")


def test_a_loop_never_closed() -> None:
    with threaded(answering()) as server:
        own = client()
        loop = run_raw(lambda: get(own, server.url), close=False)
        # It may run again, so its connection is left alone.
        assert asyncio.run(get(own, server.url)) == b"ok"
        assert loop.run_until_complete(get(own, server.url)) == b"ok"
        assert len(server.peers) == 2
        assert len(server.peers[0].requests) == 2
        loop.run_until_complete(own.aclose())
        loop.close()
        eventually(lambda: all(peer.ended for peer in server.peers), "all connections are closed")


def test_aclose_from_another_loop_while_the_owner_runs() -> None:
    async def owner() -> None:
        await get(own, server.url)
        ready.set()
        while not done.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    ready, done = threading.Event(), threading.Event()
    with threaded(answering()) as server:
        own = client()
        thread = threading.Thread(target=asyncio.run, args=(owner(),))
        thread.start()
        assert ready.wait(10)
        trio.run(own.aclose)
        eventually(lambda: server.peers[0].ended, "the connection is closed")
        assert server.peers[0].error is None
        done.set()
        thread.join()


def test_aclose_after_the_owner_ended_and_twice() -> None:
    with threaded(answering()) as server:
        own = client()
        asyncio.run(get(own, server.url))
        asyncio.run(own.aclose())
        trio.run(own.aclose)
        run_raw(lambda: get(own, server.url))
        trio.run(own.aclose)
        eventually(lambda: all(peer.ended for peer in server.peers), "all connections are closed")


class Sdk:
    """Closes itself as SDKs do: in whatever loop runs when it is forgotten."""

    def __init__(self) -> None:
        transport = h2keep.httpx2.AsyncKeepaliveTransport(http1=False)
        self.client = httpx2.AsyncClient(transport=transport, timeout=20.0)

    async def get(self, url: str) -> None:
        assert (await self.client.get(url)).text == "ok"

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):
            close = self.client.aclose()
            try:
                closing.append(asyncio.get_running_loop().create_task(close))
            except RuntimeError:
                close.close()
                raise


closing: list[asyncio.Task[None]] = []


@pytest.mark.parametrize("first", ["asyncio.run", "trio.run", "raw"])
def test_an_sdk_that_closes_itself_on_whatever_loop_runs(first: str) -> None:
    async def forget() -> None:
        sdks.clear()
        gc.collect()
        await asyncio.sleep(0.05)
        assert all(task.done() and task.exception() is None for task in closing)

    async def use() -> None:
        await sdks[0].get(server.url)

    closing.clear()
    with threaded(answering()) as server:
        sdks = [Sdk()]
        if first == "raw":
            run_raw(use)
        else:
            RUNS[first](use())
        asyncio.run(forget())
        assert len(closing) == 1
        closing.clear()
        eventually(lambda: server.peers[0].ended, "the connection is closed")


SCRIPTS = {
    "asyncio.run twice": """
for _ in range(2):
    asyncio.run(get())
asyncio.run(own.aclose())
""",
    "a loop closed without cancelling anything": """
loop = asyncio.new_event_loop()
loop.run_until_complete(get())
loop.close()
del loop
gc.collect()
asyncio.run(get())
asyncio.run(own.aclose())
gc.collect()
""",
    "a response half read in a loop closed without cancelling anything": """
loop = asyncio.new_event_loop()
response = loop.run_until_complete(own._send("GET", url))
loop.close()
del loop, response
gc.collect()
asyncio.run(own.aclose())
""",
    "trio after asyncio": """
asyncio.run(get())
import trio
trio.run(get)
asyncio.run(own.aclose())
""",
    "a thread's loop that ended": """
thread = threading.Thread(target=asyncio.run, args=(get(),))
thread.start()
thread.join()
asyncio.run(get())
asyncio.run(own.aclose())
""",
}

PRELUDE = """
import asyncio, gc, sys, threading
import h2keep
url = sys.argv[1]
own = h2keep.AsyncClient(http1=False, timeout=20.0)

async def get():
    if "trio" not in sys.modules:
        asyncio.get_running_loop().slow_callback_duration = 60
    assert (await own.get(url)).text == "ok"
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_word(name: str) -> None:
    with threaded(answering()) as server:
        result = run_script(PRELUDE + SCRIPTS[name], server.url)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
