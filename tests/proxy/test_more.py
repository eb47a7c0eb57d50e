"""What a connection's life brings, when it leads through a proxy: goodbyes, limits, and proxies that come and go."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import pytest
from hyperframe import frame as frames

import h2keep
import h2keep.httpx2
from proxy.servers import TinyProxy, proxy_ssl
from support.clock import virtual_time
from support.pools import assert_at_rest
from support.raw import Peer, RawServer, answering

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]

STREAMS = frames.SettingsFrame.MAX_CONCURRENT_STREAMS
NOBODY = b"HTTP/1.1 502 Bad Gateway\r\n\r\n"


def client(proxy: str | h2keep.Proxy, **options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(**{"http1": False, "proxy": proxy, "timeout": 10.0, **options})


class GoodbyeFirst:
    """GOAWAY without having processed anything, on the first connections; then answers."""

    def __init__(self, times: int) -> None:
        self._times = times

    async def __call__(self, peer: Peer) -> None:
        self._times -= 1
        if self._times < 0:
            await answering()(peer)
        await (await peer.request()).complete()
        await peer.goaway(0)
        await peer.until(lambda: False)


async def test_k24_what_was_not_processed_goes_through_another_tunnel(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
) -> None:
    async with RawServer.listen(server_ssl) as server, TinyProxy.listen(proxy_ssl(cert_path, key_path)) as proxy:
        server.serve(GoodbyeFirst(2))
        chosen = h2keep.Proxy(proxy.url, ssl_context=client_ssl)
        async with client(chosen, verify=client_ssl) as c:
            assert (await c.post(server.url, content=b"x")).content == b"ok"
            assert len(proxy.tunnels) == 3
            assert_at_rest(c)


async def test_k24_if_the_proxy_refuses_another_tunnel_that_is_the_error_and_why_one_was_needed_its_cause() -> None:
    async with RawServer.listen() as server, TinyProxy.listen() as proxy, client(proxy.url) as c:

        async def goodbye(peer: Peer) -> None:
            proxy.answer, proxy.then = NOBODY, "close"
            await GoodbyeFirst(1)(peer)

        server.serve(goodbye)
        with pytest.raises(h2keep.ProxyError) as caught:
            await c.post(server.url, content=b"x")
        assert caught.value.status == 502
        assert caught.value.unprocessed
        assert isinstance(caught.value.__cause__, h2keep.ConnectionGoingAway)
        assert_at_rest(c)


async def test_a_full_connection_has_another_tunnel_beside_it() -> None:
    async with RawServer.listen() as server, TinyProxy.listen() as proxy:
        server.serve(answering(delay=1.0), {STREAMS: 2})
        async with client(proxy.url, limits=h2keep.Limits(max_connections=3)) as c:
            await c.get(server.url)
            async with anyio.create_task_group() as tasks:
                for _ in range(12):
                    tasks.start_soon(c.get, server.url)
            assert len(proxy.tunnels) == 3
            assert sum(len(peer.requests) for peer in server.peers) == 13
            assert_at_rest(c)


async def test_retries_are_not_for_what_a_proxy_refuses(server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
    async with RawServer.listen(server_ssl) as server, TinyProxy.listen() as proxy:
        server.serve(answering())
        proxy.answer, proxy.then = NOBODY, "close"
        transport = h2keep.httpx2.AsyncKeepaliveTransport(verify=client_ssl, proxy=proxy.url, retries=3)
        async with httpx2.AsyncClient(transport=transport) as c:
            with pytest.raises(h2keep.ProxyError) as caught:
                await c.get(server.url)
            assert caught.value.status == 502
            # As httpx's own: a refusal was an answer.
            assert len(proxy.tunnels) == 1


async def test_a_proxy_whose_first_address_never_answers(
    monkeypatch: pytest.MonkeyPatch, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, TinyProxy.listen() as proxy:
        server.serve(answering())
        with socket.socket() as hole, socket.socket() as filler:
            # A listener whose backlog is full.
            hole.bind(("127.0.0.2", 0))
            hole.listen(0)
            filler.connect(hole.getsockname())
            found = [(socket.AF_INET, address) for address in (hole.getsockname(), ("127.0.0.1", proxy.server.port))]

            async def resolve(_host: str, _port: int) -> list[Any]:
                return found

            monkeypatch.setattr("h2keep.runner.dial._resolve", resolve)
            async with client("http://proxy.example:3128", verify=client_ssl) as c:
                began = anyio.current_time()
                assert (await c.get(server.url)).content == b"ok"
                assert anyio.current_time() - began == pytest.approx(0.25, abs=0.05)
