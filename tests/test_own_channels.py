"""Channel classes of the user's own behind a RemoteChannel: subclasses of `Channel`, and others."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from told import requests
from wires import wait_until

import distpool
from distpool import Channel, ChannelClosedError, RemoteChannel, remotecall, remotecall_fetch

WAIT = 30.0


class Sub(Channel):
    """Left as it is."""


class Counting(Channel):
    """With a method of its own."""

    def take(self, *, timeout: float | None = None) -> Any:
        return super().take(timeout=timeout)


class Stack:
    """Nothing of ours, and deaf to time-outs."""

    def __init__(self, maxsize: int, kind: type = object) -> None:
        self.items: list[Any] = []
        self.changed = threading.Condition()
        self.open = True

    def put(self, item: Any) -> None:
        with self.changed:
            self.items.append(item)
            self.changed.notify_all()

    def take(self, timeout: float | None = None) -> Any:
        with self.changed:
            if not self.changed.wait_for(lambda: self.items or not self.open, WAIT) or not self.items:
                raise ChannelClosedError("closed")
            return self.items.pop()

    def isready(self) -> bool:
        return bool(self.items)

    def close(self) -> None:
        with self.changed:
            self.open = False
            self.changed.notify_all()


own_classes = pytest.mark.parametrize("own", [Sub, Counting, Stack])


@own_classes
def test_iteration_over_a_class_of_ones_own_ends_at_close(team: list[int], own: Any) -> None:
    remote = RemoteChannel(lambda: own(3), team[0])
    for item in (1, 2):
        remote.put(item)
    remote.close()
    assert sorted(remote) == [1, 2]


@pytest.mark.parametrize("own", [Sub, Counting])
def test_errors_of_a_subclass_arrive_as_themselves(team: list[int], own: Any) -> None:
    remote = RemoteChannel(lambda: own(1, int), team[0])
    with pytest.raises(TimeoutError):
        remote.take(timeout=0.01)
    with pytest.raises(TypeError, match="takes int, not str"):
        remote.put("text")
    remote.close()
    with pytest.raises(ChannelClosedError):
        remote.put(1)
    with pytest.raises(ChannelClosedError):
        remote.take()


class Fussy(Channel):
    def put(self, value: Any, *, timeout: float | None = None) -> Any:
        if value < 0:
            raise TypeError("no debts")
        return super().put(value, timeout=timeout)


def test_errors_of_the_users_own_methods_are_remote(team: list[int]) -> None:
    remote = RemoteChannel(lambda: Fussy(1, int), team[0])
    with pytest.raises(distpool.RemoteException) as info:
        remote.put(-1)
    assert isinstance(info.value.captured.ex, TypeError)
    with pytest.raises(TypeError, match="takes int, not float"):
        remote.put(1.5)  # of `Channel.put`, which his calls
    remote.put(3)
    assert remote.take() == 3


@own_classes
@pytest.mark.parametrize("end", ["interrupt", "death"])
def test_a_take_that_was_given_up_swallows_nothing(team: list[int], mortal: int, own: Any, end: str) -> None:
    """It goes on in a method that cannot be ended, and gets the next item."""
    owner = team[0]
    remote = RemoteChannel(lambda: own(5), owner)
    taking = remotecall(lambda: remote.take(), mortal)
    wait_until(lambda: remotecall_fetch(_awaited, owner))
    if end == "interrupt":
        distpool.interrupt(mortal)
    else:
        distpool.rmprocs(mortal)
    with pytest.raises((distpool.RemoteException, distpool.ProcessExitedException)):
        taking.result(WAIT)
    wait_until(lambda: remotecall_fetch(_unwanted, owner))
    _put_and_take_three(remote)
    wait_until(lambda: remotecall_fetch(lambda: not requests()._blocking, owner))


@pytest.mark.parametrize("own", [Sub, Counting])
def test_a_take_whose_time_is_up_swallows_nothing(team: list[int], own: Any) -> None:
    remote = RemoteChannel(lambda: own(5), team[0])
    with pytest.raises(TimeoutError):
        remote.take(timeout=0.01)
    _put_and_take_three(remote)


def _put_and_take_three(remote: RemoteChannel) -> None:
    for number in range(3):
        remote.put(number)
    assert {remote.take(timeout=WAIT) for _ in range(3)} == {0, 1, 2}


def _awaited() -> bool:
    """On the owner: somebody elsewhere waits, one way or the other."""
    return bool(requests()._waiters or requests()._blocking)


def _unwanted() -> bool:
    server = requests()
    return not server._waiters and all(server._blocking.values())


class Shelf:
    """Its `put` and `take` have names of places as well, as Julia's example of a channel of one's own."""

    def __init__(self) -> None:
        self.places: dict[str, Any] = {}
        self.changed = threading.Condition()

    def put(self, place: str, item: Any) -> None:
        with self.changed:
            self.places[place] = item
            self.changed.notify_all()

    def take(self, place: str) -> Any:
        with self.changed:
            assert self.changed.wait_for(lambda: place in self.places, WAIT)
            return self.places.pop(place)

    def isready(self) -> bool:
        return bool(self.places)


def test_what_cannot_be_put_back_is_said(team: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a take with arguments nobody knows what the class's put wants."""
    owner, taker = team
    remotecall_fetch(_log_to_stdout, owner)
    remote = RemoteChannel(Shelf, owner)
    taking = remotecall(lambda: remote.take("a"), taker)
    wait_until(lambda: remotecall_fetch(_awaited, owner))
    distpool.interrupt(taker)
    with pytest.raises(distpool.RemoteException):
        taking.result(WAIT)
    wait_until(lambda: remotecall_fetch(_unwanted, owner))
    remote.put("a", 1)
    seen: list[str] = []
    wait_until(lambda: "an item of Shelf is lost" in (seen.append(capsys.readouterr().out) or "".join(seen)))


def _log_to_stdout() -> None:
    import logging
    import sys

    logging.getLogger("distpool").addHandler(logging.StreamHandler(sys.stdout))
