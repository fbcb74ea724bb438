"""`pmap` and `pgenerate`: Julia's parallel map (layer 7).

    pmap(f, xs, pool=...) -> _carrier_for: who runs it -> OrderedMap(carrier, xs, Recovery(hooks)) -> a list
    pgenerate                                                                                      -> an iterator

This module decides who runs the elements and checks arguments. What happens to failures is in `recovery`, the loop in
`ordered`, the ways of running in `elements`. (Not named `pmap`: importing a module of that name would put it in the
place of the function `distpool.pmap`.)
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from distpool.elements import Carrier, FutureCarrier, SpanCarrier, ThreadCarrier
from distpool.mapruns import LOOK_AHEAD
from distpool.node import node as nodes
from distpool.ordered import OrderedMap
from distpool.progress import make_progress
from distpool.recovery import ExponentialBackOff, Recovery

T = TypeVar("T")

#: Exact types whose iteration runs no user code and changes nothing, so that nobody can tell how far it has gone.
_AT_HAND = frozenset(
    (
        list,
        tuple,
        range,
        str,
        bytes,
        bytearray,
        dict,
        set,
        frozenset,
        type({}.keys()),
        type({}.values()),
        type({}.items()),
    )
)


def pmap(
    f: Callable[..., Any],
    *iterables: Iterable[Any],
    pool: Any = None,
    distributed: bool = True,
    batch_size: int | str = 1,
    on_error: Callable[[BaseException], Any] | None = None,
    retry_delays: Iterable[float] = (),
    retry_check: Any = None,
    progress: Any = None,
) -> list[Any]:
    """`[f(x) for x in iterable]` on the workers of `pool`, in input order; several iterables go elementwise.

    `pool`: a `WorkerPool`, a `ClusterExecutor`, a view of it (`options`), or a `DistPool`; default: the workers of
    `addprocs`, in a fresh `CachingPool`, so that `f` goes to each of them once. Where there are none, and with
    `distributed=False`, the calls run here, concurrently in threads. The input is consumed
    lazily: at most 8 elements per worker (times `batch_size`) are taken ahead of what has been delivered.
    `batch_size`: elements sent to a worker together; "auto": as many as their measured time allows. It changes no other
    rule: each element is serialised, runs and fails for itself.

    An error stops the map: no new element starts, and the original exception is raised, with the worker's traceback as
    `__cause__`. `on_error(exc)` is called here for each failed element; what it returns takes the element's place; if
    it raises, that error counts. Then `retry_delays` (seconds; n delays allow n+1 calls) apply to errors that
    `retry_check` accepts (an exception type, a tuple of types or `callable(exc) -> bool`; default: every `Exception`,
    and the death of a worker). `progress`: True, a tqdm class, or a callable that takes `total=`.

    Raises ValueError or TypeError at the call for bad arguments, `SerializationError` if `f` cannot be sent,
    `ProcessExitedException` if the worker died in a call that is not retried.

    Example:
        pmap(parse, paths, pool=executor, retry_delays=ExponentialBackOff(3), on_error=lambda error: None)
    """
    recovery = Recovery(on_error, retry_delays, retry_check)
    ordered = _ordered(f, iterables, pool, distributed, batch_size, recovery, eager_errors=True)
    bar = make_progress(progress, _total(iterables)) if progress else None
    values: list[Any] = []
    shown = 0
    try:
        while True:  # no condition: see tests/test_interruptible.py
            if not ordered.advance():
                break
            values += ordered.take()
            if bar is not None and ordered.finished > shown:
                bar.update(ordered.finished - shown)
                shown = ordered.finished
    finally:
        ordered.close()
        if bar is not None:
            bar.close()
    return values


def pgenerate(f: Callable[..., T], *iterables: Iterable[Any], pool: Any = None) -> Iterator[T]:
    """`pmap` as a lazy iterator in input order: takes at most 8 elements per worker ahead, so endless inputs work.

    An element's exception is raised at its turn and ends the iteration. Dropping the iterator (or `close()`) stops the
    map. `pool` as for `pmap`.

    Example: `for value in itertools.islice(pgenerate(f, itertools.count(), pool=executor), 10): print(value)`
    """
    return _Generated(_ordered(f, iterables, pool, True, 1, Recovery(), eager_errors=False), pool)


class _Generated(Iterator[Any]):
    """The iterator of `pgenerate`. It keeps the pool until its end: an executor that nobody has is shut down."""

    def __init__(self, ordered: OrderedMap, pool: Any) -> None:
        self._ordered = ordered
        self._pool = pool
        self._turn = threading.RLock()  # several threads may share it: one at a time waits and takes

    def __next__(self) -> Any:
        ordered = self._ordered
        with self._turn:
            try:
                while True:  # no condition: see tests/test_interruptible.py
                    if not ordered.advance():
                        break
                    values = ordered.take_one()
                    if values:
                        return values[0]
            except StopIteration as error:  # of an element: it must not look like the end
                self.close()
                raise RuntimeError("generator raised StopIteration") from error
            except BaseException:
                self.close()
                raise
            self._pool = None
        raise StopIteration

    def close(self) -> None:
        """No more results are wanted: nothing new starts. ValueError, as a generator's, while another thread waits for
        the next one."""
        if not self._turn.acquire(blocking=False):
            raise ValueError("generator already executing")
        try:
            self._ordered.close()
        finally:
            self._turn.release()
        self._pool = None


# -- who runs it -------------------------------------------------------------------------------------------------------


def _ordered(
    f: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    pool: Any,
    distributed: bool,
    batch_size: int | str,
    recovery: Recovery,
    *,
    eager_errors: bool,
) -> OrderedMap:
    if not callable(f):
        raise TypeError(f"the function must be callable, not {type(f).__name__}")
    if not iterables:
        raise TypeError("pmap() and pgenerate() need at least one iterable")
    single = len(iterables) == 1
    source: Iterator[Any] = iter(iterables[0]) if single else zip(*iterables, strict=False)
    if pool is None and distributed:
        pool = _default_pool()
    carrier, batch = _carrier_for(f, single, pool if distributed else None, batch_size)
    at_hand = all(type(iterable) in _AT_HAND for iterable in iterables)
    return OrderedMap(carrier, source, recovery, at_hand=at_hand, batch=batch, eager_errors=eager_errors)


def _carrier_for(f: Callable[..., Any], single: bool, pool: Any, batch_size: int | str) -> tuple[Carrier, int]:
    """The carrier for this pool, and the batch size (1: whatever it likes).

    This is the one place that knows kinds of pools. What a kind has to offer: a scheduler and its number of workers, or
    a `submit` and the same number, or (`WorkerPool`) workers to take. No pool, or one without workers: threads.
    """
    if pool is None:
        return ThreadCarrier(f, single), 1
    if callable(getattr(pool, "prepare", None)):
        from distpool.poolmap import PoolCarrier

        if not len(pool):
            return ThreadCarrier(f, single), 1
        batch = _check_batch_size(batch_size)
        return PoolCarrier(pool, f, single, batch), batch or 1
    executor = getattr(pool, "executor", None)
    if executor is not None:  # DistPool, which says "Pool not running" in its own words
        pool._check_usable()
        pool = executor
    crew = getattr(pool, "_crew", None)
    if crew is None and not callable(getattr(pool, "submit", None)):
        raise TypeError(
            f"pool must be a WorkerPool, a ClusterExecutor, a view of one, or a DistPool, not {type(pool).__name__}"
        )
    batch = _check_batch_size(batch_size)
    if crew is not None:
        pool._check_usable()
        if pool._policy is None or pool._policy.plain:
            function = crew.node.encoder.encode_for_map(f)
            return SpanCarrier(crew.scheduler, function, single, batch, lambda: max(1, crew.size)), batch or 1
    size = getattr(pool, "_max_workers", 1)
    submit = pool.submit
    ahead = LOOK_AHEAD * (batch or 1)
    return FutureCarrier(lambda *args: submit(f, *args), single, lambda: size, ahead, nodes.existing()), batch or 1


def _default_pool() -> Any:
    """A fresh CachingPool of the default pool's workers; None where there are none."""
    node = nodes.existing()
    if node is None or (
        node.is_master and node.default_pool is None and not (node.group and node.group.default_members)
    ):
        return None
    from distpool.pools import CachingPool, default_worker_pool

    pids = default_worker_pool()._do("living")
    return CachingPool(pids) if pids else None


def _check_batch_size(batch_size: int | str) -> int:
    """The number; 0 for "auto"."""
    if batch_size == "auto" and isinstance(batch_size, str):
        return 0
    try:
        if isinstance(batch_size, bool):
            raise TypeError
        number = operator.index(batch_size)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f'batch_size must be specified as a positive integer (or "auto"), not {batch_size!r}')
    return number


def _total(iterables: tuple[Iterable[Any], ...]) -> int | None:
    """How many elements there will be, if the inputs say so."""
    try:
        return min(len(iterable) for iterable in iterables)  # type: ignore[arg-type]
    except TypeError:
        return None


__all__ = ["ExponentialBackOff", "pgenerate", "pmap"]
