"""On uvloop: what asyncio's interface promises is enough."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
import uvloop

import h2keep
from h2keep.runner.driver import CallbackDriver
from support.clock import Backend
from support.pools import connections_of
from support.raw import Peer, RawServer, answering

if TYPE_CHECKING:
    import asyncio
    import ssl
    from collections.abc import AsyncIterator

    from support.servers import Server

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize(
        "anyio_backend", [pytest.param(Backend("asyncio", lambda: {"use_uvloop": True}), id="uvloop")], indirect=True
    ),
]

MIB = 1024 * 1024


def client(**options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(**{"timeout": 20.0, **options})


async def test_it_is_uvloop(server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl) as c:
        server.serve(answering())
        assert (await c.get(server.url)).content == b"ok"
        [connection] = connections_of(c)
        loop: asyncio.AbstractEventLoop = connection.loop.native  # type: ignore[attr-defined]
        assert isinstance(loop, uvloop.Loop)
        assert isinstance(connection.driver, CallbackDriver)
    assert connection.transport.socket.fileno() == -1


async def test_many_requests_and_much_data(granian: Server, client_ssl: ssl.SSLContext) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(64 * 1024)

    async with client(verify=client_ssl) as c:
        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(_echo, c, granian.url, b"%d" % number)
        answer = (await c.post(f"{granian.url}/echo", content=body())).json()
        assert len(answer["body"]) == 4 * MIB


async def _echo(c: h2keep.AsyncClient, url: str, content: bytes) -> None:
    assert (await c.post(f"{url}/echo", content=content)).json()["body"] == content.decode()


async def test_k3_pings_go_out_and_k7_a_dead_peer_is_found(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async def silent(peer: Peer) -> None:
        request = await peer.request()
        await peer.until(lambda: len(peer.pings) >= 2)
        await peer.respond(request.stream_id, body=b"late")
        await peer.request()
        peer.stop_reading()

    keepalive = h2keep.Keepalive(read_idle_timeout=0.3, ping_timeout=0.3)
    async with RawServer.listen(server_ssl) as server, client(verify=client_ssl, keepalive=keepalive) as c:
        server.serve(silent)
        assert (await c.get(server.url)).content == b"late"
        with pytest.raises(h2keep.PingTimeout):
            await c.get(server.url)
