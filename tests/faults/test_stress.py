"""Rows F12, F23, F25: many tasks, many cancellations, many deaths; the numbers must add up."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import distpool

from . import helpers
from .helpers import Gate
from .runners import Runner, assert_all_work

pytestmark = pytest.mark.slow

FULL = bool(os.environ.get("DISTPOOL_FAULTS_FULL"))
MOST_KILLS = 100_000 if FULL else 200
"""On a machine so busy that a worker hardly lives longer than its replacement takes, row F25 would take for ever."""
TOTAL = {("executor", "submit"): 1_500, ("executor", "map"): 500, ("pool", "submit"): 500, ("pool", "map"): 1_000}
"""Tasks of row F12: a third of them starts a process, so the full row takes minutes on a busy machine. Each class and
each way is there with many; the replacement of workers, which all four share, knows nothing of either."""
if FULL:
    TOTAL = {case: 10_000 if case[1] == "submit" else 1_000 for case in TOTAL}


# ------------------------------------------------------------------------------------------------------------------ F12


@pytest.mark.time_limit(900 if FULL else 240)
@pytest.mark.parametrize("way", ["submit", "map"])
def test_ten_thousand_tasks_with_three_per_worker(make_runner: Callable[..., Runner], tmp_path: Path, way: str) -> None:
    """Each is executed exactly once, and no process executes more than three."""
    runner = make_runner(2, max_tasks_per_child=3)
    path = tmp_path / "log"
    total = TOTAL[runner.kind, way]
    if way == "submit":
        calls = [runner.submit(helpers.note_process, path, number) for number in range(total)]
        assert [call.value(880) for call in calls] == list(range(total))
    elif runner.kind == "executor":
        assert list(runner.raw.map(helpers.note_process, [path] * total, range(total))) == list(range(total))
    else:
        numbers = [(path, number) for number in range(total)]
        assert runner.raw.starmap(helpers.note_process, numbers, chunksize=1) == list(range(total))
    lines = [line.split() for line in helpers.noted(path).elements()]
    assert Counter(int(number) for number, _ in lines) == Counter(range(total))
    per_process = Counter(process for _, process in lines)
    assert max(per_process.values()) <= 3


# ------------------------------------------------------------------------------------------------------------------ F23


@pytest.mark.time_limit(120)
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_thousand_futures_cancelled_at_random(
    make_runner: Callable[..., Runner], kind: str, tmp_path: Path, seed: int
) -> None:
    """Each ends as value or cancelled; what was cancelled never ran, what ran ran once."""
    if kind != "executor":
        pytest.skip("an AsyncResult cannot be cancelled")
    runner = make_runner(2)
    path = tmp_path / "log"
    chance = random.Random(seed)
    futures = [runner.raw.submit(helpers.note_and_square, path, number) for number in range(10_000)]
    order = list(range(10_000))
    chance.shuffle(order)
    answers: dict[int, bool] = {}

    def cancel(numbers: list[int]) -> None:
        for number in numbers:
            answers[number] = futures[number].cancel()

    threads = [threading.Thread(target=cancel, args=(order[start:7_000:3],)) for start in range(3)]
    for thread in threads:
        thread.start()
    values = cancelled = 0
    for number, future in enumerate(futures):
        try:
            assert future.result(60) == number * number
            values += 1
        except distpool_cancelled():
            cancelled += 1
    for thread in threads:
        thread.join()
    assert values + cancelled == 10_000
    assert cancelled == sum(answers.values())
    assert cancelled > 100
    for number, answer in answers.items():
        assert futures[number].cancelled() == answer
    runner.close()  # nothing is under way any more
    counts = helpers.noted(path)
    assert set(counts.values()) == {1}
    ran = {int(tag) for tag in counts}
    assert ran == {number for number in range(10_000) if not answers.get(number)}


def distpool_cancelled() -> type[BaseException]:
    from concurrent.futures import CancelledError

    return CancelledError


@pytest.mark.time_limit(90)
def test_shutdown_with_cancellation(make_runner: Callable[..., Runner], kind: str, gate: Gate, tmp_path: Path) -> None:
    """`cancel_futures=True` recalls what was sent ahead."""
    if kind != "executor":
        pytest.skip("an AsyncResult cannot be cancelled")
    runner = make_runner(2)
    path = tmp_path / "log"
    held = [runner.submit(helpers.hold, gate.address, number) for number in range(2)]
    arrivals = gate.arrivals(2)
    futures = [runner.raw.submit(helpers.note_and_square, path, number) for number in range(500)]
    runner.raw.shutdown(wait=False, cancel_futures=True)
    for arrival in arrivals:
        arrival.release()
    assert [call.value() for call in held] == [0, 1]
    runner.raw.shutdown(wait=True)
    cancelled = [future.cancelled() for future in futures]
    assert sum(cancelled) >= 490
    assert {int(tag) for tag in helpers.noted(path)} == {n for n, gone in enumerate(cancelled) if not gone}


# ------------------------------------------------------------------------------------------------------------------ F25


@pytest.mark.time_limit(200)
@pytest.mark.parametrize(("kind", "batch_size"), [("executor", 1), ("pool", "auto")])  # a pool's is its executor's
def test_kill_every_fifty_milliseconds(runner: Runner, gate: Gate, batch_size: int | str) -> None:
    """All 20,000 results of a pmap are right and in order, whoever is killed meanwhile; memory stays flat."""
    chance = random.Random(5)
    stop = threading.Event()
    kills = 0

    def kill_at_random() -> None:
        nonlocal kills
        living: list[helpers.Arrival] = []
        while kills < MOST_KILLS and not stop.wait(0.05):  # the row's pace
            try:
                while True:
                    living.append(gate.arrivals(1, 0.001)[0])
            except AssertionError:
                pass  # nobody new
            if living:
                victim = living.pop(chance.randrange(len(living)))
                victim.connection.close()
                try:
                    os.kill(victim.ospid, signal.SIGKILL)
                    kills += 1
                except ProcessLookupError:
                    pass

    address = gate.address
    killer = threading.Thread(target=kill_at_random)
    runner.bring_up()
    before = psutil.Process().memory_info().rss
    killer.start()
    try:
        got = runner.raw.pmap(
            lambda number: helpers.slow_square(address, number),
            range(20_000),
            batch_size=batch_size,
            retry_delays=[0.0] * 20,
            retry_check=distpool.ProcessExitedException,
        )
    finally:
        stop.set()
        killer.join()
    grown = psutil.Process().memory_info().rss - before
    assert got == [number * number for number in range(20_000)]
    assert kills >= 20
    assert grown <= 50 << 20, f"{grown >> 20} MiB grown"
    assert_all_work(runner, 2)
