"""What the fault tests run on workers, and the gate through which a test watches it happen.

Everything here is importable by workers (and by the programs of `programs.py`, as plain `helpers`), so only the
standard library is imported. Nothing sleeps until things have settled: a task that wants to be seen connects to the
test's `Gate`. The connection is the event: it opens when the task runs, and it ends when its process dies.

    worker: hold(address, tag) --connect, one line--> Gate.arrivals()  ->  Arrival.release() / Arrival.wait_gone()
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

NOISE = 3.0
"""Each bound of the fault list is multiplied by this: CI machines have two cores that others use too."""

PATIENCE = 30.0
"""Seconds after which a wait is a hang. No test passes by coming near it."""

Address = tuple[str, int]


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Fail when the block takes longer than `seconds`, the noise of the machine allowed for."""
    begin = time.monotonic()
    yield
    took = time.monotonic() - begin
    assert took <= seconds * NOISE, f"{what} took {took:.2f} s, the bound is {seconds} s (x {NOISE})"


# ------------------------------------------------------------------------------------------------------------- the gate


@dataclass
class Arrival:
    """One task that has come to the gate; its connection lives as long as its process (or until it lets go)."""

    tag: Any
    ospid: int
    connection: socket.socket

    def release(self) -> None:
        self.connection.sendall(b"\n")

    def wait_gone(self, seconds: float) -> float:
        """The moment (monotonic) at which the task's process let go of the connection."""
        self.connection.settimeout(seconds)
        try:
            while self.connection.recv(1024):
                pass
        except ConnectionResetError:
            pass
        except TimeoutError:
            raise AssertionError(f"process {self.ospid} still lives {seconds:.1f} s later") from None
        return time.monotonic()


class Gate:
    """The test's end: tasks arrive, are counted, held and let go."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address: Address = self._listener.getsockname()
        self._seen: list[Arrival] = []

    def arrivals(self, count: int, seconds: float = PATIENCE) -> list[Arrival]:
        """The next `count` arrivals, in the order in which they came."""
        deadline = time.monotonic() + seconds
        found: list[Arrival] = []
        while len(found) < count:
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                raise AssertionError(f"{len(found)} of {count} tasks at the gate after {seconds:.1f} s") from None
            connection.settimeout(PATIENCE)  # it has come: `seconds` was for that
            with connection.makefile("r") as lines:
                tag, ospid = json.loads(lines.readline())
            found.append(Arrival(tag, ospid, connection))
        self._seen += found
        return found

    def arrival(self, seconds: float = PATIENCE) -> Arrival:
        return self.arrivals(1, seconds)[0]

    def close(self) -> None:
        """Let go of everybody, those included who have not been looked at yet."""
        self._listener.close()
        for arrival in self._seen:
            arrival.connection.close()


def arrive(address: Address, tag: Any = None) -> socket.socket:
    """In a task: show that it runs. Keep the answer: while it lives, the test sees the process alive."""
    connection = socket.create_connection(tuple(address))
    connection.sendall(json.dumps([tag, os.getpid()]).encode() + b"\n")
    return connection


def hold(address: Address, tag: Any = None) -> Any:
    """In a task: arrive, wait to be released, return the tag."""
    try:
        with arrive(address, tag) as connection:
            connection.recv(1)
    except ConnectionError:
        pass  # the gate is closed: nobody is held any more
    return tag


def show(address: Address, tag: Any = None) -> Any:
    """In a task: arrive and go on at once."""
    arrive(address, tag).close()
    return tag


_registered: list[socket.socket] = []


def registered_square(address: Address, number: int) -> int:
    """In a task: the first one of each process arrives at the gate for as long as that process lives."""
    if not _registered:
        _registered.append(arrive(address, os.getpid()))
    return number * number


def slow_square(address: Address, number: int) -> int:
    """About half a millisecond of work, so that deaths find some under way."""
    sum(range(20_000))
    return registered_square(address, number)


# ---------------------------------------------------------------------------------------------------------- plain tasks


def identity(value: Any) -> Any:
    return value


def square(number: int) -> int:
    return number * number


def fail(text: str) -> NoReturn:
    raise ValueError(text)


def leave(code: Any) -> NoReturn:
    sys.exit(code)


def raise_this(error: BaseException) -> NoReturn:
    raise error


def note(path: Path, tag: Any) -> None:
    """One line, in one write, at the end of the file: so that executions can be counted across processes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, f"{tag}\n".encode())
    finally:
        os.close(descriptor)


def noted(path: Path) -> collections.Counter[str]:
    """How often each tag was noted."""
    return collections.Counter(path.read_text().split("\n")[:-1]) if path.exists() else collections.Counter()


def note_and_square(path: Path, number: int) -> int:
    note(path, number)
    return number * number


_token = f"{os.getpid()}-{time.monotonic_ns()}"


def note_process(path: Path, number: int) -> int:
    """Note the number and the process; a process is named by more than its number, which comes round again."""
    note(path, f"{number} {_token}")
    return number


# ---------------------------------------------------------------------------------------------------------------- death

DEATHS = {"SIGKILL": -signal.SIGKILL, "segfault": -signal.SIGSEGV, "exit 7": 7}
"""Ways to die, and the exit code by which each is known."""


def die(how: str) -> NoReturn:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "segfault":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(1)
    os._exit(7)


def square_or_die(number: int, bad: int, how: str, address: Address, path: Path | None = None) -> int:
    """The square; for the bad number last words, an arrival and death."""
    if path is not None:
        note(path, number)
    if number == bad:
        print(f"last words of {number}", flush=True)
        connection = arrive(address, number)
        try:
            die(how)
        finally:
            connection.close()
    return number * number


def die_once(path: Path, number: int) -> int:
    """Dies at the first attempt, gives the square at the next one."""
    note(path, number)
    if noted(path)[str(number)] == 1:
        die("SIGKILL")
    return number * number


# ------------------------------------------------------------------------------------------------------------- busyness


def loop_in_python() -> NoReturn:
    while True:
        pass


def loop_in_c() -> None:
    """Holds the interpreter lock and never looks at signals."""
    collections.deque(itertools.repeat(0), maxlen=0)


def loop_deaf() -> NoReturn:
    """Ignores and blocks whatever a process may ignore and block."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        try:
            loop_in_python()
        except BaseException:  # noqa: BLE001 - deaf on purpose
            pass


def sleep_long() -> None:
    time.sleep(600)


def stop_myself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    sleep_long()


BUSY = {
    "python": loop_in_python,
    "c": loop_in_c,
    "deaf": loop_deaf,
    "sleep": sleep_long,
    "stopped": stop_myself,
}


def be_busy(address: Address, how: str) -> None:
    """Arrive, then never come to an end."""
    connection = arrive(address, how)
    BUSY[how]()
    connection.close()


def hold_in_c(address: Address, tag: Any = None) -> Any:
    """In a task: as `hold`, but the wait is one C call that keeps the interpreter lock."""
    wait, buffer = ctypes.PyDLL(None).recv, ctypes.create_string_buffer(1)
    with arrive(address, tag) as connection:
        wait(connection.fileno(), buffer, 1, 0)
    return tag


def keep_the_interpreter(address: Address, seconds: int) -> int:
    """Arrive, then hold the interpreter lock inside one C call: no other thread of the process runs meanwhile."""
    with arrive(address, "keeping"):
        left: int = ctypes.PyDLL(None).sleep(seconds)
    return left


# --------------------------------------------------------------------------------------------------- strange exceptions


class TwoArguments(Exception):
    """Pickles as `TwoArguments("only one")`, which cannot be called."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
        self.second = second


class HoldsALock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class RaisingReduce(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("no reduction for me")


class NonsenseReduce(Exception):
    def __reduce__(self) -> Any:
        return 42


class FailsToRebuild(Exception):
    def __reduce__(self) -> Any:
        return raise_this, (RuntimeError("cannot be rebuilt"),)


class LeavesOnRebuild(Exception):
    """Whoever rebuilds it outside a guard ends his thread."""

    def __reduce__(self) -> Any:
        return leave, (9,)


class RebuildsAsSomethingElse(Exception):
    def __reduce__(self) -> Any:
        return str, ("not an exception",)


class RaisingStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for me")

    __repr__ = __str__


def _two_arguments() -> BaseException:
    return TwoArguments("strange", "second")


def _unknown_here() -> BaseException:
    """Of a module which only this process has."""
    module = types.ModuleType("only_on_the_worker")
    sys.modules["only_on_the_worker"] = module
    exec("class UnknownHere(Exception): pass", module.__dict__)
    error: BaseException = module.UnknownHere("strange")
    return error


def _unpicklable_cause() -> BaseException:
    error = TwoArguments("strange", "second")
    error.__cause__ = HoldsALock("the cause")
    error.__cause__.__context__ = error
    return error


def _group() -> BaseException:
    return ExceptionGroup("strange group", [HoldsALock("strange"), RaisingReduce("strange"), TwoArguments("a", "b")])


STRANGE = {
    "TwoArguments": _two_arguments,
    "HoldsALock": lambda: HoldsALock("strange"),
    "RaisingReduce": lambda: RaisingReduce("strange"),
    "NonsenseReduce": lambda: NonsenseReduce("strange"),
    "FailsToRebuild": lambda: FailsToRebuild("strange"),
    "LeavesOnRebuild": lambda: LeavesOnRebuild("strange"),
    "RebuildsAsSomethingElse": lambda: RebuildsAsSomethingElse("strange"),
    "RaisingStr": lambda: RaisingStr("strange"),
    "UnknownHere": _unknown_here,
    "TwoArguments with a cause": _unpicklable_cause,
    "ExceptionGroup": _group,
}


def raise_strange(which: str) -> NoReturn:
    raise STRANGE[which]()


def square_or_raise(number: int, bad: int, which: str) -> int:
    if number == bad:
        raise_strange(which)
    return number * number


# -------------------------------------------------------------------------------------------- things that do not travel


class RefusesToPickle:
    def __reduce__(self) -> Any:
        raise RuntimeError("refuses to be pickled")


class LeavesWhilePickled:
    def __reduce__(self) -> Any:
        sys.exit(5)


class FailsToLoad:
    """Arrives as whatever `act(*arguments)` makes of it."""

    def __init__(self, act: Any, *arguments: Any) -> None:
        self.act, self.arguments = act, arguments

    def __reduce__(self) -> Any:
        return self.act, self.arguments


def nested(depth: int) -> list[Any]:
    """A list so deep that the pickler gives up."""
    outer: list[Any] = []
    for _ in range(depth):
        outer = [outer]
    return outer


UNPICKLABLE = {
    "lock": threading.Lock,
    "generator": lambda: (number for number in range(3)),
    "RefusesToPickle": RefusesToPickle,
    "LeavesWhilePickled": LeavesWhilePickled,
    "nested list": lambda: nested(200_000),
    "lock in a list": lambda: [1, {"deep": (threading.Lock(),)}],
}
"""Name -> maker of something that cannot be sent. Made where it is needed: the names travel instead."""


def make_unpicklable(which: str) -> Any:
    return UNPICKLABLE[which]()


def fail_unless(ospid: int, value: Any) -> Any:
    """Loads in the process `ospid` only."""
    if os.getpid() != ospid:
        raise ValueError("refuses to load here")
    return value


class LoadsOnlyWhereItWasMade:
    def __reduce__(self) -> Any:
        return fail_unless, (os.getpid(), "at home")


class LeavesWhenLoadedElsewhere:
    def __reduce__(self) -> Any:
        return _leave_unless, (os.getpid(),)


def _leave_unless(ospid: int) -> str:
    if os.getpid() != ospid:
        sys.exit(11)
    return "at home"


def return_what_fails_to_load(which: str) -> Any:
    return {"raises": LoadsOnlyWhereItWasMade, "leaves": LeavesWhenLoadedElsewhere}[which]()


def square_or_return(number: int, bad: int, which: str) -> Any:
    return return_what_fails_to_load(which) if number == bad else number * number


def square_or_unpicklable(number: int, bad: int, which: str) -> Any:
    return make_unpicklable(which) if number == bad else number * number


def all_at_once(executor: Any, count: int) -> set[int]:
    """That many tasks run at the same time; the processes that run them."""
    gate = Gate()
    futures = [executor.submit(hold, gate.address) for _ in range(count)]
    found = {arrival.ospid for arrival in gate.arrivals(count)}
    gate.close()
    for future in futures:
        future.result(PATIENCE)
    return found
