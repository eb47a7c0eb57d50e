"""What ngh2_blocks.py relies on and ngh2 doesn't promise. Run these before widening the range in pyproject.toml."""

from __future__ import annotations

from typing import Any

import hpack
import ngh2
import pytest
from hyperframe import frame as frames

from h2keep.protocol import ngh2_blocks
from support.pair import REQUEST, parse_frames

ENGINES = ["ngh2"]
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


def parsed(data: bytes) -> list[Any]:
    return parse_frames(data)


def head(
    stream_id: int, *fields: tuple[bytes, bytes], end: bool = False, encoder: hpack.Encoder | None = None
) -> bytes:
    block = (encoder or hpack.Encoder()).encode(fields)
    return frames.HeadersFrame(stream_id, data=block, flags=["END_HEADERS", "END_STREAM"][: 1 + end]).serialize()


OK = (b":status", b"200")


@pytest.fixture
def session() -> ngh2.Connection:
    session = ngh2.Connection(ngh2.Role.CLIENT, ngh2_blocks._CONFIGURATION)
    session.initiate_connection(ngh2_blocks._SETTINGS_WITHIN)
    session.set_local_window_size(2**31 - 1)
    session.data_to_send()
    session.receive_data(SETTINGS + b"\0\0\0\x04\1\0\0\0\0")
    session.data_to_send()
    session.events()
    return session


def test_our_settings_are_in_force_once_they_are_acknowledged(session: ngh2.Connection) -> None:
    assert not session.want_write
    assert session.local_settings[4] == session.local_window_size == 2**31 - 1
    assert session.local_settings[5] == 2**24 - 1
    session.send_request(REQUEST, end_stream=True)
    session.data_to_send()
    assert session.stream_local_window_size(1) == 2**31 - 1


def test_the_peers_limit_of_streams_is_not_known_within(session: ngh2.Connection) -> None:
    for _ in range(300):
        session.send_request(REQUEST, end_stream=True)
    assert len(parsed(session.data_to_send())) == 300


def test_a_request_that_is_cancelled_at_once_uses_up_its_id_and_nothing_else(session: ngh2.Connection) -> None:
    decoder = hpack.Decoder()
    session.receive_data(SETTINGS[:2] + b"\6\4\0\0\0\0\0\0\1\0\0\0\x40")  # HEADER_TABLE_SIZE, to be announced
    session.data_to_send()
    assert session.send_request([(b":method", b"GET"), (b"never", b"encoded")], end_stream=True) == 1
    session.reset_stream(1)
    assert session.data_to_send() == b""
    assert session.send_request(REQUEST, end_stream=True) == 3
    (frame,) = parsed(session.data_to_send())
    assert frame.stream_id == 3
    decoder.max_allowed_table_size = 64
    assert decoder.decode(frame.data, raw=True) == REQUEST
    assert decoder.header_table_size == 64


def test_a_request_that_ends_with_its_head_is_one_flag_from_one_that_does_not(session: ngh2.Connection) -> None:
    session.send_request(REQUEST, end_stream=True)
    (frame,) = parsed(session.data_to_send())
    assert set(frame.flags) == {"END_HEADERS", "END_STREAM"}
    assert not session.want_write


def test_a_message_is_one_event_and_an_end_is_others(session: ngh2.Connection) -> None:
    encoder = hpack.Encoder()
    session.send_request(REQUEST, end_stream=True)
    session.data_to_send()
    for raw, kind in (
        (head(1, (b":status", b"103"), encoder=encoder), ngh2.InformationalResponseReceived),
        (head(1, OK, encoder=encoder), ngh2.ResponseReceived),
        (head(1, (b"a", b"b"), end=True, encoder=encoder), ngh2.TrailersReceived),
    ):
        session.receive_data(raw)
        assert [type(event) for event in session.events() if type(event) is not ngh2.StreamClosed] == [kind]
        assert not session.want_write


def test_an_objection_to_a_stream_is_no_event_and_a_reset_to_be_sent(session: ngh2.Connection) -> None:
    session.send_request(REQUEST, end_stream=True)
    session.data_to_send()
    session.receive_data(head(1, OK, (b"Upper", b"case")))
    assert session.events() == []
    assert session.want_write
    (reset,) = parsed(session.data_to_send())
    assert isinstance(reset, frames.RstStreamFrame)


def test_a_reset_ends_a_stream_in_any_state_without_an_answer(session: ngh2.Connection) -> None:
    encoder = hpack.Encoder()
    reset = frames.RstStreamFrame(1, error_code=8)
    for stream_id, raw in ((1, b""), (3, head(3, OK, encoder=encoder)), (5, head(5, OK, end=True, encoder=encoder))):
        session.send_request(REQUEST, end_stream=True)
        session.data_to_send()
        session.receive_data(raw)
        session.events()
        reset.stream_id = stream_id
        for _ in range(2):
            session.receive_data(reset.serialize())
            session.events()
            assert not session.want_write
        session.receive_data(head(stream_id, OK, encoder=encoder))
        assert session.events() == []
        assert not session.want_write


def test_trailers_come_after_the_declared_length_only(session: ngh2.Connection) -> None:
    """This is why a body is pretended then."""
    for stream_id, length in ((1, 2), (3, 3)):
        encoder = hpack.Encoder()
        session.send_request(REQUEST, end_stream=True)
        session.data_to_send()
        session.receive_data(head(stream_id, OK, (b"content-length", b"3"), encoder=encoder))
        session.receive_data(frames.DataFrame(stream_id, data=b"x" * length).serialize())
        session.events()
        session.receive_data(head(stream_id, (b"a", b"b"), end=True))
        assert (ngh2.TrailersReceived in [type(event) for event in session.events()]) is (length == 3)
        session.data_to_send()
        session.events()


def test_a_violation_is_a_goaway_with_its_code(session: ngh2.Connection) -> None:
    session.send_request(REQUEST, end_stream=True)
    session.data_to_send()
    session.receive_data(b"\0\0\1\1\4\0\0\0\1\xff")
    assert session.events() == []
    (goaway,) = parsed(session.data_to_send())
    assert isinstance(goaway, frames.GoAwayFrame)
    assert goaway.error_code == 9


def test_too_many_fields_are_an_exception(session: ngh2.Connection) -> None:
    session.send_request(REQUEST, end_stream=True)
    session.data_to_send()
    with pytest.raises(ngh2.DenialOfServiceError):
        session.receive_data(head(1, OK, *[(b"a", b"")] * 2_000))


def test_late_headers_pass_through_hpack_in_any_number(session: ngh2.Connection) -> None:
    encoder = hpack.Encoder()
    session.send_request(REQUEST, end_stream=True)
    session.send_request(REQUEST, end_stream=True)
    session.data_to_send()
    session.reset_stream(1)
    session.data_to_send()
    session.events()
    for number in range(20_000):  # its own limit, by the clock, is 10,000
        session.receive_data(head(1, OK, (b"late", b"%d" % (number // 2_000)), encoder=encoder))
        assert not session.want_write
    assert session.events() == []
    session.receive_data(head(3, OK, (b"late", b"9"), encoder=encoder))
    (event,) = session.events()
    assert isinstance(event, ngh2.ResponseReceived)
    assert event.headers == (OK, (b"late", b"9"))


@pytest.mark.parametrize(
    ("field", "never_indexed"),
    [
        ((b"authorization", b"Basic c2VjcmV0"), True),
        ((b"cookie", b"x" * 19), True),
        ((b"cookie", b"x" * 20), False),
        ((b"x-api-key", b"1"), False),
    ],
)
def test_secrets_are_never_indexed(session: ngh2.Connection, field: tuple[bytes, bytes], never_indexed: bool) -> None:
    session.send_request([*REQUEST, field], end_stream=True)
    (frame,) = parsed(session.data_to_send())
    decoded = hpack.Decoder().decode(frame.data, raw=True)
    assert decoded == [*REQUEST, field]
    assert isinstance(decoded[-1], hpack.NeverIndexedHeaderTuple) is never_indexed


def test_a_head_of_any_length_is_sent(session: ngh2.Connection) -> None:
    fields = [*REQUEST, (b"long", b"\xff" * 1_000_000)]
    session.send_request(fields, end_stream=True)
    parts = parsed(session.data_to_send())
    assert [type(part) for part in parts[:2]] == [frames.HeadersFrame, frames.ContinuationFrame]
    assert max(len(part.data) for part in parts) <= 16_384
    assert hpack.Decoder(2**21).decode(b"".join(part.data for part in parts), raw=True) == fields


def test_only_versions_that_are_known_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.3.0", "0.3.99"):
        monkeypatch.setattr(ngh2, "__version__", version)
        ngh2_blocks._check_version()
    for version in ("0.2.9", "0.4.0", "1.0.0"):
        monkeypatch.setattr(ngh2, "__version__", version)
        with pytest.raises(ImportError, match=rf"works with ngh2 0\.3, not with {version}"):
            ngh2_blocks._check_version()
