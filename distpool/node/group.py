"""The workers as the master sees them (layer 3).

    LAUNCHED --link connected--> CONNECTING --JOINED--> READY --goodbye--> LEAVING --> GONE
    any state --process exits, link ends, output ends--> GONE, once; only then is anybody told

A worker's end has up to three signs: the exit status, the end of its link and the end of its output. `_check_gone`
collects them, because the error that callers get shall carry the exit status and the last output lines, and because
results that were already on the way (socket, journal) still count. Each sign is waited for, but not for long: a child
of the worker may hold its pipes open. Everything here runs on the leader unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

from distpool.errors import LaunchWorkerError, ProcessExitedException, VersionMismatchError
from distpool.node.node import Node, versions
from distpool.node.output import OutputHook, OutputReader
from distpool.transport.journal import Journal
from distpool.transport.link import Link
from distpool.transport.segments import Segments
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind
from distpool.wire.protocol import Handshake, Role

log = logging.getLogger("distpool.group")

_EXIT_GRACE = 1.0  # seconds to wait for the exit status once the link is gone, before the process is killed
_OUTPUT_GRACE = 0.25  # seconds to wait for the end of the output once the process is gone


class State(enum.Enum):
    """Where a member stands."""

    LAUNCHED = "launched"
    CONNECTING = "connecting"
    READY = "ready"
    LEAVING = "leaving"
    GONE = "gone"


_ALLOWED = {
    (State.LAUNCHED, State.CONNECTING),
    (State.CONNECTING, State.READY),
    (State.READY, State.LEAVING),
    *((state, State.GONE) for state in State if state is not State.GONE),
}


class Member:
    """One worker process of this group: its pid, process handle, link, journal and output."""

    def __init__(self, group: Group, pid: int, process: Any, address: tuple[Any, ...]) -> None:
        self.group = group
        self.pid = pid
        self.process = process
        self.address = address
        self.ospid: int = process.ospid if process is not None else 0
        self.host = "localhost"
        self.state = State.LAUNCHED
        self.link: Link | None = None
        self.journal: Journal | None = None
        self.segments: Segments | None = None
        self.output: OutputReader | None = None
        self.reason = ""  # why we killed it, if we did
        self.tracer: Any = None  # of a running `trace()`
        self.meter: Any = None  # what `stats()` saw last
        self.on_joined: Callable[[Member], None] = lambda member: None
        self.on_frame: Callable[[Member, Frame], None] = lambda member, frame: None
        self.on_gone: Callable[[Member, BaseException | None], None] = lambda member, reason: None
        self._failure: BaseException | None = None
        self._exited = process is None
        self._link_ended = False
        self._output_waited = False
        self._deadline: Any = None

    @property
    def exitcode(self) -> int | None:
        """Exit status (negative: signal) once known."""
        return self.process.exitcode if self.process is not None else None

    @property
    def last_output(self) -> str:
        """The last lines that the worker printed."""
        return "\n".join(self.output.tail) if self.output is not None else ""

    def move(self, state: State) -> None:
        """Change state; an illegal move is a defect of ours."""
        if (self.state, state) not in _ALLOWED:
            raise RuntimeError(f"worker {self.pid}: illegal move from {self.state.value} to {state.value}")
        self.state = state

    def kill(self, reason: str = "") -> None:
        """End the process with SIGKILL. Any thread."""
        if reason and not self.reason:
            self.reason = reason
        if self.process is not None:
            self.process.kill()
        elif self.link is not None:
            self.link.close(None)

    # -- coming up ---------------------------------------------------------------------------------------------

    def start(self, timeout: float) -> None:
        """Watch the process and connect to it."""
        self._deadline = self.group.node.loop.call_later(timeout, lambda: self._too_late(timeout))
        process = self.process
        if process is not None and process.output >= 0:
            node = self.group.node
            self.output = OutputReader(
                node.loop, process.output, self.pid, node.notices, lambda: self.group.output_hook, process.early_output
            )
            self.output.on_end = self._check_gone
        self.move(State.CONNECTING)
        try:
            self._connect()
        except OSError as error:
            self._failure = error
            self.kill(f"it could not be reached: {error}")
            self._link_ended = True
        if process is not None:
            process.add_exit_callback(self._on_exit)
        self._check_gone()

    def _connect(self) -> None:
        if self.address[0] == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        else:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.connect(self.address[1] if self.address[0] == "unix" else tuple(self.address[1:]))
        except OSError:
            sock.close()
            raise
        node = self.group.node
        handshake = Handshake(Role.CONNECTOR, node.cookie)
        self.link = Link(node.loop, sock, handshake, self._on_ready, self._on_link_frame, self._on_link_closed)
        self.link.peer = self.pid
        node.links.add(self.link)
        self.link.open()

    def _too_late(self, timeout: float) -> None:
        if self.state in (State.LAUNCHED, State.CONNECTING):
            self.kill(f"it did not join within {timeout} seconds")

    def _on_ready(self, link: Link) -> None:
        with contextlib.suppress(OSError):
            self.journal = Journal.create()
        journal = self.journal
        authkey = bytes(multiprocessing.current_process().authkey).hex()
        join = messages.Join(
            self.pid, versions(), authkey, journal.path if journal else "", journal.size if journal else 0, ""
        )
        link.send(Kind.JOIN, join.pack())

    def _on_link_frame(self, link: Link, frame: Frame) -> None:
        if frame.kind == Kind.SEGMENTS_FREE:
            if self.segments is not None:
                self.segments.on_free(messages.SegmentsFree.unpack(frame.control).segments)
        elif self.state is State.CONNECTING:
            if frame.kind == Kind.JOINED:
                self._on_join(link, messages.Joined.unpack(frame.control))
        elif not self.group.node.dispatch(link, frame):
            self.on_frame(self, frame)

    def _on_join(self, link: Link, joined: messages.Joined) -> None:
        if joined.versions != versions():
            self._failure = VersionMismatchError(
                f"worker {self.pid} runs {joined.versions}, this process {versions()} (wire, Python, byte order)"
            )
            self.kill(str(self._failure))
            return
        self.ospid, self.host = joined.ospid, joined.host
        link.shares_memory = joined.shares_memory
        if self.journal is not None:
            if joined.shares_memory:
                self.journal.attached()
            else:
                self.journal.close()
                self.journal = None
        self.segments = link.segments = Segments(link, self.group.node.segments)
        self._deadline.cancel()
        self.move(State.READY)
        self.group.node.peers.add(self.pid, link)
        for watcher in list(self.group.joined_watchers):
            watcher(self)
        self.on_joined(self)

    # -- the end -----------------------------------------------------------------------------------------------

    def say_goodbye(self, patience: float) -> None:
        """Let the worker finish what it was sent and exit; it is killed after `patience` seconds."""
        if self.state is State.READY and self.link is not None:
            self.move(State.LEAVING)
            self.link.send(Kind.SHUTDOWN, messages.Shutdown("").pack())
            self._deadline = self.group.node.loop.call_later(patience, lambda: self.kill("it did not exit when asked"))
        elif self.state is not State.GONE and self.state is not State.LEAVING:
            self.kill()

    def _on_exit(self, exitcode: int | None) -> None:
        if not self.group.node.loop.leads:
            self.group.node.loop.call_soon(lambda: self._on_exit(exitcode))
            return
        self._exited = True
        if self.link is not None:
            self.link.read_rest()  # closes it: a child of the worker may still hold the other end
        else:
            self._link_ended = True
        if self.output is not None:
            self.output.drain()
        self._check_gone()

    def _on_link_closed(self, link: Link, reason: BaseException | None) -> None:
        self.group.node.links.discard(link)
        self._link_ended = True
        if self._failure is None:
            self._failure = reason
        if not self._exited:
            # Without its link the worker is of no use, and usually just dying: give the exit status time to come.
            self.group.node.loop.call_later(_EXIT_GRACE, self._kill_unlinked)
        self._check_gone()

    def _kill_unlinked(self) -> None:
        if not self._exited:
            self.kill("its connection was lost")

    def _check_gone(self) -> None:
        if self.state is State.GONE or not (self._exited and self._link_ended):
            return
        if self.output is not None and not self.output.ended:
            if not self._output_waited:
                self._output_waited = True
                self.group.node.loop.call_later(_OUTPUT_GRACE, self._stop_output)
            return
        self.move(State.GONE)
        if self._deadline is not None:
            self._deadline.cancel()
        if self.segments is not None:
            self.segments.close()
        self.group.forget(self)
        self._tell_peers()
        self.on_gone(self, self._failure)
        if self.journal is not None:
            self.journal.close()

    def _tell_peers(self) -> None:
        """Every process of the group hears of the death, with what is known of it."""
        pid, code, output, reason = self.pid, self.exitcode, self.last_output, self.reason
        peers = self.group.node.peers
        peers.mark_dead(pid, lambda: ProcessExitedException(pid, code, True, output, reason))
        peers.broadcast_dead(pid, code, reason)

    def _stop_output(self) -> None:
        if self.output is not None:
            self.output.close()  # calls _check_gone

    def launch_error(self) -> LaunchWorkerError:
        """Why this worker never joined."""
        code = self.exitcode
        reason = self.reason or (str(self._failure) if self._failure else "")
        if not reason and code is not None:
            reason = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
        return LaunchWorkerError(self.host, self.last_output, reason)


class Group:
    """All members of this process's group. The table is changed on the leader; reading it is safe anywhere."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.members: dict[int, Member] = {}
        self.topology = "all_to_all"
        self.output_hook: OutputHook | None = None
        self.joined_watchers: list[Callable[[Member], object]] = []  # upper layers; called on the leader
        self.gone_watchers: list[Callable[[Member], object]] = []
        self.last_pid = 1  # the highest pid given so far
        self.started_hooks: list[Callable[[Any], object]] = []
        self.exited_hooks: list[Callable[[Any], object]] = []
        node.on_fork.append(self._after_fork)

    def add(self, process: Any, address: tuple[Any, ...]) -> Member:
        """A new member for a launched process; `start` it on the leader."""
        member = Member(self, next(self.node.next_pid), process, address)
        self.members[member.pid] = member
        self.last_pid = member.pid
        return member

    def may_connect(self, one: int, other: int) -> bool:
        """Whether the topology lets these two processes have a link."""
        return self.topology == "all_to_all" or 1 in (one, other)

    def forget(self, member: Member) -> None:
        """The member is gone."""
        self.members.pop(member.pid, None)
        for watcher in list(self.gone_watchers):
            watcher(member)

    def _after_fork(self) -> None:
        for member in self.members.values():
            if member.output is not None:
                member.output.close_descriptor()
            if member.process is not None:
                member.process.forget()


def of(node: Node) -> Group:
    """The group of `node`, made on first use."""
    if node.group is None:
        node.group = Group(node)
    return node.group  # type: ignore[no-any-return]


__all__ = ["Group", "Member", "State", "of"]
