"""`Future` as a `concurrent.futures.Future` in every respect: alone, under the library's own helpers, and raced."""
# ruff: noqa: B023 - the functions that a race starts end within the same round of its loop

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import pickle
import random
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, InvalidStateError, as_completed, wait
from typing import Any

import pytest

from distpool.refs.refs import FINISHED, LOCAL_VALUE, RAISED_HERE, Future, Outcome, open_outcome, set_values
from distpool.transport.ioloop import IoLoop
from distpool.wire import codec
from distpool.wire.failures import encode_exception
from distpool.wire.messages import ERROR, VALUE

PATIENCE = 30.0


def value(thing: Any) -> Outcome:
    data, buffers = codec.encode(thing)
    return Outcome(VALUE, data, buffers, 2)


def failure(error: BaseException) -> Outcome:
    try:
        raise error
    except BaseException as caught:
        return Outcome(ERROR, encode_exception(caught), [], 2)


def settle(future: Future[Any], outcome: Outcome) -> None:
    """What the scheduler does: settle on its thread, callbacks afterwards."""
    if future._settle(outcome):
        future._run_callbacks()


class FakeCall:
    """The call behind a future, as the scheduler would be asked about it."""

    def __init__(self, loop: IoLoop | None = None, cancellable: bool = True, started: bool = False) -> None:
        self.loop = loop
        self.cancellable = cancellable
        self.has_started = started
        self.cancels = 0
        self.waits = 0

    def cancel(self) -> bool:
        self.cancels += 1
        return self.cancellable

    def started(self) -> bool:
        return self.has_started

    brisk = False

    def waiting(self) -> contextlib.AbstractContextManager[object]:
        self.waits += 1
        return contextlib.nullcontext()


@pytest.fixture
def loop() -> Iterator[IoLoop]:
    made = IoLoop("test-io")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads switch as often as they can: races come out."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(*functions: Any) -> list[Any]:
    """Run them at the same moment; their results, or what they raised, in order."""
    barrier = threading.Barrier(len(functions))
    results: list[Any] = [None] * len(functions)

    def run(index: int) -> None:
        barrier.wait(PATIENCE)
        try:
            results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    return results


# --------------------------------------------------------------------------------------------------- results and errors


def test_it_is_a_future_of_the_standard_library() -> None:
    future: Future[int] = Future()
    assert isinstance(future, concurrent.futures.Future)
    assert not future.done() and not future.running() and not future.cancelled()


def test_value() -> None:
    future: Future[Any] = Future()
    settle(future, value({"a": [1, None]}))
    assert future.done() and not future.cancelled() and not future.running()
    assert future.result() == {"a": [1, None]}
    assert future.exception() is None
    assert future.result() is future.result(), "decoded once"


def test_none_is_a_value() -> None:
    future: Future[Any] = Future()
    settle(future, value(None))
    assert future.result(0) is None


def test_error_comes_with_the_remote_traceback() -> None:
    future: Future[Any] = Future()
    settle(future, failure(KeyError("gone")))
    with pytest.raises(KeyError, match="gone") as caught:
        future.result()
    assert type(caught.value.__cause__) is concurrent.futures.process._RemoteTraceback  # type: ignore[attr-defined]
    assert "raise error" in str(caught.value.__cause__)
    assert future.exception() is caught.value


def test_error_of_this_process_is_raised_as_it_is() -> None:
    future: Future[Any] = Future()
    error = ValueError("here")
    settle(future, Outcome(RAISED_HERE, error, (), 1))
    assert future.exception() is error


def test_value_that_cannot_be_rebuilt_is_an_error_of_that_future() -> None:
    future: Future[Any] = Future()
    settle(future, Outcome(VALUE, b"\x80\x05not a pickle", [], 2))
    assert isinstance(future.exception(), Exception)
    with pytest.raises(type(future.exception())):
        future.result()


def test_an_error_that_leaves_the_interpreter_while_it_is_rebuilt_stays_inside() -> None:
    outcome = Outcome(VALUE, pickle.dumps(_Leaves()), [], 2)
    got, error = open_outcome(outcome)
    assert got is None and error is not None


class _Leaves:
    def __reduce__(self) -> Any:
        return sys.exit, (3,)


def test_buffers_come_out_of_band() -> None:
    data = bytearray(b"x" * (1 << 20))
    encoded, buffers = codec.encode(pickle.PickleBuffer(data))
    assert buffers, "large buffers travel beside the pickle"
    future: Future[Any] = Future()
    settle(future, Outcome(VALUE, encoded, buffers, 2))
    assert bytes(future.result()) == bytes(data)


def test_the_first_outcome_counts() -> None:
    future: Future[Any] = Future()
    settle(future, value(1))
    settle(future, value(2))
    settle(future, failure(ValueError()))
    assert future.result() == 1


def test_repr_tells_the_truth() -> None:
    """What a log shows: a failed call must not look as if it had returned."""
    failed: Future[Any] = Future()
    assert "pending" in repr(failed)
    settle(failed, failure(ValueError("x")))
    assert "finished" in repr(failed) and "returned" not in repr(failed)
    failed.exception()
    assert "raised ValueError" in repr(failed)
    good: Future[Any] = Future()
    settle(good, value(5))
    assert "raised" not in repr(good) and "NoneType" not in repr(good)
    good.result()
    assert "returned int" in repr(good)


def test_repr_is_the_standard_librarys() -> None:
    def shown(future: Future[Any]) -> str:
        start = f"<Future at {id(future):#x} state="
        text = repr(future)
        assert text.startswith(start) and text.endswith(">")
        return text[len(start) : -1]

    future: Future[Any] = Future()
    future._call = FakeCall(started=False)
    assert shown(future) == "pending"
    future._call = FakeCall(started=True)
    assert future.running() and shown(future) == "running"
    assert not future._watched, "looking at it costs the one who settles it nothing"
    for outcome, text in (
        (Outcome(LOCAL_VALUE, 5, (), 2), "finished returned int"),
        (value([5]), "finished returned a value, not yet read"),
        (failure(ValueError("x")), "finished raised ValueError"),
        (Outcome(RAISED_HERE, KeyError(1), (), 1), "finished raised KeyError"),
    ):
        ended: Future[Any] = Future()
        settle(ended, outcome)
        assert shown(ended) == text
        ended.exception()
        assert shown(ended) == text.replace("a value, not yet read", "list")
    cancelled: Future[Any] = Future()
    assert cancelled.cancel() and shown(cancelled) == "cancelled"


class Forked(FakeCall):
    """The call of a future in a forked child."""

    def waiting(self) -> contextlib.AbstractContextManager[object]:
        raise RuntimeError("of the process that forked this one")


def test_nobody_registers_for_what_will_never_be_heard_of(loop: IoLoop) -> None:
    """In a forked child; `await` and `concurrent.futures.wait` waited for ever there."""
    future: Future[Any] = Future()
    future._call = Forked(loop)

    async def awaited() -> None:
        await future

    async def wrapped() -> None:
        await asyncio.wrap_future(future)

    for use in (
        lambda: asyncio.run(awaited()),
        lambda: asyncio.run(wrapped()),
        lambda: wait([future]),
        lambda: list(as_completed([future])),
        lambda: future.add_done_callback(print),
        lambda: future.result(),
    ):
        with pytest.raises(RuntimeError, match="forked"):
            use()
    assert "pending" in repr(future)
    future._settle(value(1))
    assert wait([future]).done == {future} and asyncio.run(asyncio.wait_for(future, 9)) == 1  # type: ignore[arg-type]


def test_pickling_is_refused_or_dead_but_never_a_copy() -> None:
    """Outside of a message of distpool: TypeError, or (references, API 8.2) a handle whose use raises RuntimeError."""
    future: Future[Any] = Future()
    try:
        copy = pickle.loads(pickle.dumps(future))
    except TypeError:
        return
    with pytest.raises(RuntimeError):
        copy.result(0.1)


def test_result_leaves_no_cycle() -> None:
    """A future that raised is gone when its last reference is, without help of the collector."""
    gc.collect()
    gc.disable()
    try:
        future: Future[Any] = Future()
        settle(future, failure(ValueError("x")))
        with pytest.raises(ValueError):
            future.result()
        died = weakref.ref(future)
        del future
        assert died() is None
    finally:
        gc.enable()


# -------------------------------------------------------------------------------------------------------------- waiting


def test_timeouts_without_a_call() -> None:
    future: Future[Any] = Future()
    for timeout in (0, 0.01, -1):
        with pytest.raises(TimeoutError):
            future.result(timeout)
        with pytest.raises(TimeoutError):
            future.exception(timeout)
    assert TimeoutError is concurrent.futures.TimeoutError


@pytest.mark.parametrize("timeout", [0, 0.01, -5])
def test_timeouts_while_leading(loop: IoLoop, timeout: float) -> None:
    future: Future[Any] = Future()
    future._call = FakeCall(loop)
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        future.result(timeout)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("timeout", [10**6, 10**8, threading.TIMEOUT_MAX])
def test_timeouts_may_be_as_long_as_the_standard_librarys(loop: IoLoop, timeout: float) -> None:
    """epoll takes 24 days at most, threading 292 years; users say `timeout=threading.TIMEOUT_MAX`."""
    future: Future[Any] = Future()
    future._call = FakeCall(loop)
    # Not by a timer of the loop: that would shorten its poll.
    settler = threading.Timer(0.05, lambda: loop.call_soon(lambda: future._settle(value("late"))))
    settler.start()
    assert future.result(timeout) == "late"
    settler.join(PATIENCE)


def test_settled_by_the_leader_while_this_thread_leads(loop: IoLoop) -> None:
    future: Future[Any] = Future()
    future._call = call = FakeCall(loop)
    loop.call_later(0.02, lambda: future._settle(value(7)))
    assert future.result(PATIENCE) == 7
    assert call.waits == 1


def test_many_threads_wait_for_one_future(loop: IoLoop) -> None:
    future: Future[Any] = Future()
    future._call = FakeCall(loop)
    loop.call_later(0.05, lambda: future._settle(value("all")))
    assert in_threads(*[lambda: future.result(PATIENCE)] * 8) == ["all"] * 8


def test_a_cancel_wakes_whoever_waits(loop: IoLoop) -> None:
    """The waiting thread leads the I/O loop: nothing comes over a socket when another thread cancels."""
    future: Future[Any] = Future()
    future._call = FakeCall(loop)

    def wait_for_it() -> str:
        try:
            future.result(PATIENCE)
        except CancelledError:
            return "cancelled"
        return "no"

    begin = time.monotonic()
    cancelled: list[bool] = []
    canceller = threading.Timer(0.1, lambda: cancelled.append(future.cancel()))
    canceller.start()
    assert in_threads(wait_for_it, wait_for_it) == ["cancelled", "cancelled"]
    assert time.monotonic() - begin < 5
    canceller.join(PATIENCE)
    assert cancelled == [True]


def test_set_result_of_another_thread_wakes_whoever_waits(loop: IoLoop) -> None:
    for call in (None, FakeCall(loop)):
        future: Future[Any] = Future()
        future._call = call
        results = in_threads(lambda: future.result(PATIENCE), lambda: future.set_result(4))
        assert results == [4, None]


# ----------------------------------------------------------------------------------------------------------- cancelling


def test_cancel_without_a_call() -> None:
    future: Future[Any] = Future()
    assert future.cancel() and future.cancelled() and future.done()
    assert future.cancel(), "again: still cancelled"
    with pytest.raises(CancelledError):
        future.result()
    with pytest.raises(CancelledError):
        future.exception(0)
    assert "cancelled" in repr(future)


def test_cancel_asks_the_call() -> None:
    future: Future[Any] = Future()
    future._call = call = FakeCall(cancellable=False, started=True)
    assert future.running()
    assert not future.cancel() and not future.cancelled()
    assert call.cancels == 1
    call.cancellable = True
    assert future.cancel() and future.cancelled() and not future.running()


def test_cancel_of_a_finished_one_is_false() -> None:
    future: Future[Any] = Future()
    settle(future, value(1))
    assert not future.cancel() and future.result() == 1


def test_what_comes_after_a_cancel_is_dropped() -> None:
    future: Future[Any] = Future()
    future.cancel()
    settle(future, value(1))
    assert future.cancelled()
    with pytest.raises(CancelledError):
        future.result()


# --------------------------------------------------------------------------------------------- filling a future by hand


def test_filled_by_hand() -> None:
    future: Future[Any] = Future()
    assert future.set_running_or_notify_cancel()
    assert future.running() and not future.cancel()
    future.set_result(3)
    assert future.result() == 3
    for late in (lambda: future.set_result(4), lambda: future.set_exception(ValueError())):
        with pytest.raises(InvalidStateError):
            late()
    assert future.result() == 3


def test_failed_by_hand() -> None:
    future: Future[Any] = Future()
    error = OSError("by hand")
    future.set_exception(error)
    assert future.exception() is error
    with pytest.raises(InvalidStateError):
        future.set_exception(ValueError())
    assert future.exception() is error


def test_running_twice_or_after_the_end_is_an_error() -> None:
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    with pytest.raises((RuntimeError, InvalidStateError)):
        future.set_running_or_notify_cancel()
    done: Future[Any] = Future()
    done.set_result(1)
    with pytest.raises((RuntimeError, InvalidStateError)):
        done.set_running_or_notify_cancel()
    cancelled: Future[Any] = Future()
    cancelled.cancel()
    assert cancelled.set_running_or_notify_cancel() is False
    with pytest.raises(InvalidStateError):
        cancelled.set_result(1)


# ------------------------------------------------------------------------------------------------------------ callbacks


def test_callbacks_in_the_order_in_which_they_were_added() -> None:
    future: Future[Any] = Future()
    seen: list[Any] = []
    for number in range(5):
        future.add_done_callback(lambda done, number=number: seen.append((number, done.result())))
    assert seen == []
    settle(future, value("v"))
    assert seen == [(number, "v") for number in range(5)]
    future.add_done_callback(lambda done: seen.append("late"))
    assert seen[-1] == "late", "at once, here"


def test_a_callback_that_raises_is_logged_and_costs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    future: Future[Any] = Future()
    seen: list[int] = []

    def bad(done: Any) -> None:
        raise ZeroDivisionError("in the callback")

    future.add_done_callback(bad)
    future.add_done_callback(lambda done: seen.append(1))
    settle(future, value(1))
    future.add_done_callback(bad)
    assert seen == [1]
    assert caplog.text.count("in the callback") >= 2


def test_callbacks_run_for_a_cancel_and_a_set_result() -> None:
    for end in (lambda future: future.cancel(), lambda future: future.set_result(1)):
        future: Future[Any] = Future()
        seen: list[Any] = []
        future.add_done_callback(seen.append)
        end(future)
        assert seen == [future]


def test_a_callback_may_add_a_callback() -> None:
    future: Future[Any] = Future()
    seen: list[str] = []

    def first(done: Any) -> None:
        seen.append("first")
        done.add_done_callback(lambda _: seen.append("second"))

    future.add_done_callback(first)
    settle(future, value(1))
    assert seen == ["first", "second"]


# ----------------------------------------------------------------------------- under the standard library's own helpers


def test_wait_and_as_completed(loop: IoLoop) -> None:
    futures: list[Future[Any]] = [Future() for _ in range(6)]
    for future in futures[:4]:
        future._call = FakeCall(loop)
    futures[4].set_result(4)
    futures[5].cancel()
    for number, future in enumerate(futures[:4]):
        outcome = failure(ValueError(str(number))) if number == 2 else value(number)
        loop.call_later(0.01 * (4 - number), lambda future=future, outcome=outcome: future._settle(outcome))
    done, pending = wait(futures, PATIENCE)
    assert done == set(futures) and not pending
    assert sorted(map(id, as_completed(futures, PATIENCE))) == sorted(map(id, futures)), "each one once"


def test_wait_first_exception_sees_an_error_that_is_still_serialised(loop: IoLoop) -> None:
    futures: list[Future[Any]] = [Future() for _ in range(3)]
    for future in futures:
        future._call = FakeCall(loop)
    loop.call_later(0.02, lambda: futures[0]._settle(value(0)))
    loop.call_later(0.04, lambda: futures[1]._settle(failure(ValueError())))
    done, pending = wait(futures, PATIENCE, concurrent.futures.FIRST_EXCEPTION)
    assert pending == {futures[2]} and done == {futures[0], futures[1]}
    done, pending = wait(futures, PATIENCE, concurrent.futures.FIRST_EXCEPTION)
    assert pending == {futures[2]}, "also when it was there before"


def test_wait_first_completed_and_time_limits(loop: IoLoop) -> None:
    futures: list[Future[Any]] = [Future() for _ in range(3)]
    for future in futures:
        future._call = FakeCall(loop)
    done, pending = wait(futures, 0.01)
    assert not done and pending == set(futures)
    with pytest.raises(TimeoutError):
        next(as_completed(futures, 0.01))
    loop.call_soon(lambda: futures[1]._settle(value(1)))
    done, pending = wait(futures, PATIENCE, concurrent.futures.FIRST_COMPLETED)
    assert done == {futures[1]}


def test_as_completed_sees_cancelled_ones(loop: IoLoop) -> None:
    futures: list[Future[Any]] = [Future() for _ in range(3)]
    for future in futures:
        future._call = FakeCall(loop)
    loop.call_later(0.02, lambda: futures[1]._settle(value(1)))
    timers = [threading.Timer(0.01 * number, futures[number].cancel) for number in (0, 2)]
    for timer in timers:
        timer.start()
    assert set(as_completed(futures, PATIENCE)) == set(futures)
    for timer in timers:
        timer.join(PATIENCE)


def test_await_and_wrap_future(loop: IoLoop) -> None:
    async def main() -> None:
        futures: list[Future[Any]] = [Future() for _ in range(5)]
        for future in futures:
            future._call = FakeCall(loop)
        loop.call_later(0.01, lambda: [settle(future, value(n)) for n, future in enumerate(futures[:3])])
        assert await futures[0] == 0
        assert await asyncio.gather(*(asyncio.wrap_future(future) for future in futures[1:3])) == [1, 2]
        assert await futures[0] == 0, "twice"
        loop.call_soon(lambda: settle(futures[3], failure(KeyError("k"))))
        with pytest.raises(KeyError):
            await futures[3]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(futures[4]), 0.01)
        assert futures[4].cancelled(), "asyncio cancels what it wrapped"

    asyncio.run(main())


def test_await_of_a_cancelled_one() -> None:
    async def main() -> None:
        future: Future[Any] = Future()
        future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await future

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------------- races


def test_race_of_settling_and_waiting(loop: IoLoop, quick_switches: None) -> None:
    """Nobody sleeps on, whatever the order; each kind of waiter at once."""
    for number in range(150):
        future: Future[Any] = Future()
        leading = number % 2 == 1
        future._call = FakeCall(loop if leading else None)
        seen: list[Any] = []
        ran = threading.Event()
        future.add_done_callback(lambda done: ran.set())

        def settle_it() -> None:
            if leading:
                loop.call_soon(lambda: settle(future, value(number)))
            else:
                settle(future, value(number))

        results = in_threads(
            settle_it,
            lambda: future.result(PATIENCE),
            lambda: len(wait([future], PATIENCE).done),
            lambda: [done.result() for done in as_completed([future], PATIENCE)],
            lambda: future.add_done_callback(lambda done: seen.append(done.result())),
        )
        assert results == [None, number, 1, [number], None]
        assert ran.wait(PATIENCE)
        assert leading or seen == [number], "the callback ran once"


def test_race_of_cancelling_and_settling(quick_switches: None) -> None:
    """One of the two wins, and everybody agrees on who."""
    wins = 0
    for number in range(300):
        future: Future[Any] = Future()
        seen: list[str] = []
        future.add_done_callback(lambda done: seen.append("cancelled" if done.cancelled() else "value"))
        results = in_threads(future.cancel, lambda: future.set_result(number), lambda: wait([future], PATIENCE))
        assert len(seen) == 1
        if future.cancelled():
            wins += 1
            assert results[0] is True and isinstance(results[1], InvalidStateError)
        else:
            assert results[0] is False and results[1] is None and future.result() == number
        assert seen == ["cancelled" if future.cancelled() else "value"]
    assert wins <= 300


def test_race_of_setting_results(quick_switches: None) -> None:
    """Exactly one set_result succeeds, and its value stays."""
    for _ in range(300):
        future: Future[Any] = Future()
        setters = [lambda number=number: future.set_result(number) for number in range(3)]
        results = in_threads(*setters)
        winners = [number for number, result in enumerate(results) if result is None]
        assert len(winners) == 1, results
        assert all(isinstance(result, InvalidStateError) for result in results if result is not None)
        assert future.result() == winners[0]


def test_race_of_adding_callbacks(quick_switches: None) -> None:
    """Each callback runs exactly once, from whichever thread."""
    for number in range(100):
        future: Future[Any] = Future()
        seen: list[int] = []

        def add(start: int) -> None:
            for offset in range(20):
                future.add_done_callback(lambda _, tag=start + offset: seen.append(tag))

        in_threads(lambda: add(0), lambda: add(100), lambda: settle(future, value(number)))
        assert sorted(seen) == [*range(20), *range(100, 120)]


def test_race_of_decoding(quick_switches: None) -> None:
    """The value is decoded once: everybody gets the same object."""
    for _ in range(100):
        future: Future[Any] = Future()
        settle(future, value([1, 2]))
        results = in_threads(*[lambda: id(future.result())] * 4)
        assert len(set(results)) == 1


def test_random_operations_end(loop: IoLoop, quick_switches: None) -> None:
    """Many futures, settled by the leader while threads wait, cancel and look: all end, as one thing."""
    chance = random.Random(5)
    futures: list[Future[Any]] = [Future() for _ in range(400)]
    for future in futures:
        future._call = FakeCall(loop, cancellable=False)

    def settle_all() -> None:
        for number, future in enumerate(futures):
            pause = chance.random() * 0.1
            outcome = value(number)
            loop.call_later(pause, lambda future=future, outcome=outcome: future._settle(outcome))

    def poke() -> int:
        mine = random.Random(threading.get_ident())
        total = 0
        for future in mine.sample(futures, len(futures)):
            future.cancel()
            future.running()
            total += future.result(PATIENCE)
        return total

    total = sum(range(len(futures)))
    results = in_threads(settle_all, poke, poke, lambda: sum(f.result() for f in as_completed(futures, PATIENCE)))
    assert results == [None, total, total, total]


def test_many_values_at_once() -> None:
    futures: list[Future[Any]] = [Future() for _ in range(5)]
    told: list[Any] = []
    futures[1].add_done_callback(told.append)
    futures[2].cancel()
    assert futures[3]._condition is not None  # somebody waits as the standard library does
    assert set_values(futures, [0, 1, 2, 3, None]) == [1, 2, 3]
    assert [future.done() for future in futures] == [True, False, True, False, True]
    assert futures[0].result(0) == 0 and futures[4].result(0) is None and futures[4].exception(0) is None
    assert futures[2].cancelled() and not told


def test_whoever_comes_while_many_values_are_set_is_woken() -> None:
    """Sleepers, callbacks and waiters that register in any moment hear of the end, once."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(150):
            futures: list[Future[Any]] = [Future() for _ in range(40)]
            told: list[Any] = []
            ended: list[bool] = []

            def wait(futures: Any = futures, told: Any = told, ended: Any = ended, number: int = number) -> None:
                chosen = futures[number % 40]
                chosen.add_done_callback(told.append)
                first = futures[number % 3].result(PATIENCE)  # sleeps without a Condition
                done, _ = concurrent.futures.wait(futures[20:], PATIENCE)
                ended.append(first == number % 3 and len(done) == 20 and chosen.result(PATIENCE) == number % 40)

            thread = threading.Thread(target=wait)
            thread.start()
            for index in set_values(futures, list(range(40))):
                if futures[index]._settle(Outcome(LOCAL_VALUE, index, (), 2)):
                    futures[index]._run_callbacks()
            thread.join(PATIENCE)
            assert ended == [True] and told == [futures[number % 40]]
    finally:
        sys.setswitchinterval(before)


def test_two_puts_at_the_same_time() -> None:
    """The second one fails as one that comes later."""
    future: Future[str] = Future()
    finish = future._finish

    def second(*arguments: object) -> bool:
        finish(FINISHED, None, "first")
        return finish(*arguments)  # type: ignore[arg-type]

    future._finish = second  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="set only once"):
        future.put("second")
    assert future.result(0) == "first"
