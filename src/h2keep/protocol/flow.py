"""Receive-window sizing: how much credit a stream gets, and when it is renewed.

A stream begins with `INITIAL_WINDOW`. Where the bandwidth-delay product shows that the window limits the stream, it
doubles, out of a budget that the connection's streams share and a larger one that the process shares, so that the
sum of what peers may send unread stays bounded whatever they do. Connection-level credit is not rationed here: it is
always returned on receipt (see `Connection`), or an unread response would stall its siblings.
"""

from __future__ import annotations

__all__ = [
    "CONNECTION_GROWTH",
    "CONNECTION_WINDOW",
    "INITIAL_WINDOW",
    "MAX_STREAMS",
    "MAX_WINDOW",
    "PROCESS_GROWTH",
    "GrowthBudget",
    "ReceiveWindow",
]

#: Credit that every stream has from its beginning, in bytes.
INITIAL_WINDOW = 128 * 1024
#: What one stream's window can grow to, in bytes.
MAX_WINDOW = 16 * 1024 * 1024
#: Streams that h2keep opens on one connection at most; times INITIAL_WINDOW this is half of CONNECTION_WINDOW.
MAX_STREAMS = 256
#: What the windows of one connection's streams may grow by, together.
CONNECTION_GROWTH = 32 * 1024 * 1024
#: What all windows in the process may grow by, together.
PROCESS_GROWTH = 256 * 1024 * 1024
#: The connection's own window: never the limit, since no more than this is promised to its streams.
CONNECTION_WINDOW = MAX_STREAMS * INITIAL_WINDOW + CONNECTION_GROWTH


class GrowthBudget:
    """A number of bytes that windows may grow by, within a parent's number."""

    __slots__ = ("_parent", "available")

    def __init__(self, limit: int, parent: GrowthBudget | None = None) -> None:
        self.available = limit
        self._parent = parent

    def take(self, wanted: int) -> bool:
        """Take `wanted` bytes here and in every parent, or nothing anywhere."""
        if wanted > self.available or (self._parent is not None and not self._parent.take(wanted)):
            return False
        self.available -= wanted
        return True

    def give_back(self, amount: int) -> None:
        """Return what was taken."""
        self.available += amount
        if self._parent is not None:
            self._parent.give_back(amount)


class ReceiveWindow:
    """One stream's receive window.

    Bytes are *consumed* when the application takes them (padding: when it arrives). Credit is renewed in batches of
    half a window, at which moments the window may also grow.
    """

    __slots__ = ("_budget", "_consumed", "_since", "size")

    def __init__(self, budget: GrowthBudget, now: float) -> None:
        #: Credit outstanding plus bytes not yet consumed, when fully renewed.
        self.size = INITIAL_WINDOW
        self._budget = budget
        self._consumed = 0
        self._since = now

    def consume(self, amount: int, now: float, rtt: float | None) -> int:
        """The increment to send now that `amount` more bytes were consumed; 0 while the batch is small.

        `rtt` is the lowest round-trip time seen, in seconds, None if never measured.
        """
        self._consumed += amount
        if self._consumed * 2 < self.size:
            return 0
        increment = self._consumed + self._growth(now, rtt)
        self._consumed = 0
        self._since = now
        return increment

    def _growth(self, now: float, rtt: float | None) -> int:
        # Limited by its window, a stream delivers one window per round trip. The factor two makes up for an RTT
        # measured on an idle path and for consumption that lags behind arrival.
        if rtt is None or 2 * self._consumed * rtt <= self.size * (now - self._since):
            return 0
        wanted = min(self.size, MAX_WINDOW - self.size)
        if wanted == 0 or not self._budget.take(wanted):
            return 0
        self.size += wanted
        return wanted

    def release(self) -> None:
        """The stream is over: give back what its window had grown by."""
        if self.size != INITIAL_WINDOW:
            self._budget.give_back(self.size - INITIAL_WINDOW)
            self.size = INITIAL_WINDOW
