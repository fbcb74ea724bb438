"""`Deliveries`: whoever shuts an executor down waits for the callbacks of its futures, and for nothing else."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import PATIENCE

from distpool.node.deliveries import Deliveries
from distpool.node.threads import ThreadCache


class Loop:
    """Says when somebody is about to wait."""

    may_wait, leads = True, False

    def __init__(self) -> None:
        self.followed = threading.Event()

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        self.followed.set()
        yield


@pytest.fixture
def node() -> Any:
    threads = ThreadCache("deliveries")
    return SimpleNamespace(deliver=threads.run, delivering=set(), loop=Loop())


def waiting(deliveries: Deliveries) -> Callable[[], bool]:
    """Wait on another thread; says whether that has ended in time."""
    done = threading.Event()
    threading.Thread(target=lambda: (deliveries.wait(), done.set()), daemon=True).start()
    return lambda: done.wait(PATIENCE)


def test_without_callbacks_nobody_waits(node: Any) -> None:
    Deliveries(node).wait()
    assert not node.loop.followed.is_set()


def test_the_wait_ends_with_the_last_callback(node: Any) -> None:
    deliveries, gates, ended = Deliveries(node), [threading.Event(), threading.Event()], []
    for gate in gates:
        deliveries.run(lambda gate=gate: ended.append(gate.wait(PATIENCE)))
    assert node.delivering == {deliveries}
    result = waiting(deliveries)
    assert node.loop.followed.wait(PATIENCE)
    gates[0].set()
    assert len(ended) < 2
    gates[1].set()
    assert result() and ended == [True, True]
    assert node.delivering == set()


def test_a_callback_that_raises_is_waited_for_like_any_other(node: Any) -> None:
    deliveries = Deliveries(node)

    def fail() -> None:
        raise SystemExit("of the user's")

    deliveries.run(fail)
    assert waiting(deliveries)()
    assert node.delivering == set()


def test_a_callback_that_waits_does_not_wait_for_itself(node: Any) -> None:
    """It shuts its own executor down, for example."""
    deliveries, ended = Deliveries(node), threading.Event()
    deliveries.run(lambda: (deliveries.wait(), ended.set()))
    assert ended.wait(PATIENCE)
    assert waiting(deliveries)()


def test_those_of_one_executor_do_not_hold_up_another(node: Any) -> None:
    gate = threading.Event()
    busy, free = Deliveries(node), Deliveries(node)
    busy.run(lambda: gate.wait(PATIENCE))
    free.run(lambda: None)
    assert waiting(free)() and not gate.is_set()
    gate.set()
    assert waiting(busy)()
