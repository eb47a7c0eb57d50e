"""TLS as bytes in, bytes out, over `ssl.MemoryBIO`. No socket, no waiting.

The socket's owner counts ciphertext as life (K2), and what OpenSSL has to say while reading goes out through the one
writer. `Cleartext` is the same thing for connections without TLS.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import sys
from typing import Protocol

__all__ = ["Cleartext", "SecurityLayer", "TLSLayer", "create_ssl_context"]

#: A client certificate: a file, or (certificate, key), or (certificate, key, password).
CertTypes = str | tuple[str, str] | tuple[str, str, str]


def create_ssl_context(verify: str | bool, cert: CertTypes | None, trust_env: bool) -> ssl.SSLContext:
    """A context for clients: TLS 1.2 or later, and the trust that `verify` asks for.

    True: SSL_CERT_FILE and SSL_CERT_DIR if `trust_env` and set, else the system's trust store. A path: the
    certificate authorities in that file or directory alone. False: no verification at all.
    """
    if verify is True:
        context = _system_context(trust_env)
    elif verify is False:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = _context_for(verify)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if isinstance(cert, str):
        context.load_cert_chain(cert)
    elif cert is not None:
        context.load_cert_chain(*cert)
    return context


def _system_context(trust_env: bool) -> ssl.SSLContext:
    path = (os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")) if trust_env else None
    if path:
        return _context_for(path)
    if sys.platform in ("darwin", "win32"):
        import truststore

        return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return ssl.create_default_context()


def _context_for(path: str) -> ssl.SSLContext:
    if os.path.isfile(path):
        try:
            return ssl.create_default_context(cafile=path)
        except ssl.SSLError as error:
            raise ValueError(f"verify: {path!r} holds no certificates that OpenSSL can read: {error}") from error
    if os.path.isdir(path):
        return ssl.create_default_context(capath=path)
    raise FileNotFoundError(f"verify: {path!r} is neither a file nor a directory")


class SecurityLayer(Protocol):
    """What stands between the socket and HTTP/2."""

    @property
    def ssl_object(self) -> ssl.SSLObject | None:
        """For inspection (certificate, cipher); None without TLS."""

    @property
    def failure(self) -> ssl.SSLError | None:
        """What broke TLS, None while nothing did."""

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
