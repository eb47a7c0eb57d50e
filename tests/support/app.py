"""What the real servers serve: one ASGI application whose endpoints do as their query parameters say.

* `/echo` and all below it: the request as JSON, its path and query as they came;
* `/upload`: the body's size and SHA-256, `pause` seconds between reads; `/download`: `size` bytes in pieces of `piece`;
* `/slow`: silent for `seconds` before the head, `/stall`: for as long between the head and the body;
* `/sse`: `events` server-sent events, one `every` so many seconds; `/departure` answers once a client of `/sse` with
  the same `token` has left before the end;
* `/status`: `code`, with a body unless HTTP forbids one; `/trailers`: a body, then trailers where the server can;
* `/cookie` sets one, `/redirect` leads to `to`;
* `/v1/chat/completions` is OpenAI's, served by the demo's gateway, or here if a JSON schema is asked for;
  `/v1/responses` is OpenAI's too, `/v1/messages` Anthropic's, `/v1/files` takes uploads for either and says what came.
  Groq's SDK has `/openai` before its paths.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import urllib.parse
from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeAlias

from h2keep.cli import gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping

__all__ = ["app", "form"]

Message: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[Message]]"
Send: TypeAlias = "Callable[[Message], Awaitable[None]]"

_left: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """The application."""
    if scope["type"] != "http":
        await gateway.app(scope, receive, send)
        return
    exchange = Exchange(scope, receive, send)
    path = scope["path"].removeprefix("/openai")
    endpoint = _ENDPOINTS.get(path if path.startswith("/v1/") else f"/{path.split('/')[1]}")
    if endpoint is None:
        await exchange.json({"detail": f"nothing is at {scope['path']}"}, status=404)
    else:
        await endpoint(exchange)


class Exchange:
    """A request and its response."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.send = send
        self._receive = receive
        query = urllib.parse.parse_qsl(scope["query_string"].decode("ascii"), keep_blank_values=True)
        self.query: dict[str, str] = dict(query)

    def number(self, name: str, default: float = 0.0) -> float:
        return float(self.query.get(name, default))

    async def chunks(self) -> AsyncIterator[bytes]:
        while (message := await self._receive())["type"] == "http.request":
            yield message.get("body", b"")
            if not message.get("more_body", False):
                return

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def departure(self) -> None:
        """Wait until the client has left."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(
        self, status: int = 200, headers: Iterable[tuple[str, str]] = (), *, content_type: str | None = None
    ) -> None:
        fields = [*headers] if content_type is None else [*headers, ("content-type", content_type)]
        raw = [(name.encode(), value.encode()) for name, value in fields]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        if self.scope["method"] == "HEAD":
            # Not every server drops it by itself.
            data = b""
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def json(self, value: object, *, status: int = 200) -> None:
        data = json.dumps(value).encode()
        await self.start(status, [("content-length", str(len(data)))], content_type="application/json")
        await self.write(data, more=False)

    async def event(self, value: Mapping[str, object], name: str | None = None) -> None:
        prefix = f"event: {name}\n" if name else ""
        await self.write(f"{prefix}data: {json.dumps(value)}\n\n".encode())


async def _echo(exchange: Exchange) -> None:
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in exchange.scope["headers"]]
    await exchange.json(
        {
            "method": exchange.scope["method"],
            "http_version": exchange.scope["http_version"],
            "authority": dict(headers).get("host", ""),
            "path": exchange.scope["raw_path"].decode("ascii"),
            "query": exchange.scope["query_string"].decode("ascii"),
            "headers": headers,
            "body": (await exchange.body()).decode("latin-1"),
        }
    )


async def _upload(exchange: Exchange) -> None:
    digest, size = hashlib.sha256(), 0
    async for chunk in exchange.chunks():
        digest.update(chunk)
        size += len(chunk)
        await asyncio.sleep(exchange.number("pause"))
    await exchange.json({"size": size, "sha256": digest.hexdigest()})


async def _download(exchange: Exchange) -> None:
    size, piece = int(exchange.number("size")), int(exchange.number("piece", 65_536))
    await exchange.start(headers=[("content-length", str(size))], content_type="application/octet-stream")
    while size > 0:
        await exchange.write(b"x" * min(size, piece))
        size -= piece
    await exchange.write(b"", more=False)


async def _slow(exchange: Exchange) -> None:
    await exchange.body()
    await asyncio.sleep(exchange.number("seconds"))
    await exchange.json({"slow": True})


async def _stall(exchange: Exchange) -> None:
    await exchange.start(content_type="text/plain")
    await exchange.write(b"head ")
    await asyncio.sleep(exchange.number("seconds"))
    await exchange.write(b"body", more=False)


async def _sse(exchange: Exchange) -> None:
    await exchange.body()
    departure = asyncio.ensure_future(exchange.departure())
    try:
        await exchange.start(content_type="text/event-stream")
        for number in range(int(exchange.number("events", 3))):
            if number:
                await asyncio.wait([departure], timeout=exchange.number("every"))
            if departure.done():
                _left[exchange.query.get("token", "")].set()
                return
            await exchange.event({"event": number})
        await exchange.write(b"", more=False)
    finally:
        departure.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await departure


async def _departure(exchange: Exchange) -> None:
    await _left[exchange.query["token"]].wait()
    await exchange.json({"left": True})


async def _status(exchange: Exchange) -> None:
    await exchange.body()
    code = int(exchange.number("code", 200))
    if code in (204, 304):
        await exchange.start(code, [("x-code", str(code))])
        await exchange.write(b"", more=False)
    else:
        await exchange.json({"code": code}, status=code)


async def _trailers(exchange: Exchange) -> None:
    able = "http.response.trailers" in exchange.scope.get("extensions", {})
    headers = [(b"content-type", b"text/plain"), (b"trailer", b"x-checksum")]
    await exchange.send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": able})
    await exchange.write(b"body", more=False)
    if able:
        trailers = [(b"x-checksum", b"1234")]
        await exchange.send({"type": "http.response.trailers", "headers": trailers, "more_trailers": False})


async def _cookie(exchange: Exchange) -> None:
    await exchange.start(204, [("set-cookie", "flavour=oatmeal; Path=/")])
    await exchange.write(b"", more=False)


async def _redirect(exchange: Exchange) -> None:
    await exchange.body()
    await exchange.start(int(exchange.number("code", 302)), [("location", exchange.query["to"])])
    await exchange.write(b"", more=False)


async def _chat(exchange: Exchange) -> None:
    """The gateway's chat completions, which knows no structured outputs: here the schema's are made."""
    body = await exchange.body()
    if b'"json_schema"' not in body:

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        await gateway.app({**exchange.scope, "path": "/v1/chat/completions"}, replay, exchange.send)
        return
    asked = json.loads(body)
    content = json.dumps(_instance(asked["response_format"]["json_schema"]["schema"]))
    about = {"id": "chatcmpl-1", "created": 1, "model": asked["model"]}
    if not asked.get("stream"):
        await exchange.json(gateway._completion(about, [content]))
        return
    await exchange.start(content_type="text/event-stream")
    for start in range(0, len(content), 8):
        await exchange.event(gateway._chunk(about, {"role": "assistant", "content": content[start : start + 8]}, None))
    await exchange.event(gateway._chunk(about, {}, "stop"))
    await exchange.write(b"data: [DONE]\n\n", more=False)


def _instance(schema: Mapping[str, Any], definitions: Mapping[str, Any] | None = None) -> object:
    """The one instance of a JSON schema that comes first to mind."""
    definitions = schema.get("$defs", {}) if definitions is None else definitions
    if "$ref" in schema:
        return _instance(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "enum" in schema:
        return schema["enum"][0]
    match schema["type"]:
        case "object":
            return {name: _instance(kind, definitions) for name, kind in schema["properties"].items()}
        case "array":
            return [_instance(schema["items"], definitions)] * 2
        case "integer" | "number":
            return 30
        case _:
            return gateway.ANSWER


async def _responses(exchange: Exchange) -> None:
    """OpenAI's Responses API, as far as its SDK looks at it."""
    asked = json.loads(await exchange.body())
    kind = asked.get("text", {}).get("format", {})
    answer = json.dumps(_instance(kind["schema"])) if kind.get("type") == "json_schema" else gateway.ANSWER
    text = {"type": "output_text", "text": answer, "annotations": []}
    message = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [text]}
    response = {"id": "resp_1", "object": "response", "created_at": 1, "model": asked["model"], "status": "completed"}
    response |= {"output": [message], "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    if not asked.get("stream"):
        await exchange.json(response)
        return
    await exchange.start(content_type="text/event-stream")
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
    for number, word in enumerate(answer.split()):
        name = "response.output_text.delta"
        delta = f" {word}" if number else word
        await exchange.event({"type": name, "sequence_number": number, **place, "delta": delta}, name)
    name = "response.completed"
    await exchange.event({"type": name, "sequence_number": 99, "response": response}, name)
    await exchange.write(b"", more=False)


async def _files(exchange: Exchange) -> None:
    """OpenAI's and Anthropic's answer to an upload at once; SDKs leave alone what they don't know."""
    headers = dict(exchange.scope["headers"])
    fields = form(headers[b"content-type"].decode(), await exchange.body())
    filename, content = fields["file"]
    about = {
        "id": "file_1",
        "created_at": 1,
        "filename": filename,
        "purpose": fields.get("purpose", ("", b""))[1].decode(),
    }
    size = {"bytes": len(content), "size_bytes": len(content)}
    await exchange.json({**about, **size, "object": "file", "sha256": hashlib.sha256(content).hexdigest()})


def form(content_type: str, body: bytes) -> dict[str, tuple[str, bytes]]:
    """The fields of multipart/form-data by name: each one's file name, and its content byte for byte."""
    boundary = content_type.partition("boundary=")[2].encode()
    fields = {}
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        names = dict(re.findall(r'\b(name|filename)="([^"]*)"', head.decode()))
        fields[names["name"]] = names.get("filename", ""), content.removesuffix(b"\r\n")
    return fields


async def _messages(exchange: Exchange) -> None:
    """Anthropic's Messages API, as far as its SDK looks at it; silent for `x-silence` seconds before its head."""
    asked = json.loads(await exchange.body())
    headers = dict(exchange.scope["headers"])
    await asyncio.sleep(float(headers.get(b"x-silence", b"0")))
    message: dict[str, object] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": asked["model"],
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }
    if not asked.get("stream"):
        text = {"type": "text", "text": gateway.ANSWER}
        await exchange.json({**message, "content": [text], "stop_reason": "end_turn"})
        return
    await exchange.start(content_type="text/event-stream")
    await exchange.event({"type": "message_start", "message": message}, "message_start")
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    await exchange.event(block, "content_block_start")
    for number, word in enumerate(gateway.ANSWER.split()):
        delta = {"type": "text_delta", "text": f" {word}" if number else word}
        await exchange.event({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")
        await asyncio.sleep(0.01)
    await exchange.event({"type": "content_block_stop", "index": 0}, "content_block_stop")
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    await exchange.event({"type": "message_delta", "delta": end, "usage": {"output_tokens": 9}}, "message_delta")
    await exchange.event({"type": "message_stop"}, "message_stop")
    await exchange.write(b"", more=False)


_ENDPOINTS: Mapping[str, Callable[[Exchange], Awaitable[None]]] = {
    "/echo": _echo,
    "/upload": _upload,
    "/download": _download,
    "/slow": _slow,
    "/stall": _stall,
    "/sse": _sse,
    "/departure": _departure,
    "/status": _status,
    "/trailers": _trailers,
    "/cookie": _cookie,
    "/redirect": _redirect,
    "/v1/chat/completions": _chat,
    "/v1/files": _files,
    "/v1/messages": _messages,
    "/v1/responses": _responses,
}
