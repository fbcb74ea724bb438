"""Values that this process owns for references, and who else holds one (layer 4).

    remotecall arrives -> make(rrid, creator) -> set(outcome) -> watchers: notices, fetches that waited
    ADD / DEL of clients -> change() -> nobody left -> the entry goes, and with it the value

Clients are counted, not listed: a reference that travels from A to B costs one ADD(B), sent by A before the message,
and B gives back as many as it received. The two reach the owner on different links, so a DEL may come before its ADD;
the count is then negative for a moment and the entry stays. An entry goes when all counts are zero.

Any thread; `_lock` protects the table and the entries. It is reentrant, because the collector may run a user's
`__del__` inside a locked region, and nothing under it waits or runs user code. Values are dropped on a library thread:
their `__del__` is user code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from distpool.node.threads import SerialQueue
from distpool.refs.refs import Outcome

if TYPE_CHECKING:
    from distpool.node.node import Node


class RRID(NamedTuple):
    """Identity of a reference: the process that made it and its number there.

    Example: `remoteref_id(RemoteChannel(2)) == RRID(myid(), n)`, where n grows with each reference.
    """

    whence: int
    id: int


class Entry:
    """One owned value or channel."""

    __slots__ = ("channel", "clients", "outcome", "rrid", "watchers")

    def __init__(self, rrid: RRID) -> None:
        self.rrid = rrid
        self.clients: dict[int, int] = {}  # pid -> references it holds (negative: a DEL was quicker than its ADD)
        self.outcome: Outcome | None = None
        self.channel: Any = None
        self.watchers: list[Callable[[Outcome], object]] = []


class Owner:
    """The table of one process."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock: Any = threading.RLock()
        node.loop.held.append(self._lock._is_owned)  # type: ignore[attr-defined]
        self._entries: dict[RRID, Entry] = {}
        self._gone: set[int] = set()  # processes that `forget_client` has forgotten: what comes of them now is late
        self._trash = SerialQueue(node.threads)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, rrid: RRID) -> Entry | None:
        """The entry, if there is one."""
        return self._entries.get(rrid)

    def touch(self, rrid: RRID, pid: int = 0) -> Entry:
        """The entry, made if need be; with `pid`, one more reference of that process.

        For a process that is gone none is made: what it asked for (a channel, by a slow factory) would be nobody's.
        """
        with self._lock:
            entry = self._entries.get(rrid)
            late = pid in self._gone
            if entry is None:
                entry = Entry(rrid)
                if late:
                    return entry
                self._entries[rrid] = entry
            if pid and not late:
                entry.clients[pid] = entry.clients.get(pid, 0) + 1
            return entry

    def change(self, rrid: RRID, pid: int, change: int) -> None:
        """`pid` holds `change` more references (or fewer)."""
        with self._lock:
            if pid in self._gone:
                return
            entry = self._entries.get(rrid)
            if entry is None:
                entry = self._entries[rrid] = Entry(rrid)
            count = entry.clients.get(pid, 0) + change
            if count:
                entry.clients[pid] = count
                return
            entry.clients.pop(pid, None)
            if not entry.clients:
                self._remove(entry)

    def forget_client(self, pid: int) -> None:
        """The process is gone: it has dropped all its references, and its waiters are nobody's."""
        channels: list[Any] = []
        with self._lock:
            self._gone.add(pid)
            for entry in list(self._entries.values()):
                if entry.clients.pop(pid, None) is not None and not entry.clients:
                    self._remove(entry)
                if hasattr(type(entry.channel), "forget_client"):  # of an object of the user's it would ask his code
                    channels.append(entry.channel)
        # Without the lock: who has that of a channel may be in a `__del__` that wants this one.
        for channel in channels:
            channel.forget_client(pid)

    def _remove(self, entry: Entry) -> None:
        self._entries.pop(entry.rrid, None)
        outcome, channel, entry.outcome, entry.channel = entry.outcome, entry.channel, None, None
        if outcome is not None or channel is not None:
            box = [outcome, channel]
            del outcome, channel
            self._trash.put(box.clear)

    def settle(self, entry: Entry, outcome: Outcome) -> bool:
        """The value is there; False if it was before. Watchers are called here and now: they must not block."""
        with self._lock:
            if entry.outcome is not None:
                return False
            entry.outcome = outcome
            watchers, entry.watchers = entry.watchers, []
        for watcher in watchers:
            watcher(outcome)
        return True

    def watch(self, entry: Entry, watcher: Callable[[Outcome], object]) -> None:
        """Call `watcher(outcome)` when the value is there, or now."""
        with self._lock:
            outcome = entry.outcome
            if outcome is None:
                entry.watchers.append(watcher)
                return
        watcher(outcome)

    def table(self) -> dict[RRID, set[int]]:
        """A copy of the table: who holds which reference."""
        with self._lock:
            return {
                rrid: {pid for pid, count in entry.clients.items() if count > 0}
                for rrid, entry in self._entries.items()
            }
