"""OpenAI's SDK, structured outputs and the Responses API included."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import pydantic
import pytest

from h2keep.cli.gateway import ANSWER
from support.sdks import MESSAGES, OPENAI, settled

if TYPE_CHECKING:
    import ssl

    from support.servers import Server

#: The SDK doesn't close the generators that it is made of; trio remarks on that.
generators_left_to_the_garbage_collector = pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")


class Kind(enum.Enum):
    PING = "ping"
    PONG = "pong"


class Step(pydantic.BaseModel):
    kind: Kind
    seconds: float


class Plan(pydantic.BaseModel):
    title: str
    steps: list[Step]


PLAN = Plan(title=ANSWER, steps=[Step(kind=Kind.PING, seconds=30)] * 2)
CHAT: dict[str, Any] = {"model": "m", "messages": MESSAGES, "response_format": Plan}


@pytest.mark.usefixtures("clean")
class TestSync:
    def test_structured_outputs(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        with OPENAI.client(granian.url, verify=client_ssl) as client:
            assert client.chat.completions.parse(**CHAT).choices[0].message.parsed == PLAN
            with client.chat.completions.stream(**CHAT) as stream:
                deltas = [event.delta for event in stream if event.type == "content.delta"]
                assert stream.get_final_completion().choices[0].message.parsed == PLAN
            assert len(deltas) > 2
            assert Plan.model_validate_json("".join(deltas)) == PLAN

    def test_responses(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        with OPENAI.client(granian.url, verify=client_ssl) as client:
            assert client.responses.create(model="m", input="?").output_text == ANSWER
            assert client.responses.parse(model="m", input="?", text_format=Plan).output_parsed == PLAN
            events = list(client.responses.create(model="m", input="?", stream=True))
        assert "".join(event.delta for event in events[:-1]) == ANSWER
        assert events[-1].response.output_text == ANSWER

    def test_a_streamed_response_around_the_call(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        with OPENAI.client(granian.url, verify=client_ssl) as client:
            completions = client.chat.completions.with_streaming_response
            with completions.create(model="m", messages=MESSAGES, stream=True) as response:
                lines = [line for line in response.iter_lines() if line]
        assert len(lines) == len(ANSWER.split()) + 2
        assert lines[-1] == "data: [DONE]"


@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
class TestAsync:
    @generators_left_to_the_garbage_collector
    async def test_structured_outputs(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        async with OPENAI.async_client(granian.url, verify=client_ssl) as client, settled():
            assert (await client.chat.completions.parse(**CHAT)).choices[0].message.parsed == PLAN
            async with client.chat.completions.stream(**CHAT) as stream:
                deltas = [event.delta async for event in stream if event.type == "content.delta"]
                assert (await stream.get_final_completion()).choices[0].message.parsed == PLAN
            assert Plan.model_validate_json("".join(deltas)) == PLAN

    @generators_left_to_the_garbage_collector
    async def test_responses(self, granian: Server, client_ssl: ssl.SSLContext) -> None:
        async with OPENAI.async_client(granian.url, verify=client_ssl) as client, settled():
            assert (await client.responses.create(model="m", input="?")).output_text == ANSWER
            assert (await client.responses.parse(model="m", input="?", text_format=Plan)).output_parsed == PLAN
            events = [event async for event in await client.responses.create(model="m", input="?", stream=True)]
        assert "".join(event.delta for event in events[:-1]) == ANSWER
        assert events[-1].response.output_text == ANSWER
