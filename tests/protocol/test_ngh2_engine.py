"""The engine on ngh2: what is its own, beside what all engines have to do, and who gets it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import hpack
import pytest
from hyperframe import frame as frames
from hypothesis import given, settings
from hypothesis import strategies as st

import h2keep
import h2keep.httpx
import h2keep.httpx2
from h2keep.errors import RemoteProtocolError
from h2keep.keepalive import Keepalive
from h2keep.protocol import events
from h2keep.protocol.engines import engine_named
from h2keep.protocol.h2_engine import H2Engine
from h2keep.protocol.ngh2_engine import Ngh2Engine
from protocol.test_fuzz import FUZZ
from support.pair import REQUEST, Pair, parse_frames

if TYPE_CHECKING:
    from collections.abc import Callable

ENGINES = ["ngh2"]
OFF = Keepalive(read_idle_timeout=None)
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
FRONT_DOORS: list[Callable[..., Any]] = [
    h2keep.AsyncClient,
    h2keep.Client,
    h2keep.httpx.AsyncKeepaliveTransport,
    h2keep.httpx.KeepaliveTransport,
    h2keep.httpx2.AsyncKeepaliveTransport,
    h2keep.httpx2.KeepaliveTransport,
]
FRONT_DOOR_NAMES = [f"{front_door.__module__}.{front_door.__name__}" for front_door in FRONT_DOORS]


def parsed(data: bytes) -> list[Any]:
    return parse_frames(data)


class Silent:
    """A handler that only counts, and keeps trailers."""

    def __init__(self) -> None:
        self.received = 0
        self.trailers: list[Any] = []

    def on_trailers(self, stream_id: int, headers: Any) -> None:
        self.trailers.append(headers)

    def on_data(self, stream_id: int, data: bytes, flow_length: int, end_stream: bool) -> None:
        self.received += len(data)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


def test_each_name_is_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert engine_named("ngh2") is Ngh2Engine
    with pytest.raises(ValueError, match=r"^engine: 'h3' is not one of: 'h2', 'ngh2'$"):
        engine_named("h3")


def test_nobody_gets_it_unasked() -> None:
    code = """if True:
        import sys, h2keep, h2keep.httpx2
        from h2keep.protocol.engines import engine_named
        clients = h2keep.AsyncClient(), h2keep.Client(), h2keep.httpx2.KeepaliveTransport()
        assert engine_named("h2").__name__ == "H2Engine"
        assert "ngh2" not in sys.modules
        with h2keep.Client(engine="ngh2"):
            assert "ngh2" in sys.modules
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("front_door", FRONT_DOORS, ids=FRONT_DOOR_NAMES)
def test_without_the_package_the_front_doors_say_what_to_install(
    front_door: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("h2keep.protocol.ngh2_engine", "h2keep.protocol.ngh2_blocks"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "ngh2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'h2keep\[fast\]'") as info:
        front_door(engine="ngh2")
    assert info.value.name == "ngh2"


@pytest.mark.parametrize("front_door", FRONT_DOORS, ids=FRONT_DOOR_NAMES)
def test_a_version_that_nobody_tried_is_refused_at_the_front_doors(
    front_door: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("h2keep.protocol.ngh2_engine", "h2keep.protocol.ngh2_blocks"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr("ngh2.__version__", "0.9.0")
    with pytest.raises(ImportError, match=r"not with 0\.9\.0: pip install 'h2keep\[fast\]'"):
        front_door(engine="ngh2")


def test_its_greeting_is_that_of_h2() -> None:
    windows = {"initial_window": 131_072, "connection_window": 2**26}
    ours = parsed(Ngh2Engine(Silent(), **windows).drain())
    theirs = parsed(H2Engine(Silent(), **windows).drain())
    assert [type(frame) for frame in ours] == [frames.SettingsFrame, frames.WindowUpdateFrame]
    assert ours[0].settings == theirs[0].settings
    assert ours[1].window_increment == theirs[1].window_increment


def test_requests_that_were_never_sent_leave_gaps_and_nothing_else() -> None:
    pair = Pair(OFF)
    pair.run(0.1)
    pair.blocked = True
    dropped = [pair.request() for _ in range(50)]
    kept = pair.request()
    for stream_id in dropped:
        pair.client.release(stream_id, pair.now)
    pair.blocked = False
    pair.run(0.1)
    later = pair.request()
    pair.run(0.1)
    assert (kept, later) == (101, 103)
    for stream_id in (later, kept):
        pair.respond(stream_id, b"body")
    pair.run(0.1)
    assert [pair.client.read(stream_id, pair.now) for stream_id in (kept, later)] == [b"body", b"body"]
    assert len(pair.happened(events.StreamEnded)) == 2


class Heads(Silent):
    """A handler that keeps all heads and bodies' lengths that are malformed."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[Any] = []
        self.errors: list[int] = []

    def on_response(self, stream_id: int, status: int, headers: Any, end_stream: bool) -> None:
        self.heads.append((stream_id, status, headers))

    def on_informational(self, stream_id: int, status: int, headers: Any) -> None:
        self.heads.append((stream_id, status, headers))

    def on_stream_error(self, stream_id: int, error_code: int, error: Exception) -> None:
        self.errors.append(stream_id)


def head(stream_id: int, block: bytes, *flags: str) -> bytes:
    return frames.HeadersFrame(stream_id, data=block, flags=["END_HEADERS", *flags]).serialize()


def data(stream_id: int, body: bytes) -> bytes:
    return frames.DataFrame(stream_id, data=body, flags=["END_STREAM"]).serialize()


# Few, so that they come again: some before and some after the table has moved.
A, B, LONG, SECRET = (b"a", b"1"), (b"b", b"2"), (b"c", b"\xff" * 150), (b"proxy-authorization", b"s")
FIELDS = st.sampled_from([[], [A], [B], [A, B], [LONG], [A, SECRET], [(b"cookie", b"x" * 30)]])
LENGTH = st.sampled_from([[], [(b"content-length", b"0")], [(b"content-length", b"123456789012345678")]])
TABLE_SIZES = st.sampled_from([0, 40, 200, 4_096, 65_536])


@settings(FUZZ, max_examples=200)
@given(st.lists(st.one_of(st.tuples(FIELDS, LENGTH, st.booleans()), TABLE_SIZES), max_size=30))
def test_what_is_remembered_of_requests_is_what_a_peer_decodes(moves: list[Any]) -> None:
    """Whatever was sent before, and whatever the peer did to the size of the table."""
    engine = Ngh2Engine(Silent(), initial_window=65_535, connection_window=65_536)
    engine.receive(SETTINGS)
    engine.drain()
    decoder = hpack.Decoder(2**20)
    stream_id = 1
    for move in moves:
        if isinstance(move, int):
            engine.receive(b"\0\0\6\4\0\0\0\0\0\0\1" + move.to_bytes(4, "big"))
            decoder.max_allowed_table_size = min(move, 4_096)
            continue
        fields, length, trailers = move
        parts = parsed(engine.send_request(stream_id, [*REQUEST, *fields, *length], end_stream=not trailers))
        assert list(decoder.decode(parts[0].data, raw=True)) == [*REQUEST, *fields, *length]
        if trailers:
            parts = parsed(engine.send_trailers(stream_id, fields))
            assert list(decoder.decode(parts[0].data, raw=True)) == fields
        stream_id += 2


@settings(FUZZ, max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.tuples(FIELDS, LENGTH, st.sampled_from(["", "early hints", "trailers", "nobody waits"]), st.booleans()),
            TABLE_SIZES,
        ),
        max_size=30,
    )
)
def test_what_is_remembered_of_responses_is_what_the_peer_said(moves: list[Any]) -> None:
    """Whatever was said before, by whatever kinds of block, and whatever sizes the peer gives its table."""
    handler = Heads()
    engine = Ngh2Engine(handler, initial_window=65_535, connection_window=65_536)
    engine.receive(SETTINGS)
    encoder = hpack.Encoder()
    stream_id = 1
    for move in moves:
        if isinstance(move, int):
            # hpack forgets to announce a size that it is given twice.
            if encoder.header_table_size != min(move, 4_096):
                encoder.header_table_size = min(move, 4_096)
            continue
        fields, length, kind, head_only = move
        method = b"HEAD" if head_only else b"GET"
        engine.send_request(stream_id, [(b":method", method), *REQUEST[1:]], end_stream=True)
        expected = []
        if kind == "nobody waits":
            engine.send_reset(stream_id, 8)
        if kind == "early hints":
            engine.receive(head(stream_id, encoder.encode([(b":status", b"103"), *fields])))
            expected.append((stream_id, 103, fields))
        engine.receive(head(stream_id, encoder.encode([(b":status", b"200"), *fields, *length])))
        if kind != "nobody waits":
            expected.append((stream_id, 200, [*fields, *length]))
        assert handler.heads[len(handler.heads) - len(expected) :] == expected
        if kind == "trailers":
            trailers = head(stream_id, encoder.encode([*fields, (b"t", b"1")]), "END_STREAM")
            engine.receive(trailers)
            bodiless = head_only or not length or length[0][1] == b"0"
            assert (handler.errors[-1:] != [stream_id]) is bodiless
            if bodiless:
                assert handler.trailers[-1] == [*fields, (b"t", b"1")]
        elif kind != "nobody waits":
            engine.receive(data(stream_id, b""))
        stream_id += 2
    assert engine._streams == {}


@pytest.mark.parametrize("change", ["head", "early hints", "trailers", "nobody waits", "size"])
def test_a_response_is_forgotten_when_the_table_moves(change: str) -> None:
    """The same bytes mean something else then."""
    handler = Heads()
    engine = Ngh2Engine(handler, initial_window=65_535, connection_window=65_536)
    engine.receive(SETTINGS)
    for stream_id in (1, 3, 5, 7, 9):
        engine.send_request(stream_id, REQUEST, end_stream=True)
    # Literals that enter the table, then the first of its dynamic entries (RFC 7541, sections 6.1 and 6.2.1).
    engine.receive(head(1, b"\x88\x40\1a\x011"))
    engine.receive(head(3, b"\x88\xbe"))
    engine.receive(head(5, b"\x88\xbe"))
    assert handler.heads == [(stream_id, 200, [A]) for stream_id in (1, 3, 5)]
    insertion = b"\x40\1b\x012"
    if change == "head":
        engine.receive(head(7, b"\x88" + insertion))
    elif change == "early hints":
        engine.receive(head(7, b"\x08\x03103" + insertion))
    elif change == "trailers":
        engine.receive(head(5, insertion, "END_STREAM"))
    elif change == "nobody waits":
        engine.send_reset(7, 8)
        engine.receive(head(7, b"\x88" + insertion))
    else:
        # All is evicted: there is no first entry any more.
        engine.receive(head(7, b"\x20\x3f\xe1\x1f\x88"))
        with pytest.raises(RemoteProtocolError, match="can't be decoded"):
            engine.receive(head(9, b"\x88\xbe"))
        return
    engine.receive(head(9, b"\x88\xbe"))
    assert handler.heads[-1] == (9, 200, [B])


def test_what_is_remembered_is_bounded_and_starts_again() -> None:
    handler = Heads()
    engine = Ngh2Engine(handler, initial_window=65_535, connection_window=65_536)
    engine.receive(SETTINGS)
    for number in range(600):
        stream_id = 2 * number + 1
        # Never indexed, so that the table stands still (RFC 7541, section 6.2.3).
        engine.send_request(stream_id, [*REQUEST, (b"authorization", b"%03d" % number)], end_stream=True)
        engine.receive(head(stream_id, b"\x88\x10\1n\3%03d" % number))
        engine.receive(data(stream_id, b""))
        assert handler.heads[-1] == (stream_id, 200, [(b"n", b"%03d" % number)])
    assert 0 < len(engine._blocks.responses) <= 256
    assert 0 < len(engine._blocks._requests) <= 256
    assert not any(len(block) > 1_024 for block in engine._blocks.responses)


def test_what_the_application_does_to_a_responses_fields_is_not_remembered() -> None:
    handler = Heads()
    engine = Ngh2Engine(handler, initial_window=65_535, connection_window=65_536)
    engine.receive(SETTINGS)
    for stream_id in (1, 3, 5):
        engine.send_request(stream_id, REQUEST, end_stream=True)
        engine.receive(head(stream_id, b"\x88\x10\1n\1v"))
        assert handler.heads[-1] == (stream_id, 200, [(b"n", b"v")])
        handler.heads[-1][2].clear()


def test_a_remembered_response_is_held_to_its_declared_length() -> None:
    handler = Heads()
    engine = Ngh2Engine(handler, initial_window=65_535, connection_window=65_536)
    engine.receive(SETTINGS)
    for stream_id, body in ((1, b"abc"), (3, b"abc"), (5, b"ab"), (7, b"abcd"), (9, b"abc")):
        engine.send_request(stream_id, REQUEST, end_stream=True)
        engine.receive(head(stream_id, b"\x88\x0f\x0d\x013") + data(stream_id, body))
    assert handler.errors == [5, 7]
    assert len(handler.heads) == 5


@pytest.mark.parametrize("size", [4_096, 100])
def test_a_table_size_is_announced_once(size: int) -> None:
    """Go's decoder refuses a second announcement unless its table is empty."""
    engine = Ngh2Engine(Silent(), initial_window=65_535, connection_window=65_536)
    engine.drain()
    fields = [*REQUEST, (b"a", b"b")]
    engine.send_request(1, fields, end_stream=True)
    engine.receive(SETTINGS + b"\0\0\6\4\0\0\0\0\0\0\1" + size.to_bytes(4, "big"))
    block = parsed(engine.send_request(3, fields, end_stream=True))[0].data
    assert block[0] & 0xE0 == 0x20
    announced = 2 if size < 31 + 128 else 3
    assert block[announced] & 0xE0 != 0x20


def test_proxy_authorization_is_never_indexed() -> None:
    engine = Ngh2Engine(Silent(), initial_window=65_535, connection_window=65_536)
    engine.drain()
    fields = [*REQUEST, (b"proxy-authorization", b"Basic c2VjcmV0"), (b"a", b"b")]
    decoder = hpack.Decoder()
    for stream_id in (1, 3):
        (frame,) = parsed(engine.send_request(stream_id, fields, end_stream=stream_id == 1))
        decoded = list(decoder.decode(frame.data, raw=True))
        assert decoded == fields
        assert isinstance(decoded[-2], hpack.NeverIndexedHeaderTuple)
    (frame,) = parsed(engine.send_trailers(3, fields[-2:]))
    assert isinstance(next(iter(decoder.decode(frame.data, raw=True))), hpack.NeverIndexedHeaderTuple)


def test_trailers_after_a_long_body_of_a_declared_length() -> None:
    """nghttp2 sees none of it, and doesn't miss it."""
    handler = Silent()
    engine = Ngh2Engine(handler, initial_window=2**20, connection_window=2**20)
    encoder = hpack.Encoder()
    engine.receive(b"\0\0\0\4\0\0\0\0\0")
    data = frames.DataFrame(1, data=b"x" * 16_384)
    for stream_id in (1, 3, 5):
        engine.send_request(stream_id, REQUEST, end_stream=True)
        engine.drain()
        block = encoder.encode([(b":status", b"200"), (b"content-length", b"%d" % 2**30)])
        engine.receive(frames.HeadersFrame(stream_id, data=block, flags=["END_HEADERS"]).serialize())
        data.stream_id = stream_id
        raw = data.serialize() * 64
        for _ in range(1_024):
            engine.receive(raw)
            engine.send_window_update(0, 2**20)
            engine.send_window_update(stream_id, 2**20)
            assert [frame.window_increment for frame in parsed(engine.drain())] == [2**20] * 2
        trailers = encoder.encode([(b"a", b"b")])
        engine.receive(frames.HeadersFrame(stream_id, data=trailers, flags=["END_HEADERS", "END_STREAM"]).serialize())
        assert engine.drain() == b""
        assert handler.trailers == [[(b"a", b"b")]] * ((stream_id + 1) // 2)
    assert handler.received == 3 * 2**30
    (frame,) = parsed(engine.send_request(7, REQUEST, end_stream=True))
    assert isinstance(frame, frames.HeadersFrame)


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 254, 255, 16_383, 16_384, 50_000])
def test_trailers_are_literals_of_any_length(length: int) -> None:
    engine = Ngh2Engine(Silent(), initial_window=65_535, connection_window=65_536)
    fields = [(b"n" * max(length, 1), b"v" * length), (b"a", b"b")]
    decoder = hpack.Decoder(2**20)
    engine.drain()
    decoder.decode(parsed(engine.send_request(1, REQUEST, end_stream=False))[0].data)
    parts = parsed(engine.send_trailers(1, fields))
    assert all(len(part.data) <= 16_384 for part in parts)
    assert [set(part.flags) & {"END_HEADERS"} for part in parts][:-1] == [set()] * (len(parts) - 1)
    assert "END_HEADERS" in parts[-1].flags
    assert "END_STREAM" in parts[0].flags
    assert list(decoder.decode(b"".join(part.data for part in parts), raw=True)) == fields


@pytest.mark.parametrize("sizes", [[0], [40], [4_096], [100, 4_096], [100, 50, 4_096, 200], [65_536]])
def test_trailers_announce_the_size_of_the_table_if_they_come_first(sizes: list[int]) -> None:
    engine = Ngh2Engine(Silent(), initial_window=65_535, connection_window=65_536)
    fields = [*REQUEST, (b"a", b"b"), (b"c", b"d")]
    decoder = hpack.Decoder()
    engine.drain()
    decoder.decode(parsed(engine.send_request(1, fields, end_stream=False))[0].data)
    for size in sizes:
        engine.receive(b"\0\0\6\4\0\0\0\0\0\0\1" + size.to_bytes(4, "big"))
    decoder.max_allowed_table_size = min(sizes[-1], 4_096)
    assert list(decoder.decode(parsed(engine.send_trailers(1, fields[-1:]))[0].data, raw=True)) == fields[-1:]
    assert decoder.header_table_size == min(sizes[-1], 4_096)
    for stream_id in (3, 5):
        block = parsed(engine.send_request(stream_id, fields, end_stream=True))[0].data
        assert list(decoder.decode(block, raw=True)) == fields
