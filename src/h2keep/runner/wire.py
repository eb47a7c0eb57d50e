"""A connected socket while a connection is being made: bytes out and bytes in, where each wait can be cancelled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    import socket

    from h2keep.runner.tls import SecurityLayer

__all__ = ["Wire"]

_RECEIVE_SIZE = 16 * 1024


class Wire:
    """The socket itself; `h2keep.runner.proxy.Tunnel` is one that leads through a proxy."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    async def send(self, data: bytes) -> None:
        """Send all of it. Raises `OSError`."""
        data = self.wrap(data)
        while data:
            try:
                data = data[self.socket.send(data) :]
            except BlockingIOError:
                await anyio.wait_writable(self.socket)

    async def receive(self) -> bytes:
        """What came, b"" at the end. Raises `OSError`."""
        while True:
            try:
                return self.socket.recv(_RECEIVE_SIZE)
            except BlockingIOError:
                await anyio.wait_readable(self.socket)

    def wrap(self, data: bytes) -> bytes:
        """The bytes as they go to the socket."""
        return data

    def secure(self, layer: SecurityLayer) -> SecurityLayer:
        """What secures the finished connection, of which `layer` is the origin's end."""
        return layer
