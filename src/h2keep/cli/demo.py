"""`h2keep demo`: the failure that h2keep exists to cure, and the cure, side by side on this machine.

Two calls through the OpenAI SDK, each over stock httpx2 and over h2keep at the same time, to the same gateway, with the
same timeouts, each over a middlebox of its own:

1. The model is silent for longer than the middlebox remembers a flow. httpx2 sends nothing meanwhile: the flow is
   forgotten and the answer lost. h2keep's PINGs are bytes like any others: its flow lives.
2. The server vanishes in mid-answer. h2keep's PING stays unanswered, and it says so; httpx2 waits for its read timeout.

Nothing of this is acted: both run as they would elsewhere, and the verdict is about what was measured.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import textwrap
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import httpx2
import openai
from rich.console import Console
from rich.text import Text

from h2keep.cli.gateway import Gateway, GatewayError, gateway
from h2keep.cli.middlebox import Middlebox
from h2keep.cli.report import Ask, Call, Pair, Report, Settings, option_name
from h2keep.cli.timeline import Lane, Timeline, glyphs, show
from h2keep.httpx2 import AsyncKeepaliveTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["demo", "run"]

_CONNECT_TIMEOUT = 5.0
#: Between two words of an answer that is streamed, in seconds.
_EVERY = 0.25
#: A call that neither answers nor fails is given up this many seconds after it should have done so.
_GRACE = 10.0
#: The timeline is longer than the longest call by this factor.
_OVERHANG = 1.02

# The two calls

_PROMPT: Mapping[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "How does a connection stay alive?"}],
}


async def run(settings: Settings, console: Console) -> Report:
    """Run the demo. Raises `GatewayError` or OSError if it can't even start."""
    _print_introduction(settings, console)
    async with gateway() as server:
        stage = _Stage(server, settings, console)
        report = Report(settings, await stage.silent(), await stage.vanished())
    _print_verdict(report, console)
    return report


@dataclass(frozen=True, slots=True)
class _Stage:
    """Where the calls are made."""

    server: Gateway
    settings: Settings
    console: Console

    async def silent(self) -> Pair:
        """The model is silent for longer than the middlebox remembers a flow."""

        async def ask(client: openai.AsyncOpenAI) -> str:
            completion = await client.chat.completions.create(**_PROMPT, extra_query={"silence": self.settings.silence})
            return completion.choices[0].message.content or ""

        self._print_title(f"1  The model is silent for {self.settings.silence:g} s, then answers")
        note = f"no byte for {self.settings.forget_after:g} s: the middlebox forgot the flow"
        return await self._pair(ask, ("forgotten", note))

    async def vanished(self) -> Pair:
        """The server vanishes in mid-answer."""
        vanish_after = self.settings.vanish_after

        async def ask(client: openai.AsyncOpenAI) -> str:
            words = math.ceil(2 * vanish_after / _EVERY) + 1  # more than can come before that
            stream = await client.chat.completions.create(
                **_PROMPT, stream=True, max_completion_tokens=words, extra_query={"every": _EVERY}
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        self._print_title(f"2  The answer streams in; after {vanish_after:g} s the server vanishes")
        return await self._pair(ask, ("vanished", "the server vanished, without FIN or RST"), vanish_after)

    async def _pair(self, ask: Ask, forgotten: tuple[str, str], vanish_after: float | None = None) -> Pair:
        """The same call over both transports at once."""
        loop = asyncio.get_running_loop()
        span = (vanish_after or 0.0) + self.settings.read_timeout
        lanes = Lane("httpx2"), Lane("h2keep")
        timeline = Timeline(lanes, span * _OVERHANG, self.settings.forget_after, loop.time)
        stock, ours = (Call(lane, timeline, forgotten) for lane in lanes)
        async with AsyncExitStack() as stack:
            boxes = [await stack.enter_async_context(self._middlebox(call)) for call in (stock, ours)]
            clients = [
                await stack.enter_async_context(self._client(box, http))
                for box, http in zip(boxes, [self._stock(), self._h2keep(ours)], strict=True)
            ]
            stack.enter_context(show(timeline, self.console))
            if vanish_after is not None:
                for box in boxes:
                    stack.callback(loop.call_later(vanish_after, box.vanish).cancel)
            async with asyncio.TaskGroup() as group:
                for call, client in zip((stock, ours), clients, strict=True):
                    group.create_task(call.make(ask, client, span + _GRACE))
        return Pair(stock, ours)

    def _middlebox(self, call: Call) -> Middlebox:
        """Each call has its own, so that flows can't be mistaken."""
        return Middlebox((self.server.host, self.server.port), self.settings.forget_after, call.on_flow)

    # trust_env would lead past the middlebox, where the environment names a proxy.

    def _stock(self) -> httpx2.AsyncClient:
        return openai.DefaultAsyncHttpxClient(
            verify=self.server.client_context(), http1=False, http2=True, trust_env=False
        )

    def _h2keep(self, call: Call) -> httpx2.AsyncClient:
        transport = AsyncKeepaliveTransport(
            verify=self.server.client_context(),
            http1=False,
            trust_env=False,
            keepalive=self.settings.keepalive,
            event_hook=call.on_connection,
        )
        return openai.DefaultAsyncHttpxClient(transport=transport, trust_env=False)

    def _client(self, box: Middlebox, http: httpx2.AsyncClient) -> openai.AsyncOpenAI:
        client = openai.AsyncOpenAI(
            base_url=f"https://{self.server.host}:{box.port}/v1",
            api_key="demo",
            timeout=httpx2.Timeout(self.settings.read_timeout, connect=_CONNECT_TIMEOUT),
            max_retries=0,
            http_client=http,
        )
        # The SDK imports much of itself when this is first asked for, which would hold up the first call.
        _ = client.chat.completions
        return client

    def _print_title(self, title: str) -> None:
        self.console.print(Text(f"\n{title}\n", "bold"))


# What is printed besides


def _print_introduction(settings: Settings, console: Console) -> None:
    line = glyphs(console).fading
    path = [
        ("client ", "OpenAI SDK, gives up", f"after {settings.read_timeout:g} s"),
        (" middlebox ", " forgets a flow", f" after {settings.forget_after:g} s of silence"),
        (" gateway", " HTTP/2 and TLS by hypercorn,", " like NVIDIA Cloud Functions"),
    ]
    pings = f"a PING after {settings.read_idle_timeout:g} s of silence, then {settings.ping_timeout:g} s of patience"
    console.print("The same calls over two transports at once:\n")
    console.print(
        Text.assemble(
            ("httpx2  ", "bold"),
            "DefaultAsyncHttpxClient(http2=True)\n",
            ("h2keep  ", "bold"),
            "DefaultAsyncHttpxClient(transport=AsyncKeepaliveTransport(...))\n",
            (f"        {pings}\n", "dim"),
        ),
        soft_wrap=True,
    )
    for fill, style, words in zip((line, " ", " "), ("", "dim", "dim"), zip(*path, strict=True), strict=True):
        client, box, server = words
        console.print(Text(f"{client:{fill}<23}{box:{fill}<25}{server}", style), soft_wrap=True)


def _print_verdict(report: Report, console: Console) -> None:
    glyph = glyphs(console)
    console.print()
    for check in report.checks():
        sign = (f"{glyph.good} ", "bold green") if check.ok else (f"{glyph.bad} ", "bold red")
        console.print(Text.assemble(sign, (check.expected, "bold")), soft_wrap=True)
        console.print(Text(f"  {check.measured}"), soft_wrap=True)
    console.print("\nWhat the application is told of the vanished server:")
    for call in (report.vanished.httpx2, report.vanished.h2keep):
        told = f"{type(call.error).__name__}: {str(call.error) or '(no message)'}"
        console.print(Text(f"{call.lane.name}  ", "bold"), end="")
        console.print(Text(textwrap.fill(told, console.width - 9, subsequent_indent=" " * 8)), soft_wrap=True)


# The command


def _above_zero(_context: click.Context, _parameter: click.Parameter, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"{value:g} is not a finite number of seconds above 0.")
    return value


def _seconds(name: str, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    default = next(field.default for field in dataclasses.fields(Settings) if field.name == name)
    return click.option(
        option_name(name),
        type=float,
        callback=_above_zero,
        default=default,
        show_default=True,
        metavar="SECONDS",
        help=text,
    )


@click.command()
@_seconds("silence", "The model is silent for so long before it answers.")
@_seconds("forget_after", "The middlebox forgets a flow on which no byte passed for so long.")
@_seconds("read_idle_timeout", "h2keep sends a PING when nothing came for so long.")
@_seconds("ping_timeout", "h2keep gives the connection up when nothing came for so long after its PING.")
@_seconds("read_timeout", "Both clients give up when they waited for so long.")
@_seconds("vanish_after", "The server vanishes when the second answer has streamed for so long.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object and nothing else.")
def demo(as_json: bool, **seconds: float) -> None:
    """See a connection forgotten, and one kept alive, side by side.

    Takes about 30 seconds, on this machine alone. The exit code is 0 if h2keep's connection survived where httpx2's did
    not, and if h2keep found a vanished server in time, and httpx2 did not.
    """
    try:
        settings = Settings(**seconds)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        report = asyncio.run(run(settings, Console(quiet=as_json, highlight=False)))
    except (GatewayError, OSError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(report.figures(), indent=2))
    raise SystemExit(0 if report.ok else 1)
