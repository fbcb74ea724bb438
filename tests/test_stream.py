"""Streams for links: dialled, or adopted from somebody who may close them."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distpool.transport.ioloop import IoLoop
from distpool.transport.stream import adopt, dial


@pytest.fixture
def loop() -> Iterator[IoLoop]:
    loop = IoLoop("test-io")
    loop.start()
    yield loop
    loop.stop()


def test_a_socket_is_used_through_a_duplicate() -> None:
    near, far = socket.socketpair()
    adopted = adopt(near)
    adopted.stream.sendall(b"hello")
    assert far.recv(5) == b"hello"
    assert not adopted.is_closed() and adopted.stream.fileno() != near.fileno()
    adopted.stream.close()
    adopted.end()
    adopted.end()
    assert near.fileno() < 0, "theirs is closed as well"
    assert far.recv(1) == b""
    far.close()


def test_the_same_socket_twice_is_a_socket() -> None:
    near, far = socket.socketpair()
    before = threading.active_count()
    adopted = adopt((near, near))
    assert threading.active_count() == before, "no pump"
    adopted.stream.close()
    adopted.end()
    far.close()


@pytest.mark.parametrize("pair", [False, True])
def test_the_owner_closes_it(loop: IoLoop, pair: bool) -> None:
    near, far = socket.socketpair()
    given = (near.makefile("rb"), near.makefile("wb")) if pair else near
    adopted = adopt(given)
    seen = threading.Event()
    adopted.watch(loop, seen.set)
    far.sendall(b"x")
    adopted.stream.settimeout(10)
    assert adopted.stream.recv(1) == b"x"
    assert not seen.wait(0.6)
    if isinstance(given, tuple):
        given[1].close()
    near.close()
    assert seen.wait(10)
    adopted.stream.close()
    adopted.end()
    far.close()


def test_watching_ends_with_the_link(loop: IoLoop) -> None:
    near, far = socket.socketpair()
    adopted = adopt(near)
    seen = threading.Event()
    adopted.watch(loop, seen.set)
    adopted.stream.close()
    adopted.end()
    assert not seen.wait(0.6)
    far.close()


@pytest.mark.parametrize("bad", [5, None, (1,), (1, 2, 3), "ab", object()])
def test_what_is_no_stream(bad: object) -> None:
    with pytest.raises(TypeError):
        adopt(bad)


def test_one_file_of_a_socket_is_no_pair() -> None:
    """It was iterated over, which waited for two lines."""
    near, far = socket.socketpair()
    with near, far, near.makefile("rwb") as file, near.makefile("rb") as reader:
        for one, name in ((file, "BufferedRWPair"), (reader, "BufferedReader")):
            with pytest.raises(TypeError, match=f"a socket or a pair .reader, writer., not {name}"):
                adopt(one)
        far.sendall(b"a\n")
        assert near.recv(2) == b"a\n", "not a byte was taken"


def test_closed_and_encrypted_sockets_are_refused() -> None:
    near, far = socket.socketpair()
    near.close()
    with pytest.raises(ConnectionError):
        adopt(near)
    tls = ssl.create_default_context().wrap_socket(far, server_hostname="localhost", do_handshake_on_connect=False)
    with pytest.raises(TypeError, match="TLS"):
        adopt(tls)
    tls.close()


def test_dial(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with dial(("tcp", "127.0.0.1", listener.getsockname()[1]), 10) as sock:
            accepted, _ = listener.accept()
            accepted.sendall(b"tcp")
            assert sock.recv(3) == b"tcp"
            accepted.close()
    with pytest.raises(OSError):
        dial(("tcp", "127.0.0.1", 1), 10)
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with dial(("unix", path), 10):
            pass
    with pytest.raises(OSError):
        dial(("unix", path), 10)


def test_dial_gives_up() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = ("tcp", "127.0.0.1", listener.getsockname()[1])
        waiting = [socket.socket() for _ in range(3)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(tuple(address[1:]))
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            dial(address, 0.5)
        assert time.monotonic() - begin < 10
        for sock in waiting:
            sock.close()
