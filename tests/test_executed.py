"""Workers that are executed: how their header is found, why there is none, and the end. Without any interpreter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import PATIENCE

from distpool.errors import LaunchWorkerError
from distpool.managers import executed
from distpool.managers.executed import MAX_NOISE, Executed
from distpool.managers.process import LaunchedProcess, LaunchSpec
from distpool.transport.ioloop import IoLoop


@pytest.fixture
def loop() -> Iterator[IoLoop]:
    made = IoLoop("test-io")
    made.start()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    counts = os.path.isdir("/proc/self/fd")
    before = len(os.listdir("/proc/self/fd")) if counts else 0
    yield
    assert not counts or len(os.listdir("/proc/self/fd")) <= before


def spec(tmp_path: Path, script: str, **changes: Any) -> LaunchSpec:
    """An order for a shell script in the place of the interpreter."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    given = {
        "count": 1, "argv": [str(program)], "env": dict(os.environ), "cwd": "/", "sys_path": [], "cookie": "c" * 16,
        "timeout": PATIENCE,
    }  # fmt: skip
    return LaunchSpec(**{**given, **changes})


class Launch:
    """What `launch` gave and whom it told."""

    def __init__(self, loop: IoLoop, order: LaunchSpec) -> None:
        self.started: list[Executed] = []
        self.ended: list[Executed] = []
        self.processes: list[LaunchedProcess] = []
        self.iterator = executed.launch(loop, order, self.started.append, self.ended.append)

    def all(self) -> list[LaunchedProcess]:
        for process in self.iterator:
            self.processes.append(process)
        return self.processes

    def end(self) -> None:
        for each in self.started:
            each.close()
        for process in self.processes:
            os.close(process.output)


SERVE = "read line; echo distpool_worker:9009#127.0.0.1; cat >/dev/null"


def test_an_address_and_the_rest_of_the_output(loop: IoLoop, tmp_path: Path) -> None:
    script = "echo noise; read line; printf 'more\\ndistpool_worker:0#unix:/tmp/a b\\nbehind'; cat >/dev/null"
    launch = Launch(loop, spec(tmp_path, script))
    (process,) = launch.all()
    assert process.address == ("unix", "/tmp/a b")
    early = process.early_output
    os.set_blocking(process.output, True)
    while b"behind" not in early:
        early += os.read(process.output, 100)
    assert early == b"noise\nmore\nbehind"
    launch.end()
    assert process.exitcode == -signal.SIGKILL and launch.ended == launch.started


def test_settings_go_through_stdin_which_is_the_lifeline(loop: IoLoop, tmp_path: Path) -> None:
    script = f'read -r line; printf "%s" "$line" > {tmp_path}/line; {SERVE.partition("; ")[2]}; exit 5'
    order = spec(tmp_path, script, extra={"n": 1})
    launch = Launch(loop, order)
    (process,) = launch.all()
    assert json.loads((tmp_path / "line").read_text()) == order.settings()
    codes: list[int | None] = []
    done = threading.Event()
    process.add_exit_callback(lambda code: (codes.append(code), done.set())[0])
    (running,) = launch.started
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, running._lifeline)  # as when the master dies; the number stays for `ended`, which may come at once
    os.close(null)
    assert done.wait(PATIENCE) and codes == [5]
    launch.end()
    running.send_signal(signal.SIGTERM)  # nobody is there


@pytest.mark.parametrize("pidfd", [True, False])
def test_the_exit_is_told_by_the_leader(
    loop: IoLoop, tmp_path: Path, pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise OSError

    if not pidfd:
        monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    launch = Launch(loop, spec(tmp_path, SERVE))
    (process,) = launch.all()
    told = threading.Event()
    process.add_exit_callback(lambda code: told.set() if loop.leads else None)
    process.kill(signal.SIGTERM)
    assert told.wait(PATIENCE) and process.exitcode == -signal.SIGTERM
    launch.end()
    assert len(launch.ended) == 1  # once, whoever sees it


@pytest.mark.parametrize(
    ("script", "reason", "output"),
    [
        ("echo why; exit 3", "exit code 3 before it was ready", "why"),
        ("kill -9 $$", "killed by signal 9", ""),
        ("exec sleep 100", "no header line within 0.2 seconds", ""),
        (f"head -c {MAX_NOISE + 70000} /dev/zero; exec sleep 100", "too much before its header", ""),
        ("echo distpool_worker:99999#x; exit 1", "exit code 1", "distpool_worker:99999#x"),
    ],
)
def test_why_there_is_no_worker(loop: IoLoop, tmp_path: Path, script: str, reason: str, output: str) -> None:
    launch = Launch(loop, spec(tmp_path, script, timeout=0.2 if "within" in reason else PATIENCE))
    with pytest.raises(LaunchWorkerError) as caught:
        launch.all()
    assert reason in str(caught.value) and output in str(caught.value) and not launch.processes


def test_good_ones_come_before_the_error(loop: IoLoop, tmp_path: Path) -> None:
    script = f"mkdir {tmp_path}/first 2>/dev/null || exit 7; {SERVE}"
    launch = Launch(loop, spec(tmp_path, script, count=3))
    with pytest.raises(LaunchWorkerError, match="exit code 7"):
        launch.all()
    assert len(launch.processes) == 1 and not launch.processes[0].exited
    launch.end()


def test_a_program_that_is_not_there(loop: IoLoop, tmp_path: Path) -> None:
    launch = Launch(loop, spec(tmp_path, "", argv=[str(tmp_path / "none")]))
    with pytest.raises(LaunchWorkerError, match=r"none: .*No such file"):
        launch.all()


def test_those_that_nobody_takes_are_ended(loop: IoLoop, tmp_path: Path) -> None:
    launch = Launch(loop, spec(tmp_path, f"echo $$ >> {tmp_path}/pids; {SERVE}", count=3))
    launch.processes.append(next(launch.iterator))
    launch.iterator.close()  # type: ignore[attr-defined]
    launch.end()
    for pid in (tmp_path / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_an_order_that_cannot_be_told_starts_nothing(
    loop: IoLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)))
    with pytest.raises(TypeError):
        Launch(loop, spec(tmp_path, "cat", extra={"x": object()})).all()
    assert not started


def test_a_forked_child_only_closes(loop: IoLoop, tmp_path: Path) -> None:
    launch = Launch(loop, spec(tmp_path, SERVE))
    (process,) = launch.all()
    (running,) = launch.started
    copy = Executed.__new__(Executed)
    copy.__dict__.update(running.__dict__)
    copy._pidfd, copy._lifeline = os.dup(running._pidfd) if running._pidfd >= 0 else -1, os.dup(running._lifeline)

    class Process:
        returncode = None

    copy._process, copy.launched = Process(), None  # type: ignore[assignment]
    copy.forget()
    for number in (copy._lifeline, copy._pidfd):
        if number >= 0:
            with pytest.raises(OSError):
                os.fstat(number)
    assert copy._process.returncode == 0 and not process.exited
    launch.end()


@pytest.mark.parametrize("ready", [0, 2])
def test_headers_by_threads(ready: int) -> None:
    """As where pipes cannot be polled: each as soon as it has come, the others at the deadline."""
    pipes = [os.pipe() for _ in range(3)]
    starting: list[Any] = [executed._Starting(None, reader, -1) for reader, _ in pipes]  # type: ignore[arg-type]
    for number in range(ready):
        os.write(pipes[number][1], b"distpool_worker:9009#h\n")
    pending = list(starting)
    deadline = time.monotonic() + (0.1 if ready == 0 else PATIENCE)
    found = executed._headers_by_threads(pending, deadline)
    outcomes = [next(found) for _ in range(ready)]
    assert [address for _, address, _ in outcomes] == [("tcp", "h", 9009)] * ready
    for _, writer in pipes:
        if ready:
            os.close(writer)
    outcomes = list(found)
    assert [address for _, address, _ in outcomes] == [None] * (3 - ready) and not pending
    if not ready:
        for _, writer in pipes:
            os.close(writer)
    for thread in threading.enumerate():
        if thread.name == "distpool-header":
            thread.join(PATIENCE)
            assert not thread.is_alive()
    for reader, _ in pipes:
        os.close(reader)
