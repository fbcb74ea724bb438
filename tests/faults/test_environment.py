"""Rows F24, F26: workers that stand still for a while, and surroundings that change under way."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from . import helpers
from .helpers import NOISE, PATIENCE, Gate, at_most
from .programs import run
from .runners import KINDS, Call, Runner, assert_all_work, assert_squares, is_timeout

# ------------------------------------------------------------------------------------------------------------------ F24


def test_stopped_worker_goes_on(runner: Runner, gate: Gate) -> None:
    """SIGSTOP for five seconds, then SIGCONT: nothing fails; the other worker serves meanwhile."""
    before = runner.ospids()
    held = runner.submit(helpers.hold, gate.address, "held")
    arrival = gate.arrival()
    os.kill(arrival.ospid, signal.SIGSTOP)
    end = time.monotonic() + 5.0
    try:
        served = 0
        while time.monotonic() < end and not held.settled(0.01):  # a pace that leaves the processor to others
            assert runner.submit(helpers.square, served).value(2 * NOISE) == served * served
            served += 1
    finally:
        os.kill(arrival.ospid, signal.SIGCONT)
    assert served > 100
    arrival.release()
    assert held.value() == "held"
    assert runner.ospids() == before


def test_both_workers_stopped(runner: Runner, gate: Gate) -> None:
    """With calls sent ahead, and more submitted meanwhile: all are answered afterwards."""
    before = runner.ospids()
    held = [runner.submit(helpers.hold, gate.address, number) for number in range(2)]
    arrivals = gate.arrivals(2)
    calls = [runner.submit(helpers.square, number) for number in range(50)]
    for arrival in arrivals:
        os.kill(arrival.ospid, signal.SIGSTOP)
    try:
        calls += [runner.submit(helpers.square, number) for number in range(50, 100)]
        big = runner.submit(len, bytes(20 << 20))
        assert not threading.Event().wait(5.0)  # the five seconds of the row
        assert not any(call.settled(0) for call in held)
    finally:
        for arrival in arrivals:
            os.kill(arrival.ospid, signal.SIGCONT)
    for arrival in arrivals:
        arrival.release()
    assert [call.value() for call in held] == [0, 1]
    assert big.value() == 20 << 20
    assert_squares(calls)
    assert runner.ospids() == before


@pytest.mark.slow
@pytest.mark.time_limit(120)
def test_worker_that_keeps_the_interpreter_for_a_minute(gate: Gate) -> None:
    """One C call of 60 s that never lets go of the interpreter lock: the worker is not taken for dead.

    Both classes in the same minute: they share nothing but the caller's I/O thread.
    """
    runners = [Runner(kind, 2, {}) for kind in KINDS]
    try:
        before = [runner.ospids() for runner in runners]
        kept = [runner.submit(helpers.keep_the_interpreter, gate.address, 60) for runner in runners]
        gate.arrivals(len(runners))
        end = time.monotonic() + 59
        served = 0
        while time.monotonic() < end and not kept[0].settled(0.05):
            for runner in runners:
                assert runner.submit(helpers.square, served).value(2 * NOISE) == served * served
            served += 1
        assert served > 100
        assert [call.value(30) for call in kept] == [0, 0]
        assert [runner.ospids() for runner in runners] == before
    finally:
        gate.close()
        for runner in runners:
            runner.end()


# ------------------------------------------------------------------------------------------------------------------ F26


def go_to(path: Path) -> None:
    path.mkdir()
    os.chdir(path)
    path.rmdir()


def test_directory_of_a_worker_deleted(make_runner: Callable[..., Runner], tmp_path: Path) -> None:
    runner = make_runner(1)
    before = runner.ospids()
    runner.submit(go_to, tmp_path / "gone").value()
    assert isinstance(runner.submit(os.getcwd).error(), FileNotFoundError)
    assert_squares([runner.submit(helpers.square, number) for number in range(20)])
    assert runner.submit(lambda: "by value").value() == "by value"
    assert runner.ospids() == before


DIRECTORY = """
kind, host, port = sys.argv[1:]
directory = os.path.join(os.environ["TMPDIR"], "gone")
os.mkdir(directory)
os.chdir(directory)
runner = Runner(kind, 2)
helpers.all_at_once(runner.executor, 2)  # who still starts would say that it cannot work there
os.rmdir(directory)
runner.error(runner.submit(helpers.die, "SIGKILL"))
runner.error(runner.submit(helpers.die, "SIGKILL"))
for number in range(20):
    assert runner.call(helpers.square, number) == number * number
other = Runner(kind, 1)
assert other.call(helpers.square, 4) == 16
for one in (runner, other):
    one.close()
print("ok")
"""


def test_directory_of_the_caller_deleted(kind: str, gate: Gate) -> None:
    """Replacements and new workers are launched all the same."""
    outcome = run(DIRECTORY, kind, *gate.address)
    outcome.assert_clean()
    assert outcome.stdout == "ok\n"


def set_clock_back(seconds: float) -> None:
    """For this process: what an administrator's `date` would do to `time.time`."""
    true = time.time
    time.time = lambda: true() - seconds
    time.time_ns = lambda: int(time.time() * 1e9)


def test_clock_set_back(make_runner: Callable[..., Runner], gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here and on the workers, by an hour: waits, limits and delays are measured by another clock."""
    runner = make_runner(2, timeout=1.0, retries=1, retry_delays=[0.1])
    for pid in runner.executor.workers:
        runner.executor.options(pids=[pid]).submit(set_clock_back, 3600.0).result(PATIENCE)
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() - 3600)
    assert_squares([runner.submit(helpers.square, number) for number in range(20)])
    with at_most(3, "two attempts of a second each"):
        assert is_timeout(runner.submit(helpers.be_busy, gate.address, "python").error())
    free = Call(runner.executor.options(timeout=math.inf).submit(helpers.hold, gate.address, "held"))
    held = gate.arrivals(3)[-1]
    with at_most(0.5, "giving up"), pytest.raises(TimeoutError):
        free.handle.result(0.1)
    held.release()
    assert free.value() == "held"
    monkeypatch.setattr(time, "time", lambda: true() + 3600)
    assert_squares([runner.submit(helpers.square, number) for number in range(20)])
    assert_all_work(runner, 1)


LOCALE = """
kind = sys.argv[1]
runner = Runner(kind, 2)
text = "caf\\u00e9 \\u4e16\\u754c"
assert runner.call(helpers.identity, text) == text
assert runner.call(lambda: text) == text
error = runner.error(runner.submit(helpers.fail, text))
assert error.args == (text,)
runner.call(print, text)
runner.call(print, "after it")
runner.close()
print("ok")
"""


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1", "no_SUCH.locale"])
def test_locale(kind: str, locale: str) -> None:
    """Texts and outputs go through, though the terminal could not show them."""
    env = {"LC_ALL": locale, "LANG": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    outcome = run(LOCALE, kind, env=env)
    outcome.assert_clean()
    assert outcome.stdout.endswith("ok\n")
    assert "\tafter it\n" in outcome.stdout


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "utf-16"])
def test_encoding_of_the_output(kind: str, encoding: str) -> None:
    """A line that the caller's stdout cannot encode is not the end of anything."""
    outcome = run(LOCALE, kind, env={"PYTHONIOENCODING": encoding})
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""
    outcome.assert_nothing_left()


def test_changed_environment_and_path(runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Variables that matter at launch change before a replacement is launched."""
    assert runner.submit(helpers.square, 3).value() == 9
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.delenv("PATH")
    for _ in range(2):
        runner.submit(helpers.die, "SIGKILL").error()
    assert_squares([runner.submit(helpers.square, number) for number in range(20)])


def test_task_changes_its_process(make_runner: Callable[..., Runner], gate: Gate) -> None:
    """Signal handlers, umask, priority, recursion limit, standard streams: the worker serves on."""
    runner = make_runner(1)
    before = runner.ospids()

    def meddle() -> None:
        import gc
        import random
        import sys

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.umask(0o777)
        os.environ.clear()
        sys.stdout = sys.stderr = sys.stdin = None  # type: ignore[assignment]
        sys.setrecursionlimit(200)
        sys.path.clear()
        random.seed(1)
        gc.disable()
        threading.stack_size(1 << 20)

    runner.submit(meddle).value()
    assert_squares([runner.submit(helpers.square, number) for number in range(50)])
    assert runner.submit(len, bytes(1 << 20)).value() == 1 << 20
    assert runner.ospids() == before
