"""Futures that nobody stands behind any more: finalized, or out of a pickle of the user's (layer 4)."""

from __future__ import annotations

from concurrent.futures._base import FINISHED

from distpool.hints import Any, NoReturn
from distpool.node import node as nodes

FINALIZED = "this reference was finalized"

#: Its state can still be looked at, as that of a finalized `RemoteFuture`.
_USES = ("result", "exception", "fetch", "wait", "put", "isready", "add_done_callback")


def refuse_uses(future: Any) -> None:
    """Let any use of `future` raise RuntimeError.

    On the object and not in its class: `result` is too hot for a question that hardly any future answers with yes.
    """
    future.__dict__.update(dict.fromkeys(_USES, _refuse), _finalized=True)


def end_waits(future: Any) -> None:
    """Whoever waits in this process for a future that was made by hand hears of it. Other processes that have it may
    still set it, and wait for it."""
    if future._call is None and not future.done():
        future.__dict__.pop("_on_settled", None)
        if future._finish(FINISHED, None, None, RuntimeError(FINALIZED)):
            future._after_finish(None)


def _refuse(*arguments: object, **keywords: object) -> NoReturn:
    raise RuntimeError(FINALIZED)


def dead_handle() -> Any:
    """What a pickle made outside of a distpool message gives."""
    return nodes.current().references().dead_future()
