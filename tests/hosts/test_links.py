"""Links between hosts: who dials whom, what is encrypted, and what the network's faults cost."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import threading
import time

import pytest

from distpool import (
    CompositeException,
    LaunchWorkerError,
    RemoteException,
    addprocs,
    cluster_cookie,
    remotecall_fetch,
    workers,
)
from hosts.launching import Disguised, OnHosts, Tunnelled
from hosts.rig import Rig


def where_is(pid: int) -> str:
    return remotecall_fetch(platform.node, pid)


def ask(pids: list[int]) -> list[str]:
    """On a worker: what the others say."""
    return [remotecall_fetch(platform.node, pid) for pid in pids]


def all_reach_all(pids: list[int], names: list[str]) -> None:
    for pid in pids:
        assert remotecall_fetch(ask, pid, pids) == names


# --------------------------------------------------------------------------------------------------------- reachability


@pytest.mark.parametrize("encrypt", [True, False], ids=["tls", "tcp"])
def test_hosts_reach_each_other(rig: Rig, encrypt: bool) -> None:
    rig.call("hosts.test_links:hosts_reach_each_other", encrypt)


def hosts_reach_each_other(rig: Rig, encrypt: bool) -> None:
    names = ["h1", "h2", "h3", "h4"]
    pids = addprocs(OnHosts(rig, names, encrypt))
    assert [where_is(pid) for pid in pids] == names
    all_reach_all(pids, names)


@pytest.mark.parametrize("order", ["local first", "remote first"])
def test_C215_local_and_remote_workers(rig: Rig, order: str) -> None:
    """The local ones listen on sockets that no other host can dial."""
    rig.call("hosts.test_links:local_and_remote_workers", order)


def local_and_remote_workers(rig: Rig, order: str) -> None:
    here = platform.node()
    if order == "local first":
        pids, names = addprocs(2) + addprocs(OnHosts(rig, ["h1", "h2"])), [here, here, "h1", "h2"]
    else:
        pids, names = addprocs(OnHosts(rig, ["h1", "h2"])) + addprocs(2), ["h1", "h2", here, here]
    for pid in reversed(pids):
        assert remotecall_fetch(ask, pid, pids) == names


@pytest.mark.slow
def test_nobody_can_dial(rig: Rig) -> None:
    rig.call("hosts.test_links:nobody_can_dial")


def nobody_can_dial(rig: Rig) -> None:
    """A clear error that names both, at once, and again; everything else goes on."""
    (there,) = addprocs(OnHosts(rig, ["h1"]))
    (here,) = addprocs(1)
    rig.black_hole(rig["h1"])  # the link to the master stays
    os.environ["DISTPOOL_SILENT_SECONDS"] = "2"
    remotecall_fetch(set_silent_seconds, here, 2)
    for asker, other in ((here, there), (there, here)):
        begin = time.monotonic()
        with pytest.raises(RemoteException) as caught:
            remotecall_fetch(ask, asker, [other])
        text = str(caught.value)
        assert time.monotonic() - begin < 10
        assert f"process {here} on {platform.node()}" in text and f"process {there} on h1 ({rig['h1'].address})" in text
        assert "timed out" in text and "Unix socket" in text and "Let at least one of them listen" in text
    assert remotecall_fetch(through_master, here, there) == "h1"
    rig.unfilter()
    time.sleep(1.1)  # for that long a failure is not tried again
    assert remotecall_fetch(ask, there, [here]) == [platform.node()]


def set_silent_seconds(seconds: float) -> None:
    os.environ["DISTPOOL_SILENT_SECONDS"] = str(seconds)


def through_master(pid: int) -> str:
    return remotecall_fetch(remotecall_fetch, 1, platform.node, pid)


@pytest.mark.parametrize("closed", ["h1", "h2"])
@pytest.mark.parametrize("way", ["refuse", "black_hole"])
def test_one_of_two_is_behind_a_firewall(rig: Rig, closed: str, way: str) -> None:
    """Whichever it is: where one side cannot dial, the other one does."""
    rig.call("hosts.test_links:one_of_two_is_behind_a_firewall", closed, way)


def one_of_two_is_behind_a_firewall(rig: Rig, closed: str, way: str) -> None:
    first, second = pids = addprocs(OnHosts(rig, ["h1", "h2"], env={"DISTPOOL_SILENT_SECONDS": "2"}))
    getattr(rig, way)(rig[closed])
    assert remotecall_fetch(ask, first, [second]) == ["h2"]
    assert remotecall_fetch(ask, second, [first]) == ["h1"]
    assert workers() == pids


def test_two_hosts_that_listen_on_loopback_only(rig: Rig) -> None:
    rig.call("hosts.test_links:two_hosts_that_listen_on_loopback_only")


def two_hosts_that_listen_on_loopback_only(rig: Rig) -> None:
    """As behind two tunnels: workers of one host reach each other, those of two do not, and are told so at once."""
    one, other, third = addprocs(Tunnelled(rig, ["h1", "h1", "h2"]))
    assert remotecall_fetch(ask, one, [other]) == ["h1"]
    for asker, target in ((one, third), (third, one)):
        begin = time.monotonic()
        with pytest.raises(RemoteException, match="cannot be connected.*loopback address 127.0.0.1.*loopback address"):
            remotecall_fetch(ask, asker, [target])
        assert time.monotonic() - begin < 5
    assert [where_is(pid) for pid in (one, other, third)] == ["h1", "h1", "h2"]


# -------------------------------------------------------------------------------------------------------- what is heard


@pytest.mark.parametrize("encrypt", [True, False], ids=["tls", "tcp"])
def test_what_somebody_on_the_wire_hears(rig: Rig, encrypt: bool) -> None:
    """The cookie never; with TLS nothing of what is said. In clear: that the test is not deaf."""
    rig.call("hosts.test_links:what_somebody_on_the_wire_hears", encrypt)


def what_somebody_on_the_wire_hears(rig: Rig, encrypt: bool) -> None:
    secret, answer = "correct horse battery", "staple of the answer"
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)) as wire:
        wire.bind(("eth0", 0))
        wire.settimeout(0.5)
        heard: list[bytes] = []
        over = threading.Event()

        def listen() -> None:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    heard.append(wire.recv(1 << 16))

        thread = threading.Thread(target=listen)
        thread.start()
        (pid,) = addprocs(OnHosts(rig, ["h1"], encrypt))
        assert remotecall_fetch(echo, pid, secret, answer) == answer
        over.set()
        thread.join()
    everything = b"".join(heard)
    assert len(everything) > 1000
    assert cluster_cookie().encode() not in everything
    for text in (secret, answer):
        assert (text.encode() in everything) is not encrypt


def echo(question: str, answer: str) -> str:
    return answer


def test_an_encrypting_worker_takes_nothing_in_clear(rig: Rig) -> None:
    rig.call("hosts.test_links:an_encrypting_worker_takes_nothing_in_clear")


def an_encrypting_worker_takes_nothing_in_clear(rig: Rig) -> None:
    """Not even from somebody who knows the cookie."""
    with pytest.raises(CompositeException) as caught:
        addprocs(Disguised(rig, ["h1"]), timeout=20)
    (error,) = caught.value.exceptions
    assert isinstance(error, LaunchWorkerError) and "no TLS connection of this cluster" in error.output
    assert workers() == [1]
