"""Frames as bytes: what both engines, each of which cuts the peer's bytes itself, must know of their layout.

The bounds of K23 on what one frame and one header block may be are here as well.
"""

from __future__ import annotations

import struct

__all__ = [
    "ACK",
    "CONTINUATION",
    "DATA",
    "END_HEADERS",
    "END_STREAM",
    "GOAWAY",
    "HEADERS",
    "LARGEST_WINDOW",
    "MAX_CONTINUATIONS",
    "MAX_FRAME_SIZE",
    "MAX_HEADER_BLOCK",
    "PADDED",
    "PING",
    "PRIORITY",
    "RST_STREAM",
    "SETTINGS",
    "UNDERSTOOD",
    "WINDOW_UPDATE",
    "frame_header",
    "objection_to_greeting",
    "unpack_header",
]

#: The largest frame that we accept: the size that every peer accepts, too, whatever its SETTINGS say.
MAX_FRAME_SIZE = 16_384
MAX_HEADER_BLOCK = 64 * 1024
MAX_CONTINUATIONS = 64
LARGEST_WINDOW = 2**31 - 1

# Frame types and flags (RFC 9113, section 6).
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY = 0x20
#: PRIORITY, ALTSVC and extension frames ask nothing of a client and are skipped (RFC 9113, section 5.5).
UNDERSTOOD = frozenset(range(10)) - {2}

_HEADER = struct.Struct(">HBBBL")

#: A frame's header at an offset: its length in two parts (16 bits and 8), type, flags, and stream id with the reserved
#: bit. A frame takes 9 bytes more than its length.
unpack_header = _HEADER.unpack_from


def frame_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """A frame up to its payload."""
    return _HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream_id)


def objection_to_greeting(data: bytes) -> str | None:
    """Why a connection can't begin with these bytes, of which there are 9 at least: SETTINGS must be first (3.4)."""
    if data.startswith(b"HTTP/1."):
        return "it answers in HTTP/1.1"
    if data[3] != SETTINGS or data[4] & ACK:
        return "its first frame is not SETTINGS"
    return None
