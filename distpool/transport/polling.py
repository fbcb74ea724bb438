"""What the I/O loop polls with (layer 2): epoll or what else there is, and short looks before a poll that sleeps.

Everything here is used by the leader only, except `add`, `modify` and `remove`, which any thread may call.
"""

from __future__ import annotations

import os
import select
import selectors
import time
from collections.abc import Callable

from distpool.hints import Any

_GLANCE = 100e-6  # seconds: how long a brisk leader looks before it sleeps
_TRUST = 4  # waits in a row that have ended so soon, before it looks; after each look in vain twice as many, up to
_MOST_TRUST = 1024
_MOST_EVENTS = 128  # of one poll; epoll's own default allocates 12 kB for each
_yield: Callable[[], object] = getattr(os, "sched_yield", lambda: None)


class Glances:
    """Looks again and again for a moment before it sleeps, where that has paid lately (adaptive spinning).

    To wake a process that sleeps on another CPU takes 20 to 50 us, on both sides of a lonely call most of its time.
    Only for waits that are said to be brisk (one call is out and somebody waits for it; a worker that gets calls one by
    one): elsewhere whoever looks takes the processor from those that compute. `sched_yield` lets others run first, so
    that the peer gets on also where both share one CPU.
    """

    def __init__(self, poller: Any) -> None:
        self._poller = poller
        self._trust = 0
        self._needed = _TRUST

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        """As the poller's."""
        poller, clock = self._poller, time.perf_counter
        begin = clock()
        if self._trust >= self._needed and (timeout is None or timeout > _GLANCE):
            end = begin + _GLANCE
            while clock() < end:
                ready: list[tuple[int, int]] = poller.poll(0)
                if ready:
                    self._needed = _TRUST
                    return ready
                _yield()
            self._trust = 0
            self._needed = min(_MOST_TRUST, 2 * self._needed)
        ready = poller.poll(timeout)
        self._trust = self._trust + 1 if clock() - begin < 3 * _GLANCE else 0  # it had to be woken
        return ready


class Epoll:
    """epoll itself: `selectors` costs 3-5 us more per round."""

    live = True  # a poll that is under way sees changes

    def __init__(self) -> None:
        self._epoll = select.epoll()

    def add(self, descriptor: int) -> None:
        self._epoll.register(descriptor, select.EPOLLIN)

    def modify(self, descriptor: int, writing: bool) -> None:
        self._epoll.modify(descriptor, select.EPOLLIN | (select.EPOLLOUT if writing else 0))

    def remove(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        found = self._epoll.poll(timeout, _MOST_EVENTS)
        out = select.EPOLLOUT
        return [(fd, (1 if events & ~out else 0) | (2 if events & out else 0)) for fd, events in found]

    def close(self) -> None:
        self._epoll.close()


class Selector:
    """The portable poller (kqueue, poll, select)."""

    live = False

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def add(self, descriptor: int) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ)

    def modify(self, descriptor: int, writing: bool) -> None:
        self._selector.modify(descriptor, selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0))

    def remove(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        return [(key.fd, events & 3) for key, events in self._selector.select(timeout)]

    def close(self) -> None:
        if os.name == "posix":
            self._selector.close()


__all__ = ["Epoll", "Glances", "Selector"]
