"""What NVIDIA Cloud Functions asks of its clients, against a gateway that behaves like its invocation service."""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import h2keep
from h2keep.protocol import events

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

    from adapters.conftest import Library
    from support.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

BEARER = {"Authorization": "Bearer nvapi-secret"}
FUNCTION = "4f1c.invocation.api.example"
QUICK = h2keep.Keepalive(read_idle_timeout=0.2, ping_timeout=5.0)


@pytest.fixture(params=["tls", "cleartext"])
def scheme(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def gateway(scheme: str, nvcf: Server) -> str:
    """The demo's gateway's URL."""
    return nvcf.url if scheme == "tls" else nvcf.h2c_url


@pytest.fixture
def upstream(scheme: str, granian: Server) -> str:
    """The URL of a server that repeats what it gets byte for byte."""
    return granian.url if scheme == "tls" else granian.h2c_url


@pytest.fixture
async def opened() -> list[h2keep.ConnectionStats]:
    """Each connection that was opened."""
    return []


@pytest.fixture
async def client(
    library: Library, client_ssl: ssl.SSLContext, scheme: str, opened: list[h2keep.ConnectionStats]
) -> AsyncIterator[Any]:
    def hook(stats: h2keep.ConnectionStats, event: object) -> None:
        if isinstance(event, events.ConnectionReady):
            opened.append(stats)

    options = {"verify": client_ssl, "http1": scheme == "tls", "keepalive": QUICK, "event_hook": hook}
    async with library.client(client={"headers": BEARER}, **options) as client:
        yield client


async def test_the_host_header_chooses_the_function(client: Any, gateway: str) -> None:
    response = await client.post(f"{gateway}/echo", json={"name": "J\xfcrgen"}, headers={"Host": FUNCTION})
    echo = response.json()
    assert (response.status_code, response.http_version) == (200, "HTTP/2")
    assert echo["function"] == "4f1c"
    assert echo["authority"] == FUNCTION
    assert json.loads(echo["body"]) == {"name": "J\xfcrgen"}
    assert echo["headers"]["authorization"] == "Bearer nvapi-secret"


async def test_the_path_chooses_the_function(client: Any, gateway: str) -> None:
    path = "/v2/nvcf/pexec/functions/4f1c/versions/77"
    echo = (await client.post(f"{gateway}{path}?a=1%202&b=", content=b"{}")).json()
    assert (echo["function"], echo["path"]) == ("4f1c", path)
    assert echo["query"] == {"a": "1 2", "b": ""}


async def test_paths_and_queries_are_preserved(client: Any, upstream: str) -> None:
    path, query = "/echo/v1%2Finfer;a=1/%C3%BC//x", "q=a+b&&empty=&%20=%2F&list=1&list=2"
    echo = (await client.post(f"{upstream}{path}?{query}", headers={"Host": FUNCTION})).json()
    assert (echo["authority"], echo["path"], echo["query"]) == (FUNCTION, path, query)


async def test_multipart(client: Any, upstream: str) -> None:
    picture = bytes(range(256)) * 40
    files = {"image": ("a.png", picture, "image/png")}
    echo = (await client.post(f"{upstream}/echo", data={"n": "1"}, files=files, headers={"Host": FUNCTION})).json()
    assert dict(echo["headers"])["content-type"].startswith("multipart/form-data; boundary=")
    assert picture in echo["body"].encode("latin-1")


async def test_a_binary_put(client: Any, upstream: str) -> None:
    data = bytes(range(256)) * 8_000
    headers = {"Host": FUNCTION, "Content-Type": "application/octet-stream"}
    response = await client.put(f"{upstream}/upload", content=data, headers=headers)
    assert response.json() == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


async def test_many_calls_share_one_persistent_connection(
    client: Any, gateway: str, opened: list[h2keep.ConnectionStats]
) -> None:
    async def call(number: int) -> None:
        response = await client.post(f"{gateway}/echo", json=number, headers={"Host": FUNCTION})
        assert response.json()["body"] == str(number)

    for number in range(10):
        await call(number)
    async with anyio.create_task_group() as tasks:
        for number in range(40):
            tasks.start_soon(call, number)
    assert [stats.requests for stats in opened] == [50]


async def test_k3_a_slow_inference(client: Any, gateway: str) -> None:
    response = await client.post(f"{gateway}/echo?silence=0.7", json={}, headers={"Host": FUNCTION})
    assert response.status_code == 200
    assert response.extensions["h2keep"].pings_acked >= 2


async def test_server_sent_events(client: Any, gateway: str) -> None:
    headers = {"Host": FUNCTION, "Accept": "text/event-stream"}
    async with client.stream("POST", f"{gateway}/sse?events=4&every=0.05", json={}, headers=headers) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert uuid.UUID(response.headers["nvcf-reqid"]).version == 4
        lines = [line async for line in response.aiter_lines() if line]
    assert [json.loads(line.removeprefix("data: ")) for line in lines] == [
        {"function": "4f1c", "event": number} for number in range(4)
    ]


async def test_k10_the_server_learns_that_the_reader_of_events_left(
    client: Any, upstream: str, opened: list[h2keep.ConnectionStats]
) -> None:
    token = uuid.uuid4().hex
    headers = {"Accept": "text/event-stream"}
    url = f"{upstream}/sse?events=1000&every=30&token={token}"
    async with client.stream("POST", url, json={}, headers=headers) as response:
        assert response.status_code == 200
    assert (await client.get(f"{upstream}/departure?token={token}")).json() == {"left": True}
    assert [stats.requests for stats in opened] == [2]


@pytest.mark.parametrize("status", [400, 402, 429, 500, 504])
async def test_failures_are_handed_over_untouched(client: Any, gateway: str, status: int) -> None:
    response = await client.post(f"{gateway}/echo?status={status}", json={}, headers={"Host": FUNCTION})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["nvcf-status"] == "errored"
    assert uuid.UUID(response.headers["nvcf-reqid"]).version == 4
    assert response.json()["status"] == status
    assert response.json()["detail"] == "as asked for"


async def test_without_a_token_401(client: Any, gateway: str) -> None:
    response = await client.post(f"{gateway}/echo", json={}, headers={"Host": FUNCTION, "Authorization": ""})
    assert response.status_code == 401
    assert response.json()["detail"] == "the request carries no bearer token"


async def test_no_worker_in_time_504(client: Any, gateway: str) -> None:
    headers = {"Host": FUNCTION, "NVCF-POLL-SECONDS": "0"}
    response = await client.post(f"{gateway}/echo?silence=60", json={}, headers=headers)
    assert response.status_code == 504
    assert response.headers["nvcf-status"] == "errored"
    assert response.json()["detail"] == "no worker answered within 0 seconds"
