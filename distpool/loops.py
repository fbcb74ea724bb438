"""`distributed`: a parallel for loop over the workers, with or without a reduction; `splitrange` (layer 6).

    seq -> one contiguous part per worker -> body on each element there
    reducer: left fold there, the parts' results folded in order here        none: a future of the whole loop

Parts are cut in the caller's thread; results come on library threads.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from distpool.calls import _node, note_started, print_error
from distpool.errors import CompositeException
from distpool.members import workers
from distpool.node import node as nodes
from distpool.refs import gc
from distpool.refs.refs import Future, Outcome
from distpool.refs.remote import _Waiting
from distpool.refs.travel import reduce_future
from distpool.replies import request
from distpool.wire import codec

_UNSET: Any = object()


def splitrange(first: int, last: int, n: int) -> list[range]:
    """Cut the numbers from `first` to `last`, both included, into at most `n` ranges of nearly equal length.

    None of them is empty; the first ones have the extra elements. ValueError for `n < 1`.
    Example: `splitrange(1, 11, 3)` is `[range(1, 5), range(5, 9), range(9, 12)]`.
    """
    first, last, n = operator.index(first), operator.index(last), operator.index(n)
    if n < 1:
        raise ValueError(f"the number of parts must be at least 1, not {n}")
    size, extras = divmod(max(0, last - first + 1), n)
    parts = []
    begin = first
    for number in range(n):
        end = begin + size + (number < extras)
        if end > begin:
            parts.append(range(begin, end))
        begin = end
    return parts


def distributed(
    body: Callable[[Any], Any],
    seq: Sequence[Any],
    reducer: Callable[[Any, Any], Any] | None = None,
    initial: Any = _UNSET,
) -> Any:
    """Call `body(element)` for each element of `seq`, each worker for its own contiguous part.

    With `reducer`: `reducer(reducer(body(a), body(b)), ...)`, folded on each worker and then here, in order; `initial`
    comes first of all. `RemoteException` of the first part that failed; TypeError for an empty `seq` without `initial`.
    Without: a Future at once, whose `wait()` or `result()` (None) waits for all parts and raises `CompositeException`
    of those that failed; if nobody ever asks, the error is printed on stderr. Only workers compute, pid 1 when alone.

    Example: `distributed(lambda i: i * i, range(1000), operator.add)`
    """
    if not callable(body):
        raise TypeError(f"the body must be callable, not {type(body).__name__}")
    if reducer is not None and not callable(reducer):
        raise TypeError(f"the reducer must be callable, not {type(reducer).__name__}")
    if reducer is None and initial is not _UNSET:
        raise TypeError("initial= needs a reducer")
    length = _length(seq)
    parts = splitrange(0, length - 1, len(pids := workers()))
    work = [(pid, _cut(seq, part)) for pid, part in zip(pids, parts, strict=False)]
    if reducer is None:
        loop = Loop()
        note_started(_node(), loop)
        loop._start(body, work)
        return loop
    if not work and initial is _UNSET:
        raise TypeError("reduce() of an empty sequence with no initial value")
    futures = [request(_fold, pid, (body, reducer, part), remote=True) for pid, part in work]
    futures.reverse()
    values = []
    while futures:
        values.append(futures.pop().result())  # in no variable: its error would have this frame, and so itself
    return functools.reduce(reducer, values) if initial is _UNSET else functools.reduce(reducer, values, initial)


def _length(seq: Any) -> int:
    kind = type(seq)
    if isinstance(seq, Mapping | Set) or not hasattr(kind, "__len__") or not hasattr(kind, "__getitem__"):
        raise TypeError(f"distributed() needs a sequence (len and indexing), not {kind.__name__}")
    return len(seq)


def _cut(seq: Any, part: range) -> Any:
    """The part as something to iterate over; a slice where the sequence has them."""
    try:
        found = seq[part.start : part.stop]
        if len(found) == len(part):
            return found
    except (TypeError, ValueError, KeyError, IndexError):
        pass  # indices only
    return [seq[index] for index in part]


def _fold(body: Callable[[Any], Any], reducer: Callable[[Any, Any], Any], part: Any) -> Any:
    return functools.reduce(reducer, map(body, part))


def _each(body: Callable[[Any], Any], part: Any) -> None:
    for element in part:
        body(element)


_SOON = 2.0  # seconds, at the end, for callbacks of calls whose workers have gone


class Loop(Future[None]):
    """A loop that runs: done when all parts have ended. An error that nobody asked for goes to stderr."""

    _asked = False

    def _start(self, body: Callable[[Any], Any], work: list[tuple[int, Any]]) -> None:
        self._errors: list[Exception | None] = [None] * len(work)
        self._left = len(work)
        self._counting = threading.Lock()  # protects _left
        self._node = _node()
        self._call = _Waiting(gc.of(self._node))
        self._pids = [pid for pid, _ in work]
        self._node.loops[id(self)] = weakref.ref(self)
        if not work:
            self.set_result(None)
        for number, (pid, part) in enumerate(work):
            try:
                future = request(_each, pid, (body, part), remote=True)
            except Exception as error:
                self._ended(number, error)
            else:
                future.add_done_callback(functools.partial(self._part_done, number))

    def _part_done(self, number: int, future: Any) -> None:
        self._ended(number, future.exception())

    def _ended(self, number: int, error: Any) -> None:
        self._errors[number] = error
        with self._counting:
            self._left -= 1
            if self._left:
                return
        errors = [error for error in self._errors if error is not None]
        if errors:
            self.set_exception(CompositeException(errors))
        else:
            self.set_result(None)

    def result(self, timeout: float | None = None) -> None:
        """Wait for all parts; `CompositeException` if some failed."""
        self._asked = True
        try:
            return super().result(timeout)
        finally:
            del self  # see `Future.result`

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for all parts; the `CompositeException`, or None."""
        self._asked = True
        return super().exception(timeout)

    def outcome(self) -> Outcome:
        """For those whom this was sent to: from now on the errors are theirs as well."""
        self._asked = True
        return super().outcome()

    def _say(self) -> None:
        """Print the error, if there is one that nobody has asked for."""
        error = self.__dict__.get("_exception")
        if error is not None and not self._asked:
            self._asked = True
            print_error(error)

    def __del__(self) -> None:
        self._say()
        node = self.__dict__.get("_node")
        if node is not None:
            node.loops.pop(id(self), None)


def report_failed() -> None:
    """At the program's end: print the errors of loops that are held until then, by a global variable, say.

    When Python drops those, it loads no module any more, which is what formatting a traceback takes. And one that a
    thread of ours still holds is not dropped at all: such as one whose workers have just gone, which a callback is
    about to say.
    """
    node = nodes.existing()
    deadline = time.monotonic() + _SOON
    if node is None:
        return
    for reference in list(node.loops.values()):
        loop = reference()
        if loop is None:
            continue
        if not loop._is_over and node.peers.dead.keys() >= set(loop._pids):
            with contextlib.suppress(Exception):  # it takes longer: another thread cannot begin at this time, say
                Future.exception(loop, max(0.0, deadline - time.monotonic()))
        loop._say()


codec.register_reducer(Loop, reduce_future)

__all__ = ["Loop", "distributed", "report_failed", "splitrange"]
