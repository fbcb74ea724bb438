"""Calls that are taken back from workers before they start, because somebody cancels them (layer 7).

cancel (any thread) -> Recalls.ask -> RECALL, one frame for each worker -> RECALLED (leader) -> Recalls.answered
                                                                           or the worker is gone -> Recalls.lost
cancel <- wait: the calls that will not run
"""

from __future__ import annotations

import itertools
import threading
import time

from distpool.hints import Any
from distpool.mapruns import MapRun
from distpool.slots import Slot
from distpool.transport.ioloop import IoLoop
from distpool.wire import messages
from distpool.work import Call

_PATIENCE = 2.0  # seconds to wait for workers' answers


class Recalls:
    """The cancellations under way of one scheduler, under its lock."""

    def __init__(self, loop: IoLoop, lock: Any) -> None:
        self._loop = loop
        self._lock = lock  # the scheduler's: protects _waiting, `Call.slot` and `Call.cancelled`
        self._waiting: dict[tuple[int, int], list[threading.Event]] = {}  # (pid, sequence number) -> who waits

    def ask(self, calls: list[Call]) -> list[threading.Event]:
        """Ask for those that were sent ahead and are not known to run; the events are set by the answers."""
        listed: dict[Slot, tuple[list[int], threading.Event]] = {}
        with self._lock:
            for call in calls:
                slot, sequence = call.slot, call.sequence
                if slot is None or slot.inflight.get(sequence) is not call or slot.has_surely_started(sequence):
                    continue
                call.cancelled = True
                sequences, event = listed.setdefault(slot, ([], threading.Event()))
                sequences.append(sequence)
                # Several threads may cancel one call: each has an event of its own.
                self._waiting.setdefault((slot.pid, sequence), []).append(event)
        for slot, (sequences, _) in listed.items():
            slot.recall(messages.Recall(0, sequences))
        return [event for _, event in listed.values()]

    def wait(self, calls: list[Call], events: list[threading.Event]) -> list[Call]:
        """Wait for the answers and return the calls that will not run. Not for ever: a worker that is stopped, or keeps
        the interpreter lock, gives none.
        """
        deadline = time.monotonic() + _PATIENCE
        for event in events:
            if event.is_set() or not self._loop.may_wait or self._loop.lead(event.is_set, deadline):
                continue
            with self._loop.following():
                event.wait(max(0.0, deadline - time.monotonic()))
        return self.conclude(calls)

    def conclude(self, calls: list[Call]) -> list[Call]:
        """Nobody waits for these any more; those that will not run."""
        with self._lock:
            for call in calls:
                call.cancelled = call.slot is None  # an answer that comes later puts the others back
                if call.cancelled:
                    call.release()
            return [call for call in calls if call.cancelled]

    def interrupted(self, calls: list[Call]) -> None:
        """Ctrl-C while they were asked for: what has come back was let go, and is nobody else's to end."""
        for call in self.conclude(calls):
            call.future.cancel()

    def answered(self, slot: Slot, sequences: list[int]) -> None:
        """The worker has answered for these. Leader."""
        with self._lock:
            events = [self._waiting.pop((slot.pid, sequence), ()) for sequence in sequences]
        for event in itertools.chain.from_iterable(events):
            event.set()

    def lost(self, slot: Slot) -> None:
        """The worker will not answer any more. Leader."""
        with self._lock:
            events = [self._waiting.pop(key) for key in list(self._waiting) if key[0] == slot.pid]
        for event in itertools.chain.from_iterable(events):
            event.set()


def take_waiting(queue: Any, slots: list[Slot], spare: int) -> tuple[list[MapRun], list[Call], list[Call]]:
    """Take the maps out of the queue; they, the calls that wait but for the first `spare`, and those that workers have.
    The scheduler's lock is held."""
    waiting = list(queue)  # others append meanwhile
    runs = [entry for entry in waiting if type(entry) is MapRun]
    for run in runs:  # now: calls that come back would make room for their elements
        queue.remove(run)
        run.queued = False
    calls = [entry for entry in waiting if type(entry) is Call][spare:]
    ahead: list[Call] = []
    for slot in slots:  # the leader changes what is in flight without the lock
        calls.extend(slot.pinned)
        ahead.extend(entry for entry in list(slot.inflight.values()) if type(entry) is Call)
    return runs, calls, ahead


def withdraw(run: Any, slots: list[Slot]) -> None:
    """Nobody wants the rest of this map: recall what workers have not started. Leader."""
    for slot in slots:
        sent = list(slot.inflight.values())
        if slot.member.link is not None and any(getattr(entry, "run", None) is run for entry in sent):
            # By number, because only that also cuts a span that runs; what belongs to others is sent again.
            slot.recalling = True
            slot.recall(messages.Recall(slot.load, []))


__all__ = ["Recalls", "take_waiting", "withdraw"]
