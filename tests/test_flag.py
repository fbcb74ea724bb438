"""The reentrant event."""

from __future__ import annotations

import signal
import sys
import threading
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


@pytest.mark.parametrize("method", ["set", "wait"])
def test_code_that_comes_half_way_may_use_it(method: str) -> None:
    """At each line of the library's and of `threading`'s, as a signal handler or a `__del__` might."""
    flag = Flag()
    stops = 0

    def inside(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal stops
        stops += 1
        sys.settrace(None)
        flag.set()
        assert flag.wait(0)
        sys.settrace(inside)
        return inside

    sys.settrace(inside)
    try:
        flag.set() if method == "set" else flag.wait(5)
    finally:
        sys.settrace(None)
    assert stops > 3
    assert flag.is_set()


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
