"""Threads that outlive the main one and wait for calls that never end: the program ends, but not their own work."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest

from distpool import lingering

SAID = "WARNING The program ends: what still runs on its workers is interrupted."


def run(text: str, standstill: float = 1.0, then: str = "") -> tuple[int, list[str], list[str], float]:
    """Exit status, stdout, stderr, and how long it took to end."""
    code = f"""
import concurrent.futures, logging, threading, time, distpool, distpool.lingering
from distpool import *
logging.basicConfig(format="%(levelname)s %(message)s")
distpool.lingering._STANDSTILL = {standstill}
pids = addprocs(2)
def held(*_):
    time.sleep(1000)
def ended(wait, *arguments):
    try:
        wait(*arguments)
    except ProcessExitedException as error:
        print("ended", error.worker_id, flush=True)
{textwrap.dedent(text)}
print(time.monotonic(), flush=True)
{then}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    said = [line for line in done.stderr.splitlines() if "no further thread" not in line]
    begun, *printed = sorted(done.stdout.splitlines())
    return done.returncode, printed, said, time.monotonic() - float(begun)


@pytest.mark.parametrize(
    "wait",
    {
        "fetch": "target=ended, args=(fetch, remotecall(held, 2))",
        "remotecall_fetch": "target=ended, args=(remotecall_fetch, held, 2)",
        "wait": "target=ended, args=(remotecall_wait, held, 2)",
        "concurrent.futures": "target=ended, args=(lambda f: (concurrent.futures.wait([f]), f.result()), "
        "remotecall(held, 2))",
        "pmap": "target=ended, args=(lambda: pmap(held, range(9), pool=WorkerPool([2])),)",
    }.items(),
    ids=lambda item: item[0],
)
def test_who_waits_for_ever_is_released(wait: tuple[str, str]) -> None:
    code, printed, said, seconds = run(f"threading.Thread({wait[1]}).start()")
    assert (code, printed, said) == (0, ["ended 2"], [SAID]) and seconds < 10


def test_so_is_who_waits_in_an_executor_s_thread() -> None:
    """Of the standard library, whose hook waits for its threads before ours would be called: they are older here."""
    code, printed, said, seconds = run(
        """
        threads = concurrent.futures.ThreadPoolExecutor(2)
        threads.submit(ended, remotecall_fetch, held, 3)
        """
    )
    assert (code, printed, said) == (0, ["ended 3"], [SAID]) and seconds < 10


def test_who_goes_on_with_its_work_finishes_it() -> None:
    """As Python has it: calls, one after the other, or its own between them, for longer than a standstill."""
    code, printed, said, _ = run(
        """
        def work():
            waiting = remotecall(held, 3)
            end = time.monotonic() + 3
            while time.monotonic() < end:
                assert remotecall_fetch(abs, 2, -3) == 3
            time.sleep(2.5)
            print("well", remotecall_fetch(abs, 2, -3), flush=True)
        remotecall_fetch(abs, 2, -3)  # the first one takes longer
        threading.Thread(target=work).start()
        """,
        2.0,
    )
    assert (code, printed, said) == (0, ["well 3"], [SAID]), "of the call that nobody waits for"


def test_executors_finish_theirs() -> None:
    code, printed, said, _ = run(
        """
        def work():
            print("well", executor.submit(time.sleep, 2).result(), flush=True)
        executor = ClusterExecutor(1)
        threading.Thread(target=work).start()
        """,
        0.5,
    )
    assert (code, printed, said) == (0, ["well None"], [])


def test_after_ctrl_c_it_is_gone_at_once() -> None:
    code, printed, said, seconds = run(
        "threading.Thread(target=ended, args=(remotecall_fetch, held, 2)).start()", 30, "raise KeyboardInterrupt"
    )
    assert code != 0 and printed == ["ended 2"] and SAID in said and seconds < 5


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    made = threading.Event()
    yield made
    made.set()


def test_who_waits(gate: threading.Event) -> None:
    assert not lingering.all_wait(), "nobody is left whom Python waits for"
    over: list[bool] = []

    def spin() -> None:
        while not over:
            pass

    waiting = threading.Thread(target=gate.wait)
    waiting.start()
    deadline = time.monotonic() + 30
    while not lingering.all_wait():
        assert time.monotonic() < deadline
    spinning = threading.Thread(target=spin)
    spinning.start()
    while lingering.all_wait():  # it has just begun
        assert time.monotonic() < deadline
    over.append(True)
    gate.set()
    waiting.join()
    spinning.join()
