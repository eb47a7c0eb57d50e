"""`KeepaliveTransport` for httpx2 and httpx: the same behind another interface."""

from __future__ import annotations

import contextvars
import gc
import hashlib
import io
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import h2keep
from adapters.conftest import Library, library
from support.background import background_threads, eventually
from support.raw import answering
from support.threaded import threaded

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator
    from pathlib import Path

    from support.raw import Peer
    from support.servers import Server

__all__ = ["library"]

CANCEL = 8


def client(library: Library, **options: Any) -> Any:
    """A Client on our transport; `options` are the transport's."""
    transport = library.door.KeepaliveTransport(**{"http1": False, **options})
    return library.module.Client(transport=transport, timeout=10.0, trust_env=False)


class Source(io.BytesIO):
    """A file that notes which threads read it."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.readers: set[threading.Thread] = set()

    def read(self, size: int | None = -1) -> bytes:
        self.readers.add(threading.current_thread())
        return super().read(size)


async def head_only(peer: Peer) -> None:
    while True:
        request = await peer.request()
        await peer.respond(request.stream_id, body=b"first", end_stream=False)


class TestARealServer:
    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    def test_methods(self, library: Library, granian: Server, client_ssl: ssl.SSLContext, method: str) -> None:
        with client(library, verify=client_ssl) as own:
            response = own.request(method, f"{granian.url}/echo", content=b"a body", params={"q": "1"})
        assert response.http_version == "HTTP/2"
        assert response.json()["method"] == method
        assert response.json()["body"] == "a body"
        assert response.json()["query"] == "q=1"

    def test_multipart_files_are_read_in_the_calling_thread(
        self, library: Library, granian: Server, client_ssl: ssl.SSLContext
    ) -> None:
        source = Source(b"\0RIFF\xff" * 500_000)
        with client(library, verify=client_ssl) as own:
            files = {"audio": ("sound.wav", source, "audio/wav")}
            response = own.post(f"{granian.url}/upload", data={"model": "m1"}, files=files)
        assert response.json()["size"] > 3_000_000
        assert source.readers == {threading.current_thread()}

    def test_files_and_generators(
        self, library: Library, granian: Server, client_ssl: ssl.SSLContext, tmp_path: Path
    ) -> None:
        (tmp_path / "body").write_bytes(b"line\n" * 300_000)
        with client(library, verify=client_ssl) as own:
            with (tmp_path / "body").open("rb") as file:
                uploaded = own.post(f"{granian.url}/upload", content=file).json()
            assert uploaded["sha256"] == hashlib.sha256(b"line\n" * 300_000).hexdigest()
            assert own.post(f"{granian.url}/upload", content=(b"x" for _ in range(5))).json()["size"] == 5

    def test_streamed_downloads_and_lines(self, library: Library, granian: Server, client_ssl: ssl.SSLContext) -> None:
        with client(library, verify=client_ssl) as own:
            with own.stream("GET", f"{granian.url}/download?size=5000000") as response:
                pieces = [len(piece) for piece in response.iter_bytes()]
            assert sum(pieces) == 5_000_000
            assert len(pieces) > 1
            with own.stream("GET", f"{granian.url}/sse?events=3&every=0.01") as response:
                assert [line for line in response.iter_lines() if line] == [
                    f'data: {{"event": {number}}}' for number in range(3)
                ]

    def test_redirects_and_cookies_are_the_librarys(
        self, library: Library, granian: Server, client_ssl: ssl.SSLContext
    ) -> None:
        with client(library, verify=client_ssl) as own:
            own.get(f"{granian.url}/cookie")
            response = own.get(f"{granian.url}/redirect?to=/echo", follow_redirects=True)
        assert ["cookie", "flavour=oatmeal"] in response.json()["headers"]


class TestExtensions:
    def test_what_a_response_carries(self, library: Library, server_ssl: ssl.SSLContext, client_ssl: Any) -> None:
        with threaded(answering(), server_ssl) as server, client(library, verify=client_ssl) as own:
            response = own.get(server.url)
            assert response.extensions["http_version"] == b"HTTP/2"
            assert response.extensions["stream_id"] == 1
            assert response.extensions["h2keep"].requests == 1
            stream = response.extensions["network_stream"]
            assert stream.get_extra_info("server_addr")[0] == "127.0.0.1"
            assert stream.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
            assert stream.get_extra_info("unknown") is None

    def test_trace_runs_where_the_caller_is(self, library: Library) -> None:
        variable = contextvars.ContextVar("variable", default="unset")
        seen: list[tuple[str, str, threading.Thread]] = []

        def trace(event: str, info: dict[str, Any]) -> None:
            seen.append((event, variable.get(), threading.current_thread()))

        with threaded(answering()) as server, client(library) as own:
            variable.set("at the request")
            own.get(server.url, extensions={"trace": trace})
        names = [name.removeprefix("http2.") for name, _, _ in seen]
        assert names == [
            "receive_response_headers.started",
            "receive_response_headers.complete",
            "receive_response_body.started",
            "receive_response_body.complete",
            "response_closed.started",
            "response_closed.complete",
        ]
        assert {(value, thread) for _, value, thread in seen} == {("at the request", threading.current_thread())}

    def test_a_failing_trace_gives_the_request_up(self, library: Library) -> None:
        def trace(event: str, info: dict[str, Any]) -> None:
            if event.endswith("headers.complete"):
                raise LookupError("in trace")

        with threaded(head_only) as server, client(library) as own:
            with pytest.raises(LookupError, match="in trace"):
                own.get(server.url, extensions={"trace": trace})
            eventually(lambda: server.peers[0].requests[1].reset == CANCEL, "the request is reset")

    def test_a_failure_is_traced(self, library: Library) -> None:
        seen = []
        with threaded(head_only) as server, client(library) as own, pytest.raises(library.module.ReadTimeout):
            own.get(server.url, timeout=0.2, extensions={"trace": lambda event, info: seen.append((event, info))})
        failed = [info for event, info in seen if event == "http2.receive_response_body.failed"]
        assert isinstance(failed[0]["exception"], h2keep.ReadTimeout)

    def test_k20_the_hook_runs_where_the_transport_was_made(self, library: Library) -> None:
        variable = contextvars.ContextVar("variable", default="unset")
        seen = set()
        variable.set("at creation")
        own = client(library, event_hook=lambda _stats, _event: seen.add(variable.get()))
        variable.set("later")
        with threaded(answering()) as server, own:
            own.get(server.url)
        assert seen == {"at creation"}


class TestErrors:
    def test_each_belongs_to_both_families(self, library: Library) -> None:
        with threaded(head_only) as server:
            url = server.url
            with client(library) as own, own.stream("GET", url, timeout=0.2) as response:
                chunks = response.iter_raw()
                assert next(chunks) == b"first"
                with pytest.raises(library.module.ReadTimeout) as caught:
                    next(chunks)
                assert isinstance(caught.value, h2keep.ReadTimeout)
                # httpx adds the request.
                assert getattr(caught.value, "request").url == url  # noqa: B009
        with client(library) as own, pytest.raises(library.module.ConnectError) as refused:
            own.get(url)
        assert isinstance(refused.value, h2keep.ConnectError)
        assert isinstance(refused.value.__cause__, OSError)

    def test_a_lost_connection(self, library: Library) -> None:
        async def handler(peer: Peer) -> None:
            await peer.request()
            peer.abort()

        with threaded(handler) as server, client(library) as own, pytest.raises(library.module.ReadError) as caught:
            own.get(server.url)
        assert isinstance(caught.value, h2keep.ConnectionLost)
        assert not isinstance(caught.value, h2keep.PingTimeout)

    def test_a_body_that_raises(self, library: Library) -> None:
        closed = []

        def body() -> Iterator[bytes]:
            try:
                yield b"beginning"
                raise LookupError("the source is broken")
            finally:
                closed.append(True)

        with threaded(answering()) as server, client(library) as own:
            with pytest.raises(LookupError, match="the source is broken"):
                own.post(server.url, content=body())
            assert closed == [True]
            assert own.get(server.url).text == "ok"
            assert len(server.peers) == 1


class TestLife:
    def test_the_thread_is_shared_and_ends_with_the_last_transport(self, library: Library) -> None:
        with threaded(answering()) as server:
            first, second, third = client(library), client(library), h2keep.Client(http1=False)
            assert background_threads() == []
            for own in (first, second, third):
                own.get(server.url)
                assert len(background_threads()) == 1
            first.close()
            third.close()
            assert len(background_threads()) == 1
            second.close()
            assert background_threads() == []

    def test_a_transport_can_be_used_again(self, library: Library) -> None:
        transport = library.door.KeepaliveTransport(http1=False)
        with threaded(answering()) as server:
            for _ in range(2):
                with transport:
                    request = library.module.Request("GET", server.url)
                    response = transport.handle_request(request)
                    assert response.read() == b"ok"
                    response.close()
                assert background_threads() == []

    def test_a_response_that_is_forgotten_gives_its_stream_up(self, library: Library) -> None:
        with threaded(head_only) as server, client(library) as own:
            response = own.send(own.build_request("GET", server.url), stream=True)
            request = server.peers[0].requests[1]
            chunks = response.iter_raw()
            assert next(chunks) == b"first"
            assert request.reset is None
            del response, chunks
            # httpx's own responses are cycles.
            gc.collect()
            eventually(lambda: request.reset == CANCEL, "the stream is reset")
            assert not server.peers[0].ended

    def test_what_was_closed_says_so(self, library: Library) -> None:
        with threaded(head_only) as server, client(library) as own:
            response = own.send(own.build_request("GET", server.url), stream=True)
            own.close()
            with pytest.raises(library.module.ReadError):
                response.read()

    def test_an_early_response_ends_the_upload(self, library: Library) -> None:
        async def handler(peer: Peer) -> None:
            request = await peer.request()
            await peer.until(lambda: request.received > 100_000)
            await peer.respond(request.stream_id, 413, body=b"too much")
            await peer.rst(request.stream_id, 0)
            await anyio.sleep_forever()

        closed = []

        def body() -> Iterator[bytes]:
            try:
                while True:
                    yield b"x" * 16_384
            finally:
                closed.append(True)

        with threaded(handler) as server, client(library) as own:
            response = own.post(server.url, content=body())
            assert (response.status_code, response.content) == (413, b"too much")
            # httpx keeps a generator's last reference in its request.
            del response
            gc.collect()
            assert closed == [True]
