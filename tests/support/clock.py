"""The event loops that tests run on: real time, and time that jumps.

`REAL_BACKENDS` and `VIRTUAL_BACKENDS` are parameter lists for the `anyio_backend` fixture, which hands each test a
loop and a clock of its own. It gives real time, unless a test or a module asks for the other:

    pytestmark = [pytest.mark.anyio, virtual_time]

An hour of waiting then passes at once, as soon as nobody has anything else to do, and each test begins at 0.0.
Loopback TCP with both ends in the test's own loop is safe: time doesn't jump while bytes are under way. Whatever is
outside it is not: a jump beats threads, name resolution (so write 127.0.0.1) and other processes.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import trio.testing

from support.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["REAL_BACKENDS", "VIRTUAL_BACKENDS", "Backend", "JumpSelector", "VirtualLoop", "virtual_time"]

#: How long a loop on which nothing is scheduled waits for another thread to wake it, in real seconds.
_GRACE = 1.0
#: How long to wait before looking again whether anything is under way, in real seconds.
_GLANCE = 0.001


class JumpSelector(selectors.DefaultSelector):
    """Waits for no timeout: if no file is ready, the time is at once what it would be after it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._wire = Wire()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(_GRACE if timeout is None else 0)
        if not ready and timeout is None:
            raise RuntimeError("nothing is scheduled: the test waits for something that can never happen")
        if not ready and timeout is not None and timeout > 0:
            ready = self._select_what_is_under_way()
            if not ready:
                self.now += timeout
        return ready

    def _select_what_is_under_way(self) -> list[tuple[selectors.SelectorKey, int]]:
        busy = True
        ready: list[tuple[selectors.SelectorKey, int]] = []
        while busy and not ready:
            # In this order: what has arrived meanwhile is ready.
            busy = self._wire.is_busy()
            ready = super().select(_GLANCE if busy else 0)
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
    clock: Any = trio.testing.MockClock(autojump_threshold=0)
    jump = clock._autojump
    wire = Wire()

    def jump_if_nothing_is_under_way() -> None:
        # Trio calls again at once if it finds no file ready; if nothing has changed by then, there was none.
        before = wire.seen
        if wire.is_busy():
            time.sleep(_GLANCE)
        elif wire.seen is before:
            jump()

    clock._autojump = jump_if_nothing_is_under_way
    return {"clock": clock}


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
