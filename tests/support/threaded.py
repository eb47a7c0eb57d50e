"""A raw server in a thread of its own, for tests that block or stop the client's event loop.

    with threaded(answering(delay=1.0)) as server:
        ...                                     # server.url; server.peers; all in real time
        server.call(peer.respond, 1)            # to do something in its event loop

It goes on while the test's loop can't, which is the point. Its peers may be looked at from the test's thread, as they
only ever grow; whatever sends goes through `call`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread

from support.raw import RawServer

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from support.raw import Peer

__all__ = ["ThreadedServer", "threaded"]

#: The longest that anything here may take to begin or to end, in real seconds.
_PATIENCE = 10.0


class ThreadedServer:
    """What the test's thread sees of a `RawServer` in another."""

    def __init__(self, server: RawServer, portal: anyio.from_thread.BlockingPortal) -> None:
        self._server = server
        self._portal = portal
        self.url = server.url

    @property
    def peers(self) -> list[Peer]:
        """Every connection that was accepted."""
        return self._server.peers

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call it in the server's thread, wait for it if it is a coroutine function, and return what it returned."""
        return self._portal.call(function, *args)

    def soon(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Start it in the server's thread, and don't wait."""
        self._portal.start_task_soon(function, *args)


@contextlib.contextmanager
def threaded(
    handler: Callable[[Peer], Awaitable[Any]],
    context: ssl.SSLContext | None = None,
    settings: Mapping[int, int] | None = None,
    **options: Any,
) -> Iterator[ThreadedServer]:
    """Serve every connection with the handler for the length of the context, which raises a handler's error."""
    started: concurrent.futures.Future[ThreadedServer] = concurrent.futures.Future()
    stop: concurrent.futures.Future[anyio.Event] = concurrent.futures.Future()

    async def serve() -> None:
        async with RawServer.listen(context, **options) as server, anyio.from_thread.BlockingPortal() as portal:
            server.serve(handler, settings)
            event = anyio.Event()
            stop.set_result(event)
            started.set_result(ThreadedServer(server, portal))
            await event.wait()
            await portal.stop(cancel_remaining=True)

    failure: list[BaseException] = []

    def run() -> None:
        try:
            anyio.run(serve)
        except BaseException as error:  # noqa: BLE001
            failure.append(error)
            if not started.done():
                started.set_exception(error)

    thread = threading.Thread(target=run, name="raw server")
    thread.start()
    server = started.result(_PATIENCE)
    try:
        yield server
    finally:
        with contextlib.suppress(RuntimeError):
            server.call(stop.result(0).set)
        thread.join(_PATIENCE)
    if failure:
        raise failure[0]
    if thread.is_alive():
        raise AssertionError("the server's thread does not end")
