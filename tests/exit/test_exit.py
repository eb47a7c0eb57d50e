"""How programs end: whatever they leave open, nothing hangs, nothing warns, and no traceback is printed but their own.

Each is a script in a process of its own, on asyncio and on trio, with -X dev and every warning an error.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, NamedTuple

import anyio
import pytest
from hyperframe import frame as frames

from support.raw import GONE, RawServer, task_group

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.raw import Peer, RawRequest

pytestmark = pytest.mark.anyio

#: What a client that nobody closed says for itself; that it says so, and when, is tested elsewhere.
LEFT_OPEN = "an h2keep client or transport was never closed"
#: A program that hasn't ended after so many seconds hangs.
PATIENCE = 60.0

PRELUDE = """
import asyncio, contextlib, sys
import anyio, h2keep
backend, url, ca = sys.argv[1:]
if backend == "trio":
    import trio

def run(main):
    async def patient():
        # Imports take long, and debug mode would tell.
        asyncio.get_running_loop().slow_callback_duration = 60
        await main()

    asyncio.run(patient()) if backend == "asyncio" else trio.run(main)

def new_client(**options):
    return h2keep.AsyncClient(verify=ca, timeout=None, **options)

def start(function, *args):
    # A task that nobody waits for.
    global task
    async def quietly():
        with contextlib.suppress(h2keep.H2KeepError):
            await function(*args)
    if backend == "asyncio":
        task = asyncio.create_task(quietly())
    else:
        trio.lowlevel.spawn_system_task(quietly)
"""


@pytest.fixture
def anyio_backend() -> str:
    """Of the test and its server; the scripts have their own."""
    return "asyncio"


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Program:
    """Runs scripts against a server that does what the path says."""

    def __init__(self, server: RawServer, backend: str, ca_path: Path) -> None:
        self.server = server
        self._arguments = [backend, server.url, str(ca_path)]
        self._asked = anyio.Event()

    async def __call__(
        self,
        script: str,
        *,
        interrupt: bool = False,
        may_be_left_open: bool = True,
    ) -> Result:
        """Run a script to its end; with `interrupt`, Ctrl-C comes as soon as the server is asked for /silent."""
        options = ["-X", "dev", "-W", "error"]
        if may_be_left_open:
            options += ["-W", f"ignore:{LEFT_OPEN}:ResourceWarning"]
        command = [sys.executable, *options, "-c", PRELUDE + script, *self._arguments]
        output: dict[str, bytes] = {"stdout": b"", "stderr": b""}

        async def read(name: str) -> None:
            async for chunk in getattr(process, name):
                output[name] += chunk

        with anyio.fail_after(PATIENCE):
            async with (
                await anyio.open_process(command, stdin=subprocess.DEVNULL) as process,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(read, "stdout")
                tasks.start_soon(read, "stderr")
                if interrupt:
                    await self._asked.wait()
                    process.send_signal(signal.SIGINT)
                code = await process.wait()
        return Result(code, output["stdout"].decode(), output["stderr"].decode())

    async def serve(self, peer: Peer) -> None:
        async with task_group() as tasks:
            while True:
                request = await peer.request()
                tasks.start_soon(self._answer, request)

    async def _answer(self, request: RawRequest) -> None:
        peer, stream_id = request.peer, request.stream_id
        with contextlib.suppress(*GONE):
            match request.path:
                case "/silent":
                    self._asked.set()
                case "/half":
                    await peer.respond(stream_id, body=b"line\nline\n", end_stream=False)
                case "/reset":
                    peer.abort()
                case "/close":
                    peer.close()
                case "/garbage":
                    await peer.send_ciphertext(b"\x17\x03\x03\x00\x20" + bytes(32))
                case "/then-reset":
                    await peer.respond(stream_id, body=b"ok")
                    # A reset discards what the client hasn't read yet: its acknowledgement comes after that.
                    await peer.ping()
                    peer.abort()
                case "/then-garbage":
                    await peer.respond(stream_id, body=b"ok")
                    await peer.send_ciphertext(b"\x17\x03\x03\x00\x20" + bytes(32))
                case "/goaway":
                    await peer.respond(stream_id, body=b"ok")
                    await peer.goaway(stream_id)
                case _:
                    await request.complete()
                    await peer.respond(stream_id, body=b"ok")


@pytest.fixture
async def program(backend: str, server_ssl: ssl.SSLContext, ca_path: Path) -> AsyncIterator[Program]:
    async with RawServer.listen(server_ssl) as server:
        program = Program(server, backend, ca_path)
        server.serve(program.serve)
        yield program


SILENT_SCRIPTS: dict[str, str] = {
    "a client that was never closed": """
        async def main():
            client = new_client()
            print((await client.get(url)).text)
        """,
    "a client in a global that was never closed": """
        client = new_client()
        async def main():
            print((await client.get(url)).text)
        """,
    "a client that was never used": """
        client = new_client()
        async def main():
            print("ok")
        """,
    "a response that was never read": """
        async def main():
            global client, context, response
            client = new_client()
            context = client.stream("GET", url + "/half")
            response = await context.__aenter__()
            print("ok")
        """,
    "a response that was read half": """
        async def main():
            global chunks, lines, context
            client = new_client()
            context = client.stream("GET", url + "/half")
            response = await context.__aenter__()
            lines = response.aiter_lines()
            assert await anext(lines) == "line"
            print("ok")
        """,
    "a response that was left in the middle": """
        async def main():
            client = new_client()
            async with client.stream("GET", url + "/half") as response:
                async for line in response.aiter_lines():
                    assert line == "line"
                    break
            print("ok")
        """,
    "a generator over a response that was left in the middle": """
        async def lines(client):
            async with client.stream("GET", url + "/half") as response:
                async for line in response.aiter_lines():
                    yield line
        async def main():
            global generator
            generator = lines(new_client())
            assert await anext(generator) == "line"
            print("ok")
        """,
    "a generator that has a client of its own": """
        async def lines():
            async with new_client() as client, client.stream("GET", url + "/half") as response:
                async for line in response.aiter_lines():
                    yield line
        async def main():
            global generator
            generator = lines()
            assert await anext(generator) == "line"
            print("ok")
        """,
    "a generator that makes a request at its end": """
        async def lines(client):
            try:
                yield (await client.get(url)).text
            finally:
                try:
                    await client.get(url)
                except h2keep.ConnectError as error:
                    print("refused")
        async def main():
            global generator
            generator = lines(new_client())
            print(await anext(generator))
        """,
    "a request in flight": """
        async def main():
            client = new_client()
            start(client.get, url + "/silent")
            await client.get(url)
            print("ok")
        """,
    "a hundred requests in flight": """
        async def main():
            global kept
            kept = []
            client = new_client()
            for _ in range(100):
                start(client.get, url + "/silent")
                kept.append(globals().get("task"))
            await client.get(url)
            print("ok")
        """,
    "a request that was given up": """
        async def main():
            client = new_client()
            await client.get(url)
            with anyio.move_on_after(0.05):
                await client.get(url + "/silent")
            print("ok")
        """,
    "an upload in flight": """
        async def body():
            try:
                yield b"first"
                await anyio.sleep_forever()
            finally:
                print("closed")
        async def main():
            client = new_client()
            async def post():
                await client.post(url, content=body())
            start(post)
            await client.get(url)
            await anyio.sleep(0.05)
            print("ok")
        """,
    "a dial in flight": """
        import socket
        async def main():
            client = new_client()
            listener = socket.create_server(("127.0.0.1", 0))
            start(client.get, f"https://127.0.0.1:{listener.getsockname()[1]}")
            await anyio.sleep(0.05)
            listener.close()
            print("ok")
        """,
    "a task that closes the client when it is cancelled": """
        async def use():
            client = new_client()
            try:
                await client.get(url + "/silent")
            finally:
                await client.aclose()
        async def main():
            start(use)
            async with new_client() as client:
                await client.get(url)
            print("ok")
        """,
    "a server that resets the connection under a request": """
        async def main():
            client = new_client()
            try:
                await client.get(url + "/reset")
            except h2keep.ConnectionLost:
                print("ok")
        """,
    "a server that closes the connection under a request": """
        async def main():
            client = new_client()
            try:
                await client.get(url + "/close")
            except h2keep.ConnectionLost:
                print("ok")
        """,
    "a server that breaks TLS under a request": """
        async def main():
            client = new_client()
            try:
                await client.get(url + "/garbage")
            except h2keep.ConnectionLost:
                print("ok")
        """,
    "a server that resets an unused connection": """
        async def main():
            client = new_client()
            print((await client.get(url + "/then-reset")).text)
            await anyio.sleep(0.1)
        """,
    "a server that breaks TLS on an unused connection": """
        async def main():
            client = new_client()
            print((await client.get(url + "/then-garbage")).text)
            await anyio.sleep(0.1)
        """,
    "a server that goes away": """
        async def main():
            client = new_client()
            print((await client.get(url + "/goaway")).text)
            await anyio.sleep(0.1)
        """,
    "an origin that can't be reached": """
        async def main():
            client = new_client()
            try:
                await client.get("https://127.0.0.1:1")
            except h2keep.ConnectError:
                print("ok")
        """,
    "a certificate that isn't trusted": """
        async def main():
            client = h2keep.AsyncClient()
            try:
                await client.get(url)
            except h2keep.ConnectError:
                print("ok")
        """,
    "a body that raises": """
        async def body():
            yield b"first"
            raise ZeroDivisionError
        async def main():
            client = new_client()
            try:
                await client.post(url, content=body())
            except ZeroDivisionError:
                print("ok")
        """,
    "a failing task beside a request": """
        async def fail():
            await anyio.sleep(0.05)
            raise ZeroDivisionError
        async def main():
            client = new_client()
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(client.get, url + "/silent")
                    tasks.start_soon(fail)
            except* ZeroDivisionError:
                print("ok")
        """,
}


def script(source: str) -> str:
    return textwrap.dedent(source) + "\nrun(main)\n"


#: Those in one batch run at the same time.
BATCHES = [list(SILENT_SCRIPTS)[start : start + 5] for start in range(0, len(SILENT_SCRIPTS), 5)]


@pytest.mark.parametrize("names", BATCHES, ids=[f"{names[0]}, and the next" for names in BATCHES])
async def test_a_program_ends_in_silence_in_spite_of(program: Program, names: list[str]) -> None:
    results: dict[str, Result] = {}

    async def run(name: str) -> None:
        results[name] = await program(script(SILENT_SCRIPTS[name]))

    async with anyio.create_task_group() as tasks:
        for name in names:
            tasks.start_soon(run, name)
    for name, result in results.items():
        assert (result.code, result.stderr) == (0, ""), name
        assert "ok" in result.stdout.split(), name


@pytest.mark.parametrize("name", ["with", "aclose"])
async def test_a_program_that_closes_its_client_ends_without_any_warning(program: Program, name: str) -> None:
    sources = {
        "with": """
            async def main():
                async with new_client() as client:
                    print((await client.get(url)).text)
            """,
        "aclose": """
            async def main():
                client = new_client()
                print((await client.get(url)).text)
                await client.aclose()
            """,
    }
    assert await program(script(sources[name]), may_be_left_open=False) == (0, "ok\n", "")
    peer = await program.server.peer(0)
    with pytest.raises(anyio.EndOfStream):
        await peer.until(lambda: False)
    assert [goaway.error_code for goaway in peer.seen(frames.GoAwayFrame)] == [0]


async def test_two_event_loops_one_after_the_other_with_a_client_each(program: Program) -> None:
    source = """
        async def main():
            client = new_client()
            print((await client.get(url)).text)
            start(client.get, url + "/silent")
            await anyio.sleep(0.01)

        run(main)
        """
    assert await program(script(source)) == (0, "ok\nok\n", "")
    assert len(program.server.peers) == 2


async def test_two_event_loops_one_after_the_other_with_one_client(program: Program) -> None:
    source = """
        client = new_client()

        async def main():
            print((await client.get(url)).text)
            start(client.get, url + "/silent")
            await anyio.sleep(0.01)

        run(main)
        """
    assert await program(script(source)) == (0, "ok\nok\n", "")
    assert len(program.server.peers) == 2


@pytest.mark.parametrize("end", ["loop.close()", "pass"])
async def test_an_asyncio_loop_that_cancels_nothing(program: Program, end: str) -> None:
    # A loop of one's own, with or without a decent end. On trio there is no such thing.
    source = f"""
        async def main():
            client = new_client()
            print((await client.get(url)).text)

        def run(main, run=run):
            if backend == "trio":
                return run(main)
            loop = asyncio.new_event_loop()
            loop.slow_callback_duration = 60
            loop.run_until_complete(main())
            {end}
        """
    assert await program(script(source)) == (0, "ok\n", "")


# Ends with words


@pytest.mark.parametrize("how", ["never closed", "closed"])
async def test_a_program_that_raises_prints_its_own_traceback_alone(program: Program, how: str) -> None:
    sources = {
        "never closed": """
            async def main():
                client = new_client()
                start(client.get, url + "/silent")
                print((await client.get(url)).text)
                1 / 0
            """,
        "closed": """
            async def main():
                async with new_client() as client, client.stream("GET", url + "/half") as response:
                    async for line in response.aiter_lines():
                        print("ok")
                        1 / 0
            """,
    }
    code, stdout, stderr = await program(script(sources[how]))
    assert (code, stdout) == (1, "ok\n")
    assert stderr.count("Traceback (most recent call last)") == 1
    assert stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "Task was destroyed" not in stderr


async def test_a_program_that_exits_in_the_middle_says_nothing(program: Program) -> None:
    source = """
        async def main():
            client = new_client()
            start(client.get, url + "/silent")
            print((await client.get(url)).text)
            sys.exit(3)
        """
    assert await program(script(source)) == (3, "ok\n", "")


async def test_ctrl_c_while_waiting_ends_at_once(program: Program) -> None:
    source = """
        async def main():
            await new_client().get(url + "/silent")
        """
    code, stdout, stderr = await program(script(source), interrupt=True)
    assert (code, stdout) == (-signal.SIGINT, "")
    own_words(stderr)


async def test_ctrl_c_under_a_context_closes_the_client_and_ends(program: Program) -> None:
    source = """
        async def main():
            async with new_client() as client, client.stream("GET", url + "/half") as response:
                try:
                    async for line in response.aiter_lines():
                        start(client.get, url + "/silent")
                finally:
                    print("finally")
        """
    code, stdout, stderr = await program(script(source), interrupt=True, may_be_left_open=False)
    assert (code, stdout) == (-signal.SIGINT, "finally\n")
    own_words(stderr)
    peer = await program.server.peer(0)
    with pytest.raises(anyio.EndOfStream):
        await peer.until(lambda: False)


async def test_ctrl_c_with_many_tasks_waiting_ends_them_all(program: Program) -> None:
    source = """
        async def main():
            client = new_client()
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(client.get, url + "/silent")

        def run(main, run=run):
            try:
                run(main)
            except* KeyboardInterrupt:
                print("interrupted")
        """
    assert await program(script(source), interrupt=True) == (0, "interrupted\n", "")


def own_words(stderr: str) -> None:
    """Python's own account of a KeyboardInterrupt, and no word about tasks, loops or sockets."""
    assert stderr.endswith("KeyboardInterrupt\n")
    for noise in ("Task was destroyed", "never retrieved", "never awaited", "Exception ignored", "TrioInternalError"):
        assert noise not in stderr
    assert "ResourceWarning" not in stderr


async def test_a_hook_that_raises_is_logged_and_ends_nothing(program: Program) -> None:
    source = """
        def hook(stats, event):
            raise ZeroDivisionError("mine")

        async def main():
            async with new_client(event_hook=hook) as client:
                print((await client.get(url)).text)
                print((await client.get(url)).text)
        """
    code, stdout, stderr = await program(script(source), may_be_left_open=False)
    assert (code, stdout) == (0, "ok\nok\n")
    assert stderr.count("Traceback (most recent call last)") == stderr.count("the event hook failed on")
    assert stderr.count("ZeroDivisionError: mine") == stderr.count("the event hook failed on") >= 2
