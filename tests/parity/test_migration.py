"""What docs/migrating.md says of clients that are given a transport, and of what then goes where."""

from __future__ import annotations

from typing import Any

import httpx
import httpx2
import pytest

import h2keep.httpx
import h2keep.httpx2

DOORS = [(httpx, h2keep.httpx), (httpx2, h2keep.httpx2)]
PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(("library", "door"), DOORS, ids=["httpx", "httpx2"])
class TestClientsThatAreGivenATransport:
    def test_it_serves_everything(self, library: Any, door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTPS_PROXY", PROXY)
        with library.Client(transport=door.KeepaliveTransport(proxy=PROXY)) as client:
            assert isinstance(client._transport_for_url(library.URL("https://example.com/")), door.KeepaliveTransport)

    def test_but_what_goes_through_a_proxy_that_is_given_to_the_client(self, library: Any, door: Any) -> None:
        with library.Client(transport=door.KeepaliveTransport(), proxy=PROXY) as client:
            assert type(client._transport_for_url(library.URL("https://example.com/"))) is library.HTTPTransport
