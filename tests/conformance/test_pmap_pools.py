"""CONFORMANCE 2.8 over worker pools: pmap and pgenerate on `WorkerPool`, `CachingPool` and the default pool."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import (
    CachingPool,
    Channel,
    ExponentialBackOff,
    ProcessExitedException,
    RemoteChannel,
    WorkerPool,
    myid,
    pgenerate,
    pmap,
    remotecall_fetch,
)
from distpool.poolmap import PoolCarrier

from .conftest import wait_until
from .helpers import ident, own_nothing

pytestmark = pytest.mark.time_limit(90)

BATCHES = [1, 3, "auto"]
POOLS: dict[str, Callable[[list[int]], Any]] = {
    "default": lambda team: None, "worker": WorkerPool, "caching": CachingPool
}  # fmt: skip


@pytest.fixture(params=list(POOLS))
def pool(request: pytest.FixtureRequest, team: list[int]) -> Any:
    return POOLS[request.param](team)


def test_C002_alone() -> None:
    assert distpool.nworkers() == 1, "this test comes first in its module"
    assert pmap(ident, range(1, 101)) == list(range(1, 101))
    assert set(pmap(lambda _: os.getpid(), range(10))) == {os.getpid()}
    assert set(pmap(lambda _: myid(), range(10), pool=WorkerPool([]))) == {1}
    assert pmap(ident, [1], batch_size=-1) == [1], "no workers: the map runs here"


def refuse_50(x: int) -> int:
    if x == 50:
        raise RuntimeError("foobar")
    return x


@pytest.mark.parametrize("batch", BATCHES)
def test_C115_the_original_exception(pool: Any, batch: Any) -> None:
    with pytest.raises(RuntimeError, match="^foobar$") as info:
        pmap(refuse_50, range(1, 101), pool=pool, batch_size=batch)
    assert "refuse_50" in str(info.value.__cause__)


@pytest.mark.parametrize("batch", BATCHES)
def test_C116_lazy_input(pool: Any, batch: Any) -> None:
    taken = itertools.count()
    with pytest.raises(RuntimeError, match="foobar"):
        pmap(refuse_50, taken, pool=pool, batch_size=batch)
    assert next(taken) < 50 + 2 * 8 * 4 * 64
    assert pmap(ident, iter(range(100)), pool=pool, batch_size=batch) == list(range(100))


def test_C117_C118_C119_inputs(pool: Any) -> None:
    assert pmap(lambda a, b: a + b, [1, 2, 3], [4, 5], pool=pool) == [5, 7]
    assert pmap(lambda a, b, c: (a, b, c), "ab", (1, 2), [3, 4], pool=pool, batch_size=2) == [("a", 1, 3), ("b", 2, 4)]
    for batch in BATCHES:
        assert pmap(ident, [], pool=pool, batch_size=batch, retry_delays=[0]) == []  # type: ignore[arg-type]
        assert pmap(ident, [], [], pool=pool) == []
    assert pmap(str.upper, "Hello World!", pool=pool) == list("HELLO WORLD!")
    assert pmap(ident, {"a": 1, "b": 2}, pool=pool) == ["a", "b"]


def test_C121_exactly_the_pools_workers(team: list[int]) -> None:
    for kind in (WorkerPool, CachingPool):
        for batch in BATCHES:
            assert set(pmap(lambda _: myid(), range(20), pool=kind(team[:2]), batch_size=batch)) <= set(team[:2])
        assert set(pmap(lambda _: myid(), range(20), pool=kind(team[:2]))) == set(team[:2])
        assert set(pmap(lambda _: myid(), range(20), pool=kind([1, team[0]]))) == {1, team[0]}


def everybody_meets(pool: Any, count: int) -> set[int]:
    """The pids of a map whose first `count` elements wait for each other."""
    arrived = RemoteChannel(lambda: Channel(1000))
    go = RemoteChannel(lambda: Channel(1))

    def meet(i: int) -> int:
        arrived.put(i)
        if i < count:
            go.fetch(timeout=30)
        return myid()

    def let_go() -> None:
        for _ in range(count):
            arrived.take(timeout=30)
        go.put(1)

    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(let_go)
        found = pmap(meet, range(100), pool=pool)
        future.result(30)
    return set(found)


def test_C122_touches_all_workers(team: list[int], pool: Any) -> None:
    assert everybody_meets(pool, 4) == set(team)


@pytest.mark.parametrize("kind", ["default", "made there", "made here"])
def test_C122_from_a_worker(team: list[int], kind: str) -> None:
    made_here = WorkerPool(team)

    def there() -> set[int]:
        pool = {"default": None, "made here": made_here}.get(kind, WorkerPool(team) if kind == "made there" else None)
        return everybody_meets(pool, 4)

    assert remotecall_fetch(there, team[0]) == set(team)
    wait_until(lambda: len(take_all(made_here)) == 4)


def take_all(pool: WorkerPool) -> list[int]:
    """Which workers are free."""
    taken = []
    while pool.isready():
        taken.append(pool.take(timeout=10))
    for pid in taken:
        pool.put(pid)
    return taken


def test_C123_input_order(pool: Any) -> None:
    for batch in BATCHES:
        assert pmap(lambda i: time.sleep(0.02 * (i % 3)) or i, range(24), pool=pool, batch_size=batch) == list(
            range(24)
        )


def test_C124_nothing_new_starts(pool: Any, tmp_path: Path) -> None:
    def note(i: int) -> int:
        (tmp_path / str(i)).touch()
        if i == 3:
            raise RuntimeError
        return i

    with pytest.raises(RuntimeError):
        pmap(note, range(100_000), pool=pool)
    assert len(list(tmp_path.iterdir())) < 1000


@pytest.mark.parametrize("batch", BATCHES)
def test_C125_on_error_here(pool: Any, batch: Any) -> None:
    seen: list[tuple[str, int]] = []

    def note(error: BaseException) -> str:
        seen.append((type(error).__name__, os.getpid()))
        return "x"

    values = pmap(lambda i: 1 // (i % 2), range(10), pool=pool, batch_size=batch, on_error=note)
    assert values == ["x", 1] * 5
    assert seen == [("ZeroDivisionError", os.getpid())] * 5
    kept = pmap(lambda i: 1 // (i % 2), range(4), pool=pool, batch_size=batch, on_error=ident)
    assert [type(value) for value in kept] == [ZeroDivisionError, int] * 2
    assert pmap(lambda i: 1 // 0, [0.0] * 7, pool=pool, batch_size=batch, on_error=lambda e: 0.0) == [0.0] * 7  # C134


@pytest.mark.parametrize("batch", BATCHES)
def test_C127_C128_C129_C130_retries(pool: Any, batch: Any, tmp_path: Path) -> None:
    def flaky(phase: str) -> Callable[[int], int]:
        folder = tmp_path / phase  # of its own: what is in flight when a map fails runs on
        folder.mkdir()

        def call(i: int) -> int:
            with (folder / str(i)).open("ab") as file:
                file.write(b"x")
                tries = file.tell()
            if i % 2 and tries < 3:
                raise (KeyError if i == 5 else OSError)(i)
            return i

        return call

    def tries(phase: str) -> list[int]:
        return [(tmp_path / phase / str(i)).stat().st_size for i in range(8)]

    delays = ExponentialBackOff(4, 0.001)
    values = pmap(flaky("retried"), range(8), pool=pool, batch_size=batch, retry_delays=delays)
    assert values == list(range(8))
    assert tries("retried") == [1, 3] * 4, "only those that failed ran again"
    with pytest.raises(KeyError):
        pmap(flaky("refused"), range(8), pool=pool, batch_size=batch, retry_delays=[0] * 4, retry_check=OSError)
    values = pmap(flaky("given"), range(8), pool=pool, batch_size=batch, retry_delays=[0], on_error=lambda e: -1)
    assert values == [0, -1, 2, -1, 4, -1, 6, -1]
    assert tries("given") == [1] * 8, "on_error comes before retry"


def test_C133_retries_call_with_the_original_arguments(pool: Any, tmp_path: Path) -> None:
    def once(*args: Any) -> Any:
        try:
            (tmp_path / repr(args).replace("/", "")).touch(exist_ok=False)
        except FileExistsError:
            return args
        raise RuntimeError

    for inputs in (["ab", (1, 2), [3], None, (4,)],), (["ab", (1,)], [(2, 3), "c"]):
        for batch in BATCHES:
            expected = list(zip(*inputs, strict=True))
            assert pmap(once, *inputs, pool=pool, batch_size=batch, retry_delays=[0]) == expected
            for file in tmp_path.iterdir():
                file.unlink()


def test_C135_messages(team: list[int]) -> None:
    counted = RemoteChannel(lambda: Channel(1000))

    class Noted(WorkerPool):
        def prepare(self, f: Any, pid: int) -> Any:
            counted.put(pid)
            return f

    assert pmap(ident, range(100), pool=Noted(team), batch_size=10) == list(range(100))
    assert sum(1 for _ in iter(lambda: counted.isready() and counted.take(), False)) == 10


def test_C136_batch_size(pool: Any) -> None:
    for bad in (0, -1, "x", 1.5, True, None):
        with pytest.raises(ValueError, match="batch_size must be specified as a positive integer"):
            pmap(ident, [1], pool=pool, batch_size=bad)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["default", "worker"])
def test_C131_C137_a_worker_dies(tmp_path: Path, kind: str, batch: int, team: list[int]) -> None:
    extra = distpool.addprocs(2)
    pool = POOLS[kind](extra) if kind != "default" else CachingPool(extra)

    def die_once(i: int) -> int:
        if i == 3:
            try:
                (tmp_path / "died").touch(exist_ok=False)
            except FileExistsError:
                return i
            os._exit(3)
        return i

    assert pmap(die_once, range(10), pool=pool, batch_size=batch, retry_delays=[0, 0]) == list(range(10))
    (tmp_path / "died").unlink()
    distpool.rmprocs(extra)
    extra = distpool.addprocs(2)
    pool = POOLS[kind](extra) if kind != "default" else CachingPool(extra)
    values = pmap(die_once, range(10), pool=pool, batch_size=batch, on_error=lambda e: type(e).__name__)
    assert values.count("ProcessExitedException") == 1
    assert values[3] == "ProcessExitedException"
    (tmp_path / "died").unlink()
    with pytest.raises(ProcessExitedException) as info:
        pmap(die_once, range(10), pool=pool, batch_size=batch)
    assert info.value.worker_id in extra
    with pytest.raises((ProcessExitedException, RuntimeError)):  # nobody is left: an error, not a hang
        pmap(lambda i: os._exit(1), range(10), pool=WorkerPool(distpool.addprocs(1)), retry_delays=[0] * 3)


def test_the_death_that_emptied_the_pool_comes_before_its_emptiness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are told on library threads; here the death is told last."""
    given_up = threading.Event()
    give_up, ended = PoolCarrier._give_up, PoolCarrier._ended

    def noted(self: Any, error: BaseException) -> None:
        give_up(self, error)
        given_up.set()

    def late(self: Any, *args: Any) -> None:
        assert given_up.wait(30)
        ended(self, *args)

    monkeypatch.setattr(PoolCarrier, "_give_up", noted)
    monkeypatch.setattr(PoolCarrier, "_ended", late)
    pool = WorkerPool(distpool.addprocs(1))
    with pytest.raises(ProcessExitedException):
        pmap(lambda i: os._exit(3), range(10), pool=pool)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(
            pmap, lambda i: os._exit(3), range(3), pool=WorkerPool(distpool.addprocs(1)), on_error=ident
        )
        errors = future.result(30)
    assert [type(error) for error in errors] == [ProcessExitedException, RuntimeError, RuntimeError]


def test_the_owner_of_the_pool_dies(team: list[int]) -> None:
    """What its workers had been given still ends; there is nobody who could give out a worker for the rest."""
    (owner,) = distpool.addprocs(1)
    pool = remotecall_fetch(WorkerPool, owner, team[:1])
    arrived, go = RemoteChannel(lambda: Channel(1)), RemoteChannel(lambda: Channel(1))

    def hold(i: int) -> int:
        arrived.put(i)
        return int(go.fetch(timeout=30)) + i

    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(pmap, hold, range(3), pool=pool, on_error=ident)
        arrived.take(timeout=30)
        distpool.rmprocs(owner)
        go.put(5)
        first, *rest = future.result(30)
    assert first == 5
    assert [error.worker_id for error in rest] == [owner] * 2


def test_a_pool_of_another_process_that_has_no_worker_left(team: list[int]) -> None:
    (member,) = distpool.addprocs(1)
    pool = remotecall_fetch(WorkerPool, team[0], [member])
    values = pmap(lambda i: os._exit(3), range(3), pool=pool, on_error=ident)
    assert [type(error) for error in values] == [ProcessExitedException, RuntimeError, RuntimeError]


def outer(i: int, pool: Any = None) -> int:
    return sum(pmap(lambda j: i * j, range(5), pool=pool))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_C140_nested(team: list[int], size: int) -> None:
    shared = WorkerPool(team[:size])
    assert pmap(outer, range(8), pool=shared) == [10 * i for i in range(8)]
    assert pmap(lambda i: outer(i, shared), range(8), pool=shared) == [10 * i for i in range(8)]
    assert pmap(lambda i: outer(i, shared), range(8), pool=shared, batch_size=3) == [10 * i for i in range(8)]
    wait_until(lambda: len(take_all(shared)) == size)


def test_C140_nested_through_somebody_else(team: list[int]) -> None:
    """The inner maps run on a process that is no member, and all members wait for them."""
    shared = WorkerPool(team[:1])
    assert pmap(lambda i: remotecall_fetch(outer, team[3], i, shared), range(2), pool=shared) == [0, 10]


def test_C141_four_threads(team: list[int]) -> None:
    for pools in ([WorkerPool(team) for _ in range(4)], [WorkerPool(team)] * 4, [None] * 4):
        with ThreadPoolExecutor(4) as threads:
            futures = [threads.submit(pmap, ident, range(10), pool=pool) for pool in pools]
            assert [future.result(30) for future in futures] == [list(range(10))] * 4


class Counted:
    times = 0

    def __reduce__(self) -> Any:
        Counted.times += 1
        return Counted, ()


def test_C142_the_function_goes_once_to_each_worker(team: list[int]) -> None:
    captured = Counted()
    Counted.times = 0
    assert pmap(lambda i: captured and i, range(200)) == list(range(200))
    assert Counted.times <= 4
    wait_until(lambda: own_nothing(team))


def test_C143_after_rmprocs(team: list[int]) -> None:
    extra = distpool.addprocs(2)
    pool = WorkerPool(extra)
    distpool.rmprocs(extra)
    assert set(pmap(lambda _: myid(), range(5), pool=pool)) == {1}


def test_C145_pgenerate(pool: Any) -> None:
    assert list(itertools.islice(pgenerate(lambda i: i * i, itertools.count(), pool=pool), 20)) == [
        i * i for i in range(20)
    ]
    assert list(pgenerate(lambda a, b: a + b, "ab", "cde", pool=pool)) == ["ac", "bd"]
    values = pgenerate(refuse_50, range(45, 60), pool=pool)
    assert [next(values) for _ in range(5)] == [45, 46, 47, 48, 49]
    with pytest.raises(RuntimeError, match="foobar"):
        next(values)


def test_C153_a_pool_that_is_busy(team: list[int]) -> None:
    pool = WorkerPool(team[:1])
    assert remotecall_fetch(lambda: pmap(ident, range(3), pool=pool), team[1]) == [0, 1, 2]
    assert remotecall_fetch(lambda: pmap(ident, range(3), pool=pool), team[0]) == [0, 1, 2]
    assert remotecall_fetch(lambda: pmap(ident, range(3), pool=pool), pool) == [0, 1, 2]
    pid = pool.take()
    assert remotecall_fetch(lambda: pmap(ident, range(3), pool=pool), team[1]) == [0, 1, 2]
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(pmap, ident, range(3), pool=pool)
        pool.put(pid)
        assert future.result(30) == [0, 1, 2]
    wait_until(pool.isready)


def test_what_cannot_be_sent(pool: Any, team: list[int]) -> None:
    lock = threading.Lock()
    with pytest.raises(distpool.SerializationError):
        pmap(lambda i: lock, range(3), pool=pool)
    for batch in BATCHES:
        values = pmap(lambda i: threading.Lock() if i == 1 else i, range(3), pool=pool, batch_size=batch,
                      on_error=lambda e: type(e))  # fmt: skip
        assert values == [0, distpool.SerializationError, 2]
        assert pmap(ident, [0, lock, 2], pool=pool, batch_size=batch, on_error=lambda e: 1) == [0, 1, 2]
    assert pmap(ident, range(8), pool=pool) == list(range(8))


def test_references_in_results(pool: Any) -> None:
    for batch in BATCHES:
        channels = pmap(
            lambda i: RemoteChannel(lambda: Channel(1)).put((i, myid())), range(6), pool=pool, batch_size=batch
        )
        assert [channel.take(timeout=10)[0] for channel in channels] == list(range(6))


def test_a_pool_that_was_made_for_a_map_goes_with_it(team: list[int]) -> None:
    """Without the collector, which may never run in a worker that idles: the map and its lane knew each other."""
    before = set(distpool.debug.refs(team[0]))
    remotecall_fetch(gc.disable, team[0])
    try:
        for _ in range(3):
            squares = remotecall_fetch(lambda: pmap(lambda x: x * x, range(20), pool=WorkerPool(team)), team[0])
            assert squares == [x * x for x in range(20)]
        wait_until(lambda: set(distpool.debug.refs(team[0])) <= before)
    finally:
        remotecall_fetch(gc.enable, team[0])
