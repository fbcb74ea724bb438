"""This process as a member of the process group (layer 3).

The only global state of the package is `_node` here: the node of this process, made when it is first needed. It owns
the I/O loop, the thread cache, the function encoder, the segment pool, and the table `handlers` by which upper layers
receive their kinds of frames. Workers are nodes as well (`become_worker`).

After `os.fork` in user code the child is alone: it only closes what it inherited (the selector is shared with the
parent: unregistering would disturb it) and drops the node; executors notice by `Node.ospid`.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import sys
import threading
from collections.abc import Callable

from distpool.errors import DistpoolError, RemoteException
from distpool.hints import Any
from distpool.logs import Log
from distpool.node.logrecords import Records
from distpool.node.peers import Peers
from distpool.node.served import RAISED, RETURNED, Served, name_of
from distpool.node.threads import SerialQueue, ThreadCache
from distpool.transport.ioloop import IoLoop
from distpool.transport.link import Link
from distpool.transport.segments import Kept
from distpool.transport.shm import SegmentPool
from distpool.wire import codec
from distpool.wire.frames import Frame, Kind
from distpool.wire.functions import FunctionEncoder

_log = Log("node")
_node: Node | None = None
_making = threading.RLock()  # protects _node while it is made


class Node:
    """One process of the group: pid 1 is the master."""

    def __init__(self, pid: int, cookie: str) -> None:
        self.pid = pid
        self.cookie = cookie
        self.ospid = os.getpid()
        self.identity: Any = None  # transport.tls.Identity, once this process has, or needs, encrypted links
        self._spreading: Any = None
        self.making_parts = threading.RLock()  # protects what the master makes on first use: identity, group, ...
        self.loop = IoLoop()
        self.threads = ThreadCache("distpool-task", self.loop.call_later)
        self.notices = SerialQueue(self.threads)  # output and life-cycle notices, in order
        self.records = Records(self.threads)
        self.segments = SegmentPool()
        self.encoder = FunctionEncoder(Kept(self.segments, self.loop.call_soon).keep)
        self.handlers: dict[int, Callable[[Link, Frame], None]] = {}
        self.links: set[Link] = set()  # leader only
        self.loop.on_crash = self.crashed
        self.peers = Peers(self)
        self.served = Served()
        self.remote_calls_loaded = False
        self.refs: Any = None  # references that this process holds or owns (refs.gc)
        self.ahead: Any = None  # workers: what was put ahead into channels of others (refs.ahead)
        self.serving: Any = None  # the owner's side of references (refs.remote)
        self.callee: Any = None  # the callee's side of remote calls (calls)
        self.loops: dict[int, Any] = {}  # id -> weak reference: whose errors may have to be told at exit (loops)
        self.boards: Any = None  # where workers note how far they are in batches of maps (batches)
        self.default_pool: Any = None  # master: the default WorkerPool, once somebody has asked for it (pools)
        self.collecting: dict[int, list[list[Any]]] = {}  # thread id -> futures started in each of its sync() blocks
        self.brought: dict[str, Any] = {}  # globals that functions of `everywhere` brought to __main__ (mainmodule)
        self.round_robin = itertools.count()  # atomic
        self.on_fork: list[Callable[[], None]] = []  # run in a forked child before the node is dropped
        self.master_link: Link | None = None  # workers
        self.runner: Any = None  # workers: the TaskRunner
        self.worker: Any = None  # workers: the Worker
        self.topology, self.lazy = "all_to_all", True  # workers: as the master said
        self.launcher: Any = None  # master: made by the cluster layer
        self.group: Any = None  # master: the Group
        self.monitor: Any = None  # master: the Monitor
        self.top: Any = None  # master: the endpoint that DISTPOOL_TOP wants, or why there is none
        self.tracer: Any = None  # master: of a running `trace()`
        self.offered: dict[str, Any] = {}  # master: archives that workers may ask for (shipping)
        self.crews: set[Any] = set()  # master: the workers of living executors
        self.delivering: set[Any] = set()  # `Deliveries` of executors whose callbacks run
        self.loop.held.append(lambda: any(crew.scheduler.lock._is_owned() for crew in list(self.crews)))
        self.loop.held.append(lambda: any(link.writes() for link in tuple(self.links)))
        self.exports: Any = None  # executors that tasks know by key (nested)
        self.requests: Any = None  # workers: calls submitted through handles (nested)
        self.exiting = False  # the interpreter is shutting down
        self.exit_registered = False
        self.end_workers: Any = None  # master: ends the workers of addprocs at exit
        self.ends_pools = False  # the hook that terminates pools at exit is registered
        self.pools_ended = False  # it has run

    @property
    def is_master(self) -> bool:
        """Whether this process is pid 1."""
        return self.pid == 1

    def dispatch(self, link: Link, frame: Frame) -> bool:
        """Leader: hand a frame to whoever registered its kind; False if nobody did."""
        handler = self.handlers.get(frame.kind)
        if handler is None:
            if frame.kind < Kind.PEER or self.remote_calls_loaded:
                return False
            self.load_remote_calls()
            handler = self.handlers.get(frame.kind)
            if handler is None:
                return False
        handler(link, frame)
        return True

    def load_remote_calls(self) -> None:
        """Let the upper layers register their kinds: on first need, so that executors alone do not pay for them."""
        self.remote_calls_loaded = True
        importlib.import_module("distpool.calls").install(self)

    def spreading(self) -> Any:
        """Master: how big functions get to many hosts (`node.bulk.Spreading`). Any thread."""
        with self.making_parts:
            if self._spreading is None:
                self._spreading = importlib.import_module("distpool.node.bulk").Spreading(self)
            return self._spreading

    def own_identity(self) -> Any:
        """Master: the certificate and key of this cluster, made on first need. Any thread; see `transport.tls`."""
        with self.making_parts:
            if self.identity is None:
                made = importlib.import_module("distpool.transport.tls").make_identity()
                self.identity = self.identity or made
            return self.identity

    def references(self) -> Any:
        """The references of this process (`refs.gc.Refs`)."""
        if self.callee is None:
            self.load_remote_calls()
        return self.refs

    def crashed(self, error: BaseException) -> None:
        """The I/O loop met a defect of ours: whoever waits hears of it, with the traceback, instead of hanging."""
        text = whole_text(error)

        def make_error() -> DistpoolError:
            return DistpoolError(f"internal error of distpool in its I/O thread:\n{text}")

        for fail in [*(crew.fail for crew in list(self.crews)), self.peers.requests.fail_all]:
            try:
                fail(make_error)
            except Exception:
                _log.exception("not all that waits can be told")

    def tell(self, seconds: float, whole: bool = False) -> None:
        """Wait until the user has been told everything (output, notices, the log). No longer than `seconds` behind one
        thing, if the program ends (`whole`), else in all; but as with what it prints itself, its output then waits for
        whoever reads it."""
        notices, before = self.notices, -1
        while not notices.join(seconds) and whole and (notices.prints or notices.ran != before):
            before = notices.ran
        self.records.join(seconds)

    def deliver(self, function: Callable[[], object]) -> None:
        """Run `function()` on a library thread: it may be user code and may block."""
        self.threads.run(function)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the user's to this very process, on a library thread: in a worker, `interrupt` ends it as well."""
        runner, served = self.runner, self.served
        call = served.begin(name_of(function), True)
        served.loaded(call, function, args)
        try:
            value = function(*args, **kwargs) if runner is None else runner.interrupts.call(function, args, kwargs)
        except BaseException:
            served.end(call, RAISED)
            raise
        served.end(call, RETURNED)
        return value

    def drops(self, error: BaseException) -> bool:
        """Whether a call that ends in `error` here has no outcome, because this process was removed: those who wait for
        it are to see the end of this process (`ResultWriter.drops`)."""
        return self.runner is not None and self.runner.results.drops(error)

    def given_away(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the calling thread, if it runs a task of an executor, has given its slot away."""
        runner = self.runner
        if runner is not None and threading.get_ident() in runner.running:
            given: contextlib.AbstractContextManager[object] = runner.slot_given_away()
            return given
        return contextlib.nullcontext()

    def set_authkey(self, key: bytes) -> None:
        """Use the caller's `multiprocessing` authkey, so that its Manager proxies work in this worker."""
        import multiprocessing

        multiprocessing.current_process().authkey = key


def current() -> Node:
    """The node of this process; made, with its I/O thread, on first use."""
    global _node
    node = _node
    if node is None:
        with _making:
            node = _node
            if node is None:
                node = Node(1, os.urandom(16).hex())
                node.loop.start()
                if _node is None:
                    _node = node
                else:  # made by a `__del__` that the collector has run meanwhile
                    node.loop.stop()
                    node = _node
    return node


def existing() -> Node | None:
    """The node of this process if there is one already."""
    return _node


def may_be_struck() -> bool:
    """Whether Ctrl-C, or an interrupt of the call that runs in it, may end what the calling thread does."""
    runner = None if _node is None else _node.runner
    on_main = threading.current_thread() is threading.main_thread()
    return on_main or (runner is not None and runner.interrupts.runs_call())


def become_worker(cookie: str) -> Node:
    """Make this process a worker's node; its pid comes with JOIN."""
    global _node
    node = Node(0, cookie)
    node.loop.owns_interrupts = True
    codec.classes_in_main = True
    _node = node
    return node


def workers_of(node: Node) -> list[int]:
    """Pids of the workers as this process sees them: all members but pid 1, or [1] if there are none."""
    if node.is_master:
        pids = node.group.listed() if node.group is not None else []
    else:
        pids = node.peers.ask_workers()
    return pids or [1]


def _own_pid() -> int:
    return 1 if _node is None else _node.pid


def _log_elsewhere(write: Callable[[], object]) -> bool:
    node = _node
    if node is None or not node.loop.leads or sys.is_finalizing():
        return False
    node.records.write(write)
    return True


RemoteException.own_pid = staticmethod(_own_pid)  # type: ignore[method-assign]
Log.elsewhere = staticmethod(_log_elsewhere)


def whole_text(error: BaseException) -> str:
    """The error with its traceback; what it can still be told of, where the interpreter itself has been broken."""
    try:
        import traceback

        return "".join(traceback.format_exception(error))
    except Exception as second:
        return f"{type(error).__name__} (without its traceback: {type(second).__name__})"


def _before_fork() -> None:
    """Arrays of the user lie in memory that the senders use again once this process, and not its child, drops them."""
    node = _node
    for link in () if node is None else (*node.links, node.master_link):
        if link is not None and link.segments is not None:
            link.segments.pin()


def _after_fork_in_child() -> None:
    global _node, _making
    _making = threading.RLock()
    node, _node = _node, None
    if node is None:
        return
    if node.runner is not None:
        node.runner.interrupts.forked()
    for callback in node.on_fork:
        with contextlib.suppress(OSError):
            callback()
    for link in list(node.links):
        with contextlib.suppress(OSError):
            link.close_descriptor()
    with contextlib.suppress(OSError):
        node.loop.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)

__all__ = ["Node", "become_worker", "current", "existing"]
