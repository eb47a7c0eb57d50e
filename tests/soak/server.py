"""The other end of a soak: a server that keeps accounts, does whatever servers do, and sits behind a bad line.

    python -m soak.server SEED

speaks JSON by lines: what it says first is where to find it; then it answers each line of its standard input, and it
ends with that. `storm 1` begins the worst weather, `calm` ends it and gives up every line that is blocked, `report`
tells what was seen, and a request's name what became of it.

A request names itself (`x-id`), says how many bytes it wants (`x-want`) and how many it brings (`x-bring`); these are
`pattern`s of its name, so both ends can tell whether they came whole. `x-patient: 1` says that it has no timeouts, so
the server must bring it to an end. The ledger has what happened to every attempt of each: none may follow on one that
may have been processed (K24).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import ssl
import sys
import traceback
from typing import TYPE_CHECKING, Any

import anyio
import trustme
from hyperframe import frame as frames

from soak.line import BadLine
from support.raw import GONE, Peer, RawRequest, RawServer, task_group

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Ledger", "pattern"]

_KNOWN = frames.SettingsFrame
_DEFAULT_WINDOW = 65_535
#: What the calm's settings are.
CALM_STREAMS = 8
#: How long requests wait for each other that are to meet, in seconds.
_PATIENCE = 10.0
#: How long a client may take to begin, in seconds.
_HANDSHAKE = 3.0


def pattern(name: str, size: int) -> bytes:
    """Bytes that both ends can make of a request's name."""
    return hashlib.shake_128(name.encode()).digest(size)


class Ledger:
    """What became of every attempt of each request, and what was wrong with that."""

    def __init__(self) -> None:
        self.attempts: dict[str, list[str]] = {}
        self.processed = 0
        self.moved = 0
        self.violations: list[str] = []

    def begin(self, name: str, *, above: bool) -> int:
        """Another attempt of this request; its number. It may be one that the client knows already to be in vain."""
        attempts = self.attempts.setdefault(name, [])
        if not above and not all(fate in ("refused", "above") for fate in attempts):
            self.violations.append(f"request {name} was sent again after {attempts}")
        self.moved += bool(attempts)
        attempts.append("above" if above else "seen")
        return len(attempts) - 1

    def process(self, name: str, attempt: int) -> None:
        """It is being processed."""
        self.attempts[name][attempt] = "processed"
        self.processed += 1

    def note(self, name: str, attempt: int, fate: str) -> None:
        """The peer is told that it was not."""
        self.attempts[name][attempt] = fate

    def wrong(self, text: str) -> None:
        """The client did what it must not."""
        self.violations.append(text)


class Judge(Peer):
    """A peer that knows what a client may do, and has it written down where it does more."""

    ledger: Ledger

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.attempts: dict[int, tuple[str, int]] = {}
        #: Streams whose requests have begun to be processed, and those that were refused or lie above a GOAWAY.
        self.begun: set[int] = set()
        self.declined: set[int] = set()
        #: Streams that this end has closed, or reset.
        self.finished: set[int] = set()
        self.last_allowed = 2**31 - 1
        self._promised: list[dict[int, int]] = []
        self._limit: float = float("inf")
        self._initial = _DEFAULT_WINDOW
        self._credit: dict[int, int] = {}
        self._connection_credit = _DEFAULT_WINDOW
        self._open: set[int] = set()
        self._highest = 0

    async def _read_in_background(self) -> None:
        try:
            await super()._read_in_background()
        except Exception:  # noqa: BLE001
            self.ledger.wrong(f"the server couldn't read what the client sent: {traceback.format_exc()}")

    async def change(self, settings: dict[int, int]) -> None:
        """SETTINGS, which are in force as soon as the client has acknowledged them."""
        self._promised.append(settings)
        await self.send(self.settings_frame(settings))

    async def send(self, *sent: frames.Frame) -> None:
        """Peer."""
        for frame in sent:
            reset = isinstance(frame, frames.RstStreamFrame)
            if reset or "END_STREAM" in frame.flags:
                self.finished.add(frame.stream_id)
                if reset or self.requests[frame.stream_id].ended:
                    self._open.discard(frame.stream_id)
        await super().send(*sent)

    def _take(self, frame: frames.Frame) -> None:
        if isinstance(frame, frames.SettingsFrame) and "ACK" in frame.flags:
            self._settings_are_in_force()
        elif isinstance(frame, frames.HeadersFrame) and frame.stream_id not in self.requests:
            self._take_new(frame.stream_id)
        elif isinstance(frame, frames.DataFrame):
            self._take_charge(frame)
        elif isinstance(frame, frames.RstStreamFrame):
            request = self.requests.get(frame.stream_id)
            if request is None or request.reset is not None:
                self.ledger.wrong(
                    f"stream {frame.stream_id} was reset {'twice' if request else 'before its beginning'}"
                )
            self._open.discard(frame.stream_id)
        super()._take(frame)
        request = self.requests.get(frame.stream_id)
        if request is not None and request.ended and frame.stream_id in self.finished:
            self._open.discard(frame.stream_id)
        if len(self.frames) > 1_000:
            # Nobody looks at them any more, and a soak is long.
            self.frames.clear()
            self._next_frame = 0

    def _settings_are_in_force(self) -> None:
        settings = self._promised.pop(0)
        self._limit = settings.get(_KNOWN.MAX_CONCURRENT_STREAMS, self._limit)
        initial = settings.get(_KNOWN.INITIAL_WINDOW_SIZE, self._initial)
        for stream_id in self._credit:
            self._credit[stream_id] += initial - self._initial
        self._initial = initial
        if _KNOWN.HEADER_TABLE_SIZE in settings:
            self._decoder.max_allowed_table_size = settings[_KNOWN.HEADER_TABLE_SIZE]

    def _take_new(self, stream_id: int) -> None:
        if stream_id <= self._highest or not stream_id % 2:
            self.ledger.wrong(f"stream {stream_id} was opened after {self._highest}")
        self._highest = stream_id
        self._open.add(stream_id)
        if len(self._open) > self._limit:
            self.ledger.wrong(f"{len(self._open)} streams are open, {self._limit} allowed")
        self._credit[stream_id] = self._initial

    def _take_charge(self, frame: frames.DataFrame) -> None:
        request = self.requests.get(frame.stream_id)
        if request is None or request.ended or request.reset is not None:
            self.ledger.wrong(f"DATA on stream {frame.stream_id}, {request}")
            return
        size = frame.flow_controlled_length
        self._credit[frame.stream_id] -= size
        self._connection_credit -= size
        if size and (self._credit[frame.stream_id] < 0 or self._connection_credit < 0):
            self.ledger.wrong(f"windows: {self._credit[frame.stream_id]}, {self._connection_credit} after {size} bytes")

    def _reply(self, *replies: frames.Frame) -> None:
        for frame in replies:
            if isinstance(frame, frames.WindowUpdateFrame):
                self.grant(frame.stream_id, frame.window_increment)
        super()._reply(*replies)

    def grant(self, stream_id: int, size: int) -> None:
        """The client has got so much more credit."""
        if stream_id:
            self._credit[stream_id] += size
        else:
            self._connection_credit += size

    @property
    def window(self) -> int:
        """What this end may send."""
        return self._window


class Meeting:
    """Requests that are answered when all are here."""

    def __init__(self) -> None:
        self.present = 0
        self.complete = anyio.Event()


class Server:
    """Peers, their weather, and what they answer."""

    def __init__(self, seed: int, ledger: Ledger) -> None:
        self._random = random.Random(seed)
        self._ledger = ledger
        self.stormy = False
        #: 1 for many faults a second.
        self.violence = 0.0
        self.peers: set[Judge] = set()
        self._meetings: dict[str, Meeting] = {}

    async def serve(self, server: RawServer) -> None:
        """Accept for ever."""
        async with task_group() as tasks:
            while True:
                peer = await server.accept()
                assert isinstance(peer, Judge)
                peer.ledger = self._ledger
                tasks.start_soon(self._handle, server, peer)

    async def _handle(self, server: RawServer, peer: Judge) -> None:
        try:
            settings = self._settings() if self.stormy else {_KNOWN.MAX_CONCURRENT_STREAMS: CALM_STREAMS}
            settings.pop(_KNOWN.HEADER_TABLE_SIZE, None)
            # Of what the handshake's own SETTINGS say the peer hears by their ACK, too.
            peer._promised.append(settings)
            try:
                # What was garbled may be waited for by both ends.
                with anyio.fail_after(_HANDSHAKE):
                    await peer.handshake(settings)
            except (*GONE, ssl.SSLError, OSError):
                # TimeoutError is an OSError.
                return
            except AssertionError as error:
                self._ledger.wrong(f"handshake: {error}")
                return
            self.peers.add(peer)
            async with task_group() as tasks:
                tasks.start_soon(self._weather, peer)
                while True:
                    request = await peer.request()
                    name = request.headers.get("x-id", "?")
                    above = request.stream_id > peer.last_allowed
                    peer.attempts[request.stream_id] = name, self._ledger.begin(name, above=above)
                    tasks.start_soon(self._answer_safely, peer, request)
        except* (*GONE, OSError):
            pass
        except* Exception:  # noqa: BLE001
            self._ledger.wrong(f"the server failed: {traceback.format_exc()}")
        finally:
            self.peers.discard(peer)
            peer.close()
            server.peers.remove(peer)

    # Weather

    def _settings(self) -> dict[int, int]:
        choose = self._random.choice
        settings = {}
        if choose((True, False)):
            settings[_KNOWN.MAX_CONCURRENT_STREAMS] = choose((0, 1, 1, 2, 5, 5, 20, 100, 100))
        if choose((True, False)):
            settings[_KNOWN.INITIAL_WINDOW_SIZE] = choose((0, 1, 1_000, 16_384, 65_535, 65_535, 1_000_000))
        if choose((True, False, False)):
            settings[_KNOWN.HEADER_TABLE_SIZE] = choose((0, 100, 4_096, 65_536))
        if choose((True, False, False)):
            settings[_KNOWN.MAX_FRAME_SIZE] = choose((16_384, 65_536))
        return settings

    async def _weather(self, peer: Judge) -> None:
        """What happens to a connection as such."""
        moves: list[tuple[int, Callable[[Judge], Awaitable[None]]]] = [
            (10, self._change_settings),
            (2, self._farewell_in_order),
            (2, self._farewell_at_once),
            (1, self._end_without_a_word),
            (1, self._abort),
            (4, self._ping),
            (2, self._chatter),
        ]
        weights, steps = zip(*moves, strict=True)
        settled = False
        while True:
            await anyio.sleep(self._random.expovariate(3 * self.violence) if self.stormy else 0.05)
            if not self.stormy and not settled:
                settled = True
                await self._settle(peer)
            elif self.stormy:
                settled = False
                await self._random.choices(steps, weights)[0](peer)

    async def _settle(self, peer: Judge) -> None:
        """Fair weather: whatever was withheld is granted."""
        calm = {_KNOWN.MAX_CONCURRENT_STREAMS: CALM_STREAMS, _KNOWN.INITIAL_WINDOW_SIZE: _DEFAULT_WINDOW}
        await peer.change(calm)

    async def _change_settings(self, peer: Judge) -> None:
        await peer.change(self._settings())
        await anyio.sleep(self._random.expovariate(10))
        # Nobody is to wait for ever.
        await peer.change({_KNOWN.MAX_CONCURRENT_STREAMS: 20, _KNOWN.INITIAL_WINDOW_SIZE: _DEFAULT_WINDOW})

    async def _farewell_in_order(self, peer: Judge) -> None:
        await peer.goaway(2**31 - 1)
        await anyio.sleep(self._random.expovariate(20))
        await self._say_last(peer, max(peer.requests, default=0))
        for _ in range(50):
            if not peer._open - peer.declined:
                break
            await anyio.sleep(0.02)
        peer.close()

    async def _farewell_at_once(self, peer: Judge) -> None:
        lowest = max(peer.begun, default=0)
        highest = max(peer.requests, default=0)
        await self._say_last(peer, self._random.choice((lowest, highest, (lowest + highest) // 4 * 2 + 1)))
        if self._random.random() < 0.5:
            await anyio.sleep(self._random.expovariate(10))
        peer.close()

    async def _say_last(self, peer: Judge, last: int) -> None:
        last = max(last, max(peer.begun, default=0))
        peer.last_allowed = min(peer.last_allowed, last)
        for stream_id, (name, attempt) in peer.attempts.items():
            if stream_id > peer.last_allowed and stream_id not in peer.declined:
                self._ledger.note(name, attempt, "above")
                peer.declined.add(stream_id)
        await peer.goaway(peer.last_allowed, self._random.choice((0, 0, 0, 2)), b"soak")

    async def _end_without_a_word(self, peer: Judge) -> None:
        await peer.eof(close_notify=self._random.random() < 0.5)
        await anyio.sleep(0.2)
        peer.close()

    async def _abort(self, peer: Judge) -> None:
        peer.abort()

    async def _ping(self, peer: Judge) -> None:
        await peer.send(*[frames.PingFrame(0, self._random.randbytes(8)) for _ in range(self._random.randint(1, 20))])

    async def _chatter(self, peer: Judge) -> None:
        """Frames that mean nothing, or nothing any more."""
        over = [stream_id for stream_id in peer.requests if stream_id in peer.finished]
        chatter: list[frames.Frame] = []
        for stream_id in over[-3:]:
            chatter.append(frames.WindowUpdateFrame(stream_id, 100))
            peer.grant(stream_id, 100)
            chatter.append(frames.PriorityFrame(stream_id, depends_on=0, stream_weight=3))
        peer.grant(0, 1_000)
        chatter.append(frames.WindowUpdateFrame(0, 1_000))
        await peer.send(*chatter)
        # Of a type that nobody knows.
        await peer.send_bytes(b"\0\0\1\xfa\3\0\0\0\0?")

    # Requests

    async def _answer_safely(self, peer: Judge, request: RawRequest) -> None:
        with contextlib.suppress(*GONE, OSError):
            try:
                await self._answer(peer, request)
            finally:
                request.body.clear()

    def _begin(self, peer: Judge, request: RawRequest) -> bool:
        """Process the request, unless that was declined."""
        name, attempt = peer.attempts[request.stream_id]
        if request.stream_id in peer.declined or request.stream_id > peer.last_allowed:
            if request.stream_id not in peer.declined:
                peer.declined.add(request.stream_id)
                self._ledger.note(name, attempt, "above")
            return False
        peer.begun.add(request.stream_id)
        self._ledger.process(name, attempt)
        return True

    async def _answer(self, peer: Judge, request: RawRequest) -> None:
        stream_id, chance, headers = request.stream_id, self._random.random, request.headers
        if (
            self.stormy
            and chance() < 0.05 * self.violence
            and stream_id <= peer.last_allowed
            and stream_id not in peer.declined
        ):
            await self._refuse(peer, request)
            return
        if self.stormy and chance() < 0.05 * self.violence:
            await self._answer_early(peer, request)
            return
        body = await request.complete()
        # It may have been reset meanwhile; that which is complete must be whole all the same.
        name = headers["x-id"]
        if body != pattern(name + "-up", int(headers["x-bring"])):
            self._ledger.wrong(f"request {name} brought {len(body)} bytes of {headers['x-bring']}, or others")
        if not self._begin(peer, request):
            return
        if self.stormy and chance() < 0.03 * self.violence and "x-patient" not in headers:
            # It is never answered.
            return
        digest = hashlib.sha256(body).hexdigest()
        if "x-meet" in headers:
            meeting, _, count = headers["x-meet"].partition(" ")
            if not await self._meet(meeting, int(count)):
                digest = "alone"
        await self._respond(peer, request, digest)

    async def _refuse(self, peer: Judge, request: RawRequest) -> None:
        name, attempt = peer.attempts[request.stream_id]
        self._ledger.note(name, attempt, "refused")
        peer.declined.add(request.stream_id)
        await peer.rst(request.stream_id, 7)

    async def _answer_early(self, peer: Judge, request: RawRequest) -> None:
        """A response before the request's end, and perhaps word that no more of it is wanted."""
        if not self._begin(peer, request):
            return
        await self._respond(peer, request, "early")
        if not request.ended and request.reset is None and self._random.random() < 0.7:
            await peer.rst(request.stream_id, 0)
        elif not request.ended:
            await request.complete()

    async def _meet(self, name: str, count: int) -> bool:
        """Wait until so many requests are here at once; whether they came."""
        meeting = self._meetings.setdefault(name, Meeting())
        meeting.present += 1
        if meeting.present >= count:
            meeting.complete.set()
        with anyio.move_on_after(_PATIENCE):
            await meeting.complete.wait()
        return meeting.complete.is_set()

    async def _respond(self, peer: Judge, request: RawRequest, digest: str) -> None:
        stream_id, headers, chance = request.stream_id, request.headers, self._random.random
        name, size = headers["x-id"], int(headers["x-want"])
        body = b"" if request.method == "HEAD" else pattern(name, size)
        fields = [("x-id", name), ("x-digest", digest)]
        if chance() < 0.5:
            fields.append(("content-length", str(size)))
        if chance() < 0.3:
            fields.append((f"x-{self._random.randrange(50)}", "v" * self._random.randrange(200)))
        if not self.stormy:
            await self._send_whole(peer, request, fields, body)
            return
        if chance() < 0.1:
            for _ in range(self._random.randint(1, 3)):
                await peer.send(peer.headers_frame(stream_id, self._random.choice((100, 103)), [("link", "</>")]))
        kind = chance()
        if peer._is_reset(stream_id):
            return
        if kind < 0.1 * self.violence:
            await self._send_broken(peer, request, fields, body)
        elif kind < 0.5:
            await self._send_in_pieces(peer, request, fields, body)
        else:
            await self._send_whole(peer, request, fields, body)

    async def _send_whole(self, peer: Judge, request: RawRequest, fields: list[tuple[str, str]], body: bytes) -> None:
        await peer.respond(request.stream_id, 200, fields, body)

    async def _send_broken(self, peer: Judge, request: RawRequest, fields: list[tuple[str, str]], body: bytes) -> None:
        """Part of a response, then RST_STREAM."""
        stream_id = request.stream_id
        codes = [0, 1, 2, 8, 11]
        if self._random.random() < 0.7:
            part = body[: self._random.randrange(len(body) + 1)]
            await peer.respond(stream_id, 200, fields, part, end_stream=False)
            # After a response's beginning REFUSED_STREAM is no promise any more (K24).
            codes.append(7)
        await peer.rst(stream_id, self._random.choice(codes))

    async def _send_in_pieces(
        self, peer: Judge, request: RawRequest, fields: list[tuple[str, str]], body: bytes
    ) -> None:
        """A head that is cut to CONTINUATIONs, DATA with padding, empty DATA, pauses, trailers."""
        stream_id, chance = request.stream_id, self._random.random
        await peer.send(*self._cut(peer.headers_frame(stream_id, 200, [*fields, ("x-large", "y" * 3_000)])))
        start = 0
        pauses = self._random.randint(0, 5)
        while start < len(body) and not peer._is_reset(stream_id):
            size = self._random.choice((1, 100, 5_000, 16_000, 200_000, 1_000_000))
            piece = body[start : start + size]
            if len(piece) <= 5_000 and peer._room(stream_id) >= len(piece) + 256 and chance() < 0.5:
                await self._send_padded(peer, stream_id, piece)
            else:
                await peer.send_data(stream_id, piece)
            start += len(piece)
            if pauses and chance() < 0.3:
                pauses -= 1
                await anyio.sleep(self._random.expovariate(10))
        if peer._is_reset(stream_id):
            return
        if chance() < 0.3:
            await peer.send(peer.headers_frame(stream_id, None, [("x-trailer", "t")], end_stream=True))
        else:
            await peer.send(frames.DataFrame(stream_id, b""), frames.DataFrame(stream_id, b"", flags=["END_STREAM"]))

    async def _send_padded(self, peer: Judge, stream_id: int, piece: bytes) -> None:
        padding = self._random.randrange(255)
        frame = frames.DataFrame(stream_id, piece, pad_length=padding, flags=["PADDED"])
        size = len(piece) + padding + 1
        peer._window -= size
        peer._stream_windows[stream_id] -= size
        await peer.send(frame)

    def _cut(self, head: frames.HeadersFrame) -> list[frames.Frame]:
        block, first = head.data, self._random.randrange(len(head.data))
        head.flags.discard("END_HEADERS")
        head.data = block[:first]
        second = self._random.randrange(first, len(block))
        middle = frames.ContinuationFrame(head.stream_id, block[first:second])
        return [head, middle, frames.ContinuationFrame(head.stream_id, block[second:], flags=["END_HEADERS"])]


async def _main(seed: int) -> None:
    ledger = Ledger()
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["h2"])
    server = Server(seed, ledger)
    RawServer.kind = Judge
    async with contextlib.AsyncExitStack() as stack:
        addresses: dict[str, str] = {}
        lines = []
        tasks = await stack.enter_async_context(task_group())
        for scheme, security in (("https", context), ("http", None)):
            listening = await stack.enter_async_context(RawServer.listen(security))
            line = BadLine(listening.port, seed, garbles=security is not None)
            lines.append(line)
            tasks.start_soon(server.serve, listening)
            tasks.start_soon(line.carry)
            addresses[scheme] = f"{scheme}://127.0.0.1:{line.port}"
        print(json.dumps({**addresses, "ca": authority.cert_pem.bytes().decode()}), flush=True)  # noqa: T201
        orders = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
        while order := (await orders.readline()).decode().strip():
            answer: Any = True
            word, _, violence = order.partition(" ")
            if word in ("storm", "calm"):
                server.stormy = word == "storm"
                server.violence = float(violence or 0)
                for line in lines:
                    line.set_weather(server.violence)
            elif order != "report":
                answer = ledger.attempts.get(order)
            else:
                answer = {
                    "violations": ledger.violations,
                    "requests": len(ledger.attempts),
                    "processed": ledger.processed,
                    "moved": ledger.moved,
                    "windows": [peer.window for peer in server.peers],
                    "open": [repr(peer.requests[stream_id]) for peer in server.peers for stream_id in peer._open],
                    "connections": len(server.peers),
                    "faults": [line.faults for line in lines],
                }
            print(json.dumps(answer), flush=True)  # noqa: T201
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(_main, int(sys.argv[1]))
