"""An event that user code may meet half-way (layer 0)."""

from __future__ import annotations

import threading


class Flag:
    """As `threading.Event`, but reentrant: a signal handler, or a `__del__` that the collector runs, may come in the
    middle of any method, in the same thread, and lead the loop, which sets flags. An Event would wait for itself then.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._is_set = False

    def is_set(self) -> bool:
        """Whether it is set now."""
        return self._is_set

    def set(self) -> None:
        """Any thread: whoever waits goes on."""
        with self._changed:
            self._is_set = True
            self._changed.notify_all()

    def clear(self) -> None:
        """From now on `wait` waits."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most `timeout` seconds; whether it was."""
        with self._changed:
            return self._is_set or self._changed.wait(timeout)


__all__ = ["Flag"]
