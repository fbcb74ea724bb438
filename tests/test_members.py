"""Who is in the group, asked of pid 1; its group is played here. From workers: `conformance`."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import distpool
from distpool import members
from distpool.errors import ProcessExitedException
from distpool.node import node as nodes


class FakeGroup:
    def __init__(self) -> None:
        self.members = {pid: SimpleNamespace(site=site) for pid, site in ((2, ""), (3, "far"), (4, "far"), (5, ""))}
        self.started_hooks: list[Any] = []
        self.exited_hooks: list[Any] = []
        self.output_hook: Any = None

    def listed(self) -> list[int]:
        return sorted(self.members)

    def member(self, pid: int) -> Any:
        if pid == 9:
            raise ProcessExitedException(9)
        if pid not in self.members:
            raise ValueError(f"no process with id {pid} exists")
        return self.members[pid]


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> FakeGroup:
    made = FakeGroup()
    node = SimpleNamespace(pid=1, is_master=True, group=made, cookie="c" * 16)
    monkeypatch.setattr(nodes, "_node", node)
    return made


@pytest.fixture
def on_worker(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """This process is worker 3; what it asks of pid 1."""
    asked: list[Any] = []
    monkeypatch.setattr(nodes, "_node", SimpleNamespace(pid=3, is_master=False))
    monkeypatch.setattr(members, "_ask", lambda *question: (asked.append(question), [1, 2, 3])[1])
    return asked


def test_asking_starts_nothing() -> None:
    code = (
        "import threading, distpool as d; from distpool.node import node\n"
        "print(d.myid(), d.myrole(), d.procs(), d.procs(1), d.workers(), d.nprocs(), d.nworkers())\n"
        "print(d.check_same_host([1, 1]), d.check_same_host([]), node.existing(), threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.splitlines() == ["1 master [1] [1] [1] 1 1", "True True None 1"]


def test_everybody_and_those_of_one_machine(group: FakeGroup) -> None:
    assert members.procs() == [1, 2, 3, 4, 5] and members.workers() == [2, 3, 4, 5]
    assert (members.nprocs(), members.nworkers()) == (5, 4)
    assert members.procs(1) == [1, 2, 5] == members.procs(2) and members.procs(4) == [3, 4]


def test_the_same_machine(group: FakeGroup) -> None:
    assert members.check_same_host([1, 2, 5]) and members.check_same_host(iter([3, 4])) and members.check_same_host([3])
    assert not members.check_same_host([1, 3])


@pytest.mark.parametrize("ask", [members.procs, lambda pid: members.check_same_host([1, pid])])
def test_pids_that_are_none(group: FakeGroup, ask: Any) -> None:
    with pytest.raises(ValueError, match="no process with id 7"):
        ask(7)
    with pytest.raises(ProcessExitedException):
        ask(9)
    for pid in (True, "2", 2.0):
        with pytest.raises(TypeError, match="a pid is an int"):
            ask(pid)


def test_workers_ask_pid_1(on_worker: list[Any]) -> None:
    assert (members.myid(), members.myrole()) == (3, "worker")
    assert members.procs() == [1, 2, 3] and members.procs(2) == [1, 2, 3] and members.workers() == [2, 3]
    assert members.check_same_host(iter([2, 3])) is True
    assert on_worker[:2] == [(members.procs,), (members.procs, 2)]
    assert on_worker[-1] == (members.check_same_host, [2, 3]), "an iterator cannot be sent"


def test_pids_that_are_none_on_a_worker() -> None:
    """Asked of pid 1, and told as if it were known here."""

    def ask(pid: object) -> list[object]:
        import distpool

        told: list[object] = []
        for question in (distpool.procs, lambda pid: distpool.check_same_host([1, pid])):
            try:
                told.append(question(pid))
            except BaseException as error:
                told.append((type(error).__name__, str(error)))
        return told

    pid, gone = distpool.addprocs(2)
    distpool.rmprocs(gone)
    try:
        for wrong, told in (
            (9999, ("ValueError", "no process with id 9999 exists")),
            (gone, ("ProcessExitedException", f"worker {gone} exited: it was removed")),
            (True, ("TypeError", "a pid is an int, not bool")),
        ):
            assert distpool.remotecall_fetch(ask, pid, wrong) == [told, told]
    finally:
        distpool.rmprocs(pid)


@pytest.mark.parametrize(
    "register",
    [members.set_output_hook, members.on_worker_started, members.on_worker_exited],
    ids=["output", "started", "exited"],
)
def test_hooks_are_for_pid_1(on_worker: list[Any], register: Any) -> None:
    with pytest.raises(RuntimeError, match="works on process 1 only"):
        register(print)


def test_hooks_are_kept_and_returned(group: FakeGroup) -> None:
    assert members.on_worker_started(print) is print and members.on_worker_exited(repr) is repr
    assert (group.started_hooks, group.exited_hooks) == ([print], [repr])
    members.set_output_hook(lambda pid, line: line)
    assert group.output_hook(1, "x") == "x"
    members.set_output_hook(None)
    assert group.output_hook is None
    for register in (members.set_output_hook, members.on_worker_started, members.on_worker_exited):
        with pytest.raises(TypeError):
            register(5)  # type: ignore[operator]
    assert (group.started_hooks, group.exited_hooks, group.output_hook) == ([print], [repr], None)


def test_the_cookie(group: FakeGroup) -> None:
    assert members.cluster_cookie() == "c" * 16
    assert members.cluster_cookie("x") == members.cluster_cookie() == "x"
    assert members.cluster_cookie("y" * 64) == "y" * 64
    for odd in (" a b ", "\t\x01"):
        assert members.cluster_cookie(odd) == odd
    assert members.cluster_cookie("y" * 64) == "y" * 64
    for bad in ("", "z" * 65, "ä", "a\nb"):
        with pytest.raises(ValueError, match="the cookie must"):
            members.cluster_cookie(bad)
    for wrong in (b"bytes", 5):
        with pytest.raises(TypeError):
            members.cluster_cookie(wrong)  # type: ignore[arg-type]
    assert members.cluster_cookie() == "y" * 64
