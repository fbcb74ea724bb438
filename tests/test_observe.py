"""What a worker tells about itself; asked from the other side: `test_monitor`, `test_trace`."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from fakes import ManualLoop

from distpool.node import observe
from distpool.node.observe import Observer, Timeline
from distpool.node.served import RAISED, RETURNED, RUNNING, Served
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind


def test_own_stacks_name_threads_that_python_does_not_know() -> None:
    import _thread

    release = threading.Event()
    started = threading.Event()

    def bare() -> None:
        started.set()
        release.wait(10)

    _thread.start_new_thread(bare, ())
    started.wait(10)
    try:
        text = observe.stacks()
        assert text.startswith("Thread MainThread")
        assert "not started by Python" in text and "in bare" in text
    finally:
        release.set()


def test_usage_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    age, cpu_seconds, memory = observe.usage()
    monkeypatch.setitem(sys.modules, "psutil", None)
    other_age, other_cpu_seconds, other_memory = observe.usage()
    assert 0 < other_age <= age + 1
    assert other_cpu_seconds == pytest.approx(cpu_seconds, abs=0.5)
    assert other_memory == pytest.approx(memory, rel=0.5)


def test_usage_is_that_of_this_process() -> None:
    age, cpu_seconds, memory = observe.usage()
    process = psutil.Process()
    assert age == pytest.approx(time.time() - process.create_time(), abs=2)
    assert cpu_seconds == pytest.approx(sum(process.cpu_times()[:2]), abs=1)
    assert memory == pytest.approx(process.memory_info().rss, rel=0.2)


def test_clock_offset_is_stable() -> None:
    offsets = [observe.clock_offset() for _ in range(20)]
    assert max(offsets) - min(offsets) < 5_000_000


def test_threads_by_name_with_their_kind() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, args=(30,), name="observed", daemon=True)
    thread.start()
    try:
        assert f"Thread observed ({thread.ident}, daemon), most recent call last:" in observe.stacks()
    finally:
        release.set()
        thread.join(30)


# -- times of calls ------------------------------------------------------------------------------------------------


class Watched:
    """A worker whose link and runner are played here."""

    def __init__(self) -> None:
        self.loop = ManualLoop()
        self.sent: list[Frame] = []
        self.function: Any = abs
        self.function_of = lambda item: self.function  # of the runner
        self.find_function = self.function_of
        self.handlers: dict[int, Any] = {}
        self.served = Served()

    def send(self, kind: Kind, control: bytes, body: bytes = b"") -> None:
        self.sent.append(Frame(kind, control, body, []))

    def times(self) -> list[tuple[int, int, int, int]]:
        """(sequence, element, lane, how it ended) of all that was sent, and that each has a sound time."""
        found = []
        for frame in self.sent:
            assert frame.kind is Kind.TRACED
            for sequence, element, lane, begin, duration, ended in messages.TIMED.iter_unpack(frame.body):
                assert 0 < begin <= time.perf_counter_ns() and 0 <= duration < 60e9
                found.append((sequence, element, lane, ended))
        return found

    def last(self) -> list[bool]:
        return [messages.Traced.unpack(frame.control).last for frame in self.sent]

    def run(self, sequence: int, *args: Any, flags: int = messages.ONE, index: int = 0) -> Any:
        item = SimpleNamespace(sequence=sequence, flags=flags, index=index)
        return self.find_function(item)(*args)


@pytest.fixture
def watched() -> Iterator[Watched]:
    yield Watched()


def test_each_call_leaves_its_time_and_its_result_is_untouched(watched: Watched) -> None:
    timeline = Timeline(watched, watched, watched.served, 3)  # type: ignore[arg-type]
    assert watched.run(5, -2) == 2
    with pytest.raises(TypeError):
        watched.run(6, "x")
    assert watched.run(10, -1, flags=messages.SPAN_OF_SCALARS, index=2) == 1
    timeline.stop()
    assert watched.times() == [(5, 0, 0, RETURNED), (6, 0, 0, RAISED), (12, 0, 0, RETURNED)]
    traced = messages.Traced.unpack(watched.sent[-1].control)
    assert traced.number == 3 and abs(time.time_ns() - time.perf_counter_ns() - traced.clock) < 60e9


def test_elements_of_a_chunk_are_told_apart(watched: Watched) -> None:
    timeline = Timeline(watched, watched, watched.served, 3)  # type: ignore[arg-type]
    function = watched.find_function(SimpleNamespace(sequence=7, flags=messages.CHUNK, index=0))
    assert [function(number) for number in (-1, -2)] == [1, 2]
    timeline.stop()
    assert watched.times() == [(7, 0, 0, RETURNED), (7, 1, 0, RETURNED)]


def test_other_threads_have_lanes_of_their_own(watched: Watched) -> None:
    timeline = Timeline(watched, watched, watched.served, 3)  # type: ignore[arg-type]
    for sequence in (1, 2):
        thread = threading.Thread(target=watched.run, args=(sequence, -1))
        thread.start()
        thread.join(30)
    watched.run(3, -1)
    timeline.stop()
    lanes = [lane for _, _, lane, _ in watched.times()]
    assert lanes[2] == 0 and 0 not in lanes[:2]


def test_what_still_runs_is_said_to(watched: Watched) -> None:
    timeline = Timeline(watched, watched, watched.served, 3)  # type: ignore[arg-type]
    watched.function = lambda: timeline.stop()
    watched.run(5)
    assert watched.times() == [(5, 0, 0, RUNNING)] and watched.last() == [True]
    timeline.stop()
    assert len(watched.sent) == 1, "the end is told once"


def test_times_are_sent_while_calls_run(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(watched, watched, watched.served, 3)  # type: ignore[arg-type]
    watched.loop.ring(observe._EVERY)
    assert watched.sent == [], "nothing to tell"
    watched.run(1, -1)
    watched.loop.ring(observe._EVERY)
    assert watched.times() == [(1, 0, 0, RETURNED)]
    monkeypatch.setattr(observe, "_AT_LEAST", -1.0)
    watched.run(2, -1)
    watched.run(3, -1)
    assert len(watched.sent) == 2, "before the next call"
    timeline.stop()
    watched.loop.ring(observe._EVERY)
    assert watched.last() == [False, False, True] and len(watched.times()) == 3


def test_without_a_trace_nothing_is_paid(watched: Watched) -> None:
    Timeline(watched, watched, watched.served, 3).stop()  # type: ignore[arg-type]
    assert watched.find_function is watched.function_of


def test_the_master_turns_it_on_and_off(watched: Watched) -> None:
    observer = Observer(watched, watched, watched)  # type: ignore[arg-type]

    def trace(on: bool, number: int) -> None:
        watched.handlers[Kind.TRACE](watched, Frame(Kind.TRACE, messages.Trace(number, on).pack(), b"", []))

    trace(True, 1)
    watched.run(1, -1)
    trace(True, 2)  # one after the other: the first has its end
    watched.run(2, -1)
    observer.stop()
    observer.stop()
    assert [messages.Traced.unpack(frame.control).number for frame in watched.sent] == [1, 2]
    assert watched.last() == [True, True]
    trace(False, 2)
    assert len(watched.sent) == 2 and watched.find_function is watched.function_of


def test_questions_are_answered_with_their_number(watched: Watched) -> None:
    Observer(watched, watched, watched)  # type: ignore[arg-type]
    watched.handlers[Kind.STACKS](watched, Frame(Kind.STACKS, messages.Stacks(8).pack(), b"", []))
    watched.handlers[Kind.USAGE](watched, Frame(Kind.USAGE, messages.Usage(9, True).pack(), b"", []))
    stacks, usage = watched.sent
    assert stacks.kind is Kind.STACKS_ARE and messages.StacksAre.unpack(stacks.control).request == 8
    assert b"test_questions_are_answered" in stacks.body
    told = messages.UsageIs.unpack(usage.control)
    assert usage.kind is Kind.USAGE_IS and told.request == 9 and told.memory > 0
