"""Values and errors that brought references along (layer 4).

    message with an outcome -> received() -> Outcome, or Lent if it may carry references
    opened (`Future.result`, ...)   the references are objects here now, and go back when those go
    dropped unread                  Lent.__del__ -> deque -> library thread: `references_in` -> made, and dropped
    outcomes inside of a value      `parcel` -> in the message -> `received` there, each for itself
    errors that their owner keeps   Stored: serialised once, its references are lent to each who asks
    what cannot be opened           `_decode`: as if it had not been tried, so it may be tried again, or dropped

Whoever sends references has told their owners that we hold them. Opening a value only for that would run the user's
code for something that nobody wanted; so it is read by an unpickler that knows our references and nothing else.
"""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable, Sequence

from distpool.hints import Any
from distpool.node import node as nodes
from distpool.refs.refs import Outcome
from distpool.wire import codec, failures
from distpool.wire.failures import failure_info
from distpool.wire.messages import ERROR, UNLOADABLE, UNSENDABLE, VALUE

_REAL = frozenset(
    {
        ("distpool.refs.travel", "arrive_future"),
        ("distpool.refs.channels", "arrive_channel"),
        ("distpool.refs.lent", "received"),  # what a parcel becomes: dropped in turn
    }
)
_ERRORS = (ERROR, UNSENDABLE, UNLOADABLE)


def carries_references(data: Any) -> bool:
    """Whether a pickle may hold references; never False for one that does, because it names the module that makes them.

    References are lent to whom a message goes to. Who passes it on without opening it would keep its own for ever, and
    the next one would give back what it was never lent.
    """
    return codec.REFERENCES in data


class Lent(Outcome):
    """The outcome of a call, with references that were lent to this process. Whoever wants its buffers, or the error
    itself, opens it."""

    opened: bool
    refs: Any

    @property
    def buffers(self) -> Any:
        """The buffers of the value, for whoever decodes it now."""
        self.opened = True
        return self[2]

    @property
    def failure(self) -> Any:
        """The error, for whoever rebuilds it now."""
        self.opened = True
        return self[1]

    def decoded(self) -> Any:
        self.opened = True
        try:
            return _decode(codec.decode, self[1], self[2])[0]
        except BaseException:
            self.opened = False  # Ctrl-C: the next one opens it. Else it is dropped
            raise

    def __del__(self) -> None:
        if not self.opened:
            self.refs.unread(*self[:3])  # only atomic operations: this runs in any thread, at any moment


class Stored(Outcome):
    """An error that this process keeps for whoever asks, serialised once: it keeps neither the error's traceback nor
    the frames behind it. `references` (what `codec` has noted) live here as objects as long as it does."""

    references: list[Any]
    refs: Any

    def lend(self, pid: int) -> None:
        """Before it is sent to `pid`."""
        if self.references:
            self.refs.lend(self.references, pid)

    @property
    def failure(self) -> Any:
        """The error, for whoever rebuilds it in this process: that makes references as if it had come from afar."""
        self.lend(self.refs.node.pid)
        return self[1]


def stored(data: bytes, references: list[Any], pid: int) -> Stored:
    """The outcome of a call on process `pid`, this one, that has failed."""
    outcome = Stored(ERROR, data, (), pid)
    outcome.references = references
    outcome.refs = nodes.current().references()
    return outcome


# -- opening ---------------------------------------------------------------------------------------------------------


class _Arrivals(threading.local):
    """What has arrived in the calling thread's message so far."""

    noted: list[Any] | None = None


#: What makes something of a message adds its handle, or the outcome, to `noted`: by `+=` in the very line behind that
#: in which it begins to count, so that no Ctrl-C comes between the two (it comes behind calls and backward jumps).
arrivals = _Arrivals()


def _decode(decode: Callable[[Any, Any], Any], data: Any, buffers: Any, anew: bool = False) -> tuple[Any, list[Any]]:
    """`decode(data, buffers)`, and the handles of what has arrived with it.

    What fails in the middle is as if it had not been tried: the references that had arrived go back as any others do,
    and count once more. `anew`: it has been opened before, so that its references count once more in any case.
    """
    before = arrivals.noted
    noted: list[Any] = []
    arrivals.noted = noted
    whole = False
    try:
        value = decode(data, buffers)
        whole = not anew
        return value, noted
    finally:
        arrivals.noted = before
        if not whole:
            _lend_again(noted)


def _lend_again(noted: list[Any]) -> None:
    if noted:
        handles = [arrived for arrived in noted if not isinstance(arrived, Lent)]
        nodes.current().references().lend_again(handles)
        for arrived in noted:
            if isinstance(arrived, Lent):
                arrived.opened = True
        noted.clear()  # the error's traceback has this list


def decode_lent(decode: Callable[[Any, Any], Any], data: Any, buffers: Any = ()) -> Any:
    """`decode(data, buffers)` of what may have brought references, once: if it fails, all of them go back."""
    if not carries_references(data):
        return decode(data, buffers)
    try:
        return _decode(decode, data, buffers)[0]
    except BaseException:
        give_back(data, buffers)
        raise


def give_back(data: Any, buffers: Any) -> None:
    """Nobody will open this: the references in it, if there are any, go back."""
    if carries_references(data):
        nodes.current().references().unread(VALUE, data, buffers)


def _load_error(payload: bytes) -> Any:
    return decode_lent(lambda data, buffers: pickle.loads(data), payload)


failures.load = _load_error


class Resident:
    """A function that stays on a worker as bytes, and is opened for each call, or never. Its references stay with it:
    each function that is made of it has counts of its own."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._refs = nodes.current().references()
        self._buffers: Any = ()
        self._first = [None]  # popped by whoever is the first one to open it
        self._handles: list[Any] | None = None  # with the counts that came along

    def open(self, decode: Callable[[Any, Any], Any], buffers: Any) -> Any:
        """`decode` of it."""
        self._buffers = buffers
        try:
            self._first.pop()
        except IndexError:
            return _decode(decode, self._data, buffers, anew=True)[0]
        try:
            value, self._handles = _decode(decode, self._data, buffers)
        except BaseException:
            self._first.append(None)
            raise
        return value

    def __del__(self) -> None:
        if self._handles is None:
            self._refs.unread(VALUE, self._data, self._buffers)  # only atomic operations


class _Parcel:
    """An outcome as part of a value."""

    def __init__(self, outcome: tuple[Any, ...]) -> None:
        self._outcome = outcome

    def __reduce__(self) -> Any:
        return received, self._outcome


def parcel(status: int, data: bytes, buffers: Sequence[Any], pid: int) -> Any:
    """What becomes the outcome in whatever process this is sent to, to which its references have been lent.

    Whoever drops the value that it is part of unread gives them back; those in bare bytes nobody would find.
    """
    return _Parcel((status, data, buffers, pid))


def received(status: int, data: Any, buffers: Any, pid: int) -> Outcome:
    """The outcome that a message from elsewhere has brought (leader; parts of values: who opens those)."""
    if status < 0 or not carries_references(data):  # negative: an object of this process
        return Outcome(status, data, buffers, pid)
    outcome = Lent(status, data, buffers, pid)
    outcome.opened = False
    noted = arrivals.noted
    outcome.refs = nodes.current().references()
    if noted is not None:
        noted += [outcome]
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


def references_in(status: int, data: Any, buffers: Sequence[Any]) -> Any:
    """The value or error with nothing but its references: an object that keeps them. Not on the leader."""
    if status in _ERRORS:
        data = failure_info(data).payload or pickle.dumps(None)
    return _Finder(io.BytesIO(data), buffers=buffers).load()


__all__ = [
    "Lent", "Resident", "Stored", "carries_references", "arrivals", "decode_lent", "give_back", "parcel",
    "received", "references_in", "stored",
]  # fmt: skip
