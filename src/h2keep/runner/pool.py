"""Which connection serves which request.

Deciding is synchronous and does no I/O: a request that finds a verified connection with room is opened on it in the
same step; others queue by origin, first come, first served, and are opened by whatever event makes room. Dials and
hedges run as background tasks that report back here. No event looks at all requests or all connections.

Not here yet, and where they belong: sending provably unprocessed requests again (`Pool.request`, around `open`),
retirement by age (`_serve`, before choosing), HTTP/1.1 origins and proxies (`dial.dial`).
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import checkpoint

from h2keep.errors import ConnectError, ConnectionLost, ConnectTimeout, H2KeepError, PoolTimeout
from h2keep.keepalive import IntervalMemory, Keepalive
from h2keep.runner import eventloop
from h2keep.runner.connection import EventHook, Http2Connection, log
from h2keep.runner.dial import DialOptions, Origin, Transport, dial
from h2keep.runner.driver import AnyioDriver

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Coroutine

    from h2keep.protocol.events import Headers
    from h2keep.runner.stream import Http2Stream

__all__ = ["Limits", "Pool", "PoolRequest", "Timeout"]

#: A hedge starts no sooner than this after the first waiter came, in seconds (K9).
_LEAST_HEDGE_DELAY = 0.2
#: Streams that a connection not yet dialled is expected to take.
_EXPECTED_STREAMS = 100


@dataclass(frozen=True, slots=True)
class Timeout:
    """The four timeouts of a request, in seconds; None waits for ever (K21).

    Raises `ValueError` if one is neither None nor a number from 0 on.
    """

    connect: float | None = 5.0
    read: float | None = 5.0
    write: float | None = 5.0
    pool: float | None = 5.0

    def __post_init__(self) -> None:
        for name in ("connect", "read", "write", "pool"):
            value = getattr(self, name)
            if value is not None and not _is_seconds(value):
                raise ValueError(f"timeout: {name} must be None or a number of seconds from 0 on, not {value!r}")


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections, and for how long. The names and meanings are httpx's, the default expiry is longer.

    Raises `ValueError` if a number of connections is neither None nor an integer above 0 (for `max_connections`) or
    from 0 on (for `max_keepalive_connections`), or the expiry neither None nor a number from 0 on.
    """

    #: Connections at most, None for any number.
    max_connections: int | None = 100
    #: Connections at most that are kept while unused, None for any number.
    max_keepalive_connections: int | None = 20
    #: Seconds after which an unused connection is closed, None for never.
    keepalive_expiry: float | None = 300.0

    def __post_init__(self) -> None:
        for name, least in (("max_connections", 1), ("max_keepalive_connections", 0)):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= least):
                raise ValueError(f"limits: {name} must be None or an integer from {least} on, not {value!r}")
        expiry = self.keepalive_expiry
        if expiry is not None and not _is_seconds(expiry):
            raise ValueError(f"limits: keepalive_expiry must be None or a number of seconds from 0 on, not {expiry!r}")


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


@dataclass(slots=True)
class PoolRequest:
    """A request ready to be opened on a connection."""

    origin: Origin
    fields: Headers
    content_length: int | None
    body: bytes | AsyncIterable[bytes | memoryview] | None
    timeout: Timeout


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request in an origin's queue."""

    request: PoolRequest
    parker: eventloop.Parker
    stream: Http2Stream | None = None
    error: BaseException | None = None
    #: Gave up: cancelled or timed out.
    gone: bool = False


@dataclass(slots=True, eq=False)
class _OriginState:
    """What the pool knows of one origin."""

    origin: Origin
    memory: IntervalMemory | None
    #: Connections that take requests and have room, the one that served last at the end.
    available: OrderedDict[Http2Connection, None] = field(default_factory=OrderedDict)
    #: Connections that must prove to be alive before they get a request (K9).
    unverified: OrderedDict[Http2Connection, None] = field(default_factory=OrderedDict)
    connections: set[Http2Connection] = field(default_factory=set)
    queue: deque[_Waiter] = field(default_factory=deque)
    #: Waiters in the queue that have not given up.
    waiting: int = 0
    dials: int = 0
    #: A hedge is due or under way (K9c).
    hedging: bool = False
    #: The last dial's failure, until something succeeds.
    failure: BaseException | None = None
    #: If that was the connect timeout: how long it was. Who allows more may still have it.
    patience: float = math.inf
    lost: ConnectionLost | None = None


class Pool:
    """Connections by origin, for one event loop."""

    def __init__(
        self, options: DialOptions, keepalive: Keepalive, limits: Limits, hook: EventHook | None = None
    ) -> None:
        self.loop = eventloop.current()
        self._options = options
        self._keepalive = keepalive
        self._limits = limits
        self._hook = hook
        self._random = random.SystemRandom()
        self._origins: dict[Origin, _OriginState] = {}
        self._states: dict[Http2Connection, _OriginState] = {}
        self._idle: OrderedDict[Http2Connection, None] = OrderedDict()
        #: Origins whose queue wants a dial that max_connections forbids now.
        self._starved: OrderedDict[_OriginState, None] = OrderedDict()
        self._dials = 0
        self._expiry_parker = self.loop.parker()
        self._expiring = False
        self._closed = False
        #: A connection was still open when the event loop ended.
        self._orphaned = False
        #: One for each background task, to end it by.
        self._scopes: set[anyio.CancelScope] = set()
        self._quiet: anyio.Event | None = None

    # Requests

    async def request(self, request: PoolRequest) -> Http2Stream:
        """Open the request on a connection and wait for its response's head.

        Raises the errors of `h2keep.errors`; cancellation resets the stream, or leaves the queue.
        """
        stream = self.open_now(request)
        if stream is None:
            stream = await self.open(request)
        await stream.response()
        return stream

    def open_now(self, request: PoolRequest) -> Http2Stream | None:
        """Open the request if that can be done without waiting."""
        if self._closed:
            raise ConnectError("the client has been closed")
        state = self._origins.get(request.origin)
        if state is None or state.waiting:
            return None
        connection = self._choose(state)
        return None if connection is None else self._open(state, connection, request)

    async def open(self, request: PoolRequest) -> Http2Stream:
        """Open the request when its turn has come; cancellation leaves the queue."""
        state = self._state(request.origin)
        waiter = _Waiter(request, self.loop.parker())
        if not state.waiting:
            # What went wrong for those before is not what goes wrong for this one.
            state.failure = state.lost = None
        state.queue.append(waiter)
        state.waiting += 1
        try:
            self._serve(state)
            if waiter.stream is None and waiter.error is None:
                await self._wait(state, waiter)
        except BaseException:
            if waiter.stream is not None:
                waiter.stream.close()
            raise
        finally:
            self._leave(state, waiter)
        if waiter.error is not None:
            raise waiter.error
        assert waiter.stream is not None
        return waiter.stream

    async def _wait(self, state: _OriginState, waiter: _Waiter) -> None:
        """Wait to be served: for a dial under the connect timeout, else for room under the pool timeout."""
        timeout = waiter.request.timeout
        dialled = state.dials * _EXPECTED_STREAMS >= state.waiting and not state.unverified
        seconds = timeout.connect if dialled else timeout.pool
        with anyio.move_on_after(seconds):
            while waiter.stream is None and waiter.error is None:
                await waiter.parker.park()
        if waiter.stream is not None or waiter.error is not None:
            return
        if dialled:
            raise ConnectTimeout(f"{state.origin}: no connection was ready within {seconds} s (connect timeout)")
        raise PoolTimeout(
            f"{state.origin}: no connection had room for the request within {seconds} s (pool timeout); "
            f"{len(state.connections)} connections are open, {state.waiting} requests are waiting"
        )

    def _leave(self, state: _OriginState, waiter: _Waiter) -> None:
        if waiter.stream is None and waiter.error is None:
            waiter.gone = True
            state.waiting -= 1
        while state.queue and state.queue[0].gone:
            state.queue.popleft()
        self._tidy(state)

    # Choosing

    def _state(self, origin: Origin) -> _OriginState:
        state = self._origins.get(origin)
        if state is None:
            configured = self._keepalive.read_idle_timeout
            state = _OriginState(origin, None if configured is None else IntervalMemory(configured))
            self._origins[origin] = state
        return state

    def _tidy(self, state: _OriginState) -> None:
        """Forget an origin of which nothing is left, unless it has taught us something (K13)."""
        if state.connections or state.queue or state.dials or state.hedging:
            return
        if state.memory is None or state.memory.current(self.loop.time()) == self._keepalive.read_idle_timeout:
            self._origins.pop(state.origin, None)
            self._starved.pop(state, None)

    def _choose(self, state: _OriginState) -> Http2Connection | None:
        """A verified connection with room, the one with the most recent life first (K9)."""
        while state.available:
            connection = next(reversed(state.available))
            if connection.verified():
                return connection
            del state.available[connection]
            if connection in state.connections:
                state.unverified[connection] = None
        return None

    def _open(self, state: _OriginState, connection: Http2Connection, request: PoolRequest) -> Http2Stream:
        self._idle.pop(connection, None)
        try:
            return connection.open(
                request.fields, request.content_length, request.body, request.timeout.read, request.timeout.write
            )
        finally:
            self._classify(state, connection)
            self._note_idle(connection)

    def _classify(self, state: _OriginState, connection: Http2Connection) -> None:
        """Put a connection where `_choose` will find it, or not."""
        if connection not in state.connections:
            return
        if not connection.protocol.accepting or connection.protocol.prospective_slots <= 0:
            state.available.pop(connection, None)
            state.unverified.pop(connection, None)
        elif connection not in state.available and connection not in state.unverified:
            state.available[connection] = None

    def _serve(self, state: _OriginState) -> None:
        """Open as many waiting requests as there is room for, then see that there will be room for the rest."""
        while state.queue:
            if state.queue[0].gone:
                state.queue.popleft()
                continue
            connection = self._choose(state)
            if connection is None:
                break
            # Out of the queue first: opening may report events, and these may lead here again.
            waiter = state.queue.popleft()
            state.waiting -= 1
            try:
                waiter.stream = self._open(state, connection, waiter.request)
                state.failure = state.lost = None
            except H2KeepError as error:
                waiter.error = error
            waiter.parker.unpark()
        if state.waiting:
            self._make_room(state)

    def _make_room(self, state: _OriginState) -> None:
        if state.unverified:
            self._verify(state)
            # Waiters beyond what the unverified ones could take want a connection of their own.
            room = sum(connection.protocol.prospective_slots for connection in state.unverified)
            if state.waiting <= room:
                return
        wanted = -(-state.waiting // _EXPECTED_STREAMS)
        while state.dials < wanted:
            if not self._may_dial():
                self._starved[state] = None
                return
            self._start_dial(state)

    def _may_dial(self) -> bool:
        """Whether max_connections allows another connection; an unused one may be closed for it."""
        limit = self._limits.max_connections
        if limit is None or len(self._states) + self._dials < limit:
            return True
        if self._idle:
            # The one unused for longest makes way.
            next(iter(self._idle)).close()
            return len(self._states) + self._dials < limit
        return False

    def _fail_waiters(self, state: _OriginState, error: BaseException, patience: float = math.inf) -> None:
        """Fail those that allow no more than `patience` for connecting."""
        queue, state.queue = state.queue, deque()
        for waiter in queue:
            connect = waiter.request.timeout.connect
            if waiter.gone:
                continue
            if (math.inf if connect is None else connect) > patience:
                state.queue.append(waiter)
            else:
                state.waiting -= 1
                waiter.error = error.for_request(unprocessed=True) if isinstance(error, H2KeepError) else error
                waiter.parker.unpark()

    # Verifying (K9)

    def _verify(self, state: _OriginState) -> None:
        """One PING on each unverified connection, and a dial if none answers soon."""
        asked = False
        delay = _LEAST_HEDGE_DELAY
        for connection in list(state.unverified):
            asked = connection.verify() or asked
            if connection.protocol.keepalive.rtt_best is not None:
                delay = max(delay, 3 * connection.protocol.keepalive.rtt_best)
        if not state.hedging and not state.dials:
            state.hedging = True
            self._spawn(lambda: self._hedge(state, delay if asked else 0.0))

    async def _hedge(self, state: _OriginState, delay: float) -> None:
        try:
            await anyio.sleep(delay)
            busy = any(connection.protocol.open_streams for connection in state.unverified)
            if state.waiting and state.unverified and not state.dials and (not busy or self._may_dial()):
                self._start_dial(state)
        finally:
            state.hedging = False
            self._settle_failure(state)
            self._tidy(state)

    def _settle_failure(self, state: _OriginState) -> None:
        """Fail the waiters if everything that could have served them is out (K9e)."""
        if not state.waiting or state.dials or state.hedging or state.available or state.unverified:
            return
        if state.failure is None or any(connection.protocol.accepting for connection in state.connections):
            return
        error = state.failure
        if state.lost is not None:
            error.__cause__ = state.lost
        state.failure = state.lost = None
        self._fail_waiters(state, error, state.patience)
        if state.waiting:
            self._make_room(state)

    # Dialling

    def _start_dial(self, state: _OriginState) -> None:
        state.dials += 1
        self._dials += 1
        self._starved.pop(state, None)
        waiters = [waiter for waiter in islice(state.queue, _EXPECTED_STREAMS) if not waiter.gone]
        allowed = [waiter.request.timeout.connect for waiter in waiters]
        # Those that allow less have clocks of their own.
        timeout = max((seconds for seconds in allowed if seconds is not None), default=None)
        if None in allowed:
            timeout = None
        self._spawn(lambda: self._dial(state, timeout))

    async def _dial(self, state: _OriginState, timeout: float | None) -> None:
        failure: BaseException | None = None
        transport: Transport | None = None
        try:
            with anyio.move_on_after(timeout) as patience:
                transport = await dial(state.origin, self._options)
            if transport is None:
                failure = ConnectTimeout(f"{state.origin}: not connected within {timeout} s (connect timeout)")
        except Exception as error:  # noqa: BLE001
            # Whatever it was, the requests that wait for this dial must hear of it.
            failure = error
        finally:
            state.dials -= 1
            self._dials -= 1
        connection: Http2Connection | None = None
        if transport is not None:
            try:
                connection = self._adopt(state, transport)
            except ConnectError as error:
                transport.socket.close()
                failure = error
        if failure is not None:
            state.failure = failure if state.waiting else None
            state.patience = timeout if timeout is not None and isinstance(failure, ConnectTimeout) else math.inf
            self._settle_failure(state)
            self._feed_starved()
        self._tidy(state)
        if connection is not None and timeout is not None:
            await self._await_settings(connection, timeout, patience.deadline)

    async def _await_settings(self, connection: Http2Connection, timeout: float, deadline: float) -> None:
        """See to it that the server's SETTINGS come within the connect timeout; requests are sent before they do."""
        with anyio.CancelScope(deadline=deadline):
            await connection.wait_ready()
        if not connection.protocol.ready:
            # They may have come while this loop was blocked: the reader's turn, as in K7.
            await checkpoint()
            await checkpoint()
        if not connection.protocol.ready:
            connection.give_up(
                ConnectTimeout(
                    f"{connection.origin}: the server accepted the connection, but sent no HTTP/2 SETTINGS within "
                    f"{timeout} s (connect timeout)"
                )
            )

    def _adopt(self, state: _OriginState, transport: Transport) -> Http2Connection:
        if self._closed:
            raise ConnectError("the client has been closed")
        connection = Http2Connection(
            state.origin, transport, self, self.loop, self._keepalive, self._random, self._hook
        )
        driver = AnyioDriver(connection)
        if state.memory is not None:
            connection.protocol.keepalive.use_interval(state.memory.current(self.loop.time()))
        driver.start()
        state.failure = state.lost = None
        state.connections.add(connection)
        state.available[connection] = None
        self._states[connection] = state
        self._serve(state)
        self._note_idle(connection)
        self._trim(state)
        return connection

    # Owner: what connections report

    def connection_changed(self, connection: Http2Connection) -> None:
        """Owner."""
        state = self._states.get(connection)
        if state is None:
            return
        if connection.protocol.closed:
            self._remove(state, connection)
        else:
            self._classify(state, connection)
        if state.waiting:
            self._settle_failure(state)
            self._serve(state)
        self._note_idle(connection)
        self._tidy(state)

    def connection_alive(self, connection: Http2Connection) -> None:
        """Owner."""
        state = self._states.get(connection)
        if state is not None and connection in state.unverified:
            del state.unverified[connection]
            self._classify(state, connection)
            self._serve(state)
            self._trim(state)

    def connection_calmed(self, connection: Http2Connection) -> None:
        """Owner."""
        state = self._states.get(connection)
        used = connection.protocol.keepalive.interval
        if state is None or state.memory is None or used is None:
            return
        before, after = state.memory.punish(used, self.loop.time())
        log.warning(
            "%s: the server objects to our PINGs: read_idle_timeout goes from %g s to %g s for this origin%s",
            state.origin,
            before,
            after,
            "; middleboxes may now forget the connection in between" if after > 60 else "",
        )
        for other in state.connections:
            other.use_interval(after)

    def _remove(self, state: _OriginState, connection: Http2Connection) -> None:
        del self._states[connection]
        self._orphaned = self._orphaned or connection.orphaned
        if connection in state.unverified and isinstance(connection.protocol.error, ConnectionLost):
            state.lost = connection.protocol.error
        state.connections.discard(connection)
        state.available.pop(connection, None)
        state.unverified.pop(connection, None)
        self._idle.pop(connection, None)
        self._feed_starved()

    def _feed_starved(self) -> None:
        """A connection or a dial ended: the origin that has waited longest for one may dial."""
        while self._starved:
            state = next(iter(self._starved))
            if state.waiting and not self._may_dial():
                return
            self._starved.pop(state, None)
            if state.waiting:
                self._make_room(state)

    # Unused connections

    def _trim(self, state: _OriginState) -> None:
        """A hedge may have taken us over max_connections: one without requests makes way, of the same origin (K9d)."""
        limit = self._limits.max_connections
        if limit is not None and len(self._states) > limit and self._idle:
            unused = (connection for connection in (*state.unverified, *state.available) if connection in self._idle)
            next(unused, next(iter(self._idle))).close()

    def _note_idle(self, connection: Http2Connection) -> None:
        if connection.idle_since is None or connection.protocol.closed:
            self._idle.pop(connection, None)
            return
        if connection not in self._idle:
            self._idle[connection] = None
            limit = self._limits.max_keepalive_connections
            if limit is not None and len(self._idle) > limit:
                next(iter(self._idle)).close()
            elif self._starved:
                self._feed_starved()
        if self._limits.keepalive_expiry is not None and self._idle and not self._expiring:
            self._expiring = True
            self._spawn(self._expire)

    async def _expire(self) -> None:
        """Close connections unused for keepalive_expiry; runs only while there are unused ones."""
        expiry = self._limits.keepalive_expiry
        assert expiry is not None
        try:
            while self._idle and not self._closed:
                oldest = next(iter(self._idle))
                assert oldest.idle_since is not None
                due = oldest.idle_since + expiry
                if self.loop.time() >= due:
                    oldest.close()
                    continue
                with anyio.CancelScope(deadline=due):
                    await self._expiry_parker.park()
        finally:
            self._expiring = False

    # The end

    async def aclose(self) -> None:
        """Close every connection in good order and wait until every task is gone. Idempotent."""
        drivers = [connection.driver for connection in self._states]
        self.close()
        for driver in drivers:
            await driver.wait_stopped()
        if self._scopes:
            self._quiet = anyio.Event()
            await self._quiet.wait()

    def close(self) -> None:
        """What of `aclose` needs no waiting; the tasks then end by themselves."""
        self._closed = True
        for state in list(self._origins.values()):
            self._fail_waiters(state, ConnectError("the client was closed"))
        for connection in list(self._states):
            connection.close()
        for scope in self._scopes:
            scope.cancel()

    def reap(self, reason: str) -> None:
        """Let go of everything without a word to anybody: the event loop is dead, or not this process's own."""
        self._closed = True
        for connection in self._states:
            connection.reap(reason)

    def close_idle(self) -> None:
        """Close the connections on which no request is open or unread."""
        for connection in list(self._idle):
            connection.close()

    @property
    def busy(self) -> bool:
        """Whether a request is open, unread, or waiting for a connection."""
        return len(self._idle) < len(self._states) or any(state.waiting for state in self._origins.values())

    @property
    def left_open(self) -> bool:
        """Whether there are connections, or were when the event loop ended, that nobody has closed."""
        return not self._closed and (bool(self._states) or self._orphaned)

    def _spawn(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        scope = anyio.CancelScope()

        async def scoped() -> None:
            try:
                with scope:
                    await run()
            finally:
                self._scopes.discard(scope)
                if self._quiet is not None and not self._scopes:
                    self._quiet.set()

        self.loop.spawn(scoped)
        self._scopes.add(scope)
