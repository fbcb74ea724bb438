"""Workers through SSH, with both clients (CONFORMANCE 2.14, 2.20, 2.21)."""

from __future__ import annotations

import getpass
import operator
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import distpool
from distpool import SSHManager, remotecall, remotecall_fetch, rmprocs
from distpool.managers import ssh as ssh_manager
from distpool.managers import ssh_binary

from .sshd import ADDRESSES, Server, free_port, has_ipv6, options

Add = Callable[..., list[int]]


def wait_until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)


def listening(pid: int) -> tuple[str, int]:
    """Where a worker listens."""

    def here() -> tuple[str, int]:
        import psutil

        connections = psutil.Process().net_connections("tcp")
        return next(tuple(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN)

    return remotecall_fetch(here, pid)


def test_a_worker_comes_up_and_computes(server: Server, add: Add) -> None:
    before = server.logins()
    (pid,) = add(["host1"])
    assert distpool.workers() == [pid]
    assert remotecall_fetch(lambda a: a + 1, pid, 41) == 42
    big = os.urandom(3 << 20)
    assert remotecall_fetch(lambda data: data[::-1], pid, big) == big[::-1]
    with pytest.raises(distpool.RemoteException) as info:
        remotecall_fetch(operator.truediv, pid, 1, 0)
    assert isinstance(info.value.captured.ex, ZeroDivisionError)
    assert server.logins() == before + 1
    rmprocs(pid)
    assert distpool.procs() == [1]


# -- machines ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(len(ADDRESSES) < 3, reason="needs several loopback addresses (Linux)")
def test_C221_several_hosts(server: Server, add: Add) -> None:
    before = server.logins()
    pids = add([*ADDRESSES] * 3)
    assert len(pids) == 9 and remotecall_fetch(distpool.workers, pids[4]) == pids
    assert server.logins() == before + 3, "one login per host"
    rmprocs(pids)
    count = len(os.sched_getaffinity(0))
    assert len(add(["host1", ("host2", "auto"), "host1"])) == 2 + count
    assert len(add([("host1", 2), ("host2", 2), "host1"])) == 5


def test_C224_spec_forms(server: Server, add: Add) -> None:
    user, port, bind = getpass.getuser(), server.port, free_port()
    specs = [
        "127.0.0.1",
        f"{user}@127.0.0.1",
        f"{user}@127.0.0.1:{port}",
        f"{user}@127.0.0.1:{port} 127.0.0.1",
        f"{user}@127.0.0.1:{port} 127.0.0.1:{bind}",
    ]
    add(specs)
    places = [listening(pid) for pid in distpool.workers()]
    assert len(places) == 5 and {host for host, _ in places} == {"127.0.0.1"}
    assert [port for _, port in places].count(bind) == 1


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
@pytest.mark.parametrize("tunnel", [False, True])
def test_ipv6(server: Server, add: Add, tunnel: bool) -> None:
    pids = add([(f"[::1]:{server.port}", 2), f"[::1]:{server.port} [::1]"], tunnel=tunnel)
    places = {listening(pid)[0] for pid in pids}
    assert places == ({"127.0.0.1", "::1"} if tunnel else {"::1"})
    assert remotecall_fetch(remotecall_fetch, pids[0], distpool.myid, pids[2]) == pids[2]


def test_C225_a_bind_port_is_a_hint_for_further_workers(server: Server, add: Add) -> None:
    port = free_port()
    pids = add([(f"host1 127.0.0.1:{port}", 3)])
    ports = sorted(listening(pid)[1] for pid in pids)
    assert ports[0] == port and len(set(ports)) == 3
    (pid,) = add([f"host1 127.0.0.1:[{port}]"])
    assert port < listening(pid)[1] < port + 1000


def test_a_bind_port_that_is_taken(server: Server, add: Add) -> None:
    (pid,) = add(["host1"])
    port = listening(pid)[1]
    with pytest.raises(distpool.CompositeException) as info:
        add([f"host1 127.0.0.1:{port}"])
    assert f"127.0.0.1:{port}" in str(info.value.exceptions[0]) and "in use" in str(info.value.exceptions[0])
    assert distpool.workers() == [pid]


def test_C226_further_workers_need_no_login(server: Server, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    before = server.logins()
    pids = add([("host1", 4)])
    assert server.logins() == before + 1
    parents = {remotecall_fetch(os.getppid, pid) for pid in pids}
    assert len(parents) == 1, "all of them are children of what the login started"
    assert len({remotecall_fetch(os.getpid, pid) for pid in pids}) == 4
    for pid in pids:
        remotecall_fetch(print, pid, f"hello from {pid}")
    seen = ""

    def all_said() -> bool:
        nonlocal seen
        seen += capsys.readouterr().out
        return all(f"hello from {pid}\n" in seen for pid in pids)

    wait_until(all_said)
    assert sorted(seen.splitlines()) == sorted(f"      From worker {pid}:\thello from {pid}" for pid in pids)


def test_C281_output_before_the_end_is_not_lost(server: Server, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    pid, other = add([("host1", 2)])

    def die() -> None:
        for number in range(2000):
            print(number)
        print("last words", file=sys.stderr)
        os._exit(3)

    with pytest.raises(distpool.ProcessExitedException) as info:
        remotecall_fetch(die, pid)
    assert info.value.exitcode == 3 and info.value.output.endswith("last words")
    seen = ""

    def all_said() -> bool:
        nonlocal seen
        seen += capsys.readouterr().out
        return "last words" in seen

    wait_until(all_said)
    assert [line for line in seen.splitlines() if f"worker {pid}" in line] == [
        f"      From worker {pid}:\t{text}" for text in [*range(2000), "last words"]
    ]
    assert remotecall_fetch(abs, other, -1) == 1, "who dies takes nobody with him"
    remotecall_fetch(print, other, "still here")
    wait_until(lambda: "still here" in capsys.readouterr().out)


# -- surroundings ------------------------------------------------------------------------------------------------


def test_dir_env_and_flags(server: Server, add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLY_HERE", "1")
    monkeypatch.setenv("DISTPOOL_SOMETHING", "handed on")
    strange = "a'b\"c $HOME `x` \\ !d\n%e;f"
    env = {"STRANGE": strange, "PYTHONHASHSEED": "0", "MKL_NUM_THREADS": "3"}
    pids = add([("host1", 2)], dir=tmp_path, env=env, exeflags="-Xdistpooltest")
    for pid in pids:
        assert remotecall_fetch(os.getcwd, pid) == str(tmp_path)
        assert remotecall_fetch(os.getenv, pid, "STRANGE") == strange
        assert remotecall_fetch(os.getenv, pid, "ONLY_HERE") is None
        assert remotecall_fetch(os.getenv, pid, "DISTPOOL_SOMETHING") == "handed on"
        assert remotecall_fetch(os.getenv, pid, "MKL_NUM_THREADS") == "3"
        assert remotecall_fetch(os.getenv, pid, "OMP_NUM_THREADS") == "1"
        assert remotecall_fetch(lambda: hash("x"), pid) == int(
            subprocess.check_output([sys.executable, "-c", "print(hash('x'))"], env={"PYTHONHASHSEED": "0"})
        )
        assert remotecall_fetch(lambda: "distpooltest" in sys._xoptions, pid)


def test_modules_of_the_directory_are_found(server: Server, add: Add, tmp_path: Path) -> None:
    (tmp_path / "of_that_directory.py").write_text("value = 7\n")
    (pid,) = add(["host1"], dir=tmp_path)
    assert remotecall_fetch(lambda: __import__("of_that_directory").value, pid) == 7


def test_the_current_directory_or_the_login_s_home(
    server: Server, add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (pid,) = add(["host1"])
    assert remotecall_fetch(os.getcwd, pid) == str(tmp_path)
    with pytest.raises(distpool.CompositeException, match="dir='/no/such/place' is no directory"):
        add(["host1"], dir="/no/such/place")


def test_exename(server: Server, add: Add) -> None:
    pids = add(["host1"], exename=[sys.executable, "-O"], exeflags=["-W", "ignore"])
    assert remotecall_fetch(lambda: sys.flags.optimize, pids[0]) == 1
    pids = add(["host1"], exename=None)
    assert remotecall_fetch(lambda: sys.executable, pids[0]) == sys.executable


def test_enable_threaded_blas(server: Server, add: Add) -> None:
    (pid,) = add(["host1"], enable_threaded_blas=True)
    assert remotecall_fetch(os.getenv, pid, "OPENBLAS_NUM_THREADS") is None


def test_memory_limit(server: Server, add: Add) -> None:
    (pid,) = add(["host1"], memory_limit="1GiB")
    with pytest.raises(distpool.RemoteException) as info:
        remotecall_fetch(lambda: len(bytearray(2 << 30)), pid)
    assert isinstance(info.value.captured.ex, MemoryError)


@pytest.mark.parametrize("shell", ["posix", "csh"])
@pytest.mark.parametrize("cmdline_cookie", [False, True])
def test_C227_the_cookie_is_not_on_the_command_line(server: Server, add: Add, shell: str, cmdline_cookie: bool) -> None:
    (pid,) = add(["host1"], cmdline_cookie=cmdline_cookie, shell=shell)

    def commands() -> list[str]:
        process: Any = psutil.Process()
        return [" ".join(each.cmdline()) for each in [process, *process.parents()]]

    cookie = distpool.cluster_cookie()
    assert any(cookie in command for command in remotecall_fetch(commands, pid)) is cmdline_cookie


# -- life and death ----------------------------------------------------------------------------------------------


def test_C231_interrupt(server: Server, add: Add) -> None:
    pids = add([("host1", 2)])
    calls = [remotecall(time.sleep, pid, 50) for pid in pids]
    wait_until(lambda: all(remotecall_fetch(abs, pid, -1) for pid in pids))
    distpool.interrupt(pids)
    for call in calls:
        with pytest.raises(distpool.RemoteException) as info:
            call.result(10)
        assert isinstance(info.value.captured.ex, KeyboardInterrupt)
    assert remotecall_fetch(abs, pids[0], -1) == 1


def test_C232_rmprocs_through_a_call(server: Server, add: Add) -> None:
    pids = add([("host1", 2)])
    remotecall_fetch(lambda pids: rmprocs(pids) and None, 1, pids)
    assert distpool.procs() == [1]


def test_a_worker_is_killed(server: Server, add: Add) -> None:
    first, second = add([("host1", 2)])
    ospid = remotecall_fetch(os.getpid, first)
    waiting = remotecall(time.sleep, first, 60)
    os.kill(ospid, signal.SIGKILL)
    with pytest.raises(distpool.ProcessExitedException) as info:
        waiting.result(20)
    assert info.value.exitcode == -signal.SIGKILL, "the exit status comes through the login"
    assert remotecall_fetch(abs, second, -1) == 1


def test_a_worker_that_does_not_go_is_ended(server: Server, add: Add) -> None:
    (pid,) = add(["host1"])

    def stubborn() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        while True:
            try:
                time.sleep(1)
            except BaseException:
                pass

    remotecall(stubborn, pid)
    ospid = remotecall_fetch(os.getpid, pid)
    rmprocs(pid)
    wait_until(lambda: not psutil.pid_exists(ospid) or psutil.Process(ospid).status() == psutil.STATUS_ZOMBIE)


def sessions(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def test_the_login_ends_with_the_last_worker(server: Server, add: Add) -> None:
    pids = add([("host1", 2)])
    rmprocs(pids[0])
    assert remotecall_fetch(abs, pids[1], -1) == 1
    rmprocs(pids[1])
    wait_until(lambda: not sessions(server))


def test_the_login_is_lost(server: Server, add: Add) -> None:
    """Whatever ran on that host is gone at once, and the processes with it."""
    pids = add([("host1", 2)])
    ospids = [remotecall_fetch(os.getpid, pid) for pid in pids]
    waiting = remotecall(time.sleep, pids[0], 60)
    for process in psutil.Process(server.process.pid).children():
        process.kill()
    with pytest.raises(distpool.ProcessExitedException):
        waiting.result(20)
    wait_until(lambda: distpool.procs() == [1])
    wait_until(lambda: not any(psutil.pid_exists(ospid) for ospid in ospids))


MASTER = """
import sys, time, distpool
pids = distpool.addprocs([("host1", 2)], **{options})
def busy():
    import ctypes
    ctypes.PyDLL(None).sleep(60)  # holds the GIL
distpool.remotecall(busy, pids[0])
print("ready", *[distpool.remotecall_fetch(__import__("os").getppid, pids[1])], flush=True)
time.sleep(60)
"""


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory for temporary files whose name is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="dp-") as name:
        yield Path(name)


@pytest.mark.parametrize("length", [10, 200])
def test_a_long_name_of_the_directory_for_temporary_files(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sockets do not fit below it."""
    below = tmp_path / ("x" * length)
    below.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(below))
    made = Path(ssh_binary._socket_directory())
    try:
        assert len(str(made)) <= 70 or made.parent == below
        assert length < 200 or made.parent == Path("/tmp")
        assert length < 200 or not list(below.iterdir())
    finally:
        made.rmdir()


@pytest.mark.parametrize("tunnel", [False, True])
def test_the_master_is_killed(server: Server, ssh: Any, tunnel: bool, short: Path) -> None:
    code = MASTER.replace("{options}", repr(options(server, ssh, tunnel=tunnel)))
    env = {**os.environ, "TMPDIR": str(short)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline().startswith("ready")
        process.kill()
    wait_until(lambda: not sessions(server))
    wait_until(lambda: not list(short.glob("distpool-ssh-*")))


@pytest.mark.parametrize("tunnel", [False, True])
@pytest.mark.parametrize("interrupted", [False, True])
def test_the_program_ends(server: Server, ssh: Any, tunnel: bool, interrupted: bool, short: Path) -> None:
    """With a call that still runs; by itself, or by Ctrl-C."""
    code = MASTER.replace("{options}", repr(options(server, ssh, tunnel=tunnel)))
    code = code.replace("ctypes.PyDLL(None).sleep(60)  # holds the GIL", "time.sleep(60)")
    code = code if interrupted else code.rpartition("time.sleep(60)")[0]
    env = {**os.environ, "TMPDIR": str(short)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert process.stdout is not None and process.stderr is not None
    with process, process.stdout, process.stderr:
        assert process.stdout.readline().startswith(b"ready")
        begin = time.monotonic()
        if interrupted:
            process.send_signal(signal.SIGINT)
        assert process.wait(15) == (-signal.SIGINT if interrupted else 0)
        assert time.monotonic() - begin < 10
        said = process.stderr.read().decode()
        assert said.rstrip().endswith("KeyboardInterrupt") if interrupted else said == ""
    assert not list(short.glob("distpool-ssh-*")), "nothing is left when it has ended"
    wait_until(lambda: not sessions(server))


def test_a_forked_child_does_not_keep_the_workers_alive(server: Server, ssh: Any) -> None:
    code = MASTER.replace("{options}", repr(options(server, ssh, tunnel=True)))
    code = code.replace("time.sleep(60)", "import os\nif os.fork() == 0: os.close(1)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    with process, process.stdout:
        try:
            assert process.stdout.readline().startswith("ready")
            assert process.stdout.readable()
            child = psutil.Process(process.pid)
            wait_until(lambda: any(each.name() == child.name() for each in child.children()))
            process.kill()
            wait_until(lambda: not sessions(server))
        finally:
            os.killpg(process.pid, signal.SIGKILL)


# -- the manager -------------------------------------------------------------------------------------------------


def test_C219_repr() -> None:
    assert repr(SSHManager(["127.0.0.1"])).startswith("SSHManager(machines=")
    assert repr(SSHManager([("me@[::1]:2222 10.0.0.1:9000", 2)])) == (
        "SSHManager(machines={'me@[::1]:2222 10.0.0.1:9000': 2})"
    )


def test_C220_the_same_machine_twice() -> None:
    assert list(SSHManager(["h", ("h", 2), "h:22"]).machines.values()) == [3, 1]
    assert list(SSHManager([("h", "auto"), ("h", "auto")]).machines.values()) == ["auto"]
    for machines in ([("h", 2), ("h", "auto")], [("h", "auto"), "h"]):
        with pytest.raises(ValueError, match="both a number of workers and 'auto'"):
            SSHManager(machines)


@pytest.mark.parametrize("machines", [[("h", 0)], [("h", -1)], [("h", True)], [("h", "many")], ["h:0"], ["a b c"]])
def test_machines_that_are_none(machines: Any) -> None:
    with pytest.raises(ValueError):
        distpool.addprocs(machines)


@pytest.mark.parametrize("machines", [[5], [None], [("h",)]])
def test_machines_of_another_type(machines: Any) -> None:
    with pytest.raises(TypeError):
        distpool.addprocs(machines)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("tunnel", "yes", ValueError),
        ("shell", "fish", ValueError),
        ("max_parallel", 0, ValueError),
        ("max_parallel", "3", TypeError),
        ("ssh", "", ValueError),
        ("sshflags", 3, TypeError),
        ("exename", [], ValueError),
        ("exeflags", 5, TypeError),
        ("env", {"A=B": "1"}, ValueError),
        ("encrypt", "no", ValueError),
        ("memory_limit", 0, ValueError),
        ("restrict", True, ValueError),
        ("foo", 1, ValueError),
    ],
)
def test_keywords_are_checked_before_anything_is_started(name: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=name if kind is ValueError and name != "env" else None):
        distpool.addprocs(["no-such-host.invalid"], **{name: value})


def test_no_machines() -> None:
    assert distpool.addprocs([]) == []


def test_C284_procs_of_a_host(server: Server, add: Add) -> None:
    if len(ADDRESSES) < 2:
        pytest.skip("needs several loopback addresses (Linux)")
    one = add([("host1", 2)])
    two = add([("host2", 2)])
    assert distpool.procs(one[0]) == one and distpool.procs(two[1]) == two
    assert distpool.check_same_host(one) and not distpool.check_same_host([one[0], two[0]])
    assert remotecall_fetch(distpool.procs, two[0], one[1]) == one


def test_workers_reach_each_other(server: Server, add: Add) -> None:
    pids = add([("host1", 2), ("host2", 1)])
    local = distpool.addprocs(1)
    for one in [*pids, *local]:
        for other in [*pids, *local]:
            assert remotecall_fetch(remotecall_fetch, one, distpool.myid, other) == other


def test_two_at_the_same_time(server: Server, add: Add) -> None:
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(add([("host1", 2)]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert sorted(pid for pids in found for pid in pids) == distpool.workers() and len(distpool.workers()) == 6


def test_workers_of_a_launch_that_was_given_up_are_ended() -> None:
    """The host starts them nevertheless: they are killed, and the login hears that nobody needs it for them."""
    said: list[str] = []

    class Process:
        def __init__(self) -> None:
            self.output, self.other_end = os.pipe()
            self.callbacks: list[Callable[[int], object]] = []

        def add_exit_callback(self, callback: Callable[[int], object]) -> None:
            self.callbacks.append(callback)

        def kill(self) -> None:
            said.append("killed")
            for callback in self.callbacks:
                callback(-9)

    class Login:
        def release(self) -> None:
            said.append("released")

    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    turn = threading.Lock()
    turn.acquire()
    processes = [Process(), Process()]
    for process in processes:
        events.put(distpool.WorkerConfig(process=process, userdata=Login()))
    events.put([])
    ssh_manager._drop(events, turn)
    assert said == ["killed"] * 2 + ["released"] * 2 and not turn.locked()
    for process in processes:
        with pytest.raises(OSError):
            os.fstat(process.output)
        os.close(process.other_end)


def test_a_launch_that_is_dropped_leaves_no_pipes() -> None:
    """More workers had come than anybody has taken."""
    ended = threading.Event()
    outputs = [os.pipe() for _ in range(2)]

    class Login:
        def close(self) -> None:
            for output, _ in outputs:
                events.put(distpool.WorkerConfig(process=SimpleNamespace(output=output)))
            events.put((self, []))
            ended.set()

    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    login: Any = Login()
    ssh_manager._abandon(login, ended, events)
    for output, other_end in outputs:
        with pytest.raises(OSError):
            os.fstat(output)
        os.close(other_end)
