"""What the adapters raise: one instance of both families, whichever end or layer it comes from."""

from __future__ import annotations

import copy
import pickle
import re
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hyperframe import frame as frames

import h2keep
from h2keep import errors
from support.clock import virtual_time
from support.raw import RawServer, answering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from adapters.conftest import Library

COUNTERPARTS = {
    "ConnectError": "ConnectError",
    "ConnectTimeout": "ConnectTimeout",
    "ConnectionGoingAway": "RemoteProtocolError",
    "ConnectionLost": "ReadError",
    "H2KeepError": "TransportError",
    "HTTP2NotSupported": "ConnectError",
    "LocalProtocolError": "LocalProtocolError",
    "PingTimeout": "ReadError",
    "PoolTimeout": "PoolTimeout",
    "ProtocolError": "ProtocolError",
    "ProxyError": "ProxyError",
    "ReadError": "ReadError",
    "ReadTimeout": "ReadTimeout",
    "RemoteProtocolError": "RemoteProtocolError",
    "StreamReset": "RemoteProtocolError",
    "UnsupportedProtocol": "UnsupportedProtocol",
    "WriteError": "WriteError",
    "WriteTimeout": "WriteTimeout",
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "HTTP2NotSupported": {"alpn": "http/1.1"},
    "ConnectionLost": {"last_life": 1.0, "ping_sent_at": None, "rtt": 0.1},
    "PingTimeout": {"last_life": 1.0, "ping_sent_at": 31.0, "rtt": None},
    "StreamReset": {"error_code": 7},
    "ConnectionGoingAway": {"last_stream_id": 3, "error_code": 11, "debug_data": b"too_many_pings"},
}
every_error = pytest.mark.parametrize("name", errors.__all__)


def example(name: str) -> errors.H2KeepError:
    kind: type[Any] = getattr(errors, name)
    error: errors.H2KeepError = kind("what happened", unprocessed=True, **ATTRIBUTES.get(name, {}))
    error.__cause__ = OSError("why")
    return error


def translated(library: Library, name: str) -> errors.H2KeepError:
    error: errors.H2KeepError = library.door.AsyncKeepaliveTransport._library.translate(example(name))
    return error


def test_every_error_has_a_counterpart() -> None:
    assert set(COUNTERPARTS) == set(errors.__all__)


@every_error
def test_each_error_is_an_instance_of_its_own_class_and_of_one_counterpart(library: Library, name: str) -> None:
    error = translated(library, name)
    assert isinstance(error, getattr(errors, name))
    theirs = [kind for kind in type(error).__mro__ if kind.__module__.split(".")[0] == library.name]
    assert theirs[0] is getattr(library.module, COUNTERPARTS[name])
    assert set(theirs) == {kind for kind in theirs[0].__mro__ if kind in theirs}


@every_error
def test_each_error_keeps_its_message_cause_and_attributes(library: Library, name: str) -> None:
    error: Any = translated(library, name)
    assert str(error) == "what happened"
    assert type(error).__name__ == name
    assert isinstance(error.__cause__, OSError)
    assert error.unprocessed
    for attribute, value in ATTRIBUTES.get(name, {}).items():
        assert getattr(error, attribute) == value
    with pytest.raises(RuntimeError, match="request"):
        _ = error.request


@every_error
def test_each_error_can_be_pickled_and_copied(library: Library, name: str) -> None:
    error: Any = translated(library, name)
    error.request = library.module.Request("POST", "https://example.com/")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert str(other) == "what happened"
        assert other.unprocessed
        assert other.request.url == "https://example.com/"
        for attribute, value in ATTRIBUTES.get(name, {}).items():
            assert getattr(other, attribute) == value


@every_error
def test_each_of_h2keeps_own_errors_can_be_pickled_and_copied(name: str) -> None:
    error = example(name)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), error.for_request(unprocessed=True)):
        assert type(other) is type(error)
        assert str(other) == "what happened"
        assert vars(other) == vars(error)


# Provoked for real


@contextmanager
def raises(library: Library, name: str, text: str) -> Iterator[Any]:
    """What is raised in here is both h2keep's `name` and its counterpart, and knows its request."""
    kind: type[Any] = getattr(h2keep, name)
    with pytest.raises(kind, match=text) as caught:
        yield caught
    error: Any = caught.value
    assert type(error).__name__ == name
    assert isinstance(error, getattr(library.module, COUNTERPARTS[name]))
    assert isinstance(error.request, library.module.Request)


async def once(chunk: bytes) -> AsyncIterator[bytes]:
    """A body that cannot be sent again."""
    yield chunk


@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
class TestConnecting:
    async def test_a_refused_connection(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.stop_listening()
            with raises(library, "ConnectError", rf"cannot connect to {server.url}: Connection refused") as caught:
                await client.get(server.url)
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)
        assert caught.value.unprocessed

    @pytest.mark.parametrize("host", ["nowhere.invalid", f"{'a' * 64}.invalid"])
    async def test_a_name_that_cannot_be_resolved(self, library: Library, host: str) -> None:
        async with library.client(http1=False) as client:
            with raises(library, "ConnectError", re.escape(host)) as caught:
                await client.get(f"http://{host}/")
        assert isinstance(caught.value.__cause__, OSError | UnicodeError)

    async def test_an_untrusted_certificate(self, library: Library, server_ssl: ssl.SSLContext) -> None:
        async with RawServer.listen(server_ssl) as server, library.client() as client:
            server.serve(answering())
            with raises(library, "ConnectError", "CERTIFICATE_VERIFY_FAILED|certificate verify failed") as caught:
                await client.get(server.url)
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)

    async def test_a_certificate_for_another_name(
        self, library: Library, server_ssl: ssl.SSLContext, client_ssl: ssl.SSLContext
    ) -> None:
        async with RawServer.listen(server_ssl) as server, library.client(verify=client_ssl) as client:
            server.serve(answering())
            with raises(library, "ConnectError", r"TLS failed.*other\.example"):
                await client.get(server.url, extensions={"sni_hostname": "other.example"})

    async def test_tls_to_a_server_without_it(self, library: Library, client_ssl: ssl.SSLContext) -> None:
        async with (
            RawServer.listen() as server,
            library.client(verify=client_ssl) as client,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(_refuse_tls, server)
            with raises(library, "ConnectError", "TLS failed: .*(?i:wrong.version|record)") as caught:
                await client.get(server.url.replace("http:", "https:"))
        assert isinstance(caught.value.__cause__, ssl.SSLError)

    async def test_a_server_without_http2(
        self, library: Library, client_ssl: ssl.SSLContext, cert_path: Path, key_path: Path
    ) -> None:
        old = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        old.load_cert_chain(cert_path, key_path)
        async with RawServer.listen(old) as server, library.client(verify=client_ssl, http1=False) as client:
            server.serve(answering())
            with raises(library, "HTTP2NotSupported", "does not speak HTTP/2: .*ALPN") as caught:
                await client.get(server.url)
        assert caught.value.alpn is None
        assert caught.value.unprocessed

    @virtual_time
    async def test_a_tls_handshake_that_nobody_answers(self, library: Library, client_ssl: ssl.SSLContext) -> None:
        async with RawServer.listen() as server, library.client(verify=client_ssl) as client:
            began = anyio.current_time()
            with raises(library, "ConnectTimeout", r"connect timeout") as caught:
                await client.get(server.url.replace("http:", "https:"), timeout=library.module.Timeout(9, connect=3))
            assert anyio.current_time() - began == pytest.approx(3, abs=0.1)
        assert isinstance(caught.value, library.module.TimeoutException)

    @virtual_time
    async def test_no_room_within_the_pool_timeout(self, library: Library) -> None:
        limits = library.module.Limits(max_connections=1)
        async with RawServer.listen() as server, library.client(http1=False, limits=limits) as client:
            server.serve(answering(delay=8), {frames.SettingsFrame.MAX_CONCURRENT_STREAMS: 1})
            await client.get(server.url)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.get, server.url)
                await anyio.sleep(1)
                with raises(library, "PoolTimeout", "pool timeout") as caught:
                    await client.get(server.url, timeout=library.module.Timeout(None, pool=3))
            assert caught.value.unprocessed
            assert isinstance(caught.value, library.module.TimeoutException)
            assert len(server.peers) == 1

    @pytest.mark.parametrize(
        ("url", "text"),
        [
            ("https://127.0.0.1:0/", "port 0"),
            ("ftp://127.0.0.1/", "ftp"),
            ("/relative", "https://"),
            ("https:///path", "name a host"),
        ],
    )
    async def test_urls_that_cannot_be_used(self, library: Library, url: str, text: str) -> None:
        async with library.client() as client:
            with raises(library, "UnsupportedProtocol", text):
                await client.get(url)


@virtual_time
@pytest.mark.anyio
@pytest.mark.usefixtures("leak_check")
class TestRequests:
    async def test_no_head_within_the_read_timeout(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering(delay=100))
            began = anyio.current_time()
            with raises(library, "ReadTimeout", r"no response came on the stream within 7\.0 s"):
                await client.post(server.url, content=b"x", timeout=7.0)
            assert anyio.current_time() - began == pytest.approx(7, abs=0.1)
            peer = await server.peer(0)
            await peer.until(lambda: peer.requests[1].reset == 8)

    async def test_no_body_within_the_read_timeout(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(_half_an_answer)
            async with client.stream("GET", server.url, timeout=7.0) as response:
                assert response.status_code == 200
                with raises(library, "ReadTimeout", r"no body bytes came on the stream within 7\.0 s"):
                    await response.aread()

    async def test_a_body_that_the_server_does_not_take(self, library: Library) -> None:
        async with (
            RawServer.listen() as server,
            library.client(http1=False) as client,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(_accept_without_credit, server)
            with raises(library, "WriteTimeout", r"flow-control window took no bytes within 4\.0 s") as caught:
                await client.put(server.url, content=b"x" * 100_000, timeout=library.module.Timeout(60, write=4.0))
            assert not caught.value.unprocessed

    async def test_k4_k8_a_dead_connection(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False, client={"timeout": None}) as client:
            server.serve(_dead)
            began = anyio.current_time()
            with raises(library, "PingTimeout", "the connection is dead") as caught:
                await client.get(server.url)
            assert 40 <= anyio.current_time() - began <= 45.5
            assert caught.value.ping_sent_at is not None
            assert caught.value.last_life == pytest.approx(began, abs=0.1)
            assert not caught.value.unprocessed

    @pytest.mark.parametrize("how", ["close", "abort"])
    async def test_a_connection_that_ends(self, library: Library, how: str) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client, anyio.create_task_group() as t:
            server.serve(_half_an_answer)
            async with client.stream("GET", server.url) as response:
                t.start_soon(_end_later, server, how)
                with raises(library, "ConnectionLost", re.escape(server.url)) as caught:
                    await response.aread()
            assert not isinstance(caught.value, h2keep.PingTimeout)
            assert caught.value.last_life is not None
            if how == "abort":
                assert isinstance(caught.value.__cause__, ConnectionResetError)

    async def test_a_stream_that_is_reset(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(_resetting)
            with raises(library, "StreamReset", "INTERNAL_ERROR") as caught:
                await client.get(server.url)
            assert caught.value.error_code == 2
            assert not caught.value.unprocessed

    async def test_k24_a_stream_that_is_refused(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(_refusing)
            with raises(library, "StreamReset", "REFUSED_STREAM") as caught:
                await client.post(server.url, content=once(b"x"))
            assert caught.value.error_code == 7
            assert caught.value.unprocessed

    async def test_k24_a_server_that_goes_away(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(_going)
            with raises(library, "ConnectionGoingAway", "GOAWAY.*go elsewhere") as caught:
                await client.post(server.url, content=once(b"x"))
            assert caught.value.last_stream_id == 0
            assert caught.value.error_code == 11
            assert caught.value.debug_data == b"go elsewhere"
            assert caught.value.unprocessed

    async def test_a_server_that_breaks_the_rules(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(_breaking)
            with raises(library, "RemoteProtocolError", re.escape(server.url)) as caught:
                await client.get(server.url)
            assert not caught.value.unprocessed

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"headers": {"x": "a\r\nb"}}, "CR, LF or NUL"),
            ({"headers": {"a b": "c"}}, "header name"),
            ({"headers": {"te": "gzip"}}, "'te'"),
            ({"headers": {"host": "a b"}}, "Host"),
            ({"headers": {"content-length": "3"}, "content": b"x"}, "(?i)content-length"),
            ({"headers": {"content-length": "1"}, "content": b"xyz"}, "(?i)content-length"),
            ({"headers": {"content-length": "many"}, "content": b"xyz"}, "'content-length': b'many'"),
        ],
    )
    async def test_a_request_that_breaks_the_rules(self, library: Library, options: dict[str, Any], text: str) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            with raises(library, "LocalProtocolError", text):
                await client.post(server.url, **options)
            assert (await client.get(server.url)).content == b"ok"
            assert len(server.peers) == 1

    async def test_a_body_shorter_than_its_content_length(self, library: Library) -> None:
        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            with raises(library, "LocalProtocolError", "(?i)content-length"):
                await client.post(server.url, content=once(b"xy"), headers={"content-length": "3"})
            assert (await client.get(server.url)).content == b"ok"

    async def test_what_the_bodys_iterator_raises_is_raised_as_it_is(self, library: Library) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield b"x"
            raise LookupError("mine")

        async with RawServer.listen() as server, library.client(http1=False) as client:
            server.serve(answering())
            with pytest.raises(LookupError, match="mine"):
                await client.post(server.url, content=body())
            assert (await client.get(server.url)).content == b"ok"
            assert len(server.peers) == 1

    async def test_requests_that_a_closing_client_abandons(self, library: Library) -> None:
        arrived = anyio.Event()

        async def hold(peer: Any) -> None:
            await peer.request()
            arrived.set()
            await anyio.sleep_forever()

        async def fails() -> None:
            with raises(library, "ConnectionLost", "closed by this side"):
                await client.get(server.url, timeout=None)

        client = library.client(http1=False)
        async with RawServer.listen() as server, anyio.create_task_group() as tasks:
            server.serve(hold)
            tasks.start_soon(fails)
            await arrived.wait()
            await client.aclose()


async def _half_an_answer(peer: Any) -> None:
    request = await peer.request()
    await peer.respond(request.stream_id, body=b"half", end_stream=False)
    await anyio.sleep_forever()


async def _accept_without_credit(server: RawServer) -> None:
    peer = await server.accept()
    peer.auto_window = False
    await peer.handshake()


async def _refuse_tls(server: RawServer) -> None:
    peer = await server.accept()
    await peer.receive_bytes()
    await peer.send_bytes(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    peer.close()


async def _dead(peer: Any) -> None:
    peer.auto_ack_pings = False
    await anyio.sleep_forever()


async def _end_later(server: RawServer, how: str) -> None:
    await anyio.sleep(1)
    getattr(server.peers[0], how)()


async def _resetting(peer: Any) -> None:
    while True:
        await peer.rst((await peer.request()).stream_id, 2)


async def _refusing(peer: Any) -> None:
    while True:
        await peer.rst((await peer.request()).stream_id, 7)


async def _going(peer: Any) -> None:
    await peer.request()
    await peer.goaway(0, 11, b"go elsewhere")
    await anyio.sleep_forever()


async def _breaking(peer: Any) -> None:
    await peer.request()
    # DATA on stream 0.
    await peer.send_bytes(bytes.fromhex("000001 00 00 00000000 78"))
    await anyio.sleep_forever()
