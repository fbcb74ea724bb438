"""`WorkerPool`, `CachingPool` and the default pool (layer 6).

    WorkerPool --RemoteChannel--> WorkerQueue on the process that made the pool       (`poolqueue`)
    CachingPool.prepare(f, pid) -> f is kept on `pid` under a reference -> calls name the reference, not f
    default_worker_pool(): on pid 1, fed by `addprocs` and `rmprocs`; from other processes a handle to that one

A pool that travels is an identifier of the same queue, kept alive as a channel is: by the references of all processes.
Everything here runs in callers' threads; the leader feeds the default pool.
"""

from __future__ import annotations

import contextlib
import threading
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from distpool.calls import PlainLease, _node, remotecall_fetch, start
from distpool.config import as_int
from distpool.errors import ProcessExitedException, RemoteException
from distpool.members import procs
from distpool.node import group as groups
from distpool.node.node import Node
from distpool.poolqueue import WorkerQueue
from distpool.refs import gc
from distpool.refs.channels import RemoteChannel
from distpool.refs.owner import RRID
from distpool.refs.refs import Future, Outcome
from distpool.refs.remote import _Waiting

Where = Any


class WorkerPool:
    """Workers that are given out one caller at a time, in the order in which they became free.

    `remotecall(f, pool, ...)`, `remotecall_fetch`, `remotecall_wait`, `remote_do`, `remote` and `pmap` take a worker,
    call, and give it back. Any process may use the pool; it stays on the one that made it. Members that die vanish.
    A call on a pool without members: RuntimeError("No active worker available in pool").

    Example: `pool = WorkerPool([2, 3]); remotecall_fetch(os.getpid, pool)`
    """

    def __init__(self, pids: Iterable[int]) -> None:
        node = _node()
        wanted = [_checked(pid) for pid in pids]
        if not node.is_master and wanted:  # there it is asked of the tables each time; here pid 1 has to be asked
            there = set(procs())
            wanted = [pid for pid in wanted if pid in there]
        self._channel = _channel_for(WorkerQueue(node, wanted))

    @classmethod
    def _over(cls, channel: RemoteChannel) -> WorkerPool:
        pool = WorkerPool.__new__(WorkerPool)
        pool._channel = channel
        return pool

    # -- taking and giving back --------------------------------------------------------------------------------

    def take(self, *, timeout: float | None = None) -> int:
        """Take the worker that has been free for longest, waiting for one; give it back with `put`.

        RuntimeError: the pool has no members; TimeoutError after `timeout` seconds.
        Example: `pid = pool.take()`
        """
        pid: int = self._do("take", timeout=timeout)
        return pid

    def put(self, pid: int) -> WorkerPool:
        """Give a taken worker back; ignored if it is no member or is free. Returns the pool.

        Example: `pool.put(pool.take())`
        """
        self._do("give", _checked(pid))
        return self

    def push(self, pid: int) -> WorkerPool:
        """Add a worker to the pool, free; ignored if it is a member or does not live. Returns the pool.

        Example: `pool.push(4)`
        """
        node = _node()
        if node.is_master or _checked(pid) in procs():
            self._do("push", _checked(pid))
        return self

    def wait(self, *, timeout: float | None = None) -> WorkerPool:
        """Wait until a worker is free, without taking it; returns the pool. Errors as for `take`.

        Example: `pool.wait().take()`
        """
        self._do("wait", timeout=timeout)
        return self

    def isready(self) -> bool:
        """Whether a worker is free, so that `take` would not wait.

        Example: `if pool.isready(): pid = pool.take()`
        """
        return bool(self._do("isready"))

    def workers(self) -> list[int]:
        """Pids of the living members, free or not, sorted; `[1]` for a default pool that has none.

        Example: `pool.workers()`
        """
        found: list[int] = self._do("everybody")
        return found

    def nworkers(self) -> int:
        """How many `workers()` there are. Example: `pool.nworkers()`"""
        return len(self.workers())

    def __len__(self) -> int:
        return len(self._do("living"))

    def __bool__(self) -> bool:
        return True

    def prepare(self, f: Callable[..., Any], pid: int) -> Callable[..., Any]:
        """What has to be called on `pid` to call `f` there; a pool of your own may override it.

        Example: `remotecall_fetch(pool.prepare(f, pid), pid)`
        """
        return f

    def lease(self) -> Any:
        """As `take`, for one call: the worker goes back by `back()`, or with the object. See `Lease`."""
        cls = type(self)
        own = cls.take is not WorkerPool.take or cls.put is not WorkerPool.put
        return PlainLease(self) if own else Lease(self)

    def _take_later(self, lease: Lease | None = None) -> Future[Any]:
        """As `take`, without waiting: the future of a pid, whose callbacks run on library threads. `lease` lives until
        then, and is told."""
        self._channel._live()
        queue = self._queue()
        if queue is None:
            reply = self._channel._ask("take")
            if lease is not None:
                reply.add_done_callback(lease.note)
            return reply
        node = _node()
        taken: Future[Any] = Future()
        taken._call = _Waiting(gc.of(node))

        def settle(outcome: Outcome) -> None:
            if lease is not None:
                lease.note(taken)
            if taken._settle(outcome):
                node.deliver(taken._run_callbacks)

        queue.request("take", settle)
        return taken

    # -- the pool as a reference -------------------------------------------------------------------------------

    def _do(self, op: str, *arguments: Any, timeout: float | None = None) -> Any:
        try:
            return self._channel._do(op, arguments, timeout)
        except RemoteException as error:  # of code that is ours: its errors arrive as themselves
            raise error.captured.ex from None

    def _queue(self) -> WorkerQueue | None:
        """The queue, if this process owns it."""
        channel = self._channel
        node = _node()
        if channel.where != node.pid:
            return None
        entry = gc.of(node).owner.get(RRID(channel.whence, channel.id))
        return entry.channel if entry is not None else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorkerPool) and type(other) is type(self) and self._channel == other._channel

    def __hash__(self) -> int:
        return hash(self._channel)

    def __reduce__(self) -> Any:
        return WorkerPool._over, (self._channel,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(owner={self._channel.where}, id={self._channel.id})"


class CachingPool(WorkerPool):
    """A WorkerPool that sends each function once to each worker, with all that it captures, and keeps it there.

    A function is known by identity, so changes of what it captured are not seen until `clear()`. The workers forget it
    when it is gone here, and all functions when the pool is gone. The pool cannot be sent to other processes
    (TypeError).

    Example: `pool = CachingPool(workers()); pmap(lambda i: table[i], range(100), pool=pool); pool.clear()`
    """

    def __init__(self, pids: Iterable[int]) -> None:
        super().__init__(pids)
        self._cache = _Cache()

    def prepare(self, f: Callable[..., Any], pid: int) -> Callable[..., Any]:
        """What has to be called on `pid` to call `f` there: sends `f` the first time.

        SerializationError if `f` cannot be sent. Example: `remotecall_fetch(pool.prepare(f, pid), pid)`
        """
        return self._cache.find(f, pid)

    def clear(self) -> CachingPool:
        """Let all workers forget the functions they were sent; returns the pool. Example: `pool.clear()`"""
        self._cache = _Cache()
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a CachingPool cannot be sent or pickled; send a WorkerPool of the same workers")


class Lease:
    """A worker that a pool has given out for one call.

    It goes back with this object if nobody gives it back: Ctrl-C may come between any two steps of who calls, and a
    worker that is never given back is lost to the pool, whose next user would wait for ever. (At worst it is given back
    twice, the second time while it serves somebody else: then it serves two at a time, once.)
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._node = _node()
        self._taken: Future[Any] | None = None
        self._over = False
        self._taken = pool._take_later(self)  # from now on whoever serves it keeps this alive until then

    def note(self, taken: Future[Any]) -> None:
        """This is served; the call that asked for it may have been interrupted before it knew."""
        self._taken = taken

    def result(self) -> int:
        """Wait for the worker. Errors as for `take`."""
        assert self._taken is not None
        try:
            pid: int = self._taken.result()
        except RemoteException as error:  # of code that is ours: its errors arrive as themselves
            raise error.captured.ex from None
        return pid

    def back(self) -> None:
        """The call is over."""
        taken = self._taken
        if taken is not None and taken.done() and taken.exception() is None:
            with contextlib.suppress(ProcessExitedException):  # the pool has died: the next taker's error, not this one
                self._pool.put(taken.result())
            self._over = True

    def later(self) -> None:
        """Give it back on a library thread: whoever was about to was interrupted."""
        taken = self.__dict__.get("_taken")
        if taken is not None and not self._over:
            self._over = True
            pool, node = self._pool, self._node
            node.loop.call_soon(lambda: node.deliver(lambda: _give_back(pool, taken)))

    __del__ = later


def _give_back(pool: WorkerPool, taken: Future[Any]) -> None:
    with contextlib.suppress(Exception):  # there was none, or the pool is gone
        pool.put(taken.result(0))


# -- functions that are kept on workers --------------------------------------------------------------------------


class _Cache:
    """Functions by identity, and the references under which workers keep them.

    The lock of an entry makes "look and send" one step of each pair of function and worker. Entries of functions that
    are gone are removed by their weak references: `dict.pop`, which is safe in a finalizer. Ctrl-C may come first in
    there, and is ignored by Python: the entry stays, and another function may get the same identity.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, _Kept] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, f: Callable[..., Any], pid: int) -> KeptFunction:
        """The name of `f` on worker `pid`, where it is sent to if need be."""
        key, anchor = _identity(f)
        entry = self._entries.get(key)
        if entry is not None and not entry.is_of(anchor):
            self._entries.pop(key, None)
            entry = None
        if entry is None:
            entry = self._entries.setdefault(key, _Kept(anchor, self, key))  # atomic
        with entry.lock:
            reference = entry.references.get(pid)
            if reference is None:
                reference = entry.references[pid] = start(_itself, pid, (f,), {})
        return KeptFunction(reference)


class _Kept:
    """One function and where it is. `lock` protects `references`. Reentrant: to serialise a function may run code of
    the user's, which may use it here."""

    def __init__(self, anchor: Any, cache: _Cache, key: Any) -> None:
        # Weakly: in a cycle, the workers' functions would outlive `clear` until the collector runs here.
        found = weakref.ref(cache)

        def forget(gone: object) -> None:
            there = found()
            if there is not None:
                there._entries.pop(key, None)

        self.references: dict[int, Future[Any]] = {}
        self.lock = threading.RLock()
        #: Gives the object; keeps the identity taken, or notices that it is not any more.
        self._anchor: Callable[[], Any] = lambda: anchor
        with contextlib.suppress(TypeError):  # it has no weak references
            self._anchor = weakref.ref(anchor, forget)

    def is_of(self, anchor: Any) -> bool:
        """Whether this is about that very object."""
        return self._anchor() is anchor


def _identity(f: Callable[..., Any]) -> tuple[Any, Any]:
    """A key for what `f` is, and the object whose life ends with it. Each access makes another bound method."""
    if type(f) is types.MethodType:
        return (id(f.__self__), f.__func__), f.__self__
    return id(f), f


def _itself(f: Callable[..., Any]) -> Callable[..., Any]:
    return f


class KeptFunction:
    """A function that its worker has already; holds the reference, so that it stays there while a call is on its way.

    What travels is the reference's identity: as a reference it would be counted at its owner for each call.
    """

    def __init__(self, reference: Future[Any]) -> None:
        self._reference = reference

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._reference.result()(*args, **kwargs)

    def __reduce__(self) -> Any:
        return find_kept, (self._reference.whence, self._reference.id)


def find_kept(whence: int, ident: int) -> Callable[..., Any]:
    """On the worker: the function under this reference; waits if it is still being loaded.

    Raises what loading it raised, each time.
    """
    node = _node()
    refs, rrid = gc.of(node), RRID(whence, ident)
    entry = refs.owner.get(rrid)
    loaded: Future[Any] = Future()
    loaded._call = _Waiting(refs)
    if entry is not None:
        refs.owner.watch(entry, loaded._settle)
    if entry is None or (not loaded.done() and refs.owner.get(rrid) is not entry):  # gone, perhaps between the looks
        raise RuntimeError("the function is not kept on this worker any more")
    function: Callable[..., Any] = loaded.result()
    return function


# -- the default pool --------------------------------------------------------------------------------------------


def default_worker_pool() -> WorkerPool:
    """The pool of the workers of `addprocs`, the same one from every process; `remote` uses it.

    While there are none, `take()` on it gives pid 1. Example: `remotecall_fetch(myid, default_worker_pool())`
    """
    node = _node()
    if not node.is_master:
        pool: WorkerPool = remotecall_fetch(_default_for_others, 1)
        return pool
    with _default_lock:
        if node.default_pool is None:
            made = _make_default(node)
            if node.default_pool is None:  # else a `__del__` has asked meanwhile
                node.default_pool = made
        found: WorkerPool = node.default_pool
    return found


def set_default_worker_pool(p: WorkerPool) -> WorkerPool:
    """Make `p` the default pool of the whole group; returns it. On a worker: no CachingPool (it cannot be sent).

    Example: `old = default_worker_pool(); set_default_worker_pool(WorkerPool([2])); ...; set_default_worker_pool(old)`
    """
    if not isinstance(p, WorkerPool):
        raise TypeError(f"the default pool must be a WorkerPool, not {type(p).__name__}")
    node = _node()
    if not node.is_master:
        remotecall_fetch(set_default_worker_pool, 1, p)
        return p
    old = default_worker_pool()
    p._do("fall_back", True)
    if old != p:
        with contextlib.suppress(ProcessExitedException):  # its owner has gone, and it with that
            old._do("fall_back", False)
    node.default_pool = p
    return p


_default_lock = threading.RLock()  # two threads ask for the default pool for the first time


def _make_default(node: Node) -> WorkerPool:
    group = groups.of(node)
    queue = WorkerQueue(node, (), falls_back=True)
    # Watchers first: who comes meanwhile is pushed twice, which counts once.
    group.on_member_added.append(queue.push)
    group.on_member_removed.append(queue.remove)
    for pid in list(group.default_members):
        queue.push(pid)
    return WorkerPool._over(_channel_for(queue))


def _default_for_others() -> WorkerPool:
    pool = default_worker_pool()
    return pool if type(pool) is WorkerPool else WorkerPool._over(pool._channel)


def remote(f: Callable[..., Any], pool: WorkerPool | None = None) -> Callable[..., Any]:
    """A function that calls `f` on a free worker of `pool` (default: the default pool of that moment) and waits.

    Errors are those of `remotecall_fetch`. Example: `remote(os.getpid)()`
    """
    if not callable(f):
        raise TypeError(f"the function must be callable, not {type(f).__name__}")
    if pool is not None and not isinstance(pool, WorkerPool):
        raise TypeError(f"the pool must be a WorkerPool, not {type(pool).__name__}")

    def call(*args: Any, **kwargs: Any) -> Any:
        return remotecall_fetch(f, pool if pool is not None else default_worker_pool(), *args, **kwargs)

    return call


def _channel_for(queue: WorkerQueue) -> RemoteChannel:
    return RemoteChannel(lambda: queue)


def _checked(pid: Any) -> int:
    pid = as_int(pid)
    if isinstance(pid, bool) or not isinstance(pid, int):
        raise TypeError(f"a pid is an int, not {type(pid).__name__}")
    return pid


__all__ = ["CachingPool", "WorkerPool", "default_worker_pool", "remote", "set_default_worker_pool"]
