"""`DistPool`: constructor, calls, maps, and its ends. What its methods return is in test_pool_results.py."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import multiprocessing.pool
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import ClusterExecutor, DistPool, ProcessExitedException
from distpool.managers.local import LocalManager
from distpool.pool_callbacks import PoolTerminated


def square(number: int) -> int:
    return number * number


def add(a: int, b: int = 0, c: int = 0) -> int:
    return a + b + c


def note(path: Path, text: object) -> object:
    with path.open("a") as file:
        file.write(f"{text}\n")
    return text


def die(number: int = 9) -> None:
    os.kill(os.getpid(), number)


def die_at(bad: int, number: int) -> int:
    if number == bad:
        die()
    return number


def fail_at(bad: int, number: int) -> int:
    if number == bad:
        raise ValueError(f"element {number}")
    return number


def noted(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


@pytest.fixture(scope="module")
def shared() -> Iterator[DistPool]:
    """A pool for tests that leave it as it was."""
    pool = DistPool(2)
    while len(pool.executor.workers) < 2:  # what comes up later would look like a leftover of the first test
        pool.apply(time.sleep, (0.01,))
    yield pool
    pool.terminate()


# -- the constructor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [0, -1])
def test_too_few_processes(processes: int) -> None:
    with pytest.raises(ValueError, match="Number of processes must be at least 1"):
        DistPool(processes)


@pytest.mark.parametrize("count", [0, -1, 0.5, "12"])
def test_bad_maxtasksperchild(count: Any) -> None:
    with pytest.raises(ValueError, match="maxtasksperchild must be a positive int or None"):
        DistPool(1, maxtasksperchild=count)


def test_arguments_of_no_initializer() -> None:
    with DistPool(1, None, None) as pool:  # type: ignore[arg-type]
        assert pool.apply(square, (3,)) == 9
    with pytest.raises(TypeError, match="not iterable"):
        DistPool(1, print, None)  # type: ignore[arg-type]


def test_bad_initializer() -> None:
    with pytest.raises(TypeError, match="initializer must be a callable"):
        DistPool(1, 5)  # type: ignore[arg-type]


def test_unknown_option_before_anything_is_launched() -> None:
    with pytest.raises(ValueError, match="Invalid keyword argument foo"):
        DistPool(1, foo=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DistPool(2),
        lambda: DistPool(hosts=2),
        lambda: DistPool("local://2"),
        lambda: DistPool(hosts="local://2"),
        lambda: DistPool(LocalManager(2)),
        lambda: DistPool(max_workers=2),
        lambda: DistPool(processes=2, context=multiprocessing.get_context("fork"), maxtasksperchild=5),
    ],
)
def test_what_the_first_argument_may_be(make: Callable[[], DistPool]) -> None:
    with make() as pool:
        assert pool.map(square, range(5)) == [0, 1, 4, 9, 16]
        assert pool.size == pool._processes == len(pool._pool) == 2


def test_context_is_kept() -> None:
    context = multiprocessing.get_context("spawn")
    with DistPool(1, context=context) as pool, DistPool(1, mp_context=context) as other:
        assert pool._ctx is other._ctx is context
        assert other.apply(square, (3,)) == 9


def test_it_is_a_pool(shared: DistPool) -> None:
    """dask asks `isinstance(p, multiprocessing.pool.Pool)`; nothing inherited may touch what does not exist."""
    assert isinstance(shared, multiprocessing.pool.Pool)
    assert repr(shared) == "<distpool.pool.DistPool state=RUN pool_size=2>"
    assert isinstance(shared.executor, ClusterExecutor)
    assert shared.executor.submit(square, 3).result() == 9
    assert not callable(shared)
    for name in ("apply", "apply_async", "map", "map_async", "starmap", "starmap_async", "imap", "imap_unordered"):
        assert getattr(DistPool, name) is not getattr(multiprocessing.pool.Pool, name)
    for name in ("close", "terminate", "join", "__del__", "__repr__", "__reduce__", "__enter__", "__exit__"):
        assert getattr(DistPool, name) is not getattr(multiprocessing.pool.Pool, name)


def test_workers_as_pool_shows_them() -> None:
    with DistPool(2) as pool:
        early = pool._pool
        assert len(early) == 2  # at once, whether they are up or not
        ospids = [process.pid for process in early]
        assert all(type(ospid) is int for ospid in ospids) and len(set(ospids)) == 2
        assert all(isinstance(process.name, str) for process in early)
        pool.map(square, range(10))
        pids = pool.map(_ospid, range(20), chunksize=1)
        assert {process.pid for process in pool._pool if process.pid} >= set(pids)
        assert all(process.is_alive() for process in pool._pool)
    assert pool._pool == []


def _ospid(number: int) -> int:
    return os.getpid()


def test_not_serialisable(shared: DistPool) -> None:
    with pytest.raises(NotImplementedError, match="cannot be passed between processes or pickled"):
        pickle.dumps(shared)


def test_with_a_failing_constructor_nothing_is_left() -> None:
    gc.collect()  # what other tests have left
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError):
            DistPool(0)
        gc.collect()


# -- calls ------------------------------------------------------------------------------------------------------------


def test_apply(shared: DistPool) -> None:
    assert shared.apply(add, (1, 2), {"c": 3}) == 6
    assert shared.apply(add, [1]) == 1
    assert shared.apply(lambda: 5) == 5


def test_an_error_has_the_remote_traceback(shared: DistPool) -> None:
    with pytest.raises(ValueError, match="element 3") as caught:
        shared.apply(fail_at, (3, 3))
    cause = caught.value.__cause__
    assert type(cause) is multiprocessing.pool.RemoteTraceback  # type: ignore[attr-defined]
    assert "in fail_at" in str(cause)


class KeepsItsTraceback(Exception):
    def with_traceback(self, tb: Any) -> Any:
        raise LookupError("not this way")


class NoCause(Exception):
    __cause__ = property(lambda self: 1 // 0)  # type: ignore[assignment]


class Touchy(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise LookupError(name)


def throw(kind: type[Exception]) -> None:
    raise kind("x")


@pytest.mark.parametrize(
    ("kind", "arrives"),
    [(KeepsItsTraceback, KeepsItsTraceback), (NoCause, NoCause), (Touchy, distpool.RemoteException)],
)
def test_errors_that_refuse_to_be_looked_at(shared: DistPool, kind: Any, arrives: Any) -> None:
    ways: list[Callable[[], Any]] = [
        lambda: shared.apply(throw, (kind,)),
        lambda: shared.map(throw, [kind] * 3),
        lambda: shared.map(throw, [kind] * 3, 2),
        lambda: list(shared.imap(throw, [kind] * 2)),
        lambda: list(shared.imap_unordered(throw, [kind] * 2)),
        lambda: shared.pmap(throw, [kind] * 2, retry_delays=[0], retry_check=OSError),
        lambda: shared.executor.submit(throw, kind).result(),
        lambda: shared.executor.options(retries=1, retry_check=OSError).submit(throw, kind).result(),
    ]
    before = shared.executor.workers
    for way in ways:
        with pytest.raises(arrives) as info:
            way()
        assert kind is not Touchy or "Touchy: x" in str(info.value)
    assert shared.executor.workers == before, "none of them has died of it"


def test_unserialisable_argument_is_that_calls_error(shared: DistPool) -> None:
    bad = shared.apply_async(square, (threading.Lock(),))
    assert shared.apply(square, (4,)) == 16
    with pytest.raises(pickle.PicklingError, match="lock"):
        bad.get(10)


class RefusesToPickle:
    def __reduce__(self) -> Any:
        raise LookupError("not this one")


def test_error_of_the_users_own_reduce_is_of_its_own_type(shared: DistPool) -> None:
    for call in (
        lambda: shared.apply(square, (RefusesToPickle(),)),
        lambda: shared.map(square, [RefusesToPickle()] * 3),
        lambda: list(shared.imap(square, [RefusesToPickle()])),
    ):
        with pytest.raises(LookupError, match="RefusesToPickle.*not this one") as caught:
            call()
        assert isinstance(caught.value, distpool.SerializationError)
        assert type(pickle.loads(pickle.dumps(caught.value))) is distpool.SerializationError


def give_lock(number: int) -> Any:
    return threading.Lock() if number == 3 else number


def test_unserialisable_result(shared: DistPool) -> None:
    with pytest.raises(multiprocessing.pool.MaybeEncodingError) as caught:  # type: ignore[attr-defined]
        shared.apply(give_lock, (3,))
    assert "lock" in caught.value.value
    assert "SerializationError" in caught.value.exc
    with pytest.raises(multiprocessing.pool.MaybeEncodingError):  # type: ignore[attr-defined]
        shared.map(give_lock, range(5))
    assert shared.apply(give_lock, (4,)) == 4


def test_a_task_that_exits_raises_systemexit_here(shared: DistPool) -> None:
    with pytest.raises(SystemExit):
        shared.apply(sys.exit, (7,))
    assert shared.apply(square, (3,)) == 9


# -- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [None, 1, 3, 100, 1000])
@pytest.mark.parametrize("length", [0, 1, 100])
def test_map(shared: DistPool, chunksize: int | None, length: int) -> None:
    wanted = [number * number for number in range(length)]
    assert shared.map(square, range(length), chunksize) == wanted
    assert shared.map(square, list(range(length)), chunksize) == wanted
    assert shared.map(square, (number for number in range(length)), chunksize=chunksize) == wanted
    assert shared.map_async(square, range(length), chunksize).get(20) == wanted
    texts = [[number] for number in range(length)]
    assert shared.map(len, texts, chunksize) == [1] * length


@pytest.mark.parametrize("chunksize", [None, 1, 3])
def test_starmap(shared: DistPool, chunksize: int | None) -> None:
    for make in (tuple, list, iter, lambda pair: {pair[0]: None, pair[1]: None}.keys()):
        pairs = [make((number, number + 1)) for number in range(10)]
        if make is iter:
            pairs = [iter(range(number, number + 2)) for number in range(10)]
        elif not isinstance(pairs[0], (tuple, list)):
            pairs = [{number: 0, number + 1: 0} for number in range(10)]
        assert shared.starmap(add, pairs, chunksize) == [2 * number + 1 for number in range(10)]
    assert shared.starmap_async(add, [(1, 2, 3), (4,)], chunksize).get(20) == [6, 4]


def test_starmap_of_what_is_no_list(shared: DistPool) -> None:
    with pytest.raises(TypeError):
        shared.starmap(add, [(1, 2), 5])


@pytest.mark.parametrize("chunksize", [0, -1])
def test_bad_chunksize(shared: DistPool, chunksize: int) -> None:
    for method in (shared.map, shared.starmap, shared.map_async, shared.imap, shared.imap_unordered):
        with pytest.raises(ValueError, match="Chunksize must be 1+"):
            method(square, [1, 2], chunksize)


def sizes(path: Path, number: int) -> int:
    note(path, number)
    return number


@pytest.mark.parametrize(("length", "chunksize", "chunks"), [(100, None, 8), (9, None, 5), (3, None, 3), (100, 30, 4)])
def test_chunk_is_one_task(tmp_path: Path, length: int, chunksize: int | None, chunks: int) -> None:
    """Default: ceil(length / (4 * workers)). `maxtasksperchild` counts chunks: as many workers as chunks are used."""
    with DistPool(2, maxtasksperchild=1) as pool:
        assert len(set(pool.map(_ospid, range(length), chunksize))) == chunks


def test_map_is_not_failfast(shared: DistPool, tmp_path: Path) -> None:
    """The other chunks complete; the failing one ends at its error."""

    def act(number: int) -> None:
        note(tmp_path / "log", number)
        if number in (4, 9):
            raise ValueError(f"element {number}")

    with pytest.raises(ValueError, match="element 4"):
        shared.map(act, range(12), chunksize=3)
    assert sorted(map(int, noted(tmp_path / "log"))) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


class Sized:
    """Has a length and cannot be iterated."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        yield 1
        raise LookupError("no more")


def test_errors_of_the_input(shared: DistPool) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    for call in (lambda: shared.map(square, broken()), lambda: shared.map(square, Sized())):
        with pytest.raises(LookupError, match="no more") as caught:
            call()
        assert caught.value.__cause__ is None
    with pytest.raises(LookupError):
        shared.map_async(square, broken())
    result = shared.map_async(square, Sized())
    with pytest.raises(LookupError):
        result.get(10)
    with pytest.raises(TypeError):
        shared.map(square, 5)  # type: ignore[arg-type]


def test_the_list_may_be_changed_at_once(shared: DistPool) -> None:
    for chunksize in (1, 10, None):
        numbers = list(range(1000))
        result = shared.map_async(square, numbers, chunksize)
        numbers.clear()
        assert result.get(20) == [number * number for number in range(1000)]


def test_map_with_policies(tmp_path: Path) -> None:
    """`timeout` and `retries` hold for every task, whichever method started it."""

    def flaky(number: int) -> int:
        path = tmp_path / str(number)
        note(path, 1)
        if len(noted(path)) < 3:
            raise ValueError("not yet")
        return number

    def unpack(number: int) -> int:
        return flaky(number + 100)

    with DistPool(2, retries=2) as pool:
        assert pool.map(flaky, range(6), chunksize=1) == list(range(6))
        assert pool.map(unpack, range(3), chunksize=1) == [100, 101, 102]
        assert list(pool.imap(flaky, (number for number in range(200, 206)))) == list(range(200, 206))
        assert sorted(pool.imap_unordered(flaky, range(300, 330))) == list(range(300, 330))
        assert pool.apply(flaky, (400,)) == 400
        assert pool.starmap(add, [(1, 2)] * 20, chunksize=5) == [3] * 20
        assert pool.map(square, range(100), chunksize=7) == [number * number for number in range(100)]
        assert [*pool.imap(len, [[1], [2, 3]], chunksize=2)] == [1, 2]
        with pytest.raises(pickle.PicklingError):
            pool.map(square, [threading.Lock()])
    with DistPool(2, timeout=1) as pool:
        assert pool.map(abs, range(10)) == list(range(10))
        result = pool.map_async(time.sleep, [0, 100, 0], chunksize=1)
        with pytest.raises(TimeoutError, match=r"ran for more than 1 seconds"):
            result.get(20)


# -- fault isolation --------------------------------------------------------------------------------------------------


def test_a_killed_task_costs_itself() -> None:
    with DistPool(2) as pool:
        results = [pool.apply_async(die_at, (3, number)) for number in range(20)]
        for number, result in enumerate(results):
            if number != 3:
                assert result.get(20) == number
        with pytest.raises(ProcessExitedException) as caught:
            results[3].get(20)
        assert caught.value.exitcode == -9
        assert pool.map(square, range(10)) == [number * number for number in range(10)]


@pytest.mark.parametrize("chunksize", [1, 4])
def test_a_killed_task_of_a_map_leaves_the_other_chunks(tmp_path: Path, chunksize: int) -> None:
    def act(number: int) -> int:
        note(tmp_path / str(number), 1)
        return die_at(5, number)

    with DistPool(2) as pool:
        with pytest.raises(ProcessExitedException):
            pool.map(act, range(40), chunksize)
        ran = {int(path.name) for path in tmp_path.iterdir()}
        assert ran >= set(range(40)) - ({6, 7} if chunksize == 4 else set())
        results = pool.imap(act, range(40))
        found = []
        for number in range(40):
            try:
                found.append(next(results))
            except ProcessExitedException:
                found.append(-number)
        assert found == [number if number != 5 else -5 for number in range(40)]


# -- initializer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_initializer_runs_in_every_worker_of_a_pool_that_is_closed_at_once(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "log"
    pool = DistPool(workers, initializer=note, initargs=(path, "ran"))
    pool.close()
    pool.join()
    assert noted(path) == ["ran"] * workers


def _remember(value: int) -> None:
    sys._distpool_test = value  # type: ignore[attr-defined]


def _recall(number: int) -> int:
    return sys._distpool_test + number  # type: ignore[attr-defined, no-any-return]


def test_initializer_comes_first() -> None:
    with DistPool(2, _remember, (100,)) as pool:
        assert pool.map(_recall, range(20), 1) == list(range(100, 120))


def test_maxtasksperchild() -> None:
    with DistPool(2, maxtasksperchild=3) as pool:
        pids = pool.map(_ospid, range(60), chunksize=1)
    counts = [pids.count(pid) for pid in set(pids)]
    assert max(counts) <= 3
    assert sum(counts) == 60


# -- the end ----------------------------------------------------------------------------------------------------------


CALLS: dict[str, Callable[[DistPool], Any]] = {
    "apply": lambda pool: pool.apply(square, (1,)),
    "apply_async": lambda pool: pool.apply_async(square, (1,)),
    "map": lambda pool: pool.map(square, [1]),
    "map_async": lambda pool: pool.map_async(square, [1]),
    "starmap": lambda pool: pool.starmap(square, [(1,)]),
    "starmap_async": lambda pool: pool.starmap_async(square, [(1,)]),
    "imap": lambda pool: pool.imap(square, [1]),
    "imap chunks": lambda pool: pool.imap(square, [1], 2),
    "imap_unordered": lambda pool: pool.imap_unordered(square, [1]),
    "pmap": lambda pool: pool.pmap(square, [1]),
    "function pmap": lambda pool: distpool.pmap(square, [1], pool=pool),
    "function pgenerate": lambda pool: distpool.pgenerate(square, [1], pool=pool),
    "with": lambda pool: pool.__enter__(),
}


def test_not_running() -> None:
    closed, terminated = DistPool(1), DistPool(1)
    closed.close()
    terminated.terminate()
    for name, call in CALLS.items():
        for pool in (closed, terminated):
            with pytest.raises(ValueError, match="Pool not running"):
                call(pool)
                pytest.fail(name)
    for pool in (closed, terminated):
        pool.close()
        pool.join()
        pool.join()
        pool.terminate()
        pool.terminate()
        pool.join()


def test_join_of_a_running_pool(shared: DistPool) -> None:
    with pytest.raises(ValueError, match="Pool is still running"):
        shared.join()


def test_close_completes_what_is_pending(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def act(number: int) -> int:
        time.sleep(0.005)
        note(path, number)
        return number

    pool = DistPool(2)
    calls = [pool.apply_async(act, (number,)) for number in range(20)]
    mapped = pool.map_async(act, range(20, 40))
    lazy = pool.imap(act, range(40, 100))
    generated = pool.imap_unordered(act, (number for number in range(100, 160)))
    pool.imap(act, range(160, 200))  # nobody reads these; they run all the same
    pool.imap_unordered(act, (number for number in range(200, 240)), chunksize=3)
    pool.close()
    pool.join()
    assert sorted(map(int, noted(path))) == list(range(240))
    assert [call.get(0) for call in calls] == list(range(20))
    assert mapped.get(0) == list(range(20, 40))
    assert list(lazy) == list(range(40, 100))
    assert sorted(generated) == list(range(100, 160))


def test_a_closed_pool_serves_its_iterators() -> None:
    pool = DistPool(2)
    results = pool.imap(square, (number for number in range(100)))
    pool.close()
    got = []
    for value in results:
        got.append(value)
        time.sleep(0.0005)  # the workers are idle in between, and must not leave
    assert got == [number * number for number in range(100)]
    pool.join()


def test_an_iterator_that_was_left_does_not_hold_up_join() -> None:
    pool = DistPool(2)
    for value in pool.imap(square, itertools.count()):
        if value > 100:
            break
    del value
    gc.collect()
    pool.close()
    pool.join()


def test_join_waits_for_callbacks() -> None:
    for _ in range(5):
        values: list[Any] = []

        def slowly(value: Any, values: list[Any] = values) -> None:
            time.sleep(0.002)
            values.append(value)

        pool = DistPool(2)
        for number in range(20):
            pool.apply_async(square, (number,), callback=slowly)
        pool.map_async(square, range(3), callback=slowly)
        pool.close()
        pool.join()
        assert len(values) == 21


@pytest.mark.parametrize("inside", [False, True])
def test_terminate_ends_every_wait(inside: bool) -> None:
    """Nobody hangs, whether waiting before or after; callbacks are not told."""
    told: list[Any] = []
    pool = DistPool(2)
    pending = [pool.apply_async(time.sleep, (100,), callback=told.append, error_callback=told.append) for _ in range(5)]
    pending += [pool.apply_async(time.sleep, (100,)) for _ in range(20)]
    pending += [
        pool.map_async(time.sleep, [100] * 30),
        pool.map_async(time.sleep, [100] * 30, error_callback=told.append),
    ]
    lazy = pool.imap(time.sleep, itertools.repeat(100))
    ends: queue.Queue[BaseException] = queue.Queue()

    def wait(get: Callable[[], Any]) -> None:
        try:
            get()
        except BaseException as error:
            ends.put(error)

    waits: list[Callable[[], Any]] = [*(result.get for result in pending), lambda: next(lazy)]
    threads = [threading.Thread(target=wait, args=(get,)) for get in waits] if inside else []
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    pool.terminate()
    assert time.monotonic() - begin < 5
    if not inside:
        for get in waits:
            wait(get)
    errors = [ends.get(timeout=10) for _ in waits]
    for thread in threads:
        thread.join(10)
    assert {type(error) for error in errors} == {PoolTerminated}
    assert all("the pool was terminated" in str(error) for error in errors)
    pool.join()
    assert told == []


def test_with_terminates() -> None:
    with DistPool(2) as pool:
        result = pool.apply_async(time.sleep, (100,))
    assert repr(pool) == "<distpool.pool.DistPool state=TERMINATE pool_size=2>"
    with pytest.raises(PoolTerminated):
        result.get(10)


def test_results_outlive_the_pool() -> None:
    with DistPool(2) as pool:
        result = pool.map_async(square, range(10))
        result.wait()
    assert result.get() == [number * number for number in range(10)]


def test_a_forgotten_pool_warns_and_its_workers_go() -> None:
    pool = DistPool(2)
    assert pool.apply(square, (3,)) == 9
    crew = pool._crew
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
        del pool
        gc.collect()
    assert crew.finished.wait(20)


def test_a_forgotten_pool_completes_what_is_pending() -> None:
    with pytest.warns(ResourceWarning):
        result = DistPool(2).map_async(square, range(100), 1)
        gc.collect()
    assert result.get(20) == [number * number for number in range(100)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_iterator_keeps_its_pool() -> None:
    assert list(DistPool(2).imap(square, (number for number in range(200)))) == [number**2 for number in range(200)]
    gc.collect()


def test_closed_and_terminated_pools_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with DistPool(1) as pool:
            pass
        closed = DistPool(1)
        closed.close()
        closed.join()
        del pool, closed
        gc.collect()


def test_a_forked_child_is_told_and_may_leave() -> None:
    with DistPool(1) as pool:
        assert pool.apply(square, (3,)) == 9
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for call in CALLS.values():
                    try:
                        call(pool) if call is not CALLS["with"] else pool.apply_async(square, (1,))
                    except RuntimeError:
                        pass
                    else:
                        os._exit(2)
                pool.terminate()
                pool.join()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert pool.apply(square, (4,)) == 16


PROGRAM = """
import atexit, sys, threading, time
from distpool import DistPool

def work(number):
    time.sleep(0.01)
    return number

pool = DistPool(2)
assert pool.map(work, range(4)) == [0, 1, 2, 3]
"""


@pytest.mark.parametrize(
    ("rest", "stdout"),
    [
        ("", ""),
        ("pool.apply_async(time.sleep, (100,))", ""),
        ("pool.apply_async(time.sleep, (100,), callback=print, error_callback=print); pool.close()", ""),
        ("it = pool.imap(work, iter(int, 1)); next(it)", ""),
        ("threading.Thread(target=lambda: pool.apply_async(time.sleep, (100,)).get(), daemon=True).start()", ""),
        ("atexit.register(lambda: print(pool.apply(work, (5,))))", "5\n"),
        # As the standard library's: the program's own threads may use the pool until they end.
        (
            "threading.Thread(target=lambda: (threading.main_thread().join(), print(pool.map(work, [7])))).start()",
            "[7]\n",
        ),
        ("class Keep: pool = pool; it = pool.imap(work, range(100))", ""),
    ],
)
def test_end_of_the_program(rest: str, stdout: str, tmp_path: Path) -> None:
    """Terminated like the standard library's: at once, silently."""
    (tmp_path / "program.py").write_text(PROGRAM + rest + "\n")
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(Path(distpool.__file__).parents[1])},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, stdout, "")
    assert time.monotonic() - begin < 20


# -- beyond multiprocessing.Pool --------------------------------------------------------------------------------------


def test_pmap(shared: DistPool) -> None:
    assert shared.pmap(square, range(10)) == [number * number for number in range(10)]
    assert shared.pmap(lambda n: fail_at(3, n), range(5), on_error=lambda error: -1) == [0, 1, 2, -1, 4]


class Bar:
    """What `progress=` may be: a factory whose bars count."""

    bars: list[Bar] = []

    def __init__(self, total: int | None = None) -> None:
        self.total, self.done, self.closed = total, 0, 0
        Bar.bars.append(self)

    def update(self, count: int) -> None:
        assert count > 0
        self.done += count

    def close(self) -> None:
        self.closed += 1


def test_progress() -> None:
    def last() -> tuple[int | None, int, int]:
        bar = Bar.bars.pop()
        return bar.total, bar.done, bar.closed

    with DistPool(2, progress=Bar) as pool:
        for chunksize in (None, 1, 3, 1000):
            assert pool.map(square, range(1000), chunksize) == [number * number for number in range(1000)]
            assert last() == (1000, 1000, 1)
        assert pool.starmap(add, [(1, 2)] * 10) == [3] * 10
        assert last() == (10, 10, 1)
        assert pool.map(square, []) == []
        assert len(list(pool.imap(square, range(10)))) == 10
        assert last() == (10, 10, 1)
        assert len(list(pool.imap_unordered(square, iter(range(10))))) == 10
        assert last() == (None, 10, 1)
        assert len(list(pool.imap(square, range(10), 3))) == 10
        assert last() == (10, 10, 1)
        assert pool.apply(square, (3,)) == 9
    assert Bar.bars == []
