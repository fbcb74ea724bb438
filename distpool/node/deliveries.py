"""Callbacks that run on library threads, for those who have to wait for their end (layer 3).

    whoever settles a future  --run(callbacks)-->  a library thread
    `shutdown(wait=True)`, the end of the program  --wait()-->  all of them have returned

The standard library's executors call them on the thread that `shutdown` and the interpreter's end join.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from distpool.hints import Any


class Deliveries:
    """The callbacks of one executor's futures."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._changed = threading.Condition()  # protects `_left`, and its place in `node.delivering`
        self._left = 0
        self._leaders = 0  # signal handlers that lead the loop until all have returned
        self._threads: set[int] = set()  # that run callbacks now; each adds and removes itself

    def run(self, callbacks: Callable[[], object]) -> None:
        """Call `callbacks()` on a library thread."""
        with self._changed:
            self._left += 1
            self._node.delivering.add(self)

        def work() -> None:
            me = threading.get_ident()
            self._threads.add(me)
            try:
                callbacks()
            finally:
                self._threads.discard(me)
                with self._changed:
                    self._left -= 1
                    if not self._left:
                        self._node.delivering.discard(self)
                        self._changed.notify_all()
                if self._leaders:
                    self._node.loop.wake()

        self._node.deliver(work)

    def wait(self) -> None:
        """Wait until all have returned. Inside a callback: not at all, it would wait for itself."""
        loop = self._node.loop
        if threading.get_ident() in self._threads or not self._left or not loop.may_wait:
            return
        if loop.leads:  # in a signal handler
            self._leaders += 1
            try:
                loop.lead(lambda: not self._left)
            finally:
                self._leaders -= 1
            return
        with loop.following(), self._changed:
            self._changed.wait_for(lambda: not self._left)


__all__ = ["Deliveries"]
