"""How requests and connections end: once each, with what had come still readable, and with the right word on whether
the server may have seen the request.
"""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any

import h2.events
import h2.settings
import pytest
from hyperframe import frame as frames

from h2keep.errors import (
    ConnectionGoingAway,
    ConnectionLost,
    H2KeepError,
    PingTimeout,
    ReadTimeout,
    RemoteProtocolError,
    WriteTimeout,
)
from h2keep.keepalive import Keepalive, PingPurpose
from h2keep.protocol import Connection, events
from support.pair import REQUEST, Pair, parse_frames

if TYPE_CHECKING:
    from collections.abc import Callable

Codes = h2.settings.SettingCodes
OFF = Keepalive(read_idle_timeout=None)
DEFAULT = Keepalive(jitter=0.0)


def frame(kind: type[frames.Frame], stream_id: int, *flags: str, **fields: object) -> bytes:
    made = kind(stream_id, flags=flags)
    for name, value in fields.items():
        setattr(made, name, value)
    return made.serialize()


def goaway(last_stream_id: int, code: int = 0, debug: bytes = b"") -> bytes:
    body = last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big") + debug
    return len(body).to_bytes(3, "big") + b"\x07\0\0\0\0\0" + body


def ends(pair: Pair, stream_id: int) -> list[type[events.Event]]:
    return [
        type(event)
        for event in pair.events
        if isinstance(event, events.StreamEnded | events.StreamFailed) and event.stream_id == stream_id
    ]


def resets(pair: Pair) -> list[tuple[int, int]]:
    return [
        (event.stream_id, int(event.error_code or 0))
        for event in pair.server_events
        if isinstance(event, h2.events.StreamReset)
    ]


def requests(pair: Pair) -> list[int | None]:
    return [event.stream_id for event in pair.server_events if isinstance(event, h2.events.RequestReceived)]


# A response that is complete stands


def complete_response_to_an_unfinished_upload(pair: Pair, **options: float) -> int:
    stream_id = pair.request(end_stream=False, **options)
    pair.run(0.1)
    pair.respond(stream_id, b"whole")
    pair.run(0.1)
    assert ends(pair, stream_id) == [events.StreamEnded]
    assert pair.client.is_open(stream_id)
    return stream_id


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(
            lambda id_: frame(frames.WindowUpdateFrame, id_, window_increment=2**31 - 1), id="window-overflow"
        ),
        pytest.param(lambda id_: goaway(0), id="goaway-that-denies-it"),
        pytest.param(lambda id_: frame(frames.RstStreamFrame, id_, error_code=2), id="reset"),
        pytest.param(
            lambda id_: frame(frames.HeadersFrame, id_, "END_HEADERS", data=b"\x08\x03103"), id="1xx-after-it"
        ),
        pytest.param(lambda id_: b"\0\0\0\0\0\0\0\0\0", id="end-of-the-connection"),
    ],
)
def test_k8_a_complete_response_stands_whatever_becomes_of_its_upload(trouble: Callable[[int], bytes]) -> None:
    pair = Pair(OFF)
    stream_id = complete_response_to_an_unfinished_upload(pair)
    pair.server_send_raw(trouble(stream_id))
    pair.run(0.1)
    assert ends(pair, stream_id) == [events.StreamEnded]
    assert pair.client.open_streams == pair.client.keepalive.open_streams == 0
    # Its producer is told that nobody wants more.
    assert pair.happened(events.BodyRoom) == [events.BodyRoom(stream_id)]
    assert pair.client.read(stream_id, pair.now) == b"whole"


def test_k8_k21_an_upload_that_is_stuck_after_its_response_is_given_up_without_blame() -> None:
    pair = Pair(OFF)
    streams = [complete_response_to_an_unfinished_upload(pair, write_timeout=5.0) for _ in range(2)]
    for stream_id in streams:
        pair.client.send_data(stream_id, b"x" * 70_000, end_stream=True, now=pair.now)
    pair.run(6.0)
    for stream_id in streams:
        assert ends(pair, stream_id) == [events.StreamEnded]
        assert pair.client.read(stream_id, pair.now) == b"whole"
    assert resets(pair) == [(stream_id, 0) for stream_id in streams]
    assert pair.client.accepting  # such ends don't retire the connection
    assert pair.client.open_streams == 0


def test_k8_k21_what_is_buffered_is_handed_out_before_a_write_timeout() -> None:
    pair = Pair(OFF)
    stream_id = pair.request(end_stream=False, write_timeout=5.0)
    pair.client.send_data(stream_id, b"x" * 70_000, end_stream=True, now=pair.now)
    pair.run(0.1)
    pair.respond(stream_id, b"early words", end_stream=False)
    pair.run(6.0)
    assert isinstance(pair.failure(stream_id), WriteTimeout)
    assert pair.client.read(stream_id, pair.now) == b"early words"
    pair.client.release(stream_id, pair.now)
    assert not pair.client._streams
    assert pair.client.free_slots == 100


def test_k21_the_read_clock_does_not_run_while_bytes_are_buffered() -> None:
    pair = Pair(OFF)
    stream_id = pair.request(read_timeout=5.0)
    pair.run(0.1)
    pair.respond(stream_id, b"x", end_stream=False)
    pair.run(0.1)
    pair.client.await_data(stream_id, pair.now)
    pair.run(60.0)
    assert pair.failure(stream_id) is None
    pair.client.read(stream_id, pair.now)
    pair.client.await_data(stream_id, pair.now)
    pair.run(6.0)
    assert isinstance(pair.failure(stream_id), ReadTimeout)


@pytest.mark.parametrize("late", ["data", "trailers", "1xx", "empty"])
def test_k16_k21_any_frame_of_a_response_is_progress_even_if_it_comes_late(late: str) -> None:
    """Two timeouts retire a connection only if no HEADERS and no DATA came between them, on whatever stream."""
    pair = Pair(OFF)
    first, second = (pair.request(read_timeout=5.0) for _ in range(2))
    pair.client.await_data(first, pair.now)
    pair.run(0.1)
    pair.server.send_headers(first, [(":status", "103")])
    pair.pump()
    pair.run(5.5)
    assert isinstance(pair.failure(first), ReadTimeout)
    block = pair.server.encoder.encode([(":status", "200")])
    pair.server_send_raw(
        {
            "data": frame(frames.DataFrame, first, data=b"too late"),
            "trailers": frame(frames.HeadersFrame, first, "END_HEADERS", data=block),
            "1xx": frame(frames.HeadersFrame, second, "END_HEADERS", data=b"\x08\x03103"),
            "empty": frame(frames.HeadersFrame, second, "END_HEADERS", data=block) + frame(frames.DataFrame, second),
        }[late]
    )
    pair.run(0.1)
    pair.client.await_data(second, pair.now)
    pair.run(5.5)
    assert isinstance(pair.failure(second), ReadTimeout)
    assert pair.client.accepting


def test_k10_k16_an_interim_response_renews_what_may_be_sent() -> None:
    pair = Pair(DEFAULT)
    other = pair.request()
    pair.run(1.0)

    def give_one_up() -> int:
        """A request to which nothing came; how many PINGs of K10 were sent till then."""
        stream_id = pair.request()
        pair.run(2.0)
        pair.client.release(stream_id, pair.now)
        pair.run(1.0)
        return len(pair.happened(events.PingSent))

    assert [give_one_up(), give_one_up()] == [1, 1]
    pair.server.send_headers(other, [(":status", "103")])
    pair.run(1.0)
    assert [give_one_up(), give_one_up()] == [2, 2]
    purposes = {event.purpose for event in pair.events if isinstance(event, events.PingSent)}
    assert purposes == {PingPurpose.SUSPICION}


# One end, also in the middle of what was read


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(frame(frames.PingFrame, 0, opaque_data=b"12345678"), id="ping"),
        pytest.param(frame(frames.SettingsFrame, 0), id="settings"),
    ],
)
def test_k23_what_follows_a_flood_in_the_same_read_changes_nothing(flood: bytes) -> None:
    pair = Pair(OFF)
    streams = [pair.request() for _ in range(3)]
    pair.run(0.1)
    block = pair.server.encoder.encode([(":status", "200")])
    pair.client.receive_data(
        flood * 1_001
        + frame(frames.HeadersFrame, streams[0], "END_HEADERS", "END_STREAM", data=block)
        + frame(frames.HeadersFrame, streams[1], "END_HEADERS", data=block)
        + frame(frames.DataFrame, streams[1], data=b"x")
        + frame(frames.RstStreamFrame, streams[2], error_code=7)
        + goaway(0),
        pair.now,
    )
    pair.pump()
    for stream_id in streams:
        assert ends(pair, stream_id) == [events.StreamFailed]
        assert isinstance(pair.failure(stream_id), RemoteProtocolError)
        assert not pair.failure(stream_id).unprocessed  # type: ignore[union-attr]
        assert pair.client.read(stream_id, pair.now) == b""
    assert pair.client.open_streams == pair.client.keepalive.open_streams == 0
    assert isinstance(pair.events[-1], events.ConnectionClosed)
    assert pair.client.goaway is None


def test_k23_resets_and_credit_count_among_the_replies() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    pair.respond(stream_id, end_stream=False)
    pair.run(0.1)
    client = pair.client
    pings = frame(frames.PingFrame, 0, opaque_data=b"12345678")
    client.receive_data(pings * 998, pair.now)
    # Half a window of padding brings a WINDOW_UPDATE, a malformed response an RST_STREAM.
    for _ in range(256):
        client.receive_data(b"\0\1\1\0\x08" + stream_id.to_bytes(4, "big") + b"\xff" + b"x" + b"\0" * 255, pair.now)
    assert not client.closed
    client.receive_data(pings, pair.now)
    assert not client.closed
    client.receive_data(pings, pair.now)
    assert client.closed
    assert parse_frames(client.data_to_send(1_000_000, pair.now))[-1].error_code == 0xB


def test_k10_slots_that_are_held_are_no_news_after_the_end() -> None:
    pair = Pair(DEFAULT)
    pair.run(1.0)
    stream_id = pair.request()
    pair.black_hole()
    pair.run(5.0)
    pair.client.release(stream_id, pair.now)
    assert pair.client._held_slots == 1
    pair.client.close(pair.now)
    pair.pump()
    pair.client.note_life(pair.now)
    assert pair.client.next_event() is None


def test_what_a_released_stream_had_buffered_is_freed_at_once_with_the_stream() -> None:
    pair = Pair(OFF)
    stream_id = pair.request(read_timeout=600.0)
    pair.client.await_data(stream_id, pair.now)
    pair.run(0.1)
    pair.respond(stream_id, b"x" * 10_000, end_stream=False)
    pair.run(0.1)
    stream = pair.client._streams[stream_id]
    pair.client.release(stream_id, pair.now)
    assert any(entry[1] == stream_id for entry in pair.client._alarms._heap)
    # The alarm that was set holds a number. How many references of ours are counted depends on the Python.
    ours_alone = object()
    assert sys.getrefcount(stream) == sys.getrefcount(ours_alone)


# K24: what the server may have seen


def lose(pair: Pair) -> None:
    pair.black_hole()
    pair.blocked = True
    pair.run_until(lambda: pair.client.closed)


def be_stuck(pair: Pair) -> None:
    """The socket takes nothing while PINGs come."""
    pair.blocked = True
    while not pair.client.closed:
        pair.server_send_raw(frame(frames.PingFrame, 0, opaque_data=b"12345678"))
        pair.run(1.0)


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        pytest.param(lambda pair: pair.client.close(pair.now), ConnectionLost, id="closed"),
        pytest.param(lambda pair: pair.client.receive_eof(pair.now), ConnectionLost, id="eof"),
        pytest.param(lambda pair: pair.client.receive_eof(pair.now, OSError("x")), ConnectionLost, id="failure"),
        pytest.param(
            lambda pair: pair.client.receive_data(b"\0\0\1\6\0\0\0\0\0x", pair.now), RemoteProtocolError, id="bad"
        ),
        pytest.param(lambda pair: pair.client.give_up(ConnectionLost("x"), pair.now), ConnectionLost, id="given-up"),
        pytest.param(lose, PingTimeout, id="ping-timeout"),
        pytest.param(be_stuck, ConnectionLost, id="stuck"),
    ],
)
def test_k24_a_lost_connection_leaves_unprocessed_what_was_never_encoded_and_that_alone(
    end: Callable[[Pair], Any], kind: type[H2KeepError]
) -> None:
    pair = Pair(Keepalive(read_idle_timeout=10.0, ping_timeout=5.0, jitter=0.0))
    sent, answered = pair.request(), pair.request()
    pair.run(0.1)
    pair.respond(answered, b"some", end_stream=False)
    pair.run(0.1)
    pair.blocked = True
    unsent = pair.client.send_request(list(REQUEST), pair.now)
    end(pair)
    pair._drain_events()
    for stream_id, unprocessed in ((sent, False), (answered, False), (unsent, True)):
        error = pair.failure(stream_id)
        assert type(error) is kind
        assert error.unprocessed is unprocessed
    assert pair.client.read(answered, pair.now) == b"some"
    pair.blocked = False
    pair.pump()
    assert unsent not in requests(pair)


def test_k24_timeouts_say_whether_the_request_was_handed_over() -> None:
    pair = Pair(OFF)
    pair.run(0.1)
    sent = pair.request(read_timeout=5.0)
    pair.client.await_data(sent, pair.now)
    pair.blocked = True
    unsent = pair.client.send_request(list(REQUEST), pair.now, write_timeout=5.0)
    pair.run(6.0)
    read, write = pair.failure(sent), pair.failure(unsent)
    assert isinstance(read, ReadTimeout)
    assert isinstance(write, WriteTimeout)
    assert (read.unprocessed, write.unprocessed) == (False, True)


@pytest.mark.parametrize(
    ("before", "unprocessed"),
    [([], True), (["1xx"], False), (["head"], False), (["head", "body"], False)],
)
def test_k24_refused_stream_counts_only_without_a_frame_of_the_response(
    before: list[str], *, unprocessed: bool
) -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    for what in before:
        if what == "1xx":
            pair.server.send_headers(stream_id, [(":status", "103")])
        elif what == "head":
            pair.respond(stream_id, end_stream=False)
        else:
            pair.server.send_data(stream_id, b"x")
    pair.server.reset_stream(stream_id, 7)
    pair.pump()
    pair.run(0.1)
    error = pair.failure(stream_id)
    assert error.unprocessed is unprocessed  # type: ignore[union-attr]
    assert "REFUSED_STREAM" in str(error)


@pytest.mark.parametrize("last_stream_id", [2**31 - 1, 2**32 - 1, 1])
def test_k24_no_stream_is_opened_after_goaway_whatever_it_still_allows(last_stream_id: int) -> None:
    pair = Pair(OFF)
    sent = pair.request()
    pair.run(0.1)
    pair.blocked = True
    unsent = pair.client.send_request(list(REQUEST), pair.now)
    pair.server_send_raw(goaway(last_stream_id))
    pair.run(0.1)
    pair.blocked = False
    pair.run(0.1)
    assert requests(pair) == [sent]
    error = pair.failure(unsent)
    assert isinstance(error, ConnectionGoingAway)
    assert error.unprocessed
    assert pair.failure(sent) is None
    pair.respond(sent, b"as promised")
    pair.run(0.1)
    assert pair.client.read(sent, pair.now) == b"as promised"


def test_k24_the_reserved_bit_of_last_stream_id_means_nothing() -> None:
    pair = Pair(OFF)
    first, second = pair.request(), pair.request()
    pair.run(0.1)
    pair.server_send_raw(goaway(first | 2**31))
    pair.run(0.1)
    assert pair.failure(first) is None
    assert isinstance(pair.failure(second), ConnectionGoingAway)
    assert pair.client.goaway is not None
    assert pair.client.goaway.last_stream_id == first


def test_k13_a_punishment_said_twice_is_one() -> None:
    pair = Pair(DEFAULT)
    stream_id = pair.request()
    pair.run(70.0)
    pair.server_send_raw(goaway(2**31 - 1, 0xB, b"too_many_pings"))
    pair.server_send_raw(goaway(stream_id, 0xB, b"too_many_pings"))
    pair.run(0.1)
    told = [event.too_many_pings for event in pair.events if isinstance(event, events.GoAwayReceived)]
    assert told == [True, False]


# The peer's limit of streams


def test_requests_that_wait_stay_within_a_limit_that_falls_and_leave_as_others_end() -> None:
    pair = Pair(OFF)
    streams = [pair.request() for _ in range(3)]
    pair.run(0.1)
    pair.blocked = True
    waiting = [pair.client.send_request(list(REQUEST), pair.now, write_timeout=30.0) for _ in range(5)]
    pair.server.update_settings({Codes.MAX_CONCURRENT_STREAMS: 4})
    pair.pump()
    pair.run(0.1)
    pair.blocked = False
    pair.run(0.1)
    assert requests(pair) == [*streams, waiting[0]]
    assert not pair.client.has_data_to_send()
    # One that was never sent makes no room for another.
    pair.client.release(waiting[1], pair.now)
    pair.run(0.1)
    assert requests(pair) == [*streams, waiting[0]]
    for n, next_one in enumerate(waiting[2:]):
        pair.respond(streams[n])
        pair.run(0.1)
        assert requests(pair)[-1] == next_one
    assert pair.client.open_streams == 4
    assert pair.client.free_slots == 0
    pair.respond(waiting[0])
    pair.run(0.1)
    assert pair.client.free_slots == 1
    last = pair.request()
    pair.run(0.1)
    assert requests(pair) == [*streams, waiting[0], *waiting[2:], last]


def test_requests_that_wait_for_a_limit_to_rise_time_out_saying_so() -> None:
    pair = Pair(OFF)
    pair.run(0.1)
    pair.blocked = True
    doomed = pair.client.send_request(list(REQUEST), pair.now, write_timeout=5.0)
    patient = pair.client.send_request(list(REQUEST), pair.now)
    pair.server.update_settings({Codes.MAX_CONCURRENT_STREAMS: 0})
    pair.pump()
    pair.run(0.1)
    pair.blocked = False
    pair.run(6.0)
    error = pair.failure(doomed)
    assert isinstance(error, WriteTimeout)
    assert error.unprocessed
    assert "limit of concurrent streams" in str(error)
    assert requests(pair) == []
    pair.server.update_settings({Codes.MAX_CONCURRENT_STREAMS: 1})
    pair.pump()
    pair.run(0.1)
    assert requests(pair) == [patient]


# What must not depend on the number of requests, or on anything but the arguments


def lines_executed(act: Callable[[], object]) -> int:
    count = 0

    def trace(*_: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return count


def test_k14_what_a_request_costs_does_not_depend_on_how_many_are_open() -> None:
    costs = []
    for others in (20, 250):
        pair = Pair(DEFAULT, settings={Codes.MAX_CONCURRENT_STREAMS: 256})
        pair.run(0.1)
        for _ in range(others):
            pair.request(read_timeout=100.0)
        pair.run(0.1)
        client, now = pair.client, pair.now
        block = pair.server.encoder.encode([(":status", "200")])

        def whole(client: Connection = client, now: float = now, block: bytes = block) -> None:
            stream_id = client.send_request(list(REQUEST), now, end_stream=False, read_timeout=5.0)
            client.send_data(stream_id, b"x" * 100, end_stream=True, now=now)
            client.data_to_send(65_536, now)
            client.await_data(stream_id, now)
            client.note_life(now)
            client.receive_data(
                frame(frames.HeadersFrame, stream_id, "END_HEADERS", data=block)
                + frame(frames.DataFrame, stream_id, data=b"y")
                + frame(frames.WindowUpdateFrame, 0, window_increment=10)
                + frame(frames.DataFrame, stream_id, "END_STREAM", data=b"z"),
                now,
            )
            client.next_deadline()
            client.handle_timeout(now)
            assert client.read(stream_id, now) == b"yz"
            client.release(stream_id, now)

        whole()
        costs.append(lines_executed(whole))
    assert abs(costs[0] - costs[1]) <= 60, costs  # a heap's depth


def test_k14_life_does_not_move_a_connections_deadline() -> None:
    pair = Pair(DEFAULT)
    pair.request()
    pair.run(0.1)
    deadline = pair.client.next_deadline()
    pair.client.note_life(pair.now + 1.0)
    assert pair.client.next_deadline() == deadline


def test_k6_a_peer_that_reads_nothing_is_found_dead_in_the_same_time() -> None:
    pair = Pair(DEFAULT)
    stream_id = pair.request(end_stream=False)
    pair.run(1.0)
    pair.client.send_data(stream_id, b"x" * 1_000_000, end_stream=True, now=pair.now)
    pair.blocked = True
    pair.dropping = True
    pair.run_until(lambda: pair.client.closed)
    assert isinstance(pair.failure(stream_id), PingTimeout)
    assert pair.now - pair.client.keepalive.last_life == pytest.approx(45.02, abs=0.01)


def test_k5_a_reset_drops_what_was_queued_of_the_body() -> None:
    pair = Pair(OFF)
    stream_id = pair.request(end_stream=False)
    pair.run(0.1)
    pair.client.send_data(stream_id, b"x" * 50_000, end_stream=True, now=pair.now)
    pair.client.release(stream_id, pair.now)
    out = parse_frames(pair.client.data_to_send(1_000_000, pair.now))
    assert [type(frame) for frame in out] == [frames.RstStreamFrame]
    assert not pair.client.has_data_to_send()


def test_k25_the_protocol_knows_no_time_and_no_chance_but_what_it_is_given() -> None:
    """Equal arguments make equal bytes, events and deadlines, whenever and wherever they are played."""

    def play(start: float) -> tuple[list[bytes], list[object]]:
        out: list[bytes] = []
        seen: list[object] = []
        client = Connection(Keepalive(), random.Random(7), start)
        client.send_request(list(REQUEST), start, read_timeout=100.0)
        client.await_data(1, start)
        for step in range(30):
            now = start + step * 7.0
            if step % 9 == 1:
                client.note_life(now)
            if step == 3:
                client.note_gap(10.0, now)
            client.handle_timeout(now)
            out.append(client.data_to_send(65_536, now))
            deadline = client.next_deadline()
            seen.append(None if deadline is None else round(deadline - start, 6))
            while (event := client.next_event()) is not None:
                seen.append(type(event))
        return out, seen

    assert play(0.0) == play(0.0)
    assert play(1_000.0)[0] == play(0.0)[0]
    assert play(1_000.0)[1] == play(0.0)[1]


def test_k20_the_figures_of_a_connection_follow_what_happens() -> None:
    pair = Pair(DEFAULT, latency=0.05)
    pair.request()
    pair.run(61.0)
    timer = pair.client.keepalive
    assert (timer.pings_sent, timer.pings_acked) == (2, 2)
    assert timer.rtt_last == timer.rtt_best == pytest.approx(0.1)
    assert timer.rtt_smoothed == pytest.approx(0.1)
    assert timer.last_life == pytest.approx(60.3)
    assert timer.last_ping_at == pytest.approx(60.2)
    assert timer.last_ping_purpose is PingPurpose.IDLE
    assert timer.interval == 30.0
    assert [type(event) for event in pair.events if not isinstance(event, events.SettingsChanged)] == [
        events.ConnectionReady,
        *[events.PingSent, events.PingAcknowledged] * 2,
    ]
    pair.black_hole()
    pair.run_until(lambda: pair.client.closed)
    (closed,) = pair.happened(events.ConnectionClosed)
    assert isinstance(closed, events.ConnectionClosed)
    assert closed.error is pair.client.error
    assert isinstance(closed.error, PingTimeout)
