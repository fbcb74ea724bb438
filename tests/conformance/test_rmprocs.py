"""CONFORMANCE 2.16: removal, death and the end of the program."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

import distpool
import distpool.calls
import distpool.managers
import distpool.node.node
from distpool import addprocs, procs, rmprocs, workers
from distpool.calls import remote_do, remotecall, remotecall_fetch

from .clusters import others
from .conftest import wait_until


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    assert others() == []
    yield
    rmprocs(others())


def run(code: str) -> tuple[subprocess.CompletedProcess[str], float]:
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    return done, time.monotonic() - begin


def gone(ospid: int) -> bool:
    try:
        return psutil.Process(ospid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_C244_removed_is_gone() -> None:
    one, two = addprocs(2)
    ospid = remotecall_fetch(os.getpid, one)
    future = rmprocs(one)
    assert future.done() and future.result() is None
    assert one not in procs() and gone(ospid)
    for call in (remotecall, remotecall_fetch, remote_do):
        with pytest.raises(distpool.ProcessExitedException) as info:
            call(distpool.myid, one)
        assert info.value.worker_id == one

    def ask(pid: int) -> int:
        try:
            return int(remotecall_fetch(distpool.myid, pid))
        except distpool.ProcessExitedException as error:
            return -error.worker_id

    assert remotecall_fetch(ask, two, one) == -one


def test_C245_without_waiting() -> None:
    pids = addprocs(4)
    waiting = remotecall(time.sleep, pids[0], 60)
    future = rmprocs(pids[0], pids[1], waitfor=0)
    for call in (remotecall, remotecall_fetch, remote_do, lambda f, pid: distpool.Future(pid)):
        with pytest.raises(distpool.ProcessExitedException) as info:
            call(distpool.myid, pids[0])
        assert info.value.worker_id == pids[0] and not info.value.maybe_ran
    pool = distpool.WorkerPool(pids[:1])
    with pytest.raises(RuntimeError, match="No active worker"):
        remotecall_fetch(distpool.myid, pool)
    with pytest.raises(distpool.ProcessExitedException):
        waiting.result(30)
    assert workers() == pids[2:]
    assert future.result(30) is None
    assert workers() == pids[2:]


@pytest.mark.parametrize("waitfor", [None, 0])
def test_C232_removed_from_a_worker(waitfor: float | None) -> None:
    """Only pid 1 removes, but anybody may have it do so; the Future travels."""
    one, two = addprocs(2)

    def remove(pid: int, waitfor: float | None) -> list[object]:
        import concurrent.futures

        import distpool

        future = distpool.remotecall_fetch(distpool.rmprocs, 1, pid, waitfor=waitfor)
        done = concurrent.futures.wait([future], 30).done
        return [isinstance(future, concurrent.futures.Future), done == {future}, future.result(), distpool.workers()]

    assert remotecall_fetch(remove, one, two, waitfor) == [True, True, None, [one]]
    assert others() == [one]


def test_workers_have_some_added() -> None:
    (pid,) = addprocs(1)

    def add() -> list[int]:
        import distpool

        pids: list[int] = distpool.remotecall_fetch(distpool.addprocs_async, 1, 1).result(30)
        return pids

    assert remotecall_fetch(add, pid) == [pid + 1]
    assert others() == [pid, pid + 1]


def test_C247_not_in_time() -> None:
    pids = addprocs(2)
    for pid in pids:
        remote_do(os.kill, pid, remotecall_fetch(os.getpid, pid), signal.SIGSTOP)
    time.sleep(0.2)
    with pytest.raises(RuntimeError) as info:
        rmprocs(pids, waitfor=0.001)
    assert str(info.value) == f"rmprocs: pids {pids} not terminated after 0.001 seconds."
    assert others() == []
    group = distpool.node.node.existing().group
    wait_until(lambda: not group.members, 20)


def test_C248_arguments() -> None:
    pids = addprocs(4)
    with pytest.warns(UserWarning, match="process 1 not removed"):
        rmprocs(1, pids[0], [pids[1]], range(pids[2], pids[2] + 1), pids[0], 9999)
    assert workers() == pids[3:]
    rmprocs(pids[0])
    rmprocs()
    assert workers() == pids[3:]
    for bad in ("2", 2.0, True, [None]):
        with pytest.raises(TypeError):
            rmprocs(bad)
    for wait in (-1, "1", float("nan")):
        with pytest.raises(ValueError):
            rmprocs(pids[3], waitfor=wait)
    assert workers() == pids[3:]


def test_C249_nothing_is_said(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, "distpool"):
        rmprocs(addprocs(2))
    assert caplog.records == [] and capfd.readouterr().out == ""


def busy() -> None:
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass


def deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    busy()


@pytest.mark.parametrize("function", [busy, deaf])
def test_C250_who_does_not_go_is_ended(function: object) -> None:
    (pid,) = addprocs(1)
    ospid = remotecall_fetch(os.getpid, pid)
    remote_do(function, pid)
    time.sleep(0.3)
    begin = time.monotonic()
    rmprocs(pid)
    assert time.monotonic() - begin < 15 and gone(ospid)


def test_C250_stopped() -> None:
    (pid,) = addprocs(1)
    ospid = remotecall_fetch(os.getpid, pid)
    os.kill(ospid, signal.SIGSTOP)
    rmprocs(pid)
    assert gone(ospid)


def test_a_busy_worker_is_interrupted() -> None:
    (pid,) = addprocs(1)
    waiting = remotecall(time.sleep, pid, 60)
    time.sleep(0.2)
    begin = time.monotonic()
    rmprocs(pid)
    assert time.monotonic() - begin < 4
    with pytest.raises(distpool.ProcessExitedException) as info:
        waiting.result(10)
    assert info.value.worker_id == pid


def test_C254_unexpected_deaths_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    (pid,) = addprocs(1)
    remote_do(os._exit, pid, 3)
    wait_until(lambda: others() == [])
    wait_until(lambda: f"Worker {pid} terminated." in caplog.text)
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_atexit_of_a_removed_worker_runs(tmp_path: object) -> None:
    (pid,) = addprocs(1)
    path = f"{tmp_path}/said"

    def register() -> None:
        import atexit

        atexit.register(lambda: open(path, "w").close())

    remotecall_fetch(register, pid)
    rmprocs(pid)
    assert os.path.exists(path)


def test_C257_normal_exit() -> None:
    code = """
import distpool.calls, os
print(*[distpool.calls.remotecall_fetch(os.getpid, p) for p in distpool.addprocs(3)])
raise SystemExit(5)
"""
    done, seconds = run(code)
    assert done.returncode == 5 and done.stderr == ""
    assert all(gone(int(ospid)) for ospid in done.stdout.split())
    assert seconds < 15


def test_C257_exit_with_busy_workers() -> None:
    code = """
import distpool.calls, os, time
pids = distpool.addprocs(2)
print(*[distpool.calls.remotecall_fetch(os.getpid, p) for p in pids], flush=True)
futures = [distpool.calls.remotecall(time.sleep, p, 100) for p in pids]
time.sleep(0.3)
"""
    done, seconds = run(code)
    assert done.returncode == 0 and seconds < 20
    assert all(gone(int(ospid)) for ospid in done.stdout.split())


@pytest.mark.parametrize(
    "call",
    {
        "nothing": "",
        "one that has ended": "distpool.remotecall_fetch(abs, 2, -3)",
        "remotecall": "future = distpool.remotecall(held, 2)",
        "remotecall, forgotten": "distpool.remotecall(held, 2)",
        "spawnat": "future = distpool.spawnat(2, held)",
        "callback": "distpool.remotecall(held, 2).add_done_callback(print)",
        "remote_do": "distpool.remote_do(held, 2)",
        "thread": "threading.Thread(target=ask, daemon=True).start()  # held",
    }.items(),
    ids=lambda item: item[0],
)
def test_exit_warns_of_what_still_runs(call: tuple[str, str]) -> None:
    """Once, before it is interrupted; its error is printed nowhere: nobody can get it any more, and it is the end."""
    code = f"""
import distpool, logging, threading, time
logging.basicConfig(format="%(levelname)s %(message)s")
distpool.addprocs(2)
begun = distpool.RemoteChannel(lambda: distpool.Channel(1), 1)
def held():
    begun.put(1)
    time.sleep(100)
def ask():
    try:
        distpool.remotecall_fetch(held, 2)
    except distpool.ProcessExitedException:
        pass
{call[1]}
if "held" in {call[1]!r}:
    begun.take()
"""
    done, seconds = run(code)
    said = ["WARNING The program ends: what still runs on its workers is interrupted."] if "held" in call[1] else []
    # Some Pythons start no threads any more then, which is said as well.
    assert [line for line in done.stderr.splitlines() if "no further thread" not in line] == said
    assert done.returncode == 0 and seconds < 15
    assert "Traceback" not in done.stdout


def test_exit_hooks_may_use_the_cluster() -> None:
    code = """
import atexit, distpool.calls
atexit.register(lambda: print("answer", distpool.calls.remotecall_fetch(abs, 2, -3)))
distpool.addprocs(1)
"""
    done, _ = run(code)
    assert done.stdout == "answer 3\n", done.stderr


def test_exit_tells_managers() -> None:
    code = """
import sys, distpool
sys.path.insert(0, "tests")
from conformance.clusters import ByCommand
class Mine(ByCommand):
    def manage(self, pid, config, op):
        print(op, pid, flush=True)
distpool.addprocs(Mine(1))
"""
    done, _ = run(code)
    assert done.stdout.splitlines() == ["register 2", "deregister 2", "finalize 2"], done.stderr


def test_C256_the_master_is_killed() -> None:
    code = """
import sys, distpool.calls, os, time
sys.path.insert(0, "tests")
from conformance.clusters import ByCommand, OverStreams
pids = distpool.addprocs(1) + distpool.addprocs(ByCommand(1)) + distpool.addprocs(OverStreams(1))
print(*[distpool.calls.remotecall_fetch(os.getpid, p) for p in pids], flush=True)
futures = [distpool.calls.remotecall(time.sleep, p, 100) for p in pids]
time.sleep(0.3)
os.kill(os.getpid(), 9)
"""
    done, _ = run(code)
    ospids = [int(text) for text in done.stdout.split()]
    assert done.returncode == -9 and len(ospids) == 3
    wait_until(lambda: all(gone(ospid) for ospid in ospids))
