"""The I/O loop: who leads, who may take the lead, timers, and Ctrl-C in the main thread."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from distpool.transport import ioloop, polling
from distpool.transport.ioloop import IoLoop

PATIENCE = 30.0


@pytest.fixture(params=["epoll", "selector"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[IoLoop]:
    """A loop without its thread; both pollers."""
    if request.param == "selector":
        monkeypatch.setattr(polling, "Epoll", polling.Selector)
    elif not hasattr(polling.select, "epoll"):
        pytest.skip("no epoll here")
    made = IoLoop("test-io")
    yield made
    made.stop()


@pytest.fixture
def started(loop: IoLoop) -> IoLoop:
    loop.start()
    return loop


def soon(loop: IoLoop) -> None:
    """A round trip over whoever leads."""
    done = threading.Event()
    loop.call_soon(done.set)
    assert done.wait(PATIENCE), "nobody leads"


def lead_in_thread(loop: IoLoop, until: Any) -> tuple[threading.Thread, list[bool]]:
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(loop.lead(until)), daemon=True)
    thread.start()
    return thread, answers


# -------------------------------------------------------------------------------------------------- work for the leader


def test_call_soon_keeps_the_order_and_runs_on_the_leader(started: IoLoop) -> None:
    seen: list[int] = []
    leads: list[bool] = []
    for number in range(100):
        started.call_soon(lambda number=number: seen.append(number))
    started.call_soon(lambda: leads.append(started.leads))
    soon(started)
    assert seen == list(range(100)) and leads == [True] and not started.leads


def test_call_soon_from_many_threads(started: IoLoop) -> None:
    seen: list[int] = []

    def call() -> None:
        for _ in range(500):
            started.call_soon(lambda: seen.append(1))

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    soon(started)
    assert len(seen) == 3000


def test_call_soon_inside_call_soon_is_another_round(started: IoLoop) -> None:
    """A callback that asks for itself again must not keep the sockets waiting."""
    reader, writer = socket.socketpair()
    got = threading.Event()
    turns = 0

    def again() -> None:
        nonlocal turns
        turns += 1
        if not got.is_set():
            started.call_soon(again)

    def on_readable() -> None:
        reader.recv(10)
        got.set()

    started.register(reader, on_readable)
    started.call_soon(again)
    writer.send(b"x")
    assert got.wait(PATIENCE)
    soon(started)
    started.unregister(reader)
    soon(started)
    reader.close()
    writer.close()
    assert turns >= 1


def test_timers_in_their_order(started: IoLoop) -> None:
    seen: list[str] = []
    done = threading.Event()
    begin = time.monotonic()
    started.call_later(0.06, lambda: (seen.append("late"), done.set()))
    started.call_later(0.02, lambda: seen.append("early"))
    started.call_later(0.02, lambda: seen.append("early too"))
    cancelled = started.call_later(0.01, lambda: seen.append("never"))
    cancelled.cancel()
    cancelled.cancel()
    started.call_later(-5, lambda: seen.append("at once"))
    assert done.wait(PATIENCE)
    assert seen == ["at once", "early", "early too", "late"]
    assert time.monotonic() - begin >= 0.06


@pytest.mark.parametrize("seconds", [10.0**7, 10.0**9, float("inf")])
def test_timers_of_any_length(started: IoLoop, seconds: float) -> None:
    """epoll refuses more than 24 days; the thread must survive that."""
    timer = started.call_later(seconds, lambda: None)
    soon(started)
    soon(started)
    timer.cancel()
    assert started.lead(lambda: False, time.monotonic() + 0.01)


def test_a_timer_from_another_thread_shortens_the_poll(started: IoLoop) -> None:
    soon(started)
    done = threading.Event()
    begin = time.monotonic()
    started.call_later(0.01, done.set)
    assert done.wait(PATIENCE) and time.monotonic() - begin < 5


class Short:
    """A socket in a system that has no memory, so many times."""

    def __init__(self, sock: socket.socket, times: int) -> None:
        self._sock, self._left = sock, times

    def send(self, data: bytes) -> int:
        self._left -= 1
        if self._left >= 0:
            raise OSError(errno.ENOBUFS, "no buffer space available")
        return self._sock.send(data)

    def close(self) -> None:
        self._sock.close()


@pytest.mark.parametrize("times", [1, 1000])
def test_a_wake_that_there_is_no_memory_for(started: IoLoop, times: int) -> None:
    """It counted as one that was on its way, so that no later one was sent."""
    if not started._poller.live:
        pytest.skip("it does not see changes while it waits")
    soon(started)
    started._wake_writer = Short(started._wake_writer, times)  # type: ignore[assignment]
    for _ in range(20):
        soon(started)
    rounds: list[None] = []
    started.on_tick = lambda: rounds.append(None)
    for _ in range(20):
        soon(started)
    assert len(rounds) < 100, "it sleeps in between"


def test_errors_of_handlers_are_told_and_cost_nothing_else(started: IoLoop, caplog: pytest.LogCaptureFixture) -> None:
    crashes: list[BaseException] = []
    started.on_crash = crashes.append
    reader, writer = socket.socketpair()

    def on_readable() -> None:
        reader.recv(10)
        raise KeyError("handler")

    with caplog.at_level(logging.ERROR):
        started.register(reader, on_readable)
        writer.send(b"x")
        started.call_soon(lambda: 1 / 0)
        started.call_later(0, lambda: [][1])
        deadline = time.monotonic() + PATIENCE
        while len(crashes) < 3 and time.monotonic() < deadline:
            soon(started)
    assert sorted(type(error).__name__ for error in crashes) == ["IndexError", "KeyError", "ZeroDivisionError"]
    assert "internal error" in caplog.text
    started.unregister(reader)
    reader.close()
    writer.close()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_is_thrown_into_the_io_thread_does_not_end_it(started: IoLoop, kind: type[BaseException]) -> None:
    """Programs end what their threads do by throwing exceptions into them. Whoever waits for the handler that it has
    met hears of it; outside of handlers nothing is lost."""
    crashes: list[BaseException] = []
    started.on_crash = crashes.append
    thread = started._thread
    assert thread is not None

    def throw() -> None:
        raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
        assert raise_in(ctypes.c_ulong(thread.ident), ctypes.py_object(kind)) == 1  # type: ignore[arg-type]

    def raises() -> None:
        raise kind

    for _ in range(20):  # more often than a broken poller may fail
        started.call_soon(raises)
        soon(started)
        throw()
        soon(started)
    assert thread.is_alive()
    assert len(crashes) >= 20 and {type(error) for error in crashes} == {kind}


@pytest.mark.parametrize("fails", ["log", "on_crash", "both"])
def test_no_memory_to_tell_of_an_error(started: IoLoop, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """Those who wait are told before `logging` is loaded, and what telling and logging raise ends no thread."""

    def no_memory(*args: Any, **options: Any) -> None:
        raise MemoryError

    crashes: list[BaseException] = []

    def on_crash(error: BaseException) -> None:
        crashes.append(error)
        if fails != "log":
            raise MemoryError

    started.on_crash = on_crash
    if fails != "on_crash":
        monkeypatch.setattr(ioloop, "log", types.SimpleNamespace(error=no_memory, exception=no_memory))
    thread = started._thread
    assert thread is not None
    started.call_soon(lambda: 1 / 0)
    soon(started)
    assert type(crashes[0]) is ZeroDivisionError

    def tick() -> None:  # outside of handlers
        started.on_tick = None
        raise KeyError("tick")

    started.on_tick = tick
    soon(started)
    soon(started)
    assert "KeyError" in [type(error).__name__ for error in crashes] and thread.is_alive()


def test_who_leads_hears_of_what_was_thrown_at_him(loop: IoLoop) -> None:
    crashes: list[BaseException] = []
    loop.on_crash = crashes.append

    def raises() -> None:
        raise SystemExit

    loop.call_soon(raises)
    with pytest.raises(SystemExit):
        loop.lead(lambda: False, time.monotonic() + PATIENCE)
    assert len(crashes) == 1
    done: list[bool] = []
    loop.call_soon(lambda: done.append(True))
    assert loop.lead(lambda: bool(done), time.monotonic() + PATIENCE) and done


def test_register_and_unregister(started: IoLoop) -> None:
    reader, writer = socket.socketpair()
    seen: list[bytes] = []
    events: list[int] = []
    got = threading.Event()
    started.register(reader, lambda: (seen.append(reader.recv(100)), got.set()))
    writer.send(b"one")
    assert got.wait(PATIENCE) and seen == [b"one"]
    started.unregister(reader)
    started.unregister(reader)
    writer.send(b"two")
    soon(started)
    assert seen == [b"one"]
    writable = threading.Event()

    def on_event(found: int) -> None:
        events.append(found)
        if found & 2:
            started.want_write(writer, False)
            writable.set()

    started.register_link(writer, on_event)
    soon(started)
    assert events == []
    started.want_write(writer, True)
    assert writable.wait(PATIENCE)
    soon(started)
    assert not any(found & 1 for found in events)
    started.unregister(writer)
    started.want_write(writer, True)
    reader.close()
    writer.close()


# -------------------------------------------------------------------------------------------------------------- leading


def test_lead_without_an_io_thread(loop: IoLoop) -> None:
    seen: list[int] = []
    loop.call_later(0.01, lambda: seen.append(1))
    assert loop.lead(lambda: bool(seen))
    assert seen == [1] and not loop.leads


def test_lead_ends_at_its_deadline(started: IoLoop) -> None:
    begin = time.monotonic()
    assert started.lead(lambda: False, begin + 0.05)
    assert 0.04 < time.monotonic() - begin < 5
    begin = time.monotonic()
    started.lead(lambda: False, begin - 1)
    assert time.monotonic() - begin < 5, "a deadline that has passed"
    assert started.lead(lambda: True)


def test_a_claimant_takes_the_lead_and_gives_it_back(started: IoLoop) -> None:
    mine = 0
    for _ in range(20):
        here: list[int] = []
        started.call_later(0.01, lambda here=here: here.append(threading.get_ident()))
        assert started.lead(lambda here=here: bool(here))
        assert len(here) == 1
        mine += here == [threading.get_ident()]
    assert mine > 5, "the claimant runs the handlers itself"
    soon(started)


def test_only_one_claimant_leads(started: IoLoop) -> None:
    """The others are told so, and wait by other means; they are not forgotten."""
    release = threading.Event()
    leading = threading.Event()
    first, answers = lead_in_thread(started, lambda: (leading.set(), release.is_set())[1])
    assert leading.wait(PATIENCE)
    assert started.lead(lambda: False, time.monotonic() + 5) is False
    done = threading.Event()
    with started.following():
        started.call_soon(done.set)
        assert done.wait(PATIENCE)
        release.set()
        started.wake()
        first.join(PATIENCE)
        assert answers == [True]
        again = threading.Event()
        started.call_soon(again.set)
        assert again.wait(PATIENCE), "the I/O thread took over"


def test_the_io_thread_comes_back_when_claimants_are_gone(started: IoLoop) -> None:
    for _ in range(30):
        started.lead(lambda: True)
        started.lead(lambda: False, time.monotonic() + 0.001)
        done = threading.Event()
        started.call_later(0.0, done.set)
        assert done.wait(PATIENCE)


def test_hurry(started: IoLoop) -> None:
    started.lead(lambda: True)
    started.hurry()
    soon(started)


def test_many_claimants_and_followers(started: IoLoop) -> None:
    """Threads that wait for events which others bring about by the loop: none may sleep on."""
    counters = [0] * 8
    failures: list[str] = []

    def work(number: int) -> None:
        for _ in range(150):
            arrived = threading.Event()
            started.call_soon(arrived.set)
            if number % 2 and started.lead(arrived.is_set, time.monotonic() + PATIENCE):
                if not arrived.is_set():
                    failures.append(f"leader {number}")
                    return
            else:
                with started.following():
                    if not arrived.wait(PATIENCE):
                        failures.append(f"follower {number}")
                        return
            counters[number] += 1

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failures and counters == [150] * 8


def test_handlers_never_run_at_the_same_time(started: IoLoop) -> None:
    inside = 0
    worst = 0

    def handler() -> None:
        nonlocal inside, worst
        inside += 1
        worst = max(worst, inside)
        for _ in range(50):
            pass
        inside -= 1

    def work() -> None:
        for number in range(200):
            started.call_soon(handler)
            if number % 3 == 0:
                started.lead(lambda: True, time.monotonic() + 1)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    soon(started)
    assert worst == 1


def test_an_error_of_the_condition_gives_the_lead_back(started: IoLoop) -> None:
    with pytest.raises(ZeroDivisionError):
        started.lead(lambda: 1 / 0 > 0)
    soon(started)
    assert started.lead(lambda: True)


def test_the_leader_may_not_claim_again(started: IoLoop) -> None:
    answers: list[bool] = []
    started.call_soon(lambda: answers.append(started.lead(lambda: True)))
    soon(started)
    assert answers == [False]


def test_a_glance_runs_what_is_ready_and_does_not_wait(loop: IoLoop) -> None:
    here, there = socket.socketpair()
    with here, there:
        got: list[tuple[bytes, int]] = []
        loop.register(here, lambda: got.append((here.recv(10), threading.get_ident())))
        begin = time.monotonic()
        loop.glance()
        assert got == [] and time.monotonic() - begin < 5, "nothing has come"
        there.send(b"one")
        loop.glance()
        assert got == [(b"one", threading.get_ident())] and not loop.leads
        loop.unregister(here)


def test_a_glance_where_another_thread_leads(started: IoLoop) -> None:
    """Nothing is waited for, and nothing is lost."""
    release, leading = threading.Event(), threading.Event()
    first, answers = lead_in_thread(started, lambda: (leading.set(), release.is_set())[1])
    assert leading.wait(PATIENCE)
    started.glance()
    release.set()
    started.wake()
    first.join(PATIENCE)
    assert answers == [True]
    soon(started)
    answers.clear()
    started.call_soon(lambda: answers.append(started.glance() is None))  # type: ignore[func-returns-value]
    soon(started)
    assert answers == [True], "on the leader itself"


def test_a_glance_of_who_may_not_wait(loop: IoLoop) -> None:
    """A finalizer that runs while its thread has a lock which handlers take."""
    loop.held.append(lambda: True)
    ran: list[int] = []
    loop.call_soon(lambda: ran.append(1))
    loop.glance()
    assert ran == []
    loop.held.pop()
    loop.glance()
    assert ran == [1]


def test_ticks_set_the_length_of_the_poll(loop: IoLoop) -> None:
    ticks: list[int] = []

    def tick() -> float:
        ticks.append(1)
        return 0.001

    loop.on_tick = tick
    loop.start()
    deadline = time.monotonic() + PATIENCE
    while len(ticks) < 10:
        assert time.monotonic() < deadline
        soon(loop)


def test_stop_ends_the_thread_and_closes_everything() -> None:
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    loop = IoLoop("ends")
    loop.start()
    soon(loop)
    loop.stop()
    assert not any(thread.name == "ends" for thread in threading.enumerate())
    if before:
        assert set(os.listdir("/proc/self/fd")) <= before
    loop.call_soon(lambda: None)
    loop.wake()


# --------------------------------------------------------------------------------------------------------------- Ctrl-C


def run_program(text: str, timeout: float = 50.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(text)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_random_interrupts_lose_no_event_and_leave_no_lock() -> None:
    """A child's main thread leads, follows and enters critical regions, and is hit by one SIGINT after the other.

    Each interrupt must be raised once. An event that never comes, or a loop that nobody can lead or wake any more, is
    an error. The child says when it is ready for the next one, so that none hits its own bookkeeping.
    """
    program = textwrap.dedent("""
        import os, random, signal, sys, threading, time
        from distpool.transport.ioloop import IoLoop
        loop = IoLoop(); loop.start()
        hits = expected = 0
        counter = []
        def work():
            global expected
            end = time.monotonic() + 20
            os.write(1, b"r")
            while time.monotonic() < end:
                arrived = threading.Event()
                loop.call_later(random.random() * 0.002, arrived.set)
                if not loop.lead(arrived.is_set, time.monotonic() + 20):
                    with loop.following():
                        arrived.wait(20)
                if loop.enter_critical():
                    counter.append(1)
                    expected += 1
                    loop.leave_critical()
            sys.exit("an interrupt was lost")
        while hits < int(sys.argv[1]):
            try:
                work()
            except KeyboardInterrupt:
                hits += 1
        assert len(counter) == expected, (len(counter), expected)
        for _ in range(3):
            done = threading.Event()
            loop.call_soon(done.set)
            assert done.wait(20), "nobody leads"
        done = threading.Event()
        loop.call_soon(done.set)
        assert loop.lead(done.is_set, time.monotonic() + 20) and done.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    """)
    hits = 500
    command = [sys.executable, "-c", program, str(hits)]
    chance = random.Random(4)
    pause = threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        sent = 0
        while os.read(child.stdout.fileno(), 1):
            pause.wait(chance.choice([0, 1e-5, 1e-4, 1e-3, 4e-3]) * chance.random())
            child.send_signal(signal.SIGINT)
            sent += 1
        errors = child.stderr.read().decode()
    assert (child.returncode, errors, sent) == (0, "", hits)


def test_one_interrupt_is_raised_once() -> None:
    done = run_program("""
        import _thread, os, signal, threading, time
        from distpool.transport.ioloop import IoLoop
        loop = IoLoop(); loop.start()
        seen = 0
        for number in range(50):
            # in the poll, in a handler, and inside a critical region
            try:
                loop.call_later(0.001, lambda: os.kill(os.getpid(), signal.SIGINT))
                loop.lead(lambda: False, time.monotonic() + 20)
            except KeyboardInterrupt:
                seen += 1
            try:
                assert loop.enter_critical()
                os.kill(os.getpid(), signal.SIGINT)
                inside = sum(range(1000))
                loop.leave_critical()
            except KeyboardInterrupt:
                seen += 1
                assert inside == 499500
        print(seen)
    """)
    assert (done.stdout, done.stderr) == ("100\n", "")


def test_what_other_handlers_raise_does_not_tear_ours() -> None:
    """A `SIGALRM` that limits what the program does, a `SIGTERM` that calls `sys.exit`."""
    done = run_program("""
        import os, signal, threading, time
        from distpool.transport.ioloop import IoLoop
        class Alarm(Exception): pass
        def handler(*_): raise Alarm
        signal.signal(signal.SIGALRM, handler)
        loop = IoLoop(); loop.start()
        crashed = []; loop.on_crash = crashed.append
        seen = whole = 0
        for number in range(50):
            def work():
                global whole
                os.kill(os.getpid(), signal.SIGALRM)
                for _ in range(100): pass
                whole += 1
            try:
                loop.call_later(0.001, work)
                loop.lead(lambda: False, time.monotonic() + 20)
            except Alarm:
                seen += 1
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.001)  # in the poll
                loop.lead(lambda: False, time.monotonic() + 20)
            except Alarm:
                seen += 1
        assert signal.getsignal(signal.SIGALRM) is handler
        print(seen, whole, crashed)
    """)
    assert (done.stdout, done.stderr) == ("100 50 []\n", "")


def test_a_handler_of_the_users_own_keeps_the_main_thread_from_leading() -> None:
    done = run_program("""
        import os, signal, threading, time
        from distpool.transport.ioloop import IoLoop
        loop = IoLoop(); loop.start()
        seen = []
        signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        assert loop.lead(lambda: True) is False and loop.enter_critical() is False
        os.kill(os.getpid(), signal.SIGINT)
        assert seen == [1]
        done = threading.Event(); loop.call_soon(done.set); assert done.wait(20)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(loop.lead(lambda: True)))
        thread.start(); thread.join(20)
        assert answers == [True]
        print("well")
    """)
    assert (done.stdout, done.stderr) == ("well\n", "")


def test_workers_own_their_interrupts() -> None:
    """With a handler of the library's own in place, leading is always possible."""
    done = run_program("""
        import signal, time
        from distpool.transport.ioloop import IoLoop
        signal.signal(signal.SIGINT, lambda *_: None)
        loop = IoLoop(); loop.owns_interrupts = True
        assert loop.lead(lambda: False, time.monotonic() + 0.01)
        assert loop.enter_critical(); loop.leave_critical()
        print("well")
    """)
    assert (done.stdout, done.stderr) == ("well\n", "")


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no signals to be sent")
def test_a_signal_in_the_middle_of_a_handler_is_raised_behind_it() -> None:
    """What the user's handler raises was taken for a defect of the I/O handler, which it had torn."""

    class Alarm(Exception):
        pass

    def raising(signum: int, frame: Any) -> None:
        raise Alarm

    done: list[str] = []

    def handler() -> None:
        signal.raise_signal(signal.SIGUSR1)
        done.append("to its end")

    loop, crashes = IoLoop(), list[Exception]()
    loop.on_crash = crashes.append
    before = signal.signal(signal.SIGUSR1, raising)
    try:
        loop.call_soon(handler)
        with pytest.raises(Alarm):
            loop.lead(lambda: False, time.monotonic() + PATIENCE)
        assert (done, crashes) == (["to its end"], [])
        loop.call_soon(lambda: done.append("and on"))
        assert loop.lead(lambda: len(done) == 2, time.monotonic() + PATIENCE) and len(done) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)
        loop.close_descriptors()
