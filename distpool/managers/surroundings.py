"""What a process that starts others, or is started, finds around it (layer 8). Few imports: every login loads it."""

from __future__ import annotations

# Not `signal`: see `spawned`.
import _signal  # type: ignore[import-not-found]
import os
import sys

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    from typing import Any

BLAS_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
"""Environment variables that limit the threads of numerical libraries."""


def here() -> str:
    """The current directory; the home directory if it has been deleted."""
    try:
        return os.getcwd()
    except OSError:
        return os.path.expanduser("~")


_OWN = [getattr(_signal, name, 0) for name in ("SIGINT", "SIGTERM", "SIGCHLD", "SIGPIPE", "SIGXFSZ")]
"""Signals that interrupt workers, end them, or tell them of the end of a process; and what Python always ignores."""


def ignored() -> list[int]:
    """The signals that this program ignores."""
    found = [number for number in range(1, _signal.NSIG) if _signal.getsignal(number) is _signal.SIG_IGN]
    return [number for number in found if number not in _OWN]


def limits() -> dict[str, Any]:
    """What a child would inherit of this program now besides its environment: `umask`, `nice`, `affinity`, `RLIMIT_*`.

    As its main thread has it, for the calling one may be older than the last change. What cannot be known is missing:
    the umask where /proc does not say it, since who asks the system for it sets it meanwhile for all threads.
    """
    found: dict[str, Any] = {}
    if sys.platform == "win32":
        return found
    import resource

    for name in dir(resource):
        if name.startswith("RLIMIT_"):
            try:
                found[name] = list(resource.getrlimit(getattr(resource, name)))
            except (OSError, ValueError):
                pass  # this kernel does not have it
    try:
        found["nice"] = os.getpriority(os.PRIO_PROCESS, os.getpid())
        if hasattr(os, "sched_getaffinity"):
            found["affinity"] = sorted(os.sched_getaffinity(os.getpid()))
        with open("/proc/self/status", "rb") as file:
            _, word, rest = file.read().partition(b"\nUmask:")
        if word:
            found["umask"] = int(rest.split(None, 1)[0], 8)
    except OSError:
        pass  # the main thread has ended; no /proc; no descriptor left
    return found


def routable_address() -> str:
    """The address of this machine that others reach: the one it would send from. No packet is sent."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"  # no network at all


__all__ = ["BLAS_VARIABLES", "here", "ignored", "limits", "routable_address"]
