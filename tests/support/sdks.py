"""The SDKs of OpenAI, Anthropic and Groq by one set of names, since they do alike; Groq's stands on classic httpx.

    with GROQ.client(server.url, verify=client_ssl) as client:
        assert GROQ.text(GROQ.create(client)) == ANSWER

What takes an asynchronous client returns what has to be awaited.
"""

from __future__ import annotations

import contextlib
import gc
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anthropic
import anyio
import groq
import openai

import h2keep
import h2keep.httpx
import h2keep.httpx2
from h2keep.cli.gateway import ANSWER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import ModuleType

__all__ = ["ANTHROPIC", "GROQ", "MESSAGES", "OPENAI", "QUICK", "Sdk", "settled"]

MESSAGES = [{"role": "user", "content": "What should I do?"}]
#: So short that tests can wait for it, so long that a busy machine keeps to it.
QUICK = h2keep.Keepalive(read_idle_timeout=0.2, ping_timeout=5.0, jitter=0.0)


@dataclass(frozen=True)
class Sdk:
    """What is alike in them, by one name."""

    module: ModuleType
    name: str
    #: h2keep's front door for the httpx that the SDK stands on.
    door: ModuleType
    #: What the SDK takes for its host, beyond the origin, and where it sends completions.
    base: str
    path: str

    def __str__(self) -> str:
        return self.module.__name__

    @property
    def httpx(self) -> ModuleType:
        """The httpx that the SDK stands on."""
        found: ModuleType = self.door.library.module
        return found

    def client(self, url: str, **options: Any) -> Any:
        """A synchronous client on our transport, or on `transport`; `options` are the client's or the transport's."""
        return self._client("", url, **options)

    def async_client(self, url: str, **options: Any) -> Any:
        """The same, asynchronous."""
        return self._client("Async", url, **options)

    def _client(self, kind: str, url: str, *, transport: Any = None, **options: Any) -> Any:
        settings = {"max_retries": options.pop("max_retries", 0), "timeout": options.pop("timeout", 30.0)}
        if transport is None:
            transport = getattr(self.door, f"{kind}KeepaliveTransport")(**options)
        http_client = getattr(self.module, f"Default{kind}HttpxClient")(transport=transport)
        base_url = f"{url}{self.base}"
        return getattr(self.module, f"{kind}{self.name}")(
            api_key="secret", base_url=base_url, http_client=http_client, **settings
        )

    def _resource(self, client: Any) -> Any:
        return client.messages if self.module is anthropic else client.chat.completions

    def create(self, client: Any, **options: Any) -> Any:
        """Ask for a completion."""
        return self._resource(client).create(**self._question(), **options)

    def create_raw(self, client: Any) -> Any:
        """Ask for a completion, and get the response around it."""
        return self._resource(client).with_raw_response.create(**self._question())

    def _question(self) -> dict[str, Any]:
        question: dict[str, Any] = {"model": "m", "messages": MESSAGES}
        return question | {"max_tokens": 100} if self.module is anthropic else question

    def upload(self, client: Any, file: Any) -> Any:
        """Upload a file."""
        if self.module is anthropic:
            return client.beta.files.upload(file=file)
        return client.files.create(file=file, purpose="batch")

    def silent_for(self, seconds: float) -> dict[str, Any]:
        """Options that make the server wait before it answers."""
        if self.module is anthropic:
            return {"extra_headers": {"x-silence": str(seconds)}}
        return {"extra_query": {"silence": seconds}}

    def text(self, answer: Any) -> str:
        """What a completion says."""
        found: str = answer.content[0].text if self.module is anthropic else answer.choices[0].message.content
        return found

    def _piece(self, event: Any) -> str | None:
        if self.module is anthropic:
            return event.delta.text if event.type == "content_block_delta" else None
        piece: str | None = event.choices[0].delta.content
        return piece

    def pieces_now(self, stream: Any) -> Iterator[str]:
        """What a streamed completion says."""
        return (piece for event in stream if (piece := self._piece(event)))

    async def pieces(self, stream: Any) -> AsyncIterator[str]:
        """The same of an asynchronous client's."""
        async for event in stream:
            if piece := self._piece(event):
                yield piece

    def first_event(self) -> bytes:
        """A streamed completion's beginning on the wire."""
        if self.module is anthropic:
            event = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}}
            return f"event: content_block_delta\ndata: {json.dumps(event)}\n\n".encode()
        delta = {"index": 0, "delta": {"role": "assistant", "content": "Hello"}, "finish_reason": None}
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [delta]}
        return f"data: {json.dumps(chunk)}\n\n".encode()

    def whole_answer(self) -> bytes:
        """A completion on the wire that says ANSWER."""
        if self.module is anthropic:
            text = {"type": "text", "text": ANSWER}
            return json.dumps({"id": "1", "type": "message", "role": "assistant", "content": [text]}).encode()
        choice = {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
        return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()


OPENAI = Sdk(openai, "OpenAI", h2keep.httpx2, "/v1", "/v1/chat/completions")
ANTHROPIC = Sdk(anthropic, "Anthropic", h2keep.httpx2, "", "/v1/messages")
GROQ = Sdk(groq, "Groq", h2keep.httpx, "", "/openai/v1/chat/completions")


@contextlib.asynccontextmanager
async def settled() -> AsyncIterator[None]:
    """At the end, let the event loop finish generators that the garbage collector has found."""
    yield
    gc.collect()
    await anyio.wait_all_tasks_blocked()
