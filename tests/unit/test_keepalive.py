"""The rules of keepalive.py one by one, on a clock of plain numbers: K1-K4, K7, K9-K11, K13-K17, K20, K25.

Unless a test says otherwise there is no jitter, read_idle_timeout is 30 s and ping_timeout 15 s, the connection became
ready at 0.0, and one stream is open: the PING is due at 30, its deadline at 45, the loss at 45.02.
"""

from __future__ import annotations

import dataclasses
import dis
import math
import random
import re
from typing import Any

import pytest

from h2keep.keepalive import IntervalMemory, Keepalive, KeepaliveTimer, PingPurpose, Verdict

NOTHING, SEND_PING, LOST = Verdict.NOTHING, Verdict.SEND_PING, Verdict.LOST

PLAIN = Keepalive(jitter=0.0)
OFF = Keepalive(read_idle_timeout=None)
STEP = 0.02


class Scripted:
    """A random source that hands out the fractions given, the last one for ever, and numbered payloads."""

    def __init__(self, *fractions: float) -> None:
        self.fractions = list(fractions)
        self.draws = 0
        self.payloads = 0

    def random(self) -> float:
        self.draws += 1
        return self.fractions.pop(0) if len(self.fractions) > 1 else self.fractions[0]

    def randbytes(self, n: int, /) -> bytes:
        self.payloads += 1
        return self.payloads.to_bytes(n, "big")


def make(policy: Keepalive = PLAIN, *fractions: float, streams: int = 1, now: float = 0.0) -> KeepaliveTimer:
    timer = KeepaliveTimer(policy, Scripted(*fractions or (0.0,)), now)
    for _ in range(streams):
        timer.note_stream_opened()
    return timer


def pinged(policy: Keepalive = PLAIN) -> KeepaliveTimer:
    """A timer whose first PING of K3 was sent at 30."""
    timer = make(policy)
    assert timer.handle_timeout(30.0) is SEND_PING
    return timer


def about(number: float) -> Any:
    return pytest.approx(number, abs=1e-9)


def verdicts(timer: KeepaliveTimer, *, until: float = math.inf) -> list[tuple[float, Verdict]]:
    """Handle every deadline exactly on time; what came of it, NOTHING left out."""
    told = []
    while (deadline := timer.next_deadline()) is not None and deadline <= until:
        verdict = timer.handle_timeout(deadline)
        if verdict is not NOTHING:
            told.append((deadline, verdict))
    return told


# K1: policy


def test_k1_defaults() -> None:
    assert dataclasses.astuple(Keepalive()) == (30.0, 15.0, False, 0.1)


@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_k1_a_time_that_never_comes_may_be_as_long_as_floats_are(jitter: float) -> None:
    timer = make(Keepalive(read_idle_timeout=1e308, ping_timeout=1e308, jitter=jitter))
    assert timer.handle_timeout(1e9) is NOTHING
    timer.note_life(1e9)
    deadline = timer.next_deadline()
    assert deadline is not None
    assert deadline > 9e11
    assert timer.handle_timeout(deadline) is NOTHING
    timer.use_interval(1.5e308)
    assert timer.interval == 1.5e308


def test_k1_policy_is_frozen() -> None:
    policy = Keepalive()
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.ping_timeout = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("field", ["read_idle_timeout", "ping_timeout", "jitter", "while_idle"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5, "10", b"", 1j, [1], 10**400])
def test_k1_nonsense_is_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} .*{re.escape(repr(value))}$"):
        Keepalive(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("read_idle_timeout", 0),
        ("read_idle_timeout", 0.0),
        ("read_idle_timeout", True),
        ("ping_timeout", 0),
        ("ping_timeout", None),
        ("ping_timeout", True),
        ("jitter", 1),
        ("jitter", 1.0),
        ("jitter", None),
        ("jitter", False),
        ("while_idle", None),
        ("while_idle", 1),
        ("while_idle", 0.1),
    ],
)
def test_k1_what_one_field_admits_another_may_not(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} .*{re.escape(repr(value))}$"):
        Keepalive(**{field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"read_idle_timeout": None},
        {"read_idle_timeout": 1},
        {"read_idle_timeout": 1e-3, "ping_timeout": 1e9},
        {"jitter": 0},
        {"jitter": 0.999},
        {"while_idle": True},
    ],
)
def test_k1_sensible_values_are_taken(fields: dict[str, Any]) -> None:
    policy = Keepalive(**fields)
    assert {name: getattr(policy, name) for name in fields} == fields


def test_k1_none_switches_keepalive_off() -> None:
    timer = make(Keepalive(read_idle_timeout=None, while_idle=True))
    assert timer.interval is None
    assert timer.next_deadline() is None
    assert timer.handle_timeout(1e6) is NOTHING
    timer.note_gap(3600.0, 1e6)
    assert timer.verified(1e6)
    assert not timer.ping_for_checkout(1e6)
    assert not timer.ping_for_suspicion(0.0, 1e6)
    assert timer.verified(1e6)
    timer.use_interval(10.0)
    assert timer.interval is None
    assert timer.next_deadline() is None
    assert timer.pings_sent == 0


# K2: life


@pytest.mark.parametrize("at", [30.0, 31.0, 44.999, 45.0])
def test_k2_any_life_answers_a_ping(at: float) -> None:
    timer = pinged()
    assert timer.outstanding
    timer.note_life(at)
    assert not timer.outstanding
    assert timer.handle_timeout(45.0) is NOTHING
    assert timer.next_deadline() == at + 30.0


def test_k2_life_of_the_moment_before_a_ping_does_not_answer_it() -> None:
    timer = make()
    timer.note_life(30.0)
    assert timer.ping_for_user(30.0)
    assert timer.outstanding
    timer.note_life(30.0)
    assert not timer.outstanding


def test_k2_nothing_else_is_life() -> None:
    timer = pinged()
    timer.note_progress()
    timer.note_stream_opened()
    timer.note_stream_closed()
    timer.note_rtt(0.1)
    assert timer.note_ping_ack(timer.payload, 31.0) == 1.0
    timer.note_going_away()
    assert timer.outstanding
    assert verdicts(timer) == [(45.0 + STEP, LOST)]


# K3: PING


def test_k3_silence_brings_one_ping() -> None:
    timer = make()
    assert timer.next_deadline() == 30.0
    assert timer.handle_timeout(30.0) is SEND_PING
    assert timer.payload == (1).to_bytes(8, "big")
    assert (timer.pings_sent, timer.last_ping_at, timer.last_ping_purpose) == (1, 30.0, PingPurpose.IDLE)
    assert timer.next_deadline() == 45.0
    assert timer.handle_timeout(30.0) is NOTHING


def test_k3_early_and_spurious_calls_change_nothing() -> None:
    timer = make()
    for now in (0.0, 15.0, 29.999):
        assert timer.handle_timeout(now) is NOTHING
        assert timer.next_deadline() == 30.0
    timer.handle_timeout(30.0)
    for now in (30.0, 44.999):
        assert timer.handle_timeout(now) is NOTHING
        assert timer.next_deadline() == 45.0


def test_k7_what_life_put_off_and_what_asks_for_a_ping_need_no_readers_turn() -> None:
    timer = make()
    timer.note_life(10.0)
    assert not timer.judgement_due(30.0)
    assert timer.handle_timeout(30.0) is NOTHING
    assert timer.next_deadline() == 40.0
    assert not timer.judgement_due(40.0)
    assert timer.handle_timeout(40.0) is SEND_PING
    # The PING was answered, and another is not due yet.
    timer.note_life(40.1)
    assert not timer.judgement_due(55.0)
    assert timer.handle_timeout(55.0) is NOTHING
    assert timer.next_deadline() == about(70.1)


def test_k7_both_steps_of_judgement_need_the_readers_turn() -> None:
    timer = pinged()
    assert not timer.judgement_due(44.99)
    assert timer.judgement_due(45.0)
    assert timer.handle_timeout(45.0) is NOTHING
    assert not timer.judgement_due(45.0)
    assert timer.judgement_due(45.0 + STEP)
    # So it would, had nothing come.
    timer.note_life(45.01)
    assert not timer.judgement_due(45.0 + STEP)


def test_k7_after_a_stall_a_ping_waits_for_the_readers_turn_too() -> None:
    timer = make()
    assert not timer.judgement_due(30.5)
    assert timer.judgement_due(30.6)
    timer.note_life(30.6)
    assert timer.handle_timeout(30.6) is NOTHING


def test_k11_on_an_unused_connection_there_is_nothing_to_judge() -> None:
    timer = make(streams=0)
    timer.note_life(10.0)
    assert not timer.judgement_due(1e6)
    assert timer.next_deadline() is None


def test_k3_silence_is_measured_from_the_last_life() -> None:
    timer = make()
    timer.note_life(10.0)
    timer.note_life(20.0)
    assert verdicts(timer, until=50.0) == [(50.0, SEND_PING)]


@pytest.mark.parametrize("ready", [0.0, -100.0, 1e6])
def test_k3_silence_begins_when_the_connection_is_ready(ready: float) -> None:
    timer = make(now=ready)
    assert (timer.ready_at, timer.last_life) == (ready, ready)
    assert verdicts(timer, until=ready + 30.0) == [(ready + 30.0, SEND_PING)]


def test_k3_each_silence_has_its_ping() -> None:
    timer = make()
    for round_number in range(5):
        at = 30.0 + 31.0 * round_number
        assert verdicts(timer, until=at + 1.0) == [(at, SEND_PING)]
        timer.note_life(at + 1.0)
    assert timer.pings_sent == 5


def test_k3_is_not_late_after_a_ping_of_long_patience() -> None:
    timer = pinged(Keepalive(jitter=0.0, ping_timeout=100.0))
    timer.note_life(31.0)
    assert verdicts(timer, until=61.0) == [(61.0, SEND_PING)]


def test_k3_is_not_late_for_a_stream_opened_under_a_ping_of_long_patience() -> None:
    timer = make(Keepalive(jitter=0.0, ping_timeout=100.0), streams=0)
    timer.ping_for_user(50.0)
    assert timer.next_deadline() == 150.0
    timer.note_stream_opened()
    timer.note_life(51.0)
    assert verdicts(timer, until=81.0) == [(81.0, SEND_PING)]


def test_k3_an_ack_gives_the_round_trip_once() -> None:
    timer = pinged()
    timer.note_life(30.25)
    assert timer.note_ping_ack(timer.payload, 30.25) == 0.25
    assert timer.note_ping_ack(timer.payload, 30.5) is None
    assert (timer.pings_acked, timer.rtt_last) == (1, 0.25)


def test_k3_other_life_before_the_ack_does_not_hide_it() -> None:
    timer = pinged()
    timer.note_life(31.0)
    timer.handle_timeout(45.0)
    assert timer.note_ping_ack(timer.payload, 46.0) == 16.0


def test_k3_an_ack_that_matches_nothing_is_ignored() -> None:
    timer = make()
    assert timer.note_ping_ack(b"", 1.0) is None
    timer.ping_for_user(1.0)
    overtaken = timer.payload
    assert timer.note_ping_ack(b"\0" * 8, 1.5) is None
    timer.note_life(2.0)
    timer.ping_for_user(3.0)
    assert timer.note_ping_ack(overtaken, 4.0) is None
    assert (timer.pings_acked, timer.rtt_last) == (0, None)
    assert timer.outstanding


def test_k3_a_users_ping_joins_the_outstanding_one() -> None:
    timer = pinged()
    assert not timer.ping_for_user(31.0)
    assert (timer.pings_sent, timer.last_ping_purpose) == (1, PingPurpose.IDLE)


def test_k3_waits_while_a_users_ping_is_outstanding() -> None:
    timer = make()
    assert timer.ping_for_user(29.0)
    assert timer.next_deadline() == 44.0
    assert verdicts(timer) == [(44.0 + STEP, LOST)]
    assert (timer.pings_sent, timer.last_ping_purpose) == (1, PingPurpose.USER)


# K4: loss


def test_k4_a_dead_connection_is_found() -> None:
    assert verdicts(make()) == [(30.0, SEND_PING), (45.0 + STEP, LOST)]


@pytest.mark.parametrize("policy", [PLAIN, OFF], ids=["on", "off"])
def test_k4_applies_to_a_users_ping(policy: Keepalive) -> None:
    timer = make(policy, streams=0)
    assert timer.ping_for_user(0.0)
    assert (timer.last_ping_at, timer.outstanding, timer.next_deadline()) == (0.0, True, 15.0)
    assert verdicts(timer) == [(15.0 + STEP, LOST)]


def test_k4_a_users_ping_that_is_answered_leaves_no_deadline_with_keepalive_off() -> None:
    timer = make(OFF)
    timer.ping_for_user(5.0)
    timer.note_life(6.0)
    assert verdicts(timer) == []
    assert timer.next_deadline() is None


def test_k4_after_the_loss_all_is_over() -> None:
    timer = make()
    verdicts(timer)
    assert timer.next_deadline() is None
    assert not timer.outstanding
    assert timer.handle_timeout(1e6) is NOTHING
    assert not timer.ping_for_user(1e6)


@pytest.mark.parametrize(
    ("looks", "lost_at"),
    [
        ([], 45.0),
        ([31.0], 46.0),
        ([45.0], 60.0),
        ([45.0, 60.0], 75.0),
        ([45.0, 60.0, 75.0], 75.0),
        ([31.0, 46.0, 61.0, 75.0], 75.0),
        ([30.0], 45.0),
        ([float(second) for second in range(30, 76)], 75.0),
    ],
)
def test_k4_upload_progress_moves_the_deadline_by_no_more_than_two_timeouts(looks: list[float], lost_at: float) -> None:
    timer = pinged()
    for look in looks:
        assert verdicts(timer, until=look - 0.5) == []
        timer.note_upload_progress(look)
    assert verdicts(timer) == [(about(lost_at + STEP), LOST)]


def test_k4_upload_progress_counts_while_judging() -> None:
    timer = pinged()
    timer.handle_timeout(45.0)
    timer.note_upload_progress(45.01)
    assert timer.next_deadline() == about(60.01)
    assert timer.handle_timeout(45.0 + STEP) is NOTHING
    assert verdicts(timer) == [(about(60.01 + STEP), LOST)]


def test_k4_upload_progress_without_allowance_does_not_end_judgement() -> None:
    timer = pinged()
    timer.note_upload_progress(45.0)
    timer.note_upload_progress(60.0)
    timer.handle_timeout(75.0)
    timer.note_upload_progress(75.01)
    assert timer.next_deadline() == 75.0 + STEP
    assert timer.handle_timeout(75.0 + STEP) is LOST


def test_k4_each_ping_has_its_own_allowance() -> None:
    timer = pinged()
    timer.note_upload_progress(45.0)
    timer.note_upload_progress(60.0)
    timer.note_life(61.0)
    assert timer.ping_for_user(100.0)
    timer.note_upload_progress(115.0)
    timer.note_upload_progress(130.0)
    assert verdicts(timer) == [(about(145.0 + STEP), LOST)]


def test_k4_upload_progress_without_a_ping_means_nothing() -> None:
    timer = make()
    timer.note_upload_progress(10.0)
    assert timer.next_deadline() == 30.0
    assert timer.verified(29.0)
    timer.handle_timeout(30.0)
    timer.note_life(31.0)
    timer.note_upload_progress(44.0)
    assert verdicts(timer, until=61.0) == [(61.0, SEND_PING)]


def test_k4_k7_time_that_we_slept_through_is_not_charged_to_the_upload() -> None:
    timer = pinged()
    # 30.3 s late: were the allowance to pay, the deadline would come to lie 0.3 s ago, and the loss 20 ms ahead.
    timer.note_upload_progress(75.3)
    assert timer.next_deadline() == about(90.3)
    timer.note_upload_progress(90.3)
    timer.note_upload_progress(105.3)
    assert verdicts(timer) == [(about(120.3 + STEP), LOST)]


def test_k4_k7_upload_progress_still_counts_when_lateness_does_not() -> None:
    timer = pinged()
    for now in (46.0, 62.0, 78.0):
        timer.note_gap(5.0, now)
    assert timer.next_deadline() == 93.0
    timer.note_upload_progress(95.0)
    assert timer.next_deadline() == 110.0


# K7: judgement


def test_k7_judgement_has_two_steps() -> None:
    timer = pinged()
    assert timer.handle_timeout(45.0) is NOTHING
    assert timer.outstanding
    assert timer.next_deadline() == 45.0 + STEP
    assert timer.handle_timeout(45.01) is NOTHING
    assert timer.handle_timeout(45.0 + STEP) is LOST


@pytest.mark.parametrize("life", [45.0, 45.01, 45.0 + STEP])
def test_k7_life_between_the_steps_saves_the_connection(life: float) -> None:
    timer = pinged()
    timer.handle_timeout(45.0)
    timer.note_life(life)
    assert timer.handle_timeout(45.0 + STEP) is NOTHING
    assert not timer.outstanding
    assert timer.next_deadline() == about(life + 30.0)


@pytest.mark.parametrize("late", [0.0, 0.25, 0.5, 0.75, 5.0, 1e6])
def test_k7_a_late_first_step_gives_the_peer_its_time_anew(late: float) -> None:
    timer = pinged()
    now = 45.0 + late
    assert timer.handle_timeout(now) is NOTHING
    assert timer.outstanding
    assert timer.next_deadline() == now + (15.0 if late > 0.5 else STEP)
    assert timer.pings_sent == 1


@pytest.mark.parametrize(
    ("late", "verdict"), [(0.0, LOST), (0.25, LOST), (0.49, LOST), (0.51, NOTHING), (1e6, NOTHING)]
)
def test_k7_a_late_second_step_gives_the_peer_its_time_anew(late: float, verdict: Verdict) -> None:
    timer = pinged()
    timer.handle_timeout(45.0)
    now = 45.0 + STEP + late
    assert timer.handle_timeout(now) is verdict
    assert timer.next_deadline() == (now + 15.0 if verdict is NOTHING else None)
    assert timer.pings_sent == 1


def test_k7_three_extensions_at_most() -> None:
    timer = pinged()
    now = 45.0
    for _ in range(3):
        now += 100.0
        assert timer.handle_timeout(now) is NOTHING
        now += 15.0
        assert timer.next_deadline() == now
    now += 100.0
    assert timer.handle_timeout(now) is NOTHING
    assert timer.next_deadline() == now + STEP
    assert timer.handle_timeout(now + 100.0) is LOST
    assert timer.pings_sent == 1


def test_k7_both_steps_count_among_the_three() -> None:
    timer = pinged()
    assert timer.handle_timeout(46.0) is NOTHING  # late
    assert timer.handle_timeout(61.0) is NOTHING
    assert timer.handle_timeout(62.0) is NOTHING  # late
    assert timer.handle_timeout(77.0) is NOTHING
    assert timer.handle_timeout(78.0) is NOTHING  # late
    assert timer.next_deadline() == 93.0
    assert timer.handle_timeout(93.0) is NOTHING
    assert timer.handle_timeout(94.0) is LOST


def test_k7_life_renews_the_extensions() -> None:
    timer = pinged()
    for late in (100.0, 200.0, 300.0):
        timer.handle_timeout(late)
    timer.note_life(301.0)
    assert timer.ping_for_user(302.0)
    for late in (400.0, 500.0, 600.0):
        assert timer.handle_timeout(late) is NOTHING
        assert timer.next_deadline() == late + 15.0


@pytest.mark.parametrize("stall", [0.6, 5.0, 15.0, 60.0, 86_400.0])
def test_k7_a_healthy_connection_survives_three_stalls_within_one_ping(stall: float) -> None:
    """Even if the timer always wakes before the reader gets its turn, and the answer has long been waiting."""
    timer = pinged()
    now = 45.0
    for _ in range(3):
        now += stall
        assert timer.handle_timeout(now) is NOTHING
        now += 15.0
    assert timer.handle_timeout(now) is NOTHING
    timer.note_life(now + 0.01)
    assert timer.handle_timeout(now + STEP) is NOTHING
    assert not timer.outstanding


def test_k7_a_late_look_at_silence_costs_nothing() -> None:
    timer = make()
    assert timer.handle_timeout(1000.0) is SEND_PING
    assert verdicts(timer) == [(1015.0 + STEP, LOST)]


# K9: verified checkout


@pytest.mark.parametrize(
    ("read_idle_timeout", "limit"), [(30.0, 30.0), (10.0, 10.0), (300.0, 30.0)], ids=["default", "shorter", "longer"]
)
def test_k9_silence_makes_a_connection_unverified(read_idle_timeout: float, limit: float) -> None:
    timer = make(Keepalive(read_idle_timeout))
    timer.note_life(0.0)
    assert timer.verified(0.0)
    assert timer.verified(limit - 0.001)
    assert not timer.verified(limit)
    timer.note_life(limit + 1.0)
    assert timer.verified(limit + 1.0)


def test_k9_an_enlarged_interval_is_not_what_verifies() -> None:
    timer = make(Keepalive(10.0))
    timer.use_interval(330.0)
    assert not timer.verified(10.0)


def test_k9_one_ping_at_checkout_whether_or_not_a_stream_is_open() -> None:
    timer = make(streams=0)
    assert timer.ping_for_checkout(100.0)
    assert (timer.pings_sent, timer.last_ping_purpose) == (1, PingPurpose.CHECKOUT)
    assert timer.outstanding
    assert timer.next_deadline() == 115.0
    assert not timer.ping_for_checkout(101.0)
    assert not timer.ping_for_user(101.0)
    assert verdicts(timer) == [(115.0 + STEP, LOST)]


def test_k9_life_ends_it() -> None:
    timer = make(streams=0)
    timer.ping_for_checkout(100.0)
    assert not timer.verified(100.0)
    timer.note_life(100.1)
    assert timer.verified(100.1)
    assert not timer.outstanding


# K10: suspicion


@pytest.mark.parametrize(
    ("life", "headers", "now", "rtt", "suspicious"),
    [
        (5.0, 6.0, 10.0, None, True),
        (6.0, 6.0, 10.0, None, True),
        (6.1, 6.0, 10.0, None, False),
        (5.0, 9.0, 10.0, None, False),
        (5.0, 8.9, 10.0, None, True),
        (5.0, 6.0, 10.0, 0.01, True),
        (5.0, 6.0, 10.0, 1.3, True),
        (5.0, 6.0, 10.0, 1.4, False),
    ],
    ids=[
        "no-life-since",
        "life-only-up-to-the-headers",
        "life-since",
        "too-soon",
        "just-long-enough",
        "short-round-trip",
        "three-round-trips-passed",
        "three-round-trips-not-passed",
    ],
)
def test_k10_which_cancellation_makes_unverified(
    life: float, headers: float, now: float, rtt: float | None, suspicious: bool
) -> None:
    timer = make()
    if rtt is not None:
        timer.note_rtt(rtt)
    timer.note_life(life)
    assert timer.ping_for_suspicion(headers, now) is suspicious
    assert timer.verified(now) is not suspicious
    assert timer.outstanding is suspicious
    assert timer.last_ping_purpose is (PingPurpose.SUSPICION if suspicious else None)


def test_k10_no_ping_beside_an_outstanding_one_but_unverified_all_the_same() -> None:
    timer = make()
    timer.ping_for_user(5.0)
    assert timer.verified(10.0)
    assert not timer.ping_for_suspicion(6.0, 10.0)
    assert not timer.verified(10.0)
    assert timer.pings_sent == 1


def test_k10_one_ping_until_the_next_progress() -> None:
    timer = make()
    assert timer.ping_for_suspicion(1.0, 5.0)
    timer.note_life(6.0)
    assert not timer.ping_for_suspicion(10.0, 50.0)
    assert not timer.verified(20.0)
    timer.note_life(51.0)
    timer.note_progress()
    assert timer.ping_for_suspicion(60.0, 70.0)


def test_k10_is_judged_even_if_the_cancelled_stream_was_the_last() -> None:
    timer = make()
    assert timer.ping_for_suspicion(0.0, 5.0)
    timer.note_stream_closed()
    assert verdicts(timer) == [(20.0 + STEP, LOST)]


# K11: idle


def test_k11_no_ping_without_a_stream() -> None:
    timer = make(streams=0)
    assert timer.next_deadline() is None
    assert timer.handle_timeout(1e6) is NOTHING


def test_k11_while_idle_pings_always() -> None:
    timer = make(Keepalive(jitter=0.0, while_idle=True), streams=0)
    assert verdicts(timer, until=30.0) == [(30.0, SEND_PING)]


def test_k11_only_the_last_streams_end_disarms() -> None:
    timer = make(streams=2)
    timer.note_stream_closed()
    assert timer.next_deadline() == 30.0
    timer.note_stream_closed()
    assert timer.open_streams == 0
    assert timer.handle_timeout(30.0) is NOTHING
    assert timer.next_deadline() is None


def test_k11_a_stream_after_the_last_one_takes_over_its_deadline() -> None:
    timer = make(streams=1)
    for now in range(1, 20):
        timer.note_life(float(now))
        timer.note_stream_closed()
        assert timer.next_deadline() == 30.0
        timer.note_stream_opened()
    assert verdicts(timer)[0] == (49.0, SEND_PING)


def test_k11_the_deadline_that_the_last_stream_left_is_the_only_one() -> None:
    timer = make(streams=1)
    timer.note_life(20.0)
    timer.note_stream_closed()
    assert verdicts(timer) == []
    assert timer.next_deadline() is None
    timer.note_stream_opened()
    assert timer.next_deadline() == 50.0


def test_k11_an_outstanding_ping_is_judged_without_streams() -> None:
    timer = pinged()
    timer.note_stream_closed()
    assert timer.outstanding
    assert verdicts(timer) == [(45.0 + STEP, LOST)]


def test_k11_once_answered_it_is_not_followed_by_another() -> None:
    timer = pinged()
    timer.note_stream_closed()
    timer.note_life(31.0)
    assert verdicts(timer) == []
    assert timer.next_deadline() is None


def test_k11_life_and_the_last_streams_end_disarm_until_there_is_another() -> None:
    timer = pinged()
    timer.note_life(31.0)
    timer.note_stream_closed()
    assert not timer.outstanding
    assert timer.handle_timeout(45.0) is NOTHING
    assert timer.next_deadline() is None
    timer.note_stream_opened()
    assert timer.next_deadline() == 61.0


def test_k11_silence_counts_whether_or_not_streams_are_open() -> None:
    timer = make(streams=0)
    timer.note_life(10.0)
    timer.note_stream_opened()
    assert verdicts(timer, until=40.0) == [(40.0, SEND_PING)]


def test_k11_what_a_first_stream_arms_is_measured_from_the_last_life() -> None:
    timer = make(streams=0)
    timer.note_life(10.0)
    timer.note_stream_opened()
    assert timer.next_deadline() == 40.0


def test_k11_a_stream_on_a_long_silent_connection_is_due_at_once() -> None:
    timer = make(streams=0)
    timer.note_stream_opened()
    deadline = timer.next_deadline()
    assert deadline is not None
    assert deadline <= 100.0
    assert timer.handle_timeout(100.0) is SEND_PING


# K13: punishment


@pytest.mark.parametrize(
    ("pings", "debug_data", "punishment"),
    [
        (0, b"", False),
        (1, b"", False),
        (2, b"", True),
        (3, b"slow down", True),
        (0, b"too_many_pings", True),
        (0, b"too_many_pings!", False),
        (1, b"slow down", False),
    ],
)
def test_k13_what_is_a_punishment_for_pings(pings: int, debug_data: bytes, punishment: bool) -> None:
    timer = make()
    for number in range(pings):
        assert timer.ping_for_checkout(100.0 * number)
        timer.note_life(100.0 * number + 1.0)
    assert timer.note_calm(debug_data) is punishment
    timer.note_progress()
    assert timer.note_calm(debug_data) is (debug_data == b"too_many_pings")


def test_k13_users_pings_are_not_keepalives() -> None:
    timer = make()
    for number in range(5):
        assert timer.ping_for_user(float(number))
        timer.note_life(number + 0.5)
    assert not timer.note_calm(b"")


def test_k13_all_of_our_own_pings_count() -> None:
    timer = pinged()
    timer.note_life(31.0)
    assert timer.ping_for_suspicion(32.0, 40.0)
    assert timer.note_calm(b"")


def test_k13_the_interval_in_force_changes_at_once() -> None:
    timer = make()
    timer.use_interval(60.0)
    assert timer.interval == 60.0
    assert timer.next_deadline() == 60.0
    timer.use_interval(45.0)
    assert verdicts(timer, until=45.0) == [(45.0, SEND_PING)]
    assert timer.policy.read_idle_timeout == 30.0


def test_k13_what_a_new_interval_arms_is_measured_from_the_last_life() -> None:
    timer = make()
    timer.note_life(20.0)
    timer.use_interval(60.0)
    assert timer.next_deadline() == 80.0


def test_k13_the_interval_is_never_below_the_configured_one() -> None:
    timer = make()
    timer.use_interval(1.0)
    assert timer.interval == 30.0


def test_k13_a_new_interval_leaves_an_outstanding_ping_alone() -> None:
    timer = pinged()
    timer.use_interval(330.0)
    assert verdicts(timer) == [(45.0 + STEP, LOST)]


@pytest.mark.parametrize(
    ("configured", "used", "expected"),
    [
        (30.0, [30.0], [(30.0, 60.0)]),
        (30.0, [30.0, 30.0], [(30.0, 60.0), (60.0, 60.0)]),
        (30.0, [30.0, 60.0, 120.0, 240.0], [(30.0, 60.0), (60.0, 120.0), (120.0, 240.0), (240.0, 330.0)]),
        (30.0, [330.0, 330.0], [(30.0, 330.0), (330.0, 330.0)]),
        (30.0, [120.0, 30.0], [(30.0, 240.0), (240.0, 240.0)]),
        (300.0, [300.0], [(300.0, 330.0)]),
        (600.0, [600.0], [(600.0, 600.0)]),
    ],
)
def test_k13_punishment_doubles_what_the_connection_used(
    configured: float, used: list[float], expected: list[tuple[float, float]]
) -> None:
    memory = IntervalMemory(configured)
    assert [memory.punish(interval, 0.0) for interval in used] == expected
    assert memory.current(0.0) == expected[-1][1]


@pytest.mark.parametrize(
    ("hours", "interval"),
    [(0.0, 240.0), (0.99, 240.0), (1.0, 120.0), (1.99, 120.0), (2.0, 60.0), (3.0, 30.0), (4.0, 30.0), (1e6, 30.0)],
)
def test_k13_punishment_is_forgiven_by_the_hour(hours: float, interval: float) -> None:
    memory = IntervalMemory(30.0)
    memory.punish(120.0, 500.0)
    assert memory.current(500.0 + hours * 3600.0) == interval


def test_k13_the_last_step_of_forgiveness_stops_at_the_configured_interval() -> None:
    memory = IntervalMemory(100.0)
    memory.punish(165.0, 0.0)
    assert [memory.current(hours * 3600.0) for hours in range(4)] == [330.0, 165.0, 100.0, 100.0]


def test_k13_another_punishment_starts_from_what_is_left_and_begins_the_hour_anew() -> None:
    memory = IntervalMemory(30.0)
    memory.punish(120.0, 0.0)
    assert memory.punish(30.0, 5400.0) == (120.0, 120.0)
    assert memory.current(7200.0) == 120.0
    assert memory.current(9000.0) == 60.0


@pytest.mark.parametrize("now", [-1e6, 0.0, 1e9])
def test_k13_an_origin_that_never_complained_keeps_its_interval(now: float) -> None:
    assert IntervalMemory(30.0).current(now) == 30.0


# K14: cost


def test_k14_life_only_stores() -> None:
    instructions = list(dis.get_instructions(KeepaliveTimer.note_life))
    assert sum(instruction.opname == "STORE_ATTR" for instruction in instructions) <= 2
    assert not [instruction for instruction in instructions if "CALL" in instruction.opname]


def test_k14_life_does_not_move_the_deadline() -> None:
    timer = make()
    for millisecond in range(30_000):
        timer.note_life(millisecond / 1000)
        assert timer.next_deadline() == 30.0
    assert timer.handle_timeout(30.0) is NOTHING
    assert timer.next_deadline() == about(59.999)


def test_k14_a_busy_connection_wakes_its_timer_about_once_an_interval() -> None:
    timer = make(Keepalive(jitter=0.1), 0.5)
    wakes = 0
    for tick in range(36_000):
        now = tick / 10
        timer.note_life(now)
        deadline = timer.next_deadline()
        if deadline is not None and deadline <= now:
            assert timer.handle_timeout(now) is NOTHING
            wakes += 1
    assert wakes <= 3600 / 27 + 1
    assert timer.pings_sent == 0


def test_k14_timers_are_slotted() -> None:
    assert not hasattr(make(), "__dict__")


# K15: jitter


@pytest.mark.parametrize(
    ("jitter", "fraction", "interval"),
    [(0.0, 0.7, 30.0), (0.1, 0.0, 27.0), (0.1, 0.5, 28.5), (0.1, 1.0, 30.0), (0.9, 0.0, 3.0), (0.9, 0.5, 16.5)],
)
def test_k15_the_interval_is_drawn_between_its_bounds(jitter: float, fraction: float, interval: float) -> None:
    timer = make(Keepalive(jitter=jitter), fraction)
    assert verdicts(timer, until=100.0)[0] == (about(interval), SEND_PING)


def test_k15_each_silence_has_its_own_interval_whatever_that_before_it_was() -> None:
    """The second silence is due before the first one would have been."""
    timer = make(Keepalive(jitter=0.9), 0.99, 0.0)
    assert timer.handle_timeout(3.1) is NOTHING
    timer.note_life(4.0)
    assert verdicts(timer, until=20.0) == [(about(7.0), SEND_PING)]


def test_k15_is_drawn_once_per_silence() -> None:
    source = Scripted(0.5)
    timer = KeepaliveTimer(Keepalive(), source, 0.0)
    for now in range(20):
        timer.note_stream_opened()
        timer.handle_timeout(float(now))
        timer.note_stream_closed()
    # None of it lasted long enough to matter.
    assert source.draws == 0
    timer.note_stream_opened()
    for now in range(20, 28):
        timer.note_life(float(now))
    assert verdicts(timer, until=27.0 + 28.4) == []
    assert source.draws == 1
    assert verdicts(timer, until=27.0 + 28.5) == [(27.0 + 28.5, SEND_PING)]
    # With a PING that of the silence after it is drawn.
    assert source.draws == 2
    timer.note_life(60.0)
    assert verdicts(timer, until=60.0 + 28.4) == []
    assert source.draws == 2


def test_k15_a_new_interval_keeps_the_silences_fraction() -> None:
    timer = make(Keepalive(jitter=0.1), 0.5, 0.0)
    timer.use_interval(60.0)
    assert verdicts(timer, until=60.0) == [(about(57.0), SEND_PING)]


@pytest.mark.parametrize("interval", [1.0, 30.0, 123.4])
def test_k14_k15_connections_share_wake_ups_within_what_the_jitter_leaves(interval: float) -> None:
    """Answers come within 10 ms, and ping_timeout is too long to need a look of its own."""
    source = random.Random(14)
    moments: set[float] = set()
    sent = 0
    for _ in range(500):
        begin = source.uniform(0.0, interval)
        timer = KeepaliveTimer(Keepalive(interval, 2 * interval, while_idle=True), source, begin)
        life = begin
        for _ in range(20):
            now = timer.next_deadline()
            assert now is not None
            moments.add(now)
            verdict = timer.handle_timeout(now)
            if verdict is SEND_PING:
                assert 0.9 * interval - 1e-9 <= now - life <= interval
                sent += 1
                life = now + source.uniform(0.0001, 0.01)
                timer.note_life(life)
    assert {moment * 64 % 1 for moment in moments} == {0.0}
    # Few wakes bring no PING.
    assert sent > 0.9 * 500 * 20


def test_k15_where_the_jitter_leaves_no_room_nothing_is_rounded() -> None:
    timer = make(Keepalive(read_idle_timeout=0.5, jitter=0.1), 0.3, now=0.001)
    assert verdicts(timer, until=0.6) == [(about(0.001 + 0.465), SEND_PING)]


def test_k15_clients_of_one_moment_spread() -> None:
    source = random.Random(15)
    firsts = []
    for _ in range(2000):
        timer = KeepaliveTimer(Keepalive(while_idle=True), source, 0.0)
        firsts += [now for now, _ in verdicts(timer, until=30.0)]
    assert len(firsts) == 2000
    assert 27.0 <= min(firsts) < 27.05
    assert 29.95 < max(firsts) <= 30.0
    assert sum(firsts) / 2000 == pytest.approx(28.5, abs=0.1)


# K16: rate


def test_k16_two_pings_beyond_the_rate_until_the_next_progress() -> None:
    timer = make()
    sent = []
    for now in range(1, 8):
        if timer.ping_for_checkout(float(now)):
            sent.append(now)
            timer.note_life(now + 0.5)
    # The first is within the rate: none came before it.
    assert sent == [1, 2, 3]
    timer.note_progress()
    assert timer.ping_for_checkout(8.0)


def test_k16_at_the_rate_the_budget_is_not_touched() -> None:
    timer = make(Keepalive(jitter=0.1), 0.5)
    for number in range(20):
        assert timer.ping_for_checkout(27.0 * number)
        timer.note_life(27.0 * number + 1.0)


def test_k16_suspicion_and_checkout_share_one_budget() -> None:
    timer = make()
    assert timer.ping_for_user(1.0)
    timer.note_life(1.5)
    for now in (2.0, 3.0):
        assert timer.ping_for_checkout(now)
        timer.note_life(now + 0.5)
    assert not timer.ping_for_suspicion(4.0, 10.0)
    assert not timer.verified(10.0)
    assert timer.ping_for_suspicion(4.0, 40.0)


def test_k16_k13_the_rate_follows_the_interval_in_force() -> None:
    timer = make()
    timer.use_interval(100.0)
    sent = 0
    for now in (0.0, 35.0, 70.0, 105.0, 169.0, 170.0):
        sent += timer.ping_for_checkout(now)
        timer.note_life(now + 1.0)
    assert sent == 4
    assert timer.last_ping_at == 170.0


def test_k16_users_pings_are_not_limited() -> None:
    timer = make()
    for number in range(100):
        assert timer.ping_for_user(float(number))
        timer.note_life(number + 0.5)
    assert timer.pings_sent == 100


def test_k16_pings_of_k3_keep_their_distance_even_from_life_with_an_older_date() -> None:
    timer = make()
    timer.note_life(1.0)
    assert verdicts(timer, until=31.0) == [(31.0, SEND_PING)]
    timer.note_life(20.0)  # read before the PING was sent, told after it
    assert not timer.outstanding
    assert verdicts(timer, until=61.0) == [(61.0, SEND_PING)]


# K17: ends


@pytest.mark.parametrize("before", ["quiet", "pinged", "judging", "answered"])
def test_k17_nothing_is_left_after_close(before: str) -> None:
    timer = make(Keepalive(jitter=0.0, while_idle=True))
    if before != "quiet":
        timer.handle_timeout(30.0)
    if before == "judging":
        timer.handle_timeout(45.0)
    if before == "answered":
        timer.note_life(31.0)
    timer.close()
    for now in (46.0, 1000.0):
        assert not timer.ping_for_checkout(now)
        assert not timer.ping_for_suspicion(0.0, now)
        assert not timer.ping_for_user(now)
        timer.note_life(now)
        timer.note_progress()
        timer.note_stream_opened()
        timer.note_stream_closed()
        timer.note_gap(5.0, now)
        timer.note_upload_progress(now)
        timer.note_going_away()
        timer.use_interval(60.0)
        timer.close()
        assert not timer.outstanding
        assert timer.next_deadline() is None
        assert timer.handle_timeout(now) is NOTHING
    assert timer.pings_sent == (0 if before == "quiet" else 1)


def test_k17_after_a_received_goaway_keepalive_goes_on_while_a_stream_is_open() -> None:
    timer = make(Keepalive(jitter=0.0, while_idle=True))
    timer.note_going_away()
    assert verdicts(timer) == [(30.0, SEND_PING), (45.0 + STEP, LOST)]


def test_k17_after_a_received_goaway_there_are_no_pings_without_streams() -> None:
    timer = make(Keepalive(jitter=0.0, while_idle=True))
    timer.note_going_away()
    timer.note_stream_closed()
    assert verdicts(timer) == []
    assert timer.next_deadline() is None


def test_k17_a_received_goaway_disarms_an_idle_connection_but_not_its_outstanding_ping() -> None:
    timer = make(Keepalive(jitter=0.0, while_idle=True), streams=0)
    timer.note_going_away()
    assert timer.next_deadline() is None
    timer = make(Keepalive(jitter=0.0, while_idle=True), streams=0)
    timer.handle_timeout(30.0)
    timer.note_going_away()
    assert verdicts(timer) == [(45.0 + STEP, LOST)]


def test_k17_a_received_goaway_disarms_an_idle_connection_whose_ping_was_answered() -> None:
    timer = make(Keepalive(jitter=0.0, while_idle=True), streams=0)
    timer.handle_timeout(30.0)
    timer.note_life(31.0)
    timer.note_going_away()
    assert timer.next_deadline() is None


def test_k17_after_a_received_goaway_nothing_is_verified_for_reuse() -> None:
    timer = make()
    timer.note_going_away()
    assert not timer.ping_for_checkout(100.0)
    assert not timer.ping_for_suspicion(0.0, 100.0)
    assert timer.ping_for_user(100.0)


# K20: figures


def test_k20_round_trips() -> None:
    timer = make()
    assert (timer.rtt_last, timer.rtt_best, timer.rtt_smoothed) == (None, None, None)
    timer.note_rtt(0.8)
    assert (timer.rtt_last, timer.rtt_best, timer.rtt_smoothed) == (0.8, 0.8, 0.8)
    timer.note_rtt(1.6)
    assert (timer.rtt_last, timer.rtt_best, timer.rtt_smoothed) == (1.6, 0.8, about(0.9))
    timer.note_rtt(0.1)
    assert (timer.rtt_last, timer.rtt_best, timer.rtt_smoothed) == (0.1, 0.1, about(0.8))


def test_k20_a_round_trip_of_zero_is_a_round_trip() -> None:
    timer = make()
    timer.note_rtt(0.0)
    timer.note_rtt(0.8)
    assert (timer.rtt_best, timer.rtt_smoothed) == (0.0, about(0.1))


def test_k20_figures_before_anything_happened() -> None:
    timer = make(streams=3)
    assert (timer.pings_sent, timer.pings_acked, timer.last_ping_at, timer.last_ping_purpose) == (0, 0, None, None)
    assert (timer.payload, timer.policy, timer.interval, timer.open_streams) == (b"", PLAIN, 30.0, 3)


# K25: gaps in time


def test_k25_a_gap_makes_unverified_until_life_comes() -> None:
    timer = make()
    timer.note_life(1.0)
    timer.note_gap(3600.0, 2.0)
    assert not timer.verified(2.0)
    assert timer.next_deadline() == 30.0
    timer.note_life(3.0)
    assert timer.verified(3.0)


@pytest.mark.parametrize("judging", [False, True])
def test_k25_a_gap_gives_an_outstanding_ping_its_time_anew(judging: bool) -> None:
    timer = pinged()
    if judging:
        timer.handle_timeout(45.0)
    timer.note_gap(3600.0, 45.01)
    assert timer.outstanding
    assert timer.next_deadline() == 60.01
    assert verdicts(timer) == [(about(60.01 + STEP), LOST)]
    assert timer.pings_sent == 1


def test_k25_k7_gaps_count_among_the_three_extensions() -> None:
    timer = pinged()
    timer.note_gap(5.0, 40.0)
    timer.handle_timeout(56.0)
    timer.note_gap(5.0, 60.0)
    assert timer.next_deadline() == 75.0
    timer.note_gap(5.0, 70.0)
    assert timer.next_deadline() == 75.0
    assert timer.handle_timeout(85.0) is NOTHING
    assert timer.handle_timeout(95.0) is LOST


def test_k25_a_gap_before_the_ping_is_not_charged_to_it() -> None:
    timer = make()
    for now in range(10):
        timer.note_gap(5.0, float(now))
    timer.handle_timeout(30.0)
    timer.note_gap(5.0, 40.0)
    assert timer.next_deadline() == 55.0


def test_k25_life_after_the_gap_is_what_counts() -> None:
    timer = pinged()
    timer.note_life(31.0)
    timer.note_gap(5.0, 31.0)
    assert not timer.outstanding
    assert not timer.verified(31.0)
    timer.note_life(31.0)
    assert timer.verified(31.0)


def test_k25_a_jump_of_the_wall_clock_only_makes_unverified() -> None:
    timer = pinged()
    timer.distrust()
    assert not timer.verified(31.0)
    assert timer.outstanding
    assert verdicts(timer) == [(45.0 + STEP, LOST)]
    timer = make(OFF)
    timer.distrust()
    assert timer.verified(31.0)
