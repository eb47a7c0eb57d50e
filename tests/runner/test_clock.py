"""Time that the monotonic clock doesn't see: `GapWatch` by itself, and what a gap does to a connection (K25)."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep.runner.clock import GapWatch, suspend_counting_clock
from support.clock import virtual_time
from support.raw import answering

if TYPE_CHECKING:
    from runner.conftest import Ends


class Clocks:
    """Three clocks: the loop's, one that counts suspension, and the wall's."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.asleep = 0.0
        self.set_forward = 0.0

    def watch(self) -> GapWatch:
        return GapWatch(lambda: self.now, lambda: self.now + self.asleep, self.wall)

    def wall(self) -> float:
        return self.now + self.asleep + self.set_forward


def test_k25_time_that_all_clocks_see_is_no_gap() -> None:
    clocks = Clocks()
    watch = clocks.watch()
    for seconds in (0.0, 0.1, 10_000.0):
        clocks.now += seconds
        assert watch.check(clocks.now) == (0.0, False)


def test_k25_suspension_is_reported_once() -> None:
    clocks = Clocks()
    watch = clocks.watch()
    clocks.now += 5.0
    clocks.asleep += 60.0
    assert watch.check(clocks.now) == (60.0, True)
    assert watch.check(clocks.now) == (0.0, False)
    clocks.asleep += 2.0
    assert watch.check(clocks.now) == (2.0, False)


@pytest.mark.parametrize(("seconds", "gap"), [(0.875, 0.0), (1.0, 0.0), (1.125, 1.125)])
def test_k25_up_to_a_second_is_scheduling(seconds: float, gap: float) -> None:
    clocks = Clocks()
    clocks.now = 0.0
    watch = clocks.watch()
    clocks.asleep += seconds
    assert watch.check(clocks.now) == (gap, False)


def test_k25_slow_drift_never_adds_up_to_a_gap() -> None:
    clocks = Clocks()
    watch = clocks.watch()
    for _ in range(1_000):
        clocks.now += 10.0
        clocks.asleep += 0.01
        clocks.set_forward += 0.01
        assert watch.check(clocks.now) == (0.0, False)


@pytest.mark.parametrize(("seconds", "jumped"), [(4.9, False), (5.1, True), (-3600.0, False)])
def test_k25_a_wall_clock_that_jumps_ahead_is_told_apart(seconds: float, jumped: bool) -> None:
    clocks = Clocks()
    watch = clocks.watch()
    clocks.set_forward += seconds
    assert watch.check(clocks.now) == (0.0, jumped)
    assert watch.check(clocks.now) == (0.0, False)


def test_k25_a_clock_that_falls_behind_is_no_gap() -> None:
    clocks = Clocks()
    watch = clocks.watch()
    clocks.asleep -= 50.0
    assert watch.check(clocks.now) == (0.0, False)


def test_k25_the_platforms_clock_goes_on() -> None:
    clock = suspend_counting_clock()
    watch = GapWatch(time.monotonic)
    before = clock()
    assert watch.check(time.monotonic()) == (0.0, False)
    assert clock() > before


def test_k25_without_clock_boottime_the_next_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    assert suspend_counting_clock()() == pytest.approx(time.clock_gettime(time.CLOCK_MONOTONIC), abs=1.0)
    monkeypatch.delattr(time, "CLOCK_MONOTONIC", raising=False)
    assert suspend_counting_clock() is time.monotonic


# In the runner


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """The clocks of every connection, under virtual time."""
    clocks = Clocks()
    watch = functools.partial(
        GapWatch,
        suspended=lambda: anyio.current_time() + clocks.asleep,
        wall=lambda: anyio.current_time() + clocks.set_forward,
    )
    monkeypatch.setattr("h2keep.runner.connection.GapWatch", watch)
    return clocks


@virtual_time
@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
@pytest.mark.parametrize(
    ("asleep", "set_forward", "pings"), [(0.9, 0.0, 0), (1.1, 0.0, 1), (0.0, 4.9, 0), (0.0, 5.1, 1), (0.0, -60.0, 0)]
)
async def test_k25_k9_after_a_gap_a_connection_must_prove_itself(
    ends: Ends, machine: Clocks, asleep: float, set_forward: float, pings: int
) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering())
        await c.get(server.url)
        await anyio.sleep(1.0)
        machine.asleep += asleep
        machine.set_forward += set_forward
        await c.get(server.url)
        await c.get(server.url)
        assert len(server.peers) == 1
        assert len(server.peers[0].pings) == pings


@virtual_time
@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
@pytest.mark.parametrize(("gaps", "lost_after"), [(0, 45.0), (1, 60.0), (2, 75.0), (3, 90.0), (6, 90.0)])
async def test_k25_k7_a_gap_gives_an_outstanding_ping_its_time_anew_at_most_three_times(
    ends: Ends, machine: Clocks, gaps: int, lost_after: float
) -> None:
    async with ends.listen() as server, ends.client() as c, anyio.create_task_group() as tasks:

        async def sleep_at_times() -> None:
            await anyio.sleep(40.0)
            for _ in range(gaps):
                machine.asleep += 1_000.0
                await anyio.sleep(15.0)

        async def is_lost() -> None:
            began = anyio.current_time()
            with pytest.raises(h2keep.PingTimeout):
                await c.get(server.url)
            assert anyio.current_time() - began == pytest.approx(lost_after, abs=0.1)

        tasks.start_soon(sleep_at_times)
        tasks.start_soon(is_lost)
        peer = await server.accept()
        peer.auto_ack_pings = False
        await peer.handshake()
        await peer.until(lambda: bool(peer.seen(frames.PingFrame)))
        await anyio.sleep(80.0)
        assert len(peer.pings) == 1


@virtual_time
@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
async def test_k25_bytes_that_come_after_a_gap_are_life_like_any_other(ends: Ends, machine: Clocks) -> None:
    async with ends.listen() as server, ends.client() as c:
        server.serve(answering())
        await c.get(server.url)
        machine.asleep += 1_000.0
        await server.peers[0].ping()
        await c.get(server.url)
        assert not server.peers[0].pings
