"""Where PINGs' payloads and jitter come from: the kernel, which is asked once for both."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from h2keep.runner.chance import KernelRandom

if TYPE_CHECKING:
    import pytest


def test_a_payload_and_the_fraction_drawn_with_it_are_fetched_together_and_used_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched: list[bytes] = []
    urandom = os.urandom

    def fetch(n: int) -> bytes:
        fetched.append(urandom(n))
        return fetched[-1]

    monkeypatch.setattr(os, "urandom", fetch)
    source = KernelRandom()
    fetched.clear()
    for number in range(100):
        payload = source.randbytes(8)
        share = source.random()
        assert len(fetched) == number + 1
        assert payload == fetched[-1][:8]
        assert share == int.from_bytes(fetched[-1][8:]) / 2**32
    fetched.clear()
    assert all(0 <= source.random() < 1 for _ in range(100))
    assert len(fetched) == len(set(fetched)) == 100
