"""CONFORMANCE 2.19: custom managers and transports; and the parts of 2.13 that need a manager."""

from __future__ import annotations

import io
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import distpool
import distpool.managers.base
import distpool.node.node
from distpool import WorkerConfig, addprocs, rmprocs
from distpool.calls import remotecall, remotecall_fetch

from . import transports
from .clusters import ONE_BYTE, WHOLE, ByCommand, OverStreams, Recording, Unpollable, others, start
from .conftest import wait_until


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    assert others() == []
    yield
    rmprocs(others())


def check_works(pids: list[int]) -> None:
    """A worker that computes, moves megabytes, and reports errors is in order."""
    for pid in pids:
        assert remotecall_fetch(distpool.myid, pid) == pid
        big = os.urandom(3 << 20)
        assert remotecall_fetch(lambda data: data[::-1], pid, big) == big[::-1]
        with pytest.raises(distpool.RemoteException) as info:
            remotecall_fetch(operator.truediv, pid, 1, 0)
        assert isinstance(info.value.captured.ex, ZeroDivisionError)


TRANSPORTS = [
    pytest.param(lambda: ByCommand(2), id="header"),
    pytest.param(lambda: ByCommand(2, wrap=Unpollable), id="header-unpollable"),
    pytest.param(lambda: OverStreams(2), id="socket"),
    pytest.param(lambda: OverStreams(2, pair=True), id="streams"),
    pytest.param(lambda: OverStreams(2, serve=WHOLE.replace("sock, sock", 'sock.makefile("rb"), sock.makefile("wb")'))
                 , id="worker-streams"),
]  # fmt: skip


@pytest.mark.parametrize("make", TRANSPORTS)
def test_C271_C273_any_transport_works(make: Any) -> None:
    manager = make()
    pids = addprocs(manager)
    assert len(pids) == 2 and distpool.workers() == pids
    check_works(pids)
    assert [manager.ops(pid) for pid in pids] == [["register"], ["register"]]
    rmprocs(pids)
    assert others() == []
    assert [process.wait(10) for process in manager.processes] == [0, 0]
    assert [manager.ops(pid) for pid in pids] == [["register", "deregister", "finalize"]] * 2
    assert sorted(manager.killed) == pids, "`kill` once for each, by rmprocs"


def test_C277_one_byte_at_a_time() -> None:
    pids = addprocs(OverStreams(1, serve=ONE_BYTE))
    assert remotecall_fetch(distpool.myid, pids[0]) == pids[0]
    assert remotecall_fetch(lambda text: text * 2, pids[0], "x" * 1000) == "x" * 2000


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_C277_closing_the_stream_is_the_death_of_the_worker(pair: bool, known: bool) -> None:
    manager = OverStreams(2, pair=pair, known=known)
    first, second = addprocs(manager)
    waiting = remotecall(time.sleep, first, 60)
    for stream in manager.streams.get(first, ()):
        stream.close()
    manager.sockets[first].close()
    with pytest.raises(distpool.ProcessExitedException) as info:
        waiting.result(10)
    assert info.value.worker_id == first
    wait_until(lambda: others() == [second])
    # It exits by itself; a process that the master knows, and that takes longer than a second, is killed (on a machine
    # at half its speed).
    ends = (1, -signal.SIGKILL) if known else (1,)
    assert manager.processes[0].wait(10) in ends, "a worker that has lost its master exits"
    assert manager.killed == []
    wait_until(lambda: manager.ops(first) == ["register", "deregister", "finalize"])


def test_C259_crashed_workers_are_deregistered_once() -> None:
    manager = ByCommand(1)
    (pid,) = addprocs(manager)
    manager.processes[0].kill()
    wait_until(lambda: others() == [])
    wait_until(lambda: manager.ops(pid) == ["register", "deregister", "finalize"])
    assert manager.killed == []
    with pytest.raises(distpool.ProcessExitedException) as info:
        remotecall_fetch(distpool.myid, pid)
    assert info.value.exitcode == -signal.SIGKILL


def test_C272_launch_may_be_a_generator_and_runs_while_workers_connect() -> None:
    joined = threading.Event()
    seen: list[bool] = []

    class Slow(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            yield from super().launch(params)
            seen.append(joined.wait(30))
            yield from super().launch(params)

        def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
            joined.set()

    assert len(addprocs(Slow(1))) == 2
    assert seen == [True], "the first worker joined before launch had ended"


def test_C272_launch_that_raises_keeps_what_was_launched() -> None:
    class Failing(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            yield from super().launch(params)
            raise OSError("no more")

    with pytest.raises(distpool.CompositeException) as info:
        addprocs(Failing(2))
    assert [type(error) for error in info.value] == [distpool.LaunchWorkerError]
    assert "no more" in str(info.value) and isinstance(info.value.exceptions[0].__cause__, OSError)
    assert len(others()) == 2
    check_works(others())


def test_launch_that_gives_something_else() -> None:
    class Wrong(Recording):
        def launch(self, params: dict[str, Any]) -> list[Any]:
            return ["host"]

    with pytest.raises(TypeError, match="WorkerConfig"):
        addprocs(Wrong())


def test_C273_only_host_and_port() -> None:
    process = start([sys.executable, "-m", "distpool", "worker", "--bind-to", "127.0.0.1"], distpool.cluster_cookie())
    assert process.stdout is not None
    host, port = distpool.managers.base.parse_header(process.stdout.readline().decode())  # type: ignore[misc]

    class Existing(Recording):
        def launch(self, params: dict[str, Any]) -> list[WorkerConfig]:
            return [WorkerConfig(host=host, port=port)]

    pids = addprocs(Existing())
    check_works(pids)
    rmprocs(pids)
    assert process.wait(10) == 0
    process.stdout.close()


def test_C274_launch_gets_defaults_and_everything_that_was_passed() -> None:
    class Mine(ByCommand):
        def default_addprocs_params(self) -> dict[str, Any]:
            return {**super().default_addprocs_params(), "queue": "short", "dir": "/tmp"}

    manager = Mine(0)
    assert addprocs(manager, queue="long", account="me") == []
    assert manager.params["queue"] == "long" and manager.params["account"] == "me" and manager.params["dir"] == "/tmp"
    base = {"topology", "dir", "exename", "exeflags", "env", "enable_threaded_blas", "lazy"}
    assert base <= set(manager.params) and base <= set(distpool.default_addprocs_params())
    assert distpool.default_addprocs_params(manager)["queue"] == "short"
    assert distpool.default_addprocs_params()["exename"] == manager.params["exename"] == sys.executable


def test_C274_a_worker_can_be_started_with_what_the_parameters_say() -> None:
    class Plain(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            self.command = [params["exename"], *params["exeflags"], "-m", "distpool", "worker"]
            return super().launch(params)

    check_works(addprocs(Plain(1)))
    check_works(addprocs(Plain(1), exeflags=["-O"]))


def test_C275_the_first_worker_starts_the_rest() -> None:
    class Counting(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            for config in super().launch(params):
                config.count = 3
                config.exename = sys.executable
                yield config

    manager = Counting(1)
    pids = addprocs(manager)
    assert len(pids) == 3
    parents = [remotecall_fetch(os.getppid, pid) for pid in pids]
    assert parents[1:] == [remotecall_fetch(os.getpid, pids[0])] * 2
    rmprocs(pids[1:])
    check_works(pids[:1])


def test_C275_auto_means_the_cpus_of_the_host() -> None:
    class Automatic(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            for config in super().launch(params):
                config.count = "auto"
                config.exename = sys.executable
                yield config

    assert len(addprocs(Automatic(1))) == len(os.sched_getaffinity(0))


def test_C275_what_the_first_worker_cannot_start_is_reported() -> None:
    class Bad(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            for config in super().launch(params):
                config.count = 2
                config.exename = "/nonexistent/python"
                yield config

    with pytest.raises(distpool.CompositeException, match="nonexistent"):
        addprocs(Bad(1))
    check_works(others())
    assert len(others()) == 1


def test_C278_a_wrong_cookie() -> None:
    class Wrong(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            yield from super().launch({**params, "cookie": "another"})

    with pytest.raises(distpool.CompositeException) as info:
        addprocs(Wrong(1))
    assert isinstance(info.value.exceptions[0].__cause__, distpool.AuthenticationError)
    assert others() == []


def test_C279_a_queue() -> None:
    """As Slurm and SGE: what `launch` starts is not the worker but a client; keywords become flags."""
    flags: list[str] = []

    class Queue(Recording):
        def launch(self, params: dict[str, Any]) -> list[WorkerConfig]:
            flags.extend(f"--{name}={params[name]}" for name in ("partition",))
            command = f"{sys.executable} -m distpool worker --bind-to 127.0.0.1 2>&1 | tee job.out"
            self.process = start(["/bin/sh", "-c", f"cd {params['dir']}; {command}"], params["cookie"])
            return [WorkerConfig(io=self.process.stdout, process=self.process)]

    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        manager = Queue()
        pids = addprocs(manager, partition="short", dir=directory)
        assert flags == ["--partition=short"]
        assert distpool.nprocs() == 2 and distpool.workers() == pids
        assert remotecall_fetch(operator.add, pids[0], 1, 1) == 2
        rmprocs(pids)
        assert distpool.nprocs() == 1 and distpool.workers() == [1]
        manager.process.wait(10)
        with open(os.path.join(directory, "job.out")) as file:
            assert "distpool_worker:" in file.read()


FAILING = [
    pytest.param("import sys; print('one'); print('two'); sys.exit(3)", ["two", "exit code 3"], id="exits"),
    pytest.param("for i in range(1001): print('line', i)\nimport time; time.sleep(60)", ["line 1000", "1000 lines"],
                 id="talks"),
    pytest.param("import time; print('hello', flush=True); time.sleep(60)", ["hello", "within 4 seconds"],
                 id="silent"),
    pytest.param("import os; os.kill(os.getpid(), 9)", ["signal 9"], id="killed"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "texts"), FAILING)
def test_C199_commands_that_are_no_workers(code: str, texts: list[str]) -> None:
    manager = ByCommand(1, [sys.executable, "-u", "-c", code])
    begin = time.monotonic()
    with pytest.raises(distpool.CompositeException) as info:
        addprocs(manager, timeout=4 if "hello" in texts else 30)
    assert time.monotonic() - begin < 20
    first = info.value.exceptions[0]
    assert isinstance(first, distpool.LaunchWorkerError)
    assert all(text in str(first) for text in texts), str(first)
    assert others() == []
    manager.processes[0].wait(10)
    assert len(addprocs(1)) == 1


def test_C201_banner_lines_are_tolerated() -> None:
    code = "for i in range(1000): print('welcome', i)\n"
    code += "from distpool.cli import main; main(['worker', '--bind-to', '127.0.0.1'])"
    check_works(addprocs(ByCommand(1, [sys.executable, "-c", code])))


def test_C202_death_between_connect_and_join() -> None:
    """It listens, and hangs up on whoever connects."""
    code = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(f"distpool_worker:{listener.getsockname()[1]}#127.0.0.1", flush=True)
listener.accept()[0].close()
"""
    with pytest.raises(distpool.CompositeException):
        addprocs(ByCommand(1, [sys.executable, "-c", code]), timeout=20)
    assert others() == []
    assert len(addprocs(1)) == 1


def test_C203_partial_failure() -> None:
    class Partly(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            yield from super().launch(params)
            self.command = [sys.executable, "-c", "import sys; sys.exit('cannot')"]
            yield from super().launch(params)

    with pytest.raises(distpool.CompositeException) as info:
        addprocs(Partly(2))
    assert len(info.value) == 2 and all("cannot" in str(error) for error in info.value)
    assert len(others()) == 2
    check_works(others())


def test_a_config_that_leads_nowhere() -> None:
    class Empty(Recording):
        def launch(self, params: dict[str, Any]) -> list[WorkerConfig]:
            return [WorkerConfig()]

    with pytest.raises(distpool.CompositeException, match="neither io nor host"):
        addprocs(Empty())


def test_connect_that_raises_or_returns_nonsense() -> None:
    class Raising(ByCommand):
        def connect(self, pid: int, config: WorkerConfig) -> Any:
            raise ConnectionRefusedError("not you")

    class Nonsense(ByCommand):
        def connect(self, pid: int, config: WorkerConfig) -> Any:
            return io.BytesIO()

    for manager, text in ((Raising(1), "not you"), (Nonsense(1), "socket or a pair")):
        with pytest.raises(distpool.CompositeException, match=text):
            addprocs(manager)
        assert isinstance(manager.processes[0].wait(10), int)


def test_C235_custom_topology() -> None:
    class Parity(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            for number, config in enumerate(super().launch(params), 1):
                config.ident = number
                config.connect_idents = range(number + 2, self.n + 1, 2)
                yield config

    manager = Parity(4)
    pids = addprocs(manager, topology="custom")
    for one in pids:
        for other in pids:
            if (one - other) % 2 == 0:
                assert remotecall_fetch(lambda pid: remotecall_fetch(distpool.myid, pid), one, other) == other
            else:
                with pytest.raises(distpool.RemoteException) as info:
                    remotecall_fetch(lambda pid: remotecall_fetch(distpool.myid, pid), one, other)
                assert isinstance(info.value.captured.ex, distpool.TopologyError)
    assert sorted(manager.told) == [("register", pid) for pid in pids]


def test_C241_idents_that_never_come() -> None:
    class Lonely(ByCommand):
        def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
            for config in super().launch(params):
                config.ident, config.connect_idents = "a", ["b"]
                yield config

    manager = Lonely(1)
    with pytest.raises(RuntimeError, match=r"peer workers did not connect within 10 seconds"):
        addprocs(manager, topology="custom", timeout=10)  # in 3, with three suites at a time, it did not even join
    wait_until(lambda: others() == [])
    assert manager.processes[0].wait(10) == 0
    wait_until(lambda: [op for op, _ in manager.told] == ["register", "deregister", "finalize"])
    assert manager.killed == [], "`kill` only from rmprocs and exit"


def test_C239_who_is_leaving_does_not_hold_the_topology() -> None:
    """A worker that nobody lists any more may take its time: it is nobody's business which topology comes next."""
    manager = ByCommand(1)
    (pid,) = addprocs(manager, topology="master_worker")
    manager.processes[0].send_signal(signal.SIGSTOP)
    left = rmprocs(pid, waitfor=0)
    assert others() == []
    (new,) = addprocs(1)
    manager.processes[0].kill()
    left.result(30)
    one, two = [new, *addprocs(1)]
    assert remotecall_fetch(remotecall_fetch, one, distpool.myid, two) == two


def test_C212_streams_of_start_worker() -> None:
    code = "import sys, distpool; distpool.start_worker(close_stdin={}, stderr_to_stdout={})"
    for close_stdin in (True, False):
        for to_stdout in (True, False):
            process = subprocess.Popen(
                [sys.executable, "-c", code.format(close_stdin, to_stdout)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            try:
                check_streams(process, close_stdin, to_stdout)
            finally:
                process.kill()  # where it has failed
                process.stdin.close()
                process.stderr.close()


def check_streams(process: Any, close_stdin: bool, to_stdout: bool) -> None:
    process.stdin.write(distpool.cluster_cookie().encode() + b"\nmore\n")
    process.stdin.flush()

    class Mine(Recording):
        def launch(self, params: dict[str, Any]) -> list[WorkerConfig]:
            return [WorkerConfig(io=process.stdout, process=process)]

    (pid,) = addprocs(Mine())
    assert remotecall_fetch(lambda: os.fstat(1) == os.fstat(2), pid) == to_stdout
    said = remotecall_fetch(lambda: os.read(0, 100), pid)
    assert said == (b"" if close_stdin else b"more\n")
    rmprocs(pid)
    assert process.wait(10) == 0


def test_C209_a_worker_that_nobody_wants() -> None:
    env = {**os.environ, "DISTPOOL_WORKER_TIMEOUT": "1.5"}
    done = subprocess.run(
        [sys.executable, "-m", "distpool", "worker", "--bind-to", "127.0.0.1"],
        input=b"cookie\n",
        capture_output=True,
        env=env,
        timeout=40,
    )
    assert done.returncode == 1
    assert b"Master process (id 1) could not connect within 1.5 seconds." in done.stdout


def test_C209_init_worker_gives_up_as_well() -> None:
    code = "import distpool; distpool.init_worker('cookie')"
    env = {**os.environ, "DISTPOOL_WORKER_TIMEOUT": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, timeout=40)
    assert done.returncode == 1 and b"could not connect within 1.0 seconds." in done.stdout


def test_process_messages_needs_a_worker() -> None:
    with pytest.raises(RuntimeError, match="init_worker"):
        distpool.process_messages(io.BytesIO(), io.BytesIO())
    addprocs(1)
    with pytest.raises(RuntimeError, match="belongs to a process group"):
        distpool.init_worker("cookie")
    with pytest.raises(RuntimeError, match="belongs to a process group"):
        distpool.start_worker(cookie="cookie")


@pytest.mark.parametrize("kind", transports.CUSTOM)
def test_C233_master_worker_over_custom_transports(kind: str) -> None:
    with transports.environment(kind):
        one, two = addprocs(transports.manager_of(kind, 2), topology="master_worker")
    with pytest.raises(distpool.RemoteException) as info:
        remotecall_fetch(remotecall_fetch, one, distpool.myid, two)
    assert isinstance(info.value.captured.ex, distpool.TopologyError)
    check_works([one, two]) if kind != "bytes" else None


@pytest.mark.parametrize("kind", transports.CUSTOM)
def test_C237_links_over_custom_transports_that_are_not_lazy(kind: str) -> None:
    with transports.environment(kind):
        pids = addprocs(transports.manager_of(kind, 3), lazy=False)
    made = [remotecall_fetch(lambda: distpool.node.node.current().peers.opened, pid) for pid in pids]
    assert made == [2, 2, 2]
    assert [remotecall_fetch(remotecall_fetch, pids[0], distpool.myid, pid) for pid in pids] == pids


def test_C271_workers_of_several_transports_in_one_group() -> None:
    """Two stars, Unix sockets and ordinary workers: whoever can reach the other one makes the link."""
    pytest.importorskip("zmq")
    pids = [transports.add(kind, 1)[0] for kind in ("star", "fork", "star", "exec")]
    for source in pids:
        for target in pids:
            assert remotecall_fetch(remotecall_fetch, source, distpool.myid, target) == target


def test_C271_no_way_between_two_workers_is_an_error() -> None:
    """Workers behind streams that have no manager of their own: a clear error, at once, in both directions."""
    one, two = addprocs(OverStreams(2))
    for source, target in ((one, two), (two, one)):
        begin = time.monotonic()
        with pytest.raises(distpool.RemoteException, match="custom transport") as info:
            remotecall_fetch(remotecall_fetch, source, distpool.myid, target)
        assert isinstance(info.value.captured.ex, ConnectionError)
        assert time.monotonic() - begin < 10
    check_works([one, two])


def test_C271_connect_that_fails_or_leads_to_another_worker() -> None:
    manager = transports.manager_of("astray", 3)
    with transports.environment("astray"):
        one, two, three = addprocs(manager)
    with pytest.raises(distpool.RemoteException, match=f"connected to process {one}, not to process {two}") as info:
        remotecall_fetch(remotecall_fetch, three, distpool.myid, two)
    assert isinstance(info.value.captured.ex, ConnectionError)
    assert remotecall_fetch(remotecall_fetch, three, distpool.myid, one) == one


def launch_of_a_star(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Iterator[distpool.WorkerConfig]]:
    monkeypatch.setenv("PYTHONPATH", transports.ROOT)
    manager = transports.manager_of("star", 3)
    return manager, manager.launch({"cookie": "0123456789abcdef"})


def test_a_star_whose_launch_is_given_up_ends_with_the_last_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """`launch` is closed after its first worker: nobody will ever hear of the others, which count for the hub."""
    manager, launching = launch_of_a_star(monkeypatch)
    config = next(launching)
    hub = manager.hub
    launching.close()
    first, *others = manager.processes
    assert [other.returncode for other in others] == [-9, -9] and first.poll() is None and hub.poll() is None
    manager.manage(2, config, "finalize")
    assert manager.hub is None and hub.returncode == 0
    first.kill()
    assert first.wait(timeout=10) is not None


def test_a_star_whose_launch_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, launching = launch_of_a_star(monkeypatch)
    begun: list[Any] = []

    def start(*arguments: str, **keywords: Any) -> Any:
        if len(begun) == 2:
            raise OSError("no further process can be started")
        begun.append(type(manager)._start(manager, *arguments, **keywords))
        return begun[-1]

    monkeypatch.setattr(manager, "_start", start)
    with pytest.raises(OSError, match="no further process"):
        next(launching)
    assert manager.hub is None and [process.returncode for process in begun] == [0, -9]


def test_the_hub_of_a_star_ends_although_a_fork_of_the_master_holds_its_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, launching = launch_of_a_star(monkeypatch)
    manager.count = 0
    monkeypatch.setattr(manager, "_leave", lambda: None)
    assert list(launching) == []
    monkeypatch.undo()
    copy = os.dup(manager.hub.stdin.fileno())  # as a fork of this process has it
    try:
        hub = manager.hub
        manager._leave()
        assert hub.returncode == 0
    finally:
        os.close(copy)
