"""How an executor or a view of it submits and maps, under its policy (layer 10).

submit:  caller's thread: serialise -> Call -> Scheduler -> worker;   leader: result -> Future
map:     caller's thread: MapRun.feed -> spans cut by measured time -> worker;   consumer decodes each result
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized

from distpool.crew import Crew
from distpool.errors import SerializationError, as_both
from distpool.hints import Any
from distpool.lazymap import LazyMap
from distpool.mapresults import check_map, fed_results, flattened, map_by_futures, unordered_futures
from distpool.mapruns import LOOK_AHEAD, MapRun, look_ahead
from distpool.progress import make_progress
from distpool.refs.refs import RAISED_HERE, Future, Outcome
from distpool.submitter import Submitter
from distpool.wire import codec
from distpool.wire.functions import EncodedFunction
from distpool.wire.messages import CALL, ONE, ONE_FRESH, UNSENDABLE, VALUE
from distpool.work import Call, check_references, is_plain, parts_of

_new_future: Any = object.__new__  # `Future()` would cost a Python call more
#: Inputs from which taking has no effect that anybody could see.
_AT_HAND = frozenset((list, tuple, range, str, bytes))


def _strict_future(crew: Crew) -> type[Future[Any]]:
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


def future_class(crew: Crew, replace: bool) -> type[Future[Any]]:
    """What `submit` makes for an executor with these workers, which replaces those that end, or not."""
    return Future if replace else _strict_future(crew)


def submit(owner: Submitter, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]:
    """`Submitter.submit`."""
    crew = owner._crew
    owner._check_usable()
    scheduler = crew.scheduler
    policy = owner._policy
    future: Future[Any]
    try:
        if policy is not None and policy.keep:
            from distpool.kept import KeptFuture, encode_kept  # loads the references, which few executors need

            future = KeptFuture()
            function = encode_kept(crew.node.encoder, fn)
        else:
            future = _new_future(owner._future_class)
            function = crew.node.encoder.encode(fn)
        if function.references:
            check_references(crew.node, function.references)
        if not kwargs and policy is None and function.reusable and is_plain(args):
            future._call = call = Call(scheduler, function, b"", [], future, None, args)
            scheduler.enqueue(call)
            return future
        seen: list[Any] = []
        data, buffers = codec.encode_args(args, kwargs, None, seen)
        staged = scheduler.stage(buffers) if buffers else []
        staged = parts_of(crew.node, staged, seen, data, args, kwargs)
    except SerializationError as error:
        future._settle(Outcome(RAISED_HERE, as_both(error), (), 1))
        return future
    flags = ONE if function.reusable else ONE_FRESH
    record = CALL.pack(function.number, 1, len(data), len(staged), flags) + data
    call = Call(scheduler, function, record, staged, future, policy)
    future._call = call
    scheduler.enqueue(call)
    return future


def map_in_order(
    owner: Submitter,
    fn: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    timeout: float | None,
    chunksize: int,
    buffersize: int | None,
) -> Iterator[Any]:
    """`Submitter.map`."""
    deadline = check_map(timeout, chunksize, buffersize)
    owner._crew.scheduler.check_process()
    try:
        owner._check_usable()
    except RuntimeError:  # BrokenProcessPool too
        # As in the standard library, where only the first element of a map finds that it cannot be submitted.
        if next(zip(*iterables, strict=False), None) is None:
            return iter(())
        raise
    if not iterables:
        return iter(())
    replaced = "submit" in owner.__dict__ or type(owner).submit is not Submitter.submit
    if replaced or not (owner._policy is None or owner._policy.plain):
        lengths = [len(iterable) for iterable in iterables if isinstance(iterable, Sized)]
        results = map_by_futures(owner.submit, fn, iterables, deadline, chunksize, buffersize)
        return _with_progress(owner, results, min(lengths) if len(lengths) == len(iterables) else None)
    single = len(iterables) == 1
    source: Iterator[Any] = iter(iterables[0]) if single else zip(*iterables, strict=False)
    function = owner._crew.node.encoder.encode_for_map(fn)
    if buffersize is not None:
        return _with_progress(owner, _map_buffered(owner, function, source, single, deadline, chunksize, buffersize))
    run = MapRun(owner._crew.scheduler, function, single=single, chunked=chunksize > 1)
    run.takes_many = True
    if chunksize == 1:
        run.feed(list(source))
        total = run.fed
    elif all(type(iterable) in _AT_HAND for iterable in iterables):
        items = iterables[0] if single and type(iterables[0]) is range else list(source)
        total = len(items)
        run.feed_cut(items, chunksize)
    else:
        total = 0
        while chunk := list(itertools.islice(source, chunksize)):
            run.feed_chunk(chunk)
            total += len(chunk)
    return _with_progress(owner, fed_results(run, deadline, chunksize > 1), total)


def _map_buffered(
    owner: Submitter,
    function: EncodedFunction,
    source: Iterator[Any],
    single: bool,
    deadline: float | None,
    chunksize: int,
    buffersize: int,
) -> Iterator[Any]:
    chunk = chunksize if chunksize > 1 else None
    results = LazyMap(
        owner._crew.scheduler,
        function,
        source,
        single=single,
        look_ahead=lambda: buffersize,
        chunk=chunk,
        deadline=deadline,
        refilled=True,
        owner=owner,
    )
    return results if chunk is None else flattened(results)


def map_unordered(
    owner: Submitter,
    fn: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    buffersize: int | None,
    timeout: float | None,
) -> Iterator[Any]:
    """`Submitter.imap_unordered`."""
    deadline = check_map(timeout, 1, buffersize)
    owner._check_usable()
    single = len(iterables) == 1
    source: Iterator[Any] = iter(iterables[0]) if single else zip(*iterables, strict=False)
    crew = owner._crew
    if not (owner._policy is None or owner._policy.plain):
        most = buffersize or LOOK_AHEAD * crew.size
        arguments = ((item,) for item in source) if single else source
        return _with_progress(owner, unordered_futures(owner.submit, fn, arguments, most, deadline))
    function = crew.node.encoder.encode_for_map(fn)
    at_hand = all(type(iterable) in _AT_HAND for iterable in iterables)

    def ahead() -> int:
        return buffersize or crew.size * (look_ahead(function.timing.mean, LOOK_AHEAD) if at_hand else LOOK_AHEAD)

    return _with_progress(
        owner,
        LazyMap(
            crew.scheduler,
            function,
            source,
            single=single,
            look_ahead=ahead,
            ordered=False,
            deadline=deadline,
            in_halves=buffersize is None,
            owner=owner,
        ),
    )


def _with_progress(owner: Submitter, results: Iterator[Any], total: int | None = None) -> Iterator[Any]:
    if not owner._progress:
        return results
    return make_progress(owner._progress, total).wrap(results)
