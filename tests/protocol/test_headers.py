"""What may go into a request's head, and what is refused, by name and value."""

from __future__ import annotations

import pytest

from h2keep.errors import LocalProtocolError
from h2keep.protocol.headers import check_fields, request_fields


def test_a_request_head_in_the_order_of_the_wire() -> None:
    head, length = request_fields(
        b"POST", b"https", b"example.com", b"/p?q=1", [(b"content-length", b"5"), (b"a", b"b")]
    )
    assert head == [
        (b":method", b"POST"),
        (b":authority", b"example.com"),
        (b":scheme", b"https"),
        (b":path", b"/p?q=1"),
        (b"content-length", b"5"),
        (b"a", b"b"),
    ]
    assert length == 5


@pytest.mark.parametrize("authority", [b"example.com:8443", b"[::1]:80", b"nvcf.api.nvidia.com", b"127.0.0.1"])
def test_authorities_that_are_fine(authority: bytes) -> None:
    request_fields(b"GET", b"https", authority, b"/", [])


@pytest.mark.parametrize(
    ("method", "authority", "target", "complaint"),
    [
        (b"", b"a", b"/", "method: b''"),
        (b"GE T", b"a", b"/", "method: b'GE T'"),
        (b"GET", b"", b"/", "Host: b''"),
        (b"GET", b"user@a", b"/", "Host: b'user@a'"),
        (b"GET", b"a b", b"/", "Host: b'a b'"),
        (b"GET", b"a/b", b"/", "Host: b'a/b'"),
        (b"GET", b"a", b"", "path: b''"),
        (b"GET", b"a", b"p", "path: b'p'"),
        (b"GET", b"a", b"/ x", "path: b'/ x'"),
        (b"GET", b"a", b"/\r\nx", "path:"),
    ],
)
def test_pseudo_fields_are_checked(method: bytes, authority: bytes, target: bytes, complaint: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        request_fields(method, b"https", authority, target, [])
    assert str(caught.value).startswith(complaint)
    assert caught.value.unprocessed


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        (b"Upper", b"x", "header name b'Upper' is not a lower-case token"),
        (b"", b"x", "header name b''"),
        (b"sp ace", b"x", "header name b'sp ace'"),
        (b":path", b"/", "header name b':path'"),
        (b"n\xe4me", b"x", "header name b'n\\xe4me'"),
        (b"a", b"x\r\ny: z", "header 'a': the value b'x\\r\\ny: z' holds CR, LF or NUL"),
        (b"a", b"x\0", "header 'a'"),
        (b"connection", b"close", "header 'connection' is not allowed in HTTP/2"),
        (b"keep-alive", b"1", "header 'keep-alive' is not allowed"),
        (b"transfer-encoding", b"chunked", "header 'transfer-encoding' is not allowed"),
        (b"upgrade", b"websocket", "header 'upgrade' is not allowed"),
        (b"proxy-connection", b"x", "header 'proxy-connection' is not allowed"),
        (b"host", b"a", "header 'host' is not allowed in HTTP/2: set :authority"),
        (b"te", b"gzip", "header 'te': HTTP/2 allows the value 'trailers' alone, not b'gzip'"),
        (b"content-length", b"-1", "header 'content-length': b'-1' is not a length"),
        (b"content-length", b"x", "header 'content-length'"),
        (b"content-length", b"9" * 30, "header 'content-length'"),
    ],
)
def test_fields_that_are_refused(name: bytes, value: bytes, complaint: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        check_fields([(name, value)], into=[])
    assert str(caught.value).startswith(complaint)


def test_white_space_around_a_value_is_not_part_of_it() -> None:
    head: list[tuple[bytes, bytes]] = []
    check_fields([(b"a", b" \tx y\t "), (b"b", b""), (b"te", b"Trailers")], into=head)
    assert head == [(b"a", b"x y"), (b"b", b""), (b"te", b"Trailers")]


def test_two_lengths_must_agree() -> None:
    assert check_fields([(b"content-length", b"5"), (b"content-length", b"5")], into=[]) == 5
    with pytest.raises(LocalProtocolError, match="given twice, as 5 and as 6"):
        check_fields([(b"content-length", b"5"), (b"content-length", b"6")], into=[])
