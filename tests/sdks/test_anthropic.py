"""Anthropic's SDK, its helper for streams included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from h2keep.cli.gateway import ANSWER
from sdks.promises import AsyncPromises, Promises
from support.sdks import ANTHROPIC, MESSAGES, settled

if TYPE_CHECKING:
    import ssl

    from support.servers import Server

ASKED: dict[str, Any] = {"model": "m", "messages": MESSAGES, "max_tokens": 100}


class TestSync(Promises):
    sdk = ANTHROPIC

    def test_the_streaming_helper(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        with (
            self.sdk.client(granian.url, verify=client_ssl) as client,
            client.messages.stream(**ASKED) as stream,
        ):
            assert "".join(stream.text_stream) == ANSWER
            assert self.sdk.text(stream.get_final_message()) == ANSWER


class TestAsync(AsyncPromises):
    sdk = ANTHROPIC

    @pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")
    async def test_the_streaming_helper(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        async with (
            self.sdk.async_client(granian.url, verify=client_ssl) as client,
            settled(),
            client.messages.stream(**ASKED) as stream,
        ):
            assert "".join([text async for text in stream.text_stream]) == ANSWER
            assert self.sdk.text(await stream.get_final_message()) == ANSWER
