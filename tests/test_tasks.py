"""`TaskRunner`, the loop of a worker, over a socket pair: nothing is lost, nothing runs twice, results are durable."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from wires import PATIENCE, Bench, bench, until

from distpool import config
from distpool.node.results import ResultWriter
from distpool.wire import codec, messages
from distpool.wire.failures import failure_info
from distpool.wire.frames import Frame, Kind

ran: list[Any] = []
"""What the tasks below have run: the runner lives in this process."""

gate = threading.Event()
entered = threading.Event()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    ran.clear()
    gate.clear()
    entered.clear()
    yield
    gate.set()


@pytest.fixture(params=[True, False], ids=["shared journal", "private journal"])
def runner(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with bench(request.param) as made:
        yield made
        gate.set()


def note(number: int) -> int:
    ran.append(number)
    return number * number


def spin(number: int) -> int:
    """Takes between nothing and a fifth of a millisecond."""
    ran.append(number)
    stop = time.perf_counter() + (number % 5) * 4e-5
    while time.perf_counter() < stop:
        pass
    return number


def hold(number: int) -> int:
    entered.set()
    assert gate.wait(PATIENCE)
    ran.append(number)
    return number


def fail(number: int) -> None:
    raise ValueError(number)


def leave(number: int) -> None:
    sys.exit(number)


# --------------------------------------------------------------------------------------------------------- single calls


def test_calls_of_every_kind(runner: Bench) -> None:
    records = [
        runner.one(note, 3),
        runner.span(note, [1, 2, 3]),
        runner.record(pow, codec.encode([(2, 3), (3, 2)])[0], messages.SPAN, 2),
        runner.record(note, codec.encode([4, 5])[0], messages.CHUNK_OF_SCALARS),
        runner.record(pow, codec.encode([(2, 2), (5, 2)])[0], messages.CHUNK),
        runner.one(dict, a=1),
    ]
    first = runner.send(*records)
    ended = runner.collect(9)
    values = [ended[first + offset] for offset in range(9)]
    assert values == [9, 1, 4, 9, 8, 9, [16, 25], [4, 25], {"a": 1}]


def test_a_function_that_captured_something_mutable_is_fresh_for_each_call(runner: Bench) -> None:
    seen: list[int] = []

    def remember(number: int) -> list[int]:
        seen.append(number)
        return list(seen)

    payload = codec.encode_args((1,), {})[0]
    first = runner.send(*[runner.record(remember, payload, messages.ONE_FRESH) for _ in range(3)])
    assert runner.collect(3) == {first: [1], first + 1: [1], first + 2: [1]}


@pytest.mark.parametrize("task", [fail, leave])
def test_an_error_is_the_outcome_of_its_element_alone(runner: Bench, task: Any) -> None:
    first = runner.send(runner.one(note, 1), runner.one(task, 7), runner.span(task, [8, 9]), runner.one(note, 2))
    ended = runner.collect(5)
    assert ended[first] == 1 and ended[first + 4] == 4
    for offset, number in ((1, 7), (2, 8), (3, 9)):
        assert isinstance(ended[first + offset], (ValueError, SystemExit)) and ended[first + offset].args == (number,)


def test_a_chunk_fails_as_one(runner: Bench) -> None:
    first = runner.send(runner.record(fail, codec.encode([1, 2])[0], messages.CHUNK_OF_SCALARS))
    assert isinstance(runner.collect(1)[first], ValueError)


def test_what_cannot_be_loaded_fails_alone(runner: Bench) -> None:
    bad = b"\x80\x05nonsense"
    records = [
        runner.record(note, bad, messages.ONE),
        runner.record(note, bad, messages.SPAN_OF_SCALARS, 3),
        runner.one(note, 2),
    ]
    first = runner.send(*records)
    ended = runner.collect(5)
    assert all(isinstance(ended[first + offset], Exception) for offset in range(4))
    assert ended[first + 4] == 4


def test_an_unknown_function_fails_alone(runner: Bench) -> None:
    payload = codec.encode_args((1,), {})[0]
    first = runner.send(messages.CALL.pack(9999, 1, len(payload), 0, messages.ONE) + payload, runner.one(note, 2))
    ended = runner.collect(2)
    assert isinstance(ended[first], Exception) and ended[first + 1] == 4


def test_a_result_that_cannot_be_sent(runner: Bench) -> None:
    first = runner.send(runner.one(threading.Lock), runner.one(note, 1))
    frames: dict[int, tuple[int, Any]] = {}
    while len(frames) < 2:
        for sequence, status, value in runner.results(runner.master.next_frame()):
            frames[sequence] = status, value
    assert frames[first][0] == messages.UNSENDABLE and isinstance(frames[first][1], Exception)
    assert frames[first + 1] == (messages.VALUE, 1)


@pytest.mark.parametrize("size", [0, 60_000, 70_000, 1 << 20, 9 << 20])
def test_results_of_every_size(runner: Bench, size: int) -> None:
    first = runner.send(*[runner.one(bytes, size) for _ in range(3)], runner.one(note, 1))
    ended = runner.collect(4)
    assert [len(ended[first + offset]) for offset in range(3)] == [size] * 3 and ended[first + 3] == 1


def test_results_come_while_a_long_call_runs(runner: Bench) -> None:
    first = runner.send(runner.one(note, 1), runner.one(note, 2), runner.one(hold, 3))
    assert runner.collect(2) == {first: 1, first + 1: 4}
    assert not gate.is_set()
    gate.set()
    assert runner.collect(1) == {first + 2: 3}


def hold_third(number: int) -> int:
    return hold(number) if number == 3 else number


def test_results_of_a_span_come_while_a_long_element_of_it_runs(runner: Bench) -> None:
    first = runner.send(runner.span(hold_third, [1, 2, 3, 4]))
    assert runner.collect(2) == {first: 1, first + 1: 2}, "the others wait behind the long one"
    assert not gate.is_set()
    gate.set()
    assert runner.collect(2) == {first + 2: 3, first + 3: 4}


def nap(number: int) -> int:
    entered.wait(0.001)
    return number


def frames_with(runner: Bench, count: int) -> int:
    """How many frames bring so many results."""
    frames = ended = 0
    while ended < count:
        frame = runner.master.next_frame()
        if frame.kind == Kind.RESULTS:
            frames += 1
            ended += len(runner.results(frame))
    return frames


def test_spans_of_short_calls_are_answered_in_few_frames() -> None:
    with bench(shared=True) as runner:
        begin = time.monotonic()
        runner.send(*[runner.span(nap, list(range(12))) for _ in range(10)])
        frames = frames_with(runner, 120)
        # Each span at its end, and now and then within it, however slow the machine is: nobody flushes more often.
        most = 11 + (time.monotonic() - begin) / config.SPAN_FLUSH_SECONDS
        assert frames <= most, f"{frames} frames for 10 spans"


@pytest.mark.parametrize(("pause", "least", "most"), [(0.0, 30, 41), (60.0, 1, 2)])
def test_results_of_chunks_wait_while_there_are_more(
    monkeypatch: pytest.MonkeyPatch, pause: float, least: int, most: int
) -> None:
    """As long as `ResultWriter.pause` says (the first has waited for ever), while something is left to do."""
    monkeypatch.setattr(ResultWriter, "pause", lambda writer: pause)
    with bench(shared=True) as runner:
        payload = codec.encode([1, 2])[0]
        runner.send(*[runner.record(nap, payload, messages.CHUNK_OF_SCALARS) for _ in range(40)])
        frames = frames_with(runner, 40)
        assert least <= frames <= most, f"{frames} frames for 40 chunks"


def test_a_forgotten_function_is_gone(runner: Bench) -> None:
    number = runner.function(note).number
    runner.master.link.send(Kind.FORGET, messages.Forget([number, 12345]).pack())
    first = runner.send(runner.one(note, 1))
    assert isinstance(runner.collect(1)[first], Exception) and ran == []


def loaded() -> bool:
    return "wave" in sys.modules


def test_a_worker_at_rest_loads_what_it_was_born_without(runner: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.modules.pop("wave", None)
    monkeypatch.setattr(config, "PRELOAD", ("no_such_module", "wave"))  # what is not there hinders nobody
    until(loaded, "it loads nothing")
    sys.modules.pop("wave")
    first = runner.send(runner.one(note, 3))
    assert runner.collect(1) == {first: 9}  # it runs on, and looks only once
    assert not loaded()


def test_shutdown_comes_after_the_calls(runner: Bench) -> None:
    first = runner.send(*[runner.one(note, n) for n in range(50)])
    runner.master.link.send(Kind.SHUTDOWN, messages.Shutdown("").pack())
    assert len(runner.collect(50)) == 50 and first == 1
    runner.thread.join(PATIENCE)
    assert runner.exit == [0]


# ---------------------------------------------------------------------------------------------------------- initializer


def test_the_initializer_runs_before_any_call(runner: Bench) -> None:
    body = codec.encode((note, (100,)))[0]
    runner.master.link.send(Kind.INITIALIZE, messages.Initialize("").pack(), body)
    first = runner.send(runner.one(note, 1))
    answer = runner.master.next_frame()
    assert answer.kind == Kind.INITIALIZED and messages.Initialized.unpack(answer.control).ok
    assert runner.collect(1) == {first: 1}
    assert ran == [100, 1]


@pytest.mark.parametrize("task", [fail, leave])
def test_an_initializer_that_fails(runner: Bench, task: Any) -> None:
    runner.master.link.send(Kind.INITIALIZE, messages.Initialize("").pack(), codec.encode((task, (5,)))[0])
    answer = runner.master.next_frame()
    assert answer.kind == Kind.INITIALIZED and not messages.Initialized.unpack(answer.control).ok
    assert failure_info(bytes(answer.body)).message == "5"


# -------------------------------------------------------------------------------------------------------------- journal


def test_the_journal_knows_what_runs_and_what_has_ended() -> None:
    """What the master reads when the worker is dead: the running call, and results that were never sent."""
    with bench() as runner:
        first = runner.send(runner.one(note, 5), runner.one(hold, 1), runner.one(note, 6))
        assert entered.wait(PATIENCE)
        assert runner.journal.started == first + 1
        records = list(messages.result_records(runner.journal.read_from(0)))
        assert [(sequence, status) for sequence, _, status, _, _ in records] == [(first, messages.VALUE)]
        gate.set()
        runner.collect(3)
        assert runner.journal.started == first + 2


def test_started_marks_follow_a_span() -> None:
    with bench() as runner:
        first = runner.send(runner.span(hold_at_three, [1, 2, 3, 4]))
        assert entered.wait(PATIENCE)
        assert runner.journal.started == first + 2
        gate.set()
        runner.collect(4)
        assert runner.journal.started == first + 3


def hold_at_three(number: int) -> int:
    return hold(number) if number == 3 else number


def test_more_results_than_the_journal_holds() -> None:
    with bench() as runner:
        size, count = 50_000, 60
        assert size * count > 4 * runner.journal.capacity
        first = runner.send(runner.span(lambda n: bytes([n]) * 50_000, list(range(count))))
        ended = runner.collect(count)
        assert all(ended[first + n] == bytes([n]) * size for n in range(count))


# --------------------------------------------------------------------------------------------------------------- recall


def test_recall_takes_listed_calls_that_have_not_started(runner: Bench) -> None:
    first = runner.send(runner.one(hold, 1), *[runner.one(note, n) for n in range(5)])
    assert entered.wait(PATIENCE)
    runner.recall(sequences=[first, first + 2, first + 4, 999])
    answer = runner.master.next_frame()
    recalled = messages.Recalled.unpack(answer.control)
    assert sorted(recalled.ranges) == [[first + 2, 1], [first + 4, 1]]
    assert sorted(recalled.asked) == [first, first + 2, first + 4, 999], "it answers for each"
    gate.set()
    assert set(runner.collect(4)) == {first, first + 1, first + 3, first + 5}
    assert ran == [1, 0, 2, 4]


def test_recall_takes_from_the_end(runner: Bench) -> None:
    first = runner.send(runner.one(hold, 1), runner.span(note, [1, 2, 3, 4]), runner.one(note, 9))
    assert entered.wait(PATIENCE)
    runner.recall(count=3)
    recalled = messages.Recalled.unpack(runner.master.next_frame().control)
    taken = {start + offset for start, count in recalled.ranges for offset in range(count)}
    assert taken == {first + 3, first + 4, first + 5}
    gate.set()
    assert set(runner.collect(3)) == {first, first + 1, first + 2}
    assert ran == [1, 1, 2]


def test_recall_cuts_a_span_that_runs(runner: Bench) -> None:
    first = runner.send(runner.span(hold_at_three, [1, 2, 3, 4, 5, 6]))
    assert entered.wait(PATIENCE)
    runner.recall(count=100)
    ended = runner.collect(5)  # two may still be on their way as results; what runs stays
    gate.set()
    while len(ended) < 6:
        ended.update(runner.collect(1))
    assert ended[first + 2] == 3
    assert [ended[first + offset] for offset in (4, 5)] == ["recalled"] * 2
    assert Counter(ran)[3] == 1


def test_recall_of_nothing(runner: Bench) -> None:
    runner.recall(count=5)
    assert messages.Recalled.unpack(runner.master.next_frame().control).ranges == []
    runner.recall(sequences=[1, 2])
    answer = messages.Recalled.unpack(runner.master.next_frame().control)
    assert answer.ranges == [] and answer.asked == [1, 2]


@pytest.mark.parametrize("seed", range(6))
def test_random_recalls_lose_nothing_and_run_nothing_twice(seed: int) -> None:
    """Spans and single calls, recalled at any moment: each element runs here once, or was given back, never both."""
    chance = random.Random(seed)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with bench(shared=bool(seed % 2)) as runner:
            numbers: dict[int, int] = {}
            for _ in range(40):
                records, start = [], runner.sequence
                for _ in range(chance.randint(1, 4)):
                    size = chance.choice([1, 1, 2, 10, 60])
                    items = [len(numbers) + offset for offset in range(size)]
                    numbers.update({start + offset: item for offset, item in enumerate(items)})
                    start += size
                    records.append(runner.one(spin, items[0]) if size == 1 else runner.span(spin, items))
                runner.send(*records)
                for _ in range(chance.randint(0, 3)):
                    if chance.random() < 0.7:
                        runner.recall(count=chance.choice([1, 2, 5, 40, 1000]))
                    else:
                        runner.recall(sequences=[chance.randint(1, runner.sequence) for _ in range(3)])
            ended = runner.collect(len(numbers))
            assert set(ended) == set(numbers)
            here = {numbers[sequence] for sequence, value in ended.items() if value != "recalled"}
            assert all(value == numbers[sequence] for sequence, value in ended.items() if value != "recalled")
            assert Counter(ran) == Counter(here)
    finally:
        sys.setswitchinterval(before)


def test_a_span_that_cannot_be_loaded_is_not_given_back_as_well(runner: Bench) -> None:
    """While its elements are being failed, none of them may be recalled: it would end twice."""
    size = 150
    for _ in range(5):
        runner.send(runner.record(note, b"\x80\x05nonsense", messages.SPAN_OF_SCALARS, size))
        for _ in range(20):
            runner.recall(count=7)
        assert len(runner.collect(size)) == size


# -------------------------------------------------------------------------------------------------------- blocked slots


def test_a_task_that_waits_gives_its_slot_away(runner: Bench) -> None:
    """What waits behind it, and what comes afterwards, is run by helpers meanwhile."""
    current = runner.runner

    def wait_for_others(number: int) -> str:
        with current.slot_given_away():
            assert gate.wait(PATIENCE)
        return threading.current_thread().name

    _local["wait"] = wait_for_others
    first = runner.send(runner.one(call_local, "wait", 1), runner.one(note, 1))
    frame = runner.master.next_frame()
    while frame.kind != Kind.BLOCKED:
        frame = runner.master.next_frame()
    assert messages.Blocked.unpack(frame.control).change == 1
    assert runner.collect(1) == {first + 1: 1}
    later = runner.send(runner.one(note, 2), runner.one(note, 3))
    assert runner.collect(2) == {later: 4, later + 1: 9}
    gate.set()
    assert first in runner.collect(1)
    until(lambda: not runner.runner.running, "all slots are free again")


def test_many_tasks_that_wait(runner: Bench) -> None:
    """A chain in which each task waits for the one behind it ends."""
    current = runner.runner
    depth = 12
    events = [threading.Event() for _ in range(depth + 1)]
    events[depth].set()

    def link(number: int) -> int:
        with current.slot_given_away():
            assert events[number + 1].wait(PATIENCE)
        events[number].set()
        return number

    _local["link"] = link
    first = runner.send(*[runner.one(call_local, "link", number) for number in range(depth)])
    assert runner.collect(depth) == {first + number: number for number in range(depth)}
    last = runner.send(*[runner.one(note, number) for number in range(20)])
    assert len(runner.collect(20)) == 20 and last


def test_what_stands_behind_a_waiting_element_of_its_own_record_runs(runner: Bench) -> None:
    """Calls that came in one record may wait for each other, as those that came in several."""
    current = runner.runner
    others = threading.Event()

    def wait_for_the_last(number: int) -> int:
        if number == 2:
            others.set()
        else:
            with current.slot_given_away():
                assert others.wait(PATIENCE)
        return number

    _local["chain"] = wait_for_the_last
    payload = codec.encode([("chain", number) for number in range(3)])[0]
    first = runner.send(runner.record(call_local, payload, messages.SPAN, 3), runner.one(note, 5))
    assert runner.collect(4) == {first: 0, first + 1: 1, first + 2: 2, first + 3: 25}


@pytest.mark.parametrize("running", [False, True])
def test_calls_are_taken_out_of_the_middle_of_a_record(runner: Bench, running: bool) -> None:
    before = 0 if running else 1
    records = [runner.span(hold, [0, 1, 2, 3, 4, 5])]
    first = runner.send(*([] if running else [runner.one(hold, 9)]), *records) + before
    assert entered.wait(PATIENCE)
    asked = [first, first + 2, first + 4, first + 99] if not running else [first, first + 2, first + 4, first - 7]
    runner.recall(sequences=asked)
    frame = runner.master.next_frame()
    message = messages.Recalled.unpack(frame.control)
    given = {start + offset for start, count in message.ranges for offset in range(count)}
    assert given == ({first + 2, first + 4} if running else {first, first + 2, first + 4}), (
        "what runs is not given back"
    )
    runner.recall(sequences=asked)
    assert messages.Recalled.unpack(runner.master.next_frame().control).ranges == [], "only once"
    runner.recall(count=2)
    ranges = messages.Recalled.unpack(runner.master.next_frame().control).ranges
    assert ranges == [[first + 5, 1]], "what was taken before is not given back again"
    gate.set()
    here = set(range(6)) - {5} - {sequence - first for sequence in given}
    assert {s: v for s, v in runner.collect(len(here) + before).items() if s >= first} == {first + n: n for n in here}
    assert sorted(ran) == sorted([*here, *([] if running else [9])])


_local: dict[str, Any] = {}


def call_local(name: str, *args: Any) -> Any:
    return _local[name](*args)


def test_where_nobody_sees_the_journal_a_result_is_out_before_the_next_call() -> None:
    """Left in the link's queue it would go with this process, and the master would take it for the call that died."""
    with bench(shared=False) as made:
        link = made.worker.link
        assert link._write_lock.acquire(timeout=PATIENCE)  # as another thread that sends at this moment
        try:
            first = made.send(made.one(note, 2), made.one(note, 3))
            until(lambda: link._drainers, "the worker waits until its result is out")
            assert ran == [2]
        finally:
            link._write_lock.release()
        link._pump()
        assert made.collect(2) == {first: 4, first + 1: 9}


# ----------------------------------------------------------------------------------------------------- revoked calls


class RevokesAtOnce:
    """A journal in which the master revokes a call just when the worker has marked it as started."""

    def __init__(self, journal: Any, number: int) -> None:
        self._journal = journal
        self._number = number
        self.marks: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journal, name)

    def set_started(self, number: int) -> None:
        self.marks.append(number)
        self._journal.set_started(number)
        if number == self._number:
            self._journal.revoke(number, number + 5)


def test_a_call_that_is_revoked_just_when_it_was_marked_has_not_run_if_the_worker_dies(runner: Bench) -> None:
    """What the journal says then: the mark is taken back, once, and the call is held until the RECALL comes."""
    first = runner.sequence
    spy: Any = RevokesAtOnce(runner.journal, first + 1)
    runner.runner.journal = spy
    runner.send(runner.one(note, 1), runner.one(note, 2), runner.one(note, 3))
    assert runner.collect(1) == {first: 1}
    until(lambda: len(spy.marks) == 3, "the mark is taken back")
    assert spy.marks == [first, first + 1, first]
    runner.recall(count=10)
    assert runner.collect(2) == {first + 1: "recalled", first + 2: "recalled"}
    assert ran == [1] and runner.journal.started == first and len(spy.marks) == 3


revoking: list[tuple[Bench, int, int]] = []


def revoke_those_behind(number: int) -> int:
    ran.append(number)
    if number == 2:
        bench, first, last = revoking.pop()
        bench.journal.revoke(first, last)
    return number


def test_an_element_of_a_span_that_is_revoked(runner: Bench) -> None:
    first = runner.sequence
    revoking.append((runner, first + 2, first + 9))
    runner.send(runner.span(revoke_those_behind, [1, 2, 3, 4]))
    assert runner.collect(4) == {first: 1, first + 1: 2, first + 2: "recalled", first + 3: "recalled"}
    assert ran == [1, 2] and runner.journal.started == first + 1
    runner.recall(count=10)  # which comes too late
    assert messages.Recalled.unpack(runner.master.next_frame().control) == messages.Recalled([], [])
    runner.sequence = first + 10
    last = runner.send(runner.one(note, 5))
    assert runner.collect(1) == {last: 25}, "nothing stands in its way"


class PassedOver:
    """A journal; a RECALL of everything is answered when element `number` has begun and was not marked yet."""

    def __init__(self, bench: Bench, number: int) -> None:
        self._bench = bench
        self._journal = bench.journal
        self._number = number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journal, name)

    def revoked(self, number: int) -> bool:
        if number == self._number:
            self._number = -1
            self._bench.runner.on_recall(Frame(Kind.RECALL, messages.Recall(1 << 40, []).pack(), b"", []))
        return self._journal.revoked(number)


def test_an_element_that_a_recall_has_passed_over_is_given_back_as_well(runner: Bench) -> None:
    first = runner.sequence
    spy: Any = PassedOver(runner, first + 2)
    runner.runner.journal = spy
    revoking.append((runner, first + 2, first + 9))
    runner.send(runner.span(revoke_those_behind, [1, 2, 3, 4]))
    assert runner.collect(4) == {first: 1, first + 1: 2, first + 2: "recalled", first + 3: "recalled"}
    runner.sequence = first + 10
    last = runner.send(runner.one(note, 5))
    assert runner.collect(1) == {last: 25} and ran == [1, 2, 5]


def test_results_stay_in_the_journal_until_the_kernel_has_them() -> None:
    """The master does not read; when the worker is killed now, it finds all that was finished in socket and journal."""
    with bench() as made:
        link, journal = made.worker.link, made.journal
        assert link._write_lock.acquire(timeout=PATIENCE)  # nothing gets out
        try:
            size, count = 10_000, 100
            assert size * count > 3 * journal.capacity
            first = made.send(*(made.one(make_bytes, number) for number in range(count)))
            until(lambda: link._drainers, "the worker waits until the journal has room")
            records = [record[0] for record in messages.result_records(journal.read_from(0))]
            assert records == list(range(first, journal.started)), "all but the one that waits for room"
            assert 1 < len(ran) < count / 2
        finally:
            link._write_lock.release()
            link._pump()
        assert made.collect(count) == {first + number: bytes([number]) * size for number in range(count)}


def make_bytes(number: int) -> bytes:
    ran.append(number)
    return bytes([number]) * 10_000
