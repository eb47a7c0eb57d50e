"""Our transports in turn, and no memory of other tests' origins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from h2keep import _fallback
from support.fronts import FRONTS, Front, without_repetitions
from support.http1 import server_context

if TYPE_CHECKING:
    import ssl
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fallback, "http1_origins", _fallback.Http1Origins())
    monkeypatch.setattr(_fallback, "_told", _fallback.Http1Origins())


@pytest.fixture(params=FRONTS, ids=str)
def front(request: pytest.FixtureRequest) -> Front:
    found: Front = request.param
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = without_repetitions(items)


@pytest.fixture
def http1_ssl(cert_path: Path, key_path: Path) -> ssl.SSLContext:
    """A server's context that speaks HTTP/1.1 only."""
    return server_context(cert_path, key_path, "http/1.1")
