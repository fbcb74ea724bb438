"""What the two ways of starting a local process share: the order, and the handle of a started process (layer 8).

    LaunchSpec --> forked.ForkServer  (zygote)  --\\
               --> executed.launch    (Popen)   ---> LaunchedProcess: address, output, exit status, kill

The exit status is reported on the leader of the I/O loop; `kill` and `add_exit_callback` may be called from anywhere.
"""

from __future__ import annotations

# Not `signal`: see `spawned`.
import _signal  # type: ignore[import-not-found]
import os
import sys
import threading
from collections.abc import Callable

from distpool.fields import Fields
from distpool.logs import Log
from distpool.managers.surroundings import ignored, limits

TYPE_CHECKING = False  # not from `typing`: see `hints`
if TYPE_CHECKING:
    from typing import Any, Protocol
else:
    Protocol = object

log = Log("launch")

HOST = "localhost"
"""Name of this machine in errors."""

PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The directory that `distpool` is imported from; workers need not have it installed."""

no_forks = threading.RLock()
"""Held from the making of pipes for a new process until its start, and by whoever forks this one (`os.fork`,
`multiprocessing`), on whatever threads. A child forked in between would keep the pipe whose end tells `Popen` that the
program runs: the start would wait until that child ends, which may itself wait for our workers."""

if hasattr(os, "register_at_fork"):
    # In the child the thread that forked is still its owner. Reentrant: a signal handler may fork in the midst of it.
    os.register_at_fork(before=no_forks.acquire, after_in_parent=no_forks.release, after_in_child=no_forks.release)

SIGKILL: int = getattr(_signal, "SIGKILL", _signal.SIGTERM)


class Timer(Protocol):
    """What `Loop.call_later` returns."""

    def cancel(self) -> None: ...


class Loop(Protocol):
    """What is used of the I/O loop (`transport.ioloop.IoLoop`); all methods may be called from any thread."""

    def register(self, source: Any, on_readable: Callable[[], None]) -> None: ...
    def unregister(self, source: Any) -> None: ...
    def call_soon(self, callback: Callable[[], object]) -> None: ...
    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer: ...


class LaunchSpec(Fields):
    """An order for `count` equal local workers; see `Launcher.launch`.

    `env` is the complete environment. `directory` holds their Unix sockets ("": the launcher's own). `bind`: the
    address of TCP listeners. `own_path`: the interpreter is not the caller's, so its own sys.path is kept behind
    `sys_path`. `entry`: what runs in the worker, `module:function`. `timeout` is in seconds, for all of them together.
    """

    count: int
    argv: list[str]
    env: dict[str, str]
    cwd: str
    sys_path: list[str]
    cookie: str
    transport: str = "unix"
    method: str = "fork"
    directory: str = ""
    timeout: float = 60.0
    extra: dict[str, Any] | None = None
    bind: str = "127.0.0.1"
    own_path: bool = False
    entry: str = "distpool.worker:run"

    def settings(self) -> dict[str, Any]:
        """What the worker is told (JSON-able). The environment is not part of it."""
        return {
            "cookie": self.cookie,
            "cwd": self.cwd,
            "sys_path": self.sys_path,
            "own_path": self.own_path,
            "transport": self.transport,
            "directory": self.directory,
            "bind": self.bind,
            "timeout": self.timeout,
            "extra": self.extra or {},
            "entry": self.entry,
            "program": _arguments(),
            "master": os.getpid(),
            "ignored": ignored(),
            "limits": {} if self.own_path else limits(),  # else its command may have set them: see `forked`
        }


def _arguments() -> list[str]:
    """This program's, as children of `multiprocessing` get them."""
    found = getattr(sys, "argv", None)
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


class LaunchedProcess:
    """A local worker process that listens at `address`: `("unix", path)` or `("tcp", host, port)`.

    `output` is the read end of its stdout and stderr (one pipe, non-blocking, ended by its death); it belongs to
    whoever takes it. `early_output` is what was already read of it. `exitcode` is `None` while it lives, then the exit
    code or minus the signal; `None` stays if nobody can know it (`exited` tells the two apart).

    Example: `process.add_exit_callback(lambda code: print("ended with", code))`
    """

    is_worker = True  # and not something that started it
    epitaph = ""  # why it has ended, where its exit code is not known
    is_here = True  # on this machine: all that it sent before its end has arrived with the end

    def __init__(
        self,
        ospid: int,
        address: tuple[Any, ...],
        output: int,
        send_signal: Callable[[int], None],
        pidfd: int = -1,
        early_output: bytes = b"",
    ) -> None:
        self.ospid = ospid
        self.address = address
        self.output = output
        self.early_output = early_output
        self.exitcode: int | None = None
        self.exited = False
        self._send_signal = send_signal
        self._pidfd = pidfd
        self._callbacks: list[Callable[[int | None], None]] = []
        # Protects `exited`, `_callbacks` and `_pidfd`: after the exit the descriptor's number belongs to others.
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        state = f"exited: {self.exitcode}" if self.exited else "running"
        return f"<LaunchedProcess {self.ospid} ({state})>"

    def add_exit_callback(self, callback: Callable[[int | None], None]) -> None:
        """Call `callback(exitcode)` once: on the I/O loop's leader when the process ends, or now if it has ended."""
        with self._lock:
            if not self.exited:
                self._callbacks.append(callback)
                return
        callback(self.exitcode)

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended, also where its exit code is still on its way. Any thread."""
        with self._lock:
            if self.exited or self._pidfd < 0:
                return self.exited
            import select  # here: what starts zygotes is to load little

            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            return bool(poll.poll(0))

    def kill(self, signum: int = SIGKILL) -> None:
        """Send a signal. No error if the process is gone, and never to another one that got its process id."""
        with self._lock:
            if self.exited:
                return
            if self._pidfd < 0:
                self._send_signal(signum)
                return
            try:
                _signal.pidfd_send_signal(self._pidfd, signum)
            except OSError:
                pass  # ended, not reported yet

    def ended(self, exitcode: int | None) -> None:
        """For launchers: the process is gone. Runs the callbacks; a second call does nothing."""
        with self._lock:
            if self.exited:
                return
            self.exited = True
            self.exitcode = exitcode
            callbacks, self._callbacks = self._callbacks, []
            self._close_pidfd()
        for callback in callbacks:
            try:
                callback(exitcode)
            except Exception:
                log.exception("an exit callback of process %d failed", self.ospid)

    def release(self) -> None:
        """Its member is gone. Nothing to do: nobody else uses this process."""

    def forget(self) -> None:
        """In a forked child of the master, where no lock may be taken: only close what was inherited."""
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def last_lines(data: bytes, count: int) -> str:
    """The last `count` lines of some process's output, as text."""
    return "\n".join(data.decode(errors="replace").splitlines()[-count:])


def unlink(path: str) -> None:
    """Remove the file of a dead worker's socket, if it is still there."""
    try:
        os.unlink(path)
    except OSError:
        pass  # cleaned up already


def boot_code(call: str, path: list[str], foreign: bool = False) -> str:
    """Text for `python -c` that imports distpool and makes `call`, in which `own` is the interpreter's own sys.path.

    Modules are looked up in `path`, so that the same ones are found as here; by a `foreign` interpreter (and where
    `path` is empty) in its own first.
    """
    found = f"own + {path!r}" if foreign else f"{path!r} or own[:]"
    return (
        f"import sys; own = [p for p in sys.path if p]; sys.path[:] = {found}; "
        f"sys.path += [{PACKAGE!r}] * ({PACKAGE!r} not in sys.path); {call}"
    )
