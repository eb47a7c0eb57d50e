"""What is measured, of whom, and which figures the project holds itself to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.server import Demands

if TYPE_CHECKING:
    from collections.abc import Mapping

H2KEEP = ("h2keep", "h2keep-ngh2", "h2keep-httpx2", "h2keep-httpx2-ngh2")
# Everybody, on every loop: in one case, so that the others stay short.
ALL = (
    *H2KEEP,
    "h2keep@uvloop",
    "h2keep@trio",
    "h2keep-ngh2@uvloop",
    "h2keep-ngh2@trio",
    "h2keep-httpx2@uvloop",
    "h2keep-httpx2@trio",
    "h2keep-httpx2-ngh2@uvloop",
    "h2keep-httpx2-ngh2@trio",
    "h2keep-httpx",
    "h2keep-httpx@uvloop",
    "h2keep-httpx@trio",
    "h2keep-httpx-ngh2",
    "httpx2",
    "httpx",
    "pyreqwest",
    "pyreqwest-httpx",
    "niquests",
    "hyperhttp",
    "aiohttp",
    "go",
    "null-httpx2",
)
RR = (*H2KEEP, "h2keep-httpx", "httpx2", "pyreqwest", "pyreqwest-httpx", "aiohttp", "go")
BODIES = (
    *H2KEEP,
    "h2keep-httpx",
    "httpx2",
    "httpx",
    "pyreqwest",
    "pyreqwest-httpx",
    "niquests",
    "hyperhttp",
    "aiohttp",
)
FEW = (*H2KEEP, "httpx2", "pyreqwest", "go")
BLOCKING = (
    *H2KEEP,
    "h2keep-httpx",
    "h2keep-httpx-ngh2",
    "httpx2",
    "httpx",
    "pyreqwest-httpx",
    "niquests",
    "null-httpx2",
)
IMPORTS = ("h2keep", "h2keep-httpx2", "h2keep-httpx", "httpx2", "httpx", "pyreqwest")

#: Shown beside the others; measured in fewer rounds, as the time is better spent on those that are in a figure.
ORIENTATION = (
    "h2keep-httpx",
    "h2keep-httpx-ngh2",
    "httpx",
    "niquests",
    "hyperhttp",
    "aiohttp",
    "null-httpx2",
    "raw-tls",
    "h2",
)
ORIENTATION_ROUNDS = 3


@dataclass(frozen=True)
class Column:
    """A metric as the tables show it. `lower` is better, or higher."""

    metric: str
    title: str
    form: str = ",.0f"
    lower: bool = False


BUSY = (Column("client_busy", "client busy", ".0%"), Column("server_busy", "server busy", ".0%"))
LATENCY = (Column("p50_ms", "p50 ms", ".2f", lower=True), Column("p99_ms", "p99 ms", ".2f", lower=True))


@dataclass(frozen=True)
class Case:
    """One workload with its numbers, whose first column is what counts.

    `quick` replaces some numbers for a run that only looks whether all works. A case takes part in the first `rounds`
    rounds; candidates that take long and are only there for orientation are measured `once`. `limit`: seconds that one
    measurement may take.
    """

    name: str
    scenario: str
    parameters: Mapping[str, float]
    columns: tuple[Column, ...]
    candidates: tuple[str, ...]
    quick: Mapping[str, float] = field(default_factory=dict)
    one_connection: bool = True
    rounds: int = 99
    once: tuple[str, ...] = ()
    limit: float = 30
    demands: Demands = field(default_factory=Demands)

    def numbers(self, *, quick: bool) -> Mapping[str, float]:
        return {**self.parameters, **(self.quick if quick else {})}

    def takes_part(self, candidate: str, round_number: int) -> bool:
        if candidate in self.once:
            return round_number == 1
        return round_number <= (min(self.rounds, ORIENTATION_ROUNDS) if is_orientation(candidate) else self.rounds)


def is_orientation(candidate: str) -> bool:
    """Whether no figure depends on it."""
    return "@" in candidate or candidate in ORIENTATION


def _rr(concurrency: int, candidates: tuple[str, ...], scenario: str = "rr") -> Case:
    return Case(
        f"{scenario}@{concurrency}",
        scenario,
        {"concurrency": concurrency, "warmup": 0.2, "seconds": 1.2},
        (Column("per_second", "requests/s"), Column("cpu_us", "client CPU µs/request", lower=True), *LATENCY, *BUSY),
        candidates,
        {"warmup": 0.1, "seconds": 0.3},
    )


def _bodies(name: str, candidates: tuple[str, ...]) -> Case:
    return Case(
        name,
        name,
        {"mib": 48, "repeats": 3},
        (
            Column("per_second", "MiB/s"),
            Column("first", "first MiB/s"),
            Column("cpu_us", "client CPU µs/MiB", lower=True),
            *BUSY,
        ),
        candidates,
        {"repeats": 1, "mib": 16},
    )


def _sse(name: str, candidates: tuple[str, ...], rounds: int = 99) -> Case:
    return Case(
        name,
        name,
        {"events": 50_000},
        (Column("per_second", "events/s"), Column("cpu_us", "client CPU µs/event", ".1f", lower=True), *BUSY),
        candidates,
        {"events": 5_000},
        rounds=rounds,
    )


# All about 2,048 requests a second: only how many are in flight differs.
def _fanin(concurrency: int, candidates: tuple[str, ...], rounds: int = 99) -> Case:
    return Case(
        f"fanin@{concurrency}",
        "fanin",
        {"concurrency": concurrency, "wait": concurrency / 2048, "warmup": 0.5, "seconds": 2},
        (
            Column("cpu_us", "client CPU µs/request", lower=True),
            Column("per_second", "requests/s"),
            Column("p50_ms", "p50 late by ms", ".2f", lower=True),
            Column("p99_ms", "p99 late by ms", ".2f", lower=True),
            Column("connections", "connections"),
            *BUSY,
        ),
        candidates,
        {"seconds": 0.5, "warmup": 0.1, "concurrency": min(concurrency, 512), "wait": min(concurrency, 512) / 2048},
        one_connection=False,
        rounds=rounds,
        once=tuple(name for name in candidates if not name.startswith("h2keep")),
        limit=60,
    )


CASES = (
    _rr(16, ALL),
    _rr(1, RR),
    _rr(100, RR),
    _bodies("download", (*BODIES, "go", "null-httpx2", "raw-tls")),
    _bodies("upload", (*FEW, "pyreqwest-httpx", "hyperhttp", "aiohttp", "raw-tls")),
    _sse("sse", (*BODIES, "go", "null-httpx2")),
    _sse("sse-bytes", (*H2KEEP, "httpx2", "pyreqwest", "aiohttp", "null-httpx2"), rounds=3),
    Case(
        "sse-singly",
        "sse-singly",
        {"events": 100, "interval": 0.01},
        (Column("singly", "singly", ".0%"), *LATENCY, Column("cpu_us", "client CPU µs/event", lower=True)),
        (*H2KEEP, "httpx2", "pyreqwest", "pyreqwest-httpx"),
        {"events": 20},
        rounds=3,
    ),
    Case(
        "bulk-latency",
        "bulk-latency",
        {"downloads": 4, "warmup": 0.5, "seconds": 2},
        (
            Column("p99_ms", "p99 ms", ".2f", lower=True),
            Column("p50_ms", "p50 ms", ".2f", lower=True),
            Column("requests", "requests"),
            Column("per_second", "bulk MiB/s"),
            *BUSY,
        ),
        FEW,
        {"warmup": 0.2, "seconds": 0.5},
    ),
    _fanin(16, (*FEW, "aiohttp")),
    _fanin(4096, FEW),
    _fanin(16_000, ("h2keep", "h2keep-ngh2", "h2keep-httpx2", "httpx2", "aiohttp"), rounds=2),
    Case(
        "slow",
        "slow",
        {"requests": 1_000, "wait": 2, "max_connections": 10},
        (
            Column("seconds", "seconds", ".2f", lower=True),
            Column("grown_mib", "MiB grown", ".1f", lower=True),
            Column("cpu_us", "client CPU µs/request", lower=True),
            Column("connections", "connections"),
            *BUSY,
        ),
        (*FEW, "aiohttp"),
        {"requests": 200, "wait": 0.5},
        one_connection=False,
        once=("httpx2", "pyreqwest", "aiohttp"),
        limit=60,
        demands=Demands(streams=100),
    ),
    Case(
        "wan",
        "wan",
        {"mib": 24, "repeats": 2, "seconds": 3, "mbit": 100},
        (
            Column("of_link", "of the link", ".0%"),
            Column("first_of_link", "first", ".0%"),
            Column("client_busy", "client busy", ".0%"),
        ),
        ("h2keep", "h2keep-ngh2", "h2keep-httpx2", "httpx2", "pyreqwest", "aiohttp", "go"),
        {"mib": 4, "repeats": 1},
        rounds=3,
        once=("httpx2", "aiohttp", "go"),
        demands=Demands(mbit=100, round_trip=0.05),
    ),
    Case(
        "idle",
        "idle",
        {"connections": 2_000, "warmup": 2, "seconds": 4, "max_connections": 4_000, "ping": 1},
        (
            Column("resident_kib", "KiB/connection", ".0f", lower=True),
            Column("busy_per_thousand", "of a core/1,000 connections", ".1%", lower=True),
            Column("connections", "connections"),
            Column("server_busy", "server busy", ".0%"),
        ),
        ("h2keep", "h2keep-ngh2", "pyreqwest", "httpx2", "go"),
        {"connections": 100, "warmup": 0.5, "seconds": 1},
        one_connection=False,
        rounds=2,
        once=("httpx2",),
        limit=60,
        demands=Demands(listeners=2_001),
    ),
    Case(
        "reconnect",
        "reconnect",
        {"repeats": 40, "pause": 0.02},
        (
            Column("p50_ms", "p50 ms", ".2f", lower=True),
            Column("p99_ms", "p99 ms", ".2f", lower=True),
            Column("cpu_us", "client CPU µs", lower=True),
            Column("connections", "connections"),
        ),
        (*FEW, "aiohttp"),
        {"repeats": 5},
        one_connection=False,
        rounds=3,
    ),
    _rr(16, BLOCKING, "threads"),
    _rr(1, (*H2KEEP, "httpx2", "httpx", "pyreqwest-httpx", "null-httpx2"), "threads"),
    _bodies(
        "blocking-download", (*H2KEEP, "h2keep-httpx", "httpx2", "httpx", "pyreqwest-httpx", "niquests", "raw-tls")
    ),
    Case(
        "storm",
        "storm",
        {"concurrency": 100, "requests": 200, "rounds": 10},
        (
            Column("grown", "memory grown", ".1%", lower=True),
            Column("resident_mib", "MiB in use", lower=True),
            Column("per_second", "requests/s"),
            *BUSY,
        ),
        ("h2keep", "h2keep-ngh2", "h2keep-httpx2"),
        {"concurrency": 20, "requests": 20, "rounds": 3},
        one_connection=False,
        rounds=1,
        limit=150,
    ),
    Case(
        "codec",
        "codec",
        {"seconds": 1},
        (Column("per_second", "pairs/s"), Column("cpu_us", "CPU µs/pair", ".1f", lower=True)),
        ("h2keep", "h2keep-ngh2", "h2"),
        {"seconds": 0.2},
    ),
    Case(
        "import",
        "import",
        {},
        (Column("ms", "ms beyond h2 and anyio", ".1f", lower=True), Column("modules", "modules", lower=True)),
        IMPORTS,
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

    def values(self) -> tuple[Value, ...]:
        return (self.value,) if self.over is None else (self.value, self.over)


ENGINES = ("", "-ngh2")
Bounds = tuple[float | None, float | None]
"""With the h2 engine, and with ngh2; None where nothing is promised."""


def _faster(case: str, mine: str, theirs: str, bounds: Bounds) -> list[Figure]:
    """How many times as much mine does in a second."""
    return [
        Figure(
            f"{case}: {mine}{engine} / {theirs}, {_unit(case)}",
            Value(case, mine + engine, "per_second"),
            Value(case, theirs, "per_second"),
            at_least=bound,
        )
        for engine, bound in zip(ENGINES, bounds, strict=True)
    ]


def _thriftier(case: str, metric: str, what: str, mine: str, theirs: str, bounds: Bounds) -> list[Figure]:
    """How many times as much of something that should be small theirs takes."""
    return [
        Figure(
            f"{case}: {theirs} / {mine}{engine}, {what}",
            Value(case, theirs, metric),
            Value(case, mine + engine, metric),
            at_least=bound,
        )
        for engine, bound in zip(ENGINES, bounds, strict=True)
    ]


def _most(case: str, metric: str, what: str, mine: str, bounds: Bounds, unit: str) -> list[Figure]:
    return [
        Figure(f"{case}: {mine}{engine}, {what}", Value(case, mine + engine, metric), at_most=bound, unit=unit)
        for engine, bound in zip(ENGINES, bounds, strict=True)
    ]


def _unit(case: str) -> str:
    return next(column.title for item in CASES if item.name == case for column in item.columns[:1])


def _growth(many: int, candidate: str, at_most: float | None) -> Figure:
    few, value = (Value(f"fanin@{number}", candidate, "cpu_us") for number in (16, many))
    return Figure(f"fanin: {candidate}, CPU a request at {many:,} / 16 in flight", value, few, at_most=at_most)


FIGURES = (
    *_faster("rr@16", "h2keep", "pyreqwest", (0.85, 2.1)),
    *_faster("rr@100", "h2keep", "pyreqwest", (0.63, 2.1)),
    *_thriftier("rr@100", "cpu_us", "CPU a request", "h2keep", "go", (None, 1.1)),
    *_faster("rr@1", "h2keep", "pyreqwest", (1.05, 1.6)),
    *_faster("rr@16", "h2keep-httpx2", "httpx2", (3, 5.3)),
    *_faster("rr@16", "h2keep-httpx2", "pyreqwest-httpx", (1.3, 2.3)),
    *_faster("threads@16", "h2keep-httpx2", "httpx2", (2.6, 3.6)),
    *_faster("threads@16", "h2keep-httpx2", "pyreqwest-httpx", (0.9, 0.9)),
    *_faster("threads@16", "h2keep", "httpx2", (5, 5)),
    *_faster("threads@1", "h2keep-httpx2", "httpx2", (0.6, 0.6)),
    *_faster("threads@1", "h2keep", "httpx2", (0.9, 0.9)),
    *_faster("blocking-download", "h2keep-httpx2", "httpx2", (1.8, 2.4)),
    *_faster("download", "h2keep-httpx2", "httpx2", (4, 5.5)),
    *_thriftier("download", "cpu_us", "CPU a MiB", "h2keep", "pyreqwest", (0.55, 0.8)),
    *_faster("upload", "h2keep", "httpx2", (3.3, 7)),
    *_faster("sse", "h2keep-httpx2", "httpx2", (6.5, 6.5)),
    *_thriftier("bulk-latency", "p99_ms", "p99", "h2keep", "pyreqwest", (0.8, 0.8)),
    *_most("bulk-latency", "p99_ms", "p99", "h2keep", (15, 15), " ms"),
    *_most("bulk-latency", "p99_ms", "p99", "h2keep-httpx2", (15, 15), " ms"),
    *_most("slow", "seconds", "total for 2 s of waiting", "h2keep", (2.6, 2.6), " s"),
    *_most("slow", "grown_mib", "memory grown", "h2keep", (64, 64), " MiB"),
    _growth(4096, "h2keep", 1.2),
    _growth(4096, "h2keep-ngh2", 1.2),
    _growth(4096, "h2keep-httpx2", 1.3),
    _growth(4096, "pyreqwest", None),
    _growth(16_000, "h2keep", 1.5),
    _growth(16_000, "h2keep-ngh2", 1.5),
    _growth(16_000, "h2keep-httpx2", 1.5),
    _growth(16_000, "httpx2", None),
    _growth(16_000, "aiohttp", None),
    *_most("idle", "resident_kib", "memory a connection", "h2keep", (120, 90), " KiB"),
    *_most("idle", "busy_per_thousand", "of a core for 1,000 connections", "h2keep", (0.12, 0.06), ""),
    Figure("wan: h2keep, of the link's rate", Value("wan", "h2keep", "of_link"), at_least=0.9, unit=""),
    Figure("wan: h2keep-ngh2, of the link's rate", Value("wan", "h2keep-ngh2", "of_link"), at_least=0.9, unit=""),
    Figure("sse-singly: h2keep, share", Value("sse-singly", "h2keep", "singly"), at_least=1, unit=""),
    Figure("sse-singly: h2keep-ngh2, share", Value("sse-singly", "h2keep-ngh2", "singly"), at_least=1, unit=""),
    Figure("sse-singly: h2keep-httpx2, share", Value("sse-singly", "h2keep-httpx2", "singly"), at_least=1, unit=""),
    *_most("storm", "grown", "memory grown", "h2keep", (0.05, 0.05), ""),
    Figure("storm: h2keep-httpx2, memory grown", Value("storm", "h2keep-httpx2", "grown"), at_most=0.05, unit=""),
    Figure("import: h2keep, beyond h2 and anyio", Value("import", "h2keep", "ms"), at_most=80, unit=" ms"),
)
