"""A process that the system's own `posix_spawn` has started (layer 8).

    spawn(argv, env, output, kept) --> its descriptors: /dev/null, output, output, and `kept` under its number
                                   --> Spawned: poll, kill, wait

As `subprocess.Popen` would do it, whose module takes 2 ms to load: the first executor of a program needs this before
anything else (`managers.zygotes`).
"""

from __future__ import annotations

# Not `signal`: its enums, which nobody here needs, take 1 ms.
import _signal  # type: ignore[import-not-found]
import errno
import os
import threading

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    import subprocess

_RESET = tuple(getattr(_signal, name) for name in ("SIGPIPE", "SIGXFZ", "SIGXFSZ") if hasattr(_signal, name))
"""Signals that Python ignores, which a new program is not to inherit."""

_MOST = 1024
"""Descriptors that are looked at where nothing lists them."""


class Spawned:
    """A child of this process. `returncode`: None until its end has been seen, then its exit code or minus the signal
    (0 if somebody else has collected it, or nobody can: SIGCHLD is ignored). Any thread."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._collecting = threading.Lock()  # once collected, the number may be another process's

    def poll(self) -> int | None:
        """Its `returncode` now."""
        if self.returncode is None and self._collecting.acquire(blocking=False):  # else somebody waits for it
            try:
                self._collect(os.WNOHANG)
            finally:
                self._collecting.release()
        return self.returncode

    def kill(self) -> None:
        """SIGKILL. Nothing if it has ended."""
        if self.poll() is None:
            try:
                os.kill(self.pid, _signal.SIGKILL)
            except ProcessLookupError:
                pass  # somebody else has collected it

    def wait(self) -> int | None:
        """Wait for its end; returns the `returncode`."""
        with self._collecting:
            self._collect(0)
        return self.returncode

    def _collect(self, options: int) -> None:
        if self.returncode is not None:
            return
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError:
            self.returncode = 0
        else:
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)


def spawn(argv: list[str], env: dict[str, str], output: int, kept: int) -> Spawned | subprocess.Popen[bytes]:
    """Run `argv` in a session of its own. `output` (its stdout and stderr) and `kept`: descriptors above 2, which
    nobody else inherits. OSError: it cannot be started."""
    try:
        start = os.posix_spawn if os.path.dirname(argv[0]) else os.posix_spawnp
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
            *((os.POSIX_SPAWN_CLOSE, number) for number in _inherited()),
            # Back and forth: what is only duplicated to its own number is not inherited with an older glibc.
            (os.POSIX_SPAWN_DUP2, kept, output),
            (os.POSIX_SPAWN_DUP2, output, kept),
            (os.POSIX_SPAWN_CLOSE, output),
        ]
        return Spawned(start(argv[0], argv, env, file_actions=actions, setsid=True, setsigdef=_RESET))
    except (AttributeError, NotImplementedError):  # this C library has no such thing, or cannot begin a session with it
        return _by_subprocess(argv, env, output, kept)
    except OSError as error:
        # A program may lower its limit (RLIMIT_NOFILE) below the numbers that it has in use, which glibc refuses to
        # close then. Left out, they would be inherited, and a pipe among them never come to its end.
        if error.errno != errno.EBADF:
            raise
        return _by_subprocess(argv, env, output, kept)


def _by_subprocess(argv: list[str], env: dict[str, str], output: int, kept: int) -> subprocess.Popen[bytes]:
    import subprocess

    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=env,
        pass_fds=[kept],
        start_new_session=True,
    )


def _inherited() -> list[int]:
    """What a new program would get of this one's descriptors. (To close one that is not there any more is no error.)"""
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")]
    except OSError:
        numbers = list(range(_MOST))
    return [number for number in numbers if number > 2 and _is_inheritable(number)]


def _is_inheritable(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:  # the one that listed them, for instance
        return False


__all__ = ["Spawned", "spawn"]
