"""Ports for servers that must be told which one to listen on.

A port that was free a moment ago may be somebody else's by the time the server starts: what the system gives out for
the asking, it gives to others, too. These come from below its range, and each worker of a parallel run has its own.
"""

from __future__ import annotations

import itertools
import os
import socket

__all__ = ["free_ports"]

_HOST = "127.0.0.1"
_FIRST, _PER_WORKER, _WORKERS = 20_000, 1_000, 12

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
_numbers = itertools.cycle(range(_FIRST + _worker * _PER_WORKER, _FIRST + (_worker + 1) * _PER_WORKER))


def free_ports(count: int) -> list[int]:
    """So many ports of 127.0.0.1 that nobody listens on."""
    found: list[int] = []
    for port in itertools.islice(_numbers, _PER_WORKER):
        try:
            with socket.create_server((_HOST, port)):
                found.append(port)
        except OSError:
            continue
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} of {_PER_WORKER} ports are free")
