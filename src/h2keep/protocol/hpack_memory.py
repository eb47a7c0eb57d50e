"""HPACK that remembers what it did last.

Most requests on a connection have the same fields, and so have most responses. As long as the dynamic table stands
still, equal fields make equal blocks and equal blocks make equal fields, so both directions are looked up before they
are worked out. `_Table` knows when that stops being true.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hpack
from hpack.table import HeaderTable

if TYPE_CHECKING:
    from h2keep.protocol.events import Headers

__all__ = ["DecodedBlock", "Decoder", "Encoder"]

#: Lists remembered at most, and the longest block: few differ while the table stands still, and those are small.
_MOST = 256
_LONGEST = 1_024
# A larger table, though the peer may allow it, costs more in hpack's linear search than it saves in bytes.
_LARGEST_TABLE = 4_096
# Beyond this many bytes hpack's Huffman coding, quadratic in a value's length, costs more time than it saves.
_LONGEST_HUFFMAN = 4_096
# Fields whose values could be guessed if they shared a table with an attacker's (RFC 7541, section 7.1.3), as h2,
# nghttp2 and Firefox choose them; of cookies those shorter than this.
_SECRET = frozenset({b"authorization", b"proxy-authorization"})
_SHORT_COOKIE = 20


class _Table(HeaderTable):
    """A header table that counts its changes."""

    changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)

    @property
    def maxsize(self) -> int:
        return super().maxsize

    @maxsize.setter
    def maxsize(self, newmax: int) -> None:
        self.changes += 1
        HeaderTable.maxsize.fset(self, newmax)  # type: ignore[attr-defined]


class Encoder(hpack.Encoder):
    """An encoder for `h2.connection.H2Connection.encoder`."""

    def __init__(self) -> None:
        super().__init__()
        self.header_table: _Table = _Table()
        self._blocks: dict[tuple[tuple[bytes, bytes], ...], bytes] = {}
        self._changes = 0

    @property
    def header_table_size(self) -> int:
        """The most that the table may hold, in bytes."""
        return self.header_table.maxsize

    @header_table_size.setter
    def header_table_size(self, allowed: int) -> None:
        # hpack forgets to announce a size that the peer names twice before the next block, and it takes any size.
        size = min(allowed, _LARGEST_TABLE)
        if size != self.header_table.maxsize:
            self.header_table.maxsize = size
            # The smallest since the last block, and the last, are what a decoder must know (RFC 7541, section 4.2).
            smallest = min([size, *self.table_size_changes])
            self.table_size_changes = [smallest] if smallest == size else [smallest, size]

    def block(self, fields: Headers) -> bytes:
        """The fields as a header block."""
        table = self.header_table
        if table.changes != self._changes:
            self._forget()
        key = tuple(fields)
        known = self._blocks.get(key)
        if known is not None:
            return known
        # A table that was resized is announced in the next block, and in that one alone.
        resized = bool(self.table_size_changes)
        table.resized = resized
        encoded = self.encode(_indexable(fields), huffman=sum(len(value) for _, value in fields) <= _LONGEST_HUFFMAN)
        if table.changes != self._changes:
            self._forget()
        elif len(self._blocks) < _MOST and not resized:
            self._blocks[key] = encoded
        return encoded

    def _forget(self) -> None:
        self._blocks.clear()
        self._changes = self.header_table.changes


class DecodedBlock:
    """A header block's fields, and what was found out about them since."""

    __slots__ = ("fields", "response", "valid_as")

    def __init__(self, fields: Any) -> None:
        self.fields = fields
        #: Once they were found to be a final response's: its status, and the length of the body that it declares.
        self.response: tuple[int, int | None] | None = None
        #: The kinds of block (response, trailers) as which these fields were found valid.
        self.valid_as: set[Any] = set()


class Decoder(hpack.Decoder):
    """A decoder for `h2.connection.H2Connection.decoder`."""

    def __init__(self, max_header_list_size: int) -> None:
        super().__init__(max_header_list_size)
        self.header_table: _Table = _Table()
        self._blocks: dict[bytes, DecodedBlock] = {}
        self._changes = 0

    def fields(self, block: bytes) -> DecodedBlock:
        """A header block's fields. Raises `hpack.HPACKError`."""
        known = self._blocks.get(block)
        if known is not None:
            return known
        decoded = DecodedBlock(self.decode(block, raw=True))
        if self.header_table.changes != self._changes:
            self._blocks.clear()
            self._changes = self.header_table.changes
        elif len(self._blocks) < _MOST and len(block) <= _LONGEST:
            self._blocks[block] = decoded
        return decoded


def _indexable(fields: Headers) -> Headers:
    """Keep secrets out of the table."""
    if any(_is_secret(name, value) for name, value in fields):
        return [
            hpack.NeverIndexedHeaderTuple(name, value) if _is_secret(name, value) else (name, value)
            for name, value in fields
        ]
    return fields


def _is_secret(name: bytes, value: bytes) -> bool:
    return name in _SECRET or (name == b"cookie" and len(value) < _SHORT_COOKIE)
