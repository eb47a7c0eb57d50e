"""How much to hand to the socket at once (K5).

What lies in the kernel's buffer can't be overtaken, so a PING must never find minutes of an upload there. The budget
follows the rate at which the socket takes bytes: a quarter of a second's worth.
"""

from __future__ import annotations

__all__ = ["WritePacer"]

_SECONDS = 0.25
_LEAST = 16 * 1024
_MOST = 256 * 1024
_FIRST = 64 * 1024
#: The rate is measured over at least this long, in seconds: a socket takes its bytes in bursts.
_MEASURE = 0.05


class WritePacer:
    """Sizes writes by the socket's rate, as far as it is known."""

    __slots__ = ("_since", "_written", "budget")

    def __init__(self) -> None:
        #: Bytes to hand over at once.
        self.budget = _FIRST
        self._since: float | None = None
        self._written = 0

    def note_written(self, amount: int, now: float) -> bool:
        """The socket took bytes; whether the budget changed."""
        if self._since is None:
            self._since = now
        self._written += amount
        elapsed = now - self._since
        if elapsed < _MEASURE:
            return False
        rate = self._written / elapsed
        self._since, self._written = now, 0
        before, self.budget = self.budget, max(_LEAST, min(_MOST, int(rate * _SECONDS)))
        return self.budget != before

    def note_idle(self) -> None:
        """There is nothing to write, so what follows says nothing about the rate until now."""
        self._since = None
        self._written = 0
