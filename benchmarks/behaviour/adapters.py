"""The Python clients that are compared, each behind one call, with the same patience as far as they have any.

Keepalive as short as `Patience` says where a client has one; a timeout for connecting; and a read timeout that is
longer than any silence that a good server takes, as callers of slow APIs have to have. Otherwise the clients' defaults.
"""

from __future__ import annotations

import functools
import ssl
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from pathlib import Path

    from pyreqwest.client import ClientBuilder


@dataclass(frozen=True)
class Patience:
    """How long clients wait, in seconds."""

    read_idle_timeout: float
    ping_timeout: float
    connect: float
    read: float


class Fetch(Protocol):
    """Make a request; the status and the size of the body."""

    async def __call__(self, method: str, url: str, body: bytes) -> tuple[int, int]: ...


class BlockingFetch(Protocol):
    """The same for threads."""

    def __call__(self, method: str, url: str, body: bytes) -> tuple[int, int]: ...


@asynccontextmanager
async def h2keep_async(ca: Path, patience: Patience, engine: str = "h2") -> AsyncIterator[Fetch]:
    import h2keep

    async with h2keep.AsyncClient(engine=engine, **_h2keep_options(ca, patience)) as client:

        async def fetch(method: str, url: str, body: bytes) -> tuple[int, int]:
            response = await client.request(method, url, content=body or None)
            return response.status_code, len(response.content)

        yield fetch


@contextmanager
def h2keep_sync(ca: Path, patience: Patience) -> Iterator[BlockingFetch]:
    import h2keep

    with h2keep.Client(**_h2keep_options(ca, patience)) as client:

        def fetch(method: str, url: str, body: bytes) -> tuple[int, int]:
            response = client.request(method, url, content=body or None)
            return response.status_code, len(response.content)

        yield fetch


def _h2keep_options(ca: Path, patience: Patience) -> dict[str, Any]:
    import h2keep

    return {
        "verify": ssl.create_default_context(cafile=str(ca)),
        "keepalive": h2keep.Keepalive(patience.read_idle_timeout, patience.ping_timeout),
        "timeout": h2keep.Timeout(connect=patience.connect, read=patience.read, write=60, pool=60),
    }


@asynccontextmanager
async def httpx2(ca: Path, patience: Patience) -> AsyncIterator[Fetch]:
    import httpx2

    timeout = httpx2.Timeout(60, connect=patience.connect, read=patience.read)
    context = ssl.create_default_context(cafile=str(ca))
    async with httpx2.AsyncClient(http2=True, verify=context, timeout=timeout) as client:

        async def fetch(method: str, url: str, body: bytes) -> tuple[int, int]:
            response = await client.request(method, url, content=body or None)
            return response.status_code, len(response.content)

        yield fetch


@asynccontextmanager
async def pyreqwest(ca: Path, patience: Patience) -> AsyncIterator[Fetch]:
    async with _pyreqwest_builder(ca, patience).build() as client:

        async def fetch(method: str, url: str, body: bytes) -> tuple[int, int]:
            request = client.request(method, url)
            response = await (request.body_bytes(body) if body else request).build().send()
            return response.status, len(await response.bytes())

        yield fetch


def _pyreqwest_builder(ca: Path, patience: Patience) -> ClientBuilder:
    from pyreqwest.client import ClientBuilder

    return (
        ClientBuilder()
        .http2(True)
        .add_root_certificate_pem(ca.read_bytes())
        .connect_timeout(timedelta(seconds=patience.connect))
        .read_timeout(timedelta(seconds=patience.read))
        .http2_keep_alive_interval(timedelta(seconds=patience.read_idle_timeout))
        .http2_keep_alive_timeout(timedelta(seconds=patience.ping_timeout))
        .http2_keep_alive_while_idle(True)
    )


@asynccontextmanager
async def niquests(ca: Path, patience: Patience) -> AsyncIterator[Fetch]:
    import niquests

    # It pings only connections that are not in use, and never more often than it deems right.
    window = patience.read_idle_timeout
    async with niquests.AsyncSession(disable_http3=True, keepalive_idle_window=window, verify=str(ca)) as session:
        # Else REQUESTS_CA_BUNDLE, where it is set, is trusted in the place of `verify`.
        session.trust_env = False

        async def fetch(method: str, url: str, body: bytes) -> tuple[int, int]:
            timeout = (patience.connect, patience.read)
            response = await session.request(method, url, data=body or None, timeout=timeout)
            return response.status_code or 0, len(response.content or b"")

        yield fetch


ASYNC: Mapping[str, Callable[[Path, Patience], AbstractAsyncContextManager[Fetch]]] = {
    "h2keep": h2keep_async,
    "h2keep-ngh2": functools.partial(h2keep_async, engine="ngh2"),
    "httpx2": httpx2,
    "pyreqwest": pyreqwest,
    "niquests": niquests,
}
BLOCKING: Mapping[str, Callable[[Path, Patience], AbstractContextManager[BlockingFetch]]] = {"h2keep-sync": h2keep_sync}
