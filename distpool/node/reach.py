"""Which of two workers can dial the other: pid 1 knows where each of them listens (layer 3; leader of pid 1).

    WHERE from the asker      -> choose: ADDRESS to the asker, who dials;  or DIAL to the target, who dials
    the asker failed: WHERE with what it got      -> DIAL to the target, if that may work
    the target failed: UNDIALLED with what it got -> ADDRESS to the asker, if that may work
    neither can, or both have tried               -> ADDRESS with a problem: calls fail, with both reasons

A Unix socket or a loopback address can be dialled on its own machine only, so of a local and a remote worker it is the
local one that dials. What only the attempt can tell (firewalls, address translation) is found out by trying: where one
side fails, the other one is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distpool.transport.link import Link
from distpool.transport.silence import is_loopback
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind

if TYPE_CHECKING:
    from distpool.node.member import Member
    from distpool.node.node import Node

ADVICE = (
    "Let at least one of them listen at an address that the other can reach (restrict=False for local workers, no"
    " tunnel or another bind address for remote ones), or send such calls through the master"
)


def obstacle(dialler: Member, target: Member) -> str:
    """Why `dialler` cannot connect to `target`; empty if it may be able to."""
    address = target.address
    name = f"process {target.pid} on {place(target)}"
    if not address:
        return f"{name} listens nowhere"
    family = address[0]
    if family == "manager":
        return ""  # whether its transport has a way, its own `connect` will tell
    if family == "unix":
        return "" if same_machine(dialler, target) else f"{name} listens on a Unix socket of its own machine"
    if is_loopback(str(address[1])) and not same_machine(dialler, target):
        return f"{name} listens on the loopback address {address[1]}"
    if family == "tls" and not may_hold_identity(dialler):
        return f"{name} accepts encrypted links only, and process {dialler.pid} has none (encrypt=False)"
    if family == "tcp" and dialler.address[:1] == ("tls",) and may_hold_identity(target):
        if not same_machine(dialler, target):
            return f"a link to process {target.pid} would leave the host in clear"  # the other way round it will not
    return ""


def may_hold_identity(member: Member) -> bool:
    """Whether it has the cluster's certificate and key, or may be sent them: over a link that nobody else reads."""
    return member.has_identity or member.link_is_private


def choose(asker: Member, target: Member) -> tuple[Member | None, str]:
    """Who shall dial: the higher pid if both can. `(None, why)`: neither can."""
    first, second = (asker, target) if asker.pid > target.pid else (target, asker)
    if second.tunnelled and not first.tunnelled:
        # Pid 1 could not dial it, so others may not be able to either; and black holes cost them many seconds.
        first, second = second, first
    why = obstacle(first, second)
    if not why:
        return first, ""
    why_not = obstacle(second, first)
    if not why_not:
        return second, ""
    return None, unreachable(asker, target, f"{why}, and {why_not}")


def unreachable(asker: Member, target: Member, why: str) -> str:
    """The error of calls between two workers that have no way to each other."""
    here, there = place(asker), place(target)
    return (
        f"process {asker.pid} on {here} and process {target.pid} on {there} cannot be connected: {why}."
        f" {ADVICE} (remotecall_fetch(remotecall_fetch, 1, f, {target.pid}))"
    )


def same_machine(one: Member, other: Member) -> bool:
    """Whether both run on one machine, as far as pid 1 can tell."""
    if share_memory(one, other):
        return True
    return one.host == other.host and _machine(one) == _machine(other)


def _machine(member: Member) -> str:
    """What its machine goes by; empty for this one."""
    direct = member.address and member.address[0] in ("unix", "tcp", "tls")
    if direct and (member.address[0] == "unix" or is_loopback(str(member.address[1]))) and not member.tunnelled:
        return ""  # pid 1 has dialled this address, so it is of this machine
    return "" if is_loopback(member.site) else member.site


def place(member: Member) -> str:
    """Its machine, for people."""
    site = member.site
    return f"{member.host} ({site})" if site and site != member.host else member.host


# -- what pid 1 answers ------------------------------------------------------------------------------------------


def on_where(node: Node, link: Link, frame: Frame) -> None:
    """A worker needs a link to another one; or it has tried to make one, in vain (`detail`)."""
    message = messages.Where.unpack(frame.control)
    pid, members = message.pid, node.group.members
    asker, target = members.get(link.peer), members.get(pid)
    if asker is None:
        return
    if pid in node.peers.dead:  # the asker was not there yet when everybody was told
        link.send(Kind.DEAD, node.peers.obituary(pid))
    elif target is None:
        refuse(link, pid, "unknown", "")
    elif not node.group.may_connect(asker.pid, pid):
        refuse(link, pid, "topology", f"peer {pid} is not connected to {asker.pid}. Topology : {node.group.topology}")
    elif target.link is None:
        refuse(link, pid, "unreachable", f"process {pid} has not joined yet")
    elif message.detail:
        why = obstacle(target, asker)
        if why:
            refuse(link, pid, "unreachable", unreachable(asker, target, f"{message.detail}, and {why}"))
        else:
            send_to_dial(node, target, asker, message.detail)
    else:
        dialler, why = choose(asker, target)
        if dialler is None:
            refuse(link, pid, "unreachable", why)
        elif dialler is asker:
            send_address(node, asker, target)
        else:
            send_to_dial(node, dialler, asker)


def on_undialled(node: Node, link: Link, frame: Frame) -> None:
    """Who was told to dial has failed: perhaps the one who asked can."""
    message = messages.Undialled.unpack(frame.control)
    members = node.group.members
    asker, target = members.get(message.pid), members.get(link.peer)
    if asker is None or target is None or asker.link is None:
        return  # gone meanwhile, and everybody has heard of it
    why = message.tried or obstacle(asker, target)
    if message.denied:
        refuse(asker.link, target.pid, "denied", message.detail)
    elif why:
        text = unreachable(asker, target, f"{message.detail}, and {why}")
        refuse(asker.link, target.pid, "unreachable", text)
    else:
        send_address(node, asker, target, message.detail)


def refuse(link: Link, pid: int, problem: str, detail: str) -> None:
    """There will be no link."""
    link.send(Kind.ADDRESS, messages.Address(pid, [], False, problem, detail).pack())


def send_address(node: Node, dialler: Member, target: Member, detail: str = "") -> None:
    """Let the asker dial; `detail`: what the target got when it tried."""
    assert dialler.link is not None
    hand_identity(node, dialler, target)
    answer = messages.Address(target.pid, list(target.address), share_memory(dialler, target), "", detail)
    dialler.link.send(Kind.ADDRESS, answer.pack())


def send_to_dial(node: Node, dialler: Member, asker: Member, detail: str = "") -> None:
    """Let the target dial; `detail`: what the asker got when it tried."""
    assert dialler.link is not None
    hand_identity(node, dialler, asker)
    order = messages.Dial(asker.pid, list(asker.address), share_memory(dialler, asker), detail)
    dialler.link.send(Kind.DIAL, order.pack())


def share_memory(one: Member, other: Member) -> bool:
    """Whether the two can map each other's segments: if both can with pid 1."""
    return all(member.link is not None and member.link.shares_memory for member in (one, other))


def hand_identity(node: Node, dialler: Member, target: Member) -> None:
    """Who dials an encrypted listener needs the cluster's certificate and key."""
    if target.address[0] == "tls" and not dialler.has_identity:
        assert dialler.link is not None
        dialler.has_identity = True
        settings = node.own_identity().settings()
        dialler.link.send(Kind.IDENTITY, messages.IdentityIs(settings["certificate"], settings["key"]).pack())


__all__ = ["choose", "obstacle", "on_undialled", "on_where", "place", "same_machine", "unreachable"]
