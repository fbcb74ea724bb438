"""Row F19: no descriptors, no shared memory, no temporary directory, no fork: a clear error on what needed it."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from pathlib import Path

import psutil
import pytest

from .programs import Outcome, Program, run

pytestmark = pytest.mark.time_limit(90)

HOG = """
import pickle, resource

def use_up_descriptors():
    '''Lower the limit, then open until nothing is left.'''
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    hog = []
    try:
        while True:
            hog.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return hog

def free_descriptors(hog):
    for descriptor in hog:
        os.close(descriptor)

def outcome_of(act):
    '''A value or an error that says what is missing, in words of the operating system.'''
    try:
        return act()
    except Exception as error:
        import traceback
        text = "".join(traceback.format_exception(error))
        known = "Too many open files", "no file descriptors left", "No space left", \\
            "temporarily unavailable", "can't start new thread", "Cannot allocate", \\
            "No such file", "Permission denied", "Read-only", "No usable temporary"
        assert any(words in text for words in known), text
        return "clear error"

def use_all(runner):
    '''Small, many, big both ways, by value.'''
    assert runner.call(helpers.square, 3) == 9
    assert list(runner.raw.map(helpers.square, range(100))) == [number * number for number in range(100)]
    assert runner.call(len, bytes(10 << 20)) == 10 << 20
    assert runner.call(bytes, 10 << 20) == bytes(10 << 20)
    big = pickle.PickleBuffer(bytes(10 << 20))  # beside the pickle, as arrays are
    assert runner.call(bytes, big) == bytes(runner.call(pickle.PickleBuffer, bytes(10 << 20))) == bytes(10 << 20)
    assert runner.call(lambda: "by value") == "by value"
    return "works"
"""


def assert_says(outcome: Outcome, *lines: str) -> None:
    assert outcome.stdout.splitlines() == list(lines), f"{outcome.stdout}\n{outcome.stderr}"
    outcome.assert_clean()


CALLER = (
    HOG
    + """
kind = sys.argv[1]
runner = Runner(kind, 2)
use_all(runner)
hog = use_up_descriptors()
print(use_all(runner))
other = Runner(kind, 1)
outcome = outcome_of(lambda: other.call(helpers.square, 3))
assert outcome in (9, "clear error"), outcome
print("answered")
free_descriptors(hog)
other.executor.kill_workers()
print(use_all(runner))
third = Runner(kind, 1)
print(use_all(third))
for one in (runner, third):
    one.close()
"""
)


def test_descriptors_of_the_caller(kind: str) -> None:
    """Living workers go on, big arguments included; a new executor answers; all is well when there are some again."""
    assert_says(run(CALLER, kind, seconds=60), "works", "answered", "works", "works")


REPLACING = (
    HOG
    + """
kind = sys.argv[1]
runner = Runner(kind, 2)
use_all(runner)
victim = runner.call(os.getpid)
hog = use_up_descriptors()
os.kill(victim, signal.SIGKILL)
calls = [runner.submit(helpers.square, number) for number in range(100)]
for number, call in enumerate(calls):  # on the worker that is left, or on the replacement
    assert runner.value(call) == number * number
print("works")
free_descriptors(hog)
print(use_all(runner))
runner.close()
"""
)


def test_death_while_descriptors_are_out(kind: str) -> None:
    assert_says(run(REPLACING, kind, seconds=60), "works", "works")


ALL_DEAD = (
    HOG
    + """
kind = sys.argv[1]
runner = Runner(kind, 1)
use_all(runner)
victim = runner.call(os.getpid)
hog = use_up_descriptors()
os.kill(victim, signal.SIGKILL)
calls = [runner.submit(helpers.square, number) for number in range(5)]
for number, call in enumerate(calls):
    assert outcome_of(lambda: runner.value(call)) in (number * number, "clear error")
print("answered")
free_descriptors(hog)
runner.executor.kill_workers()
another = Runner(kind, 1)
print(use_all(another))
another.close()
"""
)


def test_no_worker_left_and_no_descriptors(kind: str) -> None:
    """If none can be started every future fails: never a hang."""
    assert_says(run(ALL_DEAD, kind, seconds=60), "answered", "works")


WORKER = (
    HOG
    + """
kind = sys.argv[1]
runner = Runner(kind, 1)
use_all(runner)
hog = runner.call(use_up_descriptors)
print(runner.call(helpers.square, 3), runner.call(len, bytes(10 << 20)), len(runner.call(bytes, 10 << 20)))
outcome = outcome_of(lambda: runner.call(helpers.noted, helpers.Path("/nowhere")))
print(len(hog) > 100)
runner.call(free_descriptors, hog)
print(use_all(runner))
runner.close()
"""
)


def test_descriptors_of_a_worker(kind: str) -> None:
    """A task that leaks them all: calls and big values still go through."""
    assert_says(run(WORKER, kind, seconds=60), "9 10485760 10485760", "True", "works")


CLOSING = (
    HOG
    + """
kind = sys.argv[1]
runner = Runner(kind, 2)
use_all(runner)
runner.call(os.closerange, 0, 3)
print(use_all(runner))
call = runner.submit(os.closerange, 3, 2000)
try:
    runner.value(call)
except Exception as error:
    assert isinstance(error, distpool.ProcessExitedException), error
print(use_all(runner))
runner.close()
"""
)


def test_task_closes_the_descriptors_of_its_worker(kind: str) -> None:
    """Standard streams: no matter. All of them: that call at most, and another worker."""
    assert_says(run(CLOSING, kind, seconds=60), "works", "works")


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_caller_without_standard_streams(kind: str, tmp_path: Path, streams: str) -> None:
    """Descriptors 0 to 2 may be closed, so that ours could get those numbers; workers print all the same."""
    source = (
        HOG
        + """
runner = Runner(sys.argv[1], 2)
runner.call(print, "a line")
use_all(runner)
runner.close()
helpers.note(sys.argv[2], "done")
"""
    )
    path = tmp_path / "done"
    prefix = ["/bin/sh", "-c", f'exec "$@" {streams}', "sh"]
    with Program(source, [kind, path], prefix=prefix) as program:
        outcome = program.finish()
    assert helpers_noted(path) == 1, outcome.stderr
    outcome.assert_clean()


def test_reader_of_the_output_goes_away(kind: str) -> None:
    """`program | head -1`: workers that print must not fail, nor hang, because nobody reads."""
    source = """
runner = Runner(sys.argv[1], 2)
for round_ in range(5):
    for call in [runner.submit(print, "x" * 100_000) for _ in range(20)]:
        runner.value(call)
assert runner.call(helpers.square, 3) == 9
runner.close()
helpers.note(os.path.join(os.environ["TMPDIR"], "..", "done"), "done")
os._exit(0)  # Python's own complaint about the broken pipe at exit is not ours
"""
    prefix = ["/bin/sh", "-c", '"$@" | head -c 1 > /dev/null', "sh"]
    with Program(source, [kind], prefix=prefix) as program:
        outcome = program.finish()
        done = helpers_noted(program.home / "done")
    assert done == 1, outcome.stderr
    outcome.assert_nothing_left()


def helpers_noted(path: Path) -> int:
    from .helpers import noted

    return noted(path)["done"]


# -------------------------------------------------------------------------------------- places that are full or missing

PLACES = (
    HOG
    + """
kind = sys.argv[1]
if len(sys.argv) > 2:
    import tempfile
    tempfile.tempdir = sys.argv[2]
runner = Runner(kind, 2)
print(outcome_of(lambda: use_all(runner)))
runner.executor.kill_workers()
"""
)


def mount(command: str) -> list[str]:
    """A prefix that runs the program in a mount namespace of its own; skips where that is not allowed."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    return ["unshare", "-m", "/bin/sh", "-c", f'{command} && exec "$@"', "sh"]


@pytest.mark.parametrize(
    "command",
    [
        "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full",
        "mount -t tmpfs -o ro tmpfs /dev/shm",
        "umount -l /dev/shm",
    ],
    ids=["full", "read-only", "missing"],
)
def test_shared_memory(kind: str, command: str) -> None:
    """Big values take another way."""
    with Program(PLACES, [kind], prefix=mount(command)) as program:
        assert_says(program.finish(), "works")


def test_missing_temporary_directory(kind: str) -> None:
    outcome = run(PLACES, kind, "/nowhere/at/all")
    assert outcome.stdout in ("works\n", "clear error\n"), outcome.stderr
    outcome.assert_clean()


def test_full_temporary_directory(kind: str, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    command = f"mount -t tmpfs -o size=4k,nr_inodes=1 tmpfs {full}"
    with Program(PLACES, [kind, full], prefix=mount(command)) as program:
        outcome = program.finish()
    assert outcome.stdout in ("works\n", "clear error\n"), outcome.stderr
    outcome.assert_clean()


def test_long_temporary_directory(kind: str, tmp_path: Path) -> None:
    """Paths of Unix sockets may have about 100 characters."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    assert_says(run(PLACES, kind, deep), "works")
    assert not list(deep.iterdir())


# ------------------------------------------------------------------------------------------------------ fork is refused

NO_FORK = (
    HOG
    + """
import psutil
kind, cgroup = sys.argv[1:]
runner = Runner(kind, 2)
use_all(runner)
victim = runner.call(os.getpid)

def allow(more):
    if cgroup == "-":
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_NPROC)
            resource.prlimit(process.pid, resource.RLIMIT_NPROC, (hard if more else 0, hard))
    else:
        helpers.Path(cgroup, "pids.max").write_text("max" if more else "1")

allow(False)
os.kill(victim, signal.SIGKILL)
calls = [runner.submit(helpers.square, number) for number in range(100)]
for number, call in enumerate(calls):
    assert outcome_of(lambda: runner.value(call)) in (number * number, "clear error")
print("answered")
begin = time.monotonic()
other = Runner(kind, 1)
assert outcome_of(lambda: other.call(helpers.square, 3)) in (9, "clear error")
assert time.monotonic() - begin < 10
print("answered")
print(use_all(runner))
allow(True)
other.executor.kill_workers()
print(use_all(runner))
third = Runner(kind, 2)
print(use_all(third))
for one in (runner, third):
    one.close()
"""
)

PIDS = Path("/sys/fs/cgroup/pids")


@pytest.mark.skipif(not psutil.LINUX, reason="prlimit and cgroups are Linux's")
def test_fork_refused(kind: str) -> None:
    """No process, no thread more: what runs goes on, what would need one says so, and all is well afterwards."""
    if os.geteuid() != 0:
        with Program(NO_FORK, [kind, "-"]) as program:
            assert_says(program.finish(60), "answered", "answered", "works", "works", "works")
        return
    group = PIDS / f"distpool-{uuid.uuid4().hex[:8]}"  # the limit of users does not bind root
    try:
        group.mkdir()
        (group / "pids.max").write_text("max")
    except OSError as error:
        pytest.skip(f"root needs a cgroup of its own for this: {error}")
    prefix = ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    try:
        with Program(NO_FORK, [kind, group], prefix=prefix) as program:
            assert_says(program.finish(60), "answered", "answered", "works", "works", "works")
    finally:
        group.rmdir()
