"""The queue behind a `WorkerPool`, on the process that owns the pool (layer 6).

    take -> the free worker that has waited longest, else a waiter (FIFO)      put, push -> the first waiter, else free
    a process is gone -> it is no member, its waiters are nobody's, and what it had taken is free again

A `Channel` whose items come back: it remembers who has which worker. So it is served like one (`channelserver`): a
blocked `take` of another process is an entry here and costs no thread, and one that is given up swallows nothing.

`_lock` of the base class protects all tables. Callbacks run outside of it. Asking whether a member lives only looks at
tables of this process, because the leader asks too.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable
from typing import Any

from distpool.node.node import Node
from distpool.refs.channel import Channel
from distpool.refs.channelcore import Waiter
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome
from distpool.wire import codec

EMPTY = "No active worker available in pool"
_NOTHING = Outcome(LOCAL_VALUE, None, (), 0)


class WorkerQueue(Channel):
    """Members, free ones in order, and who has the others. `falls_back`: without members it gives out pid 1."""

    by_callbacks = True

    def __init__(self, node: Node, pids: Iterable[int], falls_back: bool = False) -> None:
        super().__init__(math.inf)
        self.falls_back = falls_back
        self._node = node
        self._members: dict[int, None] = dict.fromkeys(pids)  # an ordered set
        self._free = collections.deque(self._members)
        self._held: dict[int, int] = {}  # member -> pid of the process that took it

    # -- what a Channel's server and blocking methods build on -------------------------------------------------

    def _match(self) -> list[tuple[Waiter, Outcome]]:
        """Bring workers and waiters together. Called with the lock held; returns what is due outside of it."""
        self._drop_dead()
        due: list[tuple[Waiter, Outcome]] = []
        while self._takers:
            taker = self._takers[0]
            if taker.live and self._members and not self._free:
                break
            self._takers.popleft()
            if not taker.live:
                continue
            due.append((self._served(taker), self._worker_for(taker)))
        if self._watchers and (self._free or not self._members):
            outcome = _NOTHING if self._free or self.falls_back else _no_worker()
            due.extend((self._served(watcher), outcome) for watcher in self._watchers if watcher.live)
            self._watchers = []
        return due

    def _worker_for(self, taker: Waiter) -> Outcome:
        if self._free:
            pid = self._free.popleft()
            self._held[pid] = taker.pid or self._node.pid
            return Outcome(LOCAL_VALUE, pid, (), 0)
        return Outcome(LOCAL_VALUE, 1, (), 0) if self.falls_back else _no_worker()

    def _drop_dead(self) -> None:
        dead = [pid for pid in self._members if not is_alive(self._node, pid)]
        for pid in dead:
            self._remove(pid)

    def _remove(self, pid: int) -> None:
        self._members.pop(pid, None)
        self._held.pop(pid, None)
        if pid in self._free:
            self._free.remove(pid)

    def restore(self, item: Outcome) -> None:
        """A worker that was given to somebody who had given up: it is free again."""
        self.give(item.data if item.status == LOCAL_VALUE else codec.decode(item.data, item.buffers))

    def forget_client(self, pid: int) -> None:
        """A process is gone."""

        def change() -> None:
            for waiter in (*self._takers, *self._watchers):
                if waiter.pid == pid:
                    waiter.live = False
            left = [member for member, holder in self._held.items() if holder == pid]
            for member in left:
                del self._held[member]
                self._free.append(member)

        self._change(change)

    def _change(self, change: Callable[[], object]) -> None:
        def work() -> list[tuple[Waiter, Outcome]]:
            change()
            return self._match()

        self._do(work)

    # -- operations of the pool (also called by name, from other processes) ------------------------------------

    def give(self, pid: int) -> None:
        """The worker is free again; ignored for pids that are not members, or were not taken."""

        def change() -> None:
            if self._held.pop(pid, None) is not None:
                self._free.append(pid)

        self._change(change)

    def push(self, pid: int) -> None:
        """A new member, free; ignored if it is one."""

        def change() -> None:
            if pid not in self._members:
                self._members[pid] = None
                self._free.append(pid)

        self._change(change)

    def remove(self, pid: int) -> None:
        """No longer a member."""
        self._change(lambda: self._remove(pid))

    def living(self) -> list[int]:
        """The members, sorted."""
        return sorted(pid for pid in list(self._members) if is_alive(self._node, pid))

    def everybody(self) -> list[int]:
        """As `living`, and `[1]` for a default pool without members."""
        return self.living() or ([1] if self.falls_back else [])

    def isready(self) -> bool:
        """Whether a `take` would not wait (and would not fail)."""
        free = any(is_alive(self._node, pid) for pid in self._free.copy())
        return free or (self.falls_back and not self.living())

    def has(self, pid: int) -> bool:
        """Whether this member has been taken."""
        return pid in self._held

    def fall_back(self, whether: bool) -> None:
        """Be the default pool, or not."""
        self._change(lambda: setattr(self, "falls_back", whether))

    def __len__(self) -> int:
        return len(self.living())

    def __reduce__(self) -> Any:
        raise TypeError("the queue of a WorkerPool stays where it is; send the WorkerPool")


def _no_worker() -> Outcome:
    return Outcome(RAISED_HERE, RuntimeError(EMPTY), (), 0)


def is_alive(node: Node, pid: int) -> bool:
    """Whether calls to `pid` are possible, as far as this process knows without asking."""
    if pid == node.pid or pid == 1:
        return True
    if pid in node.peers.dead:
        return False
    if not node.is_master:
        return True  # members were checked with pid 1 when they became members
    member = node.group.members.get(pid) if node.group is not None else None
    return member is not None and bool(member.listed)


__all__ = ["EMPTY", "WorkerQueue", "is_alive"]
