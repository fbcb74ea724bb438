"""Callbacks of a pool one after another, and its errors as programs know them from multiprocessing.Pool."""

from __future__ import annotations

import logging
import multiprocessing.pool
import pickle
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import PATIENCE, Office

from distpool import pool_callbacks
from distpool.errors import DistpoolError, SerializationError, as_both
from distpool.flag import Flag
from distpool.pool_callbacks import Callbacks, PoolTerminated, open_entry, park_at_exit
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Outcome
from distpool.wire import codec
from distpool.wire.failures import encode_exception
from distpool.wire.messages import ERROR, UNSENDABLE, VALUE


@pytest.fixture
def callbacks() -> Iterator[Callbacks]:
    office = Office()
    yield Callbacks(office.scheduler)
    office.close()


# -- one after another -----------------------------------------------------------------------------------------------


def test_they_run_in_their_order_and_never_together(callbacks: Callbacks) -> None:
    ran: list[tuple[int, int]] = []
    busy = threading.Lock()
    done = threading.Event()

    def run(thread: int, number: int) -> None:
        assert busy.acquire(blocking=False)
        ran.append((thread, number))
        busy.release()
        if len(ran) == 400:
            done.set()

    def put(thread: int) -> None:
        for number in range(100):
            callbacks.put(partial(run, thread, number))

    threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert done.wait(PATIENCE)
    for number in range(4):
        assert [each for thread, each in ran if thread == number] == sorted(range(100))


@pytest.mark.parametrize("raised", [KeyError("x"), SystemExit(3)])
def test_one_that_raises_is_logged_and_the_next_one_runs(
    callbacks: Callbacks, raised: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()

    def fail() -> None:
        raise raised

    with caplog.at_level(logging.ERROR, "distpool"):
        callbacks.put(fail)
        callbacks.put(done.set)
        assert done.wait(PATIENCE)
    assert "exception in a callback" in caplog.text and type(raised).__name__ in caplog.text


def test_one_that_waits_lets_the_next_one_run(callbacks: Callbacks) -> None:
    first, second, third = threading.Event(), threading.Event(), threading.Event()
    said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def wait() -> None:
        callbacks.give_way()
        assert first.wait(PATIENCE)
        said.put("waited")
        third.set()

    callbacks.put(wait)
    callbacks.put(lambda: (said.put("meanwhile"), first.set(), second.set())[0])
    assert second.wait(PATIENCE) and third.wait(PATIENCE)
    assert [said.get(), said.get()] == ["meanwhile", "waited"]
    done = threading.Event()
    callbacks.put(done.set)  # whoever gave its turn away does not run this as well
    assert done.wait(PATIENCE)


def test_who_runs_no_callback_gives_nothing_away(callbacks: Callbacks) -> None:
    entered, release, other = threading.Event(), threading.Event(), threading.Event()
    callbacks.put(lambda: (entered.set(), release.wait(PATIENCE))[0])
    assert entered.wait(PATIENCE)
    callbacks.give_way()
    callbacks.put(other.set)
    assert not other.wait(0.01)
    release.set()
    assert other.wait(PATIENCE)


def test_an_interrupt_as_their_thread_is_called_does_not_end_them(
    callbacks: Callbacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their turn stayed taken, and no callback of the pool ran any more."""
    ran: queue.SimpleQueue[int] = queue.SimpleQueue()
    node = callbacks.scheduler.node

    def interrupted(function: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(node, "deliver", interrupted)
        with pytest.raises(KeyboardInterrupt):
            callbacks.put(lambda: ran.put(1))
    callbacks.join()  # those that were left are run before they are waited for
    assert ran.get(timeout=PATIENCE) == 1
    callbacks.put(lambda: ran.put(2))
    assert ran.get(timeout=PATIENCE) == 2


def test_join_waits_for_each_result_s_callback(callbacks: Callbacks) -> None:
    class Result:
        asked = False

        def _await_callback(self) -> None:
            self.asked = True

    results: set[Any] = {Result(), Result()}
    callbacks.results = results
    callbacks.join()
    assert all(result.asked for result in results)


def test_the_loop_is_led_while_somebody_waits_for_a_callback(callbacks: Callbacks) -> None:
    ran, loop = Flag(), callbacks.scheduler.loop
    followed: list[int] = []

    def callback() -> None:
        followed.append(loop._followers)
        ran.set()
        callbacks.tell()

    loop.call_soon(lambda: loop.call_later(0.05, lambda: callbacks.put(callback)))
    callbacks.wait_for(ran, time.monotonic() + PATIENCE)
    assert ran.is_set() and followed[0] > 0


# -- errors ----------------------------------------------------------------------------------------------------------


def test_values() -> None:
    assert open_entry(codec.encode([1])[0]) == [1]
    assert open_entry(Outcome(VALUE, codec.encode([2])[0], (), 2)) == [2]
    assert open_entry(Outcome(LOCAL_VALUE, 3, (), 2)) == 3


def test_what_the_call_raised_has_the_remote_traceback() -> None:
    with pytest.raises(KeyError) as caught:
        open_entry(Outcome(ERROR, encode_exception(KeyError("x")), (), 2))
    assert type(caught.value.__cause__) is multiprocessing.pool.RemoteTraceback  # type: ignore[attr-defined]


def test_a_value_that_could_not_be_sent() -> None:
    error = SerializationError("the result <lock>, cannot be serialised: TypeError: no")
    with pytest.raises(multiprocessing.pool.MaybeEncodingError) as caught:  # type: ignore[attr-defined]
        open_entry(Outcome(UNSENDABLE, encode_exception(error), (), 2))
    assert caught.value.value == "<the result <lock>>" and "TypeError: no" in caught.value.exc
    pickle.loads(pickle.dumps(caught.value))


def failed(cause: BaseException | None) -> SerializationError:
    error = SerializationError("argument 1 cannot be serialised")
    error.__cause__ = cause
    return error


def test_what_the_users_reduce_raised_is_both() -> None:
    cause = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        open_entry(Outcome(RAISED_HERE, failed(cause), (), 1))
    both: Any = caught.value
    assert isinstance(both, SerializationError) and both.__cause__ is cause
    assert str(both) == "argument 1 cannot be serialised" and type(both).__name__ == "SerializationError"
    back = pickle.loads(pickle.dumps(both))  # the class exists here only
    assert type(back) is SerializationError and back.args == both.args


class Particular(Exception):
    """Made of other arguments than others."""

    def __new__(cls, *, only: int) -> Any:
        return super().__new__(cls)

    def __init__(self, *, only: int) -> None:
        super().__init__()


class Strict(SerializationError):
    pass


@pytest.mark.parametrize(
    "error",
    [
        failed(None),
        failed(KeyboardInterrupt()),
        failed(Particular(only=1)),
        failed(SerializationError("inner")),
        failed(StopIteration(3)),
        failed(Exception("plain")),
        Strict("x"),
        ValueError("x"),
    ],
)
def test_others_stay_as_they_are(error: BaseException) -> None:
    assert as_both(error) is error


def test_errors_that_are_laid_out_otherwise_stay_as_they_are() -> None:
    error = failed(UnicodeDecodeError("utf-8", b"x", 0, 1, "why"))
    made: Any = as_both(error)
    assert isinstance(made, SerializationError)
    assert "cannot be serialised" in str(made)


def test_pool_terminated_is_what_both_libraries_say() -> None:
    assert issubclass(PoolTerminated, DistpoolError) and issubclass(PoolTerminated, BrokenProcessPool)


@pytest.mark.parametrize(
    ("error", "ended", "daemon", "stays"),
    [
        (PoolTerminated("x"), True, True, True),
        (PoolTerminated("x"), False, True, False),
        (PoolTerminated("x"), True, False, False),
        (KeyError("x"), True, True, False),
    ],
)
def test_only_daemon_threads_stay_when_the_program_ends(
    error: BaseException, ended: bool, daemon: bool, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[Any] = []
    fake = SimpleNamespace(
        Event=lambda: SimpleNamespace(wait=lambda: waits.append("for ever")),
        current_thread=lambda: SimpleNamespace(daemon=daemon),
    )
    monkeypatch.setattr(pool_callbacks, "threading", fake)
    scheduler: Any = SimpleNamespace(node=SimpleNamespace(pools_ended=ended))
    park_at_exit(error, scheduler)
    assert bool(waits) is stays
