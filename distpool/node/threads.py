"""Cached daemon threads for whatever may run user code or block: callbacks, decoding, further calls (layer 3).

    anybody --run(f)--> an idle thread of the cache, else a new one

A thread that has had nothing to do for `IDLE` seconds ends. The hand-over is one `SimpleQueue.put`, which is safe in
finalizers and signal handlers too. Threads are daemons: at interpreter exit the executors finish their work first
(`threading._register_atexit`), and nothing else may hold the program up.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import sys
import threading
from collections.abc import Callable

from distpool.logs import Log

log = Log("threads")

IDLE = 10.0
_TRY_AGAIN = 0.1  # seconds


class ThreadCache:
    """`run(f)` calls `f()` on a thread of its own, at once: never queued behind another `f`."""

    def __init__(self, name: str, call_later: Callable[[float, Callable[[], object]], object] | None = None) -> None:
        self._name = name
        self._call_later = call_later
        self._idle: collections.deque[queue.SimpleQueue[Callable[[], object]]] = collections.deque()  # atomic ends
        self._refused: collections.deque[Callable[[], object]] = collections.deque()  # atomic ends
        self._looking = False  # `_try_again` will be called
        self._count = 0

    def run(self, function: Callable[[], object]) -> None:
        """Call `function()` on another thread; what it raises is logged.

        If the system refuses another thread, the function waits for one that is there to become free, or until the
        system has changed its mind.
        """
        try:
            box = self._idle.pop()
        except IndexError:
            if not self._start(function):
                log.warning("no further thread can be started: work waits for one of those that are there")
                self._refused.append(function)
                self._match()
                self._try_later()
        else:
            box.put(function)

    def _start(self, function: Callable[[], object]) -> bool:
        box: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._count += 1
        thread = threading.Thread(target=self._serve, args=(box,), name=f"{self._name}-{self._count}", daemon=True)
        box.put(function)
        try:
            thread.start()
        except RuntimeError:
            return False
        return True

    def _try_later(self) -> None:
        """Nobody says when there is room for threads again, and there may be none whose work could end: one looks."""
        if self._refused and not self._looking and self._call_later is not None:
            self._looking = True
            self._call_later(_TRY_AGAIN, self._try_again)

    def _try_again(self) -> None:
        self._looking = False
        with contextlib.suppress(IndexError):
            while True:
                function = self._refused.popleft()
                if not self._start(function):
                    self._refused.appendleft(function)
                    self._match()
                    break
        self._try_later()

    def reserve(self, count: int) -> None:
        """Start so many threads now, which stay: where none can be started later."""
        for _ in range(count):
            box: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
            self._count += 1
            name = f"{self._name}-{self._count}"
            threading.Thread(target=self._serve, args=(box, True), name=name, daemon=True).start()
            self._idle.append(box)

    def _serve(self, box: queue.SimpleQueue[Callable[[], object]], stays: bool = False) -> None:
        while True:
            try:
                function = box.get(timeout=None if stays else IDLE)
            except queue.Empty:
                try:
                    self._idle.remove(box)
                except ValueError:  # taken this very moment: the function is on its way
                    function = box.get()
                else:
                    return
            try:
                function()
            except BaseException:  # SystemExit too: the thread serves others
                log.exception("error on a library thread")
            del function
            self._idle.append(box)
            self._match()

    def _match(self) -> None:
        """Give refused work to idle threads. Whoever has added to one of the two then looks at the other, so that no
        work stays behind while a thread idles."""
        while self._refused and self._idle:
            with contextlib.suppress(IndexError):  # somebody else was quicker
                box = self._idle.pop()
                try:
                    box.put(self._refused.popleft())
                except IndexError:
                    self._idle.append(box)


class SerialQueue:
    """Runs functions one after another, in order, on a thread of the cache: for output and notices to users."""

    prints = False  # what runs now writes to the program's own stdout, whose reader may take his time

    def __init__(self, threads: ThreadCache) -> None:
        self._threads = threads
        self._waiting: collections.deque[Callable[[], object]] = collections.deque()
        #: Held while a thread works. Nobody waits for it, so a `__del__` may put something at any moment; who lets go
        #: of it looks again.
        self._active = threading.Lock()
        self._called = False  # a thread is on its way; only saves calling more of them
        self.ran = 0  # functions; whether it gets on
        self._thread = 0  # which one works

    def put(self, function: Callable[[], object]) -> None:
        """Run `function()` after all that were put before."""
        self._waiting.append(function)
        self._start()

    def _start(self) -> None:
        """(Tried: take the lock here, and hand it over. Ctrl-C in between left it taken, and nothing ran any more.)"""
        if self._waiting and not self._called and not self._active.locked():
            try:
                self._called = True
                self._threads.run(self._work)
            except BaseException:
                self._called = False
                raise

    def _work(self) -> None:
        self._called = False
        if not self._active.acquire(blocking=False):
            return  # who works looks again
        self._thread = threading.get_ident()
        while self._waiting:
            function = self._waiting.popleft()
            try:
                function()
            except BaseException:  # SystemExit too: the thread serves others
                log.exception("error while handing something to the user")
            del function
            self.ran += 1
        self._thread = 0
        self._active.release()
        self._start()

    @property
    def is_mine(self) -> bool:
        """Whether this very thread works: what it puts runs after it, so it must not wait for that."""
        return self._thread == threading.get_ident()

    def join(self, timeout: float) -> bool:
        """Wait until everything put so far has run; False after `timeout` seconds, or if it never will."""
        if sys.is_finalizing():  # a `__del__` at the very end: no thread but this one runs any more
            return False
        done = threading.Event()
        self.put(done.set)
        return done.wait(timeout)
