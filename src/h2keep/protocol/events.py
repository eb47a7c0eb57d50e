"""What a connection has to tell its runner: plain facts, in the past tense.

Frozen and slotted; those about a stream, of which each request has several, and those about PINGs are named tuples,
which take a third of the time to make. An event never holds a socket, a task or a stream object. Body bytes are not in
events: they wait in the connection until `Connection.read` takes them, so that a slow reader costs one buffer and not a
queue of objects (K23).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from h2keep.errors import H2KeepError
    from h2keep.keepalive import PingPurpose

__all__ = [
    "BodyRoom",
    "ConnectionClosed",
    "ConnectionEvent",
    "ConnectionReady",
    "DataReceived",
    "Event",
    "GoAwayReceived",
    "Headers",
    "InformationalReceived",
    "PingAcknowledged",
    "PingSent",
    "ResponseReceived",
    "SettingsChanged",
    "StreamEnded",
    "StreamFailed",
]

#: Header fields in order, names in lower case, both as they stand on the wire.
Headers: TypeAlias = list[tuple[bytes, bytes]]


class InformationalReceived(NamedTuple):
    """An interim response (1xx) came; the final one is still to come."""

    stream_id: int
    status: int
    headers: Headers


class ResponseReceived(NamedTuple):
    """The response's head came."""

    stream_id: int
    status: int
    headers: Headers


class DataReceived(NamedTuple):
    """Body bytes wait to be read where none waited before; more may have joined them since."""

    stream_id: int


class StreamEnded(NamedTuple):
    """The response is complete: nothing further comes on this stream."""

    stream_id: int
    #: The trailer fields, empty if there were none.
    trailers: Headers


class StreamFailed(NamedTuple):
    """The request on this stream failed; bytes that came before can still be read."""

    stream_id: int
    error: H2KeepError


class BodyRoom(NamedTuple):
    """What was queued of the request's body is nearly handed over: the next chunk is welcome."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class SettingsChanged:
    """`Connection.free_slots` may have changed: the peer's SETTINGS came, or life gave up the slots that K10 held."""


@dataclass(frozen=True, slots=True)
class ConnectionReady:
    """The peer's first SETTINGS came: the connection speaks HTTP/2."""

    at: float


class PingSent(NamedTuple):
    """A PING was queued ahead of everything else."""

    purpose: PingPurpose
    at: float


class PingAcknowledged(NamedTuple):
    """The ACK of our last PING came."""

    #: Seconds from queueing the PING to reading its ACK.
    rtt: float
    at: float


@dataclass(frozen=True, slots=True)
class GoAwayReceived:
    """The peer takes no new streams; those up to `last_stream_id` go on."""

    last_stream_id: int
    error_code: int
    debug_data: bytes
    #: True if this is the peer's punishment for our PINGs (K13).
    too_many_pings: bool
    at: float


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """The connection is over; all its streams have ended or failed."""

    #: Why, None if it was closed in good order.
    error: H2KeepError | None
    at: float


#: Events about the whole connection: those an event hook sees (K20).
ConnectionEvent: TypeAlias = ConnectionReady | PingSent | PingAcknowledged | GoAwayReceived | ConnectionClosed

Event: TypeAlias = (
    InformationalReceived
    | ResponseReceived
    | DataReceived
    | StreamEnded
    | StreamFailed
    | BodyRoom
    | SettingsChanged
    | ConnectionEvent
)
