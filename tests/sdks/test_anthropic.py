"""Anthropic's SDK, its helper for streams included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from h2keep.cli.gateway import ANSWER
from support.sdks import ANTHROPIC, MESSAGES, settled

if TYPE_CHECKING:
    import ssl

    from support.servers import Server

ASKED: dict[str, Any] = {"model": "m", "messages": MESSAGES, "max_tokens": 100}


@pytest.mark.usefixtures("clean")
class TestSync:
    def test_the_streaming_helper(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        with (
            ANTHROPIC.client(granian.url, verify=client_ssl) as client,
            client.messages.stream(**ASKED) as stream,
        ):
            assert "".join(stream.text_stream) == ANSWER
            assert ANTHROPIC.text(stream.get_final_message()) == ANSWER


@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
class TestAsync:
    @pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
    async def test_the_streaming_helper(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        async with (
            ANTHROPIC.async_client(granian.url, verify=client_ssl) as client,
            settled(),
            client.messages.stream(**ASKED) as stream,
        ):
            assert "".join([text async for text in stream.text_stream]) == ANSWER
            assert ANTHROPIC.text(await stream.get_final_message()) == ANSWER
