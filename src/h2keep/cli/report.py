"""What was seen of the demo's calls, and the verdict on it."""

from __future__ import annotations

import asyncio
import dataclasses
import platform
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, TypeAlias

import httpx2
import openai

from h2keep import Keepalive
from h2keep.cli.gateway import ANSWER
from h2keep.cli.middlebox import BytesDropped, BytesPassed, FlowForgotten, Towards
from h2keep.cli.timeline import Kind
from h2keep.errors import PingTimeout
from h2keep.protocol.events import PingAcknowledged, PingSent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from h2keep import ConnectionStats
    from h2keep.cli import middlebox
    from h2keep.cli.timeline import Lane, Timeline
    from h2keep.protocol.events import ConnectionEvent

__all__ = ["Ask", "Call", "Check", "Pair", "Report", "Settings", "option_name"]

#: Seconds that schedulers, h2keep's judgement of a silent peer, and a loaded machine may add to what is promised.
_TOLERANCE = 0.5

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
            both = f"{option_name('read_idle_timeout')} and {option_name('ping_timeout')} together ({self.promised:g})"
            raise ValueError(
                f"{option_name('read_timeout')} {self.read_timeout:g}: must exceed {both} "
                f"by more than {_TOLERANCE:g}, else PINGs find nothing sooner"
            )

    def _require(self, longer: str, shorter: str, otherwise: str) -> None:
        high, low = getattr(self, longer), getattr(self, shorter)
        if high <= low:
            raise ValueError(
                f"{option_name(longer)} {high:g}: must be more than {option_name(shorter)} ({low:g}), else {otherwise}"
            )

    @property
    def promised(self) -> float:
        """How long after its last byte a dead connection is found at the latest."""
        return self.read_idle_timeout + self.ping_timeout

    @property
    def keepalive(self) -> Keepalive:
        """h2keep's policy."""
        return Keepalive(read_idle_timeout=self.read_idle_timeout, ping_timeout=self.ping_timeout)


def option_name(name: str) -> str:
    """How a field of `Settings` is written on the command line."""
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
            f"h2keep finds within {settings.promised:g} s of its last byte that the server vanished",
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
