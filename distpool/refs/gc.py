"""Distributed garbage collection: handles and the messages about them (layer 4).

    Handle.__del__ (any thread, any moment) -> deque -> leader: CLIENTS to the owner, joined per owner
    lend(refs, peer) (sending thread, before the message) -> ADD to the owner
    arrive(...) (decoding thread) -> the living object of that reference, or a new one
    a value that came and was dropped unread (`refs.lent`) -> deque -> library thread: its references, dropped

`__del__` takes no lock and sends nothing: it appends to a deque and wakes the loop (a finalizer that did more could
deadlock: the collector runs it between any two bytecodes).
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from distpool.logs import Log
from distpool.refs.finalized import DEAD, FINALIZED
from distpool.refs.lent import carries_references, references_in
from distpool.refs.owner import RRID, Entry, Owner
from distpool.refs.refs import Outcome
from distpool.wire import structs
from distpool.wire.frames import Frame, Kind

if TYPE_CHECKING:
    from distpool.node.node import Node
    from distpool.transport.link import Link


log = Log("references")
FORKED = "this reference belongs to the process that forked this one"
_NEWS = 2.0  # seconds in which pid 1 says that a process whose link is lost is gone


class Handle:
    """What a reference object holds of its value: `held` references in the owner's count, given back when it goes.

    Whoever has written the reference into a message that was not sent yet holds it as well (`Loan`): the value must not
    go before its receiver is counted, although the object may have fetched the value meanwhile and need it no more. So
    nobody empties a handle; an object that needs its value no more takes one that holds nothing in its place.
    """

    __slots__ = ("__weakref__", "_refs", "held", "rrid", "where")

    def __init__(self, refs: Refs, rrid: RRID, where: int, held: int) -> None:
        self.held = 0  # Ctrl-C may come before the last line
        self._refs = refs
        self.rrid = rrid
        self.where = where
        self.held = held

    def empty(self) -> Handle:
        """The same identity, holding nothing."""
        return Handle(self._refs, self.rrid, self.where, 0)

    def given_back(self, reference: Any) -> Handle:
        """As `empty`, for a reference that was finalized: it is not the living object of its identity any more."""
        refs = self._refs
        with refs._lock:  # another one of the same reference may have come meanwhile
            if refs.live.get(self.rrid) is reference:
                del refs.live[self.rrid]
        return self.empty()

    def __del__(self) -> None:
        if self.held:
            self._refs.drop(self.rrid, self.where, self.held)


class Reference:
    """What all objects of references have in common: identity, and one end."""

    _handle: Handle | None  # None: a dead handle, pickled outside of a distpool message
    _refs: Refs
    _finalized = False

    @property
    def where(self) -> int:
        """Pid of the owner (0: a dead handle)."""
        return self._handle.where if self._handle is not None else 0

    @property
    def whence(self) -> int:
        """Pid of the process that made the reference."""
        return self._handle.rrid.whence if self._handle is not None else 0

    @property
    def id(self) -> int:
        """Number of the reference at `whence`."""
        return self._handle.rrid.id if self._handle is not None else 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reference):
            return NotImplemented
        return (self.whence, self.id) == (other.whence, other.id) and (self.id != 0 or self is other)

    def __hash__(self) -> int:
        return hash((self.whence, self.id))

    def finalize(self) -> None:
        """Give the reference back now; any later use raises RuntimeError. May be called again."""
        self._finalized = True
        if self._handle is not None:
            self._handle = self._handle.given_back(self)

    def _link_lost(self) -> None:
        """Leader: what was on its way from or to the owner may be lost. Requests have failed already."""

    def _let_go(self) -> None:
        """The value is not needed from its owner any more."""
        if self._handle is not None:
            self._handle = self._handle.empty()

    def _usable(self) -> Handle:
        """RuntimeError if it cannot be used."""
        if self._finalized:
            raise RuntimeError(FINALIZED)
        if self._handle is None:
            raise RuntimeError(DEAD)
        return self._handle

    def _live(self) -> Handle:
        """As `_usable`, for what needs other processes: a forked child is in no group but its own (API 8.15)."""
        handle = self._usable()
        if self._refs.node.ospid != os.getpid():
            raise RuntimeError(FORKED)
        return handle


class Loan:
    """A reference in a message that was not sent yet: what `codec.encode(seen=...)` notes, for `Refs.lend`.

    The message may wait in a queue for long. Tried: the object itself. When it had fetched its value until the message
    was sent, it looked as if the value had gone along, and its owner had let go of it: the receiver waited for ever.
    """

    __slots__ = ("handle", "reference")

    def __init__(self, reference: Any, handle: Handle) -> None:
        self.reference = reference
        self.handle = handle


class Refs:
    """References as this process holds them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.owner = Owner(node)
        #: The one living object of each reference. Protected by `_lock`, because looking and making is one step.
        self.live: weakref.WeakValueDictionary[RRID, Any] = weakref.WeakValueDictionary()
        #: Futures with callbacks that wait for their outcome: they live until then, although nobody may hold them.
        self.kept: set[Any] = set()
        self._lock: Any = threading.RLock()  # reentrant: the collector may run user code inside
        node.loop.held.append(self._lock._is_owned)  # type: ignore[attr-defined]
        self._numbers = itertools.count(1)
        #: Set by the module that defines them (`refs.remote`).
        self.new_future: Callable[[int], Any]
        self.dead_future: Callable[[], Any]
        self._dropped: collections.deque[tuple[RRID, int, int]] = collections.deque()
        self._unread: collections.deque[tuple[int, Any, Any]] = collections.deque()  # outcomes as they came
        self._flushing = False  # a flush is on its way; only saves wake-ups
        node.handlers[Kind.CLIENTS] = self._on_clients
        node.peers.on_lost.append(self._on_lost)
        node.peers.on_unlinked.append(self._on_unlinked)
        for pid in list(node.peers.dead):  # before this was made
            self.owner.forget_client(pid)

    def new_id(self) -> RRID:
        """The identity of a reference made here."""
        return RRID(self.node.pid, next(self._numbers))

    def adopt(self, future: Any) -> Handle:
        """Make a future of this process a reference that others may hold: this process owns it."""
        handle: Handle | None = future._handle
        if handle is not None:
            return handle
        found = weakref.ref(future)  # weakly: dropping the object is enough, without the collector
        with self._lock:
            handle = future._handle
            if handle is None:
                rrid, me = self.new_id(), self.node.pid
                entry = self.owner.touch(rrid, me)
                future._watched = True
                future._on_settled = lambda outcome: self._own(entry, found(), outcome)
                handle = future._handle = Handle(self, rrid, me, 1)
                self.live[rrid] = future
        if future._is_over:
            future._report()
        elif future._call is None:  # made by hand: whoever it is sent to may set it, too
            self.owner.watch(entry, lambda outcome: self._set_elsewhere(found(), outcome))
        return handle

    def _set_elsewhere(self, future: Any, outcome: Outcome) -> None:
        """Any thread: an adopted future has its outcome, from its own process or from another one."""
        if future is not None and future._settle(outcome):
            self.node.deliver(future._run_callbacks)

    def _own(self, entry: Entry, future: Any, outcome: Outcome) -> None:
        """The outcome of an adopted future is there. Any thread."""
        if outcome.status < 0 or not carries_references(outcome.data):
            self.owner.settle(entry, outcome)
            return

        def work() -> None:
            with contextlib.suppress(Exception):  # which is the outcome then
                type(future).result(future, 0)  # also if this object was finalized meanwhile
            self.owner.settle(entry, future.outcome())

        self.node.deliver(work)  # the references in it live here from now on, as objects

    # -- giving back -------------------------------------------------------------------------------------------

    def drop(self, rrid: RRID, where: int, held: int) -> None:
        """`held` references are given back (finalizers: only atomic operations)."""
        self._dropped.append((rrid, where, held))
        self._flush_soon()

    def unread(self, status: int, data: Any, buffers: Any) -> None:
        """This value or error was sent to us, and nobody has opened it: its references are given back (as `drop`)."""
        self._unread.append((status, data, buffers))
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            try:
                self.node.loop.call_soon(self._flush)
            except BaseException:  # Ctrl-C in a finalizer: with the flag set and no flush on its way, none would come
                self._flushing = False
                raise

    def _open_unread(self) -> None:
        """On a library thread."""
        while self._unread:
            try:
                references_in(*self._unread.popleft())
            except Exception:  # whatever is in it: nobody wanted it
                log.debug("a value that nobody has opened could not be read either", exc_info=True)

    def _flush(self) -> None:
        self._flushing = False
        if self._unread:
            self.node.deliver(self._open_unread)
        changes: dict[int, list[list[int]]] = {}
        me, ahead = self.node.pid, self.node.ahead
        while self._dropped:
            rrid, where, held = self._dropped.popleft()
            if where == me:
                self.owner.change(rrid, me, -held)
            else:
                if ahead is not None:
                    ahead.retire(rrid)  # what was put into a channel comes before the news that nobody here holds it
                changes.setdefault(where, []).append([rrid.whence, rrid.id, me, -held])
        for where, rows in changes.items():
            self.node.peers.send(where, Kind.CLIENTS, structs.Clients(rows).pack())

    # -- sending on --------------------------------------------------------------------------------------------

    def lend(self, references: Iterable[Any], peer: int, change: int = 1) -> None:
        """These (what `codec.encode` has noted) go to `peer` in the message that the caller is about to send.

        `change=-1`: they did not.
        """
        changes: dict[int, list[list[int]]] = {}
        me = self.node.pid
        for reference in references:
            if type(reference) is not Loan:  # a future that took its value along, an executor
                continue
            handle = reference.handle
            if not handle.held and change > 0 and hasattr(reference.reference, "hold"):
                reference.reference.hold(handle)
            rrid, where = handle.rrid, handle.where
            if where == me:
                self.owner.change(rrid, peer, change)
            else:
                changes.setdefault(where, []).append([rrid.whence, rrid.id, peer, change])
        for where, rows in changes.items():
            self.node.peers.send(where, Kind.CLIENTS, structs.Clients(rows).pack())

    def lend_again(self, handles: Iterable[Handle]) -> None:
        """One count more for each, of this process: what has arrived with them is to arrive once more."""
        self.lend([Loan(None, handle) for handle in handles], self.node.pid)

    def reach_owners(self, references: Iterable[Any], peer: int) -> None:
        """Make links to the third processes that own these: what they are told does not wait in this process then, and
        go with it, while `peer` has got its message. Not on the leader."""
        peers = self.node.peers
        owners = {loan.handle.where for loan in references if type(loan) is Loan}
        for owner in owners - {self.node.pid, peer}:
            with contextlib.suppress(Exception):  # then it goes another way, or is dead
                peers.ensure(owner)

    @contextlib.contextmanager
    def lending(self, references: Iterable[Any], peer: int) -> Iterator[None]:
        """As `lend`; the message goes out inside. An interrupt comes before both or behind them: counted for a message
        that never came, they would be held for ever."""
        loop = self.node.loop
        if not loop.leads:
            self.reach_owners(references, peer)
        guard = loop.guard
        inside = guard.enter(None) if guard is not None else None
        try:
            deferred = loop.enter_critical()
            try:
                self.lend(references, peer)
                yield
            finally:
                if deferred:
                    loop.leave_critical()
        finally:
            if guard is not None and inside is not None:
                guard.leave(inside)

    def entrust(self, references: Iterable[Any]) -> list[tuple[int, int, int]]:
        """Worker: these go to the master in a result. Returns those that third processes own: `(owner, *identity)`.

        Of each of them this process holds one count more from now on, and that goes with the result: the master moves
        it to itself (`take_over`) when it has the result. Whatever this process's death takes along, its owner then
        counts right: a result that the master does not get leaves a count of this process, which ends with it; for
        one that the master gets, from the journal too, the master itself tells the owner, before it tells of the death.
        (Tried: `lend`. What is counted for the master by a message of ours is lost if we die before it has left, as
        when the link to the owner is being made: the owner drops the value, of which the master has a reference.)
        """
        rows: list[tuple[int, int, int]] = []
        changes: dict[int, list[list[int]]] = {}
        me = self.node.pid
        for reference in references:
            if type(reference) is not Loan:
                continue
            handle = reference.handle
            if not handle.held and hasattr(reference.reference, "hold"):
                reference.reference.hold(handle)
            rrid, where = handle.rrid, handle.where
            if where == me:
                self.owner.change(rrid, 1, 1)
            else:
                rows.append((where, *rrid))
                changes.setdefault(where, []).append([rrid.whence, rrid.id, me, 1])
        for where, added in changes.items():
            self.node.peers.send(where, Kind.CLIENTS, structs.Clients(added).pack())
        return rows

    def take_over(self, lender: int, rows: Iterable[tuple[int, int, int]]) -> None:
        """Leader of the master: a result of `lender` has come with these. In one message, ours first: the owner's count
        is not zero in between."""
        changes: dict[int, list[list[int]]] = {}
        me = self.node.pid
        for where, whence, ident in rows:
            if where == me:
                rrid = RRID(whence, ident)
                self.owner.change(rrid, me, 1)
                self.owner.change(rrid, lender, -1)
            else:
                changes.setdefault(where, []).extend(([whence, ident, me, 1], [whence, ident, lender, -1]))
        for where, moved in changes.items():
            self.node.peers.send(where, Kind.CLIENTS, structs.Clients(moved).pack())

    # -- frames (leader) ---------------------------------------------------------------------------------------

    def _on_clients(self, link: Link, frame: Frame) -> None:
        for whence, ident, pid, change in structs.Clients.unpack(frame.control).changes:
            self.owner.change(RRID(whence, ident), pid, change)

    def _on_unlinked(self, pid: int) -> None:
        """Leader: a link is lost, and with it perhaps a call, or the news of its end. Unless its process is gone, too,
        whoever waits for that would wait for ever."""
        held = []
        for found in self.live.valuerefs():
            reference = found()
            if reference is not None and reference._handle is not None and reference._handle.where == pid:
                held.append(found)
        if held:
            self.node.loop.call_later(_NEWS, lambda: self._link_lost(pid, held))

    def _link_lost(self, pid: int, held: list[Any]) -> None:
        for found in held if pid not in self.node.peers.dead else ():
            reference = found()
            if reference is not None:
                reference._link_lost()

    def _on_lost(self, pid: int) -> None:
        self.owner.forget_client(pid)
        make_error = self.node.peers.dead[pid]
        for found in self.live.valuerefs():  # one step, unlike `values`: other threads make references meanwhile
            reference = found()
            if reference is not None and reference._handle is not None and reference._handle.where == pid:
                reference._owner_lost(make_error)


def of(node: Node) -> Refs:
    """The references of `node`, made on first use."""
    if node.refs is None:
        node.refs = Refs(node)
    refs: Refs = node.refs
    return refs
