"""What connections that come and go cost a program: which requests fail, and which are processed twice.

    python -m benchmarks.pool                                   # both, all candidates, 20,000 requests each
    python -m benchmarks.pool goaway --candidates h2keep httpx2 --quick
    python -m benchmarks.pool --json benchmarks/results/pool.json --doc docs/pool.md

* `goaway`: Go's own server says GOAWAY after every 200 requests on a connection, while 16 tasks or threads go on.
* `caddy`: Caddy, a reverse proxy here, is given a new configuration every half second, and retires its connections.

It is about counts, not about speed: the time a candidate took is told, and says little. The Go server counts what it
processes; behind Caddy it is the upstream. `--doc` puts the numbers into a page as tables.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx2
import trustme

import h2keep
import h2keep.httpx2
from benchmarks.server import HERE, Kit, build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

SOURCE = HERE / "poolserver"
BINARY = HERE / ".build" / "poolserver"
WORKERS = 16
EVERY = 200
TIMEOUT = 15.0
BODY = b"x" * 200
#: Reaches loopback directly, whatever the environment says.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


# Who is compared


@dataclass(frozen=True)
class Candidate:
    """How to make a client that trusts `context`, and whether it is for threads."""

    open: Callable[[ssl.SSLContext], Any]
    blocking: bool = False


def _httpx2_over_h2keep(context: ssl.SSLContext) -> httpx2.AsyncClient:
    transport = h2keep.httpx2.AsyncKeepaliveTransport(verify=context, trust_env=False)
    return httpx2.AsyncClient(transport=transport, timeout=TIMEOUT)


def _httpx2_over_h2keep_in_threads(context: ssl.SSLContext) -> httpx2.Client:
    transport = h2keep.httpx2.KeepaliveTransport(verify=context, trust_env=False)
    return httpx2.Client(transport=transport, timeout=TIMEOUT)


STOCK: dict[str, Any] = {"http2": True, "trust_env": False, "timeout": TIMEOUT}
OWN: dict[str, Any] = {"timeout": h2keep.Timeout(TIMEOUT, TIMEOUT, TIMEOUT, TIMEOUT), "trust_env": False}
CANDIDATES = {
    "h2keep": Candidate(lambda context: h2keep.AsyncClient(verify=context, **OWN)),
    "h2keep, threads": Candidate(lambda context: h2keep.Client(verify=context, **OWN), blocking=True),
    "httpx2 over h2keep": Candidate(_httpx2_over_h2keep),
    "httpx2 over h2keep, threads": Candidate(_httpx2_over_h2keep_in_threads, blocking=True),
    "httpx2": Candidate(lambda context: httpx2.AsyncClient(verify=context, **STOCK)),
    "httpx2, threads": Candidate(lambda context: httpx2.Client(verify=context, **STOCK), blocking=True),
}


# The load


def _outcome(response: Any) -> str:
    return "ok" if response.status_code == 200 else f"status {response.status_code}"


async def _load(candidate: Candidate, context: ssl.SSLContext, url: str, count: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            try:
                outcomes[_outcome(await client.post(f"{url}/{number}", content=BODY))] += 1
            except Exception as error:  # noqa: BLE001
                outcomes[type(error).__name__] += 1

    async with candidate.open(context) as client, asyncio.TaskGroup() as tasks:
        for _ in range(WORKERS):
            tasks.create_task(work())
    return outcomes


def _load_in_threads(candidate: Candidate, context: ssl.SSLContext, url: str, count: int) -> Counter[str]:
    def work(numbers: range) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        for number in numbers:
            try:
                outcomes[_outcome(client.post(f"{url}/{number}", content=BODY))] += 1
            except Exception as error:  # noqa: BLE001
                outcomes[type(error).__name__] += 1
        return outcomes

    shares = [range(start, count, WORKERS) for start in range(WORKERS)]
    with candidate.open(context) as client, ThreadPoolExecutor(WORKERS) as executor:
        return sum(executor.map(work, shares), Counter())


def measure(candidate: Candidate, context: ssl.SSLContext, url: str, count: int) -> dict[str, Any]:
    """Have 16 tasks or threads make so many requests; what became of them."""
    began = time.perf_counter()
    if candidate.blocking:
        outcomes = _load_in_threads(candidate, context, url, count)
    else:
        outcomes = asyncio.run(_load(candidate, context, url, count))
    seconds = time.perf_counter() - began
    ok = outcomes.pop("ok", 0)
    return {
        "requests": count,
        "failed": count - ok,
        "failures": dict(outcomes.most_common()),
        "seconds": round(seconds, 1),
    }


# The servers


@dataclass(frozen=True)
class Server:
    """The Go server: HTTP/2 over TLS, and plain HTTP/1.1."""

    url: str
    plain: str

    def stats(self) -> dict[str, int]:
        """What was counted since the last call."""
        with OPENER.open(f"http://{self.plain}/stats", timeout=10) as response:
            counted: dict[str, int] = json.load(response)
        return counted


@contextlib.contextmanager
def prepare() -> Iterator[tuple[Kit, Server, ssl.SSLContext]]:
    """The Go server, built and running, and a context that trusts it."""
    build(SOURCE, BINARY)
    with TemporaryDirectory(prefix="h2keep-pool-") as directory:
        kit = Kit(Path(directory, "server.pem"), Path(directory, "ca.pem"))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(kit.ca)
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(kit.cert)
        command = [str(BINARY), "-cert", str(kit.cert), "-every", str(EVERY)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with process:  # which closes its standard input, upon which it ends
            assert process.stdout is not None
            addresses = json.loads(process.stdout.readline())
            server = Server(f"https://{addresses['https']}", addresses["plain"])
            yield kit, server, ssl.create_default_context(cafile=str(kit.ca))


CADDYFILE = """
{{
    admin 127.0.0.1:{admin}
    auto_https off
    persist_config off
    grace_period 5s
    log {{
        level ERROR
    }}
}}
https://127.0.0.1:{port} {{
    tls {cert} {cert}
    header X-Configuration {number}
    reverse_proxy {upstream}
}}
"""


class Caddy:
    """A reverse proxy that is told to reload its configuration again and again."""

    def __init__(self, cert: Path, upstream: str, pause: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            self._port, self._admin = one.getsockname()[1], other.getsockname()[1]
        self._cert, self._upstream, self._pause = cert, upstream, pause
        self.url = f"https://127.0.0.1:{self._port}"
        self.reloads = 0

    def _configuration(self) -> str:
        return CADDYFILE.format(
            admin=self._admin, port=self._port, cert=self._cert, number=self.reloads, upstream=self._upstream
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with TemporaryDirectory(prefix="h2keep-caddy-") as home:
            file = Path(home, "Caddyfile")
            file.write_text(self._configuration())
            environment = {**os.environ, "HOME": home, "XDG_DATA_HOME": home, "XDG_CONFIG_HOME": home}
            command = [str(Path(sys.executable).with_name("caddy")), "run", "--config", str(file)]
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            try:
                self._wait_until_it_listens(process)
                yield
            finally:
                process.kill()
                process.wait()

    def _wait_until_it_listens(self, process: subprocess.Popen[bytes]) -> None:
        for port in (self._admin, self._port):
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                if process.poll() is not None:
                    raise RuntimeError("Caddy did not start")
                time.sleep(0.05)

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Each time another configuration, so that each time there is a new server, and the old one is shut down."""
        stop = threading.Event()

        def reload() -> None:
            while not stop.wait(self._pause):
                self.reloads += 1
                request = urllib.request.Request(
                    f"http://127.0.0.1:{self._admin}/load",
                    self._configuration().encode(),
                    {"Content-Type": "text/caddyfile"},
                )
                OPENER.open(request, timeout=30).close()

        with ThreadPoolExecutor(1) as executor:
            reloader = executor.submit(reload)
            try:
                yield
            finally:
                stop.set()
                reloader.result()


# Figures


@dataclass(frozen=True)
class Setting:
    """What all measurements share."""

    kit: Kit
    server: Server
    context: ssl.SSLContext
    count: int
    #: Seconds between Caddy's reloads.
    pause: float


def goaway(setting: Setting, candidate: Candidate) -> dict[str, Any]:
    result = measure(candidate, setting.context, setting.server.url, setting.count)
    return result | setting.server.stats()


def caddy(setting: Setting, candidate: Candidate) -> dict[str, Any]:
    proxy = Caddy(setting.kit.cert, setting.server.plain, setting.pause)
    with proxy.running(), proxy.reloading():
        result = measure(candidate, setting.context, proxy.url, setting.count)
    counted = setting.server.stats()
    return result | {name: counted[name] for name in ("processed", "twice")} | {"reloads": proxy.reloads}


FIGURES = {"goaway": goaway, "caddy": caddy}


def _sentence(figure: str, name: str, result: Mapping[str, Any]) -> str:
    why = ", ".join(f"{count} {kind}" for kind, count in result["failures"].items())
    farewells = f"{result['goodbyes']} GOAWAYs" if figure == "goaway" else f"{result['reloads']} reloads"
    return (
        f"{figure}: {name}: {result['failed']} of {result['requests']} failed{f' ({why})' if why else ''}, "
        f"{result['twice']} processed twice, {farewells}, {result['seconds']} s"
    )


def _about(pause: float) -> dict[str, object]:
    caddy_version = subprocess.run(
        [str(Path(sys.executable).with_name("caddy")), "version"], capture_output=True, text=True, check=True
    )
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("h2keep", "h2", "httpx2", "httpcore2")},
        "caddy": caddy_version.stdout.split()[0],
        "workers": WORKERS,
        "every": EVERY,
        "pause": pause,
    }


# The page


def _table(figure: str, results: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    farewells, column = ("goodbyes", "GOAWAYs") if figure == "goaway" else ("reloads", "reloads")
    title = {
        "goaway": f"GOAWAY after every {about['every']} requests on a connection",
        "caddy": f"Caddy reloads its configuration every {about['pause']:g} s",
    }[figure]
    requests = max(result["requests"] for result in results.values())
    lines = [
        f"**{title}**, {about['workers']} at once, {requests:,} requests:",
        "",
        f"| | failed | with | processed twice | {column} |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        why = ", ".join(f"{kind} ({count:,})" for kind, count in result["failures"].items())
        numbers = f"{result['failed']:,} | {why} | {result['twice']:,} | {result[farewells]:,}"
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


def write_tables(page: Path, report: Mapping[str, Any]) -> None:
    """Put the report's numbers between the page's two marks."""
    about = report["about"]
    tables = "\n\n".join(_table(figure, results, about) for figure, results in report["figures"].items())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = f"{tables}\n\nPython {about['python']}, {versions}, Caddy {about['caddy']}."
    marked = re.compile(r"(<!-- figures: .*? -->\n).*?(<!-- end of figures -->)", re.DOTALL)
    written, found = marked.subn(lambda marks: f"{marks[1]}\n{text}\n\n{marks[2]}", page.read_text())
    if found != 1:
        raise ValueError(f"{page} has no marks to write the tables between")
    page.write_text(written)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pool", description=__doc__.partition("\n")[0])
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"{' or '.join(FIGURES)}; default: both")
    parser.add_argument("--candidates", nargs="+", metavar="NAME", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true", help="2,000 requests: for looking whether all works")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between Caddy's reloads; default: 0.5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to FILE")
    parser.add_argument("--doc", type=Path, metavar="PAGE", help="write the tables into PAGE, between its marks")
    options = parser.parse_args(arguments)
    unknown = set(options.figures) - set(FIGURES)
    if unknown:
        parser.error(f"no such figure: {', '.join(sorted(unknown))}")
    report: dict[str, Any] = {"about": _about(options.pause), "figures": {}}
    count = 2_000 if options.quick else options.requests
    with prepare() as (kit, server, context):
        setting = Setting(kit, server, context, count, options.pause)
        for figure in options.figures or FIGURES:
            results = report["figures"][figure] = {}
            for name in options.candidates:
                results[name] = FIGURES[figure](setting, CANDIDATES[name])
                print(json.dumps({"figure": figure, "candidate": name, **results[name]}))
                print(_sentence(figure, name, results[name]), flush=True)
    if options.json is not None:
        options.json.parent.mkdir(exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.doc is not None:
        write_tables(options.doc, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
