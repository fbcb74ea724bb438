"""What RESULTS say becomes outcomes: the short way of a lonely call gives what the long way gives."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from concurrent.futures._base import _create_and_install_waiters  # type: ignore[attr-defined]
from pickle import dumps
from typing import Any

import pytest
from fakes import PATIENCE, FakeWorker, Office

from distpool import settling
from distpool.wire import messages
from distpool.wire.frames import Kind
from distpool.work import Policy


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    made.plain = True
    yield made
    made.close()


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each frame of results: whether it went the short way."""
    seen: list[bool] = []
    original = settling.settle_alone

    def settle_alone(slot: Any, frame: Any) -> Any:
        timing = original(slot, frame)
        seen.append(timing is not None)
        return timing

    monkeypatch.setattr("distpool.scheduling.settle_alone", settle_alone)
    return seen


def answer(office: Office, worker: FakeWorker, values: list[Any], status: int = messages.VALUES) -> None:
    """The worker has finished as many calls, and says so as workers do: scalars in one list."""
    first, _ = worker.start()
    for _ in values[1:]:
        worker.start()
    payload = dumps(values if status == messages.VALUES else values[0], 5)
    body = messages.RESULT.pack(first, len(values), len(payload), 0, status) + payload
    if worker.journal is not None:
        worker.journal.data += body
    office.frame(worker, Kind.RESULTS, messages.RESULTS.pack(0, 0.001, len(values)), body)


def test_a_lonely_call(office: Office, ways: list[bool]) -> None:
    worker = office.worker(2)
    for number in range(3):
        future = office.submit(number)
        answer(office, worker, [number * 10])
        assert future.result(PATIENCE) == number * 10
    slot = office.slots[2]
    assert ways == [True] * 3
    assert (slot.load, slot.done, slot.failed, slot.inflight) == (0, 3, 0, {})


def test_somebody_listens(office: Office, ways: list[bool]) -> None:
    worker = office.worker(2)
    called, done = threading.Event(), []
    future = office.submit(1)
    future.add_done_callback(lambda ended: (done.append(ended.result()), called.set()))
    answer(office, worker, [5])
    assert called.wait(PATIENCE) and done == [5]
    future = office.submit(1)
    with future._condition:  # as `wait` does it
        waiter = _create_and_install_waiters([future], concurrent.futures.FIRST_COMPLETED)
    answer(office, worker, [6])
    assert waiter.event.wait(PATIENCE) and waiter.finished_futures == [future] and future.result() == 6
    assert ways == [False, False]


@pytest.mark.parametrize("what", ["two calls", "a value", "a policy", "no such call"])
def test_anything_else_goes_the_long_way(office: Office, ways: list[bool], what: str) -> None:
    worker = office.worker(2)
    policy = Policy(timeout=60.0) if what == "a policy" else None
    futures = [office.submit(number, policy=policy) for number in range(2 if what == "two calls" else 1)]
    if what == "no such call":
        payload = dumps([1], 5)
        body = messages.RESULT.pack(99, 1, len(payload), 0, messages.VALUES) + payload
        office.frame(worker, Kind.RESULTS, messages.RESULTS.pack(0, 0.0, 0), body)
    values = [7, 8] if what == "two calls" else [7]
    answer(office, worker, values, messages.VALUE if what == "a value" else messages.VALUES)
    assert [future.result(PATIENCE) for future in futures] == values
    assert not any(ways[:1])
    assert office.slots[2].load == 0


def test_a_call_that_was_settled_before(office: Office, ways: list[bool]) -> None:
    worker = office.worker(2)
    future = office.submit(1)
    future.set_result("mine")
    answer(office, worker, [5])
    assert future.result() == "mine" and office.slots[2].load == 0


def test_a_call_that_is_sent_while_another_is_settled(
    office: Office, ways: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = office.worker(2)
    first, later = office.submit(1), []
    original = settling.set_values

    def set_values(futures: Any, values: Any) -> Any:
        if not later:  # as another thread would, in this very moment
            later.append(office.submit(2))
        return original(futures, values)

    monkeypatch.setattr(settling, "set_values", set_values)
    answer(office, worker, [5])
    assert first.result(PATIENCE) == 5 and ways == [True]
    slot = office.slots[2]
    assert slot.load == len(slot.inflight) == 1
    answer(office, worker, [6])
    assert later[0].result(PATIENCE) == 6 and slot.load == 0


def test_too_short_to_be_results(office: Office, ways: list[bool]) -> None:
    worker = office.worker(2)
    future = office.submit(1)
    with pytest.raises(Exception, match="shorter than its records say"):
        office.frame(worker, Kind.RESULTS, messages.RESULTS.pack(0, 0.0, 0), b"abc")
    answer(office, worker, [5])
    assert future.result(PATIENCE) == 5


def test_values_of_calls_that_are_not_ours_come_first(office: Office, ways: list[bool]) -> None:
    """Whoever had the worker before has given it back; then it was lent to us."""
    worker, slot = office.worker(2), office.slots[2]
    office.submit(1)
    slot.unfinished()
    future = office.submit(2)
    assert len(worker.inbox) == 2
    answer(office, worker, [10, 20])
    assert future.result(PATIENCE) == 20 and slot.load == 0 and slot.done == 1


def test_a_given_up_call_has_ended_and_so_has_its_time_limit(office: Office, ways: list[bool]) -> None:
    worker = office.worker(2)
    slot = office.slots[2]
    for value, status in ((5, messages.VALUES), ([5], messages.VALUE)):
        office.submit(1, policy=Policy(timeout=1000.0))
        assert slot._clocks
        slot.unfinished()
        answer(office, worker, [value], status)
        assert not slot._clocks and slot.load == 0
