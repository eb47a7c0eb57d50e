"""AsyncClient's interface: what goes onto the wire for what is asked, and what comes of the answer."""

from __future__ import annotations

import json
import ssl
import sys
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep import _messages
from support.clock import virtual_time
from support.raw import RawServer, answering, task_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import trustme

    from h2keep.protocol import events
    from support.raw import Peer, RawRequest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

CANCEL = 8


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


def last(server: RawServer) -> RawRequest:
    """The request that came last."""
    return list(server.peers[-1].requests.values())[-1]


async def send_chunks(request: RawRequest, *chunks: bytes) -> None:
    """Answer in chunks that the client gets one by one."""
    peer = request.peer
    await peer.respond(request.stream_id, end_stream=False)
    for chunk in chunks:
        # The PING's answer means that the chunk before has been taken in.
        await peer.ping()
        await peer.send_data(request.stream_id, chunk)
    await peer.send_data(request.stream_id, b"", end_stream=True)


# Requests


@pytest.mark.parametrize("verb", ["get", "head", "options", "post", "put", "patch", "delete"])
async def test_every_verb_sends_its_method(server: RawServer, client: h2keep.AsyncClient, verb: str) -> None:
    server.serve(answering(b"" if verb == "head" else b"ok", status=201))
    response = await getattr(client, verb)(server.url + "/path", headers={"x-verb": verb})
    assert response.status_code == 201
    assert last(server).method == verb.upper()
    assert last(server).path == "/path"
    assert last(server).headers["x-verb"] == verb


async def test_any_token_is_a_method(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering())
    await client.request("PROPFIND", server.url)
    assert last(server).method == "PROPFIND"


async def test_a_head_response_may_tell_a_length_that_it_does_not_have(
    server: RawServer, client: h2keep.AsyncClient
) -> None:
    server.serve(answering(b"", headers=[("content-length", "1000")]))
    response = await client.head(server.url)
    assert response.headers["content-length"] == "1000"
    assert response.content == b""


@pytest.mark.parametrize(
    ("query", "params", "expected"),
    [
        ("", {"a": 1, "b": "x y&ü"}, "/?a=1&b=x+y%26%C3%BC"),
        ("?z=0", {"a": [1, 2]}, "/?z=0&a=1&a=2"),
        ("?z=0", {}, "/?z=0"),
        ("?", {"a": ""}, "/?a="),
    ],
)
async def test_params_join_the_query(
    server: RawServer, client: h2keep.AsyncClient, query: str, params: dict[str, Any], expected: str
) -> None:
    server.serve(answering())
    await client.get(server.url + query, params=params)
    assert last(server).path == expected


async def test_the_requests_headers_go_before_the_clients_and_these_before_ours(server: RawServer) -> None:
    server.serve(answering())
    defaults = {"Authorization": "Bearer default", "User-Agent": "mine/1.0", "X-Default": "kept"}
    async with h2keep.AsyncClient(http1=False, headers=defaults) as client:
        await client.get(server.url, headers={"AUTHORIZATION": "Bearer own", "accept": "text/html"})
        headers = last(server).headers
        assert headers["authorization"] == "Bearer own"
        assert headers["x-default"] == "kept"
        assert headers["user-agent"] == "mine/1.0"
        assert headers["accept"] == "text/html"
        await client.get(server.url)
        assert last(server).headers["authorization"] == "Bearer default"
        assert last(server).headers["accept"] == "*/*"
        names = [name for name, _ in last(server).fields]
        assert len(names) == len(set(names))


async def test_headers_may_be_pairs_bytes_and_repeated(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering())
    await client.get(server.url, headers=[("X-A", "1"), (b"x-b", b"\xe4"), ("x-a", "2"), ("x-c", "ü"), ("x-d", " v\t")])
    fields = last(server).fields
    assert [value for name, value in fields if name == "x-a"] == ["1", "2"]
    assert last(server).headers["x-d"] == "v"
    # Text is latin-1, the one encoding that every field of old could have (RFC 9110, section 5.5).
    raw = {name: value.encode("utf-8", "surrogateescape") for name, value in fields}
    assert raw["x-b"] == b"\xe4"
    assert raw["x-c"] == b"\xfc"


async def test_what_requests_have_in_common_is_remembered_and_nothing_else(
    server: RawServer, client: h2keep.AsyncClient
) -> None:
    server.serve(answering())
    headers: dict[str, str] = {"X-Turn": "1", "Host": "first.example"}

    async def sent(**options: Any) -> list[tuple[str, str]]:
        await client.post(server.url + "/a", headers=headers, **options)
        return last(server).fields

    first = await sent(json={"a": 1})
    second = await sent(content=b"four")
    third = await sent()
    assert [value for name, value in first if name == "content-type"] == ["application/json"]
    assert [(name, value) for name, value in first if name not in ("content-type", "content-length")] == third
    assert second == [*third, ("content-length", "4")]
    headers["X-Turn"] = "2"
    headers["Host"] = "second.example"
    fourth = await sent()
    assert ("x-turn", "2") in fourth
    assert ("x-turn", "1") not in fourth
    assert last(server).headers[":authority"] == "second.example"


async def test_what_never_comes_again_is_not_remembered(client: h2keep.AsyncClient) -> None:
    first = [client._prepare("GET", f"https://example.com/{turn}") for turn in range(2_000)]
    assert not client._known
    assert len(client._known._met) <= 1_024
    assert len({id(head.origin) for head, _, _ in first}) == 1
    assert client._prepare("GET", "https://example.com/1999") == first[-1]
    assert client._prepare("GET", "https://example.com/1999") == first[-1]
    assert len(client._known) == 1


async def test_what_is_remembered_of_requests_is_bounded(client: h2keep.AsyncClient) -> None:
    for turn in range(2_000):
        client._prepare("GET", f"https://example.com/{turn // 2}", None, None, None, (), ..., None)
        client._prepare("GET", "https://example.com/", None, None, None, {"x-turn": str(turn // 2)}, ..., None)
        assert len(client._known) <= 256
    before = len(client._known)
    assert before
    long = 5_000 * "x"
    parsed = _messages._parse_url.cache_info().misses
    for _ in range(3):
        client._prepare("GET", "https://example.com/", None, None, None, {"x-long": long}, ..., None)
        client._prepare(
            "GET", "https://example.com/", None, None, None, {"x-some": "1"}, ..., {"sni_hostname": "a.example"}
        )
        client._prepare("GET", "https://example.com/", None, None, {"some": 1}, (), ..., None)
        for url in (f"https://example.com/?{long}", f"https://example.com/#{long}", f"https://example.com/{long}"):
            client._prepare("GET", url)
    assert len(client._known) == before
    assert _messages._parse_url.cache_info().misses == parsed


@pytest.mark.parametrize("headers", [{"x-list": ["1"]}, {"x-number": 1}, {1: "x"}])
async def test_headers_that_are_none_are_refused_each_time(client: h2keep.AsyncClient, headers: Any) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match=r"headers: .* is neither str nor bytes"):
            await client.get("https://example.com/", headers=headers)


@pytest.mark.parametrize("headers", [None, 0, 0.0])
async def test_headers_that_are_none_are_refused_although_the_rest_is_known(
    client: h2keep.AsyncClient, headers: Any
) -> None:
    client._prepare("GET", "https://example.com/")
    with pytest.raises(TypeError, match="neither a mapping nor pairs"):
        await client.get("https://example.com/", headers=headers)


async def test_a_url_that_is_no_str_is_refused_although_it_equals_one_that_is_known(client: h2keep.AsyncClient) -> None:
    client._prepare("GET", "https://example.com/")
    with pytest.raises(TypeError, match=r"url: .* is not a str"):
        await client.get(httpx2.URL("https://example.com/"))  # type: ignore[arg-type]


async def test_where_text_and_bytes_must_not_be_compared_headers_may_be_both() -> None:
    script = """
import h2keep
client = h2keep.AsyncClient(http1=False, verify=False)
for headers in ({"x-a": "1"}, {b"x-a": b"1"}, {"x-a": b"1"}, {b"x-a": "1"}):
    for _ in range(2):
        head, _, _ = client._prepare("GET", "http://example.com/", headers=headers)
        assert (b"x-a", b"1") in head.fields
"""
    with anyio.fail_after(30):
        await anyio.run_process([sys.executable, "-bb", "-c", script], stderr=None)


async def test_without_a_body_the_head_ends_the_stream(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering())
    await client.post(server.url)
    assert "content-length" not in last(server).headers
    assert not server.peers[0].seen(frames.DataFrame)


@pytest.mark.parametrize(
    ("options", "body", "headers"),
    [
        ({"content": b"bytes"}, b"bytes", {"content-length": "5"}),
        ({"content": b""}, b"", {"content-length": "0"}),
        ({"content": bytearray(b"array")}, b"array", {"content-length": "5"}),
        ({"content": memoryview(b"view")}, b"view", {"content-length": "4"}),
        ({"content": "text ü"}, b"text \xc3\xbc", {"content-type": "text/plain; charset=utf-8"}),
        ({"content": "x", "headers": {"Content-Type": "text/csv"}}, b"x", {"content-type": "text/csv"}),
        ({"json": {"a": [1, "ü"]}}, '{"a":[1,"ü"]}'.encode(), {"content-type": "application/json"}),
        ({"json": []}, b"[]", {"content-length": "2"}),
        ({"json": 0, "headers": {"content-type": "application/x+json"}}, b"0", {"content-type": "application/x+json"}),
        ({"content": [b"a", b"", b"b"]}, b"ab", {}),
        ({"content": [b"abc"], "headers": {"content-length": "3"}}, b"abc", {"content-length": "3"}),
        ({"content": []}, b"", {}),
    ],
)
async def test_bodies_of_every_kind(
    server: RawServer,
    client: h2keep.AsyncClient,
    options: dict[str, Any],
    body: bytes,
    headers: dict[str, str],
) -> None:
    server.serve(answering())
    assert (await client.post(server.url, **options)).content == b"ok"
    request = last(server)
    assert bytes(request.body) == body
    assert headers.items() <= request.headers.items()
    names = [name for name, _ in request.fields]
    assert len(names) == len(set(names))


async def test_a_generator_is_a_body(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering())
    await client.post(server.url, content=(bytes([number]) for number in b"012"))
    assert bytes(last(server).body) == b"012"


async def test_an_async_iterable_is_sent_as_it_comes(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering())
    closed = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal closed
        try:
            yield b"first,"
            # The first chunk doesn't wait for the second.
            peer = await server.peer(0)
            await peer.until(lambda: bool(peer.requests) and bytes(peer.requests[1].body) == b"first,")
            yield b"second"
        finally:
            closed = True

    await client.post(server.url, content=body())
    assert bytes(last(server).body) == b"first,second"
    assert "content-length" not in last(server).headers
    assert closed


async def test_a_large_body_arrives_whole(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering())
    body = bytes(range(256)) * 8192
    await client.put(server.url, content=body)
    assert bytes(last(server).body) == body


async def test_fifty_requests_at_once_share_a_connection(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering())
    await client.get(server.url)
    ids: set[int] = set()

    async def one() -> None:
        ids.add((await client.get(server.url)).stream_id)

    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(one)
    assert ids == set(range(3, 103, 2))
    assert len(server.peers) == 1


# URLs


URLS: list[tuple[str, str, str]] = [
    ("http://example.com", "example.com", "/"),
    ("HTTP://EXAMPLE.com:80/", "example.com", "/"),
    ("http://example.com:8080/a/b", "example.com:8080", "/a/b"),
    ("http://example.com?x=1", "example.com", "/?x=1"),
    ("http://example.com/?x=1&y=a/b?c#fragment?no", "example.com", "/?x=1&y=a/b?c"),
    ("http://example.com#fragment", "example.com", "/"),
    ("http://example.com/a b/ü?q=ü x", "example.com", "/a%20b/%C3%BC?q=%C3%BC%20x"),
    ("http://example.com/%2F%20?q=%26", "example.com", "/%2F%20?q=%26"),
    ("http://example.com//double/../dots/./", "example.com", "//double/../dots/./"),
    ('http://example.com/<">{}|\\^`', "example.com", "/%3C%22%3E%7B%7D%7C%5C%5E%60"),
    ("http://[::1]:8443/x", "[::1]:8443", "/x"),
    ("http://127.0.0.1/x", "127.0.0.1", "/x"),
    ("http://bücher.example/", "xn--bcher-kva.example", "/"),
]


async def test_urls_become_authority_and_path(tmp_path: Path) -> None:
    uds = str(tmp_path / "socket")
    seen: list[dict[str, str]] = []

    async def handler(peer: Peer) -> None:
        while True:
            request = await peer.request()
            seen.append(request.headers)
            await peer.respond(request.stream_id)

    async with RawServer.listen(uds=uds) as server, h2keep.AsyncClient(http1=False, verify=False, uds=uds) as client:
        server.serve(handler)
        for url, authority, path in URLS:
            await client.get(url)
            assert (seen[-1][":scheme"], seen[-1][":authority"], seen[-1][":path"]) == ("http", authority, path), url


async def test_https_without_a_port_is_443(tmp_path: Path, ca_path: Path, ca: trustme.CA) -> None:
    uds = str(tmp_path / "socket")
    context = named_context(ca, "example.com", names=[])
    async with (
        RawServer.listen(context, uds=uds) as server,
        h2keep.AsyncClient(verify=str(ca_path), uds=uds) as client,
    ):
        server.serve(answering())
        response = await client.get("https://example.com:443/")
        assert last(server).headers[":authority"] == "example.com"
        assert last(server).headers[":scheme"] == "https"
        assert response.connection.origin == "https://example.com:443"


async def test_a_host_header_becomes_the_authority(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering())
    await client.get(server.url, headers={"Host": "f.invocation.example"})
    assert last(server).headers[":authority"] == "f.invocation.example"
    assert "host" not in last(server).headers
    await client.get(server.url)
    assert last(server).headers[":authority"] == server.url.removeprefix("http://")
    assert len(server.peers) == 1


def named_context(ca: trustme.CA, name: str, names: list[str | None]) -> ssl.SSLContext:
    """A server's context for one name, which notes the names that clients ask for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)
    context.set_alpn_protocols(["h2"])
    context.sni_callback = lambda _tls, asked, _context: names.append(asked)
    return context


async def test_sni_and_the_certificate_follow_the_urls_host(ca: trustme.CA, ca_path: Path) -> None:
    names: list[str | None] = []
    async with (
        RawServer.listen(named_context(ca, "localhost", names)) as server,
        h2keep.AsyncClient(verify=str(ca_path)) as client,
    ):
        server.serve(answering())
        await client.get(f"https://localhost:{server.port}", headers={"Host": "elsewhere.example"})
        assert names == ["localhost"]
        assert last(server).headers[":authority"] == "elsewhere.example"


async def test_the_sni_hostname_extension_overrides_the_name(ca: trustme.CA, ca_path: Path) -> None:
    names: list[str | None] = []
    async with (
        RawServer.listen(named_context(ca, "inner.example", names)) as server,
        h2keep.AsyncClient(verify=str(ca_path)) as client,
    ):
        server.serve(answering())
        with pytest.raises(h2keep.ConnectError, match="certificate is not valid for 'localhost'"):
            await client.get(f"https://localhost:{server.port}")
        await client.get(f"https://localhost:{server.port}", extensions={"sni_hostname": "inner.example"})
        assert names == ["localhost", "inner.example"]
        assert last(server).headers[":authority"] == f"localhost:{server.port}"
        # What was made for one name doesn't serve another.
        with pytest.raises(h2keep.ConnectError):
            await client.get(f"https://localhost:{server.port}")


async def test_http_is_refused_unless_prior_knowledge_is_asked_for(server: RawServer) -> None:
    async with h2keep.AsyncClient() as client:
        with pytest.raises(h2keep.UnsupportedProtocol, match="with http1=False it is HTTP/2 with prior knowledge"):
            await client.get(server.url)


# Responses


async def test_a_response_tells_what_came(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering(b'{"a":1}', status=404, headers=[("content-type", "application/json"), ("x-a", "1")]))
    response = await client.get(server.url)
    assert response.status_code == 404
    assert response.content == b'{"a":1}'
    assert response.text == '{"a":1}'
    assert response.json() == {"a": 1}
    assert response.http_version == "HTTP/2"
    assert response.stream_id == 1
    assert response.connection.origin == server.url
    assert response.connection.requests == 1
    assert repr(response) == "<Response [404]>"
    assert (await client.get(server.url)).stream_id == 3
    assert await response.aread() == response.content
    assert [chunk async for chunk in response.aiter_bytes()] == [response.content]
    assert [line async for line in response.aiter_lines()] == ['{"a":1}']


async def test_headers_are_a_mapping_in_any_case(server: RawServer, client: h2keep.AsyncClient) -> None:
    fields = [("x-a", "1"), ("set-cookie", "a=1"), ("x-b", "ä"), ("set-cookie", "b=2")]
    server.serve(answering(headers=fields))
    headers = (await client.get(server.url)).headers
    assert headers["X-A"] == headers["x-a"] == "1"
    assert headers["Set-Cookie"] == "a=1, b=2"
    assert headers.get_list("SET-COOKIE") == ["a=1", "b=2"]
    assert headers.get_list("x-none") == []
    assert headers.get("x-none") is None
    assert "X-B" in headers
    assert "x-none" not in headers
    assert list(headers) == ["x-a", "set-cookie", "x-b"]
    assert len(headers) == 3
    assert headers.raw[0] == (b"x-a", b"1")
    assert dict(headers)["set-cookie"] == "a=1, b=2"
    assert "set-cookie" in repr(headers)
    with pytest.raises(KeyError, match="x-none"):
        headers["x-none"]


TEXTS: list[tuple[str | None, bytes, str]] = [
    (None, "ü€".encode(), "ü€"),
    ("text/plain", "ü".encode(), "ü"),
    ("text/plain; charset=iso-8859-1", b"\xfc", "ü"),
    ('text/plain; charset="windows-1252"', b"\x80", "€"),
    ("text/plain; CHARSET=UTF-16; x=y", "ü".encode("utf-16"), "ü"),
    ("text/plain; charset=nonsense", "ü".encode(), "ü"),
    # Python has codecs of these names, but they don't make text of bytes.
    ("text/plain; charset=hex", "ü".encode(), "ü"),
    ("text/plain; charset=idna", "ü".encode(), "ü"),
    ("text/plain; charset=utf-8", b"a\xffb", "a\ufffdb"),
]


async def test_text_follows_the_charset(server: RawServer, client: h2keep.AsyncClient) -> None:
    answers = iter([case for case in TEXTS for _ in range(2)])

    async def handler(peer: Peer) -> None:
        while True:
            request = await peer.request()
            content_type, body, _ = next(answers)
            headers = [] if content_type is None else [("content-type", content_type)]
            await peer.respond(request.stream_id, headers=headers, body=body)

    server.serve(handler)
    for content_type, _, text in TEXTS:
        response = await client.get(server.url)
        assert response.text == text, content_type
        async with client.stream("GET", server.url) as response:
            assert [line async for line in response.aiter_lines()] == [text], content_type


async def test_a_body_is_to_be_read_before_it_is_had(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering(b"body"))
    async with client.stream("GET", server.url) as response:
        assert response.status_code == 200
        for read in (lambda: response.content, lambda: response.text, response.json):
            with pytest.raises(RuntimeError, match="the body has not been read"):
                read()
        assert await response.aread() == b"body"
        assert response.content == b"body"


async def test_bytes_come_as_they_come(server: RawServer, client: h2keep.AsyncClient) -> None:
    chunks = [b"one", b"", b"two", b"three"]

    async def handler(peer: Peer) -> None:
        await send_chunks(await peer.request(), *chunks)
        await send_chunks(await peer.request())

    server.serve(handler)
    async with client.stream("GET", server.url) as response:
        assert [chunk async for chunk in response.aiter_bytes()] == [b"one", b"two", b"three"]
    async with client.stream("GET", server.url) as response:
        assert [chunk async for chunk in response.aiter_bytes()] == []


async def test_a_body_that_was_iterated_over_is_not_kept(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering(b"body"))
    async with client.stream("GET", server.url) as response:
        assert [chunk async for chunk in response.aiter_bytes()] == [b"body"]
        with pytest.raises(RuntimeError, match="was not kept"):
            await response.aread()
        with pytest.raises(RuntimeError, match="was not kept"):
            await anext(response.aiter_bytes())
        with pytest.raises(RuntimeError, match="has not been read"):
            response.content  # noqa: B018


LINES: list[tuple[tuple[bytes, ...], list[str]]] = [
    ((b"a\nb\r\nc\rd",), ["a", "b", "c", "d"]),
    ((b"a\n\n\nb\n",), ["a", "", "", "b"]),
    ((b"a\r\r\nb",), ["a", "", "b"]),
    ((b"a\r", b"\nb"), ["a", "b"]),
    ((b"a\r", b"b\r", b"\n", b"\n"), ["a", "b", ""]),
    ((b"a\r",), ["a"]),
    ((b"\r", b"\n"), [""]),
    ((b"\n", b"\n"), ["", ""]),
    ((b"no", b" end", b" at all"), ["no end at all"]),
    ((b"data: \xe2\x82", b"\xac\ndata: ", b"\xc3", b"\xbc\n\n"), ["data: €", "data: ü", ""]),
    ((b"cut short \xe2\x82",), ["cut short \ufffd"]),
    # Ends of lines for str.splitlines, and not on the web.
    (("a\x0bb\x0cc\x85d\u2028e".encode(),), ["a\x0bb\x0cc\x85d\u2028e"]),
    ((), []),
]


async def test_lines_end_alike_wherever_chunks_do(server: RawServer, client: h2keep.AsyncClient) -> None:
    answers = iter(LINES)

    async def handler(peer: Peer) -> None:
        while True:
            request = await peer.request()
            await send_chunks(request, *next(answers)[0])

    server.serve(handler)
    for chunks, lines in LINES:
        async with client.stream("GET", server.url) as response:
            assert [line async for line in response.aiter_lines()] == lines, chunks


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
async def test_each_line_comes_as_soon_as_it_is_complete(
    server: RawServer, client: h2keep.AsyncClient, end: bytes
) -> None:
    async with anyio.create_task_group() as tasks:
        got = anyio.Event()

        async def read() -> None:
            async with client.stream("GET", server.url) as response:
                nonlocal got
                async for line in response.aiter_lines():
                    assert line == "event"
                    got.set()

        tasks.start_soon(read)
        peer = await server.accept()
        await peer.handshake()
        request = await peer.request()
        await peer.respond(request.stream_id, end_stream=False)
        for _ in range(3):
            got = anyio.Event()
            await peer.send_data(request.stream_id, b"event" + end)
            with anyio.fail_after(60.0):
                await got.wait()
        await peer.send_data(request.stream_id, b"", end_stream=True)


async def test_trailers_come_with_the_bodys_end(server: RawServer, client: h2keep.AsyncClient) -> None:
    async def handler(peer: Peer) -> None:
        request = await peer.request()
        await peer.respond(request.stream_id, body=b"body", trailers=[("grpc-status", "0"), ("x-t", "1")])

    server.serve(handler)
    async with client.stream("GET", server.url) as response:
        await response.aread()
        assert response.trailers["Grpc-Status"] == "0"
        assert len(response.trailers) == 2
        assert "x-t" not in response.headers


async def test_interim_responses_are_passed_over(server: RawServer, client: h2keep.AsyncClient) -> None:
    async def handler(peer: Peer) -> None:
        request = await peer.request()
        await peer.send(peer.headers_frame(request.stream_id, 103, [("link", "</style.css>")]))
        await peer.respond(request.stream_id, 204, [("x-final", "yes")])

    server.serve(handler)
    response = await client.get(server.url)
    assert response.status_code == 204
    assert response.headers["x-final"] == "yes"
    assert "link" not in response.headers


@pytest.mark.parametrize("how", ["leave", "break", "raise", "close"])
async def test_leaving_a_response_early_resets_its_stream_alone(
    server: RawServer, client: h2keep.AsyncClient, how: str
) -> None:
    async def handler(peer: Peer) -> None:
        request = await peer.request()
        await peer.respond(request.stream_id, body=b"some", end_stream=False)
        await answering()(peer)

    async def leave() -> None:
        async with client.stream("GET", server.url) as response:
            if how == "close":
                await response.aclose()
                await response.aclose()
                with pytest.raises(h2keep.ReadError, match="the response was closed before its body was read"):
                    await response.aread()
            elif how == "break":
                async for chunk in response.aiter_bytes():
                    assert chunk == b"some"
                    break
            elif how == "raise":
                raise ZeroDivisionError

    server.serve(handler)
    if how == "raise":
        with pytest.raises(ZeroDivisionError):
            await leave()
    else:
        await leave()
    peer = server.peers[0]
    await peer.until(lambda: bool(peer.seen(frames.RstStreamFrame)))
    assert [(reset.stream_id, reset.error_code) for reset in peer.seen(frames.RstStreamFrame)] == [(1, CANCEL)]
    assert (await client.get(server.url)).content == b"ok"
    assert len(server.peers) == 1


async def test_whoever_reads_is_woken_when_another_task_closes_the_response(
    server: RawServer, client: h2keep.AsyncClient
) -> None:
    async def handler(peer: Peer) -> None:
        request = await peer.request()
        await peer.respond(request.stream_id, body=b"some", end_stream=False)
        await peer.until(lambda: bool(peer.seen(frames.RstStreamFrame)))

    server.serve(handler)
    begun = anyio.Event()

    async def read(response: h2keep.Response) -> None:
        chunks = response.aiter_bytes()
        assert await anext(chunks) == b"some"
        begun.set()
        with pytest.raises(h2keep.ReadError, match="the response was closed before its body was read"):
            await anext(chunks)

    async with client.stream("GET", server.url) as response, anyio.create_task_group() as tasks:
        tasks.start_soon(read, response)
        await begun.wait()
        await anyio.wait_all_tasks_blocked()
        await response.aclose()


async def test_a_response_that_was_read_to_its_end_resets_nothing(
    server: RawServer, client: h2keep.AsyncClient
) -> None:
    server.serve(answering())
    async with client.stream("GET", server.url) as response:
        await response.aread()
        await response.aclose()
    await client.get(server.url)
    assert not server.peers[0].seen(frames.RstStreamFrame)


async def test_a_streamed_request_is_sent_but_once(server: RawServer, client: h2keep.AsyncClient) -> None:
    server.serve(answering())
    streaming = client.stream("GET", server.url)
    async with streaming:
        pass
    with pytest.raises(RuntimeError, match=r"call stream\(\) again"):
        await streaming.__aenter__()
    assert len(server.peers[0].requests) == 1


# Settings


@virtual_time
@pytest.mark.parametrize(
    ("for_client", "for_request", "seconds"),
    [
        (2.0, ..., 2.0),
        (3, ..., 3.0),
        (h2keep.Timeout(read=4.0), ..., 4.0),
        (2.0, 7.0, 7.0),
        (None, h2keep.Timeout(read=1.5, connect=None), 1.5),
        (2.0, None, None),
        (None, ..., None),
    ],
)
async def test_k21_timeouts_are_the_clients_unless_the_request_has_its_own(
    server: RawServer, for_client: Any, for_request: Any, seconds: float | None
) -> None:
    server.serve(answering(delay=1000.0))
    async with h2keep.AsyncClient(http1=False, verify=False, timeout=for_client) as client:
        began = anyio.current_time()
        if seconds is None:
            assert (await client.get(server.url, timeout=for_request)).content == b"ok"
            assert anyio.current_time() - began == pytest.approx(1000.0, abs=0.1)
        else:
            with pytest.raises(h2keep.ReadTimeout):
                await client.get(server.url, timeout=for_request)
            assert anyio.current_time() - began == pytest.approx(seconds, abs=0.1)


@virtual_time
async def test_limits_are_obeyed(server: RawServer) -> None:
    server.serve(answering(delay=10.0), {frames.SettingsFrame.MAX_CONCURRENT_STREAMS: 1})
    limits = h2keep.Limits(max_connections=2, max_keepalive_connections=1, keepalive_expiry=20.0)
    async with h2keep.AsyncClient(http1=False, timeout=None, limits=limits) as client:
        await client.get(server.url)
        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(client.get, server.url)
        assert len(server.peers) == 2
        await anyio.sleep(1.0)
        assert sorted(peer.ended for peer in server.peers) == [False, True]
        await anyio.sleep(20.0)
        assert all(peer.ended for peer in server.peers)


async def test_k20_the_event_hook_sees_a_connections_life(server: RawServer) -> None:
    seen: list[tuple[str, str]] = []

    def hook(stats: h2keep.ConnectionStats, event: events.ConnectionEvent) -> None:
        seen.append((stats.origin, type(event).__name__))

    server.serve(answering())
    async with h2keep.AsyncClient(http1=False, verify=False, event_hook=hook) as client:
        await client.get(server.url)
        assert seen == [(server.url, "ConnectionReady")]
    assert seen == [(server.url, "ConnectionReady"), (server.url, "ConnectionClosed")]


async def test_a_client_works_without_a_context_and_closes_twice(server: RawServer) -> None:
    server.serve(answering())
    client = h2keep.AsyncClient(http1=False)
    assert (await client.get(server.url)).content == b"ok"
    await client.aclose()
    await client.aclose()
    peer = server.peers[0]
    with pytest.raises(anyio.EndOfStream):
        await peer.until(lambda: False)
    assert len(peer.seen(frames.GoAwayFrame)) == 1


async def test_a_client_that_is_closed_with_requests_in_flight_ends_them(server: RawServer) -> None:
    client = h2keep.AsyncClient(http1=False, timeout=None)
    async with task_group() as tasks:
        failed = anyio.Event()

        async def get() -> None:
            with pytest.raises(h2keep.ConnectionLost, match="the connection was closed by this side"):
                await client.get(server.url)
            failed.set()

        tasks.start_soon(get)
        peer = await server.accept()
        await peer.handshake()
        await peer.request()
        await client.aclose()
        with anyio.fail_after(60.0):
            await failed.wait()


async def test_a_client_that_is_closed_while_it_dials_ends_the_request(server: RawServer) -> None:
    client = h2keep.AsyncClient(timeout=None)

    async def get() -> None:
        with pytest.raises(h2keep.ConnectError, match="the client was closed") as caught:
            await client.get(server.url.replace("http", "https"))
        assert caught.value.unprocessed

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(get)
        # TLS begins, and gets no answer.
        await server.accept()
        await client.aclose()


async def test_a_json_body_reads_back(server: RawServer, client: h2keep.AsyncClient) -> None:
    value = {"text": "ü€", "list": [1, 2.5, None, True]}
    server.serve(answering(json.dumps(value).encode()))
    assert (await client.post(server.url, json=value)).json() == value
    assert json.loads(bytes(last(server).body)) == value
