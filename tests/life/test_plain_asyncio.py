"""asyncio's own `run`: outside of tasks anyio doesn't know by itself that there is an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest
from hyperframe import frame as frames

import h2keep
from support.threaded import threaded

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from support.raw import Peer

PATIENCE = 10.0
#: More than the kernel's buffers take.
LARGE = 32 * 1024 * 1024
WINDOWS = {frames.SettingsFrame.INITIAL_WINDOW_SIZE: 2**31 - 1}


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it where nothing is known of any event loop; callbacks that fail are failures."""
    failures: list[Any] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        await asyncio.wait_for(main(), PATIENCE)

    contextvars.Context().run(asyncio.run, watched())
    assert not failures


async def served(peer: Peer) -> None:
    while True:
        request = await peer.request()
        await peer.respond(request.stream_id, body=b"ok", end_stream=request.path != "/open")


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def until_stuck(driver: Any) -> None:
    """Until the kernel takes no more, which it does again for a while as long as bytes are on their way."""
    written, since = -1, 0.0
    while not (driver._blocked and driver._written == written and time.monotonic() - since > 0.1):
        if driver._written != written:
            written, since = driver._written, time.monotonic()
        await asyncio.sleep(0.001)


def test_a_forgotten_response_leaves_a_connection_that_is_unused_and_expires() -> None:
    async def main() -> None:
        client = h2keep.AsyncClient(http1=False, limits=h2keep.Limits(keepalive_expiry=0.01))
        streaming = client.stream("GET", f"{server.url}/open")
        await streaming.__aenter__()
        del streaming
        gc.collect()
        await until(lambda: server.peers[0].ended)
        await client.aclose()

    with threaded(served) as server:
        run(main)


def test_a_client_that_is_closed_in_another_thread_ends_what_runs_here() -> None:
    async def main() -> None:
        client = h2keep.AsyncClient(http1=False, limits=h2keep.Limits(max_connections=1))
        async with client.stream("GET", f"{server.url}/open") as response:
            thread = threading.Thread(target=client._connections.close)
            thread.start()
            with pytest.raises(h2keep.ConnectionLost):
                await response.aread()
            thread.join()

    with threaded(served) as server:
        run(main)


def test_k24_what_waits_behind_a_blocked_upload_moves_when_the_writer_finds_the_connection_dead() -> None:
    stopped, die = threading.Event(), threading.Event()

    async def first_dies(peer: Peer) -> None:
        if len(server.peers) > 1:
            await served(peer)
        await peer.send(frames.WindowUpdateFrame(0, 2**30))
        request = await peer.request()
        await peer.respond(request.stream_id)
        await peer.request()
        peer.stop_reading()
        stopped.set()
        await anyio.to_thread.run_sync(die.wait)
        # The reader has something to read, so it is the writer who sees the end.
        await peer.send(frames.PingFrame(0, b"farewell"))
        peer.abort()

    async def main() -> None:
        async with h2keep.AsyncClient(http1=False) as client:
            await client.get(server.url)
            upload = asyncio.create_task(client.post(server.url, content=bytes(LARGE)))
            (pool,) = client._connections._pools.values()
            (connection,) = pool._states
            driver: Any = connection.driver
            await until(stopped.is_set)
            await until_stuck(driver)
            others = [asyncio.create_task(client.get(server.url)) for _ in range(3)]
            await until(lambda: connection.requests == 5)
            die.set()
            while not server.peers[0].ended:
                # Blocks the loop, so that both are there when it looks.
                time.sleep(0.001)  # noqa: ASYNC251
            assert [(await other).content for other in others] == 3 * [b"ok"]
            with pytest.raises(h2keep.ConnectionLost):
                await upload

    with threaded(first_dies, None, WINDOWS, receive_buffer=65_536) as server:
        run(main)
