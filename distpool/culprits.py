"""Calls at whose arrival worker after worker ends (layer 7).

A worker may end while it receives an argument, because that is larger than the memory it may have: nothing has begun
then, so the call is put back as any other that has not begun. If nobody counted, it would end one worker after another
for ever, and what stands behind it would never run.
"""

from __future__ import annotations

from distpool import errors
from distpool.hints import Any
from distpool.work import Call

_MOST = 5  # workers: that somebody kills as many at just that moment is no likely case


def take_out(unfinished: list[tuple[Any, int, int, bool]]) -> tuple[Any, int] | None:
    """A worker has ended and left these (`Slot.unfinished`): if nothing had begun, the first one is under suspicion.
    Entry and element of that, taken out of the list, when it has been so too often; else None. Scheduler's lock held.
    """
    if not unfinished or any(ran for *_, ran in unfinished):
        return None
    entry, index, count, _ = unfinished[0]
    # On what lives as long as it: the entries of a map are made anew each time that they are sent.
    holder, key = (entry.future, 0) if type(entry) is Call else (entry.run, entry.index + index)
    ends: dict[int, int] = holder.__dict__.setdefault("_ends", {})
    ends[key] = ends.get(key, 0) + 1
    if ends[key] < _MOST:
        return None
    unfinished[0:1] = [(entry, index + 1, count - 1, False)] if count > 1 else []
    return entry, index


def explained(error: BaseException) -> BaseException:
    """`error`, of the worker that ended last, as that of the call."""
    if not isinstance(error, errors.ProcessExitedException):
        return error
    why = f"{_MOST} workers have ended when this call came, before it began: it may need more memory than they have"
    reason = f"{error.reason}; {why}" if error.reason else why
    return errors.ProcessExitedException(error.worker_id, error.exitcode, False, error.output, reason)


__all__ = ["explained", "take_out"]
