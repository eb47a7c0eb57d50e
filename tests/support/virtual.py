"""Event loops whose time jumps: half an hour of silence passes in a millisecond.

`VIRTUAL` and `REAL` are parameter lists for an `anyio_backend` fixture. Under virtual time both ends of a connection
must live in the test's own loop, and threads and name resolution must be kept out: a jump beats them.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

import pytest
import trio.testing

__all__ = ["REAL", "VIRTUAL"]


class _JumpSelector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0 if timeout is not None else 1.0)
        if not events and timeout is None:
            raise RuntimeError("nothing is scheduled: the test waits for what will never happen")
        if not events and timeout:
            self.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop on a clock of its own."""

    def __init__(self) -> None:
        self._jumps = _JumpSelector()
        super().__init__(self._jumps)

    def time(self) -> float:
        return self._jumps.now

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """The real one's time limit would be virtual."""


REAL = [pytest.param(("asyncio", {}), id="asyncio"), pytest.param(("trio", {}), id="trio")]


VIRTUAL = [
    pytest.param(("asyncio", {"loop_factory": VirtualLoop}), id="asyncio-virtual"),
    pytest.param(("trio", "virtual"), id="trio-virtual"),
]


def backend(param: tuple[str, Any]) -> tuple[str, dict[str, Any]]:
    """What anyio's plugin is to be given for a parameter of `REAL` or `VIRTUAL`."""
    name, options = param
    return name, {"clock": trio.testing.MockClock(autojump_threshold=0)} if options == "virtual" else dict(options)
