"""Workers through SSH, with both clients (CONFORMANCE 2.14)."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

import distpool
from distpool import remotecall_fetch

from .sshd import Server

Add = Callable[..., list[int]]


def test_a_worker_comes_up_and_computes(server: Server, add: Add) -> None:
    before = server.logins()
    (pid,) = add(["host1"])
    assert distpool.workers() == [pid]
    assert remotecall_fetch(lambda a: a + 1, pid, 41) == 42
    big = os.urandom(3 << 20)
    assert remotecall_fetch(lambda data: data[::-1], pid, big) == big[::-1]
    with pytest.raises(distpool.RemoteException) as info:
        remotecall_fetch(lambda: 1 / 0, pid)
    assert isinstance(info.value.captured.ex, ZeroDivisionError)
    assert server.logins() == before + 1
    distpool.rmprocs(pid)
    assert distpool.procs() == [1]
