"""Proxies that authors or the environment give to stock clients: `install()` keeps to them, and PINGs go through."""

from __future__ import annotations

import importlib
import ssl
from typing import TYPE_CHECKING, Any

import pytest

import h2keep
from h2keep import Keepalive
from proxy.servers import TinyProxy, proxy_ssl
from support.http1 import Http1Server, server_context
from support.raw import RawServer, answering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from install.conftest import Front

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]


@pytest.fixture
async def proxy() -> AsyncIterator[TinyProxy]:
    async with TinyProxy.listen() as listening:
        yield listening


@pytest.mark.parametrize("given", ["argument", "environment", "mount"])
async def test_k3_pings_go_through_it(
    front: Front,
    given: str,
    proxy: TinyProxy,
    server_ssl: ssl.SSLContext,
    client_ssl: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h2keep.install(Keepalive(0.2, 10.0, jitter=0.0))
    options: dict[str, Any] = {"verify": client_ssl}
    if given == "environment":
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        options["trust_env"] = True
    elif given == "mount":
        options["mounts"] = {"https://": front.transport(verify=client_ssl, proxy=proxy.url)}
    else:
        options["proxy"] = front.module.Proxy(proxy.url, auth=("user", "word"))
    async with RawServer.listen(server_ssl) as server, front.client(**options) as client:
        server.serve(answering(delay=0.7))
        response = await client.get(server.url)
        assert response.content == b"ok"
        assert response.extensions["h2keep"].pings_acked >= 2
        assert len(server.peers[0].pings) >= 2
        assert len(proxy.tunnels) == 1
        assert (b"Proxy-Authorization" in proxy.heads[0]) == (given == "argument")


async def test_an_https_proxy_is_checked_by_its_own_context(
    front: Front,
    server_ssl: ssl.SSLContext,
    client_ssl: ssl.SSLContext,
    ca_path: Path,
    cert_path: Path,
    key_path: Path,
) -> None:
    h2keep.install()
    async with RawServer.listen(server_ssl) as server, TinyProxy.listen(proxy_ssl(cert_path, key_path)) as proxy:
        server.serve(answering())
        given = front.module.Proxy(proxy.url, ssl_context=ssl.create_default_context(cafile=str(ca_path)))
        async with front.client(verify=client_ssl, proxy=given) as client:
            assert (await client.get(server.url)).extensions["h2keep"].pings_possible
        async with front.client(verify=client_ssl, proxy=proxy.url) as client:
            with pytest.raises(front.module.ConnectError):
                await client.get(server.url)


async def test_k18_an_origin_without_http2_goes_through_it_as_before(
    front: Front, proxy: TinyProxy, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
) -> None:
    h2keep.install()
    async with (
        Http1Server.listen(server_context(cert_path, key_path)) as server,
        front.client(verify=client_ssl, proxy=proxy.url) as client,
    ):
        for tunnels in (2, 2):
            found = (await client.get(server.url)).extensions["h2keep"]
            assert not found.pings_possible
            # httpcore gives the socket that leads to a proxy no options.
            assert not found.tcp_keepalive
            # One that found out, and the one that serves them all.
            assert len(proxy.tunnels) == tunnels


async def test_a_refusal_is_an_error_of_both(front: Front, proxy: TinyProxy, client_ssl: ssl.SSLContext) -> None:
    h2keep.install()
    proxy.answer, proxy.then = b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "close"
    async with front.client(verify=client_ssl, proxy=proxy.url) as client:
        with pytest.raises(front.module.ProxyError, match="407") as caught:
            await client.get("https://127.0.0.1:9/")
        assert isinstance(caught.value, h2keep.ProxyError)
        assert caught.value.status == 407


async def test_a_proxy_that_only_the_library_can_use_is_its_own_affair(
    front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("SOCKS proxies need python-socks")

    library = importlib.import_module(f"h2keep.{front.name}").library
    monkeypatch.setattr(type(library), "proxy_for", missing)
    h2keep.install()
    proxied = front.core.HTTPProxy if front.threaded else front.core.AsyncHTTPProxy
    async with front.client(proxy="http://127.0.0.1:9/") as client:
        assert type(client.real._transport_for_url(front.module.URL("https://a.example"))._pool) is proxied
    assert f"a transport of {front.name} is left as it is, without PINGs: SOCKS proxies need" in caplog.text
