"""Every test here must leave the process as it found it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.background import nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield
