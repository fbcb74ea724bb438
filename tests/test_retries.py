"""Calls between two attempts: who decides, when they run again, and how they end when everything ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import PATIENCE, Office, fresh
from wires import until

import distpool
from distpool import Channel, ClusterExecutor, RemoteChannel
from distpool.policy import make_policy
from distpool.work import Policy


@pytest.fixture
def office() -> Iterator[Office]:
    made = Office()
    yield made
    made.close()


def fail(office: Office, worker: Any, error: BaseException) -> None:
    """The worker's next call ends so."""
    worker.wait(lambda: worker.inbox, "a call")
    sequence, _ = worker.start()
    office.results(worker, (sequence, error))


def test_it_runs_again_until_its_attempts_are_used_up(office: Office) -> None:
    worker = office.worker(2)
    future = office.submit(1, policy=Policy(retries=2))
    for text in ("first", "second", "third"):
        assert not future.done()
        fail(office, worker, OSError(text))
    with pytest.raises(OSError, match="third"):
        future.result(PATIENCE)
    assert not worker.inbox and office.scheduler.retries.count == 0


def test_another_attempt_may_end_well(office: Office) -> None:
    worker = office.worker(2)
    future = office.submit("value", policy=Policy(retries=1))
    fail(office, worker, OSError("x"))
    worker.wait(lambda: worker.inbox, "the second attempt")
    office.finish(worker)
    assert future.result(PATIENCE) == "value"


def test_the_check_gets_the_error_on_a_library_thread(office: Office) -> None:
    asked: list[Any] = []

    def check(error: BaseException) -> bool:
        asked.append((error, threading.current_thread()))
        return False

    worker = office.worker(2)
    future = office.submit(1, policy=Policy(retries=1, retry_check=check))
    fail(office, worker, KeyError("x"))
    with pytest.raises(KeyError):
        future.result(PATIENCE)
    ((error, thread),) = asked
    assert type(error) is KeyError and thread is not threading.current_thread() and thread.daemon
    assert not office.node.loop._thread or thread is not office.node.loop._thread


@pytest.mark.parametrize("raised", [ZeroDivisionError("check"), SystemExit(3)])
def test_an_error_of_the_check_is_the_calls(office: Office, raised: BaseException) -> None:
    def check(error: BaseException) -> bool:
        raise raised

    worker = office.worker(2)
    future = office.submit(1, policy=Policy(retries=1, retry_check=check))
    fail(office, worker, KeyError("x"))
    assert future.exception(PATIENCE) is raised


def test_a_slow_check_holds_up_nobody(office: Office) -> None:
    release, asked = threading.Event(), threading.Event()

    def check(error: BaseException) -> bool:
        asked.set()
        return not release.wait(PATIENCE)

    worker = office.worker(2)
    future = office.submit(1, policy=Policy(retries=1, retry_check=check))
    fail(office, worker, KeyError("x"))
    assert asked.wait(PATIENCE)
    other = office.submit(2)
    office.finish(worker)
    assert other.result(PATIENCE) == 2 and not future.done()
    assert office.scheduler.busy
    release.set()
    assert type(future.exception(PATIENCE)) is KeyError


def test_the_delay_is_that_of_the_attempt(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []
    original = office.node.loop.call_later
    monkeypatch.setattr(
        office.node.loop, "call_later", lambda delay, callback: seconds.append(delay) or original(0, callback)
    )
    worker = office.worker(2)
    future = office.submit(1, policy=make_policy(None, retries=4, retry_delays=[50, 60]))
    for _ in range(5):
        fail(office, worker, OSError("x"))
    assert type(future.exception(PATIENCE)) is OSError
    assert [delay for delay in seconds if delay >= 50] == [50, 60, 60, 60]


def test_who_waits_fails_with_all_the_others(office: Office) -> None:
    worker = office.worker(2)
    waiting = office.submit(1, policy=Policy(retries=1, retry_delays=(1000.0,)))
    fail(office, worker, OSError("x"))
    until(lambda: office.scheduler.retries._waiting, "the timer")
    office.on_leader(lambda: office.scheduler.fail_all(lambda: RuntimeError("over")))
    with pytest.raises(RuntimeError, match="over"):
        waiting.result(PATIENCE)
    assert not office.scheduler.retries._waiting and office.scheduler.retries.count == 0


def test_who_is_being_decided_fails_afterwards(office: Office) -> None:
    release, asked = threading.Event(), threading.Event()

    def check(error: BaseException) -> bool:
        asked.set()
        return release.wait(PATIENCE)

    worker = office.worker(2)
    future = office.submit(1, policy=Policy(retries=1, retry_check=check))
    fail(office, worker, OSError("x"))
    assert asked.wait(PATIENCE)
    office.on_leader(lambda: office.scheduler.fail_all(lambda: RuntimeError("over")))
    assert not future.done()
    release.set()
    with pytest.raises(RuntimeError, match="over"):
        future.result(PATIENCE)


def test_who_waits_ends_as_the_last_attempt_did_when_the_rest_is_cancelled(office: Office) -> None:
    worker = office.worker(2)
    waiting = office.submit(1, policy=Policy(retries=1, retry_delays=(1000.0,)))
    fail(office, worker, OSError("first"))
    until(lambda: office.scheduler.retries._waiting, "the timer")
    running = office.submit(2, policy=Policy(retries=1))
    worker.wait(lambda: worker.inbox, "a call")
    sequence, _ = worker.start()
    office.scheduler.cancel_waiting()
    with pytest.raises(OSError, match="first"):
        waiting.result(PATIENCE)
    office.results(worker, (sequence, OSError("no second attempt")))
    with pytest.raises(OSError, match="no second attempt"):
        running.result(PATIENCE)
    assert not worker.inbox and not office.scheduler.retries._waiting and office.scheduler.retries.count == 0


def test_a_shutdown_that_cancels_does_not_wait_for_the_next_attempt() -> None:
    executor = ClusterExecutor(1, retries=1, retry_delays=(1000.0,))
    future = executor.submit(_raise, ValueError("the only one"))
    until(lambda: executor._crew.scheduler.retries._waiting, "the timer")
    executor.shutdown(cancel_futures=True)
    with pytest.raises(ValueError, match="the only one"):
        future.result(0)


def _raise(error: BaseException) -> None:
    raise error


def test_a_dead_worker_is_a_reason_too(office: Office) -> None:
    worker = office.worker(2)
    future = office.submit(1, policy=Policy(retries=1))
    worker.wait(lambda: worker.inbox, "a call")
    worker.start()
    office.lost(worker)
    other = office.worker(3)
    other.wait(lambda: other.inbox, "the second attempt")
    office.finish(other)
    assert future.result(PATIENCE) == 1


def test_the_executor_is_not_idle_meanwhile(office: Office) -> None:
    idle = threading.Event()
    office.scheduler.on_idle = idle.set
    worker = office.worker(2)
    future = office.submit(1, fresh(), Policy(retries=1, retry_delays=(1000.0,)))
    fail(office, worker, OSError("x"))
    until(lambda: office.scheduler.retries._waiting, "the timer")
    office.scheduler.closing = True
    office.on_leader(office.scheduler.check_done)
    assert not idle.is_set()
    office.on_leader(lambda: office.scheduler.fail_all(lambda: RuntimeError("over")))
    assert type(future.exception(PATIENCE)) is RuntimeError and idle.wait(PATIENCE)


def _fail_with_a_channel() -> None:
    channel = RemoteChannel(lambda: Channel(1))
    channel.put("kept")
    raise TypeError(channel)


def test_an_error_that_is_not_retried_keeps_its_references() -> None:
    """It was opened to be looked at, and again by whoever asked: the references of the first were given back, and those
    of the second had nothing behind them."""
    with ClusterExecutor(1, retries=1, retry_check=ValueError) as executor:
        for _ in range(10):
            error = executor.submit(_fail_with_a_channel).exception(PATIENCE)
            assert isinstance(error, TypeError)
            channel = error.args[0]
            for _ in range(3):  # whatever is to be given back has been
                distpool.remotecall_fetch(abs, channel.where, -1)
            assert channel.take(timeout=PATIENCE) == "kept"
