"""Request fields in, checked once.

What leaves here is what goes on the wire, so the codec need not look at it again. Responses are not this module's
business: the codec validates what the peer sends.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from h2keep.errors import LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from h2keep.protocol.events import Headers

__all__ = ["CONNECTION_SPECIFIC", "FieldMemory", "check_fields", "request_fields"]

#: Fields that speak of one HTTP/1.1 connection and must not appear in HTTP/2 (RFC 9113, section 8.2.2).
CONNECTION_SPECIFIC = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_LOWER_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
#: A value as it goes on the wire: without CR, LF, NUL, and without white space around it.
_CLEAN_VALUE = re.compile(rb"(?![ \t])[^\0\r\n]*(?<![ \t])")
_FORBIDDEN_IN_VALUE = re.compile(rb"[\0\r\n]")
#: At most 18 digits: beyond that is nonsense, and int() of a very long string is slow.
_LENGTH = re.compile(rb"[0-9]{1,18}")
_TARGET = re.compile(rb"/[\x21-\x7e\x80-\xff]*|\*")
_AUTHORITY = re.compile(rb"[^\x00-\x20\x7f@/?#]+")


def request_fields(
    method: bytes, scheme: bytes, authority: bytes, target: bytes, fields: Iterable[tuple[bytes, bytes]]
) -> tuple[Headers, int | None]:
    """The complete header list of a request, pseudo-fields first, and its declared content length.

    `authority` goes to `:authority`; a `host` field would say the same twice and is refused like any other
    connection-specific field. Raises `LocalProtocolError` naming the offending part and its value.
    """
    head = [*_pseudo_fields(method, scheme, authority), _path(target)]
    return head, check_fields(fields, into=head)


def _pseudo_fields(method: bytes, scheme: bytes, authority: bytes) -> Headers:
    """All but the last, in which requests to one server differ."""
    if not _TOKEN.fullmatch(method):
        raise LocalProtocolError(f"method: {method!r} is not a token (RFC 9110, section 9.1)", unprocessed=True)
    if not _AUTHORITY.fullmatch(authority):
        raise LocalProtocolError(
            f"Host: {authority!r} is not a valid authority; it takes host[:port] alone", unprocessed=True
        )
    return [(b":method", method), (b":authority", authority), (b":scheme", scheme)]


def _path(target: bytes) -> tuple[bytes, bytes]:
    if not _TARGET.fullmatch(target):
        raise LocalProtocolError(
            f"path: {target!r} must begin with '/' and hold neither spaces nor control characters", unprocessed=True
        )
    return b":path", target


class FieldMemory:
    """`request_fields` for one sender's requests: what they have in common is looked at once.

    It keeps names and values, of which some are secrets, so it is to live no longer than the sender.
    """

    __slots__ = ("_good", "_heads")

    #: How many fields, or heads, are remembered before all are forgotten, lest what never comes again fill memory.
    _MOST = 1_024
    #: Values longer than this, in bytes, are rarely those of the next request.
    _LONGEST = 256

    def __init__(self) -> None:
        self._good: set[tuple[bytes, bytes]] = set()
        self._heads: dict[tuple[bytes, bytes, bytes], Headers] = {}

    def request_fields(
        self, method: bytes, scheme: bytes, authority: bytes, target: bytes, fields: Iterable[tuple[bytes, bytes]]
    ) -> tuple[Headers, int | None]:
        """As the function of that name."""
        key = method, scheme, authority
        known = self._heads.get(key)
        if known is None:
            known = _pseudo_fields(*key)
            if len(self._heads) >= self._MOST:
                self._heads.clear()
            self._heads[key] = known
        head = [*known, _path(target)]
        good, content_length = self._good, None
        for field in fields:
            if field in good:
                head.append(field)
            elif content_length is None and field[0] == b"content-length" and _LENGTH.fullmatch(field[1]):
                # Each request has one of its own, which needn't be remembered.
                content_length = int(field[1])
                head.append(field)
            else:
                content_length = _check_field(*field, content_length, into=head)
                self._remember(head[-1])
        return head, content_length

    def _remember(self, field: tuple[bytes, bytes]) -> None:
        if field[0] != b"content-length" and len(field[1]) <= self._LONGEST:
            if len(self._good) >= self._MOST:
                self._good.clear()
            self._good.add(field)


def check_fields(fields: Iterable[tuple[bytes, bytes]], *, into: Headers) -> int | None:
    """Append the fields to `into` if each may go on the wire; the declared content length, if there is one.

    White space around a value is not part of it (RFC 9110, section 5.5) and is dropped.
    """
    content_length = None
    for name, value in fields:
        content_length = _check_field(name, value, content_length, into=into)
    return content_length


def _check_field(name: bytes, value: bytes, content_length: int | None, *, into: Headers) -> int | None:
    """Append one field; the content length that it declares, or the one that was declared before."""
    _check_name(name)
    if not _CLEAN_VALUE.fullmatch(value):
        if _FORBIDDEN_IN_VALUE.search(value):
            raise LocalProtocolError(
                f"header {name.decode('ascii')!r}: the value {value!r} holds CR, LF or NUL", unprocessed=True
            )
        value = value.strip(b" \t")
    if name == b"content-length":
        content_length = _content_length(value, content_length)
    elif name == b"te" and value.lower() != b"trailers":
        raise LocalProtocolError(
            f"header 'te': HTTP/2 allows the value 'trailers' alone, not {value!r}", unprocessed=True
        )
    into.append((name, value))
    return content_length


@functools.lru_cache(maxsize=1024)
def _check_name(name: bytes) -> None:
    if name in CONNECTION_SPECIFIC or name == b"host":
        hint = "set :authority with the request's Host" if name == b"host" else "HTTP/2 has no use for it"
        raise LocalProtocolError(f"header {name.decode('ascii')!r} is not allowed in HTTP/2: {hint}", unprocessed=True)
    if not _LOWER_TOKEN.fullmatch(name):
        raise LocalProtocolError(
            f"header name {name!r} is not a lower-case token (RFC 9113, section 8.2.1)", unprocessed=True
        )


def _content_length(value: bytes, before: int | None) -> int:
    if not _LENGTH.fullmatch(value):
        raise LocalProtocolError(f"header 'content-length': {value!r} is not a length", unprocessed=True)
    length = int(value)
    if before is not None and before != length:
        raise LocalProtocolError(f"header 'content-length': given twice, as {before} and as {length}", unprocessed=True)
    return length
