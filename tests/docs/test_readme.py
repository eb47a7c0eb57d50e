"""What README.md shows runs, what it names exists, and the figures that it states are the code's."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import anyio
import pytest

import h2keep
from docs.update_rules import ROOT
from h2keep import keepalive
from h2keep.cli.gateway import ANSWER, Gateway, gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
#: The program without an SDK, which has a main of its own.
PROGRAM = next(block for block in BLOCKS if "AsyncClient(" in block and "asyncio.run(main())" in block)
URL = re.compile(r"https://[\w.-]+(/[\w./-]*)")


@pytest.fixture
def anyio_backend() -> str:
    """The gateway's process is started with asyncio."""
    return "asyncio"


@pytest.fixture
async def served() -> AsyncIterator[Gateway]:
    async with gateway() as served:
        yield served


async def run(source: str, served: Gateway, directory: Path) -> str:
    """Run a program in a process of its own that finds the gateway in the place of every service; its output."""
    authority = directory / "authority.pem"
    authority.write_text(served.authority)
    base = f"https://{served.host}:{served.port}"
    source = URL.sub(lambda url: base + ("/sse" if "event" in url[1] else "/echo"), source)
    # The gateway wants a token from everybody, and what README.md reads needs none.
    source = source.replace('{"Accept": ', '{"Authorization": "Bearer x", "Accept": ')
    environment = {
        **os.environ,
        "SSL_CERT_FILE": str(authority),
        "OPENAI_API_KEY": "x",
        "OPENAI_BASE_URL": f"{base}/v1",
        "ANTHROPIC_API_KEY": "x",
        "PYTHONIOENCODING": "utf-8",
    }
    with anyio.fail_after(60):
        done = await anyio.run_process(
            [sys.executable, "-c", source], stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, env=environment
        )
    return done.stdout.decode()


ASKING = """
import asyncio
answer = asyncio.run(client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}]))
print(answer.choices[0].message.content)
"""


@pytest.mark.anyio
async def test_the_three_lines_for_openai_are_enough(served: Gateway, tmp_path: Path) -> None:
    assert "AsyncOpenAI(" in BLOCKS[0]
    assert len(BLOCKS[0].strip().splitlines()) <= 4
    assert await run(BLOCKS[0] + ASKING, served, tmp_path) == f"{ANSWER}\n"


@pytest.mark.anyio
async def test_the_program_without_an_sdk_runs(served: Gateway, tmp_path: Path) -> None:
    output = await run(PROGRAM, served, tmp_path)
    first, *events = output.splitlines()
    assert first.startswith("200 ")
    # The Host header went out as the authority.
    assert "'authority': 'my-function.invocation.api.nvcf.nvidia.com'" in first
    assert [line for line in events if line] == [f'data: {{"function": null, "event": {n}}}' for n in range(3)]


@pytest.mark.anyio
async def test_every_other_block_runs_after_those_before_it(served: Gateway, tmp_path: Path) -> None:
    await run("\n".join(block for block in BLOCKS if block is not PROGRAM), served, tmp_path)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_name_that_is_imported_exists(number: int) -> None:
    imports = [node for node in ast.walk(ast.parse(BLOCKS[number])) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in imports:
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        else:
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_every_name_of_h2keeps_that_is_mentioned_exists() -> None:
    mentioned = set(re.findall(r"h2keep\.(\w+)", README)) - {"httpx", "httpx2"}
    assert "PingTimeout" in mentioned
    for name in mentioned:
        if not hasattr(h2keep, name):
            importlib.import_module(f"h2keep.{name}")
    for field in re.findall(r"`(\w+_timeout)`", README):
        known = hasattr(h2keep.Keepalive(), field) or field in ("stream_idle_timeout", "proxy_read_timeout")
        assert known, field


def row(beginning: str) -> str:
    """The row of the table of semantics that begins so."""
    return next(line for line in README.splitlines() if line.startswith(f"| {beginning}"))


def test_the_figures_in_the_table_are_the_defaults() -> None:
    policy = h2keep.Keepalive()
    assert policy.read_idle_timeout is not None
    assert f"`read_idle_timeout` ({policy.read_idle_timeout:g} s)" in row("**A PING** goes out")
    dead = row("**A dead connection**")
    assert f"`ping_timeout` ({policy.ping_timeout:g} s)" in dead
    assert f"within {policy.read_idle_timeout + policy.ping_timeout:g} s in all" in dead
    assert f"unused for {keepalive._MAX_UNVERIFIED_AFTER:g} s" in row("**A connection unused")


def test_the_table_states_no_other_figure() -> None:
    table = "\n".join(line for line in README.splitlines() if line.startswith("| **"))
    policy = h2keep.Keepalive()
    assert policy.read_idle_timeout is not None
    known = {
        policy.read_idle_timeout,
        policy.ping_timeout,
        policy.read_idle_timeout + policy.ping_timeout,
        keepalive._MAX_UNVERIFIED_AFTER,
        h2keep.Limits().keepalive_expiry,
    }
    assert {float(figure) for figure in re.findall(r"\b(\d+) s\b", table)} <= known


def test_the_docs_expiry_is_the_default() -> None:
    expiry = f"{h2keep.Limits().keepalive_expiry:g} s"
    assert expiry == "300 s"
    for name in ("httpx", "httpx2"):
        transport = importlib.import_module(f"h2keep.{name}").AsyncKeepaliveTransport
        assert any(expiry in (kind.__doc__ or "") for kind in transport.__mro__)


def test_the_least_python_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Python {project['requires-python'].removeprefix('>=')} or later" in README
    for extra in re.findall(r"`(?:pip install ')?\.\[(\w+)\]", README):
        assert extra in project["optional-dependencies"]


def test_every_command_and_every_link_leads_somewhere() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^\$ make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
