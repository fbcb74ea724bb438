"""The zygote that a program's first executor has started before the rest of distpool is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
from sides import fresh

from distpool.managers import zygotes
from distpool.managers.local import LocalManager

PREAMBLE = """
import json, os, subprocess, sys
started = []
spawn = os.posix_spawn
def note(program, command, *args, **kwargs):
    pid = spawn(program, command, *args, **kwargs)
    if "distpool.zygote" in str(command):
        started.append([pid, "distpool.node.node" in sys.modules])
    return pid
os.posix_spawn = note
import distpool
def say(**found):
    print(json.dumps({"started": started, **found}))
"""


def program(source: str, **env: str) -> dict[str, Any]:
    """Run a program of its own; what it says at its end, and nothing else may be said."""
    done = fresh(PREAMBLE + textwrap.dedent(source), **env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def gone(pid: int) -> bool:
    """Whether the process has ended, or does so now: it learns of the end of its master."""
    try:
        psutil.Process(pid).wait(20)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


def test_what_is_not_needed_to_start_it_is_loaded_later() -> None:
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import distpool
        from distpool.managers import zygotes
        def begin(*args):
            late = {"typing", "dataclasses", "tempfile", "cloudpickle", "distpool.crew"}
            late |= {"socket", "subprocess", "signal"}
            print(sorted(late & set(sys.modules)))
            raise SystemExit
        zygotes.begin = begin
        distpool.ClusterExecutor(1)
    """
    # -S: .pth files of the environment may import anything
    command = [sys.executable, "-S", "-c", textwrap.dedent(code), str(Path(zygotes.__file__).parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("hosts", ["", "2", "'local://'", "max_workers=2"])
def test_the_first_executor_is_served_by_a_zygote_that_was_started_ahead(hosts: str) -> None:
    found = program(f"""
        with distpool.ClusterExecutor({hosts}) as ex:
            parents = [ex.submit(os.getppid).result() for _ in range(3)]
        with distpool.ClusterExecutor(1) as ex:
            parents.append(ex.submit(os.getppid).result())
        say(parents=parents)
    """)
    assert [loaded for _, loaded in found["started"]][:1] == [False], "all was loaded before it was started"
    assert set(found["parents"]) == {pid for pid, _ in found["started"]}, "it was not used"
    assert all(gone(pid) for pid, _ in found["started"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("max_workers=0", "ValueError"),
        ("max_workers='2'", "TypeError"),
        ("2, timeout=-1", "ValueError"),
        ("2, initializer=print, initargs=(lock,)", "SerializationError"),
    ],
)
def test_an_executor_that_does_not_come_to_be_leaves_no_zygote(arguments: str, error: str) -> None:
    found = program(f"""
        import threading
        lock = threading.Lock()
        descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        try:
            distpool.ClusterExecutor({arguments})
        except Exception as problem:
            error = type(problem).__name__
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
        say(error=error, children=[int(each) for each in children.stdout.split()])
    """)
    assert found["error"] == error
    assert not {pid for pid, _ in found["started"]} & set(found["children"])
    assert all(gone(pid) for pid, _ in found["started"])


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        ("['nobody@localhost']", {}),
        ("distpool.LocalManager(1)", {}),
        ("1, exename=sys.executable", {}),
        ("1", {"DISTPOOL_LAUNCH": "exec"}),
    ],
)
def test_who_may_want_another_gets_none_ahead(arguments: str, env: dict[str, str]) -> None:
    found = program(
        f"""
        from distpool.managers import zygotes
        ahead = []
        begin = zygotes.begin
        zygotes.begin = lambda *args: ahead.append(begin(*args)) or ahead[-1]
        executor = distpool.ClusterExecutor({arguments})
        executor.kill_workers()
        say(ahead=[started is not None for started in ahead])
        """,
        **env,
    )
    assert found["ahead"] == [False]


def test_nothing_is_begun_once_all_is_loaded() -> None:
    assert "distpool.node.node" in sys.modules or __import__("distpool.node.node")
    assert zygotes.begin(None, {}) is None


def test_it_is_found_by_what_local_workers_ask_for() -> None:
    spec = LocalManager(1).spec({"cookie": ""})
    started = zygotes.ZygoteProcess(spec)
    try:
        assert (
            started.key
            == zygotes.key_of(spec)
            != zygotes.key_of(LocalManager(1).spec({"cookie": "", "exeflags": "-O"}))
        )
        assert started.process.poll() is None
    finally:
        started.discard()
    assert started.process.returncode == -9
    for descriptor in (started.control, started.startup):
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_what_cannot_be_started_leaves_no_descriptor() -> None:
    source = """if True:
        import os
        from distpool.managers import zygotes
        from distpool.managers.local import LocalManager
        spec = LocalManager(1).spec({"cookie": "", "exename": "/no/such/python"})
        before = os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")
        try:
            zygotes.ZygoteProcess(spec)
        except OSError as error:
            assert "no/such/python" in str(error)
        else:
            raise AssertionError("it was started")
        assert os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd") == before
    """
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60)


def test_a_program_without_standard_streams(tmp_path: Path) -> None:
    """Our descriptors get other numbers than theirs: the new process's streams would take their place there."""
    source = """if True:
        import os, sys
        from distpool.managers import zygotes
        started = zygotes.begin(2, {})
        numbers = started.control, started.startup
        alive = started.process.poll() is None
        with open(sys.argv[1], "w") as file:
            file.write(f"{min(numbers)} {alive}")
        started.discard()
    """
    path = tmp_path / "found"
    command = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", source, str(path)]
    subprocess.run(command, check=True, timeout=60)
    least, alive = path.read_text().split()
    assert int(least) > 2 and alive == "True"


# -- what changes after its start ------------------------------------------------------------------------------------

LOOK = """
import resource, signal
from distpool import ClusterExecutor
SIGNALS = ("SIGUSR1", "SIGHUP", "SIGTERM", "SIGURG")
def look():
    umask = os.umask(0)
    os.umask(umask)
    ignored = [name for name in SIGNALS if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN]
    limits = [resource.getrlimit(number)[0] for number in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)]
    return [umask, *limits, os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0)), ignored]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the umask is read from /proc")
@pytest.mark.parametrize("way", ["fork", "exec"])
def test_workers_get_what_children_would_inherit_now(way: str) -> None:
    """Not what the program had when its first executor started the zygote."""
    found = program(
        LOOK
        + """
first = ClusterExecutor(1)
before = first.submit(look).result()
start = look()
os.umask(0o27)
resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
os.nice(3)
os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
for name in ("SIGUSR1", "SIGHUP", "SIGINT", "SIGCHLD"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
changed = look()
with ClusterExecutor(1) as second:
    after = second.submit(look).result()
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
for pid, in_python in started:
    os.kill(pid, signal.SIGUSR1)
with ClusterExecutor(1) as third:
    last = third.submit(look).result()
old = first.submit(look).result()
first.shutdown()
say(before=before, start=start, changed=changed, after=after, last=last, old=old)
""",
        DISTPOOL_LAUNCH=way,
    )
    assert found["before"] == found["start"] == found["old"]
    assert found["after"] == found["changed"] and found["changed"][0] == 0o27 and found["changed"][2] == 300
    assert found["changed"][-1] == ["SIGUSR1", "SIGHUP"]
    assert found["last"] == [*found["changed"][:-1], ["SIGUSR1"]]
    assert len(found["started"]) == (way == "fork")


@pytest.mark.skipif(sys.platform != "linux", reason="the umask is read from /proc")
@pytest.mark.parametrize("way", ["fork", "exec"])
def test_what_a_command_of_the_users_sets_stays(tmp_path: Path, way: str) -> None:
    """And what the program changes after its start is added."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nulimit -S -c 0; umask 077; exec nice -n 2 "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    found = program(
        LOOK
        + f"""
os.umask(0o22)
with ClusterExecutor(1, exename={str(wrapper)!r}) as executor:
    first = executor.submit(look).result()
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with ClusterExecutor(1, exename={str(wrapper)!r}) as other:
        new = other.submit(look).result()
say(first=first, new=new, own=os.getpriority(os.PRIO_PROCESS, 0))
""",
        DISTPOOL_LAUNCH=way,
    )
    assert found["first"][:2] == found["new"][:2] == [0o77, 0] and found["new"][2] == 300 != found["first"][2]
    assert found["first"][3] == found["new"][3] == found["own"] + 2
