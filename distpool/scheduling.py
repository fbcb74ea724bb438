"""Which waiting call goes to which worker (layer 7).

    submit/feed (any thread) -> queue --dispatch--> Slot (one per worker) --CALLS--> worker
    RESULTS (leader) -> entry.settle -> future / map          room again -> dispatch
    worker idle, queue empty -> RECALL from the busiest -> queue -> dispatch
    worker gone -> the call that was running fails, those that had not started run elsewhere -> replacement

Window: a slot that is half empty is filled up to calls worth `config.WINDOW_SECONDS` of measured running time (more of
a map that has run for long), at least 2 and at most 1024; the last calls of a queue are shared out evenly among those
that have room (`Slot.share`).
A call with a time limit travels alone, and nothing is sent to its worker, unless all that it has waits for other calls.

Who runs what: `_dispatch` runs under `lock`, on the leader or in a submitting thread. A submitter never waits for the
lock (`_pump`): it leaves a note and the holder looks again. So user code in a finalizer, run by the collector inside
the locked region, can submit without deadlock. Nothing under `lock` runs user code.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError

from distpool.culprits import explained, take_out
from distpool.depth import is_deep
from distpool.hints import Any
from distpool.logs import Log
from distpool.mapruns import MapRun
from distpool.node.deliveries import Deliveries
from distpool.node.node import Node, existing
from distpool.recalls import Recalls, take_waiting, withdraw
from distpool.reclaim import Reclaims
from distpool.refs.refs import RAISED_HERE, Outcome
from distpool.retries import Retries
from distpool.settling import settle_alone, settle_records
from distpool.slots import Slot, any_room
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind
from distpool.work import Call

log = Log("scheduling")


class Scheduler:
    """The queue and the workers of one executor."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.loop = node.loop
        self.deliveries = Deliveries(node)
        self.opening = 0  # leader: results that are being opened (`soon.Soon`), for which workers have to stay
        self.slots: dict[int, Slot] = {}  # pid -> worker that may run calls; changed on the leader
        self.closing = False  # no new calls; workers go when everything is done
        self.failure: Callable[[], BaseException] | None = None  # broken: every call fails with this
        self.on_idle: Callable[[], object] | None = None  # leader: everything is done and `closing` is set
        self.on_retire: Callable[[Slot], object] | None = None  # leader: a worker has run all it may
        self.handlers: dict[int, Callable[[Slot, Frame], object]] = {}  # kinds of upper layers
        self._queue: collections.deque[Any] = collections.deque()  # Calls and MapRuns; append is atomic, rest: lock
        #: Protects the queue's head, the slots' tables and Call.slot. Reentrant only so that it can tell who has it.
        self.lock: Any = threading.RLock()
        #: The stdlib's rule ("break"): what cannot be loaded on a worker breaks everything. Returns the error.
        self.on_unloadable: Callable[[bytes], BaseException] | None = None
        #: Whether some worker may have room: a hint for submitters, so that they need not look at each worker.
        self._has_room = False
        self._wanted = False  # somebody could not get the lock and wants a dispatch
        self._recalls = Recalls(self.loop, self.lock)
        self.reclaims = Reclaims(self)
        self.retries = Retries(node, self.enqueue, self._end_retries)

    def check_process(self) -> None:
        """RuntimeError in a forked child, which has none of the workers."""
        if existing() is not self.node:
            raise RuntimeError("this executor belongs to the process that forked this one: make a new one here")

    # -- calls in (any thread) ---------------------------------------------------------------------------------

    def stage(self, buffers: list[Any]) -> list[Any]:
        """Copies of out-of-band buffers: shared memory where possible. Later changes by the caller do not matter."""
        staged: list[Any] = []
        for buffer in buffers:
            lease = self.node.segments.put(buffer)
            staged.append(lease if lease is not None else bytes(buffer))
        return staged

    def enqueue(self, entry: Any) -> None:
        """Add a Call, or a MapRun that has new elements."""
        if type(entry) is not MapRun:
            self._queue.append(entry)
        elif not entry.queued:
            entry.queued = True
            self._queue.append(entry)
        if self.failure is not None:
            self.loop.call_soon(self._fail_queue)
        elif self._has_room:
            self.pump()

    def pump(self) -> None:
        """Dispatch what can be dispatched; here if possible, else on the leader."""
        self._wanted = True
        if self.lock._is_owned():
            return  # a finalizer in the middle of it: the thread looks again
        if (not self.loop.leads and is_deep()) or not self.loop.enter_critical():
            self.loop.call_soon(self.pump)
            return
        try:
            while self._wanted and self.lock.acquire(blocking=False):
                try:
                    self._wanted = False
                    self._dispatch()
                finally:
                    self.lock.release()
        finally:
            self.loop.leave_critical()

    def cancel(self, call: Call) -> bool:
        """True if the call will not run: it waited here, or its worker gave it back."""
        self.check_process()
        if self.lock._is_owned():
            return False  # a finalizer in the middle of the dispatch: too late
        try:
            events = self._whole(lambda: self._begin_cancel(call))
            return events is None or bool(events and self._recalls.wait([call], events))
        except BaseException:
            self._recalls.interrupted([call])
            raise
        finally:
            self._whole(lambda: None)

    def _begin_cancel(self, call: Call) -> list[threading.Event] | None:
        """What tells that the workers have answered; None: it will not run; nothing: it will."""
        while True:
            with self.lock:
                if call.slot is None:
                    call.cancelled = True
                    call.release()
                    return None
            if (events := self._recalls.ask([call])) or call.slot is not None:  # else another cancel brought it back
                return events

    def _whole(self, function: Callable[[], Any]) -> Any:
        """Run `function()`, which takes the lock, and see to what was left to us meanwhile; no Ctrl-C in between."""
        critical = self.loop.enter_critical()
        try:
            return function()
        finally:
            self._look_again()
            if critical:
                self.loop.leave_critical()

    def _look_again(self) -> None:
        """For whoever has held the lock outside `pump`: a note that was left meanwhile is nobody else's to read."""
        if self._wanted:
            self.pump()

    # -- dispatch (under lock) --------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        self._has_room = True  # first: who submits from here on leaves a note, and we look at the queue again
        queue = self._queue
        if len(queue) == 1 and self._send_alone(queue[0]):
            return
        progress = True
        while queue and progress:
            progress = False
            if not self._clean_head():
                break
            slots = [slot for slot in list(self.slots.values()) if slot.usable]
            slots.sort(key=lambda slot: slot.load)
            asking = sum(2 * slot.load <= slot.limit for slot in slots)
            for slot in slots:
                if not self._clean_head():
                    break
                head = queue[0]
                waiting = head.remaining if type(head) is MapRun else len(queue)
                count = slot.share(head, waiting, max(1, asking), len(self.slots))
                if count > 0 and self._fill(slot, count):
                    progress, asking = True, asking - 1
        for slot in list(self.slots.values()):
            if slot.pinned:
                slot.pinned_turn(self)
        if not any_room(self.slots):
            self._has_room = False
            if any_room(self.slots):  # since the first look; whoever made it may have seen an empty queue
                self._has_room = self._wanted = True

    def _send_alone(self, call: Any) -> bool:
        """A lonely call and an idle worker, which is the case that somebody waits for: without all the rest."""
        if type(call) is not Call or call.policy is not None or call.cancelled:
            return False
        for slot in list(self.slots.values()):
            if not slot.load and not slot.pinned and slot.room(call.function.mean) > 0:
                self._queue.popleft()
                call.brisk = True
                slot.send_alone(self, call)
                return True  # there may be room for more: who finds none looks properly
        return False

    def _clean_head(self) -> bool:
        """Remove what needs no worker from the head of the queue; False when nothing is left."""
        queue = self._queue
        while queue:
            head = queue[0]
            if type(head) is MapRun:
                if head.remaining > 0 and not head.closed:
                    return True
                queue.popleft()
                head.queued = False
                if head.remaining > 0 and not head.closed:  # fed this very moment
                    head.queued = True
                    queue.append(head)
            elif head.cancelled:
                queue.popleft()
            elif head.policy is not None and head.policy.pids is not None:
                queue.popleft()
                self._pin(head)
            else:
                return True
        return False

    def _pin(self, call: Call) -> None:
        """A call that only certain workers may run waits at the least loaded of them, if more may be sent there."""
        pids = call.policy.pids  # type: ignore[union-attr]
        candidates = [slot for slot in list(self.slots.values()) if slot.pid in pids and not slot.retiring]  # type: ignore[operator]
        if candidates:
            min(candidates, key=lambda slot: (slot.exhausted, slot.load + len(slot.pinned))).pinned.append(call)
            return
        error = RuntimeError(f"none of the workers {sorted(pids)} is a living worker of this executor")  # type: ignore[arg-type]
        self.loop.call_soon(lambda: self.settle(call, 0, Outcome(RAISED_HERE, error, (), 1)))

    def _fill(self, slot: Slot, count: int) -> bool:
        """Send up to `count` calls from the head of the queue as one frame."""
        queue, entries = self._queue, []
        while count > 0 and queue:
            head = queue[0]
            if type(head) is Call and head.policy is None and not head.cancelled:  # as a rule
                entries.append(queue.popleft())
                count -= 1
                continue
            if not self._clean_head():
                break
            head = queue[0]
            if type(head) is MapRun:
                taken = head.take(count)
                entries.extend(taken)
                count -= sum(entry.elements for entry in taken)
                continue
            if head.policy is not None:
                if not entries and slot.idles:
                    entries.append(queue.popleft())
                break
        if entries:
            slot.send(self, entries)
        return bool(entries)

    # -- frames from workers (leader) --------------------------------------------------------------------------

    def on_frame(self, slot: Slot, frame: Frame) -> None:
        """A frame that this worker sent."""
        kind = frame.kind
        if kind == Kind.RESULTS:
            self._on_results(slot, frame)
        elif kind == Kind.RECALLED:
            self._on_recalled(slot, messages.Recalled.unpack(frame.control))
        elif kind == Kind.BLOCKED:
            slot.block(messages.Blocked.unpack(frame.control).change)
            self.pump()
        else:
            handler = self.handlers.get(kind)
            if handler is not None:
                handler(slot, frame)

    def _on_results(self, slot: Slot, frame: Frame) -> None:
        offset, busy, ran = messages.RESULTS.unpack(frame.control)
        slot.journal_offset = offset
        timing = settle_alone(slot, frame) or settle_records(self, slot, frame.body, frame.buffers)
        if ran and timing is not None:
            mean = busy / ran
            timing.mean = mean if timing.mean < 0 else 0.7 * timing.mean + 0.3 * mean
        self._after_results(slot)

    def settle(self, entry: Any, index: int, outcome: Any) -> None:
        """A call, or an element of a map, has ended."""
        future = entry.settle(index, outcome)
        if future is not None:
            self.deliver(future)

    def deliver(self, future: Any) -> None:
        """Run the future's callbacks on a library thread."""
        self.deliveries.run(future._run_callbacks)

    def _after_results(self, slot: Slot) -> None:
        self._has_room = True
        if self._queue or slot.pinned:
            self.pump()
        if not slot.inflight and not self._consider_retiring(slot) and not self._queue:
            self.reclaims.consider_stealing()
        if self.closing:
            self.check_done()

    def _consider_retiring(self, slot: Slot) -> bool:
        """Let a worker go that has nothing left and may be sent no more; whether it is one."""
        if slot.inflight or not (slot.retiring or slot.exhausted):
            return False
        if self.on_retire is not None:
            self.on_retire(slot)
        return True

    def check_done(self) -> None:
        """Leader: tell `on_idle` when nothing is left to do."""
        if self.closing and not self._queue and self.on_idle is not None and not self.busy:
            self.on_idle()

    @property
    def waiting(self) -> bool:
        """Whether something waits in the queue."""
        return bool(self._queue)

    @property
    def busy(self) -> bool:
        """Whether calls wait or run."""
        if self._any_waiting() or self.retries.count or self.opening:
            return True
        return any(slot.inflight or slot.pinned for slot in list(self.slots.values()))

    def _any_waiting(self) -> bool:
        return any(
            (entry.remaining > 0 and not entry.closed) if type(entry) is MapRun else not entry.cancelled
            for entry in list(self._queue)
        )

    def _end_retries(self, call: Call, outcome: Outcome) -> None:
        self.settle(call, 0, outcome)
        self.check_done()

    # -- calls that come back ----------------------------------------------------------------------------------

    def withdraw(self, run: MapRun) -> None:
        """Nobody wants the rest of this map: recall what workers have not started. Safe in a finalizer."""
        self.loop.call_soon(lambda: self._withdraw(run))

    def _withdraw(self, run: MapRun) -> None:
        # Not when the queue comes to it: it may wait behind long calls, and what its arguments refer to with it.
        with self.lock:
            unsent = run.drop_unsent()
        self._look_again()
        del unsent  # without the lock: that may run user code
        withdraw(run, list(self.slots.values()))

    def gave_back(self, slot: Slot, numbers: list[int]) -> None:
        """Leader: these calls have been taken from a worker that does not answer."""
        self._recalls.answered(slot, numbers)
        slot.recalling = False
        self.pump()
        if self.closing:
            self.check_done()

    def put_back(self, entry: Any, index: int, count: int) -> None:
        """These elements have not started: they run elsewhere. `lock` is held."""
        entry.put_back(index, count, self._queue)

    def _on_recalled(self, slot: Slot, message: messages.Recalled) -> None:
        got_any = bool(message.ranges)
        if not message.unasked:
            self.reclaims.answered(slot)
        with self.lock:
            for first, count in message.ranges:
                for entry, index, taken in slot.take_back(first, count):
                    slot.load -= taken
                    entry.put_back(index, taken, self._queue)
        self._recalls.answered(slot, message.asked)
        self._consider_retiring(slot)
        if not message.asked and not message.unasked:
            slot.recalling = False
        self.pump()
        wanted = got_any or (slot.recent and not message.asked)
        if wanted and any(other.load == 0 and other.usable for other in self.slots.values()):
            slot.recent = False
            self.reclaims.consider_stealing()
        if self.closing:
            self.check_done()

    # -- workers come and go (leader) --------------------------------------------------------------------------

    def add(self, slot: Slot) -> None:
        """A worker is ready for calls."""
        self.slots[slot.pid] = slot
        slot.watch = self.reclaims.watch
        slot.member.on_last_words = lambda: self.reclaims.take_over(slot)
        self.pump()
        if not slot.load:  # others may have been sent what this one could run
            self.reclaims.consider_stealing()

    def give_up(self, slot: Slot, make_error: Callable[[bool], BaseException]) -> None:
        """The worker lives on, but not for us: nobody hears its answers any more. `make_error`: see `lost`."""
        self.slots.pop(slot.pid, None)
        self._recalls.lost(slot)
        self.reclaims.give_up(slot, make_error)

    def lost(self, slot: Slot, make_error: Callable[[bool], BaseException]) -> None:
        """The worker is gone. `make_error(maybe_ran)` makes the exception for a call that it took along."""
        self.reclaims.read_journal(slot)
        slot.gone = True
        failed: list[tuple[Any, int]] = []
        stranded: list[Call] = []
        with self.lock:
            self.slots.pop(slot.pid, None)
            timed_out = slot.stop_clocks()
            unfinished = slot.unfinished()
            culprit = take_out(unfinished)
            for entry, index, count, ran in reversed(unfinished):
                if ran:
                    failed.extend((entry, number) for number in range(index, index + count))
                elif type(entry) is Call and entry.is_stranded(self.slots):
                    stranded.append(entry)
                else:
                    entry.put_back(index, count, self._queue)
            for call in slot.pinned:
                (stranded if call.is_stranded(self.slots) else self._queue).append(call)
        self._recalls.lost(slot)
        if culprit is not None:
            self.settle(*culprit, Outcome(RAISED_HERE, explained(make_error(False)), (), slot.pid))
        for call in stranded:
            self.settle(call, 0, Outcome(RAISED_HERE, make_error(False), (), slot.pid))
        for entry, index in failed:
            text = timed_out.get(entry.sequence) if type(entry) is Call else None
            error: BaseException = TimeoutError(text) if text is not None else make_error(True)
            outcome = Outcome(RAISED_HERE, error, (), slot.pid)
            if type(entry) is Call and entry.policy is not None and entry.attempt < entry.policy.retries:
                self.retries.consider(entry, outcome)
            else:
                self.settle(entry, index, outcome)
        if self.failure is not None:
            self._fail_queue()
        self.pump()
        self.check_done()

    def fail_all(
        self, make_error: Callable[[], BaseException], unsent: Callable[[], BaseException] | None = None
    ) -> None:
        """Broken: all that waits, runs or comes fails with this error. With `unsent`, what workers have is settled when
        they are gone (`lost`), which tells what had started, and the rest fails with that of `unsent`."""
        self.failure = unsent or make_error
        for slot in list(self.slots.values()):
            with self.lock:
                unfinished = [] if unsent else list(slot.unfinished())
                pinned, slot.pinned = list(slot.pinned), collections.deque()
            for entry, index, count, _ in unfinished:
                for number in range(index, index + count):
                    self.settle(entry, number, Outcome(RAISED_HERE, make_error(), (), 1))
            for call in pinned:
                self.settle(call, 0, Outcome(RAISED_HERE, self.failure(), (), 1))
        self.retries.fail_all(make_error)
        self._fail_queue()

    def _fail_queue(self) -> None:
        while self._queue and self.failure is not None:
            with self.lock:
                entry = self._queue.popleft() if self._queue else None
            if type(entry) is MapRun:
                entry.queued = False
                entry.fail_rest(Outcome(RAISED_HERE, self.failure(), (), 1))
            elif entry is not None and not entry.cancelled:
                self.settle(entry, 0, Outcome(RAISED_HERE, self.failure(), (), 1))
        self.check_done()

    def cancel_waiting(self, meanwhile: Callable[[], object] = lambda: None, spare: int = 0) -> None:
        """Cancel everything that has not started (`shutdown(cancel_futures=True)`). Not on the leader.

        `meanwhile` is called before the workers' answers are waited for. `spare`: so many calls at the head of the
        queue count as started: those of workers that are still coming up.
        """
        calls, ahead = self._whole(lambda: self._take_waiting(spare))
        for call in calls:
            call.future.cancel()
        try:
            events = self._whole(lambda: self._recalls.ask(ahead))
            meanwhile()
            for call in self._recalls.wait(ahead, events):
                call.future.cancel()
        except BaseException:
            self._recalls.interrupted(ahead)
            raise
        finally:
            self._look_again()

    def _take_waiting(self, spare: int) -> tuple[list[Call], list[Call]]:
        """The calls that wait here and that workers have; maps are cancelled."""
        with self.lock:
            runs, calls, ahead = take_waiting(self._queue, list(self.slots.values()), spare)
        self.loop.call_soon(lambda: self._cancel_rest(runs))
        return calls, ahead

    def _cancel_rest(self, runs: list[MapRun]) -> None:
        for run in runs:
            run.fail_rest(Outcome(RAISED_HERE, CancelledError(), (), 1))
        self.retries.end_all()
        self.check_done()
