"""`Channel`: a bounded queue whose waiters are entries in a table, not threads (layer 4).

    put/take/fetch/wait (any thread) -> a waiter with a callback -> `_match` brings items and waiters together

`offer` and `request` take callbacks, and the blocking methods wait for theirs. So a blocked `take` from another process
costs the owner of the channel no thread. Items that came from other processes stay serialised until somebody here
takes them.

Producers elsewhere may have reserved some of the room (`refs.room`). While they may still have put something, a closed
channel that is empty keeps its takers waiting; and a put whose time is up while reserved room is being called back
waits for that answer: the room may be there.

`_lock` protects items, waiters and `_room`; callbacks run outside of it, in the thread that made them due (possibly the
leader), and only settle futures or send frames.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distpool.errors import ChannelClosedError, RemoteException
from distpool.node import node as nodes
from distpool.refs import gc
from distpool.refs.ahead import Tie, settle_puts
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Future, Outcome
from distpool.refs.remote import _Waiting
from distpool.refs.room import SMALLEST, Due, Room
from distpool.wire import codec
from distpool.wire.failures import captured
from distpool.wire.messages import ERROR, UNSENDABLE
from distpool.wire.records import PLAIN_ERROR

_CLOSED = "Channel is closed."
_NO_FETCH = "`fetch` is not supported on an unbuffered Channel."

Callback = Callable[[Outcome], object]


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


def _failed(error: BaseException) -> Outcome:
    return Outcome(RAISED_HERE, error, (), 0)


_DONE = Outcome(LOCAL_VALUE, None, (), 0)


class Channel:
    """A queue between tasks of this process, or of all processes when a `RemoteChannel` stands before it.

    `maxsize` items fit in; 0 is a rendezvous (a `put` returns when a `take` took its item). `type`: what items must be
    instances of (`TypeError` otherwise). Closed channels drain first: then `take` raises `ChannelClosedError`, and
    iteration ends. All methods may be called from any thread.

    Example: `c = Channel(10); c.put(1); c.take()`
    """

    by_callbacks = True
    """This very class (not its subclasses) does not block: the server may call it on the leader."""

    def __init__(self, maxsize: int = 0, type: type = object) -> None:
        if isinstance(maxsize, bool) or not isinstance(maxsize, int | float):
            raise TypeError("maxsize must be a number")
        if maxsize < 0:
            raise ValueError("maxsize must not be negative")
        self.maxsize = maxsize
        self.type = type
        self._items: collections.deque[Outcome] = collections.deque()
        self._takers: collections.deque[Waiter] = collections.deque()  # take and fetch, in order of arrival
        self._watchers: list[Waiter] = []  # wait
        self._putters: collections.deque[Waiter] = collections.deque()
        self._room: Room | None = None  # made when another process puts something
        self.tied: Tie = []  # see `refs.ahead`
        self._closed: BaseException | None = None
        self._lock = threading.Lock()

    # -- asynchronous core -------------------------------------------------------------------------------------

    def offer(self, item: Outcome, callback: Callback, pid: int = 0) -> Waiter:
        """Put `item`; `callback(outcome)` when it is in (for a rendezvous: when it was taken)."""
        waiter = Waiter("put", callback, item, pid)
        with self._lock:
            if self._closed is not None:
                due = [(waiter, _failed(self._closed_error()))]
            else:
                self._putters.append(waiter)
                due = self._match()
        self._call(due)
        return waiter

    def request(self, kind: str, callback: Callback, pid: int = 0) -> Waiter:
        """take, fetch or wait; `callback(outcome)` with the item, or the error."""
        waiter = Waiter(kind, callback, None, pid)
        with self._lock:
            if kind == "fetch" and not self.maxsize:
                due = [(waiter, _failed(RuntimeError(_NO_FETCH)))]
            else:
                if kind == "wait":  # those that have given up go here: others wait until there is an item
                    self._watchers = [watcher for watcher in self._watchers if watcher.live]
                (self._watchers if kind == "wait" else self._takers).append(waiter)
                due = self._match()
        self._call(due)
        return waiter

    def expire(self, waiter: Waiter) -> bool:
        """Its time is up; False if it was served before, or will hear within `room.PATIENCE`."""
        with self._lock:
            room = self._room
            if room is not None and waiter.kind == "put" and waiter.live and room.is_coming_free:
                waiter.late = len(self._items) < self.maxsize
            if waiter.late:
                return False
            was, waiter.live = waiter.live, False
            return was

    def withdraw(self, waiter: Waiter) -> bool:
        """The waiter has given up; False if it was served before."""
        with self._lock:
            was, waiter.live = waiter.live, False
            return was

    def restore(self, item: Outcome) -> None:
        """An item that was served to somebody who had given up: it goes back to the head."""
        with self._lock:
            self._items.appendleft(item)
            due = self._match()
        self._call(due)

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
                putter = self._served(self._putters.popleft())
                self._items.append(putter.item)
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
            error = _failed(self._closed_error())
            due.extend((self._served(waiter), error) for waiter in (*self._takers, *self._watchers) if waiter.live)
            self._takers.clear()
            self._watchers = []
        return due

    def _match_room(self, room: Room) -> list[tuple[Waiter, Outcome]]:
        """Called with the lock held, when puts and takes have been brought together."""
        due: list[tuple[Waiter, Outcome]] = []
        told: list[Due] = []
        if self._putters and not room.is_coming_free:
            due = [(self._served(putter), _failed(TimeoutError())) for putter in self._putters if putter.late]
        if self._closed is not None or (self._putters and room.taken):
            told = room.call_back()
        if room.held and self._space(room) >= room.enough:
            told.extend(room.let_go())
        due.extend(map(_telling, told))
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
            error = ChannelClosedError(*reason.args)
            error.__cause__ = reason.__cause__
            return error
        assert reason is not None
        return reason

    def forget_client(self, pid: int) -> None:
        """A process is gone: its waiters are nobody's."""
        with self._lock:
            for waiter in (*self._takers, *self._watchers, *self._putters):
                if waiter.pid == pid:
                    waiter.live = False
            if self._room is None:
                return
        self.answered(pid)

    # -- items that other processes put ahead (leader, unless it says otherwise) --------------------------------

    def reserve(self, pid: int, ask: Callable[[int, int], object]) -> tuple[int, int]:
        """Any thread: room for items that `pid` may put ahead, and the epoch of that credit. See `refs.room`."""
        if self.maxsize < SMALLEST or self.type is not object or type(self) is not Channel:
            return 0, 0
        with self._lock:
            room = self._room
            if room is None:
                room = self._room = Room(self.maxsize, ask)
            busy = self._closed is not None or any(putter.live for putter in self._putters)
            return room.grant(pid, 0 if busy else self._space(room))

    def arrive(self, pid: int, items: list[Outcome]) -> bool:
        """What `pid` has put ahead; False if the channel was closed, and not expecting it."""
        with self._lock:
            room = self._room
            if self._closed is not None and (room is None or not room.may_come):
                return False
            if room is not None:
                room.use(pid, len(items))
            self._items.extend(items)
            due = self._match() if self._takers or self._watchers or self._putters or self._closed is not None else ()
        self._call(due)
        return True

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
        with self._lock:
            if self._room is None:
                return
            change(self._room)
            due = self._match()
        self._call(due)

    def hold(self, answer: Due) -> bool:
        """Any thread: the answer to a put that had to wait. True: it is the first one that is held back."""
        with self._lock:
            room = self._room
            if room is not None and self._closed is None and self._space(room) < room.enough:
                room.held.append(answer)
                return len(room.held) == 1
        answer()
        return False

    def let_go(self) -> None:
        """Answers have been held back for long enough."""
        with self._lock:
            held = self._room.let_go() if self._room is not None else []
        for answer in held:
            answer()

    # -- blocking methods --------------------------------------------------------------------------------------

    def put(self, value: Any, *, timeout: float | None = None) -> Channel:
        """Add an item, waiting for room; returns the channel. `TimeoutError` after `timeout` seconds, and then the
        item will not arrive."""
        self.check_type(value)
        item = Outcome(LOCAL_VALUE, value, (), 0)
        if type(self) is not Channel or not self._put_now(item):
            settle_puts()
            self._wait(lambda callback: self.offer(item, callback), timeout)
        return self

    def _put_now(self, item: Outcome) -> bool:
        """If there is room, and nobody waits."""
        self._tie()
        with self._lock:
            taken = 0 if self._room is None else self._room.taken
            if (
                len(self._items) + taken >= self.maxsize
                or self._closed is not None
                or self._putters
                or self._takers
                or self._watchers
            ):
                return False
            self._items.append(item)
            return True

    def take(self, *, timeout: float | None = None) -> Any:
        """Remove and return the first item, waiting for one."""
        if self._items and type(self) is Channel:
            found, value = self._take_now()
            if found:
                return value
        settle_puts()
        return self._wait(lambda callback: self.request("take", callback), timeout)

    def _take_now(self) -> tuple[bool, Any]:
        """The first item, if there is one and nobody waits for it.

        `del` and the assignment behind it cannot be torn by KeyboardInterrupt, which is raised behind calls and
        backward jumps only: whatever is raised before the value is decoded finds out whether the item was removed.
        """
        item: Outcome | None = None
        removed = False
        self._tie()
        try:
            with self._lock:
                if not self._items or self._takers:
                    return False, None
                item = self._items[0]
                del self._items[0]
                removed = True
                due = self._match() if self._putters or (self._room is not None and self._room.held) else ()
            if due:
                self._call(due)
            if item.status == LOCAL_VALUE:
                return True, item.data
            return True, codec.decode(item.data, item.buffers)
        except KeyboardInterrupt:
            if removed and item is not None:
                self.restore(item)
            raise

    def _tie(self) -> None:
        """This process is about to change the channel: others hear of it when what it has put ahead has arrived."""
        node = nodes.existing()
        if node is not None and node.ahead is not None and node.ahead.busy:
            self.tied = node.ahead.tie()

    def fetch(self, *, timeout: float | None = None) -> Any:
        """Return the first item without removing it, waiting for one. RuntimeError on a rendezvous channel."""
        return self._wait(lambda callback: self.request("fetch", callback), timeout)

    def wait(self, *, timeout: float | None = None) -> Channel:
        """Wait until there is an item (or, on a rendezvous channel, somebody who puts); returns the channel."""
        self._wait(lambda callback: self.request("wait", callback), timeout)
        return self

    def _wait(self, start: Callable[[Callback], Waiter], timeout: float | None) -> Any:
        node = nodes.existing()
        reply: Future[Any] = ChannelReply()
        if node is not None:
            reply._call = _Waiting(gc.of(node))
        waiter = start(lambda outcome: reply._settle(outcome))
        try:
            if timeout is None or reply.done() or reply._await(timeout) or not self.expire(waiter):
                return reply.result()  # one that is late will hear soon
            raise TimeoutError
        except BaseException:
            if self.withdraw(waiter) or not reply.done():
                raise
            outcome = reply._raw
            if waiter.kind == "take" and outcome is not None and outcome.status != RAISED_HERE:
                self.restore(outcome)  # it was served while we gave up
            raise

    def isready(self) -> bool:
        """Whether an item is there (rendezvous: whether somebody puts)."""
        with self._lock:
            return bool(self._items) or any(putter.live for putter in self._putters)

    def isopen(self) -> bool:
        """Whether the channel takes items."""
        return self._closed is None

    def close(self, error: BaseException | None = None) -> None:
        """No more items; waiters are woken once it is drained. With `error`, that is what they get. Idempotent."""
        settle_puts()
        with self._lock:
            if self._closed is not None:
                return
            self._closed = error if error is not None else ChannelClosedError(_CLOSED)
            failed = [(self._served(putter), _failed(self._closed_error())) for putter in self._putters if putter.live]
            failed.extend(map(_telling, self._held_back()))
            self._putters.clear()
            due = self._match()
        self._call(failed + due)

    def _held_back(self) -> list[Due]:
        return self._room.let_go() if self._room is not None else []

    def check_type(self, value: Any) -> None:
        """TypeError if `value` is not what this channel is for."""
        if self.type is not object and not isinstance(value, self.type):
            raise TypeError(f"this channel takes {self.type.__name__}, not {type(value).__name__}")

    def __len__(self) -> int:
        return len(self._items)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                value = self.take()
            except ChannelClosedError:
                return
            yield value

    def __reduce__(self) -> Any:
        with self._lock:
            items = [_opened(item) for item in self._items]
        return _rebuild_channel, (self.maxsize, self.type, items, self._closed is not None)


def _telling(tell: Due) -> tuple[Waiter, Outcome]:
    """Something that is due outside of the lock, as if somebody had waited for it."""
    return Waiter("room", lambda outcome: tell()), _DONE


def _rebuild_channel(maxsize: int, kind: type, items: list[Any], closed: bool) -> Channel:
    channel = Channel(maxsize, kind)
    channel._items.extend(Outcome(LOCAL_VALUE, item, (), 0) for item in items)
    if closed:
        channel.close()
    return channel


def _living(waiters: collections.deque[Waiter]) -> collections.deque[Waiter]:
    if all(waiter.live for waiter in waiters):
        return waiters
    return collections.deque(waiter for waiter in waiters if waiter.live)


def _opened(item: Outcome) -> Any:
    return item.data if item.status == LOCAL_VALUE else codec.decode(item.data, item.buffers)


class ChannelReply(Future[Any]):
    """The answer to a channel operation."""

    def _open(self, raw: Outcome) -> tuple[Any, BaseException | None]:
        if raw.status == LOCAL_VALUE:
            return raw.data, None
        if raw.status == PLAIN_ERROR:
            return None, codec.decode(raw.failure)
        if raw.status in (ERROR, UNSENDABLE):
            return None, RemoteException(raw.pid, captured(raw.failure))
        return super()._open(raw)
