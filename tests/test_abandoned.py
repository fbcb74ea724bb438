"""Maps that nobody wants any more: the references in their values and arguments go back, whoever works on them."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import distpool
from distpool import Channel, ClusterExecutor, DistPool, RemoteChannel, pgenerate, pmap, remotecall_fetch
from distpool.node import node as nodes

WAIT = 30.0
OPENED: list[int] = []
SOON = 5.0  # one second on a machine that has nothing else to do


@pytest.fixture(scope="module")
def team() -> Iterator[list[int]]:
    pids = distpool.addprocs(3)
    yield pids
    distpool.rmprocs(pids)
    while OPENED:
        os.close(OPENED.pop())


@pytest.fixture
def executor() -> Iterator[ClusterExecutor]:
    with ClusterExecutor(2) as executor:
        yield executor


@pytest.fixture
def pool() -> Iterator[DistPool]:
    with DistPool(2) as pool:
        yield pool


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[str]:
    """Calls that hold on to it end with the test. They wait in the system, so that they keep their slots."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    yield str(path)
    OPENED.append(os.open(path, os.O_RDWR))  # and stays so: who comes late does not wait either


def wait_until(holds: Callable[[], object], seconds: float = WAIT) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        gc.collect()
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)


def owned(owner: int) -> int:
    return len(distpool.debug.refs(owner))


def make(owner: int) -> list[Any]:
    return [RemoteChannel(lambda: Channel(1), owner)]


def make_or_refuse(owner: int) -> list[Any]:
    if owner < 0:
        raise ValueError("refused")
    return make(owner)


def hold_on(path: str) -> None:
    """Until the gate opens, without giving the slot away."""
    os.close(os.open(path, os.O_RDONLY))


def make_or_hold_on(argument: Any) -> Any:
    return hold_on(argument) if isinstance(argument, str) else make(argument)


def take(argument: Any) -> None:
    pass


def test_executor_maps(team: list[int], executor: ClusterExecutor) -> None:
    owner = team[0]
    for chunksize, read in itertools.product((1, 4), (0, 1, 5)):
        found = executor.map(make, [owner] * 20, chunksize=chunksize)
        for _ in range(read):
            next(found)
        del found
        wait_until(lambda: not owned(owner), SOON)
    found = executor.imap_unordered(make, itertools.repeat(owner))
    next(found)
    del found
    wait_until(lambda: not owned(owner), SOON)


@pytest.mark.parametrize("read", [0, 1])
def test_maps_that_are_still_worked_on(team: list[int], executor: ClusterExecutor, gate: str, read: int) -> None:
    """The last call runs on, the values of the others go."""
    owner = team[0]
    found = executor.map(make_or_hold_on, [owner] * 10 + [gate])
    wait_until(lambda: owned(owner))
    for _ in range(read):
        next(found)
    del found
    wait_until(lambda: not owned(owner), SOON)


def test_arguments_that_were_not_sent(team: list[int], executor: ClusterExecutor, gate: str) -> None:
    """Both workers are busy, and other calls wait before the map."""
    owner = team[0]
    others = [executor.submit(hold_on, gate) for _ in range(4)]
    found = executor.map(take, [RemoteChannel(lambda: Channel(1), owner) for _ in range(5)], buffersize=5)
    later = executor.submit(abs, -1)
    assert owned(owner) == 5
    del found
    wait_until(lambda: not owned(owner), SOON)
    assert not later.done()
    for other in others:
        other.cancel()


@pytest.mark.parametrize("chunksize", [1, 3])
@pytest.mark.parametrize("kind", ["imap", "imap_unordered"])
def test_imap(team: list[int], pool: DistPool, kind: str, chunksize: int) -> None:
    owner = team[0]
    for read in (0, 1, 5):
        for source in ([owner] * 20, (owner for _ in range(20))):
            found = getattr(pool, kind)(make, source, chunksize)
            for _ in range(read):
                next(found)
            if not read:
                wait_until(lambda: owned(owner))
            del found
            wait_until(lambda: not owned(owner), SOON)


@pytest.mark.parametrize("chunksize", [1, 3])
@pytest.mark.parametrize("policy", [False, True])
def test_map_async(team: list[int], pool: DistPool, chunksize: int, policy: bool) -> None:
    owner = team[0]
    with DistPool(1, timeout=WAIT) if policy else contextlib.nullcontext(pool) as used:
        for start in (
            lambda: used.map_async(make, [owner] * 10, chunksize),
            lambda: used.starmap_async(make, [(owner,)] * 10, chunksize),
            lambda: used.imap(make, [owner] * 10, chunksize),
        ):
            result = start()
            wait_until(lambda: owned(owner))
            del result
            wait_until(lambda: not owned(owner), SOON)


@pytest.mark.parametrize("kind", ["map_async", "imap", "imap_unordered"])
def test_pool_maps_that_are_still_worked_on(team: list[int], pool: DistPool, gate: str, kind: str) -> None:
    """All of it runs, but the values are nobody's."""
    owner = team[0]
    result = getattr(pool, kind)(make_or_hold_on, [owner] * 10 + [gate], 1)
    wait_until(lambda: owned(owner) == 10)
    del result
    wait_until(lambda: not owned(owner), SOON)


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
@pytest.mark.parametrize("where", ["executor", "WorkerPool", "CachingPool"])
def test_pmap_that_an_error_stops(
    team: list[int], executor: ClusterExecutor, where: str, batch_size: int | str
) -> None:
    owner, *others = team
    pool = executor if where == "executor" else getattr(distpool, where)(others)
    with pytest.raises(ValueError, match="refused"):
        pmap(make_or_refuse, [owner] * 10 + [-1] + [owner] * 10, pool=pool, batch_size=batch_size)
    wait_until(lambda: not owned(owner), SOON)


@pytest.mark.parametrize("where", ["executor", "WorkerPool", "CachingPool"])
def test_pgenerate(team: list[int], executor: ClusterExecutor, where: str) -> None:
    owner, *others = team
    pool = executor if where == "executor" else getattr(distpool, where)(others)
    for read in (0, 1, 5):
        found = pgenerate(make, itertools.repeat(owner), pool=pool)
        for _ in range(read):
            next(found)
        del found
        wait_until(lambda: not owned(owner), SOON)


def make_and_drop_maps(owner: int, other: int) -> None:
    """On a worker: a map in which it is a member, and one in which it is not."""
    for pids in ([nodes.current().pid, other], [other]):
        for batch_size in (1, 4):
            with pytest.raises(ValueError, match="refused"):
                pmap(
                    make_or_refuse,
                    [owner] * 10 + [-1] + [owner] * 10,
                    pool=distpool.WorkerPool(pids),
                    batch_size=batch_size,
                )
        found = pgenerate(make, itertools.repeat(owner), pool=distpool.WorkerPool(pids))
        next(found)
        del found


def test_maps_of_a_worker(team: list[int]) -> None:
    owner, there, other = team
    remotecall_fetch(make_and_drop_maps, there, owner, other)
    for pid in (there, other):
        remotecall_fetch(gc.collect, pid)
    wait_until(lambda: not owned(owner), SOON)


def test_a_batch_whose_answer_nobody_reads(team: list[int]) -> None:
    """The answer to several elements holds their values as bytes: what they refer to is found all the same."""
    from distpool.batches import Batch, run_batch
    from distpool.replies import request

    owner, other, _ = team
    batch = Batch(nodes.current(), other, True, [owner, -1, owner])
    future = request(run_batch, other, batch.message(make_or_refuse))
    wait_until(future.done)
    wait_until(lambda: owned(owner) == 2)
    batch.broken(RuntimeError("nobody wants it"))
    del batch, future
    wait_until(lambda: not owned(owner), SOON)
