"""addprocs, rmprocs and interrupt on local workers."""

from __future__ import annotations

import concurrent.futures
import operator
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import distpool
import distpool.top
from distpool import ProcessExitedException, RemoteChannel, cluster
from distpool.cluster import addprocs, addprocs_async, end_workers, rmprocs
from distpool.managers.local import LocalManager
from distpool.managers.resources import GPU_VARIABLE
from distpool.node import group as groups
from distpool.node import node as nodes

PATIENCE = 30.0


@pytest.fixture
def pids() -> Iterator[list[int]]:
    found = addprocs(2)
    yield found
    rmprocs(*found).result(PATIENCE)


def listed() -> list[int]:
    return groups.of(nodes.current()).listed()


def test_pids_are_sorted_and_never_used_again(pids: list[int]) -> None:
    assert pids == sorted(pids) and len(set(pids)) == 2 and all(pid >= 2 for pid in pids)
    more = addprocs(1)
    assert more[0] > max(pids)
    rmprocs(*more).result(PATIENCE)
    again = addprocs(1)
    assert again[0] > more[0]
    rmprocs(*again).result(PATIENCE)


def test_members_come_and_go(pids: list[int]) -> None:
    assert set(pids) <= set(listed())
    more = addprocs(1)
    assert set(more) <= set(listed())
    removed = rmprocs(*more)
    assert isinstance(removed, concurrent.futures.Future)
    removed.result(PATIENCE)
    assert not set(more) & set(listed()) and set(pids) <= set(listed())


def test_in_the_background() -> None:
    future = addprocs_async(1)
    assert isinstance(future, concurrent.futures.Future)
    found = future.result(PATIENCE)
    assert len(found) == 1
    rmprocs(*found).result(PATIENCE)


def test_bad_arguments_start_nothing() -> None:
    before = listed()
    with pytest.raises(ValueError, match="^Invalid keyword argument foo$"):
        addprocs(1, foo=2)
    with pytest.raises((TypeError, ValueError)):
        addprocs(-1)
    with pytest.raises(TypeError):
        addprocs(1.5)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError)):
        addprocs(object())  # type: ignore[arg-type]
    assert listed() == before


@pytest.mark.parametrize("machines", [1, ["no-such-host"]])
@pytest.mark.parametrize(
    ("keyword", "value", "error"),
    [
        ("env", 5, TypeError),
        ("env", [1], TypeError),
        ("env", ["abc"], ValueError),
        ("exename", 5, TypeError),
        ("exeflags", 5, TypeError),
        ("exeflags", [5], TypeError),
        ("enable_threaded_blas", "x", TypeError),
        ("enable_threaded_blas", 2, TypeError),
    ],
)
def test_the_text_names_the_argument(machines: Any, keyword: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{keyword} must "):
        addprocs(machines, **{keyword: value})


@pytest.mark.parametrize("value", ["no", 3, 0.0, None])
def test_what_is_neither_on_nor_off(value: Any) -> None:
    for keyword in ("multiplex", "cmdline_cookie"):
        with pytest.raises(TypeError, match=f"^{keyword} must be True or False, not {value!r}$"):
            addprocs(["no-such-host"], **{keyword: value})
    for start in (addprocs, distpool.ClusterExecutor, lambda n, **options: LocalManager(n, options["restrict"])):
        with pytest.raises(TypeError, match=f"^restrict must be True or False, not {value!r}$"):
            start(1, restrict=value)


def test_the_endpoint_is_served_only_if_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever only adds workers is watched as an executor is, and refused as it is."""
    served: list[Any] = []
    monkeypatch.setattr(distpool.top, "serve_if_wanted", served.append)
    monkeypatch.delenv("DISTPOOL_TOP", raising=False)
    rmprocs(addprocs(1)).result(PATIENCE)
    assert not served
    monkeypatch.setenv("DISTPOOL_TOP", "127.0.0.1:0")
    rmprocs(addprocs(1)).result(PATIENCE)
    assert served == [nodes.current()]


def test_an_endpoint_that_others_reach_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    node, before = nodes.current(), listed()
    monkeypatch.setattr(node, "top", None)
    monkeypatch.setenv("DISTPOOL_TOP", "0.0.0.0:8790")
    for add in (addprocs, addprocs_async):
        with pytest.raises(ValueError, match="DISTPOOL_TOP must be a loopback address"):
            add(1, topology="master_worker")
    assert node.top is None and listed() == before
    monkeypatch.delenv("DISTPOOL_TOP")
    rmprocs(addprocs(1)).result(PATIENCE)  # the topology was not claimed


def test_options_that_can_be_read_only_once() -> None:
    for executable in (sys.executable, iter([sys.executable])):
        env = zip(["ZZ"], ["1"], strict=True)
        (pid,) = addprocs(1, exename=executable, env=env, exeflags=iter(["-O"]), gpus=iter([5, 6]))
        found = distpool.remotecall_fetch(lambda: (os.environ["ZZ"], sys.flags.optimize, os.environ[GPU_VARIABLE]), pid)
        assert found == ("1", 1, "5")
        rmprocs(pid).result(PATIENCE)


def test_numbers_of_numpy() -> None:
    found = addprocs(np.int64(1), timeout=np.int32(50), lazy=np.True_)
    rmprocs(np.array(found), waitfor=np.int8(50)).result(PATIENCE)
    with pytest.raises(ValueError, match="timeout must be"):
        addprocs(1, timeout=np.int64(0))
    with pytest.raises(ValueError, match="waitfor must be"):
        rmprocs(waitfor=np.int64(-1))


@pytest.mark.parametrize("pids", [b"\x03", bytearray(b"\x03"), memoryview(b"\x03"), "3", "", b""])
def test_texts_are_no_pids(pids: Any) -> None:
    """The bytes were taken for numbers, and worker 3 was removed."""
    for call in (rmprocs, cluster.interrupt, distpool.dump_stacks):
        with pytest.raises(TypeError, match="int"):
            call(pids)
    with pytest.raises(TypeError, match="a pid is an int"):
        rmprocs(2, [3], pids)


def test_removing_what_is_not_there(pids: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rmprocs(987654).result(PATIENCE)
        rmprocs().result(PATIENCE)
    with pytest.warns(UserWarning):
        rmprocs(1).result(PATIENCE)
    assert set(pids) <= set(listed())


def test_workers_of_an_executor_are_members_until_it_ends() -> None:
    with distpool.ClusterExecutor(1) as executor:
        executor.submit(pow, 2, 3).result(PATIENCE)
        own = executor.workers
        assert set(own) <= set(listed())
    assert not set(own) & set(listed())


def test_a_launch_that_never_began_does_not_hold_the_topology() -> None:
    class Careless(distpool.ClusterManager):
        def launch(self, params: dict[str, Any]) -> list[distpool.WorkerConfig]:
            raise AssertionError("its arguments are bad")

    if listed():
        pytest.skip("somebody's workers hold the topology")
    with pytest.raises(ValueError, match="memory_limit"):
        addprocs(Careless(), memory_limit="much")
    groups.of(nodes.current()).claim_topology("master_worker", True)  # RuntimeError: it is held
    groups.of(nodes.current()).release_topology()


@pytest.mark.parametrize("forever", [float("inf"), 1e10])
def test_times_without_end(forever: float) -> None:
    found = addprocs(2, timeout=forever)
    rmprocs(*found, waitfor=forever).result(PATIENCE)


def test_a_time_that_is_no_number_starts_nothing() -> None:
    before = groups.of(nodes.current()).last_pid
    with pytest.raises(ValueError, match="^timeout must be a positive number of seconds, not nan$"):
        addprocs(1, timeout=float("nan"))
    assert groups.of(nodes.current()).last_pid == before


def test_workers_with_different_cookies_deny_each_other() -> None:
    def ask(pid: int) -> tuple[str, str]:
        try:
            return "", distpool.remotecall_fetch(repr, pid, 1)
        except Exception as error:
            return type(error).__name__, str(error)

    (one,) = addprocs(1)
    before = distpool.cluster_cookie()
    distpool.cluster_cookie("foobar")
    try:
        (two,) = addprocs(1)
        for asker, asked in ((one, two), (two, one)):
            kind, text = distpool.remotecall_fetch(ask, asker, asked)
            assert kind == "AuthenticationError" and "the cluster cookies differ" in text
    finally:
        distpool.cluster_cookie(before)
        rmprocs(distpool.workers())


# -- removed while it is busy ---------------------------------------------------------------------------------------


def until_struck(begun: Any, caught: Any = None) -> Callable[..., Any]:
    """A call that says it has begun and ends only by an interrupt: in that, or as `caught(error)` says. By value: a
    worker that imported this module would load pytest."""

    def wait(*_: object) -> Any:
        import time

        begun.put(True)
        try:
            while True:
                time.sleep(0.02)  # on other threads than the main one the interrupt comes between two bytecodes
        except KeyboardInterrupt as error:
            if caught is None:
                raise
            return caught(error)

    return wait


@pytest.fixture
def begun() -> Any:
    return RemoteChannel(lambda: distpool.Channel(100), 1)


@pytest.fixture
def waiters() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        yield threads


def test_who_waits_for_a_busy_worker_that_is_removed_sees_its_end(begun: Any, waiters: Any) -> None:
    """The interrupt is only how it is made to go, and no outcome of any call: not here, and not elsewhere."""
    pid, other = addprocs(2)
    task = until_struck(begun)
    held = [distpool.remotecall(task, pid) for _ in range(3)]  # on the main thread of the worker and on others

    def ask(future: Any, begun: Any) -> Any:
        begun.put(True)
        try:
            return distpool.fetch(future)
        except BaseException as error:
            return error

    def ask_itself(task: Any) -> Any:
        import distpool

        return distpool.fetch(distpool.remotecall(task, distpool.myid()))

    waiting = [
        waiters.submit(distpool.remotecall_fetch, task, pid),
        waiters.submit(distpool.remotecall_wait, task, pid),
        waiters.submit(held[0].result),
        waiters.submit(distpool.remotecall_fetch, ask_itself, pid, task),
    ]
    elsewhere = distpool.remotecall(ask, other, held[1], begun)
    for _ in range(7):
        begun.take(timeout=PATIENCE)
    rmprocs(pid)
    errors = [future.exception(PATIENCE) for future in waiting]
    errors += [held[2].exception(PATIENCE), elsewhere.result(PATIENCE)]
    assert [(type(error), error.worker_id) for error in errors] == [(ProcessExitedException, pid)] * 6, errors
    rmprocs(other)


def test_what_a_call_makes_of_the_interrupt_counts(begun: Any, waiters: Any) -> None:
    """It has seconds for that."""

    def wrong(error: BaseException) -> None:
        raise ValueError("interrupted")

    (pid,) = addprocs(1)
    value = waiters.submit(distpool.remotecall_fetch, until_struck(begun, lambda error: "saved"), pid)
    error = waiters.submit(distpool.remotecall_fetch, until_struck(begun, wrong), pid)
    for _ in range(2):
        begun.take(timeout=PATIENCE)
    rmprocs(pid)
    assert value.result(PATIENCE) == "saved"
    failed = error.exception(PATIENCE)
    assert isinstance(failed, distpool.RemoteException) and isinstance(failed.captured.ex, ValueError)


def test_a_worker_that_is_interrupted_and_not_removed_says_so(begun: Any, pids: list[int]) -> None:
    future = distpool.remotecall(until_struck(begun), pids[0])
    begun.take(timeout=PATIENCE)
    distpool.interrupt(pids[0])
    with pytest.raises(distpool.RemoteException) as info:
        future.result(PATIENCE)
    assert isinstance(info.value.captured.ex, KeyboardInterrupt)


def test_a_task_of_an_executor_whose_worker_is_removed(begun: Any, caplog: pytest.LogCaptureFixture) -> None:
    with distpool.ClusterExecutor(1) as executor:
        running = executor.submit(until_struck(begun))
        behind = [executor.submit(pow, 2, n) for n in range(3)]
        begun.take(timeout=PATIENCE)
        (pid,) = executor.workers
        rmprocs(pid)
        error = running.exception(PATIENCE)
        assert isinstance(error, ProcessExitedException) and error.worker_id == pid and error.maybe_ran
        assert [future.result(PATIENCE) for future in behind] == [1, 2, 4], "they have not begun: another one runs them"
    assert all("replaces" in record.getMessage() for record in caplog.records), "its end was asked for"


def test_it_is_retried_as_after_any_death(begun: Any) -> None:
    with distpool.ClusterExecutor(1) as executor:
        future = executor.options(retries=1).submit(until_struck(begun, lambda error: "saved"))
        begun.take(timeout=PATIENCE)
        rmprocs(executor.workers)
        assert future.result(PATIENCE) == "saved", "a value of the grace period is a value"
        future = executor.options(retries=1).submit(until_struck(begun))
        begun.take(timeout=PATIENCE)
        rmprocs(executor.workers)
        begun.take(timeout=PATIENCE)  # once more
        rmprocs(executor.workers)
        assert isinstance(future.exception(PATIENCE), ProcessExitedException)


@pytest.mark.parametrize("chunksize", [1, 3])
def test_maps_whose_worker_is_removed(begun: Any, chunksize: int) -> None:
    with distpool.ClusterExecutor(1) as executor:
        values = executor.map(until_struck(begun), range(9), chunksize=chunksize)
        begun.take(timeout=PATIENCE)
        pids = executor.workers
        rmprocs(pids)
        with pytest.raises(ProcessExitedException) as info:
            list(values)
        assert [info.value.worker_id] == pids
        executor.kill_workers()


def test_pools_and_loops_whose_worker_is_removed(begun: Any, waiters: Any) -> None:
    task = until_struck(begun)
    with distpool.DistPool(1) as pool:
        result = pool.apply_async(task)
        begun.take(timeout=PATIENCE)
        rmprocs(pool.executor.workers)
        with pytest.raises(ProcessExitedException):
            result.get(PATIENCE)
    for run in (
        lambda: distpool.pmap(task, range(2)),
        lambda: distpool.pmap(task, range(6), batch_size=3),
        lambda: distpool.distributed(task, range(2), operator.add),
        lambda: distpool.remotecall_eval("__main__", distpool.workers(), "wait_here()"),
    ):
        pid, other = addprocs(2)
        distpool.everywhere("pass", [pid, other], wait_here=task)
        future = waiters.submit(run)
        for _ in range(2):
            begun.take(timeout=PATIENCE)
        rmprocs(pid, other)
        error = future.exception(PATIENCE)
        if isinstance(error, distpool.CompositeException):
            error = error.exceptions[0]
        assert isinstance(error, ProcessExitedException) and error.worker_id in (pid, other)


def test_managers_that_do_not_return_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each had seconds of its own."""
    monkeypatch.setattr(cluster, "_PATIENCE", 0.2)
    node: Any = nodes.current()
    group: Any = SimpleNamespace(members={}, gone_watchers=[])
    members: list[Any] = [SimpleNamespace(pid=pid, notices=SimpleNamespace(put=id)) for pid in range(2, 32)]
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    node.loop.call_soon(cluster._Removal(node, group, members, future).begin)
    assert future.result(3.0) is None


def test_the_end_waits_for_what_a_worker_has_printed_that_has_gone() -> None:
    node = nodes.current()
    assert not groups.of(node).members
    go, printed, seen = threading.Event(), [], []
    node.notices.put(lambda: printed.append(go.wait(PATIENCE)))

    def end() -> None:
        end_workers(node, 1)
        seen.append(list(printed))

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(0.1)
    go.set()
    thread.join(PATIENCE)
    assert seen == [[True]]
