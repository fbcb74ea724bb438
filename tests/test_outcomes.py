"""How a call ended: what opening it gives, and what can be said of it without."""

from __future__ import annotations

from typing import Any

import pytest

from distpool.refs.outcomes import LOCAL_VALUE, RAISED_HERE, REMOTE_ERROR, REMOTE_VALUE, Outcome, ending, open_outcome
from distpool.wire import codec
from distpool.wire.failures import encode_exception
from distpool.wire.messages import ERROR, UNLOADABLE, UNSENDABLE, VALUE


class Alarm:
    """Raises when it is unpickled."""

    def __reduce__(self) -> Any:
        return divmod, (1, 0)


def test_opening() -> None:
    assert open_outcome(Outcome(VALUE, *codec.encode([1]), 2)) == ([1], None)
    assert open_outcome(Outcome(LOCAL_VALUE, 3, (), 2)) == (3, None)
    error = KeyError("x")
    assert open_outcome(Outcome(RAISED_HERE, error, (), 1)) == (None, error)
    value, found = open_outcome(Outcome(VALUE, *codec.encode(Alarm()), 2))
    assert value is None and type(found) is ZeroDivisionError
    for status in (ERROR, UNSENDABLE, UNLOADABLE):
        value, found = open_outcome(Outcome(status, encode_exception(error), (), 2))
        assert value is None and type(found) is KeyError and found.args == ("x",)


class OwnError(Exception):
    def __reduce__(self) -> Any:
        return divmod, (1, 0)


@pytest.mark.parametrize(
    ("status", "data", "text"),
    [
        (LOCAL_VALUE, 3, "returned int"),
        (VALUE, codec.encode(Alarm())[0], "returned a value, not yet read"),
        (REMOTE_VALUE, b"", "returned a value, not yet read"),
        (REMOTE_ERROR, b"", "raised an error, not yet read"),
        (RAISED_HERE, OwnError(), "raised OwnError"),
        (ERROR, encode_exception(OwnError()), "raised OwnError"),
        (UNSENDABLE, encode_exception(KeyError()), "raised KeyError"),
    ],
)
def test_what_can_be_told_unopened(status: int, data: Any, text: str) -> None:
    assert ending(Outcome(status, data, (), 2)) == text
