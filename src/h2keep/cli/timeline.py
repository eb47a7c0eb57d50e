"""The demo's picture: what happened on two connections, one above the other over a common time axis.

A `Lane` records one call while it runs. A `Timeline` draws its lanes as they are at this moment: in a terminal again
and again while they run, elsewhere once at the end, after a line for each event. Seen from the client, a lane is

    sent      bytes, and the PINGs among them
    flow      what the middlebox knows of the connection: the line thins while no byte passes
    received  bytes, and the PINGs' acknowledgements among them
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Kind", "Lane", "Mark", "Timeline", "glyphs", "show"]

_REFRESHES_PER_SECOND = 8
_LEAST_WIDTH = 60
_MARGIN = 11  # where the rows begin, after their names
_STEP_COLUMNS = 6  # between two figures on the axis, at least
#: The share of the middlebox's patience after which a flow counts as fading.
_FADING = 0.6


class Kind(enum.Enum):
    """What can be marked on a lane."""

    SENT = enum.auto()
    RECEIVED = enum.auto()
    PING = enum.auto()
    ACK = enum.auto()
    #: Bytes of the client that the middlebox dropped.
    SENT_IN_VAIN = enum.auto()
    #: Bytes of the server that the middlebox dropped.
    NOT_RECEIVED = enum.auto()
    FORGOTTEN = enum.auto()
    ANSWERED = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened."""

    kind: Kind
    #: Seconds since the timeline began.
    at: float
    #: How many bytes it is about.
    size: int = 0
    #: What the picture calls it, where that isn't the same for all of its kind.
    word: str = ""


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The characters that the picture is made of."""

    sent: str
    received: str
    lost: str
    good: str
    bad: str
    fresh: str
    fading: str
    forgotten: str


_UNICODE = Glyphs("▲", "▼", "✕", "✓", "✗", "━", "─", "┄")
_ASCII = Glyphs("^", "v", "x", "+", "!", "=", "-", ".")


def glyphs(console: Console) -> Glyphs:
    """What this console can print."""
    return _ASCII if console.options.ascii_only else _UNICODE


class Lane:
    """One call over one connection."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.marks: list[Mark] = []

    def all(self, *kinds: Kind) -> list[Mark]:
        """The marks of these kinds, in the order in which they came."""
        return [mark for mark in self.marks if mark.kind in kinds]

    def first(self, *kinds: Kind) -> Mark | None:
        """The first of them."""
        return next(iter(self.all(*kinds)), None)

    @property
    def outcome(self) -> Mark | None:
        """How the call ended, None while it runs."""
        return self.first(Kind.ANSWERED, Kind.FAILED)

    def size(self, *kinds: Kind) -> int:
        """How many bytes these marks are about."""
        return sum(mark.size for mark in self.all(*kinds))


class Timeline:
    """Lanes over one time axis, which begins when it is shown and spans so many seconds; a renderable for rich."""

    def __init__(self, lanes: Sequence[Lane], span: float, forget_after: float, clock: Callable[[], float]) -> None:
        self.lanes = lanes
        self._span = span
        self._forget_after = forget_after
        self._clock = clock
        self._start = math.nan
        self._notes: list[Text] = []
        #: Called with each note, instead of keeping it for the picture.
        self.print_note: Callable[[Text], object] | None = None

    def begin(self) -> None:
        """From now on time counts."""
        self._start = self._clock()

    def mark(self, lane: Lane, kind: Kind, at: float, size: int = 0, *, word: str = "", note: str = "") -> None:
        """Record what happened at this moment of the clock; a note puts it into words."""
        mark = Mark(kind, max(0.0, at - self._start), size, word)
        lane.marks.append(mark)
        if note:
            self._note(lane, mark, note)

    def _note(self, lane: Lane, mark: Mark, note: str) -> None:
        moment = f"{mark.at:6.2f} s  "
        text = Text.assemble((moment, "dim"), (f"{lane.name}  ", "bold"), (note, _STYLES[mark.kind]))
        if self.print_note is not None:
            self.print_note(text)
        elif mark.kind not in (Kind.PING, Kind.ACK):
            # The picture shows these, and there may be many of them.
            self._notes.append(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = self._clock() - self._start
        painter = _Painter(glyphs(console), max(options.max_width, _LEAST_WIDTH) - _MARGIN - 1, self._span)
        for number, lane in enumerate(self.lanes):
            if number:
                yield Text()
            yield painter.heading(lane, now)
            yield painter.row("sent", painter.sent(lane))
            yield painter.row("flow", painter.flow(lane, now, self._forget_after))
            yield painter.row("received", painter.received(lane))
        yield painter.row("seconds", painter.axis())
        if self._notes:
            yield Text()
            yield from self._notes


@contextlib.contextmanager
def show(timeline: Timeline, console: Console) -> Iterator[None]:
    """Keep the timeline in the terminal up to date; elsewhere print lines as things happen, and the picture at last."""
    timeline.begin()
    if console.is_terminal and not console.is_dumb_terminal:
        # Drawn in a thread of its own: a terminal that stands still must not hold up the connections.
        with Live(timeline, console=console, refresh_per_second=_REFRESHES_PER_SECOND):
            yield
        return
    timeline.print_note = lambda note: console.print(note, soft_wrap=True)
    yield
    console.print()
    console.print(timeline)


_STYLES = {
    Kind.SENT: "bright_blue",
    Kind.RECEIVED: "bright_blue",
    Kind.PING: "bold cyan",
    Kind.ACK: "bold cyan",
    Kind.SENT_IN_VAIN: "red",
    Kind.NOT_RECEIVED: "red",
    Kind.FORGOTTEN: "yellow",
    Kind.ANSWERED: "bold green",
    Kind.FAILED: "bold red",
}


@dataclass(frozen=True, slots=True)
class _Word:
    """A word to be written beside a glyph that stands at a moment."""

    column: int
    glyph: str
    text: str
    style: str


class _Cells:
    """A row of characters, each with a style."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._cells = [(" ", "")] * width

    def put(self, column: int, text: str, style: str) -> None:
        """Write over what is there."""
        for offset, character in enumerate(text):
            if 0 <= column + offset < self.width:
                self._cells[column + offset] = character, style

    def put_words(self, words: Sequence[_Word], blank: str = "") -> None:
        """Write words, in the order of their columns: each whole if there is room for it, else its glyph alone.

        `blank` stands between a word and the line that it interrupts.
        """
        taken = 0
        for number, word in enumerate(words, 1):
            is_last = number == len(words)
            after = f"{word.glyph} {word.text}".lstrip()
            before = f"{blank}{word.text} {word.glyph}"
            if word.column + len(after) < (self.width + 1 if is_last else words[number].column):
                self.put(word.column, after + blank, word.style)
                taken = word.column + len(after + blank)
            elif is_last and word.column + 1 - len(before) >= taken:
                self.put(word.column + 1 - len(before), before, word.style)
            else:
                self.put(word.column, after[:1], word.style)
                taken = word.column + 1

    def text(self) -> Text:
        """For rich."""
        groups = itertools.groupby(self._cells, key=lambda cell: cell[1])
        return Text.assemble(*(("".join(character for character, _ in group), style) for style, group in groups))


class _Painter:
    """Draws rows of one width over one span of time."""

    def __init__(self, glyphs: Glyphs, width: int, span: float) -> None:
        self._glyphs = glyphs
        self._width = width
        self._span = span

    def _column(self, at: float) -> int:
        return min(self._width - 1, int(at / self._span * self._width))

    def row(self, name: str, cells: _Cells) -> Text:
        """A row with its name before it."""
        row = Text.assemble((f"  {name:<{_MARGIN - 2}}", "dim"), cells.text())
        row.rstrip()
        return row

    def heading(self, lane: Lane, now: float) -> Text:
        """The lane's name, how its call is doing, and its figures."""
        outcome = lane.outcome
        if outcome is None:
            state, style = f"waiting, {now:.1f} s", ""
        else:
            state, style = f"{outcome.word} after {outcome.at:.1f} s", _STYLES[outcome.kind]
        pings, acks = len(lane.all(Kind.PING)), len(lane.all(Kind.ACK))
        figures = (
            f"{lane.size(Kind.SENT, Kind.SENT_IN_VAIN):,} bytes out, {lane.size(Kind.RECEIVED):,} in"
            f"   PINGs {pings}, ACKs {acks}"
        )
        gap = self._width + _MARGIN - len(lane.name) - 2 - len(state) - len(figures)
        return Text.assemble((f"{lane.name}  ", "bold"), (state, style), (" " * max(gap, 2) + figures, "dim"))

    def sent(self, lane: Lane) -> _Cells:
        """What the client sent."""
        cells = self._bytes(lane, Kind.SENT, self._glyphs.sent)
        for mark in lane.all(Kind.SENT_IN_VAIN):
            cells.put(self._column(mark.at), self._glyphs.lost, _STYLES[mark.kind])
        forgotten = lane.first(Kind.FORGOTTEN)
        words = []
        for mark in lane.all(Kind.PING):
            in_vain = forgotten is not None and mark.at >= forgotten.at
            style = "bold red" if in_vain else _STYLES[Kind.PING]
            words.append(_Word(self._column(mark.at), "", "PING", style))
        cells.put_words(words)
        return cells

    def received(self, lane: Lane) -> _Cells:
        """What reached the client, and what should have."""
        cells = self._bytes(lane, Kind.RECEIVED, self._glyphs.received)
        words = [_Word(self._column(mark.at), "", "ACK", _STYLES[mark.kind]) for mark in lane.all(Kind.ACK)]
        dropped = lane.first(Kind.NOT_RECEIVED)
        if dropped is not None:
            words.append(_Word(self._column(dropped.at), self._glyphs.lost, "dropped", _STYLES[dropped.kind]))
        cells.put_words(words)
        return cells

    def flow(self, lane: Lane, now: float, forget_after: float) -> _Cells:
        """The middlebox's memory of the flow, and the call's end."""
        outcome, forgotten = lane.outcome, lane.first(Kind.FORGOTTEN)
        cells = _Cells(self._width)
        passed = [mark.at for mark in lane.all(Kind.SENT, Kind.RECEIVED)]
        end = self._column(outcome.at if outcome else now)
        for column in range(end + 1):
            # A column stands for all of its time: bytes that pass in it renew the flow.
            at = (column + 1) * self._span / self._width
            silence = at - max((moment for moment in passed if moment <= at), default=0.0)
            if forgotten is not None and column >= self._column(forgotten.at):
                cells.put(column, self._glyphs.forgotten, "red")
            elif silence < _FADING * forget_after:
                cells.put(column, self._glyphs.fresh, "green")
            else:
                cells.put(column, self._glyphs.fading, "yellow")
        words = []
        if forgotten is not None:
            words.append(_Word(self._column(forgotten.at), self._glyphs.lost, forgotten.word, "bold red"))
        if outcome is not None:
            glyph = self._glyphs.good if outcome.kind is Kind.ANSWERED else self._glyphs.bad
            words.append(_Word(end, glyph, outcome.word, _STYLES[outcome.kind]))
        cells.put_words(words, blank=" ")
        return cells

    def axis(self) -> _Cells:
        """The seconds, as many as there is room for."""
        cells = _Cells(self._width)
        least = self._span / self._width * _STEP_COLUMNS
        powers = (digit * 10.0**exponent for exponent in itertools.count(-3) for digit in (1, 2, 5))
        step = next(power for power in powers if power >= least)
        for number in range(int(self._span / step) + 1):
            label = f"{number * step:g}"
            column = self._column(number * step)
            if column + len(label) <= self._width:
                cells.put(column, label, "dim")
        return cells

    def _bytes(self, lane: Lane, kind: Kind, glyph: str) -> _Cells:
        cells = _Cells(self._width)
        for mark in lane.all(kind):
            cells.put(self._column(mark.at), glyph, _STYLES[kind])
        return cells
