"""A look for what a test leaves behind: tasks and sockets.

    async with no_leaks(): ...                                  # around part of a test
    pytestmark = [..., pytest.mark.usefixtures("leak_check")]   # around each test of a module

What background threads own is seen only where it is a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import pytest
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

__all__ = ["leak_check", "no_leaks", "open_sockets", "running_tasks"]

#: Scheduler passes in which what was closed may come to its end.
_PASSES = 50


def open_sockets() -> dict[int, str]:
    """The process's sockets by descriptor; none where there is no /proc."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                if target.startswith("socket:"):
                    found[int(name)] = target
    return found


def running_tasks() -> set[Any]:
    """The loop's tasks, trio's system tasks included, those of anyio's pytest plugin excluded."""
    if "trio" in sys.modules and trio.lowlevel.in_trio_run():
        root = trio.lowlevel.current_root_task()
        pending = [] if root is None else [root]
        tasks = set()
        while pending:
            task = pending.pop()
            tasks.add(task)
            pending.extend(child for nursery in task.child_nurseries for child in nursery.child_tasks)
        return tasks
    return {task for task in asyncio.all_tasks() if "TestRunner." not in repr(task.get_coro())}


@contextlib.asynccontextmanager
async def no_leaks() -> AsyncIterator[None]:
    """Fail if, at the end, there are more tasks or sockets than at the beginning."""
    tasks, sockets = running_tasks(), set(open_sockets().values())
    yield
    for _ in range(_PASSES):
        if running_tasks() <= tasks:
            break
        await anyio.lowlevel.checkpoint()
    gc.collect()
    await anyio.lowlevel.checkpoint()
    left_tasks = running_tasks() - tasks
    left_sockets = {number: name for number, name in open_sockets().items() if name not in sockets}
    if left_tasks or left_sockets:
        raise AssertionError(f"left behind: tasks {left_tasks}, sockets {left_sockets}")


@pytest.fixture
async def leak_check() -> AsyncIterator[None]:
    """`no_leaks` around the test and the async fixtures that it asks for after this one."""
    async with no_leaks():
        yield


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> Iterator[None]:
    """What there is before a module's tests, the libraries above all, is not visited again by every look for leaks."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
