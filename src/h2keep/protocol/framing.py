"""Frames as bytes: what both engines, each of which cuts the peer's bytes itself, must know of their layout.

The bounds of K23 on what one frame and one header block may be are here as well.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from h2keep.protocol.engine import ErrorCode, Violation

if TYPE_CHECKING:
    from collections.abc import Callable

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
    "PING_ACK",
    "PRIORITY",
    "RST_STREAM",
    "SETTINGS",
    "UNDERSTOOD",
    "WINDOW_UPDATE",
    "BlockAssembly",
    "data_run",
    "frame",
    "frame_header",
    "header_frames",
    "objection_to_greeting",
    "parse_on",
    "payload",
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


def frame(kind: int, flags: int, stream_id: int, body: bytes) -> bytes:
    """A whole frame."""
    return frame_header(len(body), kind, flags, stream_id) + body


#: All that an unused connection gets, up to its payload of 8 bytes.
PING_ACK = frame_header(8, PING, ACK, 0)


def header_frames(stream_id: int, block: bytes, end_stream: bool) -> bytes:
    """HEADERS and, unbroken, the CONTINUATIONs that the block needs (K5)."""
    flags = END_STREAM if end_stream else 0
    size = MAX_FRAME_SIZE
    if len(block) <= size:
        return frame_header(len(block), HEADERS, flags | END_HEADERS, stream_id) + block
    parts = [frame_header(size, HEADERS, flags, stream_id), block[:size]]
    for start in range(size, len(block), size):
        part = block[start : start + size]
        last = start + size >= len(block)
        parts += [frame_header(len(part), CONTINUATION, END_HEADERS if last else 0, stream_id), part]
    return b"".join(parts)


def payload(flags: int, body: bytes) -> bytes:
    """What a DATA or HEADERS frame holds besides padding and, in HEADERS alone, priority. Raises `Violation`."""
    start = (1 if flags & PADDED else 0) + (5 if flags & PRIORITY else 0)
    if len(body) < start:
        raise Violation(ErrorCode.FRAME_SIZE_ERROR, "a malformed frame: too short for its padding and priority")
    stop = len(body) - (body[0] if flags & PADDED else 0)
    if stop < start:
        raise Violation(ErrorCode.PROTOCOL_ERROR, "a malformed frame: more padding than it has room for")
    return body[start:stop]


class BlockAssembly:
    """Puts header blocks together that come in HEADERS and CONTINUATIONs (RFC 9113, section 4.3)."""

    __slots__ = ("_parts", "ends", "stream_id")

    def __init__(self) -> None:
        #: The stream whose block is incomplete, 0 if none is.
        self.stream_id = 0
        #: Whether the last block's HEADERS end their stream.
        self.ends = False
        self._parts: list[bytes] = []

    def check(self, kind: int, stream_id: int) -> None:
        """For whatever comes amid a block: raises `Violation` if it isn't the block's next frame."""
        if kind != CONTINUATION or stream_id != self.stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted by another frame")

    def add(self, kind: int, flags: int, stream_id: int, body: bytes) -> bytes | None:
        """HEADERS or CONTINUATION: the whole block, None while more is due. Raises `Violation` (bounds: K23)."""
        if kind == HEADERS:
            if flags & (PADDED | PRIORITY):
                body = payload(flags, body)
            self.ends = flags & END_STREAM != 0
            if flags & END_HEADERS:
                return body
            self.stream_id = stream_id
        elif not self.stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "a CONTINUATION without a header block")
        parts = self._parts
        parts.append(body)
        if len(parts) > 1 + MAX_CONTINUATIONS or sum(map(len, parts)) > MAX_HEADER_BLOCK:
            reason = f"a header block above {MAX_HEADER_BLOCK} bytes or {MAX_CONTINUATIONS} CONTINUATIONs"
            raise Violation(ErrorCode.ENHANCE_YOUR_CALM, reason)
        if not flags & END_HEADERS:
            return None
        self.stream_id = 0
        self._parts = []
        return b"".join(parts)


def data_run(data: bytes, start: int, stop: int, room: int) -> tuple[bytes, int]:
    """What the DATA frame from `start` to `stop` holds, and those like it right after it; and where the last ends.

    Alike are frames of the same stream and flags (which must not tell of padding) that are whole, not empty, and not
    too long. Of those that follow the first, no more are taken than fit into `room` together with it.
    """
    kind = data[start + 3 : start + 9]
    if data[stop + 3 : stop + 9] != kind:
        return data[start + 9 : stop], stop
    view, end = memoryview(data), len(data)
    parts = [view[start + 9 : stop]]
    room -= len(parts[0])
    while data[stop + 3 : stop + 9] == kind:
        length = int.from_bytes(data[stop : stop + 3])
        body, following = stop + 9, stop + 9 + length
        room -= length
        if following > end or not 0 < length <= MAX_FRAME_SIZE or room < 0:
            break
        parts.append(view[body:following])
        stop = following
    return b"".join(parts), stop


def parse_on(parse: Callable[[bytes, int], bytes], partial: bytes, data: bytes) -> bytes:
    """Have `parse` act on what is left of the bytes before and on these; what it leaves of them.

    `parse` takes bytes and an offset, and returns those of a frame that isn't whole.
    """
    if not partial:
        return parse(data, 0)
    # No frame takes more than that; what follows this one is spared the copy.
    start = min(len(data), 9 + MAX_FRAME_SIZE)
    rest = parse(partial + data[:start], 0)
    return rest if start == len(data) else parse(data, start - len(rest))


def objection_to_greeting(data: bytes) -> str | None:
    """Why a connection can't begin with these bytes, of which there are 9 at least: SETTINGS must be first (3.4)."""
    if data.startswith(b"HTTP/1."):
        return "it answers in HTTP/1.1"
    if data[3] != SETTINGS or data[4] & ACK:
        return "its first frame is not SETTINGS"
    return None
