"""The private directory of a program's Unix sockets: its name, and how it is made (layer 0).

    master: choose() -> name     zygote, or the master where there is none: make(name)

It is made by who also removes it when the master is killed: a directory that the master had made would stay behind if
the kill came before the zygote lived.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys

SUN_PATH = 104
"""Bytes of a Unix socket's path, terminator included (Linux: 108, macOS: 104)."""

LONGEST_NAME = "4194304-1000000.sock"


def choose() -> str:
    """A path for a new directory that leaves room for a socket's name; empty if there is no place for one.

    64 random bits: nobody else makes it first, and if somebody could, `make` would refuse it.
    """
    name = f"distpool-{os.urandom(8).hex()}"
    for parent in dict.fromkeys((_usual(), "/tmp")):
        path = os.path.join(parent, name) if parent else ""
        fits = len(os.fsencode(os.path.join(path, LONGEST_NAME))) < SUN_PATH
        if path and fits and os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK):
            return path
    return ""


def _usual() -> str:
    """The directory for temporary files, as `tempfile` finds it. It is asked only if it knows already, or if the first
    place that it would look at is none: to load it takes 5 ms, and it tries that place with a file, which stays there
    if the program is killed just then.
    """
    wanted = next((found for found in map(os.environ.get, ("TMPDIR", "TEMP", "TMP")) if found), "/tmp")
    known = getattr(sys.modules.get("tempfile"), "tempdir", None)
    if known is None and os.path.isdir(wanted) and os.access(wanted, os.W_OK | os.X_OK):
        return os.path.abspath(wanted)
    import tempfile

    try:
        return os.path.abspath(tempfile.gettempdir())
    except OSError:
        return ""  # it found no place that can be written to


def make(path: str) -> bool:
    """Make the directory, for us only (0700). False if that cannot be, or if it is there and not ours alone."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.lstat(path)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    except OSError:
        return False
    return True


def remove(path: str) -> None:
    """Remove the directory and the sockets in it, as far as that can be done."""
    try:
        for name in os.listdir(path):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(path, name))
        os.rmdir(path)
    except OSError:
        pass  # it is gone, or somebody else has put something there


__all__ = ["LONGEST_NAME", "SUN_PATH", "choose", "make", "remove"]
