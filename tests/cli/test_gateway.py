"""The demo's gateway: what it answers, and that its process never outlives its use."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING

import httpx2
import pytest

from h2keep.cli import gateway as module
from h2keep.cli.gateway import ANSWER, GatewayError, app, gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, MutableMapping
    from pathlib import Path

pytestmark = pytest.mark.anyio

BEARER = {"Authorization": "Bearer nvapi-secret"}


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the application itself, without a server."""
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="https://gateway.test", headers=BEARER) as client:
        yield client


async def test_echo_returns_what_came(client: httpx2.AsyncClient) -> None:
    response = await client.post("/echo?name=John&empty=", content=b"hello", headers=[("x-a", "1"), ("X-A", "2")])
    assert response.status_code == 200
    echo = response.json()
    assert echo["method"] == "POST"
    assert echo["path"] == "/echo"
    assert echo["query"] == {"name": "John", "empty": ""}
    assert echo["headers"]["x-a"] == "1, 2"
    assert echo["body"] == "hello"
    assert echo["authority"] == "gateway.test"
    assert echo["function"] is None


async def test_authority_selects_the_function(client: httpx2.AsyncClient) -> None:
    response = await client.post("/echo", headers={"Host": "f1.invocation.example:8443"})
    assert response.json()["function"] == "f1"
    assert response.json()["authority"] == "f1.invocation.example:8443"


@pytest.mark.parametrize("path", ["/v2/nvcf/pexec/functions/f1", "/v2/nvcf/pexec/functions/f1/versions/v2"])
async def test_path_selects_the_function(client: httpx2.AsyncClient, path: str) -> None:
    response = await client.post(path, json={"a": 1})
    assert response.json()["function"] == "f1"
    assert response.json()["body"] == '{"a":1}'


async def test_every_response_carries_a_request_id_and_a_status(client: httpx2.AsyncClient) -> None:
    responses = [await client.post(path) for path in ("/echo", "/echo", "/nowhere")]
    assert [response.headers["nvcf-status"] for response in responses] == ["fulfilled", "fulfilled", "errored"]
    assert len({uuid.UUID(response.headers["nvcf-reqid"]) for response in responses}) == 3


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer ", "Basic dTpw"])
async def test_without_a_token_401(client: httpx2.AsyncClient, authorization: str) -> None:
    response = await client.post("/echo", headers={"Authorization": authorization})
    assert response.status_code == 401
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json() == {
        "title": "Unauthorized",
        "status": 401,
        "detail": "the request carries no bearer token",
    }


async def test_no_worker_within_poll_seconds_504(client: httpx2.AsyncClient) -> None:
    started = time.monotonic()
    response = await client.post("/echo?silence=60", headers={"NVCF-POLL-SECONDS": "0"})
    assert response.status_code == 504
    assert response.headers["nvcf-status"] == "errored"
    assert time.monotonic() - started < 30


async def test_a_worker_within_poll_seconds(client: httpx2.AsyncClient) -> None:
    response = await client.post("/echo?silence=0.01", headers={"NVCF-POLL-SECONDS": "5"})
    assert response.status_code == 200


async def test_fails_when_asked_to(client: httpx2.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions?status=504", json={})
    assert response.status_code == 504
    assert response.json()["title"] == "Gateway Timeout"


@pytest.mark.parametrize(
    ("path", "body", "blamed"),
    [
        ("/echo?silence=x", {}, "silence: 'x'"),
        ("/echo?silence=-1", {}, "silence: '-1'"),
        ("/echo?silence=inf", {}, "silence: 'inf'"),
        ("/echo?status=200", {}, "status: '200'"),
        ("/echo?status=599", {}, "status: '599'"),
        ("/sse?events=nan", {}, "events: 'nan'"),
        ("/v1/chat/completions", [], "not a JSON object"),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_completion_tokens: 0"),
        ("/v1/chat/completions", {"max_completion_tokens": "3"}, "max_completion_tokens: '3'"),
    ],
)
async def test_nonsense_400(client: httpx2.AsyncClient, path: str, body: object, blamed: str) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert blamed in response.json()["detail"]


async def test_silent_before_the_head(client: httpx2.AsyncClient) -> None:
    started = time.monotonic()
    await client.post("/echo?silence=0.2")
    assert time.monotonic() - started >= 0.2


async def test_server_sent_events(client: httpx2.AsyncClient) -> None:
    response = await client.get("/sse?events=2&every=0.01", headers={"Host": "f1.invocation.example"})
    assert response.headers["content-type"] == "text/event-stream"
    assert response.text == 'data: {"function": "f1", "event": 0}\n\ndata: {"function": "f1", "event": 1}\n\n'


async def test_chat(client: httpx2.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json={"model": "m", "messages": []})
    completion = response.json()
    assert completion["model"] == "m"
    assert completion["object"] == "chat.completion"
    (choice,) = completion["choices"]
    assert choice["message"]["content"] == ANSWER
    assert choice["finish_reason"] == "stop"


async def test_chat_of_a_given_length(client: httpx2.AsyncClient) -> None:
    words = ANSWER.split()
    response = await client.post("/v1/chat/completions", json={"max_completion_tokens": len(words) + 1})
    assert response.json()["choices"][0]["message"]["content"] == f"{ANSWER} {words[0]}"
    assert response.json()["usage"]["completion_tokens"] == len(words) + 1


async def test_chat_streams(client: httpx2.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions?every=0.001", json={"stream": True, "max_tokens": 3})
    *events, done, rest = response.text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert (done, rest) == ("data: [DONE]", "")
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Send a PING"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]


async def test_application_lives_and_ends() -> None:
    phases = iter(["lifespan.startup", "lifespan.shutdown"])
    answers: list[object] = []

    async def receive() -> dict[str, str]:
        return {"type": next(phases)}

    async def send(message: MutableMapping[str, object]) -> None:
        answers.append(message["type"])

    await app({"type": "lifespan"}, receive, send)
    assert answers == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_serves_http2_over_tls_in_a_process_of_its_own() -> None:
    async with (
        gateway() as server,
        httpx2.AsyncClient(
            verify=server.client_context(), http1=False, http2=True, trust_env=False, headers=BEARER
        ) as client,
    ):
        url = f"https://{server.host}:{server.port}/echo"
        response = await client.post(url, headers={"Host": "f1.invocation.example"})
        assert response.http_version == "HTTP/2"
        assert response.json()["function"] == "f1"
        assert response.json()["authority"] == "f1.invocation.example"
    assert not await _accepts(server.port)


async def test_process_ends_when_its_user_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        async with gateway() as server:
            raise ZeroDivisionError
    assert not await _accepts(server.port)


@pytest.mark.parametrize(
    ("script", "complaint"),
    [("echo Traceback >&2; echo no hypercorn here >&2; exit 3", "no hypercorn here"), ("exit 3", "without a word")],
)
async def test_process_that_fails_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, complaint: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(GatewayError, match=f"ended before it was ready: {complaint}$"):
        async with gateway():
            raise AssertionError


async def test_process_that_hangs_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(module, "_START_SECONDS", 0.1)
    with pytest.raises(GatewayError, match=r"not ready after 0\.1 seconds"):
        async with gateway():
            raise AssertionError


async def test_process_dies_with_a_caller_that_is_killed() -> None:
    script = (
        "import asyncio\n"
        "from h2keep.cli.gateway import gateway\n"
        "async def main():\n"
        "    async with gateway() as server:\n"
        "        print(server.port, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    caller = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert caller.stdout is not None
    port = int(await caller.stdout.readline())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    os.kill(caller.pid, signal.SIGKILL)
    await caller.communicate()
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(10):
            assert await reader.read() == b""
    writer.close()


async def _accepts(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return True
    return False
