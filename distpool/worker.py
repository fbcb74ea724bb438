"""What a launched process runs (layer 11).

    run(listener, settings)     launched by distpool: tasks on the main thread
    Worker.run_beside()         custom transports (`init_worker`): the main thread is the user's, tasks run beside it
      leader: accept, or process_messages -> Handshake (acceptor) -> JOIN -> JOINED -> TaskRunner gets the frames
      task thread: TaskRunner.run() until SHUTDOWN or until the master is gone

A worker that loses its master ends at once, also while a call runs: nobody is left to take the result. SIGINT is ours:
it raises KeyboardInterrupt only while user code runs on the main thread (`node.interrupts`).

Whoever connects and does not prove within seconds that he knows the cookie is cut off (`transport.door`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

from distpool import config, startup, trackers
from distpool.hints import Any, NoReturn
from distpool.node import node as nodes
from distpool.node.bulk import Store
from distpool.node.observe import Observer
from distpool.node.spans import Item
from distpool.node.tasks import TaskRunner
from distpool.startup import finish
from distpool.transport.door import Door
from distpool.transport.journal import Journal
from distpool.transport.link import Link
from distpool.transport.segments import Segments
from distpool.transport.stream import Adopted, Stream
from distpool.wire import messages, versions
from distpool.wire.codec import REFERENCES
from distpool.wire.frames import Frame, Kind
from distpool.wire.protocol import Handshake, Role

_LOST_MASTER = 1  # exit status
_CRASHED = 70  # the same: EX_SOFTWARE
_GREETING = 0.001  # seconds until we have answered a master that was waiting for us
_FAREWELL = 1.0  # seconds in which the master, or who reads our output, may take why this process ends
_PRESS = 0.25  # seconds before, and between two, interrupts of a call that must end
_RESERVE = 16  # threads of a worker that cannot start any: so many calls at a time beside the main one
_HASTE = 1.0  # seconds that remote calls on other threads have to end then
_GONE = ConnectionResetError, BrokenPipeError
"""The other side has died, or has closed with something unread: before it said who it is, nobody here need know."""


class Worker:
    """This worker process: its listener (if any), the link to the master, and the task loop."""

    def __init__(self, cookie: str, listener: socket.socket | None = None, identity: Any = None) -> None:
        self.node = nodes.become_worker(cookie)
        self.node.worker = self
        self.node.identity = identity
        self.loop = self.node.loop
        self.memory_limit = 0  # bytes, 0: none
        self.runner: TaskRunner | None = None
        self.observer: Observer | None = None
        self.loop.on_crash = self._on_crash
        self.parent = 0  # ospid of whoever had this process started, which is ours altogether; 0: it is the user's
        self._listener = listener
        self._joined = threading.Event()
        self._segments: Segments | None = None
        self._replies: set[Link] = set()  # links of custom transports: who dialled wants to hear our pid; leader
        if listener is not None:
            self.node.on_fork.append(listener.close)
        self._door = Door(
            self.loop, listener, self.node.identity, lambda stream: self.take(stream, Role.ACCEPTOR), self._complain
        )

    def run(self) -> int:
        """Serve on this, the main, thread until the master says goodbye; returns the exit status."""
        timeout = config.worker_timeout()
        deadline = self.loop.call_later(timeout, lambda: self._give_up(timeout))
        self.loop.call_later(_GREETING, _load_for_join)
        signal.signal(signal.SIGINT, self._on_sigint)
        trackers.share()
        self.loop.lead(self._joined.is_set)
        deadline.cancel()
        self.loop.start()
        assert self.runner is not None
        self.runner.interrupts.take_signals()
        return self._serve()

    def run_beside(self) -> None:
        """Serve on a thread beside the main one, which is the user's; returns at once. The process ends itself."""
        # Now: the main thread may end at once, and from then on Python refuses to import modules with an exit hook.
        importlib.import_module("distpool.pooling")
        if (3, 12) <= sys.version_info < (3, 12, 2):  # ... and to start threads (python/cpython#113964)
            self.node.threads.reserve(_RESERVE)
        timeout = config.worker_timeout()
        deadline = self.loop.call_later(timeout, lambda: self._give_up(timeout))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._on_sigint)
        self.loop.start()

        def work() -> None:
            with self.loop.following():
                self._joined.wait()
            deadline.cancel()
            finish(self._serve(), main=False)

        # Not a daemon: when the main thread is through with its own work, the interpreter waits for this one.
        threading.Thread(target=work, name="distpool-tasks").start()

    def _serve(self) -> int:
        assert self.runner is not None
        self.loop.on_tick = self.runner.tick
        code = self.runner.run()
        if self.observer is not None:
            self.observer.stop()
            self.runner.link.drain(config.worker_timeout())
        return code

    def _on_sigint(self, signum: int, frame: Any) -> None:
        if self.runner is not None:
            self.runner.interrupts.on_signal(signum, frame)

    def _give_up(self, timeout: float) -> None:
        if not self._joined.is_set():
            text = f"Master process (id 1) could not connect within {timeout} seconds."
            self._end(lambda: print(text, flush=True))

    def _end(self, last_words: Callable[[], object], status: int = _LOST_MASTER) -> NoReturn:
        """This process is of no use any more. Whoever reads its output may be gone, or leave it in a full pipe,
        with a print of the user's in front: that must not keep us here."""
        said = threading.Event()

        def say() -> None:
            try:
                last_words()
            except (OSError, ValueError, AttributeError):
                pass  # nobody reads, or user code has closed it
            finally:
                said.set()

        self.node.deliver(say)
        said.wait(_FAREWELL)
        os._exit(status)

    def _on_crash(self, error: BaseException) -> None:
        """Leader: a handler has not come to its end, so what it had in hand is lost. (As a rule a call has replaced
        something of the interpreter that everybody uses.) Whoever waits sees the end of this process instead."""
        try:
            text = f"internal error of distpool in worker {self.node.pid}:\n{nodes.whole_text(error)}"
            self._end(lambda: print(text, file=sys.stderr, flush=True), _CRASHED)
        finally:
            os._exit(_CRASHED)

    # -- interrupts (leader) -----------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """KeyboardInterrupt in every call that runs here."""
        if self.runner is not None:
            self.runner.interrupt()

    def _on_shutdown(self, link: Link, frame: Frame) -> None:
        assert self.runner is not None
        if messages.Shutdown.unpack(frame.control).reason == "now":
            if self.runner.offers.busy:
                link.send(Kind.BUSY, messages.Busy().pack())
            self.runner.leave()
            self.loop.call_later(_PRESS, self._press)
            self.loop.call_later(_HASTE, self.runner.hurry)
        else:
            self.runner.on_shutdown(frame)

    def _press(self) -> None:
        """Until this process ends: a call may begin in the moment of the first interrupt, or swallow it."""
        self.interrupt()
        self.loop.call_later(_PRESS, self._press)

    # -- connections (leader) ----------------------------------------------------------------------------------

    def take(self, stream: Stream, role: Role, adopted: Adopted | None = None) -> None:
        """Talk to whoever is at the other end of this stream."""

        def closed(link: Link, reason: BaseException | None) -> None:
            if adopted is not None:
                adopted.end()
            self._door.forget(link)
            self._replies.discard(link)
            self.node.links.discard(link)
            self._on_closed(link, reason)

        link = Link(self.loop, stream, Handshake(role, self.node.cookie), self._on_ready, self._on_frame, closed)
        link.adopted = adopted
        # From now on: a child that is forked would hold it open when this process is gone, and nobody noticed its end.
        self.node.links.add(link)
        self._door.admit(link)
        if adopted is not None:
            self._replies.add(link)
            adopted.watch(self.loop, lambda: link.close(None))
        link.open()

    def _on_ready(self, link: Link) -> None:
        """Authenticated. The connector speaks first: that is the other side, unless a transport of ours dialled."""
        self._door.forget(link)
        if link.handshake.role is Role.CONNECTOR:
            self._replies.discard(link)
            link.send(Kind.PEER, messages.Peer(self.node.pid, False).pack())

    def _on_closed(self, link: Link, reason: BaseException | None) -> None:
        if link is not self.node.master_link:
            if self.node.peers.on_closed(link, reason):
                return
            if reason is not None and not isinstance(reason, _GONE):
                self._complain(str(reason))
            return
        if self._segments is not None:
            self._segments.close()
        self._end(lambda: sys.stdout.flush())

    def _complain(self, text: str) -> None:
        """On a library thread: stderr may be a pipe that is full at the moment."""
        head = "Invalid connection credentials"
        line = text if text.startswith(head) else f"{head}: {text}"
        self._complain_of(line)

    def _complain_of(self, line: str) -> None:
        self.node.deliver(lambda: print(line, file=sys.stderr, flush=True))

    def _on_frame(self, link: Link, frame: Frame) -> None:
        if self.runner is None or link is not self.node.master_link:
            if frame.kind == Kind.JOIN and self.runner is None:
                self._replies.discard(link)
                if self._versions_fit(link, frame):
                    self._join(link, messages.Join.unpack(frame.control))
            elif self.runner is not None:
                if frame.kind == Kind.PEER and link in self._replies:  # first of all: others' frames may follow at once
                    self._replies.discard(link)
                    link.send(Kind.PEER, messages.Peer(self.node.pid, False).pack())
                self.node.peers.on_frame(link, frame)
            return
        self.node.dispatch(link, frame)

    def _versions_fit(self, link: Link, frame: Frame) -> bool:
        """Asked before anything else of JOIN is read: it may be one of another distpool. If not, the master says why,
        and this process is of no use."""
        text = versions.mismatch(versions.read(frame.control, 1), "the master")
        if text:
            self._complain_of(text)
            link.send(Kind.JOINED, messages.Joined(versions.own(), os.getpid(), socket.gethostname(), False).pack())
            self.loop.call_later(_FAREWELL, lambda: os._exit(_LOST_MASTER))
        return not text

    def _join(self, link: Link, join: messages.Join) -> None:
        node = self.node
        node.pid = join.pid
        node.topology, node.lazy = join.topology, join.lazy
        node.master_link = link
        problem = self._take_resources(join.resources) if join.resources is not None else ""
        shares = False
        journal = Journal.private()
        if join.journal:
            with contextlib.suppress(OSError, ValueError):
                journal = Journal.attach(join.journal, join.journal_size)
                shares = True
        link.shares_memory = shares
        link.peer = 1
        self._segments = link.segments = Segments(link, node.segments)
        node.peers.add(1, link)
        if join.master != 1:
            node.peers.add(join.master, link)  # as what references call it
        self.runner = runner = TaskRunner(link, journal, self._segments, node.threads.run)
        node.runner = runner
        store = Store(node)
        runner.wait_for_buffers, runner.drop_buffers = store.wait, store.drop
        self.loop.guard = runner.interrupts
        runner.interrupts.listen()
        runner.results.memory_limit, runner.results.pid = self.memory_limit, join.pid
        runner.results.entrust = lambda seen: node.references().entrust(seen)
        runner.resident, runner.take_lent, runner.drop_lent = _resident, _take_lent, _drop_lent
        self.observer = Observer(node, link, runner)
        segments = self._segments
        node.handlers.update(
            {
                Kind.CALLS: lambda _, frame: runner.on_calls(frame),
                Kind.FUNCTION: lambda _, frame: runner.on_function(frame),
                Kind.FORGET: lambda _, frame: runner.on_forget(frame),
                Kind.INITIALIZE: lambda _, frame: runner.on_initialize(frame),
                Kind.RECALL: lambda _, frame: runner.on_recall(frame),
                Kind.SHUTDOWN: self._on_shutdown,
                Kind.INTERRUPT: lambda _, frame: self.interrupt(),
                Kind.CONNECT: self._on_connect,
                Kind.LAUNCH: self._on_launch,
                Kind.SEGMENTS_FREE: lambda _, frame: segments.on_free(
                    messages.SegmentsFree.unpack(frame.control).segments
                ),
            }
        )
        answer = messages.Joined(versions.own(), os.getpid(), socket.gethostname(), shares, problem)
        link.send(Kind.JOINED, answer.pack())
        # Perhaps it has to be loaded, while the first call is under way; nothing of the user's runs before `_joined`.
        node.set_authkey(link.handshake.veil(bytes.fromhex(join.authkey)))
        if self.parent:
            first = 1 if join.master == 1 else join.pid >> 16 << 16 | 1  # see `Group.first_pid`
            _pose_as_child(join.pid - first, self.parent)
        self._joined.set()

    def _take_resources(self, message: dict[str, Any]) -> str:
        """Restrict this process to its share of the host; returns what is wrong with it."""
        from distpool.managers import resources

        try:
            resources.apply(message)
            if message["memory"] and not self.memory_limit:  # else whoever started us has seen to it
                self.memory_limit = int(message["memory"])
                limit_memory(self.memory_limit)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    def _bound_to(self) -> str:
        """The address of our listener if it is one that others may bind to as well."""
        name = self._listener.getsockname() if self._listener is not None else ""
        return str(name[0]) if isinstance(name, tuple) else ""

    def _on_launch(self, link: Link, frame: Frame) -> None:
        """The first of its kind brings the module, whose imports other workers need not pay."""
        from distpool.siblings import Siblings

        Siblings(self.node, link, self._bound_to())
        self.node.dispatch(link, frame)

    def _on_connect(self, link: Link, frame: Frame) -> None:
        """Links that are not lazy."""
        pids = messages.Connect.unpack(frame.control).pids

        def work() -> None:
            problems: list[list[Any]] = []
            for pid in pids:
                try:
                    self.node.peers.ensure(pid)
                except Exception as error:
                    problems.append([pid, str(error)])
            link.send(Kind.CONNECTED, messages.Connected(problems).pack())

        if pids:
            self.node.references()  # loads the layers that know how links are made
        self.node.deliver(work)


def run(listener: socket.socket, settings: dict[str, Any]) -> int:
    """Serve the master that connects to `listener` and knows `settings["cookie"]`; returns the exit status.

    `settings["tls"]`: certificate and key of the cluster; then only its members' encrypted connections are accepted.
    """
    identity = None
    if settings.get("tls") is not None:
        from distpool.transport.tls import Identity

        identity = Identity.from_settings(settings["tls"])
    worker = Worker(settings["cookie"], listener, identity=identity)
    worker.parent = settings.get("master") or os.getppid() or 1  # 0: of another pid namespace
    extra = settings.get("extra") or {}
    if "fetch" in extra:
        from distpool import shipping

        shipping.install(extra["fetch"])
    limit = extra.get("memory_limit")
    if limit:
        limit_memory(int(limit))
        worker.memory_limit = int(limit)
    return worker.run()


def _load_for_join() -> None:
    """While the master checks our answer to its greeting: what takes a millisecond to find, and `_join` needs."""
    versions.own()
    importlib.import_module("multiprocessing.process")


def _pose_as_child(number: int, parent: int) -> None:
    """`multiprocessing` is to say here what it says in children of its own: code asks it whether it runs in the main
    process, and counts workers by their identity, from 1. Not daemonic: tasks may have children, those of a DistPool
    as well."""
    process: Any = importlib.import_module("multiprocessing.process")
    own = process.current_process()
    own.__class__ = process.BaseProcess
    own._name, own._identity, own._parent_pid = f"DistpoolWorker-{number}", (number,), parent
    # To be read when the parent has ended, which takes us along. Without one: a pipe that nobody will close.
    sentinel = startup.lifeline if startup.lifeline >= 0 else os.pipe()[0]
    process._parent_process = process._ParentProcess("MainProcess", parent, sentinel)


def _resident(data: bytes) -> Any:
    from distpool.refs.lent import Resident  # here: most workers are never sent a reference

    return Resident(data)


def _take_lent(decode: Callable[[Any, Any], Any], item: Item) -> Any:
    from distpool.refs.lent import decode_lent

    payload, item.payload = item.payload, b""
    return decode_lent(decode, payload, item.buffers)


def _drop_lent(item: Item) -> None:
    if REFERENCES in item.payload:
        from distpool.refs.lent import give_back

        give_back(item.payload, item.buffers)


def limit_memory(limit: int) -> None:
    """Let the kernel refuse private memory beyond `limit` bytes: the task that asks for it gets MemoryError.

    RLIMIT_DATA counts what is allocated, shared segments and mapped files do not (Linux; elsewhere it may do nothing).
    Watching the resident size from outside was rejected: it polls, and kills instead of raising.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
