"""What a launched process runs (layer 11).

    run(listener, settings)
      leader: accept -> Handshake (acceptor) -> JOIN -> JOINED -> TaskRunner gets the frames
      main thread: TaskRunner.run() until SHUTDOWN or until the master is gone

A worker that loses its master ends at once, also while a call runs: nobody is left to take the result. SIGINT is ours:
it raises KeyboardInterrupt only while user code runs on the main thread (`TaskRunner.interruptible`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import sys
import threading
from typing import Any

from distpool import config
from distpool.node import node as nodes
from distpool.node.observe import Observer
from distpool.node.tasks import TaskRunner
from distpool.transport.journal import Journal
from distpool.transport.link import Link
from distpool.transport.segments import Segments
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind
from distpool.wire.protocol import Handshake, Role

_LOST_MASTER = 1  # exit status


class Worker:
    """This worker process: its listener, the link to the master, and the task loop."""

    def __init__(self, listener: socket.socket, settings: dict[str, Any]) -> None:
        self.node = nodes.become_worker(settings["cookie"])
        self.loop = self.node.loop
        self.runner: TaskRunner | None = None
        self.observer: Observer | None = None
        self._listener = listener
        self._joined = threading.Event()
        self._segments: Segments | None = None
        listener.setblocking(False)
        self.loop.register(listener, self._on_accept)

    def run(self) -> int:
        """Serve until the master says goodbye; returns the exit status."""
        timeout = config.worker_timeout()
        deadline = self.loop.call_later(timeout, lambda: self._give_up(timeout))
        signal.signal(signal.SIGINT, self._on_sigint)
        self.loop.lead(self._joined.is_set)
        deadline.cancel()
        assert self.runner is not None
        self.loop.on_tick = self.runner.tick
        self.loop.start()
        code = self.runner.run()
        if self.observer is not None:
            self.observer.stop()
            self.runner.link.drain(timeout)
        return code

    def _on_sigint(self, signum: int, frame: Any) -> None:
        if self.runner is not None and self.runner.interruptible:
            self.runner.interruptible = False
            raise KeyboardInterrupt

    def _give_up(self, timeout: float) -> None:
        print(f"Master process (id 1) could not connect within {timeout} seconds.", flush=True)
        os._exit(_LOST_MASTER)

    # -- leader ------------------------------------------------------------------------------------------------

    def _on_accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = self._listener.accept()
            handshake = Handshake(Role.ACCEPTOR, self.node.cookie)
            Link(self.loop, sock, handshake, self._on_ready, self._on_frame, self._on_closed).open()

    def _on_ready(self, link: Link) -> None:
        pass  # the connector speaks first

    def _on_closed(self, link: Link, reason: BaseException | None) -> None:
        if link is not self.node.master_link:
            if self.node.peers.on_closed(link, reason):
                return
            if reason is not None:
                print(reason, file=sys.stderr, flush=True)
            return
        if self._segments is not None:
            self._segments.close()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(_LOST_MASTER)

    def _on_frame(self, link: Link, frame: Frame) -> None:
        if self.runner is None or link is not self.node.master_link:
            if frame.kind == Kind.JOIN and self.runner is None:
                self._join(link, messages.Join.unpack(frame.control))
            elif self.runner is not None:
                self.node.peers.on_frame(link, frame)
            return
        self.node.dispatch(link, frame)

    def _join(self, link: Link, join: messages.Join) -> None:
        node = self.node
        node.pid = join.pid
        node.master_link = link
        node.set_authkey(bytes.fromhex(join.authkey))
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
        self.runner = runner = TaskRunner(link, journal, self._segments, node.threads.run)
        node.runner = runner
        runner.lend = lambda seen: node.references().lend(seen, 1)
        self.observer = Observer(node, link, runner)
        segments = self._segments
        node.handlers.update(
            {
                Kind.CALLS: lambda _, frame: runner.on_calls(frame),
                Kind.FUNCTION: lambda _, frame: runner.on_function(frame),
                Kind.FORGET: lambda _, frame: runner.on_forget(frame),
                Kind.INITIALIZE: lambda _, frame: runner.on_initialize(frame),
                Kind.RECALL: lambda _, frame: runner.on_recall(frame),
                Kind.SHUTDOWN: lambda _, frame: runner.on_shutdown(frame),
                Kind.INTERRUPT: lambda _, frame: os.kill(os.getpid(), signal.SIGINT),
                Kind.SEGMENTS_FREE: lambda _, frame: segments.on_free(
                    messages.SegmentsFree.unpack(frame.control).segments
                ),
            }
        )
        answer = messages.Joined(nodes.versions(), os.getpid(), platform.node(), shares)
        link.send(Kind.JOINED, answer.pack())
        self._joined.set()


def run(listener: socket.socket, settings: dict[str, Any]) -> int:
    """Serve the master that connects to `listener` and knows `settings["cookie"]`; returns the exit status."""
    return Worker(listener, settings).run()
