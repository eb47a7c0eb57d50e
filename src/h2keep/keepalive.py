"""When to send a PING, and when a connection is dead: rules K1-K17, and nothing else.

`Keepalive` is the policy, `KeepaliveTimer` applies it to one connection: facts and clock readings go in, one deadline
and a `Verdict` come out. `IntervalMemory` is what an origin's punishments leave behind (K13). Nothing here knows about
frames, sockets or tasks, reads a clock or makes randomness: whoever holds a timer sends the PING, ends the connection,
and passes in the time, in seconds on one monotonic clock. 0.0 is a time like any other.
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass
from typing import Protocol

__all__ = ["IntervalMemory", "Keepalive", "KeepaliveTimer", "PingPurpose", "RandomSource", "Verdict"]

#: A connection silent for longer than this must prove itself before its next request, in seconds (K9).
_MAX_UNVERIFIED_AFTER = 30.0
#: Where jitter leaves as much room, in seconds, PINGs are due at one of so many moments of each second, so that many
#: connections share a wake-up (K15). A power of two, which makes rounding exact.
_ROOM_TO_ROUND = 0.0625
_TICKS = 64
#: Longer intervals, in seconds, are none to a clock: beyond it moments are too far apart for sums.
_FOREVER = 2.0**40
#: What the reader gets between a PING's deadline and the judgement, in seconds (K7).
_JUDGEMENT = 0.02
#: A deadline handled later than this was slept or blocked through by ourselves, in seconds (K7).
_LATE = 0.5
_MAX_EXTENSIONS = 3
#: In all, uploads move one PING's deadline by this many ping_timeouts (K4).
_UPLOAD_ALLOWANCE = 2.0
#: PINGs beyond K3's rate that may go out without progress between them (K16).
_MAX_EXTRA_PINGS = 2
#: A request unanswered for less than this, in seconds, or this many round trips, says nothing about the peer (K10).
_SUSPICIOUS_AFTER = 1.0
_SUSPICIOUS_ROUND_TRIPS = 3.0
#: Keepalive PINGs since the last progress that make ENHANCE_YOUR_CALM a punishment for them (K13).
_PUNISHABLE_PINGS = 2
#: The longest interval that punishment leads to, in seconds: gRPC servers tolerate a PING in five minutes (K13).
_MAX_PUNISHED_INTERVAL = 330.0
#: A punishment's effect halves in each of these, in seconds (K13).
_FORGIVENESS = 3600.0


class RandomSource(Protocol):
    """Where jitter and payloads come from; `random.Random` and `random.SystemRandom` fit."""

    def random(self) -> float:
        """A number in [0, 1)."""

    def randbytes(self, n: int, /) -> bytes:
        """`n` bytes that a peer can't guess."""


@dataclass(frozen=True, slots=True)
class Keepalive:
    """How connections are kept alive and found dead (K1).

    Raises `ValueError` if a time is not a finite number above 0, or jitter not in [0, 1).
    """

    #: Silence, in seconds, after which a PING is sent (K3). None switches keepalive off.
    read_idle_timeout: float | None = 30.0
    #: Seconds after a PING without any byte from the peer, after which the connection is lost (K4).
    ping_timeout: float = 15.0
    #: Whether PINGs also go out while no request is open, which some servers punish (K11).
    while_idle: bool = False
    #: The fraction by which read_idle_timeout is shortened at random, at most, lest many clients ping in step (K15).
    jitter: float = 0.1

    def __post_init__(self) -> None:
        for name in ("read_idle_timeout", "ping_timeout"):
            value = getattr(self, name)
            off = name == "read_idle_timeout" and value is None
            if not off and not (_is_finite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number of seconds above 0, not {value!r}")
        if not isinstance(self.while_idle, bool):
            raise ValueError(f"while_idle must be True or False, not {self.while_idle!r}")
        if not (_is_finite(self.jitter) and 0 <= self.jitter < 1):
            raise ValueError(f"jitter must be a number from 0 to below 1, not {self.jitter!r}")


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


class PingPurpose(enum.Enum):
    """Why a PING was sent."""

    IDLE = enum.auto()  #: nothing came for the interval (K3)
    CHECKOUT = enum.auto()  #: a request wants a connection that has been silent (K9)
    SUSPICION = enum.auto()  #: a request was given up without an answer (K10)
    USER = enum.auto()  #: the application asked for it


class Verdict(enum.Enum):
    """What a deadline that was handled asks for."""

    NOTHING = enum.auto()
    SEND_PING = enum.auto()  #: send a PING with the timer's `payload` now
    LOST = enum.auto()  #: the peer is dead: abort the connection (K8)


class _Phase(enum.Enum):
    QUIET = enum.auto()  # no PING is outstanding
    PINGED = enum.auto()  # one is, and has until _judge_at
    JUDGING = enum.auto()  # it had; the reader gets a last chance until _judge_at (K7)
    CLOSED = enum.auto()


# In Python 3.11 a member costs as much to look up in its enumeration as a call of a function.
_QUIET, _PINGED, _JUDGING, _CLOSED = _Phase
_NOTHING, _SEND_PING, _LOST = Verdict
_IDLE, _USER = PingPurpose.IDLE, PingPurpose.USER


@functools.lru_cache
def _bounds(interval: float, jitter: float) -> tuple[float, float]:
    """The least jittered interval, and by how much the longest is longer (K15).

    Remembered, so that thousands of connections have the same two numbers: at each PING those are in the processor's
    cache which others have just used.
    """
    least = (1 - jitter) * interval
    return least, interval - least


class KeepaliveTimer:
    """Decides for one connection when a PING is due and when the peer is dead.

    `now` is the moment at which the connection became ready; `random` gives a fraction for each silence (K15) and
    8 bytes for each PING (K3). Whoever runs it sleeps until `next_deadline`, then calls `handle_timeout`. Life never
    moves the deadline, so arriving bytes need not touch the sleeper: the timer looks at them when it wakes (K14).
    """

    __slots__ = (
        "_allowed", "_awaiting_ack", "_distrusted", "_extensions", "_extra_pings", "_going_away", "_judge_at",
        "_keepalive_pings", "_least_interval", "_life_seen", "_looked_at", "_phase", "_random", "_share",
        "_silent_since", "_spread", "_suspicion_pinged", "_ticks", "_verified_for", "_wake_at", "interval", "last_life",
        "last_ping_at", "last_ping_purpose", "open_streams", "payload", "pings_acked", "pings_sent", "policy",
        "ready_at", "rtt_best", "rtt_last", "rtt_smoothed",
    )  # fmt: skip

    def __init__(self, policy: Keepalive, random: RandomSource, now: float) -> None:
        #: As configured; never changes.
        self.policy = policy
        #: read_idle_timeout in force, in seconds: as configured or as K13 enlarged it; None if keepalive is off.
        self.interval = policy.read_idle_timeout
        #: When the connection became ready.
        self.ready_at = now
        #: When the last byte came from the peer (K2); before the first, when the connection became ready.
        self.last_life = now
        self.open_streams = 0
        #: PINGs sent, of whatever purpose, and those whose own ACK came (a PING may be answered by other life alone).
        self.pings_sent = 0
        self.pings_acked = 0
        #: The last PING's 8 bytes, b"" before the first; when and why it was sent, None before the first.
        self.payload = b""
        self.last_ping_at: float | None = None
        self.last_ping_purpose: PingPurpose | None = None
        #: Round-trip times in seconds, None before the first: the last, the shortest, and their average (RFC 6298's).
        self.rtt_last: float | None = None
        self.rtt_best: float | None = None
        self.rtt_smoothed: float | None = None

        self._random = random
        self._phase = _QUIET
        self._going_away = False
        # Life that nothing but note_life knows of yet. A flag, as life may bear the very time of the PING that it ends.
        self._life_seen = False
        # Up to here there is no other unknown life.
        self._looked_at = now
        self._silent_since = now
        self._bound_interval()
        # The silence's jittered interval: its place between the bounds, drawn when it is needed, since most silences
        # end before that; and its length in ticks.
        self._share: float | None = None
        self._ticks = 0
        self._judge_at = now
        self._extensions = 0
        self._allowed = 0.0
        self._distrusted = False
        # How long after the last life the connection counts as verified (K9), for ever without keepalive.
        idle = policy.read_idle_timeout
        self._verified_for = math.inf if idle is None else min(idle, _MAX_UNVERIFIED_AFTER)
        self._awaiting_ack = False
        # Counted since the last progress.
        self._keepalive_pings = 0
        self._extra_pings = 0
        self._suspicion_pinged = False
        self._wake_at: float | None = None
        self._arm()

    # Facts

    def note_life(self, now: float) -> None:
        """Any bytes came from the peer (K2): no PING is outstanding any more, and the connection is verified."""
        self.last_life = now
        self._life_seen = True

    def note_progress(self) -> None:
        """A HEADERS or DATA frame was read; renews what K10, K13 and K16 count."""
        self._keepalive_pings = 0
        self._extra_pings = 0
        self._suspicion_pinged = False

    def note_stream_opened(self) -> bool:
        """A stream was opened; whether the deadline may have moved to an earlier time.

        The first stream arms K3's PING; after a long silence it is due at once (K11).
        """
        self.open_streams += 1
        if self.open_streams > 1:
            return False
        # What was set for a stream before this one is mostly soon enough.
        if self._wake_at is not None and self._wake_at <= self.last_life + self._least_interval:
            return False
        self._take_in_life()
        self._arm_anew()
        return True

    def note_stream_closed(self) -> None:
        """A stream ended. The last one's end disarms a PING not yet sent, never an outstanding one (K11).

        The deadline stays, for the stream that may be open by then; if none is, it brings no PING.
        """
        self.open_streams -= 1

    def note_ping_ack(self, payload: bytes, now: float) -> float | None:
        """An ACK came: the round-trip time in seconds if it is the first of the last PING, else None (K3).

        It is a sample even if other life came before it. That it is life itself is for `note_life` to be told.
        """
        if not self._awaiting_ack or payload != self.payload or self.last_ping_at is None:
            return None
        self._awaiting_ack = False
        self.pings_acked += 1
        rtt = now - self.last_ping_at
        self.note_rtt(rtt)
        return rtt

    def note_rtt(self, rtt: float) -> None:
        """A round-trip time was measured elsewhere, in seconds: that of the SETTINGS and their ACK."""
        self.rtt_last = rtt
        if self.rtt_best is None or rtt < self.rtt_best:
            self.rtt_best = rtt
        self.rtt_smoothed = rtt if self.rtt_smoothed is None else self.rtt_smoothed + (rtt - self.rtt_smoothed) / 8

    def note_gap(self, seconds: float, now: float) -> None:
        """`seconds` passed that `now` doesn't count: unverified, and an outstanding PING gets ping_timeout anew (K25).

        However long the gap, it is one of the three extensions that K7 grants a PING.
        """
        self.distrust()
        if self.outstanding:
            self._extend(now)
            self._arm()

    def distrust(self) -> None:
        """The connection is unverified until life comes, though no time is known to be missing (K25: wall clock)."""
        self._take_in_life()
        self._distrusted = True

    def note_upload_progress(self, now: float) -> None:
        """The peer's TCP acknowledged more of a running upload since the last look (K4).

        An outstanding PING, also while it is judged, gets ping_timeout anew, in all by at most 2 x ping_timeout.
        """
        if not self.outstanding:
            return
        # Time that we slept through is K7's to excuse. Charged to the allowance, it could use that up and still leave
        # a deadline that has passed, but no longer long enough ago to be excused.
        if not (now - self._judge_at > _LATE and self._extend(now)):
            allowance = _UPLOAD_ALLOWANCE * self.policy.ping_timeout - self._allowed
            shift = min(now + self.policy.ping_timeout - self._judge_at, allowance)
            if shift <= 0:
                return
            self._allowed += shift
            self._judge_at += shift
            self._looked_at = now
            self._phase = _PINGED
        self._arm()

    def note_going_away(self) -> None:
        """GOAWAY came (K17): K3's PINGs only while a stream is open, whatever while_idle; none of K9 and K10."""
        self._going_away = True
        self._take_in_life()
        self._arm()

    def note_calm(self, debug_data: bytes) -> bool:
        """GOAWAY(ENHANCE_YOUR_CALM) came: whether that punishes our PINGs (K13).

        So it does if 2 or more PINGs (not the user's) were sent since the last progress, or `debug_data` says so.
        """
        return self._keepalive_pings >= _PUNISHABLE_PINGS or debug_data == b"too_many_pings"

    def use_interval(self, read_idle_timeout: float) -> None:
        """Put another interval in force, in seconds (K13): never below the configured one, none if keepalive is off."""
        if self.policy.read_idle_timeout is None:
            return
        self.interval = max(read_idle_timeout, self.policy.read_idle_timeout)
        self._bound_interval()
        if self._share is not None:
            self._use_share(self._share)
        self._take_in_life()
        self._arm_anew()

    def close(self) -> None:
        """We sent GOAWAY, or closed: no deadline and no PING any more (K17). All later calls are harmless."""
        self._phase = _CLOSED
        self._wake_at = None

    # PINGs of other origin

    def ping_for_checkout(self, now: float) -> bool:
        """A request wants this connection (K9): True if a PING must be sent now, with `payload`.

        False if one is outstanding, if K16 allows no more, after GOAWAY in either direction, or if keepalive is off.
        """
        self._take_in_life()
        if not self._may_ping_extra(now):
            return False
        self._ping(PingPurpose.CHECKOUT, now)
        self._arm_anew()
        return True

    def ping_for_suspicion(self, headers_sent_at: float, now: float) -> bool:
        """A request was given up whose HEADERS were sent at `headers_sent_at`: True if a PING must be sent now (K10).

        If no life came since then, and that is longer ago than max(1 s, 3 x smoothed RTT), the connection becomes
        unverified; the PING is for that case only. Also False where `ping_for_checkout` would be, and if a PING of
        K10 was sent since the last progress.
        """
        self._take_in_life()
        patience = max(_SUSPICIOUS_AFTER, _SUSPICIOUS_ROUND_TRIPS * (self.rtt_smoothed or 0.0))
        if self.last_life > headers_sent_at or now - headers_sent_at <= patience:
            return False
        self._distrusted = True
        if self._suspicion_pinged or not self._may_ping_extra(now):
            return False
        self._suspicion_pinged = True
        self._ping(PingPurpose.SUSPICION, now)
        self._arm_anew()
        return True

    def ping_for_user(self, now: float) -> bool:
        """The application wants a PING: True if it must be sent now; False: join the outstanding one, or it is closed.

        K4 applies to it, even with keepalive off. K16 doesn't: that bounds what nobody asked for.
        """
        self._take_in_life()
        if self._phase is not _QUIET:
            return False
        self._ping(PingPurpose.USER, now)
        self._arm_anew()
        return True

    # Time

    def next_deadline(self) -> float | None:
        """When to call `handle_timeout`, None if never; may be too early, never too late.

        Only `note_stream_opened`, `use_interval` and the `ping_for_...` methods can move it to an earlier time, or from
        None: a sleeper must be re-armed then. Others move it later or to None, which a sleeper may find out by waking.
        After `handle_timeout` ask again.
        """
        return self._wake_at

    def handle_timeout(self, now: float) -> Verdict:
        """Act on the deadline if it has passed; early and spurious calls change nothing.

        If `judgement_due` says so the caller lets the scheduler make two passes before, so that a reader woken by
        waiting bytes notes their life first (K7). Judgement takes two calls, at a PING's deadline and 20 ms later; one
        that comes more than 0.5 s late grants the PING its ping_timeout anew, at most three times. After LOST the timer
        is closed.
        """
        if self._wake_at is None or now < self._wake_at:
            return _NOTHING
        self._take_in_life()
        self._looked_at = now
        verdict = _NOTHING
        if self._phase is _QUIET:
            if self._pings_silence() and now >= self._ping_due(self._silent_since):
                self._ping(_IDLE, now)
                verdict = _SEND_PING
        elif now >= self._judge_at:
            verdict = self._judge(now)
        self._arm_anew()
        return verdict

    def judgement_due(self, now: float) -> bool:
        """Whether the scheduler must make two passes before `handle_timeout` is called with this very `now` (K7).

        Not to send a PING, nor to take in life that came meanwhile: what lies unread can't make either wrong. But after
        a stall of our own it could make the PING needless.
        """
        if self._wake_at is None:
            return False
        return now - self._wake_at > _LATE or (now >= self._judge_at and self.outstanding)

    # Answers

    @property
    def outstanding(self) -> bool:
        """Whether a PING was sent and no life came since; False once closed."""
        return (self._phase is _PINGED or self._phase is _JUDGING) and not self._life_seen

    def verified(self, now: float) -> bool:
        """Whether a request may go out without asking the peer for life first (K9); always True if keepalive is off.

        Not after min(configured read_idle_timeout, 30 s) of silence, nor from a gap or a suspicion until the next life.
        """
        if self._distrusted and not self._life_seen:
            return self.policy.read_idle_timeout is None
        return now - self.last_life < self._verified_for

    # Inside

    def _take_in_life(self) -> None:
        """Begin a new silence if life came since the last look; whatever decides calls this first."""
        if not self._life_seen or self._phase is _CLOSED:
            return
        self._life_seen = False
        self._distrusted = False
        if self._phase is _QUIET:
            self._share = None
        self._phase = _QUIET
        # The later of the two, lest life dated before a PING that it came after bring the next one too near (K16).
        self._silent_since = self._looked_at = max(self.last_life, self._looked_at)

    def _pings_silence(self) -> bool:
        """Whether K3 applies: not to unused connections (K11, K17)."""
        if self.interval is None:
            return False
        return self.open_streams > 0 or (self.policy.while_idle and not self._going_away)

    def _bound_interval(self) -> None:
        """Set the bounds between which K15 draws."""
        self._least_interval, self._spread = _bounds(min(self.interval or 0.0, _FOREVER), self.policy.jitter)

    def _use_share(self, share: float) -> None:
        """Choose a silence's jittered interval by its place between the bounds (K15)."""
        self._share = share
        if self._spread >= _ROOM_TO_ROUND:
            self._ticks = math.ceil((self._least_interval + self._spread * share) * _TICKS)

    def _ping_due(self, silent_since: float) -> float:
        """When a silence will have lasted for the jittered interval (K15)."""
        share = self._share
        if share is None:
            share = self._random.random()
            self._use_share(share)
        if self._spread < _ROOM_TO_ROUND:
            return silent_since + (self._least_interval + self._spread * share)
        # The begin is rounded by itself, so that how soon after a PING the answer came makes no difference.
        due = silent_since * _TICKS // 1 + self._ticks
        earliest = silent_since + self._least_interval
        if due < earliest * _TICKS:
            due = math.ceil(earliest * _TICKS)
        elif due > (latest := (earliest + self._spread) * _TICKS):
            due = math.floor(latest)
        return due / _TICKS

    def _arm(self) -> None:
        """As `_arm_anew`, but no sleeper need wake earlier than it was going to."""
        before = self._wake_at
        self._arm_anew()
        if before is not None and self._wake_at is not None:
            self._wake_at = max(before, self._wake_at)

    def _arm_anew(self) -> None:
        """Choose when to wake: as late as can be, yet in time for any silence that begins after the last look."""
        if self._phase is _CLOSED:
            return
        self._wake_at = None if self._phase is _QUIET else self._judge_at
        if not self._pings_silence():
            return
        if self._wake_at is not None:
            due = self._ping_due(self._looked_at)
            if due < self._judge_at:
                self._wake_at = due
            return
        look_at = self._looked_at + self._least_interval
        if self._spread >= _ROOM_TO_ROUND:
            look_at = math.ceil(look_at * _TICKS) / _TICKS
        # A silence that began with the last look is never pinged before its least interval is over.
        young = self._looked_at == self._silent_since
        self._wake_at = look_at if young else min(look_at, self._ping_due(self._silent_since))

    def _judge(self, now: float) -> Verdict:
        """No life came until `_judge_at`, which has passed (K7)."""
        if now - self._judge_at > _LATE and self._extend(now):
            return _NOTHING
        if self._phase is _PINGED:
            self._phase = _JUDGING
            self._judge_at = now + _JUDGEMENT
            return _NOTHING
        self.close()
        return _LOST

    def _extend(self, now: float) -> bool:
        """Give the outstanding PING its ping_timeout anew, for time that we missed; False if done too often."""
        if self._extensions >= _MAX_EXTENSIONS:
            return False
        self._extensions += 1
        self._judge_at = now + self.policy.ping_timeout
        self._looked_at = now
        self._phase = _PINGED
        return True

    def _may_ping_extra(self, now: float) -> bool:
        """Whether K9 or K10 may send a PING; charges K16's budget if it comes faster than K3 would."""
        if self._phase is not _QUIET or self.interval is None or self._going_away:
            return False
        if self.last_ping_at is not None and now - self.last_ping_at < self._least_interval:
            if self._extra_pings >= _MAX_EXTRA_PINGS:
                return False
            self._extra_pings += 1
        return True

    def _ping(self, purpose: PingPurpose, now: float) -> None:
        """A new PING becomes the outstanding one."""
        self.payload = self._random.randbytes(8)
        self.pings_sent += 1
        self.last_ping_at = now
        self.last_ping_purpose = purpose
        self._awaiting_ack = True
        if purpose is not _USER:
            self._keepalive_pings += 1
        self._phase = _PINGED
        self._looked_at = now
        # That of the next silence, which begins after this.
        self._use_share(self._random.random())
        self._judge_at = now + self.policy.ping_timeout
        self._extensions = 0
        self._allowed = 0.0


class IntervalMemory:
    """What punishments taught about one origin (K13): its interval, `configured` seconds at first and at least."""

    __slots__ = ("_configured", "_interval", "_punished_at")

    def __init__(self, configured: float) -> None:
        self._configured = configured
        self._interval = configured
        self._punished_at = 0.0

    def punish(self, used: float, now: float) -> tuple[float, float]:
        """PINGs of a connection whose interval was `used` were punished: the origin's interval before and after.

        It grows to 2 x `used`, up to 330 s (or the configured interval, where that is longer), and never falls by this.
        """
        before = self.current(now)
        self._interval = min(max(before, 2 * used), max(self._configured, _MAX_PUNISHED_INTERVAL))
        self._punished_at = now
        return before, self._interval

    def current(self, now: float) -> float:
        """The interval in force, in seconds: halved for each hour since the last punishment, never below configured."""
        halvings = max(0, math.floor((now - self._punished_at) / _FORGIVENESS))
        return max(self._configured, math.ldexp(self._interval, -halvings))
