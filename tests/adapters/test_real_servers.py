"""Caddy (Go), granian (Rust) and hypercorn (Python's h2) in processes of their own: real HTTP/2 from three authors."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import h2keep
from h2keep.protocol import events

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

    from support.servers import Server, ServerFactory

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

QUICK = h2keep.Keepalive(read_idle_timeout=0.2, ping_timeout=5.0)
every_server = pytest.mark.parametrize("name", ["caddy", "granian", "hypercorn"])


@pytest.fixture(params=["tls", "cleartext"])
def url(request: pytest.FixtureRequest, real_server: Server) -> str:
    """The server over TLS, and in cleartext with prior knowledge."""
    return real_server.url if request.param == "tls" else real_server.h2c_url


def client(context: ssl.SSLContext, **options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(verify=context, http1=False, **{"timeout": 15.0} | options)


async def test_requests(url: str, client_ssl: ssl.SSLContext) -> None:
    async with client(client_ssl) as c:
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            echo = (await c.request(method, f"{url}/echo/a%20b?q=1&&r=%2F", content=b"hello")).json()
            assert (echo["method"], echo["http_version"]) == (method, "2")
            assert (echo["path"], echo["query"]) == ("/echo/a%20b", "q=1&&r=%2F")
            assert echo["body"] == "hello"
        head = await c.head(f"{url}/echo")
        assert (head.status_code, head.content) == (200, b"")
        for code in (204, 304, 404, 500):
            assert (await c.get(f"{url}/status?code={code}")).status_code == code


async def test_the_authority_is_the_host_header(url: str, client_ssl: ssl.SSLContext) -> None:
    async with client(client_ssl) as c:
        echo = (await c.get(f"{url}/echo", headers={"Host": "f1.invocation.example"})).json()
    assert echo["authority"] == "f1.invocation.example"


async def test_many_requests_at_once(url: str, client_ssl: ssl.SSLContext) -> None:
    answers: set[str] = set()
    async with client(client_ssl) as c:
        # What the server allows at once is known from then on.
        await c.get(f"{url}/echo")

        async def get(number: int) -> None:
            answers.add((await c.get(f"{url}/echo/{number}")).json()["path"])

        async with anyio.create_task_group() as tasks:
            for number in range(300):
                tasks.start_soon(get, number)
    assert answers == {f"/echo/{number}" for number in range(300)}


async def test_uploads(url: str, client_ssl: ssl.SSLContext) -> None:
    chunks = [bytes([number]) * 300_000 for number in range(20)]

    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    expected = {"size": 6_000_000, "sha256": hashlib.sha256(b"".join(chunks)).hexdigest()}
    async with client(client_ssl) as c:
        assert (await c.post(f"{url}/upload", content=body())).json() == expected
        assert (await c.put(f"{url}/upload", content=b"".join(chunks))).json() == expected


async def test_an_upload_as_slow_as_its_reader(real_server: Server, client_ssl: ssl.SSLContext) -> None:
    async with client(client_ssl, keepalive=QUICK) as c:
        response = await c.post(f"{real_server.url}/upload?pause=0.002", content=b"x" * 3_000_000)
        assert response.json()["size"] == 3_000_000


async def test_downloads_beside_small_requests(url: str, client_ssl: ssl.SSLContext) -> None:
    size = 8_000_000
    async with client(client_ssl) as c:

        async def download() -> None:
            async with c.stream("GET", f"{url}/download?size={size}") as response:
                assert sum([len(chunk) async for chunk in response.aiter_bytes()]) == size

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(download)
            for _ in range(20):
                assert (await c.get(f"{url}/echo")).status_code == 200


async def test_events_come_as_they_are_sent(real_server: Server, client_ssl: ssl.SSLContext) -> None:
    async with (
        client(client_ssl) as c,
        c.stream(
            "GET", f"{real_server.url}/sse?events=5&every=0.1", headers={"accept": "text/event-stream"}
        ) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        moments = [anyio.current_time() async for line in response.aiter_lines() if line.startswith("data:")]
    assert len(moments) == 5
    assert moments[-1] - moments[0] > 0.25


async def test_k10_the_server_learns_that_the_client_left(url: str, client_ssl: ssl.SSLContext) -> None:
    token = uuid.uuid4().hex
    async with client(client_ssl) as c:
        async with c.stream("GET", f"{url}/sse?events=1000&every=30&token={token}") as response:
            assert response.status_code == 200
        left = await c.get(f"{url}/departure?token={token}")
        assert left.json() == {"left": True}
        assert left.connection.requests == 2


async def test_k3_pings_are_answered_before_and_within_a_response(
    real_server: Server, client_ssl: ssl.SSLContext
) -> None:
    async with client(client_ssl, keepalive=QUICK) as silent, client(client_ssl, keepalive=QUICK) as stalling:

        async def stall() -> None:
            async with stalling.stream("GET", f"{real_server.url}/stall?seconds=0.9") as response:
                assert await response.aread() == b"head body"
                assert response.connection.pings_acked >= 2

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stall)
            response = await silent.get(f"{real_server.url}/slow?seconds=0.9")
        figures = response.connection
        assert response.json() == {"slow": True}
        assert 2 <= figures.pings_sent <= 5
        assert figures.pings_acked == figures.pings_sent
        assert figures.rtt_best is not None
        assert 0 < figures.rtt_best < 1


async def test_trailers(hypercorn: Server, client_ssl: ssl.SSLContext) -> None:
    async with client(client_ssl) as c:
        response = await c.get(f"{hypercorn.url}/trailers", headers={"te": "trailers"})
    assert response.content == b"body"
    assert dict(response.trailers) == {"x-checksum": "1234"}


@every_server
async def test_k17_a_graceful_shutdown_lets_responses_end(
    name: str, server_factory: ServerFactory, client_ssl: ssl.SSLContext
) -> None:
    server = server_factory(name)
    heard: list[Any] = []
    going = anyio.Event()

    def hook(stats: h2keep.ConnectionStats, event: object) -> None:
        heard.append(event)
        if isinstance(event, events.GoAwayReceived):
            going.set()

    async with client(client_ssl, event_hook=hook) as c:
        async with c.stream("GET", f"{server.url}/stall?seconds=0.5") as response:
            assert response.status_code == 200
            server.begin_shutdown()
            with anyio.fail_after(60.0):
                await going.wait()
            assert await response.aread() == b"head body"
        with pytest.raises(h2keep.ConnectError):
            await _until_refused(c, server.url)
    (closed,) = [event for event in heard if isinstance(event, events.ConnectionClosed)][:1]
    assert closed.error is None


async def _until_refused(c: h2keep.AsyncClient, url: str) -> None:
    """A server that has said GOAWAY may go on listening for a moment, and even answer."""
    with anyio.fail_after(60.0):
        while True:
            with contextlib.suppress(h2keep.ConnectionLost, h2keep.RemoteProtocolError):
                await c.get(f"{url}/echo")
            await anyio.sleep(0.05)


async def test_k8_a_killed_server_is_noticed_at_once(server_factory: ServerFactory, client_ssl: ssl.SSLContext) -> None:
    server = server_factory("granian")
    async with client(client_ssl) as c, c.stream("GET", f"{server.url}/stall?seconds=60") as response:
        assert response.status_code == 200
        server.kill()
        with pytest.raises(h2keep.ConnectionLost) as caught:
            await response.aread()
        assert not isinstance(caught.value, h2keep.PingTimeout)


async def test_k4_a_frozen_server_is_found_out(server_factory: ServerFactory, client_ssl: ssl.SSLContext) -> None:
    server = server_factory("granian")
    keepalive = h2keep.Keepalive(read_idle_timeout=0.3, ping_timeout=0.5)
    async with (
        client(client_ssl, timeout=None, keepalive=keepalive) as c,
        c.stream("GET", f"{server.url}/stall?seconds=60") as response,
    ):
        assert response.status_code == 200
        server.freeze()
        began = anyio.current_time()
        with pytest.raises(h2keep.PingTimeout):
            await response.aread()
        assert anyio.current_time() - began >= 0.5
