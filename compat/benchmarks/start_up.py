"""W1: what a short program pays. Kept apart so that nothing heavy is imported before the clock starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from compat.benchmarks import tasks
from compat.benchmarks.peers import PEERS


def import_seconds(statement: str, repetitions: int) -> float:
    """The smallest time that ``statement`` takes in a fresh interpreter (the smallest: noise only adds)."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    times = []
    for _ in range(repetitions):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        times.append(float(done.stdout.split()[-1]))
    return min(times)


def w1(peer_name: str, workers: int, params: dict[str, Any]) -> dict[str, Any]:
    """Import, start, first result of every worker, stop."""
    with tempfile.TemporaryDirectory() as directory:
        peer = PEERS[peer_name]()
        began = time.perf_counter()
        peer.open(workers)
        told = peer.all(tasks.rendezvous, [(directory, workers, index) for index in range(workers)])
        ready = time.perf_counter()
        peer.close()
        ended = time.perf_counter()
    if len(set(told)) != workers or os.getpid() in told:
        raise AssertionError(f"{len(set(told))} of {workers} workers answered")
    answer = {"ms": (ended - began) * 1e3, "ready_ms": (ready - began) * 1e3, "stop_ms": (ended - ready) * 1e3}
    if peer.module not in ("multiprocessing", "concurrent.futures"):
        answer["import_ms"] = import_seconds(f"import {peer.module}", params["imports"]) * 1e3
    else:
        answer["import_ms"] = import_seconds("import concurrent.futures.process", params["imports"]) * 1e3
    return answer


WORKLOADS = {"W1": w1}
