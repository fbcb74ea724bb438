"""joblib's backend "distpool": whatever calls `joblib.Parallel` (scikit-learn, for one) runs on distpool's workers.

    import distpool.integrations.joblib                        # registers it
    with joblib.parallel_config("distpool", n_jobs=8): ...     # local workers of its own
    with joblib.parallel_config("distpool", hosts=["node1", "node2"]): ...
    with joblib.parallel_config("distpool", executor=executor): ...

    Parallel --submit(batch)--> ClusterExecutor.submit --> worker;  library thread: future's callback --> Parallel

The workers stay between the calls of `Parallel` that use the same backend object, as long as that lives: a
`parallel_config` block makes one. Large arrays travel out of band, so nothing is written to a folder of memory maps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import joblib
from joblib._parallel_backends import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)

from distpool.executor import ClusterExecutor
from distpool.hosts import usable_cpus
from distpool.refs.refs import Future

_JOBLIBS = frozenset(("max_nbytes", "temp_folder", "mmap_mode", "verbose", "context", "idle_worker_timeout"))
"""Keywords that `Parallel` hands to every backend; they are about memory maps in files."""


class DistpoolBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs the batches of `joblib.Parallel` on a `ClusterExecutor`.

    `executor`: one of the user's, which lives on; else one is made of `hosts` and the other keywords, which are those
    of `ClusterExecutor`. `n_jobs` counts as with loky (-1: all processors, of all hosts), but the default is -1. An
    error in a task ends what else runs in workers of the backend's own; with the user's executor it only cancels what
    has not started. A task that kills its process raises `ProcessExitedException`, and the next `Parallel` just works.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    uses_threads = False
    supports_sharedmem = False
    default_n_jobs = -1

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        *,
        executor: ClusterExecutor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        if executor is not None and options:
            raise TypeError(f"executor= is there already, so these make no sense: {', '.join(options)}")
        self.parallel: Any = None
        self._given = executor
        self._options = options
        self._own: ClusterExecutor | None = None  # its workers go when it is collected, or with the program
        self._own_jobs = 0
        self._pending: set[Future[Any]] = set()
        self._lock = threading.Lock()  # protects _pending: joblib submits from callbacks too

    # -- how many ----------------------------------------------------------------------------------------------

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Tasks that can run at a time."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            n_jobs = self.default_n_jobs
        if n_jobs > 0:
            return n_jobs
        if self._given is not None:
            all_of_them = self._given._max_workers
        elif self._options.get("hosts") is not None:
            all_of_them = self._executor(None)._max_workers
        else:
            all_of_them = usable_cpus()
        return max(all_of_them + 1 + n_jobs, 1)

    def configure(
        self, n_jobs: int | None = 1, parallel: Any = None, prefer: Any = None, require: Any = None, **options: Any
    ) -> int:
        """Have so many workers ready. Keywords of `Parallel` itself are added to those of `__init__`."""
        self._options.update({name: value for name, value in options.items() if name not in _JOBLIBS})
        count = self.effective_n_jobs(n_jobs)
        if count == 1 and self._given is None and self._options.get("hosts") is None:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        self._executor(count)
        return count

    def _executor(self, count: int | None) -> ClusterExecutor:
        """The user's, or ours with `count` workers (None: as many as its hosts bring)."""
        if self._given is not None:
            return self._given
        if self._own is not None and (self._own._shutdown or self._own._broken):
            self._own = None
        local = self._options.get("hosts") is None
        if self._own is None:
            options = dict(self._options)
            if local:
                options["max_workers"] = count
            if count is not None and (local or self.inner_max_num_threads is not None):
                options["env"] = {**self._prepare_worker_env(n_jobs=count), **dict(options.get("env") or {})}
            self._own = ClusterExecutor(**options)
        elif local and count != self._own_jobs:
            self._own.scale(count or usable_cpus())
        if local:
            self._own_jobs = count or 0
        return self._own

    # -- calls -------------------------------------------------------------------------------------------------

    def submit(self, func: Callable[[], Any], callback: Callable[[Future[Any]], object] | None = None) -> Future[Any]:
        """Run a batch; `callback(future)` on a library thread when it has ended."""
        executor = self._given or self._own
        assert executor is not None
        # Through a function that is known by its name: each batch is an object of its own, and would be sent as one.
        future = executor.submit(_run, func)
        with self._lock:
            self._pending.add(future)
        future.add_done_callback(self._forget)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    apply_async = submit  # what joblib before 1.5 calls

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._pending.discard(future)

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """The batch's list of results, or its error."""
        try:
            return out.result()
        except CancelledError:
            text = "the calls of this Parallel were cancelled: its generator was dropped, or another task failed"
            raise RuntimeError(text) from None

    # -- the end -----------------------------------------------------------------------------------------------

    def terminate(self) -> None:
        """A `Parallel` has ended: the workers wait for the next one."""
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Nobody wants the rest of a `Parallel` any more."""
        with self._lock:
            pending = list(self._pending)
        if self._own is not None:
            own, self._own = self._own, None
            own.kill_workers()
        for future in pending:
            future.cancel()
        if ensure_ready and self.parallel is not None:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel)


def _run(batch: Callable[[], Any]) -> Any:
    return batch()


def register(make_default: bool = False) -> None:
    """Make the backend known to joblib (the import of this module has done so); `make_default`: take it everywhere.

    Example: `distpool.integrations.joblib.register(make_default=True)`
    """
    joblib.register_parallel_backend("distpool", DistpoolBackend, make_default=make_default)


register()

__all__ = ["DistpoolBackend", "register"]
