"""Big functions in pieces: the tree that the master plans, and workers that keep and pass on what comes."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from distpool.errors import ProtocolError
from distpool.node import bulk
from distpool.node.bulk import SIZE, Spreading, Store
from distpool.wire import pieces
from distpool.wire.frames import Frame, Kind


class FakeLink:
    def __init__(self, far: bool = True) -> None:
        self.sent: list[tuple[Kind, bytes, bytes]] = []
        self.closed = False
        self.shares_memory = not far
        self.at_drain: list[Any] = []

    def send(self, kind: Kind, control: bytes, body: Any = b"") -> bool:
        self.sent.append((kind, control, bytes(body)))
        return not self.closed

    def drain(self) -> bool:
        for waiting in self.at_drain:
            waiting()
        return True


class FakeNode:
    """As much of a node as these need; `peers` and `group` are itself."""

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self.links: dict[int, FakeLink] = {}
        self.master_link = FakeLink()
        self.loop = self.peers = self.group = self
        self.later: list[Any] = []
        self.allowed = True

    @property
    def members(self) -> dict[int, Any]:
        return {pid: type("Member", (), {"link": link})() for pid, link in self.links.items()}

    def link(self, pid: int) -> FakeLink | None:
        return self.links.get(pid)

    def may_connect(self, one: int, other: int) -> bool:
        return self.allowed

    def deliver(self, work: Any) -> None:
        work()

    def call_later(self, seconds: float, callback: Any) -> None:
        self.later.append(callback)

    def send(self, pid: int, kind: Kind, control: bytes, body: Any = b"") -> None:
        self.links.setdefault(pid, FakeLink()).send(kind, control, body)

    def receive(self, kind: Kind, control: bytes, body: bytes = b"") -> None:
        self.handlers[kind](self.master_link, Frame(kind, control, body, []))


class Function:
    def __init__(self, *buffers: bytes) -> None:
        self.number, self.buffers = 5, list(buffers)


@pytest.fixture
def node() -> Any:
    return FakeNode()


def test_the_first_two_get_it_the_others_are_passed_it(node: Any) -> None:
    spreading, function = Spreading(node), Function(bytes(SIZE + 10), b"abc")
    node.links = {pid: FakeLink() for pid in range(2, 10)}
    for pid, link in node.links.items():
        spreading.send(function, pid, link)  # type: ignore[arg-type]
    assert spreading.copies == 2
    direct = [pid for pid, link in node.links.items() if any(kind is Kind.PIECE for kind, _, _ in link.sent)]
    assert direct == [2, 3]
    assert [(len(body), *vars_of(control)) for kind, control, body in node.links[2].sent if kind is Kind.PIECE] == [
        (SIZE, 5, 0, 0, [SIZE + 10, 3]),
        (10, 5, 0, SIZE, [SIZE + 10, 3]),
        (3, 5, 1, 0, [SIZE + 10, 3]),
    ]
    passed = {
        pid: [pieces.Forward.unpack(control).pid for kind, control, _ in link.sent if kind is Kind.FORWARD]
        for pid, link in node.links.items()
    }
    assert passed == {2: [4, 5], 3: [6, 7], 4: [8, 9], 5: [], 6: [], 7: [], 8: [], 9: []}


def test_who_passes_it_on_hears_so_between_two_pieces(node: Any) -> None:
    spreading, function = Spreading(node), Function(bytes(3 * SIZE))
    node.links = {pid: FakeLink() for pid in range(2, 5)}
    other, first = node.links[3], node.links[2]

    def meanwhile() -> None:
        first.at_drain = []
        spreading.send(function, 3, other)  # type: ignore[arg-type]
        spreading.send(function, 4, node.links[4])  # type: ignore[arg-type]

    first.at_drain = [meanwhile]
    spreading.send(function, 2, first)  # type: ignore[arg-type]
    assert [kind for kind, _, _ in node.links[2].sent] == [Kind.PIECE, Kind.FORWARD, Kind.PIECE, Kind.PIECE]


def test_a_link_that_is_lost_gets_no_more_pieces(node: Any) -> None:
    spreading, function = Spreading(node), Function(bytes(3 * SIZE))
    node.links = {2: FakeLink()}
    node.links[2].closed = True
    spreading.send(function, 2, node.links[2])  # type: ignore[arg-type]
    assert len(node.links[2].sent) == 1


def vars_of(control: bytes) -> tuple[Any, ...]:
    piece = pieces.Piece.unpack(control)
    return piece.number, piece.index, piece.offset, piece.sizes


@pytest.mark.parametrize("why", ["gone", "closed", "topology", "too long ago"])
def test_where_nobody_can_pass_it_on_the_master_sends_it(node: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spreading, function = Spreading(node), Function(b"abc")
    node.links = {pid: FakeLink() for pid in range(2, 6)}
    for pid in (2, 3):
        spreading.send(function, pid, node.links[pid])  # type: ignore[arg-type]
    if why == "gone":
        del node.links[2]
    elif why == "closed":
        node.links[2].closed = True
    elif why == "topology":
        node.allowed = False
    else:
        monkeypatch.setattr(bulk, "KEPT", -1.0)
    spreading.send(function, 4, node.links[4])  # type: ignore[arg-type]
    assert [kind for kind, _, _ in node.links[4].sent] == [Kind.PIECE] and spreading.copies == 3


def test_who_has_dropped_it_is_nobody_s_parent(node: Any) -> None:
    """Not even his own, when it is sent to him again: he waited for it until he asked the master."""
    spreading, function = Spreading(node), Function(b"abc")
    node.links = {pid: FakeLink() for pid in range(2, 5)}
    for pid in (2, 3):
        spreading.send(function, pid, node.links[pid])  # type: ignore[arg-type]
    spreading.forgotten([function.number, 99], 2)
    spreading.send(function, 2, node.links[2])  # type: ignore[arg-type]
    spreading.send(function, 4, node.links[4])  # type: ignore[arg-type]
    sent = {pid: [kind for kind, _, _ in link.sent] for pid, link in node.links.items()}
    assert sent == {2: [Kind.PIECE, Kind.PIECE], 3: [Kind.PIECE, Kind.FORWARD], 4: []}


def test_it_is_worth_it_for_many_on_other_hosts_only(node: Any) -> None:
    spreading = Spreading(node)
    node.links = {2: FakeLink(), 3: FakeLink(), 4: FakeLink(far=False)}
    assert not spreading.is_worth_it()
    node.links[5] = FakeLink()
    assert spreading.is_worth_it()


def test_who_asks_gets_all_of_it_as_long_as_the_function_lives(node: Any) -> None:
    spreading, function = Spreading(node), Function(b"abc")
    spreading.send(function, 2, FakeLink())  # type: ignore[arg-type]
    node.receive(Kind.WANTED, pieces.Wanted(5).pack())
    assert [kind for kind, _, _ in node.master_link.sent] == [Kind.PIECE]
    del function
    node.receive(Kind.WANTED, pieces.Wanted(5).pack())
    node.receive(Kind.WANTED, pieces.Wanted(6).pack())
    assert len(node.master_link.sent) == 1


def piece(index: int, offset: int, sizes: list[int]) -> bytes:
    return pieces.Piece(5, index, offset, sizes).pack()


def test_pieces_in_any_order_and_twice(node: Any) -> None:
    store, sizes = Store(node), [SIZE + 3, 2]
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(store.wait(5)))
    thread.start()
    node.receive(Kind.PIECE, piece(1, 0, sizes), b"yz")
    node.receive(Kind.PIECE, piece(0, SIZE, sizes), b"abc")
    node.receive(Kind.PIECE, piece(0, SIZE, sizes), b"abc")
    assert not found
    node.receive(Kind.PIECE, piece(0, 0, sizes), b"x" * SIZE)
    thread.join(30)
    assert [bytes(buffer) for buffer in found[0]] == [b"x" * SIZE + b"abc", b"yz"]


def test_children_get_what_is_there_and_what_comes(node: Any) -> None:
    store, sizes = Store(node), [SIZE + 3]
    assert store is not None
    node.receive(Kind.FORWARD, pieces.Forward(5, 7).pack())  # before anything has come
    node.receive(Kind.PIECE, piece(0, 0, sizes), b"x" * SIZE)
    node.receive(Kind.FORWARD, pieces.Forward(5, 8).pack())
    node.receive(Kind.PIECE, piece(0, SIZE, sizes), b"abc")
    node.receive(Kind.PIECE, piece(0, SIZE, sizes), b"abc")
    for child in (7, 8):
        assert [(kind, body) for kind, _, body in node.links[child].sent] == [
            (Kind.PIECE, b"x" * SIZE),
            (Kind.PIECE, b"abc"),
        ]


@pytest.mark.parametrize("index, offset, size", [(1, 0, 1), (-1, 0, 1), (0, 9, 2), (0, -1, 1), (0, 0, 11)])
def test_a_piece_that_does_not_fit(node: Any, index: int, offset: int, size: int) -> None:
    Store(node)
    with pytest.raises(ProtocolError):
        node.receive(Kind.PIECE, piece(index, offset, [10]), bytes(size))


def test_what_does_not_come_is_asked_for_and_given_up_in_the_end(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PATIENCE", 0.1)
    store = Store(node)
    with pytest.raises(ConnectionError, match="has not come"):
        store.wait(5)
    assert [kind for kind, _, _ in node.master_link.sent] == [Kind.WANTED, Kind.WANTED]


def test_one_that_is_on_its_way_again_is_not_dropped(node: Any) -> None:
    store = Store(node)
    node.receive(Kind.PIECE, piece(0, 0, [3]), b"abc")
    assert store.wait(5)
    store.drop(5)
    node.receive(Kind.PIECE, piece(0, 0, [3]), b"a")
    node.later.pop()()
    node.receive(Kind.PIECE, piece(0, 1, [3]), b"bc")
    assert [bytes(buffer) for buffer in store.wait(5)] == [b"abc"]


def test_it_is_dropped_when_it_is_not_needed_any_more(node: Any) -> None:
    store = Store(node)
    node.receive(Kind.PIECE, piece(0, 0, [3]), b"abc")
    assert [bytes(buffer) for buffer in store.wait(5)] == [b"abc"]
    node.later.pop()()
    assert store._blobs == {}
