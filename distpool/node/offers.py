"""Remote calls that have come to a worker, and the thread that each of them gets (layer 3).

    leader: Offers.offer(work) -> main thread, if nothing runs there -> run_on_main()
                               -> a thread of its own otherwise, or when the main thread does not come in time

A blocked request blocks nobody, so no call waits for another one. But the main thread is the better place: only there
an interrupt ends what waits in C (`time.sleep`). It may be still on its way back from the call before; who calls again
at once would mostly be given another thread. So a call is promised to it as soon as no code of the user's runs there.
What it does on its way should take no time, but may (an answer that nobody reads): a promise holds for `_PATIENCE`.
Calls of executors that come then wait for it likewise (`TaskRunner.helped`).
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from functools import partial

from distpool.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distpool.node.interrupts import Coming
    from distpool.node.tasks import TaskRunner

_PATIENCE = 0.25  # seconds that a call waits for the main thread, which should come at once

#: `work(call)` decodes the call, lets `call(function, args, kwargs)` run it, and answers.
Work = Callable[[Any], object]


class _Offer:
    """A call that has come."""

    __slots__ = ("coming", "work")

    def __init__(self, work: Work, coming: Coming) -> None:
        self.work = work
        self.coming = coming

    def run(self, call: Callable[..., Any], forget: Callable[[Coming], None]) -> None:
        """On the thread that it gets."""
        try:
            self.work(partial(call, coming=self.coming))
        finally:
            forget(self.coming)


class Offers:
    """The remote calls of one task loop. What is shared between threads is protected by the runner's lock."""

    def __init__(self, runner: TaskRunner) -> None:
        self._runner = runner
        self._promised: collections.deque[_Offer] = collections.deque()  # to the main thread
        self._beside = 0  # those that were given to other threads and have not ended

    def __bool__(self) -> bool:
        """Whether the main thread is waited for."""
        return bool(self._promised)

    @property
    def beside(self) -> bool:
        """Whether calls run, or are about to, on other threads than the main one."""
        return self._beside > 0

    @property
    def busy(self) -> bool:
        """Whether a call of any kind, also an executor's, runs in this process, or a remote one is about to."""
        runner = self._runner
        with runner.lock:
            return bool(self._promised or self._beside or runner.engaged or runner.running)

    def offer(self, work: Work) -> None:
        """Leader: run `work(call)` on the main thread if nothing runs there, else on a thread of its own, at once."""
        runner = self._runner
        offer = _Offer(work, runner.interrupts.expect())
        with runner.lock:
            runner.brisk = free = runner.takes_calls()
            idle = runner.idle
            if free:
                self._promised.append(offer)
            else:
                self._beside += 1
        if not free:
            runner.spawn(lambda: self._run_beside(offer))
            return
        runner.brought()
        if not idle:
            runner.link.loop.call_later(_PATIENCE, lambda: self._take_back(offer))

    def _take_back(self, offer: _Offer) -> None:
        """Leader: the main thread has had its time to take this on."""
        with self._runner.lock:
            waits = offer in self._promised
            if waits:
                self._promised.remove(offer)
                self._beside += 1
        if waits:
            self._runner.spawn(lambda: self._run_beside(offer))

    def _run_beside(self, offer: _Offer) -> None:
        runner = self._runner
        try:
            offer.run(runner.interrupts.call, runner.interrupts.forget)
        finally:
            with runner.lock:
                self._beside -= 1
            if runner.leaving:
                runner.brought()
                runner.link.loop.wake()  # the main thread, if it leads, looks whether it may leave now

    def run_on_main(self) -> None:
        """Main thread: the call that was promised to it. Meanwhile helpers run what executors send: it may take for
        ever."""
        runner = self._runner
        with runner.lock:
            if not self._promised:
                return  # taken back this very moment
            offer = self._promised.popleft()
            runner.engaged = True
        with runner.helped() as only_answers:
            try:
                offer.run(partial(self._call, only_answers), runner.interrupts.forget)
            finally:
                runner.engaged = False

    def _call(
        self,
        only_answers: Callable[[], None],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        coming: Coming,
    ) -> Any:
        try:
            return self._runner.interrupts.call(function, args, kwargs, coming)
        finally:  # before the answer is out, to which the next call may be the reply
            only_answers()
            self._runner.engaged = False


__all__ = ["Offers"]
