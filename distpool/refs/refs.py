"""`Future`: a `concurrent.futures.Future` that costs next to nothing until somebody needs more (layer 4).

    scheduler (leader thread)  --_settle(outcome)-->  Future  <--result(), wait, callbacks, await--  user threads

The standard library's Future makes a Condition and three lists when it is born and takes a lock at each step (3.3 us).
This one is born empty; `_condition`, `_waiters`, `_done_callbacks` come into being when they are first touched
(`__getattr__`), so that `wait`, `as_completed` and `asyncio.wrap_future`, which reach into them, work.

Who has to see whom: the settler first writes `_state`, then looks whether anybody sleeps; a sleeper first registers,
then looks at `_state`. Whatever the order, one of them sees the other. Callbacks are taken with `pop`, which is atomic,
so each runs exactly once. Where a Condition exists, the state changes under it, as the standard library's waiters
expect (tried: state first, waiters notified later: `as_completed` then saw a future twice).

The value stays serialised (`_raw`) until somebody asks: decoding runs user code, which must not run on the leader, and
whoever never asks never pays.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import _base
from contextlib import AbstractContextManager

from distpool.config import deadline_after
from distpool.hints import TYPE_CHECKING, Any, Protocol, T
from distpool.logs import Log
from distpool.node import node as nodes
from distpool.refs.conditions import HOLDERS, take
from distpool.refs.finalized import dead_handle, end_waits, refuse_uses
from distpool.refs.outcomes import LOCAL_VALUE as LOCAL_VALUE
from distpool.refs.outcomes import RAISED_HERE as RAISED_HERE
from distpool.refs.outcomes import REMOTE_ERROR as REMOTE_ERROR
from distpool.refs.outcomes import REMOTE_VALUE as REMOTE_VALUE
from distpool.refs.outcomes import VALUES, ending
from distpool.refs.outcomes import Outcome as Outcome
from distpool.refs.outcomes import open_outcome as open_outcome
from distpool.refs.waiters import Waiters
from distpool.wire.messages import VALUE

log = Log("futures")

if TYPE_CHECKING:
    from distpool.transport.ioloop import IoLoop

PENDING: str = _base.PENDING
RUNNING: str = _base.RUNNING
CANCELLED: str = _base.CANCELLED
CANCELLED_AND_NOTIFIED: str = _base.CANCELLED_AND_NOTIFIED
FINISHED: str = _base.FINISHED
_DONE = (FINISHED, CANCELLED_AND_NOTIFIED, CANCELLED)

#: Makes "no condition, so set the state" one step against "make the condition". Reentrant: the collector (since 3.12),
#: and so a user's `__del__`, and a signal handler may run between two bytecodes under it.
_settling = threading.RLock()


def _after_fork_in_child() -> None:
    global _settling
    _settling = threading.RLock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class PendingCall(Protocol):
    """What a future needs of the call behind it while that is pending."""

    @property
    def loop(self) -> IoLoop | None:
        """The loop whose leader settles the future."""

    @property
    def brisk(self) -> bool:
        """Whether the call is the only one, so that whoever waits for it may look for a moment before sleeping."""

    def cancel(self) -> bool:
        """Recall the call; True if it will not run."""

    def started(self) -> bool:
        """Whether the call is known to have left the queue."""

    def waiting(self) -> AbstractContextManager[object]:
        """Entered by a thread that waits for this call (inside tasks: gives the slot away)."""


class Future(concurrent.futures.Future[T]):
    """The pending result of a call: a `concurrent.futures.Future` in every respect, also awaitable.

    `result(timeout=None)` gives the value or raises what the call raised (the worker's traceback text as
    `__cause__`), `TimeoutError` after `timeout` seconds. `cancel()` is True only for a call that has not started.

    Example: `future = executor.submit(pow, 2, 10); assert future.result() == 1024`
    """

    _state = PENDING
    _raw: Outcome | None = None
    _result: Any = None
    _exception: BaseException | None = None
    _call: PendingCall | None = None
    _cause: Callable[[str], BaseException] | None = None

    #: Whether somebody has asked for more than the plain future (`__getattr__`) or wants to hear of its end. Set before
    #: anything is registered, and read again after the state was written (see above).
    _watched = False
    _handle: Any = None  # what makes it a remote reference: on first need (`where`, `id`, sending it)
    _finalized = False
    #: Whether this process does not open the value, but sends it on as it came.
    passes_on = False
    _on_settled: Callable[[Outcome], object] | None = None

    def __new__(cls, pid: Any = None, *rest: Any) -> Any:
        if pid is not None and cls is Future:
            return nodes.current().references().new_future(pid)
        return object.__new__(cls)

    def __init__(self, pid: int | None = None) -> None:
        """Without the base's, deliberately: everything that it makes is made on first use."""

    def __getattr__(self, name: str) -> Any:
        call = self._call
        if call is not None and name in ("_condition", "_done_callbacks"):
            call.waiting()  # RuntimeError in a forked child: whoever is about to register would never hear of the end
        if name == "_condition":
            if call is not None and call.loop is not None:
                call.loop.hurry()  # somebody is about to wait without leading
            condition = threading.Condition()
            with _settling:
                self._watched = True
                return self.__dict__.setdefault(name, condition)
        if name == "_waiters":
            self._watched = True
            node = nodes.existing()
            in_task = node is not None and node.runner is not None
            return self.__dict__.setdefault(name, Waiters() if in_task else [])
        if name in ("_done_callbacks", "_sleepers"):
            self._watched = True
            return self.__dict__.setdefault(name, [])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # -- settling (leader thread, or whoever settles) ----------------------------------------------------------

    def _settle(self, raw: Outcome) -> bool:
        """Store the outcome and wake whoever waits. True if callbacks are left for a thread that may run user code."""
        return self._finish(FINISHED, raw) and bool(self.__dict__.get("_done_callbacks"))

    def _finish(self, state: str, raw: Outcome | None = None, result: Any = None, error: Any = None) -> bool:
        """Enter a final state and wake whoever waits; False if another thread was first, or a cancel is too late."""
        with _settling:
            condition = self.__dict__.get("_condition") if self._watched else None
            if condition is None and not self._enter(state, raw, result, error):
                return False
        if condition is not None:
            taken = take(condition)
            try:
                if not self._enter(state, raw, result, error):
                    return False
                self._wake_waiters(condition, taken)
            finally:
                if taken:
                    condition.release()
        call, self._call = self._call, None
        if self._watched:
            self._announce(told=condition is not None)
        if call is not None:
            loop = call.loop
            if loop is not None and not loop.leads:  # a waiter may lead: only a socket would bring it out of its poll
                loop.wake()
        return True

    def _announce(self, told: bool) -> None:
        """The state is final: wake who sleeps, tell who wanted to hear. `told`: waiters on the Condition know."""
        found = self.__dict__
        if not told and "_condition" in found:  # made while the state changed, by a finalizer or a signal handler
            taken = take(self._condition)
            try:
                self._wake_waiters(self._condition, taken)
            finally:
                if taken:
                    self._condition.release()
        if "_sleepers" in found:
            for sleeper in list(found["_sleepers"]):
                _release(sleeper)
        if "_on_settled" in found:
            self._report()

    def _enter(self, state: str, raw: Outcome | None, result: Any, error: Any) -> bool:
        if self._state in _DONE or (state is not FINISHED and self._state == RUNNING):
            return False
        if raw is not None:
            self._raw = raw
        else:
            self._result, self._exception = result, error
        self._state = state
        return True

    def _wake_waiters(self, condition: threading.Condition, taken: bool) -> None:
        for waiter in self._waiters:
            if self._state != FINISHED:
                waiter.add_cancelled(self)
            elif self._exception is not None or (self._raw is not None and self._raw.status not in VALUES):
                waiter.add_exception(self)
            else:
                waiter.add_result(self)
        if taken:
            condition.notify_all()

    def _run_callbacks(self) -> None:
        callbacks = self._done_callbacks
        while callbacks:
            try:
                callback = callbacks.pop(0)
            except IndexError:  # another thread took the last one
                return
            try:
                callback(self)
            except BaseException as error:
                log.exception("exception calling callback for %r", self)
                # Ctrl-C and sys.exit are for who may be told to end; elsewhere they would cost the other callbacks.
                if not issubclass(type(error), Exception) and nodes.may_be_struck():
                    raise

    # -- the public face ---------------------------------------------------------------------------------------

    def done(self) -> bool:
        """Whether the call has ended or was cancelled."""
        return self._state in _DONE

    @property
    def _is_over(self) -> bool:
        """As `done`, which a finalized future refuses."""
        return self._state in _DONE

    def running(self) -> bool:
        """Whether the call has been handed to a worker and has not ended."""
        call = self._call
        return self._state == RUNNING or (self._state == PENDING and call is not None and call.started())

    def cancelled(self) -> bool:
        """Whether the call was cancelled before it started."""
        return self._state in (CANCELLED, CANCELLED_AND_NOTIFIED)

    def cancel(self) -> bool:
        """Cancel the call if it has not started (it is recalled from the worker if it was sent ahead)."""
        if self._state in _DONE:
            return self._state is not FINISHED
        call = self._call
        if (not call.cancel()) if call is not None else self._state == RUNNING:
            return False
        if not self._finish(CANCELLED_AND_NOTIFIED):
            return self._state is not FINISHED
        self._after_finish(call)
        return True

    def _after_finish(self, call: PendingCall | None) -> None:
        """For those who end a future on any thread: the leader does not see it before it comes out of its poll."""
        if call is not None and call.loop is not None:
            call.loop.wake()
        if self.__dict__.get("_done_callbacks"):
            self._run_callbacks()

    def result(self, timeout: float | None = None) -> T:
        """The value; raises the call's exception, `CancelledError`, or `TimeoutError` after `timeout` seconds."""
        if self._state not in _DONE and not self._await(timeout):
            raise TimeoutError
        try:
            if self._state != FINISHED:
                raise concurrent.futures.CancelledError
            if self._raw is not None:
                self._decode()
            if self._exception is not None:
                raise self._exception
            return self._result  # type: ignore[no-any-return]
        finally:
            self = None  # type: ignore[assignment]  # break the cycle exception -> traceback -> frame -> future

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The exception that the call raised, or `None`; `CancelledError` and `TimeoutError` as for `result`."""
        if self._state not in _DONE and not self._await(timeout):
            raise TimeoutError
        if self._state != FINISHED:
            raise concurrent.futures.CancelledError
        if self._raw is not None:
            self._decode()
        return self._exception

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call `fn(self)` when the future is done: on a library thread, or here and now if it is done already."""
        self._done_callbacks.append(fn)
        call = self._call
        if self._state in _DONE:
            self._run_callbacks()
        elif call is not None and call.loop is not None:
            call.loop.hurry()

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio  # not before somebody awaits: it is a heavy import

        node = nodes.existing()
        with contextlib.nullcontext() if node is None or self._state in _DONE else node.given_away():
            return (yield from asyncio.wrap_future(self).__await__())

    def __repr__(self) -> str:
        """As the standard library's, without a Condition: to look at a future costs nothing afterwards."""
        state, raw = self._state, self._raw
        if state == FINISHED:
            error = self._exception
            how = f"raised {type(error).__name__}" if error is not None else f"returned {type(self._result).__name__}"
            shown = f"finished {how if raw is None else ending(raw)}"
        else:
            shown = "cancelled" if state in _DONE else "running" if Future.running(self) else "pending"
        return f"<{type(self).__name__} at {id(self):#x} state={shown}>"

    # -- as a remote reference (Julia's verbs) -----------------------------------------------------------------

    @property
    def where(self) -> int:
        """Pid of the process that owns the value (0: a dead handle)."""
        return int(self._reference().where)

    @property
    def whence(self) -> int:
        """Pid of the process that made the reference."""
        return int(self._reference().rrid.whence)

    @property
    def id(self) -> int:
        """Number of the reference at `whence`."""
        return int(self._reference().rrid.id)

    def _reference(self) -> Any:
        return nodes.current().references().adopt(self)

    def _report(self) -> None:
        """Tell the owner's table how it ended."""
        hook = self.__dict__.pop("_on_settled", None)
        if hook is not None:
            hook(self.outcome())

    def outcome(self) -> Outcome:
        """How it ended, for the owner's table."""
        if self._raw is not None:
            return self._raw
        error = self._exception if self._state == FINISHED else concurrent.futures.CancelledError()
        if error is not None:
            return Outcome(RAISED_HERE, error, (), nodes.current().pid)
        return Outcome(LOCAL_VALUE, self._result, (), nodes.current().pid)

    @property
    def travels_with_value(self) -> bool:
        """Whether the value is here, so that it goes along when the reference is sent (Julia case C17)."""
        raw = self._raw
        return self._state == FINISHED and (
            self._exception is None if raw is None else raw.status in (VALUE, LOCAL_VALUE)
        )

    def fetch(self, timeout: float | None = None) -> T:
        """As `result`."""
        try:
            return self.result(timeout)
        finally:
            del self  # see `result`

    def isready(self) -> bool:
        """Whether it has ended."""
        return self.done()

    def wait(self, timeout: float | None = None) -> Future[T]:
        """Wait until it has ended and return it; raises its exception if it failed, TimeoutError after `timeout`."""
        try:
            if self.exception(timeout) is not None:
                self.result()
            return self
        finally:
            del self  # see `result`

    def put(self, value: T) -> Future[T]:
        """Set the value, once; RuntimeError the second time, or if a call will set it."""
        if self._state != PENDING or self._call is not None or not self._finish(FINISHED, None, value):
            raise RuntimeError("Future can be set only once")
        self._after_finish(None)
        return self

    def finalize(self) -> None:
        """Give the reference back now; any later use raises RuntimeError. May be called again."""
        refuse_uses(self)
        if self._handle is not None:
            self._handle = self._handle.given_back(self)
        end_waits(self)

    # -- the stdlib's own way to fill a future -----------------------------------------------------------------

    def set_running_or_notify_cancel(self) -> bool:
        """As in the standard library: for code that fills futures itself."""
        if self.cancelled():
            return False
        with self._condition:
            if self._state != PENDING:
                raise RuntimeError("Future in unexpected state")
            self._state = RUNNING
        return True

    def set_result(self, result: T) -> None:
        """Give the future its value; `InvalidStateError` if it is done."""
        self._set(result, None)

    def set_exception(self, exception: BaseException | None) -> None:
        """Let the future fail; `InvalidStateError` if it is done."""
        self._set(None, exception)

    def _set(self, result: Any, exception: BaseException | None) -> None:
        call = self._call
        if not self._finish(FINISHED, None, result, exception):
            raise concurrent.futures.InvalidStateError(f"{self._state}: {self!r}")
        self._after_finish(call)

    # -- waiting and decoding (user threads) -------------------------------------------------------------------

    def _await(self, timeout: float | None) -> bool:
        """Wait until done; False after `timeout` seconds."""
        deadline = None if timeout is None else deadline_after(timeout)
        call = self._call
        if call is None or call.loop is None:
            node = nodes.existing()
            return self._sleep(deadline, None if node is None else node.loop)
        call.loop.check_wait()
        with call.waiting():
            if call.loop.lead(lambda: self._state in _DONE, deadline, call.brisk):
                return self._state in _DONE
            return self._sleep(deadline, call.loop)

    def _sleep(self, deadline: float | None, loop: IoLoop | None) -> bool:
        sleeper = threading.Lock()
        sleeper.acquire()
        (sleepers := self._sleepers).append(sleeper)
        try:
            with contextlib.nullcontext() if loop is None else loop.following(lambda: _release(sleeper)):
                if self._state not in _DONE:
                    sleeper.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic()))
        finally:
            sleepers.remove(sleeper)
        return self._state in _DONE

    def _decode(self) -> None:
        """Turn `_raw` into the value or exception, once. A lock of each future: decoding runs user code."""
        lock: Any = self.__dict__.setdefault("_decoding", threading.RLock())
        if lock._is_owned():  # twice would be to give back its references twice
            raise RuntimeError("this value is just being opened, by this very thread: a finalizer cannot have it")
        with lock:
            raw = self._raw
            if raw is None:
                return
            self._result, self._exception = self._open(raw)
            self._raw = None

    def _open(self, raw: Outcome) -> tuple[Any, BaseException | None]:
        return open_outcome(raw, self._cause)

    def __reduce__(self) -> Any:
        return dead_handle, ()


HOLDERS.update((Future._finish.__code__, Future._announce.__code__))


def _release(sleeper: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # an interrupt may have done so already
        sleeper.release()


def set_values(futures: list[Future[Any]], values: list[Any]) -> list[int]:
    """Give plain futures their values, all under one lock. Leader.

    Returns the indices of those that have to be settled one by one: somebody waits on their Condition, or they have a
    `_settle` of their own, or have ended.
    """
    others: list[int] = []
    late: list[Future[Any]] = []
    with _settling:
        for index, future in enumerate(futures):
            if future._watched or future._state is not PENDING:
                others.append(index)
                continue
            future._result = values[index]
            future._state = FINISHED
            future._call = None
            if future._watched:
                late.append(future)
    for future in late:  # somebody came in that moment; callbacks are run by whoever added them: it saw the state
        future._announce(told=False)
    return others
