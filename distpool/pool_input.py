"""The input of `imap` and `imap_unordered` on its way to the workers, bounded (layer 10).

    plain containers   the consumer's thread takes a few elements whenever there is room
    other iterables    a library thread takes them, one at a time, and leaves when the look-ahead is full
    join()             takes the rest, whatever the look-ahead says: `imap`, `close`, `join`, read is a common idiom

A generator may block: on a queue that is filled only after `imap` has returned, or by somebody who waits for the result
of the element before. multiprocessing.Pool serves both, because a thread of its own takes the input; so does this.
(Tried: `LazyMap`, which takes in the consumer's thread: both programs hang. One feeder thread per map, for its whole
life: it costs a thread hand-over for each element, where leaving and coming back costs one per half a look-ahead.)
Elements of a generator are fed singly: one that was held back for a batch might be the one somebody waits for.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from distpool.mapruns import MapRun
from distpool.work import all_scalars

if TYPE_CHECKING:
    from distpool.executor import ClusterExecutor

#: Containers whose iteration cannot block and runs no user code.
PLAIN = frozenset((list, tuple, range, dict, set, frozenset, str, bytes, bytearray))


class Feed:
    """The input of one map. `delivered` is counted by the consumer, everything else happens here."""

    def __init__(
        self,
        run: MapRun,
        source: Iterator[Any],
        inputs: Inputs,
        *,
        chunk: int | None,
        look_ahead: Callable[[], int],
        plain: bool,
        error: BaseException | None = None,
    ) -> None:
        self.run = run
        self.delivered = 0
        self.error = error  # of the input: raised after the results of what was taken before it
        self.consumed = False  # somebody has asked for a result
        self.orphaned = False  # nobody will ask for results any more
        self._source: Iterator[Any] | None = source if error is None else None
        self._inputs = inputs
        self._chunk = chunk
        self._look_ahead = look_ahead
        self._plain = plain
        self._unbounded = False
        #: Held by whoever takes from the input; never waited for. Of containers that is the consumer's thread, which
        #: Ctrl-C may strike anywhere: it can tell whether it still holds this. Else it goes to a library thread.
        self._taking: Any = threading.RLock() if plain else threading.Lock()

    @property
    def ended(self) -> bool:
        """Whether nothing more will be fed."""
        return self._source is None

    @property
    def finished(self) -> bool:
        """Whether all that was fed has been delivered, and nothing more will be fed."""
        return self._source is None and self.delivered >= self.run.fed

    def _room(self) -> int:
        if self._unbounded:
            return 1 << 10
        return self._look_ahead() - (self.run.fed - self.delivered)

    def _has_room(self) -> bool:
        """Whether there is room enough to begin: half a look-ahead at a time."""
        room = self._room() if self._source is not None else 0
        return room > 0 and (self._unbounded or room * 2 >= self._look_ahead())

    def _begins(self) -> bool:
        """Whether there is room enough to begin, and nobody is taking any: the caller is who takes from now on."""
        return self._has_room() and self._taking.acquire(blocking=False)

    def go_on(self) -> None:
        """Take more input if there is room and nobody is taking any."""
        if self._plain:
            self._go_on_here()
            return
        if not self._has_room():  # as a rule: deferring signals costs as much as all the rest
            return
        loop = self.run.scheduler.loop
        critical = loop.enter_critical()  # no Ctrl-C between the two
        try:
            if self._begins():
                self.run.scheduler.node.deliver(self._take)
        finally:
            if critical:
                loop.leave_critical()

    def _go_on_here(self) -> None:
        """As `go_on`. The lock is let go of twice: Ctrl-C may come between its acquisition and `_take`, or as the first
        `finally` begins. (It was left held: whoever asked for more, or joined the pool, waited for ever.)"""
        if self._taking._is_owned():  # what an element is serialised with asks for results
            return
        try:
            try:
                if self._begins():
                    self._take()
            finally:
                self._let_go()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._taking._is_owned():
            self._taking.release()

    def _take(self) -> None:
        """Holding `_taking`: take until there is no more room."""
        while True:
            try:
                while True:  # no condition: see tests/test_interruptible.py
                    room = self._room()
                    if self._source is None or room <= 0:
                        break
                    self._take_some(room)
            finally:
                self._taking.release()
            # Whoever found the lock taken has left: look again after the release, or nobody would.
            if not self._begins():
                return

    def _take_some(self, room: int) -> None:
        source = self._source
        assert source is not None
        run, fed = self.run, self.run.fed
        count = room if self._plain else 1
        items: list[Any] = []
        failure: BaseException | None = None
        try:
            items.extend(itertools.islice(source, count * (self._chunk or 1)))  # keeps what came before an error
        except BaseException as error:  # whatever the user's iterator raises is for the consumer
            if issubclass(type(error), KeyboardInterrupt) and self._plain:
                raise  # Ctrl-C in the consumer's thread; containers do not raise, so nothing was taken
            failure = error
        if self._source is None:
            return  # stopped meanwhile
        if failure is not None and self._chunk is not None:  # as in the standard library's Pool (CPython's own test)
            del items[len(items) - len(items) % self._chunk :]  # a chunk that was not complete is not sent
        if not items:
            self._end(failure)
            return
        if self._chunk is not None:
            chunks = [items[start : start + self._chunk] for start in range(0, len(items), self._chunk)]
            if all_scalars(items[:1], True):
                run.feed_chunks(chunks)
            else:
                for chunk in chunks:
                    run.feed_chunk(chunk)
        elif all_scalars(items[:1], True):
            run.feed(items)
        else:
            for item in items:  # singly: workers begin before the last one is serialised
                run.feed([item])
        if failure is not None:
            self._end(failure)
        if self._unbounded or (not self._plain and fed in run.results):
            run.scheduler.loop.wake()  # something may have failed here and now, while the consumer leads the loop

    def _end(self, error: BaseException | None) -> None:
        if self._source is None:
            return
        self.error = error
        self._source = None
        self._inputs.remove(self)
        self._wake()

    def _wake(self) -> None:
        self.run.wake()
        self.run.scheduler.loop.wake()

    # -- from outside ------------------------------------------------------------------------------------------

    def stop(self, error: BaseException) -> None:
        """Take no more; whoever consumes gets `error` after the results of what was taken. Any thread."""
        self._end(error)

    def abandon(self) -> None:
        """The consumer is gone (called by its finalizer: takes no lock, waits for nothing).

        An iterator that was never asked for a result was not meant to be: all of its input runs, if the pool is joined.
        One that was left half-way was left on purpose, perhaps because its input is endless: nothing more is taken.
        """
        self.orphaned = True
        self.run.disown()
        if self.consumed or self._source is None:
            self._source = None
            if self.consumed:
                self.run.abandon()
            self._inputs.remove(self)

    def take_rest(self) -> None:
        """Take all of the input, for `join`; returns when that is done."""
        if self.orphaned:
            self._run_unread()
            return
        self._unbounded = True
        self.go_on()
        self.run.wait_until(lambda: self._source is None)

    def _run_unread(self) -> None:
        """Run everything, within the look-ahead, and drop the results."""
        run = self.run
        results, ready = run.results, run.ready
        while not self.finished:
            while results:
                results.popitem()
                self.delivered += 1
            if ready is not None:
                ready.clear()
            self.go_on()
            run.wait_until(lambda: bool(results) or self.finished)


class Inputs:
    """The inputs of a pool that have not ended: a closed pool lets its workers go only after them."""

    def __init__(self, executor: ClusterExecutor) -> None:
        self._executor = executor
        self._feeds: set[Feed] = set()  # single operations only, which are atomic
        self._closing = False

    def add(self, feed: Feed) -> None:
        """This input may need the workers."""
        self._feeds.add(feed)

    def remove(self, feed: Feed) -> None:
        """This input has ended. Safe in finalizers."""
        self._feeds.discard(feed)
        self._let_go()

    def close(self) -> None:
        """No new inputs: let the workers go when those here have ended."""
        self._closing = True
        self._let_go()

    def _let_go(self) -> None:
        if self._closing and not self._feeds:
            self._executor.shutdown(wait=False)

    def take_rest(self) -> None:
        """Take all of every input."""
        while self._feeds:
            for feed in list(self._feeds):
                feed.take_rest()
                self._feeds.discard(feed)
        self._let_go()

    def stop(self, error: Callable[[], BaseException]) -> None:
        """Take nothing more of any input."""
        for feed in list(self._feeds):
            feed.stop(error())

    def forget(self) -> None:
        """The pool is gone: break the cycles. Safe in finalizers."""
        self._feeds.clear()


__all__ = ["PLAIN", "Feed", "Inputs"]
