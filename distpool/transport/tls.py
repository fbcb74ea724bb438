"""TLS for links that leave the host: one identity per cluster, mutual TLS 1.3, that one certificate pinned (layer 2).

    make_identity()             master, on first need: certificate and key; handed to workers over their login
    connect(socket, identity)   dialler, on a thread that may block       -> TlsStream
    Acceptance                  listener, driven by the I/O loop          -> TlsStream

All members of a cluster show the same self-signed certificate and accept no other, so there is no authority that could
be asked for a second one, no host name to compare and no clock to agree with. Knowing the key means being a member, as
knowing the cookie does; the handshake with the cookie follows inside.

`ssl` is imported on first use: a cluster on one machine never needs it. Making the identity needs `cryptography` (which
paramiko brings); using it needs only the standard library.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

from distpool.errors import AuthenticationError
from distpool.hints import TYPE_CHECKING, Any
from distpool.sigpipe import quietly

if TYPE_CHECKING:
    import ssl

    from distpool.transport.ioloop import IoLoop

_AT_ONCE = 1 << 20  # bytes that one `recv_into` gathers: a TLS record holds 16 KiB, a turn of the I/O loop costs more
_SLICE = 1 << 18  # bytes of one write, sixteen records: with four it takes twice the time
_TURN = 0.001  # seconds that the leader waits for a thread which is writing, if nobody says otherwise (`patience`)


class Identity:
    """What makes a process a member on encrypted links: certificate and private key, both as PEM text.

    ValueError: they are no such pair. Any thread.
    """

    def __init__(self, certificate: str, key: str) -> None:
        self.certificate = certificate
        self.key = key
        self._contexts: dict[bool, ssl.SSLContext] = {}
        self._making = threading.Lock()  # protects _contexts while one is made

    @classmethod
    def from_settings(cls, settings: Any) -> Identity:
        """From what a worker was handed: `{"certificate": PEM, "key": PEM}`; ValueError."""
        try:
            identity = cls(str(settings["certificate"]), str(settings["key"]))
        except (TypeError, KeyError):
            raise ValueError('tls must be {"certificate": PEM text, "key": PEM text}') from None
        identity.context(server=True)
        return identity

    def settings(self) -> dict[str, str]:
        """What a worker has to be handed, over a private way."""
        return {"certificate": self.certificate, "key": self.key}

    def context(self, server: bool) -> ssl.SSLContext:
        """The context of that side."""
        with self._making:
            context = self._contexts.get(server)
            if context is None:
                context = self._contexts[server] = _context(self, server)
            return context

    def check(self, stream: ssl.SSLSocket) -> None:
        """AuthenticationError unless the other side has shown this very certificate."""
        import ssl

        if stream.getpeercert(binary_form=True) != ssl.PEM_cert_to_DER_cert(self.certificate):
            raise AuthenticationError("Invalid connection credentials: another certificate")


def make_identity() -> Identity:
    """A new certificate and key. RuntimeError: `cryptography` is missing. Takes some milliseconds."""
    import datetime

    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise RuntimeError(
            "encrypted links between hosts need the package `cryptography` on the machine that starts the workers:"
            " install it (paramiko brings it), or pass encrypt=False for links in clear"
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "distpool cluster")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # It lives as long as the program; clocks of hosts may differ by anything.
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)  # it vouches for nobody else
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Identity(certificate.public_bytes(pem).decode(), secret.decode())


def _context(identity: Identity, server: bool) -> ssl.SSLContext:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if server:
        context.num_tickets = 0  # nobody resumes, and a ticket would be bytes that nobody has asked for
    try:
        context.load_verify_locations(cadata=identity.certificate)
        with _as_file(identity.certificate + identity.key) as path:
            context.load_cert_chain(path)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"not a certificate and its private key in PEM form: {error}") from None
    return context


@contextlib.contextmanager
def _as_file(text: str) -> Iterator[str]:
    """`load_cert_chain` reads files only. In memory where the system has such files, so that no disk sees the key."""
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        descriptor = os.memfd_create("distpool-identity", os.MFD_CLOEXEC)
        path = f"/proc/self/fd/{descriptor}"
        remove: Callable[[], object] = lambda: None  # noqa: E731
    else:
        import tempfile

        descriptor, path = tempfile.mkstemp(prefix="distpool-")  # readable by us only
        remove = lambda: os.unlink(path)  # noqa: E731
    try:
        os.write(descriptor, text.encode())
        yield path
    finally:
        os.close(descriptor)
        remove()


class TlsStream:
    """An `ssl.SSLSocket` as links want their streams; its TLS handshake is over.

    OpenSSL's connection may be used by one thread at a time, while a link writes on any thread and reads on the leader:
    hence `_busy`. It is never waited for without an end: a `__del__` that the collector runs inside our own write may
    come back here, on the same thread. Who finds it taken behaves as if the kernel could not take (or had no) bytes,
    and is called again by the poller.

    What lies decrypted inside OpenSSL is not seen by the poller: after each read, `pending()` tells.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        import ssl

        self._sock = sock
        self._busy = threading.Lock()  # protects OpenSSL's connection; nobody waits for it for long
        self.patience = _TURN
        self._not_now = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self._over = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
        self.family = sock.family

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._sock.fileno()

    def setblocking(self, flag: bool, /) -> None:
        """As a socket's."""
        self._sock.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """As a socket's."""
        self._sock.setsockopt(level, option, value)

    def getsockopt(self, *arguments: int) -> Any:
        """As a socket's."""
        return self._sock.getsockopt(*arguments)

    def getpeername(self) -> Any:
        """As a socket's."""
        return self._sock.getpeername()

    def pending(self) -> int:
        """Bytes that can be read although the poller does not see them."""
        try:
            return self._sock.pending()
        except (OSError, ValueError):
            return 0  # closed meanwhile

    def recv(self, size: int, /) -> bytes:
        """Up to `size` bytes; BlockingIOError, and `b""` at the end."""
        buffer = bytearray(size)
        count = self.recv_into(buffer)
        return bytes(memoryview(buffer)[:count])

    def recv_into(self, buffer: Any, /) -> int:
        """Fill as much of `buffer` as has come; BlockingIOError, and 0 at the end."""
        if not self._busy.acquire(timeout=self.patience):
            raise BlockingIOError
        try:
            view = memoryview(buffer)
            room, have = min(len(view), _AT_ONCE), 0
            while have < room:
                try:
                    count = self._sock.recv_into(view[have:room])
                except self._not_now:
                    break
                except self._over:
                    return have  # the next read reports the end again
                if not count:
                    return have
                have += count
        finally:
            self._busy.release()
        if not have:
            raise BlockingIOError
        return have

    def send(self, data: Any, /) -> int:
        """Write what the kernel takes; BlockingIOError. To be repeated with the same data, from where it stopped."""
        if not self._busy.acquire(blocking=False):
            raise BlockingIOError
        try:
            # A write that does not fit as a whole counts as not done, although records of it are on their way, and has
            # to be repeated with the same bytes. Hence slices: who calls again with the same data repeats the same one.
            view = memoryview(data)
            sent, size = 0, len(view)
            with quietly():
                while sent < size and sent < _AT_ONCE:
                    try:
                        sent += self._sock.send(view[sent : sent + _SLICE])
                    except self._not_now:
                        break
        finally:
            self._busy.release()
        if not sent and size:
            raise BlockingIOError
        return sent

    def shutdown(self, how: int, /) -> None:
        """End the TCP connection. Not `SSLSocket.shutdown`, which takes the connection away from whoever uses it."""
        socket.socket.shutdown(self._sock, how)

    def close(self) -> None:
        """As a socket's."""
        self._sock.close()


def connect(sock: socket.socket, identity: Identity, timeout: float) -> TlsStream:
    """TLS as the dialling side, within `timeout` seconds; `sock` is connected (TCP, or what
    carries a manager's own streams), and ours from now on.

    AuthenticationError: whoever listens there is no member. OSError: the connection broke, or time is up.
    """
    import ssl

    try:
        sock.settimeout(timeout)
        secure = identity.context(server=False).wrap_socket(sock, do_handshake_on_connect=False)
    except BaseException:
        sock.close()
        raise
    try:
        with quietly():
            secure.do_handshake()
        identity.check(secure)
    except (ssl.SSLCertVerificationError, AuthenticationError):
        secure.close()
        raise AuthenticationError("Invalid connection credentials: another certificate") from None
    except BaseException:
        secure.close()
        raise
    return TlsStream(secure)


class Acceptance:
    """The TLS handshake of one connection that somebody has made to us. Everything runs on the leader.

    `done(acceptance, stream)` follows, or `failed(acceptance, error)`, once; after `close` neither.
    """

    def __init__(
        self,
        loop: IoLoop,
        sock: socket.socket,
        identity: Identity,
        done: Callable[[Acceptance, TlsStream], object],
        failed: Callable[[Acceptance, Exception], object],
    ) -> None:
        sock.setblocking(False)
        self._loop = loop
        self._identity = identity
        self._done = done
        self._failed = failed
        self._wants_write = False
        self._sock = identity.context(server=True).wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        loop.register_link(self._sock, lambda events: self._go_on())

    def _go_on(self) -> None:
        import ssl

        try:
            with quietly():
                self._sock.do_handshake()
            self._identity.check(self._sock)
        except ssl.SSLWantReadError:
            self._want(False)
        except ssl.SSLWantWriteError:
            self._want(True)
        except (OSError, ValueError, AuthenticationError) as error:
            self._end()
            self._failed(self, error.with_traceback(None))
        else:
            self._loop.unregister(self._sock)
            self._done(self, TlsStream(self._sock))

    def _want(self, write: bool) -> None:
        if write is not self._wants_write:
            self._wants_write = write
            self._loop.want_write(self._sock, write)

    def close(self, reason: BaseException | None = None) -> None:
        """Give up."""
        self._end()

    def _end(self) -> None:
        self._loop.unregister(self._sock)
        self._sock.close()


__all__ = ["Acceptance", "Identity", "TlsStream", "connect", "make_identity"]
