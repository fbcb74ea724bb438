"""Cancellations under way: who is asked, who is woken by which answer, and what will not run."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from wires import PATIENCE

from distpool import recalls
from distpool.recalls import Recalls, withdraw
from distpool.transport.ioloop import IoLoop


class FakeSlot:
    def __init__(self, pid: int, started: int = 0) -> None:
        self.pid = pid
        self.member = SimpleNamespace(link=object())
        self.inflight: dict[int, Any] = {}
        self.started = started
        self.load = 0
        self.recalling = False
        self.asked: list[Any] = []

    def has_surely_started(self, sequence: int) -> bool:
        return sequence <= self.started

    def recall(self, message: Any) -> None:
        self.asked.append((message.count, message.sequences))


class FakeCall:
    def __init__(self, slot: FakeSlot | None, sequence: int) -> None:
        self.slot = slot
        self.sequence = sequence
        self.cancelled = False
        self.released = 0
        if slot is not None:
            slot.inflight[sequence] = self

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def desk() -> Any:
    loop = IoLoop("recalls")
    loop.start()
    yield Recalls(loop, threading.Lock())
    loop.stop()


def test_one_frame_for_each_worker_and_only_for_what_may_wait(desk: Recalls) -> None:
    first, second = FakeSlot(2, started=1), FakeSlot(3)
    runs, ahead, also = FakeCall(first, 1), FakeCall(first, 2), FakeCall(first, 3)
    other, queued, gone = FakeCall(second, 1), FakeCall(None, 0), FakeCall(second, 9)
    del second.inflight[9]  # answered this very moment
    events = desk.ask([runs, ahead, also, other, queued, gone])  # type: ignore[list-item]
    assert first.asked == [(0, [2, 3])] and second.asked == [(0, [1])]
    assert len(events) == 2 and not any(event.is_set() for event in events)
    assert [call.cancelled for call in (runs, ahead, also, other, queued, gone)] == [
        False,
        True,
        True,
        True,
        *[False] * 2,
    ]


def test_an_answer_wakes_those_who_asked(desk: Recalls) -> None:
    first, second = FakeSlot(2), FakeSlot(3)
    one, other = FakeCall(first, 1), FakeCall(second, 1)
    [early], [late] = desk.ask([one]), desk.ask([one])  # type: ignore[list-item]
    [elsewhere] = desk.ask([other])  # type: ignore[list-item]
    desk.answered(first, [1])  # type: ignore[arg-type]
    assert early.is_set() and late.is_set() and not elsewhere.is_set(), "numbers count for each worker"
    desk.answered(first, [1, 5])  # type: ignore[arg-type]  # nobody waits any more
    assert not elsewhere.is_set()


def test_a_lost_worker_wakes_its_askers_only(desk: Recalls) -> None:
    first, second = FakeSlot(2), FakeSlot(3)
    events = desk.ask([FakeCall(first, 1), FakeCall(first, 2), FakeCall(second, 1)])  # type: ignore[list-item]
    desk.lost(first)  # type: ignore[arg-type]
    assert [event.is_set() for event in events] == [True, False]
    assert list(desk._waiting) == [(3, 1)], "nothing is left of it"


def test_what_came_back_will_not_run_and_is_let_go(desk: Recalls) -> None:
    slot = FakeSlot(2)
    back, runs = FakeCall(slot, 1), FakeCall(slot, 2)
    events = desk.ask([back, runs])  # type: ignore[list-item]
    answering = threading.Thread(target=lambda: (setattr(back, "slot", None), desk.answered(slot, [1, 2])))  # type: ignore
    answering.start()
    assert desk.wait([back, runs], events) == [back]  # type: ignore[list-item,comparison-overlap]
    answering.join(PATIENCE)
    assert (back.cancelled, back.released) == (True, 1)
    assert (runs.cancelled, runs.released) == (False, 0)


def test_calls_that_wait_here_need_no_answer(desk: Recalls) -> None:
    call = FakeCall(None, 0)
    assert desk.ask([call]) == [] and desk.wait([call], []) == [call]  # type: ignore[list-item,comparison-overlap]


def test_a_worker_that_does_not_answer_is_not_waited_for_for_ever(
    desk: Recalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recalls, "_PATIENCE", 0.01)
    slots = [FakeSlot(pid) for pid in range(2, 50)]
    calls = [FakeCall(slot, 1) for slot in slots]
    assert desk.wait(calls, desk.ask(calls)) == []  # type: ignore[arg-type]
    assert not any(call.cancelled for call in calls), "an answer that comes later sends them on"


def test_the_leader_does_not_wait_for_itself(desk: Recalls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalls, "_PATIENCE", 1000.0)
    call = FakeCall(FakeSlot(2), 1)
    done = threading.Event()
    found: list[Any] = []

    def cancel() -> None:
        found.append(desk.wait([call], desk.ask([call])))  # type: ignore[list-item]
        done.set()

    desk._loop.call_soon(cancel)
    assert done.wait(PATIENCE) and found == [[]]


# -- maps that nobody wants any more -------------------------------------------------------------------------------


def test_a_map_is_recalled_where_it_is() -> None:
    run = object()
    has, mixed, other, gone = (FakeSlot(pid) for pid in range(2, 6))
    for slot in (has, mixed, gone):
        slot.inflight[1] = SimpleNamespace(run=run)
    mixed.inflight[2] = other.inflight[1] = SimpleNamespace(run=object())
    other.inflight[2] = object()  # a single call
    gone.member.link = None
    has.load, mixed.load = 5, 7
    withdraw(run, [has, mixed, other, gone])  # type: ignore[list-item]
    assert has.asked == [(5, [])] and mixed.asked == [(7, [])] and other.asked == gone.asked == []
    assert [slot.recalling for slot in (has, mixed, other, gone)] == [True, True, False, False]
