"""Encrypted streams: who gets one, what travels on it, and that no thread of ours waits for another one's record."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import select
import signal
import socket
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from wires import PATIENCE, End, until

from distpool.errors import AuthenticationError
from distpool.transport import tls
from distpool.transport.ioloop import IoLoop
from distpool.transport.stream import dial
from distpool.transport.tls import Acceptance, Identity, TlsStream
from distpool.wire.frames import Kind
from distpool.wire.protocol import Role


@pytest.fixture(scope="module")
def identity() -> Identity:
    return tls.make_identity()


@pytest.fixture
def loop() -> Iterator[IoLoop]:
    loop = IoLoop("test-io")
    loop.start()
    yield loop
    loop.stop()


class Listener:
    """Accepts one connection after the other, each through an `Acceptance`; `outcomes` has what became of it."""

    def __init__(self, loop: IoLoop, identity: Identity) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = ("tls", *self.socket.getsockname())
        self.outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._loop, self._identity = loop, identity
        loop.register(self.socket, self._accept)

    def _accept(self) -> None:
        sock, _ = self.socket.accept()
        Acceptance(
            self._loop,
            sock,
            self._identity,
            lambda acceptance, stream: self.outcomes.put(stream),
            lambda acceptance, error: self.outcomes.put(error),
        )

    def next(self) -> Any:
        return self.outcomes.get(timeout=PATIENCE)

    def close(self) -> None:
        self._loop.unregister(self.socket)
        self.socket.close()


@pytest.fixture
def listener(loop: IoLoop, identity: Identity) -> Iterator[Listener]:
    made = Listener(loop, identity)
    yield made
    made.close()


@contextmanager
def streams(listener: Listener, identity: Identity) -> Iterator[tuple[TlsStream, TlsStream]]:
    """The dialler's and the acceptor's end, not blocking."""
    near = dial(listener.address, PATIENCE, identity)
    far = listener.next()
    near.setblocking(False)
    yield near, far
    near.close()
    far.close()


def read(stream: TlsStream, count: int) -> bytes:
    data = bytearray()

    def come() -> bool:
        try:
            piece = stream.recv(count - len(data))
        except BlockingIOError:
            return False
        assert piece, "the end"
        data.extend(piece)
        return len(data) == count

    until(come, f"{count} bytes")
    return bytes(data)


def test_both_ends_are_members(listener: Listener, identity: Identity) -> None:
    with streams(listener, identity) as (near, far):
        for one, other in ((near, far), (far, near)):
            with pytest.raises(BlockingIOError):
                other.recv(10)
            assert one.send(b"hello") == 5
            assert read(other, 5) == b"hello"
        near.shutdown(socket.SHUT_RDWR)
        until(lambda: ended(far), "the end")


def ended(stream: TlsStream) -> bool:
    try:
        return stream.recv(1) == b""
    except BlockingIOError:
        return False


def test_bytes_that_no_poller_sees_are_told(listener: Listener, identity: Identity) -> None:
    with streams(listener, identity) as (near, far):
        near.send(bytes(range(100)))
        assert read(far, 10) == bytes(range(10))
        assert far.pending() == 90
        assert far.recv(1000) == bytes(range(10, 100)) and far.pending() == 0


def test_a_full_connection_takes_no_more_and_nothing_is_lost(listener: Listener, identity: Identity) -> None:
    data = os.urandom(1 << 20) * 16
    with streams(listener, identity) as (near, far):
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                sent += near.send(memoryview(data)[sent:])
        assert 0 < sent < len(data)
        got = bytearray()

        def carry_on() -> bool:
            nonlocal sent
            try:
                got.extend(far.recv(1 << 20))
            except BlockingIOError:
                pass
            if sent < len(data):
                try:
                    sent += near.send(memoryview(data)[sent:])
                except BlockingIOError:
                    pass
            return len(got) == len(data)

        until(carry_on, "all")
        assert got == data


def test_a_stream_in_use_makes_nobody_wait(listener: Listener, identity: Identity) -> None:
    """As when the collector runs a `__del__` inside our own write, and that sends: a lock would never be given back."""
    with streams(listener, identity) as (near, far):
        with near._busy:
            for attempt in (lambda: near.send(b"x"), lambda: near.recv(1)):
                with pytest.raises(BlockingIOError):
                    attempt()
        near.send(b"x")
        assert read(far, 1) == b"x"


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no such signal here")
def test_a_peer_that_is_gone_raises_no_sigpipe(listener: Listener, identity: Identity) -> None:
    """As on plain links (`test_link`)."""
    told: list[int] = []
    before = signal.signal(signal.SIGPIPE, lambda signum, frame: told.append(signum))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with streams(listener, identity) as (near, far):
            far.close()

            def refused() -> bool:
                with contextlib.suppress(BlockingIOError):
                    near.send(b"x")
                return False

            with pytest.raises(OSError):
                until(refused, "it is noticed")
            assert not told and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    finally:
        signal.signal(signal.SIGPIPE, before)


def linked(near: Any, far: Any) -> tuple[End, End]:
    """Links over these two streams that have authenticated each other."""
    left, right = End("left", Role.CONNECTOR, near), End("right", Role.ACCEPTOR, far)
    right.start()
    left.start()
    assert left.ready.wait(PATIENCE) and right.ready.wait(PATIENCE)
    return left, right


def test_the_rest_is_read_behind_who_writes_at_the_moment(listener: Listener, identity: Identity) -> None:
    """It was taken for the end, and the last words of a dead process were lost."""
    with streams(listener, identity) as (near, far):
        left, right = linked(near, far)

        def last_look() -> None:
            left.link.send(Kind.CALLS, b"last words")
            select.select([far], [], [], PATIENCE)
            far._busy.acquire()
            threading.Timer(0.05, far._busy.release).start()
            right.link.read_rest()

        right.loop.call_soon(last_look)
        assert right.closed.wait(PATIENCE)
        assert right.next_frame(0.0).control == b"last words"
        left.stop()
        right.loop.stop()


def test_links_over_tls(listener: Listener, identity: Identity) -> None:
    """Much, from both sides at once, and small frames behind it."""
    with streams(listener, identity) as (near, far):
        left, right = linked(near, far)
        payload = os.urandom(8 << 20)
        for end in (left, right):
            for _ in range(3):
                end.link.send(Kind.RESULTS, b"head", payload, [payload[:70_000], b"small"])
            end.link.send(Kind.CALLS, b"last")
        for end in (left, right):
            for _ in range(3):
                frame = end.next_frame()
                assert bytes(frame.body) == payload
                assert [bytes(part) for part in frame.buffers] == [payload[:70_000], b"small"]
            assert end.next_frame().control == b"last"
        left.stop()
        assert right.closed.wait(PATIENCE)
        right.stop()


def test_what_is_decrypted_does_not_wait_for_more_to_come(listener: Listener, identity: Identity) -> None:
    """A thread writes just when the leader wants the rest of a record, and no poller sees that rest."""
    near, far = End("near", Role.CONNECTOR, dial(listener.address, PATIENCE, identity)), None  # type: ignore[arg-type]
    far = End("far", Role.ACCEPTOR, listener.next())
    for end in (near, far):
        end.start()
    assert near.ready.wait(PATIENCE) and far.ready.wait(PATIENCE)
    link, stream = far.link, far.link._sock
    until(lambda: link._read_size > 1000, "it is authenticated")
    link._read_size = 1000
    really, found = stream.recv, []

    def recv(size: int) -> bytes:
        data = really(size)
        if stream.pending() and not found:
            found.append(stream._busy.acquire())
            link.loop.call_later(20 * tls._TURN, stream._busy.release)
        return bytes(data)

    stream.recv = recv
    near.link.send(Kind.CALLS, b"", b"x" * 10_000)
    assert bytes(far.next_frame().body) == b"x" * 10_000 and found
    for end in (near, far):
        end.stop()


def test_many_threads_write_while_others_read(listener: Listener, identity: Identity) -> None:
    with streams(listener, identity) as (near, far):
        left, right = linked(near, far)
        each, threads = 100, 4

        def write(end: End, number: int) -> None:
            for index in range(each):
                end.link.send(Kind.RESULTS, bytes([number, index]), bytes([number]) * (index * 700))

        running = [
            threading.Thread(target=write, args=(end, number), daemon=True)
            for end in (left, right)
            for number in range(threads)
        ]
        for thread in running:
            thread.start()
        for end in (left, right):
            seen = dict.fromkeys(range(threads), 0)
            for _ in range(each * threads):
                frame = end.next_frame()
                number, index = frame.control
                assert seen[number] == index and bytes(frame.body) == bytes([number]) * (index * 700)
                seen[number] += 1
        for thread in running:
            thread.join(PATIENCE)
        left.stop()
        right.stop()


# ---------------------------------------------------------------------------------------------------------- who gets in


def test_another_clusters_certificate_is_refused_by_both(listener: Listener, identity: Identity) -> None:
    with pytest.raises(AuthenticationError, match="another certificate"):
        dial(listener.address, PATIENCE, tls.make_identity())
    assert isinstance(listener.next(), ssl.SSLError), "the listener has heard that it is not wanted"


def strange_client(listener: Listener, context: ssl.SSLContext) -> None:
    """Somebody who does not care which certificate he sees."""
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection(listener.address[1:], PATIENCE) as sock:
        with context.wrap_socket(sock) as wrapped:
            wrapped.sendall(b"hello")
            assert wrapped.recv(1) == b""


@pytest.mark.parametrize("case", ["no certificate", "another certificate", "signed by ours", "TLS 1.2"])
def test_who_cannot_show_ours_stays_outside(listener: Listener, identity: Identity, case: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if case == "another certificate":
        context = tls.make_identity().context(server=False)
    elif case == "signed by ours":
        context = signed_by(identity).context(server=False)
    elif case == "TLS 1.2":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        strange_client(listener, context)
    assert isinstance(listener.next(), (OSError, AuthenticationError))


def signed_by(identity: Identity) -> Identity:
    """A certificate of one's own that the cluster's key has signed, and which so has the same issuer."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    issuer = x509.load_pem_x509_certificate(identity.certificate.encode())
    secret: Any = serialization.load_pem_private_key(identity.key.encode(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "somebody")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(2100, 1, 1))
        .sign(secret, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
    made = Identity(certificate.public_bytes(pem).decode(), text)
    context = made.context(server=False)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return made


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 500, os.urandom(3000), b""])
def test_plain_bytes_get_nowhere(listener: Listener, data: bytes) -> None:
    with socket.create_connection(listener.address[1:], PATIENCE) as sock:
        sock.sendall(data)
        with contextlib.suppress(OSError):  # it may have been cut off already
            sock.shutdown(socket.SHUT_WR)
        assert isinstance(listener.next(), OSError)


def test_dialling_a_port_that_does_not_encrypt(identity: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def answer() -> None:
            with plain.accept()[0] as sock:
                sock.recv(10)
                sock.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(OSError):
            dial(("tls", *plain.getsockname()), PATIENCE, identity)
        thread.join(PATIENCE)


def test_a_silent_port_costs_what_was_allowed(identity: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(TimeoutError):
            dial(("tls", *silent.getsockname()), 0.3, identity)


def test_no_identity_no_encrypted_link(listener: Listener) -> None:
    with pytest.raises(ConnectionError, match="no identity"):
        dial(listener.address, PATIENCE)
    assert isinstance(listener.next(), OSError)


# ------------------------------------------------------------------------------------------------------------- identity


def test_an_identity_travels_as_text(identity: Identity) -> None:
    again = Identity.from_settings(identity.settings())
    assert (again.certificate, again.key) == (identity.certificate, identity.key)
    assert tls.make_identity().key != identity.key


@pytest.mark.parametrize("bad", [{}, {"certificate": "x"}, {"certificate": "x", "key": "y"}, 5, None, "text"])
def test_what_is_no_identity(bad: Any) -> None:
    with pytest.raises(ValueError):
        Identity.from_settings(bad)


def test_certificate_and_key_belong_together(identity: Identity) -> None:
    with pytest.raises(ValueError, match="certificate"):
        Identity.from_settings({"certificate": identity.certificate, "key": tls.make_identity().key})


def test_the_key_leaves_no_file_behind(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, identity: Identity) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delattr(os, "memfd_create", raising=False)  # the way of systems without files in memory
    Identity.from_settings(identity.settings())
    gc.collect()
    assert list(tmp_path.iterdir()) == []
