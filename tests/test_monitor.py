"""stats() and dump_stacks(): rows that agree with what was run, and answers from workers in every condition."""

from __future__ import annotations

import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults.helpers import Gate, hold, hold_in_c

import distpool
from distpool import monitor
from distpool.node import node as nodes

FIELDS = {
    *("pid", "host", "ospid", "cpu", "memory", "done", "failed"),
    *("bytes_in", "bytes_out", "running", "since", "queued"),
}


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
    return value


def spin_here_for(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def fail() -> None:
    raise KeyError("x")


@pytest.fixture
def executor() -> Iterator[distpool.ClusterExecutor]:
    with distpool.ClusterExecutor(2) as ex:
        wait_until(lambda: len(ex.workers) == 2)
        yield ex


def row_of(rows: list[dict[str, Any]], pid: int) -> dict[str, Any]:
    return next(row for row in rows if row["pid"] == pid)


# -- stats ---------------------------------------------------------------------------------------------------------


def test_a_row_per_worker_with_all_fields(executor: distpool.ClusterExecutor) -> None:
    rows = executor.stats()
    assert [row["pid"] for row in rows] == executor.workers
    for row in rows:
        assert set(row) == FIELDS
        assert row["host"] == platform.node()
        process = psutil.Process(row["ospid"])
        assert process.is_running()
        assert row["memory"] == pytest.approx(process.memory_info().rss, rel=0.2)
        assert row["cpu"] >= 0
        assert (row["done"], row["failed"], row["queued"]) == (0, 0, 0)
        assert row["running"] is row["since"] is None


def test_calls_are_counted(executor: distpool.ClusterExecutor) -> None:
    before = {row["pid"]: row for row in executor.stats()}
    list(executor.map(abs, range(100)))
    assert isinstance(executor.submit(fail).exception(), KeyError)
    rows = executor.stats()
    assert sum(row["done"] for row in rows) == 100
    assert sum(row["failed"] for row in rows) == 1
    assert sum(row["bytes_in"] for row in rows) > sum(row["bytes_in"] for row in before.values())
    assert sum(row["bytes_out"] for row in rows) > sum(row["bytes_out"] for row in before.values())


def test_bytes_are_those_of_the_connection(executor: distpool.ClusterExecutor) -> None:
    before = sum(row["bytes_out"] for row in executor.stats())
    executor.submit(len, b"x" * 100_000).result()
    assert 100_000 < sum(row["bytes_out"] for row in executor.stats()) - before < 110_000


def test_the_running_call_and_since_when(executor: distpool.ClusterExecutor) -> None:
    pid, other = executor.workers
    begin = time.monotonic()
    future = executor.options(pids=pid).submit(time.sleep, 1.5)
    row = wait_until(lambda: (found := row_of(executor.stats(), pid))["running"] and found)
    time.sleep(0.3)
    row = row_of(executor.stats(), pid)
    assert row["running"] == "time.sleep"
    assert 0.3 <= row["since"] <= time.monotonic() - begin + 0.05
    assert row_of(executor.stats(), other)["running"] is None
    future.result()
    assert row_of(executor.stats(), pid)["running"] is None


def test_since_starts_again_with_the_next_call(executor: distpool.ClusterExecutor) -> None:
    view = executor.options(pids=executor.workers[0])
    first, second = view.submit(time.sleep, 0.6), view.submit(time.sleep, 0.6)
    first.result()
    time.sleep(0.1)
    row = row_of(executor.stats(), executor.workers[0])
    assert row["running"] == "time.sleep"
    assert 0.05 < row["since"] < 0.5
    second.result()


def test_a_label_is_the_name(executor: distpool.ClusterExecutor) -> None:
    future = executor.options(label="step 7").submit(time.sleep, 0.5)
    wait_until(lambda: any(row["running"] == "step 7" for row in executor.stats()))
    future.result()


def test_calls_sent_ahead_are_queued() -> None:
    with distpool.ClusterExecutor(1) as ex:
        nap = lambda seconds: time.sleep(seconds)
        for _ in range(10):  # nothing is sent ahead of a call that is long, or not known yet
            ex.submit(nap, 0).result()
        futures = [ex.submit(nap, 0.5) for _ in range(2)]
        row = wait_until(lambda: next((row for row in ex.stats() if row["running"] and row["queued"]), None))
        assert row["queued"] == 1
        for future in futures:
            future.cancel()


def test_an_element_of_a_map_is_a_running_call(executor: distpool.ClusterExecutor) -> None:
    results = executor.map(time.sleep, [0.4] * 4)
    wait_until(lambda: any(row["running"] == "time.sleep" for row in executor.stats()))
    list(results)


def test_cpu_is_that_since_the_last_call(executor: distpool.ClusterExecutor) -> None:
    pid = executor.workers[0]
    view = executor.options(pids=pid)
    view.submit(spin_here_for, 0.5).result()
    assert row_of(executor.stats(), pid)["cpu"] > 5
    time.sleep(0.5)
    assert row_of(executor.stats(), pid)["cpu"] < 30
    again = row_of(executor.stats(), pid)["cpu"]  # too soon for a new figure
    assert again < 30


def test_the_function_shows_all_executors(executor: distpool.ClusterExecutor) -> None:
    with distpool.ClusterExecutor(1) as other:
        wait_until(lambda: other.workers)
        pids = {row["pid"] for row in distpool.stats()}
        assert pids >= {*executor.workers, *other.workers}
        assert [row["pid"] for row in other.stats()] == other.workers


def test_no_worker_no_row() -> None:
    ex = distpool.ClusterExecutor(1)
    ex.submit(abs, 1).result()
    ex.shutdown()
    assert ex.stats() == []
    code = "import distpool, sys; print(distpool.stats(), distpool.dump_stacks(), 'psutil' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == ["[]", "{}", "False"]


def test_a_worker_that_dies_leaves_the_table(executor: distpool.ClusterExecutor) -> None:
    victim = executor.stats()[0]
    os.kill(victim["ospid"], signal.SIGKILL)
    wait_until(lambda: victim["pid"] not in [row["pid"] for row in executor.stats()])


def test_stats_while_calls_fly(executor: distpool.ClusterExecutor) -> None:
    """The tables are read without a lock."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def look() -> None:
        try:
            while not stop.is_set():
                executor.stats()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(5):
        assert sum(executor.map(abs, range(2000))) == sum(range(2000))
    stop.set()
    thread.join(20)
    assert not thread.is_alive() and not errors


def test_workers_elsewhere_are_asked(executor: distpool.ClusterExecutor) -> None:
    """A worker whose memory we do not share is taken for one on another host."""
    members, gate = list(executor._crew.members.values()), Gate()
    local = {row["pid"]: row for row in executor.stats()}
    for member in members:
        member.link.shares_memory = False
    try:
        for row in executor.stats():
            assert row["memory"] == pytest.approx(local[row["pid"]]["memory"], rel=0.5)
            assert row["cpu"] is not None
        held = executor.options(pids=members[0].pid).submit(hold_in_c, gate.address)
        gate.arrival()
        wait_until(lambda: row_of(executor.stats(), members[0].pid)["cpu"] is None)
        begin = time.monotonic()
        row = row_of(executor.stats(), members[0].pid)
        assert time.monotonic() - begin < 10, "it is not waited for until it can answer"
        assert row["memory"] is None
    finally:
        gate.close()
        for member in members:
            member.link.shares_memory = True
    held.result()


# -- remote calls --------------------------------------------------------------------------------------------------


@pytest.fixture
def pids() -> Iterator[list[int]]:
    found = distpool.addprocs(2)
    yield found
    distpool.rmprocs(found).result(30)


def numbers(pids: list[int]) -> list[tuple[int, int]]:
    """(done, failed) of these workers."""
    rows = distpool.stats()
    return [(row["done"], row["failed"]) for row in (row_of(rows, pid) for pid in pids)]


def call_there(pid: int) -> int:
    return distpool.remotecall_fetch(abs, pid, -1)


def call_here() -> int:
    value: int = distpool.remotecall(abs, distpool.myid(), -1).result()
    return value


def test_remote_calls_are_counted_where_they_run(pids: list[int]) -> None:
    one, two = pids
    assert numbers(pids) == [(0, 0), (0, 0)]
    distpool.remotecall_fetch(abs, one, -1)
    assert numbers(pids) == [(1, 0), (0, 0)], "before the answer is there"
    distpool.remotecall_wait(abs, one, -1)
    with pytest.raises(distpool.RemoteException):
        distpool.remotecall_fetch(fail, two)
    assert numbers(pids) == [(2, 0), (0, 1)]
    distpool.fetch(distpool.spawnat(two, abs, -1))
    assert numbers(pids) == [(2, 0), (1, 1)]
    distpool.remotecall_fetch(call_there, one, two)  # from worker to worker
    assert numbers(pids) == [(3, 0), (2, 1)]
    distpool.remotecall_fetch(call_here, one)  # from a worker to itself
    assert numbers(pids) == [(5, 0), (2, 1)]
    distpool.remote_do(abs, two, -1)
    wait_until(lambda: numbers(pids) == [(5, 0), (3, 1)])
    pool = distpool.WorkerPool([one])
    distpool.remote_do(fail, pool)
    distpool.remotecall_fetch(abs, pool, -1)
    wait_until(lambda: numbers(pids) == [(6, 1), (3, 1)])


def test_what_runs_on_many_workers_is_counted(pids: list[int]) -> None:
    def total() -> tuple[int, int]:
        found = numbers(pids)
        return sum(done for done, _ in found), sum(failed for _, failed in found)

    for number, options in enumerate(({}, {"batch_size": 4}, {"pool": distpool.WorkerPool(pids)})):
        assert distpool.pmap(abs, range(-10, 0), **options) == list(range(10, 0, -1))
        assert total() == (10 * (number + 1), 0), "each element is a call"
    assert distpool.pmap(fail_with, range(4), batch_size=2, on_error=repr) == [f"KeyError({n})" for n in range(4)]
    assert total() == (30, 4)
    assert distpool.distributed(abs, range(100), max) == 99
    assert total() == (32, 4), "one chunk each"
    distpool.everywhere("x = 1", pids)
    distpool.everywhere("x = 1", pids[0])
    distpool.everywhere(lambda: None, pids)
    with pytest.raises(distpool.CompositeException):
        distpool.everywhere("1 / 0", pids)
    assert total() == (37, 6)


def fail_with(value: Any) -> None:
    raise KeyError(value)


def test_the_running_remote_call_and_since_when(pids: list[int]) -> None:
    gate = Gate()
    try:
        begin = time.monotonic()
        future = distpool.remotecall(hold, pids[0], gate.address)
        arrival = gate.arrival()
        row = row_of(distpool.stats(), pids[0])
        assert row["running"].endswith("hold") and 0 <= row["since"] <= time.monotonic() - begin
        assert row["queued"] == 0 and row_of(distpool.stats(), pids[1])["running"] is None
        later = row_of(distpool.stats(), pids[0])
        assert later["since"] >= row["since"]
        beside = distpool.remotecall(hold, pids[0], gate.address)  # on another thread
        other = gate.arrival()
        arrival.release()
        future.result()
        assert row_of(distpool.stats(), pids[0])["running"].endswith("hold")
        other.release()
        beside.result()
        row = row_of(distpool.stats(), pids[0])
        assert (row["running"], row["since"], row["done"]) == (None, None, 2)
    finally:
        gate.close()


def test_the_user_s_function_is_the_running_one(pids: list[int]) -> None:
    """Not the function of the library that calls it."""
    gate = Gate()
    wait_there = lambda number: hold(gate_address)
    gate_address = gate.address
    ways: list[Callable[[], Any]] = [
        lambda: distpool.pmap(hold, [gate_address]),
        lambda: distpool.pmap(hold, [gate_address], batch_size=2),
        lambda: distpool.distributed(wait_there, range(1)),
        lambda: distpool.remote_do(hold, distpool.WorkerPool(pids), gate_address),
        lambda: distpool.everywhere(lambda: hold(gate_address), pids[0]),
    ]
    try:
        for way in ways:
            thread = threading.Thread(target=way)
            thread.start()
            arrival = gate.arrival()
            running = [row["running"] for row in distpool.stats() if row["running"] is not None]
            assert len(running) == 1 and running[0].endswith(("hold", "<lambda>")), running
            arrival.release()
            thread.join(30)
            assert not thread.is_alive()
            wait_until(lambda: all(row["running"] is None for row in distpool.stats()))
    finally:
        gate.close()


def test_both_kinds_of_calls_are_added(pids: list[int]) -> None:
    with distpool.ClusterExecutor(hosts=distpool.WorkerPool(pids[:1])) as ex:
        assert list(ex.map(abs, range(10))) == list(range(10))
        distpool.remotecall_fetch(abs, pids[0], -1)
        assert row_of(ex.stats(), pids[0])["done"] == 11
        assert numbers(pids[:1]) == [(11, 0)]
    assert numbers(pids[:1]) == [(11, 0)], "also when it has been given back"


def test_a_worker_that_does_not_answer_holds_nobody_up(pids: list[int]) -> None:
    distpool.remotecall_fetch(abs, pids[0], -1)
    row = row_of(distpool.stats(), pids[0])
    gate = Gate()
    try:
        future = distpool.remotecall(hold, pids[0], gate.address)
        arrival = gate.arrival()
        assert row_of(distpool.stats(), pids[0])["running"].endswith("hold")
        os.kill(row["ospid"], signal.SIGSTOP)
        begin = time.monotonic()
        row = row_of(distpool.stats(), pids[0])
        assert time.monotonic() - begin < 10
        assert row["done"] == 1 and row["running"].endswith("hold"), "as it was when it last told"
        assert row["cpu"] is not None
        os.kill(row["ospid"], signal.SIGCONT)
        arrival.release()
        future.result()
    finally:
        os.kill(row["ospid"], signal.SIGCONT)
        gate.close()


def ask_for_stats() -> str:
    try:
        distpool.stats()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_worker_cannot_ask(executor: distpool.ClusterExecutor) -> None:
    assert "process 1" in executor.submit(ask_for_stats).result()


# -- stacks --------------------------------------------------------------------------------------------------------


def test_stacks_of_a_python_loop(executor: distpool.ClusterExecutor) -> None:
    pid, other = executor.workers
    future = executor.options(pids=pid).submit(spin_here_for, 2.0)
    wait_until(lambda: "in spin_here_for" in distpool.dump_stacks(pid)[pid])
    texts = distpool.dump_stacks()
    assert set(texts) >= {pid, other}
    assert "in spin_here_for" in texts[pid] and "MainThread" in texts[pid]
    assert "spin_here_for" not in texts[other]
    assert not future.done(), "the call was not disturbed, and not waited for"
    future.result()


def test_all_threads_are_there(executor: distpool.ClusterExecutor) -> None:
    def with_a_thread() -> None:
        thread = threading.Thread(target=time.sleep, args=(1.5,), name="my-helper")
        thread.start()
        thread.join()

    future = executor.options(pids=executor.workers[0]).submit(with_a_thread)
    pid = executor.workers[0]
    wait_until(lambda: "my-helper" in distpool.dump_stacks(pid)[pid])
    future.result()


def test_chosen_workers_and_this_process(executor: distpool.ClusterExecutor) -> None:
    pid = executor.workers[1]
    assert list(distpool.dump_stacks(pid)) == [pid]
    texts = distpool.dump_stacks([1, pid])
    assert sorted(texts) == [1, pid]
    assert "test_chosen_workers_and_this_process" in texts[1]
    numpy = pytest.importorskip("numpy")
    for pids in (numpy.int64(pid), [numpy.int64(pid)], numpy.array([pid])):
        assert list(distpool.dump_stacks(pids)) == [pid]


@pytest.mark.parametrize("pids", [True, False, [True], b"\x01", "1", [1.5]])
def test_what_is_no_pid(pids: Any) -> None:
    """True was this process."""
    with pytest.raises(TypeError, match="int"):
        distpool.dump_stacks(pids)


def test_a_worker_that_holds_the_interpreter_lock(executor: distpool.ClusterExecutor) -> None:
    pid, other = executor.workers
    gate = Gate()
    future = executor.options(pids=pid).submit(hold_in_c, gate.address)
    try:
        gate.arrival()  # it takes the lock in the next moment
        wait_until(lambda: "did not answer" in distpool.dump_stacks(pid, timeout=0.5)[pid])
        begin = time.monotonic()
        texts = distpool.dump_stacks([pid, other], timeout=3)
        assert time.monotonic() - begin < 10
        assert "did not answer within 3 seconds" in texts[pid]
        assert "MainThread" in texts[other]
    finally:
        gate.close()
    future.result()
    assert "MainThread" in distpool.dump_stacks(pid)[pid], "the late answer went to nobody"


def test_a_worker_that_dies_instead_of_answering(executor: distpool.ClusterExecutor) -> None:
    row = executor.stats()[0]
    pid = row["pid"]
    os.kill(row["ospid"], signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (row["ospid"], signal.SIGKILL)).start()
    begin = time.monotonic()
    texts = distpool.dump_stacks(pid, timeout=20)
    assert time.monotonic() - begin < 10
    assert "ended before it could answer" in texts[pid]
    with pytest.raises(distpool.ProcessExitedException):
        distpool.dump_stacks(pid)


@pytest.mark.parametrize("pid", [0, -1, 10**6])
def test_unknown_pids(executor: distpool.ClusterExecutor, pid: int) -> None:
    with pytest.raises(ValueError, match=f"no process with id {pid} exists"):
        distpool.dump_stacks([pid])


def test_bad_arguments() -> None:
    with pytest.raises(TypeError):
        distpool.dump_stacks(["2"])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        distpool.dump_stacks(timeout="1")  # type: ignore[arg-type]
    for timeout in (0, -1, math.nan):
        with pytest.raises(ValueError, match="timeout must be"):
            distpool.dump_stacks(timeout=timeout)


def test_many_ask_at_once(executor: distpool.ClusterExecutor) -> None:
    results: list[dict[int, str]] = []
    threads = [threading.Thread(target=lambda: results.append(distpool.dump_stacks())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 8
    for texts in results:
        assert all("MainThread" in texts[pid] for pid in executor.workers)
    node = nodes.current()
    assert not monitor.of(node)._open


def test_the_docstrings_fields(tmp_path: Path) -> None:
    for name in FIELDS:
        assert f"`{name}`" in (distpool.stats.__doc__ or "")
