"""What a process that starts others, or is started, finds around it (layer 8). Few imports: every login loads it."""

from __future__ import annotations

import os

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


def routable_address() -> str:
    """The address of this machine that others reach: the one it would send from. No packet is sent."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"  # no network at all


__all__ = ["BLAS_VARIABLES", "here", "routable_address"]
