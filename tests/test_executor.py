"""`ClusterExecutor` from outside: API section 1, on two local workers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import itertools
import math
import multiprocessing
import multiprocessing.pool
import operator
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from faults.helpers import Gate, hold, note, noted, show

import distpool
from distpool import ClusterExecutor, ProcessExitedException, SerializationError

PATIENCE = 30.0
UNUSABLE = "A child process terminated abruptly, the process pool is not usable anymore"


@pytest.fixture(scope="module")
def shared() -> Iterator[ClusterExecutor]:
    """For what leaves an executor as it was: two workers, both up."""
    with ClusterExecutor(2) as executor:
        gate = Gate()
        futures = [executor.submit(hold, gate.address) for _ in range(2)]
        gate.arrivals(2)
        gate.close()
        for future in futures:
            future.result(PATIENCE)
        yield executor


def run_program(text: str, *arguments: str, timeout: float = 40.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments], capture_output=True, text=True, timeout=timeout
    )


def square(number: int) -> int:
    return number * number


def fail(error: BaseException) -> None:
    raise error


def collect(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def ospid(*_: Any) -> int:
    return os.getpid()


# --------------------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize("count", [0, -1, -(10**6)])
def test_number_of_workers_must_be_positive(count: int) -> None:
    with pytest.raises(ValueError, match="^max_workers must be greater than 0$"):
        ClusterExecutor(max_workers=count)
    with pytest.raises(ValueError, match="^max_workers must be greater than 0$"):
        ClusterExecutor(count)


@pytest.mark.parametrize("count", [1.5, True, object()])
def test_number_of_workers_must_be_a_number(count: Any) -> None:
    with pytest.raises(TypeError):
        ClusterExecutor(count)


def test_initializer_must_be_callable() -> None:
    with pytest.raises(TypeError, match="^initializer must be a callable$"):
        ClusterExecutor(1, initializer="print")  # type: ignore[arg-type]


def test_max_tasks_per_child_is_checked() -> None:
    with pytest.raises(TypeError, match="max_tasks_per_child must be an integer"):
        ClusterExecutor(1, max_tasks_per_child="3")  # type: ignore[arg-type]
    for count in (0, -1):
        with pytest.raises(ValueError, match="max_tasks_per_child must be >= 1"):
            ClusterExecutor(1, max_tasks_per_child=count)
    with pytest.raises(ValueError, match="fork"):
        ClusterExecutor(1, multiprocessing.get_context("fork"), max_tasks_per_child=3)


def test_other_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="on_worker_exit"):
        ClusterExecutor(1, on_worker_exit="ignore")
    with pytest.raises(ValueError, match="Invalid keyword argument foo"):
        ClusterExecutor(1, foo=1)
    with pytest.raises(ValueError, match="timeout"):
        ClusterExecutor(1, timeout=0)
    with pytest.raises(TypeError, match="timeout"):
        ClusterExecutor(1, timeout="soon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="retries"):
        ClusterExecutor(1, retries=-1)
    with pytest.raises(TypeError, match="retries"):
        ClusterExecutor(1, retries=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="retry_check"):
        ClusterExecutor(1, retry_check=5)


def test_arguments_of_no_initializer(make: Callable[..., ClusterExecutor]) -> None:
    """Nobody looks at them, in the standard library either."""
    assert make(1, initargs=None).submit(square, 3).result(PATIENCE) == 9
    with pytest.raises(TypeError, match="^initargs must be .*: 'NoneType' object is not iterable$"):
        ClusterExecutor(1, initializer=print, initargs=None)  # type: ignore[arg-type]


def test_unpicklable_initargs_are_an_error_at_once() -> None:
    with pytest.raises(Exception, match="lock") as caught:
        ClusterExecutor(1, initializer=print, initargs=(threading.Lock(),))
    assert isinstance(caught.value, (TypeError, pickle.PicklingError))


def test_ways_to_say_how_many(make: Callable[..., ClusterExecutor]) -> None:
    assert make(3)._max_workers == 3
    assert make(max_workers=3)._max_workers == 3
    assert make("local://2")._max_workers == 2
    assert make(distpool.LocalManager(2))._max_workers == 2
    assert make()._max_workers >= 1


def test_construction_returns_at_once(make: Callable[..., ClusterExecutor]) -> None:
    begin = time.monotonic()
    executor = make(2)
    assert time.monotonic() - begin < 1
    assert executor.submit(square, 3).result(PATIENCE) == 9


def test_it_is_an_executor_and_nothing_else(shared: ClusterExecutor) -> None:
    """What libraries ask (DROPIN): dask takes a callable one, or one with "Client" in its name, for something else."""
    assert isinstance(shared, concurrent.futures.Executor)
    assert not callable(shared) and "Client" not in type(shared).__name__


def test_a_launch_that_fails_fails_every_future(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(2, exename="/does/not/exist/python")
    futures = [executor.submit(square, number) for number in range(5)]
    for future in futures:
        assert isinstance(future.exception(PATIENCE), Exception)
    with pytest.raises(Exception):
        list(executor.map(square, range(3), timeout=PATIENCE))


# --------------------------------------------------------------------------------------------------------------- submit


def test_submit_gives_a_future(shared: ClusterExecutor) -> None:
    future = shared.submit(pow, 2, 10)
    assert isinstance(future, distpool.Future) and isinstance(future, concurrent.futures.Future)
    assert future.result(PATIENCE) == 1024
    assert future.done() and not future.cancel()


def test_submit_takes_its_own_names_as_keywords(shared: ClusterExecutor) -> None:
    future = shared.submit(collect, 1, self=2, fn=3, args=4, kwargs=5)
    assert future.result(PATIENCE) == ((1,), {"self": 2, "fn": 3, "args": 4, "kwargs": 5})


def test_submit_needs_a_function(shared: ClusterExecutor) -> None:
    with pytest.raises(TypeError):
        shared.submit()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        shared.submit(fn=square)  # type: ignore[call-arg]


def test_runs_in_another_process(shared: ClusterExecutor) -> None:
    found = {future.result(PATIENCE) for future in [shared.submit(ospid) for _ in range(50)]}
    assert os.getpid() not in found and len(found) <= 2


def test_what_may_be_called(shared: ClusterExecutor) -> None:
    captured = [5]

    def nested(x: int) -> int:
        return x + captured[0]

    class Local:
        def __init__(self, number: int) -> None:
            self.number = number

        def add(self, x: int) -> int:
            return self.number + x

        def __call__(self, x: int) -> int:
            return self.number * x

        @staticmethod
        def static(x: int) -> int:
            return x

    calls: list[tuple[Callable[[int], Any], Any]] = [
        (lambda x: x + 1, 4),
        (nested, 8),
        (functools.partial(operator.add, 1), 4),
        (Local(3).add, 6),
        (Local(3), 9),
        (Local.static, 3),
        (math.sqrt, math.sqrt(3)),
        ([9, 8, 7, 6].__getitem__, 6),
        (str, "3"),
        (operator.methodcaller("bit_length"), 2),
    ]
    for function, expected in calls:
        assert shared.submit(function, 3).result(PATIENCE) == expected
        assert list(shared.map(function, [3, 3])) == [expected] * 2


def test_instances_of_a_local_class_come_home_as_such(shared: ClusterExecutor) -> None:
    class Thing:
        def __init__(self, value: int) -> None:
            self.value = value

    back = shared.submit(lambda thing: Thing(thing.value + 1), Thing(1)).result(PATIENCE)
    assert isinstance(back, Thing) and back.value == 2


def test_arguments_are_as_they_were_at_the_call(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(1)
    blocker = executor.submit(hold, gate.address)
    gate.arrival()
    data, big = [1], bytearray(b"a" * (1 << 20))
    small_one, big_one = executor.submit(sum, data), executor.submit(bytes, pickle.PickleBuffer(big))
    mapped = executor.map(sum, [data, data])
    data.append(100)
    big[:] = b"b" * len(big)
    gate.close()
    assert small_one.result(PATIENCE) == 1
    assert set(big_one.result(PATIENCE)) == {ord("a")}
    assert list(mapped) == [1, 1]
    blocker.result(PATIENCE)


def test_a_mutable_capture_is_fresh_for_each_call(shared: ClusterExecutor) -> None:
    """As with the standard library, where each task is pickled by itself."""
    seen: list[int] = []

    def remember(x: int) -> list[int]:
        seen.append(x)
        return list(seen)

    assert [shared.submit(remember, n).result(PATIENCE) for n in range(4)] == [[n] for n in range(4)]
    assert seen == []


@pytest.mark.parametrize("size", [0, 1, 1000, 70_000, 300_000, 5_000_000])
def test_values_of_every_size(shared: ClusterExecutor, size: int) -> None:
    data = os.urandom(size)
    assert shared.submit(bytes, data).result(PATIENCE) == data
    assert list(shared.map(bytes, [data, data])) == [data, data]


def test_many_small_calls_of_many_threads(shared: ClusterExecutor) -> None:
    totals: list[int] = []

    def work(start: int) -> None:
        futures = [shared.submit(square, start + n) for n in range(300)]
        totals.append(sum(future.result(PATIENCE) for future in futures) - sum((start + n) ** 2 for n in range(300)))

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert totals == [0] * 6


# --------------------------------------------------------------------------------------------------------------- errors


def test_the_original_exception_with_the_remote_traceback(shared: ClusterExecutor) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        shared.submit(lambda: 1 / 0).result(PATIENCE)
    cause = caught.value.__cause__
    assert type(cause) is concurrent.futures.process._RemoteTraceback  # type: ignore[attr-defined]
    assert "1 / 0" in cause.tb and "ZeroDivisionError" in cause.tb  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [0, 7, "bye", None])
def test_sys_exit_is_an_outcome_and_the_worker_lives(make: Callable[..., ClusterExecutor], code: Any) -> None:
    executor = make(1)
    before = executor.submit(ospid).result(PATIENCE)
    with pytest.raises(SystemExit) as caught:
        executor.submit(sys.exit, code).result(PATIENCE)
    assert caught.value.code == code
    with pytest.raises(SystemExit):
        list(executor.map(sys.exit, [code]))
    assert executor.submit(ospid).result(PATIENCE) == before


def test_what_cannot_be_sent_is_the_error_of_that_future(shared: ClusterExecutor) -> None:
    lock = threading.Lock()
    bad = shared.submit(square, lock)  # type: ignore[arg-type]
    good = shared.submit(square, 2)
    assert isinstance(bad.exception(PATIENCE), (SerializationError, pickle.PicklingError))
    assert "lock" in str(bad.exception())
    assert good.result(PATIENCE) == 4
    assert isinstance(shared.submit(threading.Lock).exception(PATIENCE), pickle.PicklingError)
    assert isinstance(shared.submit(lambda: lock).exception(PATIENCE), pickle.PicklingError)


def test_a_dead_worker_costs_one_call(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(2)
    futures = [executor.submit(square, n) for n in range(10)]
    bad = executor.submit(os._exit, 7)
    futures += [executor.submit(square, n) for n in range(10, 20)]
    error = bad.exception(PATIENCE)
    assert isinstance(error, ProcessExitedException) and isinstance(error, BrokenProcessPool)
    assert error.exitcode == 7 and error.maybe_ran and error.worker_id >= 2
    assert [future.result(PATIENCE) for future in futures] == [n * n for n in range(20)]
    held = [executor.submit(hold, gate.address) for _ in range(2)]
    assert len({arrival.ospid for arrival in gate.arrivals(2)}) == 2, "it was replaced"
    gate.close()
    for future in held:
        future.result(PATIENCE)


def test_break_is_the_rule_of_the_standard_library(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(2, on_worker_exit="break")
    held = executor.submit(hold, gate.address)
    gate.arrival()
    waiting = [executor.submit(square, n) for n in range(20)]
    bad = executor.submit(os._exit, 1)
    assert isinstance(bad.exception(PATIENCE), BrokenProcessPool)
    assert isinstance(held.exception(PATIENCE), BrokenProcessPool)
    errors = [future.exception(PATIENCE) for future in waiting]
    assert all(error is None or isinstance(error, BrokenProcessPool) for error in errors)
    with pytest.raises(BrokenProcessPool, match=f"^{UNUSABLE}$") as caught:
        executor.submit(square, 1)
    assert type(caught.value) is BrokenProcessPool
    assert isinstance(caught.value.__cause__.__cause__, ProcessExitedException), "what it died of"  # type: ignore[union-attr]
    with pytest.raises(BrokenProcessPool):
        executor.map(square, [1])
    assert executor._broken == UNUSABLE
    executor.shutdown()


# ---------------------------------------------------------------------------------------------------------- initializer


def _set_level(level: int) -> None:
    globals()["_level"] = level


def _get_level() -> int:
    return globals()["_level"]  # type: ignore[no-any-return]


def test_initializer_runs_first_in_every_worker(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(2, initializer=_set_level, initargs=(42,))
    futures = [executor.submit(hold, gate.address) for _ in range(2)]
    gate.arrivals(2)
    gate.close()
    [future.result(PATIENCE) for future in futures]
    for pid in executor.workers:
        assert executor.options(pids=pid).submit(_get_level).result(PATIENCE) == 42


def test_initializer_runs_in_replacements(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(1, initializer=_set_level, initargs=(7,))
    assert executor.submit(_get_level).result(PATIENCE) == 7
    assert executor.submit(os._exit, 1).exception(PATIENCE)
    assert executor.submit(_get_level).result(PATIENCE) == 7


def test_globals_of_a_script_that_the_initializer_set_are_there_in_every_call(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            from distpool import ClusterExecutor, DistPool
            data, extra = None, {}
            def init(value):
                global data
                data = value
                extra["double"] = 2 * value
            def work(x): return data + x, extra["double"], os.getpid()
            with ClusterExecutor(2, initializer=init, initargs=(10,), max_tasks_per_child=2) as executor:
                results = list(executor.map(work, range(6)))
                assert [found[:2] for found in results] == [(10 + x, 20) for x in range(6)]
                assert len({found[2] for found in results}) >= 3
                assert executor.submit(work, 5).result(30)[:2] == (15, 20)
                assert executor.pmap(lambda x: work(x)[0], [1, 2], batch_size=2) == [11, 12]
            with DistPool(1, init, (1,)) as pool:
                assert pool.map(work, [1])[0][:2] == pool.apply(work, (1,))[:2] == (2, 2)
            assert data is None and extra == {}
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")


def test_break_also_by_a_death_before_the_worker_has_come_up(make: Callable[..., ClusterExecutor]) -> None:
    for _ in range(5):
        executor = make(3, on_worker_exit="break")
        future = executor.submit(time.sleep, 3)
        processes = executor._processes
        assert processes
        next(iter(processes.values())).terminate()
        with pytest.raises(BrokenProcessPool):
            future.result(PATIENCE)
        with pytest.raises(BrokenProcessPool, match=f"^{UNUSABLE}$"):
            executor.submit(pow, 2, 8)


def test_a_failing_initializer_breaks_the_executor(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(2, initializer=fail, initargs=(KeyError("no setup"),))
    futures = [executor.submit(square, n) for n in range(5)]
    for future in futures:
        with pytest.raises(BrokenProcessPool, match="initializer"):
            future.result(PATIENCE)
    with pytest.raises(BrokenProcessPool):
        executor.submit(square, 1)
    assert "initializer" in str(executor._broken)


def test_initializer_runs_without_any_call(make: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    executor = make(1, initializer=note, initargs=(tmp_path / "notes", "ran"))
    executor.shutdown()
    assert noted(tmp_path / "notes") == {"ran": 1}


# ------------------------------------------------------------------------------------------------------------------ map


def test_map_keeps_the_order_and_stops_at_the_shortest(shared: ClusterExecutor) -> None:
    assert list(shared.map(pow, [2, 3, 4], [5, 6])) == [32, 729]
    assert list(shared.map(square, range(2000))) == [n * n for n in range(2000)]
    assert list(shared.map(square, [])) == []
    assert list(shared.map(square)) == []
    assert list(shared.map(collect, "ab", [1, 2])) == [(("a", 1), {}), (("b", 2), {})]


@pytest.mark.parametrize("chunksize", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("buffersize", [None, 1, 3, 50])
def test_map_with_chunks_and_buffers(shared: ClusterExecutor, chunksize: int, buffersize: int | None) -> None:
    assert list(shared.map(square, range(23), chunksize=chunksize, buffersize=buffersize)) == [n * n for n in range(23)]
    two = shared.map(pow, range(23), itertools.repeat(2), chunksize=chunksize, buffersize=buffersize)
    assert list(two) == [n * n for n in range(23)]
    lists = shared.map(len, [[0] * n for n in range(9)], chunksize=chunksize, buffersize=buffersize)
    assert list(lists) == list(range(9))


@pytest.mark.parametrize("bad", [0, -1])
def test_map_checks_its_arguments(shared: ClusterExecutor, bad: int) -> None:
    with pytest.raises(ValueError, match=r"^chunksize must be >= 1\.$"):
        shared.map(square, [1], chunksize=bad)
    with pytest.raises(ValueError, match="^buffersize must be None or > 0$"):
        shared.map(square, [1], buffersize=bad)
    with pytest.raises(TypeError, match="^buffersize must be an integer or None$"):
        shared.map(square, [1], buffersize=1.5)  # type: ignore[arg-type]


def test_map_raises_at_the_element_that_failed(shared: ClusterExecutor) -> None:
    results = shared.map(operator.floordiv, [6] * 4, [3, 2, 0, 1])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
    assert shared.submit(square, 2).result(PATIENCE) == 4


def test_map_takes_its_input_at_the_call(shared: ClusterExecutor) -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for n in range(50):
            taken.append(n)
            yield n

    results = shared.map(square, numbers())
    assert len(taken) == 50
    assert list(results) == [n * n for n in range(50)]


def test_map_input_that_raises_raises_at_the_call(shared: ClusterExecutor) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise OSError("input")

    with pytest.raises(OSError, match="input") as caught:
        shared.map(square, numbers())
    assert caught.value.__cause__ is None


def test_map_with_a_buffer_delivers_before_it_raises_the_inputs_error(shared: ClusterExecutor) -> None:
    def numbers() -> Iterator[int]:
        yield from range(3)
        raise OSError("input")

    results = shared.map(square, numbers(), buffersize=2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(OSError, match="input"):
        next(results)


POLICIES: list[dict[str, Any]] = [{}, {"label": "x"}, {"timeout": 60}, {"retries": 1}]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_was_taken_is_delivered_before_the_inputs_error(shared: ClusterExecutor, policy: dict[str, Any]) -> None:
    """Whatever the view's policy, the chunks and the buffer are, and where in a chunk the input fails."""

    def numbers(count: int) -> Iterator[int]:
        yield from range(count)
        raise OSError("input")

    view = shared.options(**policy)
    for count, buffersize in itertools.product((0, 2, 7), (1, 3, 10)):
        for chunksize in (1, 2, 3):
            results = view.map(square, numbers(count), buffersize=buffersize, chunksize=chunksize)
            assert [next(results) for _ in range(count)] == [n * n for n in range(count)]
            with pytest.raises(OSError, match="input") as caught:
                next(results)
            assert caught.value.__cause__ is None
        results = view.imap_unordered(square, numbers(count), buffersize=buffersize)
        assert sorted(next(results) for _ in range(count)) == [n * n for n in range(count)]
        with pytest.raises(OSError, match="input"):
            next(results)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_map_with_a_buffer_that_meets_an_error(shared: ClusterExecutor, policy: dict[str, Any]) -> None:
    """The standard library's count: what was taken is the failed element and `buffersize` after it."""
    numbers = iter([1, 2, 3, 0, 4, 5, 6])
    found: list[float] = []
    with pytest.raises(ZeroDivisionError):
        for value in shared.options(**policy).map(operator.truediv, itertools.repeat(1), numbers, buffersize=2):
            found.append(value)  # noqa: PERF402
    assert found == [1, 1 / 2, 1 / 3]
    assert next(numbers) == 6


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"chunksize": 3}, {"buffersize": 4}, {"chunksize": 3, "buffersize": 4}], ids=str
)
def test_a_map_can_be_closed(shared: ClusterExecutor, options: dict[str, int], policy: dict[str, Any]) -> None:
    results: Any = shared.options(**policy).map(square, range(100), **options)
    assert next(results) == 0
    results.close()
    assert list(results) == []


def test_map_with_a_buffer_is_lazy(shared: ClusterExecutor) -> None:
    taken = itertools.count()
    results = shared.map(square, taken, buffersize=4)
    assert next(results) == 0
    assert next(taken) == 5
    results.close() if hasattr(results, "close") else None


def test_map_time_limit_counts_from_the_call(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(1)
    for options in ({}, {"chunksize": 2}, {"buffersize": 2}):
        results = executor.map(functools.partial(hold, gate.address), [1, 2], timeout=0.2, **options)
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            next(results)
        assert time.monotonic() - begin < 5
        executor.kill_workers()
        executor = make(1)


def test_map_goes_through_a_replaced_submit(make: Callable[..., ClusterExecutor]) -> None:
    """tqdm and others replace `submit` on the instance."""
    executor = make(1)
    calls: list[Any] = []
    original = executor.submit

    def submit(fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        calls.append(fn)
        return original(fn, *args, **kwargs)

    executor.submit = submit  # type: ignore[method-assign]
    assert list(executor.map(square, range(5))) == [0, 1, 4, 9, 16]
    assert list(executor.map(square, range(5), chunksize=2)) == [0, 1, 4, 9, 16]
    assert list(executor.map(square, range(5), buffersize=2)) == [0, 1, 4, 9, 16]
    assert len(calls) == 13


def test_map_goes_through_the_submit_of_a_subclass() -> None:
    class Noting(ClusterExecutor):
        calls = 0

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().submit(fn, *args, **kwargs)

    with Noting(1) as executor:
        assert list(executor.map(square, range(5))) == [0, 1, 4, 9, 16]
        assert executor.calls == 5


def test_a_module_that_submits_while_it_is_imported(tmp_path: Path) -> None:
    """Workers that imported it would run it again, and their workers again, without end."""
    (tmp_path / "jobs.py").write_text(
        textwrap.dedent("""
            import dataclasses, functools, os
            from distpool import ClusterExecutor, DistPool

            @dataclasses.dataclass
            class Point:
                x: int
                def moved(self): return Point(self.x + 1)
            class Trouble(Exception): pass
            def square(x): return x * x
            def cube(x): return square(x) * x
            def fail(): raise Trouble("here")

            with open(os.environ["RUNS"], "a") as runs:
                runs.write("run\\n")
            with ClusterExecutor(2) as executor, DistPool(1) as pool:
                assert list(executor.map(cube, range(3))) == pool.map(cube, range(3)) == [0, 1, 8]
                assert executor.submit(functools.partial(cube, 3)).result() == 27
                assert executor.submit(Point(1).moved).result() == Point(2) == executor.submit(Point, 2).result()
                assert executor.submit(lambda point: point.x, Point(4)).result() == 4
                assert isinstance(executor.submit(fail).exception(), Trouble)
        """)
    )
    program = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import distpool, jobs
        from cloudpickle import list_registry_pickle_by_value
        with distpool.ClusterExecutor(1) as executor:
            assert executor.submit(abs, -1).result() == 1
        assert not list_registry_pickle_by_value()  # from now on by reference, as any other
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        env={**os.environ, "RUNS": str(tmp_path / "runs")}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "runs").read_text() == "run\n"


def test_comparing_bytes_with_text_may_be_an_error() -> None:
    """`python -bb`, as some run their tests."""
    program = (
        "from distpool import ClusterExecutor\nwith ClusterExecutor(1) as ex: print(ex.submit(lambda: 7).result())"
    )
    done = subprocess.run([sys.executable, "-bb", "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_what_is_no_function_is_refused_at_the_call(shared: ClusterExecutor) -> None:
    for call in (shared.submit, shared.map, shared.imap_unordered, shared.options(retries=1).submit):
        with pytest.raises(TypeError, match="^the function must be callable, not int$"):
            call(5, [1])  # type: ignore[arg-type]


def test_map_serialises_the_function_once(shared: ClusterExecutor) -> None:
    class Counted:
        pickled = 0

        def __call__(self, x: int) -> int:
            return x

        def __reduce__(self) -> Any:
            type(self).pickled += 1
            return square, (1,)

    class Once(Counted):
        def __reduce__(self) -> Any:
            Counted.pickled += 1
            return functools.partial, (square,)

    assert list(shared.map(Once(), range(500))) == [n * n for n in range(500)]
    assert Counted.pickled == 1


def test_map_of_a_dead_worker_fails_one_element(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(2)
    results = executor.map(lambda n: os._exit(3) if n == 5 else n, range(20))
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(ProcessExitedException):
        next(results)
    assert executor.submit(square, 3).result(PATIENCE) == 9


@pytest.mark.parametrize(
    "ask",
    [
        lambda executor: executor.imap_unordered(square, range(50)),
        lambda executor: executor.options(label="view").imap_unordered(square, iter(range(50))),
        lambda executor: executor.map(square, range(50), buffersize=3),
        lambda executor: executor.map(square, range(50), buffersize=2, chunksize=5),
        lambda executor: distpool.pgenerate(square, range(50), pool=executor),
    ],
)
def test_a_lazy_map_keeps_its_executor_until_its_end(ask: Callable[[ClusterExecutor], Iterator[int]]) -> None:
    executor = ClusterExecutor(1)
    gone = weakref.ref(executor)
    results = ask(executor)
    del executor
    assert sorted(results) == [square(n) for n in range(50)]
    assert gone() is None


LAZY: dict[str, Callable[..., Any]] = {
    "imap_unordered": lambda executor, fn, items: executor.imap_unordered(fn, items),
    "buffered": lambda executor, fn, items: executor.map(fn, items, buffersize=5),
    "pgenerate": lambda executor, fn, items: distpool.pgenerate(fn, items, pool=executor),
}


@pytest.mark.parametrize("kind", [*LAZY, "map", "chunks", "view"])
def test_a_stop_iteration_of_an_element_is_no_end(shared: ClusterExecutor, kind: str) -> None:
    ways = LAZY | {
        "map": lambda executor, fn, items: executor.map(fn, items),
        "chunks": lambda executor, fn, items: executor.map(fn, items, chunksize=3),
        "view": lambda executor, fn, items: executor.options(timeout=PATIENCE).imap_unordered(fn, items),
    }
    results = ways[kind](shared, lambda items: next(iter(items)), [[1], [], [3], [4]])
    with pytest.raises(RuntimeError, match="generator raised StopIteration") as caught:
        list(results)
    assert type(caught.value.__cause__) is StopIteration
    assert list(results) == []


def test_a_dropped_map_stops(make: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    executor = make(1)
    results = executor.map(lambda n: (note(tmp_path / "ran", n), time.sleep(0.01)), range(5000))
    next(results)
    del results
    executor.shutdown()
    assert sum(noted(tmp_path / "ran").values()) < 4000


def test_imap_unordered(shared: ClusterExecutor) -> None:
    assert sorted(shared.imap_unordered(square, range(100))) == sorted(n * n for n in range(100))
    assert sorted(shared.imap_unordered(pow, [2, 3], [2, 2], buffersize=1)) == [4, 9]
    assert list(shared.imap_unordered(square, [])) == []
    for bad in (0, -1, 1.5):
        with pytest.raises((ValueError, TypeError)):
            shared.imap_unordered(square, [1], buffersize=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", LAZY)
def test_closing_while_another_thread_waits_is_refused(shared: ClusterExecutor, gate: Gate, kind: str) -> None:
    """As a generator does it. The thread would wait for ever."""
    results = LAZY[kind](shared, functools.partial(hold, gate.address), [1])
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(results), daemon=True)
    thread.start()
    gate.arrivals(1)
    with pytest.raises(ValueError, match="^generator already executing$"):
        results.close()
    gate.close()
    thread.join(PATIENCE)
    assert len(found) == 1
    results.close()


@pytest.mark.parametrize("kind", LAZY)
def test_threads_may_share_an_iterator(shared: ClusterExecutor, kind: str) -> None:
    results = LAZY[kind](shared, square, range(500))
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.extend(results), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(found) == [n * n for n in range(500)]


def test_imap_unordered_is_lazy_and_works_on_endless_input(shared: ClusterExecutor) -> None:
    taken = itertools.count()
    results = shared.imap_unordered(square, taken)
    first = [next(results) for _ in range(10)]
    assert len(set(first)) == 10
    assert next(taken) <= 10 + 8 * 2 + 2
    del results


def test_imap_unordered_gives_what_is_ready(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(2)
    address = gate.address
    results = executor.imap_unordered(lambda n: hold(address, n) if n == 0 else n, range(4), timeout=PATIENCE)
    assert sorted(itertools.islice(results, 3)) == [1, 2, 3]
    gate.arrival().release()
    assert next(results) == 0


def test_imap_unordered_time_limit(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    with pytest.raises(TimeoutError):
        next(make(1).imap_unordered(functools.partial(hold, gate.address), [1], timeout=0.2))


# -------------------------------------------------------------------------------------------------------------- options


def test_options_time_limit(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(2)
    first = [executor.submit(hold, gate.address) for _ in range(2)]  # the import of its module would count
    for arrival in gate.arrivals(2):
        arrival.release()
    [future.result(PATIENCE) for future in first]
    view = executor.options(timeout=1)
    slow, quick = view.submit(hold, gate.address), view.submit(pow, 3, 2)
    with pytest.raises(TimeoutError):
        slow.result(PATIENCE)
    assert quick.result(PATIENCE) == 9
    assert executor.submit(square, 4).result(PATIENCE) == 16
    assert isinstance(view, concurrent.futures.Executor)


def test_a_long_time_limit_is_no_limit(shared: ClusterExecutor) -> None:
    assert shared.options(timeout=10**9).submit(square, 3).result(timeout=10**8) == 9


def test_options_retries(make: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    executor = make(1)

    def flaky(name: str, good_from: int, error: BaseException) -> int:
        note(tmp_path / name, "x")
        count = noted(tmp_path / name)["x"]
        if count < good_from:
            raise error
        return count

    view = executor.options(retries=2)
    assert view.submit(flaky, "a", 3, OSError("again")).result(PATIENCE) == 3
    with pytest.raises(OSError, match="again"):
        view.submit(flaky, "b", 9, OSError("again")).result(PATIENCE)
    assert noted(tmp_path / "b")["x"] == 3
    both = (ValueError, OSError)
    checks = [(OSError, 3), (ValueError, 1), (both, 3), (lambda e: "again" in str(e), 3), (callable, 1)]
    for number, (check, calls) in enumerate(checks):
        name = f"c{number}"
        checked = executor.options(retries=2, retry_check=check)
        assert isinstance(checked.submit(flaky, name, 9, OSError("again")).exception(PATIENCE), OSError)
        assert noted(tmp_path / name)["x"] == calls


def test_options_retries_after_death(make: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    def die_once(path: Path) -> str:
        note(path, "x")
        if noted(path)["x"] == 1:
            os._exit(1)
        return "alive"

    view = make(2).options(retries=1)
    assert view.submit(die_once, tmp_path / "n").result(PATIENCE) == "alive"
    assert list(view.map(die_once, [tmp_path / "m"])) == ["alive"]


def test_options_retry_delays(make: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    view = make(1).options(retry_delays=[0.1, 0.2])
    stamps = tmp_path / "stamps"

    def stamp() -> None:
        note(stamps, time.time())
        raise OSError

    assert isinstance(view.submit(stamp).exception(PATIENCE), OSError)
    times = sorted(map(float, noted(stamps)))
    assert len(times) == 3
    assert times[1] - times[0] >= 0.09 and times[2] - times[1] >= 0.19


def test_a_retry_check_that_raises_or_leaves_ends_the_call(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(1)
    for error in (KeyError("check"), SystemExit(3)):
        view = executor.options(retries=3, retry_check=lambda _, error=error: fail(error))
        assert isinstance(view.submit(fail, OSError()).exception(PATIENCE), type(error))


def test_an_end_does_not_wait_for_a_retry(make: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    executor = make(1)
    asked = threading.Event()

    def check(error: BaseException) -> bool:
        asked.set()
        return True

    future = executor.options(retries=1, retry_delays=[300], retry_check=check).submit(fail, OSError())
    assert asked.wait(PATIENCE)
    executor.kill_workers()
    executor.shutdown()
    assert isinstance(future.exception(PATIENCE), Exception)


def test_options_pids(shared: ClusterExecutor) -> None:
    assert len(shared.workers) == 2 and shared.workers == sorted(shared.workers)
    seen = set()
    for pid in shared.workers:
        view = shared.options(pids=[pid])
        found = {view.submit(ospid).result(PATIENCE) for _ in range(5)} | set(view.map(ospid, range(5)))
        assert len(found) == 1 and view.workers == [pid]
        seen |= found
    assert len(seen) == 2
    assert shared.options(pids=shared.workers[0]).submit(square, 2).result(PATIENCE) == 4
    numbers = pytest.importorskip("numpy").array(shared.workers)
    assert shared.options(pids=numbers).workers == shared.options(pids=list(numbers)).workers == shared.workers
    assert shared.options(pids=numbers[0], retries=numbers[0]).workers == shared.workers[:1]
    with pytest.raises((RuntimeError, ValueError)):
        shared.options(pids=[987654]).submit(square, 2).result(PATIENCE)


def test_options_stack(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(1, timeout=50)
    view = executor.options(retries=1).options(label="x")
    assert view.submit(square, 2).result(PATIENCE) == 4
    assert view._max_workers == 1
    cases: list[tuple[type[Exception], dict[str, Any]]] = [
        *((ValueError, {"timeout": seconds}) for seconds in (0, -1, math.nan)),
        *((TypeError, {"timeout": seconds}) for seconds in ("1", True)),
        (ValueError, {"retries": -1}),
        (TypeError, {"retries": "x"}),
        *((ValueError, {"retry_delays": [seconds]}) for seconds in (-1, math.nan, math.inf)),
        *((TypeError, {"retry_delays": delays}) for delays in (5, ["x"])),
        *((TypeError, {"retry_check": check}) for check in (5, int, (ValueError, 5))),
        (TypeError, {"nonsense": 1}),
    ]
    bad_views = [(TypeError, {"label": 5})]
    pids = [(TypeError, {"pids": pids}) for pids in ("23", [2.5], [None])]
    for kind, bad in cases + pids + bad_views:
        for owner in (executor, view):
            with pytest.raises(kind):
                owner.options(**bad)
    for kind, bad in [*cases[:-1], (TypeError, {"progress": 5})]:
        with pytest.raises(kind):
            ClusterExecutor(1, **bad)


def test_errors_say_which_object_and_which_side(shared: ClusterExecutor) -> None:
    lock, maps = threading.Lock(), shared.options(timeout=PATIENCE)
    result = (
        r"^the result of (_thread\.|.*<lambda>|functools).* on worker \d+, an object of type _thread.lock, cannot be"
    )
    for call in (
        lambda: shared.submit(threading.Lock).result(PATIENCE),
        lambda: list(shared.map(lambda _: threading.Lock(), [1])),
        lambda: list(shared.map(lambda x: threading.Lock() if x else 0, [0, 1], chunksize=2)),
    ):
        with pytest.raises(SerializationError, match=result):
            call()
    for view in (shared, maps):
        with pytest.raises(SerializationError, match="^argument 1.* an object of type _thread.lock, cannot be"):
            list(view.map(id, [1, lock]))
    with pytest.raises(SerializationError, match="^argument 1 of element 2 of a chunk of 2, an object of type _thread"):
        list(shared.map(id, [1, lock], chunksize=2))


def test_errors_of_serialisation_are_the_standard_librarys_too(shared: ClusterExecutor) -> None:
    lock = threading.Lock()
    with distpool.DistPool(1) as pool:
        for error in (shared.submit(id, pool).exception(), shared.submit(lambda: pool).exception()):
            assert isinstance(error, SerializationError) and isinstance(error, NotImplementedError)
        with pytest.raises(NotImplementedError):
            list(shared.map(id, [pool]))
    for call in (
        lambda: shared.submit(id, lock).result(),
        lambda: shared.submit(lambda: lock).result(),
        lambda: list(shared.map(id, [lock])),
        lambda: list(shared.map(id, [lock], chunksize=2)),
    ):
        with pytest.raises(TypeError, match="cannot be serialised"):
            call()


def test_a_map_of_nothing_needs_no_executor(make: Callable[..., ClusterExecutor]) -> None:
    """As in the standard library, where it is the first element that cannot be submitted."""
    executor = make(1)
    view = executor.options(label="x")
    executor.shutdown()
    numbers = itertools.count()
    for owner in (executor, view):
        for iterables in ((), ([],), (iter(()),), ([], [1])):
            for options in ({}, {"chunksize": 3}, {"buffersize": 2}):
                assert list(owner.map(square, *iterables, **options)) == []
        with pytest.raises(RuntimeError, match="after shutdown"):
            owner.map(square, numbers)
        with pytest.raises(ValueError, match="chunksize"):
            owner.map(square, [], chunksize=0)
    assert next(numbers) == 2, "no more than one element was taken each time"


@pytest.mark.parametrize("seconds", [math.inf, 1e10])
def test_endless_patience(shared: ClusterExecutor, seconds: float) -> None:
    numbers = [0, 1, 2]
    assert sorted(shared.imap_unordered(square, numbers, timeout=seconds)) == [0, 1, 4]
    for options in ({}, {"buffersize": 2}, {"chunksize": 2}):
        assert list(shared.map(square, numbers, timeout=seconds, **options)) == [0, 1, 4]
    for owner in (shared.options(timeout=PATIENCE), shared.options(keep=True)):
        assert list(owner.map(square, numbers, timeout=seconds)) == [0, 1, 4]
        assert owner.submit(square, 3).result(seconds) == 9
    with distpool.DistPool(1) as pool:
        results: Any = pool.imap(square, numbers)
        assert [results.next(seconds) for _ in numbers] == [0, 1, 4]
        assert pool.map_async(square, numbers).get(seconds) == [0, 1, 4]
        assert pool.map_async(square, range(5000), 2500).get(seconds)[-1] == 4999**2
        assert pool.apply_async(square, (3,), callback=abs).get(seconds) == 9


def test_a_timeout_that_no_clock_reaches_is_refused(shared: ClusterExecutor, gate: Gate) -> None:
    held = shared.submit(hold, gate.address)
    with distpool.DistPool(1) as pool:
        task = pool.apply_async(hold, (gate.address,))
        lazy: Any = pool.imap(square, [1])
        for call in (
            lambda: held.result(math.nan),
            lambda: held.exception(math.nan),
            lambda: shared.options(keep=True).submit(hold, gate.address).result(math.nan),
            lambda: shared.map(square, [1], timeout=math.nan),
            lambda: shared.imap_unordered(square, [1], timeout=math.nan),
            lambda: shared.options(timeout=math.nan),
            lambda: task.get(math.nan),
            lambda: task.wait(math.nan),
            lambda: lazy.next(math.nan),
        ):
            with pytest.raises(ValueError):
                call()
        gate.close()


class _Unhashed(type):
    """Types that are no keys; the standard library's pickler has no way for their instances."""

    def __eq__(cls, other: object) -> bool:
        return cls is other


class Unhashed(metaclass=_Unhashed):
    pass


def _unhashed_if(number: int) -> Any:
    return Unhashed() if number == 3 else number


def test_objects_of_types_without_a_hash_cost_only_themselves(shared: ClusterExecutor) -> None:
    bad: Any = Unhashed()
    for future in (
        shared.submit(id, bad),
        shared.submit(id, [bad]),
        shared.submit(functools.partial(id, bad)),
        shared.submit(_unhashed_if, 3),
        shared.submit(lambda: _unhashed_if(3)),
        shared.options(keep=True).submit(_unhashed_if, 3),
        shared.options(label="x").submit(id, bad),
    ):
        assert isinstance(future.exception(PATIENCE), TypeError | SerializationError)
    assert shared.submit(id, Unhashed).exception(PATIENCE) is None, "the class itself has a name"
    values: list[Any] = [1, bad, 3, 5]
    for chunksize, buffersize in ((1, None), (2, None), (1, 3)):
        results = shared.map(abs, values, chunksize=chunksize, **_buffered(buffersize))
        with pytest.raises(SerializationError, match="unhashable"):
            list(results)
    futures = [shared.submit(_unhashed_if, number) for number in range(6)]
    assert [future.result(PATIENCE) for future in futures if future.exception(PATIENCE) is None] == [0, 1, 2, 4, 5]
    with distpool.DistPool(1) as pool:
        for endless in (iter(values), values):
            found = pool.imap(abs, endless)
            assert found.next(PATIENCE) == 1  # type: ignore[attr-defined]
            with pytest.raises(SerializationError, match="unhashable"):
                found.next(PATIENCE)  # type: ignore[attr-defined]
            assert list(found) == [3, 5]
        spans = pool.imap(_unhashed_if, range(6))
        with pytest.raises(multiprocessing.pool.MaybeEncodingError):  # type: ignore[attr-defined]
            list(spans)
        assert list(spans) == [4, 5], "it travelled with others"


def _buffered(buffersize: int | None) -> dict[str, Any]:
    return {} if buffersize is None else {"buffersize": buffersize}


def test_options_of_none_change_nothing(make: Callable[..., ClusterExecutor]) -> None:
    """Their defaults were an `object()`, as `help` showed, and `retries=None` was refused."""
    names = ("timeout", "retries", "retry_delays", "retry_check", "pids", "keep", "label")
    executor = make(1, timeout=50, retries=3)
    view = executor.options(retry_check=OSError, pids=executor.workers or [2], keep=True, label="x")
    for owner in (executor, view):
        parameters = inspect.signature(owner.options).parameters
        assert tuple(parameters) == names
        assert all(
            parameter.default is None and parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values()
        )
        assert owner.options(**dict.fromkeys(names))._policy == owner._policy
    assert executor.options(timeout=math.inf, retries=0)._policy is None, "the way back"


def test_leaving_a_with_block_says_false(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(1)
    for owner in (executor.options(label="x"), executor):
        assert owner.__exit__(None, None, None) is False


def test_delays_may_be_endless(make: Callable[..., ClusterExecutor]) -> None:
    view = make(1).options(retries=2, retry_delays=itertools.repeat(0))
    with pytest.raises(ZeroDivisionError):
        view.submit(operator.truediv, 1, 0).result(PATIENCE)
    assert view._policy is not None and view._policy.retry_delays == (0.0, 0.0)
    assert make(1).options(retry_delays=itertools.repeat(0)).submit(square, 3).result(PATIENCE) == 9


def test_delays_without_a_count_are_the_count(make: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    for name, owner in (("all", make(1, retry_delays=[0, 0])), ("view", make(1).options(retry_delays=[0, 0]))):
        with pytest.raises(OSError, match="again"):
            owner.submit(lambda name=name: (note(tmp_path / name, 1), fail(OSError("again")))).result(PATIENCE)
        assert noted(tmp_path / name)["1"] == 3


# ----------------------------------------------------------------------------------------------------- size and the end


def test_scale_is_seen_at_once(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(1)
    view, numbers = executor.options(label="x"), [3, 2, 5, 1, 2] * 20
    for number in numbers:
        executor.scale(number)
        assert executor._max_workers == view._max_workers == number
    ospids = executor.submit(os.getpid).result(PATIENCE), executor._processes
    assert ospids and executor._max_workers == 2
    with distpool.DistPool(1) as pool:
        pool.executor.scale(3)
        assert pool._processes == pool.size == len(pool._pool) == 3
        assert len({process.pid for process in pool._pool}) == 3


def test_private_names_of_the_standard_librarys_executor(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(1)
    assert executor._executor_manager_thread is executor._call_queue is None
    assert executor._processes and all(process.name for process in executor._processes.values())


def test_scale(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(1)
    executor.scale(3)
    futures = [executor.submit(hold, gate.address, n) for n in range(3)]
    arrivals = gate.arrivals(3)
    assert len({arrival.ospid for arrival in arrivals}) == 3
    executor.scale(1)
    for arrival in arrivals:
        arrival.release()
    assert [future.result(PATIENCE) for future in futures] == [0, 1, 2], "what runs is finished first"
    assert executor._max_workers == 1
    deadline = time.monotonic() + PATIENCE
    while len({*executor.map(ospid, range(20))}) > 1 or len(executor.workers) > 1:
        assert time.monotonic() < deadline, "the surplus never leaves"
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error):
            executor.scale(bad)  # type: ignore[arg-type]


def test_scale_up_and_down_under_load(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(1)
    futures = []
    for step, size in enumerate((3, 1, 2, 1, 4, 2)):
        futures += [executor.submit(square, 100 * step + n) for n in range(100)]
        executor.scale(size)
    results = executor.map(square, range(500))
    assert [future.result(PATIENCE) for future in futures] == [n * n for n in range(600)]
    assert list(results) == [n * n for n in range(500)]


def test_shutdown_completes_what_is_pending(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(1)
    held = executor.submit(hold, gate.address)
    futures = [executor.submit(square, n) for n in range(50)]
    results = executor.map(square, range(50))
    gate.arrival()
    executor.shutdown(wait=False)
    for late in (lambda: executor.submit(square, 1), lambda: executor.map(square, [1])):
        with pytest.raises(RuntimeError, match="^cannot schedule new futures after shutdown$"):
            late()
    gate.close()
    executor.shutdown()
    executor.shutdown(), executor.shutdown(cancel_futures=True)
    assert [future.result(0) for future in futures] == [n * n for n in range(50)]
    assert list(results) == [n * n for n in range(50)]
    assert held.done() and executor._processes is None


def test_shutdown_that_cancels(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(2)
    held = [executor.submit(hold, gate.address) for _ in range(2)]
    gate.arrivals(2)
    pinned = [executor.options(pids=pid).submit(square, 1) for pid in executor.workers for _ in range(3)]
    waiting = [executor.submit(square, n) for n in range(50)]
    results = executor.map(square, [[1]] * 20)  # lists: would fail if they ran
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in waiting + pinned)
    gate.close()
    executor.shutdown()
    assert all(future.result(0) is None for future in held)
    with pytest.raises(CancelledError):
        next(results)


def test_shutdown_that_cancels_a_long_map_is_soon_over(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(1)
    results = executor.map(time.sleep, itertools.repeat(0.05, 10_000))
    next(results)
    executor.shutdown(cancel_futures=True)
    with pytest.raises(CancelledError):
        for _ in results:
            pass


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_ending_the_workers(make: Callable[..., ClusterExecutor], gate: Gate, how: str) -> None:
    executor = make(2)
    held = [executor.submit(hold, gate.address) for _ in range(2)]
    arrivals = gate.arrivals(2)
    waiting = [executor.submit(square, n) for n in range(20)]
    getattr(executor, how)()
    for arrival in arrivals:
        arrival.wait_gone(5)
    executor.shutdown()
    for future in held:
        assert isinstance(future.exception(0), BrokenProcessPool)
    assert all(future.cancelled() for future in waiting)
    with pytest.raises(RuntimeError):
        executor.submit(square, 1)
    getattr(executor, how)()


def _keep_the_interpreter(seconds: float) -> None:
    import ctypes

    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def test_a_worker_that_keeps_the_interpreter_dies_at_once(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    """It cannot answer a recall; neither `kill_workers` nor `cancel` may wait for it."""
    executor = make(1)
    address = gate.address
    busy = executor.submit(lambda: (show(address), _keep_the_interpreter(60)))
    gate.arrival()
    waiting = [executor.submit(square, n) for n in range(5)]
    begin = time.monotonic()
    waiting[0].cancel()
    assert time.monotonic() - begin < 10
    begin = time.monotonic()
    executor.kill_workers()
    executor.shutdown()
    assert time.monotonic() - begin < 5
    assert isinstance(busy.exception(0), BrokenProcessPool)
    assert all(future.done() for future in waiting)


def test_cancelling(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(1)
    held = executor.submit(hold, gate.address, "held")
    gate.arrival()
    ahead, queued = executor.submit(square, 2), [executor.submit(square, n) for n in range(20)]
    assert held.running() and not held.cancel()
    assert ahead.cancel() and ahead.cancelled() and not ahead.running()
    assert all(future.cancel() for future in queued[5:])
    with pytest.raises(CancelledError):
        ahead.result()
    gate.close()
    assert held.result(PATIENCE) == "held"
    assert [future.result(PATIENCE) for future in queued[:5]] == [n * n for n in range(5)]
    assert executor.submit(square, 5).result(PATIENCE) == 25


def test_many_threads_cancel_the_same_futures(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(2)
    held = [executor.submit(hold, gate.address) for _ in range(2)]
    gate.arrivals(2)
    futures = [executor.submit(square, n) for n in range(8)]
    answers: list[list[bool]] = []
    threads = [threading.Thread(target=lambda: answers.append([f.cancel() for f in futures])) for _ in range(4)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert time.monotonic() - begin < 1.9, "each waited for an answer that another one got"
    assert answers == [[True] * 8] * 4
    gate.close()
    for future in held:
        future.result(PATIENCE)


def test_a_cancel_wakes_a_thread_that_waits(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(1)
    executor.submit(hold, gate.address)
    gate.arrival()
    [executor.submit(square, 1) for _ in range(5)]
    future = executor.submit(square, 2)
    canceller = threading.Timer(0.1, future.cancel)
    canceller.start()
    begin = time.monotonic()
    with pytest.raises(CancelledError):
        future.result(PATIENCE)
    assert time.monotonic() - begin < 5
    canceller.join(PATIENCE)


def test_with_ends_it(gate: Gate) -> None:
    with ClusterExecutor(1) as executor:
        future = executor.submit(square, 3)
    assert future.done() and future.result() == 9
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(square, 1)
    with pytest.raises(OSError, match="inside"):
        with ClusterExecutor(1):
            raise OSError("inside")


def test_max_tasks_per_child(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(2, max_tasks_per_child=3)
    pids = [future.result(PATIENCE) for future in [executor.submit(ospid) for _ in range(30)]]
    assert all(pids.count(pid) <= 3 for pid in set(pids))
    assert list(executor.map(square, range(20))) == [n * n for n in range(20)]


def test_max_tasks_per_child_with_cancelled_calls(make: Callable[..., ClusterExecutor]) -> None:
    """Calls that were sent and taken back must not leave a worker that gets no more and never goes."""
    executor = make(1, max_tasks_per_child=2)
    for round_ in range(10):
        futures = [executor.submit(square, n) for n in range(6)]
        cancelled = [future.cancel() for future in reversed(futures)][::-1]
        for n, future in enumerate(futures):
            if not cancelled[n]:
                assert future.result(PATIENCE) == n * n, round_


# -------------------------------------------------------------------------------------------------- what libraries read


def test_private_names(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(2)
    assert executor._max_workers == 2
    assert not executor._broken and not executor._shutdown
    assert executor._mp_context.get_start_method() == "spawn"
    executor.submit(square, 1).result(PATIENCE)
    processes = executor._processes
    assert processes and all(process.is_alive() and process.pid == pid for pid, process in processes.items())
    victim = executor.submit(ospid).result(PATIENCE)
    processes[victim].terminate()
    processes[victim].join(PATIENCE)
    assert not processes[victim].is_alive() and processes[victim].exitcode == -signal.SIGTERM
    executor.shutdown()
    assert executor._processes is None and executor._shutdown


def test_mp_context_is_taken(make: Callable[..., ClusterExecutor]) -> None:
    context = multiprocessing.get_context("spawn")
    executor = make(1, context)
    assert executor._mp_context is context
    assert executor.submit(square, 2).result(PATIENCE) == 4


def test_manager_proxies_work(make: Callable[..., ClusterExecutor]) -> None:
    """Workers have the caller's authkey."""
    with multiprocessing.get_context("spawn").Manager() as manager:
        shared_list = manager.list([1])
        make(1).submit(lambda proxy: proxy.append(2), shared_list).result(PATIENCE)
        assert list(shared_list) == [1, 2]


def test_workers_are_not_daemonic(shared: ClusterExecutor) -> None:
    assert shared.submit(lambda: multiprocessing.current_process().daemon).result(PATIENCE) is False


def test_stats(shared: ClusterExecutor) -> None:
    shared.submit(square, 1).result(PATIENCE)
    with contextlib.suppress(ZeroDivisionError):
        shared.submit(lambda: 1 / 0).result(PATIENCE)
    rows = shared.stats()
    assert [row["pid"] for row in rows] == shared.workers
    assert sum(row["done"] for row in rows) >= 1 and sum(row["failed"] for row in rows) >= 1
    for row in rows:
        assert row["ospid"] > 1 and row["memory"] > 1 << 20 and row["bytes_in"] > 0 and row["bytes_out"] > 0
        assert "host" in row and "cpu" in row and "running" in row


class Bar:
    """A tqdm, as far as it is used."""

    def __init__(self, total: int | None = None) -> None:
        self.total, self.n, self.closed = total, 0, False
        bars.append(self)

    def update(self, n: int = 1) -> None:
        self.n += n

    def close(self) -> None:
        self.closed = True


bars: list[Bar] = []


def test_progress(make: Callable[..., ClusterExecutor]) -> None:
    bars.clear()
    executor = make(1, progress=Bar)
    list(executor.map(square, range(10)))
    list(executor.map(square, range(10), chunksize=4))
    view = executor.options(timeout=60)
    list(view.map(square, range(10)))
    list(view.map(square, range(10), buffersize=2, chunksize=4))
    list(executor.imap_unordered(square, range(10)))
    list(view.imap_unordered(square, range(10)))
    assert [bar.n for bar in bars] == [10] * 6 and all(bar.closed for bar in bars)
    assert [bar.total for bar in bars[:4]] == [10] * 4


# -------------------------------------------------------------------------------------------------------------- asyncio


def test_asyncio(shared: ClusterExecutor) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(shared, square, 7) == 49
        assert await asyncio.gather(*(loop.run_in_executor(shared, square, n) for n in range(20))) == [
            n * n for n in range(20)
        ]
        assert await shared.submit(square, 3) == 9
        with pytest.raises(ZeroDivisionError):
            await shared.submit(operator.truediv, 1, 0)

    asyncio.run(main())


def test_the_loop_runs_while_a_call_does(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(1)

    async def main() -> None:
        future = executor.submit(hold, gate.address, "v")
        task = asyncio.ensure_future(asyncio.wrap_future(future))
        arrival = await asyncio.to_thread(gate.arrival)
        assert not task.done()
        arrival.release()
        assert await asyncio.wait_for(task, PATIENCE) == "v"

    asyncio.run(main())


# --------------------------------------------------------------------------------------------------------- as a program


def test_main_needs_no_guard_and_travels_by_value(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import distpool, dataclasses, enum
        OFFSET = 10
        class Colour(enum.Enum):
            RED = 1
        @dataclasses.dataclass
        class Point:
            x: int
            def moved(self): return Point(self.x + OFFSET)
        class Mine(Exception): pass
        def work(point): return point.moved(), Colour.RED
        def bad(): raise Mine("mine")
        ex = distpool.ClusterExecutor(2)
        point, colour = ex.submit(work, Point(1)).result()
        assert type(point) is Point and point == Point(11) and colour is Colour.RED
        assert list(ex.map(lambda p: p.moved().x, [Point(n) for n in range(5)])) == list(range(10, 15))
        try:
            ex.submit(bad).result()
        except Mine as error:
            assert type(error) is Mine
        print("all well")
        """)
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all well\n", "")


def test_import_is_cheap() -> None:
    done = run_program("""
        import sys, threading
        import distpool
        distpool.ClusterExecutor
        heavy = {"paramiko", "psutil", "numpy", "asyncio", "tqdm"} & set(sys.modules)
        print(sorted(heavy), threading.active_count())
    """)
    assert (done.stdout, done.stderr) == ("[] 1\n", "")


def test_a_forked_child_gets_an_error_at_once() -> None:
    done = run_program("""
        import asyncio, concurrent.futures, os, time, warnings, distpool
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        ex = distpool.ClusterExecutor(1)
        pending = ex.submit(pow, 2, 3)
        assert pending.result() == 8
        held = ex.submit(time.sleep, 2)
        child = os.fork()
        if child == 0:
            code = 1
            async def awaited():
                await held

            try:
                uses = [
                    lambda: ex.submit(pow, 2, 3), lambda: asyncio.run(awaited()), lambda: held.result(),
                    lambda: concurrent.futures.wait([held]), lambda: list(concurrent.futures.as_completed([held])),
                ]
                for use in uses:
                    try:
                        use()
                        break
                    except RuntimeError as error:
                        assert "forked" in str(error)
                else:
                    code = 0
                    assert pending.result() == 8 and concurrent.futures.wait([pending]).done
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert ex.submit(pow, 2, 4).result() == 16
        print("both well")
    """)
    assert (done.stdout, done.stderr) == ("both well\n", "")


def test_the_data_of_a_function_is_copied_once_for_all_workers(make: Callable[..., ClusterExecutor]) -> None:
    """Each worker maps the same copy; what one of them writes there, and what happens here later, stays there."""
    numpy = pytest.importorskip("numpy")
    executor = make(2)
    gate = Gate()
    table = numpy.zeros(1 << 20, numpy.uint8)

    def task(address: Any) -> tuple[int, int]:
        before = int(table[0])
        table[0] += 1
        hold(address)
        return before, os.getpid()

    results = executor.map(task, [gate.address] * 2)
    table[0] = 77
    gate.arrivals(2)
    gate.close()
    values = list(results)
    assert [before for before, _ in values] == [0, 0] and values[0][1] != values[1][1]
    links = [slot.member.link for slot in executor._crew.scheduler.slots.values()]
    assert len(links) == 2 and all(link is not None and link.bytes_out < 100_000 for link in links)


def use_connection(connection: Any) -> Any:
    connection.send(os.getpid())
    return connection


def close_connection(connection: Any, beside: Any) -> None:
    connection.close()


def test_a_connection_beside_what_travels_by_value_is_lent_once(shared: ClusterExecutor) -> None:
    """The first pickler had lent a second descriptor, which nobody fetched: the pipe had no end."""
    ours, theirs = multiprocessing.Pipe()
    with ours:
        shared.submit(close_connection, theirs, lambda: None).result(PATIENCE)
        theirs.close()
        assert ours.poll(PATIENCE)
        with pytest.raises(EOFError):
            ours.recv()


def answer(sock: socket.socket) -> socket.socket:
    sock.sendall(sock.recv(100).upper())
    return sock


@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_sockets_travel_as_with_pools_of_the_standard_library(shared: ClusterExecutor, timeout: float | None) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(PATIENCE)
        theirs.settimeout(timeout)
        ours.sendall(b"there")
        back = shared.submit(answer, theirs).result(PATIENCE)
        assert ours.recv(100) == b"THERE"
        with back:
            assert back.gettimeout() == timeout and (back.family, back.type) == (theirs.family, theirs.type)
            ours.sendall(b"and back")
            assert back.recv(100) == b"and back"
        ours.sendall(b"captured")
        shared.submit(lambda: theirs.sendall(theirs.recv(100))).result(PATIENCE)
        assert ours.recv(100) == b"captured"
    gone = shared.submit(answer, theirs).exception(PATIENCE)
    assert isinstance(gone, SerializationError) and "argument 1, an object of type socket.socket" in str(gone)
    assert shared.submit(abs, -1).result(PATIENCE) == 1


def test_a_server_whose_connections_are_answered_by_workers(shared: ClusterExecutor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        futures = []
        clients = [socket.create_connection(server.getsockname(), PATIENCE) for _ in range(4)]
        for number, client in enumerate(clients):
            client.sendall(b"client %d" % number)
        for _ in clients:
            connection, _address = server.accept()
            with connection:
                futures.append(shared.submit(answer, connection))
        for future in futures:
            future.result(PATIENCE).close()
        for number, client in enumerate(clients):
            with client:
                assert client.recv(100) == b"CLIENT %d" % number
                assert client.recv(100) == b"", "nobody holds it any more"


def test_connections_of_multiprocessing_travel_as_themselves(shared: ClusterExecutor) -> None:
    """Seen: they came as the numbers of descriptors, of which each process closed one of its own: of a link, say."""
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        back = shared.submit(use_connection, theirs).result(PATIENCE)
        assert ours.poll(PATIENCE) and ours.recv() != os.getpid()
        with back:
            back.send("here")
            assert ours.poll(PATIENCE) and ours.recv() == "here"
        shared.submit(lambda: theirs.send("captured")).result(PATIENCE)
        assert ours.poll(PATIENCE) and ours.recv() == "captured"
        theirs.send("still open")
        assert ours.poll(PATIENCE) and ours.recv() == "still open"
        with pytest.raises(ValueError, match="can be received once"):
            list(shared.map(lambda n: theirs.fileno(), range(20)))
    assert shared.submit(abs, -1).result(PATIENCE) == 1
