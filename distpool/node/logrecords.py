"""Records of the log go to their handlers on a thread that may take its time (layer 3).

    leader: log.warning(...) -> Records -> a library thread -> handlers of the user

A handler may raise, sleep, submit calls and wait for them, or want a lock that somebody holds who waits for the leader.
The leader lets another thread run it and waits for a moment: a record is as a rule there before what it tells of has
its consequences (a test that looks at the log when its call has failed finds it). While one handler takes longer than
that, nobody waits for the following ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from distpool.flag import Flag
from distpool.node.threads import SerialQueue, ThreadCache

_MOMENT = 0.2  # seconds


class Records:
    """The records of one process that come from its leader, in order."""

    def __init__(self, threads: ThreadCache) -> None:
        self._queue = SerialQueue(threads)
        self._late: Flag | None = None  # of the record whose handlers took too long; leader

    def write(self, write: Callable[[], object]) -> None:
        """Leader: have `write()` called, which runs handlers, after those of earlier records."""
        written = Flag()

        def run() -> None:
            try:
                write()
            finally:
                written.set()

        self._queue.put(run)
        if self._late is None or self._late.is_set():
            self._late = None if written.wait(_MOMENT) else written

    def join(self, timeout: float) -> bool:
        """Wait until the handlers have had all records so far; False after `timeout` seconds."""
        return sys.is_finalizing() or self._late is None or self._queue.join(timeout)


__all__ = ["Records"]
