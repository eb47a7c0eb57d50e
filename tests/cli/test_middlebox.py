"""The demo's middlebox: what passes, what is forgotten, and that nobody is told."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from h2keep.cli.middlebox import BytesDropped, BytesPassed, Event, FlowForgotten, FlowOpened, Middlebox, Towards

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio

PATIENCE = 0.15
#: Long enough for bytes on loopback, and for the box to forget.
LONG = 4 * PATIENCE


@dataclass
class Scene:
    """A server that the test controls, and a middlebox before it."""

    box: Middlebox
    events: list[Event]
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    #: Whatever is still open at the end is closed.
    writers: list[asyncio.StreamWriter]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.box.port)
        self.writers.append(writer)
        return reader, writer

    def passed(self, towards: Towards) -> int:
        return sum(e.count for e in self.events if isinstance(e, BytesPassed) and e.towards is towards)

    def dropped(self, towards: Towards) -> int:
        return sum(e.count for e in self.events if isinstance(e, BytesDropped) and e.towards is towards)

    def forgotten(self) -> list[FlowForgotten]:
        return [event for event in self.events if isinstance(event, FlowForgotten)]


@contextlib.asynccontextmanager
async def scene(forget_after: float = PATIENCE) -> AsyncIterator[Scene]:
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    events: list[Event] = []
    writers: list[asyncio.StreamWriter] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        accepted.put_nowait((reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with Middlebox(server.sockets[0].getsockname()[:2], forget_after, events.append) as box:
        yield Scene(box, events, accepted, writers)
    server.close()
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0)


async def is_silent(reader: asyncio.StreamReader, seconds: float = 0.05) -> bool:
    """Nothing comes, not even an end."""
    try:
        async with asyncio.timeout(seconds):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def test_bytes_pass_both_ways() -> None:
    async with scene() as s:
        reader, writer = await s.connect()
        writer.write(b"question")
        server_reader, server_writer = await s.accepted.get()
        assert await server_reader.readexactly(8) == b"question"
        server_writer.write(b"answer")
        assert await reader.readexactly(6) == b"answer"
        assert isinstance(s.events[0], FlowOpened)
        assert (s.passed(Towards.SERVER), s.passed(Towards.CLIENT)) == (8, 6)
        times = [event.at for event in s.events]
        assert times == sorted(times)


async def test_much_passes_whole() -> None:
    async with scene(60) as s:
        reader, writer = await s.connect()
        server_reader, server_writer = await s.accepted.get()
        data = bytes(range(256)) * 20_000

        async def send() -> None:
            writer.write(data)
            writer.write_eof()

        async def echo() -> None:
            while chunk := await server_reader.read(65_536):
                server_writer.write(chunk)
                await server_writer.drain()
            server_writer.close()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send())
            tasks.create_task(echo())
            received = tasks.create_task(reader.read())
        assert received.result() == data
        assert s.passed(Towards.SERVER) == s.passed(Towards.CLIENT) == len(data)


async def test_silent_flow_is_forgotten_and_nobody_told() -> None:
    async with scene() as s:
        reader, writer = await s.connect()
        server_reader, server_writer = await s.accepted.get()
        assert await is_silent(reader, LONG)
        assert await is_silent(server_reader)
        (forgotten,) = s.forgotten()
        assert forgotten.at - s.events[0].at == pytest.approx(PATIENCE, abs=0.1)
        writer.write(b"question")
        server_writer.write(b"answer")
        assert await is_silent(reader)
        assert await is_silent(server_reader)
        assert (s.dropped(Towards.SERVER), s.dropped(Towards.CLIENT)) == (8, 6)


async def test_ends_of_a_forgotten_flow_do_not_cross() -> None:
    async with scene() as s:
        _, writer = await s.connect()
        server_reader, server_writer = await s.accepted.get()
        await asyncio.sleep(LONG)
        assert s.forgotten()
        writer.transport.abort()
        assert await is_silent(server_reader)
        reader, _ = await s.connect()
        _, server_writer = await s.accepted.get()
        await asyncio.sleep(LONG)
        server_writer.transport.abort()
        assert await is_silent(reader)


@pytest.mark.parametrize("towards", Towards)
async def test_bytes_either_way_keep_a_flow(towards: Towards) -> None:
    async with scene() as s:
        _, writer = await s.connect()
        _, server_writer = await s.accepted.get()
        for _ in range(10):
            (writer if towards is Towards.SERVER else server_writer).write(b"!")
            await asyncio.sleep(PATIENCE / 3)
        assert s.passed(towards) == 10
        assert not s.forgotten()


async def test_ends_of_a_living_flow_cross() -> None:
    async with scene(60) as s:
        reader, writer = await s.connect()
        server_reader, server_writer = await s.accepted.get()
        writer.write(b"bye")
        writer.write_eof()
        assert await server_reader.read() == b"bye"
        server_writer.write(b"farewell")
        server_writer.close()
        assert await reader.read() == b"farewell"


async def test_resets_of_a_living_flow_cross() -> None:
    async with scene(60) as s:
        reader, writer = await s.connect()
        _, server_writer = await s.accepted.get()
        writer.write(b"x")
        await asyncio.sleep(0.05)
        # With bytes unread the socket's end is a reset.
        server_writer.transport.abort()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()


async def test_vanished_server_is_silent() -> None:
    async with scene(60) as s:
        reader, writer = await s.connect()
        await s.accepted.get()
        writer.write(b"question")
        await asyncio.sleep(0.05)
        s.box.vanish()
        s.box.vanish()
        assert len(s.forgotten()) == 1
        writer.write(b"anybody?")
        writer.write_eof()
        assert await is_silent(reader)
        assert s.dropped(Towards.SERVER) == 8


async def test_vanished_server_takes_no_connections() -> None:
    async with scene(60) as s:
        s.box.vanish()
        reader, writer = await s.connect()
        writer.write(b"anybody?")
        writer.write_eof()
        assert await is_silent(reader)
        assert s.dropped(Towards.SERVER) == 8
        assert s.accepted.empty()


async def test_a_flow_that_has_ended_is_not_forgotten() -> None:
    async with scene() as s:
        reader, writer = await s.connect()
        _, server_writer = await s.accepted.get()
        server_writer.close()
        assert await reader.read() == b""
        writer.close()
        await asyncio.sleep(LONG)
        s.box.vanish()
        assert not s.forgotten()


async def test_without_a_server_the_connection_ends() -> None:
    unused = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    target = unused.sockets[0].getsockname()[:2]
    unused.close()
    async with Middlebox(target, 60, lambda _: None) as box:
        reader, writer = await asyncio.open_connection("127.0.0.1", box.port)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()


async def test_nothing_is_left_open() -> None:
    async with scene() as s:
        living, _ = await s.connect()
        await s.accepted.get()
        await asyncio.sleep(LONG)
        assert s.forgotten()
    with contextlib.suppress(ConnectionResetError):
        assert await living.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await s.connect()
