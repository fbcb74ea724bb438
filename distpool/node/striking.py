"""What CPython has for striking a thread: an exception out of nowhere, where it does no harm, and signals (layer 3).

    raise_in(thread): where is it? -> in the import system or its hooks, starting a thread -> False: not now
                                   -> anywhere else                                        -> raised there

An exception that comes out of nowhere in the middle of importlib leaves a module locked: whoever imports it later waits
for ever. (The code of a module may be struck; importlib is prepared for that.) And until a new thread runs, CPython
3.11 knows it under the number of the thread that made it: it would be struck, and what it was made for never done.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, MethodType

from distpool.hints import Any

_IMPORT_SYSTEM = frozenset(("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>"))
_MODULE = "<module>"
_START = threading.Thread.start.__code__


def imports(frame: FrameType | None) -> bool:
    """Whether this is the import system itself, and not the code of a module."""
    return frame is not None and frame.f_code.co_filename in _IMPORT_SYSTEM


@contextlib.contextmanager
def looking_at_frames() -> Iterator[None]:
    """While this thread looks at the frames of others.

    In 3.11 the collector runs wherever something is allocated, in `f_back` too. Finalizers that it calls may let go of
    the GIL; then the other thread runs on, and what `f_back` has at hand in C is not there any more (once it gave a
    dict, once it crashed). Since 3.12 the collector waits for a place where the GIL may go as well.
    """
    collects = sys.version_info < (3, 12) and gc.isenabled()
    if collects:
        gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def raise_in(thread: int) -> bool:
    """KeyboardInterrupt in another thread; False if where it is it must not be struck: in the import system, in what
    that calls in hooks of the user's, or where it waits for a thread that it has started (`start`, `Event.wait`,
    `Condition.wait`, and what that calls).

    It may be anywhere else as soon as it has the GIL. So from the look to the raising nothing lets go of that, which
    CPython (3.11 to 3.13) does where a function of Python's begins, where a loop jumps back, and when a call into C has
    returned: `for` calls `_current_frames` and goes on. It waits for the GIL then at the place that was seen, and looks
    for exceptions as soon as it has it; in 3.13 only at the next such place, by when a hook may have returned to
    importlib. (Code of a module does not return there directly, but through `exec`.)

    Tried: look, decide, raise. Under load it was in importlib by then.
    """
    import ctypes

    strike, number = ctypes.pythonapi.PyThreadState_SetAsyncExc, ctypes.c_ulong(thread)
    error = ctypes.py_object(KeyboardInterrupt)
    with looking_at_frames(), contextlib.suppress(KeyError):  # it has ended
        for frames in iter(sys._current_frames, None):
            frame: Any = frames[thread]
            code, frame = frame.f_code, frame.f_back
            second, frame = frame and frame.f_code, frame and frame.f_back
            third, frame = frame and frame.f_code, frame and frame.f_back
            fourth = frame and frame.f_code
            if (
                code.co_filename in _IMPORT_SYSTEM
                or (second and second.co_filename in _IMPORT_SYSTEM and code.co_name != _MODULE)
                or (third and third.co_filename in _IMPORT_SYSTEM and second.co_name != _MODULE)
                or (fourth and fourth.co_filename in _IMPORT_SYSTEM and third.co_name != _MODULE)
                or _START in (code, second, third, fourth)
            ):
                return False
            strike(number, error)
            break
    return True


def raise_signal(thread: int, number: int) -> None:
    """Where threads cannot be sent signals: the main one hears of it, but nothing ends its system calls."""
    signal.raise_signal(number)


def handles(owner: object, number: int) -> bool:
    """Whether the handler of this signal (0: none) is a method of `owner`."""
    handler = signal.getsignal(number) if number else None
    return type(handler) is MethodType and handler.__self__ is owner


__all__ = ["handles", "imports", "looking_at_frames", "raise_in", "raise_signal"]
