"""The workers of an executor that borrows them: `ClusterExecutor(hosts=WorkerPool(...))` (layer 9).

    start -> members that live: their frames and their end come here -> Slot -> Scheduler.add
    idle and closing, or broken -> given back: they live on, and belong to whom they belonged before

A `Crew` that launches nothing and ends nobody. A worker that dies is not replaced; a call past its time limit costs its
worker, as everywhere. Everything runs on the leader unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from distpool import errors
from distpool.crew import Crew
from distpool.node.group import Member
from distpool.node.node import Node
from distpool.settling import settle_records
from distpool.slots import Slot
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind


def _given_back(ran: bool) -> BaseException:
    return errors.BrokenProcessPool("the executor has given its borrowed workers back")


class BorrowedCrew(Crew):
    """Living workers of the group, for as long as one executor needs them."""

    def __init__(self, node: Node, pids: list[int], *, initializer: bytes | None, replace: bool) -> None:
        super().__init__(node, [], {}, initializer=initializer, replace=replace)
        self._size = len(pids)
        self._pids = pids
        self._begun = False
        self._owners: dict[int, Callable[[Member, BaseException | None], None]] = {}  # who else hears of their end

    def start(self) -> None:
        """Borrow them. Any thread."""
        self.node.loop.call_soon(self._borrow)

    @property
    def _launching(self) -> int:
        """Nobody shall take the crew for empty before it has begun."""
        return int(not self._begun)

    def _borrow(self) -> None:
        self._begun = True
        group = self.node.group
        for pid in self._pids:
            member = group.members.get(pid)
            if member is not None and member.listed and member.borrower is None and not self._dismissed:
                self._adopt(member)
        if not self.members and not self._dismissed:
            self.fail(
                lambda: errors.BrokenProcessPool(f"none of the workers {self._pids} lives and is free to be borrowed")
            )
        self._changed.set()
        self.scheduler.check_done()
        self._check_finished()

    def _adopt(self, member: Member) -> None:
        member.borrower = self
        self.members[member.pid] = member
        self._owners[member.pid] = member.on_gone
        member.on_frame = self._on_frame
        member.on_gone = self._on_gone
        slot = member.slot
        if slot is None:  # calls of one link are numbered through, whoever sends them
            slot = member.slot = Slot(member)
        slot.retiring = slot.recalling = False
        self._slots[member.pid] = slot
        if self._initializer is not None:
            assert member.link is not None
            slot.initializing += 1
            member.link.send(Kind.INITIALIZE, messages.Initialize("").pack(), self._initializer)
        else:
            self._ready(slot)

    def _on_initialized(self, slot: Slot, frame: Frame) -> None:
        """Answers come in order, and the first ones may be those to an executor that had the worker before."""
        mine = self._initializer is not None and slot.initializing == 1
        slot.initializing -= 1
        if mine:
            super()._on_initialized(slot, frame)

    def _give_back(self, member: Member) -> None:
        member.borrower = None
        member.on_frame = self._late
        member.on_gone = self._owners.pop(member.pid)
        self.members.pop(member.pid, None)
        slot = self._slots.pop(member.pid, None)
        if slot is not None:
            self.scheduler.give_up(slot, _given_back)

    def _late(self, member: Member, frame: Frame) -> None:
        """What a worker sends that was given back, and that nobody has borrowed since. It is counted all the same: the
        next one would take it for a worker that does not answer, or is busy, and send it nothing."""
        slot = member.slot
        if frame.kind == Kind.RESULTS:
            slot.journal_offset = messages.RESULTS.unpack(frame.control)[0]
            settle_records(self.scheduler, slot, frame.body, frame.buffers)
        elif frame.kind == Kind.RECALLED:
            slot.recall_answered()
            for first, count in messages.Recalled.unpack(frame.control).ranges:
                slot.take_back(first, count)
        elif frame.kind == Kind.INITIALIZED:
            slot.initializing -= 1
        else:  # of tasks that wait for others, or submit some
            self.scheduler.on_frame(slot, frame)

    # -- what a Crew does by launching and ending --------------------------------------------------------------

    def _on_gone(self, member: Member, reason: BaseException | None) -> None:
        owner = self._owners.pop(member.pid)
        member.on_gone = owner
        super()._on_gone(member, reason)
        if not self.members and not self._launching and not self._dismissed:
            self.fail(lambda: self._exit_error(member, False))
        owner(member, reason)

    def _refill(self) -> None:
        """Nobody is replaced."""

    def _retire(self, slot: Slot) -> None:
        self._give_back(slot.member)

    def fail(self, make_error: Callable[[], BaseException], unsent: Callable[[], BaseException] | None = None) -> None:
        """Every pending call fails with this; the workers are given back."""
        self.scheduler.fail_all(make_error, unsent)
        self.broken = self.broken or make_error()
        self._end()

    def dismiss(self) -> None:
        """Nothing is left to do."""
        if self._dismissed or (self._initializer is not None and self.broken is None and self._any_uninitialized()):
            return
        self._end()

    def kill(self, signum: int) -> None:
        """The workers are not ours to kill: what runs is given up."""
        self.fail(lambda: _given_back(True))

    def _end(self) -> None:
        self._dismissed = True
        for member in list(self.members.values()):
            self._give_back(member)
        self._check_finished()


__all__ = ["BorrowedCrew"]
