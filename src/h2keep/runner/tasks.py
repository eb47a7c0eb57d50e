"""The background tasks of one pool: all can be ended at once, and waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from h2keep.runner.eventloop import EventLoop

__all__ = ["Tasks"]


class Tasks:
    """Tasks that belong to nobody but their pool. They must not raise."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        #: One for each task, to end it by.
        self._scopes: set[anyio.CancelScope] = set()
        self._none: anyio.Event | None = None

    def __len__(self) -> int:
        return len(self._scopes)

    def spawn(self, run: Callable[[], Coroutine[None, None, None]]) -> None:
        """Start one. Raises `ConnectError` if the loop is shutting down."""
        scope = anyio.CancelScope()

        async def scoped() -> None:
            with scope:
                await run()

        def ended() -> None:
            self._scopes.discard(scope)
            if self._none is not None and not self._scopes:
                self._none.set()
                self._none = None

        self._loop.spawn(scoped, ended=ended)
        self._scopes.add(scope)

    def cancel(self) -> None:
        """End them all, soon."""
        for scope in self._scopes:
            scope.cancel()

    async def wait(self) -> None:
        """Wait until none is left."""
        if self._scopes:
            # Others may be waiting for it, too.
            self._none = self._none or anyio.Event()
            await self._none.wait()
