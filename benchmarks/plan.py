"""What is measured, of whom, and which figures the project holds itself to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ALL = ("h2keep", "h2keep-httpx2", "h2keep-httpx", "httpx2", "httpx", "pyreqwest", "pyreqwest-httpx", "null-httpx2")
ON_THE_WIRE = ALL[:-1]
BLOCKING = ("h2keep", "h2keep-httpx2", "h2keep-httpx", "httpx2", "httpx", "pyreqwest-httpx")
IMPORTS = ("h2keep", "h2keep-httpx2", "h2keep-httpx", "httpx2", "httpx", "pyreqwest")


@dataclass(frozen=True)
class Column:
    """A metric as the tables show it."""

    metric: str
    title: str
    form: str = ",.0f"


BUSY = (Column("client_busy", "client busy", ".0%"), Column("server_busy", "server busy", ".0%"))
LATENCY = (Column("p50_ms", "p50 ms", ".2f"), Column("p99_ms", "p99 ms", ".2f"))


@dataclass(frozen=True)
class Case:
    """One workload with its numbers. `quick` replaces some of them for a run that only looks whether all works."""

    name: str
    scenario: str
    parameters: Mapping[str, float]
    columns: tuple[Column, ...]
    candidates: tuple[str, ...] = ON_THE_WIRE
    quick: Mapping[str, float] = field(default_factory=dict)
    one_connection: bool = True

    def numbers(self, *, quick: bool) -> Mapping[str, float]:
        return {**self.parameters, **(self.quick if quick else {})}


def _rr(concurrency: int) -> Case:
    return Case(
        f"rr@{concurrency}",
        "rr",
        {"concurrency": concurrency, "warmup": 0.5, "seconds": 3},
        (Column("per_second", "requests/s"), Column("cpu_us", "client CPU µs/request"), *LATENCY, *BUSY),
        ALL,
        {"warmup": 0.2, "seconds": 0.8},
    )


def _threads(concurrency: int) -> Case:
    return Case(
        f"threads@{concurrency}",
        "threads",
        {"concurrency": concurrency, "warmup": 0.5, "seconds": 3},
        (Column("per_second", "requests/s"), Column("cpu_us", "client CPU µs/request"), *LATENCY, *BUSY),
        BLOCKING,
        {"warmup": 0.2, "seconds": 0.8},
    )


def _fanin(concurrency: int, wait: float) -> Case:
    return Case(
        f"fanin@{concurrency}",
        "fanin",
        {"concurrency": concurrency, "wait": wait, "warmup": 1, "seconds": 5},
        (
            Column("per_second", "requests/s"),
            Column("cpu_us", "client CPU µs/request"),
            Column("p50_ms", "p50 late by ms", ".2f"),
            Column("p99_ms", "p99 late by ms", ".2f"),
            Column("connections", "connections"),
            *BUSY,
        ),
        quick={"seconds": 1.5},
        one_connection=False,
    )


CASES = (
    _rr(16),
    _rr(1),
    _rr(100),
    Case(
        "download",
        "download",
        {"mib": 48, "repeats": 5},
        (
            Column("per_second", "MiB/s"),
            Column("first", "first MiB/s"),
            Column("cpu_us", "client CPU µs/MiB"),
            *BUSY,
        ),
        ALL,
        {"repeats": 2},
    ),
    Case(
        "sse",
        "sse",
        {"events": 50_000},
        (Column("per_second", "events/s"), Column("cpu_us", "client CPU µs/event", ".1f"), *BUSY),
        ALL,
        {"events": 10_000},
    ),
    Case(
        "sse-singly",
        "sse-singly",
        {"events": 100, "interval": 0.01},
        (Column("singly", "singly", ".0%"), *LATENCY, Column("cpu_us", "client CPU µs/event")),
        quick={"events": 20},
    ),
    Case(
        "bulk-latency",
        "bulk-latency",
        {"downloads": 4, "warmup": 1, "seconds": 5},
        (*LATENCY, Column("requests", "requests"), Column("per_second", "bulk MiB/s"), *BUSY),
        quick={"seconds": 2},
    ),
    # Both about 2,048 requests a second: only how many are in flight differs.
    _fanin(16, 16 / 2048),
    _fanin(4096, 2.0),
    _threads(16),
    _threads(1),
    Case(
        "blocking-download",
        "blocking-download",
        {"mib": 48, "repeats": 5},
        (Column("per_second", "MiB/s"), Column("first", "first MiB/s"), Column("cpu_us", "client CPU µs/MiB"), *BUSY),
        BLOCKING,
        {"repeats": 2},
    ),
    Case(
        "storm",
        "storm",
        {"concurrency": 100, "requests": 200, "rounds": 10},
        (
            Column("per_second", "requests/s"),
            Column("grown", "memory grown", ".1%"),
            Column("resident_mib", "MiB in use"),
            *BUSY,
        ),
        ("h2keep", "h2keep-httpx2"),
        {"concurrency": 20, "requests": 20, "rounds": 3},
        one_connection=False,
    ),
    Case(
        "import", "import", {}, (Column("ms", "ms beyond h2 and anyio", ".1f"), Column("modules", "modules")), IMPORTS
    ),
)


@dataclass(frozen=True)
class Value:
    """One candidate's median in one case."""

    case: str
    candidate: str
    metric: str


@dataclass(frozen=True)
class Figure:
    """A value, or the ratio of two, and the bound that it is held to, if there is one."""

    what: str
    value: Value
    over: Value | None = None
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"

    def passes(self, measured: float) -> bool | None:
        if self.at_least is not None:
            return measured >= self.at_least
        return None if self.at_most is None else measured <= self.at_most


def _ratio(
    case: str, metric: str, mine: str, theirs: str, *, at_least: float | None = None, at_most: float | None = None
) -> Figure:
    what = f"{case}: {mine} / {theirs}, {metric}"
    return Figure(what, Value(case, mine, metric), Value(case, theirs, metric), at_least, at_most)


def _fanin_growth(candidate: str, at_most: float | None) -> Figure:
    few, many = (Value(f"fanin@{number}", candidate, "cpu_us") for number in (16, 4096))
    return Figure(f"fanin: {candidate}, CPU a request at 4,096 / 16 in flight", many, few, at_most=at_most)


FIGURES = (
    _ratio("rr@16", "per_second", "h2keep-httpx2", "httpx2", at_least=2.7),
    _ratio("rr@1", "per_second", "h2keep-httpx2", "httpx2"),
    _ratio("rr@100", "per_second", "h2keep-httpx2", "httpx2"),
    _ratio("rr@16", "per_second", "h2keep-httpx", "pyreqwest-httpx", at_least=1.2),
    _ratio("rr@1", "per_second", "h2keep-httpx", "pyreqwest-httpx"),
    _ratio("rr@100", "per_second", "h2keep-httpx", "pyreqwest-httpx"),
    _ratio("rr@16", "per_second", "h2keep", "pyreqwest", at_least=0.75),
    _ratio("rr@1", "per_second", "h2keep", "pyreqwest"),
    _ratio("rr@100", "per_second", "h2keep", "pyreqwest", at_least=0.6),
    _ratio("rr@16", "cpu_us", "h2keep-httpx2", "httpx2"),
    _ratio("rr@16", "cpu_us", "h2keep", "pyreqwest"),
    _ratio("download", "per_second", "h2keep-httpx2", "httpx2", at_least=3.3),
    _ratio("download", "per_second", "h2keep", "pyreqwest"),
    _ratio("sse", "per_second", "h2keep-httpx2", "httpx2", at_least=5.5),
    _ratio("sse", "per_second", "h2keep", "pyreqwest"),
    Figure("sse-singly: share", Value("sse-singly", "h2keep-httpx2", "singly"), at_least=1, unit=""),
    Figure("sse-singly: share, direct", Value("sse-singly", "h2keep", "singly"), at_least=1, unit=""),
    Figure("bulk-latency: p99", Value("bulk-latency", "h2keep-httpx2", "p99_ms"), at_most=15, unit=" ms"),
    Figure("bulk-latency: p99, direct", Value("bulk-latency", "h2keep", "p99_ms"), at_most=15, unit=" ms"),
    _fanin_growth("h2keep-httpx2", 1.3),
    _fanin_growth("h2keep", 1.3),
    _fanin_growth("httpx2", None),
    _fanin_growth("pyreqwest", None),
    _ratio("threads@16", "per_second", "h2keep-httpx2", "httpx2", at_least=2.4),
    _ratio("threads@16", "per_second", "h2keep-httpx", "pyreqwest-httpx", at_least=0.9),
    _ratio("threads@16", "per_second", "h2keep", "httpx2", at_least=5),
    _ratio("threads@1", "per_second", "h2keep-httpx2", "httpx2", at_least=0.6),
    _ratio("threads@1", "per_second", "h2keep", "httpx2", at_least=0.9),
    _ratio("blocking-download", "per_second", "h2keep-httpx2", "httpx2", at_least=1.5),
    Figure("storm: memory grown", Value("storm", "h2keep-httpx2", "grown"), at_most=0.05, unit=""),
    Figure("storm: memory grown, direct", Value("storm", "h2keep", "grown"), at_most=0.05, unit=""),
    Figure("import: h2keep, beyond h2 and anyio", Value("import", "h2keep", "ms"), at_most=80, unit=" ms"),
)
