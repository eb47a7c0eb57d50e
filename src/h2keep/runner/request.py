"""A request as the runner passes it on, from a front door to a connection, and perhaps to another connection."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from h2keep.protocol.events import Headers
    from h2keep.runner.dial import Origin

__all__ = ["REPLAY_BUFFER", "Head", "PoolRequest", "Timeout", "is_seconds"]

#: How much of a streamed body is kept by default, so that it could be sent again, in bytes (K24).
REPLAY_BUFFER = 16 * 1024 * 1024
#: Any thread may ask.
_arrivals = itertools.count()


@dataclass(frozen=True, slots=True)
class Timeout:
    """The four timeouts of a request, in seconds; None waits for ever (K21).

    Raises `ValueError` if one is neither None nor a number from 0 on.
    """

    #: For a new connection, if the request waits for one: name resolution, TCP, TLS and the server's SETTINGS.
    connect: float | None = 5.0
    #: Between two pieces of the response.
    read: float | None = 5.0
    #: Between two pieces of the body that the connection takes.
    write: float | None = 5.0
    #: For room on a connection.
    pool: float | None = 5.0

    def __post_init__(self) -> None:
        for name in ("connect", "read", "write", "pool"):
            value = getattr(self, name)
            if value is not None and not is_seconds(value):
                raise ValueError(f"timeout: {name} must be None or a number of seconds from 0 on, not {value!r}")


class Head(NamedTuple):
    """What a request says before its body, checked."""

    origin: Origin
    fields: Headers
    #: As declared in the fields, None if it isn't.
    content_length: int | None


@dataclass(slots=True)
class PoolRequest:
    """A request ready to be opened on a connection."""

    origin: Origin
    fields: Headers
    content_length: int | None
    body: bytes | AsyncIterable[bytes | memoryview] | None
    timeout: Timeout
    #: How much of a streamed body to keep until the response starts, in bytes (K24).
    replay_buffer: int = REPLAY_BUFFER
    #: Its place among all requests, for when it has to queue again.
    arrival: int = field(default_factory=_arrivals.__next__)


def is_seconds(value: object) -> bool:
    """Whether it is a number that can be a length of time."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
