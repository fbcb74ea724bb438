"""The workers of one executor: launched, initialised, replaced, retired (layer 9).

    start(n) -> cluster.start_workers -> Member -> JOINED -> INITIALIZE -> Slot -> Scheduler.add
    worker gone -> Scheduler.lost -> replacement (or everything breaks)      Scheduler idle and closing -> goodbye

Everything runs on the leader unless it says otherwise. `broken` is set once and for all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool, _RemoteTraceback
from typing import Any

from distpool import config
from distpool.errors import LaunchWorkerError, ProcessExitedException
from distpool.joining import launcher, start_workers
from distpool.managers.base import ClusterManager
from distpool.node.group import Member, State
from distpool.node.node import Node
from distpool.scheduling import Scheduler
from distpool.slots import Slot
from distpool.wire import messages
from distpool.wire.failures import failure_info
from distpool.wire.frames import Frame, Kind

log = logging.getLogger("distpool.crew")
remote_traceback: Any = _RemoteTraceback  # typeshed has its argument wrong

_PATIENCE = 5.0  # seconds that a worker has to exit when asked
_ATTEMPTS = 3  # launches that may fail in a row
_MANY_ATTEMPTS = 30  # the same, when workers of this executor have worked before


class Crew:
    """`size` workers for one scheduler."""

    def __init__(
        self,
        node: Node,
        size: int,
        manager: Callable[[int], ClusterManager],
        params: dict[str, Any],
        *,
        initializer: bytes | None = None,
        max_tasks: int | None = None,
        replace: bool = True,
    ) -> None:
        self.node = node
        self.size = size
        self.scheduler = Scheduler(node)
        self.scheduler.on_idle = self.dismiss
        self.scheduler.on_retire = self._retire
        self.scheduler.handlers[Kind.INITIALIZED] = self._on_initialized
        if not replace:
            self.scheduler.on_unloadable = self._on_unloadable
        self.members: dict[int, Member] = {}  # every worker that is not gone; changed on the leader
        self.finished = threading.Event()  # closed, and every worker is gone
        self._changed = threading.Event()  # some worker was launched
        self.broken: BaseException | None = None  # what `submit` raises
        self.was_initialized = False
        self.ends_at_exit = True  # the program's end waits for its work (`exits`); pools end otherwise
        self._slots: dict[int, Slot] = {}
        self._manager = manager
        self._params = params
        self._initializer = initializer
        self._max_tasks = max_tasks
        self._replace = replace
        self._launching = 0  # workers asked for and not launched yet
        self._failures = 0  # launches that failed in a row
        self._dismissed = False
        node.crews.add(self)

    def start(self, count: int) -> None:
        """Launch `count` more workers in the background. Any thread."""
        self._launching += count
        start_workers(
            self.node, self._manager(count), self._params, self._prepare, lambda n, e: self._launched(count, n, e)
        )

    # -- coming up ---------------------------------------------------------------------------------------------

    def _launched(self, wanted: int, count: int, error: BaseException | None) -> None:
        self._launching -= wanted
        if count < wanted:
            self._launch_failed(error or LaunchWorkerError("localhost", "", f"{count} of {wanted} workers started"))
        self.scheduler.check_done()
        self._check_finished()

    @property
    def coming(self) -> int:
        """Workers that have been asked for and do not take calls yet."""
        return max(0, self._launching + len(self.members) - len(self.scheduler.slots)) if not self._dismissed else 0

    def wait_for_members(self) -> None:
        """Wait until some worker process exists, or none will come. Not on the leader."""
        loop = self.node.loop
        deadline = time.monotonic() + config.worker_timeout()
        while not self.members and self._launching and time.monotonic() < deadline:
            if not loop.lead(lambda: bool(self.members or not self._launching), deadline):
                with loop.following():
                    self._changed.wait(0.05)  # the I/O thread leads: it sets this when a worker is launched

    def _launch_failed(self, error: BaseException) -> None:
        self._failures += 1
        log.warning("%s", error)
        if self._dismissed:
            return
        missing = self.size - len(self.members) - self._launching
        # Where workers have worked before, it is not the set-up that is wrong: something kills them. Then we are
        # stubborn, but with growing pauses.
        attempts = _ATTEMPTS if not self.was_initialized else _MANY_ATTEMPTS
        if self._failures < attempts and missing > 0 and self._replace:
            if self.was_initialized:
                self._launching += missing
                pause = min(1.0, 0.02 * self._failures)
                self.node.loop.call_later(pause, lambda: self._start_again(missing))
            else:
                self.start(missing)
        elif not self.members and not self._launching:
            self.fail(lambda: error if isinstance(error, Exception) else LaunchWorkerError("localhost", "", str(error)))

    def _start_again(self, count: int) -> None:
        self._launching -= count
        if self._dismissed:
            self._check_finished()
        else:
            self.start(count)

    def _prepare(self, member: Member) -> None:
        self._changed.set()
        self.members[member.pid] = member
        member.borrower = self
        member.on_joined = self._on_joined
        member.on_frame = self._on_frame
        member.on_gone = self._on_gone
        if self._dismissed:
            member.kill()

    def _on_joined(self, member: Member) -> None:
        slot = self._slots[member.pid] = Slot(member, self._max_tasks)
        if self._dismissed:
            member.say_goodbye(_PATIENCE)
        elif self._initializer is not None:
            assert member.link is not None
            member.link.send(Kind.INITIALIZE, messages.Initialize("").pack(), self._initializer)
        else:
            self._ready(slot)

    def _on_initialized(self, slot: Slot, frame: Frame) -> None:
        if messages.Initialized.unpack(frame.control).ok:
            self._ready(slot)
            return
        data = bytes(frame.body)
        info = failure_info(data)
        log.critical("Exception in initializer:\n%s", info.traceback)

        def make_error() -> BaseException:
            error = BrokenProcessPool(f"the initializer failed on worker {slot.pid}: {info.type_name}: {info.message}")
            error.__cause__ = remote_traceback(f'\n"""\n{info.traceback}"""')
            return error

        self._break(make_error)

    def _ready(self, slot: Slot) -> None:
        self._failures = 0
        self.was_initialized = True
        self.scheduler.add(slot)
        self.scheduler.check_done()

    def _on_frame(self, member: Member, frame: Frame) -> None:
        slot = self._slots.get(member.pid)
        if slot is not None:
            self.scheduler.on_frame(slot, frame)

    # -- going -------------------------------------------------------------------------------------------------

    def _on_gone(self, member: Member, reason: BaseException | None) -> None:
        self.members.pop(member.pid, None)
        slot = self._slots.pop(member.pid, None)
        if slot is None:
            if not self._dismissed:
                self._launch_failed(member.launch_error())
        elif self._dismissed or slot.retiring or (slot.exhausted and not slot.inflight):
            self.scheduler.lost(slot, lambda ran: self._exit_error(member, ran))
            self._refill()
        else:
            self._on_death(member, slot)
        self.scheduler.check_done()
        self._check_finished()

    def _on_unloadable(self, data: bytes) -> BaseException:
        """Break mode: a worker could not load a call. Everything fails, as with the standard library."""
        info = failure_info(data)

        def make_error() -> BaseException:
            error = BrokenProcessPool(f"a worker could not load a call: {info.type_name}: {info.message}")
            error.__cause__ = remote_traceback(f'\n"""\n{info.traceback}"""')
            return error

        self.node.loop.call_soon(lambda: self._break(make_error))
        return make_error()

    def break_here(self, error: BaseException) -> BaseException:
        """Break mode: a result could not be loaded in this process (any thread). Returns what its future raises."""

        def make_error() -> BaseException:
            broken = BrokenProcessPool(f"a result could not be loaded: {type(error).__name__}: {error}")
            broken.__cause__ = error
            return broken

        self.node.loop.call_soon(lambda: self._break(make_error))
        return make_error()

    def _on_death(self, member: Member, slot: Slot) -> None:
        log.warning("Worker %d terminated.", member.pid)
        if slot.pid not in self.scheduler.slots and self._initializer is not None:
            self._break(lambda: self._died_in_initializer(member))
            return
        if not self._replace:
            text = "A process in the process pool was terminated abruptly while the future was running or pending."
            self.broken = BrokenProcessPool(text)
            unsent = self.scheduler.failure = lambda: self._exit_error(member, False)  # nothing goes elsewhere
            self.scheduler.lost(slot, lambda ran: self._exit_error(member, ran))
            self._break(lambda: self._exit_error(member, True), unsent)
            return
        self._refill()
        self.scheduler.lost(slot, lambda ran: self._exit_error(member, ran))

    def _exit_error(self, member: Member, ran: bool) -> BaseException:
        return ProcessExitedException(member.pid, member.exitcode, ran, member.last_output, member.reason)

    def _died_in_initializer(self, member: Member) -> BaseException:
        error = BrokenProcessPool(f"worker {member.pid} died in the initializer")
        error.__cause__ = self._exit_error(member, True)
        return error

    def _refill(self) -> None:
        """Replace what is missing."""
        missing = self.size - self._launching - sum(not self._leaving(pid) for pid in self.members)
        if missing > 0 and not self._dismissed and self.broken is None:
            self.start(missing)

    def _leaving(self, pid: int) -> bool:
        slot = self._slots.get(pid)
        return slot is not None and (slot.retiring or slot.exhausted)

    def _retire(self, slot: Slot) -> None:
        """The worker has run all it may run."""
        slot.retiring = True
        self.scheduler.slots.pop(slot.pid, None)
        slot.member.say_goodbye(_PATIENCE)
        self._refill()

    def scale(self, size: int) -> None:
        """Have `size` workers from now on; surplus ones leave when their calls are done."""
        self.size = size
        staying = [slot for slot in self._slots.values() if not slot.retiring and not slot.exhausted]
        surplus = len(staying) + self._launching - size
        for slot in sorted(staying, key=lambda slot: slot.load)[: max(0, surplus)]:
            slot.retiring = True
            if slot.load:
                slot.recall(messages.Recall(slot.load, []))
            else:
                self._retire(slot)
        self._refill()

    # -- the end -----------------------------------------------------------------------------------------------

    def _break(
        self, make_error: Callable[[], BaseException], unsent: Callable[[], BaseException] | None = None
    ) -> None:
        """Nothing can run any more: workers go, calls fail (`fail`), `submit` raises."""
        if self.broken is None:
            self.broken = make_error()
        self.fail(make_error, unsent)

    def fail(self, make_error: Callable[[], BaseException], unsent: Callable[[], BaseException] | None = None) -> None:
        """Every pending call fails with this; the workers go. `unsent`: see `Scheduler.fail_all`."""
        self.scheduler.fail_all(make_error, unsent)
        self._dismissed = True
        for member in list(self.members.values()):
            member.kill()
        self._check_finished()

    def dismiss(self) -> None:
        """Let all workers go: nothing is left to do. Those that are still coming up are not waited for."""
        if self._dismissed:
            return
        if self._initializer is not None and self.broken is None and self._any_uninitialized():
            return  # its initializer runs in each worker, also if no call was ever submitted
        self._dismissed = True
        self.scheduler.slots.clear()
        for member in list(self.members.values()):
            if member.state is State.READY:
                member.say_goodbye(_PATIENCE)
            else:
                member.kill()
        self._check_finished()

    def _any_uninitialized(self) -> bool:
        """Whether some worker has not run the initializer yet. Whatever changes that looks again (`check_done`)."""
        return self._launching > 0 or any(
            pid not in self.scheduler.slots and not self._leaving(pid) for pid in self.members
        )

    def kill(self, signum: int) -> None:
        """End all workers with this signal now."""
        self._dismissed = True
        for member in list(self.members.values()):
            if member.process is not None:
                member.process.kill(signum)
        self._check_finished()

    def _check_finished(self) -> None:
        if not (self._dismissed and not self.members and not self._launching) or self.finished.is_set():
            return
        if self.scheduler.failure is None:
            self.scheduler.fail_all(lambda: BrokenProcessPool("the executor was shut down"))
        self.node.crews.discard(self)
        if not self.node.crews:
            launcher(self.node).close_if_idle()
        self.finished.set()
