"""Imports point down, and each layer loads no more than it needs. Each check runs in a fresh process."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "h2keep"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("h2keep", ["h2", "anyio", "httpx", "httpx2", "trio", "click", "rich", "ssl", "socket"]),
        ("h2keep.errors", ["h2", "anyio", "ssl", "socket"]),
        ("h2keep.keepalive", ["h2", "anyio", "ssl", "socket", "random"]),
        ("h2keep.protocol", ["anyio", "ssl", "socket", "asyncio", "trio", "random"]),
        ("h2keep.client", ["httpx", "httpx2", "trio", "click", "rich"]),
        ("h2keep.httpx2", ["httpx", "trio", "rich"]),
        ("h2keep.httpx", ["httpx2", "trio"]),
    ],
)
def test_importing_a_layer_loads_nothing_from_above(module: str, forbidden: list[str]) -> None:
    code = f"import sys, {module}; print(' '.join(name for name in {forbidden!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


LAYERS = ["errors", "keepalive", "protocol", "runner", "_connections", "client", "_transport", "httpx", "httpx2", "cli"]


def _layer(module: str) -> int:
    return LAYERS.index(module.split(".")[1])


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


MODULES = [
    path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] not in ("__init__.py", "__main__.py")
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = LAYERS.index(path.relative_to(SOURCE).parts[0].removesuffix(".py"))
    for name in _imports(path):
        if name.startswith("h2keep."):
            assert _layer(name) <= own, f"{path.name} imports {name}"


def test_the_protocol_layer_knows_no_io_no_clock_and_no_randomness() -> None:
    banned = {"socket", "ssl", "time", "random", "asyncio", "anyio", "trio", "threading", "logging", "select", "os"}
    for path in [SOURCE / "keepalive.py", *(SOURCE / "protocol").glob("*.py")]:
        roots = {name.split(".")[0] for name in _imports(path)}
        assert not roots & banned, path
        if path.name not in ("h2_engine.py", "hpack_memory.py"):
            assert not roots & {"h2", "hpack", "hyperframe"}, path
        if path.name != "h2_engine.py":
            assert "h2" not in roots, path
