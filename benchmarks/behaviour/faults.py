"""What goes wrong: each fault is a script that makes requests, breaks something, and returns."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.behaviour.relay import Way

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from benchmarks.behaviour.cell import Cell

MIB = 1 << 20
SEVERAL = 3


@dataclass(frozen=True)
class Fault:
    """A row of the matrix.

    `path`: it is the path that fails, as a router can bring about. `silent`: nothing tells the client, so that only a
    PING finds it. `survivable`: no request need be lost. The rest prepares the stage: see `Relay`; and `read` is the
    read timeout of every client.
    """

    name: str
    title: str
    text: str
    script: Callable[[Cell], Awaitable[None]]
    path: bool = False
    silent: bool = False
    survivable: bool = False
    forget_after: float | None = None
    rates: Mapping[Way, float] = field(default_factory=dict)
    clogged: bool = False
    window: int = 0
    read: float = 60.0
    inapplicable: frozenset[str] = frozenset()


async def forgotten_in_time(cell: Cell) -> None:
    await cell.several(wait=4)
    cell.happens()


async def forgotten_too_soon(cell: Cell) -> None:
    await cell.several(wait=4)
    await cell.until(lambda: bool(cell.forgotten))
    cell.happens(min(cell.forgotten))


async def forgotten_in_pool(cell: Cell) -> None:
    await cell.warm_up()
    cell.relay.forget()
    # So long that a client which PINGs unused connections has found out.
    await asyncio.sleep(3)
    cell.happens()
    cell.request(wait=0)


async def blackhole_connect(cell: Cell) -> None:
    # The relay has no way to do it later on.
    cell.happens()
    await cell.shut()
    cell.request(wait=0)


async def blackhole_tls(cell: Cell) -> None:
    cell.relay.shut()
    cell.happens()
    cell.request(wait=0)


async def blackhole_headers(cell: Cell) -> None:
    await cell.warm_up()
    cell.happens()
    await cell.shut()
    for _ in range(SEVERAL):
        cell.request(wait=0)


async def blackhole_upload(cell: Cell) -> None:
    await _upload_begun(cell)
    cell.happens()
    await cell.shut()


async def blackhole_wait(cell: Cell) -> None:
    await cell.several(wait=4)
    cell.happens()
    await cell.shut()


async def blackhole_download(cell: Cell) -> None:
    await cell.warm_up()
    download = cell.download(size=8 * MIB, piece=32768, interval=0.02)
    await cell.until(lambda: cell.bytes_of("streamed", download.id) >= MIB // 4)
    cell.happens()
    await cell.shut()


async def loss_up(cell: Cell) -> None:
    await cell.warm_up()
    cell.happens()
    await cell.shut(Way.UP)
    for _ in range(SEVERAL):
        cell.request(wait=0.5)


async def loss_down(cell: Cell) -> None:
    await cell.warm_up()
    cell.happens()
    await cell.shut(Way.DOWN)
    for _ in range(SEVERAL):
        cell.request(wait=0.5)


async def stops_reading(cell: Cell) -> None:
    await _upload_begun(cell)
    cell.happens()
    await cell.order_server("stop reading")


async def reset(cell: Cell) -> None:
    await cell.several(wait=4)
    cell.happens()
    cell.relay.reset()


async def server_pauses(cell: Cell) -> None:
    await cell.several(wait=3)
    cell.signal_server(signal.SIGSTOP)
    cell.happens()
    await asyncio.sleep(0.7)
    cell.signal_server(signal.SIGCONT)


async def server_stops(cell: Cell) -> None:
    await cell.several(wait=3)
    cell.signal_server(signal.SIGSTOP)
    cell.happens()


async def server_killed(cell: Cell) -> None:
    await cell.several(wait=4)
    cell.happens()
    await cell.kill_server()


async def goaway(cell: Cell) -> None:
    await cell.several(wait=1.5, count=6)
    cell.happens()
    await cell.order_server("goaway")


async def calm(cell: Cell) -> None:
    await cell.order_server("want calm")
    await _slow_requests(cell)


async def calm_and_close(cell: Cell) -> None:
    await cell.order_server("want calm and close")
    await _slow_requests(cell)


async def _slow_requests(cell: Cell) -> None:
    """Some at once, then one more."""
    await cell.several(wait=3.8)
    cell.happens()
    await cell.settled()
    cell.request(wait=3.8)


async def blocked(cell: Cell) -> None:
    await cell.several(wait=4)
    cell.block(3)
    cell.happens()


async def frozen(cell: Cell) -> None:
    await cell.several(wait=4)
    cell.happens()
    await cell.freeze(3)


async def frozen_and_forgotten(cell: Cell) -> None:
    await cell.several(wait=6)
    # Until what the server had to say has been read.
    await asyncio.sleep(0.2)
    await cell.freeze(3)
    cell.happens()


async def thin_download(cell: Cell) -> None:
    cell.happens()
    await cell.warm_up()
    cell.download(size=49152, piece=49152, interval=0)


async def thin_upload(cell: Cell) -> None:
    await cell.warm_up()
    cell.happens()
    cell.request(wait=0, upload=512 << 10)


async def dead_backend(cell: Cell) -> None:
    await cell.warm_up()
    await cell.order_server("ignore streams")
    cell.happens()
    for _ in range(SEVERAL):
        await cell.request(wait=0).settled()


async def slow_answer(cell: Cell) -> None:
    await cell.warm_up()
    cell.happens()
    cell.request(wait=60)
    for _ in range(2):
        cell.download(size=50, piece=10, interval=0.7)


async def _upload_begun(cell: Cell) -> None:
    await cell.warm_up()
    upload = cell.request(wait=0, upload=32 * MIB)
    await cell.until(lambda: cell.bytes_of("body", upload.id) >= MIB)


FAULTS = (
    Fault(
        "forgotten-in-time",
        "flow forgotten after 1.8 s of silence",
        "Three requests whose answers take 4 s, through a middlebox that forgets a flow on which nothing passed for "
        "longer than the PING interval. PINGs keep it alive.",
        forgotten_in_time,
        survivable=True,
        forget_after=1.8,
    ),
    Fault(
        "forgotten-too-soon",
        "flow forgotten after 0.6 s of silence",
        "The same through a middlebox that forgets sooner than the first PING comes. No PING helps; one finds out.",
        forgotten_too_soon,
        silent=True,
        forget_after=0.6,
    ),
    Fault(
        "forgotten-in-pool",
        "flow forgotten while unused",
        "A request on a connection that was unused for 3 s and forgotten meanwhile; new connections work.",
        forgotten_in_pool,
        survivable=True,
    ),
    Fault(
        "blackhole-connect",
        "black hole: connecting",
        "No SYN is answered. Everybody's connect timeout is 2 s.",
        blackhole_connect,
        path=True,
        silent=True,
        clogged=True,
    ),
    Fault(
        "blackhole-tls",
        "black hole: TLS handshake",
        "TCP connects, then nothing passes. Everybody's connect timeout is 2 s.",
        blackhole_tls,
        silent=True,
    ),
    Fault(
        "blackhole-headers",
        "black hole: request",
        "The path dies just before three requests are made on a connection that was in use.",
        blackhole_headers,
        path=True,
        silent=True,
    ),
    Fault(
        "blackhole-upload",
        "black hole: upload",
        "The path dies in the middle of a large upload, so that buffers fill.",
        blackhole_upload,
        path=True,
        silent=True,
    ),
    Fault(
        "blackhole-wait",
        "black hole: waiting",
        "The path dies while three requests wait for their answers.",
        blackhole_wait,
        path=True,
        silent=True,
    ),
    Fault(
        "blackhole-download",
        "black hole: download",
        "The path dies in the middle of a download.",
        blackhole_download,
        path=True,
        silent=True,
    ),
    Fault(
        "loss-up",
        "all lost towards the server",
        "Requests and PINGs are lost from now on, nothing else.",
        loss_up,
        path=True,
        silent=True,
    ),
    Fault(
        "loss-down",
        "all lost towards the client",
        "The server answers, and all its answers are lost.",
        loss_down,
        path=True,
        silent=True,
    ),
    Fault(
        "stops-reading",
        "server stops reading",
        "The server takes nothing any more in the middle of a large upload: its TCP is alive, its window closed.",
        stops_reading,
        silent=True,
    ),
    Fault("reset", "RST", "The connection is reset while three requests wait.", reset),
    Fault(
        "server-pauses",
        "server frozen for 0.7 s",
        "SIGSTOP for less than the timeouts, then SIGCONT. Nothing need be lost.",
        server_pauses,
        survivable=True,
    ),
    Fault(
        "server-stops",
        "server frozen",
        "SIGSTOP for good: the server's kernel still takes everything.",
        server_stops,
        silent=True,
    ),
    Fault("server-killed", "server killed", "SIGKILL while three requests wait.", server_killed),
    Fault(
        "goaway",
        "GOAWAY in mid-traffic",
        "Six requests in flight; GOAWAY says that the later half was not looked at. The others are answered.",
        goaway,
        survivable=True,
    ),
    Fault(
        "calm",
        "ENHANCE_YOUR_CALM",
        "The server bears no PINGs that are less than 1.5 s apart: at the third it says GOAWAY, answers what is in "
        "flight, and closes. A slow request follows on the next connection.",
        calm,
        survivable=True,
    ),
    Fault(
        "calm-and-close",
        "ENHANCE_YOUR_CALM and the end",
        "The same, but the server closes at once, as gRPC's do. Who never PINGs is never punished; who learns is "
        "punished once.",
        calm_and_close,
    ),
    Fault(
        "blocked",
        "client blocked for 3 s",
        "The application holds Python's lock for longer than all timeouts, while answers take 4 s. Network and server "
        "are well. Go has no such lock.",
        blocked,
        survivable=True,
        inapplicable=frozenset({"go"}),
    ),
    Fault(
        "frozen",
        "client frozen for 3 s",
        "SIGSTOP for longer than all timeouts, while answers take 4 s. Network and server are well.",
        frozen,
        survivable=True,
    ),
    Fault(
        "frozen-and-forgotten",
        "client frozen, flow forgotten",
        "The same, and meanwhile a middlebox forgets the flow. Counted from the thaw.",
        frozen_and_forgotten,
        silent=True,
        forget_after=1.8,
    ),
    Fault(
        "thin-download",
        "thin link: download",
        "A download at 10 KiB/s: a frame takes longer than ping_timeout. Nothing is wrong.",
        thin_download,
        survivable=True,
        rates={Way.DOWN: 10240},
    ),
    Fault(
        "thin-upload",
        "thin link: upload",
        "512 KiB up at 96 KiB/s to a server with large windows, which has nothing to say meanwhile. Nothing is wrong.",
        thin_upload,
        survivable=True,
        rates={Way.UP: 98304},
        window=8 * MIB,
    ),
    Fault(
        "dead-backend",
        "dead backend, living proxy",
        "PINGs are answered, requests on this connection never; new connections work. Everybody's read timeout is "
        "1.5 s. Three requests, one after the other.",
        dead_backend,
        read=1.5,
    ),
    Fault(
        "slow-answer",
        "one answer too late beside two streams",
        "One request runs into its read timeout of 1.5 s, while two streams on the same connection get something every "
        "0.7 s. Only that one need be lost.",
        slow_answer,
        read=1.5,
    ),
)
