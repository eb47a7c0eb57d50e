"""Requests on their way from one connection to another: those that a server provably didn't process (K24).

A task of its own waits for each until a connection has room for it; the request's own task doesn't notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from h2keep.errors import ConnectError, H2KeepError, StreamReset
from h2keep.runner.connection import log

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable

    from h2keep.runner.request import PoolRequest
    from h2keep.runner.stream import Http2Stream
    from h2keep.runner.tasks import Tasks

__all__ = ["Moves"]

#: A request is sent again this many times at most.
_MOST_MOVES = 3
#: Before a request that was refused (REFUSED_STREAM) is sent again: at most this long at first, and at least half as
#: long, in seconds.
_REFUSED_DELAY = 0.1


class Moves:
    """Those of one pool. `reopen` waits for a connection with room and opens a request there."""

    def __init__(
        self, tasks: Tasks, chance: random.Random, reopen: Callable[[PoolRequest, Http2Stream], Awaitable[object]]
    ) -> None:
        self._tasks = tasks
        self._random = chance
        self._reopen = reopen
        self._under_way = 0

    def __len__(self) -> int:
        return self._under_way

    def begin(self, stream: Http2Stream, error: H2KeepError) -> bool:
        """Send a request again, which failed with the error; False if that can't be tried."""
        if stream.attempts > _MOST_MOVES:
            return False
        scope = stream.retry_scope = anyio.CancelScope()
        try:
            self._tasks.spawn(lambda: self._move(stream, error, scope))
        except ConnectError:
            # The event loop is shutting down.
            return False
        self._under_way += 1
        log.debug("%s: a request is sent again, which wasn't processed: %s", stream.request.origin, error)
        return True

    async def _move(self, stream: Http2Stream, error: H2KeepError, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                if isinstance(error, StreamReset):
                    await anyio.sleep(self._random.uniform(0.5, 1.0) * _REFUSED_DELAY * 2 ** (stream.attempts - 1))
                if stream.replayable:
                    await self._reopen(stream.request, stream)
        except H2KeepError as failure:
            # What kept it from being sent again is the news; why that was necessary is its cause.
            failure.__cause__ = failure.__cause__ or error
            stream.fail(failure)
        except BaseException:
            if not stream.attached:
                stream.fail(error)
            raise
        finally:
            self._under_way -= 1
            # Its new connection may have failed before this task noticed that there was one.
            if stream.retry_scope is scope:
                stream.retry_scope = None
