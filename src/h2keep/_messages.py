"""Requests and responses as the standalone clients take and give them: what both clients share, without any waiting.

URLs, header fields and bodies in, checked; `Headers`, text and lines out.
"""

from __future__ import annotations

import codecs
import functools
import json as jsonlib
import operator
import re
import ssl
import sys
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from urllib.parse import quote, urlencode, urlsplit

from h2keep import _proxies
from h2keep._connections import Connections
from h2keep._recurring import LONGEST, Recurring
from h2keep.errors import UnsupportedProtocol
from h2keep.runner.dial import Origin, SocketOption
from h2keep.runner.request import REPLAY_BUFFER, Head, Timeout
from h2keep.runner.tls import create_ssl_context

if TYPE_CHECKING:
    import os
    from types import EllipsisType

    from h2keep.keepalive import Keepalive
    from h2keep.runner.exchange import AwaitableExchange, BlockingExchange
    from h2keep.runner.limits import Limits
    from h2keep.runner.proxy import Proxy
    from h2keep.runner.stats import ConnectionStats, EventHook
    from h2keep.runner.stream import Http2Stream

__all__ = [
    "AnyContent",
    "BaseClient",
    "BaseResponse",
    "HeaderTypes",
    "Headers",
    "LineSplitter",
    "Prepared",
    "TimeoutTypes",
]

HeaderValue: TypeAlias = str | bytes
HeaderTypes: TypeAlias = Mapping[str, HeaderValue] | Iterable[tuple[str | bytes, HeaderValue]]
AnyContent: TypeAlias = bytes | str | Iterable[bytes] | AsyncIterable[bytes]
TimeoutTypes: TypeAlias = Timeout | float | None
#: A request's head, its body and its timeouts.
Prepared: TypeAlias = tuple[Head, bytes | Iterable[bytes] | AsyncIterable[bytes] | None, Timeout]

_DEFAULT_PORTS = {"https": 443, "http": 80}
_DEFAULT_TIMEOUT = Timeout()
_URL_SAFE = "!#$%&'()*+,/:;=?@[]~"
_LINE_END = re.compile(r"\r\n|\n|\r")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CHARSET = re.compile(r"charset=[\"']?([\w.:-]+)", re.IGNORECASE)
_OUR_FIELDS = [(b"user-agent", b"h2keep"), (b"accept", b"*/*")]
_name_of = operator.itemgetter(0)


class Headers(Mapping[str, str]):
    """Response fields: names in any case; repeated fields joined by ", " as RFC 9110 has it, each in `raw`."""

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        #: The fields as they came, in order.
        self.raw = raw

    def __getitem__(self, name: str) -> str:
        values = self.get_list(name)
        if not values:
            raise KeyError(name)
        return ", ".join(values)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name.decode("latin-1") for name, _ in self.raw))

    def __len__(self) -> int:
        return len({name for name, _ in self.raw})

    def __repr__(self) -> str:
        return f"Headers({[(name.decode('latin-1'), value.decode('latin-1')) for name, value in self.raw]!r})"

    def get_list(self, name: str) -> list[str]:
        """Every value of a field, in order."""
        wanted = name.lower().encode("latin-1")
        return [value.decode("latin-1") for found, value in self.raw if found == wanted]


class BaseResponse:
    """A response's head, and its body once it has been read."""

    http_version = "HTTP/2"

    def __init__(
        self, stream: Http2Stream | AwaitableExchange | BlockingExchange, content: bytes | None = None
    ) -> None:
        self._source = stream
        self._content = content
        self._iterated = False
        assert stream.status is not None
        self.status_code = stream.status
        self.headers = Headers(stream.headers)

    def __del__(self, is_finalizing: Any = sys.is_finalizing) -> None:
        # Forgotten before its end: its stream would stay open for ever.
        if not is_finalizing():
            self._source.give_up()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} [{self.status_code}]>"

    @property
    def stream_id(self) -> int:
        """The HTTP/2 stream that carried it."""
        return self._source.id

    @property
    def connection(self) -> ConnectionStats:
        """The figures of the connection that carried it (K20)."""
        return self._source.connection.stats

    @property
    def trailers(self) -> Headers:
        """Trailer fields, known once the body has been read; empty if there were none."""
        return Headers(self._source.trailers)

    @property
    def content(self) -> bytes:
        """The whole body. Raises RuntimeError before it was read."""
        if self._content is None:
            raise RuntimeError("the body has not been read: call read() or aread(), or iterate over it")
        return self._content

    @property
    def text(self) -> str:
        """The body as text, by the charset of Content-Type, else UTF-8; what can't be decoded is replaced."""
        return self.content.decode(self._charset(), "replace")

    def json(self) -> Any:
        """The body as JSON."""
        return jsonlib.loads(self.content)

    def _charset(self) -> str:
        found = _CHARSET.search(self.headers.get("content-type", ""))
        if found:
            # Not every codec decodes bytes to text, or can replace what it can't decode.
            with suppress(LookupError, UnicodeError):
                b"\xff".decode(found[1], "replace")
                return found[1]
        return "utf-8"

    def _use_up(self) -> None:
        """A body that nobody keeps can be had but once."""
        if self._iterated:
            raise RuntimeError("the body has been read already, or part of it, and was not kept")
        self._iterated = True


class LineSplitter:
    """Cuts text, which comes as encoded chunks, into lines."""

    def __init__(self, charset: str) -> None:
        self._decode = codecs.getincrementaldecoder(charset)("replace").decode
        #: The pieces of a line whose end hasn't come.
        self._rest: list[str] = []
        self._after_return = False

    def feed(self, chunk: bytes) -> list[str]:
        """The lines that the chunk completes."""
        return self._split(self._decode(chunk))

    def end(self) -> list[str]:
        """What is left: a last line without an end, if any."""
        lines = self._split(self._decode(b"", True))
        last = "".join(self._rest)
        return [*lines, last] if last else lines

    def _split(self, text: str) -> list[str]:
        if self._after_return and text:
            # The line's end was \r\n, in two chunks.
            text = text.removeprefix("\n")
            self._after_return = False
        if not text:
            return []
        if "\r" in text:
            lines = _LINE_END.split(text)
            self._after_return = text.endswith("\r")
        else:
            lines = text.split("\n")
        last = lines.pop()
        if lines and self._rest:
            lines[0] = "".join([*self._rest, lines[0]])
            self._rest = []
        if last:
            self._rest.append(last)
        return lines


class _Known(NamedTuple):
    """What requests to one URL with the same headers have in common."""

    head: Head
    #: The names of the fields.
    names: set[bytes]


class BaseClient:
    """Settings and connections; see `AsyncClient` for what the arguments mean."""

    def __init__(
        self,
        *,
        keepalive: Keepalive | None = None,
        verify: ssl.SSLContext | str | os.PathLike[str] | bool = True,
        cert: str | tuple[str, str] | tuple[str, str, str] | None = None,
        trust_env: bool = True,
        engine: str = "h2",
        limits: Limits | None = None,
        timeout: TimeoutTypes = _DEFAULT_TIMEOUT,
        http1: bool = True,
        uds: str | None = None,
        local_address: str | None = None,
        proxy: str | Proxy | None = None,
        socket_options: Iterable[SocketOption] | None = None,
        headers: HeaderTypes = (),
        retries: int = 0,
        replay_buffer: int = REPLAY_BUFFER,
        event_hook: EventHook | None = None,
        run_in_thread: bool = False,
    ) -> None:
        if not isinstance(verify, ssl.SSLContext):
            context = create_ssl_context(verify, cert, trust_env)
        elif cert is None:
            context = verify
        else:
            raise ValueError("cert: load the certificate into the ssl.SSLContext that is given as verify")
        if proxy is not None and uds is not None:
            raise ValueError("proxy: there is no proxy on the way to a unix socket")
        proxy_for = None
        make_context = functools.partial(create_ssl_context, True, None, trust_env)
        if proxy is not None:
            proxy_for = _proxies.always(proxy, make_context)
        elif trust_env and uds is None:
            proxy_for = _proxies.from_environment(make_context)
        self._timeout = _timeout(timeout)
        own = _fields(headers)
        #: What requests have unless they have a field of that name themselves.
        self._default_fields = own + [field for field in _OUR_FIELDS if field[0] not in dict(own)]
        self._default_names = frozenset(map(_name_of, self._default_fields))
        # By method, URL and headers.
        self._known: Recurring[_Known] = Recurring()
        self._connections = Connections(
            context,
            keepalive=keepalive,
            engine=engine,
            limits=limits,
            http1=http1,
            uds=uds,
            local_address=local_address,
            socket_options=socket_options,
            event_hook=event_hook,
            run_in_thread=run_in_thread,
            proxy_for=proxy_for,
            retries=retries,
            replay_buffer=replay_buffer,
        )

    def _prepare(
        self,
        method: str,
        url: str,
        content: AnyContent | None = None,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: HeaderTypes = (),
        timeout: TimeoutTypes | EllipsisType = ...,
        extensions: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """The request's head, its body and its timeouts."""
        if extensions or params or type(url) is not str or not (type(headers) is dict or headers == ()):
            known = self._look_at(method, url, params, headers, extensions)
        else:
            known = self._look_up(method, url, headers)
        (origin, fields, content_length), names = known
        fields = fields.copy()
        body = _body(content, json, fields, names)
        if content_length is None and isinstance(body, bytes):
            content_length = len(body)
        return Head(origin, fields, content_length), body, self._timeout if timeout is ... else _timeout(timeout)

    def _look_up(self, method: str, url: str, headers: Any) -> _Known:
        """As `_look_at`, for the many requests that are as others before."""
        key = method, url, *(headers.items() if headers else ())
        try:
            known = self._known.get(key)
        except (TypeError, BytesWarning):
            # Something in there is nothing that a request is made of; or text meets bytes, under python -bb.
            return self._look_at(method, url, None, headers, None)
        if known is None:
            known = self._look_at(method, url, None, headers, None)
            size = len(url) + sum(len(name) + len(value) for name, value in known.head.fields)
            self._known.offer(key, known, size)
        return known

    def _look_at(
        self,
        method: str,
        url: str,
        params: Mapping[str, Any] | None,
        headers: HeaderTypes,
        extensions: Mapping[str, Any] | None,
    ) -> _Known:
        """The head of a request, checked, but for what tells of its body."""
        origin, authority, target = _split_url(url, params)
        fields = _fields(headers)
        names = set(map(_name_of, fields))
        fields += [field for field in self._default_fields if field[0] not in names]
        names |= self._default_names
        if b"host" in names:
            authority = _take_host(fields) or authority
        if extensions and (server_hostname := extensions.get("sni_hostname")):
            origin = replace(origin, server_hostname=server_hostname)
        return _Known(
            self._connections.head(method.encode("ascii", "replace"), origin, authority, target, fields), names
        )


def _timeout(timeout: TimeoutTypes) -> Timeout:
    if isinstance(timeout, Timeout):
        return timeout
    return Timeout(timeout, timeout, timeout, timeout)


def _split_url(url: str, params: Mapping[str, Any] | None) -> tuple[Origin, bytes, bytes]:
    """The origin, the authority and the target."""
    if not isinstance(url, str):
        raise TypeError(f"url: {url!r} is not a str")
    parse = _parse_url if len(url) <= LONGEST else _parse_url.__wrapped__
    origin, authority, target = parse(url)
    if params:
        target += (b"&" if b"?" in target else b"?") + urlencode(params, doseq=True).encode("ascii")
    return origin, authority, target


#: All requests to an origin hold the same object.
_origin = functools.lru_cache(maxsize=256)(Origin)


@functools.lru_cache(maxsize=256)
def _parse_url(url: str) -> tuple[Origin, bytes, bytes]:
    """What isn't ASCII is encoded, what is encoded stays as it is."""
    if _CONTROL.search(url):
        raise UnsupportedProtocol(f"url: {url!r} holds control characters")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UnsupportedProtocol(f"url: {url!r}: {error}") from error
    if "@" in parts.netloc:
        # Without the URL: what stands before the @ is often a password.
        raise UnsupportedProtocol(
            f"url: there is a user name before {parts.hostname!r}, which is not sent: use an Authorization header"
        )
    scheme = parts.scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise UnsupportedProtocol(f"url: {url!r} must begin with https:// or http://")
    try:
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise UnsupportedProtocol(f"url: {url!r}: {error}") from error
    if not host:
        raise UnsupportedProtocol(f"url: {url!r} names no host")
    if port == 0:
        raise UnsupportedProtocol(f"url: {url!r}: nothing can listen on port 0")
    try:
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise UnsupportedProtocol(f"url: {url!r}: {host!r} is not a valid host name: {error}") from error
    origin = _origin(scheme, host, port if port is not None else _DEFAULT_PORTS[scheme])
    authority = f"[{host}]" if ":" in host else host
    if origin.port != _DEFAULT_PORTS[scheme]:
        authority += f":{origin.port}"
    target = quote(parts.path or "/", safe=_URL_SAFE)
    if parts.query:
        target += f"?{quote(parts.query, safe=_URL_SAFE)}"
    return origin, authority.encode("ascii"), target.encode("ascii")


def _fields(headers: HeaderTypes) -> list[tuple[bytes, bytes]]:
    """Fields as they will stand on the wire: names in lower case, text as latin-1 (RFC 9110, section 5.5)."""
    if type(headers) is dict:
        pairs: Iterable[tuple[str | bytes, HeaderValue]] = headers.items()
    else:
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        try:
            pairs = [(name, value) for name, value in pairs]
        except (TypeError, ValueError) as error:
            raise TypeError(f"headers: {headers!r} is neither a mapping nor pairs of names and values") from error
    return [(_name(name) if type(name) is str else _encode(name).lower(), _encode(value)) for name, value in pairs]


@functools.lru_cache(maxsize=1024)
def _name(name: str) -> bytes:
    return _encode(name).lower()


def _encode(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise TypeError(f"headers: {text!r} is neither str nor bytes")
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8")


def _take_host(fields: list[tuple[bytes, bytes]]) -> bytes | None:
    """Remove `host` from the fields, where HTTP/2 has no place for it; its value."""
    for index, (name, value) in enumerate(fields):
        if name == b"host":
            del fields[index]
            return value
    return None


def _body(
    content: AnyContent | None, json: Any, fields: list[tuple[bytes, bytes]], given: set[bytes]
) -> bytes | Iterable[bytes] | AsyncIterable[bytes] | None:
    """The body; adds the fields that tell of it, unless they are given."""
    if json is not None:
        if content is not None:
            raise ValueError("content and json exclude each other")
        content = jsonlib.dumps(json, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")
        if b"content-type" not in given:
            fields.append((b"content-type", b"application/json"))
    if content is None:
        return None
    if isinstance(content, str):
        content = content.encode("utf-8")
        if b"content-type" not in given:
            fields.append((b"content-type", b"text/plain; charset=utf-8"))
    if isinstance(content, (bytes, bytearray, memoryview)):
        content = bytes(content)
        if b"content-length" not in given:
            fields.append((b"content-length", b"%d" % len(content)))
        return content
    if isinstance(content, AsyncIterable) or (hasattr(content, "__iter__") and not isinstance(content, Mapping)):
        return content
    raise TypeError(f"content: {type(content).__name__} is not bytes, str or an (async) iterable of bytes")
