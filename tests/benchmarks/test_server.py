"""The benchmarks' server: what clients are measured against must speak HTTP/2 as it should be spoken."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import socket
import ssl
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx2
import pytest
from benchmarks.measure import Setting
from benchmarks.plan import CASES
from benchmarks.server import Demands, Kit, Placement, Server, prepare, serve
from benchmarks.workloads import aside
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.settings import SettingCodes, Settings
from hpack import Encoder
from hyperframe.frame import ContinuationFrame, DataFrame, Frame, HeadersFrame, WindowUpdateFrame

import h2keep

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

pytestmark = pytest.mark.timeout(300)

ANYWHERE = Placement(None, None)
MIB = 1 << 20
E = TypeVar("E", bound=Event)


@pytest.fixture(scope="module")
def kit() -> Iterator[Kit]:
    with prepare() as made:
        yield made


@pytest.fixture(scope="module")
def server(kit: Kit) -> Iterator[Server]:
    with serve(kit, ANYWHERE, Demands(streams=20)) as running:
        yield running


class Peer:
    """A connection that says and sees each frame; h2 raises if the server breaks the protocol or fills a window."""

    def __init__(self, server: Server, settings: dict[SettingCodes, int] | None = None) -> None:
        host, _, port = server.url.removeprefix("https://").partition(":")
        context = ssl.create_default_context(cafile=str(server.ca))
        context.set_alpn_protocols(["h2"])
        self._socket = context.wrap_socket(socket.create_connection((host, int(port)), 20), server_hostname=host)
        self.connection = H2Connection(H2Configuration(header_encoding=None))
        values = {SettingCodes.ENABLE_PUSH: 0, **(settings or {})}
        self.connection.local_settings = Settings(client=True, initial_values=values)
        self.connection.initiate_connection()
        self._seen: list[Event] = []
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def flush(self) -> None:
        self._socket.sendall(self.connection.data_to_send())

    def ask(self, path: str, method: str = "GET", body: bytes = b"") -> int:
        stream = self.connection.get_next_available_stream_id()
        fields = [(":method", method), (":scheme", "https"), (":authority", "localhost"), (":path", path)]
        self.connection.send_headers(stream, fields, end_stream=not body)
        if body:
            self.connection.send_data(stream, body, end_stream=True)
        self.flush()
        return stream

    def frames(self, *frames: Frame) -> None:
        """Send what h2 wouldn't."""
        self._socket.sendall(b"".join(frame.serialize() for frame in frames))

    def read(self) -> list[Event]:
        """What one TLS record brings."""
        data = self._socket.recv(1 << 16)
        events = self.connection.receive_data(data) if data else []
        self.flush()
        if not data and not self._seen:
            raise ConnectionError("the server closed the connection")
        return events

    def wait(self, kind: type[E], stream: int | None = None) -> E:
        """The next event of a kind, and of a stream; those before it are `data`'s, or lost."""
        while True:
            while self._seen:
                event = self._seen.pop(0)
                if isinstance(event, kind) and stream in (None, getattr(event, "stream_id", None)):
                    return event
            self._seen = self.read()

    def body(self, stream: int) -> bytes:
        """All of a response's body; windows are kept open."""
        received = b""
        while not isinstance(event := self.wait(Event, stream), StreamEnded):
            if isinstance(event, DataReceived):
                received += event.data
                self.connection.acknowledge_received_data(event.flow_controlled_length, stream)
                self.flush()
        return received

    def ping(self) -> list[Event]:
        """All that came before a PING was answered."""
        self.connection.ping(b"01234567")
        self.flush()
        events: list[Event] = []
        while not any(isinstance(event, PingAckReceived) for event in events):
            events += self.read()
        return events


def received(events: list[Event]) -> int:
    return sum(len(event.data) for event in events if isinstance(event, DataReceived))


# Endpoints


@pytest.mark.parametrize("name", ["h2keep", "httpx2"])
def test_endpoints(name: str, server: Server) -> None:
    context, url = ssl.create_default_context(cafile=str(server.ca)), server.url
    made: Any = h2keep.Client(verify=context) if name == "h2keep" else httpx2.Client(http2=True, verify=context)
    with made as client:
        answer = client.post(f"{url}/answer?size=500&wait=0.01s", content=b"{}")
        assert (answer.http_version, answer.status_code, len(answer.content)) == ("HTTP/2", 200, 500)
        assert answer.headers["content-type"] == "application/json"
        assert set(json.loads(answer.content)["text"]) == {"x"}
        # More than any window.
        assert client.post(f"{url}/sink", content=bytes(3 * MIB + 1)).text == str(3 * MIB + 1)
        assert len(client.get(f"{url}/bytes?size={3 * MIB + 1}").content) == 3 * MIB + 1
        events = client.get(f"{url}/events?count=50").text
        assert re.findall(r'data: {"i":(\d+),', events) == [str(i) for i in range(50)]
        assert client.get(f"{url}/nothing").status_code == 404


def test_what_net_http_announces_and_answers(server: Server) -> None:
    with Peer(server) as peer:
        changes = peer.wait(RemoteSettingsChanged).changed_settings
        changed = {int(code): change.new_value for code, change in changes.items()}
        assert changed == {1: 4096, 3: 20, 4: MIB, 5: MIB, 6: MIB + 320, 9: 1}
        assert peer.wait(WindowUpdated).delta == MIB - 65_535
        for stream in (peer.ask("/answer?size=100", "POST", b"{}"), peer.ask("/answer?size=100", "POST", b"{}")):
            headers = peer.wait(ResponseReceived, stream).headers
            assert [name for name, _ in headers] == [b":status", b"content-type", b"content-length", b"date"]


def test_http_1_where_it_is_wanted(kit: Kit, server: Server) -> None:
    with serve(kit, ANYWHERE, Demands(http1=True)) as other:
        for each, status in ((server, 505), (other, 200)):
            address = each.url.removeprefix("https://")
            context = ssl.create_default_context(cafile=str(each.ca))
            connection = http.client.HTTPSConnection(address, context=context, timeout=20)
            connection.request("GET", "/events?count=3")
            response = connection.getresponse()
            assert response.status == status
            assert response.read().count(b"data:") == (3 if status == 200 else 0)
            connection.close()


def test_connections_are_counted_and_closed(kit: Kit) -> None:
    with serve(kit, ANYWHERE, Demands(listeners=3)) as each, Peer(each) as one, Peer(each) as other:
        one.ping()
        other.body(other.ask("/answer", "POST", b"{}"))
        told = json.loads(aside(each.stats, "GET", "/stats"))
        assert (told["connections"], told["requests"]) == (2, 1)
        assert len(json.loads(aside(each.stats, "GET", "/addresses"))) == 3
        aside(each.stats, "POST", "/close")
        for peer in (one, other):
            # TLS is ended as it should be, or this would raise.
            with pytest.raises(ConnectionError, match="closed"):
                peer.wait(StreamEnded)


# Flow control


def test_a_tiny_window_is_never_overrun(server: Server) -> None:
    with Peer(server, {SettingCodes.INITIAL_WINDOW_SIZE: 7}) as peer:
        stream = peer.ask("/bytes?size=100")
        got = received(peer.ping())
        while got < 100:
            assert got % 7 == 0
            peer.connection.increment_flow_control_window(7, stream)
            got += received(peer.ping())
        assert got == 100


def test_the_connection_window_stops_all_and_lets_all_go_on(server: Server) -> None:
    with Peer(server, {SettingCodes.INITIAL_WINDOW_SIZE: MIB}) as peer:
        streams = [peer.ask("/bytes?size=100000") for _ in range(3)]
        got = received(peer.ping())
        while got < 65_535:
            got += received(peer.read())
        assert received(peer.ping()) == 0
        peer.connection.increment_flow_control_window(MIB)
        peer.flush()
        events: list[Event] = []
        while sum(isinstance(event, StreamEnded) for event in events) < len(streams):
            events += peer.read()
        assert got + received(events) == 300_000


def test_settings_change_the_windows_of_streams_that_are_open(server: Server) -> None:
    with Peer(server, {SettingCodes.INITIAL_WINDOW_SIZE: 1_000}) as peer:
        stream = peer.ask("/bytes?size=1500")
        assert received(peer.ping()) == 1_000
        # By 900 less than nothing, which these 900 only make good.
        peer.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 100})
        peer.connection.increment_flow_control_window(900, stream)
        assert received(peer.ping()) == 0
        peer.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 600})
        assert received(peer.ping()) == 500


@pytest.mark.parametrize("most", [16_384, 40_000])
def test_frames_are_as_long_as_the_client_lets_them_be(most: int, server: Server) -> None:
    with Peer(server, {SettingCodes.INITIAL_WINDOW_SIZE: MIB}) as peer:
        peer.connection.update_settings({SettingCodes.MAX_FRAME_SIZE: most})
        peer.connection.increment_flow_control_window(MIB)
        peer.ping()  # until SETTINGS are acknowledged
        stream = peer.ask("/bytes?size=100000")
        assert len(peer.wait(DataReceived, stream).data) == most


def test_no_table_for_headers(server: Server) -> None:
    with Peer(server, {SettingCodes.HEADER_TABLE_SIZE: 0}) as peer:
        for _ in range(2):
            stream = peer.ask("/sink", "POST", b"12345")
            assert peer.body(stream) == b"5"


# Streams


def test_a_request_that_waits_holds_up_no_other(server: Server) -> None:
    with Peer(server) as peer:
        late, soon = peer.ask("/answer?wait=0.2s", "POST", b"{}"), peer.ask("/answer", "POST", b"{}")
        assert peer.wait(StreamEnded).stream_id == soon
        assert peer.wait(StreamEnded).stream_id == late


def test_streams_beyond_the_limit_are_refused(server: Server) -> None:
    with Peer(server) as peer:
        # h2 keeps to the limit as soon as it knows it.
        streams = [peer.ask("/answer?wait=0.2s", "POST", b"{}") for _ in range(22)]
        refused = {(reset := peer.wait(StreamReset)).stream_id: reset.error_code for _ in range(2)}
        assert refused == dict.fromkeys(streams[20:], 7)
        for _ in range(20):
            assert peer.wait(StreamEnded).stream_id in streams
        assert len(peer.body(peer.ask("/answer", "POST", b"{}"))) == 500


def test_a_small_answer_is_not_behind_a_large_one(server: Server) -> None:
    with Peer(server, {SettingCodes.INITIAL_WINDOW_SIZE: 1 << 30}) as peer:
        peer.connection.increment_flow_control_window(1 << 30)
        large, small = peer.ask(f"/bytes?size={64 * MIB}"), peer.ask("/answer", "POST", b"{}")
        assert peer.wait(StreamEnded).stream_id == small
        assert peer.wait(StreamEnded).stream_id == large


def test_what_the_client_gives_up_is_not_sent(server: Server) -> None:
    with Peer(server, {SettingCodes.INITIAL_WINDOW_SIZE: 10}) as peer:
        given_up = [
            peer.ask("/bytes?size=100"),
            peer.ask("/answer?wait=0.01s", "POST", b"{}"),
            peer.ask("/events?interval=0.01s"),
        ]
        for stream in given_up:
            peer.connection.reset_stream(stream, 8)
        stream = peer.ask("/answer?size=20&wait=0.05s", "POST", b"{}")
        peer.wait(ResponseReceived, stream)
        assert peer.wait(DataReceived).stream_id == stream


def test_each_event_is_a_frame_and_a_record_of_its_own(server: Server) -> None:
    with Peer(server) as peer:
        peer.ping()
        stream = peer.ask("/events?count=100")
        assert [type(event) for event in peer.read()] == [ResponseReceived]
        for i in range(100):
            (event,) = peer.read()
            assert isinstance(event, DataReceived)
            assert event.data.startswith(b'data: {"i":%d,' % i)
        assert isinstance(peer.wait(StreamEnded), StreamEnded)
        assert stream not in peer.connection.streams or peer.connection.streams[stream].closed


def test_events_with_pauses_are_sent_when_they_are_made(server: Server) -> None:
    with Peer(server) as peer:
        body = peer.body(peer.ask("/events?count=5&interval=0.02s"))
        sent = [int(ns) for ns in re.findall(rb'"ns":(\d+)', body)]
        assert len(sent) == 5
        assert all(after - before >= 20_000_000 for before, after in itertools.pairwise(sent))


# What few clients do


def test_padding_priority_continuation_and_trailers(server: Server) -> None:
    encoder = Encoder()
    block = encoder.encode([(":method", "POST"), (":scheme", "https"), (":path", "/sink"), ("x-long", "y" * 3000)])
    first = HeadersFrame(1, block[:100], flags=["PADDED", "PRIORITY"], pad_length=20, stream_weight=7)
    padded = DataFrame(1, bytes(1234), flags=["PADDED"], pad_length=255)
    trailers = HeadersFrame(1, encoder.encode([("x-end", "1")]), flags=["END_HEADERS", "END_STREAM"])
    with Peer(server) as peer:
        # h2 has to know the stream.
        peer.connection.send_headers(
            1, [(":method", "POST"), (":scheme", "https"), (":path", "/sink"), (":authority", "a")]
        )
        peer.connection.end_stream(1)
        peer.connection.data_to_send()
        rest = [ContinuationFrame(1, block[100:200]), ContinuationFrame(1, block[200:], flags=["END_HEADERS"])]
        peer.frames(first, *rest, padded, DataFrame(1, flags=["PADDED"]), trailers)
        assert peer.body(1) == b"1234"


WRONG = {
    "a window that grows by nothing": (WindowUpdateFrame(0, window_increment=0), 1),
    "a window that is too large": (WindowUpdateFrame(0, window_increment=(1 << 31) - 1), 3),
    "data where no stream is": (DataFrame(5, b"?"), 1),
    "fields that are none": (HeadersFrame(1, b"\xff\xff\xff", flags=["END_HEADERS", "END_STREAM"]), 9),
    "an even stream": (HeadersFrame(2, b"\x82\x87\x84", flags=["END_HEADERS", "END_STREAM"]), 1),
    "more padding than frame": (DataFrame(1, b"\xff", flags=["PADDED"]), 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_client_that_breaks_the_protocol_is_told_so(what: str, server: Server) -> None:
    frame, code = WRONG[what]
    with Peer(server) as peer:
        peer.frames(frame)
        assert peer.wait(ConnectionTerminated).error_code == code


def test_the_floor_of_uploads(kit: Kit) -> None:
    case = next(case for case in CASES if case.name == "upload")
    metrics = Setting(kit, ANYWHERE, quick=True).measure(case, "raw-tls")
    assert not isinstance(metrics, str)
    assert metrics["units"] == case.quick["mib"]
