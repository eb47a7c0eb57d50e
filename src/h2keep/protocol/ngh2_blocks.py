"""Header blocks by ngh2, a binding of nghttp2: the one module that imports it, and only where it was asked for.

nghttp2 is in charge of HPACK both ways, of what makes a response's fields well-formed, and of their sequence (interim
responses, head, trailers). It sees nothing else, since it would act on it by itself, or cost more than it does: not
the frames that the blocks came in, and no stream of the connection's.

To judge blocks it must know of requests. They are exchanges of its own with numbers of its own, and each ends with its
head as far as it knows. Whatever it wants to send beside the header blocks that it was asked for is its verdict on the
block before, and doesn't leave as it is. That an exchange is over it learns from an RST_STREAM that no peer sent, in
front of the next block.

Most requests on a connection have the same fields, and so have most responses. As long as HPACK's dynamic table stands
still, equal fields make equal blocks and equal blocks make equal fields, so both directions are looked up before
nghttp2 is asked (`_changes_table` tells when that stops being true); an exchange that is like those before it never
hears of. The length of a request's body is no part of the comparison: it needs no table.

ngh2 is young: the version range is what the contract tests in tests/protocol/test_ngh2_contract.py passed on, and
another version is refused at import, not met in mid-flight.
"""

from __future__ import annotations

import operator
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import ngh2

from h2keep.protocol.engine import ErrorCode, Violation
from h2keep.protocol.framing import (
    ACK,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    LARGEST_WINDOW,
    MAX_FRAME_SIZE,
    MAX_HEADER_BLOCK,
    RST_STREAM,
    SETTINGS,
    frame,
    frame_header,
    unpack_header,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from h2keep.protocol.events import Headers

__all__ = ["FINAL", "Exchange", "HeaderBlocks", "Message"]

_LOWEST_VERSION, _FIRST_UNKNOWN_VERSION = (0, 3), (0, 4)

_SETTING = struct.Struct(">HL")
_TWO_LONGS = struct.Struct(">LL")
_RESET = struct.Struct(">HBBBLL")

# Settings (RFC 9113, section 6.5.2).
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE, _MAX_HEADER_LIST_SIZE = 1, 2, 4, 5, 6

_NO_LIMIT = 2**32 - 1
#: The most that the encoder's table may hold, in bytes, whatever the peer allows.
_LARGEST_TABLE = 4_096
_CONFIGURATION = ngh2.Configuration(
    peer_max_concurrent_streams=_NO_LIMIT,
    max_send_header_block_length=2**30,
    max_deflate_dynamic_table_size=_LARGEST_TABLE,
    # These two by the clock, and bytes that are the same must have the same outcome; K23 has bounds of its own.
    glitch_rate_limit=(2**63, 2**63),
    stream_reset_rate_limit=(2**63, 2**63),
    max_inbound_header_list_size=MAX_HEADER_BLOCK,
    # Never reached: each field counts for 32 bytes at least.
    max_inbound_header_count=MAX_HEADER_BLOCK,
)
#: What nghttp2 is told of our SETTINGS. A block is one frame to it, and windows are none of its business.
_SETTINGS_WITHIN = {
    _ENABLE_PUSH: 0,
    _INITIAL_WINDOW_SIZE: LARGEST_WINDOW,
    _MAX_FRAME_SIZE: 2**24 - 1,
    _MAX_HEADER_LIST_SIZE: MAX_HEADER_BLOCK,
}
_SECRET = b"proxy-authorization"
_name_of = operator.itemgetter(0)
#: Exchanges whose end nghttp2 isn't told yet, at most.
_MAX_UNTOLD = 256
_NOT_MODIFIED = 304
#: The least status of a final response.
FINAL = 200
#: The block of a response with the status 200 and no fields (RFC 7541, appendix A).
_OK = b"\x88"
#: What stands before a content-length's digits but their number: a literal that leaves the table as it is, its name the
#: 28th of the static table (RFC 7541, section 6.2.2).
_CONTENT_LENGTH = b"\x0f\x0d"

#: Requests, or responses, that are remembered at most, and the longest block: few differ while the table stands still.
_MOST_KNOWN = 256
_LONGEST_KNOWN = 1_024

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_STATUS_LED = ngh2.ResponseReceived, ngh2.InformationalResponseReceived
_MESSAGES = frozenset({*_STATUS_LED, ngh2.TrailersReceived})


def _check_version() -> None:
    version = ngh2.__version__
    major, minor = (int(part) for part in version.split(".")[:2])
    if not _LOWEST_VERSION <= (major, minor) < _FIRST_UNKNOWN_VERSION:
        raise ImportError(
            f"h2keep's engine 'ngh2' works with ngh2 0.3, not with {version}: pip install 'h2keep[fast]'", name="ngh2"
        )


_check_version()


class Exchange(Protocol):
    """A request and its response, as far as header blocks are concerned."""

    method: bytes
    #: A final response's head came.
    answered: bool
    #: The response body's declared length, None if there is none.
    declared: int | None
    #: What nghttp2 knows it by, 0 while it doesn't; for `HeaderBlocks` alone.
    number: int
    #: Whether nghttp2 saw that head; for `HeaderBlocks` alone.
    judged: bool


class Message(NamedTuple):
    """What a header block says."""

    #: 0 of trailers.
    status: int
    fields: Headers
    #: The length of the body that follows, unless it is the answer to HEAD; None if it may be any.
    declared: int | None


class HeaderBlocks:
    """The header blocks of one connection, both ways."""

    def __init__(self) -> None:
        #: Heads of final responses that aren't their end, by their blocks: those need no judging.
        self.responses: dict[bytes, Message] = {}
        self._requests: dict[tuple[tuple[bytes, bytes], ...], bytes] = {}
        #: Sizes of the encoder's table that the peer hasn't heard of: the smallest, the last.
        self._sizes: tuple[int, ...] = ()
        #: RST_STREAM for exchanges that are over, for nghttp2 alone.
        self._untold: list[bytes] = []
        self._session = _started()
        #: An exchange that is over, on which blocks come that nobody wants.
        self._over = self._begin(b"GET")
        self._tell_end(self._over)

    # Going out

    def request(self, exchange: Exchange, headers: Headers) -> bytes:
        """The block of a request's head."""
        name, value = headers[-1]
        if name == b"content-length":
            key = tuple(headers[:-1])
            length = _CONTENT_LENGTH + bytes((len(value),)) + value
        else:
            key, length = tuple(headers), b""
        block = self._requests.get(key)
        if block is None:
            block = self._encode(exchange, key)
        return block + length

    def _encode(self, exchange: Exchange, fields: tuple[tuple[bytes, bytes], ...]) -> bytes:
        session = self._session
        exchange.number = session.next_stream_id
        session.send_request(_hiding(fields), end_stream=True)
        block = _without_sizes(_payload(session.data_to_send()))
        if _changes_table(block):
            self._requests.clear()
        else:
            _remember(self._requests, fields, block, len(block))
        return self._take_sizes() + block

    def trailers(self, headers: Headers) -> bytes:
        """The block of a request's trailers."""
        # Never indexed, so that the table stays what nghttp2 knows (RFC 7541, section 6.2.3).
        return self._take_sizes() + b"".join([b"\x10" + _string(name) + _string(value) for name, value in headers])

    def resize(self, allowed: int) -> None:
        """The peer's SETTINGS name the size that the encoder's table may have, in bytes."""
        self._session.receive_data(frame(SETTINGS, 0, 0, _SETTING.pack(_HEADER_TABLE_SIZE, allowed)))
        self._session.data_to_send()
        self._session.events()
        self._requests.clear()
        size = min(allowed, _LARGEST_TABLE)
        smallest = min([*self._sizes, size])
        # No more than needed: Go's decoder takes no second one unless its table is empty.
        self._sizes = (size,) if smallest == size else (smallest, size)

    def _take_sizes(self) -> bytes:
        """What announces the table's sizes, if there is anything to announce (RFC 7541, sections 4.2 and 6.3)."""
        sizes, self._sizes = self._sizes, ()
        return b"".join([_prefixed(size, 5, 0x20) for size in sizes])

    # Coming in

    def judge(self, exchange: Exchange, block: bytes, end_stream: bool) -> Message | None:
        """What a block of a response says; None if it isn't well-formed. Raises `Violation`."""
        if exchange.judged and exchange.declared:
            # nghttp2 takes no trailers before the body that was declared, which it never sees. What comes after the
            # head is judged as of an exchange in which none was.
            self.end(exchange)
            exchange.judged = False
        if not exchange.number:
            exchange.number = self._begin(exchange.method)
        if exchange.answered and not exchange.judged:
            self._feed(exchange.number, _OK, end_stream=False)
            exchange.judged = True
        event = self._feed(exchange.number, block, end_stream)
        changes = self._forget_if_moved(block)
        if event is None:
            return None
        if type(event) not in _STATUS_LED:
            return Message(0, list(event.headers), None)
        # Validated: `:status` comes first and is the only pseudo-field.
        (_, code), *fields = event.headers
        message = Message(int(code), fields, _declared_length(int(code), fields))
        exchange.judged = message.status >= FINAL
        if exchange.judged and not (end_stream or changes):
            _remember(self.responses, block, message, len(block))
        return message

    def skim(self, block: bytes) -> None:
        """A block that nobody reads: the peer's encoder has moved on, and our decoder must follow.

        Raises `Violation`.
        """
        self._feed(self._over, block, end_stream=False)
        self._forget_if_moved(block)

    def end(self, exchange: Exchange) -> None:
        """The exchange is over."""
        if exchange.number:
            self._tell_end(exchange.number)
            exchange.number = 0

    def _feed(self, number: int, block: bytes, end_stream: bool) -> Any:
        """What nghttp2 makes of a header block: its event; None if it has an objection, or if the exchange is over."""
        session = self._session
        flags = END_HEADERS | END_STREAM if end_stream else END_HEADERS
        self._untold += frame_header(len(block), HEADERS, flags, number), block
        try:
            session.receive_data(b"".join(self._untold))
        except ngh2.DenialOfServiceError as error:
            reason = f"more header fields than allowed: {error}"
            raise Violation(ErrorCode.ENHANCE_YOUR_CALM, reason) from error
        except ngh2.NGH2Error as error:
            raise Violation(ErrorCode.PROTOCOL_ERROR, str(error)) from error
        finally:
            self._untold.clear()
        # What it has to say of the exchanges that are over comes before.
        for event in reversed(session.events()):
            if type(event) in _MESSAGES:
                return event
        if session.want_write:
            _look_for_goaway(session.data_to_send())
            session.events()
        return None

    def _forget_if_moved(self, block: bytes) -> bool:
        """Whether the block has changed the decoder's table, by which what is known of blocks is no longer true."""
        changes = _changes_table(block)
        if changes:
            self.responses.clear()
        return changes

    # nghttp2's exchanges

    def _begin(self, method: bytes) -> int:
        """An exchange whose request nghttp2 needn't encode; its number."""
        number = self._session.next_stream_id
        self._session.send_request([ngh2.NeverIndexedHeader(b":method", method)], end_stream=True)
        self._session.data_to_send()
        return number

    def _tell_end(self, number: int) -> None:
        untold = self._untold
        untold.append(_RESET.pack(0, 4, RST_STREAM, 0, number, ErrorCode.CANCEL))
        if len(untold) > _MAX_UNTOLD:
            self._session.receive_data(b"".join(untold))
            self._session.events()
            untold.clear()


def _started() -> ngh2.Connection:
    """A session whose greetings are behind it."""
    session = ngh2.Connection(ngh2.Role.CLIENT, _CONFIGURATION)
    session.initiate_connection(_SETTINGS_WITHIN)
    session.set_local_window_size(LARGEST_WINDOW)
    session.receive_data(frame(SETTINGS, 0, 0, b"") + frame(SETTINGS, ACK, 0, b""))
    session.data_to_send()
    session.events()
    return session


def _payload(frames: bytes) -> bytes:
    """The block that HEADERS and its CONTINUATIONs hold."""
    if len(frames) <= 9 + MAX_FRAME_SIZE:
        return frames[9:]
    return b"".join([body for _, body in _cut(frames)])


def _cut(frames: bytes) -> Iterator[tuple[int, bytes]]:
    """Frames' types and payloads."""
    start = 0
    while start < len(frames):
        high, low, kind, _, _ = unpack_header(frames, start)
        stop = start + 9 + ((high << 8) | low)
        yield kind, frames[start + 9 : stop]
        start = stop


def _remember(memory: dict[_Key, _Value], key: _Key, value: _Value, size: int) -> None:
    if size <= _LONGEST_KNOWN:
        if len(memory) >= _MOST_KNOWN:
            memory.clear()
        memory[key] = value


def _without_sizes(block: bytes) -> bytes:
    """The block without announcements of the table's size: nghttp2 doesn't know which block leaves first."""
    while block and block[0] & 0xE0 == 0x20:
        block = block[_after_integer(block, 0, 0x1F) :]
    return block


def _look_for_goaway(output: bytes) -> None:
    """nghttp2 gives up on the connection if it says so; an objection to a stream is put in our own words."""
    for kind, body in _cut(output):
        if kind == GOAWAY:
            _, error_code = _TWO_LONGS.unpack_from(body)
            raise Violation(error_code, body[8:].decode("ascii", "replace") or "a header block that can't be decoded")


def _hiding(fields: tuple[tuple[bytes, bytes], ...]) -> Headers:
    """Keep out of the table what could be guessed in there (RFC 7541, section 7.1.3).

    nghttp2 does so with `authorization` and short cookies of its own accord.
    """
    if _SECRET in map(_name_of, fields):
        return [ngh2.NeverIndexedHeader(*field) if field[0] == _SECRET else field for field in fields]
    return list(fields)


def _declared_length(status: int, fields: Headers) -> int | None:
    """How long the body of a response must be, None if it may have any length (RFC 9113, section 8.1.1)."""
    if status == _NOT_MODIFIED:
        return 0
    for name, value in fields:
        if name == b"content-length":
            # nghttp2 has seen that it is a number, and the only one.
            return int(value)
    return None


def _changes_table(block: bytes) -> bool:
    """Whether a block, of which nghttp2 says if it is one, changes the dynamic table (RFC 7541, section 6)."""
    position, end = 0, len(block)
    while position < end:
        first = block[position]
        if first & 0x80:
            position = _after_integer(block, position, 0x7F)
        elif first & 0x60:
            return True
        else:
            position = _after_integer(block, position, 0x0F)
            for _ in range(1 if first & 0x0F else 2):
                position = _after_string(block, position)
    return False


def _after_integer(block: bytes, position: int, mask: int) -> int:
    """Where what follows an integer begins (RFC 7541, section 5.1)."""
    position += 1
    if block[position - 1] & mask == mask:
        while position < len(block) and block[position] & 0x80:
            position += 1
        position += 1
    return position


def _after_string(block: bytes, position: int) -> int:
    """Where what follows a string literal begins (RFC 7541, section 5.2)."""
    if position >= len(block):
        return position
    length = block[position] & 0x7F
    position += 1
    if length < 0x7F:
        return position + length
    shift = 0
    while position < len(block):
        more = block[position]
        length += (more & 0x7F) << shift
        shift += 7
        position += 1
        if not more & 0x80:
            break
    return position + length


def _prefixed(value: int, bits: int, pattern: int) -> bytes:
    """An integer with a prefix of so many bits, after a bit pattern (RFC 7541, section 5.1)."""
    most = 2**bits - 1
    if value < most:
        return bytes([pattern | value])
    encoded = bytearray([pattern | most])
    value -= most
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _string(value: bytes) -> bytes:
    """A string literal (RFC 7541, section 5.2), not Huffman-coded."""
    return _prefixed(len(value), 7, 0) + value
