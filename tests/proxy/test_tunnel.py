"""Keepalive through proxies: PINGs reach the origin, and life is what comes from there (K2, K4, K8)."""

from __future__ import annotations

import contextlib
import ssl
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import h2keep
from proxy.servers import TinyProxy, proxy_ssl
from support.clock import virtual_time
from support.raw import RawServer, answering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.raw import Peer

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]


class Setting:
    """A client, a proxy and an origin."""

    def __init__(self, server: RawServer, proxy: TinyProxy, client: h2keep.AsyncClient) -> None:
        self.server = server
        self.proxy = proxy
        self.client = client


@pytest.fixture(params=["http", "https", "socks5"])
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
async def setting(
    kind: str, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path, leak_check: None
) -> AsyncIterator[Setting]:
    """TLS to the origin, through each kind of proxy; one context for the proxy's TLS and the origin's."""
    context = proxy_ssl(cert_path, key_path) if kind == "https" else None
    async with (
        RawServer.listen(server_ssl) as server,
        TinyProxy.listen(context, socks=kind == "socks5") as proxy,
        client(proxy, client_ssl) as c,
    ):
        yield Setting(server, proxy, c)


@contextlib.asynccontextmanager
async def client(proxy: TinyProxy, context: ssl.SSLContext, **options: Any) -> AsyncIterator[h2keep.AsyncClient]:
    chosen = h2keep.Proxy(proxy.url, ssl_context=context if proxy.url.startswith("https") else None)
    keepalive = h2keep.Keepalive(jitter=0.0)
    async with h2keep.AsyncClient(proxy=chosen, verify=context, timeout=None, keepalive=keepalive, **options) as c:
        yield c


async def fails_after(c: h2keep.AsyncClient, url: str, seconds: float) -> None:
    began = anyio.current_time()
    with pytest.raises(h2keep.PingTimeout) as caught:
        await c.get(url)
    assert anyio.current_time() - began == pytest.approx(seconds, abs=0.1)
    assert not caught.value.unprocessed


async def test_k3_an_answer_after_half_an_hour_arrives_and_pings_went_through_the_tunnel(setting: Setting) -> None:
    setting.server.serve(answering(b"at last", delay=1799.0))
    began = anyio.current_time()
    response = await setting.client.post(setting.server.url, content=b"question")
    assert response.content == b"at last"
    pings = setting.server.peers[0].pings
    assert [round(ping.at - began) for ping in pings] == list(range(30, 1800, 30))
    assert response.connection.pings_sent == response.connection.pings_acked == len(pings)
    assert len(setting.proxy.tunnels) == 1


async def test_k4_a_tunnel_that_goes_silent_is_a_ping_timeout_after_45_seconds(setting: Setting) -> None:
    setting.server.serve(answering(delay=10_000.0))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fails_after, setting.client, setting.server.url, 45.0)
        peer = await setting.server.peer(0)
        await peer.until(lambda: bool(peer.requests))
        # Whoever stands beyond lets both connections live, and nothing through.
        setting.proxy.tunnels[0].silent = True
    assert len(setting.server.peers) == 1


async def test_k8_the_loss_resets_the_connection_to_the_proxy(setting: Setting) -> None:
    setting.server.serve(answering(delay=10_000.0))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fails_after, setting.client, setting.server.url, 45.0)
        peer = await setting.server.peer(0)
        await peer.until(lambda: bool(peer.requests))
        tunnel = setting.proxy.tunnels[0]
        tunnel.silent = True
        await tunnel.ended.wait()
    # RST, and no goodbye of any TLS.
    assert isinstance(tunnel.end, ConnectionResetError)


async def test_closing_says_goodbye_through_the_tunnel(setting: Setting) -> None:
    setting.server.serve(answering())
    await setting.client.get(setting.server.url)
    await setting.client.aclose()
    await setting.proxy.tunnels[0].ended.wait()
    assert setting.proxy.tunnels[0].end is None
    peer = setting.server.peers[0]
    with contextlib.suppress(anyio.EndOfStream):
        await peer.until(lambda: peer.ended)
    assert peer.error is None
    assert any(type(frame).__name__ == "GoAwayFrame" for frame in peer.frames)


async def test_k9_a_connection_that_died_unused_costs_a_hedge_and_no_failure(setting: Setting) -> None:
    setting.server.serve(answering())
    await setting.client.get(setting.server.url)
    await anyio.sleep(31.0)
    setting.proxy.tunnels[0].silent = True
    began = anyio.current_time()
    assert (await setting.client.get(setting.server.url)).content == b"ok"
    assert anyio.current_time() - began == pytest.approx(0.2, abs=0.05)
    assert len(setting.proxy.tunnels) == 2


async def test_large_bodies_go_both_ways(setting: Setting) -> None:
    body = bytes(range(256)) * 8192

    async def echo(peer: Peer) -> None:
        while True:
            request = await peer.request()
            await peer.respond(request.stream_id, body=await request.complete())

    setting.server.serve(echo)
    assert (await setting.client.post(setting.server.url, content=body)).content == body


async def test_the_network_stream_shows_the_origins_certificate(setting: Setting) -> None:
    setting.server.serve(answering())
    response = await setting.client.get(setting.server.url)
    ssl_object = response._source.connection.transport.security.ssl_object
    assert ssl_object is not None
    assert ssl_object.selected_alpn_protocol() == "h2"


# TLS in TLS


@contextlib.asynccontextmanager
async def tls_in_tls(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
) -> AsyncIterator[Setting]:
    async with (
        RawServer.listen(server_ssl) as server,
        TinyProxy.listen(proxy_ssl(cert_path, key_path)) as proxy,
        client(proxy, client_ssl) as c,
    ):
        yield Setting(server, proxy, c)


async def test_k2_ciphertext_of_the_proxys_own_tls_is_no_life(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
) -> None:
    async with tls_in_tls(server_ssl, client_ssl, cert_path, key_path) as setting, anyio.create_task_group() as tasks:
        setting.server.serve(answering(delay=10_000.0))
        tasks.start_soon(fails_after, setting.client, setting.server.url, 45.0)
        peer = await setting.server.peer(0)
        await peer.until(lambda: bool(peer.requests))
        tunnel = setting.proxy.tunnels[0]
        tunnel.silent = True
        # One record that takes for ever: bytes come all the time, and nothing from beyond the proxy.
        record = tunnel.client.encrypt(b"x" * 16_000)
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            for index in range(len(record) - 1):
                await tunnel.client.send_ciphertext(record[index : index + 1])
                await anyio.sleep(1.0)


async def test_k2_bytes_inside_the_tunnel_are_life_though_they_complete_no_record_of_the_origins(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
) -> None:
    async with tls_in_tls(server_ssl, client_ssl, cert_path, key_path) as setting:
        body = bytes(8_000)

        async def trickle(peer: Peer) -> None:
            request = await peer.request()
            peer.auto_ack_pings = False
            head = peer.headers_frame(request.stream_id).serialize()
            data = b"".join(_data_frames(request.stream_id, body))
            await peer.trickle(head + data, interval=10.0, size=100)

        setting.server.serve(trickle)
        response = await setting.client.get(setting.server.url)
        assert response.content == body
        assert anyio.current_time() > 700.0
        assert response.connection.pings_sent == 0


def _data_frames(stream_id: int, body: bytes) -> list[bytes]:
    from hyperframe.frame import DataFrame

    return [DataFrame(stream_id, body, flags=["END_STREAM"]).serialize()]


async def test_a_proxy_that_closes_its_tls_ends_the_connection(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
) -> None:
    async with tls_in_tls(server_ssl, client_ssl, cert_path, key_path) as setting, anyio.create_task_group() as tasks:
        setting.server.serve(answering(delay=10_000.0))

        async def get() -> None:
            with pytest.raises(h2keep.ConnectionLost) as caught:
                await setting.client.get(setting.server.url)
            assert not isinstance(caught.value, h2keep.PingTimeout)

        tasks.start_soon(get)
        peer = await setting.server.peer(0)
        await peer.until(lambda: bool(peer.requests))
        await setting.proxy.tunnels[0].client.eof()


async def test_a_proxy_whose_tls_breaks_ends_the_connection_and_says_why(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
) -> None:
    async with tls_in_tls(server_ssl, client_ssl, cert_path, key_path) as setting, anyio.create_task_group() as tasks:
        setting.server.serve(answering(delay=10_000.0))

        async def get() -> None:
            with pytest.raises(h2keep.ConnectionLost) as caught:
                await setting.client.get(setting.server.url)
            assert isinstance(caught.value.__cause__, ssl.SSLError)

        tasks.start_soon(get)
        peer = await setting.server.peer(0)
        await peer.until(lambda: bool(peer.requests))
        await setting.proxy.tunnels[0].client.send_ciphertext(b"\x17\x03\x03\x00\x20" + bytes(32))


async def test_tls_that_breaks_before_the_tunnel_is_there_is_a_proxy_error(
    client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
) -> None:
    async with TinyProxy.listen(proxy_ssl(cert_path, key_path)) as proxy, client(proxy, client_ssl) as c:
        proxy.answer = None
        async with anyio.create_task_group() as tasks:

            async def get() -> None:
                with pytest.raises(h2keep.ProxyError, match="lost the connection") as caught:
                    await c.get("https://127.0.0.1:9/")
                assert caught.value.status is None
                assert caught.value.unprocessed

            tasks.start_soon(get)
            await (await proxy.tunnel()).client.send_ciphertext(b"\x17\x03\x03\x00\x20" + bytes(32))
