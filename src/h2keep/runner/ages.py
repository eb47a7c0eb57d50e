"""Connections that have lived for `max_connection_age` are replaced, those in use without a gap (K22)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from h2keep.runner.origin import PAUSES

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable

    from h2keep.runner.connection import Http2Connection
    from h2keep.runner.limits import ConnectionCount
    from h2keep.runner.origin import OriginState
    from h2keep.runner.tasks import Tasks

__all__ = ["Ages"]


class Ages:
    """Those of one pool.

    * `limit`: seconds, None for no end.
    * `recently`: a connection that had a request in the last so many seconds is in use.
    * `replace`: dials for an origin; the new connection, None if there is none.
    """

    def __init__(
        self,
        limit: float | None,
        recently: float,
        count: ConnectionCount,
        tasks: Tasks,
        chance: random.Random,
        replace: Callable[[OriginState], Awaitable[Http2Connection | None]],
    ) -> None:
        self._limit = limit
        self._recently = recently
        self._count = count
        self._tasks = tasks
        self._random = chance
        self._replace = replace
        #: Each ends the wait for a connection's age.
        self._waits: dict[Http2Connection, anyio.CancelScope] = {}

    def __len__(self) -> int:
        return len(self._waits)

    def begin(self, state: OriginState, connection: Http2Connection) -> None:
        """The connection is new."""
        if self._limit is not None:
            # Up to a tenth less, lest all that were made at once be replaced at once.
            age = self._limit * (1 - 0.1 * self._random.random())
            self._tasks.spawn(lambda: self._age(state, connection, age))

    def end(self, connection: Http2Connection) -> None:
        """The connection is over."""
        wait = self._waits.pop(connection, None)
        if wait is not None:
            wait.cancel()

    async def _age(self, state: OriginState, connection: Http2Connection, age: float) -> None:
        """Replace a connection when it has lived for so long; it ends when its last request has."""
        await self._live_on(state, connection, age)
        if connection.protocol.accepting:
            self._count.drain(state.draining, connection)
            await self._find_replacement(state, connection)
            connection.retire()

    async def _live_on(self, state: OriginState, connection: Http2Connection, seconds: float) -> None:
        """Sleep, until the connection ends at most."""
        if connection in state.connections:
            with anyio.CancelScope() as self._waits[connection]:
                await anyio.sleep(seconds)
            self._waits.pop(connection, None)

    async def _find_replacement(self, state: OriginState, connection: Http2Connection) -> None:
        """Connect anew, if that is of use. Until there is a replacement the old connection takes requests."""
        began = connection.loop.time()
        pause, longest = PAUSES
        while connection.protocol.accepting and self._is_wanted(state, connection):
            if self._count.below_limit():
                new = await self._replace(state)
                if new is not None and new.protocol.ready:
                    return
            elif any(other.protocol.ready and other.stats.ready_at >= began for other in state.connections):
                # One that the queue asked for has taken its place.
                return
            await self._live_on(state, connection, pause)
            pause = min(2 * pause, longest)

    def _is_wanted(self, state: OriginState, connection: Http2Connection) -> bool:
        """Whether a connection is in use, so that a replacement will be."""
        last = connection.last_request_at
        return bool(state.waiting) or (last is not None and connection.loop.time() - last < self._recently)
