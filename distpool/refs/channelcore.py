"""The core of a `Channel`: items and those who wait, brought together without a thread that blocks (layer 4).

    offer, request, arrive, ... (any thread) -> `_do` -> `_match` -> callbacks

Producers elsewhere may have reserved some of the room (`refs.room`). While they may still have put something, a closed
channel that is empty keeps its takers waiting; and a put whose time is up while reserved room is being called back
waits for that answer: the room may be there.

`_lock` protects items, waiters and `_room`; callbacks run outside of it, in the thread that made them due (possibly the
leader), and only settle futures or send frames.

User code may run inside of it all the same: the collector runs a `__del__` between any two bytecodes, and a signal
handler comes as it likes. It may use this very channel, or wait for something that the leader has to bring. Hence:
    - What is to be done with the lock is put into `_later`, and done in that order by whoever has the lock or gets it
      (`_do`). A thread that has it already leaves it there, and comes to it when it has let go; so nobody meets a
      channel that is half changed. Nor does the leader wait for the lock.
    - `isready`, `isopen` and `len` look without it.
    - A `put` inside of the lock returns at once, and the item is in when the lock is free and there is room. So does a
      `close`. What can only be waited for (`take`, `fetch`, `wait`) raises RuntimeError there: nobody could answer.
    - The same holds in code that comes on the leader, if it would have to wait: no other thread could bring the answer.
(Tried: a reentrant lock alone. A `put` between a look at the room and the use of it overfilled the channel.)
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable
from typing import Any

from distpool.errors import ChannelClosedError
from distpool.node import node as nodes
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome
from distpool.refs.room import SMALLEST, Due, Room

_NO_FETCH = "`fetch` is not supported on an unbuffered Channel."
_LOOK = 0.05  # seconds

Callback = Callable[[Outcome], object]
#: What is done with the lock held; returns what is due outside of it.
Operation = Callable[[], "list[tuple[Waiter, Outcome]]"]


class Waiter:
    """Somebody who waits at a channel: `kind` is take, fetch, wait or put."""

    __slots__ = ("callback", "item", "kind", "late", "live", "pid")

    def __init__(self, kind: str, callback: Callback, item: Any = None, pid: int = 0) -> None:
        self.kind = kind
        self.callback = callback
        self.item = item
        self.pid = pid
        self.live = True
        self.late = False  # its time is up, but room is being called back


class Handed(Outcome):
    """An object of this process that goes to a taker elsewhere: its `put` returns when it has been serialised (`then`),
    because whoever put it may change it after that.
    """

    then: Callable[[], object]

    @classmethod
    def over(cls, putter: Waiter) -> Handed:
        """What `putter` has put."""
        made = cls(*putter.item)
        made.then = lambda: putter.callback(_DONE)
        return made


def leads() -> bool:
    """Whether the calling thread is the leader."""
    node = nodes.existing()
    return node is not None and node.loop.leads


def failed(error: BaseException) -> Outcome:
    return Outcome(RAISED_HERE, error, (), 0)


_DONE = Outcome(LOCAL_VALUE, None, (), 0)


class ChannelCore:
    """What a channel is to those who give callbacks: its server, and the blocking methods of `Channel`."""

    def __init__(self, maxsize: float, type: type) -> None:
        self.maxsize = maxsize
        self.type = type
        self._items: collections.deque[Outcome] = collections.deque()
        self._takers: collections.deque[Waiter] = collections.deque()  # take and fetch, in order of arrival
        self._watchers: list[Waiter] = []  # wait
        self._putters: collections.deque[Waiter] = collections.deque()
        self._room: Room | None = None  # made when another process puts something
        self._closed: BaseException | None = None
        self._lock: Any = threading.RLock()  # reentrant only so that it can tell whether this thread has it
        self._later: collections.deque[Operation] = collections.deque()  # to be done with the lock; atomic ends

    def offer(self, item: Outcome, callback: Callback, pid: int = 0) -> Waiter:
        """Put `item`; `callback(outcome)` when it is in (for a rendezvous: when it was taken)."""
        waiter = Waiter("put", callback, item, pid)

        def enter() -> list[tuple[Waiter, Outcome]]:
            if self._closed is not None:
                return [(self._served(waiter), failed(self._closed_error()))] if waiter.live else []
            self._putters.append(waiter)
            return self._match()

        self._do(enter)
        return waiter

    def request(self, kind: str, callback: Callback, pid: int = 0) -> Waiter:
        """take, fetch or wait; `callback(outcome)` with the item, or the error."""
        waiter = Waiter(kind, callback, None, pid)

        def enter() -> list[tuple[Waiter, Outcome]]:
            if kind == "fetch" and not self.maxsize:
                return [(waiter, failed(RuntimeError(_NO_FETCH)))]
            if kind == "wait":  # those that have given up go here: others wait until there is an item
                self._watchers = [watcher for watcher in self._watchers if watcher.live]
            (self._watchers if kind == "wait" else self._takers).append(waiter)
            return self._match()

        self._do(enter)
        return waiter

    def expire(self, waiter: Waiter) -> None:
        """Its time is up: it gets TimeoutError if it was not served before; within `room.PATIENCE` where room for it is
        being called back."""

        def end() -> list[tuple[Waiter, Outcome]]:
            room = self._room
            if room is not None and waiter.kind == "put" and waiter.live and room.is_coming_free:
                waiter.late = len(self._items) < self.maxsize
            return [] if waiter.late else self._given_up(waiter)

        self._do(end)

    def withdraw(self, waiter: Waiter, error: BaseException | None = None) -> None:
        """The waiter has given up: it gets TimeoutError, or `error`, if it was not served before."""
        self._do(lambda: self._given_up(waiter, error))

    def _given_up(self, waiter: Waiter, error: BaseException | None = None) -> list[tuple[Waiter, Outcome]]:
        if not waiter.live:
            return []
        waiter.item = None  # of a put: its place in the queue is found empty later, and the item may hold references
        return [(self._served(waiter), failed(error or TimeoutError()))]

    def restore(self, item: Outcome) -> None:
        """An item that was served to somebody who had given up: it goes back to the head."""

        def change() -> list[tuple[Waiter, Outcome]]:
            self._items.appendleft(item)
            return self._match()

        self._do(change)

    def _do(self, operation: Operation) -> None:
        """Do `operation()` with the lock, now or when whoever has it lets go; then call what it says is due."""
        self._later.append(operation)
        self._catch_up()

    def _catch_up(self) -> None:
        """Do what others have left. By everybody who has had the lock, behind letting go of it."""
        lock = self._lock
        while self._later and not lock._is_owned():
            if not leads():
                self._do_next()
                continue
            if lock.acquire(blocking=False):  # the leader is not interrupted
                try:
                    due = self._next_due()
                finally:
                    lock.release()
            else:  # whoever has it looks again; unless an interrupt ends him just then
                nodes.current().loop.call_later(_LOOK, self._catch_up)
                return
            self._call(due)

    def _do_next(self) -> None:
        """Not on the leader. No interrupt tears it: an item that was taken from the channel would be nobody's."""
        node = nodes.existing()
        guard = node.loop.guard if node is not None else None
        inside = guard.enter(None) if guard is not None else None
        try:
            deferred = node is not None and node.loop.enter_critical()
            try:
                with self._lock:
                    due = self._next_due()
                self._call(due)
            finally:
                if deferred:
                    node.loop.leave_critical()  # type: ignore[union-attr]
        finally:
            if guard is not None and inside is not None:
                guard.leave(inside)

    def _next_due(self) -> list[tuple[Waiter, Outcome]]:
        return self._later.popleft()() if self._later else []

    def _match(self) -> list[tuple[Waiter, Outcome]]:
        """Bring items and waiters together. Called with the lock held; returns what is due outside of it."""
        due: list[tuple[Waiter, Outcome]] = []
        room = self._room
        size = self.maxsize if room is None else self.maxsize - room.taken
        progress = True
        while progress:
            progress = False
            self._putters = _living(self._putters)
            self._takers = _living(self._takers)
            while self._putters and len(self._items) < size:
                putter = self._served(self._putters[0])
                self._items.append(putter.item)  # before it goes from there: who looks without the lock finds it
                self._putters.popleft()
                due.append((putter, _DONE))
                progress = True
            if self._takers and self._items:
                taker = self._served(self._takers.popleft())
                item = self._items[0] if taker.kind == "fetch" else self._items.popleft()
                due.append((taker, item))
                progress = True
            elif self._takers and self._putters and not self._items:
                putter, taker = self._served(self._putters.popleft()), self._served(self._takers.popleft())
                if taker.pid and putter.item.status == LOCAL_VALUE:
                    due.append((taker, Handed.over(putter)))
                else:
                    due.extend(((taker, putter.item), (putter, _DONE)))
                progress = True
        if self._watchers and (self._items or self._putters):
            due.extend((self._served(watcher), _DONE) for watcher in self._watchers if watcher.live)
            self._watchers = []
        if room is not None:
            due.extend(self._match_room(room))
        if self._closed is not None and not self._items and (room is None or not room.may_come):
            error = failed(self._closed_error())
            due.extend((self._served(waiter), error) for waiter in (*self._takers, *self._watchers) if waiter.live)
            self._takers.clear()
            self._watchers = []
        return due

    def _match_room(self, room: Room) -> list[tuple[Waiter, Outcome]]:
        """Called with the lock held, when puts and takes have been brought together."""
        due: list[tuple[Waiter, Outcome]] = []
        told: list[Due] = []
        if self._putters and not room.is_coming_free:
            late = [putter for putter in self._putters if putter.late]
            due = [ended for putter in late for ended in self._given_up(putter)]
        if self._closed is not None or (self._putters and room.taken):
            told = room.call_back()
        if room.held and self._space(room) >= room.enough:
            told.extend(room.let_go())
        due.extend(map(telling, told))
        return due

    def _space(self, room: Room) -> float:
        return self.maxsize - len(self._items) - room.taken

    @staticmethod
    def _served(waiter: Waiter) -> Waiter:
        waiter.live = False
        return waiter

    @staticmethod
    def _call(due: Iterable[tuple[Waiter, Outcome]]) -> None:
        for waiter, outcome in due:
            waiter.callback(outcome)

    def _closed_error(self) -> BaseException:
        reason = self._closed
        if isinstance(reason, ChannelClosedError):
            ours = type(reason).__module__ == ChannelClosedError.__module__
            error = (type(reason) if ours else ChannelClosedError)(*reason.args)
            error.__cause__ = reason.__cause__
            return error
        assert reason is not None
        return reason

    def forget_client(self, pid: int) -> None:
        """A process is gone: its waiters are nobody's."""

        def change() -> list[tuple[Waiter, Outcome]]:
            for waiter in (*self._takers, *self._watchers, *self._putters):
                if waiter.pid == pid:
                    self._served(waiter).item = None
            if self._room is None:
                return []
            self._room.answered(pid)
            return self._match()

        self._do(change)

    # -- items that other processes put ahead (leader, unless it says otherwise) --------------------------------

    def reserve(self, pid: int, ask: Callable[[int, int], object], told: Callable[[int, int], object]) -> None:
        """Any thread: room for items that `pid` may put ahead; `told(credit, epoch)` then. See `refs.room`."""
        plain = type(self).__base__ is ChannelCore  # a subclass of a user's may have overridden anything
        if self.maxsize < SMALLEST or self.type is not object or not plain:
            told(0, 0)
            return

        def change() -> list[tuple[Waiter, Outcome]]:
            room = self._room
            if room is None:
                room = self._room = Room(self.maxsize, ask)
            busy = self._closed is not None or any(putter.live for putter in self._putters)
            credit = room.grant(pid, 0 if busy else self._space(room))
            return [telling(lambda: told(*credit))]

        self._do(change)

    def arrive(self, pid: int, items: list[Outcome], told: Callable[[bool], object]) -> None:
        """What `pid` has put ahead; `told(False)` if the channel was closed, and not expecting it."""

        def change() -> list[tuple[Waiter, Outcome]]:
            room = self._room
            if self._closed is not None and (room is None or not room.may_come):
                return [telling(lambda: told(False))]
            if room is not None:
                room.use(pid, len(items))
            self._items.extend(items)
            waited = self._takers or self._watchers or self._putters or self._closed is not None
            return [*(self._match() if waited else ()), telling(lambda: told(True))]

        self._do(change)

    def answered(self, pid: int) -> None:
        """All that `pid` had put has come: its room is free."""
        self._change_room(lambda room: room.answered(pid))

    def give_back(self, pid: int, credit: int, epoch: int) -> None:
        """`pid` will not use so much of its credit."""
        self._change_room(lambda room: room.give_back(pid, credit, epoch))

    def overdue(self, pid: int, epoch: int) -> None:
        """`pid` should have answered by now."""
        self._change_room(lambda room: room.overdue(pid, epoch))

    def _change_room(self, change: Callable[[Room], object]) -> None:
        def work() -> list[tuple[Waiter, Outcome]]:
            if self._room is None:
                return []
            change(self._room)
            return self._match()

        self._do(work)

    def hold(self, answer: Due, first: Due) -> None:
        """Any thread: the answer to a put that had to wait. `first()` if it is the first one that is held back."""

        def change() -> list[tuple[Waiter, Outcome]]:
            room = self._room
            if room is None or self._closed is not None or self._space(room) >= room.enough:
                return [telling(answer)]
            room.held.append(answer)
            return [telling(first)] if len(room.held) == 1 else []

        self._do(change)

    def let_go(self) -> None:
        """Answers have been held back for long enough."""
        self._do(lambda: list(map(telling, self._held_back())))

    def _held_back(self) -> list[Due]:
        return self._room.let_go() if self._room is not None else []


def telling(tell: Due) -> tuple[Waiter, Outcome]:
    """Something that is due outside of the lock, as if somebody had waited for it."""
    return Waiter("room", lambda outcome: tell()), _DONE


def _living(waiters: collections.deque[Waiter]) -> collections.deque[Waiter]:
    if all(waiter.live for waiter in waiters):
        return waiters
    return collections.deque(waiter for waiter in waiters if waiter.live)
