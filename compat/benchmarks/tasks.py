"""Functions that the workers run. Importable by name, because most peers can send nothing else; few imports, because
every spawned worker pays for them."""

from __future__ import annotations

import os
import time
from typing import Any

_kept: Any = None


def noop() -> None:
    """Nothing: what remains is the library."""


def identity(value: Any) -> Any:
    """The argument, back again."""
    return value


def increment(value: int) -> int:
    """A result that proves that the call ran."""
    return value + 1


def getpid(_: Any = None) -> int:
    """The operating system's pid of the worker."""
    return os.getpid()


def rendezvous(directory: str, count: int, ident: int) -> int:
    """Return the worker's ospid once ``count`` calls stand here at the same time: each needs a worker of its own."""
    open(os.path.join(directory, f"{ident}"), "w").close()
    pause = 0.0005 if count <= 8 else 0.004
    deadline = time.monotonic() + 20
    while len(os.listdir(directory)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {len(os.listdir(directory))} of {count} workers came")
        time.sleep(pause)
    return os.getpid()


def wait_for_file(path: str) -> int:
    """Occupy the worker until ``path`` exists."""
    deadline = time.monotonic() + 120
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.01)
    return os.getpid()


def sleep(seconds: float) -> float:
    """Occupy the worker without using its CPU."""
    time.sleep(seconds)
    return seconds


def burn(seconds: float) -> float:
    """Use that much CPU time (not wall time: a loaded machine must not make the task cheaper)."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return seconds


def size_of(array: Any) -> int:
    """An array goes in, an int comes out; the last element proves that all of it came."""
    return int(array.size if array[-1] == 7.0 else -1)


def kept_array(elements: int) -> Any:
    """An array comes out; made once per worker, so that making it is not measured."""
    global _kept
    if _kept is None or _kept.size != elements:
        import numpy

        _kept = numpy.full(elements, 7.0)
    return _kept


class Holder:
    """A callable that carries a big array, as a method of a model or a closure over a data set would."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __call__(self, index: int) -> float:
        return float(self.array[index]) + index


def burn_and_add(value: int) -> int:
    """A short computation with a result that proves it."""
    burn(0.001)
    return value + 1
