"""The transport behind httpx and httpx2: what it is given arrives unchanged, and what comes back is what was sent."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import pytest
from hyperframe import frame as frames

import h2keep
from support.clock import virtual_time
from support.raw import Peer, RawRequest, RawServer, answering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    import trustme

    from adapters.conftest import Library
    from support.servers import Server

CANCEL = 8


@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
class TestARealServer:
    """What httpx's users do, against a server that none of us wrote."""

    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
    async def test_methods(self, library: Library, granian: Server, client_ssl: ssl.SSLContext, method: str) -> None:
        async with library.client(verify=client_ssl) as client:
            response = await client.request(method, f"{granian.url}/echo", content=b"a body")
        assert response.http_version == "HTTP/2"
        assert response.reason_phrase == "OK"
        assert response.json()["method"] == method
        assert response.json()["body"] == "a body"

    async def test_bodies(self, library: Library, granian: Server, client_ssl: ssl.SSLContext) -> None:
        async with library.client(verify=client_ssl, client={"base_url": granian.url}) as client:
            echo = (await client.post("/echo", json={"a": ["ü", 1]})).json()
            assert ["content-type", "application/json"] in echo["headers"]
            assert library.module.Response(200, content=echo["body"].encode("latin-1")).json() == {"a": ["ü", 1]}
            echo = (await client.post("/echo", data={"a": "1 2", "b": ["x", "y"]})).json()
            assert ["content-type", "application/x-www-form-urlencoded"] in echo["headers"]
            assert echo["body"] == "a=1+2&b=x&b=y"
            echo = (await client.post("/echo")).json()
            assert ["content-length", "0"] in echo["headers"]
            assert echo["body"] == ""
            echo = (await client.put("/echo", content=bytes(range(256)))).json()
            assert echo["body"].encode("latin-1") == bytes(range(256))

    async def test_multipart_files(
        self, library: Library, granian: Server, client_ssl: ssl.SSLContext, tmp_path: Path
    ) -> None:
        (tmp_path / "sound.wav").write_bytes(b"\0RIFF\xff" * 50_000)
        async with library.client(verify=client_ssl) as client:
            with (tmp_path / "sound.wav").open("rb") as file:
                files = {"audio": ("sound.wav", file, "audio/wav")}
                response = await client.post(f"{granian.url}/echo", data={"model": "m1"}, files=files)
        echo = response.json()
        kind = dict(echo["headers"])["content-type"]
        boundary = kind.removeprefix("multipart/form-data; boundary=").encode()
        parts = echo["body"].encode("latin-1").split(b"--" + boundary)
        assert parts[1] == b'\r\nContent-Disposition: form-data; name="model"\r\n\r\nm1\r\n'
        assert b'name="audio"; filename="sound.wav"\r\nContent-Type: audio/wav\r\n\r\n\0RIFF\xff' in parts[2]
        assert parts[2].endswith(b"\0RIFF\xff\r\n")
        assert len(parts[2]) > 300_000
        assert parts[3] == b"--\r\n"

    async def test_streamed_uploads(self, library: Library, granian: Server, client_ssl: ssl.SSLContext) -> None:
        chunks = [bytes([number]) * size for number, size in enumerate([1, 16_384, 0, 16_385, 1_000_000, 3_000_000])]

        async def body() -> AsyncIterator[bytes]:
            for chunk in chunks:
                await anyio.lowlevel.checkpoint()
                yield chunk

        async with library.client(verify=client_ssl) as client:
            response = await client.post(f"{granian.url}/upload", content=body())
        assert response.json() == {
            "size": sum(map(len, chunks)),
            "sha256": hashlib.sha256(b"".join(chunks)).hexdigest(),
        }

    async def test_streamed_downloads(self, library: Library, granian: Server, client_ssl: ssl.SSLContext) -> None:
        size = 5_000_000
        async with (
            library.client(verify=client_ssl) as client,
            client.stream("GET", f"{granian.url}/download", params={"size": size}) as response,
        ):
            assert response.headers["content-length"] == str(size)
            pieces = [len(piece) async for piece in response.aiter_bytes()]
            assert response.num_bytes_downloaded == size
        assert sum(pieces) == size
        assert len(pieces) > 1

    async def test_lines_come_one_by_one(self, library: Library, granian: Server, client_ssl: ssl.SSLContext) -> None:
        async with library.client(verify=client_ssl) as client:
            url = f"{granian.url}/sse?events=4&every=0.05"
            async with client.stream("GET", url, headers={"accept": "text/event-stream"}) as response:
                moments = [(line, anyio.current_time()) async for line in response.aiter_lines() if line]
        assert [line for line, _ in moments] == [f'data: {{"event": {number}}}' for number in range(4)]
        assert moments[-1][1] - moments[0][1] > 0.1

    @pytest.mark.parametrize("code", [200, 204, 304, 400, 404, 418, 503])
    async def test_statuses(self, library: Library, granian: Server, client_ssl: ssl.SSLContext, code: int) -> None:
        async with library.client(verify=client_ssl) as client:
            response = await client.get(f"{granian.url}/status?code={code}")
            assert response.status_code == code
            assert response.content == (b"" if code in (204, 304) else b'{"code": %d}' % code)
            head = await client.head(f"{granian.url}/status?code={code}")
            assert head.status_code == code
            assert head.content == b""
            assert response.extensions["h2keep"].requests == 2

    async def test_redirects_cookies_and_auth_are_the_librarys(
        self, library: Library, granian: Server, client_ssl: ssl.SSLContext
    ) -> None:
        seen: list[str] = []

        async def saw_request(request: Any) -> None:
            seen.append(f"{request.method} {request.url.path}")

        async def saw_response(response: Any) -> None:
            seen.append(str(response.status_code))

        settings = {
            "base_url": granian.url,
            "follow_redirects": True,
            "auth": ("user", "secret"),
            "event_hooks": {"request": [saw_request], "response": [saw_response]},
        }
        async with library.client(verify=client_ssl, client=settings) as client:
            await client.get("/cookie")
            response = await client.post("/redirect", params={"to": "/echo/end", "code": 303}, content=b"x")
        assert seen == ["GET /cookie", "204", "POST /redirect", "303", "GET /echo/end", "200"]
        headers = dict(response.json()["headers"])
        assert headers["cookie"] == "flavour=oatmeal"
        assert headers["authorization"] == "Basic dXNlcjpzZWNyZXQ="
        assert [earlier.status_code for earlier in response.history] == [303]

    async def test_a_redirected_upload_is_sent_again(
        self, library: Library, granian: Server, client_ssl: ssl.SSLContext
    ) -> None:
        async with library.client(verify=client_ssl, client={"follow_redirects": True}) as client:
            url = f"{granian.url}/redirect?code=307&to=/echo"
            response = await client.post(url, json={"again": True})
        assert response.json()["method"] == "POST"
        assert response.json()["body"].replace(" ", "") == '{"again":true}'

    async def test_a_hundred_requests_share_a_connection(
        self, library: Library, granian: Server, client_ssl: ssl.SSLContext
    ) -> None:
        responses = []
        async with library.client(verify=client_ssl) as client:

            async def get(number: int) -> None:
                responses.append(await client.get(f"{granian.url}/echo/{number}"))

            async with anyio.create_task_group() as tasks:
                for number in range(100):
                    tasks.start_soon(get, number)
            assert {response.json()["path"] for response in responses} == {f"/echo/{n}" for n in range(100)}
            assert len({response.extensions["stream_id"] for response in responses}) == 100
            assert responses[0].extensions["h2keep"].requests == 100


@virtual_time
@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
class TestTheWire:
    """What stands in the frames."""

    @pytest.mark.parametrize(
        "target",
        [
            "/",
            "/v2/nvcf/pexec/functions/4f/versions/1?a=1&b=2",
            "/a%2Fb/%7Ec;x=1//d/?q=a+b&&empty=&%20%c3%a4&c=%2F",
            "/caf%C3%A9?x=%e2%82%ac",
            "/~user/(x)!*',$@:=&?'()*!;:@,/?",
            "/?",
        ],
    )
    async def test_targets_arrive_byte_for_byte(self, library: Library, target: str) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            await client.get(server.url + target)
            (request,) = server.peers[0].requests.values()
        assert request.path == target

    async def test_the_host_header_is_the_authority(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            await client.get(server.url)
            await client.get(server.url, headers={"Host": "f1.invocation.example:8443"})
            first, second = server.peers[0].requests.values()
        assert first.headers[":authority"] == server.url.removeprefix("http://")
        assert second.headers[":authority"] == "f1.invocation.example:8443"
        assert "host" not in first.headers
        assert "host" not in second.headers

    async def test_headers_arrive_in_order_without_those_of_http1(self, library: Library) -> None:
        headers = [
            ("X-B", "1"),
            ("x-a", "2"),
            ("X-B", "3"),
            ("Connection", "keep-alive, x-c"),
            ("Keep-Alive", "timeout=5"),
            ("Transfer-Encoding", "chunked"),
            ("Upgrade", "h2c"),
            ("TE", "trailers"),
            ("x-bytes", "caf\xe9".encode()),
        ]
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            await client.post(server.url, headers=headers, content=b"x")
            (request,) = server.peers[0].requests.values()
        names = [name for name, _ in request.fields]
        assert names[:4] == [":method", ":authority", ":scheme", ":path"]
        assert [(name, value) for name, value in request.fields if name in ("x-a", "x-b")] == [
            ("x-b", "1"),
            ("x-a", "2"),
            ("x-b", "3"),
        ]
        assert request.headers["te"] == "trailers"
        assert request.headers["x-bytes"] == "caf\xe9"
        assert not {"connection", "keep-alive", "transfer-encoding", "upgrade", "host"} & set(names)
        assert names == [name.lower() for name in names]

    async def test_requests_that_are_nearly_alike(self, library: Library) -> None:
        """What is known of one is not taken for the other's."""
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            wanted = []
            for _ in range(2):
                for method, path, host, token, body in [
                    ("POST", "/a", "one.example", "1", b"x"),
                    ("POST", "/a", "one.example", "1", b"xyz"),
                    ("POST", "/a", "one.example", "1", b""),
                    ("PUT", "/a", "one.example", "1", b"x"),
                    ("POST", "/a?b", "one.example", "1", b"x"),
                    ("POST", "/a", "two.example", "1", b"x"),
                    ("POST", "/a", "one.example", "2", b"x"),
                ]:
                    headers = {"Host": host, "X-Token": token}
                    await client.request(method, server.url + path, headers=headers, content=body)
                    wanted.append([method, host, path, token, str(len(body)), len(body)])
            names = (":method", ":authority", ":path", "x-token", "content-length")
            requests = list(server.peers[0].requests.values())
        assert [[*map(request.headers.get, names), len(request.body)] for request in requests] == wanted

    async def test_many_different_requests(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            for number in range(300):
                await client.get(f"{server.url}/{number}", headers={"x-long": "x" * (5_000 if number % 2 else 0)})
            requests = list(server.peers[0].requests.values())
            assert len(client._transport._known) < 256
        assert [request.headers[":path"] for request in requests] == [f"/{number}" for number in range(300)]

    @pytest.mark.parametrize("long", ["url", "field"])
    async def test_long_requests_are_not_remembered(self, library: Library, long: str) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            text = "x" * 5_000
            url, headers = (f"{server.url}/{text}", {}) if long == "url" else (server.url, {"x-long": text})
            for _ in range(2):
                assert (await client.get(url, headers=headers)).status_code == 200
            assert client._transport._known == {}

    @pytest.mark.parametrize("length", ["x", "", "1" * 19, "+1"])
    async def test_a_length_that_is_none(self, library: Library, length: str) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            for _ in range(2):
                with pytest.raises(h2keep.LocalProtocolError, match="content-length"):
                    await client.get(server.url, headers={"content-length": length})
                assert (await client.get(server.url, headers={"content-length": "0"})).status_code == 200

    async def test_a_request_without_a_body_ends_with_its_head(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            await client.get(server.url)
            await client.post(server.url)
            assert not server.peers[0].seen(frames.DataFrame)

    @pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 304), ("GET", 204)])
    async def test_a_length_without_a_body(self, library: Library, method: str, status: int) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering(b"", status=status, headers=[("content-length", "10")] if status != 204 else []))
            response = await client.request(method, server.url)
            assert response.status_code == status
            assert response.headers.get("content-length") == (None if status == 204 else "10")
            assert response.content == b""

    async def test_response_headers_come_as_they_were_sent(self, library: Library) -> None:
        fields = [("set-cookie", "a=1"), ("x-empty", ""), ("set-cookie", "b=2"), ("nvcf-reqid", "7")]
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering(headers=fields))
            response = await client.get(server.url)
        assert response.headers.raw == [(name.encode(), value.encode()) for name, value in fields]

    async def test_interim_responses_are_passed_over(self, library: Library) -> None:
        async def handler(peer: Peer) -> None:
            request = await peer.request()
            await peer.respond(request.stream_id, 103, [("link", "</style.css>")], end_stream=False)
            await peer.respond(request.stream_id, 200, body=b"real")
            await anyio.sleep_forever()

        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(handler)
            response = await client.get(server.url)
        assert (response.status_code, response.content) == (200, b"real")

    async def test_k10_leaving_a_response_early_resets_its_stream_alone(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(_endless)
            async with client.stream("GET", server.url) as response:
                assert response.status_code == 200
            request = server.peers[0].requests[1]
            await server.peers[0].until(lambda: request.reset is not None)
            assert request.reset == CANCEL
            async with client.stream("GET", server.url) as response:
                assert response.status_code == 200
            assert len(server.peers) == 1

    async def test_a_cancelled_request_resets_its_stream_alone(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering(delay=10))
            with anyio.move_on_after(1):
                await client.get(server.url)
            request = server.peers[0].requests[1]
            await server.peers[0].until(lambda: request.reset is not None)
            assert request.reset == CANCEL
            assert (await client.get(server.url, timeout=None)).content == b"ok"
            assert len(server.peers) == 1


@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
class TestExtensions:
    @virtual_time
    async def test_k20_responses_carry_the_facts_of_their_connection(self, library: Library) -> None:
        keepalive = h2keep.Keepalive(jitter=0.0)
        async with (
            RawServer.listen() as server,
            library.client(http1=False, keepalive=keepalive, client={"timeout": None}) as client,
        ):
            server.serve(answering(delay=100))
            began = anyio.current_time()
            response = await client.get(server.url)
            stats = response.extensions["h2keep"]
            assert stats.origin == server.url
            assert (stats.pings_sent, stats.pings_acked) == (3, 3)
            assert stats.last_ping_at == pytest.approx(began + 90, abs=0.1)
            assert stats.last_life == pytest.approx(began + 100, abs=0.1)
            assert stats.interval == 30
            for rtt in (stats.rtt_last, stats.rtt_best, stats.rtt_smoothed):
                assert 0 <= rtt < 1
            assert (stats.requests, stats.open_streams, stats.error) == (1, 0, None)
            assert stats.as_dict()["pings_sent"] == 3
            assert "pings_sent=3" in repr(stats)
            await client.get(server.url)
            assert stats.requests == 2
            assert stats.pings_sent == 6

    @virtual_time
    async def test_responses_carry_version_and_stream(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            responses = [await client.get(server.url) for _ in range(3)]
        assert [response.extensions["stream_id"] for response in responses] == [1, 3, 5]
        assert all(response.extensions["http_version"] == b"HTTP/2" for response in responses)

    async def test_the_network_stream_tells_of_socket_and_tls(
        self, library: Library, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async with RawServer.listen(server_ssl) as server, library.client(verify=client_ssl) as client:
            server.serve(answering())
            network = (await client.get(server.url)).extensions["network_stream"]
            assert network.get_extra_info("server_addr") == ("127.0.0.1", server.port)
            assert network.get_extra_info("client_addr") == server.peers[0].sock.getpeername()
            assert network.get_extra_info("socket").getpeername() == ("127.0.0.1", server.port)
            tls = network.get_extra_info("ssl_object")
            assert tls.selected_alpn_protocol() == "h2"
            assert tls.version() == "TLSv1.3"
            assert tls.getpeercert()["subjectAltName"]
            assert network.get_extra_info("weather") is None
        assert network.get_extra_info("server_addr") is None
        assert network.get_extra_info("client_addr") is None

    @virtual_time
    @pytest.mark.parametrize("given", [{"read": 3.0}, {"connect": 1.0, "read": 3.0, "write": 1.0, "pool": 1.0}])
    async def test_timeouts_of_a_request(self, library: Library, given: dict[str, float]) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering(delay=100))
            began = anyio.current_time()
            with pytest.raises(h2keep.ReadTimeout):
                await client.get(server.url, extensions={"timeout": given})
            assert anyio.current_time() - began == pytest.approx(3.0, abs=0.1)

    @virtual_time
    @pytest.mark.parametrize("given", [{}, {"connect": 1.0, "write": 1.0, "pool": 1.0}, None])
    async def test_what_the_timeout_does_not_name_waits_for_ever(
        self, library: Library, given: dict[str, float] | None
    ) -> None:
        async with RawServer.listen() as server, library.transport(http1=False) as transport:
            server.serve(answering(delay=1000))
            extensions = {} if given is None else {"timeout": given}
            request = library.module.Request("GET", server.url, extensions=extensions)
            response = await transport.handle_async_request(request)
            assert await response.aread() == b"ok"

    async def test_tls_follows_the_urls_host_and_not_the_host_header(
        self, library: Library, cert_path: Path, key_path: Path, client_ssl: ssl.SSLContext
    ) -> None:
        names: list[str | None] = []
        async with (
            RawServer.listen(_context(cert_path, key_path, names)) as server,
            library.client(verify=client_ssl) as client,
        ):
            server.serve(answering())
            url = f"https://localhost:{server.port}/"
            await client.get(url, headers={"Host": "f1.invocation.example"})
            assert server.peers[0].requests[1].headers[":authority"] == "f1.invocation.example"
        assert names == ["localhost"]

    async def test_sni_hostname_overrides_the_urls_host(
        self, library: Library, ca: trustme.CA, client_ssl: ssl.SSLContext, tmp_path: Path
    ) -> None:
        certificate = ca.issue_cert("f1.invocation.example")
        certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
        names: list[str | None] = []
        async with (
            RawServer.listen(_context(tmp_path / "both.pem", None, names)) as server,
            library.client(verify=client_ssl) as client,
        ):
            server.serve(answering())
            with pytest.raises(library.module.ConnectError, match="certificate"):
                await client.get(server.url)
            extensions = {"sni_hostname": "f1.invocation.example"}
            response = await client.get(server.url, extensions=extensions)
            assert response.content == b"ok"
        assert names == [None, "f1.invocation.example"]

    @virtual_time
    async def test_trace_tells_of_each_phase(self, library: Library) -> None:
        told: list[tuple[str, dict[str, Any]]] = []

        async def trace(event: str, info: dict[str, Any]) -> None:
            told.append((event, info))

        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering(headers=[("x-a", "1")]))
            response = await client.post(server.url, content=b"x", extensions={"trace": trace})
        assert [event for event, _ in told] == [
            "http2.receive_response_headers.started",
            "http2.receive_response_headers.complete",
            "http2.receive_response_body.started",
            "http2.receive_response_body.complete",
            "http2.response_closed.started",
            "http2.response_closed.complete",
        ]
        assert told[0][1]["request"] is response.request
        assert told[1][1]["return_value"] == (200, [(b"x-a", b"1")])

    @virtual_time
    async def test_trace_tells_of_failures(self, library: Library) -> None:
        told: list[tuple[str, dict[str, Any]]] = []

        async def trace(event: str, info: dict[str, Any]) -> None:
            told.append((event, info))

        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(_half)
            extensions = {"trace": trace}
            with pytest.raises(library.module.ReadTimeout) as in_body:
                await client.get(server.url, timeout=2.0, extensions=extensions)
            server.stop_listening()
            with pytest.raises(library.module.ConnectError) as in_head:
                await client.get(f"http://127.0.0.1:{server.port}", extensions=extensions | {"sni_hostname": "x"})
        assert [event for event, _ in told if event.endswith("failed")] == [
            "http2.receive_response_body.failed",
            "http2.receive_response_headers.failed",
        ]
        assert [info["exception"] for event, info in told if event.endswith("failed")] == [
            in_body.value,
            in_head.value,
        ]

    @virtual_time
    async def test_a_trace_that_fails_leaves_no_stream_behind(self, library: Library) -> None:
        async def trace(event: str, _info: dict[str, Any]) -> None:
            if event == "http2.receive_response_headers.complete":
                raise LookupError("mine")

        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(_half)
            with pytest.raises(LookupError, match="mine"):
                await client.get(server.url, extensions={"trace": trace})
            request = server.peers[0].requests[1]
            await server.peers[0].until(lambda: request.reset is not None)
            assert request.reset == CANCEL


@virtual_time
@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
class TestLimits:
    async def test_max_connections(self, library: Library) -> None:
        limits = library.module.Limits(max_connections=2)
        async with (
            RawServer.listen() as server,
            library.client(http1=False, limits=limits, client={"timeout": None}) as client,
        ):
            server.serve(answering(delay=10), {frames.SettingsFrame.MAX_CONCURRENT_STREAMS: 1})
            # A connection is taken for roomier than it is until the server has said otherwise.
            await client.get(server.url)
            for requests in (2, 6):
                began = anyio.current_time()
                async with anyio.create_task_group() as tasks:
                    for _ in range(requests):
                        tasks.start_soon(client.get, server.url)
            assert anyio.current_time() - began == pytest.approx(30, abs=0.5)
            assert len(server.peers) == 2

    @pytest.mark.parametrize(("given", "seconds"), [({"keepalive_expiry": 60.0}, 60), ({}, 5), (None, 300)])
    async def test_keepalive_expiry(self, library: Library, given: dict[str, Any] | None, seconds: float) -> None:
        options = {} if given is None else {"limits": library.module.Limits(**given)}
        async with RawServer.listen() as server, library.client(http1=False, **options) as client:
            server.serve(answering())
            await client.get(server.url)
            await anyio.sleep(seconds - 1)
            assert not server.peers[0].ended
            await anyio.sleep(2)
            assert server.peers[0].ended

    async def test_max_keepalive_connections(self, library: Library) -> None:
        limits = library.module.Limits(max_keepalive_connections=0)
        async with RawServer.listen() as server, library.client(http1=False, limits=limits) as client:
            server.serve(answering())
            await client.get(server.url)
            await client.get(server.url)
            assert len(server.peers) == 2


@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
class TestArguments:
    async def test_verify_true_reads_ssl_cert_file(
        self, library: Library, server_ssl: ssl.SSLContext, ca_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(ca_path))
        async with RawServer.listen(server_ssl) as server:
            server.serve(answering())
            async with library.client(verify=True) as client:
                assert (await client.get(server.url)).content == b"ok"
            async with library.client(verify=True, trust_env=False) as client:
                with pytest.raises(library.module.ConnectError, match="certificate"):
                    await client.get(server.url)

    async def test_verify_takes_a_path(self, library: Library, server_ssl: ssl.SSLContext, ca_path: Path) -> None:
        with pytest.warns(DeprecationWarning, match="verify"):
            client = library.client(verify=str(ca_path))
        async with RawServer.listen(server_ssl) as server, client:
            server.serve(answering())
            assert (await client.get(server.url)).content == b"ok"

    async def test_verify_false_trusts_everybody(self, library: Library, server_ssl: ssl.SSLContext) -> None:
        async with RawServer.listen(server_ssl) as server, library.client(verify=False) as client:
            server.serve(answering())
            assert (await client.get(server.url)).content == b"ok"

    @pytest.mark.parametrize("how", ["argument", "context"])
    async def test_a_client_certificate(
        self, library: Library, ca: trustme.CA, client_ssl: ssl.SSLContext, tmp_path: Path, how: str
    ) -> None:
        ca.issue_cert("client.example").private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ca.issue_cert("127.0.0.1").configure_cert(context)
        context.set_alpn_protocols(["h2"])
        context.verify_mode = ssl.CERT_REQUIRED
        ca.configure_trust(context)
        if how == "argument":
            with pytest.warns(DeprecationWarning, match="cert"):
                client = library.client(verify=client_ssl, cert=str(tmp_path / "client.pem"))
        else:
            client_ssl.load_cert_chain(tmp_path / "client.pem")
            client = library.client(verify=client_ssl)
        async with RawServer.listen(context) as server, client:
            server.serve(answering())
            assert (await client.get(server.url)).content == b"ok"

    async def test_nothing_but_alpn_changes_in_the_users_context(
        self, library: Library, server_ssl: ssl.SSLContext, ca_path: Path
    ) -> None:
        # Not the system's trust store, which OpenSSL loads piece by piece as it is used.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(ca_path)
        before = _facts(context)
        async with RawServer.listen(server_ssl) as server, library.client(verify=context) as client:
            server.serve(answering())
            await client.get(server.url)
            assert server.peers[0].alpn == "h2"
        assert _facts(context) == before

    async def test_prior_knowledge(self, library: Library, granian: Server) -> None:
        async with library.client(http1=False) as client:
            response = await client.post(f"{granian.h2c_url}/echo", content=b"x")
        assert response.json()["http_version"] == "2"
        assert response.extensions["network_stream"].get_extra_info("ssl_object") is None

    async def test_uds(self, library: Library, tmp_path: Path) -> None:
        path = str(tmp_path / "h2.sock")
        async with RawServer.listen(uds=path) as server, library.client(http1=False, uds=path) as client:
            server.serve(answering())
            assert (await client.get("http://function.example/x")).content == b"ok"
            assert server.peers[0].requests[1].headers[":authority"] == "function.example"

    async def test_local_address(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False, local_address="127.0.0.2") as client:
            server.serve(answering())
            network = (await client.get(server.url)).extensions["network_stream"]
            assert network.get_extra_info("client_addr")[0] == "127.0.0.2"

    async def test_socket_options(self, library: Library) -> None:
        options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
        async with RawServer.listen() as server, library.client(http1=False, socket_options=options) as client:
            server.serve(answering())
            sock = (await client.get(server.url)).extensions["network_stream"].get_extra_info("socket")
            assert all(sock.getsockopt(level, name) == value for level, name, value in options)

    async def test_a_transport_can_be_used_alone_and_closed_twice(self, library: Library) -> None:
        async with RawServer.listen() as server, library.transport(http1=False) as transport:
            server.serve(answering())
            response = await transport.handle_async_request(library.module.Request("GET", server.url))
            assert isinstance(response, library.module.Response)
            assert [chunk async for chunk in response.stream] == [b"ok"]
            await transport.aclose()
            await server.peers[0].until(lambda: bool(server.peers[0].seen(frames.GoAwayFrame)))
            await transport.aclose()

    async def test_the_event_hook_hears_of_the_connection(self, library: Library) -> None:
        heard: list[str] = []
        hook: Callable[..., object] = lambda stats, event: heard.append(type(event).__name__)  # noqa: E731
        async with RawServer.listen() as server, library.client(http1=False, event_hook=hook) as client:
            server.serve(answering())
            await client.get(server.url)
        assert heard[0] == "ConnectionReady"
        assert heard[-1] == "ConnectionClosed"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"http1": False, "http2": False}, "http1, http2: "),
        ({"proxy": "ftp://127.0.0.1"}, "Unknown scheme for proxy URL"),
        ({"retries": -1}, "retries: -1"),
        ({"engine": "nghttp2"}, "engine: 'nghttp2'"),
    ],
)
def test_arguments_that_are_refused(library: Library, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        library.transport(**options)


def test_a_keepalive_that_is_none_of_ours(library: Library) -> None:
    with pytest.raises(TypeError, match="keepalive: 30"):
        library.transport(keepalive=30)


def test_a_transport_is_one_of_the_librarys(library: Library) -> None:
    transport = library.transport()
    assert isinstance(transport, library.module.AsyncBaseTransport)
    assert not isinstance(transport, library.module.BaseTransport)


async def _endless(peer: Peer) -> None:
    async def answer(request: RawRequest) -> None:
        await peer.respond(request.stream_id, body=b"x" * 1000, end_stream=False)

    while True:
        await answer(await peer.request())


async def _half(peer: Peer) -> None:
    while True:
        request = await peer.request()
        await peer.respond(request.stream_id, body=b"half", end_stream=False)


def _context(certificate: Path, key: Path | None, names: list[str | None]) -> ssl.SSLContext:
    """A server's context that notes the names asked for in SNI."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])

    def note(_connection: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        names.append(name)

    context.sni_callback = note
    return context


def _facts(context: ssl.SSLContext) -> dict[str, object]:
    names = ["options", "verify_mode", "verify_flags", "check_hostname", "minimum_version", "maximum_version"]
    facts = {name: getattr(context, name) for name in [*names, "keylog_filename", "num_tickets", "post_handshake_auth"]}
    return facts | {"ciphers": context.get_ciphers(), "authorities": context.get_ca_certs()}
