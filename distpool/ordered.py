"""One ordered map over a lazily consumed input: the loop behind `pmap` and `pgenerate` (layer 7).

    advance():  failures that came      -> Recovery: a value, another attempt, the end
                retries that are due    -> carrier
                the next result is here -> the caller takes it
                room in the look-ahead  -> elements from the input -> carrier
                otherwise               -> wait for a result, a failure or the next retry

Everything happens in the consumer's thread, user code of the input and hooks included; results come from the carrier by
index. Nothing sleeps here while a retry waits for its time: the wait for results just ends when the retry is due.

How far ahead: elements that were taken and not delivered, for an input whose consumption somebody may notice (then a
slow first element stops the taking, as the bound promises); elements that have not ended, for lists, ranges and the
like, so that the workers stay busy behind a slow one.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from distpool.dropped import WhenDropped
from distpool.elements import Carrier
from distpool.recovery import Again, Ended, Given, Recovery
from distpool.refs.refs import LOCAL_VALUE, Outcome
from distpool.wire import codec

_QUICK = 0.001  # seconds of taking elements before results are looked at again


class OrderedMap:
    """Feeds `source` to `carrier` and has the results in input order.

    `at_hand`: the input lies in memory and taking from it is unobservable. `batch`: elements are fed in multiples of
    it. `eager_errors`: raise an error as soon as it is known, not at the element's turn.
    """

    def __init__(
        self,
        carrier: Carrier,
        source: Iterator[Any],
        recovery: Recovery,
        *,
        at_hand: bool,
        batch: int,
        eager_errors: bool,
    ) -> None:
        self._carrier = carrier
        self._source: Iterator[Any] | None = source
        self._recovery = recovery
        self._at_hand = at_hand
        self._batch = batch
        self._eager = eager_errors
        self._results = carrier.results
        self._failed = carrier.failed
        self._taken: list[Any] = []  # elements of a batch that is not complete
        self._arguments: dict[int, Any] = {}  # of undelivered elements, if they may have to run again
        self._due: list[tuple[float, int]] = []  # heap of (monotonic seconds, index): retries that wait
        self._head = 0  # elements delivered
        self._input_error: BaseException | None = None
        self._closed = False
        self._dropped = WhenDropped(carrier.abandon)

    @property
    def finished(self) -> int:
        """Elements that have their value."""
        return self._head + len(self._results)

    # -- the consumer's side -----------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Wait until the next result is there; False at the end. Raises what ended the map."""
        while not self._closed:
            if self._failed:
                self._recover(*self._next_failure())
            elif self._due and self._due[0][0] <= time.monotonic():
                self._run_again(heapq.heappop(self._due)[1])
            elif self._head in self._results:
                if self._source is not None and self._wants_more():
                    self._take()  # once: a slow input must not keep the result for long
                return True
            elif self._source is not None and self._room() > 0:
                self._take()
            elif self._head >= self._carrier.fed:
                self._finish()
            else:
                self._carrier.wait_until(self._something, self._due[0][0] if self._due else None)
        return False

    def take(self) -> list[Any]:
        """The values that are there, in order; may be empty where one could not be rebuilt here."""
        values: list[Any] = []
        results, decode, keep = self._results, codec.decode, self._arguments
        append, pop, head = values.append, results.pop, self._head
        try:
            while True:  # no condition: see tests/test_interruptible.py
                raw = pop(head, None)
                if raw is None:
                    break
                if type(raw) is bytes:
                    try:
                        append(decode(raw))
                    except KeyboardInterrupt:
                        raise
                    except BaseException as error:
                        self._recover(head, error)
                        break
                elif type(raw) is Outcome and raw.status == LOCAL_VALUE:
                    append(raw.data)
                elif not self._open(head, raw, append):
                    break
                if keep:
                    self._forget(head)
                head += 1
        finally:
            self._head = head
        return values

    def take_one(self) -> list[Any]:
        """As `take`, but at most one value."""
        values: list[Any] = []
        head = self._head
        raw = self._results.pop(head, None)
        if raw is not None and self._open(head, raw, values.append):
            self._forget(head)
            self._head = head + 1
        return values

    def close(self) -> None:
        """No more results are wanted: nothing new starts, what was sent ahead is recalled."""
        if not self._closed:
            self._closed = True
            self._source = None
            self._arguments.clear()
            self._carrier.close()
            self._dropped.cancel()

    # -- elements that ended -----------------------------------------------------------------------------------

    def _open(self, index: int, raw: Any, append: Callable[[Any], object]) -> bool:
        """Append the value of an entry; False if it is a failure (which has then been dealt with)."""
        kind = type(raw)
        if kind is Given:
            append(raw.value)
            return True
        if kind is Ended:
            self._raise(raw.error)
        value, error = self._carrier.open(raw)
        if error is None:
            append(value)
            return True
        self._recover(index, error)
        return False

    def _next_failure(self) -> tuple[int, BaseException | None]:
        index, raw = self._failed.popleft()
        return index, self._carrier.open(raw)[1]

    def _recover(self, index: int, error: BaseException | None) -> None:
        assert error is not None
        outcome = None
        try:
            outcome = self._recovery.decide(index, error, self._carrier.usable)
            if type(outcome) is Again:
                heapq.heappush(self._due, (time.monotonic() + outcome.delay, index))
            elif type(outcome) is Ended and self._eager:
                self._raise(outcome.error)
            else:
                if type(outcome) is Ended:
                    self._source = None  # no new element; those before it are still delivered
                    self._taken.clear()
                self._results[index] = outcome
        finally:
            del error, outcome  # no cycle of exception and frame

    def _raise(self, error: BaseException) -> None:
        self.close()
        try:
            raise error
        finally:
            del error

    def _run_again(self, index: int) -> None:
        self._carrier.again(index, self._arguments[index])

    def _forget(self, index: int) -> None:
        if self._arguments:
            self._arguments.pop(index, None)
            self._recovery.forget(index)

    def _something(self) -> bool:
        """Whether there is something to do."""
        if self._head in self._results or self._failed:
            return True
        return self._source is not None and self._wants_more()

    def _finish(self) -> None:
        self.close()
        error, self._input_error = self._input_error, None
        if error is not None:
            self._raise(error)

    # -- the input ---------------------------------------------------------------------------------------------

    def _room(self, ahead: int | None = None) -> int:
        done = self.finished if self._at_hand else self._head
        ahead = self._carrier.ahead(self._at_hand) if ahead is None else ahead
        return ahead - (self._carrier.fed + len(self._taken) - done)

    def _wants_more(self) -> bool:
        """Whether enough is missing that feeding is worth a round: half of the look-ahead."""
        ahead = self._carrier.ahead(self._at_hand)
        return self._room(ahead) * 2 >= ahead

    def _take(self) -> None:
        """Take elements from the input while that is quick, and feed them in whole batches."""
        assert self._source is not None
        taken, room = self._taken, max(0, self._room())  # it may have shrunk since who calls has looked
        ended = False
        try:
            if self._at_hand:
                more = list(itertools.islice(self._source, room))
                ended = len(more) < room
                taken.extend(more)
            else:
                until = time.monotonic() + _QUICK
                for _ in range(room):
                    taken.append(next(self._source))
                    if time.monotonic() > until:
                        break
        except StopIteration:
            ended = True
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # raised after the results of what came before it
            ended, self._input_error = True, error
        if ended:
            self._source = None
        count = len(taken) if ended else len(taken) - len(taken) % self._batch
        if count:
            self._feed(taken[:count])
            del taken[:count]

    def _feed(self, arguments: list[Any]) -> None:
        if self._recovery.may_retry:
            self._arguments.update(zip(itertools.count(self._carrier.fed), arguments, strict=False))
        self._carrier.feed(arguments)


__all__ = ["OrderedMap"]
