"""Links through the login (CONFORMANCE C223, C229, C230)."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import distpool
from distpool import remotecall, remotecall_fetch, rmprocs
from distpool.managers.ssh_login import HostLogin

from .sshd import ADDRESSES, Server, options
from .test_ssh import listening, sessions, wait_until

Add = Callable[..., list[int]]


def check_works(pids: list[int]) -> None:
    for pid in pids:
        assert remotecall_fetch(distpool.myid, pid) == pid
        big = os.urandom(5 << 20)
        assert remotecall_fetch(lambda data: data[::-1], pid, big) == big[::-1]


def peers_of(pid: int) -> set[tuple[str, int]]:
    """Who is connected to a worker's listener, by address and port: itself, where the login connects it."""

    def here() -> set[tuple[str, int]]:
        import psutil

        connections = psutil.Process().net_connections("tcp")
        return {tuple(each.raddr) for each in connections if each.status == psutil.CONN_ESTABLISHED}

    return remotecall_fetch(here, pid)


def mine() -> set[tuple[str, int]]:
    """Addresses of this process's own connections."""
    return {tuple(each.laddr) for each in psutil.Process().net_connections("tcp") if each.laddr}


@pytest.mark.parametrize("multiplex", [False, True])
def test_C223_through_the_login(server: Server, add: Add, multiplex: bool) -> None:
    before = server.logins()
    pids = add([("host1", 3)], tunnel=True, multiplex=multiplex)
    check_works(pids)
    assert {listening(pid)[0] for pid in pids} == {"127.0.0.1"}
    assert not any(peers_of(pid) & mine() for pid in pids), "sshd has connected to them, not we"
    assert server.logins() == before + 1
    rmprocs(pids)
    wait_until(lambda: not sessions(server))
    check_works(add(["host1"], tunnel=True, multiplex=multiplex))


def test_C229_a_tunnel_needs_no_port_of_the_master(server: Server, add: Add) -> None:
    """So none has to be found: each link goes through the login's own connection."""
    ports = listeners()
    pids = add([("host1", 2), "host2"], tunnel=True)
    check_works(pids)
    assert listeners() == ports


def listeners() -> set[tuple[str, int]]:
    """Where this process, and the clients that it has started, listen."""
    found = set()
    for process in (psutil.Process(), *psutil.Process().children()):
        if process.pid == os.getpid() or process.name() == "ssh":
            connections = process.net_connections("tcp")
            found |= {tuple(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def test_workers_of_one_host_reach_each_other(server: Server, add: Add) -> None:
    pids = add([("host1", 2)], tunnel=True)
    assert remotecall_fetch(remotecall_fetch, pids[0], distpool.myid, pids[1]) == pids[1]
    assert remotecall_fetch(remotecall_fetch, pids[1], distpool.myid, pids[0]) == pids[0]


def test_a_lost_login_is_the_end_of_its_workers(server: Server, add: Add) -> None:
    pids = add([("host1", 2)], tunnel=True)
    waiting = [remotecall(time.sleep, pid, 60) for pid in pids]
    for process in psutil.Process(server.process.pid).children():
        process.kill()
    for call in waiting:
        with pytest.raises(distpool.ProcessExitedException):
            call.result(20)
    wait_until(lambda: distpool.procs() == [1])
    check_works(add(["host1"], tunnel=True))


def test_auto_goes_directly_where_it_can(server: Server, add: Add) -> None:
    pids = add([("host1", 2)], tunnel="auto")
    check_works(pids)
    assert all(peers_of(pid) & mine() for pid in pids)


@pytest.mark.parametrize("encrypt", [None, True])
def test_auto_takes_the_login_where_ports_are_closed(
    server: Server, add: Add, monkeypatch: pytest.MonkeyPatch, encrypt: Any
) -> None:
    asked: list[int] = []

    def closed(self: HostLogin, host: str, port: int, seconds: float) -> bool:
        asked.append(port)
        return False

    monkeypatch.setattr(HostLogin, "reachable", closed)
    pids = add([("host1", 2)], tunnel="auto", encrypt=encrypt)
    check_works(pids)
    assert not any(peers_of(pid) & mine() for pid in pids) and len(asked) == 2


def test_the_first_worker_shows_what_can_be_reached() -> None:
    login = HostLogin("h", *[None] * 6)  # type: ignore[arg-type]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert not login.reachable("127.0.0.1", port, 1.0), "nobody listens"
        listener.listen()
        assert not login.reachable("127.0.0.1", port, 1.0), "not tried again: a black hole costs seconds"
        login.direct = None
        assert login.reachable("127.0.0.1", port, 1.0)


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "sshd", "AllowTcpForwarding no")
    yield running
    running.stop()


def test_an_sshd_that_forwards_nothing(strict: Server, ssh: Any) -> None:
    with pytest.raises(distpool.CompositeException) as info:
        distpool.addprocs(["host1"], tunnel=True, **options(strict, ssh, timeout=20))
    (error,) = info.value.exceptions
    assert isinstance(error, distpool.LaunchWorkerError) and error.host == "host1"
    assert "AllowTcpForwarding" in str(error) or "forward" in str(error), str(error)
    assert distpool.procs() == [1]
    wait_until(lambda: not sessions(strict))
    (pid,) = distpool.addprocs(["host1"], tunnel="auto", **options(strict, ssh))
    rmprocs(pid)


def test_C230_max_parallel(server: Server, ssh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if len(ADDRESSES) < 3:
        pytest.skip("needs several loopback addresses (Linux)")
    lock = threading.Lock()
    running, most = 0, 0
    start, settle = HostLogin._start, HostLogin._settle

    def counted(self: HostLogin) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        start(self)

    def settled(self: HostLogin, *arguments: Any) -> None:
        nonlocal running
        with lock:
            running -= not self._settled
        settle(self, *arguments)

    monkeypatch.setattr(HostLogin, "_start", counted)
    monkeypatch.setattr(HostLogin, "_settle", settled)
    machines = [f"host{number}{port}" for number in (1, 2, 3) for port in ("", f":{server.port}")]
    pids = distpool.addprocs(machines, **options(server, ssh, max_parallel=2))
    assert len(pids) == 6 and most == 2
    rmprocs(pids)
