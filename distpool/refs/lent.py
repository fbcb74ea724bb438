"""Values that brought references along and are never opened (layer 4).

    message with a value -> received() -> Outcome, or Lent if it may carry references
    opened (`Future.result`, ...)   the references are objects here now, and go back when those go
    dropped unread                  Lent.__del__ -> deque -> library thread: `references_in` -> made, and dropped

Whoever sends references has told their owners that we hold them. Opening a value only for that would run the user's
code for something that nobody wanted; so it is read by an unpickler that knows our references and nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

from distpool.node import node as nodes
from distpool.refs.refs import Outcome
from distpool.wire.messages import VALUE

_MAKERS = b"distpool.refs."
_REAL = frozenset({("distpool.refs.remote", "arrive_future"), ("distpool.refs.channels", "arrive_channel")})


def carries_references(data: Any) -> bool:
    """Whether a pickle may hold references; never False for one that does, because it names the module that makes them.

    References are lent to whom a message goes to. Who passes it on without opening it would keep its own for ever, and
    the next one would give back what it was never lent.
    """
    return _MAKERS in data


class Lent(Outcome):
    """The outcome of a call, with references that were lent to this process. Whoever wants its buffers opens it."""

    opened: bool
    refs: Any

    @property
    def buffers(self) -> Any:
        """The buffers of the value, for whoever decodes it now."""
        self.opened = True
        return self[2]

    def __del__(self) -> None:
        if not self.opened:
            self.refs.unread(self[1], self[2])  # only atomic operations: this runs in any thread, at any moment


def received(status: int, data: Any, buffers: Any, pid: int) -> Outcome:
    """The outcome that a message from elsewhere has brought (leader)."""
    if status != VALUE or not carries_references(data):  # errors carry references too rarely to be lent them
        return Outcome(status, data, buffers, pid)
    outcome = Lent(status, data, buffers, pid)
    outcome.opened = False
    outcome.refs = nodes.current().references()
    return outcome


class _Anything(type):
    """The class of `_Nothing`, which can be filled like a mapping."""

    def __setitem__(cls, key: Any, value: Any) -> None:
        pass


class _Nothing(metaclass=_Anything):
    """Stands for every class, function and object of a pickle but references: itself, whatever is made of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls

    @staticmethod
    def _ignore(*args: Any) -> None:
        pass

    append = extend = add = update = __setstate__ = _ignore


class _Finder(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REAL:
            return super().find_class(module, name)
        return _Nothing


def references_in(data: Any, buffers: Sequence[Any]) -> Any:
    """The value with nothing but its references: an object that keeps them. Not on the leader."""
    return _Finder(io.BytesIO(data), buffers=buffers).load()


__all__ = ["Lent", "carries_references", "received", "references_in"]
