"""Engines that were asked for by name, through every front door, with real servers at the other end."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

import h2keep
from h2keep.httpx2 import AsyncKeepaliveTransport, KeepaliveTransport
from h2keep.protocol import engines

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from support.servers import Server

BODY = b"spam and eggs " * 30_000


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engines on ngh2 that are made from now on."""
    instances: list[Any] = []
    make = engines.engine_named("ngh2")

    def noted(*arguments: Any, **windows: Any) -> Any:
        instances.append(make(*arguments, **windows))
        return instances[-1]

    monkeypatch.setitem(engines._ENGINES, "ngh2", lambda: noted)
    return instances


def _check(responses: list[Any]) -> None:
    upload, download, head, missing = responses
    assert upload.json() == {"size": len(BODY), "sha256": hashlib.sha256(BODY).hexdigest()}
    assert download == b"x" * 3_000_000
    assert head.content == b""
    assert missing.status_code == 404


async def _four(client: Any, url: str) -> list[Any]:
    async with client.stream("GET", f"{url}/download?size=3000000") as response:
        download = b"".join([chunk async for chunk in response.aiter_bytes()])
    return [
        await client.post(f"{url}/upload", content=BODY),
        download,
        await client.head(f"{url}/download?size=100"),
        await client.get(f"{url}/status?code=404"),
    ]


def _four_in_a_thread(client: Any, url: str) -> list[Any]:
    with client.stream("GET", f"{url}/download?size=3000000") as response:
        download = b"".join(response.iter_bytes())
    return [
        client.post(f"{url}/upload", content=BODY),
        download,
        client.head(f"{url}/download?size=100"),
        client.get(f"{url}/status?code=404"),
    ]


ASYNC_CLIENTS: dict[str, Callable[..., Any]] = {
    "h2keep": h2keep.AsyncClient,
    "httpx2": lambda **options: httpx2.AsyncClient(transport=AsyncKeepaliveTransport(**options)),
    "in-thread": lambda **options: h2keep.AsyncClient(run_in_thread=True, **options),
}
CLIENTS: dict[str, Callable[..., Any]] = {
    "h2keep": h2keep.Client,
    "httpx2": lambda **options: httpx2.Client(transport=KeepaliveTransport(**options)),
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", ASYNC_CLIENTS)
async def test_ngh2_serves_asynchronous_clients(
    name: str, real_server: Server, client_ssl: ssl.SSLContext, made: list[Any]
) -> None:
    async with ASYNC_CLIENTS[name](verify=client_ssl, engine="ngh2") as client:
        _check(await _four(client, real_server.url))
        assert [type(engine).__name__ for engine in made] == ["Ngh2Engine"]
        # Another client's choice is its own.
        async with h2keep.AsyncClient(verify=client_ssl) as other:
            _check(await _four(other, real_server.url))
    assert len(made) == 1


@pytest.mark.parametrize("name", CLIENTS)
def test_ngh2_serves_clients_for_threads(
    name: str, real_server: Server, client_ssl: ssl.SSLContext, made: list[Any]
) -> None:
    with CLIENTS[name](verify=client_ssl, engine="ngh2") as client:
        _check(_four_in_a_thread(client, real_server.url))
    assert [type(engine).__name__ for engine in made] == ["Ngh2Engine"]
