"""Where the workers of an executor come from, and who takes the place of those that went (layer 9).

    Place: this machine, one host of a list, or all that one manager starts    Order: one launch for a place

    Crew.start --> an Order for each Place --> Launch --> prepare(member) -> joined -> others of its host (`more`)
    Crew._refill --> Supply.order(missing) --> the place that lacks most, or, while it rests, another one
    an Order that brings nobody for seconds: another place is asked as well
    an Order that brought nobody: its place rests, and is given up after some failures in a row -> errors()

A host that went away with its workers is asked once more; if it does not answer, the others get its workers. Places
that never brought anybody get nothing: the user gave them their numbers. Everything runs on the leader unless it says
otherwise. Tried and rejected: one launch for all hosts together, which says too late, and not surely, which host a
worker belongs to.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable

from distpool.errors import CompositeException, LaunchWorkerError
from distpool.hints import Any
from distpool.joining import Launch
from distpool.logs import Log
from distpool.managers.base import ClusterManager
from distpool.managers.local import LocalManager
from distpool.node.group import Member
from distpool.node.node import Node

log = Log("crew")

_LOCAL_ATTEMPTS = 3  # launches on this machine that may fail in a row
_STUBBORN_ATTEMPTS = 30  # the same when workers of it have worked: then the set-up is right, and something kills
_HOST_ATTEMPTS = 2  # launches elsewhere that may fail in a row, when workers of it have worked before; else one
_HOST_PAUSE = 0.5  # seconds between those
_OVERDUE = 5.0  # seconds that a host may take to replace its workers before another one is asked: it may be gone
_GIVEN_UP = 60.0  # seconds after which a place that was given up may be tried again
_IDLE_DEATHS = 30  # workers that may die one after the other without having run anything


class Place:
    """Somewhere workers are started. Leader, once the crew has started."""

    def __init__(self, manager: ClusterManager, count: int | None) -> None:
        self.manager = manager
        self.count = count  # what its own launch brings; None: that will show
        self.share = 1 if count is None else count  # workers that it should have
        self.living: set[int] = set()  # pids that were begun here and are neither gone nor leaving
        self.orders: set[Order] = set()  # those that are under way
        self.worked = False  # some worker has come up here
        self.errors: list[BaseException] = []  # why the last order failed
        self.local = type(manager) is LocalManager
        self._failures = 0  # orders in a row that brought nobody
        self._idle_deaths = 0
        self._failed_at = self._died_at = 0.0  # monotonic seconds

    @property
    def filled(self) -> int:
        """Workers that it has or is asked for."""
        return len(self.living) + sum(order.outstanding for order in self.orders)

    def manager_for(self, count: int) -> tuple[ClusterManager | None, int | None]:
        """A manager for `count` more workers, and what it will bring; `(None, None)`: it has none."""
        sized = self.manager.sized(count)
        if sized is not None:
            return sized, count
        return (None, None) if self.filled else (self.manager, self.count)

    @property
    def may_start(self) -> bool:
        """Whether it may be asked now; one that has failed is asked for one thing at a time."""
        if self.orders and (self._failures or any(order.overdue for order in self.orders)):
            return False
        return self.pause() == 0

    def note_failure(self, errors: list[BaseException]) -> None:
        """An order brought nobody."""
        self.errors = errors
        self._failures += 1
        self._failed_at = time.monotonic()

    def note_success(self) -> None:
        """An order brought somebody."""
        self.worked = True
        self.errors = []
        self._failures = 0

    def note_death(self, idle: bool) -> None:
        """A worker died, `idle`: before it had run anything."""
        now = time.monotonic()
        self._idle_deaths = self._idle_deaths + 1 if idle and now - self._died_at < _GIVEN_UP else int(idle)
        self._died_at = now

    def pause(self) -> float | None:
        """Seconds until it may be asked for workers (again); None: it is given up."""
        now = time.monotonic()
        few, many = (_LOCAL_ATTEMPTS, _STUBBORN_ATTEMPTS) if self.local else (1, _HOST_ATTEMPTS)
        if self._failures >= (many if self.worked else few) and (now - self._failed_at < _GIVEN_UP or not self.worked):
            return None
        if self._idle_deaths >= _IDLE_DEATHS and now - self._died_at < _GIVEN_UP:
            text = f"{self._idle_deaths} workers died before they had run anything"
            self.errors = self.errors or [RuntimeError(text)]
            return None
        rest = 0.0
        if self._failures and self.worked:
            rest = min(1.0, 0.02 * self._failures) if self.local else _HOST_PAUSE
        return max(0.0, self._failed_at + rest - now, self._died_at + min(1.0, 0.02 * self._idle_deaths) - now)


class Order:
    """One launch for a place, until each of its workers has come up or has failed to."""

    def __init__(self, supply: Supply, place: Place, manager: ClusterManager, wanted: int | None, first: bool) -> None:
        self.place = place
        self.wanted = wanted
        self.first = first
        self.errors: list[BaseException] = []
        self.joined = 0
        self.overdue = False  # nobody counts on it any more; whom it brings nevertheless is welcome, or surplus
        self._supply = supply
        self._begun = 0
        self._coming: set[int] = set()  # pids that have been begun and have not joined
        self._starting = 0  # workers that start others of their host
        self._launched = False
        self.launch = Launch(supply.node, manager, supply.params, self._prepare, self._on_launched)
        self.launch.per_host = None if place.count is None else place.share
        place.orders.add(self)

    @property
    def outstanding(self) -> int:
        """Workers that may still be begun."""
        if self.overdue or (self._launched and not self._starting):
            return 0
        return max(0, self.wanted - self._begun) if self.wanted is not None else int(not self._begun)

    def start(self) -> None:
        """Any thread."""
        self.launch.start()
        if not self.first and not self.place.local and len(self._supply.places) > 1:
            self._supply.node.loop.call_later(_OVERDUE, self._look)

    def _look(self) -> None:
        """Has it brought somebody? A host without power lets those who knock wait for long."""
        if self in self.place.orders and not self._begun:
            self.overdue = True
            self._supply.refill()

    def abandon(self) -> None:
        """Nobody wants its workers any more."""
        self.launch.abandon()

    def _prepare(self, member: Member) -> None:
        self._begun += 1
        self._coming.add(member.pid)
        self.place.living.add(member.pid)
        if self.first and self.wanted is None and not self._supply.scaled:
            self.place.share = max(self.place.share, len(self.place.living))
        self._supply.orders_of[member.pid] = self
        self._supply.prepare(member)

    def on_joined(self, member: Member, more: bool) -> None:
        """One has come up; with `more` it starts others, if its manager wants that."""
        self.joined += 1
        self.place.note_success()
        self._starting += 1
        if not (more and self.launch.more(member, self._others_begun)):
            self._starting -= 1
        self._coming.discard(member.pid)
        self._check()

    def _others_begun(self, count: int, errors: list[LaunchWorkerError]) -> None:
        self._starting -= 1
        self.errors.extend(errors)
        self._check()

    def on_gone(self, member: Member) -> None:
        """One is gone, perhaps before it came up."""
        if member.pid in self._coming:
            self._coming.discard(member.pid)
            self.errors.append(member.launch_error())
            self._check()

    def _on_launched(self, count: int, error: BaseException | None) -> None:
        self._launched = True
        if error is not None:
            self.errors.append(error)
        self._supply.start_next()
        self._check()

    def _check(self) -> None:
        if self._launched and not self._starting and not self._coming and self in self.place.orders:
            self.place.orders.discard(self)
            if not self.errors and self._begun < (1 if self.wanted is None else self.wanted):
                text = f"{self._begun} of {'any' if self.wanted is None else self.wanted} workers started"
                self.errors.append(LaunchWorkerError("localhost", "", text))
            self._supply.settle(self)


class Supply:
    """The places of one executor."""

    def __init__(
        self,
        node: Node,
        places: list[Place],
        params: dict[str, Any],
        prepare: Callable[[Member], None],
        settled: Callable[[Order], None],
    ) -> None:
        self.node = node
        self.places = places
        self.params = params
        self.prepare = prepare
        self.orders_of: dict[int, Order] = {}  # pid -> who brought it
        self.scaled = False  # the user has said how many there shall be
        self.paused = 0  # workers that will be ordered when a place has rested
        self.refill: Callable[[], object] = lambda: None  # look again how many are missing
        self._settled = settled
        self._waiting: collections.deque[Order] = collections.deque()  # first orders that have not started
        self._timer: Any = None

    @property
    def launching(self) -> int:
        """Workers that are asked for and not begun."""
        return self.paused + sum(order.outstanding for place in self.places for order in place.orders)

    @property
    def busy(self) -> bool:
        """Whether something may still come."""
        return self.paused > 0 or any(place.orders for place in self.places)

    @property
    def share(self) -> int:
        """Workers that all places together should have."""
        return sum(place.share for place in self.places)

    def start(self) -> None:
        """Begin everywhere. Any thread, once."""
        first = [Order(self, place, place.manager, place.count, True) for place in self.places if place.count != 0]
        # Side by side, but not hundreds of logins in one moment: they may go through one gateway.
        given = first[0].launch.params.get("max_parallel") if first else None
        most = given if isinstance(given, int) and given > 0 else len(first)
        self._waiting.extend(first[most:])
        for order in first[:most]:
            order.start()

    def start_next(self) -> None:
        """A launch has ended: one that waits for its turn may begin."""
        if self._waiting:
            self._waiting.popleft().start()

    def order(self, missing: int) -> None:
        """Ask for so many more, as far as there is anybody to ask; `refill` is called when a place has rested."""
        while missing > 0:
            place = self._next_place()
            if place is None:
                break
            missing -= self._order(place, missing)
        if missing > 0 and self._timer is None:
            pauses = [place.pause() for place in self.places if place.share]
            waits = [pause for pause in pauses if pause]
            if waits:
                self._rest(min(waits), missing)

    def _order(self, place: Place, missing: int) -> int:
        """Returns how many will come, as far as is known."""
        wanted = min(missing, max(1, place.share - place.filled))
        try:
            manager, count = place.manager_for(wanted)
            if manager is None:
                raise TypeError(f"{type(place.manager).__name__}.sized({wanted}) gives no manager")
            order = Order(self, place, manager, count, False)
        except Exception as error:  # the user's manager
            log.exception("no workers from %s", type(place.manager).__name__)
            place.note_failure([error])
            return 0
        order.start()
        return wanted if count is None else count

    def _next_place(self) -> Place | None:
        """Which lacks most; if none lacks any, which has least to do."""
        able = [place for place in self.places if place.share and place.may_start and self._can(place)]
        if not able:
            return None
        return max(able, key=lambda place: (max(0, place.share - place.filled), -place.filled / place.share))

    def _can(self, place: Place) -> bool:
        try:
            return place.manager_for(1)[0] is not None
        except Exception as error:  # the user's manager
            place.note_failure([error])
            return False

    def _rest(self, seconds: float, missing: int) -> None:
        self.paused = missing

        def rested() -> None:
            self._timer, self.paused = None, 0
            self.refill()

        self._timer = self.node.loop.call_later(seconds, rested)

    def settle(self, order: Order) -> None:
        """An order is over."""
        place = order.place
        if not order.joined:
            place.note_failure(order.errors)
        if order.first and not place.local and not self.scaled:
            place.share = order.joined
        self._settled(order)

    def place_of(self, pid: int) -> Place | None:
        """Where that worker was begun."""
        order = self.orders_of.get(pid)
        return None if order is None else order.place

    def brought_at_first(self, pid: int) -> bool:
        """Whether it is one of those that the executor was to have from the beginning, and replaces nobody."""
        order = self.orders_of.get(pid)
        return order is not None and order.first

    def joined(self, member: Member, more: bool) -> None:
        """A worker has come up; with `more` it may start others of its host."""
        self.orders_of[member.pid].on_joined(member, more)

    def leaves(self, pid: int) -> None:
        """A worker is asked to go: somebody may come in its place."""
        place = self.place_of(pid)
        if place is not None:
            place.living.discard(pid)

    def gone(self, member: Member) -> None:
        """A worker is no more."""
        order = self.orders_of.pop(member.pid, None)
        if order is not None:
            order.place.living.discard(member.pid)
            order.on_gone(member)

    def scale(self, size: int) -> None:
        """There shall be so many, spread as they are now."""
        self.scaled = True
        weights = [place.share if place.worked or place.orders else 0 for place in self.places]
        if not any(weights):
            weights = [1] * len(self.places)
        for place, share in zip(self.places, spread(size, weights), strict=True):
            place.share = share

    def abandon(self) -> bool:
        """Whatever is still under way elsewhere is not waited for. Returns whether nothing is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self.paused = None, 0
        self._waiting.clear()
        for place in self.places:
            if not place.local:
                for order in list(place.orders):
                    order.abandon()
                place.orders.clear()
        return not self.busy

    def error(self) -> BaseException:
        """Why there are no workers."""
        found = [inner for place in self.places for error in place.errors for inner in launch_errors(error)]
        if len(found) == 1:
            plain = [error for place in self.places for error in place.errors]
            return plain[0] if type(plain[0]) in (ValueError, TypeError) else found[0]
        return CompositeException(found) if found else LaunchWorkerError("localhost", "", "no worker could be started")

    @property
    def can_grow(self) -> bool:
        """Whether some manager can start a given number of workers."""
        for place in self.places:
            with contextlib.suppress(Exception):  # the user's manager: then it cannot
                if place.manager.sized(1) is not None:
                    return True
        return False

    def close(self) -> None:
        """Everybody has gone: managers may let go of what they kept for replacements."""
        for place in self.places:
            if type(place.manager).close is not ClusterManager.close:
                self.node.deliver(place.manager.close)


def spread(size: int, weights: list[int]) -> list[int]:
    """`size` in whole parts that are to each other as `weights` are, nearly: who would get nothing comes first."""
    total = sum(weights)
    parts = [size * weight // total for weight in weights]
    by_rest = sorted(range(len(weights)), key=lambda index: (parts[index] > 0, -(size * weights[index] % total), index))
    for index in [index for index in by_rest if weights[index]][: size - sum(parts)]:
        parts[index] += 1
    return parts


def launch_errors(error: BaseException) -> list[Exception]:
    """One `LaunchWorkerError` for each machine that this error is about."""
    if isinstance(error, LaunchWorkerError):
        return [error]
    if isinstance(error, CompositeException):
        return [inner for each in error.exceptions for inner in launch_errors(each)]
    wrapped = LaunchWorkerError("localhost", "", f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return [wrapped]


__all__ = ["Order", "Place", "Supply", "launch_errors", "spread"]
