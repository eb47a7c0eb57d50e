"""What the libraries' documentation says of transports, mounts, proxies and event hooks."""

from __future__ import annotations

import inspect
import tempfile
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from proxy.servers import TinyProxy
from support.fronts import Front
from support.http1 import Http1Server
from support.raw import RawServer, answering

if TYPE_CHECKING:
    import ssl

    from support.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]


class TestTheInterface:
    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_the_arguments_are_theirs_in_their_order(self, front: Front) -> None:
        theirs = Front(front.name, front.threaded, ours=False).kind
        wanted = list(inspect.signature(theirs).parameters.values())
        given = list(inspect.signature(front.kind).parameters.values())[: len(wanted)]
        assert [(parameter.name, parameter.kind) for parameter in given] == [
            (parameter.name, parameter.kind) for parameter in wanted
        ]
        # HTTP/2 is what ours is for; and limits not given aren't 5 s.
        different = {have.name for have, want in zip(given, wanted, strict=True) if have.default != want.default}
        assert different <= {"http2", "limits"}
        base = front.module.BaseTransport if front.threaded else front.module.AsyncBaseTransport
        assert issubclass(front.kind, base)

    async def test_a_transport_by_itself(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        request = front.module.Request("POST", f"{hypercorn.url}/echo", content=b"x", headers={"x-a": "1"})

        async def for_loops() -> Any:
            async with front.kind(verify=client_ssl, http2=True) as transport:
                response = await transport.handle_async_request(request)
                await response.aread()
                await response.aclose()
            await transport.aclose()
            return response

        def for_threads() -> Any:
            with front.kind(verify=client_ssl, http2=True) as transport:
                response = transport.handle_request(request)
                response.read()
                response.close()
            transport.close()
            return response

        response = await (anyio.to_thread.run_sync(for_threads) if front.threaded else for_loops())
        assert (response.status_code, response.http_version) == (200, "HTTP/2")
        assert response.json()["body"] == "x"
        assert ["x-a", "1"] in response.json()["headers"]

    async def test_requests_and_responses(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        async with front.client(verify=client_ssl, client={"base_url": hypercorn.url}) as client:
            streamed = await client.request("PUT", "/echo", content=front.chunks([b"a", b"", b"b"]))
            assert streamed.json()["body"] == "ab"
            form = await client.post("/echo", data={"a": "1 2"}, files={"f": ("f.txt", b"file")})
            assert 'name="f"; filename="f.txt"' in form.json()["body"]
            answer = await client.get("/status", params={"code": 418})
            assert (answer.status_code, answer.reason_phrase, answer.content) == (418, "I'm a teapot", b'{"code": 418}')
            head = await client.request("HEAD", "/echo")
            assert (head.status_code, head.content) == (200, b"")
            download = await client.get("/download", params={"size": 300_000})
            assert len(download.content) == 300_000
            redirected = await client.get("/redirect?to=/echo/end", follow_redirects=True)
            assert redirected.json()["path"] == "/echo/end"

    async def test_streamed_responses(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        url = f"{hypercorn.url}/sse?events=3&every=0.01"

        async def for_loops(real: Any) -> list[str]:
            async with real.stream("GET", url) as response:
                return [line async for line in response.aiter_lines() if line]

        def for_threads(real: Any) -> list[str]:
            with real.stream("GET", url) as response:
                return [line for line in response.iter_lines() if line]

        async with front.client(verify=client_ssl) as client:
            lines = await client.do(for_threads, for_loops)
        assert lines == [f'data: {{"event": {number}}}' for number in range(3)]

    async def test_a_streamed_response_that_is_left_early(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext
    ) -> None:
        url = f"{hypercorn.url}/sse?events=1000&every=0.01"

        async def for_loops(real: Any) -> int:
            async with real.stream("GET", url) as response:
                return int(response.status_code)

        def for_threads(real: Any) -> int:
            with real.stream("GET", url) as response:
                return int(response.status_code)

        async with front.client(verify=client_ssl) as client:
            assert await client.do(for_threads, for_loops) == 200
            response = await client.get(f"{hypercorn.url}/echo")
            assert response.extensions["stream_id"] == 3


class TestWrapping:
    async def test_a_transport_that_wraps_it(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        """As the documentation's `DebuggingTransport`."""
        seen: list[Any] = []

        class Debugging(front.module.BaseTransport):  # type: ignore[name-defined,misc]
            def __init__(self, **options: Any) -> None:
                self._wrapper = front.kind(**options)

            def handle_request(self, request: Any) -> Any:
                response = self._wrapper.handle_request(request)
                seen.append((request.url.path, response.status_code))
                return response

            def close(self) -> None:
                seen.append("closed")
                self._wrapper.close()

        class AsyncDebugging(front.module.AsyncBaseTransport):  # type: ignore[name-defined,misc]
            def __init__(self, **options: Any) -> None:
                self._wrapper = front.kind(**options)

            async def handle_async_request(self, request: Any) -> Any:
                response = await self._wrapper.handle_async_request(request)
                seen.append((request.url.path, response.status_code))
                return response

            async def aclose(self) -> None:
                seen.append("closed")
                await self._wrapper.aclose()

        kind = Debugging if front.threaded else AsyncDebugging
        wrapping = Front(front.name, front.threaded, front.ours)
        async with wrapping.client(client={"mounts": {"all://": kind(verify=client_ssl)}}) as client:
            assert (await client.get(f"{hypercorn.url}/echo/x")).json()["path"] == "/echo/x"
        assert seen == [("/echo/x", 200), "closed"]

    async def test_subclasses(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        """As those that add retries or headers."""
        name = "handle_request" if front.threaded else "handle_async_request"

        def handle(self: Any, request: Any) -> Any:
            request.headers["x-added"] = "yes"
            return getattr(super(subclass, self), name)(request)

        subclass: Any = type("Sub", (front.kind,), {name: handle})
        async with front.client(client={"mounts": {"https://": subclass(verify=client_ssl)}}) as client:
            assert ["x-added", "yes"] in (await client.get(f"{hypercorn.url}/echo")).json()["headers"]

    async def test_mounts(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
        mocked = front.module.MockTransport(lambda _: front.module.Response(299))
        mounts = {"https://127.0.0.1": front.kind(verify=client_ssl, http2=True), "all://mocked.example": mocked}
        async with front.client(client={"mounts": mounts}) as client:
            assert (await client.get(f"{hypercorn.url}/echo")).http_version == "HTTP/2"
            assert (await client.get("https://mocked.example/")).status_code == 299
            with pytest.raises(front.module.ConnectError):
                # Not that one's context.
                await client.get(f"{hypercorn.url.replace('127.0.0.1', 'localhost')}/echo")


class TestConnecting:
    async def test_local_address(self, front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
        async with (
            RawServer.listen(server_ssl) as server,
            front.client(verify=client_ssl, local_address="127.0.0.7") as client,
        ):
            server.serve(answering())
            await client.get(server.url)
            assert server.peers[0].sock.getpeername()[0] == "127.0.0.7"

    async def test_uds(self, front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
        with tempfile.TemporaryDirectory(prefix="h2keep-") as directory:
            path = f"{directory}/socket"
            async with (
                RawServer.listen(server_ssl, uds=path) as server,
                front.client(verify=client_ssl, uds=path) as client,
            ):
                server.serve(answering())
                response = await client.get("https://localhost/info")
                assert (response.content, response.http_version) == (b"ok", "HTTP/2")
                assert server.peers[0].requests[1].headers[":authority"] == "localhost"

    # httpcore forgets the sockets of unix that it couldn't connect.
    @pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
    @pytest.mark.parametrize("retries", [0, 2])
    async def test_retries(
        self, front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, retries: int
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="h2keep-") as directory:
            path = f"{directory}/socket"
            async with (
                front.client(verify=client_ssl, uds=path, retries=retries) as client,
                anyio.create_task_group() as tasks,
            ):
                outcome: list[Any] = []
                done = anyio.Event()

                async def ask() -> None:
                    try:
                        outcome.append((await client.get("https://localhost/")).content)
                    except front.module.ConnectError:
                        outcome.append(None)
                    done.set()

                tasks.start_soon(ask)
                # The first retry is at once, the second after half a second.
                await anyio.sleep(0.1)
                async with RawServer.listen(server_ssl, uds=path) as server:
                    server.serve(answering())
                    await done.wait()
                assert outcome == [b"ok" if retries else None]

    async def test_nobody_is_there(self, front: Front) -> None:
        async with front.client(verify=False) as client:
            with pytest.raises(front.module.ConnectError) as caught:
                await client.get("https://127.0.0.1:9/")
            assert caught.value.request.url.port == 9
            with pytest.raises(front.module.UnsupportedProtocol):
                await client.get("ftp://127.0.0.1/")

    async def test_a_connection_that_ends(
        self, front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async def vanish(peer: Any) -> None:
            await peer.request()
            await peer.eof()

        async with RawServer.listen(server_ssl) as server, front.client(verify=client_ssl) as client:
            server.serve(vanish)
            # NetworkError or ProtocolError: what ends is not always said to have been sent.
            with pytest.raises(front.module.TransportError):
                await client.post(server.url, content=b"x")


class TestProxies:
    @pytest.mark.parametrize("kind", ["str", "url", "proxy", "mounted"])
    async def test_a_tunnel(self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext, kind: str) -> None:
        async with TinyProxy.listen() as proxy:
            url = proxy.url.replace("//", "//user:pass@")
            module = front.module
            given = {
                "str": url,
                "url": module.URL(url),
                "proxy": module.Proxy(proxy.url, auth=("user", "pass"), headers={"x-tenant": "blue"}),
                "mounted": url,
            }[kind]
            options: dict[str, Any] = {"verify": client_ssl, "proxy": given}
            if kind == "mounted":
                options = {"client": {"mounts": {"https://": front.kind(verify=client_ssl, http2=True, proxy=url)}}}
            async with front.client(**options) as client:
                response = await client.get(f"{hypercorn.url}/echo")
            assert response.http_version == "HTTP/2"
            (head,) = proxy.heads
            assert b"Basic dXNlcjpwYXNz" in head
            assert head.startswith(b"CONNECT 127.0.0.1:%d " % int(hypercorn.url.rpartition(":")[2]))
            assert (b"x-tenant: blue" in head.lower()) == (kind == "proxy")

    async def test_a_proxy_that_refuses(self, front: Front, client_ssl: ssl.SSLContext) -> None:
        async with TinyProxy.listen() as proxy, front.client(verify=client_ssl, proxy=proxy.url) as client:
            proxy.then = "close"
            proxy.answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
            with pytest.raises(front.module.ProxyError, match="407"):
                await client.get("https://127.0.0.1:9/")

    async def test_http_urls_are_forwarded(self, front: Front) -> None:
        async with Http1Server.listen() as proxy, front.client(proxy=proxy.url) as client:
            response = await client.get("http://origin.example/path?a=b")
            assert response.json()["first"] == "GET http://origin.example/path?a=b HTTP/1.1"


class TestEventHooks:
    async def test_they_see_requests_and_responses(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext
    ) -> None:
        seen: list[Any] = []

        def on_request(request: Any) -> None:
            request.headers["x-stamp"] = "7"
            seen.append(f"{request.method} {request.url.path}")

        def on_response(response: Any) -> None:
            seen.append((response.request.url.path, response.status_code, response.is_stream_consumed))

        hooks = {"request": [front.hook(on_request)], "response": [front.hook(on_response)]}
        async with front.client(verify=client_ssl, client={"event_hooks": hooks}) as client:
            response = await client.get(f"{hypercorn.url}/echo")
        assert seen == ["GET /echo", ("/echo", 200, False)]
        assert ["x-stamp", "7"] in response.json()["headers"]

    async def test_those_that_raise_leave_the_client_usable(
        self, front: Front, hypercorn: Server, client_ssl: ssl.SSLContext
    ) -> None:
        hooks = {"response": [front.hook(lambda response: response.raise_for_status())]}
        async with front.client(verify=client_ssl, client={"event_hooks": hooks}) as client:
            for _ in range(3):
                with pytest.raises(front.module.HTTPStatusError):
                    await client.get(f"{hypercorn.url}/status?code=503")
            assert (await client.get(f"{hypercorn.url}/echo")).status_code == 200
