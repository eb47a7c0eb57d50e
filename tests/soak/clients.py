"""What a soak asks for: clients of every kind, and requests that are different each time."""

from __future__ import annotations

import hashlib
import importlib
import ssl
import time
from typing import TYPE_CHECKING, Any

import anyio

import h2keep
from soak.server import pattern

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Iterator

__all__ = ["CONNECTIONS", "Door", "OwnError", "Request"]

#: Connections that a client may have.
CONNECTIONS = 3


class OwnError(Exception):
    """What a body's iterator raises."""


class Request:
    """One request as the random generator has it."""

    def __init__(self, chance: random.Random, name: str, base: str, *, calm: bool = False) -> None:
        self.name = name
        self.url = f"{base}/{chance.randrange(5)}"
        self.method = chance.choices(("GET", "POST", "HEAD"), (4, 6, 1))[0]
        self.want = chance.choice((0, 10, 500, 500, 500, 20_000, 300_000, 2_000_000))
        self.bring = chance.choice((0, 200, 200, 5_000, 60_000, 400_000)) if self.method == "POST" else 0
        self.patient = not calm and chance.random() < 0.2
        self.headers = {"x-id": name, "x-want": str(self.want), "x-bring": str(self.bring)}
        if self.patient:
            self.headers["x-patient"] = "1"
        if chance.random() < 0.2:
            self.headers["x-filler"] = "f" * chance.randrange(2_000)
        if chance.random() < 0.1:
            self.headers["authorization"] = f"Bearer {chance.random()}"
        self.streams = self.method == "POST" and chance.random() < 0.5
        self.declares = self.streams and chance.random() < 0.5
        if self.declares:
            self.headers["content-length"] = str(self.bring)
        self.fails_at = chance.randrange(self.bring + 1) if self.streams and chance.random() < 0.15 else None
        self.pause = chance.choice((0, 0, 0, 0.001, 0.05))
        # No more pieces than a slow iterator gives in a second.
        self.piece = max(chance.choice((100, 5_000, 70_000)), self.bring // (20 if self.pause else 200))

    def meet(self, meeting: str, count: int) -> None:
        """It is to be answered when so many of its kind are there, and is to succeed."""
        self.headers["x-meet"] = f"{meeting} {count}"
        self.want = min(self.want, 20_000)
        self.headers["x-want"] = str(self.want)
        self.fails_at, self.pause = None, 0

    def only_fetch(self, size: int) -> None:
        """Make a mere GET of it, for so many bytes."""
        self.method, self.want, self.bring, self.streams, self.patient = "GET", size, 0, False, False
        self.headers = {"x-id": self.name, "x-want": str(size), "x-bring": "0"}

    def chunks(self) -> Iterator[bytes]:
        body = pattern(self.name + "-up", self.bring)
        for start in range(0, len(body), self.piece):
            if self.fails_at is not None and start + self.piece > self.fails_at:
                raise OwnError
            yield body[start : start + self.piece]

    async def achunks(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks():
            if self.pause:
                await anyio.sleep(self.pause)
            yield chunk

    def slow_chunks(self) -> Iterator[bytes]:
        for chunk in self.chunks():
            if self.pause:
                time.sleep(self.pause)
            yield chunk

    def check(self, status: int, headers: Any, body: bytes, *, whole: bool) -> None:
        """Raises AssertionError unless that is what the server sent."""
        want = 0 if self.method == "HEAD" else self.want
        assert status == 200, status
        assert headers["x-id"] == self.name, (headers["x-id"], self.name)
        expected = pattern(self.name, want)
        assert len(body) <= want, (self.name, len(body), want)
        assert expected.startswith(body), (self.name, "other bytes")
        if whole:
            assert len(body) == want, (self.name, "cut short", len(body), want)
            digest = headers["x-digest"]
            own = hashlib.sha256(pattern(self.name + "-up", self.bring)).hexdigest()
            assert digest in ("early", own), (self.name, digest)


class Door:
    """A way to make clients, their timeouts, and responses that are forgotten."""

    def __init__(self, name: str, engine: str, hello: dict[str, str], chance: random.Random, **options: Any) -> None:
        self.name = name
        scheme = chance.choice(("http", "https"))
        self.base = hello[scheme]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=hello["ca"])
        keepalive = h2keep.Keepalive(read_idle_timeout=1.0, ping_timeout=0.7, while_idle=chance.random() < 0.3)
        self._options = {"verify": context, "http1": False, "engine": engine, "keepalive": keepalive, **options}
        self._expiry = chance.choice((0.2, 5.0, None))
        self._age = chance.choice((None, None, 1.0))
        self._retries = chance.choice((0, 2))

    def client(self, *, threaded: bool) -> Any:
        options = self._options | {"retries": self._retries}
        if self.name == "h2keep":
            limits = h2keep.Limits(CONNECTIONS, CONNECTIONS, self._expiry, self._age)
            own = {"limits": limits, "trust_env": False, **options}
            return h2keep.Client(**own) if threaded else h2keep.AsyncClient(**own)
        library = importlib.import_module(self.name)
        ours = importlib.import_module(f"h2keep.{self.name}")
        limits = library.Limits(
            max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS, keepalive_expiry=self._expiry
        )
        kind = ours.KeepaliveTransport if threaded else ours.AsyncKeepaliveTransport
        transport = kind(limits=limits, trust_env=False, max_connection_age=self._age, **options)
        return (library.Client if threaded else library.AsyncClient)(transport=transport, trust_env=False)

    def timeout(self, chance: random.Random, *, patient: bool) -> Any:
        seconds = [None] * 4 if patient else [3.0, chance.choice((0.3, 1.5)), chance.choice((0.5, 1.5)), 3.0]
        return self.timeout_of(*seconds)

    def timeout_of(self, connect: float | None, read: float | None, write: float | None, pool: float | None) -> Any:
        kind = h2keep.Timeout if self.name == "h2keep" else importlib.import_module(self.name).Timeout
        return kind(connect=connect, read=read, write=write, pool=pool)

    def is_expected(self, error: BaseException, *, closed: bool) -> bool:
        """Whether a request may fail so."""
        if isinstance(error, (h2keep.H2KeepError, OwnError)):
            return True
        if self.name != "h2keep":
            library = importlib.import_module(self.name)
            if isinstance(error, (library.StreamClosed, library.StreamConsumed)):
                return True
        # httpx's own word for the first, ours for two that read one response.
        text = str(error)
        return isinstance(error, RuntimeError) and (
            (closed and "closed" in text) or "wait for the same thing" in text or "been read already" in text
        )
