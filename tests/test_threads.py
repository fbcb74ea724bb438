"""Library threads: at once, reused, and whatever user code does there costs nobody else."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from distpool.node import threads as module
from distpool.node.threads import SerialQueue, ThreadCache

PATIENCE = 30.0


def test_functions_run_at_once_beside_each_other() -> None:
    cache = ThreadCache("beside")
    barrier = threading.Barrier(20)
    done = threading.Semaphore(0)
    for _ in range(20):
        cache.run(lambda: (barrier.wait(PATIENCE), done.release()))
    for _ in range(20):
        assert done.acquire(timeout=PATIENCE), "one was queued behind another one"


def test_threads_are_daemons_and_are_used_again() -> None:
    cache = ThreadCache("again")
    seen: set[int] = set()
    for _ in range(50):
        done = threading.Event()
        cache.run(lambda done=done: (seen.add(threading.get_ident()), done.set()))
        assert done.wait(PATIENCE)
    assert len(seen) < 25
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("again"))


@pytest.mark.parametrize("error", [ValueError("from user code"), SystemExit("from user code")])
def test_what_is_raised_is_logged_and_the_thread_lives(caplog: pytest.LogCaptureFixture, error: BaseException) -> None:
    cache = ThreadCache("raises")

    def bad() -> None:
        raise error

    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            cache.run(bad)
            done = threading.Event()
            cache.run(done.set)
            assert done.wait(PATIENCE)
        queue = SerialQueue(cache)
        queue.put(bad)
        assert queue.join(PATIENCE)
    assert "from user code" in caplog.text


def test_idle_threads_end_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE", 0.02)
    cache = ThreadCache("shortlived")
    for _ in range(3):
        done = threading.Event()
        cache.run(done.set)
        assert done.wait(PATIENCE)
        for thread in threading.enumerate():
            if thread.name.startswith("shortlived"):
                thread.join(PATIENCE)
                assert not thread.is_alive()


def test_a_reserve_is_there_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE", 0.001)
    cache = ThreadCache("reserve")
    cache.reserve(3)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(2):
        barrier = threading.Barrier(4)
        for _ in range(3):
            cache.run(lambda barrier=barrier: barrier.wait(PATIENCE))
        barrier.wait(PATIENCE)


def test_functions_that_come_as_a_thread_ends_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE", 0.0005)
    cache = ThreadCache("race")
    pause = threading.Event()
    count = threading.Semaphore(0)
    for number in range(400):
        cache.run(count.release)
        pause.wait((number % 7) * 0.0002)
    for _ in range(400):
        assert count.acquire(timeout=PATIENCE)


def test_work_that_is_refused_a_thread_just_as_the_last_one_goes_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ThreadCache("refused")
    busy, ended = threading.Event(), threading.Event()

    def work() -> None:
        busy.set()
        ended.wait(PATIENCE)

    cache.run(work)
    assert busy.wait(PATIENCE)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if not thread.name.startswith("refused"):
            start(thread)
            return
        ended.set()  # and the thread that was busy idles before the refusal is known
        deadline = time.monotonic() + PATIENCE
        while not cache._idle and time.monotonic() < deadline:
            time.sleep(0.001)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = threading.Event()
    cache.run(done.set)
    assert done.wait(PATIENCE), "it waits for a thread that idles"


def test_work_that_is_refused_the_first_thread_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none whose end it could wait for: it is tried again until it gets one."""
    later: list[Callable[[], object]] = []
    cache = ThreadCache("first", lambda seconds, callback: later.append(callback))
    start, refuse = threading.Thread.start, [True]

    def may_be_refused(thread: threading.Thread) -> None:
        if refuse[0]:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", may_be_refused)
    done = threading.Semaphore(0)
    for _ in range(3):
        cache.run(done.release)
    assert len(later) == 1
    later.pop()()
    assert len(later) == 1, "it is looked at again"
    refuse[0] = False
    later.pop()()
    for _ in range(3):
        assert done.acquire(timeout=PATIENCE)
    assert not later


def test_nothing_is_kept_alive() -> None:
    import weakref

    class Big:
        pass

    cache, big, done = ThreadCache("keeps"), Big(), threading.Event()
    died = weakref.ref(big, lambda _: done.set())
    cache.run(lambda big=big: None)
    del big
    assert done.wait(PATIENCE) and died() is None


def test_serial_queue_keeps_the_order() -> None:
    queue = SerialQueue(ThreadCache("serial"))
    seen: list[int] = []
    inside: list[int] = []

    def step(number: int) -> None:
        inside.append(number)
        assert len(inside) == 1, "two at the same time"
        seen.append(number)
        inside.pop()

    for number in range(1000):
        queue.put(lambda number=number: step(number))
    assert queue.join(PATIENCE)
    assert seen == list(range(1000))


def test_serial_queue_of_many_threads() -> None:
    queue = SerialQueue(ThreadCache("many"))
    seen: list[tuple[int, int]] = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def put(number: int) -> None:
            for index in range(300):
                queue.put(lambda index=index: seen.append((number, index)))

        threads = [threading.Thread(target=put, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    finally:
        sys.setswitchinterval(before)
    assert queue.join(PATIENCE)
    assert len(seen) == 1500


def test_join_ends_at_its_time_limit() -> None:
    queue = SerialQueue(ThreadCache("slow"))
    release = threading.Event()
    queue.put(lambda: release.wait(PATIENCE))
    assert queue.join(0.05) is False
    release.set()
    assert queue.join(PATIENCE) is True


def test_a_function_may_put_another_one() -> None:
    queue = SerialQueue(ThreadCache("nested"))
    seen: list[str] = []
    queue.put(lambda: (queue.put(lambda: seen.append("inner")), seen.append("outer")))
    assert queue.join(PATIENCE) and queue.join(PATIENCE)
    assert seen == ["outer", "inner"]


def test_ctrl_c_as_a_serial_queue_calls_a_thread_does_not_end_it() -> None:
    """Struck between any two steps of `put`: what is put later still runs."""
    number = 0
    while True:
        queue = SerialQueue(ThreadCache("struck"))
        steps = itertools.count()

        def trace(frame: Any, event: str, argument: Any, struck: int = number, steps: Any = steps) -> Any:
            if frame.f_code.co_filename != module.__file__:
                return None
            if next(steps) == struck:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            queue.put(lambda: None)
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            sys.settrace(None)
        assert queue.join(20), f"struck at step {number}"
        number += 1
    assert number > 5
