"""Results as tables: medians over the rounds, their spread, and the figures beside their bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from benchmarks.plan import FIGURES, Case, Column, Figure, Value

Rounds = Sequence[Mapping[str, float] | None]
Results = Mapping[str, Mapping[str, Rounds]]
"""What each case's candidates measured in each round; None where a worker failed or the candidate was not asked."""

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


def tables(cases: Sequence[Case], results: Results, *, quick: bool) -> str:
    measured = [case for case in cases if results.get(case.name)]
    return "\n\n".join(
        [*(_case_table(case, results, case.numbers(quick=quick)) for case in measured), _figures(results)]
    )


def verdicts(results: Results) -> list[dict[str, object]]:
    """The figures for the JSON report."""
    rows: list[dict[str, object]] = []
    for figure in FIGURES:
        if (measured := measure(results, figure)) is not None:
            middle, least, greatest = measured
            bounds = {"at_least": figure.at_least, "at_most": figure.at_most}
            spread = {"median": middle, "min": least, "max": greatest}
            rows.append({"what": figure.what, **spread, **bounds, "passes": figure.passes(middle)})
    return rows


def _case_table(case: Case, results: Results, numbers: Mapping[str, float]) -> str:
    rows = [["candidate", *(column.title for column in case.columns), ""]]
    notes: list[str] = []
    for candidate, rounds in results[case.name].items():
        if not any(rounds):
            notes.append(f"{candidate}: no result")
            continue
        cells = [_cell(case, candidate, results, column, spread=i == 0) for i, column in enumerate(case.columns)]
        rows.append([candidate, *cells, _remark(case, candidate, results)])
    title = " ".join([case.name, *(f"{name}={number:g}" for name, number in numbers.items())])
    return "\n".join([title, *_align(rows), *notes])


def _cell(case: Case, candidate: str, results: Results, column: Column, *, spread: bool) -> str:
    measured = reading(series(results, Value(case.name, candidate, column.metric)))
    if measured is None:
        return "-"
    middle, least, greatest = (format(number, column.form) for number in measured)
    return f"{middle} [{least}..{greatest}]" if spread and (least, greatest) != (middle, middle) else middle


def _remark(case: Case, candidate: str, results: Results) -> str:
    """What makes a row's numbers mean something else than they seem to."""

    def measured(metric: str) -> Reading:
        return reading(series(results, Value(case.name, candidate, metric))) or (0.0, 0.0, 0.0)

    remarks: list[str] = []
    if measured("server_busy")[0] > CROWDED:
        remarks.append("server is the bottleneck")
    if measured("others_busy")[2] > DISTURBED:
        remarks.append(f"others used up to {measured('others_busy')[2]:.0%} of a core")
    if case.one_connection and measured("connections")[2] > 1:
        remarks.append(f"{measured('connections')[2]:.0f} connections")
    if failed := sum(metrics is None for metrics in results[case.name][candidate]):
        remarks.append(f"{failed} rounds failed")
    return ", ".join(remarks)


def _figures(results: Results) -> str:
    rows = [["figure", "bound", "median", "spread", ""]]
    for figure in FIGURES:
        measured = measure(results, figure)
        if measured is None:
            continue
        middle, least, greatest = (f"{number:.2f}{figure.unit}" for number in measured)
        passes = figure.passes(measured[0])
        mark = "" if passes is None else "pass" if passes else "MISS"
        rows.append([figure.what, _bound(figure), middle, f"{least}..{greatest}", mark])
    return "\n".join(["figures", *_align(rows)]) if len(rows) > 1 else "no figures: their candidates did not run"


def _bound(figure: Figure) -> str:
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
