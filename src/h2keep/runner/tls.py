"""TLS as bytes in, bytes out, over `ssl.MemoryBIO`. No socket, no waiting.

The socket's owner counts ciphertext as life (K2), and what OpenSSL has to say while reading goes out through the one
writer. `Cleartext` is the same thing for connections without TLS.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import sys
from typing import Any, Protocol

__all__ = ["Cleartext", "SecurityLayer", "TLSLayer", "create_ssl_context"]

#: A client certificate: a file, or (certificate, key), or (certificate, key, password).
CertTypes = str | tuple[str, str] | tuple[str, str, str]


def create_ssl_context(
    verify: str | os.PathLike[str] | bool, cert: CertTypes | None, trust_env: bool
) -> ssl.SSLContext:
    """A context for clients: TLS 1.2 or later, and the trust that `verify` asks for.

    True: SSL_CERT_FILE and SSL_CERT_DIR if `trust_env` and set, else the system's trust store. A path: the
    certificate authorities in that file or directory alone. False: no verification at all. Raises `OSError` for
    files that can't be read, `ValueError` for what OpenSSL can't use, `TypeError`; each names the argument.
    """
    if verify is True:
        context = _system_context(trust_env)
    elif verify is False:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif isinstance(verify, (str, os.PathLike)):
        context = _context_for("verify", os.fspath(verify))
    else:
        raise TypeError(f"verify: {verify!r} is neither True, False, a path nor an ssl.SSLContext")
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # HTTP/2 forbids it (RFC 9113, section 9.2.1).
    context.options |= ssl.OP_NO_RENEGOTIATION
    if cert is not None:
        _load_certificate(context, cert)
    return context


def _load_certificate(context: ssl.SSLContext, cert: CertTypes) -> None:
    parts: Any = (cert,) if isinstance(cert, str) else cert
    if not (isinstance(parts, tuple) and 1 <= len(parts) <= 3 and all(isinstance(part, str) for part in parts)):
        raise TypeError("cert: a path, (certificate, key) or (certificate, key, password) is wanted")

    def password() -> str:
        if len(parts) == 3:
            given: str = parts[2]
            return given
        # Without this OpenSSL would ask at the terminal, and wait.
        raise ValueError(f"cert: the key in {parts[-1]!r} is encrypted: give (certificate, key, password)")

    try:
        context.load_cert_chain(parts[0], parts[1] if len(parts) > 1 else None, password)
    except ssl.SSLError as error:
        raise ValueError(f"cert: OpenSSL can't use {parts[:2]!r}: {error.strerror or error}") from error
    except OSError as error:
        raise type(error)(error.errno, f"cert: {error.strerror}: {' or '.join(map(repr, parts[:2]))}") from error


def _system_context(trust_env: bool) -> ssl.SSLContext:
    if trust_env:
        for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            if path := os.environ.get(name):
                return _context_for(name, path)
    if sys.platform in ("darwin", "win32"):
        import truststore

        return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # By path: of itself OpenSSL would look at the two variables again, also where they are not to be trusted.
    paths = ssl.get_default_verify_paths()
    cafile = paths.openssl_cafile if os.path.isfile(paths.openssl_cafile) else None
    capath = paths.openssl_capath if os.path.isdir(paths.openssl_capath) else None
    return ssl.create_default_context(cafile=cafile, capath=capath)


def _context_for(source: str, path: str) -> ssl.SSLContext:
    """Trust in what is at `path` alone, of which `source` told us."""
    if os.path.isfile(path):
        try:
            return ssl.create_default_context(cafile=path)
        except ssl.SSLError as error:
            reason = error.strerror or error
            raise ValueError(f"{source}: {path!r} holds no certificates that OpenSSL can read: {reason}") from error
    if os.path.isdir(path):
        return ssl.create_default_context(capath=path)
    raise FileNotFoundError(f"{source}: {path!r} is neither a file nor a directory")


class SecurityLayer(Protocol):
    """What stands between the socket and HTTP/2."""

    @property
    def ssl_object(self) -> ssl.SSLObject | None:
        """For inspection (certificate, cipher); None without TLS."""

    @property
    def failure(self) -> ssl.SSLError | None:
        """What broke TLS, None while nothing did."""

    @property
    def heard(self) -> bool:
        """Whether some of what was received last came from beyond the proxy, where there is one (K2)."""

    def receive(self, data: bytes) -> tuple[bytes, bool]:
        """Ciphertext in; the plaintext it completes, and whether it is the last: TLS was closed, or broke."""

    def encrypt(self, data: bytes) -> bytes:
        """Plaintext in; all that is now to be written."""

    def pending(self) -> bool:
        """Whether there is something to be written besides what `encrypt` returns (key updates, alerts)."""

    def close(self) -> bytes:
        """The last bytes to write: close_notify."""


class Cleartext:
    """No TLS: HTTP/2 with prior knowledge."""

    ssl_object: ssl.SSLObject | None = None
    failure: ssl.SSLError | None = None
    heard = True

    def receive(self, data: bytes) -> tuple[bytes, bool]:
        """SecurityLayer."""
        return data, False

    def encrypt(self, data: bytes) -> bytes:
        """SecurityLayer."""
        return data

    def pending(self) -> bool:
        """SecurityLayer."""
        return False

    def close(self) -> bytes:
        """SecurityLayer."""
        return b""


class TLSLayer:
    """The client's side of one TLS connection."""

    heard = True
    #: One TLS record's plaintext: OpenSSL never returns more from one read.
    _RECORD = 16 * 1024

    def __init__(self, context: ssl.SSLContext, server_hostname: str) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.ssl_object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self.failure: ssl.SSLError | None = None

    def handshake(self, data: bytes | None) -> tuple[bytes, bool]:
        """One step: what the peer sent (None at first, b"" for EOF); what to write, and whether it is done.

        Raises `ssl.SSLError`; what OpenSSL wants to say about it (an alert) is `farewell`'s.
        """
        if data:
            self._incoming.write(data)
        elif data is not None:
            self._incoming.write_eof()
        try:
            self.ssl_object.do_handshake()
        except ssl.SSLWantReadError:
            return self._outgoing.read(), False
        return self._outgoing.read(), True

    def farewell(self) -> bytes:
        """The alert that a failed handshake left to be sent, if any."""
        return self._outgoing.read()

    def receive(self, data: bytes) -> tuple[bytes, bool]:
        """SecurityLayer."""
        self._incoming.write(data)
        read = self.ssl_object.read
        plaintext = []
        closed = False
        try:
            while True:
                piece = read(self._RECORD)
                if not piece:
                    closed = True
                    break
                plaintext.append(piece)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            closed = True
        except ssl.SSLError as error:
            # What was decrypted before the bad record still counts.
            self.failure = error
            closed = True
        return (plaintext[0] if len(plaintext) == 1 else b"".join(plaintext)), closed

    def encrypt(self, data: bytes) -> bytes:
        """SecurityLayer."""
        if data:
            self.ssl_object.write(data)
        return self._outgoing.read()

    def pending(self) -> bool:
        """SecurityLayer."""
        return self._outgoing.pending > 0

    def close(self) -> bytes:
        """SecurityLayer."""
        # SSLError: our close_notify is written; the peer's, which unwrap also wants, is not waited for.
        with contextlib.suppress(ssl.SSLError):
            self.ssl_object.unwrap()
        return self._outgoing.read()
