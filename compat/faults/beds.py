"""Every peer behind the same few verbs, with time limits everywhere: a peer that hangs must not hang the table.

To add a peer: a subclass of :class:`Bed`, and a line in :data:`BEDS`.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Call = tuple[Callable[..., Any], tuple[Any, ...]]


class NotApplicable(Exception):
    """The peer has no such feature."""


class Never:
    """In place of a value: nothing came within the limit."""

    def __repr__(self) -> str:
        return "never"


NEVER = Never()


class Bed:
    """A library with two workers."""

    module = ""
    options: tuple[str, ...] = ()
    task_timeout = False

    def __init__(self, **options: Any) -> None:
        unknown = [name for name in options if name not in self.options]
        if unknown:
            raise NotApplicable(f"has no {unknown[0]}")
        self.start(**options)

    def start(self, **options: Any) -> None:
        """Make the pool."""
        raise NotImplementedError

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Start one call."""
        raise NotImplementedError

    def get(self, handle: Any, limit: float) -> Any:
        """Its value, its exception (raised) or NEVER."""
        import concurrent.futures

        try:
            return handle.result(limit)
        except concurrent.futures.TimeoutError as error:
            if getattr(handle, "done", lambda: False)():
                raise error
            return NEVER

    def limited(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Start a call that may run for half a second."""
        raise NotApplicable("no time limit per task")

    def lazy_map(self, fn: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        """The laziest ordered map it has."""
        raise NotApplicable("no map")

    def batch(self, calls: list[Call], limit: float) -> list[Any]:
        """Start all calls; a value, an exception object or NEVER for each."""
        handles: list[Any] = []
        for fn, args in calls:
            try:
                handles.append(self.submit(fn, *args))
            except NotApplicable:
                raise
            except BaseException as error:
                handles.append(error)
        end = time.monotonic() + limit
        return [self.outcome(handle, max(0.05, end - time.monotonic())) for handle in handles]

    def outcome(self, handle: Any, limit: float) -> Any:
        """Like get, with the exception as a value."""
        if isinstance(handle, BaseException):
            return handle
        try:
            return self.get(handle, limit)
        except BaseException as error:
            return error


class ExecutorBed(Bed):
    """concurrent.futures' interface."""

    options = ("initializer", "initargs")
    executor: Any

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.executor.submit(fn, *args)

    def lazy_map(self, fn: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        return iter(self.executor.map(fn, items))


class PoolBed(Bed):
    """multiprocessing.Pool's interface."""

    options = ("initializer", "initargs", "max_tasks")
    pool: Any

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply_async(fn, args)

    def get(self, handle: Any, limit: float) -> Any:
        handle.wait(limit)
        return handle.get(0) if handle.ready() else NEVER

    def lazy_map(self, fn: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        return iter(self.pool.imap(fn, items))


class ProcessPool(ExecutorBed):
    """concurrent.futures.ProcessPoolExecutor"""

    module = "concurrent.futures"
    options = ("initializer", "initargs", "max_tasks")

    def start(self, max_tasks: int | None = None, **options: Any) -> None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        context = multiprocessing.get_context("spawn" if max_tasks else "fork")
        self.executor = ProcessPoolExecutor(2, context, max_tasks_per_child=max_tasks, **options)


class StdlibPool(PoolBed):
    """multiprocessing.Pool"""

    module = "multiprocessing"

    def start(self, max_tasks: int | None = None, **options: Any) -> None:
        import multiprocessing

        self.pool = multiprocessing.get_context("fork").Pool(2, maxtasksperchild=max_tasks, **options)


class Loky(ExecutorBed):
    """loky"""

    module = "loky"

    def start(self, **options: Any) -> None:
        import loky

        self.executor = loky.ProcessPoolExecutor(2, **options)


class Distpool(ExecutorBed):
    """distpool.ClusterExecutor"""

    module = "distpool"
    options = ("initializer", "initargs", "max_tasks", "memory_limit")
    task_timeout = True

    def start(self, max_tasks: int | None = None, **options: Any) -> None:
        import distpool

        self.executor = distpool.ClusterExecutor(2, max_tasks_per_child=max_tasks, **options)

    def limited(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.executor.options(timeout=0.5).submit(fn, *args)

    def lazy_map(self, fn: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        return iter(self.executor.map(fn, items, buffersize=8))


class DistpoolPool(PoolBed):
    """distpool.DistPool"""

    module = "distpool"
    options = ("initializer", "initargs", "max_tasks", "memory_limit")
    task_timeout = True

    def start(self, max_tasks: int | None = None, **options: Any) -> None:
        import distpool

        self.pool = distpool.DistPool(2, maxtasksperchild=max_tasks, **options)
        self.executor = self.pool.executor

    def limited(self, fn: Callable[..., Any], *args: Any) -> Any:
        return Future(self.pool.executor.options(timeout=0.5).submit(fn, *args))


class Future:
    """A future with a pool result's interface, for the calls that DistPool sends through its executor."""

    def __init__(self, future: Any) -> None:
        self.future = future

    def wait(self, limit: float) -> None:
        """Wait for the end, at most ``limit`` seconds."""
        import concurrent.futures

        concurrent.futures.wait([self.future], limit)

    def ready(self) -> bool:
        """Whether it has ended."""
        return bool(self.future.done())

    def get(self, limit: float) -> Any:
        """The value."""
        return self.future.result(limit)


class Mpire(PoolBed):
    """mpire"""

    module = "mpire"
    options = ("initializer", "initargs")
    task_timeout = True

    def start(self, initializer: Any = None, initargs: tuple[Any, ...] = ()) -> None:
        import mpire

        self.pool = mpire.WorkerPool(n_jobs=2, keep_alive=True)
        self.more: dict[str, Any] = {}
        if initializer:
            import functools

            self.more["worker_init"] = functools.partial(initializer, *initargs)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply_async(fn, args, **self.more)

    def limited(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply_async(fn, args, task_timeout=0.5)

    def lazy_map(self, fn: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        import mpire  # a pool that has run apply_async cannot run a map

        self.other = mpire.WorkerPool(n_jobs=2)
        return iter(self.other.imap(fn, items))


class Pebble(ExecutorBed):
    """pebble"""

    module = "pebble"
    options = ("initializer", "initargs", "max_tasks")
    task_timeout = True

    def start(self, max_tasks: int | None = None, **options: Any) -> None:
        import pebble

        self.pool = pebble.ProcessPool(2, max_tasks=max_tasks or 0, **options)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.schedule(fn, args=args)

    def limited(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.schedule(fn, args=args, timeout=0.5)

    def lazy_map(self, fn: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        return iter(self.pool.map(fn, items).result())


class Pathos(PoolBed):
    """pathos"""

    module = "pathos"
    options = ()

    def start(self, **options: Any) -> None:
        from pathos.pools import ProcessPool as PathosPool

        self.pool = PathosPool(nodes=2)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apipe(fn, *args)


class Joblib(Bed):
    """joblib: a batch is one call of Parallel, so one error is everybody's."""

    module = "joblib"

    def start(self, **options: Any) -> None:
        import joblib

        self.joblib = joblib

    def batch(self, calls: list[Call], limit: float) -> list[Any]:
        found: list[Any] = [NEVER] * len(calls)

        def run() -> None:
            delayed = [self.joblib.delayed(fn)(*args) for fn, args in calls]
            try:
                found[:] = self.joblib.Parallel(n_jobs=2)(delayed)
            except BaseException as error:
                found[:] = [error] * len(calls)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(limit)
        return list(found)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        raise NotApplicable("no single calls")

    def lazy_map(self, fn: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        parallel = self.joblib.Parallel(n_jobs=2, return_as="generator")
        return iter(parallel(self.joblib.delayed(fn)(item) for item in items))


class Dask(Bed):
    """dask.distributed"""

    module = "distributed"
    options = ("memory_limit",)

    def start(self, memory_limit: Any = "auto", **options: Any) -> None:
        import logging

        from distributed import Client, LocalCluster

        logging.disable(logging.ERROR)
        self.cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=memory_limit
        )
        self.client = Client(self.cluster)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.client.submit(fn, *args, pure=False)


class Ray(Bed):
    """ray"""

    module = "ray"

    def start(self, **options: Any) -> None:
        import ray

        self.ray = ray
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.ray.remote(lambda *inner: fn(*inner)).options(max_retries=0).remote(*args)

    def get(self, handle: Any, limit: float) -> Any:
        try:
            return self.ray.get(handle, timeout=limit)
        except self.ray.exceptions.GetTimeoutError:
            return NEVER


BEDS: dict[str, type[Bed]] = {
    "distpool": Distpool,
    "distpool-pool": DistpoolPool,
    "ppe": ProcessPool,
    "pool": StdlibPool,
    "loky": Loky,
    "mpire": Mpire,
    "pebble": Pebble,
    "pathos": Pathos,
    "joblib": Joblib,
    "dask": Dask,
    "ray": Ray,
}


def available(name: str) -> bool:
    """Whether the library is installed here."""
    return importlib.util.find_spec(BEDS[name].module.partition(".")[0]) is not None
