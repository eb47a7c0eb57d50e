"""TLS as bytes in, bytes out, against OpenSSL's server side in memory; contexts made from arguments."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from h2keep.runner.tls import Cleartext, TLSLayer, create_ssl_context

if TYPE_CHECKING:
    from pathlib import Path


class Server:
    """The server's side of one TLS connection, in memory."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)

    def handshake(self, data: bytes) -> bytes:
        self.incoming.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()

    def encrypt(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self.outgoing.read()

    def decrypt(self, data: bytes) -> bytes:
        self.incoming.write(data)
        plain = b""
        with contextlib.suppress(ssl.SSLWantReadError):
            while piece := self.tls.read(65_536):
                plain += piece
        return plain

    def close(self) -> bytes:
        with contextlib.suppress(ssl.SSLError):
            self.tls.unwrap()
        return self.outgoing.read()


def connect(layer: TLSLayer, server: Server) -> bytes:
    """Shake hands; what the server sent after its last word of the handshake."""
    to_server, done = layer.handshake(None)
    while not done:
        to_server, done = layer.handshake(server.handshake(to_server))
    return server.handshake(to_server)


@pytest.fixture(params=["TLSv1_2", "TLSv1_3"])
def version(request: pytest.FixtureRequest) -> ssl.TLSVersion:
    return ssl.TLSVersion[request.param]


@pytest.fixture
def server(ca: trustme.CA, version: ssl.TLSVersion) -> Server:
    return Server(server_context(ca, version))


@pytest.fixture
def layer(client_ssl: ssl.SSLContext, server: Server) -> TLSLayer:
    """A client's layer that has shaken hands with `server`."""
    client_ssl.set_alpn_protocols(["h2"])
    layer = TLSLayer(client_ssl, "localhost")
    layer.receive(connect(layer, server))
    return layer


def server_context(ca: trustme.CA, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    ca.issue_cert("localhost").configure_cert(context)
    context.set_alpn_protocols(["h2"])
    return context


# The layer


def test_bytes_go_both_ways(layer: TLSLayer, server: Server, version: ssl.TLSVersion) -> None:
    assert layer.ssl_object.version() == version.name.replace("_", ".")
    assert layer.ssl_object.selected_alpn_protocol() == "h2"
    assert layer.receive(server.encrypt(b"from the server")) == (b"from the server", False)
    sent = layer.encrypt(b"from the client")
    assert b"from the client" not in sent
    assert server.decrypt(sent) == b"from the client"
    assert layer.encrypt(b"") == b""
    assert layer.failure is None


def test_many_records_at_once_are_one_piece(layer: TLSLayer, server: Server) -> None:
    wire = b"".join(server.encrypt(bytes([number]) * 16_384) for number in range(10))
    plain, closed = layer.receive(wire)
    assert plain == b"".join(bytes([number]) * 16_384 for number in range(10))
    assert not closed


def test_half_a_record_is_kept_until_the_rest_comes(layer: TLSLayer, server: Server) -> None:
    wire = server.encrypt(b"a whole record")
    assert layer.receive(wire[:10]) == (b"", False)
    assert layer.receive(wire[10:]) == (b"a whole record", False)


def test_data_that_comes_with_the_end_of_the_handshake_is_not_lost(ca: trustme.CA, client_ssl: ssl.SSLContext) -> None:
    server = Server(server_context(ca, ssl.TLSVersion.TLSv1_2))
    layer = TLSLayer(client_ssl, "localhost")
    to_server, _ = layer.handshake(None)
    to_server, _ = layer.handshake(server.handshake(to_server))
    # In TLS 1.2 the server has the last word, and may go on talking in the same packet.
    last = server.handshake(to_server) + server.encrypt(b"at once")
    assert layer.handshake(last) == (b"", True)
    assert layer.receive(b"") == (b"at once", False)


def test_close_notify_is_an_end_and_what_came_before_it_counts(layer: TLSLayer, server: Server) -> None:
    assert layer.receive(server.encrypt(b"last words") + server.close()) == (b"last words", True)
    assert layer.failure is None
    assert layer.receive(b"") == (b"", True)


def test_closing_says_close_notify_and_waits_for_nothing(layer: TLSLayer, server: Server) -> None:
    goodbye = layer.close()
    server.incoming.write(goodbye)
    assert goodbye
    assert server.tls.read(1) == b""


def test_closing_after_the_servers_close_notify_answers_it(layer: TLSLayer, server: Server) -> None:
    layer.receive(server.close())
    server.incoming.write(layer.close())
    server.tls.unwrap()


def test_closing_before_or_after_a_failure_does_not_raise(client_ssl: ssl.SSLContext) -> None:
    untouched = TLSLayer(client_ssl, "localhost")
    assert untouched.close() == b""
    failed = TLSLayer(client_ssl, "localhost")
    failed.handshake(None)
    with pytest.raises(ssl.SSLError):
        failed.handshake(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    failed.close()


def test_a_bad_record_ends_it_and_good_data_before_it_counts(layer: TLSLayer, server: Server) -> None:
    good, bad = server.encrypt(b"good"), bytearray(server.encrypt(b"bad"))
    bad[-1] ^= 1
    assert layer.receive(good + bytes(bad)) == (b"good", True)
    assert layer.failure is not None
    # As OpenSSL says it before 3.5 and since.
    assert layer.failure.reason in ("DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "RECORD_LAYER_FAILURE")
    # OpenSSL has an alert to send, which is for the writer.
    assert layer.pending()
    alert = layer.encrypt(b"")
    with pytest.raises(ssl.SSLError, match=r"(?i)alert.bad.record.mac"):
        server.decrypt(alert)
    assert not layer.pending()


def test_the_servers_alert_is_the_failure(layer: TLSLayer, server: Server) -> None:
    broken = bytearray(layer.encrypt(b"hello"))
    broken[-1] ^= 1
    with pytest.raises(ssl.SSLError):
        server.decrypt(bytes(broken))
    assert layer.receive(server.outgoing.read()) == (b"", True)
    assert layer.failure is not None
    assert "alert" in str(layer.failure).lower()


def test_truncation_in_mid_handshake_is_an_error(client_ssl: ssl.SSLContext) -> None:
    layer = TLSLayer(client_ssl, "localhost")
    layer.handshake(None)
    with pytest.raises(ssl.SSLError):
        layer.handshake(b"")


def test_a_failed_handshake_leaves_its_alert(ca: trustme.CA, version: ssl.TLSVersion) -> None:
    server = Server(server_context(ca, version))
    layer = TLSLayer(create_ssl_context(True, None, trust_env=False), "localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer certificate"):
        connect(layer, server)
    server.incoming.write(layer.farewell())
    with pytest.raises(ssl.SSLError, match=r"(?i)alert.unknown.ca"):
        server.tls.do_handshake()


def test_what_openssl_says_while_reading_is_pending_for_the_writer(ca: trustme.CA, client_ssl: ssl.SSLContext) -> None:
    context = server_context(ca, ssl.TLSVersion.TLSv1_3)
    ca.configure_trust(context)
    context.post_handshake_auth = client_ssl.post_handshake_auth = True
    context.verify_mode = ssl.CERT_OPTIONAL
    ca.issue_cert("client.example").configure_cert(client_ssl)
    server = Server(context)
    layer = TLSLayer(client_ssl, "localhost")
    layer.receive(connect(layer, server))
    server.tls.verify_client_post_handshake()
    assert not layer.pending()
    assert layer.receive(server.encrypt(b"who are you?")) == (b"who are you?", False)
    assert layer.pending()
    assert server.decrypt(layer.encrypt(b"me")) == b"me"
    certificate = server.tls.getpeercert()
    assert certificate is not None
    assert certificate["subjectAltName"] == (("DNS", "client.example"),)


def test_cleartext_passes_everything_through() -> None:
    layer = Cleartext()
    assert layer.receive(b"in") == (b"in", False)
    assert layer.encrypt(b"out") == b"out"
    assert not layer.pending()
    assert layer.close() == b""


# Contexts


def accepts(context: ssl.SSLContext, ca: trustme.CA) -> bool:
    """Whether the context trusts a server that `ca` vouches for."""
    layer = TLSLayer(context, "localhost")
    try:
        connect(layer, Server(server_context(ca, ssl.TLSVersion.TLSv1_3)))
    except ssl.SSLCertVerificationError:
        return False
    return True


def subject_hash(certificate: x509.Certificate) -> str:
    """What OpenSSL looks for in a directory: X509_NAME_hash, over the subject in its canonical form."""
    canonical = b""
    for attribute in certificate.subject:
        value = _der(0x0C, str(attribute.value).lower().encode())
        oid = bytes([0x55, 0x04, int(attribute.oid.dotted_string.rpartition(".")[2])])
        canonical += _der(0x31, _der(0x30, _der(0x06, oid) + value))
    return hashlib.sha1(canonical).digest()[3::-1].hex()


def _der(tag: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([tag, len(content)]) + content


@pytest.fixture
def ca_dir(ca: trustme.CA, tmp_path: Path) -> Path:
    """A directory of certificate authorities as OpenSSL wants it."""
    pem = ca.cert_pem.bytes()
    (tmp_path / f"{subject_hash(x509.load_pem_x509_certificate(pem))}.0").write_bytes(pem)
    return tmp_path


@pytest.fixture
def no_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)


pytestmark = pytest.mark.usefixtures("no_env")


def test_verify_is_a_file(ca: trustme.CA, ca_path: Path) -> None:
    assert accepts(create_ssl_context(str(ca_path), None, trust_env=True), ca)
    assert accepts(create_ssl_context(ca_path, None, trust_env=True), ca)


def test_verify_is_a_directory(ca: trustme.CA, ca_dir: Path) -> None:
    assert accepts(create_ssl_context(str(ca_dir), None, trust_env=True), ca)


def test_verify_is_an_empty_directory(ca: trustme.CA, tmp_path: Path) -> None:
    assert not accepts(create_ssl_context(str(tmp_path), None, trust_env=True), ca)


def test_verify_trusts_the_system_alone(ca: trustme.CA) -> None:
    context = create_ssl_context(True, None, trust_env=True)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert not accepts(context, ca)


def test_verify_off_accepts_anybody(ca: trustme.CA) -> None:
    context = create_ssl_context(False, None, trust_env=True)
    assert accepts(context, ca)
    assert accepts(context, trustme.CA())


def test_the_environment_says_whom_to_trust(
    ca: trustme.CA, ca_path: Path, ca_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", str(ca_dir))
    assert accepts(create_ssl_context(True, None, trust_env=True), ca)
    assert not accepts(create_ssl_context(True, None, trust_env=False), ca)
    monkeypatch.setenv("SSL_CERT_DIR", "")
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_path))
    assert accepts(create_ssl_context(True, None, trust_env=True), ca)


def test_the_environments_file_goes_before_its_directory(
    ca: trustme.CA, ca_dir: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other") / "ca.pem"
    trustme.CA().cert_pem.write_to_path(other)
    monkeypatch.setenv("SSL_CERT_FILE", str(other))
    monkeypatch.setenv("SSL_CERT_DIR", str(ca_dir))
    assert not accepts(create_ssl_context(True, None, trust_env=True), ca)


def test_a_path_goes_before_the_environment(ca: trustme.CA, ca_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    assert accepts(create_ssl_context(str(ca_path), None, trust_env=True), ca)


@pytest.mark.parametrize("verify", [True, False])
def test_tls_1_2_is_the_least_and_renegotiation_is_off(verify: bool) -> None:
    context = create_ssl_context(verify, None, trust_env=False)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.options & ssl.OP_NO_RENEGOTIATION


def test_a_path_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^verify: '.*/missing.pem' is neither a file nor a directory$"):
        create_ssl_context(str(tmp_path / "missing.pem"), None, trust_env=True)


def test_a_variable_that_leads_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    with pytest.raises(FileNotFoundError, match=r"^SSL_CERT_FILE: '.*/missing.pem' is neither"):
        create_ssl_context(True, None, trust_env=True)


@pytest.mark.parametrize("content", ["", "not a certificate\n"])
def test_a_file_without_certificates_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.pem"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^verify: '.*/empty.pem' holds no certificates that OpenSSL can read"):
        create_ssl_context(str(path), None, trust_env=True)


@pytest.mark.parametrize("verify", [None, 1, b"/ca.pem", ["/ca.pem"]])
def test_verify_of_another_type_is_named(verify: object) -> None:
    with pytest.raises(TypeError, match=r"^verify: .* is neither True, False, a path nor an ssl.SSLContext$"):
        create_ssl_context(verify, None, trust_env=True)  # type: ignore[arg-type]


# Client certificates


class Files(NamedTuple):
    """A client certificate in files."""

    both: str
    certificate: str
    key: str
    encrypted_key: str


@pytest.fixture
def files(ca: trustme.CA, tmp_path: Path) -> Files:
    leaf = ca.issue_cert("client.example")
    key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"open sesame"),
    )
    contents = {
        "both": leaf.private_key_and_cert_chain_pem.bytes(),
        "certificate": leaf.cert_chain_pems[0].bytes(),
        "key": leaf.private_key_pem.bytes(),
        "encrypted_key": encrypted,
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.pem").write_bytes(content)
    return Files(**{name: str(tmp_path / f"{name}.pem") for name in contents})


def shown(ca: trustme.CA, context: ssl.SSLContext) -> str | None:
    """The name in the certificate that a server gets to see."""
    asking = server_context(ca, ssl.TLSVersion.TLSv1_2)
    ca.configure_trust(asking)
    asking.verify_mode = ssl.CERT_OPTIONAL
    server = Server(asking)
    connect(TLSLayer(context, "localhost"), server)
    certificate = server.tls.getpeercert()
    return certificate["subjectAltName"][0][1] if certificate else None  # type: ignore[return-value]


def test_a_certificate_is_one_file_or_two_and_perhaps_a_password(ca: trustme.CA, files: Files) -> None:
    certs: list[Any] = [
        files.both,
        (files.certificate, files.key),
        (files.certificate, files.encrypted_key, "open sesame"),
    ]
    for cert in certs:
        assert shown(ca, create_ssl_context(False, cert, trust_env=False)) == "client.example"
    assert shown(ca, create_ssl_context(False, None, trust_env=False)) is None


def test_an_encrypted_key_without_a_password_is_an_error_and_no_question(files: Files) -> None:
    with pytest.raises(ValueError, match=r"^cert: the key in '.*/encrypted_key.pem' is encrypted"):
        create_ssl_context(False, (files.certificate, files.encrypted_key), trust_env=False)


def test_a_wrong_password_is_an_error_that_does_not_repeat_it(files: Files) -> None:
    with pytest.raises(ValueError, match=r"^cert: OpenSSL can't use \('.*/certificate.pem', '.*/encr") as caught:
        create_ssl_context(False, (files.certificate, files.encrypted_key, "hunter2"), trust_env=False)
    assert "hunter2" not in str(caught.value)


def test_a_certificate_that_leads_nowhere_is_named(files: Files) -> None:
    missing = files.both.replace("both", "missing")
    with pytest.raises(FileNotFoundError, match=r"cert: No such file or directory: '.*/missing.pem'"):
        create_ssl_context(False, missing, trust_env=False)


def test_a_key_that_does_not_fit_is_an_error(ca: trustme.CA, files: Files, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    ca.issue_cert("other.example").private_key_pem.write_to_path(other)
    with pytest.raises(ValueError, match=r"^cert: OpenSSL can't use .*(?i:key values mismatch)"):
        create_ssl_context(False, (files.certificate, str(other)), trust_env=False)


@pytest.mark.parametrize("cert", [(), ("a", "b", "c", "d"), (1, 2), 5])
def test_a_certificate_of_another_type_is_refused(cert: object) -> None:
    with pytest.raises(TypeError, match=r"^cert: "):
        create_ssl_context(False, cert, trust_env=False)  # type: ignore[arg-type]
