"""Options of executor views: what is given, what stays, and what is refused before anything runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from distpool.policy import make_policy
from distpool.work import Policy


def test_nothing_needs_no_treatment() -> None:
    assert make_policy(None) is None
    assert make_policy(Policy(timeout=3, retries=1), timeout=math.inf, retries=0) is None
    assert make_policy(Policy(), retries=0, pids=None, keep=False, label=None) is None
    full = Policy(3.0, 2, (0.1,), OSError, frozenset((2,)), True, "x")
    assert make_policy(full, **dict.fromkeys(Policy._fields)) == full, "None changes nothing"


def test_what_is_not_given_stays() -> None:
    base = make_policy(None, timeout=5, label="a")
    assert base == Policy(timeout=5, label="a")
    assert make_policy(base, retries=2) == Policy(timeout=5, label="a", retries=2)
    assert base == Policy(timeout=5, label="a")


def test_delays_are_numbers_and_mean_retries() -> None:
    assert make_policy(None, retry_delays=iter([1, "2"])) == Policy(retries=2, retry_delays=(1.0, 2.0))
    assert make_policy(None, retry_delays=[1, 2], retries=5) == Policy(retries=5, retry_delays=(1.0, 2.0))
    assert make_policy(None, retry_delays=[1, 2], retries=0) == Policy(retry_delays=(1.0, 2.0))
    assert make_policy(Policy(retries=3), retry_delays=[1]) == Policy(retries=3, retry_delays=(1.0,))


def test_numbers_of_numpy() -> None:
    policy = make_policy(None, timeout=np.int64(5), retries=np.int8(2))
    assert policy == Policy(timeout=5, retries=2) and type(policy.timeout) is int


def test_one_pid_or_several() -> None:
    assert make_policy(None, pids=4) == Policy(pids=frozenset([4]))
    assert make_policy(None, pids=(n for n in (2, 3, 2))) == Policy(pids=frozenset([2, 3]))


@pytest.mark.parametrize("check", [OSError, (OSError, KeyError), (), bool])
def test_checks(check: Any) -> None:
    check = (lambda error: True) if check is bool else check
    assert make_policy(None, retry_check=check) == Policy(retry_check=check)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"timeouts": 3}, TypeError, "'timeouts'"),
        ({"timeout": "3"}, TypeError, "timeout must be a number"),
        ({"timeout": True}, TypeError, "timeout must be a number"),
        ({"timeout": 0}, ValueError, "timeout must be greater than 0"),
        ({"timeout": -1.5}, ValueError, "timeout must be greater than 0"),
        ({"timeout": float("nan")}, ValueError, "timeout must be greater than 0"),
        ({"retries": 1.0}, TypeError, "retries must be an int"),
        ({"retries": True}, TypeError, "retries must be an int"),
        ({"retries": -1}, ValueError, "retries must be >= 0"),
        ({"retry_delays": 3}, TypeError, "an iterable of seconds"),
        ({"retry_delays": ["soon"]}, TypeError, "soon"),
        ({"retry_delays": [0, -1]}, ValueError, "non-negative and finite"),
        ({"retry_delays": [float("nan")]}, ValueError, "non-negative and finite"),
        ({"retry_delays": [float("inf")]}, ValueError, "non-negative and finite"),
        ({"retry_check": 3}, TypeError, "retry_check must be"),
        ({"retry_check": int}, TypeError, "retry_check must be"),
        ({"retry_check": (OSError, 3)}, TypeError, "retry_check must be"),
        ({"pids": 2.0}, TypeError, "not iterable"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make_policy(None, **options)
