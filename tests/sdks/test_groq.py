"""Groq's SDK, which stands on classic httpx: what it does alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from h2keep.cli.gateway import ANSWER
from support.sdks import GROQ

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

    from support.servers import Server

SCHEMA = {"type": "object", "properties": {"title": {"type": "string"}, "seconds": {"type": "number"}}}
STRUCTURED: dict[str, Any] = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "plan", "schema": SCHEMA}}
}
PLAN = {"title": ANSWER, "seconds": 30}


@pytest.mark.usefixtures("clean")
class TestSync:
    def test_structured_outputs(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        with GROQ.client(granian.url, verify=client_ssl) as client:
            assert json.loads(GROQ.text(GROQ.create(client, **STRUCTURED))) == PLAN
            pieces = list(GROQ.pieces_now(GROQ.create(client, stream=True, **STRUCTURED)))
        assert len(pieces) > 2
        assert json.loads("".join(pieces)) == PLAN

    def test_a_path_is_a_file_too(self, granian: Server, client_ssl: ssl.SSLContext, tmp_path: Path) -> None:
        path = tmp_path / "batch.jsonl"
        path.write_bytes(b'{"a": 1}\r\n' * 1000)
        with GROQ.client(granian.url, verify=client_ssl) as client:
            came = GROQ.upload(client, path)
        assert (came.filename, came.bytes) == ("batch.jsonl", 10_000)


@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
class TestAsync:
    async def test_structured_outputs(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        async with GROQ.async_client(granian.url, verify=client_ssl) as client:
            assert json.loads(GROQ.text(await GROQ.create(client, **STRUCTURED))) == PLAN
