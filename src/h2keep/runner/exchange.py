"""One request on the background loop, made from another thread or another event loop.

The loop's side opens the stream and fills the exchange as the response comes; the caller's side takes from it, and is
woken only if it waits. Both sides touch plain attributes and deques, each of which one of them alone writes, so nothing
is locked. Bodies flow both ways in bounded pieces: a download that the caller doesn't take stays on the wire; an
upload's iterator is pulled in the caller's own thread or task, and no further than there is room.
"""

from __future__ import annotations

import contextvars
import functools
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Self

import anyio

from h2keep.errors import ConnectError, H2KeepError, ReadError, WriteError
from h2keep.runner import background, eventloop
from h2keep.runner.feed import Feed
from h2keep.runner.upload import checked, pump

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Iterator

    from h2keep.protocol.events import Headers
    from h2keep.runner.background import Lease
    from h2keep.runner.connection import Http2Connection
    from h2keep.runner.request import PoolRequest
    from h2keep.runner.stream import Http2Stream

__all__ = ["AwaitableExchange", "BlockingExchange"]

#: Bytes of a response that wait for the caller at most (and what one read may bring beyond).
_MOST_UNTAKEN = 1024 * 1024


class Exchange(ABC):
    """A request and its response; see the module's docstring. Subclasses say how the caller waits."""

    def __init__(self, lease: Lease, request: PoolRequest) -> None:
        self.status: int | None = None
        self.headers: Headers = []
        self.trailers: Headers = []
        self.error: BaseException | None = None
        self._lease = lease
        self._loop = lease.loop
        self._request = request
        self._closed = False
        self._feed: Feed | None = None
        # Written by the loop's side alone.
        self._chunks: deque[bytes] = deque()
        self._came = 0
        self._ended = False
        self._stream: Http2Stream | None = None
        self._rung = False
        self._scope: anyio.CancelScope | None = None
        # Written by the caller's side alone.
        self._answered = False
        self._taken = 0
        self._abandoned = False
        # Set by the caller's side, cleared by whoever wakes it.
        self._waiting = False
        # Somebody is on the way into the wait, in it, or on the way out.
        self._occupied = False
        # Set by the loop's side, cleared by the caller's.
        self._held_back = False

    @property
    def id(self) -> int:
        """The stream's number; 0 before there is one."""
        return 0 if self._stream is None else self._stream.id

    @property
    def connection(self) -> Http2Connection:
        """The connection that serves this request, once the response's head is there."""
        assert self._stream is not None
        return self._stream.connection

    # The loop's side

    def _start(self) -> None:
        if self._abandoned or self._lease.exiting:
            return
        try:
            if self._loop.dead:
                raise ConnectError("h2keep's background loop has ended")
            stream = self._lease.pool().open_now(self._request)
            if stream is None:
                self._loop.spawn(self._open_in_turn)
                return
            self._stream = stream
            stream.wake_by(self._ring)
            # Nothing else can have come yet.
            if stream.error is not None:
                self._advance()
        except Exception as error:  # noqa: BLE001
            # Whatever it was is the caller's to know.
            self._fail(error)

    async def _open_in_turn(self) -> None:
        with anyio.CancelScope() as self._scope:
            if self._abandoned:
                return
            try:
                self._attach(await self._lease.pool().open(self._request))
            except Exception as error:  # noqa: BLE001
                self._fail(error)
            except BaseException:
                self._fail(ReadError("h2keep's background loop is shutting down", unprocessed=True))
                raise
        self._scope = None

    def _attach(self, stream: Http2Stream) -> None:
        self._stream = stream
        if self._abandoned:
            stream.close()
            return
        stream.wake_by(self._ring)
        self._advance()

    def _ring(self) -> None:
        """The stream changed: look at it when all that came with it has been dispatched."""
        if not self._rung:
            self._rung = True
            self._loop.ring(self._answer)

    def _answer(self) -> None:
        self._rung = False
        self._advance()

    def _advance(self) -> None:
        """Take over what came, as far as the caller keeps up, and wake the caller if it waits for that."""
        stream = self._stream
        if stream is None or self._ended or self.error is not None or self._abandoned:
            return
        try:
            if self.status is None and stream.has_head():
                self.headers = stream.headers
                self.status = stream.status
            if self.status is not None:
                self._take_over(stream)
            elif self._waiting:
                stream.await_data()
        except Exception as error:  # noqa: BLE001
            stream.close()
            self._fail(error)
        self._wake_if_served()

    def _take_over_whole(self, stream: Http2Stream) -> bool:
        """Take over a body that is all there, and its end, in one step; whether that could be done."""
        whole = stream.take_whole()
        if whole is None:
            return False
        if whole:
            self._came = len(whole)
            self._chunks.append(whole)
        self.trailers = stream.trailers
        self._ended = True
        return True

    def _take_over(self, stream: Http2Stream) -> None:
        if not self._came and self._take_over_whole(stream):
            return
        while self._came - self._taken < _MOST_UNTAKEN:
            data = stream.poll()
            if data is None:
                if self._waiting and self._blocked():
                    stream.await_data()
                return
            if not data:
                self.trailers = stream.trailers
                self._ended = True
                return
            self._came += len(data)
            self._chunks.append(data)
        self._held_back = True

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self._wake_if_served()

    def _wake_if_served(self) -> None:
        if self._waiting and not self._blocked():
            self._waiting = False
            self._notify()

    def _abandon(self) -> None:
        if self._loop.dead:
            return
        if self._scope is not None:
            self._scope.cancel()
        if self._stream is not None:
            self._stream.close()
        # Another thread or task may be reading what this one has closed.
        self._wake_if_served()

    @abstractmethod
    def _notify(self) -> None:
        """Wake the caller."""

    # The caller's side

    def _occupy(self) -> None:
        """Only one can wait at a time. Raises RuntimeError for the second, who would never be woken."""
        if self._occupied:
            raise RuntimeError(eventloop.BUSY)
        self._occupied = True

    def _post(self, job: Callable[[], None]) -> None:
        self._loop.post(job)
        if self._loop.dead and self._blocked() and not self._lease.exiting:
            raise ReadError("the event loop that this request belongs to is no more, or is another process's")

    def _blocked(self) -> bool:
        """Whether there is nothing to take: neither the response's head nor, once the caller has that, body bytes."""
        if self.error is not None or self._ended or self._closed:
            return False
        return self._came == self._taken if self._answered else self.status is None

    def _take(self) -> bytes | None:
        """The bytes that wait; b"" at the end; None if there is nothing yet. Raises what the request failed with."""
        # Looked at first: what comes between this and the look at the chunks is not the end yet.
        ended, error = self._ended, self.error
        count = len(self._chunks)
        if self._closed and (count or not ended):
            raise ReadError("the response was closed before its body was read to the end")
        if count:
            popleft = self._chunks.popleft
            data = popleft() if count == 1 else b"".join([popleft() for _ in range(count)])
            self._taken += len(data)
            if self._held_back:
                self._held_back = False
                self._loop.post(self._advance)
            return data
        if error is not None:
            raise _own(error)
        return b"" if ended else None

    def take_whole(self) -> bytes | None:
        """As `Http2Stream.take_whole`."""
        if not self._ended or self._closed or self._taken:
            return None
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._taken = len(data)
        self.close()
        return data

    @abstractmethod
    def close(self) -> None:
        """As `Http2Stream.close`."""

    def give_up(self) -> None:
        """Whoever has the response forgot it. From any thread, at any moment; takes no lock and doesn't wait."""
        self._close()

    def _close(self) -> None:
        """Be done with it: what is still open is given up."""
        if not self._closed:
            self._closed = True
            if not self._ended:
                self._abandoned = True
                self._loop.post(self._abandon)


def _own(error: BaseException) -> BaseException:
    """The error without the background loop's frames, which say nothing; the user's own keep theirs."""
    return error.with_traceback(None) if isinstance(error, H2KeepError) else error


class BlockingExchange(Exchange):
    """An exchange whose caller is a thread."""

    def __init__(self, lease: Lease, request: PoolRequest, body: Iterable[Any] | None) -> None:
        super().__init__(lease, request)
        # A lock of its own for each exchange: one that an interrupted wait has left behind may still be released.
        self._lock = threading.Lock()
        self._lock.acquire()
        self._source = body
        self._iterator: Iterator[Any] | None = None
        if body is not None:
            self._feed = request.body = Feed(self._loop, self._on_room)

    def response(self) -> None:
        """Send the request and wait for the response's head. Raises what the request failed with."""
        try:
            if self._source is None:
                self._wait(self._start)
            else:
                self._loop.post(self._start)
            while self.status is None and self.error is None:
                if not self._pull():
                    self._wait(self._advance)
            if self.status is None and self.error is not None:
                raise _own(self.error)
            self._answered = True
        except BaseException:
            self.close()
            raise

    def receive(self) -> bytes:
        """As `Http2Stream.receive`."""
        try:
            while (data := self._take()) is None:
                if not self._pull():
                    self._wait(self._advance)
        except BaseException:
            self.close()
            raise
        if not data:
            self.close()
        return data

    def close(self) -> None:
        """Exchange."""
        self._close()
        self._drop_source()

    def _wait(self, job: Callable[[], None]) -> None:
        """Wait for whatever comes next; the job tells the loop so, which starts the read clock (K21)."""
        background.refuse_to_wait()
        self._occupy()
        try:
            self._waiting = True
            self._post(job)
            if self._blocked() and not self._can_pull():
                if sys.platform == "win32":
                    # There an untimed wait can't be interrupted.
                    while not self._lock.acquire(timeout=0.5):
                        pass
                else:
                    self._lock.acquire()
            self._waiting = False
        finally:
            self._occupied = False

    def _on_room(self) -> None:
        if self._waiting and self._source is not None:
            self._waiting = False
            self._notify()

    def _notify(self) -> None:
        # Nobody but the loop releases it, so it can't be released in between.
        if self._lock.locked():
            self._lock.release()

    # Uploading: the body's iterator runs in the caller's thread, whenever that has nothing better to do.

    def _can_pull(self) -> bool:
        feed = self._feed
        return self._source is not None and feed is not None and (feed.unwanted or (feed.begun and not feed.full))

    def _pull(self) -> bool:
        """Pull a chunk of the body if there is room; whether anything was done."""
        if not self._can_pull():
            return False
        assert self._feed is not None
        assert self._source is not None
        if self._feed.unwanted:
            self._drop_source()
            return True
        if self._iterator is None:
            self._iterator = iter(self._source)
        try:
            chunk = next(self._iterator)
        except StopIteration:
            self._source = None
            self._feed.finish()
        else:
            if chunk := checked(chunk):
                self._feed.push(chunk)
        return True

    def _drop_source(self) -> None:
        iterator, self._iterator, self._source = self._iterator, None, None
        if isinstance(iterator, GeneratorType):
            # Let its finally blocks run here and now.
            iterator.close()


class AwaitableExchange(Exchange):
    """An exchange whose caller is a task on another event loop."""

    def __init__(self, lease: Lease, request: PoolRequest, body: AsyncIterable[Any] | None) -> None:
        super().__init__(lease, request)
        self._caller = eventloop.current()
        self._parker = self._caller.parker()
        self._pump_parker = self._caller.parker()
        #: Set by the pump, cleared by whoever wakes it.
        self._pump_waits = False
        self._pump_scope: anyio.CancelScope | None = None
        self._body = body
        if body is not None:
            self._feed = request.body = Feed(self._loop, self._on_feed_room)

    async def response(self) -> Self:
        """As `BlockingExchange.response`; itself."""
        try:
            if self._body is not None:
                self._caller.spawn(self._pump, contextvars.copy_context())
            job = self._start
            while self.status is None and self.error is None:
                await self._wait(job)
                job = self._advance
            if self.status is None and self.error is not None:
                raise _own(self.error)
            self._answered = True
        except BaseException:
            self.close()
            raise
        return self

    async def receive(self) -> bytes:
        """As `Http2Stream.receive`."""
        try:
            while (data := self._take()) is None:
                await self._wait(self._advance)
        except BaseException:
            self.close()
            raise
        if not data:
            self.close()
        return data

    def close(self) -> None:
        """Exchange."""
        self._close()
        if self._pump_scope is not None:
            self._pump_scope.cancel()

    async def _wait(self, job: Callable[[], None]) -> None:
        self._occupy()
        try:
            self._waiting = True
            self._post(job)
            if self._blocked():
                await self._parker.park()
            self._waiting = False
        finally:
            self._occupied = False

    def _notify(self) -> None:
        self._tell(self._parker)

    def _on_feed_room(self) -> None:
        if self._pump_waits:
            self._pump_waits = False
            self._tell(self._pump_parker)

    def _tell(self, parker: eventloop.Parker) -> None:
        try:
            self._caller.call_from_thread(parker.unpark)
        except RuntimeError:
            # The caller's event loop has ended, and the caller with it.
            self._abandoned = True
            self._abandon()

    # Uploading: the body's iterator runs in a task of the caller's event loop.

    async def _pump(self) -> None:
        assert self._body is not None
        with anyio.CancelScope() as self._pump_scope:
            if self._closed:
                return
            try:
                assert self._feed is not None
                feed = self._feed
                await self._pump_until(lambda: feed.begun or feed.unwanted)
                if not feed.unwanted:
                    await pump(self._body, self)
            except anyio.get_cancelled_exc_class() as cancelled:
                if not self._pump_scope.cancel_called:
                    # As in `Http2Stream.pump`.
                    failure = WriteError("the body's iterator was cancelled")
                    failure.__cause__ = cancelled
                    self._loop.post(functools.partial(self._upload_failed, failure))
                raise
            except BaseException as error:  # noqa: BLE001
                # A KeyboardInterrupt from the user's iterator belongs to the user's task too.
                self._loop.post(functools.partial(self._upload_failed, error))
        self._pump_scope = None

    def _upload_failed(self, failure: BaseException) -> None:
        self._abandon()
        if not self._ended and self.error is None:
            self._fail(failure)

    async def send(self, chunk: bytes | memoryview) -> None:
        """Sink."""
        assert self._feed is not None
        self._feed.push(chunk)
        feed = self._feed
        await self._pump_until(lambda: not feed.full or feed.unwanted)

    async def _pump_until(self, condition: Callable[[], bool]) -> None:
        while True:
            # In this order: what happens after the look finds us waiting.
            self._pump_waits = True
            if condition():
                self._pump_waits = False
                return
            await self._pump_parker.park()

    def wanted(self) -> bool:
        """Sink."""
        return self._feed is not None and not self._feed.unwanted

    def finish(self) -> None:
        """Sink."""
        assert self._feed is not None
        self._feed.finish()
