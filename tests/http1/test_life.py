"""The library's own transports behind ours: several event loops, threads, forks, closing."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest

from support.background import eventually, run_script
from support.leaks import open_sockets

if TYPE_CHECKING:
    from support.fronts import Front
    from support.servers import Server

LOOPS = ["asyncio", "trio"]
#: Who leaves connections open when a loop ends is told so, by the loop's own streams.
lenient = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


def get(transport: Any, front: Front, url: str) -> int:
    """From whatever thread there is."""
    response = transport.handle_request(front.module.Request("GET", url))
    response.read()
    response.close()
    assert response.json()["http_version"] == "1.1"
    return int(response.status_code)


async def aget(transport: Any, front: Front, url: str) -> int:
    response = await transport.handle_async_request(front.module.Request("GET", url))
    await response.aread()
    await response.aclose()
    assert response.json()["http_version"] == "1.1"
    return int(response.status_code)


@pytest.fixture
def url(hypercorn: Server) -> str:
    return f"{hypercorn.h2c_url}/echo"


class TestLoops:
    @lenient
    @pytest.mark.parametrize("backend", LOOPS)
    def test_one_after_the_other(self, front: Front, url: str, backend: str) -> None:
        if front.threaded:
            # These belong to no loop.
            transport = front.kind(trust_env=False)
            assert [get(transport, front, url) for _ in range(2)] == [200, 200]
            transport.close()
            return
        before = set(open_sockets().values())
        transport = front.kind(trust_env=False)
        for _ in range(3):
            assert anyio.run(aget, transport, front, url, backend=backend) == 200
            # That of the loop before is let go of.
            assert len(transport._own._made) == 1
        anyio.run(transport.aclose, backend=backend)
        assert transport._own._made == {}
        del transport
        gc.collect()
        eventually(lambda: set(open_sockets().values()) <= before)

    @pytest.mark.parametrize("backend", LOOPS)
    def test_several_at_once_and_closed_from_another(self, front: Front, url: str, backend: str) -> None:
        if front.threaded:
            assert not hasattr(front.kind, "aclose")
            return
        transport = front.kind(trust_env=False)
        asked = threading.Barrier(4)
        over = threading.Event()

        async def ask() -> list[int]:
            statuses = [await aget(transport, front, url) for _ in range(5)]
            asked.wait(15.0)
            # The loop goes on meanwhile.
            await anyio.to_thread.run_sync(over.wait, 15.0)
            return statuses

        def run() -> list[int]:
            return anyio.run(ask, backend=backend)

        with ThreadPoolExecutor(3) as threads:
            runs = [threads.submit(run) for _ in range(3)]
            asked.wait(15.0)
            assert len(transport._own._made) == 3
            open_before = len(open_sockets())
            anyio.run(transport.aclose, backend=backend)
            assert transport._own._made == {}
            eventually(lambda: len(open_sockets()) <= open_before - 3, "each loop has closed its own")
            over.set()
            assert [done.result(15.0) for done in runs] == [[200] * 5] * 3


class TestThreads:
    def test_many_share_one(self, front: Front, url: str) -> None:
        if not front.threaded:
            assert not hasattr(front.kind, "handle_request")
            return
        with front.kind(trust_env=False) as transport, ThreadPoolExecutor(20) as threads:
            runs = [threads.submit(get, transport, front, url) for _ in range(100)]
            assert {run.result(15.0) for run in runs} == {200}
            assert len(transport._own._made) == 1
        assert transport._own._made == {}


class TestClosing:
    def test_it_can_be_closed_twice_and_used_again(self, front: Front, url: str) -> None:
        before = set(open_sockets().values())

        async def asynchronous() -> None:
            for _ in range(2):
                assert await aget(transport, front, url) == 200
                await transport.aclose()
                await transport.aclose()

        transport = front.kind(trust_env=False)
        if front.threaded:
            for _ in range(2):
                assert get(transport, front, url) == 200
                transport.close()
                transport.close()
        else:
            anyio.run(asynchronous)
        eventually(lambda: set(open_sockets().values()) <= before)


FORK = """
import os, sys, warnings
import httpx, h2keep.httpx
url = sys.argv[1]

def ask():
    response = client.get(url + "/echo")
    assert response.http_version == "HTTP/1.1", response.http_version
    return response.extensions["network_stream"].get_extra_info("client_addr")[1]

client = httpx.Client(transport=h2keep.httpx.KeepaliveTransport(trust_env=False), timeout=20.0, trust_env=False)
port = ask()
assert ask() == port
pid = os.fork()
if pid == 0:
    own = ask()
    assert own != port, "the parent's connection"
    assert ask() == own
    client.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert ask() == port
client.close()
print("done")
"""


def test_a_child_has_connections_of_its_own(hypercorn: Server) -> None:
    result = run_script(FORK, hypercorn.h2c_url)
    assert (result.stdout, result.stderr, result.returncode) == ("done\n", "", 0)
