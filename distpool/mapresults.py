"""Iterators over the results of the executor's maps (layer 10). All of it runs in the consumer's thread."""

from __future__ import annotations

import concurrent.futures
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from distpool.lazymap import open_entry
from distpool.refs.refs import Future
from distpool.work import MapRun


def fed_results(run: MapRun, deadline: float | None, chunked: bool) -> Iterator[Any]:
    """Yield the results of a map whose input has been fed, in order, keeping no reference to what was yielded."""
    results, take = run.results, run.results.pop
    try:
        for index in range(run.fed):
            if index not in results and not run.wait_for(index, deadline):
                raise TimeoutError
            if chunked:
                values = open_entry(take(index))
                values.reverse()
                while values:
                    yield values.pop()
            else:
                yield open_entry(take(index))
    finally:
        run.close()


def future_results(futures: list[Future[Any]], more: Iterator[Future[Any]], deadline: float | None) -> Iterator[Any]:
    futures.reverse()
    waiting = futures
    try:
        while waiting:
            timeout = None if deadline is None else deadline - time.monotonic()
            waiting[-1].exception(timeout) if timeout is None else waiting[-1].exception(max(0.0, timeout))
            following = next(more, None)
            if following is not None:
                waiting.insert(0, following)
            yield waiting.pop().result()
    finally:
        for future in waiting:
            future.cancel()


def unordered_futures(
    submit: Callable[..., Future[Any]],
    fn: Callable[..., Any],
    arguments: Iterator[Any],
    ahead: int,
    deadline: float | None,
) -> Iterator[Any]:
    pending: set[Future[Any]] = set()
    try:
        while True:
            pending.update(submit(fn, *args) for args in itertools.islice(arguments, ahead - len(pending)))
            if not pending:
                return
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            done, pending = concurrent.futures.wait(pending, timeout, concurrent.futures.FIRST_COMPLETED)  # type: ignore[assignment]
            if not done:
                raise TimeoutError
            while done:
                yield done.pop().result()
    finally:
        for future in pending:
            future.cancel()


def run_chunk(fn: Callable[..., Any], chunk: tuple[Any, ...]) -> list[Any]:
    """On the worker: one chunk of a map."""
    return [fn(*args) for args in chunk]
