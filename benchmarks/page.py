"""docs/performance.md and its plots, of runs' JSON and a template. Nothing that was measured is typed by hand."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from benchmarks.plan import CASES, Case, Value
from benchmarks.report import CROWDED, DISTURBED, Results, Verdict, bound, case_rows, reading, series, shown, verdicts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).with_name("performance.template.md")
WORDS = {"pass": "reached", "MISS": "**missed**", "not measured": "**not measured**", "": ""}
#: Of a core, from which on a client is taken to be the bottleneck.
BUSY = 0.9
#: What each plot shows: the first column of these cases. Floors are left out, next to which all else would vanish.
PLOTS = {
    "requests": ("rr@1", "rr@16", "rr@100", "threads@16"),
    "bodies": ("download", "upload", "blocking-download", "wan"),
    "events": ("sse", "sse-bytes"),
    "load": ("bulk-latency", "fanin@4096", "slow", "idle"),
}
FLOORS = ("null-httpx2", "raw-tls")
COLUMNS = 2
OURS, THEIRS = "#1f6f8b", "#b8bec4"


def amended(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first run, with what later ones measured again in the place of what it has of the same cases."""
    first, *later = reports
    whole: dict[str, Any] = {**first, "again": [(run["about"], sorted(run["cases"])) for run in later]}
    for run in later:
        whole["cases"] = whole["cases"] | run["cases"]
        for part in ("results", "failures"):
            whole[part] = {
                placement: {case: value for case, value in cases.items() if case not in run["cases"]}
                | run[part].get(placement, {})
                for placement, cases in whole[part].items()
            }
        kept = {name: value for name, value in whole["profiles"].items() if name.split()[0] not in run["cases"]}
        whole["profiles"] = kept | run["profiles"]
    return whole


def write_page(report: Mapping[str, Any], output: Path) -> None:
    """Write the page to `output`, its plots to a folder beside it that bears its name."""
    placement, results = next(iter(report["results"].items()))
    failures = report["failures"].get(placement, {})
    judged = verdicts(results, report["unavailable"])
    quick = report["about"]["quick"]
    parts = {
        "about": "\n\n".join([_about(report["about"]), *_again(report), _crowded(results)]),
        "figures": "A quick run judges nothing." if quick else _figures(judged),
        "missed": "" if quick else _missed(judged, results, report),
        "absent": _absent(report["unavailable"]),
    }
    for case in CASES:
        parts[key(case)] = _case(case, results, failures, report["cases"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(Template(TEMPLATE.read_text()).substitute(parts).rstrip() + "\n")
    folder = output.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, cases in PLOTS.items():
        plot([case for case in CASES if case.name in cases], results, folder / f"{name}.svg")


def key(case: Case) -> str:
    """A case's place in the template."""
    name = case.name.replace("@", "_").replace("-", "_")
    return f"{name}_" if name == "import" else name


def _about(about: Mapping[str, Any]) -> str:
    machine = about["machine"]
    commit = f"`{about['commit'][:12]}`" if about["commit"] else "an unknown commit"
    changed = " with changes that were not committed" if about["modified"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    rounds = f"{about['rounds']} round{'s' if about['rounds'] > 1 else ''}"
    where = f"{machine['cores']} cores of {machine['processor']} ({machine['system']})"
    when = f"Measured on {about['when'][:10]} at commit {commit}{changed}"
    lines = [f"{when}, {rounds}, on {where}, Python {about['python']}.", f"Versions: {versions}."]
    if about["quick"]:
        lines.append("**This was a quick run, which only looks whether all works: its numbers mean nothing.**")
    return "\n\n".join(lines)


def _again(report: Mapping[str, Any]) -> list[str]:
    """What was measured at another time than the rest."""
    return [
        f"Measured again, on {about['when'][:10]} at commit `{about['commit'][:12]}`, {about['rounds']} rounds: "
        f"{', '.join(cases)}."
        for about, cases in report.get("again", ())
    ]


def _crowded(results: Results) -> str:
    """Whether the server was ever what was measured."""
    rows: list[str] = []
    for case, name in ((each, name) for each in CASES for name in results.get(each.name, ())):
        busy = reading(series(results, Value(case.name, name, "server_busy")))
        if busy is not None and busy[0] > CROWDED:
            rows.append(f"{case.name} {name}")
    if not rows:
        return f"The server was nobody's bottleneck: in no row's median were its cores more than {CROWDED:.0%} busy."
    return f"The server was the bottleneck, its cores more than {CROWDED:.0%} busy, of: {', '.join(rows)}."


def _case(case: Case, results: Results, failures: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:
    if not results.get(case.name):
        return f"*{case.name}* was not measured in this run."
    values = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in numbers[case.name].items())
    title = f"*{case.name}*" + (f" ({values})" if values else "")
    return f"{title}:\n\n{_table(case_rows(case, results, failures))}"


def _figures(judged: Sequence[Verdict]) -> str:
    rows = [["figure", "to reach", "median", "spread", ""]]
    for verdict in judged:
        *cells, word = verdict.cells()
        rows.append([*cells, WORDS[word]])
    return _table(rows)


def _missed(judged: Sequence[Verdict], results: Results, report: Mapping[str, Any]) -> str:
    """Each missed figure, with what its measurement was bounded by and where its time went."""
    missed = [verdict for verdict in judged if verdict.word == "MISS"]
    absent = sum(verdict.word == "not measured" for verdict in judged)
    counts = f"{len(missed)} of {len(judged)} figures were missed"
    parts = [counts + (f", and {absent} could not be measured." if absent else ".")]
    profiled: set[str] = set()
    for verdict in missed:
        assert verdict.measured is not None
        figure = verdict.figure
        value = next(value for value in figure.values() if value.candidate.startswith("h2keep"))
        measured = shown(verdict.measured[0], figure.unit)
        sentences = [f"* **Missed:** {figure.what}: {measured} where {bound(figure)} was to be reached."]
        if figure.over is not None:
            sentences.append(_bounded_by(value, results))
        name = f"{value.case} {value.candidate}"
        if (profile := report["profiles"].get(name)) is not None:
            sentences.append("Its profile is above." if name in profiled else _profile(profile))
        profiled.add(name)
        parts.append(" ".join(sentences))
    return "\n\n".join(parts)


def _bounded_by(value: Value, results: Results) -> str:
    def middle(metric: str) -> float:
        return (reading(series(results, Value(value.case, value.candidate, metric))) or (0.0, 0.0, 0.0))[0]

    client, server, others = middle("client_busy"), middle("server_busy"), middle("others_busy")
    if others > DISTURBED:
        return f"The machine was disturbed: others used {others:.0%} of a core."
    if server > CROWDED:
        return f"The server was the bottleneck ({server:.0%} busy)."
    if client > BUSY:
        return f"The client's own CPU is what bounds it ({client:.0%} of a core busy, the server {server:.0%})."
    return f"Neither CPU was used up (client {client:.0%}, server {server:.0%} busy): time went into waiting."


def _profile(profile: Sequence[tuple[str, float]] | str) -> str:
    if isinstance(profile, str):
        return f"There is no profile: {profile}"
    functions = ", ".join(f"`{function}` {share:.0%}" for function, share in profile)
    return f"Where its time went, by innermost function: {functions}."


def _absent(unavailable: Mapping[str, str]) -> str:
    if not unavailable:
        return ""
    rows = [["candidate", "why"], *(list(item) for item in unavailable.items())]
    return f"## Not available\n\nThese candidates could not be run:\n\n{_table(rows)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *others = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    marks = ["---", *("---" if title in ("remarks", "why", "") else "---:" for title in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *others))


def plot(cases: Sequence[Case], results: Results, file: Path) -> None:
    """A panel for each case, a bar for each candidate, a whisker from the least to the greatest."""
    cases = [case for case in cases if results.get(case.name)] or cases[:1]
    rows = -(-len(cases) // COLUMNS)
    height = 0.8 + 0.18 * max(len(results.get(case.name, ())) for case in cases)
    # The same bytes for the same numbers.
    with mpl.rc_context({"svg.hashsalt": "h2keep", "svg.fonttype": "none", "font.size": 8}):
        canvas = Canvas(figsize=(9.2, height * rows), layout="constrained")
        panels = list(canvas.subplots(rows, COLUMNS, squeeze=False).flat)
        for axes, case in zip(panels, cases, strict=False):
            _panel(axes, case, results)
        for axes in panels[len(cases) :]:
            axes.remove()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def _panel(axes: Axes, case: Case, results: Results) -> None:
    column = case.columns[0]
    names = [name for name in results.get(case.name, ()) if name not in FLOORS]
    read = {name: reading(series(results, Value(case.name, name, column.metric))) for name in names}
    bars = sorted(((name, values) for name, values in read.items() if values), key=lambda bar: bar[1][0])
    if not column.lower:
        bars.reverse()
    names = [name for name, _ in bars]
    middles = [values[0] for _, values in bars]
    spreads = [[values[0] - values[1] for _, values in bars], [values[2] - values[0] for _, values in bars]]
    colours = [OURS if name.startswith("h2keep") else THEIRS for name in names]
    axes.barh(names, middles, xerr=spreads, color=colours, error_kw={"elinewidth": 0.8})
    axes.invert_yaxis()
    axes.set_title(f"{case.name}: {column.title} ({'less' if column.lower else 'more'} is better)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
