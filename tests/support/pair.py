"""A virtual wire: h2keep's `Connection` at one end, h2 as the server at the other, and time that jumps.

`Pair` moves bytes between the two with a latency, and jumps to whatever is due next. It fails a test by itself when a
deadline is overdue after it was handled or moves to an earlier time unannounced, when time would stand still for ever
(a livelock), or when the client breaks HTTP/2 in the server's eyes. `black_hole()` drops everything from now on, in
both directions.
"""

from __future__ import annotations

import math
import random
from collections import deque
from typing import TYPE_CHECKING

import h2.config
import h2.connection
import h2.events
import h2.settings
from hyperframe import frame as frames

from h2keep.keepalive import Keepalive
from h2keep.protocol import Connection, events
from h2keep.protocol.flow import PROCESS_GROWTH, GrowthBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
REQUEST = [(b":method", b"GET"), (b":authority", b"example.com"), (b":scheme", b"https"), (b":path", b"/")]
#: Steps after which a schedule is taken to go round in circles.
STEP_BOUND = 100_000


class Pair:
    """A client `Connection` and an h2 server; see the module's docstring."""

    def __init__(
        self,
        keepalive: Keepalive | None = None,
        *,
        latency: float = 0.01,
        seed: int = 0,
        settings: dict[h2.settings.SettingCodes, int] | None = None,
        write_limit: int = 65_536,
        chop: bool = False,
        growth: GrowthBudget | None = None,
    ) -> None:
        self.now = 0.0
        self.latency = latency
        self.random = random.Random(seed)
        self.write_limit = write_limit
        self.chop = chop
        self.client = Connection(
            keepalive if keepalive is not None else Keepalive(jitter=0.0),
            random.Random(seed),
            self.now,
            name="https://example.com",
            growth=GrowthBudget(PROCESS_GROWTH) if growth is None else growth,
        )
        self.server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        if settings:
            self.server.local_settings = h2.settings.Settings(client=False, initial_values=settings)
        self.server.initiate_connection()
        self.to_server: deque[tuple[float, bytes]] = deque()
        self.to_client: deque[tuple[float, bytes]] = deque()
        #: What the client reported, in order.
        self.events: list[events.Event] = []
        #: When the client's PINGs and the server's events came.
        self.server_events: list[h2.events.Event] = []
        self.pings: list[float] = []
        self.on_server_event: Callable[[h2.events.Event], None] = lambda event: None
        self.on_client_bytes: Callable[[bytes], None] = lambda data: None
        self.dropping = False
        #: The client's socket takes no more bytes.
        self.blocked = False
        self.server_reads = True
        self.steps = 0
        self._asleep_until = self.client.next_deadline()
        self.pump()

    # The wire

    def black_hole(self) -> None:
        """From now on every byte is lost, those under way included."""
        self.dropping = True
        self.to_server.clear()
        self.to_client.clear()

    def pump(self) -> None:
        """Put on the wire what both ends have to send."""
        while not self.blocked and self.client.has_data_to_send():
            data = self.client.data_to_send(self.write_limit, self.now)
            if not data:
                break
            self.on_client_bytes(data)
            self._send(self.to_server, data)
        self._drain_events()
        self._send(self.to_client, self.server.data_to_send())

    def _send(self, wire: deque[tuple[float, bytes]], data: bytes) -> None:
        if data and not self.dropping:
            wire.append((self.now + self.latency, data))

    def server_send_raw(self, data: bytes) -> None:
        """Bytes that h2 would never make."""
        self._send(self.to_client, self.server.data_to_send() + data)

    def _drain_events(self) -> None:
        while (event := self.client.next_event()) is not None:
            self.events.append(event)

    # Time

    def _next_wakeup(self) -> float | None:
        moments = [wire[0][0] for wire in (self.to_client, self.to_server) if wire]
        if self.to_server and not self.server_reads:
            moments.remove(self.to_server[0][0])
        deadline = self._deadline()
        if deadline is not None:
            moments.append(deadline)
        return min(moments, default=None)

    def _deadline(self) -> float | None:
        """The client's; a runner that asks for it only when it is told to would have heard of it."""
        deadline = self.client.next_deadline()
        if self.client.deadline_moved:
            self.client.deadline_moved = False
            self._asleep_until = deadline
        asleep_until = math.inf if self._asleep_until is None else self._asleep_until
        assert deadline is None or deadline >= asleep_until, f"{deadline} is earlier than {asleep_until}"
        return deadline

    def step(self, until: float | None = None) -> bool:
        """Jump to the next moment at which something is due, not beyond `until`; False if there is none."""
        self.steps += 1
        assert self.steps < STEP_BOUND, "the pair goes round in circles"
        moment = self._next_wakeup()
        if moment is None or (until is not None and moment > until):
            return False
        self.now = max(self.now, moment)
        self._deliver()
        deadline = self._deadline()
        if deadline is not None and deadline <= self.now:
            self.client.handle_timeout(self.now)
            deadline = self._asleep_until = self.client.next_deadline()
            assert deadline is None or deadline > self.now, f"deadline {deadline} is overdue at {self.now}"
        self._drain_events()
        self.pump()
        return True

    def _deliver(self) -> None:
        while self.to_client and self.to_client[0][0] <= self.now:
            self._client_receives(self.to_client.popleft()[1])
        while self.server_reads and self.to_server and self.to_server[0][0] <= self.now:
            # One by one: h2 admits frames of the size that its SETTINGS allow from the call after their ACK on.
            for frame in _frames(self.to_server.popleft()[1]):
                self._server_receives(frame)

    def _server_receives(self, data: bytes) -> None:
        for event in self.server.receive_data(data):
            self.server_events.append(event)
            if isinstance(event, h2.events.PingReceived):
                self.pings.append(self.now)
            self.on_server_event(event)

    def _client_receives(self, data: bytes) -> None:
        while data:
            size = self.random.randint(1, len(data)) if self.chop else len(data)
            self.client.note_life(self.now)
            self.client.receive_data(data[:size], self.now)
            self._drain_events()
            data = data[size:]

    def run(self, seconds: float | None = None) -> None:
        """Step until nothing is due, or for so many virtual seconds."""
        self.pump()
        until = None if seconds is None else self.now + seconds
        while self.step(until):
            pass
        if until is not None:
            self.now = max(self.now, until)

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Step until the condition holds."""
        while not condition():
            assert self.step(), "nothing is due any more, and the condition doesn't hold"

    # Shorthands

    def request(self, *, end_stream: bool = True, **options: float | None) -> int:
        """Open a request; its stream id."""
        stream_id = self.client.send_request(list(REQUEST), self.now, end_stream=end_stream, **options)  # type: ignore[arg-type]
        self.pump()
        return stream_id

    def respond(self, stream_id: int, body: bytes = b"", *, end_stream: bool = True) -> None:
        """Have the server answer 200."""
        self.server.send_headers(stream_id, [(b":status", b"200")], end_stream=end_stream and not body)
        if body:
            self.server.send_data(stream_id, body, end_stream=end_stream)
        self.pump()

    def happened(self, kind: type[events.Event]) -> list[events.Event]:
        """The client's events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def failure(self, stream_id: int) -> Exception | None:
        """What a stream failed with."""
        for event in self.events:
            if isinstance(event, events.StreamFailed) and event.stream_id == stream_id:
                return event.error
        return None


def _frames(data: bytes) -> Iterator[bytes]:
    """Whole output cut into frames, the connection's preface together with its first."""
    start, header = 0, len(_PREFACE) if data.startswith(_PREFACE) else 0
    while start < len(data):
        end = header + 9 + int.from_bytes(data[header : header + 3])
        yield data[start:end]
        start = header = end


def parse_frames(data: bytes) -> list[frames.Frame]:
    """The frames that whole output consists of, after the connection's preface if it is there."""
    data = data.removeprefix(_PREFACE)
    view, parsed = memoryview(data), []
    while view:
        frame, length = frames.Frame.parse_frame_header(view[:9])
        frame.parse_body(view[9 : 9 + length])
        parsed.append(frame)
        view = view[9 + length :]
    return parsed
