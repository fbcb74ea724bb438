"""Options of executor views: checked, and made into a `Policy` (layer 7)."""

from __future__ import annotations

from typing import Any

from distpool.work import Policy


def make_policy(base: Policy | None, **changes: Any) -> Policy | None:
    """`base` with `changes`, checked; `None` if that needs no treatment at all."""
    values = {name: getattr(base or Policy(), name) for name in Policy._fields}
    unknown = set(changes) - set(values)
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    values.update(changes)
    timeout, retries, delays, pids = (values[name] for name in ("timeout", "retries", "retry_delays", "pids"))
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {type(timeout).__name__}")
    if timeout is not None and timeout <= 0:
        raise ValueError("timeout must be greater than 0")
    if isinstance(retries, bool) or not isinstance(retries, int):
        raise TypeError(f"retries must be an int, not {type(retries).__name__}")
    if retries < 0:
        raise ValueError("retries must be >= 0")
    if delays is not None:
        values["retry_delays"] = delays = tuple(float(delay) for delay in delays)
        if not retries and "retries" not in changes:
            values["retries"] = len(delays)
    if pids is not None:
        values["pids"] = frozenset([pids] if isinstance(pids, int) else pids)
    check = values["retry_check"]
    if check is not None and not (callable(check) or isinstance(check, tuple)):
        raise TypeError("retry_check must be an exception type, a tuple of them, or a callable")
    policy = Policy(**values)
    return None if policy == Policy() else policy
