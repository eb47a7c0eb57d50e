"""Coverage, with `--cov`, is measured only where it is demanded: of `protocol/` and `keepalive.py`, by their own tests.

Those reach all of it; measured in all tests it would take longer than the tests themselves. How much is demanded is
said in pyproject.toml.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

_MEASURED = ("tests/protocol/", "tests/unit/")
#: What chance reaches is not held to anything.
_RANDOM = ("test_fuzz.py", "test_keepalive_properties.py", "test_schedules.py", "random_schedules")


def _controller(config: pytest.Config) -> Any:
    """Of pytest-cov; None without `--cov`."""
    return getattr(config.pluginmanager.getplugin("_cov"), "cov_controller", None)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """In a worker of pytest-xdist, end what pytest-cov began as if it were no worker: it would never be paused."""
    controller = _controller(session.config)
    if controller is not None and hasattr(session.config, "workerinput"):
        controller.cov.stop()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Measure this test, or don't."""
    controller = _controller(item.config)
    if controller is not None:
        measured = item.nodeid.startswith(_MEASURED) and not any(name in item.nodeid for name in _RANDOM)
        if measured and not controller.started:
            controller.resume()
        elif controller.started and not measured:
            controller.pause()
    return (yield)
