"""The maps of `DistPool` (layer 10).

    map, starmap   list -> chunks -> MapRun.feed_chunk -> worker;  leader counts;  MapResult decodes when asked
    imap           input -> Feed (pool_input) -> MapRun -> worker -> IMapIterator

Everything here runs in the calling thread. A map whose calls have a time limit or retries goes through a `PolicyRun`,
which has the face of a `MapRun`.
"""

from __future__ import annotations

import math
import multiprocessing.pool as stdlib
import operator
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import INIT, RUN
from typing import Any

from distpool.crew import Crew
from distpool.mapruns import LOOK_AHEAD, MapRun, look_ahead
from distpool.pool_callbacks import Callbacks
from distpool.pool_input import PLAIN, Feed, Inputs
from distpool.pool_results import IMapIterator, IMapUnorderedIterator, MapResult
from distpool.pool_runs import PolicyRun, chained, star_arguments
from distpool.progress import Progress, make_progress
from distpool.work import Policy


class PoolMaps(stdlib.Pool):
    """Base of `DistPool`: what is needed to run maps, and the maps."""

    # Here, so that it exists in __del__ and __repr__ if __init__ raises.
    _state: str = INIT
    _inputs: Inputs | None = None
    _crew: Crew
    _callbacks: Callbacks
    _policy: Policy | None
    _progress: Any

    def _check_running(self) -> None:
        if self._state != RUN:
            raise ValueError("Pool not running")

    def _check_usable(self) -> None:
        self._check_running()
        crew = self._crew
        crew.scheduler.check_process()
        if crew.broken is not None:
            raise type(crew.broken)(*crew.broken.args) from crew.broken

    # -- maps --------------------------------------------------------------------------------------------------

    def map(self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """The list of `func(x)` for each x, in order.

        The input is sent in chunks of `chunksize` (default: a quarter of each worker's share). An exception ends its
        chunk; the other chunks complete, then the first failed chunk's exception is raised.

        Example: `pool.map(abs, range(-3, 0))` is [3, 2, 1].
        """
        return self._map_async(func, iterable, chunksize, None, None, single=True).get()  # type: ignore[no-any-return]

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None
    ) -> list[Any]:
        """As `map`, with `func(*x)` for each x.

        Example: `pool.starmap(pow, [(2, 3), (3, 2)])` is [8, 9].
        """
        return self._map_async(func, iterable, chunksize, None, None, single=False).get()  # type: ignore[no-any-return]

    def map_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult:
        """Start a `map`; callbacks as for `apply_async`.

        Example: `pool.map_async(abs, range(-3, 0)).get(timeout=5)`
        """
        return self._map_async(func, iterable, chunksize, callback, error_callback, single=True)

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult:
        """Start a `starmap`; callbacks as for `apply_async`.

        Example: `pool.starmap_async(pow, [(2, 3)]).get(timeout=5)`
        """
        return self._map_async(func, iterable, chunksize, callback, error_callback, single=False)

    def _map_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None,
        callback: Any,
        error_callback: Any,
        *,
        single: bool,
    ) -> MapResult:
        self._check_usable()
        sized = hasattr(iterable, "__len__")
        error: BaseException | None = None
        items: list[Any] = []
        try:
            items = iterable if type(iterable) is list else list(iterable)
        except Exception as failure:
            if not sized:
                raise
            error = failure  # as in the standard library: `get()` raises it
        chunksize = self._chunksize(len(items), chunksize)
        run: MapRun | None = None
        if items:
            if not single:
                func, items, single = star_arguments(func, items)
            try:
                run = self._make_run(func, single=single, ordered=True, chunked=chunksize > 1)
            except Exception as failure:
                error = failure
        bar = None
        if self._progress and run is not None:
            bar = make_progress(self._progress, len(items)), len(items)
        entries = -(-len(items) // chunksize)
        result = MapResult(
            self._callbacks, callback, error_callback, run, entries, chunksize=chunksize, error=error, bar=bar
        )
        if run is None:
            pass
        elif chunksize == 1:
            run.feed(items if items is not iterable else list(items))
        else:
            run.feed_cut(items, chunksize, plain=single and type(iterable) is range and type(run) is MapRun)
        return result

    def _chunksize(self, length: int, chunksize: int | None) -> int:
        if chunksize is None:
            return max(1, math.ceil(length / (4 * self._crew.size)))
        chunksize = operator.index(chunksize)
        if chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize}")
        return chunksize

    def _make_run(self, func: Callable[..., Any], *, single: bool, ordered: bool, chunked: bool) -> MapRun:
        function = self._crew.node.encoder.encode(func)
        scheduler = self._crew.scheduler
        if self._policy is not None:
            return PolicyRun(scheduler, function, self._policy, single=single, ordered=ordered)
        return MapRun(scheduler, function, single=single, ordered=ordered, chunked=chunked)

    # -- lazy maps ---------------------------------------------------------------------------------------------

    def imap(  # type: ignore[override]
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int = 1
    ) -> Iterator[Any]:
        """An iterator over `func(x)` for each x, in order; with `next(timeout)` if `chunksize` is 1.

        Lazy: at most 8 tasks per worker are taken ahead (of short tasks over a plain container: more), so endless
        generators work. The input is taken by a library thread unless it is a plain container.

        Example: `for value in pool.imap(f, itertools.count()): ...`
        """
        return self._imap(func, iterable, chunksize, IMapIterator)

    def imap_unordered(  # type: ignore[override]
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int = 1
    ) -> Iterator[Any]:
        """As `imap`, with the results in the order in which they come.

        Example: `for value in pool.imap_unordered(f, open("names.txt")): ...`
        """
        return self._imap(func, iterable, chunksize, IMapUnorderedIterator)

    def _imap(
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int, kind: type[IMapIterator]
    ) -> Iterator[Any]:
        self._check_usable()
        chunksize = self._chunksize(0, 1 if chunksize is None else chunksize)
        source = iter(iterable)
        crew, error = self._crew, None
        ordered, plain = kind is IMapIterator, type(iterable) in PLAIN
        try:
            run = self._make_run(func, single=True, ordered=ordered, chunked=chunksize > 1)
        except Exception as failure:
            error = failure
            run = MapRun(crew.scheduler, None, single=True)  # type: ignore[arg-type]  # stays empty
        inputs = self._inputs
        assert inputs is not None
        feed = Feed(
            run,
            source,
            inputs,
            chunk=chunksize if chunksize > 1 else None,
            look_ahead=lambda: (look_ahead(run.timing.mean, LOOK_AHEAD) if plain else LOOK_AHEAD) * crew.size,
            plain=plain,
            error=error,
        )
        if error is None:
            inputs.add(feed)
            if self._state != RUN:  # closed by another thread this very moment
                inputs.remove(feed)
                self._check_running()
            feed.go_on()
        results = kind(self, feed, self._callbacks, self._bar(iterable) if chunksize == 1 else None)
        if chunksize == 1:
            return results
        return chained(results, self._bar(iterable))

    def _bar(self, iterable: Iterable[Any]) -> Progress | None:
        if not self._progress:
            return None
        length = getattr(iterable, "__len__", None)
        return make_progress(self._progress, length() if length is not None else None)


__all__ = ["PoolMaps"]
