"""Options of executor views and of `pmap`: checked, and made into a `Policy` (layer 7)."""

from __future__ import annotations

import itertools
import math

from distpool.config import as_int
from distpool.hints import Any
from distpool.work import Policy

#: Of an iterable of delays that may be endless no more are taken, if `retries` does not say how many are wanted.
_MOST_DELAYS = 100_000


def make_policy(base: Policy | None, **changes: Any) -> Policy | None:
    """`base` with `changes`, checked; `None` if that needs no treatment at all. A change to None is none."""
    values = {name: getattr(base or Policy(), name) for name in Policy._fields}
    unknown = set(changes) - set(values)
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    changes = {name: value for name, value in changes.items() if value is not None}
    values.update(changes)
    values["retries"], values["timeout"] = as_int(values["retries"]), as_int(values["timeout"])
    timeout, retries, delays, pids = (values[name] for name in ("timeout", "retries", "retry_delays", "pids"))
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {type(timeout).__name__}")
    if timeout is not None and not timeout > 0:
        raise ValueError("timeout must be greater than 0")
    if timeout == math.inf:
        values["timeout"] = None
    if isinstance(retries, bool) or not isinstance(retries, int):
        raise TypeError(f"retries must be an int, not {type(retries).__name__}")
    if retries < 0:
        raise ValueError("retries must be >= 0")
    if delays is not None:
        counted = bool(retries) or "retries" in changes
        if not hasattr(delays, "__iter__"):
            raise TypeError(f"retry_delays must be an iterable of seconds, not {type(delays).__name__}")
        most = None if hasattr(delays, "__len__") else retries if counted else _MOST_DELAYS
        taken = itertools.islice(delays, most)
        values["retry_delays"] = delays = tuple(check_delay(delay) for delay in taken)
        if not counted:
            values["retries"] = len(delays)
    if pids is not None:
        pids = as_int(pids)
        values["pids"] = pids = frozenset([pids] if isinstance(pids, int) else map(as_int, pids))
        if not all(isinstance(pid, int) for pid in pids):
            raise TypeError("pids must be the number of a worker, or several")
    check_retry_check(values["retry_check"])
    if not isinstance(values["label"], str | None):
        raise TypeError(f"label must be a text, not {type(values['label']).__name__}")
    policy = Policy(**values)
    return None if policy == Policy() else policy


def check_retry_check(check: Any) -> None:
    """TypeError for what `retry_check=` may not be."""
    if check is None:
        return
    types = check if isinstance(check, tuple) else (check,) if isinstance(check, type) else ()
    if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in types) or not (
        callable(check) or isinstance(check, tuple)
    ):
        raise TypeError("retry_check must be an exception type, a tuple of them, or callable(exc) -> bool")


def check_delay(delay: Any) -> float:
    """An item of `retry_delays=`, in seconds; TypeError or ValueError if it is none."""
    try:
        seconds = float(delay)
    except (TypeError, ValueError):
        raise TypeError(f"retry_delays must be numbers of seconds, not {delay!r}") from None
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"retry_delays must be non-negative and finite, not {delay!r}")
    return seconds
