"""An executor that a task makes has workers that are a group of their own: nothing of the outer one is disturbed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from distpool import (
    Channel,
    ClusterExecutor,
    DistPool,
    RemoteChannel,
    SerializationError,
    myid,
    remotecall,
    remotecall_fetch,
    workers,
)
from distpool.node.group import _first_pid

PATIENCE = 30.0


def test_numbers_do_not_meet() -> None:
    assert _first_pid(1) == 2
    inner = _first_pid(4)
    assert inner > 1 << 16 and _first_pid(5) - inner >= 1 << 16
    for own in (inner, inner + 7, _first_pid(inner), 1 << 15, (1 << 31) + 5):
        first = _first_pid(own)
        assert first < 1 << 32 and first >> 16 != own >> 16 and first >> 16 != 0


def uses_one_of_its_own(other: int, kind: str) -> tuple[int, int, int]:
    """The process of worker `other` as seen before, during and after."""
    before = remotecall_fetch(os.getpid, other)
    with ClusterExecutor(1) if kind == "executor" else DistPool(1).executor as inner:
        assert inner.submit(abs, -1).result(PATIENCE) == 1
        during = remotecall_fetch(os.getpid, other)
    return before, during, remotecall_fetch(os.getpid, other)


@pytest.mark.parametrize("kind", ["executor", "pool"])
def test_the_outer_group_is_as_before(team: list[int], kind: str) -> None:
    """Seen: both groups began at 2, so the task's calls to worker 2 went to its own, and when that ended, everybody was
    told that worker 2 was dead."""
    first, second = team
    real = remotecall_fetch(os.getpid, first)
    pending = remotecall(time.sleep, first, 1)
    assert remotecall_fetch(uses_one_of_its_own, second, first, kind) == (real, real, real)
    assert remotecall_fetch(myid, first) == first
    assert remotecall_fetch(remotecall_fetch, second, myid, first) == first
    assert pending.result(PATIENCE) is None
    assert set(team) <= set(workers())


def test_many_tasks_have_one(make: Callable[..., ClusterExecutor]) -> None:
    def task(number: int) -> Any:
        with DistPool(1) as pool:
            return pool.apply(abs, (-number,))

    executor = make(2)
    assert list(executor.map(task, range(4))) == [0, 1, 2, 3]
    channel = RemoteChannel(lambda: Channel(1))
    assert executor.submit(lambda there: there.put(3), channel).result(PATIENCE) is not None
    assert channel.take(timeout=PATIENCE) == 3


def in_two_levels(depth: int) -> list[int]:
    if not depth:
        return [myid()]
    with ClusterExecutor(1) as inner:
        return [myid(), *inner.submit(in_two_levels, depth - 1).result(PATIENCE)]


def test_groups_within_groups(team: list[int]) -> None:
    numbers = remotecall_fetch(in_two_levels, team[0], 2)
    assert numbers[0] == team[0] and len(set(numbers)) == 3


def puts(channel: Any) -> int:
    channel.put(myid())
    return int(channel.where)


def test_references_within_the_inner_group(team: list[int]) -> None:
    """What the task itself owns, and what its workers keep."""

    def task() -> Any:
        channel = RemoteChannel(lambda: Channel(2))
        with ClusterExecutor(2) as inner:
            where = [inner.submit(puts, channel).result(PATIENCE) for _ in range(2)]
            kept = inner.options(keep=True).submit(abs, -5)
            value = inner.submit(lambda one: one.result() if hasattr(one, "result") else one, kept).result(PATIENCE)
        return where, [channel.take(timeout=PATIENCE) for _ in range(2)], value

    where, numbers, value = remotecall_fetch(task, team[0])
    assert where == [team[0]] * 2 and value == 5
    assert all(number > 1 << 16 for number in numbers)


@pytest.mark.parametrize("how", ["argument", "closure", "map", "pool"])
def test_references_of_the_outer_group_do_not_go_there(team: list[int], how: str) -> None:
    """An error that says so. Seen: the wrong process was asked, or nobody answered."""
    channel = RemoteChannel(lambda: Channel(1))

    def task(given: Any) -> Any:
        with ClusterExecutor(1) as inner:
            if how == "argument":
                return inner.submit(puts, given).exception(PATIENCE)
            if how == "closure":
                return inner.submit(lambda: puts(given)).exception(PATIENCE)
            try:
                return list(inner.map(puts, [given]))
            except SerializationError as error:
                return error

    def in_pool(given: Any) -> Any:
        with DistPool(1) as inner:
            try:
                return inner.apply(puts, (given,))
            except SerializationError as error:
                return error

    error = remotecall_fetch(in_pool if how == "pool" else task, team[0], channel)
    assert isinstance(error, SerializationError) and "a process group of their own" in str(error)
    assert remotecall_fetch(puts, team[0], channel) == 1
