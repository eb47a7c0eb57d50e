"""SOCKS5 proxies: the conversation, what they refuse, and the tunnel (RFC 1928, RFC 1929)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import h2keep
from proxy.servers import TinyProxy
from support.clock import virtual_time
from support.raw import RawServer, answering

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]

BOUND_TO = {
    "IPv4": b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x50",
    "IPv6": b"\x05\x00\x00\x04" + bytes(16) + b"\x00\x50",
    "name": b"\x05\x00\x00\x03\x09localhost\x00\x50",
    "empty name": b"\x05\x00\x00\x03\x00\x00\x50",
}


def client(proxy: str | h2keep.Proxy, **options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(http1=False, proxy=proxy, **options)


@contextlib.asynccontextmanager
async def origin_and_proxy(ssl: ssl.SSLContext | None = None) -> AsyncIterator[tuple[RawServer, TinyProxy]]:
    async with RawServer.listen(ssl) as server, TinyProxy.listen(socks=True) as proxy:
        server.serve(answering())
        yield server, proxy


async def refused(url: str, proxy: TinyProxy, **options: Any) -> str:
    async with client(options.pop("given", proxy.url), **options) as c:
        with pytest.raises(h2keep.ProxyError) as caught:
            await c.get(url)
    assert caught.value.unprocessed
    assert caught.value.status is None
    assert f"no tunnel to {url}: the proxy {proxy.url} " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
async def test_the_proxy_resolves_the_name(scheme: str, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
    async with origin_and_proxy(server_ssl) as (server, proxy):
        async with client(proxy.url.replace("socks5", scheme), verify=client_ssl) as c:
            url = f"https://only-the-proxy-knows.example:{server.port}/"
            response = await c.get(url, extensions={"sni_hostname": "localhost"})
            assert response.content == b"ok"
        assert proxy.destinations == [(b"only-the-proxy-knows.example", server.port)]
        # Without credentials none are offered.
        assert proxy.heads == [b"\x05\x01\x00"]


@pytest.mark.parametrize("reply", BOUND_TO.values(), ids=BOUND_TO)
@pytest.mark.parametrize("slowly", [False, True], ids=["at once", "slowly"])
async def test_where_the_proxy_is_bound_to_does_not_matter(reply: bytes, slowly: bool) -> None:
    async with origin_and_proxy() as (server, proxy), client(proxy.url) as c:
        proxy.reply, proxy.slowly = reply, slowly
        assert (await c.get(server.url)).content == b"ok"


async def test_what_follows_the_reply_belongs_to_the_tunnel() -> None:
    async with origin_and_proxy() as (server, proxy), client(proxy.url) as c:
        proxy.in_one_write = True
        assert (await c.get(server.url)).content == b"ok"
        assert (await c.get(server.url)).content == b"ok"
        assert len(proxy.tunnels) == 1


async def test_addresses_go_as_addresses() -> None:
    async with TinyProxy.listen(socks=True) as proxy, client(proxy.url) as c:
        proxy.reply = b"\x05\x04\x00\x01" + bytes(6)
        for host in ("127.0.0.1", "[::1]"):
            with pytest.raises(h2keep.ProxyError):
                await c.get(f"http://{host}:8080/")
        assert proxy.destinations == [(b"\x7f\x00\x00\x01", 8080), (bytes(15) + b"\x01", 8080)]


@pytest.mark.parametrize(
    "auth",
    [("user", "word"), ("usér", "p@ss"), ("user", ""), ("u" * 255, "w" * 255)],
    ids=["plain", "utf-8", "empty", "long"],
)
async def test_user_name_and_password(auth: tuple[str, str]) -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.user = (auth[0].encode(), auth[1].encode())
        async with client(h2keep.Proxy(proxy.url, auth=auth)) as c:
            assert (await c.get(server.url)).content == b"ok"


async def test_a_proxy_that_wants_none_is_told_none() -> None:
    async with origin_and_proxy() as (server, proxy), client(h2keep.Proxy(proxy.url, auth=("user", "word"))) as c:
        assert (await c.get(server.url)).content == b"ok"
        assert proxy.heads == [b"\x05\x02\x00\x02"]


async def test_a_wrong_password_is_refused_and_not_told() -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.user = (b"user", b"right")
        text = await refused(server.url, proxy, given=proxy.url.replace("://", "://user:wr0ng@"))
        assert "authentication failure" in text
        assert "wr0ng" not in text


async def test_a_proxy_that_wants_a_password_is_given_none() -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.user = (b"user", b"right")
        assert "No acceptable authentication methods" in await refused(server.url, proxy)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (1, "General SOCKS server failure"),
        (2, "Connection not allowed by ruleset"),
        (3, "Network unreachable"),
        (4, "Host unreachable"),
        (5, "Connection refused by destination host"),
        (6, "TTL expired"),
        (7, "Command not supported"),
        (8, "Address type not supported"),
        (99, "Invalid reply code"),
    ],
)
async def test_a_refusal_says_the_proxys_reason(code: int, text: str) -> None:
    async with origin_and_proxy() as (server, proxy):
        # Some send no more than this.
        proxy.reply = bytes([5, code])
        assert text in await refused(server.url, proxy)
        assert not server.peers


@pytest.mark.parametrize(
    ("method_reply", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "Unexpected SOCKS version number"),
        (b"\x04\x00", "Unexpected SOCKS version number"),
        (b"\x05\x01", "Unexpected SOCKS authentication method"),
        (b"\x05\x63", "Invalid authentication method"),
        (b"\x05", "closed the connection without an answer"),
    ],
)
async def test_garbage_in_the_place_of_a_method(method_reply: bytes, text: str) -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.method_reply = method_reply
        assert text in await refused(server.url, proxy)


@pytest.mark.parametrize(
    ("reply", "then", "text"),
    [
        (b"\x05\x00\x00\x02" + bytes(6), "wait", "Invalid address type"),
        (b"\x05\x00\x00\x01\x7f", "close", "closed the connection without an answer"),
        (b"\x05\x00", "abort", "lost the connection"),
        (b"\x04\x00\x00\x01" + bytes(6), "wait", "Unexpected SOCKS version number"),
    ],
)
async def test_garbage_in_the_place_of_a_reply(reply: bytes, then: str, text: str) -> None:
    async with origin_and_proxy() as (server, proxy):
        proxy.reply, proxy.then = reply, then
        assert text in await refused(server.url, proxy)


@pytest.mark.parametrize("then", ["close", "abort"])
async def test_a_tunnel_dropped_before_anything_came_through(
    then: str, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with origin_and_proxy(server_ssl) as (server, proxy):
        proxy.then = then
        assert "opened it, and closed it before" in await refused(server.url, proxy, verify=client_ssl)


async def test_a_name_that_socks_cannot_carry_is_a_connect_error() -> None:
    async with TinyProxy.listen(socks=True) as proxy, client(proxy.url) as c:
        with pytest.raises(h2keep.ConnectError, match="is not a name that SOCKS can carry") as caught:
            await c.get(f"http://{'x' * 64}.example/")
        assert not isinstance(caught.value, h2keep.ProxyError)


async def test_the_connect_timeout_covers_a_proxy_that_says_nothing() -> None:
    async with RawServer.listen() as mute, client(f"socks5://127.0.0.1:{mute.port}") as c:
        began = anyio.current_time()
        with pytest.raises(h2keep.ConnectTimeout):
            await c.get("http://127.0.0.1:9/", timeout=h2keep.Timeout(connect=5.0, pool=None))
        assert anyio.current_time() - began == pytest.approx(5.0, abs=0.01)
