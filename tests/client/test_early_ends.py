"""A response that is complete before its request's body is: it stands, and the body is let go of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import httpx2
import pytest
from hyperframe import frame as frames

import h2keep
import h2keep.httpx2
from support.raw import RawServer, task_group

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from support.raw import Peer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("leak_check", "every_engine")]

PATIENCE = 5.0


class Upload:
    """A body that waits after its first byte until it is told to go on, and then fails if there is a failure."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.go_on = anyio.Event()
        self.closed = anyio.Event()
        self._failure = failure

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            yield b"x"
            await self.go_on.wait()
            if self._failure is not None:
                raise self._failure
        finally:
            self.closed.set()

    async def fail(self, peer: Peer) -> None:
        """Let it, once the peer's answer has been taken in, and wait until that has had its consequences."""
        # The PING is acknowledged after what came before it.
        await peer.ping()
        self.go_on.set()
        await self.closed.wait()
        await anyio.lowlevel.checkpoint()


@pytest.fixture
async def server(leak_check: None) -> AsyncIterator[RawServer]:
    async with RawServer.listen() as server:
        yield server


@pytest.fixture(params=[False, True], ids=["here", "in a thread"])
async def client(leak_check: None, request: pytest.FixtureRequest) -> AsyncIterator[h2keep.AsyncClient]:
    async with h2keep.AsyncClient(http1=False, verify=False, timeout=None, run_in_thread=request.param) as client:
        yield client


async def answer_early(server: RawServer, *more: frames.Frame) -> Peer:
    """Take one request's first byte and answer it in full, with what follows in the same write."""
    peer = await server.accept()
    await peer.handshake()
    request = await peer.request()
    await peer.until(lambda: request.received == 1)
    body = frames.DataFrame(1, b"enough", flags=["END_STREAM"])
    await peer.send(peer.headers_frame(1), body, *more)
    return peer


@pytest.mark.parametrize("lost", [False, True], ids=["reset", "lost"])
async def test_the_iterator_is_closed_when_nobody_wants_its_body_any_more(
    server: RawServer, client: h2keep.AsyncClient, lost: bool
) -> None:
    upload = Upload()

    async def answer() -> None:
        peer = await answer_early(server, *([] if lost else [frames.RstStreamFrame(1, 0)]))
        if lost:
            peer.close()

    async with task_group() as tasks:
        tasks.start_soon(answer)
        with anyio.fail_after(PATIENCE):
            response = await client.post(server.url, content=upload.chunks())
            assert response.content == b"enough"
            await upload.closed.wait()


@pytest.mark.parametrize("failure", [ValueError("no more"), h2keep.ReadError("from elsewhere")])
async def test_an_iterator_that_fails_after_that_takes_nothing_of_the_response_away(
    server: RawServer, client: h2keep.AsyncClient, failure: Exception
) -> None:
    upload = Upload(failure)
    with anyio.fail_after(PATIENCE):
        async with task_group() as tasks:
            tasks.start_soon(answer_early, server)
            async with client.stream("POST", server.url, content=upload.chunks()) as response:
                await upload.fail(server.peers[0])
                assert await response.aread() == b"enough"
                assert response.stream_id == 1
                await server.peers[0].ping()
                assert server.peers[0].requests[1].reset == 0


async def test_nor_where_the_body_is_taken_as_a_whole(server: RawServer) -> None:
    upload = Upload(ValueError("no more"))
    transport = h2keep.httpx2.AsyncKeepaliveTransport(http1=False, verify=False)
    async with httpx2.AsyncClient(transport=transport, timeout=None) as client, task_group() as tasks:
        tasks.start_soon(answer_early, server)
        with anyio.fail_after(PATIENCE):
            async with client.stream("POST", server.url, content=upload.chunks()) as response:
                await upload.fail(server.peers[0])
                assert await response.aread() == b"enough"


async def test_but_an_interrupt_is_the_requesters(server: RawServer) -> None:
    class Interrupt(BaseException):
        pass

    upload = Upload(Interrupt())
    async with h2keep.AsyncClient(http1=False, verify=False, timeout=None) as client, task_group() as tasks:
        tasks.start_soon(answer_early, server)
        with anyio.fail_after(PATIENCE):
            async with client.stream("POST", server.url, content=upload.chunks()) as response:
                await server.peers[0].ping()
                upload.go_on.set()
                await upload.closed.wait()
                await anyio.lowlevel.checkpoint()
                with pytest.raises(Interrupt):
                    await response.aread()
