"""Frames as bytes: DATA frames that come together."""

from __future__ import annotations

from hyperframe import frame as frames

from h2keep.protocol.framing import data_run


def run_of(*following: bytes, room: int = 1_000) -> tuple[bytes, int]:
    """What is taken of a frame and those that follow it, and how many bytes of the latter."""
    before, first = b"before", data(1, b"first ")
    joined = b"".join([before, first, *following])
    body, end = data_run(joined, len(before), len(before) + len(first), room)
    return body, end - len(before) - len(first)


def data(stream_id: int, body: bytes, *flags: str) -> bytes:
    return frames.DataFrame(stream_id, body, flags=flags).serialize()


def test_a_frame_that_is_alone_is_all() -> None:
    assert run_of() == (b"first ", 0)
    assert run_of(b"\0\0\1") == (b"first ", 0)


def test_frames_of_the_same_kind_are_taken_together() -> None:
    second, third = data(1, b"second "), data(1, b"third")
    assert run_of(second, third) == (b"first second third", len(second + third))


def test_whatever_differs_ends_the_run() -> None:
    second = data(1, b"second")
    for other in (
        data(3, b"another stream's"),
        data(1, b"the last", "END_STREAM"),
        data(1, b"padded", "PADDED"),
        data(1, b""),
        frames.RstStreamFrame(1).serialize(),
    ):
        assert run_of(second, other, second) == (b"first second", len(second))
    for length in range(len(second)):
        assert run_of(second, second[:length]) == (b"first second", len(second))


def test_no_more_is_taken_than_there_is_room_for() -> None:
    second, third = data(1, b"second"), data(1, b"third")
    assert run_of(second, third, room=17) == (b"first secondthird", len(second + third))
    assert run_of(second, third, room=16) == (b"first second", len(second))
    assert run_of(second, third, room=0) == (b"first ", 0)
