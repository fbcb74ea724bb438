"""Where the elements of a `pmap` run: three carriers with one face (layer 7).

    SpanCarrier     MapRun -> scheduler: spans cut by measured time, for an executor with a plain policy
    FutureCarrier   one call of `submit` per element: views with time limits, pids ..., and pools of other kinds
    ThreadCarrier   FutureCarrier over threads of this process: no workers, or `distributed=False`

A carrier is fed by the consumer's thread and gives each element's end by index: `results` (ended well, still encoded)
or `failed`. Whoever takes an entry out of either owns it; `dict.pop` and `deque.popleft` are atomic, and no other lock
stands between the consumer and the threads that settle.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from distpool import config
from distpool.mapruns import LOOK_AHEAD, SCALARS, MapRun
from distpool.node.node import Node
from distpool.refs.refs import RAISED_HERE, Outcome, open_outcome
from distpool.replies import note_traceback
from distpool.scheduling import Scheduler
from distpool.wire import codec
from distpool.wire.functions import EncodedFunction
from distpool.wire.messages import ERROR, UNSENDABLE

_AT_HAND = 2048  # the same for an input that lies in memory anyway, unless its elements are large
_BYTES_AHEAD = 1 << 20  # serialised elements that wait, per worker
_FAILURES = (ERROR, UNSENDABLE, RAISED_HERE)
_MAX_BATCH = 64  # elements that "auto" makes one batch of at most, as far as the look-ahead is concerned


class Carrier(Protocol):
    """What `ordered.OrderedMap` needs of the place where elements run. Used by one thread."""

    results: dict[int, Any]
    failed: collections.deque[tuple[int, Any]]

    @property
    def fed(self) -> int:
        """Elements fed so far; the next one gets this index."""

    def feed(self, arguments: list[Any]) -> None:
        """Run these elements: bare arguments for one iterable, else tuples. RuntimeError: nothing new may begin."""

    def again(self, index: int, argument: Any) -> None:
        """Run a failed element once more."""

    def open(self, raw: Any) -> tuple[Any, BaseException | None]:
        """`(value, None)` or `(None, error)` of an entry of `results` or `failed`."""

    def ahead(self, at_hand: bool) -> int:
        """How many elements to take ahead now; `at_hand`: taking them has no effect that anybody could see."""

    @property
    def usable(self) -> bool:
        """Whether anything could still run here."""

    def wait_until(self, until: Callable[[], bool], deadline: float | None) -> object:
        """Return when `until()` holds, or at `deadline` (monotonic seconds)."""

    def close(self) -> None:
        """Nothing new starts."""

    def abandon(self) -> None:
        """As `close`, safe in a finalizer."""


class SpanCarrier:
    """Elements of a MapRun. `batch`: how many are sent together at least; 0: "auto"."""

    def __init__(
        self, scheduler: Scheduler, function: EncodedFunction, single: bool, batch: int, size: Callable[[], int]
    ) -> None:
        self.run = run = MapRun(scheduler, function, single=single)
        run.batch = batch or 1
        run.on_settled = self._settled
        self.results = run.results
        self.failed: collections.deque[tuple[int, Any]] = collections.deque()
        self._batch = batch
        self._size = size  # how many workers there are

    @property
    def fed(self) -> int:
        return self.run.fed

    @property
    def usable(self) -> bool:
        return self.run.scheduler.failure is None

    def feed(self, arguments: list[Any]) -> None:
        self.run.check_open()
        self.run.feed(arguments)

    def again(self, index: int, argument: Any) -> None:
        self.run.feed_again(index, argument)

    def open(self, raw: Any) -> tuple[Any, BaseException | None]:
        if type(raw) is not bytes:
            return open_outcome(raw)
        try:
            return codec.decode(raw), None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return None, error

    def ahead(self, at_hand: bool) -> int:
        run, batch = self.run, self._batch
        if batch == 0:
            mean = run.timing.mean
            batch = max(1, min(_MAX_BATCH, int(config.WINDOW_SECONDS / mean))) if mean > 0 else 1
        count = LOOK_AHEAD * self._size() * batch
        if at_hand and run.fed:
            most = _AT_HAND
            if run.fed_bytes:
                most = min(most, _BYTES_AHEAD * run.fed // run.fed_bytes)
            count = max(count, most * self._size())
        return count

    def wait_until(self, until: Callable[[], bool], deadline: float | None) -> object:
        return self.run.wait_until(until, deadline)

    def close(self) -> None:
        self.run.close()

    def abandon(self) -> None:
        if not self.run.closed:
            self.run.abandon()

    def _settled(self, index: int) -> None:
        """Move a failure to where it is looked for first. Leader, or the feeding thread."""
        raw = self.results.get(index)
        if isinstance(raw, Outcome) and raw.status in _FAILURES:
            found = self.results.pop(index, None)
            if found is raw:
                self.failed.append((index, raw))
            elif found is not None:  # the consumer was faster, and has put something else there
                self.results[index] = found


class FutureCarrier:
    """One call of `submit(*arguments)` per element; `submit` may also raise."""

    def __init__(
        self,
        submit: Callable[..., Any],
        single: bool,
        size: Callable[[], int],
        per_worker: int,
        node: Node | None = None,
    ) -> None:
        self.fed = 0
        self._node = node  # of a pool in other processes: a task that waits for those gives its slot away
        self.results: dict[int, Any] = {}
        self.failed: collections.deque[tuple[int, Any]] = collections.deque()
        self._submit = submit
        self._single = single
        self._size = size
        self._per_worker = per_worker
        self._pending: dict[int, Any] = {}  # index -> future that has not ended
        self._changed = threading.Event()
        self.usable = True

    def feed(self, arguments: list[Any]) -> None:
        for argument in arguments:
            index = self.fed
            self.fed += 1
            self.again(index, argument)

    def again(self, index: int, argument: Any) -> None:
        try:
            future = self._submit(argument) if self._single else self._submit(*argument)
        except Exception as error:
            future = concurrent.futures.Future()
            future.set_exception(error)
        self._pending[index] = future
        future.add_done_callback(lambda ended: self._ended(index, ended))

    def _ended(self, index: int, future: Any) -> None:
        self._pending.pop(index, None)
        if future.cancelled() or future.exception() is not None:
            self.failed.append((index, future))
        else:
            self.results[index] = future
        self._changed.set()

    def open(self, raw: Any) -> tuple[Any, BaseException | None]:
        try:
            error = raw.exception()
        except concurrent.futures.CancelledError as cancelled:
            return None, cancelled
        return (None, error) if error is not None else (raw.result(), None)

    def ahead(self, at_hand: bool) -> int:
        return self._per_worker * self._size()

    def wait_until(self, until: Callable[[], bool], deadline: float | None) -> object:
        changed, node = self._changed, self._node
        away = contextlib.nullcontext() if node is None else node.given_away()
        following = contextlib.nullcontext() if node is None else node.loop.following(changed.set)
        with away, following as inside:
            while True:
                changed.clear()  # before looking: what ends from here on is noticed
                if until() or (inside is not None and inside.struck):
                    return None
                timeout = None if deadline is None else deadline - time.monotonic()
                if timeout is not None and timeout <= 0:
                    return None
                changed.wait(timeout)

    def close(self) -> None:
        for future in list(self._pending.values()):
            future.cancel()

    def abandon(self) -> None:
        """Cancelling takes locks; what was taken ahead (a few elements per worker) runs to its end."""


class ThreadCarrier(FutureCarrier):
    """Elements run in threads of this process, which live as long as the map."""

    def __init__(self, function: Callable[..., Any], single: bool) -> None:
        self._threads = _Threads(function, thread_count())
        super().__init__(self._threads.submit, single, thread_count, 2)

    def close(self) -> None:
        self._threads.end()

    def abandon(self) -> None:
        self._threads.end()


class _Threads:
    """At most `limit` daemon threads that call `function`. Daemons: a call that never returns must not keep the program
    from ending (the standard library's pool would).
    """

    def __init__(self, function: Callable[..., Any], limit: int) -> None:
        self._function = function
        self._limit = limit
        self._count = 0  # threads that were started; used by the submitting thread
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._ended = False

    def submit(self, *arguments: Any) -> concurrent.futures.Future[Any]:
        if not self._idle.acquire(blocking=False) and self._count < self._limit:
            number = next(_thread_numbers)
            try:
                threading.Thread(target=self._serve, name=f"distpool-pmap-{number}", daemon=True).start()
                self._count += 1
            except RuntimeError:  # the system refuses another one: those that are there will do it
                if not self._count:
                    raise
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._waiting.put((future, arguments))
        return future

    def end(self) -> None:
        """No further call starts. Safe in a finalizer."""
        self._ended = True
        self._waiting.put(None)

    def _serve(self) -> None:
        while True:
            item = self._waiting.get()
            if item is None or self._ended:
                self._waiting.put(None)  # for the other threads
                return
            future, arguments = item
            try:
                value = self._function(*arguments)
            except BaseException as error:  # also SystemExit: it is the call's outcome, as on a worker
                note_traceback(error)
                self._idle.release()
                future.set_exception(error)
                del error
            else:
                self._idle.release()
                future.set_result(value)
                del value
            del item, future, arguments


_thread_numbers = itertools.count(1)


def thread_count() -> int:
    """Threads for a map that runs in this process: as many as the standard library's pool would have."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(32, cpus + 4)


__all__ = ["SCALARS", "Carrier", "FutureCarrier", "SpanCarrier", "ThreadCarrier", "thread_count"]
