"""What every test of this project gets without asking: an end, and a look at the processes that it left.

A hang is the worst defect of a library like this one, so no test may hang either. Two clocks run for each test (with
its fixtures), and neither needs a plugin:

    time_limit         SIGALRM on the main thread: all stacks go to stderr, then the test fails where it stands
    time_limit + 20 s  faulthandler's C thread, which needs no GIL: all stacks, then this process exits
                       (a plain run ends there; pytest-xdist reports the test as crashed and goes on)

Processes: a test that has closed its executors must leave no child of this process behind (checked after each test,
with a wait of at most five seconds for those that are on their way out). Orphans, which are no longer anybody's
children, are found at the end of the session by a mark in their environment.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

# Here and not in the conftest.py of that directory: other tests, and `pytest_collection` below, import them before it.
pytest.register_assert_rewrite("faults.helpers", "faults.programs", "faults.runners")

GRACE_SECONDS = 20.0
"""Between the soft end of a test and the hard one: time for its fixtures to clean up."""

EXIT_SECONDS = 5.0
"""How long a process may take to go away after the test that used it."""

MARK = "DISTPOOL_TEST_SESSION"
"""Environment variable that everything started by this session inherits."""

HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Children of the standard library that live as long as this process, by their command lines."""

stderr_key = pytest.StashKey[IO[str]]()
mark_key = pytest.StashKey[str]()
forks_key = pytest.StashKey[IO[bytes]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("time_limit", "seconds that one test may take with its fixtures", default="60")


def pytest_configure(config: pytest.Config) -> None:
    # pytest redirects descriptor 2 while a test runs; the dump of a hanging test must reach the real one.
    config.stash[stderr_key] = os.fdopen(os.dup(2), "w")
    # The workers of pytest-xdist share their controller's mark: it looks for orphans when they have all ended.
    config.stash[mark_key] = os.environ[MARK] if is_xdist_worker(config) else uuid.uuid4().hex
    os.environ[MARK] = config.stash[mark_key]
    if not is_xdist_worker(config) and hasattr(os, "register_at_fork"):
        # A fork of this very process shows the environment that this process was started with: no mark.
        forks = config.stash[forks_key] = tempfile.TemporaryFile(buffering=0)
        os.register_at_fork(after_in_child=lambda: note_fork(forks))


def note_fork(forks: IO[bytes]) -> None:
    """In a forked child: leave its process id where the parent will look."""
    if not forks.closed:
        forks.write(b"%d\n" % os.getpid())


def is_xdist_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_unconfigure(config: pytest.Config) -> None:
    faulthandler.cancel_dump_traceback_later()
    for stream in (config.stash.get(stderr_key, None), config.stash.get(forks_key, None)):
        if stream is not None:
            stream.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """With several workers of pytest-xdist: import a share of the test modules before the collection imports all.

    In a fresh checkout the import of a module is mostly pytest's rewriting of its assertions: 13 s of processor for
    all of them, and each worker would do all. What one has rewritten the others read (0.3 s), once they get to it.
    """
    given = getattr(session.config, "workerinput", None)
    if given is None or sys.dont_write_bytecode:
        return
    root = Path(__file__).parent
    left_out = {Path(name).resolve() for name in session.config.getoption("ignore") or ()}
    directories = [path for path in map(Path, session.config.args) if path.is_dir()]
    found = {path.resolve() for directory in directories for path in directory.rglob("test_*.py")}
    paths = sorted(path for path in found if left_out.isdisjoint([path, *path.parents]) and path.is_relative_to(root))
    for path in paths[int(given["workerid"].removeprefix("gw")) :: given["workercount"]]:
        # A module that cannot be imported, or that skips itself, is imported again, and reported, by the collection.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers of pytest-xdist: begin with what takes long, and beside what waits run what computes."""
    count = getattr(config, "workerinput", {}).get("workercount", 1)
    if count > 1:
        items[:] = spread(items, count)


LANES = ("hosts", "ssh", "faults", "conformance")
"""Directories of tests with processes. In the first two a test waits most of its time (for logins, for hosts that do
not answer), in the others it needs the processor: they are begun at the same time, each on a worker of its own."""


def spread(items: list[pytest.Item], count: int) -> list[pytest.Item]:
    """The same tests in an order for `--dist worksteal`, which cuts it into `count` parts of the same length, and lets
    who has finished take over the end of another's part. So each part ends with what is short: tests of one module.
    """
    lanes: dict[str, list[pytest.Item]] = {name: [] for name in LANES}
    rest = []
    for item in items:
        lanes.get(item.path.parent.name, rest).append(item)
    for lane in lanes.values():
        lane.sort(key=lambda item: item.get_closest_marker("slow") is None)  # stable: modules stay together
    chosen: list[pytest.Item] = []
    for number in range(count):
        chosen += [item for name in LANES[number::count] for item in lanes[name]]
        missing = max(0, len(items) * (number + 1) // count - len(chosen))
        chosen += rest[:missing]
        del rest[:missing]
    return chosen + rest


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave out of all later collections what is here for good: thousands of test items and the modules of all tests.

    Many cases ask `gc.collect()` what becomes of *their* objects, some of them in a loop: 0.1 s each time for the rest.
    """
    gc.collect()
    gc.freeze()


def limit_of(item: pytest.Item) -> float:
    """Seconds that this test may take."""
    marker = item.get_closest_marker("time_limit")
    return float(marker.args[0]) if marker else float(item.config.getini("time_limit"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    limit = limit_of(item)
    stream = item.config.stash[stderr_key]
    can_interrupt = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def out_of_time(signum: int, frame: object) -> None:
        stream.write(f"\n{item.nodeid}: longer than {limit:g} s; all threads:\n")
        stream.flush()
        faulthandler.dump_traceback(file=stream, all_threads=True)
        # A BaseException, so that no `except Exception` of the code under test can swallow it.
        pytest.fail(f"took longer than its limit of {limit:g} s (stacks of all threads: on stderr)", pytrace=True)

    faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True, file=stream)
    if can_interrupt:
        previous = signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return (yield)
    finally:
        if can_interrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        faulthandler.cancel_dump_traceback_later()


def is_childless() -> bool:
    """Whether this process has no children, zombies included: one system call, and the usual case between two tests."""
    if not hasattr(os, "waitid"):
        return False  # nobody knows
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def descendants() -> dict[tuple[int, float], psutil.Process]:
    """Living processes below this one, by (process id, start time): ids alone are used again."""
    found: dict[tuple[int, float], psutil.Process] = {}
    if is_childless():
        return found  # to look at all processes of the machine takes milliseconds, twice for each of thousands of tests
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and not is_helper(process):
                found[process.pid, process.create_time()] = process
        except psutil.Error:
            continue
    return found


def is_helper(process: psutil.Process) -> bool:
    """Whether a process belongs to the standard library's own machinery."""
    command = " ".join(process.cmdline())
    return any(name in command for name in HELPERS)


def describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} (parent {process.ppid()}, {process.status()}): {' '.join(process.cmdline())[:200]}"
    except psutil.Error as error:
        return f"{process.pid}: {error}"


@pytest.fixture(autouse=True)
def no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that ends with child processes which were not there before it.

    Executors of module- or session-wide fixtures are older than the test, so their workers are "before". Workers that
    such an executor replaces during a test are covered by the marker ``leaves_processes``.
    """
    if request.node.get_closest_marker("leaves_processes"):
        yield
        return
    before = descendants()
    yield
    left = set(descendants()) - set(before)
    if not left:
        return
    deadline = time.monotonic() + EXIT_SECONDS
    while left and time.monotonic() < deadline:
        now = {key: process for key, process in descendants().items() if key not in before}
        psutil.wait_procs(list(now.values()), timeout=max(0.0, deadline - time.monotonic()))
        left = set(descendants()) - set(before)
    if left:
        alive = descendants()
        lines = [describe(alive[key]) for key in sorted(left) if key in alive]
        for key in left:
            end(alive.get(key))
        pytest.fail("child processes outlived the test:\n  " + "\n  ".join(lines), pytrace=False)


def end(process: psutil.Process | None) -> None:
    """Kill one leftover, so that it is reported once and disturbs no later test."""
    try:
        if process is not None:
            process.kill()
    except psutil.Error:
        pass


def forked_pids(config: pytest.Config) -> set[int]:
    """Process ids of all forks of this process so far."""
    forks = config.stash.get(forks_key, None)
    if forks is None:
        return set()
    return {int(line) for line in os.pread(forks.fileno(), 1 << 20, 0).split()}


def orphans(config: pytest.Config) -> list[psutil.Process]:
    """Living processes of other parents that this session started: they carry its mark, or are forks of it."""
    me = psutil.Process()
    here = {process.pid for process in [me, *me.children(recursive=True)]}
    forked, mark, begin, found = forked_pids(config), config.stash[mark_key], me.create_time(), []
    for process in psutil.process_iter():
        try:
            if process.pid in here or process.status() == psutil.STATUS_ZOMBIE or process.create_time() < begin:
                continue
            if process.pid in forked and process.cmdline() == me.cmdline():
                found.append(process)
            elif process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or somebody else's
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if is_xdist_worker(session.config):
        return
    left = orphans(session.config)
    if left:
        psutil.wait_procs(left, timeout=EXIT_SECONDS)
        left = orphans(session.config)
    if left:
        stream = session.config.stash[stderr_key]
        stream.write("\norphaned processes at the end of the session:\n")
        stream.writelines(f"  {describe(process)}\n" for process in left)
        stream.flush()
        for process in left:
            end(process)
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Executors of a test's own, ended by force if the test has not ended them."""
    from distpool import ClusterExecutor

    made: list[ClusterExecutor] = []

    def one(*args: Any, **options: Any) -> ClusterExecutor:
        made.append(ClusterExecutor(*args, **options))
        return made[-1]

    yield one
    for executor in made:
        executor.kill_workers()
        executor.shutdown()


@pytest.fixture
def gate() -> Iterator[Any]:
    """Where tasks show that they run (`faults.helpers.Gate`). It is closed before the executors and runners of a test
    that asks for it last are: whoever is held goes on."""
    from faults.helpers import Gate

    made = Gate()
    yield made
    made.close()


# -- fixtures of several modules -------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three processes that are played: `fakes.Cluster`."""
    from fakes import Cluster

    return Cluster(monkeypatch, 3)


@pytest.fixture(scope="module")
def team() -> Iterator[list[int]]:
    """Two workers."""
    import distpool

    pids = distpool.addprocs(2)
    yield pids
    distpool.rmprocs(pids)


@pytest.fixture
def mortal() -> Iterator[int]:
    """A worker that the test ends."""
    import distpool

    (pid,) = distpool.addprocs(1)
    yield pid
    distpool.rmprocs(pid)
