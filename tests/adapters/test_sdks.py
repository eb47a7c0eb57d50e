"""The asynchronous SDKs on our transport: what they promise their users holds, and long silence is survived."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import openai
import pytest

import h2keep
from h2keep.cli.gateway import ANSWER
from h2keep.cli.middlebox import FlowForgotten
from support.raw import Peer, RawRequest, RawServer, answering
from support.sdks import ANTHROPIC, GROQ, MESSAGES, OPENAI, QUICK, Sdk, settled
from support.servers import Server, forgetful

if TYPE_CHECKING:
    import ssl

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

#: The SDKs don't close the generators that they are made of; trio remarks on that.
generators_left_to_the_garbage_collector = pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")

CANCEL = 8


@pytest.fixture(params=[OPENAI, ANTHROPIC, GROQ], ids=str)
def sdk(request: pytest.FixtureRequest) -> Sdk:
    found: Sdk = request.param
    return found


async def test_a_completion(sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext) -> None:
    async with sdk.async_client(granian.url, verify=client_ssl) as client:
        assert sdk.text(await sdk.create(client)) == ANSWER


async def test_raw_responses_come_over_http2(granian: Server, client_ssl: ssl.SSLContext) -> None:
    sdk = OPENAI
    async with sdk.async_client(granian.url, verify=client_ssl) as client:
        raw = await client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
        assert raw.http_response.http_version == "HTTP/2"
        assert raw.http_response.extensions["h2keep"].requests == 1
        assert raw.headers["nvcf-status"] == "fulfilled"
        assert sdk.text(raw.parse()) == ANSWER


@generators_left_to_the_garbage_collector
async def test_streaming(sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext) -> None:
    async with sdk.async_client(granian.url, verify=client_ssl) as client, settled():
        pieces = [piece async for piece in sdk.pieces(await sdk.create(client, stream=True))]
    assert "".join(pieces) == ANSWER
    assert len(pieces) == len(ANSWER.split())


async def test_many_at_once_share_one_connection(sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext) -> None:
    opened: list[h2keep.ConnectionStats] = []
    answers: list[str] = []

    def hook(stats: h2keep.ConnectionStats, event: object) -> None:
        if type(event).__name__ == "ConnectionReady":
            opened.append(stats)

    async with sdk.async_client(granian.url, verify=client_ssl, event_hook=hook) as client:

        async def ask() -> None:
            answers.append(sdk.text(await sdk.create(client)))

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(ask)
        assert answers == [ANSWER] * 20
        assert [stats.requests for stats in opened] == [20]


async def _begin_answer(peer: Peer, sdk: Sdk) -> RawRequest:
    request = await peer.request()
    headers = [("content-type", "text/event-stream")]
    await peer.respond(request.stream_id, 200, headers, sdk.first_event(), end_stream=False)
    return request


@generators_left_to_the_garbage_collector
@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_k10_leaving_in_mid_stream_resets_the_stream(sdk: Sdk, how: str) -> None:
    async with RawServer.listen() as server, sdk.async_client(server.url, http1=False) as client, settled():

        async def handler(peer: Peer) -> None:
            await _begin_answer(peer, sdk)
            second = await peer.request()
            await peer.respond(second.stream_id, 418, [("content-type", "application/json")], b"{}")
            await anyio.sleep_forever()

        server.serve(handler)
        got: list[str] = []

        async def read(scope: anyio.CancelScope) -> None:
            stream = await sdk.create(client, stream=True)
            async for piece in sdk.pieces(stream):
                got.append(piece)
                if how == "close":
                    break
                scope.cancel()
            await stream.close()

        with anyio.CancelScope() as scope:
            await read(scope)
        peer = server.peers[0]
        await peer.until(lambda: peer.requests[1].reset is not None)
        assert peer.requests[1].reset == CANCEL
        assert got == ["Hello"]
        with pytest.raises(sdk.module.APIStatusError):
            await sdk.create(client)
        assert len(server.peers) == 1


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (400, "BadRequestError"),
        (401, "AuthenticationError"),
        (404, "NotFoundError"),
        (429, "RateLimitError"),
        (500, "InternalServerError"),
        (504, "InternalServerError"),
    ],
)
async def test_errors_reach_the_user_untouched(
    sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, status: int, name: str
) -> None:
    body = b'{"title": "No", "detail": "because \xc3\xa4",  "status": %d}' % status
    headers = [("content-type", "application/problem+json"), ("nvcf-reqid", "r-1"), ("nvcf-status", "errored")]
    async with (
        RawServer.listen(server_ssl) as server,
        sdk.async_client(server.url, verify=client_ssl) as client,
    ):
        server.serve(answering(body, status=status, headers=headers))
        with pytest.raises(getattr(sdk.module, name)) as caught:
            await sdk.create(client)
        request = server.peers[0].requests[1]
    assert caught.value.status_code == status
    assert caught.value.response.content == body
    assert caught.value.response.headers["nvcf-reqid"] == "r-1"
    assert caught.value.response.headers["nvcf-status"] == "errored"
    assert caught.value.body == json.loads(body)
    assert request.path == sdk.path


async def test_k3_an_answer_that_is_silent_longer_than_the_path_remembers(
    sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext
) -> None:
    with forgetful(granian.url, forget_after=1.0) as relay:
        async with sdk.async_client(relay.url, verify=client_ssl, keepalive=QUICK) as client:
            assert sdk.text(await sdk.create(client, **sdk.silent_for(2.0))) == ANSWER
            assert not relay.seen(FlowForgotten)


async def test_stock_httpx2_loses_what_keepalive_saves(granian: Server, client_ssl: ssl.SSLContext) -> None:
    sdk = OPENAI
    stock = httpx2.AsyncHTTPTransport(verify=client_ssl, http2=True)
    with forgetful(granian.url, forget_after=0.3) as relay:
        async with sdk.async_client(relay.url, transport=stock, timeout=1.5) as client:
            with pytest.raises(openai.APITimeoutError):
                await sdk.create(client, **sdk.silent_for(0.8))
            assert len(relay.seen(FlowForgotten)) == 1


async def _dead_then_alive(server: RawServer, alive: Any) -> None:
    """The first connection answers nothing at all, those after it as `alive` says."""
    peer = await server.accept()
    peer.auto_ack_pings = False
    await peer.handshake()
    server.serve(alive)


async def test_k8_a_dead_connection_is_the_sdks_connection_error(sdk: Sdk) -> None:
    keepalive = h2keep.Keepalive(read_idle_timeout=0.2, ping_timeout=0.2)
    async with (
        RawServer.listen() as server,
        sdk.async_client(server.url, http1=False, keepalive=keepalive) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(_dead_then_alive, server, answering())
        with pytest.raises(sdk.module.APIConnectionError) as caught:
            await sdk.create(client)
        assert not isinstance(caught.value, sdk.module.APITimeoutError)
        assert isinstance(caught.value.__cause__, h2keep.PingTimeout)
        assert isinstance(caught.value.__cause__, sdk.httpx.ReadError)


async def test_k8_the_sdk_tries_again_after_a_dead_connection(
    sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    keepalive = h2keep.Keepalive(read_idle_timeout=0.2, ping_timeout=0.5)
    alive = answering(sdk.whole_answer(), headers=[("content-type", "application/json")])
    async with (
        RawServer.listen(server_ssl) as server,
        sdk.async_client(server.url, verify=client_ssl, keepalive=keepalive, max_retries=2) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(_dead_then_alive, server, alive)
        assert sdk.text(await sdk.create(client)) == ANSWER
        assert [len(peer.requests) for peer in server.peers] == [1, 1]
        first, second = (next(iter(peer.requests.values())) for peer in server.peers)
        assert first.body == second.body
        assert second.headers["x-stainless-retry-count"] == "1"
