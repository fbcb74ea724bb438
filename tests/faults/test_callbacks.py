"""Row F15: callbacks that raise, submit or block stall nothing."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from . import helpers
from .helpers import PATIENCE, Gate, at_most
from .runners import Call, Runner, assert_squares


def submit_with(runner: Runner, callback: Callable[[Any], Any], function: Callable[..., Any], *args: Any) -> Call:
    """The callback gets the value, whichever class it is."""
    if runner.kind == "pool":
        return Call(runner.raw.apply_async(function, args, callback=callback, error_callback=callback))

    def unpack(future: Any) -> None:
        error = future.exception()
        callback(future.result() if error is None else error)

    call = runner.submit(function, *args)
    call.handle.add_done_callback(unpack)
    return call


class Awkward(BaseException):
    """Not even an `Exception`."""


@pytest.mark.parametrize("error", [ValueError("from the callback"), SystemExit("from the callback")])
def test_callback_that_raises(runner: Runner, caplog: pytest.LogCaptureFixture, error: BaseException) -> None:
    """Logged, and everything else is served."""
    called = threading.Event()

    def callback(value: Any) -> None:
        called.set()
        raise error

    with caplog.at_level(logging.ERROR):
        call = submit_with(runner, callback, helpers.square, 3)
        assert call.value() == 9
        assert called.wait(PATIENCE)
        assert_squares([runner.submit(helpers.square, number) for number in range(50)])
    assert "from the callback" in caplog.text


def test_callbacks_that_raise_for_errors(runner: Runner) -> None:
    def callback(value: Any) -> None:
        raise ValueError("from the callback")

    calls = [submit_with(runner, callback, helpers.fail, "from the task") for _ in range(20)]
    assert all(type(call.error()) is ValueError for call in calls)
    assert_squares([runner.submit(helpers.square, number) for number in range(50)])


def test_callback_that_submits(make_runner: Callable[..., Runner]) -> None:
    """A chain of fifty, each link submitted by the callback of the one before."""
    runner = make_runner(1)
    ends: queue.Queue[int] = queue.Queue()

    def go_on(value: int) -> None:
        if value >= 50:
            ends.put(value)
        else:
            submit_with(runner, go_on, helpers.identity, value + 1)

    submit_with(runner, go_on, helpers.identity, 0)
    assert ends.get(timeout=PATIENCE) == 50


def test_callback_that_blocks_on_another_future(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(1)
    ends: queue.Queue[int] = queue.Queue()

    def callback(value: int) -> None:
        ends.put(runner.submit(helpers.square, value).value())

    for number in range(5):
        submit_with(runner, callback, helpers.identity, number)
    with at_most(1, "five callbacks that wait"):
        assert sorted(ends.get(timeout=PATIENCE) for _ in range(5)) == [0, 1, 4, 9, 16]


def test_thirty_blocked_callbacks(make_runner: Callable[..., Runner], gate: Gate) -> None:
    """All wait for one future that is still running: results go on arriving meanwhile."""
    runner = make_runner(2)
    blocker = runner.submit(helpers.hold, gate.address, "last")
    arrival = gate.arrival()
    ends: queue.Queue[str] = queue.Queue()

    def callback(value: int) -> None:
        ends.put(blocker.value())

    for number in range(30):
        submit_with(runner, callback, helpers.identity, number)
    assert_squares([runner.submit(helpers.square, number) for number in range(100)])
    arrival.release()
    assert [ends.get(timeout=PATIENCE) for _ in range(30)] == ["last"] * 30


def test_callback_that_maps(runner: Runner) -> None:
    ends: queue.Queue[list[int]] = queue.Queue()
    submit_with(runner, lambda value: ends.put(list(runner.raw.map(helpers.square, range(value)))), helpers.identity, 4)
    assert ends.get(timeout=PATIENCE) == [0, 1, 4, 9]


def test_callback_that_shuts_down(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(2)
    ended = threading.Event()

    def callback(value: Any) -> None:
        if runner.kind == "executor":
            runner.raw.shutdown(wait=False)
        else:
            runner.raw.close()
        ended.set()

    others = [runner.submit(helpers.square, number) for number in range(20)]
    submit_with(runner, callback, helpers.identity, None)
    assert ended.wait(PATIENCE)
    assert_squares(others)
    with at_most(2, "the end"):
        if runner.kind == "executor":
            runner.raw.shutdown(wait=True)
        else:
            runner.raw.join()
