"""Many connections' deadlines on few of asyncio's timers."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING

import pytest

from h2keep.runner.eventloop import AsyncioAlarms
from support.clock import VirtualLoop

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator


class Sleeper:
    def __init__(self, then: Callable[[float], None] | None = None) -> None:
        self.woken: list[float] = []
        self._then = then

    def time_is_up(self, moment: float) -> None:
        self.woken.append(moment)
        if self._then is not None:
            self._then(moment)


class CountingLoop(VirtualLoop):
    timers = 0

    def call_at(self, *args: object, **options: object) -> asyncio.TimerHandle:
        self.timers += 1
        return super().call_at(*args, **options)  # type: ignore[arg-type]


@pytest.fixture
def loop() -> Iterator[CountingLoop]:
    loop = CountingLoop()
    yield loop
    loop.close()


@pytest.fixture
def alarms(loop: CountingLoop) -> AsyncioAlarms:
    return AsyncioAlarms(loop, contextvars.Context())


def run_until(loop: CountingLoop, moment: float) -> None:
    end = loop.create_future()
    loop.call_at(moment, end.set_result, None)
    loop.run_until_complete(end)


def test_k14_those_of_one_moment_share_a_timer(loop: CountingLoop, alarms: AsyncioAlarms) -> None:
    early, late = [Sleeper() for _ in range(100)], [Sleeper() for _ in range(100)]
    for one, other in zip(early, late, strict=True):
        alarms.wake(one, 1.0)
        alarms.wake(other, 2.0)
    assert loop.timers == 2
    run_until(loop, 1.5)
    assert all(sleeper.woken == [1.0] for sleeper in early)
    assert not any(sleeper.woken for sleeper in late)
    run_until(loop, 3.0)
    assert all(sleeper.woken == [2.0] for sleeper in late)


def test_k14_who_is_let_sleep_sleeps_and_nothing_stays_behind(loop: CountingLoop, alarms: AsyncioAlarms) -> None:
    one, other = Sleeper(), Sleeper()
    alarms.wake(one, 1.0)
    alarms.wake(other, 1.0)
    alarms.let_sleep(one, 1.0)
    run_until(loop, 1.5)
    assert (one.woken, other.woken) == ([], [1.0])
    # Too late, and twice: it makes no difference.
    alarms.let_sleep(other, 1.0)
    alarms.wake(one, 2.0)
    alarms.let_sleep(one, 2.0)
    alarms.let_sleep(one, 2.0)
    assert not alarms._moments
    run_until(loop, 3.0)
    assert one.woken == []


def test_whoever_is_woken_may_ask_for_the_same_moment_again(loop: CountingLoop, alarms: AsyncioAlarms) -> None:
    def again(moment: float) -> None:
        if len(sleeper.woken) < 3:
            alarms.wake(sleeper, moment)

    sleeper = Sleeper(again)
    alarms.wake(sleeper, 1.0)
    run_until(loop, 2.0)
    assert sleeper.woken == [1.0] * 3


def test_an_interruption_makes_nobody_else_sleep_for_ever(loop: CountingLoop, alarms: AsyncioAlarms) -> None:
    def interrupt(_moment: float) -> None:
        raise KeyboardInterrupt

    sleepers = [Sleeper(), Sleeper(interrupt), Sleeper()]
    for sleeper in sleepers:
        alarms.wake(sleeper, 1.0)
    with pytest.raises(KeyboardInterrupt):
        run_until(loop, 2.0)
    run_until(loop, 3.0)
    assert [sleeper.woken for sleeper in sleepers] == [[1.0]] * 3
