"""What may go into a request's head, and what is refused, by name and value."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2keep.errors import LocalProtocolError
from h2keep.protocol.headers import FieldMemory, check_fields, request_fields


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


def outcome(ask: Any, *request: Any) -> Any:
    try:
        return ask(*request)
    except LocalProtocolError as error:
        return str(error)


FIELDS = st.lists(
    st.tuples(
        st.sampled_from([b"a", b"cookie", b"content-length", b"te", b"host", b"A", b""]),
        st.sampled_from([b"", b"1", b"2", b" 1", b"trailers", b"x\r\ny", b"y" * 300]),
    ),
    max_size=5,
)
REQUESTS = st.tuples(
    st.sampled_from([b"GET", b"POST", b"G T"]),
    st.sampled_from([b"https", b"http"]),
    st.sampled_from([b"example.com", b"a b"]),
    st.sampled_from([b"/", b"/p", b"p"]),
    FIELDS,
)


@given(st.lists(REQUESTS, max_size=20))
def test_a_memory_changes_nothing_of_what_is_let_through_and_what_is_refused(requests: list[Any]) -> None:
    memory = FieldMemory()
    for request in requests:
        assert outcome(memory.request_fields, *request) == outcome(request_fields, *request)


def test_what_a_memory_gave_is_the_callers_own() -> None:
    memory = FieldMemory()
    request = (b"GET", b"https", b"example.com", b"/", [(b"a", b"b")])
    first, _ = memory.request_fields(*request)
    first.clear()
    assert memory.request_fields(*request) == request_fields(*request)


def test_a_memory_keeps_neither_lengths_nor_long_values_and_is_bounded() -> None:
    memory = FieldMemory()

    def ask(number: int) -> None:
        fields = [(b"n", b"%d" % number), (b"content-length", b"%d" % number), (b"long", b"%d" % number * 300)]
        memory.request_fields(b"GET", b"https", b"%d.example.com" % number, b"/%d" % number, fields)

    for number in range(100):
        ask(number)
    assert memory._good == {(b"n", b"%d" % number) for number in range(100)}
    for number in range(5_000):
        ask(number)
        assert len(memory._good) <= 1_024
        assert len(memory._heads) <= 1_024
    before = len(memory._heads)
    for number in range(10):
        ask(4_999 - number)
    assert len(memory._heads) == before
