"""Workers for the conformance cases: four, made once per module (each test process has its own)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import pytest

import distpool

from .transports import CUSTOM, KINDS, add

# What CI may leave out on a second Python: these workers differ from the others in how bytes reach them.
REACHED = [pytest.param(kind, marks=pytest.mark.custom_transport if kind in CUSTOM else ()) for kind in KINDS]


@pytest.fixture(scope="module", params=REACHED)
def kind(request: pytest.FixtureRequest) -> str:
    """How the workers are reached: every case that uses it, or `w`, runs over each transport."""
    return str(request.param)


@pytest.fixture
def scale(kind: str) -> float:
    """What part of a big message to send: a byte at a time takes 10,000 times as long."""
    return 0.005 if kind == "bytes" else 1.0


@pytest.fixture(scope="module")
def w(kind: str) -> Iterator[list[int]]:
    """Pids of four workers, reached in every way that there is."""
    yield add(kind, 4)
    distpool.rmprocs(distpool.workers())


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
