"""Rows F4, F5, F6: what cannot be pickled, loaded or rebuilt costs the call concerned, and no worker."""

from __future__ import annotations

import multiprocessing.pool
import threading
from collections.abc import Callable, Iterator

import pytest

import distpool

from . import helpers
from .helpers import STRANGE, UNPICKLABLE, FailsToLoad, at_most
from .runners import Runner, assert_squares, full_text

unpicklable = pytest.mark.parametrize("which", UNPICKLABLE)
NAMED = {
    "lock": "lock",
    "generator": "generator",
    "RefusesToPickle": "RefusesToPickle",
    "LeavesWhilePickled": "LeavesWhilePickled",
    "nested list": "list",
    "lock in a list": "lock",
}
"""Word by which the error names the thing."""


@pytest.fixture
def same_worker(make_runner: Callable[..., Runner]) -> Iterator[Runner]:
    """One worker, which must be the same process at the end, and serve."""
    runner = make_runner(1)
    before = runner.ospids()
    yield runner
    assert runner.submit(helpers.square, 12).value() == 144
    assert runner.submit(lambda: "by value").value() == "by value"
    assert runner.ospids() == before


# ------------------------------------------------------------------------------------------------------------------- F4


@pytest.mark.parametrize("which", STRANGE)
def test_strange_exception(same_worker: Runner, which: str) -> None:
    """The error names the class and carries the remote traceback."""
    calls = [same_worker.submit(helpers.square_or_raise, number, 3, which) for number in range(8)]
    assert_squares(calls[:3])
    with at_most(0.5, "a strange exception"):
        error = calls[3].error()
        assert_squares(calls, but=3)
    text = full_text(error)
    assert which.split()[0] in text
    assert "Traceback (most recent call last)" in text
    assert "in raise_strange" in text


def test_exception_of_a_class_by_value(same_worker: Runner) -> None:
    """An exception class of the test function itself, with state of its own, keeps type and state."""

    class Local(Exception):
        def __init__(self, number: int, *, unit: str) -> None:
            super().__init__(f"{number} {unit}")
            self.number, self.unit = number, unit

    def act() -> None:
        raise Local(3, unit="m")

    with at_most(0.5, "an exception by value"):
        error = same_worker.submit(act).error()
    assert "Local" in full_text(error)
    assert "in act" in full_text(error)


def test_strange_exceptions_in_one_map(same_worker: Runner) -> None:
    """Several in a row, as a batch would carry them."""
    names = list(STRANGE)
    calls = [same_worker.submit(helpers.raise_strange, name) for name in names * 3]
    for name, call in zip(names * 3, calls, strict=True):
        assert name.split()[0] in full_text(call.error())


def test_strange_exception_ends_a_pmap(same_worker: Runner) -> None:
    def act(number: int) -> int:
        return helpers.square_or_raise(number, 5, "TwoArguments")

    with pytest.raises(Exception) as caught:
        same_worker.raw.pmap(act, range(10))
    assert "TwoArguments" in full_text(caught.value)


# ------------------------------------------------------------------------------------------------------------------- F5


@unpicklable
def test_argument_that_cannot_be_pickled(same_worker: Runner, which: str) -> None:
    """Not an error of `submit`, but of that future."""
    calls = [same_worker.submit(helpers.square, number) for number in range(3)]
    with at_most(0.5, "an unpicklable argument"):
        bad = same_worker.submit(helpers.identity, helpers.make_unpicklable(which))
        calls += [same_worker.submit(helpers.square, number) for number in range(3, 8)]
        error = bad.error()
        assert_squares(calls)
    assert isinstance(error, distpool.SerializationError)
    assert NAMED[which] in str(error)


@unpicklable
def test_keyword_that_cannot_be_pickled(same_worker: Runner, which: str) -> None:
    bad = same_worker.submit(helpers.identity, value=helpers.make_unpicklable(which))
    assert isinstance(bad.error(), distpool.SerializationError)


def test_function_that_cannot_be_pickled(same_worker: Runner) -> None:
    lock = threading.Lock()

    def act() -> object:
        return lock

    with at_most(0.5, "an unpicklable function"):
        error = same_worker.submit(act).error()
    assert isinstance(error, distpool.SerializationError)
    assert "lock" in str(error)


def test_function_of_a_map_that_cannot_be_pickled(same_worker: Runner) -> None:
    lock = threading.Lock()

    def act(number: int) -> object:
        return number, lock

    for run in (
        lambda: list(same_worker.raw.map(act, range(3))),
        lambda: list(same_worker.lazy_map(act, range(3))),
        lambda: same_worker.raw.pmap(act, range(3)),
        lambda: list(same_worker.raw.imap_unordered(act, range(3))),
    ):
        with at_most(0.5, "a map of an unpicklable function"), pytest.raises(distpool.SerializationError):
            run()


def test_element_of_a_map_that_cannot_be_pickled(same_worker: Runner) -> None:
    """The elements before it arrive."""
    results = same_worker.lazy_map(helpers.identity, [0, 1, threading.Lock(), 3])
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(distpool.SerializationError):
        next(results)


@unpicklable
def test_result_that_cannot_be_pickled(same_worker: Runner, which: str) -> None:
    calls = [same_worker.submit(helpers.square_or_unpicklable, number, 3, which) for number in range(8)]
    assert_squares(calls[:3])
    with at_most(0.5, "an unpicklable result"):
        error = calls[3].error()
        assert_squares(calls, but=3)
    if same_worker.kind == "executor":
        assert isinstance(error, distpool.SerializationError)
        assert NAMED[which] in str(error)
    else:
        assert isinstance(error, multiprocessing.pool.MaybeEncodingError)
        assert NAMED[which] in f"{error.exc} {error.value}"


# ------------------------------------------------------------------------------------------------------------------- F6


@pytest.mark.parametrize("arguments", [(helpers.fail, "refuses to load"), (helpers.leave, 5)], ids=["raises", "exits"])
def test_argument_that_fails_to_load_on_the_worker(same_worker: Runner, arguments: tuple[object, ...]) -> None:
    calls = [same_worker.submit(helpers.square, number) for number in range(3)]
    with at_most(0.5, "an argument that fails to load"):
        bad = same_worker.submit(helpers.identity, FailsToLoad(*arguments))
        calls += [same_worker.submit(helpers.square, number) for number in range(3, 8)]
        error = bad.error()
        assert_squares(calls)
    text = full_text(error)
    assert "refuses to load" in text or "SystemExit" in text
    assert isinstance(error, (distpool.DistpoolError, ValueError, SystemExit))


def test_argument_that_kills_while_it_loads(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(1)
    calls = [runner.submit(helpers.square, number) for number in range(3)]
    bad = runner.submit(helpers.identity, FailsToLoad(helpers.die, "SIGKILL"))
    calls += [runner.submit(helpers.square, number) for number in range(3, 8)]
    assert isinstance(bad.error(), distpool.ProcessExitedException)
    assert_squares(calls)


def test_function_that_fails_to_load_on_the_worker(same_worker: Runner) -> None:
    trap = FailsToLoad(helpers.fail, "refuses to load")

    def act() -> object:
        return trap

    with at_most(0.5, "a function that fails to load"):
        error = same_worker.submit(act).error()
    assert "refuses to load" in full_text(error)


def test_function_of_a_map_that_fails_to_load(same_worker: Runner) -> None:
    trap = FailsToLoad(helpers.fail, "refuses to load")

    def act(number: int) -> object:
        return number, trap

    with at_most(0.5, "a map of a function that fails to load"), pytest.raises(Exception, match="refuses to load"):
        list(same_worker.raw.map(act, range(3)))


@pytest.mark.parametrize("which", ["raises", "leaves"])
def test_result_that_fails_to_load_here(same_worker: Runner, which: str) -> None:
    calls = [same_worker.submit(helpers.square_or_return, number, 3, which) for number in range(8)]
    assert_squares(calls[:3])
    with at_most(0.5, "a result that fails to load"):
        error = calls[3].error()
        assert_squares(calls, but=3)
    text = full_text(error)
    assert "refuses to load here" in text or "SystemExit" in text
    assert isinstance(error, (distpool.DistpoolError, ValueError, SystemExit))


def test_module_that_the_worker_does_not_have(same_worker: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function by reference into a module that exists here only."""
    import sys
    import types

    module = types.ModuleType("only_in_the_caller")
    exec("def act():\n    return 1\nclass Thing: pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_in_the_caller", module)
    call = same_worker.submit(module.act)
    value, error = call.outcome()
    assert value == 1 or "only_in_the_caller" in full_text(error or AssertionError("neither value nor error"))


def test_two_hundred_bad_ones_among_good_ones(same_worker: Runner) -> None:
    """Whole messages of bad ones, in both directions: nobody's neighbour is harmed."""
    calls = []
    for number in range(200):
        calls.append(same_worker.submit(helpers.square, number))
        same_worker.submit(helpers.identity, FailsToLoad(helpers.fail, "refuses to load"))
        same_worker.submit(helpers.return_what_fails_to_load, "raises")
        same_worker.submit(helpers.make_unpicklable, "lock")
        same_worker.submit(helpers.identity, threading.Lock())
    assert_squares(calls)
