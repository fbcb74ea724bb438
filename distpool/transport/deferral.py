"""Signals stay out of our bookkeeping in the main thread (layer 2).

Python runs its signal handlers in the main thread, between any two bytecodes, and most of them raise: Ctrl-C, a
`SIGALRM` that limits what the program does, a `SIGTERM` that calls `sys.exit`. An exception in the middle of a send
tears the frame and leaves its lock held. While the main thread is inside (`enter` to `leave`), handlers of our own
stand where the user's are: they run his in the poll (`may_raise`), where nothing can be torn, and keep what comes
elsewhere, a few microseconds, until the next poll or the end.

SIGINT is deferred only if its handler is Python's own; if the user has one, `enter` says no. Tried and rejected:
`pthread_sigmask` (the Python-level handler still runs in the main thread), handlers installed for good (asyncio and
IPython look at `signal.getsignal`), sending what was kept once more (a wakeup descriptor would hear it twice).
"""

from __future__ import annotations

# The C functions: `signal.signal` costs 7 us for its enum conversions, this 1 us.
import _signal  # type: ignore[import-not-found]
import threading

from distpool.hints import Any

_SIGINT = 2
#: Those for which programs have handlers; to look at all 64 would cost 5 us for each call.
_NAMES = "SIGALRM SIGTERM SIGHUP SIGUSR1 SIGUSR2 SIGQUIT SIGCHLD SIGPROF SIGVTALRM SIGXCPU SIGBREAK"
_OTHERS: tuple[int, ...] = tuple(getattr(_signal, name) for name in _NAMES.split() if hasattr(_signal, name))


class Deferral:
    """Defers signals while the main thread is inside our bookkeeping. Used by the main thread only."""

    def __init__(self) -> None:
        self.depth = 0
        self.may_raise = False
        #: A handler of the user's runs where nothing is half done: whoever leads may do so in there.
        self.at_rest = False
        self.late: list[tuple[int, Any]] = []  # signal and frame of what came meanwhile
        self._replaced: list[tuple[int, Any]] = []  # signal and the handler that was there
        self._thread = 0  # who is inside
        self._own: Any = self._on_signal  # one object, to be known again

    def _on_signal(self, signum: int, frame: Any) -> None:
        if not self.may_raise:
            self.late.append((signum, frame))
            return
        self.may_raise = False  # what the user's handler calls may be bookkeeping again
        self._run(signum, frame)
        while self.late:  # came meanwhile; the poll goes on behind this, perhaps for long
            self.deliver()
        self.may_raise = True

    def _run(self, signum: int, frame: Any) -> None:
        if signum == _SIGINT:
            raise KeyboardInterrupt
        handler = next((handler for number, handler in self._replaced if number == signum), None)
        if handler is None:
            handler = _signal.getsignal(signum)
        if callable(handler):
            before, self.at_rest = self.at_rest, True
            try:
                handler(signum, frame)
            finally:
                self.at_rest = before

    def enter(self, sigint: bool = True) -> bool:
        """Install the deferring handlers; False if SIGINT, which is asked for, has a handler of the user's own."""
        if self.depth:
            self.depth += 1
            return True
        if sigint and _signal.getsignal(_SIGINT) is not _signal.default_int_handler:
            return False
        try:
            if sigint:  # as `_replace`, which would cost a fifth of all this
                self._replaced.append((_SIGINT, _signal.default_int_handler))
                _signal.signal(_SIGINT, self._own)
            if any(map(callable, map(_signal.getsignal, _OTHERS))):
                for number in _OTHERS:
                    handler = _signal.getsignal(number)
                    if callable(handler) and handler is not self._own:
                        self._replace(number, handler)
        except BaseException:  # a signal that was not yet deferred
            self._end()
            raise
        self.depth = 1
        self._thread = threading.get_ident()
        return True

    def _replace(self, number: int, handler: Any) -> None:
        self._replaced.append((number, handler))  # first: from the next line on nobody else would put it back
        _signal.signal(number, self._own)

    def leave(self) -> None:
        """Undo `enter`; runs the handlers of what came meanwhile, so it may raise."""
        self.depth -= 1
        if not self.depth:
            self._end()

    def forked(self) -> None:
        """In a forked child: if the thread that was inside is not there, the handlers are the user's again."""
        if self.depth and self._thread != threading.get_ident():
            self.depth = 0
            self.late.clear()
            self._end()

    def deliver(self) -> None:
        """Run the handlers of what came meanwhile."""
        while self.late:
            self._run(*self.late.pop(0))

    def _end(self) -> None:
        replaced = self._replaced
        try:
            while replaced:
                number, handler = replaced[-1]
                if _signal.getsignal(number) is self._own:  # else the user's handler has installed another one
                    _signal.signal(number, handler)
                if replaced:  # else a `__del__` came in between, and used us
                    replaced.pop()
            self.deliver()
        finally:
            if replaced or self.late:  # one of them raises: the others are put back and run all the same
                self._end()


__all__ = ["Deferral"]
