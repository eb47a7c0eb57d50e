"""What the libraries' documentation says of extensions, of requests and of responses."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import pytest

from support.http1 import Http1Server
from support.raw import RawServer, answering

if TYPE_CHECKING:
    import trustme

    from support.fronts import Front
    from support.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

#: Of httpcore's events those that ours tells of, too.
COMMON = [
    "http2.receive_response_headers.started",
    "http2.receive_response_headers.complete",
    "http2.receive_response_body.started",
    "http2.receive_response_body.complete",
    "http2.response_closed.started",
    "http2.response_closed.complete",
]


class TestRequests:
    async def test_trace(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        seen: dict[str, Any] = {}
        trace = front.hook(lambda event, info: seen.setdefault(event, info))
        async with front.client(verify=client_ssl) as client:
            await client.post(f"{hypercorn.url}/echo", content=b"x", extensions={"trace": trace})
        assert [event for event in seen if event in COMMON] == COMMON
        assert seen["http2.receive_response_headers.complete"]["return_value"][0] == 200
        assert "request" in seen["http2.receive_response_headers.started"]

    async def test_trace_of_http1(self, front: Front, hypercorn: Server) -> None:
        seen: list[str] = []
        trace = front.hook(lambda event, _info: seen.append(event))
        async with front.client() as client:
            await client.get(f"{hypercorn.h2c_url}/echo", extensions={"trace": trace})
        started = [event.removesuffix(".started") for event in seen if event.endswith(".started")]
        assert started == [
            "connection.connect_tcp",
            "http11.send_request_headers",
            "http11.send_request_body",
            "http11.receive_response_headers",
            "http11.receive_response_body",
            "http11.response_closed",
        ]

    async def test_sni_hostname(self, front: Front, ca: trustme.CA, client_ssl: ssl.SSLContext) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2"])
        ca.issue_cert("www.example").configure_cert(context)
        names: list[str | None] = []
        context.sni_callback = lambda _tls, name, _context: names.append(name)
        async with RawServer.listen(context) as server, front.client(verify=client_ssl) as client:
            server.serve(answering())
            headers = {"Host": "www.example"}
            await client.get(server.url, headers=headers, extensions={"sni_hostname": "www.example"})
            request = server.peers[0].requests[1]
        assert names == ["www.example"]
        assert request.headers[":authority"] == "www.example"

    async def test_timeout(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        async with front.client(verify=client_ssl) as client:
            with pytest.raises(front.module.ReadTimeout):
                await client.get(f"{hypercorn.url}/slow?seconds=5", extensions={"timeout": {"read": 0.1}})
            # What it doesn't name is not limited.
            url = f"{hypercorn.url}/slow?seconds=0.1"
            response = await client.get(url, extensions={"timeout": {"connect": 5.0, "pool": 10.0}})
            assert response.request.extensions["timeout"] == {"connect": 5.0, "pool": 10.0}

    async def test_target(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        async with front.client(verify=client_ssl) as client:
            response = await client.get(f"{hypercorn.url}/status", extensions={"target": b"/echo/as//it?is=%7E~"})
        assert (response.json()["path"], response.json()["query"]) == ("/echo/as//it", "is=%7E~")


class TestResponses:
    async def test_http_version(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        async with front.client(verify=client_ssl) as client:
            for url, version in ((hypercorn.url, b"HTTP/2"), (hypercorn.h2c_url, b"HTTP/1.1")):
                response = await client.get(f"{url}/echo")
                assert response.extensions["http_version"] == version
                assert response.http_version == version.decode()

    async def test_reason_phrase(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        async with Http1Server.listen() as server, front.client(verify=client_ssl) as client:
            response = await client.get(server.url)
            assert response.extensions["reason_phrase"] == b"As Told"
            response = await client.get(f"{hypercorn.url}/echo")
            assert "reason_phrase" not in response.extensions
            assert response.reason_phrase == "OK"

    async def test_stream_id(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        async with front.client(verify=client_ssl) as client:
            found = [(await client.get(f"{hypercorn.url}/echo")).extensions["stream_id"] for _ in range(3)]
        assert found == [1, 3, 5]

    async def test_network_stream(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        async with front.client(verify=client_ssl) as client:
            for url in (hypercorn.url, hypercorn.h2c_url):
                response = await client.get(f"{url}/echo")
                network = response.extensions["network_stream"]
                assert network.get_extra_info("server_addr") == ("127.0.0.1", int(url.rpartition(":")[2]))
                host, port = network.get_extra_info("client_addr")
                assert (host, port) == network.get_extra_info("socket").getsockname()
                assert network.get_extra_info("nothing") is None
                tls = network.get_extra_info("ssl_object")
                if url == hypercorn.url:
                    assert tls.version() == "TLSv1.3"
                    assert tls.selected_alpn_protocol() == "h2"
                    assert tls.cipher()
                else:
                    assert tls is None
