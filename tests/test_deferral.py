"""Signals in the main thread, inside and outside of the library's bookkeeping."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distpool.transport.deferral import Deferral

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs the signals of Unix")


class Alarm(Exception):
    pass


def alarm(signum: int, frame: Any) -> None:
    raise Alarm


@pytest.fixture
def deferral() -> Iterator[Deferral]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM, signal.SIGUSR1)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield Deferral()
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM, signal.SIGUSR1)]


def test_what_comes_inside_is_raised_at_the_end(deferral: Deferral) -> None:
    signal.signal(signal.SIGALRM, alarm)
    before = handlers()
    for number, error in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGALRM, Alarm)):
        assert deferral.enter() and deferral.enter()
        signal.raise_signal(number)
        deferral.leave()
        with pytest.raises(error):
            deferral.leave()
        assert handlers() == before and not deferral.depth


def test_what_comes_during_a_handler_in_the_poll_does_not_wait_for_its_end(deferral: Deferral) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGINT))
    deferral.enter()
    deferral.may_raise = True
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGUSR1)
    assert not deferral.may_raise, "the poll is over"
    deferral.leave()


def test_handlers_that_do_not_raise_run_once_with_their_frame(deferral: Deferral) -> None:
    seen: list[Any] = []
    signal.signal(signal.SIGUSR1, lambda signum, frame: seen.append((signum, frame.f_code.co_name)))
    deferral.enter()
    signal.raise_signal(signal.SIGUSR1)
    assert not seen
    deferral.deliver()
    assert seen == [(signal.SIGUSR1, "test_handlers_that_do_not_raise_run_once_with_their_frame")]
    deferral.leave()
    assert len(seen) == 1


def test_in_the_poll_they_run_at_once(deferral: Deferral) -> None:
    signal.signal(signal.SIGALRM, alarm)
    deferral.enter()
    deferral.may_raise = True
    for number, error in ((signal.SIGALRM, Alarm), (signal.SIGINT, KeyboardInterrupt)):
        deferral.may_raise = True
        with pytest.raises(error):
            signal.raise_signal(number)
        assert not deferral.may_raise, "what runs on the way out is bookkeeping"
    deferral.leave()


def test_a_poll_goes_on_after_a_handler_that_returns(deferral: Deferral) -> None:
    inside: list[bool] = []
    signal.signal(signal.SIGUSR1, lambda *_: inside.append(deferral.may_raise))
    deferral.enter()
    deferral.may_raise = True
    signal.raise_signal(signal.SIGUSR1)
    assert inside == [False], "what the handler calls is not to be torn"
    assert deferral.may_raise
    deferral.leave()


def test_all_are_put_back_although_several_raise(deferral: Deferral) -> None:
    signal.signal(signal.SIGALRM, alarm)
    signal.signal(signal.SIGUSR1, alarm)
    before = handlers()
    deferral.enter()
    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGUSR1):
        signal.raise_signal(number)
    with pytest.raises((Alarm, KeyboardInterrupt)):
        deferral.leave()
    assert handlers() == before and not deferral.late


def test_handlers_that_the_users_handler_installs_stay(deferral: Deferral) -> None:
    def once(signum: int, frame: Any) -> None:
        signal.signal(signum, signal.SIG_IGN)

    signal.signal(signal.SIGUSR1, once)
    deferral.enter()
    deferral.may_raise = True
    signal.raise_signal(signal.SIGUSR1)
    deferral.leave()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def test_the_users_own_handler_of_ctrl_c_is_left_alone(deferral: Deferral) -> None:
    signal.signal(signal.SIGINT, alarm)
    assert not deferral.enter()
    assert signal.getsignal(signal.SIGINT) is alarm
    assert deferral.enter(sigint=False), "workers have one of the library's own"
    assert signal.getsignal(signal.SIGINT) is alarm
    deferral.leave()


@pytest.mark.parametrize("moment", ["enter", "leave"])
def test_a_finalizer_in_the_middle_may_use_it(deferral: Deferral, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector runs a `__del__` between any two calls; it may send."""
    import _signal

    from distpool.transport import deferral as module

    class Nested:
        default_int_handler = _signal.default_int_handler
        getsignal = staticmethod(_signal.getsignal)

        @staticmethod
        def signal(number: int, handler: Any) -> Any:
            done = _signal.signal(number, handler)
            if not nested:
                nested.append(number)
                if deferral.enter():
                    deferral.leave()
                nested.pop()
            return done

    nested: list[int] = []
    signal.signal(signal.SIGALRM, alarm)
    before = handlers()
    if moment == "enter":
        monkeypatch.setattr(module, "_signal", Nested)
    assert deferral.enter()
    monkeypatch.setattr(module, "_signal", Nested if moment == "leave" else _signal)
    deferral.leave()
    assert handlers() == before and not deferral.depth


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("on_main", [False, True])
def test_a_forked_child_has_the_users_handlers(deferral: Deferral, on_main: bool) -> None:
    """The thread that was inside is not in the child, if another one has forked; else it will leave there too."""
    signal.signal(signal.SIGALRM, alarm)
    before = handlers()
    answers, writer = os.pipe()

    def fork() -> None:
        child = os.fork()
        if child == 0:
            deferral.forked()
            os.write(writer, b"%d%d" % (handlers() == before, deferral.depth))
            os._exit(0)
        os.waitpid(child, 0)

    deferral.enter()
    try:
        run: Callable[[], object] = fork if on_main else _in_thread(fork)
        run()
        assert select.select([answers], [], [], 30.0)[0]
        assert os.read(answers, 9) == (b"01" if on_main else b"10")
    finally:
        deferral.leave()
        os.close(answers)
        os.close(writer)


def _in_thread(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        thread = threading.Thread(target=function)
        thread.start()
        thread.join(30.0)

    return run
