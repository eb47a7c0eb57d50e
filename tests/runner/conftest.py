"""Fixtures of the runner's tests: certificates, clients, and a look for what was left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
import trustme
from support.virtual import REAL, backend


@pytest.fixture(params=REAL)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Real time, unless a module has its own `anyio_backend`."""
    return backend(request.param)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost", "example.com").configure_cert(context)
    context.set_alpn_protocols(["h2"])
    return context


@pytest.fixture
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def _sockets() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test: no socket more than before, and no task of ours that is still pending."""
    before = _sockets()
    yield
    gc.collect()
    left = _sockets() - before
    # The asyncio backend keeps its loop, with its wake-up pair, until the fixture's teardown.
    assert len(left) <= 2, f"sockets left open: {left}"
    for obj in gc.get_objects():
        if isinstance(obj, asyncio.Task) and not obj.done():
            assert "h2keep" not in repr(obj.get_coro()), f"a task was left: {obj!r}"
