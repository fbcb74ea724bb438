"""One call to one process: what was handed over travels as it was then."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distpool import Future, addprocs, remotecall, remotecall_fetch, rmprocs
from distpool.node import node as nodes
from distpool.replies import request

np = pytest.importorskip("numpy")


@pytest.fixture
def far() -> Iterator[int]:
    """A worker that shares no memory with this process, as if it were on another host."""
    (pid,) = addprocs(1)
    link = nodes.current().group.members[pid].link
    link.shares_memory = False
    yield pid
    rmprocs(pid).result()


def digest(array: Any) -> str:
    return hashlib.sha256(array).hexdigest()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
@pytest.mark.parametrize(
    "start",
    [lambda pid, array: remotecall(digest, pid, array), lambda pid, array: request(digest, pid, (array,))],
    ids=["remotecall", "request"],
)
def test_arrays_may_change_once_the_call_has_returned(far: int, start: Callable[[int, Any], Future[str]]) -> None:
    ospid = remotecall_fetch(os.getpid, far)
    array = np.arange(4_000_000)  # much more than sockets hold
    before = digest(array)
    os.kill(ospid, signal.SIGSTOP)
    try:
        future = start(far, array)
        array[:] = 0
    finally:
        os.kill(ospid, signal.SIGCONT)
    assert future.result(30) == before


def test_a_call_that_is_waited_for(far: int) -> None:
    array = np.arange(4_000_000)
    assert remotecall_fetch(digest, far, array) == digest(array)
