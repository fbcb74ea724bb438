"""Calls are taken from workers that do not answer, through shared memory; none is lost, none runs twice."""

from __future__ import annotations

import collections
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import PATIENCE, FakeWorker, Office, result, together
from faults.helpers import Address, Gate, hold_in_c

from distpool import ClusterExecutor, reclaim
from distpool.wire import messages
from distpool.wire.frames import Kind
from distpool.work import Policy


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


def silent(office: Office) -> tuple[FakeWorker, list[Any], int]:
    """A worker that runs one call, has one more, and will not answer; the futures, and the number of the first."""
    worker = office.worker(2)
    futures = [office.submit(number) for number in range(2)]
    first, _ = worker.start()
    return worker, futures, first


def test_an_idle_worker_gets_what_another_one_cannot_give_back(office: Office) -> None:
    worker, futures, first = silent(office)
    other = office.worker(3)
    other.wait(lambda: other.inbox, "the call that waits behind")
    assert worker.journal.revoked == [(first + 1, first + 1)]
    assert [recall.count > 1000 for recall in worker.recalls] == [False, True]
    office.finish(other)
    assert futures[1].result(PATIENCE) == 1
    office.recalled(worker, [first + 1])  # it answers at last: nobody needs it
    office.recalled(worker, [])
    office.results(worker, (first, "late"))
    assert futures[0].result(PATIENCE) == "late"


def test_a_worker_that_does_not_answer_gets_nothing_more(office: Office) -> None:
    worker, _, first = silent(office)
    other = office.worker(3)
    other.wait(lambda: other.inbox, "the call that waits behind")
    more = [office.submit(number) for number in range(10)]
    for _ in range(11):
        office.finish(other)
    assert [future.result(PATIENCE) for future in more] == list(range(10))
    assert [number for number, _ in worker.inbox] == [first + 1], "what it had before"
    office.recalled(worker, [first + 1])
    office.recalled(worker, [])
    office.results(worker, (first, 0))
    again = [office.submit(number) for number in range(3)]
    worker.wait(lambda: worker.inbox, "it is one of them again")
    while not all(future.done() for future in again):
        for each in (worker, other):
            if each.inbox:
                office.finish(each)


def test_what_a_worker_gives_back_of_itself_is_no_answer(office: Office) -> None:
    worker, futures, first = silent(office)
    other = office.worker(3)
    other.wait(lambda: other.inbox, "the call that waits behind")
    slot = office.slots[worker.pid]
    asked = slot.asked
    office.recalled(worker, [first + 1], unasked=True)  # it has seen that it was revoked
    assert slot.deaf and (slot.asked, slot.answered) == (asked, asked - 2)
    assert [item for _, item in other.inbox] == [1], "not a second time"
    office.recalled(worker, [])
    office.recalled(worker, [])
    assert not slot.deaf
    office.finish(other)
    office.results(worker, (first, 0))
    assert [future.result(PATIENCE) for future in futures] == [0, 1]


def test_an_element_that_only_its_worker_knows_to_be_revoked_runs_elsewhere(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The RECALL was answered in time, and passed over an element that had been revoked."""
    monkeypatch.setattr(reclaim, "_PATIENCE", PATIENCE)
    worker, futures, first = silent(office)
    other = office.worker(3)
    worker.wait(lambda: worker.recalls, "it is asked")
    office.recalled(worker, [])  # as if call first + 1 had begun
    assert not other.inbox
    office.recalled(worker, [first + 1], unasked=True)
    other.wait(lambda: other.inbox, "it is given to the one that idles")
    office.finish(other)
    office.results(worker, (first, 0))
    assert [future.result(PATIENCE) for future in futures] == [0, 1]


def test_a_call_can_be_cancelled_that_its_worker_does_not_give_back(office: Office) -> None:
    worker, futures, first = silent(office)
    begin = time.monotonic()
    assert futures[1].cancel() and futures[1].cancelled()
    assert time.monotonic() - begin < 1.5
    assert worker.journal.revoked == [(first + 1, first + 1)]
    assert futures[0].cancel() is False


def test_results_that_were_not_sent_are_taken_once(office: Office) -> None:
    """The worker had finished a call and not yet sent its result when it went deaf, in the next one."""
    worker = office.worker(2)
    futures = [office.submit(number) for number in range(3)]
    first, _ = worker.start()
    second = worker.start()[0]
    finished = result(first, "finished")
    worker.journal.data = finished
    office.finish(office.worker(3))  # then it idles, and the other one is asked
    assert futures[2].result(PATIENCE) == 2
    assert futures[0].result(PATIENCE) == "finished"
    worker.journal.data = b""
    office.recalled(worker, [])
    office.recalled(worker, [])
    office.results(worker, (first, "again"), (second, "second"))
    assert [future.result(PATIENCE) for future in futures] == ["finished", "second", 2]
    assert office.slots[2].load == 0 and not office.slots[2].early


def test_a_call_whose_value_comes_with_one_that_was_taken_has_no_time_limit_any_more(office: Office) -> None:
    worker, slot = office.worker(2), office.slots[2]
    first = office.submit(1)
    sequence, _ = worker.start()
    slot.early.add(sequence)  # taken from the journal
    slot.find(sequence)
    slot.load -= 1
    timed = office.submit(2, policy=Policy(timeout=1000.0))
    assert slot._clocks and not first.done()
    office.frame(worker, Kind.RESULTS, messages.RESULTS.pack(0, 0.0, 0), together([(sequence, 1), (sequence + 1, 2)]))
    assert timed.result(PATIENCE) == 2 and not slot._clocks and slot.usable


def test_a_death_after_that(office: Office) -> None:
    worker = office.worker(2)
    futures = [office.submit(number) for number in range(2)]
    first = worker.start()[0]
    worker.start()
    worker.journal.data = result(first, "finished")
    office.worker(3)
    assert futures[0].result(PATIENCE) == "finished"
    assert office.lost(worker) == [True]
    assert isinstance(futures[1].exception(PATIENCE), OSError)
    assert futures[0].result() == "finished"


# -- real workers ------------------------------------------------------------------------------------------------


def record(path: str, number: int) -> int:
    """Say in a file that this call has run: appends of a few bytes are whole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{number}\n".encode())
    os.close(descriptor)
    return number


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        os.sched_yield()


def test_nothing_runs_twice_when_the_worker_comes_back(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    with ClusterExecutor(2) as executor, closing(Gate()) as gate:
        for number in range(300):  # known to be short, so that many are sent ahead
            executor.submit(record, log, -number - 1).result(PATIENCE)
        futures = [executor.submit(record, log, number) for number in range(20)]
        stuck = executor.submit(hold_in_c, gate.address)
        futures += [executor.submit(record, log, number) for number in range(20, 400)]
        assert [future.result(PATIENCE) for future in futures] == list(range(400))
        assert not stuck.done(), "they waited behind the call in C"
        gate.arrival().release()
        stuck.result(PATIENCE)
        assert [executor.submit(record, log, number).result(PATIENCE) for number in range(400, 450)] == [
            *range(400, 450)
        ]
    runs = collections.Counter(int(line) for line in Path(log).read_text().split())
    assert set(runs.values()) == {1} and len(runs) == 750


def test_elements_of_maps(tmp_path: Path) -> None:
    log = str(tmp_path / "log")

    def element(address: Address, number: int) -> int:
        if number == 700:
            hold_in_c(address)
        return record(log, number)

    with ClusterExecutor(2) as executor, closing(Gate()) as gate:
        results: list[int] = []
        done = threading.Event()

        def consume() -> None:
            results.extend(executor.imap_unordered(partial(element, gate.address), range(2000), buffersize=2000))
            done.set()

        threading.Thread(target=consume, daemon=True).start()
        arrival = gate.arrival()
        until(lambda: len(results) >= 1999)
        assert 700 not in results and not done.is_set()
        arrival.release()
        assert done.wait(PATIENCE)
        assert sorted(results) == list(range(2000))
    runs = collections.Counter(int(line) for line in Path(log).read_text().split())
    assert set(runs.values()) == {1} and len(runs) == 2000


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_stopped_and_continued_at_random(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    with ClusterExecutor(2) as executor:
        until(lambda: executor.submit(abs, 1).result(PATIENCE) and len(executor.workers) == 2)
        ospids = [executor.options(pids=pid).submit(os.getpid).result(PATIENCE) for pid in executor.workers]
        futures = []
        for round_number in range(12):
            victim = ospids[round_number % len(ospids)]
            futures += [executor.submit(record, log, len(futures) + number) for number in range(100)]
            os.kill(victim, signal.SIGSTOP)
            futures += [executor.submit(record, log, len(futures) + number) for number in range(100)]
            threading.Event().wait(0.1)  # for some rounds long enough to be taken for deaf, for others not
            os.kill(victim, signal.SIGCONT)
        assert [future.result(PATIENCE) for future in futures] == list(range(2400))
    runs = collections.Counter(int(line) for line in Path(log).read_text().split())
    assert set(runs.values()) == {1} and len(runs) == 2400


def test_the_worker_dies_while_it_is_deaf(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    with ClusterExecutor(2) as executor, closing(Gate()) as gate:
        for number in range(300):
            executor.submit(record, log, -number - 1).result(PATIENCE)
        stuck = executor.submit(hold_in_c, gate.address)
        futures = [executor.submit(record, log, number) for number in range(100)]
        gate.arrival()
        assert [future.result(PATIENCE) for future in futures] == list(range(100))
        for process in list((executor._processes or {}).values()):
            process.kill()
        error = stuck.exception(PATIENCE)
        assert error is not None and error.maybe_ran  # type: ignore[attr-defined]
        assert executor.submit(record, log, 100).result(PATIENCE) == 100
    runs = collections.Counter(int(line) for line in Path(log).read_text().split())
    assert set(runs.values()) == {1}
