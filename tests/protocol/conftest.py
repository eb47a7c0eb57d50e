"""All tests of the protocol run on each engine, but for those of modules that say which by `ENGINES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.engines import ENGINES, stand_in_for_the_default

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """See the module's docstring."""
    # Once a module and not once a test, since Hypothesis runs many examples in one test.
    engines = getattr(metafunc.module, "ENGINES", ENGINES)
    metafunc.parametrize("engine", engines, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The engine that the test runs on."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in_for_the_default(request.param, monkeypatch)
        yield request.param
