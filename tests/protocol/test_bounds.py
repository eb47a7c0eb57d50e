"""A peer that misbehaves: K23's bounds, each with the number that it stands for, and malformed input of all kinds."""

from __future__ import annotations

import random
from typing import Any

import h2.events
import h2.settings
import hpack
import pytest
from hyperframe import frame as frames

from h2keep.errors import ConnectionLost, PingTimeout, RemoteProtocolError
from h2keep.keepalive import Keepalive
from h2keep.protocol import Connection, events
from h2keep.protocol.flow import (
    CONNECTION_GROWTH,
    CONNECTION_WINDOW,
    INITIAL_WINDOW,
    MAX_STREAMS,
    MAX_WINDOW,
    GrowthBudget,
    ReceiveWindow,
)
from h2keep.protocol.h2_engine import H2Engine
from h2keep.protocol.stream import Stream, Waiting
from support.pair import REQUEST, Pair, parse_frames

OFF = Keepalive(read_idle_timeout=None)


def frame(kind: type[frames.Frame], stream_id: int, *flags: str, **fields: object) -> bytes:
    made = kind(stream_id, flags=flags)
    for name, value in fields.items():
        setattr(made, name, value)
    return made.serialize()


def resets(pair: Pair) -> list[tuple[int, int]]:
    return [
        (event.stream_id, int(event.error_code or 0))
        for event in pair.server_events
        if isinstance(event, h2.events.StreamReset)
    ]


def open_response(pair: Pair) -> int:
    stream_id = pair.request()
    pair.run(0.1)
    pair.respond(stream_id, end_stream=False)
    pair.server.send_data(stream_id, b"")
    pair.run(0.1)
    return stream_id


def goaway_codes(pair: Pair) -> list[int]:
    return [int(e.error_code or 0) for e in pair.server_events if isinstance(e, h2.events.ConnectionTerminated)]


def test_k23_a_flood_of_pings_ends_the_connection() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    flood = frame(frames.PingFrame, 0, opaque_data=b"12345678") * 1_001
    pair.client.note_life(pair.now)
    pair.client.receive_data(flood[: 17 * 1_000], pair.now)
    assert not pair.client.closed
    pair.client.receive_data(flood[17 * 1_000 :], pair.now)
    pair.run(0.1)
    assert isinstance(pair.failure(stream_id), RemoteProtocolError)
    assert goaway_codes(pair) == [0xB]


def test_k12_k23_pings_that_are_answered_in_time_may_be_any_number() -> None:
    pair = Pair(OFF)
    for _ in range(5):
        pair.server_send_raw(frame(frames.PingFrame, 0, opaque_data=b"12345678") * 900)
        pair.run(0.1)
    assert not pair.client.closed
    acks = [event for event in pair.server_events if isinstance(event, h2.events.PingAckReceived)]
    assert len(acks) == 4_500


def test_k12_pings_are_answered_whether_or_not_a_request_is_open_or_read() -> None:
    pair = Pair(OFF)
    pair.run(0.1)
    pair.server.ping(b"no-strea")
    pair.run(0.1)
    stream_id = open_response(pair)
    pair.server.send_data(stream_id, b"x" * 10_000)
    pair.server.ping(b"unread..")
    pair.run(0.1)
    acks = [event.ping_data for event in pair.server_events if isinstance(event, h2.events.PingAckReceived)]
    assert acks == [b"no-strea", b"unread.."]


def test_k23_output_that_does_not_move_while_replies_wait_is_a_loss() -> None:
    keepalive = Keepalive(read_idle_timeout=10.0, ping_timeout=5.0, jitter=0.0)
    pair = Pair(keepalive)
    stream_id = pair.request()
    pair.run(0.1)
    client, start = pair.client, pair.now
    now = start
    # The peer sends a PING each second and takes nothing: it is alive, and yet the connection is of no use.
    while not client.closed and now < start + 100:
        client.note_life(now)
        client.receive_data(frame(frames.PingFrame, 0, opaque_data=b"12345678"), now)
        deadline = client.next_deadline()
        while deadline is not None and deadline <= now + 1.0:
            client.handle_timeout(deadline)
            deadline = client.next_deadline()
        now += 1.0
    pair._drain_events()
    error = pair.failure(stream_id)
    assert isinstance(error, ConnectionLost)
    assert not isinstance(error, PingTimeout)
    assert 15.0 <= now - start <= 17.0


def test_k23_empty_data_frames_reset_the_stream() -> None:
    pair = Pair(OFF)
    stream_id = open_response(pair)
    pair.server_send_raw(frame(frames.DataFrame, stream_id) * 999)
    pair.run(0.1)
    assert not resets(pair)
    pair.server_send_raw(frame(frames.DataFrame, stream_id))
    pair.run(0.1)
    assert resets(pair) == [(stream_id, 0xB)]
    assert isinstance(pair.failure(stream_id), RemoteProtocolError)
    assert not pair.client.closed


def test_k23_a_byte_between_empty_frames_makes_them_harmless() -> None:
    pair = Pair(OFF)
    stream_id = open_response(pair)
    for _ in range(5):
        pair.server_send_raw(frame(frames.DataFrame, stream_id) * 900)
        pair.server.send_data(stream_id, b"x")
        pair.run(0.1)
    assert not resets(pair)
    assert pair.client.read(stream_id, pair.now) == b"x" * 5


def test_k23_more_than_100_interim_responses_reset_the_stream() -> None:
    pair = Pair(OFF)
    stream_id, other = pair.request(), pair.request()
    pair.run(0.1)
    for _ in range(101):
        pair.server.send_headers(stream_id, [(b":status", b"102")])
    pair.pump()
    pair.run(0.1)
    assert resets(pair) == [(stream_id, 0xB)]
    assert pair.failure(other) is None


def test_k23_header_blocks_of_64_kib_are_taken() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    block = b"\x88" + b"\0\1a" + bytes(hpack.hpack.encode_integer(65_400, 7)) + b"x" * 65_400
    assert len(block) <= 65_536
    parts = [block[start : start + 16_000] for start in range(0, len(block), 16_000)]
    pair.server_send_raw(
        frame(frames.HeadersFrame, stream_id, "END_STREAM", data=parts[0])
        + b"".join(frame(frames.ContinuationFrame, stream_id, data=part) for part in parts[1:])
        + frame(frames.ContinuationFrame, stream_id, "END_HEADERS", data=b"")
    )
    pair.run(0.1)
    (response,) = pair.happened(events.ResponseReceived)
    assert isinstance(response, events.ResponseReceived)
    assert response.headers == [(b"a", b"x" * 65_400)]


def test_k23_header_blocks_are_bounded_in_bytes() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    pair.server_send_raw(
        frame(frames.HeadersFrame, stream_id, data=b"x" * 16_000)
        + frame(frames.ContinuationFrame, stream_id, data=b"x" * 16_000) * 4
    )
    pair.run(0.1)
    assert goaway_codes(pair) == [0xB]
    assert isinstance(pair.failure(stream_id), RemoteProtocolError)


def test_k23_header_blocks_are_bounded_in_continuations() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    pair.server_send_raw(
        frame(frames.HeadersFrame, stream_id, data=b"") + frame(frames.ContinuationFrame, stream_id, data=b"") * 64
    )
    pair.run(0.1)
    assert not pair.client.closed
    pair.server_send_raw(frame(frames.ContinuationFrame, stream_id, data=b""))
    pair.run(0.1)
    assert goaway_codes(pair) == [0xB]


def test_k23_decoded_headers_are_bounded_too() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    bomb = hpack.Encoder()
    block = bomb.encode([(b":status", b"200"), (b"a", b"x" * 4_000)] + [(b"a", b"x" * 4_000)] * 20)
    pair.server_send_raw(frame(frames.HeadersFrame, stream_id, "END_HEADERS", data=block))
    pair.run(0.1)
    assert pair.client.closed
    assert goaway_codes(pair) == [0xB]


def test_k23_push_is_off_from_the_first_byte_and_a_push_ends_the_connection() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    settings = [event for event in pair.server_events if isinstance(event, h2.events.RemoteSettingsChanged)]
    assert settings[0].changed_settings[2].new_value == 0
    block = hpack.Encoder().encode([(b":method", b"GET"), (b":path", b"/"), (b":scheme", b"https")])
    pair.server_send_raw(frame(frames.PushPromiseFrame, stream_id, "END_HEADERS", data=block, promised_stream_id=2))
    pair.run(0.1)
    assert pair.client.closed
    assert isinstance(pair.failure(stream_id), RemoteProtocolError)


def test_k23_buffered_data_is_two_buffers_at_most_whatever_the_number_of_frames() -> None:
    pair = Pair(OFF)
    stream_id = open_response(pair)
    for _ in range(20):
        pair.server_send_raw(frame(frames.DataFrame, stream_id, data=b"x") * 1_000)
        pair.run(0.1)
    stream = pair.client._streams[stream_id]
    assert isinstance(stream.buffer, Waiting)
    assert len(stream.buffer.pieces) <= 2
    assert len(pair.happened(events.DataReceived)) == 1
    assert pair.client.read(stream_id, pair.now) == b"x" * 20_000


def test_k23_of_frames_that_come_together_those_within_the_window_still_count() -> None:
    pair = Pair(OFF)
    stream_id = open_response(pair)
    pair.server_send_raw(frame(frames.DataFrame, stream_id, data=b"x" * 16_384) * 9)
    pair.run(0.1)
    assert goaway_codes(pair) == [3]
    assert isinstance(pair.failure(stream_id), RemoteProtocolError)
    assert pair.client.read(stream_id, pair.now) == b"x" * INITIAL_WINDOW


def test_of_frames_that_come_together_those_within_the_declared_length_still_count() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    pair.server.send_headers(stream_id, [(b":status", b"200"), (b"content-length", b"25")])
    pair.server_send_raw(frame(frames.DataFrame, stream_id, data=b"0123456789") * 3)
    pair.run(0.1)
    assert not pair.client.closed
    assert isinstance(pair.failure(stream_id), RemoteProtocolError)
    assert pair.client.read(stream_id, pair.now) == b"0123456789" * 2


def test_k23_one_reset_a_stream() -> None:
    pair = Pair(OFF)
    stream_id = open_response(pair)
    pair.client.release(stream_id, pair.now)
    pair.client.reset_stream(stream_id, 8, pair.now)
    pair.pump()
    for _ in range(10):
        pair.server.send_data(stream_id, b"late")
    trailer = pair.server.encoder.encode([(b"late", b"trailer")])
    pair.server_send_raw(frame(frames.HeadersFrame, stream_id, "END_HEADERS", "END_STREAM", data=trailer))
    pair.run(0.1)
    assert resets(pair) == [(stream_id, 8)]
    # What came late changed HPACK's table; a later response proves that it was followed.
    other = pair.request()
    pair.run(0.1)
    pair.server.send_headers(other, [(b":status", b"200"), (b"late", b"trailer")], end_stream=True)
    pair.run(0.1)
    assert pair.happened(events.ResponseReceived)[-1] == events.ResponseReceived(other, 200, [(b"late", b"trailer")])


# Malformed input


def test_continuations_make_one_head_padding_and_priority_are_dropped() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    block = pair.server.encoder.encode([(":status", "200"), ("a", "b")])
    first = frames.HeadersFrame(stream_id, data=block[:2], flags=["PADDED", "PRIORITY", "END_STREAM"])
    first.pad_length = 3
    pair.server_send_raw(
        first.serialize()
        + frame(frames.ContinuationFrame, stream_id, data=block[2:4])
        + frame(frames.ContinuationFrame, stream_id, "END_HEADERS", data=block[4:])
    )
    pair.run(0.1)
    assert pair.happened(events.ResponseReceived) == [events.ResponseReceived(stream_id, 200, [(b"a", b"b")])]
    assert pair.happened(events.StreamEnded)


def test_a_late_head_in_pieces_is_followed_too() -> None:
    pair = Pair(OFF)
    stream_id, other = pair.request(), pair.request()
    pair.run(0.1)
    pair.client.release(stream_id, pair.now)
    pair.pump()
    block = pair.server.encoder.encode([(":status", "200"), ("late", "1")])
    pair.server_send_raw(
        frame(frames.HeadersFrame, stream_id, data=block[:1])
        + frame(frames.ContinuationFrame, stream_id, "END_HEADERS", data=block[1:])
        + frame(frames.RstStreamFrame, stream_id)
        + frame(frames.WindowUpdateFrame, stream_id, window_increment=1)
    )
    pair.run(0.1)
    pair.server.send_headers(other, [(":status", "200"), ("late", "1")], end_stream=True)
    pair.run(0.1)
    assert pair.happened(events.ResponseReceived) == [events.ResponseReceived(other, 200, [(b"late", b"1")])]


@pytest.mark.parametrize(
    ("flags", "start"), [(0x08, b"\2\0\0"), (0x20, b"\0\0\0\0\x10"), (0x28, b"\2\0\0\0\0\x10\0\0")]
)
def test_a_head_may_begin_with_a_frame_that_has_none_of_it(flags: int, start: bytes) -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    block = pair.server.encoder.encode([(":status", "200")])
    rest = frame(frames.ContinuationFrame, stream_id, "END_HEADERS", data=block)
    pair.server_send_raw(bytes([0, 0, len(start), 1, flags]) + stream_id.to_bytes(4) + start + rest)
    pair.run(0.1)
    assert pair.happened(events.ResponseReceived) == [events.ResponseReceived(stream_id, 200, [])]


def test_a_promise_on_a_reset_stream_ends_the_connection() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    pair.client.release(stream_id, pair.now)
    pair.server_send_raw(frame(frames.PushPromiseFrame, stream_id, "END_HEADERS", data=b"", promised_stream_id=2))
    pair.run(0.1)
    assert pair.client.closed


def narrow_the_connections_window(engine: Any, size: int) -> None:
    if isinstance(engine, H2Engine):
        engine._h2._inbound_flow_control_window_manager.current_window_size = size
    else:
        engine._receive_window = size


def test_more_data_than_the_windows_allow_ends_the_connection() -> None:
    for repeat, stream_window in ((9, True), (5_000, False)):
        pair = Pair(OFF)
        stream_id = open_response(pair)
        if not stream_window:
            pair.client.release(stream_id, pair.now)
            pair.pump()
            narrow_the_connections_window(pair.client._engine, 100_000)
        pair.server_send_raw(frame(frames.DataFrame, stream_id, data=b"x" * 16_384) * repeat)
        pair.run(0.1)
        assert goaway_codes(pair) == [3]


def test_a_header_list_that_changes_each_time_is_never_remembered() -> None:
    pair = Pair(OFF)
    for n in range(600):
        stream_id = pair.request()
        pair.run(0.03)
        pair.server.send_headers(
            stream_id, [(b":status", b"200"), hpack.NeverIndexedHeaderTuple(b"n", b"%d" % n)], end_stream=True
        )
        pair.run(0.03)
    heads = [event for event in pair.events if isinstance(event, events.ResponseReceived)]
    assert [head.headers for head in heads] == [[(b"n", b"%d" % n)] for n in range(600)]


def test_a_frame_longer_than_allowed_is_refused_before_its_body_came() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    pair.server_send_raw(b"\x00\x40\x01\x00\x00" + stream_id.to_bytes(4, "big"))
    pair.run(0.1)
    assert goaway_codes(pair) == [6]


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(frame(frames.ContinuationFrame, 1, "END_HEADERS", data=b""), id="naked-continuation"),
        pytest.param(
            frame(frames.HeadersFrame, 1, data=b"") + frame(frames.PingFrame, 0, opaque_data=b"12345678"),
            id="interrupted-header-block",
        ),
        pytest.param(
            frame(frames.HeadersFrame, 1, data=b"") + frame(frames.ContinuationFrame, 3, data=b""),
            id="continuation-of-another-stream",
        ),
        pytest.param(frame(frames.HeadersFrame, 1, "END_HEADERS", data=b"\xff\xff\xff\xff\xff\xff"), id="hpack"),
        pytest.param(b"\x00\x00\x04\x00\x08\x00\x00\x00\x01\xff\x00\x00\x00", id="padding-too-long"),
        pytest.param(b"\x00\x00\x03\x01\x0c\x00\x00\x00\x01\x03\x00\x00", id="padding-of-a-head-too-long"),
        pytest.param(b"\x00\x00\x08\x01\x2c\x00\x00\x00\x01\x03" + bytes(7), id="padding-instead-of-priority"),
        pytest.param(b"\x00\x00\x01\x01\x04\x00\x00\x00\x00\x88", id="head-on-stream-0"),
        pytest.param(b"\x00\x00\x04\x00\x00\x00\x00\x00\x00abcd", id="data-on-stream-0"),
        pytest.param(b"\x00\x00\x05\x04\x00\x00\x00\x00\x00abcde", id="settings-of-5-bytes"),
        pytest.param(b"\x00\x00\x04\x06\x00\x00\x00\x00\x00abcd", id="ping-of-4-bytes"),
        pytest.param(frame(frames.DataFrame, 99, data=b"x"), id="data-on-idle-stream"),
        pytest.param(frame(frames.RstStreamFrame, 99), id="reset-of-idle-stream"),
        pytest.param(frame(frames.HeadersFrame, 2, "END_HEADERS", data=b"\x88"), id="headers-on-even-stream"),
        pytest.param(frame(frames.WindowUpdateFrame, 0, window_increment=2**31 - 1), id="window-overflow"),
    ],
)
def test_violations_end_the_connection_with_one_clean_error(raw: bytes) -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    pair.server_send_raw(raw)
    pair.run(0.1)
    error = pair.failure(stream_id)
    assert isinstance(error, RemoteProtocolError)
    assert "the server broke HTTP/2" in str(error)
    assert goaway_codes(pair)
    assert len(pair.happened(events.ConnectionClosed)) == 1


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        pytest.param([(":status", "200"), ("content-length", "5")], b"toolong", id="body-longer-than-declared"),
        pytest.param([(":status", "200"), ("content-length", "50")], b"short", id="body-shorter-than-declared"),
        pytest.param([("server", "x")], b"", id="no-status"),
        pytest.param([(":status", "2x0")], b"", id="status-not-a-number"),
        pytest.param([(":status", "200"), ("Upper", "x")], b"", id="upper-case"),
        pytest.param([(":status", "200"), ("connection", "close")], b"", id="connection-specific"),
        pytest.param([(":status", "200"), ("content-length", "x")], b"", id="bad-length"),
    ],
)
def test_a_malformed_response_fails_its_stream_alone(fields: list[tuple[str, str]], body: bytes) -> None:
    pair = Pair(OFF)
    stream_id, other = pair.request(), pair.request()
    pair.run(0.1)
    block = pair.server.encoder.encode(fields)
    flags = ("END_HEADERS",) if body else ("END_HEADERS", "END_STREAM")
    raw = frame(frames.HeadersFrame, stream_id, *flags, data=block)
    if body:
        raw += frame(frames.DataFrame, stream_id, "END_STREAM", data=body)
    pair.server_send_raw(raw)
    pair.run(0.1)
    error = pair.failure(stream_id)
    assert isinstance(error, RemoteProtocolError)
    assert "malformed response" in str(error)
    assert not pair.client.closed
    pair.respond(other, b"unharmed")
    pair.run(0.1)
    assert pair.client.read(other, pair.now) == b"unharmed"


@pytest.mark.parametrize(
    ("declared", "frames_after_head", "whole"),
    [
        pytest.param("5", [], False, id="no-body"),
        pytest.param("0", [], True, id="no-body-declared"),
        pytest.param("5", [b"abc", "trailers"], False, id="short-with-trailers"),
        pytest.param("5", [b"abcde", "trailers"], True, id="whole-with-trailers"),
        pytest.param(None, [b"abc", "trailers"], True, id="undeclared-with-trailers"),
    ],
)
def test_a_body_that_ends_with_header_fields_must_have_its_length_too(
    declared: str | None, frames_after_head: list[bytes | str], *, whole: bool
) -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    out: list[frames.Frame] = []
    pair.on_client_bytes = lambda data: out.extend(parse_frames(data))
    fields = [(":status", "200"), *([("content-length", declared)] if declared else [])]
    pair.server.send_headers(stream_id, fields, end_stream=not frames_after_head)
    for part in frames_after_head:
        if isinstance(part, bytes):
            pair.server.send_data(stream_id, part)
        else:
            pair.server.send_headers(stream_id, [("x-sum", "1")], end_stream=True)
    pair.run(0.1)
    error = pair.failure(stream_id)
    assert bool(pair.happened(events.StreamEnded)) is whole
    assert isinstance(error, RemoteProtocolError) is not whole
    assert [type(frame) for frame in out] == ([] if whole else [frames.RstStreamFrame])
    assert pair.client.open_streams == 0


def test_a_body_that_ends_with_trailers_must_have_its_length_however_often_its_head_came_before() -> None:
    pair = Pair(OFF)
    for turn in range(6):
        stream_id = pair.request()
        pair.run(0.1)
        pair.server.send_headers(stream_id, [(":status", "200"), ("content-length", "5")])
        pair.server.send_data(stream_id, b"short" if turn % 2 else b"cut")
        pair.server.send_headers(stream_id, [("x-sum", "1")], end_stream=True)
        pair.run(0.1)
        assert isinstance(pair.failure(stream_id), RemoteProtocolError) is not bool(turn % 2)
        pair.client.release(stream_id, pair.now)
    assert len(pair.happened(events.StreamEnded)) == 3


@pytest.mark.parametrize("method", [b"HEAD", b"GET"])
@pytest.mark.parametrize("ending", ["head", "data"])
def test_a_length_without_a_body_is_fine_where_no_body_comes(method: bytes, ending: str) -> None:
    pair = Pair(OFF)
    stream_id = pair.client.send_request([(b":method", method), *REQUEST[1:]], pair.now)
    pair.run(0.1)
    fields = [(":status", "200" if method == b"HEAD" else "304"), ("content-length", "500")]
    pair.server.send_headers(stream_id, fields, end_stream=ending == "head")
    if ending == "data":
        pair.server.send_data(stream_id, b"", end_stream=True)
    pair.run(0.1)
    assert pair.failure(stream_id) is None
    assert pair.happened(events.StreamEnded)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it answers in HTTP/1.1"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "its first frame is not SETTINGS"),
        (frame(frames.PingFrame, 0, opaque_data=b"12345678"), "its first frame is not SETTINGS"),
        (frame(frames.SettingsFrame, 0, "ACK"), "its first frame is not SETTINGS"),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
def test_what_does_not_begin_with_settings_is_not_http_2(raw: bytes, reason: str, size: int) -> None:
    client = Connection(OFF, random.Random(), 0.0, name="https://example.com")
    for start in range(0, len(raw), size):
        client.receive_data(raw[start : start + size], 0.0)
    assert str(client.error) == f"https://example.com: the server broke HTTP/2: {reason}"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"\0\0\7\6\0\0\0\0\0" + b"x" * 7, id="ping"),
        pytest.param(b"\0\0\5\4\0\0\0\0\0" + b"x" * 5, id="settings"),
        pytest.param(b"\0\0\3\3\0\0\0\0\1" + b"x" * 3, id="rst-stream"),
        pytest.param(b"\0\0\5\x08\0\0\0\0\0" + b"x" * 5, id="window-update"),
        pytest.param(b"\0\0\7\7\0\0\0\0\0" + b"x" * 7, id="goaway"),
    ],
)
def test_frames_of_a_wrong_length_are_frame_size_errors(raw: bytes) -> None:
    pair = Pair(OFF)
    pair.request()
    pair.run(0.1)
    pair.server_send_raw(raw)
    pair.run(0.1)
    assert goaway_codes(pair) == [6]


def test_settings_that_nobody_knows_are_not_kept() -> None:
    pair = Pair(OFF)
    pair.run(0.1)
    for start in range(100, 60_000, 2_000):
        body = b"".join(code.to_bytes(2, "big") + b"\0\0\0\1" for code in range(start, start + 2_000))
        pair.server_send_raw(len(body).to_bytes(3, "big") + b"\4\0\0\0\0\0" + body)
    pair.server_send_raw(b"\0\0\x0c\4\0\0\0\0\0" + b"\0\3\0\0\0\7" + b"\4\3\0\0\0\1")
    pair.run(0.1)
    assert pair.client.max_streams == 7
    engine: Any = pair.client._engine
    codec = engine._h2 if isinstance(engine, H2Engine) else engine._blocks._session
    assert len(codec.remote_settings) < 10


def test_a_body_before_the_head_resets_the_stream() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    pair.server_send_raw(frame(frames.DataFrame, stream_id, data=b"x"))
    pair.run(0.1)
    assert resets(pair) == [(stream_id, 1)]
    assert isinstance(pair.failure(stream_id), RemoteProtocolError)


def test_a_stream_window_that_overflows_resets_the_stream_alone() -> None:
    pair = Pair(OFF)
    stream_id, other = pair.request(end_stream=False), pair.request()
    pair.run(0.1)
    pair.server_send_raw(frame(frames.WindowUpdateFrame, stream_id, window_increment=2**31 - 1))
    pair.run(0.1)
    assert resets(pair) == [(stream_id, 3)]
    assert isinstance(pair.failure(stream_id), RemoteProtocolError)
    assert pair.failure(other) is None


@pytest.mark.parametrize("where", ["stream", "connection"])
def test_the_reserved_bit_of_an_increment_means_nothing(where: str) -> None:
    pair = Pair(OFF)
    stream_id = pair.request(end_stream=False)
    pair.run(0.1)
    target = stream_id if where == "stream" else 0
    windows = pair.client._engine.send_window(stream_id), pair.client._engine.connection_window()
    pair.server_send_raw(b"\0\0\4\x08\0" + target.to_bytes(4) + b"\x80\0\0\5")
    pair.run(0.1)
    assert not pair.client.closed
    grown = pair.client._engine.send_window(stream_id), pair.client._engine.connection_window()
    assert (grown[0] - windows[0], grown[1] - windows[1]) == ((5, 0) if target else (0, 5))
    # It is none of the number where that is too large, either.
    pair.server_send_raw(b"\0\0\4\x08\0" + stream_id.to_bytes(4) + b"\xff\xff\xff\xff")
    pair.run(0.1)
    assert resets(pair) == [(stream_id, 3)]
    assert not pair.client.closed


def test_frames_that_ask_nothing_of_a_client_are_skipped() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    pair.server_send_raw(
        frame(frames.PriorityFrame, stream_id)
        + frame(frames.AltSvcFrame, 0, origin=b"example.com", field=b'h3=":443"')
        + b"\x00\x00\x02\xfa\x00\x00\x00\x00\x00hi"
        + frame(frames.WindowUpdateFrame, stream_id, window_increment=10)
        + frame(frames.PingFrame, 0, "ACK", opaque_data=b"not-ours")
    )
    pair.respond(stream_id, b"ok")
    pair.run(0.1)
    assert pair.client.read(stream_id, pair.now) == b"ok"


def test_frames_after_the_streams_end_end_the_connection() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    pair.respond(stream_id, b"all")
    pair.server_send_raw(frame(frames.DataFrame, stream_id, data=b"more"))
    pair.run(0.1)
    assert pair.client.read(stream_id, pair.now) == b"all"
    assert pair.client.closed


@pytest.mark.parametrize("seed", range(300))
def test_garbage_never_escapes_as_anything_but_events(seed: int) -> None:
    """Valid frames with flipped bytes, in pieces of any size: one clean end at most, and no other exception."""
    choose = random.Random(seed)
    pair = Pair(OFF, chop=True, seed=seed)
    streams = [pair.request(), pair.request(end_stream=False)]
    pair.run(0.1)
    for stream_id in streams:
        pair.server.send_headers(stream_id, [(b":status", b"200"), (b"server", b"x")])
        pair.server.send_data(stream_id, choose.randbytes(100), pad_length=choose.choice([None, 5]))
    pair.server.ping(b"12345678")
    raw = bytearray(pair.server.data_to_send())
    for _ in range(choose.randint(1, 6)):
        raw[choose.randrange(len(raw))] ^= 1 << choose.randrange(8)
    pair._client_receives(bytes(raw))
    pair.client.data_to_send(100_000, pair.now)
    pair._drain_events()
    for stream_id in streams:
        error = pair.failure(stream_id)
        assert error is None or type(error).__module__ == "h2keep.errors"


# Flow control


def test_credit_is_renewed_as_the_application_consumes_and_not_before() -> None:
    pair = Pair(OFF)
    stream_id = open_response(pair)
    for _ in range(8):
        pair.server.send_data(stream_id, b"x" * 16_384)
        pair.run(0.1)
    assert pair.server.local_flow_control_window(stream_id) == 0
    assert len(pair.client.read(stream_id, pair.now)) == INITIAL_WINDOW
    pair.run(0.1)
    assert pair.server.local_flow_control_window(stream_id) == INITIAL_WINDOW


def test_connection_credit_is_returned_on_receipt_padding_and_dead_streams_included() -> None:
    pair = Pair(OFF)
    unread = [open_response(pair) for _ in range(20)]
    dead = open_response(pair)
    pair.client.release(dead, pair.now)
    before = pair.server.outbound_flow_control_window
    for stream_id in unread:
        for _ in range(7):
            pair.server.send_data(stream_id, b"x" * 15_000, pad_length=200)
    for _ in range(8):
        pair.server.send_data(dead, b"x" * 16_000)
    pair.pump()
    pair.run(0.1)
    missing = before - pair.server.outbound_flow_control_window
    assert 0 <= missing < 1024 * 1024
    assert pair.server.outbound_flow_control_window <= CONNECTION_WINDOW


def test_padding_is_consumed_when_it_arrives() -> None:
    pair = Pair(OFF)
    stream_id = open_response(pair)
    for _ in range(500):
        pair.server.send_data(stream_id, b"x", pad_length=255)
        pair.run(0.1)
    # 128,500 bytes came, of which the application has 500 to read.
    assert pair.server.local_flow_control_window(stream_id) > INITIAL_WINDOW // 2 - 1_000


def test_unread_responses_never_stall_their_siblings() -> None:
    pair = Pair(OFF, settings={h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 256})
    pair.run(0.1)
    unread = [open_response(pair) for _ in range(200)]
    for stream_id in unread:
        while pair.server.local_flow_control_window(stream_id) >= 16_384:
            pair.server.send_data(stream_id, b"x" * 16_384)
        pair.run(0.05)
    other = pair.request()
    pair.run(0.1)
    pair.respond(other, b"small")
    pair.run(0.1)
    assert pair.client.read(other, pair.now) == b"small"


@pytest.mark.parametrize(("peers_limit", "taken"), [(256, 4), (254, 2), (100, 0)])
def test_complete_responses_that_nobody_reads_take_up_room_of_our_own(peers_limit: int, taken: int) -> None:
    pair = Pair(OFF, settings={h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: peers_limit})
    pair.run(0.1)
    free = pair.client.free_slots
    assert free == peers_limit
    streams = []
    for _ in range(4):
        stream_id = open_response(pair)
        for _ in range(7):
            pair.server.send_data(stream_id, b"x" * 16_384)
        pair.server.send_data(stream_id, b"x" * 16_384, end_stream=True)
        pair.run(0.1)
        streams.append(stream_id)
    assert pair.client.open_streams == 0
    assert pair.client.free_slots == free - taken
    pair.client.read(streams[0], pair.now)
    pair.client.release(streams[0], pair.now)
    pair.client.release(streams[1], pair.now)
    assert pair.client.free_slots == min(free, 254)


def test_a_window_grows_where_the_bandwidth_delay_product_asks_for_it() -> None:
    budget = GrowthBudget(CONNECTION_GROWTH)
    window = ReceiveWindow(budget, 0.0)
    now, rtt = 0.0, 0.05
    for _ in range(60):
        now += rtt
        window.consume(window.size, now, rtt)
    assert window.size == MAX_WINDOW
    assert budget.available == CONNECTION_GROWTH - (MAX_WINDOW - INITIAL_WINDOW)
    window.release()
    assert budget.available == CONNECTION_GROWTH


def test_a_window_that_is_not_the_limit_does_not_grow() -> None:
    window = ReceiveWindow(GrowthBudget(CONNECTION_GROWTH), 0.0)
    assert window.consume(1_000, 0.1, 0.001) == 0
    assert window.consume(INITIAL_WINDOW // 2, 10.0, 0.001) == INITIAL_WINDOW // 2 + 1_000
    assert window.consume(INITIAL_WINDOW, 10.1, None) == INITIAL_WINDOW
    assert window.size == INITIAL_WINDOW


def test_growth_is_bounded_by_the_connection_and_by_the_process() -> None:
    process = GrowthBudget(3 * INITIAL_WINDOW)
    connections = [GrowthBudget(2 * INITIAL_WINDOW, process) for _ in range(2)]
    windows = [ReceiveWindow(budget, 0.0) for budget in connections for _ in range(3)]
    for step in range(1, 10):
        for window in windows:
            window.consume(window.size, step * 0.1, 0.1)
    assert [window.size // INITIAL_WINDOW for window in windows] == [2, 2, 1, 2, 1, 1]
    for window in windows:
        window.release()
    assert process.available == 3 * INITIAL_WINDOW
    assert MAX_STREAMS * INITIAL_WINDOW + CONNECTION_GROWTH == 64 * 1024 * 1024


def test_the_sum_of_promises_stays_bounded_whatever_is_read() -> None:
    pair = Pair(OFF, latency=0.05)
    budget = pair.client._growth
    streams = [open_response(pair) for _ in range(8)]
    choose = random.Random(1)
    for _ in range(300):
        for stream_id in streams:
            room = pair.server.local_flow_control_window(stream_id)
            for _ in range(min(room // 16_384, 8)):
                pair.server.send_data(stream_id, b"x" * 16_384)
        pair.run(0.1)
        for stream_id in streams:
            if choose.random() < 0.9:
                pair.client.read(stream_id, pair.now)
        promised = sum(
            pair.server.streams[stream_id].outbound_flow_control_window + len(pair.client._streams[stream_id].buffer)
            for stream_id in streams
        )
        assert promised <= 8 * INITIAL_WINDOW + CONNECTION_GROWTH
    for stream_id in streams:
        pair.client.release(stream_id, pair.now)
    assert budget.available == CONNECTION_GROWTH


def test_a_connection_needs_nothing_but_its_arguments() -> None:
    connection = Connection(OFF, random.Random(), 0.0)
    assert connection.data_to_send(10, 0.0).startswith(b"PRI * HTTP/2.0")
    assert not connection.has_data_to_send()


def grown_response(process: GrowthBudget, unread: int = 1) -> tuple[Pair, int]:
    """A response whose window has grown, complete but for its last bytes, which are not read."""
    pair = Pair(OFF, growth=process, latency=0.1)
    pair.run(1.0)
    stream_id = open_response(pair)
    for _ in range(10):
        while (room := min(16_384, pair.server.local_flow_control_window(stream_id))) > 0:
            pair.server.send_data(stream_id, b"x" * room)
        pair.run(0.15)
        while pair.client.has_unread(stream_id):
            pair.client.read(stream_id, pair.now)
        pair.run(0.15)
    for sent in range(0, unread, 16_384):
        left = unread - sent
        pair.server.send_data(stream_id, b"x" * min(left, 16_384), end_stream=left <= 16_384)
        pair.run(0.01)
    pair.run(0.3)
    assert pair.client.open_streams == 0
    return pair, stream_id


def test_of_much_that_waits_a_part_is_read_at_once() -> None:
    process = GrowthBudget(CONNECTION_GROWTH)
    pair, stream_id = grown_response(process, unread=400_001)
    assert process.available < CONNECTION_GROWTH
    sizes = []
    while pair.client.has_unread(stream_id):
        # The growth is in use by what still waits.
        assert process.available < CONNECTION_GROWTH
        sizes.append(len(pair.client.read(stream_id, pair.now)))
    assert sum(sizes) == 400_001
    assert max(sizes) <= 128 * 1024 < sum(sizes[:2])
    assert process.available == CONNECTION_GROWTH
    assert pair.client.read(stream_id, pair.now) == b""


def test_a_piece_is_read_as_it_came_whatever_its_size() -> None:
    stream = Stream(1, [], None, None, None, 0.0)
    large = bytes(200_000)
    for piece in (large, b"tail", b"!"):
        stream.receive(piece)
    assert stream.take_received() is large
    assert stream.take_received() == b"tail!"
    assert stream.buffer == b""


@pytest.mark.parametrize("end", ["read", "release", "eof", "close"])
def test_growth_is_kept_while_an_ended_response_is_unread(end: str) -> None:
    process = GrowthBudget(CONNECTION_GROWTH)
    pair, stream_id = grown_response(process)
    assert process.available < CONNECTION_GROWTH
    if end == "read":
        assert pair.client.read(stream_id, pair.now) == b"x"
    elif end == "release":
        pair.client.release(stream_id, pair.now)
    elif end == "eof":
        pair.client.receive_eof(pair.now)
    else:
        pair.client.close(pair.now)
    assert process.available == CONNECTION_GROWTH
