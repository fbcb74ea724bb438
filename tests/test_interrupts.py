"""distpool/node/interrupts.py: KeyboardInterrupt strikes user code, and inside the library it is noted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distpool.node.interrupts import Inside, Interrupts
from distpool.transport.ioloop import IoLoop


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    made = Interrupts()
    previous = signal.signal(signal.SIGINT, made.on_signal)
    yield made
    signal.signal(signal.SIGINT, previous)


def on_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start it; the result waits for its end and gives what came of it, an exception included."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(20)
        assert not thread.is_alive()
        return found[0]

    return result


def test_user_code_on_another_thread_is_struck(interrupts: Interrupts) -> None:
    running = threading.Event()

    def spin() -> None:
        running.set()
        while True:
            pass

    result = on_thread(lambda: interrupts.call(spin, (), {}))
    assert running.wait(10)
    interrupts.strike()
    assert isinstance(result(), KeyboardInterrupt)


def test_user_code_on_the_main_thread_is_struck(interrupts: Interrupts) -> None:
    def sleep() -> None:
        on_thread(interrupts.strike)
        threading.Event().wait(20)

    with pytest.raises(KeyboardInterrupt):
        interrupts.call(sleep, (), {})
    assert not interrupts.main


def test_nothing_runs_nothing_happens(interrupts: Interrupts) -> None:
    interrupts.strike()
    assert interrupts.enter(None) is None
    assert interrupts.call(lambda: 1, (), {}) == 1
    assert on_thread(lambda: interrupts.call(lambda: 2, (), {}))() == 2


@pytest.mark.parametrize("on_main", [True, False])
def test_inside_the_library_it_is_noted(interrupts: Interrupts, on_main: bool) -> None:
    """Struck while it is inside, the thread goes on until `leave`; `wake` was called meanwhile."""
    reached: list[str] = []

    def call() -> None:
        woken = threading.Event()
        inside = interrupts.enter(woken.set)
        assert isinstance(inside, Inside) and interrupts.enter(None) is None, "entered once"
        on_thread(interrupts.strike)()
        assert woken.wait(10) and inside.struck
        for _ in range(1000):
            reached.append("inside")
        try:
            interrupts.leave(inside)
        finally:
            reached.append("left")
        reached.append("not this")

    if on_main:
        with pytest.raises(KeyboardInterrupt):
            interrupts.call(call, (), {})
    else:
        assert isinstance(on_thread(lambda: interrupts.call(call, (), {}))(), KeyboardInterrupt)
    assert reached == ["inside"] * 1000 + ["left"]


def test_a_signal_inside_the_library_is_noted(interrupts: Interrupts) -> None:
    def call() -> None:
        inside = interrupts.enter(None)
        assert inside is not None
        signal.raise_signal(signal.SIGINT)
        assert inside.struck
        interrupts.leave(inside)

    with pytest.raises(KeyboardInterrupt):
        interrupts.call(call, (), {})


def test_after_an_uninterrupted_stay_the_call_can_be_struck_again(interrupts: Interrupts) -> None:
    def call() -> str:
        inside = interrupts.enter(None)
        assert inside is not None
        interrupts.leave(inside)
        assert interrupts.main
        return "through"

    assert interrupts.call(call, (), {}) == "through"
    assert not interrupts.main


@pytest.mark.parametrize("leading", [True, False])
def test_waits_of_the_loop_end(interrupts: Interrupts, leading: bool) -> None:
    loop = IoLoop()
    loop.guard, loop.owns_interrupts = interrupts, True  # as in a worker
    waits = threading.Event()

    def call() -> None:
        if leading:
            loop.call_soon(waits.set)
            loop.lead(lambda: False)
            return
        lock = threading.Lock()
        lock.acquire()
        with loop.following(lock.release):
            waits.set()
            lock.acquire()

    try:
        result = on_thread(lambda: interrupts.call(call, (), {}))
        assert waits.wait(10)
        interrupts.strike()
        assert isinstance(result(), KeyboardInterrupt)
        assert loop.lead(lambda: True), "the lead was given back"
    finally:
        loop.close_descriptors()


def test_a_storm_leaves_nothing_behind(interrupts: Interrupts) -> None:
    """Struck at any moment, a call is either through or interrupted, and its thread is nobody's any more."""
    ended: list[type[BaseException] | None] = []
    over = threading.Event()

    def call() -> None:
        for _ in range(20):
            inside = interrupts.enter(None)
            assert inside is not None
            interrupts.leave(inside)

    def work() -> None:
        for _ in range(500):
            try:
                interrupts.call(call, (), {})
                ended.append(None)
            except KeyboardInterrupt:
                ended.append(KeyboardInterrupt)
        over.set()

    result = on_thread(work)
    while not over.is_set():
        interrupts.strike()
    assert result() is None and len(ended) == 500
    assert not interrupts._beside and not interrupts._inside
