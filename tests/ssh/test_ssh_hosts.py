"""Who runs on which machine, and what it may use there (CONFORMANCE C283, C284; API section 4)."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

import distpool
from distpool import check_same_host, procs, remotecall_fetch

from .sshd import ADDRESSES, Server

Add = Callable[..., list[int]]
needs_hosts = pytest.mark.skipif(len(ADDRESSES) < 3, reason="needs several loopback addresses")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@needs_hosts
def test_C284_local_and_other_hosts(server: Server, add: Add) -> None:
    local = distpool.addprocs(2)
    one = add([("host1", 2)])
    two = add([("host2", 2)])
    everybody = [1, *local, *one, *two]
    assert procs() == everybody
    assert procs(1) == procs(local[0]) == [1, *local], "through a login is not local, whatever the address"
    assert procs(one[0]) == procs(one[1]) == one
    assert procs(two[0]) == two
    same = {(1,): True, (1, *local): True, (*one,): True, (*two,): True, (): True}
    differ = [(1, one[0]), (local[0], two[1]), (one[0], two[0]), tuple(everybody)]
    for pids, expected in {**same, **dict.fromkeys(differ, False)}.items():
        assert check_same_host(pids) is expected, pids
        assert remotecall_fetch(check_same_host, one[0], list(pids)) is expected
    assert remotecall_fetch(procs, two[0], one[0]) == one and remotecall_fetch(procs, local[1], 1) == [1, *local]
    distpool.rmprocs(one[0])
    assert procs(one[1]) == one[1:]
    for call in (lambda: procs(one[0]), lambda: check_same_host([1, one[0]])):
        with pytest.raises(distpool.ProcessExitedException):
            call()
    for call in (lambda: procs(999_999), lambda: check_same_host([999_999])):
        with pytest.raises(ValueError, match="no process with id 999999 exists"):
            call()


@needs_hosts
def test_C284_by_bind_address(server: Server, add: Add) -> None:
    """Two logins to one machine by different names, with the same bind address."""
    one = add([f"host1 {ADDRESSES[2]}"])
    two = add([f"host2 {ADDRESSES[2]}"])
    assert procs(one[0]) == procs(two[0]) == [*one, *two]
    assert check_same_host([*one, *two])


def test_C283_only_local_workers() -> None:
    pids = distpool.addprocs(2)
    assert procs(1) == procs(pids[0]) == procs() == [1, *pids]
    assert remotecall_fetch(procs, pids[0], pids[1]) == remotecall_fetch(procs, pids[1]) == procs()
    assert check_same_host(procs())
    distpool.rmprocs(pids)


def test_cores_and_gpus_of_each_host(server: Server, add: Add) -> None:
    options = {"affinity": 1} if CORES else {}
    pids = add([("host1", 2)], gpus=["a", "b"], **options)
    if len(ADDRESSES) > 1:
        pids += add([("host2", 2)], gpus=["a", "b"], **options)
    found = [remotecall_fetch(os.getenv, pid, "CUDA_VISIBLE_DEVICES") for pid in pids]
    assert found == ["a", "b"] * (len(pids) // 2), "numbers begin anew on each host"
    if CORES:
        used = [sorted(remotecall_fetch(os.sched_getaffinity, pid, 0)) for pid in pids[:2]]
        assert used == [CORES[:1], CORES[1 % len(CORES) :][:1]]


def test_a_share_that_the_host_has_not(server: Server, add: Add) -> None:
    if not CORES:
        pytest.skip("needs sched_setaffinity")
    with pytest.raises(distpool.CompositeException) as caught:
        add(["host1"], affinity=[[4095]])
    assert "affinity=[4095]: this process may use the cores" in str(caught.value)
    assert distpool.procs() == [1]


def test_memory_limit(server: Server, add: Add) -> None:
    (pid,) = add(["host1"], memory_limit="400MiB")
    with pytest.raises(distpool.RemoteException) as caught:
        remotecall_fetch(lambda: bytearray(1 << 30) and None, pid)
    assert isinstance(caught.value.captured.ex, MemoryError)
    assert remotecall_fetch(lambda: 1, pid) == 1
