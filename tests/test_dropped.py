"""What happens when something is dropped half-way, and that nothing does when it was not."""

from __future__ import annotations

import gc
import sys
from typing import Any

from distpool.dropped import WhenDropped


def test_dropped() -> None:
    seen: list[int] = []
    guard = WhenDropped(lambda: seen.append(1))
    assert seen == []
    del guard
    assert seen == [1]


def test_cancelled() -> None:
    seen: list[int] = []
    guard = WhenDropped(lambda: seen.append(1))
    guard.cancel()
    guard.cancel()
    assert not hasattr(type(guard), "__del__"), "no moment in which Ctrl-C would be lost"
    del guard
    assert seen == []


def test_cancelled_lets_go_of_the_action() -> None:
    class Held:
        pass

    held = Held()
    guard = WhenDropped(lambda: held)
    before = sys.getrefcount(held)
    guard.cancel()
    gc.collect()
    assert sys.getrefcount(held) <= before


def test_in_a_cycle() -> None:
    seen: list[int] = []
    circle: list[Any] = [WhenDropped(lambda: seen.append(1))]
    circle.append(circle)
    del circle
    gc.collect()
    assert seen == [1]


def test_one_that_an_interrupt_kept_from_being_made_does_nothing() -> None:
    object.__new__(WhenDropped).__del__()
