"""Zero-code: the stock transports of httpx and httpx2, made from now on, keep their HTTP/2 connections alive.

There is one seam a library: `__init__` of `HTTPTransport` and of `AsyncHTTPTransport`, which put a pool of httpcore's
into `self._pool`. While h2keep is installed they put one of `_httpcore`'s there. Everything that makes transports, or
has wrapped their other methods, goes on as before; and what the seam must look like is checked first.

Nothing of h2keep's machinery is imported before the first transport is made: a program may never make one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import math
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from h2keep.keepalive import Keepalive

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

__all__ = [
    "LOG",
    "LOG_LEVELS",
    "PING_TIMEOUT",
    "READ_IDLE_TIMEOUT",
    "install",
    "install_from_environment",
    "log_level",
    "seconds",
    "uninstall",
]

log = logging.getLogger("h2keep")

READ_IDLE_TIMEOUT = "H2KEEP_READ_IDLE_TIMEOUT"
PING_TIMEOUT = "H2KEEP_PING_TIMEOUT"
LOG = "H2KEEP_LOG"
LOG_LEVELS = ("debug", "info", "warning", "error")

_LIBRARIES = ("httpx", "httpx2")
#: What the seam must look like: the parameters of `__init__`, and for each class the methods that use `self._pool`.
_PARAMETERS = (
    *("self", "verify", "cert", "trust_env", "http1", "http2", "limits", "proxy", "uds", "local_address", "retries"),
    "socket_options",
)
_USERS_OF_POOL = {
    "HTTPTransport": ("handle_request", "close"),
    "AsyncHTTPTransport": ("handle_async_request", "aclose"),
}


class _Seam:
    """One transport class, and what its `__init__` was before."""

    def __init__(self, library: ModuleType, transport: Any) -> None:
        self._library = library
        self._transport = transport
        self._original = transport.__init__
        self._signature = inspect.signature(self._original)
        self._default_limits = self._signature.parameters["limits"].default
        self._replacement = self._make_replacement()
        #: None while not installed.
        self.keepalive: Keepalive | None = None
        transport.__init__ = self._replacement

    def remove(self) -> bool:
        """Undo it; whether that was possible. Where somebody has wrapped ours it stays, and does nothing any more."""
        self.keepalive = None
        if self._transport.__init__ is not self._replacement:
            return False
        self._transport.__init__ = self._original
        return True

    def _make_replacement(self) -> Any:
        seam = self

        @functools.wraps(self._original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            if seam.keepalive is None:
                seam._original(self, *args, **kwargs)
            else:
                seam._set_up(self, seam.keepalive, args, kwargs)

        return __init__

    def _set_up(self, transport: Any, keepalive: Keepalive, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        options = self._options(transport, args, kwargs)
        if options is None:
            self._original(transport, *args, **kwargs)
            return
        # Once, for both pools.
        context = self._library.create_ssl_context(options["verify"], options["cert"], options["trust_env"])
        given = tuple(options["socket_options"] or ())
        options.update(verify=context, cert=None, socket_options=given)
        from h2keep import _fallback, _httpcore

        # For what HTTP/2 doesn't carry (K18). What the author gives comes last, and so it holds.
        added = _fallback.tcp_keepalive(keepalive) if options["uds"] is None else []
        self._original(transport, **{**options, "socket_options": [*added, *given]})

        try:
            transport._pool = _httpcore.pool_for(  # noqa: SLF001
                self._library.__name__,
                transport._pool,  # noqa: SLF001
                keepalive,
                options,
                limited=options["limits"] is not self._default_limits,
            )
        except (TypeError, ValueError, ImportError) as error:
            # The program isn't ours to break.
            log.warning("a transport of %s is left as it is, without PINGs: %s", self._library.__name__, error)

    def _options(self, transport: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """All arguments by name; None if they are wrong, which is the library's to say."""
        try:
            bound = self._signature.bind(transport, *args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        return {name: value for name, value in bound.arguments.items() if name != "self"}


_lock = threading.Lock()
_seams: dict[type, _Seam] = {}


def install(keepalive: Keepalive | None = None) -> None:
    """Have the transports that httpx and httpx2 make from now on keep their HTTP/2 connections alive.

    That is those of their clients, and those that SDKs make themselves; see docs/zero-code.md. Both libraries are
    imported if they are installed. To install again changes the policy, which is `Keepalive()` unless given.

    Raises ImportError if neither is installed, and RuntimeError if one is of a version that this isn't known to work
    with; nothing is changed then.
    """
    if keepalive is not None and not isinstance(keepalive, Keepalive):
        raise TypeError(f"keepalive: {keepalive!r} is not a Keepalive")
    libraries = [library for name in _LIBRARIES if (library := _import(name)) is not None]
    if not libraries:
        raise ImportError("h2keep.install() is for httpx and httpx2, and neither is installed")
    _install_into(libraries, keepalive or Keepalive())


def uninstall() -> None:
    """Undo `install`. Transports made in between go on as they are. A no-op if nothing is installed."""
    with _lock:
        for transport, seam in list(_seams.items()):
            if seam.remove():
                del _seams[transport]


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def _install_into(libraries: list[ModuleType], keepalive: Keepalive) -> None:
    with _lock:
        found = [(library, getattr(library, name, None)) for library in libraries for name in _USERS_OF_POOL]
        for library, transport in found:
            if transport not in _seams:
                _check(library, transport)
        for library, transport in found:
            assert transport is not None
            seam = _seams.get(transport)
            if seam is None:
                seam = _seams[transport] = _Seam(library, transport)
            seam.keepalive = keepalive


def _check(library: ModuleType, transport: Any) -> None:
    """Raise `RuntimeError` if this is not the seam that we know."""
    problem = _problem(library, transport)
    if problem is not None:
        version = getattr(library, "__version__", "of an unknown version")
        raise RuntimeError(
            f"h2keep can't be installed into {library.__name__} {version}: {problem}. It works with httpx 0.28 and "
            f"httpx2 2.16; use the transports of h2keep.{library.__name__} instead"
        )


def _problem(library: ModuleType, transport: Any) -> str | None:
    if not inspect.isclass(transport):
        return f"it lacks one of {', '.join(_USERS_OF_POOL)}"
    if not callable(getattr(library, "create_ssl_context", None)):
        return "it lacks create_ssl_context"
    parameters = tuple(inspect.signature(transport.__init__).parameters)
    if parameters != _PARAMETERS:
        return f"the parameters of {transport.__name__} are not those expected, but {', '.join(parameters[1:])}"
    for method in _USERS_OF_POOL[transport.__name__]:
        code = getattr(inspect.unwrap(getattr(transport, method)), "__code__", None)
        if code is None or "_pool" not in code.co_names:
            return f"{transport.__name__}.{method} does not use self._pool, or has been replaced"
    return None


# What `h2keep run` sets, and the program's own start reads


def install_from_environment(library: ModuleType) -> None:
    """Install into one library, as the environment variables say. Raises as `install`, and ValueError for bad ones."""
    given: dict[str, Any] = {
        field: seconds(os.environ[variable], variable)
        for field, variable in (("read_idle_timeout", READ_IDLE_TIMEOUT), ("ping_timeout", PING_TIMEOUT))
        if os.environ.get(variable)
    }
    level = log_level(os.environ[LOG], LOG) if os.environ.get(LOG) else None
    _install_into([library], Keepalive(**given))
    if level is not None and not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s h2keep[%(process)d] %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(level)
        # Those who configure logging would see it twice.
        log.propagate = False


def seconds(text: str, name: str) -> float:
    """A setting that is a number of seconds. Raises `ValueError`, which names it and its value."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: {text!r} is not a number of seconds above 0")
    return value


def log_level(text: str, name: str) -> str:
    """A setting that is a level of logging, in upper case. Raises as `seconds`."""
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"{name}: {text!r} is not one of {', '.join(LOG_LEVELS)}")
    return text.upper()
