"""The same clients without async, and what threads make them do."""

from __future__ import annotations

import ctypes
import functools
import gc
import random
import threading
import time
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.candidates import HEADERS, PIECE, TIMEOUT, RawTls, Target, h2keep_options, null_body
from benchmarks.workloads import (
    BODY,
    MAX_FAILURES,
    MAX_REQUESTS,
    MIB,
    Metrics,
    Parameters,
    Window,
    latencies,
    percentile,
    rates,
    resident,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import httpx2

__all__ = ["CANDIDATES", "WORKLOADS"]

#: glibc's: how much free memory may stay at an arena's end. To set it ends that glibc chooses it by what is freed.
M_TRIM_THRESHOLD = -1
#: Seconds after the measured span in which requests that are still under way may end.
GRACE = 2.0


class Client(Protocol):
    """One client, for many threads."""

    def post(self, path: str, body: bytes) -> bytes: ...

    def chunks(self, path: str) -> AbstractContextManager[Iterator[bytes]]: ...


class HttpxLike:
    """A client of httpx or httpx2, or h2keep's own."""

    def __init__(self, client: Any, base: str) -> None:
        self._client = client
        self._base = base

    def post(self, path: str, body: bytes) -> bytes:
        content: bytes = self._client.post(self._base + path, content=body, headers=HEADERS).content
        return content

    @contextmanager
    def chunks(self, path: str) -> Iterator[Iterator[bytes]]:
        with self._client.stream("GET", self._base + path) as response:
            yield response.iter_bytes()


class Niquests:
    """niquests' session."""

    def __init__(self, session: Any, base: str) -> None:
        self._session = session
        self._base = base

    def post(self, path: str, body: bytes) -> bytes:
        content: bytes = self._session.post(self._base + path, data=body, headers=HEADERS).content
        return content

    @contextmanager
    def chunks(self, path: str) -> Iterator[Iterator[bytes]]:
        with self._session.get(self._base + path, stream=True) as response:
            yield response.iter_content(PIECE)


class Floor:
    """One blocking TLS socket, as it is."""

    def __init__(self, raw: RawTls) -> None:
        self._raw = raw

    def post(self, path: str, body: bytes) -> bytes:
        return self._raw.post_blocking(path, body)

    @contextmanager
    def chunks(self, path: str) -> Iterator[Iterator[bytes]]:
        yield self._raw.copy(path)


@contextmanager
def _h2keep(engine: str, target: Target) -> Iterator[Client]:
    from h2keep import Client as H2KeepClient
    from h2keep import Limits

    with H2KeepClient(timeout=TIMEOUT, **h2keep_options(target, engine, Limits)) as client:
        yield HttpxLike(client, target.url)


@contextmanager
def _h2keep_httpx2(engine: str, target: Target) -> Iterator[Client]:
    import httpx2

    from h2keep.httpx2 import KeepaliveTransport

    transport = KeepaliveTransport(**h2keep_options(target, engine, httpx2.Limits))
    with httpx2.Client(transport=transport, timeout=TIMEOUT) as client:
        yield HttpxLike(client, target.url)


@contextmanager
def _h2keep_httpx(engine: str, target: Target) -> Iterator[Client]:
    import httpx

    from h2keep.httpx import KeepaliveTransport

    transport = KeepaliveTransport(**h2keep_options(target, engine, httpx.Limits))
    with httpx.Client(transport=transport, timeout=TIMEOUT) as client:
        yield HttpxLike(client, target.url)


@contextmanager
def _httpx2(target: Target) -> Iterator[Client]:
    import httpx2

    with httpx2.Client(http2=True, verify=target.trust(), timeout=TIMEOUT) as client:
        yield HttpxLike(client, target.url)


@contextmanager
def _httpx(target: Target) -> Iterator[Client]:
    import httpx

    with httpx.Client(http2=True, verify=target.trust(), timeout=TIMEOUT) as client:
        yield HttpxLike(client, target.url)


@contextmanager
def _pyreqwest_httpx(target: Target) -> Iterator[Client]:
    import httpx
    from pyreqwest.client import SyncClientBuilder
    from pyreqwest.compatibility.httpx import SyncHttpxTransport

    builder = SyncClientBuilder().http2(True).add_root_certificate_pem(target.ca.read_bytes())
    transport = SyncHttpxTransport(builder.timeout(timedelta(seconds=TIMEOUT)).build())
    with httpx.Client(transport=transport, timeout=TIMEOUT) as client:
        yield HttpxLike(client, target.url)


@contextmanager
def _niquests(target: Target) -> Iterator[Client]:
    import niquests

    with niquests.Session(timeout=TIMEOUT) as session:
        # Else REQUESTS_CA_BUNDLE has precedence over what is said here.
        session.trust_env = False
        session.verify = str(target.ca)
        yield Niquests(session, target.url)


@contextmanager
def _raw_tls(target: Target) -> Iterator[Client]:
    with closing(RawTls(target)) as raw:
        yield Floor(raw)


@contextmanager
def _null_httpx2(target: Target) -> Iterator[Client]:
    """No network at all: what httpx2 itself costs, which no transport can save."""
    import httpx2

    with httpx2.Client(transport=_null_transport(), timeout=TIMEOUT) as client:
        yield HttpxLike(client, target.url)


def _null_transport() -> httpx2.BaseTransport:
    import httpx2

    class Body(httpx2.SyncByteStream):
        def __init__(self, pieces: Iterator[bytes]) -> None:
            self._pieces = pieces

        def __iter__(self) -> Iterator[bytes]:
            return self._pieces

    class Null(httpx2.BaseTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            body = Body(null_body(request.url.params))
            return httpx2.Response(200, headers=[(b"content-type", b"application/json")], stream=body)

    return Null()


CANDIDATES: Mapping[str, Callable[[Target], AbstractContextManager[Client]]] = {
    "h2keep": functools.partial(_h2keep, "h2"),
    "h2keep-ngh2": functools.partial(_h2keep, "ngh2"),
    "h2keep-httpx2": functools.partial(_h2keep_httpx2, "h2"),
    "h2keep-httpx2-ngh2": functools.partial(_h2keep_httpx2, "ngh2"),
    "h2keep-httpx": functools.partial(_h2keep_httpx, "h2"),
    "h2keep-httpx-ngh2": functools.partial(_h2keep_httpx, "ngh2"),
    "httpx2": _httpx2,
    "httpx": _httpx,
    "pyreqwest-httpx": _pyreqwest_httpx,
    "niquests": _niquests,
    "null-httpx2": _null_httpx2,
    "raw-tls": _raw_tls,
}


def _in_threads(number: int, run: Callable[[int], None], patience: float | None = None) -> int:
    """Run in so many threads; how many of them have not ended when the patience has. The first failure is raised."""
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            run(index)
        except BaseException as error:  # noqa: BLE001
            # Threads have nobody above them to raise it to.
            failures.append(error)

    # Daemons, as one that waits for an answer that never comes must not keep the process.
    threads = [threading.Thread(target=guarded, args=(index,), daemon=True) for index in range(number)]
    until = None if patience is None else time.monotonic() + patience
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(None if until is None else max(0.0, until - time.monotonic()))
    if failures:
        raise failures[0]
    return sum(thread.is_alive() for thread in threads)


def _post(client: Client, path: str) -> None:
    answer = client.post(path, BODY)
    if len(answer) != 500:
        raise RuntimeError(f"an answer of 500 bytes was asked for, {len(answer)} came: {answer[:200]!r}")


def threads(client: Client, p: Parameters) -> Metrics:
    """`rr`, with a thread for each of those that are under way at once.

    A request that fails is counted, and so is one that is still unanswered well after the end: some clients lose
    requests when threads share them.
    """
    path = "/answer?size=500"
    times: list[float] = []
    failed: list[Exception] = []

    def ask_all(seconds: float) -> int:
        times.clear()
        failed.clear()
        until = time.perf_counter() + seconds

        def ask(_: int) -> None:
            while (start := time.perf_counter()) < until and len(times) < MAX_REQUESTS:
                try:
                    _post(client, path)
                    times.append(time.perf_counter() - start)
                except Exception as error:
                    failed.append(error)
                    if len(failed) > MAX_FAILURES:
                        raise

        return _in_threads(p.count("concurrency"), ask, seconds + GRACE)

    _post(client, path)
    ask_all(p["warmup"])
    with Window(p.stats) as window:
        stuck = ask_all(p["seconds"])
    if not times:
        raise failed[0] if failed else TimeoutError("no request was answered")
    return window.metrics(len(times)) | latencies(times) | {"failed": len(failed) + stuck}


def download(client: Client, p: Parameters) -> Metrics:
    """`download`, in one thread."""
    size = p.count("mib") * MIB
    seconds: list[float] = []
    _post(client, "/answer?size=500")
    with Window(p.stats) as window:
        for _ in range(p.count("repeats")):
            start = time.perf_counter()
            with client.chunks(f"/bytes?size={size}") as chunks:
                received = sum(map(len, chunks))
            if received != size:
                raise RuntimeError(f"{size} bytes were asked for, {received} came")
            seconds.append(time.perf_counter() - start)
    return window.metrics(p["mib"] * len(seconds)) | rates(p["mib"], seconds)


def storm(client: Client, p: Parameters) -> Metrics:
    """Many threads, of whose requests every third is given up at a random moment; again and again.

    `grown` is by how much more memory is in use after the last three rounds than after those from the second to the
    fourth, as a share of medians: the first lets caches settle, and single rounds show the allocator's moods.

    What is free is given back before memory is looked at, where the C library can do that. It keeps the most that each
    thread's arena ever held, and with the rounds that only grows, whoever is measured: as a hundred threads' bodies
    happen to meet.
    """
    give_back = _let_memory_be_given_back()
    rounds: list[float] = []
    done = [0, 0]

    def one_round(number: int) -> None:
        def ask(index: int) -> None:
            chance = random.Random(number * 1_000 + index)
            for _ in range(p.count("requests")):
                if chance.random() < 1 / 3:
                    with client.chunks(f"/bytes?size={MIB}") as chunks:
                        for _ in range(chance.randrange(3)):
                            next(chunks, b"")
                    done[1] += 1
                else:
                    _post(client, "/answer?size=500")
                    done[0] += 1

        _in_threads(p.count("concurrency"), ask)
        gc.collect()
        give_back(0)
        rounds.append(resident())

    _post(client, "/answer?size=500")
    with Window(p.stats) as window:
        for number in range(p.count("rounds")):
            one_round(number)
    total = p.count("rounds") * p.count("concurrency") * p.count("requests")
    if len(rounds) != p.count("rounds") or abs(sum(done) - total) > total // 100:
        raise RuntimeError(f"{total} requests were to be made, {done} were")
    grown = percentile(rounds[-3:], 0.5) / percentile(rounds[1:4], 0.5) - 1
    return window.metrics(total) | {"grown": grown, "resident_mib": rounds[-1] / MIB}


def _let_memory_be_given_back() -> Callable[[int], object]:
    """What gives back to the system, from now on, all but so many bytes of what is free."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return int
    libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
    give_back: Callable[[int], object] = libc.malloc_trim
    return give_back


WORKLOADS: Mapping[str, Callable[[Client, Parameters], Metrics]] = {
    "threads": threads,
    "blocking-download": download,
    "storm": storm,
}
