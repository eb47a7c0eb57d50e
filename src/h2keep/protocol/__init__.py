"""HTTP/2 without I/O: `Connection` and its events. Imports no socket, TLS, clock or task."""

from h2keep.protocol.connection import Connection

__all__ = ["Connection"]
