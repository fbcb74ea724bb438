"""A running map: elements in, outcomes by index out, each one once, whatever is put back and fed again."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import PATIENCE, Office, fresh

from distpool import config, mapruns
from distpool.lazymap import open_entry
from distpool.refs.refs import RAISED_HERE, Outcome


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


def values(run: Any, count: int) -> list[Any]:
    return [open_entry(run.results[index]) for index in range(count)]


def test_scalars_and_objects_travel_alike(office: Office) -> None:
    worker = office.worker(2)
    items: list[Any] = [1, "two", 3.0, None, b"5", [6], {"7": 7}, (8,)]
    run = office.run(items, fresh())
    while worker.inbox:
        office.finish(worker)
    assert values(run, len(items)) == items and run.fed == run.settled == len(items)


@pytest.mark.parametrize("chunksize", [2, 7, 100, 5000])
@pytest.mark.parametrize("kind", ["range", "scalars", "objects"])
def test_an_input_is_cut_into_chunks(office: Office, chunksize: int, kind: str) -> None:
    worker = office.worker(2)
    items: list[Any] = [[number] if kind == "objects" else number for number in range(7, 7507, 3)]
    run = office.run([], fresh(), chunked=True)
    run.feed_cut(range(7, 7507, 3) if kind == "range" else items, chunksize)
    while worker.inbox:
        office.finish(worker)
    assert run.fed == run.settled == -(-len(items) // chunksize)
    assert [value for chunk in values(run, run.fed) for value in chunk] == items


def test_the_first_answers_count_while_a_long_input_is_fed(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of the function, so a worker gets one chunk; when that has been answered, it gets many."""
    clock = itertools.count()
    monkeypatch.setattr(mapruns, "time", SimpleNamespace(monotonic=lambda: next(clock) * 0.0001))
    looks: list[int] = []
    worker = office.worker(2)
    run = office.run([], fresh(), chunked=True)
    before = office.scheduler.loop.glance

    def glance() -> None:
        looks.append(len(worker.inbox))
        if len(looks) == 1:
            office.finish(worker, busy=1e-6)
        before()

    office.scheduler.loop.glance = glance  # type: ignore[method-assign]
    try:
        run.feed_cut([list(range(20)) for _ in range(10_000)], 4)
    finally:
        del office.scheduler.loop.glance  # type: ignore[method-assign]
    assert len(looks) > 1 and looks[0] == 1 and max(looks) > 5, "it was fed while more was being serialised"
    run.close()


def test_chunks_are_cut_smaller_where_elements_are_larger(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock: a chunk takes a moment each from the thousandth element on."""
    now = [0.0]
    run = office.run([], fresh(), chunked=True)
    groups: list[int] = []

    def feed_chunks(chunks: list[list[Any]]) -> None:
        groups.append(len(chunks))
        now[0] += sum(0.01 if chunk[0] >= 1000 else 0.00001 for chunk in chunks)

    run.feed_chunks = feed_chunks  # type: ignore[method-assign]
    monkeypatch.setattr(mapruns, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run.feed_cut(list(range(3000)), 10)
    assert sum(groups) == 300 and groups[:6] == [1, 2, 4, 8, 16, 32] and groups[-3:] == [1, 1, 1]


def test_what_cannot_be_serialised_is_that_elements_outcome(office: Office) -> None:
    worker = office.worker(2)
    run = office.run([[1], threading.Lock(), [3], threading.Lock()], fresh())
    while worker.inbox:
        office.finish(worker)
    assert open_entry(run.results[0]) == [1] and open_entry(run.results[2]) == [3]
    for index in (1, 3):
        with pytest.raises(Exception, match="lock"):
            open_entry(run.results[index])


def test_unordered_says_which_are_ready(office: Office) -> None:
    worker = office.worker(2)
    run = office.run([10, 20], fresh(), ordered=False)
    assert run.ready is not None
    (first, _), (second, _) = worker.inbox
    worker.inbox.clear()
    office.results(worker, (second, "b"), (first, "a"))
    assert list(run.ready) == [1, 0]


def test_waiting(office: Office) -> None:
    worker = office.worker(2)
    run = office.run([1], fresh())
    begin = time.monotonic()
    assert run.wait_for(0, begin + 0.05) is False
    assert 0.04 < time.monotonic() - begin < 5
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda: answers.append(run.wait_for(0, time.monotonic() + PATIENCE))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    office.finish(worker)
    for thread in threads:
        thread.join(PATIENCE)
    assert answers == [True] * 4


def test_a_closed_map_sends_and_keeps_nothing(office: Office) -> None:
    run = office.run(list(range(10)), fresh())
    run.close()
    run.close()
    worker = office.worker(2)
    assert not worker.inbox and run.closed
    run.settle(0, b"late")
    assert not run.results


def test_closing_recalls_what_was_sent_ahead(office: Office) -> None:
    worker = office.worker(2)
    run = office.run(list(range(10)), fresh())
    worker.start()
    run.close()
    worker.wait(lambda: worker.recalls, "asked to give back")
    office.recalled(worker, [sequence for sequence, _ in worker.inbox])
    assert not worker.inbox


def test_fail_rest(office: Office) -> None:
    run = office.run(list(range(5)), fresh())
    run.fail_rest(Outcome(RAISED_HERE, OSError("all"), (), 1))
    assert run.settled == 5 and run.remaining == 0
    with pytest.raises(OSError, match="all"):
        open_entry(run.results[4])


@pytest.mark.parametrize("seed", range(5))
def test_taking_and_putting_back_at_random(seed: int) -> None:
    """The part of the scheduler, played: each element is taken exactly as often as it was put back, plus once."""
    office = Office()
    chance = random.Random(seed)
    total = 500
    run = office.run(list(range(total)) if seed % 2 else [[n] for n in range(total)], fresh())
    queue: Any = office.scheduler._queue
    ended: set[int] = set()
    while run.remaining:
        for entry in run.take(chance.randint(1, 50)):
            keep = chance.randint(0, entry.elements)
            for offset in range(keep):
                index = entry.index + offset
                assert index not in ended
                ended.add(index)
                entry.settle(offset, b"\x80\x05K\x01.")
            if keep < entry.elements:
                entry.put_back(keep, entry.elements - keep, queue)
    assert ended == set(range(total)) and run.settled == total
    office.close()


def test_look_ahead_follows_the_measured_time() -> None:
    assert mapruns.look_ahead(-1.0, 8) == mapruns.look_ahead(0.0, 8) == mapruns.look_ahead(1.0, 8) == 8
    assert mapruns.look_ahead(1e-4, 8) == int(config.WINDOW_SECONDS / 1e-4)
    assert mapruns.look_ahead(1e-9, 8) == mapruns._MOST_AHEAD


def test_a_long_map_is_sent_ahead_in_larger_parts(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(mapruns.time, "monotonic", lambda: now)
    run = office.run([1, 2, 3], fresh())
    assert run.worth() == config.WINDOW_SECONDS, "not begun"
    office.worker(2)
    seen = []
    for _ in range(100):
        now += 0.01
        seen.append(run.worth())
    assert seen == sorted(seen) and seen[0] == config.WINDOW_SECONDS and seen[-1] == config.LONG_WINDOW_SECONDS
    assert any(config.WINDOW_SECONDS < worth < config.LONG_WINDOW_SECONDS for worth in seen)
    run.fed_bytes = (config.OUT_OF_BAND + 1) * run.fed
    assert run.worth() == config.WINDOW_SECONDS, "not so many large ones"


def test_values_that_nobody_will_ask_for_are_let_go_of(office: Office) -> None:
    run = office.run([], fresh())
    run.takes_many = True
    run.disown()
    run.settle_many(0, 3, [10, 20, 30])
    run.settle(3, b"40")
    assert run.results == {0: None, 3: None} and run.settled == 4
