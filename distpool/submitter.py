"""What the executor and its views share: the face of submit and the maps (layer 10).

What they do is in `submitting`, which an executor loads when it is made: the class itself must be there before most of
distpool is loaded, so that a program's first executor can have its zygote started meanwhile (`managers.zygotes`).
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator

from distpool.logs import quiet_if_loaded

quiet_if_loaded()  # by `concurrent.futures`

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from distpool.crew import Crew
    from distpool.executor import ExecutorView
    from distpool.refs.refs import Future
    from distpool.work import Policy

    T = TypeVar("T")


class Submitter(concurrent.futures.Executor):
    """What the executor and its views share: submit and the maps, under one policy."""

    _crew: Crew
    _policy: Policy | None
    _progress: Any
    _future_class: type[Future[Any]]
    _ways: Any  # the module `submitting`

    def _check_usable(self) -> None:
        raise NotImplementedError

    def _view(self, policy: Policy | None) -> ExecutorView:
        raise NotImplementedError

    def options(
        self,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        retry_delays: Iterable[float] | None = None,
        retry_check: Any = None,
        pids: Iterable[int] | int | None = None,
        keep: bool | None = None,
        label: str | None = None,
    ) -> ExecutorView:
        """A view on the same workers with another policy; what is not given, or None, stays as it is here.

        `timeout`: seconds of running time per attempt; past it the worker is killed and replaced, the future gets
        `TimeoutError`; `math.inf`: no limit. `retries`: attempts after the first, for exceptions that `retry_check`
        (exception type, tuple or `callable(exc) -> bool`) accepts, and for worker death; 0: none. `retry_delays`:
        seconds before each retry. `pids`: only on those workers. `keep`: the value stays on its worker until the future
        is asked for it, or sent on. `label`: name in statistics. TypeError or ValueError for what cannot be meant.

        Example: `ex.options(timeout=5, retries=2).submit(f, x)`
        """
        from distpool.policy import make_policy

        changes = {
            "timeout": timeout, "retries": retries, "retry_delays": retry_delays, "retry_check": retry_check,
            "pids": pids, "keep": keep, "label": label,
        }  # fmt: skip
        return self._view(make_policy(self._policy, **changes))

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn(*args, **kwargs)` on a worker; returns a `distpool.Future`.

        Arguments are serialised before this returns. What cannot be serialised is the error of that future alone
        (`SerializationError`). RuntimeError after shutdown; BrokenProcessPool when the executor is broken.

        Example: `ex.submit(pow, 2, 10).result()` is 1024.
        """
        return self._ways.submit(self, fn, args, kwargs)  # type: ignore[no-any-return]

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Results of `fn` over the iterables, in input order, as the standard library's `Executor.map` (3.14).

        `timeout`: seconds from this call until a result must be there (`TimeoutError`). `chunksize`: elements that are
        sent, and fail, together; with 1 the size of what is sent adapts to the measured time. `buffersize`: elements
        taken from the input and not yet delivered (default: all are taken at once). `fn` is serialised once.

        Example: `list(ex.map(abs, [-1, -2]))` is [1, 2].
        """
        return self._ways.map_in_order(self, fn, iterables, timeout, chunksize, buffersize)  # type: ignore[no-any-return]

    def imap_unordered(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        buffersize: int | None = None,
        timeout: float | None = None,
    ) -> Iterator[T]:
        """Results in the order in which they come. Lazy: takes at most `buffersize` elements ahead (default 8 per
        worker; of short tasks over a list or range more), so endless generators work. `timeout`: seconds until all must
        be there.

        Example: `for value in ex.imap_unordered(f, itertools.count()): ...`
        """
        return self._ways.map_unordered(self, fn, iterables, buffersize, timeout)  # type: ignore[no-any-return]

    def pmap(
        self,
        f: Callable[..., Any],
        *iterables: Iterable[Any],
        batch_size: int | str = 1,
        on_error: Callable[[BaseException], Any] | None = None,
        retry_delays: Iterable[float] = (),
        retry_check: Any = None,
        progress: Any = None,
        distributed: bool = True,
    ) -> list[Any]:
        """Julia's `pmap` on these workers; see `distpool.pmap`.

        Example: `ex.pmap(f, xs, retry_delays=[0] * 3, on_error=lambda error: None)`
        """
        from distpool.mapping import pmap

        values: list[Any] = pmap(
            f,
            *iterables,
            pool=self,
            distributed=distributed,
            batch_size=batch_size,
            on_error=on_error,
            retry_delays=retry_delays,
            retry_check=retry_check,
            progress=self._progress if progress is None else progress,
        )
        return values


__all__ = ["Submitter"]
