"""How long 8 hosts with 4 workers each take to be ready, beside one host with 4: `python -m hosts.readiness [HOSTS
[MILLISECONDS]]` (as root, in tests/). MILLISECONDS: what the way to each host takes, as between sites.

Not a test: the hosts share this machine's processors, so what each of them computes adds up here. How much of it is the
master's is said as well: that is what grows with the number of hosts where each has its own. With a long way to them it
shows that all the waiting is done at once."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any, NamedTuple

import psutil

from distpool import addprocs, rmprocs
from hosts.rig import Rig

ROUNDS = 5
WORKERS = 4


class Took(NamedTuple):
    """Seconds until all are there, and of which processors: the master's, and all of this machine."""

    wall: float
    master: float
    machine: float


def busy() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def ready(rig: Rig, count: int, client: str | None) -> Took:
    machines: list[Any] = [(f"h{number}", WORKERS) for number in range(1, count + 1)]
    begin = time.perf_counter(), time.process_time(), busy()
    pids = addprocs(machines, ssh=client, sshflags=["-F", str(rig.ssh_config)])
    end = time.perf_counter(), time.process_time(), busy()
    assert len(pids) == WORKERS * count
    rmprocs(*pids).result(60)
    return Took(*(after - before for before, after in zip(begin, end, strict=True)))


def compare(rig: Rig, hosts: int, client: str | None) -> None:
    ready(rig, 1, client)  # what is only loaded once
    rounds = [(ready(rig, 1, client), ready(rig, hosts, client)) for _ in range(ROUNDS)]
    one, many = (Took(*map(statistics.median, zip(*took, strict=True))) for took in zip(*rounds, strict=True))
    name = "openssh" if client else "paramiko"
    print(
        f"{name:9} 1 host {one.wall * 1e3:6.0f} ms   {hosts} hosts {many.wall * 1e3:6.0f} ms   "
        f"{many.wall / one.wall:5.2f} times   CPU of the master {one.master * 1e3:.0f}, {many.master * 1e3:.0f} ms; "
        f"of all {one.machine * 1e3:.0f}, {many.machine * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    with Rig(number) as made:
        if len(sys.argv) > 2:
            for host in made.hosts:
                made.slow(host, float(sys.argv[2]), 1000)
        for program in (None, "ssh"):
            made.call("hosts.readiness:compare", number, program, seconds=300)
