"""Items that this process puts into channels of other processes without waiting for the answer (layer 4).

    put: serialised in the caller's thread -> credit left? -> batch --PUTS--> owner (`refs.room`)
                                                  none left -> CHANNEL "put", whose answer brings a new credit
    leader:  answer to PUTS -> more credit, next batch      REVOKE -> what was put, then the answer: no credit any more

The owner has reserved room for what is put on credit, so it fails only with the owner, or the connection to it; that
error is raised by the next put of the same thread, or is the outcome of the call that it runs. The first `FLYING`
frames go at once; then what is put is collected until an answer comes, or the batch is full. So a lonely item has no
delay, and many of them cost little more than being serialised. Items that carry references, or large buffers, take the
other way: references have to be lent, and who puts gigabytes must be slowed down.

Only workers put ahead. Nobody may see what a worker does after a put before he can see the item. Frames to the owner
itself are in order anyway (so only one channel at a time has a batch that was not sent: an item for another one sends
it); before anything that others can see leaves this process, what was put so far must have been acknowledged
(`settle_puts`). In a worker that is
    - the end of each call, whoever sent it (`Interrupts.call`): results, effects on this process's memory
    - a request to another process: remote calls, references, channels, puts to other owners, executors' handles
    - a change of a future that this process owns or the end of one of its channels, and a value of this process that
      another one asked for
That is enough, because user code of a worker has no other way to others in distpool: what the leader sends by itself
(answers, notices, items that others had put) was decided by one of these. What user code tells others without distpool
(files, sockets) is not waited for. All puts of the process are waited for, not only those of the thread: threads see
each other's doings in memory. But a thread that has put nothing waits no longer for an owner than one that is well
needs (`OTHERS`), once: whoever calls a process has nothing to do with where its other threads put something.

Takes and puts of this process in its own channels are not held up: a stage of a pipeline takes here and puts elsewhere.
They only tie the channel (`Aheads.tie`): what the server says of it to others waits (`Aheads.after`), but for the
answers to PUTS, which wait for nothing (three processes that put in a circle would wait for each other); those give no
credit then. In the master, what goes out is made by a dozen of paths, and most of it is not sent by the
thread that made it: there each put waits for its answer.

Tried and rejected: a batch per owner instead of per channel (one frame for all of its channels): nothing to gain, who
puts into several channels in turn is slower than the frames anyway.

`_lock` protects everything here. It is reentrant, because the collector may run a `__del__` that puts something while
it is held; nothing under it waits. An interrupt between taking a credit and keeping the item costs the credit, which
the owner gets back when somebody needs the room; a batch is sent behind the loop's guard.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from distpool.node import node as nodes
from distpool.refs.owner import RRID
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Future, Outcome, open_outcome
from distpool.wire import codec, structs
from distpool.wire.frames import Frame, Kind
from distpool.wire.records import PLAIN_ERROR, SPANS, VALUE

if TYPE_CHECKING:
    from distpool.node.node import Node
    from distpool.transport.ioloop import IoLoop
    from distpool.transport.link import Link

FLYING = 4  # frames of one channel that are sent without an answer to the first of them
BATCH = 128  # items, and bytes, of a batch that is sent at any rate
BATCH_BYTES = 1 << 16
OTHERS = 0.1  # seconds of waiting for what other threads have put
_MAIN = threading.main_thread().ident
UNANSWERED_BYTES = 4 << 20  # of one channel: from there on a put waits


class Teller:
    """Where a thread finds what became of its puts."""

    def __init__(self) -> None:
        self.errors: list[Outcome] = []


class _Flight:
    """A PUTS that was not answered yet: its items and bytes, and the threads that have put them."""

    __slots__ = ("count", "late", "size", "tellers")

    def __init__(self, count: int, size: int, tellers: set[Teller]) -> None:
        self.count = count
        self.size = size
        self.tellers = tellers
        self.late = False  # other threads have waited for it for long enough


class Ahead:
    """What this process puts ahead into one channel."""

    def __init__(self, group: Aheads, rrid: RRID, where: int, epoch: int) -> None:
        self.where = where
        self.credit = 0
        self.epoch = epoch  # credits of older ones are void
        self.rrid = rrid
        self.batch: list[bytes] = []
        self.size = 0  # bytes of the batch
        self.flying: set[_Flight] = set()
        self.unanswered = 0  # bytes that are flying
        self.tellers: set[Teller] = set()  # of the threads whose items are in the batch
        self.retired = False  # no object of the channel uses it any more
        self.puts = self.landed = 0  # items that were put ahead so far, and that were answered
        self._group = group

    def put(self, data: bytes, channel: Any) -> bool:
        """Keep this item, and see to it that it is sent; False: the owner has to be asked."""
        group = self._group
        if group.busy and group.is_busy_elsewhere(self):
            group.settle(self.where)
        if threading.get_ident() == _MAIN:
            return self._keep(data, channel)
        inside = group.enter()
        try:
            return self._keep(data, channel)
        finally:
            group.leave(inside)

    def _keep(self, data: bytes, channel: Any) -> bool:
        group = self._group
        with group.lock:
            if self.credit <= 0 or not group.may_put(self.where) or channel._finalized:
                return False
            large = len(data) > UNANSWERED_BYTES  # a batch is another copy, which there may be no memory for
            if large or (self.flying and self.unanswered + self.size + len(data) > UNANSWERED_BYTES):
                return False
            if group.pending is not None and group.pending is not self:
                group.pending.send()
            self.credit -= 1
            self.tellers.add(group.teller())
            group.busy[self] = None
            group.pending = self
            self.size += len(data)
            self.puts += 1
            self.batch.append(data)
            if len(self.flying) < FLYING or len(self.batch) >= BATCH or self.size >= BATCH_BYTES:
                self.send()
            return True

    def check(self) -> None:
        """Raise what became of former puts of this thread, once."""
        if self._group.failures:
            self._group.check()

    def send(self) -> None:
        """Send the batch. The lock is held."""
        if self._group.pending is self:
            self._group.pending = None
        if not self.batch:
            return
        peers, guard = self._group.node.peers, self._group.node.loop.guard
        inside = guard.enter(None) if guard is not None else None
        try:
            items, self.batch, size, self.size = self.batch, [], self.size, 0
            flight = _Flight(len(items), size, self.tellers)
            self.tellers = set()
            self.flying.add(flight)
            self.unanswered += size
            number = peers.requests.new(
                self.where,
                lambda status, data, buffers: self._answered(flight, Outcome(status, data, buffers, self.where)),
                lambda error: self._answered(flight, Outcome(RAISED_HERE, error, (), self.where)),
            )
            try:
                control = structs.Puts(number, *self.rrid, len(items)).pack()
                peers.send(self.where, Kind.PUTS, control, structs.pack_items(items))
            except BaseException as error:  # no memory: as any other end of these, or all would wait for an answer
                lost = Outcome(RAISED_HERE, error, (), self.where)
                if peers.requests.forget(number):
                    self._group.node.loop.call_soon(lambda: self._answered(flight, lost))
            if self.where in peers.dead:  # died between the looks: nobody else will say so
                peers.requests.fail(self.where, peers.dead[self.where])
        finally:
            if guard is not None and inside is not None:
                guard.leave(inside)

    def _answered(self, flight: _Flight, outcome: Outcome) -> None:
        """Leader (or a thread that has found the owner dead)."""
        group = self._group
        with group.lock:
            self.flying.discard(flight)
            self.unanswered -= flight.size
            self.landed += flight.count
            if outcome.status == VALUE:
                self.grant(*structs.CREDIT.unpack(outcome.data))
            else:
                self._fail(flight, outcome)
            if self.batch and len(self.flying) < FLYING:
                self.send()
            if not self.flying and not self.batch:
                group.busy.pop(self, None)
            group.landed(flight)
        group.show_landed()

    def _fail(self, flight: _Flight, outcome: Outcome) -> None:
        self.credit = 0
        self.landed += len(self.batch)
        self.batch, self.size = [], 0  # it would fail as well, or come behind what is lost
        for teller in flight.tellers | self.tellers:
            if not teller.errors:
                teller.errors.append(outcome)
                self._group.failures = True
        self.tellers.clear()

    def grant(self, credit: int, epoch: int) -> None:
        """The owner has reserved room. The lock is held."""
        if self.retired:
            self._group.give_back(self.rrid, self.where, credit, epoch)
        elif epoch == self.epoch:
            self.credit += credit


class _Landing(Future[Any]):
    """Settled when the answers to all these PUTS have come."""

    def __init__(self, loop: IoLoop, flights: set[_Flight]) -> None:
        self.flights = flights
        self._call = _Soon(loop)


class _Soon:
    """The `_call` of a `_Landing`: answered by another process's leader, so a task that waits keeps its slot."""

    brisk = True

    def __init__(self, loop: IoLoop) -> None:
        self.loop = loop

    def cancel(self) -> bool:
        """No."""
        return False

    def started(self) -> bool:
        """It was sent."""
        return True

    def waiting(self) -> AbstractContextManager[object]:
        """Nothing is given away."""
        return nullcontext()


Tie = list[tuple[Ahead, int]]
"""What has to arrive: channels, and how many of the items that were put ahead into each."""


class Aheads:
    """What this process puts ahead into all channels."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.lock: Any = threading.RLock()
        node.loop.held.append(self.lock._is_owned)  # type: ignore[attr-defined]
        self.busy: dict[Ahead, None] = {}  # those with items that have not been acknowledged
        self.pending: Ahead | None = None  # the one that has a batch which was not sent
        self.failures = False  # some thread has not been told yet of an error
        self._known: dict[RRID, Ahead] = {}  # of channels that somebody here holds
        self._landings: list[_Landing] = []
        self._deferred: list[tuple[Tie, Callable[[], object]]] = []  # what others may see when these have arrived
        self._local = threading.local()
        node.runner.interrupts.finish = self.finish
        node.runner.settle = lambda timeout: self.settle(0, timeout, all_alike=timeout is not None)

    def enter(self) -> Any:
        """Before `lock` is taken by a thread that will send: the guard of interrupts has a lock of its own, and who has
        that one may be in a `__del__` that puts something."""
        guard = self.node.loop.guard
        return guard.enter(None) if guard is not None else None

    def leave(self, inside: Any) -> None:
        """When it has been let go."""
        guard = self.node.loop.guard
        if guard is not None and inside is not None:
            guard.leave(inside)

    def may_put(self, where: int) -> bool:
        """Whether this thread may put something ahead at the moment."""
        node = self.node
        if where in node.peers.dead or nodes.existing() is not node:  # in a forked child it is not
            return False
        if self.failures and self.teller().errors:
            return False
        # The elements of a map run without anything that could wait behind each of them (`node.spans`).
        return not any(item.flags in SPANS for item in list(node.runner.running.values()))

    def is_busy_elsewhere(self, ahead: Ahead) -> bool:
        """Whether puts into channels of other owners than that of `ahead` have not been acknowledged."""
        if len(self.busy) == 1 and ahead in self.busy:
            return False
        return any(other.where != ahead.where for other in list(self.busy))

    def teller(self) -> Teller:
        """Of the calling thread."""
        found: Teller | None = getattr(self._local, "teller", None)
        if found is None:
            found = self._local.teller = Teller()
        return found

    def of(self, channel: Any, epoch: int) -> Ahead:
        """What is put ahead into this channel, made on first use. The lock is held."""
        made: Ahead | None = channel._ahead
        if made is None:
            handle = channel._handle
            made = self._known.get(handle.rrid)  # of an object of the same channel that has just gone
            if made is None:
                made = self._known[handle.rrid] = Ahead(self, handle.rrid, handle.where, epoch)
            channel._ahead = made
        return made

    def retire(self, rrid: RRID) -> None:
        """Leader: the object of this channel is gone. What it has put is sent, and its credit given back.

        So much and no more: another object of the same channel may have come this very moment, and have put something
        before our message; the answer brings it a credit of its own. (Tried: the owner takes back all that this process
        has. That credit was used all the same, on room that others had by then.) Answers that come later bring credits
        to nobody: each is given back when it comes.
        """
        with self.lock:
            ahead = self._known.get(rrid)
            if ahead is not None and self.node.refs.live.get(rrid) is None:
                del self._known[rrid]
                ahead.send()
                ahead.retired = True
                credit, ahead.credit = ahead.credit, 0
                self.give_back(rrid, ahead.where, credit, ahead.epoch)

    def give_back(self, rrid: RRID, where: int, credit: int, epoch: int) -> None:
        """Nobody here will use this credit. The owner minds it only if it is not void by then."""
        if credit:
            self.node.peers.send(where, Kind.PUTS, structs.Puts(0, *rrid, 0).pack(), structs.CREDIT.pack(credit, epoch))

    def settle(self, where: int = 0, timeout: float | None = None, all_alike: bool = False) -> None:
        """Wait until all that this process has put so far has arrived; what goes to process `where` is only sent.

        It ends with the answers of the owners, or their deaths (or after `timeout` seconds). KeyboardInterrupt ends it
        as any other wait. What other threads have put is waited for as long as an owner that is well may need: if one
        is stopped, only those who have put something there have to wait for it. `all_alike`: this process ends, so
        everything is waited for.
        """
        if not self.busy:
            return
        flights: set[_Flight] = set()
        inside = self.enter()
        try:
            with self.lock:
                for ahead in list(self.busy):
                    ahead.send()
                    if ahead.where != where:
                        flights.update(ahead.flying)
        finally:
            self.leave(inside)
        if not flights or self.node.loop.leads:
            return
        teller = self.teller()
        others = {flight for flight in flights if not all_alike and teller not in flight.tellers}
        if self._await({flight for flight in others if not flight.late}, OTHERS):
            for flight in others:
                flight.late = True
        self._await(flights - others, timeout)

    def _await(self, flights: set[_Flight], timeout: float | None) -> bool:
        """Wait for the answers to these; whether some have not come."""
        with self.lock:
            flights = {flight for ahead in self.busy for flight in ahead.flying if flight in flights}
            if not flights:
                return False
            landing = _Landing(self.node.loop, flights)
            self._landings.append(landing)
        return not landing._await(timeout)

    def tie(self) -> Tie:
        """What this process has put so far."""
        return [(ahead, ahead.puts) for ahead in list(self.busy)]

    def after(self, tie: Tie, show: Callable[[], object]) -> None:
        """Any thread: call `show()`, which others can see and which does not wait, when what `tie` says has arrived.

        As for `settle`: not later than an owner that is well may need, because it may be others that wait for it.
        """
        with self.lock:
            entry = (tie, show)
            waits = is_open(tie)
            if waits:
                self._deferred.append(entry)
        if waits:
            self.node.loop.call_later(OTHERS, lambda: self._show(entry))
        else:
            show()

    def _show(self, entry: tuple[Tie, Callable[[], object]]) -> None:
        with self.lock:
            if entry not in self._deferred:
                return
            self._deferred.remove(entry)
        entry[1]()

    def show_landed(self) -> None:
        """A PUTS was answered. Without the lock: to show a channel takes that of the channel, and whoever has that one
        may be in a `__del__` that puts something."""
        if self._deferred:
            with self.lock:
                due = [entry for entry in self._deferred if not is_open(entry[0])]
            for entry in due:
                self._show(entry)

    def landed(self, flight: _Flight) -> None:
        """A PUTS was answered. The lock is held."""
        for landing in list(self._landings):
            landing.flights.discard(flight)
            if not landing.flights:
                self._landings.remove(landing)
                landing._settle(Outcome(LOCAL_VALUE, None, (), 0))

    def finish(self) -> None:
        """At the end of a call, in its thread: what it has put has arrived, or why it has not is raised."""
        self.settle()
        if self.failures:
            self.check()

    def check(self) -> None:
        """Raise what became of former puts of this thread, once."""
        teller = self.teller()
        if teller.errors:
            outcome = teller.errors.pop()
            _, error = open_outcome(outcome) if outcome.status != PLAIN_ERROR else (None, codec.decode(outcome.data))
            if error is not None:
                raise error

    def on_revoke(self, message: structs.Revoke, where: int) -> None:
        """Leader: the room is needed by others; what was put so far is sent before the answer."""
        rrid = RRID(message.whence, message.ident)
        with self.lock:
            ahead = self._known.get(rrid)
            if ahead is None and self.node.refs.live.get(rrid) is not None:  # a credit may be on its way
                ahead = self._known[rrid] = Ahead(self, rrid, where, message.epoch)
            if ahead is not None:
                ahead.credit, ahead.epoch = 0, message.epoch
                ahead.send()


def is_open(tie: Tie) -> bool:
    """Whether some of it has not arrived."""
    return any(ahead.landed < puts for ahead, puts in tie)


def group_of(node: Node) -> Aheads | None:
    """What this process puts ahead, made on first use; None in the master."""
    if node.ahead is None and node.runner is not None:
        node.ahead = Aheads(node)
    group: Aheads | None = node.ahead
    return group


def settle_puts(where: int = 0) -> None:
    """Before anything leaves this process, but to `where`: what was put ahead must have arrived. See above."""
    node = nodes.existing()
    if node is not None and node.ahead is not None:
        node.ahead.settle(where)


def on_revoke(node: Node, link: Link, frame: Frame) -> None:
    """Leader: the owner of a channel calls our credit back."""
    message = structs.Revoke.unpack(frame.control)
    where = int(link.peer)
    group = group_of(node)
    if group is not None:
        group.on_revoke(message, where)
    node.peers.send(where, Kind.REPLY, structs.Reply(message.request, VALUE).pack())


__all__ = ["Ahead", "Aheads", "Tie", "group_of", "is_open", "on_revoke", "settle_puts"]
