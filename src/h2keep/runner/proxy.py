"""Proxies: what they want to hear before they let bytes through, and the tunnel that there is then.

Asking for a tunnel is bytes in, bytes out, as TLS is: `HTTP CONNECT` in full here, SOCKS5 by python-socks. Every origin
is reached by a tunnel, those of http:// too: PINGs have to come from the origin itself.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit

from h2keep.errors import ConnectError, ProxyError
from h2keep.runner.tls import Cleartext, SecurityLayer, TLSLayer
from h2keep.runner.wire import Wire

if TYPE_CHECKING:
    import socket
    import ssl

    from h2keep.runner.dial import Origin

__all__ = ["Proxy", "Tunnel", "TunnelLayer"]

HeaderTypes: TypeAlias = Mapping[str, str | bytes] | Iterable[tuple[str | bytes, str | bytes]]

_DEFAULT_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}
#: The longest head of an answer to CONNECT, interim answers included.
_LONGEST_HEAD = 64 * 1024
_LONGEST_REASON = 200
_STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] ([0-9]{3})(?: ([^\r\n]*))?\r?\n")
_HEAD_END = re.compile(rb"\n\r?\n")
_CHALLENGE = re.compile(rb"^proxy-authenticate:[ \t]*([a-z0-9-]+)", re.IGNORECASE | re.MULTILINE)
_UNPRINTABLE = re.compile(r"[^ -~\xa0-\xff]+")
_CONTROL = re.compile(r"[\x00-\x20\x7f]")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_BAD_VALUE = re.compile(rb"[\x00\r\n]")


class Proxy:
    """A proxy, and what it wants to know.

    * `url`: http://, https://, socks5:// or socks5h://, a host, and a port unless it is 80, 443 or 1080. User name and
      password may stand before the host, percent-encoded; they come before `auth`. SOCKS needs `h2keep[socks]`, and it
      is always the proxy that resolves the origin's name, as in httpx.
    * `auth`: (user name, password).
    * `headers`: sent with each CONNECT.
    * `ssl_context`: how the TLS of an https:// proxy itself is checked; the system's trust store unless given.

    Raises `ValueError` and `TypeError` for what can't be used, ImportError for SOCKS without python-socks.
    """

    __slots__ = ("auth", "headers", "host", "port", "scheme", "ssl_context")

    def __init__(
        self,
        url: str,
        *,
        auth: tuple[str, str] | None = None,
        headers: HeaderTypes = (),
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.scheme, self.host, self.port, own_auth = _parse_url(url)
        self.auth = own_auth or _checked_auth(auth)
        self.headers = _checked_headers(headers)
        self.ssl_context = ssl_context
        if ssl_context is not None and self.scheme != "https":
            raise ValueError(f"proxy: an ssl_context is of no use to {self}, which does not begin with https://")
        if self.scheme.startswith("socks"):
            _load_socks5()
            if self.headers:
                raise ValueError(f"proxy: SOCKS knows no headers, so {self} can't be sent any")
            if any(len(text.encode()) > 255 for text in self.auth or ()):
                raise ValueError(f"proxy: {self}: SOCKS takes no user name or password of more than 255 bytes")

    def __str__(self) -> str:
        """The URL, without user name and password."""
        return f"{self.scheme}://{_authority(self.host, self.port)}"

    def __repr__(self) -> str:
        auth = "" if self.auth is None else f", auth=({self.auth[0]!r}, '********')"
        headers = f", headers={[name.decode('ascii') for name, _ in self.headers]!r}" if self.headers else ""
        return f"Proxy({str(self)!r}{auth}{headers})"

    def tls_layer(self) -> TLSLayer:
        """The client's side of TLS with the proxy itself. Raises `ConnectError`."""
        assert self.ssl_context is not None
        try:
            # It may be the origins' context, too, which says h2.
            return TLSLayer(self.ssl_context, self.host, alpn=("http/1.1",))
        except ValueError as error:
            raise ConnectError(f"{self}: {self.host!r} cannot be a server's name in TLS: {error}") from error

    def negotiation(self, origin: Origin) -> Negotiation:
        """The conversation that leads to a tunnel."""
        return _Socks5(self, origin) if self.scheme.startswith("socks") else _Connect(self, origin)


def _parse_url(url: str) -> tuple[str, str, int, tuple[str, str] | None]:
    # The URL stands in no error: it may hold a password.
    if not isinstance(url, str):
        raise TypeError(f"proxy: a URL is wanted, not {type(url).__name__}")
    if _CONTROL.search(url):
        raise ValueError("proxy: there are blanks or control characters in the URL")
    scheme, separator, _ = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in _DEFAULT_PORTS:
        raise ValueError("proxy: the URL must begin with http://, https://, socks5:// or socks5h://")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if host and not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError as error:
        raise ValueError("proxy: the URL's host or port can't be understood") from error
    if not host:
        raise ValueError(f"proxy: the URL names no host after {scheme}://")
    auth = None
    if parts.username or parts.password:
        auth = (unquote(parts.username or ""), unquote(parts.password or ""))
    return scheme, host, _DEFAULT_PORTS[scheme] if port is None else port, auth


def _checked_auth(auth: Any) -> tuple[str, str] | None:
    if auth is None:
        return None
    if not (isinstance(auth, tuple) and len(auth) == 2 and all(isinstance(part, str) for part in auth)):
        raise TypeError("proxy: auth must be (user name, password), both str")
    return auth[0], auth[1]


def _checked_headers(headers: HeaderTypes) -> list[tuple[bytes, bytes]]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    checked = []
    for name, value in pairs:
        raw = name.encode("latin-1") if isinstance(name, str) else name
        if not _NAME.fullmatch(raw):
            raise ValueError(f"proxy: {name!r} can't be a header's name")
        raw_value = value.encode("utf-8") if isinstance(value, str) else value
        if _BAD_VALUE.search(raw_value):
            raise ValueError(f"proxy: the header {name!r} has a value with a line's end or a NUL in it")
        checked.append((raw, raw_value))
    return checked


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _no_tunnel(proxy: Proxy, origin: Origin, text: str, status: int | None = None) -> ProxyError:
    return ProxyError(f"no tunnel to {origin}: the proxy {proxy} {text}", status=status)


class Negotiation(Protocol):
    """A conversation with a proxy, without I/O."""

    #: What came behind the proxy's last word: the tunnel's first bytes.
    unread: bytes
    #: The status of the answer that opened the tunnel, None if there is no such thing.
    status: int | None

    def advance(self, data: bytes | None) -> tuple[bytes, bool]:
        """One step: what came (None at first, b"" for the end); what to send, and whether the tunnel is there.

        Raises `ProxyError`.
        """


class _Connect:
    """CONNECT (RFC 9110, section 9.3.6) and the answer to it."""

    def __init__(self, proxy: Proxy, origin: Origin) -> None:
        self._proxy = proxy
        self._origin = origin
        self._head = bytearray()
        self._interim = 0
        self.unread = b""
        self.status: int | None = None

    def advance(self, data: bytes | None) -> tuple[bytes, bool]:
        if data is None:
            return self._request(), False
        if not data:
            when = "in the middle of its answer" if self._head else "without an answer"
            raise self._error(f"closed the connection {when}")
        searched = max(0, len(self._head) - 2)
        self._head += data
        while True:
            found = _HEAD_END.search(self._head, searched)
            length = len(self._head) if found is None else found.end()
            if self._head[:7] != b"HTTP/1."[: len(self._head)]:
                raise self._garbage()
            if self._interim + length > _LONGEST_HEAD:
                raise self._error(f"sent an answer whose head has more than {_LONGEST_HEAD // 1024} KiB")
            if found is None:
                return b"", False
            if self._is_open(bytes(self._head[:length])):
                self.unread = bytes(self._head[length:])
                return b"", True
            # An interim answer; another follows it.
            self._interim += length
            del self._head[:length]
            searched = 0
            if not self._head:
                return b"", False

    def _request(self) -> bytes:
        target = _authority(self._origin.host, self._origin.port).encode("ascii")
        fields = list(self._proxy.headers)
        given = {name.lower() for name, _ in fields}
        defaults = [(b"Host", target), (b"Accept", b"*/*")]
        if self._proxy.auth is not None:
            credentials = base64.b64encode(":".join(self._proxy.auth).encode("utf-8"))
            defaults.append((b"Proxy-Authorization", b"Basic " + credentials))
        fields = [(name, value) for name, value in defaults if name.lower() not in given] + fields
        lines = [b"CONNECT %b HTTP/1.1" % target, *(b"%b: %b" % field for field in fields)]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _is_open(self, head: bytes) -> bool:
        """Whether there is a tunnel now; False for an interim answer."""
        line = _STATUS_LINE.match(head)
        if line is None:
            raise self._garbage()
        status = int(line[1])
        if 200 <= status < 300:
            self.status = status
            return True
        if 100 <= status < 200 and status != 101:
            return False
        reason = _UNPRINTABLE.sub(" ", (line[2] or b"").decode("latin-1"))[:_LONGEST_REASON].strip()
        raise self._error(f"answers {status} {reason}".rstrip() + (self._hint(head) if status == 407 else ""), status)

    def _hint(self, head: bytes) -> str:
        wanted = sorted({name.decode("ascii") for name in _CHALLENGE.findall(head)})
        if wanted and "basic" not in (name.lower() for name in wanted):
            return f"; it wants {' or '.join(wanted)}, of which h2keep knows nothing: only Basic, and fixed headers"
        if self._proxy.auth is not None:
            return "; it does not accept the user name and the password"
        return "; it wants a user name and a password, which may stand in its URL or in h2keep.Proxy(auth=...)"

    def _garbage(self) -> ProxyError:
        hint = "; does it want https://?" if self._head[:2] == b"\x15\x03" else ""
        return self._error(f"sent something that is not HTTP/1.1: {bytes(self._head[:40])!r}{hint}")

    def _error(self, text: str, status: int | None = None) -> ProxyError:
        return _no_tunnel(self._proxy, self._origin, text, status)


class _Socks5:
    """SOCKS5 (RFC 1928, RFC 1929), by python-socks.

    By its sans-IO layer, which serves any event loop: its proxies for asyncio and trio make streams of their own, which
    would have to be taken apart again to get at the socket.
    """

    status: int | None = None

    def __init__(self, proxy: Proxy, origin: Origin) -> None:
        self._proxy = proxy
        self._origin = origin
        self._received = bytearray()
        self._talk = self._converse()
        self._wanted = 0
        self.unread = b""

    def advance(self, data: bytes | None) -> tuple[bytes, bool]:
        if data == b"":
            raise _no_tunnel(self._proxy, self._origin, "closed the connection without an answer")
        self._received += data or b""
        outgoing = b""
        try:
            if data is None:
                outgoing, self._wanted = next(self._talk)
            while len(self._received) >= self._wanted:
                piece = bytes(self._received[: self._wanted])
                del self._received[: self._wanted]
                more, self._wanted = self._talk.send(piece)
                outgoing += more
        except StopIteration:
            self.unread = bytes(self._received)
            return outgoing, True
        return outgoing, False

    def _converse(self) -> Generator[tuple[bytes, int], bytes, None]:
        """Yields what to send, and how many bytes are then wanted; is sent these."""
        socks5 = _load_socks5()
        connection = socks5.Connection()
        auth = self._proxy.auth or ("", "")
        try:
            # It asks whether there are any, and an empty password would be none.
            offered = socks5.AuthMethodsRequest(*(("user", "password") if self._proxy.auth else (None, None)))
            reply = connection.receive((yield connection.send(offered), 2))
            if reply.method == socks5.AuthMethod.USERNAME_PASSWORD:
                credentials = socks5.AuthRequest(*auth)
                # Its own knows ASCII only.
                credentials.dumps = lambda: _credentials(*auth)
                connection.receive((yield connection.send(credentials), 2))
            yield from self._connect(connection, socks5)
        except socks5.ReplyError as error:
            raise _no_tunnel(self._proxy, self._origin, f"says: {error}") from error

    def _connect(self, connection: Any, socks5: Any) -> Generator[tuple[bytes, int], bytes, None]:
        try:
            request = connection.send(socks5.ConnectRequest(self._origin.host, self._origin.port))
        except ValueError as error:
            raise ConnectError(f"{self._origin.host!r} is not a name that SOCKS can carry: {error}") from error
        reply = yield request, 2
        if reply != bytes([socks5.SOCKS_VER, socks5.ReplyCode.SUCCEEDED]):
            connection.receive(reply)
        reply += yield b"", 3
        # The fifth byte is a name's length, or the first of an address.
        sizes = {socks5.AddressType.IPV4: 3, socks5.AddressType.IPV6: 15, socks5.AddressType.DOMAIN: reply[4]}
        size = sizes.get(reply[3])
        if size is None:
            raise socks5.ReplyError(f"Invalid address type: {reply[3]:#04x}")
        # Where the proxy says that it is connected from is of no interest, and not always an address.
        yield b"", size + 2


def _credentials(user: str, password: str) -> bytes:
    """RFC 1929, in UTF-8."""
    fields = (user.encode("utf-8"), password.encode("utf-8"))
    return b"\x01" + b"".join(bytes([len(field)]) + field for field in fields)


def _load_socks5() -> Any:
    try:
        from python_socks._protocols import socks5
    except ImportError as error:
        raise ImportError(
            "SOCKS proxies need python-socks, which is not installed: pip install 'h2keep[socks]'"
        ) from error
    return socks5


class Tunnel(Wire):
    """The way through a proxy to an origin."""

    def __init__(self, sock: socket.socket, proxy: Proxy, origin: Origin, outer: SecurityLayer) -> None:
        super().__init__(sock)
        self._proxy = proxy
        self._origin = origin
        #: What secures the way to the proxy.
        self._outer = outer
        self._closed = False
        self._unread = b""
        self._status: int | None = None
        #: The tunnel is there, and nothing has come through it.
        self._is_silent = False

    async def open(self) -> None:
        """Ask the proxy for it. Raises `ProxyError`."""
        # What came together with the end of the TLS handshake is no longer in the socket.
        self._unread, self._closed = self._outer.receive(b"")
        negotiation = self._proxy.negotiation(self._origin)
        received: bytes | None = None
        try:
            while True:
                outgoing, done = negotiation.advance(received)
                await self.send(outgoing)
                if done:
                    break
                received = await self.receive()
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            raise _no_tunnel(self._proxy, self._origin, f"lost the connection: {reason}") from error
        self._status = negotiation.status
        self._unread = negotiation.unread
        self._is_silent = True

    def wrap(self, data: bytes) -> bytes:
        """Wire."""
        return self._outer.encrypt(data)

    async def send(self, data: bytes) -> None:
        """Wire. Raises `ProxyError` if the tunnel ends before anything came through it."""
        try:
            await super().send(data)
        except OSError as error:
            if self._is_silent:
                raise self._dropped() from error
            raise

    async def receive(self) -> bytes:
        """Wire. Raises as `send`."""
        try:
            data = await self._receive()
        except OSError as error:
            if self._is_silent:
                raise self._dropped() from error
            raise
        if self._is_silent and not data:
            raise self._dropped()
        self._is_silent = False
        return data

    async def _receive(self) -> bytes:
        data, self._unread = self._unread, b""
        while not data and not self._closed:
            received = await super().receive()
            if not received:
                return b""
            data, self._closed = self._outer.receive(received)
        if not data and self._outer.failure is not None:
            raise self._outer.failure
        return data

    def _dropped(self) -> ProxyError:
        text = "opened it, and closed it before anything came through"
        return _no_tunnel(self._proxy, self._origin, text, self._status)

    def secure(self, layer: SecurityLayer) -> SecurityLayer:
        """Wire."""
        if isinstance(self._outer, Cleartext) and not self._unread:
            return layer
        return TunnelLayer(self._outer, layer, self._unread)


class TunnelLayer:
    """The `SecurityLayer` of a connection in a tunnel that has one of its own: TLS in TLS."""

    def __init__(self, outer: SecurityLayer, inner: SecurityLayer, unread: bytes) -> None:
        self._outer = outer
        self._inner = inner
        #: The tunnel's first bytes, where they came too early for whoever receives.
        self._unread = unread
        self.heard = False

    @property
    def ssl_object(self) -> ssl.SSLObject | None:
        """SecurityLayer: the origin's."""
        return self._inner.ssl_object

    @property
    def failure(self) -> ssl.SSLError | None:
        """SecurityLayer."""
        return self._inner.failure or self._outer.failure

    def receive(self, data: bytes) -> tuple[bytes, bool]:
        """SecurityLayer."""
        data, tunnel_closed = self._outer.receive(data)
        if self._unread:
            data, self._unread = self._unread + data, b""
        self.heard = bool(data)
        plaintext, closed = self._inner.receive(data)
        return plaintext, closed or tunnel_closed

    def encrypt(self, data: bytes | memoryview) -> bytes:
        """SecurityLayer."""
        return self._outer.encrypt(self._inner.encrypt(data))

    def pending(self) -> bool:
        """SecurityLayer."""
        return self._inner.pending() or self._outer.pending()

    def close(self) -> bytes:
        """SecurityLayer."""
        return self._outer.encrypt(self._inner.close()) + self._outer.close()
