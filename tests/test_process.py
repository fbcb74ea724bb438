"""The order for local workers, and the handle of one that was started."""

from __future__ import annotations

import ast
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fakes import PATIENCE

from distpool.managers import executed, zygotes
from distpool.managers.process import PACKAGE, SIGKILL, LaunchedProcess, LaunchSpec, boot_code, last_lines, unlink


def spec(**changes: Any) -> LaunchSpec:
    given = {"count": 1, "argv": ["python"], "env": {"A": "secret"}, "cwd": "/", "sys_path": ["/a"], "cookie": "c"}
    return LaunchSpec(**{**given, **changes})


def test_settings_are_what_a_worker_is_told() -> None:
    settings = spec(own_path=True, extra={"n": 1}, timeout=2.5).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["extra"] == {"n": 1} and settings["own_path"] is True and settings["timeout"] == 2.5
    assert settings["entry"] == "distpool.worker:run" and settings["transport"] == "unix"
    assert spec().settings()["extra"] == {}
    assert not {"env", "argv", "count", "method"} & set(settings)


class Sent:
    def __init__(self) -> None:
        self.signals: list[int] = []

    def __call__(self, signum: int) -> None:
        self.signals.append(signum)


def launched(**options: Any) -> tuple[LaunchedProcess, Sent]:
    sent = Sent()
    return LaunchedProcess(4711, ("unix", "/x"), -1, sent, **options), sent


def test_callbacks_come_once_at_the_end_or_at_once_behind_it() -> None:
    process, _ = launched()
    codes: list[tuple[str, int | None]] = []
    process.add_exit_callback(lambda code: codes.append(("early", code)))
    assert not process.exited and process.exitcode is None and "running" in repr(process)
    process.ended(3)
    process.ended(4)
    process.add_exit_callback(lambda code: codes.append(("late", code)))
    assert codes == [("early", 3), ("late", 3)]
    assert process.exited and process.exitcode == 3 and "exited: 3" in repr(process)


def test_an_unknown_status_is_an_end_too() -> None:
    process, sent = launched()
    process.ended(None)
    assert process.exited and process.exitcode is None
    process.kill()
    assert sent.signals == []


def test_a_callback_that_fails_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    process, _ = launched()
    codes: list[int | None] = []

    def fail(code: int | None) -> None:
        raise KeyError("x")

    process.add_exit_callback(fail)
    process.add_exit_callback(codes.append)
    with caplog.at_level(logging.ERROR, "distpool"):
        process.ended(0)
    assert codes == [0] and "4711" in caplog.text


def test_a_callback_may_ask_the_process() -> None:
    process, _ = launched()
    done = threading.Event()
    process.add_exit_callback(lambda code: process.add_exit_callback(lambda again: done.set()))
    process.ended(0)
    assert done.is_set()


def test_signals_go_by_whom_there_is() -> None:
    process, sent = launched()
    process.kill()
    process.kill(signal.SIGINT)
    assert sent.signals == [SIGKILL, signal.SIGINT]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no pidfd here")
def test_the_end_of_a_process_shows_before_anybody_has_reaped_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process, _ = launched(pidfd=os.pidfd_open(child.pid))
    assert not process.has_ended
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there to be reaped
    assert process.has_ended and not process.exited
    child.communicate()
    process.ended(-9)
    assert process.has_ended


def test_without_a_pidfd_an_end_is_known_when_it_is_told() -> None:
    process, _ = launched()
    assert not process.has_ended
    process.ended(None)
    assert process.has_ended


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no pidfd here")
def test_with_a_pidfd_signals_need_nobody() -> None:
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    pidfd = os.pidfd_open(child.pid)
    process, sent = launched(pidfd=pidfd)
    process.kill(signal.SIGTERM)
    assert child.wait(PATIENCE) == -signal.SIGTERM and sent.signals == []
    process.kill()  # gone, and not reported yet
    process.ended(-signal.SIGTERM)
    with pytest.raises(OSError):
        os.fstat(pidfd)
    assert child.stdin is not None
    child.stdin.close()


def test_a_forked_child_only_closes() -> None:
    number = os.open(os.devnull, os.O_RDONLY)
    process, _ = launched(pidfd=number)
    process.forget()
    process.forget()
    with pytest.raises(OSError):
        os.fstat(number)
    assert not process.exited


@pytest.mark.parametrize(
    ("data", "count", "text"),
    [(b"a\nb\nc\n", 2, "b\nc"), (b"a\r\nb", 5, "a\nb"), (b"", 3, ""), (b"\xff!", 1, "\N{REPLACEMENT CHARACTER}!")],
)
def test_last_lines(data: bytes, count: int, text: str) -> None:
    assert last_lines(data, count) == text


def test_unlink(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.touch()
    unlink(str(file))
    unlink(str(file))
    assert not file.exists()


def booted(path: list[str], foreign: bool = False) -> Any:
    """What an isolated interpreter has in its sys.path then, and what it had of its own."""
    text = boot_code("print([sys.path, own])", path, foreign)
    out = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, check=True, cwd="/")
    return ast.literal_eval(out.stdout.decode())


def test_boot_code_finds_modules_as_they_are_found_here() -> None:
    path, own = booted(["/first", "/second"])
    assert path == ["/first", "/second", PACKAGE] and "" not in own
    path, own = booted(["/first"], True)
    assert path[: len(own) + 1] == [*own, "/first"]
    path, own = booted([])
    assert path[: len(own)] == own and PACKAGE in path
    path, _ = booted([PACKAGE])
    assert path.count(PACKAGE) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("method", ["fork", "exec"])
def test_nobody_forks_while_a_process_is_started(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child would keep the pipe whose end tells that the new program runs, and the start would wait for its end:
    a program that makes a pool and then a `multiprocessing.Manager` had a pool whose workers never came."""
    inside, forks, forked = threading.Event(), threading.Event(), threading.Event()
    early: list[bool] = []

    def popen(*args: object, **kwargs: object) -> None:
        inside.set()
        assert forks.wait(PATIENCE)
        early.append(forked.wait(0.2))
        raise OSError("no such program")

    def start() -> None:
        with pytest.raises(OSError, match="no such program"):
            zygotes.ZygoteProcess(spec()) if method == "fork" else executed.start(spec())

    def fork() -> None:
        assert inside.wait(PATIENCE)
        forks.set()
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        forked.set()

    monkeypatch.setattr(subprocess, "Popen", popen)
    for name in ("posix_spawn", "posix_spawnp"):
        monkeypatch.setattr(os, name, popen)
    threads = [threading.Thread(target=each, daemon=True) for each in (start, fork)]
    for thread in threads:
        thread.start()
    assert forked.wait(PATIENCE)
    for thread in threads:
        thread.join(PATIENCE)
    assert early == [False]
