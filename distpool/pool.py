"""`DistPool`: a `multiprocessing.Pool` on cluster processes (layer 10).

    apply_async        Call -> Scheduler -> worker;  leader: Outcome -> ApplyResult              (pool_results)
    map_async          chunks -> MapRun -> worker;   leader counts; MapResult decodes when asked      (pool_maps)
    imap               input -> Feed (pool_input) -> MapRun -> worker -> IMapIterator               (pool_maps)
    callbacks          one library thread, one after another                                   (pool_callbacks)

The workers are those of a `ClusterExecutor` (`pool.executor`). The class is a subclass of `multiprocessing.pool.Pool`,
because libraries ask `isinstance`; nothing of that class runs but its name. What it does that the standard library's
does not: a killed task's `get()` raises, so do all `get()` after `terminate()`, and nothing else is lost.

States as there: RUN -> CLOSE (no more tasks, pending ones complete) -> TERMINATE (workers killed).
"""

from __future__ import annotations

import atexit
import multiprocessing
import operator
import signal
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.pool import CLOSE, INIT, RUN, TERMINATE
from typing import Any, NoReturn, Self

from distpool.executor import ClusterExecutor
from distpool.node import node as nodes
from distpool.pool_callbacks import Callbacks, PoolTerminated
from distpool.pool_input import Inputs
from distpool.pool_maps import PoolMaps
from distpool.pool_results import ApplyResult, AsyncResult
from distpool.pool_runs import Starting
from distpool.refs.refs import RAISED_HERE, Outcome
from distpool.shown import ShownProcess
from distpool.wire import codec
from distpool.wire.messages import CALL, ONE, ONE_FRESH
from distpool.work import Call, is_plain, with_references

_SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)


class DistPool(PoolMaps):
    """A pool of worker processes on this machine or on a cluster: a drop-in for `multiprocessing.Pool`.

    `processes`: how many (default: usable CPUs), or what `ClusterExecutor`'s `hosts` may be. `initializer(*initargs)`
    runs first in each worker. `maxtasksperchild`: tasks (chunks of a map) after which a worker is replaced. `context`
    is accepted and kept, workers are always fresh interpreters. Other options are `ClusterExecutor`'s: `hosts`,
    `timeout` (seconds of running time per task), `retries`, `on_worker_exit`, `progress`, those of `addprocs`.

    A task that kills its worker costs itself: its `get()` raises `ProcessExitedException`, the others go on. Leaving
    a `with` block terminates the pool, as the standard library's does. ValueError("Pool not running") after `close`.

    Example:
        with DistPool(4) as pool:
            print(pool.map(lambda x: x * x, range(10)))
    """

    _executor: ClusterExecutor

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
        self._ctx = context if context is not None else multiprocessing.get_context()
        self._maxtasksperchild = maxtasksperchild
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._executor = ClusterExecutor(
            hosts,
            None,
            initializer,
            self._initargs,
            **{"max_workers": processes, "max_tasks_per_child": maxtasksperchild, **as_ClusterExecutor},
        )
        self._crew = crew = self._executor._crew
        crew.ends_at_exit = False  # by _end_at_exit instead
        policy = self._executor._policy
        self._policy = None if policy is None or policy.plain else policy
        self._callbacks = Callbacks(crew.scheduler)
        self._inputs = Inputs(self._executor)
        _end_at_exit(crew.node)
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
        if self._state == RUN and self._is_ours():
            _warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, source=self)

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

    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: Any = {}) -> Any:  # noqa: B006
        """`func(*args, **kwds)` on a worker.

        Example: `pool.apply(pow, (2, 10))` is 1024.
        """
        return self.apply_async(func, args, kwds).get()

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
        scheduler = self._crew.scheduler
        result = ApplyResult(self._callbacks, callback, error_callback)
        future = result._future
        try:
            function = self._crew.node.encoder.encode(func)
            args = tuple(args)
            if not kwds and self._policy is None and function.reusable and is_plain(args):
                future._call = call = Call(scheduler, function, b"", [], future, None, args)
                scheduler.enqueue(call)
                return result
            seen: list[Any] = []
            data, buffers = codec.encode_args(args, dict(kwds), None, seen)
            staged = scheduler.stage(buffers) if buffers else []
        except Exception as error:
            future._settle(Outcome(RAISED_HERE, error, (), 1))
            return result
        record = CALL.pack(function.number, 1, len(data), len(staged), ONE if function.reusable else ONE_FRESH) + data
        if seen:
            staged = with_references(staged, seen)
        call = Call(scheduler, function, record, staged, future, self._policy)
        future._call = call
        scheduler.enqueue(call)
        return result

    # -- the end -----------------------------------------------------------------------------------------------

    def _is_ours(self) -> bool:
        """False in a forked child: the workers are the parent's."""
        return nodes.existing() is self._crew.node

    def close(self) -> None:
        """No more tasks; pending ones complete, then the workers go. Returns at once."""
        if self._state == RUN:
            self._state = CLOSE
            if self._is_ours() and self._inputs is not None:
                self._inputs.close()

    def terminate(self) -> None:
        """Kill the workers and wait for their end; every `get()` that has no result yet raises `PoolTerminated`."""
        self._state = TERMINATE
        if not self._is_ours():
            return
        crew = self._crew
        if self._inputs is not None:
            self._inputs.stop(_terminated)
        self._executor.shutdown(wait=False)
        crew.node.loop.call_soon(lambda: _kill(crew))
        if not crew.node.loop.leads:  # in a signal handler, in the midst of the loop: nobody could do what we wait for
            crew.wait()

    def join(self) -> None:
        """Wait until all tasks have ended, their callbacks have run and the workers are gone.

        ValueError before `close` or `terminate`.
        """
        if self._state == RUN:
            raise ValueError("Pool is still running")
        if self._state not in (CLOSE, TERMINATE):
            raise ValueError("In unknown state")
        if not self._is_ours():
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
        """One object per worker, with `pid`, `is_alive`, `terminate`, ...; workers that are not up yet have no pid."""
        if self._state == INIT:
            return []
        crew = self._crew
        found: list[Any] = [ShownProcess(member) for member in list(crew.members.values())][: crew.size]
        if not crew.finished.is_set():
            found.extend(Starting() for _ in range(crew.size - len(found)))
        return found


def _terminated() -> BaseException:
    return PoolTerminated("the pool was terminated")


def _kill(crew: Any) -> None:
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


__all__ = ["DistPool"]
