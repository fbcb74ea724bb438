"""A function with much data for 8 hosts, which pass it on to each other, beside sending the data 8 times: `python -m
hosts.broadcast [MB [Mbit/s]]` (as root, in tests/). Not a test. Every cable carries so much and no more: without that
limit it is this machine's processors that are measured, and they have the same work either way."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import threading
import time
from typing import Any

from distpool import ClusterExecutor, WorkerPool, addprocs, remotecall_fetch, rmprocs
from distpool.node import node as nodes
from hosts.launching import OnHosts
from hosts.rig import Rig, sh

ROUNDS = 3
HOSTS = 8
PAUSE = 4.0


def eight_times(pids: list[int], data: Any) -> float:
    """To all of them at once, as an argument of a call."""
    begin = time.perf_counter()
    threads = [threading.Thread(target=remotecall_fetch, args=(len, pid, data)) for pid in pids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


def spread(executor: ClusterExecutor, data: Any) -> float:
    """As what a function has captured, until the last of them begins to run it."""

    def look(seconds: float) -> tuple[str, float, int]:
        begun = time.time()
        time.sleep(seconds)  # so that each takes one
        return platform.node(), begun, len(data)

    begin = time.time()  # all hosts have the same clock
    found = list(executor.map(look, [PAUSE] * HOSTS))
    assert len({name for name, _, _ in found}) == HOSTS
    return max(begun for _, begun, _ in found) - begin


def compare(rig: Rig, size: int, encrypt: bool) -> None:
    import numpy

    pids = addprocs(OnHosts(rig, [host.name for host in rig.hosts], encrypt))
    for pid in pids:
        remotecall_fetch(len, pid, bytes(size // 8))  # connections that have found their speed
    rounds = []
    with ClusterExecutor(WorkerPool(pids)) as executor:
        list(executor.map(time.sleep, [0.1] * HOSTS))
        for _ in range(ROUNDS):
            data = numpy.frombuffer(os.urandom(size), "u1")
            rounds.append((eight_times(pids, data), spread(executor, data)))
    copies = nodes.current().spreading().copies
    direct, passed = (statistics.median(times) for times in zip(*rounds, strict=True))
    name = "tls" if encrypt else "tcp"
    print(f"{name}  {HOSTS} times {direct:6.2f} s   passed on {passed:6.2f} s   {passed / direct:5.2f}", end="")
    print(f"   copies that left the master: {copies}")
    rmprocs(*pids).result(30)


if __name__ == "__main__":
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 30
    rate = float(sys.argv[2]) if len(sys.argv) > 2 else 400
    with Rig(HOSTS) as made:
        for host in made.hosts:
            made.rate(host, rate)
        shape = ("tbf", "rate", f"{rate}mbit", "burst", "64kb", "latency", "200ms")
        for namespace, device in ((made.driver, "eth0"), (made.lan, "p-driver")):
            sh("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shape)
        for encrypted in (False, True):
            made.call("hosts.broadcast:compare", int(megabytes * 1e6), encrypted, seconds=300)
