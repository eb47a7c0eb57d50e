"""A real gunicorn that loads the application before it forks: clients made and used there serve in every worker."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.background import eventually
from support.ports import free_ports
from support.raw import answering
from support.threaded import threaded

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

APPLICATION = """
import os, ssl
import httpx2
import h2keep, h2keep.httpx2

url = {url!r}
verify = ssl.create_default_context(cafile={ca!r})
keepalive = h2keep.Keepalive(0.2, 10.0)
direct = h2keep.Client(verify=verify, keepalive=keepalive, timeout=20.0)
transport = h2keep.httpx2.KeepaliveTransport(verify=verify, keepalive=keepalive)
over_httpx2 = httpx2.Client(transport=transport, timeout=20.0)
# In the master, before it forks.
assert direct.get(url).text == over_httpx2.get(url).text == "ok"

def application(environ, start_response):
    text = direct.get(url).text + over_httpx2.get(url).text
    start_response("200 OK", [("Content-Type", "text/plain"), ("Connection", "close")])
    return [f"{{os.getpid()}} {{text}}".encode()]
"""


@contextlib.contextmanager
def gunicorn(application: str, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str], Path]]:
    """Its URL, its master, and its log."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="h2keep-") as directory:
        Path(directory, "served.py").write_text(application)
        log = Path(directory, "log")
        command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--chdir", directory, "--preload"]
        with log.open("w") as output:
            master = subprocess.Popen([*command, *arguments, "served"], stdout=output, stderr=output, text=True)
        try:
            yield f"http://127.0.0.1:{port}/", master, log
        finally:
            master.kill()
            master.wait()


def ask(url: str) -> tuple[int, str] | None:
    """A worker's process id, and what it got; None while nobody listens."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=20) as response:
            pid, text = response.read().decode().split()
    except ConnectionError:
        return None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionError):
            return None
        raise
    return int(pid), text


@pytest.mark.parametrize("worker", ["sync", "gthread"])
def test_workers_have_connections_of_their_own_and_the_masters_go_on(
    worker: str, server_ssl: ssl.SSLContext, ca_path: Path
) -> None:
    with threaded(answering(), server_ssl) as server:
        application = APPLICATION.format(url=server.url, ca=str(ca_path))
        with gunicorn(application, "--workers", "2", "--worker-class", worker) as (url, master, log):
            answers: list[tuple[int, str]] = []

            def both_answered() -> bool:
                assert master.poll() is None, log.read_text()
                answer = ask(url)
                answers.extend([answer] if answer else [])
                return len({pid for pid, _ in answers}) == 2

            eventually(both_answered, "both workers have answered", 60.0)
            for _ in range(10):
                answer = ask(url)
                assert answer is not None
                answers.append(answer)
            assert {text for _, text in answers} == {"okok"}
            assert len({pid for pid, _ in answers}) == 2
            # Two of the master's, two of each worker's; and each has seen no requests but its own process's.
            assert len(server.peers) == 6
            assert [len(peer.requests) for peer in server.peers[:2]] == [1, 1]
            assert not any(peer.ended for peer in server.peers)
            master.terminate()
            assert master.wait(30.0) == 0
            told = log.read_text()
            assert "Traceback" not in told
            assert "rror" not in told.replace("ResourceWarning", "")
        eventually(lambda: all(peer.ended for peer in server.peers), "all have gone")
