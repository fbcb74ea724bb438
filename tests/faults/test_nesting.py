"""Rows F16, F17: tasks that submit, tasks that make pools, tasks that wait for each other."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

import distpool

from . import helpers
from .helpers import NOISE, PATIENCE, Gate, at_most
from .runners import Runner, assert_squares


def fib(executor: Any, number: int) -> int:
    """Every call but the leaves submits two to the same executor and waits for them."""
    if number < 2:
        return number
    first = executor.submit(fib, executor, number - 1)
    second = executor.submit(fib, executor, number - 2)
    value: int = first.result() + second.result()
    return value


def fib_by_map(executor: Any, number: int) -> int:
    return number if number < 2 else sum(executor.map(fib_by_map, [executor] * 2, [number - 1, number - 2]))


# ------------------------------------------------------------------------------------------------------------------ F16


@pytest.mark.parametrize("function", [fib, fib_by_map])
def test_recursion_on_two_workers(runner: Runner, function: Callable[[Any, int], int]) -> None:
    with at_most(10, "fib(12)"):
        assert runner.submit(function, runner.executor, 12).value(10 * NOISE) == 144


def test_recursion_on_one_worker(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(1)
    with at_most(10, "fib(9)"):
        assert runner.submit(fib, runner.executor, 9).value(10 * NOISE) == 34


def fib_by_pmap(executor: Any, number: int) -> int:
    return number if number < 2 else sum(executor.pmap(fib_by_pmap, [executor] * 2, [number - 1, number - 2]))


def fib_by_pgenerate(executor: Any, number: int) -> int:
    if number < 2:
        return number
    return sum(distpool.pgenerate(fib_by_pgenerate, [executor] * 2, [number - 1, number - 2], pool=executor))


@pytest.mark.parametrize("function", [fib_by_pmap, fib_by_pgenerate])
def test_recursion_by_maps_on_one_worker(make_runner: Callable[..., Runner], function: Any) -> None:
    runner = make_runner(1)
    with at_most(10, "fib(7)"):
        assert runner.submit(function, runner.executor, 7).value(10 * NOISE) == 13


POLICIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "label": lambda executor: {"label": "view"},
    "retries": lambda executor: {"retries": 1},
    "limit": lambda executor: {"timeout": PATIENCE},
    "pinned": lambda executor: {"pids": executor.workers[:1]},
    "pinned with limit": lambda executor: {"pids": executor.workers[:1], "timeout": PATIENCE, "retries": 1},
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_recursion_through_a_view(policy: str, workers: int) -> None:
    with distpool.ClusterExecutor(workers) as executor:
        assert executor.submit(pow, 2, 3).result(PATIENCE) == 8
        view = executor.options(**POLICIES[policy](executor))
        for outer, inner in (view, view), (executor, view), (view, executor):
            assert outer.submit(fib, inner, 6).result(PATIENCE) == 8


def test_recursion_under_the_time_limit_of_the_executor() -> None:
    with distpool.ClusterExecutor(1, timeout=PATIENCE) as executor:
        assert executor.submit(fib, executor, 6).result(PATIENCE) == 8


@pytest.mark.parametrize(("workers", "tasks"), [(1, 1), (1, 3), (2, 1)])
def test_recursion_on_workers_that_run_few_tasks(workers: int, tasks: int) -> None:
    """What a task waits for runs on its worker, even if that has had its tasks and will be replaced after this one."""
    with distpool.ClusterExecutor(workers, max_tasks_per_child=tasks) as executor:
        assert executor.submit(fib, executor, 4).result(PATIENCE) == 3
        first, second = (executor.submit(os.getpid).result(PATIENCE) for _ in range(2))
        assert tasks > 1 or first != second


def test_two_executors_whose_tasks_wait_for_each_other() -> None:
    with distpool.ClusterExecutor(2) as first, distpool.ClusterExecutor(1) as second:

        def there(number: int) -> int:
            return 1 + second.submit(back, number).result()

        def back(number: int) -> int:
            return 1 + first.submit(helpers.square, number).result()

        for _ in range(3):
            assert list(first.map(there, range(6))) == [number * number + 2 for number in range(6)]


def test_the_limit_of_a_task_that_waits_is_its_own(gate: Gate) -> None:
    """Its worker goes, and with it what that had been sent meanwhile; only the task itself has taken too long."""
    with distpool.ClusterExecutor(1) as executor:
        address = gate.address
        outer = executor.options(timeout=1).submit(lambda: executor.submit(helpers.hold, address, "inner").result())
        gate.arrival(NOISE * 2)
        other = executor.submit(pow, 2, 3)
        with pytest.raises(TimeoutError, match="ran for more than 1 seconds"):
            outer.result(PATIENCE)
        assert other.result(PATIENCE) == 8


class Own(distpool.ClusterExecutor):
    """A user's class."""


def test_an_executor_of_a_users_class_is_sent_as_well() -> None:
    with Own(1) as executor:
        view = executor.options(label="view")
        for handle in executor, view:
            assert executor.submit(lambda handle=handle: handle.submit(pow, 2, 3).result()).result(PATIENCE) == 8


def fib_by_wait(executor: Any, number: int) -> int:
    if number < 2:
        return number
    calls = [executor.submit(fib_by_wait, executor, number - step) for step in (1, 2)]
    done, rest = concurrent.futures.wait(calls)
    assert not rest
    return sum(call.result() for call in done)


def fib_by_first(executor: Any, number: int) -> int:
    rest: Any = [executor.submit(fib_by_first, executor, number - step) for step in (1, 2)] if number > 1 else []
    total = 0 if rest else number
    while rest:
        done, rest = concurrent.futures.wait(rest, return_when=concurrent.futures.FIRST_COMPLETED)
        total += sum(call.result() for call in done)
    return total


def fib_as_completed(executor: Any, number: int) -> int:
    if number < 2:
        return number
    calls = [executor.submit(fib_as_completed, executor, number - step) for step in (1, 2)]
    return sum(call.result() for call in concurrent.futures.as_completed(calls))


def fib_by_await(executor: Any, number: int) -> int:
    async def both() -> int:
        calls = [executor.submit(fib_by_await, executor, number - step) for step in (1, 2)]

        async def one(call: Any) -> int:
            return int(await call)

        return sum(await asyncio.gather(*map(one, calls)))

    return number if number < 2 else asyncio.run(both())


@pytest.mark.parametrize("function", [fib_by_wait, fib_by_first, fib_as_completed, fib_by_await])
def test_tasks_that_wait_in_ways_of_the_standard_library(runner: Runner, function: Callable[[Any, int], int]) -> None:
    """All workers wait for what they have submitted themselves: each has given its slot away."""
    with at_most(10, "fib(8)"):
        calls = [runner.submit(function, runner.executor, 8) for _ in range(2)]
        assert [call.value(10 * NOISE) for call in calls] == [21, 21]
    assert_squares([runner.submit(helpers.square, number) for number in range(50)])


def test_a_wait_that_times_out_takes_the_slot_back(runner: Runner, gate: Gate) -> None:
    executor, address = runner.executor, gate.address

    def act() -> tuple[int, int]:
        call = executor.submit(helpers.hold, address, "inner")
        done, rest = concurrent.futures.wait([call], timeout=0.2)
        return len(done), len(rest)

    assert runner.submit(act).value() == (0, 1)
    gate.arrival(2 * NOISE).release()
    assert_squares([runner.submit(helpers.square, number) for number in range(50)])


def test_captured_executor(runner: Runner) -> None:
    """A closure over the executor is a handle as well."""
    executor = runner.executor

    def act(number: int) -> int:
        value: int = executor.submit(helpers.square, number).result()
        return value + 1

    assert [runner.submit(act, number).value() for number in range(5)] == [1, 2, 5, 10, 17]


def test_elements_of_a_map_that_wait_now_and_then(runner: Runner) -> None:
    """The elements behind one that waits are run meanwhile, and are answered before it."""
    executor = runner.executor

    def work(number: int) -> int:
        return int(executor.submit(abs, number).result()) if number % 7 == 3 else number

    for _ in range(5):
        assert list(executor.map(work, range(400))) == list(range(400))


def test_error_and_death_inside(runner: Runner) -> None:
    """What fails inside arrives where it was submitted, one level up."""
    runner.bring_up()  # a worker that is alone runs the inner call as well, and takes the outer one along
    executor = runner.executor

    def act(how: str) -> str:
        inner = executor.submit(helpers.fail, "inside") if how == "error" else executor.submit(helpers.die, how)
        return type(inner.exception()).__name__

    assert runner.submit(act, "error").value() == "ValueError"
    assert runner.submit(act, "SIGKILL").value() == "ProcessExitedException"


def test_pool_is_not_sent(make_runner: Callable[..., Runner], kind: str) -> None:
    if kind != "pool":
        pytest.skip("executors are sent")
    runner = make_runner(1)
    error = runner.submit(helpers.identity, runner.raw).error()
    assert isinstance(error, (NotImplementedError, distpool.SerializationError))
    assert "pool objects cannot be passed" in f"{error} {error.__cause__}"


def nested_executor(number: int) -> list[int]:
    with distpool.ClusterExecutor(1) as inner:
        return list(inner.map(helpers.square, range(number)))


def nested_pool(number: int) -> list[int]:
    with distpool.DistPool(1) as inner:
        values: list[int] = inner.map(helpers.square, range(number))
        return values


def nested_stdlib_executor(number: int) -> list[int]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as inner:
        return list(inner.map(helpers.square, range(number)))


def nested_stdlib_pool(number: int) -> list[int]:
    with multiprocessing.get_context("spawn").Pool(1) as inner:
        return inner.map(helpers.square, range(number))


@pytest.mark.parametrize("function", [nested_executor, nested_pool, nested_stdlib_executor, nested_stdlib_pool])
def test_pool_made_inside_a_task(runner: Runner, function: Callable[[int], list[int]]) -> None:
    with at_most(10, "a nested pool"):
        calls = [runner.submit(function, number) for number in (3, 4)]
        assert [call.value(10 * NOISE) for call in calls] == [[0, 1, 4], [0, 1, 4, 9]]
    assert_squares([runner.submit(helpers.square, number) for number in range(20)])


# ------------------------------------------------------------------------------------------------------------------ F17


@pytest.mark.parametrize("between", [0, 1, 5, 20])
def test_two_tasks_that_wait_for_each_other(runner: Runner, gate: Gate, between: int) -> None:
    """Both have to run at once, though short calls before them made the windows wide."""
    assert_squares([runner.submit(helpers.square, number) for number in range(300)])
    for _ in range(10):
        first = runner.submit(helpers.hold, gate.address, "first")
        fillers = [runner.submit(helpers.square, number) for number in range(between)]
        second = runner.submit(helpers.hold, gate.address, "second")
        arrivals = gate.arrivals(2, 2 * NOISE)
        for arrival in arrivals:
            arrival.release()
        assert (first.value(), second.value()) == ("first", "second")
        assert_squares(fillers)


def test_the_other_worker_is_busy_for_a_moment(runner: Runner, gate: Gate) -> None:
    """While one worker is held both go to the other; the one let go has to take the second."""
    assert_squares([runner.submit(helpers.square, number) for number in range(300)])
    for _ in range(10):
        held = runner.submit(helpers.hold, gate.address, "held")
        holder = gate.arrival(2 * NOISE)
        pair = [runner.submit(helpers.hold, gate.address, name) for name in ("first", "second")]
        first = gate.arrival(2 * NOISE)
        holder.release()
        second = gate.arrival(2 * NOISE)
        assert {first.tag, second.tag} == {"first", "second"}
        first.release()
        second.release()
        assert [call.value() for call in pair] == ["first", "second"]
        assert held.value() == "held"


def test_a_long_task_keeps_nobody_behind_it(runner: Runner, gate: Gate) -> None:
    """One worker is held for good; everything else passes by."""
    assert_squares([runner.submit(helpers.square, number) for number in range(300)])
    calls = [runner.submit(helpers.square, number) for number in range(50)]
    held = runner.submit(helpers.hold, gate.address, "held")
    calls += [runner.submit(helpers.square, number) for number in range(50, 100)]
    arrival = gate.arrival()
    with at_most(2, "ninety-nine short calls"):
        assert_squares(calls)
    arrival.release()
    assert held.value() == "held"


@pytest.mark.parametrize("warm", [0, 300])
@pytest.mark.parametrize("how", ["python", "c", "stopped"])
def test_nobody_waits_behind_a_task_that_never_ends(runner: Runner, gate: Gate, how: str, warm: int) -> None:
    """Whatever its worker was sent besides runs elsewhere, even if that worker cannot be asked to give it back."""
    assert_squares([runner.submit(helpers.square, number) for number in range(warm)])
    calls = [runner.submit(helpers.square, number) for number in range(10)]
    runner.submit(helpers.be_busy, gate.address, how)
    calls += [runner.submit(helpers.square, number) for number in range(10, 40)]
    gate.arrival()
    end = time.monotonic() + 2 * NOISE
    waiting = [number for number, call in enumerate(calls) if not call.settled(max(0.0, end - time.monotonic()))]
    assert not waiting, f"{len(waiting)} of 40 short calls wait behind it"
    assert_squares(calls)


def test_tasks_in_one_map_that_wait_for_each_other(runner: Runner, gate: Gate) -> None:
    """Neighbours of one map, which a batch would put behind one another."""
    address = gate.address
    list(runner.raw.map(helpers.square, range(300)))
    results: list[list[int]] = []

    def consume() -> None:
        results.append(list(runner.raw.map(lambda number: helpers.hold(address, number), range(6), chunksize=1)))

    consumer = threading.Thread(target=consume)
    consumer.start()
    for _ in range(3):
        for arrival in gate.arrivals(2, 2 * NOISE):
            arrival.release()
    consumer.join(PATIENCE)
    assert results == [[0, 1, 2, 3, 4, 5]]


def test_through_a_channel(runner: Runner) -> None:
    """The same through the package's own channels."""
    there, back = distpool.RemoteChannel(), distpool.RemoteChannel()

    def ask(question: Any, answer: Any) -> int:
        question.put(20)
        return int(answer.take())

    def reply(question: Any, answer: Any) -> int:
        number = int(question.take())
        answer.put(number + 1)
        return number

    assert_squares([runner.submit(helpers.square, number) for number in range(300)])
    with at_most(2, "ten pairs"):
        for _ in range(10):
            calls = runner.submit(ask, there, back), runner.submit(reply, there, back)
            assert [call.value(2 * NOISE) for call in calls] == [21, 20]


def _two_inside(executor: Any, number: int) -> int:
    first: int = executor.submit(helpers.square, number).result()
    second: int = executor.submit(helpers.square, 1).result()
    return first + second


def test_interrupts_of_tasks_that_wait_for_tasks(runner: Runner) -> None:
    """Each ends in its value or KeyboardInterrupt, and the workers' slots are as free as before."""
    runner.bring_up()
    for number in range(100):
        calls = [runner.submit(_two_inside, runner.executor, number) for _ in range(6)]
        calls[number % 6].settled(0.001 * (number % 7))
        distpool.interrupt(runner.executor.workers)
        for call in calls:
            value, error = call.outcome()
            assert value == number * number + 1 or isinstance(error, KeyboardInterrupt)
    with at_most(10, "fib(12)"):
        assert runner.submit(fib, runner.executor, 12).value(10 * NOISE) == 144


def _inside(executor: Any, address: Any) -> set[str]:
    """One of them runs while the others are cancelled."""
    futures = [executor.submit(helpers.hold, address, "first")]
    futures += [executor.submit(helpers.square, number) for number in range(9)]
    futures.pop().cancel()  # the owner has answered, so it has all of them
    helpers.show(address, "all")
    return {"cancelled" if future.cancelled() else "value" for future in concurrent.futures.wait(futures).done}


def test_a_task_hears_that_the_end_of_the_executor_has_cancelled_its_calls(gate: Gate) -> None:
    """It waited for ever, and `shutdown` for it."""
    with distpool.ClusterExecutor(1) as executor:
        task = executor.submit(_inside, executor, gate.address)
        first = next(arrival for arrival in gate.arrivals(2) if arrival.tag == "first")
        executor.shutdown(wait=False, cancel_futures=True)
        first.release()
        assert task.result(PATIENCE) == {"cancelled", "value"}


def test_an_executor_in_a_remote_call_and_in_a_task_of_another_one() -> None:
    """Both waited for ever: their processes are none of its workers."""

    def act(executor: Any) -> int:
        value: int = executor.submit(helpers.square, 3).result()
        return value

    (pid,) = distpool.addprocs(1)
    try:
        with distpool.ClusterExecutor(1) as executor, distpool.ClusterExecutor(1) as other:
            assert distpool.remotecall(act, pid, executor).result(PATIENCE) == 9
            assert other.submit(act, executor).result(PATIENCE) == 9
    finally:
        distpool.rmprocs(pid).result(PATIENCE)
