"""TLS as bytes in, bytes out, over `ssl.MemoryBIO`. No socket, no waiting.

The socket's owner counts ciphertext as life (K2), and what OpenSSL has to say while reading goes out through the one
writer. `Cleartext` is the same thing for connections without TLS.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Cleartext", "SecurityLayer", "Sessions", "TLSLayer", "create_ssl_context"]

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
    keys = os.environ.get("SSLKEYLOGFILE")
    if keys and not sys.flags.ignore_environment:
        # As `ssl.create_default_context` has it; not all of the contexts above come from there.
        context.keylog_filename = keys
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

    def encrypt(self, data: bytes | memoryview) -> bytes:
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

    def encrypt(self, data: bytes | memoryview) -> bytes:
        """SecurityLayer."""
        return bytes(data)

    def pending(self) -> bool:
        """SecurityLayer."""
        return False

    def close(self) -> bytes:
        """SecurityLayer."""
        return b""


class Sessions:
    """What TLS connections leave behind for the next one to the same server, which is then set up faster.

    A session stands for a server that was verified once, and is not verified again. So it is used with the context
    that it comes from alone, for the same origin, and not after the context has been told to verify otherwise. It is
    used once (RFC 8446, appendix C.4), and if a server chokes on it, then once. Shared by threads.
    """

    _MOST = 256

    def __init__(self) -> None:
        self._sessions: dict[object, ssl.SSLSession] = {}

    def key(self, context: ssl.SSLContext, origin: object) -> object | None:
        """Where the origin's session is kept; None if none may be: some contexts do the verifying themselves."""
        own = type(context).wrap_bio is ssl.SSLContext.wrap_bio and context.sslobject_class is ssl.SSLObject
        how = (context.verify_mode, context.check_hostname, context.verify_flags)
        return (id(context), origin, how) if own else None

    def take(self, key: object | None) -> ssl.SSLSession | None:
        """The session, which is then no longer kept."""
        return self._sessions.pop(key, None)

    def put(self, key: object, session: ssl.SSLSession) -> None:
        """Keep a session, in the place of an older one."""
        self._sessions.pop(key, None)
        self._sessions[key] = session
        if len(self._sessions) > self._MOST:
            # A copy: other threads may add to it meanwhile.
            self._sessions.pop(next(iter(list(self._sessions))), None)


class TLSLayer:
    """The client's side of one TLS connection.

    * `alpn`: what to offer; as the context says, if none is given.
    * `session`: one to go on with; and `on_session` is called with one that a later connection can go on with.
    """

    heard = True
    #: One TLS record's plaintext: OpenSSL never returns more from one read.
    _RECORD = 16 * 1024
    #: Others may change what a shared context offers at any moment; as often as this in a row they don't.
    _MOST_HELLOS = 10
    #: TLS 1.3's sessions come after the handshake, if at all: with the first bytes, or soon.
    _MOST_LOOKS = 8

    def __init__(
        self,
        context: ssl.SSLContext,
        server_hostname: str,
        *,
        alpn: Sequence[str] = (),
        session: ssl.SSLSession | None = None,
        on_session: Callable[[ssl.SSLSession], object] | None = None,
    ) -> None:
        self._incoming: ssl.MemoryBIO
        self._outgoing: ssl.MemoryBIO
        self.ssl_object: ssl.SSLObject
        self._on_session = on_session
        self._looks = 0 if on_session is None else self._MOST_LOOKS
        self.failure: ssl.SSLError | None
        for _ in range(self._MOST_HELLOS):
            if alpn:
                context.set_alpn_protocols(list(alpn))
            incoming, outgoing = self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            given: dict[str, Any] = {} if session is None else {"session": session}
            self.ssl_object = context.wrap_bio(incoming, outgoing, server_hostname=server_hostname, **given)
            self.failure = self._begin()
            if self.failure is not None or _alpn_extension(alpn) in self._hello:
                break

    def _begin(self) -> ssl.SSLError | None:
        """Make the first message, to see what it offers; why there can't be one."""
        failure = None
        try:
            self.ssl_object.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            failure = error
        self._hello = self._outgoing.read()
        return failure

    def handshake(self, data: bytes | None) -> tuple[bytes, bool]:
        """One step: what the peer sent (None at first, b"" for EOF); what to write, and whether it is done.

        Raises `ssl.SSLError`; what OpenSSL wants to say about it (an alert) is `farewell`'s.
        """
        if data is None:
            if self.failure is not None:
                raise self.failure
            return self._hello, False
        if data:
            self._incoming.write(data)
        else:
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
        incoming, ssl_object = self._incoming, self.ssl_object
        incoming.write(data)
        plaintext = []
        closed = False
        try:
            while True:
                piece = ssl_object.read(self._RECORD)
                if not piece:
                    closed = True
                    break
                plaintext.append(piece)
                # The end is foreseen where it can be: the exception that says so costs more than a small record. Of a
                # record that was read whole nothing is pending.
                if not incoming.pending and (len(piece) < self._RECORD or not ssl_object.pending()):
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            closed = True
        except ssl.SSLError as error:
            # What was decrypted before the bad record still counts.
            self.failure = error
            closed = True
        if self._looks:
            self._look_for_session()
        return (plaintext[0] if len(plaintext) == 1 else b"".join(plaintext)), closed

    def _look_for_session(self) -> None:
        session = self.ssl_object.session
        # What TLS 1.3 has before its first ticket can't be gone on with.
        usable = session is not None and (session.has_ticket or self.ssl_object.version() != "TLSv1.3")
        self._looks = 0 if usable else self._looks - 1
        if session is not None and usable and self._on_session is not None:
            self._on_session(session)

    def encrypt(self, data: bytes | memoryview) -> bytes:
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


def _alpn_extension(protocols: Sequence[str]) -> bytes:
    """As it stands in a client's first message (RFC 7301, section 3.1)."""
    if not protocols:
        return b""
    names = b"".join(bytes([len(name)]) + name.encode("ascii") for name in protocols)
    return len(names).to_bytes(2, "big") + names
