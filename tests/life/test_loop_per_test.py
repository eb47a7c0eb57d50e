"""A program whose own tests each have an event loop of their own, and share one client: no noise, whatever the loop."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from support.raw import answering
from support.threaded import threaded

if TYPE_CHECKING:
    from pathlib import Path

TESTS = """
import anyio, httpx2, pytest
import h2keep, h2keep.httpx2

URL = {url!r}
direct = h2keep.AsyncClient(http1=False, timeout=20.0)
over_httpx2 = httpx2.AsyncClient(transport=h2keep.httpx2.AsyncKeepaliveTransport(http1=False), timeout=20.0)

@pytest.fixture(scope="session", autouse=True)
def closed_at_the_end():
    yield
    async def close():
        await direct.aclose()
        await over_httpx2.aclose()
    anyio.run(close)

@pytest.mark.anyio
@pytest.mark.parametrize("number", range(5))
async def test_a_request(number):
    assert (await direct.get(URL)).text == (await over_httpx2.get(URL)).text == "ok"

@pytest.mark.anyio
async def test_a_response_that_is_left_unread():
    async with direct.stream("GET", URL) as response:
        assert response.status_code == 200

@pytest.mark.anyio
async def test_a_request_that_is_given_up():
    with anyio.move_on_after(0.001):
        await direct.get(URL)
"""


def test_they_share_a_client_without_a_word(tmp_path: Path) -> None:
    with threaded(answering()) as server:
        (tmp_path / "test_program.py").write_text(TESTS.format(url=server.url))
        command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        # On asyncio and on trio.
        assert "14 passed" in result.stdout
        assert result.stderr == ""
