"""The few things for which anyio has no name, or only a dear one, on asyncio and on trio.

Everything else in the runner is plain anyio. `current()` gives the `EventLoop` of the running backend: its clock, a
wake-up for exactly one waiting task, and background tasks that outlive whoever starts them.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

from anyio.lowlevel import current_token

from h2keep.errors import ConnectError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator

    import trio

__all__ = ["BUSY", "AsyncioLoop", "EventLoop", "Parker", "current", "native_loop"]


#: What whoever waits where somebody else does is told.
BUSY = "two tasks or threads wait for the same thing, a response for instance, which is for one of them alone"


class Parker(ABC):
    """A wake-up for one task, in the manner of a thread's park and unpark.

    A wake-up that comes while nobody waits is kept, once; so nothing is missed, and waiters re-check their condition.
    """

    __slots__ = ()

    @abstractmethod
    def unpark(self) -> None:
        """Wake the task that waits, or let the next `park` return at once."""

    @abstractmethod
    def park(self) -> Awaitable[None]:
        """Wait for a wake-up; may be spurious. No checkpoint if one is kept. To be awaited at once.

        Raises RuntimeError if another task waits: one of the two would never be woken.
        """


class EventLoop(ABC):
    """What the runner needs to know of the loop it runs on."""

    __slots__ = ()

    #: The loop's monotonic clock, in seconds.
    time: Callable[[], float]

    @abstractmethod
    def parker(self) -> Parker:
        """A new `Parker`."""

    @abstractmethod
    def spawn(
        self,
        run: Callable[[], Coroutine[Any, Any, None]],
        context: contextvars.Context | None = None,
        *,
        ended: Callable[[], object] = bool,
    ) -> None:
        """Start a task that belongs to nobody, in an empty context unless one is given.

        `run` must not raise: it is nobody's to catch. `ended` is called when the task is over, even if the loop's end
        cancelled it before it began. Raises `ConnectError` if the loop is shutting down.
        """

    @abstractmethod
    def call_from_thread(self, run: Callable[[], object]) -> None:
        """Have the loop call `run` soon, from any thread. Raises RuntimeError if the loop is dead."""

    @abstractmethod
    def is_dead(self) -> bool:
        """Whether it has ended for good; asked from anywhere."""

    @abstractmethod
    def is_running(self) -> bool:
        """Whether it runs now, in whatever thread; asked from anywhere."""


class _Nothing:
    """To be awaited where there is nothing to wait for."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        yield from ()


_NOTHING = _Nothing()


class _AsyncioParker(Parker):
    __slots__ = ("_future", "_loop", "_permit")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        #: What somebody waits for, or has left behind who was cancelled.
        self._future: asyncio.Future[None] | None = None
        self._permit = False

    def unpark(self) -> None:
        future, self._future = self._future, None
        if future is None or future.done():
            self._permit = True
            return
        try:
            future.set_result(None)
        except RuntimeError:
            # A loop that was closed with its tasks in it is told things by their finally blocks.
            self._permit = True

    def park(self) -> Awaitable[None]:
        # The future itself: each coroutine around it would be gone through at every step.
        if self._permit:
            self._permit = False
            return _NOTHING
        if self._future is not None and not self._future.done():
            raise RuntimeError(BUSY)
        self._future = self._loop.create_future()
        return self._future


class Sleeper(Protocol):
    """What `AsyncioAlarms` wakes."""

    def time_is_up(self, moment: float) -> None:
        """It is the moment that was asked for, if it still is what is wanted. Doesn't raise an `Exception`."""


class AsyncioAlarms:
    """`call_at` for many sleepers: those of the same moment share one timer, which costs as much as one of them."""

    __slots__ = ("_context", "_loop", "_moments")

    def __init__(self, loop: asyncio.AbstractEventLoop, context: contextvars.Context) -> None:
        self._loop = loop
        self._context = context
        self._moments: dict[float, tuple[asyncio.TimerHandle, dict[Sleeper, None]]] = {}

    def wake(self, sleeper: Sleeper, moment: float) -> None:
        """Call its `time_is_up` then."""
        known = self._moments.get(moment)
        if known is None:
            timer = self._loop.call_at(moment, self._ring, moment, context=self._context)
            self._moments[moment] = timer, {sleeper: None}
        else:
            known[1][sleeper] = None

    def let_sleep(self, sleeper: Sleeper, moment: float) -> None:
        """Don't, unless it is that moment already."""
        known = self._moments.get(moment)
        if known is None:
            return
        timer, sleepers = known
        sleepers.pop(sleeper, None)
        if not sleepers:
            del self._moments[moment]
            timer.cancel()

    def _ring(self, moment: float) -> None:
        self._wake_all(moment, self._moments.pop(moment)[1])

    def _wake_all(self, moment: float, sleepers: dict[Sleeper, None]) -> None:
        try:
            while sleepers:
                sleepers.popitem()[0].time_is_up(moment)
        finally:
            # Somebody interrupted the loop, which may go on yet.
            if sleepers:
                self._loop.call_soon(self._wake_all, moment, sleepers, context=self._context)


class AsyncioLoop(EventLoop):
    """asyncio's, or one like it."""

    __slots__ = ("_tasks", "alarms", "callback_context", "native", "time")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.native = loop
        self.time = loop.time
        #: For callbacks: nobody's variables, but anyio knows its backend there (within tasks it finds out by itself).
        self.callback_context = contextvars.Context()
        sniffio = sys.modules.get("sniffio")
        if sniffio is not None:
            self.callback_context.run(sniffio.current_async_library_cvar.set, "asyncio")
        self.alarms = AsyncioAlarms(loop, self.callback_context)
        # The loop itself holds tasks but weakly.
        self._tasks: set[asyncio.Task[None]] = set()

    def parker(self) -> Parker:
        """EventLoop."""
        return _AsyncioParker(self.native)

    def spawn(
        self,
        run: Callable[[], Coroutine[Any, Any, None]],
        context: contextvars.Context | None = None,
        *,
        ended: Callable[[], object] = bool,
    ) -> None:
        """EventLoop."""
        if getattr(self.native, "_asyncgens_shutdown_called", False):
            # asyncio.run has cancelled its tasks already and would never cancel this one.
            raise ConnectError("the event loop is shutting down")
        # Not by the loop's task factory: its tasks may begin at once (`asyncio.eager_task_factory`), in the middle of
        # what spawns them.
        task = asyncio.Task(run(), loop=self.native, context=context or contextvars.Context())
        # A loop that is dropped without cancelling its tasks has nobody to tell "Task was destroyed" to.
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
        self._tasks.add(task)

        def over(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            ended()

        # The caller's context would live as long as the task.
        task.add_done_callback(over, context=self.callback_context)

    def call_from_thread(self, run: Callable[[], object]) -> None:
        """EventLoop."""
        self.native.call_soon_threadsafe(run, context=self.callback_context)

    def is_dead(self) -> bool:
        """EventLoop."""
        return self.native.is_closed()

    def is_running(self) -> bool:
        """EventLoop."""
        return self.native.is_running()


class _TrioParker(Parker):
    __slots__ = ("_permit", "_task")

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None
        self._permit = False

    def unpark(self) -> None:
        self._permit = True
        if self._task is not None:
            task, self._task = self._task, None
            sys.modules["trio"].lowlevel.reschedule(task)

    async def park(self) -> None:
        if not self._permit:
            if self._task is not None:
                raise RuntimeError(BUSY)
            lowlevel = sys.modules["trio"].lowlevel
            self._task = lowlevel.current_task()

            def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
                self._task = None
                aborted: trio.lowlevel.Abort = lowlevel.Abort.SUCCEEDED
                return aborted

            await lowlevel.wait_task_rescheduled(abort)
        self._permit = False


class _TrioLoop(EventLoop):
    __slots__ = ("_lowlevel", "_token", "time")

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        import trio

        self._lowlevel = trio.lowlevel
        self._token = token
        self.time = trio.current_time

    def parker(self) -> Parker:
        return _TrioParker()

    def spawn(
        self,
        run: Callable[[], Coroutine[Any, Any, None]],
        context: contextvars.Context | None = None,
        *,
        ended: Callable[[], object] = bool,
    ) -> None:
        async def to_its_end() -> None:
            # Every task of trio's begins.
            try:
                await run()
            finally:
                ended()

        try:
            self._lowlevel.spawn_system_task(to_its_end, name=run, context=context)
        except RuntimeError as error:
            raise ConnectError("the event loop is shutting down") from error

    def call_from_thread(self, run: Callable[[], object]) -> None:
        # RunFinishedError is a RuntimeError.
        self._token.run_sync_soon(run)

    def is_dead(self) -> bool:
        try:
            self._token.run_sync_soon(int)
        except RuntimeError:
            return True
        return False

    def is_running(self) -> bool:
        return not self.is_dead()


def native_loop() -> object:
    """The running event loop as its backend knows it: one object a loop, to tell loops apart by."""
    loop = asyncio._get_running_loop()  # noqa: SLF001
    # Without a task it may be another library's host.
    if loop is not None and asyncio.current_task(loop) is not None:
        return loop
    return current_token().native_token


def wrap(native: Any) -> EventLoop:
    """The `EventLoop` of an event loop as its backend knows it."""
    return AsyncioLoop(native) if isinstance(native, asyncio.AbstractEventLoop) else _TrioLoop(native)


def current() -> EventLoop:
    """The running event loop's `EventLoop`: a new object each time, so keep it."""
    return wrap(native_loop())
