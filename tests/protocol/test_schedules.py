"""Thousands of random schedules over the virtual wire: requests, cancellations, uploads, downloads, SETTINGS, GOAWAY,
RST_STREAM, malformed responses, blocked sockets and dead networks, in any order and at any moment.

`World` plays both ends against each other and keeps its own account of what happened. After each move it compares that
with the connection's counters, windows and deadlines; at the end everything must have been given back.
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import h2.events
import h2.exceptions
import h2.settings
import pytest
from hyperframe import frame as frames

from h2keep.errors import ConnectionGoingAway, PingTimeout, StreamReset
from h2keep.keepalive import Keepalive, PingPurpose
from h2keep.protocol import events
from h2keep.protocol.flow import CONNECTION_GROWTH, INITIAL_WINDOW, GrowthBudget
from support.pair import REQUEST, Pair, parse_frames

if TYPE_CHECKING:
    from collections.abc import Callable

Codes = h2.settings.SettingCodes
#: Rounding, in seconds.
EPSILON = 1e-6
FINAL = (events.StreamEnded, events.StreamFailed)


class Request:
    """What the world knows about one request."""

    def __init__(self, stream_id: int, *, uploading: bool, trailers: bool) -> None:
        self.id = stream_id
        self.uploading = uploading
        self.trailers = trailers
        self.room = True
        self.sent = bytearray()
        self.released = False
        self.final: events.StreamEnded | events.StreamFailed | None = None
        self.head = False
        self.data_waits = False
        self.read = bytearray()


class World:
    """Both ends, the network and the application; see the module's docstring."""

    def __init__(self, seed: int) -> None:
        choose = self.choose = random.Random(seed)
        self.keepalive = Keepalive(
            read_idle_timeout=choose.choice([None, 1.0, 10.0, 30.0]),
            ping_timeout=choose.choice([1.0, 5.0, 15.0]),
            while_idle=choose.random() < 0.3,
            jitter=choose.choice([0.0, 0.1, 0.5]),
        )
        self.process = GrowthBudget(CONNECTION_GROWTH // 2)
        self.pair = Pair(
            self.keepalive,
            latency=choose.choice([0.0, 0.01, 0.2]),
            seed=seed,
            chop=choose.random() < 0.3,
            write_limit=choose.choice([1, 16_384, 65_536]),
            growth=self.process,
        )
        self.pair.on_server_event = self._on_server_event
        self.pair.on_client_bytes = self._on_client_bytes
        self.client, self.server = self.pair.client, self.pair.server
        self.requests: dict[int, Request] = {}
        self.seen = 0
        # At the server.
        self.arrived: dict[int, bytearray] = {}
        self.arrived_whole: set[int] = set()
        self.headed: set[int] = set()
        self.answered: dict[int, bytearray] = {}
        self.finished: set[int] = set()
        self.refused: set[int] = set()
        self.going_away: int | None = None
        # On the wire.
        self.headers_out: set[int] = set()
        self.resets_out: set[int] = set()
        self.settings_under_way = 1

    # What goes over the wire

    def _on_client_bytes(self, data: bytes) -> None:
        rank = 0
        for frame in parse_frames(data):
            kind, stream_id = type(frame), frame.stream_id
            if kind is frames.HeadersFrame and stream_id not in self.headers_out:
                now = 1
                self.headers_out.add(stream_id)
                assert self.going_away_seen is None, "a stream was opened after GOAWAY"
            elif kind in (frames.HeadersFrame, frames.DataFrame):
                now = 2
                assert stream_id not in self.resets_out, "a frame after RST_STREAM"
            elif kind is frames.ContinuationFrame:
                now = rank
            else:
                now = 0
            if kind is frames.RstStreamFrame:
                assert stream_id in self.headers_out, "RST_STREAM on an idle stream"
                assert stream_id not in self.resets_out, "two RST_STREAM on one stream (K23)"
                self.resets_out.add(stream_id)
            assert now >= rank, "control frames, then heads, then bodies (K5)"
            rank = now

    @property
    def going_away_seen(self) -> int | None:
        return None if self.client.goaway is None else self.client.goaway.last_stream_id

    def _on_server_event(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            assert event.stream_id is not None
            self.arrived[event.stream_id] = bytearray()
        elif isinstance(event, h2.events.DataReceived):
            assert event.stream_id is not None
            self.arrived[event.stream_id] += event.data or b""
            if event.flow_controlled_length and self.choose.random() < 0.9:
                self._at_server(
                    lambda: self.server.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                )
        elif isinstance(event, h2.events.SettingsAcknowledged):
            self.settings_under_way -= 1
        elif isinstance(event, h2.events.StreamEnded):
            assert event.stream_id is not None
            self.arrived_whole.add(event.stream_id)

    def _at_server(self, act: Callable[[], object]) -> bool:
        """What h2 refuses to do is not done: False then."""
        try:
            act()
        except (h2.exceptions.ProtocolError, KeyError):
            return False
        return True

    # The application's moves

    def some_request(self) -> Request | None:
        mine = [request for request in self.requests.values() if not request.released]
        return self.choose.choice(mine) if mine else None

    def open(self) -> None:
        client, choose = self.client, self.choose
        if not client.accepting or client.free_slots <= 0:
            return
        uploading = choose.random() < 0.5
        fields = list(REQUEST)
        if choose.random() < 0.3:
            fields.append((b"x-%d" % choose.randrange(5), b"v" * choose.choice([*[1] * 20, 2_000, 40_000])))
        stream_id = client.send_request(
            fields,
            self.pair.now,
            end_stream=not uploading,
            read_timeout=choose.choice([None, 0.5, 5.0, 60.0]),
            write_timeout=choose.choice([None, 0.5, 5.0, 60.0]),
        )
        self.requests[stream_id] = Request(stream_id, uploading=uploading, trailers=choose.random() < 0.2)
        client.await_data(stream_id, self.pair.now)

    def upload(self) -> None:
        request = self.some_request()
        if request is None or not request.uploading or not request.room or request.final is not None:
            return
        chunk = self.choose.randbytes(self.choice([0, 1, 1_000, 20_000, 150_000]))
        end = self.choose.random() < 0.4
        if end and request.trailers:
            request.room = self.client.send_data(request.id, chunk, end_stream=False, now=self.pair.now)
            self.client.send_trailers(request.id, [(b"x-sum", b"1")], self.pair.now)
        else:
            request.room = self.client.send_data(request.id, chunk, end_stream=end, now=self.pair.now)
        request.sent += chunk
        request.uploading = not end

    def choice(self, sizes: list[int]) -> int:
        return self.choose.choice(sizes)

    def read(self) -> None:
        request = self.some_request()
        if request is not None:
            self._read(request)

    def _read(self, request: Request) -> None:
        data = self.client.read(request.id, self.pair.now)
        assert bool(data) == request.data_waits, "DataReceived and what can be read must agree"
        request.data_waits = self.client.has_unread(request.id)
        request.read += data
        if not data and request.final is None:
            self.client.await_data(request.id, self.pair.now)

    def release(self) -> None:
        request = self.some_request()
        if request is not None:
            self._release(request)

    def _release(self, request: Request) -> None:
        self._collect()
        self.client.release(request.id, self.pair.now)
        request.released = True

    def ask(self) -> None:
        client, now = self.client, self.pair.now
        moves: list[Callable[[], object]] = [
            lambda: client.ping(now),
            lambda: client.verify(now),
            lambda: client.note_gap(100.0, now),
            client.note_wall_jump,
            lambda: client.note_upload_progress(now),
            lambda: client.handle_timeout(now),
            lambda: client.use_interval(self.choose.choice([1.0, 60.0])),
        ]
        self.choose.choice(moves)()

    # The server's moves

    def answer(self) -> None:
        ids = [stream_id for stream_id in self.arrived if stream_id not in self.finished]
        if not ids:
            return
        stream_id = self.choose.choice(ids)
        if stream_id not in self.headed:
            if self.choose.random() < 0.2:
                self._at_server(lambda: self.server.send_headers(stream_id, [(":status", "103"), ("link", "x")]))
            end = self.choose.random() < 0.2
            fields = [(":status", "200"), ("x-n", str(self.choose.randrange(5)))]
            if self._at_server(lambda: self.server.send_headers(stream_id, fields, end_stream=end)):
                self.headed.add(stream_id)
                self.answered[stream_id] = bytearray()
                if end:
                    self.finished.add(stream_id)
            return
        pad = self.choose.choice([None, None, 200])
        try:
            room = self.server.local_flow_control_window(stream_id) - (0 if pad is None else pad + 1)
        except h2.exceptions.ProtocolError:
            self.finished.add(stream_id)
            return
        data = self.choose.randbytes(max(0, min(self.choose.choice([0, 1, 5_000, 16_000]), room)))
        if room < 0:
            pad = None
        end = self.choose.random() < 0.2
        if end and self.choose.random() < 0.3:
            self._at_server(lambda: self.server.send_headers(stream_id, [("x-t", "1")], end_stream=True))
            self.finished.add(stream_id)
        elif self._at_server(lambda: self.server.send_data(stream_id, data, end_stream=end, pad_length=pad)):
            self.answered[stream_id] += data
            if end:
                self.finished.add(stream_id)

    def reset(self) -> None:
        ids = [stream_id for stream_id in self.arrived if stream_id not in self.finished]
        if self.choose.random() < 0.3:
            ids = [stream_id for stream_id in self.finished if stream_id not in self.arrived_whole] or ids
        if ids:
            stream_id = self.choose.choice(ids)
            code = self.choose.choice([0, 2, 7, 8, 0xFFFF])
            if self._at_server(lambda: self.server.reset_stream(stream_id, code)):
                self.finished.add(stream_id)
                if code == 7 and stream_id not in self.headed:
                    self.refused.add(stream_id)

    def settings(self) -> None:
        if self.settings_under_way:
            # h2, as a server, takes the ACK of its first SETTINGS for one of its second.
            return
        code, values = self.choose.choice(
            [
                (Codes.INITIAL_WINDOW_SIZE, [0, 1, 1_000, 65_535, 1_000_000]),
                (Codes.MAX_CONCURRENT_STREAMS, [0, 1, 5, 100, 1_000]),
                (Codes.HEADER_TABLE_SIZE, [0, 100, 4_096, 65_536]),
                (Codes.MAX_FRAME_SIZE, [16_384, 100_000]),
            ]
        )
        value = self.choose.choice(values)
        if self._at_server(lambda: self.server.update_settings({code: value})):
            self.settings_under_way += 1

    def credit(self) -> None:
        self._at_server(lambda: self.server.increment_flow_control_window(self.choose.choice([1, 100_000])))
        ids = [stream_id for stream_id in self.arrived if stream_id not in self.arrived_whole]
        if ids:
            stream_id = self.choose.choice(ids)
            self._at_server(lambda: self.server.increment_flow_control_window(50_000, stream_id))

    def server_ping(self) -> None:
        self._at_server(lambda: self.server.ping(b"12345678"))

    def goaway(self) -> None:
        if self.choose.random() > 0.15:
            return
        last = self.choose.choice([0, 2**31 - 1, *self.requests])
        if self.choose.random() < 0.5:
            last |= 2**31  # the reserved bit, to be ignored
        code, debug = self.choose.choice([(0, b""), (2, b"oops"), (0xB, b"too_many_pings"), (0xB, b"busy")])
        goaway = frames.GoAwayFrame(0, last_stream_id=0, error_code=code, additional_data=debug).serialize()
        self.pair.server_send_raw(goaway[:9] + last.to_bytes(4, "big") + goaway[13:])
        last &= 2**31 - 1
        self.going_away = last if self.going_away is None else min(last, self.going_away)

    def misbehave(self) -> None:
        """A stream error, on a stream that is open or was."""
        if self.choose.random() > 0.2 or not self.arrived:
            return
        stream_id = self.choose.choice(list(self.arrived))
        if stream_id not in self.finished and stream_id not in self.headed and self.choose.random() < 0.5:
            head = frames.HeadersFrame(stream_id, data=b"\x40\x01a\x01b", flags=["END_HEADERS"])
            # The server's encoder must agree with what was sent by hand.
            self.server.encoder.header_table.add(b"a", b"b")
            self.pair.server_send_raw(head.serialize())
            self.finished.add(stream_id)
        else:
            # The window may be below zero (RFC 9113, section 6.9.2): the second is too much in any case.
            overflow = frames.WindowUpdateFrame(stream_id, window_increment=2**31 - 1)
            self.pair.server_send_raw(2 * overflow.serialize())

    # The network's moves

    def block(self) -> None:
        if self.choose.random() < 0.3:
            self.pair.blocked = True

    def unblock(self) -> None:
        self.pair.blocked = False

    def pass_time(self) -> None:
        self._run(self.choose.choice([0.0, 0.01, 0.1, 1.0, 7.0, 40.0]))

    def _run(self, seconds: float) -> None:
        until = self.pair.now + seconds
        while self.pair.step(until):
            self.check()
        self.pair.now = max(self.pair.now, until)

    # What must hold at any time

    def _collect(self) -> None:
        """Take in the client's events."""
        self.pair._drain_events()
        for event in self.pair.events[self.seen :]:
            if hasattr(event, "stream_id"):
                self._take(event)
        self.seen = len(self.pair.events)

    def _take(self, event: events.Event) -> None:
        request = self.requests[event.stream_id]  # type: ignore[union-attr]
        assert not request.released, f"{event} after its release"
        if isinstance(event, events.BodyRoom):
            assert not isinstance(request.final, events.StreamFailed)
            request.room = True
            return
        assert request.final is None, f"{event} after {request.final}"
        if isinstance(event, events.ResponseReceived):
            assert not request.head
            request.head = True
        elif isinstance(event, events.DataReceived):
            assert request.head
            assert not request.data_waits
            request.data_waits = True
        elif isinstance(event, FINAL):
            request.final = event
            if isinstance(event, events.StreamFailed):
                self._judge(request, event.error)
            else:
                assert request.head

    def _judge(self, request: Request, error: object) -> None:
        """K24: what counts as not processed."""
        goaway = isinstance(error, ConnectionGoingAway)
        refused = isinstance(error, StreamReset) and request.id in self.refused
        never_sent = request.id not in self.headers_out
        assert error.unprocessed == (never_sent or goaway or refused), repr(error)  # type: ignore[attr-defined]
        if goaway and not never_sent:
            assert self.going_away is not None
            assert request.id > self.going_away

    def check(self) -> None:
        self._collect()
        client, now = self.client, self.pair.now
        streams = list(client._streams.values())
        open_ = [stream for stream in streams if stream.open]
        assert client.open_streams == len(open_) == client.keepalive.open_streams
        assert client._unread == sum(len(stream.buffer) for stream in streams if not stream.open)
        assert client._alarms._live == sum(stream.alarm is not None for stream in streams)
        grown = sum(stream.window.size - INITIAL_WINDOW for stream in streams if stream.window)
        assert client._growth.available + grown == CONNECTION_GROWTH
        assert self.process.available + grown == CONNECTION_GROWTH // 2
        for stream in open_:
            request = self.requests[stream.id]
            assert isinstance(request.final, events.StreamEnded) or request.final is None
            assert stream.fields is not None or stream.sending or not client._outbox._can_send(stream)
        deadline = client.next_deadline()
        if client.closed:
            assert not open_
            assert deadline is None
            return
        assert {stream.id for stream in open_ if stream.fields is None} == set(client._engine._streams)  # type: ignore[attr-defined]
        dues = [due for stream in open_ if (due := stream.deadline()) is not None]
        if dues:
            assert deadline is not None
            assert deadline <= min(dues) + EPSILON
        if client.keepalive.outstanding:
            assert deadline is not None
            assert deadline <= now + 3 * self.keepalive.ping_timeout + 1.0

    # A whole schedule

    MOVES = (
        ["open"] * 6 + ["upload"] * 5 + ["read"] * 4 + ["release"] * 2 + ["ask"] + ["answer"] * 8
        + ["reset", "settings", "credit", "credit", "server_ping", "goaway", "misbehave", "block", "unblock", "unblock"]
        + ["pass_time"] * 5
    )  # fmt: skip

    def play(self, moves: int) -> None:
        for _ in range(moves):
            getattr(self, self.choose.choice(self.MOVES))()
            self._collect()
            self.check()
            if self.choose.random() < 0.7:
                self.pair.pump()
                self.check()

    def end(self) -> None:
        """In one of five ways; afterwards nothing is owed to anybody."""
        way = self.choose.choice(["close", "eof", "failure", "black hole", "in peace"])
        client, pair = self.client, self.pair
        if way == "black hole":
            self._fall_silent()
        elif way == "close":
            client.close(pair.now)
        elif way == "eof":
            client.receive_eof(pair.now)
        elif way == "failure":
            client.receive_eof(pair.now, ConnectionResetError("reset"))
        self.check()
        pair.blocked = False
        pair.pump()
        self.check()
        for request in self.requests.values():
            if not request.released:
                self._check_outcome(request)
                self._release(request)
        pair.pump()
        self._run(1.0)
        assert (client.open_streams, client._unread, client._streams, client._alarms._live) == (0, 0, {}, 0)
        assert client._growth.available == CONNECTION_GROWTH
        assert self.process.available == CONNECTION_GROWTH // 2
        if client.closed:
            assert client._held_slots == 0
            assert len(pair.happened(events.ConnectionClosed)) == 1
            assert isinstance(pair.events[-1], events.ConnectionClosed)
            assert client.next_deadline() is None

    def _check_outcome(self, request: Request) -> None:
        """What arrived is what was sent; what ended was whole."""
        while request.data_waits:
            self._read(request)
        answered = self.answered.get(request.id, bytearray())
        assert answered.startswith(request.read)
        if isinstance(request.final, events.StreamEnded):
            assert request.read == answered
        if self.client.closed:
            assert request.final is not None, "a request without an outcome"

    def _fall_silent(self) -> None:
        """The network dies: with a request open it is noticed in time (K4)."""
        client, pair = self.client, self.pair
        pair.black_hole()
        pair.blocked = False
        pair.pump()
        before = client.keepalive.last_life
        interval = client.keepalive.interval
        if client.closed or interval is None or not client.accepting:
            client.close(pair.now)
            return
        client.send_request(list(REQUEST), pair.now)
        self.requests[client._next_stream_id - 2] = Request(client._next_stream_id - 2, uploading=False, trailers=False)
        began = pair.now
        while not client.closed:
            assert pair.step()
            self.check()
        assert client.keepalive.last_life == before
        assert isinstance(client.error, PingTimeout)
        # An outstanding PING may have been given K4's and K7's extensions before.
        allowed = max(began, before + interval) + 6 * self.keepalive.ping_timeout + 0.2
        assert pair.now <= allowed
        assert pair.now >= (client.keepalive.last_ping_at or 0.0) + self.keepalive.ping_timeout - EPSILON

    def check_pings(self) -> None:
        """K16, over the whole schedule."""
        idle = [e.at for e in self.pair.events if isinstance(e, events.PingSent) and e.purpose is PingPurpose.IDLE]
        least = (1 - self.keepalive.jitter) * (self.keepalive.read_idle_timeout or 0.0)
        for before, after in itertools.pairwise(idle):
            assert after - before >= least - EPSILON


@pytest.mark.parametrize("batch", range(40))
def test_k4_k5_k8_k16_k21_k23_k24_invariants_hold_in_every_schedule(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Low enough for much of what waits to be read in parts.
    monkeypatch.setattr("h2keep.protocol.stream._MOST_JOINED", 20_000)
    for seed in range(batch * 75, batch * 75 + 75):
        world = World(seed)
        try:
            world.play(40)
            world.end()
            world.check_pings()
        except Exception as error:
            error.add_note(f"in the schedule of seed {seed}")
            raise
