"""Records of many calls: what can be taken back of one at which moment, and the loop that runs them."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from distpool import config
from distpool.node.spans import Item, run_span
from distpool.wire.messages import CHUNK, ONE, SPAN, SPAN_OF_SCALARS

FIRST = 100


def span(elements: int, flags: int = SPAN_OF_SCALARS) -> Item:
    item = Item(FIRST, 7, elements, flags, b"", [])
    item.arguments = [(number,) for number in range(elements)] if flags == SPAN else list(range(elements))
    return item


# -- taking back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index, keep, kept",
    [(0, 4, 4), (0, 0, 1), (3, 2, 4), (3, 4, 4), (9, 0, 10), (10, 0, 10)],
    ids=["not begun", "the running one stays", "begun stay", "just behind", "the last one runs", "all are through"],
)
def test_a_cut_keeps_what_has_begun(index: int, keep: int, kept: int) -> None:
    item = span(10)
    item.index = index
    assert item.cut(keep) == item.stop == kept


def test_a_second_cut_brings_nothing_back() -> None:
    item = span(10)
    assert item.cut(3) == 3
    item.index = 5  # the loop has looked at `stop` before the first cut: it sees it now
    assert item.cut(1) == 3, "what was recalled before is not this record's any more"


def test_one_element_is_dropped_once_and_not_while_it_runs() -> None:
    item = span(10)
    item.index = 3
    assert not item.drop(3, running=True) and not item.drop(2, running=True)
    assert item.dropped == frozenset(), "nothing is left of an attempt in vain"
    assert item.drop(4, running=True) and not item.drop(4, running=True)
    item.index = 0
    assert item.drop(0, running=False), "it waits in the inbox: nothing of it has begun"
    assert item.dropped == {0, 4}


def test_ranges_leave_out_what_was_dropped() -> None:
    item = span(10)
    assert item.ranges(2, 6) == [[FIRST + 2, 4]]
    for element in (3, 4, 7):
        item.drop(element, running=False)
    assert item.ranges(2, 9) == [[FIRST + 2, 1], [FIRST + 5, 2], [FIRST + 8, 1]]
    assert item.ranges(3, 5) == [], "all of them"


def test_the_rest_of_a_running_span_is_a_record_for_others() -> None:
    item = span(6, SPAN)
    item.index = 1
    item.drop(3, running=True)
    rest = item.rest()
    assert rest is not None
    assert (rest.sequence, rest.number, rest.elements, rest.flags) == (FIRST + 2, 7, 4, SPAN)
    assert rest.arguments == [(2,), (3,), (4,), (5,)] and rest.dropped == {1}
    assert item.stop == 2 and item.rest() is None, "given away once"


@pytest.mark.parametrize("flags", [ONE, CHUNK])
def test_what_succeeds_or_fails_as_one_has_no_rest(flags: int) -> None:
    assert span(6, flags).rest() is None


def test_a_span_that_was_not_rebuilt_has_no_rest() -> None:
    item = span(6)
    item.arguments = None
    assert item.rest() is None and item.stop == 6


# -- the loop ------------------------------------------------------------------------------------------------------


class Runner:
    """As much of a `TaskRunner` as the loop sees."""

    def __init__(self) -> None:
        self.results: Any = SimpleNamespace(
            number=lambda sequence, value: self.told.append((sequence, "number", value)),
            returned=lambda sequence, value, function: self.told.append((sequence, "value", value)),
            fail=lambda sequence, error: self.told.append((sequence, "error", error)),
            flush=self.flush,
            flushed=0.0,
            busy=0.0,
            ran=0,
        )
        self.told: list[tuple[int, str, Any]] = []
        self.flushes: list[int] = []  # how many calls had been counted
        self.given: list[tuple[Item, int]] = []
        self.marks: list[int] = []
        self.beside: list[int] = []
        self.lock = threading.Lock()
        self.helpers = 0
        self.started = 0
        self.journal: Any = SimpleNamespace(words=[0] * 16, revoked=lambda number: number >= self.journal.words[8])
        self.interrupts: Any = SimpleNamespace(main=False, call_beside=self.call_beside)

    def flush(self) -> None:
        self.flushes.append(self.results.ran)

    def mark_started(self, sequence: int) -> None:
        assert self.lock.locked()
        self.marks.append(sequence)

    def give_back(self, item: Item, index: int) -> None:
        self.given.append((item, index))

    def call_beside(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.beside.append(threading.get_ident())
        return function(*args, **kwargs)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(config, "SPAN_FLUSH_SECONDS", float("inf"))
    return Runner()


def run(runner: Runner, item: Item, function: Any) -> list[tuple[int, Any]]:
    run_span(runner, item, function, 0.0)  # type: ignore[arg-type]
    assert not runner.interrupts.main, "nothing is to be interrupted behind the last call"
    return [(sequence - FIRST, value) for sequence, _, value in runner.told]


def test_each_element_is_marked_run_and_counted(runner: Runner) -> None:
    marks: list[int] = []

    def square(number: int) -> int:
        assert runner.interrupts.main and item.index == number
        marks.append(runner.journal.words[0])
        return number * number

    item = span(4)
    assert run(runner, item, square) == [(0, 0), (1, 1), (2, 4), (3, 9)]
    assert marks == [FIRST, FIRST + 1, FIRST + 2, FIRST + 3] and runner.started == FIRST + 3
    assert runner.results.ran == 4 and runner.results.busy > 0.0 and item.index == 4


def test_argument_tuples_and_kinds_of_results(runner: Runner) -> None:
    item = span(3, SPAN)
    item.arguments = [(2, 3), ([1],), ()]
    run(runner, item, lambda *args: args[0] if args else None)
    assert runner.told == [(FIRST, "number", 2), (FIRST + 1, "value", [1]), (FIRST + 2, "value", None)]


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt()], ids=lambda error: repr(error))
def test_an_error_is_the_outcome_of_its_element_alone(runner: Runner, error: BaseException) -> None:
    def fail(number: int) -> int:
        if number == 1:
            raise error
        return number

    assert run(runner, span(3), fail) == [(0, 0), (1, error), (2, 2)]
    assert runner.told[1][1] == "error" and runner.results.ran == 3


def test_what_is_dropped_or_cut_meanwhile_does_not_run(runner: Runner) -> None:
    def take_back(number: int) -> int:
        if number == 1:
            assert item.drop(2, True) and item.drop(5, True) and item.cut(7) == 7
        return number

    item = span(10)
    assert [element for element, _ in run(runner, item, take_back)] == [0, 1, 3, 4, 6]
    assert runner.results.ran == 5


def test_a_leader_that_takes_its_cut_back_does_not_stop_the_loop(runner: Runner) -> None:
    """It stores `stop`, sees that the element may have begun, and restores it: the loop asks again under the lock."""

    class Lock:
        def __enter__(self) -> None:
            item.stop = 3

        def __exit__(self, *args: object) -> None:
            pass

    def cut_for_a_moment(number: int) -> int:
        if number == 0:
            item.stop = 1
        return number

    item = span(3)
    runner.lock = Lock()  # type: ignore[assignment]
    assert [element for element, _ in run(runner, item, cut_for_a_moment)] == [0, 1, 2]


def test_revoked_elements_are_given_back(runner: Runner) -> None:
    def revoke(number: int) -> int:
        if number == 1:
            runner.journal.words[8:10] = [FIRST + 2, FIRST + 9]
        return number

    item = span(10)
    assert [element for element, _ in run(runner, item, revoke)] == [0, 1]
    assert runner.given == [(item, 2)]


def test_marks_take_the_lock_while_helpers_mark_too(runner: Runner) -> None:
    runner.helpers = 1
    run(runner, span(2), abs)
    assert runner.marks == [FIRST, FIRST + 1] and runner.journal.words[0] == 0


def test_results_are_sent_while_it_runs(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SPAN_FLUSH_SECONDS", 0.0)
    run(runner, span(3), abs)
    assert runner.flushes == [1, 2, 3], "counted before they are sent"


def test_on_other_threads_each_call_is_announced(runner: Runner) -> None:
    thread = threading.Thread(target=lambda: run(runner, span(3), abs))
    thread.start()
    thread.join(30)
    assert runner.beside == [thread.ident] * 3 and [entry[2] for entry in runner.told] == [0, 1, 2]


def test_nothing_of_a_call_is_alive_when_the_next_one_runs(runner: Runner) -> None:
    """Arguments in the frames of an error, and values: in a task's memory there may be room for one only."""

    class Big:
        pass

    alive: list[Any] = []

    def call(number: int) -> Any:
        assert [reference() for reference in alive] == [None] * number
        big = Big()
        alive.append(weakref.ref(big))
        if number % 2:
            raise ValueError(number)
        return big

    runner.results.fail = lambda sequence, error: runner.told.append((sequence, "error", str(error)))
    runner.results.returned = lambda sequence, value, function: runner.told.append((sequence, "value", None))
    assert run(runner, span(4), call) == [(0, None), (1, "1"), (2, None), (3, "3")]
