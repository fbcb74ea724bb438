"""Sender and receiver of shared segments in one process, for the tests of what is between them; and processes of their
own, for what is to be tested from the beginning."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distpool.transport.shm import Lease, SegmentPool, SegmentViews

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd and /proc")


class Side:
    """A pool and a receiver joined by a list of released segments, as a link would join them."""

    def __init__(self, pool: SegmentPool) -> None:
        self.pool = pool
        self.released: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.views = SegmentViews(self.released.put)

    def view(self, lease: Lease) -> memoryview:
        return self.views.view(lease.segment_id, lease.path, lease.size, lease.nbytes)

    def send(self, buffer: Any) -> memoryview:
        lease = self.pool.put(buffer)
        assert lease is not None
        self.leases = [*getattr(self, "leases", []), lease]
        return self.view(lease)

    def ended(self) -> list[int]:
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self.released.get_nowait())
        return found


def placed(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


def data_of(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def run(code: str, *arguments: object) -> str:
    """Run code in another process; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def a_pool(kind: str, directory: Path) -> Iterator[SegmentPool]:
    """A pool on memfds ("memory"), or on named files ("named")."""
    if kind == "memory" and not hasattr(os, "memfd_create"):
        pytest.skip("no memfd here")
    made = SegmentPool(str(directory), limit=64 << 20, memfd=kind == "memory")
    yield made
    made.close()


@contextlib.contextmanager
def joined(kind: str, directory: Path) -> Iterator[Side]:
    """Such a pool, and who receives from it."""
    with a_pool(kind, directory) as pool:
        made = Side(pool)
        yield made
        made.views.close()


def fresh(source: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run this program in an interpreter of its own, to its end."""
    command = [sys.executable, "-c", source]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})
