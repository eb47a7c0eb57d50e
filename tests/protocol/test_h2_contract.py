"""What h2_engine.py relies on and h2 doesn't promise. Run these before widening the range in pyproject.toml."""

from __future__ import annotations

import inspect

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import h2.stream
import h2.utilities
import h2.windows
import hpack
import pytest
from hpack.table import HeaderTable
from hyperframe import frame as frames
from hypothesis import given
from hypothesis import strategies as st

from h2keep.protocol import h2_engine
from h2keep.protocol.hpack_memory import Decoder, Encoder

ENGINES = ["h2"]
State = h2.connection.ConnectionState
_NAMES = [b":path", b":method", b"authorization", b"cookie", b"a", b"b"]
_VALUES = [b"", b"/", b"GET", *(b"%d" % number for number in range(10)), b"x" * 30, b"y" * 300]
REQUEST = [(b":method", b"GET"), (b":authority", b"a"), (b":scheme", b"https"), (b":path", b"/")]


@pytest.fixture
def client() -> h2.connection.H2Connection:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
    connection.initiate_connection()
    connection.send_headers(1, REQUEST, end_stream=True)
    connection.data_to_send()
    return connection


def test_a_goaway_closes_the_state_machine_and_its_state_can_be_put_back(
    client: h2.connection.H2Connection,
) -> None:
    state = client.state_machine.state
    assert state is State.CLIENT_OPEN
    client.ping(b"12345678")
    client.receive_data(frames.GoAwayFrame(0, last_stream_id=1).serialize())
    assert client.state_machine.state is State.CLOSED
    assert client.data_to_send() == b""
    client.state_machine.state = state
    block = hpack.Encoder().encode([(b":status", b"200")])
    data = frames.HeadersFrame(1, data=block, flags=["END_HEADERS", "END_STREAM"]).serialize()
    assert [type(event) for event in client.receive_data(data)] == [
        h2.events.ResponseReceived,
        h2.events.StreamEnded,
    ]


def test_the_dispatch_table_turns_control_frames_into_replies_and_events(
    client: h2.connection.H2Connection,
) -> None:
    ping = frames.PingFrame(0)
    ping.opaque_data = b"12345678"
    replies, events = client._frame_dispatch_table[frames.PingFrame](ping)
    assert [type(event) for event in events] == [h2.events.PingReceived]
    assert [type(reply) for reply in replies] == [frames.PingFrame]
    client._prepare_for_sending(replies)
    assert client.data_to_send() == b"\0\0\x08\x06\x01\0\0\0\x0012345678"


def test_a_stream_takes_headers_and_data_directly(client: h2.connection.H2Connection) -> None:
    stream = client.streams[1]
    replies, events = stream.receive_headers([(b":status", b"200"), (b"content-length", b"3")], False, None)
    assert replies == []
    assert type(events[0]) is h2.events.ResponseReceived
    stream.receive_data(b"ab", False, 2)
    assert stream.inbound_flow_control_window == 65_535 - 2
    with pytest.raises(h2.exceptions.InvalidBodyLengthError):
        stream.receive_data(b"toolong", True, 7)


def test_a_stream_refuses_a_body_before_its_head(client: h2.connection.H2Connection) -> None:
    with pytest.raises(h2.exceptions.ProtocolError):
        client.streams[1].receive_data(b"ab", False, 2)


def test_streams_are_made_by_begin_new_stream_with_both_initial_windows() -> None:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    connection.local_settings = h2.settings.Settings(
        client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 100_000}
    )
    stream = connection._begin_new_stream(5, h2.connection.AllowedStreamIDs.ODD)
    assert connection.highest_outbound_stream_id == 5
    assert stream.inbound_flow_control_window == 100_000
    assert stream.outbound_flow_control_window == 65_535
    stream.state_machine.process_input(h2.stream.StreamInputs.SEND_HEADERS)
    stream.state_machine.process_input(h2.stream.StreamInputs.SEND_END_STREAM)
    assert stream.open
    assert not stream.closed


def test_a_stream_that_is_three_things_in_one_begins_as_h2_has_it() -> None:
    connection = h2.connection.H2Connection(h2_engine._CONFIG)
    connection.local_settings = h2.settings.Settings(
        client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 100_000}
    )
    theirs = connection._begin_new_stream(5, h2.connection.AllowedStreamIDs.ODD)
    theirs.request_method = b"GET"
    ours = h2_engine._Stream(5, b"GET", 100_000, 65_535)
    theirs.state_machine.process_input(h2.stream.StreamInputs.SEND_HEADERS)
    for part in (theirs, theirs.state_machine, theirs._inbound_window_manager):
        for name in vars(part).keys() - {"state_machine", "_inbound_window_manager", "max_outbound_frame_size"}:
            assert getattr(ours, name) == getattr(part, name), name
    assert ours.state_machine is ours
    assert ours._inbound_window_manager is ours


def test_the_three_share_no_name_but_one_that_the_state_machine_has_in_its_table_alone() -> None:
    parts = (h2.stream.H2Stream, h2.stream.H2StreamStateMachine, h2.windows.WindowManager)
    names = [name for part in parts for name in vars(part) if not name.startswith("__")]
    shared = {name for name in names if names.count(name) > 1}
    assert shared == {"stream_reset"}
    machine = h2.stream.H2StreamStateMachine
    assert machine.stream_reset in [function for function, _ in h2.stream._transitions.values()]
    methods = [method for method in vars(machine).values() if inspect.isfunction(method)]
    assert not any("stream_reset" in method.__code__.co_names for method in methods)


def test_a_closed_stream_says_how_it_was_closed(client: h2.connection.H2Connection) -> None:
    client.reset_stream(1)
    assert client.streams[1].closed
    assert client.streams[1].closed_by is h2.stream.StreamClosedBy.SEND_RST_STREAM


def test_the_connections_window_pays_for_data(client: h2.connection.H2Connection) -> None:
    client._inbound_flow_control_window_manager.window_consumed(65_535)
    client.increment_flow_control_window(10)
    client._inbound_flow_control_window_manager.window_consumed(10)
    with pytest.raises(h2.exceptions.FlowControlError):
        client._inbound_flow_control_window_manager.window_consumed(1)


@pytest.mark.parametrize(
    "fields",
    [
        [(b"server", b"x")],
        [(b":status", b"200"), (b":status", b"200")],
        [(b"a", b"b"), (b":status", b"200")],
        [(b":status", b"200"), (b"Upper", b"x")],
        [(b":status", b"200"), (b"a", b"x\r\n")],
        [(b":status", b"200"), (b"connection", b"x")],
        [(b":status", b"200"), (b":path", b"/")],
        [(b":status", b"200"), (b"", b"x")],
    ],
)
def test_validation_can_be_asked_for_directly(fields: list[tuple[bytes, bytes]]) -> None:
    flags = h2.utilities.HeaderValidationFlags(
        is_client=True, is_trailer=False, is_response_header=True, is_push_promise=False
    )
    with pytest.raises(h2.exceptions.ProtocolError):
        list(h2.utilities.validate_headers([hpack.HeaderTuple(*field) for field in fields], flags))


def test_headers_before_the_first_request_need_no_idle_state(client: h2.connection.H2Connection) -> None:
    fresh = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    fresh.initiate_connection()
    assert fresh.state_machine.state is State.IDLE
    fresh.state_machine.state = State.CLIENT_OPEN
    fresh.ping(b"12345678")
    fresh.increment_flow_control_window(1)
    fresh.receive_data(frames.SettingsFrame(0).serialize())


def test_hpack_tables_tell_of_every_change() -> None:
    encoder, plain = Encoder(), hpack.Encoder()
    decoder = Decoder(65_536)
    lists = [
        [(b":status", b"200"), (b"a", b"1")],
        [(b":status", b"200"), (b"a", b"1")],
        [(b":status", b"200"), (b"a", b"2")],
        [(b":status", b"200"), (b"a", b"1"), (b"cookie", b"short")],
        [(b":status", b"200"), (b"a", b"1"), (b"big", b"x" * 5_000)],
        [(b":status", b"200"), (b"a", b"1")],
    ]
    for round_ in range(3):
        for fields in lists:
            sensitive = [hpack.NeverIndexedHeaderTuple(*field) if field[0] == b"cookie" else field for field in fields]
            block = encoder.block(fields)
            assert block == plain.encode(sensitive, huffman=fields[-1][0] != b"big")
            assert [tuple(field) for field in decoder.fields(block).fields] == fields
        for table in (encoder, plain):
            table.header_table_size = 4_096 - 1_000 * round_
    assert isinstance(encoder.header_table, HeaderTable)


def test_equal_blocks_are_looked_up_only_while_the_table_stands_still() -> None:
    encoder, decoder = Encoder(), Decoder(65_536)
    fields = [(b":status", b"200"), (b"a", b"1")]
    first = encoder.block(fields)
    decoder.fields(first)
    block = encoder.block(fields)
    assert block != first
    known = decoder.fields(block)
    assert decoder.fields(block) is known
    assert encoder.block(fields) is block
    other = encoder.block([(b"b", b"2")])
    decoder.fields(other)
    assert encoder.block(fields) != block
    assert [tuple(field) for field in decoder.fields(encoder.block(fields)).fields] == fields


def test_a_peer_that_allows_a_huge_table_gets_a_small_one() -> None:
    encoder, decoder = Encoder(), Decoder(65_536)
    decoder.max_allowed_table_size = 1_000_000
    encoder.header_table_size = 1_000_000
    assert encoder.header_table_size == 4_096
    assert decoder.fields(encoder.block([(b"a", b"1")])).fields == [(b"a", b"1")]


def test_a_table_size_that_is_named_twice_is_announced_all_the_same() -> None:
    encoder, decoder = Encoder(), Decoder(65_536)
    fields = [(b"a", b"1"), (b"b", b"2")]
    assert decoder.fields(encoder.block(fields)).fields == fields
    encoder.header_table_size = encoder.header_table_size = 40
    assert decoder.fields(encoder.block(fields)).fields == fields
    decoder.max_allowed_table_size = 40
    assert decoder.header_table_size == 40
    assert decoder.fields(encoder.block(fields)).fields == fields


@pytest.mark.parametrize(
    ("sizes", "announced"),
    [
        ([4_096], []),
        ([65_536], []),
        ([100], [100]),
        ([100, 100], [100]),
        ([100, 4_096], [100, 4_096]),
        ([100, 50, 4_096, 200], [50, 200]),
        ([0, 65_536, 4_096], [0, 4_096]),
        ([200, 100, 0], [0]),
    ],
)
def test_the_smallest_and_the_last_size_of_the_table_are_announced(sizes: list[int], announced: list[int]) -> None:
    encoder, plain = Encoder(), hpack.Encoder()
    encoder.block([(b"a", b"1")])
    plain.encode([(b"a", b"1")])
    for size in sizes:
        encoder.header_table_size = size
    prefix = b"".join(
        bytes([hpack.hpack.encode_integer(size, 5)[0] | 0x20]) + bytes(hpack.hpack.encode_integer(size, 5)[1:])
        for size in announced
    )
    block = encoder.block([(b":status", b"200")])
    assert block == prefix + b"\x88"
    assert encoder.block([(b":status", b"200")]) == b"\x88"  # once


def _indexed(encoder: Encoder, decoder: Decoder, field: tuple[bytes, bytes]) -> bool:
    """Encode a block with the field in it; whether that put the field into the table."""
    before = encoder.header_table.changes
    fields = [(b":method", b"POST"), (b":path", b"/"), field, (b"user-agent", b"x")]
    assert decoder.fields(encoder.block(fields)).fields == fields
    assert decoder.header_table.dynamic_entries == encoder.header_table.dynamic_entries
    return encoder.header_table.changes > before


@pytest.mark.parametrize("name", [b":path", b"content-length", b"request-id"])
def test_values_that_never_come_again_are_soon_kept_out_of_the_table(name: bytes) -> None:
    encoder, decoder = Encoder(), Decoder(65_536)
    _indexed(encoder, decoder, (b"x", b"x"))
    indexed = [_indexed(encoder, decoder, (name, b"%d" % number)) for number in range(100)]
    assert indexed == [number < 3 or number % 32 == 0 for number in range(100)]
    assert len(encoder._blocks) <= 1
    assert not any(value.isdigit() for _, value in encoder._parts)


def test_values_that_do_come_again_find_their_way_into_the_table() -> None:
    encoder, decoder = Encoder(), Decoder(65_536)
    for number in range(50):
        _indexed(encoder, decoder, (b":path", b"/once/%d" % number))
    often = [(b":path", b"/often/%d" % number) for number in range(8)]
    for _ in range(20):
        for field in often:
            _indexed(encoder, decoder, field)
    assert not any(_indexed(encoder, decoder, field) for field in often)
    assert set(often) <= set(encoder.header_table.dynamic_entries)


def test_what_is_kept_out_of_the_table_leaves_what_is_known_as_it_is() -> None:
    encoder, decoder = Encoder(), Decoder(65_536)
    common = [(b":method", b"GET"), (b":path", b"/common")]
    for number in range(10):
        _indexed(encoder, decoder, (b":path", b"/once/%d" % number))
        block = encoder.block(common)
        assert decoder.fields(block).fields == common
    assert not _indexed(encoder, decoder, (b":path", b"/once/more"))
    assert encoder.block(common) is block


def test_what_the_encoder_remembers_is_bounded() -> None:
    encoder, decoder = Encoder(), Decoder(65_536)
    for number in range(2_000):
        fields = [(b"n%d" % number, b"x"), (b"authorization", b"%d" % number), (b"m", b"%d" % number)]
        assert decoder.fields(encoder.block(fields)).fields == fields
        fields = [(b"authorization", b"%d" % number)]
        assert decoder.fields(encoder.block(fields)).fields == fields
    for memory in (encoder._blocks, encoder._parts, encoder._untried, encoder._missed):
        assert len(memory) <= 256


@given(st.binary(max_size=200))
def test_strings_are_huffman_coded_as_by_hpack(data: bytes) -> None:
    assert Encoder().huffman_coder.encode(data) == hpack.Encoder().huffman_coder.encode(data)


@given(st.lists(st.lists(st.tuples(st.sampled_from(_NAMES), st.sampled_from(_VALUES)), max_size=5), max_size=40))
def test_a_decoder_understands_whatever_was_decided_about_the_table(blocks: list[list[tuple[bytes, bytes]]]) -> None:
    encoder, decoder = Encoder(), Decoder(65_536)
    encoder.header_table_size = decoder.max_allowed_table_size = 200
    for fields in blocks:
        assert decoder.fields(encoder.block(fields)).fields == fields
        assert decoder.header_table.dynamic_entries == encoder.header_table.dynamic_entries


@pytest.mark.parametrize("name", [b"authorization", b"proxy-authorization", b"cookie"])
def test_secrets_are_never_indexed(name: bytes) -> None:
    encoder, decoder = Encoder(), Decoder(65_536)
    fields = [(b":method", b"GET"), (name, b"Basic c2VjcmV0")]
    for _ in range(3):
        block = encoder.block(fields)
        decoded = decoder.fields(block).fields
        assert decoded == fields
        assert not decoded[1].indexable
    assert not encoder.header_table.dynamic_entries
    assert encoder.block(fields) is block  # yet remembered


def test_long_cookies_are_indexed() -> None:
    encoder = Encoder()
    encoder.block([(b"cookie", b"x" * 20)])
    assert list(encoder.header_table.dynamic_entries) == [(b"cookie", b"x" * 20)]


def test_long_blocks_are_not_remembered() -> None:
    decoder = Decoder(65_536)
    for length, remembered in ((900, True), (2_000, False)):
        block = hpack.Encoder().encode([hpack.NeverIndexedHeaderTuple(b"a", b"x" * length)], huffman=False)
        assert (decoder.fields(block) is decoder.fields(block)) is remembered


def test_huge_values_are_not_huffman_coded() -> None:
    encoder, decoder = Encoder(), Decoder(65_536)
    fields = [(b"a", b"x" * 60_000)]
    block = encoder.block(fields)
    assert len(block) > 60_000
    assert decoder.fields(block).fields == fields


def test_h2_tells_what_length_was_declared_and_what_came(client: h2.connection.H2Connection) -> None:
    stream = client.streams[1]
    stream.receive_headers([(b":status", b"200"), (b"content-length", b"3")], False, None)
    stream.receive_data(b"ab", False, 2)
    assert (stream._expected_content_length, stream._actual_content_length) == (3, 2)
    # This is why the engine looks itself.
    stream.receive_headers([(b"x", b"y")], True, None)
