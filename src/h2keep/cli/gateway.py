"""An HTTP/2 gateway that behaves like the invocation service of NVIDIA Cloud Functions (NVCF), on loopback.

`app` is the gateway, an ASGI application; `gateway()` serves it with hypercorn, over TLS, in a process of its own.

A function is chosen by the authority, `<function>.invocation.<anything>`, or by the path
`/v2/nvcf/pexec/functions/<function>`, which invokes its `/echo`. The functions are all alike and serve

* `/echo`: the request as JSON: function, method, authority, path, query, headers, body;
* `/sse`: server-sent events, `events` of them (default 3), one `every` so many seconds (default 0.1);
* `/v1/chat/completions`: OpenAI's, with `stream` and `max_completion_tokens`; when streaming, a token `every` so often.

Any of them is silent for `silence` seconds before its response's head, and fails with `status` if that is given (all
these are query parameters). As in NVCF a request needs a bearer token (401), waits for `NVCF-POLL-SECONDS` at most
(504), and its response carries `nvcf-reqid` and `nvcf-status`. Errors are JSON problem details (RFC 9457).
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import itertools
import json
import os
import re
import socket
import ssl
import sys
import threading
import time
import urllib.parse
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import hypercorn.asyncio
import hypercorn.config
import trustme

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping

    from hypercorn.typing import Framework

__all__ = ["ANSWER", "Gateway", "GatewayError", "app", "gateway"]

#: What the model says, whatever it is asked.
ANSWER = "Send a PING before the path forgets you."

_HOST = "127.0.0.1"
_START_SECONDS = 30
_PEXEC = re.compile(r"/v2/nvcf/pexec/functions/([^/]+)(?:/versions/[^/]+)?")

Scope: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[MutableMapping[str, Any]]]"
Send: TypeAlias = "Callable[[MutableMapping[str, Any]], Awaitable[None]]"


# The application


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """The gateway as an ASGI application."""
    if scope["type"] == "lifespan":
        await _live(receive, send)
    elif scope["type"] == "http":
        request = await Request.read(scope, receive)
        response = Response(send)
        try:
            await _invoke(request, response)
        except Problem as problem:
            await response.json(problem.body(), problem.status)


class Problem(Exception):
    """The gateway's refusal."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail

    def body(self) -> Mapping[str, object]:
        """As RFC 9457 has it."""
        return {"title": http.HTTPStatus(self.status).phrase, "status": self.status, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class Request:
    """A request, read to its end."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    async def read(cls, scope: Scope, receive: Receive) -> Request:
        """Read it."""
        headers: dict[str, str] = {}
        for raw_name, raw_value in scope["headers"]:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        body = bytearray()
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        query = dict(urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        return cls(scope["method"], scope["path"], query, headers, bytes(body))

    @property
    def authority(self) -> str:
        """HTTP/2's :authority, which ASGI calls host."""
        return self.headers.get("host", "")

    def number(self, name: str, default: float) -> float:
        """A query parameter that is a number, not negative."""
        text = self.query.get(name)
        if text is None:
            return default
        with contextlib.suppress(ValueError):
            if 0 <= (value := float(text)) < float("inf"):
                return value
        raise Problem(400, f"{name}: {text!r} is not a number that is finite and not negative")

    def json(self) -> dict[str, Any]:
        """The body, which has to be a JSON object."""
        with contextlib.suppress(ValueError):
            if isinstance(value := json.loads(self.body), dict):
                return value
        raise Problem(400, "the body is not a JSON object")


class Response:
    """The one response to a request; it bears the identifier that NVCF gives each invocation."""

    def __init__(self, send: Send) -> None:
        self.request_id = str(uuid.uuid4())
        self._send = send

    async def start(self, content_type: str, status: int = 200) -> None:
        """Send the head."""
        headers = {
            "content-type": content_type,
            "nvcf-reqid": self.request_id,
            "nvcf-status": "fulfilled" if status < 400 else "errored",
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send a part of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def json(self, value: object, status: int = 200) -> None:
        """Send the whole response."""
        await self.start("application/json" if status < 400 else "application/problem+json", status)
        await self.write(json.dumps(value).encode(), more=False)

    async def event(self, value: object) -> None:
        """Send one server-sent event."""
        await self.write(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode())


async def _live(receive: Receive, send: Send) -> None:
    while True:
        phase = (await receive())["type"]
        await send({"type": f"{phase}.complete"})
        if phase == "lifespan.shutdown":
            return


async def _invoke(request: Request, response: Response) -> None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Problem(401, "the request carries no bearer token")
    pexec = _PEXEC.fullmatch(request.path)
    endpoint = _echo if pexec else _ENDPOINTS.get(request.path)
    if endpoint is None:
        raise Problem(404, f"no function serves {request.path}")
    await _wait_for_worker(request)
    host = re.match(r"([^.]+)\.invocation\.", request.authority)
    found = pexec or host
    await endpoint(request, response, found[1] if found else None)


async def _wait_for_worker(request: Request) -> None:
    silence = request.number("silence", 0)
    poll = request.headers.get("nvcf-poll-seconds", "")
    patience = float(poll) if poll.isdigit() else silence
    await asyncio.sleep(min(silence, patience))
    if silence > patience:
        raise Problem(504, f"no worker answered within {poll} seconds")
    if "status" in request.query:
        status = int(request.number("status", 0))
        if status not in set(http.HTTPStatus) or status < 400:
            raise Problem(400, f"status: {request.query['status']!r} is not the status of an error")
        raise Problem(status, "as asked for")


async def _echo(request: Request, response: Response, function: str | None) -> None:
    await response.json(
        {
            "function": function,
            "method": request.method,
            "authority": request.authority,
            "path": request.path,
            "query": request.query,
            "headers": request.headers,
            "body": request.body.decode("utf-8", "replace"),
        }
    )


async def _sse(request: Request, response: Response, function: str | None) -> None:
    events, every = int(request.number("events", 3)), request.number("every", 0.1)
    await response.start("text/event-stream")
    for number in range(events):
        if number:
            await asyncio.sleep(every)
        await response.event({"function": function, "event": number})
    await response.write(b"", more=False)


async def _chat(request: Request, response: Response, _function: str | None) -> None:
    asked = request.json()
    every = request.number("every", 0.02)
    limit = asked.get("max_completion_tokens", asked.get("max_tokens"))
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise Problem(400, f"max_completion_tokens: {limit!r} is not a positive integer")
    tokens = list(_tokens(limit))
    about = {"id": f"chatcmpl-{response.request_id}", "created": int(time.time()), "model": asked.get("model")}
    if not asked.get("stream"):
        await response.json(_completion(about, tokens))
        return
    await response.start("text/event-stream")
    for number, token in enumerate(tokens):
        if number:
            await asyncio.sleep(every)
        await response.event(_chunk(about, {"role": "assistant", "content": token}, None))
    await response.event(_chunk(about, {}, "stop"))
    await response.event("[DONE]")
    await response.write(b"", more=False)


def _tokens(limit: int | None) -> Iterator[str]:
    """The answer word by word; when more is asked for than it has, it is said again."""
    words = ANSWER.split()
    for number, word in enumerate(itertools.islice(itertools.cycle(words), len(words) if limit is None else limit)):
        yield f" {word}" if number else word


def _completion(about: Mapping[str, object], tokens: list[str]) -> Mapping[str, object]:
    message = {"role": "assistant", "content": "".join(tokens), "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    usage = {"prompt_tokens": 0, "completion_tokens": len(tokens), "total_tokens": len(tokens)}
    return {**about, "object": "chat.completion", "choices": [choice], "usage": usage}


def _chunk(about: Mapping[str, object], delta: Mapping[str, str], finish_reason: str | None) -> Mapping[str, object]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
    return {**about, "object": "chat.completion.chunk", "choices": [choice]}


_ENDPOINTS = {"/echo": _echo, "/sse": _sse, "/v1/chat/completions": _chat}


# Its process


class GatewayError(Exception):
    """The gateway's process didn't start."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that accepts connections."""

    host: str
    port: int
    #: The certificate authority that was made for it, as PEM.
    authority: str

    def client_context(self) -> ssl.SSLContext:
        """A context for clients, which trusts this gateway alone. Not shared, since clients set ALPN on it."""
        return ssl.create_default_context(cadata=self.authority)


@contextlib.asynccontextmanager
async def gateway() -> AsyncIterator[Gateway]:
    """Serve the gateway in a process of its own. Raises `GatewayError` if it doesn't start.

    The process dies with its standard input, so even a caller that is killed leaves nothing behind. It has a session of
    its own, so that Ctrl-C in the terminal reaches the caller alone, which then ends it in good order. Its keys never
    leave it.
    """
    process = await asyncio.create_subprocess_exec(
        # -P: what happens to lie in the current directory is not to be imported.
        *(sys.executable, "-P", "-m", __name__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield await _started(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # Reads the pipes to their ends, which is what lets asyncio let go of them.
        await process.communicate()


async def _started(process: asyncio.subprocess.Process) -> Gateway:
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(_START_SECONDS):
            if line := await process.stdout.readline():
                return Gateway(**json.loads(line))
            complaint = (await process.stderr.read()).decode(errors="replace").splitlines() or ["without a word"]
    except TimeoutError:
        raise GatewayError(f"the gateway's process was not ready after {_START_SECONDS} seconds") from None
    raise GatewayError(f"the gateway's process ended before it was ready: {complaint[-1]}")


class _Config(hypercorn.config.Config):
    """hypercorn's configuration, with a TLS context that was made without files."""

    def __init__(self, context: ssl.SSLContext, listener: socket.socket) -> None:
        self._context = context
        self.bind = [f"fd://{listener.detach()}"]
        self.loglevel = "WARNING"

    @property
    def ssl_enabled(self) -> bool:
        return True

    def create_ssl_context(self) -> ssl.SSLContext:
        return self._context


def _serve() -> None:
    """The process: tell the caller where it listens and whom to trust, then serve until standard input ends."""
    ca = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["h2", "http/1.1"])
    ca.issue_cert(_HOST, "localhost").configure_cert(context)
    listener = socket.create_server((_HOST, 0))
    ready = {"host": _HOST, "port": listener.getsockname()[1], "authority": ca.cert_pem.bytes().decode()}
    threading.Thread(target=_die_with_caller, daemon=True).start()
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()
    # hypercorn types the messages one by one; `app` takes them as the mappings that they are.
    asyncio.run(hypercorn.asyncio.serve(cast("Framework", app), _Config(context, listener)))


def _die_with_caller() -> None:
    sys.stdin.buffer.read()
    # Nothing here is worth an orderly end, which would wait for connections that nobody closes any more.
    os._exit(0)


if __name__ == "__main__":
    _serve()
