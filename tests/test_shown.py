"""Workers as libraries see them that look into `_processes` and `_pool`."""

from __future__ import annotations

import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import PATIENCE

from distpool.node import node as nodes
from distpool.node.group import State
from distpool.shown import ShownProcess, StartingProcess


class Handle:
    """A process of this machine."""

    def __init__(self) -> None:
        self.exited = False
        self.signals: list[int] = []
        self.callbacks: list[Any] = []
        self.watched = threading.Event()

    def kill(self, signum: int = signal.SIGKILL) -> None:
        self.signals.append(signum)

    def add_exit_callback(self, callback: Any) -> None:
        if self.exited:
            callback(0)
        self.callbacks.append(callback)
        self.watched.set()

    def end(self) -> None:
        self.exited = True
        for callback in self.callbacks:
            callback(0)


class Member:
    def __init__(self, process: Handle | None = None, is_worker: bool = True) -> None:
        self.ospid = 4711
        self.pid = 3
        self.process = process
        self.is_worker = is_worker
        self.state = State.READY
        self.exitcode: int | None = None
        self.killed = 0
        self.group: Any = SimpleNamespace(node=nodes.current(), gone_watchers=[])

    def kill(self, reason: str = "") -> None:
        self.killed += 1

    def gone(self) -> None:
        """Leader: as the group tells it."""
        self.state = State.GONE
        for watcher in list(self.group.gone_watchers):
            watcher(self)


def shown(member: Member) -> ShownProcess:
    return ShownProcess(member)


def test_what_can_be_read() -> None:
    member = Member(Handle())
    process = shown(member)
    assert (process.pid, process.name, process.exitcode) == (4711, "distpool-worker-3", None)
    member.exitcode = -9
    assert process.exitcode == -9


def test_alive_is_the_process_if_there_is_one_else_the_member() -> None:
    handle = Handle()
    member = Member(handle)
    assert shown(member).is_alive()
    member.state = State.GONE  # its connection is, the process may still be ending
    assert shown(member).is_alive()
    handle.exited = True
    assert not shown(member).is_alive()
    member = Member()
    assert shown(member).is_alive()
    member.state = State.GONE
    assert not shown(member).is_alive()


def test_terminate_and_kill() -> None:
    handle = Handle()
    member = Member(handle)
    shown(member).terminate()
    assert handle.signals == [signal.SIGTERM] and not member.killed
    shown(member).kill()
    assert member.killed == 1
    for other in (Member(), Member(Handle(), is_worker=False)):  # no process that is ours to send signals to
        shown(other).terminate()
        assert other.killed == 1 and (other.process is None or not other.process.signals)


def test_join_waits_for_the_process() -> None:
    handle = Handle()
    process = shown(Member(handle))
    process.join(0.001)
    assert process.is_alive()
    handle.watched.clear()
    joined = threading.Thread(target=process.join)
    joined.start()
    assert handle.watched.wait(PATIENCE)
    handle.end()
    joined.join(PATIENCE)
    assert not joined.is_alive()
    process.join()  # it has ended already


@pytest.mark.parametrize("before", [False, True])
def test_join_without_a_process_waits_for_the_connection(before: bool) -> None:
    member, another = Member(), Member()
    watched = threading.Event()

    class Watchers(list[Any]):
        def append(self, watcher: Any) -> None:
            super().append(watcher)
            watched.set()

    member.group.gone_watchers = Watchers()
    if before:
        member.state = State.GONE
        shown(member).join(PATIENCE)
    else:
        joined = threading.Thread(target=shown(member).join)
        joined.start()
        assert watched.wait(PATIENCE)
        for watcher in list(member.group.gone_watchers):
            watcher(another)
        assert joined.is_alive()
        nodes.current().loop.call_soon(member.gone)
        joined.join(PATIENCE)
        assert not joined.is_alive()
    assert not member.group.gone_watchers


class Coming:
    """A crew with workers that come up when somebody waits for them."""

    def __init__(self, members: list[Member]) -> None:
        self.members: dict[int, Member] = {}
        self.coming = members
        self.waits: list[int] = []

    def wait_for_members(self, count: int) -> None:
        self.waits.append(count)
        self.members.update(enumerate(self.coming))


def test_a_worker_to_come_has_the_face_of_one_that_is_there() -> None:
    """Who goes through `Pool._pool` meets both."""
    handle = Handle()
    crew: Any = Coming([Member(), Member(handle)])
    starting = StartingProcess(crew, 1)
    face = {name for name in dir(shown(Member())) if not name.startswith("_")}
    assert face <= set(dir(starting))
    assert starting.is_alive() and starting.exitcode is None and not crew.waits
    assert (starting.pid, starting.name) == (4711, "distpool-worker-3") and crew.waits == [2]
    starting.terminate()
    assert handle.signals == [signal.SIGTERM]
    starting.kill()
    assert crew.coming[1].killed == 1
    handle.end()
    crew.coming[1].exitcode = -15
    starting.join(PATIENCE)
    assert not starting.is_alive() and starting.exitcode == -15 and crew.waits == [2]


def test_a_worker_that_does_not_come() -> None:
    crew: Any = Coming([])
    starting = StartingProcess(crew, 0)
    assert starting.pid is starting.name is starting.exitcode is None
    for end in ("terminate", "kill", "join"):
        getattr(starting, end)()
