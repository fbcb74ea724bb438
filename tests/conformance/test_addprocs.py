"""CONFORMANCE 2.1 and 2.13, 2.21: who is in the group, and how workers are added."""

from __future__ import annotations

import concurrent.futures
import os
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import distpool
import distpool.calls
import distpool.managers
import distpool.node.node
from distpool import addprocs, addprocs_async, nprocs, nworkers, procs, rmprocs, workers
from distpool.calls import remotecall_fetch

from .clusters import ByCommand, others
from .conftest import wait_until


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    assert others() == []
    yield
    rmprocs(others())


def environ(name: str) -> str | None:
    return os.environ.get(name)


def run(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, **options)


def test_C004_alone() -> None:
    assert (nprocs(), nworkers(), procs(), workers(), distpool.myid()) == (1, 1, [1], [1], 1)
    assert procs(1) == [1]
    with pytest.raises(ValueError, match="no process with id 12345 exists"):
        procs(12345)


def test_C004_asking_starts_nothing() -> None:
    code = "import distpool, threading\nprint(distpool.procs(), distpool.workers(), threading.active_count())"
    assert run(code).stdout.split("\n")[0] == "[1] [1] 1"


def test_C007_C211_cookie() -> None:
    cookie = distpool.cluster_cookie()
    assert isinstance(cookie, str) and cookie.isascii() and distpool.cluster_cookie() == cookie
    code = "import distpool; print(distpool.cluster_cookie())"
    assert run(code).stdout != run(code).stdout
    try:
        assert distpool.cluster_cookie("foobar") == "foobar" == distpool.cluster_cookie()
        for bad in ("ä", "x" * 65, "", "a\nb"):
            with pytest.raises(ValueError):
                distpool.cluster_cookie(bad)
        assert distpool.cluster_cookie() == "foobar"
        assert distpool.cluster_cookie("x" * 64) == "x" * 64
        (pid,) = addprocs(1)
        assert remotecall_fetch(distpool.myid, pid) == pid
    finally:
        distpool.cluster_cookie(cookie)


def test_C008_roles() -> None:
    assert distpool.myrole() == "master"
    (pid,) = addprocs(1)
    assert remotecall_fetch(distpool.myrole, pid) == "worker"


def test_C194_pids_grow_and_are_never_used_again() -> None:
    first = addprocs(3)
    assert first == sorted(first) and len(set(first)) == 3 and first[0] >= 2
    assert nprocs() == 4 and nworkers() == 3 and procs() == [1, *first] and workers() == first
    rmprocs(first)
    second = addprocs(2)
    assert min(second) > max(first)


def test_C194_a_fresh_program_begins_with_2() -> None:
    assert run("import distpool; print(distpool.addprocs(3))").stdout.splitlines()[0] == "[2, 3, 4]"


def test_C195_two_threads_add_at_the_same_time() -> None:
    added: list[list[int]] = []
    threads = [threading.Thread(target=lambda: added.append(addprocs(2))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    together = sorted(pid for pids in added for pid in pids)
    assert len(added) == 3 and len(set(together)) == 6 and workers() == together


def test_C196_none() -> None:
    begin = time.monotonic()
    assert addprocs(0) == []
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("machines", [1, ["localhost"]])
def test_C197_unknown_keywords(machines: Any) -> None:
    with pytest.raises(ValueError, match="^Invalid keyword argument foo$"):
        addprocs(machines, foo=1)
    with pytest.raises(ValueError, match="^Invalid keyword argument foo$"):
        addprocs_async(machines, foo=1)
    assert others() == []


def test_C197_keywords_of_ssh_are_unknown_here() -> None:
    for name in ("tunnel", "sshflags", "max_parallel"):
        with pytest.raises(ValueError, match=f"Invalid keyword argument {name}"):
            addprocs(1, **{name: True})
        with pytest.raises(ValueError, match=f"Invalid keyword argument {name}"):
            addprocs(distpool.LocalManager(1), **{name: True})


@pytest.mark.parametrize(
    ("bad", "kind"),
    [(-1, ValueError), (True, TypeError), (1.5, TypeError), ("host", TypeError), (b"x", TypeError)],
)
def test_what_addprocs_does_not_take(bad: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        addprocs(bad)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": "1"}, {"topology": "ring"}, {"env": {"A=B": "1"}}])
def test_bad_options_are_found_before_anything_is_launched(options: Any) -> None:
    with pytest.raises(ValueError):
        addprocs(1, **options)
    assert len(addprocs(1)) == 1, "the topology is not held by what failed"


def test_the_first_argument_is_positional() -> None:
    with pytest.raises(ValueError, match="Invalid keyword argument machines"):
        addprocs(machines=1)


def test_addprocs_async() -> None:
    future = addprocs_async(2)
    assert future.result(50) == workers()
    assert not future.cancel()
    failing = addprocs_async(ByCommand(1, [sys.executable, "-c", "print('no')"]))
    assert isinstance(failing.exception(50), distpool.CompositeException)


def test_a_bad_interpreter() -> None:
    with pytest.raises(distpool.CompositeException) as info:
        addprocs(1, exename="/nonexistent/python")
    assert isinstance(info.value.exceptions[0], distpool.LaunchWorkerError)
    assert others() == []


def test_C205_the_import_environment_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "only_here_c205.py").write_text("value = 205")
    (pid,) = addprocs(1)
    later = tmp_path / "later"
    monkeypatch.syspath_prepend(str(later))
    path = remotecall_fetch(lambda: sys.path, pid)
    assert path[0] == str(tmp_path) and str(later) not in path
    assert [entry for entry in path if entry] == [entry for entry in sys.path[1:] if entry]
    assert remotecall_fetch(lambda: __import__("only_here_c205").value, pid) == 205
    assert remotecall_fetch(lambda: (sys.prefix, sys.executable), pid) == (sys.prefix, sys.executable)


def test_C206_C207_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("C207_MINE", "inherited")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first, second, third = (
        addprocs(1, env={"C207": "a", "MKL_NUM_THREADS": "3"})[0],
        addprocs(1, env=[("C207", "b")], enable_threaded_blas=True)[0],
        addprocs(1)[0],
    )
    assert [remotecall_fetch(environ, pid, "C207") for pid in (first, second, third)] == ["a", "b", None]
    assert [remotecall_fetch(environ, pid, "C207_MINE") for pid in (first, second)] == ["inherited"] * 2
    assert [remotecall_fetch(environ, pid, "OMP_NUM_THREADS") for pid in (first, second, third)] == ["1", None, "1"]
    assert remotecall_fetch(environ, first, "MKL_NUM_THREADS") == "3"
    assert "OMP_NUM_THREADS" not in os.environ


def test_C208_exename_and_exeflags() -> None:
    first = addprocs(1, exename=sys.executable, exeflags="-O")[0]
    second = addprocs(1, exename=[sys.executable, "-X", "utf8"], exeflags=["-O", "-B"])[0]
    assert remotecall_fetch(lambda: sys.flags.optimize, first) == 1
    flags = remotecall_fetch(lambda: (sys.flags.optimize, sys.flags.utf8_mode, sys.dont_write_bytecode), second)
    assert flags == (1, 1, True)


def test_C208_a_command_may_set_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: forked workers got the environment of this program in place of what `env`, or a script, had made of it."""
    monkeypatch.setenv("PROBE_GONE", "1")
    script = tmp_path / "wrapped"
    script.write_text(f'#!/bin/sh\nunset PROBE_GONE\nPROBE_SET="$PROBE_WISH 2" exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    (pid,) = addprocs(1, exename=["env", "PROBE_SET=1", sys.executable], env={"PROBE_WISH": "w"})
    assert [remotecall_fetch(environ, pid, f"PROBE_{name}") for name in ("SET", "GONE", "WISH")] == ["1", "1", "w"]
    monkeypatch.setenv("PROBE_LATER", "1")
    pids = addprocs(2, exename=str(script), env={"PROBE_WISH": "w"})
    for pid in pids:
        found = [remotecall_fetch(environ, pid, f"PROBE_{name}") for name in ("SET", "GONE", "WISH", "LATER")]
        assert found == ["w 2", None, "w", "1"]


def test_dir(tmp_path: Path) -> None:
    (pid,) = addprocs(1, dir=tmp_path)
    assert remotecall_fetch(os.getcwd, pid) == str(tmp_path)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_C213_strangers_do_no_harm(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTPOOL_TRANSPORT", transport)
    lines: list[str] = []
    distpool.set_output_hook(lambda pid, line: lines.append(line))
    try:
        pids = addprocs(2)
        members = distpool.node.node.existing().group.members
        silent = []
        for pid in pids:
            kind, *place = members[pid].address
            assert kind == transport
            family, where = (socket.AF_UNIX, place[0]) if kind == "unix" else (socket.AF_INET, tuple(place))
            for data in (os.urandom(31) + b"\xff", b"", b"GET / HTTP/1.0\r\n\r\n", b"\x01"):
                with socket.socket(family) as stranger:
                    stranger.connect(where)
                    stranger.sendall(data)
            for _ in range(70):  # more than may wait at a time
                silent.append(socket.socket(family))
                silent[-1].connect(where)
        assert workers() == pids
        assert [remotecall_fetch(distpool.myid, pid) for pid in pids] == pids
        wait_until(lambda: sum("Invalid connection credentials" in line for line in lines) >= 4)
        for sock in silent:
            sock.close()
        assert [remotecall_fetch(distpool.myid, pid) for pid in pids] == pids
    finally:
        distpool.set_output_hook(None)


def test_C214_loopback_only_and_no_cookie_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setenv("DISTPOOL_TRANSPORT", "tcp")
    (pid,) = addprocs(1)
    process = psutil.Process(remotecall_fetch(os.getpid, pid))
    listening = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]
    assert not [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    for child in psutil.Process().children(recursive=True):
        assert distpool.cluster_cookie() not in " ".join(child.cmdline())


def test_C238_C239_topology_while_workers_live() -> None:
    pids = addprocs(1, topology="master_worker")
    text = "Workers with Topology master_worker already exist. Requested Topology all_to_all cannot be set."
    with pytest.raises(RuntimeError, match=re.escape(text)):
        addprocs(1)
    more = addprocs(1, topology="master_worker", lazy=True)
    rmprocs(pids, more)
    pids = addprocs(1, lazy=False)
    with pytest.raises(ValueError, match="Active workers with lazy=False. Cannot set lazy=True"):
        addprocs(1, lazy=True)
    rmprocs(pids)
    assert len(addprocs(1, lazy=True)) == 1
    with pytest.raises(ValueError, match="Active workers with lazy=True. Cannot set lazy=False"):
        addprocs(1, lazy=False)


@pytest.mark.parametrize("before", [{"lazy": False}, {"topology": "master_worker"}])
def test_C238_what_was_said_of_earlier_workers_is_over(before: dict[str, Any]) -> None:
    """An executor that asks for nothing got what those had, and kept it for everybody who came later."""
    pids = addprocs(2, **before)
    gone = rmprocs(pids, waitfor=0)
    with distpool.ClusterExecutor(1) as executor:
        assert executor.submit(distpool.myid).result(50) == executor.workers[0]
        gone.result(50)
        (pid,) = addprocs(1)
        assert remotecall_fetch(remotecall_fetch, pid, distpool.myid, executor.workers[0]) == executor.workers[0]


@pytest.mark.parametrize("size", [1, 2])
def test_C238_an_executor_keeps_its_topology_while_it_has_nobody(size: int) -> None:
    """When its last worker died, the group was back to the usual topology before another one had come in his place."""
    first = addprocs(1, lazy=False)
    with distpool.ClusterExecutor(size) as executor:
        executor.submit(distpool.myid).result(50)
        rmprocs(first)
        deaths = [executor.submit(os._exit, 3) for _ in range(size)]
        assert [type(death.exception(50)) for death in deaths] == [distpool.ProcessExitedException] * size
        with pytest.raises(ValueError, match="Active workers with lazy=False. Cannot set lazy=True"):
            addprocs(1)
        assert executor.submit(abs, -1).result(50) == 1
        addprocs(1, lazy=False)
    rmprocs(others())
    assert len(addprocs(1)) == 1


def test_C238_an_executor_holds_the_topology_from_the_start_to_its_last_work() -> None:
    executor = distpool.ClusterExecutor(1)
    with pytest.raises(RuntimeError, match="Workers with Topology all_to_all already exist"):
        addprocs(1, topology="master_worker")
    begun = executor.submit(time.sleep, 0.2)
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="Workers with Topology all_to_all already exist"):
        addprocs(1, topology="master_worker")
    begun.result(50)
    executor.shutdown()
    assert len(addprocs(1, topology="master_worker")) == 1


def test_C233_master_worker() -> None:
    one, two = addprocs(2, topology="master_worker")
    with pytest.raises(distpool.RemoteException) as info:
        remotecall_fetch(lambda pid: remotecall_fetch(distpool.myid, pid), one, two)
    assert isinstance(info.value.captured.ex, distpool.TopologyError)
    assert f"peer {two} is not connected to {one}. Topology : master_worker" in str(info.value.captured.ex)
    assert remotecall_fetch(lambda: remotecall_fetch(distpool.myid, 1), one) == 1


def test_C233_references_between_unconnected_workers() -> None:
    """Each use is an error, not only the first; the reference may be held, and sent back to who is connected."""
    one, two = addprocs(2, topology="master_worker")
    rc = distpool.RemoteChannel(lambda: distpool.Channel(2), one).put(5)
    unset = distpool.Future(one)
    uses = (rc.take, rc.isready, unset.fetch, unset.isready, unset.wait, unset.result)
    for name, ref in [(use.__name__, use.__self__) for use in uses] * 2:  # type: ignore[attr-defined]
        future = distpool.remotecall(lambda ref, name: getattr(ref, name)(), two, ref, name)
        with pytest.raises(distpool.RemoteException) as info:
            future.result(30)
        assert isinstance(info.value.captured.ex, distpool.TopologyError), name
    assert remotecall_fetch(lambda *refs: refs, two, rc, unset) == (rc, unset)
    assert rc.take() == 5 and unset.put(7).fetch() == 7
    assert remotecall_fetch(lambda ref: ref.fetch(), two, unset) == 7, "with its value"


def test_C233_isready_raises_also_when_it_is_known_that_there_is_no_way() -> None:
    """It said True where another use, or its own question to be told, had just heard that nobody can be asked."""
    one, two = addprocs(2, topology="master_worker")

    def ask(known: distpool.Future, fresh: distpool.Future) -> list[bool]:
        with pytest.raises(distpool.TopologyError):
            known.fetch()
        fresh.add_done_callback(lambda future: None)
        concurrent.futures.wait([fresh], 30)
        for future in (known, known, fresh, fresh):
            with pytest.raises(distpool.TopologyError, match=f"peer {one} is not connected to {two}"):
                future.isready()
        return [known.done(), fresh.done()]

    assert remotecall_fetch(ask, two, distpool.Future(one), distpool.Future(one)) == [True, True]


@pytest.mark.parametrize("operation", ["put", "take", "fetch", "wait", "isready", "isopen", "close", "future"])
def test_C233_references_of_processes_that_cannot_be_reached(operation: str) -> None:
    """Each time, not only the first one: a second `take` waited for ever."""
    one, two = addprocs(2, topology="master_worker")
    channel = distpool.RemoteChannel(lambda: distpool.Channel(5), two)
    future = distpool.remotecall(abs, two, -1)

    def use() -> None:
        if operation == "future":
            future.result()
        getattr(channel, operation)(*([1] if operation == "put" else []))

    for _ in range(3):
        error = distpool.remotecall(use, one).exception(30)
        assert isinstance(error, distpool.RemoteException) and isinstance(error.captured.ex, distpool.TopologyError)


def links() -> list[int]:
    return [pid for pid in distpool.node.node.current().peers.known() if pid != distpool.myid()]


def test_C236_C237_lazy_or_not() -> None:
    lazy = addprocs(3)
    assert [remotecall_fetch(links, pid) for pid in lazy] == [[1], [1], [1]]
    assert remotecall_fetch(lambda pid: remotecall_fetch(distpool.myid, pid), lazy[0], lazy[2]) == lazy[2]
    assert [remotecall_fetch(links, pid) for pid in lazy] == [[1, lazy[2]], [1], [1, lazy[0]]]
    rmprocs(lazy)
    pids = addprocs(2, lazy=False)
    pids += addprocs(2, lazy=False)
    for pid in pids:
        assert remotecall_fetch(links, pid) == [1, *(other for other in pids if other != pid)]


def test_C253_C283_workers_know_the_same() -> None:
    one, two = addprocs(2)
    for pid in (1, one, two):
        assert remotecall_fetch(procs, pid) == procs() == remotecall_fetch(procs, pid, one) == procs(1)
    assert distpool.check_same_host([1, one, two]) and remotecall_fetch(distpool.check_same_host, one, [one, two])
    rmprocs(two)
    assert remotecall_fetch(workers, one) == [one]
    with pytest.raises(distpool.ProcessExitedException):
        procs(two)


def test_C284_hosts_by_bind_address() -> None:
    (local,) = addprocs(1)

    class Elsewhere(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[Any]:
            for number, config in enumerate(super().launch(params)):
                config.bind_addr = f"10.0.0.{number // 2}"
                yield config

    pids = addprocs(Elsewhere(3))
    assert procs(local) == procs(1) == [1, local]
    assert procs(pids[0]) == procs(pids[1]) == pids[:2] and procs(pids[2]) == pids[2:]
    assert distpool.check_same_host(pids[:2]) and not distpool.check_same_host(pids)
    assert not distpool.check_same_host([1, pids[0]])


def test_workers_cannot_change_the_group() -> None:
    (pid,) = addprocs(1)
    for function in (addprocs, rmprocs):
        with pytest.raises(distpool.RemoteException) as info:
            remotecall_fetch(function, pid, 1)
        assert str(info.value.captured.ex) == "Only process 1 can add and remove workers"


def test_workers_of_executors_are_members_but_in_no_default_pool() -> None:
    with distpool.ClusterExecutor(1) as executor:
        assert executor.submit(distpool.myid).result(50) == executor.workers[0]
        assert workers() == executor.workers
        pids = addprocs(1)
        assert workers() == sorted([*pids, *executor.workers])
        group = distpool.node.node.existing().group
        assert list(group.default_members) == pids


def test_worker_callbacks() -> None:
    started: list[Any] = []
    exited: list[Any] = []
    distpool.on_worker_started(started.append)
    assert distpool.on_worker_exited(exited.append) == exited.append
    one, two = addprocs(2)
    wait_until(lambda: sorted(info.pid for info in started) == [one, two])
    assert {info.ospid for info in started} == {remotecall_fetch(os.getpid, pid) for pid in (one, two)}
    assert all(info.host == socket.gethostname() for info in started)
    rmprocs(one)
    distpool.calls.remote_do(os._exit, two, 7)
    wait_until(lambda: len(exited) == 2)
    assert [(info.pid, info.exitcode) for info in exited] == [(one, 0), (two, 7)]
    assert exited[0].reason == "it was removed" and exited[1].reason == "exit code 7"
    with pytest.raises(TypeError):
        distpool.on_worker_started(1)  # type: ignore[type-var]


def test_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rmprocs(addprocs(1))
