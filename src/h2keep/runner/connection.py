"""One live connection: the protocol's `Connection`, a clock, and the mailboxes of its requests.

`Http2Connection` is callback-shaped and does no I/O: a driver tells it that bytes came, that there is room to write, or
that a deadline is due, and asks what to write next. It in turn tells the pool when its state changed, and the event
hook what happened. Everything here runs to completion without awaiting, in the one event loop that owns it.
"""

from __future__ import annotations

import contextvars
import logging
from typing import TYPE_CHECKING, Any, Protocol, cast

from h2keep.errors import ConnectionGoingAway, ConnectionLost, H2KeepError, RemoteProtocolError
from h2keep.protocol import Connection, events
from h2keep.protocol.engine import ErrorCode
from h2keep.protocol.engines import DEFAULT_ENGINE
from h2keep.runner.clock import UNBROKEN, GapWatch
from h2keep.runner.stats import ConnectionStats, EventHook
from h2keep.runner.stream import Http2Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from h2keep.keepalive import Keepalive, RandomSource
    from h2keep.protocol.events import ConnectionEvent
    from h2keep.runner.dial import Origin, Transport
    from h2keep.runner.eventloop import EventLoop
    from h2keep.runner.request import PoolRequest

__all__ = ["Http2Connection", "Owner"]

log = logging.getLogger("h2keep")


class Owner(Protocol):
    """The pool, as a connection sees it."""

    def connection_changed(self, connection: Http2Connection) -> None:
        """Slots, readiness or the will to take requests may have changed; or it is over."""

    def connection_unused(self, connection: Http2Connection) -> None:
        """No request is open or unread there any more, which is all that is new."""

    def connection_alive(self, connection: Http2Connection) -> None:
        """Life came on a connection that was being verified (K9)."""

    def connection_limited(self, connection: Http2Connection) -> None:
        """The peer said how many streams it allows."""

    def connection_calmed(self, connection: Http2Connection) -> None:
        """The peer punished us for our PINGs (K13)."""

    def connection_pinged(self, connection: Http2Connection) -> None:
        """A PING was sent, and the next one's interval, which had been enlarged, begins (K13)."""

    def move(self, stream: Http2Stream, error: H2KeepError) -> bool:
        """Open a request that wasn't processed on another connection (K24); False if that can't be tried."""


class Driver(Protocol):
    """What moves a connection's bytes."""

    def wake_writer(self) -> None:
        """There is something to write."""

    def write_now(self) -> None:
        """The same, and nothing is to come that could be written with it."""

    def expect_requests(self) -> None:
        """Those whose requests have just ended will often make others at once."""

    def wake_timer(self) -> None:
        """The deadline moved to before `timer_armed_for`."""

    def stop(self, *, abort: bool) -> None:
        """The connection is over: close the transport, with RST if `abort` (K8), else after a goodbye."""

    async def wait_stopped(self) -> None:
        """Wait until the transport is closed and every task is gone."""

    def reap(self) -> None:
        """Close the socket and nothing else: the event loop is dead, or another process's."""


class Http2Connection:
    """A connection that requests can be opened on; see the module's docstring."""

    __slots__ = (
        "_gaps", "_hook", "_hooked", "_open_before", "_owner", "_ready", "_security", "_streams", "being_verified",
        "driver", "has_room", "idle_since", "last_request_at", "loop", "origin", "orphaned", "protocol", "reaped",
        "requests", "stats", "timer_armed_for", "transport",
    )  # fmt: skip

    def __init__(
        self,
        origin: Origin,
        transport: Transport,
        owner: Owner,
        loop: EventLoop,
        keepalive: Keepalive,
        random: RandomSource,
        hook: EventHook | None = None,
        engine: str = DEFAULT_ENGINE,
    ) -> None:
        self.origin = origin
        self.transport = transport
        self.loop = loop
        self.protocol = Connection(keepalive, random, loop.time(), name=str(origin), engine=engine)
        #: The driver's timer sleeps until this moment, None if for ever.
        self.timer_armed_for: float | None = None
        #: The pool waits for life before it gives this connection a request (K9).
        self.being_verified = False
        #: Since when no request is open or unread here, None while one is.
        self.idle_since: float | None = loop.time()
        self.requests = 0
        #: When the last request was opened here, None before the first.
        self.last_request_at: float | None = None
        #: Its event loop ended before it did.
        self.orphaned = False
        #: Its event loop is dead, or another process's.
        self.reaped = False
        self.driver: Driver
        self.stats = ConnectionStats(self)
        self._owner = owner
        self._hook = hook
        self._security = transport.security
        self._gaps = GapWatch(loop.time)
        self._streams: dict[int, Http2Stream] = {}
        self._hooked: list[ConnectionEvent] = []
        self._ready = loop.parker()
        self._open_before = 0
        #: Whether it takes another request, as the pool saw it last; slots that K10 holds count as free.
        self.has_room = False

    # For the pool

    def open(self, now: float, request: PoolRequest, again: Http2Stream | None = None) -> Http2Stream:
        """Start a request, or move one here that was started on another connection and may be sent `again` (K24).

        Raises `LocalProtocolError` if it is malformed.
        """
        body = request.body
        whole = body if isinstance(body, bytes) else b""
        stream_id = self.protocol.send_request(
            request.fields,
            now,
            content_length=request.content_length,
            body=whole,
            end_stream=body is None or body is whole,
            awaited=True,
            read_timeout=request.timeout.read,
            write_timeout=request.timeout.write,
        )
        stream = Http2Stream(self, stream_id, request) if again is None else again
        self._streams[stream_id] = stream
        self.requests += 1
        self.last_request_at = now
        self.idle_since = None
        try:
            if again is not None:
                again.attach(self, stream_id)
            elif body is not None and not isinstance(body, bytes):
                pumped = body
                self.loop.spawn(lambda: stream.pump(pumped), contextvars.copy_context())
        except H2KeepError:
            if again is None:
                stream.close()
            else:
                # Somebody waits for it, who is told by whoever moves it.
                self.release(stream)
            raise
        # All that `_settle` would find to do, as opening a request makes no events; what can wait for the peer last.
        self._open_before = self.protocol.open_streams
        if len(self._streams) == 1:
            self.driver.write_now()
        else:
            self.driver.wake_writer()
        self._check_timer()
        self.has_room = self.protocol.has_room
        return stream

    def verified(self, now: float) -> bool:
        """Whether it may be given a request at once (K9); looks at the clocks first (K25)."""
        self._look_for_gap(now)
        return self.protocol.verified(now)

    def verify(self) -> bool:
        """Ask for life (K9): False if that can't be done."""
        self.being_verified = True
        asked = self.protocol.verify(self.loop.time())
        self._settle()
        return asked

    def use_interval(self, read_idle_timeout: float) -> None:
        """The origin's interval changed (K13)."""
        self.protocol.use_interval(read_idle_timeout)
        # Of the next one the owner is to know.
        self.protocol.tells_of_pings = True
        self._check_timer()

    def ping(self) -> bool:
        """A user's PING; see `Connection.ping`."""
        queued = self.protocol.ping(self.loop.time())
        self._settle()
        return queued

    async def wait_ready(self) -> None:
        """Wait until the peer's SETTINGS came, or the connection is over. For one task."""
        while not (self.protocol.ready or self.protocol.closed):
            await self._ready.park()

    def give_up(self, error: H2KeepError) -> None:
        """As `close`; open requests fail with this error."""
        self.protocol.give_up(error, self.loop.time())
        self._settle()

    def retire(self) -> None:
        """Take no new requests; the connection ends with those that are open (K22)."""
        self.protocol.retired = True
        if self._is_spent():
            self.protocol.close(self.loop.time())
        self._settle()
        self._tell_owner()

    def close(self) -> None:
        """Say GOAWAY, close TLS, close the socket; open requests fail."""
        self.protocol.close(self.loop.time())
        self._settle()

    def reap(self, reason: str) -> None:
        """It can't be used any more, nor closed in good order: its event loop is dead, or another process's."""
        self.reaped = True
        error = ConnectionLost(f"{self.origin}: {reason}")
        for stream in self._streams.values():
            stream.error = error
        self.driver.reap()

    # For streams

    def await_data(self, stream_id: int) -> None:
        """A request's task is about to wait."""
        self.protocol.await_data(stream_id, self.loop.time())
        self._check_timer()

    def read(self, stream_id: int) -> tuple[bytes, bool]:
        """Take bytes that wait on a stream; whether more do."""
        data = self.protocol.read(stream_id, self.loop.time())
        if self.protocol.has_data_to_send():
            self.driver.wake_writer()
        return data, self.protocol.has_unread(stream_id)

    def send_data(self, stream_id: int, data: bytes | memoryview, *, end_stream: bool) -> bool:
        """Queue a chunk of a body; whether another is welcome at once."""
        room = self.protocol.send_data(stream_id, data, end_stream, self.loop.time())
        self._settle()
        return room

    def wants_body(self, stream_id: int) -> bool:
        """Whether more of this request's body is of use."""
        return self.protocol.is_open(stream_id)

    def take_whole(self, stream: Http2Stream) -> bytes | None:
        """As `read`, then `release`, of a stream that is over in both directions; None if it isn't."""
        if self.reaped:
            return None
        data = self.protocol.take_whole(stream.id)
        if data is not None:
            del self._streams[stream.id]
            self._note_left()
        return data

    def release(self, stream: Http2Stream) -> None:
        """The stream's task is done with it."""
        # What has moved to another connection since may bear the number of one that is open here.
        if self.reaped or self._streams.get(stream.id) is not stream:
            return
        del self._streams[stream.id]
        if self.protocol.release(stream.id, self.loop.time()):
            self._settle()
        self._note_left()

    def _note_left(self) -> None:
        if not self._streams:
            self.idle_since = self.loop.time()
        # What else the pool had to know it was told at the stream's end, unless bytes of it were read since.
        if not self.has_room:
            self._tell_owner()
        elif not self._streams:
            self._owner.connection_unused(self)

    # For the driver

    def bytes_came(self, data: bytes) -> None:
        """Bytes from the socket: life first, unless they are a proxy's own (K2), then whatever they mean."""
        now = self.loop.time()
        self._look_for_gap(now)
        security = self._security
        plaintext, closed = security.receive(data)
        heard = security.heard
        if heard:
            self.protocol.note_life(now)
        if plaintext:
            self.protocol.receive_data(plaintext, now)
        if closed:
            self.protocol.receive_eof(now, security.failure)
        elif security.pending():
            self.driver.wake_writer()
        if self.being_verified and heard:
            # Only now, lest the queue be opened on a connection whose GOAWAY or close_notify these bytes are.
            self.being_verified = False
            self._owner.connection_alive(self)
        self._settle()

    def ended(self, cause: Exception | None = None) -> None:
        """The socket came to its end: EOF, or `cause`."""
        self.protocol.receive_eof(self.loop.time(), cause)
        self._settle()

    def loop_ended(self) -> None:
        """The event loop is being shut down, and nobody has closed the connection before."""
        self.orphaned = True
        self.ended(RuntimeError("its event loop is shutting down"))

    def next_write(self, limit: int, now: float) -> list[bytes | memoryview]:
        """Pieces of ciphertext to hand to the socket, none if there is nothing to say."""
        written: list[bytes | memoryview] = []
        security = self._security
        for piece in self.protocol.pieces_to_send(limit, now):
            # Of no bytes it makes what TLS has to say of its own accord.
            ciphertext = security.encrypt(piece)
            if ciphertext:
                written.append(ciphertext)
        return written

    def write_taken(self) -> bool:
        """The driver has sent what `next_write` gave, or will before a goodbye; whether there is more."""
        protocol = self.protocol
        if protocol.waiting_events or protocol.deadline_moved or protocol.open_streams != self._open_before:
            self._settle()
        return protocol.has_data_to_send()

    def deadline_due(self, now: float, *, upload_progressed: bool) -> None:
        """The protocol's deadline has passed; if `judgement_due`, the reader has had its chance (K7)."""
        self._look_for_gap(now)
        protocol = self.protocol
        timer = protocol.keepalive
        protocol.tells_of_pings = (
            self._hook is not None
            or timer.interval != timer.policy.read_idle_timeout
            or log.isEnabledFor(logging.DEBUG)
        )
        if upload_progressed:
            protocol.note_upload_progress(now)
        protocol.handle_timeout(now)
        # The timer is armed anew after this in any case.
        protocol.deadline_moved = False
        self._settle()

    # Inside

    def _look_for_gap(self, now: float) -> None:
        found = self._gaps.check(now)
        if found is UNBROKEN:
            return
        gap, wall_jumped = found
        if gap:
            log.debug("%s: %.1f s passed while the machine slept", self.origin, gap)
            self.protocol.note_gap(gap, now)
        elif wall_jumped:
            self.protocol.note_wall_jump()

    def _settle(self) -> None:
        """Act on what the last call to the protocol brought about."""
        protocol = self.protocol
        open_streams = protocol.open_streams
        # A stream may end without an event: when its response came before its upload's end.
        ended = open_streams < self._open_before
        self._open_before = open_streams
        changed = bool(protocol.waiting_events) and self._dispatch()
        if (ended or changed) and not protocol.closed and self._is_spent():
            protocol.close(self.loop.time())
            self._dispatch()
        if protocol.closed:
            self.driver.stop(abort=isinstance(protocol.error, ConnectionLost))
        else:
            if protocol.has_data_to_send():
                self.driver.wake_writer()
            elif ended and protocol.open_streams:
                self.driver.expect_requests()
            if protocol.deadline_moved:
                self._check_timer()
        if changed or (ended and not (self.has_room and protocol.accepting)):
            self._tell_owner()
        if self._hook is not None:
            self._tell_hook(self._hook)

    def _tell_owner(self) -> None:
        self.has_room = self.protocol.has_room
        self._owner.connection_changed(self)

    def _is_spent(self) -> bool:
        """Nothing is open, and nothing new will be."""
        return self.protocol.open_streams == 0 and not self.protocol.accepting

    def _check_timer(self) -> None:
        if not self.protocol.deadline_moved:
            return
        self.protocol.deadline_moved = False
        deadline = self.protocol.next_deadline()
        if deadline is not None and (self.timer_armed_for is None or deadline < self.timer_armed_for):
            self.driver.wake_timer()

    def _dispatch(self) -> bool:
        """Deliver all events; whether any of them concerns the pool. The good end of a stream does not as such."""
        changed = False
        waiting, streams = self.protocol.waiting_events, self._streams
        told: Http2Stream | None = None
        while waiting:
            event = waiting.popleft()
            deliver = _FOR_READERS.get(type(event))
            if deliver is None:
                changed = self._act_on(event) or changed
                continue
            stream = streams.get(event.stream_id)  # type: ignore[union-attr]
            if stream is not told:
                if told is not None:
                    told.wake()
                told = stream
            if stream is not None:
                deliver(stream, event)
        if told is not None:
            told.wake()
        return changed

    def _act_on(self, event: events.Event) -> bool:
        """Act on an event that whoever waits for a response need not be woken for; whether it concerns the pool."""
        kind = type(event)
        if isinstance(event, events.BodyRoom):
            stream = self._streams.get(event.stream_id)
            if stream is not None:
                stream.room_came()
        elif isinstance(event, events.StreamFailed):
            stream = self._streams.get(event.stream_id)
            if stream is not None and not self._moves(event.error, stream):
                stream.fail(event.error)
        elif kind is events.SettingsChanged:
            self._owner.connection_limited(self)
            self._give_back()
        elif kind is not events.InformationalReceived:
            if kind in (events.ConnectionReady, events.ConnectionClosed):
                self._ready.unpark()
            self._note(event)
        return kind not in _OF_NO_CONCERN

    def _moves(self, error: H2KeepError, stream: Http2Stream) -> bool:
        """Whether the failed request is sent again, on another connection (K24)."""
        if not (error.unprocessed and stream.replayable):
            return False
        # Not after timeouts: they are the request's own. Nor where HTTP/2 isn't spoken, as it won't be the next time.
        if self.orphaned or not isinstance(error, RemoteProtocolError | ConnectionLost):
            return False
        if type(error) is RemoteProtocolError and not self.protocol.ready:
            return False
        if isinstance(error, ConnectionGoingAway) and error.error_code == ErrorCode.HTTP_1_1_REQUIRED:
            return False
        return self._hand_over(stream, error)

    def _hand_over(self, stream: Http2Stream, error: H2KeepError) -> bool:
        stream.detach()
        if not self._owner.move(stream, error):
            return False
        del self._streams[stream.id]
        self.protocol.release(stream.id, self.loop.time())
        if not self._streams:
            self.idle_since = self.loop.time()
        return True

    def _give_back(self) -> None:
        """Requests that turn out to have no room here, and have not left, queue again for any connection."""
        for stream_id in self.protocol.displaced():
            stream = self._streams[stream_id]
            allowed = self.protocol.max_streams
            text = f"{self.origin}: the server allows {allowed} streams at once, and the request was not sent"
            if stream.replayable:
                # It was no attempt.
                stream.attempts -= 1
                self._hand_over(stream, RemoteProtocolError(text, unprocessed=True))

    def _note(self, event: events.Event) -> None:
        if isinstance(event, events.PingSent):
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s: PING (%s)", self.origin, event.purpose.name.lower())
            timer = self.protocol.keepalive
            if timer.interval != timer.policy.read_idle_timeout:
                self._owner.connection_pinged(self)
        elif isinstance(event, events.PingAcknowledged):
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s: PING acknowledged after %.1f ms", self.origin, event.rtt * 1000)
        elif isinstance(event, events.GoAwayReceived):
            log.info("%s: GOAWAY, error code %d, %r", self.origin, event.error_code, event.debug_data)
            if event.too_many_pings:
                self._owner.connection_calmed(self)
        elif isinstance(event, events.ConnectionClosed) and event.error is not None:
            log.info("%s", event.error)
        if self._hook is not None:
            self._hooked.append(cast("ConnectionEvent", event))

    def _tell_hook(self, hook: EventHook) -> None:
        while self._hooked:
            event = self._hooked.pop(0)
            try:
                hook(self.stats, event)
            except Exception:
                # The hook is the user's; its failure must not end requests that have nothing to do with it.
                log.exception("%s: the event hook failed on %r", self.origin, event)


#: What becomes of the events that whoever waits for a response waits for, each of which most responses have. By type,
#: as chains of isinstance cost more.
_FOR_READERS: dict[type, Callable[[Http2Stream, Any], None]] = {
    events.ResponseReceived: Http2Stream.head_came,
    events.DataReceived: Http2Stream.data_came,
    events.StreamEnded: Http2Stream.response_ended,
}
#: Those of the others that change nothing for the pool.
_OF_NO_CONCERN = frozenset({events.BodyRoom, events.InformationalReceived, events.PingSent, events.PingAcknowledged})
