"""The Go server: built, certified, started on cores of its own, stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import trustme

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
SOURCE = HERE / "goserver"
BINARY = HERE / ".build" / "goserver"
GO_ENVIRONMENT = {"GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOTOOLCHAIN": "local"}


@dataclass(frozen=True)
class Server:
    """A running server: what a worker has to be told of it."""

    url: str
    stats: str
    ca: Path


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


@contextmanager
def prepare() -> Iterator[Kit]:
    """Build the server; Go's own cache makes that quick when nothing has changed."""
    go = Path(sys.executable).with_name("go")
    command = [str(go) if go.exists() else "go", "build", "-o", str(BINARY), "."]
    subprocess.run(command, cwd=SOURCE, env={**os.environ, **GO_ENVIRONMENT}, check=True)
    with TemporaryDirectory(prefix="h2keep-benchmarks-") as directory:
        kit = Kit(Path(directory, "server.pem"), Path(directory, "ca.pem"))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(kit.ca)
        authority.issue_cert("127.0.0.1", "localhost").private_key_and_cert_chain_pem.write_to_path(kit.cert)
        yield kit


@contextmanager
def serve(kit: Kit, placement: Placement) -> Iterator[Server]:
    """Run a server of one's own, which has seen no other client."""
    command = [str(BINARY), "-cert", str(kit.cert)]
    with _on_cores(placement.server):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:  # which closes its standard input, upon which it ends
        assert process.stdout is not None
        addresses = json.loads(process.stdout.readline())
        yield Server(f"https://{addresses['https']}", addresses["stats"], kit.ca)


@contextmanager
def _on_cores(cores: frozenset[int] | None) -> Iterator[None]:
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
