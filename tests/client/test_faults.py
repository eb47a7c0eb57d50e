"""Bad input and bad servers: each a specific error whose message helps, and nothing else on the connection is hurt."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from support.raw import RawServer, answering

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from support.raw import Peer, RawRequest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]


@pytest.fixture
async def server(leak_check: None) -> AsyncIterator[RawServer]:
    """An h2c server that does nothing yet."""
    async with RawServer.listen() as server:
        yield server


@pytest.fixture
async def client(leak_check: None) -> AsyncIterator[h2keep.AsyncClient]:
    """A client for h2c, without timeouts."""
    async with h2keep.AsyncClient(http1=False, verify=False, timeout=None) as client:
        yield client


#: Arguments, and what is raised for them.
Bad = tuple[dict[str, Any], type[Exception], str]

# Arguments of the client


BAD_ARGUMENTS: list[Bad] = [
    ({"verify": "/nowhere/ca.pem"}, OSError, r"^verify: '/nowhere/ca.pem' is neither a file nor a directory$"),
    ({"verify": None}, TypeError, r"^verify: None is neither"),
    ({"cert": "/nowhere/cert.pem"}, OSError, r"cert: .*'/nowhere/cert.pem'"),
    ({"engine": "h3"}, ValueError, r"^engine: 'h3' is not one of: 'h2'"),
    ({"engine": None}, ValueError, r"^engine: None is not one of: 'h2'"),
    ({"keepalive": 30.0}, TypeError, r"^keepalive: 30.0 is not a Keepalive$"),
    ({"keepalive": True}, TypeError, r"^keepalive: True is not a Keepalive$"),
    ({"limits": 10}, TypeError, r"^limits: 10 is not a Limits$"),
    ({"timeout": "5"}, ValueError, r"^timeout: connect must be None or a number of seconds from 0 on, not '5'$"),
    ({"timeout": -1}, ValueError, r"^timeout: connect must be .* not -1$"),
    ({"uds": 5}, TypeError, r"^uds: 5 is not a str$"),
    ({"local_address": "eth0"}, ValueError, r"^local_address: 'eth0' is not an IP address$"),
    ({"local_address": "127.0.0.1:80"}, ValueError, r"^local_address: '127.0.0.1:80' is not"),
    ({"socket_options": [(1, 2)]}, TypeError, r"^socket_options: \(1, 2\) is not \(level, name, value\)$"),
    ({"headers": {"x": 5}}, TypeError, r"^headers: 5 is neither str nor bytes$"),
    ({"headers": "x: y"}, TypeError, r"^headers: 'x: y' is neither a mapping nor pairs of names and values$"),
    ({"headers": None}, TypeError, r"^headers: None is neither a mapping"),
]


async def test_a_client_refuses_arguments_by_name() -> None:
    for arguments, error, message in BAD_ARGUMENTS:
        with pytest.raises(error, match=message):
            h2keep.AsyncClient(**{"verify": False, **arguments})


async def test_a_certificate_beside_a_context_is_refused(client_ssl: ssl.SSLContext) -> None:
    with pytest.raises(ValueError, match=r"^cert: load the certificate into the ssl.SSLContext"):
        h2keep.AsyncClient(verify=client_ssl, cert="client.pem")


@pytest.mark.parametrize("name", ["connect", "read", "write", "pool"])
async def test_timeouts_are_none_or_seconds(name: str) -> None:
    fine: tuple[Any, ...] = (None, 0, 0.0, 5, 0.25, 1e9, math.inf)
    for good in fine:
        assert getattr(h2keep.Timeout(**{name: good}), name) == good
    nonsense: tuple[Any, ...] = (-1, -0.001, math.nan, -math.inf, "5", b"5", True, [5], {})
    for bad in nonsense:
        with pytest.raises(ValueError, match=rf"^timeout: {name} must be None or a number of seconds from 0 on, not "):
            h2keep.Timeout(**{name: bad})


async def test_limits_are_none_or_numbers() -> None:
    good: list[tuple[str, Any]] = [
        ("max_connections", None),
        ("max_connections", 1),
        ("max_keepalive_connections", 0),
        ("max_keepalive_connections", None),
        ("keepalive_expiry", 0),
        ("keepalive_expiry", 0.5),
        ("keepalive_expiry", math.inf),
        ("keepalive_expiry", None),
    ]
    for name, value in good:
        assert getattr(h2keep.Limits(**{name: value}), name) == value
    bad: list[tuple[str, list[Any]]] = [
        ("max_connections", [0, -1, 1.5, "10", True, math.nan]),
        ("max_keepalive_connections", [-1, 0.5, "10", False]),
        ("keepalive_expiry", [-1, math.nan, "5", True]),
    ]
    for name, values in bad:
        for value in values:
            with pytest.raises(ValueError, match=rf"^limits: {name} must be None or .* not {value!r}$"):
                h2keep.Limits(**{name: value})


# Arguments of a request


BAD_URLS: list[tuple[str, str]] = [
    ("ftp://example.com", r"'ftp://example.com' must begin with https:// or http://"),
    ("example.com/path", r"'example.com/path' must begin with https:// or http://"),
    ("/path", r"'/path' must begin"),
    ("", r"'' must begin"),
    ("https:example.com", r"names no host"),
    ("https://", r"'https://' names no host"),
    ("https:///path", r"names no host"),
    ("https://:443/", r"names no host"),
    ("https://example.com:0/", r"nothing can listen on port 0"),
    ("https://example.com:99999/", r"'https://example.com:99999/': Port out of range 0-65535"),
    ("https://example.com:-1/", r"Port"),
    ("https://example.com:http/", r"Port could not be cast to integer value as 'http'"),
    ("https://[::1/", r"Invalid IPv6 URL"),
    ("https://example.com/\r\nx: y", r"holds control characters"),
    ("https://exam\tple.com/", r"holds control characters"),
    ("https://example.com/\x00", r"holds control characters"),
    ("https://ü" + "x" * 70 + ".example/", r"is not a valid host name"),
]


async def test_a_url_that_leads_nowhere_is_refused(client: h2keep.AsyncClient) -> None:
    for url, message in BAD_URLS:
        with pytest.raises(h2keep.UnsupportedProtocol, match=rf"^url: .*{message}") as caught:
            await client.get(url)
        assert caught.value.unprocessed


async def test_a_password_in_a_url_is_refused_and_not_repeated(client: h2keep.AsyncClient) -> None:
    for url in ("https://user:hunter2@example.com/", "https://hunter2@example.com:bad/", "ftp://u:hunter2@example.com"):
        with pytest.raises(h2keep.UnsupportedProtocol, match="use an Authorization header") as caught:
            await client.get(url)
        assert "hunter2" not in str(caught.value)


async def test_a_url_of_another_type_is_refused(client: h2keep.AsyncClient) -> None:
    others: tuple[Any, ...] = (b"https://example.com", None, 5)
    for url in others:
        with pytest.raises(TypeError, match=r"^url: .* is not a str$"):
            await client.get(url)


BAD_REQUESTS: list[Bad] = [
    ({"method": "GE T"}, h2keep.LocalProtocolError, r"^method: b'GE T' is not a token"),
    ({"method": ""}, h2keep.LocalProtocolError, r"^method: b'' is not a token"),
    ({"method": "GÉT"}, h2keep.LocalProtocolError, r"^method: "),
    ({"headers": {"x\r\ny": "1"}}, h2keep.LocalProtocolError, r"^header name b'x\\r\\ny' is not a lower-case token"),
    ({"headers": {"": "1"}}, h2keep.LocalProtocolError, r"^header name b'' is not"),
    ({"headers": {"na me": "1"}}, h2keep.LocalProtocolError, r"^header name b'na me' is not"),
    ({"headers": {":path": "/"}}, h2keep.LocalProtocolError, r"^header name b':path' is not"),
    ({"headers": {"ü": "1"}}, h2keep.LocalProtocolError, r"^header name b'\\xfc' is not"),
    ({"headers": {"x-a": "1\r\nx-b: 2"}}, h2keep.LocalProtocolError, r"^header 'x-a': .* holds CR, LF or NUL"),
    ({"headers": {"x-a": "1\n"}}, h2keep.LocalProtocolError, r"^header 'x-a': .* holds CR, LF or NUL"),
    ({"headers": {"x-a": "\x00"}}, h2keep.LocalProtocolError, r"^header 'x-a': .* holds CR, LF or NUL"),
    ({"headers": {"Connection": "close"}}, h2keep.LocalProtocolError, r"^header 'connection' is not allowed in HTTP/2"),
    ({"headers": {"Transfer-Encoding": "chunked"}}, h2keep.LocalProtocolError, r"^header 'transfer-encoding' is not"),
    ({"headers": {"Upgrade": "h2c"}}, h2keep.LocalProtocolError, r"^header 'upgrade' is not"),
    ({"headers": {"TE": "gzip"}}, h2keep.LocalProtocolError, r"^header 'te': .*'trailers' alone"),
    ({"headers": [("Host", "a"), ("host", "b")]}, h2keep.LocalProtocolError, r"^header 'host' is not allowed"),
    ({"headers": {"Host": "a b"}}, h2keep.LocalProtocolError, r"^Host: b'a b' is not a valid authority"),
    ({"headers": {"Host": "user@a"}}, h2keep.LocalProtocolError, r"^Host: b'user@a' is not a valid authority"),
    ({"headers": {"Content-Length": "-5"}}, h2keep.LocalProtocolError, r"^header 'content-length': b'-5' is not a len"),
    ({"headers": {"Content-Length": "5"}}, h2keep.LocalProtocolError, r"there is no body, but its Content-Length is 5"),
    (
        {"headers": {"Content-Length": "5"}, "content": b"four"},
        h2keep.LocalProtocolError,
        r"the body is 1 bytes shorter than its Content-Length",
    ),
    (
        {"headers": {"Content-Length": "3"}, "content": b"four"},
        h2keep.LocalProtocolError,
        r"the body is longer than its Content-Length by at least 1 bytes",
    ),
    ({"headers": {"x": 1}}, TypeError, r"^headers: 1 is neither str nor bytes"),
    ({"headers": ["x"]}, TypeError, r"^headers: \['x'\] is neither a mapping nor pairs"),
    ({"content": 5}, TypeError, r"^content: int is not bytes, str or an \(async\) iterable of bytes"),
    ({"content": {"a": b"b"}}, TypeError, r"^content: dict is not"),
    ({"content": b"x", "json": 1}, ValueError, r"^content and json exclude each other"),
    ({"json": math.nan}, ValueError, r"JSON"),
    ({"json": object()}, TypeError, r"object is not JSON serializable"),
    ({"timeout": "5"}, ValueError, r"^timeout: connect must be"),
]


async def test_a_bad_request_is_refused_and_hurts_no_other(server: RawServer, client: h2keep.AsyncClient) -> None:
    async def in_flight() -> None:
        assert (await client.get(server.url)).content == b"ok"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(in_flight)
        peer = await server.accept()
        await peer.handshake()
        request = await peer.request()
        for options, error, message in BAD_REQUESTS:
            with pytest.raises(error, match=message) as caught:
                await client.request(**{"method": "POST", "url": server.url, **options})
            if isinstance(caught.value, h2keep.H2KeepError):
                assert caught.value.unprocessed, options
        await peer.ping()
        # Not one of them left the house, and nothing was reset.
        assert list(peer.requests) == [request.stream_id]
        assert not peer.seen(frames.RstStreamFrame)
        await peer.respond(request.stream_id, body=b"ok")
    server.serve(answering())
    assert len(server.peers) == 1


async def test_names_in_upper_case_are_lowered(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering())
    await client.get(server.url, headers={"X-UPPER": "Value"})
    assert server.peers[0].requests[1].headers["x-upper"] == "Value"


# Bodies that go wrong on the way


async def beside(
    server: RawServer, client: h2keep.AsyncClient, broken: Callable[[], Awaitable[None]]
) -> tuple[Peer, RawRequest]:
    """Run something broken while a request is in flight on the same connection, which must not notice."""

    async def in_flight() -> None:
        assert (await client.get(server.url)).content == b"ok"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(in_flight)
        peer = await server.accept()
        await peer.handshake()
        request = await peer.request()
        await broken()
        other = await peer.request()
        await peer.until(lambda: other.reset is not None)
        await peer.respond(request.stream_id, body=b"ok")
    return peer, other


async def _early_end() -> AsyncIterator[bytes]:
    yield b"four"


async def _too_much() -> AsyncIterator[bytes]:
    yield b"four"
    yield b"and more"


async def _raises() -> AsyncIterator[bytes]:
    yield b"four"
    raise ZeroDivisionError("mine")


async def _text() -> AsyncIterator[Any]:
    yield b"four"
    yield "text"


def _raises_in_step() -> Iterator[bytes]:
    yield b"four"
    raise ZeroDivisionError("mine")


@pytest.mark.parametrize(
    ("body", "length", "error", "message"),
    [
        (_early_end, 5, h2keep.LocalProtocolError, r"the body is 1 bytes shorter than its Content-Length"),
        (_too_much, 5, h2keep.LocalProtocolError, r"the body is longer than its Content-Length by at least 7 bytes"),
        (_raises, None, ZeroDivisionError, r"^mine$"),
        (_raises_in_step, None, ZeroDivisionError, r"^mine$"),
        (_text, None, h2keep.LocalProtocolError, r"the body's iterator gave a str, not bytes"),
    ],
)
async def test_a_body_that_goes_wrong_resets_its_stream_alone(
    server: RawServer,
    client: h2keep.AsyncClient,
    body: Callable[[], Any],
    length: int | None,
    error: type[Exception],
    message: str,
) -> None:
    async def broken() -> None:
        headers = {} if length is None else {"content-length": str(length)}
        with pytest.raises(error, match=message):
            await client.post(server.url, content=_slowly(server, body), headers=headers)

    peer, other = await beside(server, client, broken)
    assert other.reset == 8
    assert not other.ended
    assert len(peer.seen(frames.RstStreamFrame)) == 1


async def _slowly(server: RawServer, body: Callable[[], Any]) -> AsyncIterator[bytes]:
    """The body, each chunk once the server has got the one before: its HEADERS are sent for certain."""
    chunks = body()
    if hasattr(chunks, "__anext__"):
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk
                await server.peers[0].until(lambda: 3 in server.peers[0].requests)
    else:
        for chunk in chunks:
            yield chunk
            await server.peers[0].until(lambda: 3 in server.peers[0].requests)


# Servers that misbehave on one stream


def headers_frame(peer: Peer, stream_id: int, fields: list[tuple[str, str]], **options: Any) -> frames.HeadersFrame:
    """A head of just these fields."""
    return peer.headers_frame(stream_id, None, fields, **options)


BAD_RESPONSES: dict[str, Callable[[Peer, int], list[frames.Frame]]] = {
    "no :status": lambda peer, i: [headers_frame(peer, i, [("x-a", "1")], end_stream=True)],
    ":status of letters": lambda peer, i: [headers_frame(peer, i, [(":status", "abc")], end_stream=True)],
    ":status twice": lambda peer, i: [headers_frame(peer, i, [(":status", "200"), (":status", "200")])],
    ":status late": lambda peer, i: [headers_frame(peer, i, [("x-a", "1"), (":status", "200")], end_stream=True)],
    "a request's pseudo-field": lambda peer, i: [headers_frame(peer, i, [(":status", "200"), (":path", "/")])],
    "upper case": lambda peer, i: [headers_frame(peer, i, [(":status", "200"), ("X-A", "1")])],
    "connection": lambda peer, i: [headers_frame(peer, i, [(":status", "200"), ("connection", "close")])],
    "transfer-encoding": lambda peer, i: [headers_frame(peer, i, [(":status", "200"), ("transfer-encoding", "x")])],
    "body before head": lambda _, i: [frames.DataFrame(i, b"x")],
    "body above content-length": lambda peer, i: [
        headers_frame(peer, i, [(":status", "200"), ("content-length", "1")]),
        frames.DataFrame(i, b"xx", flags=["END_STREAM"]),
    ],
    "body below content-length": lambda peer, i: [
        headers_frame(peer, i, [(":status", "200"), ("content-length", "3")]),
        frames.DataFrame(i, b"xx", flags=["END_STREAM"]),
    ],
    "trailers with :status": lambda peer, i: [
        headers_frame(peer, i, [(":status", "200")]),
        headers_frame(peer, i, [(":status", "200")], end_stream=True),
    ],
    "window overflow": lambda _, i: [frames.WindowUpdateFrame(i, 2**31 - 1)],
}


@pytest.mark.parametrize("name", BAD_RESPONSES)
async def test_a_malformed_response_ends_its_stream_alone(
    server: RawServer, client: h2keep.AsyncClient, name: str
) -> None:
    failed = anyio.Event()

    async def broken() -> None:
        with pytest.raises(h2keep.RemoteProtocolError) as caught:
            await client.post(server.url, content=b"the broken one")
        assert str(caught.value).startswith(f"{server.url}: ")
        assert not caught.value.unprocessed
        assert not isinstance(caught.value, h2keep.StreamReset)
        failed.set()

    async def fine() -> None:
        assert (await client.get(server.url)).content == b"ok"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fine)
        peer = await server.accept()
        await peer.handshake()
        good = await peer.request()
        tasks.start_soon(broken)
        bad = await peer.request()
        await bad.complete()
        await peer.send(*BAD_RESPONSES[name](peer, bad.stream_id))
        await failed.wait()
        await peer.until(lambda: bad.reset is not None)
        await peer.respond(good.stream_id, body=b"ok")
        # The connection serves further requests, too.
        tasks.start_soon(fine)
        await peer.respond((await peer.request()).stream_id, body=b"ok")
    assert len(server.peers) == 1
    assert not [frame for frame in peer.seen(frames.GoAwayFrame) if frame.error_code]
    assert len(peer.seen(frames.RstStreamFrame)) == 1


# Servers that break the connection


def raw_frame(kind: int, flags: int, stream_id: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + body


PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, COMPRESSION_ERROR = 1, 3, 6, 9

BROKEN: dict[str, tuple[bytes, int, str]] = {
    "oversize frame": (b"\x00\x40\x01\x00\x00\x00\x00\x00\x01", FRAME_SIZE_ERROR, "above the limit of 16384"),
    "bad HPACK": (raw_frame(1, 0x4, 1, b"\xff\xff\xff\xff\xff\xff"), COMPRESSION_ERROR, "can't be decoded"),
    "DATA on stream 0": (raw_frame(0, 0, 0, b"x"), PROTOCOL_ERROR, "malformed frame"),
    "DATA on an idle stream": (raw_frame(0, 0, 99, b"x"), PROTOCOL_ERROR, "stream 99, which was never opened"),
    "HEADERS on an idle stream": (raw_frame(1, 0x5, 99, b"\x88"), PROTOCOL_ERROR, "which was never opened"),
    "HEADERS on an even stream": (raw_frame(1, 0x5, 2, b"\x88"), PROTOCOL_ERROR, "which was never opened"),
    "PUSH_PROMISE": (raw_frame(5, 0x4, 1, b"\x00\x00\x00\x02\x82"), PROTOCOL_ERROR, ""),
    "PING of 7 bytes": (raw_frame(6, 0, 0, b"x" * 7), FRAME_SIZE_ERROR, ""),
    "SETTINGS on a stream": (raw_frame(4, 0, 1, b""), PROTOCOL_ERROR, ""),
    "SETTINGS that are none": (raw_frame(4, 0, 0, b"\x00\x02\x00\x00\x00\x07"), PROTOCOL_ERROR, ""),
    "CONTINUATION alone": (raw_frame(9, 0x4, 1, b""), PROTOCOL_ERROR, "a CONTINUATION without a header block"),
    "interrupted block": (
        raw_frame(1, 0, 1, b"\x88") + raw_frame(6, 0, 0, b"x" * 8),
        PROTOCOL_ERROR,
        "a header block was interrupted",
    ),
    "window of 0": (raw_frame(8, 0, 0, bytes(4)), PROTOCOL_ERROR, ""),
    "connection window overflow": (raw_frame(8, 0, 0, b"\x7f\xff\xff\xff"), FLOW_CONTROL_ERROR, ""),
    "padding longer than the frame": (raw_frame(0, 0x8, 1, b"\x05x"), PROTOCOL_ERROR, "malformed frame"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_server_that_breaks_http2_fails_its_requests_and_the_next_find_another_connection(
    server: RawServer, client: h2keep.AsyncClient, name: str
) -> None:
    data, code, message = BROKEN[name]

    async def get() -> None:
        with pytest.raises(h2keep.RemoteProtocolError, match="the server broke HTTP/2") as caught:
            await client.get(server.url)
        assert str(caught.value).startswith(f"{server.url}: ")
        assert message in str(caught.value)
        assert not caught.value.unprocessed

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(get)
        tasks.start_soon(get)
        peer = await server.accept()
        await peer.handshake()
        await peer.request()
        await peer.request()
        await peer.send_bytes(data)
    # The server is told why.
    goaway = await peer.expect(frames.GoAwayFrame)
    assert goaway.error_code == code
    server.serve(answering())
    assert (await client.get(server.url)).content == b"ok"
    assert len(server.peers) == 2


async def test_what_came_before_a_breach_counts(server: RawServer, client: h2keep.AsyncClient) -> None:
    async def complete() -> None:
        assert (await client.get(server.url)).content == b"whole"

    async def cut_short() -> None:
        with pytest.raises(h2keep.RemoteProtocolError):
            await client.post(server.url)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(complete)
        peer = await server.accept()
        await peer.handshake()
        first = await peer.request()
        tasks.start_soon(cut_short)
        await peer.request()
        head = peer.headers_frame(first.stream_id)
        body = frames.DataFrame(first.stream_id, b"whole", flags=["END_STREAM"])
        await peer.send_bytes(head.serialize() + body.serialize() + BROKEN["oversize frame"][0])


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", bytes(100)])
async def test_a_server_of_another_protocol_is_a_protocol_error(
    server: RawServer, client: h2keep.AsyncClient, greeting: bytes
) -> None:
    async def get() -> None:
        with pytest.raises(h2keep.RemoteProtocolError, match="the server broke HTTP/2"):
            await client.get(server.url)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(get)
        peer = await server.accept()
        await peer.send_bytes(greeting)


@pytest.mark.parametrize("how", ["close", "abort", "eof"])
async def test_a_connection_that_ends_fails_its_requests_alone(
    server: RawServer, client: h2keep.AsyncClient, how: str
) -> None:
    async def get() -> None:
        with pytest.raises(h2keep.ConnectionLost, match=r"the connection (was closed by the server|failed)") as caught:
            await client.get(server.url)
        assert not isinstance(caught.value, h2keep.PingTimeout)
        assert caught.value.last_life is not None

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(get)
        peer = await server.accept()
        await peer.handshake()
        await peer.request()
        if how == "eof":
            await peer.eof()
        else:
            getattr(peer, how)()
    server.serve(answering())
    assert (await client.get(server.url)).content == b"ok"


async def test_a_broken_tls_record_ends_the_connection_with_openssls_reason(
    server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, h2keep.AsyncClient(verify=client_ssl, timeout=None) as client:
        async with anyio.create_task_group() as tasks:

            async def get() -> None:
                with pytest.raises(h2keep.ConnectionLost, match=r"(?i)bad.record.mac|record.layer.failure"):
                    await client.get(server.url)

            tasks.start_soon(get)
            peer = await server.accept()
            await peer.handshake()
            await peer.request()
            record = bytearray(peer.encrypt(b"x" * 100))
            record[-1] ^= 1
            await peer.send_ciphertext(bytes(record))
        server.serve(answering())
        assert (await client.get(server.url)).content == b"ok"


async def test_a_hook_that_raises_hurts_no_request(server: RawServer, caplog: pytest.LogCaptureFixture) -> None:
    def hook(_stats: h2keep.ConnectionStats, _event: object) -> None:
        raise ZeroDivisionError("mine")

    server.serve(answering())
    async with h2keep.AsyncClient(http1=False, verify=False, event_hook=hook) as client:
        assert (await client.get(server.url)).content == b"ok"
        assert (await client.get(server.url)).content == b"ok"
    assert len(server.peers) == 1
    assert "the event hook failed on ConnectionReady" in caplog.text
