"""`Ready`: threads that wait for a link wake when it is there, and each only by its own interrupt."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from distpool.node.ready import Ready

PATIENCE = 30.0


class Loop:
    """Keeps what ends the waits."""

    def __init__(self) -> None:
        self.wakes: list[Callable[[], object]] = []
        self.there = threading.Semaphore(0)

    @contextlib.contextmanager
    def following(self, wake: Callable[[], object]) -> Iterator[None]:
        self.wakes.append(wake)
        self.there.release()
        yield


def waiting(ready: Ready, loop: Any) -> threading.Thread:
    thread = threading.Thread(target=ready.wait, args=(loop,), daemon=True)
    thread.start()
    assert loop.there.acquire(timeout=PATIENCE)
    return thread


def test_all_wake_when_it_is_over() -> None:
    ready, loop = Ready(), Loop()
    threads = [waiting(ready, loop) for _ in range(3)]
    assert not ready.is_set()
    ready.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert ready.is_set()
    ready.wait(loop)  # type: ignore[arg-type]  # who comes later does not wait


def test_an_interrupt_wakes_one() -> None:
    ready, loop = Ready(), Loop()
    first, second = waiting(ready, loop), waiting(ready, loop)
    for _ in range(2):
        loop.wakes[0]()
    first.join(PATIENCE)
    assert not first.is_alive() and second.is_alive()
    ready.set()
    second.join(PATIENCE)
    assert not second.is_alive()
