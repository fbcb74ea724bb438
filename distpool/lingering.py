"""Calls that would keep a program from ending, because threads of the user's wait for them (layer 9).

    main thread ends --hook of `threading`--> watch --> leader, now and then: look
        nobody is left who could do anything, for _STANDSTILL seconds --> `end`: a warning, the workers go, waits fail

Python waits for threads that are not daemons before any `atexit` hook runs: one that waits for a call that does not end
would keep the program for ever. What Julia's calls still run when the program ends has seconds (rule of `exits`); but a
thread that goes on with its own work is to finish it, as Python has it. So what is looked for is a standstill: every
such thread waits, in this library or in one of the standard library's waits, the calls that this process waits for are
the same at each look, and there was none in between. Nobody but a worker could change that, and it has had its time.

The work of executors is none of that: it is done to its end before anything is counted.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from distpool.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distpool.node.node import Node

_STANDSTILL = 3.0  # seconds: who does not go when asked is to be gone within 10, all in all
_HASTE = 0.25  # ... of a program that ends by Ctrl-C
_LOOKS = 8  # in that time
_WAITS = ("distpool", "threading", "queue", "concurrent")  # packages in whose code a thread that waits is


class Watch:
    """Looks for a standstill until the process ends. `start` on the main thread, the rest on the leader."""

    def __init__(self, node: Node, end: Callable[[], object], seconds: float) -> None:
        self._node = node
        self._end = end
        self._seconds = seconds
        self._seen: Any = None  # what was waited for at the last look, and the number of the last request by then
        self._since = 0.0  # since when it has been the same

    def start(self) -> None:
        """The main thread has ended."""
        self._node.loop.call_soon(self._again)

    def _again(self) -> None:
        self._node.loop.call_later(self._seconds / _LOOKS, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        awaited = self._awaited() if all_wait() else None
        seen = (awaited, self._node.peers.requests.last)
        if not awaited or seen != self._seen:
            self._seen, self._since = seen, now
        elif now - self._since >= self._seconds:
            self._end()
            return
        self._again()

    def _awaited(self) -> set[Any]:
        """The calls of this process to workers of `addprocs` that have not ended; none while executors have work."""
        node, group = self._node, self._node.group
        if group is None or any(crew.ends_at_exit and not crew.finished.is_set() for crew in list(node.crews)):
            return set()
        pids = list(group.default_members)
        awaited: set[Any] = {number for pid in pids for number in node.peers.requests.pending(pid)}
        for found in node.refs.live.valuerefs() if node.refs is not None else ():
            future = found()
            if (
                future is not None
                and future.where in pids
                and getattr(future, "_of_call", False)
                and not future._is_over
            ):
                awaited.add((future.whence, future.id))
        return awaited


def all_wait() -> bool:
    """Whether there are threads that Python waits for at its end, besides the main one, and all of them wait."""
    threads = [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
    frames = sys._current_frames()
    return bool(threads) and all(_waits(frames.get(thread.ident or 0)) for thread in threads)


def _waits(frame: FrameType | None) -> bool:
    name = frame.f_globals.get("__name__") if frame is not None else None
    return isinstance(name, str) and name.partition(".")[0] in _WAITS


def watch(node: Node, end: Callable[[], object], interrupted: bool) -> None:
    """The main thread has ended, perhaps by Ctrl-C: have `end()` called on the leader at a standstill."""
    Watch(node, end, _HASTE if interrupted else _STANDSTILL).start()


__all__ = ["watch"]
