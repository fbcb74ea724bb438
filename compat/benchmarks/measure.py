"""CPU time and memory of this process and of its workers, as fine as the system tells.

Workers are the descendants of this process plus the ospids that they told themselves (a zygote's children may have
another parent). ``/proc/*/schedstat`` counts nanoseconds; elsewhere psutil's clock ticks have to do.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable

import psutil

from compat.benchmarks import tasks
from compat.benchmarks.peers import Peer


def worker_pids(known: Iterable[int] = ()) -> set[int]:
    """The ospids of every descendant, and of the known workers."""
    children = {process.pid for process in psutil.Process().children(recursive=True)}
    return (children | set(known)) - {os.getpid()}


def cpu_seconds(pid: int) -> float:
    """CPU seconds used so far by all threads of a process; 0 if it is gone."""
    try:
        total = 0
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                total += int(file.read().split()[0])
        return total / 1e9
    except OSError:
        pass
    try:
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    except psutil.Error:
        return 0.0


class Meter:
    """Elapsed time and CPU between ``with`` and its end: ``wall``, ``parent``, ``workers``, in seconds."""

    def __init__(self, workers: Iterable[int]) -> None:
        self.pids = set(workers)

    def __enter__(self) -> Meter:
        self._before = {pid: cpu_seconds(pid) for pid in self.pids}
        self._cpu = time.process_time()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._start
        self.parent = time.process_time() - self._cpu
        self.workers = sum(max(0.0, cpu_seconds(pid) - before) for pid, before in self._before.items())


def meet(peer: Peer, workers: int) -> set[int]:
    """Make sure that every worker runs; return the ospids of all processes that belong to the peer."""
    with tempfile.TemporaryDirectory() as directory:
        told = peer.all(tasks.rendezvous, [(directory, workers, index) for index in range(workers)])
    return worker_pids(told)


def rss(pid: int | None = None) -> int:
    """Resident bytes of a process."""
    return int(psutil.Process(pid).memory_info().rss)


def uss(pid: int) -> int:
    """Bytes that only this process holds."""
    return int(psutil.Process(pid).memory_full_info().uss)
