"""h2keep for httpx2: replace `AsyncHTTPTransport` by `AsyncKeepaliveTransport`, and HTTP/2 connections stay alive."""

from __future__ import annotations

import httpx2

from h2keep._transport import AsyncTransport, Library

__all__ = ["AsyncKeepaliveTransport"]


class AsyncKeepaliveTransport(AsyncTransport, httpx2.AsyncBaseTransport):
    """AsyncHTTPTransport with HTTP/2 connections that stay alive; arguments as in `AsyncTransport`."""

    _library = Library(httpx2)
