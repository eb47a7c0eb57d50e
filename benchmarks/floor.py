"""What no HTTP/2 client can be below when it uploads: frames made before, written to a blocking TLS socket."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import ssl

DATA, HEADERS, SETTINGS, WINDOW_UPDATE = 0x0, 0x1, 0x4, 0x8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
INITIAL_WINDOW_SIZE = 4
#: With its header a frame fills a TLS record.
PAYLOAD = 16_384 - 9
#: Frames that are written at once, in pieces of 64 KiB.
FRAMES = 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Upload:
    """One connection. The bytes are zeros; the server's windows are kept to, as it would end the connection if not."""

    def __init__(self, url: str, context: ssl.SSLContext, timeout: float) -> None:
        parts = urlsplit(url)
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection((parts.hostname or "", parts.port or 443), timeout)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = context.wrap_socket(plain, server_hostname=parts.hostname)
        self._incoming = self._socket.makefile("rb")
        # Of the static table: POST, https, :path, :authority.
        authority = parts.netloc.encode()
        self._fields = b"\x83\x87\x04\x05/sink\x01" + bytes([len(authority)]) + authority
        self._stream = -1
        self._window = self._room = self._initial = 65_535
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))

    def close(self) -> None:
        self._incoming.close()
        self._socket.close()

    def send(self, size: int) -> bytes:
        """The server's answer to a body of so many bytes."""
        self._stream += 2
        self._room = self._initial
        self._socket.sendall(frame(HEADERS, END_HEADERS, self._stream, self._fields))
        piece = frame(DATA, 0, self._stream, bytes(PAYLOAD)) * FRAMES
        left = size
        while left > PAYLOAD * FRAMES:
            self._spend(PAYLOAD * FRAMES)
            self._socket.sendall(piece)
            left -= PAYLOAD * FRAMES
        while left > 0:
            part = min(left, PAYLOAD)
            left -= part
            self._spend(part)
            self._socket.sendall(frame(DATA, 0 if left else END_STREAM, self._stream, bytes(part)))
        while (answer := self._take()) is None:
            pass
        return answer

    def _spend(self, size: int) -> None:
        while min(self._window, self._room) < size:
            self._take()
        self._window -= size
        self._room -= size

    def _take(self) -> bytes | None:
        """Read a frame; what it brings if it is the answer's body."""
        head = self._incoming.read(9)
        payload = self._incoming.read(int.from_bytes(head[:3], "big"))
        if len(head) < 9:
            raise ConnectionError("the server closed the connection")
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        if kind == SETTINGS and not flags & ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == INITIAL_WINDOW_SIZE:
                    self._room += value - self._initial
                    self._initial = value
            self._socket.sendall(frame(SETTINGS, ACK, 0))
        elif kind == WINDOW_UPDATE:
            (increment,) = struct.unpack(">I", payload)
            if stream == 0:
                self._window += increment
            elif stream == self._stream:
                self._room += increment
        elif kind == DATA:
            return payload
        return None
