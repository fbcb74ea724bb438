"""Row F8: an initializer that fails breaks the executor, once, with its traceback."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from . import helpers
from .helpers import PATIENCE, FailsToLoad, Gate, at_most
from .runners import Runner, full_text

FAILURES = ["raises", "exits", "SIGKILL", "segfault", "exit 7"]


def failing(path: Path, how: str) -> None:
    """An initializer that notes its run and then fails."""
    helpers.note(path, "run")
    if how == "raises":
        raise ValueError("the initializer says no")
    if how == "exits":
        raise SystemExit(3)
    helpers.die(how)


def failing_from_the_second_run(path: Path) -> None:
    helpers.note(path, "run")
    if helpers.noted(path)["run"] > 1:
        raise ValueError("the second initializer says no")


def error_of(runner: Runner) -> BaseException:
    """The error of one more call, whether `submit` raises it or the future."""
    try:
        return runner.submit(helpers.square, 3).error()
    except BrokenProcessPool as error:
        return error


@pytest.mark.parametrize("mode", ["replace", "break"])
@pytest.mark.parametrize("how", FAILURES)
def test_failing_initializer(make_runner: Callable[..., Runner], tmp_path: Path, how: str, mode: str) -> None:
    path = tmp_path / "runs"
    runner = make_runner(2, initializer=failing, initargs=(path, how), on_worker_exit=mode)
    with at_most(2, "the failure of all calls"):
        errors = []
        for _ in range(8):
            try:
                errors.append(runner.submit(helpers.square, 3))
            except BrokenProcessPool:  # broken before all were submitted
                break
        found = [call.error() for call in errors]
    found += [error_of(runner), error_of(runner)]
    assert all(isinstance(error, BrokenProcessPool) for error in found)
    if how == "raises":
        for error in found:
            assert "the initializer says no" in full_text(error)
            assert "in failing" in full_text(error)
    with at_most(2, "the end of a broken executor"):
        runner.close()
    assert helpers.noted(path)["run"] <= 2 * runner.workers, "respawn loop"


def test_maps_of_a_broken_executor(make_runner: Callable[..., Runner], tmp_path: Path) -> None:
    runner = make_runner(2, initializer=failing, initargs=(tmp_path / "runs", "raises"))
    runs = [
        lambda: list(runner.raw.map(helpers.square, range(5))),
        lambda: list(runner.lazy_map(helpers.square, range(5))),
        lambda: list(runner.raw.imap_unordered(helpers.square, range(5))),
        lambda: runner.raw.pmap(helpers.square, range(5)),
    ]
    for run in runs:
        with at_most(2, "a map"), pytest.raises(BrokenProcessPool):
            run()


def test_initializer_that_fails_to_load(make_runner: Callable[..., Runner]) -> None:
    trap = FailsToLoad(helpers.fail, "refuses to load")
    runner = make_runner(2, initializer=helpers.identity, initargs=(trap,))
    with at_most(2, "the failure"):
        error = error_of(runner)
    assert isinstance(error, BrokenProcessPool)
    assert "refuses to load" in full_text(error)


def test_initializer_that_cannot_be_pickled(make_runner: Callable[..., Runner]) -> None:
    """Either refused at once, or the calls fail: never a hang."""
    with at_most(2, "the failure"):
        try:
            runner = make_runner(2, initializer=helpers.identity, initargs=(helpers.make_unpicklable("lock"),))
            error: BaseException = error_of(runner)
        except Exception as refused:
            error = refused
    assert "lock" in full_text(error)


def test_initializer_that_fails_on_the_replacement(
    make_runner: Callable[..., Runner], gate: Gate, tmp_path: Path
) -> None:
    """The first worker came up; the one that is to take its place cannot."""
    path = tmp_path / "runs"
    runner = make_runner(1, initializer=failing_from_the_second_run, initargs=(path,))
    assert runner.submit(helpers.square, 3).value() == 9
    calls = [runner.submit(helpers.hold, gate.address, number) for number in range(5)]
    os.kill(gate.arrival().ospid, 9)
    with at_most(2, "the failure of all calls"):
        errors = [call.error(PATIENCE) for call in calls]
    assert all(isinstance(error, BrokenProcessPool) for error in errors)
    assert any("the second initializer says no" in full_text(error) for error in errors[1:])
    assert isinstance(error_of(runner), BrokenProcessPool)
    assert helpers.noted(path)["run"] <= 3
