"""The pure connection against h2 as the server, over a virtual wire: requests, bodies, resets, GOAWAY, timeouts."""

from __future__ import annotations

import random

import h2.events
import h2.settings
import pytest

import h2keep.protocol.connection
from h2keep.errors import (
    ConnectionGoingAway,
    ConnectionLost,
    LocalProtocolError,
    PingTimeout,
    ReadTimeout,
    RemoteProtocolError,
    StreamReset,
    WriteTimeout,
)
from h2keep.keepalive import Keepalive
from h2keep.protocol import events
from support.pair import REQUEST, Pair

Codes = h2.settings.SettingCodes
OFF = Keepalive(read_idle_timeout=None)


def bodies_received(pair: Pair, stream_id: int) -> bytes:
    return b"".join(
        event.data
        for event in pair.server_events
        if isinstance(event, h2.events.DataReceived) and event.stream_id == stream_id
    )


def acknowledge_data(pair: Pair) -> None:
    """Have the server give back the credit for what it receives."""

    def on_event(event: h2.events.Event) -> None:
        if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
            pair.server.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    pair.on_server_event = on_event


def test_a_request_and_its_response() -> None:
    pair = Pair()
    stream_id = pair.request()
    pair.run(1.0)
    pair.respond(stream_id, b"hello")
    pair.run(1.0)
    assert pair.happened(events.ResponseReceived) == [events.ResponseReceived(stream_id, 200, [])]
    assert pair.client.read(stream_id, pair.now) == b"hello"
    assert pair.happened(events.StreamEnded) == [events.StreamEnded(stream_id, [])]
    assert pair.client.open_streams == 0


def test_trailers_and_interim_responses_are_passed_on() -> None:
    pair = Pair()
    stream_id = pair.request()
    pair.run(1.0)
    pair.server.send_headers(stream_id, [(b":status", b"103"), (b"link", b"</a>")])
    pair.respond(stream_id, b"x", end_stream=False)
    pair.server.send_headers(stream_id, [(b"grpc-status", b"0")], end_stream=True)
    pair.pump()
    pair.run(1.0)
    assert pair.happened(events.InformationalReceived) == [
        events.InformationalReceived(stream_id, 103, [(b"link", b"</a>")])
    ]
    assert pair.happened(events.StreamEnded) == [events.StreamEnded(stream_id, [(b"grpc-status", b"0")])]


def test_a_requests_own_trailers_follow_its_body() -> None:
    pair = Pair()
    stream_id = pair.request(end_stream=False)
    pair.client.send_data(stream_id, b"body", end_stream=False, now=pair.now)
    pair.client.send_trailers(stream_id, [(b"checksum", b"1")], pair.now)
    pair.pump()
    pair.run(1.0)
    kinds = [type(event) for event in pair.server_events]
    assert kinds.index(h2.events.DataReceived) < kinds.index(h2.events.TrailersReceived)
    assert bodies_received(pair, stream_id) == b"body"


@pytest.mark.parametrize("seed", range(20))
def test_uploads_larger_than_every_window_arrive_whole(seed: int) -> None:
    pair = Pair(seed=seed, chop=True, write_limit=20_000)
    acknowledge_data(pair)
    choose = random.Random(seed)
    sent = {pair.request(end_stream=False): b"" for _ in range(3)}
    for _ in range(10):
        for stream_id in sent:
            chunk = choose.randbytes(choose.choice([1, 100, 40_000]))
            pair.client.send_data(stream_id, chunk, end_stream=False, now=pair.now)
            sent[stream_id] += chunk
        pair.pump()
        pair.step()
    for stream_id in sent:
        pair.client.send_data(stream_id, b"", end_stream=True, now=pair.now)
    pair.pump()
    pair.run_until(lambda: sum(isinstance(event, h2.events.StreamEnded) for event in pair.server_events) == len(sent))
    for stream_id, body in sent.items():
        assert bodies_received(pair, stream_id) == body


def test_a_body_is_taken_as_fast_as_it_leaves() -> None:
    pair = Pair()
    stream_id = pair.request(end_stream=False)
    assert pair.client.send_data(stream_id, b"a" * 1000, end_stream=False, now=pair.now)
    assert not pair.client.send_data(stream_id, b"b" * 200_000, end_stream=False, now=pair.now)
    pair.pump()
    assert not pair.happened(events.BodyRoom)
    acknowledge_data(pair)
    pair.run(1.0)
    assert pair.happened(events.BodyRoom) == [events.BodyRoom(stream_id)]
    assert pair.client.body_bytes_sent == 201_000


@pytest.mark.parametrize("seed", range(20))
def test_downloads_arrive_whole_whatever_the_reader_does(seed: int) -> None:
    pair = Pair(seed=seed, chop=True)
    choose = random.Random(seed)
    left = {}
    got: dict[int, bytearray] = {}
    for _ in range(4):
        stream_id = pair.request()
        left[stream_id] = choose.randbytes(400_000)
        got[stream_id] = bytearray()
    pair.run(0.1)
    expected = dict(left)
    for stream_id in left:
        pair.server.send_headers(stream_id, [(b":status", b"200")])
    for _ in range(10_000):
        for stream_id, rest in left.items():
            room = min(pair.server.local_flow_control_window(stream_id), 16_384) if rest else 0
            if room:
                pair.server.send_data(stream_id, rest[:room], end_stream=room >= len(rest))
                left[stream_id] = rest[room:]
        pair.pump()
        pair.run(0.05)
        for stream_id in left:
            if choose.random() < 0.7:
                got[stream_id] += pair.client.read(stream_id, pair.now)
        if all(len(got[stream_id]) == len(expected[stream_id]) for stream_id in left):
            break
    assert {stream_id: bytes(data) for stream_id, data in got.items()} == expected
    assert pair.client.open_streams == 0


def test_declared_lengths_must_be_kept() -> None:
    pair = Pair()
    stream_id = pair.client.send_request(list(REQUEST), pair.now, content_length=5, end_stream=False)
    with pytest.raises(LocalProtocolError, match="2 bytes shorter"):
        pair.client.send_data(stream_id, b"abc", end_stream=True, now=pair.now)
    with pytest.raises(LocalProtocolError, match="longer than its Content-Length by at least 1"):
        pair.client.send_data(stream_id, b"abcdef", end_stream=False, now=pair.now)
    assert pair.client.send_data(stream_id, b"abcde", end_stream=True, now=pair.now)
    with pytest.raises(LocalProtocolError, match="Content-Length is 5"):
        pair.client.send_request(list(REQUEST), pair.now, content_length=5, end_stream=True)


# SETTINGS that change in mid-flight


def test_initial_window_lowered_below_what_was_sent_stops_the_upload_until_it_is_raised() -> None:
    pair = Pair()
    stream_id = pair.request(end_stream=False)
    pair.client.send_data(stream_id, b"x" * 100_000, end_stream=True, now=pair.now)
    pair.pump()
    pair.run(0.5)
    assert len(bodies_received(pair, stream_id)) == 65_535
    pair.server.update_settings({Codes.INITIAL_WINDOW_SIZE: 1_000})
    pair.server.increment_flow_control_window(1_000_000)
    pair.pump()
    pair.run(0.5)
    assert len(bodies_received(pair, stream_id)) == 65_535
    pair.server.increment_flow_control_window(64_536, stream_id)
    pair.pump()
    pair.run(0.5)
    assert len(bodies_received(pair, stream_id)) == 65_536
    pair.server.update_settings({Codes.INITIAL_WINDOW_SIZE: 200_000})
    pair.pump()
    pair.run(0.5)
    assert len(bodies_received(pair, stream_id)) == 100_000


def test_stream_limit_lowered_below_what_is_open_and_raised_again() -> None:
    pair = Pair(settings={Codes.MAX_CONCURRENT_STREAMS: 10})
    assert pair.client.max_streams == 100  # assumed until the peer has said
    pair.run(0.1)
    streams = [pair.request() for _ in range(4)]
    assert pair.client.free_slots == 6
    pair.server.update_settings({Codes.MAX_CONCURRENT_STREAMS: 2})
    pair.pump()
    pair.run(0.1)
    assert pair.client.free_slots == -2
    for stream_id in streams:
        pair.respond(stream_id)
    pair.run(0.1)
    assert pair.client.free_slots == 2
    pair.server.update_settings({Codes.MAX_CONCURRENT_STREAMS: 0})
    pair.pump()
    pair.run(0.1)
    assert pair.client.free_slots == 0


def test_no_more_than_256_streams_however_many_the_peer_allows() -> None:
    pair = Pair(settings={Codes.MAX_CONCURRENT_STREAMS: 100_000})
    pair.run(0.1)
    assert pair.client.max_streams == 256


@pytest.mark.parametrize("size", [0, 100, 65_536])
def test_header_table_size_changes_are_followed(size: int) -> None:
    pair = Pair()
    for round_ in range(3):
        stream_id = pair.request()
        pair.server.update_settings({Codes.HEADER_TABLE_SIZE: size + round_})
        pair.pump()
        pair.run(0.1)
        pair.respond(stream_id)
        pair.run(0.1)
    assert len(pair.happened(events.StreamEnded)) == 3


# Ends of streams


def test_cancelling_resets_the_stream_once_and_late_frames_are_ignored_and_credited() -> None:
    pair = Pair(OFF)
    stream_id = pair.request()
    pair.run(0.1)
    pair.respond(stream_id, b"x" * 10_000, end_stream=False)
    pair.client.release(stream_id, pair.now)
    pair.pump()
    for _ in range(6):
        pair.server.send_data(stream_id, b"y" * 10_000)
        pair.pump()
    pair.run(0.1)
    resets = [event for event in pair.server_events if isinstance(event, h2.events.StreamReset)]
    assert [event.error_code for event in resets] == [8]
    other = pair.request()
    pair.run(0.1)
    pair.respond(other, b"z")
    pair.run(0.1)
    assert pair.client.read(other, pair.now) == b"z"
    assert not pair.client.closed


def test_a_request_that_was_never_handed_over_is_dropped_unsent() -> None:
    pair = Pair()
    pair.run(0.1)
    stream_id = pair.client.send_request(list(REQUEST), pair.now)
    pair.client.release(stream_id, pair.now)
    pair.request()
    pair.run(0.1)
    requests = [event.stream_id for event in pair.server_events if isinstance(event, h2.events.RequestReceived)]
    assert requests == [stream_id + 2]
    assert not [event for event in pair.server_events if isinstance(event, h2.events.StreamReset)]


def test_a_reset_by_the_server_fails_its_stream_alone() -> None:
    pair = Pair()
    doomed, refused, other = pair.request(), pair.request(), pair.request()
    pair.run(0.1)
    pair.respond(doomed, b"partial", end_stream=False)
    pair.server.reset_stream(doomed, 2)
    pair.server.reset_stream(refused, 7)
    pair.pump()
    pair.run(0.1)
    pair.respond(other)
    pair.run(0.1)
    error = pair.failure(doomed)
    assert isinstance(error, StreamReset)
    assert (error.error_code, error.unprocessed) == (2, False)
    assert pair.client.read(doomed, pair.now) == b"partial"
    error = pair.failure(refused)
    assert isinstance(error, StreamReset)
    assert error.unprocessed
    assert pair.happened(events.StreamEnded) == [events.StreamEnded(other, [])]


def test_refused_after_an_interim_response_may_have_been_processed() -> None:
    pair = Pair()
    stream_id = pair.request()
    pair.run(0.1)
    pair.server.send_headers(stream_id, [(b":status", b"100")])
    pair.server.reset_stream(stream_id, 7)
    pair.pump()
    pair.run(0.1)
    error = pair.failure(stream_id)
    assert isinstance(error, StreamReset)
    assert not error.unprocessed


def test_a_complete_response_stands_though_the_server_resets_the_upload() -> None:
    pair = Pair()
    stream_id = pair.request(end_stream=False)
    pair.client.send_data(stream_id, b"x" * 200_000, end_stream=False, now=pair.now)
    pair.pump()
    pair.run(0.1)
    pair.respond(stream_id, b"enough")
    pair.server.reset_stream(stream_id, 0)
    pair.pump()
    pair.run(0.1)
    assert pair.failure(stream_id) is None
    assert pair.happened(events.BodyRoom) == [events.BodyRoom(stream_id)]
    assert not pair.client.is_open(stream_id)
    assert pair.client.read(stream_id, pair.now) == b"enough"


def test_a_complete_response_to_an_unfinished_upload_is_reset_without_blame() -> None:
    pair = Pair()
    stream_id = pair.request(end_stream=False)
    pair.run(0.1)
    pair.respond(stream_id, b"enough")
    pair.run(0.1)
    assert pair.client.is_open(stream_id)
    pair.client.release(stream_id, pair.now)
    pair.pump()
    pair.run(0.1)
    resets = [event for event in pair.server_events if isinstance(event, h2.events.StreamReset)]
    assert [event.error_code for event in resets] == [0]


def test_an_upload_that_ends_after_its_response_closes_the_stream() -> None:
    pair = Pair()
    stream_id = pair.request(end_stream=False)
    pair.run(0.1)
    pair.respond(stream_id)
    pair.run(0.1)
    pair.client.send_data(stream_id, b"late", end_stream=True, now=pair.now)
    pair.pump()
    assert pair.client.open_streams == 0


# GOAWAY and the connection's end


def test_after_goaway_promised_streams_finish_and_others_are_unprocessed() -> None:
    pair = Pair()
    kept, lost = pair.request(), pair.request()
    pair.run(0.1)
    pair.respond(kept, b"first ", end_stream=False)
    pair.server.close_connection(error_code=0, additional_data=b"bye", last_stream_id=kept)
    pair.server.state_machine.state = type(pair.server.state_machine.state).CLIENT_OPEN
    pair.server.send_data(kept, b"second", end_stream=True)
    pair.pump()
    unsent = pair.client.send_request(list(REQUEST), pair.now)
    pair.run(0.1)
    assert not pair.client.accepting
    assert pair.client.read(kept, pair.now) == b"first second"
    for stream_id in (lost, unsent):
        error = pair.failure(stream_id)
        assert isinstance(error, ConnectionGoingAway)
        assert (error.unprocessed, error.last_stream_id, error.debug_data) == (True, kept, b"bye")
    with pytest.raises(LocalProtocolError, match="takes no new requests"):
        pair.client.send_request(list(REQUEST), pair.now)


def test_uploads_go_on_after_goaway() -> None:
    pair = Pair()
    acknowledge_data(pair)
    stream_id = pair.request(end_stream=False)
    pair.run(0.1)
    server_state = pair.server.state_machine.state
    pair.server.close_connection(last_stream_id=stream_id)
    pair.server.state_machine.state = server_state
    pair.pump()
    pair.run(0.1)
    pair.client.send_data(stream_id, b"x" * 300_000, end_stream=True, now=pair.now)
    pair.pump()
    pair.run(1.0)
    assert len(bodies_received(pair, stream_id)) == 300_000


def test_k24_last_stream_id_only_ever_falls() -> None:
    pair = Pair()
    first, second = pair.request(), pair.request()
    pair.run(0.1)
    for last_stream_id in (2**31 - 1, first, second):
        state = pair.server.state_machine.state
        pair.server.close_connection(last_stream_id=last_stream_id)
        pair.server.state_machine.state = state
        pair.pump()
        pair.run(0.1)
    assert pair.client.goaway is not None
    assert pair.client.goaway.last_stream_id == first
    assert isinstance(pair.failure(second), ConnectionGoingAway)
    assert pair.failure(first) is None


def test_eof_fails_what_is_open_and_nothing_else() -> None:
    pair = Pair()
    done, early, open_ = pair.request(), pair.request(end_stream=False), pair.request()
    pair.run(0.1)
    pair.respond(done, b"complete")
    pair.respond(early, b"complete too")
    pair.respond(open_, b"partial", end_stream=False)
    pair.run(0.1)
    unsent = pair.client.send_request(list(REQUEST), pair.now)
    pair.client.receive_eof(pair.now)
    pair.run(0.1)
    assert pair.failure(done) is None
    assert pair.failure(early) is None
    assert pair.client.read(done, pair.now) == b"complete"
    assert pair.client.read(early, pair.now) == b"complete too"
    assert pair.client.read(open_, pair.now) == b"partial"
    error = pair.failure(open_)
    assert isinstance(error, ConnectionLost)
    assert not isinstance(error, PingTimeout)
    assert not error.unprocessed
    assert error.last_life == pytest.approx(pair.now - 0.19, abs=0.01)
    assert pair.failure(unsent).unprocessed  # type: ignore[union-attr]
    assert pair.client.closed


def test_eof_of_an_unused_connection_is_in_good_order() -> None:
    pair = Pair()
    pair.run(0.1)
    pair.client.receive_eof(pair.now)
    pair.run(0.1)
    assert pair.client.error is None
    assert pair.happened(events.ConnectionClosed) == [events.ConnectionClosed(None, 0.1)]


def test_a_transport_failure_keeps_its_cause() -> None:
    pair = Pair()
    stream_id = pair.request()
    cause = ConnectionResetError(104, "Connection reset by peer")
    pair.client.receive_eof(pair.now, cause)
    pair.pump()
    error = pair.failure(stream_id)
    assert error is not None
    assert error.__cause__ is cause
    assert "Connection reset by peer" in str(error)


def test_k17_closing_says_goaway_fails_what_is_open_and_leaves_no_deadline() -> None:
    pair = Pair()
    stream_id = pair.request(read_timeout=1.0)
    pair.run(0.1)
    pair.client.close(pair.now)
    pair.pump()
    assert pair.client.next_deadline() is None
    pair.run(60.0)
    assert [event for event in pair.server_events if isinstance(event, h2.events.ConnectionTerminated)]
    assert isinstance(pair.failure(stream_id), ConnectionLost)
    assert not pair.pings


def test_a_closed_connection_takes_every_call() -> None:
    pair = Pair()
    stream_id = pair.request()
    pair.client.close(pair.now)
    pair.pump()
    client, now = pair.client, pair.now
    client.close(now)
    client.give_up(ConnectionLost("late"), now)
    client.receive_data(b"garbage", now)
    client.receive_eof(now)
    client.handle_timeout(now + 100)
    client.note_life(now)
    client.note_gap(100.0, now)
    client.note_wall_jump()
    client.note_upload_progress(now)
    client.await_data(stream_id, now)
    client.send_data(stream_id, b"x", end_stream=True, now=now)
    client.send_trailers(stream_id, [], now)
    client.reset_stream(stream_id, 8, now)
    assert client.read(stream_id, now) == b""
    client.release(stream_id, now)
    client.release(stream_id, now)
    assert not client.ping(now)
    assert not client.verify(now)
    assert client.next_event() is None
    assert client.next_deadline() is None


# K21: the two clocks of a stream


def test_k21_read_timeout_runs_from_the_end_of_the_upload() -> None:
    pair = Pair(OFF)
    acknowledge_data(pair)
    stream_id = pair.request(end_stream=False, read_timeout=5.0)
    pair.client.await_data(stream_id, pair.now)
    pair.run(20.0)
    assert pair.failure(stream_id) is None
    pair.client.send_data(stream_id, b"x", end_stream=True, now=pair.now)
    pair.pump()
    pair.run(4.9)
    assert pair.failure(stream_id) is None
    pair.run(0.2)
    error = pair.failure(stream_id)
    assert isinstance(error, ReadTimeout)
    assert "5.0 s" in str(error)


def test_k21_only_that_streams_own_frames_restart_its_read_clock() -> None:
    pair = Pair(Keepalive(read_idle_timeout=1.0, ping_timeout=1.0, jitter=0.0))
    waiting, busy = pair.request(read_timeout=5.0), pair.request()
    pair.client.await_data(waiting, pair.now)
    pair.run(0.1)
    pair.respond(busy, b"x", end_stream=False)
    for _ in range(9):
        pair.server.send_data(busy, b"y")
        pair.server.send_headers(waiting, [(b":status", b"100")])
        pair.pump()
        pair.run(0.5)
    assert pair.failure(waiting) is None
    pair.run(2.0)
    assert isinstance(pair.failure(waiting), ReadTimeout)
    assert pair.failure(busy) is None
    assert pair.pings


def test_k21_the_read_clock_stands_while_nobody_waits() -> None:
    pair = Pair(OFF)
    stream_id = pair.request(read_timeout=5.0)
    pair.client.await_data(stream_id, pair.now)
    pair.run(3.0)
    pair.respond(stream_id, b"x", end_stream=False)
    pair.run(60.0)
    assert pair.failure(stream_id) is None
    assert pair.client.read(stream_id, pair.now) == b"x"
    pair.run(60.0)
    assert pair.failure(stream_id) is None
    pair.client.await_data(stream_id, pair.now)
    pair.run(5.1)
    assert isinstance(pair.failure(stream_id), ReadTimeout)


@pytest.mark.parametrize(("connection_credit", "obstacle"), [(0, "connection's"), (1_000_000, "stream's")])
def test_k21_write_timeout_names_the_closed_window(connection_credit: int, obstacle: str) -> None:
    pair = Pair(OFF)
    if connection_credit:
        pair.server.increment_flow_control_window(connection_credit)
    else:
        pair.server.update_settings({Codes.INITIAL_WINDOW_SIZE: 1_000_000})
    pair.pump()
    pair.run(0.1)
    stream_id = pair.request(end_stream=False, write_timeout=5.0)
    pair.client.send_data(stream_id, b"x" * 100_000, end_stream=True, now=pair.now)
    pair.pump()
    pair.run(4.9)
    assert pair.failure(stream_id) is None
    pair.run(0.2)
    error = pair.failure(stream_id)
    assert isinstance(error, WriteTimeout)
    assert f"{obstacle} flow-control window" in str(error)


def test_k21_write_clock_restarts_with_each_byte_and_stands_while_the_iterator_produces() -> None:
    pair = Pair(OFF)
    stream_id = pair.request(end_stream=False, write_timeout=5.0)
    pair.run(60.0)  # nothing is ready
    for _ in range(5):
        pair.client.send_data(stream_id, b"x" * 65_535, end_stream=False, now=pair.now)
        pair.pump()
        pair.run(4.0)
        pair.server.increment_flow_control_window(65_535)
        pair.server.increment_flow_control_window(65_535, stream_id)
        pair.pump()
        pair.run(4.0)
    assert pair.failure(stream_id) is None


def test_k21_a_request_that_cannot_be_handed_over_times_out_unprocessed() -> None:
    pair = Pair(OFF)
    pair.run(0.1)
    stream_id = pair.client.send_request(list(REQUEST), pair.now, write_timeout=5.0)
    pair.client.handle_timeout(pair.now + 5.0)
    pair._drain_events()
    error = pair.failure(stream_id)
    assert isinstance(error, WriteTimeout)
    assert error.unprocessed
    assert "socket" in str(error)


def test_k21_two_timeouts_without_progress_retire_the_connection() -> None:
    pair = Pair(Keepalive(jitter=0.0))
    streams = [pair.request(read_timeout=5.0) for _ in range(2)]
    survivor = pair.request()
    pair.client.await_data(streams[0], pair.now)
    pair.run(6.0)
    assert pair.client.accepting
    pair.client.await_data(streams[1], pair.now)
    pair.run(6.0)
    assert not pair.client.accepting
    pair.respond(survivor, b"still served")
    pair.run(0.1)
    assert pair.client.read(survivor, pair.now) == b"still served"


def test_k21_progress_between_two_timeouts_clears_the_connection() -> None:
    pair = Pair(OFF)
    for _ in range(4):
        stream_id, other = pair.request(read_timeout=5.0), pair.request()
        pair.client.await_data(stream_id, pair.now)
        pair.run(6.0)
        pair.respond(other)
        pair.run(0.1)
    assert pair.client.accepting


def test_a_stream_that_outlives_thousands_does_not_keep_their_alarms() -> None:
    pair = Pair(OFF)
    pair.run(0.1)
    eldest = pair.request(read_timeout=500.0)
    pair.client.await_data(eldest, pair.now)
    for _ in range(1_000):
        stream_id = pair.request(read_timeout=600.0, write_timeout=600.0)
        pair.client.release(stream_id, pair.now)
    assert len(pair.client._alarms._heap) < 200
    pair.run(501.0)
    assert isinstance(pair.failure(eldest), ReadTimeout)


def test_a_released_streams_late_alarm_changes_nothing() -> None:
    pair = Pair(OFF)
    stream_id = pair.request(read_timeout=5.0)
    pair.client.await_data(stream_id, pair.now)
    pair.run(3.0)
    pair.respond(stream_id, b"x", end_stream=False)
    pair.run(1.0)
    pair.client.read(stream_id, pair.now)
    pair.client.await_data(stream_id, pair.now)
    pair.run(4.0)
    assert pair.failure(stream_id) is None
    pair.run(2.0)
    assert isinstance(pair.failure(stream_id), ReadTimeout)


def test_goaway_finds_requests_that_were_not_sent_yet() -> None:
    pair = Pair()
    sent = pair.request()
    pair.run(0.1)
    unsent = pair.client.send_request(list(REQUEST), pair.now)
    pair.client.receive_data(b"\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\0", pair.now)
    pair.pump()
    for stream_id in (sent, unsent):
        error = pair.failure(stream_id)
        assert isinstance(error, ConnectionGoingAway)
        assert error.unprocessed
    assert pair.client.open_streams == 0


def test_goaway_at_a_reset_stream_changes_nothing_for_it() -> None:
    pair = Pair()
    stream_id = pair.request()
    pair.run(0.1)
    pair.server.reset_stream(stream_id, 2)
    pair.pump()
    pair.run(0.1)
    pair.client.receive_data(b"\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\0", pair.now)
    assert isinstance(pair.failure(stream_id), StreamReset)


def test_a_request_head_larger_than_a_frame_is_continued_unbroken() -> None:
    pair = Pair()
    pair.run(0.1)
    head = [*REQUEST, *[(b"x-%d" % n, b"\xff" * 1_000) for n in range(20)]]
    stream_id = pair.client.send_request(head, pair.now)
    pair.run(0.1)
    (request,) = [event for event in pair.server_events if isinstance(event, h2.events.RequestReceived)]
    assert [tuple(field) for field in request.headers or []] == head
    pair.respond(stream_id)
    pair.run(0.1)
    assert pair.happened(events.StreamEnded)


def test_the_earlier_of_both_clocks_counts() -> None:
    pair = Pair(OFF)
    stream_id = pair.request(end_stream=False, read_timeout=1.0, write_timeout=3.0)
    pair.client.await_data(stream_id, pair.now)
    pair.client.send_data(stream_id, b"x" * 100_000, end_stream=True, now=pair.now)
    pair.pump()
    pair.run(10.0)
    assert isinstance(pair.failure(stream_id), WriteTimeout)


def test_the_alarms_of_many_streams_cost_no_memory_when_they_are_gone() -> None:
    pair = Pair(OFF)
    pair.run(0.1)
    for _ in range(2_000):
        stream_id = pair.request(read_timeout=600.0, write_timeout=600.0)
        pair.client.await_data(stream_id, pair.now)
        pair.run(0.03)
        pair.respond(stream_id)
        pair.run(0.03)
        pair.client.release(stream_id, pair.now)
    assert len(pair.client._alarms._heap) < 200
    assert not pair.client._streams


def test_a_users_ping_is_answered_and_joins_one_that_is_outstanding() -> None:
    pair = Pair(Keepalive(read_idle_timeout=None), latency=0.05)
    assert pair.client.ping(pair.now)
    assert not pair.client.ping(pair.now)
    pair.pump()
    pair.run(1.0)
    (acknowledged,) = pair.happened(events.PingAcknowledged)
    assert isinstance(acknowledged, events.PingAcknowledged)
    assert acknowledged.rtt == pytest.approx(0.1)
    assert acknowledged.at == pytest.approx(0.1)
    assert len(pair.pings) == 1


def test_stream_ids_run_out_before_they_overflow(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # nghttp2 counts the ids one by one, and nobody waits for a thousand million.
    highest = 2**31 - 1 if engine == "h2" else 100_001
    monkeypatch.setattr(h2keep.protocol.connection, "_HIGHEST_STREAM_ID", highest)
    pair = Pair()
    pair.client._next_stream_id = highest
    stream_id = pair.request()
    pair.run(0.1)
    pair.respond(stream_id)
    pair.run(0.1)
    assert stream_id == highest
    assert not pair.client.accepting
    assert pair.happened(events.StreamEnded)


def test_a_malformed_frame_ends_everything_with_one_clean_error() -> None:
    pair = Pair()
    done, stream_id = pair.request(), pair.request()
    pair.run(0.1)
    pair.respond(done, b"complete")
    pair.server_send_raw(b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00")  # WINDOW_UPDATE of 0
    pair.run(0.1)
    assert pair.client.read(done, pair.now) == b"complete"
    error = pair.failure(stream_id)
    assert isinstance(error, RemoteProtocolError)
    assert str(error).startswith("https://example.com: the server broke HTTP/2")
    assert [event for event in pair.server_events if isinstance(event, h2.events.ConnectionTerminated)]
