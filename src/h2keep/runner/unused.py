"""Connections on which no request is open or unread: how many are kept, and for how long.

The pool says which these are; here they are counted, and closed when they are too many or too old.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from h2keep.runner.connection import Http2Connection
    from h2keep.runner.eventloop import EventLoop
    from h2keep.runner.limits import Limits

__all__ = ["UnusedConnections"]


class UnusedConnections:
    """Those of one pool, the one that has been unused for longest first. `spawn` starts the pool's background tasks."""

    def __init__(
        self, limits: Limits, loop: EventLoop, spawn: Callable[[Callable[[], Coroutine[None, None, None]]], None]
    ) -> None:
        self._most = limits.max_keepalive_connections
        self._expiry = limits.keepalive_expiry
        self._loop = loop
        self._spawn = spawn
        self._connections: OrderedDict[Http2Connection, None] = OrderedDict()
        self._expiring = False

    def __len__(self) -> int:
        return len(self._connections)

    def __contains__(self, connection: Http2Connection) -> bool:
        return connection in self._connections

    def __iter__(self) -> Iterator[Http2Connection]:
        return iter(self._connections)

    def add(self, connection: Http2Connection) -> bool:
        """It is unused; whether it was not before, and is to be kept."""
        kept = connection not in self._connections
        if kept:
            self._connections[connection] = None
            if self._most is not None and len(self._connections) > self._most:
                self.close_oldest()
                kept = False
        expiry = self._expiry
        if expiry is not None and self._connections and not self._expiring:
            self._expiring = True
            self._spawn(lambda: self._expire(expiry))
        return kept

    def discard(self, connection: Http2Connection) -> None:
        """It is used, or over."""
        self._connections.pop(connection, None)

    def close_oldest(self) -> None:
        """Close the one that has been unused for longest. There must be one."""
        next(iter(self._connections)).close()

    def close(self) -> None:
        """Close them all."""
        for connection in list(self._connections):
            connection.close()

    async def _expire(self, expiry: float) -> None:
        """Close those that have been unused for so long; ends when there are none, but not before."""
        try:
            # Nobody's time is up sooner. Most that are unused are used again at once, and each time would begin anew.
            await anyio.sleep(expiry)
            while self._connections:
                oldest = next(iter(self._connections))
                assert oldest.idle_since is not None
                due = oldest.idle_since + expiry
                if self._loop.time() >= due:
                    oldest.close()
                    continue
                await anyio.sleep_until(due)
        finally:
            self._expiring = False
