"""A map over an input that is consumed lazily, with bounded look-ahead (layer 7).

    next(): a result is ready -> give it
            else room in the look-ahead -> take a few elements from the input, feed them, look again
            else wait for a result

Everything happens in the consumer's thread; there is no feeder thread. So an endless generator costs nothing while
nobody asks, and user code of the input runs where the user expects it. Elements are taken one after another only while
that is quick: a slow generator must not keep a finished result waiting. An error of the input is raised after the
results of what was taken before it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from distpool.dropped import WhenDropped
from distpool.hints import Any
from distpool.mapruns import MapRun
from distpool.refs.refs import open_outcome
from distpool.scheduling import Scheduler
from distpool.wire import codec
from distpool.wire.functions import EncodedFunction

_QUICK = 0.001  # seconds of taking elements before results are looked at again

#: Turns an entry of `MapRun.results` into a value or raises.
Opener = Callable[[Any], Any]


class LazyMap(Iterator[Any]):
    """Iterator over the results of `function` on each element of `source` (arguments, or tuples if not `single`).

    `look_ahead`: elements taken and not yet delivered. `ordered`: input order, else as they come. `deadline`: monotonic
    seconds after which `TimeoutError` is raised. `refilled`: the look-ahead is filled at once, and one more element is
    taken before each result is waited for, as for the standard library's `buffersize`, and the `TimeoutError` is the
    end. `in_halves`: take half a look-ahead at a time, so that elements can travel together. An element's exception is
    raised by `next` and does not end the iteration, unless `stop_at_error`. `owner`: the executor, which lives as long
    as more may be fed; one that nobody has any more is shut down.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        function: EncodedFunction,
        source: Iterator[Any],
        *,
        single: bool,
        look_ahead: Callable[[], int],
        ordered: bool = True,
        chunk: int | None = None,
        deadline: float | None = None,
        stop_at_error: bool = True,
        refilled: bool = False,
        in_halves: bool = False,
        opener: Opener | None = None,
        owner: Any = None,
    ) -> None:
        self.run = MapRun(scheduler, function, single=single, ordered=ordered, chunked=chunk is not None)
        self._dropped = WhenDropped(self.run.abandon)
        self._source: Iterator[Any] | None = source
        self._look_ahead = look_ahead
        self._chunk = chunk
        self._deadline = deadline
        self._in_halves = in_halves
        self._stop_at_error = stop_at_error
        self._opener = opener or open_entry
        self._owner = owner
        self._delivered = 0
        self._taken: list[Any] = []  # from the input, when an interrupt came before they were fed
        self._input_error: BaseException | None = None
        self._ended = False
        self._turn = threading.RLock()  # several threads may share it: one at a time takes, waits and counts
        self._refilled = refilled
        if refilled:
            self._fill(0)

    def __iter__(self) -> LazyMap:
        return self

    def __next__(self) -> Any:
        try:
            return self.next(self._deadline)
        except TimeoutError:
            if self._refilled:  # the standard library's generator: it is at its end with what it raises
                with contextlib.suppress(ValueError):  # another thread, which waits for the next one, comes here too
                    self.close()
            raise

    def next(self, deadline: float | None) -> Any:
        """The next result; `TimeoutError` after `deadline` (monotonic seconds), `StopIteration` at the end."""
        if not self._turn.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        try:
            index = self.next_index(deadline)
            # First: an interrupt behind what takes it out must not make us wait for it for ever.
            self._delivered += 1
            if self.run.ready is not None:
                self.run.ready.popleft()
            raw = self.run.results.pop(index)
        finally:
            self._turn.release()
        try:
            return self._opener(raw)
        except StopIteration as error:  # of an element: it must not look like the end
            self.close()
            raise RuntimeError("generator raised StopIteration") from error
        except BaseException:
            if self._stop_at_error:
                self.close()
            raise
        finally:
            raw = None  # no cycle of exception and frame, which would keep what the callers hold

    def next_index(self, deadline: float | None) -> int:
        """Wait for the next result and return its index in the input; nothing has been taken out."""
        run = self.run
        if self._refilled:
            self._fill(1)
        while True:
            if self._ended:
                raise StopIteration
            index = self._ready()
            if index is not None:
                return index
            if self._source is not None and self._wants_more():
                self._take()
                continue
            if self._delivered >= run.fed:
                self._finish()
                continue
            if not run.wait_until(self._is_ready, deadline):
                raise TimeoutError

    def _finish(self) -> None:
        self._ended = True
        error, self._input_error = self._input_error, None
        self.close()
        if error is not None:
            raise error

    def _ready(self) -> int | None:
        run = self.run
        if run.ready is not None:
            return run.ready[0] if run.ready else None
        return self._delivered if self._delivered in run.results else None

    def _is_ready(self) -> bool:
        run = self.run
        return bool(run.ready) if run.ready is not None else self._delivered in run.results

    def _room(self) -> int:
        return self._look_ahead() - (self.run.fed - self._delivered)

    def _wants_more(self) -> bool:
        ahead = self._look_ahead()
        room = ahead - (self.run.fed - self._delivered)
        return room * 2 >= ahead if self._in_halves else room > 0

    def _fill(self, more: int) -> None:
        """Take until the look-ahead and `more` are under way, however long that takes."""
        while self._source is not None and self._room() + more > 0:
            self._take(more)

    def _take(self, more: int = 0) -> None:
        """Take elements from the input while that is quick, and feed them."""
        assert self._source is not None
        taken, self._taken = self._taken, []
        room = (self._room() + more) * (self._chunk or 1)
        until = time.monotonic() + _QUICK
        try:
            self.run.check_open()  # else an endless input would keep it open
            while True:  # no condition: see tests/test_interruptible.py
                if len(taken) >= room:
                    break
                taken.append(next(self._source))
                if time.monotonic() > until and not (self._chunk and len(taken) % self._chunk):
                    break
        except StopIteration:
            self._source = None
        except BaseException as error:
            if issubclass(type(error), KeyboardInterrupt):  # of the input itself, or Ctrl-C: they look alike
                self._taken = taken  # whoever goes on misses nothing
                raise
            self._source = None
            self._input_error = error
        if self._chunk is None:
            self.run.feed(taken)
            return
        for start in range(0, len(taken), self._chunk):
            self.run.feed_chunk(taken[start : start + self._chunk])

    def close(self) -> None:
        """No more results are wanted: nothing new starts. ValueError, as a generator's, while another thread waits for
        the next one."""
        if not self._turn.acquire(blocking=False):
            raise ValueError("generator already executing")
        try:
            self._ended = True
            self._source = None
            self._taken = []
            self.run.close()
            self._dropped.cancel()
        finally:
            self._turn.release()
        self._owner = None


def open_entry(raw: Any) -> Any:
    """The value behind an entry of `MapRun.results`; raises the element's exception."""
    if type(raw) is bytes:
        return codec.decode(raw)
    value, error = open_outcome(raw)
    try:
        if error is not None:
            raise error
        return value
    finally:
        del error, raw  # see `LazyMap.next`
