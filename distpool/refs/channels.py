"""`RemoteChannel`: a channel that any process may use (layer 4).

    put/take/... -> owner here: the channel itself;  elsewhere: CHANNEL request -> owner (`channelserver`) -> REPLY
    put, with room reserved by the owner -> PUTS, without waiting (`refs.ahead`)

Whoever gives up waiting (time-out, Ctrl-C) tells the owner; an item that was on its way goes back to the head.

Each take by another process is a round trip. Thought of and rejected: items that are lent to a taker in advance. A
taker may die, so each must be confirmed before user code has it, by a message that is in the kernel by then: that is
half of the round trip again. And an item that was lent is still the first one of the queue: whoever else takes, fetches
or asks `isready` (the owner itself, too, which answers without waiting today) would have to wait until it was called
back, or see later items before it. So lending pays only for a channel with one taker that is nobody else's business:
such a channel is to live where it is read. There each item costs what it costs to unpickle it.
"""

from __future__ import annotations

import contextlib
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from distpool import errors
from distpool.config import as_int, as_pid
from distpool.errors import ChannelClosedError, ProcessExitedException, RemoteException, TopologyError
from distpool.node import node as nodes
from distpool.node.node import Node
from distpool.refs import gc
from distpool.refs.ahead import Ahead, group_of, settle_puts
from distpool.refs.channel import Channel, ChannelReply, through
from distpool.refs.finalized import FINALIZED
from distpool.refs.gc import Handle, Loan, Reference
from distpool.refs.lent import arrivals, carries_references, decode_lent, received
from distpool.refs.owner import RRID
from distpool.refs.refs import FINISHED, RAISED_HERE, Future, Outcome
from distpool.refs.remote import _Waiting, stable
from distpool.wire import codec, structs
from distpool.wire.frames import Kind
from distpool.wire.messages import VALUE
from distpool.wire.structs import CREDIT


class RemoteChannel(Reference):
    """A channel that any process of the group may use; it lives on process `pid` (default: this one).

    `factory()` makes the channel there: a `Channel`, or an object of a class of your own with `put take fetch isready
    wait close isopen`, which get the extra positional arguments of the calls. Default: `Channel(1)`. Sending a
    RemoteChannel sends an identifier; the channel is freed when no process holds it any more.

    Example: `rc = RemoteChannel(lambda: Channel(10), 2); rc.put(1); rc.take()`
    """

    _ahead: Ahead | None = None  # once the owner has reserved room for items of this process
    #: What threads of this process wait for through this object, and how it is ended. Single operations.
    _waits: dict[Any, Callable[[BaseException], object]] | None = None

    _eltype: Any = None  # once it is known
    _declared: bytes | None = None  # the same as the owner has told it, when it had made the channel

    def __init__(self, factory: Callable[[], Any] | int | None = None, pid: int | None = None) -> None:
        factory = as_int(factory)
        if isinstance(factory, int | float) and pid is None:
            factory, pid = None, factory
        if pid is not None:
            pid = as_pid(pid)
        if factory is not None and not callable(factory):
            raise TypeError(f"the factory of a channel must be callable, not {type(factory).__name__}")
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
        try:
            self._declared = self._perform("make", data, stable(buffers), None, 0, seen)
        except BaseException:
            handle.held = 0  # the owner has no entry of it, or will not have it for long (`_unmake`)
            raise

    def __repr__(self) -> str:
        return f"RemoteChannel(where={self.where}, whence={self.whence}, id={self.id})"

    def finalize(self) -> None:
        """Give the reference back now; what waits through it, and any later use, raises RuntimeError. May be
        called again."""
        super().finalize()
        for end in list((self._waits or {}).values()):
            end(RuntimeError(FINALIZED))

    def note(self, waiter: Any, end: Callable[[BaseException], object]) -> None:
        """A thread waits through this object: if that is finalized, nobody else may be left who could serve it."""
        self.__dict__.setdefault("_waits", {})[waiter] = end
        if self._finalized:  # meanwhile
            end(RuntimeError(FINALIZED))

    def forget(self, waiter: Any) -> None:
        """It does not wait any more."""
        if self._waits is not None:
            self._waits.pop(waiter, None)

    @property
    def eltype(self) -> Any:
        """What items must be instances of: the `type` of the Channel, `object` for a class of your own that has no
        `eltype`. May ask the owner, once; a dead handle has the type that was known where it was pickled."""
        if self._eltype is None:
            known = self._declared
            self._eltype = codec.decode(known) if known is not None else self._do("eltype", (), None)
        return self._eltype

    # -- operations --------------------------------------------------------------------------------------------

    def put(self, *values: Any, timeout: float | None = None) -> RemoteChannel:
        """Add an item, waiting for room (extra arguments go to a channel class of your own); returns the channel.

        Where a channel elsewhere has reserved room for this worker it does not wait for an answer: the item is on its
        way, and there before anything else that this worker does can be seen in another process. Should the owner die
        before it has come, the next `put`, or the call that runs here, raises ProcessExitedException.
        """
        handle = self._live()
        if len(values) != 1 or handle.where == self._refs.node.pid:
            self._do("put", values, timeout)
            return self
        seen: list[Any] = []
        data, buffers = codec.encode(values[0], handle.where, seen)
        ahead = self._ahead
        if ahead is not None and not buffers and not seen:
            if ahead.put(data, self):
                return self
            ahead.check()
        self._perform("put", data, stable(buffers), timeout, 1, seen)
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
        """Close the channel when process `pid` exits: takers then get an error that is both a ChannelClosedError and a
        ProcessExitedException."""
        self._do("bind", (as_pid(pid),), None)
        return self

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                value = self.take()
            except ChannelClosedError:
                return
            except RemoteException as error:  # of a class of the user's own
                if isinstance(error.captured.ex, ChannelClosedError):
                    return
                raise
            yield value

    def _do(self, op: str, arguments: tuple[Any, ...], timeout: float | None) -> Any:
        handle = self._live()
        if handle.where == self._refs.node.pid:
            entry = self._refs.owner.get(handle.rrid)
            if entry is None or entry.channel is None:
                raise RuntimeError("this channel does not exist any more")
            if type(entry.channel) is not Channel:  # which sees to it itself
                settle_puts()
            before = getattr(through, "reference", None)
            through.reference = self
            try:
                return run_here(self._refs.node, entry.channel, op, arguments, timeout)
            finally:
                through.reference = before
        if not arguments:
            return self._perform(op, b"", [], timeout, 0)
        seen: list[Any] = []
        data, buffers = codec.encode(arguments, handle.where, seen)
        return self._perform(op, data, stable(buffers), timeout, len(arguments), seen)

    def _perform(
        self, op: str, data: bytes, buffers: list[Any], timeout: float | None, count: int, lent: Sequence[Any] = ()
    ) -> Any:
        """Ask the owner and wait for the answer. Whatever ends that early, an interrupt too, loses no item. `lent`: the
        references in `data`."""
        reply = _RemoteReply(self, op)
        try:
            if timeout is not None:
                timeout = float(timeout + 0.0)  # a bad argument is a TypeError here, and none of `struct`
            self._request(reply, data, buffers, timeout, count, lent)
            self.note(reply, reply.end)
            if op in ("put", "close") and self._refs.node.loop.leads:
                return None  # of a finalizer on the thread that would receive the answer: done, and not waited for
            return reply.result(None if timeout is None else timeout + _OWNER_GRACE)
        except BaseException:
            reply.abandon()
            raise
        finally:
            self.forget(reply)
            del reply  # it has the error, whose traceback has this frame: a cycle would keep what the callers hold

    def _ask(self, op: str) -> Future[Any]:
        """As `_perform`, without waiting: the future of the answer."""
        reply = _RemoteReply(self, op)
        self._request(reply, b"", [], None, 0)
        return reply

    def _request(
        self,
        reply: _RemoteReply,
        data: bytes,
        buffers: list[Any],
        timeout: float | None,
        count: int,
        lent: Sequence[Any] = (),
    ) -> None:
        handle, node = self._live() if reply.op != "restore" else self._handle, self._refs.node
        assert handle is not None
        where = handle.where
        dead = node.peers.dead.get(where)
        if dead is not None:
            raise dead()

        settle_puts(where)

        def answer(status: int, body: Any, parts: Any) -> None:
            if reply.op == "put" and status == VALUE and len(body) == CREDIT.size:  # not a class of the user's
                self._may_put(body)
                body = _NONE
            outcome = received(status, body, parts, where)
            found: _RemoteReply | None = reply
            if not reply._finish(FINISHED, outcome) and (found := reply.late) is not None:
                found._settle(outcome)
            if found is not None and found.__dict__.get("_done_callbacks"):
                node.deliver(found._run_callbacks)

        reply.count = count
        reply.number = node.peers.requests.new(where, answer, lambda error: answer(RAISED_HERE, error, ()))
        message = structs.ChannelOp(reply.number, reply.op, *handle.rrid, timeout, count)
        with self._refs.lending(lent, where) if lent else contextlib.nullcontext():
            node.peers.send(where, Kind.CHANNEL, message.pack(), data, buffers)
        if where in node.peers.dead:
            node.peers.requests.fail(where, node.peers.dead[where])

    def _may_put(self, body: bytes) -> None:
        """Leader: the answer to a put, with a credit perhaps."""
        credit, epoch = CREDIT.unpack(body)
        group = group_of(self._refs.node) if credit else None
        if group is None:
            return
        handle = self._handle
        assert handle is not None
        with group.lock:
            if self._finalized:
                group.give_back(handle.rrid, handle.where, credit, epoch)
            else:
                group.of(self, epoch).grant(credit, epoch)

    def _owner_lost(self, make_error: Callable[[], BaseException]) -> None:
        """Requests that wait have failed already; later ones will."""

    def __reduce__(self) -> Any:
        """Asks no other process, and does not fail for a type that cannot be pickled."""
        handle = self._handle
        known = self._eltype is not None or self._declared is not None
        with contextlib.suppress(Exception):
            if known or (handle is not None and handle.where == self._refs.node.pid):
                pickle.dumps(self.eltype)
                return dead_channel, (self.eltype,)
        return dead_channel, ()


#: The owner ends an operation at its time-out; the asker waits this much longer for the answer before it gives up.
_OWNER_GRACE = 5.0

_NONE = codec.encode(None)[0]


class _RemoteReply(ChannelReply):
    """An answer that, if nobody waits for it any more, must not swallow an item."""

    number = 0
    count = 0  # arguments that were sent
    late: _RemoteReply | None = None  # gets the answer if this one has ended before

    def __init__(self, channel: RemoteChannel, op: str) -> None:
        self.op = op
        self._channel = channel
        self._call = _Waiting(channel._refs)

    def end(self, error: BaseException) -> None:
        """Whoever waits gets `error`, and an item that comes all the same goes back."""
        late = _RemoteReply(self._channel, self.op)
        late.number, late.count = self.number, self.count
        self.late = late
        if self._finish(FINISHED, Outcome(RAISED_HERE, error, (), 0)):
            late._give_up()

    def abandon(self) -> None:
        """Whoever asked has got an error instead of the answer."""
        raw = self._raw
        if not self.number:
            return  # not asked yet
        if not self.done():
            self._give_up()
        elif self.op in _UNDONE and raw is not None:
            _UNDONE[self.op](self._channel, self)  # interrupted just when it had come

    def _give_up(self) -> None:
        """Ask the owner to forget the request; an item that is on its way goes back."""
        node = self._channel._refs.node
        where = self._channel.where
        node.peers.send(where, Kind.CANCEL_REQUEST, structs.CancelRequest(self.number).pack())
        undo = _UNDONE.get(self.op)
        if undo is not None:
            channel = self._channel
            self.add_done_callback(lambda late: undo(channel, late))


def _give_back(channel: RemoteChannel, late: _RemoteReply) -> None:
    raw = late._raw
    if raw is None or raw.status != VALUE:
        return
    count = 1 if not late.count else 2  # whether it was a plain take: see `channelserver._put_back`
    data, buffers = raw.data, list(raw.buffers)  # opened with that, if it is `Lent`
    if carries_references(data):  # they were lent to us
        seen: list[Any] = []
        data, views = codec.encode(decode_lent(codec.decode, data, buffers), channel.where, seen)
        buffers = stable(views)
        channel._request(_RemoteReply(channel, "restore"), data, buffers, None, count, seen)
        return
    channel._request(_RemoteReply(channel, "restore"), data, buffers, None, count)


def _unmake(channel: RemoteChannel, late: _RemoteReply) -> None:
    """It was made, and counts one reference; but who has asked for it has not got it."""
    raw, handle = late._raw, channel._handle
    if raw is not None and raw.status == VALUE and handle is not None:
        channel._refs.drop(handle.rrid, handle.where, 1)


#: What has to be done when an answer comes that nobody waits for any more.
_UNDONE: dict[str, Callable[[RemoteChannel, Any], object]] = {"take": _give_back, "make": _unmake}


def _channel_of_one() -> Channel:
    return Channel(1)


def run_here(node: Node, channel: Any, op: str, arguments: tuple[Any, ...], timeout: float | None) -> Any:
    """An operation on a channel of this process, in the caller's thread."""
    if op == "eltype":
        return getattr(channel, "eltype", object)
    if op == "bind":
        _bind(node, channel, arguments[0])
        return None
    method = getattr(channel, op)
    if timeout is not None:
        return method(*arguments, timeout=timeout)
    return method(*arguments)


def _bind(node: Node, channel: Any, pid: int) -> None:
    """Weakly: a binding does not keep a channel that nobody holds any more."""
    peers = node.peers
    if pid != node.pid:
        # A worker hears of deaths from the time on at which it has joined: of others, and of pids that never were, it
        # has to ask. Where no link can be made, pid 1 still tells of the end.
        with contextlib.suppress(ProcessExitedException, TopologyError, ConnectionError):
            peers.ensure(pid)

    def forget(dead: object = None) -> None:
        with contextlib.suppress(ValueError):
            peers.on_lost.remove(close)

    try:
        bound: Callable[[], Any] = weakref.ref(channel, forget)
    except TypeError:  # of a class of the user's that has no room for that
        bound = partial(_same, channel)
    del channel

    def close(gone: int) -> None:
        """Leader, or the caller."""
        found = bound()
        if gone == pid and found is not None:
            error = errors.BoundChannelClosed(*peers.dead[pid]().args)
            if type(found) is Channel:
                found.close(error)
            else:
                node.deliver(partial(_close, found, error))
        if gone == pid:
            forget()

    if pid not in peers.dead:
        peers.on_lost.append(close)
    if pid in peers.dead:  # already, or between the two looks
        close(pid)


def _close(channel: Any, error: BaseException) -> None:
    if isinstance(channel, Channel):
        channel.close(error)
    else:
        channel.close()


def _same(channel: Any) -> Any:
    return channel


def declared(channel: Any) -> bytes | None:
    """What `channel` says of the type of its items, for whoever has made it; None: nobody knows before he asks."""
    try:
        return codec.encode(getattr(channel, "eltype", object))[0]
    except Exception:  # of the user's code, or it cannot be sent
        return None


def dead_channel(eltype: Any = object) -> RemoteChannel:
    """What a pickle made outside of a distpool message gives."""
    channel: RemoteChannel = RemoteChannel.__new__(RemoteChannel)
    channel._handle = None
    channel._eltype = eltype
    return channel


def arrive_channel(whence: int, ident: int, where: int) -> RemoteChannel:
    """A reference has come in a message: the living object of it, or a new one. It holds one more count."""
    refs = gc.of(_node())
    rrid = RRID(whence, ident)
    noted = arrivals.noted
    with refs._lock:
        channel: RemoteChannel | None = refs.live.get(rrid)
        if channel is None or channel._handle is None or channel._finalized:
            channel = RemoteChannel.__new__(RemoteChannel)
            channel._refs = refs
            channel._handle = Handle(refs, rrid, where, 0)
            refs.live[rrid] = channel
        handle = channel._handle
        handle.held += 1
        if noted is not None:
            noted += [handle]
        return channel


def _reduce(channel: RemoteChannel, peer: Any) -> tuple[Any, ...]:
    handle = channel._handle
    if handle is None:
        return dead_channel, (channel._eltype,)
    channel._live()  # RuntimeError if it was finalized
    return codec.Reduced.of((arrive_channel, (*handle.rrid, handle.where)), Loan(channel, handle))


codec.register_reducer(RemoteChannel, _reduce)


def _node() -> Node:
    """The node of this process, with remote calls installed (by the layer above, found by name)."""
    node = nodes.current()
    if node.callee is None:
        node.load_remote_calls()
    return node


__all__ = ["Channel", "RemoteChannel", "run_here"]
