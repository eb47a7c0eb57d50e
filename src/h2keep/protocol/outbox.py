"""What goes out, and in which order (K5).

Control frames leave first, then request heads, then bodies, one frame a stream in turn. Heads are encoded and DATA is
framed only when the runner takes bytes, so whatever is queued here can still be dropped as if it had never been
(K24), and a PING never stands behind a body. A body that is alone goes out in frames as large as the peer takes, with
no other copy than what joins them to their neighbours.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from h2keep.protocol.framing import MAX_FRAME_SIZE

if TYPE_CHECKING:
    from h2keep.protocol.engine import Engine
    from h2keep.protocol.stream import Stream

__all__ = ["Outbox"]

#: A body's producer is asked for more when less than this is queued, in bytes.
LOW_WATER = 32 * 1024
#: A body's producer is asked to wait when more than this is queued, in bytes.
HIGH_WATER = 64 * 1024
#: What is handed over is cut to pieces of this many bytes: a processor's cache holds them while they are encrypted.
_PIECE = 64 * 1024
_LEAST_FRAME = 4 * 1024
#: A body up to this many bytes is small.
_SMALL_BODY = 4 * 1024


class Outbox:
    """Queues of streams that have something to send, over one engine."""

    __slots__ = ("_engine", "_heads", "_ready", "allowance", "body_bytes")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._heads: deque[Stream] = deque()
        self._ready: deque[Stream] = deque()
        #: How many heads may be sent: all, unless the peer lowered its limit below what was queued (RFC 9113, 5.1.2).
        self.allowance = math.inf
        #: Body bytes framed so far.
        self.body_bytes = 0

    def add_head(self, stream: Stream) -> None:
        """A request is to be opened."""
        self._heads.append(stream)

    def wake(self, stream: Stream) -> None:
        """The stream has got something to send, or room to send it."""
        if stream.fields is None and not stream.sending and self._can_send(stream):
            stream.sending = True
            if stream.queued:
                self._ready.append(stream)
            else:
                # A mere END_STREAM needs no window, so it must not wait behind those that do.
                self._ready.appendleft(stream)

    def has_data(self) -> bool:
        """Whether a head waits, or a body that the windows admit (control frames are the engine's to know)."""
        if self._heads and self.allowance > 0:
            return True
        return bool(self._ready) and (not self._ready[0].queued or self._engine.connection_window() > 0)

    def _can_send(self, stream: Stream) -> bool:
        if not stream.open or stream.end_sent_at is not None:
            return False
        if stream.queued:
            return self._engine.send_window(stream.id) > 0
        return stream.upload_ended

    def collect(self, limit: int, now: float) -> tuple[list[bytes | memoryview], list[Stream], list[Stream]]:
        """About `limit` bytes for the peer, in pieces; streams that they complete; streams whose producers may go on.

        Control frames and heads are never split, so the result may be longer by one of them.
        """
        complete: list[Stream] = []
        relieved: list[Stream] = []
        if not (self._heads or self._ready):
            return [self._engine.drain()], complete, relieved
        parts: list[bytes | memoryview] = [self._engine.drain()]
        bodies: list[bytes | memoryview] = []
        size = len(parts[0])
        while self._heads and size < limit and self.allowance > 0:
            stream = self._heads.popleft()
            if stream.open:
                self.allowance -= 1
                size += self._send_head(stream, now, parts, bodies)
                if stream.end_sent_at is not None:
                    complete.append(stream)
        parts += bodies
        while self._ready and size < limit:
            stream = self._ready.popleft()
            stream.sending = False
            if not self._can_send(stream):
                continue
            if stream.queued and self._engine.connection_window() <= 0:
                stream.sending = True
                self._ready.appendleft(stream)
                break
            size += self._send_body(stream, limit - size, now, parts)
            if stream.end_sent_at is not None:
                complete.append(stream)
                continue
            if stream.wants_room and stream.queued < LOW_WATER:
                stream.wants_room = False
                relieved.append(stream)
            self.wake(stream)
        return ([b"".join(parts)] if size <= _PIECE else _pieces(parts)), complete, relieved

    def _send_head(
        self, stream: Stream, now: float, heads: list[bytes | memoryview], bodies: list[bytes | memoryview]
    ) -> int:
        """Add a request's head to those; the size of what was added.

        A small body that is known in full, and before which no other waits, needs no queue: it is added to `bodies`.
        """
        assert stream.fields is not None
        engine = self._engine
        fields, stream.fields = stream.fields, None
        queued = stream.queued
        whole = stream.upload_ended and stream.trailers is None
        stream.sent_at = stream.write_since = now
        head = engine.send_request(stream.id, fields, whole and not queued)
        heads.append(head)
        if not whole or (queued and (self._ready or queued > _SMALL_BODY or queued > engine.room(stream.id))):
            self.wake(stream)
            return len(head)
        stream.end_sent_at = now
        if not queued:
            return len(head)
        body = stream.take(queued)
        frame = engine.send_data(stream.id, body, True)
        bodies += (frame, body)
        self.body_bytes += queued
        return len(head) + len(frame) + queued

    def _send_body(self, stream: Stream, limit: int, now: float, parts: list[bytes | memoryview]) -> int:
        """Add to `parts` what a stream sends next; its size."""
        framed = self._frame(stream, limit, parts) if stream.queued else 0
        stream.write_since = now
        if stream.upload_ended and not stream.queued:
            if stream.trailers is not None:
                parts.append(self._engine.send_trailers(stream.id, stream.trailers))
                framed += len(parts[-1])
            elif not framed:
                parts.append(self._engine.send_data(stream.id, b"", True))
                framed = len(parts[-1])
            stream.end_sent_at = now
        return framed

    def _frame(self, stream: Stream, limit: int, parts: list[bytes | memoryview]) -> int:
        """Frame what is queued: all that may go, but no more than one common frame while others wait for their turn."""
        engine = self._engine
        most = engine.max_frame_size
        # The limit only shortens a frame where it leaves a useful one; crumbs would cost more than they bound.
        room = min(engine.room(stream.id), max(limit, _LEAST_FRAME))
        if self._ready:
            room = most = min(room, MAX_FRAME_SIZE)
        framed = 0
        while stream.queued and room:
            data = stream.take(min(most, room))
            last = stream.upload_ended and not stream.queued and stream.trailers is None
            head = engine.send_data(stream.id, data, last)
            parts += (head, data)
            self.body_bytes += len(data)
            room -= len(data)
            framed += len(head) + len(data)
        return framed


def _pieces(parts: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """The same bytes, joined or cut to the size of a piece."""
    pieces: list[bytes | memoryview] = []
    waiting: list[bytes | memoryview] = []
    room = _PIECE
    for part in parts:
        rest = memoryview(part)
        while len(rest) > room:
            waiting.append(rest[:room])
            pieces.append(_joined(waiting))
            rest = rest[room:]
            waiting, room = [], _PIECE
        waiting.append(rest)
        room -= len(rest)
    pieces.append(_joined(waiting))
    return pieces


def _joined(parts: list[bytes | memoryview]) -> bytes | memoryview:
    return parts[0] if len(parts) == 1 else b"".join(parts)
