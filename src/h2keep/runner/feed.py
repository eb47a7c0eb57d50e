"""The bounded queue between a body's iterator on the caller's side and the background loop that uploads it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from h2keep.runner import eventloop

if TYPE_CHECKING:
    from collections.abc import Callable

    from h2keep.runner.background import BackgroundLoop

__all__ = ["Feed"]

#: Bytes of a body that wait for the loop at most (and one chunk beyond).
_MOST_UNSENT = 256 * 1024


class Feed:
    """A request's body as the loop pulls it, chunk by chunk as the caller's side pushes them."""

    def __init__(self, loop: BackgroundLoop, on_room: Callable[[], object]) -> None:
        self._loop = loop
        self._on_room = on_room
        self._chunks: deque[bytes | memoryview] = deque()
        self._pushed = 0
        self._taken = 0
        self._complete = False
        self._parker: eventloop.Parker | None = None
        #: The loop waits for a chunk.
        self._hungry = False
        #: The request is on its connection. Before that the body is not touched: a request that can't be sent this way
        #: may still be sent in another.
        self.begun = False
        #: Nobody wants the rest.
        self.unwanted = False

    # The caller's side

    @property
    def full(self) -> bool:
        """Whether the caller should wait before it pushes more."""
        return self._pushed - self._taken >= _MOST_UNSENT

    def push(self, chunk: bytes | memoryview) -> None:
        """Add a chunk; the caller then waits while it is `full`."""
        self._pushed += len(chunk)
        self._chunks.append(chunk)
        self._wake()

    def finish(self) -> None:
        """The body is complete."""
        self._complete = True
        self._wake()

    def _wake(self) -> None:
        if self._hungry:
            self._hungry = False
            self._loop.post(self._unpark)

    # The loop's side

    def _unpark(self) -> None:
        if self._parker is not None:
            self._parker.unpark()

    def __aiter__(self) -> Feed:
        self.begun = True
        self._on_room()
        return self

    async def __anext__(self) -> bytes | memoryview:
        if self._parker is None:
            self._parker = eventloop.current().parker()
        while not self._chunks:
            # In this order: what is pushed after the look at the queue finds us hungry, and a body that was complete
            # before that look has nothing more to push.
            self._hungry = True
            complete = self._complete
            if self._chunks:
                break
            if complete:
                raise StopAsyncIteration
            await self._parker.park()
        chunk = self._chunks.popleft()
        self._taken += len(chunk)
        # Whether it was full before is the caller's to know: it may have become so a moment ago.
        if not self.full:
            self._on_room()
        return chunk

    async def aclose(self) -> None:
        """No more is wanted, or all has been taken."""
        self.unwanted = True
        self._chunks.clear()
        self._on_room()
