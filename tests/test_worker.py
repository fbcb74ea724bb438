"""A worker process from outside: strangers, interrupts, a master that never comes or goes away."""

from __future__ import annotations

import builtins
import concurrent.futures
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from faults.helpers import Gate, arrive, hold

import distpool
from distpool import ClusterExecutor

PATIENCE = 30.0


class ByHand:
    """`python -m distpool worker`, as a manager would start it."""

    def __init__(self, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distpool", "worker", "--worker=the-cookie", "--bind-to=127.0.0.1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **env},
            text=True,
        )

    def address(self) -> tuple[str, int]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.fullmatch(r"distpool_worker:(\d+)#(\S+)\n", line)
        assert match, line
        return match[2], int(match[1])

    def __enter__(self) -> ByHand:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


def test_a_master_that_never_comes() -> None:
    with ByHand(DISTPOOL_WORKER_TIMEOUT="0.5") as worker:
        worker.address()
        output, _ = worker.process.communicate(timeout=PATIENCE)
        assert worker.process.returncode == 1
        assert "could not connect within 0.5 seconds" in output


def test_a_master_that_never_comes_and_nobody_who_reads_that() -> None:
    with ByHand(DISTPOOL_WORKER_TIMEOUT="0.5") as worker:
        worker.address()
        assert worker.process.stdout is not None
        worker.process.stdout.close()
        assert worker.process.wait(PATIENCE) == 1


def test_a_master_is_lost_while_nobody_reads_the_output() -> None:
    """A print of the user's is stuck in the full pipe, and has the stream's lock."""
    program = textwrap.dedent("""
        import sys, distpool
        class There(distpool.ClusterManager):
            def launch(self, params):
                yield distpool.WorkerConfig(host=sys.argv[1], port=int(sys.argv[2]))
        def fill():
            import os, select
            while select.select([], [1], [], 0)[1]:
                os.write(1, bytes(4096))
            distpool.remote_do(print, 1, "full", flush=True)
            print("x" * 100000)
        distpool.cluster_cookie("the-cookie")
        distpool.remotecall(fill, *distpool.addprocs(There()))
        sys.stdin.read()
    """)
    with ByHand() as worker:
        host, port = worker.address()
        with subprocess.Popen(
            [sys.executable, "-c", program, host, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as master:
            assert master.stdout is not None
            assert master.stdout.readline() == "full\n"
            master.kill()
        assert worker.process.wait(PATIENCE) == 1


FORKS = textwrap.dedent("""
    import os, signal, socket, subprocess, sys, time, distpool
    kind, gate, worker_port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

    def worker(number):
        distpool.init_worker("the-cookie")
        sock = socket.socket(fileno=number)
        distpool.process_messages(*((sock, sock) if kind == "socket" else (sock.makefile("rb"), sock.makefile("wb"))))
        while True:
            signal.pause()

    class There(distpool.ClusterManager):
        def launch(self, params):
            yield distpool.WorkerConfig(host="127.0.0.1", port=worker_port) if worker_port else distpool.WorkerConfig()
        def connect(self, pid, config):
            if worker_port:
                return None
            near, far = socket.socketpair()
            code = f"import sys; sys.argv = {sys.argv!r}; TEXT = {TEXT!r}; exec(TEXT); worker({far.fileno()})"
            subprocess.Popen([sys.executable, "-c", code], pass_fds=[far.fileno()], stdout=subprocess.DEVNULL)
            far.close()
            return near

    def fork(gate):
        ready, told = os.pipe()
        if os.fork() == 0:
            connection = socket.create_connection(("127.0.0.1", gate))
            os.write(told, b"x")
            connection.recv(1)
            os._exit(0)
        os.read(ready, 1)
        return os.getpid()

    def main():
        distpool.cluster_cookie("the-cookie")
        pid, = distpool.addprocs(There())
        worker = distpool.remotecall_fetch(fork, pid, gate)
        asleep = distpool.remotecall(time.sleep, pid, 600)
        os.kill(worker, signal.SIGKILL)
        try:
            asleep.result(30)
        except distpool.ProcessExitedException:
            print("gone", flush=True)
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", ["dialled", "socket", "pair"])
def test_a_death_is_noticed_although_a_forked_child_lives_on(kind: str) -> None:
    """Nobody watches the process of this worker, so the end of its connection has to tell. The child had a copy."""
    code = f"TEXT = {FORKS!r}; exec(TEXT); main()"
    with ByHand() as worker, socket.create_server(("127.0.0.1", 0)) as gate:
        port = worker.address()[1] if kind == "dialled" else 0
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, kind, str(gate.getsockname()[1]), str(port)],
            stdout=subprocess.PIPE,
            text=True,
            timeout=2 * PATIENCE,
        )
        gate.settimeout(PATIENCE)
        with gate.accept()[0] as child:
            child.setblocking(False)
            with pytest.raises(BlockingIOError):  # it lives
                child.recv(1)
        assert done.stdout == "gone\n"


def test_strangers_are_sent_away_and_the_worker_waits_on() -> None:
    with ByHand(DISTPOOL_WORKER_TIMEOUT="20") as worker:
        address = worker.address()
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n" * 3, b"\0" * 100, os.urandom(200)):
            with socket.create_connection(address, PATIENCE) as stranger:
                stranger.sendall(data)
                stranger.shutdown(socket.SHUT_WR)
                try:
                    while stranger.recv(4096):
                        pass
                except ConnectionError:
                    pass
        assert worker.process.poll() is None


def test_who_dies_before_it_says_who_it_is_is_no_stranger() -> None:
    """A worker that is killed while it connects to another one; there it was reported as one with bad credentials."""
    with ByHand(DISTPOOL_WORKER_TIMEOUT="20") as worker:
        address = worker.address()
        with socket.create_connection(address, PATIENCE) as killed:
            killed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
        with socket.create_connection(address, PATIENCE) as stranger:
            stranger.sendall(os.urandom(200))
            assert worker.process.stdout is not None
            line = worker.process.stdout.readline()
        assert line.startswith("Invalid connection credentials: ") and "Errno" not in line


def test_an_interrupt_ends_what_runs_and_nothing_else(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    executor = make(1)
    worker = executor.submit(os.getpid).result(PATIENCE)
    os.kill(worker, signal.SIGINT)
    assert executor.submit(os.getpid).result(PATIENCE) == worker, "an idle worker is unharmed"
    address = gate.address

    def sleep_long() -> None:
        connection = arrive(address)
        try:
            time.sleep(600)
        finally:
            connection.close()

    future = executor.submit(sleep_long)
    gate.arrival()
    for _ in range(30):  # one that comes as `sleep` is about to begin interrupts nothing: CPython's race
        os.kill(worker, signal.SIGINT)
        if concurrent.futures.wait([future], 1).done:
            break
    assert isinstance(future.exception(0), KeyboardInterrupt)
    assert executor.submit(os.getpid).result(PATIENCE) == worker


def test_many_interrupts_cost_at_most_what_runs(make: Callable[..., ClusterExecutor]) -> None:
    """At any moment: while decoding, between calls, while results are sent. Nothing else may break or be lost."""
    executor = make(1)
    worker = executor.submit(os.getpid).result(PATIENCE)
    hit = 0
    for _ in range(100):
        futures = [executor.submit(pow, number, 2) for number in range(20)]
        os.kill(worker, signal.SIGINT)
        for number, future in enumerate(futures):
            error = future.exception(PATIENCE)
            if error is None:
                assert future.result() == number * number
            else:
                assert isinstance(error, KeyboardInterrupt)
                hit += 1
    assert hit <= 100
    assert executor.submit(os.getpid).result(PATIENCE) == worker


def replace_builtin(name: str) -> int:
    setattr(builtins, name, None)
    return 1


@pytest.mark.parametrize("name", ["bytes", "isinstance", "len", "range", "type"])
def test_a_call_that_breaks_the_interpreter_costs_its_worker(make: Callable[..., ClusterExecutor], name: str) -> None:
    """Whatever part of the library fails first, in whichever thread, the process ends. Seen: its I/O thread had ended,
    and it lived on and answered nobody."""
    executor = make(1)
    broken = [executor.submit(replace_builtin, name), *(executor.submit(abs, -number) for number in range(3))]
    for future in broken:
        assert isinstance(future.exception(PATIENCE), Exception | None)
    assert executor.submit(abs, -9).result(PATIENCE) == 9


def test_a_worker_whose_loop_has_crashed_says_so(make: Callable[..., ClusterExecutor]) -> None:
    """With an exit status of its own, and the traceback as its last words."""
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    executor = make(1)
    pid = executor.submit(distpool.myid).result(PATIENCE)
    distpool.on_worker_exited(lambda info: ended.put(info) if info.pid == pid else None)
    assert executor.submit(replace_builtin, "isinstance").result(PATIENCE) == 1
    assert executor.submit(abs, -1).result(PATIENCE) == 1
    assert ended.get(timeout=PATIENCE).exitcode == 70


def test_a_worker_ends_with_its_master() -> None:
    """Killed without a chance to say goodbye, while its workers are busy."""
    program = textwrap.dedent("""
        import os, time, distpool
        ex = distpool.ClusterExecutor(2)
        futures = [ex.submit(os.getpid) for _ in range(20)]
        print(*{future.result() for future in futures}, flush=True)
        [ex.submit(time.sleep, 600) for _ in range(4)]
        time.sleep(600)
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as master:
        assert master.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in master.stdout.readline().split()]
        assert workers
        master.kill()
        gone, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive


def test_workers_are_fresh_interpreters_with_the_callers_path(make: Callable[..., ClusterExecutor]) -> None:
    executor = make(1)

    def look() -> tuple[list[str], bool, str]:
        import threading

        return sys.path, threading.current_thread() is threading.main_thread(), os.getcwd()

    path, on_main, directory = executor.submit(look).result(PATIENCE)
    assert [entry for entry in sys.path if entry] == [entry for entry in path if entry]
    assert on_main and directory == os.getcwd()


@pytest.mark.leaves_processes("the shell that removes the launcher's directory at the end of this program")
@pytest.mark.parametrize("way", ["fork", "exec"])
def test_workers_look_like_children_of_multiprocessing(
    make: Callable[..., ClusterExecutor], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Code asks whether it runs in the main process, and counts workers by their identity."""
    monkeypatch.setenv("DISTPOOL_LAUNCH", way)
    monkeypatch.setattr(sys, "argv", ["prog\udcff", "--option", 7])
    executor = make(2)

    def look() -> list[Any]:
        import multiprocessing

        own, parent = multiprocessing.current_process(), multiprocessing.parent_process()
        assert parent is not None and parent.is_alive()
        assert type(own) is multiprocessing.process.BaseProcess and "started" in repr(own)
        return [own.name, own._identity, own.daemon, own.pid == os.getpid(), parent.name, parent.pid, sys.argv]  # type: ignore[attr-defined]

    assert executor.submit(len, "ab").result(PATIENCE) == 2
    numbers = [pid - 1 for pid in executor.workers]
    found = [executor.options(pids=number + 1).submit(look).result(PATIENCE) for number in numbers]
    argv = ["prog\udcff", "--option"]
    assert found == [
        [f"DistpoolWorker-{number}", (number,), False, True, "MainProcess", os.getpid(), argv] for number in numbers
    ]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore")
def test_children_of_tasks_look_like_grandchildren(
    make: Callable[..., ClusterExecutor], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", "--option"])
    executor = make(1)
    assert executor.submit(len, "ab").result(PATIENCE) == 2
    (number,) = (pid - 1 for pid in executor.workers)
    found, worker = executor.submit(ask_a_child, method).result(PATIENCE)
    assert found == [f"DistpoolWorker-{number}", worker, True, (number, 1), ["prog", "--option"]]


def ask_a_child(method: str) -> tuple[list[Any], int]:
    import multiprocessing

    context: Any = multiprocessing.get_context(method)
    reader, writer = context.Pipe()
    process = context.Process(target=answer, args=(writer,))
    process.start()
    assert reader.poll(PATIENCE)
    found = reader.recv()
    process.join(PATIENCE)
    assert process.exitcode == 0
    return found, os.getpid()


def answer(connection: Any) -> None:
    import multiprocessing

    own, parent = multiprocessing.current_process(), multiprocessing.parent_process()
    assert parent is not None
    connection.send([parent.name, parent.pid, parent.is_alive(), own._identity, sys.argv])  # type: ignore[attr-defined]


def test_a_worker_that_nobody_would_tell_of_its_parent() -> None:
    """One of another host, say."""
    code = (
        "import multiprocessing; from distpool import startup, worker\n"
        "assert startup.lifeline == -1; worker._pose_as_child(3, 77)\n"
        "parent = multiprocessing.parent_process(); parent.join(0)\n"
        "print(multiprocessing.current_process().name, parent.pid, parent.is_alive())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("DistpoolWorker-3 77 True\n", "")


def test_standard_input_is_empty(make: Callable[..., ClusterExecutor]) -> None:
    assert make(1).submit(lambda: sys.stdin.read() if sys.stdin is not None else "").result(PATIENCE) == ""


def test_two_executors_do_not_disturb_each_other(make: Callable[..., ClusterExecutor], gate: Gate) -> None:
    one, other = make(1), make(1)
    held = one.submit(hold, gate.address, "held")
    gate.arrival()
    assert other.submit(pow, 2, 3).result(PATIENCE) == 8
    other.shutdown()
    gate.close()
    assert held.result(PATIENCE) == "held" and one.submit(pow, 2, 4).result(PATIENCE) == 16
