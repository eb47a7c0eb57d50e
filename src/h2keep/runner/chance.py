"""Where PINGs' payloads, their jitter, and the pool's delays come from: the kernel's randomness.

A generator of our own would go on alike in both copies of a snapshot, and on both sides of a fork (K15).
"""

from __future__ import annotations

import os
import random

__all__ = ["KernelRandom"]


class KernelRandom(random.SystemRandom):
    """The kernel is asked once for a PING's payload and for the fraction that is drawn with it."""

    def __init__(self) -> None:
        super().__init__()
        self._spare = b""

    def randbytes(self, n: int) -> bytes:
        """See `random.Random.randbytes`."""
        fetched = os.urandom(n + 4)
        self._spare = fetched[n:]
        return fetched[:n]

    def random(self) -> float:
        """See `random.Random.random`; the next fraction after `randbytes` was fetched together with these."""
        spare, self._spare = self._spare, b""
        return int.from_bytes(spare or os.urandom(4)) / 2**32
