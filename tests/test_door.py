"""The door of a worker: who does not prove himself in time is cut off, and those who belong to us do not notice."""

from __future__ import annotations

import errno
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from wires import COOKIE, PATIENCE, End, until

from distpool import config
from distpool.transport import tls
from distpool.transport.door import Door
from distpool.transport.ioloop import IoLoop
from distpool.transport.link import Link
from distpool.transport.stream import dial
from distpool.wire.protocol import Handshake, Role


class House:
    """A listener with a door, and what passes it."""

    def __init__(self, identity: tls.Identity | None = None) -> None:
        self.loop = IoLoop("house")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.inside: queue.SimpleQueue[Link] = queue.SimpleQueue()
        self.reasons: list[BaseException | None] = []
        self.complaints: list[str] = []
        self.door = Door(self.loop, self.listener, identity, self._arrived, self.complaints.append)
        self.loop.start()

    def _arrived(self, stream: Any) -> None:
        link = Link(self.loop, stream, Handshake(Role.ACCEPTOR, COOKIE), self._ready, lambda *_: None, self._closed)
        self.door.admit(link)
        link.open()

    def _ready(self, link: Link) -> None:
        self.door.forget(link)
        self.inside.put(link)

    def _closed(self, link: Link, reason: BaseException | None) -> None:
        self.door.forget(link)
        self.reasons.append(reason)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, PATIENCE)

    def close(self) -> None:
        self.loop.stop()
        self.listener.close()


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.close()


def visit(house: House, identity: tls.Identity | None = None) -> None:
    """A member comes and is let in."""
    stream = dial(("tls" if identity else "tcp", *house.address), PATIENCE, identity)
    end = End("member", Role.CONNECTOR, stream)
    end.start()
    assert end.ready.wait(PATIENCE), end.reasons
    assert house.inside.get(timeout=PATIENCE)
    end.stop()


def is_cut_off(sock: socket.socket) -> bool:
    """Wait for the end of the connection."""
    sock.settimeout(PATIENCE)
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def test_members_come_in(house: House) -> None:
    visit(house)
    until(lambda: house.door.guests == 0, "an empty door")


def test_silence_is_cut_off(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "PROOF_SECONDS", 0.3)
    with house.connect() as silent, house.connect() as mumbling:
        mumbling.sendall(b"\x01")
        begin = time.monotonic()
        assert is_cut_off(silent) and is_cut_off(mumbling)
        assert time.monotonic() - begin < 10
    visit(house)
    until(lambda: len(house.reasons) == 3, "the end of all three")
    assert [str(reason) for reason in house.reasons if reason] == ["no proof of the cookie within 0.3 seconds"]


def test_a_byte_now_and_then_does_not_help(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow loris: the clock counts from the beginning."""
    monkeypatch.setattr(config, "PROOF_SECONDS", 0.5)
    hello = b"".join(Handshake(Role.CONNECTOR, COOKIE).begin())
    begin = time.monotonic()
    with house.connect() as loris:
        with pytest.raises(OSError):
            for byte in hello * 10:
                loris.sendall(bytes([byte]))
                time.sleep(0.02)
    assert time.monotonic() - begin < 5
    visit(house)


def test_a_flood_of_silent_connections(house: House) -> None:
    flood = []
    for number in range(config.MAX_STRANGERS * 4):
        flood.append(house.connect())
        if number % 50 == 0:
            visit(house)
    visit(house)
    until(lambda: house.door.guests <= config.MAX_STRANGERS, "no more than allowed")
    assert is_cut_off(flood[0]), "the first of them"
    for sock in flood:
        sock.close()
    until(lambda: house.door.guests == 0, "the end of the flood")


def test_connect_and_close(house: House) -> None:
    for _ in range(300):
        house.connect().close()
    visit(house)
    until(lambda: house.door.guests == 0, "nobody there")
    assert not any(house.reasons), "not worth a word"


def test_many_members_at_once_during_a_flood(house: House) -> None:
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            with house.connect() as sock:
                sock.sendall(b"x")

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    for _ in range(20):
        visit(house)
    over.set()
    thread.join(PATIENCE)


class Refusing:
    """A listener that has no descriptor left for a while."""

    def __init__(self, listener: socket.socket, times: int) -> None:
        self._listener, self.left, self.asked = listener, times, 0

    def accept(self) -> Any:
        self.asked += 1
        if self.left:
            self.left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._listener.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)


def test_without_descriptors_the_loop_does_not_spin(house: House) -> None:
    refusing: Any = Refusing(house.listener, 3)
    house.door._listener = refusing
    visit(house)
    assert refusing.asked <= 5


def test_without_descriptors_the_first_guest_makes_room(house: House) -> None:
    with house.connect() as first:
        until(lambda: house.door.guests == 1, "the guest")
        house.door._listener = Refusing(house.listener, 1)  # type: ignore[assignment]
        visit(house)
        assert is_cut_off(first)


# ------------------------------------------------------------------------------------------------------------------ TLS


@pytest.fixture
def safe() -> Iterator[tuple[House, tls.Identity]]:
    identity = tls.make_identity()
    made = House(identity)
    yield made, identity
    made.close()


def test_members_with_the_certificate_come_in(safe: tuple[House, tls.Identity]) -> None:
    house, identity = safe
    visit(house, identity)
    until(lambda: house.door.guests == 0, "an empty door")


def test_others_do_not_and_disturb_nobody(safe: tuple[House, tls.Identity], monkeypatch: pytest.MonkeyPatch) -> None:
    house, identity = safe
    monkeypatch.setattr(config, "PROOF_SECONDS", 0.5)
    begin = time.monotonic()
    with house.connect() as silent, house.connect() as plain:
        plain.sendall(b"".join(Handshake(Role.CONNECTOR, COOKIE).begin()))
        visit(house, identity)
        assert is_cut_off(silent) and is_cut_off(plain)
    assert time.monotonic() - begin < 10
    assert any("no TLS connection" in text for text in house.complaints)
    flood = [house.connect() for _ in range(config.MAX_STRANGERS * 2)]
    visit(house, identity)
    for sock in flood:
        sock.close()
    until(lambda: house.door.guests == 0, "nobody there")
