"""Requests that wait for answers: each is ended once, by whoever is first."""

from __future__ import annotations

import threading
from typing import Any

from distpool.node.requests import Requests


class Asker:
    """Notes what it is told."""

    def __init__(self, table: Requests, pid: int) -> None:
        self.told: list[Any] = []
        self.number = table.new(pid, lambda *answer: self.told.append(answer), self.told.append)


def test_an_answer_ends_it_once() -> None:
    table = Requests()
    asker, other = Asker(table, 2), Asker(table, 2)
    assert asker.number != other.number and table.pending(2) == [asker.number, other.number]
    assert table.settle(asker.number, 0, b"data", ["part"])
    assert asker.told == [(0, b"data", ["part"])] and other.told == []
    assert not table.settle(asker.number, 0, b"again", []) and len(asker.told) == 1
    assert table.pending(2) == [other.number] and len(table) == 1


def test_who_has_given_up_hears_nothing() -> None:
    table = Requests()
    asker = Asker(table, 2)
    assert table.forget(asker.number) and not table.forget(asker.number)
    assert not table.settle(asker.number, 0, b"", [])
    table.fail(2, OSError)
    assert asker.told == [] and not len(table)


def test_a_lost_peer_fails_what_waits_for_it_and_nothing_else() -> None:
    table = Requests()
    lost, also, other = Asker(table, 2), Asker(table, 2), Asker(table, 3)
    table.fail(2, lambda: OSError("gone"))
    assert isinstance(lost.told[0], OSError) and isinstance(also.told[0], OSError)
    assert lost.told[0] is not also.told[0], "each has an error of its own: raising one gives it a traceback"
    assert other.told == [] and table.pending(3) == [other.number]


def test_only_those_that_were_asked_by_then_fail() -> None:
    table = Requests()
    answered, lost = Asker(table, 2), Asker(table, 2)
    asked = table.pending(2)
    later = Asker(table, 2)
    table.settle(answered.number, 0, b"", [])
    table.fail(2, OSError, asked)
    assert len(answered.told) == 1 and isinstance(lost.told[0], OSError) and later.told == []


def test_everything_fails() -> None:
    table = Requests()
    askers = [Asker(table, pid) for pid in (2, 3, 2, 4)]
    table.fail_all(lambda: OSError("over"))
    assert [str(asker.told[0]) for asker in askers] == ["over"] * 4 and not len(table)


def test_whoever_is_told_may_ask_anew() -> None:
    """A callback of the lost peer's asks another one, or the same: that is not failed with the old ones."""
    table = Requests()
    again: list[Asker] = []
    table.new(2, lambda *answer: None, lambda error: again.append(Asker(table, 2)))
    table.fail(2, OSError)
    assert again[0].told == [] and table.pending(2) == [again[0].number]


def test_answer_loss_and_giving_up_race() -> None:
    for _ in range(200):
        table = Requests()
        asker = Asker(table, 2)
        barrier = threading.Barrier(3)
        first: list[str] = []

        def settle() -> None:
            barrier.wait()
            if table.settle(asker.number, 0, b"", []):
                first.append("answer")

        def forget() -> None:
            barrier.wait()
            if table.forget(asker.number):
                first.append("forgotten")

        threads = [threading.Thread(target=settle), threading.Thread(target=forget)]
        for thread in threads:
            thread.start()
        barrier.wait()
        table.fail(2, OSError)
        for thread in threads:
            thread.join(30)
        assert len(asker.told) + first.count("forgotten") == 1 and not len(table)


def test_parts_of_an_answer_come_until_they_are_forgotten_or_the_peer_is_lost() -> None:
    table, parts = Requests(), []
    first, second = (table.several(pid, lambda *answer: parts.append(answer)) for pid in (2, 3))
    for number in (1, 2):
        assert table.settle(first, 0, b"part", [number])
    assert parts == [(0, b"part", [1]), (0, b"part", [2])]
    assert table.forget(first) and not table.settle(first, 0, b"late", [])
    table.fail(3, OSError)
    assert not table.settle(second, 0, b"late", []) and len(table) == 0 and len(parts) == 2
