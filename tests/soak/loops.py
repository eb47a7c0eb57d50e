"""Storms on event loops: tasks that share a client, and loops that do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from soak.accounts import BOUND, WORKERS, Storm, open_streams
from soak.clients import CONNECTIONS, Request
from soak.server import CALM_STREAMS, pattern
from support.leaks import open_sockets, running_tasks
from support.pools import assert_at_rest
from support.raw import task_group

if TYPE_CHECKING:
    from collections.abc import Callable

    from soak.clients import Door

__all__ = ["AsyncStorm", "LoopStorm"]


def _is_asyncio() -> bool:
    return asyncio._get_running_loop() is not None


class AsyncStorm(Storm):
    """On the running event loop."""

    async def run_generation(self, door: Door, seconds: float, chance: random.Random, *, abrupt: bool) -> None:
        """One client's life."""
        tasks, sockets = running_tasks(), set(open_sockets().values())
        self.closed = False
        await self.far.aorder(f"storm {chance.choice((0.1, 0.3, 1.0))}")
        client = door.client(threaded=False)
        in_thread = door._options.get("run_in_thread", False)
        ends = anyio.current_time() + seconds
        async with task_group() as guards, anyio.create_task_group() as group:
            guards.start_soon(self._guard)
            for number in range(WORKERS):
                own = random.Random(f"{self.seed}/{self.generation}/{number}")
                group.start_soon(self._work, door, client, own, ends)
            if not in_thread:
                group.start_soon(self._watch, client, door, ends)
            await anyio.sleep_until(ends)
            if abrupt:
                # In the middle of it all, and by two at once.
                self.closed = True
                group.start_soon(client.aclose)
                await client.aclose()
            else:
                await self.far.aorder("calm")
        if not abrupt:
            await self._recover(door, client, chance, in_thread=in_thread)
        self.closed = True
        await client.aclose()
        del client
        self.look_at(await self.far.aorder("report"))
        await self._look_for_leaks(tasks, sockets)
        self.generation += 1

    async def _look_for_leaks(self, tasks: set[Any], sockets: set[str]) -> None:
        for _ in range(100):
            if not (running_tasks() - tasks or self.leftovers(sockets)):
                break
            # What is forgotten tells its loop so when it is collected, and the loop hears of it in its next turn.
            await anyio.sleep(0.05)
        left = running_tasks() - tasks
        if left:
            self.violations.add(f"tasks are left: {left}")
        self.look_around(sockets)

    async def _guard(self) -> None:
        """Look at all that is there while what hangs still does."""
        while True:
            await anyio.sleep(1.0)
            # Of several loops, which may have clocks of their own.
            if self.began and time.monotonic() - min(self.began.values()) > BOUND - 2:
                self.snapshot = open_streams()

    async def _watch(self, client: Any, door: Door, ends: float) -> None:
        connections = client._connections if door.name == "h2keep" else client._transport._connections
        while anyio.current_time() < ends:
            pool = connections._running_pool()
            self.look_at_pool(pool)
            await anyio.sleep(0.01)

    # What clients do

    async def _work(self, door: Door, client: Any, chance: random.Random, ends: float) -> None:
        while anyio.current_time() < ends and not self.closed:
            deed = chance.choices(
                (self._whole, self._read, self._leave, self._forget, self._share, self._together),
                (8, 5, 2, 1, 1, 1),
            )[0]
            what = f"{door.name} {deed.__name__}"
            patience = chance.choice((None, None, None, None, 0.0, 0.002, 0.02, 0.2, 1.0))
            self.began[id(chance)] = time.monotonic()
            try:
                with anyio.fail_after(BOUND):
                    if patience is None:
                        await deed(door, client, chance)
                    elif chance.random() < 0.5:
                        with anyio.move_on_after(patience), anyio.move_on_after(patience * chance.random() * 3):
                            await deed(door, client, chance)
                    else:
                        await self._in_a_task(partial(deed, door, client, chance), patience)
                self.outcomes[what] += 1
            except AssertionError as error:
                self.violations.add(f"{what}: {''.join(traceback.format_exception(error))}")
            except Exception as error:  # noqa: BLE001
                self.failed(door, chance, error, what)
            finally:
                del self.began[id(chance)]

    async def _in_a_task(self, deed: Callable[[], Any], patience: float) -> None:
        """Cancelled by the event loop's own means."""
        errors: list[Exception] = []

        async def run() -> None:
            try:
                await deed()
            except Exception as error:  # noqa: BLE001
                errors.append(error)

        if _is_asyncio():
            task = asyncio.ensure_future(run())
            try:
                await anyio.sleep(patience)
            finally:
                task.cancel()
                await asyncio.wait([task])
        else:
            async with anyio.create_task_group() as group:
                group.start_soon(run)
                await anyio.sleep(patience)
                group.cancel_scope.cancel()
        if errors:
            raise errors[0]

    def _arguments(self, door: Door, request: Request, chance: random.Random) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "headers": request.headers,
            "timeout": door.timeout(chance, patient=request.patient),
        }
        if request.streams:
            arguments["content"] = request.achunks()
        elif request.method == "POST":
            arguments["content"] = pattern(request.name + "-up", request.bring)
        return arguments

    async def _whole(self, door: Door, client: Any, chance: random.Random) -> None:
        request = self.request(chance, door)
        response = await client.request(request.method, request.url, **self._arguments(door, request, chance))
        request.check(response.status_code, response.headers, response.content, whole=request.fails_at is None)

    async def _read(self, door: Door, client: Any, chance: random.Random) -> None:
        request = self.request(chance, door)
        pause = chance.choice((0, 0, 0.001, 0.02))
        async with client.stream(request.method, request.url, **self._arguments(door, request, chance)) as response:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if pause:
                    await anyio.sleep(pause)
            request.check(response.status_code, response.headers, bytes(body), whole=request.fails_at is None)

    async def _leave(self, door: Door, client: Any, chance: random.Random) -> None:
        request = self.request(chance, door)
        enough = chance.choice((0, 1, 10_000))
        async with client.stream(request.method, request.url, **self._arguments(door, request, chance)) as response:
            body = bytearray()
            if enough:
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) >= enough:
                        break
            request.check(response.status_code, response.headers, bytes(body), whole=False)

    async def _forget(self, door: Door, client: Any, chance: random.Random) -> None:
        request = self.request(chance, door)
        arguments = self._arguments(door, request, chance)
        if door.name == "h2keep":
            manager = client.stream(request.method, request.url, **arguments)
            response = await manager.__aenter__()
            del manager
        else:
            response = await client.send(client.build_request(request.method, request.url, **arguments), stream=True)
        if chance.random() < 0.5:
            chunks = response.aiter_bytes() if door.name == "h2keep" else response.stream.__aiter__()
            with contextlib.suppress(StopAsyncIteration):
                await anext(chunks)
            del chunks
        del response

    async def _share(self, door: Door, client: Any, chance: random.Random) -> None:
        """Two tasks read one response, of whom one at least must be told."""
        request = self.request(chance, door)
        async with client.stream(request.method, request.url, **self._arguments(door, request, chance)) as response:
            chunks = response.aiter_bytes()
            errors: list[Exception] = []

            async def read() -> None:
                try:
                    async for _ in chunks:
                        await anyio.lowlevel.checkpoint()
                except Exception as error:  # noqa: BLE001
                    if "asynchronous generator is already running" not in str(error):
                        errors.append(error)

            async with anyio.create_task_group() as group:
                group.start_soon(read)
                group.start_soon(read)
        if errors:
            raise errors[0]

    async def _together(self, door: Door, client: Any, chance: random.Random) -> None:
        """Several at once, of which the first failure cancels the others."""
        try:
            async with anyio.create_task_group() as group:
                for _ in range(chance.randint(2, 6)):
                    group.start_soon(self._whole, door, client, random.Random(chance.random()))
        except BaseExceptionGroup as errors:
            found = errors.exceptions[0]
            while isinstance(found, BaseExceptionGroup):
                found = found.exceptions[0]
            raise found from None

    # The calm

    async def _recover(self, door: Door, client: Any, chance: random.Random, *, in_thread: bool) -> None:
        """All that there ever was is there again."""
        await anyio.sleep(0.3)
        count = CONNECTIONS * CALM_STREAMS
        errors: list[Exception] = []
        for attempt in range(3):
            errors = []
            met = f"{self.seed}-{self.generation}-{attempt}"

            async def one(met: str = met, errors: list[Exception] = errors) -> None:
                request = self.request(chance, door, calm=True)
                request.meet(met, count)
                arguments = self._arguments(door, request, chance) | {"timeout": door.timeout_of(10, 15, 15, 15)}
                try:
                    response = await client.request(request.method, request.url, **arguments)
                    request.check(response.status_code, response.headers, response.content, whole=True)
                except Exception as error:  # noqa: BLE001
                    errors.append(error)

            with anyio.move_on_after(BOUND) as scope:
                async with anyio.create_task_group() as group:
                    for _ in range(count):
                        group.start_soon(one)
            if scope.cancelled_caught:
                self.violations.add("hangs in the calm")
            if not errors:
                break
        self.look_at_meeting(errors)
        for size in (8_000_000, 1):
            await self._download(door, client, chance, size)
        await self._look_at_rest(door, client, in_thread=in_thread)
        await anyio.to_thread.run_sync(self.look_at_server)

    async def _download(self, door: Door, client: Any, chance: random.Random, size: int) -> None:
        request = self.request(chance, door, calm=True)
        request.only_fetch(size)
        arguments = {"headers": request.headers, "timeout": door.timeout_of(10, 15, 15, 15)}
        try:
            response = await client.request("GET", request.url, **arguments)
            request.check(response.status_code, response.headers, response.content, whole=True)
        except Exception as error:  # noqa: BLE001
            self.violations.add(f"a download in the calm: {''.join(traceback.format_exception(error))}")

    async def _look_at_rest(self, door: Door, client: Any, *, in_thread: bool) -> None:
        inner = client if door.name == "h2keep" else client._transport
        if in_thread:
            await anyio.to_thread.run_sync(self.look_at_background, inner._connections._lease)
            return
        failure: AssertionError | None = None
        for _ in range(100):
            gc.collect()
            try:
                assert_at_rest(inner)
            except AssertionError as error:
                failure = error
                await anyio.sleep(0.05)
            else:
                return
        self.violations.add(f"not at rest: {''.join(traceback.format_exception(failure))}\n{open_streams()}")


class LoopStorm(AsyncStorm):
    """One asynchronous client in several event loops at once, which come and go."""

    def run_all(self, door: Door, seconds: float, chance: random.Random, *, abrupt: bool) -> None:
        """One client's life. Every loop leaves its connections to whoever finds them."""
        sockets = set(open_sockets().values())
        self.closed = False
        self.far.order(f"storm {chance.choice((0.1, 0.3, 1.0))}")
        client = door.client(threaded=False)
        ends = time.monotonic() + seconds
        threads = [threading.Thread(target=self._come_and_go, args=(door, client, n, ends)) for n in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        if abrupt:
            # In the middle of it all, from a loop that has made no request.
            self.closed = True
            anyio.run(client.aclose)
        else:
            self.far.order("calm")
        self.join(threads)
        anyio.run(self._end, door, client, chance, abrupt)
        del client
        self.look_at(self.far.order("report"))
        self.look_around(sockets)
        self.generation += 1

    async def _end(self, door: Door, client: Any, chance: random.Random, abrupt: bool) -> None:
        if not abrupt:
            await self._recover(door, client, chance, in_thread=False)
        # What was asked for after the first end has begun anew.
        self.closed = True
        await client.aclose()

    def _come_and_go(self, door: Door, client: Any, number: int, ends: float) -> None:
        chance = random.Random(f"{self.seed}/{self.generation}/{number}")
        while time.monotonic() < ends and not self.closed:
            seconds = min(chance.expovariate(1.5), max(ends - time.monotonic(), 0.01))
            backend = "trio" if chance.random() < 0.3 else "asyncio"
            anyio.run(self._visit, door, client, chance, seconds, backend=backend)

    async def _visit(self, door: Door, client: Any, chance: random.Random, seconds: float) -> None:
        ends = anyio.current_time() + seconds
        async with task_group() as guards, anyio.create_task_group() as group:
            guards.start_soon(self._guard)
            for _ in range(4):
                group.start_soon(self._work, door, client, random.Random(chance.random()), ends)
            if chance.random() < 0.5:
                await anyio.sleep(seconds)
                group.cancel_scope.cancel()
