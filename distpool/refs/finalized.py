"""Futures that nobody stands behind any more: finalized, or out of a pickle of the user's (layer 4)."""

from __future__ import annotations

import concurrent.futures
import sys
import threading
from concurrent.futures._base import FINISHED

from distpool.hints import Any, NoReturn
from distpool.node import node as nodes

FINALIZED = "this reference was finalized"
DEAD = "this is a dead handle: it was pickled outside of a distpool message"

_STATE = ("done", "running", "cancelled")
_USES = (*_STATE, "result", "exception", "fetch", "wait", "put", "isready", "add_done_callback")


def refuse_uses(future: Any) -> None:
    """Let any use of `future` raise RuntimeError.

    On the object and not in its class: `result` is too hot for a question that hardly any future answers with yes. So
    what the library itself has to know of any future, it asks by other names (`_is_over`).
    """
    future.__dict__.update(dict.fromkeys(_USES, _refuse), _finalized=True)
    _refuse_helpers(future, FINALIZED)


def refuse_state(future: Any, text: str) -> None:
    """The same for a RemoteFuture, whose other methods ask each time whether they may (`_usable`)."""

    def refuse() -> NoReturn:
        raise RuntimeError(text)

    future.__dict__.update(dict.fromkeys(_STATE, refuse))
    _refuse_helpers(future, text)


def _refuse_helpers(future: Any, text: str) -> None:
    """Let `concurrent.futures.wait` and `as_completed` raise RuntimeError, as they begin.

    They take `_condition` of all their futures, without arguments, one after the other, and have no way back if one of
    these takings fails: so the others are let go of here. (Tried: to raise in `_waiters`, where they hold all. They
    do not come there if each future has ended.) The library itself takes it with arguments, and whoever waits already
    by `with`.
    """
    future._watched = True
    condition: Any = future.__dict__.setdefault("_condition", threading.Condition())
    acquire = condition._lock.acquire

    def take(*arguments: Any, **keywords: Any) -> Any:
        if arguments or keywords:
            return acquire(*arguments, **keywords)
        frame = sys._getframe(1)
        taking = frame.f_locals.get("self") if frame.f_code is _ACQUIRING else None
        for other in getattr(taking, "futures", ()):
            if other is future:
                break
            other._condition.release()
        raise RuntimeError(text)

    condition.acquire = take


_ACQUIRING: Any = getattr(getattr(concurrent.futures._base, "_AcquireFutures", None), "__enter__", None)
_ACQUIRING = getattr(_ACQUIRING, "__code__", None)


def end_waits(future: Any) -> None:
    """Whoever waits in this process for a future that was made by hand hears of it. Other processes that have it may
    still set it, and wait for it."""
    if future._call is None and not future._is_over:
        future.__dict__.pop("_on_settled", None)
        if future._finish(FINISHED, None, None, RuntimeError(FINALIZED)):
            future._after_finish(None)


def _refuse(*arguments: object, **keywords: object) -> NoReturn:
    raise RuntimeError(FINALIZED)


def dead_handle() -> Any:
    """What a pickle made outside of a distpool message gives."""
    return nodes.current().references().dead_future()
