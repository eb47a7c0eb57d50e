"""What the kernel has taken from one socket of this process and not yet brought to the other one, on loopback TCP.

That is usually nothing: the sender's system call does the receiver's half as well. On a busy machine it isn't so.
Packets wait for the kernel's own thread to be given a processor, and some are lost, so that what is behind them stays
in the sender's buffer until it is sent again. Time that jumps would then run out for bytes that are on their way.

Linux only; elsewhere nothing is ever seen to be under way.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import time
from typing import NamedTuple

__all__ = ["Wire"]

#: How long what makes no progress is thought to be under way, in real seconds. Beyond that nobody reads it, as in many
#: a test, or nobody is there. A packet that was lost is sent again after 0.2 s, and after 0.4 s more.
_PATIENCE = 1.0

_ESTABLISHED, _SYN_SENT, _SYN_RECV, _FIN_WAIT_1, _FIN_WAIT_2, _LAST_ACK, _LISTEN, _CLOSING = 1, 2, 3, 4, 5, 9, 10, 11
#: States in which a socket is to get something, if only a FIN; and in which one that is no process's has something to
#: send.
_OPEN = {_ESTABLISHED, _SYN_SENT, _FIN_WAIT_1, _FIN_WAIT_2}
_SENDING = {_SYN_RECV, _FIN_WAIT_1, _LAST_ACK, _CLOSING}

# Of the kernel's struct tcp_info: the state, and where counters are.
_STATE, _UNACKED, _RECEIVED, _NOT_SENT, _SENT, _RESENT = 0, 24, 128, 144, 200, 208
_SIZE = 216


class _End(NamedTuple):
    """One socket."""

    local: int
    remote: int
    state: int
    #: Bytes that were written to it, and those that came for it, read or not.
    written: int
    received: int
    #: Packets that the other end hasn't acknowledged.
    unacked: int
    readable: bool
    writable: bool


def _end(fd: int) -> _End | None:
    """The TCP socket behind a descriptor, if there is one that has to do with another."""
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=fd)
    except OSError:
        return None
    try:
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        if len(raw) < _SIZE or raw[_STATE] == _LISTEN:
            return None
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLOUT)
        events = sum(mask for _, mask in poll.poll(0))
        local = sock.getsockname()[1]
        remote = 0 if raw[_STATE] == _SYN_SENT else sock.getpeername()[1]
    except OSError:
        return None
    finally:
        sock.detach()
    (unacked,) = struct.unpack_from("I", raw, _UNACKED)
    (received,) = struct.unpack_from("Q", raw, _RECEIVED)
    (not_sent,) = struct.unpack_from("I", raw, _NOT_SENT)
    sent, resent = struct.unpack_from("QQ", raw, _SENT)
    return _End(
        local,
        remote,
        raw[_STATE],
        sent - resent + not_sent,
        received,
        unacked,
        bool(events & ~select.POLLOUT),
        bool(events & ~select.POLLIN),
    )


def _states() -> dict[tuple[int, int], int]:
    """The states of all the machine's TCP sockets by their ports, whoever has them."""
    found = {}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{name}", encoding="ascii") as table:
            for line in list(table)[1:]:
                _, local, remote, state = line.split()[:4]
                found[int(local[-4:], 16), int(remote[-4:], 16)] = int(state, 16)
    return found


class Wire:
    """A look at what is under way, now and then."""

    def __init__(self) -> None:
        #: What the last look saw. Whoever sees the same twice knows that nothing happened between.
        self.seen: frozenset[_End] = frozenset()
        #: What is under way, and since when.
        self._since: dict[tuple[_End, _End | None], float] = {}

    def is_busy(self) -> bool:
        """Whether a socket will become readable or writable without anybody's doing anything."""
        if sys.platform != "linux":
            return False
        seen = frozenset(end for name in os.listdir("/proc/self/fd") if (end := _end(int(name))) is not None)
        if seen != self.seen:
            self.seen = seen
        now = time.monotonic()
        self._since = {what: self._since.get(what, now) for what in _under_way(seen)}
        return any(now < since + _PATIENCE for since in self._since.values())


def _under_way(ends: frozenset[_End]) -> list[tuple[_End, _End | None]]:
    """The sockets that something is to happen to, each with its other end, if that is ours and open."""
    by_ports = {(end.local, end.remote): end for end in ends}
    pairs: list[tuple[_End, _End | None]] = [(end, by_ports.get((end.remote, end.local))) for end in ends]
    found = [pair for pair in pairs if pair[1] is not None and _waits_for(pair[0], pair[1])]
    alone = [end for end, other in pairs if other is None and not end.readable and end.state in _OPEN]
    if alone:
        # Their other ends wait to be accepted, or were closed and may have something to send still.
        states = _states()
        found += [(end, None) for end in alone if states.get((end.remote, end.local), _SYN_RECV) in _SENDING]
    return found


def _waits_for(end: _End, other: _End) -> bool:
    coming = not end.readable and end.received != other.written
    return coming or (not end.writable and (end.unacked > 0 or not other.readable))
