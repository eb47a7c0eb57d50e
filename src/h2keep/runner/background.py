"""One event loop in one daemon thread, for callers that have no event loop, or block their own.

A `Lease` is one client's share in it: its connection pool lives there, and PINGs go on whatever the client's own
threads do. The first lease in a process starts the thread, and the end of the last one ends it. How a caller on
another thread makes a request here is `exchange.py`'s affair; this module moves jobs, and sees the loop through its
life: start, fork, interpreter exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import selectors
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from h2keep.errors import ConnectError
from h2keep.runner import eventloop
from h2keep.runner.connection import log

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from h2keep.runner.pool import Pool

__all__ = ["BackgroundLoop", "Lease", "lease", "refuse_to_wait"]

#: How long the thread's end is waited for, in seconds: at exit, a fork, and the last client's close.
_PATIENCE = 1.0
#: How often to look whether the operating system has done with a thread, in seconds.
_GLANCE = 0.0001
#: A thread that gets the interpreter and keeps it for this share of its switch interval computes, and is not yielded to
#: for so many seconds.
_COMPUTES = 0.8
_YIELDS_NOT = 1.0
_yield: Callable[[], object] = getattr(os, "sched_yield", functools.partial(time.sleep, 0))

_lock = threading.Lock()
_current: BackgroundLoop | None = None
#: Every loop that has a thread: the current one, and those that are ending.
_loops: set[BackgroundLoop] = set()
_here = threading.local()
#: What each fork that is under way has paused.
_paused: list[list[BackgroundLoop]] = []


def lease(make_pool: Callable[[], Pool]) -> Lease:
    """A share in the process's background loop, which is started if it isn't running. `make_pool` is called in it.

    Raises `ConnectError` if no thread can be started any more, as the interpreter is shutting down.
    """
    global _current
    with _lock:
        if _current is None:
            _current = BackgroundLoop()
        share = Lease(_current, make_pool)
        _current.leases.add(share)
    return share


def refuse_to_wait() -> None:
    """Raise RuntimeError where nobody may wait for the background loop: in its own thread."""
    if getattr(_here, "is_background", False):
        raise RuntimeError("a hook that runs on h2keep's background thread can't wait for a response: it is in the way")


class Lease:
    """One client's share in the background loop, and its pool there. Refers to nothing of the client itself."""

    #: The interpreter exits. Whoever asks for something here nevertheless is a daemon's thread, and gets no answer.
    exiting = False

    def __init__(self, loop: BackgroundLoop, make_pool: Callable[[], Pool]) -> None:
        self.loop = loop
        self._make_pool = make_pool
        self._pool: Pool | None = None
        self._ended = threading.Event()
        self._ending = False

    @property
    def left_open(self) -> bool:
        """Whether there are connections that nobody has closed."""
        return self._pool is not None and self._pool.left_open

    @property
    def ended(self) -> bool:
        """Whether the share was given back, by `end` or because the interpreter exits."""
        return self._ending

    def pool(self) -> Pool:
        """The pool; in the loop's thread only. Raises `ConnectError` after `end`."""
        if self._ending:
            raise ConnectError("the client has been closed")
        if self._pool is None:
            self._pool = self._make_pool()
        return self._pool

    def end(self) -> None:
        """Close the pool and give the share back. Takes no lock and doesn't wait, as `__del__` must not."""
        self.loop.post(self._end)

    def end_at_exit(self) -> None:
        """The same, but threads that wait for a response go on waiting, as they would with any other client.

        They are daemons, or somebody's who still wants to have their answer: an error would be news to nobody else.
        """
        self.loop.post(self._end_at_exit)

    def wait_ended(self) -> None:
        """Wait until that is done and, if this was the last lease, the thread is gone; a no-op in the loop itself."""
        if not self.loop.is_current():
            self._ended.wait(_PATIENCE)
            if self.loop.ending:
                self.loop.join()

    def forget(self) -> None:
        """Another process's loop: nothing of it must be touched."""
        self._ending = True
        if self._pool is not None:
            self._pool.reap("it belongs to the process that this one was forked from")

    def _end(self) -> None:
        if self._ending:
            return
        self._ending = True
        if self._pool is None or self.loop.dead:
            self._give_back()
        else:
            self.loop.spawn(self._close_pool)

    def _end_at_exit(self) -> None:
        self.exiting = True
        if self._pool is None or not self._pool.busy:
            self._end()
        else:
            self._pool.close_idle()
            self._ended.set()

    async def _close_pool(self) -> None:
        assert self._pool is not None
        try:
            await self._pool.aclose()
        finally:
            self._give_back()

    def _give_back(self) -> None:
        self.loop.leases.discard(self)
        self.loop.end_if_unused()
        # Last: who waits for it looks next whether the thread is ending.
        self._ended.set()


def _await_last_words(thread: threading.Thread) -> None:
    """Wait until the operating system's thread has ended as well; on Linux only.

    Before Python 3.13 `join` returns when the interpreter has done with a thread. OpenSSL goes on then, and cleans up
    after it under a lock of all the process. A child that was forked meanwhile would wait for that lock for ever.
    """
    patience = time.monotonic() + _PATIENCE
    with contextlib.suppress(OSError):
        while time.monotonic() < patience:
            os.stat(f"/proc/self/task/{thread.native_id}")
            time.sleep(_GLANCE)


class BackgroundLoop:
    """The loop and its thread. Only `post`, `is_current`, `join`, and the life cycle may be called from elsewhere."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._asyncio = asyncio.SelectorEventLoop(self._selector)
        # Debug mode reports every callback under which other threads held the interpreter's lock for long.
        self._asyncio.set_debug(False)
        self._loop = eventloop.AsyncioLoop(self._asyncio)
        self._context = self._loop.callback_context
        self._jobs: deque[Callable[[], object]] = deque()
        self._scheduled = False
        self._rung: deque[Callable[[], object]] = deque()
        self._yields_from = 0.0
        self.leases: set[Lease] = set()
        #: The last lease was given back.
        self.ending = False
        #: Nothing runs here any more, or never did in this process.
        self.dead = False
        # Guards what follows: whether a thread is to run the loop, and whether one does.
        self._threads = threading.Lock()
        self._pauses = 0
        self._has_thread = False
        self._start_thread()
        _loops.add(self)

    # From any thread

    def post(self, job: Callable[[], object]) -> None:
        """Have the loop call `job` soon. It is called in any case: if the loop is dead, here and now."""
        self._jobs.append(job)
        if self.dead:
            self._run_jobs()
        elif not self._scheduled:
            self._scheduled = True
            try:
                self._asyncio.call_soon_threadsafe(self._run_jobs, context=self._context)
            except RuntimeError:
                # It was closed just now.
                self._run_jobs()
            except BaseException:
                # KeyboardInterrupt: perhaps nothing was scheduled, so the next one must not rely on it.
                self._scheduled = False
                raise

    def is_current(self) -> bool:
        """Whether this is the loop's thread."""
        return threading.current_thread() is self._thread

    def join(self) -> None:
        """Wait for the thread's end, but not for ever: it may be held up by a hook of the user's."""
        thread = self._thread
        thread.join(_PATIENCE)
        if not thread.is_alive():
            _await_last_words(thread)

    # In the loop's thread

    def spawn(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """See `EventLoop.spawn`."""
        self._loop.spawn(run)

    def ring(self, answer: Callable[[], object]) -> None:
        """Call `answer` when what happens now is over: many events in one turn make one answer."""
        if not self._rung:
            self._asyncio.call_soon(self._answer, context=self._context)
        self._rung.append(answer)

    def end_if_unused(self) -> None:
        """End the thread if there is no lease any more."""
        global _current
        with _lock:
            if self.leases or self.ending:
                return
            self.ending = True
            if _current is self:
                _current = None
        if not self.dead:
            # In the turn after next, so that those who still wait for an answer get it.
            self._asyncio.call_soon(self._asyncio.call_soon, self._asyncio.stop)

    def _run_jobs(self) -> None:
        # First: whoever posts from now on schedules anew.
        self._scheduled = False
        while self._jobs:
            try:
                job = self._jobs.popleft()
            except IndexError:
                # Another thread was faster, the loop being dead.
                return
            job()

    def _answer(self) -> None:
        # What is rung for meanwhile is for the next turn.
        rung, self._rung = self._rung, deque()
        for answer in rung:
            answer()
        if len(rung) > 1:
            self._let_callers_run()

    def _let_callers_run(self) -> None:
        """Callers that were woken together ask again together, if they get hold of the interpreter first.

        Their requests then leave in one write. Not where some thread computes: it would keep the interpreter for its
        whole switch interval each time.
        """
        now = self._asyncio.time()
        if now >= self._yields_from:
            _yield()
            if self._asyncio.time() - now >= _COMPUTES * sys.getswitchinterval():
                self._yields_from = now + _YIELDS_NOT

    # The thread

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name="h2keep", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ConnectError(f"h2keep's background thread can't be started: {error}") from error
        self._has_thread = True

    def _run(self) -> None:
        _here.is_background = True
        while not self.ending:
            try:
                self._asyncio.run_forever()
            except SystemExit:
                # From a hook of the user's: it mustn't end the thread that others rely on.
                log.exception("an event hook tried to end h2keep's background thread")
            with self._threads:
                if self._pauses and not self.ending:
                    self._has_thread = False
                    return
        self._cancel_tasks()
        self.dead = True
        self._run_jobs()
        self._asyncio.close()
        _loops.discard(self)

    def _cancel_tasks(self) -> None:
        """Pools end their own tasks; what may be left is a name resolution, for whose thread nobody waits."""
        tasks = asyncio.all_tasks(self._asyncio)
        for task in tasks:
            task.cancel()
        if tasks:
            self._asyncio.run_until_complete(asyncio.wait(tasks))

    # Interpreter exit and fork

    def shut_down(self) -> None:
        """The interpreter is about to exit: end what nobody waits for, and the thread, if all is ended."""
        shares = list(self.leases)
        for share in shares:
            share.end_at_exit()
        self.post(self.end_if_unused)
        for share in shares:
            share.wait_ended()
        if self.ending:
            self.join()

    def pause(self) -> None:
        """Stop the loop between two callbacks: no lock or TLS record is caught in mid-air by a fork."""
        with self._threads:
            self._pauses += 1
        if not self.is_current():
            # RuntimeError: it has just ended by itself.
            with contextlib.suppress(RuntimeError):
                self._asyncio.call_soon_threadsafe(self._asyncio.stop)
            self.join()

    def resume(self) -> None:
        """Go on, in a new thread if the old one has ended by now; several threads may fork at once."""
        with self._threads:
            # KeyboardInterrupt may have come before it was counted.
            self._pauses = max(0, self._pauses - 1)
            if not self._pauses and not self._has_thread and not self.ending:
                self._start_thread()

    def forget(self) -> None:
        """This is a child process, and the loop is its parent's: let go of its descriptors, and touch nothing else.

        Even the selector's own methods, or the loop's, would change what the two processes share.
        """
        self.dead = True
        self._jobs.clear()
        for share in list(self.leases):
            share.forget()
        self._selector.close()
        for end in (self._asyncio._ssock, self._asyncio._csock):  # type: ignore[attr-defined]  # noqa: SLF001
            end.close()


def before_fork() -> None:
    """Called in the parent before a fork."""
    loops = list(_loops)
    # First: an exception here doesn't keep the fork from going on.
    _paused.append(loops)
    for loop in loops:
        loop.pause()


def after_fork_in_parent() -> None:
    """Called in the parent after a fork."""
    for loop in _paused.pop():
        loop.resume()


def after_fork_in_child() -> list[BackgroundLoop]:
    """Called in the child after a fork: the loops that are to be kept for ever, lest anything of them be finalised."""
    global _current, _lock
    # A thread that doesn't exist here may hold it.
    _lock = threading.Lock()
    _current = None
    loops = list(_loops)
    for loop in loops:
        loop.forget()
    _loops.clear()
    _paused.clear()
    return loops


def shut_down() -> None:
    """Called when the interpreter is about to exit."""
    if _current is not None:
        _current.shut_down()
