"""Which proxy leads to which origin: what the caller said, or what the environment says.

HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY are read as httpx and httpx2 read them for their own clients, which no
longer do so once they are given a transport. They differ in NO_PROXY: httpx2 knows networks, and *.example.com.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from h2keep.runner.proxy import Proxy

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from h2keep.runner.dial import Origin

__all__ = ["ProxyFor", "always", "from_environment"]

ProxyFor: TypeAlias = "Callable[[Origin], Proxy | None]"
MakeContext: TypeAlias = "Callable[[], ssl.SSLContext]"
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_DEFAULT_PORTS = {"http": 80, "https": 443}
_PATTERN = re.compile(
    r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*)://(?:[^/?#]*@)?(?P<host>\[[^/?#]*\]|[^:@/?#]*):?(?P<port>[^/?#]*)"
    r"(?:/(?P<path>[^?#]*))?(?:[?#].*)?"
)
_IPV4_STYLE = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+")


def always(proxy: Proxy | str, make_context: MakeContext) -> ProxyFor:
    """This proxy for every origin. `make_context` is for the TLS of https:// proxies without a context of their own."""
    if isinstance(proxy, str):
        proxy = Proxy(proxy)
    if not isinstance(proxy, Proxy):
        raise TypeError(f"proxy: {type(proxy).__name__} is neither a URL nor a Proxy")
    ready = _with_context(proxy, make_context)
    return lambda _: ready


def from_environment(make_context: MakeContext, *, networks: bool = True) -> ProxyFor | None:
    """What the environment says now, None if it names no proxy. `networks`: as httpx2 reads NO_PROXY, else as httpx.

    Raises `ValueError` and ImportError for a proxy that can't be used, as the libraries do.
    """
    chosen: list[tuple[_Pattern, Proxy | None]] = []
    for text, url in _mounts(networks).items():
        pattern = _parse(text, networks)
        if pattern is not None:
            proxy = None if url is None else _with_context(_proxy(url, text), make_context)
            chosen.append((pattern, proxy))
    if all(proxy is None for _, proxy in chosen):
        return None
    chosen.sort(key=lambda entry: entry[0].priority)

    def choose(origin: Origin) -> Proxy | None:
        return next((proxy for pattern, proxy in chosen if pattern.matches(origin)), None)

    return choose


def _proxy(url: str, text: str) -> Proxy:
    try:
        return Proxy(url)
    except ValueError as error:
        raise ValueError(f"{text.removesuffix('://').upper()}_PROXY in the environment: {error}") from error


def _with_context(proxy: Proxy, make_context: MakeContext) -> Proxy:
    if proxy.scheme != "https" or proxy.ssl_context is not None:
        return proxy
    return Proxy(str(proxy), auth=proxy.auth, headers=proxy.headers, ssl_context=make_context())


def _mounts(networks: bool) -> dict[str, str | None]:
    """Patterns of URLs, and the proxy's URL for each."""
    from urllib.request import getproxies

    # On macOS and Windows the system's settings, where the environment has none.
    found = getproxies()
    mounts: dict[str, str | None] = {}
    for scheme in ("http", "https", "all"):
        if url := found.get(scheme):
            mounts[f"{scheme}://"] = url if "://" in url else f"http://{url}"
    for entry in found.get("no", "").split(","):
        name = entry.strip()
        if name == "*":
            return {}
        pattern = _pattern_for(name, networks) if name else None
        if pattern is not None:
            mounts[pattern] = None
    return mounts


def _pattern_for(name: str, networks: bool) -> str | None:
    """An entry of NO_PROXY as a pattern; None for what says nothing."""
    if "://" in name:
        return name
    address, _, prefix = name.partition("/")
    if _is_address(ipaddress.IPv4Address, address) or name.lower() == "localhost":
        return f"all://{name}"
    if _is_address(ipaddress.IPv6Address, address):
        # httpx itself fails at these.
        return (f"all://[{address}]/{prefix}" if networks else None) if prefix else f"all://[{address}]"
    if networks and "/" in name and not name.startswith("["):
        return None
    if networks and name.startswith(("[", "*.")):
        return f"all://{name}"
    return f"all://*{name}"


def _is_address(kind: Any, text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Pattern:
    """Some URLs, as httpx's mounts describe them: "all://*example.com", "https://10.0.0.1:8443"."""

    scheme: str
    host: str
    port: int | None
    network: Network | None

    @property
    def priority(self) -> tuple[int, int, int, int, int]:
        """The lowest is looked at first: ports, then hosts, small networks, large ones, and patterns without a host."""
        size = 0 if self.network is None else self.network.num_addresses
        kind = 1 if self.network is not None else 0 if self.host else 2
        length = 0 if self.network is not None else len(self.host)
        return (int(self.port is None), kind, size, -length, -len(self.scheme))

    def matches(self, origin: Origin) -> bool:
        """Whether the origin's URLs are among them."""
        if self.scheme and self.scheme != origin.scheme:
            return False
        # A scheme's default port is no port in httpx's URLs: "example.com:443" matches none of https://.
        port = None if origin.port == _DEFAULT_PORTS.get(origin.scheme) else origin.port
        return (self.port is None or self.port == port) and self._matches_host(origin.host)

    def _matches_host(self, host: str) -> bool:
        if self.network is not None:
            return _is_in(host, self.network)
        if self.host.startswith("*."):
            return len(host) >= len(self.host) and host.endswith(self.host[1:])
        if self.host.startswith("*"):
            domain = self.host[1:]
            return host == domain or (len(host) > len(domain) + 1 and host.endswith(f".{domain}"))
        return self.host in ("", host)


def _is_in(host: str, network: Network) -> bool:
    try:
        return ipaddress.ip_address(host) in network
    except ValueError:
        return False


def _parse(text: str, networks: bool) -> _Pattern | None:
    """None for what is no URL: like curl and Go, such entries are ignored."""
    found = _PATTERN.fullmatch(text)
    if found is None:
        return None
    scheme = found["scheme"].lower()
    try:
        host = _host(found["host"])
        port = int(found["port"]) if found["port"] else None
        network = _network(text, host, found["path"] or "") if networks else None
    except ValueError:
        return None
    port = None if port == _DEFAULT_PORTS.get(scheme) else port
    return _Pattern("" if scheme == "all" else scheme, "" if host == "*" else host, port, network)


def _host(text: str) -> str:
    host = text.lower()
    if host.startswith("["):
        host = host[1:-1]
        ipaddress.IPv6Address(host)
    elif _IPV4_STYLE.fullmatch(host):
        ipaddress.IPv4Address(host)
    elif not host.isascii():
        name = host.lstrip("*.")
        host = host[: len(host) - len(name)] + name.encode("idna").decode("ascii")
    return host


def _network(text: str, host: str, prefix: str) -> Network | None:
    """As in "all://10.0.0.0/8" and "all://[fd00::]/8". Raises `ValueError` for networks that there can't be."""
    prefix = prefix.removeprefix("/")
    if not prefix or not (_is_address(ipaddress.IPv4Address, host) or _is_address(ipaddress.IPv6Address, host)):
        return None
    written = f"[{host}]" if ":" in host else host
    if "@" in text or "%" in text or not prefix.isdigit() or not text.endswith(f"{written}/{prefix}"):
        raise ValueError(f"{text!r} is no network")
    return ipaddress.ip_network(f"{host}/{prefix}", strict=False)
