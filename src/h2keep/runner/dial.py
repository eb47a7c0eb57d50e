"""From an origin to a connected transport: TCP with happy eyeballs or a unix socket, TLS, ALPN.

`dial` is the one place that decides how an origin is reached, by a proxy or without. Timeouts are the caller's:
everything here can be cancelled at any await and then leaves no socket.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import ssl
import sys
import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio

from h2keep.errors import ConnectError, HTTP2NotSupported
from h2keep.runner import eventloop
from h2keep.runner.proxy import Tunnel
from h2keep.runner.tls import Cleartext, SecurityLayer, Sessions, TLSLayer
from h2keep.runner.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from h2keep.runner.proxy import Proxy

__all__ = ["DialOptions", "Origin", "SocketOption", "Transport", "close_descriptors", "dial"]

SocketOption: TypeAlias = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]

#: How long one address may keep the next one waiting, in seconds (RFC 8305, section 5).
_HAPPY_EYEBALLS_DELAY = 0.25
#: How long to leave a unix socket's full backlog alone, in seconds.
_BACKLOG_DELAY = 0.02


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections lead; requests with equal origins may share one."""

    scheme: str
    #: A name or an address, IPv6 without brackets. TCP connects to it, and TLS checks it.
    host: str
    port: int
    #: The name for SNI and the certificate check where it isn't `host`.
    server_hostname: str | None = None

    def __hash__(self) -> int:
        # Asked for with every request; a string knows its own.
        return hash(self.host) ^ self.port

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class DialOptions:
    """How connections are made, the same for all origins."""

    #: Nothing is changed in it but the ALPN protocols, at each connection's beginning.
    ssl_context: ssl.SSLContext
    #: Protocols offered in ALPN, the preferred one first.
    alpn: tuple[str, ...] = ("h2",)
    #: Path of a unix socket to use in the place of TCP.
    uds: str | None = None
    #: Local address to bind to.
    local_address: str | None = None
    socket_options: tuple[SocketOption, ...] = field(default=())
    #: How often a failed attempt to connect is repeated.
    retries: int = 0
    #: The proxy to use for an origin, None for none; then `uds` is of no account.
    proxy_for: Callable[[Origin], Proxy | None] | None = None
    #: Kept for the next connection to the same origin.
    sessions: Sessions = field(default_factory=Sessions)


@dataclass(slots=True)
class Transport:
    """A connected, non-blocking socket and what secures it."""

    socket: socket.socket
    security: SecurityLayer


async def dial(origin: Origin, options: DialOptions) -> Transport:
    """Connect to an origin.

    Raises `ConnectError`, with the reason that the system or OpenSSL gave; `HTTP2NotSupported` if that is the reason.
    """
    proxy = None if options.proxy_for is None else options.proxy_for(origin)
    wire = await (_reach(origin, options) if proxy is None else _reach_through(proxy, origin, options))
    try:
        if origin.scheme == "http":
            return Transport(wire.socket, wire.secure(Cleartext()))
        layer = _tls_layer(origin, options)
        await _handshake(wire, layer, str(origin))
        _check_alpn(layer, origin, options)
        return Transport(wire.socket, wire.secure(layer))
    except BaseException:
        wire.socket.close()
        raise


async def _reach(origin: Origin, options: DialOptions) -> Wire:
    try:
        sock = await _connect_unix(options.uds, options) if options.uds is not None else await _connect(origin, options)
    except OSError as error:
        where = options.uds or str(origin)
        raise ConnectError(f"cannot connect to {where}: {_reason(error)}") from error
    return Wire(sock)


async def _reach_through(proxy: Proxy, origin: Origin, options: DialOptions) -> Wire:
    """A tunnel. Raises `ConnectError` if the proxy can't be reached, `ProxyError` if it doesn't do as it is asked."""
    try:
        sock = await _connect(Origin(proxy.scheme, proxy.host, proxy.port), options)
    except OSError as error:
        raise ConnectError(f"cannot connect to the proxy {proxy} for {origin}: {_reason(error)}") from error
    try:
        outer: SecurityLayer = Cleartext()
        if proxy.scheme == "https":
            outer = proxy.tls_layer()
            await _handshake(Wire(sock), outer, f"the proxy {proxy} for {origin}")
        tunnel = Tunnel(sock, proxy, origin, outer)
        await tunnel.open()
    except BaseException:
        sock.close()
        raise
    return tunnel


async def _connect(origin: Origin, options: DialOptions) -> socket.socket:
    addresses = _interleave(await _resolve(origin.host, origin.port))
    if len(addresses) == 1:
        return await _attempt(*addresses[0], options)
    return await _race([_attempt_to(address, options) for address in addresses])


def _attempt_to(
    address: tuple[socket.AddressFamily, tuple[object, ...]], options: DialOptions
) -> Callable[[], Awaitable[socket.socket]]:
    return lambda: _attempt(*address, options)


async def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    try:
        # A literal address needs no resolver, hence no thread.
        literal = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return [(family, address) for family, _, _, _, address in literal]
    except (socket.gaierror, UnicodeError):
        pass
    try:
        found: list[Any] = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise ConnectError(f"{host!r} is not a valid host name: {error}") from error
    except RuntimeError:
        # The interpreter is exiting: its thread pools take nothing more, but a thread of one's own may still start.
        found = await _resolve_in_thread(host, port)
    return [(family, address) for family, _, _, _, address in found]


async def _resolve_in_thread(host: str, port: int) -> list[Any]:
    loop = eventloop.current()
    parker = loop.parker()
    found: list[Any] = []
    failure: list[Exception] = []

    def resolve() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # noqa: BLE001
            failure.append(error)
        with contextlib.suppress(RuntimeError):
            loop.call_from_thread(parker.unpark)

    try:
        threading.Thread(target=resolve, name="h2keep resolver", daemon=True).start()
    except RuntimeError as error:
        raise ConnectError(f"{host!r} cannot be resolved any more: {error}") from error
    while not found and not failure:
        await parker.park()
    if failure:
        raise failure[0]
    return found


def _interleave(
    addresses: Iterable[tuple[socket.AddressFamily, tuple[object, ...]]],
) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    """Alternate the families, the resolver's favourite first (RFC 8305, section 4)."""
    unique = list(dict.fromkeys(addresses))
    favourite = [address for address in unique if address[0] == unique[0][0]]
    others = [address for address in unique if address[0] != unique[0][0]]
    mixed = []
    while favourite or others:
        mixed += favourite[:1] + others[:1]
        del favourite[:1], others[:1]
    return mixed


async def _race(attempts: list[Callable[[], Awaitable[socket.socket]]]) -> socket.socket:
    """The first attempt to succeed; each starts when the one before failed or took too long."""
    winner: socket.socket | None = None
    failures: list[OSError] = []

    async def run(attempt: Callable[[], Awaitable[socket.socket]], done: anyio.Event) -> None:
        nonlocal winner
        try:
            sock = await attempt()
        except OSError as error:
            failures.append(error)
            done.set()
        else:
            if winner is None:
                winner = sock
                racers.cancel_scope.cancel()
            else:
                sock.close()

    try:
        async with anyio.create_task_group() as racers:
            for attempt in attempts:
                done = anyio.Event()
                racers.start_soon(run, attempt, done)
                with anyio.move_on_after(_HAPPY_EYEBALLS_DELAY):
                    await done.wait()
    except BaseException:
        if winner is not None:
            winner.close()
        raise
    if winner is None:
        raise failures[0]
    return winner


#: Every socket that was made here and still exists, for a child process to let go of; by id.
_sockets: weakref.WeakValueDictionary[int, socket.socket] = weakref.WeakValueDictionary()


def _new_socket(family: socket.AddressFamily) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    _sockets[id(sock)] = sock
    return sock


def close_descriptors() -> None:
    """In a child process: close this process's copies of all descriptors, which leaves the connections alone."""
    for reference in _sockets.valuerefs():
        sock = reference()
        if sock is not None and sock.fileno() != -1:
            os.close(sock.detach())


async def _attempt(family: socket.AddressFamily, address: tuple[object, ...], options: DialOptions) -> socket.socket:
    sock = _new_socket(family)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _set_options(sock, options)
        if options.local_address is not None:
            sock.bind((options.local_address, 0))
        await _connect_socket(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_unix(path: str, options: DialOptions) -> socket.socket:
    sock = _new_socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        _set_options(sock, options)
        while True:
            try:
                await _connect_socket(sock, path)
            except BlockingIOError:
                # The listener's backlog is full. The kernel has not begun anything that could be waited for.
                await anyio.sleep(_BACKLOG_DELAY)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


def _set_options(sock: socket.socket, options: DialOptions) -> None:
    for option in options.socket_options:
        try:
            sock.setsockopt(*option)
        except OSError as error:
            raise OSError(error.errno, f"socket option {option!r}: {_reason(error)}") from error


async def _connect_socket(sock: socket.socket, address: object) -> None:
    code = sock.connect_ex(address)  # type: ignore[arg-type]
    # Windows says EWOULDBLOCK for it. Elsewhere that means that nothing has begun.
    if code == errno.EINPROGRESS or (code == errno.EWOULDBLOCK and sys.platform == "win32"):
        await anyio.wait_writable(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _tls_layer(origin: Origin, options: DialOptions) -> TLSLayer:
    name = origin.server_hostname or origin.host
    sessions = options.sessions
    key = sessions.key(options.ssl_context, origin)
    try:
        return TLSLayer(
            options.ssl_context,
            name,
            alpn=options.alpn,
            session=sessions.take(key),
            on_session=None if key is None else functools.partial(sessions.put, key),
        )
    except ValueError as error:
        raise ConnectError(f"{origin}: {name!r} cannot be a server's name in TLS: {error}") from error


async def _handshake(wire: Wire, layer: TLSLayer, name: str) -> None:
    received: bytes | None = None
    try:
        while True:
            outgoing, done = layer.handshake(received)
            await wire.send(outgoing)
            if done:
                return
            received = await wire.receive()
            if received == b"":
                raise ConnectError(f"{name}: the server closed the connection during the TLS handshake")
    except ssl.SSLError as error:
        # The alert is a courtesy: a server that is gone already doesn't change why TLS failed.
        with contextlib.suppress(OSError):
            wire.socket.send(wire.wrap(layer.farewell()))
        hint = "; is this a port for http://?" if error.reason == "WRONG_VERSION_NUMBER" else ""
        raise ConnectError(f"{name}: TLS failed: {_reason(error)}{hint}") from error
    except OSError as error:
        raise ConnectError(f"{name}: the connection failed during the TLS handshake: {_reason(error)}") from error


def _check_alpn(layer: TLSLayer, origin: Origin, options: DialOptions) -> None:
    chosen = layer.ssl_object.selected_alpn_protocol()
    if chosen != "h2":
        raise HTTP2NotSupported(
            f"{origin} does not speak HTTP/2: of the protocols offered in ALPN ({', '.join(options.alpn)}) the server "
            f"chose {chosen or 'none'}. PING keepalive needs HTTP/2: enable it on the server or the proxy before it, "
            "or use an HTTP/1.1 transport for this origin",
            alpn=chosen,
        )


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
