"""Iterators over the results of the executor's maps: order, time limits, nothing kept, and an end for what is left."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from pickle import dumps, loads
from typing import Any

import pytest
from fakes import PATIENCE, FakeWorker, Office, fresh

from distpool import mapresults
from distpool.dropped import WhenDropped
from distpool.mapresults import (
    OfChunks,
    _Input,
    check_map,
    fed_results,
    flattened,
    future_results,
    map_by_futures,
    unordered_futures,
)
from distpool.refs.refs import LOCAL_VALUE, Future, Outcome
from distpool.wire.functions import function_name

SOON = 0.01


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


class Thing:
    """What can be seen to be gone."""


class Submit:
    """A `submit` whose futures the test ends: all at once, or by their arguments."""

    def __init__(self, at_once: bool = True) -> None:
        self.calls: list[tuple[tuple[Any, ...], Future[Any]]] = []
        self.at_once = at_once

    def __call__(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls.append((args, future))
        if self.at_once:
            self.end(len(self.calls) - 1, fn)
        return future

    def end(self, number: int, fn: Callable[..., Any] = lambda *args: args) -> None:
        args, future = self.calls[number]
        try:
            future.set_result(fn(*args))
        except Exception as error:
            future.set_exception(error)


# -- what was fed ----------------------------------------------------------------------------------------------------


def run_all(office: Office, worker: FakeWorker) -> None:
    while worker.inbox:
        office.finish(worker)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("items", [list(range(40)), [[n] for n in range(40)]])
def test_elements(office: Office, many: bool, items: list[Any]) -> None:
    worker = office.worker(2)
    run = office.run([], fresh())
    run.takes_many = many
    run.feed(items)
    run_all(office, worker)
    assert list(fed_results(run, None, False)) == items
    assert run.closed


def test_values_that_came_together(office: Office) -> None:
    run = office.run([1, 2, 3, 4], fresh())
    run.takes_many = True
    run.settle_many(0, 3, [10, 20, 30])
    run.settle_many(3, 1, dumps([40], 5))
    assert list(fed_results(run, None, False)) == [10, 20, 30, 40]


def test_chunks_are_one_sequence(office: Office) -> None:
    worker = office.worker(2)
    run = office.run([], fresh(), chunked=True)
    run.feed_cut(list(range(25)), 4)
    run_all(office, worker)
    assert list(fed_results(run, None, True)) == list(range(25))


@pytest.mark.parametrize("chunked", [False, True])
def test_an_error_is_raised_at_its_turn_and_ends_it(office: Office, chunked: bool) -> None:
    worker = office.worker(2)
    run = office.run([], fresh(), chunked=chunked)
    for item in (1, 2, 3):
        run.feed_chunk([item]) if chunked else run.feed([item])
    office.finish(worker)
    worker.wait(lambda: worker.inbox, "the second one")
    office.results(worker, (worker.start()[0], KeyError("x")))
    results = fed_results(run, None, chunked)
    assert next(results) == 1
    with pytest.raises(KeyError):
        next(results)
    assert run.closed and list(results) == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_result_that_is_not_there_in_time(office: Office, chunked: bool) -> None:
    run = office.run([], fresh(), chunked=chunked)
    run.feed_chunk([1]) if chunked else run.feed([1])
    with pytest.raises(TimeoutError):
        next(fed_results(run, time.monotonic() + SOON, chunked))
    assert run.closed


def test_what_is_there_comes_after_the_deadline_too(office: Office) -> None:
    run = office.run([1], fresh())
    run.settle_many(0, 1, [5])
    assert list(fed_results(run, time.monotonic() - 1, False)) == [5]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_a_reader_that_is_dropped(office: Office, chunked: bool, started: bool) -> None:
    """Before its first value all of it still runs (that is how some call for effects), but no value is kept."""
    run = office.run([], fresh(), chunked=chunked)
    for item in (1, 2):
        run.feed_chunk([item]) if chunked else run.feed([item])
    results = fed_results(run, None, chunked)
    if started:
        worker = office.worker(2)
        office.finish(worker)
        assert next(results) == 1
    del results
    gc.collect()
    assert run.unwanted and run.closed is started
    if not started:
        run_all(office, office.worker(2))
        assert run.settled == 2 and set(run.results.values()) == {None}


@pytest.mark.parametrize("chunked", [False, True])
def test_the_end_of_results_enters_no_finalizer(office: Office, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C that strikes there would be lost."""
    made: list[Any] = []
    monkeypatch.setattr(mapresults, "WhenDropped", lambda action: made.append(WhenDropped(action)) or made[0])
    run = office.run([], fresh(), chunked=chunked)
    run.feed_cut([1, 2], 1) if chunked else run.feed([1, 2])
    results = fed_results(run, None, chunked)
    run_all(office, office.worker(2))
    assert list(results) == [1, 2] and not hasattr(type(made[0]), "__del__")


@pytest.mark.parametrize("chunked", [False, True])
def test_what_was_yielded_is_not_kept(office: Office, chunked: bool) -> None:
    run = office.run([], fresh(), chunked=chunked)
    things = [Thing(), Thing()]
    kept = [weakref.ref(thing) for thing in things]
    run.fed = 2
    for index in range(2):
        thing = things.pop(0)
        run.settle(index, Outcome(LOCAL_VALUE, [thing] if chunked else thing, (), 1))
        del thing
    results = fed_results(run, None, chunked)
    assert isinstance(next(results), Thing)
    assert kept[0]() is None and kept[1]() is not None


# -- futures ---------------------------------------------------------------------------------------------------------


def nothing() -> _Input:
    """An input that has been taken."""
    return _Input(iter(()))


def test_futures_in_order_and_more_as_they_are_delivered() -> None:
    more = iter([done(3), done(4)])
    results = future_results([done(1), done(2)], more, nothing(), None)
    assert next(results) == 1
    assert list(itertools.islice(results, 2)) == [2, 3]
    assert list(more) == [] and list(results) == [4]


def test_futures_that_are_left_are_cancelled() -> None:
    waiting: list[Future[Any]] = [Future(), Future()]
    results = future_results([done(1), done(OSError("x")), *waiting], iter(()), nothing(), None)
    assert next(results) == 1
    with pytest.raises(OSError, match="x"):
        next(results)
    assert all(future.cancelled() for future in waiting)


def test_an_input_that_fails_later_comes_before_the_rest() -> None:
    def more() -> Iterator[Future[Any]]:
        raise ZeroDivisionError
        yield

    waiting: Future[Any] = Future()
    results = future_results([done(1), waiting], more(), nothing(), None)
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert waiting.cancelled()


@pytest.mark.parametrize("deadline", [0.0, SOON])
def test_futures_in_time(deadline: float) -> None:
    waiting: Future[Any] = Future()
    results = future_results([done(1), waiting], iter(()), nothing(), time.monotonic() + deadline)
    assert next(results) == 1  # it was there
    with pytest.raises(TimeoutError):
        next(results)
    assert waiting.cancelled()


def test_futures_are_not_kept() -> None:
    first = done(Thing())
    kept = weakref.ref(first)
    results = future_results([first, done(2)], iter(()), nothing(), None)
    del first
    assert isinstance(next(results), Thing)
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("buffersize", [None, 1, 3, 100])
@pytest.mark.parametrize("chunksize", [1, 2, 5, 50])
def test_maps_by_futures(chunksize: int, buffersize: int | None) -> None:
    submit = Submit()
    results = map_by_futures(submit, pow, (range(10), itertools.repeat(2)), None, chunksize, buffersize)
    at_once = -(-10 // chunksize) if buffersize is None else min(buffersize, -(-10 // chunksize))
    assert len(submit.calls) == at_once
    assert list(results) == [number**2 for number in range(10)]
    assert len(submit.calls) == -(-10 // chunksize)


def test_what_runs_chunks() -> None:
    run = OfChunks(divmod)
    assert run(((7, 2), (9, 3))) == [(3, 1), (3, 0)]
    assert run(()) == []
    assert loads(dumps(run))([(7, 2)]) == [(3, 1)]


@pytest.mark.parametrize(
    "fn", [divmod, itertools.accumulate, functools.partial(dumps, protocol=4), test_what_runs_chunks]
)
def test_chunks_run_under_the_name_of_the_function(fn: Callable[..., Any]) -> None:
    run = OfChunks(fn)
    for each in (run, loads(dumps(run))):
        assert function_name(each) == function_name(fn)


# -- as they come ----------------------------------------------------------------------------------------------------


def at_the_wait(action: Callable[[], object]) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Does it once, when somebody begins to wait for the first result."""
    actions = [action]

    @contextlib.contextmanager
    def waiting() -> Iterator[None]:
        if actions:
            actions.pop()()
        yield

    return waiting


def test_unordered_takes_no_more_than_it_may() -> None:
    taken: list[int] = []
    submit = Submit(at_once=False)
    arguments = ((taken.append(n) or n,) for n in itertools.count())
    results = unordered_futures(submit, abs, arguments, 3, None, at_the_wait(lambda: submit.end(1)))
    assert not taken  # lazy
    assert next(results) == (1,)
    assert len(taken) == 3
    for number in (0, 2):
        submit.end(number)
    assert {next(results), next(results)} == {(0,), (2,)}
    assert len(taken) <= 5
    results.close()
    assert all(future.done() for _, future in submit.calls)


def test_unordered_ends() -> None:
    assert sorted(unordered_futures(Submit(), abs, ((n,) for n in range(-9, 0)), 4, None)) == list(range(1, 10))
    assert list(unordered_futures(Submit(), abs, iter(()), 4, None)) == []


def test_unordered_errors_cancel_the_rest() -> None:
    submit = Submit(at_once=False)
    fail = at_the_wait(lambda: submit.calls[1][1].set_exception(OSError("x")))
    results = unordered_futures(submit, abs, iter([(1,), (2,)]), 2, None, fail)
    with pytest.raises(OSError, match="x"):
        next(results)
    assert submit.calls[0][1].cancelled()


def failing() -> Iterator[tuple[int]]:
    yield (-1,)
    raise ZeroDivisionError


def test_an_error_of_the_input_comes_after_the_results_of_what_was_taken() -> None:
    for results in (
        unordered_futures(Submit(), abs, failing(), 4, None),
        map_by_futures(Submit(), abs, (first(failing()),), None, 1, 3),
    ):
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)
    with pytest.raises(ZeroDivisionError):  # all of it is taken at the call
        map_by_futures(Submit(), abs, (first(failing()),), None, 1, None)


def first(source: Iterator[tuple[int]]) -> Iterator[int]:
    return (number for (number,) in source)


def test_a_submit_that_fails_cancels_what_was_started() -> None:
    submit = Submit(at_once=False)

    def refuse(fn: Callable[..., Any], *args: Any) -> Future[Any]:
        if args == (2,):
            raise RuntimeError("shut down")
        return submit(fn, *args)

    with pytest.raises(RuntimeError, match="shut down"):
        next(unordered_futures(refuse, abs, iter([(1,), (2,)]), 4, None))
    assert submit.calls[0][1].cancelled()


def test_flattened_can_be_closed() -> None:
    closed: list[bool] = []

    def chunks() -> Iterator[list[int]]:
        try:
            yield [1, 2, 3]
            yield [4]
        finally:
            closed.append(True)

    assert list(flattened(chunks())) == [1, 2, 3, 4]
    results: Any = flattened(chunks())
    assert next(results) == 1
    results.close()
    assert closed == [True, True] and list(results) == []


def test_unordered_in_time() -> None:
    submit = Submit(at_once=False)
    with pytest.raises(TimeoutError):
        next(unordered_futures(submit, abs, iter([(1,)]), 4, time.monotonic() + SOON))
    assert submit.calls[0][1].cancelled()


def test_unordered_waits_in_the_context_that_is_given() -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def waiting() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    results = unordered_futures(Submit(), abs, iter([(-1,)]), 4, None, waiting)
    assert next(results) == 1 and entered == ["in", "out"]


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunksize", "buffersize", "error", "text"),
    [
        (0, None, ValueError, "chunksize must be >= 1."),
        (-3, None, ValueError, "chunksize must be >= 1."),
        (1, 0, ValueError, "buffersize must be None or > 0"),
        (1, -1, ValueError, "buffersize must be None or > 0"),
        (1, 1.5, TypeError, "buffersize must be an integer or None"),
        (1, "3", TypeError, "buffersize must be an integer or None"),
    ],
)
def test_arguments_that_are_refused(chunksize: int, buffersize: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        check_map(None, chunksize, buffersize)
    assert str(caught.value) == text


def test_the_deadline_counts_from_the_call() -> None:
    assert check_map(None, 1, None) is None
    before = time.monotonic()
    deadline = check_map(PATIENCE, 1, 1)
    assert deadline is not None and before + PATIENCE <= deadline <= time.monotonic() + PATIENCE
