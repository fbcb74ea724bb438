"""`Channel` and `RemoteChannel` (layer 4).

    RemoteChannel.put/take/... -> owner here: the channel itself;  elsewhere: CHANNEL request -> owner -> REPLY

A `Channel` is a bounded queue whose waiters are entries in a table, not threads: `offer` and `request` take callbacks,
and the blocking methods wait for theirs. So a blocked `take` from another process costs its owner no thread. A user's
own channel class is called on a library thread instead. Items that came from other processes stay serialised until
somebody here takes them.

`_lock` of a channel protects its items and waiters; callbacks run outside of it, in the thread that made them due
(possibly the leader), and only settle futures or send frames.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from distpool.errors import ChannelClosedError, RemoteException
from distpool.node import node as nodes
from distpool.refs import gc
from distpool.refs.gc import Handle
from distpool.refs.owner import RRID
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Future, Outcome
from distpool.refs.remote import Serving, _Waiting, serving, stable
from distpool.wire import codec, messages
from distpool.wire.failures import captured
from distpool.wire.frames import Frame, Kind
from distpool.wire.messages import ERROR, UNSENDABLE, VALUE

if TYPE_CHECKING:
    from distpool.node.node import Node
    from distpool.transport.link import Link

#: Status of a reply: a library error that arrives as itself (ChannelClosedError, TimeoutError, TypeError).
PLAIN_ERROR = 4
_CLOSED = "Channel is closed."
_NO_FETCH = "`fetch` is not supported on an unbuffered Channel."

Callback = Callable[[Outcome], object]


class _Waiter:
    """Somebody who waits at a channel: `kind` is take, fetch, wait or put."""

    __slots__ = ("callback", "item", "kind", "live", "pid")

    def __init__(self, kind: str, callback: Callback, item: Any = None, pid: int = 0) -> None:
        self.kind = kind
        self.callback = callback
        self.item = item
        self.pid = pid
        self.live = True


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

    def __init__(self, maxsize: int = 0, type: type = object) -> None:
        if isinstance(maxsize, bool) or not isinstance(maxsize, int | float):
            raise TypeError("maxsize must be a number")
        if maxsize < 0:
            raise ValueError("maxsize must not be negative")
        self.maxsize = maxsize
        self.type = type
        self._items: collections.deque[Outcome] = collections.deque()
        self._takers: collections.deque[_Waiter] = collections.deque()  # take and fetch, in order of arrival
        self._watchers: list[_Waiter] = []  # wait
        self._putters: collections.deque[_Waiter] = collections.deque()
        self._closed: BaseException | None = None
        self._lock = threading.Lock()

    # -- asynchronous core -------------------------------------------------------------------------------------

    def offer(self, item: Outcome, callback: Callback, pid: int = 0) -> _Waiter:
        """Put `item`; `callback(outcome)` when it is in (for a rendezvous: when it was taken)."""
        waiter = _Waiter("put", callback, item, pid)
        with self._lock:
            if self._closed is not None:
                due = [(waiter, _failed(self._closed_error()))]
            else:
                self._putters.append(waiter)
                due = self._match()
        self._call(due)
        return waiter

    def request(self, kind: str, callback: Callback, pid: int = 0) -> _Waiter:
        """take, fetch or wait; `callback(outcome)` with the item, or the error."""
        waiter = _Waiter(kind, callback, None, pid)
        with self._lock:
            if kind == "fetch" and not self.maxsize:
                due = [(waiter, _failed(RuntimeError(_NO_FETCH)))]
            else:
                (self._watchers if kind == "wait" else self._takers).append(waiter)
                due = self._match()
        self._call(due)
        return waiter

    def withdraw(self, waiter: _Waiter) -> bool:
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

    def _match(self) -> list[tuple[_Waiter, Outcome]]:
        """Bring items and waiters together. Called with the lock held; returns what is due outside of it."""
        due: list[tuple[_Waiter, Outcome]] = []
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
    def _served(waiter: _Waiter) -> _Waiter:
        waiter.live = False
        return waiter

    @staticmethod
    def _call(due: list[tuple[_Waiter, Outcome]]) -> None:
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

    def _wait(self, start: Callable[[Callback], _Waiter], timeout: float | None) -> Any:
        node = nodes.existing()
        reply: Future[Any] = _ChannelReply()
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


def _living(waiters: collections.deque[_Waiter]) -> collections.deque[_Waiter]:
    if all(waiter.live for waiter in waiters):
        return waiters
    return collections.deque(waiter for waiter in waiters if waiter.live)


def _opened(item: Outcome) -> Any:
    return item.data if item.status == LOCAL_VALUE else codec.decode(item.data, item.buffers)


class _ChannelReply(Future[Any]):
    """The answer to a channel operation."""

    def _open(self, raw: Outcome) -> tuple[Any, BaseException | None]:
        if raw.status == LOCAL_VALUE:
            return raw.data, None
        if raw.status == PLAIN_ERROR:
            return None, codec.decode(raw.data)
        if raw.status in (ERROR, UNSENDABLE):
            return None, RemoteException(raw.pid, captured(raw.data))
        return super()._open(raw)


class RemoteChannel:
    """A channel that any process of the group may use; it lives on process `pid` (default: this one).

    `factory()` makes the channel there: a `Channel`, or an object of a class of your own with `put take fetch isready
    wait close isopen`, which get the extra positional arguments of the calls. Default: `Channel(1)`. Sending a
    RemoteChannel sends an identifier; the channel is freed when no process holds it any more.

    Example: `rc = RemoteChannel(lambda: Channel(10), 2); rc.put(1); rc.take()`
    """

    _handle: Handle | None
    _finalized = False

    def __init__(self, factory: Callable[[], Any] | int | None = None, pid: int | None = None) -> None:
        if isinstance(factory, int):
            factory, pid = None, factory
        node = _node()
        refs = gc.of(node)
        where = node.pid if pid is None else pid
        make = factory if factory is not None else _channel_of_one
        self._refs = refs
        rrid = refs.new_id()
        if where == node.pid:
            channel = make()
            entry = refs.owner.touch(rrid, where)
            entry.channel = channel
        else:
            node.peers.ensure(where)
        self._handle = Handle(refs, rrid, where, 1)
        if where != node.pid:
            self._make_there(make)
        refs.live[rrid] = self

    def _make_there(self, make: Callable[[], Any]) -> None:
        handle = self._live()
        seen: list[Any] = []
        data, buffers = codec.encode(make, handle.where, seen)
        self._refs.lend(seen, handle.where)
        try:
            self._request("make", data, stable(buffers), None).result()
        except BaseException:
            handle.held = 0  # the owner has no entry of it
            raise

    # -- identity ----------------------------------------------------------------------------------------------

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
        if not isinstance(other, RemoteChannel):
            return NotImplemented
        return (self.whence, self.id) == (other.whence, other.id) and (self.id != 0 or self is other)

    def __hash__(self) -> int:
        return hash((self.whence, self.id))

    def __repr__(self) -> str:
        return f"RemoteChannel(where={self.where}, whence={self.whence}, id={self.id})"

    def _live(self) -> Handle:
        if self._finalized:
            raise RuntimeError("this reference was finalized")
        if self._handle is None:
            raise RuntimeError("this is a dead handle: it was pickled outside of a distpool message")
        return self._handle

    # -- operations --------------------------------------------------------------------------------------------

    def put(self, *values: Any, timeout: float | None = None) -> RemoteChannel:
        """Add an item, waiting for room (extra arguments go to a channel class of your own); returns the channel."""
        self._do("put", values, timeout)
        return self

    def take(self, *arguments: Any, timeout: float | None = None) -> Any:
        """Remove and return the first item; `ChannelClosedError`, `TimeoutError` (then no item is lost)."""
        return self._do("take", arguments, timeout)

    def fetch(self, *arguments: Any, timeout: float | None = None) -> Any:
        """Return the first item without removing it."""
        return self._do("fetch", arguments, timeout)

    def wait(self, *arguments: Any, timeout: float | None = None) -> RemoteChannel:
        """Wait until there is an item; returns the channel."""
        self._do("wait", arguments, timeout)
        return self

    def isready(self, *arguments: Any) -> bool:
        """Whether an item is there."""
        return bool(self._do("isready", arguments, None))

    def isopen(self) -> bool:
        """Whether the channel takes items."""
        return bool(self._do("isopen", (), None))

    def close(self) -> None:
        """Close the channel; see `Channel.close`."""
        self._do("close", (), None)

    def bind(self, pid: int) -> RemoteChannel:
        """Close the channel when process `pid` exits: takers then get ChannelClosedError with ProcessExitedException
        as its cause."""
        self._do("bind", (pid,), None)
        return self

    def finalize(self) -> None:
        """Give the reference back now; any later use raises RuntimeError. May be called again."""
        self._finalized = True
        if self._handle is not None:
            self._refs.live.pop(self._handle.rrid, None)
            self._handle.release()

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                value = self.take()
            except ChannelClosedError:
                return
            yield value

    def _do(self, op: str, arguments: tuple[Any, ...], timeout: float | None) -> Any:
        handle = self._live()
        if handle.where == self._refs.node.pid:
            entry = self._refs.owner.get(handle.rrid)
            if entry is None or entry.channel is None:
                raise RuntimeError("this channel does not exist any more")
            return run_here(self._refs.node, entry.channel, op, arguments, timeout)
        seen: list[Any] = []
        value = arguments[0] if op == "put" and len(arguments) == 1 else arguments
        data, buffers = codec.encode(value, handle.where, seen) if arguments else (b"", [])
        self._refs.lend(seen, handle.where)
        reply = self._request(op, data, stable(buffers), timeout, len(arguments))
        return reply.result(None if timeout is None else timeout + _OWNER_GRACE)

    def _request(self, op: str, data: bytes, buffers: list[Any], timeout: float | None, count: int = 0) -> _RemoteReply:
        handle, node = self._live(), self._refs.node
        reply = _RemoteReply(self, op)
        reply._call = _Waiting(self._refs)
        where = handle.where
        dead = node.peers.dead.get(where)
        if dead is not None:
            raise dead()

        def answer(status: int, body: Any, parts: Any) -> None:
            reply._settle(Outcome(status, body, parts, where))

        reply.number = node.peers.requests.new(where, answer, lambda error: answer(RAISED_HERE, error, ()))
        message = messages.ChannelOp(reply.number, op, *handle.rrid, timeout, count)
        node.peers.send(where, Kind.CHANNEL, message.pack(), data, buffers)
        if where in node.peers.dead:
            node.peers.requests.fail(where, node.peers.dead[where])
        return reply

    def _owner_lost(self, make_error: Callable[[], BaseException]) -> None:
        """Requests that wait have failed already; later ones will."""

    def __reduce__(self) -> Any:
        return dead_channel, ()


#: The owner ends an operation at its time-out; the asker waits this much longer for the answer before it gives up.
_OWNER_GRACE = 5.0


class _RemoteReply(_ChannelReply):
    """An answer that, if nobody waits for it any more, must not swallow an item."""

    number = 0

    def __init__(self, channel: RemoteChannel, op: str) -> None:
        self._channel = channel
        self._op = op

    def result(self, timeout: float | None = None) -> Any:
        try:
            return super().result(timeout)
        except BaseException:
            if not self.done():
                self._give_up()
            raise

    def _give_up(self) -> None:
        """Ask the owner to forget the request; an item that is on its way goes back."""
        node = self._channel._refs.node
        where = self._channel.where
        node.peers.send(where, Kind.CANCEL_REQUEST, messages.CancelRequest(self.number).pack())
        if self._op == "take":
            channel = self._channel
            self.add_done_callback(lambda late: _give_back(channel, late))


def _give_back(channel: RemoteChannel, late: Future[Any]) -> None:
    raw = late._raw
    if raw is not None and raw.status == VALUE:
        channel._request("restore", raw.data, list(raw.buffers), None, 1)


def _channel_of_one() -> Channel:
    return Channel(1)


def run_here(node: Node, channel: Any, op: str, arguments: tuple[Any, ...], timeout: float | None) -> Any:
    """An operation on a channel of this process, in the caller's thread."""
    if op == "bind":
        _bind(node, channel, arguments[0])
        return None
    method = getattr(channel, op)
    if timeout is not None:
        return method(*arguments, timeout=timeout)
    return method(*arguments)


def _bind(node: Node, channel: Any, pid: int) -> None:
    def close(make_error: Callable[[], BaseException]) -> None:
        error = ChannelClosedError(f"process {pid}, which this channel is bound to, has exited")
        error.__cause__ = make_error()
        channel.close(error) if isinstance(channel, Channel) else channel.close()

    dead = node.peers.dead.get(pid)
    if dead is not None:
        close(dead)
        return
    node.peers.check(pid)
    node.peers.on_lost.append(lambda gone: close(node.peers.dead[pid]) if gone == pid else None)


def dead_channel() -> RemoteChannel:
    """What a pickle made outside of a distpool message gives."""
    channel: RemoteChannel = RemoteChannel.__new__(RemoteChannel)
    channel._handle = None
    return channel


def arrive_channel(whence: int, ident: int, where: int) -> RemoteChannel:
    """A reference has come in a message: the living object of it, or a new one. It holds one more count."""
    refs = gc.of(_node())
    rrid = RRID(whence, ident)
    with refs._lock:
        channel: RemoteChannel | None = refs.live.get(rrid)
        if channel is not None and channel._handle is not None and not channel._finalized:
            channel._handle.held += 1
            return channel
        channel = RemoteChannel.__new__(RemoteChannel)
        channel._refs = refs
        channel._handle = Handle(refs, rrid, where, 1)
        refs.live[rrid] = channel
        return channel


def _reduce(channel: RemoteChannel, peer: Any) -> tuple[Any, ...]:
    handle = channel._handle
    if handle is None:
        return dead_channel, ()
    return arrive_channel, (*handle.rrid, handle.where)


codec.register_reducer(RemoteChannel, _reduce)


# -- the owner's side --------------------------------------------------------------------------------------------


class _Requests:
    """CHANNEL frames. Operations on our own Channel are done by the leader; the rest on library threads."""

    def __init__(self, node: Node, answers: Serving) -> None:
        self._node = node
        self._refs = gc.of(node)
        self._answers = answers
        self._waiters: dict[tuple[int, int], tuple[Channel, _Waiter]] = {}  # (pid, request) -> who waits
        node.handlers[Kind.CHANNEL] = self._on_channel
        node.handlers[Kind.CANCEL_REQUEST] = self._on_cancel

    def _on_cancel(self, link: Link, frame: Frame) -> None:
        number = messages.CancelRequest.unpack(frame.control).request
        found = self._waiters.pop((int(link.peer), number), None)
        if found is not None:
            found[0].withdraw(found[1])

    def _on_channel(self, link: Link, frame: Frame) -> None:
        message = messages.ChannelOp.unpack(frame.control)
        pid = int(link.peer)
        buffers = [link.segments.open(buffer) for buffer in frame.buffers]
        body = bytes(frame.body)
        entry = self._refs.owner.get(RRID(message.whence, message.ident))
        channel: Any = entry.channel if entry is not None else None
        plain = type(channel) is Channel
        if plain and message.op in ("take", "fetch", "wait") and not message.arguments:
            self._wait_for(channel, message, pid)
        elif plain and message.op == "put" and message.arguments == 1 and channel.type is object:
            self._put(channel, message, pid, Outcome(VALUE, body, buffers, pid))
        elif plain and message.op == "restore":
            channel.restore(Outcome(VALUE, body, buffers, pid))
            self._answers.reply(pid, message.request, VALUE, codec.encode(None)[0])
        else:
            self._node.deliver(lambda: self._run(message, pid, body, buffers, channel))

    def _wait_for(self, channel: Channel, message: Any, pid: int) -> None:
        key = (pid, message.request)

        def served(outcome: Outcome) -> None:
            self._waiters.pop(key, None)
            if message.op == "wait" and outcome.status == LOCAL_VALUE:
                self._answers.reply(pid, message.request, VALUE, codec.encode(None)[0])
            else:
                self._send(pid, message.request, outcome)

        waiter = channel.request(message.op, served, pid)
        self._keep(key, channel, waiter, message.timeout)

    def _put(self, channel: Channel, message: Any, pid: int, item: Outcome) -> None:
        key = (pid, message.request)

        def accepted(outcome: Outcome) -> None:
            self._waiters.pop(key, None)
            self._send(pid, message.request, outcome)

        self._keep(key, channel, channel.offer(item, accepted, pid), message.timeout)

    def _keep(self, key: tuple[int, int], channel: Channel, waiter: _Waiter, timeout: float | None) -> None:
        if not waiter.live:
            return
        self._waiters[key] = channel, waiter
        if timeout is not None:

            def expire() -> None:
                if self._waiters.pop(key, None) is not None and channel.withdraw(waiter):
                    self._plain_error(*key, TimeoutError())

            self._node.loop.call_later(timeout, expire)

    def _send(self, pid: int, request: int, outcome: Outcome) -> None:
        if outcome.status == RAISED_HERE:
            self._plain_error(pid, request, outcome.data)
        else:
            self._answers.send_outcome(pid, request, outcome)

    def _plain_error(self, pid: int, request: int, error: BaseException) -> None:
        self._node.deliver(lambda: self._answers.reply(pid, request, PLAIN_ERROR, codec.encode(error)[0]))

    def _run(self, message: Any, pid: int, body: bytes, buffers: list[Any], channel: Any) -> None:
        """On a library thread: whatever may run user code or block."""
        try:
            if message.op == "make":
                made = codec.decode(body, buffers)()
                self._refs.owner.touch(RRID(message.whence, message.ident), pid).channel = made
                value: Any = None
            else:
                if channel is None:
                    raise RuntimeError("this channel does not exist any more")
                arguments = codec.decode(body, buffers) if message.arguments else ()
                if message.op == "put" and message.arguments == 1:
                    arguments = (arguments,)
                value = run_here(self._node, channel, message.op, tuple(arguments), message.timeout)
                if message.op in ("put", "wait", "close"):
                    value = None
        except (ChannelClosedError, TimeoutError, TypeError) as error:
            if type(channel) is Channel:
                self._plain_error(pid, message.request, error)
            else:
                self._answers.reply_error(pid, message.request, error)
        except BaseException as error:
            self._answers.reply_error(pid, message.request, error)
        else:
            self._answers.reply_value(pid, message.request, value)


def install(node: Node) -> None:
    """Register the channel kinds with `node`."""
    _Requests(node, serving(node))


def _node() -> Node:
    """The node of this process, with remote calls installed (by the layer above, found by name)."""
    node = nodes.current()
    if node.callee is None:
        node.load_remote_calls()
    return node
