"""A network of its own for a cell: packets that are really lost, where the system permits network namespaces.

    this process, the relay, the server                 router                      client
    10.n.1.1  ------------------------------  10.n.1.2  10.n.2.2  ------------------------------  10.n.2.1

The router forwards, until it is told to drop: then it does so silently, as a network does that has failed. The kernels
of both sides retransmit, back off, and come back when packets pass again. Everything here runs in a user namespace in
which this process is root (`inside`), and ends with its processes.
"""

from __future__ import annotations

import asyncio
import itertools
import subprocess
from typing import TYPE_CHECKING, Self

from benchmarks.behaviour.relay import Way

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

#: Makes the command that follows root in network and user namespaces of its own.
ENTER = ("unshare", "--user", "--map-root-user", "--net", "--")
_NETWORKS = range(1, 255)


def permitted() -> bool:
    """Whether this system lets us have networks of our own, and has the tools."""
    try:
        trial = subprocess.run(
            [*ENTER, "ip", "link", "add", "trial0", "type", "veth", "peer", "name", "trial1"],
            capture_output=True,
            check=False,
        )
    except OSError:
        return False
    return trial.returncode == 0


def addresses() -> Iterator[str]:
    """Of every server that there can be, for its certificate."""
    return (_server(number) for number in _NETWORKS)


def _server(number: int) -> str:
    return f"10.{number}.1.1"


class Network:
    """Client, router and this process; an asynchronous context manager."""

    _numbers = itertools.cycle(_NETWORKS)

    def __init__(self) -> None:
        self._number = next(self._numbers)
        self.host = _server(self._number)
        self._client = f"10.{self._number}.2.1"
        self._holders: list[asyncio.subprocess.Process] = []
        self._dropped: set[str] = set()

    async def __aenter__(self) -> Self:
        n = self._number
        await _run("ip", "link", "set", "lo", "up")
        router, client = await self._hold(), await self._hold()
        await _run(*f"ip link add here{n} type veth peer name left netns {router}".split())
        await self._at(router, f"ip link add right type veth peer name there netns {client}")
        await _run(*f"ip address add {self.host}/24 dev here{n}".split())
        await _run(*f"ip link set here{n} up".split())
        for line in (
            f"ip address add 10.{n}.1.2/24 dev left",
            f"ip address add 10.{n}.2.2/24 dev right",
            "ip link set left up",
            "ip link set right up",
            "sysctl -q net.ipv4.ip_forward=1",
        ):
            await self._at(router, line)
        for line in (
            f"ip address add {self._client}/24 dev there",
            "ip link set there up",
            f"ip route add default via 10.{n}.2.2",
        ):
            await self._at(client, line)
        await _run(*f"ip route add 10.{n}.2.0/24 via 10.{n}.1.2".split())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for holder in self._holders:
            assert holder.stdin is not None
            holder.stdin.close()
            await holder.wait()

    @property
    def prefix(self) -> Sequence[str]:
        """Before a command: run it where the client is."""
        return self._inside(self._holders[1].pid)

    async def shut(self, *ways: Way) -> None:
        """Lose every packet in these directions, by default in both."""
        towards = {Way.UP: self.host, Way.DOWN: self._client}
        for way in ways or tuple(Way):
            await self._at(self._holders[0].pid, f"ip route add blackhole {towards[way]}/32")
            self._dropped.add(towards[way])

    async def heal(self) -> None:
        """Lose none any more."""
        for address in self._dropped:
            await self._at(self._holders[0].pid, f"ip route del blackhole {address}/32")
        self._dropped.clear()

    async def _hold(self) -> int:
        """A process that does nothing but have a network namespace."""
        # It ends with its standard input, even if this process is killed.
        pipe = asyncio.subprocess.PIPE
        holder = await asyncio.create_subprocess_exec(
            "unshare", "--net", "--", "sh", "-c", "echo ready; exec cat", stdin=pipe, stdout=pipe
        )
        self._holders.append(holder)
        assert holder.stdout is not None
        await holder.stdout.readline()
        return holder.pid

    async def _at(self, pid: int, line: str) -> None:
        await _run(*self._inside(pid), *line.split())

    @staticmethod
    def _inside(pid: int) -> Sequence[str]:
        return ("nsenter", "--target", str(pid), "--net", "--")


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors.decode().strip()}")
