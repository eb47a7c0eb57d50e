"""A slow, long line in user space: bytes wait for their turn on it, then for the way.

    python -m benchmarks.relay HOST:PORT --mbit 100 --round-trip 0.05

Each direction has its own line. A line takes bytes off the sender's hands as long as fewer than a router's buffer of
them wait; then TCP's own flow control holds the sender up. Nothing is ever lost. The address to connect to is printed
as one line of JSON; the relay ends when its standard input does.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
import time
from collections import deque

#: What one turn on the line takes at most: about 1.3 ms of 100 Mbit/s.
PIECE = 16 * 1024
#: Bytes that may wait for their turn, beside those that are on their way.
BUFFER = 256 * 1024


class Line:
    """One direction: `bytes_per_second`, and `delay` seconds from end to end."""

    def __init__(self, source: socket.socket, sink: socket.socket, bytes_per_second: float, delay: float) -> None:
        self._source = source
        self._sink = sink
        self._rate = bytes_per_second
        self._delay = delay
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._changed = threading.Condition()
        self._held = 0
        self._room = BUFFER + int(bytes_per_second * delay)

    def start(self) -> None:
        for run in (self._take, self._deliver):
            threading.Thread(target=run, daemon=True).start()

    def _take(self) -> None:
        free_at = 0.0
        data = b"-"
        while data:
            try:
                data = self._source.recv(PIECE)
            except OSError:
                data = b""
            free_at = max(free_at, time.monotonic()) + len(data) / self._rate
            with self._changed:
                self._waiting.append((free_at + self._delay, data))
                self._held += len(data)
                self._changed.notify_all()
                while self._held > self._room:
                    self._changed.wait()

    def _deliver(self) -> None:
        data = b"-"
        while data:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                due, data = self._waiting.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if data:
                    self._sink.sendall(data)
                else:
                    self._sink.shutdown(socket.SHUT_WR)
            except OSError:
                # Gone; the other direction finds out by itself.
                pass
            with self._changed:
                self._held -= len(data)
                self._changed.notify_all()


def _serve(listener: socket.socket, to: tuple[str, int], bytes_per_second: float, delay: float) -> None:
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(to)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, sink in ((near, far), (far, near)):
            Line(source, sink, bytes_per_second, delay).start()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relay", description=__doc__)
    parser.add_argument("to", metavar="HOST:PORT")
    parser.add_argument("--mbit", type=float, required=True, help="each way, in a second")
    parser.add_argument("--round-trip", type=float, required=True, metavar="SECONDS")
    options = parser.parse_args()
    host, _, port = options.to.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    rate = options.mbit * 1e6 / 8
    arguments = (listener, (host, int(port)), rate, options.round_trip / 2)
    threading.Thread(target=_serve, args=arguments, daemon=True).start()
    print(json.dumps({"address": "{}:{}".format(*listener.getsockname())}), flush=True)
    while os.read(sys.stdin.fileno(), 4096):
        pass


if __name__ == "__main__":
    main()
