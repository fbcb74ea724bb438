"""The reentrant event."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from distpool.flag import Flag


def test_set_clear_wait() -> None:
    flag = Flag()
    assert not flag.is_set()
    assert not flag.wait(0.01)
    flag.set()
    assert flag.is_set()
    assert flag.wait()
    flag.clear()
    assert not flag.is_set()
    assert not flag.wait(0)


def test_all_who_wait_go_on() -> None:
    flag = Flag()
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(flag.wait(20)), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    flag.set()
    for thread in threads:
        thread.join(20)
    assert found == [True] * 3


class Stop:
    """Runs `work()` once, before the n-th line of a call, as a signal handler or a `__del__` might come there."""

    def __init__(self, number: int, work: Callable[[], object]) -> None:
        self.number = number
        self.work = work
        self.came = False

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not self.came:
            self.number -= 1
            if self.number < 0:
                self.came = True
                sys.settrace(None)
                self.work()
        return self.trace

    def during(self, call: Callable[[], object]) -> object:
        sys.settrace(self.trace)
        try:
            return call()
        finally:
            sys.settrace(None)


@pytest.mark.parametrize("number", range(7))
def test_who_comes_half_way_may_set_it(number: int) -> None:
    flag = Flag()
    stop = Stop(number, flag.set)
    assert stop.during(lambda: flag.wait(1)), "set, and nobody woke"
    assert stop.came

    other = Flag()
    stop = Stop(number, lambda: (other.wait(0), other.set()))
    stop.during(lambda: (other.set(), other.wait(0)))
    assert stop.came
    assert other.wait(0)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this system")
def test_a_signal_handler_ends_a_wait() -> None:
    flag = Flag()
    previous = signal.signal(signal.SIGALRM, lambda number, frame: flag.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        assert flag.wait(20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
