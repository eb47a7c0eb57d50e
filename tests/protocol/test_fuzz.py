"""A peer that sends anything at all: a client with open streams goes on, or ends with one clean error.

Hypothesis makes frames of every type with plausible and implausible flags, streams and bodies, mutates and truncates
them, and hands them over in pieces; between the pieces the application and the clock do what they like.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import hpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from h2keep.errors import H2KeepError, RemoteProtocolError
from h2keep.keepalive import Keepalive
from h2keep.protocol import Connection, events
from h2keep.protocol.flow import CONNECTION_GROWTH, GrowthBudget
from support.pair import REQUEST, parse_frames

#: Streams in all states a client's stream can be in: see `Target`.
STREAMS = [1, 3, 5, 7, 9, 11, 13]
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


class Target:
    """A client with streams that wait, upload, download, are half closed, were reset, ended, or were never sent."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.budget = GrowthBudget(CONNECTION_GROWTH)
        self.client = Connection(
            Keepalive(read_idle_timeout=10.0, ping_timeout=5.0, jitter=0.0),
            random.Random(seed),
            0.0,
            growth=self.budget,
        )
        self.events: list[events.Event] = []
        self.final: dict[int, events.Event] = {}
        self.resets: dict[int, int] = {}
        self.released: set[int] = set()
        client = self.client
        for stream_id in STREAMS[:-1]:
            uploading = stream_id in (3, 5)
            opened = client.send_request(list(REQUEST), 0.0, end_stream=not uploading, read_timeout=50.0)
            assert opened == stream_id
            client.await_data(stream_id, 0.0)
        self.write()
        block = hpack.Encoder().encode([(":status", "200")])
        for stream_id, flags in ((5, 0x5), (7, 0x4), (11, 0x5)):
            self.receive(SETTINGS if stream_id == 5 else b"")
            self.receive(bytes([0, 0, len(block), 1, flags]) + stream_id.to_bytes(4, "big") + block)
        client.release(9, 0.0)
        self.released.add(9)
        self.write()
        client.send_request(list(REQUEST), 0.0)

    def receive(self, data: bytes) -> None:
        self.client.note_life(self.now)
        self.client.receive_data(data, self.now)
        self.drain()

    def write(self) -> None:
        for frame in parse_frames(self.client.data_to_send(1_000_000, self.now)):
            if frame.type == 3:
                self.resets[frame.stream_id] = self.resets.get(frame.stream_id, 0) + 1
        self.drain()

    def drain(self) -> None:
        while (event := self.client.next_event()) is not None:
            assert not any(isinstance(before, events.ConnectionClosed) for before in self.events), event
            self.events.append(event)
            if isinstance(event, events.StreamEnded | events.StreamFailed):
                assert event.stream_id not in self.final, "two ends of one stream"
                assert event.stream_id not in self.released
                self.final[event.stream_id] = event
                if isinstance(event, events.StreamFailed):
                    assert isinstance(event.error, H2KeepError)

    def read(self, stream_id: int) -> None:
        self.client.read(stream_id, self.now)
        self.client.await_data(stream_id, self.now)

    def release(self, stream_id: int) -> None:
        self.client.release(stream_id, self.now)
        self.released.add(stream_id)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for _ in range(100):
            deadline = self.client.next_deadline()
            if deadline is None or deadline > self.now:
                return
            self.client.handle_timeout(self.now)
            self.drain()
        raise AssertionError("a deadline stays due")

    def check_the_end(self) -> None:
        """Whatever came: nobody waits for ever, and everything is given back."""
        client = self.client
        if client.closed:
            assert isinstance(self.events[-1], events.ConnectionClosed)
            assert client.next_deadline() is None
        client.close(self.now)
        self.write()
        for stream_id in STREAMS:
            assert stream_id in self.final or stream_id in self.released
            self.release(stream_id)
        assert (client.open_streams, client._unread, client._streams, client._alarms._live) == (0, 0, {}, 0)
        assert client._growth.available == self.budget.available == CONNECTION_GROWTH
        assert not {stream_id for stream_id, count in self.resets.items() if count > 1}


# Frames

stream_ids = st.sampled_from([0, *STREAMS, 2, 15, 2**31 - 1]) | st.integers(0, 2**32 - 1)
fields = st.lists(
    st.sampled_from(
        [
            (b":status", b"200"), (b":status", b"103"), (b":status", b"304"), (b":status", b""), (b":path", b"/"),
            (b"content-length", b"3"), (b"content-length", b"0"), (b"content-length", b"x"), (b"", b""),
            (b"connection", b"close"), (b"te", b"x"), (b"A", b"b"), (b"a", b"\r\n"), (b"a", b"b"),
            (b"big", b"x" * 70_000),
        ]
    ),
    max_size=4,
)  # fmt: skip


@st.composite
def header_blocks(draw: st.DrawFn) -> bytes:
    block: bytes = hpack.Encoder().encode(draw(fields), huffman=draw(st.booleans()))
    return block


bodies = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"\0" * 4, b"\0\0\0\1", b"\x7f\xff\xff\xff", b"12345678", b"\0\0\0\5\0\0\0\0", b"x" * 16_384]
    ),
    header_blocks().map(lambda block: block[:16_384]),
    st.builds(
        lambda code, value: code.to_bytes(2, "big") + value.to_bytes(4, "big"),
        st.integers(0, 9),
        st.sampled_from([0, 1, 100, 16_384, 65_535, 2**31 - 1, 2**32 - 1]),
    ),
)
kinds = st.sampled_from([0, 0, 1, 1, 3, 4, 5, 6, 7, 8, 9, 9]) | st.integers(0, 255)
frame_flags = st.sampled_from([0, 1, 4, 5]) | st.integers(0, 255)


@st.composite
def any_frame(draw: st.DrawFn) -> bytes:
    body = draw(bodies)
    length = len(body) if draw(st.integers(0, 20)) else draw(st.integers(0, 2**24 - 1))
    raw = (
        length.to_bytes(3, "big") + bytes([draw(kinds), draw(frame_flags)]) + draw(stream_ids).to_bytes(4, "big") + body
    )
    return raw if len(raw) < 100 or draw(st.booleans()) else raw[: draw(st.integers(0, 100))]


def _frame(kind: int, flags: int, stream_id: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + body


@st.composite
def plausible_frame(draw: st.DrawFn) -> bytes:
    """What gets deep: frames that are well-formed, if not always allowed where they are."""
    stream_id = draw(st.sampled_from(STREAMS))
    end = draw(st.booleans())
    block = hpack.Encoder().encode([(b":status", draw(st.sampled_from([b"200", b"103", b"304"])))])
    return draw(
        st.sampled_from(
            [
                _frame(0, end, stream_id, b"abc"),
                _frame(0, end, stream_id, b""),
                _frame(0, end | 8, stream_id, b"\5abc\0\0\0\0\0"),
                _frame(1, end | 4, stream_id, block),
                _frame(1, end, stream_id, block[:1]) + _frame(9, 4, stream_id, block[1:]),
                _frame(1, 5, stream_id, b"\x40\1a\1b"),
                _frame(3, 0, stream_id, b"\0\0\0\7"),
                _frame(4, 0, 0, b"\0\4\0\0\0\1\0\3\0\0\0\1"),
                _frame(4, 0, 0, b"\0\4\0\1\0\0\0\1\0\0\0\0"),
                _frame(4, 1, 0, b""),
                _frame(6, 0, 0, b"12345678"),
                _frame(7, 0, 0, stream_id.to_bytes(4, "big") + b"\0\0\0\x0btoo_many_pings"),
                _frame(8, 0, stream_id, b"\0\1\0\0"),
                _frame(8, 0, stream_id, b"\x7f\xff\xff\xff"),
                _frame(8, 0, 0, b"\0\1\0\0"),
                _frame(6, 0, 0, b"12345678") * 1_001,
                _frame(0, 0, stream_id, b"") * 1_001,
            ]
        )
    )


@dataclass(frozen=True)
class Move:
    """What the application or the clock does between two pieces."""

    name: str
    argument: float = 0


moves = st.one_of(
    st.sampled_from(STREAMS).map(lambda stream_id: Move("read", stream_id)),
    st.sampled_from(STREAMS).map(lambda stream_id: Move("release", stream_id)),
    st.sampled_from([0.0, 1.0, 6.0, 60.0]).map(lambda seconds: Move("wait", seconds)),
    st.just(Move("write")),
    st.just(Move("upload")),
)


def act(target: Target, move: Move) -> None:
    if move.name == "write":
        target.write()
    elif move.name == "upload":
        target.client.send_data(3, b"x" * 1_000, end_stream=False, now=target.now)
        target.client.send_data(5, b"y", end_stream=True, now=target.now)
    elif move.name == "wait":
        target.wait(move.argument)
    else:
        getattr(target, move.name)(int(move.argument))
    target.drain()


FUZZ = settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@FUZZ
@given(
    st.lists(st.one_of(any_frame(), plausible_frame(), plausible_frame(), moves), max_size=25), st.integers(1, 50_000)
)
def test_k8_k23_any_frames_at_all_end_in_one_clean_error_or_go_on(pieces: list[bytes | Move], size: int) -> None:
    target = Target(seed=1)
    broken = False
    for piece in pieces:
        if isinstance(piece, Move):
            act(target, piece)
            continue
        for start in range(0, len(piece), size):
            closed = target.client.closed
            target.receive(piece[start : start + size])
            broken = broken or (target.client.closed and not closed)
    if broken:
        assert isinstance(target.client.error, RemoteProtocolError)
    target.check_the_end()


@FUZZ
@given(st.binary(max_size=300), st.booleans())
def test_k23_any_bytes_at_all_end_in_one_clean_error_or_go_on(data: bytes, greeted: bool) -> None:
    client = Connection(Keepalive(), random.Random(1), 0.0)
    stream_id = client.send_request(list(REQUEST), 0.0)
    client.data_to_send(1_000, 0.0)
    if greeted:
        client.receive_data(SETTINGS, 0.0)
    client.receive_data(data, 0.0)
    if client.closed:
        assert isinstance(client.error, RemoteProtocolError)
        assert parse_frames(client.data_to_send(100_000, 0.0))[-1].type == 7  # GOAWAY
    client.close(0.0)
    happened = []
    while (event := client.next_event()) is not None:
        happened.append(event)
    ends = [e for e in happened if isinstance(e, events.StreamFailed | events.StreamEnded) and e.stream_id == stream_id]
    assert len(ends) == 1
    assert isinstance(happened[-1], events.ConnectionClosed)


@pytest.mark.parametrize("batch", range(10))
def test_k23_mutated_conversations_end_in_one_clean_error_or_go_on(batch: int) -> None:
    """A valid conversation with a few bytes changed, dropped or doubled: thousands of them."""
    encoder = hpack.Encoder()
    head, hint = encoder.encode([(":status", "200"), ("server", "x")]), encoder.encode([(":status", "103")])
    valid = b"".join(
        [
            _frame(1, 4, 1, head),
            _frame(0, 8, 1, b"\5abc\0\0\0\0\0"),
            _frame(6, 0, 0, b"12345678"),
            _frame(4, 0, 0, b"\0\4\0\0\xff\xff\0\1\0\0\0\0"),
            _frame(1, 0, 3, hint[:1]) + _frame(9, 4, 3, hint[1:]),
            _frame(8, 0, 3, b"\0\0\1\0"),
            _frame(0, 1, 1, b"end"),
            _frame(1, 5, 9, encoder.encode([(":status", "200"), ("late", "y")])),
            _frame(3, 0, 3, b"\0\0\0\7"),
            _frame(7, 0, 0, b"\0\0\0\7\0\0\0\0bye"),
        ]
    )
    for seed in range(batch * 300, batch * 300 + 300):
        choose = random.Random(seed)
        raw = bytearray(valid)
        for _ in range(choose.randint(1, 5)):
            at = choose.randrange(len(raw))
            kind = choose.randrange(3)
            if kind == 0:
                raw[at] ^= 1 << choose.randrange(8)
            elif kind == 1:
                del raw[at : at + choose.randrange(4)]
            else:
                raw[at:at] = raw[at : at + choose.randrange(30)]
        target = Target(seed)
        step = choose.choice([1, 7, 1_000])
        for start in range(0, len(raw), step):
            target.receive(bytes(raw[start : start + step]))
            if choose.random() < 0.05:
                target.read(choose.choice(STREAMS))
        if target.client.closed:
            assert isinstance(target.client.error, RemoteProtocolError)
        target.check_the_end()
