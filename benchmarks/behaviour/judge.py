"""What a cell's record means: outcome, time to detection, what was lost, what was sent twice; and who did worse.

No I/O and no clocks: records come from `cell`, or out of a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Outcome: TypeAlias = Literal["ok", "error", "hung"]

#: Differences in time below this, in seconds, are those of the machine.
TOLERANCE = 0.5


@dataclass
class Attempt:
    """One request, as the application saw it."""

    id: int
    started: float
    size: int
    ended: float | None = None
    status: int | None = None
    received: int | None = None
    #: The type of the error and its words, if it ended in one.
    error: tuple[str, str] | None = None

    @property
    def outcome(self) -> Outcome:
        if self.ended is None:
            return "hung"
        return "ok" if (self.status, self.received) == (200, self.size) else "error"


@dataclass
class Record:
    """All that was seen of one client under one fault. Times are seconds since the fault."""

    fault: str
    client: str
    attempts: list[Attempt]
    #: The request made when all was over and new connections worked.
    probe: Attempt
    #: How often each request's head came to where a request is processed, even later on.
    arrivals: dict[int, int]
    pings: list[float] = field(default_factory=list)
    #: By how many seconds a busy machine delayed harness, server or client: see `heartbeat`.
    disturbed: float = 0.0
    #: When bytes came out of the client and when they came to it; those that the path swallowed.
    up: list[float] = field(default_factory=list)
    down: list[float] = field(default_factory=list)
    swallowed: list[float] = field(default_factory=list)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Undo `dataclasses.asdict` and JSON."""
        return cls(
            **{
                **data,
                "attempts": [_attempt(attempt) for attempt in data["attempts"]],
                "probe": _attempt(data["probe"]),
                "arrivals": {int(number): count for number, count in data["arrivals"].items()},
            }
        )


def _attempt(data: Mapping[str, Any]) -> Attempt:
    return Attempt(**{**data, "error": tuple(data["error"]) if data["error"] else None})


@dataclass(frozen=True)
class Judgement:
    """A cell of the matrix."""

    #: The worst that happened to any request.
    outcome: Outcome
    #: From the fault, or the request's beginning if that was later, to the last answer, or to the last error if there
    #: were errors: the time to detection. None if requests hung.
    seconds: float | None
    #: How long it took until the first error, None if there was none.
    first_error: float | None
    errors: tuple[str, ...]
    lost: int
    twice: int
    pings: int
    next: Outcome
    next_seconds: float | None


def judge(record: Record) -> Judgement:
    """Turn a record into a cell of the matrix."""
    failed = [attempt for attempt in record.attempts if attempt.outcome != "ok"]
    took = [_took(attempt) for attempt in (failed or record.attempts)]
    known = [seconds for seconds in took if seconds is not None]
    hung = any(attempt.outcome == "hung" for attempt in failed)
    errors = {attempt.error[0] if attempt.error else "wrong answer" for attempt in failed if attempt.outcome == "error"}
    return Judgement(
        outcome="hung" if hung else "error" if failed else "ok",
        seconds=None if hung else max(known),
        first_error=min(known) if failed and known else None,
        errors=tuple(sorted(errors)),
        lost=len(failed),
        twice=sum(max(0, count - 1) for count in record.arrivals.values()),
        pings=len(record.pings),
        next=record.probe.outcome,
        next_seconds=None if record.probe.ended is None else record.probe.ended - record.probe.started,
    )


def _took(attempt: Attempt) -> float | None:
    return None if attempt.ended is None else attempt.ended - max(0.0, attempt.started)


def worse(ours: Judgement, theirs: Judgement) -> Iterator[str]:
    """In what `ours` is worse than `theirs`; PINGs are a means, not an end."""
    if ours.outcome == "hung" != theirs.outcome:
        yield "hung"
    if ours.lost > theirs.lost:
        yield f"lost {ours.lost}, not {theirs.lost}"
    if ours.twice > theirs.twice:
        yield f"sent {ours.twice} twice, not {theirs.twice}"
    if (ours.next != "ok") > (theirs.next != "ok"):
        yield f"next request {ours.next}"
    if (
        ours.outcome == theirs.outcome
        and ours.lost == theirs.lost
        and ours.seconds is not None
        and theirs.seconds is not None
        and ours.seconds > theirs.seconds + TOLERANCE
    ):
        yield f"{ours.seconds:.1f} s, not {theirs.seconds:.1f} s"


def detects(judgement: Judgement, bound: float) -> bool:
    """Whether no request waited for longer than `bound` seconds, bar TOLERANCE, under a silent fault."""
    return judgement.outcome != "hung" and judgement.seconds is not None and judgement.seconds <= bound + TOLERANCE
