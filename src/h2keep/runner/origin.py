"""What a pool knows of one origin: its connections, the queue of those who wait for one, and how its dials went.

Deciding what follows from it is the pool's affair.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import anyio

from h2keep.protocol.connection import ASSUMED_STREAMS

if TYPE_CHECKING:
    from h2keep.errors import ConnectionLost
    from h2keep.keepalive import IntervalMemory
    from h2keep.runner.connection import Http2Connection
    from h2keep.runner.dial import Origin
    from h2keep.runner.eventloop import Parker
    from h2keep.runner.request import PoolRequest
    from h2keep.runner.stream import Http2Stream

__all__ = ["PAUSES", "OriginState", "Waiter"]

#: Between attempts to make another connection while there are some that take requests, in seconds: the first pause, and
#: the longest; each is twice as long as the one before.
PAUSES = (1.0, 60.0)


@dataclass(slots=True, eq=False)
class Waiter:
    """A request in an origin's queue."""

    request: PoolRequest
    parker: Parker
    #: What moves, if it was open on another connection before (K24).
    again: Http2Stream | None = None
    stream: Http2Stream | None = None
    error: BaseException | None = None
    #: Gave up: cancelled or timed out.
    gone: bool = False

    async def served(self, seconds: float | None) -> bool:
        """Wait at most so long until there is a stream, or an error."""
        with anyio.move_on_after(seconds):
            while self.stream is None and self.error is None:
                await self.parker.park()
        return self.stream is not None or self.error is not None


@dataclass(slots=True, eq=False)
class OriginState:
    """What the pool knows of one origin."""

    origin: Origin
    memory: IntervalMemory | None
    #: Streams that its next connection is expected to take: as many as the server allowed last, at most 100.
    streams: int = ASSUMED_STREAMS
    #: Connections that take requests and have room, the one that served last at the end.
    available: OrderedDict[Http2Connection, None] = field(default_factory=OrderedDict)
    #: Connections that must prove to be alive before they get a request (K9).
    unverified: OrderedDict[Http2Connection, None] = field(default_factory=OrderedDict)
    connections: set[Http2Connection] = field(default_factory=set)
    #: Connections that take no new requests, or will soon, as they are being replaced (K22).
    draining: set[Http2Connection] = field(default_factory=set)
    queue: deque[Waiter] = field(default_factory=deque)
    #: Waiters in the queue that have not given up.
    waiting: int = 0
    dials: int = 0
    #: How many requests the unverified ones will have room for; None if that is to be counted anew.
    expected: int | None = None
    #: A hedge is due or under way (K9c).
    hedging: bool = False
    #: A dial failed while other connections take requests: it is too early for another one.
    pausing: bool = False
    #: How long the next such pause is, in seconds.
    pause: float = PAUSES[0]
    #: The last dial's failure, until something succeeds.
    failure: BaseException | None = None
    #: If that was the connect timeout: how long it was. Who allows more may still have it.
    patience: float = math.inf
    lost: ConnectionLost | None = None
    #: The attempts to connect that are under way, with the seconds that each has left once somebody gives it up.
    attempts: dict[anyio.CancelScope, float] = field(default_factory=dict)

    def longest_connect(self) -> float | None:
        """The longest that those who wait allow for connecting, None for ever. Somebody must be waiting."""
        waiters = [waiter for waiter in islice(self.queue, ASSUMED_STREAMS) if not waiter.gone]
        allowed = [waiter.request.timeout.connect for waiter in waiters]
        if None in allowed:
            return None
        return max((seconds for seconds in allowed if seconds is not None), default=None)

    def wanted(self) -> int:
        """Dials that the queue needs; but one at a time while they fail, or lead to a server that allows no streams."""
        if not self.streams or self.pause > PAUSES[0]:
            return min(self.waiting, 1)
        return -(-self.waiting // self.streams)

    def enqueue(self, waiter: Waiter) -> None:
        """In order of arrival: what was open on another connection goes before what came later."""
        if waiter.again is None:
            self.queue.append(waiter)
        else:
            place = bisect(self.queue, waiter.request.arrival, key=lambda other: other.request.arrival)
            self.queue.insert(place, waiter)
        self.waiting += 1

    def give_up(self, waiter: Waiter) -> None:
        """It is not to be served any more."""
        if not waiter.gone:
            waiter.gone = True
            self.waiting -= 1

    def leave(self, waiter: Waiter) -> None:
        """It was served, or gives up."""
        if waiter.stream is None and waiter.error is None:
            self.give_up(waiter)
        while self.queue and self.queue[0].gone:
            self.queue.popleft()
        if len(self.queue) > 2 * self.waiting + 64:
            # Those who gave up behind somebody who waits for long would fill it.
            self.queue = deque(waiter for waiter in self.queue if not waiter.gone)
