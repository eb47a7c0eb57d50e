"""The event loops that tests run on: real time, and time that jumps.

`REAL_BACKENDS` and `VIRTUAL_BACKENDS` are parameter lists for the `anyio_backend` fixture, which hands each test a
loop and a clock of its own. It gives real time, unless a test or a module asks for the other:

    pytestmark = [pytest.mark.anyio, virtual_time]

An hour of waiting then passes at once, as soon as nobody has anything else to do, and each test begins at 0.0.
Loopback TCP with both ends in the test's own loop is safe. Whatever is outside it is not: a jump beats threads, name
resolution (so write 127.0.0.1) and other processes.
"""

from __future__ import annotations

import asyncio
import selectors
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import trio.testing

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["REAL_BACKENDS", "VIRTUAL_BACKENDS", "Backend", "JumpSelector", "VirtualLoop", "virtual_time"]

#: How long a loop on which nothing is scheduled waits for another thread to wake it, in real seconds.
_GRACE = 1.0


class JumpSelector(selectors.DefaultSelector):
    """Waits for no timeout: if no file is ready, the time is at once what it would be after it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(_GRACE if timeout is None else 0)
        if not ready and timeout is None:
            raise RuntimeError("nothing is scheduled: the test waits for something that can never happen")
        if not ready and timeout is not None and timeout > 0:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop that reads the time off its selector."""

    def __init__(self) -> None:
        self._jumps = JumpSelector()
        super().__init__(self._jumps)

    def time(self) -> float:
        return self._jumps.now

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the executor in real time; the original's time limit would pass at once, and warn."""
        executor: Any = getattr(self, "_default_executor", None)
        if executor is not None:
            executor.shutdown(wait=True)


@dataclass(frozen=True)
class Backend:
    """One kind of event loop; `fresh` gives what anyio's pytest plugin wants, with a clock that nobody used before."""

    name: str
    options: Callable[[], dict[str, Any]] = dict
    virtual: bool = False

    def fresh(self) -> tuple[str, dict[str, Any]]:
        return self.name, self.options()


def _autojump() -> dict[str, Any]:
    return {"clock": trio.testing.MockClock(autojump_threshold=0)}


REAL_BACKENDS = [
    pytest.param(Backend("asyncio"), id="asyncio"),
    pytest.param(Backend("trio"), id="trio"),
]
VIRTUAL_BACKENDS = [
    pytest.param(Backend("asyncio", lambda: {"loop_factory": VirtualLoop}, virtual=True), id="asyncio-virtual"),
    pytest.param(Backend("trio", _autojump, virtual=True), id="trio-virtual"),
]

#: The mark for tests on virtual time.
virtual_time = pytest.mark.parametrize("anyio_backend", VIRTUAL_BACKENDS, indirect=True)
