"""`ClusterExecutor`: a `concurrent.futures.Executor` on cluster processes (layer 10).

    submit, map, ...   `submitting`: serialised in the caller's thread, run by the workers of a `Crew` (`opening`)
    options            a view with another policy on the same workers

The workers belong to the `Crew`, which lives as long as work is pending, also after the executor object was dropped.
This module loads little, so that the first executor of a program can have its zygote started at once, and loads the
rest of distpool while that comes up.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable

from distpool import config
from distpool.managers import zygotes
from distpool.submitter import Submitter

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    from typing import Any, Literal

    from distpool.crew import Crew
    from distpool.work import Policy


class ClusterExecutor(Submitter):
    """Runs calls on worker processes of this machine or of a cluster: a drop-in for `ProcessPoolExecutor`.

    `hosts`: `None` (as many local workers as `max_workers`, default: usable CPUs), an int; a list of machine specs, or
    the `Path` of a machine file (through SSH, `max_workers` in all at most); a `ClusterManager`; `"scheme://..."` for
    one that is found by its name; `"env"` for the hosts of the surrounding batch job; a `WorkerPool`, whose living
    workers are borrowed (by one executor at a time) and live on. Workers that die are replaced on their host, or on
    another one if that does not answer; if none can be started, every future fails with the `LaunchWorkerError`, or a
    `CompositeException` of them. Further keywords are those of `addprocs`.

    `initializer(*initargs)` runs first in every worker. `max_tasks_per_child`: calls after which a worker is replaced.
    `on_worker_exit`: "replace" (only the running call fails) or "break" (the standard library's rule). `timeout`
    (seconds of running time per attempt), `retries`, `retry_delays`, `retry_check`: see `options`. Construction returns
    at once; workers are used as they come.

    Example:
        with ClusterExecutor(4) as ex:
            print(list(ex.map(lambda x: x * x, range(10))))
    """

    def __init__(
        self,
        hosts: Any = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_workers: int | None = None,
        max_tasks_per_child: int | None = None,
        on_worker_exit: str = "replace",
        timeout: float | None = None,
        retries: int = 0,
        retry_delays: Iterable[float] | None = None,
        retry_check: Any = None,
        progress: Any = None,
        **addprocs_options: Any,
    ) -> None:
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        _check_max_tasks(max_tasks_per_child, mp_context)
        if on_worker_exit not in ("replace", "break"):
            raise ValueError(f"on_worker_exit must be 'replace' or 'break', not {on_worker_exit!r}")
        self._progress = progress
        self._mp_context = mp_context if mp_context is not None else _SpawnContext()
        self._initializer = initializer
        self._initargs = initargs
        self._shutdown = False
        self._shutdown_thread = False
        self._key: str | None = None  # under which handles inside tasks know this executor
        started = zygotes.begin(hosts, addprocs_options)
        try:
            from distpool import opening, submitting  # and with them all the rest, while the zygote comes up
            from distpool.policy import make_policy
            from distpool.progress import check_progress

            self._ways = submitting
            check_progress(progress)
            limits = {"timeout": timeout, "retry_delays": retry_delays, "retry_check": retry_check}
            if retries != 0:  # else the delays say how many
                limits["retries"] = retries
            self._policy = make_policy(None, **limits)
            replace = on_worker_exit == "replace"
            # Without an initializer nobody looks at its arguments: None is as good, as with the standard library.
            start = initializer, config.as_tuple("initargs", initargs) if initializer is not None else ()
            self._crew = opening.make_crew(hosts, max_workers, addprocs_options, start, max_tasks_per_child, replace)
            self._future_class = submitting.future_class(self._crew, replace)
            opening.register(self._crew.node, type(self), ExecutorView)
            if started is not None:
                opening.adopt(self._crew.node, started)
        except BaseException:
            if started is not None:
                started.discard()
            raise
        self._finalizer = weakref.finalize(self, _forgotten, self._crew)
        self._finalizer.atexit = False
        self._crew.start()

    def __repr__(self) -> str:
        state = "shut down" if self._shutdown else "broken" if self._broken else f"workers={self.workers}"
        return f"<ClusterExecutor {state}>"

    def _check_usable(self) -> None:
        crew = self._crew
        crew.scheduler.check_process()
        if crew.broken is not None:
            raise type(crew.broken)(*crew.broken.args) from crew.broken
        if self._shutdown:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if crew.node.exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    # -- policy and size ---------------------------------------------------------------------------------------

    def _view(self, policy: Policy | None) -> ExecutorView:
        return ExecutorView(self, policy)

    def __reduce__(self) -> Any:
        raise TypeError("a ClusterExecutor can only be sent to tasks; outside of calls it cannot be pickled")

    def scale(self, n: int) -> None:
        """Have `n` workers from now on: new ones are started in the background, surplus ones leave when idle.

        ValueError: more than there are, of a manager that starts what it starts (`ClusterManager.sized`).

        Example: `ex.scale(16)`
        """
        n = config.as_int(n)
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"the number of workers must be an int, not {type(n).__name__}")
        if n <= 0:
            raise ValueError("max_workers must be greater than 0")
        self._check_usable()
        crew = self._crew
        if n > crew.size and not crew.supply.can_grow:
            raise ValueError(f"there are {crew.size} workers, and their manager cannot start a given number of others")
        crew.ask(n)

    @property
    def workers(self) -> list[int]:
        """Pids of the workers that are ready for calls, sorted."""
        return sorted(pid for pid, slot in list(self._crew.scheduler.slots.items()) if not slot.retiring)

    def stats(self) -> list[dict[str, Any]]:
        """One dict per worker: pid, host, ospid, cpu (percent), memory (bytes), done, failed, bytes_in, bytes_out,
        running (name or None), since (seconds), queued. See `distpool.stats`.

        Example: `for row in ex.stats(): print(row["pid"], row["memory"])`
        """
        from distpool.monitor import crew_stats

        rows: list[dict[str, Any]] = crew_stats(self._crew)
        return rows

    # -- the end -----------------------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No new calls; pending ones are completed (or cancelled, if they have not started; those that wait for another
        attempt then end with the error of the last one). Waits for the end of the workers and of the futures'
        callbacks, unless `wait` is false. May be called again.
        """
        crew = self._crew
        first, self._shutdown, self._shutdown_thread = not self._shutdown, True, True
        if not crew.is_here:
            return  # in a forked child: the workers are the parent's
        if first:
            self._finalizer.detach()
        crew.scheduler.closing = True
        if cancel_futures:
            crew.scheduler.cancel_waiting(spare=crew.coming)
        crew.node.loop.call_soon(crew.scheduler.pump)  # Ctrl-C in a submit may have left its call to nobody
        crew.node.loop.call_soon(crew.scheduler.check_done)
        if wait:
            crew.wait()
            crew.scheduler.deliveries.wait()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> Literal[False]:
        """As `shutdown()`; but an interrupted program does not wait for its calls: what waits is dropped, what runs is
        ended. (The standard library's workers get Ctrl-C from the terminal; ours are in sessions of their own.)"""
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            self.kill_workers()
            self._crew.wait(1.0)
        else:
            self.shutdown(wait=True)
        return False

    def terminate_workers(self) -> None:
        """Cancel what has not started and send SIGTERM to the workers at once (Python 3.14)."""
        self._signal_workers("SIGTERM")

    def kill_workers(self) -> None:
        """Cancel what has not started and kill the workers at once (Python 3.14)."""
        self._signal_workers("SIGKILL")

    def _signal_workers(self, name: str) -> None:
        import signal  # not before the zygote is started

        signum = int(getattr(signal, name, signal.SIGTERM))
        crew = self._crew
        self.shutdown(wait=False)
        if crew.is_here:
            # Killed before the answers to the recalls are waited for: a worker that hangs gives none.
            crew.scheduler.cancel_waiting(lambda: crew.node.loop.call_soon(lambda: crew.kill(signum)))

    # -- private names that other libraries read ---------------------------------------------------------------

    #: As the standard library's before the first call and after the end: there is neither such a thread nor a queue.
    _executor_manager_thread = None
    _call_queue = None

    @property
    def _max_workers(self) -> int:
        return self._crew.size

    @property
    def _broken(self) -> str | bool:
        broken = self._crew.broken
        return str(broken) if broken is not None else False

    @property
    def _processes(self) -> dict[int, Any] | None:
        if self._shutdown:
            return None
        from distpool.shown import ShownProcess

        self._crew.wait_for_members()
        return {member.ospid: ShownProcess(member) for member in list(self._crew.members.values())}


class ExecutorView(Submitter):
    """The same workers under another policy; made by `ClusterExecutor.options`."""

    def __init__(self, executor: ClusterExecutor, policy: Policy | None) -> None:
        self._executor = executor  # keeps it alive
        self._crew = executor._crew
        self._ways = executor._ways
        self._policy = policy
        self._progress = executor._progress
        self._future_class = executor._future_class

    def _check_usable(self) -> None:
        self._executor._check_usable()

    def _view(self, policy: Policy | None) -> ExecutorView:
        return ExecutorView(self._executor, policy)

    @property
    def workers(self) -> list[int]:
        """Pids of the workers that calls of this view may run on."""
        pids = self._policy.pids if self._policy is not None else None
        return [pid for pid in self._executor.workers if pids is None or pid in pids]

    @property
    def _max_workers(self) -> int:
        return self._executor._max_workers

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut the executor down that this is a view of."""
        self._executor.shutdown(wait, cancel_futures=cancel_futures)


class _SpawnContext:
    """What `_mp_context` shows when none was given: workers are fresh interpreters."""

    def get_start_method(self, allow_none: bool = False) -> str:
        """The start method that describes our workers best."""
        return "spawn"


# -- helpers -----------------------------------------------------------------------------------------------------


def _check_max_tasks(count: int | None, mp_context: Any) -> None:
    if count is None:
        return
    if not isinstance(count, int):
        raise TypeError("max_tasks_per_child must be an integer")
    if count <= 0:
        raise ValueError("max_tasks_per_child must be >= 1")
    if mp_context is not None and mp_context.get_start_method(allow_none=False) == "fork":
        raise ValueError("max_tasks_per_child is incompatible with the 'fork' multiprocessing start method")


def _forgotten(crew: Crew) -> None:
    """The executor object is gone without shutdown: finish what is pending, then let the workers go.

    Runs in a finalizer: only `call_soon`, which takes no lock.
    """
    crew.scheduler.closing = True
    with contextlib.suppress(RuntimeError):
        crew.node.loop.call_soon(crew.scheduler.check_done)


__all__ = ["ClusterExecutor", "ExecutorView"]
