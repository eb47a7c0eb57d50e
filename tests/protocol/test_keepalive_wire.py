"""Keepalive end to end over the virtual wire: the real defaults, and thousands of random schedules in seconds."""

from __future__ import annotations

import random

import h2.events
import h2.settings
import pytest
from hyperframe import frame as frames

from h2keep.errors import PingTimeout
from h2keep.keepalive import Keepalive, PingPurpose
from h2keep.protocol import Connection, events
from support.pair import REQUEST, Pair, parse_frames

DEFAULT = Keepalive(jitter=0.0)


def test_k3_a_silent_request_is_kept_alive_for_half_an_hour() -> None:
    pair = Pair(DEFAULT)
    stream_id = pair.request()
    pair.run(1800.0)
    # Each answer begins a new silence, one round trip after its PING.
    assert pair.pings == [pytest.approx(0.02 + 30.0 + n * 30.02 + 0.01, abs=0.05) for n in range(len(pair.pings))]
    assert len(pair.pings) == 59
    pair.respond(stream_id, b"at last")
    pair.run(1.0)
    assert pair.client.read(stream_id, pair.now) == b"at last"
    assert pair.client.keepalive.rtt_smoothed == pytest.approx(0.02)


def test_k4_k8_a_black_hole_is_detected_within_the_promised_time_and_fails_all_streams() -> None:
    pair = Pair(DEFAULT)
    streams = [pair.request() for _ in range(3)]
    complete = pair.request()
    pair.run(1.0)
    pair.respond(complete, b"whole")
    pair.respond(streams[0], b"part", end_stream=False)
    pair.run(1.0)
    pair.black_hole()
    lost_since = pair.client.keepalive.last_life
    pair.run_until(lambda: pair.client.closed)
    assert pair.now - lost_since == pytest.approx(45.02, abs=0.01)
    for stream_id in streams:
        error = pair.failure(stream_id)
        assert isinstance(error, PingTimeout)
        assert not error.unprocessed
        assert error.last_life == lost_since
        assert error.ping_sent_at == pytest.approx(lost_since + 30.0)
        assert error.rtt == pytest.approx(0.02)
        assert "https://example.com" in str(error)
        assert "read_idle_timeout=30.0, ping_timeout=15.0" in str(error)
    assert len({id(pair.failure(stream_id)) for stream_id in streams}) == 3
    assert pair.failure(complete) is None
    assert pair.client.read(complete, pair.now) == b"whole"
    assert pair.client.read(streams[0], pair.now) == b"part"
    assert pair.client.next_deadline() is None


def test_k2_a_trickle_slower_than_any_frame_is_life() -> None:
    pair = Pair(Keepalive(read_idle_timeout=2.0, ping_timeout=1.0, jitter=0.0))
    stream_id = pair.request()
    pair.run(0.5)
    pair.respond(stream_id, b"x" * 100, end_stream=False)
    pair.run(0.5)
    pair.server.send_data(stream_id, b"y" * 100)
    raw = pair.server.data_to_send()
    for byte in raw:  # 109 bytes at one each 0.9 s: a frame takes 98 s
        pair.black_hole()
        pair.now += 0.9
        deadline = pair.client.next_deadline()
        pair._client_receives(bytes([byte]))
        if deadline is not None and deadline <= pair.now:
            pair.client.handle_timeout(pair.now)
        pair._drain_events()
    assert pair.failure(stream_id) is None
    assert pair.client.read(stream_id, pair.now) == b"x" * 100 + b"y" * 100


def test_k3_an_ack_that_matches_nothing_is_life_and_no_more() -> None:
    pair = Pair(Keepalive(read_idle_timeout=2.0, ping_timeout=1.0, jitter=0.0))
    pair.request()
    pair.run(0.5)
    pair.server_reads = False
    for _ in range(20):
        pair.run(0.9)
        pair.server_send_raw(b"\x00\x00\x08\x06\x01\x00\x00\x00\x00deadbeef")
    assert not pair.client.closed
    assert not pair.happened(events.PingAcknowledged)


def test_k3_pings_that_nobody_is_told_of_go_out_all_the_same() -> None:
    pair = Pair(Keepalive(read_idle_timeout=2.0, ping_timeout=1.0, jitter=0.0))
    pair.client.tells_of_pings = False
    pair.request()
    pair.run(9.0)
    assert pair.client.keepalive.pings_sent == pair.client.keepalive.pings_acked == 4
    assert not pair.happened(events.PingSent)
    assert not pair.happened(events.PingAcknowledged)


def test_k4_an_upload_that_progresses_is_given_more_time_but_not_for_ever() -> None:
    pair = Pair(Keepalive(read_idle_timeout=10.0, ping_timeout=5.0, jitter=0.0))
    pair.request(end_stream=False)
    pair.run(1.0)
    pair.black_hole()
    while not pair.client.closed:
        pair.client.note_upload_progress(pair.now)
        assert pair.step()
    # 10 s of silence, 5 s for the PING, 2 x 5 s for the upload.
    assert pair.now - pair.client.keepalive.last_life == pytest.approx(25.02, abs=0.1)


def test_k5_a_ping_goes_before_everything_that_waits() -> None:
    pair = Pair(Keepalive(read_idle_timeout=None))
    stream_id = pair.request(end_stream=False)
    pair.run(1.0)
    pair.client.send_data(stream_id, b"x" * 500_000, end_stream=False, now=pair.now)
    pair.client.send_request([(b":method", b"GET"), (b":path", b"/")], pair.now)
    pair.client.ping(pair.now)
    assert pair.client.data_to_send(16_384, pair.now)[3] == 6


def test_k5_bodies_take_turns() -> None:
    pair = Pair(Keepalive(read_idle_timeout=None))
    streams = [pair.request(end_stream=False) for _ in range(3)]
    pair.server.increment_flow_control_window(10_000_000)
    pair.run(1.0)
    for stream_id in streams:
        pair.client.send_data(stream_id, b"x" * 60_000, end_stream=True, now=pair.now)
    pair.pump()
    pair.run(1.0)
    order = [event.stream_id for event in pair.server_events if isinstance(event, h2.events.DataReceived)]
    assert order[:6] == streams * 2


def open_windows(pair: Pair, *streams: int) -> None:
    """Give the client all the credit that it can use, so that frames are of the size that it likes."""
    pair.run(1.0)
    pair.server.increment_flow_control_window(10_000_000)
    for stream_id in streams:
        pair.server.increment_flow_control_window(10_000_000, stream_id)
    pair.run(1.0)


def body_frames(pair: Pair, bodies: dict[int, bytes]) -> list[tuple[int, int]]:
    """Send bodies at once: the DATA frames' streams and lengths, in order."""
    open_windows(pair, *bodies)
    out: list[frames.Frame] = []
    pair.on_client_bytes = lambda data: out.extend(parse_frames(data))
    for stream_id, body in bodies.items():
        pair.client.send_data(stream_id, body, end_stream=True, now=pair.now)
    pair.run(1.0)
    assert sum(isinstance(event, h2.events.StreamEnded) for event in pair.server_events) == len(bodies)
    return [(frame.stream_id, len(frame.data)) for frame in out if isinstance(frame, frames.DataFrame)]


def larger_frames() -> Pair:
    """A pair whose server takes larger frames than it must."""
    pair = Pair(Keepalive(read_idle_timeout=None))
    pair.run(1.0)
    pair.server.update_settings({h2.settings.SettingCodes.MAX_FRAME_SIZE: 50_000})
    pair.pump()
    pair.run(1.0)
    return pair


def test_k5_a_body_that_is_alone_goes_out_in_frames_as_large_as_the_peer_takes() -> None:
    pair = larger_frames()
    stream_id = pair.request(end_stream=False)
    lengths = [length for _, length in body_frames(pair, {stream_id: bytes(range(256)) * 1_000})]
    assert sum(lengths) == 256_000
    assert max(lengths) == 50_000
    # No write is longer than it may be for their sake (K5), but for the frames' headers.
    assert lengths[0] + lengths[1] == pair.write_limit
    data = b"".join(event.data for event in pair.server_events if isinstance(event, h2.events.DataReceived))
    assert data == bytes(range(256)) * 1_000


def test_k5_bodies_that_take_turns_go_out_in_common_frames() -> None:
    pair = larger_frames()
    streams = [pair.request(end_stream=False) for _ in range(2)]
    sent = body_frames(pair, dict.fromkeys(streams, bytes(40_000)))
    assert [stream_id for stream_id, _ in sent[:4]] == streams * 2
    assert max(length for _, length in sent) == 16_384
    assert sum(length for _, length in sent) == 80_000


def test_k5_a_peer_that_takes_small_frames_again_gets_them() -> None:
    pair = larger_frames()
    pair.server.update_settings({h2.settings.SettingCodes.MAX_FRAME_SIZE: 16_384})
    pair.pump()
    pair.run(1.0)
    stream_id = pair.request(end_stream=False)
    assert max(length for _, length in body_frames(pair, {stream_id: bytes(100_000)})) == 16_384


def test_k5_pieces_to_send_are_what_data_to_send_joins() -> None:
    whole, cut = larger_frames(), larger_frames()
    joined, pieces = [], []
    for pair in whole, cut:
        stream_id = pair.request(end_stream=False)
        open_windows(pair, stream_id)
        pair.client.send_data(stream_id, random.Random(1).randbytes(300_000), end_stream=True, now=pair.now)
    while whole.client.has_data_to_send():
        joined.append(whole.client.data_to_send(200_000, whole.now))
        pieces.append(cut.client.pieces_to_send(200_000, cut.now))
    assert [b"".join(some) for some in pieces] == joined
    assert [len(some) for some in pieces] == [4, 2]
    assert {len(piece) for some in pieces for piece in some[:-1]} == {65_536}


def test_k10_a_cancelled_request_on_a_silent_connection_sends_a_ping_with_the_reset() -> None:
    pair = Pair(DEFAULT)
    pair.run(1.0)
    stream_id = pair.request()
    pair.black_hole()
    pair.run(5.0)
    slots = pair.client.free_slots
    pair.client.release(stream_id, pair.now)
    pair.pump()
    sent = [event for event in pair.happened(events.PingSent) if isinstance(event, events.PingSent)]
    assert [event.purpose for event in sent] == [PingPurpose.SUSPICION]
    assert not pair.client.verified(pair.now)
    assert pair.client.free_slots == slots  # the slot stays taken
    assert pair.client.prospective_slots == slots + 1


def test_k10_life_gives_the_slots_back() -> None:
    pair = Pair(DEFAULT)
    pair.run(1.0)
    stream_id = pair.request()
    pair.run(5.0)
    free = pair.client.free_slots
    pair.client.release(stream_id, pair.now)
    assert pair.client.free_slots == free
    pair.run(1.0)
    assert pair.client.verified(pair.now)
    assert pair.client.free_slots == free + 1


def test_k10_a_cancelled_request_on_a_lively_connection_changes_nothing() -> None:
    pair = Pair(DEFAULT)
    stream_id, other = pair.request(), pair.request()
    pair.run(5.0)
    pair.respond(other)
    pair.run(1.0)
    free = pair.client.free_slots
    pair.client.release(stream_id, pair.now)
    pair.run(1.0)
    assert not pair.happened(events.PingSent)
    assert pair.client.free_slots == free + 1


def test_k11_no_ping_without_a_request() -> None:
    pair = Pair(DEFAULT)
    pair.run(600.0)
    assert not pair.pings
    pair = Pair(Keepalive(while_idle=True))
    pair.run(600.0)
    assert len(pair.pings) >= 19


def test_k13_punishment_is_told_from_other_calls_for_calm() -> None:
    for data, pings, expected in [(b"too_many_pings", 0, True), (b"", 0, False), (b"", 2, True), (b"busy", 1, False)]:
        pair = Pair(DEFAULT)
        pair.request()
        pair.run(1.0 + 30.1 * pings)
        pair.server.close_connection(error_code=0xB, additional_data=data)
        pair.pump()
        pair.run(1.0)
        assert pair.client.goaway is not None
        assert pair.client.goaway.too_many_pings is expected


def test_k17_a_draining_connection_is_watched_until_its_last_stream_ends() -> None:
    pair = Pair(Keepalive(jitter=0.0, while_idle=True))
    stream_id = pair.request()
    pair.run(1.0)
    state = pair.server.state_machine.state
    pair.server.close_connection(last_stream_id=stream_id)
    pair.server.state_machine.state = state
    pair.pump()
    pair.run(100.0)
    assert len(pair.pings) == 3
    pair.respond(stream_id)
    pair.run(100.0)
    assert len(pair.pings) == 3


def test_k25_a_gap_makes_the_connection_unverified_until_it_answers() -> None:
    pair = Pair(DEFAULT)
    pair.run(1.0)
    assert pair.client.verified(pair.now)
    pair.client.note_gap(3600.0, pair.now)
    assert not pair.client.verified(pair.now)
    assert pair.client.verify(pair.now)
    pair.pump()
    pair.run(1.0)
    assert pair.client.verified(pair.now)
    pair.client.note_wall_jump()
    assert not pair.client.verified(pair.now)


def test_k9_a_connection_is_unverified_after_thirty_seconds_of_silence() -> None:
    pair = Pair(DEFAULT)
    pair.run(29.9)
    assert pair.client.verified(pair.now)
    pair.run(0.2)
    assert not pair.client.verified(pair.now)
    assert pair.client.verify(pair.now)
    assert pair.client.verify(pair.now)  # the outstanding one serves
    pair.run(1.0)
    assert pair.client.verified(pair.now)
    assert len(pair.pings) == 1


@pytest.mark.parametrize("batch", range(20))
def test_k4_k16_random_schedules(batch: int) -> None:
    """A network that dies, or doesn't, at a random moment under random traffic.

    Whatever happens before: a dead one is found within the promised time, and a living one never.
    """
    for seed in range(batch * 50, batch * 50 + 50):
        try:
            _play(random.Random(seed), seed)
        except AssertionError as error:
            error.add_note(f"in the schedule of seed {seed}")
            raise


def _play(choose: random.Random, seed: int) -> None:
    keepalive = Keepalive(
        read_idle_timeout=choose.choice([1.0, 10.0, 30.0]),
        ping_timeout=choose.choice([0.5, 5.0, 15.0]),
        while_idle=choose.random() < 0.3,
        jitter=choose.choice([0.0, 0.1, 0.5]),
    )
    assert keepalive.read_idle_timeout is not None
    # A round trip shorter than ping_timeout: a slower network is dead by definition.
    pair = Pair(keepalive, latency=choose.uniform(0.0, 0.2), seed=seed, chop=True)
    open_streams: list[int] = []
    for _ in range(choose.randint(1, 30)):
        action = choose.random()
        if action < 0.35 and len(open_streams) < 50:
            open_streams.append(pair.request())
        elif action < 0.5 and open_streams:
            stream_id = open_streams.pop(choose.randrange(len(open_streams)))
            pair.client.release(stream_id, pair.now)
            pair.pump()
        elif action < 0.6:
            pair.server.ping(b"12345678")
            pair.pump()
        elif action < 0.65:
            pair.client.ping(pair.now)
        elif action < 0.7:
            pair.client.verify(pair.now)
        elif action < 0.75:
            pair.client.note_gap(100.0, pair.now)
        pair.run(min(choose.choice([0.0, 0.1, 1.0, 20.0, 100.0]), 5 * keepalive.read_idle_timeout))
        assert not pair.client.closed
    assert not pair.client.keepalive.outstanding or pair.now - (pair.client.keepalive.last_ping_at or 0) < 0.5
    pair.request()
    began = pair.now
    pair.black_hole()
    pair.run_until(lambda: pair.client.closed)
    silence_began = max(pair.client.keepalive.last_life, pair.client.keepalive.ready_at)
    assert isinstance(pair.client.error, PingTimeout)
    bound = max(began, silence_began + keepalive.read_idle_timeout) + keepalive.ping_timeout + 0.021
    assert began < pair.now <= bound
    assert pair.now >= (pair.client.keepalive.last_ping_at or 0) + keepalive.ping_timeout


def _connection() -> Connection:
    connection = Connection(DEFAULT, random.Random(1), 0.0)
    connection.data_to_send(1 << 20, 0.0)
    return connection


def test_bytes_like_those_of_a_ping_ack_are_one_only_where_a_frame_may_begin() -> None:
    ack = frames.PingFrame(0, b"12345678", flags=["ACK"]).serialize()
    settings = frames.SettingsFrame(0).serialize()
    head = frames.HeadersFrame(1, data=b"\x88", flags=["END_HEADERS"]).serialize()
    data = frames.DataFrame(1, data=b"ab" + ack).serialize()
    connection = _connection()
    stream_id = connection.send_request(REQUEST, 0.0)
    connection.data_to_send(1 << 20, 0.0)
    for received in (settings, head, data[:11], ack, ack):
        connection.receive_data(received, 1.0)
    assert connection.read(stream_id, 1.0) == b"ab" + ack
    assert not connection.closed


def test_a_ping_ack_before_settings_or_within_a_header_block_ends_the_connection() -> None:
    ack = frames.PingFrame(0, b"12345678", flags=["ACK"]).serialize()
    connection = _connection()
    connection.receive_data(ack, 1.0)
    assert "its first frame is not SETTINGS" in str(connection.error)
    connection = _connection()
    connection.send_request(REQUEST, 0.0)
    connection.data_to_send(1 << 20, 0.0)
    for received in (frames.SettingsFrame(0).serialize(), frames.HeadersFrame(1, data=b"\x88").serialize(), ack):
        connection.receive_data(received, 1.0)
    assert "a header block was interrupted by another frame" in str(connection.error)
