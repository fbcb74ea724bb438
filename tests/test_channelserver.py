"""The owner's side of channels: what is left of those who wait when they give up, are served or die; and bindings."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from typing import Any

import pytest
from told import requests
from wires import wait_until

import distpool
from distpool import Channel, ChannelClosedError, RemoteChannel, remotecall, remotecall_fetch
from distpool.node import node as nodes
from distpool.refs import ahead, channels
from distpool.refs.refs import Outcome
from distpool.wire import codec
from distpool.wire.frames import Kind
from distpool.wire.records import PLAIN_ERROR, VALUE

WAIT = 30.0


def here(maxsize: float) -> tuple[RemoteChannel, Channel]:
    """A channel of this process, and what stands before it."""
    channel = Channel(maxsize)  # type: ignore[arg-type]
    return RemoteChannel(lambda: channel), channel


def cut(pid: int) -> None:
    """On one of two workers: their link is lost, and both live."""
    node = nodes.current()
    node.loop.call_soon(lambda: node.peers.link(pid).close(ConnectionError("cut")))


@pytest.mark.parametrize("side", ["owner", "asker"])
@pytest.mark.parametrize("operation", ["take", "put"])
def test_who_waits_over_a_link_that_is_lost(team: list[int], operation: str, side: str) -> None:
    """Its request fails; so it must not get an item later, which would be lost, nor may its own item come late."""
    owner, asker = team
    channel = RemoteChannel(lambda: Channel(1), owner)
    if operation == "put":
        channel.put("first")

    def use() -> Any:
        return channel.take() if operation == "take" else channel.put("late")

    future = remotecall(use, asker)
    wait_until(lambda: remotecall_fetch(lambda: len(requests()._waiters), owner))
    remotecall_fetch(cut, owner if side == "owner" else asker, asker if side == "owner" else owner)
    error = future.exception(WAIT)
    assert isinstance(error, distpool.RemoteException)
    assert isinstance(error.captured.ex, distpool.ProcessExitedException)
    wait_until(lambda: not remotecall_fetch(lambda: len(requests()._waiters), owner))
    if operation == "take":
        channel.put("first")
    assert channel.take(timeout=WAIT) == "first" and not channel.isready()


def lose_notices(lose: bool) -> None:
    handlers: Any = nodes.current().handlers
    kept = handlers.setdefault("kept", handlers[Kind.NOTICE])
    lost = handlers["lost"] = []
    handlers[Kind.NOTICE] = (lambda link, frame: lost.append(frame)) if lose else kept


def lost_notices() -> int:
    handlers: Any = nodes.current().handlers
    return len(handlers["lost"])


@pytest.mark.parametrize("side", ["owner", "asker"])
def test_who_waits_for_a_call_whose_end_is_lost_with_the_link(team: list[int], side: str) -> None:
    """Its own call may be lost as well, so it fails. Of somebody else's it asks once more."""
    owner, asker = team
    go, waits = RemoteChannel(lambda: Channel(2)), RemoteChannel()
    others = remotecall(go.take, owner)

    def wait_for_both() -> Any:
        own = remotecall(go.take, owner)
        others.add_done_callback(lambda ended: None)
        remotecall_fetch(abs, owner, 1)  # it has been asked
        waits.put(None)
        ended = concurrent.futures.wait([own, others], WAIT).done
        return len(ended), own.exception(), others.result()

    both = remotecall(wait_for_both, asker)
    waits.take(timeout=WAIT)
    remotecall_fetch(lose_notices, asker, True)
    for _ in range(2):
        go.put("value")
    assert others.result(WAIT) == "value"
    wait_until(lambda: remotecall_fetch(lost_notices, asker) == 2)
    remotecall_fetch(lose_notices, asker, False)
    remotecall_fetch(cut, owner if side == "owner" else asker, asker if side == "owner" else owner)
    ended, error, value = both.result(WAIT)
    assert ended == 2 and isinstance(error, distpool.ProcessExitedException) and value == "value"


def take_for_long(channel: Any) -> Any:
    return channel.take(timeout=3600)


def wait_briefly(channel: Any, count: int) -> int:
    late = 0
    for _ in range(count):
        try:
            channel.wait(timeout=0.001)
        except TimeoutError:
            late += 1
    return late


def test_who_is_served_leaves_nothing(team: list[int]) -> None:
    remote, _ = here(1)
    server = requests()
    taking = remotecall(take_for_long, team[0], remote)
    wait_until(lambda: server._waiters)
    ((_, waiter, timer),) = server._waiters.values()
    remote.put("item")
    assert taking.fetch(timeout=WAIT) == "item"
    assert not server._waiters and not waiter.live
    assert timer.cancelled and timer.callback.__closure__ is None, "not even in an hour's timer"


def test_who_dies_leaves_nothing(mortal: int) -> None:
    remote, channel = here(1)
    server = requests()
    taking = remotecall(take_for_long, mortal, remote)
    wait_until(lambda: server._waiters)
    distpool.rmprocs(mortal)
    assert taking.exception(timeout=WAIT) is not None
    wait_until(lambda: not server._waiters)
    remote.put("item")
    assert channel.take(timeout=WAIT) == "item"


def test_who_waits_in_vain_again_and_again_leaves_nothing(team: list[int]) -> None:
    remote, channel = here(1)
    assert remotecall_fetch(wait_briefly, team[0], remote, 50) == 50
    assert wait_briefly(channel, 50) == 50
    assert len(channel._watchers) <= 1
    assert not requests()._waiters


def test_a_request_that_is_served_while_it_is_noted_down(team: list[int]) -> None:
    """Another thread brings the item between the two."""
    remote, channel = here(1)
    server = requests()

    class Hasty(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            channel.put("item")
            super().__setitem__(key, value)

    before, server._waiters = server._waiters, Hasty()
    try:
        assert remotecall_fetch(take_for_long, team[0], remote) == "item"
        assert not server._waiters
    finally:
        server._waiters = before


class Own:
    """A channel of one's own, which notes where it was closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.led = False

    @property
    def close(self) -> Any:  # already to look for it is to run his code
        self.led = nodes.current().loop.leads
        return self.closed.set


def test_bindings(mortal: int) -> None:
    """They close, run no code of the user's on the leader, and keep nothing."""
    peers = nodes.current().peers
    own = Own()
    remote, channel = here(1)
    before = len(peers.on_lost)
    bound = [remote.bind(mortal), RemoteChannel(object).bind(mortal), RemoteChannel(lambda: own).bind(mortal)]
    gone, dropped = here(1)
    gone.bind(mortal)
    del gone, dropped
    wait_until(lambda: len(peers.on_lost) == before + 3)  # it left with the channel, although nobody died
    distpool.rmprocs(mortal)
    assert own.closed.wait(WAIT) and not own.led
    wait_until(lambda: not channel.isopen())
    with pytest.raises(ChannelClosedError) as info:
        channel.take(timeout=WAIT)
    assert isinstance(info.value.__cause__, distpool.ProcessExitedException)
    assert len(peers.on_lost) == before
    late, closed = here(1)
    late.bind(mortal)
    assert not closed.isopen() and len(peers.on_lost) == before
    del bound


def test_a_put_into_a_typed_channel_goes_with_its_process(mortal: int) -> None:
    """It held a thread here, and its item came after the death, as that of no other channel does."""
    channel = Channel(1, int)
    remote = RemoteChannel(lambda: channel)
    channel.put(1)
    distpool.remote_do(remote.put, mortal, 2)
    wait_until(lambda: channel._putters)
    assert [putter.pid for putter in channel._putters] == [mortal]
    distpool.rmprocs(mortal)
    wait_until(lambda: not any(putter.live for putter in list(channel._putters)))
    assert channel.take() == 1
    with pytest.raises(TimeoutError):
        channel.take(timeout=0)


def test_what_is_put_into_a_typed_channel_is_looked_at(team: list[int]) -> None:
    remote = RemoteChannel(lambda: Channel(1, int))
    with pytest.raises(distpool.RemoteException, match="takes int, not str") as info:
        remotecall_fetch(remote.put, team[0], "text")
    assert isinstance(info.value.captured.ex, TypeError)
    remotecall_fetch(lambda: remote.put(3) and None, team[0])
    assert remote.take() == 3


def test_who_died_before_it_was_noted_down_waits_for_nothing(team: list[int]) -> None:
    """What it puts has been on a library thread meanwhile."""
    _, channel = here(1)
    peers = nodes.current().peers
    waiter = channel.request("take", lambda outcome: None, 999)
    peers.dead[999] = OSError
    try:
        requests()._keep((999, 1), channel, waiter, None)
    finally:
        del peers.dead[999]
    assert not waiter.live and not requests()._waiters
    channel.put("item")
    assert channel.take() == "item"


def test_a_channel_whose_making_was_interrupted_is_freed(team: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the answer had come by then, or comes later."""
    owner = team[0]
    for answered in (False, True):

        def interrupted(self: Any, timeout: float | None = None, answered: bool = answered) -> Any:
            if answered:
                self._await(WAIT)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(channels._RemoteReply, "result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                RemoteChannel(lambda: Channel(1), owner)
        remotecall_fetch(abs, owner, 1)
        wait_until(lambda: not distpool.debug.refs(owner))


def test_finalizing_again_does_not_touch_another_object_of_the_same_reference(team: list[int]) -> None:
    owner = team[0]
    first = RemoteChannel(lambda: Channel(1), owner)
    refs = nodes.current().references()
    key = distpool.remoteref_id(first)
    back = remotecall_fetch(list, owner, [first])
    assert back[0] is first
    keeper = remotecall(list, owner, [first])
    keeper.wait(WAIT)
    first.finalize()
    second = keeper.fetch(timeout=WAIT)[0]
    assert second is not first and second == first and refs.live[key] is second
    first.finalize()
    assert refs.live[key] is second
    with contextlib.suppress(TimeoutError):
        second.put("item", timeout=WAIT)
    assert second.take(timeout=WAIT) == "item"


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize("operation", ["take", "fetch", "wait", "put"])
def test_who_waits_when_the_reference_is_finalized(team: list[int], operation: str, where: str) -> None:
    """Nobody else may be left who could serve it; and later it must not swallow an item, nor its own come late."""
    channel = RemoteChannel(lambda: Channel(1), 1 if where == "here" else team[0])
    if operation == "put":
        channel.put("first")
    kept = remotecall_fetch(Kept, team[1], channel)
    arguments = ("late",) if operation == "put" else ()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(getattr(channel, operation), *arguments)
        wait_until(lambda: channel._waits)
        channel.finalize()
        with pytest.raises(RuntimeError, match="was finalized"):
            waiting.result(WAIT)
    if operation != "put":
        remotecall_fetch(Kept.put, team[1], kept, "first")
    assert remotecall_fetch(Kept.rest, team[1], kept) == ["first"]


class Kept:
    """A channel that its process holds, for others to use by number."""

    held: dict[int, RemoteChannel] = {}

    def __new__(cls, channel: RemoteChannel) -> Any:
        cls.held[channel.id] = channel
        return channel.id

    @staticmethod
    def put(number: int, item: Any) -> None:
        Kept.held[number].put(item, timeout=WAIT)

    @staticmethod
    def rest(number: int) -> list[Any]:
        Kept.held[number].close()
        return list(Kept.held.pop(number))


def test_an_item_that_comes_when_the_reference_was_finalized(team: list[int]) -> None:
    """The owner had served it just before: it goes back to the head."""
    channel, inside = here(2)
    remotecall_fetch(Kept, team[0], channel)
    number = channel.id

    def take_and_finalize() -> str:
        """The answer comes when the waiter has been told."""
        reference = Kept.held[number]
        give_up = channels._RemoteReply._give_up

        def answered(late: Any) -> None:
            nodes.current().peers.requests.settle(late.number, VALUE, codec.encode("item")[0], [])
            give_up(late)

        channels._RemoteReply._give_up = answered  # type: ignore[method-assign]
        other = threading.Thread(target=lambda: (wait_until(lambda: reference._waits), reference.finalize()))
        other.start()
        try:
            reference.take(timeout=WAIT)
        except RuntimeError as error:
            return str(error)
        finally:
            other.join()
            channels._RemoteReply._give_up = give_up  # type: ignore[method-assign]
        return "taken"

    assert "finalized" in remotecall_fetch(take_and_finalize, team[0])
    assert inside.take(timeout=WAIT) == "item"


def test_a_binding_to_who_died_before_the_owner_joined(mortal: int) -> None:
    """The owner has not heard of it, and never will by itself: takers would wait for ever."""
    distpool.rmprocs(mortal)
    (owner,) = distpool.addprocs(1)
    try:
        channel = RemoteChannel(lambda: Channel(1), owner).bind(mortal)
        with pytest.raises(ChannelClosedError):
            channel.take(timeout=WAIT)
    finally:
        distpool.rmprocs(owner)


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_what_a_channel_is_bound_to(team: list[int], where: str) -> None:
    channel = RemoteChannel(lambda: Channel(1), 1 if where == "here" else team[0])
    for pid in (1, *team):
        assert channel.bind(pid) is channel
    for wrong in ("2", True, None):
        with pytest.raises(TypeError, match="a pid is an int"):
            channel.bind(wrong)  # type: ignore[arg-type]
    with pytest.raises((ValueError, distpool.RemoteException), match="no process with id 999 exists"):
        channel.bind(999)
    assert channel.put("item").take(timeout=WAIT) == "item"


def test_an_item_that_was_put_ahead_into_a_closed_channel_tells_so() -> None:
    """The owner's answer is one of those errors that arrive as themselves."""
    group = object.__new__(ahead.Aheads)
    group._local = threading.local()
    error = codec.encode(ChannelClosedError("Channel is closed."))[0]
    group.teller().errors.append(Outcome(PLAIN_ERROR, error, (), 2))
    with pytest.raises(ChannelClosedError, match="is closed"):
        group.check()
    group.check()
