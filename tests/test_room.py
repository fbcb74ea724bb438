"""Reserved room: the accounts of `Room`, and what a `Channel` makes of them, without any other process."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest

from distpool import Channel, ChannelClosedError
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome
from distpool.refs.room import ENOUGH, MOST, PATIENCE, SMALLEST, Room

WAIT = 10.0


class Producers:
    """Stands for the other processes: who was asked to give its room back."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.asked: list[tuple[int, int]] = []
        self.told = threading.Event()

    def ask(self, pid: int, epoch: int) -> None:
        self.asked.append((pid, epoch))
        self.told.set()

    def reserve(self, pid: int) -> tuple[int, int]:
        told: list[tuple[int, int]] = []
        self.channel.reserve(pid, self.ask, lambda credit, epoch: told.append((credit, epoch)))
        (credit,) = told
        return credit

    def put(self, pid: int, *values: Any) -> bool:
        told: list[bool] = []
        self.channel.arrive(pid, [Outcome(LOCAL_VALUE, value, (), pid) for value in values], told.append)
        (taken,) = told
        return taken


class Answer:
    """A callback that remembers."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def __call__(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    @property
    def value(self) -> Any:
        (outcome,) = self.outcomes
        return outcome.data


def in_thread(function: Any, *args: Any, **kwargs: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function(*args, **kwargs))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def hold(channel: Channel, answer: Any) -> bool:
    """Whether it is the first one that is held back."""
    first: list[None] = []
    channel.hold(answer, lambda: first.append(None))
    return bool(first)


def waits(channel: Channel) -> None:
    """Until somebody waits to put something."""
    while not any(putter.live for putter in list(channel._putters)):
        pass


# -- Room alone ------------------------------------------------------------------------------------------------------


def test_credits_are_shared_and_limited() -> None:
    room = Room(1000, lambda pid, epoch: None)
    assert room.grant(2, 1000) == (500, 0)
    assert room.grant(3, 500) == (250, 0)
    assert room.taken == 750
    assert room.grant(2, 250) == (0, 0), "it has enough"
    room.use(2, 400)
    assert room.taken == 350
    assert room.grant(2, 250)[0] > 0
    assert room.grant(4, 20) == (0, 0), "too little to be worth it"


def test_credits_of_small_and_of_endless_channels() -> None:
    assert Room(SMALLEST, lambda pid, epoch: None).grant(2, SMALLEST) == (SMALLEST // 2, 0)
    endless = Room(math.inf, lambda pid, epoch: None)
    assert endless.grant(2, math.inf) == (MOST, 0)
    assert endless.enough == ENOUGH


def test_more_items_than_were_reserved() -> None:
    room = Room(100, lambda pid, epoch: None)
    given, _ = room.grant(2, 100)
    room.use(2, given + 7)
    assert room.taken == 0 and not room.may_come
    room.use(3, 5)
    assert room.taken == 0


def test_call_back() -> None:
    asked: list[tuple[int, int]] = []
    room = Room(1000, lambda pid, epoch: asked.append((pid, epoch)))
    room.grant(2, 1000)
    assert not room.is_coming_free
    for tell in room.call_back():
        tell()
    assert asked == [(2, 1)] and room.is_coming_free and room.may_come
    assert room.call_back() == [], "it was asked"
    assert room.grant(2, 500) == (0, 1), "not while it is asked"
    room.answered(2)
    assert room.taken == 0 and not room.may_come and not room.is_coming_free
    assert room.grant(2, 1000)[1] == 1, "a credit of the new epoch"


def test_late_answers() -> None:
    room = Room(1000, lambda pid, epoch: None)
    room.grant(2, 1000)
    for tell in room.call_back():
        tell()
    assert not room.overdue(2, 0) and not room.overdue(3, 1)
    assert room.overdue(2, 1)
    assert room.taken == 0 and not room.is_coming_free
    assert room.may_come, "its items may still come"
    room.answered(2)
    assert not room.may_come
    assert not room.overdue(2, 1)


def test_credits_become_smaller_while_others_call_them_back() -> None:
    room = Room(10_000, lambda pid, epoch: None)
    credits = []
    for _ in range(8):
        credits.append(room.grant(2, 10_000)[0])
        room.call_back()
        room.answered(2)
    assert credits == sorted(credits, reverse=True) and credits[0] == MOST and credits[-1] == 0
    for _ in range(1000):
        given, _ = room.grant(2, 10_000 - room.taken)
        room.use(2, given)
    assert given == MOST, "that was long ago"


# -- Channel ---------------------------------------------------------------------------------------------------------


def test_no_credit_where_there_is_nothing_to_reserve() -> None:
    class Own(Channel):
        pass

    for channel in (Channel(0), Channel(1), Channel(SMALLEST - 1), Channel(100, int), Own(100)):
        assert Producers(channel).reserve(2) == (0, 0)
    closed = Channel(100)
    closed.close()
    assert Producers(closed).reserve(2)[0] == 0


def test_items_and_reserved_room_are_the_capacity() -> None:
    channel = Channel(10)
    others = Producers(channel)
    assert others.reserve(2) == (5, 0)
    for number in range(5):
        channel.put(number, timeout=0)
    thread, found = in_thread(channel.put, 5)
    assert others.told.wait(WAIT) and others.asked == [(2, 1)]
    assert others.put(2, "a", "b")
    assert len(channel) == 7 and thread.is_alive(), "three are still reserved"
    channel.answered(2)
    thread.join(WAIT)
    assert found == [channel]
    assert [channel.take() for _ in range(8)] == [0, 1, 2, 3, 4, "a", "b", 5]


def test_a_put_waits_for_room_that_is_being_called_back() -> None:
    channel = Channel(10)
    others = Producers(channel)
    others.reserve(2)
    for number in range(5):
        channel.put(number)
    thread, found = in_thread(channel.put, 5, timeout=0.01)
    assert others.told.wait(WAIT)
    thread.join(0.1)
    assert thread.is_alive(), "its time is up, but the room may come"
    channel.answered(2)
    thread.join(WAIT)
    assert found == [channel] and len(channel) == 6


def test_a_put_whose_room_was_used_times_out() -> None:
    channel = Channel(10)
    others = Producers(channel)
    others.reserve(2)
    for number in range(5):
        channel.put(number)
    thread, found = in_thread(channel.put, "late", timeout=0.01)
    assert others.told.wait(WAIT)
    thread.join(0.1)
    others.put(2, *range(5))
    channel.answered(2)
    thread.join(WAIT)
    assert isinstance(found[0], TimeoutError) and len(channel) == 10
    assert "late" not in [channel.take() for _ in range(10)] and not channel.isready()


def test_a_put_does_not_wait_where_the_channel_is_full() -> None:
    channel = Channel(8)
    others = Producers(channel)
    given, _ = others.reserve(2)
    others.put(2, *range(given))
    for number in range(8 - given):
        channel.put(number)
    with pytest.raises(TimeoutError):
        channel.put("x", timeout=0.01)
    assert others.asked == [] and len(channel) == 8


def test_who_does_not_answer_loses_its_room() -> None:
    channel = Channel(10)
    others = Producers(channel)
    others.reserve(2)
    for number in range(5):
        channel.put(number)
    thread, found = in_thread(channel.put, 5, timeout=PATIENCE * 20)
    assert others.told.wait(WAIT)
    channel.overdue(2, 1)
    thread.join(WAIT)
    assert found == [channel]
    for number in range(6, 10):
        channel.put(number, timeout=0)
    assert others.put(2, "late"), "what it had put is not lost"
    assert [channel.take() for _ in range(11)] == [*range(10), "late"]


def test_a_taker_gets_what_waits_behind_reserved_room() -> None:
    channel = Channel(8)
    others = Producers(channel)
    given, _ = others.reserve(2)
    for number in range(8 - given):
        channel.put(number)
    putting = Answer()
    channel.offer(Outcome(LOCAL_VALUE, "waits", (), 3), putting, 3)
    for number in range(8 - given):
        assert channel.take(timeout=0) == number
    assert channel.take(timeout=WAIT) == "waits" and len(putting.outcomes) == 1


def test_close_waits_for_what_was_put() -> None:
    channel = Channel(10)
    others = Producers(channel)
    others.reserve(2)
    others.reserve(3)
    channel.close()
    assert [pid for pid, _ in others.asked] == [2, 3] and not channel.isopen()
    assert others.reserve(2) == (0, 1)
    with pytest.raises(ChannelClosedError):
        channel.put(1)
    taking, watching = Answer(), Answer()
    channel.request("take", taking)
    channel.request("wait", watching)
    assert not taking.outcomes, "something may come"
    assert others.put(2, "put before")
    assert taking.value == "put before"
    last = Answer()
    channel.request("take", last)
    channel.answered(2)
    assert not last.outcomes
    channel.answered(3)
    assert isinstance(last.value, ChannelClosedError) and isinstance(watching.value, ChannelClosedError)
    assert not others.put(2, "put afterwards")
    with pytest.raises(ChannelClosedError):
        channel.take()


def test_close_does_not_wait_for_the_dead() -> None:
    channel = Channel(10)
    Producers(channel).reserve(2)
    channel.close()
    thread, found = in_thread(channel.take)
    channel.forget_client(2)
    thread.join(WAIT)
    assert isinstance(found[0], ChannelClosedError)


def test_the_room_of_the_dead_is_free() -> None:
    channel = Channel(10)
    others = Producers(channel)
    others.reserve(2)
    for number in range(5):
        channel.put(number)
    thread, found = in_thread(channel.put, 5)
    assert others.told.wait(WAIT)
    channel.forget_client(2)
    thread.join(WAIT)
    assert found == [channel]


def test_no_credit_while_somebody_waits_for_room() -> None:
    channel = Channel(8)
    others = Producers(channel)
    for number in range(8):
        channel.put(number)
    thread, _ = in_thread(channel.put, 8)
    waits(channel)
    assert others.reserve(2)[0] == 0
    channel.take()
    thread.join(WAIT)


def test_held_answers() -> None:
    channel = Channel(16)  # enough is 4
    others = Producers(channel)
    assert others.reserve(2)[0]
    channel.answered(2)
    for number in range(16):
        channel.put(number)
    said: list[str] = []
    assert hold(channel, lambda: said.append("first"))
    assert not hold(channel, lambda: said.append("second")), "a timer runs"
    for _ in range(3):
        channel.take()
    assert said == []
    channel.take()
    assert said == ["first", "second"], "enough room"
    assert not hold(channel, lambda: said.append("at once")) and said[-1] == "at once"
    channel.put(0)
    assert hold(channel, lambda: said.append("time"))
    channel.let_go()
    assert said[-1] == "time"
    assert hold(channel, lambda: said.append("close"))
    channel.close()
    assert said[-1] == "close"
    assert not hold(channel, lambda: said.append("closed")) and said[-1] == "closed"


def test_takes_by_callback_let_answers_go() -> None:
    channel = Channel(8)  # enough is 2
    others = Producers(channel)
    others.reserve(2)
    channel.answered(2)
    for number in range(8):
        channel.put(number)
    said: list[int] = []
    hold(channel, lambda: said.append(1))
    for number in range(2):
        taken = Answer()
        channel.request("take", taken, 3)
        assert taken.value == number
    assert said == [1]


def test_errors_of_puts_that_waited() -> None:
    channel = Channel(8)
    for number in range(8):
        channel.put(number)
    putting = Answer()
    channel.offer(Outcome(LOCAL_VALUE, 8, (), 3), putting, 3)
    channel.close()
    assert putting.outcomes[0].status == RAISED_HERE
