"""Small proxies in the test's own event loop, which do as they are told, wrong things included.

    async with TinyProxy.listen() as proxy:
        ...                                 # proxy.url; proxy.tunnels as they come
        proxy.answer = b"HTTP/1.1 407 ..."  # what to say to CONNECT

`socks=True` makes one that speaks SOCKS5 (RFC 1928, RFC 1929). Both relay to 127.0.0.1 and the port that was asked for,
whatever the name.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import TYPE_CHECKING

import anyio

from support.raw import GONE, RawServer, close

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from anyio.abc import TaskGroup

    from support.raw import Peer

__all__ = ["ESTABLISHED", "Asked", "TinyProxy", "proxy_ssl"]

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
_CHUNK = 64 * 1024


def proxy_ssl(cert_path: Path, key_path: Path) -> ssl.SSLContext:
    """The context of an https:// proxy."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_path, key_path)
    context.set_alpn_protocols(["http/1.1"])
    return context


class Asked:
    """One tunnel that was asked for."""

    def __init__(self, client: Peer, head: bytes) -> None:
        self.client = client
        #: What the client said before the tunnel.
        self.head = head
        self.upstream = socket.socket()
        #: Bytes relayed to the origin and from it.
        self.sent = 0
        self.received = 0
        #: Swallow everything in both directions from now on.
        self.silent = False
        #: Why the client's side ended, once it has.
        self.end: BaseException | None = None
        self.ended = anyio.Event()

    async def relay(self, tasks: TaskGroup, port: int, early: bytes, answer: bytes = b"") -> None:
        """Until either side ends. `answer` goes in one write with the first bytes from the origin."""
        self.upstream.setblocking(False)
        self.upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BlockingIOError):
            self.upstream.connect(("127.0.0.1", port))
        await anyio.wait_writable(self.upstream)
        tasks.start_soon(self._up, early)
        tasks.start_soon(self._down, answer)

    async def _up(self, early: bytes) -> None:
        data = early
        try:
            while True:
                if not self.silent:
                    self.sent += len(data)
                    while data:
                        data = data[self.upstream.send(data) :]
                data = await self.client.receive_bytes()
                if not data:
                    break
        except (*GONE, OSError) as error:
            self.end = error
        self.end = self.end or self.client.error
        self.ended.set()
        self.close()

    async def _down(self, answer: bytes) -> None:
        with contextlib.suppress(*GONE, OSError):
            while True:
                await anyio.wait_readable(self.upstream)
                data = self.upstream.recv(_CHUNK)
                if not data:
                    break
                if not self.silent:
                    self.received += len(data)
                    await self.client.send_bytes(answer + data)
                    answer = b""
        self.close()

    def close(self) -> None:
        """End both sides."""
        close(self.upstream)
        self.client.close()


class TinyProxy:
    """See the module's docstring."""

    def __init__(self, server: RawServer, tasks: TaskGroup, scheme: str) -> None:
        self._tasks = tasks
        self.server = server
        self.url = f"{scheme}://127.0.0.1:{server.port}"
        #: The heads of all CONNECT requests, or the first bytes of SOCKS' own.
        self.heads: list[bytes] = []
        self.tunnels: list[Asked] = []
        self._asked = anyio.Event()
        #: What CONNECT is answered with; None: nothing at all. No relaying unless the status is 2xx.
        self.answer: bytes | None = ESTABLISHED
        #: What happens after that: "relay", "close", "abort" or "wait".
        self.then = "relay"
        #: Wait for the origin's first bytes, and send them in one write with the answer.
        self.in_one_write = False
        # SOCKS
        self.user: tuple[bytes, bytes] | None = None
        self.reply = b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x00"
        self.method_reply: bytes | None = None
        self.destinations: list[tuple[bytes, int]] = []
        #: A byte at a time.
        self.slowly = False

    @classmethod
    @contextlib.asynccontextmanager
    async def listen(cls, ssl: ssl.SSLContext | None = None, *, socks: bool = False) -> AsyncIterator[TinyProxy]:
        """A proxy for the length of the context."""
        async with RawServer.listen(ssl) as server:
            tasks = server._tasks
            proxy = cls(server, tasks, "socks5" if socks else "http" if ssl is None else "https")
            tasks.start_soon(proxy._accept, proxy._socks if socks else proxy._connect)
            try:
                yield proxy
            finally:
                for tunnel in proxy.tunnels:
                    tunnel.close()

    async def tunnel(self, index: int = 0) -> Asked:
        """The tunnel of this number, once it is there."""
        while len(self.tunnels) <= index:
            await self._asked.wait()
        return self.tunnels[index]

    async def _accept(self, serve: Callable[[Peer], Awaitable[None]]) -> None:
        with contextlib.suppress(anyio.ClosedResourceError):
            while True:
                self._tasks.start_soon(self._guard, serve, await self.server.accept())

    async def _guard(self, serve: Callable[[Peer], Awaitable[None]], peer: Peer) -> None:
        with contextlib.suppress(*GONE, OSError):
            await peer.tls_handshake()
            await serve(peer)

    async def _connect(self, peer: Peer) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = await peer.receive_bytes()
            if not data:
                return
            head += data
        head, _, early = head.partition(b"\r\n\r\n")
        self.heads.append(head)
        port = int(head.split()[1].rpartition(b":")[2])
        await self._go_on(peer, head, port, self.answer, early)

    async def _go_on(self, peer: Peer, head: bytes, port: int, answer: bytes | None, early: bytes = b"") -> None:
        asked = Asked(peer, head)
        self.tunnels.append(asked)
        self._asked.set()
        self._asked = anyio.Event()
        if answer is None:
            return
        if self.in_one_write:
            await asked.relay(self._tasks, port, early, answer)
            return
        await self._say(peer, answer)
        if self.then == "close":
            await peer.eof()
            peer.close()
        elif self.then == "abort":
            peer.abort()
        elif self.then == "relay":
            await asked.relay(self._tasks, port, early)

    async def _say(self, peer: Peer, data: bytes) -> None:
        if not self.slowly:
            await peer.send_bytes(data)
            return
        for index in range(len(data)):
            await peer.send_bytes(data[index : index + 1])
            await anyio.sleep(0.01)

    # SOCKS5

    async def _socks(self, peer: Peer) -> None:
        received = bytearray()

        async def take(size: int) -> bytes:
            while len(received) < size:
                data = await peer.receive_bytes()
                if not data:
                    raise anyio.EndOfStream
                received.extend(data)
            taken = bytes(received[:size])
            del received[:size]
            return taken

        version, count = await take(2)
        methods = await take(count)
        self.heads.append(bytes([version, count]) + methods)
        method = 0 if self.user is None else 2
        if self.method_reply is not None or method not in methods:
            await self._say(peer, self.method_reply or b"\x05\xff")
            await peer.eof()
            return
        await self._say(peer, bytes([5, method]))
        if self.user is not None:
            _, length = await take(2)
            user = await take(length)
            password = await take((await take(1))[0])
            ok = (user, password) == self.user
            await self._say(peer, b"\x01\x00" if ok else b"\x01\x01")
            if not ok:
                await peer.eof()
                return
        _, _, _, kind = await take(4)
        size = {1: 4, 4: 16}.get(kind) or (await take(1))[0]
        host = await take(size)
        port = int.from_bytes(await take(2), "big")
        self.destinations.append((host, port))
        if self.reply[1] != 0:
            await self._say(peer, self.reply)
            await peer.eof()
            return
        await self._go_on(peer, b"", port, self.reply, bytes(received))
