"""Calls between two attempts (layer 7).

result or death (leader) -> Retries.consider -> library thread: the user's retry_check -> timer -> run it again
                                                                                        or settle it for good
"""

from __future__ import annotations

from collections.abc import Callable

from distpool.hints import TYPE_CHECKING
from distpool.logs import Log
from distpool.node.node import Node
from distpool.refs.lent import Lent
from distpool.refs.refs import RAISED_HERE, Outcome
from distpool.transport.ioloop import Timer

if TYPE_CHECKING:
    from distpool.work import Call

log = Log("scheduling")


class Retries:
    """The calls of one scheduler whose last attempt has failed and that may run again. Leader, unless said otherwise.

    `again(call)` runs it, `end(call, outcome)` settles it.
    """

    def __init__(self, node: Node, again: Callable[[Call], object], end: Callable[[Call, Outcome], object]) -> None:
        self.count = 0  # calls between two attempts
        self._node = node
        self._again = again
        self._end = end
        self._waiting: dict[Call, tuple[Timer, Outcome]] = {}  # for the next attempt; how the last one ended
        self._over = False
        self._failure: Callable[[], BaseException] | None = None

    def consider(self, call: Call, outcome: Outcome) -> None:
        """Ask the user's `retry_check` on a library thread, then run the call again or settle it."""
        self.count += 1
        self._node.deliver(lambda: self._decide(call, outcome))

    def _decide(self, call: Call, outcome: Outcome) -> None:
        """On a library thread."""
        policy = call.policy
        assert policy is not None
        again = False
        try:
            _, error = call.future._open(outcome)
            if type(outcome) is Lent and error is not None:  # opened twice, its references would be given back twice
                outcome = Outcome(RAISED_HERE, error, (), outcome.pid)
            again = error is not None and policy.may_retry(error)
        except BaseException as failure:  # the user's retry_check raised, or left: that error counts
            outcome = Outcome(RAISED_HERE, failure, (), 1)
        if again:
            self._node.loop.call_soon(lambda: self._wait(call, outcome, policy.delay(call.attempt + 1)))
        else:
            self._node.loop.call_soon(lambda: self._settle(call, outcome))

    def _wait(self, call: Call, outcome: Outcome, seconds: float) -> None:
        if self._failure is not None:
            self._settle(call, Outcome(RAISED_HERE, self._failure(), (), 1))
            return
        if self._over:
            self._settle(call, outcome)
            return
        call.attempt += 1
        log.warning("retrying %s (attempt %d)", call.function.name, call.attempt + 1)
        self._waiting[call] = self._node.loop.call_later(seconds, lambda: self._run(call)), outcome

    def _run(self, call: Call) -> None:
        self.count -= 1
        self._waiting.pop(call, None)
        call.slot = None
        self._again(call)

    def _settle(self, call: Call, outcome: Outcome) -> None:
        self.count -= 1
        self._end(call, outcome)

    def fail_all(self, make_error: Callable[[], BaseException]) -> None:
        """Nothing runs any more: those that wait fail now, those that are being decided afterwards."""
        self._failure = make_error
        for call, _ in self._stop():
            self._settle(call, Outcome(RAISED_HERE, make_error(), (), 1))

    def end_all(self) -> None:
        """No more attempts: calls that wait for one end as the last one did, also those that fail from here on."""
        self._over = True
        for call, outcome in self._stop():
            self._settle(call, outcome)

    def _stop(self) -> list[tuple[Call, Outcome]]:
        waiting, self._waiting = self._waiting, {}
        for timer, _ in waiting.values():
            timer.cancel()
        return [(call, outcome) for call, (_, outcome) in waiting.items()]
