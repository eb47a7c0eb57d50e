"""An HTTP/2 server that counts, and misbehaves when told to: python -m benchmarks.behaviour.server --cert FILE

    POST /answer?id=1&wait=4&size=20         reads the body, waits, answers with size bytes
    GET  /stream?id=1&size=90000&piece=16384&interval=0.02    the head at once, then a piece after each interval

Orders come as lines of JSON on standard input and events go out as lines of JSON. Every TLS record is decrypted by
itself: so an event can tell by `offset` with which byte of its connection it came, and the relay knows when that byte
passed, however long after that it was delivered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import ssl
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from hyperframe.frame import GoAwayFrame

from benchmarks.behaviour.heartbeat import heartbeat

if TYPE_CHECKING:
    from collections.abc import Mapping

RECORD_HEADER = 5
ENHANCE_YOUR_CALM = 11
#: PINGs that come sooner after the one before, in seconds, and how many of them a server that wants calm bears.
CALM_INTERVAL = 1.5
CALM_STRIKES = 2


def tell(event: str, **facts: object) -> None:
    os.write(1, json.dumps({"event": event, "at": time.monotonic(), **facts}).encode() + b"\n")


class Server:
    """All connections, and the mood that they share."""

    def __init__(self, context: ssl.SSLContext, window: int) -> None:
        self.context = context
        self.window = window
        self.connections: set[Connection] = set()
        #: Says GOAWAY to those who PING too often; and closes on them, whatever is in flight.
        self.wants_calm = False
        self.closes = False
        #: Takes note of what comes, and answers nothing.
        self.audits = False

    def obey(self, order: Mapping[str, Any]) -> None:
        match order["do"]:
            case "goaway":
                for connection in self.connections:
                    connection.go_away_in_the_middle()
            case "stop reading":
                for connection in self.connections:
                    connection.transport.pause_reading()
            case "ignore streams":
                for connection in self.connections:
                    connection.mute = True
            case "want calm":
                self.wants_calm = True
            case "want calm and close":
                self.wants_calm = self.closes = True
            case "audit":
                self.audits = True
                for connection in self.connections:
                    connection.transport.resume_reading()
        tell("obeyed", order=order["do"])


class Connection(asyncio.Protocol):
    """One client."""

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self._server = server
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = server.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._shaken = False
        self._raw = bytearray()
        self._offset = 0
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self._changed = asyncio.Event()
        self._queries: dict[int, dict[str, str]] = {}
        self._paths: dict[int, str] = {}
        self._received: dict[int, int] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._last_stream: int | None = None
        self._last_ping: float | None = None
        self._strikes = 0
        #: Nothing goes out on streams any more; PINGs are answered.
        self.mute = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.port: int = transport.get_extra_info("peername")[1]
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._server.connections.discard(self)
        tell("closed", port=self.port)

    def data_received(self, data: bytes) -> None:
        self._raw += data
        while len(self._raw) >= RECORD_HEADER:
            end = RECORD_HEADER + int.from_bytes(self._raw[3:RECORD_HEADER], "big")
            if len(self._raw) < end:
                break
            self._incoming.write(self._raw[:end])
            del self._raw[:end]
            self._offset += end
            try:
                self._decrypt()
            except (ssl.SSLError, h2.exceptions.ProtocolError) as error:
                tell("broken", port=self.port, error=repr(error))
                self.transport.close()
                return
        self._changed.set()
        self.flush()

    def _decrypt(self) -> None:
        if not self._shaken:
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.do_handshake()
                self._shaken = True
                self._begin()
        if self._shaken:
            with contextlib.suppress(ssl.SSLWantReadError):
                while plain := self._tls.read(65536):
                    for event in self._h2.receive_data(plain):
                        self._take(event)

    def _begin(self) -> None:
        if self._server.window:
            codes = h2.settings.SettingCodes
            self._h2.local_settings = h2.settings.Settings(
                client=False, initial_values={codes.INITIAL_WINDOW_SIZE: self._server.window}
            )
        self._h2.initiate_connection()
        if self._server.window:
            self._h2.increment_flow_control_window(self._server.window)

    def flush(self) -> None:
        """Send what HTTP/2 wants to say."""
        plain = self._h2.data_to_send()
        if self._shaken and plain:
            self._tls.write(plain)
        if (data := self._outgoing.read()) and not self._server.audits and not self.transport.is_closing():
            self.transport.write(data)

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=stream, headers=headers):
                # `header_encoding` makes them text, whatever their type says.
                url = urlsplit(next(str(value) for name, value in headers if str(name) == ":path"))
                self._paths[stream] = url.path
                self._queries[stream] = query = {name: values[0] for name, values in parse_qs(url.query).items()}
                if self._last_stream is not None and stream > self._last_stream:
                    tell("refused", id=int(query["id"]))
                self._tell_request("request", stream)
            case h2.events.DataReceived(stream_id=stream, flow_controlled_length=length, data=data):
                self._h2.acknowledge_received_data(length, stream)
                self._received[stream] = self._received.get(stream, 0) + len(data)
                self._tell_request("body", stream, bytes=self._received[stream])
            case h2.events.StreamEnded(stream_id=stream):
                if not self._server.audits and (self._last_stream is None or stream <= self._last_stream):
                    task = asyncio.create_task(self._answer(stream))
                    self._tasks[stream] = task
                    task.add_done_callback(lambda _: self._done(stream))
            case h2.events.StreamReset(stream_id=stream):
                if stream in self._tasks:
                    self._tasks[stream].cancel()
            case h2.events.PingReceived():
                tell("ping", port=self.port, offset=self._offset)
                self._judge_ping(time.monotonic())

    def _tell_request(self, event: str, stream: int, **facts: object) -> None:
        tell(event, id=int(self._queries[stream]["id"]), port=self.port, offset=self._offset, **facts)

    # What is wrong on purpose

    def _judge_ping(self, now: float) -> None:
        if self._server.wants_calm and not self._server.audits:
            if self._last_ping is not None and now - self._last_ping < CALM_INTERVAL:
                self._strikes += 1
            self._last_ping = now
            if self._strikes == CALM_STRIKES and self._last_stream is None:
                tell("punished", port=self.port)
                self._go_away(max(self._queries), ENHANCE_YOUR_CALM, b"too_many_pings")
                if self._server.closes:
                    self.transport.close()

    def go_away_in_the_middle(self) -> None:
        """Half of the streams in flight are answered, the other half was never looked at."""
        streams = sorted(self._tasks)
        if not streams or self._last_stream is not None:
            return
        last = streams[(len(streams) - 1) // 2]
        for stream in streams:
            if stream > last:
                self._tasks[stream].cancel()
                tell("refused", id=int(self._queries[stream]["id"]))
        self._go_away(last, 0, b"")

    def _go_away(self, last: int, code: int, debug: bytes) -> None:
        self._last_stream = last
        self.flush()
        self._tls.write(GoAwayFrame(0, last, code, debug).serialize())
        self.flush()

    # Answering

    async def _answer(self, stream: int) -> None:
        query = self._queries[stream]
        size = int(query.get("size", 0))
        due = time.monotonic() + float(query.get("wait", 0))
        # Upon which this process may be stopped.
        tell("taken", id=int(query["id"]))
        if self._paths[stream] == "/answer":
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await self._head(stream, size)
            await self._send(stream, size)
        else:
            await self._head(stream, size)
            piece = int(query["piece"])
            for start in range(0, size, piece):
                await asyncio.sleep(float(query["interval"]))
                await self._send(stream, min(piece, size - start))
                self._tell_request("streamed", stream, bytes=start + piece)
        await self._speak()
        self._h2.end_stream(stream)
        self.flush()

    async def _speak(self) -> None:
        """Return if streams may speak, else never."""
        if self.mute:
            await asyncio.Event().wait()

    async def _head(self, stream: int, size: int) -> None:
        await self._speak()
        self._h2.send_headers(stream, [(":status", "200"), ("content-length", str(size))])
        self.flush()

    async def _send(self, stream: int, size: int) -> None:
        while size:
            await self._speak()
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size, size)
            if room <= 0:
                self._changed.clear()
                await self._changed.wait()
                continue
            self._h2.send_data(stream, b"x" * room)
            self.flush()
            size -= room

    def _done(self, stream: int) -> None:
        del self._tasks[stream]
        # After GOAWAY the last one closes the door.
        if self._last_stream is not None and not self._tasks and not self._server.audits:
            self.transport.close()


async def serve(cert: Path, window: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert)
    context.set_alpn_protocols(["h2"])
    server = Server(context, window)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Connection(server), "127.0.0.1", 0)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    beats = asyncio.create_task(heartbeat(lambda by: tell("late", by=by)))
    tell("listening", port=listener.sockets[0].getsockname()[1])
    while line := await reader.readline():
        server.obey(json.loads(line))
    beats.cancel()
    # Without farewells.
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.behaviour.server")
    parser.add_argument("--cert", type=Path, required=True, help="certificate and key in one PEM file")
    parser.add_argument("--window", type=int, default=0, help="bytes of upload granted at once; default: HTTP/2's")
    options = parser.parse_args()
    asyncio.run(serve(options.cert, options.window))


if __name__ == "__main__":
    main()
