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
        ("h2keep", ["h2", "anyio", "httpx", "httpx2", "trio", "click", "rich", "ssl", "socket", "h2keep.cli"]),
        ("h2keep.errors", ["h2", "anyio", "ssl", "socket"]),
        ("h2keep.keepalive", ["h2", "anyio", "ssl", "socket", "random"]),
        ("h2keep.protocol", ["anyio", "ssl", "socket", "asyncio", "trio", "random"]),
        ("h2keep.client", ["httpx", "httpx2", "trio", "click", "rich", "h2keep.cli"]),
        ("h2keep.sync", ["httpx", "httpx2", "trio", "click", "rich", "h2keep.cli"]),
        ("h2keep._install", ["h2", "anyio", "httpx", "httpx2", "trio", "ssl", "socket"]),
        ("h2keep.httpx2", ["httpx", "trio", "rich"]),
        ("h2keep.httpx", ["httpx2", "trio"]),
    ],
)
def test_importing_a_layer_loads_nothing_from_above(module: str, forbidden: list[str]) -> None:
    code = f"import sys, {module}; print(' '.join(name for name in {forbidden!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


#: From the bottom up; those of one line know nothing of each other.
LEVELS = [
    ("errors",),
    ("keepalive",),
    ("protocol",),
    ("runner",),
    ("_proxies",),
    ("_connections", "_fallback", "_recurring"),
    ("_messages",),
    ("client",),
    ("sync",),
    ("_library",),
    ("_bridge",),
    ("_transport",),
    ("httpx", "httpx2"),
    ("_httpcore",),
    ("_install",),
    ("cli",),
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def _imports(path: Path) -> set[str]:
    """What a module imports, for type checking alone included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            assert node.module is not None
            names |= {f"h2keep.{alias.name}" for alias in node.names} if node.module == "h2keep" else {node.module}
    return names


def _roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in _imports(path)}


MODULES = sorted(
    path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] not in ("__init__.py", "__main__.py")
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no place in LEVELS yet"
    for name in _imports(path):
        if name == "h2keep":
            assert own == "cli", f"{path} imports the public names, which stand above it"
        elif name.startswith("h2keep."):
            layer = name.split(".")[1]
            if own == "cli" and layer not in LEVEL:
                continue  # a public name
            assert layer == own or LEVEL[layer] < LEVEL[own], f"{path} imports {name}"


PURE = [SOURCE / "keepalive.py", *sorted((SOURCE / "protocol").glob("*.py"))]
IMPURE = {
    *("socket", "ssl", "select", "selectors", "subprocess", "os", "signal"),
    *("time", "datetime", "random", "secrets", "uuid", "logging"),
    *("asyncio", "anyio", "trio", "sniffio", "threading", "concurrent", "contextvars", "queue", "multiprocessing"),
}


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.name)
def test_k25_the_pure_layers_know_no_io_no_clock_and_no_randomness(path: Path) -> None:
    assert not _roots(path) & IMPURE


def test_one_module_knows_each_codec_and_one_more_knows_hpack() -> None:
    codecs = {
        "h2": {"h2_engine.py"},
        "hyperframe": {"h2_engine.py"},
        "hpack": {"h2_engine.py", "hpack_memory.py"},
        "ngh2": {"ngh2_blocks.py"},
    }
    for path in MODULES:
        for codec in _roots(path) & codecs.keys():
            assert path.name in codecs[codec], path
            assert path.parent.name == "protocol", path


def test_the_public_names_are_loaded_when_they_are_asked_for() -> None:
    code = """if True:
        import sys, h2keep
        loaded = [name for name in sys.modules if name.startswith("h2keep.")]
        assert loaded == [], loaded
        for name in h2keep.__all__:
            getattr(h2keep, name)
        loaded = {"httpx", "httpx2", "trio", "click", "rich", "h2keep.cli"} & sys.modules.keys()
        assert not loaded, loaded
    """
    subprocess.run([sys.executable, "-c", code], check=True)
