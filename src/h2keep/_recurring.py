"""What a client remembers of its requests, so that it needn't look again at what it has looked at twice.

URLs that never come again are many. What is kept of them is kept in vain, and the garbage collector goes through it,
once or twice, before it is let go of; with thousands of requests in flight that is much of what a request costs.
"""

from __future__ import annotations

from typing import Generic, TypeVar

__all__ = ["LONGEST", "Recurring"]

#: The most bytes that there may be in what is remembered of a request, as its key or otherwise.
LONGEST = 4_096
#: How many kinds of requests are remembered, and how many are recognised when they come for the second time.
_MOST = 256
_MOST_MET = 1_024

T = TypeVar("T")


class Recurring(dict[object, T], Generic[T]):
    """What is known of requests, by what they say. It may hold secrets, so it is to live no longer than the client."""

    def __init__(self) -> None:
        super().__init__()
        # Hashes, which hold nothing.
        self._met: set[int] = set()

    def offer(self, key: object, known: T, size: int) -> None:
        """Keep this if the key has been offered before, and if it isn't too long: `size` is its bytes and the key's."""
        if size > LONGEST:
            return
        met = hash(key)
        if met in self._met:
            if len(self) >= _MOST:
                self.clear()
            self[key] = known
            return
        if len(self._met) >= _MOST_MET:
            self._met.clear()
        self._met.add(met)
