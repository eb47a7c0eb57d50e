"""Requests leave nothing behind that only the garbage collector could free: they would make it run all the time.

httpx isn't looked at: its own responses refer to themselves. httpx2's don't.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

import h2keep
import h2keep.httpx2

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from support.servers import Server

_REQUESTS = 50
#: Objects that the interpreter, the event loop or the client's library leave now and then.
_UNAVOIDABLE = _REQUESTS // 2


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def _blocking(kind: str, ssl_context: ssl.SSLContext) -> Any:
    if kind == "h2keep":
        return h2keep.Client(verify=ssl_context)
    return httpx2.Client(transport=h2keep.httpx2.KeepaliveTransport(verify=ssl_context))


def _asynchronous(kind: str, ssl_context: ssl.SSLContext) -> Any:
    if kind == "h2keep":
        return h2keep.AsyncClient(verify=ssl_context)
    return httpx2.AsyncClient(transport=h2keep.httpx2.AsyncKeepaliveTransport(verify=ssl_context))


@pytest.mark.parametrize("kind", ["h2keep", "httpx2"])
def test_blocking_requests(kind: str, granian: Server, client_ssl: ssl.SSLContext) -> None:
    with _blocking(kind, client_ssl) as client:
        client.post(f"{granian.url}/echo", content=b"first")
        gc.collect()
        for _ in range(_REQUESTS):
            assert client.post(f"{granian.url}/echo", content=b"next").status_code == 200
        assert gc.collect() < _UNAVOIDABLE


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["h2keep", "httpx2"])
async def test_requests(kind: str, granian: Server, client_ssl: ssl.SSLContext) -> None:
    async with _asynchronous(kind, client_ssl) as client:
        await client.post(f"{granian.url}/echo", content=b"first")
        gc.collect()
        for _ in range(_REQUESTS):
            assert (await client.post(f"{granian.url}/echo", content=b"next")).status_code == 200
        assert gc.collect() < _UNAVOIDABLE
