"""The demo's picture, drawn from marks at given moments."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from h2keep.cli.timeline import Kind, Lane, Timeline, show


class Stage:
    """Two lanes over ten seconds, on a clock that the test sets; a middlebox forgets after four."""

    def __init__(self) -> None:
        self.now = 100.0
        self.httpx2, self.h2keep = Lane("httpx2"), Lane("h2keep")
        self.timeline = Timeline([self.httpx2, self.h2keep], 10.0, 4.0, lambda: self.now)
        self.timeline.begin()

    def mark(self, lane: Lane, kind: Kind, at: float, size: int = 0, *, word: str = "", note: str = "") -> None:
        self.timeline.mark(lane, kind, 100.0 + at, size, word=word, note=note)

    def play(self) -> None:
        """What happens while the model is silent for six seconds."""
        for lane in (self.httpx2, self.h2keep):
            self.mark(lane, Kind.SENT, 0.0, 1000)
            self.mark(lane, Kind.RECEIVED, 0.0, 2000)
        self.mark(self.h2keep, Kind.PING, 2.0)
        self.mark(self.h2keep, Kind.SENT, 2.0, 17)
        self.mark(self.h2keep, Kind.RECEIVED, 2.0, 17)
        self.mark(self.h2keep, Kind.ACK, 2.0)
        self.mark(self.httpx2, Kind.FORGOTTEN, 4.0, word="forgotten", note="no byte")
        self.mark(self.h2keep, Kind.PING, 4.0)
        self.mark(self.h2keep, Kind.SENT, 4.0, 17)
        self.mark(self.h2keep, Kind.ACK, 4.0)
        self.mark(self.httpx2, Kind.NOT_RECEIVED, 6.0, 300, note="dropped it")
        self.mark(self.h2keep, Kind.ANSWERED, 6.0, word="answered")
        self.mark(self.httpx2, Kind.FAILED, 9.9, word="ReadTimeout")
        self.now = 110.0

    def picture(self, *, encoding: str = "utf-8", width: int = 80) -> list[str]:
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding=encoding)
        Console(file=file, width=width).print(self.timeline)
        file.flush()
        return raw.getvalue().decode(encoding).splitlines()


def test_picture_of_a_whole_run() -> None:
    stage = Stage()
    stage.play()
    assert stage.picture() == [
        "httpx2  ReadTimeout after 9.9 s     1,000 bytes out, 2,000 in   PINGs 0, ACKs 0",
        "  sent     ▲",
        "  flow     ━━━━━━━━━━━━━━━━───────────✕ forgotten ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ ReadTimeout ✗",
        "  received ▼                                       ✕ dropped",
        "",
        "h2keep  answered after 6.0 s        1,034 bytes out, 2,017 in   PINGs 2, ACKs 2",
        "  sent     ▲            PING          PING",
        "  flow     ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━✓ answered",
        "  received ▼            ACK           ACK",
        "  seconds  0     1      2      3      4      5     6      7      8      9",
        "",
        "  4.00 s  httpx2  no byte",
        "  6.00 s  httpx2  dropped it",
    ]


def test_picture_for_a_terminal_without_unicode() -> None:
    stage = Stage()
    stage.play()
    picture = stage.picture(encoding="ascii")
    assert picture[2] == "  flow     ================-----------x forgotten ............... ReadTimeout !"
    assert picture[7] == "  flow     ========================================+ answered"


def test_picture_while_it_runs() -> None:
    stage = Stage()
    stage.now = 101.0
    stage.mark(stage.httpx2, Kind.SENT, 0.5, 10)
    picture = stage.picture()
    assert picture[0].startswith("httpx2  waiting, 1.0 s  ")
    assert picture[2] == "  flow     ━━━━━━━"


def test_ping_in_vain_is_seen() -> None:
    stage = Stage()
    stage.mark(stage.h2keep, Kind.FORGOTTEN, 2.0, word="vanished")
    stage.mark(stage.h2keep, Kind.SENT_IN_VAIN, 2.5, 17)
    stage.mark(stage.h2keep, Kind.PING, 4.0)
    stage.mark(stage.h2keep, Kind.SENT_IN_VAIN, 4.0, 17)
    stage.mark(stage.h2keep, Kind.FAILED, 6.0, word="PingTimeout")
    _, sent, flow, received, *_ = stage.picture()[5:]
    assert sent == "  sent                      ✕         PING"
    assert flow == "  flow     ━━━━━━━━━━━━━✕ vanished ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄✗ PingTimeout"
    assert received == "  received"


def test_words_that_have_no_room_are_shortened() -> None:
    stage = Stage()
    for at in (1.0, 1.4, 1.8):
        stage.mark(stage.h2keep, Kind.PING, at)
        stage.mark(stage.h2keep, Kind.ACK, at)
    stage.mark(stage.h2keep, Kind.FORGOTTEN, 9.5, word="forgotten")
    stage.mark(stage.h2keep, Kind.FAILED, 9.9, word="PingTimeout")
    _, sent, flow, received, *_ = stage.picture()[5:]
    assert sent == "  sent           P  P  PING"
    assert received == "  received       A  A  ACK"
    assert flow.endswith("✕┄┄✗")


@pytest.mark.parametrize("width", [20, 60, 200])
def test_picture_fits_its_width(width: int) -> None:
    stage = Stage()
    stage.play()
    assert max(map(len, stage.picture(width=width))) <= width


@pytest.mark.parametrize(("span", "labels"), [(0.05, "0.005"), (15.3, "2"), (100_000.0, "10000")])
def test_axis_suits_its_span(span: float, labels: str) -> None:
    timeline = Timeline([Lane("h2keep")], span, 1.0, lambda: 0.0)
    timeline.begin()
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(timeline)
    axis = capture.get().splitlines()[-1].split()
    assert axis[:3] == ["seconds", "0", labels]
    assert len(axis) > 4


def test_lines_where_there_is_no_terminal() -> None:
    stage = Stage()
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture, show(stage.timeline, console):
        stage.mark(stage.h2keep, Kind.PING, 2.0, note="PING sent")
    lines = capture.get().splitlines()
    assert lines[0] == "  2.00 s  h2keep  PING sent"
    assert lines[2].startswith("httpx2  waiting")


def test_terminal_shows_the_picture_alone() -> None:
    stage = Stage()
    file = io.StringIO()
    with show(stage.timeline, Console(file=file, width=80, force_terminal=True, _environ={"TERM": "xterm"})):
        stage.play()
        stage.mark(stage.h2keep, Kind.PING, 6.0, note="PING sent")
    screen = file.getvalue()
    assert "no byte" in screen
    assert "PING sent" not in screen
    assert "✓ answered" in screen
