"""What the executor and its views share: submit and the maps, under one policy (layer 10).

submit:  caller's thread: serialise -> Call -> Scheduler -> worker;   leader: result -> Future
map:     caller's thread: MapRun.feed -> spans cut by measured time -> worker;   consumer decodes each result
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distpool.crew import Crew
from distpool.errors import SerializationError
from distpool.lazymap import LazyMap
from distpool.mapresults import check_map, fed_results, map_by_futures, unordered_futures
from distpool.mapruns import MapRun, look_ahead
from distpool.progress import make_progress
from distpool.refs.refs import RAISED_HERE, Future, Outcome
from distpool.wire import codec
from distpool.wire.functions import EncodedFunction
from distpool.wire.messages import CALL, ONE, ONE_FRESH, UNSENDABLE, VALUE
from distpool.work import Call, Policy, is_plain, with_references

_new_future: Any = object.__new__  # `Future()` would cost a Python call more
#: Elements that lazy maps take ahead, per worker.
LOOK_AHEAD = 8
#: Inputs from which taking has no effect that anybody could see.
_AT_HAND = frozenset((list, tuple, range, str, bytes))


def strict_future(crew: Crew) -> type[Future[Any]]:
    """Futures of an executor in "break" mode: a result that cannot be loaded here breaks it (the stdlib's rule)."""

    class StrictFuture(Future[Any]):
        def _open(self, raw: Outcome) -> tuple[Any, BaseException | None]:
            value, error = super()._open(raw)
            if error is not None and raw.status == VALUE:
                error = crew.break_here(error)
            elif raw.status == UNSENDABLE and "cannot be serialised: SystemExit" in str(error):
                error = SystemExit(str(error))  # the value's pickling called sys.exit: the stdlib's future says so
            return value, error

    return StrictFuture


class Submitter(concurrent.futures.Executor):
    """What the executor and its views share: submit and the maps, under one policy."""

    _crew: Crew
    _policy: Policy | None
    _progress: Any
    _future_class: type[Future[Any]] = Future

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
        future: Future[Any]
        if self._policy is not None and self._policy.keep:
            from distpool.kept import KeptFuture, run_kept  # loads the references, which few executors need

            future, fn = KeptFuture(), functools.partial(run_kept, fn)
        else:
            future = _new_future(self._future_class)
        try:
            function = crew.node.encoder.encode(fn)
            if not kwargs and self._policy is None and function.reusable and is_plain(args):
                future._call = call = Call(scheduler, function, b"", [], future, None, args)
                scheduler.enqueue(call)
                return future
            seen: list[Any] = []
            data, buffers = codec.encode_args(args, kwargs, None, seen)
        except SerializationError as error:
            future._settle(Outcome(RAISED_HERE, error, (), 1))
            return future
        staged = scheduler.stage(buffers) if buffers else []
        flags = ONE if function.reusable else ONE_FRESH
        record = CALL.pack(function.number, 1, len(data), len(staged), flags) + data
        if seen:
            staged = with_references(staged, seen)
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
        deadline = check_map(timeout, chunksize, buffersize)
        self._check_usable()
        if not iterables:
            return iter(())
        if "submit" in self.__dict__ or not (self._policy is None or self._policy.plain):
            return map_by_futures(self.submit, fn, iterables, deadline, chunksize, buffersize)
        single = len(iterables) == 1
        source: Iterator[Any] = iter(iterables[0]) if single else zip(*iterables, strict=False)
        function = self._crew.node.encoder.encode(fn)
        if buffersize is not None:
            return self._with_progress(self._map_buffered(function, source, single, deadline, chunksize, buffersize))
        run = MapRun(self._crew.scheduler, function, single=single, chunked=chunksize > 1)
        run.takes_many = True
        if chunksize == 1:
            run.feed(list(source))
            total = run.fed
        elif all(type(iterable) in _AT_HAND for iterable in iterables):
            items = list(source)
            total = len(items)
            run.feed_cut(items, chunksize, plain=single and type(iterables[0]) is range)
        else:
            total = 0
            while chunk := list(itertools.islice(source, chunksize)):
                run.feed_chunk(chunk)
                total += len(chunk)
        return self._with_progress(fed_results(run, deadline, chunksize > 1), total)

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

    def imap_unordered(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        buffersize: int | None = None,
        timeout: float | None = None,
    ) -> Iterator[Any]:
        """Results in the order in which they come. Lazy: takes at most `buffersize` elements ahead (default 8 per
        worker; of short tasks over a list or range more), so endless generators work. `timeout`: seconds until all must
        be there.

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
            most = buffersize or LOOK_AHEAD * crew.size
            arguments = ((item,) for item in source) if single else source
            return self._with_progress(unordered_futures(self.submit, fn, arguments, most, deadline))
        function = crew.node.encoder.encode(fn)
        at_hand = all(type(iterable) in _AT_HAND for iterable in iterables)

        def ahead() -> int:
            return buffersize or crew.size * (look_ahead(function.mean, LOOK_AHEAD) if at_hand else LOOK_AHEAD)

        return self._with_progress(
            LazyMap(
                crew.scheduler,
                function,
                source,
                single=single,
                look_ahead=ahead,
                ordered=False,
                deadline=deadline,
                in_halves=buffersize is None,
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
        from distpool.mapping import pmap

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
