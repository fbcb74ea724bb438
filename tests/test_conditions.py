"""Locks of futures that a signal's exception has left behind in the standard library's helpers."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from concurrent.futures import _base
from typing import Any

import pytest
from faults.helpers import Gate, hold

from distpool import ClusterExecutor
from distpool.refs.conditions import take
from distpool.refs.refs import Future

PATIENCE = 30.0


class Struck(Exception):
    """What a signal handler of the user's raises."""


def test_a_lock_that_is_free_or_ones_own() -> None:
    condition = threading.Condition()
    assert take(condition) and take(condition)
    condition.release()
    condition.release()


def elsewhere(function: Callable[[], Any]) -> Any:
    """`function()` on another thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(PATIENCE)


def test_a_lock_that_was_left_behind_is_not_waited_for() -> None:
    condition = threading.Condition()
    condition.acquire()
    assert not elsewhere(lambda: take(condition))
    ended = threading.Condition()
    thread = threading.Thread(target=ended.acquire)
    thread.start()
    thread.join()
    assert not take(ended), "its thread has ended"


@pytest.mark.parametrize("waits", ["event", "wait", "result"])
def test_who_waits_for_something_else_has_left_it_behind(waits: str) -> None:
    """Also in the helpers themselves: they hold no lock while they wait."""
    condition, other, event = threading.Condition(), Future[int](), threading.Event()
    begun = threading.Event()

    def leaves() -> None:
        condition.acquire()
        begun.set()
        if waits == "event":
            event.wait(PATIENCE)
        elif waits == "wait":
            concurrent.futures.wait([other], PATIENCE)
        else:
            other.result(PATIENCE)

    thread = threading.Thread(target=leaves)
    thread.start()
    assert begun.wait(PATIENCE)
    assert not take(condition)
    event.set()
    other.set_result(3)
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_who_is_in_the_midst_of_the_helpers_is_waited_for() -> None:
    """`wait` looks at the state of each future while it has all the locks."""
    holds, go = threading.Event(), threading.Lock()
    go.acquire()

    class Slow(Future[int]):
        def __getattribute__(self, name: str) -> Any:
            if name == "_state" and not holds.is_set() and threading.current_thread() is waiter:
                holds.set()
                go.acquire(timeout=PATIENCE)
            return super().__getattribute__(name)

    future = Slow()
    waiter = threading.Thread(target=lambda: concurrent.futures.wait([future], PATIENCE))
    waiter.start()
    assert holds.wait(PATIENCE)
    taken: list[bool] = []

    def takes() -> None:
        taken.append(take(future._condition))
        future._condition.release()

    taker = threading.Thread(target=takes)
    taker.start()
    taker.join(0.2)
    assert taker.is_alive() and not taken
    go.release()
    taker.join(PATIENCE)
    assert taken == [True]
    future.set_result(3)
    waiter.join(PATIENCE)
    assert not waiter.is_alive()


class Strikes:
    """In place of a future: where its lock is to be taken, a signal handler raises."""

    _state = "PENDING"

    @property
    def _condition(self) -> threading.Condition:
        raise Struck


@pytest.mark.parametrize("how", ["result", "wait"])
def test_an_exception_in_the_midst_of_wait(
    make: Callable[..., ClusterExecutor], gate: Gate, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The future in front stays locked. Its worker answers, and everything goes on, whatever its thread waits in."""
    executor = make(1)
    future = executor.submit(hold, gate.address, "held")
    behind = executor.submit(abs, -2)
    pair: list[Any] = [future, Strikes()]
    monkeypatch.setattr(_base, "sorted", lambda futures, key: pair, raising=False)  # they are locked in this order
    with pytest.raises(Struck):
        concurrent.futures.wait(pair, 0)
    monkeypatch.undo()
    assert not elsewhere(lambda: future._condition.acquire(blocking=False)), "it is locked"
    (arrival,) = gate.arrivals(1, PATIENCE)
    arrival.release()
    if how == "wait":
        assert not concurrent.futures.wait([behind], PATIENCE).not_done
    assert behind.result(PATIENCE) == 2
    assert executor.submit(abs, -7).result(PATIENCE) == 7
    assert future.result(PATIENCE) == "held"
    executor.shutdown()
