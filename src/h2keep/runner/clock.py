"""Time that the monotonic clock doesn't see (K25).

Event loops sleep, and time out, on a clock that stands still while the machine sleeps. `GapWatch` compares it with one
that doesn't, at each wake-up, and reports what grew apart. It never calls back: whoever wakes up asks.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["UNBROKEN", "GapWatch", "suspend_counting_clock"]

#: Less than this is scheduling, not sleep, in seconds.
_SUSPENDED = 1.0
#: A wall clock that jumps ahead by more than this may be a restored snapshot, in seconds.
_WALL_JUMP = 5.0
#: What `GapWatch.check` says nearly always.
UNBROKEN = (0.0, False)


def suspend_counting_clock() -> Callable[[], float]:
    """The platform's monotonic clock that goes on while the machine sleeps."""
    # Linux names it CLOCK_BOOTTIME; on macOS CLOCK_MONOTONIC is the one, and time.monotonic() is not.
    for name in ("CLOCK_BOOTTIME", "CLOCK_MONOTONIC"):
        clock = getattr(time, name, None)
        if clock is not None:
            return functools.partial(time.clock_gettime, clock)
    return time.monotonic


#: One for all connections, of which there may be thousands.
_suspend_counting = suspend_counting_clock()


class GapWatch:
    """Says how much time passed unseen since it was last asked."""

    __slots__ = ("_offset", "_suspended", "_wall", "_wall_offset")

    def __init__(
        self,
        now: Callable[[], float],
        suspended: Callable[[], float] = _suspend_counting,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._suspended = suspended
        self._wall = wall
        at = now()
        self._offset = self._suspended() - at
        self._wall_offset = wall() - at

    def check(self, now: float) -> tuple[float, bool]:
        """Seconds of suspension since the last call (0.0 if none), and whether the wall clock jumped ahead.

        `UNBROKEN` itself if neither.
        """
        offset = self._suspended() - now
        wall_offset = self._wall() - now
        gap = offset - self._offset
        jumped = wall_offset - self._wall_offset > _WALL_JUMP
        self._offset = offset
        self._wall_offset = wall_offset
        if gap > _SUSPENDED:
            return gap, jumped
        return (0.0, True) if jumped else UNBROKEN
