"""Keepalive when our own side stalls: a blocked event loop, a stopped process, a thin pipe. All in real time."""

from __future__ import annotations

import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from hyperframe import frame as frames

import h2keep
from support.raw import answering
from support.threaded import threaded

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from pathlib import Path

    from runner.conftest import Ends
    from support.raw import Peer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]

QUICK = h2keep.Keepalive(read_idle_timeout=0.2, ping_timeout=0.3, jitter=0.0)
#: Longer than both, and late enough for the timer to know (K7).
LONG = 1.0


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what happens in another thread or process."""
    while not condition():  # noqa: ASYNC110
        await anyio.sleep(0.002)


def block(seconds: float) -> None:
    """What no coroutine should do."""
    time.sleep(seconds)


class Slow:
    """Answers when it is told to, and PINGs a moment late, so that a client can block in between."""

    def __init__(self, *, acknowledging: bool = True) -> None:
        self.acknowledging = acknowledging
        self.stream_id = 0

    async def __call__(self, peer: Peer) -> None:
        peer.auto_ack_pings = False
        self.stream_id = (await peer.request()).stream_id
        answered = 0
        while True:
            await peer.until(lambda: len(peer.pings) > answered)  # noqa: B023
            await anyio.sleep(0.1)
            if self.acknowledging:
                await peer.send(frames.PingFrame(0, peer.pings[answered].payload, flags=["ACK"]))
            answered += 1


# A blocked event loop


async def test_k7_an_ack_that_waits_in_the_kernel_is_read_before_judgement(ends: Ends) -> None:
    handler = Slow()
    results: list[h2keep.Response] = []
    with threaded(handler, ends.server_ssl) as server:
        async with ends.client(keepalive=QUICK) as c, anyio.create_task_group() as tasks:

            async def request() -> None:
                results.append(await c.get(server.url))

            tasks.start_soon(request)
            for number in range(2):
                await eventually(lambda: bool(server.peers) and len(server.peers[0].pings) > number)  # noqa: B023
                # The PING has its ACK in 0.1 s, and until later than its deadline nobody can look; yet not so much
                # later that the timer would take the blame.
                block(0.6)
            await eventually(lambda: len(server.peers[0].pings) > 2)
            server.call(server.peers[0].respond, handler.stream_id, 200, (), b"still here")
        assert [response.content for response in results] == [b"still here"]
        assert results[0].connection.pings_acked >= 2
        assert len(server.peers) == 1


async def test_k7_three_stalls_within_one_ping_survive(plain_ends: Ends) -> None:
    handler = Slow(acknowledging=False)
    results: list[h2keep.Response] = []
    with threaded(handler, plain_ends.server_ssl) as server:
        async with plain_ends.client(keepalive=QUICK) as c, anyio.create_task_group() as tasks:

            async def request() -> None:
                results.append(await c.get(server.url))

            async def answer_soon(peer: Peer) -> None:
                await anyio.sleep(0.3)
                await peer.respond(handler.stream_id, body=b"still here")

            tasks.start_soon(request)
            await eventually(lambda: bool(server.peers) and bool(server.peers[0].pings))
            for number in range(3):
                if number == 2:
                    server.soon(answer_soon, server.peers[0])
                block(LONG)
                await anyio.sleep(0.05)
        assert [response.content for response in results] == [b"still here"]
        assert len(server.peers[0].pings) == results[0].connection.pings_sent == 1


async def test_k7_k4_a_dead_peer_is_found_after_three_stalls(plain_ends: Ends) -> None:
    lost: list[tuple[float, h2keep.PingTimeout]] = []
    blocked = 0.0
    with threaded(Slow(acknowledging=False), plain_ends.server_ssl) as server:
        async with plain_ends.client(keepalive=QUICK) as c, anyio.create_task_group() as tasks:

            async def request() -> None:
                with pytest.raises(h2keep.PingTimeout) as caught:
                    await c.get(server.url)
                lost.append((anyio.current_time(), caught.value))

            tasks.start_soon(request)
            await eventually(lambda: bool(server.peers) and bool(server.peers[0].pings))
            while not lost:
                block(LONG)
                blocked += LONG
                await anyio.sleep(0.05)
                assert blocked < 10.0
        [(at, error)] = lost
        assert error.ping_sent_at is not None
        # Three extensions, and no fourth.
        assert at - error.ping_sent_at >= 3 * LONG
        assert 3 * LONG <= blocked <= 5 * LONG


async def test_k7_k9_an_unused_connection_outlives_a_blocked_loop(plain_ends: Ends) -> None:
    with threaded(answering(), plain_ends.server_ssl) as server:
        async with plain_ends.client(keepalive=QUICK) as c:
            await c.get(server.url)
            block(LONG)
            assert (await c.get(server.url)).content == b"ok"
            assert len(server.peers) == 1
            assert len(server.peers[0].pings) == 1


# A stopped process

CLIENT = """
import sys, anyio, ssl, h2keep

async def main(url, ca):
    keepalive = h2keep.Keepalive(read_idle_timeout=0.2, ping_timeout=0.3, jitter=0.0)
    async with h2keep.AsyncClient(http1=False, timeout=None, keepalive=keepalive, verify=ca) as client:
        for _ in range(2):
            response = await client.get(url)
            print(f"{response.text}, {response.connection.pings_sent > 0}", flush=True)
            await anyio.to_thread.run_sync(sys.stdin.readline)

anyio.run(main, *sys.argv[2:], backend=sys.argv[1])
"""


async def test_k7_k9_a_process_that_is_stopped_and_continued_keeps_its_connection(
    server_ssl: ssl.SSLContext, ca_path: Path, anyio_backend: Any
) -> None:
    handler = Slow()
    with threaded(handler, server_ssl) as server:
        arguments = [sys.executable, "-c", CLIENT, anyio_backend[0], server.url, str(ca_path)]
        async with await anyio.open_process(arguments, stderr=sys.stderr) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            said = BufferedByteReceiveStream(process.stdout)
            await eventually(lambda: bool(server.peers) and len(server.peers[0].pings) > 0)
            # Its PING's ACK will come while it can't look at its clock.
            process.send_signal(signal.SIGSTOP)
            await anyio.sleep(LONG)
            process.send_signal(signal.SIGCONT)
            await eventually(lambda: len(server.peers[0].pings) > 1)
            server.call(server.peers[0].respond, handler.stream_id, 200, (), b"continued")
            assert await said.receive_until(b"\n", 100) == b"continued, True"
            # The same while no request is open: the connection proves itself before the next.
            process.send_signal(signal.SIGSTOP)
            await anyio.sleep(LONG)
            process.send_signal(signal.SIGCONT)
            await process.stdin.send(b"\n")
            await eventually(lambda: len(server.peers[0].requests) > 1)
            server.call(server.peers[0].respond, 3, 200, (), b"used again")
            assert await said.receive_until(b"\n", 100) == b"used again, True"
            await process.stdin.send(b"\n")
            assert await process.wait() == 0
        assert len(server.peers) == 1


async def test_k9_an_unused_connection_that_died_costs_a_hedge_and_no_failure(ends: Ends) -> None:
    async with ends.listen() as server, ends.client(keepalive=QUICK) as c:
        server.serve(answering())
        await c.get(server.url)
        await anyio.sleep(0.4)
        server.peers[0].stop_reading()
        began = anyio.current_time()
        assert (await c.get(server.url)).content == b"ok"
        assert anyio.current_time() - began >= 0.2
        assert len(server.peers) == 2
