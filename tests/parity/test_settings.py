"""What the libraries' documentation says of timeouts, pool limits and TLS."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import truststore
from cryptography import x509
from hyperframe import frame as frames

from runner.test_tls import subject_hash
from support.http1 import Http1Server
from support.raw import Peer, RawServer, answering

if TYPE_CHECKING:
    from pathlib import Path

    import trustme

    from support.fronts import Front
    from support.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]


class TestTimeouts:
    async def test_connect(self, front: Front) -> None:
        async with RawServer.listen() as server, front.client(verify=False) as client:
            # Nobody there ever answers TLS.
            with pytest.raises(front.module.ConnectTimeout):
                await client.get(server.url.replace("http:", "https:"), timeout=front.module.Timeout(9.0, connect=0.1))

    async def test_read(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        async with front.client(verify=client_ssl) as client:
            timeout = front.module.Timeout(9.0, read=0.2)
            with pytest.raises(front.module.ReadTimeout) as caught:
                await client.get(f"{hypercorn.url}/stall?seconds=5", timeout=timeout)
            assert isinstance(caught.value, front.module.TimeoutException)
            assert caught.value.request.url.path == "/stall"
            # It is between two pieces, not for all.
            response = await client.get(f"{hypercorn.url}/sse?events=12&every=0.02", timeout=timeout)
            assert response.text.count("data:") == 12

    # Theirs leaves a generator of its own to the collector, on trio.
    @pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
    async def test_write(self, front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
        async def deaf(peer: Peer) -> None:
            await peer.send(frames.WindowUpdateFrame(0, window_increment=2**30))
            peer.stop_reading()
            await anyio.sleep_forever()

        async with (
            RawServer.listen(server_ssl, receive_buffer=16_384) as server,
            front.client(verify=client_ssl) as client,
        ):
            server.serve(deaf, {frames.SettingsFrame.INITIAL_WINDOW_SIZE: 2**30})
            with pytest.raises(front.module.WriteTimeout):
                await client.post(
                    server.url,
                    content=bytes(20_000_000),
                    timeout=front.module.Timeout(9.0, write=0.3),
                )

    async def test_pool(self, front: Front) -> None:
        limits = front.module.Limits(max_connections=1)
        async with Http1Server.listen() as server, front.client(limits=limits) as client:
            gate = server.gate = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.get, server.url)
                while not server.requests:
                    await anyio.lowlevel.checkpoint()
                with pytest.raises(front.module.PoolTimeout):
                    await client.get(server.url, timeout=front.module.Timeout(9.0, pool=0.05))
                gate.set()

    async def test_those_of_client_and_request(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext
    ) -> None:
        url = f"{hypercorn.url}/slow?seconds=0.2"
        async with front.client(verify=client_ssl, client={"timeout": 0.05}) as client:
            with pytest.raises(front.module.TimeoutException):
                await client.get(url)
            assert (await client.get(url, timeout=None)).status_code == 200
            assert (await client.get(url, timeout=10.0)).status_code == 200


class TestLimits:
    async def test_unused_connections_are_kept_or_not(
        self, front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        for given, connections in (({}, 1), ({"max_keepalive_connections": 0}, 3), ({"keepalive_expiry": 0.0}, 3)):
            async with (
                RawServer.listen(server_ssl) as server,
                front.client(verify=client_ssl, limits=front.module.Limits(**given)) as client,
            ):
                server.serve(answering())
                for _ in range(3):
                    assert (await client.get(server.url)).content == b"ok"
                    # On trio's and asyncio's shortest clocks nothing expires within one reading.
                    await anyio.sleep(0.01)
                assert len(server.peers) == connections

    async def test_requests_beyond_max_connections_wait(self, front: Front) -> None:
        limits = front.module.Limits(max_connections=2)
        async with Http1Server.listen() as server, front.client(limits=limits) as client:
            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(client.get, server.url)
            assert len(server.requests) == 8
            assert server.connections == 2

    async def test_many_requests_share_a_connection(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext
    ) -> None:
        ports: set[int] = set()

        async def get() -> None:
            response = await client.get(f"{hypercorn.url}/echo")
            ports.add(response.extensions["network_stream"].get_extra_info("client_addr")[1])

        limits = front.module.Limits(max_connections=1)
        async with front.client(verify=client_ssl, limits=limits) as client, anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(get)
        assert len(ports) == 1


class TestTls:
    async def test_servers_are_verified_unless_told_otherwise(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext
    ) -> None:
        url = f"{hypercorn.url}/echo"
        for verify, works in ((True, False), (False, True), (client_ssl, True)):
            async with front.client(verify=verify) as client:
                if works:
                    assert (await client.get(url)).status_code == 200
                else:
                    with pytest.raises(front.module.ConnectError):
                        await client.get(url)

    async def test_names_are_checked(self, front: Front, ca: trustme.CA, client_ssl: ssl.SSLContext) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2"])
        ca.issue_cert("other.example").configure_cert(context)
        async with RawServer.listen(context) as server, front.client(verify=client_ssl) as client:
            server.serve(answering())
            with pytest.raises(front.module.ConnectError):
                await client.get(server.url)

    async def test_a_path(self, front: Front, hypercorn: Server, ca_path: Path) -> None:
        with pytest.warns(DeprecationWarning, match="verify=<str>"):
            client = front.make(verify=str(ca_path))
        assert (await client.get(f"{hypercorn.url}/echo")).status_code == 200
        await client.close()

    @pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
    async def test_the_environment(
        self,
        front: Front,
        hypercorn: Server,
        ca_path: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        variable: str,
    ) -> None:
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        if variable == "SSL_CERT_DIR":
            _link(ca_path, tmp_path)
        monkeypatch.setenv(variable, str(ca_path if variable == "SSL_CERT_FILE" else tmp_path))
        url = f"{hypercorn.url}/echo"
        async with front.client(verify=True, trust_env=True) as client:
            assert (await client.get(url)).status_code == 200
        async with front.client(verify=True, trust_env=False) as client:
            with pytest.raises(front.module.ConnectError):
                await client.get(url)

    @pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
    @pytest.mark.parametrize("how", ["context", "cert"])
    async def test_client_certificates(
        self, front: Front, ca: trustme.CA, client_ssl: ssl.SSLContext, tmp_path: Path, version: str, how: str
    ) -> None:
        path = tmp_path / "client.pem"
        ca.issue_cert("client.example").private_key_and_cert_chain_pem.write_to_path(path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["h2"])
        ca.configure_trust(context)
        ca.issue_cert("127.0.0.1").configure_cert(context)
        if how == "context":
            client_ssl.load_cert_chain(path)
            client = front.make(verify=client_ssl)
        else:
            with pytest.warns(DeprecationWarning, match="cert="):
                client = front.make(verify=client_ssl, cert=str(path))
        async with RawServer.listen(context) as server:
            server.serve(answering())
            response = await client.get(server.url)
            tls = response.extensions["network_stream"].get_extra_info("ssl_object")
            assert tls.version() == version.replace("_", ".")
            await client.close()

    async def test_truststore(self, front: Front, hypercorn: Server, ca_path: Path) -> None:
        context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        url = f"{hypercorn.url}/echo"
        async with front.client(verify=context) as client:
            with pytest.raises(front.module.ConnectError):
                await client.get(url)
        context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(ca_path)
        async with front.client(verify=context) as client:
            assert (await client.get(url)).http_version == "HTTP/2"

    async def test_the_context_is_the_users_but_for_alpn(self, front: Front, hypercorn: Server, ca_path: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(ca_path)
        before = _facts(context)
        async with front.client(verify=context) as client:
            await client.get(f"{hypercorn.url}/echo")
        assert _facts(context) == before

    async def test_keys_are_logged_where_the_context_says_so(
        self, front: Front, hypercorn: Server, ca_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
        async with front.client(verify=ssl.create_default_context(cafile=ca_path)) as client:
            await client.get(f"{hypercorn.url}/echo")
        assert "TRAFFIC_SECRET_0" in (tmp_path / "keys").read_text()


def _facts(context: ssl.SSLContext) -> list[Any]:
    return [
        context.verify_mode,
        context.check_hostname,
        context.verify_flags,
        context.options,
        context.minimum_version,
        context.maximum_version,
        context.post_handshake_auth,
        context.keylog_filename,
        context.cert_store_stats(),
        [cipher["name"] for cipher in context.get_ciphers()],
    ]


def _link(authority: Path, directory: Path) -> None:
    """Put an authority where OpenSSL finds it in a directory."""
    pem = authority.read_bytes()
    (directory / f"{subject_hash(x509.load_pem_x509_certificate(pem))}.0").write_bytes(pem)
