"""Where `install()` finds no HTTP/2, the response and the log say so."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

import h2keep
from h2keep import Keepalive, _fallback

if TYPE_CHECKING:
    import ssl

    from install.conftest import Front
    from support.servers import Server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]


@pytest.mark.parametrize(("keepalive", "has_tcp_keepalive"), [(Keepalive(), True), (Keepalive(None), False)])
async def test_k18_the_response_says_that_there_are_no_pings(
    front: Front, hypercorn: Server, client_ssl: ssl.SSLContext, keepalive: Keepalive, has_tcp_keepalive: bool
) -> None:
    h2keep.install(keepalive)
    async with front.client(verify=client_ssl) as client:
        without = (await client.get(f"{hypercorn.h2c_url}/echo")).extensions["h2keep"]
        assert not without.pings_possible
        assert (without.origin, without.http_version) == (hypercorn.h2c_url, "HTTP/1.1")
        assert without.tcp_keepalive == has_tcp_keepalive
        assert (await client.get(f"{hypercorn.url}/echo")).extensions["h2keep"].pings_possible


async def test_the_log_tells_once_of_each_origin_with_http(
    front: Front, hypercorn: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fallback, "_told", _fallback.Http1Origins())
    caplog.set_level(logging.INFO, "h2keep")
    h2keep.install()
    for _ in range(2):
        async with front.client() as client:
            for _ in range(2):
                await client.get(f"{hypercorn.h2c_url}/echo")
    (told,) = [record for record in caplog.records if "without PINGs" in record.getMessage()]
    assert told.levelno == logging.INFO
    assert told.getMessage().startswith(f"{hypercorn.h2c_url}: http:// is HTTP/1.1 here: {front.name}'s own transport")
