"""How a `DistPool` does what it is asked for (layer 10).

    apply_async    Call -> Scheduler -> worker;  leader: Outcome -> ApplyResult                    (pool_results)
    map, starmap   list -> chunks -> MapRun -> worker;  leader counts;  MapResult decodes when asked
    imap           input -> Feed (pool_input) -> MapRun -> worker -> IMapIterator
    callbacks      one library thread, one after another                                           (pool_callbacks)

Everything here runs in the calling thread. A map whose calls have a time limit or retries goes through a `PolicyRun`,
which has the face of a `MapRun`.
"""

from __future__ import annotations

import atexit
import math
import operator
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import RUN
from typing import TYPE_CHECKING, Any

from distpool.mapruns import LOOK_AHEAD, MapRun, look_ahead
from distpool.node import node as nodes
from distpool.pool_callbacks import Callbacks, PoolTerminated
from distpool.pool_input import PLAIN, Feed, Inputs
from distpool.pool_results import ApplyResult, AsyncResult, IMapIterator, IMapUnorderedIterator, MapResult
from distpool.pool_runs import PolicyRun, chained, star_arguments
from distpool.progress import Progress, make_progress
from distpool.refs.refs import RAISED_HERE, Outcome
from distpool.shown import ShownProcess, StartingProcess
from distpool.wire import codec
from distpool.wire.messages import CALL, ONE, ONE_FRESH
from distpool.work import Call, check_references, is_plain, parts_of

if TYPE_CHECKING:
    from distpool.crew import Crew
    from distpool.executor import ClusterExecutor
    from distpool.pool import DistPool

_SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)


def open_pool(executor: ClusterExecutor) -> tuple[Callbacks, Inputs]:
    """Make a pool of this executor's workers."""
    crew = executor._crew
    crew.ends_at_exit = False  # by `_end_pools` instead
    _end_at_exit(crew.node)
    return Callbacks(crew.scheduler), Inputs(executor)


# -- single calls ------------------------------------------------------------------------------------------------------


def apply_async(
    pool: DistPool,
    func: Callable[..., Any],
    args: Iterable[Any],
    kwds: Any,
    callback: Callable[[Any], object] | None,
    error_callback: Callable[[BaseException], object] | None,
) -> AsyncResult:
    """`DistPool.apply_async`."""
    scheduler = pool._crew.scheduler
    result = ApplyResult(pool._callbacks, callback, error_callback)
    future = result._future
    try:
        function = pool._crew.node.encoder.encode(func)
        if function.references:
            check_references(scheduler.node, function.references)
        args = tuple(args)
        if not kwds and pool._policy is None and function.reusable and is_plain(args):
            future._call = call = Call(scheduler, function, b"", [], future, None, args)
            scheduler.enqueue(call)
            return result
        seen: list[Any] = []
        data, buffers = codec.encode_args(args, dict(kwds), None, seen)
        staged = scheduler.stage(buffers) if buffers else []
        record = CALL.pack(function.number, 1, len(data), len(staged), ONE if function.reusable else ONE_FRESH) + data
        staged = parts_of(scheduler.node, staged, seen, data, args, kwds)
        call = Call(scheduler, function, record, staged, future, pool._policy)
        future._call = call
        scheduler.enqueue(call)
    except Exception as error:
        future._settle(Outcome(RAISED_HERE, error, (), 1))
    except BaseException:  # Ctrl-C: perhaps it was not sent
        pool._callbacks.forget(result)
        raise
    return result


# -- maps --------------------------------------------------------------------------------------------------------------


def map_async(
    pool: DistPool,
    func: Callable[..., Any],
    iterable: Iterable[Any],
    chunksize: int | None,
    callback: Any,
    error_callback: Any,
    *,
    single: bool,
) -> MapResult:
    """`DistPool.map_async` and (not `single`) `starmap_async`."""
    sized = hasattr(iterable, "__len__")
    error: BaseException | None = None
    items: Any = []
    as_it_is = type(iterable) is list or (type(iterable) is range and single and pool._policy is None)
    try:
        items = iterable if as_it_is else list(iterable)
    except Exception as failure:
        if not sized:
            raise
        error = failure  # as in the standard library: `get()` raises it
    chunksize = _chunksize(pool, len(items), chunksize)
    run: MapRun | None = None
    if items:
        if not single:
            func, items, single = star_arguments(func, items)
        try:
            run = _make_run(pool, func, single=single, ordered=True, chunked=chunksize > 1)
        except Exception as failure:
            error = failure
    bar = None
    if pool._progress and run is not None:
        bar = make_progress(pool._progress, len(items)), len(items)
    if not items and error is None:
        callback = error_callback = None  # as in the standard library: a map of nothing has ended before it began
    entries = -(-len(items) // chunksize)
    result = MapResult(
        pool._callbacks, callback, error_callback, run, entries, chunksize=chunksize, error=error, bar=bar
    )
    if run is None:
        return result
    try:
        if chunksize == 1:
            run.feed(items if items is not iterable else list(items))
        else:
            run.feed_cut(items, chunksize)
    except BaseException:  # Ctrl-C: it will not be complete
        pool._callbacks.forget(result)
        run.close()
        raise
    return result


def _chunksize(pool: DistPool, length: int, chunksize: int | None) -> int:
    if chunksize is None:
        return max(1, math.ceil(length / (4 * pool._crew.size)))
    chunksize = operator.index(chunksize)
    if chunksize < 1:
        raise ValueError(f"Chunksize must be 1+, not {chunksize}")
    return chunksize


def _make_run(pool: DistPool, func: Callable[..., Any], *, single: bool, ordered: bool, chunked: bool) -> MapRun:
    function = pool._crew.node.encoder.encode_for_map(func)
    scheduler = pool._crew.scheduler
    if pool._policy is not None:
        return PolicyRun(scheduler, function, pool._policy, single=single, ordered=ordered)
    return MapRun(scheduler, function, single=single, ordered=ordered, chunked=chunked)


def imap(
    pool: DistPool, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int, *, ordered: bool = True
) -> Iterator[Any]:
    """`DistPool.imap` and (not `ordered`) `imap_unordered`."""
    chunksize = _chunksize(pool, 0, 1 if chunksize is None else chunksize)
    source = iter(iterable)
    crew, error = pool._crew, None
    plain = type(iterable) in PLAIN
    try:
        run = _make_run(pool, func, single=True, ordered=ordered, chunked=chunksize > 1)
    except Exception as failure:
        error = failure
        run = MapRun(crew.scheduler, None, single=True)  # type: ignore[arg-type]  # stays empty
    inputs = pool._inputs
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
        if pool._state != RUN:  # closed by another thread this very moment
            inputs.remove(feed)
            pool._check_running()
        feed.go_on()
    kind = IMapIterator if ordered else IMapUnorderedIterator
    results = kind(pool, feed, pool._callbacks, _bar(pool, iterable) if chunksize == 1 else None)
    if chunksize == 1:
        return results
    return chained(results, _bar(pool, iterable))


def _bar(pool: DistPool, iterable: Iterable[Any]) -> Progress | None:
    if not pool._progress:
        return None
    length = getattr(iterable, "__len__", None)
    return make_progress(pool._progress, length() if length is not None else None)


# -- workers, and the end ----------------------------------------------------------------------------------------------


def shown(pool: DistPool) -> list[Any]:
    """`DistPool._pool`."""
    crew = pool._crew
    found: list[Any] = [ShownProcess(member) for member in list(crew.members.values())][: crew.size]
    if not crew.finished.is_set():
        found.extend(StartingProcess(crew, index) for index in range(len(found), crew.size))
    return found


def terminate(pool: DistPool) -> None:
    """`DistPool.terminate`."""
    crew = pool._crew
    if pool._inputs is not None:
        pool._inputs.stop(_terminated)
    pool._executor.shutdown(wait=False)
    crew.node.loop.call_soon(lambda: _kill(crew))
    crew.wait()


def _terminated() -> BaseException:
    return PoolTerminated("the pool was terminated")


def _kill(crew: Crew) -> None:
    """On the leader: pending results get their error first, so that none is told of a dead worker."""
    crew.scheduler.fail_all(_terminated)
    crew.kill(_SIGKILL)


def _end_at_exit(node: nodes.Node) -> None:
    """Have this node's pools terminated at the end of the program, as the standard library does (once per node).

    Not with the executors' hook (`exits`), which runs before the program's own threads have ended and before its
    `atexit` hooks: a pool is of use to them until then.
    """
    if not node.ends_pools:
        node.ends_pools = True
        atexit.register(_end_pools, node)


def _end_pools(node: nodes.Node) -> None:
    if nodes.existing() is node:
        node.pools_ended = True
        crews = [crew for crew in list(node.crews) if not crew.ends_at_exit]
        for crew in crews:
            node.loop.call_soon(lambda crew=crew: _kill(crew))  # type: ignore[misc]
        for crew in crews:
            with node.loop.following():
                crew.finished.wait(1.0)


__all__ = ["apply_async", "imap", "map_async", "open_pool", "shown", "terminate"]
