"""An event that user code may meet half-way (layer 0)."""

from __future__ import annotations

import contextlib
import threading


class Flag:
    """As `threading.Event`, but without a lock: a signal handler, or a `__del__` that the collector runs, may come in
    the middle of any method, in the same thread, and lead the loop, which sets flags. An Event would wait for itself.

    Each step is atomic, and who waits is listed before he looks: what is set from then on wakes him. (Tried: a
    `Condition` with a reentrant lock. A handler that came between the look and the wait woke nobody.)
    """

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: list[threading.Lock] = []  # held by nobody else; released once

    def is_set(self) -> bool:
        """Whether it is set now."""
        return self._is_set

    def set(self) -> None:
        """Any thread: whoever waits goes on."""
        self._is_set = True
        for waiting in self._waiting[:]:
            with contextlib.suppress(RuntimeError):  # somebody else has just done it
                waiting.release()

    def clear(self) -> None:
        """From now on `wait` waits."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most `timeout` seconds; whether it was."""
        waiting = threading.Lock()
        waiting.acquire()
        self._waiting.append(waiting)
        try:
            if self._is_set:
                return True
            return waiting.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX))
        finally:
            self._waiting.remove(waiting)


__all__ = ["Flag"]
