"""TLS on reconnecting: sessions that are gone on with, and those that must not be. And what a shared context offers."""

from __future__ import annotations

import contextlib
import ssl
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import h2keep
from h2keep.runner.dial import DialOptions, Origin, dial
from h2keep.runner.tls import Sessions, TLSLayer, create_ssl_context
from support.raw import Peer, RawServer, answering

if TYPE_CHECKING:
    from pathlib import Path

    import trustme

    from support.servers import Server

LIVE = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

#: Each request closes the connection behind it.
ONE_EACH = h2keep.Limits(max_keepalive_connections=0)


@pytest.fixture(params=["TLSv1_2", "TLSv1_3"])
def version(request: pytest.FixtureRequest) -> ssl.TLSVersion:
    return ssl.TLSVersion[request.param]


def server_context(ca: trustme.CA, version: ssl.TLSVersion, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    ca.issue_cert(*(names or ("127.0.0.1", "localhost", "other.example"))).configure_cert(context)
    return context


async def connect(client: h2keep.AsyncClient, url: str, **extensions: str) -> ssl.SSLObject:
    """The TLS of the connection that served a request."""
    async with client.stream("GET", url, extensions=extensions) as response:
        tls = response._source.connection.transport.security.ssl_object
        assert tls is not None
        await response.aread()
    return tls


async def reused(client: h2keep.AsyncClient, url: str, times: int = 1, **extensions: str) -> list[bool | None]:
    """Whether each of so many connections, one after the other, went on with a session."""
    return [(await connect(client, url, **extensions)).session_reused for _ in range(times)]


class TestGoingOn:
    pytestmark = LIVE

    async def test_every_connection_but_the_first_goes_on(
        self, ca: trustme.CA, client_ssl: ssl.SSLContext, version: ssl.TLSVersion
    ) -> None:
        async with RawServer.listen(server_context(ca, version)) as server:
            server.serve(answering())
            async with h2keep.AsyncClient(verify=client_ssl, limits=ONE_EACH) as client:
                connections = [await connect(client, server.url) for _ in range(4)]
            assert len(server.peers) == 4
        assert [tls.session_reused for tls in connections] == [False, True, True, True]
        assert {tls.version() for tls in connections} == {version.name.replace("_", ".")}

    async def test_real_servers(self, real_server: Server, client_ssl: ssl.SSLContext) -> None:
        async with h2keep.AsyncClient(verify=client_ssl, limits=ONE_EACH) as client:
            # Some, granian's rustls among them, give nothing for later to who comes with a session.
            assert (await reused(client, f"{real_server.url}/echo", 3))[:2] == [False, True]

    async def test_after_a_connection_that_was_lost(
        self, ca: trustme.CA, client_ssl: ssl.SSLContext, version: ssl.TLSVersion
    ) -> None:
        async def vanish(peer: Peer) -> None:
            request = await peer.request()
            await peer.respond(request.stream_id, end_stream=False)
            await anyio.sleep(0.05)
            peer.abort()

        async with RawServer.listen(server_context(ca, version)) as server:
            server.serve(vanish)
            async with h2keep.AsyncClient(verify=client_ssl) as client:
                with pytest.raises(h2keep.ConnectionLost):
                    await client.get(server.url)
                async with client.stream("GET", server.url) as response:
                    tls = response._source.connection.transport.security.ssl_object
                    assert tls is not None
                    assert tls.session_reused

    async def test_a_server_that_knows_the_session_no_more(
        self, ca: trustme.CA, client_ssl: ssl.SSLContext, version: ssl.TLSVersion
    ) -> None:
        async with RawServer.listen(server_context(ca, version)) as server:
            server.serve(answering())
            async with h2keep.AsyncClient(verify=client_ssl, limits=ONE_EACH) as client:
                assert await reused(client, server.url, 2) == [False, True]
                # The keys of its tickets go with it.
                server._context = server_context(ca, version)
                assert await reused(client, server.url, 2) == [False, True]

    async def test_threads(self, granian: Server, ca_path: Path) -> None:
        with h2keep.Client(verify=str(ca_path), limits=ONE_EACH) as client:
            seen = []
            for _ in range(2):
                with client.stream("GET", f"{granian.url}/echo") as response:
                    tls: Any = response._source.connection.transport.security.ssl_object
                    response.read()
                    seen.append(tls.session_reused)
        assert seen == [False, True]


class TestWhatKeepsThemApart:
    pytestmark = LIVE

    async def test_another_name_is_verified_anew(
        self, ca: trustme.CA, client_ssl: ssl.SSLContext, version: ssl.TLSVersion
    ) -> None:
        async with RawServer.listen(server_context(ca, version)) as server:
            server.serve(answering())
            async with h2keep.AsyncClient(verify=client_ssl, limits=ONE_EACH) as client:
                assert await reused(client, server.url, 2) == [False, True]
                assert await reused(client, server.url, 1, sni_hostname="other.example") == [False]
                with pytest.raises(h2keep.ConnectError, match="certificate"):
                    await reused(client, server.url, 1, sni_hostname="third.example")
                assert await reused(client, server.url.replace("127.0.0.1", "localhost")) == [False]

    async def test_another_context_knows_nothing_of_it(
        self, ca: trustme.CA, client_ssl: ssl.SSLContext, ca_path: Path, version: ssl.TLSVersion
    ) -> None:
        async with RawServer.listen(server_context(ca, version)) as server:
            server.serve(answering())
            for context in (client_ssl, ssl.create_default_context(cafile=ca_path)):
                async with h2keep.AsyncClient(verify=context, limits=ONE_EACH) as client:
                    assert await reused(client, server.url, 2) == [False, True]

    async def test_what_was_not_verified_does_not_outlive_a_change_of_mind(
        self, ca: trustme.CA, version: ssl.TLSVersion
    ) -> None:
        context = create_ssl_context(verify=False, cert=None, trust_env=False)
        async with RawServer.listen(server_context(ca, version)) as server:
            server.serve(answering())
            async with h2keep.AsyncClient(verify=context, limits=ONE_EACH) as client:
                assert await reused(client, server.url, 2) == [False, True]
                context.verify_mode = ssl.CERT_REQUIRED
                with pytest.raises(h2keep.ConnectError, match="certificate"):
                    await reused(client, server.url)

    async def test_contexts_that_verify_by_themselves_always_verify(
        self, ca: trustme.CA, ca_path: Path, version: ssl.TLSVersion
    ) -> None:
        class Verifying(ssl.SSLObject):
            """As truststore's."""

        context = ssl.create_default_context(cafile=ca_path)
        context.sslobject_class = Verifying
        async with RawServer.listen(server_context(ca, version)) as server:
            server.serve(answering())
            async with h2keep.AsyncClient(verify=context, limits=ONE_EACH) as client:
                assert await reused(client, server.url, 2) == [False, False]

    async def test_a_server_without_http2_leaves_none(
        self, ca: trustme.CA, client_ssl: ssl.SSLContext, version: ssl.TLSVersion
    ) -> None:
        context = server_context(ca, version)
        context.set_alpn_protocols(["http/1.1"])
        options = DialOptions(client_ssl)
        async with RawServer.listen(context) as server:
            server.serve(answering())
            with pytest.raises(h2keep.HTTP2NotSupported):
                await dial(Origin("https", "127.0.0.1", server.port), options)
        assert not options.sessions._sessions


def test_the_memory_is_bounded_and_a_session_is_used_once(ca: trustme.CA, client_ssl: ssl.SSLContext) -> None:
    made = session(ca, client_ssl)
    sessions = Sessions()
    for number in range(1000):
        sessions.put(number, made)
    assert len(sessions._sessions) == Sessions._MOST
    assert sessions.take(999) is made
    assert sessions.take(999) is None
    assert sessions.take(0) is None


def test_k14_a_server_without_tickets_is_not_asked_for_ever(ca: trustme.CA, client_ssl: ssl.SSLContext) -> None:
    context = server_context(ca, ssl.TLSVersion.TLSv1_3)
    context.num_tickets = 0
    found: list[ssl.SSLSession] = []
    layer, server, outgoing = pair(client_ssl, context, found)
    for _ in range(20):
        server.write(b"x")
        layer.receive(outgoing.read())
    assert not found
    assert layer._looks == 0


class TestOffers:
    """Others may set ALPN in a context that is shared, as httpcore does whenever it connects."""

    def test_what_others_set_in_between_is_set_right(self, ca_path: Path) -> None:
        class Shared(ssl.SSLContext):
            meddling = 3

            def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
                if self.meddling:
                    self.meddling -= 1
                    self.set_alpn_protocols(["http/1.1"])
                return super().wrap_bio(*args, **kwargs)

        context = Shared(ssl.PROTOCOL_TLS_CLIENT)
        hello, done = TLSLayer(context, "localhost", alpn=("h2", "http/1.1")).handshake(None)
        assert b"\x00\x0c\x02h2\x08http/1.1" in hello
        assert not done
        assert context.meddling == 0

    def test_a_context_that_will_not_be_told(self) -> None:
        class Stubborn(ssl.SSLContext):
            def set_alpn_protocols(self, alpn_protocols: Any) -> None:
                del alpn_protocols

        hello, _ = TLSLayer(Stubborn(ssl.PROTOCOL_TLS_CLIENT), "localhost", alpn=("h2",)).handshake(None)
        assert hello
        # The extension's number, and not just the name: a key share may contain that by chance.
        assert b"\x00\x10\x00\x05\x00\x03\x02h2" not in hello

    def test_a_context_that_cannot_begin(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        with pytest.warns(DeprecationWarning, match="OP_NO_TLS"):
            context.options |= ssl.OP_NO_TLSv1_3
        with pytest.raises(ssl.SSLError):
            TLSLayer(context, "localhost", alpn=("h2",)).handshake(None)


class TestKeyLog:
    @pytest.mark.anyio
    @pytest.mark.usefixtures("leak_check")
    @pytest.mark.parametrize("verify", [True, False, "path"])
    async def test_our_contexts_write_it(
        self, ca: trustme.CA, ca_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: Any
    ) -> None:
        monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
        monkeypatch.setenv("SSL_CERT_FILE", str(ca_path))
        async with RawServer.listen(server_context(ca, ssl.TLSVersion.TLSv1_3)) as server:
            server.serve(answering())
            async with h2keep.AsyncClient(verify=str(ca_path) if verify == "path" else verify) as client:
                await client.get(server.url)
        assert "CLIENT_TRAFFIC_SECRET_0" in (tmp_path / "keys").read_text()

    def test_not_if_python_ignores_the_environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))

        class Flags:
            ignore_environment = True

        monkeypatch.setattr(sys, "flags", Flags)
        assert create_ssl_context(verify=False, cert=None, trust_env=True).keylog_filename is None


# In memory


def pair(
    client: ssl.SSLContext, server: ssl.SSLContext, found: list[ssl.SSLSession]
) -> tuple[TLSLayer, ssl.SSLObject, ssl.MemoryBIO]:
    """Both sides of a connection whose handshake is done, and what the server writes."""
    layer = TLSLayer(client, "localhost", alpn=("h2",), on_session=found.append)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = server.wrap_bio(incoming, outgoing, server_side=True)
    received: bytes | None = None
    done = False
    while not done:
        data, done = layer.handshake(received)
        incoming.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        received = outgoing.read()
    layer.receive(received or b"")
    return layer, tls, outgoing


def session(ca: trustme.CA, client: ssl.SSLContext) -> ssl.SSLSession:
    """One that can be gone on with."""
    found: list[ssl.SSLSession] = []
    pair(client, server_context(ca, ssl.TLSVersion.TLSv1_3), found)
    return found[0]
