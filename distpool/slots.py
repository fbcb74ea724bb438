"""One worker as the scheduler sees it: what it has been sent and how much more it may have (layer 7).

    Slot.send(entries)  ->  FUNCTION frames for functions it does not know, one CALLS frame
    Slot.find(sequence) <-  RESULTS, RECALLED: which entry, which element of it

Calls of one link carry consecutive sequence numbers, in the order in which the worker starts them. The tables are
protected by the scheduler's lock where it adds and the leader removes; dict operations are atomic.
"""

from __future__ import annotations

import collections
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator

from distpool import config
from distpool.hints import TYPE_CHECKING, Any
from distpool.node.bulk import WORTH
from distpool.node.group import Member
from distpool.refs.refs import RAISED_HERE, Outcome
from distpool.transport.shm import Lease, map_private
from distpool.wire import messages
from distpool.wire.frames import Kind
from distpool.wire.functions import EncodedFunction
from distpool.work import Call, Parts, plain_record

if TYPE_CHECKING:
    from distpool.scheduling import Scheduler
    from distpool.transport.ioloop import IoLoop

_MAX_WINDOW = 1024
_FEW = 4  # calls that travel together if each takes less than
_TINY = 50e-6  # seconds: a frame of its own would cost as much
_MAX_FUNCTIONS = 256  # functions by value that a worker keeps
_MAX_FUNCTION_BYTES = 256 << 20
_SHORT = 0.002  # seconds: longer calls never travel together in one record
_UNBEGUN = 10.0  # seconds that a call with a time limit may take to begin before its worker is given up
_LOOK = 0.01  # seconds between two looks whether it has, at least
_LONG = 0.05  # seconds: for calls that take this long, sending ahead saves nothing


class Slot:
    """The scheduler's record of one worker."""

    def __init__(self, member: Member, max_tasks: int | None = None) -> None:
        self.member = member
        self.pid = member.pid
        self.inflight: dict[int, Any] = {}  # first sequence number -> entry, in the order of sending
        self.load = 0  # calls sent and not answered
        self.limit = 1  # calls it may have, as last computed
        self.blocked = 0  # tasks there that wait for other calls
        self.pinned: collections.deque[Any] = collections.deque()
        self.retiring = False  # gets no more calls
        self.recalling = False
        self.initializing = 0  # borrowed workers: initializers that were sent and have not been answered
        self.asked = self.answered = 0  # RECALL frames sent, RECALLED frames received
        self.deaf = False  # it does not answer, and gets nothing until it does
        self.early: set[int] = set()  # calls settled from its journal, whose results it will send as well
        self.watch: Callable[[Slot], object] = lambda slot: None  # called when it has been sent a RECALL
        self.recent = False  # it has answered since the last recall
        self.gone = False
        self.journal_offset = 0  # bytes of its journal that have come over the link
        self.bereft = False  # it has died, and references in its journal have been taken over
        self.done = 0
        self.failed = 0
        self.since = 0.0  # monotonic seconds: when a call was sent to it while it was idle, or its last results came
        self.forwarded: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # calls of its tasks
        self._remaining = max_tasks  # calls it may still be sent
        self._next = 1
        self._functions: collections.OrderedDict[int, int] = collections.OrderedDict()  # number -> bytes
        self._function_bytes = 0
        self._spread: set[int] = set()  # those of which others may get their copy from it
        self._clocks: dict[int, Any] = {}  # sequence number -> timer, of calls with a time limit
        self._timed_out: dict[int, str] = {}  # number of a call whose time was up -> what to say

    # -- how much more -----------------------------------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """Whether it may be sent calls at all now. Not beside one with a time limit, and no more than it may run, but
        tasks that wait for other calls must not keep those from running."""
        if self.retiring or self.gone or self.deaf:
            return False
        return not (self._clocks or self._remaining == 0) or (self.load > 0 and self.idles)

    @property
    def idles(self) -> bool:
        """Whether nothing runs there: all calls that it has wait for others."""
        return self.load <= self.blocked

    @property
    def exhausted(self) -> bool:
        """Whether it has been sent all the calls that it may run (`max_tasks_per_child`)."""
        return self._remaining == 0

    def room(self, mean: float, worth: float = config.WINDOW_SECONDS) -> int:
        """How many more calls of `mean` seconds (negative: unknown) it should have now, `worth` seconds in all."""
        if not self.usable:
            return 0
        if mean > _LONG or mean < 0 or self._clocks:
            # Unknown: the first calls of a function go one to each worker. What is sent ahead to a worker that then
            # sits in one long C call cannot be recalled from it.
            limit = 1
        elif mean > 0.002 and worth <= config.WINDOW_SECONDS:
            limit = 2  # more of a map that has run for a while: chunks of 4 ms took the master 150 us each
        else:
            limit = max(2, min(_MAX_WINDOW, int(worth / max(mean, 1e-7))))
        self.limit = limit + self.blocked
        room = self.limit - self.load
        return room if self._remaining is None else min(room, self._remaining or 1)

    def share(self, head: Any, waiting: int, asking: int, workers: int) -> int:
        """How many of the `waiting` calls, `head` first, it should be sent now, as one of `asking` that have room."""
        call = type(head) is Call
        room = self.room(head.timing.mean, config.WINDOW_SECONDS if call else head.worth())
        window = self.limit - self.blocked
        if room <= 0 or (self.load > self.blocked and 2 * room < window):
            return 0  # it has enough for now: half a window at a time costs half of the frames
        if call and head.policy is not None:
            return 1 if self.idles else 0
        least = _FEW if 0.0 <= head.timing.mean < _TINY else 1
        # Up to half a window it would be sent anyway, but in one small frame after another.
        fair = min(room - window // 2, math.ceil(waiting / asking))
        return min(room, max(least, fair, math.ceil(waiting / (2 * workers or 1))))

    def block(self, change: int) -> None:
        """So many more tasks there wait for other calls. The limit follows at once: if the queue is empty, nobody will
        compute it before the next submitter asks `any_room`."""
        self.blocked += change
        self.limit += change

    def recall_answered(self) -> None:
        """RECALLED has come."""
        self.answered += 1
        if self.answered >= self.asked:
            self.deaf = False

    # -- sending (scheduler's lock held) -----------------------------------------------------------------------

    def send(self, scheduler: Scheduler, entries: list[Any]) -> None:
        """Send these entries as one frame."""
        link = self.member.link
        assert link is not None
        first = sequence = self._next
        if not self.load:
            self.since = time.monotonic()
        if self.member.tracer is not None:
            self.member.tracer.sent(self.pid, first, entries)
        records: list[bytes] = []
        buffers: list[Any] = []
        plain: list[Call] = []  # the last entries, if they can travel in one record
        inflight, known = self.inflight, self._functions
        for entry in entries:
            function = entry.function
            if function.number not in known:
                self._send_function(scheduler, function)
            if entry.buffers:
                try:  # first: nothing may be half done when no memory or descriptor is left for it
                    lent = [self._lend(buffer) for buffer in entry.buffers]
                except (OSError, MemoryError) as error:
                    self._fail(scheduler, entry, error)
                    continue
                buffers.extend(lent)
            inflight[sequence] = entry
            if type(entry) is Call:
                entry.sequence = sequence
                entry.slot = self
                if entry.arguments is not None:
                    if plain and not (plain[0].function is function and 0.0 <= function.mean <= _SHORT):
                        records.append(plain_record(plain))
                        plain = []
                    plain.append(entry)
                    sequence += 1
                    continue
                if entry.policy is not None and entry.policy.timeout is not None:
                    self._start_clock(scheduler, sequence, entry.policy.timeout, function.name)
            if plain:
                records.append(plain_record(plain))
                plain = []
            sequence += entry.elements
            records.append(entry.record)
            if type(entry.buffers) is Parts:
                self.lend(entry.buffers.references, 1)
        if plain:
            records.append(plain_record(plain))
        if not records:
            return
        self._next = sequence
        self.load += sequence - first
        if self._remaining is not None:
            self._remaining = max(0, self._remaining - (sequence - first))
        link.send(Kind.CALLS, messages.CALLS.pack(first, len(records)), b"".join(records), buffers, roomy=True)

    def send_alone(self, scheduler: Scheduler, call: Call) -> None:
        """Send a call without a policy to this idle worker: `send` without what only others need. Somebody waits."""
        function, link = call.function, self.member.link
        special = self._remaining is not None or self.member.tracer is not None or type(call.buffers) is Parts
        if function.number not in self._functions or call.buffers or special or link is None:
            self.send(scheduler, [call])
            return
        sequence = self._next
        self.since = time.monotonic()
        self.inflight[sequence] = call
        call.sequence, call.slot = sequence, self
        self._next = sequence + 1
        self.load += 1
        record = call.record if call.arguments is None else plain_record([call])
        link.send(Kind.CALLS, messages.CALLS.pack(sequence, 1), record, roomy=True)  # `pump` has looked

    def pinned_turn(self, scheduler: Scheduler) -> None:
        """Send calls that only this worker may run, as far as there is room."""
        while self.pinned:
            call = self.pinned[0]
            if call.cancelled:
                self.pinned.popleft()
                continue
            if self.room(call.timing.mean) <= 0 or (call.policy.timeout is not None and not self.idles):
                return
            self.send(scheduler, [self.pinned.popleft()])

    def lend(self, references: tuple[Any, ...], change: int) -> None:
        """Tell their owners that the worker gets these references (or, recalled, does not)."""
        refs = self.member.group.node.refs
        if refs is not None:
            refs.lend(references, self.pid, change)

    def _fail(self, scheduler: Scheduler, entry: Any, error: BaseException) -> None:
        """It cannot be sent."""
        outcome = Outcome(RAISED_HERE, error.with_traceback(None), (), self.pid)
        scheduler.loop.call_soon(lambda: scheduler.settle(entry, 0, outcome))

    def _lend(self, buffer: Any) -> Any:
        member = self.member
        if not isinstance(buffer, Lease):
            return buffer
        if member.link is not None and member.link.shares_memory and member.segments is not None:
            buffer.retain()
            return member.segments.lend(buffer)
        return bytes(map_private(buffer.path, buffer.size, buffer.nbytes))

    def _send_function(self, scheduler: Scheduler, function: EncodedFunction) -> None:
        link = self.member.link
        assert link is not None
        size = function.size
        if function.references or function.origin is not None:
            # The values of references must not stay for a function that nobody can call any more. Nor needs anybody a
            # map's own when that is over.
            if function.references:
                self.lend(function.references, 1)
            soon, number = scheduler.loop.call_soon, function.number
            weakref.finalize(function, soon, lambda: self._forget(number)).atexit = False
            size = 0  # `_forget` has no lock for the sum
        shared = link.shares_memory and self.member.segments is not None
        buffers = [
            self._lend(lease) if shared and lease is not None else buffer
            for buffer, lease in zip(function.buffers, function.leases, strict=True)
        ]
        big = not shared and function.size - len(function.data) >= WORTH
        spreading = self.member.group.node.spreading() if big else None
        apart = spreading is not None and spreading.is_worth_it()
        message = messages.Function(function.number, function.name, apart)
        link.send(Kind.FUNCTION, message.pack(), function.data, () if apart else buffers)
        if spreading is not None and apart:
            self._spread.add(function.number)
            spreading.send(function, self.pid, link)
        self._functions[function.number] = size
        self._function_bytes += size
        if len(self._functions) > _MAX_FUNCTIONS or self._function_bytes > _MAX_FUNCTION_BYTES:
            self._forget_functions(function.number)

    def _forget(self, number: int) -> None:
        """Leader: this function is gone."""
        if self._functions.pop(number, None) is not None and self.member.link is not None:
            self.member.link.send(Kind.FORGET, messages.Forget([number]).pack())

    def _forget_functions(self, keep: int) -> None:
        needed = {entry.function.number for entry in list(self.inflight.values())}  # the leader takes them out
        needed.add(keep)
        gone = []
        for number in list(self._functions):
            if len(self._functions) <= _MAX_FUNCTIONS // 2 and self._function_bytes <= _MAX_FUNCTION_BYTES // 2:
                break
            if number not in needed and (size := self._functions.pop(number, None)) is not None:
                self._function_bytes -= size
                gone.append(number)
        link = self.member.link
        if gone and link is not None:
            link.send(Kind.FORGET, messages.Forget(gone).pack())
            spread = self._spread.intersection(gone)
            if spread:
                self._spread -= spread
                self.member.group.node.spreading().forgotten(spread, self.pid)

    def recall(self, message: messages.Recall) -> None:
        """Ask for calls that have not started."""
        link = self.member.link
        if link is not None:
            self.asked += 1
            link.send(Kind.RECALL, message.pack())
            self.watch(self)

    @property
    def last(self) -> int:
        """Number of the last call that it was sent."""
        return self._next - 1

    def open(self, buffers: list[Any]) -> list[Any]:
        """Received buffers as memory."""
        segments = self.member.segments
        return [segments.open(buffer) if segments is not None else buffer for buffer in buffers]

    # -- time limits -------------------------------------------------------------------------------------------

    def _start_clock(self, scheduler: Scheduler, sequence: int, seconds: float, name: str) -> None:
        text = f"{name} ran for more than {seconds} seconds"
        self._wind_clock(scheduler.loop, sequence, seconds, text, time.monotonic())

    def _wind_clock(self, loop: IoLoop, sequence: int, seconds: float, text: str, sent: float) -> None:
        """If the call is known not to have begun when this has run down, once more: it stands behind a task that waited
        when it was sent, or the machine is busy. (Tried: killing the worker also then. The call went to the next one,
        and round for ever.)"""

        def time_is_up() -> None:
            if sequence not in self._clocks:
                return
            if not self.has_started(sequence) and (self.load > 1 or time.monotonic() - sent < _UNBEGUN):
                self._wind_clock(loop, sequence, max(seconds, _LOOK), text, sent)
                return
            self._timed_out[sequence] = text
            self.member.kill(text)

        self._clocks.setdefault(sequence)  # first: this thread may stand still for longer than the limit
        self._clocks[sequence] = loop.call_later(seconds, time_is_up)

    def stop_clock(self, sequence: int) -> None:
        """The call, which may have a time limit, has ended."""
        clock = self._clocks.pop(sequence, None)
        if clock is not None:
            clock.cancel()

    def stop_clocks(self) -> dict[int, str]:
        """The worker is gone; the numbers of the calls whose time was up, as a rule one, and the text of the error."""
        for sequence in list(self._clocks):
            self.stop_clock(sequence)
        return self._timed_out

    # -- answers (leader) --------------------------------------------------------------------------------------

    def find(self, sequence: int) -> tuple[Any, int] | None:
        """The entry of a result with this sequence number, and the element's index in it; it is noted as done.

        Elements of a span are begun in order, and recalled from its end.
        """
        entry = self.inflight.get(sequence)
        if entry is not None and entry.elements == 1:
            del self.inflight[sequence]
            return entry, 0
        found = self._span_of(sequence)
        if found is None:
            return None
        start, span = found
        span.answered(sequence - start, 1)
        if span.done >= span.stop:
            self.inflight.pop(start, None)
        return span, sequence - start

    def find_many(self, sequence: int, count: int) -> tuple[Any, int, int] | None:
        """As `find`, for up to `count` consecutive elements of one span; how many of them are its own."""
        found = self._span_of(sequence, 1)
        if found is None:
            return None
        start, span = found
        count = min(count, start + span.elements - sequence)
        span.answered(sequence - start, count)
        if span.done >= span.stop:
            self.inflight.pop(start, None)
        return span, sequence - start, count

    def take_back(self, sequence: int, count: int) -> list[tuple[Any, int, int]]:
        """The `count` calls from this sequence number on were recalled: `(entry, first element, elements)`, last first,
        so that who puts them at the head of a queue keeps their order.
        """
        taken: list[tuple[Any, int, int]] = []
        for number in range(sequence + count - 1, sequence - 1, -1):
            self.stop_clock(number)  # it has not begun, so nothing may be killed for it
            entry = self.inflight.get(number)
            if entry is None:
                continue
            if entry.elements > 1:
                break
            del self.inflight[number]
            if type(entry.buffers) is Parts:
                self.lend(entry.buffers.references, -1)
            taken.append((entry, 0, 1))
        if not taken and (found := self._span_of(sequence)) is not None:
            start, span = found
            index = sequence - start
            count = min(count, span.stop - index)  # what it does not have any more cannot come back a second time
            if count > 0:
                span.stop = index
                taken.append((span, index, count))
            if span.done >= span.stop:
                self.inflight.pop(start, None)
        return taken

    def _span_of(self, sequence: int, least: int = 2) -> tuple[int, Any] | None:
        while True:
            try:
                for start, entry in self.inflight.items():
                    if start <= sequence < start + entry.elements and entry.elements >= least:
                        return start, entry
                return None
            except RuntimeError:  # a submitting thread has sent more meanwhile; a copy would cost each result
                continue

    def has_started(self, sequence: int) -> bool:
        """Whether the call is known to have started; on another host: whether it was sent."""
        journal = self.member.journal
        return journal is None or journal.started >= sequence

    def has_surely_started(self, sequence: int) -> bool:
        """Whether the call is known to have started."""
        journal = self.member.journal
        return journal is not None and journal.started >= sequence

    def unfinished(self) -> list[tuple[Any, int, int, bool]]:
        """Empty the table: `(entry, first element, elements, whether they may have run)`, in order.

        Without a shared journal the first unanswered call counts as running (results of others were sent before it),
        and so do as many more as there are tasks which wait for others.
        """
        journal = self.member.journal
        entries = list(self.inflight.items())
        self.inflight.clear()
        self.load = 0
        if journal is not None:
            started = journal.started
        else:
            started = self._presumably_started(entries)
        parts: list[tuple[Any, int, int, bool]] = []
        for start, entry in entries:
            ran = max(entry.done, min(entry.stop, started - start + 1))
            parts.extend((entry, index, count, True) for index, count in _gaps(entry.done, ran, entry.early))
            if entry.stop > ran:
                parts.append((entry, ran, entry.stop - ran, False))
        return parts

    def _presumably_started(self, entries: list[tuple[int, Any]]) -> int:
        """Number of the last call that may have begun."""
        left, last = 1 + max(0, self.blocked), 0
        for start, entry in entries:
            for index in range(entry.done, entry.stop):
                if left and index not in entry.early:
                    left, last = left - 1, start + index
            if entry.early:
                last = max(last, start + max(entry.early))
        return last

    def count(self, status: int) -> None:
        """One more call has ended here."""
        if status == messages.VALUE:
            self.done += 1
        else:
            self.failed += 1


def _gaps(begin: int, end: int, without: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Runs (first, count) of the numbers from `begin` to `end`, without some of them."""
    for number in (*sorted(number for number in without if begin <= number < end), end):
        if number > begin:
            yield begin, number - begin
        begin = number + 1


def any_room(slots: dict[int, Slot]) -> bool:
    """Whether some worker is about to run dry, so that a submitter should send inline (a hint: not under the lock).

    A worker that has two calls is left to the refill by whoever reads its next results: one frame for many calls.
    Sending whenever the window (up to 1024 calls) had room cost a system call per submit.
    """
    return any(slot.load < 2 + slot.blocked and slot.load < slot.limit and slot.usable for slot in list(slots.values()))
