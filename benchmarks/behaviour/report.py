"""From records to docs/behaviour.md: tables, and what the project holds itself to; the prose is template.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from benchmarks.behaviour.cell import CONNECT_TIMEOUT, CUTOFF, PING_TIMEOUT, READ_IDLE_TIMEOUT
from benchmarks.behaviour.faults import FAULTS, Fault
from benchmarks.behaviour.judge import TOLERANCE, Judgement, Record, detects, judge, worse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

TEMPLATE = Path(__file__).with_name("template.md")
BOUND = READ_IDLE_TIMEOUT + PING_TIMEOUT
CLIENTS = {
    "h2keep": "h2keep, async",
    "h2keep-ngh2": "h2keep, async, ngh2",
    "h2keep-sync": "h2keep, sync",
    "httpx2": "httpx2",
    "pyreqwest": "pyreqwest",
    "niquests": "niquests",
    "go": "Go net/http",
}
OURS = ("h2keep", "h2keep-ngh2", "h2keep-sync")


@dataclass(frozen=True)
class Miss:
    """A cell that is not what the project wants it to be."""

    fault: str
    client: str
    why: str


@dataclass(frozen=True)
class Results:
    """All that was measured, as it lies in the file."""

    about: Mapping[str, Any]
    records: Sequence[Record]
    #: With packets that were really lost; None where that is not permitted.
    lossy: Sequence[Record] | None
    failures: Sequence[str]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        relay, network = data["relay"], data["network"]
        return cls(
            data["about"],
            [Record.from_json(record) for record in relay["records"]],
            None if network is None else [Record.from_json(record) for record in network["records"]],
            [*relay["failures"], *([] if network is None else network["failures"])],
        )


class Matrix:
    """All cells that were measured."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._cells = {(record.fault, record.client): judge(record) for record in records}
        self.faults = [fault for fault in FAULTS if any(name == fault.name for name, _ in self._cells)]
        self.clients = [client for client in CLIENTS if any(name == client for _, name in self._cells)]

    def cell(self, fault: Fault, client: str) -> Judgement | None:
        return self._cells.get((fault.name, client))

    def row(self, fault: Fault) -> Iterator[tuple[str, Judgement]]:
        for client in self.clients:
            if (judgement := self.cell(fault, client)) is not None:
                yield client, judgement

    def ours(self) -> Iterator[tuple[Fault, str, Judgement]]:
        for fault in self.faults:
            yield from ((fault, client, judgement) for client, judgement in self.row(fault) if client in OURS)

    def undetected(self) -> list[Miss]:
        """Silent faults that h2keep found too late or not at all."""
        return [
            Miss(fault.title, client, outcome(judgement))
            for fault, client, judgement in self.ours()
            if fault.silent and not detects(judgement, BOUND)
        ]

    def lost_in_vain(self) -> list[Miss]:
        """Requests that h2keep lost although nothing need have been lost."""
        return [
            Miss(fault.title, client, outcome(judgement))
            for fault, client, judgement in self.ours()
            if fault.survivable and judgement.outcome != "ok"
        ]

    def worse(self) -> list[Miss]:
        """Cells in which h2keep did worse than somebody else."""
        return [
            Miss(fault.title, client, f"than {CLIENTS[other]}: {why}")
            for fault, client, judgement in self.ours()
            for other, theirs in self.row(fault)
            if other not in OURS
            for why in worse(judgement, theirs)
        ]


def outcome(judgement: Judgement) -> str:
    """A cell in a few words."""
    match judgement.outcome:
        case "ok":
            words = ["ok"]
        case "error":
            words = [f"{judgement.seconds:.1f} s"]
        case "hung":
            words = ["**hung**"]
    if judgement.lost:
        words.append(f"{judgement.lost} lost")
    if judgement.twice:
        words.append(f"**{judgement.twice} twice**")
    if judgement.next != "ok":
        words.append(f"next: **{judgement.next}**")
    return ", ".join(words)


def render(results: Results) -> str:
    """The page."""
    matrix = Matrix(results.records)
    return Template(TEMPLATE.read_text()).substitute(
        idle=f"{READ_IDLE_TIMEOUT:g}",
        ping=f"{PING_TIMEOUT:g}",
        connect=f"{CONNECT_TIMEOUT:g}",
        cutoff=f"{CUTOFF:g}",
        bound=f"{BOUND:g}",
        tolerance=f"{TOLERANCE:g}",
        about=_about(results.about),
        matrix=_overview(matrix),
        claims=_claims(matrix),
        lossy=_lossy(results.lossy),
        caveats="".join(f"\n{caveat}.\n" for caveat in _caveats(results)),
        faults="\n".join(_section(matrix, fault) for fault in matrix.faults),
    )


def _caveats(results: Results) -> Iterator[str]:
    yield from (f"Not measured: {failure}" for failure in results.failures)
    disturbed = [
        f"{record.fault} of {CLIENTS[record.client]} by {record.disturbed:.1f} s"
        for record in (*results.records, *(results.lossy or ()))
        if record.disturbed
    ]
    if disturbed:
        yield f"Disturbed, as the machine was too busy each time: {'; '.join(disturbed)}"


def _claims(matrix: Matrix) -> str:
    silent = sum(1 for fault, _, _ in matrix.ours() if fault.silent)
    survivable = sum(1 for fault, _, _ in matrix.ours() if fault.survivable)
    cells = sum(1 for _ in matrix.ours())
    claims = [
        ("Every silent fault is detected in time", silent, matrix.undetected()),
        ("No request is lost to a fault that need not cost any", survivable, matrix.lost_in_vain()),
        ("No cell is worse than any other client's", cells, matrix.worse()),
    ]
    return "\n\n".join(f"* {claim}: {_verdict(count, misses)}" for claim, count, misses in claims if count)


def _lossy(records: Sequence[Record] | None) -> str:
    if records is None:
        return "Not measured here: this system permits no network namespaces, or lacks `unshare` or `ip`."
    matrix = Matrix(records)
    return f"{_overview(matrix)}\n\n{_claims(matrix)}"


def _about(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    modified = " with changes" if about["modified"] else ""
    return (
        f"Taken on {about['when']} at commit `{(about['commit'] or 'unknown')[:12]}`{modified}, "
        f"on {about['system']}, {about['cores']} cores, Python {about['python']}: {versions}."
    )


def _overview(matrix: Matrix) -> str:
    rows = []
    for fault in matrix.faults:
        judgements = [matrix.cell(fault, client) for client in matrix.clients]
        rows.append([fault.title, *("-" if judgement is None else outcome(judgement) for judgement in judgements)])
    return _table(["", *(CLIENTS[client] for client in matrix.clients)], rows)


def _verdict(cells: int, misses: Sequence[Miss]) -> str:
    """Whether a claim holds, and where it doesn't."""
    missed = len({(miss.fault, miss.client) for miss in misses})
    if not misses:
        return f"**holds in all {cells} cells.**"
    lines = [f"    * {miss.fault}, {CLIENTS[miss.client]}: {miss.why}" for miss in misses]
    return "\n".join([f"**holds in {cells - missed} of {cells} cells.** Not in", "", *lines])


def _section(matrix: Matrix, fault: Fault) -> str:
    kind = "Nobody tells the client." if fault.silent else "No request need be lost." if fault.survivable else ""
    header = ["", "outcome", "after", "errors", "lost", "sent twice", "PINGs", "next request"]
    rows = [[CLIENTS[client], *_details(judgement)] for client, judgement in matrix.row(fault)]
    return f"### {fault.title}\n\n{' '.join(filter(None, (fault.text, kind)))}\n\n{_table(header, rows)}\n"


def _details(judgement: Judgement) -> list[str]:
    after = "" if judgement.seconds is None else f"{judgement.seconds:.2f} s"
    following = "" if judgement.next_seconds is None else f" in {judgement.next_seconds:.2f} s"
    errors = ", ".join(f"`{error}`" for error in judgement.errors)
    numbers = [str(number) for number in (judgement.lost, judgement.twice, judgement.pings)]
    return [judgement.outcome, after, errors, *numbers, judgement.next + following]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
