"""The scheduler with workers that the test plays: who gets what, and what becomes of it when workers go."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from typing import Any

import pytest
from fakes import PATIENCE, FakeWorker, Office, fresh, result, together

from distpool import config, mapruns, scheduling
from distpool.lazymap import open_entry
from distpool.refs.refs import RAISED_HERE, Outcome
from distpool.wire import messages
from distpool.wire.frames import Kind
from distpool.work import Policy


@pytest.fixture(params=[False, True], ids=["records", "plain"])
def office(request: pytest.FixtureRequest) -> Iterator[Office]:
    made = Office()
    made.plain = request.param
    yield made
    made.close()


def items(worker: FakeWorker) -> list[Any]:
    return [item for _, item in worker.inbox]


def timed(office: Office, seconds: float) -> Callable[[Any], Any]:
    """A function whose calls are known to take so long."""
    function = fresh()
    office.node.encoder.encode(function).mean = seconds
    return function


# -------------------------------------------------------------------------------------------------------------- windows


def test_calls_wait_until_a_worker_comes(office: Office) -> None:
    futures = [office.submit(number) for number in range(3)]
    assert not any(future.running() or future.done() for future in futures)
    worker = office.worker(2)
    assert items(worker) == [0, 1]
    assert office.finish(worker) == 0 and futures[0].result(0) == 0
    assert items(worker) == [1, 2]
    assert worker.kinds[0] == Kind.FUNCTION and worker.kinds.count(Kind.FUNCTION) == 1


def test_unknown_calls_are_spread_evenly(office: Office) -> None:
    workers = [office.worker(pid) for pid in (2, 3, 4)]
    function = fresh()
    for number in range(12):
        office.submit(number, function)
    assert [len(worker.inbox) for worker in workers] == [2, 2, 2], "one runs, one waits"


def test_long_calls_are_not_sent_ahead(office: Office) -> None:
    workers = [office.worker(pid) for pid in (2, 3)]
    function = timed(office, 1.0)
    for number in range(6):
        office.submit(number, function)
    assert [len(worker.inbox) for worker in workers] == [1, 1]


def test_short_calls_fill_a_window_and_are_shared(office: Office) -> None:
    function = timed(office, 1e-5)
    for number in range(1000):
        office.submit(number, function)
    workers = [office.worker(pid) for pid in (2, 3)]
    window = int(config.WINDOW_SECONDS / 1e-5)
    assert all(2 < len(worker.inbox) <= window for worker in workers)
    assert max(len(worker.frames) for worker in workers) < 50, "many calls in one frame"


def test_the_last_calls_are_shared_out(office: Office) -> None:
    """With a handful left, one worker must not take all."""
    workers = [office.worker(pid) for pid in (2, 3)]
    run = office.run(list(range(8)), timed(office, 1e-5))
    assert run.remaining == 0 and sorted(len(worker.inbox) for worker in workers)[0] >= 2


def test_what_a_worker_gets_now_is_one_frame(office: Office) -> None:
    function = timed(office, 1e-5)
    for number in range(100):
        office.submit(number, function)
    worker = office.worker(2)
    assert len(worker.frames) == 1 and len(worker.inbox) == 100


def test_what_all_workers_get_of_a_map_is_one_frame_each(office: Office) -> None:
    workers = [office.worker(pid) for pid in (2, 3, 4)]
    run = office.run(list(range(300)), timed(office, 1e-5))
    assert run.remaining == 0
    assert [(len(worker.frames), len(worker.inbox)) for worker in workers] == [(1, 100)] * 3


def test_measured_time_opens_the_window(office: Office) -> None:
    worker = office.worker(2)
    run = office.run(list(range(500)), fresh())
    assert len(worker.inbox) <= 2
    run.function.mean = -1.0  # nothing is known of it
    for _ in range(3):
        office.finish(worker, busy=1e-6)
    assert len(worker.inbox) > 50
    while worker.inbox:
        office.finish(worker, busy=1e-6)
    assert [open_entry(run.results[index]) for index in range(500)] == list(range(500))


def test_a_blocked_task_makes_room_for_one_more(office: Office) -> None:
    worker = office.worker(2)
    function = fresh()
    for number in range(6):
        office.submit(number, function)
    assert len(worker.inbox) == 2
    office.frame(worker, Kind.BLOCKED, messages.Blocked(1).pack())
    assert len(worker.inbox) == 3
    office.frame(worker, Kind.BLOCKED, messages.Blocked(-1).pack())
    office.finish(worker)
    assert len(worker.inbox) == 2


def test_a_task_that_blocks_while_nothing_waits_makes_room_for_what_comes(office: Office) -> None:
    worker = office.worker(2)
    function = fresh()
    function.mean = 1.0
    office.submit(1, function)
    office.submit(2, function)
    worker.start()
    for number in (2, 3):
        office.frame(worker, Kind.BLOCKED, messages.Blocked(1).pack())
        if number == 3:
            office.submit(3, function)
        assert worker.start()[1] == number


# ------------------------------------------------------------------------------------------------------------- outcomes


def test_values_errors_and_strangers(office: Office) -> None:
    worker = office.worker(2)
    good, bad = office.submit(1), office.submit(2)
    first, second = (sequence for sequence, _ in worker.inbox)
    office.results(worker, (999, "nobody asked"), (second, KeyError("k")), (first, "v"), (first, "again"))
    assert good.result(0) == "v" and isinstance(bad.exception(0), KeyError)
    assert office.slots[2].done == 1 and office.slots[2].failed == 1 and office.slots[2].load == 0


def test_callbacks_run_off_the_leader(office: Office) -> None:
    worker = office.worker(2)
    future = office.submit(1)
    seen: list[Any] = []
    called = threading.Event()

    def callback(done: Any) -> None:
        seen.append((done.result(), office.node.loop.leads))
        called.set()

    future.add_done_callback(callback)
    office.finish(worker)
    assert called.wait(PATIENCE) and seen == [(1, False)]


# ---------------------------------------------------------------------------------------------------------------- steal


def test_an_idle_worker_gets_what_waits_behind_a_busy_one(office: Office) -> None:
    busy = office.worker(2)
    function = fresh()
    futures = [office.submit(number, function) for number in range(3)]
    assert items(busy) == [0, 1]
    busy.start()
    idle = office.worker(3)
    assert items(idle) == [2]
    office.finish(idle)
    busy.wait(lambda: busy.recalls, "it is asked for what it has not started")
    assert busy.recalls[0].count >= 1 and not busy.recalls[0].sequences
    sequence, item = busy.inbox[0]
    office.recalled(busy, [sequence])
    idle.wait(lambda: idle.inbox, "the idle one gets it")
    assert item == 1 and items(idle) == [1]
    office.finish(idle)
    assert futures[1].result(0) == 1 and futures[2].result(0) == 2


def test_a_worker_that_has_nothing_to_give_is_not_asked_for_ever(office: Office) -> None:
    busy = office.worker(2)
    function = fresh()
    [office.submit(number, function) for number in range(3)]
    busy.start()
    idle = office.worker(3)
    office.finish(idle)
    busy.wait(lambda: busy.recalls, "asked")
    for _ in range(5):
        office.recalled(busy, [])
    pause = threading.Event()
    before = len(busy.recalls)
    pause.wait(0.1)
    assert len(busy.recalls) - before <= 2


# --------------------------------------------------------------------------------------------------------------- cancel


def test_cancel_of_what_waits(office: Office) -> None:
    worker = office.worker(2)
    futures = [office.submit(number) for number in range(5)]
    assert futures[3].cancel() and futures[3].cancelled()
    assert not worker.recalls
    seen = [office.finish(worker) for _ in range(4)]
    assert seen == [0, 1, 2, 4] and not worker.inbox


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(function()), daemon=True)
    thread.start()
    return thread, answers


def test_cancel_of_what_was_sent_ahead(office: Office) -> None:
    worker = office.worker(2)
    futures = [office.submit(number) for number in range(3)]
    running, _ = worker.start()
    ahead = worker.inbox[0][0]
    assert futures[0].cancel() is False and not worker.recalls, "known to run: no need to ask"
    thread, answers = in_thread(futures[1].cancel)
    worker.wait(lambda: worker.recalls, "asked")
    assert worker.recalls[0].sequences == [ahead]
    office.recalled(worker, [ahead], [ahead])
    thread.join(PATIENCE)
    assert answers == [True] and futures[1].cancelled()
    assert items(worker) == [2], "there is room again"
    office.results(worker, (running, "v"))
    assert futures[0].result(0) == "v"


def test_cancel_that_comes_too_late(office: Office) -> None:
    worker = office.worker(2, journal=False)
    future = office.submit(1)
    sequence = worker.inbox[0][0]
    thread, answers = in_thread(future.cancel)
    worker.wait(lambda: worker.recalls, "asked")
    office.results(worker, (sequence, "v"))
    office.recalled(worker, [], [sequence])
    thread.join(PATIENCE)
    assert answers == [False] and future.result(0) == "v"


def test_ctrl_c_does_not_come_in_the_middle_of_a_cancel(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dispatch that found the lock taken is left to the one who has it: calls waited for ever."""
    worker = office.worker(2)
    futures = [office.submit(number) for number in range(3)]
    ask, asked = office.scheduler._recalls.ask, []

    def struck(calls: list[Any]) -> Any:
        office.scheduler._wanted = True
        signal.raise_signal(signal.SIGINT)
        asked.append(ask(calls))
        return asked[0]

    monkeypatch.setattr(office.scheduler._recalls, "ask", struck)
    with pytest.raises(KeyboardInterrupt):
        futures[1].cancel()
    assert len(asked) == 1 and not office.scheduler._wanted
    assert len(worker.recalls) == 1


def test_cancel_without_an_answer_ends(office: Office) -> None:
    """A worker that keeps the interpreter lock. Its late answer sends the call on."""
    worker = office.worker(2, journal=False)
    future = office.submit(1)
    sequence = worker.inbox[0][0]
    begin = time.monotonic()
    assert future.cancel() is False and not future.done()
    assert time.monotonic() - begin < 10
    office.recalled(worker, [sequence], [sequence])
    worker.wait(lambda: worker.inbox, "it is sent again")
    office.finish(worker)
    assert future.result(0) == 1


def test_several_threads_cancel_one_call(office: Office) -> None:
    worker = office.worker(2, journal=False)  # else it is read after 50 ms, before the last thread has asked
    futures = [office.submit(number) for number in range(2)]
    worker.start()
    sequence = worker.inbox[0][0]
    pairs = [in_thread(futures[1].cancel) for _ in range(3)]
    worker.wait(lambda: len(worker.recalls) == 3, "each asks")
    begin = time.monotonic()
    for _ in range(3):
        office.recalled(worker, [sequence] if worker.inbox else [], [sequence])
    for thread, answers in pairs:
        thread.join(PATIENCE)
        assert answers == [True]
    assert time.monotonic() - begin < 1.5, "nobody waited for an answer that another one got"


def test_cancelling_calls_of_two_workers_with_the_same_number(office: Office) -> None:
    workers = [office.worker(pid, journal=False) for pid in (2, 3)]
    futures = [office.submit(number) for number in range(2)]
    sequences = [worker.inbox[0][0] for worker in workers]
    assert sequences[0] == sequences[1], "numbers count per link"
    pairs = [in_thread(future.cancel) for future in futures]
    begin = time.monotonic()
    for worker, sequence in zip(workers, sequences, strict=True):
        worker.wait(lambda worker=worker: worker.recalls, "asked")
        office.recalled(worker, [sequence], [sequence])
    for thread, answers in pairs:
        thread.join(PATIENCE)
        assert answers == [True]
    assert time.monotonic() - begin < 1.5


def test_a_worker_that_dies_while_it_is_asked(office: Office) -> None:
    worker = office.worker(2)
    futures = [office.submit(number) for number in range(2)]
    worker.start()
    thread, answers = in_thread(futures[1].cancel)
    worker.wait(lambda: worker.recalls, "asked")
    office.lost(worker)
    thread.join(PATIENCE)
    assert answers == [True] and futures[1].cancelled()
    assert isinstance(futures[0].exception(0), OSError)


def test_cancel_waiting(office: Office) -> None:
    worker = office.worker(2)
    futures = [office.submit(number) for number in range(30)]
    run = office.run([1, 2, 3], fresh())
    pinned = office.submit(7, policy=Policy(pids=frozenset([2])))
    running, _ = worker.start()
    ahead = worker.inbox[0][0]
    thread, _ = in_thread(office.scheduler.cancel_waiting)
    worker.wait(lambda: worker.recalls, "asked")
    assert len(worker.recalls) == 1
    office.recalled(worker, [ahead], [ahead])
    thread.join(PATIENCE)
    assert not futures[0].done() and all(future.cancelled() for future in [*futures[1:], pinned])
    office.results(worker, (running, 5))
    office.on_leader(lambda: None)
    for index in range(3):
        with pytest.raises(CancelledError):
            open_entry(run.results[index])
    assert not worker.inbox and futures[0].result(0) == 5


# ----------------------------------------------------------------------------------------------------------------- lost


def test_a_death_costs_the_call_that_ran(office: Office) -> None:
    """The journal says which one that was, and has results that were never sent."""
    victim = office.worker(2)
    function = timed(office, 1e-3)
    futures = [office.submit(number, function) for number in range(4)]
    first, _ = victim.start()
    victim.journal.data += result(first, "from the journal")
    victim.start()
    heir = office.worker(3)
    asked = office.lost(victim)
    assert asked == [True]
    assert futures[0].result(0) == "from the journal" and isinstance(futures[1].exception(0), OSError)
    assert items(heir) == [2, 3]
    office.finish(heir), office.finish(heir)
    assert [future.result(0) for future in futures[2:]] == [2, 3]


def test_a_death_without_a_journal_costs_the_first_unanswered_call(office: Office) -> None:
    victim = office.worker(2, journal=False)
    function = timed(office, 1e-3)
    futures = [office.submit(number, function) for number in range(3)]
    office.finish(victim)
    assert office.lost(victim) == [True]
    heir = office.worker(3)
    assert isinstance(futures[1].exception(0), OSError)
    assert items(heir) == [2]


def test_a_death_before_anything_started_costs_nothing(office: Office) -> None:
    victim = office.worker(2)
    futures = [office.submit(number) for number in range(2)]
    assert office.lost(victim) == []
    heir = office.worker(3)
    assert items(heir) == [0, 1], "in their order"
    office.finish(heir), office.finish(heir)
    assert [future.result(0) for future in futures] == [0, 1]


def test_a_death_inside_a_span(office: Office) -> None:
    victim = office.worker(2)
    run = office.run(list(range(40)), timed(office, 1e-5))
    done, _ = victim.start()
    office.results(victim, (done, 0))
    victim.start()
    office.lost(victim)
    heir = office.worker(3)
    while heir.inbox:
        office.finish(heir)
    assert run.settled == 40
    with pytest.raises(OSError):
        open_entry(run.results[1])
    assert [open_entry(run.results[index]) for index in range(40) if index != 1] == [n for n in range(40) if n != 1]


def test_an_unreadable_journal_costs_nothing_else(office: Office) -> None:
    victim = office.worker(2)
    futures = [office.submit(number) for number in range(2)]
    victim.start()
    victim.journal.data = b"torn"
    office.lost(victim)
    heir = office.worker(3)
    assert isinstance(futures[0].exception(0), OSError) and items(heir) == [1]


# ------------------------------------------------------------------------------------------------------------- policies


def test_retries(office: Office) -> None:
    worker = office.worker(2)
    future = office.submit(1, policy=Policy(retries=2))
    for _ in range(2):
        worker.wait(lambda: worker.inbox, "(again)")
        office.finish(worker, ValueError("again"))
        assert not future.done()
    worker.wait(lambda: worker.inbox, "the last time")
    office.finish(worker, ValueError("enough"))
    assert isinstance(future.exception(PATIENCE), ValueError) and "enough" in str(future.exception())
    ended = office.submit(2, policy=Policy(retries=1, retry_check=KeyError))
    worker.wait(lambda: worker.inbox, "sent")
    office.finish(worker, ValueError("not retried"))
    assert isinstance(ended.exception(PATIENCE), ValueError)


def test_a_retry_after_death_runs_elsewhere(office: Office) -> None:
    victim = office.worker(2)
    future = office.submit(1, policy=Policy(retries=1))
    victim.start()
    office.lost(victim)
    heir = office.worker(3)
    heir.wait(lambda: heir.inbox, "sent again")
    office.finish(heir, "second")
    assert future.result(PATIENCE) == "second"


def test_a_retry_that_waits_fails_with_everything_else(office: Office) -> None:
    worker = office.worker(2)
    decided = threading.Event()
    policy = Policy(retries=1, retry_delays=(1000.0,), retry_check=lambda error: decided.set() or True)
    future = office.submit(1, policy=policy)
    office.finish(worker, ValueError())
    assert decided.wait(PATIENCE)
    office.on_leader(lambda: office.scheduler.fail_all(lambda: RuntimeError("broken")))
    assert isinstance(future.exception(PATIENCE), RuntimeError)


@pytest.mark.parametrize("error", [KeyError("check"), SystemExit(1)])
def test_a_retry_check_that_raises(office: Office, error: BaseException) -> None:
    worker = office.worker(2)

    def check(_: BaseException) -> bool:
        raise error

    future = office.submit(1, policy=Policy(retries=1, retry_check=check))
    office.finish(worker, ValueError())
    assert future.exception(PATIENCE) is error


def test_a_call_with_a_time_limit_travels_alone(office: Office) -> None:
    worker = office.worker(2)
    function = fresh()
    limited = office.submit(1, function, Policy(timeout=0.05))
    others = [office.submit(number, function) for number in (2, 3)]
    assert items(worker) == [1]
    worker.start()
    worker.wait(lambda: worker.killed, "its time is up")
    office.lost(worker)
    assert isinstance(limited.exception(0), TimeoutError)
    heir = office.worker(3)
    assert items(heir) == [2, 3]
    office.finish(heir), office.finish(heir)
    assert wait(others, PATIENCE).not_done == set()


def test_a_call_with_a_time_limit_runs_beside_one_that_waits_and_takes_the_blame_alone(office: Office) -> None:
    worker = office.worker(2)
    patient = office.submit(1, policy=Policy(timeout=PATIENCE))
    worker.start()
    limited = office.submit(2, policy=Policy(timeout=0.05))
    assert len(worker.frames) == 1, "it travels alone"
    office.frame(worker, Kind.BLOCKED, messages.Blocked(1).pack())
    assert worker.start()[1] == 2
    assert not office.slots[2].usable
    worker.wait(lambda: worker.killed, "its time is up")
    office.lost(worker)
    assert type(limited.exception(0)) is TimeoutError
    assert type(patient.exception(0)) is not TimeoutError


def test_time_that_a_call_stands_behind_another_one_does_not_count(office: Office) -> None:
    worker = office.worker(2)
    first = office.submit(1)
    worker.start()
    office.frame(worker, Kind.BLOCKED, messages.Blocked(1).pack())
    limited = office.submit(2, policy=Policy(timeout=0.1))
    office.frame(worker, Kind.BLOCKED, messages.Blocked(-1).pack())
    threading.Event().wait(0.25)
    assert not worker.killed
    worker.start()
    worker.wait(lambda: worker.killed, "its time is up")
    assert not first.done()
    office.lost(worker)
    assert type(limited.exception(0)) is TimeoutError and type(first.exception(0)) is not TimeoutError


def test_a_time_limit_shorter_than_it_takes_to_note_it(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its timer found nothing noted, and the call had no limit at all."""
    worker, loop = office.worker(2), office.node.loop
    call_later = loop.call_later

    def slowly(seconds: float, callback: Callable[[], object]) -> Any:
        fired = threading.Event()
        timer = call_later(seconds, lambda: (callback(), fired.set()))
        if not loop.leads:
            assert fired.wait(PATIENCE)
        return timer

    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_later", slowly)
        limited = office.submit(1, policy=Policy(timeout=0.01))
    worker.start()
    worker.wait(lambda: worker.killed, "its time is up")
    office.lost(worker)
    assert type(limited.exception(0)) is TimeoutError


def test_two_calls_whose_time_is_up_before_their_worker_is_gone(office: Office) -> None:
    """One waits for the other: only the last of the two was told so, the other that its worker had died."""
    worker = office.worker(2)
    outer = office.submit(1, policy=Policy(timeout=0.05))
    worker.start()
    office.frame(worker, Kind.BLOCKED, messages.Blocked(1).pack())
    inner = office.submit(2, policy=Policy(timeout=0.05))
    worker.start()
    worker.wait(lambda: len(worker.killed) == 2, "both times are up")
    office.lost(worker)
    assert type(outer.exception(0)) is TimeoutError and type(inner.exception(0)) is TimeoutError


def test_a_call_within_its_time_limit(office: Office) -> None:
    worker = office.worker(2)
    future = office.submit(1, policy=Policy(timeout=0.2))
    office.finish(worker, "quick")
    assert future.result(0) == "quick"
    later = office.submit(2)
    threading.Event().wait(0.3)
    assert not worker.killed
    office.finish(worker)
    assert later.result(0) == 2


def test_pids(office: Office) -> None:
    workers = {pid: office.worker(pid) for pid in (2, 3)}
    futures = [office.submit(number, policy=Policy(pids=frozenset([3]))) for number in range(5)]
    assert not workers[2].inbox and items(workers[3]) == [0, 1]
    for number in range(5):
        assert office.finish(workers[3]) == number
    assert [future.result(0) for future in futures] == list(range(5))
    stranger = office.submit(1, policy=Policy(pids=frozenset([77])))
    assert isinstance(stranger.exception(PATIENCE), RuntimeError)
    waiting = [office.submit(number, policy=Policy(pids=frozenset([3]))) for number in range(4)]
    office.lost(workers[3])
    assert all(isinstance(future.exception(PATIENCE), Exception) for future in waiting)


def test_an_idle_worker_gets_what_waits_here_for_another_one_of_its_pids(office: Office) -> None:
    busy, idle, stranger = (office.worker(pid) for pid in (2, 3, 4))
    either, one = Policy(pids=frozenset([2, 3])), Policy(pids=frozenset([2]))
    for_both = [office.submit(number, policy=either) for number in range(8)]
    for_one = [office.submit(number, policy=one) for number in (8, 9)]
    assert items(busy) == [0, 2] and items(idle) == [1, 3]
    assert for_both[6].cancel()
    busy.start()
    for number in (1, 3, 5, 7):
        assert office.finish(idle) == number
    idle.wait(lambda: idle.inbox, "the idle one gets what was not sent to the busy one")
    assert office.finish(idle) == 4
    busy.wait(lambda: busy.recalls, "and it is asked for what was")
    office.recalled(busy, [sequence for sequence, item in busy.inbox if item == 2])
    idle.wait(lambda: idle.inbox, "which goes to the idle one")
    assert office.finish(idle) == 2
    assert [for_both[number].result(0) for number in (1, 2, 3, 4, 5, 7)] == [1, 2, 3, 4, 5, 7]
    assert not idle.inbox and not stranger.inbox
    office.lost(busy)
    assert all(isinstance(future.exception(PATIENCE), OSError) for future in (for_both[0], *for_one))


# -------------------------------------------------------------------------------------------------------------- the end


def test_fail_all(office: Office) -> None:
    worker = office.worker(2)
    futures = [office.submit(number) for number in range(6)]
    pinned = [office.submit(number, policy=Policy(pids=frozenset([2]))) for number in range(3)]
    run = office.run([1, 2, 3], fresh())
    worker.start()
    office.on_leader(lambda: office.scheduler.fail_all(lambda: RuntimeError("broken")))
    for future in [*futures, *pinned]:
        assert isinstance(future.exception(PATIENCE), RuntimeError)
    for index in range(3):
        with pytest.raises(RuntimeError, match="broken"):
            open_entry(run.results[index])
    assert isinstance(office.submit(1).exception(PATIENCE), RuntimeError)
    late = office.run([1], fresh())
    assert late.wait_for(0, time.monotonic() + PATIENCE)


def test_idle_is_told_once_nothing_is_left(office: Office) -> None:
    told: list[int] = []
    worker = office.worker(2)
    office.scheduler.on_idle = lambda: told.append(1)
    futures = [office.submit(number) for number in range(3)]
    office.scheduler.closing = True
    office.on_leader(office.scheduler.check_done)
    assert not told
    while worker.inbox:
        assert not told
        office.finish(worker)
    assert told and all(future.done() for future in futures)


def test_an_exhausted_worker_retires_when_its_last_call_is_answered(office: Office) -> None:
    worker = office.worker(2, max_tasks=2)
    function = fresh()
    [office.submit(number, function) for number in range(5)]
    assert len(worker.inbox) == 2
    office.finish(worker)
    assert not office.retired and len(worker.inbox) == 1, "it is sent no more"
    office.finish(worker)
    assert office.retired == [office.slots[2]]


def test_an_exhausted_worker_retires_when_its_last_call_is_recalled(office: Office) -> None:
    worker = office.worker(2, max_tasks=2)
    futures = [office.submit(number) for number in range(2)]
    running, _ = worker.start()
    ahead = worker.inbox[0][0]
    thread, answers = in_thread(futures[1].cancel)
    worker.wait(lambda: worker.recalls, "asked")
    office.results(worker, (running, 0))
    assert not office.retired
    office.recalled(worker, [ahead], [ahead])
    thread.join(PATIENCE)
    assert answers == [True] and office.retired == [office.slots[2]]


# --------------------------------------------------------------------------------------------------------- random lives


@pytest.mark.parametrize("seed", range(8))
def test_random_lives(office: Office, seed: int) -> None:
    """Workers come, run, give back, and die at random: every element ends once, and runs once unless it was lost."""
    chance = random.Random(seed)
    function = timed(office, chance.choice([1e-6, 1e-4, 1.0]))
    total = 600
    runs = [office.run(list(range(total)), function, ordered=bool(number)) for number in range(2)]
    futures = [office.submit(number, function) for number in range(total)]
    alive: list[FakeWorker] = []
    unsent: dict[int, list[tuple[int, Any]]] = {}
    executed: Counter[Any] = Counter()
    lost = 0
    next_pid = 2
    deadline = time.monotonic() + PATIENCE
    while not (all(run.settled == total for run in runs) and all(future.done() for future in futures)):
        assert time.monotonic() < deadline
        if len(alive) < 3:
            alive.append(office.worker(next_pid, journal=True))
            unsent[next_pid] = []
            next_pid += 1
        worker = chance.choice(alive)
        done = unsent[worker.pid]
        revoked = [sequence for sequence, _ in worker.inbox if worker.is_revoked(sequence)]
        if revoked:  # on a busy machine: the scheduler has waited in vain for the answer to a RECALL
            flush(office, worker, done)
            office.recalled(worker, revoked)
        act = chance.random()
        if act < 0.6:
            for _ in range(chance.randint(1, 30)):
                if (started := worker.try_start()) is not None:
                    sequence, item = started
                    executed[item] += 1
                    done.append((sequence, item))
                    worker.journal.data += result(sequence, item)
        elif act < 0.8:
            flush(office, worker, done)
        elif act < 0.95:
            flush(office, worker, done)
            count = chance.randint(0, 20)
            office.recalled(worker, [sequence for sequence, _ in worker.inbox[-count:]] if count else [])
        else:
            started = worker.try_start() if chance.random() < 0.7 else None
            running = started is not None
            if started is not None:
                executed[started[1]] += 1
                lost += 1
            alive.remove(worker)
            asked = office.lost(worker)
            assert asked == [True] * running
    failed = sum(isinstance(future.exception(0), OSError) for future in futures)
    for run in runs:
        for index in range(total):
            try:
                assert open_entry(run.results[index]) == index
            except OSError:
                failed += 1
    assert failed == lost
    assert all(executed[number] == 3 for number in range(total)), "nothing twice, nothing left out"


def flush(office: Office, worker: FakeWorker, done: list[tuple[int, Any]]) -> None:
    body = together(done) if office.plain else b"".join(result(*pair) for pair in done)
    done.clear()
    office.frame(worker, Kind.RESULTS, messages.RESULTS.pack(len(worker.journal.data), 0.0, 0), body)


# ------------------------------------------------------------------------------------- threads in each other's way


def in_the_look(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], after: bool) -> None:
    """`act()` comes while the next dispatch looks for room, when the look is over or has not begun."""
    original, acts = scheduling.any_room, [act]

    def any_room(slots: Any) -> bool:
        found = original(slots) if after else None
        if acts and slots:
            acts.pop()()
        return original(slots) if found is None else found

    monkeypatch.setattr(scheduling, "any_room", any_room)


def test_a_result_that_comes_while_somebody_looks_for_room(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look found none, and the leader found nobody who waits: the next call stayed where it was."""
    worker = office.worker(2)
    long = timed(office, 10.0)
    in_the_look(monkeypatch, lambda: office.finish(worker), after=True)
    assert office.submit(1, long, Policy(retries=1)).result(PATIENCE) == 1
    office.submit(2, long)
    assert items(worker) == [2]


def test_a_call_that_comes_while_a_new_worker_is_looked_at(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit() -> None:
        thread, _ = in_thread(lambda: office.submit(1))
        thread.join(PATIENCE)

    in_the_look(monkeypatch, submit, after=False)
    worker = office.worker(2)
    worker.wait(lambda: items(worker) == [1], "sent")


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_tables_that_change_while_they_are_looked_through(
    office: Office, restless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others submit and the leader takes out what has ended, both without the lock."""
    scheduler, ended = office.scheduler, threading.Event()
    monkeypatch.setattr(scheduler._recalls, "ask", lambda calls: [])
    function = timed(office, 2e-5)
    futures = [office.submit(number, function) for number in range(1000)]
    office.worker(2)
    queue, inflight = scheduler._queue, office.slots[2].inflight
    call = inflight[1]
    assert len(inflight) > 100 and len(queue) > 100

    def change() -> None:
        while not ended.is_set():
            queue.append(call)
            inflight[10**6] = call
            queue.pop()
            del inflight[10**6]

    thread, _ = in_thread(change)
    try:
        for _ in range(600):
            scheduler.cancel_waiting(spare=10**6)
            assert office.slots[2]._span_of(10**5) is None
    finally:
        ended.set()
        thread.join(PATIENCE)
    assert not any(future.cancelled() for future in futures)


def test_a_worker_that_is_given_back(office: Office) -> None:
    worker = office.worker(2)
    sent = [office.submit(number, policy=Policy(pids=frozenset([2]))) for number in range(2)]
    waits = office.submit(2, policy=Policy(pids=frozenset([2]), timeout=1000.0))
    assert items(worker) == [0, 1]
    worker.start()
    asked: list[bool] = []
    slot = office.slots[2]
    office.on_leader(lambda: office.scheduler.give_up(slot, lambda ran: asked.append(ran) or OSError("given back")))
    assert asked == [True, False] and not slot.inflight and not slot.load and not slot.pinned
    assert all(isinstance(future.exception(PATIENCE), OSError) for future in sent)
    assert "living worker" in str(waits.exception(PATIENCE))


def test_the_time_limit_of_a_call_whose_worker_was_given_back(office: Office) -> None:
    office.worker(2)
    office.submit(1, policy=Policy(timeout=1000.0))
    slot = office.slots[2]
    office.on_leader(lambda: office.scheduler.give_up(slot, lambda ran: OSError("given back")))
    assert slot._clocks and not slot.usable, "it still runs there"
    assert slot.take_back(1, 1) == [] and slot.usable, "it did not"
    slot._clocks[2] = office.node.loop.call_later(1000.0, int)
    slot.member.on_last_words()
    assert not slot._clocks and slot.usable


@pytest.mark.parametrize("answer", ["before", "behind", "never"])
@pytest.mark.parametrize("all_of_them", [False, True], ids=["one", "all"])
def test_an_interrupt_while_a_call_is_recalled_leaves_it_with_an_end(
    office: Office, monkeypatch: pytest.MonkeyPatch, answer: str, all_of_them: bool
) -> None:
    """What had come back was dropped, and nobody ended it: `result()` waited for ever."""
    worker = office.worker(2)
    futures = [office.submit(number) for number in range(2)]
    first, _ = worker.start()
    ahead = first + 1

    def back() -> None:
        office.recalled(worker, [ahead], [ahead])

    def interrupted(calls: list[Any], events: list[Any]) -> list[Any]:
        assert len(events) == 1
        if answer == "before":
            back()
        raise KeyboardInterrupt

    monkeypatch.setattr(office.scheduler._recalls, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        if all_of_them:
            office.scheduler.cancel_waiting()
        else:
            futures[1].cancel()
    if answer == "before":
        assert futures[1].cancelled()
        return
    if answer == "behind":
        back()
    office.results(worker, (first, 0))
    office.finish(worker)
    assert [future.result(PATIENCE) for future in futures] == [0, 1]


def test_a_map_is_failed_and_sent_at_the_same_time(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its consumer feeds it while the leader ends what waits: each element ends once, one way or the other."""
    run = office.run(list(range(50)), fresh(), ordered=False)
    worker = office.worker(2)
    popped, failed = threading.Event(), threading.Event()
    take = mapruns._Scalars.take

    def slowly(block: Any, of: Any, count: int) -> Any:
        popped.set()
        failed.wait(0.2)  # it must wait for us
        return take(block, of, count)

    monkeypatch.setattr(mapruns._Scalars, "take", slowly)
    thread = threading.Thread(target=lambda: (office.finish(worker), office.finish(worker)))
    thread.start()
    assert popped.wait(PATIENCE)
    run.fail_rest(Outcome(RAISED_HERE, CancelledError(), (), 1))
    failed.set()
    thread.join(PATIENCE)
    while worker.inbox:
        office.finish(worker)
    assert run.settled == 50 and sorted(run.ready) == list(range(50)) and run.remaining == 0
