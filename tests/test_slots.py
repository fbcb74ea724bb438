"""One worker's record: numbers, windows, functions sent and forgotten, and what is unfinished when it goes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import PATIENCE, Office, fresh

from distpool import config, slots
from distpool.wire import messages
from distpool.wire.frames import Kind


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


def test_room_follows_the_measured_time(office: Office) -> None:
    office.worker(2)
    slot = office.slots[2]
    assert slot.room(-1.0) == 1, "unknown: nothing is sent ahead"
    assert slot.room(10.0) == 1 and slot.room(0.01) == 2
    assert slot.room(1e-4) == int(config.WINDOW_SECONDS / 1e-4)
    assert slot.room(0.0) == slot.room(1e-12) > 100
    assert slot.room(0.004) == 2 == slot.room(0.004, 2 * config.WINDOW_SECONDS) - 2, "a map that has run for a while"
    assert slot.room(0.004, config.LONG_WINDOW_SECONDS) == 24 and slot.room(0.06, config.LONG_WINDOW_SECONDS) == 1
    slot.load = 1
    assert slot.room(-1.0) == 0 and slot.room(0.01) == 1
    slot.blocked = 3
    assert slot.room(-1.0) == 3
    for name in ("retiring", "gone"):
        setattr(slot, name, True)
        assert slot.room(-1.0) == 0 and not slot.usable
        setattr(slot, name, False)
    slot.load = 0


def test_the_share_of_a_worker(office: Office) -> None:
    office.worker(2)
    slot = office.slots[2]
    run = office.run([], fresh())
    run.timing.mean = mean = 1e-4
    window = int(config.WINDOW_SECONDS / mean)
    assert slot.share(run, 10 * window, 2, 2) == window, "there is more than enough"
    assert slot.share(run, window, 2, 2) == window // 2 == slot.share(run, window, 1, 2), "half a window at once"
    assert slot.share(run, 20, 1, 2) == 20, "nobody else has room: not one small frame after another"
    assert slot.share(run, 20, 2, 2) == 10 and slot.share(run, 20, 4, 4) == 5
    slot.load = window // 2
    assert slot.share(run, 20, 1, 2) == 5, "it has half a window: what is left may go elsewhere"
    slot.load = window // 2 + 2
    assert slot.share(run, 10 * window, 1, 2) == 0, "enough for now"
    slot.load, run.timing.mean = 0, 0.01
    assert slot.share(run, 20, 1, 2) == 2
    run.timing.mean = 1e-5
    assert slot.share(run, 8, 2, 2) == 4 and slot.share(run, 5, 2, 2) == 4, "tiny ones travel together"
    run.timing.mean = -1.0
    assert slot.share(run, 20, 1, 2) == 1, "nothing is known of them"


def test_a_limited_worker_has_room_for_what_is_left(office: Office) -> None:
    worker = office.worker(2, max_tasks=3)
    slot = office.slots[2]
    assert slot.room(1e-6) == 3
    function = fresh()
    for number in range(5):
        office.submit(number, function)
    office.finish(worker)
    assert slot.exhausted and slot.room(1e-6) == 0 and len(worker.inbox) == 2


def test_functions_are_sent_once_and_forgotten_when_there_are_many(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_MAX_FUNCTIONS", 8)
    worker = office.worker(2)
    functions = [fresh() for _ in range(30)]
    for _ in range(3):
        for function in functions:
            future = office.submit(1, function)
            office.finish(worker)  # FakeWorker fails when a call comes whose function it does not have
            assert future.result(0) == 1
    assert len(worker.functions) <= 9 and Kind.FORGET in worker.kinds


def test_who_forgets_a_function_is_not_asked_to_pass_it_on(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_MAX_FUNCTIONS", 2)
    monkeypatch.setattr(slots, "WORTH", -1)
    told: dict[str, list[Any]] = {"sent": [], "forgotten": []}
    spreading = SimpleNamespace(
        is_worth_it=lambda: True,
        send=lambda function, pid, link: told["sent"].append((function.number, pid)),
        forgotten=lambda numbers, pid: told["forgotten"].extend((number, pid) for number in numbers),
    )
    worker = office.worker(2)
    worker.group = SimpleNamespace(node=SimpleNamespace(spreading=lambda: spreading))
    for _ in range(4):
        office.submit(1, fresh())
        office.finish(worker)
    forgotten = told["forgotten"]
    assert forgotten and sorted(forgotten) == sorted(told["sent"][: len(forgotten)])


def test_functions_in_use_are_kept(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_MAX_FUNCTIONS", 2)
    worker = office.worker(2)
    office.frame(worker, Kind.BLOCKED, messages.Blocked(20).pack())
    futures = [office.submit(number, fresh()) for number in range(10)]
    assert len(worker.inbox) == 10 and len(worker.functions) == 10
    while worker.inbox:
        office.finish(worker)
    assert [future.result(0) for future in futures] == list(range(10))


def unfinished(office: Office, pid: int = 2) -> list[tuple[int, int, bool]]:
    found: list[tuple[Any, int, int, bool]] = office.slots[pid].unfinished()
    return [(first, count, ran) for _, first, count, ran in found]


def span(office: Office, journal: bool) -> Any:
    worker = office.worker(2, journal)
    function = fresh()
    office.node.encoder.encode(function).mean = 1e-6
    office.run(list(range(10)), function)
    assert sum(worker.frames[0]) >= 3
    return worker


def test_unfinished_of_a_span_with_a_journal(office: Office) -> None:
    worker = span(office, journal=True)
    sent = len(worker.inbox)
    done, _ = worker.start()
    office.results(worker, (done, 0))
    worker.start()
    parts = unfinished(office)
    assert parts[0] == (1, 1, True) and not any(ran for _, _, ran in parts[1:])
    assert sum(count for _, count, _ in parts) == sent - 1
    assert office.slots[2].load == 0 and unfinished(office) == []


def test_unfinished_without_a_journal(office: Office) -> None:
    worker = span(office, journal=False)
    done, _ = worker.start()
    office.results(worker, (done, 0))
    assert [part for part in unfinished(office) if part[2]] == [(1, 1, True)]


def test_nothing_started_nothing_ran(office: Office) -> None:
    span(office, journal=True)
    assert not any(ran for _, _, ran in unfinished(office))


def answered_early(office: Office, journal: bool) -> Any:
    """A span of which the first element waits, and the second and third, run meanwhile, have been answered."""
    worker = span(office, journal)
    worker.start()
    second, _ = worker.start()
    third, _ = worker.start()
    office.results(worker, (third, "third"))
    office.results(worker, (second, "second"))
    return worker


def test_elements_that_are_answered_before_earlier_ones(office: Office) -> None:
    worker = office.worker(2)
    function = fresh()
    office.node.encoder.encode(function).mean = 1e-6
    run = office.run(list(range(10)), function)
    first, argument = worker.start()
    while worker.inbox:
        office.finish(worker)
    assert run.settled == 9 and office.slots[2].load == 1
    office.results(worker, (first, argument))
    assert run.settled == 10
    slot = office.slots[2]
    assert (slot.load, slot.inflight) == (0, {})


@pytest.mark.parametrize("journal", [True, False])
def test_unfinished_leaves_out_what_was_answered_early(office: Office, journal: bool) -> None:
    answered_early(office, journal)
    parts = unfinished(office)
    assert parts[0] == (0, 1, True)
    assert parts[1][0] == 3 and not any(ran for _, _, ran in parts[1:])


def test_without_a_journal_those_that_may_run_beside_a_waiting_task_count_as_running(office: Office) -> None:
    worker = answered_early(office, False)
    office.frame(worker, Kind.BLOCKED, messages.Blocked(1).pack())
    assert [part for part in unfinished(office) if part[2]] == [(0, 1, True), (3, 1, True)]


@pytest.mark.parametrize(
    ("begin", "end", "without", "expected"),
    [
        (0, 3, (), [(0, 3)]),
        (2, 2, (), []),
        (0, 5, (0, 4), [(1, 3)]),
        (1, 6, (3, 2, 9, 0), [(1, 1), (4, 2)]),
    ],
)
def test_gaps(begin: int, end: int, without: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert list(slots._gaps(begin, end, without)) == expected


def test_a_call_that_cannot_be_sent_fails_alone(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is left to read what its worker, on another host, cannot map."""

    def no_descriptor(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(slots, "map_private", no_descriptor)
    before = office.node.segments.bytes_in_use  # of other tests in this process
    lease = office.node.segments.put(b"x" * 400_000)
    if lease is None:
        pytest.skip("no shared memory here")
    futures = [office.submit(number) for number in range(4)]
    for index in (1, 3):
        futures[index]._call.buffers = [lease.retain() or lease]  # type: ignore[union-attr,func-returns-value]
    lease.release()
    worker = office.worker(2)
    for _ in range(2):
        worker.wait(lambda: worker.inbox, "sent")
        office.finish(worker)
    assert [futures[index].result(PATIENCE) for index in (0, 2)] == [0, 2]
    assert all(isinstance(futures[index].exception(PATIENCE), OSError) for index in (1, 3))
    slot = office.slots[2]
    assert slot.load == 0 and not slot.inflight and office.node.segments.bytes_in_use <= before
