"""Who can dial whom, as pid 1 decides it; that it comes true is shown in tests/hosts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from distpool.node.reach import choose, obstacle, place, same_machine

MASTER = "laptop"


class Link:
    def __init__(self, shares: bool) -> None:
        self.shares_memory = shares


def member(pid: int, address: tuple[Any, ...], host: str = MASTER, **more: Any) -> Any:
    """As pid 1 sees it; `site` and so on as keywords."""
    values = {
        "pid": pid,
        "address": address,
        "host": host,
        "site": "" if host == MASTER else f"10.0.0.{len(host)}",
        "link": Link(host == MASTER),
        "has_identity": address[:1] == ("tls",),
        "link_is_private": host == MASTER or address[:1] == ("tls",),
        "tunnelled": False,
    }
    return type("Member", (), {**values, **more})()


def unix(pid: int) -> Any:
    return member(pid, ("unix", f"/tmp/{pid}"))


def loopback(pid: int) -> Any:
    return member(pid, ("tcp", "127.0.0.1", 1000 + pid))


def tls(pid: int, host: str = "far") -> Any:
    return member(pid, ("tls", f"10.0.0.{len(host)}", 1000 + pid), host)


def tcp(pid: int, host: str = "far") -> Any:
    return member(pid, ("tcp", f"10.0.0.{len(host)}", 1000 + pid), host)


def tunnelled(pid: int, host: str = "far") -> Any:
    return member(pid, ("tcp", "127.0.0.1", 1000 + pid), host, tunnelled=True, link_is_private=False)


@pytest.mark.parametrize("make", [unix, loopback, tls, tcp, tunnelled])
def test_on_one_machine_the_higher_dials(make: Any) -> None:
    low, high = make(2), make(3)
    assert choose(low, high) == choose(high, low) == (high, "")


@pytest.mark.parametrize("local", [unix, loopback])
@pytest.mark.parametrize("remote", [tls, tcp])
def test_of_a_local_and_a_remote_one_the_local_one_dials(local: Any, remote: Any) -> None:
    for here, there in ((local(2), remote(3)), (local(3), remote(2))):
        assert choose(here, there) == choose(there, here) == (here, "")
        assert obstacle(there, here)


@pytest.mark.parametrize("make", [tls, tcp])
def test_between_hosts_the_higher_dials(make: Any) -> None:
    low, high = make(2, "one"), make(3, "other")
    assert choose(low, high)[0] is high and choose(high, low)[0] is high


@pytest.mark.parametrize("make", [unix, loopback])
def test_nobody_can_dial_a_tunnelled_one_from_elsewhere(make: Any) -> None:
    here, there = make(2), tunnelled(3)
    dialler, why = choose(here, there)
    assert dialler is None
    assert "process 2 on laptop" in why and "process 3 on far (10.0.0.3)" in why and "Let at least one" in why


def test_a_tunnelled_one_dials_who_listens() -> None:
    behind, open_one = tunnelled(2, "one"), tcp(3, "other")
    assert choose(behind, open_one) == choose(open_one, behind) == (behind, "")


def test_who_has_no_certificate_cannot_dial_who_wants_one() -> None:
    clear, safe = tcp(2, "one"), tls(3, "other")
    assert "encrypted links only" in obstacle(clear, safe)
    assert choose(clear, safe)[0] is safe, "as its user has asked for a link in clear"


def test_no_link_in_clear_where_the_other_way_round_it_is_encrypted() -> None:
    """A local worker that listens for all, and a remote one."""
    local = member(2, ("tcp", "10.0.0.99", 5))
    remote = tls(3)
    assert "in clear" in obstacle(remote, local)
    assert choose(local, remote)[0] is local and not obstacle(local, remote)


def test_who_listens_nowhere_dials() -> None:
    mute, other = member(3, (), "far"), tcp(2, "near")
    assert choose(mute, other)[0] is mute and choose(other, mute)[0] is mute
    dialler, why = choose(member(2, (), "far"), member(3, (), "near"))
    assert dialler is None and "listens nowhere" in why


def test_transports_of_managers_are_asked_themselves() -> None:
    one, other = member(2, ("manager", "")), member(3, ("manager", ""))
    assert choose(one, other)[0] is other


def test_machines_are_told_apart() -> None:
    assert same_machine(unix(2), loopback(3))
    assert not same_machine(tcp(2, "one"), tcp(3, "other"))
    assert same_machine(tcp(2, "one"), tunnelled(3, "one"))
    twins = [tcp(pid, "one") for pid in (2, 3)]
    twins[1].site = "10.9.9.9"  # two machines of one name
    assert not same_machine(*twins)
    here, there = unix(2), member(3, ("tcp", "127.0.0.1", 5), MASTER, site="10.0.0.5", tunnelled=True, link=Link(False))
    assert not same_machine(here, there), "another one of the master's name, behind a tunnel"
    assert place(here) == MASTER and place(there) == "laptop (10.0.0.5)"


def test_the_choice_does_not_depend_on_who_asks() -> None:
    """Both may ask at the same moment; two links would mean frames that overtake."""
    kinds = [unix, loopback, tls, tcp, tunnelled, lambda pid: member(pid, ()), lambda pid: tcp(pid, "other")]
    for one, other in itertools.product(kinds, repeat=2):
        low, high = one(2), other(3)
        assert choose(low, high)[0] is choose(high, low)[0]
