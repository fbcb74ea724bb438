"""What managers of others put into `WorkerConfig.process` and `WorkerConfig.io`, as the group wants it (layer 8).

    subprocess.Popen --> PopenHandle: exit status on the leader, kill           (a pidfd; elsewhere a thread that waits)
    binary readable  --> open_output: a descriptor to poll, and what a buffered reader had already read

A manager may put the same process into several configs (one `srun` for all workers): it is killed only for the last of
them, because it would take the others with it.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial

from distpool.hints import Any
from distpool.managers.process import SIGKILL, Loop
from distpool.sigpipe import QUIET
from distpool.transport.pump import readinto_of

_AGAIN = 0.05  # seconds until we ask again for the exit status of a process that somebody else is waiting for


class PopenHandle:
    """A process that a manager started; it may be the worker itself, or only have started it (`srun`, `ssh`)."""

    is_worker = False
    is_here = True
    output = -1

    def __init__(self, loop: Loop, process: subprocess.Popen[Any]) -> None:
        self.ospid = process.pid
        self.exitcode: int | None = None
        self.exited = False
        self.users = 0
        self._loop = loop
        self._process = process
        self._pidfd = -1
        self._watched = False
        self._callbacks: list[Callable[[int | None], None]] = []
        self._lock = threading.Lock()  # protects exited, users, _watched and _callbacks

    def __repr__(self) -> str:
        return f"<PopenHandle {self.ospid} ({'exited' if self.exited else 'running'})>"

    def add_exit_callback(self, callback: Callable[[int | None], None]) -> None:
        """Call `callback(exitcode)` once: on the leader when the process ends, or now if it has ended."""
        with self._lock:
            exited = self.exited  # the leader runs those that it finds here, and nobody else does
            if not exited:
                self._callbacks.append(callback)
                watch, self._watched = not self._watched, True
        if exited:
            callback(self.exitcode)
        elif watch:
            self._watch()

    def _watch(self) -> None:
        if self._process.poll() is not None:  # its process id may be somebody else's by now
            self._loop.call_soon(self._look)
            return
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # reaped just now (then `_look` finds it), or no descriptor left
                self._pidfd = os.pidfd_open(self.ospid)
        if self._pidfd >= 0:
            self._loop.register(self._pidfd, self._look)
        else:
            threading.Thread(target=self._wait, name=f"distpool-wait-{self.ospid}", daemon=True).start()

    def _wait(self) -> None:
        self._process.wait()
        self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Leader: the process has ended."""
        code = self._process.poll()
        if self._pidfd >= 0:
            self._loop.unregister(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if code is None:  # the manager waits for it at this moment, on a thread of its own
            self._loop.call_later(_AGAIN, self._look)
            return
        with self._lock:
            self.exited = True
            self.exitcode = code
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(code)

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended."""
        return self.exited

    def kill(self, signum: int = SIGKILL) -> None:
        """Send a signal, unless other workers hang on this process."""
        if self.users <= 1:
            with contextlib.suppress(OSError):
                self._process.send_signal(signum)

    def retain(self) -> PopenHandle:
        """One more worker hangs on it."""
        with self._lock:
            self.users += 1
        return self

    def release(self) -> None:
        """One of its workers is gone."""
        with self._lock:
            self.users -= 1

    def forget(self) -> None:
        """In a forked child of the master: only close."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def open_output(source: Any) -> tuple[int, bytes]:
    """A pollable descriptor of ours for a binary readable, and what had been read from it already.

    TypeError: it cannot be read. A readable without a descriptor, or with one that cannot be polled (a file's), gets a
    thread that copies it into a socket.
    """
    try:
        number = source.fileno()
    except (AttributeError, OSError, ValueError):
        number = -1
    if number < 0 or not _can_be_polled(number):
        return _copied(source), b""
    descriptor = os.dup(number)
    early = b""
    if isinstance(source, io.BufferedReader):
        os.set_blocking(number, False)
        with contextlib.suppress(OSError, ValueError):
            early = source.read1(io.DEFAULT_BUFFER_SIZE) or b""
    return descriptor, early


def _can_be_polled(number: int) -> bool:
    if sys.platform == "win32":  # not even pipes
        return False
    mode = os.fstat(number).st_mode
    if stat.S_ISCHR(mode):
        return os.isatty(number)  # /dev/null, for one, cannot
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISBLK(mode))


def _copied(source: Any) -> int:
    read = _read_of(source)
    near, far = socket.socketpair()

    def copy() -> None:
        with near, contextlib.suppress(Exception):  # the readable is user code: whatever it raises is its end
            while data := read():
                near.sendall(data, QUIET)

    threading.Thread(target=copy, name="distpool-output", daemon=True).start()
    return far.detach()


def _read_of(source: Any) -> Callable[[], Any]:
    """What gives the next bytes of a binary readable, none at its end; without waiting for more than there is."""
    if not callable(getattr(source, "readinto", None)):
        for name, arguments in _READS:
            method = getattr(source, name, None)
            if callable(method):
                return partial(method, *arguments)
    readinto = readinto_of(source)
    buffer = bytearray(_CHUNK)
    return lambda: memoryview(buffer)[: readinto(buffer) or 0]


_CHUNK = 65536
_READS: tuple[tuple[str, tuple[int, ...]], ...] = (("read1", (_CHUNK,)), ("readline", ()), ("read", (1,)))
"""For objects that have nothing else, best first. A `read` of more than one byte may wait until it has them all."""


__all__ = ["PopenHandle", "open_output"]
