"""How KeyboardInterrupt reaches the calls of a worker (layer 3).

    leader: strike()   user code on the main thread  -> SIGINT to that thread, until the handler (`on_signal`) has run,
                                                        which raises
                       user code on another thread   -> raised at its next bytecode
                       inside the library            -> noted, a wait is woken; raised on the way back to user code
                       a call that has come          -> marked (`Coming`, `_begins`); raised where its code would begin
                       importing, starting a thread  -> once more a moment later (`_missed`), until it is through
                       in a finalizer                -> Python ignores it (`on_unraisable`): once more a moment later

Where a thread must not be struck, and how it is struck elsewhere, is in `striking`.

Inside the library nothing may be struck at any bytecode: a thread that waits leads the I/O loop, and one that sends has
put bytes on a socket that it must count. So whatever of the library a call of the user's enters and may block or send
goes through `enter` and `leave` (`IoLoop.lead`, `IoLoop.following`, `Link.send_parts`).

Tried: `PyThreadState_SetAsyncExc` alone. A thread in a lock saw the exception when somebody else released the lock, and
one that led the loop had it raised in the middle of a frame's handler.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType

from distpool.errors import traceback_of
from distpool.hints import Any
from distpool.node.striking import handles, imports, raise_in, raise_signal

_LOOK = 0.005  # seconds until a call that could not be struck is looked at again
_LAST_LOOK = 0.05  # ... at most: a call in C that holds the GIL hears nothing, however often it is told
_SIGINT = int(signal.SIGINT)  # of the enum, `pthread_kill` would have to make a number first
_NUDGE = int(getattr(signal, "SIGURG", 0))  # of no use to anybody, and harmless where it is not handled
CALLERS: set[CodeType] = set()
"""What calls the user's code on the main thread: the frame above one of these is a call's first."""


class Inside:
    """A thread that has come from the user's code into the library: `struck` when it was interrupted there."""

    __slots__ = ("_wake", "call", "struck", "thread")

    def __init__(self, thread: int, wake: Callable[[], object] | None, call: object = None) -> None:
        self.thread = thread
        self.struck = False
        self.call = call  # which one, if it does not run on the main thread
        self._wake = wake

    def strike(self) -> None:
        """The call shall end: note it, and end the wait."""
        self.struck = True
        if self._wake is not None:
            self._wake()


class Coming:
    """A call that has come, and whose code has not begun: `struck` when it was interrupted before."""

    __slots__ = ("struck",)

    def __init__(self) -> None:
        self.struck = False


class Interrupts:
    """Which threads of this process run user code, and which of those are inside the library at the moment.

    `again(seconds)` is called when some call could not be struck: somebody has to call `strike_missed` on the leader in
    so many seconds. Any thread, also in a signal handler.
    """

    def __init__(self, again: Callable[[float], object] = lambda seconds: None) -> None:
        self.again = again
        #: Calls that were not to be struck at the moment when they should have been: thread -> call. Of the main thread
        #: the call's first frame, known only to itself. Set by any thread, emptied by the leader; single operations.
        self._missed: dict[int, object] = {}
        self._looking = False  # `again` has been called, and `strike_missed` not yet
        self._resend = _LOOK  # seconds from the next signal to the one after it; leader
        self._unheard = False  # SIGINT was sent to the main thread, and the handler has not run yet
        self._repeats = _SIGINT  # what is sent until it has
        self._meant: object = None  # ... and this call was meant, or whichever runs
        self._hearing = False  # the handler runs
        self._heard_more = False  # ... and has to look once more; both its own
        self.on_main = False  # calls run on the main thread, and its SIGINT handler is `on_signal`
        self.main = False  # user code runs on the main thread: SIGINT may raise there
        self._begins = False  # the main thread has taken on a call, whose code does not run yet
        self._late = False  # SIGINT came then
        self.finish: Callable[[], object] | None = None  # what each call ends with, as if it were its last line
        self._main_thread = threading.main_thread().ident or 0
        self._beside: dict[int, object] = {}  # other threads that run user code -> which call; _lock
        self._coming: set[Coming] = set()  # _lock
        self._inside: dict[int, Inside] = {}  # _lock; the main thread's own entry is its own (atomic)
        #: Protects _beside and _coming: nobody is struck behind the user's code. Reentrant: the collector may run a
        #: `__del__` inside that uses the library; that leaves the tables as it found them.
        self._lock: Any = threading.RLock()

    # -- the call (its thread) ---------------------------------------------------------------------------------

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        coming: Coming | None = None,
    ) -> Any:
        """The user's code. Only here, and only on the main thread, may SIGINT raise.

        KeyboardInterrupt at once if the call was interrupted before, as `coming` or since `begin`. On the main thread
        there is no moment in which nobody would note it: `coming` is marked until `_begins` is, and that until `main`.
        """
        if threading.get_ident() != self._main_thread:
            return self.call_beside(function, args, kwargs, coming)
        if coming is not None:
            self.begin()
            self.forget(coming)
        if self._missed:
            self._missed.pop(self._main_thread, None)  # of another call
        self.main = True
        try:
            self._begins = False
            if self._late or (coming is not None and coming.struck):
                self.main = self._late = False
                raise KeyboardInterrupt
            return function(*args, **kwargs)
        except Exception as error:
            if self._missed.pop(self._main_thread, None) is not None:
                self.main = False
                raise KeyboardInterrupt from error  # see `_is_missed`
            raise
        finally:
            try:
                if self.finish is not None:
                    self.finish()
            finally:
                self.main = False
                self._inside.pop(self._main_thread, None)

    def begin(self) -> None:
        """Main thread: it takes on a call. Who interrupts this process from now on means that one."""
        self._late = False
        self._begins = True

    def expect(self) -> Coming:
        """A call has come that will begin soon: who interrupts this process from now on means that one as well. The
        thread for it may be loading modules, or the call its arguments."""
        coming = Coming()
        with self._lock:
            self._coming.add(coming)
        return coming

    def forget(self, coming: Coming) -> None:
        """It has begun, or never will."""
        with self._lock:
            self._coming.discard(coming)

    def call_beside(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        coming: Coming | None = None,
    ) -> Any:
        """The same on another thread, where `strike` may raise at any bytecode once the lock is free."""
        thread = threading.get_ident()
        try:
            with self._lock:
                self._beside[thread] = object()
                if coming is not None:
                    self._coming.discard(coming)
            if coming is not None and coming.struck:
                raise KeyboardInterrupt
            return function(*args, **kwargs)
        except Exception as error:
            if self._is_missed(thread):
                raise KeyboardInterrupt from error
            raise
        finally:
            try:
                if self.finish is not None:
                    self.finish()
            finally:
                self._cover(thread)

    def _is_missed(self, thread: int) -> bool:
        """Whether the call that has just failed there is one that could not be struck yet.

        What it died of may be the interrupt all the same: of a call that it has waited for, or of another one that was
        importing the same module, which is not there now.
        """
        with self._lock:
            return thread in self._missed and self._missed[thread] is self._beside.get(thread)

    def forked(self) -> None:
        """In a child that a call has forked: it ends where the call does, for nobody waits for its return."""
        self.finish = _end_child
        self.__class__ = _Forked

    def runs_call(self) -> bool:
        """Whether the calling thread is inside a call."""
        thread = threading.get_ident()
        return thread in self._beside or thread in self._inside or (self.main and thread == self._main_thread)

    def _cover(self, thread: int) -> None:
        """From the return on, nothing can strike this thread: what comes meanwhile is the call's own outcome.

        (Tried: taking back what was raised and has not come out. CPython 3.11 and 3.12 then believe for ever that an
        exception is pending somewhere: all threads become slower, and in 3.11 those that are traced hang.)
        """
        late: KeyboardInterrupt | None = None
        while True:
            try:
                with self._lock:
                    self._beside.pop(thread, None)
                    self._inside.pop(thread, None)
                for _ in range(2):  # what was raised in this thread before comes out at a backward jump, so here
                    pass
                break
            except KeyboardInterrupt as error:
                late = error
        if late is not None:
            raise late

    # -- inside the library (the call's thread) ----------------------------------------------------------------

    def enter(self, wake: Callable[[], object] | None) -> Inside | None:
        """From now until `leave` an interrupt is noted, and `wake()` called; None if no call of the user's runs here.

        `wake` is called by any thread, in a signal handler too, and perhaps more than once.
        """
        thread = threading.get_ident()
        if thread == self._main_thread:
            if not self.main:
                return None
            inside = self._inside[thread] = Inside(thread, wake)
            self.main = False
            return inside
        call = self._beside.get(thread)
        if call is None:
            return None
        inside = Inside(thread, wake, call)
        try:
            with self._lock:
                self._beside.pop(thread, None)
                self._inside[thread] = inside
            for _ in range(2):  # what was raised in this thread before that comes out at a backward jump, so here
                pass
        except BaseException:
            self._expose(inside)
            raise
        return inside

    def leave(self, inside: Inside) -> None:
        """Back to the user's code: KeyboardInterrupt if it was interrupted meanwhile. Nothing may come after this."""
        thread = inside.thread
        if thread == self._main_thread:
            # In this order, so that at each moment a signal, or the leader, finds one of the two.
            self.main = not inside.struck  # what a call that was struck does to clean up is not interrupted again
            self._inside.pop(thread, None)
            if inside.struck:
                self.main = False
                raise KeyboardInterrupt
            return
        self._expose(inside)
        if inside.struck:
            raise KeyboardInterrupt

    def _expose(self, inside: Inside) -> None:
        with self._lock:
            self._inside.pop(inside.thread, None)
            self._beside[inside.thread] = inside.call

    def shielded(self, function: Callable[[], object]) -> None:
        """Run `function()`, bookkeeping that must be whole: KeyboardInterrupt, if there is one, comes after it."""
        late: KeyboardInterrupt | None = None
        while True:
            try:
                inside = self.enter(None)
                break
            except KeyboardInterrupt as error:
                late = error
        try:
            function()
        finally:
            if inside is not None:
                self.leave(inside)
        if late is not None:
            raise late

    def take_signals(self) -> None:
        """Main thread: calls run here, and what interrupts them comes by signals."""
        signal.signal(_SIGINT, self.on_signal)
        if _NUDGE:
            signal.signal(_NUDGE, self.on_nudge)
        self.on_main = True

    # -- the interrupt -----------------------------------------------------------------------------------------

    def strike(self) -> None:
        """Leader: KeyboardInterrupt in every call that runs here or is expected to."""
        self._load()
        with self._lock:
            for coming in self._coming:
                coming.struck = True
            inside = list(self._inside.values())
            self._strike(list(self._beside), inside)
            if self.on_main:
                self._meant, self._unheard = None, True
                self._signal(_LOOK)
        for entry in inside:
            entry.strike()

    def strike_missed(self) -> None:
        """Leader: the same in those calls that could not be struck at the last look, if they still run."""
        self._looking = False
        missed: dict[int, object] = {}
        self._load()
        with self._lock:
            while self._missed:
                thread, call = self._missed.popitem()
                missed[thread] = call
            beside = [thread for thread, call in missed.items() if self._beside.get(thread) is call]
            there = list(self._inside.values())
            inside = [entry for entry in there if entry.call and entry.call is missed.get(entry.thread)]
            self._strike(beside, inside)
            if self._unheard:
                self._signal(self._resend, False)
            elif self._main_thread in missed:
                self._meant, self._unheard = missed[self._main_thread], True
                self._signal(_LOOK)
        for entry in inside:
            entry.strike()

    def _load(self) -> None:
        """What `raise_in` needs is imported without our lock: it may have to wait for another thread that does so."""
        if self._beside:
            importlib.import_module("ctypes")

    def _strike(self, beside: list[int], inside: list[Inside]) -> None:
        """All at once, under the lock: where one call waits for another one here, the other's end may not be the
        first thing that it hears of."""
        for thread in beside:
            if not raise_in(thread):
                self._miss(thread, self._beside[thread])
        for entry in inside:
            entry.struck = True  # under the lock: who leaves after this has to see it

    def _signal(self, wait: float, first: bool = True) -> None:
        """Leader: SIGINT to the main thread, wherever it seems to be (it knows itself), and again until it has heard.

        Python notes a signal and looks at its notes between bytecodes, and when a system call was interrupted. One that
        comes in the middle of a C function that is about to make its system call (`time.sleep` has let go of the GIL,
        and this thread is the one that took it) interrupts nothing: the call would sleep on. It is one interrupt
        however many signals: the handler has not run when this sends another, and nothing runs between the look at
        `_unheard` and the sending.

        A call's own handler is to hear it once, and does not say when it has. Another signal interrupts as well, and
        its handler, ours, runs behind that of a lower number.
        """
        send, thread = getattr(signal, "pthread_kill", raise_signal), self._main_thread
        ours = handles(self, _SIGINT)
        if first or not ours:
            self._repeats = _SIGINT if ours else _NUDGE
        number = _SIGINT if first else self._repeats
        if number == _NUDGE and not handles(self, _NUDGE):  # that one is the user's as well
            self._unheard = False
        if self._unheard or (first and not ours):
            send(thread, number)
        self._resend = min(2 * wait, _LAST_LOOK)
        if self._unheard:
            self._look_again(wait)

    def on_nudge(self, signum: int, frame: FrameType | None) -> None:
        """Main thread: whatever handler SIGINT had when it was sent, it has run."""
        if self._repeats == _NUDGE:
            self._unheard = False

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """SIGINT, on the main thread. One that comes meanwhile is heard here, too: raised from in here, it would strike
        importlib in the middle just when this has seen that it must not."""
        self._unheard = False
        if self._hearing:
            self._heard_more = True
            return
        self._hearing = True
        try:
            while True:
                self._heard_more = False
                self._hear(frame)
                if not self._heard_more:
                    break
        finally:
            self._hearing = False

    def _hear(self, frame: FrameType | None) -> None:
        meant, self._meant = self._meant, None
        if meant is not None and _first_of(frame) is not meant:
            return  # it is over
        if self.main:
            call = _first_of(frame) if imports(frame) else None
            if call is not None:
                self._miss(self._main_thread, call)
                return
            self.main = False
            raise KeyboardInterrupt
        inside = self._inside.get(self._main_thread)
        if inside is not None:
            inside.strike()
        elif self._begins:
            self._late = True

    def listen(self) -> None:
        """Hear of interrupts that Python ignores."""
        previous = sys.unraisablehook

        def hook(unraisable: sys.UnraisableHookArgs) -> None:
            if not self.on_unraisable(unraisable.exc_type):
                previous(unraisable)

        sys.unraisablehook = hook

    def on_unraisable(self, kind: type[BaseException]) -> bool:
        """An exception came in a finalizer, on this thread; whether it was the interrupt of a call, which goes on."""
        if not issubclass(kind, KeyboardInterrupt):
            return False
        thread = threading.get_ident()
        on_main = thread == self._main_thread
        call: object = None
        if on_main:
            call = _first_of(sys._getframe())
        elif (call := self._beside.get(thread)) is None and (inside := self._inside.get(thread)) is not None:
            call = inside.call
        if call is None:
            return False
        if on_main:
            self.main = True  # it may be struck again
        self._miss(thread, call)
        return True

    def _miss(self, thread: int, call: object) -> None:
        """Any thread: that call could not be struck now. It will be a moment later."""
        self._missed[thread] = call
        self._look_again(_LOOK)

    def _look_again(self, seconds: float) -> None:
        """Any thread. One look is for all: who comes here before it has begun need not ask for another."""
        if not self._looking:
            self._looking = True
            self.again(seconds)


CALLERS.add(Interrupts.call.__code__)


class _Forked(Interrupts):
    """The same in a child that a call on the main thread has forked: `run_span` has no other place to look at."""

    @property
    def main(self) -> bool:
        return True

    @main.setter
    def main(self, value: bool) -> None:
        if not value:
            _end_child()


def _first_of(frame: FrameType | None) -> FrameType | None:
    """The first frame of the call that runs at `frame`: it tells a call from the next one of the same thread."""
    while frame is not None:
        below = frame.f_back
        if below is not None and below.f_code in CALLERS:
            return frame
        frame = below
    return None


def _end_child() -> None:
    """End this process as a program that ends here would: status, traceback, and what it has written."""
    error: Any = sys.exc_info()[1]
    status = 0
    if issubclass(type(error), SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        status = 1
        sys.excepthook(type(error), error, traceback_of(error))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status & 0xFF)


__all__ = ["Inside", "Interrupts"]
