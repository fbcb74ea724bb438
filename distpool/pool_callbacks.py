"""Callbacks of a pool, one after another, and the opening of its outcomes (layer 10).

leader, or whoever settles --put--> queue -> library thread: decode, callback, event
a callback that waits for another result --give_way--> another library thread goes on with the queue
"""

from __future__ import annotations

import collections
import multiprocessing.pool as stdlib
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.pool import RemoteTraceback  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any

from distpool.errors import DistpoolError, as_both, cause_of
from distpool.flag import Flag
from distpool.logs import Log
from distpool.refs.refs import RAISED_HERE, open_outcome
from distpool.scheduling import Scheduler
from distpool.wire import codec
from distpool.wire.messages import UNSENDABLE

if TYPE_CHECKING:
    from distpool.pool_results import AsyncResult

log = Log("pool")


class PoolTerminated(DistpoolError, BrokenProcessPool):
    """`terminate()` (or the end of a `with` block) ended the pool before this result was there."""


def park_at_exit(error: BaseException, scheduler: Scheduler) -> None:
    """The program ends under a daemon thread that waits for a result: as with the standard library, it just stays.

    The interpreter takes it along. An exception would be one nobody can catch, printed at the end of every program that
    has such a thread.
    """
    ended = issubclass(type(error), PoolTerminated) and scheduler.node.pools_ended
    if ended and threading.current_thread().daemon:
        threading.Event().wait()


def open_entry(raw: Any) -> Any:
    """The value behind an outcome (or bare pickle) of a call; raises its exception."""
    if type(raw) is bytes:
        return codec.decode(raw)
    value, error = open_outcome(raw, RemoteTraceback)
    if error is None:
        return value
    if raw.status == RAISED_HERE:
        error = as_both(error)
    elif raw.status == UNSENDABLE:
        unsent = stdlib.MaybeEncodingError(error, _Described(str(error)))  # type: ignore[attr-defined]
        unsent.__cause__ = cause_of(error)
        error = unsent
    try:
        raise error
    finally:
        del error


class _Described:
    """Stands for a value that never came here: its repr is the worker's description of it."""

    def __init__(self, text: str) -> None:
        self._text = text.split(" cannot be serialised", 1)[0].rstrip(",")

    def __repr__(self) -> str:
        return f"<{self._text}>"


class Callbacks:
    """Runs a pool's callbacks one after another on a library thread, as users of multiprocessing.Pool rely on.

    Unlike there, a callback may wait for other results of the pool: waiting gives its turn to the next one.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.results: set[AsyncResult] = set()  # whose callbacks have not run; single operations only, which are atomic
        self._waiting: collections.deque[Callable[[], object]] = collections.deque()
        self._lock = (
            threading.RLock()
        )  # protects _turn and _owner; re-entrant: the collector may run user code anywhere
        self._turn: object = None  # of the thread that runs callbacks
        self._owner = 0  # its id, while a callback runs
        self._leaders = 0  # signal handlers that lead the loop until a callback has run

    def put(self, function: Callable[[], object]) -> None:
        """Run `function()` after all that were put before. Any thread, the leader too."""
        self._waiting.append(function)
        self._start()

    def _start(self) -> None:
        turn = object()
        try:
            with self._lock:
                if self._turn is not None or not self._waiting:
                    return
                self._turn = turn
            self.scheduler.node.deliver(lambda: self._work(turn))
        except BaseException:  # Ctrl-C: perhaps no thread is on its way; one that is finds its turn given away
            with self._lock:
                if self._turn is turn:
                    self._turn = None
            raise

    def _work(self, turn: object) -> None:
        while True:
            with self._lock:
                if self._turn is not turn:
                    return  # it was given away
                self._owner = 0
                if not self._waiting:
                    self._turn = None
                    return
                function = self._waiting.popleft()
                self._owner = threading.get_ident()
            try:
                function()
            except BaseException:  # SystemExit too: it is a callback's, not this thread's
                log.exception("exception in a callback of a pool")
            del function

    def give_way(self) -> None:
        """The calling thread is about to wait: if it runs a callback, others may run meanwhile."""
        if self._owner == threading.get_ident():
            with self._lock:
                self._turn, self._owner = None, 0
            self._start()

    def wait_for(self, ran: Flag, deadline: float | None = None) -> None:
        """Wait until a callback has run, which sets `ran` and calls `tell`."""
        loop = self.scheduler.loop
        loop.check_wait()
        if loop.leads:  # in a signal handler
            self._leaders += 1
            try:
                loop.lead(ran.is_set, deadline)
            finally:
                self._leaders -= 1
            return
        with loop.following():
            ran.wait(None if deadline is None else deadline - time.monotonic())

    def tell(self) -> None:
        """A callback has run."""
        if self._leaders:
            self.scheduler.loop.wake()

    def join(self) -> None:
        """Wait until every callback has run (those of the calling thread excepted)."""
        self.give_way()
        self._start()  # an interrupt may have ended that of who put the last one
        for result in list(self.results):
            result._await_callback()

    def forget(self, result: AsyncResult) -> None:
        """It will not have an outcome, and nobody has it."""
        self.results.discard(result)


__all__ = ["Callbacks", "PoolTerminated", "open_entry", "park_at_exit"]
