"""What a worker tells about itself: stacks, usage, and the times of its calls (layer 3).

    STACKS -> text of all threads -> STACKS_ARE        USAGE -> cpu, memory -> USAGE_IS
    TRACE on  -> Timeline: the runner's functions are wrapped, each call leaves one `TIMED` record; so does each remote
                 call, by itself (`served`)
    TRACE off, every 20 ms, before the next call (at most every 2 ms), end of the worker -> TRACED

The handlers run on the leader, so they answer while the main thread runs a Python loop; while C code holds the GIL
nothing answers, and the master's patience ends. The wrapper runs around the user's code, where an interrupt may
strike at any bytecode: it only appends to a deque and never writes to the link.

Without a trace nothing is paid: `TaskRunner.find_function` is then the runner's own method, and `Served.times` is None.
"""

from __future__ import annotations

import collections
import os
import sys
import threading
import time
from collections.abc import Callable

from distpool.hints import Any
from distpool.node.node import Node
from distpool.node.served import RAISED, RETURNED, RUNNING, Lanes, Served, Times
from distpool.node.striking import looking_at_frames
from distpool.node.tasks import TaskRunner
from distpool.transport.link import Link
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind

_EVERY = 0.02  # seconds between two frames of times while calls run
_AT_LEAST = 0.002  # seconds between two frames that are sent before a call


def clock_offset() -> int:
    """Nanoseconds to add to `perf_counter_ns` for the wall clock: the best of a few readings (about a microsecond)."""
    best, offset = 1 << 62, 0
    for _ in range(5):
        before = time.perf_counter_ns()
        wall = time.time_ns()
        after = time.perf_counter_ns()
        if after - before < best:
            best, offset = after - before, wall - (before + after) // 2
    return offset


def stacks() -> str:
    """The stacks of all threads of this process, innermost call last."""
    import traceback

    threads = {thread.ident: thread for thread in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    with looking_at_frames():
        for ident, frame in sorted(sys._current_frames().items(), key=lambda pair: pair[0] != main):
            thread = threads.get(ident)
            name = thread.name if thread is not None else "not started by Python"
            kind = ", daemon" if thread is not None and thread.daemon else ""
            head = f"Thread {name} ({ident}{kind}), most recent call last:\n"
            parts.append(head + "".join(traceback.format_stack(frame)))
    return "\n".join(parts)


def usage() -> tuple[float, float, int]:
    """Seconds since this process started, seconds of CPU that it has used, bytes resident."""
    try:
        import psutil
    except ImportError:  # on hosts that were sent distpool alone
        return _usage_without_psutil()
    process = psutil.Process()
    with process.oneshot():
        times = process.cpu_times()
        return time.time() - process.create_time(), times.user + times.system, process.memory_info().rss


_LOADED = time.monotonic()


def _usage_without_psutil() -> tuple[float, float, int]:
    """What the standard library knows: the age counts from when distpool was loaded (in a zygote, so a little more)."""
    times = os.times()
    return time.monotonic() - _LOADED, times.user + times.system, _resident()


def _resident() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
        return pages * int(os.sysconf("SC_PAGE_SIZE"))
    except OSError:
        pass  # not Linux: the most that it ever was
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Timeline:
    """The times of the calls that `runner` runs, and of the remote ones, from construction to `stop`."""

    def __init__(self, link: Link, runner: TaskRunner, served: Served, number: int) -> None:
        self.number = number
        self._link = link
        self._runner = runner
        self._served = served
        self._clock = clock_offset()
        self._records: collections.deque[bytes] = collections.deque()  # atomic ends
        self._open: dict[int, tuple[int, int, int, int]] = {}  # thread -> sequence, element, lane, begin; atomic
        self._lanes = Lanes()
        self._times = Times(served, self._records, self._lanes, self._look)
        self._sent = time.perf_counter()
        self._stopped = False
        self._timer = link.loop.call_later(_EVERY, self._tick)
        runner.find_function = self._find_function
        served.times = self._times

    def _tick(self) -> None:
        self._times.announce()
        self._send()
        if not self._stopped:
            self._timer = self._link.loop.call_later(_EVERY, self._tick)

    def _find_function(self, item: Any) -> Any:
        """As the runner's own; the function leaves a record of each call. Outside of the interruptible region."""
        if self._records and time.perf_counter() - self._sent > _AT_LEAST:
            self._send()
        return self._timed(self._runner.function_of(item), item)

    def _look(self) -> None:
        """A remote call is going to run, perhaps to the end of this process. Outside of the interruptible region."""
        if time.perf_counter() - self._sent > _AT_LEAST:
            self._times.announce()
            self._send()

    def _timed(self, function: Callable[..., Any], item: Any) -> Callable[..., Any]:
        clock, opened, records, pack = time.perf_counter_ns, self._open, self._records, messages.TIMED.pack
        first = item.sequence
        spans = item.flags in (messages.SPAN, messages.SPAN_OF_SCALARS)
        count = 0

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            sequence, element = (first + item.index, 0) if spans else (first, count)
            count += 1
            thread = threading.get_ident()
            lane = self._lanes(thread)
            ended = RAISED
            begin = clock()
            opened[thread] = sequence, element, lane, begin
            try:
                value = function(*args, **kwargs)
                ended = RETURNED
                return value
            finally:
                # First the record, then the entry goes: `stop` may count a call twice and the master sorts that out.
                records.append(pack(sequence, element, lane, begin, clock() - begin, ended))
                opened.pop(thread, None)

        timed.__wrapped__ = function  # type: ignore[attr-defined]  # by whose name errors are told
        return timed

    def _send(self, last: bool = False, more: bytes = b"") -> None:
        self._sent = time.perf_counter()
        records, parts = self._records, []
        while records:
            try:
                parts.append(records.popleft())
            except IndexError:  # another thread sends as well
                break
        if parts or last:
            message = messages.Traced(self.number, self._clock, last, self._times.new_names())
            self._link.send(Kind.TRACED, message.pack(), b"".join(parts) + more)

    def stop(self) -> None:
        """Send what is left; calls that still run are said to."""
        if self._stopped:
            return
        self._stopped = True
        self._timer.cancel()
        self._runner.find_function = self._runner.function_of
        self._served.times = None
        self._times.announce(again=True)
        now = time.perf_counter_ns()
        running = list(self._open.values())
        self._send(True, b"".join(messages.TIMED.pack(*entry, now - entry[3], RUNNING) for entry in running))


class Observer:
    """Answers the master's questions about this worker."""

    def __init__(self, node: Node, link: Link, runner: TaskRunner) -> None:
        self._served: Served = node.served
        self._link = link
        self._runner = runner
        self._timeline: Timeline | None = None
        node.handlers.update({Kind.STACKS: self._on_stacks, Kind.USAGE: self._on_usage, Kind.TRACE: self._on_trace})

    def _on_stacks(self, link: Link, frame: Frame) -> None:
        request = messages.Stacks.unpack(frame.control).request
        link.send(Kind.STACKS_ARE, messages.StacksAre(request).pack(), stacks().encode("utf-8", "backslashreplace"))

    def _on_usage(self, link: Link, frame: Frame) -> None:
        message = messages.Usage.unpack(frame.control)
        used = usage() if message.whole else (0.0, 0.0, 0)
        done, failed, running, since = self._served.report()
        link.send(Kind.USAGE_IS, messages.UsageIs(message.request, *used, done, failed, running, since).pack())

    def _on_trace(self, link: Link, frame: Frame) -> None:
        message = messages.Trace.unpack(frame.control)
        self.stop()
        if message.on:
            self._timeline = Timeline(link, self._runner, self._served, message.number)

    def stop(self) -> None:
        """The worker is about to end (or the trace is): send the times that have not been sent."""
        timeline, self._timeline = self._timeline, None
        if timeline is not None:
            timeline.stop()


__all__ = ["Observer", "Timeline", "clock_offset", "stacks", "usage"]
