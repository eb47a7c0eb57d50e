"""What tests of threads and processes share: waiting for conditions, a look for leaks, scripts in fresh interpreters.

@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left(): yield

result = run_script(SCRIPT, url)        # asserts nothing; result.stdout, result.stderr, result.returncode
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from support.leaks import open_sockets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["background_threads", "eventually", "nothing_left", "run_script", "start_script"]

#: The longest that a condition is waited for, in seconds: far more than any of them takes.
_PATIENCE = 60.0
_ROOT = Path(__file__).parent.parent.parent


def background_threads() -> list[threading.Thread]:
    """h2keep's threads in this process."""
    return [thread for thread in threading.enumerate() if thread.name == "h2keep"]


def eventually(condition: Callable[[], object], what: str = "", seconds: float = _PATIENCE) -> None:
    """Wait until the condition holds; fail if it doesn't in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"never happened: {what or condition}")
        time.sleep(0.005)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Fail if, at the end, there are more threads or sockets than at the beginning, or one of h2keep's at all."""
    sockets, threads = set(open_sockets().values()), set(threading.enumerate())

    def others() -> set[threading.Thread]:
        # trio keeps its own for a while.
        return {thread for thread in threading.enumerate() if not thread.name.startswith("Trio")}

    yield
    gc.collect()
    eventually(lambda: others() <= threads and not background_threads(), "all threads are gone")
    eventually(lambda: set(open_sockets().values()) <= sockets, "all sockets are closed")


def start_script(source: str, *args: object, dev: bool = True) -> subprocess.Popen[str]:
    """A fresh interpreter that runs the source; with `dev`, every check and warning is on."""
    options = ["-X", "dev", "-W", "always"] if dev else []
    command = [sys.executable, *options, "-c", source, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT / "tests"), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def run_script(source: str, *args: object, dev: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run it to its end; see `start_script`."""
    process = start_script(source, *args, dev=dev)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException:
        # Its children too: they hold the other ends of the pipes.
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        print(stdout, stderr, sep="\n", file=sys.stderr)  # noqa: T201
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
