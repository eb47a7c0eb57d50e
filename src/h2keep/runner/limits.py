"""How many connections a pool may have, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from h2keep.runner.request import is_seconds

__all__ = ["Limits"]


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
