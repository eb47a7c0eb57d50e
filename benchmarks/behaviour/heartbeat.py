"""Whether the machine was too busy for what was seen to mean anything.

Harness and server have next to nothing to do. When one of them wakes late, the client may have done so too, and then it
is the machine that was measured.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds by which a wake-up is late enough to spoil a cell.
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
