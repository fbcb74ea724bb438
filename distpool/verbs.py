"""Julia's verbs as functions: `fetch put take wait isready finalize`, and identities of references (layer 5)."""

from __future__ import annotations

import concurrent.futures
from typing import Any

from distpool.node import node as nodes
from distpool.refs import gc
from distpool.refs.channel import Channel
from distpool.refs.channels import RemoteChannel
from distpool.refs.owner import RRID
from distpool.refs.refs import Future
from distpool.transport.link import Link
from distpool.wire import codec


def _method(x: Any, verb: str) -> Any:
    """The method `verb` of `x`: a bad argument is a TypeError, not what Python says of attributes."""
    method = getattr(x, verb, None)
    if method is None:
        raise TypeError(f"{codec.describe(x)} has no {verb}()")
    return method


def fetch(x: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """The value of a Future, or the first item of a channel (which stays there); anything else is its own value.

    Waits; `TimeoutError` after `timeout` seconds. Example: `fetch(remotecall(pow, 2, 3, 4))` is 81.
    """
    try:
        if isinstance(x, concurrent.futures.Future):
            return x.result(timeout)
        if hasattr(x, "fetch"):
            return x.fetch(*arguments, timeout=timeout) if timeout is not None else x.fetch(*arguments)
        return x
    finally:
        del x  # no cycle exception -> traceback -> frame -> future


def put(ref: Any, *values: Any, timeout: float | None = None) -> Any:
    """Set a Future, or add an item to a channel (waiting for room); returns `ref`.

    Example: `put(RemoteChannel(), 1)`
    """
    if timeout is not None:
        return _method(ref, "put")(*values, timeout=timeout)
    return _method(ref, "put")(*values)


def take(ref: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """Remove and return the first item of a channel, or a free worker of a pool.

    Example: `take(put(RemoteChannel(), 1))` is 1.
    """
    if isinstance(ref, Future):
        raise TypeError("a Future cannot be taken from: use fetch")
    if timeout is not None:
        return _method(ref, "take")(*arguments, timeout=timeout)
    return _method(ref, "take")(*arguments)


def wait(x: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """Wait until a Future has ended, a channel has an item, or a pool a free worker; returns `x`.

    Raises what a failed Future raises; `TimeoutError` after `timeout` seconds. Example: `wait(remotecall(load, 2))`
    """
    try:
        if isinstance(x, concurrent.futures.Future) and not isinstance(x, Future):
            x.result(timeout)
        elif timeout is not None:
            _method(x, "wait")(*arguments, timeout=timeout)
        else:
            _method(x, "wait")(*arguments)
        return x
    finally:
        del x  # see `fetch`


def isready(x: Any, *arguments: Any) -> bool:
    """Whether a Future has ended, a channel has an item, a pool has a free worker; never waits for one.

    Example: `isready(RemoteChannel())` is False.
    """
    if isinstance(x, concurrent.futures.Future) and not isinstance(x, Future):
        return x.done()
    return bool(_method(x, "isready")(*arguments))


def finalize(ref: Any) -> None:
    """Give a reference back to its owner now; any later use raises RuntimeError. May be called again.

    Example: `finalize(rc)`
    """
    _method(ref, "finalize")()


def remoteref_id(ref: Any) -> RRID:
    """The identity of a reference: `RRID(whence, id)`, unique in the cluster.

    Example: `remoteref_id(RemoteChannel(2)).whence` is the pid of this process.
    """
    if isinstance(ref, RemoteChannel | Future):
        return RRID(ref.whence, ref.id)
    raise TypeError(f"{type(ref).__name__} is not a remote reference")


def channel_from_id(rrid: RRID) -> Any:
    """The channel behind a RemoteChannel, on the process that owns it; LookupError elsewhere.

    Example: `channel_from_id(remoteref_id(RemoteChannel())).put(1)`
    """
    entry = gc.of(nodes.current()).owner.get(RRID(*rrid))
    if entry is None or entry.channel is None:
        raise LookupError("Local instance of remote reference not found")
    channel: Channel = entry.channel
    return channel


def worker_id_from_socket(stream: Any) -> int:
    """Pid of the process at the other end of a connection, -1 if it is none of ours; for transports of one's own.

    Example: `worker_id_from_socket(sock)`
    """
    for link in list(nodes.current().links):
        if isinstance(link, Link) and link.peer and link.carries(stream):
            return int(link.peer)
    return -1
