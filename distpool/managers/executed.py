"""Workers started by executing the interpreter: everywhere where there is no fork, or where it is not wanted (layer 8).

    launch thread: Popen for all --settings line--> stdin       (distpool.startup.exec_main)
                                 <--header line---- stdout, `distpool_worker:PORT#ADDR`; what else is read is kept
    leader of the I/O loop <-- pidfd readable: exit status      (elsewhere: a thread that waits)

The cookie travels through stdin, never on a command line. stdin stays open as the worker's lifeline: when the master
is gone it closes, and the worker dies (see distpool.startup for how, also while it holds the GIL).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from distpool import config
from distpool.errors import LaunchWorkerError
from distpool.managers.base import parse_header
from distpool.managers.process import HOST, LaunchedProcess, LaunchSpec, Loop, boot_code, last_lines, no_forks
from distpool.sigpipe import quietly

MAX_NOISE = 1 << 20
"""Bytes that may come before the header line."""


class _Starting:
    """A process whose header line has not come yet."""

    def __init__(self, process: subprocess.Popen[bytes], output: int, lifeline: int) -> None:
        self.process = process
        self.output = output
        self.lifeline = lifeline
        self.said = bytearray()

    def end(self) -> None:
        """It is not wanted: kill, wait, close."""
        self.process.kill()
        self.process.wait()
        os.close(self.output)
        os.close(self.lifeline)


class Executed:
    """One running process: reports its exit, keeps its lifeline."""

    def __init__(self, loop: Loop, starting: _Starting, on_end: Callable[[Executed], None]) -> None:
        self._loop = loop
        self._process = starting.process
        self._lifeline = starting.lifeline
        self._on_end = on_end
        self._lock = threading.Lock()  # protects `_over`: the leader and `close` may both see the end
        self._over = False
        self._pidfd = -1
        self.launched: LaunchedProcess | None = None

    def watch(self, launched: LaunchedProcess) -> None:
        """Begin to wait for the end of the process."""
        self.launched = launched
        if sys.platform == "linux":
            try:
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError:
                pass  # an old kernel or no descriptor left: a thread waits
        if self._pidfd >= 0:
            self._loop.register(self._pidfd, self.ended)
        else:
            threading.Thread(target=self._wait, name=f"distpool-wait-{self._process.pid}", daemon=True).start()

    def _wait(self) -> None:
        self._process.wait()
        self._loop.call_soon(self.ended)

    def send_signal(self, signum: int) -> None:
        """Send a signal; Popen looks first whether the process has ended, and nobody else reaps it."""
        try:
            self._process.send_signal(signum)
        except OSError:
            pass  # ended just now

    def ended(self) -> None:
        """The process has ended: reap it, close what was for it, tell. Runs once."""
        with self._lock:
            if self._over:
                return
            self._over = True
        code = self._process.wait()
        if self._pidfd >= 0:
            self._loop.unregister(self._pidfd)
            os.close(self._pidfd)
        os.close(self._lifeline)
        self._on_end(self)
        if self.launched is not None:
            self.launched.ended(code)

    def close(self) -> None:
        """End the process now."""
        self.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        self.ended()

    def forget(self) -> None:
        """In a forked child of the master: only close."""
        for descriptor in (self._pidfd, self._lifeline):
            if descriptor >= 0:
                os.close(descriptor)
        self._process.returncode = 0  # not our child: keeps Popen's finalizer quiet
        if self.launched is not None:
            self.launched.forget()


def _open(spec: LaunchSpec) -> tuple[subprocess.Popen[bytes], int, int]:
    """The process, the read end of its output, and the write end of its stdin."""
    opened: list[int] = []
    try:
        for _ in range(2):
            opened += os.pipe()
        output, their_output, stdin, lifeline = opened
        code = boot_code("from distpool.startup import exec_main; exec_main(own)", [])
        options: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        process = subprocess.Popen(
            [*spec.argv, "-c", code], stdin=stdin, stdout=their_output, stderr=their_output, env=spec.env, **options
        )
    except BaseException:
        for descriptor in opened:
            os.close(descriptor)
        raise
    os.close(their_output)
    os.close(stdin)
    return process, output, lifeline


def start(spec: LaunchSpec) -> _Starting:
    """Start one process and give it its settings. OSError: the interpreter does not exist, fork refused, ..."""
    line = memoryview(json.dumps(spec.settings()).encode() + b"\n")
    with no_forks:
        process, output, lifeline = _open(spec)
    starting = _Starting(process, output, lifeline)
    try:
        with quietly():
            while line:  # short, and the worker reads it first of all
                line = line[os.write(lifeline, line) :]
    except OSError:
        pass  # it died at once; its output says why
    return starting


def launch(
    loop: Loop, spec: LaunchSpec, on_start: Callable[[Executed], None], on_end: Callable[[Executed], None]
) -> Iterator[LaunchedProcess]:
    """Start `spec.count` processes at once and yield each when it has printed its header.

    LaunchWorkerError, after the good ones: what happened to the first bad one, with its output.
    """
    deadline = time.monotonic() + spec.timeout
    problem: LaunchWorkerError | None = None
    pending: list[_Starting] = []
    try:
        for _ in range(spec.count):
            try:
                pending.append(start(spec))
            except OSError as error:
                problem = LaunchWorkerError(HOST, "", f"{spec.argv[0]}: {error}")
                break
        for starting, address, rest in _headers(pending, deadline):
            if address is None:
                problem = problem or LaunchWorkerError(HOST, _text(starting), _reason(starting, spec.timeout))
                starting.end()
                continue
            os.set_blocking(starting.output, False)
            executed = Executed(loop, starting, on_end)
            on_start(executed)
            launched = LaunchedProcess(
                starting.process.pid, address, starting.output, executed.send_signal, early_output=rest
            )
            executed.watch(launched)
            yield launched
    finally:
        for starting in pending:
            starting.end()
    if problem is not None:
        raise problem


def _headers(pending: list[_Starting], deadline: float) -> Iterator[tuple[_Starting, tuple[Any, ...] | None, bytes]]:
    """Each process as soon as its header has come: its address, and its other output so far.

    Address `None`: it ended, talked too much, or the deadline came. What is yielded has left `pending`.
    """
    if sys.platform == "win32":
        yield from _headers_by_threads(pending, deadline)
        return
    with selectors.DefaultSelector() as selector:
        for starting in pending:
            selector.register(starting.output, selectors.EVENT_READ, starting)
        while pending:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready and time.monotonic() >= deadline:
                break
            for key, _ in ready:
                outcome = _advance(key.data)
                if outcome is not None:
                    selector.unregister(key.fd)
                    pending.remove(key.data)
                    yield key.data, *outcome
    while pending:
        yield pending.pop(0), None, b""


def _advance(starting: _Starting) -> tuple[tuple[Any, ...] | None, bytes] | None:
    """Read once what a process says; its outcome if that is clear now."""
    data = os.read(starting.output, 65536)
    starting.said += data
    lines = starting.said.split(b"\n")
    for index, line in enumerate(lines[:-1]):
        found = parse_header(line.decode(errors="surrogateescape"))
        if found is not None:
            host, port = found
            address = ("unix", host.removeprefix("unix:")) if host.startswith("unix:") else ("tcp", host, port)
            return address, b"\n".join(lines[:index] + lines[index + 1 :])
    if not data or len(starting.said) > MAX_NOISE:
        return None, b""
    return None


def _headers_by_threads(
    pending: list[_Starting], deadline: float
) -> Iterator[tuple[_Starting, tuple[Any, ...] | None, bytes]]:
    """Where pipes cannot be polled (Windows): one reading thread per process that is starting."""
    import queue

    outcomes: queue.SimpleQueue[tuple[_Starting, tuple[Any, ...] | None, bytes]] = queue.SimpleQueue()

    def read(starting: _Starting) -> None:
        outcome = None
        while outcome is None:
            outcome = _advance(starting)
        outcomes.put((starting, *outcome))

    for starting in pending:
        threading.Thread(target=partial(read, starting), name="distpool-header", daemon=True).start()
    while pending:
        try:
            outcome = outcomes.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        pending.remove(outcome[0])
        yield outcome
    while pending:
        yield pending.pop(0), None, b""


def _text(starting: _Starting) -> str:
    return last_lines(bytes(starting.said), config.OUTPUT_LINES)


def _reason(starting: _Starting, timeout: float) -> str:
    """Why a process did not become a worker."""
    if len(starting.said) > MAX_NOISE:
        return "it printed too much before its header line"
    try:
        # Its output has ended, so its exit is at most moments away.
        code = starting.process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return f"no header line within {timeout:g} seconds"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code} before it was ready"
