"""What every SDK's users rely on, synchronous and asynchronous, over TLS.

What asynchronous clients do besides is in `adapters/test_sdks.py`; what one SDK alone does, in a file of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import hashlib
import json
import random
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep.cli.gateway import ANSWER
from h2keep.cli.middlebox import FlowForgotten
from support.app import form
from support.background import eventually
from support.raw import RawServer
from support.sdks import ANTHROPIC, GROQ, OPENAI, QUICK, Sdk
from support.servers import forgetful
from support.threaded import threaded

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from support.raw import Peer
    from support.servers import Server

#: Status, header fields, body.
Reply: TypeAlias = tuple[int, list[tuple[str, str]], bytes]
Handler: TypeAlias = "Callable[[Peer], Awaitable[None]]"

CANCEL = 8
#: Gives a dead connection up so soon that tests can wait for it, and a living one not even on a busy machine.
IMPATIENT = h2keep.Keepalive(read_idle_timeout=0.2, ping_timeout=0.4, jitter=0.0)
#: More than is on its way at any one time: in h2keep's hands, in the kernel's and in the peer's.
FILE_SIZE = 4_000_000
_WINDOW = 65_535


@pytest.fixture(params=[OPENAI, ANTHROPIC, GROQ], ids=str)
def sdk(request: pytest.FixtureRequest) -> Sdk:
    found: Sdk = request.param
    return found


def answering_in_turn(*replies: Reply | None) -> Handler:
    """A handler that answers a connection's first request with the first reply, and so on: None is no answer."""

    async def handler(peer: Peer) -> None:
        for reply in replies:
            request = await peer.request()
            await request.complete()
            if reply is not None:
                status, headers, body = reply
                await peer.respond(request.stream_id, status, headers, body)
        await anyio.sleep_forever()

    return handler


def black_holes(count: int, then: Handler) -> Handler:
    """A handler by which as many connections as said answer nothing at all, not even a PING."""
    left = count

    async def handler(peer: Peer) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            peer.auto_ack_pings = False
            await anyio.sleep_forever()
        await then(peer)

    return handler


def causes(error: BaseException) -> list[BaseException]:
    """The error, its cause, that one's, and so on."""
    found = [error]
    while (cause := found[-1].__cause__) is not None:
        found.append(cause)
    return found


def some_file(directory: Path) -> Path:
    """A file with every byte in it, and with what looks like a boundary's beginning."""
    path = directory / "batch.jsonl"
    path.write_bytes(b"--\r\n\r\n--" + random.Random(1).randbytes(FILE_SIZE) + b"\r\n--")
    return path


class Slow:
    """A server that takes a request's first 64 KiB, looks how much of a file has been read, then takes the rest."""

    def __init__(self, file: Any) -> None:
        self.fields: dict[str, tuple[str, bytes]] = {}
        self.read_meanwhile = 0
        self._file = file

    async def __call__(self, peer: Peer) -> None:
        peer.auto_window = False
        request = await peer.request()
        await peer.until(lambda: request.received >= _WINDOW)
        await anyio.sleep(0.1)
        self.read_meanwhile = self._file.tell()
        peer.auto_window = True
        await peer.send(*(frames.WindowUpdateFrame(stream_id, _WINDOW) for stream_id in (0, request.stream_id)))
        self.fields = form(request.headers["content-type"], await request.complete())
        reply = json.dumps({"id": "file_1", "filename": self.fields["file"][0]}).encode()
        await peer.respond(request.stream_id, 200, [("content-type", "application/json")], reply)
        await anyio.sleep_forever()


def answer(sdk: Sdk) -> Reply:
    return 200, [("content-type", "application/json")], sdk.whole_answer()


def soon(sdk: Sdk) -> dict[str, Any]:
    """Options by which reading times out; connecting may take its time."""
    return {"timeout": sdk.httpx.Timeout(30.0, read=0.2)}


def slow_down(field: str, value: str) -> Reply:
    return 429, [("content-type", "application/json"), (field, value)], b'{"error": {"message": "slowly"}}'


@pytest.mark.usefixtures("clean")
class TestSync:
    """Of synchronous clients."""

    def test_a_completion_over_http2(self, sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext) -> None:
        with sdk.client(granian.url, verify=client_ssl) as client:
            raw = sdk.create_raw(client)
            assert raw.http_response.http_version == "HTTP/2"
            assert raw.http_response.extensions["h2keep"].requests == 1
            assert sdk.text(raw.parse()) == ANSWER

    def test_streaming(self, sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext) -> None:
        with sdk.client(granian.url, verify=client_ssl) as client:
            pieces = list(sdk.pieces_now(sdk.create(client, stream=True)))
        assert "".join(pieces) == ANSWER
        assert len(pieces) == len(ANSWER.split())

    @pytest.mark.parametrize("how", ["close", "with", "forget"])
    def test_k10_leaving_a_stream_early_resets_it_and_keeps_the_connection(
        self, sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, how: str
    ) -> None:
        async def handler(peer: Peer) -> None:
            first = await peer.request()
            headers = [("content-type", "text/event-stream")]
            await peer.respond(first.stream_id, 200, headers, sdk.first_event(), end_stream=False)
            await answering_in_turn(answer(sdk))(peer)

        with threaded(handler, server_ssl) as server, sdk.client(server.url, verify=client_ssl) as client:
            stream = sdk.create(client, stream=True)
            assert next(sdk.pieces_now(stream)) == "Hello"
            match how:
                case "close":
                    stream.close()
                case "with":
                    with contextlib.suppress(LookupError), stream:
                        raise LookupError
                case _:
                    del stream
                    # It is part of a cycle, as its own generator refers to it.
                    gc.collect()
            eventually(lambda: server.peers[0].requests[1].reset is not None, "the server learns of it")
            assert server.peers[0].requests[1].reset == CANCEL
            assert sdk.text(sdk.create(client)) == ANSWER
            assert len(server.peers) == 1

    @pytest.mark.parametrize("where", ["client", "request"])
    def test_k10_a_timeout_is_the_sdks_and_ends_its_request_alone(
        self, sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, where: str
    ) -> None:
        of_client, of_request = (soon(sdk) if where == place else {} for place in ("client", "request"))
        with (
            threaded(answering_in_turn(None, answer(sdk)), server_ssl) as server,
            sdk.client(server.url, verify=client_ssl, **of_client) as client,
        ):
            with pytest.raises(sdk.module.APITimeoutError) as caught:
                sdk.create(client, **of_request)
            assert isinstance(caught.value.__cause__, h2keep.ReadTimeout)
            assert isinstance(caught.value.__cause__, sdk.httpx.ReadTimeout)
            eventually(lambda: server.peers[0].requests[1].reset == CANCEL, "the server learns of it")
            assert sdk.text(sdk.create(client, timeout=30.0)) == ANSWER
            assert len(server.peers) == 1

    @pytest.mark.parametrize(
        ("status", "name"),
        [
            (401, "AuthenticationError"),
            (429, "RateLimitError"),
            (500, "InternalServerError"),
            (504, "InternalServerError"),
        ],
    )
    def test_errors_reach_the_user_untouched(
        self, sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, status: int, name: str
    ) -> None:
        body = b'{"title": "No", "detail": "because \xc3\xa4",  "status": %d}' % status
        headers = [("content-type", "application/problem+json"), ("nvcf-reqid", "r-1")]
        with (
            threaded(answering_in_turn((status, headers, body)), server_ssl) as server,
            sdk.client(server.url, verify=client_ssl) as client,
        ):
            with pytest.raises(getattr(sdk.module, name)) as caught:
                sdk.create(client)
            assert caught.value.status_code == status
            assert caught.value.body == json.loads(body)
            assert caught.value.response.content == body
            assert caught.value.response.headers["nvcf-reqid"] == "r-1"
            assert [request.path for request in server.peers[0].requests.values()] == [sdk.path]

    def test_the_sdk_waits_as_long_as_retry_after_says(
        self, sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        with (
            threaded(answering_in_turn(slow_down("retry-after", "1"), answer(sdk)), server_ssl) as server,
            sdk.client(server.url, verify=client_ssl, max_retries=1) as client,
        ):
            start = time.monotonic()
            assert sdk.text(sdk.create(client)) == ANSWER
            # Left to itself it would wait half a second.
            assert time.monotonic() - start >= 1.0
            assert [len(peer.requests) for peer in server.peers] == [2]

    def test_k8_the_sdk_tries_again_after_a_dead_connection(
        self, sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        handler = black_holes(1, answering_in_turn(answer(sdk)))
        ended: list[BaseException | None] = []

        def hook(_stats: h2keep.ConnectionStats, event: object) -> None:
            if type(event).__name__ == "ConnectionClosed":
                ended.append(getattr(event, "error", None))

        options = {"verify": client_ssl, "keepalive": IMPATIENT, "event_hook": hook, "max_retries": 1}
        with threaded(handler, server_ssl) as server, sdk.client(server.url, **options) as client:
            assert sdk.text(sdk.create(client)) == ANSWER
            assert [len(peer.requests) for peer in server.peers] == [1, 1]
            first, second = (peer.requests[1] for peer in server.peers)
            assert first.body == second.body
            assert second.headers["x-stainless-retry-count"] == "1"
            assert [type(error) for error in ended] == [h2keep.PingTimeout]

    def test_k8_dead_connections_are_the_sdks_connection_error_in_the_end(
        self, sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        options = {"verify": client_ssl, "keepalive": IMPATIENT, "max_retries": 1}
        handler = black_holes(3, answering_in_turn())
        with threaded(handler, server_ssl) as server, sdk.client(server.url, **options) as client:
            with pytest.raises(sdk.module.APIConnectionError) as caught:
                sdk.create(client)
            assert not isinstance(caught.value, sdk.module.APITimeoutError)
            assert isinstance(caught.value.__cause__, h2keep.PingTimeout)
            assert isinstance(caught.value.__cause__, sdk.httpx.ReadError)
            assert [len(peer.requests) for peer in server.peers] == [1, 1]

    def test_k8_a_connection_that_dies_in_mid_stream_ends_the_stream(
        self, sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext
    ) -> None:
        with forgetful(granian.url, forget_after=60.0) as relay:
            options = {"verify": client_ssl, "keepalive": IMPATIENT}
            with sdk.client(relay.url, **options) as client, sdk.create(client, stream=True) as stream:
                pieces = sdk.pieces_now(stream)
                assert next(pieces) == ANSWER.split()[0]
                relay.vanish()
                # OpenAI's SDK makes an APIConnectionError of it, the others let it through.
                with pytest.raises((sdk.module.APIConnectionError, h2keep.H2KeepError)) as caught:
                    list(pieces)
            assert any(isinstance(error, h2keep.PingTimeout) for error in causes(caught.value))
            assert any(isinstance(error, sdk.httpx.ReadError) for error in causes(caught.value))

    def test_many_threads_share_one_connection(self, sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext) -> None:
        opened: list[h2keep.ConnectionStats] = []

        def hook(stats: h2keep.ConnectionStats, event: object) -> None:
            if type(event).__name__ == "ConnectionReady":
                opened.append(stats)

        with (
            sdk.client(granian.url, verify=client_ssl, event_hook=hook) as client,
            concurrent.futures.ThreadPoolExecutor(16) as threads,
        ):
            calls = [threads.submit(sdk.create, client) for _ in range(64)]
            streams = [
                threads.submit(lambda: "".join(sdk.pieces_now(sdk.create(client, stream=True)))) for _ in range(16)
            ]
            assert [sdk.text(call.result()) for call in calls] == [ANSWER] * 64
            assert [stream.result() for stream in streams] == [ANSWER] * 16
            assert [stats.requests for stats in opened] == [80]

    def test_k3_an_answer_that_is_silent_longer_than_the_path_remembers(
        self, sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext
    ) -> None:
        with (
            forgetful(granian.url, forget_after=1.0) as relay,
            sdk.client(relay.url, verify=client_ssl, keepalive=QUICK) as client,
        ):
            assert sdk.text(sdk.create(client, **sdk.silent_for(2.0))) == ANSWER
            assert not relay.seen(FlowForgotten)

    def test_the_stock_transport_loses_what_keepalive_saves(
        self, sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext
    ) -> None:
        stock = sdk.httpx.HTTPTransport(verify=client_ssl, http2=True)
        with (
            forgetful(granian.url, forget_after=0.3) as relay,
            sdk.client(relay.url, transport=stock, timeout=1.2) as client,
        ):
            with pytest.raises(sdk.module.APITimeoutError):
                sdk.create(client, **sdk.silent_for(0.8))
            assert len(relay.seen(FlowForgotten)) == 1

    def test_a_file_arrives_byte_for_byte(
        self, sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext, tmp_path: Path
    ) -> None:
        path = some_file(tmp_path)
        with sdk.client(granian.url, verify=client_ssl) as client, path.open("rb") as file:
            came = sdk.upload(client, file)
        assert came.filename == path.name
        assert came.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_a_file_is_read_no_faster_than_the_server_takes_it(
        self, sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, tmp_path: Path
    ) -> None:
        path = some_file(tmp_path)
        with path.open("rb") as file:
            slow = Slow(file)
            with threaded(slow, server_ssl) as server, sdk.client(server.url, verify=client_ssl) as client:
                assert sdk.upload(client, file).id == "file_1"
        assert _WINDOW < slow.read_meanwhile < FILE_SIZE // 4
        assert slow.fields["file"] == (path.name, path.read_bytes())


@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
class TestAsync:
    """Of asynchronous clients."""

    @pytest.mark.parametrize("how", ["client", "request", "cancel"])
    async def test_k10_a_timeout_or_a_cancellation_ends_its_request_alone(
        self, sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, how: str
    ) -> None:
        of_client, of_request = (soon(sdk) if how == place else {} for place in ("client", "request"))
        async with (
            RawServer.listen(server_ssl) as server,
            sdk.async_client(server.url, verify=client_ssl, **of_client) as client,
        ):
            server.serve(answering_in_turn(None, answer(sdk)))
            if how == "cancel":
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(sdk.create, client)
                    peer = await server.peer(0)
                    await peer.until(lambda: len(peer.requests) == 1 and peer.requests[1].ended)
                    tasks.cancel_scope.cancel()
            else:
                with pytest.raises(sdk.module.APITimeoutError) as caught:
                    await sdk.create(client, **of_request)
                assert isinstance(caught.value.__cause__, h2keep.ReadTimeout)
                assert isinstance(caught.value.__cause__, sdk.httpx.ReadTimeout)
            first = server.peers[0].requests[1]
            await first.peer.until(lambda: first.reset is not None)
            assert first.reset == CANCEL
            assert sdk.text(await sdk.create(client, timeout=30.0)) == ANSWER
            assert len(server.peers) == 1

    async def test_the_sdk_waits_as_long_as_retry_after_says(
        self, sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async with (
            RawServer.listen(server_ssl) as server,
            sdk.async_client(server.url, verify=client_ssl, max_retries=1) as client,
        ):
            server.serve(answering_in_turn(slow_down("retry-after-ms", "700"), answer(sdk)))
            start = time.monotonic()
            assert sdk.text(await sdk.create(client)) == ANSWER
            assert time.monotonic() - start >= 0.7
            assert [len(peer.requests) for peer in server.peers] == [2]

    async def test_a_file_arrives_byte_for_byte(
        self, sdk: Sdk, granian: Server, client_ssl: ssl.SSLContext, tmp_path: Path
    ) -> None:
        path = some_file(tmp_path)
        async with sdk.async_client(granian.url, verify=client_ssl) as client:
            with path.open("rb") as file:
                came = await sdk.upload(client, file)
        assert came.filename == path.name
        assert came.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    async def test_a_file_is_read_no_faster_than_the_server_takes_it(
        self, sdk: Sdk, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, tmp_path: Path
    ) -> None:
        path = some_file(tmp_path)
        with path.open("rb") as file:
            slow = Slow(file)
            async with (
                RawServer.listen(server_ssl) as server,
                sdk.async_client(server.url, verify=client_ssl) as client,
            ):
                server.serve(slow)
                assert (await sdk.upload(client, file)).id == "file_1"
        assert _WINDOW < slow.read_meanwhile < FILE_SIZE // 4
        assert slow.fields["file"] == (path.name, path.read_bytes())
