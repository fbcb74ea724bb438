"""Which calls a worker gives back: the listed ones, or the last; those that wait first, and nothing that has begun."""

from __future__ import annotations

import collections

from distpool.node.givingback import give_up, last_calls, listed_calls
from distpool.node.spans import Item
from distpool.wire.messages import CHUNK, ONE, SPAN


def record(sequence: int, elements: int = 1, flags: int = SPAN, index: int = 0) -> Item:
    item = Item(sequence, 1, elements, flags, b"", [])
    item.index = index
    return item


def one(sequence: int) -> Item:
    return record(sequence, flags=ONE)


def sequences(inbox: collections.deque[Item]) -> list[int]:
    return [item.sequence for item in inbox]


# -- listed ones ---------------------------------------------------------------------------------------------------


def test_listed_single_calls_leave_the_inbox() -> None:
    inbox = collections.deque([one(1), one(2), one(3)])
    assert listed_calls(inbox, [], {1, 3, 9}) == [[1, 1], [3, 1]]
    assert sequences(inbox) == [2]


def test_a_single_call_that_runs_stays() -> None:
    running = one(1)
    assert listed_calls(collections.deque(), [running], {1}) == []


def test_elements_out_of_the_middle_of_records() -> None:
    waiting, running = record(10, 5), record(20, 5, index=2)
    inbox = collections.deque([waiting])
    assert listed_calls(inbox, [running], {10, 12, 21, 22, 23, 24}) == [[10, 1], [12, 1], [23, 1], [24, 1]]
    assert waiting.dropped == {0, 2} and running.dropped == {3, 4}
    assert list(inbox) == [waiting], "what is left of it runs"


def test_asked_twice_an_element_is_given_once() -> None:
    waiting = record(10, 5)
    inbox = collections.deque([waiting])
    assert listed_calls(inbox, [], {11}) == [[11, 1]]
    assert listed_calls(inbox, [], {11}) == []


def test_elements_behind_a_cut_are_not_there_any_more() -> None:
    waiting = record(10, 5)
    waiting.stop = 3
    assert listed_calls(collections.deque([waiting]), [], {12, 13, 14}) == [[12, 1]]


def test_a_chunk_goes_as_a_whole_by_its_first_number() -> None:
    inbox = collections.deque([record(10, 5, CHUNK)])
    assert listed_calls(inbox, [], {12}) == [] and len(inbox) == 1
    assert listed_calls(inbox, [], {10}) == [[10, 5]] and not inbox


# -- the last ones -------------------------------------------------------------------------------------------------


def test_the_last_calls_that_wait_are_taken_from_the_end() -> None:
    inbox = collections.deque([one(1), one(2), one(3)])
    assert last_calls(inbox, [], 2) == [[3, 1], [2, 1]]
    assert sequences(inbox) == [1]


def test_a_record_at_the_end_is_cut() -> None:
    waiting = record(10, 8)
    inbox = collections.deque([one(1), waiting])
    assert last_calls(inbox, [], 3) == [[15, 3]]
    assert waiting.stop == 5 and len(inbox) == 2
    assert last_calls(inbox, [], 6) == [[10, 5], [1, 1]] and not inbox, "what was cut before does not count again"


def test_dropped_elements_are_not_given_twice() -> None:
    waiting = record(10, 8)
    inbox = collections.deque([waiting])
    listed_calls(inbox, [], {14})
    assert last_calls(inbox, [], 5) == [[13, 1], [15, 3]]


def test_a_chunk_is_not_cut() -> None:
    inbox = collections.deque([one(1), record(10, 8, CHUNK)])
    assert last_calls(inbox, [], 3) == [[10, 8]]
    assert sequences(inbox) == [1], "more than asked for, so nothing else"


def test_running_records_give_what_the_inbox_lacks() -> None:
    running = [record(20, 6, index=1), one(30), record(40, 4, index=3), record(50, 6, index=0)]
    inbox = collections.deque([one(60)])
    assert last_calls(inbox, running, 7) == [[60, 1], [22, 4], [54, 2]]
    assert [item.stop for item in running] == [2, 1, 4, 4]


def test_a_running_chunk_or_call_gives_nothing() -> None:
    running = [record(20, 6, CHUNK), one(30)]
    assert last_calls(collections.deque(), running, 5) == []
    assert running[0].stop == 6


def test_nothing_is_taken_when_nothing_is_asked_for() -> None:
    inbox, running = collections.deque([one(1)]), [record(20, 6)]
    assert last_calls(inbox, running, 0) == [] and len(inbox) == 1 and running[0].stop == 6


# -- all of them ---------------------------------------------------------------------------------------------------


def test_who_has_to_go_lets_nothing_begin() -> None:
    inbox = collections.deque([one(9), record(10, 5)])
    running = [record(1, 5, index=2), record(20, 5, flags=CHUNK), one(30)]
    give_up(inbox, running)
    assert not inbox
    assert [item.stop for item in running] == [3, 5, 1], "what runs, and only that"
