"""`culprits`: what ends the workers that it comes to is found, and what stands behind it runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from distpool.culprits import explained, take_out
from distpool.errors import ProcessExitedException
from distpool.refs.refs import Future
from distpool.work import Call


def call() -> Any:
    return Call(None, None, b"", [], Future(), None)  # type: ignore[arg-type]


def element(run: Any, index: int) -> Any:
    """Made anew each time that it is sent."""
    return SimpleNamespace(run=run, index=index)


def test_the_fifth_worker_is_the_last() -> None:
    culprit, behind = call(), call()
    for _ in range(4):
        left = [(culprit, 0, 1, False), (behind, 0, 1, False)]
        assert take_out(left) is None and len(left) == 2
    assert take_out(left) == (culprit, 0) and left == [(behind, 0, 1, False)]
    assert take_out(left) is None, "the next one has a count of its own"


def test_an_element_of_a_map_is_known_by_its_index() -> None:
    run = SimpleNamespace()
    for offset in (3, 2, 3, 1):  # spans are cut elsewhere each time
        left = [(element(run, 7 - offset), offset, 4, False)]
        assert take_out(left) is None
    left = [(element(run, 5), 2, 3, False)]
    entry = left[0][0]
    assert take_out(left) == (entry, 2) and left == [(entry, 3, 2, False)]


def test_where_something_ran_nothing_else_is_suspected() -> None:
    left = [(call(), 0, 1, False), (call(), 0, 1, True)]
    for _ in range(20):
        assert take_out(left) is None
    assert take_out([]) is None


def test_the_error_says_why() -> None:
    error = explained(ProcessExitedException(3, 1, False, "last words", "killed"))
    assert isinstance(error, ProcessExitedException) and error.maybe_ran is False and error.output == "last words"
    assert error.reason.startswith("killed; 5 workers have ended when this call came")
    assert "more memory" in str(explained(ProcessExitedException(3, 1, False)))


@pytest.mark.parametrize("error", [OSError("x"), RuntimeError()])
def test_other_errors_stay(error: Exception) -> None:
    assert explained(error) is error
