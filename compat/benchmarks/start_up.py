"""W1: what a short program pays."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

from compat._proc import ROOT
from compat.benchmarks.peers import PEERS


def import_seconds(statement: str, repetitions: int) -> float:
    """The smallest time that ``statement`` takes in a fresh interpreter (the smallest: noise only adds)."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    times = []
    for _ in range(repetitions):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=environment()
        )
        times.append(float(done.stdout.split()[-1]))
    return min(times)


PROGRAM = """
import os, sys, time
from compat.benchmarks import tasks
from compat.benchmarks.peers import PEERS

def main():
    name, workers, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    began = time.perf_counter()
    peer = PEERS[name]()
    peer.open(workers)
    told = peer.all(tasks.rendezvous, [(directory, workers, index) for index in range(workers)])
    ready = time.perf_counter()
    peer.close()
    ended = time.perf_counter()
    if len(set(told)) != workers or os.getpid() in told:
        raise AssertionError(f"{len(set(told))} of {workers} workers answered")
    print("W1", (ended - began) * 1e3, (ready - began) * 1e3, (ended - ready) * 1e3)

if __name__ == "__main__":
    main()
"""
"""A program that has loaded next to nothing (os, typing) when its clock starts, as a user's has when it imports us. In
the process of a cell half of what `concurrent.futures` needs is there already, which made it look twice as quick."""


def environment() -> dict[str, str]:
    """This process's, so that the program finds the same modules, and bytecode is cached as it is for any user."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (str(ROOT), *sys.path) if path)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return env


def w1(peer_name: str, workers: int, params: dict[str, Any]) -> dict[str, Any]:
    """Import, start, first result of every worker, stop, in programs of their own: the middle one of several."""
    looks: list[tuple[float, ...]] = []
    while not looks or (len(looks) < params["starts"] and sum(look[0] for look in looks) < 1e3):
        looks.append(start(peer_name, workers))
    looks.sort()
    answer = dict(zip(("ms", "ready_ms", "stop_ms"), looks[len(looks) // 2], strict=True))
    module = PEERS[peer_name]().module
    stdlib = module in ("multiprocessing", "concurrent.futures")
    statement = "import concurrent.futures.process" if stdlib else f"import {module}"
    answer["import_ms"] = import_seconds(statement, params["imports"]) * 1e3
    return answer


def start(peer_name: str, workers: int) -> tuple[float, ...]:
    """Milliseconds of one program: all of it, until every worker has answered, and from then on."""
    with tempfile.TemporaryDirectory() as directory:
        script = os.path.join(directory, "program.py")
        with open(script, "w", encoding="ascii") as file:
            file.write(PROGRAM)
        meeting = os.path.join(directory, "meeting")
        os.mkdir(meeting)
        done = subprocess.run(
            [sys.executable, script, peer_name, str(workers), meeting],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment(),
        )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("W1 ")]
    if done.returncode or not lines:
        raise AssertionError(done.stderr[-2000:])
    return tuple(map(float, lines[-1][1:]))


WORKLOADS = {"W1": w1}
