"""A response that fails and is then forgotten: nothing of it stays with its connection."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING

import anyio
import pytest

import h2keep
from support.raw import RawServer

if TYPE_CHECKING:
    from support.raw import Peer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check", "every_engine")]

INTERNAL_ERROR = 2


@pytest.mark.parametrize("run_in_thread", [False, True])
@pytest.mark.parametrize("body", [b"", b"some of it"])
async def test_a_connection_is_unused_after_it(run_in_thread: bool, body: bytes) -> None:
    async def answer(peer: Peer) -> None:
        request = await peer.request()
        await peer.respond(request.stream_id, body=body, end_stream=False)
        await peer.rst(request.stream_id, INTERNAL_ERROR)

    limits = h2keep.Limits(keepalive_expiry=0.01)
    async with (
        RawServer.listen() as server,
        h2keep.AsyncClient(http1=False, verify=False, limits=limits, run_in_thread=run_in_thread) as client,
    ):
        server.serve(answer)
        streaming = client.stream("GET", server.url)
        response = await streaming.__aenter__()
        # Its answer means that what came before has been dealt with; so does an end, if this took too long.
        with contextlib.suppress(anyio.EndOfStream):
            await server.peers[0].ping()
        del streaming, response
        gc.collect()
        with anyio.fail_after(5), pytest.raises(anyio.EndOfStream):
            await server.peers[0].until(lambda: False)
