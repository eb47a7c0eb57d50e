"""Through real proxies to real bytes: each front door, each way of saying which proxy, and PINGs all the way."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import httpx2
import pytest

import h2keep
import h2keep.httpx
import h2keep.httpx2
from proxy.real import INSTALLED, RealProxy, running
from support.raw import RawServer, answering

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator
    from pathlib import Path

    from support.raw import Peer
    from support.servers import Server

asynchronous = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]
FAST = h2keep.Keepalive(read_idle_timeout=0.3, ping_timeout=0.7)


@pytest.fixture(scope="session")
def _proxies(cert_path: Path, key_path: Path) -> Iterator[dict[str, RealProxy]]:
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(running(name, cert_path, key_path)) for name in INSTALLED}


@pytest.fixture(params=INSTALLED)
def real_proxy(request: pytest.FixtureRequest, _proxies: dict[str, RealProxy]) -> RealProxy:
    return _proxies[request.param]


def settings(proxy: RealProxy, client_ssl: ssl.SSLContext, *, bare: bool = False) -> h2keep.Proxy:
    url = proxy.bare_url if bare else proxy.url
    return h2keep.Proxy(url, ssl_context=client_ssl if proxy.scheme == "https" else None)


class TestAsync:
    """On asyncio and trio."""

    pytestmark = asynchronous

    async def test_bodies_go_both_ways_over_tls(
        self, real_proxy: RealProxy, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        body = bytes(range(256)) * 4096

        async def echo(peer: Peer) -> None:
            while True:
                request = await peer.request()
                await peer.respond(request.stream_id, body=await request.complete())

        proxy = settings(real_proxy, client_ssl)
        async with (
            RawServer.listen(server_ssl) as server,
            h2keep.AsyncClient(proxy=proxy, verify=client_ssl, timeout=20.0) as client,
        ):
            server.serve(echo)
            for _ in range(2):
                assert (await client.post(server.url, content=body)).content == body
            assert len(server.peers) == 1

    async def test_cleartext_with_prior_knowledge_goes_through(
        self, real_proxy: RealProxy, client_ssl: ssl.SSLContext
    ) -> None:
        proxy = settings(real_proxy, client_ssl)
        async with RawServer.listen() as server, h2keep.AsyncClient(proxy=proxy, http1=False, timeout=20.0) as client:
            server.serve(answering())
            assert (await client.get(server.url)).content == b"ok"

    async def test_k3_pings_reach_the_origin(
        self, real_proxy: RealProxy, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        proxy = settings(real_proxy, client_ssl)
        options: dict[str, Any] = {"verify": client_ssl, "timeout": 20.0}
        async with (
            RawServer.listen(server_ssl) as server,
            h2keep.AsyncClient(proxy=proxy, keepalive=FAST, **options) as client,
        ):
            server.serve(answering(delay=1.0))
            response = await client.get(server.url)
            assert response.content == b"ok"
            assert len(server.peers[0].pings) >= 2
            assert response.connection.pings_acked >= 2

    async def test_k4_k8_an_origin_that_goes_silent_is_detected(
        self, real_proxy: RealProxy, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        proxy = settings(real_proxy, client_ssl)
        async with (
            RawServer.listen(server_ssl) as server,
            h2keep.AsyncClient(proxy=proxy, verify=client_ssl, timeout=None, keepalive=FAST) as client,
            anyio.create_task_group() as tasks,
        ):
            server.serve(answering(delay=60.0))

            async def get() -> None:
                with pytest.raises(h2keep.PingTimeout):
                    await client.get(server.url)
                tasks.cancel_scope.cancel()

            tasks.start_soon(get)
            peer = await server.peer(0)
            await peer.until(lambda: bool(peer.requests))
            # To TCP all is well, on both sides of the proxy.
            peer.auto_ack_pings = False

    async def test_without_a_password_it_is_407(
        self, real_proxy: RealProxy, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        proxy = settings(real_proxy, client_ssl, bare=True)
        async with RawServer.listen(server_ssl) as server, h2keep.AsyncClient(proxy=proxy, verify=client_ssl) as client:
            with pytest.raises(h2keep.ProxyError, match=r"answers 407 .*wants a user name and a password") as caught:
                await client.get(server.url)
            assert caught.value.status == 407
            assert caught.value.unprocessed
            assert not server.peers

    async def test_an_origin_that_refuses_is_the_proxys_error(
        self, real_proxy: RealProxy, client_ssl: ssl.SSLContext
    ) -> None:
        with socket.socket() as placeholder:
            placeholder.bind(("127.0.0.1", 0))
            port = placeholder.getsockname()[1]
        proxy = settings(real_proxy, client_ssl)
        async with h2keep.AsyncClient(proxy=proxy, verify=client_ssl) as client:
            with pytest.raises(h2keep.ProxyError) as caught:
                await client.get(f"https://127.0.0.1:{port}/")
            assert caught.value.unprocessed
            # Each has its own idea: an answer of 5xx, or none.
            assert caught.value.status is None or caught.value.status >= 500

    async def test_k4_a_proxy_that_is_stopped_is_a_ping_timeout(
        self, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
    ) -> None:
        with running("proxy.py", cert_path, key_path) as proxy:
            async with (
                RawServer.listen(server_ssl) as server,
                h2keep.AsyncClient(proxy=proxy.url, verify=client_ssl, timeout=None, keepalive=FAST) as client,
            ):
                server.serve(answering(delay=60.0))
                async with anyio.create_task_group() as tasks:

                    async def get() -> None:
                        with pytest.raises(h2keep.PingTimeout):
                            await client.get(server.url)

                    tasks.start_soon(get)
                    peer = await server.peer(0)
                    await peer.until(lambda: bool(peer.requests))
                    proxy.freeze()


# The other front doors, on servers of their own processes


def test_threads(real_proxy: RealProxy, granian: Server, client_ssl: ssl.SSLContext) -> None:
    with h2keep.Client(proxy=settings(real_proxy, client_ssl), verify=client_ssl, timeout=20.0) as client:
        assert client.get(f"{granian.url}/echo").status_code == 200
    with (
        h2keep.Client(proxy=settings(real_proxy, client_ssl, bare=True), verify=client_ssl) as client,
        pytest.raises(h2keep.ProxyError, match="407"),
    ):
        client.get(f"{granian.url}/echo")


@pytest.mark.parametrize(
    ("library", "transport"),
    [
        pytest.param(httpx, h2keep.httpx.KeepaliveTransport, id="httpx"),
        pytest.param(httpx2, h2keep.httpx2.KeepaliveTransport, id="httpx2"),
    ],
)
class TestTransports:
    """Beside the libraries' own."""

    def test_the_argument(
        self, library: Any, transport: Any, real_proxy: RealProxy, granian: Server, client_ssl: ssl.SSLContext
    ) -> None:
        given = library.Proxy(real_proxy.url, ssl_context=client_ssl if real_proxy.scheme == "https" else None)
        for kind in (library.HTTPTransport, transport):
            with library.Client(transport=kind(verify=client_ssl, proxy=given, http2=True), timeout=20.0) as client:
                response = client.get(f"{granian.url}/echo")
                assert response.status_code == 200
                assert response.http_version == "HTTP/2"

    def test_a_refusal(
        self, library: Any, transport: Any, real_proxy: RealProxy, granian: Server, client_ssl: ssl.SSLContext
    ) -> None:
        given = library.Proxy(real_proxy.bare_url, ssl_context=client_ssl if real_proxy.scheme == "https" else None)
        for kind in (library.HTTPTransport, transport):
            with (
                library.Client(transport=kind(verify=client_ssl, proxy=given), timeout=20.0) as client,
                pytest.raises(library.ProxyError, match="407") as caught,
            ):
                client.get(f"{granian.url}/echo")
        assert isinstance(caught.value, h2keep.ProxyError)
        assert caught.value.status == 407

    def test_the_environment(
        self,
        library: Any,
        transport: Any,
        real_proxy: RealProxy,
        granian: Server,
        client_ssl: ssl.SSLContext,
        ca_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # For an https:// proxy; what is given as verify is for origins.
        monkeypatch.setenv("SSL_CERT_FILE", str(ca_path))
        for url, accepted in ((real_proxy.url, True), (real_proxy.bare_url, False)):
            monkeypatch.setenv("HTTPS_PROXY", url)
            with library.Client(transport=transport(verify=client_ssl), timeout=20.0) as client:
                if accepted:
                    assert client.get(f"{granian.url}/echo").status_code == 200
                else:
                    with pytest.raises(library.ProxyError, match="407"):
                        client.get(f"{granian.url}/echo")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with library.Client(transport=transport(verify=client_ssl), timeout=20.0) as client:
            assert client.get(f"{granian.url}/echo").status_code == 200
