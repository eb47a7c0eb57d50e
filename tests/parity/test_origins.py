"""What a server says of other servers: coalescing is off, as in Go; 421 is the caller's to read; Alt-Svc is ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import h2keep
from support.raw import RawServer, answering

if TYPE_CHECKING:
    import ssl

    from support.fronts import Front

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check")]


async def test_names_of_one_server_have_connections_of_their_own(
    front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    """One address, and a certificate that names both."""
    async with RawServer.listen(server_ssl) as server, front.client(verify=client_ssl) as client:
        server.serve(answering())
        for host in ("127.0.0.1", "localhost", "127.0.0.1", "localhost"):
            await client.get(f"https://{host}:{server.port}/")
        assert [len(peer.requests) for peer in server.peers] == [2, 2]


async def test_421_is_a_response_like_any_other(
    front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, front.client(verify=client_ssl) as client:
        server.serve(answering(b"not here", status=421))
        for _ in range(2):
            response = await client.post(server.url, content=b"x")
            assert (response.status_code, response.content) == (421, b"not here")
        assert [len(peer.requests) for peer in server.peers] == [2]


async def test_alt_svc_is_a_header_like_any_other(
    front: Front, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
) -> None:
    async with RawServer.listen(server_ssl) as server, RawServer.listen(server_ssl) as other:
        other.serve(answering())
        value = f'h3=":{other.port}", h2=":{other.port}"; ma=3600; persist=1'
        server.serve(answering(headers=[("alt-svc", value)]))
        async with front.client(verify=client_ssl) as client:
            for _ in range(3):
                assert (await client.get(server.url)).headers["alt-svc"] == value
        assert other.peers == []
        assert [len(peer.requests) for peer in server.peers] == [3]


class TestTheStandaloneClient:
    async def test_the_same(self, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext) -> None:
        async with RawServer.listen(server_ssl) as server, h2keep.AsyncClient(verify=client_ssl) as client:
            server.serve(answering(b"not here", status=421, headers=[("alt-svc", 'h3=":443"')]))
            for host in ("127.0.0.1", "localhost"):
                response = await client.get(f"https://{host}:{server.port}/")
                assert (response.status_code, response.headers["alt-svc"]) == (421, 'h3=":443"')
            assert [len(peer.requests) for peer in server.peers] == [1, 1]
