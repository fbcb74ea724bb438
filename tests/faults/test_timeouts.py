"""Row F7: a task that never ends costs its time limit; its worker is killed and replaced."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from distpool import slots

from . import helpers
from .helpers import BUSY, NOISE, PATIENCE, Gate, at_most
from .runners import LOADED, Call, Runner, assert_all_work, assert_squares, is_timeout

LIMIT = 0.5


@pytest.mark.parametrize("how", BUSY)
def test_endless_task(make_runner: Callable[..., Runner], gate: Gate, how: str) -> None:
    runner = make_runner(2, timeout=LIMIT, **LOADED)
    calls = [runner.submit(helpers.square, number) for number in range(4)]
    bad = runner.submit(helpers.be_busy, gate.address, how)
    calls += [runner.submit(helpers.square, number) for number in range(4, 8)]
    arrival = gate.arrival()
    process = psutil.Process(arrival.ospid)
    begin = time.monotonic()
    error = bad.error(1.5 * NOISE)
    took = time.monotonic() - begin
    assert is_timeout(error)
    assert LIMIT - 0.1 <= took <= 1.5 * NOISE
    arrival.wait_gone(1.5 * NOISE)
    assert not psutil.wait_procs([process], timeout=1.5 * NOISE)[1], "the process outlived its time limit"
    assert_squares(calls)
    assert_all_work(runner, 1)


def test_a_call_that_has_not_begun_is_in_time(make_runner: Callable[..., Runner]) -> None:
    """A busy machine may let a worker wait for longer than the limit: if it were killed for that, and the call sent to
    the next one, that would go round for ever."""
    runner = make_runner(1, timeout=0.3)
    ospid = runner.submit(os.getpid).value()
    os.kill(ospid, signal.SIGSTOP)
    goes_on = threading.Timer(1.0, os.kill, (ospid, signal.SIGCONT))
    goes_on.start()
    try:
        assert runner.submit(os.getpid).value() == ospid
    finally:
        goes_on.join()


def test_a_worker_on_which_a_call_never_begins(make_runner: Callable[..., Runner], monkeypatch: Any) -> None:
    monkeypatch.setattr(slots, "_UNBEGUN", 1.0)
    runner = make_runner(1, timeout=0.3)
    ospid = runner.submit(os.getpid).value()
    os.kill(ospid, signal.SIGSTOP)
    assert runner.submit(os.getpid).value() != ospid


def test_message_names_the_limit(make_runner: Callable[..., Runner], gate: Gate) -> None:
    runner = make_runner(1, timeout=LIMIT)
    assert "0.5" in str(runner.submit(helpers.be_busy, gate.address, "sleep").error())


def test_limit_of_a_view(runner: Runner, gate: Gate) -> None:
    """`options(timeout=)` holds for the calls of that view only."""
    limited = runner.executor.options(timeout=LIMIT)
    free = runner.submit(helpers.hold, gate.address, "free")
    holder = gate.arrival()
    with at_most(1.5, "the limited call"):
        assert is_timeout(Call(limited.submit(helpers.be_busy, gate.address, "python")).error())
    holder.release()
    assert free.value() == "free"


def test_waiting_in_the_queue_does_not_count(make_runner: Callable[..., Runner]) -> None:
    """Eight tasks of a fifth of a second on one worker: each is in time, though the last waits for 1.4 s."""
    runner = make_runner(1, timeout=1.0)
    calls = [runner.submit(time.sleep, 0.2) for _ in range(8)]
    assert [call.value() for call in calls] == [None] * 8


def test_every_attempt_has_its_own_limit(make_runner: Callable[..., Runner], gate: Gate) -> None:
    runner = make_runner(2, timeout=LIMIT, retries=2, **LOADED)
    call = runner.submit(helpers.be_busy, gate.address, "python")
    arrivals = gate.arrivals(3, 3 * 1.5 * NOISE)
    assert len({arrival.ospid for arrival in arrivals}) == 3
    assert is_timeout(call.error(1.5 * NOISE))
    assert_all_work(runner, 1)


def test_calls_sent_ahead_run_elsewhere(make_runner: Callable[..., Runner], gate: Gate, tmp_path: Path) -> None:
    """The killed worker had more calls waiting: each of them runs, once."""
    runner = make_runner(1, timeout=LIMIT)
    path = tmp_path / "log"
    assert_squares([runner.submit(helpers.square, number) for number in range(200)])
    bad = runner.submit(helpers.be_busy, gate.address, "c")
    calls = [runner.submit(helpers.note_and_square, path, number) for number in range(30)]
    assert is_timeout(bad.error(1.5 * NOISE))
    assert_squares(calls)
    assert helpers.noted(path) == {str(number): 1 for number in range(30)}


def test_waiting_for_a_result_is_not_a_limit(runner: Runner, gate: Gate) -> None:
    """`result(timeout)` and `get(timeout)` give up waiting; the task goes on."""
    call = runner.submit(helpers.hold, gate.address, "kept")
    arrival = gate.arrival()
    with at_most(0.5, "giving up"), pytest.raises(Exception) as caught:
        (call.handle.result if runner.kind == "executor" else call.handle.get)(0.1)
    assert is_timeout(caught.value)
    assert not call.settled(0)
    arrival.release()
    assert call.value(PATIENCE) == "kept"
