"""Dialling that fails: `retries`, pauses, who waits meanwhile, and pools that end in the middle of it.

What one dial does, and the connect timeout of each of its phases, is in `test_dial.py`.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import socket
import ssl
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import pytest
from httpcore._async.connection import exponential_backoff
from hyperframe import frame as frames

import h2keep
import h2keep.httpx2
from h2keep.runner.connecting import retry_delays
from h2keep.runner.dial import DialOptions, Origin, dial
from h2keep.runner.pool import Pool
from support.background import nothing_left
from support.clock import virtual_time
from support.pools import assert_at_rest, pool_of
from support.raw import GONE, Peer, RawServer, answering, task_group
from support.threaded import threaded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STREAMS = frames.SettingsFrame.MAX_CONCURRENT_STREAMS

on_virtual_time = [pytest.mark.anyio, virtual_time, pytest.mark.usefixtures("leak_check")]


class Flaky:
    """Accepts TCP connections, and lets TLS fail on the next so many of them."""

    def __init__(self, server: RawServer, failures: float, settings: dict[int, int] | None = None) -> None:
        self.server, self.failures, self.settings = server, failures, settings
        #: When each connection came.
        self.at: list[float] = []

    async def run(self, delay: float = 0.0) -> None:
        async with task_group() as tasks:
            while True:
                peer = await self.server.accept()
                self.at.append(anyio.current_time())
                if self.failures > 0:
                    self.failures -= 1
                    peer.close()
                else:
                    tasks.start_soon(self._serve, peer, delay)

    async def _serve(self, peer: Peer, delay: float) -> None:
        try:
            await peer.handshake(self.settings)
            await answering(delay=delay)(peer)
        except* GONE:
            pass

    @property
    def pauses(self) -> list[float]:
        return [round(later - earlier, 1) for earlier, later in itertools.pairwise(self.at)]

    @property
    def requests(self) -> int:
        return sum(len(peer.requests) for peer in self.server.peers)


def client(context: ssl.SSLContext, **options: Any) -> h2keep.AsyncClient:
    options.setdefault("timeout", None)
    return h2keep.AsyncClient(verify=context, http1=False, **options)


class Task:
    """A request in a task of its own, and what became of it."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.outcome: Any = None

    async def run(self, c: h2keep.AsyncClient, url: str, **options: Any) -> None:
        with self.scope:
            try:
                self.outcome = (await c.get(url, **options)).content
            except h2keep.H2KeepError as error:
                self.outcome = error


def test_the_pauses_are_httpcores() -> None:
    for retries in range(8):
        assert list(retry_delays(retries)) == [*itertools.islice(exponential_backoff(0.5), retries), None]


class TestRetries:
    pytestmark = on_virtual_time

    @pytest.mark.parametrize("retries", [0, 1, 4])
    async def test_a_failed_attempt_is_repeated_after_growing_pauses(
        self, retries: int, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async with (
            RawServer.listen(server_ssl) as server,
            client(client_ssl, retries=retries) as c,
            task_group() as tasks,
        ):
            flaky = Flaky(server, float("inf"))
            tasks.start_soon(flaky.run)
            with pytest.raises(h2keep.ConnectError, match="during the TLS handshake") as caught:
                await c.get(server.url)
            assert caught.value.unprocessed
            assert len(flaky.at) == retries + 1
            assert flaky.pauses == [0.0, 0.5, 1.0, 2.0][:retries]
            assert_at_rest(c)

    @pytest.mark.parametrize("failures", [0, 1, 3])
    async def test_the_attempt_that_succeeds_carries_the_request_once(
        self, failures: int, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        pulled = []

        async def body() -> AsyncIterator[bytes]:
            for number in range(3):
                pulled.append(number)
                yield b"x"

        async with RawServer.listen(server_ssl) as server, client(client_ssl, retries=3) as c, task_group() as tasks:
            flaky = Flaky(server, failures)
            tasks.start_soon(flaky.run)
            assert (await c.post(server.url, content=body())).content == b"ok"
            assert pulled == [0, 1, 2]
            assert (len(flaky.at), flaky.requests) == (failures + 1, 1)
            assert_at_rest(c)

    async def test_a_transports_retries_are_the_same(
        self, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        transport = h2keep.httpx2.AsyncKeepaliveTransport(verify=client_ssl, retries=2)
        async with (
            RawServer.listen(server_ssl) as server,
            httpx2.AsyncClient(transport=transport, timeout=None) as c,
            task_group() as tasks,
        ):
            flaky = Flaky(server, 2)
            tasks.start_soon(flaky.run)
            assert (await c.post(server.url, content=b"x")).content == b"ok"
            assert flaky.pauses == [0.0, 0.5]
            assert flaky.requests == 1

    @pytest.mark.parametrize("end", ["eof", "abort"])
    async def test_a_request_that_was_sent_is_not_sent_again(
        self, end: str, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async def drop(peer: Peer) -> None:
            await peer.request()
            await peer.eof() if end == "eof" else peer.abort()
            await peer.until(lambda: False)

        async with RawServer.listen(server_ssl) as server, client(client_ssl, retries=5) as c:
            server.serve(drop)
            with pytest.raises(h2keep.ConnectionLost) as caught:
                await c.get(server.url)
            assert not caught.value.unprocessed
            assert [len(peer.requests) for peer in server.peers] == [1]
            assert_at_rest(c)

    async def test_a_server_without_http2_is_asked_once(
        self, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext, cert_path: Any, key_path: Any
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert_path, key_path)
        async with RawServer.listen(context) as server, client(client_ssl, retries=5) as c, task_group() as tasks:

            async def accept() -> None:
                while True:
                    peer = await server.accept()
                    tasks.start_soon(peer.tls_handshake)

            tasks.start_soon(accept)
            with pytest.raises(h2keep.HTTP2NotSupported):
                await c.get(server.url)
            assert len(server.peers) == 1

    async def test_each_attempt_has_the_whole_connect_timeout(
        self, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        timeout = h2keep.Timeout(connect=2.0, read=None, write=None, pool=None)
        async with RawServer.listen(server_ssl) as server, client(client_ssl, retries=2, timeout=timeout) as c:
            began = anyio.current_time()
            with pytest.raises(h2keep.ConnectTimeout, match=r"\(connect timeout\)"):
                await c.get(server.url)
            # Three attempts, and half a second between the second and the third.
            assert anyio.current_time() - began == pytest.approx(6.5, abs=0.1)
            for _ in range(3):
                await server.accept()
            with anyio.move_on_after(10.0):
                await server.accept()
            assert len(server.peers) == 3
            assert_at_rest(c)

    async def test_settings_that_do_not_come_are_not_waited_for_again_as_the_request_was_sent(self) -> None:
        timeout = h2keep.Timeout(connect=2.0, read=None, write=None, pool=None)
        async with (
            RawServer.listen() as server,
            h2keep.AsyncClient(verify=False, http1=False, timeout=timeout, retries=5) as c,
        ):
            began = anyio.current_time()
            with pytest.raises(h2keep.ConnectTimeout, match="SETTINGS") as caught:
                await c.get(server.url)
            assert anyio.current_time() - began == pytest.approx(2.0, abs=0.1)
            assert not caught.value.unprocessed
            await server.accept()
            with anyio.move_on_after(10.0):
                await server.accept()
            assert len(server.peers) == 1
            assert_at_rest(c)

    async def test_a_waiter_that_gives_up_does_not_keep_the_others_from_being_served(
        self, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async with RawServer.listen(server_ssl) as server, client(client_ssl, retries=4) as c, task_group() as tasks:
            flaky = Flaky(server, 3)
            tasks.start_soon(flaky.run)
            impatient, patient = Task(), Task()
            tasks.start_soon(impatient.run, c, server.url)
            await anyio.sleep(0.1)
            tasks.start_soon(patient.run, c, server.url)
            await anyio.sleep(0.1)
            impatient.scope.cancel()
            await anyio.sleep(2.0)
            assert (impatient.outcome, patient.outcome) == (None, b"ok")
            assert flaky.pauses == [0.0, 0.5, 1.0]
            assert flaky.requests == 1
            assert_at_rest(c)

    async def test_nobody_goes_on_trying_for_nobody(
        self, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async with RawServer.listen(server_ssl) as server, client(client_ssl, retries=8) as c, task_group() as tasks:
            flaky = Flaky(server, float("inf"))
            tasks.start_soon(flaky.run)
            task = Task()
            tasks.start_soon(task.run, c, server.url)
            await anyio.sleep(0.2)
            task.scope.cancel()
            await anyio.sleep(1000.0)
            assert len(flaky.at) == 3
            assert not pool_of(c)._tasks
            assert_at_rest(c)


class TestInThreads:
    @pytest.mark.parametrize("door", ["h2keep", "httpx2"])
    def test_a_failed_attempt_is_repeated_in_threads_too(self, door: str) -> None:
        accepted: list[float] = []

        def close_each() -> None:
            for _ in range(3):
                sock, _ = listener.accept()
                accepted.append(time.monotonic())
                sock.close()

        def get(url: str) -> None:
            if door == "h2keep":
                with h2keep.Client(verify=False, retries=2) as c:
                    c.get(url)
            else:
                transport = h2keep.httpx2.KeepaliveTransport(verify=False, retries=2)
                with httpx2.Client(transport=transport, trust_env=False) as httpx2_client:
                    httpx2_client.get(url)

        with nothing_left(), socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=close_each)
            thread.start()
            with pytest.raises(h2keep.ConnectError, match="handshake") as caught:
                get(f"https://127.0.0.1:{listener.getsockname()[1]}")
            thread.join(10.0)
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert caught.value.unprocessed
        first, second, third = accepted
        assert third - second >= 0.5 > second - first


# A dial that fails while another connection lives


class TestBesideALiveConnection:
    pytestmark = on_virtual_time

    async def test_who_waits_has_another_dial_after_growing_pauses(
        self, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async with RawServer.listen(server_ssl) as server, client(client_ssl) as c, task_group() as tasks:
            flaky = Flaky(server, 0, {STREAMS: 1})
            tasks.start_soon(flaky.run, 1000.0)
            first, second = Task(), Task()
            tasks.start_soon(first.run, c, server.url)
            await anyio.sleep(1.0)
            flaky.failures = 3
            tasks.start_soon(second.run, c, server.url)
            await anyio.sleep(998.0)
            # After 1, 2 and 4 s; long before the first one's place is free.
            assert flaky.pauses == [1.0, 1.0, 2.0, 4.0]
            assert flaky.requests == 2
            await anyio.sleep(20.0)
            assert (first.outcome, second.outcome) == (b"ok", b"ok")
            assert_at_rest(c)

    async def test_whoever_comes_during_a_pause_does_not_dial(
        self, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async with RawServer.listen(server_ssl) as server, client(client_ssl) as c, task_group() as tasks:
            flaky = Flaky(server, 0, {STREAMS: 1})
            tasks.start_soon(flaky.run, 20.0)
            crowd = [Task() for _ in range(50)]
            tasks.start_soon(crowd[0].run, c, server.url)
            await anyio.sleep(0.1)
            flaky.failures = float("inf")
            for task in crowd[1:]:
                tasks.start_soon(task.run, c, server.url)
                await anyio.sleep(0.1)
            await anyio.sleep(10.0)
            # At 0, 1, 3 and 7 s after the second came.
            assert len(flaky.at) == 1 + 4
            # The one connection serves them one after another.
            flaky.failures = 0
            await anyio.sleep(1100.0)
            assert [task.outcome for task in crowd] == [b"ok"] * 50
            assert flaky.requests == 50
            assert_at_rest(c)

    async def test_the_place_that_becomes_free_during_a_pause_serves_the_first(
        self, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async with RawServer.listen(server_ssl) as server, client(client_ssl) as c, task_group() as tasks:
            flaky = Flaky(server, 0, {STREAMS: 1})
            tasks.start_soon(flaky.run, 2.5)
            first, second = Task(), Task()
            tasks.start_soon(first.run, c, server.url)
            await anyio.sleep(0.1)
            flaky.failures = float("inf")
            tasks.start_soon(second.run, c, server.url)
            await anyio.sleep(5.5)
            assert (first.outcome, second.outcome) == (b"ok", b"ok")
            assert len(server.peers[0].requests) == 2
            await anyio.sleep(1000.0)
            # 0, 1 s; with nobody waiting, none.
            assert len(flaky.at) == 1 + 2
            assert not pool_of(c)._origins or not any(state.pausing for state in pool_of(c)._origins.values())

    @pytest.mark.parametrize("works", [True, False])
    async def test_if_the_other_connection_ends_during_a_pause_the_next_dial_decides_at_once(
        self, works: bool, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async with RawServer.listen(server_ssl) as server, client(client_ssl) as c, task_group() as tasks:
            flaky = Flaky(server, 0, {STREAMS: 1})
            tasks.start_soon(flaky.run, 1000.0)
            first, second = Task(), Task()
            tasks.start_soon(first.run, c, server.url)
            await anyio.sleep(0.1)
            flaky.failures = 5
            tasks.start_soon(second.run, c, server.url)
            await anyio.sleep(10.0)
            assert len(flaky.at) == 1 + 4
            flaky.failures = 0 if works else float("inf")
            server.peers[0].abort()
            await anyio.sleep(0.1)
            assert isinstance(first.outcome, h2keep.ConnectionLost)
            assert len(flaky.at) == 1 + 5
            if works:
                assert flaky.requests == 2
            else:
                assert isinstance(second.outcome, h2keep.ConnectError)
                assert second.outcome.unprocessed
                await anyio.sleep(1000.0)
                assert len(flaky.at) == 1 + 5
                assert_at_rest(c)


# The end of pools and loops


class TestEnds:
    @pytest.mark.anyio
    @virtual_time
    @pytest.mark.usefixtures("leak_check")
    @pytest.mark.parametrize("closers", [1, 2, 5])
    async def test_a_pool_can_be_closed_by_many_at_once_in_the_middle_of_a_dial(
        self, closers: int, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async with RawServer.listen(server_ssl) as server, task_group() as tasks:
            c = client(client_ssl, retries=3)
            task = Task()
            tasks.start_soon(task.run, c, server.url)
            await server.accept()
            pool = pool_of(c)
            assert pool._tasks
            with anyio.fail_after(60.0):
                async with anyio.create_task_group() as closing:
                    for _ in range(closers):
                        closing.start_soon(pool.aclose)
            assert not pool._tasks
            assert pool._count.dials == 0
            await anyio.sleep(0.1)
            assert isinstance(task.outcome, h2keep.ConnectError)
            assert task.outcome.unprocessed
            await c.aclose()

    def test_a_pool_whose_tasks_were_cancelled_before_they_began_closes(self) -> None:
        async def main() -> None:
            pool = Pool(options, h2keep.Keepalive(), h2keep.Limits(max_connection_age=100.0))
            transport = await dial(origin, options)
            pool._adopt(pool._state(origin), transport, ready=True)
            # As asyncio.run does at its end, in the step in which they were made.
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.wait_for(pool.aclose(), 10.0)
            assert transport.socket.fileno() == -1
            assert not pool._tasks
            assert not pool._states

        with socket.create_server(("127.0.0.1", 0)) as listener:
            origin = Origin("http", "127.0.0.1", listener.getsockname()[1])
            options = DialOptions(ssl.create_default_context())
            asyncio.run(main())

    @pytest.mark.parametrize("when", range(16))
    def test_a_loop_that_ends_at_any_moment_of_a_request_leaves_nothing(self, when: int) -> None:
        async def main(url: str) -> None:
            c = h2keep.AsyncClient(verify=False, http1=False, limits=h2keep.Limits(max_connection_age=100.0))
            request = asyncio.create_task(c.get(url))
            for _ in range(when):
                await asyncio.sleep(0)
            try:
                # What runs after all tasks were cancelled.
                async for _ in closing(c):
                    break
            finally:
                request.cancel()

        async def closing(c: h2keep.AsyncClient) -> AsyncIterator[None]:
            try:
                yield
            finally:
                await asyncio.wait_for(c.aclose(), 10.0)

        with nothing_left(), threaded(answering(delay=0.05)) as server:
            asyncio.run(main(server.url))
            gc.collect()

    @pytest.mark.anyio
    async def test_a_connection_does_not_keep_the_context_of_the_request_that_made_it(self) -> None:
        class Value:
            pass

        variable: contextvars.ContextVar[Value | None] = contextvars.ContextVar("variable", default=None)
        async with RawServer.listen() as server, h2keep.AsyncClient(verify=False, http1=False) as c:
            server.serve(answering())
            value = Value()
            forgotten = weakref.ref(value)
            token = variable.set(value)
            await c.get(server.url)
            variable.reset(token)
            del value, token
            gc.collect()
            assert forgotten() is None
            assert (await c.get(server.url)).content == b"ok"
            assert len(server.peers) == 1
