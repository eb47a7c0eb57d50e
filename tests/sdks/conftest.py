"""What the tests of SDKs for threads share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.background import nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def clean() -> Iterator[None]:
    """Fail if the test leaves threads or sockets behind."""
    with nothing_left():
        yield
