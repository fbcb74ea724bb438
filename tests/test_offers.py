"""`Offers`: which thread a remote call gets. A call waits for no other one, and prefers the main thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from wires import PATIENCE, Bench, bench, until

from distpool.node import offers, tasks
from distpool.wire import codec, messages
from distpool.wire.frames import Kind

gate = threading.Event()
entered = threading.Event()


@pytest.fixture
def runner() -> Iterator[Bench]:
    gate.clear()
    entered.clear()
    with bench(True) as made:
        yield made
        gate.set()


def hold(number: int) -> int:
    entered.set()
    assert gate.wait(PATIENCE)
    return number


def offer(runner: Bench, work: Any) -> None:
    runner.runner.link.loop.call_soon(lambda: runner.runner.offers.offer(work))


def names(call: Any, found: queue.SimpleQueue[str]) -> None:
    call(lambda: found.put(threading.current_thread().name), (), {})


def test_a_remote_call_waits_for_the_thread_that_answers_the_one_before(
    runner: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who calls again as soon as the answer is there finds the same thread: the one that can be interrupted in C."""
    monkeypatch.setattr(offers, "_PATIENCE", PATIENCE)
    found: queue.SimpleQueue[str] = queue.SimpleQueue()

    def first(call: Any) -> None:
        names(call, found)
        offer(runner, lambda call: names(call, found))
        until(lambda: runner.runner.offers, "it is not given to another thread")

    for _ in range(20):
        offer(runner, first)
        assert {found.get(timeout=PATIENCE) for _ in range(2)} == {runner.thread.name}
        until(lambda: runner.runner.idle, "it has nothing to do")


def test_a_remote_call_does_not_wait_for_an_answer_that_takes_its_time(runner: Bench) -> None:
    found: queue.SimpleQueue[str] = queue.SimpleQueue()

    def first(call: Any) -> None:
        names(call, found)
        offer(runner, lambda call: names(call, found))
        offer(runner, lambda call: names(call, found))
        assert gate.wait(PATIENCE)

    offer(runner, first)
    assert found.get(timeout=PATIENCE) == runner.thread.name
    assert runner.thread.name not in [found.get(timeout=PATIENCE) for _ in range(2)]
    gate.set()
    until(lambda: runner.runner.idle, "it has nothing to do")
    offer(runner, lambda call: names(call, found))
    assert found.get(timeout=PATIENCE) == runner.thread.name


@pytest.mark.parametrize("busy", ["call", "remote call", "initializer"])
def test_a_remote_call_does_not_wait_for_code_of_the_user(
    runner: Bench, busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "_PATIENCE", 10 * PATIENCE)
    found: queue.SimpleQueue[str] = queue.SimpleQueue()
    if busy == "call":
        runner.send(runner.one(hold, 1))
    elif busy == "remote call":
        offer(runner, lambda call: call(hold, (1,), {}))
    else:
        runner.master.link.send(Kind.INITIALIZE, messages.Initialize("").pack(), codec.encode((hold, (1,)))[0])
    assert entered.wait(PATIENCE)
    offer(runner, lambda call: names(call, found))
    assert found.get(timeout=PATIENCE) != runner.thread.name


def thread_name() -> str:
    return threading.current_thread().name


def test_what_an_executor_sends_waits_for_the_thread_that_answers(
    runner: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came just before the main thread was back: a helper ran it, beside the next one, and no interrupt ended it."""
    monkeypatch.setattr(tasks, "_ANSWER", PATIENCE)
    found: queue.SimpleQueue[int] = queue.SimpleQueue()

    def answer(call: Any) -> None:
        call(int, (), {})
        found.put(runner.send(runner.one(thread_name), runner.one(thread_name)))
        until(lambda: len(runner.runner._inbox) == 2, "both wait for this thread")

    for _ in range(20):
        offer(runner, answer)
        first = found.get(timeout=PATIENCE)
        assert runner.collect(2) == {first: runner.thread.name, first + 1: runner.thread.name}


def test_what_an_executor_sends_does_not_wait_for_an_answer_that_takes_its_time(runner: Bench) -> None:
    found: queue.SimpleQueue[int] = queue.SimpleQueue()

    def answer(call: Any) -> None:
        call(int, (), {})
        found.put(runner.send(runner.one(abs, -1), runner.one(abs, -2)))
        assert gate.wait(PATIENCE)

    offer(runner, answer)
    first = found.get(timeout=PATIENCE)
    assert runner.collect(2) == {first: 1, first + 1: 2}
    assert not gate.is_set()
    gate.set()
    until(lambda: runner.runner.idle, "it has nothing to do")
    assert (runner.runner._blocked, runner.runner._answering) == (0, False)


def test_what_an_executor_sends_is_run_meanwhile(runner: Bench) -> None:
    """By helpers: the remote call on the main thread may take for ever."""
    offer(runner, lambda call: call(hold, (1,), {}))
    assert entered.wait(PATIENCE)
    first = runner.send(runner.one(abs, -1), runner.one(abs, -2))
    assert runner.collect(2) == {first: 1, first + 1: 2}
    assert not gate.is_set()
