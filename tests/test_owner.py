"""The owner's table: entries come and go with their counts, values are dropped elsewhere, watchers hear once."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from distpool.node.threads import ThreadCache
from distpool.refs.owner import RRID, Owner
from distpool.refs.refs import LOCAL_VALUE, Outcome

PATIENCE = 30.0
REF = RRID(2, 7)


@pytest.fixture
def owner() -> Owner:
    node = SimpleNamespace(threads=ThreadCache("test-owner"), loop=SimpleNamespace(held=[]))
    return Owner(node)  # type: ignore[arg-type]


def value(data: Any = None) -> Outcome:
    return Outcome(LOCAL_VALUE, data, (), 1)


def test_identities_compare_as_pairs() -> None:
    assert RRID(1, 2) == (1, 2) == RRID(*[1, 2]) and len({RRID(1, 2), RRID(1, 2), RRID(2, 1)}) == 2


# -- counts --------------------------------------------------------------------------------------------------------


def test_an_entry_lives_as_long_as_somebody_holds_it(owner: Owner) -> None:
    entry = owner.touch(REF, 3)
    assert owner.touch(REF) is entry and owner.get(REF) is entry and len(owner) == 1
    owner.touch(REF, 3)
    owner.change(REF, 4, 2)
    assert owner.table() == {REF: {3, 4}}
    owner.change(REF, 3, -2)
    owner.change(REF, 4, -1)
    assert owner.table() == {REF: {4}}
    owner.change(REF, 4, -1)
    assert owner.get(REF) is None and not len(owner)


def test_a_release_may_be_quicker_than_its_reference(owner: Owner) -> None:
    """They come on different links."""
    owner.touch(REF, 3)
    owner.change(REF, 4, -1)
    owner.change(REF, 3, -1)
    assert owner.table() == {REF: set()}, "it stays: the count of 4 is still to come"
    owner.change(REF, 4, 1)
    assert owner.get(REF) is None


def test_what_nobody_has_claimed_yet_stays(owner: Owner) -> None:
    owner.touch(REF)
    owner.forget_client(3)
    assert owner.table() == {REF: set()}


def test_the_table_is_a_copy(owner: Owner) -> None:
    owner.touch(REF, 3)
    owner.table()[REF].add(4)
    assert owner.table() == {REF: {3}}


# -- deaths --------------------------------------------------------------------------------------------------------


def test_a_dead_process_holds_nothing(owner: Owner) -> None:
    other = RRID(2, 8)
    owner.touch(REF, 3)
    for pid in (3, 4):
        owner.touch(other, pid)
    owner.change(other, 3, 5)
    owner.forget_client(3)
    assert owner.table() == {other: {4}}


def test_late_news_of_a_dead_process_makes_no_entry(owner: Owner) -> None:
    owner.forget_client(3)
    owner.change(REF, 3, 1)
    owner.touch(REF, 4)
    owner.change(REF, 3, -1)
    assert owner.table() == {REF: {4}}


def test_channels_hear_of_it_if_they_care(owner: Owner) -> None:
    told: list[int] = []

    class Caring:
        def forget_client(self, pid: int) -> None:
            assert not owner._lock._is_owned(), "who has the channel's lock may want this one"
            told.append(pid)

    class Users:
        def __getattr__(self, name: str) -> Any:
            raise KeyError(name)

    owner.touch(REF, 4).channel = Caring()
    owner.touch(RRID(2, 8), 4).channel = Users()
    owner.forget_client(3)
    assert told == [3] and len(owner) == 2


def test_what_is_made_for_a_dead_process_is_nobodys(owner: Owner) -> None:
    """Its factory was slow: the channel was kept for ever."""
    owner.forget_client(3)
    owner.touch(REF, 3).channel = object()
    assert owner.get(REF) is None
    entry = owner.touch(REF, 4)
    assert owner.touch(REF, 3) is entry and owner.table() == {REF: {4}}


def test_a_process_that_dies_while_it_is_counted_is_not_counted(owner: Owner) -> None:
    """Between the look whether it lives and the change it was forgotten, and its reference then kept the value."""
    owner.touch(REF, 4)
    lock, holds, asked = owner._lock, threading.Event(), threading.Event()

    def count() -> None:
        asked.set()
        owner.change(REF, 3, 1)

    def forget() -> None:
        with lock:
            holds.set()
            assert asked.wait(PATIENCE)
            owner.forget_client(3)

    threads = [threading.Thread(target=forget), threading.Thread(target=count)]
    threads[0].start()
    assert holds.wait(PATIENCE)
    threads[1].start()
    for thread in threads:
        thread.join(PATIENCE)
    assert owner.table() == {REF: {4}}


# -- values --------------------------------------------------------------------------------------------------------


class Noticed:
    def __init__(self, ends: list[int], ended: threading.Event) -> None:
        self.ends = ends
        self.ended = ended

    def __del__(self) -> None:
        self.ends.append(threading.get_ident())
        self.ended.set()


@pytest.mark.parametrize("what", ["value", "channel"])
def test_values_end_on_a_library_thread(owner: Owner, what: str) -> None:
    """Their `__del__` is the user's code, and the count may have ended on the leader."""
    ends: list[int] = []
    ended = threading.Event()
    entry = owner.touch(REF, 3)
    if what == "value":
        owner.settle(entry, value(Noticed(ends, ended)))
    else:
        entry.channel = Noticed(ends, ended)
    gc.collect()
    assert not ended.is_set()
    owner.change(REF, 3, -1)
    assert entry.outcome is None and entry.channel is None, "also for those who still have the entry"
    assert ended.wait(PATIENCE) and ends != [threading.get_ident()]


def test_the_first_outcome_counts(owner: Owner) -> None:
    entry, told = owner.touch(REF, 3), []
    owner.watch(entry, told.append)
    assert told == []
    assert owner.settle(entry, value(1)) and not owner.settle(entry, value(2))
    assert told == [value(1)], "once"
    owner.watch(entry, told.append)
    assert told == [value(1)] * 2, "and at once from then on"


def test_a_watcher_may_come_back(owner: Owner) -> None:
    """It is called outside of the lock, and the outcome is there by then."""
    entry = owner.touch(REF, 3)
    told: list[Outcome] = []
    owner.watch(entry, lambda outcome: owner.watch(entry, told.append))
    owner.settle(entry, value(1))
    assert told == [value(1)]


def test_no_watcher_is_forgotten_in_a_race(owner: Owner) -> None:
    for number in range(300):
        entry = owner.touch(RRID(3, number), 3)
        told: list[Outcome] = []
        barrier = threading.Barrier(2)

        def watch() -> None:
            barrier.wait(PATIENCE)
            owner.watch(entry, told.append)

        thread = threading.Thread(target=watch)
        thread.start()
        barrier.wait(PATIENCE)
        assert owner.settle(entry, value(number))
        thread.join(PATIENCE)
        assert told == [value(number)]
