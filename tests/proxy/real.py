"""Real proxies in processes of their own: proxy.py always; tinyproxy and squid where they are installed.

All of them want the user name "user" and the password "word".
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from support.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["INSTALLED", "RealProxy", "running"]

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_ATTEMPTS = 3
_LEASH = Path(__file__).parent.parent / "support" / "leash.py"
#: Debian has it where only root looks.
_SQUID = shutil.which("squid", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
_NCSA = Path("/usr/lib/squid/basic_ncsa_auth")

INSTALLED = [
    "proxy.py",
    "proxy.py-tls",
    *(["tinyproxy"] if shutil.which("tinyproxy") else []),
    *(["squid"] if _SQUID and _NCSA.exists() else []),
]

_TINYPROXY = """
Port {port}
Listen 127.0.0.1
Timeout 600
Allow 127.0.0.1
BasicAuth user word
LogLevel Error
MaxClients 100
"""
_SQUID_CONF = """
http_port 127.0.0.1:{port}
auth_param basic program {helper} {directory}/passwords
auth_param basic children 1 startup=1
acl known proxy_auth REQUIRED
http_access allow known
http_access deny all
cache deny all
access_log none
cache_log {directory}/cache.log
pid_filename none
coredump_dir {directory}
shutdown_lifetime 0 seconds
max_filedescriptors 1024
visible_hostname localhost
"""
_PASSWORDS = "user:$apr1$h2keep00$.MxgNYIuCtk4EkLS4Sx6/1\n"


@dataclass
class RealProxy:
    """A proxy that accepts connections."""

    name: str
    scheme: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """With user name and password."""
        return f"{self.scheme}://user:word@127.0.0.1:{self.port}"

    @property
    def bare_url(self) -> str:
        """Without."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def freeze(self) -> None:
        """Stop it in its tracks: its sockets stay open, but nobody is there any more."""
        self.process.send_signal(signal.SIGUSR1)


class _StartError(Exception):
    """It did not start."""


@contextlib.contextmanager
def running(name: str, cert_path: Path, key_path: Path) -> Iterator[RealProxy]:
    """One of `INSTALLED`, until the context ends."""
    with contextlib.ExitStack() as stack:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                proxy = stack.enter_context(_start(name, cert_path, key_path))
            except _StartError:
                # Somebody else may have taken the port in between.
                if attempt == _ATTEMPTS:
                    raise
            else:
                break
        yield proxy


@contextlib.contextmanager
def _start(name: str, cert_path: Path, key_path: Path) -> Iterator[RealProxy]:
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="h2keep-") as directory:
        # squid gives up being root, and reads its files afterwards.
        os.chmod(directory, 0o777)
        command = _command(name, Path(directory), port, cert_path, key_path)
        log = Path(directory) / "log"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HOME": directory}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_LEASH), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=directory,
            )
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _accepts(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise _StartError(f"{name} did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.05)
            yield RealProxy(name, "https" if name.endswith("-tls") else "http", port, process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(_STOP_SECONDS)


def _command(name: str, directory: Path, port: int, cert_path: Path, key_path: Path) -> list[str]:
    if name.startswith("proxy.py"):
        tls = ["--cert-file", str(cert_path), "--key-file", str(key_path)] if name.endswith("-tls") else []
        return [
            *(str(Path(sys.executable).parent / "proxy"), "--hostname", "127.0.0.1", "--port", str(port)),
            *("--num-acceptors", "1", "--num-workers", "1", "--log-level", "WARNING", "--timeout", "600"),
            *("--data-dir", str(directory), "--basic-auth", "user:word", *tls),
        ]
    config = directory / "config"
    if name == "tinyproxy":
        config.write_text(_TINYPROXY.format(port=port))
        return ["tinyproxy", "-d", "-c", str(config)]
    assert name == "squid"
    assert _SQUID is not None
    (directory / "passwords").write_text(_PASSWORDS)
    config.write_text(_SQUID_CONF.format(port=port, helper=_NCSA, directory=directory))
    return [_SQUID, "-N", "-f", str(config)]


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False
