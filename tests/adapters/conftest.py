"""Both libraries in turn: what is tested of one adapter is tested of the other."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True)
class Library:
    """httpx or httpx2, and h2keep's front door for it."""

    name: str

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.name)

    @property
    def door(self) -> ModuleType:
        return importlib.import_module(f"h2keep.{self.name}")

    def transport(self, **options: Any) -> Any:
        return self.door.AsyncKeepaliveTransport(**options)

    def client(self, *, client: dict[str, Any] | None = None, **options: Any) -> Any:
        """An AsyncClient on our transport; `options` are the transport's, `client` the client's."""
        settings: dict[str, Any] = {"timeout": 10.0, "trust_env": False, **(client or {})}
        return self.module.AsyncClient(transport=self.transport(**options), **settings)


@pytest.fixture(params=["httpx", "httpx2"])
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)
