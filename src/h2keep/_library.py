"""httpx or httpx2, as far as the bridge needs it: bodies, proxies, exceptions; and what it is given of a response.

What is raised is an instance of h2keep's exception and of its httpx counterpart.

Most responses are small: when their head is there, so is all that follows. httpx reads each through three generators
nevertheless, which costs a tenth of the whole request; `_Shortcut` takes such a body in one step, and leaves everything
else to the library.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeAlias

from h2keep import errors
from h2keep._fallback import Body
from h2keep._proxies import always, from_environment
from h2keep.runner.proxy import Proxy

if TYPE_CHECKING:
    from types import ModuleType

    from h2keep._proxies import ProxyFor
    from h2keep.runner.exchange import AwaitableExchange, BlockingExchange
    from h2keep.runner.stream import Http2Stream

__all__ = ["AnyStream", "BlockingTrace", "Library", "Trace", "extensions_of"]

#: The phases that `trace` is told of, by httpcore's names; each begins with `.started` and ends with another word.
_BODY = "http2.receive_response_body"
_CLOSING = "http2.response_closed"
Trace: TypeAlias = Callable[[str, dict[str, Any]], Awaitable[None]]
BlockingTrace: TypeAlias = Callable[[str, dict[str, Any]], None]
AnyStream: TypeAlias = "Http2Stream | AwaitableExchange | BlockingExchange"


class Library:
    """httpx or httpx2, as far as the bridge needs it."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.name = module.__name__
        own = {"library": self}
        self.response_stream: type = type("ResponseStream", (_ResponseStream, module.AsyncByteStream), own)
        self.blocking_response_stream: type = type(
            "BlockingResponseStream", (_BlockingResponseStream, module.SyncByteStream), own
        )
        # In what a client wraps them, None if that is not known.
        self.bound_stream: type | None = getattr(module._client, "BoundAsyncStream", None)  # noqa: SLF001
        self.blocking_bound_stream: type | None = getattr(module._client, "BoundSyncStream", None)  # noqa: SLF001
        self.response = _response_class(self)
        self._classes: dict[type[errors.H2KeepError], type[errors.H2KeepError]] = {}

    def body(self, source: Any) -> bytes | Body:
        """A request's body: as bytes where it is known in full."""
        return b"".join(source) if isinstance(source, self.module.ByteStream) else Body(source)

    def proxy_for(self, proxy: Any, *, trust_env: bool) -> ProxyFor | None:
        """The proxy of each origin: the one given, as the library's transports take it, else the environment's."""
        make_context = functools.partial(self.module.create_ssl_context, trust_env=trust_env)
        if proxy is None:
            return from_environment(make_context, networks=self.name != "httpx") if trust_env else None
        if isinstance(proxy, (str, self.module.URL)):
            proxy = self.module.Proxy(proxy)
        if isinstance(proxy, self.module.Proxy):
            # Those for SOCKS proxies get nothing else there, either.
            used = {} if proxy.url.scheme.startswith("socks") else {"ssl_context": proxy.ssl_context}
            proxy = Proxy(str(proxy.url), auth=proxy.auth, headers=proxy.headers.raw if used else (), **used)
        return always(proxy, make_context)

    def translate(self, error: errors.H2KeepError) -> errors.H2KeepError:
        """The same error as an instance of both families, with its message, attributes, cause and context."""
        kind = type(error)
        both = self._classes.get(kind) or self._join(kind)
        own = both.__new__(both)
        own.args = error.args
        own.__dict__.update(error.__dict__, _request=None)
        own.__cause__ = error.__cause__
        return own.with_traceback(error.__traceback__)

    def _join(self, kind: type[errors.H2KeepError]) -> type[errors.H2KeepError]:
        """Make the class that belongs to both families."""

        def reduce(error: errors.H2KeepError) -> tuple[Any, ...]:
            # For pickle and copy: the class itself has no name that could be imported.
            return _restore, (self.name, kind, error.args), error.__dict__

        members = {"__module__": __name__, "__reduce__": reduce}
        both = self._classes[kind] = type(kind.__name__, (kind, self._counterpart(kind)), members)
        return both

    def _counterpart(self, kind: type[errors.H2KeepError]) -> type[Exception]:
        """httpx's class of the same name; where httpx has none, that of the nearest base."""
        for base in kind.__mro__:
            found = getattr(self.module, base.__name__, None)
            if found is not None and base is not Exception:
                counterpart: type[Exception] = found
                return counterpart
        transport_error: type[Exception] = self.module.TransportError
        return transport_error

    async def refuse(self, error: errors.H2KeepError, trace: Trace | None, phase: str) -> NoReturn:
        """Raise the error's translation, with the error's own cause and nothing of the bridge in between."""
        translated = self.translate(error)
        if trace is not None:
            await trace(f"{phase}.failed", {"exception": translated})
        raise translated from error.__cause__

    def told(self, error: errors.H2KeepError, trace: BlockingTrace | None, phase: str) -> errors.H2KeepError:
        """The error's translation, which the trace is told of."""
        translated = self.translate(error)
        if trace is not None:
            trace(f"{phase}.failed", {"exception": translated})
        return translated


def _restore(library: str, kind: type[errors.H2KeepError], args: tuple[Any, ...]) -> errors.H2KeepError:
    front_door = importlib.import_module(f"h2keep.{library}")
    bare = kind.__new__(kind, *args)
    translated: errors.H2KeepError = front_door.library.translate(bare)
    return translated


class _ResponseStream:
    """The response's body, as httpx pulls it."""

    library: Library

    def __init__(self, stream: Http2Stream | AwaitableExchange, request: Any, trace: Trace | None) -> None:
        self._stream = stream
        self._request = request
        self._trace = trace
        self._started = False
        self._ended = False

    def __del__(self, is_finalizing: Any = sys.is_finalizing) -> None:
        # Forgotten before its end: its stream would stay open for ever.
        if not is_finalizing():
            self._stream.give_up()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        trace = self._trace
        if not self._started:
            self._started = True
            if trace is not None:
                await trace(f"{_BODY}.started", {"request": self._request})
            chunk = self._stream.take_whole()
            self._ended = chunk is not None
        else:
            chunk = b"" if self._ended else None
        if chunk is None:
            try:
                chunk = await self._stream.receive()
            except errors.H2KeepError as error:
                await self.library.refuse(error, trace, _BODY)
        if not chunk:
            if trace is not None:
                await trace(f"{_BODY}.complete", {"return_value": None})
            raise StopAsyncIteration
        return chunk

    def take_whole(self) -> bytes | None:
        """The body, if all of it is there, nobody has begun with it and nobody is to be told; then close follows."""
        if self._started or self._trace is not None:
            return None
        whole = self._stream.take_whole()
        self._started = self._ended = whole is not None
        return whole

    async def aclose(self) -> None:
        """AsyncByteStream."""
        self._stream.close()
        if self._trace is not None:
            await self._trace(f"{_CLOSING}.started", {"request": self._request})
            await self._trace(f"{_CLOSING}.complete", {"return_value": None})


class _BlockingResponseStream:
    """The response's body, as httpx pulls it in a thread."""

    library: Library

    def __init__(self, stream: BlockingExchange, request: Any, trace: BlockingTrace | None) -> None:
        self._stream = stream
        self._request = request
        self._trace = trace

    def __del__(self, is_finalizing: Any = sys.is_finalizing) -> None:
        # As above.
        if not is_finalizing():
            self._stream.give_up()

    def __iter__(self) -> Iterator[bytes]:
        trace = self._trace
        if trace is not None:
            trace(f"{_BODY}.started", {"request": self._request})
        try:
            whole = self._stream.take_whole()
            if whole:
                yield whole
            elif whole is None:
                while chunk := self._stream.receive():
                    yield chunk
        except errors.H2KeepError as error:
            raise self.library.told(error, trace, _BODY) from error.__cause__
        if trace is not None:
            trace(f"{_BODY}.complete", {"return_value": None})

    def take_whole(self) -> bytes | None:
        """As above."""
        return self._stream.take_whole() if self._trace is None else None

    def close(self) -> None:
        """SyncByteStream."""
        if self._trace is not None:
            self._trace(f"{_CLOSING}.started", {"request": self._request})
        self._stream.close()
        if self._trace is not None:
            self._trace(f"{_CLOSING}.complete", {"return_value": None})


class _Shortcut:
    """httpx's `Response`, where a body is read that is all there: the same comes of it without the library's iterators.

    That is known only of a response whose client has wrapped its stream, once, as clients do, and whose body is to be
    taken as it came; of nothing else anything is assumed.
    """

    library: Library

    async def aread(self: Any) -> bytes:
        """Response."""
        if self._take_whole(self.library.bound_stream, self.library.response_stream):
            await self.stream.aclose()
            whole: bytes = self._content
            return whole
        read: bytes = await super().aread()  # type: ignore[misc]
        return read

    def read(self: Any) -> bytes:
        """Response."""
        if self._take_whole(self.library.blocking_bound_stream, self.library.blocking_response_stream):
            self.stream.close()
            whole: bytes = self._content
            return whole
        read: bytes = super().read()  # type: ignore[misc]
        return read

    def _take_whole(self: Any, bound: type | None, own: Any) -> bool:
        """Take the body, if that can be done in one step; whether it was done. Then the stream is to be closed."""
        if type(self.stream) is not bound:
            return False
        stream: Any = getattr(self.stream, "_stream", None)
        if type(stream) is not own:
            return False
        if self.is_stream_consumed or self.is_closed or hasattr(self, "_content") or "content-encoding" in self.headers:
            return False
        whole = stream.take_whole()
        if whole is None:
            return False
        self._content = whole
        self._num_bytes_downloaded = len(whole)
        self.is_stream_consumed = self.is_closed = True
        return True

    def __reduce__(self: Any) -> tuple[Any, ...]:
        # For pickle and copy, which leave the stream out: what is made of it is the library's own.
        return object.__new__, (self.library.module.Response,), self.__getstate__()


def _response_class(library: Library) -> Any:
    """The class of responses: the library's own, if it doesn't do as was known of it when this was written."""
    own = library.module.Response
    probe = vars(own(200, content=b"?"))
    if probe.get("_content") != b"?" or "_num_bytes_downloaded" not in probe:
        return own
    return type("Response", (_Shortcut, own), {"library": library})


class NetworkStream:
    """The `network_stream` extension: the connection's facts. Reading and writing are the connection's own affair."""

    def __init__(self, stream: AnyStream) -> None:
        self._transport = stream.connection.transport

    def get_extra_info(self, info: str) -> Any:
        """ "ssl_object", "socket", "client_addr" or "server_addr"; None for anything else."""
        sock = self._transport.socket
        match info:
            case "ssl_object":
                return self._transport.security.ssl_object
            case "socket":
                return sock
        # OSError: the connection has ended since.
        with contextlib.suppress(OSError):
            match info:
                case "client_addr":
                    return sock.getsockname()
                case "server_addr":
                    return sock.getpeername()
        return None


def extensions_of(stream: AnyStream) -> dict[str, Any]:
    """The response's extensions."""
    return {
        "http_version": b"HTTP/2",
        "stream_id": stream.id,
        "network_stream": NetworkStream(stream),
        "h2keep": stream.connection.stats,
    }
