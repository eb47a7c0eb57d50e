"""What a client is made to do, and what is measured meanwhile. Each workload is bounded in time and in requests."""

from __future__ import annotations

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
        connection = http.client.HTTPConnection(self._stats, timeout=10)
        try:
            connection.request("GET", "/stats")
            answer: Mapping[str, Any] = json.load(connection.getresponse())
        finally:
            connection.close()
        return answer


def _machine_cpu() -> float:
    """Seconds of CPU that anybody has used on this machine, 0 where there is no /proc."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, _irq, _softirq, steal = map(int, fields[1:9])
    return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")


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

    async def ask(until: float) -> None:
        while (start := time.perf_counter()) < until and len(times) < MAX_REQUESTS:
            await _post(client, path)
            times.append(time.perf_counter() - start)

    async def ask_all(seconds: float) -> None:
        times.clear()
        until = time.perf_counter() + seconds
        async with anyio.create_task_group() as tasks:
            for _ in range(p.count("concurrency")):
                tasks.start_soon(ask, until)

    await _post(client, path)  # alone, so that the others find a connection to share
    await ask_all(p["warmup"])
    with Window(p.stats) as window:
        await ask_all(p["seconds"])
    return window.metrics(len(times)) | latencies(times)


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
    measured = window.metrics(p["mib"] * len(seconds))
    return measured | {"per_second": p["mib"] / percentile(seconds, 0.5), "first": p["mib"] / seconds[0]}


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
    random = Random(1)

    async def ask(delay: float) -> None:
        await anyio.sleep(delay)
        while True:
            mine = wait * random.uniform(0.75, 1.25)
            start = time.perf_counter()
            await _post(client, f"/answer?size=500&wait={mine:.6f}s")
            late.append(time.perf_counter() - start - mine)

    await _post(client, "/answer?size=500")
    async with anyio.create_task_group() as tasks:
        for i in range(number):
            tasks.start_soon(ask, i / number * ramp)
        await anyio.sleep(ramp + p["warmup"])
        late.clear()
        with Window(p.stats) as window:
            await anyio.sleep(p["seconds"])
        done = list(late)
        tasks.cancel_scope.cancel()
    return window.metrics(len(done)) | (latencies(done) if done else {})


def latencies(times: Sequence[float]) -> Metrics:
    return {"p50_ms": percentile(times, 0.5) * 1e3, "p99_ms": percentile(times, 0.99) * 1e3}


WORKLOADS: Mapping[str, Workload] = {
    "rr": rr,
    "download": download,
    "sse": sse,
    "sse-singly": sse_singly,
    "bulk-latency": bulk_latency,
    "fanin": fanin,
}
