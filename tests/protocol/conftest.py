"""All tests of the protocol run on each engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.engines import ENGINES, stand_in_for_the_default

if TYPE_CHECKING:
    from collections.abc import Iterator


# Once a module, since Hypothesis runs many examples in one test.
@pytest.fixture(scope="module", autouse=True, params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The engine that the test runs on."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in_for_the_default(request.param, monkeypatch)
        yield request.param
