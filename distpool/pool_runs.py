"""Parts of a pool's maps: calls with a time limit or retries, elements that are argument lists, chunks (layer 10).

    feed, feed_chunk  ->  one Call with the policy per element (or chunk)  ->  scheduler
    Call settled      ->  _Place._finish  ->  MapRun.settle(index, outcome)

A `MapRun` sends elements by spans, which have no policy; `PolicyRun` has the same face and sends them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from distpool.mapruns import MapRun
from distpool.progress import Progress
from distpool.refs.refs import RAISED_HERE, Future, Outcome
from distpool.scheduling import Scheduler
from distpool.wire import codec
from distpool.wire.functions import EncodedFunction
from distpool.wire.messages import ONE, ONE_FRESH
from distpool.work import Call, Policy


class _Place(Future[Any]):
    """Where a call leaves its outcome: an index of a map."""

    _watched = True  # it has a `_finish` of its own

    def __init__(self, run: MapRun, index: int) -> None:
        super().__init__()
        self._place = run, index

    def _finish(self, state: str, raw: Outcome | None = None, result: Any = None, error: Any = None) -> bool:
        ended = super()._finish(state, raw, result, error)
        if ended:
            run, index = self._place
            run.settle(index, self.outcome())  # also if it was cancelled, by the end of the executor
            self._raw = None  # it is the map's
        return ended


class PolicyRun(MapRun):
    """A `MapRun` whose elements are calls under `policy`."""

    def __init__(
        self, scheduler: Scheduler, function: EncodedFunction, policy: Policy, *, single: bool, ordered: bool = True
    ) -> None:
        super().__init__(scheduler, function, single=single, ordered=ordered, chunked=True)
        self._policy = policy

    def feed(self, arguments: list[Any]) -> None:
        """Add elements; see `MapRun.feed`."""
        flags = ONE if self.function.reusable else ONE_FRESH
        for argument in arguments:
            args = (argument,) if self.single else argument
            seen: list[Any] = []
            self._call(self._record(partial(codec.encode_args, args, {}, None, seen), flags, seen, args))

    def feed_chunk(self, chunk: list[Any]) -> None:
        """Add a chunk; see `MapRun.feed_chunk`."""
        self._call(self._chunk_record(chunk))

    def feed_chunks(self, chunks: list[list[Any]]) -> None:
        """Add several chunks; see `MapRun.feed_chunks`."""
        for chunk in chunks:
            self.feed_chunk(chunk)

    def _call(self, record: Any) -> None:
        index = self.fed
        self.fed += 1
        if isinstance(record, Exception):
            self.settle(index, Outcome(RAISED_HERE, record, (), 1))
            return
        data, staged = record
        future = _Place(self, index)
        call = Call(self.scheduler, self.function, data, staged, future, self._policy)
        future._call = call
        if self.closed:
            call.release()
        else:
            self.scheduler.enqueue(call)


class _Star:
    """`func(*x)` as a function of x: for elements of `starmap` that are neither tuples nor lists."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self._func = func

    def __call__(self, arguments: Iterable[Any]) -> Any:
        return self._func(*arguments)


def star_arguments(func: Callable[..., Any], items: list[Any]) -> tuple[Callable[..., Any], list[Any], bool]:
    """Function, elements, and whether each element is one argument."""
    if all(type(item) is tuple for item in items):
        return func, items, False
    if all(type(item) in (tuple, list) for item in items):
        return func, [tuple(item) for item in items], False
    return _Star(func), items, True  # what they are, and whether they can be iterated, shows on the worker


def chained(results: Iterator[Any], bar: Progress | None) -> Iterator[Any]:
    try:
        for chunk in results:
            for value in chunk:
                if bar is not None:
                    bar.update()
                yield value
    finally:
        if bar is not None:
            bar.close()


__all__ = ["PolicyRun", "chained", "star_arguments"]
