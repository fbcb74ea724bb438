"""What a connection is told to do about silent hosts; tests/hosts shows that it is noticed."""

from __future__ import annotations

import errno
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wires import until

from distpool.transport import silence
from distpool.transport.ioloop import IoLoop
from distpool.transport.silence import (
    Watch,
    acknowledged,
    is_loopback,
    is_private,
    is_silence,
    leaves_host,
    tune,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        yield near, far
        near.close()
        far.close()


@pytest.mark.parametrize(
    "seconds, idle, between, probes",
    [
        *(("20", 10, 2, 5), ("2", 1, 1, 1), ("0.5", 1, 1, 1), ("60", 30, 6, 5)),
    ],
)
def test_the_kernel_asks_idle_peers(
    pair: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    seconds: str,
    idle: int,
    between: int,
    probes: int,
) -> None:
    monkeypatch.setenv("DISTPOOL_SILENT_SECONDS", seconds)
    tune(pair[0])
    level = socket.IPPROTO_TCP
    assert pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert pair[0].getsockopt(level, socket.TCP_NODELAY)
    if sys.platform == "linux":
        found = [pair[0].getsockopt(level, getattr(socket, f"TCP_KEEP{name}")) for name in ("IDLE", "INTVL", "CNT")]
        assert found == [idle, between, probes]
        assert not pair[0].getsockopt(level, socket.TCP_USER_TIMEOUT), "it would kill stopped workers"


def test_what_is_no_tcp_is_left_alone() -> None:
    near, far = socket.socketpair()
    tune(near)
    assert not leaves_host(near) and is_private(near)
    near.close()
    far.close()


def test_a_closed_connection_is_no_error(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    tune(pair[0])
    assert not leaves_host(pair[0])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "1270.example", "fe80::1", "", "::ffff:10.0.0.1"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_which_errors_mean_silence() -> None:
    assert is_silence(TimeoutError("x")) and is_silence(OSError(errno.EHOSTUNREACH, "x"))
    for other in (None, ConnectionResetError("x"), OSError(errno.EPIPE, "x"), ValueError("x")):
        assert not is_silence(other)


class Elsewhere:
    """A connection to another host, as the kernel describes it."""

    family = socket.AF_INET

    def __init__(self) -> None:
        self.unacked, self.probes, self.age = 0, 0, 0.0

    def getpeername(self) -> Any:
        return ("192.0.2.1", 5)

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        info = bytearray(size)
        info[3] = self.probes
        struct.pack_into("=I", info, 24, self.unacked)
        struct.pack_into("=I", info, 56, int(self.age * 1000))
        return bytes(info)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.parametrize(
    "unacked, probes, age, dead",
    [(1, 0, 1.0, True), (0, 2, 1.0, True), (0, 1, 1.0, False), (0, 0, 100.0, False), (5, 0, 0.1, False)],
)
def test_when_the_watch_says_silent(
    monkeypatch: pytest.MonkeyPatch, unacked: int, probes: int, age: float, dead: bool
) -> None:
    monkeypatch.setenv("DISTPOOL_SILENT_SECONDS", "0.8")
    loop = IoLoop("test-io")
    loop.start()
    stream, seen, looks = Elsewhere(), threading.Event(), []
    stream.unacked, stream.probes, stream.age = unacked, probes, age
    real = stream.getsockopt
    stream.getsockopt = lambda *args: (looks.append(1), real(*args))[1]  # type: ignore[method-assign]
    watch: list[Watch] = []
    loop.call_soon(lambda: watch.append(Watch(loop, stream, seen.set)))
    until(lambda: seen.is_set() or len(looks) >= 4, "a few looks")
    assert seen.is_set() is dead
    loop.call_soon(lambda: watch[0].end())
    loop.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_was_just_sent_after_a_long_rest_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTPOOL_SILENT_SECONDS", "1")
    stream = Elsewhere()
    loop = IoLoop("test-io")
    watch = Watch(loop, stream, lambda: pytest.fail("it is not silent"))
    stream.unacked, stream.age = 1, 1000.0
    watch._look()
    stream.unacked = 0
    watch._look()
    stream.unacked = 1
    watch._look()
    watch.end()
    loop.close_descriptors()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_the_peers_kernel_has(pair: tuple[socket.socket, socket.socket]) -> None:
    stream = Elsewhere()
    assert acknowledged(stream)
    stream.unacked = 1
    assert not acknowledged(stream)
    pair[0].send(b"nobody reads this")
    until(lambda: acknowledged(pair[0]), "its kernel takes it all the same")
    pair[0].close()
    assert not acknowledged(pair[0])


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_a_unix_socket_tells_of_its_end_by_itself(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as near:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        near.connect(listener.getsockname())
        far, _ = listener.accept()
        with far:
            assert acknowledged(near) and acknowledged(far)
    near, far = socket.socketpair()
    with near, far:
        assert not acknowledged(near), "nobody knows what is behind it"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_kernel_has_the_fields_where_we_look(pair: tuple[socket.socket, socket.socket]) -> None:
    """A full receiver: nothing can be under way for long, and acknowledgements are young."""
    near, far = pair
    near.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            near.send(bytes(1 << 16))
    data = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, silence._INFO.size)
    fields = silence._INFO.unpack(data)
    assert fields[0] == 1, "ESTABLISHED"
    assert fields[-1] < 10_000
