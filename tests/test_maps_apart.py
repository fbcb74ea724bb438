"""Maps of real workers: what one leaves in its function no other sees; proxies of managers live as long as calls."""

from __future__ import annotations

import functools
import gc
import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from wires import wait_until

import distpool
from distpool import ClusterExecutor, DistPool


@pytest.fixture(scope="module")
def executor() -> Iterator[ClusterExecutor]:
    with ClusterExecutor(1) as executor:
        executor.submit(abs, -1).result()  # its worker is there before the first test
        yield executor


@pytest.fixture(scope="module")
def pool() -> Iterator[DistPool]:
    with DistPool(1) as pool:
        pool.apply(abs, (-1,))
        yield pool


#: name -> (executor, pool, function, input) -> values
MAPS: dict[str, Callable[..., Any]] = {
    "map": lambda ex, pool, f, xs: list(ex.map(f, xs)),
    "map of chunks": lambda ex, pool, f, xs: list(ex.map(f, xs, chunksize=3)),
    "map of a buffer": lambda ex, pool, f, xs: list(ex.map(f, xs, buffersize=2)),
    "imap_unordered": lambda ex, pool, f, xs: list(ex.imap_unordered(f, xs)),
    "pmap": lambda ex, pool, f, xs: ex.pmap(f, xs),
    "pmap of batches": lambda ex, pool, f, xs: ex.pmap(f, xs, batch_size=3),
    "pgenerate": lambda ex, pool, f, xs: list(distpool.pgenerate(f, xs, pool=ex)),
    "Pool.map": lambda ex, pool, f, xs: pool.map(f, xs),
    "Pool.imap": lambda ex, pool, f, xs: list(pool.imap(f, xs)),
    "Pool.starmap": lambda ex, pool, f, xs: pool.starmap(f, [(x,) for x in xs]),
}

ways = pytest.mark.parametrize("way", MAPS)


def filtering() -> Callable[[int], bool]:
    seen: set[int] = set()

    def is_new(number: int) -> bool:
        new = number not in seen
        seen.add(number)
        return new

    return is_new


class Counting:
    calls = 0

    def __call__(self, number: int) -> int:
        self.calls += 1
        return self.calls


def drawing() -> Callable[[int], float]:
    source = random.Random(1)
    return lambda number: source.random()


def taking() -> Callable[[int], int]:
    numbers = itertools.count()
    return lambda number: next(numbers)


@ways
@pytest.mark.parametrize("make", [filtering, Counting, drawing, taking])
def test_each_map_begins_with_what_it_was_given(
    executor: ClusterExecutor, pool: DistPool, way: str, make: Callable[[], Any]
) -> None:
    """Equal bytes were taken for the same function, and the workers had kept that: the second map of a filter of what
    is new found nothing new."""
    first = MAPS[way](executor, pool, make(), [1, 1, 2])
    again = make()
    for function in (make(), again, again, functools.partial(again)):
        assert MAPS[way](executor, pool, function, [1, 1, 2]) == first


def test_workers_forget_the_functions_of_maps_that_are_over(executor: ClusterExecutor) -> None:
    (slot,) = executor._crew.scheduler.slots.values()
    before = set(slot._functions)
    assert list(executor.map(Counting(), range(3))) == [1, 2, 3]
    wait_until(lambda: set(slot._functions) <= before)


# -- proxies of managers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manager() -> Iterator[Any]:
    with multiprocessing.get_context("spawn").Manager() as manager:
        yield manager


def use(shared: Any) -> list[int]:
    shared.append(2)
    return list(shared)


SUBMITS: dict[str, Callable[..., Any]] = {
    "submit": lambda ex, pool, shared: ex.submit(use, shared()).result(),
    "by name": lambda ex, pool, shared: ex.submit(use, shared=shared()).result(),
    "inside": lambda ex, pool, shared: ex.submit(lambda found: use(found["it"]), {"it": shared()}).result(),
    "view": lambda ex, pool, shared: ex.options(retries=1).submit(use, shared()).result(),
    "apply": lambda ex, pool, shared: pool.apply(use, (shared(),)),
    **{name: lambda ex, pool, shared, way=way: way(ex, pool, use, [shared()])[0] for name, way in MAPS.items()},
}


@pytest.mark.parametrize("way", SUBMITS)
def test_proxies_live_until_their_call_has_ended(
    executor: ClusterExecutor, pool: DistPool, manager: Any, way: str
) -> None:
    """Dropped when it was serialised, the last proxy took the object along before the worker's had begun."""
    assert SUBMITS[way](executor, pool, lambda: manager.list([1])) == [1, 2]

    def left() -> int:
        executor.submit(gc.collect).result()  # a proxy's connection and its frames are a cycle
        pool.apply(gc.collect)
        return int(manager._number_of_objects())

    wait_until(lambda: left() == 0)
