"""How much is handed to the socket at once: `WritePacer` by itself, and over a pipe that is thin (K5)."""

from __future__ import annotations

import contextlib
import socket
from random import randrange
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep.protocol import events
from h2keep.runner.pacing import WritePacer
from support.clock import virtual_time
from support.pools import connections_of
from support.raw import answering, close, task_group

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from runner.conftest import Ends
    from support.raw import Peer, RawRequest

KIB = 1024


def write_at(pacer: WritePacer, rate: float, seconds: float, began: float = 0.0, step: float = 0.01) -> float:
    """Let a socket take bytes at a steady rate; the time at the end."""
    now = began
    while now < began + seconds:
        pacer.note_written(int(rate * step), now)
        now += step
    return now


def test_k5_it_begins_at_64_kib() -> None:
    assert WritePacer().budget == 64 * KIB


def test_k5_the_budget_is_a_quarter_of_a_seconds_worth() -> None:
    pacer = WritePacer()
    write_at(pacer, 400 * KIB, 2.0)
    assert 80 * KIB <= pacer.budget <= 130 * KIB


def test_k5_it_stays_between_16_and_256_kib() -> None:
    pacer = WritePacer()
    now = write_at(pacer, 100 * KIB * KIB, 1.0)
    assert pacer.budget == 256 * KIB
    write_at(pacer, 100, 10.0, now)
    assert pacer.budget == 16 * KIB


def test_k5_changes_are_reported_so_that_the_kernels_limit_can_follow() -> None:
    pacer = WritePacer()
    assert not pacer.note_written(1_000, 0.0)
    assert not pacer.note_written(1_000, 0.01)
    assert pacer.note_written(1_000, 0.1)
    assert pacer.budget == 16 * KIB
    assert not pacer.note_written(1_000, 0.2)


def test_k5_a_pause_says_nothing_about_the_rate() -> None:
    pacer = WritePacer()
    now = write_at(pacer, 100 * KIB * KIB, 1.0)
    for _ in range(10):
        pacer.note_idle()
        now += 3600.0
        now = write_at(pacer, 100 * KIB * KIB, 0.1, now)
        assert pacer.budget == 256 * KIB


def test_k5_a_burst_is_no_rate() -> None:
    pacer = WritePacer()
    pacer.note_written(4 * KIB * KIB, 0.0)
    pacer.note_written(4 * KIB * KIB, 0.001)
    assert pacer.budget == 64 * KIB


def test_k5_pauses_hide_no_high_rate() -> None:
    pacer = WritePacer()
    for burst in range(100):
        # A megabyte of window at a time, and a pause until there is more of it.
        for part in range(16):
            pacer.note_written(64 * KIB, burst / 500 + part / 20_000)
        pacer.note_idle()
    assert pacer.budget == 256 * KIB


def test_k5_what_the_kernel_merely_holds_is_no_rate() -> None:
    pacer = WritePacer()
    for minute in range(10):
        for seconds in 0.0, 0.06:
            pacer.note_written(128 * KIB, minute * 60 + seconds)
            pacer.note_idle()
    assert pacer.budget == 64 * KIB


def test_k5_pauses_are_no_low_rate() -> None:
    pacer = WritePacer()
    now = write_at(pacer, 100 * KIB * KIB, 1.0)
    for _ in range(1_000):
        now += 0.01
        pacer.note_written(100, now)
        pacer.note_idle()
    assert pacer.budget == 256 * KIB
    # Without pauses it is one.
    write_at(pacer, 100, 1.0, now + 0.01)
    assert pacer.budget == 16 * KIB


# Over sockets


class ThinPipe:
    """A relay that takes but so many bytes a second from the client, and buffers nothing."""

    _TICK = 0.02

    def __init__(self, port: int, rate: float, tasks: TaskGroup) -> None:
        self._target = port
        self._bite = int(rate * self._TICK)
        self._tasks = tasks
        self._listener = socket.socket()
        # The window that the client sees; it is inherited by what is accepted.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * KIB)
        # An address that nobody has used: Linux remembers of each how much its packets were out of order, and by that
        # waits for lost ones in real time, of which there is none while the clock jumps.
        self._listener.bind((f"127.{randrange(1, 256)}.{randrange(256)}.{randrange(1, 255)}", 0))
        self._listener.listen()
        self._listener.setblocking(False)
        host, port = self._listener.getsockname()
        self.url = f"http://{host}:{port}"
        tasks.start_soon(self._run)

    async def _run(self) -> None:
        with contextlib.closing(self._listener), socket.socket() as server:
            await anyio.wait_readable(self._listener)
            client, _ = self._listener.accept()
            with client:
                server.connect(("127.0.0.1", self._target))
                for sock in client, server:
                    sock.setblocking(False)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    async with task_group() as tasks:
                        tasks.start_soon(self._pass_on, server, client, 64 * KIB, 0.0)
                        await self._pass_on(client, server, self._bite, self._TICK)
                except OSError:
                    # The client left.
                    pass
                finally:
                    close(client)
                    close(server)

    @staticmethod
    async def _pass_on(source: socket.socket, target: socket.socket, bite: int, pause: float) -> None:
        due = anyio.current_time()
        while True:
            await anyio.wait_readable(source)
            data = source.recv(bite)
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            while data:
                await anyio.wait_writable(target)
                data = data[target.send(data) :]
            due = max(due, anyio.current_time() - pause) + pause
            await anyio.sleep_until(due)


def lowat(sock: socket.socket) -> int:
    """TCP_NOTSENT_LOWAT, for which Python has no name everywhere."""
    return sock.getsockopt(socket.IPPROTO_TCP, 25)


class Upload:
    """What became of an upload through a thin pipe."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        #: Bytes that had come when each PING came.
        self.pinged_at: list[int] = []
        self.round_trips: list[float] = []
        self.total = 0

    def hook(self, _stats: h2keep.ConnectionStats, event: Any) -> None:
        if isinstance(event, events.PingAcknowledged):
            self.round_trips.append(event.rtt)

    async def serve(self, peer: Peer) -> None:
        """Say nothing at all but ACKs of PINGs until the upload is complete."""
        peer.auto_window = peer.keep_bodies = False
        await peer.send(frames.WindowUpdateFrame(0, 2**31 - 1 - 65_535))
        request = await peer.request()
        await peer.until(lambda: self._look(peer, request))
        await peer.respond(request.stream_id, body=b"%d" % request.received)

    def _look(self, peer: Peer, request: RawRequest) -> bool:
        self.total = request.received
        self.pinged_at += [self.total] * (len(peer.pings) - len(self.pinged_at))
        return request.ended


@virtual_time
@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
async def test_k4_k5_an_upload_through_a_thin_pipe_neither_hides_its_pings_nor_is_taken_for_dead(
    plain_ends: Ends,
) -> None:
    rate, size = 64 * KIB, 256 * KIB
    keepalive = h2keep.Keepalive(read_idle_timeout=0.3, ping_timeout=0.5, jitter=0.0)
    upload = Upload()
    segments = [(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1_400)]
    async with (
        plain_ends.listen() as server,
        task_group() as tasks,
        plain_ends.client(keepalive=keepalive, socket_options=segments, event_hook=upload.hook) as c,
    ):
        server.serve(upload.serve, {frames.SettingsFrame.INITIAL_WINDOW_SIZE: 2**31 - 1})
        pipe = ThinPipe(server.port, rate, tasks)
        began = anyio.current_time()
        response = await c.post(pipe.url, content=b"x" * size)
        assert response.content == b"%d" % size
        assert anyio.current_time() - began >= 0.9 * size / rate
        # K5: what stands before a PING is bounded, however much there is to upload.
        assert upload.pinged_at[0] <= size / 2
        assert len(upload.pinged_at) >= 2
        # K4: without the allowance for a full buffer of our own this would have been the end.
        assert max(upload.round_trips) > keepalive.ping_timeout
        assert len(server.peers) == 1
        [connection] = connections_of(c)
        assert 16 * KIB <= lowat(connection.transport.socket) <= 32 * KIB


@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
async def test_k5_the_kernel_holds_little_that_it_has_not_sent(ends: Ends) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering(), {frames.SettingsFrame.INITIAL_WINDOW_SIZE: 2**31 - 1})
        await c.get(server.url)
        [connection] = connections_of(c)
        assert lowat(connection.transport.socket) == 64 * KIB
        await server.peers[0].send(frames.WindowUpdateFrame(0, 2**31 - 1 - 65_535))
        server.peers[0].keep_bodies = False
        for _ in range(20):
            # Long enough to measure the rate by, also where it is a gigabyte a second.
            await c.post(server.url, content=bytes(128 * KIB * KIB))
            # A machine that has other things to do can make the last of it look slow.
            if lowat(connection.transport.socket) > 64 * KIB:
                break
        assert 64 * KIB < lowat(connection.transport.socket) <= 256 * KIB
