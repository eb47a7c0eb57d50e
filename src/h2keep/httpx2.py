"""h2keep for httpx2: replace its transports by these, and HTTP/2 connections stay alive.

`AsyncKeepaliveTransport` stands for `AsyncHTTPTransport`, `KeepaliveTransport` for `HTTPTransport`.
"""

from __future__ import annotations

import httpx2

from h2keep._library import Library
from h2keep._transport import AsyncTransport, Transport

__all__ = ["AsyncKeepaliveTransport", "KeepaliveTransport"]

#: One set of exceptions for all that stands on httpx2.
library = Library(httpx2)


class AsyncKeepaliveTransport(AsyncTransport, httpx2.AsyncBaseTransport):
    """AsyncHTTPTransport with HTTP/2 connections that stay alive; for its arguments see `h2keep._transport`."""

    _library = library


class KeepaliveTransport(Transport, httpx2.BaseTransport):
    """HTTPTransport with HTTP/2 connections that stay alive; for its arguments see `h2keep._transport`."""

    _library = library
