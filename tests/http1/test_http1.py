"""Origins without HTTP/2: the library's own transport serves them as it always did, and it is said that no PINGs go."""

from __future__ import annotations

import logging
import socket
import ssl
import tempfile
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import anyio.to_thread
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep import Keepalive, _fallback
from proxy.servers import TinyProxy
from support.http1 import Http1Server, server_context
from support.raw import GONE, Peer, RawServer

if TYPE_CHECKING:
    from pathlib import Path

    import trustme

    from support.fronts import Front
    from support.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

TCP = socket.IPPROTO_TCP


def is_without_pings(response: Any) -> bool:
    found = response.extensions["h2keep"]
    assert found.http_version == response.http_version
    assert found.pings_possible == (response.http_version == "HTTP/2")
    return not found.pings_possible


def options_of(response: Any) -> tuple[bool, int, int, int]:
    """The TCP keepalive of the connection that served it."""
    sock = response.extensions["network_stream"].get_extra_info("socket")
    figures = [sock.getsockopt(TCP, name) for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)]
    return (bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)), *figures)


class TestWhoIsServed:
    async def test_k18_an_origin_without_http2_is_served_and_remembered(
        self,
        front: Front,
        client_ssl: ssl.SSLContext,
        http1_ssl: ssl.SSLContext,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        now = 1000.0
        monkeypatch.setattr(_fallback, "http1_origins", _fallback.Http1Origins(lambda: now))
        async with Http1Server.listen(http1_ssl) as server, front.client(verify=client_ssl) as client:
            for seconds, connections in ((0.0, 2), (599.0, 2), (2.0, 3), (1.0, 3)):
                now += seconds
                response = await client.post(f"{server.url}/x?a=b", content=b"whole")
                assert response.json() == {"first": "POST /x?a=b HTTP/1.1", "body": "whole"}
                assert is_without_pings(response)
                assert response.extensions["h2keep"].origin == server.url
                # One that found out, and the one that serves them all.
                assert server.connections == connections
        (told,) = [record for record in caplog.records if record.name == "h2keep" and record.levelno >= logging.WARNING]
        assert told.getMessage().startswith(f"{server.url} does not speak HTTP/2: ")
        assert "without PINGs" in told.getMessage()

    async def test_a_server_without_alpn(
        self, front: Front, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
    ) -> None:
        async with (
            Http1Server.listen(server_context(cert_path, key_path)) as server,
            front.client(verify=client_ssl) as client,
        ):
            assert is_without_pings(await client.get(server.url))

    async def test_plain_http(self, front: Front, hypercorn: Server, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "h2keep")
        async with front.client() as client:
            for _ in range(3):
                body = front.chunks([b"a", b"b"])
                response = await client.post(f"{hypercorn.h2c_url}/echo", content=body)
                assert response.json()["http_version"] == "1.1"
                assert response.json()["body"] == "ab"
                assert is_without_pings(response)
        (told,) = [record.getMessage() for record in caplog.records if "without PINGs" in record.getMessage()]
        assert told.startswith(f"{hypercorn.h2c_url}: http:// is HTTP/1.1 here: {front.name}'s own transport")

    async def test_http2_says_what_it_is(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        async with front.client(verify=client_ssl) as client:
            assert not is_without_pings(await client.get(f"{hypercorn.url}/echo"))

    async def test_http1_false_refuses(
        self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext
    ) -> None:
        async with Http1Server.listen(http1_ssl) as server:
            for _ in range(2):
                async with front.client(verify=client_ssl, http1=False) as client:
                    with pytest.raises(h2keep.HTTP2NotSupported, match="chose none") as caught:
                        await client.get(server.url)
                    assert isinstance(caught.value, front.module.ConnectError)
            # That it is known to speak HTTP/1.1 changes nothing.
            async with front.client(verify=client_ssl) as client:
                assert is_without_pings(await client.get(server.url))
            async with front.client(verify=client_ssl, http1=False) as client:
                with pytest.raises(h2keep.HTTP2NotSupported):
                    await client.get(server.url)

    async def test_http2_false_leaves_everything_to_the_library(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "h2keep")
        async with front.client(verify=client_ssl, http2=False) as client:
            for _ in range(2):
                response = await client.get(f"{hypercorn.url}/echo")
                assert response.json()["http_version"] == "1.1"
                assert is_without_pings(response)
                assert options_of(response)[0]
        assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
            f"http2=False: {front.name}'s own transport serves it, without PINGs; TCP keepalive is weaker"
        ]

    async def test_a_server_that_asks_for_http1(
        self, front: Front, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
    ) -> None:
        async with RawServer.listen(server_context(cert_path, key_path, "h2", "http/1.1")) as raw:
            http1 = Http1Server(raw)

            async def serve(peer: Peer) -> None:
                await peer.tls_handshake()
                if peer.alpn == "h2":
                    await peer.handshake()
                    while True:
                        request = await peer.request()
                        await peer.send(frames.RstStreamFrame(request.stream_id, 0xD))
                await http1.serve(peer)

            async with accepting(raw, serve), front.client(verify=client_ssl) as client:
                response = await client.post(raw.url, content=b"can be sent again")
                assert response.json()["body"] == "can be sent again"
                assert is_without_pings(response)
            assert [peer.alpn for peer in raw.peers] == ["h2", "http/1.1"]

    async def test_urls_of_no_scheme_that_anybody_knows(self, front: Front) -> None:
        async with front.client() as client:
            for url in ("ftp://127.0.0.1/", "https://127.0.0.1:0/"):
                with pytest.raises(h2keep.UnsupportedProtocol) as caught:
                    await client.get(url)
                assert isinstance(caught.value, front.module.UnsupportedProtocol)


class TestBodies:
    async def test_a_body_that_can_be_had_but_once_arrives_whole(
        self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext
    ) -> None:
        chunks = [bytes([number % 256]) * 1000 for number in range(500)]
        async with Http1Server.listen(http1_ssl) as server, front.client(verify=client_ssl) as client:
            began: list[int] = []
            await client.request("PUT", server.url, content=front.chunks(chunks, lambda: began.append(1)))
            ((_, _, body),) = server.requests
        assert body == b"".join(chunks)
        assert began == [1]

    async def test_connections_on_the_background_thread_change_nothing(
        self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext
    ) -> None:
        options = {} if front.threaded else {"run_in_thread": True}
        async with Http1Server.listen(http1_ssl) as server, front.client(verify=client_ssl, **options) as client:
            began: list[int] = []
            for _ in range(2):
                response = await client.post(server.url, content=front.chunks([b"a", b"b"], lambda: began.append(1)))
                assert response.json()["body"] == "ab"
                assert is_without_pings(response)
        assert began == [1, 1]

    async def test_a_body_that_has_been_begun_is_not_sent_again(
        self, front: Front, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
    ) -> None:
        """HTTP/2 until GOAWAY, which moves what wasn't processed to a server that speaks HTTP/1.1 only."""
        async with RawServer.listen(server_context(cert_path, key_path, "h2", "http/1.1")) as raw:
            http1 = Http1Server(raw)

            async def serve(peer: Peer) -> None:
                await peer.tls_handshake()
                if peer.alpn != "h2":
                    await http1.serve(peer)
                    return
                await peer.handshake()
                request = await peer.request()
                await peer.until(lambda: bool(request.received))
                raw._context = server_context(cert_path, key_path, "http/1.1")
                await peer.send(frames.GoAwayFrame(last_stream_id=0))

            async with accepting(raw, serve), front.client(verify=client_ssl) as client:
                with pytest.raises(h2keep.HTTP2NotSupported):
                    await client.post(raw.url, content=front.chunks([b"begun"] * 10))
                assert http1.requests == []
                response = await client.post(raw.url, content=front.chunks([b"another"]))
                assert response.json()["body"] == "another"
                assert is_without_pings(response)

    async def test_a_whole_body_moves_even_so(
        self, front: Front, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
    ) -> None:
        async with RawServer.listen(server_context(cert_path, key_path, "h2", "http/1.1")) as raw:
            http1 = Http1Server(raw)

            async def serve(peer: Peer) -> None:
                await peer.tls_handshake()
                if peer.alpn != "h2":
                    await http1.serve(peer)
                    return
                await peer.handshake()
                await (await peer.request()).complete()
                raw._context = server_context(cert_path, key_path, "http/1.1")
                await peer.send(frames.GoAwayFrame(last_stream_id=0))

            async with accepting(raw, serve), front.client(verify=client_ssl) as client:
                response = await client.post(raw.url, content=b"whole")
                assert response.json()["body"] == "whole"
                assert is_without_pings(response)


class TestTcpKeepalive:
    @pytest.mark.parametrize("plain", [True, False])
    async def test_k18_connections_have_tcp_keepalive(
        self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext, plain: bool
    ) -> None:
        async with Http1Server.listen(None if plain else http1_ssl) as server:
            async with front.client(verify=client_ssl) as client:
                response = await client.get(server.url)
                assert options_of(response) == (True, 30, 5, 3)
                assert response.extensions["h2keep"].tcp_keepalive
            async with front.client(verify=client_ssl, keepalive=Keepalive(10.0, 10.0)) as client:
                assert options_of(await client.get(server.url)) == (True, 10, 3, 3)
            async with front.client(verify=client_ssl, keepalive=Keepalive(None)) as client:
                response = await client.get(server.url)
                assert not options_of(response)[0]
                assert not response.extensions["h2keep"].tcp_keepalive

    async def test_k18_the_users_own_options_hold(self, front: Front) -> None:
        given = [(TCP, socket.TCP_KEEPIDLE, 77), (socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)]
        async with Http1Server.listen() as server, front.client(socket_options=iter(given)) as client:
            response = await client.get(server.url)
            assert options_of(response) == (True, 77, 5, 3)
            sock = response.extensions["network_stream"].get_extra_info("socket")
            # Linux doubles it.
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 100_000

    async def test_k18_the_way_to_a_proxy_has_it_too(
        self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext
    ) -> None:
        seen: list[str] = []
        trace = front.hook(lambda event, _info: seen.append(event))
        async with (
            TinyProxy.listen() as proxy,
            Http1Server.listen(http1_ssl) as server,
            front.client(verify=client_ssl, proxy=proxy.url) as client,
        ):
            response = await client.get(server.url, extensions={"trace": trace})
            assert options_of(response) == (True, 30, 5, 3)
            assert is_without_pings(response)
            assert len(proxy.tunnels) == 2
        assert "connection.connect_tcp.complete" in seen
        assert "http11.response_closed.complete" in seen

    async def test_a_unix_socket_needs_none(self, front: Front) -> None:
        with tempfile.TemporaryDirectory(prefix="h2keep-") as directory:
            path = f"{directory}/socket"
            async with Http1Server.listen(uds=path) as server, front.client(uds=path) as client:
                response = await client.get("http://function.example/")
                assert not response.extensions["h2keep"].tcp_keepalive
            assert server.requests[0][1]["host"] == "function.example"


class TestArguments:
    """What the transport was given, its stand-in is given."""

    async def test_verify(self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext) -> None:
        async with Http1Server.listen(http1_ssl) as server:
            # Known already, so that nothing but the library's own transport looks at the certificate.
            async with front.client(verify=client_ssl) as client:
                await client.get(server.url)
            async with front.client() as client:
                with pytest.raises(front.module.ConnectError):
                    await client.get(server.url)
            async with front.client(verify=False) as client:
                assert is_without_pings(await client.get(server.url))

    async def test_a_client_certificate(
        self, front: Front, ca: trustme.CA, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext, tmp_path: Path
    ) -> None:
        ca.issue_cert("client.example").private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
        client_ssl.load_cert_chain(tmp_path / "client.pem")
        http1_ssl.verify_mode = ssl.CERT_REQUIRED
        ca.configure_trust(http1_ssl)
        async with Http1Server.listen(http1_ssl) as server, front.client(verify=client_ssl) as client:
            assert is_without_pings(await client.get(server.url))

    async def test_limits(self, front: Front) -> None:
        limits = front.module.Limits(max_connections=1, max_keepalive_connections=0)
        async with Http1Server.listen() as server, front.client(limits=limits) as client:
            for connections in (1, 2):
                await client.get(server.url)
                assert server.connections == connections
            gate = server.gate = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.get, server.url)
                while len(server.requests) < 3:
                    await anyio.lowlevel.checkpoint()
                with pytest.raises(front.module.PoolTimeout):
                    await client.get(server.url, timeout=front.module.Timeout(9.0, pool=0.05))
                gate.set()

    async def test_local_address(self, front: Front) -> None:
        async with Http1Server.listen() as server, front.client(local_address="127.0.0.7") as client:
            response = await client.get(server.url)
            assert response.extensions["network_stream"].get_extra_info("client_addr")[0] == "127.0.0.7"

    async def test_retries(self, front: Front) -> None:
        async with Http1Server.listen() as server, front.client(retries=1) as client:
            server.raw.stop_listening()
            seen: list[str] = []
            trace = front.hook(lambda event, _info: seen.append(event))
            with pytest.raises(front.module.ConnectError):
                await client.get(server.url, extensions={"trace": trace})
        assert seen.count("connection.connect_tcp.failed") == 2

    async def test_the_proxy_of_the_environment(
        self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with (
            TinyProxy.listen() as tunnels,
            Http1Server.listen() as forwarder,
            Http1Server.listen(http1_ssl) as server,
        ):
            monkeypatch.setenv("HTTPS_PROXY", tunnels.url.replace("//", "//user:pass@"))
            monkeypatch.setenv("HTTP_PROXY", forwarder.url)
            monkeypatch.setenv("NO_PROXY", "localhost")
            async with front.client(verify=client_ssl) as client:
                await client.get(server.url)
                assert len(tunnels.tunnels) == 2
                assert all(b"Basic dXNlcjpwYXNz" in head for head in tunnels.heads)
                await client.get(server.url.replace("127.0.0.1", "localhost"))
                assert len(tunnels.tunnels) == 2
                response = await client.get("http://origin.example/path")
                assert response.json()["first"] == "GET http://origin.example/path HTTP/1.1"
            async with front.client(verify=client_ssl, trust_env=False) as client:
                await client.get(server.url)
            assert len(tunnels.tunnels) == 2

    async def test_what_is_so_by_a_proxy_need_not_be_so_without(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
    ) -> None:
        """A proxy that intercepts TLS, and speaks HTTP/1.1 alone."""
        async with Http1Server.listen(server_context(cert_path, key_path, "http/1.1")) as intercepting:
            port = intercepting.raw.port

            class Intercepting(TinyProxy):
                async def _go_on(
                    self, peer: Peer, head: bytes, _port: int, answer: bytes | None, _: bytes = b""
                ) -> None:
                    await super()._go_on(peer, head, port, answer)

            async with Intercepting.listen() as proxy, front.client(verify=client_ssl, proxy=proxy.url) as client:
                assert is_without_pings(await client.get(f"{hypercorn.url}/echo"))
        async with front.client(verify=client_ssl) as client:
            assert not is_without_pings(await client.get(f"{hypercorn.url}/echo"))

    async def test_socks_without_the_librarys_own_extra(
        self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext
    ) -> None:
        async with (
            TinyProxy.listen(socks=True) as proxy,
            Http1Server.listen(http1_ssl) as server,
            front.client(verify=client_ssl, proxy=proxy.url) as client,
        ):
            with pytest.raises(h2keep.UnsupportedProtocol, match=r"HTTP/1\.1 through this proxy needs more") as caught:
                await client.get(server.url)
            assert isinstance(caught.value, front.module.UnsupportedProtocol)
            assert isinstance(caught.value.__cause__, ImportError)


class TestUpgrades:
    @pytest.mark.parametrize("secure", [True, False])
    async def test_the_network_stream_is_the_users(
        self, front: Front, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path, secure: bool
    ) -> None:
        # One that speaks HTTP/2 too is asked for HTTP/1.1 at once.
        context = server_context(cert_path, key_path, "h2", "http/1.1") if secure else None
        headers = {"Connection": "Upgrade", "Upgrade": "echo"}

        async def for_loops(real: Any) -> bytes:
            async with real.stream("GET", server.url, headers=headers) as response:
                assert response.status_code == 101
                stream = response.extensions["network_stream"]
                await stream.write(b"ping")
                answer: bytes = await stream.read(100, timeout=10.0)
                return answer

        def for_threads(real: Any) -> bytes:
            with real.stream("GET", server.url, headers=headers) as response:
                assert response.status_code == 101
                stream = response.extensions["network_stream"]
                stream.write(b"ping")
                answer: bytes = stream.read(100, timeout=10.0)
                return answer

        async with Http1Server.listen(context) as server, front.client(verify=client_ssl) as client:
            assert await client.do(for_threads, for_loops) == b"ping"
            assert server.connections == 1

    @pytest.mark.parametrize("secure", [True, False])
    async def test_websockets(
        self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext, secure: bool
    ) -> None:
        if front.name == "httpx":
            # It has none; httpx-ws, which builds on `network_stream`, is what the test above is for.
            assert not hasattr(front.module.Client, "websocket")
            return

        async def for_loops(real: Any) -> str:
            async with real.websocket(url) as connection:
                await connection.send_text("hello")
                answer: str = await connection.receive_text(timeout=10.0)
                return answer

        def for_threads(real: Any) -> str:
            with real.websocket(url) as connection:
                connection.send_text("hello")
                answer: str = connection.receive_text(timeout=10.0)
                return answer

        context = http1_ssl if secure else None
        async with Http1Server.listen(context) as server, front.client(verify=client_ssl) as client:
            for scheme in ("http", "ws"):
                url = server.url.replace("http", scheme)
                assert await client.do(for_threads, for_loops) == "hello"


class TestStandaloneClients:
    async def test_they_refuse(self, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext) -> None:
        async with Http1Server.listen(http1_ssl) as server, h2keep.AsyncClient(verify=client_ssl) as client:
            with pytest.raises(h2keep.HTTP2NotSupported, match=r"use an HTTP/1\.1 transport for this origin"):
                await client.get(server.url)
            assert server.requests == []

    async def test_those_for_threads_too(self, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext) -> None:
        def get(url: str) -> None:
            with h2keep.Client(verify=client_ssl) as client:
                client.get(url)

        async with Http1Server.listen(http1_ssl) as server:
            with pytest.raises(h2keep.HTTP2NotSupported, match=r"use an HTTP/1\.1 transport for this origin"):
                await anyio.to_thread.run_sync(get, server.url)


class accepting:  # noqa: N801
    """Connections go to `serve` for the length of the context."""

    def __init__(self, raw: RawServer, serve: Any) -> None:
        self._raw = raw
        self._serve = serve
        self._tasks = anyio.create_task_group()

    async def __aenter__(self) -> None:
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._accept)

    async def __aexit__(self, *args: object) -> None:
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def _accept(self) -> None:
        while True:
            self._tasks.start_soon(self._guard, await self._raw.accept())

    async def _guard(self, peer: Peer) -> None:
        try:
            await self._serve(peer)
        except GONE:
            peer.close()
