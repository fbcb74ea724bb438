"""The workers of one executor: launched, initialised, replaced, retired (layer 9).

    start -> Supply -> Member -> JOINED -> INITIALIZE -> Slot -> Scheduler.add
    worker gone -> Scheduler.lost -> Supply: replacement (or everything breaks)   Scheduler idle and closing -> goodbye

Everything runs on the leader unless it says otherwise. `broken` is set once and for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from distpool import config, errors
from distpool.flag import Flag
from distpool.hints import Any
from distpool.joining import launcher
from distpool.logs import Log
from distpool.node.group import Member, State
from distpool.node.node import Node, existing
from distpool.scheduling import Scheduler
from distpool.slots import Slot
from distpool.supply import Order, Place, Supply, launch_errors
from distpool.wire import messages
from distpool.wire.failures import failure_info
from distpool.wire.frames import Frame, Kind

log = Log("crew")

_PATIENCE = 5.0  # seconds that a worker has to exit when asked
_NOTICES = 5.0  # seconds for the user's stdout to take the last output of the workers


def end(member: Member, signum: int) -> None:
    """Send the worker this signal, where it is our process to send signals to; else end it as it can be ended."""
    if member.process is not None and member.is_worker:
        member.process.kill(signum)
    else:
        member.kill()


class Crew:
    """The workers of these places, `cap` at most, for one scheduler."""

    def __init__(
        self,
        node: Node,
        places: list[Place],
        params: dict[str, Any],
        cap: int | None = None,
        *,
        initializer: bytes | None = None,
        max_tasks: int | None = None,
        replace: bool = True,
    ) -> None:
        self.node = node
        self.supply = Supply(node, places, params, self._prepare, self._on_settled)
        self.supply.refill = self._refill
        self._cap = cap
        self._size = 1  # workers that it has when all are there; leader
        self._asked: int | None = None  # what the user has said last, which the leader will hear of; any thread
        self._resize()
        self.scheduler = Scheduler(node)
        self.scheduler.on_idle = self.dismiss
        self.scheduler.on_retire = self._retire
        self.scheduler.handlers[Kind.INITIALIZED] = self._on_initialized
        if not replace:
            self.scheduler.on_unloadable = self._on_unloadable
        self.members: dict[int, Member] = {}  # every worker that is not gone; changed on the leader
        self.finished = Flag()  # closed, and every worker is gone
        self._changed = Flag()  # some worker was launched
        self.holds_topology = False  # until it is dismissed, also while the only worker has died and another one comes
        self.broken: BaseException | None = None  # what `submit` raises
        self.ends_at_exit = True  # the program's end waits for its work (`exits`); pools end otherwise
        self._slots: dict[int, Slot] = {}
        self._initializer = initializer
        self._max_tasks = max_tasks
        self._replace = replace
        self._dismissed = False
        self._lost: list[int] = []  # workers that have died, in whose place nobody has come yet
        node.crews.add(self)

    @property
    def is_here(self) -> bool:
        """Whether this is the process that the workers belong to, and not one that was forked from it."""
        return existing() is self.node

    def wait(self, timeout: float | None = None) -> None:
        """Wait (at most `timeout` seconds) until the work is done, the workers are gone and their output is printed.

        Not at all in a finalizer that runs on the leader: it would wait for itself.
        """
        loop = self.node.loop
        if not loop.may_wait:
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.finished.is_set():
            if not loop.lead(self.finished.is_set, deadline):
                with loop.following():
                    self.finished.wait(timeout)
            if deadline is not None and time.monotonic() >= deadline:
                break
        self.node.tell(_NOTICES)

    def start(self) -> None:
        """Launch the workers in the background. Any thread. What it raises is a bad setting: nobody was started."""
        try:
            self.supply.start()
        except Exception:
            self._let_go()  # now: the error may keep its executor, and with it the crew, alive for long
            self.node.loop.call_soon(self._check_finished)
            raise
        if not self.supply.busy:  # a manager without hosts: no launch will end, and find that nobody has come
            self.node.loop.call_soon(self._check_hopeless)

    @property
    def _launching(self) -> int:
        """Workers asked for and not launched yet."""
        return self.supply.launching

    def _resize(self) -> None:
        """Places whose number was not known have brought somebody, or have not brought all."""
        if not self.supply.scaled:
            share = max(1, self.supply.share)
            self._size = share if self._cap is None else min(share, self._cap)

    # -- coming up ---------------------------------------------------------------------------------------------

    def _on_settled(self, order: Order) -> None:
        """An order is over, and has brought whom it has brought."""
        self._changed.set()
        if not self._dismissed:
            for error in [each for found in order.errors for each in launch_errors(found)]:
                log.warning("%s", error)
            self._resize()
            if self._replace:
                self._refill()
            else:
                self._check_hopeless()
        self.scheduler.check_done()
        self._check_finished()

    @property
    def coming(self) -> int:
        """Workers that have been asked for and do not take calls yet."""
        return max(0, self._launching + len(self.members) - len(self.scheduler.slots)) if not self._dismissed else 0

    def wait_for_members(self, count: int = 1) -> None:
        """Wait until so many worker processes exist, or no more will come. Not on the leader."""
        loop = self.node.loop
        deadline = time.monotonic() + config.worker_timeout()

        def enough() -> bool:
            coming = self._launching or self._size < self.size
            return len(self.members) >= count or not coming or self._dismissed

        while True:
            self._changed.clear()
            if enough() or time.monotonic() >= deadline:
                return
            if not loop.lead(enough, deadline):
                with loop.following():
                    self._changed.wait(0.05)  # the I/O thread leads: it sets this when a worker is launched

    def _check_hopeless(self) -> None:
        """Nobody is there, and nobody will come."""
        if not self.members and not self._dismissed and not self.supply.busy:
            error = self.supply.error()
            self.fail(lambda: error)

    def _prepare(self, member: Member) -> None:
        self._changed.set()
        self.members[member.pid] = member
        self._resize()
        member.borrower = self
        member.on_joined = self._on_joined
        member.on_frame = self._on_frame
        member.on_gone = self._on_gone
        if self._dismissed:
            member.kill()

    def _on_joined(self, member: Member) -> None:
        slot = self._slots[member.pid] = Slot(member, self._max_tasks)
        surplus = len(self._staying()) > self._size  # more than were asked for, or late, when others were asked already
        self.supply.joined(member, not self._dismissed and not surplus)
        if self._dismissed:
            member.say_goodbye(_PATIENCE)
            return
        if surplus:
            self._retire(slot)
            return
        if not self.supply.brought_at_first(member.pid):
            self._say_whom_it_replaces(member.pid)
        if self._initializer is not None:
            assert member.link is not None
            member.link.send(Kind.INITIALIZE, messages.Initialize("").pack(), self._initializer)
        else:
            self._ready(slot)

    def _say_whom_it_replaces(self, pid: int) -> None:
        """The first of those in whose place nobody has come yet: who was ordered for whom makes no difference."""
        if self._lost:
            log.warning("Worker %d replaces worker %d.", pid, self._lost.pop(0))

    def _on_initialized(self, slot: Slot, frame: Frame) -> None:
        if messages.Initialized.unpack(frame.control).ok:
            self._ready(slot)
            return
        data = bytes(frame.body)
        info = failure_info(data)
        log.critical("Exception in initializer:\n%s", info.traceback)

        def make_error() -> BaseException:
            error = errors.BrokenProcessPool(
                f"the initializer failed on worker {slot.pid}: {info.type_name}: {info.message}"
            )
            error.__cause__ = errors.remote_traceback(f'\n"""\n{info.traceback}"""')
            return error

        self._break(make_error)

    def _ready(self, slot: Slot) -> None:
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
        place = self.supply.place_of(member.pid)
        if slot is not None and place is not None and not self._dismissed and not slot.retiring:
            place.note_death(idle=not (slot.done or slot.failed or slot.inflight))
        self.supply.gone(member)
        if slot is None:
            # It never came up: its order deals with that. But where one death breaks all, a kill is a kill.
            if not self._replace and not self._dismissed and (member.exitcode or 0) < 0:
                self.broken = self.broken or self._unusable(member)
                self._break(lambda: self._exit_error(member, False))
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
            error = errors.BrokenProcessPool(f"a worker could not load a call: {info.type_name}: {info.message}")
            error.__cause__ = errors.remote_traceback(f'\n"""\n{info.traceback}"""')
            return error

        self.node.loop.call_soon(lambda: self._break(make_error))
        return make_error()

    def break_here(self, error: BaseException) -> BaseException:
        """Break mode: a result could not be loaded in this process (any thread). Returns what its future raises."""

        def make_error() -> BaseException:
            broken = errors.BrokenProcessPool(f"a result could not be loaded: {type(error).__name__}: {error}")
            broken.__cause__ = error
            return broken

        self.node.loop.call_soon(lambda: self._break(make_error))
        return make_error()

    def _on_death(self, member: Member, slot: Slot) -> None:
        if not member.removed:
            log.warning("Worker %d terminated.", member.pid)
        if slot.pid not in self.scheduler.slots and self._initializer is not None:
            self._break(lambda: self._died_in_initializer(member))
            return
        if not self._replace:
            self.broken = self._unusable(member)
            unsent = self.scheduler.failure = lambda: self._exit_error(member, False)  # nothing goes elsewhere
            self.scheduler.lost(slot, lambda ran: self._exit_error(member, ran))
            self._break(lambda: self._exit_error(member, True), unsent)
            return
        self._lost.append(member.pid)
        self._refill()
        self.scheduler.lost(slot, lambda ran: self._exit_error(member, ran))

    def _unusable(self, member: Member) -> BaseException:
        """What `submit` raises when the death of one has broken all: the standard library's text."""
        error = errors.BrokenProcessPool("A child process terminated abruptly, the process pool is not usable anymore")
        error.__cause__ = self._exit_error(member, True)
        return error

    def _exit_error(self, member: Member, ran: bool) -> BaseException:
        return errors.ProcessExitedException(member.pid, member.exitcode, ran, member.last_output, member.reason)

    def _died_in_initializer(self, member: Member) -> BaseException:
        error = errors.BrokenProcessPool(f"worker {member.pid} died in the initializer")
        error.__cause__ = self._exit_error(member, True)
        return error

    def _refill(self) -> None:
        """Replace what is missing."""
        if not self._dismissed and self.broken is None:
            missing = self._size - self._launching - sum(not self._leaving(pid) for pid in self.members)
            if missing > 0:
                self.supply.order(missing)
            self._check_hopeless()

    def _leaving(self, pid: int) -> bool:
        slot = self._slots.get(pid)
        return slot is not None and (slot.retiring or slot.exhausted)

    def _retire(self, slot: Slot) -> None:
        """The worker has run all it may run."""
        slot.retiring = True
        self.scheduler.slots.pop(slot.pid, None)
        self.scheduler.reclaims.unpin(slot)  # now: when it is gone, the others may be as well
        self.supply.leaves(slot.pid)
        slot.member.say_goodbye(_PATIENCE)
        if slot.exhausted:
            log.info("Worker %d has run all the calls that it may: another one replaces it.", slot.pid)
        self._refill()

    def _staying(self) -> list[Slot]:
        return [slot for slot in self._slots.values() if not slot.retiring and not slot.exhausted]

    @property
    def size(self) -> int:
        """Workers that it has when all are there, as the user has said it last."""
        asked = self._asked
        return self._size if asked is None else asked

    def ask(self, size: int) -> None:
        """`scale`, from any thread. If several ask, the last number counts, whose turn at the leader comes when."""
        self._asked = size
        self.node.loop.call_soon(lambda: self.scale(self.size))

    def scale(self, size: int) -> None:
        """Have `size` workers from now on; surplus ones leave when their calls are done."""
        self.supply.scale(size)
        self._size = size
        staying = self._staying()
        surplus = len(staying) + self._launching - size
        for slot in sorted(staying, key=lambda slot: slot.load)[: max(0, surplus)]:
            slot.retiring = True
            self.scheduler.reclaims.unpin(slot)
            if slot.load:
                slot.recall(messages.Recall(slot.load, []))
            else:
                self._retire(slot)
        places = max(0, size - len(staying))  # for those who are under way, or will be: more will not be replaced
        del self._lost[places:]
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
        self._let_go()
        for member in list(self.members.values()):
            member.kill()
        self._check_finished()

    def dismiss(self) -> None:
        """Let all workers go: nothing is left to do. Those that are still coming up are not waited for."""
        if self._dismissed:
            for member in list(self.members.values()):  # the signal of `kill` may not have ended it
                if member.state is State.READY:
                    member.say_goodbye(_PATIENCE)
            return
        if self._initializer is not None and self.broken is None and self._any_uninitialized():
            return  # its initializer runs in each worker, also if no call was ever submitted
        self._let_go()
        self.scheduler.slots.clear()
        for member in list(self.members.values()):
            if member.state is State.READY:
                member.say_goodbye(_PATIENCE)
            else:
                member.kill()
        self._check_finished()

    def _let_go(self) -> None:
        """Nobody is replaced any more."""
        self._dismissed = True
        if self.holds_topology:
            self.holds_topology = False
            self.node.group.release_topology()

    def _any_uninitialized(self) -> bool:
        """Whether some worker has not run the initializer yet. Whatever changes that looks again (`check_done`)."""
        return self._launching > 0 or any(
            pid not in self.scheduler.slots and not self._leaving(pid) for pid in self.members
        )

    def kill(self, signum: int) -> None:
        """End all workers with this signal now."""
        self._let_go()
        for member in list(self.members.values()):
            end(member, signum)
        self._check_finished()

    def _check_finished(self) -> None:
        if not self._dismissed or self.members or self.finished.is_set() or not self.supply.abandon():
            return
        if self.scheduler.failure is None:
            self.scheduler.fail_all(lambda: errors.BrokenProcessPool("the executor was shut down"))
        self.supply.close()
        self.node.crews.discard(self)
        if not self.node.crews:
            launcher(self.node).close_if_idle()
        self.finished.set()
