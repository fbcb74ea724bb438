"""Futures that nobody stands behind any more: finalized, or out of a pickle of the user's (layer 4)."""

from __future__ import annotations

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


def _refuse(*arguments: object, **keywords: object) -> NoReturn:
    raise RuntimeError(FINALIZED)


def dead_handle() -> Any:
    """What a pickle made outside of a distpool message gives."""
    return nodes.current().references().dead_future()
