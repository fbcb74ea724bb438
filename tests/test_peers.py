"""Links to other processes, made when they are needed: order, both sides at once, failures, deaths. No sockets here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import ManualLoop

from distpool import config
from distpool.errors import (
    AuthenticationError,
    ProcessExitedException,
    ProtocolError,
    TopologyError,
    UnreachableError,
)
from distpool.node import peers as module
from distpool.node.peers import Peers
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind

PATIENCE = 30.0


class FakeLink:
    """Keeps what is sent; closing it is reported as a real one does it."""

    made: list[FakeLink] = []

    def __init__(self, *arguments: Any) -> None:
        self.sent: list[tuple[Kind, bytes, Any, list[Any]]] = []
        self.peer: Any = None
        self.segments: Any = None
        self.shares_memory = False
        self.bytes_in = 0
        self.acknowledged = False
        self.adopted: Any = None
        self.closed: list[Any] = []
        self.opened = self.rest_read = 0
        self.arguments = arguments
        self.on_closed: Callable[[Any, Any], object] = lambda link, reason: None
        if arguments:  # made by the module: loop, stream, handshake, ready, frame, closed
            self.on_closed = arguments[5]
            FakeLink.made.append(self)

    def send(self, kind: Kind, control: bytes = b"", body: Any = b"", buffers: Any = ()) -> bool:
        self.sent.append((kind, control, body, list(buffers)))
        return True

    def open(self) -> None:
        self.opened += 1

    def read_rest(self) -> None:
        self.rest_read += 1

    def close(self, reason: Any = None) -> None:
        first = not self.closed
        self.closed.append(reason)
        if first:
            self.on_closed(self, reason)

    def kinds(self) -> list[Kind]:
        return [kind for kind, *_ in self.sent]

    def become_ready(self) -> None:
        self.arguments[3](self)


class FakeSegments:
    def __init__(self, link: Any, pool: Any) -> None:
        self.closes = 0
        self.freed: list[int] = []

    def stage(self, buffer: Any) -> Any:
        return "staged", buffer

    def on_free(self, segments: list[int]) -> None:
        self.freed.extend(segments)

    def close(self) -> None:
        self.closes += 1


class World:
    """A process and its peers."""

    def __init__(self, pid: int) -> None:
        self.loop = ManualLoop()
        self.tasks: list[Callable[[], object]] = []
        self.dispatched: list[tuple[Any, Frame]] = []
        self.master_link = FakeLink() if pid > 1 else None
        self.node: Any = SimpleNamespace(
            pid=pid,
            is_master=pid == 1,
            loop=self.loop,
            links=set(),
            segments=None,
            cookie="c" * 16,
            identity=None,
            group=SimpleNamespace(members={}) if pid == 1 else None,
            master_link=self.master_link,
            deliver=self.tasks.append,
            dispatch=lambda link, frame: self.dispatched.append((link, frame)),
        )
        self.peers = Peers(self.node)
        if self.master_link is not None:
            self.peers.add(1, self.master_link)  # type: ignore[arg-type]

    def link(self, pid: int) -> FakeLink:
        """A link that is there."""
        made = FakeLink()
        made.peer = pid
        made.segments = FakeSegments(None, None)
        made.on_closed = self.peers.on_closed
        self.peers.add(pid, made)  # type: ignore[arg-type]
        return made

    def told(self, message: Any) -> None:
        """Pid 1 says so."""
        handler = {Kind.ADDRESS: self.peers.on_address, Kind.DIAL: self.peers.on_dial, Kind.DEAD: self.peers.on_dead}
        handler[message.kind](self.master_link, Frame(message.kind, message.pack(), b"", []))
        self.loop.run()

    def asked(self) -> list[Any]:
        """What was asked of pid 1."""
        assert self.master_link is not None
        return [messages.MESSAGES[kind].unpack(control) for kind, control, *_ in self.master_link.sent]

    def work(self) -> None:
        """Library threads run, then the leader."""
        while self.tasks:
            self.tasks.pop(0)()
        self.loop.run()

    def dialled(self) -> FakeLink:
        """What was dialled: the connection is there and has authenticated."""
        self.work()
        link = FakeLink.made[-1]
        link.become_ready()
        return link


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    FakeLink.made = []
    monkeypatch.setattr(module, "Link", FakeLink)
    monkeypatch.setattr(module, "Segments", FakeSegments)
    monkeypatch.setattr(module, "dial", lambda address, seconds, identity: FakeStream())
    yield


class FakeStream:
    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def worker() -> World:
    return World(2)


@pytest.fixture
def master() -> World:
    return World(1)


def address(pid: int = 3, problem: str = "", detail: str = "") -> messages.Address:
    return messages.Address(pid, ["inet", "host", 9], True, problem, detail)


def frame(message: Any, body: bytes = b"") -> Frame:
    return Frame(message.kind, message.pack(), body, [])


# -- sending -------------------------------------------------------------------------------------------------------


def test_where_there_is_a_link_it_is_used(worker: World) -> None:
    link = worker.link(3)
    worker.peers.send(3, Kind.REPLY, b"control", b"body", ["array"])
    worker.peers.send(3, Kind.REPLY, b"plain")
    assert link.sent == [(Kind.REPLY, b"control", b"body", [("staged", "array")]), (Kind.REPLY, b"plain", b"", [])]
    assert worker.peers.link(3) is link and worker.peers.known() == [1, 2, 3]


def test_frames_wait_in_order_until_the_link_is_there(worker: World) -> None:
    worker.peers.send(3, Kind.REQUEST, b"first", b"", ["array"])
    worker.peers.send(3, Kind.REQUEST, b"second")
    worker.loop.run()
    assert [message.pid for message in worker.asked()] == [3, 3], "pid 1 is asked"
    link = FakeLink()
    link.segments = FakeSegments(None, None)
    before = link.send

    def send(*arguments: Any) -> bool:
        assert worker.peers.link(3) is None, "whoever finds the link sends behind those that have waited"
        return before(*arguments)

    link.send = send  # type: ignore[assignment]
    worker.peers.add(3, link)  # type: ignore[arg-type]
    assert [parts[1] for parts in link.sent] == [b"first", b"second"] and link.sent[0][3] == [("staged", "array")]


def test_a_link_that_came_meanwhile_is_used(worker: World) -> None:
    worker.peers.send(3, Kind.REQUEST, b"late")
    link = worker.link(3)
    worker.loop.run()
    assert link.kinds() == [Kind.REQUEST] and worker.asked() == []


def test_nothing_is_sent_to_the_dead(worker: World) -> None:
    worker.peers.send(3, Kind.REQUEST, b"")  # on its way to the leader when the news come
    worker.peers.mark_dead(3, OSError)
    worker.peers.send(3, Kind.REQUEST, b"")
    worker.loop.run()
    assert worker.asked() == []
    worker.peers.add(3, link := FakeLink())  # type: ignore[arg-type]
    assert link.sent == []


# -- waiting for a link --------------------------------------------------------------------------------------------


def ensure_in_thread(world: World, pid: int) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(world.peers.ensure(pid))
        except BaseException as error:
            found.append(error)

    world.loop.can_lead = False
    thread = threading.Thread(target=run)
    thread.start()
    assert world.loop.followed.wait(PATIENCE)
    world.loop.run()
    return thread, found


def test_ensure_returns_when_the_link_is_there(worker: World) -> None:
    thread, found = ensure_in_thread(worker, 3)
    assert [type(message) for message in worker.asked()] == [messages.Where]
    assert found == []
    worker.link(3)
    thread.join(PATIENCE)
    assert found == [None]
    worker.peers.ensure(3)
    assert len(worker.asked()) == 1, "it is there"


def test_an_interrupt_of_one_wakes_no_other(worker: World) -> None:
    first, one = ensure_in_thread(worker, 3)
    wake = worker.loop.wake
    worker.loop.followed.clear()
    second, other = ensure_in_thread(worker, 3)
    wake()
    first.join(PATIENCE)
    assert isinstance(one[0], ConnectionError) and other == []
    worker.link(3)
    second.join(PATIENCE)
    assert other == [None]


@pytest.mark.parametrize(
    "problem, kind",
    [
        ("topology", TopologyError),
        ("unreachable", UnreachableError),
        ("denied", AuthenticationError),
        ("unknown", ValueError),
    ],
)
def test_ensure_raises_what_pid_1_knows(worker: World, problem: str, kind: type[Exception]) -> None:
    thread, found = ensure_in_thread(worker, 3)
    failed: list[BaseException] = []
    worker.peers.requests.new(3, lambda *answer: None, failed.append)
    worker.told(address(problem=problem, detail="as it is"))
    thread.join(PATIENCE)
    assert type(found[0]) is kind and type(failed[0]) is kind
    assert ("no process with id 3" if problem == "unknown" else "as it is") in str(found[0])


@pytest.mark.parametrize("problem, kind", [("topology", TopologyError), ("unreachable", UnreachableError)])
def test_later_requests_fail_as_the_first_did(worker: World, problem: str, kind: type[Exception]) -> None:
    """Those of channels and futures come without `ensure`; a frame that is dropped would never be answered."""
    failed: list[BaseException] = []
    for told in (False, True, True):
        worker.peers.requests.new(3, lambda *answer: None, failed.append)
        worker.peers.send(3, Kind.CHANNEL, b"take")
        worker.loop.run()
        if not told:
            worker.told(address(problem=problem))
        assert type(failed.pop()) is kind and not failed
    assert worker.master_link is not None and worker.master_link.kinds() == [Kind.WHERE]


def test_for_how_long_a_problem_is_believed(worker: World) -> None:
    worker.told(address(4, "topology", "by design"))
    worker.told(address(5, "unreachable", "firewall"))
    worker.told(address(6, "unknown"))
    with pytest.raises(TopologyError, match="by design"):
        worker.peers.check(4)
    with pytest.raises(ConnectionError, match="firewall"):
        worker.peers.check(5)
    worker.peers.check(6)  # it may come to exist
    worker.loop.ring(module._TRY_AGAIN)
    worker.peers.check(5)
    with pytest.raises(TopologyError):
        worker.peers.check(4)


def test_who_never_answers_is_given_up(worker: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "worker_timeout", lambda: 12.5)
    thread, found = ensure_in_thread(worker, 3)
    worker.peers.send(4, Kind.REQUEST, b"")
    failed: list[BaseException] = []
    worker.peers.requests.new(4, lambda *answer: None, failed.append)
    worker.loop.run()
    worker.loop.ring(12.5)
    thread.join(PATIENCE)
    assert "no connection to process 3 within 12.5 seconds" in str(found[0])
    assert "process 4" in str(failed[0])


def test_time_counts_from_the_attempt_that_still_runs(worker: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from one that has ended: its link came, and was lost just before the time was up."""
    monkeypatch.setattr(config, "worker_timeout", lambda: 12.5)
    worker.peers.send(3, Kind.REQUEST, b"")
    worker.loop.run()
    link = worker.link(3)
    worker.peers.on_closed(link, None)  # type: ignore[arg-type]
    old = list(worker.loop.later)
    thread, found = ensure_in_thread(worker, 3)
    for timer in old:
        timer.callback()
    worker.link(3)
    thread.join(PATIENCE)
    assert found == [None]


def test_on_pid_1_members_are_waited_for_and_others_are_unknown(master: World) -> None:
    with pytest.raises(ValueError, match="no process with id 9"):
        master.peers.ensure(9)
    master.node.group.members[3] = object()
    thread, found = ensure_in_thread(master, 3)
    assert found == []
    master.link(3)
    thread.join(PATIENCE)
    assert found == [None]
    thread, found = (master.node.group.members.update({4: object()}), ensure_in_thread(master, 4))[1]
    del master.node.group.members[4]
    master.peers.mark_dead(4, lambda: ProcessExitedException(4, 1, True))
    thread.join(PATIENCE)
    assert isinstance(found[0], ProcessExitedException) and found[0].maybe_ran is False, "the call was never sent"


# -- dialling ------------------------------------------------------------------------------------------------------


def test_the_dialler_says_who_it_is_and_uses_the_link(worker: World) -> None:
    worker.peers.send(3, Kind.REQUEST, b"waits")
    worker.loop.run()
    worker.told(address())
    link = worker.dialled()
    assert link.opened == 1 and link.kinds() == [Kind.PEER, Kind.REQUEST]
    assert messages.Peer.unpack(link.sent[0][1]) == messages.Peer(2, True) and link.shares_memory
    assert worker.peers.link(3) is link and link in worker.node.links and worker.peers.opened == 1
    worker.loop.ring(config.worker_timeout())
    assert link.closed == [], "it has answered"


def test_both_sides_at_the_same_moment_make_one_link(worker: World) -> None:
    worker.told(address())
    worker.told(messages.Dial(3, ["inet", "host", 9], False, ""))
    worker.work()
    assert len(FakeLink.made) == 1
    theirs = FakeLink()
    worker.peers.on_frame(theirs, frame(messages.Peer(3, False)))  # type: ignore[arg-type]
    assert worker.peers.link(3) is theirs
    worker.told(address())
    assert not worker.tasks, "there is one"


def test_a_connection_that_comes_too_late_is_closed(worker: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FakeStream()
    monkeypatch.setattr(module, "dial", lambda *arguments: stream)
    worker.told(address())
    worker.link(3)
    worker.work()
    assert stream.closed and not FakeLink.made and not worker.peers._dialling


def test_who_cannot_dial_says_why_and_lets_the_other_try(worker: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise OSError("refused")

    monkeypatch.setattr(module, "dial", refuse)
    worker.told(address())
    worker.work()
    [where] = worker.asked()
    assert (where.pid, where.detail) == (3, "process 2 cannot connect to process 3 at host:9: refused")
    worker.told(address(detail="process 3 has tried"))
    worker.work()
    with pytest.raises(ConnectionError, match="refused, and process 3 has tried. Calls through process 1 go on"):
        worker.peers.check(3)


def test_who_is_told_to_dial_and_cannot_reports_back(worker: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise OSError("refused")

    monkeypatch.setattr(module, "dial", refuse)
    worker.told(messages.Dial(3, ["inet", "host", 9], False, "tried"))
    worker.work()
    [told] = worker.asked()
    assert isinstance(told, messages.Undialled) and (told.pid, told.tried) == (3, "tried") and "refused" in told.detail


def test_who_has_another_cookie_is_not_asked_to_try_as_well(worker: World) -> None:
    """The asker has dialled, or was to be dialled: neither would fare better the other way round."""
    worker.told(address())
    worker.work()
    FakeLink.made[-1].close(AuthenticationError("the cookies differ"))
    with pytest.raises(AuthenticationError, match="connection of process 2 to process 3 ended: the cookies differ"):
        worker.peers.check(3)
    assert worker.asked() == []
    worker.told(messages.Dial(4, ["inet", "host", 9], False))
    worker.work()
    FakeLink.made[-1].close(AuthenticationError("the cookies differ"))
    [told] = worker.asked()
    assert isinstance(told, messages.Undialled) and told.denied


def test_a_handshake_that_never_ends_is_a_failure(worker: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "worker_timeout", lambda: 12.5)
    worker.told(address(detail="tried"))
    worker.work()
    worker.loop.ring(12.5)
    with pytest.raises(ConnectionError, match="did not answer the handshake"):
        worker.peers.check(3)


# -- custom transports ---------------------------------------------------------------------------------------------


class FakeAdopted:
    def __init__(self) -> None:
        self.stream = FakeStream()
        self.ends = 0

    def end(self) -> None:
        self.ends += 1

    def watch(self, loop: Any, on_end: Callable[[], object]) -> None:
        self.on_end = on_end


def by_manager(pid: int = 3, detail: str = "") -> messages.Address:
    return messages.Address(pid, ["manager", "there"], False, "", detail)


def test_streams_of_a_manager_are_believed_when_the_other_side_has_said_who_it_is(worker: World) -> None:
    adopted, asked = FakeAdopted(), []
    worker.peers.connect_by_manager = lambda pid, place: (asked.append((pid, place)), adopted)[1]  # type: ignore
    worker.told(by_manager())
    link = worker.dialled()
    assert asked == [(3, "there")] and worker.peers.link(3) is None
    worker.peers.on_frame(link, frame(messages.Peer(3, False)))  # type: ignore[arg-type]
    assert worker.peers.link(3) is link and not worker.peers._unproved
    adopted.on_end()
    assert link.closed == [None] and adopted.ends == 1 and worker.peers.link(3) is None


def test_a_manager_that_leads_elsewhere(worker: World) -> None:
    adopted = FakeAdopted()
    worker.peers.connect_by_manager = lambda pid, place: adopted  # type: ignore
    worker.told(by_manager(detail="tried"))
    link = worker.dialled()
    worker.peers.on_frame(link, frame(messages.Peer(7, False)))  # type: ignore[arg-type]
    with pytest.raises(ConnectionError, match="connected to process 7, not to process 3"):
        worker.peers.check(3)
    assert adopted.ends == 1 and worker.peers.known() == [1, 2]


def test_whatever_a_manager_raises_is_why_there_is_no_link(worker: World) -> None:
    """SystemExit, too, as a `connect` may raise that parses a command line. All who came later waited as well."""

    def connect(pid: int, place: str) -> Any:
        raise SystemExit("no such place")

    worker.peers.connect_by_manager = connect
    for _ in range(2):
        failed: list[BaseException] = []
        worker.peers.requests.new(3, lambda *answer: None, failed.append)
        worker.told(by_manager(detail="tried"))
        worker.work()
        assert "no such place" in str(failed[0])


def test_no_manager_is_said_so(worker: World) -> None:
    worker.told(by_manager(detail="tried"))
    worker.work()
    with pytest.raises(ConnectionError, match="at the place that its manager knows: it is behind a custom transport"):
        worker.peers.check(3)


# -- frames --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pid", [0, 1, 2, 9])
def test_who_cannot_be_who_it_says_is_cut_off(worker: World, pid: int) -> None:
    worker.peers.mark_dead(9, OSError)
    link = FakeLink()
    worker.peers.on_frame(link, frame(messages.Peer(pid, False)))  # type: ignore[arg-type]
    assert isinstance(link.closed[0], ProtocolError) and worker.peers.known() == [1, 2]


def test_a_second_introduction_is_one_too_many(worker: World) -> None:
    link = worker.link(3)
    worker.peers.on_frame(link, frame(messages.Peer(4, False)))  # type: ignore[arg-type]
    assert isinstance(link.closed[0], ProtocolError)


@pytest.mark.parametrize("kind", [Kind.CALLS, Kind.SHUTDOWN, Kind.DEAD, Kind.RELAY, Kind.ADDRESS, Kind.IDENTITY])
def test_workers_may_not_speak_for_pid_1(worker: World, kind: Kind) -> None:
    link = worker.link(3)
    worker.peers.on_frame(link, Frame(kind, b"", b"", []))  # type: ignore[arg-type]
    assert isinstance(link.closed[0], ProtocolError) and not worker.dispatched
    assert worker.peers.link(3) is None


def test_other_frames_go_to_who_registered_them(worker: World) -> None:
    link = worker.link(3)
    request = Frame(Kind.REQUEST, b"", b"", [])
    worker.peers.on_frame(link, request)  # type: ignore[arg-type]
    worker.peers.on_frame(link, frame(messages.SegmentsFree([4, 5])))  # type: ignore[arg-type]
    assert worker.dispatched == [(link, request)] and link.segments.freed == [4, 5]
    worker.peers.on_frame(FakeLink(), request)  # type: ignore[arg-type]  # it has not said who it is
    assert len(worker.dispatched) == 1


def test_a_request_fails_where_it_is_known_that_no_link_will_come(worker: World) -> None:
    """Whoever uses a reference does not ask `check` before, and waited for ever the second time."""
    worker.told(address(problem="topology", detail="by design"))
    failed: list[BaseException] = []
    worker.peers.requests.new(3, lambda *answer: None, failed.append)
    worker.peers.send(3, Kind.REFERENCE, b"")
    worker.loop.run()
    assert [type(error) for error in failed] == [TopologyError] and not len(worker.peers.requests)


def test_small_frames_go_round_where_no_link_is_allowed(worker: World, master: World) -> None:
    worker.peers.send(3, Kind.CLIENTS, b"waits")
    worker.loop.run()
    worker.told(address(problem="topology", detail="by design"))
    worker.peers.send(3, Kind.CLIENTS, b"later")
    worker.peers.send(3, Kind.REQUEST, b"never")
    worker.loop.run()
    assert worker.master_link is not None
    relays = [parts for parts in worker.master_link.sent if parts[0] is Kind.RELAY]
    assert [parts[2] for parts in relays] == [b"waits", b"later"]
    to, source = master.link(3), master.link(2)
    for _, control, body, _ in relays:
        master.peers.on_relay(source, Frame(Kind.RELAY, control, body, []))  # type: ignore[arg-type]
    assert [(parts[0], parts[1]) for parts in to.sent] == [(Kind.CLIENTS, b"waits"), (Kind.CLIENTS, b"later")]
    own = messages.Relay(1, int(Kind.CLIENTS)).pack()
    master.peers.on_relay(source, Frame(Kind.RELAY, own, b"for me", []))  # type: ignore[arg-type]
    assert master.dispatched[0][1].control == b"for me"


# -- ends ----------------------------------------------------------------------------------------------------------


def test_a_lost_link_fails_what_waits_and_may_be_made_anew(worker: World) -> None:
    link = worker.link(3)
    worker.node.links.add(link)
    failed: list[Any] = []
    worker.peers.requests.new(3, lambda *answer: None, failed.append)
    assert worker.peers.on_closed(link, OSError("reset"))  # type: ignore[arg-type]
    answered: list[Any] = []
    later = worker.peers.requests.new(3, lambda *answer: answered.append(answer), failed.append)
    assert not failed, "pid 1 may know more in a moment"
    worker.loop.ring(module._NEWS)
    assert isinstance(failed[0], ProcessExitedException) and failed[0].maybe_ran
    assert "connection to process 2 was lost: reset" in str(failed[0])
    assert worker.peers.requests.settle(later, 0, b"", []) and len(failed) == 1, "it was asked on a new link"
    assert link.segments.closes == 1 and link not in worker.node.links and worker.peers.link(3) is None
    worker.peers.check(3)  # pid 1 has not said that it is gone
    assert not worker.peers.on_closed(link, None), "once"  # type: ignore[arg-type]
    assert not worker.peers.on_closed(FakeLink(), None)  # type: ignore[arg-type]


def test_who_waits_when_the_link_ends_hears_what_pid_1_knows(worker: World) -> None:
    failed: list[Any] = []
    worker.peers.requests.new(3, lambda *answer: None, failed.append)
    worker.link(3).close(OSError("reset"))
    worker.told(messages.Dead(3, -11, "", "last words"))
    worker.peers.requests.new(3, lambda *answer: None, failed.append)
    worker.loop.ring(module._NEWS)
    assert [(error.exitcode, error.output, error.maybe_ran) for error in failed] == [(-11, "last words", True)]
    with pytest.raises(ProcessExitedException) as info:
        worker.peers.ensure(3)
    assert (info.value.exitcode, info.value.output, info.value.maybe_ran) == (-11, "last words", False)


def test_a_death_is_noted_once_and_everybody_hears(worker: World) -> None:
    link = worker.link(3)
    failed: list[Any] = []
    lost: list[int] = []
    worker.peers.requests.new(3, lambda *answer: None, failed.append)

    def leaves(pid: int) -> None:
        lost.append(pid)
        worker.peers.on_lost.remove(leaves)

    worker.peers.on_lost += [leaves, lost.append]
    for _ in range(2):
        worker.told(messages.Dead(3, -9, "killed"))
    assert lost == [3, 3] and len(failed) == 1
    assert (failed[0].worker_id, failed[0].exitcode, failed[0].maybe_ran) == (3, -9, True) and "killed" in str(
        failed[0]
    )
    assert link.rest_read == 1 and link.closed == [None], "its last words count"
    with pytest.raises(ProcessExitedException) as info:
        worker.peers.ensure(3)
    assert info.value.maybe_ran is False


def test_pid_1_tells_everybody_else(master: World) -> None:
    links = {pid: master.link(pid) for pid in (2, 3, 4, 5)}  # 5: no member of the group that 3 was in
    output = 2 * module._LAST_WORDS * "x" + "\nlast words"
    master.peers.mark_dead(3, lambda: ProcessExitedException(3, None, True, output, "lost"))
    master.peers.broadcast_dead(3, {2, 4})
    assert links[3].sent == links[5].sent == []
    for pid in (2, 4):
        told = messages.Dead.unpack(links[pid].sent[0][1])
        assert (told.pid, told.exitcode, told.reason) == (3, None, "lost")
        assert told.output.endswith("x\nlast words") and len(told.output) == module._LAST_WORDS


# -- doubt ---------------------------------------------------------------------------------------------------------


def dial() -> messages.Dial:
    return messages.Dial(3, ["inet", "host", 9], False, "")


def test_a_link_that_the_other_side_has_lost_is_made_anew(worker: World) -> None:
    link = worker.link(3)
    worker.told(dial())
    assert not worker.tasks, "it may be so young that the other side has not heard of it"
    assert link.kinds() == [Kind.REVOKE], "who has closed it refuses that, who has it answers"
    worker.loop.ring(module._DOUBT)
    assert isinstance(link.closed[0], TimeoutError)
    assert worker.dialled().kinds() == [Kind.PEER]


def test_a_manager_s_link_has_the_time_of_a_host_that_is_silent(worker: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing there says that the other side, which may be stopped for a moment, has got the question."""
    monkeypatch.setenv("DISTPOOL_SILENT_SECONDS", "7")
    link = worker.link(3)
    link.adopted = FakeAdopted()
    worker.told(dial())
    assert [timer.seconds for timer in worker.loop.later] == [7.0]
    worker.loop.ring(7.0)
    assert isinstance(link.closed[0], TimeoutError) and len(worker.tasks) == 1


def test_a_link_that_still_brings_something_stays(worker: World) -> None:
    link = worker.link(3)
    worker.told(dial())
    link.bytes_in += 1
    worker.loop.ring(module._DOUBT)
    assert link.closed == [] and not worker.tasks and not worker.peers._doubted


def test_a_link_that_is_acknowledged_stays(worker: World) -> None:
    """The order is late, and the other side waits for the answer to a long call, or is stopped."""
    link = worker.link(3)
    worker.told(dial())
    link.acknowledged = True
    worker.loop.ring(module._DOUBT)
    assert link.closed == [] and not worker.tasks and not worker.peers._doubted


def test_a_doubted_link_that_ends_is_made_anew_at_once(worker: World) -> None:
    link = worker.link(3)
    worker.told(dial())
    worker.peers.on_closed(link, None)  # type: ignore[arg-type]
    assert len(worker.tasks) == 1
    worker.loop.ring(module._DOUBT)
    assert worker.dialled().kinds() == [Kind.PEER] and len(FakeLink.made) == 1


def test_only_pid_1_brings_an_identity(worker: World, monkeypatch: pytest.MonkeyPatch) -> None:
    message = messages.IdentityIs("certificate", "key")
    worker.peers.on_identity(FakeLink(), frame(message))  # type: ignore[arg-type]
    assert worker.node.identity is None
    worker.peers.on_identity(worker.master_link, frame(message))  # type: ignore[arg-type]
    assert (worker.node.identity.certificate, worker.node.identity.key) == ("certificate", "key")
