"""h2keep for httpx: replace its transports by these, and HTTP/2 connections stay alive.

`AsyncKeepaliveTransport` stands for `AsyncHTTPTransport`, `KeepaliveTransport` for `HTTPTransport`.
"""

from __future__ import annotations

import httpx

from h2keep._library import Library
from h2keep._transport import AsyncTransport, Transport

__all__ = ["AsyncKeepaliveTransport", "KeepaliveTransport"]

#: One set of exceptions for all that stands on httpx.
library = Library(httpx)


class AsyncKeepaliveTransport(AsyncTransport, httpx.AsyncBaseTransport):
    """AsyncHTTPTransport with HTTP/2 connections that stay alive; for its arguments see `h2keep._transport`."""

    _library = library


class KeepaliveTransport(Transport, httpx.BaseTransport):
    """HTTPTransport with HTTP/2 connections that stay alive; for its arguments see `h2keep._transport`."""

    _library = library
