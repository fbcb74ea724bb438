"""Results that are opened before somebody asks for them (layer 7).

    settling: a result that `cannot_wait` -> open_soon -> Soon -> future, or map
                                                           `---> a library thread opens it, unless somebody was quicker

As a rule a value stays serialised until somebody wants it. But proxies of managers, ends of pipes and sockets can be
had only while others hold them, who do so only until the call has ended.
"""

from __future__ import annotations

import threading

from distpool.hints import TYPE_CHECKING, Any
from distpool.refs.refs import Future, Outcome, open_outcome
from distpool.work import PROXIES, Call

if TYPE_CHECKING:
    from distpool.scheduling import Scheduler

#: In the pickle of an end of a pipe or of a socket (`codec.receive_descriptor`), which a process can have only while
#: its sender lives, as it can have proxies (`PROXIES`) only while somebody else has one.
_DESCRIPTORS = b"receive_descriptor"
#: In both. Looked for first: 0.3 ms for each megabyte of a pickle, whose loading takes a hundred times as long.
_EITHER = b"multiprocessing."


def cannot_wait(data: bytes) -> bool:
    """Whether a result with this pickle is to be opened soon."""
    return _EITHER in data and (PROXIES in data or _DESCRIPTORS in data)


class Soon(Outcome):
    """A value that cannot wait for somebody who asks: a manager forgets an object when the last proxy of it ends, and
    those of the arguments end with the call; a pipe's end or a socket is fetched from the worker. So a library thread
    opens it, as those of the standard library's executors do, or whoever asks before it; all of them get the same
    value."""

    raw: Any
    kept: Any  # the call's things, until then
    lock: Any
    found: Any

    @classmethod
    def of(cls, raw: Outcome, kept: Any) -> Soon:
        """`raw`, to be opened soon, while `kept` lives."""
        made = cls(*raw)
        made.raw, made.kept, made.lock, made.found = raw, kept, threading.RLock(), None
        return made

    def decoded(self) -> Any:
        """For `open_outcome`: the value, or what kept it from being opened is raised."""
        if self.lock._is_owned():
            raise RuntimeError("this value is just being opened, by this very thread: a finalizer cannot have it")
        with self.lock:
            if self.found is None:
                self.found = open_outcome(self.raw)
                self.raw = self.kept = None
        value, error = self.found
        try:
            if error is not None:
                raise error
            return value
        finally:
            del error  # no cycle of exception and frame


def open_soon(scheduler: Scheduler, entry: Any, raw: Outcome) -> Outcome:
    """`raw`, which is to be opened soon, unless this process only passes it on."""
    future = entry.future if type(entry) is Call else None
    if future is not None and (future.passes_on or "_on_settled" in future.__dict__):
        return raw
    soon = Soon.of(raw, getattr(entry.buffers, "kept", None))
    run = None if future is not None else entry.run

    def work() -> None:
        try:
            if run is None or not (run.closed or run.unwanted):
                open_outcome(soon)
            if isinstance(future, Future) and future._raw is soon:
                future._decode()  # who is sent the future later gets the value, not this pickle, which has been used up
        finally:
            scheduler.loop.call_soon(lambda: _opened(scheduler))

    scheduler.opening += 1
    scheduler.loop.call_soon(lambda: scheduler.deliveries.run(work))  # the call's own callbacks go first
    return soon


def _opened(scheduler: Scheduler) -> None:
    scheduler.opening -= 1
    scheduler.check_done()


__all__ = ["Soon", "cannot_wait", "open_soon"]
