"""What every test can ask for: event loops with real or virtual time, certificates, and the servers of `support`."""

from __future__ import annotations

import functools
import os
import ssl
from typing import TYPE_CHECKING, Any

import anyio
import hypothesis
import pytest
import trustme

import h2keep.runner.connection
from h2keep.runner.clock import GapWatch
from support.clock import REAL_BACKENDS, Backend
from support.engines import ENGINES, stand_in_for_the_default

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["support.coverage_gate", "support.leaks", "support.servers"]

# The same examples for everybody, however slow the machine is today.
hypothesis.settings.register_profile(
    "h2keep", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("h2keep")


def pytest_configure() -> None:
    """Servers on loopback are reached directly; the default engine is that of H2KEEP_TEST_ENGINE, if that is set."""
    for name in list(os.environ):
        if name.upper() in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
            del os.environ[name]
    engine = os.environ.get("H2KEEP_TEST_ENGINE")
    if engine is not None:
        stand_in_for_the_default(engine, pytest.MonkeyPatch())


@pytest.fixture(params=REAL_BACKENDS)
def anyio_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """The event loop: asyncio and trio in turn, in real time unless `virtual_time` marks the test."""
    backend: Backend = request.param
    if backend.virtual:
        # Beside a virtual clock that stands still, a busy machine's real ones look like a night's sleep (K25).
        still = functools.partial(GapWatch, suspended=anyio.current_time, wall=anyio.current_time)
        monkeypatch.setattr(h2keep.runner.connection, "GapWatch", still)
    return backend.fresh()


@pytest.fixture(params=ENGINES)
def every_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs on each engine in turn."""
    stand_in_for_the_default(request.param, monkeypatch)


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    """The certificate authority that signed `server_ssl`'s certificate."""
    return trustme.CA()


@pytest.fixture(scope="session")
def _server_cert(ca: trustme.CA) -> trustme.LeafCert:
    return ca.issue_cert("127.0.0.1", "localhost")


@pytest.fixture(scope="session")
def ca_path(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authority's certificate as a PEM file."""
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return path


@pytest.fixture(scope="session")
def cert_path(_server_cert: trustme.LeafCert, ca_path: Path) -> Path:
    """The server's certificate as a PEM file, for servers that want files."""
    path = ca_path.with_name("cert.pem")
    for number, blob in enumerate(_server_cert.cert_chain_pems):
        blob.write_to_path(path, append=number > 0)
    return path


@pytest.fixture(scope="session")
def key_path(_server_cert: trustme.LeafCert, ca_path: Path) -> Path:
    """The private key of `cert_path` as a PEM file."""
    path = ca_path.with_name("key.pem")
    _server_cert.private_key_pem.write_to_path(path)
    return path


@pytest.fixture(scope="session")
def server_ssl(_server_cert: trustme.LeafCert) -> ssl.SSLContext:
    """A server's context for 127.0.0.1 and localhost that speaks h2 only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _server_cert.configure_cert(context)
    context.set_alpn_protocols(["h2"])
    return context


@pytest.fixture
def client_ssl(ca: trustme.CA) -> ssl.SSLContext:
    """A client's context that trusts `ca`; a new one each time, because clients set ALPN on what they are given.

    It doesn't trust the system's authorities, which take long to load.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.configure_trust(context)
    return context
