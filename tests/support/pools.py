"""A look into a client's pool: is it at rest, or has something been forgotten?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import h2keep
    from h2keep.runner.connection import Http2Connection
    from h2keep.runner.pool import Pool

__all__ = ["assert_at_rest", "assert_pool_at_rest", "connections_of", "pool_of"]


def pool_of(client: h2keep.AsyncClient) -> Pool:
    """The client's pool for the running event loop."""
    return client._connections._running_pool()


def connections_of(client: h2keep.AsyncClient) -> list[Http2Connection]:
    """The connections that the pool counts, the one idle for longest first, busy ones after."""
    pool = pool_of(client)
    return [*pool._unused, *(connection for connection in pool._states if connection not in pool._unused)]


def assert_at_rest(client: h2keep.AsyncClient) -> None:
    """No request is open, waits or is half forgotten, and every connection can be found for the next request."""
    assert_pool_at_rest(pool_of(client))


def assert_pool_at_rest(pool: Pool) -> None:
    """The same, in the event loop of whatever pool it is."""
    assert pool._count.dials == 0
    assert not any(state.waiting for state in pool._starved)
    for state in pool._origins.values():
        assert (state.dials, state.waiting, len(state.queue), state.hedging) == (0, 0, 0, False)
    for connection, state in pool._states.items():
        protocol = connection.protocol
        assert connection in state.connections
        assert (protocol.open_streams, protocol.keepalive.open_streams) == (0, 0)
        assert (protocol._streams, connection._streams, protocol._unread) == ({}, {}, 0)
        assert connection in pool._unused
        if protocol.accepting and protocol.max_streams > 0:
            assert connection in state.available or connection in state.unverified
            assert protocol.free_slots == protocol.max_streams - protocol._held_slots
