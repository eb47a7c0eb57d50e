"""Their transport beside ours: every test here has to end alike with both, of both libraries, for threads and loops."""

from __future__ import annotations

import pytest

from h2keep import _fallback
from support.fronts import BOTH, Front, without_repetitions


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fallback, "http1_origins", _fallback.Http1Origins())
    monkeypatch.setattr(_fallback, "_told", _fallback.Http1Origins())


@pytest.fixture(params=BOTH, ids=str)
def front(request: pytest.FixtureRequest) -> Front:
    found: Front = request.param
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = without_repetitions(items)
