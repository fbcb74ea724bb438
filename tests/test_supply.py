"""Executors on any manager: workers that come late, partially or never, and hosts that go away.

`Hosts` stands for several machines: each host is a part of its own, and a host that is down refuses every launch. The
processes are real, started by command, as a manager of a user's would start them.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conformance.clusters import ENVIRONMENT, ByCommand, Recording, start
from faults.helpers import Gate, all_at_once, hold

from distpool import (
    ClusterExecutor,
    ClusterManager,
    CompositeException,
    DistPool,
    LaunchWorkerError,
    ProcessExitedException,
    WorkerConfig,
    supply,
)
from distpool.managers.base import parse_header
from distpool.node import group as groups
from distpool.node import node as nodes
from distpool.supply import spread

HERE = Path(__file__).resolve().parent
PATIENCE = 40.0
WORKER = [sys.executable, "-m", "distpool", "worker", "--bind-to", "127.0.0.1"]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are no local ones of distpool's: they find this folder only by their environment."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", os.pathsep.join([str(HERE), ENVIRONMENT["PYTHONPATH"]]))


def where() -> tuple[str, int]:
    return os.environ["HOST"], os.getpid()


class Host(ByCommand):
    """One machine of `Hosts`."""

    def __init__(self, cluster: Hosts, name: str, n: int) -> None:
        super().__init__(n)
        self.cluster = cluster
        self.name = name

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        self.cluster.launches.append((self.name, self.n))
        if self.name in self.cluster.down:
            raise LaunchWorkerError(self.name, "", "no route to host")
        for _ in range(self.n):
            process = start(["env", f"HOST={self.name}", *WORKER], params["cookie"])
            self.cluster.processes.append(process)
            yield WorkerConfig(io=process.stdout, process=process)

    def sized(self, n: int) -> Host:
        return Host(self.cluster, self.name, n)


class Hosts(ClusterManager):
    """Several machines, some of which may be down."""

    def __init__(self, **counts: int) -> None:
        self.counts = counts
        self.down: set[str] = set()
        self.launches: list[tuple[str, int]] = []
        self.processes: list[Any] = []

    def parts(self) -> list[tuple[ClusterManager, int | None]]:
        return [(Host(self, name, count), count) for name, count in self.counts.items()]


def at(executor: ClusterExecutor, count: int) -> dict[str, set[int]]:
    """Host -> processes there, of `count` calls that run at the same time."""
    everybody: dict[str, set[int]] = {}
    gate = Gate()

    def show(address: Any) -> tuple[str, int]:
        hold(address)
        return where()

    futures = [executor.submit(show, gate.address) for _ in range(count)]
    gate.arrivals(count, PATIENCE)
    gate.close()
    for future in futures:
        name, ospid = future.result(PATIENCE)
        everybody.setdefault(name, set()).add(ospid)
    return everybody


# -- managers of which nothing is known ----------------------------------------------------------------------------


def test_an_opaque_manager(make: Callable[..., ClusterExecutor]) -> None:
    manager = ByCommand(2)
    executor = make(manager, env={"A": "b"})
    while len(executor.workers) < 2:  # one of two that is late might find that the other has run both
        executor.submit(abs, 1).result(PATIENCE)
    assert len(all_at_once(executor, 2)) == 2
    assert manager.params["env"] == {"A": "b"} and manager.params["topology"] == "all_to_all"
    assert executor._max_workers == 2
    assert [op for op, _ in manager.told] == ["register"] * 2
    executor.shutdown()
    assert [process.wait(PATIENCE) for process in manager.processes] == [0, 0]


def test_a_pool_on_an_opaque_manager() -> None:
    with DistPool(ByCommand(2)) as pool:
        assert pool.map(abs, range(-20, 0)) == list(range(20, 0, -1))
    with DistPool(1, hosts=ByCommand(2)) as pool:
        assert pool.apply(abs, (-1,)) == 1


def test_what_it_lost_is_launched_again_when_nobody_is_left(make: Callable[..., ClusterExecutor]) -> None:
    manager = ByCommand(2)
    executor = make(manager)
    first, second = all_at_once(executor, 2)
    bad = executor.submit(os.kill, first, signal.SIGKILL)
    assert bad.exception(PATIENCE) is None or isinstance(bad.exception(), ProcessExitedException)
    assert executor.submit(os.getpid).result(PATIENCE) == second
    assert len(manager.processes) == 2, "it can only launch what it launches"
    error = executor.submit(os._exit, 7).exception(PATIENCE)
    assert isinstance(error, ProcessExitedException) and error.exitcode == 7
    assert len(all_at_once(executor, 2) - {first, second}) == 2
    assert len(manager.processes) == 4


def test_scale_of_an_opaque_manager(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(ByCommand(2))
    all_at_once(executor, 2)
    with pytest.raises(ValueError, match="cannot start a given number"):
        executor.scale(3)
    executor.scale(1)
    wait_for(lambda: len(executor.workers) == 1, executor)


def test_max_workers_of_an_opaque_manager(make: Callable[..., ClusterExecutor]) -> None:
    manager = ByCommand(3)
    executor = make(manager, max_workers=1)
    executor.submit(abs, 1).result(PATIENCE)
    wait_for(lambda: sum(process.poll() is None for process in manager.processes) == 1, executor)
    assert executor._max_workers == 1


def wait_for(holds: Callable[[], object], executor: ClusterExecutor) -> None:
    """Calls go on meanwhile: each of them gives the executor a chance to change."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        executor.submit(abs, 1).result(PATIENCE)


def test_others_that_a_worker_starts(make: Callable[..., ClusterExecutor]) -> None:
    class First(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            for config in super().launch(params):
                config.count, config.exename = 3, sys.executable
                yield config

    executor = make(First())
    assert len(all_at_once(executor, 3)) == 3
    assert executor._max_workers == 3


class Existing(ClusterManager):
    """Workers that somebody else has started: all that is known of them is where they listen."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.processes: list[subprocess.Popen[bytes]] = []

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        for _ in range(self.n):
            process = start(WORKER, params["cookie"])
            self.processes.append(process)
            assert process.stdout is not None
            found = parse_header(process.stdout.readline().decode())
            assert found is not None
            yield WorkerConfig(host=found[0], port=found[1])


@pytest.fixture
def existing() -> Iterator[Existing]:
    manager = Existing(2)
    yield manager
    for process in manager.processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_workers_that_somebody_else_has_started(make: Callable[..., ClusterExecutor], existing: Existing) -> None:
    executor = make(existing)
    ospids = all_at_once(executor, 2)
    assert ospids == {process.pid for process in existing.processes}
    handles: Any = executor._processes
    assert set(handles) == ospids and all(handle.is_alive() for handle in handles.values())
    error = executor.options(timeout=0.3).submit(time.sleep, 60).exception(PATIENCE)
    assert isinstance(error, TimeoutError), "without its connection it ends"
    wait_for(lambda: sum(process.poll() is None for process in existing.processes) == 1, executor)
    (alive,) = [handle for handle in handles.values() if handle.is_alive()]
    alive.terminate()
    alive.join(PATIENCE)
    assert not alive.is_alive()
    assert len(all_at_once(executor, 2)) == 2, "nobody was left, so all were launched again"
    executor.kill_workers()
    executor.shutdown()
    assert [process.wait(PATIENCE) for process in existing.processes][:2] == [1, 1], "the others may have gone as asked"


# -- late, partially, never ----------------------------------------------------------------------------------------


class Late(ByCommand):
    """Its second worker comes when the test says so."""

    def __init__(self) -> None:
        super().__init__(2)
        self.go_on = threading.Event()

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        for config in super().launch(params):
            yield config
            self.go_on.wait(PATIENCE)


def test_workers_that_come_late(make: Callable[..., ClusterExecutor]) -> None:
    manager = Late()
    executor = make(manager)
    assert executor.submit(abs, -1).result(PATIENCE) == 1, "the first is used before the second is there"
    manager.go_on.set()
    assert len(all_at_once(executor, 2)) == 2


def test_nobody_waits_for_a_launch_that_is_not_needed_any_more() -> None:
    manager = Late()
    executor = ClusterExecutor(manager)
    assert executor.submit(abs, -1).result(PATIENCE) == 1
    begin = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - begin < 10
    manager.go_on.set()
    for process in manager.processes:
        process.wait(PATIENCE)


def test_workers_that_come_partially(make: Callable[..., ClusterExecutor], caplog: pytest.LogCaptureFixture) -> None:
    class Partial(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            process = start([sys.executable, "-c", "print('broken set-up'); raise SystemExit(3)"], params["cookie"])
            yield WorkerConfig(io=process.stdout, process=process)
            yield from super().launch(params)
            raise OSError("no more of them")

    with caplog.at_level(logging.WARNING, "distpool"):
        executor = make(Partial(1))
        assert executor.submit(abs, -1).result(PATIENCE) == 1
        wait_for(lambda: "broken set-up" in caplog.text or "exit code 3" in caplog.text, executor)
        wait_for(lambda: "no more of them" in caplog.text, executor)
    assert executor._max_workers == 1


class Raises(Recording):
    def launch(self, params: dict[str, Any]) -> Any:
        raise OSError("the scheduler is down")


class Empty(Recording):
    def launch(self, params: dict[str, Any]) -> Any:
        return []


class Silent(Recording):
    def __init__(self) -> None:
        super().__init__()
        self.end = threading.Event()

    def launch(self, params: dict[str, Any]) -> Any:
        self.end.wait(PATIENCE)
        return []


@pytest.mark.parametrize(
    ("manager", "message"),
    [
        (ByCommand(2, [sys.executable, "-c", "print('boom'); raise SystemExit(3)"]), "exit code 3"),
        (Raises(), "OSError: the scheduler is down"),
        (Empty(), "0 of any workers started"),
    ],
    ids=["processes end", "launch raises", "launch gives nobody"],
)
def test_workers_that_never_come(manager: ClusterManager, message: str, make: Callable[..., ClusterExecutor]) -> None:
    executor = make(manager)
    futures = [executor.submit(abs, 1) for _ in range(3)]
    errors = [future.exception(PATIENCE) for future in futures]
    assert all(isinstance(error, LaunchWorkerError | CompositeException) for error in errors)
    assert message in str(errors[0])
    later = executor.submit(abs, 1).exception(PATIENCE)
    assert isinstance(later, LaunchWorkerError | CompositeException)
    executor.shutdown()


def test_a_launch_that_never_ends(make: Callable[..., ClusterExecutor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTPOOL_WORKER_TIMEOUT", "1")
    manager = Silent()
    error = make(manager).submit(abs, 1).exception(PATIENCE)
    assert isinstance(error, LaunchWorkerError) and "brought nothing within" in str(error)
    manager.end.set()


def test_a_worker_that_comes_when_nobody_wants_it_any_more(make: Callable[..., ClusterExecutor]) -> None:
    """It is ended, and its manager hears of that: what it kept for its workers (a login, say) would stay otherwise."""

    class Late(ByCommand):
        go, told_of_end = threading.Event(), threading.Event()

        def launch(self, params: dict[str, Any]) -> Any:
            assert self.go.wait(PATIENCE)
            yield from super().launch(params)

        def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
            super().manage(pid, config, op)
            if op == "finalize":
                self.told_of_end.set()

    manager = Late(1)
    executor = make(manager)
    executor.submit(abs, 1)
    executor.kill_workers()
    executor.shutdown()
    manager.go.set()
    assert manager.told_of_end.wait(PATIENCE)
    assert [op for op, _ in manager.told] == ["finalize"]
    assert manager.processes[0].wait(PATIENCE) == -signal.SIGKILL


def test_what_launch_refuses_is_raised_as_it_is(make: Callable[..., ClusterExecutor]) -> None:
    class Picky(Recording):
        def launch(self, params: dict[str, Any]) -> Any:
            raise ValueError("no such queue")

    assert isinstance(make(Picky()).submit(abs, 1).exception(PATIENCE), ValueError)


def test_in_break_mode_too(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(Raises(), on_worker_exit="break")
    assert "the scheduler is down" in str(executor.submit(abs, 1).exception(PATIENCE))


def test_workers_that_die_before_they_have_done_anything(
    make: Callable[..., ClusterExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come up, and something ends them: no endless respawn."""
    monkeypatch.setattr(supply, "_IDLE_DEATHS", 4)

    class Mortal(ByCommand):
        launched = 0

        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            Mortal.launched += 1
            return super().launch(params)

        def sized(self, n: int) -> Mortal:
            return Mortal(n)

    # When they are ready, and not while they join: that would be a launch that has failed.
    hooks = groups.of(nodes.current()).started_hooks
    monkeypatch.setattr(groups.of(nodes.current()), "started_hooks", [*hooks, lambda info: os.kill(info.ospid, 9)])
    executor = make(Mortal(1))
    assert executor._crew.finished.wait(PATIENCE)
    error = executor.submit(abs, 1).exception(PATIENCE)
    assert isinstance(error, LaunchWorkerError) and "died before they had run anything" in str(error)
    assert Mortal.launched == 4


# -- several hosts -------------------------------------------------------------------------------------------------


def test_hosts_side_by_side(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(Hosts(a=2, b=1))
    found = at(executor, 3)
    assert {name: len(ospids) for name, ospids in found.items()} == {"a": 2, "b": 1}
    assert executor._max_workers == 3


def test_a_worker_is_replaced_on_its_host(make: Callable[..., ClusterExecutor]) -> None:
    cluster = Hosts(a=1, b=1)
    executor = make(cluster)
    before = at(executor, 2)
    os.kill(*before["b"], signal.SIGKILL)
    after = at(executor, 2)
    while after["a"] | after["b"] >= before["b"]:  # its end has not been noticed yet
        after = at(executor, 2)
    assert after["a"] == before["a"] and after["b"] != before["b"]
    assert cluster.launches.count(("b", 1)) == 2


def test_a_host_that_does_not_come_back(make: Callable[..., ClusterExecutor]) -> None:
    cluster = Hosts(a=1, b=2, c=1)
    executor = make(cluster, retries=3)
    before = at(executor, 4)
    cluster.down.add("b")
    for ospid in before["b"]:
        os.kill(ospid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while True:
        after = at(executor, 4)
        if "b" not in after:
            break
        assert time.monotonic() < deadline
    assert {name: len(ospids) for name, ospids in after.items()} == {"a": 2, "c": 2}
    assert 1 <= sum(name == "b" for name, _ in cluster.launches[3:]) <= 2, "asked, and then given up"


def test_no_host_comes_back(make: Callable[..., ClusterExecutor]) -> None:
    cluster = Hosts(a=1, b=1)
    executor = make(cluster)
    before = at(executor, 2)
    cluster.down |= {"a", "b"}
    for (ospid,) in before.values():
        os.kill(ospid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while not isinstance(error := executor.submit(abs, 1).exception(PATIENCE), LaunchWorkerError | CompositeException):
        assert time.monotonic() < deadline
    assert "no route to host" in str(error)
    assert len(cluster.launches) <= 2 + 2 * 2


def test_a_host_that_is_down_from_the_beginning(
    make: Callable[..., ClusterExecutor], caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Hosts(a=2, b=5)
    cluster.down.add("b")
    with caplog.at_level(logging.WARNING, "distpool"):
        executor = make(cluster)
        assert set(at(executor, 2)) == {"a"}
        wait_for(lambda: "no route to host" in caplog.text, executor)
    wait_for(lambda: executor._max_workers == 2, executor)
    assert cluster.launches.count(("b", 5)) == 1


def test_every_host_is_down(make: Callable[..., ClusterExecutor]) -> None:
    cluster = Hosts(a=1, b=1)
    cluster.down |= {"a", "b"}
    error = make(cluster).submit(abs, 1).exception(PATIENCE)
    assert isinstance(error, CompositeException)
    assert sorted(each.host for each in error.exceptions) == ["a", "b"]  # type: ignore[attr-defined]
    assert len(cluster.launches) == 2


def test_a_pool_loses_a_host() -> None:
    cluster = Hosts(a=1, b=1)
    with DistPool(cluster, retries=5) as pool:
        before = at(pool.executor, 2)
        cluster.down.add("b")
        result = pool.map_async(slow, range(300), chunksize=1)
        os.kill(*before["b"], signal.SIGKILL)
        values = pool.pmap(slow, range(50), retry_delays=[0] * 3)
        assert values == [number * number for number in range(50)]
        try:
            assert result.get(PATIENCE) == [number * number for number in range(300)]
        except ProcessExitedException:
            pass  # the element that ran there


def slow(number: int) -> int:
    sum(range(20_000))
    return number * number


def test_scale_of_several_hosts(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(Hosts(a=1, b=1))
    at(executor, 2)
    executor.scale(5)
    found = at(executor, 5)
    assert sorted(len(ospids) for ospids in found.values()) == [2, 3]
    executor.scale(2)
    wait_for(lambda: len(executor.workers) == 2, executor)


def test_max_workers_of_several_hosts(make: Callable[..., ClusterExecutor]) -> None:
    cluster = Hosts(a=4, b=4)
    executor = make(cluster, max_workers=2)
    assert {name: len(ospids) for name, ospids in at(executor, 2).items()} == {"a": 1, "b": 1}
    assert len(cluster.processes) == 2


def test_after_so_many_tasks_on_the_same_host(make: Callable[..., ClusterExecutor]) -> None:
    cluster = Hosts(a=1, b=1)
    executor = make(cluster, max_tasks_per_child=2)
    assert sorted(executor.map(abs, range(12))) == list(range(12))
    # Each host has its worker again. One that runs its last call, and its successor, may be there at the same time.
    wait_for(lambda: set(at(executor, 2)) == {"a", "b"}, executor)
    names = [name for name, _ in cluster.launches]
    assert len(names) >= 6 and set(names) == {"a", "b"}


def test_initializer_runs_everywhere(make: Callable[..., ClusterExecutor], tmp_path: Path) -> None:
    def begin(folder: Path) -> None:
        (folder / os.environ["HOST"]).touch()

    executor = make(Hosts(a=1, b=1), initializer=begin, initargs=(tmp_path,))
    at(executor, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    ("size", "weights", "parts"),
    [
        (4, [8, 8], [2, 2]),
        (1, [8, 8], [1, 0]),
        (5, [1, 1], [3, 2]),
        (3, [100, 1, 1], [2, 1, 0]),
        (7, [2, 0, 1], [5, 0, 2]),
        (9, [8, 8, 1], [4, 4, 1]),
        (12, [1, 2, 3], [2, 4, 6]),
    ],
)
def test_spread(size: int, weights: list[int], parts: list[int]) -> None:
    assert spread(size, weights) == parts and sum(parts) == size
