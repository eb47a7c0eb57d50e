"""The timelines of docs/behaviour.md."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.behaviour.cell import CUTOFF
from benchmarks.behaviour.faults import FAULTS
from benchmarks.behaviour.report import CLIENTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks.behaviour.judge import Record

COLUMNS = 3
#: Seconds since the fault.
SHOWN = (-1.0, CUTOFF + 0.4)
SENT, SWALLOWED, RECEIVED, PING = "#4477aa", "#cc3311", "#228833", "#222222"
ENDS = {"ok": ("o", RECEIVED, 4), "error": ("x", SWALLOWED, 6), "hung": (">", SWALLOWED, 5)}
HEIGHT = 0.28


def draw(records: Sequence[Record], path: Path) -> None:
    """One small plot a fault, in it one row a client."""
    # The same records make the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "h2keep", "font.size": 7}):
        faults = [fault for fault in FAULTS if any(record.fault == fault.name for record in records)]
        rows = -(-len(faults) // COLUMNS)
        figure = Figure(figsize=(12, 1.6 * rows), layout="constrained")
        for index, fault in enumerate(faults):
            axes = figure.add_subplot(rows, COLUMNS, index + 1)
            axes.tick_params(labelleft=index % COLUMNS == 0)
            _draw_fault(axes, fault.title, {record.client: record for record in records if record.fault == fault.name})
        figure.savefig(path, metadata={"Date": None})


def _draw_fault(axes: Axes, title: str, records: dict[str, Record]) -> None:
    axes.set_title(title, fontsize=8, loc="left")
    axes.set_xlim(*SHOWN)
    axes.set_ylim(len(CLIENTS) - 0.5, -0.5)
    axes.set_yticks(range(len(CLIENTS)), list(CLIENTS.values()))
    axes.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    for row, client in enumerate(CLIENTS):
        if client in records:
            _draw_client(axes, row, records[client])


def _draw_client(axes: Axes, row: int, record: Record) -> None:
    for times, colour, low, high in (
        (record.up, SENT, 0.0, -HEIGHT),
        (record.swallowed, SWALLOWED, 0.0, -HEIGHT),
        (record.down, RECEIVED, 0.0, HEIGHT),
    ):
        shown = [at for at in times if SHOWN[0] <= at <= SHOWN[1]]
        # One path with gaps: as separate lines they make a file five times as large.
        across = [x for at in shown for x in (at, at, math.nan)]
        axes.plot(across, [row + low, row + high, math.nan] * len(shown), color=colour, linewidth=0.7)
    pings = [at for at in record.pings if at <= SHOWN[1]]
    axes.plot(pings, [row - HEIGHT] * len(pings), "v", color=PING, markersize=3, clip_on=True)
    for attempt in record.attempts:
        marker, colour, size = ENDS[attempt.outcome]
        axes.plot(CUTOFF if attempt.ended is None else attempt.ended, row, marker, color=colour, markersize=size)
