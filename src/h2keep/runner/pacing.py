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
    """Sizes writes by the socket's rate, as far as it is known.

    Between two pauses, which are most of the time where the peer's windows are small, there is often not enough to
    measure by. A rate with pauses in it is too low, and too high by what the kernel merely holds; less that, it is one
    that the socket reaches at least.
    """

    __slots__ = ("_paused", "_since", "_written", "budget")

    def __init__(self) -> None:
        #: Bytes to hand over at once.
        self.budget = _FIRST
        self._since: float | None = None
        self._written = 0
        self._paused = False

    def note_written(self, amount: int, now: float) -> bool:
        """The socket took bytes; whether the budget changed."""
        if self._since is None:
            self._since = now
        self._written += amount
        elapsed = now - self._since
        if elapsed < _MEASURE:
            return False
        least = self.budget if self._paused else _LEAST
        written = self._written - _MOST if self._paused else self._written
        self._since, self._written, self._paused = now, 0, False
        before, self.budget = self.budget, max(least, min(_MOST, int(written / elapsed * _SECONDS)))
        return self.budget != before

    def note_idle(self) -> None:
        """There is nothing to write, so the time until there is says nothing against the rate."""
        self._paused = self._since is not None
