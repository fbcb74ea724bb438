"""Lazy maps: bounded look-ahead, order, errors of the input, time limits, and an end when nobody wants more."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import PATIENCE, FakeWorker, Office, Struck, StruckQueue, fresh

from distpool import config
from distpool.lazymap import LazyMap


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


class Robot:
    """A fake worker that answers by itself."""

    def __init__(self, office: Office, pid: int = 2) -> None:
        self.office, self.worker, self.stop = office, office.worker(pid), False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        worker: FakeWorker = self.worker
        while True:
            with worker.arrived:
                worker.arrived.wait_for(lambda: worker.inbox or self.stop, PATIENCE)
                if self.stop:
                    return
            self.office.finish(worker)

    def end(self) -> None:
        self.stop = True
        with self.worker.arrived:
            self.worker.arrived.notify_all()
        self.thread.join(PATIENCE)


@pytest.fixture
def robot(office: Office) -> Iterator[Robot]:
    made = Robot(office)
    yield made
    made.end()


def lazy(office: Office, source: Any, ahead: int = 4, **options: Any) -> LazyMap:
    function = office.node.encoder.encode(fresh())
    return LazyMap(office.scheduler, function, iter(source), single=True, look_ahead=lambda: ahead, **options)


def test_in_order(office: Office, robot: Robot) -> None:
    assert list(lazy(office, range(300))) == list(range(300))
    assert list(lazy(office, [[n] for n in range(50)])) == [[n] for n in range(50)]
    assert list(lazy(office, [])) == []


def test_unordered(office: Office, robot: Robot) -> None:
    assert sorted(lazy(office, range(100), ordered=False)) == list(range(100))


def test_takes_no_more_than_it_may(office: Office, robot: Robot) -> None:
    taken = itertools.count()
    results = lazy(office, taken, ahead=5)
    assert [next(results) for _ in range(20)] == list(range(20))
    assert next(taken) <= 20 + 5
    results.close()


def test_nothing_is_taken_before_it_is_asked_for(office: Office) -> None:
    taken = itertools.count()
    lazy(office, taken)
    assert next(taken) == 0
    filled = itertools.count()
    results = lazy(office, filled, ahead=3, refilled=True)
    assert next(filled) == 3
    results.close()


def test_a_refilled_one_takes_another_element_before_it_waits_for_a_result(office: Office, robot: Robot) -> None:
    """As the standard library's `buffersize`: what is not delivered is `ahead` when the consumer has its result."""
    for ahead in (1, 3):
        taken: list[int] = []
        results = lazy(office, (taken.append(n) or n for n in range(9)), ahead=ahead, refilled=True)  # type: ignore[func-returns-value]
        for number in range(9):
            assert next(results) == number
            assert len(taken) == min(number + 1 + ahead, 9)
        with pytest.raises(StopIteration):
            next(results)


def test_errors_of_the_input_come_after_the_results(office: Office, robot: Robot) -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise OSError("input")

    results = lazy(office, source(), ahead=100)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(OSError, match="input"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_time_limit(office: Office) -> None:
    begin = time.monotonic()
    results = lazy(office, range(5), deadline=begin + 0.05)
    with pytest.raises(TimeoutError):
        next(results)
    assert time.monotonic() - begin < 5
    results.close()


@pytest.mark.parametrize("chunk", [None, 2])
def test_its_time_limit_is_the_end_of_a_refilled_one(office: Office, chunk: int | None) -> None:
    """As of the standard library's generator; who gives a limit to each `next` goes on after it."""
    results = lazy(office, range(5), refilled=True, chunk=chunk, deadline=time.monotonic() + 0.05)
    for late in (TimeoutError, StopIteration, StopIteration):
        with pytest.raises(late):
            next(results)
    patient = lazy(office, range(5), ahead=1)
    with pytest.raises(TimeoutError):
        patient.next(time.monotonic())
    robot = Robot(office)
    assert next(patient) is not StopIteration
    robot.end()
    patient.close()


def test_an_error_ends_it_unless_it_may_go_on(office: Office) -> None:
    worker = office.worker(2)
    for stop in (True, False):
        results = lazy(office, range(3), ahead=1, stop_at_error=stop, refilled=True)
        office.finish(worker, KeyError("first"))
        with pytest.raises(KeyError):
            next(results)
        if stop:
            with pytest.raises(StopIteration):
                next(results)
            while worker.inbox:  # taken before the error was known
                office.finish(worker)
        else:
            box: list[Any] = []
            thread = threading.Thread(target=lambda results=results, box=box: box.append(next(results)), daemon=True)
            thread.start()
            worker.wait(lambda: worker.inbox, "the next one")
            office.finish(worker)
            thread.join(PATIENCE)
            assert box == [1]
            results.close()


def test_chunks(office: Office) -> None:
    worker = office.worker(2)
    results = lazy(office, range(7), ahead=2, chunk=3, refilled=True)
    first = worker.start()[0]
    assert not worker.inbox  # nothing is sent ahead of a function that is not known yet
    office.results(worker, (first, [0, 1, 2]))
    assert next(results) == [0, 1, 2]
    assert len(worker.inbox) == 1
    results.close()


def test_a_slow_input_does_not_keep_results_waiting(office: Office, robot: Robot) -> None:
    pause = threading.Event()

    def source() -> Iterator[int]:
        for number in range(20):
            pause.wait(0.02)
            yield number

    begin = time.monotonic()
    results = lazy(office, source(), ahead=20)
    assert next(results) == 0
    assert time.monotonic() - begin < 0.3
    assert list(results) == list(range(1, 20))


def test_dropping_it_ends_it(office: Office) -> None:
    worker = office.worker(2)
    results = lazy(office, itertools.count(), refilled=True)
    run = results.run
    del results
    gc.collect()
    assert run.closed
    while worker.inbox:
        office.finish(worker)
    assert not run.results and not worker.inbox


def test_its_end_enters_no_finalizer(office: Office, robot: Robot) -> None:
    """Ctrl-C that strikes there would be lost."""
    results = lazy(office, range(3))
    assert list(results) == [0, 1, 2]
    assert not hasattr(results, "__del__") and not hasattr(results._dropped, "__del__")


def test_in_halves(office: Office) -> None:
    """Elements are taken when half of the look-ahead is free, so that they can travel together."""
    worker = office.worker(2)
    taken: list[int] = []
    source = (taken.append(number) or number for number in range(20))  # type: ignore[func-returns-value]
    results = lazy(office, source, ahead=8, in_halves=True, ordered=False)
    found = []
    thread = threading.Thread(target=lambda: found.extend(results), daemon=True)
    thread.start()
    for number in range(20):
        worker.wait(lambda: worker.inbox, "an element")
        assert len(taken) >= min(20, number // 4 * 4 + 4)
        office.finish(worker)
    thread.join(PATIENCE)
    assert sorted(found) == list(range(20)) and len(taken) == 20


@pytest.mark.parametrize("ordered", [True, False])
def test_an_interrupt_behind_what_takes_a_result_out_costs_that_result(
    office: Office, robot: Robot, ordered: bool
) -> None:
    """Whoever went on with the iterator waited for ever for what was gone."""
    results = lazy(office, range(10), ordered=ordered)
    if ordered:
        results.run.results = Struck()
    else:
        results.run.ready = StruckQueue()
    with pytest.raises(KeyboardInterrupt):
        next(results)
    found = [results.next(time.monotonic() + PATIENCE) for _ in range(9)]
    assert len(set(found)) == 9
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize("ordered", [True, False])
def test_nothing_is_taken_after_the_shutdown(office: Office, robot: Robot, ordered: bool) -> None:
    """Else whoever goes on with an endless input keeps the executor from ending. What was taken is delivered first."""
    results = lazy(office, itertools.count(), ordered=ordered)
    found = {results.next(time.monotonic() + PATIENCE)}
    office.scheduler.closing = True
    with pytest.raises(RuntimeError, match="^cannot schedule new futures after shutdown$"):
        while True:
            found.add(results.next(time.monotonic() + PATIENCE))
    assert found == set(range(len(found))) and 4 <= len(found) <= 6
    with pytest.raises(StopIteration):
        next(results)


def test_what_was_taken_before_an_interrupt_is_not_lost(office: Office, robot: Robot) -> None:
    """Whether it was Ctrl-C or came out of the input cannot be told; who goes on afterwards misses nothing."""

    def numbers() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyboardInterrupt

    for options in ({}, {"ordered": False}, {"in_halves": True}):
        results = lazy(office, numbers(), **options)
        with pytest.raises(KeyboardInterrupt):
            next(results)
        assert sorted(results) == [1, 2]


@pytest.mark.parametrize("seconds", [float("inf"), 1e10, 10**400])
def test_endless_patience(office: Office, robot: Robot, seconds: float) -> None:
    assert list(lazy(office, range(9), deadline=config.deadline_after(seconds))) == list(range(9))
