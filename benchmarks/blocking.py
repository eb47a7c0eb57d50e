"""The same clients without async, and what threads make them do."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.candidates import HEADERS, TIMEOUT, trust
from benchmarks.workloads import BODY, MAX_REQUESTS, MIB, Metrics, Parameters, Window, latencies, percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["CANDIDATES", "WORKLOADS"]


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


@contextmanager
def _h2keep(base: str, ca: Path) -> Iterator[Client]:
    from h2keep import Client as H2KeepClient

    with H2KeepClient(verify=trust(ca)) as client:
        yield HttpxLike(client, base)


@contextmanager
def _h2keep_httpx2(base: str, ca: Path) -> Iterator[Client]:
    import httpx2

    from h2keep.httpx2 import KeepaliveTransport

    with httpx2.Client(transport=KeepaliveTransport(verify=trust(ca)), timeout=TIMEOUT) as client:
        yield HttpxLike(client, base)


@contextmanager
def _h2keep_httpx(base: str, ca: Path) -> Iterator[Client]:
    import httpx

    from h2keep.httpx import KeepaliveTransport

    with httpx.Client(transport=KeepaliveTransport(verify=trust(ca)), timeout=TIMEOUT) as client:
        yield HttpxLike(client, base)


@contextmanager
def _httpx2(base: str, ca: Path) -> Iterator[Client]:
    import httpx2

    with httpx2.Client(http2=True, verify=trust(ca), timeout=TIMEOUT) as client:
        yield HttpxLike(client, base)


@contextmanager
def _httpx(base: str, ca: Path) -> Iterator[Client]:
    import httpx

    with httpx.Client(http2=True, verify=trust(ca), timeout=TIMEOUT) as client:
        yield HttpxLike(client, base)


@contextmanager
def _pyreqwest_httpx(base: str, ca: Path) -> Iterator[Client]:
    import httpx
    from pyreqwest.client import SyncClientBuilder
    from pyreqwest.compatibility.httpx import SyncHttpxTransport

    builder = SyncClientBuilder().http2(True).add_root_certificate_pem(ca.read_bytes())
    transport = SyncHttpxTransport(builder.timeout(timedelta(seconds=TIMEOUT)).build())
    with httpx.Client(transport=transport, timeout=TIMEOUT) as client:
        yield HttpxLike(client, base)


CANDIDATES: Mapping[str, Callable[[str, Path], AbstractContextManager[Client]]] = {
    "h2keep": _h2keep,
    "h2keep-httpx2": _h2keep_httpx2,
    "h2keep-httpx": _h2keep_httpx,
    "httpx2": _httpx2,
    "httpx": _httpx,
    "pyreqwest-httpx": _pyreqwest_httpx,
}


def _in_threads(number: int, run: Callable[[int], None]) -> None:
    """Run in so many threads; the first failure is raised when all have ended."""
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            run(index)
        except BaseException as error:  # noqa: BLE001
            # Threads have nobody above them to raise it to.
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _post(client: Client, path: str) -> None:
    answer = client.post(path, BODY)
    if len(answer) != 500:
        raise RuntimeError(f"an answer of 500 bytes was asked for, {len(answer)} came: {answer[:200]!r}")


def threads(client: Client, p: Parameters) -> Metrics:
    """`rr`, with a thread for each of those that are under way at once."""
    path = "/answer?size=500"
    times: list[float] = []

    def ask_all(seconds: float) -> None:
        times.clear()
        until = time.perf_counter() + seconds

        def ask(_: int) -> None:
            while (start := time.perf_counter()) < until and len(times) < MAX_REQUESTS:
                _post(client, path)
                times.append(time.perf_counter() - start)

        _in_threads(p.count("concurrency"), ask)

    _post(client, path)
    ask_all(p["warmup"])
    with Window(p.stats) as window:
        ask_all(p["seconds"])
    return window.metrics(len(times)) | latencies(times)


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
    measured = window.metrics(p["mib"] * len(seconds))
    return measured | {"per_second": p["mib"] / percentile(seconds, 0.5), "first": p["mib"] / seconds[0]}


def storm(client: Client, p: Parameters) -> Metrics:
    """Many threads, of whose requests every third is given up at a random moment; again and again.

    `grown` is by how much more memory is in use after the last round than after the second, as a share: the rounds
    before let caches and the allocator settle.
    """
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
        rounds.append(_resident())

    _post(client, "/answer?size=500")
    with Window(p.stats) as window:
        for number in range(p.count("rounds")):
            one_round(number)
    total = p.count("rounds") * p.count("concurrency") * p.count("requests")
    if len(rounds) != p.count("rounds") or abs(sum(done) - total) > total // 100:
        raise RuntimeError(f"{total} requests were to be made, {done} were")
    return window.metrics(total) | {"grown": rounds[-1] / rounds[1] - 1, "resident_mib": rounds[-1] / MIB}


def _resident() -> float:
    """Bytes of this process's memory that are in use; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0


WORKLOADS: Mapping[str, Callable[[Client, Parameters], Metrics]] = {
    "threads": threads,
    "blocking-download": download,
    "storm": storm,
}
