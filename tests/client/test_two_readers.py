"""One response, two tasks that read it at once: an error, as only one of them could ever be woken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

import h2keep
from support.raw import RawServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from support.raw import Peer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]


@pytest.mark.parametrize("run_in_thread", [False, True])
async def test_neither_of_two_readers_hangs(run_in_thread: bool) -> None:
    outcomes: list[str] = []

    async def read(chunks: AsyncIterator[bytes]) -> None:
        try:
            await anext(chunks)
        except (RuntimeError, h2keep.ReadError) as error:
            outcomes.append(type(error).__name__)

    async with (
        RawServer.listen() as server,
        h2keep.AsyncClient(http1=False, verify=False, timeout=None, run_in_thread=run_in_thread) as client,
    ):

        async def answer(peer: Peer) -> None:
            request = await peer.request()
            await peer.respond(request.stream_id, end_stream=False)

        server.serve(answer)
        async with client.stream("GET", server.url) as response:
            chunks = response.aiter_bytes()
            with anyio.fail_after(5):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read, chunks)
                    tasks.start_soon(read, chunks)
    assert sorted(outcomes) == ["ReadError", "RuntimeError"]
