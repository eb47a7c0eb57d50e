"""Fixtures for tests of the runner: both ends of a connection, with and without TLS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import h2keep
from support.raw import RawServer

if TYPE_CHECKING:
    import contextlib
    import ssl


class Ends(NamedTuple):
    """What makes a raw server, and a client that can talk to it: 30 s and 15 s without jitter, and no timeouts."""

    server_ssl: ssl.SSLContext | None
    client_ssl: ssl.SSLContext | None

    def listen(self, **options: Any) -> contextlib.AbstractAsyncContextManager[RawServer]:
        return RawServer.listen(self.server_ssl, **options)

    def client(self, **options: Any) -> h2keep.AsyncClient:
        defaults: dict[str, Any] = {
            "http1": False,
            "timeout": None,
            "keepalive": h2keep.Keepalive(jitter=0.0),
            "limits": h2keep.Limits(keepalive_expiry=None),
        }
        if self.client_ssl is not None:
            defaults["verify"] = self.client_ssl
        return h2keep.AsyncClient(**defaults | options)


@pytest.fixture(params=["plain", "tls"])
def ends(request: pytest.FixtureRequest, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> Ends:
    """Both ends, without TLS and with it in turn."""
    return Ends(server_ssl, client_ssl) if request.param == "tls" else Ends(None, None)


@pytest.fixture
def plain_ends() -> Ends:
    """Both ends without TLS."""
    return Ends(None, None)
