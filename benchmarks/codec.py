"""The protocol layer alone: no socket, TLS, task or clock.

A request of 200 bytes is encoded and its answer of 500 bytes decoded, again and again on one connection. The answers
are those of a real HTTP/2 server (the h2 library), recorded beforehand for exactly these requests, so that no server's
work is measured. `h2` is that library alone, the floor under the default engine.
"""

from __future__ import annotations

import inspect
import random
import time
from typing import TYPE_CHECKING, Any, Protocol

import h2.config
import h2.connection
import h2.events

from benchmarks.workloads import BODY, Metrics, Parameters, latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ANSWER = b'{"text":"' + b"x" * 489 + b'"}'
#: Pairs on one connection: few enough to be recorded, many enough that the connection's beginning doesn't count.
PAIRS = 500
REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"https"),
    (b":authority", b"localhost"),
    (b":path", b"/answer?size=500"),
    (b"content-type", b"application/json"),
    (b"content-length", str(len(BODY)).encode()),
    (b"accept", b"*/*"),
    (b"user-agent", b"benchmark"),
]
RESPONSE = [
    (b":status", b"200"),
    (b"content-type", b"application/json"),
    (b"content-length", str(len(ANSWER)).encode()),
    (b"date", b"Mon, 02 Jan 2006 15:04:05 GMT"),
]


class Codec(Protocol):
    """A client's side of one connection."""

    def ask(self) -> bytes:
        """The bytes of the next request, and whatever else is due."""
        ...

    def take(self, data: bytes) -> bytes:
        """The body that these bytes bring."""
        ...


class H2Keep:
    """h2keep's `Connection`, as its runner uses it. The time stands still."""

    def __init__(self, engine: str) -> None:
        from h2keep import Keepalive
        from h2keep.protocol import Connection

        options: dict[str, Any] = {}
        if engine != "h2":
            if "engine" not in inspect.signature(Connection).parameters:
                raise ValueError("h2keep's protocol layer has one engine alone")
            options["engine"] = engine
        self._connection = Connection(Keepalive(), random.Random(1), 0.0, **options)
        self._stream = 0

    def ask(self) -> bytes:
        self._stream = self._connection.send_request(REQUEST, 0.0, content_length=len(BODY), end_stream=False)
        self._connection.send_data(self._stream, BODY, end_stream=True, now=0.0)
        return self._connection.data_to_send(1 << 20, 0.0)

    def take(self, data: bytes) -> bytes:
        self._connection.note_life(0.0)
        self._connection.receive_data(data, 0.0)
        while self._connection.next_event() is not None:
            pass
        body = self._connection.read(self._stream, 0.0)
        self._connection.release(self._stream, 0.0)
        return body


class H2:
    """The h2 library, used as its documentation shows it."""

    def __init__(self) -> None:
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        self._connection.initiate_connection()

    def ask(self) -> bytes:
        stream = self._connection.get_next_available_stream_id()
        self._connection.send_headers(stream, REQUEST)
        self._connection.send_data(stream, BODY, end_stream=True)
        return self._connection.data_to_send()

    def take(self, data: bytes) -> bytes:
        body = b""
        for event in self._connection.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                body += event.data
                self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        return body


CANDIDATES: Mapping[str, Callable[[], Codec]] = {
    "h2keep": lambda: H2Keep("h2"),
    "h2keep-ngh2": lambda: H2Keep("ngh2"),
    "h2": H2,
}


def _record(make: Callable[[], Codec]) -> list[bytes]:
    """What a server sends to a connection that does what `_pairs` does."""
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
    server.initiate_connection()
    codec = make()
    answers: list[bytes] = []
    for _ in range(PAIRS):
        for event in server.receive_data(codec.ask()):
            if isinstance(event, h2.events.StreamEnded):
                assert event.stream_id is not None
                server.send_headers(event.stream_id, RESPONSE)
                server.send_data(event.stream_id, ANSWER, end_stream=True)
            elif isinstance(event, h2.events.DataReceived):
                assert event.stream_id is not None
                server.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        answers.append(server.data_to_send())
        codec.take(answers[-1])
    return answers


def _pairs(codec: Codec, answers: list[bytes]) -> None:
    for answer in answers:
        codec.ask()
        if codec.take(answer) != ANSWER:
            raise RuntimeError("the recorded answer did not come out")


def codec(make: Callable[[], Codec], p: Parameters) -> Metrics:
    """Pairs for so many seconds, on one connection after another."""
    answers = _record(make)
    _pairs(make(), answers)
    times: list[float] = []
    cpu, until = time.process_time(), time.perf_counter() + p["seconds"]
    while (start := time.perf_counter()) < until:
        _pairs(make(), answers)
        times.append((time.perf_counter() - start) / PAIRS)
    cpu = time.process_time() - cpu
    pairs = len(times) * PAIRS
    return {"units": pairs, "per_second": len(times) / sum(times), "cpu_us": cpu / pairs * 1e6} | latencies(times)
