"""Locks of futures that somebody has left behind (layer 4).

`concurrent.futures.wait` and `as_completed` take the Condition of each of their futures. They do it in Python, so what
a signal handler raises in between (Ctrl-C, a limit of time) leaves those locked that they have by then. The thread
itself does not notice: the locks are reentrant. But the leader, which settles those futures, would wait for ever, and
with it everything else.
"""

from __future__ import annotations

import concurrent.futures
import re
import sys
import threading
from types import CodeType

from distpool.node.striking import looking_at_frames

_LOOK = 0.05  # seconds
_OWNER = re.compile(r"owner=(\d+)")
HOLDERS: set[CodeType] = set()
"""Functions of ours that take such locks and let go of them; whoever defines them adds them."""


def take(condition: threading.Condition) -> bool:
    """Take the lock of a future's Condition; False if it has been left behind, and nobody will ever let it go."""
    if condition.acquire(blocking=False):
        return True
    while not _is_left(condition):
        if condition.acquire(timeout=_LOOK):
            return True
    return False


def _is_left(condition: threading.Condition) -> bool:
    """Whether the thread that has the lock does nothing that would let go of it."""
    found = _OWNER.search(repr(condition))  # nothing else tells
    if found is None or int(found[1]) == 0:
        return False  # it has just let go
    with looking_at_frames():
        frame = sys._current_frames().get(int(found[1]))
        while frame is not None:
            code = frame.f_code
            if code is _WAIT:
                break  # the helpers hold no lock while they wait, be it `wait` itself: of other futures
            if code.co_filename == _HELPERS or code in HOLDERS:
                return False
            frame = frame.f_back
    return True


_WAIT = threading.Event.wait.__code__
_HELPERS = concurrent.futures.wait.__code__.co_filename

__all__ = ["HOLDERS", "take"]
