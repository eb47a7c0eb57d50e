"""Connecting for those who wait in an origin's queue: under their timeout, with retries, until SETTINGS have come.

One attempt serves many, so how long it may take is what the most patient of them allows; the others have clocks of
their own. From the moment on when one of them has given it up it may not take much longer: then those who still wait
get another attempt. What becomes of the connection is the pool's affair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

from h2keep.errors import ConnectError, ConnectTimeout, HTTP2NotSupported
from h2keep.runner.dial import DialOptions, Transport, dial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h2keep.runner.connection import Http2Connection
    from h2keep.runner.origin import OriginState

__all__ = ["UNAWAITED_TIMEOUT", "await_settings", "connect", "hasten", "patience", "retry_delays"]

#: What nobody waits for may take this long to connect, in seconds: a replacement for an aged connection (K22), and an
#: attempt from the moment on when somebody gave it up.
UNAWAITED_TIMEOUT = 10.0
#: What the next attempt has after one that was given up is twice as long, up to this: the line may be slow.
_LONGEST_ALLOWANCE = 60.0


def retry_delays(retries: int) -> Iterator[float | None]:
    """Seconds to wait after each failed attempt to connect, as httpcore does; None after the last."""
    for number in range(retries):
        yield 0.5 * 2 ** (number - 1) if number else 0.0
    yield None


def patience(retries: int, timeout: float | None) -> float | None:
    """How long all attempts to connect may take together, in seconds; None for ever."""
    delays = list(retry_delays(retries))
    return None if timeout is None else timeout * len(delays) + sum(delay or 0.0 for delay in delays)


async def connect(state: OriginState, options: DialOptions, timeout: float | None) -> tuple[Transport, float]:
    """A transport, and when its SETTINGS are due. Each attempt that `retries` allows has the whole timeout.

    Raises `ConnectError`; `HTTP2NotSupported` at once.
    """
    for delay in retry_delays(options.retries):
        try:
            return await _attempt(state, options, timeout)
        except HTTP2NotSupported:
            raise
        except ConnectError:
            if delay is None or not state.waiting:
                raise
            await anyio.sleep(delay)
    raise AssertionError("the last attempt has no delay after it")


async def _attempt(state: OriginState, options: DialOptions, timeout: float | None) -> tuple[Transport, float]:
    allowance = UNAWAITED_TIMEOUT
    while True:
        with anyio.move_on_after(timeout) as attempt:
            deadline = attempt.deadline
            state.attempts[attempt] = allowance
            try:
                return await dial(state.origin, options), deadline
            finally:
                del state.attempts[attempt]
        if attempt.deadline == deadline or not state.waiting:
            raise ConnectTimeout(f"{state.origin}: not connected within {timeout} s (connect timeout)")
        # Who still waits may allow more time, but not everybody is to wait for an attempt that has failed others.
        allowance = min(2 * allowance, _LONGEST_ALLOWANCE)


def hasten(state: OriginState, now: float) -> None:
    """Somebody gave up: attempts that may lead nowhere aren't given much more time."""
    for attempt, allowance in state.attempts.items():
        attempt.deadline = min(attempt.deadline, now + allowance)


async def await_settings(connection: Http2Connection, timeout: float, deadline: float) -> None:
    """See to it that the server's SETTINGS come within the connect timeout; requests are sent before they do."""
    with anyio.CancelScope(deadline=deadline):
        await connection.wait_ready()
    if not connection.protocol.ready:
        # They may have come while this loop was blocked: the reader's turn, as in K7.
        await checkpoint()
        await checkpoint()
    if not connection.protocol.ready:
        connection.give_up(
            ConnectTimeout(
                f"{connection.origin}: the server accepted the connection, but sent no HTTP/2 SETTINGS within "
                f"{timeout} s (connect timeout)"
            )
        )
