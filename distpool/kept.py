"""Values that stay where they were computed: `executor.options(keep=True)` (layer 7).

    worker:  run_kept(fn, args) -> value becomes an owned entry, counted for pid 1 -> the call's result is its identity
    leader:  result -> KeptFuture._settle: a RemoteFuture that knows that its value is at its owner
    user:    result() / exception() -> the value is fetched, once;  where, sending it on, dropping it -> the reference

Errors are not kept: the call's exception arrives as that of any other executor call.
"""

from __future__ import annotations

import functools
import pickle
import time
from collections.abc import Callable
from typing import Any

from distpool.config import deadline_after
from distpool.errors import RemoteException, SerializationError
from distpool.node import node as nodes
from distpool.refs.owner import RRID
from distpool.refs.refs import LOCAL_VALUE, Future, Outcome
from distpool.refs.remote import RemoteFuture
from distpool.refs.travel import reduce_future
from distpool.wire import codec
from distpool.wire.functions import EncodedFunction, FunctionEncoder, function_name, unsendable
from distpool.wire.messages import VALUE


def run_kept(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[int, int]:
    """On a worker: call `fn`, keep its value for pid 1, and return the value's identity."""
    value = fn(*args, **kwargs)
    node = nodes.current()
    refs = node.references()
    rrid = refs.new_id()
    refs.owner.settle(refs.owner.touch(rrid, 1), Outcome(LOCAL_VALUE, value, (), node.pid))
    return tuple(rrid)


def encode_kept(encoder: FunctionEncoder, fn: Callable[..., Any]) -> EncodedFunction:
    """`fn`, to be run by `run_kept`: under its own name, which errors, statistics and traces show.

    Raises TypeError and SerializationError as `FunctionEncoder.encode` does.
    """
    if not callable(fn):
        raise TypeError(f"the function must be callable, not {type(fn).__name__}")
    try:
        function = encoder.encode(functools.partial(run_kept, fn))
    except SerializationError as error:  # its text is about the partial
        cause = error.__cause__ or error
        raise unsendable(fn, cause) from cause
    function.name = function_name(fn)
    return function


class KeptFuture(Future[Any]):
    """The future of a call whose value stays on its worker until `result()` or `exception()` asks for it.

    `where` is that worker once the call has ended. ProcessExitedException from `result()`: the worker has gone, and the
    value with it.
    """

    _watched = True  # it has a `_settle` of its own
    _kept: RemoteFuture | None = None
    _is_kept = False  # as a reference it is `_kept` itself; else it had been sent before its call ended

    def __init__(self, pid: int | None = None) -> None:
        super().__init__()
        self._refs: Any = nodes.current().references()

    def _settle(self, raw: Outcome) -> bool:
        """Leader. The two numbers of the identity are all that is unpickled here: no user code runs."""
        if raw.status == VALUE:
            whence, ident = pickle.loads(raw.data)
            kept = RemoteFuture.make(self._refs, RRID(whence, ident), raw.pid, 1, watched=True)
            kept.mark_remote()
            self._kept = kept  # if somebody has cancelled meanwhile, it goes with this object
            if self._handle is None:
                self._handle = kept._handle
                self._is_kept = True
        return super()._settle(raw)

    def result(self, timeout: float | None = None) -> Any:
        """The value, moved here by the first call; otherwise as any executor future's `result`."""
        self._bring(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The call's exception, or None; moves the value as `result` does."""
        self._bring(timeout)
        return super().exception(timeout)

    def _bring(self, timeout: float | None) -> None:
        deadline = deadline_after(timeout)
        if not self._is_over and not self._await(timeout):
            raise TimeoutError
        if self._kept is not None:
            self._kept._have(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _open(self, raw: Outcome) -> tuple[Any, BaseException | None]:
        kept = self._kept
        if kept is None:
            return super()._open(raw)
        error = kept.exception()
        if isinstance(error, RemoteException) and isinstance(error.captured.ex, SerializationError):
            # Fetched as Julia's calls fetch; but this is an executor's call, whose value cannot be sent.
            error = error.captured.ex.with_traceback(None)
        value = kept.result() if error is None else None
        self._follow(kept)
        return value, error

    def _follow(self, kept: RemoteFuture) -> None:
        """The value may not be needed from its worker any more: do not hold it there."""
        if self._is_kept:
            self._handle = kept._handle

    # -- as a reference ----------------------------------------------------------------------------------------

    @property
    def travels_with_value(self) -> bool:
        """Whether the value has been moved here."""
        return super().travels_with_value and (self._kept is None or self._raw is None)

    def isready(self) -> bool:
        """Whether the call has ended."""
        return self.done()

    def finalize(self) -> None:
        """Give the value back, unfetched; any later use raises RuntimeError."""
        if self._kept is not None:
            self._kept.finalize()
            self._follow(self._kept)
        super().finalize()

    def outcome(self) -> Outcome:
        """For those who were sent this future before its call had ended: they get the value, by way of this process."""
        if self._kept is None:
            return super().outcome()
        error = KeptFuture.exception(self)  # also if this object was finalized meanwhile
        return super().outcome() if error is not None else Outcome(LOCAL_VALUE, KeptFuture.result(self), (), 1)

    def _report(self) -> None:
        hook = self.__dict__.pop("_on_settled", None)
        if hook is not None:  # fetching waits: not on the leader
            nodes.current().deliver(lambda: hook(self.outcome()))


def _reduce(future: KeptFuture, peer: Any) -> tuple[Any, ...]:
    kept = future._kept
    return reduce_future(future if kept is None or future.travels_with_value else kept, peer)


codec.register_reducer(KeptFuture, _reduce)

__all__ = ["KeptFuture", "encode_kept", "run_kept"]
