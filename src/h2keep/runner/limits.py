"""How many connections a pool may have, for how long, and which of them count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from h2keep.runner.request import is_seconds

if TYPE_CHECKING:
    from collections.abc import Sized

    from h2keep.runner.connection import Http2Connection

__all__ = ["ConnectionCount", "Limits"]

#: Draining connections of one origin that never count against max_connections, at least (K22).
_FREE_DRAINING = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections, and for how long. The names and meanings are httpx's, the default expiry is longer.

    Raises `ValueError` if a number of connections is neither None nor an integer above 0 (for `max_connections`) or
    from 0 on (for `max_keepalive_connections`), or the expiry neither None nor a number from 0 on.
    """

    #: Connections at most, None for any number.
    max_connections: int | None = 100
    #: Connections at most that are kept while unused, None for any number.
    max_keepalive_connections: int | None = 20
    #: Seconds after which an unused connection is closed, None for never.
    keepalive_expiry: float | None = 300.0
    #: Seconds after which a connection is replaced, whether it is in use or not, None for never (K22).
    max_connection_age: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_connections", 1), ("max_keepalive_connections", 0)):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= least):
                raise ValueError(f"limits: {name} must be None or an integer from {least} on, not {value!r}")
        expiry = self.keepalive_expiry
        if expiry is not None and not is_seconds(expiry):
            raise ValueError(f"limits: keepalive_expiry must be None or a number of seconds from 0 on, not {expiry!r}")
        age = self.max_connection_age
        if age is not None and not (is_seconds(age) and age > 0):
            raise ValueError(f"limits: max_connection_age must be None or a number of seconds above 0, not {age!r}")


class ConnectionCount:
    """How many of a pool's `connections` count against `max_connections`: those that are being made do, too.

    Of each origin's draining ones as many don't as there may be connections (K22).
    """

    __slots__ = ("_connections", "_free", "_limit", "_most_free", "dials")

    def __init__(self, limit: int | None, connections: Sized) -> None:
        self._limit = limit
        self._connections = connections
        self._most_free = max(_FREE_DRAINING, limit or 0)
        #: Draining connections that don't count.
        self._free = 0
        #: Connections that are being made.
        self.dials = 0

    def below_limit(self) -> bool:
        """Whether another one may be made."""
        return self._limit is None or len(self._connections) - self._free + self.dials < self._limit

    def above_limit(self) -> bool:
        """Whether there are too many, those that are being made aside."""
        return self._limit is not None and len(self._connections) - self._free > self._limit

    def drain(self, draining: set[Http2Connection], connection: Http2Connection) -> None:
        """Add a connection to its origin's draining ones."""
        if connection not in draining:
            self._free += len(draining) < self._most_free
            draining.add(connection)

    def forget(self, draining: set[Http2Connection], connection: Http2Connection) -> None:
        """The connection is over: take it from its origin's draining ones if it is there."""
        if connection in draining:
            draining.discard(connection)
            self._free -= len(draining) < self._most_free
