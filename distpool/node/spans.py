"""Received records, and the loop over those that hold many calls (layer 3).

    leader:       CALLS -> Item -> inbox        RECALL -> cut(), drop(): elements that have not begun
    task thread:  run_span: publish `index`, look at `stop` and `dropped`, run the element, its result -> ResultWriter

The loop is the worker's share of a short call, so it is written out: no lock, no call and no object per element that
could be spared. Two threads meet in an `Item` without a lock around each element: the runner stores `index` and then
reads `stop` and `dropped`; the leader stores those and then reads `index`. Whatever the order, one of them sees what
the other has stored. The leader, seeing that an element may have begun, takes its own store back; it does both under
the runner's lock, and the runner takes that lock before it believes that an element is not its own. (Tried: the lock
round each element, 0.15 us of 1.2.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from distpool import config
from distpool.hints import TYPE_CHECKING, Any
from distpool.wire import codec
from distpool.wire.functions import decode_function
from distpool.wire.messages import SPAN_OF_SCALARS, SPANS

if TYPE_CHECKING:
    from distpool.node.tasks import TaskRunner

_NONE: frozenset[int] = frozenset()


class Received:
    """A function as it came; decoding runs user code and so waits for the first call."""

    __slots__ = ("apart", "buffers", "data", "function", "resident")

    def __init__(
        self,
        data: bytes,
        buffers: list[Any],
        apart: bool = False,
        resident: Callable[[bytes], Any] = lambda data: None,
    ) -> None:
        self.apart = apart  # its buffers come by themselves, in pieces
        self.data = data
        self.buffers = buffers
        self.function: Any = None
        self.resident = resident(data) if codec.REFERENCES in data else None

    def decode(self) -> Any:
        """The function; once more, if what it captured must be as it was sent."""
        if self.resident is not None:
            return self.resident.open(decode_function, self.buffers)
        return decode_function(self.data, self.buffers)

    def clear(self) -> None:
        """Nobody will call it any more."""
        self.function = self.resident = None


def decode_item(decode: Callable[[Any, Any], Any], item: Item) -> Any:
    """Its arguments."""
    return decode(item.payload, item.buffers)


class Item:
    """A received record that waits or runs."""

    __slots__ = (
        "arguments", "buffers", "dropped", "elements", "flags",
        "index", "loaded", "number", "payload", "sequence", "stop", "struck",
    )  # fmt: skip

    def __init__(
        self, sequence: int, number: int, elements: int, flags: int, payload: bytes, buffers: list[Any]
    ) -> None:
        self.sequence = sequence
        self.number = number
        self.elements = elements
        self.flags = flags
        self.payload = payload
        self.buffers = buffers
        self.arguments: Any = None  # a list, or the range of a chunk, once they have been rebuilt
        self.loaded = False  # function and arguments have been rebuilt
        self.struck = False  # single calls: interrupted before they have begun
        self.index = 0  # spans: the element that runs, published by the runner
        self.stop = elements  # spans: elements from here on were recalled
        self.dropped = _NONE  # spans: elements recalled out of the middle

    # -- taking back (leader, under the runner's lock) ---------------------------------------------------------

    def cut(self, keep: int) -> int:
        """Take back the elements of a running span from `keep` on, or from the first that has not begun; which."""
        before = self.stop
        self.stop = keep
        begun = self.index + 1
        if begun > keep:
            self.stop = keep = min(begun, before)
        return keep

    def drop(self, element: int, running: bool) -> bool:
        """Take back one element of a span; False if it may have begun."""
        before = self.dropped
        if element in before:
            return False
        self.dropped = before | {element}
        if running and element <= self.index:
            self.dropped = before
            return False
        return True

    def ranges(self, begin: int, end: int) -> list[list[int]]:
        """Pairs (first sequence number, count) for those elements from `begin` to `end` that were not dropped."""
        found: list[list[int]] = []
        for element in range(begin, end) if self.dropped else ():
            if element in self.dropped:
                continue
            if found and found[-1][0] + found[-1][1] == self.sequence + element:
                found[-1][1] += 1
            else:
                found.append([self.sequence + element, 1])
        return found if self.dropped else [[self.sequence + begin, end - begin]]

    # -- giving away (the thread that runs it, under the runner's lock) ----------------------------------------

    def rest(self) -> Item | None:
        """What has not begun of a running span, as an item for others: the element that runs may wait for it."""
        begin = self.index + 1
        if self.flags not in SPANS or self.arguments is None or begin >= self.stop:
            return None
        rest = Item(self.sequence + begin, self.number, self.stop - begin, self.flags, b"", [])
        rest.arguments = self.arguments[begin : self.stop]
        rest.dropped = frozenset(element - begin for element in self.dropped if element >= begin)
        self.stop = begin
        return rest


def run_span(runner: TaskRunner, item: Item, function: Any, begin: float) -> None:
    """Run the elements of `item` one by one. `begin`: from when on the time is not yet accounted for."""
    results, clock, lock, interrupts = runner.results, time.perf_counter, runner.lock, runner.interrupts
    number, words, single = results.number, runner.journal.words, item.flags == SPAN_OF_SCALARS
    on_main = threading.current_thread() is threading.main_thread()
    arguments, first = item.arguments, item.sequence
    assert arguments is not None
    flush_at = results.flushed + config.SPAN_FLUSH_SECONDS
    index, ran = 0, 0
    while True:
        item.index = index
        if index >= item.stop or index in item.dropped:
            with lock:
                if index >= item.stop:
                    break
                dropped = index in item.dropped
            if dropped:
                index += 1
                continue
        sequence = first + index
        if runner.helpers:  # they mark as well, and the mark never goes back
            with lock:
                runner.mark_started(sequence)
        else:
            runner.started = words[0] = sequence  # journal.STARTED
        if sequence <= words[9] and runner.journal.revoked(sequence):  # journal.REVOKED_TO
            runner.give_back(item, index)
            break
        try:
            if on_main:
                interrupts.main = True
                value = function(arguments[index]) if single else function(*arguments[index])
                interrupts.main = False
            else:
                value = interrupts.call_beside(function, (arguments[index],) if single else arguments[index], {})
        except BaseException as error:  # also SystemExit and KeyboardInterrupt: they are the call's outcome
            interrupts.main = False
            results.fail(sequence, error)
            del error
        else:
            kind = type(value)
            if kind is int or kind is float:  # `returned` would see to it, for one more call
                number(sequence, value)
            else:
                results.returned(sequence, value, function)
            del kind, value
        index += 1
        ran += 1
        now = clock()
        if now > flush_at:
            results.ran += ran
            results.busy += now - begin
            begin, ran = now, 0
            results.flush()
            flush_at = results.flushed + config.SPAN_FLUSH_SECONDS
    item.index = index
    results.ran += ran
    results.busy += clock() - begin


__all__ = ["Item", "run_span"]
