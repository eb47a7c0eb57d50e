"""Which connection serves which request.

Deciding is synchronous and does no I/O: a request that finds a verified connection with room is opened on it in the
same step; others queue by origin, first come, first served, and are opened by whatever event makes room. Dials and
hedges run as background tasks that report back here. No event looks at all requests or all connections.

Requests that a server provably didn't process queue here for another connection (K24). Connections that take no new
requests but still have some open are *draining*: they don't count against the limits (K22).
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

import anyio

from h2keep.errors import (
    ConnectError,
    ConnectionLost,
    ConnectTimeout,
    H2KeepError,
    PoolTimeout,
)
from h2keep.keepalive import IntervalMemory, Keepalive
from h2keep.protocol.connection import ASSUMED_STREAMS
from h2keep.protocol.engines import DEFAULT_ENGINE
from h2keep.runner import eventloop
from h2keep.runner.ages import Ages
from h2keep.runner.chance import KernelRandom
from h2keep.runner.connecting import UNAWAITED_TIMEOUT, await_settings, connect, hasten, patience
from h2keep.runner.connection import Http2Connection, log
from h2keep.runner.driver import start_driver
from h2keep.runner.limits import ConnectionCount
from h2keep.runner.moves import Moves
from h2keep.runner.origin import PAUSES, OriginState, Waiter
from h2keep.runner.tasks import Tasks
from h2keep.runner.unused import UnusedConnections

if TYPE_CHECKING:
    from h2keep.runner.dial import DialOptions, Origin, Transport
    from h2keep.runner.limits import Limits
    from h2keep.runner.request import PoolRequest
    from h2keep.runner.stats import EventHook
    from h2keep.runner.stream import Http2Stream

__all__ = ["Pool"]

#: A hedge starts no sooner than this after the first waiter came, in seconds (K9).
_LEAST_HEDGE_DELAY = 0.2


class Pool:
    """Connections by origin, for one event loop."""

    def __init__(
        self,
        options: DialOptions,
        keepalive: Keepalive,
        limits: Limits,
        hook: EventHook | None = None,
        engine: str = DEFAULT_ENGINE,
    ) -> None:
        self.loop = eventloop.current()
        self._options = options
        self._keepalive = keepalive
        self._limits = limits
        self._hook = hook
        self._engine = engine
        self._random = KernelRandom()
        self._origins: dict[Origin, OriginState] = {}
        self._states: dict[Http2Connection, OriginState] = {}
        self._tasks = Tasks(self.loop)
        self._unused = UnusedConnections(limits, self.loop, self._tasks.spawn)
        #: Origins whose queue wants a dial that max_connections forbids now.
        self._starved: OrderedDict[OriginState, None] = OrderedDict()
        self._count = ConnectionCount(limits.max_connections, self._states)
        self._moves = Moves(self._tasks, self._random, self.open)
        interval = keepalive.read_idle_timeout
        self._ages = Ages(
            limits.max_connection_age,
            math.inf if interval is None else interval,
            self._count,
            self._tasks,
            self._random,
            self._replace,
        )
        self._closed = False
        #: A connection was still open when the event loop ended.
        self._orphaned = False

    # Requests

    async def request(self, request: PoolRequest) -> Http2Stream:
        """Open the request on a connection and wait for its response's head.

        Raises the errors of `h2keep.errors`; cancellation resets the stream, or leaves the queue.
        """
        stream = self.open_now(request)
        if stream is None:
            stream = await self.open(request)
        try:
            while not stream.has_head():
                await stream.wait()
        except BaseException:
            stream.close()
            raise
        return stream

    def open_now(self, request: PoolRequest) -> Http2Stream | None:
        """Open the request if that can be done without waiting."""
        if self._closed:
            raise ConnectError("the client has been closed")
        state = self._origins.get(request.origin)
        if state is None or state.waiting:
            return None
        now = self.loop.time()
        connection = self._choose(state, now)
        return None if connection is None else self._open(state, connection, now, request)

    async def open(self, request: PoolRequest, again: Http2Stream | None = None) -> Http2Stream:
        """Open the request when its turn has come; cancellation leaves the queue."""
        if self._closed:
            raise ConnectError("the client has been closed")
        state = self._state(request.origin)
        waiter = Waiter(request, self.loop.parker(), again)
        if not state.waiting:
            # What went wrong for those before is not what goes wrong for this one.
            state.failure = state.lost = None
        state.enqueue(waiter)
        try:
            self._serve(state)
            if waiter.stream is None and waiter.error is None:
                await self._wait(state, waiter)
        except BaseException:
            if waiter.stream is not None:
                waiter.stream.close()
            raise
        finally:
            state.leave(waiter)
            if waiter.gone:
                hasten(state, self.loop.time())
            self._tidy(state)
        if waiter.error is not None:
            raise waiter.error
        assert waiter.stream is not None
        return waiter.stream

    async def _wait(self, state: OriginState, waiter: Waiter) -> None:
        """Wait to be served: for a dial under the connect timeout, else for room under the pool timeout."""
        timeout = waiter.request.timeout
        if state.dials >= state.wanted() and not state.unverified:
            seconds = patience(self._options.retries, timeout.connect)
            if await waiter.served(seconds):
                return
            if state.dials:
                raise ConnectTimeout(f"{state.origin}: no connection was ready within {seconds} s (connect timeout)")
            # There was one, which had less room than was to be expected.
        if not await waiter.served(timeout.pool):
            raise PoolTimeout(
                f"{state.origin}: no connection had room for the request within {timeout.pool} s (pool timeout); "
                f"{len(state.connections)} connections are open, {state.waiting} requests are waiting"
            )

    # Choosing

    def _state(self, origin: Origin) -> OriginState:
        state = self._origins.get(origin)
        if state is None:
            configured = self._keepalive.read_idle_timeout
            state = OriginState(origin, None if configured is None else IntervalMemory(configured))
            self._origins[origin] = state
        return state

    def _tidy(self, state: OriginState) -> None:
        """Forget an origin of which nothing is left, unless it has taught us something (K13)."""
        if state.connections or state.queue or state.dials or state.hedging:
            return
        if self._origins.get(state.origin) is not state:
            # Forgotten already, by the first of those that failed together; who asked again since has another one.
            return
        if state.memory is None or state.memory.current(self.loop.time()) == self._keepalive.read_idle_timeout:
            self._origins.pop(state.origin, None)
            self._starved.pop(state, None)

    def _choose(self, state: OriginState, now: float) -> Http2Connection | None:
        """A verified connection with room, the one with the most recent life first (K9)."""
        while state.available:
            connection = next(reversed(state.available))
            if connection.verified(now):
                return connection
            del state.available[connection]
            if connection in state.connections:
                state.unverified[connection] = None
                state.expected = None
        return None

    def _open(
        self,
        state: OriginState,
        connection: Http2Connection,
        now: float,
        request: PoolRequest,
        again: Http2Stream | None = None,
    ) -> Http2Stream:
        if connection.idle_since is not None:
            self._unused.discard(connection)
        self._use_interval(state, connection)
        try:
            stream = connection.open(now, request, again)
        except BaseException:
            self._classify(state, connection)
            self._note_idle(connection)
            raise
        if not connection.has_room:
            self._classify(state, connection)
        return stream

    def _classify(self, state: OriginState, connection: Http2Connection) -> None:
        """Put a connection where `_choose` will find it, or not."""
        if connection not in state.connections:
            return
        if connection in state.unverified:
            state.expected = None
        accepting = connection.protocol.accepting
        if not accepting and connection not in state.draining:
            self._count.drain(state.draining, connection)
            self._feed_starved()
        if not accepting or connection.protocol.prospective_slots <= 0:
            state.available.pop(connection, None)
            state.unverified.pop(connection, None)
        elif connection not in state.available and connection not in state.unverified:
            state.available[connection] = None

    def _serve(self, state: OriginState) -> None:
        """Open as many waiting requests as there is room for, then see that there will be room for the rest."""
        while state.queue:
            first = state.queue[0]
            if first.again is not None and not first.again.replayable:
                # Its requester gave up, and the task that moves it hasn't heard of that yet.
                state.give_up(first)
            if first.gone:
                state.queue.popleft()
                continue
            if first.again is not None and first.again.connection in state.available:
                # It refused this request, so others are asked first (K24).
                state.available.move_to_end(first.again.connection, last=False)
            now = self.loop.time()
            connection = self._choose(state, now)
            if connection is None:
                break
            # Out of the queue first: opening may report events, and these may lead here again.
            waiter = state.queue.popleft()
            state.waiting -= 1
            try:
                waiter.stream = self._open(state, connection, now, waiter.request, waiter.again)
                state.failure = state.lost = None
            except H2KeepError as error:
                waiter.error = error
            waiter.parker.unpark()
        if state.waiting:
            self._make_room(state)

    def _make_room(self, state: OriginState) -> None:
        if state.unverified:
            # Once for all who come while the answers are outstanding: it looks at every unverified connection.
            if state.expected is None or not (state.hedging or state.dials):
                self._verify(state)
                state.expected = sum(connection.protocol.prospective_slots for connection in state.unverified)
            # Waiters beyond what the unverified ones could take want a connection of their own.
            if state.waiting <= state.expected:
                return
        accepting = (connection for connection in state.connections if connection.protocol.accepting)
        if state.pausing and any(accepting):
            return
        if not state.streams and any(not connection.protocol.ready for connection in accepting):
            # The last one had no room for anybody: first this one's SETTINGS.
            return
        wanted = state.wanted()
        while state.dials < wanted and self._may_dial():
            self._start_dial(state)
        # Looked at again: an unused connection that made way may have led to a dial already.
        if state.dials < wanted:
            self._starved[state] = None

    def _may_dial(self) -> bool:
        """Whether max_connections allows another connection; an unused one may be closed for it."""
        if not self._count.below_limit() and self._unused:
            self._unused.close_oldest()
        return self._count.below_limit()

    def _fail_waiters(self, state: OriginState, error: BaseException, patience: float = math.inf) -> None:
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

    def _verify(self, state: OriginState) -> None:
        """One PING on each unverified connection, and a dial if none answers soon."""
        asked = False
        delay = _LEAST_HEDGE_DELAY
        for connection in list(state.unverified):
            asked = connection.verify() or asked
            if connection.protocol.keepalive.rtt_best is not None:
                delay = max(delay, 3 * connection.protocol.keepalive.rtt_best)
        if not state.hedging and not state.dials:
            state.hedging = True
            self._tasks.spawn(lambda: self._hedge(state, delay if asked else 0.0))

    async def _hedge(self, state: OriginState, delay: float) -> None:
        try:
            await anyio.sleep(delay)
            busy = any(connection.protocol.open_streams for connection in state.unverified)
            if state.waiting and state.unverified and not state.dials and (not busy or self._may_dial()):
                self._start_dial(state)
        finally:
            state.hedging = False
            self._settle_failure(state)
            self._tidy(state)

    def _settle_failure(self, state: OriginState) -> None:
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

    def _start_dial(self, state: OriginState) -> None:
        self._note_dial(state, 1)
        self._starved.pop(state, None)
        # Those that allow less have clocks of their own.
        timeout = state.longest_connect()

        async def run() -> None:
            await self._dial(state, timeout)

        self._tasks.spawn(run)

    async def _dial(
        self, state: OriginState, timeout: float | None, *, replaces: bool = False
    ) -> Http2Connection | None:
        """Make a connection, which was counted in `dials`; one that replaces another is used when it is ready (K22)."""
        failure: BaseException | None = None
        transport: Transport | None = None
        deadline = math.inf
        try:
            transport, deadline = await connect(state, self._options, timeout)
        except Exception as error:  # noqa: BLE001
            # Whatever it was, the requests that wait for this dial must hear of it.
            failure = error
        finally:
            self._note_dial(state, -1)
        connection: Http2Connection | None = None
        if transport is not None:
            try:
                connection = self._adopt(state, transport, ready=not replaces or state.waiting > 0)
            except ConnectError as error:
                transport.socket.close()
                failure = error
        if failure is not None:
            state.failure = failure if state.waiting else None
            state.patience = timeout if timeout is not None and isinstance(failure, ConnectTimeout) else math.inf
            self._settle_failure(state)
            self._dial_later(state)
            self._feed_starved()
        self._tidy(state)
        if connection is not None and timeout is not None:
            await await_settings(connection, timeout, deadline)
        return connection

    async def _replace(self, state: OriginState) -> Http2Connection | None:
        """Dial for the place of an aged connection (K22)."""
        self._note_dial(state, 1)
        return await self._dial(state, UNAWAITED_TIMEOUT, replaces=True)

    def _note_dial(self, state: OriginState, change: int) -> None:
        state.dials += change
        self._count.dials += change

    def _dial_later(self, state: OriginState) -> None:
        """A dial failed. Those who wait for room on other connections still want one of their own, but not at once."""
        if not state.waiting or state.dials or state.hedging or state.unverified or state.pausing:
            return
        # It is dealt with: should the other connections end, the next dial decides.
        state.failure = None
        self._pause(state)

    def _pause(self, state: OriginState) -> None:
        """No dial for a while, while there are other connections; each time a longer one."""
        self._starved.pop(state, None)
        pause, longest = state.pause, PAUSES[1]
        state.pausing = True
        state.pause = min(2 * pause, longest)

        async def run() -> None:
            try:
                await anyio.sleep(pause)
            finally:
                state.pausing = False
            self._serve(state)

        self._tasks.spawn(run)

    def _adopt(self, state: OriginState, transport: Transport, *, ready: bool) -> Http2Connection:
        """Take a new connection in; one that isn't to be used yet will be, as soon as its SETTINGS come."""
        if self._closed:
            raise ConnectError("the client has been closed")
        connection = Http2Connection(
            state.origin, transport, self, self.loop, self._keepalive, self._random, self._hook, self._engine
        )
        if state.memory is not None:
            connection.protocol.use_interval(state.memory.current(self.loop.time()))
        start_driver(connection)
        # Until its SETTINGS come.
        connection.protocol.max_streams = state.streams
        state.failure = state.lost = None
        if state.streams:
            state.pause = PAUSES[0]
        state.connections.add(connection)
        self._states[connection] = state
        if ready and state.streams:
            state.available[connection] = None
        self._ages.begin(state, connection)
        self._serve(state)
        if ready:
            self._note_idle(connection)
            self._trim(state)
        return connection

    # Owner: what connections report

    def move(self, stream: Http2Stream, error: H2KeepError) -> bool:
        """Owner."""
        return not self._closed and self._moves.begin(stream, error)

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

    def connection_unused(self, connection: Http2Connection) -> None:
        """Owner."""
        if connection in self._states:
            self._note_idle(connection)

    def connection_alive(self, connection: Http2Connection) -> None:
        """Owner."""
        state = self._states.get(connection)
        if state is not None and connection in state.unverified:
            del state.unverified[connection]
            state.expected = None
            self._classify(state, connection)
            self._serve(state)
            self._trim(state)

    def connection_pinged(self, connection: Http2Connection) -> None:
        """Owner."""
        state = self._states.get(connection)
        if state is not None:
            self._use_interval(state, connection)

    def _use_interval(self, state: OriginState, connection: Http2Connection) -> None:
        """What an hour without another punishment brings reaches a connection when it is used (K13)."""
        if connection.protocol.keepalive.interval != self._keepalive.read_idle_timeout and state.memory is not None:
            connection.use_interval(state.memory.current(self.loop.time()))

    def connection_limited(self, connection: Http2Connection) -> None:
        """Owner."""
        state = self._states.get(connection)
        if state is not None:
            state.streams = min(connection.protocol.max_streams, ASSUMED_STREAMS)
            if not state.streams and not state.pausing:
                self._pause(state)

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

    def _remove(self, state: OriginState, connection: Http2Connection) -> None:
        del self._states[connection]
        self._orphaned = self._orphaned or connection.orphaned
        if connection in state.unverified and isinstance(connection.protocol.error, ConnectionLost):
            state.lost = connection.protocol.error
        state.connections.discard(connection)
        self._count.forget(state.draining, connection)
        self._ages.end(connection)
        state.available.pop(connection, None)
        state.unverified.pop(connection, None)
        state.expected = None
        self._unused.discard(connection)
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

    def _trim(self, state: OriginState) -> None:
        """A hedge may have taken us over max_connections: one without requests makes way, of the same origin (K9d)."""
        if self._count.above_limit() and self._unused:
            unused = (connection for connection in (*state.unverified, *state.available) if connection in self._unused)
            next(unused, next(iter(self._unused))).close()

    def _note_idle(self, connection: Http2Connection) -> None:
        if connection.idle_since is None or connection.protocol.closed:
            self._unused.discard(connection)
        elif self._unused.add(connection) and self._starved:
            self._feed_starved()

    # The end

    async def aclose(self) -> None:
        """Close every connection in good order and wait until every task is gone. Idempotent."""
        drivers = [connection.driver for connection in self._states]
        self.close()
        for driver in drivers:
            await driver.wait_stopped()
        await self._tasks.wait()

    def close(self) -> None:
        """What of `aclose` needs no waiting; the tasks then end by themselves."""
        self._closed = True
        for state in list(self._origins.values()):
            self._fail_waiters(state, ConnectError("the client was closed"))
        for connection in list(self._states):
            connection.close()
        self._tasks.cancel()

    def reap(self, reason: str) -> None:
        """Let go of everything without a word to anybody: the event loop is dead, or not this process's own."""
        self._closed = True
        for connection in self._states:
            connection.reap(reason)

    def close_idle(self) -> None:
        """Close the connections on which no request is open or unread."""
        self._unused.close()

    @property
    def busy(self) -> bool:
        """Whether a request is open, unread, waiting for a connection, or moving to another one."""
        if self._moves or len(self._unused) < len(self._states):
            return True
        return any(state.waiting for state in self._origins.values())

    @property
    def left_open(self) -> bool:
        """Whether there are connections, or were when the event loop ended, that nobody has closed."""
        return not self._closed and (bool(self._states) or self._orphaned)
