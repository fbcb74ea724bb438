"""A program near the recursion limit: its own RecursionError, and nothing torn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

import distpool
from distpool import ClusterExecutor
from distpool.depth import ROOM, is_deep

PATIENCE = 30.0


def depth() -> int:
    """Frames of the calling thread."""
    frame, count = sys._getframe(1), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1  # type: ignore[assignment]
    return count


def at(more: int, function: Callable[[], Any]) -> Any:
    """`function()`, called with so many frames more on the stack."""
    return at(more - 1, function) if more > 0 else function()


def test_whether_there_is_room() -> None:
    free = sys.getrecursionlimit() - depth()
    assert not is_deep()
    assert not at(free - ROOM - 20, is_deep)
    assert at(free - ROOM + 20, is_deep)
    assert at(free - 40, is_deep)


def test_a_limit_below_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there is never room, which costs time and nothing else."""
    monkeypatch.setattr("distpool.depth._limit", lambda: ROOM - 50)
    assert is_deep()


def uses(executor: ClusterExecutor) -> dict[str, Callable[[], Any]]:
    """What a program may do at any depth, and what works afterwards if that did not."""
    return {
        "submit": lambda: executor.submit(abs, -1).result(PATIENCE),
        "kept": lambda: executor.submit(abs, -2),
        "map": lambda: list(executor.map(abs, [-1, -2])),
        "remotecall": lambda: distpool.remotecall_fetch(abs, distpool.workers()[0], -1),
        "channel": lambda: distpool.RemoteChannel().put(1),
    }


@pytest.mark.parametrize("use", ["submit", "kept", "map", "remotecall", "channel"])
def test_at_every_depth(make: Callable[..., ClusterExecutor], mortal: int, use: str) -> None:
    """From where there is just no room for a call of Python's to where there is enough: at each frame something else
    fails for want of room. Each use gives its result or RecursionError, and a later one works."""
    executor = make(2)
    function = uses(executor)[use]
    function()
    free = sys.getrecursionlimit() - depth() - 3
    made: list[Any] = []
    errors = 0
    for left in range(120):
        try:
            made.append(at(free - left, function))
        except RecursionError:
            errors += 1
        except Exception as error:  # raised from one, by a part of Python itself
            assert "recursion" in str(error), repr(error)
            errors += 1
        assert executor.submit(abs, -5).result(PATIENCE) == 5, left
    assert 3 < errors < 120 and made
    for future in made if use == "kept" else []:
        assert future.result(PATIENCE) == 2
    executor.shutdown()
