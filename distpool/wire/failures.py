"""Exceptions <-> bytes (layer 1): an error crosses processes as itself if it can, and as text in any case.

    task raised -> encode_exception -> bytes of (class name, message, traceback text, pickle or None, why not)
    caller      -> decode_exception -> the original exception, remote traceback as `__cause__`
                   captured         -> the same for `RemoteException` (Julia's calls)
    in between  -> pass_on          -> the same for the next one, where it has to be looked into

Runs where the task ran, and in the thread that wants the result. Neither direction raises, whatever the user's
exception class does: an error about an error would hide the first one. But Ctrl-C is not the class's doing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable

from distpool import errors
from distpool.errors import (
    CapturedException,
    DistpoolError,
    RemoteException,
    name_of,
    names_of,
    set_cause,
    text_of,
    traceback_of,
)
from distpool.hints import Any
from distpool.wire import codec

__all__ = [
    "FailureInfo", "captured", "decode_exception", "encode_exception", "failure_info", "let_go", "pass_on",
    "traceback_text",
]  # fmt: skip


#: Rebuilds an error. Replaced where references that are in it may have been lent to this process.
load: Callable[[bytes], Any] = pickle.loads


class FailureInfo:
    """What a failure consists of: `type_name` (qualified), `message`, `traceback` (text), `payload` (pickle or None),
    `reason` (why there is no payload)."""

    __slots__ = ("message", "payload", "reason", "traceback", "type_name")

    def __init__(self, type_name: str, message: str, traceback: str, payload: bytes | None, reason: str = "") -> None:
        self.type_name = type_name
        self.message = message
        self.traceback = traceback
        self.payload = payload
        self.reason = reason


def encode_exception(
    exc: BaseException, peer: Any = None, *, skip_frames: int = 0, seen: list[Any] | None = None
) -> bytes:
    """`exc` for a message to `peer`; never raises. `skip_frames`: outermost frames to leave out of the traceback.

    Example: `except BaseException as error: reply = encode_exception(error, peer, skip_frames=1)`
    """
    let_go(exc)
    text = traceback_text(exc, skip_frames)
    payload: bytes | None = None
    reason = ""
    start = len(seen) if seen is not None else 0
    try:
        payload = codec.dump(exc, peer, seen, None)
    except BaseException as error:
        # KeyboardInterrupt too: the task has ended already, its outcome must not be lost to a late interrupt.
        reason = f"it cannot be serialised: {name_of(error)}: {text_of(error)}"
        if seen is not None:
            del seen[start:]
    return pickle.dumps((_type_name(type(exc)), text_of(exc), text, payload, reason), codec.PROTOCOL)


def let_go(exc: BaseException) -> None:
    """Of a MemoryError: empty the frames in which it was raised. They hold what has filled the memory, and neither text
    nor pickle could be made of the error."""
    place = traceback_of(exc) if issubclass(type(exc), MemoryError) else None
    while place is not None:
        try:
            place.tb_frame.clear()
        except RuntimeError:
            pass  # it still runs: it is of those who caught the error
        place = place.tb_next


def pass_on(data: Any, peer: Any, seen: list[Any]) -> bytes:
    """The encoded exception for another process: rebuilt here, so that what is in it goes from us to `peer`."""
    info = failure_info(data)
    payload: bytes | None = None
    try:
        exc, reason = _rebuild(info)
        if exc is not None:
            payload = codec.dump(exc, peer, seen, None)
    except BaseException as error:  # as in `encode_exception`
        reason = f"it cannot be serialised: {name_of(error)}: {text_of(error)}"
        seen.clear()
    return pickle.dumps((info.type_name, info.message, info.traceback, payload, reason), codec.PROTOCOL)


def failure_info(data: Any) -> FailureInfo:
    """The parts of an encoded exception, without rebuilding it (it runs no user code)."""
    return FailureInfo(*pickle.loads(data))


def decode_exception(data: Any, pid: int = 0, cause: Callable[[str], BaseException] | None = None) -> BaseException:
    """The original exception with `cause(traceback text)` as its `__cause__`; raises nothing but Ctrl-C.

    `cause`: default the standard library's `concurrent.futures.process._RemoteTraceback`. An exception that cannot be
    rebuilt here gives `RemoteException(pid, ...)`, whose text has its class, its message and the remote traceback.

    Example: `future.set_exception(decode_exception(reply, pid=3))`
    """
    info = failure_info(data)
    exc, reason = _rebuild(info)
    if exc is None:
        return RemoteException(pid, _not_rebuilt(info, reason))
    if cause is None:
        cause = errors.remote_traceback
    assert cause is not None
    set_cause(exc, cause(f'\n"""\n{info.traceback}"""'))
    return exc


def captured(data: Any) -> CapturedException:
    """The exception for a `RemoteException`: the original, or a DistpoolError that names it; raises only Ctrl-C."""
    info = failure_info(data)
    exc, reason = _rebuild(info)
    if exc is None:
        return _not_rebuilt(info, reason)
    return CapturedException(exc, info.traceback)


def _rebuild(info: FailureInfo) -> tuple[BaseException | None, str]:
    if info.payload is None:
        return None, info.reason
    try:
        exc = load(info.payload)
    except BaseException as error:  # also SystemExit of a strange __init__
        if issubclass(type(error), KeyboardInterrupt):
            raise  # for whoever waits for the result, which can be asked for again
        return None, f"{name_of(error)}: {text_of(error)}"
    if not issubclass(type(exc), BaseException):
        return None, f"its pickle gives an object of type {_type_name(type(exc))}, not an exception"
    return exc, ""


def _not_rebuilt(info: FailureInfo, reason: str) -> CapturedException:
    note = f"{info.type_name} could not be rebuilt here: {reason}"
    return CapturedException(
        DistpoolError(f"{info.type_name}: {info.message} ({note})"), f"{info.traceback.rstrip()}\n({note})\n"
    )


def traceback_text(exc: BaseException, skip_frames: int = 0) -> str:
    """The traceback with all chained causes, as the interpreter prints it; never raises."""
    try:
        # Imported here: it costs milliseconds, and programs without errors never need it.
        import traceback

        frames = traceback_of(exc)
        while skip_frames > 0 and frames is not None and frames.tb_next is not None:
            frames = frames.tb_next
            skip_frames -= 1
        return "".join(traceback.format_exception(type(exc), exc, frames))
    except BaseException as error:
        return f"{_type_name(type(exc))}: {text_of(exc)}\n(no traceback: formatting it gave {name_of(error)})\n"


def _type_name(kind: type) -> str:
    module, name = names_of(kind)
    return name if module in ("builtins", "") else f"{module}.{name}"
