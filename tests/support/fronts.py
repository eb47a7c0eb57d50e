"""Transports of both libraries, ours and their own, for threads and for event loops; whatever it is, it is awaited.

    async with front.client(verify=context) as client:
        response = await client.get(url)

`FRONTS` are ours, `BOTH` theirs beside ours. Clients for threads run in threads, and need no event loop of their own.
"""

from __future__ import annotations

import importlib
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest

from support.clock import Backend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from types import ModuleType

__all__ = ["BOTH", "FRONTS", "Client", "Front", "without_repetitions"]


@dataclass(frozen=True)
class Front:
    """A transport class."""

    name: str
    threaded: bool
    ours: bool = True

    def __str__(self) -> str:
        return "-".join([self.name, *["threads"] * self.threaded, *["theirs"] * (not self.ours)])

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.name)

    @property
    def kind(self) -> Any:
        """The transport's class."""
        if self.ours:
            door = importlib.import_module(f"h2keep.{self.name}")
            return door.KeepaliveTransport if self.threaded else door.AsyncKeepaliveTransport
        return self.module.HTTPTransport if self.threaded else self.module.AsyncHTTPTransport

    def make(self, *, client: dict[str, Any] | None = None, **options: Any) -> Client:
        """A client on such a transport; `options` are the transport's, `client` the client's. It must be closed."""
        kind = self.module.Client if self.threaded else self.module.AsyncClient
        transport = self.kind(**{} if self.ours else {"http2": True}, **options)
        return Client(kind(transport=transport, **{"timeout": 10.0, "trust_env": False, **(client or {})}), self)

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[Client]:
        """As `make`; closed at the end."""
        made = self.make(**options)
        try:
            yield made
        finally:
            await made.close()

    def chunks(self, chunks: Iterable[bytes], began: Callable[[], object] = bool) -> Any:
        """A body that can be had but once; `began` is told of its beginning."""

        def for_threads() -> Any:
            began()
            yield from chunks

        async def for_loops() -> AsyncIterator[bytes]:
            began()
            for chunk in chunks:
                yield chunk

        return for_threads() if self.threaded else for_loops()

    def hook(self, seen: Callable[..., object]) -> Any:
        """A function as trace and event hooks want it."""

        async def for_loops(*args: Any) -> None:
            seen(*args)

        return seen if self.threaded else for_loops


@dataclass(frozen=True)
class Client:
    """A client of either kind."""

    real: Any
    front: Front

    async def do(self, for_threads: Callable[[Any], Any], for_loops: Callable[[Any], Any]) -> Any:
        """Whatever else there is to be done with the client, said once for each kind."""
        return await (self._run(for_threads, self.real) if self.front.threaded else for_loops(self.real))

    async def request(self, method: str, url: str, **options: Any) -> Any:
        if self.front.threaded:
            return await self._run(partial(self.real.request, method, url, **options))
        return await self.real.request(method, url, **options)

    async def get(self, url: str, **options: Any) -> Any:
        return await self.request("GET", url, **options)

    async def post(self, url: str, **options: Any) -> Any:
        return await self.request("POST", url, **options)

    async def close(self) -> None:
        await (self._run(self.real.close) if self.front.threaded else self.real.aclose())

    async def _run(self, function: Any, *args: Any) -> Any:
        return await anyio.to_thread.run_sync(partial(function, *args))


FRONTS = [Front(name, threaded) for name in ("httpx", "httpx2") for threaded in (False, True)]
BOTH = [Front(front.name, front.threaded, ours) for front in FRONTS for ours in (False, True)]


def without_repetitions(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests of a package, those with clients for threads once: these don't see the test's event loop."""
    return [item for item in items if not _is_repetition(item)]


def _is_repetition(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    front = parameters.get("front")
    backend = parameters.get("anyio_backend")
    return isinstance(front, Front) and front.threaded and backend not in (None, Backend("asyncio"))
