"""How a call ended, still serialised, and what becomes of that (layer 4).

    scheduler, owner's table -> Outcome -> Future._raw --result()--> open_outcome -> (value, None) or (None, error)
                                                       --repr()----> ending       -> "returned int", "raised KeyError"

Opening runs user code: in the thread that wants the value, and never on the leader.
"""

from __future__ import annotations

from collections.abc import Callable

from distpool.hints import Any, NamedTuple
from distpool.wire import codec
from distpool.wire.failures import decode_exception, failure_info
from distpool.wire.messages import ERROR, UNLOADABLE, UNSENDABLE, VALUE


class Outcome(NamedTuple):
    """How a call ended, still serialised: `status` is VALUE, ERROR or UNSENDABLE (messages), or RAISED_HERE."""

    status: int
    data: Any  # bytes; the exception itself for RAISED_HERE
    buffers: Any  # out-of-band buffers of the value
    pid: int  # where it ended

    @property
    def failure(self) -> Any:
        """`data`, for whoever rebuilds the error now."""
        return self[1]


#: `Outcome.data` is an exception of this process, or a value of it; the outcome, good or bad, is still at its owner.
RAISED_HERE, LOCAL_VALUE, REMOTE_VALUE, REMOTE_ERROR = -1, -2, -3, -4
VALUES = (VALUE, LOCAL_VALUE, REMOTE_VALUE)


def open_outcome(raw: Any, cause: Callable[[str], BaseException] | None = None) -> tuple[Any, BaseException | None]:
    """`(value, None)` or `(None, exception)`; a value that cannot be rebuilt here is an exception as well."""
    if raw.status == VALUE:
        try:
            return codec.decode(raw.data, raw.buffers) if type(raw) is Outcome else raw.decoded(), None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return None, error
    if raw.status == RAISED_HERE:
        return None, raw.data
    if raw.status == LOCAL_VALUE:
        return raw.data, None
    assert raw.status in (ERROR, UNSENDABLE, UNLOADABLE)
    return None, decode_exception(raw.failure, raw.pid, cause)


def ending(raw: Any) -> str:
    """What the repr of a future says of this outcome, which nobody has opened: as much as can be told without."""
    if raw.status in VALUES:
        known = raw.status == LOCAL_VALUE
        return f"returned {type(raw.data).__name__}" if known else "returned a value, not yet read"
    if raw.status == RAISED_HERE:
        return f"raised {type(raw.data).__name__}"
    if type(raw) is Outcome and raw.status in _FAILURES:
        return f"raised {failure_info(raw.data).type_name.rpartition('.')[2]}"
    return "raised an error, not yet read"


_FAILURES = (ERROR, UNSENDABLE, UNLOADABLE)

__all__ = [
    "LOCAL_VALUE", "RAISED_HERE", "REMOTE_ERROR", "REMOTE_VALUE", "VALUES", "Outcome", "ending", "open_outcome",
]  # fmt: skip
