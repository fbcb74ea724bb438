"""What workers print whose starter has gone: no print fails, and nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from conformance.clusters import ByCommand
from wires import PATIENCE, until

import distpool
from distpool import WorkerConfig, orphans

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="descriptors are not handed on there")


class Calls:
    """Calls to pid 1, played."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def __call__(self, function: Any, *arguments: Any) -> None:
        self.made.append((function, *arguments))
        if self.error is not None:
            raise self.error

    def lines(self) -> list[str]:
        return [line for call in self.made for line in call[3]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()
    monkeypatch.setattr(orphans, "remotecall_fetch", made)
    monkeypatch.setattr(orphans.nodes, "existing", lambda: SimpleNamespace(pid=3))
    return made


class Pipes:
    def __init__(self) -> None:
        self.output, self.writing = os.pipe()
        self.waiting, self.lifeline = os.pipe()
        before = set(threading.enumerate())
        orphans.take_over(f"{self.output},{self.waiting}")
        (self.thread,) = set(threading.enumerate()) - before

    def write(self, data: bytes) -> None:
        """More than fits into the pipe: it is read meanwhile."""
        while data:
            data = data[os.write(self.writing, data) :]

    def end(self) -> None:
        os.close(self.writing)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


def test_what_comes_after_the_end_of_the_other_reader_is_shown(calls: Calls) -> None:
    pipes = Pipes()
    os.write(pipes.writing, b"one\n")
    assert os.read(pipes.output, 100) == b"one\n", "the starter lives, and has it"
    os.write(pipes.writing, b"two\nthr")
    os.close(pipes.lifeline)
    until(lambda: calls.lines() == ["two"], "what it has left behind")
    os.write(pipes.writing, b"ee\n\xff\n")
    pipes.end()
    assert calls.lines() == ["two", "three", "\ufffd"]
    assert {call[:3] for call in calls.made} == {(orphans.show_lines, 1, 3)}


def test_a_line_without_end_is_not_held_for_ever(calls: Calls) -> None:
    pipes = Pipes()
    os.close(pipes.lifeline)
    pipes.write(b"x" * 400_000)
    pipes.end()
    shown = "".join(calls.lines())
    assert len(shown) > 300_000 and set(shown) == {"x"}


@pytest.mark.parametrize("error", [ConnectionError("gone"), distpool.DistpoolError("no")], ids=repr)
def test_it_is_read_on_whatever_becomes_of_it(calls: Calls, error: Exception) -> None:
    """Or the pipe would be full, and who prints would wait."""
    calls.error = error
    pipes = Pipes()
    os.close(pipes.lifeline)
    pipes.write(b"line\n" * 100_000)
    pipes.end()
    assert len(calls.lines()) == 100_000


def test_numbers_that_are_not_true() -> None:
    before = threading.active_count()
    with open(os.devnull) as null, open(os.devnull) as other:
        for text in ("", "x", "1", "1,2,3", "99999999999999999999,1", "4000,4001", f"{null.fileno()},{other.fileno()}"):
            orphans.take_over(text)
    assert threading.active_count() == before


def test_lines_look_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    orphans.show_lines(7, ["a", ""])
    try:
        distpool.set_output_hook(lambda pid, line: f"[{pid}] {line}")
        orphans.show_lines(7, ["b"])
    finally:
        distpool.set_output_hook(None)
    assert capsys.readouterr().out == "      From worker 7:\ta\n      From worker 7:\t\n[7] b\n"


class Three(ByCommand):
    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        for config in super().launch(params):
            config.count, config.exename = 3, sys.executable
            yield config


@pytest.mark.parametrize("way", ["rmprocs", "kill"])
def test_the_first_worker_of_a_host_goes(way: str) -> None:
    said: list[str] = []

    def hook(pid: int, line: str) -> None:
        said.append(line if line.startswith("      From") else f"      From worker {pid}:\t{line}")

    def wait_for(pid: int, line: str, count: int = 1) -> None:
        until(lambda: said.count(f"      From worker {pid}:\t{line}") == count, f"{line[:20]} of {pid}")

    first, *others = distpool.addprocs(Three(1))
    distpool.set_output_hook(hook)
    try:
        distpool.remotecall_fetch(print, others[0], "before")
        wait_for(others[0], "before")
        if way == "kill":
            os.kill(distpool.remotecall_fetch(os.getpid, first), signal.SIGKILL)
            until(lambda: first not in distpool.workers(), "it is gone")
        else:
            distpool.rmprocs(first)
        for pid in others:
            distpool.remotecall_fetch(print, pid, "after")
            wait_for(pid, "after")
            distpool.remotecall_fetch(os.system, pid, "echo a child")
            wait_for(pid, "a child")
        long = "y" * 1000
        distpool.remotecall_fetch(lambda: [print(long) for _ in range(1000)] and None, others[1])
        wait_for(others[1], long, 1000)  # more than a pipe holds
    finally:
        distpool.set_output_hook(None)
        distpool.rmprocs(distpool.workers())
