"""From an origin to a connection: addresses and their race, sockets, TLS and its refusals, unix sockets."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import time
import warnings
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trustme
from hyperframe import frame as frames

import h2keep
from h2keep.protocol import events
from h2keep.runner import dial as module
from h2keep.runner.dial import DialOptions, Origin, SocketOption, dial
from support.clock import virtual_time
from support.leaks import open_sockets
from support.raw import RawServer, answering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

NAME = "dual.example"


@pytest.fixture
def options(client_ssl: ssl.SSLContext) -> DialOptions:
    client_ssl.set_alpn_protocols(["h2"])
    return DialOptions(client_ssl)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make `NAME`, and nothing else, have these addresses."""

    def give(*addresses: tuple[str, int]) -> None:
        async def getaddrinfo(host: str, port: int, *, type: int) -> list[Any]:  # noqa: A002
            assert host == NAME
            found = []
            for address in addresses:
                family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
                found.append((family, type, socket.IPPROTO_TCP, "", address))
            return found

        monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)

    return give


@contextlib.contextmanager
def black_hole(host: str = "127.0.0.2") -> Iterator[tuple[str, int]]:
    """An address that never answers: a listener whose backlog is full."""
    with socket.socket() as listener, socket.socket() as filler:
        listener.bind((host, 0))
        listener.listen(0)
        filler.connect(listener.getsockname())
        yield listener.getsockname()


@contextlib.contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        listener.setblocking(False)
        yield listener


def refused(host: str = "127.0.0.1") -> tuple[str, int]:
    """An address at which nobody listens."""
    with listening(host) as listener:
        address: tuple[str, int] = listener.getsockname()[:2]
    return address


def was_tried(listener: socket.socket) -> bool:
    """Whether anybody has connected."""
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


async def connects(origin: Origin, options: DialOptions) -> tuple[tuple[Any, ...], float]:
    """Dial over TCP alone; where it led, and after how long."""
    began = anyio.current_time()
    transport = await dial(origin, options)
    with transport.socket as sock:
        return sock.getpeername()[:2], anyio.current_time() - began


# Happy eyeballs


@virtual_time
async def test_a_first_address_that_never_answers_costs_a_quarter_of_a_second(
    resolve: Callable[..., None], options: DialOptions
) -> None:
    with black_hole() as hole, listening() as listener:
        resolve(hole, listener.getsockname())
        before = open_sockets()
        address, seconds = await connects(Origin("http", NAME, 80), options)
        assert address == listener.getsockname()
        assert seconds == pytest.approx(0.25, abs=0.01)
        # The loser is closed, too.
        assert open_sockets() == before


@virtual_time
async def test_a_first_address_that_refuses_costs_nothing(resolve: Callable[..., None], options: DialOptions) -> None:
    with listening() as listener:
        resolve(refused("127.0.0.2"), refused("127.0.0.3"), listener.getsockname())
        address, seconds = await connects(Origin("http", NAME, 80), options)
        assert address == listener.getsockname()
        assert seconds < 0.01


@virtual_time
async def test_no_further_address_is_tried_once_one_answers(resolve: Callable[..., None], options: DialOptions) -> None:
    with listening() as first, listening("127.0.0.2") as second:
        resolve(first.getsockname(), second.getsockname())
        address, _ = await connects(Origin("http", NAME, 80), options)
        assert address == first.getsockname()
        await anyio.sleep(1.0)
        assert not was_tried(second)


@virtual_time
async def test_when_every_address_refuses_the_error_says_so(resolve: Callable[..., None], options: DialOptions) -> None:
    resolve(refused(), refused("127.0.0.2"), refused("127.0.0.3"))
    with pytest.raises(h2keep.ConnectError, match=r"cannot connect to http://dual.example:80: Connection refused"):
        await dial(Origin("http", NAME, 80), options)


@virtual_time
async def test_an_address_that_never_answers_does_not_hide_that_the_others_refuse(
    resolve: Callable[..., None], options: DialOptions
) -> None:
    with black_hole() as hole:
        resolve(hole, refused())
        before = open_sockets()
        with anyio.move_on_after(100.0) as scope:
            await dial(Origin("http", NAME, 80), options)
        assert scope.cancelled_caught
        assert open_sockets() == before


@virtual_time
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3, 10.0])
async def test_cancelling_the_race_leaves_no_socket(
    resolve: Callable[..., None], options: DialOptions, seconds: float
) -> None:
    with black_hole() as one, black_hole("127.0.0.3") as two:
        resolve(one, two)
        before = open_sockets()
        with anyio.move_on_after(seconds) as scope:
            await dial(Origin("http", NAME, 80), options)
        assert scope.cancelled_caught
        assert open_sockets() == before


@virtual_time
async def test_ipv6_and_ipv4_take_turns(resolve: Callable[..., None], options: DialOptions) -> None:
    with listening("::1") as six, black_hole() as hole:
        resolve(hole, ("127.0.0.1", refused()[1]), six.getsockname()[:2])
        address, seconds = await connects(Origin("http", NAME, 80), options)
        assert address == six.getsockname()[:2]
        # Second in turn, though the resolver named it last.
        assert seconds == pytest.approx(0.25, abs=0.01)


async def test_the_resolvers_favourite_goes_first_then_families_alternate() -> None:
    four, six = socket.AF_INET, socket.AF_INET6
    found: list[Any] = [(six, ("a",)), (six, ("b",)), (six, ("b",)), (four, ("c",)), (six, ("d",)), (four, ("e",))]
    assert [address[0] for _, address in module._interleave(found)] == ["a", "c", "b", "e", "d"]


async def test_a_literal_address_asks_no_resolver(options: DialOptions, resolve: Callable[..., None]) -> None:
    resolve()
    for host in ("127.0.0.1", "::1"):
        with listening(host) as listener:
            address, _ = await connects(Origin("http", host, listener.getsockname()[1]), options)
            assert address == listener.getsockname()[:2]


async def test_resolving_does_not_block_the_event_loop(options: DialOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    original = socket.getaddrinfo

    def slow(*args: Any, **kwargs: Any) -> Any:
        flags = kwargs.get("flags", 0) or (args[5] if len(args) > 5 else 0)
        if flags & socket.AI_NUMERICHOST:
            return original(*args, **kwargs)
        time.sleep(0.3)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await anyio.sleep(0.01)
            ticks += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        with pytest.raises(h2keep.ConnectError, match="Name or service not known"):
            await dial(Origin("http", NAME, 80), options)
        tasks.cancel_scope.cancel()
    assert ticks > 2


async def test_an_unresolvable_host_is_named() -> None:
    async with h2keep.AsyncClient(timeout=None, http1=False) as client:
        with pytest.raises(h2keep.ConnectError, match=r"cannot connect to http://nowhere.invalid:80: ") as caught:
            await client.get("http://nowhere.invalid")
    assert isinstance(caught.value.__cause__, socket.gaierror)
    assert caught.value.unprocessed


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example"])
async def test_a_name_that_can_be_none_is_refused(host: str) -> None:
    async with h2keep.AsyncClient(timeout=None, http1=False) as client:
        with pytest.raises(h2keep.ConnectError, match=host.replace(".", r"\.")):
            await client.get(f"http://{host}")


async def test_a_refused_connection_is_named() -> None:
    host, port = refused()
    async with h2keep.AsyncClient(timeout=None) as client:
        with pytest.raises(h2keep.ConnectError, match=f"cannot connect to https://{host}:{port}: Connection refused"):
            await client.get(f"https://{host}:{port}")


# Sockets


async def test_the_sockets_options_are_set() -> None:
    wanted: list[SocketOption] = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, b"\7\0\0\0"),
    ]
    async with (
        RawServer.listen() as server,
        h2keep.AsyncClient(http1=False, verify=False, socket_options=wanted) as client,
    ):
        server.serve(answering())
        response = await client.get(server.url)
        sock = response._source.connection.transport.socket
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 7
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not sock.getblocking()


async def test_k5_the_kernel_may_hold_little_that_is_not_sent() -> None:
    async with RawServer.listen() as server, h2keep.AsyncClient(http1=False, verify=False) as client:
        server.serve(answering())
        response = await client.get(server.url)
        sock = response._source.connection.transport.socket
        assert 16 * 1024 <= sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) <= 256 * 1024


async def test_an_option_that_the_kernel_refuses_is_named() -> None:
    host, port = refused()
    async with h2keep.AsyncClient(http1=False, verify=False, socket_options=[(socket.SOL_SOCKET, 9999, 1)]) as client:
        with pytest.raises(h2keep.ConnectError, match=r"socket option \(1, 9999, 1\): Protocol not available"):
            await client.get(f"http://{host}:{port}")


async def test_the_local_address_is_bound() -> None:
    async with (
        RawServer.listen() as server,
        h2keep.AsyncClient(http1=False, verify=False, local_address="127.0.0.3") as client,
    ):
        server.serve(answering())
        await client.get(server.url)
        assert server.peers[0].sock.getpeername()[0] == "127.0.0.3"


async def test_a_local_address_of_the_other_family_is_a_connect_error() -> None:
    async with h2keep.AsyncClient(http1=False, verify=False, local_address="::1") as client:
        with pytest.raises(h2keep.ConnectError, match=r"cannot connect to http://127.0.0.1:"):
            await client.get(f"http://127.0.0.1:{refused()[1]}")


# Unix sockets


@pytest.mark.parametrize("tls", [False, True], ids=["h2c", "tls"])
async def test_a_unix_socket_in_the_place_of_tcp(
    tmp_path: Path, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, tls: bool
) -> None:
    path = str(tmp_path / "socket")
    async with (
        RawServer.listen(server_ssl if tls else None, uds=path) as server,
        h2keep.AsyncClient(http1=False, uds=path, verify=client_ssl) as client,
    ):
        server.serve(answering())
        assert (await client.get(server.url + "/path")).content == b"ok"
        assert server.peers[0].requests[1].headers[":authority"] == "localhost"


async def test_a_unix_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with h2keep.AsyncClient(http1=False, verify=False, uds=path) as client:
        with pytest.raises(h2keep.ConnectError, match=f"cannot connect to {path}: No such file or directory"):
            await client.get("http://localhost")


async def test_a_unix_sockets_full_backlog_is_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with RawServer.listen(uds=path, backlog=0) as server:
        filler = socket.socket(socket.AF_UNIX)
        filler.connect(path)
        async with h2keep.AsyncClient(http1=False, verify=False, uds=path, timeout=None) as client:
            answers = []

            async def get() -> None:
                answers.append(await client.get("http://localhost"))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(get)
                await anyio.sleep(0.1)
                filler.close()
                await server.accept()
                server.serve(answering())
            assert answers[0].content == b"ok"


@virtual_time
async def test_a_unix_sockets_full_backlog_runs_into_the_connect_timeout(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with RawServer.listen(uds=path, backlog=0):
        with socket.socket(socket.AF_UNIX) as filler:
            filler.connect(path)
            async with h2keep.AsyncClient(http1=False, verify=False, uds=path) as client:
                with pytest.raises(h2keep.ConnectTimeout, match=r"5.0 s \(connect timeout\)"):
                    await client.get("http://localhost")


# TLS


def server_context(ca: trustme.CA, *names: str, alpn: list[str] | None = None, **options: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*(names or ("127.0.0.1",)), **options).configure_cert(context)
    context.set_alpn_protocols(["h2"] if alpn is None else alpn)
    return context


@contextlib.asynccontextmanager
async def refusing(context: ssl.SSLContext, **options: Any) -> Any:
    """A client, and the URL of a server whose TLS it won't get through."""
    async with RawServer.listen(context) as server, h2keep.AsyncClient(timeout=None, **options) as client:
        server.serve(answering())
        yield client, server.url


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_1_2_and_1_3_both_work(ca: trustme.CA, ca_path: Path, version: ssl.TLSVersion) -> None:
    context = server_context(ca)
    context.minimum_version = context.maximum_version = version
    async with RawServer.listen(context) as server, h2keep.AsyncClient(verify=str(ca_path)) as client:
        server.serve(answering(b"x" * 100_000))
        response = await client.get(server.url)
        assert response.content == b"x" * 100_000
        tls = response._source.connection.transport.security.ssl_object
        assert tls is not None
        assert tls.version() == version.name.replace("_", ".")
        assert server.peers[0].alpn == "h2"


async def test_a_server_without_tls_1_2_is_refused(ca: trustme.CA, ca_path: Path) -> None:
    context = server_context(ca)
    # OpenSSL 3 keeps TLS 1.1 behind security level 0.
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with refusing(context, verify=str(ca_path)) as (client, url):
        with pytest.raises(h2keep.ConnectError, match=r"(?i)TLS failed: .*protocol.version") as caught:
            await client.get(url)
    assert isinstance(caught.value.__cause__, ssl.SSLError)


@pytest.mark.parametrize(
    ("offered", "http1", "expected"),
    [
        (["http/1.1"], True, r"offered in ALPN \(h2, http/1\.1\) the server chose http/1\.1"),
        (["http/1.1"], False, r"offered in ALPN \(h2\) the server chose none"),
        ([], True, r"offered in ALPN \(h2, http/1\.1\) the server chose none"),
    ],
)
async def test_a_server_without_http2_is_refused_with_advice(
    ca: trustme.CA, ca_path: Path, offered: list[str], http1: bool, expected: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    if offered:
        context.set_alpn_protocols(offered)
    async with (
        RawServer.listen(context) as server,
        h2keep.AsyncClient(verify=str(ca_path), http1=http1) as client,
        anyio.create_task_group() as tasks,
    ):

        async def get() -> None:
            with pytest.raises(h2keep.ConnectError, match=expected) as caught:
                await client.get(server.url)
            assert "enable it on the server" in str(caught.value)
            assert caught.value.unprocessed

        tasks.start_soon(get)
        peer = await server.accept()
        await peer.tls_handshake()


YEAR = datetime.timedelta(days=365)


@pytest.mark.parametrize(
    ("names", "life", "expected"),
    [
        (("localhost",), {}, "IP address mismatch, certificate is not valid for '127.0.0.1'"),
        (("127.0.0.1",), {"not_before": -3 * YEAR, "not_after": -YEAR}, "certificate has expired"),
        (("127.0.0.1",), {"not_before": YEAR, "not_after": 2 * YEAR}, "certificate is not yet valid"),
    ],
)
async def test_a_bad_certificate_is_refused_with_openssls_reason(
    ca: trustme.CA, ca_path: Path, names: tuple[str, ...], life: dict[str, datetime.timedelta], expected: str
) -> None:
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    dates: dict[str, Any] = {name: now + distance for name, distance in life.items()}
    async with refusing(server_context(ca, *names, **dates), verify=str(ca_path)) as (client, url):
        with pytest.raises(h2keep.ConnectError) as caught:
            await client.get(url)
        assert str(caught.value).startswith(f"{url}: TLS failed: ")
        assert expected in str(caught.value)
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)


async def test_a_certificate_of_an_unknown_authority_is_refused(ca_path: Path) -> None:
    async with refusing(server_context(trustme.CA()), verify=str(ca_path)) as (client, url):
        with pytest.raises(h2keep.ConnectError, match=r"TLS failed: .*unable to get local issuer certificate"):
            await client.get(url)


async def test_verification_can_be_switched_off() -> None:
    context = server_context(trustme.CA(), "elsewhere.example")
    async with RawServer.listen(context) as server, h2keep.AsyncClient(verify=False) as client:
        server.serve(answering())
        assert (await client.get(server.url)).content == b"ok"


async def test_a_server_that_wants_a_certificate_gets_it(ca: trustme.CA, ca_path: Path, tmp_path: Path) -> None:
    context = server_context(ca)
    ca.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    path = tmp_path / "client.pem"
    ca.issue_cert("client.example").private_key_and_cert_chain_pem.write_to_path(path)
    async with RawServer.listen(context) as server:
        server.serve(answering())
        async with h2keep.AsyncClient(verify=str(ca_path), cert=str(path)) as client:
            assert (await client.get(server.url)).content == b"ok"


async def test_a_server_that_wants_a_certificate_and_gets_none_tells_the_reason(ca: trustme.CA, ca_path: Path) -> None:
    context = server_context(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    # In TLS 1.3 the client is done before the server looks: its refusal meets a connection that is in use.
    async with refusing(context, verify=str(ca_path)) as (client, url):
        with pytest.raises(h2keep.ConnectionLost, match=r"(?i)alert.certificate.required"):
            await client.get(url)


async def test_a_server_that_speaks_no_tls_is_refused_with_a_hint(client_ssl: ssl.SSLContext) -> None:
    async with (
        RawServer.listen() as server,
        h2keep.AsyncClient(verify=client_ssl, timeout=None) as client,
        anyio.create_task_group() as tasks,
    ):

        async def get() -> None:
            with pytest.raises(h2keep.ConnectError, match=r"TLS failed: .*; is this a port for http://\?"):
                await client.get(server.url.replace("http", "https"))

        tasks.start_soon(get)
        peer = await server.accept()
        await peer.send_bytes(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_server_that_goes_away_during_the_handshake_is_a_connect_error(
    client_ssl: ssl.SSLContext, server_ssl: ssl.SSLContext, how: str
) -> None:
    async with (
        RawServer.listen(server_ssl) as server,
        h2keep.AsyncClient(verify=client_ssl, timeout=None) as client,
        anyio.create_task_group() as tasks,
    ):

        async def get() -> None:
            with pytest.raises(h2keep.ConnectError, match="during the TLS handshake") as caught:
                await client.get(server.url)
            assert caught.value.unprocessed

        tasks.start_soon(get)
        peer = await server.accept()
        assert await peer._receive_ciphertext()
        getattr(peer, how)()


async def test_a_failed_handshake_keeps_its_reason_if_the_server_is_gone_before_the_alert(
    client_ssl: ssl.SSLContext,
) -> None:
    async with (
        RawServer.listen(server_context(trustme.CA())) as server,
        h2keep.AsyncClient(verify=client_ssl, timeout=None) as client,
        anyio.create_task_group() as tasks,
    ):

        async def get() -> None:
            with pytest.raises(h2keep.ConnectError, match=r"TLS failed: .*unable to get local issuer certificate"):
                await client.get(server.url)

        tasks.start_soon(get)
        peer = await server.accept()
        assert peer._tls is not None
        peer._tls_in.write(await peer._receive_ciphertext())
        with pytest.raises(ssl.SSLWantReadError):
            peer._tls.do_handshake()
        # All in one step, so that the client's alert meets the reset.
        peer._put(peer._tls_out.read())
        peer.abort()


async def test_a_name_that_tls_cannot_check_is_a_connect_error(client_ssl: ssl.SSLContext) -> None:
    with listening() as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        async with h2keep.AsyncClient(verify=client_ssl) as client:
            with pytest.raises(h2keep.ConnectError, match=r"'\.example' cannot be a server's name in TLS"):
                await client.get(url, extensions={"sni_hostname": ".example"})


@virtual_time
async def test_cancelling_the_handshake_leaves_no_socket(options: DialOptions) -> None:
    with listening() as listener:
        before = open_sockets()
        with anyio.move_on_after(1.0) as scope:
            await dial(Origin("https", *listener.getsockname()), options)
        assert scope.cancelled_caught
        assert open_sockets() == before


# The connect timeout


@virtual_time
async def test_the_connect_timeout_covers_tcp() -> None:
    with black_hole() as hole:
        async with h2keep.AsyncClient(
            http1=False, verify=False, timeout=h2keep.Timeout(connect=3.0, read=None)
        ) as client:
            began = anyio.current_time()
            with pytest.raises(h2keep.ConnectTimeout, match=r"3.0 s \(connect timeout\)") as caught:
                await client.get("http://{}:{}".format(*hole))
            assert anyio.current_time() - began == pytest.approx(3.0, abs=0.01)
            assert caught.value.unprocessed


@virtual_time
async def test_the_connect_timeout_covers_tls(client_ssl: ssl.SSLContext) -> None:
    with listening() as listener:
        timeout = h2keep.Timeout(connect=3.0, read=None)
        async with h2keep.AsyncClient(verify=client_ssl, timeout=timeout) as client:
            began = anyio.current_time()
            with pytest.raises(h2keep.ConnectTimeout) as caught:
                await client.get("https://{}:{}".format(*listener.getsockname()))
            assert anyio.current_time() - began == pytest.approx(3.0, abs=0.01)
            assert caught.value.unprocessed


@virtual_time
@pytest.mark.parametrize("tls", [False, True], ids=["h2c", "tls"])
async def test_the_connect_timeout_covers_the_servers_settings(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, tls: bool
) -> None:
    async with (
        RawServer.listen(server_ssl if tls else None) as server,
        h2keep.AsyncClient(http1=False, verify=client_ssl, timeout=h2keep.Timeout(connect=3.0, read=None)) as client,
    ):
        async with anyio.create_task_group() as tasks:

            async def get() -> None:
                began = anyio.current_time()
                with pytest.raises(h2keep.ConnectTimeout, match=r"no HTTP/2 SETTINGS within 3.0 s") as caught:
                    await client.get(server.url)
                assert anyio.current_time() - began == pytest.approx(3.0, abs=0.01)
                # The request had gone out.
                assert not caught.value.unprocessed

            tasks.start_soon(get)
            tasks.start_soon(get)
            await (await server.accept()).tls_handshake()
        server.serve(answering())
        assert (await client.get(server.url)).content == b"ok"
        assert len(server.peers) == 2


@virtual_time
async def test_without_a_connect_timeout_the_servers_settings_may_take_their_time() -> None:
    timeout = h2keep.Timeout(connect=None, read=None)
    async with (
        RawServer.listen() as server,
        h2keep.AsyncClient(http1=False, verify=False, timeout=timeout) as client,
        anyio.create_task_group() as tasks,
    ):

        async def get() -> None:
            assert (await client.get(server.url)).content == b"ok"

        tasks.start_soon(get)
        peer = await server.accept()
        await anyio.sleep(40.0)
        await peer.handshake()
        await peer.respond((await peer.request()).stream_id, body=b"ok")


async def test_settings_that_come_with_the_end_of_the_handshake_are_read_at_once(
    ca: trustme.CA, client_ssl: ssl.SSLContext
) -> None:
    context = server_context(ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    ready = anyio.Event()

    def hook(_stats: h2keep.ConnectionStats, event: events.ConnectionEvent) -> None:
        if isinstance(event, events.ConnectionReady):
            ready.set()

    async with (
        RawServer.listen(context) as server,
        h2keep.AsyncClient(verify=client_ssl, timeout=None, event_hook=hook) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(client.get, server.url)
        peer = await server.accept()
        tls, tls_in, tls_out = peer._tls, peer._tls_in, peer._tls_out
        assert tls is not None
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                await peer.send_ciphertext(tls_out.read())
                tls_in.write(await peer._receive_ciphertext())
            else:
                break
        # TLS's last word and HTTP/2's first in one packet, and not a byte after it.
        await peer.send_ciphertext(tls_out.read() + peer.encrypt(frames.SettingsFrame(0).serialize()))
        with anyio.fail_after(60.0):
            await ready.wait()
        tasks.cancel_scope.cancel()
