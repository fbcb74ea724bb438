"""Remote calls between any two processes of the group (layer 5).

caller's thread: serialise -> lend references -> REQUEST            (to oneself: a thread, no copy)
callee's leader: REQUEST -> main thread if it is idle, else a cached thread -> decode, run
    mode "fetch"   -> REPLY with the value           mode "do"  -> nothing; an error is printed on stderr
    mode "future"  -> the value stays here under its reference; NOTICE to the creator
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

from distpool import config
from distpool.errors import CapturedException, ProcessExitedException, RemoteException, traceback_of
from distpool.node import node as nodes
from distpool.node import reach
from distpool.node.node import Node
from distpool.node.served import RAISED, RETURNED, SHOWN, Running, name_of
from distpool.refs import channelserver, gc
from distpool.refs.ahead import settle_puts
from distpool.refs.lent import decode_lent, give_back, received, stored
from distpool.refs.owner import RRID
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Future, Outcome
from distpool.refs.remote import RemoteFuture, _Waiting, stable
from distpool.refs.serving import serving
from distpool.transport.link import Link
from distpool.wire import codec, structs
from distpool.wire.failures import captured, encode_exception, traceback_text
from distpool.wire.frames import Frame, Kind
from distpool.wire.functions import decode_function
from distpool.wire.messages import ERROR, UNSENDABLE

#: Where a call runs: a pid, "any" (round robin over the workers), or a pool that gives out workers.
Where = int | Literal["any"] | Any
_CACHED_FUNCTIONS = 1024
_NOTHING_LENT = contextlib.nullcontext()

T = TypeVar("T")


class _Reply(Future[Any]):
    """The answer to a `remotecall_fetch`."""

    def _open(self, raw: Outcome) -> tuple[Any, BaseException | None]:
        if raw.status in (ERROR, UNSENDABLE):
            return None, RemoteException(raw.pid, captured(raw.failure))
        return super()._open(raw)


def check_callable(f: Any) -> None:
    """TypeError in the caller, wherever the call would run."""
    if not callable(f):
        raise TypeError(f"{codec.describe(f)} is not callable")


# -- the caller's side -------------------------------------------------------------------------------------------


def remotecall(f: Callable[..., T], where: Where, /, *args: Any, **kwargs: Any) -> Future[T]:
    """Run `f(*args, **kwargs)` on process `where` (pid, "any" or a WorkerPool) and return a Future at once.

    The value stays there until it is fetched. ValueError: no such process; ProcessExitedException: it is gone;
    SerializationError: something cannot be sent. All of these are raised here and now.

    Example: `fetch(remotecall(pow, 2, 3, 4))` is 81, computed by worker 2.
    """
    node = _node()
    future = start(f, where, args, kwargs)
    if node.collecting:
        note_started(node, future)
    return future


def note_started(node: Node, future: Any) -> None:
    """If the calling thread is inside a `sync()` block, that waits for `future`."""
    blocks = node.collecting.get(threading.get_ident())
    if blocks:
        blocks[-1].append(future)


def start(f: Callable[..., Any], where: Where, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]:
    """As `remotecall`, for the library's own calls: no `sync()` block waits for them."""
    check_callable(f)
    if type(where) is not int:
        where = _not_bool(config.as_int(where))
    if not isinstance(where, int):
        return _remotecall_somewhere(f, where, args, kwargs)
    node = _node()
    refs = gc.of(node)
    rrid = refs.new_id()
    if where == node.pid:
        future = RemoteFuture.make(refs, rrid, where, 1, watched=True)
        entry = refs.owner.touch(rrid, where)
        refs.owner.watch(entry, future._arrived)
        node.deliver(lambda: _run_here(f, args, kwargs, lambda outcome: refs.owner.settle(entry, outcome)))
        return future
    node.peers.ensure(where)
    future = RemoteFuture.make(refs, rrid, where, 0, watched=True)
    _send(node, where, "future", rrid, f, args, kwargs, 0, handle=future._handle)
    dead = node.peers.dead.get(where)
    if dead is not None:
        future._owner_lost(dead)
    return future


def remotecall_fetch(f: Callable[..., T], where: Where, /, *args: Any, **kwargs: Any) -> T:
    """Run `f(*args, **kwargs)` on process `where` and return its value; `RemoteException` if it raises there.

    To oneself the call runs inline, and nothing is copied; a KeyboardInterrupt comes as it is.

    Example: `remotecall_fetch(os.getpid, 2)`
    """
    check_callable(f)
    if type(where) is not int:
        where = _not_bool(config.as_int(where))
    if not isinstance(where, int):
        return _fetch_somewhere(f, where, args, kwargs)  # type: ignore[no-any-return]
    node = _node()
    if where == node.pid:
        try:
            return f(*args, **kwargs)
        except KeyboardInterrupt:
            raise  # Ctrl-C, or `interrupt` of the call that this one is part of: it is not the function's
        except BaseException as error:  # also SystemExit: it is the call's outcome, as on another process
            raise _wrapped(node, error) from error
    node.peers.ensure(where)
    node.loop.check_wait()  # before the call runs there
    reply = _Reply()
    waiting = _Waiting(gc.of(node))
    reply._call = waiting

    def answer(status: int, data: Any, buffers: Any) -> None:
        reply._settle(received(status, data, buffers, where))

    number = node.peers.requests.new(where, answer, lambda error: answer(RAISED_HERE, error, ()))
    try:
        _send(node, where, "fetch", RRID(0, 0), f, args, kwargs, number, waits=True)
        if where in node.peers.dead:
            node.peers.requests.fail(where, node.peers.dead[where])
        return reply.result()  # type: ignore[no-any-return]
    finally:
        reply._exception = None  # its traceback has this frame: a cycle would keep what the callers hold
        if node.peers.requests.forget(number):  # interrupted: the answer is not wanted any more
            node.peers.send(where, Kind.CANCEL_REQUEST, structs.CancelRequest(number).pack())


def remotecall_wait(f: Callable[..., T], where: Where, /, *args: Any, **kwargs: Any) -> Future[T]:
    """As `remotecall`, and wait until the call has ended there; the value is not moved. Raises if the call failed.

    Example: `future = remotecall_wait(load, 2, path)`
    """
    future = start(f, where, args, kwargs)
    try:
        if hasattr(future, "wait"):
            future.wait()
        return future
    finally:
        del future  # no cycle exception -> traceback -> frame -> future


def remote_do(f: Callable[..., Any], where: Where, /, *args: Any, **kwargs: Any) -> None:
    """Run `f(*args, **kwargs)` on process `where` and forget it: an error is printed on that process's stderr.

    Example: `remote_do(print, 2, "hello")`
    """
    check_callable(f)
    if type(where) is not int:
        where = _not_bool(config.as_int(where))
    if not isinstance(where, int):
        _remotecall_somewhere(f, where, args, kwargs, do=True)
        return
    node = _node()
    if where == node.pid:
        node.deliver(lambda: _do(node.call, (f, args, kwargs), {}))
        return
    node.peers.ensure(where)
    _send(node, where, "do", RRID(0, 0), f, args, kwargs, 0)


def _send(
    node: Node,
    pid: int,
    mode: str,
    rrid: RRID,
    f: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    number: int,
    waits: bool = False,
    handle: gc.Handle | None = None,
) -> None:
    """`waits`: the caller does not go on before the answer has come, so that its arrays stay as they are. `handle`: of
    the reference that the request makes; it counts from the moment on at which the request goes out."""
    function = node.encoder.encode(f, pid)
    seen: list[Any] = []
    data, buffers = codec.encode_args(args, kwargs, pid, seen)
    control = structs.pack_request(
        number, mode, *rrid, function.name, len(function.data), len(function.buffers), function.reusable
    )
    settle_puts(pid)
    if not waits:  # fresh memory for copies is dear
        buffers = stable(buffers)
    lent = seen or function.references
    with gc.of(node).lending((*function.references, *seen), pid) if lent else _NOTHING_LENT:
        if handle is not None:
            handle.held = 1  # whoever is interrupted from here on has sent it, but for a moment
        node.peers.send(pid, Kind.REQUEST, control, function.data + data, [*function.buffers, *buffers])


def _wrapped(node: Node, error: BaseException) -> RemoteException:
    return RemoteException(node.pid, CapturedException(error, traceback_text(error)))


def _run_here(
    f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], settle: Callable[[Outcome], object]
) -> None:
    """On a library thread: `settle(outcome)`, unless there is none (`Node.drops`)."""
    node = _node()
    try:
        outcome = Outcome(LOCAL_VALUE, node.call(f, args, kwargs), (), node.pid)
    except BaseException as error:
        if node.drops(error):
            return
        outcome = Outcome(RAISED_HERE, _wrapped(node, error), (), node.pid)
    finally:
        settle_puts()
    settle(outcome)


def _do(f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        f(*args, **kwargs)
    except BaseException as error:
        if not _node().drops(error):
            print_error(error)


def _do_there(f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """On the worker of a pool: who waits for it waits for the worker to be free, and not for the error."""
    served = _node().served
    call = served.begin(name_of(f))
    try:
        f(*args, **kwargs)
    except BaseException as error:
        served.end(call, RAISED)
        if not _node().drops(error):
            print_error(error)
    else:
        served.end(call, RETURNED)


def print_error(exc: BaseException) -> None:
    """On stderr: an error that nobody else can get; never raises, whatever the user has made of stderr."""
    stream = sys.stderr
    if stream is None:
        return
    try:
        stream.write(traceback_text(exc))
        stream.flush()
    except Exception:  # closed, or the user's own: there is nowhere left to say it
        pass


def _not_bool(where: Where) -> Where:
    return config.as_pid(where) if isinstance(where, bool) else where


# -- pools and "any" ---------------------------------------------------------------------------------------------


def _fetch_somewhere(f: Any, where: Any, args: Any, kwargs: Any) -> Any:
    """Take a worker, call there, give the worker back."""
    if where == "any":
        return remotecall_fetch(f, next_worker(), *args, **kwargs)
    pool = _pool(where)
    while True:
        lease, pid = _lease(pool), 0
        try:
            pid = lease.result()
            return remotecall_fetch(_prepared(pool, f, pid), pid, *args, **kwargs)
        except ProcessExitedException as error:
            if error.maybe_ran or error.worker_id != pid:
                raise
        finally:
            lease.back()


def _remotecall_somewhere(f: Any, where: Any, args: Any, kwargs: Any, do: bool = False) -> Future[Any]:
    """The worker is held until the call has ended (CONFORMANCE D13)."""
    if where == "any":
        pid = next_worker()
        if do:
            remote_do(f, pid, *args, **kwargs)
            return Future()
        return start(f, pid, args, kwargs)
    pool = _pool(where)
    while True:
        lease, pid = _lease(pool), 0
        try:
            pid = lease.result()
            prepared = _prepared(pool, f, pid)
            called, given = (_do_there, (prepared, args, kwargs)) if do else (prepared, args)
            future = start(called, pid, given, {} if do else kwargs)
        except BaseException as error:
            lease.back()
            if isinstance(error, ProcessExitedException) and error.worker_id == pid:
                continue  # it had died before; the pool will not give it out again
            raise
        # `prepared` keeps the function on the worker until the call has ended.
        future.add_done_callback(partial(_give_back, lease, prepared))
        return future


class PlainLease:
    """A worker of a pool with a `take` and `put` of the user's own; see `pools.Lease`."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._pid = pool.take()

    def result(self) -> Any:
        """The worker."""
        return self._pid

    def back(self) -> None:
        """The call is over."""
        self._pool.put(self._pid)

    later = back  # Ctrl-C has come in it: once more


def _lease(pool: Any) -> Any:
    lease = getattr(pool, "lease", None)
    return PlainLease(pool) if lease is None else lease()


def _pool(where: Any) -> Any:
    if hasattr(where, "take") and hasattr(where, "put"):
        return where
    raise TypeError(f"a call goes to a pid, 'any' or a WorkerPool, not {codec.describe(where)}")


def _give_back(lease: Any, prepared: Any, done: Future[Any]) -> None:
    try:
        lease.back()
    except BaseException:  # Ctrl-C: it is logged, as errors of callbacks are, and the log may keep all that it held
        lease.later()
        raise


def _prepared(pool: Any, f: Any, pid: int) -> Any:
    """What to call on `pid`; a pool of the user's own need not know of this."""
    prepare = getattr(pool, "prepare", None)
    return f if prepare is None else prepare(f, pid)


def next_worker() -> int:
    """The next pid of the round robin over the workers (1 if there is none)."""
    from distpool.node.node import workers_of

    node = _node()
    pids = workers_of(node)
    return pids[next(node.round_robin) % len(pids)]


def _listed() -> list[int]:
    """On pid 1: the workers."""
    group = _node().group
    return group.listed() if group is not None else []


# -- the callee's side -------------------------------------------------------------------------------------------


class Callee:
    """Runs REQUESTs. `_on_request` on the leader, `_run` on the main thread or a cached one."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._refs = gc.of(node)
        self._serving = serving(node)
        self._served = node.served
        self._functions: dict[bytes, Any] = {}  # functions by reference that were decoded before
        self._cancelled: set[tuple[int, int]] = set()
        node.handlers[Kind.REQUEST] = self._on_request
        node.handlers[Kind.CANCEL_REQUEST] = lambda link, frame: None  # the answer is simply dropped by the asker
        peers = node.peers
        peers.members_asked = lambda node: list(remotecall_fetch(_listed, 1))
        node.handlers[Kind.ADDRESS] = peers.on_address
        node.handlers[Kind.DIAL] = peers.on_dial
        node.handlers[Kind.DEAD] = peers.on_dead
        node.handlers[Kind.WHERE] = lambda link, frame: reach.on_where(node, link, frame)
        node.handlers[Kind.UNDIALLED] = lambda link, frame: reach.on_undialled(node, link, frame)
        node.handlers[Kind.IDENTITY] = peers.on_identity
        node.handlers[Kind.RELAY] = peers.on_relay

    def _on_request(self, link: Link, frame: Frame) -> None:
        message = structs.Request.unpack(frame.control)
        pid = int(link.peer)
        buffers = [link.segments.open(buffer) for buffer in frame.buffers] if frame.buffers else []
        body = bytes(frame.body)
        entry = None
        if message.mode == "future":
            rrid = RRID(message.whence, message.ident)
            entry = self._refs.owner.touch(rrid, message.whence)
            self._refs.owner.watch(entry, lambda outcome: self._serving.notify(pid, rrid, outcome))

        def work(call: Any) -> None:
            self._run(pid, message, body, buffers, entry, call)

        runner = self._node.runner
        if runner is not None:
            runner.offers.offer(work)
        else:
            self._node.threads.run(lambda: work(_plain_call))

    def _run(self, pid: int, message: Any, body: bytes, buffers: list[Any], entry: Any, call: Any) -> None:
        running = self._served.begin(message.name, True)
        try:
            value = self._value(message, body, buffers, call, running)
        except BaseException as error:
            self._served.end(running, RAISED)
            if not self._node.drops(error):
                self._failed(pid, message, entry, error)
            return
        self._served.end(running, RETURNED)
        if entry is not None:
            self._refs.owner.settle(entry, Outcome(LOCAL_VALUE, value, (), self._node.pid))
        elif message.mode == "fetch":
            self._serving.reply_value(pid, message.request, value)

    def _value(self, message: Any, body: bytes, buffers: list[Any], call: Any, running: Running) -> Any:
        """A frame of its own, so that `_failed` can empty it."""
        arguments, parts = body[message.function_bytes :], buffers[message.function_buffers :]
        try:
            function = self._function(message, body, buffers)
        except BaseException:
            give_back(arguments, parts)
            raise
        args, kwargs = decode_lent(codec.decode_args, arguments, parts)
        del buffers, parts
        if message.name in SHOWN or self._served.times is not None:
            self._served.loaded(running, function, args)
        return call(function, args, kwargs)

    def _function(self, message: Any, body: bytes, buffers: list[Any]) -> Any:
        data = body[: message.function_bytes]
        if not message.reusable:
            return decode_lent(decode_function, data, buffers[: message.function_buffers])
        function = self._functions.get(data)
        if function is None:
            function = decode_function(data, buffers[: message.function_buffers])
            if len(self._functions) >= _CACHED_FUNCTIONS:
                self._functions.clear()
            self._functions[data] = function
        return function

    def _failed(self, pid: int, message: Any, entry: Any, error: BaseException) -> None:
        if entry is not None:
            seen: list[Any] = []
            data = encode_exception(error, pid, seen=seen)
            self._refs.owner.settle(entry, stored(data, seen, self._node.pid))
        elif message.mode == "fetch":
            self._serving.reply_error(pid, message.request, error)
        else:
            print_error(error)
        # An argument that is a future keeps its exception, and that the frames in which it was raised, and those the
        # future: without this the reference would stay registered at its owner until the cycle collector runs.
        traceback.clear_frames(traceback_of(error))


def _plain_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def install(node: Node) -> None:
    """Register the kinds of remote calls, references and channels with this node (once)."""
    if _installing._is_owned():
        raise RuntimeError("remote calls are just being set up, by this very thread: a finalizer cannot use them yet")
    with _installing:
        if node.callee is None:
            node.remote_calls_loaded = True
            node.callee = Callee(node)
            channelserver.install(node)


_installing: Any = threading.RLock()  # two threads make their first remote call at the same time


def _node() -> Node:
    node = nodes.current()
    if node.callee is None:
        install(node)
    return node
