"""How futures are made and how they travel in messages (layer 4).

Future(pid) -> new_future            future in a message -> reduce_future -> arrive_future | arrive_value there
pickled outside of a message -> dead_future
"""

from __future__ import annotations

from typing import Any

from distpool.config import as_pid
from distpool.node import node as nodes
from distpool.refs import gc
from distpool.refs.finalized import DEAD, FINALIZED, refuse_state
from distpool.refs.gc import Handle, Loan
from distpool.refs.lent import arrivals
from distpool.refs.owner import RRID
from distpool.refs.refs import LOCAL_VALUE, Future, Outcome
from distpool.refs.remote import RemoteFuture
from distpool.wire import codec
from distpool.wire.messages import VALUE


def dead_future() -> RemoteFuture:
    """What a pickle made outside of a distpool message gives: a handle that nobody stands behind."""
    future: RemoteFuture = object.__new__(RemoteFuture)
    future._handle = None
    future._call = None
    refuse_state(future, DEAD)
    return future


def new_future(pid: int | None) -> RemoteFuture:
    """`distpool.Future(pid)`: an unset future owned by `pid`, unknown to its owner until it is first used."""
    refs = gc.of(nodes.current())
    where = refs.node.pid if pid is None else as_pid(pid)
    if where != refs.node.pid:
        refs.node.peers.ensure(where)
    return RemoteFuture.make(refs, refs.new_id(), where, 0)


def arrive_future(whence: int, ident: int, where: int) -> RemoteFuture:
    """A reference has come in a message: the living object of it, or a new one. It holds one more count."""
    refs = gc.of(nodes.current())
    rrid = RRID(whence, ident)
    noted = arrivals.noted
    with refs._lock:
        future: RemoteFuture | None = refs.live.get(rrid)
        if future is None or future._handle is None:
            future = RemoteFuture.make(refs, rrid, where, 0)
        handle = future._handle
        assert handle is not None
        if future.travels_with_value:
            handle = Handle(refs, rrid, where, 0)  # the value is here: nothing is needed of the owner
        handle.held += 1
        if noted is not None:
            noted += [handle]
        return future


def arrive_value(whence: int, ident: int, where: int, value: Any) -> RemoteFuture:
    """A reference has come with its value (C17, C33, C34)."""
    refs = gc.of(nodes.current())
    rrid = RRID(whence, ident)
    with refs._lock:
        future: RemoteFuture | None = refs.live.get(rrid)
        if future is None or future._handle is None:
            future = RemoteFuture.make(refs, rrid, where, 0)
    future._came(Outcome(LOCAL_VALUE, value, (), where))
    future._let_go()
    return future


def _can_be_pickled(value: Any, peer: Any) -> bool:
    try:
        codec.dump(value, peer, None, [], codec.special_types(descriptors=False))
    except KeyboardInterrupt:
        raise
    except BaseException:
        return False
    return True


class _Trial:
    """Under way for a future."""

    met = False  # its value leads to the future itself


def _is_sendable(future: Any, peer: Any) -> bool:
    """Whether the value of a future of this process can be pickled; asked once of each, by doing so.

    A lock, say, is a value as any other as long as nobody fetches it from another process: the reference to it can be
    sent all the same. (Thought of: to send the pickle of the trial. References in it would be out of reach of those
    who drop a message unread.) What has come from another process has been pickled before.
    """
    raw = future._raw
    if raw.status == VALUE if raw is not None else "_decoding" in vars(future) and not isinstance(future, RemoteFuture):
        return True
    value = future.result()
    if any(type(value) is scalar for scalar in codec.SCALARS):  # and not `in`: a type may have no hash
        return True
    known: bool | _Trial | None = vars(future).get("_sendable")
    if known is None:
        trial = future._sendable = _Trial()
        sendable = False
        try:
            sendable = _can_be_pickled(value, peer)
        finally:
            known = future._sendable = sendable and not trial.met
    if isinstance(known, _Trial):
        known.met = True
        return False
    return known


def reduce_future(future: Any, peer: Any) -> tuple[Any, ...]:
    """How a future travels in a message: with its value if that is here, else as a reference."""
    handle = future._handle
    if future._finalized:
        raise RuntimeError(FINALIZED)
    if handle is None:
        if isinstance(future, RemoteFuture):
            return dead_future, ()
        handle = gc.of(nodes.current()).adopt(future)
    if future.travels_with_value and (handle.where != gc.of(nodes.current()).node.pid or _is_sendable(future, peer)):
        return arrive_value, (*handle.rrid, handle.where, future.result())
    return codec.Reduced.of((arrive_future, (*handle.rrid, handle.where)), Loan(future, handle))


codec.register_reducer(RemoteFuture, reduce_future)
codec.register_reducer(Future, reduce_future)
