"""When to send a PING, and when to give a connection up: rules K1 to K17 as a pure state machine.

`Keepalive` is the policy, `KeepaliveTimer` applies it to one connection, `IntervalMemory` remembers an origin's
punishments. None of them knows frames, sockets or a clock: facts and readings of a monotonic clock (`now`, in
seconds) come in, verdicts and one deadline come out, and the random source is passed in.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, fields
from typing import Protocol

__all__ = ["IntervalMemory", "Keepalive", "KeepaliveTimer", "PingPurpose", "RandomSource", "Verdict"]

#: The second step of judgement comes this long after the first, in seconds (K7).
_JUDGEMENT_DELAY = 0.02
#: A step handled later than this, in seconds, says more about us than about the peer (K7).
_LATE = 0.5
_MAX_EXTENSIONS = 3
#: What an upload's progress may add to a PING's deadline, in ping_timeouts (K4).
_MAX_UPLOAD_EXTENSION = 2.0
#: Silence after which a connection must prove itself before it is used again, in seconds, unless the policy's is
#: shorter (K9).
_UNVERIFIED_AFTER = 30.0
#: PINGs beyond K3's rate between two signs of progress (K16).
_MAX_EXTRA_PINGS = 2
_CALM_CEILING = 330.0
_CALM_HALF_LIFE = 3600.0


class RandomSource(Protocol):
    """Where jitter and payloads come from; `random.Random` and `random.SystemRandom` are such."""

    def random(self) -> float:
        """A number in [0, 1)."""

    def randbytes(self, n: int, /) -> bytes:
        """So many random bytes."""


@dataclass(frozen=True, slots=True)
class Keepalive:
    """When a silent connection is asked for life, and when it is given up (K1).

    Raises ValueError, naming the field and the value, for anything but finite positive seconds and a jitter in [0, 1).
    """

    #: Seconds of silence after which a PING is sent. None switches keepalive off.
    read_idle_timeout: float | None = 30.0
    #: Seconds after a PING without any life until the connection is given up.
    ping_timeout: float = 15.0
    #: Whether PINGs are also sent while no request is open (K11).
    while_idle: bool = False
    #: The part of read_idle_timeout by which it is shortened at random (K15).
    jitter: float = 0.1

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name == "while_idle":
                valid = isinstance(value, bool)
            elif name == "jitter":
                valid = _is_number(value) and 0 <= value < 1
            else:
                valid = (name == "read_idle_timeout" and value is None) or (_is_number(value) and value > 0)
            if not valid:
                raise ValueError(f"{name}: {value!r} is not {_EXPECTED[name]}")


_EXPECTED = {
    "read_idle_timeout": "a finite number of seconds above 0, nor None",
    "ping_timeout": "a finite number of seconds above 0",
    "while_idle": "True or False",
    "jitter": "a number in [0, 1)",
}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class PingPurpose(enum.Enum):
    """Why a PING was sent."""

    #: Silence (K3).
    IDLE = enum.auto()
    #: A request wants the connection after a silence (K9).
    CHECKOUT = enum.auto()
    #: A request was given up on a silent connection (K10).
    SUSPICION = enum.auto()
    #: The application asked.
    USER = enum.auto()


class Verdict(enum.Enum):
    """What `KeepaliveTimer.handle_timeout` wants done."""

    NOTHING = enum.auto()
    #: Send a PING with `KeepaliveTimer.payload`, now.
    SEND_PING = enum.auto()
    #: The connection is dead (K8); the timer is closed.
    LOST = enum.auto()


class _State(enum.Enum):
    QUIET = enum.auto()  # no PING is outstanding
    PINGED = enum.auto()  # one is, and its deadline has not come
    JUDGING = enum.auto()  # its deadline has come; the reader gets its chance
    CLOSED = enum.auto()


class KeepaliveTimer:
    """Keepalive of one connection.

    `now` in the constructor is the moment at which the connection became ready. The runner lets its reader run for two
    scheduler passes before each `handle_timeout` (K7). `next_deadline` can move *earlier* by `note_stream_opened`, by
    the `ping_for_*` methods, by `use_interval`, and by life that answers a PING; all else leaves it or moves it later.
    """

    __slots__ = (
        "_acked",
        "_deadline",
        "_distrusted_at_life",
        "_extensions",
        "_extra_pings",
        "_going_away",
        "_last_idle_ping",
        "_lives",
        "_pinged_at_life",
        "_pings_since_progress",
        "_random",
        "_silence_limit",
        "_silence_since",
        "_state",
        "_suspicion_pinged",
        "_upload_limit",
        "interval",
        "last_life",
        "last_ping_at",
        "last_ping_purpose",
        "open_streams",
        "payload",
        "pings_acked",
        "pings_sent",
        "policy",
        "ready_at",
        "rtt_best",
        "rtt_last",
        "rtt_smoothed",
    )

    def __init__(self, policy: Keepalive, random: RandomSource, now: float) -> None:
        self.policy = policy
        #: read_idle_timeout in force (K13 may have raised it), None if keepalive is off.
        self.interval = policy.read_idle_timeout
        self.ready_at = now
        #: When the last byte came; `ready_at` before the first.
        self.last_life = now
        self.open_streams = 0
        #: The last PING's payload.
        self.payload = b""
        self.pings_sent = 0
        self.pings_acked = 0
        self.last_ping_at: float | None = None
        self.last_ping_purpose: PingPurpose | None = None
        self.rtt_last: float | None = None
        self.rtt_best: float | None = None
        self.rtt_smoothed: float | None = None
        self._random = random
        self._state = _State.QUIET
        # Life is counted, too: at equal times only the count tells whether it came before or after a PING.
        self._lives = 0
        self._pinged_at_life = -1
        self._distrusted_at_life = -1
        self._acked = True
        self._deadline = 0.0
        self._upload_limit = 0.0
        self._extensions = 0
        self._extra_pings = 0
        self._pings_since_progress = 0
        self._suspicion_pinged = False
        self._going_away = False
        self._last_idle_ping: float | None = None
        self._silence_since = now
        self._silence_limit = self._draw()

    # Facts

    def note_life(self, now: float) -> None:
        """Bytes came from the peer (K2). Only stores; deadlines look at it when they come (K14)."""
        self.last_life = now
        self._lives += 1

    def note_progress(self) -> None:
        """A HEADERS or DATA frame was read."""
        self._extra_pings = 0
        self._pings_since_progress = 0
        self._suspicion_pinged = False

    def note_stream_opened(self) -> None:
        """A request was opened."""
        self.open_streams += 1

    def note_stream_closed(self) -> None:
        """A request ended."""
        self.open_streams -= 1

    def note_ping_ack(self, payload: bytes, now: float) -> float | None:
        """A PING ACK came: the round-trip time if it answers our last PING; None, and nothing else, if it doesn't."""
        if self._acked or self.last_ping_at is None or payload != self.payload:
            return None
        self._acked = True
        self.pings_acked += 1
        rtt = now - self.last_ping_at
        self.note_rtt(rtt)
        return rtt

    def note_rtt(self, rtt: float) -> None:
        """A round-trip time was measured, in seconds."""
        self.rtt_last = rtt
        self.rtt_best = rtt if self.rtt_best is None else min(rtt, self.rtt_best)
        self.rtt_smoothed = rtt if self.rtt_smoothed is None else self.rtt_smoothed + (rtt - self.rtt_smoothed) / 8

    def note_gap(self, seconds: float, now: float) -> None:
        """`seconds` passed that the monotonic clock didn't see: no request and no verdict on what was before (K25)."""
        if seconds > 0:
            self.distrust()
            if self.outstanding:
                self._extend(now)

    def distrust(self) -> None:
        """From now until life comes the connection is unverified (K9)."""
        self._distrusted_at_life = self._lives

    def note_upload_progress(self, now: float) -> None:
        """The peer's TCP took more of an upload since the last look: an outstanding PING gets more time (K4)."""
        if self.outstanding:
            deadline = min(now + self.policy.ping_timeout, self._upload_limit)
            if deadline > self._deadline:
                self._deadline = deadline
                self._state = _State.PINGED

    def note_going_away(self) -> None:
        """GOAWAY was received: from now on PINGs only while a stream is open (K17)."""
        self._going_away = True

    def note_calm(self, debug_data: bytes) -> bool:
        """GOAWAY(ENHANCE_YOUR_CALM) was received: whether it is a punishment for our PINGs (K13)."""
        return self._pings_since_progress >= 2 or debug_data == b"too_many_pings"

    def use_interval(self, read_idle_timeout: float) -> None:
        """Put another read_idle_timeout in force (K13), for this silence too."""
        if self.interval is not None and read_idle_timeout != self.interval:
            self.interval = read_idle_timeout
            self._silence_limit = self._draw()

    def close(self) -> None:
        """We said GOAWAY or closed: nothing is due any more (K17)."""
        self._state = _State.CLOSED

    # Questions

    @property
    def outstanding(self) -> bool:
        """Whether a PING was sent and no life came since."""
        return self._state in (_State.PINGED, _State.JUDGING) and self._lives == self._pinged_at_life

    def verified(self, now: float) -> bool:
        """Whether a request may go out without asking for life first (K9)."""
        configured = self.policy.read_idle_timeout
        if configured is None:
            return True
        if self._lives == self._distrusted_at_life:
            return False
        return now - self.last_life < min(configured, _UNVERIFIED_AFTER)

    # PINGs of other origin: True if one is to be sent now, with `payload`

    def ping_for_checkout(self, now: float) -> bool:
        """A request wants this connection and it is unverified (K9)."""
        if not self._may_send_extra(now):
            return False
        self._extra_pings += 1
        self._send(PingPurpose.CHECKOUT, now)
        return True

    def ping_for_suspicion(self, headers_sent_at: float, now: float) -> bool:
        """A request was given up whose HEADERS were handed over at `headers_sent_at`: perhaps nobody is there (K10)."""
        patience = max(1.0, 3 * (self.rtt_smoothed or 0.0))
        if self.last_life >= headers_sent_at or now - headers_sent_at <= patience:
            return False
        self.distrust()
        if self._suspicion_pinged or not self._may_send_extra(now):
            return False
        self._suspicion_pinged = True
        self._extra_pings += 1
        self._send(PingPurpose.SUSPICION, now)
        return True

    def ping_for_user(self, now: float) -> bool:
        """The application wants a PING; False: one is outstanding, which is its PING too.

        K16's limits don't apply: they bound what is sent without being asked for.
        """
        if self._state is _State.CLOSED or self.outstanding:
            return False
        self._send(PingPurpose.USER, now)
        return True

    # Time

    def next_deadline(self) -> float | None:
        """When to call `handle_timeout`, None for never. May be too early, never too late."""
        if self._state is _State.CLOSED:
            return None
        if self.outstanding:
            return self._deadline
        if self.interval is None or not self._watching():
            return None
        if self.last_life > self._silence_since:
            # A new silence gets its own jitter (K15) when this comes up: the least that it may be.
            return self._not_too_soon(self.last_life + (1 - self.policy.jitter) * self.interval)
        return self._not_too_soon(self._silence_since + self._silence_limit)

    def handle_timeout(self, now: float) -> Verdict:
        """What is to be done at `now`; early and spurious calls change nothing."""
        if self._state is _State.CLOSED:
            return Verdict.NOTHING
        if not self.outstanding:
            self._state = _State.QUIET
            self._extensions = 0
            return self._look_at_silence(now)
        if now < self._deadline:
            return Verdict.NOTHING
        if now - self._deadline > _LATE and self._extensions < _MAX_EXTENSIONS:
            self._extend(now)
        elif self._state is _State.PINGED:
            self._state = _State.JUDGING
            self._deadline = now + _JUDGEMENT_DELAY
        else:
            self.close()
            return Verdict.LOST
        return Verdict.NOTHING

    # Inside

    def _watching(self) -> bool:
        """Whether silence matters now (K11, K17)."""
        return self.open_streams > 0 or (self.policy.while_idle and not self._going_away)

    def _look_at_silence(self, now: float) -> Verdict:
        if self.interval is None:
            return Verdict.NOTHING
        if self.last_life > self._silence_since:
            self._silence_since = self.last_life
            self._silence_limit = self._draw()
        if not self._watching() or now < self._not_too_soon(self._silence_since + self._silence_limit):
            return Verdict.NOTHING
        self._last_idle_ping = now
        self._send(PingPurpose.IDLE, now)
        return Verdict.SEND_PING

    def _not_too_soon(self, due: float) -> float:
        """K16: two PINGs of K3 keep their distance whatever happened in between."""
        if self._last_idle_ping is None or self.interval is None:
            return due
        return max(due, self._last_idle_ping + (1 - self.policy.jitter) * self.interval)

    def _draw(self) -> float:
        """K15: the silence that this time is too long, in seconds."""
        if self.interval is None:
            return 0.0
        return self.interval * (1 - self.policy.jitter * self._random.random())

    def _may_send_extra(self, now: float) -> bool:
        """K16: whether a PING beyond K3's may be sent."""
        if self._state is _State.CLOSED or self.interval is None or self.outstanding:
            return False
        if self._extra_pings < _MAX_EXTRA_PINGS or self.last_ping_at is None:
            return True
        return now - self.last_ping_at >= (1 - self.policy.jitter) * self.interval

    def _send(self, purpose: PingPurpose, now: float) -> None:
        self.payload = self._random.randbytes(8)
        self.pings_sent += 1
        self.last_ping_at = now
        self.last_ping_purpose = purpose
        if purpose is not PingPurpose.USER:
            self._pings_since_progress += 1
        self._acked = False
        self._pinged_at_life = self._lives
        self._state = _State.PINGED
        self._deadline = now + self.policy.ping_timeout
        self._upload_limit = self._deadline + _MAX_UPLOAD_EXTENSION * self.policy.ping_timeout

    def _extend(self, now: float) -> None:
        """K7: what happened while we weren't there is no evidence; the outstanding PING gets its time anew."""
        if self._extensions < _MAX_EXTENSIONS:
            self._extensions += 1
            self._state = _State.PINGED
            self._deadline = max(self._deadline, now + self.policy.ping_timeout)


class IntervalMemory:
    """What an origin has taught us about our PINGs (K13). Times in seconds on the caller's monotonic clock."""

    __slots__ = ("_configured", "_interval", "_punished_at")

    def __init__(self, configured: float) -> None:
        self._configured = configured
        self._interval = configured
        self._punished_at = 0.0

    def punish(self, used: float, now: float) -> tuple[float, float]:
        """A connection that used `used` was punished: the interval before and from now on."""
        before = self.current(now)
        self._interval = max(before, min(2 * used, max(self._configured, _CALM_CEILING)))
        self._punished_at = now
        return before, self._interval

    def current(self, now: float) -> float:
        """The interval in force: halved for each hour without another punishment, never below the configured one."""
        if self._interval > self._configured:
            hours = int((now - self._punished_at) // _CALM_HALF_LIFE)
            return max(self._configured, self._interval / 2.0 ** min(hours, 64))
        return self._configured
