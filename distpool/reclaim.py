"""Calls that are taken from workers which have too many, or do not answer (layer 7).

    some worker idles, queue empty -> half of what waits here for a busy one (`options(pids=)`), if it may run that
                                   -> RECALL half of what the busiest has not started -> it goes to the queue

    RECALL -> no RECALLED within 50 ms -> RECALL of everything; the calls not yet started are revoked in the journal
           -> 10 ms later: what has finished is read from the journal, what has not started goes back to the queue
    the worker can run again -> it starts nothing that was revoked, and answers the RECALLs: nobody needs that by then

A worker that holds the interpreter lock in a long C call, or is stopped, reads no socket. What had been sent ahead to
it would wait as long as that lasts, and so would results that it had finished and not yet sent. The journal is memory
that both processes map, so neither needs the worker's help. (A worker on another host has none: one can only wait.)

Why no call runs twice: the worker stores the number of a call as started and then looks whether it is revoked; the
master stores what is revoked, waits, and then reads what was started. Whichever store was first, the other side sees
it: the wait is a thousand times longer than a store may stay in the buffer of its CPU. A call that the worker marked as
started and then found to be revoked is held there until it has answered the RECALL, which gives it back (an element of
a span, which the RECALL may have passed over as begun, it gives back of itself). The mark is taken back at once, so
that the call has not run if the worker dies before it answers. (If it is killed between the two stores, the call counts
as one that may have run: a second mark, for what has really begun, would tell even that, and cost each call a store.)

All of it runs on the leader, but for `watch`.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from pickle import loads

from distpool.errors import DistpoolError
from distpool.hints import TYPE_CHECKING, Any
from distpool.logs import Log
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome
from distpool.settling import settle_records, take_over
from distpool.wire import messages
from distpool.wire.frames import Kind
from distpool.wire.records import ENTRUSTED

if TYPE_CHECKING:
    from distpool.scheduling import Scheduler
    from distpool.slots import Slot

log = Log("scheduling")

_STEAL_DELAY = 0.002  # seconds that calls sit in a busy worker before an idle one may have them
_PATIENCE = 0.05  # seconds for the answer to a RECALL; a worker that runs Python code takes at most 10 ms
_VISIBLE = 0.01  # seconds until each side surely sees what the other has stored
_EVERYTHING = 1 << 40


class Reclaims:
    """The workers of one scheduler that are asked to give calls back."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._stealing = False  # a timer for `_steal` is set; leader only

    # -- from those that have too many -------------------------------------------------------------------------

    def consider_stealing(self) -> None:
        """Some worker idles."""
        scheduler = self._scheduler
        if not self._stealing and any(slot.load > 1 or slot.pinned for slot in scheduler.slots.values()):
            self._stealing = True
            scheduler.loop.call_later(_STEAL_DELAY, self._steal)

    def _steal(self) -> None:
        """Some worker idles while another one sits on calls that have not started: take half of them back."""
        self._stealing = False
        scheduler = self._scheduler
        slots = [slot for slot in scheduler.slots.values() if slot.usable or slot.load]
        idle = [slot for slot in slots if slot.load == 0 and slot.usable]
        if scheduler.waiting or not idle:
            return
        if any(slot.pinned for slot in slots):
            self._hand_over(idle, slots)
            if all(slot.load for slot in idle):
                return
        victims = [slot for slot in slots if slot.load > 1 and not slot.recalling]
        if victims:
            victim = max(victims, key=lambda slot: slot.load)
            victim.recalling = True
            victim.recall(messages.Recall(max(1, victim.load // 2), []))
        elif any(slot.recalling for slot in slots):
            self.consider_stealing()

    def _hand_over(self, idle: list[Slot], slots: list[Slot]) -> None:
        """Calls that wait here for a busy worker and that an idle one may run as well (`options(pids=)`): it gets the
        last half of them."""
        with self._scheduler.lock:
            for slot, other in itertools.product(idle, slots):
                if slot.pinned:
                    continue
                common = [call for call in other.pinned if slot.pid in call.policy.pids and not call.cancelled]
                if taken := common[len(common) // 2 :]:
                    gone = set(map(id, taken))
                    other.pinned = collections.deque(call for call in other.pinned if id(call) not in gone)
                    slot.pinned.extend(taken)
        self._scheduler.pump()

    # -- from those that are given back ------------------------------------------------------------------------

    def give_up(self, slot: Slot, make_error: Callable[[bool], BaseException]) -> None:
        """It lives on, and will not answer to us: what it was sent fails, what only waits for it goes to the queue."""
        scheduler = self._scheduler
        # A time limit holds until its call has ended; if the worker dies before, there is nothing to be ended.
        slot.member.on_last_words = slot.stop_clocks
        with scheduler.lock:
            unfinished = slot.unfinished()
        for entry, index, count, ran in unfinished:
            for number in range(index, index + count):
                scheduler.settle(entry, number, Outcome(RAISED_HERE, make_error(ran), (), slot.pid))
        self.unpin(slot)

    def unpin(self, slot: Slot) -> None:
        """It is to go, or has gone: calls that wait for it go to others of those that may run them."""
        scheduler = self._scheduler
        with scheduler.lock:
            pinned, slot.pinned = list(slot.pinned), collections.deque()
        for call in pinned:
            scheduler.enqueue(call)
        scheduler.pump()

    # -- from those that do not answer -------------------------------------------------------------------------

    def watch(self, slot: Slot) -> None:
        """A RECALL has been sent there. Any thread."""
        if slot.member.journal is not None:
            asked = slot.asked
            self._scheduler.loop.call_later(_PATIENCE, lambda: self._look(slot, asked))

    def answered(self, slot: Slot) -> None:
        """RECALLED has come."""
        slot.recall_answered()

    def _look(self, slot: Slot, asked: int) -> None:
        journal, link = slot.member.journal, slot.member.link
        if slot.gone or slot.deaf or slot.answered >= asked or journal is None or link is None:
            return
        if self._scheduler.slots.get(slot.pid) is not slot:
            return  # borrowed, and given back: what it has now are calls of somebody else
        with self._scheduler.lock:
            slot.deaf = True
            first, last = journal.started + 1, slot.last
        slot.asked += 1
        link.send(Kind.RECALL, messages.Recall(_EVERYTHING, []).pack())
        journal.revoke(first, last)
        self._scheduler.loop.call_later(_VISIBLE, lambda: self._take(slot))

    def _take(self, slot: Slot) -> None:
        journal, scheduler = slot.member.journal, self._scheduler
        if slot.gone or not slot.deaf or journal is None or scheduler.slots.get(slot.pid) is not slot:
            return  # it has answered after all, has died, or was given back
        self._settle_finished(slot)
        started = journal.started
        back: list[int] = []
        with scheduler.lock:
            for start, entry in reversed(list(slot.inflight.items())):
                begun = max(entry.done, min(entry.stop, started - start + 1))
                if begun < entry.stop:
                    back.extend(range(start + begun, start + entry.stop))
                    for part, index, count in slot.take_back(start + begun, entry.stop - begun):
                        slot.load -= count
                        scheduler.put_back(part, index, count)
        scheduler.gave_back(slot, back)

    # -- results that wait in the journal ----------------------------------------------------------------------

    def take_over(self, slot: Slot) -> None:
        """The worker is gone, and nobody else knows yet: references in its unsent results must not go with it."""
        journal = slot.member.journal
        if journal is not None:
            try:
                for sequence, _, status, payload, _ in messages.result_records(journal.read_from(slot.journal_offset)):
                    if status & ENTRUSTED and sequence not in slot.early:
                        take_over(slot, payload)
            except (ValueError, DistpoolError):
                log.exception("the journal of worker %d cannot be read", slot.pid)
        slot.bereft = True

    def read_journal(self, slot: Slot) -> None:
        """The worker is gone: results that were finished but not sent are in the shared journal."""
        journal = slot.member.journal
        if journal is not None:
            try:
                settle_records(self._scheduler, slot, journal.read_from(slot.journal_offset), [])
            except (ValueError, DistpoolError):
                log.exception("the journal of worker %d cannot be read", slot.pid)

    def _settle_finished(self, slot: Slot) -> None:
        """Settle what the worker has finished; `early` remembers it, because the worker will send it too."""
        journal = slot.member.journal
        assert journal is not None
        body = journal.snapshot(slot.journal_offset)
        if not body:
            return
        early = [record[0] + number for record in messages.result_records(body) for number in range(record[1])]
        settle_records(self._scheduler, slot, body, [])
        slot.early.update(early)

    def without_early(self, slot: Slot, body: Any, buffers: list[Any]) -> Any:
        """The records of a RESULTS frame, less those that were settled before; their buffers are removed as well."""
        kept: list[bytes] = []
        place = 0
        for sequence, elements, status, payload, parts in messages.result_records(body):
            numbers = range(sequence, sequence + elements)
            late = [number for number in numbers if number not in slot.early]
            slot.early.difference_update(numbers)
            if len(late) == elements:
                kept.append(messages.RESULT.pack(sequence, elements, len(payload), parts, status) + bytes(payload))
                place += parts
            else:
                del buffers[place : place + parts]
                self._settle_late(slot, sequence, late, payload)
        return b"".join(kept)

    def _settle_late(self, slot: Slot, sequence: int, late: list[int], payload: Any) -> None:
        """Some values of a list that is partly known."""
        values = loads(payload) if late else []  # exact scalars
        for number in late:
            found = slot.find(number)
            slot.stop_clock(number)
            if found is not None:
                slot.load -= 1
                slot.done += 1
                self._scheduler.settle(*found, Outcome(LOCAL_VALUE, values[number - sequence], (), slot.pid))


__all__ = ["Reclaims"]
