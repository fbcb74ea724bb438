"""Waiting for a link that is being made (layer 3).

any thread: wait(loop) ............ leader: set(), once, when there is a link, or it is known why there is none
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from distpool.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from distpool.transport.ioloop import IoLoop


class Ready:
    """Whether there is a link, or it is known why there is none (`problem`), and who waits for that."""

    def __init__(self) -> None:
        self.problem: Callable[[], BaseException] | None = None
        self._over = False
        self._sleepers: list[threading.Lock] = []  # one for each thread that waits; list operations are atomic

    def is_set(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self._over

    def set(self) -> None:
        """Leader, once."""
        self._over = True
        for sleeper in list(self._sleepers):
            _release(sleeper)

    def wait(self, loop: IoLoop) -> None:
        """Wait without leading. A lock of its own for each thread: an interrupt of one wakes no other."""
        sleeper = threading.Lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        try:
            with loop.following(lambda: _release(sleeper)):
                if not self._over:
                    sleeper.acquire()
        finally:
            self._sleepers.remove(sleeper)


def _release(sleeper: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # somebody else was first
        sleeper.release()


__all__ = ["Ready"]
