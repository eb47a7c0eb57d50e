"""Real HTTP/2 servers from wheels, in processes of their own, over TLS with the tests' certificates.

    async def test_x(granian: Server, client_ssl): ...      # also: caddy, hypercorn
    async def test_y(real_server: Server, client_ssl): ...  # runs once with each of them

Each serves `support.app`; `nvcf` serves the demo's gateway. They are started once and shared, so a test leaves them
as they were. `server_factory` starts one that the test has to itself, and may stop.

    with forgetful(granian.url, forget_after=1.0) as relay:    # relay.url leads through a middlebox

needs no event loop of the caller's, and no fixture.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from cryptography.hazmat.primitives import serialization

from h2keep.cli.middlebox import Event, Middlebox
from support.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Relay", "Server", "ServerFactory", "forgetful"]

_HOST = "127.0.0.1"
_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_ATTEMPTS = 3
_TESTS = Path(__file__).parent.parent
_BIN = Path(sys.executable).parent


@dataclass
class Server:
    """A server that accepts connections."""

    name: str
    #: Over TLS with ALPN h2, its certificate signed by `ca`; and HTTP/2 in cleartext with prior knowledge.
    url: str
    h2c_url: str
    processes: list[subprocess.Popen[bytes]] = field(repr=False)

    def begin_shutdown(self) -> None:
        """Ask it to end in good order; it may wait for its connections first."""
        for process in self.processes:
            process.terminate()

    def freeze(self) -> None:
        """Stop it in its tracks: its sockets stay open, but nobody is there any more."""
        for process in self.processes:
            process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End it at once; the kernel closes its sockets."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """Wait until it has ended."""
        for process in self.processes:
            process.wait(_START_SECONDS)


class ServerFactory(Protocol):
    """Starts a server: "caddy", "granian" or "hypercorn"."""

    def __call__(self, name: str, application: str = "support.app:app") -> Server: ...


@pytest.fixture(scope="session")
def pkcs8_key_path(key_path: Path) -> Path:
    """The server's private key in the one format that granian reads."""
    key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
    path = key_path.with_name("key.pkcs8.pem")
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.fixture(scope="session")
def _files(cert_path: Path, pkcs8_key_path: Path) -> tuple[Path, Path]:
    return cert_path, pkcs8_key_path


@pytest.fixture(scope="session")
def hypercorn(_files: tuple[Path, Path]) -> Iterator[Server]:
    """hypercorn: h2, asyncio."""
    with _running("hypercorn", "support.app:app", _files) as server:
        yield server


@pytest.fixture(scope="session")
def granian(_files: tuple[Path, Path]) -> Iterator[Server]:
    """granian: Rust's hyper and h2."""
    with _running("granian", "support.app:app", _files) as server:
        yield server


@pytest.fixture(scope="session")
def caddy(_files: tuple[Path, Path]) -> Iterator[Server]:
    """Caddy: Go's net/http2, a reverse proxy before a granian of its own."""
    with _running("caddy", "support.app:app", _files) as server:
        yield server


@pytest.fixture(scope="session")
def nvcf(_files: tuple[Path, Path]) -> Iterator[Server]:
    """The demo's gateway, which behaves like the invocation service of NVIDIA Cloud Functions."""
    with _running("hypercorn", "h2keep.cli.gateway:app", _files) as server:
        yield server


@pytest.fixture(params=["caddy", "granian", "hypercorn"])
def real_server(request: pytest.FixtureRequest) -> Server:
    """Each of the servers in turn."""
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def server_factory(_files: tuple[Path, Path]) -> Iterator[ServerFactory]:
    """Starts servers that the test has to itself; they end with it."""
    with contextlib.ExitStack() as stack:
        yield lambda name, application="support.app:app": stack.enter_context(_running(name, application, _files))


class _StartError(Exception):
    """A server did not start."""


@contextlib.contextmanager
def _running(name: str, application: str, files: tuple[Path, Path]) -> Iterator[Server]:
    with contextlib.ExitStack() as stack:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                server = _launch(name, application, files, stack)
            except _StartError:
                # Somebody else may have taken one of the ports in between.
                if attempt == _ATTEMPTS:
                    raise
            else:
                break
        yield server


def _launch(name: str, application: str, files: tuple[Path, Path], stack: contextlib.ExitStack) -> Server:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h2keep-")))
    tls, cleartext = free_ports(2)
    match name:
        case "hypercorn":
            launches = [(_hypercorn(application, files, tls, cleartext), [tls, cleartext])]
        case "granian":
            launches = [
                (_granian(application, tls, files), [tls]),
                (_granian(application, cleartext), [cleartext]),
            ]
        case "caddy":
            upstream = stack.enter_context(_running("granian", application, files))
            config = directory / "Caddyfile"
            address = upstream.h2c_url.replace("http", "h2c")
            config.write_text(_CADDYFILE.format(tls=tls, cleartext=cleartext, cert=files[0], key=files[1], to=address))
            launches = [([str(_BIN / "caddy"), "run", "--config", str(config)], [tls, cleartext])]
        case _:
            raise ValueError(f"name: {name!r} is not one of: 'caddy', 'granian', 'hypercorn'")
    processes = [
        stack.enter_context(_process(name, command, ports, directory / f"log{number}"))
        for number, (command, ports) in enumerate(launches)
    ]
    return Server(name, f"https://{_HOST}:{tls}", f"http://{_HOST}:{cleartext}", processes)


def _hypercorn(application: str, files: tuple[Path, Path], tls: int, cleartext: int) -> list[str]:
    return [
        *(str(_BIN / "hypercorn"), "--workers", "0", "--log-level", "WARNING", "--graceful-timeout", "5"),
        *("--keep-alive", "60", "--certfile", str(files[0]), "--keyfile", str(files[1])),
        *("--bind", f"{_HOST}:{tls}", "--insecure-bind", f"{_HOST}:{cleartext}", application),
    ]


def _granian(application: str, port: int, files: tuple[Path, Path] | None = None) -> list[str]:
    certificate = [] if files is None else ["--ssl-certificate", str(files[0]), "--ssl-keyfile", str(files[1])]
    return [
        *(str(_BIN / "granian"), "--interface", "asgi", "--http", "2", "--loop", "asyncio", "--no-ws"),
        *("--log-level", "warning", "--host", _HOST, "--port", str(port), *certificate, application),
    ]


_CADDYFILE = """
{{
    admin off
    auto_https off
    persist_config off
    grace_period 5s
    log {{
        level WARN
    }}
    servers :{tls} {{
        protocols h1 h2
    }}
    servers :{cleartext} {{
        protocols h1 h2c
    }}
}}
https://:{tls} {{
    tls {cert} {key}
    reverse_proxy {to} {{
        flush_interval -1
    }}
}}
http://:{cleartext} {{
    reverse_proxy {to} {{
        flush_interval -1
    }}
}}
"""


@contextlib.contextmanager
def _process(name: str, command: list[str], ports: list[int], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command until the context ends, and wait until it accepts connections."""
    home = str(log.parent)
    environment = {
        **os.environ,
        "PYTHONPATH": str(_TESTS),
        "XDG_DATA_HOME": home,
        "XDG_CONFIG_HOME": home,
        "HOME": home,
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_TESTS / "support" / "leash.py"), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=home,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        for port in ports:
            while not _accepts(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise _StartError(f"{name} did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.05)
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(_STOP_SECONDS)


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((_HOST, port), timeout=1.0):
        return True
    return False


@dataclass
class Relay:
    """A middlebox that accepts connections."""

    #: The server's, but for the port.
    url: str
    #: Everything that happened, as it happens.
    events: list[Event]
    #: Lets the server disappear.
    vanish: Callable[[], None] = field(repr=False)

    def seen(self, kind: type[Event]) -> list[Event]:
        """The events of one kind so far."""
        return [event for event in self.events if isinstance(event, kind)]


@contextlib.contextmanager
def forgetful(url: str, forget_after: float) -> Iterator[Relay]:
    """A middlebox before a server that forgets flows silent for `forget_after` seconds; it has a thread of its own."""
    target = urllib.parse.urlsplit(url)
    assert target.hostname is not None
    assert target.port is not None
    address = (target.hostname, target.port)
    events: list[Event] = []
    ready: concurrent.futures.Future[tuple[Middlebox, asyncio.AbstractEventLoop, asyncio.Event]]
    ready = concurrent.futures.Future()

    async def serve() -> None:
        stop = asyncio.Event()
        async with Middlebox(address, forget_after, events.append) as box:
            ready.set_result((box, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="middlebox")
    thread.start()
    box, loop, stop = ready.result(_START_SECONDS)

    def vanish() -> None:
        loop.call_soon_threadsafe(box.vanish)

    try:
        yield Relay(f"{target.scheme}://{_HOST}:{box.port}", events, vanish)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
