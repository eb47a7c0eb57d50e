"""Holds the parts that can be tested to the last branch to it: `protocol/` and `keepalive.py` (only with `--cov`)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

#: Of their lines and branches, in per cent.
LEAST = 98.0
PARTS = ["*/h2keep/protocol/*", "*/h2keep/keepalive.py"]

_reached = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Fail the session, after pytest-cov has gathered its data, where too little was reached."""
    result = yield
    plugin = session.config.pluginmanager.getplugin("_cov")
    coverage = getattr(getattr(plugin, "cov_controller", None), "cov", None)
    if coverage is not None and not session.testsfailed:
        reached = session.config.stash[_reached] = coverage.report(include=PARTS, file=io.StringIO())
        if reached < LEAST:
            session.testsfailed += 1
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was reached."""
    reached = config.stash.get(_reached, None)
    if reached is not None:
        verdict = "" if reached >= LEAST else f", less than {LEAST:g} %: FAILED"
        terminalreporter.write_line(f"branch coverage of protocol/ and keepalive.py: {reached:.1f} %{verdict}")
