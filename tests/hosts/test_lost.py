"""Hosts that vanish, and hosts that only look as if they had. `DISTPOOL_SILENT_SECONDS` is a few seconds here."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import signal
import threading
import time
from typing import Any

import pytest

from distpool import (
    ProcessExitedException,
    RemoteException,
    WorkerPool,
    addprocs,
    pmap,
    procs,
    remotecall,
    remotecall_fetch,
    workers,
)
from hosts.launching import OnHosts
from hosts.rig import Rig, until

encrypted = pytest.mark.parametrize("encrypt", [True, False], ids=["tls", "tcp"])


def run(rig: Rig, name: str, *arguments: Any, silent: float = 3, seconds: float = 45) -> None:
    """One of the functions below, in the driver; it and its workers take a host for lost after `silent` seconds."""
    rig.call(f"hosts.test_lost:{name}", *arguments, seconds=seconds, env={"DISTPOOL_SILENT_SECONDS": str(silent)})


def add(rig: Rig, names: list[str], encrypt: bool = True) -> list[int]:
    name = "DISTPOOL_SILENT_SECONDS"
    return addprocs(OnHosts(rig, names, encrypt, env={name: os.environ[name]}))


def workers_of(rig: Rig, name: str) -> int:
    """Workers that run there."""
    return rig[name].run("ps", "-ef").stdout.count("from distpool.standalone import serve")


# ------------------------------------------------------------------------------------------------ hosts that vanish


@pytest.mark.slow
@encrypted
@pytest.mark.parametrize("busy", ["idle", "much under way"])
def test_the_cable_is_pulled(rig: Rig, encrypt: bool, busy: str) -> None:
    run(rig, "the_cable_is_pulled", encrypt, busy)


def the_cable_is_pulled(rig: Rig, encrypt: bool, busy: str) -> None:
    one, other = add(rig, ["h1", "h2"], encrypt)
    calls = [remotecall(time.sleep, one, 600)]
    assert remotecall_fetch(platform.node, one) == "h1"
    if busy == "much under way":
        rig.rate(rig["h1"], 50)
        calls.append(remotecall(len, one, bytes(50_000_000)))
    rig.cut(rig["h1"])
    begin = time.monotonic()
    for call in calls:
        with pytest.raises(ProcessExitedException) as caught:
            call.result(30)
        assert caught.value.worker_id == one
        # Or, as its process is in truth on this machine: what it exits with when it has lost its master.
        assert "does not answer" in str(caught.value) or "exit code 1" in str(caught.value)
    assert time.monotonic() - begin < 9
    assert workers() == [other] and remotecall_fetch(platform.node, other) == "h2"
    with pytest.raises(ProcessExitedException):
        remotecall_fetch(platform.node, one)
    until(lambda: workers_of(rig, "h1") == 0, "the worker's end, which has lost its master")


@pytest.mark.slow
def test_the_cable_is_pulled_with_nothing_set(rig: Rig) -> None:
    """As users have it: twenty seconds, no variable set."""
    rig.call("hosts.test_lost:the_cable_is_pulled_with_nothing_set", seconds=60)


def the_cable_is_pulled_with_nothing_set(rig: Rig) -> None:
    assert "DISTPOOL_SILENT_SECONDS" not in os.environ
    one, other = addprocs(OnHosts(rig, ["h1", "h2"]))
    call = remotecall(time.sleep, one, 600)
    assert remotecall_fetch(platform.node, one) == "h1"
    rig.cut(rig["h1"])
    begin = time.monotonic()
    with pytest.raises(ProcessExitedException) as caught:
        call.result(35)
    assert caught.value.worker_id == one and 10 < time.monotonic() - begin < 30
    assert workers() == [other] and remotecall_fetch(platform.node, other) == "h2"


@encrypted
@pytest.mark.leaves_processes("the host is started again")
def test_a_host_that_crashes_is_missed_at_once(rig: Rig, encrypt: bool) -> None:
    """Its kernel lives long enough to reset the connections."""
    run(rig, "a_host_that_crashes_is_missed_at_once", encrypt, silent=20)


def a_host_that_crashes_is_missed_at_once(rig: Rig, encrypt: bool) -> None:
    one, other = add(rig, ["h1", "h2"], encrypt)
    call = remotecall(time.sleep, one, 600)
    assert remotecall_fetch(remotecall_fetch, other, platform.node, one) == "h1"
    begin = time.monotonic()
    rig.crash(rig["h1"])
    with pytest.raises(ProcessExitedException):
        call.result(20)
    assert time.monotonic() - begin < 5
    with pytest.raises(RemoteException) as caught:
        remotecall_fetch(remotecall_fetch, other, platform.node, one)
    assert isinstance(caught.value.captured.ex, ProcessExitedException)


@pytest.mark.slow
def test_a_map_goes_on_without_the_lost_host(rig: Rig) -> None:
    run(rig, "a_map_goes_on_without_the_lost_host")


def a_map_goes_on_without_the_lost_host(rig: Rig) -> None:
    pids = add(rig, ["h1", "h2", "h3", "h4"])
    begun = threading.Event()

    def watch() -> None:
        begun.wait(20)
        rig.cut(rig["h2"])

    thread = threading.Thread(target=watch)
    thread.start()

    def inputs() -> Any:
        for number in range(200):
            if number == 60:
                begun.set()
            yield number

    found = pmap(slow_square, inputs(), pool=WorkerPool(pids), retry_delays=[0.1] * 3)
    thread.join()
    assert found == [number * number for number in range(200)]
    assert len(workers()) == 3


def slow_square(number: int) -> int:
    time.sleep(0.02)
    return number * number


@pytest.mark.slow
@encrypted
def test_two_workers_lose_each_other(rig: Rig, encrypt: bool) -> None:
    run(rig, "two_workers_lose_each_other", encrypt)


def two_workers_lose_each_other(rig: Rig, encrypt: bool) -> None:
    """Calls between them fail with an error that says so, calls through the master go on; then they meet again."""
    one, other = add(rig, ["h1", "h2"], encrypt)
    assert remotecall_fetch(remotecall_fetch, one, platform.node, other) == "h2"
    waiting = remotecall(remotecall_fetch, one, time.sleep, other, 600)
    assert remotecall_fetch(remotecall_fetch, one, platform.node, other) == "h2"
    rig.partition(rig["h1"], rig["h2"])
    begin = time.monotonic()
    with pytest.raises(RemoteException) as caught:
        waiting.result(30)
    assert time.monotonic() - begin < 12
    assert "process 3" in str(caught.value) or "worker 3" in str(caught.value)
    with pytest.raises(RemoteException, match="cannot be connected"):
        remotecall_fetch(remotecall_fetch, one, platform.node, other)
    assert [remotecall_fetch(platform.node, pid) for pid in (one, other)] == ["h1", "h2"]
    assert remotecall_fetch(through_master, one, other) == "h2"
    rig.unfilter()
    time.sleep(1.1)  # for that long a failure is not tried again
    assert remotecall_fetch(remotecall_fetch, one, platform.node, other) == "h2"
    assert remotecall_fetch(remotecall_fetch, other, platform.node, one) == "h1"


def through_master(pid: int) -> str:
    return remotecall_fetch(remotecall_fetch, 1, platform.node, pid)


def test_a_host_that_comes_back_late(rig: Rig) -> None:
    run(rig, "a_host_that_comes_back_late")


def a_host_that_comes_back_late(rig: Rig) -> None:
    """It stays lost; new workers can be started there."""
    (one,) = add(rig, ["h1"])
    rig.cut(rig["h1"])
    until(lambda: procs() == [1], "the loss")
    rig.heal(rig["h1"])
    until(lambda: workers_of(rig, "h1") == 0, "the end of the old worker")
    (again,) = add(rig, ["h1"])
    assert again != one and remotecall_fetch(platform.node, again) == "h1"


# ------------------------------------------------------------------------------------------- hosts that are not lost


@pytest.mark.slow
@encrypted
def test_a_short_interruption(rig: Rig, encrypt: bool) -> None:
    run(rig, "a_short_interruption", encrypt, silent=8)


def a_short_interruption(rig: Rig, encrypt: bool) -> None:
    one, other = add(rig, ["h1", "h2"], encrypt)
    data = os.urandom(5_000_000)
    rig.rate(rig["h1"], 50)
    calls = [remotecall(digest, one, data) for _ in range(4)]
    rig.cut(rig["h1"])
    time.sleep(2)
    rig.heal(rig["h1"])
    assert [call.result(30) for call in calls] == [digest(data)] * 4
    assert workers() == [one, other]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("encrypt, fault", [(True, "10 Mbit/s and 50 ms"), (False, "one packet of 20 is lost")])
def test_bad_networks_lose_nothing(rig: Rig, encrypt: bool, fault: str) -> None:
    if fault.startswith("10") and not os.path.exists("/dev/net/tun"):
        pytest.skip("a slow cable needs /dev/net/tun")
    run(rig, "bad_networks_lose_nothing", encrypt, fault, silent=6)


def bad_networks_lose_nothing(rig: Rig, encrypt: bool, fault: str) -> None:
    pids = add(rig, ["h1", "h2"], encrypt)
    if fault.startswith("10"):
        rig.slow(rig["h1"], 25, 10)
    else:
        rig.drop(rig["h1"], 5)
    assert remotecall_fetch(remotecall_fetch, pids[1], platform.node, pids[0]) == "h1"
    data = os.urandom(2_000_000)
    calls = [remotecall(digest, pids[0], data) for _ in range(2)]
    assert [remotecall_fetch(pow, pids[0], number, 2) for number in range(10)] == [n * n for n in range(10)]
    assert [call.result(40) for call in calls] == [digest(data)] * 2
    assert workers() == pids


@pytest.mark.slow
@pytest.mark.parametrize("encrypt, busy", [(False, "idle"), (True, "much under way")])
def test_a_stopped_worker_is_not_dead(rig: Rig, encrypt: bool, busy: str) -> None:
    run(rig, "a_stopped_worker_is_not_dead", encrypt, busy, silent=2)


def a_stopped_worker_is_not_dead(rig: Rig, encrypt: bool, busy: str) -> None:
    """For three times as long as a silent host would be given; its kernel answers."""
    (one,) = add(rig, ["h1"], encrypt)
    ospid = remotecall_fetch(os.getpid, one)
    rig["h1"].run("kill", f"-{signal.SIGSTOP.value}", ospid)
    size = 100_000_000 if busy == "much under way" else 1
    call = remotecall(len, one, bytes(size))
    time.sleep(6)
    assert workers() == [one] and not call.done()
    rig["h1"].run("kill", f"-{signal.SIGCONT.value}", ospid)
    assert call.result(30) == size
    assert remotecall_fetch(platform.node, one) == "h1"


@pytest.mark.slow
@pytest.mark.parametrize("encrypt, busy", [(True, "idle"), (False, "much under way")])
def test_a_worker_that_holds_its_interpreter_is_not_dead(rig: Rig, encrypt: bool, busy: str) -> None:
    run(rig, "a_worker_that_holds_its_interpreter_is_not_dead", encrypt, busy, silent=2)


def a_worker_that_holds_its_interpreter_is_not_dead(rig: Rig, encrypt: bool, busy: str) -> None:
    (one,) = add(rig, ["h1"], encrypt)
    held = remotecall(hold_interpreter, one, 6)
    size = 100_000_000 if busy == "much under way" else 1
    call = remotecall(len, one, bytes(size))
    assert held.result(30) is None and call.result(30) == size
    assert workers() == [one]


def hold_interpreter(seconds: int) -> None:
    ctypes.PyDLL(None).sleep(seconds)  # a PyDLL keeps the lock of the interpreter while it is in C
