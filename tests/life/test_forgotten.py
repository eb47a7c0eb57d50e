"""Clients that nobody closes, and programs that end in the middle: one ResourceWarning, and not another word.

Each is a script in a process of its own, whose warnings are all on. More of asynchronous programs in `tests/exit`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from support.background import eventually, run_script
from support.threaded import threaded

if TYPE_CHECKING:
    from support.raw import Peer

WARNING = "ResourceWarning: an h2keep client or transport was never closed, and left connections open"
CANCEL = 8

PRELUDE = """
import asyncio, atexit, contextlib, gc, os, sys, threading, time
import h2keep
url = sys.argv[1]
options = {"http1": False, "timeout": 10.0}

def run(main):
    async def patient():
        asyncio.get_running_loop().slow_callback_duration = 60
        await main()
    asyncio.run(patient())
"""


async def path_decides(peer: Peer) -> None:
    """`/never` gets nothing, `/head` a head and a chunk, all else a whole answer."""
    while True:
        request = await peer.request()
        if request.path == "/head":
            await peer.respond(request.stream_id, body=b"first", end_stream=False)
        elif request.path != "/never":
            await request.complete()
            await peer.respond(request.stream_id, body=b"ok")


#: Scripts that leave something open, and their exit status.
LEFT = {
    "a client in a global": ("own = h2keep.Client(**options); own.get(url)", 0),
    "a client that is forgotten": ("own = h2keep.Client(**options); own.get(url); del own; time.sleep(0.2)", 0),
    "a client in a cycle": (
        "own = h2keep.Client(**options); own.get(url); own.own = own; del own; gc.collect(); time.sleep(0.2)",
        0,
    ),
    "two clients": (
        "own, other = h2keep.Client(**options), h2keep.Client(**options)\nfor c in (own, other): c.get(url)",
        0,
    ),
    "a transport for httpx2": (
        """
import httpx2, h2keep.httpx2
own = httpx2.Client(transport=h2keep.httpx2.KeepaliveTransport(http1=False), timeout=10.0)
own.get(url)
""",
        0,
    ),
    "a response half read": (
        """
own = h2keep.Client(**options)
manager = own.stream("GET", url + "/head")
chunks = manager.__enter__().iter_bytes()
assert next(chunks) == b"first"
""",
        0,
    ),
    "an exit inside a stream": (
        """
own = h2keep.Client(**options)
with own.stream("GET", url + "/head") as response:
    sys.exit(3)
""",
        3,
    ),
    "a daemon thread that waits": (
        """
own = h2keep.Client(http1=False, timeout=None)
threading.Thread(target=own.get, args=(url + "/never",), daemon=True).start()
threading.Thread(target=own.get, args=(url + "/head",), daemon=True).start()
deadline = time.monotonic() + 5
while time.monotonic() < deadline:
    with contextlib.suppress(AttributeError, IndexError):
        if list(own._connections._lease._pool._states)[0].requests == 2:
            break
time.sleep(0.1)
""",
        0,
    ),
    "a daemon thread that uploads": (
        """
own = h2keep.Client(http1=False, timeout=None)
def body():
    while True:
        yield b"x" * 16_384
threading.Thread(target=own.post, args=(url + "/never",), kwargs={"content": body()}, daemon=True).start()
time.sleep(0.5)
""",
        0,
    ),
    "daemon threads that go on": (
        """
own = h2keep.Client(http1=False, timeout=None)
def work():
    while True:
        own.get(url)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.5)
""",
        0,
    ),
    "an asynchronous client that is forgotten in its loop": (
        """
async def main():
    own = h2keep.AsyncClient(**options)
    await own.get(url)
    del own
    gc.collect()
    await asyncio.sleep(0.1)
run(main)
""",
        0,
    ),
    "an asynchronous client that is forgotten after its loop": (
        """
async def main():
    await own.get(url)
own = h2keep.AsyncClient(**options)
run(main)
del own
gc.collect()
""",
        0,
    ),
    "an asynchronous client in a thread": (
        """
async def main():
    await own.get(url)
own = h2keep.AsyncClient(**options, run_in_thread=True)
run(main)
""",
        0,
    ),
    "responses unread at the end of asyncio.run": (
        """
async def main():
    own = h2keep.AsyncClient(**options)
    responses.append(await own._send("GET", url + "/head"))
    other = h2keep.AsyncClient(**options, run_in_thread=True)
    responses.append(await other._send("GET", url + "/head"))
    clients.extend([own, other])
responses, clients = [], []
run(main)
""",
        0,
    ),
    "a loop that was never closed": (
        """
own = h2keep.AsyncClient(**options)
loop = asyncio.new_event_loop()
async def main():
    await own.get(url)
loop.run_until_complete(main())
# Python itself complains of the loop.
type(loop).__del__ = lambda self: None
""",
        0,
    ),
}

#: Scripts that leave nothing open, or can't be asked to tell.
CLOSED = {
    "a client that was closed": "own = h2keep.Client(**options); own.get(url); own.close()",
    "a context": "with h2keep.Client(**options) as own: own.get(url)",
    "a client that was closed twice": "own = h2keep.Client(**options); own.get(url); own.close(); own.close()",
    "a client that was never used": "own = h2keep.Client(**options)",
    "a client that could not connect": """
own = h2keep.Client(**options)
with contextlib.suppress(h2keep.ConnectError):
    own.get("http://127.0.0.1:1")
""",
    "a client that could not be made": """
with contextlib.suppress(ValueError):
    h2keep.Client(engine="none")
""",
    "a client that was closed under an open stream": """
own = h2keep.Client(**options)
manager = own.stream("GET", url + "/head")
response = manager.__enter__()
own.close()
""",
    "an exit inside a context": """
with h2keep.Client(**options) as own, own.stream("GET", url + "/head") as response:
    sys.exit(0)
""",
    "a daemon thread on a client that was closed": """
def work():
    with contextlib.suppress(h2keep.H2KeepError):
        own.get(url + "/never")
own = h2keep.Client(http1=False, timeout=None)
thread = threading.Thread(target=work, daemon=True)
thread.start()
time.sleep(0.3)
own.close()
thread.join()
""",
    "os._exit": "own = h2keep.Client(**options); own.get(url); os._exit(0)",
    "os._exit inside a stream": """
own = h2keep.Client(**options)
with own.stream("GET", url + "/head"):
    os._exit(0)
""",
    "a closed client in a cycle": """
own = h2keep.Client(**options)
own.get(url)
own.own = own
own.close()
""",
    "an asynchronous client in a thread": """
async def main():
    async with h2keep.AsyncClient(**options, run_in_thread=True) as own:
        await own.get(url)
run(main)
""",
    "a client in each of two loops": """
async def main():
    await own.get(url)
async def end():
    await own.aclose()
own = h2keep.AsyncClient(**options)
run(main)
run(main)
run(end)
""",
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_open_is_told_once(name: str) -> None:
    source, status = LEFT[name]
    with threaded(path_decides) as server:
        result = run_script(PRELUDE + source, server.url)
        eventually(lambda: all(peer.ended for peer in server.peers), "the server sees the end")
    assert (result.stdout, result.returncode) == ("", status), result.stderr
    # The line itself follows, and sometimes that tracemalloc would know more, or that the machine is slow.
    noise = ("  ", "ResourceWarning: Enable tracemalloc", "Executing <")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(noise)]
    assert len(lines) == 1, result.stderr
    assert WARNING in lines[0]


@pytest.mark.parametrize("name", CLOSED)
def test_what_is_closed_is_not_told_of(name: str) -> None:
    with threaded(path_decides) as server:
        result = run_script(PRELUDE + CLOSED[name], server.url)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


#: Python 3.12.0 to 3.12.2 start no thread any more once the main one has ended.
NO_NEW_THREADS = (3, 12) <= sys.version_info < (3, 12, 3)
CANNOT_START = "h2keep's background thread can't be started: can't create new thread at interpreter shutdown"


class TestAtExit:
    def test_handlers_registered_later_can_make_requests(self) -> None:
        source = """
own = h2keep.Client(**options)
own.get(url)
@atexit.register
def handler():
    print(own.get(url).text, flush=True)
    own.close()
"""
        with threaded(path_decides) as server:
            result = run_script(PRELUDE + source, server.url)
            assert len(server.peers) == 1
        assert (result.stdout, result.stderr, result.returncode) == ("ok\n", "", 0)

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_handlers_registered_earlier_can_too(self, host: str) -> None:
        source = """
import atexit
@atexit.register
def handler():
    try:
        print(own.get(url).text, flush=True)
    except h2keep.H2KeepError as error:
        print(type(error).__name__, error, flush=True)
    print("handled", flush=True)
"""
        with threaded(path_decides) as server:
            script = source + PRELUDE + "own = h2keep.Client(**options)\nown.get(url)\n"
            result = run_script(script, server.url.replace("127.0.0.1", host))
        answer = f"ConnectError {CANNOT_START}" if NO_NEW_THREADS else "ok"
        assert result.stdout == f"{answer}\nhandled\n", result.stderr
        assert result.stderr.count(WARNING) == 1
        assert "Traceback" not in result.stderr

    def test_a_handler_can_wait_for_a_thread_that_waits(self) -> None:
        source = """
import atexit
@atexit.register
def handler():
    thread.join()
    print("joined", flush=True)
"""
        rest = """
own = h2keep.Client(http1=False, timeout=1.0)
def work():
    try:
        own.get(url + "/never")
    except h2keep.ReadTimeout:
        print("timed out", flush=True)
thread = threading.Thread(target=work, daemon=True)
thread.start()
time.sleep(0.3)
"""
        with threaded(path_decides) as server:
            result = run_script(source + PRELUDE + rest, server.url)
        assert (result.stdout, result.returncode) == ("timed out\njoined\n", 0), result.stderr
        assert result.stderr.count(WARNING) == 1
        assert "Traceback" not in result.stderr

    def test_threads_that_are_no_daemons_finish_first(self) -> None:
        source = """
own = h2keep.Client(**options)
def work():
    time.sleep(0.3)
    print(own.get(url).text, flush=True)
    own.close()
threading.Thread(target=work).start()
"""
        with threaded(path_decides) as server:
            result = run_script(PRELUDE + source, server.url)
        if NO_NEW_THREADS:
            assert CANNOT_START in result.stderr
        else:
            assert (result.stdout, result.stderr, result.returncode) == ("ok\n", "", 0)
