"""Shared memory and semaphores of `multiprocessing` in workers: whose resource tracker looks after them."""

from __future__ import annotations

import os
import sys
import textwrap
import types
from pathlib import Path

import pytest
from sides import fresh

from distpool import trackers

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="a tracker is found by its path in /proc")

PREAMBLE = """
import multiprocessing, os, sys
from multiprocessing.shared_memory import SharedMemory
from distpool import ClusterExecutor, trackers

def use(name):
    segment = SharedMemory(name=name)
    segment.buf[0] += 1
    value = segment.buf[0]
    segment.close()
    return value

def make():
    segment = SharedMemory(create=True, size=10)
    segment.close()
    return segment.name

def remove(name):
    segment = SharedMemory(name=name)
    segment.close()
    segment.unlink()

def exists(name):
    return os.path.exists("/dev/shm/" + name)
"""

ALONE = "trackers.lend = lambda: None\n"
"""As if the program's tracker could not be reached from the workers."""


def program(source: str, complaints: bool = False, **env: str) -> list[str]:
    """What a program of its own prints; nothing may be said on its stderr, by whomever."""
    done = fresh(PREAMBLE + textwrap.dedent(source), **env)
    assert done.returncode == 0 and (complaints or done.stderr == ""), done.stderr
    return done.stdout.split()


WAYS = [
    {"DISTPOOL_LAUNCH": "fork", "DISTPOOL_TRANSPORT": "unix"},
    {"DISTPOOL_LAUNCH": "fork", "DISTPOOL_TRANSPORT": "tcp"},
    {"DISTPOOL_LAUNCH": "exec"},
]


@pytest.mark.parametrize("before", ["", ALONE], ids=["shared", "alone"])
@pytest.mark.parametrize("way", WAYS, ids=["fork", "tcp", "exec"])
def test_workers_that_go_leave_the_programs_segment_alone(way: dict[str, str], before: str) -> None:
    found = program(
        before
        + textwrap.dedent("""
        segment = SharedMemory(create=True, size=10)
        with ClusterExecutor(1, max_tasks_per_child=1) as executor:
            print(*[executor.submit(use, segment.name).result() for _ in range(3)])
        print(exists(segment.name))
        segment.unlink()
        """),
        **way,
    )
    assert found == ["1", "2", "3", "True"]


@pytest.mark.parametrize("way", WAYS, ids=["fork", "tcp", "exec"])
def test_a_segment_made_by_a_task_lives_as_long_as_the_program(way: dict[str, str]) -> None:
    """Nobody has started the program's tracker before."""
    found = program(
        """
        with ClusterExecutor(1, max_tasks_per_child=1) as executor:
            name = executor.submit(make).result()
            print(*[executor.submit(use, name).result() for _ in range(2)])
        print(exists(name))
        remove(name)
        """,
        **way,
    )
    assert found == ["1", "2", "True"]


def test_what_tasks_leave_is_removed_at_the_end_of_the_program() -> None:
    (name,) = program(
        """
        with ClusterExecutor(2) as executor:
            print(executor.submit(make).result())
        """,
        complaints=True,  # as with the standard library, it says that something was left
    )
    # The program's streams end when its tracker does.
    assert not os.path.exists(f"/dev/shm/{name}")


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_tasks(method: str, asked: bool, tmp_path: Path) -> None:
    """Also if the worker has not needed a tracker before it forks."""
    # Not by value: a child that is not forked imports what it runs.
    (tmp_path / "elsewhere_used.py").write_text(
        "from multiprocessing.shared_memory import SharedMemory\n"
        "def use(name):\n    segment = SharedMemory(name=name); segment.buf[0] += 1; segment.close()\n"
    )
    found = program(
        f"""
        def child(name):
            import warnings
            import elsewhere_used
            warnings.simplefilter("ignore")  # a worker has threads, and may fork all the same
            target = elsewhere_used.use
            process = multiprocessing.get_context({method!r}).Process(target=target, args=(name,))
            process.start()
            process.join()
            return process.exitcode
        segment = SharedMemory(create=True, size=10)
        with ClusterExecutor(1) as executor:
            if {asked}:
                executor.submit(use, segment.name).result()
            before = segment.buf[0]
            print(executor.submit(child, segment.name).result(), segment.buf[0] - before)
        print(exists(segment.name))
        segment.unlink()
        """,
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]),
    )
    assert found == ["0", "1", "True"]


def test_semaphores() -> None:
    """Named ones, which a tracker is told of: those of another process's locks."""
    found = program(
        """
        def lock():
            made = multiprocessing.get_context("spawn").Lock()
            with made:
                return len(made._semlock.name) > 3
        with ClusterExecutor(1, max_tasks_per_child=1) as executor:
            print(*[executor.submit(lock).result() for _ in range(2)])
        """
    )
    assert found == ["True", "True"]


def test_many_threads_of_one_worker_ask_once() -> None:
    found = program(
        """
        def many(name):
            import threading
            threads = [threading.Thread(target=use, args=(name,)) for _ in range(8)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            from multiprocessing import resource_tracker
            return resource_tracker._resource_tracker._pid
        asked = []
        lend = trackers.lend
        def counted():
            asked.append(1)
            return lend()
        trackers.lend = counted
        segment = SharedMemory(create=True, size=10)
        with ClusterExecutor(1) as executor:
            print(executor.submit(many, segment.name).result(), len(asked))
        segment.unlink()
        """
    )
    assert found == ["None", "1"]


# -- without the program's -------------------------------------------------------------------------------------------


def test_alone_what_a_task_has_made_goes_with_its_worker() -> None:
    """And it may attach to that itself, and remove it."""
    found = program(
        ALONE
        + """
def both():
    name = make()
    use(name)
    remove(name)
    return exists(name)
with ClusterExecutor(1) as executor:
    print(executor.submit(both).result())
with ClusterExecutor(1) as executor:
    name = executor.submit(make).result()
    print(name, exists(name), *[executor.submit(use, name).result() for _ in range(2)])
""",
        complaints=True,
    )
    assert [found[0], *found[2:5]] == ["False", "True", "1", "2"]  # and what the tracker has complained of
    assert not os.path.exists(f"/dev/shm/{found[1]}")


def test_alone_a_task_may_remove_what_it_has_attached_to() -> None:
    """Its tracker, which does not know of it, is not asked to forget it: that would print a traceback."""
    found = program(
        ALONE
        + """
name = SharedMemory(create=True, size=10).name
from multiprocessing import resource_tracker
with ClusterExecutor(1) as executor:
    executor.submit(remove, name).result()
resource_tracker.unregister("/" + name, "shared_memory")
print(exists(name))
"""
    )
    assert found == ["False"]


# -- parts -----------------------------------------------------------------------------------------------------------


class Tracker:
    def __init__(self, descriptor: int | None = None) -> None:
        self._fd = descriptor
        self._pid = None

    def ensure_running(self) -> None:
        self._pid = 1  # type: ignore[assignment]


@pytest.mark.parametrize("tracker", [Tracker(7), object(), None])
def test_what_runs_or_is_not_known_is_left_alone(tracker: object) -> None:
    module = types.SimpleNamespace(_resource_tracker=tracker)
    kind = type(tracker)
    trackers.settle(module)
    assert type(tracker) is kind and list(vars(module)) == ["_resource_tracker"]
    trackers.settle(types.SimpleNamespace())


def test_a_path_that_leads_elsewhere_by_now() -> None:
    """Numbers of processes and descriptors are used again."""
    reader, writer = os.pipe()
    try:
        path, status = f"/proc/self/fd/{writer}", os.fstat(writer)
        found = trackers._open(path, status.st_dev, status.st_ino)
        assert os.get_blocking(found) and not os.get_inheritable(found)
        os.write(found, b"x")
        assert os.read(reader, 1) == b"x"
        os.close(found)
        before = set(os.listdir("/proc/self/fd"))
        assert trackers._open(path, status.st_dev, status.st_ino + 1) == -1
        assert set(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(reader)
        os.close(writer)
