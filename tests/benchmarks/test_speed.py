"""The speed harness: a whole plan, right arithmetic, a page made of what was measured, robust workers."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
from benchmarks.__main__ import Session
from benchmarks.blocking import CANDIDATES as BLOCKING
from benchmarks.blocking import WORKLOADS as BLOCKING_WORKLOADS
from benchmarks.candidates import CANDIDATES
from benchmarks.codec import CANDIDATES as CODECS
from benchmarks.compare import compare, source
from benchmarks.measure import IMPORTED, ROOT, TOO_SLOW, Setting, hot_functions
from benchmarks.page import PLOTS, TEMPLATE, amended, key, write_page
from benchmarks.plan import CASES, FIGURES, Case, Figure, Value, is_orientation
from benchmarks.report import measure, records, tables, verdicts
from benchmarks.server import Kit, Placement, prepare
from benchmarks.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CASE = {case.name: case for case in CASES}
ANYWHERE = Placement(None, None)
RATE = Value("rr@16", "h2keep", "per_second")


def rounds(*values: float | None, metric: str = "per_second") -> list[Mapping[str, float] | None]:
    return [None if value is None else {metric: value, "client_busy": 0.99, "server_busy": 0.3} for value in values]


@pytest.fixture(scope="module")
def kit() -> Iterator[Kit]:
    with prepare() as made:
        yield made


# The plan


def known(case: Case) -> set[str]:
    if case.scenario == "import":
        return set(IMPORTED)
    if case.scenario == "codec":
        return set(CODECS)
    return set(BLOCKING) if case.scenario in BLOCKING_WORKLOADS else {*CANDIDATES, "go"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_can_be_run(case: Case) -> None:
    assert case.scenario in {*WORKLOADS, *BLOCKING_WORKLOADS, "codec", "import"}
    assert {name.partition("@")[0] for name in case.candidates} <= known(case)
    for name, loop in (name.split("@") for name in case.candidates if "@" in name):
        assert loop in CANDIDATES[name].loops
    assert len(set(case.candidates)) == len(case.candidates)
    assert set(case.quick) <= set(case.parameters)
    assert set(case.once) <= set(case.candidates)
    if "go" in case.candidates:
        scenarios = (ROOT / "benchmarks" / "goclient" / "main.go").read_text().partition("var scenarios")[2]
        assert f'"{case.scenario}": ' in scenarios


def test_cases_have_names_of_their_own() -> None:
    assert len(CASE) == len(CASES)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.what)
def test_a_figure_is_measured(figure: Figure) -> None:
    for value in figure.values():
        case = CASE[value.case]
        assert value.candidate in case.candidates
        assert value.metric in {column.metric for column in case.columns}
        # A bound is worth all rounds.
        assert not is_orientation(value.candidate) or figure.passes(1.0) is None


def test_figures_have_names_of_their_own_and_at_most_one_bound() -> None:
    assert len({figure.what for figure in FIGURES}) == len(FIGURES)
    assert all(figure.at_least is None or figure.at_most is None for figure in FIGURES)


def test_what_one_engine_is_held_to_the_other_is_too() -> None:
    held = {figure.what for figure in FIGURES if figure.passes(1.0) is not None}
    cases = {CASE[figure.value.case].scenario for figure in FIGURES} - {"import"}
    for scenario in cases:
        assert any(what.startswith(scenario) and "-ngh2" in what for what in held), scenario


def test_the_page_has_a_place_for_each_case() -> None:
    places = {key(case) for case in CASES} | {"about", "figures", "missed", "absent"}
    assert set(Template(TEMPLATE.read_text()).get_identifiers()) == places


# Arithmetic


def test_a_ratio_is_taken_round_by_round() -> None:
    # The machine was three times as fast in the last round; the ratio of the medians would be 2.
    results = {"rr@16": {"h2keep": rounds(100, 110, 330), "pyreqwest": rounds(50, 55, 300)}}
    figure = Figure("", RATE, replace(RATE, candidate="pyreqwest"))
    assert measure(results, figure) == (2.0, 1.1, 2.0)


def test_a_round_without_a_result_is_not_paired_with_another() -> None:
    results = {"rr@16": {"h2keep": rounds(100, None, 300), "pyreqwest": rounds(50, 60, None)}}
    assert measure(results, Figure("", RATE, replace(RATE, candidate="pyreqwest"))) == (2.0, 2.0, 2.0)


def test_a_value_is_the_median_with_the_least_and_the_greatest() -> None:
    assert measure({"rr@16": {"h2keep": rounds(3, 1, 2)}}, Figure("", RATE)) == (2, 1, 3)


@pytest.mark.parametrize(
    ("bounds", "measured", "passes"),
    [
        ({"at_least": 2.0}, 2.0, True),
        ({"at_least": 2.0}, 1.99, False),
        ({"at_most": 2.0}, 2.0, True),
        ({"at_most": 2.0}, 2.01, False),
        ({}, 1.0, None),
    ],
)
def test_a_bound_is_kept_or_missed(bounds: dict[str, Any], measured: float, passes: bool | None) -> None:
    assert Figure("", RATE, **bounds).passes(measured) is passes


def test_no_figure_is_left_out_because_its_candidate_failed() -> None:
    results = {"rr@16": {"h2keep": rounds(100), "pyreqwest": rounds(200), "httpx2": rounds(None)}}
    results["rr@16"]["h2keep-httpx2"] = rounds(300)
    words = {item.figure.what: item.word for item in verdicts(results, {"h2keep-ngh2"})}
    assert words == {
        "rr@16: h2keep / pyreqwest, requests/s": "MISS",
        "rr@16: h2keep-ngh2 / pyreqwest, requests/s": "not measured",
        "rr@16: h2keep-httpx2 / httpx2, requests/s": "not measured",
    }
    assert [record["median"] for record in records(results, {"h2keep-ngh2"})] == [0.5, None, None]


def test_tables_say_why_there_is_no_result() -> None:
    results = {"rr@16": {"h2keep": rounds(100), "httpx2": rounds(None)}}
    text = tables(CASES, results, {"rr@16": {"httpx2": "it fell over"}}, {"go": "no Go here"}, quick=False)
    assert "no result: it fell over" in text
    assert "no Go here" in text


def test_candidates_for_orientation_take_part_in_fewer_rounds() -> None:
    case = replace(CASE["rr@16"], once=("niquests",), rounds=4)
    part = {name: [number for number in range(1, 7) if case.takes_part(name, number)] for name in case.candidates}
    assert part["h2keep"] == part["pyreqwest"] == [1, 2, 3, 4]
    assert part["h2keep@trio"] == part["aiohttp"] == [1, 2, 3]
    assert part["niquests"] == [1]


def test_a_profile_counts_innermost_functions() -> None:
    stacks = "run (a.py:1);read (b.py:10) 6\nrun (a.py:1);read (b.py:12) 1\nrun (a.py:2) 2\nrun (a.py:2);unnamed 1\n"
    assert hot_functions(stacks) == [("read (b.py)", 0.7), ("run (a.py)", 0.2), ("unnamed", 0.1)]
    with pytest.raises(ValueError, match="nothing"):
        hot_functions("")


# The page


@pytest.fixture
def report() -> dict[str, Any]:
    """A run of one round, as `run --json` leaves it."""
    return {
        "about": {
            "when": "2026-01-02T03:04:05+00:00",
            "commit": "0123456789abcdef",
            "modified": True,
            "python": "3.11.7",
            "versions": {"h2": "4.4.1", "trio": None},
            "machine": {"system": "Linux", "processor": "A CPU", "cores": 2, "load": [0, 0, 0]},
            "quick": False,
            "rounds": 1,
        },
        "cases": {"rr@16": {"concurrency": 16}},
        "results": {"pinned": {"rr@16": {"h2keep": rounds(100), "pyreqwest": rounds(200), "httpx2": rounds(None)}}},
        "failures": {"pinned": {"rr@16": {"httpx2": "it | fell over"}}},
        "unavailable": {"h2keep-ngh2": "no such engine"},
        "profiles": {"rr@16 h2keep": [["feed (parser.py)", 0.25]]},
    }


def test_the_page_is_made_of_the_results_alone(report: dict[str, Any], tmp_path: Path) -> None:
    write_page(report, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "2026-01-02 at commit `0123456789ab` with changes that were not committed, 1 round, on 2 cores" in page
    assert "| rr@16: h2keep / pyreqwest, requests/s | >= 0.85x | 0.50x | 0.50x .. 0.50x | **missed** |" in page
    assert "1 of 2 figures were missed, and 1 could not be measured." in page
    assert "0.50x where >= 0.85x was to be reached. The client's own CPU is what bounds it (99% of a core" in page
    assert "`feed (parser.py)` 25%" in page
    assert "| h2keep | 100 | - |" in page
    assert "The server was nobody's bottleneck" in page
    assert "no result: it \\| fell over" in page
    assert "| h2keep-ngh2 | no such engine |" in page
    assert "*download* was not measured in this run." in page
    assert "$" not in page


def test_plots_are_svg_and_the_same_for_the_same_numbers(report: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_page(report, tmp_path / f"{name}.md")
    drawn = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert drawn == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    assert set(drawn) == {f"{name}.svg" for name in PLOTS}
    assert all(ElementTree.fromstring(image).tag.endswith("svg") for image in drawn.values())
    assert b"h2keep" in drawn["requests.svg"]


def test_links_of_the_page_lead_somewhere(report: dict[str, Any], tmp_path: Path) -> None:
    write_page(report, tmp_path / "performance.md")
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (tmp_path / "performance.md").read_text())
    assert {Path(image).stem for image in images} == set(PLOTS)
    assert all((tmp_path / image).exists() for image in images)


# Measuring

# The first of these builds the Go programs, which takes a while where Go has not been used before.
SLOW = pytest.mark.timeout(300)
SHORT = replace(CASE["rr@1"], parameters={"concurrency": 1, "warmup": 0.05, "seconds": 0.2})


@SLOW
@pytest.mark.parametrize("candidate", ["h2keep", "h2keep-httpx2@trio", "pyreqwest", "go"])
def test_a_measurement(kit: Kit, candidate: str) -> None:
    metrics = Setting(kit, ANYWHERE, quick=False).measure(SHORT, candidate)
    assert not isinstance(metrics, str)
    assert metrics["units"] > 0
    assert metrics["cpu_us"] > 0
    assert metrics["connections"] == 1
    assert metrics["p50_ms"] <= metrics["p99_ms"]


@SLOW
@pytest.mark.parametrize("scenario", ["upload", "sse-bytes", "idle", "reconnect", "slow"])
def test_python_and_go_measure_the_same(kit: Kit, scenario: str) -> None:
    case = CASE[scenario]
    setting = Setting(kit, ANYWHERE, quick=True)
    mine = setting.measure(case, "h2keep")
    assert not isinstance(mine, str)
    assert {column.metric for column in case.columns} <= set(mine)
    if "go" in case.candidates:
        theirs = setting.measure(case, "go")
        assert not isinstance(theirs, str)
        # What fails is counted by the Python clients alone, as Go's ends with it.
        assert set(mine) - {"failed"} == set(theirs)
        # On a busy machine one or the other of many connections is made anew.
        assert mine["connections"] == pytest.approx(theirs["connections"], rel=0.05) or scenario == "slow"


@SLOW
def test_a_candidate_that_hangs_costs_its_time_limit(kit: Kit) -> None:
    answer = Setting(kit, ANYWHERE, quick=False).measure(replace(SHORT, limit=0.01), "h2keep")
    assert answer == f"{TOO_SLOW} 0.01 s"


@SLOW
def test_it_is_not_tried_again_and_the_others_go_on(kit: Kit) -> None:
    cases = [replace(SHORT, limit=0.01), replace(CASE["codec"], parameters={"seconds": 0.01})]
    session = Session({"free": Setting(kit, ANYWHERE, quick=False)}, cases, ["h2keep"], patience=0)
    session.round(1)
    session.round(2)
    assert session.results["free"]["rr@1"] == {"h2keep": [None, None]}
    assert session.failures == {"free": {"rr@1": {"h2keep": f"{TOO_SLOW} 0.01 s"}}}
    assert len([metrics for metrics in session.results["free"]["codec"]["h2keep"] if metrics]) == 2
    assert session.expected(3) == session.expected(2) > 0


@SLOW
def test_a_candidate_that_fails_says_why(kit: Kit) -> None:
    setting = Setting(kit, ANYWHERE, quick=False)
    assert setting.measure(replace(SHORT, parameters={}), "h2keep") == "KeyError: 'warmup'"
    assert setting.missing(SHORT, "nobody") == "KeyError: 'nobody'"
    assert setting.missing(SHORT, "pyreqwest@trio") == "ValueError: pyreqwest can't run on 'trio'"


@SLOW
def test_who_can_take_part_is_found_out_by_making_it(kit: Kit) -> None:
    setting = Setting(kit, ANYWHERE, quick=False)
    assert [setting.missing(CASE[name], "h2keep") for name in ("rr@1", "threads@1", "codec", "import")] == [None] * 4


@SLOW
def test_a_run_from_the_command_line_to_the_page(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    base = [sys.executable, "-m", "benchmarks"]
    run = ["run", "--quick", "--scenario", "codec", "import", "--candidates", "h2keep", "--json", str(results)]
    done = subprocess.run([*base, *run], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "codec seconds=0.2" in done.stdout
    assert json.loads(results.read_text())["results"]["pinned"]["codec"]["h2keep"][0]["per_second"] > 0
    page = tmp_path / "page.md"
    subprocess.run([*base, "report", str(results), "--output", str(page)], cwd=ROOT, check=True, capture_output=True)
    assert "This was a quick run" in page.read_text()


@SLOW
@pytest.mark.parametrize(("at_least", "status"), [(0.001, 0), (1000.0, 1)])
def test_two_states_of_the_source_are_compared(
    at_least: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = compare((".", "."), [SHORT], ["h2keep"], ANYWHERE, rounds=1, at_least=at_least, quick=False)
    assert answer == status
    assert re.search(r"rr@1  h2keep +\d\.\d{3}  \[", capsys.readouterr().out)


def test_a_commit_is_imported_from_a_folder_of_its_own() -> None:
    with source("HEAD") as path:
        assert (path / "h2keep" / "__init__.py").exists()
        assert not path.is_relative_to(ROOT)
    assert not path.exists()


def test_the_relay_is_as_slow_as_it_is_asked_to_be() -> None:
    size, mbit, round_trip = 1 << 20, 50.0, 0.1
    with socket.create_server(("127.0.0.1", 0)) as far:
        command = [sys.executable, "-m", "benchmarks.relay", "{}:{}".format(*far.getsockname())]
        command += ["--mbit", str(mbit), "--round-trip", str(round_trip)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as relay:
            assert relay.stdout is not None
            host, _, port = json.loads(relay.stdout.readline())["address"].rpartition(":")
            with socket.create_connection((host, int(port)), 20) as near, far.accept()[0] as peer:
                peer.settimeout(20)
                start = time.monotonic()
                near.sendall(b"?")
                peer.sendall(peer.recv(1))
                assert near.recv(1) == b"?"
                assert time.monotonic() - start >= round_trip
                start = time.monotonic()
                sender = threading.Thread(target=peer.sendall, args=(bytes(size),))
                sender.start()
                received = 0
                while received < size:
                    received += len(near.recv(65536))
                assert time.monotonic() - start >= size * 8 / mbit / 1e6 + round_trip / 2
                sender.join()
            assert relay.stdin is not None
            relay.stdin.close()
            assert relay.wait(20) == 0


def test_what_was_measured_again_takes_the_place_of_what_was_before() -> None:
    def run(commit: str, **numbers: float) -> dict[str, Any]:
        return {
            "about": {"commit": commit, "when": "2026-01-01T00:00:00", "rounds": 5},
            "cases": {name: {"seconds": 1} for name in numbers},
            "results": {"pinned": {name: {"h2keep": [{"mib_per_second": value}]} for name, value in numbers.items()}},
            "failures": {"pinned": {name: {"httpx": commit} for name in numbers}},
            "profiles": {f"{name} h2keep": commit for name in numbers},
            "unavailable": {},
        }

    before, after = run("a" * 40, upload=1.0, download=2.0), run("b" * 40, upload=3.0)
    del after["failures"]["pinned"]["upload"]
    whole = amended([before, after])
    assert whole["results"]["pinned"] == after["results"]["pinned"] | {
        "download": before["results"]["pinned"]["download"]
    }
    assert whole["failures"]["pinned"] == {"download": {"httpx": "a" * 40}}
    assert whole["profiles"] == {"upload h2keep": "b" * 40, "download h2keep": "a" * 40}
    assert whole["again"] == [(after["about"], ["upload"])]
    assert amended([before])["results"] == before["results"]
