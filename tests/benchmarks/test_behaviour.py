"""The behaviour harness judges rightly what it saw, and sees rightly what happens; its page is what it found."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest
from benchmarks.behaviour.__main__ import PAGE, RESULTS
from benchmarks.behaviour.cell import PING_TIMEOUT, READ_IDLE_TIMEOUT, ROOT, Cell
from benchmarks.behaviour.faults import FAULTS
from benchmarks.behaviour.judge import Attempt, Judgement, Record, detects, judge, worse
from benchmarks.behaviour.network import ENTER, permitted
from benchmarks.behaviour.report import Matrix, Results, outcome, render
from benchmarks.server import Kit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FAULT = {fault.name: fault for fault in FAULTS}
BOUND = READ_IDLE_TIMEOUT + PING_TIMEOUT


def answered(ended: float, *, started: float = -1.0, received: int = 20) -> Attempt:
    return Attempt(1, started, 20, ended, 200, received)


def failed(ended: float, *, started: float = -1.0, error: str = "PingTimeout") -> Attempt:
    return Attempt(1, started, 20, ended, error=(error, "the connection is dead"))


def hung(*, started: float = -1.0) -> Attempt:
    return Attempt(1, started, 20)


def record(
    *attempts: Attempt,
    fault: str = "blackhole-wait",
    client: str = "h2keep",
    arrivals: Sequence[int] = (1,),
    probe: Attempt | None = None,
    pings: Sequence[float] = (),
) -> Record:
    """A record as `Cell` makes them; the next request is answered unless `probe` says otherwise."""
    following = probe or answered(9.1, started=9.0)
    return Record(fault, client, list(attempts), following, dict(enumerate(arrivals, 1)), list(pings))


class TestJudgement:
    def test_answers(self) -> None:
        judged = judge(
            record(answered(1.5), answered(4.0), arrivals=(1, 1), probe=answered(9.5, started=9.0), pings=[1.0])
        )
        assert judged == Judgement("ok", 4.0, None, (), 0, 0, 1, "ok", 0.5)

    def test_the_last_error_is_the_time_to_detection(self) -> None:
        judged = judge(record(answered(0.5), failed(2.0), failed(2.5, error="ReadError")))
        assert (judged.outcome, judged.seconds, judged.first_error, judged.lost) == ("error", 2.5, 2.0, 2)
        assert judged.errors == ("PingTimeout", "ReadError")

    def test_a_request_made_after_the_fault_is_timed_from_its_beginning(self) -> None:
        assert judge(record(failed(3.0, started=1.5))).seconds == 1.5

    def test_one_that_hangs_is_worse_than_one_that_fails(self) -> None:
        judged = judge(record(failed(2.0), hung()))
        assert (judged.outcome, judged.seconds, judged.lost) == ("hung", None, 2)

    def test_a_truncated_answer_is_an_error(self) -> None:
        judged = judge(record(answered(1.0, received=19)))
        assert (judged.outcome, judged.errors, judged.lost) == ("error", ("wrong answer",), 1)

    def test_each_arrival_beyond_the_first_counts_as_sent_twice(self) -> None:
        assert judge(record(answered(1.0), arrivals=(1, 2, 3, 0))).twice == 3

    def test_a_next_request_that_hangs(self) -> None:
        judged = judge(record(answered(1.0), probe=hung(started=9.0)))
        assert (judged.next, judged.next_seconds) == ("hung", None)

    @pytest.mark.parametrize(
        ("attempt", "detected"),
        [(failed(BOUND), True), (failed(BOUND + 0.6), False), (hung(), False), (failed(0.1), True)],
        ids=["in time", "late", "hung", "at once"],
    )
    def test_detection_has_a_bound(self, attempt: Attempt, *, detected: bool) -> None:
        assert detects(judge(record(attempt)), BOUND) is detected


class TestComparison:
    def test_the_same_is_not_worse(self) -> None:
        assert list(worse(judge(record(failed(2.0))), judge(record(failed(2.0))))) == []

    def test_in_what_a_cell_can_be_worse(self) -> None:
        good = judge(record(answered(1.0), answered(1.0)))
        bad = judge(record(hung(), failed(2.0), arrivals=(2, 1), probe=failed(10.0, started=9.0)))
        assert list(worse(bad, good)) == ["hung", "lost 2, not 0", "sent 1 twice, not 0", "next request error"]
        assert list(worse(good, bad)) == []

    def test_later_counts_where_all_else_is_equal(self) -> None:
        sooner, later = judge(record(failed(1.0))), judge(record(failed(2.0)))
        assert list(worse(later, sooner)) == ["2.0 s, not 1.0 s"]
        assert list(worse(sooner, later)) == []
        assert list(worse(judge(record(failed(1.3))), sooner)) == []

    def test_the_matrix_names_every_miss(self) -> None:
        matrix = Matrix(
            [
                record(hung()),
                record(failed(2.0), client="go"),
                record(failed(1.0), client="h2keep-sync", fault="goaway"),
                record(answered(1.0), client="go", fault="goaway"),
            ]
        )
        assert [(miss.client, miss.why) for miss in matrix.undetected()] == [("h2keep", "**hung**, 1 lost")]
        assert [(miss.client, miss.why) for miss in matrix.lost_in_vain()] == [("h2keep-sync", "1.0 s, 1 lost")]
        assert [(miss.client, miss.why) for miss in matrix.worse()] == [
            ("h2keep", "than Go net/http: hung"),
            ("h2keep-sync", "than Go net/http: lost 1, not 0"),
        ]


class TestPage:
    def test_records_survive_their_file(self) -> None:
        one = record(answered(1.0), failed(2.0), hung(), arrivals=(1, 2), pings=[1.0])
        assert Record.from_json(json.loads(json.dumps(asdict(one)))) == one

    def test_it_is_what_was_found(self) -> None:
        assert PAGE.read_text() == render(Results.from_json(json.loads(RESULTS.read_text())))

    def test_it_says_what_is_missing(self) -> None:
        about = {"when": "today", "commit": None, "modified": True, "system": "any", "cores": 2, "python": "3"}
        disturbed = record(failed(2.0))
        disturbed.disturbed = 0.44
        page = render(Results({**about, "versions": {}}, [disturbed], None, ["goaway, go: no server"]))
        assert "permits no network namespaces" in page
        assert "Not measured: goaway, go: no server." in page
        assert "too busy each time: blackhole-wait of h2keep, async by 0.4 s." in page
        assert "Every silent fault is detected in time: **holds in all 1 cells.**" in page

    @pytest.mark.parametrize(
        ("judged", "words"),
        [
            (judge(record(answered(4.0))), "ok"),
            (judge(record(failed(2.04), failed(1.0))), "2.0 s, 2 lost"),
            (judge(record(hung(), arrivals=(2,), probe=hung())), "**hung**, 1 lost, **1 twice**, next: **hung**"),
        ],
    )
    def test_a_cell_in_words(self, judged: Judgement, words: str) -> None:
        assert outcome(judged) == words


class TestCells:
    """Some fast ones, for real."""

    @pytest.fixture
    def kit(self, cert_path: Path, key_path: Path, ca_path: Path, tmp_path: Path) -> Kit:
        pem = tmp_path / "server.pem"
        pem.write_bytes(key_path.read_bytes() + cert_path.read_bytes())
        return Kit(pem, ca_path)

    def test_a_black_hole_is_detected_and_the_ping_into_it_counted(self, kit: Kit) -> None:
        seen = asyncio.run(Cell(FAULT["blackhole-wait"], "h2keep", kit).run())
        judged = judge(seen)
        assert (judged.outcome, judged.errors, judged.lost, judged.twice) == ("error", ("PingTimeout",), 3, 0)
        assert judged.next == "ok"
        assert judged.pings == 1
        assert judged.first_error is not None
        assert judged.first_error > PING_TIMEOUT
        assert seen.swallowed

    def test_after_goaway_each_request_is_processed_once(self, kit: Kit) -> None:
        seen = asyncio.run(Cell(FAULT["goaway"], "h2keep-sync", kit).run())
        assert [attempt.outcome for attempt in seen.attempts] == ["ok"] * 6
        assert seen.arrivals == dict.fromkeys(range(1, 8), 1)

    def test_a_reset_is_an_error_at_once(self, kit: Kit) -> None:
        judged = judge(asyncio.run(Cell(FAULT["reset"], "httpx2", kit).run()))
        assert (judged.outcome, judged.lost, judged.twice, judged.pings, judged.next) == ("error", 3, 0, 0, "ok")

    def test_where_packets_can_really_be_lost_they_are(self, tmp_path: Path) -> None:
        found = tmp_path / "network.json"
        cell = ["--faults", "loss-up", "--clients", "h2keep"]
        command = [*ENTER, sys.executable, "-m", "benchmarks.behaviour", "--network", str(found), *cell]
        if not permitted():
            with pytest.raises((OSError, subprocess.CalledProcessError)):
                subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
            return
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        (only,) = json.loads(found.read_text())["records"]
        judged = judge(Record.from_json(only))
        assert (judged.outcome, judged.errors, judged.lost, judged.next) == ("error", ("PingTimeout",), 3, "ok")
        assert judged.first_error is not None
        assert judged.first_error > PING_TIMEOUT
