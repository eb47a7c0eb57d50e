"""Why a request or its connection failed, as the errors say it: in which words, with which figures.

`name` is the origin as messages are to call it. What follows from a failure is decided in `connection.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from h2keep.errors import (
    ConnectionGoingAway,
    ConnectionLost,
    PingTimeout,
    ReadTimeout,
    RemoteProtocolError,
    StreamReset,
    WriteTimeout,
)
from h2keep.protocol.engine import ErrorCode

if TYPE_CHECKING:
    from h2keep.keepalive import KeepaliveTimer
    from h2keep.protocol.events import GoAwayReceived
    from h2keep.protocol.stream import Stream

__all__ = ["going_away", "lost", "named", "ping_timeout", "read_timeout", "reset", "write_timeout"]


def named(name: str, error: RemoteProtocolError) -> RemoteProtocolError:
    """An engine's error, which knows no origin."""
    ours = RemoteProtocolError(f"{name}: {error}")
    ours.__cause__ = error.__cause__
    return ours


def reset(name: str, error_code: int, *, refused: bool) -> StreamReset:
    """RST_STREAM came; `refused`: before the request was processed."""
    text = f"{name}: the server reset the stream with error code {_code(error_code)}"
    if refused:
        text += "; it did not process the request, which can be sent again"
    return StreamReset(text, error_code=error_code, unprocessed=refused)


def going_away(name: str, goaway: GoAwayReceived) -> ConnectionGoingAway:
    """GOAWAY came, and the request is none of those that the server still serves."""
    text = (
        f"{name}: the server is closing the connection (GOAWAY, error code {_code(goaway.error_code)}, "
        f"{goaway.debug_data!r}) and did not process the request, which can be sent again"
    )
    return ConnectionGoingAway(
        text,
        last_stream_id=goaway.last_stream_id,
        error_code=goaway.error_code,
        debug_data=goaway.debug_data,
        unprocessed=True,
    )


def read_timeout(name: str, stream: Stream) -> ReadTimeout:
    """K21's read clock ran out."""
    what = "body bytes" if stream.response_seen else "response"
    return ReadTimeout(f"{name}: no {what} came on the stream within {stream.read_timeout} s", unprocessed=False)


def write_timeout(name: str, stream: Stream, obstacle: str) -> WriteTimeout:
    """K21's write clock ran out; the obstacle is what took no bytes."""
    text = f"{name}: the {obstacle} took no bytes within {stream.write_timeout} s"
    return WriteTimeout(text, unprocessed=stream.fields is not None)


def ping_timeout(name: str, timer: KeepaliveTimer, now: float) -> PingTimeout:
    """No life came within ping_timeout of a PING."""
    waited = now - (now if timer.last_ping_at is None else timer.last_ping_at)
    text = (
        f"{name}: the connection is dead: nothing came for {now - timer.last_life:.1f} s, {waited:.1f} s of "
        f"them after a PING (read_idle_timeout={timer.interval}, ping_timeout={timer.policy.ping_timeout}); "
        "whether the request was processed is unknown"
    )
    return PingTimeout(text, last_life=timer.last_life, ping_sent_at=timer.last_ping_at, rtt=timer.rtt_smoothed)


def lost(text: str, timer: KeepaliveTimer, now: float) -> ConnectionLost:
    """The connection ended in another way."""
    text += f" (last byte {now - timer.last_life:.1f} s ago)"
    return ConnectionLost(text, last_life=timer.last_life, ping_sent_at=timer.last_ping_at, rtt=timer.rtt_smoothed)


def _code(error_code: int) -> str:
    names = {value: name for name, value in vars(ErrorCode).items() if isinstance(value, int)}
    return names.get(error_code, hex(error_code))
