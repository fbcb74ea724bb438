"""Parts of a pool's maps: calls under a policy in the face of a map, argument lists, chunks, workers to come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
from fakes import KNOWN, Office, fresh

from distpool.lazymap import open_entry
from distpool.pool_runs import PolicyRun, chained, star_arguments
from distpool.refs.refs import RAISED_HERE, Outcome
from distpool.work import Policy


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


def run_of(office: Office, policy: Policy, single: bool = True, ordered: bool = True) -> PolicyRun:
    encoded = office.node.encoder.encode(fresh())
    encoded.mean = KNOWN
    return PolicyRun(office.scheduler, encoded, policy, single=single, ordered=ordered)


def test_elements_are_calls_under_the_policy(office: Office) -> None:
    worker = office.worker(2)
    run = run_of(office, Policy(retries=1))
    run.feed(["a", ["b"]])
    for _ in range(2):
        worker.wait(lambda: worker.inbox, "a call")
        sequence, item = worker.start()
        office.results(worker, (sequence, OSError("x") if item == "a" else item))
    worker.wait(lambda: worker.inbox, "a again")
    office.finish(worker)
    assert run.wait_until(lambda: run.settled == 2, None)
    assert [open_entry(run.results[index]) for index in (0, 1)] == ["a", ["b"]] and run.fed == 2


def test_chunks_too(office: Office) -> None:
    worker = office.worker(2)
    run = run_of(office, Policy(timeout=100))
    run.feed_chunk([1, 2])
    run.feed_chunks([[3], [[4]]])
    run.feed_cut([5, 6, 7], 2)
    for _ in range(5):
        worker.wait(lambda: worker.inbox, "a chunk")
        office.finish(worker)
    assert [open_entry(run.results[index]) for index in range(5)] == [[1, 2], [3], [[4]], [5, 6], [7]]


def test_unordered_and_several_iterables(office: Office) -> None:
    worker = office.worker(2)
    run = run_of(office, Policy(label="x"), single=False, ordered=False)
    run.feed([(1, 2), (3, 4)])
    for _ in range(2):
        worker.wait(lambda: worker.inbox, "a call")
        office.finish(worker)
    assert run.ready is not None and sorted(run.ready) == [0, 1]
    assert open_entry(run.results[1]) == 3


def test_what_cannot_be_serialised_is_its_own_outcome(office: Office) -> None:
    run = run_of(office, Policy(retries=1))
    run.feed([threading.Lock()])
    run.feed_chunk([threading.Lock()])
    for index in (0, 1):
        with pytest.raises(Exception, match="lock"):
            open_entry(run.results[index])
    assert run.fed == run.settled == 2


def test_nothing_is_sent_for_a_map_that_is_closed(office: Office) -> None:
    run = run_of(office, Policy(retries=1))
    run.close()
    run.feed([[1]])
    worker = office.worker(2)
    assert not worker.inbox and run.fed == 1 and not run.results


def test_an_element_is_settled_once(office: Office) -> None:
    run = run_of(office, Policy(retries=1))
    run.feed([1])
    place: Any = office.scheduler._queue[0].future
    assert place._settle(Outcome(RAISED_HERE, KeyError("x"), (), 1)) is False
    assert place._settle(Outcome(RAISED_HERE, KeyError("y"), (), 1)) is False
    assert run.settled == 1 and place.done()


def test_an_element_whose_call_is_cancelled_has_ended(office: Office) -> None:
    run = run_of(office, Policy(retries=1))
    run.feed([1])
    office.scheduler.cancel_waiting()
    assert run.wait_until(lambda: run.settled == 1, 0.0)
    with pytest.raises(CancelledError):
        open_entry(run.results[0])


# -- argument lists --------------------------------------------------------------------------------------------------


def test_tuples_and_lists_are_arguments() -> None:
    items: list[Any] = [(1, 2), (3, 4)]
    assert star_arguments(pow, items) == (pow, items, False)
    assert star_arguments(pow, [[1, 2], (3, 4)]) == (pow, items, False)
    assert star_arguments(pow, []) == (pow, [], False)


@pytest.mark.parametrize("items", [[range(2)], ["ab"], [(1, 2), 5], [type("Pair", (tuple,), {})((1, 2))]])
def test_others_are_iterated_on_the_worker(items: list[Any]) -> None:
    function, same, single = star_arguments(lambda *arguments: arguments, items)
    assert same is items and single
    assert function(items[0]) == tuple(items[0])
    with pytest.raises(TypeError):
        function(5)


# -- chunks one by one -----------------------------------------------------------------------------------------------


class Bar:
    count = closed = 0

    def update(self, count: int = 1) -> None:
        self.count += count

    def close(self) -> None:
        self.closed += 1


def test_chained() -> None:
    assert list(chained(iter([[1, 2], [], [3]]), None)) == [1, 2, 3]
    bar: Any = Bar()
    results = chained(iter([[1, 2], [3]]), bar)
    assert next(results) == 1 and bar.count == 1
    assert list(results) == [2, 3] and (bar.count, bar.closed) == (3, 1)


def test_a_chain_that_breaks_closes_the_bar() -> None:
    def chunks() -> Iterator[list[int]]:
        yield [1]
        raise KeyError("x")

    bar: Any = Bar()
    results = chained(chunks(), bar)
    assert next(results) == 1
    with pytest.raises(KeyError):
        next(results)
    assert bar.closed == 1
    results = chained(iter([[1, 2]]), bar)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert bar.closed == 2
