"""One `addprocs`: it ends when all has settled, once, with the pids or with all that went wrong. No workers here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import ManualLoop

from distpool import adding as module
from distpool.adding import Adding, close_launcher
from distpool.errors import CompositeException, LaunchWorkerError
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind

SECONDS = 7.0


class FakeLaunch:
    """Stands for `joining.Launch`; what comes of it is said by the test."""

    seconds = SECONDS

    def __init__(self, node: Any, manager: Any, params: Any, prepare: Any, finished: Any) -> None:
        self.prepare, self.finished = prepare, finished
        self.starts = 0
        self.wants_more: dict[int, Callable[[int, list[Any]], object]] = {}
        self.starting = False

    def start(self) -> None:
        self.starts += 1

    def more(self, member: Any, done: Callable[[int, list[Any]], object]) -> bool:
        if self.starting:
            self.wants_more[member.pid] = done
        return self.starting


class FakeMember:
    def __init__(self, world: World, pid: int) -> None:
        self.pid = pid
        self.listed, self.removed = False, False
        self.patience: list[float] = []
        self.notices = SimpleNamespace(put=world.notices.append)
        self.on_joined: Callable[[Any], object]
        self.on_gone: Callable[[Any, Any], object]

    def join(self) -> None:
        self.listed = True
        self.on_joined(self)

    def die(self) -> None:
        self.listed = False
        self.on_gone(self, None)

    def remove(self, patience: float, by_manager: bool) -> None:
        assert not by_manager, "the manager's `kill` is for rmprocs and the program's end"
        self.patience.append(patience)

    def launch_error(self) -> LaunchWorkerError:
        return LaunchWorkerError(f"host{self.pid}", "", "died")


class World:
    def __init__(self) -> None:
        self.loop = ManualLoop()
        self.tasks: list[Callable[[], object]] = []
        self.notices: list[Callable[[], object]] = []
        self.closed = 0
        self.group: Any = SimpleNamespace(
            topology="all_to_all",
            members={},
            defaults=[],
            released=[],
            joined_watchers=[],
            gone_watchers=[],
            connecting=[],
            missing=set(),
            links=[],
            connect_all=lambda pids: self.group.links,
            missing_idents=lambda member: member.pid in self.group.missing,
            release_topology=lambda: self.group.released.append(1),
        )
        self.group.add_default = self.group.defaults.append
        launcher = SimpleNamespace(close_if_idle=self.close)
        self.node: Any = SimpleNamespace(
            loop=self.loop, deliver=self.tasks.append, crews=set(), launcher=launcher, handlers={}
        )
        self.adding = Adding(self.node, self.group, None, {})  # type: ignore[arg-type]
        self.launch: Any = self.adding._launch

    def close(self) -> None:
        self.closed += 1

    def members(self, *pids: int) -> list[FakeMember]:
        """The launch brings them."""
        made = [FakeMember(self, pid) for pid in pids]
        for member in made:
            self.group.members[member.pid] = member
            self.launch.prepare(member)
        return made

    def told(self) -> Any:
        """Managers have been told of everything; the outcome, or None if there is none yet."""
        for notice in self.notices:
            notice()
        self.notices.clear()
        while self.tasks:
            self.tasks.pop(0)()
        self.loop.run()
        if not self.adding.future.done():
            return None
        error = self.adding.future.exception(0)
        return self.adding.future.result(0) if error is None else error


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(module, "Launch", FakeLaunch)
    return World()


def test_pids_when_all_have_joined_and_the_launch_is_over(world: World) -> None:
    world.adding.start()
    first, second = world.members(3, 2)
    first.join()
    second.join()
    assert world.told() is None, "the launch may bring more"
    world.launch.finished(2, None)
    assert world.launch.starts == 1 and world.told() == [2, 3]
    assert world.group.defaults == [3, 2] and world.group.released == [1] and world.closed == 1


def test_who_has_not_joined_is_waited_for(world: World) -> None:
    first, second = world.members(2, 3)
    world.launch.finished(2, None)
    first.join()
    assert world.told() is None
    second.join()
    assert world.told() == [2, 3]


def test_an_empty_launch_brings_no_pids(world: World) -> None:
    world.launch.finished(0, None)
    assert world.told() == []


def test_managers_are_told_before_the_caller_is(world: World) -> None:
    [member] = world.members(2)
    member.join()
    world.launch.finished(1, None)
    assert len(world.notices) == 1 and len(world.tasks) == 1 and not world.adding.future.done()
    assert world.told() == [2]


def test_managers_that_do_not_return_are_waited_for_together(world: World) -> None:
    """Each had the time of the whole launch."""
    world.adding._launch.seconds = 0.2
    for member in world.members(*range(2, 32)):
        member.join()
    world.launch.finished(30, None)
    world.notices.clear()
    began = time.monotonic()
    assert world.told() == list(range(2, 32)) and time.monotonic() - began < 3.0


def test_errors_of_all_in_the_order_of_the_pids_and_of_the_launch_last(world: World) -> None:
    first, second, third = world.members(4, 2, 3)
    first.die()
    second.die()
    third.join()
    world.launch.finished(3, OSError("no more"))
    error = world.told()
    assert isinstance(error, CompositeException)
    assert [each.host for each in error.exceptions] == ["host2", "host4", "localhost"]  # type: ignore[attr-defined]
    assert "OSError: no more" in str(error.exceptions[2])


@pytest.mark.parametrize("error", [ValueError("bad"), TypeError("bad")])
def test_bad_arguments_are_raised_as_they_are(world: World, error: Exception) -> None:
    world.launch.finished(0, error)
    assert world.told() is error


def test_but_not_when_something_had_been_started(world: World) -> None:
    [member] = world.members(2)
    member.join()
    world.launch.finished(1, ValueError("bad"))
    assert isinstance(world.told(), CompositeException)


def test_others_that_a_worker_starts_are_waited_for(world: World) -> None:
    world.launch.starting = True
    [first] = world.members(2)
    world.launch.finished(1, None)
    first.join()
    assert world.told() is None
    world.launch.starting = False
    [other] = world.members(3)
    world.launch.wants_more[2](1, [LaunchWorkerError("host2", "", "the second one")])
    assert world.told() is None
    other.join()
    error = world.told()
    assert [str(each) for each in error.exceptions] == ["could not launch worker on host2: the second one"]


def test_a_death_after_joining_is_no_error_of_the_launch(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "distpool"):
        first, second = world.members(2, 3)
        first.join()
        second.join()
        first.die()
        second.removed = True
        second.die()
        world.launch.finished(2, None)
    assert world.told() == [2, 3]
    assert [record.getMessage() for record in caplog.records] == ["Worker 2 terminated."], "that was asked for"


def test_it_cannot_be_cancelled(world: World) -> None:
    assert not world.adding.future.cancel()


# -- links that are not lazy ---------------------------------------------------------------------------------------


def connecting(world: World) -> None:
    for member in world.members(2, 3):
        member.join()
    world.group.links = [2, 3]
    world.launch.finished(2, None)
    assert world.told() is None


def answer(world: World, pid: int, *problems: list[Any]) -> None:
    frame = Frame(Kind.CONNECTED, messages.Connected(list(problems)).pack(), b"", [])
    world.node.handlers[Kind.CONNECTED](SimpleNamespace(peer=pid), frame)


@pytest.mark.parametrize("end", ["answers", "death", "time"])
def test_links_are_waited_for_but_not_for_ever(world: World, end: str) -> None:
    connecting(world)
    answer(world, 2)
    assert world.told() is None
    if end == "answers":
        answer(world, 3)
    elif end == "death":
        world.group.gone_watchers[0](world.group.members[3])
    else:
        world.loop.ring(SECONDS)
    assert world.told() == [2, 3]
    assert not world.group.connecting and not world.group.gone_watchers and world.group.released == [1]


def test_links_that_could_not_be_made_are_a_warning(world: World, caplog: pytest.LogCaptureFixture) -> None:
    connecting(world)
    with caplog.at_level(logging.WARNING, "distpool"):
        answer(world, 2, [3, "refused"])
        answer(world, 3)
    assert world.told() == [2, 3]
    assert [record.getMessage() for record in caplog.records] == ["worker 2 is not connected to worker 3: refused"]


def test_two_launches_at_a_time_hear_each_other(world: World) -> None:
    """Whoever registered first gets the frames for all."""
    connecting(world)
    other = Adding(world.node, world.group, None, {})  # type: ignore[arg-type]
    module._Connecting(other, {5})
    for pid in (5, 2, 3):
        answer(world, pid)
    assert world.told() == [2, 3] and other.future.done() and not world.group.connecting


# -- custom topology -----------------------------------------------------------------------------------------------


def custom(world: World) -> None:
    world.group.topology = "custom"
    for member in world.members(2, 3):
        member.join()
    world.group.missing = {3}
    world.launch.finished(2, None)
    assert world.told() is None


@pytest.mark.parametrize("how", ["joined_watchers", "gone_watchers"])
def test_named_peers_are_waited_for(world: World, how: str) -> None:
    custom(world)
    [look] = getattr(world.group, how)
    look(None)
    assert world.told() is None
    world.group.missing = set()
    look(None)
    assert world.told() == [2, 3]
    assert not world.group.joined_watchers and not world.group.gone_watchers


def test_named_peers_that_never_come(world: World) -> None:
    custom(world)
    world.loop.ring(SECONDS)
    error = world.told()
    assert type(error) is RuntimeError and str(error) == "peer workers did not connect within 7 seconds"
    assert world.group.members[3].patience == [module._PATIENCE] and world.group.members[2].patience == []


# -- the launcher --------------------------------------------------------------------------------------------------


def test_the_launcher_is_kept_for_executors(world: World) -> None:
    world.node.crews.add(1)
    close_launcher(world.node)
    world.loop.run()
    assert world.closed == 0
    world.node.crews.clear()
    close_launcher(world.node)
    world.node.crews.add(1)  # one came meanwhile
    world.loop.run()
    assert world.closed == 0
    world.node.launcher = None
    world.node.crews.clear()
    close_launcher(world.node)
    world.loop.run()
