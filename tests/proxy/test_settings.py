"""`h2keep.Proxy`, and the argument `proxy` of clients and transports."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import httpx
import httpx2
import pytest

import h2keep
import h2keep.httpx
import h2keep.httpx2
from h2keep.runner.dial import Origin

if TYPE_CHECKING:
    import ssl

CLIENTS = [h2keep.AsyncClient, h2keep.Client]
TRANSPORTS = [
    pytest.param(httpx, h2keep.httpx.AsyncKeepaliveTransport, id="httpx async"),
    pytest.param(httpx, h2keep.httpx.KeepaliveTransport, id="httpx"),
    pytest.param(httpx2, h2keep.httpx2.AsyncKeepaliveTransport, id="httpx2 async"),
    pytest.param(httpx2, h2keep.httpx2.KeepaliveTransport, id="httpx2"),
]
ORIGIN = Origin("https", "example.com", 443)


def used(front_door: Any) -> h2keep.Proxy:
    """The proxy that it uses."""
    proxy = front_door._connections._make_pool.args[0].proxy_for(ORIGIN)
    assert isinstance(proxy, h2keep.Proxy)
    return proxy


@pytest.mark.parametrize(
    ("url", "shown", "auth"),
    [
        ("http://proxy", "http://proxy:80", None),
        ("https://proxy", "https://proxy:443", None),
        ("socks5://proxy", "socks5://proxy:1080", None),
        ("socks5h://proxy", "socks5h://proxy:1080", None),
        ("HTTP://Proxy.Example:3128/path?query", "http://proxy.example:3128", None),
        ("http://[::1]:3128", "http://[::1]:3128", None),
        ("http://bücher.example", "http://xn--bcher-kva.example:80", None),
        ("http://user:p%40ss%3Aword@proxy:3128", "http://proxy:3128", ("user", "p@ss:word")),
        ("http://user@proxy", "http://proxy:80", ("user", "")),
        ("http://:password@proxy", "http://proxy:80", ("", "password")),
    ],
)
def test_urls(url: str, shown: str, auth: tuple[str, str] | None) -> None:
    proxy = h2keep.Proxy(url)
    assert str(proxy) == shown
    assert proxy.auth == auth


def test_what_stands_in_the_url_comes_before_auth_as_in_httpx() -> None:
    assert h2keep.Proxy("http://user:word@proxy", auth=("other", "secret")).auth == ("user", "word")
    assert h2keep.Proxy("http://proxy", auth=("other", "secret")).auth == ("other", "secret")


def test_it_keeps_its_password_to_itself() -> None:
    proxy = h2keep.Proxy("http://user:s3cret@proxy", headers={"X-Token": "s3cret"})
    assert repr(proxy) == "Proxy('http://proxy:80', auth=('user', '********'), headers=['X-Token'])"
    assert "s3cret" not in f"{proxy} {proxy!r}"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("proxy:3128", "must begin with http://, https://, socks5:// or socks5h://"),
        ("ftp://user:s3cret@proxy", "must begin with http://"),
        ("", "must begin with http://"),
        ("http://", "names no host after http://"),
        ("http://user:s3cret@proxy:port", "host or port can't be understood"),
        ("http://user:s3cret@[proxy", "host or port can't be understood"),
        ("http://user:s3cret@pro\nxy", "blanks or control characters"),
        (" http://proxy", "blanks or control characters"),
    ],
)
def test_urls_that_are_refused_without_telling_a_password(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        h2keep.Proxy(url)
    assert "s3cret" not in str(caught.value)


def test_other_arguments_that_are_refused(client_ssl: ssl.SSLContext) -> None:
    anything: Any = None
    with pytest.raises(TypeError, match="a URL is wanted, not NoneType"):
        h2keep.Proxy(anything)
    for auth in ("user:password", ("user",), ("user", 1), ["user", "password"]):
        anything = auth
        with pytest.raises(TypeError, match="auth must be"):
            h2keep.Proxy("http://proxy", auth=anything)
    for headers in ({"X Y": "1"}, {"": "1"}, {"X:": "1"}, [("X\r\n", "1")]):
        with pytest.raises(ValueError, match="can't be a header's name"):
            h2keep.Proxy("http://proxy", headers=headers)
    with pytest.raises(ValueError, match="a line's end"):
        h2keep.Proxy("http://proxy", headers={"X": "1\r\nEvil: 2"})
    for scheme in ("http", "socks5"):
        with pytest.raises(ValueError, match=r"an ssl_context is of no use to .*, which does not begin with https://"):
            h2keep.Proxy(f"{scheme}://proxy", ssl_context=client_ssl)
    with pytest.raises(ValueError, match="SOCKS knows no headers"):
        h2keep.Proxy("socks5://proxy", headers={"X": "1"})
    with pytest.raises(ValueError, match="more than 255 bytes"):
        h2keep.Proxy("socks5://proxy", auth=("user", "é" * 128))


def test_socks_without_python_socks_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "python_socks._protocols", None)
    monkeypatch.setitem(sys.modules, "python_socks._protocols.socks5", None)
    for make in (h2keep.Proxy, lambda url: h2keep.AsyncClient(proxy=url)):
        with pytest.raises(ImportError, match=re.escape("pip install 'h2keep[socks]'")):
            make("socks5://proxy")
    assert h2keep.Proxy("http://proxy").port == 80


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_take_a_url_or_a_proxy(client: Any) -> None:
    assert str(used(client(proxy="http://user:word@proxy:3128"))) == "http://proxy:3128"
    given = h2keep.Proxy("http://proxy:3128", headers={"X": "1"})
    assert used(client(proxy=given)) is given


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_refuse_what_is_neither(client: Any) -> None:
    for proxy in (b"http://proxy", 3128, httpx.Proxy("http://proxy")):
        with pytest.raises(TypeError, match="is neither a URL nor a Proxy"):
            client(proxy=proxy)
    with pytest.raises(ValueError, match="no proxy on the way to a unix socket"):
        client(proxy="http://proxy", uds="/run/server.sock")


@pytest.mark.parametrize("client", CLIENTS)
def test_an_https_proxy_is_checked_by_its_own_context(client: Any, client_ssl: ssl.SSLContext) -> None:
    assert used(client(proxy=h2keep.Proxy("https://proxy", ssl_context=client_ssl))).ssl_context is client_ssl
    without = used(client(proxy="https://user:word@proxy", verify=client_ssl))
    assert without.ssl_context not in (None, client_ssl)
    assert without.auth == ("user", "word")


@pytest.mark.parametrize(("library", "transport"), TRANSPORTS)
def test_transports_take_what_the_librarys_own_takes(library: Any, transport: Any, client_ssl: ssl.SSLContext) -> None:
    for given in (
        "https://user:p%40ss@proxy:3128",
        library.URL("https://user:p%40ss@proxy:3128"),
        library.Proxy("https://proxy:3128", auth=("user", "p@ss")),
        h2keep.Proxy("https://proxy:3128", auth=("user", "p@ss")),
    ):
        proxy = used(transport(proxy=given))
        assert str(proxy) == "https://proxy:3128"
        assert proxy.auth == ("user", "p@ss")
        assert proxy.ssl_context is not None
    full = library.Proxy("https://proxy", headers={"X-Tenant": "blue"}, ssl_context=client_ssl)
    proxy = used(transport(proxy=full))
    assert proxy.ssl_context is client_ssl
    assert proxy.headers == [(b"X-Tenant", b"blue")]


@pytest.mark.parametrize(("library", "transport"), TRANSPORTS)
def test_transports_ignore_what_the_librarys_own_ignores(
    library: Any, transport: Any, client_ssl: ssl.SSLContext
) -> None:
    proxy = library.Proxy("socks5://user:word@proxy", headers={"X": "1"}, ssl_context=client_ssl)
    chosen = used(transport(proxy=proxy))
    assert (str(chosen), chosen.auth, chosen.headers) == ("socks5://proxy:1080", ("user", "word"), [])


@pytest.mark.parametrize(("library", "transport"), TRANSPORTS)
def test_transports_refuse_what_the_librarys_own_refuses(library: Any, transport: Any) -> None:
    with pytest.raises(ValueError, match="Unknown scheme for proxy URL"):
        transport(proxy="ftp://proxy")
    with pytest.raises(ValueError, match="Unknown scheme for proxy URL"):
        transport(proxy="proxy:3128")
    with pytest.raises(TypeError, match="is neither a URL nor a Proxy"):
        transport(proxy=3128)
