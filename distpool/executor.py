"""`ClusterExecutor`: a `concurrent.futures.Executor` on cluster processes (layer 10).

    submit:  caller's thread: serialise -> Call -> Scheduler -> worker;   leader: result -> Future
    map:     caller's thread: MapRun.feed -> spans cut by measured time -> worker;   consumer decodes each result
    options: a view with another policy on the same workers

The workers belong to a `Crew`, which lives as long as work is pending, also after the executor object was dropped.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distpool import exits
from distpool.crew import Crew
from distpool.errors import SerializationError
from distpool.hosts import Plan, plan_for
from distpool.lazymap import LazyMap, open_entry
from distpool.node import node as nodes
from distpool.progress import make_progress
from distpool.refs.refs import RAISED_HERE, Future, Outcome
from distpool.wire import codec
from distpool.wire.functions import EncodedFunction
from distpool.wire.messages import CALL, ONE, ONE_FRESH
from distpool.work import SCALARS, Call, MapRun, Policy

#: Elements that lazy maps take ahead, per worker.
LOOK_AHEAD = 8
_UNSET: Any = object()


class _Submitter(concurrent.futures.Executor):
    """What the executor and its views share: submit and the maps, under one policy."""

    _crew: Crew
    _policy: Policy | None
    _progress: Any

    # -- single calls ------------------------------------------------------------------------------------------

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(*args, **kwargs)` on a worker; returns a `distpool.Future`.

        Arguments are serialised before this returns. What cannot be serialised is the error of that future alone
        (`SerializationError`). RuntimeError after shutdown; BrokenProcessPool when the executor is broken.

        Example: `ex.submit(pow, 2, 10).result()` is 1024.
        """
        crew = self._crew
        self._check_usable()
        scheduler = crew.scheduler
        future: Future[Any] = Future()
        try:
            function = crew.node.encoder.encode(fn)
            data, buffers = codec.encode_args(args, kwargs)
        except SerializationError as error:
            future._settle(Outcome(RAISED_HERE, error, (), 1))
            return future
        staged = scheduler.stage(buffers) if buffers else []
        flags = ONE if function.reusable else ONE_FRESH
        record = CALL.pack(function.number, 1, len(data), len(staged), flags) + data
        call = Call(scheduler, function, record, staged, future, self._policy)
        future._call = call
        scheduler.enqueue(call)
        return future

    def _check_usable(self) -> None:
        raise NotImplementedError

    # -- maps --------------------------------------------------------------------------------------------------

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Results of `fn` over the iterables, in input order, as the standard library's `Executor.map` (3.14).

        `timeout`: seconds from this call until a result must be there (`TimeoutError`). `chunksize`: elements that are
        sent, and fail, together; with 1 the size of what is sent adapts to the measured time. `buffersize`: elements
        taken from the input and not yet delivered (default: all are taken at once). `fn` is serialised once.

        Example: `list(ex.map(abs, [-1, -2]))` is [1, 2].
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        self._check_usable()
        if not iterables:
            return iter(())
        if "submit" in self.__dict__ or not (self._policy is None or self._policy.plain):
            return self._map_by_futures(fn, iterables, deadline, chunksize, buffersize)
        single = len(iterables) == 1
        source: Iterator[Any] = iter(iterables[0]) if single else zip(*iterables, strict=False)
        function = self._crew.node.encoder.encode(fn)
        if buffersize is not None:
            return self._with_progress(self._map_buffered(function, source, single, deadline, chunksize, buffersize))
        run = MapRun(self._crew.scheduler, function, single=single, chunked=chunksize > 1)
        if chunksize == 1:
            run.feed(list(source))
        else:
            while chunk := list(itertools.islice(source, chunksize)):
                run.feed_chunk(chunk)
        return self._with_progress(_results(run, deadline, chunksize > 1), run.fed * chunksize)

    def _map_buffered(
        self,
        function: EncodedFunction,
        source: Iterator[Any],
        single: bool,
        deadline: float | None,
        chunksize: int,
        buffersize: int,
    ) -> Iterator[Any]:
        chunk = chunksize if chunksize > 1 else None
        results = LazyMap(
            self._crew.scheduler,
            function,
            source,
            single=single,
            look_ahead=lambda: buffersize,
            chunk=chunk,
            deadline=deadline,
            fill_at_once=True,
        )
        return results if chunk is None else itertools.chain.from_iterable(results)

    def _map_by_futures(
        self,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        deadline: float | None,
        chunksize: int,
        buffersize: int | None,
    ) -> Iterator[Any]:
        """One future per chunk through `self.submit`: for a replaced `submit` (tqdm) and for policies."""
        source = zip(*iterables, strict=False)
        submit = self.submit
        if chunksize > 1:
            chunks = iter(lambda: tuple(itertools.islice(source, chunksize)), ())
            start: Iterator[Future[Any]] = (submit(_run_chunk, fn, chunk) for chunk in chunks)
        else:
            start = (submit(fn, *args) for args in source)
        futures = list(start if buffersize is None else itertools.islice(start, buffersize))
        results = _future_results(futures, start if buffersize is not None else iter(()), deadline)
        return itertools.chain.from_iterable(results) if chunksize > 1 else results

    def imap_unordered(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        buffersize: int | None = None,
        timeout: float | None = None,
    ) -> Iterator[Any]:
        """Results in the order in which they come. Lazy: takes at most `buffersize` elements ahead (default 8 per
        worker), so endless generators work. `timeout`: seconds until all must be there.

        Example: `for value in ex.imap_unordered(f, itertools.count()): ...`
        """
        if buffersize is not None and (not isinstance(buffersize, int) or buffersize < 1):
            raise ValueError("buffersize must be None or > 0")
        self._check_usable()
        single = len(iterables) == 1
        source: Iterator[Any] = iter(iterables[0]) if single else zip(*iterables, strict=False)
        deadline = None if timeout is None else time.monotonic() + timeout
        crew = self._crew
        if not (self._policy is None or self._policy.plain):
            ahead = buffersize or LOOK_AHEAD * crew.size
            arguments = ((item,) for item in source) if single else source
            return self._with_progress(_unordered_futures(self.submit, fn, arguments, ahead, deadline))
        return self._with_progress(
            LazyMap(
                crew.scheduler,
                crew.node.encoder.encode(fn),
                source,
                single=single,
                look_ahead=lambda: buffersize or LOOK_AHEAD * crew.size,
                ordered=False,
                deadline=deadline,
            )
        )

    def pmap(
        self,
        f: Callable[..., Any],
        *iterables: Iterable[Any],
        batch_size: int | str = 1,
        on_error: Callable[[BaseException], Any] | None = None,
        retry_delays: Iterable[float] = (),
        retry_check: Any = None,
        progress: Any = None,
        distributed: bool = True,
    ) -> list[Any]:
        """Julia's `pmap` on these workers; see `distpool.pmap`.

        Example: `ex.pmap(f, xs, retry_delays=[0] * 3, on_error=lambda error: None)`
        """
        from distpool.pmap import pmap

        values: list[Any] = pmap(
            f,
            *iterables,
            pool=self,
            distributed=distributed,
            batch_size=batch_size,
            on_error=on_error,
            retry_delays=retry_delays,
            retry_check=retry_check,
            progress=self._progress if progress is None else progress,
        )
        return values

    def _with_progress(self, results: Iterator[Any], total: int | None = None) -> Iterator[Any]:
        if not self._progress:
            return results
        return make_progress(self._progress, total).wrap(results)


class ClusterExecutor(_Submitter):
    """Runs calls on worker processes of this machine or of a cluster: a drop-in for `ProcessPoolExecutor`.

    `hosts`: `None` (as many local workers as `max_workers`, default: usable CPUs), an int, a manager, `"local://4"`,
    ... (API of the package). `initializer(*initargs)` runs first in every worker. `max_tasks_per_child`: calls after
    which a worker is replaced. `on_worker_exit`: "replace" (only the running call fails) or "break" (the standard
    library's rule). `timeout` (seconds of running time per attempt), `retries`, `retry_delays`, `retry_check`: see
    `options`. Construction returns at once; workers are used as they come.

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
        plan: Plan = plan_for(hosts, max_workers, addprocs_options)
        self._policy = make_policy(
            None, timeout=timeout, retries=retries, retry_delays=retry_delays, retry_check=retry_check
        )
        self._progress = progress
        self._mp_context = mp_context if mp_context is not None else _SpawnContext()
        self._initializer = initializer
        self._initargs = initargs
        self._shutdown = False
        self._shutdown_thread = False
        exits.check_alive()
        start = codec.encode((initializer, tuple(initargs))) if initializer is not None else None
        if start is not None and start[1]:
            start = codec.dump((initializer, tuple(initargs)), None, None, None), []
        self._crew = Crew(
            nodes.current(),
            plan.size,
            plan.manager,
            plan.params,
            initializer=start[0] if start is not None else None,
            max_tasks=max_tasks_per_child,
            replace=on_worker_exit == "replace",
        )
        exits.register(self._crew.node)
        self._finalizer = weakref.finalize(self, _forgotten, self._crew)
        self._finalizer.atexit = False
        self._crew.start(plan.size)

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
        if exits.ending():
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    # -- policy and size ---------------------------------------------------------------------------------------

    def options(
        self,
        *,
        timeout: float | None = _UNSET,
        retries: int = _UNSET,
        retry_delays: Iterable[float] | None = _UNSET,
        retry_check: Any = _UNSET,
        pids: Iterable[int] | int | None = _UNSET,
        keep: bool = _UNSET,
        label: str | None = _UNSET,
    ) -> ExecutorView:
        """A view on the same workers with another policy; what is not given stays as it is here.

        `timeout`: seconds of running time per attempt; past it the worker is killed and replaced, the future gets
        `TimeoutError`. `retries`: attempts after the first, for exceptions that `retry_check` (exception type, tuple
        or `callable(exc) -> bool`) accepts, and for worker death. `retry_delays`: seconds before each retry. `pids`:
        only on those workers. `label`: name in statistics.

        Example: `ex.options(timeout=5, retries=2).submit(f, x)`
        """
        given = {
            "timeout": timeout, "retries": retries, "retry_delays": retry_delays, "retry_check": retry_check,
            "pids": pids, "keep": keep, "label": label,
        }  # fmt: skip
        return ExecutorView(self, make_policy(self._policy, **{k: v for k, v in given.items() if v is not _UNSET}))

    def scale(self, n: int) -> None:
        """Have `n` workers from now on: new ones are started in the background, surplus ones leave when idle.

        Example: `ex.scale(16)`
        """
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"the number of workers must be an int, not {type(n).__name__}")
        if n <= 0:
            raise ValueError("max_workers must be greater than 0")
        self._check_usable()
        crew = self._crew
        crew.node.loop.call_soon(lambda: crew.scale(n))

    @property
    def workers(self) -> list[int]:
        """Pids of the workers that are ready for calls, sorted."""
        return sorted(pid for pid, slot in list(self._crew.scheduler.slots.items()) if not slot.retiring)

    def stats(self) -> list[dict[str, Any]]:
        """One dict per worker: pid, host, ospid, cpu (percent), memory (bytes), done, failed, bytes_in, bytes_out,
        running (name or None), since (seconds).

        Example: `for row in ex.stats(): print(row["pid"], row["memory"])`
        """
        from distpool.monitor import crew_stats

        rows: list[dict[str, Any]] = crew_stats(self._crew)
        return rows

    # -- the end -----------------------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No new calls; pending ones are completed (or cancelled, if they have not started). Waits for the end of the
        workers unless `wait` is false. May be called again.
        """
        crew = self._crew
        first, self._shutdown, self._shutdown_thread = not self._shutdown, True, True
        if nodes.existing() is not crew.node:
            return  # in a forked child: the workers are the parent's
        if first:
            self._finalizer.detach()
        crew.scheduler.closing = True
        if cancel_futures:
            crew.scheduler.cancel_waiting()
        crew.node.loop.call_soon(crew.scheduler.check_done)
        if wait:
            exits.wait_for(crew)

    def terminate_workers(self) -> None:
        """Cancel what has not started and send SIGTERM to the workers at once (Python 3.14)."""
        self._signal_workers(signal.SIGTERM)

    def kill_workers(self) -> None:
        """Cancel what has not started and kill the workers at once (Python 3.14)."""
        self._signal_workers(getattr(signal, "SIGKILL", signal.SIGTERM))

    def _signal_workers(self, signum: int) -> None:
        crew = self._crew
        self.shutdown(wait=False, cancel_futures=True)
        crew.node.loop.call_soon(lambda: crew.kill(signum))

    # -- private names that other libraries read ---------------------------------------------------------------

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
        return {member.ospid: _Process(member) for member in list(self._crew.members.values())}


class ExecutorView(_Submitter):
    """The same workers under another policy; made by `ClusterExecutor.options`."""

    def __init__(self, executor: ClusterExecutor, policy: Policy | None) -> None:
        self._executor = executor  # keeps it alive
        self._crew = executor._crew
        self._policy = policy
        self._progress = executor._progress

    def _check_usable(self) -> None:
        self._executor._check_usable()

    def options(self, **options: Any) -> ExecutorView:
        """A view with a further changed policy; see `ClusterExecutor.options`."""
        return ExecutorView(self._executor, make_policy(self._policy, **options))

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


class _Process:
    """One worker process as `ProcessPoolExecutor._processes` shows it."""

    def __init__(self, member: Any) -> None:
        self._member = member
        self.pid = member.ospid

    def is_alive(self) -> bool:
        """Whether the process is still there."""
        return not self._member.process.exited

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._member.process.kill(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._member.process.kill()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the process."""
        import threading

        ended = threading.Event()
        self._member.process.add_exit_callback(lambda code: ended.set())
        with self._member.group.node.loop.following():
            ended.wait(timeout)

    @property
    def exitcode(self) -> int | None:
        """Exit status (negative: signal), `None` while it lives."""
        code: int | None = self._member.exitcode
        return code


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


def make_policy(base: Policy | None, **changes: Any) -> Policy | None:
    """`base` with `changes`, checked; `None` if that needs no treatment at all."""
    values = {name: getattr(base or Policy(), name) for name in Policy.__dataclass_fields__}
    unknown = set(changes) - set(values)
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    values.update(changes)
    timeout, retries, delays, pids = (values[name] for name in ("timeout", "retries", "retry_delays", "pids"))
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {type(timeout).__name__}")
    if timeout is not None and timeout <= 0:
        raise ValueError("timeout must be greater than 0")
    if isinstance(retries, bool) or not isinstance(retries, int):
        raise TypeError(f"retries must be an int, not {type(retries).__name__}")
    if retries < 0:
        raise ValueError("retries must be >= 0")
    if delays is not None:
        values["retry_delays"] = delays = tuple(float(delay) for delay in delays)
        if not retries and "retries" not in changes:
            values["retries"] = len(delays)
    if pids is not None:
        values["pids"] = frozenset([pids] if isinstance(pids, int) else pids)
    check = values["retry_check"]
    if check is not None and not (callable(check) or isinstance(check, tuple)):
        raise TypeError("retry_check must be an exception type, a tuple of them, or a callable")
    policy = Policy(**values)
    return None if policy == Policy() else policy


def _results(run: MapRun, deadline: float | None, chunked: bool) -> Iterator[Any]:
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


def _future_results(futures: list[Future[Any]], more: Iterator[Future[Any]], deadline: float | None) -> Iterator[Any]:
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


def _unordered_futures(
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


def _run_chunk(fn: Callable[..., Any], chunk: tuple[Any, ...]) -> list[Any]:
    """On the worker: one chunk of a map."""
    return [fn(*args) for args in chunk]


def _forgotten(crew: Crew) -> None:
    """The executor object is gone without shutdown: finish what is pending, then let the workers go.

    Runs in a finalizer: only `call_soon`, which takes no lock.
    """
    crew.scheduler.closing = True
    with contextlib.suppress(RuntimeError):
        crew.node.loop.call_soon(crew.scheduler.check_done)


__all__ = ["LOOK_AHEAD", "SCALARS", "ClusterExecutor", "ExecutorView", "make_policy"]
