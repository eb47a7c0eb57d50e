"""Same bytes in, same calls and events and frames out: ngh2's engine beside h2's, under a whole `Connection` each.

Hypothesis makes frames, from well-formed ones to nonsense, and what the application and the clock do between them. Each
side gets the bytes in pieces of its own size. Compared are every call of the engine to its handler, in order, with its
arguments; every event; every frame sent, header blocks by what they say; and how the connection ended. Where the
two differ on purpose is listed at the end, each difference with a test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hpack
import pytest
from hyperframe import frame as frames
from hypothesis import given, settings
from hypothesis import strategies as st

from h2keep.errors import H2KeepError, RemoteProtocolError
from h2keep.protocol import engines, events
from protocol.test_fuzz import (
    FUZZ,
    STREAMS,
    Move,
    Target,
    _frame,
    act,
    any_frame,
    moves,
    plausible_frame,
)
from support.engines import stand_in_for_the_default
from support.pair import REQUEST, parse_frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from h2keep.protocol.engine import Engine, EngineHandler

# Both engines are in every test.
ENGINES = ["h2"]
MANY = settings(FUZZ, max_examples=200)


class Tap:
    """A handler that passes everything on, and writes it down."""

    def __init__(self, handler: EngineHandler, calls: list[Any]) -> None:
        self._handler = handler
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            self._calls.append((name, *[_plain(argument) for argument in arguments]))
            getattr(self._handler, name)(*arguments)

        return call


def _plain(value: Any) -> Any:
    """Of an error its kind, since each library has its own words; of fields what they say."""
    if isinstance(value, H2KeepError):
        return type(value)
    if isinstance(value, list):
        return [tuple(field) for field in value]
    return value


def _plain_event(event: events.Event) -> Any:
    return (type(event).__name__, *[_plain(getattr(event, name)) for name in type(event).__annotations__])


class Side(Target):
    """`test_fuzz`'s client with its streams, tapped."""

    def __init__(
        self, engine: str, monkeypatch: pytest.MonkeyPatch, decoder: type[hpack.Decoder] = hpack.Decoder
    ) -> None:
        self.calls: list[Any] = []
        self.sent: list[Any] = []
        self._hpack = decoder(max_header_list_size=2**20)
        stand_in_for_the_default(engine, monkeypatch)
        make = engines.engine_named("h2")

        def tapped(handler: EngineHandler, **windows: int) -> Engine:
            return make(Tap(handler, self.calls), **windows)

        monkeypatch.setitem(engines._ENGINES, "h2", lambda: tapped)
        super().__init__(seed=1)

    def write(self) -> None:
        data = self.client.data_to_send(1_000_000, self.now)
        block = b""
        for frame in parse_frames(data):
            body: Any = frame.serialize()[9:]
            if isinstance(frame, frames.HeadersFrame | frames.ContinuationFrame):
                block += frame.data
                if "END_HEADERS" not in frame.flags:
                    continue
                body, block = [tuple(field) for field in self._hpack.decode(block, raw=True)], b""
            elif isinstance(frame, frames.GoAwayFrame) and self.client.error is not None:
                # Several codes may be true of the same violation; test_bounds.py says where one is due.
                body = b""
            self.sent.append((type(frame).__name__, sorted(frame.flags), frame.stream_id, body))
        self.drain()

    def feed(self, data: bytes, size: int) -> None:
        for start in range(0, len(data), size):
            self.receive(data[start : start + size])

    def outcome(self) -> dict[str, Any]:
        error = self.client.error
        return {
            "calls": self.calls,
            "events": [_plain_event(event) for event in self.events],
            "sent": self.sent,
            "closed": self.client.closed,
            "error": None if error is None else type(error),
            "streams": sorted(self.client._engine._streams),  # type: ignore[attr-defined]
        }


def run_both(
    pieces: list[bytes | Move], sizes: tuple[int, int] = (1_000_000, 1_000_000), make: type[Side] = Side
) -> Side:
    """Do it all on both, and compare after each piece; ngh2's side, as far as it got.

    Where both refuse what the peer did, one may end the stream and the other the connection: that ends the comparison.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        theirs, ours = make("h2", monkeypatch), make("ngh2", monkeypatch)
        for piece in pieces:
            before = len(theirs.calls)
            for side, size in zip((theirs, ours), sizes, strict=True):
                if isinstance(piece, Move):
                    act(side, piece)
                else:
                    side.feed(piece, size)
            if theirs.calls != ours.calls and _both_refuse(theirs, ours, before):
                break
            _compare(theirs, ours)
        else:
            theirs.write()
            ours.write()
            _compare(theirs, ours)
    theirs.check_the_end()
    ours.check_the_end()
    return ours


def _compare(theirs: Side, ours: Side) -> None:
    expected = theirs.outcome()
    for part, value in ours.outcome().items():
        assert value == expected[part], part


def _both_refuse(theirs: Side, ours: Side, start: int) -> bool:
    while theirs.calls[start : start + 1] == ours.calls[start : start + 1] != []:
        start += 1
    return all(
        side.client.error is not None
        if len(side.calls) == start
        else "on_stream_error" in [call[0] for call in side.calls[start : start + 2]]
        for side in (theirs, ours)
    )


sizes = st.tuples(st.integers(1, 50_000), st.integers(1, 50_000))


@MANY
@given(st.lists(st.one_of(any_frame(), plausible_frame(), plausible_frame(), moves), max_size=25), sizes)
def test_any_frames_at_all_are_the_same_to_both(pieces: list[bytes | Move], sizes: tuple[int, int]) -> None:
    run_both(pieces, sizes)


statuses = st.sampled_from(
    [[], [b"200"], [b"200"], [b"404"], [b"304"], [b"103"], [b"100"], [b""], [b"2000"], [b"20"], [b"200", b"200"]]
)
head_fields = st.lists(
    st.sampled_from(
        [
            (b":status", b"200"), (b":path", b"/"), (b"", b""), (b"connection", b"close"), (b"te", b"x"), (b"A", b"b"),
            (b"a", b"\r\n"), (b"a", b" b"), (b"a", b"\0"), (b"a", b"b"), (b"a", "é".encode()), (b"a b", b"c"),
            (b"cookie", b"a=b"), (b"cookie", b"c"), (b"transfer-encoding", b"chunked"), (b"host", b"a"),
        ]
    ),
    max_size=3,
)  # fmt: skip
lengths = st.sampled_from([b"3", b"0", b"x", b"-1", b"03", b"6"])


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """A header block on a stream that may take one, in as many frames as it needs."""
    fields = [(b":status", status) for status in draw(statuses)]
    if fields in ([(b":status", b"200")], [(b":status", b"304")]) and draw(st.booleans()):
        fields.append((b"content-length", draw(lengths)))
    block = hpack.Encoder().encode(fields + draw(head_fields), huffman=draw(st.booleans()))
    stream_id = draw(st.sampled_from(STREAMS[:-1]))
    size = draw(st.sampled_from([10, 16_384]))
    parts = [block[start : start + size] for start in range(0, len(block), size)] or [b""]
    raw = _frame(1, draw(st.booleans()) | (4 if len(parts) == 1 else 0), stream_id, parts[0])
    for part in parts[1:-1]:
        raw += _frame(9, 0, stream_id, part)
    return raw + (_frame(9, 4, stream_id, parts[-1]) if len(parts) > 1 else b"")


@MANY
@given(st.lists(st.one_of(heads(), heads(), plausible_frame(), moves), max_size=12), sizes)
def test_any_header_fields_at_all_are_the_same_to_both(pieces: list[bytes | Move], sizes: tuple[int, int]) -> None:
    run_both(pieces, sizes)


# Conversations in which nobody does anything wrong

names = st.sampled_from([b"a", b"user-agent", b"authorization", b"cookie", b"proxy-authorization", b"x-long-name"])
values = st.sampled_from([b"", b"1", b"x" * 19, b"x" * 20, b"y" * 500, b"z" * 15_000, "é".encode()])
some_fields = st.lists(st.tuples(names, values), max_size=4)
some_bodies = st.sampled_from([b"", b"x", b"y" * 20_000, b"z" * 70_000])


class Talk:
    """Both engines, each with the same requests, and one server's bytes for both."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sides = [Side("h2", monkeypatch), Side("ngh2", monkeypatch)]
        self.encoder = hpack.Encoder()
        #: Sent, and not answered yet.
        self.waiting: list[int] = []
        self.queued: list[int] = []

    def request(self, fields: Any, body: bytes, trailers: Any, dropped: bool) -> None:
        for side in self.sides:
            client, now = side.client, side.now
            end_stream = not body and trailers is None
            stream_id = client.send_request([*REQUEST, *fields], now, end_stream=end_stream)
            if body:
                client.send_data(stream_id, body, end_stream=trailers is None, now=now)
            if trailers is not None:
                client.send_trailers(stream_id, trailers, now)
            if dropped:
                side.release(stream_id)
        if not dropped:
            self.queued.append(stream_id)

    def write(self) -> None:
        for side in self.sides:
            side.write()
        self.waiting += self.queued
        self.queued.clear()

    def feed(self, data: bytes, sizes: tuple[int, int]) -> None:
        for side, size in zip(self.sides, sizes, strict=True):
            side.feed(data, size)

    def response(self, which: int, fields: Any, body: bytes, trailers: Any) -> bytes:
        """Interim response, head with the body's length, body with padding, trailers."""
        stream_id = self.waiting.pop(which % len(self.waiting))
        length = (b"content-length", b"%d" % len(body))
        raw = self._block(stream_id, self.encoder.encode([(b":status", b"103"), *fields]))
        raw += self._block(stream_id, self.encoder.encode([(b":status", b"200"), length, *fields]))
        for start in range(0, len(body), 16_000):
            part = body[start : start + 16_000]
            raw += _frame(0, 8, stream_id, b"\5" + part + b"\0" * 5)
        if trailers is None:
            return raw + _frame(0, 1, stream_id, b"")
        return raw + self._block(stream_id, self.encoder.encode(trailers), flags=1)

    def _block(self, stream_id: int, block: bytes, flags: int = 0) -> bytes:
        parts = [block[start : start + 16_384] for start in range(0, len(block), 16_384)] or [b""]
        raw = _frame(1, flags | (4 if len(parts) == 1 else 0), stream_id, parts[0])
        for number, part in enumerate(parts[1:], 2):
            raw += _frame(9, 4 if number == len(parts) else 0, stream_id, part)
        return raw


@MANY
@given(st.data())
def test_what_well_behaved_peers_say_is_the_same_to_both(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        talk = Talk(monkeypatch)
        for _ in range(data.draw(st.integers(1, 12))):
            trailers = data.draw(st.none() | some_fields)
            step = data.draw(st.sampled_from(["request", "request", "write", "respond", "respond", "settings"]))
            if step == "request":
                talk.request(data.draw(some_fields), data.draw(some_bodies), trailers, data.draw(st.booleans()))
            elif step == "settings":
                # HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE
                table = data.draw(st.sampled_from([0, 64, 4_096, 65_536]))
                window = data.draw(st.sampled_from([0, 1_000, 65_535, 2**20]))
                body = b"\0\1%b\0\4%b\0\5\0\0\xff\xff" % (table.to_bytes(4, "big"), window.to_bytes(4, "big"))
                talk.feed(_frame(4, 0, 0, body), data.draw(sizes))
            else:
                talk.write()
                if step == "respond" and talk.waiting:
                    # Names that are for requests are as good as others here.
                    raw = talk.response(
                        data.draw(st.integers(0, 9)), data.draw(some_fields), data.draw(some_bodies), trailers
                    )
                    talk.feed(raw, data.draw(sizes))
            _compare(*talk.sides)
        talk.feed(_frame(4, 0, 0, b"\0\4\0\x10\0\0") + _frame(8, 0, 0, b"\0\x40\0\0"), (1_000, 1_000))
        talk.write()
        _compare(*talk.sides)
        assert not any(side.client.closed for side in talk.sides)
        assert not any(isinstance(event, events.StreamFailed) for event in talk.sides[1].events)


@pytest.mark.parametrize("status", [b"200", b"304", b"404"])
@pytest.mark.parametrize("length", [None, 0, 3])
@pytest.mark.parametrize("body", [None, 0, 3])
@pytest.mark.parametrize("method", [b"HEAD", b"GET"])
def test_declared_lengths_of_bodies_that_may_not_come_are_the_same_to_both(
    status: bytes, length: int | None, body: int | None, method: bytes
) -> None:
    lengths = [] if length is None else [(b"content-length", b"%d" % length)]
    block = hpack.Encoder().encode([(b":status", status), *lengths])
    raw = _frame(1, 5 if body is None else 4, 15, block)
    if body is not None:
        raw += _frame(0, 1, 15, b"x" * body)
    with pytest.MonkeyPatch.context() as monkeypatch:
        sides = [Side("h2", monkeypatch), Side("ngh2", monkeypatch)]
        for side in sides:
            assert side.client.send_request([(b":method", method), *REQUEST[1:]], side.now) == 15
            side.write()
            side.feed(raw, 1_000)
            side.write()
        _compare(*sides)


# Where they differ

#: What nghttp2 takes for malformed and h2 lets pass: fields of a response, or, without `:status`, of its trailers.
STRICTER = [
    pytest.param([(b":status", b"103"), (b"content-length", b"3")], id="length-of-an-interim-response"),
    pytest.param([(b":status", b"204"), (b"content-length", b"3")], id="length-of-no-content"),
    pytest.param([(b":status", b"200"), (b"content-length", b"3"), (b"content-length", b"3")], id="length-twice"),
    pytest.param([(b":status", b"200"), (b"content-length", b"9" * 30)], id="length-beyond-64-bits"),
    pytest.param([(b"content-length", b"3")], id="length-in-trailers"),
    pytest.param([(b":status", b"101")], id="switching-protocols"),
    pytest.param([(b":status", b"099")], id="status-below-100"),
    pytest.param([(b":status", b"200"), (b"x", b"\x01")], id="control-character"),
    pytest.param([(b":status", b"200"), (b"x", b"\x7f")], id="delete-character"),
    pytest.param([(b":status", b"200"), (b"x-{", b"1")], id="name-that-is-no-token"),
]


@pytest.mark.parametrize("fields", STRICTER)
def test_where_nghttp2_is_stricter_it_fails_the_stream_and_no_other(fields: list[tuple[bytes, bytes]]) -> None:
    encoder = hpack.Encoder()
    head, end = ([(b":status", b"200"), (b"content-length", b"3")], 1) if fields[0][0] != b":status" else ([], 0)
    raw = b""
    if head:
        raw += _frame(1, 4, 1, encoder.encode(head)) + _frame(0, 0, 1, b"abc")
    raw += _frame(1, 4 | end, 1, encoder.encode(fields))
    raw += _frame(1, 5, 3, encoder.encode([(b":status", b"200"), (b"other", b"stream")]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        theirs, ours = Side("h2", monkeypatch), Side("ngh2", monkeypatch)
        for side in (theirs, ours):
            side.feed(raw, 1_000)
        assert not isinstance(theirs.final.get(1), events.StreamFailed)
        assert isinstance(ours.final[1], events.StreamFailed)
        assert isinstance(ours.final[1].error, RemoteProtocolError)
        assert "malformed response" in str(ours.final[1].error)
        assert ours.calls[-1] == theirs.calls[-1] == ("on_response", 3, 200, [(b"other", b"stream")], True)
        ours.check_the_end()
        theirs.check_the_end()


def test_nghttp2_drops_the_length_of_a_response_that_can_have_no_body() -> None:
    raw = _frame(1, 5, 1, hpack.Encoder().encode([(b":status", b"204"), (b"content-length", b"0"), (b"a", b"b")]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        side = Side("ngh2", monkeypatch)
        side.feed(raw, 1_000)
        assert side.calls[-1] == ("on_response", 1, 204, [(b"a", b"b")], True)


def test_a_head_on_a_stream_after_its_end_ends_the_connection_at_the_latest_with_ngh2() -> None:
    """h2 takes an interim one for the stream's error alone."""
    raw = _frame(1, 4, 5, hpack.Encoder().encode([(b":status", b"103")]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        theirs, ours = Side("h2", monkeypatch), Side("ngh2", monkeypatch)
        for side in (theirs, ours):
            side.feed(raw, 1_000)
        assert theirs.calls[-1] == ("on_stream_error", 5, 1, RemoteProtocolError)
        assert isinstance(ours.client.error, RemoteProtocolError)
