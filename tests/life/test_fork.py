"""Forks: the child never touches what is the parent's, starts anew, and the parent doesn't notice.

Each is a script in a process of its own, whose warnings are all on; a child's failure is its exit status.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from support.background import eventually, run_script, start_script
from support.threaded import threaded

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

    from support.raw import Peer


PRELUDE = """
import asyncio, atexit, gc, multiprocessing, os, ssl, sys, threading, time, warnings
import h2keep
url, ca = sys.argv[1:3]
keepalive = h2keep.Keepalive(0.2, 10.0, jitter=0.0)
context = ssl.create_default_context(cafile=ca)

def new(kind=h2keep.Client, **options):
    return kind(verify=context, timeout=20.0, keepalive=keepalive, **options)

def quiet():
    # Imports and forks take long, and debug mode would tell.
    asyncio.get_running_loop().slow_callback_duration = 60

def wait(pid):
    _, status = os.waitpid(pid, 0)
    assert status == 0, status

def threads():
    return [thread.name for thread in threading.enumerate() if thread.name == "h2keep"]

def expect_threads():
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

if (3, 13) <= sys.version_info < (3, 14):
    # This one counts threads not at the fork but after it, when h2keep's runs again.
    expect_threads()
"""


async def stream(peer: Peer) -> None:
    """`/stream` gets a chunk at once, and the rest as the client asks for it on `/next`; all else an answer."""
    streams = []
    while True:
        request = await peer.request()
        if request.path == "/stream":
            streams.append(request.stream_id)
            await peer.respond(request.stream_id, body=b"first ", end_stream=False)
        else:
            await request.complete()
            for stream_id in streams if request.path == "/next" else ():
                await peer.send_data(stream_id, b"last", end_stream=True)
            await peer.respond(request.stream_id, body=b"ok")


def check(script: str, *args: object, peers: int | None = None, context: ssl.SSLContext) -> list[Peer]:
    with threaded(stream, context) as server:
        result = run_script(PRELUDE + script, server.url, *args)
        assert (result.stdout, result.stderr, result.returncode) == ("done\n", "", 0)
        if peers is not None:
            assert len(server.peers) == peers
        return list(server.peers)


#: What a child does after the fork, and how many connections it makes.
CHILDREN = {
    "nothing": ("os._exit(0)", 0),
    "sys.exit": ("sys.exit(0)", 0),
    "an own request": ('assert own.get(url).text == "ok"; assert threads() == ["h2keep"]; own.close(); os._exit(0)', 1),
    "an own request, and sys.exit": ('assert own.get(url).text == "ok"; own.close(); sys.exit(0)', 1),
    "close": ("own.close(); gc.collect(); os._exit(0)", 0),
    "forgetting all": ("del own, chunks; manager = response = None; gc.collect(); sys.exit(0)", 0),
}


@pytest.mark.parametrize("what", CHILDREN)
def test_a_child_leaves_its_parents_streams_alone(what: str, server_ssl: ssl.SSLContext, ca_path: Path) -> None:
    code, connections = CHILDREN[what]
    script = f"""
own = new()
manager = own.stream("GET", url + "/stream")
response = manager.__enter__()
chunks = response.iter_bytes()
assert next(chunks) == b"first "
pid = os.fork()
if pid == 0:
    assert threads() == []
    {code}
wait(pid)
assert threads() == ["h2keep"]
before = response.connection.pings_acked
time.sleep(1.0)
assert response.connection.pings_acked >= before + 2
assert own.get(url + "/next").text == "ok"
assert b"".join(chunks) == b"last"
own.close()
print("done")
"""
    peers = check(script, ca_path, peers=1 + connections, context=server_ssl)
    assert peers[0].requests[1].reset is None


def test_a_child_that_raises(server_ssl: ssl.SSLContext, ca_path: Path) -> None:
    script = """
own = new()
with own.stream("GET", url + "/stream") as response:
    pid = os.fork()
    if pid == 0:
        sys.stderr.close()
        os.close(2)
        raise RuntimeError("in the child")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 1, status
    own.get(url + "/next")
    assert response.read() == b"first last"
own.close()
print("done")
"""
    peers = check(script, ca_path, peers=1, context=server_ssl)
    assert peers[0].requests[1].reset is None


def test_a_child_that_touches_its_parents_response_is_told_so(server_ssl: ssl.SSLContext, ca_path: Path) -> None:
    script = """
own = new()
with own.stream("GET", url + "/stream") as response:
    chunks = response.iter_bytes()
    assert next(chunks) == b"first "
    pid = os.fork()
    if pid == 0:
        try:
            next(chunks)
        except h2keep.ReadError as error:
            assert "forked from" in str(error) or "another process" in str(error), error
            response.close()
            os._exit(0)
        os._exit(1)
    wait(pid)
    own.get(url + "/next")
    assert b"".join(chunks) == b"last"
own.close()
print("done")
"""
    check(script, ca_path, peers=1, context=server_ssl)


def test_an_asynchronous_parent(server_ssl: ssl.SSLContext, ca_path: Path) -> None:
    script = """
async def child():
    assert (await own.get(url)).text == "ok"
    await own.aclose()

async def parent():
    quiet()
    async with own.stream("GET", url + "/stream") as response:
        chunks = response.aiter_bytes()
        assert await anext(chunks) == b"first "
        pid = os.fork()
        if pid == 0:
            # In a thread, as this one's loop is the parent's.
            try:
                thread = threading.Thread(target=asyncio.run, args=(child(),))
                thread.start()
                thread.join()
                gc.collect()
            finally:
                os._exit(0)
        await asyncio.to_thread(wait, pid)
        before = response.connection.pings_acked
        await asyncio.sleep(1.0)
        assert response.connection.pings_acked >= before + 2
        await own.get(url + "/next")
        assert [chunk async for chunk in chunks] == [b"last"]
    await own.aclose()

own = new(h2keep.AsyncClient)
asyncio.run(parent())
print("done")
"""
    peers = check(script, ca_path, peers=2, context=server_ssl)
    assert peers[0].requests[1].reset is None


#: Where in an event loop a child can leave by exception. In Python 3.14 asyncio can't end the task that a process has
#: forked in, and goes on for ever, whoever else is there.
LEAVES = {"callback": "asyncio.get_running_loop().call_soon(fork)"}
if sys.version_info < (3, 14):
    LEAVES["task"] = "fork()"


@pytest.mark.parametrize("where", LEAVES)
def test_an_asynchronous_parent_whose_child_leaves_by_exception(
    where: str, server_ssl: ssl.SSLContext, ca_path: Path
) -> None:
    script = f"""
async def parent():
    quiet()
    forked = asyncio.get_running_loop().create_future()

    def fork():
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        forked.set_result(pid)

    # In Python 3.14 a child doesn't cancel its parent's tasks, and tells of each at its end.
    asyncio.current_task()._log_destroy_pending = False
    async with own.stream("GET", url + "/stream") as response:
        {LEAVES[where]}
        pid = await forked
        # Not by a thread: a child that closes the loop makes its parent's deaf to threads, by asyncio's own doing.
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            await asyncio.sleep(0.01)
        before = response.connection.pings_acked
        await asyncio.sleep(1.0)
        assert response.connection.pings_acked >= before + 2
        await own.get(url + "/next")
        assert await response.aread() == b"first last"
    await own.aclose()

own = new(h2keep.AsyncClient)
asyncio.run(parent())
print("done")
"""
    peers = check(script, ca_path, peers=1, context=server_ssl)
    assert peers[0].requests[1].reset is None


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(method: str, server_ssl: ssl.SSLContext, ca_path: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        PRELUDE
        + """
def child(url):
    with new() as own:
        assert own.get(url).text == "ok"
    assert threads() == []

def in_pool(number):
    return shared.get(url).text

shared = new()
# A pool's workers end in good order, if they are told to before they are killed.
atexit.register(shared.close)
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[3])
    with shared.stream("GET", url + "/stream") as response:
        chunks = response.iter_bytes()
        assert next(chunks) == b"first "
        processes = [multiprocessing.Process(target=child, args=(url,)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0, process.exitcode
        with multiprocessing.Pool(2) as pool:
            assert pool.map(in_pool, range(6)) == ["ok"] * 6
        shared.get(url + "/next")
        assert b"".join(chunks) == b"last"
    shared.close()
    print("done")
"""
    )
    with threaded(stream, server_ssl) as server:
        command = [sys.executable, "-W", "always", str(tmp_path / "script.py"), server.url, str(ca_path), method]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (result.stdout, result.stderr, result.returncode) == ("done\n", "", 0)
        assert server.peers[0].requests[1].reset is None


def test_prefork(server_ssl: ssl.SSLContext, ca_path: Path) -> None:
    """As gunicorn does: made and used where the application is imported, used in the workers."""
    script = """
own = new()
assert own.get(url).text == "ok"
workers = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        for _ in range(3):
            assert own.get(url).text == "ok"
        assert threads() == ["h2keep"]
        sys.exit(0)
    workers.append(pid)
for pid in workers:
    wait(pid)
assert own.get(url).text == "ok"
own.close()
print("done")
"""
    with threaded(stream, server_ssl) as server:
        result = run_script(PRELUDE + script, server.url, ca_path)
        assert (result.stdout, result.returncode) == ("done\n", 0)
        # The workers never close what they have.
        assert result.stderr.count("ResourceWarning: an h2keep client or transport was never closed") == 4
        assert "Traceback" not in result.stderr
        assert len(server.peers) == 5
        assert len(server.peers[0].requests) == 2


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_server_sees_the_end_while_the_child_lives(kind: str, server_ssl: ssl.SSLContext, ca_path: Path) -> None:
    script = """
def fork():
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)

async def main():
    async with new(h2keep.AsyncClient) as own:
        await own.get(url)
        fork()

if sys.argv[3] == "async":
    asyncio.run(main())
else:
    with new() as own:
        own.get(url)
        fork()
print("closed", flush=True)
os._exit(0)
"""
    with threaded(stream, server_ssl) as server:
        process = start_script(PRELUDE + script, server.url, ca_path, kind)
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "closed\n"
        eventually(lambda: server.peers[0].ended, "the server sees the end")
        process.stdin.close()
        process.stdin = None
        process.communicate(timeout=60)


def test_forks_in_many_threads_at_once(server_ssl: ssl.SSLContext, ca_path: Path) -> None:
    script = """
own = new()
stop = threading.Event()
failures = []

def fork():
    for _ in range(15):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        wait(pid)

def request():
    while not stop.is_set():
        try:
            assert own.get(url).text == "ok"
        except BaseException as error:
            failures.append(error)
            raise

expect_threads()
forkers = [threading.Thread(target=fork) for _ in range(4)]
users = [threading.Thread(target=request) for _ in range(4)]
for thread in forkers + users:
    thread.start()
for thread in forkers:
    thread.join()
assert own.get(url).text == "ok"
stop.set()
for thread in users:
    thread.join()
assert not failures, failures
own.close()
print("done")
"""
    check(script, ca_path, peers=1, context=server_ssl)


def test_a_fork_while_a_hook_holds_up_the_thread(server_ssl: ssl.SSLContext, ca_path: Path) -> None:
    script = """
def hook(stats, event):
    if type(event).__name__ == "PingSent" and not held.is_set():
        held.set()
        time.sleep(2.5)

held = threading.Event()
own = new(event_hook=hook)
with own.stream("GET", url + "/stream") as response:
    held.wait()
    # It can't be paused.
    expect_threads()
    pid = os.fork()
    if pid == 0:
        assert own.get(url).text == "ok"
        own.close()
        os._exit(0)
    wait(pid)
    own.get(url + "/next")
    assert response.read() == b"first last"
own.close()
print("done")
"""
    check(script, ca_path, peers=2, context=server_ssl)


def test_run_in_thread_and_a_fork(server_ssl: ssl.SSLContext, ca_path: Path) -> None:
    script = """
async def parent():
    quiet()
    async with own.stream("GET", url + "/stream") as response:
        pid = os.fork()
        if pid == 0:
            with new() as other:
                other.get(url)
            os._exit(0)
        await asyncio.to_thread(wait, pid)
        await own.get(url + "/next")
        assert await response.aread() == b"first last"
    await own.aclose()

own = new(h2keep.AsyncClient, run_in_thread=True)
asyncio.run(parent())
print("done")
"""
    check(script, ca_path, peers=2, context=server_ssl)


@pytest.mark.parametrize("closed", [False, True])
def test_a_fork_waits_for_what_the_thread_does_after_its_end(
    closed: bool, server_ssl: ssl.SSLContext, ca_path: Path
) -> None:
    """OpenSSL takes a lock there, which a child would find locked for ever."""
    script = f"""
import ctypes
libc = ctypes.CDLL(None)
key = ctypes.c_uint()
# Called with the thread's own value of the key when the thread ends: this one makes it sleep.
libc.pthread_key_create(ctypes.byref(key), libc.usleep)
slow = []

def hook(stats, event):
    if not slow:
        libc.pthread_setspecific(key, ctypes.c_void_p(300_000))
        slow.append(threading.get_native_id())

def lives():
    return str(slow[0]) in os.listdir("/proc/self/task")

own = new(event_hook=hook)
assert own.get(url).text == "ok"
assert lives()
if {closed}:
    own.close()
pid = os.fork()
if pid == 0:
    assert own.get(url).text == "ok"
    own.close()
    os._exit(0)
assert not lives()
wait(pid)
assert own.get(url).text == "ok"
own.close()
print("done")
"""
    check(script, ca_path, context=server_ssl)
