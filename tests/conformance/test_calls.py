"""CONFORMANCE 2.5, 2.6, 2.7 and 2.18: remote calls, their errors, what travels, threads."""

from __future__ import annotations

import enum
import functools
import math
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import distpool
from distpool import (
    RemoteException,
    SerializationError,
    fetch,
    remote_do,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
)

from .helpers import boom, f_args, ident, myid

v1: Any = 1


class Colour(enum.Enum):
    RED = 1


def test_what_cannot_be_called_is_refused_at_the_call_wherever_it_would_run(w: list[int]) -> None:
    """Seen: calls to oneself let it run, and fail there."""
    for where in (1, w[0], "any", distpool.WorkerPool(w[:1])):
        for call in (remotecall, remotecall_fetch, remotecall_wait, remote_do):
            with pytest.raises(TypeError, match="not callable"):
                call(3, where)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not callable"):
        distpool.spawn("f")  # type: ignore[arg-type]


def test_C009_unknown_pid(w: list[int]) -> None:
    for call in (remotecall, remotecall_fetch, remotecall_wait, remote_do):
        with pytest.raises(ValueError, match="no process with id 9999 exists"):
            call(myid, 9999)
    with pytest.raises(RemoteException) as info:
        remotecall_fetch(lambda: remotecall_fetch(myid, 9999), w[0])
    assert isinstance(info.value.captured.ex, ValueError)


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [((1,), {}, 1), ((1, 2), {}, 3), ((1,), {"kw1": 4}, 5), ((1,), {"kw1": 4, "kw2": 8}, 13),
     ((1, 2), {"kw1": 4, "kw2": 8}, 15)],
)  # fmt: skip
def test_C065_arguments(w: list[int], args: Any, kwargs: Any, expected: int) -> None:
    for target in (w[0], 1):
        assert fetch(remotecall(f_args, target, *args, **kwargs)) == expected
        assert fetch(remotecall_wait(f_args, target, *args, **kwargs)) == expected
        assert remotecall_fetch(f_args, target, *args, **kwargs) == expected
        assert remote_do(f_args, target, *args, **kwargs) is None  # type: ignore[func-returns-value]


def test_C067_big_and_many(w: list[int], scale: float) -> None:
    numbers = list(range(int(1_000_000 * scale)))
    assert remotecall_fetch(ident, w[0], numbers) == numbers
    words = [str(random.random()) for _ in range(int(100_000 * scale))]
    assert remotecall_fetch(ident, w[0], words) == words
    assert all(remotecall_fetch(myid, w[0]) == w[0] for _ in range(1000))


def test_C068_threads_do_not_mix(w: list[int], scale: float) -> None:
    numpy = pytest.importorskip("numpy")

    def trip(seed: int) -> bool:
        array = numpy.full(int(200_000 * scale), float(seed))
        return all(bool((remotecall_fetch(ident, w[0], array) == seed).all()) for _ in range(5))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(trip, range(8)))


def test_C069_identity_of_values(w: list[int]) -> None:
    assert remotecall_fetch(ident, w[0], None) is None
    assert remotecall_fetch(ident, w[0], Colour.RED) is Colour.RED


def test_C070_nested_lambdas(w: list[int]) -> None:
    assert remotecall_fetch(lambda x: (lambda y: 2 * y)(x) + 1, w[0], 3) == 7


def test_C071_worker_to_worker(w: list[int]) -> None:
    for one in w[:3]:
        for other in w[:3]:
            assert remotecall_fetch(lambda p: remotecall_fetch(myid, p), one, other) == other


def test_C073_chain(w: list[int]) -> None:
    b1 = lambda: 1  # noqa: E731
    b2 = lambda: fetch(remotecall(b1, w[0])) + 1  # noqa: E731
    b3 = lambda: fetch(remotecall(b2, w[1])) + 1  # noqa: E731
    b4 = lambda: fetch(remotecall(b3, w[2])) + 1  # noqa: E731
    assert b4() == 4


def test_C074_call_back_and_recursion(w: list[int]) -> None:
    assert remotecall_fetch(lambda: remotecall_fetch(myid, 1), w[0]) == 1

    def down(depth: int, pid: int) -> int:
        here = myid()
        return 0 if depth == 0 else 1 + remotecall_fetch(down, pid if here == 1 else 1, depth - 1, pid)

    assert remotecall_fetch(down, w[0], 20, w[0]) == 20


def test_C075_callables(w: list[int]) -> None:
    assert remotecall_fetch(float, w[0], 1) == 1.0
    assert remotecall_fetch("a,b".split, w[0], ",") == ["a", "b"]
    assert remotecall_fetch(functools.partial(pow, 2), w[0], 3) == 8


def test_C076_copies(w: list[int]) -> None:
    def change(x: list[int]) -> list[int]:
        x[0] = 1
        return x

    v = [0]
    assert remotecall_fetch(change, 1, v) is v
    assert v == [1]
    v = [0]
    r = remotecall_fetch(change, w[0], v)
    assert v == [0]
    assert r == [1]


def test_C077_to_oneself(w: list[int]) -> None:
    release = threading.Event()
    f = remotecall(release.wait, 1, 30)
    release.set()
    assert f.fetch(timeout=30)
    assert remotecall_fetch(threading.get_ident, 1) == threading.get_ident()


def test_C082_wait_moves_no_value(w: list[int], scale: float) -> None:
    size = int(10_000_000 * scale)
    f = remotecall_wait(lambda: b"x" * size, w[0])
    assert f.done()
    assert len(fetch(f)) == size
    with pytest.raises(RemoteException):
        remotecall_wait(boom, w[0])


def test_C083_unserialisable_argument(w: list[int], scale: float) -> None:
    for call in (remotecall, remotecall_fetch):
        with pytest.raises(SerializationError, match="lock"):
            call(ident, w[0], [b"x" * int(3_000_000 * scale), threading.Lock()])
    assert remotecall_fetch(lambda: "test", w[0]) == "test"


class FailsToLoad:
    def __reduce__(self) -> Any:
        return _raise_on_load, ()


def _raise_on_load() -> Any:
    if myid() != 1:
        raise ImportError("no such class here")
    return FailsToLoad()


def test_C085_undeserialisable_argument(w: list[int]) -> None:
    with pytest.raises(RemoteException) as info:
        remotecall_fetch(ident, w[0], FailsToLoad())
    assert "no such class here" in str(info.value)
    with pytest.raises(RemoteException):
        fetch(remotecall(ident, w[0], FailsToLoad()))
    assert remotecall_fetch(lambda: "test", w[0]) == "test"


def test_C087_exceptions(w: list[int]) -> None:
    for pid in (w[0], 1):
        for call in (remotecall_fetch, remotecall_wait, lambda f, p: remotecall(f, p).wait()):
            with pytest.raises(RemoteException) as info:
                call(boom, pid)
            assert isinstance(info.value.captured.ex, RuntimeError)
            assert str(info.value.captured.ex) == "foobar"
            assert info.value.pid == pid


def leave(kind: type[BaseException]) -> None:
    raise kind("left")


def test_C087_what_is_no_exception(w: list[int]) -> None:
    for kind in (SystemExit, GeneratorExit, BaseException):
        for pid in (w[0], 1):
            for call in (remotecall_fetch, remotecall_wait, lambda f, p, k: fetch(remotecall(f, p, k))):
                with pytest.raises(RemoteException) as info:
                    call(leave, pid, kind)
                assert type(info.value.captured.ex) is kind and info.value.captured.ex.args == ("left",)
                assert info.value.pid == pid and "in leave" in info.value.captured.traceback


def test_C087_ctrl_c_in_a_call_to_oneself_comes_through(w: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        remotecall_fetch(signal.raise_signal, 1, signal.SIGINT)
    with pytest.raises(RemoteException) as info:
        remotecall_fetch(leave, w[0], KeyboardInterrupt)
    assert type(info.value.captured.ex) is KeyboardInterrupt


def test_C089_text(w: list[int]) -> None:
    with pytest.raises(RemoteException) as info:
        remotecall_fetch(math.sqrt, w[0], -1)
    assert str(info.value).startswith(f"On worker {w[0]}:")
    with pytest.raises(ValueError) as here:  # what it says depends on the Python
        math.sqrt(-1)
    assert str(here.value) in str(info.value)
    assert isinstance(info.value.__cause__, ValueError)


def test_C091_nested_errors(w: list[int]) -> None:
    with pytest.raises(RemoteException) as info:
        remotecall_fetch(lambda: remotecall_fetch(boom, w[1]), w[0])
    assert info.value.pid == w[0]
    inner = info.value.captured.ex
    assert isinstance(inner, RemoteException)
    assert inner.pid == w[1]
    assert f"On worker {w[1]}" in str(info.value)


class Strange(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} {b}")
        self.lock = threading.Lock()


def raise_strange() -> None:
    raise Strange(1, 2)


def test_C093_strange_exceptions(w: list[int]) -> None:
    with pytest.raises(RemoteException) as info:
        remotecall_fetch(raise_strange, w[0])
    assert "Strange" in str(info.value)
    assert "raise_strange" in str(info.value)
    assert remotecall_fetch(myid, w[0]) == w[0]


def test_unserialisable_result(w: list[int]) -> None:
    with pytest.raises(RemoteException) as info:
        remotecall_fetch(threading.Lock, w[0])
    assert isinstance(info.value.captured.ex, SerializationError)
    with pytest.raises(RemoteException):
        fetch(remotecall(threading.Lock, w[0]))


def test_C097_C098_C103_C104_globals_are_fresh(w: list[int]) -> None:
    global v1
    for value in (1, 2, 3, [1], [1], "a", "b", "a"):
        v1 = value
        assert remotecall_fetch(eval("lambda: v1", {"v1": value}), w[0]) == value
    numbers = [0] * 10
    for index in range(5):
        numbers[index] = index + 1
        assert remotecall_fetch(lambda: numbers, w[0]) == numbers


def test_C099_C100_same_objects(w: list[int]) -> None:
    shared = [1]
    pair = (shared, shared)
    first, second = remotecall_fetch(ident, w[0], pair)
    assert first is second
    assert remotecall_fetch(lambda t: t is int, w[0], int)
    assert remotecall_fetch(lambda m: m.__name__, w[0], distpool) == "distpool"


def test_C111_state_travels_as_it_is(w: list[int]) -> None:
    rng = random.Random(5)
    first = remotecall_fetch(rng.random, w[0])
    assert remotecall_fetch(rng.random, w[0]) == first
    assert rng.random() == first
    assert remotecall_fetch(rng.random, w[0]) != first


def test_C269_replies_match_requests(w: list[int]) -> None:
    def many(seed: int) -> bool:
        return all(remotecall_fetch(ident, w[seed % 4], (seed, n)) == (seed, n) for n in range(50))

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(many, range(16)))


def test_C267_threads_on_two_workers(w: list[int]) -> None:
    def putter(channel: Any) -> None:
        thread = threading.Thread(target=channel.put, args=(None,))
        thread.start()
        thread.join(30)

    def taker(channel: Any) -> Any:
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(channel.take).result(30)

    channel = distpool.RemoteChannel(lambda: distpool.Channel(0), w[0])
    for one in w[:2]:
        for other in w[:2]:
            taken = remotecall(taker, other, channel)
            put_ = remotecall(putter, one, channel)
            taken.wait(60)
            put_.wait(60)


class Number:
    """As numpy's integers: no int, but it says that it is one; and it has `take` and `put`, as pools have."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value

    def take(self) -> int:
        raise AssertionError("it is no pool")

    put = take


def test_counts_and_pids_of_other_libraries() -> None:
    pids = distpool.addprocs(Number(1))  # type: ignore[arg-type]
    pid: Any = Number(pids[0])
    assert remotecall_fetch(abs, pid, -3) == remotecall(abs, pid, -3).result(20) == 3
    distpool.remote_do(abs, pid, -3)
    distpool.interrupt([pid])
    assert distpool.everywhere("number_of_mine = 5\nnumber_of_mine", pid) == 5
    assert distpool.everywhere("number_of_mine += 1", [pid, pid]) is None
    assert distpool.remotecall_eval("__main__", pid, "number_of_mine") == 7
    distpool.clear("number_of_mine", pid)
    assert distpool.procs(pid) == distpool.procs() and distpool.check_same_host([1, pid])
    pool = distpool.WorkerPool([])
    assert pool.push(pid) is pool and pool.workers() == distpool.WorkerPool([pid]).workers() == pids
    assert pool.take() == pids[0] and remotecall_fetch(abs, pool.put(pid), -3) == 3
    future, channel = distpool.Future(pid), distpool.RemoteChannel(pid)
    assert type(future.where) is type(channel.where) is int
    assert distpool.RemoteChannel(lambda: distpool.Channel(2), pid).put(1).take() == 1
    assert distpool.Channel(Number(1)).put(1).take() == 1  # type: ignore[arg-type]
    assert list(distpool.ExponentialBackOff(Number(2), jitter=0)) == [0.05, 0.25]  # type: ignore[arg-type]
    distpool.rmprocs(pid)
    with distpool.ClusterExecutor(Number(2), max_workers=Number(2)) as executor:  # type: ignore[arg-type]
        executor.scale(Number(1))  # type: ignore[arg-type]
        assert executor.submit(abs, -1).result(20) == 1
