"""Row F10: however the calling program ends, its workers end too, and no file, socket or segment stays."""

from __future__ import annotations

import os
import signal
import time

import pytest

from .helpers import NOISE, Gate
from .programs import Program

BOUND = 2.0

BUSY = """
kind, how, host, port = sys.argv[1:]
address = host, int(port)
runner = Runner(kind, 2)
print(runner.call(len, bytes(3 << 20)), flush=True)  # big enough for a segment
calls = [runner.submit(helpers.be_busy, address, how) for _ in range(2)]
queued = [runner.submit(helpers.square, number) for number in range(20)]
threading.Event().wait(100)
"""


def assert_all_gone(program: Program, seconds: float) -> None:
    """Processes first, then what they owned; both counted from the end of the program."""
    outcome = program.finish(gone_within=seconds)
    outcome.assert_nothing_left()


@pytest.mark.parametrize("how", ["python", "sleep", "c", "deaf"])
def test_caller_killed_while_workers_are_busy(kind: str, gate: Gate, how: str) -> None:
    with Program(BUSY, [kind, how, *gate.address]) as program:
        arrivals = gate.arrivals(2)
        program.send(signal.SIGKILL)
        killed = time.monotonic()
        for arrival in arrivals:
            arrival.wait_gone(max(0.1, killed + BOUND * NOISE - time.monotonic()))
        assert_all_gone(program, max(0.1, killed + BOUND * NOISE - time.monotonic()))


def test_caller_killed_while_a_worker_is_stopped(kind: str, gate: Gate) -> None:
    with Program(BUSY, [kind, "stopped", *gate.address]) as program:
        gate.arrivals(2)
        program.send(signal.SIGKILL)
        assert_all_gone(program, BOUND * NOISE)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGABRT, signal.SIGQUIT])
def test_caller_ended_by_another_signal(kind: str, gate: Gate, ending: signal.Signals) -> None:
    """The default action of these: no `atexit`, no `finally`."""
    with Program(
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n" + BUSY, [kind, "python", *gate.address]
    ) as program:
        gate.arrivals(2)
        program.send(ending)
        assert_all_gone(program, BOUND * NOISE)


def test_session_killed_at_once(kind: str, gate: Gate) -> None:
    """As a batch system or a closed terminal does it: every process of the group that is left gets SIGKILL."""
    with Program(BUSY, [kind, "sleep", *gate.address]) as program:
        gate.arrivals(2)
        os.killpg(program.process.pid, signal.SIGKILL)
        assert_all_gone(program, BOUND * NOISE)


@pytest.mark.parametrize("state", ["idle", "launching", "sending"])
def test_caller_killed_at_another_moment(kind: str, gate: Gate, state: str) -> None:
    source = """
kind, state, host, port = sys.argv[1:]
address = host, int(port)
runner = Runner(kind, 2)
if state == "launching":
    runner.submit(helpers.show, address)
elif state == "sending":
    for _ in range(50):
        runner.submit(helpers.show, address, bytes(20 << 20).hex()[:3])
    calls = [runner.submit(len, bytes(30 << 20)) for _ in range(40)]
else:
    assert runner.call(helpers.square, 3) == 9
helpers.show(address, "here")
threading.Event().wait(100)
"""
    with Program(source, [kind, state, *gate.address]) as program:
        gate.arrival()
        program.send(signal.SIGKILL)
        assert_all_gone(program, BOUND * NOISE)


def test_os_exit_of_the_caller(kind: str, gate: Gate) -> None:
    source = BUSY.replace("threading.Event().wait(100)", "helpers.hold(address, 'main'); os._exit(3)")
    with Program(source, [kind, "python", *gate.address]) as program:
        for arrival in gate.arrivals(3):
            if arrival.tag == "main":
                arrival.release()
        outcome = program.finish(gone_within=BOUND * NOISE)
        assert outcome.returncode == 3
        outcome.assert_nothing_left()


def test_zygote_killed(kind: str, gate: Gate) -> None:
    """Whoever starts the workers dies first (all processes but the workers and the program): nothing is left either,
    and dead workers are still replaced."""
    source = """
import psutil
kind, host, port = sys.argv[1:]
address = host, int(port)
runner = Runner(kind, 2)
reasons = []
distpool.on_worker_exited(lambda info: reasons.append(info.reason))
workers = {runner.executor.options(pids=[pid]).submit(os.getpid).result(30) for pid in runner.executor.workers}
others = [process for process in psutil.Process().children(recursive=True) if process.pid not in workers]
for process in others:
    process.kill()
psutil.wait_procs(others, 10)
assert runner.call(helpers.square, 3) == 9
assert not reasons or all("zygote process ended" in reason for reason in reasons[:2]), reasons
for ospid in workers:
    try:
        os.kill(ospid, signal.SIGKILL)
    except ProcessLookupError:
        pass
assert runner.call(helpers.square, 4) == 16
calls = [runner.submit(helpers.hold, address, number) for number in range(2)]
assert [runner.value(call) for call in calls] == [0, 1]
runner.close()
print("ok")
"""
    with Program(source, [kind, *gate.address]) as program:
        for arrival in gate.arrivals(2):
            arrival.release()
        outcome = program.finish()
        outcome.assert_clean()
        assert outcome.stdout == "ok\n"
