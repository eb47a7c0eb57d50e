"""The demo as its user meets it, run with short figures, and its verdicts on runs that went otherwise."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import signal
import subprocess
import sys
from importlib import metadata
from typing import Any

import httpx2
import openai
import pytest
from click.testing import CliRunner
from rich.console import Console

from h2keep.cli import demo as module
from h2keep.cli import main
from h2keep.cli.demo import run
from h2keep.cli.gateway import ANSWER, GatewayError
from h2keep.cli.report import Call, Pair, Report, Settings
from h2keep.cli.timeline import Kind, Lane, Timeline
from h2keep.errors import PingTimeout

SHORT = Settings(
    silence=1.6, forget_after=1.0, read_idle_timeout=0.4, ping_timeout=0.5, read_timeout=2.2, vanish_after=0.6
)


def test_demo_shows_what_it_promises() -> None:
    file = io.StringIO()
    report = asyncio.run(run(SHORT, Console(file=file, width=80, highlight=False)))
    figures = report.figures()
    assert report.ok, figures
    assert figures["settings"] == dataclasses.asdict(SHORT)
    _check_silent(figures["silent_answer"])
    _check_vanished(figures["vanished_server"])
    _check_print(file.getvalue())


def _check_print(text: str) -> None:
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[0] for line in lines if line.startswith(("✓", "✗"))] == ["✓"] * 4
    assert sum("✕ forgotten" in line for line in lines) == 1
    assert sum("✕ vanished" in line for line in lines) == 2
    assert any(line.startswith("  sent") and line.count("PING") >= 3 for line in lines)
    assert any(line.startswith("  received") and line.count("ACK") >= 3 for line in lines)
    assert f"h2keep  answered: {ANSWER}" in text


def _check_silent(calls: Any) -> None:
    stock, ours = calls["httpx2"], calls["h2keep"]
    assert (stock["answer"], stock["error"]["type"]) == (None, "ReadTimeout")
    assert stock["seconds"] >= SHORT.read_timeout
    assert SHORT.forget_after <= stock["forgotten_at"] < SHORT.silence
    assert stock["pings_sent"] == 0
    assert stock["bytes_dropped_towards_client"] > 0
    assert (ours["answer"], ours["error"], ours["forgotten_at"]) == (ANSWER, None, None)
    assert SHORT.silence <= ours["seconds"] < SHORT.read_timeout
    assert 3 <= ours["pings_sent"] == ours["pings_acknowledged"] == len(ours["round_trips"])
    assert ours["bytes_dropped_towards_client"] == ours["bytes_dropped_towards_server"] == 0


def _check_vanished(calls: Any) -> None:
    stock, ours = calls["httpx2"], calls["h2keep"]
    assert stock["error"]["type"] == "ReadTimeout"
    assert stock["seconds_since_last_byte"] >= SHORT.read_timeout - 0.1
    assert ours["error"]["type"] == "PingTimeout"
    assert "read_idle_timeout=0.4, ping_timeout=0.5" in ours["error"]["message"]
    # The jitter shortens the one; the other is waited for in full.
    assert SHORT.promised - 0.1 <= ours["seconds_since_last_byte"] <= SHORT.promised + 0.5
    assert (ours["pings_sent"], ours["pings_acknowledged"]) == (1, 0)
    assert ours["bytes_dropped_towards_server"] > 0


def test_ctrl_c_ends_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "h2keep", "demo", "--read-idle-timeout=0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert any("PING sent" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (130, "interrupted\n")


def test_ctrl_c_while_importing() -> None:
    script = (
        "import importlib, os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'h2keep.cli.demo':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from h2keep.cli import main\n"
        "main(['demo'])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--silence", "nan"], "Invalid value for '--silence': nan is not a finite number of seconds above 0."),
        (["--ping-timeout", "0"], "Invalid value for '--ping-timeout': 0 is not a finite number of seconds above 0."),
        (["--vanish-after", "x"], "Invalid value for '--vanish-after': 'x' is not a valid float."),
        (["--forget-after", "2"], "--forget-after 2: must be more than --read-idle-timeout (2), else no PING comes"),
        (["--silence", "3.5"], "--silence 3.5: must be more than --forget-after (4), else no flow is forgotten"),
        (["--read-timeout", "9"], "--read-timeout 9: must be more than --silence (9), else nobody waits"),
        (
            ["--ping-timeout", "10.5"],
            "--read-timeout 13: must exceed --read-idle-timeout and --ping-timeout together (12.5) by more than 0.5",
        ),
    ],
)
def test_figures_that_show_nothing_are_refused(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(main, ["demo", *arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("package", ["click", "rich", "openai", "hypercorn", "trustme", "httpx2"])
def test_missing_package_is_named_in_one_sentence(package: str) -> None:
    script = f"import sys; sys.modules[{package!r}] = None; from h2keep.cli import main; main(['demo'])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"{package}, which is not installed" in line
    assert "pip install 'h2keep[" in line
    assert "h2keep[demo]'" in line


def test_a_bug_is_not_taken_for_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "h2keep.cli.demo")
    monkeypatch.setitem(sys.modules, "h2keep.cli.timeline", None)
    result = CliRunner().invoke(main, ["demo"])
    assert isinstance(result.exception, ModuleNotFoundError)


def test_help_needs_nothing_but_click() -> None:
    packages = ("rich", "openai", "hypercorn", "trustme", "httpx2", "anyio", "h2")
    script = f"import sys; sys.modules.update(dict.fromkeys({packages})); from h2keep.cli import main; main(['-h'])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "demo  See a connection forgotten" in result.stdout


def test_version_and_unknown_commands() -> None:
    assert CliRunner().invoke(main, ["--version"]).stdout == f"h2keep {metadata.version('h2keep')}\n"
    result = CliRunner().invoke(main, ["dmeo"])
    assert (result.exit_code, "No such command 'dmeo'" in result.stderr) == (2, True)


@pytest.mark.parametrize("error", [GatewayError("no gateway"), OSError(24, "Too many open files")])
def test_it_says_why_it_cannot_start(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def fail(*_: object) -> Report:
        raise error

    monkeypatch.setattr(module, "run", fail)
    result = CliRunner().invoke(main, ["demo"])
    assert (result.exit_code, result.stderr, result.stdout) == (1, f"Error: {error}\n", "")


def test_a_call_that_never_ends_is_given_up() -> None:
    async def never(_client: openai.AsyncOpenAI) -> str:
        await asyncio.sleep(60)
        return ""

    async def make() -> Call:
        lane = Lane("h2keep")
        timeline = Timeline([lane], 10.0, 4.0, asyncio.get_running_loop().time)
        timeline.begin()
        call = Call(lane, timeline, ("", ""))
        async with openai.AsyncOpenAI(api_key="x", http_client=openai.DefaultAsyncHttpxClient()) as client:
            await call.make(never, client, 0.01)
        return call

    call = asyncio.run(make())
    assert type(call.error) is TimeoutError
    assert call.figures()["error"] == {"type": "TimeoutError", "message": ""}


# Verdicts on runs that went otherwise


def call(*marks: tuple[Kind, float], answer: str | None = None, error: BaseException | None = None) -> Call:
    """A call that was seen like this, and ended like this after ten seconds."""
    lane = Lane("h2keep")
    timeline = Timeline([lane], 10.0, 4.0, lambda: 0.0)
    timeline.begin()
    made = Call(lane, timeline, ("", ""))
    for kind, at in marks:
        timeline.mark(lane, kind, at, 1)
    timeline.mark(lane, Kind.FAILED if error else Kind.ANSWERED, 10.0)
    made.answer, made.error = answer, error
    return made


LOST = call((Kind.FORGOTTEN, 4.0), (Kind.NOT_RECEIVED, 9.0), error=httpx2.ReadTimeout(""))
SURVIVED = call((Kind.PING, 2.0), (Kind.ACK, 2.0), answer=ANSWER)
DETECTED = call((Kind.RECEIVED, 6.0), error=PingTimeout("dead"))
LATE = call((Kind.RECEIVED, 0.0), error=httpx2.ReadTimeout(""))


def verdict(
    stock_silent: Call = LOST, ours_silent: Call = SURVIVED, stock_vanished: Call = LATE, ours_vanished: Call = DETECTED
) -> list[str]:
    """The names of what went wrong."""
    report = Report(Settings(), Pair(stock_silent, ours_silent), Pair(stock_vanished, ours_vanished))
    failed = [check.name for check in report.checks() if not check.ok]
    assert report.ok is (not failed)
    return failed


def test_verdict_when_all_goes_as_promised() -> None:
    assert verdict() == []


@pytest.mark.parametrize(
    "stock",
    [
        call(answer=ANSWER),
        call((Kind.FORGOTTEN, 4.0), error=httpx2.ReadTimeout("")),
        call((Kind.NOT_RECEIVED, 9.0), error=httpx2.ReadTimeout("")),
        call((Kind.FORGOTTEN, 4.0), (Kind.NOT_RECEIVED, 9.0), error=httpx2.ConnectError("")),
    ],
)
def test_verdict_when_stock_does_not_fail_as_described(stock: Call) -> None:
    assert verdict(stock_silent=stock) == ["httpx2_loses_answer"]


@pytest.mark.parametrize(
    "ours",
    [
        call((Kind.ACK, 2.0), error=PingTimeout("dead")),
        call((Kind.ACK, 2.0), answer="something else"),
        call((Kind.PING, 2.0), answer=ANSWER),
        call((Kind.ACK, 2.0), (Kind.FORGOTTEN, 4.0), answer=ANSWER),
    ],
)
def test_verdict_when_h2keep_does_not_survive(ours: Call) -> None:
    assert verdict(ours_silent=ours) == ["h2keep_survives"]


@pytest.mark.parametrize(
    "ours",
    [
        call((Kind.RECEIVED, 5.4), error=PingTimeout("too late")),
        call(error=PingTimeout("never connected")),
        call((Kind.RECEIVED, 6.0), error=httpx2.ReadTimeout("")),
        call((Kind.RECEIVED, 6.0), answer=ANSWER),
    ],
)
def test_verdict_when_h2keep_does_not_detect(ours: Call) -> None:
    assert verdict(ours_vanished=ours) == ["h2keep_detects"]


@pytest.mark.parametrize(
    "stock",
    [
        call((Kind.RECEIVED, 6.0), error=httpx2.ReadTimeout("")),
        call((Kind.RECEIVED, 0.0), error=httpx2.ReadError("")),
        call((Kind.RECEIVED, 0.0), answer=ANSWER),
    ],
)
def test_verdict_when_stock_detects_soon(stock: Call) -> None:
    assert verdict(stock_vanished=stock) == ["httpx2_detects_late"]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Report:
    """What the demo comes to, without being run."""
    report = Report(Settings(), Pair(LOST, LOST), Pair(LATE, call(answer=ANSWER)))

    async def pretend(_settings: Settings, console: Console) -> Report:
        module._print_verdict(report, console)
        return report

    monkeypatch.setattr(module, "run", pretend)
    return report


@pytest.mark.usefixtures("failing")
def test_failure_is_printed_and_ends_with_1() -> None:
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 1
    assert [line[0] for line in result.stdout.splitlines()[1:9:2]] == ["✓", "✗", "✗", "✓"]


def test_json_is_all_that_is_printed(failing: Report) -> None:
    result = CliRunner().invoke(main, ["demo", "--json"])
    figures = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (1, "")
    assert figures == failing.figures()
    assert figures["ok"] is False
    assert [check["ok"] for check in figures["checks"]] == [True, False, False, True]
    assert figures["versions"]["h2keep"] == metadata.version("h2keep")
