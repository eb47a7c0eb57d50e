"""Late frames for streams that were reset: discarded, as long as these are remembered, and that is not for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hyperframe import frame as frames

from h2keep.errors import RemoteProtocolError
from h2keep.protocol.engine import ErrorCode, ResetStreams
from h2keep.protocol.engines import engine_named
from support.pair import REQUEST

if TYPE_CHECKING:
    from h2keep.protocol.engine import Engine

SETTINGS = b"\0\0\0\4\0\0\0\0\0"


class Silent:
    """A handler that counts what is discarded."""

    def __init__(self) -> None:
        self.discarded = 0

    def on_discarded(self, flow_length: int) -> None:
        self.discarded += flow_length

    def on_response(self, stream_id: int, status: int, headers: object, end_stream: bool) -> None:
        assert end_stream

    def on_settings(self) -> None:
        """Of no interest."""

    def on_reply_queued(self) -> None:
        """Of no interest."""


@pytest.fixture
def handler() -> Silent:
    return Silent()


@pytest.fixture
def codec(engine: str, handler: Silent) -> Engine:
    codec = engine_named(engine)(handler, initial_window=65_535, connection_window=65_536)  # type: ignore[arg-type]
    codec.receive(SETTINGS)
    return codec


def test_late_frames_are_discarded(codec: Engine, handler: Silent) -> None:
    codec.send_request(1, REQUEST, end_stream=True)
    codec.send_reset(1, ErrorCode.CANCEL)
    codec.receive(frames.DataFrame(1, data=b"late").serialize())
    assert handler.discarded == 4


def test_only_so_many_are_remembered(codec: Engine, handler: Silent) -> None:
    last = 2 * ResetStreams._MOST + 1
    for stream_id in range(1, last + 2, 2):
        codec.send_request(stream_id, REQUEST, end_stream=True)
        codec.send_reset(stream_id, ErrorCode.CANCEL)
    codec.receive(frames.DataFrame(3, data=b"late").serialize())
    codec.receive(frames.DataFrame(last, data=b"late").serialize())
    assert handler.discarded == 8
    with pytest.raises(RemoteProtocolError, match="stream 1 after its end"):
        codec.receive(frames.DataFrame(1, data=b"much too late").serialize())


def test_streams_that_ended_in_good_order_are_not_remembered(codec: Engine, handler: Silent) -> None:
    codec.send_request(1, REQUEST, end_stream=True)
    codec.receive(frames.HeadersFrame(1, data=b"\x88", flags=["END_HEADERS", "END_STREAM"]).serialize())
    with pytest.raises(RemoteProtocolError, match="stream 1 after its end"):
        codec.receive(frames.DataFrame(1, data=b"nonsense").serialize())
    assert handler.discarded == 0
