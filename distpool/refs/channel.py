"""`Channel`: a bounded queue whose waiters are entries in a table, not threads (layer 4).

    put/take/fetch/wait (any thread) -> a waiter with a callback -> `_match` brings items and waiters together

`offer` and `request` take callbacks, and the blocking methods wait for theirs. So a blocked `take` from another process
costs the owner of the channel no thread. Items that came from other processes stay serialised until somebody here
takes them.

`_lock` protects items and waiters; callbacks run outside of it, in the thread that made them due (possibly the leader),
and only settle futures or send frames.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Any

from distpool.errors import ChannelClosedError, RemoteException
from distpool.node import node as nodes
from distpool.refs import gc
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Future, Outcome
from distpool.refs.remote import _Waiting
from distpool.wire import codec
from distpool.wire.failures import captured
from distpool.wire.messages import ERROR, UNSENDABLE

#: Status of a reply: a library error that arrives as itself (ChannelClosedError, TimeoutError, TypeError).
PLAIN_ERROR = 4
_CLOSED = "Channel is closed."
_NO_FETCH = "`fetch` is not supported on an unbuffered Channel."

Callback = Callable[[Outcome], object]


class Waiter:
    """Somebody who waits at a channel: `kind` is take, fetch, wait or put."""

    __slots__ = ("callback", "item", "kind", "live", "pid")

    def __init__(self, kind: str, callback: Callback, item: Any = None, pid: int = 0) -> None:
        self.kind = kind
        self.callback = callback
        self.item = item
        self.pid = pid
        self.live = True


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
                (self._watchers if kind == "wait" else self._takers).append(waiter)
                due = self._match()
        self._call(due)
        return waiter

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
        progress = True
        while progress:
            progress = False
            self._putters = _living(self._putters)
            self._takers = _living(self._takers)
            while self._putters and len(self._items) < self.maxsize:
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
        if self._closed is not None and not self._items:
            error = _failed(self._closed_error())
            due.extend((self._served(waiter), error) for waiter in (*self._takers, *self._watchers) if waiter.live)
            self._takers.clear()
            self._watchers = []
        return due

    @staticmethod
    def _served(waiter: Waiter) -> Waiter:
        waiter.live = False
        return waiter

    @staticmethod
    def _call(due: list[tuple[Waiter, Outcome]]) -> None:
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

    # -- blocking methods --------------------------------------------------------------------------------------

    def put(self, value: Any, *, timeout: float | None = None) -> Channel:
        """Add an item, waiting for room; returns the channel. `TimeoutError` after `timeout` seconds, and then the
        item will not arrive."""
        self.check_type(value)
        self._wait(lambda callback: self.offer(Outcome(LOCAL_VALUE, value, (), 0), callback), timeout)
        return self

    def take(self, *, timeout: float | None = None) -> Any:
        """Remove and return the first item, waiting for one."""
        return self._wait(lambda callback: self.request("take", callback), timeout)

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
            return reply.result(timeout)
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
        with self._lock:
            if self._closed is not None:
                return
            self._closed = error if error is not None else ChannelClosedError(_CLOSED)
            failed = [(self._served(putter), _failed(self._closed_error())) for putter in self._putters if putter.live]
            self._putters.clear()
            due = self._match()
        self._call(failed + due)

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
            return None, codec.decode(raw.data)
        if raw.status in (ERROR, UNSENDABLE):
            return None, RemoteException(raw.pid, captured(raw.data))
        return super()._open(raw)
