"""What holds for a KeepaliveTimer in every schedule: K3, K4, K7, K9-K11, K13-K17, K25.

`Referee` feeds a timer and judges what it says by the rules' bounds. It keeps its own account of what was told and of
the time spent past deadlines, never of the timer's states. Hypothesis looks for the schedule that breaks a bound; the
stress test plays thousands of random ones.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from h2keep.keepalive import IntervalMemory, Keepalive, KeepaliveTimer, PingPurpose, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

#: Rounding, in seconds, at the clock readings used here.
EPSILON = 1e-6
STEP = 0.02
LATE = 0.5


class Referee:
    """Plays one connection's schedule and asserts, at each move, what the rules promise."""

    def __init__(self, policy: Keepalive, start: float, seed: int) -> None:
        self.policy = policy
        self.timeout = policy.ping_timeout
        self.start = self.now = start
        self.timer = KeepaliveTimer(policy, random.Random(seed), start)
        self.interval = policy.read_idle_timeout
        self.streams = 0
        self.going_away = False
        self.closed = False
        self.lost = False
        self.life = start
        self.distrusted = False
        # Of the last PING.
        self.ping_at: float | None = None
        self.payload = b""
        self.awaiting_life = False
        self.awaiting_ack = False
        self.gaps = 0
        self.late_moves = 0
        self.overdue = 0.0
        self.uploads = 0
        self.steps: list[float] = []
        self.overtaken: list[bytes] = []
        # Of all.
        self.pings = 0
        self.acks = 0
        self.last_idle_ping: float | None = None
        # Since the last progress; PINGs at the very rate may count as beyond it, by rounding.
        self.extra = 0
        self.extra_or_nearly = 0
        self.own_pings = 0
        self.suspected = False

    # What the rules make of the facts

    @property
    def least(self) -> float:
        assert self.interval is not None
        return (1 - self.policy.jitter) * self.interval

    @property
    def applies(self) -> bool:
        """Whether K3 does (K11, K17)."""
        if self.closed or self.interval is None:
            return False
        return self.streams > 0 or (self.policy.while_idle and not self.going_away)

    @property
    def extensions(self) -> int:
        """K7's, at most."""
        return min(3, self.gaps + self.late_moves)

    def latest_loss(self) -> float:
        """K4 and K7: when an outstanding PING must have been judged."""
        assert self.ping_at is not None
        granted = 1 + self.extensions + min(2, self.uploads)
        judgements = 1 + self.extensions + self.uploads
        return self.ping_at + granted * self.timeout + judgements * STEP + self.overdue

    def is_verified(self) -> bool:
        if self.policy.read_idle_timeout is None:
            return True
        return not self.distrusted and self.now - self.life < min(self.policy.read_idle_timeout, 30.0)

    # Bounds that hold after each move

    def check(self) -> None:
        timer = self.timer
        deadline = timer.next_deadline()
        assert timer.outstanding == (self.awaiting_life and not self.closed)
        assert (timer.pings_sent, timer.pings_acked) == (self.pings, self.acks)
        assert timer.last_life == self.life
        assert timer.open_streams == self.streams
        if self.closed:
            assert deadline is None
            return
        assert timer.verified(self.now) == self.is_verified()
        if timer.outstanding:
            assert deadline is not None
            assert deadline <= self.latest_loss() + EPSILON
        elif self.applies:
            # K3 is never late: whatever comes, the timer looks before the silence is too long.
            assert deadline is not None
            assert self.interval is not None
            assert deadline <= self.life + self.interval + EPSILON

    def quietly(self, move: Callable[[], object]) -> None:
        """A move of which the interface says that it makes no sleeper wake earlier."""
        before = self.timer.next_deadline()
        move()
        after = self.timer.next_deadline()
        assert after is None or (before is not None and after >= before - EPSILON)

    # Moves

    def advance(self, seconds: float) -> None:
        deadline = self.timer.next_deadline()
        before = self.now
        self.now += seconds
        if deadline is not None and self.now > deadline:
            self.overdue += self.now - max(before, deadline)

    def _count_lateness(self) -> None:
        deadline = self.timer.next_deadline()
        if deadline is not None and self.now > deadline + LATE - EPSILON:
            self.late_moves += 1

    def advance_to_deadline(self, late: float = 0.0) -> None:
        deadline = self.timer.next_deadline()
        if deadline is not None and deadline + late > self.now:
            self.advance(deadline + late - self.now)
            self.now = max(self.now, deadline)  # lest rounding make it early

    def note_life(self) -> None:
        before = self.timer.next_deadline()
        self.timer.note_life(self.now)
        assert self.timer.next_deadline() == before  # K14
        self.life = self.now
        self.awaiting_life = False
        self.distrusted = False

    def note_progress(self) -> None:
        self.note_life()
        self.quietly(self.timer.note_progress)
        self.extra = self.extra_or_nearly = self.own_pings = 0
        self.suspected = False

    def note_ack(self, payload: bytes) -> None:
        self.note_life()
        rtt = self.timer.note_ping_ack(payload, self.now)
        if payload == self.payload and self.awaiting_ack:
            assert self.ping_at is not None
            assert rtt == self.now - self.ping_at
            assert self.timer.rtt_last == rtt
            self.acks += 1
            self.awaiting_ack = False
        else:
            assert rtt is None

    def open_stream(self) -> None:
        self.timer.note_stream_opened()
        self.streams += 1

    def close_stream(self) -> None:
        self.quietly(self.timer.note_stream_closed)
        self.streams -= 1

    def note_gap(self) -> None:
        self.quietly(lambda: self.timer.note_gap(5.0, self.now))
        self.distrusted = True
        self.gaps += 1

    def distrust(self) -> None:
        self.quietly(self.timer.distrust)
        self.distrusted = True

    def note_upload_progress(self) -> None:
        self._count_lateness()
        self.quietly(lambda: self.timer.note_upload_progress(self.now))
        self.uploads += 1

    def note_going_away(self) -> None:
        self.quietly(self.timer.note_going_away)
        self.going_away = True

    def use_interval(self, factor: float) -> None:
        configured = self.policy.read_idle_timeout
        self.timer.use_interval(factor * (configured or 1.0))
        if configured is not None:
            self.interval = max(1.0, factor) * configured
        assert self.timer.interval == (None if configured is None else pytest.approx(self.interval))

    def close(self) -> None:
        self.timer.close()
        self.closed = True

    def ping_for_user(self) -> None:
        refused = self.closed or self.awaiting_life
        assert self.timer.ping_for_user(self.now) is not refused
        if not refused:
            self._sent(PingPurpose.USER)

    def ping_for_checkout(self) -> None:
        if self.timer.ping_for_checkout(self.now):
            self._sent(PingPurpose.CHECKOUT)
        else:
            assert self._may_refuse()

    def cancel(self, age: float) -> None:
        """A request is cancelled whose HEADERS were sent so long ago."""
        sent_at = self.now - age
        patience = max(1.0, 3 * (self.timer.rtt_smoothed or 0.0))
        suspicious = self.life <= sent_at and self.now - sent_at > patience
        self.distrusted = self.distrusted or suspicious
        if self.timer.ping_for_suspicion(sent_at, self.now):
            assert suspicious
            assert not self.suspected
            self.suspected = True
            self._sent(PingPurpose.SUSPICION)
        else:
            assert not suspicious or self.suspected or self._may_refuse()

    def handle_timeout(self) -> Verdict:
        """At any time: early, on time, late."""
        deadline = self.timer.next_deadline()
        early = deadline is None or self.now < deadline
        self._count_lateness()
        verdict = self.timer.handle_timeout(self.now)
        if early:
            assert verdict is Verdict.NOTHING
            assert self.timer.next_deadline() == deadline
            return verdict
        assert deadline is not None
        if self.awaiting_life:
            self.steps.append(self.now)
        if verdict is Verdict.LOST:
            self._judge_loss(deadline)
        elif verdict is Verdict.SEND_PING:
            self._judge_idle_ping()
        elif self.applies and not self.awaiting_life:
            assert self.interval is not None
            assert self.now < self.life + self.interval + EPSILON, "K3 is late"
        # No round without rest: what was due is done, or put off.
        after = self.timer.next_deadline()
        assert after is None or after > self.now
        return verdict

    # Judgement

    def _judge_loss(self, deadline: float) -> None:
        assert self.ping_at is not None
        assert self.awaiting_life, "lost though life came after the PING"
        assert self.now >= self.ping_at + self.timeout, "lost before the PING had its time (K4)"
        assert self.now <= self.latest_loss() + EPSILON, "lost later than K4 and K7 allow"
        assert len(self.steps) >= 2, "judged in one step (K7)"
        assert self.steps[-1] - self.steps[-2] >= STEP - EPSILON
        if self.now - deadline > LATE + EPSILON:
            assert self.gaps + self.late_moves > 3, "lost by a late step, though it could have been excused (K7)"
        self.closed = self.lost = True

    def _judge_idle_ping(self) -> None:
        assert self.applies, "a PING that K11 or K17 forbids"
        assert self.now - self.life >= self.least - EPSILON, "too early (K3, K15)"
        assert self.last_idle_ping is None or self.now - self.last_idle_ping >= self.least - EPSILON, "K16"
        self.last_idle_ping = self.now
        self._sent(PingPurpose.IDLE)

    def _may_refuse(self) -> bool:
        if self.closed or self.going_away or self.awaiting_life or self.interval is None:
            return True
        assert self.ping_at is not None
        return self.extra_or_nearly >= 2 and self.now - self.ping_at < self.least

    def _sent(self, purpose: PingPurpose) -> None:
        timer = self.timer
        assert not self.closed
        assert not self.awaiting_life, "two PINGs outstanding"
        assert (timer.last_ping_at, timer.last_ping_purpose) == (self.now, purpose)
        assert len(timer.payload) == 8
        assert timer.payload not in (self.payload, *self.overtaken)
        if purpose is not PingPurpose.USER:
            if self.ping_at is not None:
                self.extra += self.now - self.ping_at < self.least - EPSILON
                self.extra_or_nearly += self.now - self.ping_at < self.least + EPSILON
            assert self.extra <= 2, "more than two beyond the rate without progress (K16)"
            self.own_pings += 1
        assert timer.note_calm(b"") == (self.own_pings >= 2)
        self.pings += 1
        if self.payload:
            self.overtaken.append(self.payload)
        self.payload = timer.payload
        self.ping_at = self.now
        self.awaiting_life = self.awaiting_ack = True
        self.gaps = self.late_moves = self.uploads = 0
        self.overdue = 0.0
        self.steps = []


policies = st.builds(
    Keepalive,
    read_idle_timeout=st.sampled_from([None, 0.5, 10.0, 30.0, 30.0, 300.0]),
    ping_timeout=st.sampled_from([0.1, 5.0, 15.0, 60.0]),
    while_idle=st.booleans(),
    jitter=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
)
starts = st.sampled_from([0.0, -7.5, 12_345.678, 1e6])
#: Short and long waits, and those around the rules' own thresholds.
waits = st.one_of(
    st.sampled_from([0.0, 0.001, STEP, 0.3, LATE, 0.6, 1.0, 15.0, 27.0, 30.0]), st.floats(0.0, 100.0, allow_nan=False)
)
lateness = st.sampled_from([0.0, 0.01, 0.49, 0.51, 2.0, 20.0, 1000.0])


class Schedules(RuleBasedStateMachine):
    """Arbitrary interleavings."""

    def __init__(self) -> None:
        super().__init__()
        self.referee: Referee

    @initialize(policy=policies, start=starts, seed=st.integers(0, 9), streams=st.integers(0, 2))
    def begin(self, policy: Keepalive, start: float, seed: int, streams: int) -> None:
        self.referee = Referee(policy, start, seed)
        for _ in range(streams):
            self.referee.open_stream()

    @rule(seconds=waits)
    def advance(self, seconds: float) -> None:
        self.referee.advance(seconds)

    @rule(times=st.integers(1, 4))
    def handle_on_time(self, times: int) -> None:
        for _ in range(times):
            self.referee.advance_to_deadline()
            self.referee.handle_timeout()

    @rule(late=lateness)
    def handle_late(self, late: float) -> None:
        self.referee.advance_to_deadline(late)
        self.referee.handle_timeout()

    @rule()
    def handle_at_any_time(self) -> None:
        self.referee.handle_timeout()

    @rule()
    def life(self) -> None:
        self.referee.note_life()

    @rule()
    def progress(self) -> None:
        self.referee.note_progress()

    @rule()
    def right_ack(self) -> None:
        self.referee.note_ack(self.referee.payload)

    @rule(payload=st.binary(min_size=8, max_size=8))
    def wrong_ack(self, payload: bytes) -> None:
        self.referee.note_ack(payload)

    @precondition(lambda self: self.referee.overtaken)
    @rule()
    def overtaken_ack(self) -> None:
        self.referee.note_ack(self.referee.overtaken[-1])

    @rule()
    def open_stream(self) -> None:
        self.referee.open_stream()

    @precondition(lambda self: self.referee.streams)
    @rule()
    def close_stream(self) -> None:
        self.referee.close_stream()

    @rule(age=waits)
    def cancel(self, age: float) -> None:
        self.referee.cancel(age)

    @rule()
    def checkout(self) -> None:
        self.referee.ping_for_checkout()

    @rule()
    def user_ping(self) -> None:
        self.referee.ping_for_user()

    @rule()
    def gap(self) -> None:
        self.referee.note_gap()

    @rule()
    def distrust(self) -> None:
        self.referee.distrust()

    @rule()
    def upload_progress(self) -> None:
        self.referee.note_upload_progress()

    @rule()
    def going_away(self) -> None:
        self.referee.note_going_away()

    @rule(factor=st.floats(0.5, 20.0))
    def another_interval(self, factor: float) -> None:
        self.referee.use_interval(factor)

    @precondition(lambda self: self.referee.pings)
    @rule()
    def close(self) -> None:
        self.referee.close()

    @invariant()
    def bounds_hold(self) -> None:
        self.referee.check()


def test_k3_k4_k7_k9_k10_k11_k14_k16_k17_k25_bounds_hold_in_every_schedule() -> None:
    run_state_machine_as_test(
        Schedules,
        settings=settings(
            max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


def play(source: random.Random, moves: int) -> Referee:
    """One random schedule, up to the loss."""
    referee = Referee(
        Keepalive(
            read_idle_timeout=source.choice([None, 0.5, 10.0, 30.0, 30.0, 300.0]),
            ping_timeout=source.choice([0.1, 5.0, 15.0, 60.0]),
            while_idle=source.random() < 0.5,
            jitter=source.choice([0.0, 0.1, 0.5, 0.9]),
        ),
        source.choice([0.0, -7.5, 1e6]),
        source.randrange(1000),
    )
    # Each schedule has its own temper, or all would be alike: always answered, never answered, always late ...
    choices: list[tuple[Callable[[], object], float]] = [
        (lambda: referee.advance(source.choice([0.0, 0.01, 0.6, source.uniform(0, 60)])), source.random()),
        (referee.advance_to_deadline, source.random()),
        (lambda: referee.advance_to_deadline(source.choice([0.3, 0.7, 30.0])), source.random() ** 4),
        (referee.handle_timeout, 3 * source.random()),
        (referee.note_life, source.random() ** 4),
        (referee.note_progress, source.random() ** 4),
        (lambda: referee.note_ack(referee.payload), source.random() ** 4),
        (lambda: referee.note_ack(b"somebody"), source.random() ** 4 / 4),
        (referee.open_stream, source.random()),
        (lambda: referee.close_stream() if referee.streams else None, source.random()),
        (lambda: referee.cancel(source.uniform(0, 10)), source.random() ** 2),
        (referee.ping_for_checkout, source.random() ** 2),
        (referee.ping_for_user, source.random() ** 4),
        (referee.note_gap, source.random() ** 4),
        (referee.note_upload_progress, source.random() ** 2),
        (referee.note_going_away, source.random() ** 4 / 16),
        (lambda: referee.use_interval(source.uniform(0.5, 11.0)), source.random() ** 4 / 4),
        (referee.close, source.random() ** 4 / 64),
    ]
    for move in source.choices([move for move, _ in choices], [weight for _, weight in choices], k=moves):
        move()
        referee.check()
        if referee.lost:
            break
    return referee


def test_k4_k7_k11_k16_k17_k25_bounds_hold_in_thousands_of_random_schedules() -> None:
    referees = [play(random.Random(seed), 80) for seed in range(4000)]
    # The schedules are worth their time only if they go everywhere.
    assert sum(referee.lost for referee in referees) > 200
    assert sum(referee.lost and referee.extensions == 3 for referee in referees) > 10
    assert sum(referee.lost and referee.uploads > 2 for referee in referees) > 10
    assert sum(referee.acks for referee in referees) > 500
    assert sum(referee.last_idle_ping is not None for referee in referees) > 500
    assert sum(referee.extra == 2 for referee in referees) > 200


@given(policies, starts, st.integers(0, 2**32), st.lists(waits, max_size=20))
@settings(deadline=None)
def test_k3_k4_a_peer_that_dies_is_found_in_time(
    policy: Keepalive, start: float, seed: int, lives: list[float]
) -> None:
    """With every deadline handled on time: within read_idle_timeout + ping_timeout + 20 ms of the last life."""
    referee = Referee(policy, start, seed)
    referee.open_stream()
    for wait in lives:
        while (deadline := referee.timer.next_deadline()) is not None and deadline <= referee.now + wait:
            wait -= max(0.0, deadline - referee.now)
            referee.advance_to_deadline()
            if referee.handle_timeout() is Verdict.LOST:
                return
            referee.check()
        referee.advance(max(0.0, wait))
        referee.note_life()
        referee.check()
    if policy.read_idle_timeout is None:
        assert referee.timer.next_deadline() is None
        return
    while not referee.lost:
        referee.advance_to_deadline()
        referee.handle_timeout()
        referee.check()
    assert referee.ping_at is not None
    assert referee.now == pytest.approx(referee.ping_at + policy.ping_timeout + STEP, abs=EPSILON)
    least = (1 - policy.jitter) * policy.read_idle_timeout
    assert least - EPSILON <= referee.ping_at - referee.life <= policy.read_idle_timeout + EPSILON


@given(
    answer_after=st.floats(0.0, 14.9),
    stalls=st.lists(
        st.tuples(st.integers(0, 8), st.floats(0.51, 100_000.0)), max_size=3, unique_by=lambda item: item[0]
    ),
)
@settings(deadline=None)
def test_k7_a_healthy_connection_survives_any_three_stalls(
    answer_after: float, stalls: list[tuple[int, float]]
) -> None:
    """The answer arrives in time, but in up to three wake-ups the timer comes late and the reader gets no turn."""
    referee = Referee(Keepalive(jitter=0.0), 0.0, 0)
    referee.open_stream()
    referee.advance_to_deadline()
    assert referee.handle_timeout() is Verdict.SEND_PING
    arrives = referee.now + answer_after
    stall_at = dict(stalls)
    for wake in range(10):
        stall = stall_at.get(wake, 0.0)
        referee.advance_to_deadline(stall)
        assert referee.handle_timeout() is not Verdict.LOST
        if not stall and referee.now >= arrives:
            referee.note_life()
            break
    assert not referee.timer.outstanding


@given(st.lists(st.tuples(st.floats(10.0, 2000.0), st.floats(0.0, 20_000.0)), max_size=20), st.floats(1.0, 1000.0))
def test_k13_the_origins_interval_stays_within_its_bounds(
    punishments: list[tuple[float, float]], configured: float
) -> None:
    memory = IntervalMemory(configured)
    cap = max(configured, 330.0)
    now = 0.0
    for used, pause in punishments:
        now += pause
        expected = memory.current(now)
        before, after = memory.punish(used, now)
        assert before == expected
        assert configured <= before <= after <= cap
        assert after >= min(2 * used, cap)
        assert memory.current(now) == after
        assert memory.current(now + 3599.0) == after
        assert memory.current(now + 3601.0) == max(configured, after / 2)
