"""distpool/node/interrupts.py: KeyboardInterrupt strikes user code, and inside the library it is noted."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from struck import Running, signal_in_the_import_system

from distpool.node.interrupts import Inside, Interrupts
from distpool.transport.ioloop import IoLoop


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    made = Interrupts()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, getattr(signal, "SIGURG", 0)) if number}
    made.take_signals()
    yield made
    for number, handler in previous.items():
        signal.signal(number, handler)


def test_user_code_on_another_thread_is_struck(interrupts: Interrupts) -> None:
    running = threading.Event()

    def spin() -> None:
        running.set()
        while True:
            pass

    result = Running(lambda: interrupts.call(spin, (), {}))
    assert running.wait(10)
    interrupts.strike()
    assert isinstance(result(), KeyboardInterrupt)


def test_user_code_on_the_main_thread_is_struck(interrupts: Interrupts) -> None:
    def sleep() -> None:
        Running(interrupts.strike)
        threading.Event().wait(20)

    with pytest.raises(KeyboardInterrupt):
        interrupts.call(sleep, (), {})
    assert not interrupts.main


def test_nothing_runs_nothing_happens(interrupts: Interrupts) -> None:
    interrupts.strike()
    assert interrupts.enter(None) is None
    assert interrupts.call(lambda: 1, (), {}) == 1
    assert Running(lambda: interrupts.call(lambda: 2, (), {}))() == 2


@pytest.mark.parametrize("on_main", [True, False])
def test_a_call_that_is_expected_is_struck_before_it_begins(interrupts: Interrupts, on_main: bool) -> None:
    ran: list[int] = []
    coming, later = interrupts.expect(), interrupts.expect()
    interrupts.forget(later)
    interrupts.strike()

    def begin() -> None:
        interrupts.call(ran.append, (1,), {}, coming)

    with pytest.raises(KeyboardInterrupt):
        if on_main:
            begin()
        else:
            raise Running(begin)()
    interrupts.call(ran.append, (2,), {}, later)
    third = interrupts.expect()
    interrupts.call(ran.append, (3,), {}, third)
    assert ran == [2, 3], "only what was expected at that moment"


@pytest.mark.parametrize("on_main", [True, False])
def test_inside_the_library_it_is_noted(interrupts: Interrupts, on_main: bool) -> None:
    """Struck while it is inside, the thread goes on until `leave`; `wake` was called meanwhile."""
    reached: list[str] = []

    def call() -> None:
        woken = threading.Event()
        inside = interrupts.enter(woken.set)
        assert isinstance(inside, Inside) and interrupts.enter(None) is None, "entered once"
        Running(interrupts.strike)()
        assert woken.wait(10) and inside.struck
        for _ in range(1000):
            reached.append("inside")
        try:
            interrupts.leave(inside)
        finally:
            reached.append("left")
        reached.append("not this")

    if on_main:
        with pytest.raises(KeyboardInterrupt):
            interrupts.call(call, (), {})
    else:
        assert isinstance(Running(lambda: interrupts.call(call, (), {}))(), KeyboardInterrupt)
    assert reached == ["inside"] * 1000 + ["left"]


def test_a_signal_inside_the_library_is_noted(interrupts: Interrupts) -> None:
    def call() -> None:
        inside = interrupts.enter(None)
        assert inside is not None
        signal.raise_signal(signal.SIGINT)
        assert inside.struck
        interrupts.leave(inside)

    with pytest.raises(KeyboardInterrupt):
        interrupts.call(call, (), {})


def test_after_an_uninterrupted_stay_the_call_can_be_struck_again(interrupts: Interrupts) -> None:
    def call() -> str:
        inside = interrupts.enter(None)
        assert inside is not None
        interrupts.leave(inside)
        assert interrupts.main
        return "through"

    assert interrupts.call(call, (), {}) == "through"
    assert not interrupts.main


@pytest.mark.parametrize("leading", [True, False])
def test_waits_of_the_loop_end(interrupts: Interrupts, leading: bool) -> None:
    loop = IoLoop()
    loop.guard, loop.owns_interrupts = interrupts, True  # as in a worker
    waits = threading.Event()

    def call() -> None:
        if leading:
            loop.call_soon(waits.set)
            loop.lead(lambda: False)
            return
        lock = threading.Lock()
        lock.acquire()
        with loop.following(lock.release):
            waits.set()
            lock.acquire()

    try:
        result = Running(lambda: interrupts.call(call, (), {}))
        assert waits.wait(10)
        interrupts.strike()
        assert isinstance(result(), KeyboardInterrupt)
        assert loop.lead(lambda: True), "the lead was given back"
    finally:
        loop.close_descriptors()


def test_a_storm_leaves_nothing_behind(interrupts: Interrupts) -> None:
    """Struck at any moment, a call is either through or interrupted, and its thread is nobody's any more."""
    ended: list[type[BaseException] | None] = []
    over = threading.Event()

    def call() -> None:
        for _ in range(20):
            inside = interrupts.enter(None)
            assert inside is not None
            interrupts.leave(inside)

    def work() -> None:
        for _ in range(500):
            try:
                interrupts.call(call, (), {})
                ended.append(None)
            except KeyboardInterrupt:
                ended.append(KeyboardInterrupt)
        over.set()

    result = Running(work)
    while not over.is_set():
        interrupts.strike()
    assert result() is None and len(ended) == 500
    assert not interrupts._beside and not interrupts._inside


# -- the import system -------------------------------------------------------------------------------------------


@pytest.fixture
def slow_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """A module `slow_one`: events that say that it is being imported, and let it end."""
    (tmp_path / "slow_one.py").write_text("import sys\nbegun, go = sys.slow_events\nbegun.set()\nassert go.wait(20)\n")
    monkeypatch.syspath_prepend(tmp_path)
    events = threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "slow_events", events, raising=False)
    yield events
    sys.modules.pop("slow_one", None)


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def in_importlib(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    return frame is not None and frame.f_code.co_filename.startswith("<frozen importlib")


def test_a_thread_in_the_import_system_is_struck_when_it_is_through(
    interrupts: Interrupts, slow_module: tuple[threading.Event, threading.Event]
) -> None:
    """It waits for the module that another thread imports. Struck there, it would leave the module locked."""
    begun, go = slow_module
    looks: list[None] = []
    interrupts.again = lambda seconds: looks.append(None)
    importing = Running(lambda: __import__("slow_one"))
    assert begun.wait(20)
    reached: list[int] = []

    def call() -> None:
        reached.append(threading.get_ident())
        import slow_one

        reached.append(slow_one.__name__ == "slow_one")
        while True:
            pass

    result = Running(lambda: interrupts.call(call, (), {}))
    until(lambda: reached and in_importlib(reached[0]))
    interrupts.strike()
    assert len(looks) == 1
    interrupts.strike_missed()
    assert len(looks) == 2, "it is there still"
    go.set()
    until(lambda: len(reached) == 2)
    interrupts.strike_missed()
    assert isinstance(result(), KeyboardInterrupt)
    assert importing().__name__ == "slow_one"
    interrupts.strike_missed()
    assert len(looks) == 2


def test_the_next_call_is_not_struck_for_one_that_was_missed(
    interrupts: Interrupts, slow_module: tuple[threading.Event, threading.Event]
) -> None:
    begun, go = slow_module
    importing = Running(lambda: __import__("slow_one"))
    assert begun.wait(20)
    threads: list[int] = []
    second = threading.Event()

    def call() -> int:
        threads.append(threading.get_ident())
        return len(__import__("slow_one").__name__)

    def both() -> Any:
        first = interrupts.call(call, (), {})
        return first, interrupts.call(second.wait, (20,), {})

    result = Running(both)
    until(lambda: threads and in_importlib(threads[0]))
    interrupts.strike()
    go.set()
    importing()
    until(lambda: not in_importlib(threads[0]))
    interrupts.strike_missed()
    second.set()
    assert result() == (8, True)


def test_a_signal_in_the_import_system_is_missed(interrupts: Interrupts) -> None:
    looks: list[None] = []
    interrupts.again = lambda seconds: looks.append(None)

    def call() -> str:
        signal_in_the_import_system(interrupts.on_signal)
        assert interrupts.main and looks == [None]
        interrupts.strike_missed()
        return "not this"

    with pytest.raises(KeyboardInterrupt):
        interrupts.call(call, (), {})


def test_a_storm_leaves_no_module_locked(
    interrupts: Interrupts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads import the same modules again and again, and are struck at any moment. (Where the look at a
    thread and the strike were two steps, each tenth run left a module, or the import system, locked.)"""
    names = [f"struck_{number}" for number in range(8)]
    for name, following in itertools.pairwise((*names, "struck_last")):
        (tmp_path / f"{name}.py").write_text(f"import {following}\nfor _ in range(50):\n    pass\n")
    (tmp_path / "struck_last.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)  # finalizers are struck as well
    struck: list[None] = []
    over = threading.Event()

    def import_all() -> None:
        for name in (*names, "struck_last"):
            sys.modules.pop(name, None)
        importlib.import_module(names[0])

    def work() -> None:
        while not over.is_set():
            try:
                interrupts.call(import_all, (), {})
            except KeyboardInterrupt:
                struck.append(None)
            except (
                AttributeError,
                ImportError,
                KeyError,
            ):  # another thread has just removed what this one has imported
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    results = [Running(work) for _ in range(4)]
    try:
        end = time.monotonic() + 20
        while len(struck) < 500 and time.monotonic() < end:
            interrupts.strike()
    finally:
        over.set()
        sys.setswitchinterval(interval)
    for result in results:
        assert result() is None
    assert Running(import_all)() is None
    for name in (*names, "struck_last"):
        sys.modules.pop(name, None)
    assert struck


@pytest.mark.parametrize("on_main", [True, False])
def test_what_a_call_dies_of_that_could_not_be_struck_yet(
    interrupts: Interrupts, on_main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others were struck: it hears of their end, or misses the module that one of them was importing."""
    (tmp_path / "fails_late.py").write_text("import sys\nsys.strike_now()\nraise ValueError('of the module')\n")
    monkeypatch.syspath_prepend(tmp_path)
    looks: list[None] = []
    interrupts.again = lambda seconds: looks.append(None)

    def strike() -> None:
        if on_main:
            signal_in_the_import_system(interrupts.on_signal)
        else:
            interrupts._miss(threading.get_ident(), interrupts._beside[threading.get_ident()])

    monkeypatch.setattr(sys, "strike_now", strike, raising=False)

    def call() -> Any:
        with pytest.raises(KeyboardInterrupt) as info:
            interrupts.call(__import__, ("fails_late",), {})
        assert isinstance(info.value.__cause__, ValueError) and looks
        with pytest.raises(ValueError, match="its own"):
            interrupts.call(raising, (), {})
        interrupts.strike_missed()

    def raising() -> None:
        raise ValueError("its own")

    assert (call() if on_main else Running(call)()) is None


def test_a_thread_that_starts_another_one_is_struck_when_that_runs(interrupts: Interrupts) -> None:
    looks: list[None] = []
    interrupts.again = lambda seconds: looks.append(None)
    waits, go = threading.Event(), threading.Event()
    reached: list[str] = []

    class Slow(threading.Thread):
        """Says late that it has started: `start` waits as for one that nobody schedules."""

        def _bootstrap(self) -> None:
            waits.set()
            go.wait(20)
            super()._bootstrap()  # type: ignore[misc]

        def run(self) -> None:
            reached.append("run")

    def call() -> None:
        thread = Slow()
        thread.start()
        thread.join()
        while True:
            pass

    result = Running(lambda: interrupts.call(call, (), {}))
    assert waits.wait(20)
    interrupts.strike()
    assert len(looks) == 1
    go.set()
    until(lambda: reached)
    while interrupts._missed:
        interrupts.strike_missed()
    assert isinstance(result(), KeyboardInterrupt)


class Struck:
    """Its finalizer goes on until it is struck, which Python ignores."""

    def __init__(self, strike: Callable[[], object]) -> None:
        self.strike = strike

    def __del__(self) -> None:
        Running(self.strike)()
        while True:
            pass


@pytest.mark.parametrize("on_main", [True, False])
def test_a_strike_that_python_ignores_is_repeated(
    interrupts: Interrupts, on_main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: queue.SimpleQueue[bool] = queue.SimpleQueue()
    others: list[Any] = []
    interrupts.again = lambda seconds: looks.put(True)

    def strike_again() -> None:
        while looks.get(timeout=20):
            interrupts.strike_missed()

    monkeypatch.setattr(sys, "unraisablehook", others.append)
    interrupts.listen()
    reached: list[str] = []

    def call() -> None:
        Struck(interrupts.strike)
        reached.append("goes on")
        while True:
            pass

    again = Running(strike_again)
    if on_main:
        with pytest.raises(KeyboardInterrupt):
            interrupts.call(call, (), {})
    else:
        assert isinstance(Running(lambda: interrupts.call(call, (), {}))(), KeyboardInterrupt)
    looks.put(False)
    assert again() is None
    assert reached == ["goes on"] and not others


def test_other_exceptions_that_python_ignores_are_shown(
    interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails:
        def __del__(self) -> None:
            raise KeyError("shown")

    others: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: others.append(unraisable.exc_type))
    interrupts.listen()
    interrupts.call(lambda: Fails() and None, (), {})
    assert others == [KeyError]


# -- bookkeeping that must be whole ------------------------------------------------------------------------------


@pytest.mark.parametrize("on_main", [True, False])
def test_shielded(interrupts: Interrupts, on_main: bool) -> None:
    done: list[str] = []

    def bookkeeping() -> None:
        Running(interrupts.strike)()
        for _ in range(1000):
            done.append("whole")

    def call() -> None:
        interrupts.shielded(bookkeeping)
        done.append("not this")

    if on_main:
        with pytest.raises(KeyboardInterrupt):
            interrupts.call(call, (), {})
    else:
        assert isinstance(Running(lambda: interrupts.call(call, (), {}))(), KeyboardInterrupt)
    assert done == ["whole"] * 1000


def test_a_call_is_struck_that_the_main_thread_is_about_to_begin(interrupts: Interrupts) -> None:
    """Its arguments are decoded just now, for example."""
    ran: list[int] = []
    interrupts.begin()
    Running(interrupts.strike)()
    with pytest.raises(KeyboardInterrupt):
        interrupts.call(ran.append, (1,), {})
    interrupts.begin()
    interrupts.call(ran.append, (2,), {})
    assert ran == [2], "the next one is not"


def test_what_came_before_a_call_was_taken_on_does_not_strike_it(interrupts: Interrupts) -> None:
    ran: list[int] = []
    Running(interrupts.strike)()
    interrupts.begin()
    interrupts.call(ran.append, (1,), {})
    interrupts.begin()  # a call whose arguments cannot be decoded, so that it never begins
    Running(interrupts.strike)()
    interrupts.begin()
    interrupts.call(ran.append, (2,), {})
    assert ran == [1, 2]


def test_a_signal_that_comes_just_before_the_system_call_is_sent_again(
    interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`time.sleep` looks for signals when it was interrupted, and not before it begins to sleep."""
    real, sent = signal.pthread_kill, []
    waits: queue.SimpleQueue[float] = queue.SimpleQueue()
    interrupts.again = waits.put

    def send(thread: int, number: int) -> None:
        sent.append(number)
        if len(sent) > 3:  # before, it was too early
            real(thread, number)

    monkeypatch.setattr(signal, "pthread_kill", send)
    running = threading.Event()

    def call() -> None:
        running.set()
        time.sleep(60)

    def strike() -> list[float]:
        assert running.wait(10)
        interrupts.strike()
        found: list[float] = []
        with contextlib.suppress(queue.Empty):  # it has been heard
            while True:
                found.append(waits.get(timeout=1))
                interrupts.strike_missed()
        return found

    striking = Running(strike)
    with pytest.raises(KeyboardInterrupt):
        interrupts.call(call, (), {})
    found = striking()
    assert len(sent) >= 4 and found == sorted(found) and len(set(found)) >= 3, "less and less often"
    heard = len(sent)
    interrupts.strike_missed()
    assert len(sent) == heard, "it has been heard"


def test_a_handler_of_the_calls_own_hears_an_interrupt_once(interrupts: Interrupts) -> None:
    """Nobody says that it has: it was told again and again, and when the call was over, the next one was."""
    waits: queue.SimpleQueue[float] = queue.SimpleQueue()
    interrupts.again = waits.put
    running, over = threading.Event(), threading.Event()
    told: list[int] = []

    def handler(signum: int, frame: Any) -> None:
        told.append(signum)

    def call() -> None:
        ours = signal.signal(signal.SIGINT, handler)
        running.set()
        assert over.wait(20)
        signal.signal(signal.SIGINT, ours)

    def strike() -> None:
        assert running.wait(20)
        interrupts.strike()
        with contextlib.suppress(queue.Empty):  # it has been heard
            while True:
                waits.get(timeout=1)
                interrupts.strike_missed()
        over.set()

    striking = Running(strike)
    interrupts.call(call, (), {})
    assert striking() is None and len(told) == 1
    interrupts.call(interrupts.strike_missed, (), {})


@pytest.mark.parametrize("struck", [True, False])
def test_a_call_that_has_ended_leaves_nothing_pending(interrupts: Interrupts, struck: bool) -> None:
    """CPython 3.11 looks again and again in a traced thread if it believes that an exception is pending somewhere."""
    import ctypes  # what raises in other threads is there

    assert ctypes.pythonapi
    running, ended = threading.Event(), threading.Event()

    def call() -> None:
        running.set()
        while not ended.wait(0.001):
            pass

    result = Running(lambda: interrupts.call(call, (), {}))
    assert running.wait(10)
    if struck:
        interrupts.strike()
    else:
        ended.set()
    assert isinstance(result(), KeyboardInterrupt) is struck

    def traced() -> int:
        sys.settrace(lambda *_: None)
        try:
            return on_this_thread()
        finally:
            sys.settrace(None)

    def on_this_thread() -> int:
        return 1

    assert Running(traced)() == 1


def test_the_main_thread_is_struck_wherever_it_goes_meanwhile(interrupts: Interrupts) -> None:
    """It enters and leaves the library all the time: no look from outside says where it is at the next moment."""
    strikes = threading.Event()

    def call() -> None:
        strikes.set()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            inside = interrupts.enter(None)
            assert inside is not None
            interrupts.leave(inside)

    for _ in range(200):
        strikes.clear()
        striking = Running(lambda: strikes.wait(10) and interrupts.strike())
        with pytest.raises(KeyboardInterrupt):
            interrupts.call(call, (), {})
        striking()
