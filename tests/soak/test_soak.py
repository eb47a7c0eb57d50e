"""A few seconds of each soak; `make soak`, or `python -m soak`, makes it as long as you like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent.parent
_SEED = int(os.environ.get("H2KEEP_SOAK_SEED", "1"))
_SECONDS = float(os.environ.get("H2KEEP_SOAK_SECONDS", "1"))
#: Beyond the storm itself: what hangs is told of after 45 s.
_PATIENCE = 100.0

KINDS = [
    "asyncio-h2keep-h2",
    "uvloop-httpx2-ngh2",
    "asyncio+thread-httpx-h2",
    "trio-h2keep-ngh2",
    "trio+thread-httpx2-ngh2",
    "loops-h2keep-ngh2",
    "threads-httpx-ngh2",
    "forks-h2keep-h2",
]


@pytest.mark.timeout(_SECONDS + _PATIENCE + 10)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_hangs_nothing_leaks_nothing_is_sent_twice(kind: str) -> None:
    command = [sys.executable, "-W", "always", "-m", "soak", kind, "--seed", str(_SEED), "--seconds", str(_SECONDS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_TESTS), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS + _PATIENCE
    )
    assert process.stderr == ""
    assert process.returncode == 0, process.stdout
    seen = json.loads(process.stdout)
    assert seen["violations"] == []
    assert seen["generations"] >= 1
    assert seen["processed"] >= 1
