"""The workers of one executor: they come up, are replaced, grow and shrink, and their number is right afterwards."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from faults.helpers import Gate, all_at_once, hold, note, noted
from wires import until

import distpool
from distpool import ClusterExecutor, LaunchWorkerError, ProcessExitedException, opening, supply
from distpool.node import node as nodes

PATIENCE = 30.0


def wait_for_ever() -> None:
    threading.Event().wait()


def test_killed_workers_are_replaced_one_for_one(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(3)
    before = all_at_once(executor, 3)
    assert len(before) == 3
    for ospid in before:
        os.kill(ospid, signal.SIGKILL)
    after = all_at_once(executor, 3)
    assert len(after) == 3 and not after & before
    assert len(executor.workers) == 3


def test_a_worker_that_dies_idle_costs_nothing(
    make: Callable[..., ClusterExecutor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "distpool"):
        executor = make(1)
        victim = executor.submit(os.getpid).result(PATIENCE)
        os.kill(victim, signal.SIGKILL)
        for number in range(20):
            try:
                assert executor.submit(abs, -number).result(PATIENCE) == number
            except ProcessExitedException:
                pass  # it was sent in the moment between death and its notice, and may have run
    assert "terminated" in caplog.text


def test_a_crew_that_cannot_start_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error may keep the executor alive for long, and the crew held the topology, and a place among the crews."""
    crew = opening.make_crew(2, None, {}, (None, ()), None, True)
    monkeypatch.setenv("DISTPOOL_SILENT_SECONDS", "much")
    assert crew.holds_topology and crew in crew.node.crews
    with pytest.raises(ValueError, match="DISTPOOL_SILENT_SECONDS"):
        crew.start()
    assert not crew.holds_topology
    assert crew.finished.wait(PATIENCE) and crew not in crew.node.crews


def replacements(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings that say who replaces whom."""
    found = [record for record in caplog.records if " replaces worker " in record.getMessage()]
    assert all((record.name, record.levelno) == ("distpool.crew", logging.WARNING) for record in found)
    return [record.getMessage() for record in found]


@pytest.mark.parametrize("cause", ["killed", "timeout"])
def test_the_log_says_who_replaces_whom(
    make: Callable[..., ClusterExecutor], caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    with caplog.at_level(logging.INFO, "distpool"):
        executor = make(1)
        executor.submit(abs, 1).result(PATIENCE)
        (before,) = executor.workers
        if cause == "killed":
            error = executor.submit(os._exit, 3).exception(PATIENCE)
            assert isinstance(error, ProcessExitedException)
        else:
            error = executor.options(timeout=0.2).submit(wait_for_ever).exception(PATIENCE)
            assert isinstance(error, TimeoutError)
        executor.submit(abs, 1).result(PATIENCE)
        (after,) = executor.workers
    assert replacements(caplog) == [f"Worker {after} replaces worker {before}."]
    assert caplog.text.index(f"Worker {before} terminated.") < caplog.text.index("replaces")


def test_who_comes_at_first_or_by_scale_replaces_nobody(
    make: Callable[..., ClusterExecutor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "distpool"):
        executor = make(1)
        executor.submit(abs, 1).result(PATIENCE)
        executor.scale(3)
        all_at_once(executor, 3)
        executor.scale(1)
        until(lambda: len(executor.workers) == 1, "the others have left")
        executor.submit(abs, 1).result(PATIENCE)
    assert not replacements(caplog)


def test_planned_replacements_are_no_warnings(
    make: Callable[..., ClusterExecutor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "distpool"):
        executor = make(1, max_tasks_per_child=1)
        ospids = {executor.submit(os.getpid).result(PATIENCE) for _ in range(3)}
    assert len(ospids) == 3
    assert not replacements(caplog)
    planned = [record for record in caplog.records if "has run all the calls that it may" in record.getMessage()]
    assert len(planned) >= 2 and {record.levelno for record in planned} == {logging.INFO}


@pytest.mark.leaves_processes("the shell that removes the launcher's directory at the end of this program")
def test_workers_that_never_come_up(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(2, exename="/bin/false")
    error = executor.submit(abs, 1).exception(PATIENCE)
    assert isinstance(error, (LaunchWorkerError, BrokenProcessPool))
    executor.shutdown()


def test_growing_while_calls_wait(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(1)
    gate = Gate()
    futures = [executor.submit(hold, gate.address, number) for number in range(3)]
    first = gate.arrivals(1)
    executor.scale(3)
    others = gate.arrivals(2)
    assert len({arrival.ospid for arrival in first + others}) == 3, "what was sent ahead goes to the new ones"
    gate.close()
    assert [future.result(PATIENCE) for future in futures] == [0, 1, 2]


def test_shrinking_while_calls_wait(make: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    executor = make(3)
    all_at_once(executor, 3)
    futures = [executor.submit(note, tmp_path / "ran", number) for number in range(200)]
    executor.scale(1)
    for future in futures:
        future.result(PATIENCE)
    assert noted(tmp_path / "ran") == {str(number): 1 for number in range(200)}
    deadline = time.monotonic() + PATIENCE
    while len(executor.workers) != 1:
        assert time.monotonic() < deadline
        executor.submit(abs, 1).result(PATIENCE)


def test_workers_that_are_sent_home_idle_have_not_died(
    make: Callable[..., ClusterExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever grew and shrank often got no more workers: thirty that had run nothing were taken for a broken place."""
    monkeypatch.setattr(supply, "_IDLE_DEATHS", 1)
    executor = make(1)
    all_at_once(executor, 1)
    crew = executor._crew
    for _ in range(4):
        executor.scale(2)
        until(lambda: len(executor.workers) == 2, "the second worker")
        executor.scale(1)
        until(lambda: len(crew.members) == 1, "the end of the second worker")


def test_calls_for_a_worker_that_is_sent_home_go_to_another_one(make: Callable[..., ClusterExecutor]) -> None:
    """At once: they waited for what runs there, and if the others had ended by then, for nobody."""
    executor = make(2)
    all_at_once(executor, 2)
    gates = [Gate(), Gate()]
    view = executor.options(pids=executor.workers)
    futures = [view.submit(hold, gate.address, number) for number, gate in enumerate(gates)]
    for gate in gates:
        gate.arrivals(1)
    waiting = [view.submit(abs, -number) for number in range(4)]
    executor._crew.scheduler.pump()  # each has got its worker now
    executor.scale(1)
    until(lambda: len(executor.workers) == 1, "a worker that is to leave")
    (stays,) = executor.workers
    last = next(number for number, future in enumerate(futures) if future._call.slot.pid == stays)  # type: ignore[union-attr]
    gates[last].close()
    assert [future.result(PATIENCE) for future in waiting] == [0, 1, 2, 3]
    gates[1 - last].close()
    assert [future.result(PATIENCE) for future in futures] == [0, 1]


def test_replaced_after_so_many_tasks(make: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    executor = make(2, max_tasks_per_child=5)
    futures = [executor.submit(note, tmp_path / "ran", number) for number in range(100)]
    for future in futures:
        future.result(PATIENCE)
    assert noted(tmp_path / "ran") == {str(number): 1 for number in range(100)}


def _fail_in_the_second(path: Path) -> None:
    note(path, "init")
    if noted(path)["init"] > 1:
        raise OSError("no more of these")


def test_an_initializer_that_fails_in_a_replacement_breaks_it(
    make: Callable[..., ClusterExecutor], tmp_path: Path
) -> None:
    executor = make(1, initializer=_fail_in_the_second, initargs=(tmp_path / "count",))
    assert executor.submit(abs, -1).result(PATIENCE) == 1
    assert executor.submit(os._exit, 1).exception(PATIENCE)
    error = None
    while error is None:
        try:
            error = executor.submit(abs, 1).exception(PATIENCE)
        except BrokenProcessPool as broken:
            error = broken
    assert isinstance(error, BrokenProcessPool) and "no more of these" in str(error)
    assert noted(tmp_path / "count")["init"] == 2, "no respawn loop"


def test_shutdown_at_once_waits_for_nobody(make: Callable[..., ClusterExecutor]) -> None:
    begin = time.monotonic()
    for _ in range(3):
        make(2).shutdown()
    assert time.monotonic() - begin < 15


def nobody_else() -> None:
    """A topology can be chosen only while there are no workers: those of tests that ran before must go first."""
    group = nodes.current().group
    if group is None:
        return
    gone = threading.Event()

    def look() -> None:
        for member in list(group.members.values()):
            member.kill("a test wants to be alone")
        if group.members:
            group.node.loop.call_later(0.05, look)
        else:
            gone.set()

    group.node.loop.call_soon(look)
    with group.node.loop.following():
        assert gone.wait(PATIENCE)


def test_the_topology_is_what_was_asked_for(make: Callable[..., ClusterExecutor]) -> None:
    nobody_else()
    executor = make(2, topology="master_worker")
    all_at_once(executor, 2)
    one, other = executor.workers
    with pytest.raises(distpool.RemoteException) as caught:
        distpool.remotecall_fetch(distpool.remotecall_fetch, one, abs, other, -1)
    assert isinstance(caught.value.captured.ex, distpool.RemoteException | distpool.TopologyError)
    assert "Topology : master_worker" in str(caught.value)
    with pytest.raises(RuntimeError, match="Workers with Topology master_worker already exist"):
        make(1, topology="all_to_all")
    assert make(1).submit(abs, -1).result(PATIENCE) == 1, "who does not ask takes what there is"
    for bad in ({"topology": "ring"}, {"lazy": 1}):
        with pytest.raises((ValueError, TypeError)):
            make(1, **bad)


def test_a_topology_ends_with_its_executor() -> None:
    nobody_else()
    for topology in ("master_worker", "all_to_all"):
        with ClusterExecutor(1, topology=topology) as executor:
            assert executor.submit(abs, -1).result(PATIENCE) == 1


def test_a_manager_without_hosts_is_an_error_and_no_hang(make: Callable[..., ClusterExecutor]) -> None:
    class Nowhere(distpool.ClusterManager):
        def parts(self) -> list[tuple[distpool.ClusterManager, int | None]]:
            return []

    for manager in (Nowhere(), distpool.SSHManager([])):
        executor = make(manager)
        assert isinstance(executor.submit(abs, -1).exception(PATIENCE), LaunchWorkerError)
        executor.shutdown()


def _hold_without_sigterm(address: tuple[str, int]) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hold(address)
    return os.getpid()


def test_a_worker_that_ignores_sigterm_leaves_when_its_call_is_done(
    make: Callable[..., ClusterExecutor], gate: Gate
) -> None:
    executor = make(1)
    future = executor.submit(_hold_without_sigterm, gate.address)
    arrival = gate.arrival()
    executor.terminate_workers()
    asked = threading.Event()
    executor._crew.node.loop.call_soon(asked.set)  # behind the signal
    with executor._crew.node.loop.following():
        assert asked.wait(PATIENCE)
    arrival.release()
    assert future.result(PATIENCE) == arrival.ospid
    executor._crew.wait(PATIENCE)
    assert executor._crew.finished.is_set()


def test_a_call_whose_submit_was_interrupted_does_not_keep_the_executor_open(
    make: Callable[..., ClusterExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was in the queue and nobody had been told: shutdown waited for it, for ever."""
    executor = make(1)
    all_at_once(executor, 1)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(executor._crew.scheduler, "pump", interrupted)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(abs, -1)
    ended = threading.Thread(target=executor.shutdown, daemon=True)
    ended.start()
    ended.join(PATIENCE)
    assert not ended.is_alive()
