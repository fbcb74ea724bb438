"""Room in a channel that other processes have for items which they put ahead (layer 4, owner's side).

    a put arrives -> answered with a credit: room is reserved     PUTS -> the items, on that room; answered, with more
    somebody else wants room, or close() -> REVOKE -> the producer sends what it had put, then answers -> room is free

Why: without it each `put` from another process is a round trip. A producer that holds a credit of n puts n items
without asking; `refs.ahead` is its side. The capacity of a channel counts items and reserved room together, so that it
never holds more than it may.

Reserved room never keeps anybody waiting for longer than an answer takes: a put that finds no room has all credits
called back. A process that does not answer within `PATIENCE` (it is stopped, or holds the interpreter lock) loses its
room without having said so; what it may have put until then is taken all the same, and the channel is fuller than it
may be for that while. `close` waits longer: takers hear of it when each producer has answered, or is dead, because what
was put before the close is to be taken.

Each call-back begins a new epoch for that producer; a credit that was on its way is of the old one, and void.

Everything is called with the lock of the channel held, by any thread, and returns what is due outside of it.
"""

from __future__ import annotations

from collections.abc import Callable

#: Channels with less room are asked for each item: for Julia's default of 1 there is nothing to reserve.
SMALLEST = 8
MOST = 4096  # items of one credit
PATIENCE = 1.0  # seconds for the answer to a call-back
#: A put that had to wait is answered when so much room has come free (or after `HOLD` seconds), so that its answer
#: carries a credit that is worth it. Answered at once, each item of a full channel would be a round trip of its own.
ENOUGH = 64
HOLD = 0.001
_LEAST = 32  # items: smaller credits are given only by small channels
_ENDLESS = 1 << 30  # items: of a channel without a limit
_SHARE = 2  # a producer gets this part of the free room ...
_SHARES = 64  # ... and no credit at all while others have called it back so often

Due = Callable[[], object]


class Room:
    """The reserved room of one channel. `ask(pid, epoch)`: call the credit of that process back."""

    def __init__(self, size: float, ask: Callable[[int, int], object]) -> None:
        size = int(min(size, _ENDLESS))
        self.taken = 0  # reserved in all
        self.held: list[Due] = []  # answers to puts that had to wait
        self.enough = min(ENOUGH, size // 4)
        self._least = max(1, min(_LEAST, size // SMALLEST))
        self._ask = ask
        self._credits: dict[int, int] = {}  # pid -> room that is reserved for it
        self._asked: dict[int, bool] = {}  # pids whose credit was called back -> whether their answer is late
        self._epochs: dict[int, int] = {}
        self._share = _SHARE
        self._quiet = 0  # credits since the last call-back

    @property
    def may_come(self) -> bool:
        """Whether items that were put already may still be on their way."""
        return bool(self._credits or self._asked)

    @property
    def is_coming_free(self) -> bool:
        """Whether an answer to a call-back will come soon."""
        return not all(self._asked.values())

    def grant(self, pid: int, free: float) -> tuple[int, int]:
        """Reserve some of the `free` room for `pid`: how much, and the epoch of this credit."""
        epoch = self._epochs.get(pid, 0)
        if pid in self._asked or self._share >= _SHARES:
            self._calm_down()
            return 0, epoch
        have = self._credits.get(pid, 0)
        wanted = min(MOST, int(min(free, _ENDLESS) + have) // self._share) - have
        if wanted < self._least:
            return 0, epoch
        self._calm_down()
        self._credits[pid] = have + wanted
        self.taken += wanted
        return wanted, epoch

    def _calm_down(self) -> None:
        """Others called back long ago: the credits may grow again."""
        self._quiet += 1
        if self._quiet >= _SHARES and self._share > _SHARE:
            self._share //= 2
            self._quiet = 0

    def use(self, pid: int, count: int) -> None:
        """That many items have come on the credit of `pid`."""
        have = self._credits.get(pid, 0)
        used = min(have, count)
        self.taken -= used
        if have > used:
            self._credits[pid] = have - used
        else:
            self._credits.pop(pid, None)

    def call_back(self) -> list[Due]:
        """Somebody else needs the room: whom to tell."""
        pids = [pid for pid in self._credits if pid not in self._asked]
        if pids:
            self._share = min(_SHARES, self._share * 2)
            self._quiet = 0
        return [self._asking(pid) for pid in pids]

    def _asking(self, pid: int) -> Due:
        self._asked[pid] = False
        epoch = self._epochs[pid] = self._epochs.get(pid, 0) + 1
        return lambda: self._ask(pid, epoch)

    def answered(self, pid: int) -> None:
        """All that `pid` had put has come, or it is dead."""
        self._asked.pop(pid, None)
        self._free(pid)

    def give_back(self, pid: int, credit: int, epoch: int) -> None:
        """It will not use so much of its credit. Of an older epoch: that is void, and its room free or about to be."""
        if epoch == self._epochs.get(pid, 0):
            self.use(pid, credit)

    def _free(self, pid: int) -> None:
        self.taken -= self._credits.pop(pid, 0)

    def overdue(self, pid: int, epoch: int) -> bool:
        """It has not answered in time: its room is given to others. False if it has."""
        if pid not in self._asked or self._epochs.get(pid) != epoch:
            return False
        self._asked[pid] = True
        self._free(pid)
        return True

    def let_go(self) -> list[Due]:
        """Enough room has come free, or time is up: the answers that were held back."""
        held, self.held = self.held, []
        return held


__all__ = ["ENOUGH", "HOLD", "PATIENCE", "SMALLEST", "Room"]
