"""The callbacks of channels: each item to one taker, in order, and outside of the lock. Reserved room: `test_room`."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from told import ask, item, put

from distpool.refs.channel import Channel
from distpool.refs.channelcore import Handed
from distpool.refs.refs import RAISED_HERE


def test_items_go_to_takers_in_the_order_of_both() -> None:
    channel = Channel(2)
    takers = [ask(channel)[1] for _ in range(2)]
    for value in "abc":
        put(channel, value)
    assert [taker.values for taker in takers] == [["a"], ["b"]]
    assert ask(channel)[1].values == ["c"] and len(channel) == 0


def test_a_full_channel_makes_putters_wait_in_order() -> None:
    channel = Channel(1)
    told = [put(channel, value)[1] for value in "abc"]
    assert [each.values for each in told] == [[None], [], []]
    assert ask(channel)[1].values == ["a"]
    assert [each.values for each in told] == [[None], [None], []] and len(channel) == 1


def test_a_rendezvous_keeps_nothing() -> None:
    channel = Channel()
    _, putter = put(channel, "a")
    assert putter.values == [] and len(channel) == 0 and channel.isready()
    assert ask(channel)[1].values == ["a"] and putter.values == [None] and not channel.isready()
    _, taker = ask(channel)
    assert put(channel, "b")[1].values == [None] and taker.values == ["b"]


def test_over_to_another_process_a_rendezvous_ends_when_the_value_is_serialised() -> None:
    """Who has put it may change it after that."""
    channel = Channel()
    _, putter = put(channel, ["a"])
    _, taker = ask(channel, pid=5)
    [handed] = taker.outcomes
    assert type(handed) is Handed and handed.data == ["a"] and putter.values == []
    handed.then()
    assert putter.values == [None]


def test_looking_takes_nothing() -> None:
    channel = Channel(2)
    _, early = ask(channel, "fetch")
    _, waits = ask(channel, "wait")
    put(channel, "a")
    assert early.values == ["a"] and waits.values == [None] and len(channel) == 1
    assert ask(channel, "fetch")[1].values == ["a"] and ask(channel, "wait")[1].values == [None]
    [refused] = ask(Channel(), "fetch")[1].outcomes
    assert refused.status == RAISED_HERE and isinstance(refused.data, RuntimeError)


def test_fetchers_and_takers_have_one_order() -> None:
    channel = Channel(2)
    first, second, third = (ask(channel, kind)[1] for kind in ("fetch", "take", "fetch"))
    put(channel, "a")
    assert (first.values, second.values, third.values) == (["a"], ["a"], [])
    put(channel, "b")
    assert third.values == ["b"] and len(channel) == 1


def test_who_has_given_up_gets_nothing() -> None:
    channel = Channel(1)
    gone, nothing = ask(channel)
    late, also = ask(channel)
    for _ in range(2):
        channel.withdraw(gone)
        channel.expire(late)
    put(channel, "a")
    waiting, told = put(channel, "b")
    channel.expire(waiting)
    assert [ask(channel)[1].values for _ in range(2)] == [["a"], []]
    for each in (nothing, also, told):
        assert [type(value) for value in each.values] == [TimeoutError], "told so, once"


class Item:
    pass


@pytest.mark.parametrize("how", ["withdraw", "expire", "forget_client"])
def test_an_item_that_was_given_up_is_let_go_of(how: str) -> None:
    """Its place in the queue kept it, and references in it, until the next take."""
    channel = Channel(1)
    put(channel, "a")
    value = Item()
    found = weakref.ref(value)
    waiter = put(channel, value, pid=5)[0]
    del value
    assert found() is not None
    getattr(channel, how)(5 if how == "forget_client" else waiter)
    assert found() is None
    assert [ask(channel)[1].values for _ in range(2)] == [["a"], []]


def test_who_was_served_cannot_give_up() -> None:
    channel = Channel(1)
    waiter, told = ask(channel)
    put(channel, "a")
    channel.withdraw(waiter)
    channel.expire(waiter)
    assert told.values == ["a"]


def test_what_comes_back_is_the_first_again() -> None:
    channel = Channel(3)
    put(channel, "b")
    channel.restore(item("a"))
    assert [ask(channel)[1].values for _ in range(2)] == [["a"], ["b"]]
    _, taker = ask(channel)
    channel.restore(item("c"))
    assert taker.values == ["c"]


def test_waiters_of_a_dead_process_are_nobodys() -> None:
    channel = Channel(1)
    dead, alive = ask(channel, pid=5)[1], ask(channel, pid=6)[1]
    watcher = ask(channel, "wait", pid=5)[1]
    channel.forget_client(5)
    put(channel, "a")
    assert dead.values == watcher.values == [] and alive.values == ["a"]
    put(channel, "b")
    lost, kept = put(channel, "lost", pid=5)[1], put(channel, "c", pid=6)[1]
    channel.forget_client(5)
    assert [ask(channel)[1].values for _ in range(2)] == [["b"], ["c"]]
    assert lost.values == [] and kept.values == [None]


def test_callbacks_run_outside_of_the_lock() -> None:
    channel = Channel(1)
    seen: list[Any] = []
    channel.request("take", lambda outcome: seen.append((outcome.data, channel.isready(), ask(channel)[0].live)))
    put(channel, "a")
    assert seen == [("a", False, True)]


def test_what_is_asked_for_inside_of_the_lock_is_done_behind_it() -> None:
    """By a `__del__`, which the collector runs in the middle of anything."""
    channel = Channel(2)
    with channel._lock:
        _, taker = ask(channel)
        _, putter = put(channel, "a")
        assert taker.values == putter.values == []
    put(channel, "b")  # whoever has had the lock looks behind letting go of it
    assert taker.values == ["a"] and putter.values == [None] and len(channel) == 1


def test_what_was_put_ahead_may_come_too_late() -> None:
    channel = Channel(1)
    told: list[bool] = []
    channel.arrive(5, [item(1)], told.append)
    channel.take()
    channel.close()
    channel.arrive(5, [item(1)], told.append)
    assert told == [True, False]
