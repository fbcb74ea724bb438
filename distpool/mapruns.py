"""Maps whose elements are cut into spans when a worker has room (layer 7).

    consumer's thread: feed()/feed_chunk() -> blocks;  dispatch: take() -> entries for one frame;  results by index

User objects are serialised in the thread that feeds, never at dispatch, which may run on the leader. Exact scalars
(`SCALARS`) are the exception: pickling them runs no user code, so a whole span of them goes into one pickle, cut as
long as the measured time per call allows.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable
from pickle import dumps, loads

from distpool import config
from distpool.hints import TYPE_CHECKING, Any, NamedTuple
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome
from distpool.wire import codec
from distpool.wire.functions import EncodedFunction
from distpool.wire.messages import CALL, CHUNK, CHUNK_OF_SCALARS, ONE, SPAN, SPAN_OF_SCALARS
from distpool.work import SCALARS, all_scalars, check_references, parts_of, release_all

if TYPE_CHECKING:
    from distpool.scheduling import Scheduler

#: Elements that lazy maps take ahead, per worker.
LOOK_AHEAD = 8
_BLOCK = 4096  # scalar elements that are kept together
_MOST_AHEAD = 512
_SMALL = 64  # elements of a chunk
_MOMENT = 0.0005  # seconds of serialising before something is sent, and answers are looked at
_SHORT = 0.002  # seconds: longer calls never travel together in one record


class Element:
    """One element of a map that travels as a record of its own."""

    __slots__ = ("buffers", "function", "index", "record", "run", "timing")

    elements = 1
    done, stop = 0, 1
    early: frozenset[int] = frozenset()
    policy = None

    def __init__(self, run: MapRun, index: int, record: bytes, buffers: list[Any]) -> None:
        self.run = run
        self.function = run.function
        self.timing = run.timing
        self.index = index
        self.record = record
        self.buffers = buffers

    def settle(self, index: int, outcome: Outcome) -> Any:
        if self.buffers:
            release_all(self.buffers)
        self.run.settle(self.index, outcome)
        return None

    def put_back(self, first: int, count: int, queue: collections.deque[Any]) -> None:
        self.run.put_back(_Records(self.index, [(self.record, self.buffers)]), queue)


class Many(NamedTuple):
    """Consecutive plain values, as a list or its pickle: an entry of `MapRun.results`, under the index of the first."""

    data: bytes | list[Any]
    length: int

    def values(self) -> list[Any]:
        """The values, in a list that the caller may change."""
        return self.data if isinstance(self.data, list) else loads(self.data)


class Span:
    """Consecutive scalar elements of a map that travel in one record."""

    __slots__ = ("done", "early", "elements", "function", "index", "items", "run", "stop", "timing")

    buffers = ()
    policy = None

    def __init__(self, run: MapRun, index: int, items: list[Any]) -> None:
        self.run = run
        self.function = run.function
        self.timing = run.timing
        self.index = index
        self.items = items
        self.elements = self.stop = len(items)
        self.done = 0  # the first so many elements have been answered
        self.early: set[int] = set()  # and these behind them: while an element waits, others of its span are run

    @property
    def record(self) -> bytes:
        payload = dumps(self.items, 5)
        flags = self.run.span_flags
        return CALL.pack(self.function.number, len(self.items), len(payload), 0, flags) + payload

    def settle(self, index: int, outcome: Outcome) -> Any:
        self.run.settle(self.index + index, outcome)
        return None

    def answered(self, index: int, count: int) -> None:
        """Note that `count` elements from `index` on have ended."""
        if index > self.done:
            self.early.update(range(index, index + count))
            return
        self.done = max(self.done, index + count)
        while self.early and self.done in self.early:
            self.early.discard(self.done)
            self.done += 1

    def settle_many(self, index: int, count: int, data: bytes | list[Any]) -> None:
        """`count` elements from `index` on returned the scalars in `data` (a list, or its pickle)."""
        self.run.settle_many(self.index + index, count, data)

    def put_back(self, first: int, count: int, queue: collections.deque[Any]) -> None:
        """Elements `first` to `first + count` have not started."""
        self.run.put_back(_Scalars(self.index + first, self.items[first : first + count]), queue)


class _Scalars:
    """Fed elements that are exact scalars (or tuples of them, one per iterable)."""

    __slots__ = ("index", "items")

    def __init__(self, index: int, items: list[Any]) -> None:
        self.index = index
        self.items = items

    def take(self, run: MapRun, count: int) -> list[Any]:
        part, self.items = self.items[:count], self.items[count:]
        start = self.index
        self.index += len(part)
        if run.batch == 1 and not 0.0 <= run.timing.mean <= _SHORT:
            # They may take long: each one can be recalled while the one before it runs.
            return [Span(run, start + offset, [item]) for offset, item in enumerate(part)]
        return [Span(run, start, part)]


class _Records:
    """Fed elements that were serialised one by one: pairs (record, buffers)."""

    __slots__ = ("index", "items")

    def __init__(self, index: int, items: list[Any]) -> None:
        self.index = index
        self.items = items

    def take(self, run: MapRun, count: int) -> list[Any]:
        part, self.items = self.items[:count], self.items[count:]
        entries = [Element(run, self.index + offset, *item) for offset, item in enumerate(part)]
        self.index += len(part)
        return entries


class Timing:
    """Measured seconds per element, like the `mean` of a function; -1.0: not known yet."""

    __slots__ = ("mean",)

    def __init__(self) -> None:
        self.mean = -1.0


class MapRun:
    """One running map: elements in, outcomes by index out.

    A user's thread calls `feed`, `wait_for`, `next_ready`, `close`; the scheduler `take`, `put_back`, `settle`.
    `results` maps index -> Outcome, the bare pickle (bytes) of a plain value, or `Many` (if the consumer `takes_many`).
    Its operations are atomic; as long as nothing is taken out, `len(results) + joined` elements have ended.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        function: EncodedFunction,
        *,
        single: bool,
        ordered: bool = True,
        chunked: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.function = function
        self.span_flags = SPAN_OF_SCALARS if single else SPAN
        self.single = single
        if function is not None and function.references:
            check_references(scheduler.node, function.references)
        #: Whose `mean` tells the seconds per element: chunks take longer than calls of the same function.
        self.timing: Any = Timing() if chunked or function is None else function.timing
        self.batch = 1  # elements that are sent to the same worker together, at least
        self.fed = 0  # elements taken from the input
        self.fed_bytes = 0  # size of those that were serialised when they were fed
        self.settled = 0
        self.results: dict[int, Any] = {}
        self.ready: collections.deque[int] | None = None if ordered else collections.deque()
        self.on_settled: Callable[[int], object] | None = None  # leader: called with each index in `results`
        self.closed = False
        self.unwanted = False  # it runs to its end, but nobody will ask for its values: None takes their place
        self.takes_many = False  # the consumer understands `Many` in `results`
        self.joined = 0  # so many elements have no entry of their own, but are the second or later of a `Many`; leader
        self.queued = False  # in the scheduler's queue
        self._blocks: collections.deque[Any] = collections.deque()  # protected by the scheduler's lock, except append
        self._urgent: collections.deque[Any] = collections.deque()  # the same; elements fed again: they go first
        # Several counters, because an increment is not atomic: each has one writer at a time.
        self._offered = 0  # elements put into `_blocks` from outside; the feeding thread
        self._again = 0  # elements fed again; the feeding thread
        self._began = 0.0  # monotonic seconds: when elements were first taken; under the scheduler's lock
        self._taken = 0  # elements that left `_blocks`, less those put back; under the scheduler's lock
        self._sleepers: list[Any] = []

    def check_open(self) -> None:
        """RuntimeError after the executor's shutdown: nothing more is taken from an input that comes bit by bit."""
        scheduler = self.scheduler
        if scheduler.closing:
            ended = "interpreter shutdown" if scheduler.node.exiting else "shutdown"
            raise RuntimeError(f"cannot schedule new futures after {ended}")

    # -- feeding (user's thread) -------------------------------------------------------------------------------

    def feed(self, arguments: list[Any]) -> None:
        """Add elements: bare arguments for one iterable (`single`), else tuples. Serialises them here and now."""
        if not arguments:
            return
        if all_scalars(arguments, self.single):
            size = -(-_BLOCK // self.batch) * self.batch
            for start in range(0, len(arguments), size):  # taking spans off a block copies the rest of it
                part = arguments[start : start + size]
                self._append(_Scalars(self.fed, part), len(part))
            return
        self._append_records([self._element_record(argument) for argument in arguments])

    def feed_again(self, index: int, argument: Any) -> None:
        """Run element `index` once more (it has ended, and its entry in `results` was taken out)."""
        self._again += 1
        block: Any
        if all_scalars([argument], self.single):
            block = _Scalars(index, [argument])
        else:
            record = self._element_record(argument)
            if isinstance(record, Exception):
                self.settle(index, Outcome(RAISED_HERE, record, (), 1))
                return
            block = _Records(index, [record])
        self._urgent.append(block)
        self._offered += 1
        self.scheduler.enqueue(self)

    def feed_chunk(self, chunk: list[Any]) -> None:
        """Add one element that stands for a whole chunk: it succeeds or fails as one, its value is a list."""
        self._append_records([self._chunk_record(chunk)])

    def feed_chunks(self, chunks: list[list[Any]]) -> None:
        """Add several chunks at once, which may then travel in one frame."""
        self._append_records([self._chunk_record(chunk) for chunk in chunks])

    def feed_cut(self, items: list[Any] | range, chunksize: int) -> None:
        """Add the chunks of an input that lies in memory: so many of them together as are serialised in a moment, so
        that workers begin before the last of them is, and that there is not a turn of the scheduler for each. The
        numbers of a range (single arguments) come into being on the workers."""
        begin, together = 0, 1
        started = looked = time.monotonic()
        while begin < len(items):
            end = min(begin + together * chunksize, len(items))
            chunks: list[Any] = [items[start : min(start + chunksize, end)] for start in range(begin, end, chunksize)]
            if isinstance(items, range):
                self._append_records([self._range_record(chunk) for chunk in chunks])
            else:
                self.feed_chunks(chunks)
            begin = end
            now = time.monotonic()
            if now - looked > _MOMENT:
                self.scheduler.loop.glance()  # the first answers tell how much workers can be sent at once
                looked = now
            if now - started < _MOMENT / 2:
                together *= 2
            elif now - started > 2 * _MOMENT:  # these elements are larger
                together = max(1, together // 2)
            started = time.monotonic()

    def _element_record(self, argument: Any) -> Any:
        args = (argument,) if self.single else argument
        seen: list[Any] = []
        return self._record(lambda: codec.encode_args(args, {}, None, seen), ONE, seen, args)

    def _range_record(self, chunk: range) -> tuple[bytes, list[Any]]:
        # A tuple, where other chunks are lists: to pickle and load the range itself takes five times as long.
        data = dumps((chunk.start, chunk.stop, chunk.step), 5)
        self.fed_bytes += len(data)
        return CALL.pack(self.function.number, 1, len(data), 0, CHUNK_OF_SCALARS) + data, []

    def _chunk_record(self, chunk: list[Any]) -> Any:
        flags = CHUNK_OF_SCALARS if self.single else CHUNK
        # To look at each of many elements takes longer than to give them to the pickler that needs not ask.
        if len(chunk) < _SMALL and all_scalars(chunk, self.single):
            return self._record(lambda: (dumps(chunk, 5), ()), flags)
        seen: list[Any] = []
        return self._record(lambda: codec.encode_chunk(chunk, self.single, seen), flags, seen, chunk)

    def _record(
        self, encode: Callable[[], tuple[bytes, Any]], flags: int, seen: list[Any] | None = None, source: Any = None
    ) -> Any:
        """`(record, buffers)`, or the exception: it is that element's outcome. `source`: see `parts_of`."""
        try:
            data, buffers = encode()
            staged = self.scheduler.stage(buffers) if buffers else []
            staged = parts_of(self.scheduler.node, staged, seen, data, source)
        except Exception as error:
            return error
        self.fed_bytes += len(data) + sum(memoryview(buffer).nbytes for buffer in buffers)
        record = CALL.pack(self.function.number, 1, len(data), len(staged), flags) + data
        return record, staged

    def _append_records(self, records: list[Any]) -> None:
        start = self.fed
        good: list[Any] = []
        for record in records:
            if isinstance(record, Exception):
                if good:
                    self._append(_Records(start, good), len(good))
                    good = []
                self.fed += 1
                self.settle(self.fed - 1, Outcome(RAISED_HERE, record, (), 1))
                start = self.fed
            else:
                good.append(record)
        if good:
            self._append(_Records(start, good), len(good))

    def _append(self, block: Any, count: int) -> None:
        self.fed += count
        self._blocks.append(block)
        self._offered += count  # after the block is there: `take` relies on it
        self.scheduler.enqueue(self)

    # -- dispatch (scheduler's lock held) ----------------------------------------------------------------------

    @property
    def remaining(self) -> int:
        """Elements fed and not yet sent."""
        return self._offered - self._taken

    def take(self, count: int) -> list[Any]:
        """Up to `count` elements as entries for one frame; empty when there are none."""
        if self.closed:
            return []
        blocks = self._urgent or self._blocks
        if not blocks:
            return []
        if not self._began:
            self._began = time.monotonic()
        block = blocks[0]
        if self.batch > 1:
            count = max(self.batch, count - count % self.batch)
        entries: list[Any] = block.take(self, count)
        self._taken += sum(entry.elements for entry in entries)
        if not block.items:
            blocks.popleft()
        return entries

    def worth(self) -> float:
        """Seconds of work that a worker is sent ahead: a quarter of the time for which the map has run, within limits.

        So the first results come soon, and none comes later than a small part of the time that it has waited anyway;
        and a map of many calls of 1 ms costs a quarter of the frames. (Always 8 ms: 2,000 such calls took the master
        100 ms of a processor that two workers needed, and them 50 ms each.) Not of large elements: they would lie in
        the memory of workers.
        """
        if not self._began or self.fed_bytes > self.fed * config.OUT_OF_BAND:
            return config.WINDOW_SECONDS
        return min(config.LONG_WINDOW_SECONDS, max(config.WINDOW_SECONDS, (time.monotonic() - self._began) / 4))

    def put_back(self, block: Any, queue: collections.deque[Any]) -> None:
        """Elements that have not started come back: they go first."""
        if self.closed:
            return
        self._blocks.appendleft(block)
        self._taken -= len(block.items)
        if self not in queue:
            queue.appendleft(self)

    def drop_unsent(self) -> list[Any]:
        """It is closed: the elements that nobody will run, to be let go of without the lock."""
        unsent = [*self._urgent, *self._blocks]
        self._urgent.clear()
        self._blocks.clear()
        return unsent

    def fail_rest(self, outcome: Outcome) -> None:
        """Nothing of this map will be sent any more."""
        while True:
            with self.scheduler.lock:  # somebody may still feed, and so dispatch
                blocks = self._urgent or self._blocks
                if not blocks:
                    return
                block = blocks.popleft()
                self._taken += len(block.items)
            for offset in range(len(block.items)):
                self.settle(block.index + offset, outcome)

    # -- results -----------------------------------------------------------------------------------------------

    def settle(self, index: int, outcome: Any, count: int = 1) -> None:
        """Element `index` has ended, or (leader) `count` from there on. (One: also the feeding thread, which could not
        serialise it.)"""
        if self.closed:
            return
        self.results[index] = outcome
        if self.unwanted:  # looked at after the store, and set before what is stored is looked at
            self.results[index] = None
        self.settled += count
        if count > 1:
            self.joined += count - 1
        if self.ready is not None:
            self.ready.append(index)
        if self.on_settled is not None:
            self.on_settled(index)
        if self._sleepers:
            self.wake()

    def settle_many(self, index: int, count: int, data: bytes | list[Any]) -> None:
        """`count` consecutive elements returned plain scalars (leader)."""
        if self.closed:
            return
        if self.takes_many:
            self.settle(index, Many(data, count), count)
            return
        for value in data if isinstance(data, list) else loads(data):  # exact scalars: no user code
            self.settle(index, Outcome(LOCAL_VALUE, value, (), 0))
            index += 1

    def wake(self) -> None:
        """Wake the consumers."""
        for sleeper in list(self._sleepers):
            with contextlib.suppress(RuntimeError):
                sleeper.release()

    def wait_for(self, index: int, deadline: float | None = None) -> bool:
        """Wait until element `index` has ended; False after `deadline` (monotonic seconds)."""
        return self.wait_until(lambda: index in self.results, deadline)

    def wait_until(self, until: Callable[[], bool], deadline: float | None = None) -> bool:
        """Wait for a condition that changes with `settle`; False after `deadline`."""
        if until():
            return True
        self.scheduler.check_process()
        loop = self.scheduler.loop
        loop.check_wait()
        if loop.lead(until, deadline):
            return until()
        sleeper = threading.Semaphore(0)
        self._sleepers.append(sleeper)
        try:
            with loop.following():
                while True:  # no condition: see tests/test_interruptible.py
                    if until():
                        break
                    timeout = None if deadline is None else deadline - time.monotonic()
                    if timeout is not None and timeout <= 0:
                        return False
                    sleeper.acquire(timeout=timeout)
        finally:
            self._sleepers.remove(sleeper)
        return True

    def close(self) -> None:
        """Nobody wants the rest: drop what was not sent, recall what has not started."""
        if not self.closed:
            self.abandon()
            self.scheduler.pump()

    def disown(self) -> None:
        """Nobody will ask for the values: let go of them, now and as they come. All of it runs. Safe in finalizers."""
        self.unwanted = True
        for index in list(self.results):
            self.results[index] = None

    def abandon(self) -> None:
        """As `close`, but safe in a finalizer: what waits is dropped a moment later, by the leader."""
        self.closed = self.unwanted = True
        self.results.clear()
        if self.settled < self.fed + self._again:
            self.scheduler.withdraw(self)


def look_ahead(mean: float, least: int) -> int:
    """Elements per worker to take ahead from an input that lies in memory anyway: as many as fill a window,
    so that a map of tiny calls sends many at once. Their results are what a worker can make in that time.
    `mean`: measured seconds per element, negative if unknown.
    """
    return max(least, min(_MOST_AHEAD, int(config.WINDOW_SECONDS / mean))) if mean > 0 else least


__all__ = ["LOOK_AHEAD", "SCALARS", "Element", "MapRun", "Span", "Timing", "look_ahead"]
