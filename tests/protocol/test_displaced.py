"""Requests that the peer's limit turns out to have no room for, before they have left."""

from __future__ import annotations

import h2.events
import h2.settings

from h2keep.keepalive import Keepalive
from support.pair import REQUEST, Pair

Codes = h2.settings.SettingCodes
OFF = Keepalive(read_idle_timeout=None)


def allow(pair: Pair, streams: int) -> None:
    pair.server.update_settings({Codes.MAX_CONCURRENT_STREAMS: streams})
    pair.pump()
    pair.run(0.1)


def received(pair: Pair) -> list[int | None]:
    return [event.stream_id for event in pair.server_events if isinstance(event, h2.events.RequestReceived)]


def test_they_are_the_youngest_that_have_not_left() -> None:
    pair = Pair(OFF)
    sent = [pair.request() for _ in range(3)]
    pair.run(0.1)
    pair.blocked = True
    waiting = [pair.client.send_request(list(REQUEST), pair.now) for _ in range(5)]
    assert pair.client.displaced() == []
    allow(pair, 5)
    assert pair.client.displaced() == waiting[2:]
    # Not those that have left, however low the limit.
    allow(pair, 0)
    assert pair.client.displaced() == waiting
    for stream_id in pair.client.displaced():
        pair.client.release(stream_id, pair.now)
    assert pair.client.displaced() == []
    assert pair.client.free_slots == -3
    pair.blocked = False
    pair.run(0.1)
    assert received(pair) == sent
    # As if they had never been: room comes with the limit, and whoever has it is sent.
    allow(pair, 4)
    assert pair.client.free_slots == 1
    last = pair.request()
    pair.run(0.1)
    assert received(pair) == [*sent, last]


def test_until_the_peer_has_said_so_as_many_streams_are_allowed_as_are_assumed() -> None:
    pair = Pair(OFF, settings={Codes.MAX_CONCURRENT_STREAMS: 7})
    assert pair.client.free_slots == 100
    pair.client.max_streams = 3
    assert pair.client.free_slots == 3
    pair.client.max_streams = 0
    assert pair.client.free_slots == 0
    pair.run(0.1)
    assert pair.client.free_slots == 7
