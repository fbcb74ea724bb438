"""CONFORMANCE 2.15, 2.16, 2.18, 2.19 over every transport (fixture `kind`): lazy links, deaths, removal, threads.

Cases that cost a worker its life take new ones (`fresh`), reached in the same way as the others.
"""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

import distpool
from distpool import (
    Channel,
    CompositeException,
    Future,
    ProcessExitedException,
    RemoteChannel,
    RemoteException,
    WorkerPool,
    everywhere,
    fetch,
    interrupt,
    isready,
    pmap,
    put,
    remote_do,
    remotecall,
    remotecall_fetch,
    remotecall_wait,
    rmprocs,
    take,
    wait,
    workers,
)
from distpool.node import node as nodes

from . import transports
from .clusters import others
from .conftest import wait_until
from .helpers import forget, ident, keep, kept, make_noticed, myid, ospid, own_nothing


@pytest.fixture
def fresh(kind: str, w: list[int]) -> Iterator[Callable[[int], list[int]]]:
    """`fresh(n)`: pids of n more workers of this kind."""
    before = set(others())
    yield lambda count: transports.add(kind, count)
    rmprocs(set(others()) - before)


def links_made() -> int:
    return nodes.current().peers.opened


def gone(number: int) -> bool:
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# -- links between workers -----------------------------------------------------------------------------------------


def test_C236_lazy_links_are_made_once(fresh: Any) -> None:
    one, two = fresh(2)
    assert [remotecall_fetch(links_made, pid) for pid in (one, two)] == [0, 0]
    for source, target in [(one, two), (two, one)] * 5:
        assert remotecall_fetch(remotecall_fetch, source, myid, target) == target
    assert [remotecall_fetch(links_made, pid) for pid in (one, two)] == [1, 1]


def test_C236_both_sides_at_the_same_moment(fresh: Any) -> None:
    """The first contact from both ends at once, again and again: no hang, no lost call."""
    for _ in range(4):
        pids = fresh(2)
        calls = [
            remotecall(remotecall_fetch, source, myid, target)
            for source, target in [tuple(pids), tuple(reversed(pids))] * 4
        ]
        assert [call.result(20) for call in calls] == list(reversed(pids)) * 4


def test_C268_first_contact_from_many_threads(fresh: Any) -> None:
    one, two, three = fresh(3)

    def storm(targets: list[int]) -> bool:
        with ThreadPoolExecutor(8) as threads:
            numbers = list(threads.map(lambda n: remotecall_fetch(ident, targets[n % 2], n), range(80)))
        return numbers == list(range(80))

    calls = [remotecall(storm, pid, [other for other in (one, two, three) if other != pid]) for pid in (one, two)]
    assert storm([one, two]) and all(call.result(40) for call in calls)


def test_C071_big_values_from_worker_to_worker(w: list[int], scale: float) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(int(2_000_000 * scale), dtype=float)
    there = remotecall(lambda: array * 2, w[1])
    assert remotecall_fetch(lambda: bool((fetch(there) == array * 2).all()), w[0])
    assert remotecall_fetch(lambda: bool((remotecall_fetch(ident, w[2], array) == array).all()), w[0])


def test_C061_a_channel_among_workers(w: list[int]) -> None:
    """Two workers put, two take, the channel is on one of them: each item comes once, in its producer's order."""
    channel = RemoteChannel(lambda: Channel(3), w[1])

    def produce(name: str) -> None:
        for number in range(60):
            channel.put((name, number))

    def consume() -> list[Any]:
        return list(channel)

    consumers = [remotecall(consume, pid) for pid in (w[2], w[1])]
    for producer in [remotecall(produce, pid, name) for pid, name in ((w[0], "a"), (w[3], "b"))]:
        producer.result(40)
    channel.close()
    shares = [consumer.result(20) for consumer in consumers]
    assert sorted(shares[0] + shares[1]) == [(name, number) for name in "ab" for number in range(60)]
    for share in shares:
        for name in "ab":
            numbers = [number for producer, number in share if producer == name]
            assert numbers == sorted(numbers)


def test_C035_C058_references_that_are_passed_on(w: list[int]) -> None:
    """A reference goes from P1 over two workers into a channel of a third, and back: alive all the time, then freed."""
    before = distpool.debug.refs(1)
    store = RemoteChannel(lambda: Channel(100), w[3])
    for number in range(40):
        ref = remotecall(make_noticed, w[0], f"value {number}")
        remotecall_wait(lambda ref: remotecall_fetch(store.put, w[2], [ref]), w[1], ref)
        del ref
        (back,) = store.take(timeout=20)
        assert remotecall_fetch(lambda ref: fetch(ref).name, w[2], back) == f"value {number}"
        del back
    store.finalize()
    wait_until(lambda: own_nothing([1, *w], before), 20)


# -- deaths ----------------------------------------------------------------------------------------------------------


def test_C251_everybody_who_waits_hears_of_the_death(fresh: Any, w: list[int]) -> None:
    (victim,) = fresh(1)
    channel = RemoteChannel(lambda: Channel(1), victim)
    started = RemoteChannel(lambda: Channel(20))
    number = remotecall_fetch(ospid, victim)
    never = Future(victim)

    def nap() -> None:
        started.put("runs")
        while True:
            time.sleep(0.05)

    fetched_later = remotecall(nap, victim)
    waits: list[Callable[[], object]] = [
        lambda: remotecall_fetch(nap, victim),
        lambda: remotecall_wait(nap, victim),
        lambda: fetch(fetched_later),
        lambda: wait(fetched_later),
        lambda: fetch(never),
        lambda: take(channel),
        lambda: wait(channel),
        lambda: remotecall_fetch(take, w[0], channel),
        lambda: remotecall_fetch(fetch, w[1], never),
        lambda: remotecall_fetch(remotecall_fetch, w[2], nap, victim),
    ]
    with ThreadPoolExecutor(len(waits)) as threads:
        calls = [threads.submit(function) for function in waits]
        for _ in range(4):
            assert started.take(timeout=20) == "runs"
        os.kill(number, signal.SIGKILL)
        for call in calls:
            error = call.exception(15)
            while isinstance(error, RemoteException):
                error = error.captured.ex
            assert isinstance(error, ProcessExitedException) and error.worker_id == victim, repr(error)
    for ask in (fetch, wait):
        with pytest.raises(ProcessExitedException):
            ask(fetched_later)
    for use in (lambda: put(channel, 1), lambda: isready(channel), lambda: remotecall(myid, victim)):
        with pytest.raises(ProcessExitedException) as info:
            use()
        assert info.value.worker_id == victim
    for pid in w:
        wait_until(lambda pid=pid: victim not in remotecall_fetch(workers, pid))  # C253
    assert [remotecall_fetch(myid, pid) for pid in w] == w


def test_C255_a_death_while_remote_do_runs_is_lost_silently(
    fresh: Any, capfd: pytest.CaptureFixture[str], w: list[int]
) -> None:
    (victim,) = fresh(1)
    started = RemoteChannel()
    number = remotecall_fetch(ospid, victim)

    def nap() -> None:
        started.put("runs")
        time.sleep(60)

    remote_do(nap, victim)
    assert started.take(timeout=20) == "runs"
    capfd.readouterr()
    os.kill(number, signal.SIGKILL)
    wait_until(lambda: victim not in workers())
    assert remotecall_fetch(myid, w[0]) == w[0]
    assert "Error" not in "".join(capfd.readouterr())


def test_C037_a_dead_worker_has_dropped_its_references(fresh: Any, w: list[int]) -> None:
    (victim,) = fresh(1)
    ref = remotecall_wait(make_noticed, w[0], "held by the victim")
    remotecall_fetch(keep, victim, "ref", ref)
    assert remotecall_fetch(lambda: kept("ref").where, victim) == w[0]
    del ref
    wait_until(lambda: list(distpool.debug.refs(w[0]).values()) == [{victim}])
    os.kill(remotecall_fetch(ospid, victim), signal.SIGKILL)
    wait_until(lambda: own_nothing([w[0]]))
    forget("ref")


def test_C062_the_owner_of_a_channel_between_workers_dies(fresh: Any, w: list[int]) -> None:
    (owner,) = fresh(1)
    channel = RemoteChannel(lambda: Channel(1), owner)
    takers = [remotecall(take, pid, channel) for pid in w[:2]]
    with pytest.raises(TimeoutError):
        takers[0].wait(timeout=0.3)
    os.kill(remotecall_fetch(ospid, owner), signal.SIGKILL)
    for taker in takers:
        with pytest.raises(RemoteException) as info:
            taker.result(15)
        assert isinstance(info.value.captured.ex, ProcessExitedException)
    with pytest.raises(ProcessExitedException):
        take(channel)


# -- removal ---------------------------------------------------------------------------------------------------------


def test_C244_C257_idle_and_busy_workers_are_removed(fresh: Any) -> None:
    pids = fresh(2)
    numbers = [remotecall_fetch(ospid, pid) for pid in pids]
    channel = RemoteChannel()
    busy = remotecall(lambda: channel.take(), pids[0])
    begin = time.monotonic()
    rmprocs(pids)
    assert time.monotonic() - begin < 10
    assert all(gone(number) for number in numbers) and not set(pids) & set(workers())
    with pytest.raises((ProcessExitedException, RemoteException)):
        busy.result(5)
    with pytest.raises(ProcessExitedException) as info:
        remotecall(myid, pids[1])
    assert info.value.worker_id == pids[1]


def test_C250_a_stopped_worker_is_removed(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it was started. It is given a second here; test_rmprocs has the five that users have."""
    begin = distpool.cluster._Removal.begin
    monkeypatch.setattr(distpool.cluster._Removal, "begin", lambda removal: begin(removal, patience=1.0))
    (pid,) = fresh(1)
    number = remotecall_fetch(ospid, pid)
    os.kill(number, signal.SIGSTOP)
    rmprocs(pid)
    assert gone(number) and pid not in workers()


def test_C256_workers_end_when_their_master_is_killed(kind: str) -> None:
    code = f"""
import os, sys, time
sys.path.insert(0, {os.path.dirname(transports.HERE)!r})
import distpool
from conformance import transports
pids = transports.add({kind!r}, 3)
print(*[distpool.remotecall_fetch(os.getpid, pid) for pid in pids], flush=True)
distpool.remotecall_fetch(distpool.remotecall_fetch, pids[0], os.getpid, pids[1])
naps = [distpool.remotecall(time.sleep, pid, 100) for pid in pids[1:]]
os.kill(os.getpid(), 9)
"""
    with tempfile.TemporaryDirectory(prefix="dp-") as left:  # the managers' sockets: who would remove them is dead
        environment = {**os.environ, "PYTHONPATH": transports.ROOT, "TMPDIR": left}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, env=environment)
        numbers = [int(text) for text in done.stdout.split()]
        assert done.returncode == -9 and len(numbers) == 3, done.stderr
        wait_until(lambda: all(gone(number) for number in numbers))


# -- what stands on all this -------------------------------------------------------------------------------------------


def test_C122_maps_and_executors(w: list[int]) -> None:
    assert set(pmap(lambda _: (time.sleep(0.01), myid())[1], range(60), pool=WorkerPool(w))) == set(w)
    assert remotecall_fetch(lambda: pmap(lambda x: x * x, range(20), pool=WorkerPool(w)), w[0]) == [
        x * x for x in range(20)
    ]
    with distpool.ClusterExecutor(WorkerPool(w)) as executor:
        assert list(executor.map(abs, range(-50, 0))) == list(range(50, 0, -1))
        with pytest.raises(ZeroDivisionError):
            executor.submit(lambda: 1 // 0).result(20)
    assert set(w) <= set(workers()), "a borrowed worker stays"


def test_C181_C184_everywhere(w: list[int]) -> None:
    everywhere("number = base + myid()", w, base=100)
    assert [everywhere("number", pid) for pid in w] == [100 + pid for pid in w]
    with pytest.raises(CompositeException) as info:
        everywhere("1 / 0 if myid() in bad else None", w, bad=w[1:3])
    assert [error.pid for error in info.value.exceptions] == w[1:3]


def test_C280_what_workers_print(w: list[int]) -> None:
    lines: list[tuple[int, str]] = []
    distpool.set_output_hook(lambda pid, line: lines.append((pid, line)))
    try:
        for pid in w:
            remotecall_fetch(lambda: (print("to stdout"), print("to stderr", file=sys.stderr)), pid)
        wait_until(lambda: len(lines) >= 2 * len(w))
    finally:
        distpool.set_output_hook(None)
    expected = {(pid, text): 1 for pid in w for text in ("to stdout", "to stderr")}
    assert collections.Counter(lines) == expected


def test_C263_idle_workers_survive_interrupts(w: list[int]) -> None:
    for _ in range(20):
        interrupt(w)
    assert [remotecall_fetch(myid, pid) for pid in w] == w
