"""`ClusterExecutor(hosts=WorkerPool(...))`: living workers are borrowed, and live on (API section 1)."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

import distpool
from distpool import CachingPool, ClusterExecutor, ProcessExitedException, WorkerPool, myid, remotecall_fetch

from .conftest import wait_until
from .helpers import boom, ident

pytestmark = pytest.mark.time_limit(90)


def test_runs_there_and_leaves_them_alive(team: list[int]) -> None:
    for pool in (WorkerPool(team[:2]), CachingPool(team[:2]), distpool.default_worker_pool()):
        for _ in range(2):
            with ClusterExecutor(hosts=pool) as executor:
                wait_until(lambda executor=executor, pool=pool: executor.workers == pool.workers())
                pids = set(executor.map(lambda i: time.sleep(0.01) or myid(), range(40)))
                assert pids == set(pool.workers())
                assert list(executor.map(ident, range(1000))) == list(range(1000))
                assert distpool.pmap(ident, range(100), pool=executor) == list(range(100))
                assert executor.submit(os.getpid).result(20) != os.getpid()
                with pytest.raises(RuntimeError, match="foobar"):
                    executor.submit(boom).result(20)
            assert distpool.workers() == team
            assert [remotecall_fetch(myid, pid) for pid in team] == team


def test_beside_other_calls(team: list[int]) -> None:
    pool = WorkerPool(team)
    with ClusterExecutor(pool) as executor:
        future = executor.submit(lambda: remotecall_fetch(myid, team[1]))
        assert distpool.pmap(ident, range(50), pool=pool) == list(range(50))
        assert future.result(20) == team[1]
        nested = executor.submit(lambda: executor.submit(ident, 5).result())
        assert nested.result(20) == 5


def setup(value: int) -> None:
    os.environ["BORROWED"] = str(value)


def test_initializer(team: list[int]) -> None:
    with ClusterExecutor(WorkerPool(team[:2]), initializer=setup, initargs=(7,)) as executor:
        assert executor.submit(os.getenv, "BORROWED").result(20) == "7"
    broken = ClusterExecutor(WorkerPool(team[:2]), initializer=boom)
    with pytest.raises(BrokenProcessPool):
        broken.submit(ident, 1).result(20)
    broken.shutdown()
    assert [remotecall_fetch(myid, pid) for pid in team] == team


def test_one_executor_at_a_time(team: list[int]) -> None:
    pool = WorkerPool(team[:1])
    with ClusterExecutor(pool) as executor:
        assert executor.submit(myid).result(20) == team[0]
        with ClusterExecutor(pool) as second:
            with pytest.raises(BrokenProcessPool):
                second.submit(ident, 1).result(20)
        with ClusterExecutor(WorkerPool(team[:2])) as third:
            assert third.submit(myid).result(20) == team[1]
        assert executor.submit(myid).result(20) == team[0]
    with ClusterExecutor(pool) as executor:
        assert executor.submit(myid).result(20) == team[0]


def test_bad_arguments(team: list[int]) -> None:
    with pytest.raises(RuntimeError, match="No active worker available in pool"):
        ClusterExecutor(WorkerPool([]))
    with pytest.raises(RuntimeError, match="No active worker available in pool"):
        ClusterExecutor(WorkerPool([1]))
    with pytest.raises(ValueError, match="Invalid keyword argument env"):
        ClusterExecutor(WorkerPool(team), env={})
    with pytest.raises(ValueError, match="max_tasks_per_child"):
        ClusterExecutor(WorkerPool(team), max_tasks_per_child=3)
    with ClusterExecutor(WorkerPool(team), max_workers=1) as executor:
        wait_until(lambda: executor.workers == team[:1])


@pytest.mark.parametrize("end", ["kill_workers", "terminate_workers"])
def test_they_are_not_the_executors_to_kill(team: list[int], end: str) -> None:
    executor = ClusterExecutor(WorkerPool(team[:1]))
    future = executor.submit(time.sleep, 0.3)
    getattr(executor, end)()
    with pytest.raises((BrokenProcessPool, Exception)):
        future.result(20)
    assert remotecall_fetch(myid, team[0]) == team[0]
    with ClusterExecutor(WorkerPool(team[:1])) as again:
        assert again.submit(ident, 5).result(20) == 5


def test_a_borrowed_worker_dies(team: list[int]) -> None:
    first, second = distpool.addprocs(2)
    with ClusterExecutor(WorkerPool([first, second]), retries=1) as executor:

        def die() -> Any:
            if myid() == first:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)
            return myid()

        assert {executor.submit(die).result(20) for _ in range(4)} == {second}
        wait_until(lambda: executor.workers == [second])
        assert first not in distpool.workers()
        assert list(executor.map(ident, range(20))) == list(range(20))
        with pytest.raises(ProcessExitedException):
            executor.options(retries=0).submit(os._exit, 3).result(20)
        with pytest.raises((ProcessExitedException, BrokenProcessPool)):
            executor.submit(ident, 1).result(20)
    assert distpool.workers() == team


def test_a_task_that_comes_right_behind_a_remote_call_waits_for_its_value() -> None:
    """Both reach the worker at once: the call that the main thread was promised must not wait behind the task."""
    with distpool.ClusterExecutor(1) as executor:
        assert executor.submit(abs, -1).result(30) == 1
        (pid,) = executor.workers
        for number in range(30):
            ref = distpool.remotecall(lambda number=number: number, pid)
            assert executor.submit(distpool.fetch, ref).result(20) == number


def test_a_worker_that_was_given_back_at_once_serves_the_next_one(team: list[int]) -> None:
    """Its answer to the RECALL of the first executor comes when nobody is there to hear it."""
    for _ in range(8):
        executor = ClusterExecutor(WorkerPool(team[:1]))
        executor.submit(time.sleep, 0.05)
        executor.kill_workers()
        with ClusterExecutor(WorkerPool(team[:1])) as again:
            assert again.submit(ident, 5).result(20) == 5


def test_a_time_limit_ends_with_its_call_also_if_the_worker_was_given_back(team: list[int]) -> None:
    """It killed the worker, long after the call; and until then nobody else could use it."""
    executor = ClusterExecutor(WorkerPool(team[:1]))
    executor.options(timeout=2.0).submit(time.sleep, 0.3)
    executor.kill_workers()
    with ClusterExecutor(WorkerPool(team[:1])) as again:
        begin = time.monotonic()
        assert again.submit(ident, 5).result(1.9) == 5
        assert again.submit(time.sleep, max(0.0, begin + 2.2 - time.monotonic())).result(20) is None
    assert remotecall_fetch(myid, team[0]) == team[0]


def test_a_worker_that_was_given_back_dies_before_the_time_limit_of_its_call(team: list[int]) -> None:
    """The limit looked at the dead worker's journal: an internal error, which failed all executors."""
    pids = distpool.addprocs(1)
    executor = ClusterExecutor(WorkerPool(pids))
    executor.options(timeout=0.5).submit(time.sleep, 60)
    wait_until(lambda: any(row["running"] for row in executor.stats()))
    executor.kill_workers()
    distpool.rmprocs(*pids).result(20)
    with ClusterExecutor(WorkerPool(team[:1])) as other:
        assert other.submit(time.sleep, 1.0).result(20) is None


@pytest.mark.parametrize("mode", ["break", "replace"])
def test_calls_of_workers_that_are_given_back_end(team: list[int], mode: str) -> None:
    goes, other = distpool.addprocs(2)
    executor = ClusterExecutor(WorkerPool([goes, other]), on_worker_exit=mode)
    wait_until(lambda: len(executor.workers) == 2)
    there = executor.options(pids=[goes])
    futures = [there.submit(time.sleep, 0.5) for _ in range(3)]
    if mode == "break":
        executor.options(pids=[other]).submit(os._exit, 3)
        assert all(isinstance(future.exception(20), BrokenProcessPool) for future in futures)
    else:
        executor.options(pids=[other]).submit(time.sleep, 0.5)  # as much to do: the first one goes
        executor.scale(1)
        assert [type(future.exception(20)) for future in futures[1:]] == [RuntimeError] * 2
    assert goes in distpool.workers()
    executor.kill_workers()
    distpool.rmprocs(goes, other).result(20)


def late_submit(executor: Any, entered: Any, go_on: Any, answers: Any) -> None:
    entered.put(None)
    go_on.take()
    try:
        executor.submit(ident, 1).result()
    except RuntimeError as error:
        answers.put(str(error))


@pytest.mark.parametrize("again", [False, True])
def test_a_task_whose_worker_was_given_back_hears_that_it_cannot_submit(team: list[int], again: bool) -> None:
    """It waited for ever: nobody, or the next one to borrow the worker, threw its question away."""
    entered, go_on, answers = (distpool.RemoteChannel(pid=1) for _ in range(3))
    executor = ClusterExecutor(WorkerPool(team[:1]))
    executor.submit(late_submit, executor, entered, go_on, answers)
    entered.take(timeout=20)
    executor.kill_workers()
    following = ClusterExecutor(WorkerPool(team[:1])) if again else None
    go_on.put(None)
    text = answers.take(timeout=20)
    assert "after shutdown" in text or "given its borrowed workers back" in text  # its end may have come meanwhile
    if following is not None:
        assert following.submit(ident, 5).result(20) == 5
        following.shutdown()
