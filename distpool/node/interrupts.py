"""How KeyboardInterrupt reaches the calls of a worker (layer 3).

    leader: strike()   user code on the main thread  -> SIGINT to that thread; the handler (`on_signal`) raises
                       user code on another thread   -> raised at its next bytecode
                       inside the library            -> noted, a wait is woken; raised on the way back to user code

Inside the library nothing may be struck at any bytecode: a thread that waits leads the I/O loop, and one that sends has
put bytes on a socket that it must count. So whatever of the library a call of the user's enters and may block or send
goes through `enter` and `leave` (`IoLoop.lead`, `IoLoop.following`, `Link.send_parts`).

Tried: `PyThreadState_SetAsyncExc` alone. A thread in a lock saw the exception when somebody else released the lock, and
one that led the loop had it raised in the middle of a frame's handler.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any


class Inside:
    """A thread that has come from the user's code into the library: `struck` when it was interrupted there."""

    __slots__ = ("_wake", "struck", "thread")

    def __init__(self, thread: int, wake: Callable[[], object] | None) -> None:
        self.thread = thread
        self.struck = False
        self._wake = wake

    def strike(self) -> None:
        """The call shall end: note it, and end the wait."""
        self.struck = True
        if self._wake is not None:
            self._wake()


class Interrupts:
    """Which threads of this process run user code, and which of those are inside the library at the moment."""

    def __init__(self) -> None:
        self.main = False  # user code runs on the main thread: SIGINT may raise there
        self.finish: Callable[[], object] | None = None  # what each call ends with, as if it were its last line
        self._main_thread = threading.main_thread().ident or 0
        self._beside: set[int] = set()  # other threads that run user code; _lock
        self._inside: dict[int, Inside] = {}  # _lock; the main thread's own entry is its own (atomic)
        self._lock = threading.Lock()  # protects _beside: nobody is struck behind the user's code

    # -- the call (its thread) ---------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The user's code. Only here, and only on the main thread, may SIGINT raise."""
        if threading.get_ident() != self._main_thread:
            return self.call_beside(function, args, kwargs)
        self.main = True
        try:
            return function(*args, **kwargs)
        finally:
            try:
                if self.finish is not None:
                    self.finish()
            finally:
                self.main = False
                self._inside.pop(self._main_thread, None)

    def call_beside(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same on another thread, where `strike` may raise at any bytecode."""
        thread = threading.get_ident()
        with self._lock:
            self._beside.add(thread)
        try:
            return function(*args, **kwargs)
        finally:
            try:
                if self.finish is not None:
                    self.finish()
            finally:
                self._cover(thread)

    def _cover(self, thread: int) -> None:
        """From the return on, nothing can strike this thread: what comes meanwhile is the call's own outcome."""
        late: KeyboardInterrupt | None = None
        while True:
            try:
                with self._lock:
                    self._beside.discard(thread)
                    self._inside.pop(thread, None)
                    _raise_in(thread, None)
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
        if thread not in self._beside:
            return None
        inside = Inside(thread, wake)
        try:
            with self._lock:
                self._beside.discard(thread)
                self._inside[thread] = inside
            for _ in range(2):  # what was raised in this thread before that comes out at a backward jump, so here
                pass
        except BaseException:
            self._expose(thread)
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
        self._expose(thread)
        if inside.struck:
            raise KeyboardInterrupt

    def _expose(self, thread: int) -> None:
        with self._lock:
            self._inside.pop(thread, None)
            self._beside.add(thread)

    # -- the interrupt -----------------------------------------------------------------------------------------

    def strike(self) -> None:
        """Leader: KeyboardInterrupt in every call that runs here."""
        with self._lock:
            for thread in self._beside:
                _raise_in(thread, KeyboardInterrupt)
            inside = list(self._inside.values())
            for entry in inside:
                entry.struck = True  # under the lock: who leaves after this has to see it
        for entry in inside:
            entry.strike()
        if self.main:  # looked at after its entry: it may have left the library meanwhile
            if hasattr(signal, "pthread_kill"):  # to the main thread itself, so that its system call ends
                signal.pthread_kill(self._main_thread, signal.SIGINT)
            else:
                signal.raise_signal(signal.SIGINT)

    def on_signal(self, signum: int, frame: Any) -> None:
        """SIGINT, on the main thread."""
        if self.main:
            self.main = False
            raise KeyboardInterrupt
        inside = self._inside.get(self._main_thread)
        if inside is not None:
            inside.strike()


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Raise an exception in another thread (None: take it back, if it has not been raised)."""
    if kind is None and "ctypes" not in sys.modules:
        return  # never used here
    import ctypes

    what = ctypes.py_object(kind) if kind is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


__all__ = ["Inside", "Interrupts"]
