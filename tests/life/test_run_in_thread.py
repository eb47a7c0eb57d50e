"""`run_in_thread=True`: connections on the background thread live on while the application blocks its own loop."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from hyperframe import frame as frames

import h2keep
from adapters.conftest import Library, library
from h2keep.cli.middlebox import Middlebox
from support.background import background_threads
from support.raw import GONE, answering
from support.threaded import ThreadedServer, threaded

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterator

    from support.raw import Peer, RawRequest
    from support.servers import Server

__all__ = ["library"]

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

CANCEL = 8
MIB = 1024 * 1024


def client(**options: Any) -> h2keep.AsyncClient:
    return h2keep.AsyncClient(**{"http1": False, "timeout": 20.0, "run_in_thread": True, **options})


async def until(condition: Any, what: str = "") -> None:
    with anyio.fail_after(60.0):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


async def path_decides(peer: Peer) -> None:
    """`/never` gets nothing, `/head` a head and a chunk, all else a whole answer."""
    while True:
        request = await peer.request()
        if request.path == "/head":
            await peer.respond(request.stream_id, body=b"first", end_stream=False)
        elif request.path != "/never":
            peer._tasks.start_soon(answer, request)


async def answer(request: RawRequest, delay: float = 0.0) -> None:
    with contextlib.suppress(*GONE):
        await request.complete()
        await anyio.sleep(delay)
        await request.peer.respond(request.stream_id, body=b"ok")


class TestBasics:
    async def test_requests_and_bodies(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        async def body() -> AsyncIterator[bytes]:
            for number in range(3):
                await anyio.lowlevel.checkpoint()
                yield b"%d " % number

        async with client(verify=client_ssl) as own:
            url = f"{granian.url}/echo"
            assert (await own.post(url, content=b"bytes")).json()["body"] == "bytes"
            assert (await own.post(url, json={"a": 1})).json()["body"] == '{"a":1}'
            assert (await own.post(url, content=body())).json()["body"] == "0 1 2 "
            assert (await own.post(url, content=iter([b"a", b"b"]))).json()["body"] == "ab"
            async with own.stream("GET", f"{granian.url}/download?size=5000000") as response:
                assert sum([len(chunk) async for chunk in response.aiter_bytes()]) == 5_000_000
            async with own.stream("GET", f"{granian.url}/sse?events=3&every=0.01") as response:
                assert len([line async for line in response.aiter_lines() if line]) == 3
            assert len(background_threads()) == 1

    async def test_adapters(self, library: Library, granian: Server, client_ssl: ssl.SSLContext) -> None:
        async with library.client(verify=client_ssl, run_in_thread=True) as own:
            response = await own.post(f"{granian.url}/echo", files={"file": ("name", b"x" * 100_000)})
            assert response.http_version == "HTTP/2"
            assert "x" * 100_000 in response.json()["body"]
            assert len(background_threads()) == 1
            async with own.stream("GET", f"{granian.url}/download?size=1000000") as response:
                assert sum([len(chunk) async for chunk in response.aiter_bytes()]) == 1_000_000
        with threaded(path_decides) as server:
            async with library.client(http1=False, run_in_thread=True, client={"timeout": 0.2}) as own:
                with pytest.raises(library.module.ReadTimeout) as caught:
                    await own.get(f"{server.url}/never")
                assert isinstance(caught.value, h2keep.ReadTimeout)

    async def test_many_at_once_share_a_connection(self) -> None:
        with threaded(answering(delay=0.05)) as server:
            async with client() as own, anyio.create_task_group() as tasks:
                for _ in range(50):
                    tasks.start_soon(own.get, server.url)
            assert len(server.peers) == 1
            assert len(server.peers[0].requests) == 50

    async def test_the_thread_ends_with_the_client(self) -> None:
        with threaded(path_decides) as server:
            own = client()
            assert (await own.get(server.url)).content == b"ok"
            (thread,) = background_threads()
            await own.aclose()
            assert not thread.is_alive()
            assert (await own.get(server.url)).content == b"ok"
            with h2keep.Client(http1=False) as other:
                other.get(server.url)
                assert len(background_threads()) == 1
                await own.aclose()
                assert len(background_threads()) == 1
            assert background_threads() == []

    async def test_errors(self) -> None:
        async def handler(peer: Peer) -> None:
            await peer.request()
            peer.abort()

        with threaded(handler) as server:
            async with client() as own:
                with pytest.raises(h2keep.ConnectionLost):
                    await own.get(server.url)
            url = server.url
        async with client() as own:
            with pytest.raises(h2keep.ConnectError, match="refused"):
                await own.get(url)


class TestLeaving:
    async def test_cancellation_resets_the_stream(self) -> None:
        with threaded(path_decides) as server:
            async with client() as own:
                for number, path in enumerate(["/never", "/head"]):
                    with anyio.move_on_after(0.2) as scope:
                        await own.get(f"{server.url}{path}")
                    assert scope.cancelled_caught
                    request = server.peers[0].requests[2 * number + 1]
                    await until(lambda: request.reset == CANCEL)  # noqa: B023
                assert (await own.get(server.url)).content == b"ok"
                assert len(server.peers) == 1

    async def test_cancellation_in_the_queue(self) -> None:
        with threaded(path_decides, settings={frames.SettingsFrame.MAX_CONCURRENT_STREAMS: 1}) as server:
            async with client(limits=h2keep.Limits(max_connections=1)) as own:
                async with own.stream("GET", f"{server.url}/head"):
                    with anyio.move_on_after(0.2) as scope:
                        await own.get(server.url)
                    assert scope.cancelled_caught
                assert (await own.get(server.url)).content == b"ok"

    async def test_a_response_that_is_forgotten_gives_its_stream_up(self) -> None:
        with threaded(path_decides) as server:
            async with client() as own:
                response = await own._send("GET", f"{server.url}/head")
                request = server.peers[0].requests[1]
                assert request.reset is None
                del response
                await until(lambda: request.reset == CANCEL)

    async def test_whoever_reads_is_woken_when_another_task_closes_the_response(self) -> None:
        seen: list[bytes] = []

        async def read(response: h2keep.Response) -> None:
            chunks = response.aiter_bytes()
            seen.append(await anext(chunks))
            with pytest.raises(h2keep.ReadError, match="closed before its body was read"):
                await anext(chunks)

        with threaded(path_decides) as server:
            async with (
                client(timeout=None) as own,
                own.stream("GET", f"{server.url}/head") as response,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(read, response)
                await until(lambda: seen)
                await anyio.lowlevel.checkpoint()
                await response.aclose()
        assert seen == [b"first"]

    async def test_aclose_ends_what_waits(self) -> None:
        errors: list[h2keep.H2KeepError] = []

        async def wait(path: str) -> None:
            try:
                await own.get(f"{server.url}{path}")
            except h2keep.H2KeepError as error:
                errors.append(error)

        with threaded(path_decides) as server:
            own = client(timeout=None)
            async with anyio.create_task_group() as tasks:
                for path in ("/never", "/head"):
                    tasks.start_soon(wait, path)
                await until(lambda: server.peers and len(server.peers[0].requests) == 2)
                await own.aclose()
        assert len(errors) == 2
        assert all("closed" in str(error) for error in errors)


class TestUploads:
    async def test_iterators_run_in_the_applications_loop(self) -> None:
        seen = set()

        async def body() -> AsyncIterator[bytes]:
            for _ in range(20):
                await anyio.sleep(0.001)
                seen.add(threading.current_thread())
                yield b"x" * 100_000

        with threaded(path_decides) as server:
            async with client() as own:
                await own.post(server.url, content=body())
            assert server.peers[0].requests[1].received == 2_000_000
        assert seen == {threading.current_thread()}

    async def test_an_iterator_that_raises(self) -> None:
        closed = []

        async def body() -> AsyncIterator[bytes]:
            try:
                yield b"x"
                raise LookupError("the source is broken")
            finally:
                closed.append(True)

        with threaded(path_decides) as server:
            async with client() as own:
                assert (await own.get(server.url)).content == b"ok"
                with pytest.raises(LookupError, match="the source is broken") as caught:
                    await own.post(server.url, content=body())
                assert closed == [True]
                names = []
                frame = caught.tb
                while frame is not None:
                    names.append(frame.tb_frame.f_code.co_name)
                    frame = frame.tb_next  # type: ignore[assignment]
                assert "body" in names
                await until(lambda: 3 not in server.peers[0].requests or server.peers[0].requests[3].reset == CANCEL)
                assert (await own.get(server.url)).content == b"ok"
                assert len(server.peers) == 1

    async def test_little_is_pulled_while_the_server_gives_no_credit(self) -> None:
        pulled = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal pulled
            for _ in range(640):
                pulled += 16_384
                yield b"x" * 16_384

        async def handler(peer: Peer) -> None:
            peer.auto_window = False
            request = await peer.request()
            await peer.until(lambda: request.received >= 65_535)
            await peer.respond(request.stream_id, body=b"enough")

        with threaded(handler) as server:
            async with client() as own:
                assert (await own.post(server.url, content=body())).content == b"enough"
        assert 65_535 <= pulled <= 2 * 65_535 + 2 * 256 * 1024

    async def test_an_echo_of_20_mib(self) -> None:
        async def handler(peer: Peer) -> None:
            peer.keep_bodies = False
            request = await peer.request()
            await peer.respond(request.stream_id, end_stream=False)
            echoed = 0
            while echoed < 20 * MIB:
                await peer.until(lambda: request.received > echoed)  # noqa: B023
                size = request.received - echoed
                await peer.send_data(request.stream_id, b"x" * size)
                echoed += size
            await peer.send_data(request.stream_id, b"", end_stream=True)
            await anyio.sleep_forever()

        async def body() -> AsyncIterator[bytes]:
            for _ in range(20 * 16):
                yield b"x" * 65_536

        with threaded(handler) as server:
            async with client() as own, own.stream("POST", server.url, content=body()) as response:
                assert sum([len(chunk) async for chunk in response.aiter_bytes()]) == 20 * MIB


class TestABlockedLoop:
    async def test_k3_pings_go_on_while_the_loop_is_blocked(self) -> None:
        with threaded(path_decides) as server:
            keepalive = h2keep.Keepalive(0.2, 5.0, jitter=0.0)
            async with client(keepalive=keepalive) as own, own.stream("GET", f"{server.url}/head") as response:
                time.sleep(1.5)  # noqa: ASYNC251
                assert len(server.peers[0].pings) >= 3
                assert response.connection.pings_acked >= 2

    @pytest.mark.parametrize("in_thread", [False, True])
    async def test_k3_only_in_a_thread_it_outlives_the_middlebox(self, in_thread: bool) -> None:
        async def handler(peer: Peer) -> None:
            while True:
                peer._tasks.start_soon(answer, await peer.request(), 2.0)

        with threaded(handler) as server, _middlebox(server, 0.8) as port:
            async with client(
                run_in_thread=in_thread,
                keepalive=h2keep.Keepalive(0.25, 0.5),
                timeout=h2keep.Timeout(read=6.0),
            ) as own:
                outcome: list[object] = []

                async def request() -> None:
                    try:
                        outcome.append((await own.get(f"http://127.0.0.1:{port}")).content)
                    except h2keep.H2KeepError as error:
                        outcome.append(type(error))

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(request)
                    await until(lambda: server.peers and server.peers[0].requests)
                    # Longer than the middlebox tolerates, and longer than the server takes.
                    time.sleep(2.5)  # noqa: ASYNC251
        assert outcome == [b"ok" if in_thread else h2keep.PingTimeout]


@contextlib.contextmanager
def _middlebox(server: ThreadedServer, forget_after: float) -> Iterator[int]:
    """A middlebox before the server, in the server's thread."""
    started: concurrent.futures.Future[int] = concurrent.futures.Future()
    stopped = threading.Event()
    target = ("127.0.0.1", int(server.url.rpartition(":")[2]))

    async def relay() -> None:
        async with Middlebox(target, forget_after, lambda _event: None) as box:
            started.set_result(box.port)
            await stop.wait()
        stopped.set()

    stop = server.call(anyio.Event)
    server.soon(relay)
    try:
        yield started.result(10)
    finally:
        server.call(stop.set)
        assert stopped.wait(10)
