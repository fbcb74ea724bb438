"""How long 8 hosts with 4 workers each take to be ready, beside one host with 4: `python -m hosts.readiness` (as root,
in tests/). Not a test: the hosts share this machine's processors, so what each of them computes adds up here."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from distpool import addprocs, rmprocs
from hosts.rig import Rig

ROUNDS = 5
WORKERS = 4


def ready(rig: Rig, count: int, client: str | None) -> float:
    machines: list[Any] = [(f"h{number}", WORKERS) for number in range(1, count + 1)]
    begin = time.perf_counter()
    pids = addprocs(machines, ssh=client, sshflags=["-F", str(rig.ssh_config)])
    found = time.perf_counter() - begin
    assert len(pids) == WORKERS * count
    rmprocs(*pids).result(60)
    return found


def compare(rig: Rig, hosts: int, client: str | None) -> None:
    ready(rig, 1, client)  # what is only loaded once
    rounds = [(ready(rig, 1, client), ready(rig, hosts, client)) for _ in range(ROUNDS)]
    one, many = (statistics.median(times) for times in zip(*rounds, strict=True))
    name = "openssh" if client else "paramiko"
    print(f"{name:9} 1 host {one * 1e3:6.0f} ms   {hosts} hosts {many * 1e3:6.0f} ms   {many / one:5.2f} times")


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    with Rig(number) as made:
        for program in (None, "ssh"):
            made.call("hosts.readiness:compare", number, program, seconds=300)
