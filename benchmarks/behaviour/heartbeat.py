"""Whether the machine was too busy for what was seen to mean anything.

Harness and server have next to nothing to do: when one of them wakes late, it is the machine that was measured. Of a
client, which may be anybody's program, the system knows how long it was ready to run and had to wait.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds by which a wake-up is late enough to spoil a cell, or which a client has to wait in all.
LATE = 0.3
_INTERVAL = 0.05


async def heartbeat(late: Callable[[float], object]) -> None:
    """Tell of every wake-up that was late, and by how many seconds; for ever."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _INTERVAL
        await asyncio.sleep(_INTERVAL)
        if (by := loop.time() - due) > LATE:
            late(by)


def waited(pid: int) -> float:
    """For how many seconds the busiest of a process's threads was ready to run and didn't; 0 where it isn't known."""
    delays = [0.0]
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            delays.append(int(file.read_text().split()[1]) / 1e9)
        except OSError:
            # The thread has ended.
            continue
    return max(delays)
