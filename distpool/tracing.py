"""`trace`: every call of this program as a timeline file (layer 10).

    enter   leader: TRACE on -> all workers, also those that join later; `member.tracer` is set
    while   executors' calls: Slot.send -> sent (names, labels)    RESULTS -> answered (errors)
            remote calls, whoever makes them: told by who runs them (`node.served`), with their names
            both: TRACED -> times, kept packed
    leave   TRACE off -> the rest of the times -> resolve names -> JSON (Chrome's trace event format)

Off, it costs one look at `member.tracer` per frame in the master and nothing in the workers (`node/observe`), but one
look at `Served.times` per remote call. On, a worker pays about a microsecond per call and one more frame per 20 ms, and
keeps nothing but the names of functions; the master keeps some hundred bytes per call.

Clocks: a worker times its calls by `perf_counter_ns` and sends its distance from the wall clock; the difference of
two such distances maps its times to ours. On one host that is right to a few microseconds; between hosts as good as
their clocks agree (NTP: usually a millisecond). What is timed is the user's function: decoding of arguments and
encoding of results are the gaps between the calls.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from distpool.node import group as groups
from distpool.node import node as nodes
from distpool.node.group import Member, State
from distpool.node.node import Node
from distpool.node.observe import clock_offset
from distpool.node.served import RAISED, REMOTE, RUNNING, Lanes, Times
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind
from distpool.wire.records import ENTRUSTED

if TYPE_CHECKING:
    from distpool.transport.link import Link

_PATIENCE = 5.0  # seconds for the workers to send their last times
_UNKNOWN = "?"  # a call of which nothing is known but its times
_STATUS = ("ok", "error")  # RETURNED, RAISED
_numbers = itertools.count(1)  # of traces: a late answer to the last one must not get into the next


def trace(path: str | os.PathLike[str]) -> Trace:
    """Context manager: writes all calls that run inside it to `path`, as JSON.

    Open the file in https://ui.perfetto.dev or chrome://tracing, or draw it with `plot_trace`. Each worker is a
    process of the timeline, named by its pid; each call (each element of a map, each chunk of `distributed`) is an
    event with its begin and duration in microseconds, and `args`: `function`, `label` (of `options`), `status`: "ok",
    "error", "unsendable" (an executor's call returned something that could not be sent), "running" (when the trace
    ended), "died" (with its worker; begin and end are then the master's estimate). A worker that is killed takes the
    times of the last milliseconds along.

    Calls of executors and pools are there if they begin, or are sent, inside the trace; remote calls (`remotecall` and
    all that is made of it) if they begin inside, whichever process made them. Those that run on process 1 are there as
    well, but `remotecall_fetch` to oneself is a plain call, and so are the elements of a `pmap` without workers.

    OSError if the file cannot be written; RuntimeError on a worker, or if a trace is being made already.

    Example:
        with distpool.trace("calls.json"), distpool.ClusterExecutor(4) as ex:
            ex.pmap(f, xs)
            distpool.remotecall_fetch(g, ex.workers[0])
    """
    return Trace(os.fspath(path))


class Trace:
    """What `trace` returns."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._tracer: Tracer | None = None

    def __enter__(self) -> str:
        node = nodes.current()
        if not node.is_master:
            raise RuntimeError("trace() works on process 1: a worker does not know the others")
        if self._tracer is not None or node.tracer is not None:
            raise RuntimeError("a trace is being made already: they cannot be nested")
        self._file = open(self._path, "w", encoding="utf-8")
        try:
            self._tracer = Tracer(node)
            self._tracer.start()
        except BaseException:
            self._tracer = None
            self._file.close()
            raise
        return self._path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tracer, file = self._tracer, self._file
        self._tracer = self._file = None
        if tracer is None or file is None:
            return
        with file:
            if nodes.existing() is not tracer.node:
                return  # a forked child: the trace is its parent's
            tracer.stop()
            write(file, tracer)


class _Sent(NamedTuple):
    """An entry of a CALLS frame: its elements, and how they are called."""

    elements: int
    function: str
    label: str | None
    when: int  # perf_counter_ns of this process


class _Track:
    """What is known of one process's calls."""

    def __init__(self, pid: int, host: str, member: Member | None = None) -> None:
        self.pid = pid
        self.host = host
        self.member = member  # None: this process
        self.names: dict[int, str] = {}  # of functions of remote calls; leader
        self.sent: dict[int, _Sent] = {}  # by first sequence number; atomic
        self.times: list[tuple[int, bytes]] = []  # the worker's clock, TIMED records; leader
        self.unsendable: set[int] = set()  # leader
        self.answered = 0  # highest sequence number that was answered; leader
        self.ended = False  # no more times will come; leader
        self.gone_at = 0  # perf_counter_ns when it died without a word
        self.started = 0  # what it ran then


class Event(NamedTuple):
    """One call on the timeline; nanoseconds since the trace began."""

    pid: int
    lane: int
    begin: int
    duration: int
    function: str
    label: str | None
    status: str


class Tracer:
    """Collects the calls of one trace. Leader, except where it says otherwise."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.number = next(_numbers)
        self.clock = clock_offset()
        self.began = time.perf_counter_ns()
        self.ended = self.began
        self.wall = time.time()
        self.tracks: dict[int, _Track] = {}
        self._group = groups.of(node)
        self._records: collections.deque[bytes] = collections.deque()  # of calls that run here; atomic ends
        self._own = Times(node.served, self._records, Lanes())
        self._all_ended = threading.Event()
        self._stopping = False

    # -- begin and end (user's thread) -------------------------------------------------------------------------

    def start(self) -> None:
        """Begin on all workers; calls that are submitted after this are in the trace."""
        began = threading.Event()
        refused = False

        def begin() -> None:
            nonlocal refused
            refused = self.node.tracer is not None
            if not refused:
                self._begin()
            began.set()

        self._wait(began, begin)
        if refused:
            raise RuntimeError("a trace is being made already: they cannot be nested")
        if not began.is_set():
            self.node.loop.call_soon(self._take_back)
            raise RuntimeError(f"the I/O loop did not answer within {_PATIENCE:g} seconds")

    def stop(self) -> None:
        """End it, and wait (for a while) until the workers have sent what they measured."""
        try:
            self._wait(self._all_ended, self._end)
        finally:
            self.ended = time.perf_counter_ns()
            forgotten = threading.Event()
            self._wait(forgotten, lambda: self._forget(forgotten))

    def _wait(self, event: threading.Event, action: Callable[[], object]) -> None:
        """Have `action` run by the leader, wait for `event`."""
        loop = self.node.loop
        deadline = time.monotonic() + _PATIENCE
        loop.call_soon(action)
        if not loop.lead(event.is_set, deadline):
            with loop.following():
                event.wait(max(0.0, deadline - time.monotonic()))

    # -- leader ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        node, group = self.node, self._group
        node.tracer = self
        node.served.times = self._own
        node.handlers[Kind.TRACED] = self._on_traced
        group.joined_watchers.append(self._add)
        group.gone_watchers.append(self._on_gone)
        for member in list(group.members.values()):
            if member.state in (State.READY, State.LEAVING):
                self._add(member)
        for crew in list(node.crews):  # what has been sent ahead will be timed as well
            for pid, slot in list(crew._slots.items()):
                if pid in self.tracks:
                    waiting = list(slot.inflight.items())
                    # What was answered before is over, should the worker not say so itself.
                    self.tracks[pid].answered = waiting[0][0] + waiting[0][1].done - 1 if waiting else slot.last
                    for sequence, entry in waiting:
                        self.sent(pid, sequence, [entry])

    def _add(self, member: Member) -> None:
        self.tracks[member.pid] = _Track(member.pid, member.host, member)
        member.tracer = self
        if member.link is not None:
            member.link.send(Kind.TRACE, messages.Trace(self.number, True).pack())

    def _end(self) -> None:
        self._stopping = True
        self._group.joined_watchers.remove(self._add)
        self._end_own()
        for track in self.tracks.values():
            member = track.member
            if member is None:
                continue
            member.tracer = None
            if track.ended or member.link is None:
                continue
            if not member.link.send(Kind.TRACE, messages.Trace(self.number, False).pack()):
                track.ended = True
        self._check_ended()

    def _end_own(self) -> None:
        """The calls that ran, or run, on this process."""
        self.node.served.times = None
        self._own.announce()
        if self._records:
            own = self.tracks[1] = _Track(1, socket.gethostname())
            own.times.append((self.clock, b"".join(self._records)))
            own.names = dict(self._own.new_names())
            own.ended = True

    def _take_back(self) -> None:
        """It has begun too late: nobody will end it."""
        if self.node.tracer is self:
            self._end()
            self._forget(threading.Event())

    def _forget(self, forgotten: threading.Event) -> None:
        self._group.gone_watchers.remove(self._on_gone)
        self.node.handlers.pop(Kind.TRACED, None)
        self.node.tracer = None
        for track in self.tracks.values():
            if not track.ended:  # it did not answer: C code that holds the interpreter lock
                self._note_started(track)
        forgotten.set()

    def _on_traced(self, link: Link, frame: Frame) -> None:
        message = messages.Traced.unpack(frame.control)
        track = self.tracks.get(link.peer)
        if track is None or message.number != self.number:
            return
        track.names.update((number, name) for number, name in message.names)
        if len(frame.body):
            track.times.append((message.clock, bytes(frame.body)))
        if message.last:
            track.ended = True
            self._check_ended()

    def _on_gone(self, member: Member) -> None:
        track = self.tracks.get(member.pid)
        if track is not None and not track.ended:
            track.gone_at = time.perf_counter_ns()
            self._note_started(track)
            track.ended = True
            self._check_ended()

    @staticmethod
    def _note_started(track: _Track) -> None:
        journal = track.member.journal if track.member is not None else None
        if journal is not None:
            try:
                track.started = journal.started
            except ValueError:  # closed
                track.started = 0
        else:  # results are sent one by one there: the first unanswered call is the one that runs
            track.started = min((first for first in list(track.sent) if first > track.answered), default=0)

    def _check_ended(self) -> None:
        if self._stopping and all(track.ended for track in self.tracks.values()):
            self._all_ended.set()

    # -- from the scheduler ------------------------------------------------------------------------------------

    def sent(self, pid: int, first: int, entries: list[Any]) -> None:
        """These entries go to the worker as one frame (scheduler's lock)."""
        track = self.tracks.get(pid)
        if track is None:
            return
        now = time.perf_counter_ns()
        for entry in entries:
            policy = entry.policy
            label = policy.label if policy is not None else None
            track.sent[first] = _Sent(entry.elements, entry.function.name, label, now)
            first += entry.elements

    def answered(self, pid: int, body: Any) -> None:
        """Results came."""
        track = self.tracks.get(pid)
        if track is None:
            return
        for sequence, _, status, _, _ in messages.result_records(body):
            track.answered = max(track.answered, sequence)
            if status & ~ENTRUSTED == messages.UNSENDABLE:
                track.unsendable.add(sequence)

    # -- the result --------------------------------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        """All calls, worker by worker, by begin."""
        for _, track in sorted(self.tracks.items()):
            yield from sorted(self._events_of(track), key=lambda event: (event.lane, event.begin))

    def _events_of(self, track: _Track) -> Iterator[Event]:
        firsts = sorted(track.sent)
        pid = track.pid
        end = (track.gone_at or self.ended) - self.began
        remote_seen: set[tuple[int, int]] = set()
        remote_lost: dict[tuple[int, int], str] = {}
        seen: set[tuple[int, int]] = set()
        last_end = 0
        lost: list[tuple[int, int, int, int]] = []
        for clock, body in track.times:
            shift = clock - self.clock - self.began
            for sequence, element, lane, begin, duration, ended in messages.TIMED.iter_unpack(body):
                begin += shift
                if ended & REMOTE:
                    name = track.names.get(sequence, _UNKNOWN)
                    if ended == REMOTE | RUNNING:
                        remote_lost[lane, begin] = name
                        continue
                    remote_seen.add((lane, begin))
                    yield Event(pid, lane, max(0, begin), duration, name, None, _STATUS[ended & ~REMOTE])
                    continue
                if ended == RUNNING:
                    lost.append((sequence, element, lane, begin))
                    continue
                seen.add((sequence, element))
                last_end = max(last_end, begin + duration)
                status = "error" if ended == RAISED else "unsendable" if sequence in track.unsendable else "ok"
                sent = _find(track.sent, firsts, sequence)
                yield Event(pid, lane, begin, duration, sent.function, sent.label, status)
        for (lane, begin), name in remote_lost.items():
            if (lane, begin) not in remote_seen:
                begin = max(0, begin)
                yield Event(pid, lane, begin, max(0, end - begin), name, None, "died" if track.gone_at else "running")
        for sequence, element, lane, begin in lost:
            if (sequence, element) not in seen:  # else: it ended while the worker was counting
                sent = _find(track.sent, firsts, sequence)
                yield Event(pid, lane, begin, max(0, end - begin), sent.function, sent.label, "running")
        if track.started > track.answered and not any(sequence == track.started for sequence, _ in seen):
            sent = _find(track.sent, firsts, track.started)
            begin = max(last_end, sent.when - self.began, 0)
            status = "died" if track.gone_at else "running"
            yield Event(pid, 0, begin, max(0, end - begin), sent.function, sent.label, status)


def _find(sent: dict[int, _Sent], firsts: list[int], sequence: int) -> _Sent:
    index = bisect.bisect_right(firsts, sequence) - 1
    if index >= 0:
        found = sent[firsts[index]]
        if sequence < firsts[index] + found.elements:
            return found
    return _Sent(1, _UNKNOWN, None, 0)


def write(file: IO[str], tracer: Tracer) -> None:
    """The calls as trace events, one per line; microseconds since the trace began."""
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(tracer.wall))
    head = {"displayTimeUnit": "ms", "otherData": {"made by": "distpool", "began": began}}
    file.write(json.dumps(head)[:-1] + ', "traceEvents": [\n')
    lines = []
    for pid, track in sorted(tracer.tracks.items()):
        lines.append(
            _metadata("process_name", pid, 0, {"name": f"{'process' if pid == 1 else 'worker'} {pid} ({track.host})"})
        )
        lines.append(_metadata("process_sort_index", pid, 0, {"sort_index": pid}))
        lines.append(_metadata("thread_name", pid, 0, {"name": "main thread"}))
    lanes = set()
    constants: dict[tuple[int, int, str, str | None, str], str] = {}
    separator = ""
    for event in tracer.events():
        if event.lane and (event.pid, event.lane) not in lanes:
            lanes.add((event.pid, event.lane))
            lines.append(_metadata("thread_name", event.pid, event.lane, {"name": f"helper {event.lane}"}))
        kind = event.pid, event.lane, event.function, event.label, event.status
        constant = constants.get(kind)
        if constant is None:
            constant = constants[kind] = _constant(event)
        lines.append(f'{constant}, "ts": {event.begin / 1000}, "dur": {event.duration / 1000}}}')
        if len(lines) >= 1000:
            file.write(separator + ",\n".join(lines))
            separator, lines = ",\n", []
    file.write((separator if lines else "") + ",\n".join(lines) + "\n]}\n")


def _metadata(name: str, pid: int, lane: int, args: dict[str, Any]) -> str:
    return json.dumps({"name": name, "ph": "M", "pid": pid, "tid": lane, "args": args})


def _constant(event: Event) -> str:
    """What calls of one kind have in common, without the closing brace (a trace may have a million of them)."""
    args = {"function": event.function, "label": event.label, "status": event.status}
    name = event.label or event.function
    common = {"name": name, "cat": "call", "ph": "X", "pid": event.pid, "tid": event.lane, "args": args}
    return json.dumps(common)[:-1]


__all__ = ["Trace", "trace"]
