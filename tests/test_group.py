"""The members as this process sees them: legal states, hooks, and errors that say what happened."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import ManualLoop

import distpool
from distpool import joining
from distpool.node import group as groups
from distpool.node import node as nodes

PATIENCE = 30.0


def test_a_worker_that_dies_is_reported_with_its_last_words() -> None:
    def die() -> None:
        print("first line")
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    with distpool.ClusterExecutor(1) as executor:
        pid = (executor.submit(pow, 1, 1).result(PATIENCE), executor.workers[0])[1]
        error: Any = executor.submit(die).exception(PATIENCE)
        assert isinstance(error, distpool.ProcessExitedException)
        assert (error.worker_id, error.exitcode, error.maybe_ran) == (pid, -signal.SIGKILL, True)
        assert error.output.endswith("first line\nlast words")
        assert "last words" in str(error)


def test_other_workers_hear_its_last_words_as_well() -> None:
    """Those that wait when it dies, those that ask later, and one that was not there then."""

    def die(begun: Any, go: Any) -> None:
        begun.put(True)
        go.take()
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def fetch(begun: Any, future: Any) -> Any:
        begun.put(True)
        return distpool.fetch(future)

    def ask(question: Any, *args: Any) -> Any:
        import time

        begin = time.monotonic()
        try:
            question(*args)
        except distpool.ProcessExitedException as error:
            known = (error.worker_id, error.exitcode, error.maybe_ran, error.output.splitlines()[-1:])
            return known, time.monotonic() - begin

    pid, other = distpool.addprocs(2)
    try:
        begun, go = (distpool.RemoteChannel(lambda: distpool.Channel(10), 1) for _ in range(2))
        dying = distpool.remotecall(die, pid, begun, go)
        waiting = [
            distpool.remotecall(ask, other, distpool.remotecall_fetch, die, pid, begun, go),
            distpool.remotecall(ask, other, fetch, begun, dying),
        ]
        for _ in range(3):
            begun.take(timeout=PATIENCE)
        go.put(True)
        died = [future.result(PATIENCE)[0] for future in waiting]
        assert died == [(pid, -signal.SIGKILL, True, ["last words"])] * 2
        (late,) = distpool.addprocs(1)
        for asker in (other, late):
            known, seconds = distpool.remotecall_fetch(ask, asker, distpool.remotecall, abs, pid, 1)
            assert known == (pid, -signal.SIGKILL, False, ["last words"]) and seconds < 5
        known, seconds = distpool.remotecall_fetch(ask, late, distpool.fetch, dying)
        assert known == (pid, -signal.SIGKILL, True, ["last words"]) and seconds < 5
    finally:
        distpool.rmprocs(distpool.workers())


def test_the_group_is_one_for_the_node() -> None:
    node = nodes.current()
    assert groups.of(node) is groups.of(node)


def test_a_member_is_used_whatever_happens_to_what_comes_first() -> None:
    """Who had asked for it waited for ever."""
    works: list[Any] = []
    node: Any = SimpleNamespace(pid=1, on_fork=[], deliver=works.append, loop=ManualLoop())
    group = groups.Group(node)
    member: Any = SimpleNamespace(pid=2, host="", ospid=0)
    seen: list[Any] = []
    member.on_joined = seen.append
    group.members[2] = member

    def fail(action: Any, pid: int) -> None:
        raise OSError("stderr is closed")

    group.prologues, group.run_prologue = ["action"], fail
    group.introduce(member)
    assert not seen
    with pytest.raises(OSError):
        works[0]()
    node.loop.run()
    assert seen == [member]


@pytest.mark.parametrize("part", ["group", "launcher"])
def test_threads_that_need_it_first_get_the_same_one(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node: Any = SimpleNamespace(pid=1, making_parts=threading.RLock(), on_fork=[], group=None, launcher=None, loop=None)
    module, name, get = (groups, "Group", groups.of) if part == "group" else (joining, "Launcher", joining.launcher)
    real = getattr(module, name)
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(get(node)))

    def slow(argument: Any) -> Any:
        if other.ident is None:
            other.start()
            other.join(0.3)  # it is through, or waits for us
        return real(argument)

    monkeypatch.setattr(module, name, slow)
    found.append(get(node))
    other.join(PATIENCE)
    assert len(found) == 2 and found[0] is found[1] is get(node)


def test_a_pid_that_never_existed() -> None:
    with pytest.raises(ValueError, match="no process with id 987654 exists"):
        groups.of(nodes.current()).member(987654)


def test_hooks_are_told_of_starts_and_ends() -> None:
    group = groups.of(nodes.current())
    seen: list[tuple[str, Any]] = []
    ended = threading.Event()
    started = lambda info: seen.append(("started", info))

    def exited(info: Any) -> None:
        seen.append(("exited", info))
        ended.set()

    group.started_hooks.append(started)
    group.exited_hooks.append(exited)
    try:
        with distpool.ClusterExecutor(1) as executor:
            ospid = executor.submit(os.getpid).result(PATIENCE)
            pid = executor.workers[0]
        assert ended.wait(PATIENCE)
    finally:
        group.started_hooks.remove(started)
        group.exited_hooks.remove(exited)
    assert [what for what, _ in seen] == ["started", "exited"]
    for _, info in seen:
        assert (info.pid, info.ospid) == (pid, ospid)
    assert seen[1][1].exitcode == 0


def test_the_members_states_are_a_table() -> None:
    """Walked: every move that is not in it raises, and there is no way back from the end."""
    from distpool.node import member as members

    allowed: Any = getattr(members, "_ALLOWED", None)
    assert allowed, "the table of legal moves"
    states = list(members.State)
    assert not [move for move in allowed if move[0] is members.State.GONE]
    assert all((state, members.State.GONE) in allowed for state in states if state is not members.State.GONE)
    group = groups.of(nodes.current())
    for before, after in itertools.product(states, states):
        made = members.Member.__new__(members.Member)
        made.pid, made.state, made.group = 99, before, group
        if (before, after) in allowed:
            made.move(after)
            assert made.state is after
        else:
            with pytest.raises(RuntimeError, match="illegal move"):
                made.move(after)


def test_a_worker_that_the_kernel_killed_for_its_memory_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by the kernel's count, which has grown since the last look; so the next death has its own cause."""
    monkeypatch.setattr(groups.OomKills, "_count", staticmethod(lambda: 3))
    kills = groups.of(nodes.current()).oom_kills
    monkeypatch.setattr(kills, "_seen", 2)
    with distpool.ClusterExecutor(1) as executor:
        errors = [executor.submit(lambda: os.kill(os.getpid(), signal.SIGKILL)).exception(PATIENCE) for _ in range(2)]
        assert executor.submit(os._exit, 9).exception(PATIENCE).exitcode == 9  # type: ignore[union-attr]
    assert ["out of memory" in str(error) for error in errors] == [True, False]
