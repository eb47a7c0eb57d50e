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
import platform
import textwrap
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeAlias

import click
import httpx2
import openai
from rich.console import Console
from rich.text import Text

from h2keep import Keepalive
from h2keep.cli.gateway import ANSWER, Gateway, GatewayError, gateway
from h2keep.cli.middlebox import BytesDropped, BytesPassed, FlowForgotten, Middlebox, Towards
from h2keep.cli.timeline import Kind, Lane, Timeline, glyphs, show
from h2keep.errors import PingTimeout
from h2keep.httpx2 import AsyncKeepaliveTransport
from h2keep.protocol.events import PingAcknowledged, PingSent

if TYPE_CHECKING:
    from h2keep import ConnectionStats
    from h2keep.cli import middlebox
    from h2keep.protocol.events import ConnectionEvent

__all__ = ["Report", "Settings", "demo", "run"]

_CONNECT_TIMEOUT = 5.0
#: Between two words of an answer that is streamed, in seconds.
_EVERY = 0.25
#: Seconds that schedulers, h2keep's judgement of a silent peer, and a loaded machine may add to what is promised.
_TOLERANCE = 0.5
#: A call that neither answers nor fails is given up this many seconds after it should have done so.
_GRACE = 10.0
#: The timeline is longer than the longest call by this factor.
_OVERHANG = 1.02

Ask: TypeAlias = Callable[[openai.AsyncOpenAI], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the demo is run with, all in seconds. Raises `ValueError` if it could not show anything."""

    #: The model is silent for so long before it answers.
    silence: float = 9.0
    #: The middlebox remembers a flow on which no byte passes for so long.
    forget_after: float = 4.0
    #: h2keep's.
    read_idle_timeout: float = 2.0
    #: h2keep's.
    ping_timeout: float = 2.0
    #: That of both clients.
    read_timeout: float = 13.0
    #: The server vanishes so long after the second call began.
    vanish_after: float = 2.0

    def __post_init__(self) -> None:
        self._require("forget_after", "read_idle_timeout", "no PING comes before the flow is forgotten")
        self._require("silence", "forget_after", "no flow is forgotten")
        self._require("read_timeout", "silence", "nobody waits for the answer")
        if self.read_timeout <= self.promised + _TOLERANCE:
            raise ValueError(
                f"{_option('read_timeout')} {self.read_timeout:g}: must be more than {_option('read_idle_timeout')} "
                f"and {_option('ping_timeout')} together ({self.promised:g}) by more than {_TOLERANCE:g}, else PINGs "
                "find nothing sooner"
            )

    def _require(self, longer: str, shorter: str, otherwise: str) -> None:
        high, low = getattr(self, longer), getattr(self, shorter)
        if high <= low:
            raise ValueError(
                f"{_option(longer)} {high:g}: must be more than {_option(shorter)} ({low:g}), else {otherwise}"
            )

    @property
    def promised(self) -> float:
        """How long after its last byte a dead connection is found at the latest."""
        return self.read_idle_timeout + self.ping_timeout

    @property
    def keepalive(self) -> Keepalive:
        """h2keep's policy."""
        return Keepalive(read_idle_timeout=self.read_idle_timeout, ping_timeout=self.ping_timeout)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Call:
    """One call over one of the transports: all that was seen of it."""

    def __init__(self, lane: Lane, timeline: Timeline, forgotten: tuple[str, str]) -> None:
        self.lane = lane
        self.answer: str | None = None
        self.error: BaseException | None = None
        self.round_trips: list[float] = []
        self._timeline = timeline
        self._forgotten = forgotten

    async def make(self, ask: Ask, client: openai.AsyncOpenAI, limit: float) -> None:
        """Make the call; at the end there is either an answer or an error."""
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(limit):
                answer = await ask(client)
        except (openai.OpenAIError, httpx2.HTTPError, TimeoutError) as error:
            self.error = _root(error)
            name = type(self.error).__name__
            self._timeline.mark(self.lane, Kind.FAILED, clock(), word=name, note=f"failed: {name}")
        else:
            self.answer = answer
            self._timeline.mark(self.lane, Kind.ANSWERED, clock(), word="answered", note=f"answered: {answer}")

    def on_flow(self, event: middlebox.Event) -> None:
        """Something happened at the middlebox."""
        if self.lane.outcome is not None:
            return
        match event:
            case BytesPassed(towards=Towards.SERVER):
                self._timeline.mark(self.lane, Kind.SENT, event.at, event.count)
            case BytesPassed():
                self._timeline.mark(self.lane, Kind.RECEIVED, event.at, event.count)
            case BytesDropped(towards=Towards.SERVER):
                self._timeline.mark(self.lane, Kind.SENT_IN_VAIN, event.at, event.count)
            case BytesDropped():
                first = self.lane.first(Kind.NOT_RECEIVED) is None
                note = "the answer came as far as the middlebox, which dropped it" if first else ""
                self._timeline.mark(self.lane, Kind.NOT_RECEIVED, event.at, event.count, note=note)
            case FlowForgotten():
                word, note = self._forgotten
                self._timeline.mark(self.lane, Kind.FORGOTTEN, event.at, word=word, note=note)

    def on_connection(self, _stats: ConnectionStats, event: ConnectionEvent) -> None:
        """Something happened to h2keep's connection."""
        if self.lane.outcome is not None:
            return
        if isinstance(event, PingSent):
            self._timeline.mark(self.lane, Kind.PING, event.at, note="PING sent")
        elif isinstance(event, PingAcknowledged):
            self.round_trips.append(event.rtt)
            note = f"PING acknowledged after {event.rtt * 1000:.1f} ms"
            self._timeline.mark(self.lane, Kind.ACK, event.at, note=note)

    @property
    def seconds(self) -> float:
        """How long it took."""
        assert self.lane.outcome is not None
        return self.lane.outcome.at

    @property
    def detection(self) -> float | None:
        """How long after the last byte from the server the call failed; None if it didn't, or if none came."""
        received = self.lane.all(Kind.RECEIVED)
        return self.seconds - received[-1].at if self.error is not None and received else None

    def figures(self) -> Mapping[str, object]:
        """All of it, for a program to read."""
        size, forgotten = self.lane.size, self.lane.first(Kind.FORGOTTEN)
        error = self.error and {"type": type(self.error).__name__, "message": str(self.error)}
        return {
            "answer": self.answer,
            "error": error,
            "seconds": _rounded(self.seconds),
            "seconds_since_last_byte": _rounded(self.detection),
            "forgotten_at": None if forgotten is None else _rounded(forgotten.at),
            "pings_sent": len(self.lane.all(Kind.PING)),
            "pings_acknowledged": len(self.lane.all(Kind.ACK)),
            "round_trips": [_rounded(seconds) for seconds in self.round_trips],
            "bytes_sent": size(Kind.SENT, Kind.SENT_IN_VAIN),
            "bytes_received": size(Kind.RECEIVED),
            "bytes_dropped_towards_server": size(Kind.SENT_IN_VAIN),
            "bytes_dropped_towards_client": size(Kind.NOT_RECEIVED),
        }


def _root(error: BaseException) -> BaseException:
    """The transport's own error, below what the SDK made of it."""
    while isinstance(error, openai.OpenAIError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same call over both transports."""

    httpx2: Call
    h2keep: Call


@dataclass(frozen=True, slots=True)
class Check:
    """Something that was to be shown, and whether it was."""

    name: str
    expected: str
    measured: str
    ok: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What came out."""

    settings: Settings
    silent: Pair
    vanished: Pair

    @property
    def ok(self) -> bool:
        """Everything went as promised."""
        return all(check.ok for check in self.checks())

    def checks(self) -> list[Check]:
        """Each promise, against what was measured."""
        return [self._stock_lost(), self._survived(), self._detected(), self._stock_detected_late()]

    def _stock_lost(self) -> Check:
        call, settings = self.silent.httpx2, self.settings
        forgotten, dropped = call.lane.first(Kind.FORGOTTEN), call.lane.first(Kind.NOT_RECEIVED)
        at = "never" if forgotten is None else f"at {forgotten.at:.1f} s"
        return Check(
            "httpx2_loses_answer",
            f"httpx2 loses the answer, which was due after {settings.silence:g} s",
            f"{_outcome(call)}; the middlebox forgot the flow {at}",
            isinstance(call.error, httpx2.TimeoutException) and forgotten is not None and dropped is not None,
        )

    def _survived(self) -> Check:
        call = self.silent.h2keep
        pings, acks = call.lane.all(Kind.PING), call.lane.all(Kind.ACK)
        return Check(
            "h2keep_survives",
            "h2keep gets the answer",
            f"{_outcome(call)}; {len(pings)} PINGs sent, {len(acks)} acknowledged",
            call.answer == ANSWER and call.lane.first(Kind.FORGOTTEN) is None and bool(acks),
        )

    def _detected(self) -> Check:
        call, settings = self.vanished.h2keep, self.settings
        return Check(
            "h2keep_detects",
            f"h2keep finds that the server vanished within {settings.promised:g} s of its last byte",
            _outcome_since_last_byte(call),
            isinstance(call.error, PingTimeout)
            and call.detection is not None
            and call.detection <= settings.promised + _TOLERANCE,
        )

    def _stock_detected_late(self) -> Check:
        call, settings = self.vanished.httpx2, self.settings
        return Check(
            "httpx2_detects_late",
            f"httpx2 finds it at its read timeout, after {settings.read_timeout:g} s",
            _outcome_since_last_byte(call),
            isinstance(call.error, httpx2.TimeoutException)
            and call.detection is not None
            and call.detection > settings.promised + _TOLERANCE,
        )

    def figures(self) -> Mapping[str, object]:
        """All of it, for a program to read."""
        return {
            "ok": self.ok,
            "checks": [dataclasses.asdict(check) for check in self.checks()],
            "silent_answer": {"httpx2": self.silent.httpx2.figures(), "h2keep": self.silent.h2keep.figures()},
            "vanished_server": {"httpx2": self.vanished.httpx2.figures(), "h2keep": self.vanished.h2keep.figures()},
            "settings": dataclasses.asdict(self.settings),
            "promised_detection": self.settings.promised,
            "tolerance": _TOLERANCE,
            "versions": {"python": platform.python_version(), **_versions()},
        }


def _outcome(call: Call) -> str:
    what = "answered" if call.error is None else type(call.error).__name__
    return f"{what} after {call.seconds:.1f} s"


def _outcome_since_last_byte(call: Call) -> str:
    if call.detection is None:
        return _outcome(call)
    return f"{type(call.error).__name__} {call.detection:.1f} s after its last byte"


def _versions() -> Mapping[str, str]:
    return {name: metadata.version(name) for name in ("h2keep", "httpx2", "openai", "h2", "hypercorn")}


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
        _option(name),
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
