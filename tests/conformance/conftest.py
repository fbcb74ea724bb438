"""Workers for the conformance cases: four, made once per module (each test process has its own)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import pytest

import distpool


@pytest.fixture(scope="module")
def w() -> Iterator[list[int]]:
    """Pids of four workers. Reads `distpool.workers()` of an executor's group, so nothing but calls is needed."""
    executor = distpool.ClusterExecutor(4)
    wait_until(lambda: executor.submit(abs, 1).result(60) == 1 and len(executor.workers) == 4, 60)
    yield executor.workers
    executor.shutdown()


def wait_until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    """Poll until `holds()`: the cases say "within 10 s", and distributed collection has no event to wait for."""
    deadline = time.monotonic() + seconds
    while not holds():
        gc.collect()
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def team() -> Iterator[list[int]]:
    """Pids of four workers of `addprocs`: those of the default pool."""
    pids = distpool.addprocs(4)
    yield pids
    distpool.rmprocs(distpool.workers())
