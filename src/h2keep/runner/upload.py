"""Pulling a request's body: one chunk at a time, as there is room, and never one after nobody wants it any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from h2keep.errors import LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator

__all__ = ["Sink", "checked", "pump"]


class Sink(Protocol):
    """Where a body goes."""

    async def send(self, chunk: bytes | memoryview) -> None:
        """Take a chunk that isn't empty; returns when there is room for another."""

    def wanted(self) -> bool:
        """Whether more of the body is of use."""

    def finish(self) -> None:
        """The body is complete."""


def checked(chunk: object) -> bytes:
    """A chunk that nobody can change any more. Raises `LocalProtocolError` if it isn't bytes."""
    if not isinstance(chunk, bytes | bytearray | memoryview):
        raise LocalProtocolError(f"the body's iterator gave a {type(chunk).__name__}, not bytes")
    # A memoryview too: the iterator may fill the buffer behind it again.
    return chunk if isinstance(chunk, bytes) else bytes(chunk)


async def pump(body: AsyncIterable[Any], sink: Sink) -> None:
    """Send the body. Raises what its iterator raises."""
    iterator: AsyncIterator[Any] = aiter(body)
    try:
        async for chunk in iterator:
            if chunk := checked(chunk):
                await sink.send(chunk)
            if not sink.wanted():
                return
        sink.finish()
    finally:
        # Let a generator run its finally blocks here and now, also when the upload was cut short.
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()
