"""Iterators over the results of the executor's maps (layer 10). All of it runs in the consumer's thread."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from distpool.config import deadline_after
from distpool.dropped import WhenDropped
from distpool.hints import Any
from distpool.lazymap import open_entry
from distpool.mapruns import Many, MapRun
from distpool.refs.refs import Future
from distpool.wire.functions import function_name
from distpool.work import is_plain


def fed_results(run: MapRun, deadline: float | None, chunked: bool) -> Iterator[Any]:
    """The results of a map whose input has been fed, in order, keeping no reference to what was yielded."""
    # Nothing of a generator runs when it is dropped before its first value: what is to be done then is one of its
    # arguments, and goes with it.
    dropped = WhenDropped(run.disown)
    # No Python code runs for each of those that come together, which are the values of tiny calls.
    return flattened((_fed_chunks if chunked else _fed_elements)(run, dropped, deadline))


def _fed_chunks(run: MapRun, dropped: WhenDropped, deadline: float | None) -> Iterator[Iterator[Any]]:
    try:
        for index in range(run.fed):
            if index not in run.results and not run.wait_for(index, deadline):
                raise TimeoutError
            yield _each(open_entry(run.results.pop(index)))
    finally:
        run.close()
        dropped.cancel()


def _each(values: list[Any]) -> Iterator[Any]:
    """The values of a list that nobody else has; none of them is kept when it has been taken. (Scalars are, until the
    last of them has been taken: most lists of tiny calls are all scalars, and that is a third of the time.)"""
    if is_plain((values[0], values[-1])):
        return iter(values)
    values.reverse()
    return map(list.pop, itertools.repeat(values, len(values)))  # `while values: yield values.pop()`, in C


def _fed_elements(run: MapRun, dropped: WhenDropped, deadline: float | None) -> Iterator[Iterator[Any]]:
    results, take = run.results, run.results.pop
    index = 0
    try:
        while True:  # no condition: see tests/test_interruptible.py
            if index >= run.fed:
                break
            if index not in results and not run.wait_for(index, deadline):
                raise TimeoutError
            if type(results[index]) is Many:
                many = take(index)
                values = many.values()
                index += many.length
                del many
                yield _each(values)
            else:  # without a variable for the entry: a large value lies in its buffers
                index += 1
                yield _each([open_entry(take(index - 1))])
    finally:
        run.close()
        dropped.cancel()


class _Flat(itertools.chain[Any]):
    """The elements of chunks, one after another, in C; with `close`, as the standard library's generators have it."""

    chunks: Any

    def close(self) -> None:
        """Nothing more is wanted."""
        self.chunks.close()
        for _ in self:  # of the chunk that was under way
            pass


def flattened(chunks: Any) -> Iterator[Any]:
    """The elements of `chunks`: an iterator of iterables, with `close`."""
    results: Any = _Flat.from_iterable(chunks)
    results.chunks = chunks
    return results  # type: ignore[no-any-return]


class _Input(Iterator[Any]):
    """An input that ends where it raises: its error comes after the results of what was taken before it."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._error: BaseException | None = None

    def __next__(self) -> Any:
        try:
            return next(self._source)
        except (StopIteration, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._source = iter(())
            self._error = error
            raise StopIteration from None

    def finish(self) -> None:
        """Raise what it raised."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # no cycle of exception and frame


def future_results(
    futures: list[Future[Any]], more: Iterator[Future[Any]], source: _Input, deadline: float | None
) -> Iterator[Any]:
    futures.reverse()
    waiting = futures
    try:
        while True:  # no condition: see tests/test_interruptible.py
            if not waiting:
                break
            following = next(more, None)
            if following is not None:
                waiting.insert(0, following)
            waiting[-1].exception(None if deadline is None else max(0.0, deadline - time.monotonic()))
            yield waiting.pop().result()
        source.finish()
    finally:
        for future in waiting:
            future.cancel()


def check_map(timeout: float | None, chunksize: int, buffersize: int | None) -> float | None:
    """The deadline (monotonic seconds); ValueError and TypeError with the standard library's texts."""
    if chunksize < 1:
        raise ValueError("chunksize must be >= 1.")
    if buffersize is not None and not isinstance(buffersize, int):
        raise TypeError("buffersize must be an integer or None")
    if buffersize is not None and buffersize < 1:
        raise ValueError("buffersize must be None or > 0")
    return deadline_after(timeout)


def map_by_futures(
    submit: Callable[..., Future[Any]],
    fn: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    deadline: float | None,
    chunksize: int,
    buffersize: int | None,
) -> Iterator[Any]:
    """One future per chunk: for a replaced `submit` (tqdm), for policies, and for handles inside tasks."""
    source = _Input(zip(*iterables, strict=False))
    if chunksize > 1:
        chunks = iter(lambda: tuple(itertools.islice(source, chunksize)), ())
        start: Iterator[Future[Any]] = (submit(run, chunk) for run in [OfChunks(fn)] for chunk in chunks)
    else:
        start = (submit(fn, *args) for args in source)
    futures = list(itertools.islice(start, buffersize))
    if buffersize is None:
        source.finish()
    results = future_results(futures, start, source, deadline)
    return flattened(results) if chunksize > 1 else results


def unordered_futures(
    submit: Callable[..., Future[Any]],
    fn: Callable[..., Any],
    arguments: Iterator[Any],
    ahead: int,
    deadline: float | None,
    waiting: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Iterator[Any]:
    """Results as they come, at most `ahead` elements taken from `arguments` before they are delivered."""
    pending: set[Future[Any]] = set()
    source = _Input(arguments)
    try:
        while True:
            pending.update(submit(fn, *args) for args in itertools.islice(source, ahead - len(pending)))
            if not pending:
                source.finish()
                return
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            with waiting():
                done, rest = concurrent.futures.wait(pending, timeout, concurrent.futures.FIRST_COMPLETED)
            pending = set(rest)  # type: ignore[arg-type]
            if not done:
                raise TimeoutError
            while True:  # the same
                if not done:
                    break
                yield done.pop().result()
    finally:
        for future in pending:
            future.cancel()


class OfChunks:
    """What runs a chunk of a map on the worker. It has the name of the user's function, which is what a time limit that
    was exceeded, the log of retries and `stats` are about.

    Example: `OfChunks(divmod)([(7, 2), (9, 3)])` is `[(3, 1), (3, 0)]`
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self.__module__ = "builtins"  # the names of whose functions are shown without it
        self.__qualname__ = function_name(fn)

    def __reduce__(self) -> Any:
        return OfChunks, (self._fn,)

    def __call__(self, chunk: Iterable[tuple[Any, ...]]) -> list[Any]:
        fn = self._fn
        return [fn(*args) for args in chunk]
