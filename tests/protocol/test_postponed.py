"""Whether life has put off everything that was due: then the runner needn't let its reader run first (K7)."""

from __future__ import annotations

import random

from h2keep.keepalive import Keepalive
from h2keep.protocol import Connection
from support.pair import REQUEST

SETTINGS = b"\0\0\0\4\0\0\0\0\0"


def opened(read_timeout: float | None = None) -> Connection:
    """A connection with a request on its way since 0.0, and its PING due at 30.0."""
    connection = Connection(Keepalive(jitter=0.0), random.Random(1), 0.0)
    connection.receive_data(SETTINGS, 0.0)
    stream_id = connection.send_request(REQUEST, 0.0, read_timeout=read_timeout)
    connection.data_to_send(65_536, 0.0)
    connection.await_data(stream_id, 0.0)
    return connection


def test_k7_life_postpones_a_ping() -> None:
    connection = opened()
    assert connection.next_deadline() == 30.0
    connection.note_life(10.0)
    assert connection.postponed(30.0)
    assert connection.next_deadline() == 40.0
    assert not connection.postponed(40.0)


def test_k21_but_not_a_read_timeout_which_is_judged_after_the_readers_turn() -> None:
    connection = opened(read_timeout=30.0)
    connection.note_life(10.0)
    assert not connection.postponed(30.0)
    connection.handle_timeout(30.0)
    assert connection.open_streams == 0


def test_k17_nothing_is_due_on_a_closed_connection() -> None:
    connection = opened()
    connection.note_life(10.0)
    connection.close(20.0)
    assert not connection.postponed(30.0)
