"""The process group as the master sees it: its members, its topology, and who is told of what (layer 3).

    joining: add(...) -> Member ... JOINED -> joined(member) -> watchers, hooks of the user (notices thread)
             Member is GONE -> forget(member) -> peers, watchers, hooks of the user

The table is changed on the leader; reading it is safe anywhere. `default_members` are the workers of `addprocs`, in the
order in which they came: the default pool.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable

from distpool import config, errors
from distpool.hints import Any, NamedTuple
from distpool.logs import Log
from distpool.node.member import Member, State
from distpool.node.node import Node
from distpool.node.output import OutputHook
from distpool.wire import messages
from distpool.wire.frames import Kind

log = Log("group")

TOPOLOGIES = ("all_to_all", "master_worker", "custom")


class WorkerInfo(NamedTuple):
    """What `on_worker_started` and `on_worker_exited` hand to their functions.

    `pid`; `host` (name of its machine); `ospid` (process id there); `exitcode` (negative: the signal; None: unknown, or
    it lives); `reason` (text, empty while it lives).

    Example: `on_worker_exited(lambda info: print(info.pid, info.exitcode, info.reason))`
    """

    pid: int
    host: str
    ospid: int
    exitcode: int | None = None
    reason: str = ""


class OomKills:
    """Whether the kernel has killed processes of this machine because there was no memory left (Linux)."""

    def __init__(self) -> None:
        self._seen = self._count()

    def more(self) -> bool:
        """Whether it has done so since the last time that somebody asked."""
        before, self._seen = self._seen, self._count()
        return self._seen > before

    @staticmethod
    def _count() -> int:
        with contextlib.suppress(OSError, ValueError), open("/proc/vmstat", "rb") as file:
            for line in file:
                if line.startswith(b"oom_kill "):
                    return int(line.split()[1])
        return 0


def _first_pid(own: int) -> int:
    """The number of the first member. A task of a worker may have an executor of its own: its workers are a group by
    themselves, but the worker, who is in both, knows all of them by their numbers. (Tried: 2 in each group. The
    worker's calls to the other 2 went to its own, whose end it then told everybody.)"""
    if own == 1:
        return 2
    half = own  # of 32 bits
    if own >= 1 << 15:  # a task within a task: all that counts is that its two groups differ
        half = 1 << 15 | (own >> 16 == 1 << 15)
    return (half << 16) + 2


class Group:
    """All members of this process's group."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.members: dict[int, Member] = {}
        self.oom_kills = OomKills()  # leader
        self.topology = "all_to_all"
        self.lazy = True
        self.output_hook: OutputHook | None = None
        self.joined_watchers: list[Callable[[Member], object]] = []  # upper layers; called on the leader
        self.gone_watchers: list[Callable[[Member], object]] = []
        self.default_members: dict[int, None] = {}  # an ordered set
        self.on_member_added: list[Callable[[int], object]] = []  # of the default pool; called on the leader
        self.on_member_removed: list[Callable[[int], object]] = []
        self.on_busy: Callable[[], object] = lambda: None  # leader: a worker that was to go at once runs calls
        self.prologues: list[Any] = []  # what everywhere(later=True) keeps for workers to come; leader
        self.run_prologue: Callable[[Any, int], object] = lambda action, pid: None  # set with the first of them
        self.first_pid = _first_pid(node.pid)
        self.last_pid = self.first_pid - 1  # the highest pid given so far
        self.started_hooks: list[Callable[[WorkerInfo], object]] = []
        self.exited_hooks: list[Callable[[WorkerInfo], object]] = []
        self.starting_others: dict[int, Callable[[Any], None]] = {}  # pid -> who waits for what it starts; leader
        self.connecting: list[Callable[[int], object]] = []  # who waits for links that are not lazy; leader
        self._claiming = threading.Lock()  # protects topology, lazy and _claims
        self._claims = 0  # launches and executors that rely on the topology and may have no members yet
        node.on_fork.append(self._after_fork)

    # -- members -----------------------------------------------------------------------------------------------

    def add(self, process: Any, config: Any = None, manager: Any = None) -> Member:
        """A new member for a launched process (leader)."""
        self.last_pid += 1
        member = Member(self, self.last_pid, process, config, manager)
        self.members[member.pid] = member
        return member

    def number(self, member: Member) -> int:
        """Give the member the lowest number that no other one of its host has (leader)."""
        others = [other for other in self.members.values() if other.site == member.site and other is not member]
        taken = {other.number for other in others if other.state is not State.LEAVING}
        member.number = next(number for number in itertools.count() if number not in taken)
        return member.number

    def listed(self) -> list[int]:
        """Pids of the workers that have joined and have not been asked to leave, sorted."""
        return sorted(member.pid for member in list(self.members.values()) if member.listed)

    def member(self, pid: int) -> Member:
        """The living worker `pid`. ValueError: never existed; ProcessExitedException: it is gone, or going."""
        member = self.members.get(pid)
        if member is not None and member.listed:
            return member
        dead = self.node.peers.dead.get(pid)
        if dead is not None:
            raise dead()
        if pid in range(self.first_pid, self.last_pid + 1):
            raise errors.ProcessExitedException(pid, None, False)
        raise ValueError(f"no process with id {pid} exists")

    def introduce(self, member: Member) -> None:
        """The member has come up (leader): what `everywhere(later=True)` left for it comes first, then it is used."""
        actions = list(self.prologues)

        def use() -> None:
            if self.members.get(member.pid) is member:
                self.joined(member)
                member.on_joined(member)

        def work() -> None:
            try:
                for action in actions:
                    self.run_prologue(action, member.pid)
            finally:  # whatever that raises: who waits for the member would wait for ever
                self.node.loop.call_soon(use)

        if actions:
            self.node.deliver(work)
        else:
            use()

    def joined(self, member: Member) -> None:
        """The member is ready (leader)."""
        for watcher in list(self.joined_watchers):
            watcher(member)
        self._call_hooks(self.started_hooks, WorkerInfo(member.pid, member.host, member.ospid))

    def forget(self, member: Member) -> None:
        """The member is gone (leader): everybody hears of it."""
        self.members.pop(member.pid, None)
        with self._claiming:
            self._reset_topology()
        self.drop_default(member.pid)
        for watcher in list(self.gone_watchers):
            watcher(member)
        self._tell_peers(member)
        if member.link is not None and member.segments is not None:  # it had joined
            info = WorkerInfo(member.pid, member.host, member.ospid, member.exitcode, member.why())
            self._call_hooks(self.exited_hooks, info)

    def _tell_peers(self, member: Member) -> None:
        """Every process of the group hears of the death, with what is known of it."""
        pid, code, output, reason = member.pid, member.exitcode, member.last_output, member.reason
        peers = self.node.peers
        peers.mark_dead(pid, lambda: errors.ProcessExitedException(pid, code, True, output, reason))
        peers.broadcast_dead(pid, self.members)

    def _call_hooks(self, hooks: list[Callable[[WorkerInfo], object]], info: WorkerInfo) -> None:
        for hook in list(hooks):
            self.node.notices.put(lambda hook=hook: hook(info))  # type: ignore[misc]

    # -- the default pool --------------------------------------------------------------------------------------

    def add_default(self, pid: int) -> None:
        """The worker belongs to the default pool from now on (leader)."""
        self.default_members[pid] = None
        for watcher in list(self.on_member_added):
            watcher(pid)

    def drop_default(self, pid: int) -> None:
        """It does no longer. Any thread: who drops it tells the watchers."""
        if self.default_members.pop(pid, self) is None:
            for watcher in list(self.on_member_removed):
                watcher(pid)

    # -- topology ----------------------------------------------------------------------------------------------

    def claim_topology(self, topology: str, lazy: bool) -> None:
        """Set these for the group, if it is empty or has the same; ends with `release_topology`. Any thread.

        ValueError, RuntimeError: they do not fit what is there.
        """
        if topology not in TOPOLOGIES:
            raise ValueError(f"topology must be one of {', '.join(TOPOLOGIES)}, not {topology!r}")
        lazy = config.as_bool(lazy)
        if not isinstance(lazy, bool):
            raise TypeError(f"lazy must be a bool, not {type(lazy).__name__}")
        lazy = lazy and topology == "all_to_all"
        with self._claiming:
            if self._is_free():
                self.topology, self.lazy = topology, lazy
            elif topology != self.topology:
                raise RuntimeError(
                    f"Workers with Topology {self.topology} already exist. Requested Topology {topology} cannot be set."
                )
            elif lazy is not self.lazy:
                raise ValueError(f"Active workers with lazy={self.lazy}. Cannot set lazy={lazy}")
            self._claims += 1

    def release_topology(self) -> None:
        """A launch has ended, or an executor's work: from now on members hold the topology, if there are any."""
        with self._claiming:
            self._claims -= 1
            self._reset_topology()

    def accept_topology(self) -> None:
        """Hold what others hold, and else the usual one, even where who is on the way out had something else; ends with
        `release_topology`. Any thread."""
        with self._claiming:
            self._reset_topology()
            self._claims += 1

    def _is_free(self) -> bool:
        """Whether nobody holds the topology; `_claiming` is held.

        Who is on the way out does not: `workers()` does not list him any more, so no user could know how long to wait.
        """
        members = list(self.members.values())
        return not self._claims and all(member.removed or member.state is State.LEAVING for member in members)

    def _reset_topology(self) -> None:
        """Forget the topology when nobody is left to whom it was promised; `_claiming` is held."""
        if self._is_free():
            self.topology, self.lazy = "all_to_all", True

    def may_connect(self, one: int, other: int) -> bool:
        """Whether the topology lets these two processes have a link."""
        if one == other or 1 in (one, other) or self.topology == "all_to_all":
            return True
        if self.topology != "custom":
            return False
        first, second = self.members.get(one), self.members.get(other)
        return first is not None and second is not None and (_names(first, second) or _names(second, first))

    def missing_idents(self, member: Member) -> bool:
        """Custom topology: whether somebody whom `member` shall connect to has not joined yet."""
        there = [other.config.ident for other in self.members.values() if other.config is not None and other.listed]
        return any(ident not in there for ident in _idents(member))

    def connect_all(self, new_pids: Iterable[int]) -> list[int]:
        """Not lazy: have the links between these workers and all others made now (leader).

        The pids that were asked: each answers with CONNECTED when it has tried.
        """
        asked: list[int] = []
        if self.lazy or self.topology == "master_worker":
            return asked
        pids, new = self.listed(), set(new_pids)
        for pid in sorted(new):
            # Of two new ones the higher asks, so that each pair is asked for once.
            peers = [other for other in pids if (other < pid or other not in new) and self.may_connect(pid, other)]
            member = self.members.get(pid)
            if member is not None and member.link is not None and peers:
                member.link.send(Kind.CONNECT, messages.Connect(peers).pack())
                asked.append(pid)
        return asked

    def _after_fork(self) -> None:
        for member in self.members.values():
            member.forget_after_fork()


def _idents(member: Member) -> list[Any]:
    config = member.config
    if config is None or config.connect_idents is None:
        return []
    return list(config.connect_idents)


def _names(member: Member, other: Member) -> bool:
    """Whether `member` was told to connect to `other`."""
    return other.config is not None and other.config.ident is not None and other.config.ident in _idents(member)


def of(node: Node) -> Group:
    """The group of `node`, made on first use."""
    if node.group is None:
        with node.making_parts:  # two would share the workers out between them
            if node.group is None:
                made = Group(node)
                node.group = node.group or made  # a `__del__` that the collector runs meanwhile may make one as well
    return node.group  # type: ignore[no-any-return]


__all__ = ["TOPOLOGIES", "Group", "Member", "State", "WorkerInfo", "of"]
