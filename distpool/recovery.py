"""What becomes of a failed element of `pmap`: a value from `on_error`, another attempt, or the end (layer 7).

    error -> on_error(error) returns          -> Given(value)     takes the element's place, no retry
          -> it raises (that error counts), or there is none:
                retry_check accepts, delays left -> Again(seconds)
                otherwise                        -> Ended(error)

Everything runs in the thread that calls `pmap`: the hooks are the user's code and belong to the caller, in every mode.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from distpool.config import as_int
from distpool.logs import Log
from distpool.policy import check_delay, check_retry_check

log = Log("pmap")


class Given(NamedTuple):
    """A value that needs no decoding."""

    value: Any


class Ended(NamedTuple):
    """The element has failed for good."""

    error: BaseException


class Again(NamedTuple):
    """The element runs again after so many seconds."""

    delay: float


class ExponentialBackOff:
    """`n` delays in seconds for `retry_delays=`, each about `factor` times the one before, up to `max_delay`.

    The first is `first_delay`; each following one is `factor * (1 - jitter ... 1 + jitter)` times its predecessor,
    drawn anew in every iteration, so that what failed together does not all come back together. `len()` gives `n`.
    ValueError for negative arguments.

    Example: `pmap(f, xs, retry_delays=ExponentialBackOff(3))` waits 0.05, about 0.25 and about 1.25 seconds.
    """

    def __init__(
        self, n: int, first_delay: float = 0.05, max_delay: float = 10.0, factor: float = 5.0, jitter: float = 0.1
    ) -> None:
        n = as_int(n)
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"n must be an int, not {type(n).__name__}")
        given = {"n": n, "first_delay": first_delay, "max_delay": max_delay, "factor": factor, "jitter": jitter}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, not {type(value).__name__}")
            if not value >= 0:
                raise ValueError(f"{name} must be non-negative, not {value!r}")
        if jitter > 1:
            raise ValueError(f"jitter must be at most 1, or delays would be negative; not {jitter!r}")
        self.n = n
        self.first_delay = first_delay
        self.max_delay = max_delay
        self.factor = factor
        self.jitter = jitter

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[float]:
        delay = min(self.first_delay, self.max_delay)
        for _ in range(self.n):
            yield delay
            spread = 1 - self.jitter + 2 * self.jitter * random.random()
            delay = min(self.max_delay, delay * self.factor * spread)

    def __repr__(self) -> str:
        return (
            f"ExponentialBackOff({self.n}, first_delay={self.first_delay}, max_delay={self.max_delay}, "
            f"factor={self.factor}, jitter={self.jitter})"
        )


class _Remembered:
    """The items of a one-shot iterator, for each element anew. Taken as they are needed: it may be endless."""

    def __init__(self, source: Iterator[float]) -> None:
        self._source = source
        self._taken: list[float] = []

    def __iter__(self) -> Iterator[float]:
        index = 0
        while True:
            while index >= len(self._taken):
                try:
                    self._taken.append(next(self._source))
                except StopIteration:
                    return
            yield self._taken[index]
            index += 1


class Recovery:
    """The hooks of one map and how often each element has been tried. Used by the calling thread only."""

    def __init__(
        self,
        on_error: Callable[[BaseException], Any] | None = None,
        retry_delays: Iterable[float] = (),
        retry_check: Any = None,
    ) -> None:
        if on_error is not None and not callable(on_error):
            raise TypeError(f"on_error must be callable, not {type(on_error).__name__}")
        check_retry_check(retry_check)
        self._on_error = on_error
        self._check = retry_check
        self._delays = _repeatable(retry_delays)
        #: Whether elements may have to run again, so that their arguments have to be kept.
        self.may_retry = not (hasattr(self._delays, "__len__") and len(self._delays) == 0)
        self._left: dict[int, Iterator[float]] = {}  # index of a failed element -> the delays that it has left

    def decide(self, index: int, error: BaseException, possible: bool) -> Given | Again | Ended:
        """What becomes of element `index`, which ended with `error`. `possible`: whether it could run again at all."""
        if self._on_error is not None:
            try:
                value = self._on_error(error)
            except KeyboardInterrupt:  # the user's Ctrl-C: ends the map, whatever the rules say
                raise
            except BaseException as raised:
                error = raised
            else:
                self._left.pop(index, None)
                return Given(value)
        if self.may_retry and possible:
            try:
                delay = self._next_delay(index, error)
            except KeyboardInterrupt:
                raise
            except BaseException as raised:  # of retry_check or of the delays: that error counts
                return Ended(raised)
            if delay is not None:
                log.warning("element %d: trying again after %s: %s", index, type(error).__name__, error)
                return Again(delay)
        return Ended(error)

    def forget(self, index: int) -> None:
        """The element has ended well after all."""
        self._left.pop(index, None)

    def _next_delay(self, index: int, error: BaseException) -> float | None:
        if not self._accepts(error):
            return None
        left = self._left.get(index)
        if left is None:
            left = self._left[index] = iter(self._delays)
        delay = next(left, None)
        return None if delay is None else check_delay(delay)

    def _accepts(self, error: BaseException) -> bool:
        check = self._check
        if check is None:
            return issubclass(type(error), Exception)
        if isinstance(check, type | tuple):
            return issubclass(type(error), check)
        return bool(check(error))


def _repeatable(delays: Iterable[float]) -> Any:
    """Something that can be iterated once for each failing element; what is at hand is checked now."""
    try:
        iterator = iter(delays)
    except TypeError:
        raise TypeError(f"retry_delays must be an iterable of seconds, not {type(delays).__name__}") from None
    if iterator is delays:
        return _Remembered(iterator)
    if isinstance(delays, list | tuple):
        return tuple(check_delay(delay) for delay in delays)
    return delays


__all__ = ["Again", "Ended", "ExponentialBackOff", "Given", "Recovery"]
