"""Attacks on a worker and on a master, over real sockets. SECURITY.md says what is promised; here are the attacks.
The handshake alone, move by move: test_protocol. Certificates: test_tls. Floods: test_door."""

from __future__ import annotations

import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from wires import PATIENCE, until

import distpool
from distpool import (
    AuthenticationError,
    ClusterManager,
    CompositeException,
    LaunchWorkerError,
    WorkerConfig,
    addprocs,
    remotecall_fetch,
    rmprocs,
    workers,
)
from distpool.errors import ProtocolError
from distpool.node import node as nodes
from distpool.wire import messages, structs, versions
from distpool.wire.frames import HEADER, Frame, FrameReader, Kind, pack_frame
from distpool.wire.protocol import MAGIC, NONCE, Handshake, Role


class Bomb:
    """Whoever unpickles it makes the file `trace`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (open, (str(self.trace), "w"))


class Enemy:
    """A connection to a worker's listener, by hand."""

    def __init__(self, address: tuple[Any, ...]) -> None:
        kind, *place = address
        family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(place[0] if kind == "unix" else tuple(place))

    def __enter__(self) -> Enemy:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.socket.close()

    def send(self, kind: int, control: bytes = b"", body: bytes = b"") -> None:
        self.socket.sendall(b"".join(map(bytes, pack_frame(kind, control, body))))  # type: ignore[arg-type]

    def receive(self) -> tuple[int, bytes]:
        head = self.exactly(HEADER.size)
        kind, _, _, control, body = HEADER.unpack(head)
        return kind, self.exactly(control + body)

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def authenticate(self, cookie: str) -> None:
        """As a member that dials."""
        mine = Handshake(Role.CONNECTOR, cookie)
        self.socket.sendall(b"".join(mine.begin()))
        kind, control = self.receive()
        self.socket.sendall(b"".join(mine.receive(Frame(kind, control, b"", []))))

    def is_thrown_out(self) -> bool:
        """Wait for the end; what the worker says before is read and dropped."""
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionError:
            pass
        return True


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    monkeypatch.setenv("DISTPOOL_TRANSPORT", "tcp")
    found = addprocs(2)
    yield found
    rmprocs(*workers()).result()


def address(pid: int) -> tuple[Any, ...]:
    return tuple(nodes.current().group.members[pid].address)


def alive(pids: list[int]) -> None:
    """Nobody has noticed anything."""
    assert workers() == pids
    assert [remotecall_fetch(distpool.myid, pid) for pid in pids] == pids
    assert remotecall_fetch(remotecall_fetch, pids[0], distpool.myid, pids[1]) == pids[1]


# ---------------------------------------------------------------------------------------------- without the cookie


def test_nothing_is_unpickled_for_strangers(pids: list[int], tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "trace"))
    request = structs.Request(1, "fetch", 1, 1, "f", len(bomb), 0, False).pack()
    for data in (
        bomb,
        b"".join(map(bytes, pack_frame(Kind.REQUEST, request, bomb * 2))),
        b"".join(map(bytes, pack_frame(Kind.HELLO, bomb))),
        b"".join(map(bytes, pack_frame(Kind.HELLO, MAGIC + b"n" * NONCE, bomb))),
        b"".join(map(bytes, pack_frame(Kind.PROOF, bomb[:100], bomb))),
    ):
        with Enemy(address(pids[0])) as enemy:
            enemy.socket.sendall(data)
            assert enemy.is_thrown_out()
    alive(pids)
    assert list(tmp_path.iterdir()) == []


def test_a_stranger_who_skips_the_handshake(pids: list[int]) -> None:
    for kind in set(Kind) - {Kind.HELLO}:
        with Enemy(address(pids[0])) as enemy:
            enemy.send(kind, b"[]")
            assert enemy.is_thrown_out()
    alive(pids)


def test_wrong_cookie_recorded_and_reflected_proofs(pids: list[int]) -> None:
    with Enemy(address(pids[0])) as enemy:
        with pytest.raises(AuthenticationError):
            enemy.authenticate("not the cookie")
        # It cannot check the worker's proof either, but may go on nevertheless.
        enemy.send(Kind.PROOF, os.urandom(32))
        assert enemy.is_thrown_out()
    with Enemy(address(pids[0])) as enemy:
        enemy.send(Kind.HELLO, MAGIC + os.urandom(NONCE))
        kind, challenge = enemy.receive()
        assert kind == Kind.CHALLENGE
        enemy.send(Kind.PROOF, challenge[NONCE:])
        assert enemy.is_thrown_out()
    with Enemy(address(pids[0])) as first, Enemy(address(pids[1])) as second:
        # What one worker proves is no proof to another one.
        first.send(Kind.HELLO, MAGIC + os.urandom(NONCE))
        _, challenge = first.receive()
        second.send(Kind.HELLO, MAGIC + challenge[:NONCE])
        _, answer = second.receive()
        first.send(Kind.PROOF, answer[NONCE:])
        assert first.is_thrown_out()
    alive(pids)


def test_a_recorded_conversation_is_of_no_use(pids: list[int]) -> None:
    """Both directions of a member's handshake, heard on the wire and said again."""
    said: list[bytes] = []
    with Enemy(address(pids[0])) as member:
        real = member.socket.sendall
        member.socket = _Recorded(member.socket, said, real)  # type: ignore[assignment]
        member.authenticate(distpool.cluster_cookie())
    assert len(said) == 2
    with Enemy(address(pids[0])) as enemy:
        for part in said:
            enemy.socket.sendall(part)
        assert enemy.is_thrown_out()
    alive(pids)


class _Recorded:
    def __init__(self, sock: socket.socket, said: list[bytes], sendall: Callable[[bytes], None]) -> None:
        self._sock, self._said, self._sendall = sock, said, sendall

    def sendall(self, data: bytes) -> None:
        self._said.append(data)
        self._sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


@pytest.mark.parametrize(
    "head",
    [
        (Kind.HELLO, 0, 0, 0, 1 << 62),
        (Kind.HELLO, 0, 0, (1 << 32) - 1, 0),
        (Kind.HELLO, 0, 65535, 43, 0),
        (Kind.HELLO, 255, 0, 43, 0),
        (Kind.HELLO, 0, 0, 257, 0),
        (Kind.HELLO, 0, 0, 200, 100),
    ],
    ids=str,
)
def test_lengths_of_strangers_are_not_believed(pids: list[int], head: tuple[int, ...]) -> None:
    process = psutil.Process(nodes.current().group.members[pids[0]].ospid)
    before = process.memory_info().rss
    with Enemy(address(pids[0])) as enemy:
        enemy.socket.sendall(struct.pack("<BBHIQ", *head))
        assert enemy.is_thrown_out()
    assert process.memory_info().rss < before + (64 << 20)
    alive(pids)


def test_truncated_frames(pids: list[int]) -> None:
    hello = b"".join(Handshake(Role.CONNECTOR, "x").begin())
    for cut in range(len(hello)):
        with Enemy(address(pids[0])) as enemy:
            enemy.socket.sendall(hello[:cut])
            enemy.socket.shutdown(socket.SHUT_WR)
            assert enemy.is_thrown_out()
    alive(pids)


def test_ten_thousand_random_strings() -> None:
    """Through reader and handshake as a link uses them: a refusal or nothing, never another error, never through."""
    chance = random.Random(20)
    refused = 0
    for number in range(10_000):
        data = chance.randbytes(chance.choice([1, 15, 16, 17, 59, 60, 100, 256, 300, 1000]))
        if number % 3 == 0:  # a plausible header, so that more of them get further
            data = struct.pack("<BBHIQ", chance.choice(list(Kind)), 0, 0, len(data) % 300, 0) + data
        if number % 6 == 0:
            data = HEADER.pack(Kind.HELLO, 0, 0, len(MAGIC) + NONCE, 0) + MAGIC + chance.randbytes(NONCE) + data
        reader, handshake = FrameReader(), Handshake(Role.ACCEPTOR, "the cookie")
        try:
            frames = reader.feed(data)
            while frames:
                for frame in frames:
                    handshake.receive(frame)
                frames = reader.feed(b"") if reader.again else []
        except (ProtocolError, AuthenticationError):
            refused += 1
        assert not handshake.ready
    assert refused > 5000


def test_random_strings_to_a_living_worker(pids: list[int]) -> None:
    chance = random.Random(21)
    for _ in range(200):
        with Enemy(address(pids[0])) as enemy:
            enemy.socket.sendall(chance.randbytes(chance.randrange(1, 2000)))
    alive(pids)


def test_silent_and_slow_strangers_while_members_work(pids: list[int]) -> None:
    silent = [Enemy(address(pid)) for pid in pids for _ in range(40)]
    over = threading.Event()

    def drip() -> None:
        hello = b"".join(Handshake(Role.CONNECTOR, "x").begin())
        with Enemy(address(pids[0])) as loris:
            for byte in hello:
                if over.wait(0.02):
                    return
                loris.socket.sendall(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    begin = time.monotonic()
    for _ in range(50):
        assert [remotecall_fetch(distpool.myid, pid) for pid in pids] == pids
    assert time.monotonic() - begin < 20
    over.set()
    thread.join()
    for enemy in silent:
        enemy.socket.close()
    alive(pids)


# -------------------------------------------------------------------------------- members that say what they are not


def member_of(pid: int) -> Enemy:
    enemy = Enemy(address(pid))
    enemy.authenticate(distpool.cluster_cookie())
    return enemy


@pytest.mark.parametrize("who", ["pid 1", "the worker itself", "nobody"])
def test_a_member_says_it_is_another_one(pids: list[int], who: str) -> None:
    """The link to the master stays what it was."""
    pid = {"pid 1": 1, "the worker itself": pids[0], "nobody": 0}[who]
    with member_of(pids[0]) as enemy:
        enemy.send(Kind.PEER, messages.Peer(pid, False).pack())
        assert enemy.is_thrown_out()
    alive(pids)


@pytest.mark.parametrize(
    "kind",
    [
        *(Kind.JOIN, Kind.SHUTDOWN, Kind.INTERRUPT, Kind.CALLS, Kind.FUNCTION, Kind.LAUNCH, Kind.CONNECT),
        *(Kind.DEAD, Kind.DIAL, Kind.ADDRESS, Kind.IDENTITY, Kind.WHERE, Kind.RELAY, Kind.UNDIALLED),
    ],
    ids=lambda kind: kind.name,
)
def test_a_worker_gives_the_masters_orders(pids: list[int], kind: Kind) -> None:
    control = {
        Kind.JOIN: messages.Join(9, versions.own(), "00", "", 0, ""),
        Kind.SHUTDOWN: messages.Shutdown("now"),
        Kind.DEAD: messages.Dead(1, 0, "says who?"),
        Kind.DIAL: messages.Dial(77, ["tcp", "127.0.0.1", 1], False),
        Kind.ADDRESS: messages.Address(1, ["tcp", "127.0.0.1", 1], False, ""),
        Kind.IDENTITY: messages.IdentityIs("x", "y"),
        Kind.WHERE: messages.Where(1),
        Kind.RELAY: messages.Relay(1, int(Kind.DEAD)),
        Kind.UNDIALLED: messages.Undialled(1, "", ""),
        Kind.LAUNCH: messages.Launch(3, [], 1.0),
        Kind.CONNECT: messages.Connect([1]),
    }.get(kind)
    with member_of(pids[0]) as enemy:
        enemy.send(Kind.PEER, messages.Peer(99, False).pack())
        enemy.send(kind, control.pack() if control is not None else b"")
        assert enemy.is_thrown_out()
    alive(pids)


def test_a_second_master(pids: list[int]) -> None:
    """A connection that joins where there is a master already is no master."""
    with member_of(pids[0]) as enemy:
        enemy.send(Kind.JOIN, messages.Join(9, versions.own(), "00", "", 0, "").pack())
        enemy.send(Kind.SHUTDOWN, messages.Shutdown("now").pack())
        enemy.socket.settimeout(1.0)
        try:
            assert enemy.socket.recv(1) == b"", "no JOINED"
        except TimeoutError:
            pass
    alive(pids)


# ---------------------------------------------------------------------------------------------------- a false worker


class FalseWorker(ClusterManager):
    """Its "worker" is a listener of the test."""

    def __init__(self, port: int) -> None:
        self.port = port

    def launch(self, params: dict[str, Any]) -> list[WorkerConfig]:
        return [WorkerConfig(host="127.0.0.1", port=self.port)]


@pytest.mark.parametrize("behaviour", ["another cookie", "garbage", "reflects", "closes", "silent"])
def test_a_listener_that_is_no_worker(behaviour: str, tmp_path: Path) -> None:
    """The master gets an error that says so, in time, and unpickles nothing."""
    bomb = pickle.dumps(Bomb(tmp_path / "trace"))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                hello = sock.recv(1000)
                if behaviour == "another cookie":
                    mine = Handshake(Role.ACCEPTOR, "another")
                    sock.sendall(b"".join(mine.receive(Frame(Kind.HELLO, hello[HEADER.size :], b"", []))))
                elif behaviour == "garbage":
                    sock.sendall(b"".join(map(bytes, pack_frame(Kind.CHALLENGE, bomb[:200], bomb))))
                elif behaviour == "reflects":
                    sock.sendall(hello)
                if behaviour != "closes":
                    while sock.recv(1000):
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(CompositeException) as caught:
            addprocs(FalseWorker(listener.getsockname()[1]), timeout=3)
        assert time.monotonic() - begin < 15
        (error,) = caught.value.exceptions
        assert isinstance(error, LaunchWorkerError)
        if behaviour == "another cookie":
            assert isinstance(error.__cause__, AuthenticationError) and "cookies differ" in str(error)
        thread.join(PATIENCE)
    assert list(tmp_path.iterdir()) == [] and workers() == [1]


# ------------------------------------------------------------------------------------------------- where the cookie is


def test_the_cookie_is_on_no_command_line(pids: list[int]) -> None:
    for process in psutil.Process().children(recursive=True):
        assert distpool.cluster_cookie() not in " ".join(process.cmdline())


def test_the_master_listens_nowhere() -> None:
    program = (
        "import distpool, psutil; distpool.addprocs(1); print([c.laddr for c in psutil.Process().net_connections()])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")
def test_local_sockets_are_in_a_directory_of_our_own() -> None:
    (pid,) = addprocs(1)
    kind, path = address(pid)
    assert kind == "unix"
    assert os.stat(os.path.dirname(path)).st_mode & 0o077 == 0, "nobody else may enter"
    rmprocs(pid).result()
    until(lambda: not os.path.exists(path), "the end of the socket")
