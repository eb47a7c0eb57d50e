"""Servers that speak nothing but HTTP/1.1, in the test's own event loop.

    async with Http1Server.listen(context) as server:
        ...                                     # server.url; server.requests as they came

Each request is answered with what came, as JSON; `Upgrade: echo` and `Upgrade: websocket` are granted, and then
everything comes back as it is.
"""

from __future__ import annotations

import json
import ssl
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import wsproto
from wsproto import events

from support.raw import GONE, Peer, RawServer, task_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

__all__ = ["Http1Server", "server_context"]


def server_context(cert_path: Path, key_path: Path, *alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_path, key_path)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


@dataclass
class Http1Server:
    """What came, connection by connection and request by request."""

    raw: RawServer
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    #: What stands in the head of each answer.
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    #: Answers wait for it.
    gate: anyio.Event | None = None

    @property
    def url(self) -> str:
        return self.raw.url

    @property
    def connections(self) -> int:
        return len(self.raw.peers)

    @classmethod
    @asynccontextmanager
    async def listen(
        cls, context: ssl.SSLContext | None = None, *, uds: str | None = None
    ) -> AsyncIterator[Http1Server]:
        async with AsyncExitStack() as stack:
            raw = await stack.enter_async_context(RawServer.listen(context, uds=uds))
            tasks = await stack.enter_async_context(task_group())
            server = cls(raw)

            async def accept() -> None:
                # ClosedResourceError: it listens no more.
                with suppress(anyio.ClosedResourceError):
                    while True:
                        tasks.start_soon(server.serve, await raw.accept())

            tasks.start_soon(accept)
            yield server

    async def serve(self, peer: Peer) -> None:
        """Answer a connection's requests until it ends."""
        received = bytearray()

        async def take(end: bytes | int) -> bytes:
            """Bytes up to a mark, or so many."""
            while (len(received) < end) if isinstance(end, int) else (end not in received):
                data = await peer.receive_bytes()
                if not data:
                    raise anyio.EndOfStream
                received.extend(data)
            size = end if isinstance(end, int) else received.index(end) + len(end)
            taken = bytes(received[:size])
            del received[:size]
            return taken

        try:
            await peer.tls_handshake()
            while True:
                first, *lines = (await take(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                if headers.get("transfer-encoding") == "chunked":
                    body = b""
                    while size := int((await take(b"\r\n")).strip(), 16):
                        body += (await take(size + 2))[:-2]
                    await take(b"\r\n")
                else:
                    body = await take(int(headers.get("content-length", "0")))
                self.requests.append((first, headers, body))
                if "upgrade" in headers:
                    await _switch(peer, headers)
                    return
                if self.gate is not None:
                    await self.gate.wait()
                await self._answer(peer, first, body)
        except GONE:
            peer.close()

    async def _answer(self, peer: Peer, first: str, body: bytes) -> None:
        answer = json.dumps({"first": first, "body": body.decode("latin-1")}).encode()
        fields = {"Content-Length": str(len(answer)), **self.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        await peer.send_bytes(f"HTTP/1.1 {self.status} As Told\r\n{head}\r\n".encode() + answer)


async def _switch(peer: Peer, headers: dict[str, str]) -> None:
    """Change protocols, then send back what comes."""
    if headers["upgrade"].lower() == "websocket":
        await _echo_messages(peer, headers)
        return
    await peer.send_bytes(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
    while data := await peer.receive_bytes():
        await peer.send_bytes(data)


async def _echo_messages(peer: Peer, headers: dict[str, str]) -> None:
    socket = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
    socket.initiate_upgrade_connection([(name.encode(), value.encode()) for name, value in headers.items()], "/")
    while True:
        for event in socket.events():
            match event:
                case events.Request():
                    await peer.send_bytes(socket.send(events.AcceptConnection()))
                case events.TextMessage():
                    await peer.send_bytes(socket.send(events.TextMessage(data=event.data)))
                case events.CloseConnection():
                    await peer.send_bytes(socket.send(event.response()))
                    return
        socket.receive_data(await peer.receive_bytes() or None)
