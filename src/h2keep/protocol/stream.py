"""One request and its response, as the connection sees them: what is queued to go out, what waits to be read, and the
two clocks of K21. Pure bookkeeping: frames, windows and events are the connection's.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from h2keep.errors import LocalProtocolError

if TYPE_CHECKING:
    from h2keep.protocol.events import Headers
    from h2keep.protocol.flow import ReceiveWindow

__all__ = ["Stream", "Waiting"]

#: What comes in pieces of at least this many bytes waits as it came; smaller ones are joined at once (K23).
_LARGE = 4 * 1024
#: What is read at once, in bytes, unless a single piece is larger: more would be copied for nothing.
_MOST_JOINED = 128 * 1024


class Waiting:
    """Body bytes that came in several pieces and wait to be read: `bytes()` joins them all."""

    __slots__ = ("_length", "pieces")

    def __init__(self, first: bytes) -> None:
        self.pieces: deque[bytes | bytearray] = deque((first,))
        self._length = len(first)

    def __len__(self) -> int:
        return self._length

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)

    def take(self) -> bytes:
        """The first pieces, joined as far as that is worth it."""
        pieces = self.pieces
        taken = [pieces.popleft()]
        length = len(taken[0])
        while pieces and length + len(pieces[0]) <= _MOST_JOINED:
            length += len(pieces[0])
            taken.append(pieces.popleft())
        self._length -= length
        return bytes(taken[0]) if len(taken) == 1 else b"".join(taken)

    def add(self, data: bytes) -> None:
        """One more piece: by reference if it is large, else joined to small ones before it (K23)."""
        self._length += len(data)
        last = self.pieces[-1]
        if len(data) >= _LARGE:
            self.pieces.append(data)
        elif isinstance(last, bytearray):
            last += data
        else:
            self.pieces.append(bytearray(data))


class Stream:
    """State of one stream; see `h2keep.protocol.connection.Connection`, its only user."""

    __slots__ = (
        "alarm",
        "body_left",
        "buffer",
        "chunks",
        "empty_frames",
        "end_sent_at",
        "ended",
        "fields",
        "id",
        "informational",
        "open",
        "opened_at",
        "patience",
        "queued",
        "read_timeout",
        "reading_since",
        "response_seen",
        "sending",
        "sent_at",
        "trailers",
        "upload_ended",
        "wants_room",
        "window",
        "write_since",
        "write_timeout",
    )

    def __init__(
        self,
        stream_id: int,
        fields: Headers,
        content_length: int | None,
        read_timeout: float | None,
        write_timeout: float | None,
        now: float,
    ) -> None:
        self.id = stream_id
        #: The request's fields until they are encoded, then None (K24: not sent while not None).
        self.fields: Headers | None = fields
        self.open = True
        self.opened_at = now

        # Outgoing. None before there is anything: most streams spend most of their time waiting with nothing to send.
        self.chunks: deque[bytes | memoryview] | None = None
        #: Bytes in `chunks`.
        self.queued = 0
        #: The application has said that nothing follows what is queued.
        self.upload_ended = False
        self.trailers: Headers | None = None
        #: In the connection's queue of streams that can send now.
        self.sending = False
        #: The producer is owed a word when there is room.
        self.wants_room = False
        #: What the declared content length still lacks, None if none was declared.
        self.body_left = content_length
        #: When HEADERS and END_STREAM were handed over.
        self.sent_at: float | None = None
        self.end_sent_at: float | None = None

        # Incoming.
        #: None until bytes of the response have been consumed.
        self.window: ReceiveWindow | None = None
        self.buffer: bytes | Waiting = b""
        self.response_seen = False
        self.ended = False
        self.informational = 0
        self.empty_frames = 0

        # Timeouts.
        self.read_timeout = read_timeout
        self.write_timeout = write_timeout
        patience = math.inf if read_timeout is None else read_timeout
        #: No clock that begins to run later runs out sooner than this.
        self.patience = patience if write_timeout is None or write_timeout > patience else write_timeout
        #: Since when something is ready to be handed over and wasn't.
        self.write_since = now
        #: Since when the application waits with nothing buffered, None if it doesn't.
        self.reading_since: float | None = None
        #: The earliest time at which the connection will look at this stream's clocks.
        self.alarm: float | None = None

    def queue(self, data: bytes | memoryview, end_stream: bool, now: float) -> None:
        """Queue a chunk of the body by reference.

        Raises `LocalProtocolError`, having queued nothing, if the body contradicts its declared length.
        """
        if not isinstance(data, bytes):
            data = memoryview(data).cast("B")
        length = len(data)
        if self.body_left is not None:
            if length > self.body_left:
                excess = length - self.body_left
                raise LocalProtocolError(
                    f"the body is longer than its Content-Length by at least {excess} bytes",
                    unprocessed=self.fields is not None,
                )
            if end_stream and length < self.body_left:
                raise LocalProtocolError(
                    f"the body is {self.body_left - length} bytes shorter than its Content-Length",
                    unprocessed=self.fields is not None,
                )
            self.body_left -= length
        if not self.queued and self.fields is None:
            self.write_since = now
        if length:
            if self.chunks is None:
                self.chunks = deque()
            self.chunks.append(data)
            self.queued += length
        self.upload_ended = end_stream

    def take(self, size: int) -> bytes | memoryview:
        """The next at most `size` queued bytes; small chunks are joined into one frame's worth."""
        chunks = self.chunks
        assert chunks is not None
        first = chunks[0]
        taken = len(first)
        if taken > size:
            view = memoryview(first)
            chunks[0] = view[size:]
            self.queued -= size
            return view[:size]
        parts = [chunks.popleft()]
        while chunks and taken < size:
            part = chunks.popleft()
            if len(part) > size - taken:
                view = memoryview(part)
                chunks.appendleft(view[size - taken :])
                part = view[: size - taken]
            parts.append(part)
            taken += len(part)
        self.queued -= taken
        if not chunks:
            self.chunks = None
        return first if len(parts) == 1 else b"".join(parts)

    def receive(self, data: bytes) -> None:
        """Add to what waits to be read."""
        if not self.buffer:
            self.buffer = data
            return
        if isinstance(self.buffer, bytes):
            self.buffer = Waiting(self.buffer)
        self.buffer.add(data)

    def take_received(self) -> bytes:
        """Bytes that wait to be read: all, or of more than `_MOST_JOINED` the first."""
        waiting = self.buffer
        if isinstance(waiting, bytes):
            self.buffer = b""
            return waiting
        data = waiting.take()
        if not waiting:
            self.buffer = b""
        return data

    def read_deadline(self) -> float | None:
        """When the read timeout fires, None while its clock doesn't run (K21)."""
        if self.read_timeout is None or self.reading_since is None or self.end_sent_at is None:
            return None
        return max(self.reading_since, self.end_sent_at) + self.read_timeout

    def write_deadline(self) -> float | None:
        """When the write timeout fires, None while its clock doesn't run (K21)."""
        if self.write_timeout is None or self.end_sent_at is not None:
            return None
        if self.fields is None and not self.queued and not self.upload_ended:
            return None
        return self.write_since + self.write_timeout

    def deadline(self) -> float | None:
        """When either timeout fires; never both run, since END_STREAM stops the one and starts the other."""
        read = self.read_deadline()
        return self.write_deadline() if read is None else read
