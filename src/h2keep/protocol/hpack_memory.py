"""HPACK that remembers what it did last.

Most requests on a connection have the same fields, and so have most responses. As long as the dynamic table stands
still, equal fields make equal blocks and equal blocks make equal fields, so both directions are looked up before they
are worked out. `_Table` knows when that stops being true. It would always be moving where each request has a path, or
an id, of its own; so values of names of which no value comes again are not put into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hpack
from hpack.hpack import INDEX_INCREMENTAL, INDEX_NONE
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.table import HeaderTable

if TYPE_CHECKING:
    from h2keep.protocol.events import Headers

__all__ = ["DecodedBlock", "Decoder", "Encoder"]

#: Lists remembered at most, and the longest block: few differ while the table stands still, and those are small.
_MOST = 256
_LONGEST = 1_024
# A larger table, though the peer may allow it, costs more in hpack's linear search than it saves in bytes.
_LARGEST_TABLE = 4_096
# Beyond this many bytes Huffman coding costs more time than it saves.
_LONGEST_HUFFMAN = 4_096
# Of a name's values so many in a row may go into the table without one of them coming again. After these it is tried
# with one in so many.
_TRIALS = 3
_TRY_AGAIN = 32
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

    def search(self, name: bytes, value: bytes) -> tuple[int, bytes, bytes | None] | None:
        static = self.STATIC_TABLE_MAPPING.get(name)
        if static is None or value in static[1] or (name, value) in self.dynamic_entries:
            return super().search(name, value)
        # hpack would go through the table step by step to find nothing better.
        return static[0], name, None

    @property
    def maxsize(self) -> int:
        return super().maxsize

    @maxsize.setter
    def maxsize(self, newmax: int) -> None:
        self.changes += 1
        HeaderTable.maxsize.fset(self, newmax)  # type: ignore[attr-defined]


class _HuffmanCoder:
    """In the place of hpack's, which takes a step of arithmetic with large numbers for each byte."""

    _CODES = tuple(f"{code:0{length}b}" for code, length in zip(REQUEST_CODES, REQUEST_CODES_LENGTH, strict=True))

    def encode(self, data: bytes) -> bytes:
        """RFC 7541, section 5.2."""
        bits = "".join(map(self._CODES.__getitem__, data))
        padding = -len(bits) % 8
        return int(bits + "1" * padding, 2).to_bytes((len(bits) + padding) // 8) if bits else b""


class Encoder(hpack.Encoder):
    """An encoder for `h2.connection.H2Connection.encoder`."""

    huffman_coder: Any

    def __init__(self) -> None:
        super().__init__()
        self.huffman_coder = _HuffmanCoder()
        self.header_table: _Table = _Table()
        # While the table stands still: blocks, and what fields of those became, but for those that are not to be
        # remembered.
        self._blocks: dict[tuple[tuple[bytes, bytes], ...], bytes] = {}
        self._parts: dict[tuple[bytes, bytes], bytes] = {}
        self._changes = 0
        # What was put into the table and didn't come again yet; and by name, how many in a row didn't.
        self._untried: set[tuple[bytes, bytes]] = set()
        self._missed: dict[bytes, int] = {}

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
        if self.header_table.changes != self._changes:
            self._forget()
        key = tuple(fields)
        known = self._blocks.get(key)
        if known is not None:
            return known
        parts = []
        if self.table_size_changes:
            # Announced in the next block, and in that one alone.
            parts.append(self._encode_table_size_change())
        remembered, before, lasting = self._parts, self._changes, not parts
        for field in fields:
            part = remembered.get(field)
            if part is None:
                part = self._part(field)
                lasting = lasting and field in remembered
            parts.append(part)
        encoded = b"".join(parts)
        if lasting and self._changes == before and len(self._blocks) < _MOST:
            self._blocks[key] = encoded
        return encoded

    def _part(self, field: tuple[bytes, bytes]) -> bytes:
        """One field of a block."""
        name, value = field
        huffman = len(value) <= _LONGEST_HUFFMAN
        if _is_secret(name, value):
            return self._remember(field, self.add(field, True, huffman))
        index, _, found = self.header_table.search(name, value) or (0, name, None)
        if found is not None:
            if field in self._untried:
                self._untried.discard(field)
                self._missed[name] = 0
            return self._remember(field, self._encode_indexed(index))
        kind = INDEX_INCREMENTAL if self._is_worth_indexing(field) else INDEX_NONE
        if index:
            part = self._encode_indexed_literal(index, value, kind, huffman)
        else:
            part = self._encode_literal(name, value, kind, huffman)
        if kind is INDEX_INCREMENTAL:
            self.header_table.add(name, value)
            self._forget()
        return part

    def _is_worth_indexing(self, field: tuple[bytes, bytes]) -> bool:
        name = field[0]
        missed = self._missed.get(name, 0)
        if len(self._missed) >= _MOST:
            self._missed.clear()
        self._missed[name] = missed + 1
        if missed >= _TRIALS and missed % _TRY_AGAIN:
            return False
        if len(self._untried) >= _MOST:
            self._untried.clear()
        self._untried.add(field)
        return True

    def _remember(self, field: tuple[bytes, bytes], part: bytes) -> bytes:
        if len(self._parts) >= _MOST:
            self._parts.clear()
        self._parts[field] = part
        return part

    def _forget(self) -> None:
        self._blocks.clear()
        self._parts.clear()
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


def _is_secret(name: bytes, value: bytes) -> bool:
    return name in _SECRET or (name == b"cookie" and len(value) < _SHORT_COOKIE)
