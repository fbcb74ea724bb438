"""One worker as the master sees it (layer 3).

    LAUNCHED --stream--> CONNECTING --JOINED--> READY --goodbye--> LEAVING --> GONE
    any state --process exits, link ends, output ends--> GONE, once; only then is anybody told

A worker's end has up to three signs: the exit status, the end of its link and the end of its output. `_check_gone`
collects them, because the error that callers get shall carry the exit status and the last output lines, and because
results that were already on the way (socket, journal) still count. Each sign is waited for, but not for long: a child
of the worker may hold its pipes open.

The process that a manager started need not be the worker itself (`srun`, `ssh`, a queue's client). Then its end says
nothing about the worker, and killing it may hit others: for such a worker the link is what counts (`is_worker`).

Everything here runs on the leader unless it says otherwise; what managers are told (`tell`) runs in order on a library
thread, because it is user code.
"""

from __future__ import annotations

import contextlib
import enum
import signal
import socket
import time
from collections.abc import Callable

from distpool.errors import LaunchWorkerError, VersionMismatchError
from distpool.hints import TYPE_CHECKING, Any
from distpool.node.output import OutputReader
from distpool.node.threads import SerialQueue
from distpool.transport.journal import Journal
from distpool.transport.link import Link
from distpool.transport.segments import Segments
from distpool.transport.silence import is_private, is_silence
from distpool.transport.stream import Adopted, Stream
from distpool.wire import messages, versions
from distpool.wire.frames import Frame, Kind
from distpool.wire.protocol import Handshake, Role

if TYPE_CHECKING:
    from distpool.node.group import Group

_EXIT_GRACE = 1.0  # seconds to wait for the exit status once the link is gone, before the process is killed
_STATUS_GRACE = 5.0  # ... and after that, before it counts as gone without one
_OUTPUT_GRACE = 0.25  # seconds to wait for the end of the output once the process is gone
_REST_GRACE = 5.0  # seconds that the last bytes of another host's worker may be on their way
_TERM_GRACE = 1.0  # seconds between SIGTERM and SIGKILL
NOW = "now"
"""The reason in SHUTDOWN that makes a worker drop and interrupt what it runs."""


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
    """One worker process of this group: its pid, process handle, link, journal and output.

    `process` is a handle as launchers make it (`LaunchedProcess`), or None if there is nothing to watch. `config` and
    `manager` are what launched it; None where nobody cares.
    """

    def __init__(self, group: Group, pid: int, process: Any, config: Any = None, manager: Any = None) -> None:
        self.group = group
        self.pid = pid
        self.process = process
        self.config = config
        self.manager = manager
        self.tells = False  # the manager wants to hear of this worker's life
        self.kills: Callable[[], object] | None = None  # the manager's own way of ending it; runs on a library thread
        self.site = ""  # what identifies its machine to `procs(pid)`; "" is this one
        self.address: tuple[Any, ...] = ()  # where it listens; ("manager", connect_at as hex): a transport reaches it
        self.has_identity = False  # it has the cluster's certificate and key
        self.link_is_private = False  # nobody else can read what is sent there
        self.tunnelled = False  # pid 1 has not dialled `address` itself
        self.ospid: int = process.ospid if process is not None else 0
        self.host = "localhost"
        self.state = State.LAUNCHED
        self.removed = False  # `rmprocs` or the program's end wants it gone
        self.link: Link | None = None
        self.journal: Journal | None = None
        self.segments: Segments | None = None
        self.output: OutputReader | None = None
        self.reason = ""  # why we killed it, if we did
        self.started_at = 0.0
        self.tracer: Any = None  # of a running `trace()`
        self.meter: Any = None  # what `stats()` saw last
        self.served: Any = None  # what it told `stats()` last of its remote calls
        self.on_joined: Callable[[Member], None] = lambda member: None
        self.on_frame: Callable[[Member, Frame], None] = lambda member, frame: None
        self.number: int | None = None  # which of its host's workers with `resources` it is
        self.resources: Callable[[], dict[str, Any] | None] = lambda: None  # what it may use; asked when it joins
        # What is said when the connection ends before it has joined, and nobody says why.
        self.lost_early: Callable[[], BaseException | None] = lambda: None
        self.on_gone: Callable[[Member, BaseException | None], None] = lambda member, reason: None
        self.on_last_words: Callable[[], object] = _nothing  # before others hear that it is gone: see `Reclaims`
        self.borrower: Any = None  # the crew of an executor that it belongs to for the time being; leader
        self.slot: Any = None  # of executors that borrow it, one after the other
        self.notices = SerialQueue(group.node.threads)  # what its manager is told, in order
        self._failure: BaseException | None = None
        self._adopted: Adopted | None = None
        self._registered = False
        self._exited = process is None
        self._link_ended = False
        self._cut_off = False  # without its connection, and its exit status was not there in time
        self._forced = False  # we have sent it a signal
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

    @property
    def is_worker(self) -> bool:
        """Whether the process that we can see is the worker, and not something that started it."""
        if self.process is None:
            return False
        joined = self._registered and self.host == socket.gethostname()
        return bool(self.process.is_worker or (joined and self.process.ospid == self.ospid))

    @property
    def is_worker_here(self) -> bool:
        """Whether that process is the worker, and runs on this machine."""
        return self.is_worker and bool(getattr(self.process, "is_here", True))

    @property
    def listed(self) -> bool:
        """Whether it counts as one of `workers()`."""
        return self.state is State.READY and not self.removed

    def move(self, state: State) -> None:
        """Change state; an illegal move is a defect of ours."""
        if (self.state, state) not in _ALLOWED:
            raise RuntimeError(f"worker {self.pid}: illegal move from {self.state.value} to {state.value}")
        self.state = state

    def tell(self, op: str) -> None:
        """Tell the manager (`manage`), after everything it was told before. Any thread."""
        if self.tells:
            self.notices.put(lambda: self.manager.manage(self.pid, self.config, op))

    # -- coming up ---------------------------------------------------------------------------------------------

    def begin(self, timeout: float) -> None:
        """Watch the process; the member must have joined `timeout` seconds from now."""
        self.started_at = time.monotonic()
        self._deadline = self.group.node.loop.call_later(timeout, lambda: self._too_late(timeout))

    def read_output(self, descriptor: int, early: bytes = b"", on_line: Callable[[str], bool] | None = None) -> None:
        """Forward what comes from this descriptor, which is ours from now on. See `OutputReader.on_line`."""
        node = self.group.node
        self.output = OutputReader(
            node.loop, descriptor, self.pid, node.notices, lambda: self.group.output_hook, early, on_line
        )
        self.output.on_end = self._on_output_end

    def watch_exit(self) -> None:
        """Hear of the exit of the process (also if it has exited already)."""
        if self.process is not None:
            self.process.add_exit_callback(self._on_exit)
        self._check_gone()

    def connect(self, stream: Stream, adopted: Adopted | None = None) -> None:
        """There is a connection: authenticate and join."""
        node = self.group.node
        if self.state is not State.LAUNCHED or self._link_ended:  # too late
            if adopted is not None:
                adopted.end()
            stream.close()
            return
        self.move(State.CONNECTING)
        self.tunnelled = adopted is not None
        self.link_is_private = adopted is None and is_private(stream)
        handshake = Handshake(Role.CONNECTOR, node.cookie)
        self.link = link = Link(node.loop, stream, handshake, self._on_ready, self._on_link_frame, self._on_link_closed)
        link.peer, link.adopted = self.pid, adopted
        node.links.add(link)
        self._adopted = adopted
        if adopted is not None:
            adopted.watch(node.loop, lambda: link.close(ConnectionError("its stream was closed")))
        link.open()

    def failed(self, error: BaseException) -> None:
        """It cannot come up; its process is given a moment to end by itself, for its exit status."""
        if self.state not in (State.LAUNCHED, State.CONNECTING):
            return
        if self._failure is None:
            self._failure = error
        if self.link is not None:
            self.link.close(None)  # calls _on_link_closed
            return
        self._link_ended = True
        self._wait_for_exit()
        self._check_gone()

    def _too_late(self, timeout: float) -> None:
        if self.state in (State.LAUNCHED, State.CONNECTING):
            self.kill("" if self._failure is not None else f"it did not join within {timeout:g} seconds")

    def _on_ready(self, link: Link) -> None:
        with contextlib.suppress(OSError):
            self.journal = Journal.create()
        journal = self.journal
        import multiprocessing.process  # the launch of a local one has loaded it meanwhile

        authkey = bytes(multiprocessing.current_process().authkey)
        join = messages.Join(
            self.pid,
            versions.own(),
            link.handshake.veil(authkey).hex(),
            journal.path if journal else "",
            journal.size if journal else 0,
            "",
            self.group.topology,
            "",
            self.group.lazy,
            self.resources(),
            self.group.node.pid,
        )
        link.send(Kind.JOIN, join.pack())

    def _on_link_frame(self, link: Link, frame: Frame) -> None:
        if frame.kind == Kind.RESULTS and self.state is State.READY:
            self.on_frame(self, frame)
        elif frame.kind == Kind.BUSY:
            self.group.on_busy()
        elif frame.kind == Kind.SEGMENTS_FREE:
            if self.segments is not None:
                self.segments.on_free(messages.SegmentsFree.unpack(frame.control).segments)
        elif self.state is State.CONNECTING:
            if frame.kind == Kind.JOINED and self._versions_fit(frame.control):
                self._on_join(link, messages.Joined.unpack(frame.control))
        elif not self.group.node.dispatch(link, frame):
            self.on_frame(self, frame)

    def _versions_fit(self, control: bytes) -> bool:
        """Asked before anything else of the message is read: it may be one of another distpool."""
        where = f" on {self.site}" if self.site else ""
        text = versions.mismatch(versions.read(control, 0), f"worker {self.pid}{where}")
        if text:
            self._failure = VersionMismatchError(text)
            self.kill(text)
        return not text

    def _on_join(self, link: Link, joined: messages.Joined) -> None:
        self.ospid, self.host = joined.ospid, joined.host
        if self.config is not None and self.config.ospid is None:
            self.config.ospid = joined.ospid  # before the manager is told anything: it may interrupt by it
        if joined.problem:
            self._failure = ValueError(joined.problem)
            self.kill(joined.problem)
            return
        link.shares_memory = joined.shares_memory
        if self.journal is not None:
            if joined.shares_memory:
                self.journal.attached()
            else:
                self.journal.close()
                self.journal = None
        self.segments = link.segments = Segments(link, self.group.node.segments)
        if self._deadline is not None:
            self._deadline.cancel()
        self._registered = True
        self.tell("register")
        self.move(State.READY)
        self.group.node.peers.add(self.pid, link)
        self.group.introduce(self)

    # -- being ended -------------------------------------------------------------------------------------------

    def kill(self, reason: str = "", signum: int | None = None) -> None:
        """End the process with SIGKILL, or cut the connection, which ends it as well. Any thread."""
        if reason and not self.reason:
            self.reason = reason
        self._forced = True
        if self.process is not None:
            if signum is None:
                self.process.kill()
            else:
                self.process.kill(signum)
        if signum is None and not self.is_worker:
            self.group.node.loop.call_soon(self._cut)

    def _cut(self) -> None:
        """Without its connection the worker ends by itself, however it was started."""
        if self.link is not None:
            self.link.close(None)
            return
        self._link_ended = True
        self._wait_for_exit()
        self._check_gone()

    def say_goodbye(self, patience: float) -> None:
        """Let the worker finish what it was sent and exit; it is killed after `patience` seconds."""
        if self.state is State.READY and self.link is not None:
            self.move(State.LEAVING)
            self.link.send(Kind.SHUTDOWN, messages.Shutdown("").pack())
            self._deadline = self.group.node.loop.call_later(patience, lambda: self.kill("it did not exit when asked"))
        elif self.state is not State.GONE and self.state is not State.LEAVING:
            self.kill()

    def strike_off(self) -> None:
        """`rmprocs`, or the program's end, wants it gone: it is not listed any more, and takes no calls. Any thread."""
        self.removed = True
        if self.state is not State.GONE:
            self.group.node.peers.parting.add(self.pid)

    def remove(self, patience: float, by_manager: bool = True) -> None:
        """`rmprocs`: what runs there is interrupted; who has not gone `patience` seconds later is ended by force, also
        by its manager's `kill`, unless nobody but us wants it gone: then the loss of its connection is the last means.
        """
        self.removed = True
        if not by_manager:
            self.kills = None
        if self.state in (State.READY, State.LEAVING) and self.link is not None:
            if self.state is State.READY:
                self.move(State.LEAVING)
            self.link.send(Kind.SHUTDOWN, messages.Shutdown(NOW).pack())
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = self.group.node.loop.call_later(patience, self._escalate)
        elif self.state is not State.GONE:
            self.kill()

    def _escalate(self) -> None:
        """It did not go when asked."""
        if self.state is State.GONE:
            return
        self.group.on_busy()  # it may not even have been able to say so
        if self.is_worker:
            self.kill(signum=signal.SIGTERM)
        self._deadline = self.group.node.loop.call_later(_TERM_GRACE, self._force)
        if self.kills is not None:
            kills, self.kills = self.kills, None
            self.notices.put(kills)

    def _force(self) -> None:
        if self.state is not State.GONE:
            self.kill()

    # -- the end -----------------------------------------------------------------------------------------------

    def _on_exit(self, exitcode: int | None) -> None:
        if not self.group.node.loop.leads:
            self.group.node.loop.call_soon(lambda: self._on_exit(exitcode))
            return
        self._exited = True
        if self.is_worker:
            if self.link is not None and self.process.is_here:
                self.link.read_rest()  # closes it: a child of the worker may still hold the other end
            elif self.link is not None:
                # Its last bytes may still be on their way, and the end of the link with them.
                self.group.node.loop.call_later(_REST_GRACE, self.link.read_rest)
            else:
                self._link_ended = True
            if self.output is not None:
                self.output.drain()
        self._check_gone()

    def _on_link_closed(self, link: Link, reason: BaseException | None) -> None:
        self.group.node.links.discard(link)
        if self._adopted is not None:
            self._adopted.end()
        self._link_ended = True
        if self._failure is None:
            self._failure = reason
        if self._failure is None and not self._registered:
            self._failure = self.lost_early()
        if is_silence(reason) and not self._exited and not self.is_worker_here:
            self.reason = self.reason or f"its host does not answer: {reason}"
            # No news of its process will come from there; should the host come back, the signal still ends it.
            if self.is_worker:
                self.process.kill()
            self._exited = True
        self._wait_for_exit()
        self._check_gone()

    def _wait_for_exit(self) -> None:
        """Without its link the worker is of no use, and usually just dying: give the exit status time to come."""
        if not self._exited:
            self.group.node.loop.call_later(_EXIT_GRACE, self._kill_unlinked)

    def _kill_unlinked(self) -> None:
        if self._exited:
            return
        self._cut_off = not self.process.has_ended  # on a busy machine who reaps it may be late
        if self._cut_off and (self.is_worker or not self._registered):
            self.kill()
        if self.is_worker:
            self.group.node.loop.call_later(_STATUS_GRACE, self._no_news)
        else:
            self._no_news()  # whatever that process is, we do not wait for it

    def _no_news(self) -> None:
        """It has been killed, or has ended. Who would tell its exit status (a zygote that is stopped, say) does not."""
        if not self._exited:
            self._exited = self._cut_off = True
            self._check_gone()

    def _on_output_end(self) -> None:
        if self.output is not None and self.output.on_line is not None and not self._link_ended:
            self.failed(ConnectionError("its output ended before the header line"))
        self._check_gone()

    def _check_gone(self) -> None:
        if self.state is State.GONE or not (self._exited and self._link_ended):
            return
        if self.output is not None and not self.output.ended:
            if not self._output_waited:
                self._output_waited = True
                self.group.node.loop.call_later(_OUTPUT_GRACE, self._stop_output)
            return
        joined = self._registered
        if self.removed and (self._forced or (self.exitcode or 0) >= 0):  # else something else was quicker than we
            self.reason = self.reason or "it was removed"
        if self._cut_off and self.is_worker and joined and self.exitcode in (None, -signal.SIGKILL):
            self.reason = self.reason or "its connection was lost"  # else it was ending by itself, and that is why
        if not self.reason and self.is_worker_here and self.exitcode == -signal.SIGKILL and self.group.oom_kills.more():
            self.reason = "killed by signal 9, it seems by the kernel, which ran out of memory"
        elif not self.reason and self.exitcode is None:
            self.reason = getattr(self.process, "epitaph", "")
        self.move(State.GONE)
        if self._deadline is not None:
            self._deadline.cancel()
        if self.segments is not None:
            self.segments.close()
        if self.process is not None:
            self.process.release()
        self._tell_of_end(joined)
        self.on_last_words()
        self.group.forget(self)
        self.on_gone(self, self._failure)
        if self.journal is not None:
            self.journal.close()

    def _tell_of_end(self, joined: bool) -> None:
        if self.removed and self.kills is not None:
            kills, self.kills = self.kills, None
            self.notices.put(kills)
        if joined:
            self.tell("deregister")
        self.tell("finalize")

    def _stop_output(self) -> None:
        if self.output is not None:
            self.output.close()  # calls _check_gone

    def why(self) -> str:
        """What is known of its end, as text."""
        code = self.exitcode
        if self.reason:
            return self.reason
        if self._failure is not None and self._cut_off and not self._registered:
            return str(self._failure)  # the signal was ours, and explains nothing
        status = "" if code is None else f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
        failure = str(self._failure) if self._failure is not None and not (self._registered and status) else ""
        return f"{failure} ({status})" if failure and status else failure or status

    def launch_error(self) -> LaunchWorkerError:
        """Why this worker never joined."""
        error = LaunchWorkerError(self.host, self.last_output, self.why())
        if self._failure is not None and self._failure is not error:
            error.__cause__ = self._failure
        return error

    def forget_after_fork(self) -> None:
        """In a forked child: close what was inherited."""
        if self.output is not None:
            self.output.close_descriptor()
        if self.process is not None:
            self.process.forget()


def _nothing() -> None:
    pass


__all__ = ["NOW", "Member", "State"]
