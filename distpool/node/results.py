"""How a worker hands over results: into the journal first, then to the master (layer 3).

    task threads: succeed / fail / scalar -> journal (shared with the master)  --flush--> RESULTS

A finished result is in the journal before the next call starts, so that the master finds it there whatever kills this
process; it stays there until the kernel has the frame that it is in. (A frame that waits in the link's queue, because
the master does not read at the moment, goes with this process. Were its results overwritten by then, the master would
take all of these calls for killed ones. Tried: overwriting them when the link has the frame; 4 MiB of it were lost.)
References of third processes in a result are the master's from the moment when it has the record, wherever it finds it:
the record says which they are (`Refs.entrust`).
Scalars of consecutive calls are also kept as a list: what is sent is then one pickle of the list instead of
their records, which costs the master a tenth. A result too large for the journal is sent at once, and waited for.

`_lock` protects appends to the journal and the list; `_flushing` makes one flush at a time, so that RESULTS frames are
in journal order; it is taken first. Nothing under `_lock` runs user code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pickle import dumps
from struct import error as StructError

from distpool import config
from distpool.errors import traceback_of
from distpool.hints import Any
from distpool.transport.journal import HEADER as RING
from distpool.transport.journal import WRITTEN, Journal
from distpool.transport.link import Link
from distpool.transport.segments import Segments
from distpool.wire import codec, messages, records
from distpool.wire.failures import encode_exception, let_go
from distpool.wire.frames import Kind
from distpool.wire.functions import function_name
from distpool.wire.messages import ERROR, RESULT, UNSENDABLE, VALUE, VALUES
from distpool.wire.records import FLOAT_PICKLE, FLOAT_RESULT, INT_PICKLE, INT_RESULT, STOP

SCALARS = frozenset((int, float, str, bytes, bool, type(None)))
_JOURNALED = config.JOURNAL_SIZE // 4  # larger results are sent at once
_FEW = 64  # values of a chunk
_pack = RESULT.pack
_pack_int = INT_RESULT.pack_into
_ROOM = INT_RESULT.size  # bytes that a number takes at most; a float takes one less
_INT, _INT_BEGIN = INT_PICKLE
_pack_head, _pack_float = (part.pack_into for part in FLOAT_RESULT)
_HEAD = FLOAT_RESULT[0].size
_FLOAT, _FLOAT_BEGIN, _BINFLOAT = FLOAT_PICKLE


class ResultWriter:
    """The results of one link."""

    def __init__(self, link: Link, journal: Journal, segments: Segments) -> None:
        self.link = link
        self.journal = journal
        self.segments = segments
        #: References in an outcome are lent to the master; which of them the record has to name.
        self.entrust: Callable[[list[Any]], records.Rows] = lambda seen: []
        self.memory_limit = 0  # bytes, 0: none; only for the text of a MemoryError
        self.pid = 0
        self.ousted = False  # this process was removed (`drops`); set by the leader, once
        self.busy = 0.0  # seconds of running time since the last flush, and how many calls
        self.ran = 0
        self.flushed = 0.0  # when (perf_counter)
        self.rested = 0.0  # when the worker last had nothing to do (perf_counter)
        self._sent = 0  # absolute journal offset up to which the link has got the results
        self._lock: Any = threading.RLock()  # reentrant so that they can tell who has them
        self._flushing: Any = threading.RLock()
        self.held: tuple[Callable[[], bool], ...] = (
            self._lock._is_owned,  # type: ignore[attr-defined]
            self._flushing._is_owned,  # type: ignore[attr-defined]
        )
        self._append = journal.append
        #: Larger scalars are results like any other; so are all of them where nobody else sees the journal.
        self._smallest_large = _JOURNALED if journal.shared else -1
        self._values: list[Any] = []  # the newest unsent records, if they are scalars of consecutive calls
        self._first = 0  # sequence number of the first of them

    @property
    def unsent(self) -> bool:
        """Whether results wait to be sent."""
        return self.journal.written != self._sent

    def pause(self) -> float:
        """Seconds that results of a map may wait while the worker has more of it to do: a sixteenth of the time since
        it last had nothing to do, within limits. It has been sent up to four times as much (`MapRun.worth`) and gets
        more when half of that has been answered, so it does not run dry. (Every 4 ms, they took the master 100 us
        each; with twice this, it did run dry at times.)"""
        return min(config.SPAN_FLUSH_SECONDS / 2, max(config.FLUSH_SECONDS, (time.perf_counter() - self.rested) / 16))

    def returned(self, sequence: int, value: Any, function: Any) -> None:
        """The call of `function` returned `value`."""
        kind = type(value)
        if kind is int or kind is float:
            self.number(sequence, value)
            return
        try:
            plain = kind in SCALARS
        except TypeError:  # a type without a hash
            plain = False
        if plain:
            self.scalar(sequence, value)
        else:
            self.succeed(sequence, value, function)

    def succeed(self, sequence: int, value: Any, function: Any = None, *, many: bool = False) -> None:
        """The call of `function` returned `value`, or (`many`) the calls of a chunk a list of values."""
        try:
            seen: list[Any] = []
            buffers: list[Any] = []
            if many and len(value) <= _FEW and type(value[0]) in SCALARS and set(map(type, value)) <= SCALARS:
                data = dumps(value, 5)  # as `encode`, in half the time; to look at each of many would double it
            else:
                data, buffers = codec.encode(value, self.link.peer, seen)
            rows = self.entrust(seen) if seen else None
        except BaseException as error:
            self._record(sequence, UNSENDABLE, *self._encoded(self._named(error, value, function, many)))
            return
        self._record(sequence, VALUE, data, rows, buffers)

    def _named(self, error: BaseException, value: Any, function: Any, many: bool) -> BaseException:
        """The error of a value that cannot be sent, with the function that returned it."""
        name = function_name(getattr(function, "__wrapped__", function))  # a trace wraps it
        what = f"the result of {name} on worker {self.pid}"
        for each in value if many else ():
            try:
                codec.dump(each, None, None, None)
            except BaseException:  # as in `succeed`
                return codec.about(error, each, what)
        return codec.about(error, value, what)

    def scalar(self, sequence: int, value: Any) -> None:
        """The call returned an exact scalar."""
        data = dumps(value, 5)
        if len(data) > self._smallest_large:
            self._record(sequence, VALUE, data)
            return
        record = _pack(sequence, 1, len(data), 0, VALUE) + data
        lock = self._lock
        while True:
            lock.acquire()
            try:
                values = self._values
                if values:
                    if sequence == self._first + len(values) and self._append(record):
                        values.append(value)
                        return
                elif self.journal.written == self._sent and self._append(record):
                    self._first = sequence
                    values.append(value)
                    return
            finally:
                lock.release()
            self._make_room()

    def number(self, sequence: int, value: Any) -> None:
        """The call returned an exact int or float. As `scalar`, written out, being most of what a short call costs its
        worker: a pickle, a record and `Journal.append` of each took half as long again."""
        journal, lock = self.journal, self._lock
        lock.acquire()
        try:
            values, start = self._values, journal.end
            if sequence == self._first + len(values) if values else start == self._sent and journal.shared:
                end, place = start + _ROOM, RING + start % journal.capacity
                if place + _ROOM <= journal.size and (end <= journal.reserved or journal.reserve(end)):
                    if type(value) is int:
                        _pack_int(journal.mapping, place, sequence, 1, _INT, 0, VALUE, _INT_BEGIN, value, STOP)
                    else:
                        end -= 1
                        _pack_head(journal.mapping, place, sequence, 1, _FLOAT, 0, VALUE, _FLOAT_BEGIN, _BINFLOAT)
                        _pack_float(journal.mapping, place + _HEAD, value, STOP)
                    journal.words[WRITTEN] = journal.end = end
                    if not values:
                        self._first = sequence
                    values.append(value)
                    return
        except StructError:  # an int of more than 64 bits
            pass
        finally:
            lock.release()
        self.scalar(sequence, value)  # also where the ring ends, or other results wait

    def drops(self, error: BaseException) -> bool:
        """Whether a call that ends in this has no outcome. Any thread.

        A process that was removed interrupts what it runs, so as to go soon. That says nothing of the call but that its
        process is gone; so it is the end of the process that everybody shall see: the master by its exit status, others
        by their links. (The master could not judge this instead: other workers that wait do not ask it, and it does not
        know which interrupt was the user's.) What the call makes of the interrupt, a value or another error, counts.
        """
        return self.ousted and isinstance(error, KeyboardInterrupt)

    def fail(self, sequence: int, error: BaseException, status: int = ERROR) -> None:
        """The call raised, or (`status`) could not even be loaded."""
        let_go(error)  # before anything that takes memory
        if self.drops(error):
            return
        if self.memory_limit and issubclass(type(error), MemoryError):
            error.args = (
                f"a task needed more memory than memory_limit={self.memory_limit} bytes allow worker {self.pid}"
                f" ({type(error).__name__}: {error})",
            )
        self._record(sequence, status, *self._encoded(error))

    def _encoded(self, error: BaseException) -> tuple[bytes, records.Rows | None]:
        seen: list[Any] = []
        rows: records.Rows | None = None
        data = encode_exception(error, self.link.peer, seen=seen)
        if seen:
            import traceback  # here: dear, and programs without errors never need it

            rows = self.entrust(seen)
            # As for remote calls: the frames, in a circle with the error, would hold the references until the cycle
            # collector runs here.
            traceback.clear_frames(traceback_of(error))
        return data, rows

    def _record(
        self,
        sequence: int,
        status: int,
        data: bytes,
        rows: records.Rows | None = None,
        buffers: list[Any] | None = None,
    ) -> None:
        if rows:
            status, data = status | records.ENTRUSTED, records.pack_entrusted(rows) + data
        if buffers or len(data) > _JOURNALED:
            self._send_large(sequence, status, data, buffers or [])
            return
        record = RESULT.pack(sequence, 1, len(data), 0, status) + data
        while True:
            with self._lock:
                if not self._values and self.journal.append(record):
                    break
            self._make_room()
        if not self.journal.shared:
            self.flush()
            self.link.drain()  # whoever holds the link's lock, or a full socket, may have left it in the queue

    def _send_large(self, sequence: int, status: int, data: bytes, buffers: list[Any]) -> None:
        """Send at once and wait until the kernel has it: it would be lost with this process otherwise."""
        self.flush()
        staged = [self.segments.stage(buffer) for buffer in buffers]
        head = RESULT.pack(sequence, 1, len(data), len(staged), status)
        with self._flushing:
            self.link.send(Kind.RESULTS, messages.RESULTS.pack(self._sent, 0.0, 0), head + data, staged)
        self.link.drain()

    def flush(self) -> None:
        """Send what has not been sent.

        Not in a `__del__` that the collector runs in the middle of this or of an append. Nor does the leader wait for a
        thread that may be in one, which may wait for the leader. Whoever is at it sends, or the next tick.
        """
        if any(held() for held in self.held):
            return
        wait = not self.link.loop.leads
        if self._flushing.acquire(blocking=wait):
            try:
                if self._lock.acquire(blocking=wait):
                    self._send_unsent()
            finally:
                self._flushing.release()

    def _send_unsent(self) -> None:
        """Both locks are held; `_lock` is not any more when this returns."""
        try:
            self.flushed = time.perf_counter()
            values, self._values = self._values, []
            end = self.journal.written
            data = b"" if values else self.journal.between(self._sent, end)
        finally:
            self._lock.release()
        if values:
            payload = dumps(values, 5)
            data = RESULT.pack(self._first, len(values), len(payload), 0, VALUES) + payload
        elif not data:
            return
        busy, self.busy = self.busy, 0.0
        ran, self.ran = self.ran, 0
        self._sent = end
        self.link.send(Kind.RESULTS, messages.RESULTS.pack(end, busy, ran), data)
        self._note_sent()

    def _note_sent(self) -> None:
        """What the kernel has may be overwritten. `_flushing` is held, so that nothing is sent meanwhile."""
        if self.link.idle:
            self.journal.mark_sent(self._sent)

    def _make_room(self) -> None:
        """The next record cannot be added: send what is there; if the journal is full, wait until the kernel has it.

        So a worker does not produce results faster than the master reads them. Not on the leader.
        """
        self.flush()
        if self.journal.is_full and self.link.drain():
            with self._flushing:
                self._note_sent()
