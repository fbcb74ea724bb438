"""CONFORMANCE 2.1 and 2.9, 2.10: WorkerPool, CachingPool, the default pool."""

from __future__ import annotations

import collections
import gc
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import distpool
from distpool import (
    CachingPool,
    Channel,
    RemoteChannel,
    RemoteException,
    WorkerPool,
    default_worker_pool,
    myid,
    remote,
    remote_do,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
    set_default_worker_pool,
)
from distpool.node import node as nodes
from distpool.pools import find_kept
from distpool.refs import gc as references
from distpool.refs.refs import LOCAL_VALUE, Outcome

from .conftest import wait_until
from .helpers import boom, f_args, ident, own_nothing

pytestmark = pytest.mark.time_limit(90)


def in_thread(work: Any) -> tuple[threading.Thread, list[Any]]:
    """Run `work()` beside; its value or exception is appended to the list."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def test_C001_C005_alone() -> None:
    assert distpool.nworkers() == 1, "this test comes first in its module"
    pool = default_worker_pool()
    assert len(pool) == 0
    assert pool.take() == 1
    assert pool.isready()
    assert pool.nworkers() == 1
    assert pool.workers() == [1]
    assert pool.wait() is pool
    assert remotecall_fetch(myid, pool) == 1
    assert pool.take() == 1
    assert remote(myid)() == 1


def test_C065_arguments_through_pools(team: list[int]) -> None:
    for pool in (default_worker_pool(), WorkerPool(team), CachingPool(team)):
        for args, kwargs, expected in (
            ((1,), {}, 1), ((1, 2), {}, 3), ((1,), {"kw1": 4}, 5), ((1,), {"kw1": 4, "kw2": 8}, 13),
            ((1, 2), {"kw1": 4, "kw2": 8}, 15),
        ):  # fmt: skip
            assert remotecall(f_args, pool, *args, **kwargs).fetch() == expected
            assert remotecall_wait(f_args, pool, *args, **kwargs).fetch() == expected
            assert remotecall_fetch(f_args, pool, *args, **kwargs) == expected
            assert remote_do(f_args, pool, *args, **kwargs) is None
        wait_until(lambda pool=pool: free(pool) == 4)


def free(pool: WorkerPool) -> int:
    """How many workers can be taken now."""
    taken = []
    while pool.isready():
        taken.append(pool.take(timeout=10))
    for pid in taken:
        pool.put(pid)
    return len(taken)


@pytest.mark.parametrize("backwards", [False, True])
def test_C147_ready_while_somebody_is_free(team: list[int], backwards: bool) -> None:
    pool = default_worker_pool()
    channels = [RemoteChannel(lambda: Channel(1), pid) for pid in team]
    assert pool.isready()
    waiting = [in_thread(lambda channel=channel: remote(distpool.take)(channel)) for channel in channels]
    wait_until(lambda: not pool.isready())
    assert len(pool) == 4
    order = list(range(4))
    for count, number in enumerate(reversed(order) if backwards else order, 1):
        channels[number].put(number)
        thread, found = waiting[number]
        thread.join(10)
        assert found == [number]
        assert free(pool) == count
    assert pool.isready()


def test_C148_calls_give_the_worker_back(team: list[int]) -> None:
    pool = WorkerPool(team[:2])
    assert remotecall(myid, pool).fetch() in team[:2]
    for _ in range(4):
        with pytest.raises(RemoteException) as info:
            remotecall(boom, pool).fetch()
        assert info.value.captured.ex.args == ("foobar",)
        with pytest.raises(RemoteException):
            remotecall_fetch(boom, pool)
    wait_until(lambda: free(pool) == 2)


def test_C148_a_dropped_future_gives_the_worker_back_too(team: list[int]) -> None:
    pool = WorkerPool(team[:1])
    for _ in range(20):
        remotecall(ident, pool, 1)
        gc.collect()
    assert pool.take(timeout=10) == team[0]


def test_C148_arguments_that_cannot_be_sent(team: list[int]) -> None:
    pool = WorkerPool(team[:1])
    for call in (remotecall, remotecall_fetch, remotecall_wait, remote_do):
        with pytest.raises(distpool.SerializationError):
            call(ident, pool, threading.Lock())
    assert free(pool) == 1


@pytest.mark.parametrize("kind", [WorkerPool, CachingPool])
def test_C149_held_until_the_call_is_done(team: list[int], kind: Any) -> None:
    pool = kind(team[:1])
    channel = RemoteChannel()
    future = remotecall(lambda: channel.wait() and None, pool)
    assert not pool.isready()
    channel.put(1)
    future.wait()
    wait_until(pool.isready)


class UsesItsPool:
    """While it is serialised, it calls itself on another worker of the same pool."""

    pool: Any = None
    found: Any = None

    def __getstate__(self) -> object:
        pool, UsesItsPool.pool = UsesItsPool.pool, None
        if pool is not None:
            UsesItsPool.found = remotecall_fetch(self, pool)
        return 1

    def __setstate__(self, state: object) -> None:
        """Nothing that could be set."""

    def __call__(self) -> int:
        return myid()


def test_a_function_whose_serialisation_uses_its_pool(team: list[int]) -> None:
    UsesItsPool.pool = pool = CachingPool(team[:2])
    asked, found = in_thread(lambda: remotecall_fetch(UsesItsPool(), pool))
    asked.join(20)
    assert found == [team[0]]
    assert UsesItsPool.found == team[1]


class Strike:
    """Ctrl-C before the n-th line of the functions that take a worker, call, and give it back."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.came = False

    def trace(self, frame: Any, event: str, argument: Any) -> Any:
        file, function = os.path.basename(frame.f_code.co_filename), frame.f_code.co_name
        ours = file in ("pools.py", "channelcore.py") or function in ("_fetch_somewhere", "_remotecall_somewhere")
        if not ours or function in ("__del__", "later"):  # Python ignores what is raised in a finalizer
            return None
        if event == "line" and not self.came:
            self.number -= 1
            if self.number < 0:
                self.came = True
                signal.raise_signal(signal.SIGINT)
        return self.trace


@pytest.mark.parametrize("how", [remotecall_fetch, remotecall, remote_do])
def test_ctrl_c_between_any_two_steps_loses_no_worker(team: list[int], how: Any) -> None:
    """Who takes a worker and is interrupted before he can give it back: the pool's next user waited for ever."""
    pool = WorkerPool(team[:2])
    number = 0
    while True:
        strike = Strike(number)
        sys.settrace(strike.trace)
        try:
            how(myid, pool)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        free = [pool.take(timeout=20) for _ in range(2)]
        assert sorted(free) == sorted(team[:2]), f"interrupted at line {number}"
        for pid in free:
            pool.put(pid)
        if not strike.came:
            break
        number += 1
    assert number > 20


class OwnPool(WorkerPool):
    """Gives out what its class wants."""

    def take(self, *, timeout: float | None = None) -> int:
        self.taken = super().take(timeout=timeout)
        return self.taken


def test_a_pool_with_a_take_of_its_own_is_asked(team: list[int]) -> None:
    pool = OwnPool(team[:2])
    assert remotecall_fetch(myid, pool) == pool.taken
    assert remotecall(myid, pool).fetch() == pool.taken


def test_C151_wait(team: list[int]) -> None:
    pool = WorkerPool(team[:1])
    pid = pool.take()
    assert not pool.isready()
    thread, found = in_thread(pool.wait)
    there = remotecall(lambda: pool.wait().isready(), team[1])
    assert not there.isready()
    assert thread.is_alive()
    assert distpool.put(pool, pid) is pool
    thread.join(10)
    assert found == [pool]
    assert there.fetch() is True
    assert pool.isready()


def test_C151_times_out(team: list[int]) -> None:
    pool = WorkerPool(team[:1])
    pool.take()
    for wait in (pool.take, pool.wait):
        with pytest.raises(TimeoutError):
            wait(timeout=0.05)
    with pytest.raises(RemoteException) as info:
        remotecall_fetch(lambda: pool.take(timeout=0.05), team[1])
    assert isinstance(info.value.captured.ex, TimeoutError)
    pool.put(team[0])
    assert pool.take(timeout=10) == team[0], "those who had given up got nothing"


def test_C152_from_another_process(team: list[int]) -> None:
    pool = WorkerPool(team[:3])

    def there() -> Any:
        pids = [pool.take(), pool.take()]
        seen = (len(pool), pool.isready(), pool.workers(), pool.nworkers())
        for pid in pids:
            pool.put(pid)
        pool.push(team[3])
        return pids, seen, pool.wait() is pool

    pids, seen, same = remotecall_fetch(there, team[3])
    assert pids == team[:2]
    assert seen == (3, True, team[:3], 3)
    assert same
    assert len(pool) == 4
    assert free(pool) == 4
    owned_there = remotecall_fetch(lambda: WorkerPool(team[:2]), team[2])
    assert [owned_there.take(), owned_there.take()] == team[:2]
    assert not owned_there.isready()


def test_C152_nobody_gets_what_somebody_has(team: list[int]) -> None:
    pool = WorkerPool(team)
    log = RemoteChannel(lambda: Channel(1000))

    def work() -> None:
        for _ in range(25):
            pid = pool.take()
            log.put((pid, 1))
            log.put((pid, -1))
            pool.put(pid)

    with distpool.sync():
        for pid in [1, *team, *team]:
            distpool.spawnat(pid, work)
    held: collections.Counter[int] = collections.Counter()
    for _ in range(9 * 50):
        pid, change = log.take(timeout=10)
        held[pid] += change
        assert held[pid] in (0, 1)
    assert free(pool) == 4


def test_C152_a_taker_that_dies_keeps_nothing(team: list[int]) -> None:
    pool = WorkerPool(team[:2])
    (victim,) = distpool.addprocs(1)
    assert remotecall_fetch(pool.take, victim) == team[0]
    future = remotecall(lambda: [pool.take(), pool.take()], victim)  # gets one and waits for the other
    wait_until(lambda: not pool.isready())
    remote_do(os._exit, victim, 1)
    with pytest.raises(distpool.ProcessExitedException):
        future.fetch()
    assert sorted([pool.take(timeout=10), pool.take(timeout=10)]) == team[:2]


def test_C154_C155_put_and_push(team: list[int]) -> None:
    pool = WorkerPool(team[:2])
    assert pool.put(team[3]) is pool
    assert pool.workers() == team[:2]
    pool.put(team[0])  # was not taken
    assert pool.push(team[0]) is pool  # is a member
    assert [pool.take(), pool.take()] == team[:2]
    assert not pool.isready()
    pool.push(team[2])
    assert pool.take() == team[2]
    assert len(pool) == 3
    for pid in (team[1], team[2], team[0]):
        pool.put(pid)
    assert [pool.take() for _ in range(3)] == [team[1], team[2], team[0]], "first in, first out"
    for bad in (True, "2", None, 2.0):
        with pytest.raises(TypeError):
            pool.push(bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            WorkerPool([bad])  # type: ignore[list-item]


def test_C157_dead_members_vanish(team: list[int]) -> None:
    assert not WorkerPool([99_999]).isready()
    assert WorkerPool([99_999, 1]).take() == 1
    pool = WorkerPool([99_999, 1])
    assert pool.wait().workers() == [1]
    gone, stays = distpool.addprocs(2)
    pool = WorkerPool([gone, stays])
    taken = pool.take()
    assert taken == gone
    distpool.rmprocs(gone)
    pool.put(gone)
    assert len(pool) == 1
    assert [remotecall_fetch(myid, pool) for _ in range(3)] == [stays] * 3
    waiting = in_thread(lambda: [pool.take(), pool.take()])
    wait_until(lambda: not pool.isready())
    distpool.rmprocs(stays)
    waiting[0].join(10)
    assert isinstance(waiting[1][0], RuntimeError)
    assert "No active worker available in pool" in str(waiting[1][0])


def test_C158_empty(team: list[int]) -> None:
    pool = WorkerPool([])
    for use in (pool.take, pool.wait, lambda: remotecall(myid, pool), lambda: remotecall_fetch(myid, pool)):
        with pytest.raises(RuntimeError, match="No active worker available in pool"):
            use()
    with pytest.raises(RemoteException) as info:
        remotecall_fetch(pool.take, team[0])
    assert str(info.value.captured.ex) == "No active worker available in pool"
    assert not pool.isready()
    assert pool.workers() == []


def test_C159_default_pool_of_the_group(team: list[int]) -> None:
    usual = default_worker_pool()
    assert usual is default_worker_pool()
    assert usual.workers() == team
    assert remotecall_fetch(lambda: default_worker_pool() == usual, team[0])
    mine = CachingPool(team[1:2])
    assert set_default_worker_pool(mine) is mine
    try:
        assert {remote(myid)() for _ in range(4)} == {team[1]}
        assert set(distpool.pmap(lambda _: myid(), range(4), pool=default_worker_pool())) == {team[1]}
        assert set(distpool.pmap(lambda _: myid(), range(4))) == {team[1]}
        assert remotecall_fetch(lambda: default_worker_pool().workers(), team[0]) == [team[1]]
        remotecall_fetch(lambda: set_default_worker_pool(usual) and None, team[0])
        assert default_worker_pool() == usual
    finally:
        set_default_worker_pool(usual)
    assert usual.workers() == team
    with pytest.raises(TypeError):
        set_default_worker_pool([2])  # type: ignore[arg-type]


def test_C159_a_default_pool_that_died_can_be_replaced(team: list[int]) -> None:
    """The old one was asked first, and its death kept every other from its place."""
    usual = default_worker_pool()
    (owner,) = distpool.addprocs(1)
    remotecall_fetch(lambda: set_default_worker_pool(WorkerPool(distpool.workers())) and None, owner)
    distpool.rmprocs(owner)
    try:
        with pytest.raises(distpool.ProcessExitedException):
            remote(myid)()
    finally:
        assert set_default_worker_pool(usual) is usual
    assert remote(myid)() in team
    assert set_default_worker_pool(usual) is usual, "by itself"
    assert remotecall_fetch(default_worker_pool, team[0]).workers() == team
    with pytest.raises(distpool.ProcessExitedException):
        set_default_worker_pool(DiedMeanwhile(usual._channel))
    assert default_worker_pool() is usual and usual._queue().falls_back, "all as before"  # type: ignore[union-attr]


class DiedMeanwhile(WorkerPool):
    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def _do(self, op: str, *arguments: Any, timeout: float | None = None) -> Any:
        raise distpool.ProcessExitedException(99)


def test_a_pool_that_dies_during_a_call_costs_not_its_value(team: list[int]) -> None:
    (owner,) = distpool.addprocs(1)
    pool = remotecall_fetch(lambda: WorkerPool(team[:1]), owner)
    begun, go = RemoteChannel(lambda: Channel(1)), RemoteChannel(lambda: Channel(1))
    waiting = in_thread(lambda: remotecall_fetch(lambda: (begun.put(1), go.take())[1], pool))
    begun.take(timeout=10)
    distpool.rmprocs(owner)
    go.put("value")
    waiting[0].join(10)
    assert waiting[1] == ["value"]
    with pytest.raises(distpool.ProcessExitedException):
        remotecall_fetch(myid, pool)


def test_C159_executors_workers_are_not_in_it(team: list[int]) -> None:
    with distpool.ClusterExecutor(1) as executor:
        executor.submit(abs, 1).result(30)
        assert default_worker_pool().workers() == team
        assert set(executor.workers) < set(distpool.workers())


def test_remote_checks_at_the_call(team: list[int]) -> None:
    with pytest.raises(TypeError):
        remote(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        remote(abs, 2)  # type: ignore[arg-type]
    with pytest.raises(RemoteException):
        remote(boom)()
    assert remote(f_args, WorkerPool(team[2:3]))(1, kw1=2) == 3
    with pytest.raises(TypeError):
        remotecall(abs, "everywhere", 1)


def test_a_pickled_pool_is_a_dead_handle(team: list[int]) -> None:
    dead = pickle.loads(pickle.dumps(WorkerPool(team)))
    with pytest.raises(RuntimeError):
        dead.take()


# -- CachingPool -------------------------------------------------------------------------------------------------


class Counted:
    """Counts how often it is pickled."""

    times = 0

    def __reduce__(self) -> Any:
        Counted.times += 1
        return Counted, ()


@pytest.fixture
def quiet(team: list[int]) -> Iterator[list[int]]:
    """Two workers that own no references."""
    wait_until(lambda: own_nothing(team[:2]))
    yield team[:2]


def test_C160_C165_clear_and_drop(quiet: list[int]) -> None:
    for end in ("clear", "drop", "function"):
        pool: Any = CachingPool(quiet)
        f: Any = lambda i, bytes_=b"x" * 1000: i + len(bytes_)  # noqa: E731
        assert distpool.pmap(f, range(10), pool=pool) == [i + 1000 for i in range(10)]
        assert all(len(distpool.debug.refs(pid)) == 1 for pid in quiet)
        if end == "clear":
            assert pool.clear() is pool
        elif end == "drop":
            del pool
        else:
            del f
        wait_until(lambda: own_nothing(quiet))


def test_C160_module_function_clear(quiet: list[int]) -> None:
    pool = CachingPool(quiet)
    f = lambda: myid()  # noqa: E731
    assert remotecall_fetch(f, pool) in quiet
    assert distpool.clear(pool) is pool
    wait_until(lambda: own_nothing(quiet))
    assert remotecall_fetch(f, pool) in quiet


def test_C160_clear_frees_without_the_collector(quiet: list[int]) -> None:
    """The cache was a cycle: the function lived on the workers until this process collected garbage, or dropped f."""

    class Captured:
        pass

    captured = Captured()
    f = lambda: (myid(), captured)[0]  # noqa: E731

    def alive(name: str) -> int:
        gc.collect()
        return sum(type(each).__name__ == name for each in gc.get_objects())

    pool = CachingPool(quiet)
    for _ in range(2):
        assert remotecall_fetch(f, pool) in quiet
    assert sum(remotecall_fetch(alive, pid, "Captured") for pid in quiet) == 2
    gc.disable()
    try:
        pool.clear()
        deadline = time.monotonic() + 10
        while sum(remotecall_fetch(alive, pid, "Captured") for pid in quiet):
            assert time.monotonic() < deadline
    finally:
        gc.enable()
    assert f is not None


def test_C161_pickled_once_per_worker(quiet: list[int]) -> None:
    captured = Counted()
    f = lambda i: (i, type(captured).__name__)  # noqa: E731
    Counted.times = 0
    pool = CachingPool(quiet)
    assert distpool.pmap(f, range(100), pool=pool) == [(i, "Counted") for i in range(100)]
    for _ in range(10):
        remotecall_fetch(f, pool, 1)
        remotecall(f, pool, 1).fetch()
    assert 1 <= Counted.times <= 2


def test_C163_by_identity(quiet: list[int]) -> None:
    pool = CachingPool(quiet[:1])
    captured = [1]
    f = lambda: list(captured)  # noqa: E731
    assert remotecall_fetch(f, pool) == [1]
    captured.append(2)
    assert remotecall_fetch(f, pool) == [1], "stale by design"
    assert remotecall_fetch(lambda: list(captured), pool) == [1, 2], "another function"
    pool.clear()
    assert remotecall_fetch(f, pool) == [1, 2]
    for number in range(50):  # ids of freed functions are used again
        assert remotecall_fetch(lambda number=number: number, pool) == number


def test_C164_what_cannot_be_sent_or_loaded(quiet: list[int]) -> None:
    pool = CachingPool(quiet)
    lock = threading.Lock()
    unsendable = lambda: lock  # noqa: E731
    unloadable = Unloadable()
    for _ in range(3):
        with pytest.raises(distpool.SerializationError):
            remotecall_fetch(unsendable, pool)
        with pytest.raises(RemoteException, match="cannot be loaded"):
            remotecall_fetch(unloadable, pool)
        with pytest.raises(RemoteException, match="cannot be loaded"):
            remotecall(unloadable, pool).fetch()
    with pytest.raises(ImportError, match="cannot be loaded"):
        distpool.pmap(unloadable, range(3), pool=pool)
    wait_until(lambda: free(pool) == 2)


def refuse() -> Any:
    raise ImportError("cannot be loaded")


class Unloadable:
    def __call__(self, *args: Any) -> None: ...

    def __reduce__(self) -> Any:
        return refuse, ()


class Adder:
    def __init__(self, n: int) -> None:
        self.n = n

    def add(self, x: int) -> int:
        return self.n + x

    __call__ = add


def test_C166_any_callable(quiet: list[int]) -> None:
    import functools
    import math

    pool = CachingPool(quiet)
    adder = Adder(3)
    for f, x, expected in (
        (float, 1, 1.0), (math.sqrt, 4, 2.0), (str.upper, "a", "A"), (adder, 1, 4), (adder.add, 1, 4),
        (functools.partial(pow, 2), 3, 8), ("x".join, ["a", "b"], "axb"),
    ):  # fmt: skip
        for _ in range(2):
            assert remotecall_fetch(f, pool, x) == expected
    calls = remotecall_fetch(lambda: len(distpool.debug.refs()), quiet[0])
    for _ in range(10):
        assert remotecall_fetch(adder.add, pool, 1) == 4
    assert remotecall_fetch(lambda: len(distpool.debug.refs()), quiet[0]) <= calls, "bound methods: one identity"


def test_caching_pools_do_not_travel(team: list[int]) -> None:
    pool = CachingPool(team)
    with pytest.raises(TypeError):
        pickle.dumps(pool)
    with pytest.raises(distpool.SerializationError):
        remotecall_fetch(ident, team[0], pool)


def test_a_cleared_pool_does_not_disturb_calls_on_their_way(team: list[int]) -> None:
    pool = CachingPool(team[:1])
    f = lambda i: i  # noqa: E731
    deadline = time.monotonic() + 20
    for i in range(100):
        future = remotecall(f, pool, i)
        pool.clear()
        assert future.fetch() == i
        assert time.monotonic() < deadline


def test_a_function_that_goes_just_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for it, by a call whose caller has given up, does not wait for it for ever."""
    node = nodes.current()
    owner, rrid = references.of(node).owner, references.of(node).new_id()
    owner.settle(owner.touch(rrid, node.pid), Outcome(LOCAL_VALUE, abs, (), node.pid))
    assert find_kept(*rrid) is abs
    watch = owner.watch

    def late(*arguments: Any) -> None:
        owner.change(rrid, node.pid, -1)
        watch(*arguments)

    monkeypatch.setattr(owner, "watch", late)
    with pytest.raises(RuntimeError, match="not kept on this worker any more"):
        find_kept(*rrid)


def test_a_function_at_the_place_of_one_that_is_gone(team: list[int]) -> None:
    """Ctrl-C may come in the weak reference's callback that forgets the first of them, and nobody hears of it."""
    pool = CachingPool(team[:1])
    first = make_answer("first")
    assert remotecall_fetch(first, pool) == "first"
    (entry,) = pool._cache._entries.values()
    del first
    assert not pool._cache._entries
    second = make_answer("second")
    pool._cache._entries[id(second)] = entry
    assert remotecall_fetch(second, pool) == remotecall_fetch(second, pool) == "second"
    assert len(pool._cache) == 1


def make_answer(answer: str) -> Callable[[], str]:
    return lambda: answer
