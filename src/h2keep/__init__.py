"""HTTP/2 connections that stay alive: PING keepalive for Python, and clients and transports built on it.

The public names, and nothing else. They are loaded at first use, so that the pure parts (`h2keep.protocol`) can be
imported without the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h2keep._install import install, uninstall
    from h2keep.client import AsyncClient, Headers, Response
    from h2keep.errors import (
        ConnectError,
        ConnectionGoingAway,
        ConnectionLost,
        ConnectTimeout,
        H2KeepError,
        HTTP2NotSupported,
        LocalProtocolError,
        PingTimeout,
        PoolTimeout,
        ProtocolError,
        ProxyError,
        ReadError,
        ReadTimeout,
        RemoteProtocolError,
        StreamReset,
        UnsupportedProtocol,
        WriteError,
        WriteTimeout,
    )
    from h2keep.keepalive import Keepalive
    from h2keep.runner.limits import Limits
    from h2keep.runner.proxy import Proxy
    from h2keep.runner.request import Timeout
    from h2keep.runner.stats import ConnectionStats
    from h2keep.sync import Client, SyncResponse

__all__ = [
    "AsyncClient",
    "Client",
    "ConnectError",
    "ConnectTimeout",
    "ConnectionGoingAway",
    "ConnectionLost",
    "ConnectionStats",
    "H2KeepError",
    "HTTP2NotSupported",
    "Headers",
    "Keepalive",
    "Limits",
    "LocalProtocolError",
    "PingTimeout",
    "PoolTimeout",
    "ProtocolError",
    "Proxy",
    "ProxyError",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "Response",
    "StreamReset",
    "SyncResponse",
    "Timeout",
    "UnsupportedProtocol",
    "WriteError",
    "WriteTimeout",
    "install",
    "uninstall",
]

_HOMES = {
    "h2keep._install": ("install", "uninstall"),
    "h2keep.client": ("AsyncClient", "Headers", "Response"),
    "h2keep.keepalive": ("Keepalive",),
    "h2keep.runner.stats": ("ConnectionStats",),
    "h2keep.runner.limits": ("Limits",),
    "h2keep.runner.request": ("Timeout",),
    "h2keep.runner.proxy": ("Proxy",),
    "h2keep.sync": ("Client", "SyncResponse"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF.get(name, "h2keep.errors")), name)
    globals()[name] = value
    return value
