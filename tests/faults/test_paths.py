"""The rows that depend on how workers are started and connected, once for each way.

DISTPOOL_LAUNCH=fork|exec: a zygote forks clean workers, or each is a fresh interpreter.
DISTPOOL_TRANSPORT=unix|tcp: private Unix sockets, or loopback TCP where there are none.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import distpool

from . import helpers
from .helpers import DEATHS, NOISE, PATIENCE, Gate
from .programs import Program, run
from .runners import LOADED, Runner, assert_all_work, assert_squares, full_text, is_timeout
from .test_orphans import BOUND, BUSY

pytestmark = pytest.mark.leaves_processes("what removes the sockets' directory lives as long as this program")

WAYS = [(launch, transport) for launch in ("fork", "exec") for transport in ("unix", "tcp")]


@pytest.fixture(params=WAYS, ids=["-".join(way) for way in WAYS], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Both variables are read at each use, so they hold for the executors of this test and its programs."""
    launch, transport = request.param
    monkeypatch.setenv("DISTPOOL_LAUNCH", launch)
    monkeypatch.setenv("DISTPOOL_TRANSPORT", transport)
    return launch, transport


def test_the_way_is_taken(way: tuple[str, str], runner: Runner) -> None:
    """Otherwise this module would test one way four times."""
    launch, transport = way
    workers = [psutil.Process(ospid) for ospid in runner.ospids().values()]
    assert runner.submit(helpers.square, 3).value() == 9
    for worker in workers:
        tcp = [item for item in worker.net_connections("tcp") if item.status == psutil.CONN_ESTABLISHED]
        assert bool(tcp) == (transport == "tcp")
    if psutil.LINUX:
        parents = {worker.ppid() for worker in workers}
        assert (os.getpid() in parents) == (launch == "exec")


def test_deaths(runner: Runner, gate: Gate) -> None:
    for how, code in DEATHS.items():
        calls = [runner.submit(helpers.square_or_die, number, 3, how, gate.address) for number in range(8)]
        died = gate.arrival().wait_gone(PATIENCE)
        error = calls[3].error(1 * NOISE)
        assert time.monotonic() - died <= 1 * NOISE
        assert isinstance(error, distpool.ProcessExitedException)
        assert error.exitcode == code
        assert "last words of 3" in error.output
        assert_squares(calls, but=3)
    assert_all_work(runner, 1)


def test_death_among_many(runner: Runner, gate: Gate, tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert_squares([runner.submit(helpers.square, number) for number in range(300)])
    calls = [runner.submit(helpers.square_or_die, number, 20, "SIGKILL", gate.address, path) for number in range(50)]
    assert isinstance(calls[20].error(), distpool.ProcessExitedException)
    assert_squares(calls, but=20)
    assert helpers.noted(path) == {str(number): 1 for number in range(50)}


def test_timeouts(make_runner: Callable[..., Runner], gate: Gate) -> None:
    runner = make_runner(2, timeout=0.5, **LOADED)
    for how in ("c", "deaf"):
        bad = runner.submit(helpers.be_busy, gate.address, how)
        arrival = gate.arrival()
        assert is_timeout(bad.error(1.5 * NOISE))
        arrival.wait_gone(1.5 * NOISE)
    assert_all_work(runner, 1)


def test_failing_initializer(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(2, initializer=helpers.fail, initargs=("the initializer says no",))
    error = runner.submit(helpers.square, 3).error(2 * NOISE)
    assert "the initializer says no" in full_text(error)


def test_big_values(runner: Runner) -> None:
    calls = [runner.submit(helpers.identity, bytes([number]) * (5 << 20)) for number in range(8)]
    assert [call.value() for call in calls] == [bytes([number]) * (5 << 20) for number in range(8)]


@pytest.mark.parametrize("how", ["sleep", "c", "deaf"])
def test_caller_killed(kind: str, gate: Gate, how: str) -> None:
    with Program(BUSY, [kind, how, *gate.address]) as program:
        arrivals = gate.arrivals(2)
        program.send(signal.SIGKILL)
        killed = time.monotonic()
        for arrival in arrivals:
            arrival.wait_gone(max(0.1, killed + BOUND * NOISE - time.monotonic()))
        program.finish(gone_within=max(0.1, killed + BOUND * NOISE - time.monotonic())).assert_nothing_left()


def test_interrupt(kind: str, gate: Gate) -> None:
    source = """
kind, host, port = sys.argv[1:]
runner = Runner(kind, 2)
runner.call(helpers.hold, (host, int(port)))
"""
    with Program(source, [kind, *gate.address]) as program:
        gate.arrival()
        program.interrupt()
        begin = time.monotonic()
        outcome = program.finish()
        assert time.monotonic() - begin <= 1 * NOISE
    assert outcome.returncode == -signal.SIGINT
    assert outcome.stderr.count("Traceback") == 1
    outcome.assert_nothing_left()


def test_exit_with_pending_work(kind: str, tmp_path: Path) -> None:
    source = """
kind, path = sys.argv[1], helpers.Path(sys.argv[2])
runner = Runner(kind, 2)
calls = [runner.submit(helpers.note_and_square, path, number) for number in range(50)]
if kind == "pool":
    runner.close()
"""
    path = tmp_path / "log"
    run(source, kind, path).assert_clean()
    assert helpers.noted(path) == {str(number): 1 for number in range(50)}


def test_fork_of_the_caller(kind: str) -> None:
    source = """
kind = sys.argv[1]
runner = Runner(kind, 2)
assert runner.call(helpers.square, 3) == 9
child = os.fork()
if child == 0:
    own = Runner(kind, 1)
    assert own.call(helpers.square, 4) == 16
    own.close()
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert runner.call(helpers.square, 5) == 25
runner.close()
"""
    run(source, kind, options=["-W", "ignore::DeprecationWarning"]).assert_clean()
