"""`DistPool`: a `multiprocessing.Pool` on cluster processes (layer 10).

The workers are those of a `ClusterExecutor` (`pool.executor`). The class is a subclass of `multiprocessing.pool.Pool`,
because libraries ask `isinstance`; nothing of that class runs but its name. What it does that the standard library's
does not: a killed task's `get()` raises, so do all `get()` after `terminate()`, and nothing else is lost.

States as there: RUN -> CLOSE (no more tasks, pending ones complete) -> TERMINATE (workers killed).

This is the face. How it does what it does is in `pooling`, which is loaded when a pool is made, while the zygote of its
workers comes up (see `submitter`, which does the same for executors).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool as stdlib
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import CLOSE, INIT, RUN, TERMINATE

from distpool import config
from distpool.executor import ClusterExecutor

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    from typing import Any, NoReturn, Self, TypeVar

    from distpool.crew import Crew
    from distpool.pool_callbacks import Callbacks
    from distpool.pool_input import Inputs
    from distpool.pool_results import AsyncResult, MapResult
    from distpool.work import Policy

    T = TypeVar("T")


class DistPool(stdlib.Pool):
    """A pool of worker processes on this machine or on a cluster: a drop-in for `multiprocessing.Pool`.

    `processes`: how many (default: usable CPUs), or what `ClusterExecutor`'s `hosts` may be. `initializer(*initargs)`
    runs first in each worker. `maxtasksperchild`: tasks (chunks of a map) after which a worker is replaced. `context`
    (`mp_context`) is kept, but workers are always fresh interpreters. Other options are `ClusterExecutor`'s: `hosts`,
    `timeout` (seconds of running time per task), `retries`, `on_worker_exit`, `progress`, those of `addprocs`.

    A task that kills its worker costs itself: its `get()` raises `ProcessExitedException`, the others go on. Leaving
    a `with` block terminates the pool, as the standard library's does. ValueError("Pool not running") after `close`.

    Example:
        with DistPool(4) as pool:
            print(pool.map(lambda x: x * x, range(10)))
    """

    # Here, so that it exists in __del__ and __repr__ if __init__ raises.
    _state: str = INIT
    _inputs: Inputs | None = None
    _executor: ClusterExecutor
    _crew: Crew
    _callbacks: Callbacks
    _policy: Policy | None
    _progress: Any
    _ways: Any  # the module `pooling`

    def __init__(
        self,
        processes: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        hosts: Any = None,
        **as_ClusterExecutor: Any,
    ) -> None:
        # The base is not initialised on purpose: it would start processes, queues and three threads.
        if hosts is None and processes is not None and not hasattr(processes, "__index__"):
            hosts, processes = processes, None
        if processes is not None:
            processes = operator.index(processes)
            if processes < 1:
                raise ValueError("Number of processes must be at least 1")
        if maxtasksperchild is not None and (not isinstance(maxtasksperchild, int) or maxtasksperchild <= 0):
            raise ValueError("maxtasksperchild must be a positive int or None")
        self._progress = as_ClusterExecutor.get("progress")
        other = as_ClusterExecutor.pop("mp_context", None)  # what the executor calls it
        context = other if context is None else context
        self._ctx = context if context is not None else multiprocessing.get_context()
        self._maxtasksperchild = maxtasksperchild
        self._initializer = initializer
        # Without an initializer it is not looked at: None is as good.
        self._initargs = config.as_tuple("initargs", initargs) if initializer is not None else ()
        self._executor = ClusterExecutor(
            hosts,
            None,
            initializer,
            self._initargs,
            **{"max_workers": processes, "max_tasks_per_child": maxtasksperchild, **as_ClusterExecutor},
        )
        from distpool import pooling  # while the zygote comes up, or its workers

        self._ways = pooling
        self._crew = self._executor._crew
        policy = self._executor._policy
        self._policy = None if policy is None or policy.plain else policy
        self._callbacks, self._inputs = pooling.open_pool(self._executor)
        self._state = RUN

    def __repr__(self) -> str:
        cls = type(self)
        size = self._crew.size if self._state != INIT else 0
        return f"<{cls.__module__}.{cls.__qualname__} state={self._state} pool_size={size}>"

    def __reduce__(self) -> NoReturn:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def __del__(self, _warn: Any = warnings.warn, RUN: Any = RUN) -> None:
        # The executor beneath, forgotten as well, completes what is pending and lets its workers go.
        inputs, self._inputs = self._inputs, None
        if inputs is not None:
            inputs.forget()
        if self._state == RUN and self._crew.is_here:
            _warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, source=self)

    def _check_running(self) -> None:
        if self._state != RUN:
            raise ValueError("Pool not running")

    def _check_usable(self) -> None:
        self._check_running()
        crew = self._crew
        crew.scheduler.check_process()
        if crew.broken is not None:
            raise type(crew.broken)(*crew.broken.args) from crew.broken

    def __enter__(self) -> Self:
        self._check_running()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.terminate()

    # -- what there is beyond multiprocessing.Pool -------------------------------------------------------------

    @property
    def executor(self) -> ClusterExecutor:
        """The `ClusterExecutor` beneath: same workers, all of its methods.

        Example: `pool.executor.options(timeout=5).submit(f, x)`
        """
        return self._executor

    def pmap(self, f: Callable[..., Any], *iterables: Iterable[Any], **options: Any) -> list[Any]:
        """Julia's `pmap` on these workers; see `distpool.pmap`. ValueError if the pool is not running.

        Example: `pool.pmap(f, xs, retry_delays=[0] * 3, on_error=lambda error: None)`
        """
        self._check_usable()
        return self._executor.pmap(f, *iterables, **options)

    @property
    def size(self) -> int:
        """How many workers the pool has."""
        return self._crew.size

    # -- single calls ------------------------------------------------------------------------------------------

    def apply(self, func: Callable[..., T], args: Iterable[Any] = (), kwds: Any = {}) -> T:  # noqa: B006
        """`func(*args, **kwds)` on a worker.

        Example: `pool.apply(pow, (2, 10))` is 1024.
        """
        return self.apply_async(func, args, kwds).get()  # type: ignore[no-any-return]

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Any = {},  # noqa: B006
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult:
        """Start `func(*args, **kwds)` on a worker; `callback(value)` or `error_callback(exception)` runs on a library
        thread, one after another. What cannot be serialised is the error of this call alone.

        Example: `pool.apply_async(pow, (2, 10)).get(timeout=5)`
        """
        self._check_usable()
        return self._ways.apply_async(self, func, args, kwds, callback, error_callback)  # type: ignore[no-any-return]

    # -- maps --------------------------------------------------------------------------------------------------

    def map(self, func: Callable[..., T], iterable: Iterable[Any], chunksize: int | None = None) -> list[T]:
        """The list of `func(x)` for each x, in order.

        The input is sent in chunks of `chunksize` (default: a quarter of each worker's share). An exception ends its
        chunk; the other chunks complete, then the first failed chunk's exception is raised.

        Example: `pool.map(abs, range(-3, 0))` is [3, 2, 1].
        """
        return self.map_async(func, iterable, chunksize).get()  # type: ignore[no-any-return]

    def starmap(
        self, func: Callable[..., T], iterable: Iterable[Iterable[Any]], chunksize: int | None = None
    ) -> list[T]:
        """As `map`, with `func(*x)` for each x.

        Example: `pool.starmap(pow, [(2, 3), (3, 2)])` is [8, 9].
        """
        return self.starmap_async(func, iterable, chunksize).get()  # type: ignore[no-any-return]

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
        self._check_usable()
        ways = self._ways
        return ways.map_async(self, func, iterable, chunksize, callback, error_callback, single=True)  # type: ignore[no-any-return]

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
        self._check_usable()
        ways = self._ways
        return ways.map_async(self, func, iterable, chunksize, callback, error_callback, single=False)  # type: ignore[no-any-return]

    # -- lazy maps ---------------------------------------------------------------------------------------------

    def imap(  # type: ignore[override]
        self, func: Callable[..., T], iterable: Iterable[Any], chunksize: int = 1
    ) -> Iterator[T]:
        """An iterator over `func(x)` for each x, in order; with `next(timeout)` if `chunksize` is 1.

        Lazy: at most 8 tasks per worker are taken ahead (of short tasks over a plain container: more), so endless
        generators work. The input is taken by a library thread unless it is a plain container.

        Example: `for value in pool.imap(f, itertools.count()): ...`
        """
        self._check_usable()
        return self._ways.imap(self, func, iterable, chunksize)  # type: ignore[no-any-return]

    def imap_unordered(  # type: ignore[override]
        self, func: Callable[..., T], iterable: Iterable[Any], chunksize: int = 1
    ) -> Iterator[T]:
        """As `imap`, with the results in the order in which they come.

        Example: `for value in pool.imap_unordered(f, open("names.txt")): ...`
        """
        self._check_usable()
        return self._ways.imap(self, func, iterable, chunksize, ordered=False)  # type: ignore[no-any-return]

    # -- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """No more tasks; pending ones complete, then the workers go. Returns at once."""
        if self._state == RUN:
            self._state = CLOSE
            if self._crew.is_here and self._inputs is not None:
                self._inputs.close()

    def terminate(self) -> None:
        """Kill the workers and wait for their end; every `get()` that has no result yet raises an error that is both a
        `DistpoolError` and a `concurrent.futures.process.BrokenProcessPool`."""
        self._state = TERMINATE
        if not self._crew.is_here:
            return
        self._ways.terminate(self)

    def join(self) -> None:
        """Wait until all tasks have ended, their callbacks have run and the workers are gone.

        ValueError before `close` or `terminate`.
        """
        if self._state == RUN:
            raise ValueError("Pool is still running")
        if self._state not in (CLOSE, TERMINATE):
            raise ValueError("In unknown state")
        if not self._crew.is_here:
            return
        if self._inputs is not None and self._state == CLOSE:
            self._callbacks.give_way()
            self._inputs.take_rest()
        self._crew.wait()
        self._callbacks.join()

    # -- private names that other libraries read ---------------------------------------------------------------

    @property
    def _processes(self) -> int:
        return self._crew.size

    @property
    def _pool(self) -> list[Any]:
        """One object per worker, with `pid`, `is_alive`, `terminate`, ... (see `shown`)."""
        return self._ways.shown(self) if self._state != INIT else []


__all__ = ["DistPool"]
