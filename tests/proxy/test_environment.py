"""HTTP_PROXY and its kin: every choice compared with the one that httpx's and httpx2's own clients make."""

from __future__ import annotations

import functools
import ssl
import sys
from typing import TYPE_CHECKING, Any

import httpx
import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import h2keep
import h2keep.httpx
import h2keep.httpx2
from h2keep import _proxies
from h2keep._bridge import origin_of

if TYPE_CHECKING:
    from collections.abc import Mapping

LIBRARIES = [pytest.param(httpx, id="httpx"), pytest.param(httpx2, id="httpx2")]
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUEST_METHOD")

PROXIES = {"HTTP_PROXY": "http://h:1", "HTTPS_PROXY": "http://s:2", "ALL_PROXY": "http://a:3"}
ENVIRONMENTS: list[dict[str, str]] = [
    {},
    PROXIES,
    {"HTTP_PROXY": "h:1"},
    {"https_proxy": "http://s:2"},
    {"https_proxy": "http://lower:2", "HTTPS_PROXY": "http://UPPER:2"},
    {"all_proxy": "http://a:3", "HTTP_PROXY": ""},
    {"HTTPS_PROXY": "https://user:p%40ss@s:2/path"},
    {"ALL_PROXY": "http://[::1]:3"},
    {"ALL_PROXY": "HTTP://A:3"},
    {"HTTP_PROXY": "http://h:1", "REQUEST_METHOD": "GET"},
    {"TRAVIS_APT_PROXY": "http://t:1"},
    {"NO_PROXY": "example.com"},
    *(
        {**PROXIES, "NO_PROXY": entry}
        for entry in (
            "*",
            "example.com, *",
            "example.com",
            ".example.com",
            "*.example.com",
            "EXAMPLE.com",
            "www.example.com",
            " example.com , other.org ",
            ",,example.com,",
            "example.com:8443",
            "example.com:443",
            "example.com:80",
            "www.example.com:8443,example.com",
            "localhost",
            "LOCALHOST",
            "localhost:8080",
            "127.0.0.1",
            "127.0.0.1:8080",
            "127.0.0.0/8",
            "10.0.0.0/8,10.1.0.0/16",
            "10.1.2.3/33",
            "10.1.2.3/x",
            "::1",
            "com",
            "mple.com",
            "http://example.com",
            "https://example.com",
            "https://example.com:443",
            "https://example.com:8443",
            "https://*.example.com",
            "https://",
            "all://",
            "http://,example.com",
            "HTTPS://Example.com",
            "example.com.",
            "user@example.com",
            "example.com/path",
            "https://10.1.2.3",
            "*example.com",
            "**.example.com",
            "e*ample.com",
            "all://*",
            "999.1.1.1",
        )
    ),
]
#: Entries at which httpx itself fails, and all its clients with it.
NETWORKS = ["[::1]", "[::1]:8080", "fd00::/8", "[fd00::]/8", "fd00::1/129", "example.com:x", "[::1"]
URLS = [
    "http://example.com/",
    "https://example.com/",
    "https://example.com:8443/",
    "http://example.com:80/",
    "http://example.com:443/",
    "https://www.example.com/",
    "https://a.b.example.com:8443/x?y",
    "https://notexample.com/",
    "https://EXAMPLE.com/",
    "https://example.com./",
    "https://example.org/",
    "http://localhost/",
    "http://localhost:8080/",
    "http://127.0.0.1/",
    "http://127.0.0.1:8080/",
    "https://127.1.2.3/",
    "https://10.1.2.3/",
    "https://10.2.2.3/",
    "https://[::1]/",
    "http://[::1]:8080/",
    "https://[fd00::1]/",
    "https://999.example.com/",
]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@functools.cache
def default_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def set_environment(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def theirs(library: Any, urls: list[str]) -> list[str | None]:
    """The proxy for each URL as the library's own client mounts and finds it."""
    utils = sys.modules[f"{library.__name__}._utils"]
    mounts = {
        utils.URLPattern(key): None if url is None else library.Proxy(url)
        for key, url in utils.get_environment_proxies().items()
    }
    chosen = []
    for url in urls:
        proxies = (proxy for pattern, proxy in sorted(mounts.items()) if pattern.matches(library.URL(url)))
        proxy = next(proxies, None)
        chosen.append(None if proxy is None else f"{describe(proxy.url)} {proxy.auth}")
    return chosen


def describe(url: Any) -> str:
    port = url.port or {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}[url.scheme]
    return f"{url.scheme}://{url.host}:{port}"


def ours(library: Any, urls: list[str]) -> list[str | None]:
    """The same as our transport for the library would choose."""
    choose = _proxies.from_environment(default_context, networks=library is httpx2)
    chosen = []
    for url in urls:
        parsed = library.URL(url)
        origin = origin_of(parsed.scheme, parsed.raw_host, parsed.port, None)
        proxy = None if choose is None else choose(origin)
        chosen.append(None if proxy is None else f"{proxy.scheme}://{proxy.host}:{proxy.port} {proxy.auth}")
    return chosen


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
def test_the_choice_is_the_librarys_own(
    library: Any, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, environment)
    assert ours(library, URLS) == theirs(library, URLS)


@pytest.mark.parametrize("entry", NETWORKS)
def test_networks_and_nonsense_are_as_in_httpx2(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**PROXIES, "NO_PROXY": f"{entry},example.org"})
    assert ours(httpx2, URLS) == theirs(httpx2, URLS)


@pytest.mark.parametrize("entry", NETWORKS)
def test_entries_at_which_httpx_fails_are_ignored(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {**PROXIES, "NO_PROXY": "example.org"})
    without = ours(httpx, URLS)
    set_environment(monkeypatch, {"NO_PROXY": f"{entry},example.org"})
    with pytest.raises(httpx.InvalidURL):
        theirs(httpx, URLS)
    assert ours(httpx, URLS) == without


NAMES = st.sampled_from(
    [
        *("example.com", "www.example.com", "a.www.example.com", "other.org", "localhost", "com", "xample.com"),
        *("10.1.2.3", "10.1.2.0", "127.0.0.1", "192.168.1.1", "[::1]", "[fd00::1]", "[fd00::]"),
    ]
)
PORTS = st.sampled_from(["", "", "", ":80", ":443", ":8443"])
ENTRIES = st.builds(
    lambda scheme, star, name, port, suffix: f"{scheme}{star}{name}{port}{suffix}",
    st.sampled_from(["", "", "", "http://", "https://", "all://"]),
    st.sampled_from(["", "", ".", "*.", "*"]),
    NAMES,
    PORTS,
    st.sampled_from(["", "", "", "/8", "/16", "/64", "/"]),
)
TARGETS = st.builds(
    lambda scheme, name, port: f"{scheme}://{name}{port}/", st.sampled_from(["http", "https"]), NAMES, PORTS
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "HTTP_PROXY": st.just("http://h:1"),
        "HTTPS_PROXY": st.just("https://u:p@s:2"),
        "ALL_PROXY": st.just("a:3"),
        "NO_PROXY": st.lists(ENTRIES, max_size=6).map(",".join),
    },
)


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=400, deadline=None)
@given(environment=SETTINGS, urls=st.lists(TARGETS, min_size=1, max_size=6))
def test_the_choice_is_the_librarys_own_whatever_the_environment(
    library: Any, environment: dict[str, str], urls: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, environment)
        try:
            expected = theirs(library, urls)
        except library.InvalidURL:
            # Its client could not even be made; ours can.
            assert len(ours(library, urls)) == len(urls)
        else:
            assert ours(library, urls) == expected


def test_names_beyond_ascii_are_found_however_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in ("bücher.example", ".bücher.example", "xn--bcher-kva.example"):
        set_environment(monkeypatch, {**PROXIES, "NO_PROXY": entry})
        for url in ("https://www.bücher.example/", "https://www.xn--bcher-kva.example/"):
            assert ours(httpx2, [url]) == [None]
            assert ours(httpx, [url]) == [None]


@pytest.mark.parametrize("url", ["ftp://h:1", "socks4://h:1", "http://", "http://h:port"])
def test_a_proxy_that_cannot_be_used_is_refused_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {"HTTPS_PROXY": url})
    for make in (h2keep.AsyncClient, h2keep.Client, h2keep.httpx.KeepaliveTransport, h2keep.httpx2.KeepaliveTransport):
        with pytest.raises(ValueError, match="HTTPS_PROXY in the environment: proxy: the URL"):
            make()


# Who reads it, and when

FRONT_DOORS: list[Any] = [
    h2keep.AsyncClient,
    h2keep.Client,
    h2keep.httpx.AsyncKeepaliveTransport,
    h2keep.httpx.KeepaliveTransport,
    h2keep.httpx2.AsyncKeepaliveTransport,
    h2keep.httpx2.KeepaliveTransport,
]


@pytest.fixture(params=FRONT_DOORS, ids=lambda door: f"{door.__module__}.{door.__name__}")
def front_door(request: pytest.FixtureRequest) -> Any:
    return request.param


def choice(front_door: Any) -> str | None:
    """The proxy that it would use for https://example.com."""
    options = front_door._connections._make_pool.args[0]
    if options.proxy_for is None:
        return None
    proxy = options.proxy_for(origin_of("https", b"example.com", None, None))
    return None if proxy is None else str(proxy)


def test_the_environment_is_read_when_it_is_made(front_door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = front_door()
    monkeypatch.setenv("HTTPS_PROXY", "http://s:2")
    made = front_door()
    monkeypatch.delenv("HTTPS_PROXY")
    assert choice(before) is None
    assert choice(made) == "http://s:2"


def test_trust_env_false_reads_nothing(front_door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://a:3")
    assert choice(front_door(trust_env=False)) is None


def test_a_proxy_that_is_given_comes_before_the_environment(front_door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://a:3")
    monkeypatch.setenv("NO_PROXY", "example.com")
    assert choice(front_door(proxy="http://given:4")) == "http://given:4"


def test_a_unix_socket_comes_before_the_environment(front_door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://a:3")
    assert choice(front_door(uds="/run/server.sock")) is None


def test_an_https_proxy_of_the_environment_is_checked_by_the_systems_trust(
    front_door: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "https://a:3")
    made = front_door(verify=False)
    options = made._connections._make_pool.args[0]
    proxy = options.proxy_for(origin_of("https", b"example.com", None, None))
    assert proxy.ssl_context is not options.ssl_context
    assert proxy.ssl_context.verify_mode is ssl.CERT_REQUIRED
    assert proxy.ssl_context.check_hostname
