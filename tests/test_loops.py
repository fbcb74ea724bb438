"""`distributed` loops and handles in a process that is alone (with workers: `conformance/test_distributed.py`)."""

from __future__ import annotations

import concurrent.futures
import gc
import operator
import subprocess
import sys
import threading
import weakref
from collections import UserList, deque
from typing import Any

import numpy as np
import pytest
from wires import wait_until

from distpool.errors import CompositeException, RemoteException
from distpool.loops import Loop, distributed, splitrange

PATIENCE = 30.0


def fail(number: Any) -> None:
    raise ValueError(number)


# -- parts ---------------------------------------------------------------------------------------------------------


def test_parts_are_contiguous_and_the_first_ones_longer() -> None:
    assert splitrange(1, 11, 3) == [range(1, 5), range(5, 9), range(9, 12)]
    assert splitrange(-2, -2, 5) == [range(-2, -1)], "none of them empty"
    assert splitrange(3, 2, 4) == splitrange(3, -9, 4) == []


@pytest.mark.parametrize("arguments", [(1.0, 2, 3), (1, "2", 3), (1, 2, None), (1, 2, 3.0)])
def test_numbers_must_be_whole(arguments: Any) -> None:
    with pytest.raises(TypeError):
        splitrange(*arguments)


def test_what_counts_as_a_whole_number() -> None:
    assert splitrange(np.int64(0), np.uint8(3), True) == [range(4)]
    for parts in (0, -1, False):
        with pytest.raises(ValueError, match="at least 1"):
            splitrange(0, 3, parts)


class Indexed:
    """Only what a sequence must have: no slices, an index from 0 to len - 1."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if not 0 <= operator.index(index) < 4:
            raise IndexError(index)
        return index * 10


class Lying(Indexed):
    """Slices of another length than they should have."""

    def __getitem__(self, index: Any) -> Any:
        return [99] if isinstance(index, slice) else super().__getitem__(index)


@pytest.mark.parametrize(
    "seq", [[0, 10, 20, 30], range(0, 40, 10), deque([0, 10, 20, 30]), UserList([0, 10, 20, 30]), Indexed(), Lying()]
)
def test_every_sequence_is_cut(seq: Any) -> None:
    assert distributed(lambda value: [value], seq, operator.add) == [0, 10, 20, 30]


@pytest.mark.parametrize("seq", [{1, 2}, {0: 1}, iter([1]), (n for n in [1]), 5, frozenset()])
def test_what_is_no_sequence_is_refused(seq: Any) -> None:
    with pytest.raises(TypeError, match="sequence"):
        distributed(abs, seq, operator.add)


# -- with a reducer ------------------------------------------------------------------------------------------------


def test_the_initial_value_comes_first() -> None:
    assert distributed(str, [1, 2, 3], operator.add, ">") == ">123"
    assert distributed(str, [], operator.add, ">") == ">"
    assert distributed(str, [], operator.add, None) is None, "None is a value"
    assert distributed(str, [7], operator.add) == "7"
    with pytest.raises(TypeError, match="empty"):
        distributed(str, [], operator.add)


@pytest.mark.parametrize("what", ["body", "reducer"])
def test_errors_come_as_from_elsewhere(what: str) -> None:
    with pytest.raises(RemoteException) as info:
        if what == "body":
            distributed(fail, [5], operator.add)
        else:
            distributed(abs, [5, 6], lambda one, other: fail(one))
    assert info.value.captured.ex.args == (5,)


def test_misuse() -> None:
    for arguments in ((None, [1]), (abs, [1], 5), (abs, [1], None, 0)):
        with pytest.raises(TypeError):
            distributed(*arguments)


# -- without one ---------------------------------------------------------------------------------------------------


def test_the_handle_is_there_at_once() -> None:
    gate, seen = threading.Event(), []

    def hold(number: int) -> None:
        assert gate.wait(PATIENCE)
        seen.append(number)

    loop = distributed(hold, [1, 2, 3])
    assert isinstance(loop, Loop) and not loop.done()
    with pytest.raises(TimeoutError):
        loop.result(0)
    gate.set()
    assert loop.wait(PATIENCE) is loop and loop.result() is None and loop.exception() is None
    assert seen == [1, 2, 3]


def test_an_empty_loop_is_done() -> None:
    loop = distributed(fail, [])
    assert loop.done() and loop.result() is None


def test_errors_of_the_parts() -> None:
    for ask in (Loop.result, Loop.wait):
        with pytest.raises(CompositeException) as info:
            ask(distributed(fail, [4, 5]))
        [error] = info.value.exceptions
        assert isinstance(error, RemoteException) and error.captured.ex.args == (4,), "a part ends with its first error"
    assert isinstance(distributed(fail, [4]).exception(PATIENCE), CompositeException)


def test_it_works_with_the_standard_library() -> None:
    loops = [distributed(abs, [number]) for number in range(3)]
    assert set(concurrent.futures.as_completed(loops, PATIENCE)) == set(loops)
    assert not loops[0].cancel(), "a loop cannot be cancelled"


class Sink:
    def __init__(self) -> None:
        self.text = ""
        self.printed = threading.Event()

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        self.printed.set()


@pytest.fixture
def stderr() -> Sink:
    return Sink()


def ended(function: Any) -> Loop:
    """A loop that has ended, and that nobody has asked how."""
    loop = distributed(function, [1])
    done = threading.Event()
    loop.add_done_callback(lambda future: done.set())
    assert done.wait(PATIENCE)
    return loop


def test_an_error_that_nobody_asks_for_is_printed_once(stderr: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)  # here, not in a fixture: pytest sets its own when the test begins
    loop = ended(fail)
    assert stderr.text == "", "somebody may still ask"
    del loop
    gc.collect()
    assert stderr.printed.wait(PATIENCE)
    assert stderr.text.count("CompositeException") == 1 and "ValueError: 1" in stderr.text


@pytest.mark.parametrize("ask", [Loop.result, Loop.exception, Loop.wait])
def test_an_error_that_was_told_is_not_printed(stderr: Sink, monkeypatch: pytest.MonkeyPatch, ask: Any) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    loop = ended(fail)
    gone = weakref.ref(loop)
    try:
        ask(loop)
    except CompositeException:
        pass
    del loop
    wait_until(lambda: gone() is None)
    assert stderr.text == ""


def test_a_loop_that_went_well_and_a_program_without_stderr(stderr: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    gone = weakref.ref(ended(abs))
    wait_until(lambda: gone() is None)
    assert stderr.text == ""
    monkeypatch.setattr(sys, "stderr", None)
    gone = weakref.ref(ended(fail))
    wait_until(lambda: gone() is None)


def test_an_error_is_printed_at_the_very_end_of_the_program() -> None:
    """The handle is a global; when that goes, nothing can be imported any more."""
    program = "from distpool.loops import Loop; loop = Loop(); loop.set_exception(ZeroDivisionError())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("more", ["", "del loop", "atexit.register(loop.exception)"])
def test_its_traceback_is_there_at_the_very_end_too(more: str) -> None:
    """Formatting one loads a module, and that could not be done any more."""
    program = f"""if True:
        import atexit, threading, distpool
        loop = distpool.distributed(lambda number: 1 / number, [0])
        done = threading.Event()
        loop.add_done_callback(lambda future: done.set())
        assert done.wait({PATIENCE})
        {more}
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    if "atexit" in more:
        assert done.stderr == "", "somebody has asked"
        return
    assert "no traceback" not in done.stderr and "| Traceback (most recent call last):" in done.stderr
    assert done.stderr.count("CompositeException") == 1 and "in <lambda>" in done.stderr


def test_a_loop_that_fails_because_the_program_ends() -> None:
    program = """if True:
        import time, distpool
        distpool.addprocs(2)
        loop = distpool.distributed(lambda number: time.sleep(100), [1, 2])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "no traceback" not in done.stderr and done.stderr.count("CompositeException") == 1
    assert done.stdout == "" and done.stderr.count("ProcessExitedException: worker ") >= 2


def test_the_end_waits_for_who_is_about_to_say_that_a_loop_has_failed() -> None:
    """Its error was lost if the program was gone before the callback had run."""
    program = """if True:
        import time, distpool
        from distpool.loops import Loop
        distpool.addprocs(2)
        ended = Loop._ended
        Loop._ended = lambda self, number, error: (time.sleep(0.5), ended(self, number, error))
        loop = distpool.distributed(lambda number: time.sleep(100), [1, 2])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.count("CompositeException") == 1
