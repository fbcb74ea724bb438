"""The loop behind `pmap` and `pgenerate`, with a carrier that the test plays: order, look-ahead, retries, the end."""

from __future__ import annotations

import collections
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distpool.ordered import OrderedMap
from distpool.recovery import Recovery
from distpool.refs.refs import LOCAL_VALUE, Outcome
from distpool.wire import codec


class Fake:
    """A carrier whose elements end when the map waits (`plan`), or when the test says so."""

    def __init__(self, ahead: int = 4, plan: Callable[[int, Any], Any] | None = None) -> None:
        self.results: dict[int, Any] = {}
        self.failed: collections.deque[tuple[int, Any]] = collections.deque()
        self.fed = 0
        self.usable = True
        self.most = ahead
        self.first = 0  # which of those that run ends first
        self.plan = plan
        self.running: list[tuple[int, Any]] = []
        self.batches: list[int] = []
        self.ends: list[str] = []
        self.deadlines: list[float | None] = []

    def feed(self, arguments: list[Any]) -> None:
        self.batches.append(len(arguments))
        for argument in arguments:
            self.running.append((self.fed, argument))
            self.fed += 1

    def again(self, index: int, argument: Any) -> None:
        self.running.append((index, argument))

    def open(self, raw: Any) -> tuple[Any, BaseException | None]:
        return (None, raw) if isinstance(raw, BaseException) else (raw, None)

    def ahead(self, at_hand: bool) -> int:
        return self.most

    def wait_until(self, until: Callable[[], bool], deadline: float | None) -> None:
        self.deadlines.append(deadline)
        if not self.running:
            assert deadline is not None, "nobody will ever wake it"
            return
        self.finish(self.first)

    def finish(self, position: int = 0) -> None:
        """An element ends as planned."""
        assert self.plan is not None
        index, argument = self.running.pop(position)
        value = self.plan(index, argument)
        if isinstance(value, BaseException):
            self.failed.append((index, value))
        else:
            self.results[index] = value

    def close(self) -> None:
        self.ends.append("close")

    def abandon(self) -> None:
        self.ends.append("abandon")


def ordered(carrier: Fake, source: Any, recovery: Recovery | None = None, **options: Any) -> OrderedMap:
    options = {"at_hand": False, "batch": 1, "eager_errors": True, **options}
    return OrderedMap(carrier, iter(source), recovery or Recovery(), **options)


def drain(made: OrderedMap, one: bool = False) -> list[Any]:
    values: list[Any] = []
    while made.advance():
        values += made.take_one() if one else made.take()
    return values


def square(index: int, argument: int) -> int:
    return argument * argument


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("at_hand", [False, True])
@pytest.mark.parametrize("position", [0, -1])
def test_values_come_in_order_whatever_ends_first(one: bool, at_hand: bool, position: int) -> None:
    carrier = Fake(plan=square)
    carrier.first = position
    made = ordered(carrier, range(30), at_hand=at_hand)
    assert drain(made, one) == [number * number for number in range(30)]
    assert made.finished == 30 and carrier.ends == ["close"] and not made.advance()


def test_values_of_every_kind() -> None:
    def plan(index: int, argument: Any) -> Any:
        return [codec.encode(argument)[0], Outcome(LOCAL_VALUE, argument, (), 1), ("carrier", argument)][index % 3]

    carrier = Fake(plan=plan)
    made = ordered(carrier, range(6))
    assert drain(made) == [0, 1, ("carrier", 2), 3, 4, ("carrier", 5)]


def test_takes_no_more_than_the_look_ahead() -> None:
    taken: list[int] = []
    carrier = Fake(ahead=4, plan=square)
    made = ordered(carrier, (taken.append(n) or n for n in itertools.count()))
    assert not taken
    for delivered in range(20):
        assert made.advance()
        made.take_one()
        assert len(taken) <= delivered + 1 + 4


class Stuck(Exception):
    """The map waits for its first element, which does not end."""


@pytest.mark.parametrize("at_hand", [False, True])
def test_undelivered_elements_count_unless_nobody_can_see_them_taken(at_hand: bool) -> None:
    carrier = Fake(ahead=4, plan=square)
    made = ordered(carrier, iter(range(40)), at_hand=at_hand)

    def wait(until: Callable[[], bool], deadline: float | None) -> None:
        if len(carrier.running) == 1:
            raise Stuck
        carrier.finish(-1)

    carrier.wait_until = wait  # type: ignore[method-assign]
    with pytest.raises(Stuck):
        made.advance()
    assert carrier.fed == (40 if at_hand else 4)


def test_whole_batches_and_the_rest_at_the_end() -> None:
    carrier = Fake(ahead=6, plan=square)
    assert drain(ordered(carrier, range(10), at_hand=True, batch=4)) == [n * n for n in range(10)]
    assert carrier.batches == [4, 4, 2]


def test_an_error_is_raised_at_once_or_at_its_turn() -> None:
    def plan(index: int, argument: int) -> Any:
        return ValueError(index) if argument == 2 else argument

    carrier = Fake(ahead=4, plan=plan)
    carrier.running.clear()
    made = ordered(carrier, range(100))
    made._take()
    carrier.finish(2)
    with pytest.raises(ValueError, match="2"):
        made.advance()
    assert carrier.ends == ["close"] and not made.advance()

    carrier = Fake(ahead=4, plan=plan)
    made = ordered(carrier, range(100), eager_errors=False)
    made._take()
    carrier.finish(2)
    values: list[int] = []
    with pytest.raises(ValueError, match="2"):
        while made.advance():
            values += made.take_one()
    assert values == [0, 1] and carrier.fed == 4  # nothing new was started after it


def test_on_error_gives_a_value_in_its_place() -> None:
    carrier = Fake(plan=lambda index, argument: OSError(argument) if argument % 2 else argument)
    recovery = Recovery(lambda error: f"no {error}")
    assert drain(ordered(carrier, range(4), recovery)) == [0, "no 1", 2, "no 3"]


def test_a_retry_waits_for_its_time_and_holds_up_nobody() -> None:
    failures = {1: 2}

    def plan(index: int, argument: int) -> Any:
        if failures.get(argument, 0):
            failures[argument] -= 1
            return OSError(argument)
        return argument

    carrier = Fake(ahead=8, plan=plan)
    made = ordered(carrier, range(5), Recovery(None, [0.02, 0.0]))
    begin = time.monotonic()
    made._take()
    while carrier.running:
        carrier.finish()
    assert made.advance() and made.take() == [0]
    assert made.finished == 4  # all but the one that waits
    assert drain(made) == [1, 2, 3, 4]
    assert time.monotonic() - begin >= 0.02 and any(deadline is not None for deadline in carrier.deadlines)
    assert not made._arguments and not made._recovery._left  # nothing is kept of what has ended


def test_retries_are_used_up() -> None:
    carrier = Fake(plan=lambda index, argument: OSError(argument))
    with pytest.raises(OSError):
        drain(ordered(carrier, [7], Recovery(None, [0, 0])))
    assert not carrier.running


def test_nothing_is_retried_where_nothing_can_run() -> None:
    carrier = Fake(plan=lambda index, argument: OSError(argument))
    carrier.usable = False
    with pytest.raises(OSError):
        drain(ordered(carrier, [7], Recovery(None, [0] * 100)))


def test_a_value_that_cannot_be_rebuilt_is_that_elements_failure() -> None:
    tried: list[int] = []

    def plan(index: int, argument: int) -> Any:
        tried.append(argument)
        return b"no pickle" if tried.count(1) == 1 and argument == 1 else codec.encode(argument)[0]

    carrier = Fake(plan=plan)
    assert drain(ordered(carrier, range(3), Recovery(None, [0]))) == [0, 1, 2]
    assert tried.count(1) == 2


@pytest.mark.parametrize("at_hand", [False, True])
def test_an_error_of_the_input_comes_after_the_results(at_hand: bool) -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise ZeroDivisionError("input")

    carrier = Fake(plan=square)
    made = ordered(carrier, source())
    values: list[int] = []
    with pytest.raises(ZeroDivisionError, match="input"):
        while made.advance():
            values += made.take()
    assert values == [0, 1, 4] and carrier.ends == ["close"]
    assert not made.advance()  # once


def test_an_interrupt_in_the_input_leaves_and_nothing_is_lost() -> None:
    class Source:
        """As an iterator that can go on after an interrupt."""

        def __init__(self) -> None:
            self.items = iter([0, KeyboardInterrupt(), 1])

        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            item = next(self.items)
            if isinstance(item, BaseException):
                raise item
            return item

    carrier = Fake(plan=square)
    made = ordered(carrier, Source())
    with pytest.raises(KeyboardInterrupt):
        made.advance()
    assert drain(made) == [0, 1]


def test_a_slow_input_does_not_keep_results() -> None:
    carrier = Fake(ahead=8, plan=square)
    taken: list[int] = []

    def slow() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            until = time.monotonic() + 0.002
            while time.monotonic() < until:
                pass
            yield number

    feed = carrier.feed
    carrier.feed = lambda arguments: (feed(arguments), carrier.finish())[0]  # type: ignore[method-assign]
    made = ordered(carrier, slow())
    assert made.advance() and made.take() == [0, 1]
    assert len(taken) == 2  # one more while the result was there


def test_an_empty_input() -> None:
    carrier = Fake()
    assert drain(ordered(carrier, ())) == [] and carrier.batches == []


def test_closing_twice_and_dropping() -> None:
    carrier = Fake(plan=square)
    made = ordered(carrier, range(9))
    assert made.advance()
    made.close()
    made.close()
    assert carrier.ends == ["close"] and not made.advance()
    carrier = Fake(plan=square)
    made = ordered(carrier, range(9))
    assert made.advance()
    del made
    gc.collect()
    assert carrier.ends == ["abandon"]


def test_the_end_of_a_map_enters_no_finalizer() -> None:
    """Ctrl-C that strikes there would be lost."""
    made = ordered(Fake(plan=square), range(2))
    while made.advance():
        made.take()
    assert not hasattr(made, "__del__") and not hasattr(made._dropped, "__del__")


def test_a_look_ahead_that_shrinks_takes_nothing_for_a_moment() -> None:
    """That of "auto" batches does when their time is measured, in between two looks: it was taken for an error of the
    input."""

    class Shrinking(Fake):
        looks = 0

        def ahead(self, at_hand: bool) -> int:
            self.looks += 1
            return {3: 200, 4: 1}.get(self.looks, 64)

    carrier = Shrinking(plan=lambda index, argument: Outcome(LOCAL_VALUE, argument, (), 2))
    ordered = OrderedMap(carrier, iter(range(500)), Recovery(), at_hand=True, batch=1, eager_errors=True)
    values: list[Any] = []
    while ordered.advance():
        values += ordered.take()
    assert values == list(range(500))
