"""Rows F1, F2, F3: a task that ends its process costs its own call, and no other."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

import distpool

from . import helpers
from .helpers import DEATHS, NOISE, PATIENCE, Gate, at_most
from .runners import Runner, assert_all_work, assert_squares, full_text

deaths = pytest.mark.parametrize("how", DEATHS)


def assert_is_exit(error: BaseException, how: str, words: str) -> distpool.ProcessExitedException:
    """The error tells who died, how, and what it said last."""
    assert isinstance(error, distpool.ProcessExitedException)
    assert isinstance(error, BrokenProcessPool)
    assert error.exitcode == DEATHS[how]
    assert error.maybe_ran is True
    assert words in error.output
    assert str(error.worker_id) in str(error)
    return error


# ------------------------------------------------------------------------------------------------------------------- F1


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pidfd: elsewhere a kill is not seen before it is told")
@pytest.mark.parametrize(
    ("end", "number", "exitcode", "words"),
    [(os._exit, 3, 3, "exit code 3"), (signal.raise_signal, 9, -9, "killed by signal 9")],
)
def test_a_death_that_is_reported_late_is_told_as_it_was(
    end: Callable[[int], object], number: int, exitcode: int, words: str
) -> None:
    """The process that reaps it stands still until the master has long seen the end of the connection."""
    with distpool.ClusterExecutor(1) as executor:
        reaper = executor.submit(os.getppid).result(PATIENCE)
        assert reaper != os.getpid()
        os.kill(reaper, signal.SIGSTOP)
        going_on = threading.Timer(2.5, os.kill, (reaper, signal.SIGCONT))
        try:
            call = executor.submit(end, number)
            going_on.start()
            error = call.exception(PATIENCE)
        finally:
            going_on.cancel()
            os.kill(reaper, signal.SIGCONT)
        assert isinstance(error, distpool.ProcessExitedException) and words in str(error)
        assert error.exitcode == exitcode and error.reason == ""
        assert executor.submit(abs, -1).result(PATIENCE) == 1


@deaths
def test_fourth_of_eight_dies(runner: Runner, gate: Gate, how: str) -> None:
    known = set(runner.ospids())
    calls = [runner.submit(helpers.square_or_die, number, 3, how, gate.address) for number in range(8)]
    died = gate.arrival().wait_gone(PATIENCE)
    error = assert_is_exit(calls[3].error(1 * NOISE), how, "last words of 3")
    assert time.monotonic() - died <= 1 * NOISE
    assert error.worker_id in known
    assert_squares(calls, but=3)
    assert runner.submit(helpers.square, 9).value() == 81
    assert_all_work(runner, 1)
    assert error.worker_id not in runner.executor.workers


@deaths
def test_single_worker_dies_and_is_replaced(make_runner: Callable[..., Runner], gate: Gate, how: str) -> None:
    runner = make_runner(1)
    calls = [runner.submit(helpers.square_or_die, number, 3, how, gate.address) for number in range(8)]
    assert_is_exit(calls[3].error(), how, "last words of 3")
    assert_squares(calls, but=3)
    assert_all_work(runner, 1)


def test_functions_that_travel_by_value(runner: Runner) -> None:
    """The dying function is a closure, so the replacement has to be sent it again."""

    def die_at(bad: int) -> Callable[[int], int]:
        def act(number: int) -> int:
            if number == bad:
                os.kill(os.getpid(), signal.SIGKILL)
            return number * number

        return act

    act = die_at(3)
    calls = [runner.submit(act, number) for number in range(8)]
    assert isinstance(calls[3].error(), distpool.ProcessExitedException)
    assert_squares(calls, but=3)
    assert runner.submit(lambda: "next").value() == "next"


@deaths
def test_map_raises_at_the_bad_element(runner: Runner, gate: Gate, how: str) -> None:
    def act(number: int) -> int:
        return helpers.square_or_die(number, 3, how, address)

    address = gate.address
    results = runner.lazy_map(act, range(8))
    with at_most(2, "three results and an error"):
        assert [next(results) for _ in range(3)] == [0, 1, 4]
        with pytest.raises(distpool.ProcessExitedException):
            next(results)
    if runner.kind == "pool":  # the stdlib's imap goes on behind an element that failed
        assert list(results) == [16, 25, 36, 49]
    assert_all_work(runner, 1)


@pytest.mark.parametrize("chunksize", [None, 1, 4])
def test_pool_map_does_not_hang(
    make_runner: Callable[..., Runner], kind: str, gate: Gate, chunksize: int | None
) -> None:
    if kind != "pool":
        pytest.skip("Pool.map has no counterpart")
    runner = make_runner()
    address = gate.address
    with at_most(2, "map with a death"), pytest.raises(distpool.ProcessExitedException):
        runner.raw.map(lambda number: helpers.square_or_die(number, 3, "SIGKILL", address), range(8), chunksize)
    assert runner.raw.map(helpers.square, range(8)) == [number * number for number in range(8)]


def test_pmap(runner: Runner, gate: Gate) -> None:
    """Without retries an error; with `on_error` a value for that element only."""
    address = gate.address

    def act(number: int) -> int:
        return helpers.square_or_die(number, 3, "SIGKILL", address)

    with at_most(2, "pmap with a death"), pytest.raises(distpool.ProcessExitedException):
        runner.raw.pmap(act, range(8))
    seen: list[Exception] = []
    assert runner.raw.pmap(act, range(8), on_error=lambda error: seen.append(error)) == [0, 1, 4, None, 16, 25, 36, 49]
    assert [type(error) for error in seen] == [distpool.ProcessExitedException]


def test_retry_after_death(make_runner: Callable[..., Runner], tmp_path: Path) -> None:
    runner = make_runner(2, retries=2)
    path = tmp_path / "log"
    calls = [runner.submit(helpers.die_once, path, number) for number in range(8)]
    assert_squares(calls)
    assert set(helpers.noted(path).values()) == {2}


def test_idle_worker_killed_from_outside(runner: Runner, gate: Gate) -> None:
    """Nothing ran, so nothing fails."""
    for ospid in runner.ospids().values():
        os.kill(ospid, signal.SIGKILL)
    calls = [runner.submit(helpers.square, number) for number in range(100)]
    assert_squares(calls)
    assert_all_work(runner, 1)


def test_every_worker_killed_while_busy(runner: Runner, gate: Gate) -> None:
    calls = [runner.submit(helpers.hold, gate.address, number) for number in range(2)]
    for arrival in gate.arrivals(2):
        os.kill(arrival.ospid, signal.SIGKILL)
    with at_most(1, "two errors"):
        errors = [call.error() for call in calls]
    assert all(isinstance(error, distpool.ProcessExitedException) for error in errors)
    assert_all_work(runner, 1)


def test_ten_deaths_in_a_row(runner: Runner, gate: Gate) -> None:
    """Replacements are replaced as well."""
    ways = list(DEATHS)
    for round_ in range(10):
        calls = [
            runner.submit(helpers.square_or_die, number, 1, ways[round_ % len(ways)], gate.address)
            for number in range(4)
        ]
        assert isinstance(calls[1].error(), distpool.ProcessExitedException)
        assert_squares(calls, but=1)
    assert_all_work(runner, 1)


def test_death_under_the_rule_of_the_stdlib(make_runner: Callable[..., Runner], gate: Gate) -> None:
    """`on_worker_exit="break"`: everything fails, and the executor with it."""
    runner = make_runner(2, on_worker_exit="break")
    calls = [runner.submit(helpers.hold, gate.address, number) for number in range(6)]
    victim = gate.arrivals(2)[0]
    with at_most(1, "the failure of everything"):
        os.kill(victim.ospid, signal.SIGKILL)
        errors = [call.error() for call in calls]
    assert all(isinstance(error, BrokenProcessPool) for error in errors)
    with pytest.raises(BrokenProcessPool):
        runner.submit(helpers.square, 2).value()


# ------------------------------------------------------------------------------------------------------------------- F2


@deaths
def test_one_death_among_fifty_sent_ahead(runner: Runner, gate: Gate, tmp_path: Path, how: str) -> None:
    """Short calls first, so that many are sent ahead; then exactly one error, and nothing is executed twice."""
    assert_squares([runner.submit(helpers.square, number) for number in range(300)])
    path = tmp_path / "log"
    calls = [runner.submit(helpers.square_or_die, number, 20, how, gate.address, path) for number in range(50)]
    died = gate.arrival().wait_gone(PATIENCE)
    error = assert_is_exit(calls[20].error(1 * NOISE), how, "last words of 20")
    assert time.monotonic() - died <= 1 * NOISE
    assert error.maybe_ran is True
    assert_squares(calls, but=20)
    assert helpers.noted(path) == {str(number): 1 for number in range(50)}
    assert_all_work(runner, 1)


def test_both_workers_die_before_forty_eight_others(runner: Runner, gate: Gate, tmp_path: Path) -> None:
    path = tmp_path / "log"
    held = [runner.submit(helpers.hold, gate.address, number) for number in range(2)]
    arrivals = gate.arrivals(2)
    calls = [runner.submit(helpers.note_and_square, path, number) for number in range(48)]
    for arrival in arrivals:
        os.kill(arrival.ospid, signal.SIGKILL)
    assert all(isinstance(call.error(), distpool.ProcessExitedException) for call in held)
    assert_squares(calls)
    assert helpers.noted(path) == {str(number): 1 for number in range(48)}


@pytest.mark.parametrize("seed", range(5))
def test_death_at_any_moment_runs_nothing_twice(runner: Runner, gate: Gate, tmp_path: Path, seed: int) -> None:
    """A worker is killed from outside while results stream in: at most its running call fails, none runs again."""
    assert_squares([runner.submit(helpers.square, number) for number in range(100)])
    victim = sorted(runner.ospids().values())[seed % 2]
    path = tmp_path / "log"
    calls = [runner.submit(helpers.note_and_square, path, number) for number in range(400)]
    assert calls[7 + 40 * seed].value() == (7 + 40 * seed) ** 2
    os.kill(victim, signal.SIGKILL)
    failed = [number for number, call in enumerate(calls) if call.outcome()[1] is not None]
    assert len(failed) <= 1
    counts = helpers.noted(path)
    assert all(counts[str(number)] == 1 for number in range(400) if number not in failed)
    for number in failed:
        error = calls[number].error()
        assert isinstance(error, distpool.ProcessExitedException)
        assert counts[str(number)] <= 1
        assert error.maybe_ran or counts[str(number)] == 0


def test_maybe_ran_is_true_when_all_fails(make_runner: Callable[..., Runner], gate: Gate, tmp_path: Path) -> None:
    """Under the stdlib's rule all 50 fail: those that never started say so, and only those."""
    runner = make_runner(2, on_worker_exit="break")
    path = tmp_path / "log"
    assert_squares([runner.submit(helpers.square, number) for number in range(100)])
    held = [runner.submit(helpers.hold, gate.address, number) for number in range(2)]
    victim = gate.arrivals(2)[0]
    waiting = [runner.submit(helpers.note_and_square, path, number) for number in range(48)]
    os.kill(victim.ospid, signal.SIGKILL)
    errors = [call.error() for call in held + waiting]
    assert all(isinstance(error, BrokenProcessPool) for error in errors)
    assert [getattr(error, "maybe_ran", None) for error in errors[:2]] == [True, True]
    assert [getattr(error, "maybe_ran", None) for error in errors[2:]] == [False] * 48
    assert not path.exists()


def test_calls_bound_to_the_dead_worker_say_that_they_never_ran(runner: Runner, gate: Gate, tmp_path: Path) -> None:
    """`options(pids=)` leaves no elsewhere to run."""
    path = tmp_path / "log"
    pid, ospid = next(iter(runner.ospids().items()))
    only = runner.executor.options(pids=[pid])
    running = only.submit(helpers.hold, gate.address)
    gate.arrival()
    waiting = [only.submit(helpers.note_and_square, path, number) for number in range(5)]
    os.kill(ospid, signal.SIGKILL)
    with at_most(1, "the failure of the calls bound to the dead worker"):
        error = running.exception(PATIENCE)
        errors = [future.exception(PATIENCE) for future in waiting]
    assert isinstance(error, distpool.ProcessExitedException)
    assert (error.worker_id, error.maybe_ran) == (pid, True)
    assert all(isinstance(error, distpool.ProcessExitedException) and not error.maybe_ran for error in errors)
    assert not path.exists()
    assert_all_work(runner, 1)


# ------------------------------------------------------------------------------------------------------------------- F3


@pytest.mark.parametrize("code", [7, 0, None, "text"])
def test_sys_exit_is_an_exception_like_any_other(make_runner: Callable[..., Runner], code: object) -> None:
    runner = make_runner(1)
    before = runner.ospids()
    error = runner.submit(helpers.leave, code).error()
    assert type(error) is SystemExit
    assert error.code == code
    assert "in leave" in full_text(error)
    assert runner.ospids() == before


@pytest.mark.parametrize("raised", [KeyboardInterrupt("by hand"), GeneratorExit("by hand"), BaseException("by hand")])
def test_other_base_exceptions(make_runner: Callable[..., Runner], raised: BaseException) -> None:
    runner = make_runner(1)
    before = runner.ospids()
    calls = [runner.submit(helpers.square, number) for number in range(3)]
    error = runner.submit(helpers.raise_this, raised).error()
    assert type(error) is type(raised)
    assert error.args == ("by hand",)
    assert_squares(calls)
    assert runner.ospids() == before
