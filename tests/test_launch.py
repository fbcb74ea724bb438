"""Local worker processes: both ways of starting them, over both transports, and every way of ending them."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distpool import directories
from distpool.errors import LaunchWorkerError
from distpool.managers import executed
from distpool.managers.launch import LaunchedProcess, Launcher, LaunchSpec
from distpool.managers.local import LocalManager
from distpool.transport.ioloop import IoLoop

HERE = Path(__file__).resolve().parent
GONE_SECONDS = 2.0

Make = Callable[..., LaunchSpec]


@pytest.fixture
def loop() -> Iterator[IoLoop]:
    loop = IoLoop("test-io")
    loop.start()
    yield loop
    loop.stop()


@pytest.fixture
def launcher(loop: IoLoop) -> Iterator[Launcher]:
    launcher = Launcher(loop)
    yield launcher
    launcher.close()


@pytest.fixture(params=["fork", "exec"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["unix", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(method: str, transport: str) -> Make:
    """Orders for both ways of starting, over both transports."""
    return lambda count=1, **changes: order(count, method, transport, **changes)


@pytest.fixture
def by_method(method: str) -> Make:
    """Orders for both ways of starting, where the transport does not matter."""
    return lambda count=1, **changes: order(count, method, **changes)


def order(count: int = 1, method: str = "fork", transport: str = "unix", **changes: Any) -> LaunchSpec:
    spec = LocalManager(count).spec({"cookie": "secret-cookie"})
    spec.method, spec.transport, spec.entry, spec.timeout = method, transport, "launch_entries:serve", 20.0
    for name, value in changes.items():
        assert hasattr(spec, name)
        setattr(spec, name, value)
    return spec


class Caller:
    """A connection to a worker that runs `launch_entries.serve`."""

    def __init__(self, process: LaunchedProcess) -> None:
        kind, *where = process.address
        self.socket = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
        self.socket.settimeout(20)
        self.socket.connect(where[0] if kind == "unix" else tuple(where))
        self.stream = self.socket.makefile("rw")

    def send(self, source: str) -> None:
        self.stream.write(json.dumps(textwrap.dedent(source)) + "\n")
        self.stream.flush()

    def run(self, source: str) -> Any:
        """Execute `source` in the worker; its variable `result`."""
        self.send(source)
        return json.loads(self.stream.readline())

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


def exit_of(process: LaunchedProcess, timeout: float = 10.0) -> int | None:
    """Wait for the reported end."""
    event = threading.Event()
    process.add_exit_callback(lambda code: event.set())
    assert event.wait(timeout), f"no report of the end of {process}"
    return process.exitcode


def output_of(process: LaunchedProcess, timeout: float = 10.0) -> str:
    """Everything that a process says until its end; closes its output."""
    data = process.early_output
    deadline = time.monotonic() + timeout
    while select.select([process.output], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(process.output, 65536)
        if not chunk:
            os.close(process.output)
            return data.decode()
        data += chunk
    raise AssertionError(f"no end of the output of {process}: {data!r}")


def alive(ospid: int) -> bool:
    try:
        return psutil.Process(ospid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_gone(ospids: list[int], timeout: float = GONE_SECONDS) -> list[int]:
    """Those that still live after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    left = [ospid for ospid in ospids if alive(ospid)]
    while left and time.monotonic() < deadline:
        time.sleep(0.02)  # not our children: nothing to wait on
        left = [ospid for ospid in left if alive(ospid)]
    return left


def zygotes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        try:
            if "distpool.zygote" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def finish(processes: list[LaunchedProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        exit_of(process)
        os.close(process.output)


# --- a worker's life --------------------------------------------------------------------------------------------------


def test_workers_come_up_and_answer(launcher: Launcher, make: Make, transport: str) -> None:
    processes = list(launcher.launch(make(3)))
    assert len({process.ospid for process in processes}) == 3
    for process in processes:
        assert process.address[0] == transport
        assert process.exitcode is None and not process.exited
        caller = Caller(process)
        assert caller.run("import os; result = os.getpid()") == process.ospid
        caller.close()
        assert exit_of(process) == 0
        assert output_of(process) == ""


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("import os; os._exit(9)", 9),
        ("import sys; sys.exit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11),
        ("raise ValueError('in a worker')", 1),
    ],
)
def test_exit_status(launcher: Launcher, by_method: Make, source: str, code: int) -> None:
    (process,) = launcher.launch(by_method())
    caller = Caller(process)
    caller.send(source)
    assert exit_of(process) == code
    said = output_of(process)
    assert ("ValueError: in a worker" in said) == (code == 1)
    caller.close()


def test_exit_code_of_a_clean_end(launcher: Launcher, make: Make) -> None:
    (process,) = launcher.launch(make(extra={"code": 42}))
    Caller(process).close()
    assert exit_of(process) == 42
    os.close(process.output)


def test_exit_is_known_at_once_and_told_on_the_leader(launcher: Launcher, loop: IoLoop, make: Make) -> None:
    (process,) = launcher.launch(make())
    told: list[tuple[Any, bool, float]] = []
    event = threading.Event()

    def ended(code: int | None) -> None:
        told.append((code, loop.leads, time.monotonic()))
        event.set()

    process.add_exit_callback(ended)
    begin = time.monotonic()
    process.kill()
    assert event.wait(5)
    code, leads, when = told[0]
    assert (code, leads) == (-9, True)
    assert when - begin < 0.5
    later: list[int | None] = []
    process.add_exit_callback(later.append)
    assert later == [-9]
    process.kill()  # no error when gone
    assert output_of(process) == ""


def test_failing_callback_stops_nobody(launcher: Launcher, by_method: Make, caplog: pytest.LogCaptureFixture) -> None:
    (process,) = launcher.launch(by_method())
    told: list[int | None] = []
    process.add_exit_callback(lambda code: 1 / 0)
    process.add_exit_callback(told.append)
    process.kill(signal.SIGTERM)
    assert exit_of(process) == -15
    assert told == [-15]
    assert "ZeroDivisionError" in caplog.text
    os.close(process.output)


def test_all_output_of_a_dying_worker_arrives(launcher: Launcher, make: Make) -> None:
    (process,) = launcher.launch(make(extra={"greeting": "good morning"}))
    caller = Caller(process)
    caller.send(
        """
        import sys, os
        for number in range(2000):
            print("line", number)
            print("error", number, file=sys.stderr)
        sys.stdout.write("no newline")
        sys.stdout.flush()
        os.kill(os.getpid(), 9)
        """
    )
    expected = ["good morning"] + [f"{word} {number}" for number in range(2000) for word in ("line", "error")]
    assert output_of(process).splitlines() == [*expected, "no newline"]
    assert exit_of(process) == -9
    caller.close()


def test_surroundings(launcher: Launcher, make: Make, tmp_path: Path) -> None:
    spec = make(extra={"key": [1, "zwei"]}, cwd=str(tmp_path))
    spec.env["DISTPOOL_TEST_VARIABLE"] = "hello \udcff"
    spec.env.pop("LOGNAME", None)
    spec.sys_path = [*spec.sys_path, "/nowhere/at all"]
    (process,) = launcher.launch(spec)
    caller = Caller(process)
    assert caller.run("import os; result = dict(os.environ)") == {**spec.env, **locale_variables(caller)}
    assert caller.run("import sys; result = sys.path") == spec.sys_path
    assert caller.run("import sys; result = sys.argv") == sys.argv
    assert caller.run("result = os.getcwd()") == str(tmp_path)
    assert caller.run("result = settings['extra']") == {"key": [1, "zwei"]}
    assert caller.run("result = settings['cookie']") == "secret-cookie"
    assert caller.run("result = sys.stdin.read()") == ""
    assert caller.run("result = os.getsid(0) == os.getpid()") is True
    assert caller.run("result = sorted(vars(sys.modules['__main__']))") == [
        "__builtins__", "__doc__", "__loader__", "__name__", "__package__", "__spec__",
    ]  # fmt: skip
    assert caller.run("import gc; result = gc.isenabled()") is True
    assert caller.run("import signal; result = signal.getsignal(2) is signal.default_int_handler") is True
    defaults = "all(signal.getsignal(n) == signal.SIG_DFL for n in (signal.SIGTERM, signal.SIGCHLD))"
    assert caller.run(f"result = {defaults}") is True
    assert caller.run("result = list(signal.pthread_sigmask(signal.SIG_BLOCK, ()))") == []
    limits = list(resource.getrlimit(resource.RLIMIT_NOFILE))
    assert caller.run("import resource; result = resource.getrlimit(resource.RLIMIT_NOFILE)") == limits
    caller.close()
    assert exit_of(process) == 0
    os.close(process.output)


def test_signals_that_the_master_ignores(launcher: Launcher, make: Make) -> None:
    """Because of nohup, or a shell's `&`. A worker hears those by which it is ended and interrupted."""
    ignored = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, signal.SIG_IGN) for number in ignored]
    try:
        (process,) = launcher.launch(make())
    finally:
        for number, handler in zip(ignored, previous, strict=True):
            signal.signal(number, handler)
    caller = Caller(process)
    assert caller.run("import signal; result = [signal.getsignal(n).name for n in (1, 15)]") == ["SIG_IGN", "SIG_DFL"]
    assert caller.run("result = signal.getsignal(2) is signal.default_int_handler") is True
    caller.close()
    assert exit_of(process) == 0
    os.close(process.output)


def locale_variables(caller: Caller) -> dict[str, str]:
    """Python itself sets LC_CTYPE where the locale is C (PEP 538)."""
    value = caller.run("import os; result = os.environ.get('LC_CTYPE')")
    return {} if value is None else {"LC_CTYPE": value}


def test_workers_hold_no_descriptors_of_others(launcher: Launcher, make: Make) -> None:
    processes = list(launcher.launch(make(4)))
    callers = [Caller(process) for process in processes]
    # stdin, stdout, stderr, listener, lifeline, the caller's connection; and the directory that is being listed
    for caller in callers:
        assert len(caller.run("import os; result = os.listdir('/proc/self/fd')")) == 7
        caller.close()
    finish(processes)


def test_missing_directory_is_survived(launcher: Launcher, make: Make, tmp_path: Path) -> None:
    (process,) = launcher.launch(make(cwd=str(tmp_path / "missing")))
    caller = Caller(process)
    used = caller.run("import os; result = os.getcwd()")
    caller.close()
    assert exit_of(process) == 0
    assert output_of(process) == (
        f"distpool: cannot work in '{tmp_path}/missing' (No such file or directory); using {used!r}\n"
    )


def test_random_numbers_differ(launcher: Launcher, by_method: Make) -> None:
    processes = list(launcher.launch(by_method(3)))
    values = set()
    for process in processes:
        caller = Caller(process)
        values.add(caller.run("import random; result = random.random()"))
        caller.close()
    assert len(values) == 3
    finish(processes)


def test_clean_end_runs_threads_and_atexit(launcher: Launcher, make: Make) -> None:
    (process,) = launcher.launch(make())
    caller = Caller(process)
    caller.run(
        """
        import atexit, threading, time
        atexit.register(print, "atexit")
        from concurrent.futures import ThreadPoolExecutor
        ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.2), print("pool thread")))
        threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
        """
    )
    caller.close()
    assert output_of(process).splitlines() == ["thread", "pool thread", "atexit"]
    assert exit_of(process) == 0


def test_endless_thread_cannot_hold_up_the_end(launcher: Launcher, by_method: Make) -> None:
    (process,) = launcher.launch(by_method(extra={"code": 3}))
    caller = Caller(process)
    caller.run(
        """
        import threading, distpool.startup
        distpool.startup.EXIT_SECONDS = 0.2
        threading.Thread(target=threading.Event().wait).start()
        """
    )
    caller.close()
    assert exit_of(process, 3.0) == 3
    os.close(process.output)


@pytest.mark.parametrize(("entry", "extra", "code", "said"), [
    ("fail", {}, 1, "ValueError: this entry point fails"),
    ("leave", {"leave": None}, 0, ""),
    ("leave", {"leave": 5}, 5, ""),
    ("leave", {"leave": "a word"}, 1, "a word"),
])  # fmt: skip
def test_ends_of_the_entry_point(
    launcher: Launcher, by_method: Make, entry: str, extra: dict[str, Any], code: int, said: str
) -> None:
    (process,) = launcher.launch(by_method(entry=f"launch_entries:{entry}", extra=extra))
    assert exit_of(process) == code
    assert said in output_of(process)


def test_secrets_are_on_no_command_line(launcher: Launcher, make: Make) -> None:
    processes = list(launcher.launch(make(2)))
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        assert "secret-cookie" not in " ".join(process.cmdline())
        if process.pid != os.getpid():
            assert "secret-cookie" not in str(process.environ())
    finish(processes)


def test_signals_reach_only_living_workers(launcher: Launcher, by_method: Make) -> None:
    (process,) = launcher.launch(by_method())
    caller = Caller(process)
    caller.run("import signal; signal.signal(signal.SIGUSR1, lambda *a: print('got it'))")
    process.kill(signal.SIGUSR1)
    assert caller.run("result = 1") == 1
    caller.close()
    assert exit_of(process) == 0
    assert output_of(process) == "got it\n"
    process.kill(signal.SIGUSR1)


def test_without_pidfd_signals_go_through_the_zygote(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    (process,) = launcher.launch(order())
    os.close(process._pidfd)
    process._pidfd = -1  # as on macOS
    process.kill(signal.SIGTERM)
    assert exit_of(process) == -15
    process.kill()
    os.close(process.output)


def test_without_pidfd_a_thread_waits(launcher: Launcher, loop: IoLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError("not on this system")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    (process,) = launcher.launch(order(method="exec", extra={"code": 4}))
    process.kill(signal.SIGCONT)
    Caller(process).close()
    assert exit_of(process) == 4
    process.kill()
    os.close(process.output)


def test_headers_read_by_threads(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where pipes cannot be polled."""
    monkeypatch.setattr(executed, "_headers", executed._headers_by_threads)
    processes = list(launcher.launch(order(3, "exec", "tcp")))
    assert len(processes) == 3
    finish(processes)
    with pytest.raises(LaunchWorkerError, match="within 0.5 seconds"):
        list(launcher.launch(order(2, "exec", argv=["/bin/sh", "-c", "exec sleep 60"], timeout=0.5)))


def test_modules_load_where_there_is_no_fork() -> None:
    code = (
        "import sys, subprocess, tempfile, selectors, cloudpickle; sys.platform = 'win32'; import os, select, fcntl; "
        "del os.fork, os.pidfd_open, select.poll, sys.modules['fcntl'], fcntl; sys.modules['fcntl'] = None; "
        "import distpool.startup, distpool.managers.launch, distpool.managers.local; print('loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "loaded\n"


# --- launches that fail -----------------------------------------------------------------------------------------------


def test_missing_interpreter(launcher: Launcher, make: Make) -> None:
    with pytest.raises(LaunchWorkerError, match="/nowhere/python"):
        list(launcher.launch(make(argv=["/nowhere/python"])))


def test_interpreter_that_exits(launcher: Launcher, make: Make) -> None:
    with pytest.raises(LaunchWorkerError) as caught:
        list(launcher.launch(make(2, argv=["/bin/sh", "-c", "echo some banner; echo no python here >&2; exit 3"])))
    assert "no python here" in caught.value.output
    assert "some banner" in str(caught.value)
    assert "3" in caught.value.reason


def test_silent_interpreter_ends_with_the_time_out(launcher: Launcher, make: Make) -> None:
    begin = time.monotonic()
    with pytest.raises(LaunchWorkerError, match="within 0.5 seconds"):
        list(launcher.launch(make(2, argv=["/bin/sh", "-c", "exec sleep 60"], timeout=0.5)))
    assert time.monotonic() - begin < 3
    finish(list(launcher.launch(make())))


def test_entry_point_that_cannot_be_imported(launcher: Launcher, make: Make, tmp_path: Path, method: str) -> None:
    (tmp_path / "broken_entry.py").write_text("raise ImportError('broken on purpose')")
    spec = make(entry="broken_entry:run")
    spec.sys_path = [str(tmp_path), *spec.sys_path]
    if method == "fork":
        with pytest.raises(LaunchWorkerError, match="broken on purpose"):
            list(launcher.launch(spec))
    else:
        (process,) = launcher.launch(spec)
        assert exit_of(process) == 1
        assert "broken on purpose" in output_of(process)


def test_noise_before_the_header(launcher: Launcher, make: Make, method: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("for n in range(900): print('noise', n)")
    spec = make()
    spec.env["PYTHONPATH"] = str(tmp_path)
    (process,) = launcher.launch(spec)
    Caller(process).close()
    assert exit_of(process) == 0
    noise = [f"noise {number}" for number in range(900)] if method == "exec" else []
    assert output_of(process).splitlines() == noise


def test_endless_noise_is_an_error(launcher: Launcher) -> None:
    with pytest.raises(LaunchWorkerError, match="too much"):
        list(launcher.launch(order(method="exec", argv=["/bin/sh", "-c", "exec yes noise"])))


def test_descriptors_of_the_zygote_exhausted(launcher: Launcher) -> None:
    limited = ["/bin/sh", "-c", 'ulimit -n 40; exec "$0" "$@"', sys.executable]
    processes = []
    with pytest.raises(LaunchWorkerError, match="Too many open files"):
        for process in launcher.launch(order(60, argv=limited)):
            processes.append(process)
    assert 5 < len(processes) < 40
    caller = Caller(processes[0])
    assert caller.run("result = 1") == 1
    caller.close()
    finish(processes)
    finish(list(launcher.launch(order(2, argv=limited))))
    assert len(zygotes()) == 1


def test_our_descriptors_exhausted(launcher: Launcher, method: str, transport: str) -> None:
    finish(list(launcher.launch(order(1, method, transport))))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    processes = []
    held: list[int] = []
    try:
        with pytest.raises(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for descriptor in held[:6]:
            os.close(descriptor)
        with pytest.raises(LaunchWorkerError, match="(Too many open|no) file"):
            for process in launcher.launch(order(20, method, transport)):
                processes.append(process)
    finally:
        for descriptor in held[6:]:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    finish(processes)
    finish(list(launcher.launch(order(2, method, transport))))
    deadline = time.monotonic() + 5  # those that nobody took are being ended
    while descriptors() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert descriptors() == before


# --- what is shared ---------------------------------------------------------------------------------------------------


def test_one_zygote_per_command_and_start_up_variables(launcher: Launcher) -> None:
    finish(list(launcher.launch(order())))
    finish(list(launcher.launch(order(cwd="/", cookie="another"))))
    assert len(zygotes()) == 1
    changed = order()
    changed.env["PYTHONHASHSEED"] = "5"
    (process,) = launcher.launch(changed)
    assert len(zygotes()) == 2
    caller = Caller(process)
    expected = subprocess.run([sys.executable, "-c", "print(hash('x'))"], env=changed.env, stdout=subprocess.PIPE)
    assert caller.run("result = hash('x')") == int(expected.stdout)
    caller.close()
    finish([process])
    finish(list(launcher.launch(order(argv=[sys.executable, "-O"]))))
    assert len(zygotes()) == 3


def test_launches_from_several_threads(launcher: Launcher, make: Make) -> None:
    found: list[LaunchedProcess] = []
    threads = [threading.Thread(target=lambda: found.extend(launcher.launch(make(3)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({process.ospid for process in found}) == 12
    assert len(zygotes()) <= 1
    finish(found)


def test_iterator_dropped_early(launcher: Launcher, make: Make) -> None:
    strangers = set(workers())  # what other test modules have left running for themselves
    iterator = launcher.launch(make(5))
    first = next(iter(iterator))
    iterator.close()  # type: ignore[attr-defined]
    (later,) = launcher.launch(make())  # answered in order, so all of the first launch have been started by now
    kept = {first.ospid, later.ospid} | strangers
    assert kept - strangers <= set(workers())
    assert wait_gone(list(set(workers()) - kept), 5.0) == []
    assert set(workers()) - strangers == kept - strangers
    finish([first, later])


def workers() -> list[int]:
    """Living workers below this process."""
    zygote = {child.pid for child in zygotes()}
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.pid not in zygote and alive(child.pid) and child.name() not in ("sh", "dash"):
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_leaks_over_many_launches(launcher: Launcher, make: Make, method: str) -> None:
    def once() -> None:
        processes = list(launcher.launch(make(4 if method == "fork" else 2)))
        finish(processes)

    once()
    before, threads = descriptors(), set(threading.enumerate())
    for _ in range(50 if method == "fork" else 5):
        once()
    assert descriptors() == before
    assert set(threading.enumerate()) <= threads  # those of earlier tests may end meanwhile
    if method == "fork":
        (zygote,) = zygotes()
        assert zygote.num_fds() < 12
    directory = launcher._directory
    assert not directory or os.listdir(directory) == []


def test_directory_is_private_and_goes(loop: IoLoop, method: str) -> None:
    launcher = Launcher(loop)
    (process,) = launcher.launch(order(method=method))
    directory = os.path.dirname(process.address[1])
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert os.stat(directory).st_uid == os.getuid()
    assert os.path.basename(directory).startswith("distpool-")
    launcher.close()
    assert not os.path.exists(directory)
    assert exit_of(process, 1.0) == -9
    assert output_of(process) == ""
    launcher.close()
    with pytest.raises(LaunchWorkerError):
        list(launcher.launch(order(method=method)))


def test_long_temporary_directory(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    (process,) = launcher.launch(order())
    assert process.address[1].startswith("/tmp/distpool-")
    assert os.listdir(long) == []
    finish([process])


def test_no_room_for_a_directory(launcher: Launcher, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "choose", lambda: "/proc/distpool-cannot-be-made")
    (process,) = launcher.launch(make())
    assert process.address[0] == "tcp"
    assert Caller(process).run("result = 1") == 1
    finish([process])


def test_directory_that_vanished(launcher: Launcher, by_method: Make) -> None:
    (first,) = launcher.launch(by_method())
    directory = os.path.dirname(first.address[1])
    os.unlink(first.address[1])
    os.rmdir(directory)
    (second,) = launcher.launch(by_method())
    assert os.path.dirname(second.address[1]) == directory  # made again: temporary files may be cleaned up
    assert Caller(second).run("result = 1") == 1
    finish([first, second])


def test_close_if_idle(launcher: Launcher) -> None:
    (process,) = launcher.launch(order())
    launcher.close_if_idle()
    assert alive(process.ospid) and len(zygotes()) == 1
    directory = os.path.dirname(process.address[1])
    finish([process])
    launcher.close_if_idle()
    assert wait_gone([zygote.pid for zygote in zygotes()]) == []
    assert not os.path.exists(directory)
    (process,) = launcher.launch(order())
    assert os.path.dirname(process.address[1]) != directory
    # A second zygote shares the directory; the end of the first must leave it.
    finish(list(launcher.launch(order(argv=[sys.executable, "-O"]))))
    (other,) = set(zygotes()) - {psutil.Process(process.ospid).parent()}
    launcher.close_if_idle()
    assert wait_gone([other.pid]) == []
    assert len(zygotes()) == 1
    assert os.path.exists(process.address[1])
    finish([process])


def test_a_zygote_that_a_launch_is_about_to_use_is_not_idle(launcher: Launcher) -> None:
    """Somebody's last worker goes, at just that moment."""
    found = launcher._zygote

    def then_closed(spec: LaunchSpec) -> Any:
        zygote = found(spec)
        launcher.close_if_idle()
        return zygote

    launcher._zygote = then_closed  # type: ignore[method-assign]
    finish(list(launcher.launch(order())))
    launcher.close_if_idle()
    assert wait_gone([zygote.pid for zygote in zygotes()]) == []


# --- ends that nobody asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", ["sleep", "python", "c"])
def test_zygote_killed(launcher: Launcher, transport: str, busy: str) -> None:
    spec = order(2, "fork", transport, entry="launch_entries:busy", extra={"busy": busy})
    processes = list(launcher.launch(spec))
    for process in processes:
        assert select.select([process.output], [], [], 5)[0]  # it is busy now
    (zygote,) = zygotes()
    begin = time.monotonic()
    zygote.kill()
    assert wait_gone([process.ospid for process in processes]) == []
    for process in processes:
        assert exit_of(process, GONE_SECONDS) is None
        assert process.exited
        assert output_of(process) == "busy\n"
    assert time.monotonic() - begin < GONE_SECONDS
    finish(list(launcher.launch(order(2, "fork", transport))))


def test_zygote_killed_just_before_a_launch(launcher: Launcher) -> None:
    finish(list(launcher.launch(order())))
    for _ in range(3):
        zygotes()[0].kill()
        finish(list(launcher.launch(order(3))))


MASTER = """
import os, sys
sys.path[:] = {path!r}
import test_launch as t
from distpool.managers.launch import Launcher
from distpool.transport.ioloop import IoLoop

loop = IoLoop()
loop.start()
launcher = Launcher(loop)
spec = t.order(3, {method!r}, {transport!r}, entry="launch_entries:busy", extra={{"busy": {busy!r}}})
processes = list(launcher.launch(spec))
for process in processes:
    process.early_output or t.select.select([process.output], [], [], 5)
{more}
print(*[process.ospid for process in processes], launcher._directory or "-", flush=True)
t.time.sleep(60)
"""


def start_master(
    method: str, transport: str, busy: str, more: str = ""
) -> tuple[subprocess.Popen[str], list[int], str]:
    path = [str(HERE), str(HERE.parent), *sys.path]
    code = MASTER.format(path=path, method=method, transport=transport, busy=busy, more=more)
    master = subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert master.stdout is not None and master.stderr is not None
    words = master.stdout.readline().split()
    assert words, master.stderr.read()
    return master, [int(word) for word in words[:-1]], words[-1]


def check_gone(master: subprocess.Popen[str], ospids: list[int], directory: str) -> None:
    begin = time.monotonic()
    family = [child.pid for child in psutil.Process(master.pid).children(recursive=True)]
    assert set(ospids) <= set(family)
    master.kill()
    assert wait_gone(family) == []
    while os.path.exists(directory) and time.monotonic() - begin < GONE_SECONDS:
        time.sleep(0.02)
    assert not os.path.exists(directory)
    assert master.stderr is not None and master.stdout is not None
    assert master.stderr.read() == ""
    master.stderr.close()
    master.stdout.close()
    master.wait()


@pytest.mark.parametrize("busy", ["sleep", "python", "c"])
def test_master_killed(method: str, transport: str, busy: str) -> None:
    check_gone(*start_master(method, transport, busy))


def test_master_killed_while_a_forked_child_holds_its_descriptors() -> None:
    more = "ospids = [p.ospid for p in processes]\nchild = os.fork()\nif not child: t.time.sleep(60)"
    master, ospids, directory = start_master("fork", "unix", "c", more)
    child = next(p for p in psutil.Process(master.pid).children() if "test_launch" in " ".join(p.cmdline()))
    master.kill()
    try:
        assert wait_gone(ospids) == []
        assert alive(child.pid)
    finally:
        child.kill()
        master.communicate()


def test_forked_child_forgets(method: str, transport: str) -> None:
    more = """
before = set(os.listdir("/proc/self/fd"))
child = os.fork()
if not child:
    launcher.forget_after_fork()
    loop.close_descriptors()
    for process in processes: os.close(process.output)
    left = [n for n in before if int(n) > 2 and os.path.lexists("/proc/self/fd/" + n)]
    try:
        next(launcher.launch(spec))
    except t.LaunchWorkerError:
        left.append("refused")
    launcher.close()
    os._exit(left != ["refused"])
assert os.waitpid(child, 0)[1] == 0
assert all(t.alive(process.ospid) for process in processes)
extra = list(launcher.launch(spec))
processes += extra
"""
    master, ospids, directory = start_master(method, transport, "sleep", more)
    assert len(ospids) == 6
    check_gone(master, ospids, directory)


def test_master_that_simply_ends(method: str) -> None:
    master, ospids, directory = start_master(
        method, "unix", "c", "print(*[p.ospid for p in processes], launcher._directory, flush=True); os._exit(0)"
    )
    assert wait_gone(ospids) == []
    deadline = time.monotonic() + GONE_SECONDS
    while os.path.exists(directory) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not os.path.exists(directory)
    assert master.communicate() == ("", "")


# --- cost -------------------------------------------------------------------------------------------------------------


def test_memory_is_shared(launcher: Launcher) -> None:
    processes = list(launcher.launch(order(2)))
    callers = [Caller(process) for process in processes]
    assert callers[0].run("import gc; gc.collect(); result = 1") == 1
    assert psutil.Process(processes[0].ospid).memory_full_info().uss <= 8 << 20
    for caller in callers:
        caller.close()
    finish(processes)


def test_forks_are_quick(launcher: Launcher) -> None:
    finish(list(launcher.launch(order(2))))
    best = 10.0
    for _ in range(3):  # other programs share this machine
        begin = time.monotonic()
        processes = list(launcher.launch(order(32)))
        best = min(best, time.monotonic() - begin)
        finish(processes)
    assert best < 1.0
