"""Good and bad tasks. Importable by name; few imports."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections import deque
from typing import Any


def good(value: int) -> int:
    """A task that takes a moment, so that others are under way when one goes wrong."""
    time.sleep(0.02)
    return value + 1000


def noted(path: str, value: int, die_at: int) -> int:
    """Note the start of this task in a file, then work or die."""
    with open(path, "a") as file:
        file.write(f"{value}\n")
    time.sleep(0.01)
    if value == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return value + 1000


def kill_self(_: int) -> None:
    """As the kernel's out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


def hard_exit(_: int) -> None:
    """Leaves without clean-up."""
    os._exit(7)


def segfault(_: int) -> None:
    """A bug in C."""
    import faulthandler

    faulthandler.disable()
    faulthandler._sigsegv()  # type: ignore[attr-defined]


def soft_exit(_: int) -> None:
    """SystemExit is an exception like others here."""
    sys.exit(7)


class TwoArguments(Exception):
    """pickle calls it with one argument."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"two arguments: {first} {second}")


class HoldsLock(Exception):
    """An attribute that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class BadReduce(Exception):
    """Pickling it raises."""

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickle of me")


def raise_two_arguments(_: int) -> None:
    """F4"""
    raise TwoArguments(1, 2)


def raise_holds_lock(_: int) -> None:
    """F4"""
    raise HoldsLock


def raise_bad_reduce(_: int) -> None:
    """F4"""
    raise BadReduce("bad reduce")


def take(_: Any) -> str:
    """Any argument."""
    return "taken"


def return_lock(_: int) -> Any:
    """A result that cannot be pickled."""
    return threading.Lock()


def explode(where: str) -> None:
    """Called by pickle.loads."""
    raise ValueError(f"fails while loading on the {where}")


class FailsOnLoad:
    """Pickles well, does not load."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return explode, (self.where,)


def return_fails_on_load(_: int) -> Any:
    """A result that does not load here."""
    return FailsOnLoad("caller")


def loop_python(_: int) -> None:
    """Endless, in bytecode."""
    while True:
        pass


def loop_c(_: int) -> None:
    """Endless, in C: no signal handler ever runs."""
    deque(itertools.repeat(0), maxlen=0)


def loop_deaf(_: int) -> None:
    """Endless, ignores polite signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(0.1)


def initializer_raises(path: str) -> None:
    """Every start leaves a line."""
    with open(path, "a") as file:
        file.write("start\n")
    raise RuntimeError("initializer failed on purpose")


def initializer_dies(path: str) -> None:
    """Every start leaves a line."""
    with open(path, "a") as file:
        file.write("start\n")
    os._exit(9)


def allocate(size: int) -> int:
    """Touch that many bytes."""
    return len(bytearray(b"x") * size)


def busy(directory: str, kind: str) -> None:
    """Note the ospid, then be busy for a minute."""
    open(os.path.join(directory, f"{kind}-{os.getpid()}"), "w").close()
    if kind == "sleep":
        time.sleep(60)
    elif kind == "c":
        deque(itertools.repeat(0, 10**10), maxlen=0)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pass


def sleep(seconds: float) -> float:
    """Wait."""
    time.sleep(seconds)
    return seconds


def pid_of(_: Any) -> int:
    """The worker's ospid, after a moment that lets the other worker take part."""
    time.sleep(0.05)
    return os.getpid()


def print_lines(worker: int, count: int, die: bool) -> None:
    """Many lines; the last one just before death."""
    for number in range(count):
        print(f"<{worker}:{number}:{'x' * 40}>")
    sys.stdout.flush()
    if die:
        os.kill(os.getpid(), signal.SIGKILL)


def remove_directory(path: str) -> str:
    """Go into a directory and delete it."""
    os.makedirs(path, exist_ok=True)
    os.chdir(path)
    os.rmdir(path)
    return path


def fib(executor: Any, n: int) -> int:
    """Recursion through the executor itself."""
    if n < 2:
        return n
    left = executor.submit(fib, executor, n - 1)
    return fib(executor, n - 2) + left.result()  # type: ignore[no-any-return]


def nested(_: int) -> int:
    """A task that opens a process pool of its own."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as inner:
        return inner.submit(good, 1).result(20)
