"""A link under stress, over a socket pair: frames are never torn, nobody waits for ever, the end is told once."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import socket
import struct
import threading
import time
from collections import defaultdict
from typing import Any

import pytest
from wires import COOKIE, PATIENCE, End, ends, until

from distpool import config
from distpool.errors import AuthenticationError, ProtocolError
from distpool.transport.ioloop import IoLoop
from distpool.transport.link import Link
from distpool.wire.frames import Frame, Kind, SegmentRef, pack_frame
from distpool.wire.protocol import Handshake, Role


def body_of(frame: Frame) -> bytes:
    return bytes(frame.body)


def test_frames_arrive_in_order_with_all_their_parts() -> None:
    with ends() as (left, right):
        buffers = [b"", b"x" * 10, bytearray(b"y" * 100_000), memoryview(b"z" * 3)]
        reference = SegmentRef(7, "/proc/1/fd/é", 4096, 1000)
        assert left.link.send(Kind.CALLS, b"control", b"body", [*buffers, reference])
        assert left.link.send(Kind.RESULTS)
        frame = right.next_frame()
        assert (frame.kind, bytes(frame.control), body_of(frame)) == (Kind.CALLS, b"control", b"body")
        assert [bytes(part) for part in frame.buffers[:-1]] == [bytes(part) for part in buffers]
        assert frame.buffers[-1] == reference
        assert right.next_frame().kind == Kind.RESULTS
        assert left.link.bytes_out == right.link.bytes_in > 100_000


@pytest.mark.parametrize("size", [1 << 20, 8 << 20])
def test_both_sides_send_much_at_once(size: int) -> None:
    """A side that reads and writes with blocking calls stops for ever here."""
    with ends() as (left, right):
        count = 4
        payload = os.urandom(size)
        for _ in range(count):
            for end in (left, right):
                end.link.send(Kind.RESULTS, b"", payload, [payload])
        for end in (left, right):
            for _ in range(count):
                frame = end.next_frame()
                assert body_of(frame) == payload and bytes(frame.buffers[0]) == payload


def test_many_threads_send_and_nothing_is_torn() -> None:
    with ends() as (left, right):
        threads_, each = 8, 150

        def send(number: int) -> None:
            chance = random.Random(number)
            for index in range(each):
                body = struct.pack("<II", number, index) + bytes([number]) * chance.choice([0, 10, 5000, 200_000])
                buffers = [body] if chance.random() < 0.3 else []
                left.link.send(Kind.RESULTS, hashlib.sha256(body).digest(), body, buffers)
                if chance.random() < 0.05:
                    assert left.link.drain(PATIENCE)

        threads = [threading.Thread(target=send, args=(number,), daemon=True) for number in range(threads_)]
        for thread in threads:
            thread.start()
        seen: dict[int, list[int]] = defaultdict(list)
        for _ in range(threads_ * each):
            frame = right.next_frame()
            body = body_of(frame)
            assert hashlib.sha256(body).digest() == bytes(frame.control)
            assert all(bytes(part) == body for part in frame.buffers)
            number, index = struct.unpack_from("<II", body)
            seen[number].append(index)
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert seen == {number: list(range(each)) for number in range(threads_)}, "in each thread's order"


class Struck:
    """A lock which is found free, and then a signal comes."""

    def __init__(self, lock: Any, number: int) -> None:
        self._lock = lock
        self._number = number

    def acquire(self, blocking: bool = True) -> bool:
        got = self._lock.acquire(blocking=blocking)
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(self._number)
        return bool(got)

    def release(self) -> None:
        self._lock.release()


class Alarm(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs SIGALRM")
@pytest.mark.parametrize("number", ["SIGINT", "SIGALRM"])
def test_signals_that_raise_in_the_sending_main_thread_tear_nothing(number: str) -> None:
    """The lock stayed taken: later frames were kept for ever."""

    def alarm(signum: int, frame: Any) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        with ends() as (left, right):
            lock = left.link._write_lock
            left.link._write_lock = Struck(lock, getattr(signal, number))  # type: ignore[assignment]
            for index in range(3):
                with pytest.raises((KeyboardInterrupt, Alarm)):
                    left.link.send(Kind.RESULTS, b"", bytes([index]) * 100_000, [b"more"])
            left.link._write_lock = lock
            assert left.link.send(Kind.RESULTS, b"", b"last")
            bodies = [body_of(right.next_frame()) for _ in range(4)]
            assert bodies == [*(bytes([index]) * 100_000 for index in range(3)), b"last"]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_main_thread_whose_ctrl_c_is_the_users_leaves_the_writing_to_the_leader() -> None:
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with ends() as (left, right):
            writers: list[int] = []
            write = left.link._write_parts
            left.link._write_parts = lambda parts: (writers.append(threading.get_ident()), write(parts))  # type: ignore
            assert left.link.send(Kind.RESULTS, b"", b"x" * 100_000)
            assert body_of(right.next_frame()) == b"x" * 100_000
            assert threading.get_ident() not in writers
    finally:
        signal.signal(signal.SIGINT, before)


class StruckSocket:
    """A socket: Ctrl-C comes whenever something was sent."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._sock, name)
        if name not in ("send", "sendmsg"):
            return method

        def struck(*arguments: Any) -> int:
            sent = int(method(*arguments))
            signal.raise_signal(signal.SIGINT)
            return sent

        return struck


@pytest.mark.parametrize("buffers", [[], [b"z" * 100_000, b"end"]])
def test_ctrl_c_in_the_main_thread_tears_no_frame(buffers: list[bytes]) -> None:
    with ends() as (left, right):
        sock: Any = left.link._sock
        for _ in range(2):
            left.link._sock = StruckSocket(sock)  # type: ignore[assignment]
            with pytest.raises(KeyboardInterrupt):
                left.link.send(Kind.CALLS, b"control", b"body", buffers)
            left.link._sock = sock
        left.link.send(Kind.RESULTS)
        for _ in range(2):
            frame = right.next_frame()
            assert (frame.kind, [bytes(part) for part in frame.buffers]) == (Kind.CALLS, buffers)
        assert right.next_frame().kind == Kind.RESULTS
        assert left.link.bytes_out == right.link.bytes_in


@pytest.mark.skipif(not hasattr(socket, "MSG_NOSIGNAL"), reason="this system has no such flag")
@pytest.mark.parametrize("buffers", [[], [b"more", b"parts"]])
def test_a_peer_that_is_gone_raises_no_sigpipe(buffers: list[bytes]) -> None:
    """It ends programs that have set it to SIG_DFL, as those do whose output may go to `head`."""
    told: list[int] = []
    before = signal.signal(signal.SIGPIPE, lambda signum, frame: told.append(signum))
    try:
        with ends(start=False) as (left, right):
            right.link._sock.close()
            for _ in range(2):
                left.link.send(Kind.CALLS, b"", b"body", buffers)
            assert not told
    finally:
        signal.signal(signal.SIGPIPE, before)


def test_no_memory_for_a_frame_ends_that_link_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for a defect of the loop, after which both sides waited for the rest of the frame."""
    with ends() as (left, right):
        crashed: list[BaseException] = []
        right.loop.on_crash = crashed.append

        def no_memory() -> Any:
            raise MemoryError

        monkeypatch.setattr(right.link, "_read", no_memory)
        left.link.send(Kind.RESULTS, b"", b"x")
        assert right.closed.wait(PATIENCE) and left.closed.wait(PATIENCE)
        assert [type(reason) for reason in right.reasons] == [MemoryError] and not crashed


class Raw:
    """An acceptor whose peer is a bare socket."""

    def __init__(self, role: Role = Role.ACCEPTOR) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(PATIENCE)
        self.end = End("end", role, theirs)

    def __enter__(self) -> Raw:
        self.end.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.socket.close()
        self.end.stop()

    def receive(self) -> tuple[int, bytes]:
        """One small frame: kind and control."""
        head = self.exactly(16)
        kind, _, _, control, body = struct.unpack("<BBHIQ", head)
        return kind, self.exactly(control + body)

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def shake(self, cookie: str = COOKIE) -> None:
        """Be a connector, by hand."""
        mine = Handshake(Role.CONNECTOR, cookie)
        self.socket.sendall(b"".join(mine.begin()))
        kind, control = self.receive()
        self.socket.sendall(b"".join(mine.receive(Frame(kind, control, b"", []))))


def test_byte_by_byte() -> None:
    with Raw() as raw:
        mine = Handshake(Role.CONNECTOR, COOKIE)
        for byte in b"".join(mine.begin()):
            raw.socket.sendall(bytes([byte]))
        kind, control = raw.receive()
        proof = b"".join(mine.receive(Frame(kind, control, b"", [])))
        frames = [(Kind.CALLS, b"c" * 5, b"b" * 40, [b"", b"12345"]), (Kind.RESULTS, b"", b"", [])]
        data = proof + b"".join(bytes(part) for frame in frames for part in pack_frame(*frame))
        for byte in data:
            raw.socket.sendall(bytes([byte]))
        for kind_, control_, body, buffers in frames:
            frame = raw.end.next_frame()
            assert (frame.kind, bytes(frame.control), body_of(frame)) == (kind_, control_, body)
            assert [bytes(part) for part in frame.buffers] == buffers


def test_random_pieces() -> None:
    """Frames of all sizes in pieces of all sizes."""
    chance = random.Random(11)
    with Raw() as raw:
        raw.shake()
        sizes = [0, 1, 15, 16, 17, 1000, 65_519, 65_520, 65_521, 300_000]
        bodies = [os.urandom(chance.choice(sizes)) for _ in range(60)]
        data = b"".join(bytes(part) for body in bodies for part in pack_frame(Kind.RESULTS, b"x", body))
        place = 0
        while place < len(data):
            size = chance.choice([1, 3, 16, 17, 1000, 65_536, 100_000])
            raw.socket.sendall(data[place : place + size])
            place += size
        for body in bodies:
            assert body_of(raw.end.next_frame()) == body


def test_frames_that_come_with_the_proof() -> None:
    """The master's JOIN is in the same read as the end of the handshake."""
    with Raw() as raw:
        mine = Handshake(Role.CONNECTOR, COOKIE)
        raw.socket.sendall(b"".join(mine.begin()))
        kind, control = raw.receive()
        big = os.urandom(200_000)
        proof = mine.receive(Frame(kind, control, b"", []))
        parts = [*proof, *pack_frame(Kind.JOIN, b"j"), *pack_frame(Kind.CALLS, b"", big)]
        raw.socket.sendall(b"".join(bytes(part) for part in parts))
        assert raw.end.next_frame().kind == Kind.JOIN
        assert body_of(raw.end.next_frame()) == big


# --------------------------------------------------------------------------------------------------- handshake failures


def test_the_cookies_differ() -> None:
    with ends(start=False, cookies=("right" * 4, "wrong" * 4)) as (left, right):
        right.start()
        left.start()
        assert left.closed.wait(PATIENCE) and right.closed.wait(PATIENCE)
        assert isinstance(left.reasons[0], AuthenticationError)
        assert not left.ready.is_set() and not right.ready.is_set()
        assert len(left.reasons) == len(right.reasons) == 1


def test_a_connector_without_the_cookie_is_told_and_let_go() -> None:
    with Raw() as raw:
        mine = Handshake(Role.CONNECTOR, "other")
        raw.socket.sendall(b"".join(mine.begin()))
        raw.receive()
        raw.socket.sendall(b"".join(pack_frame(Kind.PROOF, b"\0" * 32)))
        assert raw.receive()[0] == Kind.REFUSED
        assert raw.socket.recv(1) == b""
        assert raw.end.closed.wait(PATIENCE)
        assert isinstance(raw.end.reasons[0], AuthenticationError) and not raw.end.ready.is_set()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3,
        b"\0" * 64,
        b"\xff" * 64,
        os.urandom(64),
        b"".join(pack_frame(Kind.CALLS, b"x")),
        b"".join(pack_frame(Kind.HELLO, b"x")),
        b"".join(pack_frame(Kind.HELLO, b"x" * 10_000)),
        struct.pack("<BBHIQ", Kind.HELLO, 0, 0, 43, 1 << 39),
        struct.pack("<BBHIQ", Kind.HELLO, 0, 9, 43, 0),
    ],
    ids=["http", "zeros", "ones", "noise", "calls", "short hello", "long hello", "huge body", "buffers"],
)
def test_garbage_ends_the_link_and_nothing_else(data: bytes) -> None:
    with Raw() as raw:
        raw.socket.sendall(data)
        assert raw.end.closed.wait(PATIENCE)
        assert isinstance(raw.end.reasons[0], (ProtocolError, AuthenticationError))
        assert raw.end.frames.empty()
        assert raw.end.link.bytes_in <= len(data)


@pytest.mark.parametrize(
    "frame",
    [
        (Kind.RESULTS, 1, 0, 0, 0),
        (Kind.RESULTS, 0, 0, config.MAX_CONTROL + 1, 0),
        (Kind.RESULTS, 0, 0, 0, config.MAX_BODY + 1),
    ],
    ids=["flags", "control", "body"],
)
def test_garbage_after_the_handshake(frame: tuple[int, ...]) -> None:
    with Raw() as raw:
        raw.shake()
        raw.socket.sendall(struct.pack("<BBHIQ", *frame))
        assert raw.end.closed.wait(PATIENCE)
        assert isinstance(raw.end.reasons[0], ProtocolError)


@pytest.mark.parametrize("cut", [0, 1, 16, 40])
def test_the_peer_goes_in_the_middle_of_the_handshake(cut: int) -> None:
    with Raw() as raw:
        raw.socket.sendall(b"".join(Handshake(Role.CONNECTOR, COOKIE).begin())[:cut])
        raw.socket.close()
        assert raw.end.closed.wait(PATIENCE)
        assert len(raw.end.reasons) == 1 and not raw.end.ready.is_set()


# -------------------------------------------------------------------------------------------------------------- the end


def test_close_is_told_once_to_both() -> None:
    with ends() as (left, right):
        closers = [threading.Thread(target=left.link.close) for _ in range(5)]
        for thread in closers:
            thread.start()
        for thread in closers:
            thread.join(PATIENCE)
        assert left.closed.wait(PATIENCE) and right.closed.wait(PATIENCE)
        left.link.close(ValueError("again"))
        done = threading.Event()
        left.loop.call_soon(done.set)
        assert done.wait(PATIENCE)
        assert left.reasons == [None] and len(right.reasons) == 1
        assert left.link.closed and left.link.send(Kind.CALLS) is False


def test_what_was_sent_before_the_end_arrives() -> None:
    with Raw() as raw:
        raw.shake()
        body = os.urandom(100_000)
        raw.socket.sendall(b"".join(bytes(part) for part in pack_frame(Kind.RESULTS, b"", body)))
        raw.socket.sendall(b"\x0d\0\0")  # and a torn one
        raw.socket.close()
        assert body_of(raw.end.next_frame()) == body
        assert raw.end.closed.wait(PATIENCE)
        assert raw.end.frames.empty() and len(raw.end.reasons) == 1


def backlog(link: Link) -> int:
    """Bytes accepted and not yet in the kernel."""
    return sum(len(part) for part in list(link._outbox))


def test_the_peer_dies_while_much_is_sent() -> None:
    with Raw() as raw:
        raw.shake()
        assert raw.end.ready.wait(PATIENCE)
        for _ in range(20):
            raw.end.link.send(Kind.RESULTS, b"", b"x" * 1_000_000)
        assert backlog(raw.end.link) > 0
        drained: list[bool] = []
        waiter = threading.Thread(target=lambda: drained.append(raw.end.link.drain()), daemon=True)
        waiter.start()
        raw.socket.close()
        assert raw.end.closed.wait(PATIENCE)
        waiter.join(PATIENCE)
        assert drained == [True], "whoever waits is woken"
        assert backlog(raw.end.link) == 0 and len(raw.end.reasons) == 1


def test_read_rest_takes_what_the_kernel_holds_and_closes() -> None:
    mine, theirs = socket.socketpair()
    loop = IoLoop("rest")
    frames: list[Frame] = []
    closed: list[Any] = []
    handshake = Handshake(Role.ACCEPTOR, COOKIE)
    link = Link(
        loop,
        theirs,
        handshake,
        lambda _: None,
        lambda _, frame: frames.append(frame),
        lambda _, why: closed.append(why),
    )
    held = mine.dup()  # a child of the worker holds the other end: the stream does not end

    def run() -> None:
        link.open()
        peer = Handshake(Role.CONNECTOR, COOKIE)
        mine.sendall(b"".join(peer.begin()))
        link._on_readable()
        head = mine.recv(4096)
        mine.sendall(b"".join(peer.receive(Frame(Kind.CHALLENGE, head[16:], b"", []))))
        for number in range(60):
            mine.sendall(b"".join(bytes(part) for part in pack_frame(Kind.RESULTS, b"%d" % number, b"x" * 500)))
        mine.close()
        link.read_rest()

    loop.call_soon(run)
    assert loop.lead(lambda: bool(closed), time.monotonic() + PATIENCE)
    assert len(frames) == 60 and closed == [None]
    held.close()
    loop.close_descriptors()


# --------------------------------------------------------------------------------------------------------- backpressure


def test_sending_never_blocks_and_drain_waits() -> None:
    with Raw() as raw:
        raw.shake()
        assert raw.end.ready.wait(PATIENCE)
        begin = time.monotonic()
        total = 30
        for number in range(total):
            assert raw.end.link.send(Kind.RESULTS, b"%d" % number, b"x" * 1_000_000)
        assert time.monotonic() - begin < 5, "nobody reads, and the sender does not wait"
        assert backlog(raw.end.link) > 20_000_000
        begin = time.monotonic()
        assert raw.end.link.drain(0.2) is False
        assert 0.1 < time.monotonic() - begin < 5
        received = bytearray()
        reader = threading.Thread(target=lambda: read_until_end(raw.socket, received), daemon=True)
        reader.start()
        assert raw.end.link.drain(PATIENCE) is True
        assert backlog(raw.end.link) == 0
        raw.end.link.close(None)
        reader.join(PATIENCE)
        assert len(received) == total * (16 + 1_000_000) + 10 + 2 * (total - 10)


def read_until_end(sock: socket.socket, into: bytearray) -> None:
    try:
        while data := sock.recv(1 << 20):
            into += data
    except OSError:
        pass


def test_drained_in_time_is_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread sends the next frame just when all is out: that is not a time-out."""
    with ends() as (left, _):
        monkeypatch.setattr(left.link, "_idle", lambda: False)
        monkeypatch.setattr(left.loop, "lead", lambda until, deadline: True)
        assert left.link.drain(PATIENCE) and left.link.drain()
        assert not left.link.drain(0)
        monkeypatch.undo()


def test_many_threads_drain() -> None:
    """Drain is asked for while others write: nobody may miss the moment at which all is out."""
    with ends() as (left, right):
        left_over: list[int] = []

        def work(number: int) -> None:
            for index in range(60):
                left.link.send(Kind.RESULTS, b"", bytes([number]) * (1 + 40_000 * (index % 3)))
                if not left.link.drain(PATIENCE):
                    left_over.append(number)

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(5)]
        for thread in threads:
            thread.start()
        for _ in range(300):
            right.next_frame()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "drain hangs"
        assert not left_over
        until(lambda: backlog(left.link) == 0, "all is out")


def test_drain_with_nothing_to_send() -> None:
    with ends() as (left, _):
        assert left.link.drain(0) is True


def test_memory_for_big_frames_is_not_kept_for_long() -> None:
    with ends() as (left, right):
        left.link.send(Kind.RESULTS, b"", bytes(5 << 20))
        right.next_frame()
        assert right.link._reader.has_spare
        until(lambda: not right.link._reader.has_spare, "its end")


def test_a_finalizer_inside_a_send_ends_the_link_behind_it() -> None:
    """The collector runs it on the leader, in the middle of a frame."""
    with ends() as (left, right):
        link, really = left.link, left.link._write_some

        def write_some() -> None:
            link.close(None)
            really()

        link._write_some = write_some  # type: ignore[method-assign]
        left.loop.call_soon(lambda: link.send(Kind.RESULTS, b"", b"body", [bytes(100_000)]))
        assert body_of(right.next_frame()) == b"body"
        assert left.closed.wait(PATIENCE) and right.closed.wait(PATIENCE)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_system_without_memory_for_a_send_loses_no_frame(size: int) -> None:
    """The connection goes on, and who waited for the answer waited for ever."""
    with ends() as (left, right):
        sock, refused = left.link._sock, [errno.ENOBUFS, errno.ENOMEM]

        class Short:
            def __getattr__(self, name: str) -> Any:
                if name in ("send", "sendmsg") and refused:
                    raise OSError(refused.pop(), "no memory")
                return getattr(sock, name)

        left.link._sock = Short()
        bodies = [bytes([number]) * size for number in range(3)]
        for body in bodies:
            left.link.send(Kind.RESULTS, b"", body)
        assert [body_of(right.next_frame()) for _ in bodies] == bodies and not refused


def test_a_connection_that_cannot_be_watched_costs_nobody_else() -> None:
    """Out of memory, or of what one user may have watched: it was an error of the whole loop."""
    with ends(start=False) as (left, _):
        crashes: list[BaseException] = []
        left.loop.on_crash = crashes.append

        def refuse(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "no space left on device")

        left.loop._poller.add = refuse
        left.start()
        assert left.closed.wait(PATIENCE)
        assert left.reasons[0].errno == errno.ENOSPC and not crashes  # type: ignore[union-attr]


def test_a_system_without_memory_for_a_while_does_not_keep_the_leader_busy() -> None:
    """The socket has room all the time: the poller said so in each turn."""
    with ends() as (left, right):
        sock, left_out = left.link._sock, threading.Event()
        tries: list[None] = []

        class Short:
            def __getattr__(self, name: str) -> Any:
                if name in ("send", "sendmsg") and not left_out.is_set():
                    tries.append(None)
                    raise OSError(errno.ENOBUFS, "no memory")
                return getattr(sock, name)

        left.link._sock = Short()
        left.link.send(Kind.RESULTS, b"", b"body")
        assert not left.link.drain(0.3)
        left_out.set()
        assert body_of(right.next_frame()) == b"body" and len(tries) < 100
