"""One face for `ClusterExecutor` and `DistPool`, so that each row of the fault list is written once.

A `Runner` holds one of them; `submit` answers a `Call`, whose `value()` and `error()` never wait for ever.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import distpool

from . import helpers
from .helpers import NOISE, PATIENCE, Gate

CLASSES = {"executor": "ClusterExecutor", "pool": "DistPool"}
KINDS = tuple(CLASSES)


#: For runners whose calls have a short time limit: their workers load the tasks' module before the first of them. On a
#: busy machine that takes longer than the limit.
LOADED = {"initializer": helpers.square, "initargs": (1,)}


class Call:
    """A call under way: a `Future` of the executor or an `AsyncResult` of the pool."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def settled(self, seconds: float) -> bool:
        """Whether the call has ended within that time."""
        if hasattr(self.handle, "ready"):
            self.handle.wait(seconds)
            return bool(self.handle.ready())
        from concurrent.futures import wait

        return bool(wait([self.handle], timeout=seconds).done)

    def outcome(self, seconds: float = PATIENCE) -> tuple[Any, BaseException | None]:
        """Value and error; a call that is still pending fails the test."""
        assert self.settled(seconds), f"no outcome after {seconds:.1f} s"
        try:
            return (self.handle.get(0) if hasattr(self.handle, "get") else self.handle.result(0)), None
        except BaseException as error:
            return None, error

    def value(self, seconds: float = PATIENCE) -> Any:
        value, error = self.outcome(seconds)
        if error is not None:
            raise error
        return value

    def error(self, seconds: float = PATIENCE) -> BaseException:
        value, error = self.outcome(seconds)
        assert error is not None, f"should have failed, but gave {value!r}"
        return error


class Runner:
    """A `ClusterExecutor` or a `DistPool` under test."""

    def __init__(self, kind: str, workers: int, options: dict[str, Any]) -> None:
        self.kind = kind
        self.workers = workers
        if kind == "pool" and "max_tasks_per_child" in options:
            options = {**options, "maxtasksperchild": options["max_tasks_per_child"]}
            del options["max_tasks_per_child"]
        self.raw: Any = getattr(distpool, CLASSES[kind])(workers, **options)

    @property
    def executor(self) -> Any:
        """The `ClusterExecutor`, or the one beneath the pool."""
        return self.raw if self.kind == "executor" else self.raw.executor

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Call:
        if self.kind == "executor":
            return Call(self.raw.submit(function, *args, **kwargs))
        return Call(self.raw.apply_async(function, args, kwargs))

    def lazy_map(self, function: Callable[..., Any], iterable: Iterable[Any]) -> Iterator[Any]:
        """The ordered map that takes its input lazily."""
        if self.kind == "executor":
            return self.raw.map(function, iterable, buffersize=4)  # type: ignore[no-any-return]
        return self.raw.imap(function, iterable)  # type: ignore[no-any-return]

    def bring_up(self) -> None:
        """Wait until all workers are there: each of them is held once, at the same time."""
        gate = Gate()
        calls = [self.submit(helpers.hold, gate.address) for _ in range(self.workers)]
        gate.arrivals(self.workers)
        gate.close()
        for call in calls:
            call.value()

    def ospids(self) -> dict[int, int]:
        """pid -> operating system's pid of every worker, once all of them are up."""
        self.bring_up()
        return {pid: self._ask(pid) for pid in self.executor.workers}

    def _ask(self, pid: int) -> int:
        value: int = self.executor.options(pids=[pid]).submit(_ospid).result(PATIENCE)
        return value

    def close(self) -> None:
        """Let everything that can finish do so, then wait for the end of the workers."""
        if self.kind == "executor":
            self.raw.shutdown(wait=True)
        else:
            self.raw.close()
            self.raw.join()

    def end(self) -> None:
        """End it, whatever runs."""
        self.executor.kill_workers()
        if self.kind == "pool":
            self.raw.terminate()
            self.raw.join()
        else:
            self.raw.shutdown(wait=True)


def _ospid() -> int:
    import os

    return os.getpid()


def is_timeout(error: BaseException) -> bool:
    """Pool users know `multiprocessing.TimeoutError`, everybody else the builtin."""
    return isinstance(error, (TimeoutError, multiprocessing.TimeoutError))


def assert_squares(calls: Iterable[Call], but: int | None = None) -> None:
    """Every call gave the square of its index, except the bad one."""
    for index, call in enumerate(calls):
        if index != but:
            assert call.value() == index * index


def assert_all_work(runner: Runner, seconds: float) -> None:
    """All workers run a task at the same time again (each is held), within that time.

    Under a limit of their own: whoever arrives first waits for the launch of the others.
    """
    gate = Gate()
    count = runner.workers
    patient = runner.executor.options(timeout=PATIENCE)
    begin = time.monotonic()
    calls = [Call(patient.submit(helpers.hold, gate.address, index)) for index in range(count)]
    arrivals = gate.arrivals(count, seconds * NOISE)
    took = time.monotonic() - begin
    assert len({arrival.ospid for arrival in arrivals}) == count
    gate.close()
    assert sorted(call.value() for call in calls) == list(range(count))
    assert len(runner.executor.workers) == count
    assert took <= seconds * NOISE


def full_text(error: BaseException) -> str:
    """Everything a user would see of it."""
    import traceback

    return "".join(traceback.format_exception(error))
