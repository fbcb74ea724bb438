"""Requests to other processes that have not been answered (layer 3).

    any thread: new(pid, settle) -> number -> frame ... REPLY (leader) -> settle(status, data, buffers, pid)
                                                   ... the peer is lost (leader) -> lost(error)

Every way out empties the table: an answer, the loss of the peer, or the caller's own giving up (the only one for what
takes any number of answers). Dict operations are atomic; each entry is popped once, by whoever is first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from distpool.hints import Any, NamedTuple

#: `f(status, data, buffers)`: the answer, on the leader.
OnAnswer = Callable[[int, Any, Any], object]
#: `f(error)`: the peer is gone, or could not be reached; on the leader, or in the thread that asks a dead peer.
OnLost = Callable[[BaseException], object]


class _Waiting(NamedTuple):
    pid: int
    answer: OnAnswer
    lost: OnLost
    many: bool


class Requests:
    """The table of one node."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.last = 0  # the number of the latest request, give or take those of other threads at the same moment
        self._waiting: dict[int, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def new(self, pid: int, answer: OnAnswer, lost: OnLost) -> int:
        """A number for a request to `pid`."""
        number = self.last = next(self._numbers)
        self._waiting[number] = _Waiting(pid, answer, lost, False)
        return number

    def several(self, pid: int, answer: OnAnswer) -> int:
        """A number for parts of what `pid` answers to another request: any number of them, until it is forgotten, or
        the peer is lost (which that other request hears of)."""
        number = next(self._numbers)
        self._waiting[number] = _Waiting(pid, answer, lambda error: None, True)
        return number

    def settle(self, number: int, status: int, data: Any, buffers: Any) -> bool:
        """Leader: the answer has come; False if nobody waits for it any more."""
        waiting = self._waiting.get(number)
        if waiting is None or (not waiting.many and self._waiting.pop(number, None) is None):
            return False
        waiting.answer(status, data, buffers)
        return True

    def pending(self, pid: int) -> list[int]:
        """The numbers of those that wait for `pid`, in their order."""
        return [number for number, waiting in list(self._waiting.items()) if waiting.pid == pid]

    def forget(self, number: int) -> bool:
        """The caller has given up; False if the answer was first."""
        return self._waiting.pop(number, None) is not None

    def fail_all(self, make_error: Callable[[], BaseException]) -> None:
        """Nothing will be answered any more."""
        for pid in {waiting.pid for waiting in list(self._waiting.values())}:
            self.fail(pid, make_error)

    def fail(self, pid: int, make_error: Callable[[], BaseException], numbers: list[int] | None = None) -> None:
        """Everything that waits for `pid` fails; or these, if they still wait."""
        for number in self.pending(pid) if numbers is None else numbers:
            waiting = self._waiting.pop(number, None)
            if waiting is not None:
                waiting.lost(make_error())
