"""What a client is made to do, and what is measured meanwhile. Each workload is bounded in time and in requests."""

from __future__ import annotations

import gc
import http.client
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Self

import anyio

if TYPE_CHECKING:
    from benchmarks.candidates import Client

BODY = json.dumps({"prompt": "x" * 186}).encode()
MIB = 1 << 20
MAX_REQUESTS = 1_000_000
#: Requests that may fail in a span before it is given up.
MAX_FAILURES = 2_000

Metrics = dict[str, float]
Workload = Callable[["Client", "Parameters"], Awaitable[Metrics]]


@dataclass(frozen=True)
class Parameters:
    """One case's numbers, and where the server tells its own."""

    values: Mapping[str, float]
    stats: str

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def count(self, name: str) -> int:
        return int(self.values[name])


class Window:
    """The measured span: wall time, the CPU of the client (all its threads), of the server, and of everybody else."""

    def __init__(self, stats: str) -> None:
        self._stats = stats
        self._server_before: Mapping[str, Any] = {}
        self._wall = self._cpu = self._machine = 0.0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._server_before = self._server()
        self._machine = _machine_cpu()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._wall
        self._cpu = time.process_time() - self._cpu
        self._machine = _machine_cpu() - self._machine

    def metrics(self, units: float) -> Metrics:
        """What the span cost, given how many requests, events or MiB went through it."""
        after = self._server()
        server = after["cpu_seconds"] - self._server_before["cpu_seconds"]
        return {
            "units": units,
            "seconds": self.seconds,
            "per_second": units / self.seconds,
            "cpu_us": self._cpu / max(units, 1) * 1e6,
            "client_busy": self._cpu / self.seconds,
            "server_busy": server / self.seconds / after["procs"],
            "others_busy": max(0.0, self._machine - self._cpu - server) / self.seconds,
            "connections": after["connections"],
        }

    def _server(self) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = json.loads(aside(self._stats, "GET", "/stats"))
        return answer


def aside(stats: str, method: str, path: str) -> bytes:
    """Ask the server's other listener."""
    connection = http.client.HTTPConnection(stats, timeout=10)
    try:
        connection.request(method, path)
        return connection.getresponse().read()
    finally:
        connection.close()


def _machine_cpu() -> float:
    """Seconds of CPU that anybody has used on this machine, 0 where there is no /proc."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, _irq, _softirq, steal = map(int, fields[1:9])
    return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")


def resident() -> float:
    """Bytes of this process's memory that are in use; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def _post(client: Client, path: str) -> None:
    answer = await client.post(path, BODY)
    if len(answer) != 500:
        raise RuntimeError(f"an answer of 500 bytes was asked for, {len(answer)} came: {answer[:200]!r}")


async def rr(client: Client, p: Parameters) -> Metrics:
    """Small requests and small answers, `concurrency` at once: POST of 200 bytes of JSON, 500 bytes back."""
    path = "/answer?size=500"
    times: list[float] = []
    failed: list[Exception] = []

    async def ask(until: float) -> None:
        while (start := time.perf_counter()) < until and len(times) < MAX_REQUESTS:
            try:
                await _post(client, path)
                times.append(time.perf_counter() - start)
            except Exception as error:
                failed.append(error)
                if len(failed) > MAX_FAILURES:
                    raise

    async def ask_all(seconds: float) -> None:
        times.clear()
        failed.clear()
        until = time.perf_counter() + seconds
        async with anyio.create_task_group() as tasks:
            for _ in range(p.count("concurrency")):
                tasks.start_soon(ask, until)

    await _post(client, path)  # alone, so that the others find a connection to share
    await ask_all(p["warmup"])
    with Window(p.stats) as window:
        await ask_all(p["seconds"])
    if not times:
        raise failed[0]
    return window.metrics(len(times)) | latencies(times) | {"failed": len(failed)}


async def download(client: Client, p: Parameters) -> Metrics:
    """One large body after another. The rate is that of the median one; the first, whose windows had to grow, apart."""
    size = p.count("mib") * MIB
    path = f"/bytes?size={size}"
    seconds: list[float] = []
    await _post(client, "/answer?size=500")
    with Window(p.stats) as window:
        for _ in range(p.count("repeats")):
            start = time.perf_counter()
            received = 0
            async with client.chunks(path) as chunks:
                async for chunk in chunks:
                    received += len(chunk)
            if received != size:
                raise RuntimeError(f"{size} bytes were asked for, {received} came")
            seconds.append(time.perf_counter() - start)
    return window.metrics(p["mib"] * len(seconds)) | rates(p["mib"], seconds)


async def upload(client: Client, p: Parameters) -> Metrics:
    """As `download`, the other way: a body that is in memory as a whole, as a file that was read is."""
    content = bytes(p.count("mib") * MIB)
    seconds: list[float] = []
    await _post(client, "/answer?size=500")
    with Window(p.stats) as window:
        for _ in range(p.count("repeats")):
            start = time.perf_counter()
            arrived = await client.post("/sink", content)
            if int(arrived) != len(content):
                raise RuntimeError(f"{len(content)} bytes were sent, {arrived!r} arrived")
            seconds.append(time.perf_counter() - start)
    return window.metrics(p["mib"] * len(seconds)) | rates(p["mib"], seconds)


async def wan(client: Client, p: Parameters) -> Metrics:
    """`download` over a long, slow line: the share of it that is filled. What takes too long is left in the middle."""
    rate: list[float] = []
    await _post(client, "/answer?size=500")
    with Window(p.stats) as window:
        for _ in range(p.count("repeats")):
            start = time.perf_counter()
            received = 0
            async with client.chunks(f"/bytes?size={p.count('mib') * MIB}") as chunks:
                async for chunk in chunks:
                    received += len(chunk)
                    if time.perf_counter() - start > p["seconds"]:
                        break
            rate.append(received / (time.perf_counter() - start))
    link = p["mbit"] * 1e6 / 8
    measured = window.metrics(len(rate))
    return measured | {"of_link": percentile(rate, 0.5) / link, "first_of_link": rate[0] / link}


async def sse(client: Client, p: Parameters) -> Metrics:
    """Server-Sent Events as fast as they come, each flushed by the server."""
    await _post(client, "/answer?size=500")
    with Window(p.stats) as window:
        events = 0
        async with client.lines(f"/events?count={p.count('events')}") as lines:
            async for line in lines:
                events += line.startswith("data:")
    if events != p.count("events"):
        raise RuntimeError(f"{p.count('events')} events were asked for, {events} came")
    return window.metrics(events)


async def sse_bytes(client: Client, p: Parameters) -> Metrics:
    """`sse`, the bytes as they come, as for a proxy or a parser of one's own."""
    await _post(client, "/answer?size=500")
    with Window(p.stats) as window:
        newlines = 0
        async with client.chunks(f"/events?count={p.count('events')}") as chunks:
            async for chunk in chunks:
                newlines += chunk.count(b"\n")
    if newlines != 2 * p.count("events"):
        raise RuntimeError(f"{p.count('events')} events were asked for, {newlines / 2:g} came")
    return window.metrics(p["events"])


async def sse_singly(client: Client, p: Parameters) -> Metrics:
    """Server-Sent Events with pauses between.

    `singly` is the share of events that were handed over before the next one was sent: less than 1 means that the
    client holds some back. The time from sending to handing over is that of one clock, both being on one machine.
    """
    sent: list[int] = []
    arrived: list[int] = []
    await _post(client, "/answer?size=500")
    with Window(p.stats) as window:
        path = f"/events?count={p.count('events')}&interval={p['interval']}s"
        async with client.lines(path, live=True) as lines:
            async for line in lines:
                if line.startswith("data:"):
                    arrived.append(time.time_ns())
                    sent.append(json.loads(line[5:])["ns"])
    if len(sent) != p.count("events"):
        raise RuntimeError(f"{p.count('events')} events were asked for, {len(sent)} came")
    single = [came < following for came, following in zip(arrived, sent[1:], strict=False)]
    late = [(came - when) / 1e9 for came, when in zip(arrived, sent, strict=True)]
    return window.metrics(len(sent)) | {"singly": sum(single) / len(single)} | latencies(late)


async def bulk_latency(client: Client, p: Parameters) -> Metrics:
    """The time of small requests, one after the other, while downloads never pause on the same connection."""
    path = "/answer?size=500"
    times: list[float] = []
    received = 0

    async def bulk() -> None:
        nonlocal received
        while True:
            async with client.chunks(f"/bytes?size={256 * MIB}") as chunks:
                async for chunk in chunks:
                    received += len(chunk)

    await _post(client, path)
    async with anyio.create_task_group() as tasks:
        for _ in range(p.count("downloads")):
            tasks.start_soon(bulk)
        await anyio.sleep(p["warmup"])
        received = 0
        with Window(p.stats) as window:
            until = time.perf_counter() + p["seconds"]
            while (start := time.perf_counter()) < until and len(times) < MAX_REQUESTS:
                await _post(client, path)
                times.append(time.perf_counter() - start)
            mib = received / MIB
        tasks.cancel_scope.cancel()
    return window.metrics(mib) | {"requests": len(times)} | latencies(times)


async def fanin(client: Client, p: Parameters) -> Metrics:
    """Slow answers, `concurrency` in flight at all times.

    Compare two cases of the same `concurrency` / `wait`, about the number of requests a second: then only how many
    are in flight differs. Each answer takes within a quarter more or less than `wait`, lest they come in bunches.
    Measured is the time when all have started and none has stopped.
    """
    number, wait = p.count("concurrency"), p["wait"]
    ramp = max(wait, 1.0)
    late: list[float] = []
    started = 0
    all_started = anyio.Event()
    random = Random(1)

    async def ask(delay: float) -> None:
        nonlocal started
        await anyio.sleep(delay)
        started += 1
        if started == number:
            all_started.set()
        while True:
            mine = wait * random.uniform(0.75, 1.25)
            start = time.perf_counter()
            await _post(client, f"/answer?size=500&wait={mine:.6f}s")
            late.append(time.perf_counter() - start - mine)

    await _post(client, "/answer?size=500")
    async with anyio.create_task_group() as tasks:
        for i in range(number):
            tasks.start_soon(ask, i / number * ramp)
        await anyio.sleep(ramp)
        # A client that is behind has them all under way only later.
        await all_started.wait()
        await anyio.sleep(p["warmup"])
        late.clear()
        with Window(p.stats) as window:
            await anyio.sleep(p["seconds"])
        done = list(late)
        tasks.cancel_scope.cancel()
    return window.metrics(len(done)) | (latencies(done) if done else {})


async def slow(client: Client, p: Parameters) -> Metrics:
    """`requests` at once, each answered after `wait` seconds: more than one connection's streams."""
    path = f"/answer?size=500&wait={p['wait']}s"
    await _post(client, "/answer?size=500")
    gc.collect()
    before = peak = resident()
    with Window(p.stats) as window:
        async with anyio.create_task_group() as all_requests:
            for _ in range(p.count("requests")):
                all_requests.start_soon(_post, client, path)
            await anyio.sleep(p["wait"] / 2)
            peak = resident()
    peak = max(peak, resident())
    return window.metrics(p["requests"]) | {"grown_mib": (peak - before) / MIB}


async def idle(client: Client, p: Parameters) -> Metrics:
    """Many connections that nobody uses: an origin for each, one request, and then nothing but PINGs."""
    addresses = json.loads(aside(p.stats, "GET", "/addresses"))[: p.count("connections")]
    waiting = iter(addresses)

    async def connect() -> None:
        for address in waiting:
            await _post(client, f"https://{address}/answer?size=500")

    await _post(client, "/answer?size=500")
    gc.collect()
    before = resident()
    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(connect)
    await anyio.sleep(p["warmup"])
    gc.collect()
    grown = resident() - before
    with Window(p.stats) as window:
        await anyio.sleep(p["seconds"])
    measured = window.metrics(len(addresses))
    return measured | {
        "resident_kib": grown / 1024 / len(addresses),
        "busy_per_thousand": measured["client_busy"] / len(addresses) * 1000,
    }


async def reconnect(client: Client, p: Parameters) -> Metrics:
    """A request whose connection the server closed a moment ago: what a new one costs, TCP and TLS included.

    CPU is that of these requests alone, as `cpu_us`. Some clients fail on the connection that was closed, and need to
    be asked again: that counts as failed, and its time as theirs.
    """
    times: list[float] = []
    cpu = 0.0
    failed = 0
    await _post(client, "/answer?size=500")
    with Window(p.stats) as window:
        for _ in range(p.count("repeats")):
            aside(p.stats, "POST", "/close")
            await anyio.sleep(p["pause"])
            before, start = time.process_time(), time.perf_counter()
            try:
                await _post(client, "/answer?size=500")
            except Exception:  # noqa: BLE001
                # Whatever it is: only that it happens is of interest.
                failed += 1
                await _post(client, "/answer?size=500")
            times.append(time.perf_counter() - start)
            cpu += time.process_time() - before
    measured = window.metrics(len(times)) | latencies(times)
    return measured | {"cpu_us": cpu / len(times) * 1e6, "failed": failed}


def rates(mib: float, seconds: Sequence[float]) -> Metrics:
    return {"per_second": mib / percentile(seconds, 0.5), "first": mib / seconds[0]}


def latencies(times: Sequence[float]) -> Metrics:
    return {"p50_ms": percentile(times, 0.5) * 1e3, "p99_ms": percentile(times, 0.99) * 1e3}


WORKLOADS: Mapping[str, Workload] = {
    "rr": rr,
    "download": download,
    "upload": upload,
    "wan": wan,
    "sse": sse,
    "sse-bytes": sse_bytes,
    "sse-singly": sse_singly,
    "bulk-latency": bulk_latency,
    "fanin": fanin,
    "slow": slow,
    "idle": idle,
    "reconnect": reconnect,
}
