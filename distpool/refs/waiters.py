"""Tasks that wait with `concurrent.futures.wait` or `as_completed`, which know nothing of slots (layer 4).

wait(futures) -> Future._waiters.append(waiter) -> its event becomes one that gives the slot away while it is waited for
"""

from __future__ import annotations

import threading

from distpool.hints import Any
from distpool.node import node as nodes


class Waiters(list[Any]):
    """In workers: the waiters of `concurrent.futures.wait` and `as_completed`, which know nothing of slots.

    They sleep on an event of their own (`_base._Waiter.event`) after they have registered here, so that is where a task
    gives its slot away. They register under the conditions of all their futures: nobody looks at the event meanwhile.
    """

    def append(self, waiter: Any) -> None:
        event = getattr(waiter, "event", None)
        if type(event) is threading.Event and not event.is_set():
            waiter.event = _GivingEvent()
        super().append(waiter)


class _GivingEvent(threading.Event):
    """Whoever waits for it in a task has given the slot away."""

    def wait(self, timeout: float | None = None) -> bool:
        node = nodes.existing()
        if node is None or self.is_set():
            return super().wait(timeout)
        with node.given_away(), node.loop.following(self.set):
            return super().wait(timeout)


__all__ = ["Waiters"]
