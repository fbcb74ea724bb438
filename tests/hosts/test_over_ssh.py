"""SSHManager on hosts with addresses of their own, with both clients: encryption, tunnels, firewalls, lost hosts."""

from __future__ import annotations

import platform
import time
from typing import Any

import pytest

from distpool import ProcessExitedException, RemoteException, addprocs, remotecall, remotecall_fetch, workers
from distpool.node import node as nodes
from hosts.rig import Rig, until

clients = pytest.mark.parametrize("client", [None, "ssh"], ids=["paramiko", "openssh"])


def add(rig: Rig, client: str | None, machines: list[Any], **more: Any) -> list[int]:
    return addprocs(machines, ssh=client, sshflags=["-F", str(rig.ssh_config)], **more)


def ask(pids: list[int]) -> list[str]:
    """On a worker: what the others say."""
    return [remotecall_fetch(platform.node, pid) for pid in pids]


def by_name(pids: list[int]) -> list[int]:
    """In the order of their hosts: they are numbered as they come up."""
    return sorted(pids, key=lambda pid: remotecall_fetch(platform.node, pid))


def families(pids: list[int]) -> list[str]:
    """What is spoken at their listeners."""
    node = nodes.existing()
    assert node is not None
    return [node.group.members[pid].address[0] for pid in pids]


def streams(pids: list[int]) -> list[str]:
    """What the master's own links are made of."""
    node = nodes.existing()
    assert node is not None
    return [type(node.group.members[pid].link._sock).__name__ for pid in pids]


@clients
@pytest.mark.parametrize("encrypt", [None, False])
def test_a_cluster_of_four_hosts(rig: Rig, client: str | None, encrypt: bool | None) -> None:
    rig.call("hosts.test_over_ssh:a_cluster_of_four_hosts", client, encrypt)


def a_cluster_of_four_hosts(rig: Rig, client: str | None, encrypt: bool | None) -> None:
    pids = add(rig, client, ["h1", ("h2", 2), "h3", "h4"], encrypt=encrypt)
    names = [remotecall_fetch(platform.node, pid) for pid in pids]
    assert sorted(names) == ["h1", "h2", "h2", "h3", "h4"]
    here = addprocs(1)
    everybody, answers = pids + here, [*names, platform.node()]
    for pid in everybody:
        assert remotecall_fetch(ask, pid, everybody) == answers
    assert families(pids) == [("tcp" if encrypt is False else "tls")] * 5
    assert streams(pids) == [("socket" if encrypt is False else "TlsStream")] * 5


@clients
@pytest.mark.parametrize("encrypt", [None, True])
def test_all_ports_but_the_logins_are_closed(rig: Rig, client: str | None, encrypt: bool | None) -> None:
    rig.call("hosts.test_over_ssh:all_ports_but_the_logins_are_closed", client, encrypt)


def all_ports_but_the_logins_are_closed(rig: Rig, client: str | None, encrypt: bool | None) -> None:
    rig.refuse(rig["h1"])
    rig.refuse(rig["h2"])
    one, other = by_name(add(rig, client, ["h1", "h2"], tunnel=True, encrypt=encrypt))
    assert streams([one, other]) == [("TlsStream" if encrypt else "socket")] * 2
    begin = time.monotonic()
    with pytest.raises(RemoteException, match="cannot be connected") as caught:
        remotecall_fetch(ask, one, [other])
    assert "h1" in str(caught.value) and "h2" in str(caught.value) and time.monotonic() - begin < 15
    assert remotecall_fetch(lambda: remotecall_fetch(remotecall_fetch, 1, platform.node, other), one) == "h2"


@clients
@pytest.mark.parametrize("tunnel", [False, True], ids=["direct", "tunnel"])
def test_a_host_that_falls_silent(rig: Rig, client: str | None, tunnel: bool) -> None:
    rig.call("hosts.test_over_ssh:a_host_that_falls_silent", client, tunnel, env={"DISTPOOL_SILENT_SECONDS": "3"})


def a_host_that_falls_silent(rig: Rig, client: str | None, tunnel: bool) -> None:
    one, other = by_name(add(rig, client, ["h1", "h2"], tunnel=tunnel))
    waiting = remotecall(time.sleep, one, 600)
    rig.cut(rig["h1"])
    begin = time.monotonic()
    with pytest.raises(ProcessExitedException) as caught:
        waiting.result(30)
    assert time.monotonic() - begin < 8
    assert caught.value.worker_id == one
    assert workers() == [other] and remotecall_fetch(platform.node, other) == "h2"
    rig.heal(rig["h1"])
    until(lambda: "-m distpool" not in rig["h1"].run("ps", "-ef").stdout, "the end of what was started there")
