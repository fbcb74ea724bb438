"""CONFORMANCE 2.6 (C95), 2.7 (C110, C112, C113), C16, C73, C279: spawn, spawnat, fetchfrom, fetch_any, sync."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

import distpool
from distpool import CompositeException, RemoteException, fetch, myid, spawn, spawnat, sync

from .helpers import boom, ident

pytestmark = pytest.mark.time_limit(90)

v2669 = 10


def fail(number: int) -> None:
    raise RuntimeError(number)


def test_C016_fetched_by_two_processes_at_once(team: list[int]) -> None:
    future = spawnat(team[0], lambda: list(range(1000)))
    there = distpool.remotecall(lambda: fetch(future), team[1])
    assert fetch(future) == fetch(there) == list(range(1000))


def test_C073_calls_in_closures(team: list[int]) -> None:
    b1 = lambda: 1  # noqa: E731
    b2 = lambda: fetch(spawnat(team[0], b1)) + 1  # noqa: E731
    b3 = lambda: fetch(spawnat(team[1], b2)) + 1  # noqa: E731
    b4 = lambda: fetch(spawnat(team[2], b3)) + 1  # noqa: E731
    assert b4() == 4


def test_C095_five_failing_tasks(team: list[int]) -> None:
    with pytest.raises(CompositeException) as info, sync():
        for number in range(1, 6):
            spawn(fail, number)
    group = info.value
    assert isinstance(group, ExceptionGroup)
    assert len(group) == 5
    errors = [error for error in group.exceptions if isinstance(error, RemoteException)]
    assert [error.captured.ex.args[0] for error in errors] == [1, 2, 3, 4, 5], "in the order of starting"
    assert "4 more" in str(group)
    assert "RuntimeError: 1" in str(group)


def test_C095_a_single_one(team: list[int]) -> None:
    with pytest.raises(CompositeException) as info, sync():
        spawnat(team[0], boom)
        spawnat(team[1], ident, 1)
    assert len(info.value) == 1


def test_C095_waits_for_everything(team: list[int]) -> None:
    channel = distpool.RemoteChannel(lambda: distpool.Channel(100))

    def put(number: int) -> None:
        distpool.remotecall_fetch(ident, 1, number)
        channel.put(number)

    with sync():
        for number in range(8):
            spawnat([*team, 1][number % 5], put, number)
        distpool.distributed(put, range(100, 110))
        distpool.remotecall(put, distpool.default_worker_pool(), 50)
    taken = [channel.take(timeout=10) for _ in range(19)]
    assert sorted(taken) == [*range(8), 50, *range(100, 110)]
    assert not channel.isready()


def test_C095_lexical_and_per_thread(team: list[int]) -> None:
    with sync():
        with pytest.raises(CompositeException), sync():
            spawn(boom)
        thread = threading.Thread(target=spawn, args=(boom,))
        thread.start()
        thread.join(20)
        with pytest.raises(RemoteException):
            distpool.remotecall_wait(boom, team[0])
        with pytest.raises(RemoteException):
            distpool.fetchfrom(team[0], boom)


def test_C095_the_blocks_own_error(team: list[int]) -> None:
    with pytest.raises(KeyError), sync():
        spawn(boom)
        raise KeyError
    with sync():
        pass


def test_C095_loops_stand_for_their_errors(team: list[int]) -> None:
    with pytest.raises(CompositeException) as info, sync():
        distpool.distributed(fail, range(4))
    assert [error.captured.ex.args[0] for error in info.value.exceptions] == [0, 1, 2, 3]  # type: ignore[attr-defined]


def test_C110_globals_of_the_sender(team: list[int]) -> None:
    assert fetch(spawnat("any", lambda: 1 + v2669)) == 11


def test_C112_C279_a_script_with_qualified_names() -> None:
    script = (
        "import distpool, operator\n"
        "class A:\n    x = 5\n"
        "def double(a): return 2 * a.x * base\n"
        "base = 3\n"
        "p = distpool.addprocs(1)\n"
        "assert distpool.nprocs() == 2 and distpool.workers() == p\n"
        "assert distpool.fetch(distpool.spawn(distpool.myid)) == p[0]\n"
        "assert distpool.remotecall_fetch(operator.add, p[0], 1, 1) == 2\n"
        "distpool.everywhere('k = 7 * myid()')\n"
        "assert distpool.fetchfrom(p[0], lambda: k) == 7, 'a name that the sender has travels'\n"
        "assert distpool.everywhere('k', p[0]) == 14\n"
        "assert distpool.fetchfrom(p[0], double, A()) == 30\n"
        "@distpool.everywhere\n"
        "class B:\n    def __init__(self, x): self.x = x\n"
        "b = distpool.everywhere('B(4)', p[0])\n"
        "assert type(b) is B and b.x == 4\n"
        "assert distpool.everywhere('type(b) is B', p[0], b=b)\n"
        "distpool.rmprocs(p)\n"
        "assert distpool.nprocs() == 1 and distpool.workers() == [1]\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_C113_inside_blocks(team: list[int]) -> None:
    if team:
        futures = [spawnat(pid, nested) for pid in distpool.procs()]
        assert [fetch(future) for future in futures] == [[pid, pid] for pid in distpool.procs()]


def nested() -> list[int]:
    found: list[int] = []
    with sync():
        futures = [spawnat(myid(), myid) for _ in range(2)]
    for future in futures:
        found.append(fetch(future))
    return found


def test_any_goes_round(team: list[int]) -> None:
    assert {distpool.fetch_any(myid) for _ in range(4)} == set(team)
    assert {fetch(spawn(myid)) for _ in range(4)} == set(team)
    assert distpool.fetchfrom(team[0], lambda: {distpool.fetch_any(myid) for _ in range(4)}) == set(team)
    assert distpool.fetchfrom("any", myid) in team


def test_bad_arguments(team: list[int]) -> None:
    with pytest.raises(ValueError, match="no process with id 9999 exists"):
        spawnat(9999, myid)
    with pytest.raises(TypeError):
        spawnat("all", myid)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        spawn(3)  # type: ignore[arg-type]
