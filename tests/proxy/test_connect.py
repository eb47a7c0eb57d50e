"""HTTP and HTTPS proxies: CONNECT, what they answer, and what becomes of the request."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trustme

import h2keep
from proxy.servers import ESTABLISHED, TinyProxy, proxy_ssl
from support.clock import virtual_time
from support.raw import RawServer, answering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]


def client(proxy: str | h2keep.Proxy, **options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(http1=False, proxy=proxy, **options)


@contextlib.asynccontextmanager
async def origin_and_proxy(ssl: ssl.SSLContext | None = None) -> AsyncIterator[tuple[RawServer, TinyProxy]]:
    async with RawServer.listen(ssl) as server, TinyProxy.listen() as proxy:
        server.serve(answering())
        yield server, proxy


async def refused(url: str, proxy: TinyProxy, **options: Any) -> h2keep.ProxyError:
    async with client(proxy.url, **options) as c:
        with pytest.raises(h2keep.ProxyError) as caught:
            await c.get(url)
    assert caught.value.unprocessed
    assert f"no tunnel to {url}" in str(caught.value)
    assert f"the proxy {proxy.url} " in str(caught.value)
    return caught.value


# Tunnels


async def test_https_goes_through_a_tunnel(server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
    async with origin_and_proxy(server_ssl) as (server, proxy), client(proxy.url, verify=client_ssl) as c:
        response = await c.post(server.url, content=b"question")
        assert response.content == b"ok"
        target = f"127.0.0.1:{server.port}".encode()
        assert proxy.heads == [b"CONNECT %b HTTP/1.1\r\nHost: %b\r\nAccept: */*" % (target, target)]


async def test_http_with_prior_knowledge_goes_through_a_tunnel_too() -> None:
    async with origin_and_proxy() as (server, proxy), client(proxy.url) as c:
        assert (await c.get(server.url)).content == b"ok"
        assert proxy.heads[0].startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\n".encode())


async def test_one_tunnel_is_for_many_requests() -> None:
    async with origin_and_proxy() as (server, proxy), client(proxy.url) as c:
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(c.get, server.url)
        assert len(proxy.tunnels) == 1


async def test_each_origin_has_a_tunnel_of_its_own() -> None:
    async with origin_and_proxy() as (server, proxy), RawServer.listen() as other, client(proxy.url) as c:
        other.serve(answering(b"other"))
        assert (await c.get(server.url)).content == b"ok"
        assert (await c.get(other.url)).content == b"other"
        assert len(proxy.tunnels) == 2


async def test_the_origins_name_is_the_proxys_to_resolve(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with origin_and_proxy(server_ssl) as (server, proxy), client(proxy.url, verify=client_ssl) as c:
        url = f"https://only-the-proxy-knows.example:{server.port}/"
        response = await c.get(url, extensions={"sni_hostname": "localhost"})
        assert response.content == b"ok"
        assert proxy.heads[0].startswith(f"CONNECT only-the-proxy-knows.example:{server.port} HTTP/1.1".encode())


async def test_an_ipv6_address_stands_in_brackets() -> None:
    async with TinyProxy.listen() as proxy, client(proxy.url) as c:
        proxy.answer, proxy.then = b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "close"
        with pytest.raises(h2keep.ProxyError):
            await c.get("http://[::1]:8080/")
        assert proxy.heads[0].startswith(b"CONNECT [::1]:8080 HTTP/1.1\r\nHost: [::1]:8080\r\n")


@pytest.mark.parametrize("in_url", [True, False], ids=["in the URL", "as auth"])
async def test_basic_authentication(in_url: bool) -> None:
    async with origin_and_proxy() as (server, proxy):
        if in_url:
            given: Any = proxy.url.replace("://", "://us%C3%A9r:p%40ss%3Aword@")
        else:
            given = h2keep.Proxy(proxy.url, auth=("usér", "p@ss:word"))
        async with client(given) as c:
            await c.get(server.url)
        credentials = base64.b64encode("usér:p@ss:word".encode())
        assert b"\r\nProxy-Authorization: Basic " + credentials in proxy.heads[0]


async def test_headers_of_ones_own_go_to_the_proxy_and_not_to_the_origin() -> None:
    async with origin_and_proxy() as (server, proxy):
        headers = {"X-Tenant": "blue", "proxy-authorization": "Bearer token", "Accept": "text/plain"}
        async with client(h2keep.Proxy(proxy.url, auth=("user", "unused"), headers=headers)) as c:
            await c.get(server.url, headers={"x-request": "1"})
        lines = proxy.heads[0].split(b"\r\n")[1:]
        assert lines[1:] == [b"X-Tenant: blue", b"proxy-authorization: Bearer token", b"Accept: text/plain"]
        request = server.peers[0].requests[1]
        assert request.headers["x-request"] == "1"
        assert not {"x-tenant", "proxy-authorization"} & set(request.headers)


async def test_an_answer_that_comes_a_byte_at_a_time() -> None:
    async with origin_and_proxy() as (server, proxy), client(proxy.url) as c:
        proxy.slowly = True
        proxy.answer = b"HTTP/1.1 100 Continue\r\nX: 1\r\n\r\n" + ESTABLISHED
        assert (await c.get(server.url)).content == b"ok"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200\r\nVia: 1.1 proxy\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 299 Well\nServer: lenient\n\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
)
async def test_answers_that_open_a_tunnel(answer: bytes) -> None:
    async with origin_and_proxy() as (server, proxy), client(proxy.url) as c:
        proxy.answer = answer
        assert (await c.get(server.url)).content == b"ok"


@pytest.mark.parametrize("through_tls", [False, True], ids=["http proxy", "https proxy"])
async def test_what_follows_the_head_belongs_to_the_tunnel(
    through_tls: bool, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
) -> None:
    context = proxy_ssl(cert_path, key_path) if through_tls else None
    async with RawServer.listen() as server, TinyProxy.listen(context) as proxy:
        server.serve(answering())
        # A server may speak first, and the proxy send its SETTINGS together with the answer.
        proxy.in_one_write = True
        chosen = h2keep.Proxy(proxy.url, ssl_context=client_ssl if through_tls else None)
        async with client(chosen) as c:
            for _ in range(3):
                assert (await c.get(server.url)).content == b"ok"
            assert len(proxy.tunnels) == 1


# Refusals


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        (b"HTTP/1.1 403 Forbidden by policy\r\n\r\n", 403, "answers 403 Forbidden by policy"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\noops", 502, "answers 502 Bad Gateway"),
        (b"HTTP/1.0 503\r\n\r\n", 503, "answers 503"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://login/\r\n\r\n", 302, "answers 302 Found"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 101, "answers 101 Switching Protocols"),
        (b"HTTP/1.1 500 \x1b[31mred\x00\r\n\r\n", 500, "answers 500 [31mred"),
    ],
)
async def test_a_refusal_is_a_proxy_error_with_its_status(answer: bytes, status: int, text: str) -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.answer, proxy.then = answer, "wait"
        error = await refused(server.url, proxy)
        assert error.status == status
        assert str(error).endswith(text)
        assert not server.peers


async def test_407_says_what_the_proxy_wants() -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.then = "wait"
        proxy.answer = b'HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm="x"\r\n\r\n'
        error = await refused(server.url, proxy)
        assert error.status == 407
        assert "answers 407 Proxy Authentication Required; it wants a user name and a password" in str(error)
        proxy.answer = b"HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\nproxy-authenticate: NTLM\r\n\r\n"
        assert "it wants NTLM or Negotiate, of which h2keep knows nothing" in str(await refused(server.url, proxy))


async def test_407_to_a_password_does_not_tell_it() -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.answer, proxy.then = b"HTTP/1.1 407 No\r\n\r\n", "wait"
        with pytest.raises(h2keep.ProxyError, match="it does not accept the user name and the password") as caught:
            async with client(proxy.url.replace("://", "://user:s3cret@")) as c:
                await c.get(server.url)
        assert "s3cret" not in repr(caught.value)
        assert "user:" not in repr(caught.value)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "sent something that is not HTTP/1.1: b'SSH-2.0-OpenSSH_9.2"),
        (b"HTTP/2 200 OK\r\n\r\n", "sent something that is not HTTP/1.1"),
        (b"HTTP/1.1 two hundred\r\n\r\n", "sent something that is not HTTP/1.1"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "does it want https://?"),
        (b"\x00", "sent something that is not HTTP/1.1"),
    ],
)
async def test_garbage_in_the_place_of_an_answer(answer: bytes, text: str) -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.answer, proxy.then = answer, "wait"
        error = await refused(server.url, proxy)
        assert error.status is None
        assert text in str(error)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Endless: " + b"x" * 70_000,
        b"HTTP/1.1 102 Processing\r\nX: 1\r\n\r\n" * 3_000,
    ],
    ids=["long", "endless", "interim"],
)
async def test_a_head_above_64_kib_is_refused(answer: bytes) -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.answer, proxy.then = answer, "wait"
        error = await refused(server.url, proxy)
        assert error.status is None
        assert "more than 64 KiB" in str(error)


async def test_a_head_of_nearly_64_kib_is_taken() -> None:
    async with origin_and_proxy() as (server, proxy), client(proxy.url) as c:
        proxy.answer = b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 65_000 + b"\r\n\r\n"
        assert (await c.get(server.url)).content == b"ok"


@pytest.mark.parametrize(
    ("answer", "then", "text"),
    [
        (b"", "close", "closed the connection without an answer"),
        (b"HTTP/1.1 20", "close", "closed the connection in the middle of its answer"),
        (b"", "abort", "lost the connection: Connection reset by peer"),
    ],
)
async def test_a_proxy_that_leaves_without_an_answer(answer: bytes, then: str, text: str) -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.answer, proxy.then = answer, then
        error = await refused(server.url, proxy)
        assert error.status is None
        assert text in str(error)


@pytest.mark.parametrize("then", ["close", "abort"])
async def test_a_tunnel_dropped_before_anything_came_through(
    then: str, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with origin_and_proxy(server_ssl) as (server, proxy):
        proxy.then = then
        error = await refused(server.url, proxy, verify=client_ssl)
        assert error.status == 200
        assert "opened it, and closed it before anything came through" in str(error)


async def test_a_tunnel_dropped_in_use_is_a_lost_connection(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, TinyProxy.listen() as proxy:
        server.serve(answering(delay=10.0))
        async with client(proxy.url, verify=client_ssl) as c, anyio.create_task_group() as tasks:

            async def get() -> None:
                with pytest.raises(h2keep.ConnectionLost) as caught:
                    await c.get(server.url)
                assert not caught.value.unprocessed

            tasks.start_soon(get)
            peer = await server.peer(0)
            await peer.until(lambda: bool(peer.requests))
            proxy.tunnels[0].close()


async def test_the_next_request_tries_again() -> None:
    async with origin_and_proxy() as (server, proxy), client(proxy.url) as c:
        proxy.answer, proxy.then = b"HTTP/1.1 503 Busy\r\n\r\n", "close"
        with pytest.raises(h2keep.ProxyError):
            await c.get(server.url)
        proxy.answer, proxy.then = ESTABLISHED, "relay"
        assert (await c.get(server.url)).content == b"ok"


# The way to the proxy


async def test_a_proxy_that_cannot_be_reached_is_a_connect_error() -> None:
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))
        port = placeholder.getsockname()[1]
    async with client(f"http://user:s3cret@127.0.0.1:{port}") as c:
        with pytest.raises(
            h2keep.ConnectError, match=f"cannot connect to the proxy http://127.0.0.1:{port} for"
        ) as caught:
            await c.get("http://127.0.0.1:9/")
        assert "Connection refused" in str(caught.value)
        assert "s3cret" not in str(caught.value)
        assert caught.value.unprocessed


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_connect_timeout_covers_a_proxy_that_says_nothing(scheme: str, client_ssl: ssl.SSLContext) -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.answer = None
        # To https:// this proxy says nothing either: it waits for the head's end.
        url = proxy.url.replace("http://", f"{scheme}://")
        chosen = h2keep.Proxy(url, ssl_context=client_ssl if scheme == "https" else None)
        async with client(chosen) as c:
            began = anyio.current_time()
            with pytest.raises(h2keep.ConnectTimeout) as caught:
                await c.get(server.url, timeout=h2keep.Timeout(connect=5.0, pool=None))
            assert anyio.current_time() - began == pytest.approx(5.0, abs=0.01)
            assert caught.value.unprocessed


async def test_the_connect_timeout_covers_an_origin_that_says_nothing_in_the_tunnel(client_ssl: ssl.SSLContext) -> None:
    async with RawServer.listen() as server, TinyProxy.listen() as proxy, client(proxy.url, verify=client_ssl) as c:
        began = anyio.current_time()
        with pytest.raises(h2keep.ConnectTimeout):
            await c.get(f"https://127.0.0.1:{server.port}/", timeout=h2keep.Timeout(connect=5.0, pool=None))
        assert anyio.current_time() - began == pytest.approx(5.0, abs=0.01)
        assert len(proxy.tunnels) == 1


@pytest.mark.parametrize("step", range(1, 9))
async def test_cancelled_at_any_moment_it_leaves_nothing(
    step: int, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
) -> None:
    async with RawServer.listen(server_ssl) as server, TinyProxy.listen(proxy_ssl(cert_path, key_path)) as proxy:
        server.serve(answering(delay=1.0))
        async with client(h2keep.Proxy(proxy.url, ssl_context=client_ssl), verify=client_ssl) as c:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(c.get, server.url)
                    for _ in range(step * 3):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
            assert (await c.get(server.url)).content == b"ok"


async def test_a_proxy_whose_certificate_is_not_trusted(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
) -> None:
    async with RawServer.listen(server_ssl) as server, TinyProxy.listen(proxy_ssl(cert_path, key_path)) as proxy:
        # What is trusted for origins says nothing of proxies.
        async with client(proxy.url, verify=client_ssl, trust_env=False) as c:
            with pytest.raises(h2keep.ConnectError, match=f"the proxy {proxy.url} for .*TLS failed: .*certificate"):
                await c.get(server.url)
        assert not proxy.heads


async def test_an_https_proxy_that_is_an_http_proxy(client_ssl: ssl.SSLContext) -> None:
    async with RawServer.listen() as server, TinyProxy.listen() as proxy:
        chosen = h2keep.Proxy(proxy.url.replace("http://", "https://"), ssl_context=client_ssl)
        async with client(chosen) as c, anyio.create_task_group() as tasks:

            async def get() -> None:
                with pytest.raises(h2keep.ConnectError, match="is this a port for http://"):
                    await c.get(server.url)

            tasks.start_soon(get)
            peer = await proxy.server.peer(0)
            await peer.send_bytes(b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def test_a_certificate_problem_of_the_origin_is_no_proxy_error(
    client_ssl: ssl.SSLContext,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with origin_and_proxy(context) as (server, proxy), client(proxy.url, verify=client_ssl) as c:
        with pytest.raises(h2keep.ConnectError, match=f"{server.url}: TLS failed: .*certificate") as caught:
            await c.get(server.url)
        assert not isinstance(caught.value, h2keep.ProxyError)
