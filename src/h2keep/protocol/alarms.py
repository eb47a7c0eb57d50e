"""The clocks of many streams behind one deadline.

A heap of (time, stream id), at most one live entry a stream. Moving a stream's deadline later costs nothing: its entry
is looked at when it comes up and put back. Streams that ended leave their entry behind; when these outnumber the
living the heap is rebuilt, so a request costs O(log n) whatever its timeout (no scan of all streams on any event).
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from h2keep.protocol.stream import Stream

__all__ = ["Alarms"]


class Alarms:
    """When to look at which stream's read and write clocks (K21).

    `streams` are the connection's. Entries that name them by number alone keep no stream alive that is over, and are
    nothing for the garbage collector to go through while thousands of requests wait.
    """

    __slots__ = ("_heap", "_live", "_streams")

    def __init__(self, streams: Mapping[int, Stream]) -> None:
        self._streams = streams
        self._heap: list[tuple[float, int]] = []
        self._live = 0

    def arm(self, stream: Stream, at: float) -> bool:
        """Look at the stream's clocks then, or before; whether `next_deadline` is earlier for it."""
        if stream.alarm is None:
            self._live += 1
        elif stream.alarm <= at:
            return False
        stream.alarm = at
        heapq.heappush(self._heap, (at, stream.id))
        if len(self._heap) > 2 * self._live + 64:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)
        return self._heap[0][1] == stream.id

    def _is_live(self, entry: tuple[float, int]) -> bool:
        at, stream_id = entry
        stream = self._streams.get(stream_id)
        return stream is not None and stream.alarm == at

    def disarm(self, stream: Stream) -> None:
        """The stream is over."""
        if stream.alarm is not None:
            stream.alarm = None
            self._live -= 1

    def next_deadline(self) -> float | None:
        """When to call `due`; may be too early, never too late."""
        heap = self._heap
        while heap and not self._is_live(heap[0]):
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def due(self, now: float) -> list[Stream]:
        """The streams whose read or write deadline has passed."""
        expired = []
        while (first := self.next_deadline()) is not None and first <= now:
            stream = self._streams[heapq.heappop(self._heap)[1]]
            self.disarm(stream)
            deadline = stream.deadline()
            if deadline is None:
                continue
            if deadline <= now:
                expired.append(stream)
            else:
                self.arm(stream, deadline)
        return expired
