"""`h2keep.Client`: the interface, bodies both ways, timeouts, and one background thread behind it all."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import io
import json
import socket
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from support.background import background_threads, eventually
from support.raw import GONE, answering
from support.threaded import threaded

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator
    from pathlib import Path

    from support.raw import Peer
    from support.servers import Server

CANCEL = 8
MIB = 1024 * 1024
#: A stream's window may grow to 16 MiB; what the exchange holds beside that, and a read, come on top.
MOST_BUFFERED = 18 * MIB


def client(**options: Any) -> h2keep.Client:
    return h2keep.Client(**{"http1": False, "timeout": 20.0, **options})


async def silent(peer: Peer) -> None:
    """Takes requests and says nothing."""
    await anyio.sleep_forever()


async def head_only(peer: Peer) -> None:
    """Answers with a head and one chunk, and leaves the response open."""
    while True:
        request = await peer.request()
        await peer.respond(request.stream_id, body=b"first", end_stream=False)


class TestARealServer:
    @pytest.mark.parametrize("method", ["get", "head", "options", "post", "put", "patch", "delete"])
    def test_methods(self, real_server: Server, client_ssl: ssl.SSLContext, method: str) -> None:
        with client(verify=client_ssl) as own:
            response = getattr(own, method)(f"{real_server.url}/echo", headers={"x-own": "1"}, params={"a": "b c"})
        assert response.status_code == 200
        assert response.http_version == "HTTP/2"
        if method != "head":
            assert response.json()["method"] == method.upper()
            assert response.json()["query"] == "a=b+c"
            assert ["x-own", "1"] in response.json()["headers"]

    def test_bodies(self, granian: Server, client_ssl: ssl.SSLContext, tmp_path: Path) -> None:
        (tmp_path / "body").write_bytes(b"from a file\nin lines\n" * 1000)

        def post(**body: Any) -> Any:
            return own.post(f"{granian.url}/echo", **body).json()

        with client(verify=client_ssl) as own, (tmp_path / "body").open("rb") as file:
            assert post(content=b"bytes")["body"] == "bytes"
            assert post(content="ü")["body"].encode("latin-1") == "ü".encode()
            assert json.loads(post(json={"a": [1, None]})["body"]) == {"a": [1, None]}
            assert post(content=[b"a", b"", b"list"])["body"] == "alist"
            assert post(content=(b"%d " % number for number in range(3)))["body"] == "0 1 2 "
            assert post(content=io.BytesIO(b"one\ntwo"))["body"] == "one\ntwo"
            assert post(content=file)["body"] == "from a file\nin lines\n" * 1000
            assert post(content=iter([]))["body"] == ""
            assert post()["body"] == ""

    def test_an_async_iterable_is_refused(self) -> None:
        async def body() -> Any:
            yield b""

        with client() as own, pytest.raises(TypeError, match="async iterable, which needs an AsyncClient"):
            own.post("http://127.0.0.1/", content=body())

    def test_large_bodies_arrive_whole(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        chunks = [bytes([number]) * size for number, size in enumerate([1, 16_384, 0, 16_385, 1_000_000, 3_000_000])]
        with client(verify=client_ssl) as own:
            uploaded = own.post(f"{granian.url}/upload", content=iter(chunks)).json()
            with own.stream("GET", f"{granian.url}/download?size=20000000") as response:
                assert response.headers["content-length"] == "20000000"
                assert sum(map(len, response.iter_bytes())) == 20_000_000
        assert uploaded == {"size": sum(map(len, chunks)), "sha256": hashlib.sha256(b"".join(chunks)).hexdigest()}

    def test_lines_come_one_by_one(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        with (
            client(verify=client_ssl) as own,
            own.stream("GET", f"{granian.url}/sse?events=4&every=0.05") as response,
        ):
            moments = [(line, time.monotonic()) for line in response.iter_lines() if line]
        assert [line for line, _ in moments] == [f'data: {{"event": {number}}}' for number in range(4)]
        assert moments[-1][1] - moments[0][1] > 0.1

    def test_leaving_a_response_early_is_seen_by_the_server(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        with client(verify=client_ssl) as own:
            with own.stream("GET", f"{granian.url}/sse?events=100&every=0.1&token=sync-leaver") as response:
                assert next(response.iter_lines())
            assert own.get(f"{granian.url}/departure?token=sync-leaver").json() == {"left": True}


class TestResponses:
    def test_trailers_come_with_the_bodys_end(self) -> None:
        async def handler(peer: Peer) -> None:
            request = await peer.request()
            await peer.respond(request.stream_id, body=b"body", trailers=[("x-checksum", "1234")])
            await anyio.sleep_forever()

        with threaded(handler) as server, client() as own:
            response = own.get(server.url)
        assert response.content == b"body"
        assert dict(response.trailers) == {"x-checksum": "1234"}

    def test_a_body_can_be_had_once_unless_it_was_read(self) -> None:
        with threaded(answering(b"some body")) as server, client() as own:
            with own.stream("GET", server.url) as response:
                with pytest.raises(RuntimeError, match="has not been read"):
                    _ = response.content
                assert b"".join(response.iter_bytes()) == b"some body"
                with pytest.raises(RuntimeError, match="read already"):
                    response.read()
            with own.stream("GET", server.url) as response:
                assert response.read() == response.read() == response.content == b"some body"
                assert list(response.iter_bytes()) == [b"some body"]
                assert response.text == "some body"
                assert response.connection.requests == 2

    def test_after_close_the_rest_is_refused(self) -> None:
        with threaded(head_only) as server, client() as own:
            with own.stream("GET", server.url) as response:
                assert next(response.iter_bytes()) == b"first"
            with pytest.raises(RuntimeError, match="read already"):
                response.read()
            with own.stream("GET", server.url) as response:
                pass
            with pytest.raises(h2keep.ReadError, match="closed before its body was read"):
                response.read()
            response.close()

    def test_whoever_reads_is_woken_when_another_thread_closes_the_response(self) -> None:
        outcome: list[object] = []

        def read(response: h2keep.SyncResponse) -> None:
            chunks = response.iter_bytes()
            outcome.append(next(chunks))
            try:
                next(chunks)
            except h2keep.ReadError as error:
                outcome.append(str(error))

        with threaded(head_only) as server, client(timeout=None) as own, own.stream("GET", server.url) as response:
            reader = threading.Thread(target=read, args=(response,))
            reader.start()
            eventually(lambda: outcome and response._source._waiting, "the thread waits for more")
            response.close()
            reader.join(10)
            assert not reader.is_alive()
        assert outcome == [b"first", "the response was closed before its body was read to the end"]

    def test_a_response_that_is_forgotten_gives_its_stream_up(self) -> None:
        with threaded(head_only) as server, client() as own:
            manager = own.stream("GET", server.url)
            manager.__enter__()
            (request,) = server.peers[0].requests.values()
            assert request.reset is None
            del manager
            eventually(lambda: request.reset == CANCEL, "the stream is reset")
            response = own._send("GET", server.url)
            request = list(server.peers[0].requests.values())[1]
            chunks = response.iter_bytes()
            assert next(chunks) == b"first"
            del response
            assert request.reset is None
            del chunks
            eventually(lambda: request.reset == CANCEL, "the stream is reset")
            eventually(lambda: len(server.peers) == 1, "the connection was kept")

    def test_what_waits_is_one_chunk_and_what_comes_alone_is_handed_over(self) -> None:
        told = threading.Event()

        async def handler(peer: Peer) -> None:
            request = await peer.request()
            await peer.respond(request.stream_id, end_stream=False)
            for _ in range(64):
                await peer.send_data(request.stream_id, b"x" * 1000)
            await peer.ping()
            told.set()
            await peer.until(lambda: bool(peer.pings))
            await peer.send_data(request.stream_id, b"alone")
            await anyio.sleep_forever()

        with threaded(handler) as server, client() as own, own.stream("GET", server.url) as response:
            assert told.wait(10)
            chunks = response.iter_bytes()
            batch = next(chunks)
            # The head's own chunk may have come first; the rest has been waiting since.
            assert len(batch) + (0 if len(batch) == 64_000 else len(next(chunks))) == 64_000
            server.peers[0].pings.append((0.0, b""))  # type: ignore[arg-type]
            server.call(server.peers[0]._notify)
            assert next(chunks) == b"alone"


class TestUploads:
    def test_iterators_run_in_the_calling_thread_and_are_closed_there(self) -> None:
        seen: list[threading.Thread] = []

        def body() -> Iterator[bytes]:
            try:
                for _ in range(3):
                    seen.append(threading.current_thread())
                    yield b"x" * 300_000
            finally:
                seen.append(threading.current_thread())

        with threaded(answering()) as server, client() as own:
            own.post(server.url, content=body())
            assert server.peers[0].requests[1].received == 900_000
        assert seen == [threading.current_thread()] * 4

    def test_an_iterator_that_raises_ends_its_own_request_only(self) -> None:
        closed = []

        def body() -> Iterator[bytes]:
            try:
                yield b"beginning"
                raise LookupError("the source is broken")
            finally:
                closed.append(True)

        with threaded(answering()) as server, client() as own:
            assert own.get(server.url).content == b"ok"
            with pytest.raises(LookupError, match="the source is broken") as caught:
                own.post(server.url, content=body())
            assert closed == [True]
            assert any(frame.name == "body" for frame in traceback.extract_tb(caught.value.__traceback__))
            eventually(lambda: 3 not in server.peers[0].requests or server.peers[0].requests[3].reset == CANCEL)
            assert own.get(server.url).content == b"ok"
            assert len(server.peers) == 1

    def test_an_iterator_that_gives_no_bytes_is_refused(self) -> None:
        with threaded(answering()) as server, client() as own:
            with pytest.raises(h2keep.LocalProtocolError, match="gave a str, not bytes"):
                own.post(server.url, content=iter(["text"]))
            assert own.get(server.url).content == b"ok"

    def test_little_is_pulled_while_the_server_gives_no_credit(self) -> None:
        pulled = 0

        def body() -> Iterator[bytes]:
            nonlocal pulled
            for _ in range(640):
                pulled += 16_384
                yield b"x" * 16_384

        async def handler(peer: Peer) -> None:
            peer.auto_window = False
            request = await peer.request()
            # Exactly that much, or more if some came before credit was switched off.
            await peer.until(lambda: request.received >= 65_535)
            await peer.respond(request.stream_id, body=b"enough")

        with threaded(handler) as server, client() as own:
            assert own.post(server.url, content=body()).content == b"enough"
            # Two windows at most, what the feed holds, and what has been taken from it.
            assert 65_535 <= pulled <= 2 * 65_535 + 2 * 256 * 1024

    def test_little_is_pulled_while_the_server_does_not_read(self) -> None:
        pulled = 0
        finish = threading.Event()

        def body() -> Iterator[bytes]:
            nonlocal pulled
            while not finish.is_set():
                pulled += 65_536
                yield b"x" * 65_536

        async def handler(peer: Peer) -> None:
            peer.keep_bodies = False
            await peer.send(frames.WindowUpdateFrame(0, 2**30))
            request = await peer.request()
            await peer.send(frames.WindowUpdateFrame(request.stream_id, 2**30))
            await peer.until(lambda: request.received > 65_536)
            peer.stop_reading()
            await anyio.sleep(0.5)
            before = pulled
            await anyio.sleep(0.5)
            stalled.append(pulled - before)
            finish.set()
            peer.resume_reading()
            await request.complete()
            await peer.respond(request.stream_id)

        stalled: list[int] = []
        with threaded(handler, receive_buffer=65_536) as server, client() as own:
            assert own.post(server.url, content=body()).status_code == 200
            assert stalled == [0]

    def test_an_early_response_during_an_upload(self) -> None:
        closed: list[bool] = []

        def body() -> Iterator[bytes]:
            try:
                while True:
                    yield b"x" * 16_384
            finally:
                closed.append(True)

        async def handler(peer: Peer) -> None:
            while True:
                request = await peer.request()
                if request.method == "POST":
                    await peer.until(lambda: request.received > 100_000)  # noqa: B023
                await peer.respond(request.stream_id, 413, body=b"too much")
                await peer.rst(request.stream_id, 0)

        with threaded(handler) as server, client() as own:
            response = own.post(server.url, content=body())
            assert (response.status_code, response.content) == (413, b"too much")
            assert closed == [True]
            assert own.get(server.url).status_code == 413
            assert len(server.peers) == 1

    def test_an_echo_of_50_mib(self) -> None:
        async def handler(peer: Peer) -> None:
            peer.keep_bodies = False
            request = await peer.request()
            await peer.respond(request.stream_id, end_stream=False)
            echoed = 0
            while echoed < 50 * MIB:
                await peer.until(lambda: request.received > echoed)  # noqa: B023
                size = request.received - echoed
                await peer.send_data(request.stream_id, b"x" * size)
                echoed += size
            await peer.send_data(request.stream_id, b"", end_stream=True)
            await anyio.sleep_forever()

        def body() -> Iterator[bytes]:
            chunk = b"x" * 65_536
            for _ in range(50 * MIB // len(chunk)):
                yield chunk

        with threaded(handler) as server, client(timeout=30.0) as own:
            with own.stream("POST", server.url, content=body()) as response:
                sizes = [len(chunk) for chunk in response.iter_bytes()]
            assert sum(sizes) == 50 * MIB
            assert max(sizes) <= MOST_BUFFERED


class TestBackpressure:
    def test_little_is_buffered_while_nobody_reads(self) -> None:
        sent = 0

        async def handler(peer: Peer) -> None:
            nonlocal sent
            while True:
                request = await peer.request()
                if request.path == "/small":
                    await peer.respond(request.stream_id, body=b"ok")
                    continue
                await peer.respond(request.stream_id, end_stream=False)
                peer._tasks.start_soon(flood, peer, request.stream_id)

        async def flood(peer: Peer, stream_id: int) -> None:
            nonlocal sent
            with contextlib.suppress(*GONE):
                for _ in range(64 * MIB // 16_384):
                    await peer.send_data(stream_id, b"x" * 16_384)
                    sent += 16_384
                await peer.send_data(stream_id, b"", end_stream=True)

        with threaded(handler) as server, client() as own, own.stream("GET", server.url) as response:
            before = -1
            while sent != before:
                before = sent
                time.sleep(0.3)
            assert sent <= MOST_BUFFERED
            assert own.get(f"{server.url}/small").content == b"ok"
            assert sum(map(len, response.iter_bytes())) == 64 * MIB
            assert len(server.peers) == 1


class TestTimeouts:
    def test_k21_read_timeout_before_the_head_and_in_the_body(self) -> None:
        with threaded(silent) as server, client(timeout=h2keep.Timeout(read=0.2)) as own:
            with pytest.raises(h2keep.ReadTimeout) as caught:
                own.get(server.url)
            eventually(lambda: server.peers[0].requests[1].reset == CANCEL, "the request is reset")
            # Few frames, and none of the background loop's.
            assert all("background.py" not in frame.filename for frame in traceback.extract_tb(caught.tb))
        with threaded(head_only) as server, client(timeout=h2keep.Timeout(read=0.2)) as own:
            with own.stream("GET", server.url) as response:
                chunks = response.iter_bytes()
                assert next(chunks) == b"first"
                # The caller's own time is not the server's.
                time.sleep(0.4)
                began = time.monotonic()
                with pytest.raises(h2keep.ReadTimeout):
                    next(chunks)
                assert time.monotonic() - began > 0.15
            eventually(lambda: server.peers[0].requests[1].reset == CANCEL, "the request is reset")

    def test_k21_write_timeout(self) -> None:
        async def handler(peer: Peer) -> None:
            peer.auto_window = False
            await anyio.sleep_forever()

        with (
            threaded(handler) as server,
            client(timeout=h2keep.Timeout(write=0.2, read=None)) as own,
            pytest.raises(h2keep.WriteTimeout),
        ):
            own.post(server.url, content=(b"x" * 16_384 for _ in range(100)))

    def test_connect_timeout(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with client(timeout=h2keep.Timeout(connect=0.2)) as own, pytest.raises(h2keep.ConnectTimeout):
                own.get(url)

    def test_pool_timeout_and_leaving_the_queue(self) -> None:
        limits = h2keep.Limits(max_connections=1)
        settings = {frames.SettingsFrame.MAX_CONCURRENT_STREAMS: 1}
        with (
            threaded(head_only, settings=settings) as server,
            client(timeout=h2keep.Timeout(pool=0.2), limits=limits) as own,
        ):
            with own.stream("GET", server.url) as response:
                chunks = response.iter_bytes()
                assert next(chunks) == b"first"
                with pytest.raises(h2keep.PoolTimeout):
                    own.get(server.url)
            with own.stream("GET", server.url) as response:
                assert next(response.iter_bytes()) == b"first"

    def test_refused(self) -> None:
        with threaded(silent) as server:
            url = server.url
        with client() as own, pytest.raises(h2keep.ConnectError, match="refused") as caught:
            own.get(url)
        assert caught.value.unprocessed


class TestTheThread:
    def test_it_starts_at_first_use_and_ends_with_the_last_client(self) -> None:
        with threaded(answering()) as server:
            first, second = client(), client()
            assert background_threads() == []
            first.get(server.url)
            (thread,) = background_threads()
            assert thread.daemon
            second.get(server.url)
            assert background_threads() == [thread]
            first.close()
            assert background_threads() == [thread]
            assert second.get(server.url).content == b"ok"
            second.close()
            assert background_threads() == []
            second.close()
            assert not thread.is_alive()

    def test_a_client_that_was_closed_starts_anew(self) -> None:
        with threaded(answering()) as server:
            own = client()
            for _ in range(3):
                assert own.get(server.url).content == b"ok"
                assert len(background_threads()) == 1
                own.close()
                assert background_threads() == []
            assert len(server.peers) == 3

    def test_a_client_that_was_never_used_starts_nothing(self) -> None:
        with client():
            assert background_threads() == []
        with client() as own, pytest.raises(h2keep.UnsupportedProtocol):
            own.get("ftp://127.0.0.1/")
        assert background_threads() == []

    def test_close_says_goodbye(self) -> None:
        with threaded(answering()) as server:
            with client() as own:
                own.get(server.url)
            eventually(lambda: server.peers[0].ended, "the server sees the end")
            assert server.peers[0].error is None
            assert len(server.peers[0].seen(frames.GoAwayFrame)) == 1


class TestHooks:
    def test_k20_the_hook_runs_where_the_client_was_made(self) -> None:
        variable = contextvars.ContextVar("variable", default="unset")
        seen: list[tuple[str, str, str]] = []

        def hook(stats: h2keep.ConnectionStats, event: object) -> None:
            seen.append((type(event).__name__, variable.get(), threading.current_thread().name))
            variable.set("by the hook")

        variable.set("at creation")
        own = client(event_hook=hook)
        variable.set("at the request")
        with threaded(answering()) as server, own:
            own.get(server.url)
        assert {value for _, value, _ in seen} == {"at creation"}
        assert {thread for _, _, thread in seen} == {"h2keep"}
        assert seen[0][0] == "ConnectionReady"
        assert variable.get() == "at the request"

    def test_a_hook_that_makes_a_request_is_refused(self, caplog: pytest.LogCaptureFixture) -> None:
        failures: list[BaseException] = []

        def hook(stats: h2keep.ConnectionStats, event: object) -> None:
            for attempt in (own.get, own.post):
                try:
                    attempt(server.url, **({"content": iter([b"x"])} if attempt == own.post else {}))
                except RuntimeError as error:
                    failures.append(error)

        own = client(event_hook=hook)
        with threaded(answering()) as server, own:
            assert own.get(server.url).content == b"ok"
            assert own.get(server.url).content == b"ok"
        assert failures
        assert all("can't wait for a response" in str(error) for error in failures)

    def test_a_hook_that_raises_or_exits_harms_nobody(self, caplog: pytest.LogCaptureFixture) -> None:
        told = []

        def hook(stats: h2keep.ConnectionStats, event: object) -> None:
            told.append(event)
            raise (SystemExit if len(told) == 1 else ValueError)("a hook's own")

        # What SystemExit hits is the connection's own task, so one request may be lost with it.
        with threaded(answering()) as server, client(event_hook=hook) as own:
            with contextlib.suppress(h2keep.H2KeepError):
                own.get(server.url)
            assert own.get(server.url).content == b"ok"
        assert "a hook's own" in caplog.text

    def test_a_hook_that_closes_the_client_does_not_wait_for_itself(self) -> None:
        def hook(stats: h2keep.ConnectionStats, event: object) -> None:
            own.close()

        own = client(event_hook=hook)
        with threaded(answering()) as server:
            with contextlib.suppress(h2keep.H2KeepError):
                own.get(server.url)
            own.close()
