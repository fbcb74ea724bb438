"""Blocking reader and writer as a stream that can be polled."""

from __future__ import annotations

import io
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from distpool.transport.pump import Pump, readinto_of, write_of

PATIENCE = 30.0


def make(reader: Any, writer: Any) -> Pump:
    return Pump(reader, writer, readinto_of(reader), write_of(writer))


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece
        data += piece
    return data


class Slow(io.RawIOBase):
    """One byte at a time, both ways."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.sock = sock

    def readinto(self, buffer: Any) -> int:
        return self.sock.recv_into(buffer, 1)

    def write(self, data: Any) -> int:
        return self.sock.send(bytes(data[:1]))

    def close(self) -> None:
        if not self.closed:
            self.sock.shutdown(socket.SHUT_RDWR)
        super().close()


class Everything:
    """As paramiko's files: `write` takes all and returns nothing."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.flushed = 0

    def write(self, data: bytes) -> None:
        self.sock.sendall(data)

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.sock.close()


PAIRS: list[Any] = [
    pytest.param(lambda sock: (sock.makefile("rb"), sock.makefile("wb")), id="buffered"),
    pytest.param(lambda sock: (sock.makefile("rb", buffering=0), sock.makefile("wb", buffering=0)), id="raw"),
    pytest.param(lambda sock: (sock, sock.dup()), id="sockets"),
    pytest.param(lambda sock: (Slow(sock), Slow(sock.dup())), id="bytewise"),
    pytest.param(lambda sock: (sock.makefile("rb"), Everything(sock)), id="file-like"),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_bytes_go_both_ways(pair: Any) -> None:
    near, far = socket.socketpair()
    reader, writer = pair(near)
    far.settimeout(20)
    size = 3000 if isinstance(reader, Slow) else 1 << 20
    pump = make(reader, writer)
    pump.stream.settimeout(20)
    there, back = os.urandom(size), os.urandom(size)
    sending = threading.Thread(target=pump.stream.sendall, args=(there,))
    answering = threading.Thread(target=far.sendall, args=(back,))
    sending.start()
    answering.start()
    assert read_exactly(far, size) == there
    assert read_exactly(pump.stream, size) == back
    sending.join(10)
    answering.join(10)
    pump.stream.close()
    far.settimeout(10)
    assert far.recv(1) == b"", "the link's end closes the writer"
    wait_until(lambda: reader.fileno() < 0 if isinstance(reader, socket.socket) else reader.closed)
    far.close()


@pytest.mark.parametrize("pair", PAIRS)
def test_the_end_of_the_reader_is_the_end(pair: Any) -> None:
    near, far = socket.socketpair()
    pump = make(*pair(near))
    far.sendall(b"last words")
    far.close()
    assert read_exactly(pump.stream, 10) == b"last words"
    assert pump.stream.recv(1) == b""
    pump.stream.close()


def test_a_writer_that_fails_ends_it() -> None:
    class Broken:
        def write(self, data: bytes) -> int:
            raise RuntimeError("a defect of the user's")

        def close(self) -> None:
            pass

    near, far = socket.socketpair()
    pump = make(near.makefile("rb"), Broken())
    pump.stream.sendall(b"x")
    pump.stream.settimeout(10)
    assert pump.stream.recv(1) == b""
    pump.stream.close()
    near.close()
    far.close()


def test_a_buffered_reader_can_be_closed_while_it_is_read() -> None:
    near, far = socket.socketpair()
    reader, writer = near.makefile("rb"), near.makefile("wb")
    pump = make(reader, writer)
    far.sendall(b"x")
    assert read_exactly(pump.stream, 1) == b"x"
    time.sleep(0.05)
    begin = time.monotonic()
    reader.close()
    assert time.monotonic() - begin < 2
    assert pump.is_closed()
    pump.stream.close()
    near.close()
    far.close()


def test_what_a_buffered_reader_has_read_already_is_not_lost() -> None:
    near, far = socket.socketpair()
    reader = near.makefile("rb")
    far.sendall(b"line\nrest")
    assert reader.readline() == b"line\n"
    pump = make(reader, near.makefile("wb"))
    assert read_exactly(pump.stream, 4) == b"rest"
    pump.stream.close()
    near.close()
    far.close()


def test_streams_that_would_block() -> None:
    reader, into = os.pipe()
    out_of, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    pump = make(open(reader, "rb", buffering=0), open(writer, "wb", buffering=0))
    big = os.urandom(1 << 18)
    sending = threading.Thread(target=pump.stream.sendall, args=(big,))
    sending.start()
    time.sleep(0.1)  # the pipe is full
    with open(out_of, "rb") as file:
        assert file.read(len(big)) == big
        os.write(into, b"abc")
        assert read_exactly(pump.stream, 3) == b"abc"
        os.close(into)
        pump.stream.settimeout(10)
        assert pump.stream.recv(1) == b""
    sending.join(10)
    pump.stream.close()


def test_threads_end() -> None:
    before = set(threading.enumerate())
    near, far = socket.socketpair()
    pump = make(near.makefile("rb"), near.makefile("wb"))
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"distpool-pump-in", "distpool-pump-out"}
    pump.stream.close()
    near.close()
    far.close()
    wait_until(lambda: not [t for t in set(threading.enumerate()) - before if "pump" in t.name])


@pytest.mark.skipif(not hasattr(select, "poll"), reason="numbers of descriptors are limited here")
def test_streams_in_non_blocking_mode_with_high_numbers() -> None:
    """`select.select` refuses those from 1024 on."""
    fcntl, resource = pytest.importorskip("fcntl"), pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 2048:
        pytest.skip("no such descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2048), before[1]))
    numbers = []
    try:
        for number in (*os.pipe(), *os.pipe()):
            numbers.append(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 1500))
            os.close(number)
        source, theirs, sink, ours = numbers
        for number in (source, ours):
            os.set_blocking(number, False)
        pump = make(os.fdopen(source, "rb", 0), os.fdopen(ours, "wb", 0))
        os.write(theirs, b"hello")
        pump.stream.settimeout(PATIENCE)
        assert pump.stream.recv(5) == b"hello"
        much = os.urandom(1 << 18)
        sender = threading.Thread(target=pump.stream.sendall, args=(much,))
        sender.start()
        data = b""
        while len(data) < len(much):
            piece = os.read(sink, 65536)
            assert piece
            data += piece
        sender.join(PATIENCE)
        assert data == much
        os.close(theirs)
        wait_until(pump.is_closed)
        os.close(sink)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("count", [0, 1])
def test_a_system_that_starts_no_further_thread(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two would read for ever, and hold the connection open."""
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if len(started) == count:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    near, far = socket.socketpair()
    far.settimeout(PATIENCE)
    with near, far:
        with pytest.raises(RuntimeError):
            make(near.makefile("rb"), near.makefile("wb"))
        assert far.recv(1) == b"", "the end"
    for thread in started:
        thread.join(PATIENCE)
        assert not thread.is_alive()


class OnlyInto(io.BufferedIOBase):
    """A buffered stream that has not more than it needs: `read1` and `readinto1` of the base class end in an error."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def readinto(self, buffer: Any) -> int:
        part, self.data = self.data[:3], self.data[3:]
        buffer[: len(part)] = part
        return len(part)


class OnlyInto1(OnlyInto):
    def readinto1(self, buffer: Any) -> int:
        return OnlyInto.readinto(self, buffer)

    def readinto(self, buffer: Any) -> int:
        raise AssertionError("it would wait until the buffer is full")


class OnlyRead(io.BufferedIOBase):
    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, size: int | None = -1, /) -> bytes:
        part, self.data = self.data[:size], self.data[size:]
        return part


@pytest.mark.parametrize("kind", [OnlyInto, OnlyInto1, OnlyRead, io.BytesIO])
def test_buffered_streams_of_any_make(kind: Any) -> None:
    near, far = socket.socketpair()
    with near, far:
        pump = make(kind(b"abcdefgh"), near.makefile("wb", 0))
        pump.stream.settimeout(PATIENCE)
        assert read_exactly(pump.stream, 8) == b"abcdefgh" and pump.stream.recv(1) == b""
        pump.stream.close()


def test_what_cannot_be_read_or_written() -> None:
    with pytest.raises(TypeError, match="readinto"):
        readinto_of(object())
    with pytest.raises(TypeError, match="write"):
        write_of(object())


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no such signal here")
def test_a_writer_whose_reader_is_gone_raises_no_sigpipe() -> None:
    """It ends programs that have set it to SIG_DFL, as those do whose output may go to `head`."""
    told: list[int] = []
    before = signal.signal(signal.SIGPIPE, lambda signum, frame: told.append(signum))
    try:
        (source, theirs), (sink, ours) = os.pipe(), os.pipe()
        pump = make(os.fdopen(source, "rb", 0), os.fdopen(ours, "wb", 0))
        os.close(sink)
        pump.stream.sendall(b"nobody reads it")
        wait_until(pump.is_closed)
        assert not told
        os.close(theirs)
    finally:
        signal.signal(signal.SIGPIPE, before)
