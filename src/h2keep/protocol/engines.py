"""The HTTP/2 codecs that there are, by the names that the front doors take as `engine`.

A codec is imported when it is first asked for, so that the ones that nobody asked for need not be installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from h2keep.protocol.engine import Engine, EngineHandler

__all__ = ["DEFAULT_ENGINE", "EngineFactory", "engine_named"]

DEFAULT_ENGINE = "h2"


class EngineFactory(Protocol):
    """Makes a connection's engine."""

    def __call__(self, handler: EngineHandler, *, initial_window: int, connection_window: int) -> Engine:
        """Both windows are in bytes: that of each stream at its beginning, and the connection's own."""


def _h2() -> EngineFactory:
    from h2keep.protocol.h2_engine import H2Engine

    return H2Engine


def _ngh2() -> EngineFactory:
    try:
        from h2keep.protocol.ngh2_engine import Ngh2Engine
    except ModuleNotFoundError as error:
        if error.name != "ngh2":
            raise
        text = "engine: 'ngh2' needs the package ngh2, which is not installed: pip install 'h2keep[fast]'"
        raise ModuleNotFoundError(text, name="ngh2") from error
    return Ngh2Engine


_ENGINES: dict[str, Callable[[], EngineFactory]] = {"h2": _h2, "ngh2": _ngh2}


def engine_named(name: str) -> EngineFactory:
    """The codec of that name. Raises `ValueError` if there is none, `ImportError` if it can't be used here."""
    if name not in _ENGINES:
        raise ValueError(f"engine: {name!r} is not one of: {', '.join(map(repr, _ENGINES))}")
    return _ENGINES[name]()
