"""`install`: stock transports made afterwards are kept alive, and in all else do what their authors asked for."""

from __future__ import annotations

import functools
import importlib
import logging
import socket
import ssl
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import anthropic
import anyio
import anyio.to_thread
import httpx
import httpx2
import openai
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep import Keepalive, _fallback
from h2keep.cli.gateway import ANSWER
from h2keep.cli.middlebox import FlowForgotten
from install.conftest import Front
from support.clock import virtual_time
from support.http1 import Http1Server, server_context
from support.raw import Peer, RawServer, answering
from support.servers import Server, forgetful

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path
    from types import ModuleType

    import trustme

pytestmark = pytest.mark.anyio

TCP = socket.IPPROTO_TCP
#: So short that tests can wait for it, so long that a busy machine keeps to it.
QUICK = Keepalive(read_idle_timeout=0.2, ping_timeout=5.0, jitter=0.0)
#: What `install` replaces.
CLASSES = [getattr(library, name) for library in (httpx, httpx2) for name in ("HTTPTransport", "AsyncHTTPTransport")]


def seams() -> list[Any]:
    return [vars(transport)["__init__"] for transport in CLASSES]


def is_ours(response: Any) -> bool:
    """Whether h2keep brought the response."""
    found = response.extensions.get("h2keep")
    ours = found is not None and found.pings_possible
    assert (response.http_version == "HTTP/2") == ours
    return ours


@pytest.fixture
def http1_ssl(cert_path: Path, key_path: Path) -> ssl.SSLContext:
    """A server's context that speaks HTTP/1.1 only."""
    return server_context(cert_path, key_path, "http/1.1")


@pytest.mark.usefixtures("leak_check")
class TestWho:
    """Which transports are h2keep's."""

    async def test_those_made_while_installed(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext
    ) -> None:
        before = front.make(verify=client_ssl)
        h2keep.install()
        during = front.make(verify=client_ssl)
        h2keep.uninstall()
        after = front.make(verify=client_ssl)
        for client, ours in ((before, False), (during, True), (after, False)):
            response = await client.get(f"{hypercorn.url}/echo")
            assert is_ours(response) == ours
            assert response.json()["http_version"] == ("2" if ours else "1.1")
            await client.close()

    @pytest.mark.parametrize("library", [httpx, httpx2])
    async def test_those_of_the_functions(self, library: ModuleType, hypercorn: Server, ca_path: Path) -> None:
        h2keep.install()
        context = ssl.create_default_context(cafile=ca_path)
        get = functools.partial(library.get, f"{hypercorn.url}/echo", verify=context, trust_env=False)
        assert is_ours(await anyio.to_thread.run_sync(get))

    async def test_mounts_and_those_that_are_handed_to_clients(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext
    ) -> None:
        stock = front.transport(verify=client_ssl)
        h2keep.install()
        ours = front.transport(verify=client_ssl)
        async with front.client(transport=stock, mounts={"all://127.0.0.1": ours}) as client:
            assert is_ours(await client.get(f"{hypercorn.url}/echo"))
            local = hypercorn.url.replace("127.0.0.1", "localhost")
            assert not is_ours(await client.get(f"{local}/echo"))

    async def test_subclasses(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        seen = []

        def handle(self: Any, request: Any) -> Any:
            seen.append(request.url.path)
            return getattr(front.transport, front.method)(self, request)

        def __init__(self: Any, label: str, **options: Any) -> None:  # noqa: N807
            front.transport.__init__(self, **options)
            self.label = label

        subclass: Any = type("Subclass", (front.transport,), {front.method: handle, "__init__": __init__})
        h2keep.install()
        transport = subclass("mine", verify=client_ssl)
        async with front.client(transport=transport) as client:
            assert is_ours(await client.get(f"{hypercorn.url}/echo"))
        assert seen == ["/echo"]
        assert transport.label == "mine"

    @pytest.mark.parametrize("order", ["before", "after"])
    async def test_others_may_wrap_the_transports_methods(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext, order: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As OpenTelemetry's instrumentation does.
        seen = []
        wrapped = getattr(front.transport, front.method)

        @functools.wraps(wrapped)
        def handle(self: Any, request: Any) -> Any:
            seen.append(request.url.path)
            return wrapped(self, request)

        if order == "after":
            h2keep.install()
        monkeypatch.setattr(front.transport, front.method, handle)
        if order == "before":
            h2keep.install()
        async with front.client(verify=client_ssl) as client:
            assert is_ours(await client.get(f"{hypercorn.url}/echo"))
        assert seen == ["/echo"]

    async def test_those_with_a_proxy(self, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
        h2keep.install()
        ours = "<h2keep in the place of "
        proxied = front.core.HTTPProxy if front.threaded else front.core.AsyncHTTPProxy
        async with front.client(proxy="http://127.0.0.1:9/") as client:
            pool = client.real._transport_for_url(front.module.URL("https://a.example"))._pool
            assert repr(pool).startswith(ours)
            assert type(pool._stock) is proxied
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9/")
        async with front.client(trust_env=True) as client:
            pool = client.real._transport_for_url(front.module.URL("https://a.example"))._pool
            assert repr(pool).startswith(ours)
            assert type(pool._stock) is proxied
            assert repr(client.real._transport._pool).startswith(ours)

    async def test_what_h2keep_cannot_do_stays_as_it_is(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext, caplog: pytest.LogCaptureFixture
    ) -> None:
        h2keep.install()
        limits = front.module.Limits(keepalive_expiry=-1.0)
        async with front.client(verify=client_ssl, limits=limits) as client:
            assert not is_ours(await client.get(f"{hypercorn.url}/echo"))
        assert f"a transport of {front.name} is left as it is, without PINGs: limits: keepalive_expiry" in caplog.text


@pytest.mark.usefixtures("leak_check")
class TestSdks:
    """Clients that are told nothing but where the server is."""

    @pytest.mark.usefixtures("trusted")
    @pytest.mark.parametrize("threaded", [False, True])
    async def test_openai(self, hypercorn: Server, threaded: bool) -> None:
        h2keep.install()
        made = openai.OpenAI if threaded else openai.AsyncOpenAI
        client: Any = made(base_url=f"{hypercorn.url}/v1", api_key="secret")
        create = client.chat.completions.with_raw_response.create
        messages = [{"role": "user", "content": "?"}]
        if threaded:
            raw = await anyio.to_thread.run_sync(lambda: create(model="m", messages=messages))
            await anyio.to_thread.run_sync(client.close)
        else:
            raw = await create(model="m", messages=messages)
            await client.close()
        assert raw.parse().choices[0].message.content == ANSWER
        assert is_ours(raw.http_response)

    @pytest.mark.usefixtures("trusted")
    @pytest.mark.parametrize("threaded", [False, True])
    async def test_anthropic(self, hypercorn: Server, threaded: bool) -> None:
        h2keep.install()
        made = anthropic.Anthropic if threaded else anthropic.AsyncAnthropic
        client: Any = made(base_url=hypercorn.url, api_key="secret")
        options: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "?"}]}
        create = client.messages.with_raw_response.create
        if threaded:
            raw = await anyio.to_thread.run_sync(lambda: create(**options))
            message = raw.parse()
            await anyio.to_thread.run_sync(client.close)
        else:
            raw = await create(**options)
            message = await raw.parse()
            await client.close()
        assert message.content[0].text == ANSWER
        assert is_ours(raw.http_response)


@pytest.mark.usefixtures("leak_check")
class TestKeepalive:
    async def test_k3_a_silent_answer_survives_where_it_is_installed(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext
    ) -> None:
        h2keep.install(QUICK)
        with forgetful(hypercorn.url, 0.8) as box:
            async with front.client(verify=client_ssl) as client:
                response = await client.get(f"{box.url}/slow?seconds=1.5")
            assert response.json() == {"slow": True}
            assert response.extensions["h2keep"].pings_acked >= 3
            assert not box.seen(FlowForgotten)

    @pytest.mark.parametrize("name", ["httpx", "httpx2"])
    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_a_silent_answer_is_lost_where_it_is_not(
        self, name: str, hypercorn: Server, client_ssl: ssl.SSLContext
    ) -> None:
        front = Front(name, threaded=True)
        with forgetful(hypercorn.url, 0.8) as box:
            async with front.client(verify=client_ssl, http2=True, timeout=2.5) as client:
                with pytest.raises(front.module.ReadTimeout):
                    await client.get(f"{box.url}/slow?seconds=1.5")
            assert box.seen(FlowForgotten)

    async def test_k8_a_dead_connection_is_given_up(self, front: Front, hypercorn: Server, ca_path: Path) -> None:
        h2keep.install(Keepalive(read_idle_timeout=0.2, ping_timeout=0.3, jitter=0.0))
        with forgetful(hypercorn.url, 60.0) as box:
            async with front.client(verify=ssl.create_default_context(cafile=ca_path), timeout=None) as client:
                await client.get(f"{box.url}/echo")
                box.vanish()
                with pytest.raises(h2keep.PingTimeout) as caught:
                    await client.get(f"{box.url}/echo")
        error: Any = caught.value
        assert isinstance(error, front.module.ReadError)
        assert error.request.url.path == "/echo"
        # The same class as that of the transports that are ours by name.
        library = importlib.import_module(f"h2keep.{front.name}").library
        assert type(error) is type(library.translate(h2keep.PingTimeout("")))

    async def test_installing_again_changes_the_policy(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext
    ) -> None:
        h2keep.install()
        h2keep.install(QUICK)
        async with front.client(verify=client_ssl) as client:
            response = await client.get(f"{hypercorn.url}/slow?seconds=1.5")
        assert response.extensions["h2keep"].pings_sent >= 1

    @virtual_time
    @pytest.mark.parametrize("name", ["httpx", "httpx2"])
    async def test_k3_the_default_policy_is_h2keeps(self, name: str) -> None:
        h2keep.install()
        async with RawServer.listen() as server, Front(name, threaded=False).client(http1=False, http2=True) as client:
            server.serve(answering(delay=50.0))
            await client.get(server.url, timeout=60.0)
            (ping,) = server.peers[0].pings
        assert 27.0 <= ping.at <= 31.0


@pytest.mark.usefixtures("leak_check")
class TestSettings:
    """What the clients' authors asked for holds."""

    async def test_verify(self, front: Front, hypercorn: Server) -> None:
        h2keep.install()
        async with front.client() as client:
            with pytest.raises(h2keep.ConnectError, match="certificate verify failed") as caught:
                await client.get(f"{hypercorn.url}/echo")
            assert isinstance(caught.value, front.module.ConnectError)
        async with front.client(verify=False) as client:
            assert is_ours(await client.get(f"{hypercorn.url}/echo"))

    async def test_a_client_certificate(
        self, front: Front, ca: trustme.CA, client_ssl: ssl.SSLContext, server_ssl: ssl.SSLContext, tmp_path: Path
    ) -> None:
        context = server_context_of(ca, client_certificate=True)
        ca.issue_cert("client.example").private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
        h2keep.install()
        with pytest.warns(DeprecationWarning, match="cert"):
            client = front.make(verify=client_ssl, cert=str(tmp_path / "client.pem"))
        async with RawServer.listen(context) as server:
            server.serve(answering())
            assert is_ours(await client.get(server.url))
            await client.close()

    @virtual_time
    @pytest.mark.parametrize("name", ["httpx", "httpx2"])
    async def test_limits_that_are_given_hold_else_connections_are_kept_for_long(self, name: str) -> None:
        h2keep.install()
        front = Front(name, threaded=False)
        for limits, connections in ((None, 1), (front.module.Limits(), 2)):
            given = {} if limits is None else {"limits": limits}
            async with RawServer.listen() as server, front.client(http1=False, http2=True, **given) as client:
                server.serve(answering())
                await client.get(server.url)
                await anyio.sleep(29.0)
                await client.get(server.url)
                assert len(server.peers) == connections

    async def test_proxies_of_the_environment_are_the_clients_own_affair(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9/")
        h2keep.install()
        transport = front.transport(verify=client_ssl, trust_env=True)
        async with front.client(transport=transport, trust_env=True) as client:
            assert is_ours(await client.get(f"{hypercorn.url}/echo"))

    async def test_uds_and_retries(self, front: Front) -> None:
        h2keep.install()
        with tempfile.TemporaryDirectory(prefix="h2keep-") as directory:
            path = f"{directory}/socket"
            options: dict[str, Any] = {"uds": path, "http1": False, "http2": True}
            async with front.client(transport=front.transport(**options)) as client:
                with pytest.raises(h2keep.ConnectError, match="No such file"):
                    await client.get("http://function.example/")
            answered = anyio.Event()

            async def ask(client: Any) -> None:
                body = front.body(b"b" * 9)
                assert is_ours(await client.request("POST", "http://function.example/", content=body))
                answered.set()

            async with (
                front.client(transport=front.transport(retries=4, **options)) as client,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(ask, client)
                # The first retry is at once, the second after half a second.
                await anyio.sleep(0.2)
                async with RawServer.listen(uds=path) as server:
                    server.serve(answering())
                    await answered.wait()
                    assert bytes(server.peers[0].requests[1].body) == b"b" * 9

    async def test_closing_ends_everything(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        h2keep.install()
        client = front.make(verify=client_ssl)
        await client.get(f"{hypercorn.url}/echo")
        await client.get(f"{hypercorn.h2c_url}/echo")
        pool = client.real._transport._pool
        assert len(pool.connections) == 1
        await client.close()
        await client.close()
        # What was left open beside it, `leak_check` sees.
        assert pool.connections == []


@pytest.mark.usefixtures("leak_check")
class TestWithoutHttp2:
    """What can't be HTTP/2 goes the way that it always went."""

    async def test_plain_http(self, front: Front, hypercorn: Server) -> None:
        h2keep.install()
        async with front.client() as client:
            response = await client.request("POST", f"{hypercorn.h2c_url}/echo", content=front.body(b"a", b"b"))
        assert response.json()["http_version"] == "1.1"
        assert response.json()["body"] == "ab"
        assert not is_ours(response)

    async def test_k18_it_has_tcp_keepalive(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        h2keep.install(Keepalive(40.0, 21.0))
        transport = front.transport(verify=client_ssl, socket_options=iter([(TCP, socket.TCP_KEEPCNT, 9)]))
        async with front.client(transport=transport) as client:
            found = []
            for url in (hypercorn.h2c_url, hypercorn.url):
                response = await client.get(f"{url}/echo")
                sock = response.extensions["network_stream"].get_extra_info("socket")
                options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                on = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
                found.append((is_ours(response), on, [sock.getsockopt(TCP, option) for option in options]))
        assert found[0] == (False, True, [40, 7, 9])
        # PINGs are all that HTTP/2 needs; what the author has asked for it has too.
        assert found[1][:2] == (True, False)
        assert found[1][2][2] == 9

    async def test_an_origin_that_speaks_http1_only_is_remembered(
        self,
        front: Front,
        client_ssl: ssl.SSLContext,
        http1_ssl: ssl.SSLContext,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        now = 1000.0
        monkeypatch.setattr(_fallback, "http1_origins", _fallback.Http1Origins(lambda: now))
        h2keep.install()
        async with Http1Server.listen(http1_ssl) as server, front.client(verify=client_ssl) as client:
            for seconds, connections in ((0.0, 2), (599.0, 2), (2.0, 3), (1.0, 3)):
                now += seconds
                response = await client.get(f"{server.url}/x")
                assert response.json()["first"] == "GET /x HTTP/1.1"
                assert not is_ours(response)
                # One that found out, and the one that serves them all.
                assert server.connections == connections
            assert [peer.alpn for peer in server.raw.peers] == ["http/1.1"] * 3
        (told,) = [record for record in caplog.records if record.name == "h2keep" and record.levelno >= logging.WARNING]
        assert told.getMessage().startswith(f"{server.url} does not speak HTTP/2: ")
        assert "without PINGs" in told.getMessage()

    async def test_other_clients_know_it_too(
        self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext
    ) -> None:
        h2keep.install()
        async with Http1Server.listen(http1_ssl) as server:
            for connections in (2, 3):
                async with front.client(verify=client_ssl) as client:
                    await client.get(server.url)
                    assert server.connections == connections

    async def test_a_body_that_can_be_had_but_once_arrives_whole(
        self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext
    ) -> None:
        h2keep.install()
        chunks = [bytes([number % 256]) * 1000 for number in range(500)]
        async with Http1Server.listen(http1_ssl) as server, front.client(verify=client_ssl) as client:
            await client.request("PUT", server.url, content=front.body(*chunks))
            files = {"sound": ("sound.wav", b"RIFF" * 50_000)}
            if front.threaded:
                await client.request("POST", server.url, files=files)
            ((_, _, body), *more) = server.requests
        assert body == b"".join(chunks)
        assert [len(rest) > 200_000 for _, _, rest in more] == [True] * front.threaded

    async def test_nothing_is_pulled_of_a_body_whose_request_goes_nowhere(self, front: Front) -> None:
        pulled = []

        async def a_body() -> AsyncIterator[bytes]:
            pulled.append(True)
            yield b""

        def body() -> Iterator[bytes]:
            pulled.append(True)
            yield b""

        h2keep.install()
        async with front.client() as client:
            with pytest.raises(h2keep.ConnectError):
                await client.request("PUT", "https://127.0.0.1:9/", content=body() if front.threaded else a_body())
        assert pulled == []

    async def test_http2_alone_is_refused(
        self, front: Front, client_ssl: ssl.SSLContext, http1_ssl: ssl.SSLContext
    ) -> None:
        h2keep.install()
        async with (
            Http1Server.listen(http1_ssl) as server,
            front.client(verify=client_ssl, http1=False, http2=True) as client,
        ):
            with pytest.raises(h2keep.HTTP2NotSupported) as caught:
                await client.get(server.url)
            assert server.requests == []
        assert isinstance(caught.value, front.module.ConnectError)
        assert caught.value.unprocessed
        assert caught.value.alpn is None

    async def test_prior_knowledge_is_ours(self, front: Front, granian: Server) -> None:
        h2keep.install()
        async with front.client(http1=False, http2=True) as client:
            assert is_ours(await client.get(f"{granian.h2c_url}/echo"))

    async def test_upgrades_are_http1s(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        h2keep.install()
        async with front.client(verify=client_ssl) as client:
            headers = {"Connection": "Upgrade", "Upgrade": "x-nothing"}
            assert not is_ours(await client.get(f"{hypercorn.url}/echo", headers=headers))
            assert is_ours(await client.get(f"{hypercorn.url}/echo"))

    async def test_a_server_that_asks_for_http1(
        self, front: Front, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
    ) -> None:
        context = server_context(cert_path, key_path, "h2", "http/1.1")
        h2keep.install()
        async with RawServer.listen(context) as raw, front.client(verify=client_ssl) as client:
            http1 = Http1Server(raw)

            async def serve(peer: Peer) -> None:
                await peer.tls_handshake()
                if peer.alpn == "h2":
                    await peer.handshake()
                    while True:
                        request = await peer.request()
                        # Until it has been begun, any body can be sent in another way.
                        await request.complete()
                        await peer.send(frames.RstStreamFrame(request.stream_id, 0xD))
                await http1.serve(peer)

            async def accept() -> None:
                while True:
                    tasks.start_soon(swallow_gone, serve, await raw.accept())

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(accept)
                with pytest.raises(h2keep.StreamReset):
                    await client.request("POST", raw.url, content=front.body(b"cannot be sent again"))
                response = await client.request("POST", raw.url, content=b"can be sent again")
                assert response.json()["body"] == "can be sent again"
                assert [peer.alpn for peer in raw.peers] == ["h2", "http/1.1"]
                await client.close()
                tasks.cancel_scope.cancel()


class TestInstalling:
    def test_uninstalling_restores_what_was_there(self) -> None:
        before = seams()
        h2keep.install()
        h2keep.install(QUICK)
        assert not any(new is old for new, old in zip(seams(), before, strict=True))
        assert [seam.__wrapped__ for seam in seams()] == before
        h2keep.uninstall()
        assert seams() == before
        h2keep.uninstall()
        assert seams() == before

    async def test_where_somebody_has_wrapped_ours_it_does_nothing_any_more(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = seams()
        h2keep.install()
        ours = front.transport.__init__
        made = []

        @functools.wraps(ours)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            made.append(self)
            ours(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(front.transport, "__init__", __init__)
            for installed in (False, True):
                (h2keep.install if installed else h2keep.uninstall)()
                async with front.client(verify=client_ssl) as client:
                    assert is_ours(await client.get(f"{hypercorn.url}/echo")) == installed
        assert len(made) == 2
        h2keep.uninstall()
        assert seams() == before

    @pytest.mark.parametrize("transport", CLASSES, ids=lambda kind: f"{kind.__module__.split('.')[0]}.{kind.__name__}")
    def test_another_signature_is_refused(self, transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def __init__(self: Any, verify: bool = True, magic: bool = False) -> None:  # noqa: N807
            raise NotImplementedError

        monkeypatch.setattr(transport, "__init__", __init__)
        before = seams()
        library = sys.modules[transport.__module__.split(".")[0]]
        text = (
            rf"h2keep can't be installed into {library.__name__} {library.__version__}: .*{transport.__name__}.*magic"
        )
        with pytest.raises(RuntimeError, match=text):
            h2keep.install()
        assert seams() == before

    @pytest.mark.parametrize("method", ["handle_request", "close"])
    def test_a_method_that_uses_something_else_is_refused(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(httpx2.HTTPTransport, method, lambda self: self._conns)
        before = seams()
        with pytest.raises(RuntimeError, match=rf"httpx2 {httpx2.__version__}: HTTPTransport\.{method} .*self\._pool"):
            h2keep.install()
        assert seams() == before

    def test_a_missing_class_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(httpx, "AsyncHTTPTransport")
        with pytest.raises(RuntimeError, match=rf"httpx {httpx.__version__}: .*AsyncHTTPTransport"):
            h2keep.install()

    def test_without_either_library_there_is_nothing_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("httpx", "httpx2"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match="httpx and httpx2, and neither is installed"):
            h2keep.install()

    @pytest.mark.parametrize("missing", [httpx, httpx2])
    def test_one_of_them_is_enough(self, missing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        before = dict(zip(CLASSES, seams(), strict=True))
        monkeypatch.setitem(sys.modules, missing.__name__, None)
        h2keep.install()
        for transport, original in before.items():
            assert (vars(transport)["__init__"] is original) == (transport.__module__ == missing.__name__)

    def test_a_wrong_policy_is_refused(self) -> None:
        with pytest.raises(TypeError, match="keepalive: 30 is not a Keepalive"):
            h2keep.install(30)  # type: ignore[arg-type]

    def test_wrong_arguments_fail_as_without(self) -> None:
        def fail() -> str:
            with pytest.raises(TypeError) as caught:
                httpx2.HTTPTransport(nonsense=1)  # type: ignore[call-arg]
            return str(caught.value)

        before = fail()
        h2keep.install()
        assert fail() == before

    def test_the_memory_of_origins_is_bounded(self) -> None:
        memory = _fallback.Http1Origins()
        assert all(memory.add(number) for number in range(3000))
        assert not memory.add(2999)
        assert 2999 in memory
        assert 0 not in memory


async def swallow_gone(serve: Any, peer: Peer) -> None:
    try:
        await serve(peer)
    except (anyio.EndOfStream, anyio.ClosedResourceError):
        peer.close()


def server_context_of(ca: trustme.CA, *, client_certificate: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["h2"])
    if client_certificate:
        context.verify_mode = ssl.CERT_REQUIRED
        ca.configure_trust(context)
    return context
