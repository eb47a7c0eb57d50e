"""What every front door has behind it: checked settings, and connection pools where the requests come from.

The one way from a client or a transport to the runner. Each event loop gets a pool of its own, made at its first
request; threads, and asynchronous callers that ask for it, share one on the background loop. Front doors may be used
from several loops, from threads, and after a fork; they may be forgotten. What is left open then is closed as well as
it can be, with one ResourceWarning.
"""

from __future__ import annotations

import atexit
import contextvars
import functools
import ipaddress
import os
import sys
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from h2keep.errors import UnsupportedProtocol
from h2keep.keepalive import Keepalive
from h2keep.protocol.engines import engine_named
from h2keep.protocol.headers import FieldMemory
from h2keep.runner import background, dial
from h2keep.runner.dial import DialOptions, Origin, SocketOption
from h2keep.runner.eventloop import native_loop
from h2keep.runner.exchange import AwaitableExchange, BlockingExchange
from h2keep.runner.limits import Limits
from h2keep.runner.pool import Pool
from h2keep.runner.request import REPLAY_BUFFER, Head, PoolRequest, Timeout

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterable, Coroutine, Iterable

    from h2keep._proxies import ProxyFor
    from h2keep.protocol.events import ConnectionEvent
    from h2keep.runner.stats import ConnectionStats, EventHook
    from h2keep.runner.stream import Http2Stream

__all__ = ["Connections"]


def _check(limits: object, uds: object, local_address: object, socket_options: tuple[object, ...]) -> None:
    """Refuse what would otherwise fail where nobody knows any more which argument it came from."""
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"limits: {limits!r} is not a Limits")
    if uds is not None and not isinstance(uds, str):
        raise TypeError(f"uds: {uds!r} is not a str")
    if local_address is not None:
        try:
            # Not a name: binding to it would resolve it, and block the event loop meanwhile.
            ipaddress.ip_address(str(local_address))
        except ValueError as error:
            raise ValueError(f"local_address: {local_address!r} is not an IP address") from error
    for option in socket_options:
        if not (isinstance(option, tuple) and len(option) in (3, 4)):
            raise TypeError(f"socket_options: {option!r} is not (level, name, value)")


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name}: {value!r} is not an integer from 0 on")


class Connections:
    """Connections made in one way, for any event loop and any thread."""

    #: The interpreter exits, and what is left open has been told of.
    exiting = False

    def __init__(
        self,
        ssl_context: ssl.SSLContext,
        *,
        keepalive: Keepalive | None,
        engine: str,
        limits: Limits | None,
        http1: bool,
        uds: str | None,
        local_address: str | None,
        socket_options: Iterable[SocketOption] | None,
        event_hook: EventHook | None,
        run_in_thread: bool = False,
        proxy_for: ProxyFor | None = None,
        retries: int = 0,
        replay_buffer: int = REPLAY_BUFFER,
    ) -> None:
        if keepalive is not None and not isinstance(keepalive, Keepalive):
            raise TypeError(f"keepalive: {keepalive!r} is not a Keepalive")
        options: tuple[Any, ...] = tuple(socket_options or ())
        _check(limits, uds, local_address, options)
        _check_count("retries", retries)
        _check_count("replay_buffer", replay_buffer)
        engine_named(engine)
        alpn = ("h2", "http/1.1") if http1 else ("h2",)
        self._http1 = http1
        self._replay_buffer = replay_buffer
        self._run_in_thread = run_in_thread
        self._memory = FieldMemory()
        # Pools outlive whoever forgets us, so nothing that makes them may refer to us.
        self._make_pool = functools.partial(
            Pool,
            DialOptions(ssl_context, alpn, uds, local_address, options, proxy_for=proxy_for, retries=retries),
            Keepalive() if keepalive is None else keepalive,
            Limits() if limits is None else limits,
            None if event_hook is None else _in_context(event_hook),
            engine,
        )
        self._lock = threading.Lock()
        #: By the loop's own object; never by its id, which is used again.
        self._pools: dict[object, Pool] = {}
        self._lease: background.Lease | None = None
        _all[id(self)] = self

    # Requests

    def head(
        self, method: bytes, origin: Origin, authority: bytes, target: bytes, fields: Iterable[tuple[bytes, bytes]]
    ) -> Head:
        """What a request says before its body. Raises `UnsupportedProtocol` or `LocalProtocolError`."""
        if origin.scheme == "http" and self._http1:
            raise UnsupportedProtocol(
                f"{origin}: http:// is HTTP/1.1 here, which has no PINGs; with http1=False it is HTTP/2 with prior "
                "knowledge"
            )
        scheme = origin.scheme.encode("ascii")
        return Head(origin, *self._memory.request_fields(method, scheme, authority, target, fields))

    def send(
        self, head: Head, body: bytes | AsyncIterable[bytes] | None, timeout: Timeout
    ) -> Coroutine[Any, Any, Http2Stream | AwaitableExchange]:
        """Send a request and wait for the head of its response."""
        if not self._run_in_thread:
            return self._running_pool().request(PoolRequest(*head, body, timeout, self._replay_buffer))
        whole = body if isinstance(body, bytes) else None
        request = PoolRequest(*head, whole, timeout, self._replay_buffer)
        exchange = AwaitableExchange(self._running_lease(), request, None if isinstance(body, bytes) else body)
        return exchange.response()

    def send_blocking(self, head: Head, body: bytes | Iterable[bytes] | None, timeout: Timeout) -> BlockingExchange:
        """As `send`, in the calling thread, which also pulls the body's iterator."""
        background.refuse_to_wait()
        whole = body if isinstance(body, bytes) else None
        request = PoolRequest(*head, whole, timeout, self._replay_buffer)
        exchange = BlockingExchange(self._running_lease(), request, None if isinstance(body, bytes) else body)
        exchange.response()
        return exchange

    # Pools

    def _running_pool(self) -> Pool:
        """The running loop's pool."""
        loop = native_loop()
        pool = self._pools.get(loop)
        if pool is None:
            self._reap_dead_loops()
            with self._lock:
                pool = self._pools[loop] = self._make_pool()
        return pool

    def _running_lease(self) -> background.Lease:
        """The share in the background loop."""
        lease = self._lease
        if lease is None or lease.ended:
            with self._lock:
                lease = self._lease
                if lease is None or lease.ended:
                    lease = self._lease = background.lease(self._make_pool)
        return lease

    def _reap_dead_loops(self) -> None:
        """Let go of pools whose loops have ended: nothing else tells us, and they would keep their sockets."""
        with self._lock:
            dead = [loop for loop, pool in list(self._pools.items()) if pool.loop.is_dead()]
            for loop in dead:
                pool = self._pools.pop(loop, None)
                if pool is not None:
                    pool.reap("its event loop has ended")

    def reap_stopped_loops(self) -> None:
        """At exit: loops that don't run now never will, and say nothing more to anybody."""
        for pool in list(self._pools.values()):
            if not pool.loop.is_running():
                pool.reap("the interpreter is exiting")

    # The end

    async def aclose(self) -> None:
        """Close everything, in whatever loop it is. Idempotent; who is used again afterwards starts anew."""
        own = self._pools.pop(native_loop(), None)
        lease = self._begin_to_close()
        if own is not None:
            await own.aclose()
        if lease is not None:
            # It needs a few turns of the background loop, and no more.
            lease.wait_ended()

    def close(self) -> None:
        """The same from a thread; pools of other event loops are told to close, and not waited for."""
        lease = self._begin_to_close()
        if lease is not None:
            lease.wait_ended()

    def _begin_to_close(self) -> background.Lease | None:
        """Tell every pool to close, without a lock and without waiting."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            try:
                pool.loop.call_from_thread(pool.close)
            except RuntimeError:
                pool.reap("its event loop has ended")
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.end()
        return lease

    @property
    def left_open(self) -> bool:
        """Whether there are connections, or were when their loop ended, that nobody has closed."""
        lease = self._lease
        return (lease is not None and lease.left_open) or any(pool.left_open for pool in list(self._pools.values()))

    def forget(self) -> list[Pool]:
        """This is a child process, and what there is belongs to its parent: the pools, to be kept for ever."""
        pools = list(self._pools.values())
        for pool in pools:
            pool.reap("it belongs to the process that this one was forked from")
        self._lock = threading.Lock()
        self._pools = {}
        self._lease = None
        return pools

    def __del__(self, warn: Any = warnings.warn, is_finalizing: Any = sys.is_finalizing) -> None:
        # May run in any thread, even under one of our own locks. While the interpreter goes down `_at_exit` was first.
        if is_finalizing() or not hasattr(self, "_lease"):
            return
        left_open = self.left_open and not self.exiting
        self._begin_to_close()
        if left_open:
            warn(_LEFT_OPEN, ResourceWarning, source=self)


_LEFT_OPEN = "an h2keep client or transport was never closed, and left connections open: call close() or use `with`"

#: By id. A WeakSet can't be walked while other threads add to it.
_all: weakref.WeakValueDictionary[int, Connections] = weakref.WeakValueDictionary()


def _everybody() -> list[Connections]:
    found = [reference() for reference in _all.valuerefs()]
    return [connections for connections in found if connections is not None]


def _in_context(hook: EventHook) -> EventHook:
    """The hook in the context of whoever makes the client: connections belong to no request."""
    context = contextvars.copy_context()

    def run(stats: ConnectionStats, event: ConnectionEvent) -> None:
        # A copy: threads may call it at once, and what it sets is its own.
        context.copy().run(hook, stats, event)

    return run


@atexit.register
def _at_exit() -> None:
    everybody = _everybody()
    left_open = any(connections.left_open for connections in everybody)
    Connections.exiting = True
    background.shut_down()
    for connections in everybody:
        connections.reap_stopped_loops()
    if left_open:
        warnings.warn(_LEFT_OPEN, ResourceWarning, stacklevel=1)


def _after_fork_in_child() -> None:
    """Never use, close or shut down what the parent has: descriptors are let go of, and objects kept for ever.

    Finalisers of tasks and loops would reach into what both processes share, the epoll instance for one.
    """
    dial.close_descriptors()
    pools = [pool for connections in _everybody() for pool in connections.forget()]
    loops = background.after_fork_in_child()
    if pools or loops:
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object((pools, loops)))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=background.before_fork,
        after_in_parent=background.after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
