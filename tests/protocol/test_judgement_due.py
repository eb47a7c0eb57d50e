"""Whether somebody may be found out of time: then, and then alone, the runner lets its reader run first (K7)."""

from __future__ import annotations

import random

from h2keep.keepalive import Keepalive
from h2keep.protocol import Connection
from support.pair import REQUEST

SETTINGS = b"\0\0\0\4\0\0\0\0\0"
PING = b"\0\0\x08\x06\0\0\0\0\0"


def opened(read_timeout: float | None = None) -> Connection:
    """A connection with a request on its way since 0.0, and its PING due at 30.0."""
    connection = Connection(Keepalive(jitter=0.0), random.Random(1), 0.0)
    connection.receive_data(SETTINGS, 0.0)
    stream_id = connection.send_request(REQUEST, 0.0, read_timeout=read_timeout)
    connection.data_to_send(65_536, 0.0)
    connection.await_data(stream_id, 0.0)
    return connection


def test_k7_a_ping_needs_no_readers_turn_but_its_judgement_does() -> None:
    connection = opened()
    assert connection.next_deadline() == 30.0
    assert not connection.judgement_due(30.0)
    connection.handle_timeout(30.0)
    assert connection.data_to_send(65_536, 30.0).startswith(PING)
    assert not connection.judgement_due(44.9)
    assert connection.judgement_due(45.0)


def test_k21_a_read_timeout_does_whatever_life_there_was() -> None:
    connection = opened(read_timeout=30.0)
    connection.note_life(10.0)
    assert not connection.judgement_due(29.9)
    assert connection.judgement_due(30.0)
    connection.handle_timeout(30.0)
    assert connection.open_streams == 0


def test_k23_so_does_output_that_has_not_moved_for_too_long() -> None:
    connection = opened()
    connection.note_life(1.0)
    connection.receive_data(PING + bytes(8), 1.0)
    # Life, so that nothing else is due.
    for now in (20.0, 40.0):
        connection.note_life(now)
        connection.handle_timeout(now)
    assert not connection.judgement_due(45.9)
    assert connection.judgement_due(46.0)
    connection.handle_timeout(46.0)
    assert connection.closed


def test_k17_nothing_is_due_on_a_closed_connection() -> None:
    connection = opened()
    connection.handle_timeout(30.0)
    connection.close(40.0)
    assert not connection.judgement_due(45.0)


def test_k21_who_sleeps_hears_of_a_deadline_that_comes_after_one_of_a_stream_that_is_over() -> None:
    connection = opened(read_timeout=5.0)
    connection.release(1, 1.0)
    # Nothing but the PING that is sent if a stream is open by then.
    assert connection.next_deadline() == 30.0
    connection.deadline_moved = False
    connection.send_request(REQUEST, 2.0, read_timeout=5.0)
    assert connection.deadline_moved
    assert connection.next_deadline() == 7.0
