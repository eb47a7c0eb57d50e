"""What no client can be below when it uploads over HTTP/2: frames made before, encrypted, and given to the kernel."""

from __future__ import annotations

import socket
import ssl
import struct
from typing import Final
from urllib.parse import urlsplit

DATA, HEADERS, SETTINGS, WINDOW_UPDATE = 0x0, 0x1, 0x4, 0x8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
INITIAL_WINDOW_SIZE = 4
#: With its header such a frame fills a TLS record.
PAYLOAD: Final = 16_384 - 9
#: Bytes of bodies in a piece of 64 KiB.
PIECE: Final = 4 * PAYLOAD


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Channel:
    """Blocking TLS that writes each piece with one system call. `ssl`'s own sockets take one for each record."""

    def __init__(self, url: str, context: ssl.SSLContext, timeout: float) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 443), timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_hostname=parts.hostname)
        self._rest = b""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._arrive()
        self._flush()

    def close(self) -> None:
        self._socket.close()

    def write(self, data: bytes) -> None:
        self._tls.write(data)
        self._flush()

    def read(self, size: int) -> bytes:
        while len(self._rest) < size:
            try:
                self._rest += self._tls.read(1 << 16)
            except ssl.SSLWantReadError:
                self._arrive()
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def _flush(self) -> None:
        self._socket.sendall(self._leaving.read())

    def _arrive(self) -> None:
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._arrived.write(data)


class Upload:
    """One connection. The bodies are zeros; windows are kept to, as the server would end the connection if not."""

    def __init__(self, url: str, context: ssl.SSLContext, timeout: float) -> None:
        context.set_alpn_protocols(["h2"])
        self._channel = Channel(url, context, timeout)
        # Of HPACK's static table: POST, https, :path and :authority.
        authority = urlsplit(url).netloc.encode()
        self._fields = b"\x83\x87\x04\x05/sink\x01" + bytes([len(authority)]) + authority
        self._stream = -1
        self._initial = self._stream_window = self._window = 65_535
        self._channel.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))

    def close(self) -> None:
        self._channel.close()

    def send(self, size: int) -> bytes:
        """The server's answer to a body of so many bytes."""
        self._stream += 2
        self._stream_window = self._initial
        self._channel.write(frame(HEADERS, END_HEADERS, self._stream, self._fields))
        piece = frame(DATA, 0, self._stream, bytes(PAYLOAD)) * (PIECE // PAYLOAD)
        for _ in range(size // PIECE):
            self._spend(PIECE)
            self._channel.write(piece)
        for start in range(size - size % PIECE, size, PAYLOAD):
            part = min(PAYLOAD, size - start)
            self._spend(part)
            self._channel.write(frame(DATA, 0, self._stream, bytes(part)))
        self._channel.write(frame(DATA, END_STREAM, self._stream))
        while (answer := self._take()) is None:
            pass
        return answer

    def _spend(self, size: int) -> None:
        while min(self._window, self._stream_window) < size:
            self._take()
        self._window -= size
        self._stream_window -= size

    def _take(self) -> bytes | None:
        """Read a frame; what it brings if it is the answer's body."""
        length, kind, flags, stream = struct.unpack(">IBBI", b"\0" + self._channel.read(9))
        payload = self._channel.read(length)
        if kind == DATA:
            return payload
        if kind == SETTINGS and not flags & ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == INITIAL_WINDOW_SIZE:
                    self._stream_window += value - self._initial
                    self._initial = value
            self._channel.write(frame(SETTINGS, ACK, 0))
        elif kind == WINDOW_UPDATE:
            increment = int.from_bytes(payload, "big")
            if stream == 0:
                self._window += increment
            elif stream == self._stream:
                self._stream_window += increment
        return None
