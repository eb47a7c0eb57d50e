"""Loops whose tasks are made by the user's factory, above all those that begin at once (`asyncio.eager_task_factory`).

What h2keep starts on its own behalf must not begin in the middle of what starts it.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hyperframe import frame as frames

import h2keep
from support.clock import Backend
from support.pools import assert_at_rest, connections_of
from support.raw import Peer, RawServer, answering, task_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from support.raw import RawRequest

REFUSED_STREAM = 7
CHUNK = bytes(10_000)


def _as_ever(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
    return asyncio.Task(coroutine, loop=loop, **options)


FACTORIES: dict[str, Any] = {"as ever": _as_ever}
if sys.version_info >= (3, 12):
    FACTORIES["eager"] = asyncio.eager_task_factory


def _backend(factory: Any) -> Backend:
    def make() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(factory)
        return loop

    return Backend("asyncio", lambda: {"loop_factory": make})


pytestmark = [
    pytest.mark.anyio,
    pytest.mark.usefixtures("leak_check"),
    pytest.mark.parametrize(
        "anyio_backend",
        [pytest.param(_backend(factory), id=name) for name, factory in FACTORIES.items()],
        indirect=True,
    ),
]


def client(**options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(**{"http1": False, "timeout": 20.0, **options})


class Fickle:
    """Refuses every third request once, and leaves its first connection in the middle; answers with a body's length."""

    def __init__(self) -> None:
        self.connections = 0
        self.seen: set[str] = set()

    async def __call__(self, peer: Peer) -> None:
        self.connections += 1
        leaves = self.connections == 1
        async with task_group() as tasks:
            while True:
                request = await peer.request()
                known = request.path in self.seen
                self.seen.add(request.path)
                if leaves and len(self.seen) == 20:
                    await peer.send(frames.GoAwayFrame(0, last_stream_id=request.stream_id - 2))
                    await peer.until(lambda: False)
                elif len(self.seen) % 3 == 0 and not known:
                    await peer.send(frames.RstStreamFrame(request.stream_id, error_code=REFUSED_STREAM))
                else:
                    tasks.start_soon(self._answer, request)

    async def _answer(self, request: RawRequest) -> None:
        body = await request.complete()
        await request.peer.respond(request.stream_id, body=b"%d" % len(body))


async def test_k24_requests_and_uploads_that_are_sent_again() -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield CHUNK

    async def one(number: int) -> None:
        content = body() if number % 2 else CHUNK
        answer = await c.post(f"{server.url}/{number}", content=content)
        assert answer.content == (b"50000" if number % 2 else b"10000")

    async with RawServer.listen() as server, client() as c:
        server.serve(Fickle())
        async with asyncio.TaskGroup() as tasks:
            for number in range(60):
                tasks.create_task(one(number))
        assert_at_rest(c)


async def test_a_hook_whose_tasks_make_requests() -> None:
    asked: list[asyncio.Task[h2keep.Response]] = []

    def hook(_stats: h2keep.ConnectionStats, event: object) -> None:
        if len(asked) < 30:
            asked.append(asyncio.get_running_loop().create_task(c.get(server.url)))

    keepalive = h2keep.Keepalive(read_idle_timeout=0.02, ping_timeout=10.0, jitter=0.0)
    async with RawServer.listen() as server, client(event_hook=hook, keepalive=keepalive) as c:
        server.serve(answering(delay=0.05))
        assert (await c.get(server.url)).content == b"ok"
        while len(asked) < 30 or not all(task.done() for task in asked):
            assert (await c.get(server.url)).content == b"ok"
        assert {(await task).content for task in asked} == {b"ok"}
        assert sum(connection.protocol.open_streams for connection in connections_of(c)) == 0
