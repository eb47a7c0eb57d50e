"""Stock clients of both libraries, for threads and for event loops."""

from __future__ import annotations

import importlib
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest

import h2keep
from h2keep import _fallback
from support.clock import Backend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path
    from types import ModuleType

_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing stays installed, and no test learns from another."""
    monkeypatch.setattr(_fallback, "http1_origins", _fallback.Http1Origins())
    for name in _PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    yield
    h2keep.uninstall()


@dataclass(frozen=True)
class Front:
    """A library's clients of one kind; whatever kind it is, they are awaited here."""

    name: str
    threaded: bool

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.name)

    @property
    def core(self) -> ModuleType:
        return importlib.import_module({"httpx": "httpcore", "httpx2": "httpcore2"}[self.name])

    @property
    def transport(self) -> Any:
        """The stock transport's class."""
        return self.module.HTTPTransport if self.threaded else self.module.AsyncHTTPTransport

    @property
    def method(self) -> str:
        """The transport's method that handles requests."""
        return "handle_request" if self.threaded else "handle_async_request"

    def make(self, **options: Any) -> Client:
        """A client that must be closed."""
        kind = self.module.Client if self.threaded else self.module.AsyncClient
        return Client(kind(**{"timeout": 10.0, "trust_env": False, **options}), threaded=self.threaded)

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[Client]:
        client = self.make(**options)
        try:
            yield client
        finally:
            await client.close()

    def body(self, *chunks: bytes) -> Any:
        """A body that can be had but once."""

        async def ones_own_loop() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        return (chunk for chunk in chunks) if self.threaded else ones_own_loop()


@dataclass(frozen=True)
class Client:
    """A client of either kind."""

    real: Any
    threaded: bool

    async def request(self, method: str, url: str, **options: Any) -> Any:
        if self.threaded:
            return await anyio.to_thread.run_sync(partial(self.real.request, method, url, **options))
        return await self.real.request(method, url, **options)

    async def get(self, url: str, **options: Any) -> Any:
        return await self.request("GET", url, **options)

    async def close(self) -> None:
        if self.threaded:
            await anyio.to_thread.run_sync(self.real.close)
        else:
            await self.real.aclose()


@pytest.fixture(
    params=[Front(name, threaded) for name in ("httpx", "httpx2") for threaded in (False, True)],
    ids=["httpx", "httpx-threads", "httpx2", "httpx2-threads"],
)
def front(request: pytest.FixtureRequest) -> Front:
    found: Front = request.param
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Clients for threads don't see the test's event loop, so once is enough for them."""
    items[:] = [item for item in items if not _is_repetition(item)]


def _is_repetition(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    front = parameters.get("front")
    return isinstance(front, Front) and front.threaded and parameters["anyio_backend"] != Backend("asyncio")


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch, ca_path: Path) -> None:
    """Clients that are told nothing trust the tests' authority."""
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_path))
