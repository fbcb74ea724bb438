"""Rows F13, F14: input that never ends, and input that fails half-way."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from . import helpers
from .helpers import NOISE, Gate, at_most
from .programs import run
from .runners import Runner, assert_squares

Mapper = Callable[[Runner, Callable[..., Any], Iterable[Any]], Iterator[Any]]

MAPPERS: dict[str, Mapper] = {
    "lazy map": lambda runner, function, items: runner.lazy_map(function, items),
    "imap_unordered": lambda runner, function, items: runner.raw.imap_unordered(function, items),
}
mappers = pytest.mark.parametrize("mapper", MAPPERS.values(), ids=MAPPERS)


class Counted:
    """An iterator that knows how much was taken from it."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.taken = 0
        self._items = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        value = next(self._items)
        self.taken += 1
        return value


# ------------------------------------------------------------------------------------------------------------------ F13


@mappers
def test_endless_input(runner: Runner, mapper: Mapper) -> None:
    runner.bring_up()
    items = Counted(itertools.count())
    with at_most(0.2, "the first result"):
        results = mapper(runner, helpers.square, items)
        assert next(results) >= 0
    assert items.taken <= 8 * runner.workers
    got = [next(results) for _ in range(2000)]
    assert items.taken <= 2001 + 8 * runner.workers
    assert len(set(got)) == 2000


@mappers
def test_endless_input_of_slow_tasks(runner: Runner, gate: Gate, mapper: Mapper) -> None:
    """Nothing is taken ahead while all workers are held."""
    address = gate.address
    items = Counted(itertools.count())
    results = mapper(runner, lambda number: helpers.hold(address, number), items)
    asked: list[Any] = []
    consumer = threading.Thread(target=lambda: asked.append(next(results)))
    consumer.start()
    arrivals = gate.arrivals(runner.workers)
    assert items.taken <= 8 * runner.workers
    gate.close()
    for arrival in arrivals:
        arrival.connection.close()
    consumer.join(helpers.PATIENCE)
    assert len(asked) == 1


def test_pmap_of_endless_input_ends_with_its_error(runner: Runner) -> None:
    items = Counted(itertools.count())

    def act(number: int) -> int:
        if number == 100:
            raise ValueError("enough")
        return number

    with at_most(1, "pmap"), pytest.raises(ValueError, match="enough"):
        runner.raw.pmap(act, items)
    assert 100 < items.taken <= 101 + 8 * runner.workers


def test_pgenerate_of_endless_input(runner: Runner) -> None:
    """The lazy ordered iterator, on the executor's own workers where it exists as a method."""
    pgenerate = getattr(runner.executor, "pgenerate", None)
    if pgenerate is None:
        pytest.skip("pgenerate is a module function only")
    runner.bring_up()
    items = Counted(itertools.count())
    with at_most(0.2, "the first result"):
        results = pgenerate(helpers.square, items)
        assert next(results) == 0
    assert items.taken <= 8 * runner.workers
    assert [next(results) for _ in range(100)] == [number * number for number in range(1, 101)]


def test_abandoned_endless_map(runner: Runner) -> None:
    """Whoever drops the iterator half-way leaves nothing behind that goes on taking."""
    items = Counted(itertools.count())
    results = runner.lazy_map(helpers.square, items)
    assert [next(results) for _ in range(10)] == [number * number for number in range(10)]
    del results
    taken = items.taken
    assert_squares([runner.submit(helpers.square, number) for number in range(100)])
    assert items.taken <= taken + 8 * runner.workers


MEMORY = """
import itertools, psutil
kind, how, total = sys.argv[1], sys.argv[2], int(sys.argv[3])
runner = Runner(kind, 2)
process = psutil.Process()
if how == "lazy map" and kind == "executor":
    results = runner.raw.map(helpers.square, itertools.count(), buffersize=16)
elif how == "lazy map":
    results = runner.raw.imap(helpers.square, itertools.count())
else:
    results = runner.raw.imap_unordered(helpers.square, itertools.count())
for _ in itertools.islice(results, total // 10):
    pass
early = process.memory_info().rss
for _ in itertools.islice(results, total - total // 10):
    pass
grown = process.memory_info().rss - early
del results
print("grown", grown >> 20, flush=True)
runner.close()
"""


@pytest.mark.slow
@pytest.mark.time_limit(200)
@pytest.mark.parametrize("how", MAPPERS)
def test_memory_is_flat_over_a_million(kind: str, how: str) -> None:
    """A million elements take a minute of CPU per variant: only when asked for. A tenth shows whatever grows with each
    element just as well, by half the limit: that is 60 bytes per element."""
    total, limit = (1_000_000, 10) if os.environ.get("DISTPOOL_LONG_TESTS") else (100_000, 5)
    outcome = run(MEMORY, kind, how, total, seconds=180)
    outcome.assert_clean()
    assert int(outcome.stdout.split()[1]) <= limit, f"MiB grown over {total * 9 // 10} elements"


# ------------------------------------------------------------------------------------------------------------------ F14


def five_then_fail() -> Iterator[int]:
    yield from range(5)
    raise OSError("the input ends badly")


def test_results_before_the_failure_are_delivered(runner: Runner) -> None:
    results = runner.lazy_map(helpers.square, five_then_fail())
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(OSError, match="the input ends badly") as caught:
        next(results)
    assert caught.value.__cause__ is None
    assert_squares([runner.submit(helpers.square, number) for number in range(8)])


def test_results_before_the_failure_are_delivered_unordered(runner: Runner) -> None:
    results = runner.raw.imap_unordered(helpers.square, five_then_fail())
    assert sorted(next(results) for _ in range(5)) == [0, 1, 4, 9, 16]
    with pytest.raises(OSError, match="the input ends badly"):
        next(results)
    assert_squares([runner.submit(helpers.square, number) for number in range(8)])


@pytest.mark.parametrize("method", ["map", "pmap"])
def test_maps_that_take_everything_raise(runner: Runner, method: str) -> None:
    with at_most(1, method), pytest.raises(OSError, match="the input ends badly") as caught:
        list(getattr(runner.raw, method)(helpers.square, five_then_fail()))
    assert caught.value.__cause__ is None
    assert_squares([runner.submit(helpers.square, number) for number in range(8)])


def test_input_that_fails_at_once(runner: Runner) -> None:
    def fail_at_once() -> Iterator[int]:
        raise OSError("no input")
        yield 0

    for mapper in MAPPERS.values():
        with at_most(0.5, "the error"), pytest.raises(OSError, match="no input"):
            list(mapper(runner, helpers.square, fail_at_once()))


def test_slow_input_does_not_hold_back_results(runner: Runner) -> None:
    """The pool takes its input on a thread, so a result is delivered while the input makes the next element."""
    if runner.kind != "pool":
        pytest.skip("the executor takes its input in the consumer's thread, as the stdlib's does")
    delivered = threading.Event()
    in_time: list[bool] = []

    def slow() -> Iterator[int]:
        yield 1
        in_time.append(delivered.wait(0.5 * NOISE))
        yield 2

    for method in (runner.raw.imap, runner.raw.imap_unordered):
        delivered.clear()
        results = method(helpers.square, slow())
        assert next(results) == 1
        delivered.set()
        assert list(results) == [4]
    assert in_time == [True, True]
