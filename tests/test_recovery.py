"""What becomes of a failed element of a map: hooks in their order, delays for each element, and the back-off."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from distpool.recovery import Again, Ended, ExponentialBackOff, Given, Recovery


def throw(error: BaseException) -> Any:
    raise error


def delays_of(recovery: Recovery, index: int = 0) -> list[float]:
    """The delays that element `index` gets until it has failed for good."""
    found: list[float] = []
    while type(outcome := recovery.decide(index, OSError("x"), True)) is Again:
        found.append(outcome.delay)
    assert type(outcome) is Ended
    return found


def test_without_hooks_an_error_is_the_end() -> None:
    error = OSError("x")
    recovery = Recovery()
    assert recovery.decide(0, error, True) == Ended(error)
    assert not recovery.may_retry


def test_a_value_of_on_error_takes_the_place_and_nothing_is_retried() -> None:
    asked: list[BaseException] = []

    def hook(error: BaseException) -> None:
        asked.append(error)

    error = OSError("x")
    recovery = Recovery(hook, [0, 0])
    assert recovery.decide(0, error, True) == Given(None)
    assert asked == [error]


def test_the_error_that_on_error_raises_is_the_one_that_is_judged() -> None:
    original, raised = OSError("x"), KeyError("y")
    recovery = Recovery(lambda error: throw(raised), [7], KeyError)
    assert recovery.decide(0, original, True) == Again(7.0)
    assert recovery.decide(0, original, True) == Ended(raised)
    assert Recovery(lambda error: throw(raised), [7], OSError).decide(0, original, True) == Ended(raised)


@pytest.mark.parametrize("where", ["on_error", "retry_check"])
def test_an_interrupt_in_a_hook_leaves(where: str) -> None:
    hooks: dict[str, Any] = {where: lambda error: throw(KeyboardInterrupt())}
    with pytest.raises(KeyboardInterrupt):
        Recovery(**hooks, retry_delays=[0]).decide(0, OSError("x"), True)


def test_an_error_of_the_check_or_of_the_delays_counts() -> None:
    raised = KeyError("y")
    assert Recovery(None, [0], lambda error: throw(raised)).decide(0, OSError("x"), True) == Ended(raised)

    def broken() -> Iterator[float]:
        yield 0.5
        raise raised

    recovery = Recovery(None, broken())
    assert recovery.decide(0, OSError("x"), True) == Again(0.5)
    assert recovery.decide(0, OSError("x"), True) == Ended(raised)
    recovery = Recovery(None, iter(["soon"]))  # type: ignore[list-item]  # known when it is taken only
    outcome = recovery.decide(0, OSError("x"), True)
    assert type(outcome) is Ended and type(outcome.error) is TypeError


@pytest.mark.parametrize(
    ("check", "error", "retried"),
    [
        (None, OSError(), True),
        (None, SystemExit(), False),
        (OSError, FileNotFoundError(), True),
        (OSError, KeyError(), False),
        ((OSError, KeyError), KeyError(), True),
        ((), OSError(), False),
        (SystemExit, SystemExit(), True),
        (lambda error: "yes", OSError(), True),
        (lambda error: 0, OSError(), False),
    ],
)
def test_what_is_retried(check: Any, error: BaseException, retried: bool) -> None:
    outcome = Recovery(None, [1], check).decide(0, error, True)
    assert outcome == (Again(1.0) if retried else Ended(error))


def test_nothing_is_retried_where_nothing_can_run() -> None:
    error = OSError("x")
    asked: list[BaseException] = []
    recovery = Recovery(None, [1, 2], lambda each: asked.append(each) or True)
    assert recovery.decide(0, error, False) == Ended(error)
    assert not asked
    assert delays_of(recovery) == [1.0, 2.0]


@pytest.mark.parametrize("make", [list, tuple, iter, lambda items: (item for item in items)])
def test_each_element_has_all_delays(make: Any) -> None:
    recovery = Recovery(None, make([1, 2.5]))
    assert recovery.may_retry
    assert recovery.decide(1, OSError(), True) == Again(1.0)  # in the middle of its own
    assert delays_of(recovery, 0) == [1.0, 2.5]
    assert delays_of(recovery, 1) == [2.5]


def test_an_endless_iterator_is_taken_as_it_is_needed() -> None:
    taken: list[int] = []
    recovery = Recovery(None, (taken.append(n) or float(n) for n in itertools.count()))
    for index in (0, 1):
        assert [recovery.decide(index, OSError(), True) for _ in range(3)] == [Again(0.0), Again(1.0), Again(2.0)]
    assert taken == [0, 1, 2]


def test_what_ended_well_begins_again() -> None:
    recovery = Recovery(None, [1])
    assert recovery.decide(0, OSError(), True) == Again(1.0)
    recovery.forget(0)
    assert delays_of(recovery, 0) == [1.0]
    recovery.forget(5)  # never failed


def test_delays_may_be_empty_or_unknown() -> None:
    assert not Recovery(None, ()).may_retry
    assert not Recovery(None, ExponentialBackOff(0)).may_retry
    assert Recovery(None, iter(())).may_retry  # nobody can know yet
    assert delays_of(Recovery(None, iter(()))) == []
    assert delays_of(Recovery(None, ExponentialBackOff(2, 1, 9, 2, 0))) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"on_error": 3}, TypeError, "on_error"),
        ({"retry_check": 3}, TypeError, "retry_check"),
        ({"retry_check": int}, TypeError, "retry_check"),
        ({"retry_check": (OSError, "x")}, TypeError, "retry_check"),
        ({"retry_delays": 3}, TypeError, "iterable of seconds"),
        ({"retry_delays": ["soon"]}, TypeError, "numbers of seconds"),
        ({"retry_delays": [-1]}, ValueError, "non-negative"),
        ({"retry_delays": (float("nan"),)}, ValueError, "finite"),
        ({"retry_delays": [float("inf")]}, ValueError, "finite"),
    ],
)
def test_bad_hooks_are_refused_at_once(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Recovery(**options)


def test_a_retry_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "distpool"):
        Recovery(None, [1]).decide(3, OSError("no room"), True)
    assert "element 3" in caplog.text and "OSError: no room" in caplog.text


# -- ExponentialBackOff ------------------------------------------------------------------------------------------------


def test_back_off() -> None:
    delays = ExponentialBackOff(6, first_delay=1.0, max_delay=60.0, factor=2.0, jitter=0.1)
    first, second = list(delays), list(delays)
    assert len(delays) == len(first) == 6
    assert first[0] == 1.0
    assert all(1.8 * a <= b <= 2.2 * a for a, b in itertools.pairwise(first))
    assert first != second  # drawn anew
    assert list(ExponentialBackOff(4, 1, 3, 2, 0)) == [1, 2, 3, 3]
    assert list(ExponentialBackOff(2, first_delay=5, max_delay=1)) == [1, 1]
    assert list(ExponentialBackOff(0)) == []
    assert list(ExponentialBackOff(1)) == [0.05]
    assert "3" in repr(ExponentialBackOff(3))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"n": -1}, ValueError),
        ({"n": 1, "first_delay": -1}, ValueError),
        ({"n": 1, "max_delay": -1}, ValueError),
        ({"n": 1, "factor": -1}, ValueError),
        ({"n": 1, "jitter": -0.1}, ValueError),
        ({"n": 1, "jitter": 1.5}, ValueError),
        ({"n": 1, "factor": float("nan")}, ValueError),
        ({"n": 1.5}, TypeError),
        ({"n": "3"}, TypeError),
        ({"n": 1, "factor": "2"}, TypeError),
    ],
)
def test_back_off_checks(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        ExponentialBackOff(**arguments)
