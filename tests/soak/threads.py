"""Storms in threads that share a client, and processes that are forked in the middle of them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import h2keep
from soak.accounts import BOUND, WORKERS, Storm
from soak.clients import CONNECTIONS, Request
from soak.server import CALM_STREAMS, pattern
from support.leaks import open_sockets

if TYPE_CHECKING:
    from soak.clients import Door

__all__ = ["ThreadStorm"]


class ThreadStorm(Storm):
    """Threads that share a client."""

    def run_generation(self, door: Door, seconds: float, chance: random.Random, *, abrupt: bool, forks: bool) -> None:
        """One client's life."""
        sockets = set(open_sockets().values())
        self.closed = False
        self.far.order(f"storm {chance.choice((0.1, 0.3, 1.0))}")
        client = door.client(threaded=True)
        ends = time.monotonic() + seconds
        threads = []
        for number in range(WORKERS):
            own = random.Random(f"{self.seed}/{self.generation}/{number}")
            threads.append(threading.Thread(target=self._work, args=(door, client, own, ends)))
        for thread in threads:
            thread.start()
        while time.monotonic() < ends:
            time.sleep(min(chance.expovariate(3), max(ends - time.monotonic(), 0)))
            if forks:
                self._fork(door, client, random.Random(chance.random()))
        if abrupt:
            self.closed = True
            closer = threading.Thread(target=client.close)
            closer.start()
            client.close()
            self.join([closer])
        else:
            self.far.order("calm")
        self.join(threads)
        if not abrupt:
            self._recover(door, client, chance)
        self.closed = True
        client.close()
        del client
        self.look_at(self.far.order("report"))
        self.look_around(sockets)
        self.generation += 1

    def _fork(self, door: Door, client: Any, chance: random.Random) -> None:
        """A child begins anew with the same client, and leaves its parent's connections alone."""
        request = self.request(chance, door)
        request.only_fetch(500)
        child = os.fork()
        if not child:
            status = 1
            try:
                for attempt in range(3):
                    request.headers["x-id"] = f"{request.name}-{attempt}"
                    with contextlib.suppress(h2keep.H2KeepError):
                        timeout = door.timeout(chance, patient=False)
                        client.get(request.url, headers=request.headers, timeout=timeout)
                client.close()
                status = 0
            finally:
                os._exit(status)
        patience = time.monotonic() + BOUND
        while time.monotonic() < patience:
            if os.waitpid(child, os.WNOHANG)[0]:
                self.outcomes["fork"] += 1
                return
            time.sleep(0.01)
        os.kill(child, signal.SIGABRT)
        os.waitpid(child, 0)
        self.violations.add("a child hangs")

    # What clients do

    def _work(self, door: Door, client: Any, chance: random.Random, ends: float) -> None:
        while time.monotonic() < ends and not self.closed:
            deed = chance.choices((self._whole, self._read, self._leave, self._forget, self._share), (8, 5, 2, 1, 1))[0]
            what = f"{door.name} {deed.__name__}"
            began = time.monotonic()
            try:
                deed(door, client, chance)
                self.outcomes[what] += 1
            except AssertionError as error:
                self.violations.add(f"{what}: {''.join(traceback.format_exception(error))}")
            except Exception as error:  # noqa: BLE001
                self.failed(door, chance, error, what)
            if time.monotonic() - began > BOUND:
                self.violations.add(f"{what} took {time.monotonic() - began:.0f} s")

    def _arguments(self, door: Door, request: Request, chance: random.Random) -> dict[str, Any]:
        timeout = door.timeout(chance, patient=request.patient)
        arguments: dict[str, Any] = {"headers": request.headers, "timeout": timeout}
        if request.streams:
            arguments["content"] = request.slow_chunks()
        elif request.method == "POST":
            arguments["content"] = pattern(request.name + "-up", request.bring)
        return arguments

    def _whole(self, door: Door, client: Any, chance: random.Random) -> None:
        request = self.request(chance, door)
        response = client.request(request.method, request.url, **self._arguments(door, request, chance))
        request.check(response.status_code, response.headers, response.content, whole=request.fails_at is None)

    def _read(self, door: Door, client: Any, chance: random.Random) -> None:
        request = self.request(chance, door)
        pause = chance.choice((0, 0, 0.001, 0.02))
        with client.stream(request.method, request.url, **self._arguments(door, request, chance)) as response:
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                if pause:
                    time.sleep(pause)
            request.check(response.status_code, response.headers, bytes(body), whole=request.fails_at is None)

    def _leave(self, door: Door, client: Any, chance: random.Random) -> None:
        request = self.request(chance, door)
        enough = chance.choice((0, 1, 10_000))
        with client.stream(request.method, request.url, **self._arguments(door, request, chance)) as response:
            body = bytearray()
            if enough:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) >= enough:
                        break
            request.check(response.status_code, response.headers, bytes(body), whole=False)

    def _forget(self, door: Door, client: Any, chance: random.Random) -> None:
        request = self.request(chance, door)
        arguments = self._arguments(door, request, chance)
        if door.name == "h2keep":
            content, headers, timeout = arguments.get("content"), arguments["headers"], arguments["timeout"]
            response = client._send(request.method, request.url, content, None, None, headers, timeout, None)
        else:
            response = client.send(client.build_request(request.method, request.url, **arguments), stream=True)
        if chance.random() < 0.5:
            chunks = response.iter_bytes() if door.name == "h2keep" else iter(response.stream)
            next(chunks, None)
            del chunks
        del response

    def _share(self, door: Door, client: Any, chance: random.Random) -> None:
        """Another thread closes the response that this one reads."""
        request = self.request(chance, door)
        with client.stream(request.method, request.url, **self._arguments(door, request, chance)) as response:
            closer = threading.Timer(chance.expovariate(50), response.close)
            closer.start()
            try:
                for _ in response.iter_bytes():
                    pass
            finally:
                closer.join()

    # The calm

    def _recover(self, door: Door, client: Any, chance: random.Random) -> None:
        """All that there ever was is there again."""
        time.sleep(0.3)
        count = CONNECTIONS * CALM_STREAMS
        errors: list[Exception] = []
        for attempt in range(3):
            errors = []

            def one(met: str, errors: list[Exception]) -> None:
                request = self.request(chance, door, calm=True)
                request.meet(met, count)
                arguments = self._arguments(door, request, chance) | {"timeout": door.timeout_of(10, 15, 15, 15)}
                try:
                    response = client.request(request.method, request.url, **arguments)
                    request.check(response.status_code, response.headers, response.content, whole=True)
                except Exception as error:  # noqa: BLE001
                    errors.append(error)

            met = f"{self.seed}-{self.generation}-{attempt}"
            threads = [threading.Thread(target=one, args=(met, errors)) for _ in range(count)]
            for thread in threads:
                thread.start()
            self.join(threads)
            if not errors:
                break
        self.look_at_meeting(errors)
        for size in (8_000_000, 1):
            request = self.request(chance, door, calm=True)
            request.only_fetch(size)
            response = client.get(request.url, headers=request.headers, timeout=door.timeout_of(10, 15, 15, 15))
            request.check(response.status_code, response.headers, response.content, whole=True)
        inner = client if door.name == "h2keep" else client._transport
        self.look_at_background(inner._connections._lease)
        self.look_at_server()
