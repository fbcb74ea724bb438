"""Limits, time-outs and `DISTPOOL_*` variables (layer 0).

Environment variables are read at each use, so that a test or a user may change them while the program runs, and are
handed on to workers.
"""

from __future__ import annotations

import operator
import os
import time

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    from typing import Any

#: Buffers of at least this many bytes travel beside the pickle (protocol 5, out of band).
OUT_OF_BAND = 256 * 1024
#: A control part larger than this is a protocol error: it is metadata, never user data.
MAX_CONTROL = 64 * 1024 * 1024
#: Body or buffer larger than this is a protocol error (1 TiB: larger than memory, smaller than garbage).
MAX_BODY = 1 << 40
#: What a peer may send before it has proved that it knows the cookie.
MAX_BEFORE_AUTH = 256
#: A reading socket takes at most this many bytes at once; 256 KiB are 3-4 times slower (mmap threshold of malloc).
READ_SIZE = 65536
#: A thread that waits for results leads the I/O loop itself; the I/O thread comes back after this many seconds.
GRACE = 0.005
#: A worker's window of calls sent ahead is worth this many seconds of running time.
WINDOW_SECONDS = 0.008
#: Of a long map it grows to this: each frame costs both sides 100 us, which at 1 ms per call is noticed.
LONG_WINDOW_SECONDS = 0.096
#: Results wait at most this long in a worker that has more to do before they are sent; those of a map that has run for
#: a while up to half of the next (`ResultWriter.pause`),
FLUSH_SECONDS = 0.004
#: those within a span, which is cut to be worth less than that (half a window), at most this long.
SPAN_FLUSH_SECONDS = 0.048
#: Bytes of a worker's journal of results (shared with the master on the same host).
JOURNAL_SIZE = 1 << 18
#: Characters that a cookie may have.
MAX_COOKIE = 64
#: Connections at a time that have not proved yet that they belong to the cluster.
MAX_STRANGERS = 64
#: Seconds that each of them has for the proof.
PROOF_SECONDS = 10.0
#: Last lines of a worker's output that `ProcessExitedException.output` carries.
OUTPUT_LINES = 20

#: What workers may need, but not to come up and not for simple calls (15 ms of work): loaded by a zygote or a worker
#: that has rested for so many seconds.
PRELOAD = ("cloudpickle", "multiprocessing", "encodings.ascii", "distpool.wire.byvalue", "traceback", "logging")
REST_SECONDS = 0.05
#: No wait is longer, in seconds: infinity, which means that, is more than locks, sockets and polls take.
LONGEST = 1e6


def as_int(value: Any) -> Any:
    """The int that `value` says it is (numpy's have `__index__`); anything else, a bool too, as it is."""
    if isinstance(value, int | str) or not hasattr(value, "__index__"):
        return value
    try:
        return operator.index(value)
    except TypeError:  # an array
        return value


def as_pid(value: Any) -> int:
    """The pid that `value` is; TypeError if it is no int."""
    found = as_int(value)
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"a pid is an int, not {type(value).__name__}")
    return found


def as_bool(value: Any) -> Any:
    """The bool that `value` is, if it is numpy's; anything else as it is."""
    kind = type(value)
    return bool(value) if kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_") else value


def as_flag(name: str, value: Any) -> bool:
    """The bool of a keyword that is on or off; TypeError for what merely counts as true, such as "no"."""
    found = as_bool(value)
    if not isinstance(found, int) or found not in (0, 1):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return bool(found)


def as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """What is in an iterable; TypeError, with the name of the argument, for what is none."""
    try:
        parts = iter(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a tuple or another iterable: {error}") from None
    return tuple(parts)


def check_cookie(cookie: Any) -> None:
    """ValueError unless it can be a cookie: a secret, so not empty, and one line on the stdin of a worker."""
    if not isinstance(cookie, str) or not 1 <= len(cookie) <= MAX_COOKIE or not cookie.isascii():
        raise ValueError(f"the cookie must be 1 to {MAX_COOKIE} ASCII characters")
    if any(letter in cookie for letter in "\n\r\0"):
        raise ValueError("the cookie must not contain a newline, carriage return or NUL: workers read it as a line")


def deadline_after(timeout: float | None) -> float | None:
    """The moment (monotonic seconds) in `timeout` seconds; None: there is none, which infinity means as well, and what
    is longer than anybody waits. ValueError for NaN, which no clock ever reaches.

    Example: `deadline_after(math.inf) is None`
    """
    if timeout is None:
        return None
    if timeout != timeout:
        raise ValueError("a timeout must be a number of seconds, not NaN")
    return time.monotonic() + timeout if timeout < LONGEST else None


def worker_timeout() -> float:
    """Seconds that launch and connection of a worker may take (`DISTPOOL_WORKER_TIMEOUT`, default 60)."""
    return _seconds("DISTPOOL_WORKER_TIMEOUT", 60.0)


def launch_timeout(given: Any) -> float:
    """Seconds for `timeout=` of a launch; None: `worker_timeout`."""
    return worker_timeout() if given is None else float(min(given, LONGEST))


def silent_seconds() -> float:
    """Seconds after which another host that acknowledges nothing is taken for lost (`DISTPOOL_SILENT_SECONDS`, default
    20; it is noticed at most a quarter later)."""
    return _seconds("DISTPOOL_SILENT_SECONDS", 20.0)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not value > 0:  # NaN too
        raise ValueError(f"{name} must be a number of seconds greater than 0, not {text!r}")
    return min(value, LONGEST)


def launch_method() -> str:
    """How local workers are started: `fork` (of a clean zygote process) or `exec` (`DISTPOOL_LAUNCH`)."""
    return _choice("DISTPOOL_LAUNCH", ("fork", "exec"), "fork" if hasattr(os, "fork") else "exec")


def local_transport() -> str:
    """What local links are made of: `unix` sockets or loopback `tcp` (`DISTPOOL_TRANSPORT`)."""
    import socket

    return _choice("DISTPOOL_TRANSPORT", ("unix", "tcp"), "unix" if hasattr(socket, "AF_UNIX") else "tcp")


def _choice(name: str, allowed: tuple[str, ...], default: str) -> str:
    value = os.environ.get(name, "") or default
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    return value
