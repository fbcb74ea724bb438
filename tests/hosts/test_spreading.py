"""A big function for many hosts: the workers pass it on to each other."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from typing import Any

import pytest

from distpool import ClusterExecutor, WorkerPool, addprocs, remotecall_fetch
from distpool.node import node as nodes
from hosts.launching import OnHosts
from hosts.rig import Rig

np = pytest.importorskip("numpy")


def digests(executor: Any, data: Any, count: int) -> set[tuple[str, str]]:
    """What each of the workers has got, while all of them are busy at once."""

    def look(number: int) -> tuple[str, str]:
        found = hashlib.sha256(data).hexdigest()
        time.sleep(0.3)  # so that each takes one
        return platform.node(), found

    return set(executor.map(look, range(count)))


@pytest.mark.slow
@pytest.mark.parametrize("encrypt", [True, False], ids=["tls", "tcp"])
def test_it_leaves_the_master_twice_at_most(rig: Rig, encrypt: bool) -> None:
    rig.call("hosts.test_spreading:it_leaves_the_master_twice_at_most", encrypt)


def it_leaves_the_master_twice_at_most(rig: Rig, encrypt: bool) -> None:
    pids = addprocs(OnHosts(rig, ["h1", "h2", "h3", "h4"] * 2, encrypt))
    for pid in pids:
        remotecall_fetch(os.getpid, pid)
    data = np.frombuffer(os.urandom(20_000_000), "u1")
    with ClusterExecutor(WorkerPool(pids)) as executor:
        list(executor.map(time.sleep, [0.1] * 8))
        found = digests(executor, data, 16)
    assert found == {(name, hashlib.sha256(data).hexdigest()) for name in ("h1", "h2", "h3", "h4")}
    assert 1 <= nodes.current().spreading().copies <= 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "refuse"])
def test_who_gets_nothing_asks_the_master(rig: Rig, fault: str) -> None:
    rig.call("hosts.test_spreading:who_gets_nothing_asks_the_master", fault, env={"DISTPOOL_SILENT_SECONDS": "4"})


def who_gets_nothing_asks_the_master(rig: Rig, fault: str) -> None:
    """The first two, who are to pass it on, cannot."""
    pids = addprocs(OnHosts(rig, ["h1", "h2", "h3", "h4"], env={"DISTPOOL_SILENT_SECONDS": "4"}))
    if fault == "refuse":
        for host in rig.hosts:
            rig.refuse(host)  # no links between workers
    else:
        for one in rig.hosts[:2]:
            for other in rig.hosts[2:]:
                rig.partition(one, other)
    data = np.frombuffer(os.urandom(3_000_000), "u1")
    with ClusterExecutor(WorkerPool(pids)) as executor:
        found = digests(executor, data, 8)
    assert {digest for _, digest in found} == {hashlib.sha256(data).hexdigest()}
