"""Every look for leaks visits all objects, of which the SDKs are some 200,000."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from support.background import nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def clean() -> Iterator[None]:
    """Fail if the test leaves threads or sockets behind."""
    with nothing_left():
        yield
