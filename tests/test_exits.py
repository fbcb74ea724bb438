"""The end of a program: what is pending is done, or dropped after Ctrl-C, and nothing is said on stderr."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

NOISE = 3.0


def run(text: str, *arguments: object, timeout: float = 50.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("ending", ["", "ex.shutdown(wait=False)", "sys.exit(4)", "del ex"])
def test_pending_work_is_done(tmp_path: Path, ending: str) -> None:
    done = run(
        f"""
        import pathlib, sys, time, distpool
        path = pathlib.Path(sys.argv[1])
        def work(n):
            time.sleep(0.01)
            (path / str(n)).touch()
            return n
        ex = distpool.ClusterExecutor(2)
        futures = [ex.submit(work, n) for n in range(20)]
        results = ex.map(work, range(20, 40))
        {ending}
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (4 if "exit" in ending else 0, "", "")
    assert sorted(int(name) for name in os.listdir(tmp_path)) == list(range(40))


def test_callbacks_of_pending_work_run() -> None:
    done = run("""
        import sys, distpool
        ex = distpool.ClusterExecutor(1)
        for n in range(5):
            ex.submit(pow, n, 2).add_done_callback(lambda future: sys.stdout.write(f"{future.result()}\\n"))
    """)
    assert sorted(done.stdout.split()) == ["0", "1", "16", "4", "9"] and done.stderr == ""


@pytest.mark.parametrize("end", ["", "ex.shutdown()", "ex.shutdown(wait=False)", "with ex: pass"])
def test_callbacks_are_waited_for(end: str) -> None:
    """As with the standard library, whose threads run them. Seen: the program was gone in the midst of them."""
    done = run(f"""
        import threading, distpool
        begun, go = threading.Event(), threading.Event()
        def callback(future):
            begun.set()
            go.wait(30)
            print(future.result())
        ex = distpool.ClusterExecutor(1)
        ex.submit(pow, 7, 2).add_done_callback(callback)
        begun.wait()
        threading.Timer(1, go.set).start()
        {end}
        print("end")
    """)
    assert done.stderr == ""
    assert done.stdout.split() == (["49", "end"] if end in ("ex.shutdown()", "with ex: pass") else ["end", "49"])


def test_a_callback_may_shut_its_executor_down() -> None:
    done = run("""
        import distpool
        def callback(future):
            ex.shutdown()
            print(future.result())
        ex = distpool.ClusterExecutor(1)
        ex.submit(pow, 7, 2).add_done_callback(callback)
    """)
    assert (done.stdout, done.stderr) == ("49\n", "")


def test_the_first_error_of_a_program_may_come_at_its_end() -> None:
    """Seen: `concurrent.futures.process` cannot be loaded then, so the callback had an error of its own."""
    done = run("""
        import time, distpool
        ex = distpool.ClusterExecutor(1)
        ex.submit(lambda: (time.sleep(0.3), 1 / 0)).add_done_callback(lambda future: print(repr(future.exception())))
    """)
    assert (done.stdout, done.stderr) == ("ZeroDivisionError('division by zero')\n", "")


@pytest.mark.parametrize("way", ["atexit.register(call)", "threading.Thread(target=call).start()"])
def test_the_first_call_of_a_program_may_come_at_its_end(way: str) -> None:
    done = run(f"""
        import atexit, threading, distpool
        (pid,) = distpool.addprocs(1)
        def call():
            if threading.current_thread() is not threading.main_thread():
                threading.main_thread().join()
            print(distpool.remotecall_fetch(pow, pid, 7, 2))
        {way}
    """)
    assert (done.stdout, done.stderr) == ("49\n", "")


def test_output_of_workers_appears() -> None:
    done = run("""
        import distpool
        ex = distpool.ClusterExecutor(1)
        ex.submit(print, "from the worker")
    """)
    assert done.stderr == "" and done.stdout.endswith(":\tfrom the worker\n")


def test_a_forgotten_executor() -> None:
    """No shutdown, no with; work that is done, work that never came, objects in cycles."""
    done = run("""
        import distpool
        ex = distpool.ClusterExecutor(2)
        assert ex.submit(pow, 2, 3).result() == 8
        cycle = [ex]; cycle.append(cycle)
        idle = distpool.ClusterExecutor(1)
        never = distpool.ClusterExecutor(1, initializer=print, initargs=("init",))
    """)
    assert (done.returncode, done.stderr) == (0, "") and "init" in done.stdout


def test_an_executor_dropped_in_mid_program_leaves_no_process() -> None:
    done = run("""
        import gc, os, psutil, distpool
        ex = distpool.ClusterExecutor(1)
        worker = ex.submit(os.getpid).result()
        del ex; gc.collect()
        try:
            psutil.Process(worker).wait(20)
        except psutil.NoSuchProcess:
            pass
        print("gone")
    """)
    assert (done.stdout, done.stderr) == ("gone\n", "")


def test_nothing_is_taken_any_more_in_atexit_hooks() -> None:
    done = run("""
        import atexit, distpool
        ex = distpool.ClusterExecutor(1)
        ex.submit(pow, 2, 3).result()
        def hook():
            for call in (lambda: ex.submit(pow, 1, 1), lambda: distpool.ClusterExecutor(1)):
                try:
                    call()
                except RuntimeError as error:
                    print(error)
        atexit.register(hook)
    """)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("cannot schedule new futures") for line in lines)
    assert done.stderr == ""


def test_an_uncaught_keyboard_interrupt_drops_pending_work() -> None:
    text = """
        import time, distpool
        ex = distpool.ClusterExecutor(1)
        ex.submit(pow, 2, 3).result()
        futures = [ex.submit(time.sleep, 60) for n in range(5)]
        print("ready", flush=True)
        futures[0].result()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    begin = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert time.monotonic() - begin < 1.0 * NOISE
    assert child.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")


def test_os_exit_leaves_nothing() -> None:
    done = run("""
        import os, time, distpool
        ex = distpool.ClusterExecutor(2)
        pids = {ex.submit(os.getpid).result() for _ in range(5)}
        print(*pids, flush=True)
        futures = [ex.submit(time.sleep, 60) for _ in range(4)]
        os._exit(3)
    """)
    assert (done.returncode, done.stderr) == (3, "")
    end = time.monotonic() + 20
    for pid in map(int, done.stdout.split()):
        while alive(pid):
            assert time.monotonic() < end, f"worker {pid} outlived the program"
            os.sched_yield()


def alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("make, use, end", [
    ("ClusterExecutor(1)", "submit(abs, -1).result()", "shutdown()"),
    ("ClusterExecutor(1)", "submit(abs, -1).result()", "__exit__(None, None, None)"),
    ("DistPool(1)", "apply(abs, (-1,))", "terminate()"),
    ("DistPool(1)", "apply(abs, (-1,))", "close()"),
])  # fmt: skip
def test_an_owner_that_closes_it_when_the_interpreter_goes_does_not_wait(make: str, use: str, end: str) -> None:
    """Seen: five seconds, for a thread of the library that could not run any more."""
    done = run(f"""
        import time, distpool
        class Owner:
            def __init__(self): self.mine = distpool.{make}
            def __del__(self, clock=time.monotonic, say=print):
                begin = clock()
                self.mine.{end}
                say(clock() - begin)
        owner = kept = Owner()
        assert owner.mine.{use} == 1
    """)
    assert done.returncode == 0 and done.stderr == ""
    assert float(done.stdout) < 2.0, done.stdout


def test_workers_that_are_still_coming_go_with_the_program() -> None:
    """What a manager has started is nobody's worker yet; without a master it would wait for a minute."""
    done = run("""
        import socket, subprocess, distpool
        server = socket.create_server(("127.0.0.1", 0))
        class Slow(distpool.ClusterManager):
            def launch(self, params):
                text = f"echo distpool_worker:{server.getsockname()[1]}#127.0.0.1; exec sleep 60"
                process = subprocess.Popen(["sh", "-c", text], stdout=subprocess.PIPE)
                print(process.pid, flush=True)
                yield distpool.WorkerConfig(io=process.stdout, process=process)
        future = distpool.addprocs_async(Slow())
        connection, _ = server.accept()
    """)
    assert done.returncode == 0 and done.stderr == ""
    ospid = int(done.stdout)
    try:
        assert psutil.Process(ospid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        pass


def test_output_waits_for_its_reader() -> None:
    """As what the program prints itself does, for instance into a pager: longer than anything else may take then."""
    source = """if True:
        import sys, distpool
        from distpool import crew, exits
        crew._NOTICES = exits._TOLD = 0.05
        def work():
            for number in range(4000):
                print("x" * 1000)
        with distpool.ClusterExecutor(1) as ex:
            ex.submit(work).result()
            sys.stderr.write("done\\n")
        sys.stderr.write("left\\n")
    """
    command = [sys.executable, "-c", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None and program.stderr is not None
        assert [program.stderr.readline() for _ in range(2)] == ["done\n", "left\n"]
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(1.0)
        out, err = program.communicate(timeout=50)
    assert (program.returncode, out.count("\n"), err) == (0, 4000, "")


def test_threads_that_have_idled_away_are_not_missed_at_the_end() -> None:
    """What pending calls need at the end runs on library threads, and 3.12.0 starts none any more by then."""
    done = run("""
        import sys, threading, distpool
        from distpool.node import threads
        threads.IDLE = 0.05
        reserved = 2 if (3, 12) <= sys.version_info < (3, 12, 2) else 0
        def work():
            return 5
        ex = distpool.ClusterExecutor(1)
        ex.submit(abs, -1).add_done_callback(lambda future: None)
        ex.submit(abs, -1).result()
        while sum(thread.name.startswith("distpool-task") for thread in threading.enumerate()) > reserved:
            threading.Event().wait(0.02)
        ex.submit(work).add_done_callback(lambda future: print(future.result()))
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")
