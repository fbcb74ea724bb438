"""Launches: what managers bring becomes members, whatever they do wrong has an end. Members are played here."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import ManualLoop

from distpool import joining
from distpool.errors import LaunchWorkerError
from distpool.joining import Launch
from distpool.managers.base import ClusterManager
from distpool.managers.record import WorkerConfig
from distpool.node.member import State
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind


class FakeMember:
    """Notes what is done with it."""

    def __init__(self, group: Any, pid: int, process: Any, config: Any, manager: Any) -> None:
        self.group, self.pid, self.process, self.config, self.manager = group, pid, process, config, manager
        self.state = State.LAUNCHED
        self.host, self.site, self.last_output = "localhost", "", "its last words"
        self.output: Any = None
        self.has_identity = False
        self.address: tuple[Any, ...] = ()
        self.failures: list[BaseException] = []
        self.kills_asked: list[str] = []
        self.connected: list[Any] = []
        self.link: Any = None
        self.kills: Any = None
        self.began = self.watched = 0
        self.on_line: Any = None

    def begin(self, seconds: float) -> None:
        self.began += 1

    def watch_exit(self) -> None:
        self.watched += 1

    def failed(self, error: BaseException) -> None:
        self.failures.append(error)

    def kill(self, reason: str = "") -> None:
        self.kills_asked.append(reason)

    def connect(self, *arguments: Any) -> None:
        self.connected.append(arguments)

    def read_output(self, descriptor: int, early: bytes, on_line: Any = None) -> None:
        self.output, self.on_line = descriptor, on_line


class World:
    def __init__(self, manager: Any, **params: Any) -> None:
        self.loop = ManualLoop()
        self.tasks: list[Callable[[], object]] = []
        self.members: list[Any] = []
        self.group = SimpleNamespace(add=self.add, starting_others={}, gone_watchers=[])
        self.node: Any = SimpleNamespace(
            loop=self.loop,
            deliver=self.tasks.append,
            cookie="c" * 16,
            launcher=object(),
            own_identity=lambda: None,
            identity=None,
            group=self.group,
            handlers={},
        )
        self.prepared: list[Any] = []
        self.ends: list[tuple[int, Any]] = []
        self.launch = Launch(
            self.node, manager, params, self.prepared.append, lambda count, error: self.ends.append((count, error))
        )

    def add(self, process: Any, config: Any, manager: Any) -> Any:
        made = FakeMember(self.group, 2 + len(self.members), process, config, manager)
        self.members.append(made)
        return made

    def run(self) -> None:
        while self.tasks or self.loop.soon:
            while self.tasks:
                self.tasks.pop(0)()
            self.loop.run()


@pytest.fixture(autouse=True)
def one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining.groups, "of", lambda node: node.group)


class Manager(ClusterManager):
    """Brings what it is given; raises exceptions among it."""

    def __init__(self, *brings: Any) -> None:
        self.brings = brings
        self.params: Any = None

    def launch(self, params: dict[str, Any]) -> Iterator[Any]:
        self.params = params
        for each in self.brings:
            if isinstance(each, BaseException):
                raise each
            yield each


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses; each is reached."""
    found: list[Any] = []
    monkeypatch.setattr(joining, "dial", lambda address, *rest: (found.append(address), "stream")[1])
    return found


def at(port: int, **more: Any) -> WorkerConfig:
    return WorkerConfig(host="host", port=port, **more)


@pytest.mark.parametrize("pair", [False, True])
def test_a_place_that_cannot_be_sent_closes_the_connection(pair: bool) -> None:
    """It stayed open, and the worker at its other end waited for a master."""
    near, far = socket.socketpair()

    class Transport(Manager):
        def connect(self, pid: int, config: WorkerConfig) -> Any:
            config.connect_at = threading.Lock()
            return (near.makefile("rb"), near.makefile("wb")) if pair else near

    with near, far:
        world = World(Transport(WorkerConfig()))
        world.launch.start()
        world.run()
        (member,) = world.members
        assert "cannot pickle" in str(member.failures[0]) and not member.connected
        far.settimeout(10)
        assert far.recv(1) == b"", "its end"


# -- launching -----------------------------------------------------------------------------------------------------


def test_each_config_becomes_a_member_and_is_reached(dialled: list[Any]) -> None:
    manager = Manager(at(1), at(2, connect_idents=iter([5])))
    world = World(manager, exename="x")
    world.launch.start()
    world.run()
    assert dialled == [("tcp", "host", 1), ("tcp", "host", 2)] and world.prepared == world.members
    assert [member.connected for member in world.members] == [[("stream",)], [("stream",)]]
    assert [(member.began, member.watched, member.site) for member in world.members] == [(1, 1, "host")] * 2
    assert world.ends == [(2, None)] and world.members[1].config.connect_idents == [5]
    assert manager.params["exename"] == "x" and manager.params["cookie"] == "c" * 16 and manager.params["lazy"] is True


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3)], ids=repr)
def test_a_launch_that_raises_keeps_what_it_has_brought(dialled: list[Any], error: BaseException) -> None:
    world = World(Manager(at(1), error, at(2)))
    world.launch.start()
    world.run()
    assert world.ends == [(1, error)] and len(world.members) == 1


def test_what_is_no_config_is_refused() -> None:
    world = World(Manager("host:9"))
    world.launch.start()
    world.run()
    [(count, error)] = world.ends
    assert count == 0 and type(error) is TypeError and "WorkerConfig" in str(error)


@pytest.mark.parametrize(
    "more",
    [
        *({"count": "many"}, {"count": 1.5}, {"count": True}, {"exename": 5}, {"exeflags": 7}, {"connect_idents": 3}),
        *({"environ": [("A", "1")]}, {"environ": "A=1"}),
    ],
)
def test_what_cannot_be_meant_is_the_end_of_the_launch(dialled: list[Any], more: dict[str, Any]) -> None:
    """On the leader it was an error of nobody's, and `addprocs` waited for ever."""
    world = World(Manager(at(1), at(2, **more)))
    world.launch.start()
    world.run()
    [(count, error)] = world.ends
    assert count == 1 and type(error) is TypeError and dialled == [("tcp", "host", 1)]


@pytest.mark.parametrize("error", [RuntimeError, ZeroDivisionError, OSError])
def test_whatever_a_workers_output_raises_is_its_own_failure(error: type[Exception]) -> None:
    class Output:
        def fileno(self) -> int:
            raise error("no")

    world = World(Manager(WorkerConfig(io=Output())))
    world.launch.start()
    world.run()
    assert len(world.members[0].failures) == 1 and world.ends == [(1, None)]


@pytest.mark.parametrize("name", ["DISTPOOL_WORKER_TIMEOUT", "DISTPOOL_SILENT_SECONDS"])
def test_variables_are_read_in_the_caller(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On the leader it was an error of nobody's, as above."""
    monkeypatch.setenv(name, "soon")
    with pytest.raises(ValueError, match=name):
        World(Manager())


def test_a_launch_that_brings_nothing_is_given_up(dialled: list[Any]) -> None:
    world = World(Manager(), timeout=7)
    world.launch.start()  # on a library thread, which hangs in it
    world.loop.ring(7 + joining._SLACK)
    [(count, error)] = world.ends
    assert count == 0 and isinstance(error, LaunchWorkerError)
    assert "Manager.launch brought nothing within 12 seconds" in str(error)
    late = world.launch.begin(at(1))
    assert late.kills_asked == ["it came too late"] and late.watched == 1 and world.prepared == []
    world.run()
    assert len(world.ends) == 1, "told once"


def test_each_worker_that_comes_gives_it_more_time(dialled: list[Any]) -> None:
    world = World(Manager(), timeout=7)
    world.launch.start()
    old = list(world.loop.later)
    world.launch.begin(at(1))
    for timer in old:
        timer.callback()
    assert world.ends == []
    world.loop.ring(7 + joining._SLACK)
    assert world.ends[0][0] == 1


def test_nobody_waits_for_an_abandoned_one(dialled: list[Any]) -> None:
    world = World(Manager(at(1), at(2)))
    world.launch.start()
    world.launch.abandon()
    world.run()
    assert world.ends == [] and world.members[0].kills_asked == ["it came too late"]
    assert len(world.members) == 1, "no more are asked for"


# -- reaching them -------------------------------------------------------------------------------------------------


def test_a_manager_that_raises_as_it_is_to_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is what it was asked about; the worker waited for its time-out."""

    class Careless(Manager):
        def unreachable(self, config: WorkerConfig, error: BaseException) -> BaseException:
            raise ZeroDivisionError

    failure = ConnectionRefusedError("nobody listens")

    def refuse(*arguments: Any) -> None:
        raise failure

    monkeypatch.setattr(joining, "dial", refuse)
    world = World(Careless(at(1)))
    world.launch.start()
    world.run()
    (member,) = world.members
    assert member.failures == [failure]
    assert isinstance(member.lost_early(), ConnectionAbortedError), "an error of the I/O loop would be everybody's"


@pytest.mark.parametrize("error", [RuntimeError("no way"), SystemExit(4)], ids=repr)
def test_a_connect_that_raises_is_the_members_failure(error: BaseException) -> None:
    class Broken(Manager):
        def connect(self, pid: int, config: WorkerConfig) -> Any:
            raise error

    world = World(Broken(at(1)))
    world.launch.start()
    world.run()
    assert world.members[0].failures == [error]


def test_an_address_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise OSError("refused")

    class Explains(Manager):
        def unreachable(self, config: WorkerConfig, error: BaseException) -> BaseException:
            return ConnectionError(f"{error}: is the firewall open?")

    monkeypatch.setattr(joining, "dial", refuse)
    world = World(Explains(at(1)))
    world.launch.start()
    world.run()
    assert [str(error) for error in world.members[0].failures] == ["refused: is the firewall open?"]


@pytest.mark.parametrize(
    ("config", "host"),
    [
        (at(1), "host"),
        (at(1, environ={"machine": "node7"}), "node7"),
        (WorkerConfig(host="unix:/tmp/s", port=0), "localhost"),
        (WorkerConfig(), "localhost"),
    ],
)
def test_errors_name_the_host_that_the_manager_names(dialled: list[Any], config: WorkerConfig, host: str) -> None:
    """They said localhost, wherever it was."""
    world = World(Manager(config))
    world.launch.start()
    world.run()
    assert world.members[0].host == host


def test_a_config_that_says_nothing() -> None:
    world = World(Manager(WorkerConfig(), WorkerConfig(io=5.5)))
    world.launch.start()
    world.run()
    nowhere, nonsense = world.members
    assert "neither io nor host and port" in str(nowhere.failures[0])
    assert isinstance(nonsense.failures[0], TypeError | ValueError | OSError)


def test_the_header_line_says_where(dialled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "open_output", lambda io: (io, b""))
    world = World(Manager(WorkerConfig(io=9)))
    world.launch.start()
    world.run()
    [member] = world.members
    assert member.output == 9 and not member.on_line("a banner")
    assert member.on_line("distpool_worker:9009#10.0.0.7")
    world.run()
    assert (
        dialled == [("tcp", "10.0.0.7", 9009)]
        and member.host == "10.0.0.7"
        and (member.config.host, member.config.port) == ("10.0.0.7", 9009)
    )


def test_a_banner_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "open_output", lambda io: (io, b""))
    world = World(Manager(WorkerConfig(io=9)))
    world.launch.start()
    world.run()
    [member] = world.members
    for _ in range(joining.MAX_BANNER):
        assert not member.on_line("blah")
    assert member.failures == []
    member.on_line("blah")
    assert "more than 1000 lines" in str(member.failures[0]) and member.kills_asked == [""]


def test_sockets_in_the_file_system_and_encrypted_listeners(dialled: list[Any]) -> None:
    world = World(Manager(WorkerConfig(host="unix:/tmp/x", port=0), at(3, environ={"tls": True})))
    world.launch.start()
    world.run()
    assert dialled == [("unix", "/tmp/x"), ("tls", "host", 3)]


# -- further workers of a host -------------------------------------------------------------------------------------


class Starter:
    """The link of a worker that starts others."""

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.sent: list[Any] = []

    def send(self, kind: Kind, control: bytes) -> None:
        self.sent.append(messages.MESSAGES[kind].unpack(control))


def test_counts_of_numpy(dialled: list[Any]) -> None:
    world = World(Manager(at(1, count=np.int64(3))))
    world.launch.start()
    world.run()
    assert world.ends == [(1, None)] and type(world.members[0].config.count) is int


def first(world: World, **more: Any) -> tuple[Any, Starter]:
    world.launch.start()
    member = world.launch.begin(at(1, **more))
    member.link = Starter(member.pid)
    world.run()
    return member, member.link


def test_the_first_one_starts_the_rest(dialled: list[Any]) -> None:
    world = World(Manager())
    member, link = first(world, count=3, exename="python", exeflags=["-q"], ospid=4711)
    told: list[Any] = []
    assert world.launch.more(member, lambda count, errors: told.append((count, errors)))
    assert (link.sent[0].count, link.sent[0].command) == (2, ["python", "-q"])
    launched = messages.Launched([[0, "0.0.0.0", 8]], [["exit code 3", "its output"]])
    for _ in range(2):
        world.node.handlers[Kind.LAUNCHED](link, Frame(Kind.LAUNCHED, launched.pack(), b"", []))
    world.run()
    [(count, [error])] = told
    assert count == 1 and error.reason == "exit code 3" and error.output == "its output"
    assert link.sent[1:] == [messages.Named([[0, 3]])]
    other = world.members[1].config
    assert (other.host, other.port, other.count, other.io, other.ospid) == ("host", 8, None, None, None)


@pytest.mark.parametrize("end", ["silence", "death"])
def test_one_that_does_not_start_them(dialled: list[Any], end: str) -> None:
    world = World(Manager(), timeout=7)
    member, _ = first(world, count="auto")
    told: list[Any] = []
    assert world.launch.more(member, lambda count, errors: told.append((count, errors)))
    if end == "death":
        world.group.gone_watchers[0](member)
    world.loop.ring(7 + joining._SLACK)
    [(count, [error])] = told
    assert count == 0 and error.reason == "it did not start the others" and error.output == "its last words"
    assert not world.group.starting_others


@pytest.mark.parametrize("count", [None, 1])
def test_nothing_more_to_start(dialled: list[Any], count: int | None) -> None:
    world = World(Manager())
    member, link = first(world, count=count)
    assert not world.launch.more(member, lambda count, errors: None) and link.sent == []


def test_the_launcher_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    node: Any = SimpleNamespace(launcher=None, loop=None, on_fork=[], making_parts=threading.RLock())
    monkeypatch.setattr(joining, "Launcher", lambda loop: SimpleNamespace(forget_after_fork=threading.Lock))
    made = joining.launcher(node)
    assert joining.launcher(node) is made and len(node.on_fork) == 1
