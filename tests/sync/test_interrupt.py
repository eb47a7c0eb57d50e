"""Ctrl-C in a thread that waits: its request is reset, the wait ends at once, and the client can go on."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import h2keep
from support.background import eventually, start_script
from support.raw import answering
from support.threaded import threaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.raw import Peer

CANCEL = 8
#: "At once", on a machine that has other things to do.
SOON = 2.0


def client(**options: Any) -> h2keep.Client:
    return h2keep.Client(**{"http1": False, "timeout": None, **options})


@contextlib.contextmanager
def interrupted(when: Callable[[], object], how: Callable[[], object]) -> Iterator[None]:
    """The block ends by a KeyboardInterrupt, soon after the condition holds, which another thread watches."""
    moments = []

    def watch() -> None:
        eventually(when)
        # So that the main thread is back in its wait.
        time.sleep(0.1)
        moments.append(time.monotonic())
        how()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        ended = time.monotonic()
        watcher.join()
    assert ended - moments[0] < SOON


def signal_process() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def signal_thread() -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)


# Neither `signal.raise_signal` nor `_thread.interrupt_main` in another thread interrupts any wait, whoever waits.
ways = pytest.mark.parametrize("how", [signal_process, signal_thread])


async def path_decides(peer: Peer) -> None:
    """`/never` gets nothing, `/head` a head and a chunk, all else a whole answer."""
    while True:
        request = await peer.request()
        if request.path == "/head":
            await peer.respond(request.stream_id, body=b"first", end_stream=False)
        elif request.path != "/never":
            peer._tasks.start_soon(answering_one, request)


async def answering_one(request: Any) -> None:
    await request.complete()
    await request.peer.respond(request.stream_id, body=b"ok")


@ways
def test_waiting_for_the_head(how: Callable[[], object]) -> None:
    with threaded(path_decides) as server, client() as own:
        with interrupted(lambda: server.peers and server.peers[0].requests, how):
            own.get(f"{server.url}/never")
        eventually(lambda: server.peers[0].requests[1].reset == CANCEL, "the request is reset")
        assert own.get(server.url).content == b"ok"
        assert len(server.peers) == 1


@ways
def test_waiting_for_the_body(how: Callable[[], object]) -> None:
    with threaded(path_decides) as server, client() as own:
        chunks: list[bytes] = []
        with interrupted(lambda: chunks, how), own.stream("GET", f"{server.url}/head") as response:
            chunks.extend(response.iter_bytes())
            chunks.extend(response.iter_bytes())
        eventually(lambda: server.peers[0].requests[1].reset == CANCEL, "the request is reset")
        assert own.get(server.url).content == b"ok"
        assert len(server.peers) == 1


@ways
def test_reading_a_whole_body(how: Callable[[], object]) -> None:
    with threaded(path_decides) as server, client() as own:
        with interrupted(lambda: server.peers and server.peers[0].requests, how):
            own.get(f"{server.url}/head")
        eventually(lambda: server.peers[0].requests[1].reset == CANCEL, "the request is reset")
        assert own.get(server.url).content == b"ok"


@ways
def test_uploading(how: Callable[[], object]) -> None:
    closed = []

    def body() -> Iterator[bytes]:
        try:
            while True:
                yield b"x" * 16_384
        finally:
            closed.append(True)

    async def handler(peer: Peer) -> None:
        request = await peer.request()
        peer.auto_window = request.path != "/never"
        while True:
            request = await peer.request()
            await answering_one(request)

    with threaded(handler) as server, client() as own:
        with interrupted(lambda: server.peers and 1 in server.peers[0].requests, how):
            own.post(f"{server.url}/never", content=body())
        assert closed == [True]
        eventually(lambda: server.peers[0].requests[1].reset == CANCEL, "the request is reset")
        assert own.get(server.url).content == b"ok"


def in_queue(own: h2keep.Client) -> bool:
    lease = own._connections._lease
    return lease is not None and lease._pool is not None and any(s.waiting for s in lease._pool._origins.values())


@ways
def test_in_the_queue_for_a_connection(how: Callable[[], object]) -> None:
    limits = h2keep.Limits(max_connections=1)
    with threaded(path_decides, settings={3: 1}) as server, client(limits=limits) as own:
        with (
            own.stream("GET", f"{server.url}/head"),
            interrupted(lambda: in_queue(own), how),
        ):
            own.get(server.url)
        assert own.get(server.url).content == b"ok"
        assert [request.path for request in server.peers[0].requests.values()] == ["/head", "/"]


@ways
def test_while_connecting(how: Callable[[], object]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, client(verify=False) as own:
        url = f"https://127.0.0.1:{mute.getsockname()[1]}"
        with interrupted(lambda: True, how):
            own.get(url)


def test_many_interrupts_at_any_moment_leave_a_working_client() -> None:
    stop = threading.Event()

    def pester() -> None:
        pause = 0.0005
        while not stop.is_set():
            time.sleep(pause)
            pause = pause * 1.1 if pause < 0.01 else 0.0005
            if armed.is_set():
                armed.clear()
                _thread.interrupt_main()

    armed = threading.Event()
    pesterer = threading.Thread(target=pester)
    with threaded(answering()) as server, client(timeout=20.0) as own:
        own.get(server.url)
        pesterer.start()
        hits = 0
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            try:
                armed.set()
                while armed.is_set():
                    own.post(server.url, content=iter([b"x" * 100] * 3))
                # It may be on its way.
                time.sleep(0.01)
            except KeyboardInterrupt:
                hits += 1
        stop.set()
        with contextlib.suppress(KeyboardInterrupt):
            pesterer.join()
            time.sleep(0.01)
        assert hits > 20
        assert own.get(server.url).content == b"ok"
        eventually(lambda: not own._connections._lease._pool.busy, "no stream is left")  # type: ignore[union-attr]
        assert len(server.peers) == 1


SCRIPT = """
import sys, time
import h2keep
own = h2keep.Client(http1=False, timeout=None)
print("ready", flush=True)
try:
    own.get(sys.argv[1] + "/never")
except KeyboardInterrupt:
    began = time.monotonic()
    print(own.get(sys.argv[1]).text, flush=True)
    own.close()
    print("closed", flush=True)
"""


@pytest.mark.parametrize("kind", ["direct", "httpx2"])
def test_a_real_signal_from_another_process(kind: str) -> None:
    source = SCRIPT
    if kind == "httpx2":
        source = source.replace("import h2keep", "import httpx2, h2keep.httpx2").replace(
            "h2keep.Client(http1=False, timeout=None)",
            "httpx2.Client(transport=h2keep.httpx2.KeepaliveTransport(http1=False), timeout=None)",
        )
    with threaded(path_decides) as server:
        process = start_script(source, server.url)
        try:
            eventually(lambda: server.peers and server.peers[0].requests, "the request came")
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(process.communicate()) from None
        assert (process.returncode, stdout, stderr) == (0, "ready\nok\nclosed\n", "")
        assert server.peers[0].requests[1].reset == CANCEL
        assert len(server.peers) == 1
