"""Where the elements of a `pmap` over a `WorkerPool` run: one message in flight per taken worker (layer 7).

    feed -> waiting elements -> take (asynchronous) -> worker -> the next batch -> request -> outcomes, worker back

A worker is taken for each message and given back after it, so that maps which share a pool share its workers. What is
sent is cut when a worker is there: with `batch_size="auto"` its size follows the measured time.

A map inside a call that came through the same pool would wait for a worker which its own caller holds: its own process
if it is a member and taken, else, after a while, some member, serve it without being taken (`_Lane`).

Callbacks run on library threads; `_lock` protects the waiting elements and the counters. The consumer's thread feeds.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from distpool import config
from distpool.batches import Batch, run_batch, when_known
from distpool.errors import ProcessExitedException
from distpool.mapruns import LOOK_AHEAD
from distpool.node import node as nodes
from distpool.pools import WorkerPool
from distpool.refs.refs import LOCAL_VALUE, RAISED_HERE, Future, Outcome, open_outcome
from distpool.replies import request
from distpool.wire.messages import VALUE

log = logging.getLogger("distpool.pmap")

_MAX_BATCH = 64
_PATIENCE = 1.0  # seconds that a map inside a call waits for a worker before it shares one
_Element = tuple[int, Any]
_Failure = tuple[int, Outcome]


class PoolCarrier:
    """Elements on the workers of a pool; see `elements.Carrier`. `batch` 0: "auto"."""

    def __init__(self, pool: WorkerPool, function: Callable[..., Any], single: bool, batch: int) -> None:
        self.fed = 0
        self.results: dict[int, Any] = {}
        self.failed: collections.deque[tuple[int, Any]] = collections.deque()
        self.usable = True
        self._node = nodes.current()
        self._pool = pool
        self._function = function
        self._single = single
        self._batch = batch
        self._members = pool._do("living")
        self._lock = threading.Lock()
        self._waiting: collections.deque[_Element] = collections.deque()
        self._again: collections.deque[_Element] = collections.deque()  # retries go alone
        self._asked = 0  # workers that have been asked for
        self._asking: set[Future[Any]] = set()  # their futures, which nobody else holds
        self._stranded: collections.deque[_Failure] = collections.deque()  # no worker is left for these; `_lock`
        self._closed = False
        self._mean = -1.0  # measured seconds per element
        self.sent = 0  # messages, and how many of them have not been answered
        self.inflight = 0
        self._changed = threading.Event()
        self._lane = _Lane(self) if self._node.pid in self._members or not self._node.is_master else None

    # -- the consumer's side -----------------------------------------------------------------------------------

    def feed(self, arguments: list[Any]) -> None:
        with self._lock:
            for argument in arguments:
                self._waiting.append((self.fed, argument))
                self.fed += 1
        self._ask(elsewhere=True)

    def again(self, index: int, argument: Any) -> None:
        with self._lock:
            self._again.append((index, argument))
        self._ask(elsewhere=True)

    def open(self, raw: Any) -> tuple[Any, BaseException | None]:
        return open_outcome(raw)

    def ahead(self, at_hand: bool) -> int:
        return LOOK_AHEAD * max(1, len(self._members)) * self._batch_now()

    def wait_until(self, until: Callable[[], bool], deadline: float | None) -> object:
        changed = self._changed
        with self._node.given_away(), self._node.loop.following(changed.set) as inside:
            while True:
                changed.clear()  # before looking: what ends from here on is noticed
                if until() or (inside is not None and inside.struck):
                    return None
                timeout = None if deadline is None else deadline - time.monotonic()
                if timeout is not None and timeout <= 0:
                    return None
                changed.wait(timeout)

    def close(self) -> None:
        self.abandon()
        with self._lock:
            unsent = [*self._waiting, *self._again]
            self._waiting.clear()
            self._again.clear()
        del unsent  # without the lock: that may run user code

    def abandon(self) -> None:
        self._closed = True
        lane, self._lane = self._lane, None  # they know each other: the pool would stay until the collector comes
        if lane is not None:
            lane.end()
        self.results.clear()
        self.failed.clear()

    # -- asking for workers (any thread) -----------------------------------------------------------------------

    def _batch_now(self) -> int:
        if self._batch:
            return self._batch
        mean = self._mean
        return max(1, min(_MAX_BATCH, int(config.WINDOW_SECONDS / max(mean, 1e-6)))) if mean >= 0 else 1

    def _ask(self, elsewhere: bool = False) -> None:
        """Ask the pool for as many workers as there are messages to send.

        `elsewhere`: what they are sent is sent by library threads. The consumer's may be interrupted, and then a worker
        that it had just been given would be lost to the pool.
        """
        while True:
            with self._lock:
                wanted = len(self._again) + -(-len(self._waiting) // self._batch_now())
                if self._closed or self._asked >= min(wanted, max(1, len(self._members))):
                    break
                self._asked += 1
            self._ask_for_one(elsewhere)
        lane = self._lane
        if lane is not None:
            lane.look()

    def _ask_for_one(self, elsewhere: bool) -> None:
        try:
            taken = self._pool._take_later()
        except Exception as error:  # the pool's owner is gone
            with self._lock:
                self._asked -= 1
            self._give_up(error)
            return
        self._asking.add(taken)
        if elsewhere:
            taken.add_done_callback(lambda future: self._node.deliver(lambda: self._taken_elsewhere(future)))
        else:
            taken.add_done_callback(self._taken)

    def _taken(self, future: Future[Any]) -> None:
        self._asking.discard(future)
        with self._lock:
            self._asked -= 1
        error = future.exception()
        if error is not None:
            self._give_up(error)
            return
        pid = future.result()
        self.send(pid, lambda: self._put(pid))

    def _taken_elsewhere(self, future: Future[Any]) -> None:
        self._taken(future)
        self._ask()  # whoever fed has looked before this one was taken

    def _put(self, pid: int) -> None:
        try:
            self._pool.put(pid)
        except Exception:
            # The pool has died, as a rule; that is the next taker's error, not that of the elements which have ended,
            # and who waits for those has to hear of them.
            log.debug("worker %d could not be given back to its pool", pid, exc_info=True)

    def _give_up(self, error: BaseException) -> None:
        """No worker is left, or nobody can give one out: what waits has failed.

        The pool hears of a death no later than those do whose call died: what is in flight ends soon and says why the
        pool is empty, so it comes first. (Not if it is the pool that has died: then its workers live on.)
        """
        self.usable = False
        with self._lock:
            for index, _ in (*self._again, *self._waiting):
                self._stranded.append((index, Outcome(RAISED_HERE, error, (), 0)))
            self._again.clear()
            self._waiting.clear()
            now = not self.inflight or isinstance(error, ProcessExitedException)
            if now:
                self._fail_stranded()
        if now:
            self._changed.set()

    def _fail_stranded(self) -> None:
        """`_lock` is held."""
        self.failed.extend(self._stranded)
        self._stranded.clear()

    # -- running (library threads) -----------------------------------------------------------------------------

    def send(self, pid: int, give_back: Callable[[], object]) -> bool:
        """Send the next elements to `pid`; `give_back()` when it has ended, or at once if there is nothing to send."""
        elements, batched = self._next_elements()
        if not elements:
            give_back()
            return False
        with self._lock:
            self.sent += 1
            self.inflight += 1
        begin = time.monotonic()
        batch: Batch | None = None
        try:
            function = self._pool.prepare(self._function, pid)
            if batched:
                batch = Batch(self._node, pid, self._single, [each for _, each in elements])
                future = None if batch.empty else request(run_batch, pid, batch.message(function))
            else:
                argument = elements[0][1]
                future = request(function, pid, (argument,) if self._single else tuple(argument))
        except ProcessExitedException as error:
            if batch is not None:
                batch.withdraw()
            with self._lock:
                self.inflight -= 1
                (self._waiting if batched else self._again).extendleft(reversed(elements))
            give_back()
            if error.worker_id == pid:
                self._ask()
            else:
                self._give_up(error)
            return False
        except Exception as error:
            if batch is not None:
                batch.withdraw()
            give_back()
            self._settle(elements, [Outcome(RAISED_HERE, error, (), 0)] * len(elements))
            return False
        if future is None:  # no element could be serialised
            assert batch is not None
            give_back()
            self._settle(elements, batch.ends)
            return False
        sent = _Sent(pid, elements, batch, begin, give_back, function)
        future.add_done_callback(lambda ended: self._ended(ended, sent))
        return True

    def waits(self) -> bool:
        """Whether elements wait for a worker."""
        return not self._closed and bool(self._waiting or self._again)

    def _next_elements(self) -> tuple[list[_Element], bool]:
        with self._lock:
            if self._closed:
                return [], False
            if self._again:
                return [self._again.popleft()], False
            count = min(self._batch_now(), len(self._waiting))
            return [self._waiting.popleft() for _ in range(count)], self._batch != 1

    def _ended(self, future: Future[Any], sent: _Sent) -> None:
        """A message has been answered, or its worker is lost."""
        seconds = (time.monotonic() - sent.begin) / len(sent.elements)
        self._mean = seconds if self._mean < 0 else 0.7 * self._mean + 0.3 * seconds
        batch = sent.batch
        if batch is None:
            sent.give_back()
            self._settle(sent.elements, [future.outcome()])
            return
        error = future.exception()
        if error is None:
            batch.answered(future.result())
        elif isinstance(error, ProcessExitedException) and future.outcome().status == RAISED_HERE:
            when_known(self._node, sent.pid, partial(self._lost, sent, batch, error))
            return
        else:
            batch.broken(error)
        sent.give_back()
        self._settle(sent.elements, batch.ends)

    def _lost(self, sent: _Sent, batch: Batch, error: BaseException, dead: bool) -> None:
        """The worker of a batch is lost: what had surely not begun goes to others."""
        make_error = self._node.peers.dead.get(sent.pid)
        if make_error is not None:
            error = make_error()  # it says more than that the link was lost
        again = [sent.elements[place] for place in batch.lost(error, dead)]
        with self._lock:
            if not self._closed:
                self._waiting.extendleft(reversed(again))
        sent.give_back()
        self._settle(sent.elements, batch.ends)

    def _settle(self, elements: list[_Element], outcomes: list[Any]) -> None:
        """These outcomes are those of the elements of a message, which is not in flight any more. None: it waits again.

        `outcomes` is emptied: an error in it may have a traceback whose frames have the list.
        """
        for (index, _), outcome in zip(elements, outcomes, strict=True):
            if outcome is None:
                continue
            if outcome.status in (VALUE, LOCAL_VALUE):
                self.results[index] = outcome
            else:
                self.failed.append((index, outcome))
        outcomes.clear()
        if self._closed:  # looked at after the stores, and set before what is stored is dropped
            self.abandon()
        self._landed()
        self._ask()

    def _landed(self) -> None:
        """A message is not in flight any more, and what became of its elements is known."""
        with self._lock:
            self.inflight -= 1
            if not self.inflight:
                self._fail_stranded()
        self._changed.set()


class _Sent(NamedTuple):
    """A message in flight."""

    pid: int
    elements: list[_Element]
    batch: Batch | None
    begin: float  # monotonic seconds
    give_back: Callable[[], object]  # of the worker
    kept: Any  # what has to stay on the worker until then


class _Lane:
    """A worker that serves a map without being taken for it; see the module."""

    def __init__(self, carrier: PoolCarrier) -> None:
        self._carrier = carrier
        self._pid = 0  # not open
        self._busy = False
        self._lock = threading.Lock()  # protects _busy, and the end of `_pid`
        self._seen = -1  # messages sent, at the last look
        self._timer: Any = None
        node = carrier._node
        if node.pid in carrier._members and carrier._pool._do("has", node.pid):
            self._pid = node.pid
        elif not node.is_master:
            node.loop.call_soon(self._wait)

    def _wait(self) -> None:
        self._timer = self._carrier._node.loop.call_later(_PATIENCE, self._consider)

    def end(self) -> None:
        """The map is over. Any thread; a timer that is set this very moment finds that out by itself."""
        if self._timer is not None:
            self._timer.cancel()

    def _consider(self) -> None:
        """Leader: open if the map has made no progress for a while."""
        carrier = self._carrier
        if carrier._closed:
            return
        if carrier.waits() and not carrier.inflight and carrier.sent == self._seen:
            living = [pid for pid in carrier._members if pid not in carrier._node.peers.dead]
            if living:
                self._pid = living[0]
                carrier._node.deliver(self.look)
                return
        self._seen = carrier.sent
        self._wait()

    def look(self) -> None:
        """Send something if it is free."""
        with self._lock:
            if not self._pid or self._busy:
                return
            if self._pid in self._carrier._node.peers.dead:  # it would bring back whatever it is sent, for ever
                self._pid, self._seen = 0, -1
                self._carrier._node.loop.call_soon(self._wait)
                return
            self._busy = True
        self._carrier._node.deliver(lambda: self._carrier.send(self._pid, self._free))

    def _free(self) -> None:
        with self._lock:
            self._busy = False
        if self._carrier.waits():  # came while it was busy
            self.look()


__all__ = ["PoolCarrier"]
