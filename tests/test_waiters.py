"""Tasks that wait with the standard library's functions give their slot away meanwhile."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import _base
from typing import Any

import pytest

from distpool.node import node as nodes
from distpool.refs import waiters
from distpool.refs.waiters import Waiters

PATIENCE = 30.0


class Task:
    """A node whose thread runs a task: notes when its slot is given away, and how it can be woken."""

    def __init__(self) -> None:
        self.loop = self
        self.events: list[str] = []
        self.wake: Callable[[], object] | None = None
        self.waits = threading.Event()

    @contextlib.contextmanager
    def given_away(self) -> Iterator[None]:
        self.events.append("gives")
        yield
        self.events.append("takes")

    @contextlib.contextmanager
    def following(self, wake: Callable[[], object]) -> Iterator[None]:
        self.wake = wake
        self.waits.set()
        yield


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Task:
    made = Task()
    monkeypatch.setattr(nodes, "existing", lambda: made)
    return made


class Listed(concurrent.futures.Future[Any]):
    """A future whose waiters are ours, as those of tasks are."""

    def __init__(self) -> None:
        super().__init__()
        self._waiters = Waiters()


def later(task: Task, act: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        assert task.waits.wait(PATIENCE)
        act()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_wait_gives_the_slot_away(task: Task) -> None:
    future = Listed()
    thread = later(task, lambda: future.set_result(1))
    assert concurrent.futures.wait([future], PATIENCE).done == {future}
    assert task.events == ["gives", "takes"]
    thread.join(PATIENCE)


def test_as_completed_gives_it_away_each_time(task: Task) -> None:
    futures = [Listed(), Listed()]
    found = concurrent.futures.as_completed(futures, PATIENCE)
    for number, future in enumerate(futures, 1):
        task.waits.clear()
        thread = later(task, lambda future=future: future.set_result(1))
        assert next(found) is future and task.events == ["gives", "takes"] * number
        thread.join(PATIENCE)


def test_nothing_is_given_for_what_is_there(task: Task) -> None:
    future = Listed()
    future.set_result(1)
    assert concurrent.futures.wait([future]).done and task.events == []
    event = waiters._GivingEvent()
    event.set()
    assert event.wait() and task.events == []


def test_a_time_limit_takes_it_back(task: Task) -> None:
    assert concurrent.futures.wait([Listed()], 0.01).not_done
    assert task.events == ["gives", "takes"]


def test_whoever_interrupts_the_task_wakes_it(task: Task) -> None:
    event = waiters._GivingEvent()
    thread = later(task, lambda: task.wake and task.wake())
    assert event.wait(PATIENCE)
    thread.join(PATIENCE)


def test_only_a_fresh_event_of_the_standard_library_is_replaced() -> None:
    """Someone else's waiter, or one that has been told already, is none of ours."""
    found = Waiters()
    waiter = _base._AllCompletedWaiter(1, False)
    found.append(waiter)
    assert type(waiter.event) is waiters._GivingEvent and found == [waiter]
    told = _base._AllCompletedWaiter(1, False)
    told.event.set()
    before = told.event
    found.append(told)
    assert told.event is before

    class Other(threading.Event):
        pass

    for event in (Other(), None):
        waiter.event = event
        found.append(waiter)
        assert waiter.event is event
    found.append(object())
    assert len(found) == 5


def test_without_a_node_it_is_a_plain_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "existing", lambda: None)
    assert not waiters._GivingEvent().wait(0)
