"""The three carriers of a map: one face, each element ends once, and what they do when nobody wants more."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import KNOWN, PATIENCE, Office, fresh
from wires import until

from distpool import elements
from distpool.elements import FutureCarrier, SpanCarrier, ThreadCarrier, thread_count
from distpool.mapruns import LOOK_AHEAD


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


@pytest.fixture
def threads() -> Iterator[Callable[..., ThreadCarrier]]:
    made: list[ThreadCarrier] = []

    def one(function: Callable[..., Any], single: bool = True) -> ThreadCarrier:
        made.append(ThreadCarrier(function, single))
        return made[-1]

    yield one
    for carrier in made:
        carrier.close()


def ended(carrier: Any, count: int) -> dict[int, Any]:
    """Wait for so many ends: index -> value or error."""
    carrier.wait_until(lambda: len(carrier.results) + len(carrier.failed) >= count, time.monotonic() + PATIENCE)
    found = {index: carrier.open(raw)[0] for index, raw in carrier.results.items()}
    found.update((index, carrier.open(raw)[1]) for index, raw in carrier.failed)
    assert len(found) == count
    return found


# -- futures ---------------------------------------------------------------------------------------------------------


class Pool:
    """What a pool of another kind offers; the test ends the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], concurrent.futures.Future[Any]]] = []

    def submit(self, *arguments: Any) -> concurrent.futures.Future[Any]:
        self.calls.append((arguments, concurrent.futures.Future()))
        return self.calls[-1][1]


def test_futures_end_by_index() -> None:
    pool = Pool()
    carrier = FutureCarrier(pool.submit, True, lambda: 3, 5)
    carrier.feed(["a", "b"])
    carrier.feed(["c"])
    assert carrier.fed == 3 and [arguments for arguments, _ in pool.calls] == [("a",), ("b",), ("c",)]
    error = OSError("x")
    pool.calls[2][1].set_result("C")
    pool.calls[0][1].set_exception(error)
    pool.calls[1][1].cancel()
    assert list(carrier.results) == [2] and [index for index, _ in carrier.failed] == [0, 1]
    found = ended(carrier, 3)
    assert found[2] == "C" and found[0] is error and type(found[1]) is concurrent.futures.CancelledError
    assert not carrier._pending


def test_several_iterables_are_several_arguments() -> None:
    pool = Pool()
    FutureCarrier(pool.submit, False, lambda: 1, 1).feed([(1, 2), (3, 4)])
    assert [arguments for arguments, _ in pool.calls] == [(1, 2), (3, 4)]


def test_again_is_the_same_index() -> None:
    pool = Pool()
    carrier = FutureCarrier(pool.submit, True, lambda: 1, 1)
    carrier.feed(["a", "b"])
    carrier.again(0, "a")
    assert carrier.fed == 2 and pool.calls[2][0] == ("a",)
    pool.calls[2][1].set_result("later")
    assert carrier.open(carrier.results.pop(0)) == ("later", None)


def test_a_submit_that_raises_is_that_elements_error() -> None:
    def submit(argument: int) -> concurrent.futures.Future[int]:
        future: concurrent.futures.Future[int] = concurrent.futures.Future()
        future.set_result(10 // argument)
        return future

    carrier = FutureCarrier(submit, True, lambda: 1, 1)
    carrier.feed([5, 0, 2])
    found = ended(carrier, 3)
    assert (found[0], type(found[1]), found[2]) == (2, ZeroDivisionError, 5)


def test_an_interrupt_in_submit_leaves() -> None:
    def submit(argument: int) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FutureCarrier(submit, True, lambda: 1, 1).feed([1])


def test_waiting_ends_with_an_end_or_the_deadline() -> None:
    pool = Pool()
    carrier = FutureCarrier(pool.submit, True, lambda: 1, 1)
    carrier.feed([1])
    looked = threading.Event()

    def holds() -> bool:
        looked.set()
        return 0 in carrier.results

    carrier.wait_until(holds, time.monotonic() + 0.01)
    assert not carrier.results
    looked.clear()
    waiter = threading.Thread(target=lambda: carrier.wait_until(holds, None))
    waiter.start()
    assert looked.wait(PATIENCE)
    pool.calls[0][1].set_result(1)
    waiter.join(PATIENCE)
    assert not waiter.is_alive()


def test_closing_cancels_what_has_not_ended() -> None:
    pool = Pool()
    carrier = FutureCarrier(pool.submit, True, lambda: 1, 1)
    carrier.feed([1, 2, 3])
    pool.calls[1][1].set_result("done")
    pool.calls[2][1].set_running_or_notify_cancel()
    carrier.close()
    assert [future.cancelled() for _, future in pool.calls] == [True, False, False]


def test_abandoning_takes_no_locks() -> None:
    pool = Pool()
    carrier = FutureCarrier(pool.submit, True, lambda: 1, 1)
    carrier.feed([1])
    carrier.abandon()
    assert not pool.calls[0][1].cancelled()


def test_how_far_ahead_follows_the_size() -> None:
    size = 2
    carrier = FutureCarrier(Pool().submit, True, lambda: size, 8)
    assert carrier.ahead(True) == carrier.ahead(False) == 16
    size = 5
    assert carrier.ahead(False) == 40


# -- threads ---------------------------------------------------------------------------------------------------------


def test_elements_run_at_the_same_time_and_no_thread_is_started_for_nothing(threads: Any) -> None:
    barrier = threading.Barrier(3)
    seen: set[threading.Thread] = set()

    def meet(number: int) -> int:
        seen.add(threading.current_thread())
        barrier.wait(PATIENCE)
        return -number

    carrier = threads(meet)
    carrier.feed([1, 2, 3])
    assert ended(carrier, 3) == {0: -1, 1: -2, 2: -3}
    assert len(seen) == 3 and all(thread.daemon for thread in seen)
    carrier.feed([4, 5, 6])
    assert ended(carrier, 6)[5] == -6
    assert len(seen) == 3  # they were idle


def test_no_more_threads_than_the_limit(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elements, "thread_count", lambda: 2)
    seen: set[int] = set()
    release = threading.Event()

    def hold(number: int) -> int:
        seen.add(threading.get_ident())
        release.wait(PATIENCE)
        return number

    carrier = threads(hold)
    assert carrier.ahead(True) == 4
    carrier.feed(list(range(10)))
    until(lambda: len(seen) == 2, "both run")
    release.set()
    assert ended(carrier, 10) == {number: number for number in range(10)}
    assert len(seen) == 2


def test_whatever_a_call_raises_is_its_outcome_with_its_traceback(threads: Any) -> None:
    def leave(number: int) -> int:
        raise SystemExit(number)

    carrier = threads(leave)
    carrier.feed([7])
    error = ended(carrier, 1)[0]
    assert type(error) is SystemExit and error.code == 7
    assert "in leave" in str(error.__cause__)


class Falsy(Exception):
    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")


def test_an_error_that_cannot_be_formatted_is_an_outcome_too(threads: Any) -> None:
    def refuse(argument: int) -> None:
        raise Falsy

    carrier = threads(refuse)
    carrier.feed([1])
    assert type(ended(carrier, 1)[0]) is Falsy


class NoCause(Exception):
    __cause__ = property(lambda self: 1 // 0)  # type: ignore[assignment]


class Touchy(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise LookupError(name)


@pytest.mark.parametrize("kind", [NoCause, Touchy])
def test_an_error_that_refuses_to_be_looked_at_is_an_outcome_too(threads: Any, kind: type[Exception]) -> None:
    def call(i: int) -> int:
        if i:
            raise kind("x")
        return i

    carrier = threads(call)
    carrier.feed([1, 0])
    found = ended(carrier, 2)
    assert type(found[0]) is kind and found[1] == 0


def test_after_the_end_nothing_starts(threads: Any) -> None:
    running, release = threading.Event(), threading.Event()
    ran: list[int] = []
    served: list[threading.Thread] = []

    def hold(number: int) -> None:
        ran.append(number)
        served.append(threading.current_thread())
        running.set()
        release.wait(PATIENCE)

    carrier = threads(hold)
    carrier._threads._limit = 1
    carrier.feed([1, 2, 3])
    assert running.wait(PATIENCE)
    carrier.abandon()
    release.set()
    served[0].join(PATIENCE)
    assert not served[0].is_alive() and ran == [1]


def test_threads_keep_nothing_of_a_call(threads: Any) -> None:
    class Thing:
        pass

    carrier = threads(lambda thing: Thing())
    carrier.feed([thing := Thing()])
    value = ended(carrier, 1)[0]
    kept = [weakref.ref(thing), weakref.ref(value)]
    carrier.results.clear()
    del thing, value
    until(lambda: (gc.collect(), [each() for each in kept] == [None, None])[1], "garbage")


def test_if_no_further_thread_can_be_started_those_that_are_there_do_it(
    threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, release = threading.Event(), threading.Event()
    ran: list[int] = []

    def work(number: int) -> int:
        ran.append(number)
        first.set()
        release.wait(PATIENCE)
        return number

    carrier = threads(work)
    carrier.feed([0])
    assert first.wait(PATIENCE)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    carrier.feed([1, 2])
    monkeypatch.undo()
    release.set()
    assert ended(carrier, 3) == {0: 0, 1: 1, 2: 2}
    assert sorted(ran) == [0, 1, 2]  # each one once


def test_where_not_even_one_thread_can_be_started_the_element_has_failed(
    threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ran: list[int] = []
    carrier = threads(ran.append)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    carrier.feed([1])
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="start new thread"):
        raise ended(carrier, 1)[0]
    carrier.again(0, 2)  # what failed does not run after all
    carrier.wait_until(lambda: 0 in carrier.results, time.monotonic() + PATIENCE)
    assert ran == [2]


def test_number_of_threads() -> None:
    assert 5 <= thread_count() <= 32


# -- spans -----------------------------------------------------------------------------------------------------------


def spans(office: Office, batch: int = 1, single: bool = True, size: int = 2, known: bool = True) -> SpanCarrier:
    encoded = office.node.encoder.encode(fresh())
    if known:
        encoded.mean = KNOWN
    return SpanCarrier(office.scheduler, encoded, single, batch, lambda: size)


@pytest.mark.parametrize("items", [[1, 2, 3], [[1], [2], [3]]])
def test_spans_end_by_index(office: Office, items: list[Any]) -> None:
    worker = office.worker(2)
    carrier = spans(office)
    carrier.feed(items)
    assert carrier.fed == 3
    sequences = []
    for _ in items:
        worker.wait(lambda: worker.inbox, "an element")
        sequences.append(worker.start()[0])
        if len(sequences) == 2:
            office.results(worker, (sequences[0], "a"), (sequences[1], OSError("b")))
    office.results(worker, (sequences[2], "c"))
    assert set(carrier.results) == {0, 2}
    ((index, raw),) = carrier.failed
    value, error = carrier.open(raw)
    assert (index, value, type(error)) == (1, None, OSError)
    assert carrier.open(carrier.results[2]) == ("c", None)


def test_an_element_runs_again(office: Office) -> None:
    worker = office.worker(2)
    carrier = spans(office)
    carrier.feed([5])
    worker.wait(lambda: worker.inbox, "an element")
    office.results(worker, (worker.start()[0], OSError("x")))
    index, _ = carrier.failed.popleft()
    carrier.again(index, 5)
    worker.wait(lambda: worker.inbox, "it again")
    office.finish(worker)
    carrier.wait_until(lambda: 0 in carrier.results, time.monotonic() + PATIENCE)
    assert carrier.open(carrier.results[0]) == (5, None) and carrier.fed == 1


def test_what_cannot_be_serialised_is_a_failure(office: Office) -> None:
    carrier = spans(office)
    carrier.feed([threading.Lock()])
    ((index, raw),) = carrier.failed
    assert index == 0 and "lock" in str(carrier.open(raw)[1])


def test_an_entry_that_the_consumer_has_replaced_stays(office: Office) -> None:
    """`_settled` looks, and the consumer may have put a value of `on_error` there before it takes."""
    carrier = spans(office)
    carrier.feed([threading.Lock()])
    _, raw = carrier.failed.pop()
    carrier.results[0] = raw

    class Results(dict[int, Any]):
        def get(self, key: int, default: Any = None) -> Any:
            found = super().get(key, default)
            self[key] = "given"
            return found

    carrier.results = Results(carrier.results)
    carrier._settled(0)
    assert carrier.results[0] == "given" and not carrier.failed


def test_bytes_that_cannot_be_loaded_are_an_error(office: Office) -> None:
    value, error = spans(office).open(b"\x80\x05no pickle")
    assert value is None and isinstance(error, Exception)


def test_look_ahead_of_spans(office: Office) -> None:
    assert spans(office, batch=1).ahead(False) == LOOK_AHEAD * 2
    assert spans(office, batch=5).ahead(False) == LOOK_AHEAD * 2 * 5
    assert spans(office, batch=0, known=False).ahead(False) == LOOK_AHEAD * 2
    auto = spans(office, batch=0)
    auto.run.timing.mean = 1e-9
    assert auto.ahead(False) == LOOK_AHEAD * 2 * elements._MAX_BATCH
    auto.run.timing.mean = 10.0
    assert auto.ahead(False) == LOOK_AHEAD * 2


def test_look_ahead_of_what_lies_in_memory(office: Office) -> None:
    carrier = spans(office)
    assert carrier.ahead(True) == LOOK_AHEAD * 2  # the first few show how large they are
    carrier.feed([1])
    assert carrier.ahead(True) == elements._AT_HAND * 2
    large = spans(office)
    large.feed([[b"x" * (1 << 18)]])
    assert LOOK_AHEAD * 2 <= large.ahead(True) < 20
    assert large.ahead(False) == LOOK_AHEAD * 2


def test_a_broken_executor_is_not_usable(office: Office) -> None:
    carrier = spans(office)
    assert carrier.usable
    office.close()
    assert not carrier.usable


@pytest.mark.parametrize("how", ["close", "abandon"])
def test_the_end_of_spans(office: Office, how: str) -> None:
    carrier = spans(office)
    carrier.feed([1, 2, 3])
    getattr(carrier, how)()
    getattr(carrier, how)()
    worker = office.worker(2)
    assert carrier.run.closed and not worker.inbox
