"""Where calls run: the task loop of a worker (layer 3).

    leader:       CALLS frame -> inbox        RECALL -> tail of the inbox, tail of the running span -> RECALLED
    main thread:  inbox -> decode -> run -> encode -> journal  --flush--> RESULTS
    helpers:      the same, while the main thread's task waits for another call and has given its slot away

The main thread runs the calls, because only there can a C call be interrupted. While it has nothing to do it leads the
I/O loop itself; while it runs a call, the I/O thread takes over after a few milliseconds.

Durability: a finished result is in the journal (shared with the master on the same host) before the next call starts,
and the number of the started call as well, before its function and arguments are loaded: an argument that kills while
it loads is that call's own death. So whatever kills this process, the master knows exactly which call was running, and
loses no finished one. Where memory cannot be shared, results are in the kernel before the next call starts. (Through
streams that a manager has made, they have only been given to the pump by then: a call that kills at once may take the
one before it along.)
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator

from distpool import config
from distpool.flag import Flag
from distpool.hints import Any
from distpool.node.givingback import give_up, last_calls, listed_calls
from distpool.node.interrupts import CALLERS, Interrupts
from distpool.node.offers import Offers
from distpool.node.results import ResultWriter
from distpool.node.spans import Item, Received, decode_item, run_span
from distpool.transport.journal import Journal
from distpool.transport.link import Link
from distpool.transport.segments import Segments
from distpool.wire import codec, messages
from distpool.wire.failures import encode_exception, let_go
from distpool.wire.frames import Frame, Kind
from distpool.wire.messages import CHUNK, CHUNKS, ERROR, MAPPED, ONE, ONE_FRESH, SPANS, UNLOADABLE

CALLERS.add(run_span.__code__)
_ANSWER = 0.05  # seconds that the main thread may take to answer a remote call before others run what has come


class TaskRunner:
    """Runs the calls that one link brings."""

    def __init__(
        self, link: Link, journal: Journal, segments: Segments, spawn: Callable[[Callable[[], object]], None]
    ) -> None:
        self.link = link
        self.journal = journal
        self.segments = segments
        self.results = ResultWriter(link, journal, segments)
        self.interrupts = Interrupts(self._strike_again)
        self.leaving = False  # SHUTDOWN came, or the master is gone
        self.patient = False  # ... but remote calls on other threads are still given time to end
        self.running: dict[int, Any] = {}  # thread id -> item that runs there
        self.offers = Offers(self)  # remote calls
        self._home = 0  # the thread of `run`: the main one, or a custom transport's own for this
        self.idle = False  # it waits for work; `lock`
        self.engaged = False  # it runs, besides what is in `running`, code that may take for ever
        self._loaded = 0  # so many of `config.PRELOAD`; its own
        self.brisk = False  # the last call came alone: the next may come as soon as its result is out; a hint
        self._sleeping = False  # it does so without leading, on `_work`
        self._work = Flag()
        self.spawn = spawn
        #: Protects _inbox, the started mark, and what of running spans is recalled. Reentrant only so that it can tell
        #: who has it: a `__del__` in there does not come back here, but must not wait for the leader.
        self.lock: Any = threading.RLock()
        own = self.lock._is_owned, self.interrupts._lock._is_owned  # type: ignore[attr-defined]
        link.loop.held.extend((*own, link.writes, *self.results.held))
        self._inbox: collections.deque[Item] = collections.deque()
        self._functions: dict[int, Received] = {}
        self.wait_for_buffers: Callable[[int], list[Any]] = lambda number: []  # set by the worker (`node.bulk`)
        self.drop_buffers: Callable[[int], object] = lambda number: None
        self.started = 0  # highest sequence number started
        self._blocked = 0  # tasks that wait for other calls; protected by `lock`
        self._answering = False  # all that the main thread still does for a remote call is to answer it; `lock`
        self._waits: dict[int, int] = {}  # thread id -> its waits that have given its slot away; each its own thread's
        self.helpers = 0  # helper threads that consume the inbox; protected by `lock`
        self._initializer: Received | None = None
        #: Set by the worker: arguments with references, opened, or given back because nobody will (`refs.lent`).
        self.take_lent: Callable[[Callable[[Any, Any], Any], Item], Any] = decode_item
        self.drop_lent: Callable[[Item], object] = lambda item: None
        self.resident: Callable[[bytes], Any] = lambda data: None  # as `take_lent`, for functions with references
        self.settle: Callable[[float | None], object] = lambda timeout: None  # set by `refs.ahead`
        self.find_function: Callable[[Item], Any] = self.function_of  # a trace puts its own here

    # -- frames (leader) ---------------------------------------------------------------------------------------

    def on_calls(self, frame: Frame) -> None:
        if self.results.ousted:
            return  # the master, when we are gone, knows that they have not begun
        first, count = messages.CALLS.unpack(frame.control)
        buffers = [self.segments.open(buffer) for buffer in frame.buffers]
        items = []
        body = frame.body if isinstance(frame.body, bytes) else bytes(frame.body)
        for sequence, number, elements, flags, payload, parts in messages.call_records(body, first, count):
            items.append(Item(sequence, number, elements, flags, payload, buffers[:parts]))
            if parts:
                del buffers[:parts]
        self.brisk = count == 1
        with self.lock:
            self._inbox.extend(items)
            self.brought()
            helpers = min(self._blocked - self.helpers, len(self._inbox)) if self._blocked else 0
            self.helpers += max(0, helpers)
        for _ in range(helpers):
            self.spawn(self._help)
        if self._answering:
            self.link.loop.call_later(_ANSWER, self._still_answering)

    def on_function(self, frame: Frame) -> None:
        message = messages.Function.unpack(frame.control)
        buffers = [self.segments.open(buffer, private=True) for buffer in frame.buffers]
        self._functions[message.number] = Received(bytes(frame.body), buffers, message.apart, self.resident)

    def on_forget(self, frame: Frame) -> None:
        for number in messages.Forget.unpack(frame.control).numbers:
            self.drop_buffers(number)
            known = self._functions.pop(number, None)
            if known is not None:
                self.spawn(known.clear)  # what it captured may have finalizers
            del known

    def on_initialize(self, frame: Frame) -> None:
        buffers = [self.segments.open(buffer) for buffer in frame.buffers]
        self._initializer = Received(bytes(frame.body), buffers)
        self.brought()

    def on_recall(self, frame: Frame) -> None:
        message = messages.Recall.unpack(frame.control)
        wanted = set(message.sequences)
        with self.lock:
            running = list(self.running.values())
            if wanted:
                taken = listed_calls(self._inbox, running, wanted)
            else:
                taken = last_calls(self._inbox, running, message.count)
        self.link.send(Kind.RECALLED, messages.Recalled(taken, message.sequences).pack())

    def on_shutdown(self, frame: Frame) -> None:
        self.leaving = True
        self.brought()

    def tick(self) -> float | None:
        """Called by the I/O thread: send what waits; how long it may sleep. A span flushes by itself, but only between
        its elements, and somebody looks between chunks: to look every 5 ms would take the GIL from them as often.
        """
        flags = {item.flags for item in list(self.running.values())}
        if not flags.isdisjoint(SPANS) or (self._inbox and not flags.isdisjoint(CHUNKS)):
            pause = self.results.pause() if flags.isdisjoint(SPANS) else config.SPAN_FLUSH_SECONDS
            left = self.results.flushed + pause - time.perf_counter()
            if left <= 0:
                self.flush()
            return left if left > 0 else pause
        if self.results.unsent:
            self.flush()
        return config.GRACE if self._inbox or self.results.unsent else None

    # -- the loop (main thread) --------------------------------------------------------------------------------

    def run(self) -> int:
        """Run calls until the master says goodbye; returns the exit status."""
        loop = self.link.loop
        self._home = threading.get_ident()
        while True:
            # A remote call that was promised this thread comes first: what lies in the inbox may wait for its value.
            item = None
            if self._inbox and not self.offers:
                self.interrupts.begin()
                item = self._next()
            if item is not None:
                self._run(item)
                continue
            if self.results.unsent:
                self.flush()
            if self._initializer is not None:
                self._initialize()
            elif self.offers:
                self.offers.run_on_main()
            elif self._may_leave():
                self.engaged = True
                self.settle(config.worker_timeout())
                self.link.drain(config.worker_timeout())
                return 0
            else:
                self.idle = True
                cold = self._loaded < len(config.PRELOAD)
                rested = time.monotonic() + config.REST_SECONDS if cold else None
                if not loop.lead(self._has_work, rested, self.brisk):
                    self._sleep()  # another thread of this process leads: it waits for an answer of its own
                elif cold and not self._has_work():
                    self._warm_up()
                with self.lock:
                    self.idle, self.results.rested = False, time.perf_counter()

    def _warm_up(self) -> None:
        """Nobody wants anything of this process at the moment: load what its zygote has left out to be quick."""
        while self._loaded < len(config.PRELOAD) and not self._has_work():
            self._loaded += 1
            with contextlib.suppress(Exception):  # whoever needs it will hear of it
                importlib.import_module(config.PRELOAD[self._loaded - 1])

    def _sleep(self) -> None:
        """Wait without leading. Who brings work looks at `_sleeping` after putting the work down."""
        self._work.clear()
        self._sleeping = True
        try:
            if not self._has_work():
                with self.link.loop.following():
                    self._work.wait()
        finally:
            self._sleeping = False

    def brought(self) -> None:
        """Leader: there is work for the main thread."""
        if self._sleeping:
            self._work.set()

    def _has_work(self) -> bool:
        return self._runnable() or bool(self.offers) or self._may_leave() or self._initializer is not None

    def _runnable(self) -> bool:
        """Whether a call waits that may run. Those that were given to others are held until RECALL takes them away: the
        master may have looked while the first was marked as started, and then counts on an answer for that one."""
        inbox = self._inbox
        try:
            return bool(inbox) and not self.journal.revoked(inbox[0].sequence)
        except IndexError:  # taken this very moment
            return False

    def _may_leave(self) -> bool:
        return self.leaving and not (self.patient and self.offers.beside)

    def _next(self) -> Item | None:
        with self.lock:
            if not self._inbox or self._initializer is not None:
                return None
            item = self._inbox[0]
            if self.journal.revoked(item.sequence):
                return None  # RECALL is on its way: see `_runnable`
            self.mark_started(item.sequence)
            if self.journal.revoked(item.sequence):  # this very moment
                self._unmark(item.sequence)
                return None
            self._inbox.popleft()
            self.running[threading.get_ident()] = item
            return item

    def mark_started(self, sequence: int) -> None:
        """Call number `sequence` begins; `lock` is held."""
        if sequence >= self.started:  # helpers may overtake: it is a high-water mark
            self.started = sequence
            self.journal.set_started(sequence)

    def _unmark(self, sequence: int) -> None:
        """It has not begun after all: should this process die, it has not run. `lock` is held.

        Only if the mark is still its own: when helpers have overtaken, a later call may have begun.
        """
        if self.started == sequence:
            self.started = sequence - 1
            self.journal.set_started(sequence - 1)

    def interrupt(self) -> None:
        """Leader: KeyboardInterrupt in every call that runs here, and in those that are about to begin."""
        with self.lock:
            if self._inbox and self._free():
                self._inbox[0].struck = True  # came together with the interrupt, and the main thread is on its way
        self.interrupts.strike()

    def _free(self) -> bool:
        """Whether the main thread runs nothing that may take for ever, and is to run nothing but what lies in the
        inbox; `lock` is held."""
        return not (self.engaged or self.offers or self._initializer is not None or self._home in self.running)

    def takes_calls(self) -> bool:
        """Whether the main thread would begin a remote call at once that comes now; `lock` is held."""
        return not self._inbox and self._free()

    @contextlib.contextmanager
    def helped(self) -> Iterator[Callable[[], None]]:
        """While the main thread runs what may take for ever, helpers run what lies in the inbox. Gives what is to be
        called when only the answer is left: then it is mostly back at once, and helpers wait a moment. (Tried: without.
        What came behind the answer ran on one, where nothing ends `time.sleep`, beside the next on the main thread.)"""
        with self.lock:
            more = self._one_more_blocked()
        if more:  # came together with it
            self.spawn(self._help)
        try:
            yield self._only_answers
        finally:
            with self.lock:
                self._blocked -= not self._answering
                self._answering = False

    def _only_answers(self) -> None:
        with self.lock:
            self._blocked, self._answering = self._blocked - 1, True
        if self._inbox:  # else who puts something there sees to it
            self.link.loop.call_later(_ANSWER, self._still_answering)

    def _still_answering(self) -> None:
        """Leader: calls have come while a remote call was being answered, a moment ago."""
        with self.lock:
            if not (self._answering and self._inbox):
                return
            self._answering = False
            more = self._one_more_blocked()
        if more:
            self.spawn(self._help)

    def _one_more_blocked(self) -> bool:
        """Whether a helper has to be started now; `lock` is held."""
        self._blocked += 1
        more = bool(self._inbox) and self.helpers < self._blocked
        self.helpers += more
        return more

    def _strike_again(self, seconds: float) -> None:
        """Any thread, also in a signal handler. Nobody says when an import is through: one has to look."""
        self.link.loop.call_soon(lambda: self.link.loop.call_later(seconds, self.interrupts.strike_missed))

    def give_back(self, item: Item, index: int) -> None:
        """Elements of a running span, from `index` on, have been given to others, or are about to be.

        The master is told, and does not mind if it knows. Nothing else would tell it if the RECALL has been answered
        already, in the moment when the first of them counted as begun and was not marked yet. (Tried: they wait in the
        inbox for the RECALL. In that moment they wait for ever, and with them whatever comes behind.)
        """
        with self.lock:
            self._unmark(item.sequence + index)
            back = item.ranges(index, item.stop)
            item.stop = index
        self.link.send(Kind.RECALLED, messages.Recalled(back, [], True).pack())

    def _help(self) -> None:
        """A helper thread: runs calls while a task of this process waits."""
        while True:
            with self.lock:
                if self.helpers > self._blocked or not self._runnable():
                    self.helpers -= 1
                    return
            item = self._next()
            if item is not None:
                self._run(item)
                self.flush()

    @contextlib.contextmanager
    def slot_given_away(self) -> Iterator[None]:
        """While the calling task waits for another call: the master may send one more, a helper runs it.

        Once for each thread: of several waits at a time (`await` in coroutines) the first gives, the last takes back.
        """
        thread = threading.get_ident()
        given: list[None] = []  # from when on it has to be taken back

        def give() -> None:
            given.append(None)
            waits = self._waits[thread] = self._waits.get(thread, 0) + 1
            if waits == 1:
                self._give_slot()

        def take_back() -> None:
            self._waits[thread] -= 1
            if not self._waits[thread]:
                del self._waits[thread]
                with self.lock:
                    self._blocked -= 1
                self.link.send(Kind.BLOCKED, messages.Blocked(-1).pack())

        try:
            self.interrupts.shielded(give)
            yield
        finally:
            if given:
                self.interrupts.shielded(take_back)

    def _give_slot(self) -> None:
        item = self.running.get(threading.get_ident())
        with self.lock:
            rest = item.rest() if item is not None else None
            if rest is not None:  # the task may wait for what stands behind it
                self._inbox.appendleft(rest)
            more = self._one_more_blocked()
        self.flush()
        self.link.send(Kind.BLOCKED, messages.Blocked(1).pack())
        if more:
            self.spawn(self._help)

    def _initialize(self) -> None:
        self.engaged = True
        waiting, self._initializer = self._initializer, None
        assert waiting is not None
        try:
            function, arguments, ran = codec.decode_initializer(waiting.data, waiting.buffers)
            function(*arguments)
            ran()
        except BaseException as error:
            if not self.results.drops(error):
                self.link.send(Kind.INITIALIZED, messages.Initialized(False).pack(), encode_exception(error))
        else:
            self.link.send(Kind.INITIALIZED, messages.Initialized(True).pack())
        finally:
            self.engaged = False

    # -- one item ----------------------------------------------------------------------------------------------

    def _run(self, item: Item) -> None:
        begin = time.perf_counter()
        try:
            function = self.find_function(item)
            if item.flags == ONE or item.flags == ONE_FRESH:
                self._run_one(item, function)
            else:
                begin = self._run_many(item, function, begin)
        except BaseException as error:  # also SystemExit and KeyboardInterrupt: they are the call's outcome
            let_go(error)  # before all else: what has filled the memory is still there
            with self.lock:
                self.running.pop(threading.get_ident(), None)  # from here on no element of it can be recalled
            for first, count in item.ranges(item.index, item.stop):
                for sequence in range(first, first + count):
                    self.results.fail(sequence, error, ERROR if item.loaded else UNLOADABLE)
            if item.payload:
                self.drop_lent(item)
        now = time.perf_counter()
        self.running.pop(threading.get_ident(), None)
        self.results.busy += now - begin
        self.results.ran += item.flags not in SPANS  # those are counted one by one
        pause = self.results.pause() if item.flags in MAPPED else config.FLUSH_SECONDS
        if not self._inbox or now - self.results.flushed > pause:
            self.flush()

    def function_of(self, item: Item) -> Any:
        """The function, decoded once, or for each call if what it captured must be as it was sent."""
        known = self._functions[item.number]
        if known.apart:
            known.buffers, known.apart = self.wait_for_buffers(item.number), False
        if item.flags == ONE_FRESH:
            return known.decode()
        if known.function is None:
            known.function = known.decode()
        return known.function

    def _run_one(self, item: Item, function: Callable[..., Any]) -> None:
        if codec.REFERENCES in item.payload:
            args, kwargs = self.take_lent(codec.decode_args, item)
        else:
            args, kwargs = codec.decode_args(item.payload, item.buffers)
        item.payload, item.buffers, item.loaded = b"", [], True
        if item.struck:
            raise KeyboardInterrupt
        value = self.interrupts.call(function, args, kwargs)
        del args, kwargs
        self.results.returned(item.sequence, value, function)

    def leave(self) -> None:
        """Leader: this process is removed. What has not begun does not, but remote calls do; all have until `hurry`."""
        with self.lock:
            give_up(self._inbox, list(self.running.values()))
        self.results.ousted = self.patient = self.leaving = True
        self.brought()

    def hurry(self) -> None:
        """Leader: whoever is still at work has had its time."""
        self.patient = False
        self.brought()

    def _run_many(self, item: Item, function: Callable[..., Any], begin: float) -> float:
        """A span or a chunk; returns from when on the time is not yet accounted for."""
        arguments = item.arguments
        if arguments is None:
            load = self.take_lent if codec.REFERENCES in item.payload else decode_item
            found = load(codec.decode, item)
            arguments = item.arguments = range(*found) if type(found) is tuple else found
        item.payload, item.buffers, item.loaded = b"", [], True
        if item.flags in CHUNKS:
            item.arguments = None
            each = itertools.starmap if item.flags == CHUNK else map  # in C: chunks are there for tiny calls
            value = self.interrupts.call(list, (each(function, arguments),), {})
            if len(value) < len(arguments):  # an element raised it, and it looked like the end
                raise StopIteration
            del arguments
            self.results.succeed(item.sequence, value, function, many=True)
            return begin
        self.settle(None)  # while elements run, nothing is put ahead (`refs.ahead`)
        run_span(self, item, function, begin)
        return time.perf_counter()

    def flush(self) -> None:
        """Send the results that wait."""
        self.results.flush()
