"""What `DistPool`'s methods return: `AsyncResult`, `MapResult`, `IMapIterator` (layer 10).

    leader: Call/MapRun.settle  -- counts only --> Callbacks.put --> library thread: decode, callback, event
                                                                      |  get() and wait() return after that
    without callbacks:  get() leads the loop or sleeps, then decodes in its own thread

All are subclasses of the standard library's classes of the same purpose, because programs ask `isinstance`; nothing of
theirs runs.
"""

from __future__ import annotations

import collections
import multiprocessing
import multiprocessing.pool as stdlib
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from distpool.config import deadline_after
from distpool.dropped import WhenDropped
from distpool.errors import cause_of
from distpool.flag import Flag
from distpool.logs import Log
from distpool.mapruns import Many, MapRun
from distpool.pool_callbacks import Callbacks, PoolTerminated, open_entry, park_at_exit
from distpool.pool_input import Feed
from distpool.progress import Progress
from distpool.refs.refs import Future, Outcome
from distpool.wire import codec

log = Log("pool")

_STEPS = 200  # how often a progress bar moves during one map
_LARGE = 1024  # elements of a chunk that is decoded when it comes: to wait for it alone costs 10 us


class AsyncResult(stdlib.ApplyResult):  # type: ignore[type-arg]
    """The result of `apply_async`: `get(timeout)`, `wait(timeout)`, `ready()`, `successful()`; timeouts in seconds.

    `get` raises what the call raised, `multiprocessing.TimeoutError` after `timeout` seconds, and if the pool was
    terminated first a `DistpoolError` that is a `BrokenProcessPool` too. Callbacks have run when `ready()` is true.

    Example: `pool.apply_async(pow, (2, 10)).get() == 1024`
    """

    def __init__(self, callbacks: Callbacks, callback: Any, error_callback: Any, *, watched: bool = False) -> None:
        # The base is not initialised on purpose: it registers with a stdlib pool's cache.
        self._callbacks = callbacks
        self._callback = callback
        self._error_callback = error_callback
        self._outcome: tuple[bool, Any] | None = None
        #: Protects _outcome while it is made. Reentrant: a signal handler or a `__del__` may ask meanwhile.
        self._opening = threading.RLock()
        self._caller = 0  # the thread that runs the callback
        self._event: Flag | None = None  # the callback has run
        if watched or callback is not None or error_callback is not None:
            self._event = Flag()
            callbacks.results.add(self)

    # -- what the source of the result provides ----------------------------------------------------------------

    def _settled(self) -> bool:
        raise NotImplementedError

    def _await(self, deadline: float | None) -> bool:
        raise NotImplementedError

    def _collect(self) -> Any:
        raise NotImplementedError

    def _release(self) -> None:
        """The outcome has been made: let go of what it was made of."""
        raise NotImplementedError

    # -- the public face ---------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the result is there and the callback has run."""
        return self._event.is_set() if self._event is not None else self._settled()

    def successful(self) -> bool:
        """Whether the call returned; ValueError if the result is not there yet."""
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._open()[0]

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the result, at most `timeout` seconds."""
        if self.ready():
            return
        callbacks = self._callbacks
        callbacks.scheduler.check_process()
        callbacks.give_way()
        deadline = deadline_after(timeout)
        if self._event is None:
            self._await(deadline)
        else:
            callbacks.wait_for(self._event, deadline)

    def get(self, timeout: float | None = None) -> Any:
        """The value, or the call's exception; `multiprocessing.TimeoutError` after `timeout` seconds."""
        self.wait(timeout)
        if not self.ready():
            raise multiprocessing.TimeoutError
        success, value = self._open()
        try:
            if success:
                return value
            park_at_exit(value, self._callbacks.scheduler)
            raise value
        finally:
            self = value = None  # type: ignore[assignment]  # break the cycle exception -> traceback -> frame

    # -- inside ------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[bool, Any]:
        with self._opening:
            if self._outcome is None:
                outcome: tuple[bool, Any]
                try:
                    outcome = True, self._collect()
                except BaseException as error:
                    # Not an interrupt of this thread while it decodes. Without the traceback of the decoding.
                    if issubclass(type(error), KeyboardInterrupt) and cause_of(error) is None:
                        raise
                    outcome = False, BaseException.with_traceback(error, None)
                if self._outcome is None:  # else who asked meanwhile has it, and what it is made of is gone
                    self._outcome = outcome
                self._release()
            return self._outcome

    def _finish(self) -> None:
        """On the thread of callbacks."""
        self._caller = threading.get_ident()
        try:
            success, value = self._open()
            callback = self._callback if success else self._error_callback
            if callback is not None and not (not success and isinstance(value, PoolTerminated)):
                callback(value)
        finally:
            self._callback = self._error_callback = None
            assert self._event is not None
            self._event.set()
            self._callbacks.tell()
            self._callbacks.results.discard(self)

    def _await_callback(self) -> None:
        if self._event is not None and self._caller != threading.get_ident():
            self._callbacks.wait_for(self._event)


class _Watched(Future[Any]):
    """Tells the pool of its end, on the leader: `add_done_callback` would cost one more thread hand-over."""

    _watched = True  # it has a `_finish` of its own

    def __init__(self, watcher: Callable[[], object]) -> None:
        super().__init__()
        self._watcher = watcher

    def _finish(self, state: str, raw: Outcome | None = None, result: Any = None, error: Any = None) -> bool:
        ended = super()._finish(state, raw, result, error)
        if ended:
            self._watcher()
        return ended


class ApplyResult(AsyncResult):
    """One call."""

    def __init__(self, callbacks: Callbacks, callback: Any, error_callback: Any) -> None:
        super().__init__(callbacks, callback, error_callback)
        self._future: Future[Any]
        if self._event is None:
            self._future = Future()
        else:
            self._future = _Watched(lambda: callbacks.put(self._finish))

    def _settled(self) -> bool:
        return self._future.done()

    def _await(self, deadline: float | None) -> bool:
        return self._future._await(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _collect(self) -> Any:
        raw = self._future._raw
        if raw is not None:
            return open_entry(raw)
        if self._future.cancelled():
            raise PoolTerminated("the call was cancelled")
        if self._future._exception is not None:  # opened already, see `soon.Soon`
            raise self._future._exception
        return self._future._result

    def _release(self) -> None:
        self._future._raw = self._future._result = None
        self._future.__dict__.pop("_watcher", None)  # it refers to us


class MapResult(AsyncResult, stdlib.MapResult):  # type: ignore[type-arg]
    """The result of `map_async` and `starmap_async`: a list in input order, or the first failed chunk's exception."""

    def __init__(
        self,
        callbacks: Callbacks,
        callback: Any,
        error_callback: Any,
        run: MapRun | None,
        entries: int,
        *,
        chunksize: int,
        error: BaseException | None = None,
        bar: tuple[Progress, int] | None = None,
    ) -> None:
        super().__init__(callbacks, callback, error_callback, watched=bar is not None)
        self._run = run
        self._results: dict[int, Any] = run.results if run is not None else {}
        if run is not None:
            run.takes_many = True
        self._dropped = WhenDropped(run.disown) if run is not None else None
        self._entries = entries
        self._chunksize = chunksize
        self._opened: dict[int, tuple[bool, Any]] = {}  # chunks that `get` has decoded, or how that failed
        self._error = error  # of the input or the function: nothing was sent
        self._bar = bar
        self._shown = self._last = 0  # leader: steps that the bar has been told, entries that had ended then
        self._tokens = collections.deque([None])  # whoever pops it announces the end: two threads may settle
        if self._event is not None and entries and run is not None:
            run.on_settled = self._on_settled
        elif self._event is not None:
            callbacks.put(self._finish)

    def _ended(self) -> int:
        """How many entries have ended."""
        run = self._run  # gone when the outcome has been made
        return self._entries if run is None else len(run.results) + run.joined

    def _on_settled(self, index: int) -> None:
        """Leader, or the feeding thread for what could not be serialised: only count."""
        done = self._ended()
        if self._bar is not None:
            bar, total = self._bar
            step = done * min(self._entries, _STEPS) // self._entries
            if step > self._shown:
                count = _elements(done, self._entries, total) - _elements(self._last, self._entries, total)
                self._shown, self._last = step, done
                self._callbacks.put(lambda: bar.update(count))
        if done >= self._entries and self._tokens:
            try:
                self._tokens.pop()
            except IndexError:
                return
            self._callbacks.put(self._finish)

    def _finish(self) -> None:
        if self._bar is not None:
            try:
                self._bar[0].close()
            except Exception:
                log.exception("error of a progress bar")
        super()._finish()

    def _settled(self) -> bool:
        return self._ended() >= self._entries

    def _await(self, deadline: float | None) -> bool:
        return self._run is None or self._run.wait_until(self._settled, deadline)

    def get(self, timeout: float | None = None) -> Any:
        """The list of values, or the exception of the first chunk that failed, when all have ended;
        `multiprocessing.TimeoutError` after `timeout` seconds."""
        if self._run is not None and self._event is None and self._chunksize >= _LARGE:
            deadline = deadline_after(timeout)
            self._callbacks.give_way()
            self._open_meanwhile(self._run, deadline)
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        return super().get(timeout)

    def _open_meanwhile(self, run: MapRun, deadline: float | None) -> None:
        """Decode large chunks while others are on their way: of a map of tiny calls it would be a sixth of the time.

        Without a lock, because threads that wait may have deadlines: two may decode the same chunk, which counts once.
        """
        opened = self._opened
        for index in range(self._entries):
            if not run.wait_for(index, deadline):
                return
            raw = run.results[index]
            if index not in opened and type(raw) is bytes:
                try:
                    opened.setdefault(index, (True, codec.decode(raw)))
                except BaseException as error:
                    if issubclass(type(error), KeyboardInterrupt) and cause_of(error) is None:  # as in `_open`
                        raise
                    opened.setdefault(index, (False, error))

    def _collect(self) -> list[Any]:
        if self._error is not None:
            raise self._error
        results, opened = self._results, self._opened
        values: list[Any] = []
        extend, append = values.extend, values.append
        decode, chunked = codec.decode, self._chunksize > 1
        following = 0
        while following < self._entries:
            value: Any
            index, following = following, following + 1
            if index in opened:
                success, value = opened[index]
                if not success:
                    raise value
            else:
                raw = results[index]
                if type(raw) is Many:
                    extend(raw.values())
                    following += raw.length - 1
                    continue
                value = decode(raw) if type(raw) is bytes else open_entry(raw)
            if chunked:
                extend(value)
            else:
                append(value)
        return values

    def _release(self) -> None:
        self._run, self._results, self._opened = None, {}, {}
        if self._dropped is not None:
            self._dropped.cancel()


def _elements(done: int, entries: int, total: int) -> int:
    return total if done >= entries else done * total // entries


class IMapIterator(stdlib.IMapIterator):  # type: ignore[type-arg]
    """The results of `imap` or `imap_unordered` one by one; `next(timeout)` in seconds.

    An element's exception is raised in its place and does not end the iteration. An error of the input comes after
    the results of what was taken before it. May be shared by threads.

    Example: `it = pool.imap(abs, itertools.count()); it.next(timeout=5)`
    """

    def __init__(self, pool: Any, feed: Feed, callbacks: Callbacks, bar: Progress | None) -> None:
        # The base is not initialised on purpose: it registers with a stdlib pool's cache.
        self._pool = pool  # a pool with an unfinished iterator is in use
        self._feed = feed
        self._dropped = WhenDropped(feed.abandon)
        self._callbacks = callbacks
        self._bar = bar
        self._lock = threading.RLock()  # one consumer at a time; re-entrant: the input may (wrongly) ask for results

    def __iter__(self) -> Self:
        return self

    def next(self, timeout: float | None = None) -> Any:
        """The next result; `multiprocessing.TimeoutError` after `timeout` seconds, `StopIteration` at the end."""
        deadline = deadline_after(timeout)
        self._callbacks.give_way()
        if not self._lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            raise multiprocessing.TimeoutError
        try:
            raw = self._next_raw(deadline)
        finally:
            self._lock.release()
        try:
            return open_entry(raw)
        except PoolTerminated as error:
            park_at_exit(error, self._callbacks.scheduler)
            raise

    __next__ = next

    def _next_raw(self, deadline: float | None) -> Any:
        feed = self._feed
        feed.consumed = True
        run = feed.run
        while not self._is_ready():
            if feed.finished:
                self._end()
            feed.go_on()
            if not run.wait_until(self._may_go_on, deadline):
                raise multiprocessing.TimeoutError
        feed.delivered += 1  # first: an interrupt behind what takes it out must not make us wait for it for ever
        index = feed.delivered - 1 if run.ready is None else run.ready.popleft()
        raw = run.results.pop(index)
        feed.go_on()
        if self._bar is not None:
            self._bar.update()
        return raw

    def _is_ready(self) -> bool:
        run = self._feed.run
        return bool(run.ready) if run.ready is not None else self._feed.delivered in run.results

    def _may_go_on(self) -> bool:
        return self._is_ready() or self._feed.finished

    def _end(self) -> None:
        self._dropped.cancel()  # all that was fed has been delivered
        self._pool = None
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()
        error, self._feed.error = self._feed.error, None
        if error is not None:
            raise error
        raise StopIteration


class IMapUnorderedIterator(IMapIterator, stdlib.IMapUnorderedIterator):  # type: ignore[type-arg]
    """The results of `imap_unordered` as they come; see `IMapIterator`."""


__all__ = ["ApplyResult", "AsyncResult", "IMapIterator", "IMapUnorderedIterator", "MapResult"]
