"""Local worker processes: started quickly, watched, and ended with the master, however it dies (layer 8).

    Launcher (one per node) -- forked.ForkServer, one zygote per interpreter command -- fork, 1 ms per worker
                            -- executed.launch -- one interpreter start (60 ms of CPU) per worker
                            -- the name of a private directory (0700) for Unix sockets; who forks or execs makes it

`launch` runs on a launch thread; exits are reported on the leader of the I/O loop. Who removes the directory: `close`;
if the master is killed, the zygote; and where there is none (exec, or the zygote was killed), a shell that waits for
the end of a pipe.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from distpool import directories
from distpool.errors import LaunchWorkerError
from distpool.hints import TYPE_CHECKING, Any
from distpool.managers.forked import ForkServer, Gone
from distpool.managers.process import HOST, LaunchedProcess, LaunchSpec, Loop, no_forks, unlink
from distpool.managers.zygotes import ZygoteProcess, key_of

if TYPE_CHECKING:
    from distpool.managers.executed import Executed

__all__ = ["LaunchSpec", "LaunchedProcess", "Launcher"]

JANITOR = 'read -r nothing; rm -rf -- "$0"'


class Launcher:
    """Starts local processes. `launch` may be called from several threads at once.

    Example: `for process in launcher.launch(spec): print(process.ospid, process.address)`
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        # Protects what follows. Held while a zygote is started (so that two launches start one), never while waiting.
        self._lock = threading.Lock()
        self._zygotes: dict[tuple[Any, ...], ForkServer] = {}
        self._executed: set[Executed] = set()
        self._directory = ""
        self._janitor: subprocess.Popen[bytes] | None = None
        self._janitor_pipe = -1
        self._closed = False
        self._launches: set[object] = set()  # those that may be about to use a zygote, or the directory

    # --- starting ---

    def launch(self, spec: LaunchSpec, meanwhile: Callable[[], object] | None = None) -> Iterator[LaunchedProcess]:
        """Start `spec.count` workers; each is yielded as soon as it lives. Blocking: for a launch thread. `meanwhile`
        is called while a zygote is at work.

        Raises LaunchWorkerError (after the ones that did start) with the reason and the last output. If the iterator
        is dropped early, workers that nobody took are ended.
        """
        mark = object()
        with self._lock:
            self._check_open()
            self._launches.add(mark)
        try:
            self._settle_directory(spec)
            if spec.method == "exec":
                from distpool.managers import executed

                for process in executed.launch(self._loop, spec, self._add_executed, self._drop_executed):
                    if self._closed:  # meanwhile; `close` may not have seen this one
                        process.kill()
                    yield process
            else:
                yield from self._fork(spec, meanwhile or (lambda: None))
        finally:
            self._launches.discard(mark)  # no lock: the collector may end a launch that was dropped

    def _fork(self, spec: LaunchSpec, meanwhile: Callable[[], object]) -> Iterator[LaunchedProcess]:
        """Ask the zygote; if it is found dead, once more with a new one."""
        deadline = time.monotonic() + spec.timeout
        started = 0
        for attempt in (1, 2):
            try:
                zygote = self._zygote(spec)
            except OSError as error:
                raise LaunchWorkerError(HOST, "", f"{spec.argv[0]}: {error}") from None
            try:
                for process in zygote.launch(spec, spec.count - started, deadline, meanwhile):
                    started += 1
                    yield process
                return
            except Gone as error:
                # One that never served anybody died of something that will happen again.
                if attempt == 2 or not zygote.served:
                    raise LaunchWorkerError(HOST, zygote.startup_output(), str(error)) from None

    def _zygote(self, spec: LaunchSpec) -> ForkServer:
        with self._lock:
            self._check_open()
            key = key_of(spec)
            zygote = self._zygotes.get(key)
            if zygote is None or not zygote.alive:
                zygote = self._zygotes[key] = ForkServer(self._loop, ZygoteProcess(spec), self._drop_zygote)
            return zygote

    def adopt(self, started: ZygoteProcess) -> None:
        """Use this zygote, which was started before the launcher was there, for launches of its kind."""
        with self._lock:
            if not self._closed and started.key not in self._zygotes:
                self._zygotes[started.key] = ForkServer(self._loop, started, self._drop_zygote)
                return
        started.discard()  # somebody else was quicker

    def _check_open(self) -> None:
        if self._closed:
            raise LaunchWorkerError(HOST, "", "this program is ending, or has ended its workers")

    def _drop_zygote(self, zygote: ForkServer) -> None:
        """It has ended. Unless that was asked for, somebody else must look after the directory from now on."""
        with self._lock:
            for key in [key for key, value in self._zygotes.items() if value is zygote]:
                del self._zygotes[key]
                if not self._closed:
                    self._start_janitor()

    def _add_executed(self, process: Executed) -> None:
        with self._lock:
            self._executed.add(process)

    def _drop_executed(self, process: Executed) -> None:
        with self._lock:
            self._executed.discard(process)
        if process.launched is not None and process.launched.address[0] == "unix":
            unlink(process.launched.address[1])

    # --- the directory ---

    def _settle_directory(self, spec: LaunchSpec) -> None:
        """Fill in `spec.directory`; without any place for it the workers listen on the loopback device instead."""
        if spec.transport != "unix" or spec.directory:
            return
        with self._lock:
            self._directory = self._directory or directories.choose()
            if not self._directory or (spec.method == "exec" and not directories.make(self._directory)):
                self._directory = ""
                spec.transport = "tcp"
                return
            if spec.method == "exec":
                self._start_janitor()
            spec.directory = self._directory

    def _start_janitor(self) -> None:
        """A shell that removes the directory when our end of its pipe closes. Without a shell it may stay behind."""
        if self._janitor is not None or not self._directory or sys.platform == "win32":
            return
        with no_forks:
            self._open_janitor()

    def _open_janitor(self) -> None:
        try:
            their_end, self._janitor_pipe = os.pipe()
        except OSError:
            return
        try:
            self._janitor = subprocess.Popen(
                ["/bin/sh", "-c", JANITOR, self._directory],
                stdin=their_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except OSError:
            os.close(self._janitor_pipe)
            self._janitor_pipe = -1
        finally:
            os.close(their_end)

    # --- the end ---

    def close_if_idle(self) -> None:
        """End each zygote that has no living worker; the next launch starts a new one. Does not wait.

        Not while something is launched, whose request an idle zygote may be about to get: who launches looks again.
        """
        with self._lock:
            if self._launches:
                return
            idle = {key: zygote for key, zygote in self._zygotes.items() if zygote.idle()}
            for key in idle:
                del self._zygotes[key]
            shared = bool(self._zygotes or self._executed or self._janitor)
            if idle and not shared:
                self._directory = ""  # the last zygote removes it
        for number, zygote in enumerate(idle.values(), 1):
            zygote.retire(keep_directory=shared or number < len(idle))

    def close(self) -> None:
        """End all workers and zygotes, wait for them (seconds at most), remove the directory. Idempotent."""
        with self._lock:
            self._closed = True
            zygotes, self._zygotes = list(self._zygotes.values()), {}
            running, self._executed = list(self._executed), set()
            janitor, self._janitor = self._janitor, None
            directory, self._directory = self._directory, ""
        try:
            for process in running:
                process.close()
            for zygote in zygotes:
                zygote.close()
        finally:
            if directory:
                directories.remove(directory)
            if janitor is not None:
                os.close(self._janitor_pipe)
                self._janitor_pipe = -1
                janitor.kill()  # nothing is left for it to do
                janitor.wait()

    def forget_after_fork(self) -> None:
        """In a forked child of the master: close inherited descriptors and forget all; the parent is not disturbed.

        No lock is taken (another thread may have held it at the fork) and nothing is unregistered (the selector is
        shared with the parent).
        """
        for zygote in self._zygotes.values():
            zygote.forget()
        for process in self._executed:
            process.forget()
        if self._janitor is not None:
            os.close(self._janitor_pipe)
            self._janitor.returncode = 0
        self.__init__(self._loop)  # type: ignore[misc]
        self._closed = True
