"""`pmap` and `pgenerate`: the rules one by one (the combinations are in test_pmap_options)."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import (
    ClusterExecutor,
    ExponentialBackOff,
    ProcessExitedException,
    SerializationError,
    pgenerate,
    pmap,
)
from distpool.elements import thread_count

Map = Callable[..., list[Any]]

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch": {"batch_size": 3},
    "auto": {"batch_size": "auto"},
    "hooks": {"on_error": lambda error: throw(error), "retry_delays": [0]},
    "view": {"view": {"timeout": 30}},
    "here": {"distributed": False},
    "alone": {"pool": None},
}
"""One rule for every mode: ways of calling pmap that must not differ in what they give."""


pytestmark = pytest.mark.leaves_processes  # the module's executor replaces workers; its shutdown ends them all


@pytest.fixture(scope="module")
def executor() -> Iterator[ClusterExecutor]:
    with ClusterExecutor(2) as made:
        yield made


@pytest.fixture(params=MODES)
def mapped(request: pytest.FixtureRequest, executor: ClusterExecutor) -> Map:
    options = dict(MODES[request.param])
    view = options.pop("view", None)
    options.setdefault("pool", executor.options(**view) if view else executor)
    return lambda f, *inputs, **more: pmap(f, *inputs, **{**options, **more})


def throw(error: BaseException) -> None:
    raise error


def note(path: Path, item: object) -> None:
    with open(path, "ab") as log:
        log.write(f"{item}\n".encode())


def noted(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


class Counted:
    """An iterator that knows how much was taken from it."""

    def __init__(self, source: Any) -> None:
        self.taken = 0
        self._source = iter(source)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        value = next(self._source)
        self.taken += 1
        return value


# -- results -----------------------------------------------------------------------------------------------------------


def test_order_whatever_the_durations(mapped: Map) -> None:
    def act(number: int) -> int:
        time.sleep(random.random() * 0.01)
        return number * number

    assert mapped(act, range(40)) == [number * number for number in range(40)]


def test_several_iterables_stop_at_the_shortest(mapped: Map) -> None:
    assert mapped(lambda a, b: a + b, [1, 2, 3], [4, 5]) == [5, 7]
    assert mapped(lambda a, b, c: a + b * c, range(5), itertools.count(), iter([1, 2, 3])) == [0, 3, 8]


def test_empty_inputs(mapped: Map) -> None:
    def never() -> None:
        raise AssertionError("must not be called")

    for retries in ((), [0]):
        assert mapped(never, [], retry_delays=retries) == []
        assert mapped(never, [], [], retry_delays=retries) == []
        assert mapped(never, iter(()), range(3), retry_delays=retries) == []


def test_strings_and_dicts_iterate_naturally(mapped: Map) -> None:
    assert mapped(str.upper, "Hello World!") == list("HELLO WORLD!")
    assert mapped(str.upper, {"a": 1, "b": 2}) == ["A", "B"]


def test_arguments_are_passed_as_they_are(mapped: Map, tmp_path: Path) -> None:
    """C133: strings, tuples and lists are elements, not argument lists; also when they run again."""
    path = tmp_path / "log"

    def act(item: Any) -> Any:
        note(path, repr(item).replace(" ", ""))
        if noted(path).count(repr(item).replace(" ", "")) == 1:
            raise ValueError("once")
        return item

    items = ["text", ("a", 1), [1, 2], {"key": (1,)}, None, 5]
    assert mapped(act, items, retry_delays=[0]) == items
    assert mapped(lambda *pair: pair, "ab", [(1, 2), [3]]) == [("a", (1, 2)), ("b", [3])]


def test_large_elements(executor: ClusterExecutor) -> None:
    """Elements and results beside the pickle, also of elements that run again."""
    items = [bytes([number]) * 400_000 for number in range(6)]

    def act(item: bytearray) -> bytearray:
        return item[:300_000] * 2

    assert executor.pmap(act, map(bytearray, items)) == [item[:300_000] * 2 for item in items]
    fails: list[object] = []
    got = executor.pmap(lambda item: item["no"], [{0: item} for item in items], on_error=lambda e: fails.append(e) or 1)
    assert got == [1] * 6
    assert [type(error) for error in fails] == [KeyError] * 6


def test_a_value_that_cannot_be_loaded_here_is_an_error(mapped: Map) -> None:
    if mapped(lambda _: os.getpid(), [0]) == [os.getpid()]:
        pytest.skip("nothing travels")

    class Sour:
        def __reduce__(self) -> Any:
            return throw, (ValueError("cannot be loaded"),)

    with pytest.raises(ValueError, match="cannot be loaded"):
        mapped(lambda number: Sour() if number == 2 else number, range(5))
    kept = mapped(lambda number: Sour() if number == 2 else number, range(5), on_error=lambda error: str(error))
    assert kept == [0, 1, "cannot be loaded", 3, 4]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_original_exception_with_traceback(mapped: Map) -> None:
    def fails_at_fifty(number: int) -> int:
        if number == 50:
            raise RuntimeError("foobar")
        return number

    with pytest.raises(RuntimeError, match=r"^foobar$") as caught:
        mapped(fails_at_fifty, range(1, 101))
    assert type(caught.value) is RuntimeError
    assert "in fails_at_fifty" in str(caught.value.__cause__)


def test_no_new_element_starts_after_an_error(mapped: Map, tmp_path: Path) -> None:
    path = tmp_path / "log"

    def act(number: int) -> None:
        note(path, number)
        if number == 0:
            time.sleep(0.2)  # the others are under way, more are on their way
            raise ValueError("stop")
        time.sleep(0.05)

    with pytest.raises(ValueError, match="stop"):
        mapped(act, range(1000))
    time.sleep(0.1)  # what was running may end, and what was about to start when the error came
    started = len(noted(path))
    assert started < 200
    time.sleep(0.3)
    assert len(noted(path)) == started


def test_an_error_does_not_wait_for_slow_elements_before_it(executor: ClusterExecutor, tmp_path: Path) -> None:
    release = tmp_path / "release"

    def act(number: int) -> None:
        while number == 0 and not release.exists():
            time.sleep(0.01)
        if number == 1:
            raise ValueError("quick")

    begin = time.monotonic()
    try:
        with pytest.raises(ValueError, match="quick"):
            executor.pmap(act, range(100))
        assert time.monotonic() - begin < 10
    finally:
        release.touch()


def test_on_error_runs_here_and_first(mapped: Map, tmp_path: Path) -> None:
    """C125, C128: in the calling thread, with the original exception; if it returns, there is no retry."""
    path = tmp_path / "log"
    seen: list[tuple[BaseException, int, int]] = []

    def act(number: int) -> int:
        note(path, number)
        if number % 2:
            raise ValueError(number)
        return number

    def hook(error: BaseException) -> str:
        seen.append((error, os.getpid(), threading.get_ident()))
        return "given"

    assert mapped(act, range(6), on_error=hook, retry_delays=[0, 0]) == [0, "given", 2, "given", 4, "given"]
    assert sorted(noted(path)) == ["0", "1", "2", "3", "4", "5"]
    assert {(pid, thread) for _, pid, thread in seen} == {(os.getpid(), threading.get_ident())}
    assert sorted(error.args[0] for error, _, _ in seen) == [1, 3, 5]


def test_error_of_the_hook_counts(mapped: Map) -> None:
    def replace(error: BaseException) -> None:
        raise KeyError("mine") from error

    with pytest.raises(KeyError, match="mine") as caught:
        mapped(lambda number: throw(ValueError("theirs")), range(3), on_error=replace, retry_check=ValueError)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("check", "calls"),
    [
        (None, 4),
        (ValueError, 4),
        (Exception, 4),
        ((KeyError, ValueError), 4),
        (lambda error: "foobar" in str(error), 4),
        (KeyError, 1),
        ((), 1),
        ((KeyError, OSError), 1),
        (lambda error: False, 1),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_retry_check(executor: ClusterExecutor, tmp_path: Path, check: Any, calls: int, batch_size: int | str) -> None:
    path = tmp_path / "log"

    def act(number: int) -> None:
        if number == 3:
            note(path, number)
            raise ValueError("foobar")

    with pytest.raises(ValueError, match="foobar"):
        executor.pmap(act, range(8), retry_delays=[0] * 3, retry_check=check, batch_size=batch_size)
    assert len(noted(path)) == calls


def test_retry_check_that_raises(mapped: Map) -> None:
    with pytest.raises(ZeroDivisionError):
        mapped(lambda number: throw(ValueError()), range(3), retry_delays=[0], retry_check=lambda error: 1 / 0)


@pytest.mark.parametrize(
    "delays",
    [
        [0, 0],
        (0.0, 0.0),
        range(1),
        ExponentialBackOff(2, 0.001),
        iter([0, 0]),
        (0 for _ in range(2)),
        itertools.repeat(0),
    ],
    ids=["list", "tuple", "range", "backoff", "iterator", "generator", "endless"],
)
def test_delays_are_iterated_for_each_element(executor: ClusterExecutor, tmp_path: Path, delays: Any) -> None:
    path = tmp_path / "log"

    def act(number: int) -> int:
        note(path, number)
        if noted(path).count(str(number)) == 1:
            raise ValueError("once")
        return number

    assert executor.pmap(act, range(10), retry_delays=delays) == list(range(10))
    assert len(noted(path)) == 20


def test_waiting_for_a_retry_blocks_nobody(mapped: Map, tmp_path: Path) -> None:
    path = tmp_path / "log"

    def act(number: int) -> int:
        note(path, number)
        if number == 0 and noted(path).count("0") == 1:
            raise ValueError("later")
        return number

    begin = time.monotonic()
    assert mapped(act, range(30), retry_delays=[0.5]) == list(range(30))
    assert time.monotonic() - begin >= 0.5
    assert noted(path)[-1] == "0"  # the others all ran meanwhile


def test_endless_input_ends_with_its_error(mapped: Map) -> None:
    items = Counted(itertools.count())
    with pytest.raises(ValueError, match="enough"):
        mapped(lambda number: throw(ValueError("enough")) if number == 100 else number, items)
    ahead = max(2 * 8 * 64, 2 * thread_count())  # "auto" may take the most
    assert 100 < items.taken <= 101 + ahead


def test_look_ahead_of_a_plain_map(executor: ClusterExecutor) -> None:
    for size in (1, 5):
        items = Counted(itertools.count())
        with pytest.raises(ValueError, match="enough"):
            executor.pmap(
                lambda number: throw(ValueError("enough")) if number == 100 else number, items, batch_size=size
            )
        assert 100 < items.taken <= 101 + 8 * 2 * size


def test_input_that_fails(mapped: Map, tmp_path: Path) -> None:
    path = tmp_path / "log"

    def five() -> Iterator[int]:
        yield from range(5)
        raise OSError("the input ends badly")

    with pytest.raises(OSError, match="the input ends badly"):
        mapped(lambda number: note(path, number), five())
    assert sorted(noted(path)) == ["0", "1", "2", "3", "4"]


def test_slow_input(mapped: Map) -> None:
    def slow() -> Iterator[int]:
        for number in range(20):
            time.sleep(0.005)
            yield number

    assert mapped(lambda number: -number, slow()) == [-number for number in range(20)]


@pytest.mark.parametrize("bad", [0, -1, "x", 2.0, None, True, [1]])
def test_bad_batch_size(executor: ClusterExecutor, bad: Any) -> None:
    with pytest.raises(ValueError, match="batch_size must be specified as a positive integer"):
        executor.pmap(abs, range(3), batch_size=bad)
    assert pmap(abs, range(3), batch_size=bad) == [0, 1, 2]  # no workers: it runs here


@pytest.mark.parametrize(
    "options",
    [
        {"on_error": 5},
        {"retry_check": 5},
        {"retry_check": "ValueError"},
        {"retry_check": (ValueError, 5)},
        {"retry_check": int},
        {"retry_delays": 3},
        {"retry_delays": ["soon"]},
        {"progress": 5},
    ],
    ids=str,
)
def test_wrong_types(mapped: Map, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        mapped(abs, range(3), **options)


def test_wrong_arguments(mapped: Map) -> None:
    with pytest.raises(TypeError, match="callable"):
        mapped(5, range(3))
    with pytest.raises(TypeError, match="iterable"):
        mapped(abs)
    with pytest.raises(TypeError, match="iterable"):
        mapped(abs, 5)
    with pytest.raises(ValueError, match="non-negative"):
        mapped(abs, range(3), retry_delays=[-1])
    with pytest.raises(TypeError, match="pool must be"):
        pmap(abs, range(3), pool=5)


def test_unserialisable_element(executor: ClusterExecutor) -> None:
    """The error of that element alone, and a subject of the rules as any other."""
    items = [1, threading.Lock(), 3]
    with pytest.raises(SerializationError):
        executor.pmap(str, items)
    got = executor.pmap(str, items, on_error=lambda error: isinstance(error, SerializationError), retry_delays=[0])
    assert got == ["1", True, "3"]
    seen: list[BaseException] = []

    def hook(error: BaseException) -> None:
        seen.append(error)
        raise error

    with pytest.raises(SerializationError):
        executor.pmap(str, items, on_error=hook, retry_delays=[0, 0])
    assert len(seen) == 3
    lock = items[1]
    with pytest.raises(SerializationError):
        executor.pmap(lambda _: lock, range(3))


# -- deaths ------------------------------------------------------------------------------------------------------------


def die(path: Path, number: int, bad: int = 3, always: bool = False) -> int:
    note(path, number)
    if number == bad and (always or noted(path).count(str(bad)) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_death(executor: ClusterExecutor, tmp_path: Path, batch_size: int | str) -> None:
    """C131, C137: an error; for `on_error` the ProcessExitedException; with retries another worker."""
    path = tmp_path / "one"
    with pytest.raises(ProcessExitedException):
        executor.pmap(lambda number: die(path, number), range(12), batch_size=batch_size)
    path = tmp_path / "two"
    got = executor.pmap(
        lambda number: die(path, number), range(12), batch_size=batch_size, on_error=lambda error: type(error)
    )
    assert got == [*range(3), ProcessExitedException, *range(4, 12)]
    assert sorted(map(int, noted(path))) == list(range(12))
    path = tmp_path / "three"
    got = executor.pmap(lambda number: die(path, number), range(12), batch_size=batch_size, retry_delays=[0])
    assert got == list(range(12))
    assert sorted(map(int, noted(path))) == sorted([*range(12), 3])
    path = tmp_path / "four"
    with pytest.raises(ProcessExitedException):
        executor.pmap(
            lambda number: die(path, number, always=True), range(12), batch_size=batch_size, retry_delays=[0, 0]
        )
    assert noted(path).count("3") == 3


def test_broken_executor_ends_the_map() -> None:
    """No worker is left and none will come: an error, whatever retries would be allowed."""
    with ClusterExecutor(1, on_worker_exit="break") as executor:
        with pytest.raises(ProcessExitedException):
            executor.pmap(lambda number: os._exit(3), itertools.count(), retry_delays=itertools.repeat(0))
        with pytest.raises(BrokenProcessPool):
            executor.pmap(abs, range(3))


def test_executor_that_was_shut_down() -> None:
    executor = ClusterExecutor(1)
    results = pgenerate(abs, itertools.count(), pool=executor)
    assert next(results) == 0
    executor.shutdown()
    with pytest.raises(RuntimeError, match="shut ?down"):
        list(itertools.islice(results, 100_000))
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.pmap(abs, range(3))


# -- where it runs -----------------------------------------------------------------------------------------------------


def test_C002_C139_here(executor: ClusterExecutor) -> None:
    """C2, C139: in this process, several at a time, in a bounded number of threads."""
    here = threading.get_ident()
    for options in ({"pool": executor, "distributed": False}, {}):
        began = time.monotonic()
        got = pmap(lambda _: (time.sleep(0.1), os.getpid(), threading.get_ident())[1:], range(8), **options)
        assert time.monotonic() - began < 0.75
        assert {pid for pid, _ in got} == {os.getpid()}
        assert here not in {thread for _, thread in got}
        assert (
            1
            < len({thread for _, thread in pmap(lambda _: (0, threading.get_ident()), range(500), **options)})
            <= (thread_count())
        )


def test_threads_end_with_the_map() -> None:
    def ours() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("distpool-pmap")]

    assert pmap(abs, range(100)) == list(range(100))
    with pytest.raises(ZeroDivisionError):
        pmap(lambda number: 1 // number, range(100))
    results = pgenerate(abs, itertools.count())
    assert next(results) == 0
    del results
    deadline = time.monotonic() + 5
    for thread in ours():
        thread.join(max(0.0, deadline - time.monotonic()))
    assert ours() == []


def test_all_workers_take_part(executor: ClusterExecutor) -> None:
    def act(_: int) -> int:
        time.sleep(0.005)
        return os.getpid()

    deadline = time.monotonic() + 30
    while len(executor.workers) < 2:  # tests before this one kill workers
        assert time.monotonic() < deadline
        executor.submit(time.sleep, 0.02).result()
    for options in ({}, {"batch_size": 10}, {"batch_size": "auto"}):
        pids = executor.pmap(act, range(100), **options)
        assert len(set(pids)) == 2
        assert os.getpid() not in pids


def test_batches_go_to_one_worker(executor: ClusterExecutor) -> None:
    """C135: elements of one batch travel together (those at the end may be taken over by an idle worker)."""
    pids = executor.pmap(lambda _: (time.sleep(0.002), os.getpid())[1], range(200), batch_size=10)
    together = [len(set(pids[start : start + 10])) == 1 for start in range(0, 200, 10)]
    assert together.count(True) >= 15


def test_views_and_other_pools(executor: ClusterExecutor) -> None:
    pid = executor.workers[0]
    chosen = executor.options(pids=[pid])
    assert len(set(pmap(lambda _: os.getpid(), range(20), pool=chosen))) == 1
    assert chosen.pmap(abs, [-1]) == [1]
    assert list(pgenerate(abs, range(-20, 0), pool=chosen)) == list(range(20, 0, -1))
    with ThreadPoolExecutor(2) as threads:
        assert pmap(abs, range(-50, 0), pool=threads) == list(range(50, 0, -1))


def test_time_limit_of_a_view(executor: ClusterExecutor) -> None:
    view = executor.options(timeout=0.2)
    got = view.pmap(lambda number: time.sleep(30 if number == 2 else 0), range(5), on_error=lambda error: type(error))
    assert got == [None, None, TimeoutError, None, None]


def test_nested(executor: ClusterExecutor) -> None:
    """C140: on a worker there is no pool by default, so it runs there, in threads."""

    def outer(number: int) -> tuple[bool, list[int]]:
        inner = distpool.pmap(lambda item: (item * number, os.getpid()), range(10))
        return {pid for _, pid in inner} == {os.getpid()}, [value for value, _ in inner]

    assert executor.pmap(outer, range(6)) == [(True, [item * number for item in range(10)]) for number in range(6)]


def test_four_threads_at_once(executor: ClusterExecutor) -> None:
    """C141."""
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(executor.pmap, lambda n, k=k: n + k, range(200), retry_delays=[0]) for k in range(8)]
        assert [future.result(30) for future in futures] == [[n + k for n in range(200)] for k in range(8)]


# -- the lazy iterator -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["workers", "here"])
def test_pgenerate(executor: ClusterExecutor, where: str) -> None:
    pool = executor if where == "workers" else None

    def act(number: int) -> int:
        time.sleep(random.random() * 0.005)
        return number * number

    items = Counted(itertools.count())
    results = pgenerate(act, items, pool=pool)
    assert items.taken == 0
    assert [next(results) for _ in range(60)] == [number * number for number in range(60)]
    assert items.taken <= 60 + 8 * (2 if pool else thread_count())
    assert iter(results) is results
    results.close()  # type: ignore[attr-defined]
    assert list(results) == []
    assert list(pgenerate(pow, [2, 3], [3, 2, 9], pool=pool)) == [8, 9]


@pytest.mark.parametrize("where", ["workers", "here"])
def test_pgenerate_raises_at_the_turn(executor: ClusterExecutor, where: str) -> None:
    results = pgenerate(lambda n: 10 // (n - 5), itertools.count(), pool=executor if where == "workers" else None)
    assert [next(results) for _ in range(5)] == [-2, -3, -4, -5, -10]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []


# -- progress, back-off ------------------------------------------------------------------------------------------------


class Bar:
    """Stands for tqdm."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.count = 0
        self.closed = 0

    def update(self, count: int) -> None:
        assert count > 0
        self.count += count

    def close(self) -> None:
        self.closed += 1


def test_progress_counts_elements(mapped: Map, tmp_path: Path) -> None:
    bars: list[Bar] = []

    def make(total: int | None) -> Bar:
        bars.append(Bar(total))
        return bars[-1]

    path = tmp_path / "log"

    def act(number: int) -> int:
        note(path, number)
        if number == 7 and noted(path).count("7") == 1:
            raise ValueError("once")
        return number

    assert mapped(act, range(30), progress=make, retry_delays=[0]) == list(range(30))
    assert mapped(abs, iter(range(10)), progress=make) == list(range(10))
    with pytest.raises(ZeroDivisionError):
        mapped(lambda n: 1 // n, range(-5, 5), progress=make, retry_delays=())
    assert [(bar.total, bar.count, bar.closed) for bar in bars[:2]] == [(30, 30, 1), (None, 10, 1)]
    assert (bars[2].total, bars[2].closed) == (10, 1)
    assert bars[2].count < 10
