"""The remote calls that this process runs: how many have ended, which run, and their times (layer 3).

    REQUEST -> its thread: begin -> function and arguments are loaded -> loaded -> the call -> end -> the answer
    leader:    report() -> USAGE_IS        a trace: Times, filled by `end`, emptied by whoever sends them

Counted where they run, because a call from one worker to another never passes the master. (Calls of executors have
numbers, which the master counts.) Counted before the answer is out: who has it and then asks finds the call.

No lock: the collector may run a `__del__` between any two bytecodes, and that may wait for a call which ends on another
thread. Operations on dicts and deques and `next(itertools.count())` are atomic; each thread changes its own entry.
"""

from __future__ import annotations

import collections
import itertools
import os
import threading
import time
from collections.abc import Callable

from distpool.hints import Any
from distpool.wire.functions import function_name
from distpool.wire.records import TIMED

RETURNED, RAISED, RUNNING = 0, 1, 2  # how a timed call ended; RUNNING: not yet, when that was said
REMOTE = 8  # added to it for remote calls: the "sequence number" is then that of a name
_LONGEST_NAME = 200  # characters


class Running:
    """A call that runs, or is being loaded."""

    __slots__ = ("begin", "name", "thread", "told")

    def __init__(self, name: str, thread: int, told: bool | None) -> None:
        self.name = name  # "": one of the library's own, which is not shown
        self.thread = thread
        self.told = told  # whether a trace knows that it runs; None: it is still being loaded
        self.begin = time.perf_counter_ns()


def name_of(function: Any) -> str:
    """As `function_name`, whatever a callable of the user's makes of its attributes."""
    try:
        return function_name(function)
    except Exception:
        return type(function).__qualname__


def text_name(filename: str) -> str:
    """What source text is called: `include(...)` gives its file, all others a name in angle brackets."""
    return "everywhere" if filename.startswith("<") else f"include({os.path.basename(filename)})"


def _nothing(function: Any, args: tuple[Any, ...]) -> str:
    return ""


def _itself(function: Any, args: tuple[Any, ...]) -> str:
    return name_of(function)


def _first(function: Any, args: tuple[Any, ...]) -> str:
    return name_of(args[0])


#: Functions of the library that are called on behalf of the user's: what is shown in their place. Nothing for those
#: that tell of each call themselves, and for what the library asks for its own purposes.
SHOWN: dict[str, Callable[[Any, tuple[Any, ...]], str]] = {
    "KeptFunction": _itself,
    "distpool.broadcast._call": _first,
    "distpool.broadcast._call_times": _first,
    "distpool.broadcast._define": lambda function, args: f"everywhere({args[0]})",
    "distpool.broadcast._forget_later": _nothing,
    "distpool.broadcast._keep_for_later": _nothing,
    "distpool.calls._do_there": _nothing,
    "distpool.calls._listed": _nothing,
    "distpool.debug._table": _nothing,
    "distpool.loops._each": _first,
    "distpool.loops._fold": _first,
    "distpool.mainmodule.run": lambda function, args: text_name(args[1]),
    "distpool.mainmodule.run_times": _nothing,
    "distpool.batches.run_batch": _nothing,
    "distpool.pools._default_for_others": _nothing,
    "distpool.pools._itself": _nothing,
    "distpool.shipping.content": _nothing,
    "distpool.shipping.offer": _nothing,
}


class Served:
    """The remote calls of one process. Any thread."""

    def __init__(self) -> None:
        self.running: dict[int, Running] = {}  # thread -> its call
        self.times: Times | None = None  # of a running trace
        self._done = itertools.count()
        self._failed = itertools.count()

    def begin(self, name: str, loading: bool = False) -> Running:
        """A call begins on this thread; `loading`: `loaded` comes when its function and arguments are there."""
        thread = threading.get_ident()
        call = self.running[thread] = Running(name, thread, None if loading else False)
        return call

    def loaded(self, call: Running, function: Any, args: tuple[Any, ...]) -> None:
        """Now it is going to run. Outside of the interruptible region: a trace may send what it has.

        Need not be called if the name is not in `SHOWN` and there is no trace.
        """
        shown = SHOWN.get(call.name)
        if shown is not None:
            call.name = shown(function, args)
            if not call.name:
                self.running.pop(call.thread, None)
                return
        times = self.times  # the trace may end meanwhile
        if times is not None:
            call.begin = time.perf_counter_ns()  # a trace has the time of the user's code
            call.told = False
            times.look()

    def end(self, call: Running, ended: int) -> None:
        """It has RETURNED or RAISED; its answer is not out yet."""
        self.running.pop(call.thread, None)
        if call.name:
            next(self._failed if ended else self._done)
            times = self.times
            if times is not None:
                times.ended(call, ended)

    @property
    def done(self) -> int:
        """Calls that returned."""
        return _count(self._done)

    @property
    def failed(self) -> int:
        """Calls that raised, or could not be loaded."""
        return _count(self._failed)

    def report(self) -> tuple[int, int, str | None, float | None]:
        """`done`, `failed`, and the call that has run for longest: its name, and for how many seconds."""
        calls = [call for call in list(self.running.values()) if call.name]
        if not calls:
            return self.done, self.failed, None, None
        oldest = min(calls, key=lambda call: call.begin)
        return self.done, self.failed, oldest.name, (time.perf_counter_ns() - oldest.begin) / 1e9


def _count(counter: itertools.count[int]) -> int:
    """How often `next` was called; nothing else tells without moving it on."""
    return int(repr(counter)[len("count(") : -1])


class Times:
    """The times of the remote calls that begin from now on, as `TIMED` records. Any thread.

    `records`: where they go. `lane(thread)`: its number on the timeline. `look()` is called when a call is going to
    run.
    """

    def __init__(
        self,
        served: Served,
        records: collections.deque[bytes],
        lane: Callable[[int], int],
        look: Callable[[], object] = lambda: None,
    ) -> None:
        self.began = time.perf_counter_ns()
        self.look = look
        self._served = served
        self._records = records
        self._lane = lane
        self._names: dict[str, int] = {}
        self._unsent: collections.deque[tuple[int, str]] = collections.deque()  # atomic ends
        self._numbers = itertools.count()

    def ended(self, call: Running, ended: int) -> None:
        """A call has ended; one that began before this trace is none of its calls."""
        if call.begin >= self.began:
            self._add(call, ended)

    def announce(self, again: bool = False) -> None:
        """Tell of calls that run, lest nobody ever hears of one that kills this process. `again`: of all of them."""
        for call in list(self._served.running.values()):
            if call.told is None or (call.told and not again):
                continue
            if call.begin >= self.began and call.name:
                call.told = True
                self._add(call, RUNNING)

    def _add(self, call: Running, ended: int) -> None:
        name = call.name[:_LONGEST_NAME]
        number = self._names.get(name)
        if number is None:  # two threads may tell the same name: with the same number
            number = self._names.setdefault(name, next(self._numbers))
            self._unsent.append((number, name))
        duration = time.perf_counter_ns() - call.begin
        self._records.append(TIMED.pack(number, 0, self._lane(call.thread), call.begin, duration, REMOTE | ended))

    def new_names(self) -> list[list[Any]]:
        """Names that have come since the last time: pairs of number and name."""
        found: list[list[Any]] = []
        while self._unsent:
            try:
                found.append(list(self._unsent.popleft()))
            except IndexError:  # another thread sends as well
                break
        return found


class Lanes:
    """Numbers for the threads that run calls: 0 is the main thread. Each thread asks for its own, so none gets two."""

    def __init__(self) -> None:
        self._lanes: dict[int, int] = {threading.main_thread().ident or 0: 0}
        self._numbers = itertools.count(1)

    def __call__(self, thread: int) -> int:
        lane = self._lanes.get(thread)
        if lane is None:
            lane = self._lanes.setdefault(thread, next(self._numbers))
        return lane


__all__ = ["RAISED", "REMOTE", "RETURNED", "RUNNING", "SHOWN", "Lanes", "Served", "Times", "name_of", "text_name"]
