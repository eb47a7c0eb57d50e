"""One HTTP/2 client connection as a pure state machine: bytes and clock readings in; bytes, events, one deadline out.

`Connection` joins the codec (`Engine`), keepalive (`KeepaliveTimer`), the order of sending (`Outbox`), the streams'
clocks (`Alarms`) and receive windows (`flow`). It knows no socket, task, lock or clock: time enters as `now`, seconds
on a monotonic clock that never runs backwards; randomness is passed in. A runner moves the bytes:

* after **every** call that takes `now`, drain `next_event()`, write if `has_data_to_send()`, and look at
  `next_deadline()` again: each such call may have changed all three;
* `handle_timeout(now)` at or after the deadline; early and spurious calls do nothing.

A connection that is over accepts every call and answers with nothing.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from h2keep.errors import (
    ConnectionLost,
    H2KeepError,
    LocalProtocolError,
    RemoteProtocolError,
)
from h2keep.keepalive import Keepalive, KeepaliveTimer, RandomSource, Verdict
from h2keep.protocol import events, reasons
from h2keep.protocol.alarms import Alarms
from h2keep.protocol.engine import Engine, ErrorCode
from h2keep.protocol.engines import DEFAULT_ENGINE, engine_named
from h2keep.protocol.flow import (
    CONNECTION_GROWTH,
    CONNECTION_WINDOW,
    INITIAL_WINDOW,
    MAX_STREAMS,
    PROCESS_GROWTH,
    GrowthBudget,
    ReceiveWindow,
)
from h2keep.protocol.outbox import HIGH_WATER, Outbox
from h2keep.protocol.stream import Stream

if TYPE_CHECKING:
    from h2keep.protocol.events import Headers

__all__ = ["Connection"]

#: Streams that a peer is taken to allow before it has said so (the floor that RFC 9113, section 6.5.2, recommends).
ASSUMED_STREAMS = 100
_HIGHEST_STREAM_ID = 2**31 - 1
#: Connection credit is returned in batches of this many bytes: few frames, yet never near the window's end.
_CREDIT_BATCH = 1024 * 1024
# K23.
_MAX_REPLIES = 1_000
_MAX_EMPTY_FRAMES = 1_000
_MAX_INFORMATIONAL = 100
#: Two read or write timeouts in a row without progress between them retire the connection (K21).
_TIMEOUTS_TO_RETIRE = 2

# In Python 3.11 a member costs as much to look up in its enumeration as a call of a function.
_SEND_PING, _LOST = Verdict.SEND_PING, Verdict.LOST

# Makes the events that each request has without the function of Python's that named tuples have in between.
_new = tuple.__new__

_process_growth = GrowthBudget(PROCESS_GROWTH)


class Connection:
    """A client's side of one HTTP/2 connection.

    `name` is the origin as messages are to call it, `now` the moment at which the transport was ready, `engine` the
    name of a codec (`engines.engine_named`, whose errors it raises).
    """

    __slots__ = (
        "_alarms", "_control_queued", "_credit_due", "_engine", "_growth", "_held_slots", "_next_stream_id", "_now",
        "_outbox", "_punished", "_replies", "_replies_since", "_settings_sent_at", "_streams", "_timeouts_in_row",
        "_unread", "closed", "deadline_moved", "error", "goaway", "keepalive", "max_streams", "name", "open_streams",
        "ready", "retired", "tells_of_pings", "waiting_events",
    )  # fmt: skip

    def __init__(
        self,
        keepalive: Keepalive,
        random: RandomSource,
        now: float,
        *,
        name: str = "the server",
        growth: GrowthBudget = _process_growth,
        engine: str = DEFAULT_ENGINE,
    ) -> None:
        self.name = name
        #: Detection of dead connections, and its figures (K20).
        self.keepalive = KeepaliveTimer(keepalive, random, now)
        #: Why the connection is over, None while it isn't or if it was closed in good order.
        self.error: H2KeepError | None = None
        #: The connection is over: nothing goes in or out any more but what `data_to_send` still holds.
        self.closed = False
        #: The peer's SETTINGS came.
        self.ready = False
        #: Concurrent streams allowed: the peer's limit, at most 256; what to count on until its SETTINGS come.
        self.max_streams = ASSUMED_STREAMS
        #: Whether PINGs and their ACKs make events: to tell of one costs a good part of what it takes to send it.
        self.tells_of_pings = True
        #: `next_deadline` may have moved to an earlier time. Whoever sleeps until then puts this to False.
        self.deadline_moved = False
        #: Two timeouts in a row without progress: no new requests (K21).
        self.retired = False
        #: The peer's GOAWAY with the lowest last_stream_id, None if there was none.
        self.goaway: events.GoAwayReceived | None = None
        #: Streams that count against the peer's limit.
        self.open_streams = 0
        self._growth = GrowthBudget(CONNECTION_GROWTH, growth)
        make_engine = engine_named(engine)
        self._engine: Engine = make_engine(self, initial_window=INITIAL_WINDOW, connection_window=CONNECTION_WINDOW)
        self._outbox = Outbox(self._engine)
        self._control_queued = True  # the connection preface
        #: What `next_event` takes from, for whoever finds a call an event dear.
        self.waiting_events: deque[events.Event] = deque()
        self._streams: dict[int, Stream] = {}
        self._alarms = Alarms(self._streams)
        self._next_stream_id = 1
        self._held_slots = 0
        self._unread = 0
        self._credit_due = 0
        self._replies = 0
        self._replies_since: float | None = None
        self._timeouts_in_row = 0
        self._punished = False
        self._settings_sent_at: float | None = None
        self._now = now

    # Pulls

    def next_event(self) -> events.Event | None:
        """What happened, oldest first; None when there is no more."""
        return self.waiting_events.popleft() if self.waiting_events else None

    def has_data_to_send(self) -> bool:
        """Whether `data_to_send` is worth calling."""
        return self._control_queued or (bool(self._streams) and self._outbox.has_data())

    def data_to_send(self, limit: int, now: float) -> bytes:
        """About `limit` bytes to hand over, most urgent first (K5); may make events and start clocks.

        Call it only when what it returned before has been taken by the transport.
        """
        return b"".join(self.pieces_to_send(limit, now))

    def pieces_to_send(self, limit: int, now: float) -> list[bytes | memoryview]:
        """As `data_to_send`, in pieces, for transports to which joining them would be a copy more."""
        self._control_queued = False
        self._replies = 0
        self._replies_since = None
        if self._settings_sent_at is None:
            self._settings_sent_at = now
        if not self._streams:
            return [self._engine.drain()]
        pieces, complete, relieved = self._outbox.collect(limit, now)
        for stream in complete:
            if stream.ended:
                self._close_stream(stream)
            elif stream.reading_since is not None:
                self._arm(stream, now)
        for stream in relieved:
            self.waiting_events.append(events.BodyRoom(stream.id))
        return pieces

    @property
    def body_bytes_sent(self) -> int:
        """Bytes of request bodies handed over so far."""
        return self._outbox.body_bytes

    def is_open(self, stream_id: int) -> bool:
        """Whether the stream is open, so that more of its request's body is of use."""
        stream = self._streams.get(stream_id)
        return stream is not None and stream.open

    def next_deadline(self) -> float | None:
        """When `handle_timeout` is due, None if nothing is. May be too early, never too late."""
        if self.closed:
            return None
        deadline = self.keepalive.next_deadline()
        # Asked where no stream is open, too: what those that are over have left there mustn't hide a later one's alarm.
        alarm = self._alarms.next_deadline()
        if alarm is not None and (deadline is None or alarm < deadline):
            deadline = alarm
        if self._replies_since is None:
            return deadline
        stuck = self._stuck_deadline()
        return deadline if stuck is None or (deadline is not None and deadline < stuck) else stuck

    def judgement_due(self, now: float) -> bool:
        """Whether `handle_timeout` may find somebody out of time now, so that the reader must have its turn before."""
        if self.closed:
            return False
        # An unused connection, of which there may be thousands, has no deadlines but those of its PINGs.
        if self.open_streams or self._replies_since is not None:
            alarm, stuck = self._alarms.next_deadline(), self._stuck_deadline()
            if (alarm is not None and now >= alarm) or (stuck is not None and now >= stuck):
                return True
        return self.keepalive.judgement_due(now)

    # Requests

    @property
    def accepting(self) -> bool:
        """Whether new requests may be opened at all (room is `free_slots`' business)."""
        return not (self.closed or self.retired or self.goaway is not None or self._next_stream_id > _HIGHEST_STREAM_ID)

    @property
    def free_slots(self) -> int:
        """How many requests can be opened now; negative after the peer lowered its limit.

        Slots of streams that were reset while the connection was under suspicion stay taken (K10). Complete responses
        that nobody reads take up room as streams do, of the room that is ours: the peer's limit knows nothing of them.
        """
        return self._slots(held=self._held_slots)

    @property
    def prospective_slots(self) -> int:
        """`free_slots` as it will be when the next life gives up the slots that K10 holds."""
        return self._slots(held=0)

    @property
    def has_room(self) -> bool:
        """Whether a new request may be opened now, or at the next life."""
        room = self._slots(held=0) if self._unread else self.max_streams - self.open_streams
        return room > 0 and self.accepting

    def _slots(self, held: int) -> int:
        allowed = self.max_streams - held
        if self._unread:
            allowed = min(allowed, MAX_STREAMS - -(-self._unread // INITIAL_WINDOW))
        return allowed - self.open_streams

    def displaced(self) -> list[int]:
        """The youngest requests that have not left, as many as the peer's limit has no room for."""
        excess = self.open_streams - self.max_streams
        if excess <= 0:
            return []
        return [stream.id for stream in self._streams.values() if stream.open and stream.fields is not None][-excess:]

    def send_request(
        self,
        fields: Headers,
        now: float,
        *,
        content_length: int | None = None,
        body: bytes = b"",
        end_stream: bool = True,
        awaited: bool = False,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
    ) -> int:
        """Queue a request; its stream id.

        `fields` and `content_length` come from `headers.request_fields`. `body` is what there is of it; more may come
        by `send_data`, unless `end_stream`. `awaited` means `await_data` at once. It counts as sent once `data_to_send`
        has encoded it. The timeouts, in seconds, are K21's. Raises `LocalProtocolError`, having queued nothing, if no
        request can be opened, or if the body contradicts its declared length.
        """
        if not self.accepting:
            raise LocalProtocolError(f"{self.name}: the connection takes no new requests", unprocessed=True)
        stream_id = self._next_stream_id
        stream = Stream(stream_id, fields, content_length, read_timeout, write_timeout, now)
        if body:
            stream.queue(body, end_stream, now)
        elif end_stream and content_length:
            raise LocalProtocolError(f"there is no body, but its Content-Length is {content_length}", unprocessed=True)
        else:
            stream.upload_ended = end_stream
        if awaited:
            stream.reading_since = now
        self._next_stream_id += 2
        self._streams[stream_id] = stream
        self.open_streams += 1
        if self.keepalive.note_stream_opened():
            self.deadline_moved = True
        self._outbox.add_head(stream)
        # Of which clock that is will be seen when it rings; most streams are over by then.
        if stream.patience < math.inf and self._alarms.arm(stream, now + stream.patience):
            self.deadline_moved = True
        return stream_id

    def send_data(self, stream_id: int, data: bytes | memoryview, end_stream: bool, now: float) -> bool:
        """Queue a chunk of a request's body, by reference; whether there is room for another at once.

        If not, `BodyRoom` will say when. Data for a stream that is over is dropped. Raises `LocalProtocolError` if
        the body contradicts its declared length; nothing of the chunk is queued then.
        """
        stream = self._streams.get(stream_id)
        if stream is None or not stream.open:
            return True
        stream.queue(data, end_stream, now)
        self._outbox.wake(stream)
        self._arm(stream, now)
        stream.wants_room = stream.queued > HIGH_WATER
        return not stream.wants_room

    def send_trailers(self, stream_id: int, fields: Headers, now: float) -> None:
        """End a request's body with trailers (checked by `headers.check_fields`)."""
        stream = self._streams.get(stream_id)
        if stream is not None and stream.open:
            stream.trailers = fields
            self.send_data(stream_id, b"", end_stream=True, now=now)

    def read(self, stream_id: int, now: float) -> bytes:
        """Take body bytes that wait, and renew the peer's credit for them; `b""` if none do.

        Where much waits not all of it is taken: see `has_unread`.
        """
        stream = self._streams.get(stream_id)
        if stream is None or not stream.buffer:
            return b""
        data = stream.take_received()
        if stream.open:
            self._consume(stream, len(data), now)
        else:
            self._take_unread(stream, len(data))
        return data

    def has_unread(self, stream_id: int) -> bool:
        """Whether body bytes wait."""
        stream = self._streams.get(stream_id)
        return stream is not None and bool(stream.buffer)

    def take_whole(self, stream_id: int) -> bytes | None:
        """As `read`, then `release`, of a stream that is over in both directions; None if it isn't."""
        stream = self._streams[stream_id]
        if stream.open:
            return None
        del self._streams[stream_id]
        data, stream.buffer = stream.buffer, b""
        if data:
            self._take_unread(stream, len(data))
        return data if isinstance(data, bytes) else bytes(data)

    def await_data(self, stream_id: int, now: float) -> None:
        """The application waits on this stream with nothing buffered: its read clock runs (K21)."""
        stream = self._streams.get(stream_id)
        if stream is not None and stream.open and not stream.buffer:
            stream.reading_since = now
            self._arm(stream, now)

    def release(self, stream_id: int, now: float) -> bool:
        """The application is done with this stream; whether it was still open, and thus is reset with CANCEL (K10)."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return False
        if stream.open:
            self.reset_stream(stream_id, ErrorCode.CANCEL, now)
            return True
        self._forget(stream)
        return False

    def reset_stream(self, stream_id: int, error_code: int, now: float) -> None:
        """Abandon a stream: RST_STREAM if the peer knows it, nothing if it was never sent; what waits is dropped.

        The response to a complete upload that ended before is no longer open and isn't touched.
        """
        stream = self._streams.get(stream_id)
        if stream is not None and stream.open:
            self._abandon(stream, error_code, now)
            self._close_stream(stream)
            self._forget(stream)

    def ping(self, now: float) -> bool:
        """A user's PING: True if it was queued, False if it joined the outstanding one (K3)."""
        return self.keepalive.ping_for_user(now) and self._send_ping(now)

    def verify(self, now: float) -> bool:
        """K9's PING, before a request is given to this connection: True if one is outstanding after this call."""
        if self.keepalive.ping_for_checkout(now):
            self._send_ping(now)
        return self.keepalive.outstanding

    def verified(self, now: float) -> bool:
        """Whether a request may be given to this connection without asking it for life first (K9)."""
        return self.keepalive.verified(now)

    def use_interval(self, read_idle_timeout: float) -> None:
        """Put another interval in force, in seconds (K13); see `KeepaliveTimer.use_interval`."""
        self.keepalive.use_interval(read_idle_timeout)
        self.deadline_moved = True

    def close(self, now: float) -> None:
        """Say GOAWAY; streams that are still open fail."""
        if not self.closed:
            self._engine.send_goaway(ErrorCode.NO_ERROR, b"")
            self._control_queued = True
            self._end(ConnectionLost(f"{self.name}: the connection was closed by this side"), now, in_order=True)

    def give_up(self, error: H2KeepError, now: float) -> None:
        """Say GOAWAY for a reason of the runner's; streams that are still open fail with it."""
        if not self.closed:
            self._engine.send_goaway(ErrorCode.NO_ERROR, b"")
            self._control_queued = True
            self._end(error, now)

    # Facts from the runner

    def note_life(self, now: float) -> None:
        """Bytes arrived below TLS (K2). Call it before decrypting, and before `receive_data`."""
        self.keepalive.note_life(now)
        if self._held_slots:
            self._held_slots = 0
            self.waiting_events.append(events.SettingsChanged())

    def note_gap(self, seconds: float, now: float) -> None:
        """Time passed that the monotonic clock didn't see (K25)."""
        self.keepalive.note_gap(seconds, now)

    def note_wall_jump(self) -> None:
        """The wall clock jumped ahead: perhaps a restored snapshot; the connection must prove itself (K25)."""
        self.keepalive.distrust()

    def note_upload_progress(self, now: float) -> None:
        """The peer's TCP acknowledged more of an upload since the last look (K4)."""
        self.keepalive.note_upload_progress(now)

    def receive_data(self, data: bytes, now: float) -> None:
        """Plaintext from the peer."""
        if self.closed:
            return
        self._now = now
        try:
            self._engine.receive(data)
            if self._credit_due >= _CREDIT_BATCH:
                self._engine.send_window_update(0, self._credit_due)
                self._credit_due = 0
                self._note_reply()
        except RemoteProtocolError as error:
            self._control_queued = True
            self._end(reasons.named(self.name, error), now)

    def receive_eof(self, now: float, cause: Exception | None = None) -> None:
        """The transport ended: EOF, or `cause`."""
        if self.closed:
            return
        how = "was closed by the server" if cause is None else f"failed: {cause}"
        error = reasons.lost(f"{self.name}: the connection {how}", self.keepalive, now)
        error.__cause__ = cause
        self._end(error, now, in_order=cause is None and not self.open_streams)

    def handle_timeout(self, now: float) -> None:
        """Act on every deadline that has passed; where `judgement_due`, after two passes of the scheduler (K7)."""
        if self.closed:
            return
        if self.open_streams or self._replies_since is not None:
            for stream in self._alarms.due(now):
                self._time_out(stream, now)
            stuck = self._stuck_deadline()
            if stuck is not None and now >= stuck:
                text = f"{self.name}: the server takes no bytes any more"
                self._end(reasons.lost(text, self.keepalive, now), now)
                return
        verdict = self.keepalive.handle_timeout(now)
        if verdict is _SEND_PING:
            self._send_ping(now)
        elif verdict is _LOST:
            self._end(reasons.ping_timeout(self.name, self.keepalive, now), now)

    # Engine reports

    def on_informational(self, stream_id: int, status: int, headers: Headers) -> None:
        """EngineHandler."""
        stream = self._progress(stream_id)
        stream.informational += 1
        if stream.informational > _MAX_INFORMATIONAL:
            self._refuse(stream, f"more than {_MAX_INFORMATIONAL} interim responses")
            return
        self.waiting_events.append(events.InformationalReceived(stream_id, status, headers))

    def on_response(self, stream_id: int, status: int, headers: Headers, end_stream: bool) -> None:
        """EngineHandler."""
        stream = self._progress(stream_id)
        stream.reading_since = None
        stream.response_seen = True
        self.waiting_events.append(_new(events.ResponseReceived, (stream_id, status, headers)))
        if end_stream:
            self._end_response(stream, [])

    def on_trailers(self, stream_id: int, headers: Headers) -> None:
        """EngineHandler."""
        self._end_response(self._progress(stream_id), headers)

    def on_data(self, stream_id: int, data: bytes, flow_length: int, end_stream: bool) -> None:
        """EngineHandler."""
        self._credit_due += flow_length
        stream = self._progress(stream_id)
        if data:
            stream.reading_since = None
            stream.empty_frames = 0
            if not stream.buffer:
                self.waiting_events.append(_new(events.DataReceived, (stream_id,)))
            stream.receive(data)
        else:
            stream.empty_frames += 1
        if end_stream:
            self._end_response(stream, [])
        elif stream.empty_frames > _MAX_EMPTY_FRAMES:
            self._refuse(stream, f"more than {_MAX_EMPTY_FRAMES} empty DATA frames in a row")
        elif flow_length > len(data):
            self._consume(stream, flow_length - len(data), self._now)

    def on_discarded(self, flow_length: int) -> None:
        """EngineHandler."""
        self._credit_due += flow_length
        self._timeouts_in_row = 0
        self.keepalive.note_progress()

    def on_reset(self, stream_id: int, error_code: int) -> None:
        """EngineHandler."""
        stream = self._streams[stream_id]
        refused = error_code == ErrorCode.REFUSED_STREAM and not (stream.response_seen or stream.informational)
        self._fail_stream(stream, reasons.reset(self.name, error_code, refused=refused))

    def on_stream_error(self, stream_id: int, error_code: int, error: RemoteProtocolError) -> None:
        """EngineHandler."""
        self._note_reply()
        self._fail_stream(self._streams[stream_id], reasons.named(self.name, error))

    def on_settings(self) -> None:
        """EngineHandler."""
        if not self.ready:
            self.ready = True
            self.waiting_events.append(events.ConnectionReady(self._now))
        limit = self._engine.max_concurrent_streams
        self.max_streams = MAX_STREAMS if limit is None else min(limit, MAX_STREAMS)
        self.waiting_events.append(events.SettingsChanged())
        # Initial windows may have opened; SETTINGS are rare enough to look at every stream.
        for stream in self._streams.values():
            self._outbox.wake(stream)
        if self.open_streams > self.max_streams:
            on_wire = sum(stream.open and stream.fields is None for stream in self._streams.values())
            self._outbox.allowance = self.max_streams - on_wire
        else:
            self._outbox.allowance = math.inf

    def on_settings_acknowledged(self) -> None:
        """EngineHandler."""
        if self._settings_sent_at is not None and self.keepalive.rtt_last is None:
            self.keepalive.note_rtt(self._now - self._settings_sent_at)

    def on_ping_acknowledged(self, payload: bytes) -> None:
        """EngineHandler."""
        rtt = self.keepalive.note_ping_ack(payload, self._now)
        if rtt is not None and self.tells_of_pings:
            self.waiting_events.append(_new(events.PingAcknowledged, (rtt, self._now)))

    def on_window_opened(self, stream_id: int) -> None:
        """EngineHandler."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._outbox.wake(stream)

    def on_reply_queued(self) -> None:
        """EngineHandler."""
        self._note_reply()

    def on_goaway(self, last_stream_id: int, error_code: int, debug_data: bytes) -> None:
        """EngineHandler."""
        before = self.goaway
        if before is not None:
            last_stream_id = min(last_stream_id, before.last_stream_id)
        # Said twice it is still one punishment: the PINGs in question were the same.
        calm = error_code == ErrorCode.ENHANCE_YOUR_CALM and not self._punished and self.keepalive.note_calm(debug_data)
        self._punished = self._punished or calm
        self.goaway = events.GoAwayReceived(last_stream_id, error_code, debug_data, calm, self._now)
        self.keepalive.note_going_away()
        self.waiting_events.append(self.goaway)
        if before is not None and last_stream_id == before.last_stream_id:
            return
        for stream in [stream for stream in self._streams.values() if stream.open]:
            # What wasn't sent yet must not be sent any more, whatever the server still allows (RFC 9113, section 6.8).
            if stream.id <= last_stream_id and stream.fields is None:
                continue
            if stream.fields is None:
                self._engine.forget(stream.id)
            self._fail_stream(stream, reasons.going_away(self.name, self.goaway))

    # Inside

    def _arm(self, stream: Stream, now: float) -> None:
        """One of the stream's clocks may have begun to run."""
        alarm = stream.alarm
        # Nearly always there is one that rings soon enough, whichever clock it was.
        if alarm is None or alarm > now + stream.patience:
            deadline = stream.deadline()
            if deadline is not None and self._alarms.arm(stream, deadline):
                self.deadline_moved = True

    def _progress(self, stream_id: int) -> Stream:
        """HEADERS or DATA came on this stream."""
        self._timeouts_in_row = 0
        self.keepalive.note_progress()
        return self._streams[stream_id]

    def _consume(self, stream: Stream, amount: int, now: float) -> None:
        if stream.window is None:
            stream.window = ReceiveWindow(self._growth, stream.opened_at)
        increment = stream.window.consume(amount, now, self.keepalive.rtt_best)
        if increment and stream.open and not stream.ended:
            self._engine.send_window_update(stream.id, increment)
            self._count_reply(now)

    def _end_response(self, stream: Stream, trailers: Headers) -> None:
        stream.ended = True
        stream.reading_since = None
        self.waiting_events.append(_new(events.StreamEnded, (stream.id, trailers)))
        if stream.end_sent_at is not None:
            self._close_stream(stream)

    def _close_stream(self, stream: Stream) -> None:
        """The stream no longer counts; bytes that wait on it can still be read."""
        stream.open = False
        outbox = self._outbox
        if outbox.allowance < math.inf:
            outbox.allowance += stream.fields is None
            if self.open_streams - 1 <= self.max_streams:
                outbox.allowance = math.inf
        stream.chunks = None
        stream.queued = 0
        if stream.buffer:
            # Its window's growth is still in use, by the bytes that wait (`_take_unread` gives it back).
            self._unread += len(stream.buffer)
        elif stream.window is not None:
            stream.window.release()
        self._alarms.disarm(stream)
        self.open_streams -= 1
        self.keepalive.note_stream_closed()

    def _forget(self, stream: Stream) -> None:
        unread, stream.buffer = len(stream.buffer), b""
        self._take_unread(stream, unread)
        del self._streams[stream.id]

    def _take_unread(self, stream: Stream, amount: int) -> None:
        """Bytes that waited on a stream that is over were read, or nobody will read them."""
        self._unread -= amount
        if stream.window is not None and not stream.buffer:
            stream.window.release()

    def _fail_stream(self, stream: Stream, error: H2KeepError) -> None:
        """The stream is over. If its response was complete, it stands, and merely the rest of the body isn't wanted."""
        self._close_stream(stream)
        event = events.BodyRoom(stream.id) if stream.ended else events.StreamFailed(stream.id, error)
        self.waiting_events.append(event)

    def _abandon(self, stream: Stream, error_code: int, now: float) -> None:
        """Tell the peer, if it knows the stream, that we are done with it."""
        if stream.sent_at is None:
            return
        # After the response's end only our own half is open: the peer has no more use for it.
        self._engine.send_reset(stream.id, ErrorCode.NO_ERROR if stream.ended else error_code)
        self._control_queued = True
        if not stream.ended:
            self._suspect(stream.sent_at, now)

    def _refuse(self, stream: Stream, reason: str) -> None:
        """The peer misbehaves on one stream (K23)."""
        self._engine.send_reset(stream.id, ErrorCode.ENHANCE_YOUR_CALM)
        self._note_reply()
        self._fail_stream(stream, RemoteProtocolError(f"{self.name}: the server sent {reason}; the stream was reset"))

    def _suspect(self, sent_at: float, now: float) -> None:
        if self.keepalive.ping_for_suspicion(sent_at, now):
            self._send_ping(now)
        if not self.keepalive.verified(now):
            self._held_slots += 1

    def _send_ping(self, now: float) -> bool:
        self._engine.send_ping(self.keepalive.payload)
        self._control_queued = self.deadline_moved = True
        if self.tells_of_pings:
            self.waiting_events.append(_new(events.PingSent, (self.keepalive.last_ping_purpose, now)))
        return True

    def _count_reply(self, now: float) -> None:
        self._control_queued = True
        self._replies += 1
        if self._replies_since is None:
            self._replies_since = now
            self.deadline_moved = True

    def _note_reply(self) -> None:
        """A reply was queued; too many unsent ones end the connection (K23; 1,000 of the largest are 17 KB).

        Raises `RemoteProtocolError` then, which also stops the engine where it is: what follows would find no streams.
        """
        self._count_reply(self._now)
        if self._replies > _MAX_REPLIES:
            self._engine.send_goaway(ErrorCode.ENHANCE_YOUR_CALM, b"")
            raise RemoteProtocolError("the server asks for replies faster than it takes them")

    def _stuck_deadline(self) -> float | None:
        if self._replies_since is None:
            return None
        policy = self.keepalive.policy
        if policy.read_idle_timeout is None:
            return None
        return self._replies_since + policy.read_idle_timeout + policy.ping_timeout

    def _time_out(self, stream: Stream, now: float) -> None:
        """A clock of the stream has run out; what is buffered can still be read."""
        read = stream.read_deadline()
        error: H2KeepError
        if read is not None and read <= now:
            error = reasons.read_timeout(self.name, stream)
        else:
            error = reasons.write_timeout(self.name, stream, self._obstacle(stream))
        if not stream.ended:
            self._timeouts_in_row += 1
            self.retired = self.retired or self._timeouts_in_row >= _TIMEOUTS_TO_RETIRE
        self._abandon(stream, ErrorCode.CANCEL, now)
        self._fail_stream(stream, error)

    def _obstacle(self, stream: Stream) -> str:
        if stream.fields is not None and self._outbox.allowance <= 0:
            return "server, which lowered its limit of concurrent streams,"
        if stream.fields is None and stream.queued:
            if self._engine.send_window(stream.id) <= 0:
                return "stream's flow-control window"
            if self._engine.connection_window() <= 0:
                return "connection's flow-control window"
        return "socket"

    def _end(self, error: H2KeepError, now: float, *, in_order: bool = False) -> None:
        """The connection is over: its open streams fail, each in its own right (K8)."""
        self.closed = True
        self.error = None if in_order else error
        self._held_slots = 0
        for stream in [stream for stream in self._streams.values() if stream.open]:
            self._fail_stream(stream, error.for_request(unprocessed=stream.fields is not None))
        for stream in self._streams.values():
            # Unread bytes may be forgotten with the connection; the process's share of growth must not be.
            if stream.window is not None:
                stream.window.release()
        self.keepalive.close()
        self.waiting_events.append(events.ConnectionClosed(self.error, now))
