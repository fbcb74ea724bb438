"""One worker as the master sees it: how it comes up, how it is ended, and that its end is told once, with its reason.

Its process, link and output are played here; the table of states: `test_group`.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import ManualLoop

from distpool.errors import LaunchWorkerError, VersionMismatchError
from distpool.managers.record import WorkerConfig
from distpool.node import member as module
from distpool.node.member import NOW, Member, State
from distpool.node.threads import ThreadCache
from distpool.wire import messages, versions
from distpool.wire.frames import Frame, Kind

PATIENCE = 30.0


class FakeProcess:
    """A process handle; it exits when the test says so."""

    def __init__(self, is_worker: bool = True, is_here: bool = True) -> None:
        self.ospid = 4711
        self.is_worker = is_worker
        self.is_here = is_here
        self.exitcode: int | None = None
        self.signals: list[int | None] = []
        self.released = 0
        self.has_ended = False
        self.on_exit: Callable[[int | None], object] = lambda code: None

    def kill(self, signum: int | None = None) -> None:
        self.signals.append(signum)

    def add_exit_callback(self, callback: Callable[[int | None], object]) -> None:
        self.on_exit = callback

    def release(self) -> None:
        self.released += 1

    def exit(self, code: int | None) -> None:
        self.exitcode = code
        self.on_exit(code)


class FakeLink:
    def __init__(self, loop: Any, stream: Any, handshake: Any, ready: Any, frame: Any, closed: Any) -> None:
        self.ready, self.frame, self.ended = ready, frame, closed
        self.handshake = SimpleNamespace(veil=lambda key: b"veiled")
        self.sent: list[Any] = []
        self.reasons: list[Any] = []
        self.shares_memory = False
        self.opened = self.rest_read = 0
        self.peer: Any = None
        self.segments: Any = None

    def open(self) -> None:
        self.opened += 1

    def send(self, kind: Kind, control: bytes = b"", body: Any = b"", buffers: Any = ()) -> bool:
        self.sent.append(messages.MESSAGES[kind].unpack(control))
        return True

    def read_rest(self) -> None:
        self.rest_read += 1
        self.close(None)

    def close(self, reason: Any = None) -> None:
        self.reasons.append(reason)
        if len(self.reasons) == 1:
            self.ended(self, reason)


class FakeOutput:
    """What it prints: ended when the test says so."""

    on_line: Any = None

    def __init__(self) -> None:
        self.tail = ["first", "last words"]
        self.ended = False
        self.closes = self.drains = 0

    def drain(self) -> None:
        self.drains += 1


class World:
    """A group with one member."""

    def __init__(self, process: FakeProcess | None) -> None:
        self.loop = ManualLoop()
        self.loop.leads = True
        self.events: list[Any] = []
        node = SimpleNamespace(
            pid=1,
            loop=self.loop,
            threads=ThreadCache("member"),
            links=set(),
            cookie="c" * 16,
            segments=None,
            dispatch=lambda link, frame: False,
            peers=SimpleNamespace(add=lambda pid, link: self.events.append("peers")),
        )
        self.group: Any = SimpleNamespace(
            node=node,
            topology="all_to_all",
            lazy=True,
            output_hook=None,
            oom_kills=SimpleNamespace(more=lambda: False),
            introduce=lambda member: self.events.append("introduced"),
            forget=lambda member: self.events.append("forgotten"),
            on_busy=lambda: self.events.append("busy"),
        )
        self.config = WorkerConfig()
        self.member = Member(self.group, 5, process, self.config, self)
        self.member.on_gone = lambda member, reason: self.events.append(("gone", reason))
        self.member.on_frame = lambda member, frame: self.events.append(frame.kind)
        self.member.notices = SimpleNamespace(put=lambda function: function())  # type: ignore[assignment]
        self.adopted: Any = None

    def manage(self, pid: int, config: Any, op: str) -> None:
        assert pid == 5 and config is self.config
        self.events.append(op)

    @property
    def link(self) -> Any:
        return self.member.link

    def connect(self) -> None:
        self.member.connect(SimpleNamespace(close=lambda: self.events.append("stream closed")))  # type: ignore[arg-type]

    def join(self, problem: str = "", host: str | None = None, shares_memory: bool = False) -> None:
        joined = messages.Joined(versions.own(), 4711, host or socket.gethostname(), shares_memory, problem)
        self.link.frame(self.link, Frame(Kind.JOINED, joined.pack(), b"", []))

    def up(self) -> FakeLink:
        """It has joined."""
        self.member.watch_exit()
        self.connect()
        self.link.ready(self.link)
        self.join()
        assert self.member.state is State.READY
        link: FakeLink = self.link
        return link


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Link", FakeLink)
    monkeypatch.setattr(module, "is_private", lambda stream: True)


@pytest.fixture
def process() -> FakeProcess:
    return FakeProcess()


@pytest.fixture
def world(process: FakeProcess) -> Iterator[World]:
    made = World(process)
    yield made
    if made.member.journal is not None and made.member.state is not State.GONE:
        made.member.journal.close()


# -- coming up -----------------------------------------------------------------------------------------------------


def test_it_is_told_who_it_is_and_then_counts(world: World) -> None:
    world.member.tells = True
    world.member.begin(20.0)
    world.connect()
    assert world.member.state is State.CONNECTING and not world.member.listed and world.link.opened == 1
    world.link.ready(world.link)
    [join] = world.link.sent
    assert (join.pid, join.topology, join.lazy) == (5, "all_to_all", True)
    world.join()
    assert world.member.state is State.READY and world.member.listed
    assert world.events == ["register", "peers", "introduced"]
    world.loop.ring(20.0)
    assert world.member.process.signals == [], "the deadline is over"


@pytest.mark.parametrize(("known", "expected"), [(None, 4711), (12, 12)])
def test_its_manager_learns_its_process_id(world: World, known: int | None, expected: int) -> None:
    """To interrupt it by that; a manager may know it better (that of a container, say)."""
    world.member.tells = True
    world.config.ospid = known
    world.manage = lambda pid, config, op: world.events.append((op, config.ospid))  # type: ignore[method-assign]
    world.connect()
    world.link.ready(world.link)
    world.join()
    assert world.events[0] == ("register", expected) and world.config.process is None


def test_a_journal_is_kept_only_where_it_sees_it(world: World) -> None:
    world.connect()
    world.link.ready(world.link)
    assert world.member.journal is not None
    world.join(shares_memory=False)
    assert world.member.journal is None
    other = World(FakeProcess())
    other.connect()
    other.link.ready(other.link)
    other.join(shares_memory=True)
    assert other.member.journal is not None and other.link.shares_memory
    other.member.journal.close()


def test_another_version_is_not_let_in(world: World, process: FakeProcess) -> None:
    world.connect()
    world.member.watch_exit()
    world.link.ready(world.link)
    strange = messages.Joined(["distpool 0.0.0 of long ago"], 1, "h", False).pack()
    world.link.frame(world.link, Frame(Kind.JOINED, strange, b"", []))
    assert process.signals == [None] and world.member.state is State.CONNECTING
    process.exit(-9)
    error = world.member.launch_error()
    assert isinstance(error, LaunchWorkerError) and isinstance(error.__cause__, VersionMismatchError)


def test_a_problem_of_its_own(world: World, process: FakeProcess) -> None:
    world.connect()
    world.link.ready(world.link)
    world.join(problem="no such cpu")
    assert process.signals == [None] and "no such cpu" in str(world.member.launch_error())


def test_who_comes_too_late_is_ended(world: World, process: FakeProcess) -> None:
    world.member.begin(20.0)
    world.member.watch_exit()
    world.loop.ring(20.0)
    assert process.signals == [None]
    process.exit(-9)
    assert world.member.state is State.GONE
    assert "did not join within 20 seconds" in str(world.member.launch_error())
    world.connect()
    assert world.events[-1] == "stream closed" and world.member.link is None


def test_frames_before_it_has_joined_are_nobodys(world: World) -> None:
    world.connect()
    world.link.frame(world.link, Frame(Kind.RESULTS, b"", b"", []))
    assert world.events == []
    world.link.ready(world.link)
    world.join()
    world.link.frame(world.link, Frame(Kind.RESULTS, b"", b"", []))
    world.link.frame(world.link, Frame(Kind.BLOCKED, b"", b"", []))
    assert world.events[-2:] == [Kind.RESULTS, Kind.BLOCKED]


def test_the_first_reason_why_it_did_not_come_up_counts(world: World, process: FakeProcess) -> None:
    world.member.watch_exit()
    world.member.failed(ConnectionError("first"))
    world.member.failed(ConnectionError("second"))
    assert world.member.state is State.LAUNCHED, "its exit status is given time to come"
    process.exit(3)
    assert world.events == ["forgotten", ("gone", world.events[1][1])] and str(world.events[1][1]) == "first"
    assert world.member.why() == "first (exit code 3)"
    world.member.failed(ConnectionError("third"))
    assert world.member.why() == "first (exit code 3)"


def test_a_process_that_does_not_end_by_itself_is_ended(world: World, process: FakeProcess) -> None:
    world.member.watch_exit()
    world.member.failed(ConnectionError("refused"))
    world.loop.ring(module._EXIT_GRACE)
    assert process.signals == [None]
    process.exit(-9)
    assert world.member.why() == "refused", "the signal was ours, and explains nothing"


# -- the end -------------------------------------------------------------------------------------------------------


def test_the_end_is_told_once_when_all_signs_are_there(world: World, process: FakeProcess) -> None:
    world.member.tells = True
    link = world.up()
    output = world.member.output = FakeOutput()  # type: ignore[assignment]
    del world.events[:]
    process.exit(7)
    assert link.rest_read == 1 and output.drains == 1, "what was on its way counts"
    assert world.events == [] and world.member.state is State.READY, "its last lines may still come"
    output.ended = True
    world.member._on_output_end()
    assert world.events == ["deregister", "finalize", "forgotten", ("gone", None)]
    assert world.member.state is State.GONE and process.released == 1
    link.close(None)
    process.exit(7)
    world.member._on_output_end()
    assert len(world.events) == 4
    assert world.member.why() == "exit code 7" and world.member.last_output == "first\nlast words"


def test_output_that_a_child_keeps_open_is_not_waited_for(world: World, process: FakeProcess) -> None:
    world.up()
    output = world.member.output = FakeOutput()  # type: ignore[assignment]

    def close() -> None:
        output.ended = True
        world.member._on_output_end()

    output.close = close  # type: ignore[attr-defined]
    process.exit(0)
    assert world.member.state is State.READY
    world.loop.ring(module._OUTPUT_GRACE)
    assert world.member.state is State.GONE


def test_a_lost_connection_gives_the_exit_status_time(world: World, process: FakeProcess) -> None:
    link = world.up()
    link.close(OSError("reset"))
    assert world.member.state is State.READY and process.signals == []
    process.exit(-11)
    assert world.member.state is State.GONE and world.member.why() == "killed by signal 11"


def test_a_worker_without_its_connection_is_killed(world: World, process: FakeProcess) -> None:
    world.up().close(OSError("reset"))
    world.loop.ring(module._EXIT_GRACE)
    assert process.signals == [None] and world.member.state is State.READY
    process.exit(-9)
    assert world.member.why() == "its connection was lost"


def test_a_worker_that_has_ended_gives_its_own_reason_however_late_its_status_comes(
    world: World, process: FakeProcess
) -> None:
    """C063, on a machine with twenty processes for two processors: its zygote reaped it 1 s after its connection had
    ended, and callers read that "its connection was lost" where it had exited with 3."""
    world.up().close(None)
    process.has_ended = True
    world.loop.ring(module._EXIT_GRACE)
    assert process.signals == [] and world.member.state is State.READY
    process.exit(-9)
    assert world.member.state is State.GONE and world.member.why() == "killed by signal 9"


def test_an_exit_status_that_is_not_our_signal_is_the_reason(world: World, process: FakeProcess) -> None:
    """The same where nobody can see that a process has ended (another host, another system)."""
    world.up().close(None)
    world.loop.ring(module._EXIT_GRACE)
    assert process.signals == [None]
    process.exit(3)
    assert world.member.why() == "exit code 3" and world.member.reason == ""


def test_a_worker_that_has_ended_and_whose_exit_status_nobody_tells_has_lost_its_connection(
    world: World, process: FakeProcess
) -> None:
    world.up().close(None)
    process.has_ended = True
    world.loop.ring(module._EXIT_GRACE)
    world.loop.ring(module._STATUS_GRACE)
    assert world.member.state is State.GONE and world.member.exitcode is None
    assert process.signals == [] and world.member.why() == "its connection was lost"


def test_a_dead_worker_whose_exit_status_nobody_tells_is_gone_all_the_same(world: World, process: FakeProcess) -> None:
    """Its zygote is stopped, say: calls that it took along waited for ever, and so did the end of the program."""
    world.up().close(None)
    world.loop.ring(module._EXIT_GRACE)
    assert world.member.state is State.READY, "it has just been killed"
    world.loop.ring(module._STATUS_GRACE)
    assert world.member.state is State.GONE and world.member.exitcode is None
    assert world.member.why() == "its connection was lost"
    process.exit(-9)
    assert world.events[-1] == ("gone", None)


def test_what_is_not_the_worker_is_neither_killed_nor_waited_for() -> None:
    """`srun`, `ssh`, a queue's client: it may serve others."""
    process = FakeProcess(is_worker=False)
    process.ospid = 1
    world = World(process)
    link = world.up()
    process.exit(0)
    assert world.member.state is State.READY, "its end says nothing about the worker"
    link.close(None)
    assert world.member.state is State.GONE
    process = FakeProcess(is_worker=False)
    process.ospid = 1
    world = World(process)
    world.up().close(None)
    world.loop.ring(module._EXIT_GRACE)
    assert world.member.state is State.GONE and process.signals == []


def test_without_a_process_the_connection_is_all() -> None:
    world = World(None)
    link = world.up()
    assert (world.member.exitcode, world.member.is_worker, world.member.last_output) == (None, False, "")
    world.member.kill("enough")
    world.loop.run()
    assert link.reasons and world.member.state is State.GONE and world.member.why() == "enough"


def test_a_host_that_falls_silent_sends_no_news_of_its_process() -> None:
    process = FakeProcess(is_here=False)
    world = World(process)
    world.up().close(TimeoutError("it has not answered"))
    assert world.member.state is State.GONE and process.signals == [None]
    assert "its host does not answer" in world.member.why()


def test_last_bytes_of_another_host_may_be_on_their_way() -> None:
    process = FakeProcess(is_here=False)
    world = World(process)
    link = world.up()
    process.exit(0)
    assert link.rest_read == 0
    world.loop.ring(module._REST_GRACE)
    assert link.rest_read == 1 and world.member.state is State.GONE


def test_an_exit_that_is_noticed_elsewhere_is_handled_by_the_leader(world: World, process: FakeProcess) -> None:
    world.up()
    world.loop.leads = False
    process.exit(0)
    assert world.member.state is State.READY
    world.loop.leads = True
    world.loop.run()
    assert world.member.state is State.GONE


# -- being ended ---------------------------------------------------------------------------------------------------


def test_goodbye_is_said_once_and_not_for_ever(world: World, process: FakeProcess) -> None:
    link = world.up()
    del link.sent[:]
    world.member.say_goodbye(3.0)
    world.member.say_goodbye(3.0)
    assert link.sent == [messages.Shutdown("")] and world.member.state is State.LEAVING
    world.loop.ring(3.0)
    assert process.signals == [None]
    process.exit(-9)
    assert world.member.why() == "it did not exit when asked"


def test_goodbye_to_one_that_has_not_joined_is_a_kill(world: World, process: FakeProcess) -> None:
    world.member.say_goodbye(3.0)
    assert process.signals == [None]


def test_removal_goes_from_words_to_force(world: World, process: FakeProcess) -> None:
    link = world.up()
    ended: list[str] = []
    world.member.kills = lambda: ended.append("manager")
    del link.sent[:]
    world.member.remove(3.0)
    assert link.sent == [messages.Shutdown(NOW)] and not world.member.listed
    link.frame(link, Frame(Kind.BUSY, messages.Busy().pack(), b"", []))
    assert world.events[-1] == "busy"
    world.events.pop()
    world.loop.ring(3.0)
    assert world.events[-1] == "busy", "who is stuck cannot say so"
    assert process.signals == [signal.SIGTERM] and ended == ["manager"]
    world.loop.ring(module._TERM_GRACE)
    assert process.signals == [signal.SIGTERM, None]
    process.exit(-9)
    assert world.member.why() == "it was removed" and ended == ["manager"], "once"


@pytest.mark.parametrize("here", [True, False], ids=["process", "connection"])
def test_removal_that_the_manager_has_not_been_asked_for(process: FakeProcess, here: bool) -> None:
    """Its `kill` is for `rmprocs` and the program's end; the worker ends all the same."""
    world = World(process if here else None)
    link = world.up()
    ended: list[str] = []
    world.member.kills = lambda: ended.append("manager")
    world.member.remove(3.0, by_manager=False)
    world.loop.ring(3.0)
    world.loop.ring(module._TERM_GRACE)
    assert process.signals == ([signal.SIGTERM, None] if here else []) and bool(link.reasons) is not here
    process.exit(-9)
    world.loop.run()
    assert world.member.state is State.GONE and ended == []


def test_removal_of_one_that_goes_by_itself_uses_no_force(world: World, process: FakeProcess) -> None:
    world.up()
    world.member.remove(3.0)
    process.exit(0)
    world.loop.ring(3.0)
    world.loop.ring(module._TERM_GRACE)
    assert process.signals == [] and world.member.why() == "it was removed"


def test_who_was_killed_while_it_was_to_be_removed_was_killed(world: World, process: FakeProcess) -> None:
    """By somebody else, before or after it was asked to go: as at the end of a program."""
    world.up()
    world.member.remove(3.0)
    process.exit(-9)
    assert world.member.why() == "killed by signal 9"


def test_a_removed_one_whose_link_ends_first_was_removed(world: World, process: FakeProcess) -> None:
    link = world.up()
    world.member.remove(3.0)
    link.close(None)
    world.loop.ring(module._EXIT_GRACE)
    assert process.signals == [None]
    process.exit(-9)
    assert world.member.why() == "it was removed"


def test_memory_that_ran_out_is_named_as_the_cause(world: World, process: FakeProcess) -> None:
    world.up()
    world.group.oom_kills.more = lambda: True
    process.exit(-9)
    assert "ran out of memory" in world.member.why()


def test_only_managers_that_want_to_hear_are_told(world: World, process: FakeProcess) -> None:
    world.up()
    process.exit(0)
    assert "register" not in world.events and "finalize" not in world.events
