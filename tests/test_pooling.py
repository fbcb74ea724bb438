"""The maps of a pool before anything runs: sizes of chunks, errors of the input, and which way they go."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.pool import CLOSE, RUN
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeWorker, Office, fresh, nobody_takes
from wires import until

from distpool import pooling
from distpool.mapruns import LOOK_AHEAD, MapRun
from distpool.pool import DistPool
from distpool.pool_callbacks import Callbacks
from distpool.pool_input import Inputs
from distpool.pool_runs import PolicyRun
from distpool.work import Policy


class Pool(DistPool):
    """A pool over fake workers."""

    def __init__(self, office: Office, policy: Policy | None = None, progress: Any = None) -> None:
        self.office = office
        self._ways = pooling
        self._crew: Any = SimpleNamespace(node=office.node, scheduler=office.scheduler, size=2, broken=None)
        self._callbacks = Callbacks(office.scheduler)
        self._policy = policy
        self._progress = progress
        self._inputs = Inputs(SimpleNamespace(shutdown=lambda wait: None))  # type: ignore[arg-type]
        self._state = RUN

    def __del__(self) -> None:
        pass


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


@pytest.fixture
def pool(office: Office) -> Pool:
    return Pool(office)


def run_all(office: Office, worker: FakeWorker, count: int) -> None:
    for _ in range(count):
        worker.wait(lambda: worker.inbox, "something to run")
        office.finish(worker)


@pytest.mark.parametrize(
    ("length", "chunksize", "entries"),
    [(0, None, 0), (1, None, 1), (8, None, 8), (9, None, 5), (80, None, 8), (10, 1, 10), (10, 3, 4), (10, 100, 1)],
)
@pytest.mark.parametrize("kind", [list, range, iter])
def test_chunks_and_values(pool: Pool, length: int, chunksize: int | None, entries: int, kind: Any) -> None:
    items = list(range(length))
    source = range(length) if kind is range else kind(items)
    result = pool.map_async(fresh(), source, chunksize)
    run_all(pool.office, pool.office.worker(2), entries)
    assert result.get(30) == items


@pytest.mark.parametrize(("chunksize", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_chunksizes_that_are_none(pool: Pool, chunksize: Any, error: type[Exception]) -> None:
    for method in (pool.map_async, pool.imap, pool.imap_unordered):
        with pytest.raises(error):
            method(abs, [1], chunksize)


def test_starmap(pool: Pool) -> None:
    result = pool.starmap_async(fresh(), [(1, 2), [3, 4]], 1)
    run_all(pool.office, pool.office.worker(2), 2)
    assert result.get(30) == [1, 3]


def test_a_map_takes_its_input_at_once_and_as_it_is(pool: Pool) -> None:
    items = [[1], [2]]
    result = pool.map_async(fresh(), items, 1)
    items[0].append(9)
    items.append([3])
    run_all(pool.office, pool.office.worker(2), 2)
    assert result.get(30) == [[1], [2]]


class Failing:
    """A container that cannot be iterated."""

    def __iter__(self) -> Iterator[int]:
        raise OSError("input")


class Sized(Failing):
    def __len__(self) -> int:
        return 3


def test_errors_of_the_input(pool: Pool) -> None:
    """As with the standard library: of what has a length at `get`, of others at the call."""
    result = pool.map_async(abs, Sized())
    with pytest.raises(OSError, match="input"):
        result.get(30)
    with pytest.raises(OSError, match="input"):
        pool.map_async(abs, Failing())


def test_a_function_that_cannot_be_sent_is_an_error_of_the_result(pool: Pool) -> None:
    lock: Any = threading.Lock()

    def bad(number: int) -> Any:
        return lock

    for result in (pool.map_async(bad, [1]), pool.starmap_async(bad, [(1,)])):
        with pytest.raises(Exception, match="lock"):
            result.get(30)
    for iterator in (pool.imap(bad, [1]), pool.imap_unordered(bad, [1]), pool.imap(bad, [1], 5)):
        with pytest.raises(Exception, match="lock"):
            next(iterator)


@pytest.mark.parametrize("policy", [None, Policy(retries=1)])
def test_the_policy_decides_the_way(office: Office, policy: Policy | None) -> None:
    pool = Pool(office, policy)
    kind = MapRun if policy is None else PolicyRun
    assert type(pool.map_async(fresh(), [1])._run) is kind
    assert type(pool.imap(fresh(), [1])._feed.run) is kind  # type: ignore[attr-defined]
    worker = office.worker(2)
    worker.wait(lambda: len(worker.inbox) >= 1, "a call")


@pytest.mark.parametrize("plain", [True, False])
def test_imap_takes_no_more_than_its_look_ahead(pool: Pool, plain: bool) -> None:
    most = 2 * LOOK_AHEAD
    source: Any = range(10_000) if plain else itertools.count()
    iterator: Any = pool.imap(fresh(), source)
    feed = iterator._feed
    until(
        lambda: feed.run.fed == most and nobody_takes(feed),
        "the look-ahead is full",
    )
    assert feed._plain is plain
    feed.consumed = True  # it is left half-way


def test_imap_of_what_is_no_input(pool: Pool) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        pool.imap(abs, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("chunksize", [1, 4])
def test_imaps(pool: Pool, ordered: bool, chunksize: int) -> None:
    iterator = (pool.imap if ordered else pool.imap_unordered)(fresh(), list(range(10)), chunksize)
    run_all(pool.office, pool.office.worker(2), 10 if chunksize == 1 else 3)
    assert list(iterator) == list(range(10))
    assert hasattr(iterator, "next") is (chunksize == 1)  # as with the standard library


def test_nothing_starts_in_a_pool_that_is_not_running(pool: Pool) -> None:
    pool._state = CLOSE
    for method in (pool.map, pool.starmap, pool.map_async, pool.starmap_async, pool.imap, pool.imap_unordered):
        with pytest.raises(ValueError, match="Pool not running"):
            method(abs, iter([1]))
    pool._state = RUN
    pool._crew.broken = BrokenProcessPool("why")
    with pytest.raises(BrokenProcessPool, match="why") as caught:
        pool.map(abs, [1])
    assert caught.value is not pool._crew.broken and caught.value.__cause__ is pool._crew.broken


def test_a_pool_that_is_closed_this_very_moment_takes_no_input(pool: Pool) -> None:
    inputs: Any = pool._inputs
    add = inputs.add
    inputs.add = lambda feed: (add(feed), setattr(pool, "_state", CLOSE))[0]
    with pytest.raises(ValueError, match="Pool not running"):
        pool.imap(abs, [1])
    assert not inputs._feeds


class Interrupted:
    """Ctrl-C comes while it is serialised."""

    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["apply", "map", "chunks"])
def test_what_was_interrupted_before_it_was_sent_is_not_waited_for(pool: Pool, how: str) -> None:
    """`join` waited for its callback, for ever."""
    callback = [].append
    with pytest.raises(KeyboardInterrupt):
        if how == "apply":
            pool.apply_async(abs, (Interrupted(),), callback=callback)
        else:
            pool.map_async(abs, [1, Interrupted()], 1 if how == "map" else 2, callback=callback)
    pool._callbacks.join()
    assert not pool._callbacks.results
