"""Logins to hosts with addresses of their own: firewalls, jump hosts, hosts that vanish; with both clients."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import pytest

import distpool
from distpool import CompositeException, LaunchWorkerError, addprocs, remotecall, remotecall_fetch, rmprocs
from hosts.rig import Rig, until
from hosts.test_over_ssh import add, by_name, clients, streams


@clients
@pytest.mark.parametrize("fault", ["refuse", "black_hole"])
def test_auto(rig: Rig, client: str | None, fault: str) -> None:
    rig.call("hosts.test_logins:auto", client, fault)


def auto(rig: Rig, client: str | None, fault: str) -> None:
    """Closed ports: through the login; open ones: directly."""
    getattr(rig, fault)(rig["h1"])
    begin = time.monotonic()
    pids = by_name(add(rig, client, [("h1", 2), "h2"], tunnel="auto"))
    assert time.monotonic() - begin < 15
    node = distpool.node.node.existing()  # type: ignore[attr-defined]
    assert [node.group.members[pid].tunnelled for pid in pids] == [True, True, False]
    assert streams(pids) == ["TlsStream"] * 3, "the listener wants encrypted links, whichever way they come"
    big = os.urandom(5 << 20)
    for pid in pids:
        assert remotecall_fetch(lambda data: data[::-1], pid, big) == big[::-1]
    # h1 lets nobody in, but its workers reach others.
    assert remotecall_fetch(remotecall_fetch, pids[2], platform.node, pids[0]) == "h1"
    assert remotecall_fetch(remotecall_fetch, pids[0], platform.node, pids[2]) == "h2"


@clients
@pytest.mark.parametrize("fault", ["refuse", "black_hole"])
def test_closed_ports_without_a_tunnel(rig: Rig, client: str | None, fault: str) -> None:
    rig.call("hosts.test_logins:closed_ports_without_a_tunnel", client, fault)


def closed_ports_without_a_tunnel(rig: Rig, client: str | None, fault: str) -> None:
    getattr(rig, fault)(rig["h1"])
    begin = time.monotonic()
    with pytest.raises(CompositeException) as caught:
        add(rig, client, ["h1", "h2"], timeout=5)
    assert time.monotonic() - begin < 15
    (error,) = caught.value.exceptions
    assert isinstance(error, LaunchWorkerError) and error.host == "h1"
    for part in ("listens on 10.199.0.11 port", "cannot be reached from here", "tunnel=True or 'auto'"):
        assert part in str(error), str(error)
    assert [remotecall_fetch(platform.node, pid) for pid in distpool.workers()] == ["h2"]
    until(lambda: "-m distpool" not in rig["h1"].run("ps", "-ef").stdout, "the end of what was started there")


@clients
def test_a_jump_host(rig: Rig, client: str | None) -> None:
    rig.call("hosts.test_logins:a_jump_host", client)


def a_jump_host(rig: Rig, client: str | None) -> None:
    """h1 can be reached from h4 only, and h1's name is known there only."""
    rig._rule(rig["h1"], "in", "ip", "saddr", "10.199.0.10", "drop")
    config = rig.base / "jump"
    config.write_text(f"Host h1\n  ProxyJump h4\n{rig.ssh_config.read_text()}")
    flags: dict[str, Any] = {"ssh": client, "sshflags": ["-F", str(config)]}
    for tunnel in (True, "auto"):
        pids = addprocs([("h1", 2)], tunnel=tunnel, **flags)
        assert [remotecall_fetch(platform.node, pid) for pid in pids] == ["h1"] * 2
        rmprocs(pids)


@clients
@pytest.mark.leaves_processes("the host is started again")
def test_hosts_that_are_not_there(rig: Rig, client: str | None) -> None:
    rig.crash(rig["h2"])
    rig.call("hosts.test_logins:hosts_that_are_not_there", client)


def hosts_that_are_not_there(rig: Rig, client: str | None) -> None:
    rig.cut(rig["h1"])
    begin = time.monotonic()
    with pytest.raises(CompositeException) as caught:
        add(rig, client, ["h1", "h2", ("h3", 2), "10.199.0.99"], timeout=6)
    assert time.monotonic() - begin < 14
    assert sorted(error.host for error in caught.value.exceptions) == ["10.199.0.99", "h1", "h2"]
    for error in caught.value.exceptions:
        expected = {"h1": ("no answer", "no way", "No route"), "h2": ("refused",)}
        words = expected.get(error.host, ("no answer", "no way", "No route"))
        assert any(word in str(error) for word in words), str(error)
    assert [remotecall_fetch(platform.node, pid) for pid in distpool.workers()] == ["h3"] * 2


@clients
@pytest.mark.parametrize("tunnel", [True, False])
def test_a_host_vanishes_behind_its_login(rig: Rig, client: str | None, tunnel: bool) -> None:
    env = {"DISTPOOL_SILENT_SECONDS": "3"}
    rig.call("hosts.test_logins:a_host_vanishes_behind_its_login", client, tunnel, env=env, seconds=50)


def a_host_vanishes_behind_its_login(rig: Rig, client: str | None, tunnel: bool) -> None:
    one, other = by_name(add(rig, client, ["h1", "h2"], tunnel=tunnel))
    waiting = remotecall(time.sleep, one, 600)
    rig.cut(rig["h1"])
    begin = time.monotonic()
    with pytest.raises(distpool.ProcessExitedException):
        waiting.result(30)
    assert time.monotonic() - begin < 10
    assert distpool.workers() == [other] and remotecall_fetch(platform.node, other) == "h2"
    begin = time.monotonic()
    rmprocs(distpool.workers())
    assert time.monotonic() - begin < 10, "the lost login holds nothing up"
    rig.heal(rig["h1"])
    until(lambda: "-m distpool" not in rig["h1"].run("ps", "-ef").stdout, "the end of what was started there")


@clients
@pytest.mark.leaves_processes("the host is started again")
def test_a_host_crashes(rig: Rig, client: str | None) -> None:
    try:
        rig.call("hosts.test_logins:a_host_crashes", client)
    finally:
        rig.crash(rig["h1"])  # so that this process knows, and starts it again


def a_host_crashes(rig: Rig, client: str | None) -> None:
    pids = by_name(add(rig, client, [("h1", 2), "h2"]))
    waiting = remotecall(time.sleep, pids[0], 600)
    rig.crash(rig["h1"])
    with pytest.raises(distpool.ProcessExitedException):
        waiting.result(10)
    until(lambda: distpool.workers() == [pids[2]], "both are gone")


@clients
def test_another_address(rig: Rig, client: str | None) -> None:
    rig.call("hosts.test_logins:another_address", client)


def another_address(rig: Rig, client: str | None) -> None:
    """What others dial is the address that the login came to, or the one that was asked for."""
    rig["h1"].run("ip", "addr", "add", "10.199.0.71/24", "dev", "eth0", check=False)
    try:
        pids = add(rig, client, ["h1", "h1 10.199.0.71", "h1 0.0.0.0:5555"])
        members = distpool.node.node.existing().group.members  # type: ignore[attr-defined]
        found = sorted(members[pid].address[1:] for pid in pids)
        assert [host for host, _ in found] == ["10.199.0.11", "10.199.0.11", "10.199.0.71"]
        assert ("10.199.0.11", 5555) in found
        assert len({tuple(distpool.procs(pid)) for pid in pids}) >= 2
    finally:
        rmprocs(distpool.procs()[1:])
        rig["h1"].run("ip", "addr", "del", "10.199.0.71/24", "dev", "eth0")
