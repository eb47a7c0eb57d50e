"""One request's mailbox: the task that made the request waits here for its response.

The connection fills it; only the requesting task (and the task that pumps its body) waits on it. Leaving early, by
`close` or by cancellation, resets the stream and touches nothing else.

A request that its server provably didn't process moves to another connection, and its mailbox with it (K24): whoever
waits here doesn't notice. The body's iterator goes on being pulled by the one task that began with it, and what it gave
so far is kept until the response starts, as far as `replay_buffer` allows.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import anyio

from h2keep.errors import H2KeepError, ReadError, WriteError
from h2keep.runner.upload import pump

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable

    from h2keep.protocol import events
    from h2keep.protocol.events import Headers
    from h2keep.runner.connection import Http2Connection
    from h2keep.runner.eventloop import Parker
    from h2keep.runner.request import PoolRequest

__all__ = ["Http2Stream"]

#: Kept chunks smaller than this are joined: as objects of their own they would take more than their bytes.
_SMALL_CHUNK = 1024


class Http2Stream:
    """A request on a connection, and its response as it comes in."""

    __slots__ = (
        "_awaited",
        "_complete",
        "_connection",
        "_kept",
        "_kept_size",
        "_parker",
        "_released",
        "_replayable",
        "_room",
        "_trailers",
        "_upload_failure",
        "_upload_scope",
        "_wake",
        "attached",
        "attempts",
        "data_waits",
        "ended",
        "error",
        "headers",
        "id",
        "request",
        "retry_scope",
        "status",
    )

    def __init__(self, connection: Http2Connection, stream_id: int, request: PoolRequest) -> None:
        self._connection = connection
        self.id = stream_id
        self.request = request
        #: How often it was opened, and whether it is: not between two attempts.
        self.attempts = 1
        self.attached = True
        #: Ends the wait for another connection.
        self.retry_scope: anyio.CancelScope | None = None
        self.status: int | None = None
        self.headers: Headers
        self._trailers: Headers | None = None
        self.data_waits = False
        self.ended = False
        self.error: H2KeepError | None = None
        # How whoever waits is told: one of the two, neither before anybody does.
        self._parker: Parker | None = None
        self._wake: Callable[[], None] | None = None
        self._released = False
        # The read clock runs, as it does from the beginning.
        self._awaited = True
        self._room: anyio.Event | None = None
        self._upload_scope: anyio.CancelScope | None = None
        self._upload_failure: BaseException | None = None
        # What a streamed body gave so far, and whether that is all that it gave.
        self._kept: list[bytes | bytearray | memoryview] | None = None
        self._kept_size = 0
        self._replayable = True
        self._complete = False

    @property
    def connection(self) -> Http2Connection:
        """The connection that serves this request."""
        return self._connection

    def wake(self) -> None:
        """Something about this stream changed."""
        if self._parker is not None:
            self._parker.unpark()
        elif self._wake is not None:
            self._wake()

    # Events, for the connection, which wakes whoever waits when it has told all that came at once

    def head_came(self, event: events.ResponseReceived) -> None:
        """The response has started: the request won't be sent again."""
        self._awaited = False
        self.status = event.status
        self.headers = event.headers
        self._let_go_of_request()

    def data_came(self, _event: events.DataReceived) -> None:
        """Bytes of the body wait on the connection."""
        self._awaited = False
        self.data_waits = True

    def response_ended(self, event: events.StreamEnded) -> None:
        """The response is complete."""
        self._trailers = event.trailers
        self.ended = True

    # For the connection and the pool

    @property
    def trailers(self) -> Headers:
        """Those of the response, none before its end."""
        return self._trailers or []

    def fail(self, error: H2KeepError) -> None:
        """The request failed; the body iterator is not pulled any more (K8)."""
        if self.attempts > 1:
            error.args = (f"{error}; {self.attempts} attempts were made",)
        self.error = error
        if self._upload_scope is not None:
            self._upload_scope.cancel()
        self.wake()

    @property
    def replayable(self) -> bool:
        """Whether the request could be sent once more: nobody has given it up, and all of its body is there."""
        if self._released or self.status is not None or self._upload_failure is not None:
            return False
        return self._replayable

    def detach(self) -> None:
        """The connection has let go of the request, which waits for another one."""
        self.attached = False

    def attach(self, connection: Http2Connection, stream_id: int) -> None:
        """The request is open on another connection: send there what was sent before."""
        self._connection = connection
        self.id = stream_id
        self.attempts += 1
        self.attached = self._awaited = True
        room = True
        for chunk in self._kept or ():
            # What is queued is queued by reference, and mustn't grow any more.
            fixed = bytes(chunk) if isinstance(chunk, bytearray) else chunk
            room = connection.send_data(stream_id, fixed, end_stream=False)
        if self._complete:
            connection.send_data(stream_id, b"", end_stream=True)
        elif room:
            self.room_came()
        # Whoever waits begins to wait for this connection.
        self.wake()

    def room_came(self) -> None:
        """The body's next chunk is welcome, or nobody wants it any more."""
        if self._room is not None:
            self._room.set()

    # For the requesting task

    def wait(self) -> Awaitable[None]:
        """Wait for something about this stream to change. Whoever is cancelled meanwhile closes it."""
        self.await_data()
        if self._parker is None:
            self._parker = self._connection.loop.parker()
        return self._parker.park()

    async def receive(self) -> bytes:
        """The next body bytes; b"" at the end.

        A failed request first hands out what came before it failed (K8). Raises `ReadError` after `close`.
        """
        try:
            while (data := self.poll()) is None:
                await self.wait()
        except BaseException:
            self.close()
            raise
        return data

    # The same without waiting, for whoever has another way to wait, or need not wait

    def take_whole(self) -> bytes | None:
        """The body, and with it the end of this stream; None unless all of it is there and none of it was taken."""
        if not self.ended or self._released:
            return None
        data = self._connection.take_whole(self)
        if data is not None:
            self._released = True
            self._wake = None
            if self._upload_scope is not None:
                # The connection wants no more of the body, but its iterator may be in the middle of a long wait.
                self._upload_scope.cancel()
        return data

    def wake_by(self, wake: Callable[[], None]) -> None:
        """Call this whenever something about the stream changed, in the place of waking a task."""
        self._wake = wake

    def has_head(self) -> bool:
        """Whether the response's head is there. Raises what the request failed with."""
        if self.status is None:
            self._raise_failure()
        return self.status is not None

    def poll(self) -> bytes | None:
        """As `receive`, but None if nothing waits."""
        if self.data_waits and not self._released:
            data, self.data_waits = self._connection.read(self.id)
            if data:
                return data
        if self.ended and not self.data_waits:
            self.close()
            return b""
        self._raise_failure()
        if self._released:
            raise ReadError("the response was closed before its body was read to the end")
        return None

    def await_data(self) -> None:
        """Somebody waits for what `has_head` or `poll` has not given yet: the read clock runs (K21)."""
        if not self._awaited:
            self._awaited = True
            self._connection.await_data(self.id)

    def close(self) -> None:
        """The requesting task is done with this stream; RST_STREAM(CANCEL) goes out if it is still open. Idempotent."""
        if self._released:
            return
        self._released = True
        if self._upload_scope is not None:
            self._upload_scope.cancel()
        if self.retry_scope is not None:
            self.retry_scope.cancel()
        if self.status is None:
            self._let_go_of_request()
        # Another task may wait for the body.
        if self._parker is not None and not self.ended:
            self._parker.unpark()
        # Whom it would wake refers to it in turn, and a cycle would live until the next garbage collection.
        self._wake = None
        self._connection.release(self)

    def give_up(self) -> None:
        """Whoever has the response forgot it. From any thread, at any moment; takes no lock and doesn't wait."""
        # A request that failed is open no more, but its connection still counts it as unread.
        if not (self._released or self._connection.reaped):
            # RuntimeError: the loop has ended, and the stream with it.
            with contextlib.suppress(RuntimeError):
                self._connection.loop.call_from_thread(self.close)

    def _raise_failure(self) -> None:
        if self._upload_failure is not None:
            raise self._upload_failure
        if self.error is not None:
            raise self.error

    # Uploading

    async def pump(self, body: AsyncIterable[bytes | memoryview]) -> None:
        """Send the body as there is room. Never raises an Exception: the requester gets it."""
        with anyio.CancelScope() as self._upload_scope:
            if self._released or self.error is not None:
                self._upload_scope.cancel()
            try:
                await pump(body, self)
            except anyio.get_cancelled_exc_class() as cancelled:
                if not self._upload_scope.cancel_called:
                    # asyncio only: what the iterator awaited was cancelled, or the loop is shutting down.
                    failure = WriteError("the body's iterator was cancelled")
                    failure.__cause__ = cancelled
                    self._give_up(failure)
                raise
            except BaseException as failure:  # noqa: BLE001
                # A KeyboardInterrupt from the user's iterator belongs to the user's task too.
                self._give_up(failure)
        self._upload_scope = None

    def _give_up(self, failure: BaseException) -> None:
        if self.ended and isinstance(failure, Exception):
            # The response stands (K8): whoever is done with it ends the upload as well.
            return
        self._upload_failure = failure
        # What waits of the response goes with the stream.
        self.ended = False
        self._connection.release(self)
        self.wake()

    async def send(self, chunk: bytes | memoryview) -> None:
        """Sink."""
        self._keep(chunk)
        self._room = anyio.Event()
        if not (self.attached and self._connection.send_data(self.id, chunk, end_stream=False)):
            await self._room.wait()
        self._room = None

    def _keep(self, chunk: bytes | memoryview) -> None:
        if not self._replayable:
            return
        if self._kept is None:
            self._kept = []
        self._kept_size += len(chunk)
        if self._kept_size > self.request.replay_buffer and self.attached:
            self._kept = None
            self._replayable = False
        elif len(chunk) >= _SMALL_CHUNK:
            self._kept.append(chunk)
        elif self._kept and isinstance(self._kept[-1], bytearray):
            self._kept[-1] += chunk
        else:
            self._kept.append(bytearray(chunk))

    def _let_go_of_request(self) -> None:
        """It won't be sent again. Whoever still sends its body holds that himself."""
        self._kept = None
        self._replayable = False
        self.request.body = None
        self.request.fields = []

    def wanted(self) -> bool:
        """Sink."""
        return not self.attached or self._connection.wants_body(self.id)

    def finish(self) -> None:
        """Sink."""
        self._complete = True
        if self.attached:
            self._connection.send_data(self.id, b"", end_stream=True)
