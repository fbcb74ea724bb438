"""CONFORMANCE 2.17: interrupts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import ClusterExecutor, addprocs, interrupt, rmprocs, workers
from distpool.calls import remotecall, remotecall_fetch

from .clusters import ByCommand, OverStreams, others
from .conftest import wait_until


@pytest.fixture(scope="module")
def pids() -> Iterator[list[int]]:
    yield addprocs(2)
    rmprocs(others())


def ends_with_interrupt(future: object, seconds: float = 5) -> bool:
    with pytest.raises(distpool.RemoteException) as info:
        future.result(seconds)  # type: ignore[attr-defined]
    assert isinstance(info.value.captured.ex, KeyboardInterrupt), info.value
    return True


def all_have_heard() -> None:
    """Of an interrupt: else it may strike the next call. `pmap` uses all workers, those of other fixtures as well."""
    assert [remotecall_fetch(distpool.myid, pid) for pid in workers()] == workers()


def make_spin() -> Any:
    """A function that travels by value: importing this module on a worker takes as long as a test may wait."""

    def spin() -> None:
        while True:
            time.sleep(0.01)

    return spin


spin = make_spin()


def test_C261_a_sleeping_call(pids: list[int]) -> None:
    future = remotecall(time.sleep, pids[0], 60)
    time.sleep(0.3)
    begin = time.monotonic()
    interrupt(pids[0])
    assert ends_with_interrupt(future)
    assert time.monotonic() - begin < 2
    assert remotecall_fetch(distpool.myid, pids[0]) == pids[0]


def test_an_interrupt_right_behind_its_call(pids: list[int]) -> None:
    """It may come before the call's code has begun, while arguments or modules are loaded: it is not lost."""
    for number in range(20):
        future = remotecall(time.sleep, pids[0], 60)
        beside = remotecall(lambda: spin(), pids[0]) if number % 2 else None
        interrupt(pids[0])
        assert ends_with_interrupt(future)
        assert beside is None or ends_with_interrupt(beside)
    assert remotecall_fetch(distpool.myid, pids[0]) == pids[0]


def test_an_interrupt_right_behind_the_first_call_of_a_worker() -> None:
    """It loads what remote calls need just then, and what it had left out to be there quickly."""
    for _ in range(5):
        (pid,) = addprocs(1)
        future = remotecall(time.sleep, pid, 60)
        interrupt(pid)
        assert ends_with_interrupt(future)
        rmprocs(pid)


def test_an_interrupt_right_behind_the_call_of_an_executor() -> None:
    with ClusterExecutor(1) as executor:
        for number in range(20):
            assert executor.submit(abs, -number).result(20) == number
            future = executor.submit(time.sleep, 60)
            interrupt(others())
            with pytest.raises(KeyboardInterrupt):
                future.result(20)


def test_C262_all_calls_of_that_worker_and_of_no_other(pids: list[int]) -> None:
    futures = [remotecall(lambda: spin(), pids[0]) for _ in range(3)]
    other = remotecall(time.sleep, pids[1], 1.5)
    time.sleep(0.3)
    interrupt([pids[0]])
    assert all(ends_with_interrupt(future) for future in futures)
    assert other.result(10) is None
    futures = [remotecall(lambda: spin(), pid) for pid in pids]
    time.sleep(0.3)
    interrupt()
    assert all(ends_with_interrupt(future) for future in futures)


def test_C263_idle_workers_are_unharmed(pids: list[int]) -> None:
    for _ in range(20):
        interrupt(pids)
    assert [remotecall_fetch(distpool.myid, pid) for pid in pids] == pids
    assert workers() == pids


def test_C263_interrupts_that_race_with_the_end_of_a_call(pids: list[int]) -> None:
    """Each call ends in its value or in KeyboardInterrupt."""
    interrupted = 0
    for number in range(150):
        futures = [remotecall(lambda n: n, pids[0], number) for _ in range(3)]
        interrupt(pids[0])
        for future in futures:
            try:
                assert future.result(10) == number
            except distpool.RemoteException as error:
                assert isinstance(error.captured.ex, KeyboardInterrupt), error
                interrupted += 1
    assert remotecall_fetch(distpool.myid, pids[0]) == pids[0]
    assert workers() == pids


def test_C265_pids(pids: list[int]) -> None:
    interrupt(1)
    with pytest.raises(ValueError, match="no process with id 4711 exists"):
        interrupt(4711)
    with pytest.raises(distpool.RemoteException) as info:
        remotecall_fetch(interrupt, pids[0], pids[1])
    assert isinstance(info.value.captured.ex, RuntimeError)
    gone = addprocs(1)
    rmprocs(gone)
    with pytest.raises(distpool.ProcessExitedException):
        interrupt(gone)


def test_executor_calls_too(pids: list[int], tmp_path: Path) -> None:
    with distpool.ClusterExecutor(1) as executor:
        mark = tmp_path / "running"

        def nap() -> None:
            mark.touch()
            time.sleep(60)

        future = executor.submit(nap)
        executor.submit(abs, 1)
        wait_until(mark.exists)
        interrupt(executor.workers)
        ended = concurrent.futures.wait([future], 10).done
        assert ended, distpool.dump_stacks(executor.workers)  # seen to fail once, in a busy hour: where is it, then?
        assert isinstance(future.exception(0), KeyboardInterrupt)
        assert executor.submit(abs, -2).result(10) == 2


def test_the_manager_is_told_and_calls_beside_the_main_thread_end(pids: list[int]) -> None:
    manager = OverStreams(1)
    (pid,) = addprocs(manager)
    future = remotecall(lambda: spin(), pid)
    time.sleep(0.3)
    interrupt(pid)
    assert ends_with_interrupt(future)
    assert manager.ops(pid) == ["register", "interrupt"]
    rmprocs(pid)


def test_a_manager_has_been_told_when_interrupt_returns(pids: list[int]) -> None:
    class Slow(ByCommand):
        """Takes its time, and interrupts once more itself, which waits for nobody."""

        took = 0.0

        def manage(self, pid: int, config: Any, op: str) -> None:
            if op == "interrupt":
                time.sleep(0.3)
            super().manage(pid, config, op)
            if op == "interrupt" and not self.took:
                begin = time.monotonic()
                interrupt(pid)
                self.took = time.monotonic() - begin

    manager = Slow()
    (pid,) = addprocs(manager)
    for number in (1, 3):
        interrupt(pid)
        assert len(manager.ops(pid)) > number
    assert 0 < manager.took < 4
    rmprocs(pid)


def waiting_calls(w: list[int]) -> dict[str, Any]:
    """Calls that say that they begin, then wait in the library for what does not come."""
    nowhere = distpool.RemoteChannel()
    full = distpool.RemoteChannel(None, w[2])
    full.put("full")
    never = distpool.Future(w[1])
    return {
        "take": lambda started, index: (started.put(index), nowhere.take()),
        "take of its own": lambda started, index: (started.put(index), distpool.Channel(1).take()),
        "put": lambda started, index: (started.put(index), full.put(index)),
        "fetch": lambda started, index: (started.put(index), distpool.fetch(never)),
        "wait": lambda started, index: (started.put(index), distpool.wait(never)),
        "call": lambda started, index: (started.put(index), distpool.remotecall_fetch(nowhere.take, w[1])),
        "map": lambda started, index: (started.put(index), distpool.pmap(lambda _: nowhere.take(), [1, 2])),
    }


@pytest.mark.parametrize("how", ["take", "take of its own", "put", "fetch", "wait", "call", "map"])
def test_C262_waits_of_the_library_end_at_once_on_every_thread(w: list[int], how: str, scale: float) -> None:
    """One of the calls runs on the worker's main thread, the others beside it."""
    started = distpool.RemoteChannel(lambda: distpool.Channel(10))
    call = waiting_calls(w)[how]
    futures = [remotecall(call, w[0], started, index) for index in range(4)]
    assert sorted(started.take(timeout=20) for _ in futures) == [0, 1, 2, 3]
    with pytest.raises(TimeoutError):
        futures[0].wait(timeout=0.2)  # the last of them needs a moment from its put to its wait
    begin = time.monotonic()
    interrupt(w[0])
    assert all(ends_with_interrupt(future) for future in futures)
    # The answers have tracebacks: a byte at a time, they took 2.5 s once, with 25 processes for 2 processors.
    assert time.monotonic() - begin < (2 if scale == 1 else 10)
    interrupt()  # what `call` and `map` left running elsewhere
    all_have_heard()


@pytest.mark.parametrize("how", ["take", "put", "fetch", "call", "map"])
def test_C262_calls_end_wherever_they_are(w: list[int], how: str, scale: float) -> None:
    """Struck on their way into the library, while it is imported, in its callbacks: no moment is a good one to miss."""
    started = distpool.RemoteChannel(lambda: distpool.Channel(10))
    call = waiting_calls(w)[how]
    for number in range(30 if scale == 1 else 5):
        futures = [remotecall(call, w[0], started, index) for index in range(4)]
        for _ in futures:
            started.take(timeout=20)
        with contextlib.suppress(TimeoutError):
            futures[0].wait(timeout=0.0001 * number**2)
        interrupt(w[0])
        assert all(ends_with_interrupt(future, 20) for future in futures)
        interrupt()  # what `call` and `map` left running elsewhere
        all_have_heard()


def test_C263_an_interrupted_take_swallows_nothing(w: list[int]) -> None:
    items = distpool.RemoteChannel(lambda: distpool.Channel(10), w[2])
    started = distpool.RemoteChannel(lambda: distpool.Channel(10))

    def taker() -> Any:
        started.put(None)
        return items.take()

    for number in range(10):
        futures = [remotecall(taker, pid) for pid in (w[0], w[0], w[1])]
        for _ in futures:
            started.take(timeout=20)
        interrupt(w[0], w[1])
        for future in futures:
            assert ends_with_interrupt(future, 10)
        items.put(number)
        assert items.take(timeout=10) == number
