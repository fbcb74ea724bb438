"""`Channel`: a bounded queue whose waiters are entries in a table, not threads (layer 4).

    put/take/fetch/wait (any thread) -> a waiter with a callback -> `_match` brings items and waiters together

`offer` and `request` take callbacks, and the blocking methods wait for theirs. So a blocked `take` from another process
costs the owner of the channel no thread. Items that came from other processes stay serialised until somebody here
takes them.

What user code may do in finalizers and signal handlers: `refs.channelcore`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distpool.config import as_int
from distpool.errors import ChannelClosedError, RemoteException
from distpool.node import node as nodes
from distpool.refs import gc
from distpool.refs.ahead import Tie, settle_puts
from distpool.refs.channelcore import Callback, ChannelCore, Waiter, failed, leads, telling
from distpool.refs.refs import (
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    LOCAL_VALUE,
    RAISED_HERE,
    Future,
    Outcome,
)
from distpool.refs.remote import _Waiting
from distpool.transport.ioloop import ON_LEADER
from distpool.wire import codec
from distpool.wire.failures import captured
from distpool.wire.messages import ERROR, UNSENDABLE
from distpool.wire.records import PLAIN_ERROR

_CLOSED = "Channel is closed."
#: Of each thread: the RemoteChannel through which it uses a channel of this process; it hears of who waits.
through: Any = threading.local()
_INSIDE = "a finalizer or signal handler that runs in the middle of an operation on this channel cannot wait for it"


class Channel(ChannelCore):
    """A queue between tasks of this process, or of all processes when a `RemoteChannel` stands before it.

    `maxsize` items fit in (`math.inf`: any number); 0 is a rendezvous (a `put` returns when a `take` took its item).
    `type`: a class, a tuple of classes or a union that items must be instances of (`TypeError` otherwise). Closed
    channels drain first: then `take` raises `ChannelClosedError`, and iteration ends. All methods may be called from
    any thread. In a `__del__` or a signal handler that happens to run in the middle of one of them, a `put` does not
    wait for room (the item is in when there is some), and `take`, `fetch` and `wait` raise RuntimeError where they
    would have to wait.

    Example: `c = Channel(10); c.put(1); c.take()`
    """

    by_callbacks = True
    """This very class does not block: the server may call it on the leader (`by_callbacks` below)."""

    def __init__(self, maxsize: float = 0, type: Any = object) -> None:
        maxsize = as_int(maxsize)
        if isinstance(maxsize, bool) or not isinstance(maxsize, int | float):
            raise TypeError("maxsize must be a number")
        if not maxsize >= 0:  # NaN too
            raise ValueError("maxsize must not be negative")
        if isinstance(maxsize, float) and not maxsize.is_integer() and maxsize != math.inf:
            raise ValueError("maxsize must be a whole number, or math.inf")
        try:
            isinstance(None, type)
        except TypeError:
            raise TypeError(f"type must be what isinstance() takes, not {type!r}") from None
        super().__init__(maxsize, type)
        self.tied: Tie = []  # see `refs.ahead`

    @property
    def eltype(self) -> Any:
        """What items must be instances of: the `type` it was made with."""
        return self.type

    # -- blocking methods --------------------------------------------------------------------------------------

    def put(self, value: Any, *, timeout: float | None = None) -> Channel:
        """Add an item, waiting for room; returns the channel. `TimeoutError` after `timeout` seconds, and then the
        item will not arrive."""
        self.check_type(value)
        item = Outcome(LOCAL_VALUE, value, (), 0)
        if type(self) is not Channel or not self._put_now(item):
            if not self._lock._is_owned():
                settle_puts()
            self._wait(lambda callback: self.offer(item, callback), timeout)
        return self

    def _put_now(self, item: Outcome) -> bool:
        """If there is room, and nobody waits."""
        self._tie()
        if self._lock._is_owned():
            return False
        with self._lock:
            taken = 0 if self._room is None else self._room.taken
            fits = not (
                len(self._items) + taken >= self.maxsize
                or self._closed is not None
                or self._putters
                or self._takers
                or self._watchers
                or self._later
            )
            if fits:
                self._items.append(item)
        if self._later:
            self._catch_up()
        return fits

    def take(self, *, timeout: float | None = None) -> Any:
        """Remove and return the first item, waiting for one."""
        if self._items and type(self) is Channel:
            found, value = self._take_now()
            if found:
                return value
        self._may_wait()
        settle_puts()
        return self._wait(lambda callback: self.request("take", callback), timeout)

    def _may_wait(self) -> None:
        if self._lock._is_owned():
            raise RuntimeError(_INSIDE)

    def _take_now(self) -> tuple[bool, Any]:
        """The first item, if there is one and nobody waits for it.

        `del` and the assignment behind it cannot be torn by KeyboardInterrupt, which is raised behind calls and
        backward jumps only: whatever is raised before the value is decoded finds out whether the item was removed.
        """
        item: Outcome | None = None
        removed = False
        self._tie()
        if self._lock._is_owned():
            return False, None
        try:
            due: Iterable[tuple[Waiter, Outcome]] = ()
            with self._lock:
                if self._items and not self._takers and not self._later:
                    item = self._items[0]
                    del self._items[0]
                    removed = True
                    if self._putters or (self._room is not None and self._room.held):
                        due = self._match()
            if due:
                self._call(due)
            if self._later:
                self._catch_up()
            if item is None:
                return False, None
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
        self._may_wait()
        return self._wait(lambda callback: self.request("fetch", callback), timeout)

    def wait(self, *, timeout: float | None = None) -> Channel:
        """Wait until there is an item (or, on a rendezvous channel, somebody who puts); returns the channel."""
        self._may_wait()
        self._wait(lambda callback: self.request("wait", callback), timeout)
        return self

    def _wait(self, start: Callable[[Callback], Waiter], timeout: float | None) -> Any:
        node = nodes.existing()
        reply: Future[Any] = ChannelReply()
        if node is not None:
            reply._call = _Waiting(gc.of(node))
        inside = self._lock._is_owned()
        taken: list[Waiter] = []  # a `take` that has been given up

        def served(outcome: Outcome) -> None:
            if not reply._finish(FINISHED, outcome) and taken:
                self._undo(taken[0], outcome)

        reference = getattr(through, "reference", None)
        waiter = start(served)
        try:
            if reference is not None and not reply.done():
                reference.note(waiter, lambda error: self.withdraw(waiter, error))
            if (inside or leads()) and not reply.done():  # nobody could answer: see above
                if waiter.kind == "put":
                    return None
                raise RuntimeError(_INSIDE if inside else ON_LEADER)
            if timeout is None or reply.done() or reply._await(timeout):
                return reply.result()
            self.expire(waiter)
            return reply.result()  # one that is late will hear soon
        except BaseException:
            taken.append(waiter)
            self.withdraw(waiter)
            if not reply._finish(CANCELLED_AND_NOTIFIED) and reply._raw is not None:
                self._undo(waiter, reply._raw)  # it was served while we gave up
            reply._exception = None  # its traceback has this frame: a cycle would keep what the callers hold
            raise
        finally:
            if reference is not None:
                reference.forget(waiter)

    def _undo(self, waiter: Waiter, outcome: Outcome) -> None:
        if waiter.kind == "take" and outcome.status != RAISED_HERE:
            self.restore(outcome)

    def isready(self) -> bool:
        """Whether an item is there (rendezvous: whether somebody puts)."""
        return bool(self._items) or any(putter.live for putter in self._putters.copy()) or bool(self._items)

    def isopen(self) -> bool:
        """Whether the channel takes items."""
        return self._closed is None

    def close(self, error: BaseException | None = None) -> None:
        """No more items; waiters are woken once it is drained. With `error`, that is what they get. Idempotent."""
        if self._lock._is_owned():
            self._tie()
        else:
            settle_puts()

        def change() -> list[tuple[Waiter, Outcome]]:
            if self._closed is not None:
                return []
            self._closed = error if error is not None else ChannelClosedError(_CLOSED)
            ended = [(self._served(putter), failed(self._closed_error())) for putter in self._putters if putter.live]
            ended.extend(map(telling, self._held_back()))
            self._putters.clear()
            return ended + self._match()

        self._do(change)

    def check_type(self, value: Any) -> None:
        """TypeError if `value` is not what this channel is for."""
        if self.type is not object and not isinstance(value, self.type):
            raise TypeError(f"this channel takes {_named(self.type)}, not {type(value).__name__}")

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
        items = [_opened(item) for item in self._items.copy()]  # without the lock: opening runs user code
        return _rebuild_channel, (self.maxsize, self.type, items, self._closed is not None)


def _rebuild_channel(maxsize: int, kind: type, items: list[Any], closed: bool) -> Channel:
    channel = Channel(maxsize, kind)
    channel._items.extend(Outcome(LOCAL_VALUE, item, (), 0) for item in items)
    if closed:
        channel.close()
    return channel


#: What the server and the waiting methods stand on, beside the operation itself.
_MACHINERY = ("request", "offer", "restore", "withdraw", "expire")


def by_callbacks(channel: Any, op: str) -> bool:
    """Whether the server may do this operation with callbacks, on the leader: in a subclass of the user's only what it
    has left as it was. Runs no code of the user's."""
    kind = type(channel)
    if "by_callbacks" in vars(kind):
        return True
    names = {op, *_MACHINERY} if op != "put" else {op, "check_type", *_MACHINERY}
    for cls in kind.__mro__:
        if cls is Channel:
            return names.isdisjoint(vars(channel))
        if not names.isdisjoint(vars(cls)):
            return False
    return False


def is_of_channel(channel: Any, error: BaseException) -> bool:
    """Whether `error` is a Channel's own, which arrives as itself everywhere, and not one of the user's code: also in
    methods of his subclass that call ours."""
    if "by_callbacks" in vars(type(channel)):
        return isinstance(error, (ChannelClosedError, TimeoutError, TypeError))
    if not isinstance(channel, Channel):
        return False
    if isinstance(error, TypeError):
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        return where is not None and where.tb_frame.f_code is Channel.check_type.__code__
    return isinstance(error, (ChannelClosedError, TimeoutError))


def _named(kind: Any) -> str:
    if isinstance(kind, tuple):
        return " or ".join(map(_named, kind))
    return str(getattr(kind, "__name__", kind))


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
