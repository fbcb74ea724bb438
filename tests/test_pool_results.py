"""What `DistPool`'s methods return, callbacks, and the lazy input of `imap`."""

from __future__ import annotations

import gc
import itertools
import logging
import multiprocessing
import multiprocessing.pool
import pickle
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import Struck, StruckQueue

from distpool import DistPool

WORKERS = 2
AHEAD = 8 * WORKERS


def square(number: int) -> int:
    return number * number


def fail(text: str) -> None:
    raise ValueError(text)


def fail_at(number: int) -> int:
    if number % 5 == 3:
        raise ValueError(f"element {number}")
    return number


def raise_timeout(text: str) -> None:
    raise TimeoutError(text)


@pytest.fixture(scope="module")
def pool() -> Iterator[DistPool]:
    pool = DistPool(WORKERS)
    while len(pool.executor.workers) < WORKERS:  # what comes up later would look like a leftover of the first test
        pool.apply(time.sleep, (0.01,))
    yield pool
    pool.terminate()


# -- results ----------------------------------------------------------------------------------------------------------


def test_types(pool: DistPool) -> None:
    """Libraries ask for them."""
    single, mapped = pool.apply_async(square, (1,)), pool.map_async(square, [1])
    assert isinstance(single, multiprocessing.pool.AsyncResult)
    assert isinstance(single, multiprocessing.pool.ApplyResult)
    assert isinstance(mapped, multiprocessing.pool.MapResult)
    assert isinstance(pool.imap(square, [1]), multiprocessing.pool.IMapIterator)
    assert isinstance(pool.imap_unordered(square, [1]), multiprocessing.pool.IMapUnorderedIterator)


@pytest.mark.parametrize("callback", [None, abs])
def test_life_of_a_result(pool: DistPool, callback: Any) -> None:
    result = pool.apply_async(time.sleep, (0.3,), callback=lambda value: None if callback is None else callback(3))
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    for timeout in (0, 0.01, -1):
        with pytest.raises(multiprocessing.TimeoutError) as caught:
            result.get(timeout)
        assert type(caught.value) is multiprocessing.TimeoutError
        result.wait(timeout)
    result.wait(10)
    assert result.ready()
    assert result.successful()
    assert result.get() is None
    assert result.get(0) is None


def test_failed_result(pool: DistPool) -> None:
    for result in (
        pool.apply_async(fail, ("no",)),
        pool.map_async(fail, ["no"] * 10),
        pool.map_async(fail, ["no"] * 10, 1),
        pool.map_async(fail, ["no"] * 10, 3, error_callback=id),
    ):
        result.wait(10)
        assert result.ready()
        assert not result.successful()
        errors = []
        for _ in range(2):
            with pytest.raises(ValueError, match="no") as caught:
                result.get()
            errors.append(caught.value)
        assert errors[0] is errors[1]


class Asking:
    """Asks for its own result while that is decoded here, as a signal handler or a finalizer might."""

    ask: Callable[[], object] | None = None

    def __setstate__(self, state: object) -> None:
        ask, Asking.ask = Asking.ask, None
        if ask is not None:
            ask()

    def __getstate__(self) -> object:
        return 1


def make_asking(number: int) -> Asking:
    return Asking()


@pytest.mark.parametrize("many", [False, True])
def test_who_asks_while_it_is_decoded_in_the_same_thread(pool: DistPool, many: bool) -> None:
    result: Any = pool.map_async(make_asking, [1, 2], 1) if many else pool.apply_async(make_asking, (1,))
    result.wait(10)
    found: list[Any] = []
    Asking.ask = lambda: found.append((result.ready(), result.successful(), result.get(0)))
    value = result.get(10)
    assert len(found) == 1
    assert found[0][:2] == (True, True)
    assert found[0][2] is value
    assert result.get() is value


class Odd:
    """Some cannot be decoded here."""

    decoded: list[int] = []

    def __init__(self, number: int) -> None:
        self.number = number

    def __setstate__(self, state: dict[str, Any]) -> None:
        Odd.decoded.append(state["number"])
        if state["number"] in (2500, 4500):
            raise LookupError(f"no {state['number']}")
        self.number = state["number"]


def odd_at(number: int) -> Any:
    return Odd(number) if number % 1000 == 500 else number


def wait_then(number: int) -> int:
    if number == 0:
        time.sleep(0.5)
    return number


def test_large_chunks_are_decoded_once_and_the_first_failure_counts(pool: DistPool) -> None:
    Odd.decoded.clear()
    result = pool.map_async(odd_at, range(6000), 1500)
    for _ in range(2):
        with pytest.raises(LookupError, match="no 2500"):
            result.get(20)
    assert not result.successful()
    assert sorted(set(Odd.decoded)) == [500, 1500, 2500, 3500, 4500]
    assert len(Odd.decoded) == len(set(Odd.decoded))


def test_large_chunks_and_patience(pool: DistPool) -> None:
    result = pool.map_async(wait_then, range(5000), 1250)
    for timeout in (0, 0.05):
        with pytest.raises(multiprocessing.TimeoutError):
            result.get(timeout)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(result.get(20)), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [each is found[0] for each in found] == [True] * 3
    assert found[0] == list(range(5000))


def test_a_tasks_own_timeout_error_is_itself(pool: DistPool) -> None:
    """Not to be taken for the end of our patience."""
    with pytest.raises(TimeoutError, match="the task's own"):
        pool.apply_async(raise_timeout, ("the task's own",)).get(10)
    with pytest.raises(TimeoutError, match="the task's own"):
        pool.imap(raise_timeout, ["the task's own"]).next(10)


def test_the_same_list_each_time(pool: DistPool) -> None:
    result = pool.map_async(square, range(5))
    assert result.get() is result.get()


def test_a_result_may_be_awaited_by_many_threads(pool: DistPool) -> None:
    for result in (pool.apply_async(time.sleep, (0.1,)), pool.map_async(time.sleep, [0.1] * 4)):
        got: queue.Queue[Any] = queue.Queue()
        threads = [threading.Thread(target=lambda: got.put(result.get(20))) for _ in range(8)]
        for thread in threads:
            thread.start()
        values = [got.get(timeout=20) for _ in threads]
        for thread in threads:
            thread.join()
        assert values in ([None] * 8, [[None] * 4] * 8)


def test_error_of_a_map_is_that_of_its_first_chunk(pool: DistPool) -> None:
    for chunksize in (1, 2, None):
        with pytest.raises(ValueError, match="element 3"):
            pool.map(fail_at, range(100), chunksize)


class Tracked:
    def __init__(self) -> None:
        self.number = 1


def number_of(thing: Tracked) -> int:
    return thing.number


def test_nothing_keeps_arguments_or_values(pool: DistPool) -> None:
    things = [Tracked() for _ in range(10)]
    seen = [weakref.ref(thing) for thing in things]
    mapped = pool.map_async(number_of, things)
    del things
    assert mapped.get(20) == [1] * 10
    gc.collect()
    assert not any(ref() for ref in seen)
    value = weakref.ref(pool.apply(Tracked))
    gc.collect()
    assert value() is None


# -- callbacks --------------------------------------------------------------------------------------------------------


def test_callbacks_get_the_value_or_the_bare_exception(pool: DistPool) -> None:
    values: list[Any] = []
    errors: list[Any] = []
    for result in (
        pool.apply_async(square, (3,), callback=values.append, error_callback=errors.append),
        pool.map_async(square, range(3), callback=values.append, error_callback=errors.append),
        pool.map_async(square, range(3), 1, values.append, errors.append),
        pool.starmap_async(pow, [(2, 3)], callback=values.append, error_callback=errors.append),
        pool.apply_async(fail, ("a",), {}, values.append, errors.append),
        pool.map_async(fail, "b", callback=values.append, error_callback=errors.append),
        pool.apply_async(square, (threading.Lock(),), callback=values.append, error_callback=errors.append),
        pool.map_async(square, [threading.Lock()], callback=values.append, error_callback=errors.append),
    ):
        result.wait(20)  # callbacks have run when it returns
    assert sorted(map(str, values)) == ["9", "[0, 1, 4]", "[0, 1, 4]", "[8]"]
    assert sum(isinstance(error, ValueError) for error in errors) == 2
    assert sum(isinstance(error, pickle.PicklingError) for error in errors) == 2
    assert len(errors) == 4


def test_a_map_of_nothing_calls_nobody(pool: DistPool) -> None:
    """As multiprocessing.Pool's: it has ended before it began. What is wrong with it is told all the same."""
    told: list[Any] = []
    for make in pool.map_async, pool.starmap_async:
        for iterable, chunksize in (([], None), ((), 1), (iter(()), 7)):
            result = make(square, iterable, chunksize, told.append, told.append)
            assert result.ready() and result.successful() and result.get(20) == []
    pool.apply_async(square, (3,), callback=told.append).wait(20)
    assert told == [9], "callbacks come in order: the others would have been called by now"


def test_callbacks_come_one_after_another(pool: DistPool) -> None:
    """Users count in them without a lock: multiprocessing.Pool has one thread for them."""
    running = 0
    most = 0
    total = 0

    def count(value: int) -> None:
        nonlocal running, most, total
        running += 1
        most = max(most, running)
        time.sleep(0.0005)
        total += 1
        running -= 1

    results = [pool.apply_async(square, (number,), callback=count) for number in range(200)]
    for result in results:
        result.wait(20)
    assert (most, total) == (1, 200)


@pytest.mark.parametrize("error", [ValueError("from the callback"), SystemExit(3), KeyboardInterrupt()])
def test_a_callback_that_raises_is_logged(
    pool: DistPool, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def callback(value: Any) -> None:
        raise error

    with caplog.at_level(logging.ERROR):
        result = pool.apply_async(square, (3,), callback=callback)
        assert result.get(20) == 9
        assert pool.apply_async(square, (4,), callback=id).get(20) == 16
    assert type(error).__name__ in caplog.text


def test_callbacks_may_wait_for_each_other(pool: DistPool) -> None:
    """Each waits for a result whose callback comes after its own."""
    ends: queue.Queue[int] = queue.Queue()

    def deeper(depth: int) -> None:
        if depth:
            result = pool.apply_async(int, (depth - 1,), callback=deeper)
            result.wait(20)
            assert result.ready()
            assert list(pool.imap(square, [depth])) == [depth * depth]
        ends.put(depth)

    pool.apply_async(int, (10,), callback=deeper)
    assert [ends.get(timeout=20) for _ in range(11)] == list(range(11))


def test_a_callback_may_close_and_join() -> None:
    pool = DistPool(1)
    ended = threading.Event()

    def finish(value: int) -> None:
        pool.close()
        pool.join()
        ended.set()

    pool.apply_async(square, (2,), callback=finish)
    assert ended.wait(20)
    pool.join()


# -- lazy maps --------------------------------------------------------------------------------------------------------


INPUTS: list[Callable[[int], Any]] = [
    range,
    lambda n: list(range(n)),
    lambda n: (number for number in range(n)),
    lambda n: dict.fromkeys(range(n)),
    lambda n: map(int, map(str, range(n))),
]


@pytest.mark.parametrize("chunksize", [1, 3, 1000])
@pytest.mark.parametrize("make", INPUTS)
def test_imap(pool: DistPool, make: Callable[[int], Any], chunksize: int) -> None:
    for length in (0, 1, 300):
        wanted = [number * number for number in range(length)]
        assert list(pool.imap(square, make(length), chunksize)) == wanted
        assert sorted(pool.imap_unordered(square, make(length), chunksize)) == wanted


def test_imap_of_objects(pool: DistPool) -> None:
    words = [[number] * number for number in range(100)]
    assert list(pool.imap(len, words)) == list(range(100))
    assert list(pool.imap(len, iter(words), 7)) == list(range(100))


def test_endless_input(pool: DistPool) -> None:
    """First result at once, and never more than the look-ahead is taken."""
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield number

    for method in (pool.imap, pool.imap_unordered):
        taken = 0
        results = method(square, numbers())
        for delivered in range(1000):
            next(results)
            assert taken <= delivered + 1 + AHEAD
        del results
    taken = 0
    results = pool.imap(square, numbers(), 10)
    for delivered in range(1000):
        next(results)
        assert taken <= delivered + 10 + 10 * AHEAD


def test_an_iterator_that_is_dropped_takes_no_more(pool: DistPool) -> None:
    source = (number for number in itertools.count())
    results = pool.imap(square, source)
    assert next(results) == 0
    feed = weakref.ref(results._feed)
    del results
    gc.collect()
    assert pool.map(square, range(3)) == [0, 1, 4]
    deadline = time.monotonic() + 10
    while feed() is not None and time.monotonic() < deadline:
        gc.collect()
        pool.apply(square, (1,))
    assert feed() is None
    assert next(source) <= 2 * AHEAD


@pytest.mark.parametrize("operation", ["map", "imap", "imap_unordered"])
def test_the_end_of_a_map_enters_no_finalizer(pool: DistPool, operation: str) -> None:
    """Ctrl-C that strikes there would be lost."""
    made = pool.map_async(abs, [1, 2]) if operation == "map" else getattr(pool, operation)(abs, [1, 2])
    assert hasattr(made._dropped, "__del__"), "half-way there is something to do"
    assert sorted(made.get() if operation == "map" else made) == [1, 2]
    assert not hasattr(made, "__del__") and not hasattr(made._dropped, "__del__")


def test_input_that_waits_for_the_caller(pool: DistPool) -> None:
    """A queue that is filled after `imap` was called, one element at a time: each result comes before the next one."""
    numbers: queue.Queue[int | None] = queue.Queue()
    for method in (pool.imap, pool.imap_unordered):
        results = method(square, iter(numbers.get, None))
        for number in range(20):
            with pytest.raises(multiprocessing.TimeoutError):
                results.next(0)
            numbers.put(number)
            assert results.next(20) == number * number
        numbers.put(None)
        with pytest.raises(StopIteration):
            results.next(20)


def test_input_that_blocks_and_a_pool_that_is_terminated() -> None:
    pool = DistPool(1)
    gate = threading.Event()

    def numbers() -> Iterator[int]:
        yield 1
        gate.wait(30)
        yield 2

    results = pool.imap(square, numbers())
    assert next(results) == 1
    ends: queue.Queue[BaseException] = queue.Queue()

    def consume() -> None:
        try:
            next(results)
        except BaseException as error:
            ends.put(error)

    thread = threading.Thread(target=consume)
    thread.start()
    with pytest.raises(queue.Empty):
        ends.get(timeout=0.1)
    pool.terminate()
    assert "the pool was terminated" in str(ends.get(timeout=10))
    gate.set()
    thread.join(10)
    pool.join()
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize("chunksize", [1, 4, 20])
def test_error_of_the_input_comes_after_the_results(pool: DistPool, chunksize: int) -> None:
    def numbers() -> Iterator[int]:
        yield from range(10)
        raise LookupError("no more")

    for method in (pool.imap, pool.imap_unordered):
        results = method(square, numbers(), chunksize)
        count = 10 - 10 % chunksize  # a chunk that was not complete is not sent
        assert sorted(next(results) for _ in range(count)) == [number * number for number in range(count)]
        with pytest.raises(LookupError, match="no more") as caught:
            next(results)
        assert caught.value.__cause__ is None
        with pytest.raises(StopIteration):
            next(results)


def test_an_elements_error_does_not_end_the_iteration(pool: DistPool) -> None:
    for make in (range, lambda n: (number for number in range(n))):
        results = pool.imap(fail_at, make(20))
        found: list[Any] = []
        while len(found) < 20:
            try:
                found.append(next(results))
            except ValueError as error:
                found.append(str(error))
        assert found == [f"element {number}" if number % 5 == 3 else number for number in range(20)]
        with pytest.raises(StopIteration):
            next(results)


def test_unserialisable_elements(pool: DistPool) -> None:
    for make in (list, iter):
        results = pool.imap(type, make([1, threading.Lock(), 2.0]))
        assert next(results) is int
        with pytest.raises(pickle.PicklingError, match="lock"):
            next(results)
        assert next(results) is float
        lock = threading.Lock()
        with pytest.raises(pickle.PicklingError, match="lock"):
            next(pool.imap(lambda number: lock, make([1])))


def test_no_input_at_all(pool: DistPool) -> None:
    for method in (pool.imap, pool.imap_unordered):
        with pytest.raises(TypeError):
            method(square, 5)
        with pytest.raises(StopIteration):
            next(method(square, []))
        with pytest.raises(StopIteration):
            method(square, iter(())).next(10)


def test_next_with_a_timeout(pool: DistPool) -> None:
    results = pool.imap(time.sleep, [0.3, 0])
    begin = time.monotonic()
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(0.05)
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0)
    assert time.monotonic() - begin < 0.3
    assert results.next(20) is None
    assert results.next(20) is None


@pytest.mark.parametrize("ordered", [True, False])
def test_an_iterator_may_be_shared(pool: DistPool, ordered: bool) -> None:
    for make in (range, lambda n: (number for number in range(n))):
        results = (pool.imap if ordered else pool.imap_unordered)(square, make(400))
        got: queue.Queue[int] = queue.Queue()

        def consume(results: Any = results, got: queue.Queue[int] = got) -> None:
            for value in results:
                got.put(value)

        threads = [threading.Thread(target=consume) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(got.get_nowait() for _ in range(400)) == [number * number for number in range(400)]
        assert got.empty()


def test_many_maps_at_once(pool: DistPool) -> None:
    iterators = [pool.imap(square, (number for number in range(50))) for _ in range(20)]
    results = [pool.map_async(square, range(50), 5) for _ in range(20)]
    for row in zip(*iterators, strict=True):
        assert len(set(row)) == 1
    assert all(result.get(20) == [number * number for number in range(50)] for result in results)


@pytest.mark.parametrize("ordered", [True, False])
def test_an_interrupt_behind_what_takes_a_result_out_costs_that_result(pool: DistPool, ordered: bool) -> None:
    results: Any = (pool.imap if ordered else pool.imap_unordered)(square, (number for number in range(10)))
    run = results._feed.run
    run.wait_until(lambda: run.settled == 10, time.monotonic() + 20)
    if ordered:
        run.results = Struck(run.results)
    else:
        run.ready = StruckQueue(run.ready)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert len({results.next(20) for _ in range(9)}) == 9
    with pytest.raises(StopIteration):
        results.next(20)
