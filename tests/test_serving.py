"""The owner's side of futures: what it answers to whom, and what never runs on the leader. Processes are played."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from fakes import Cluster

from distpool.refs.owner import RRID
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome
from distpool.refs.serving import serving
from distpool.refs.travel import new_future
from distpool.wire import codec, structs
from distpool.wire.failures import decode_exception
from distpool.wire.frames import Kind
from distpool.wire.messages import ERROR, UNSENDABLE, VALUE

REF = RRID(2, 5)


class Desk:
    """Process 1 owns REF; process 2 asks, and keeps the answers as they come."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.owner = cluster.processes[1]
        self.asker = cluster.processes[2]
        self.answers: list[tuple[int, Any]] = []
        self.notices: list[Any] = []
        self.asker.handlers[Kind.NOTICE] = lambda link, frame: self.notices.append(structs.Notice.unpack(frame.control))
        self.entry = self.owner.refs.owner.touch(REF, 2)

    def ask(self, op: str, body: bytes = b"") -> None:
        number = self.asker.requests.new(1, lambda status, data, parts: self.answers.append((status, data)), print)
        self.asker.send(1, Kind.REFERENCE, structs.Reference(number, op, *REF).pack(), body)
        self.cluster.run()

    def settle(self, outcome: Outcome) -> None:
        self.owner.refs.owner.settle(self.entry, outcome)
        self.cluster.run()

    def last(self) -> Any:
        status, data = self.answers[-1]
        return (status, codec.decode(data)) if status == VALUE and data else (status, data)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(Cluster(monkeypatch, 3))


def local(value: Any) -> Outcome:
    return Outcome(LOCAL_VALUE, value, (), 1)


def test_there_is_one_for_each_node(desk: Desk) -> None:
    assert serving(desk.owner) is desk.owner.serving


def test_a_fetch_waits_for_the_value(desk: Desk) -> None:
    desk.ask("fetch")
    assert desk.answers == []
    desk.settle(local([1, 2]))
    assert desk.last() == (VALUE, [1, 2])
    desk.ask("fetch")
    assert len(desk.answers) == 2 and desk.last() == (VALUE, [1, 2])


def test_a_watcher_hears_without_the_value(desk: Desk) -> None:
    desk.ask("watch")
    assert desk.answers == [(VALUE, b"")] and desk.notices == []
    desk.settle(local(1))
    assert desk.notices == [structs.Notice(*REF, True)]


@pytest.mark.parametrize("status, ok", [(VALUE, True), (LOCAL_VALUE, True), (ERROR, False), (UNSENDABLE, False)])
def test_how_it_ended_is_in_the_notice(desk: Desk, status: int, ok: bool) -> None:
    desk.ask("watch")
    desk.settle(Outcome(status, b"", (), 1))
    assert desk.notices == [structs.Notice(*REF, ok)]


def test_isready_is_answered_at_once(desk: Desk) -> None:
    desk.ask("isready")
    assert desk.last() == (VALUE, False)
    desk.settle(local(None))
    desk.ask("isready")
    assert desk.last() == (VALUE, True)


def test_a_put_settles_once(desk: Desk) -> None:
    desk.ask("put", codec.encode("first")[0])
    assert desk.last() == (VALUE, b"")
    desk.ask("put", codec.encode("second")[0])
    status, data = desk.answers[-1]
    error = decode_exception(data, 1)
    assert status == ERROR and isinstance(error, RuntimeError) and "only once" in str(error)
    desk.ask("fetch")
    assert desk.last() == (VALUE, "first")


def test_a_put_that_cannot_be_opened_here(desk: Desk) -> None:
    """A value with references is opened by the owner; what goes wrong is told to who has put it."""
    with desk.cluster.on(2):
        seen: list[Any] = []
        data, _ = codec.encode([new_future(2), Unreadable()], 1, seen)
    desk.ask("put", data)
    status, failure = desk.answers[-1]
    assert status == ERROR and isinstance(decode_exception(failure, 1), KeyError)
    assert desk.entry.outcome is None


def test_references_in_a_put_value_live_at_the_owner(desk: Desk) -> None:
    with desk.cluster.on(2):
        inner = new_future(2)
        seen: list[Any] = []
        data, _ = codec.encode([inner], 1, seen)
        desk.asker.refs.lend(seen, 1)
    desk.ask("put", data)
    assert desk.entry.outcome is not None and desk.entry.outcome.status == LOCAL_VALUE
    assert desk.cluster.table(2)[RRID(inner.whence, inner.id)] == {1, 2}


class Unreadable:
    def __reduce__(self) -> Any:
        return fail, ()


def fail() -> None:
    raise KeyError("x")


class Noting:
    """Its pickling is the user's code."""

    ran: list[bool] = []

    def __reduce__(self) -> Any:
        self.ran.append(bool(threading.current_thread()))
        return str, ("noted",)


class Unsendable:
    def __reduce__(self) -> Any:
        raise ValueError("not this one")


def test_values_are_serialised_beside_the_leader(desk: Desk) -> None:
    Noting.ran.clear()
    desk.settle(local(Noting()))
    number = desk.asker.requests.new(1, lambda status, data, parts: desk.answers.append((status, data)), print)
    desk.owner.serving.send_outcome(2, number, desk.entry.outcome)
    assert Noting.ran == [] and len(desk.owner.delivered) == 1, "it was only handed over"
    desk.cluster.run()
    assert Noting.ran and desk.last() == (VALUE, "noted")


def test_scalars_are_answered_at_once(desk: Desk) -> None:
    desk.owner.serving.send_outcome(2, 1, local(7))
    assert desk.owner.delivered == [] and desk.owner.kinds() == [Kind.REPLY]


def test_a_value_that_cannot_be_sent_is_an_error(desk: Desk) -> None:
    desk.settle(local(Unsendable()))
    desk.ask("fetch")
    status, data = desk.answers[-1]
    assert status == UNSENDABLE and "not this one" in str(decode_exception(data, 1))


def test_errors_of_this_process_travel(desk: Desk) -> None:
    desk.settle(Outcome(RAISED_HERE, KeyError("mine"), (), 1))
    desk.ask("fetch")
    status, data = desk.answers[-1]
    assert status == ERROR and isinstance(decode_exception(data, 1), KeyError)


def test_an_answer_that_nobody_waits_for_gives_its_references_back(desk: Desk) -> None:
    """The asker has given up; what is in the value was lent to it."""
    with desk.cluster.on(1):
        inner = new_future(1)
        desk.settle(local([inner]))
    number = desk.asker.requests.new(1, print, print)
    desk.asker.send(1, Kind.REFERENCE, structs.Reference(number, "fetch", *REF).pack())
    assert desk.asker.requests.forget(number)
    desk.cluster.run()
    import gc

    gc.collect()
    assert desk.cluster.table(1)[RRID(inner.whence, inner.id)] == {1}


def test_notices_of_futures_that_are_gone_are_ignored(desk: Desk) -> None:
    other = desk.cluster.processes[3]
    desk.owner.send(3, Kind.NOTICE, structs.Notice(3, 99, True).pack())
    desk.cluster.run()
    assert other.sent == []
