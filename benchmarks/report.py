"""Results as tables: medians over the rounds, their spread, and the figures beside their bounds."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.plan import FIGURES, Case, Column, Figure, Value

Rounds = Sequence[Mapping[str, float] | None]
Results = Mapping[str, Mapping[str, Rounds]]
"""What each case's candidates measured in each round; None where a worker failed or the candidate was not asked."""

Failures = Mapping[str, Mapping[str, str]]
"""Why a case's candidate last gave no result."""

Reading = tuple[float, float, float]
"""Median, least and greatest."""

CROWDED = 0.95
"""Of its cores: a busier server holds its clients up."""

DISTURBED = 0.15
"""Of a core: what other processes may take before it shows."""


def series(results: Results, value: Value) -> list[float]:
    """One number a round, not-a-number where there is none, so that rounds stay paired."""
    rounds = results.get(value.case, {}).get(value.candidate, ())
    return [math.nan if metrics is None else metrics.get(value.metric, math.nan) for metrics in rounds]


def reading(numbers: Iterable[float]) -> Reading | None:
    known = [number for number in numbers if not math.isnan(number)]
    return (median(known), min(known), max(known)) if known else None


def measure(results: Results, figure: Figure) -> Reading | None:
    """A ratio is taken round by round, for what ran side by side shared the machine's mood; then its median."""
    numbers = series(results, figure.value)
    if figure.over is not None:
        numbers = [a / b for a, b in zip(numbers, series(results, figure.over), strict=False) if b != 0]
    return reading(numbers)


@dataclass(frozen=True)
class Verdict:
    """A figure as it came out; `measured` is None where a candidate gave no result."""

    figure: Figure
    measured: Reading | None

    @property
    def word(self) -> str:
        if self.measured is None:
            return "not measured"
        passes = self.figure.passes(self.measured[0])
        return "" if passes is None else "pass" if passes else "MISS"

    def cells(self) -> list[str]:
        """What, bound, median, spread, word."""
        middle = spread = "-"
        if self.measured is not None:
            middle, least, greatest = (shown(value, self.figure.unit) for value in self.measured)
            spread = f"{least} .. {greatest}"
        return [self.figure.what, bound(self.figure), middle, spread, self.word]


def verdicts(results: Results, unavailable: Collection[str] = ()) -> list[Verdict]:
    """All figures whose candidates were asked, those of unavailable candidates too: none is left out for failing."""

    def asked(value: Value) -> bool:
        return value.case in results and (value.candidate in results[value.case] or value.candidate in unavailable)

    return [Verdict(figure, measure(results, figure)) for figure in FIGURES if all(map(asked, figure.values()))]


def records(results: Results, unavailable: Collection[str] = ()) -> list[dict[str, object]]:
    """The figures for the JSON report."""
    rows: list[dict[str, object]] = []
    for verdict in verdicts(results, unavailable):
        figure = verdict.figure
        bounds = {"at_least": figure.at_least, "at_most": figure.at_most}
        spread = dict(zip(("median", "min", "max"), verdict.measured or (None, None, None), strict=True))
        rows.append({"what": figure.what, **spread, **bounds, "word": verdict.word})
    return rows


def tables(
    cases: Sequence[Case], results: Results, failures: Failures, unavailable: Mapping[str, str], *, quick: bool
) -> str:
    measured = [case for case in cases if results.get(case.name)]
    parts = [_case_text(case, results, failures, case.numbers(quick=quick)) for case in measured]
    rows = [verdict.cells() for verdict in verdicts(results, unavailable)]
    if rows:
        parts.append("\n".join(["figures", *_align([["figure", "bound", "median", "spread", ""], *rows])]))
    if unavailable:
        parts.append("\n".join(["not available", *_align([list(item) for item in unavailable.items()])]))
    return "\n\n".join(parts)


def case_rows(case: Case, results: Results, failures: Failures) -> list[list[str]]:
    """A head, then a row for each candidate, with what makes its numbers mean something else than they seem to."""
    rows = [["candidate", *(column.title for column in case.columns), "remarks"]]
    for candidate, rounds in results[case.name].items():
        if any(rounds):
            cells = [_cell(case, candidate, results, column, spread=i == 0) for i, column in enumerate(case.columns)]
            rows.append([candidate, *cells, _remark(case, candidate, results)])
        else:
            why = failures.get(case.name, {}).get(candidate, "not asked")
            rows.append([candidate, *("-" for _ in case.columns), f"no result: {why}"])
    return rows


def _case_text(case: Case, results: Results, failures: Failures, numbers: Mapping[str, float]) -> str:
    title = " ".join([case.name, *(f"{name}={value:g}" for name, value in numbers.items())])
    return "\n".join([title, *_align(case_rows(case, results, failures))])


def _cell(case: Case, candidate: str, results: Results, column: Column, *, spread: bool) -> str:
    measured = reading(series(results, Value(case.name, candidate, column.metric)))
    if measured is None:
        return "-"
    middle, least, greatest = (format(value, column.form) for value in measured)
    return f"{middle} [{least}..{greatest}]" if spread and (least, greatest) != (middle, middle) else middle


def _remark(case: Case, candidate: str, results: Results) -> str:
    def measured(metric: str) -> Reading:
        return reading(series(results, Value(case.name, candidate, metric))) or (0.0, 0.0, 0.0)

    remarks: list[str] = []
    if measured("server_busy")[0] > CROWDED:
        remarks.append("server is the bottleneck")
    if measured("others_busy")[2] > DISTURBED:
        remarks.append(f"others used up to {measured('others_busy')[2]:.0%} of a core")
    if case.one_connection and measured("connections")[2] > 1:
        remarks.append(f"{measured('connections')[2]:.0f} connections")
    if measured("failed")[2]:
        remarks.append(f"up to {measured('failed')[2]:,.0f} requests failed")
    if failed := sum(metrics is None for metrics in results[case.name][candidate]):
        remarks.append(f"{failed} of {len(results[case.name][candidate])} rounds without a result")
    return ", ".join(remarks)


def shown(value: float, unit: str) -> str:
    return f"{value:,.2f}{unit}"


def bound(figure: Figure) -> str:
    if figure.at_least is not None:
        return f">= {figure.at_least:g}{figure.unit}"
    return "" if figure.at_most is None else f"<= {figure.at_most:g}{figure.unit}"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for name, *others in rows:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines
