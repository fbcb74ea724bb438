"""Further workers on the host of this one (layer 11): a manager that reaches a host once need not log in again.

    master --LAUNCH count--> leader -> library thread: `python -m distpool worker` for each, cookie over stdin
    master <--LAUNCHED------ where they listen, or why they do not
    master --NAMED---------> their pids: from then on their output goes to our stdout, each line with its prefix

The children live and die with their connection to the master, and outlive us: then their output takes another way
(`orphans`). Their lines carry the prefix already, so the master does not add ours.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from functools import partial
from typing import IO, Any

from distpool import config
from distpool.managers.base import parse_header
from distpool.managers.process import PACKAGE, no_forks
from distpool.node.node import Node
from distpool.orphans import VARIABLE
from distpool.sigpipe import quietly
from distpool.transport.link import Link
from distpool.wire import messages
from distpool.wire.frames import Frame, Kind

_MAX_BANNER = 1000
_EXIT_GRACE = 1.0  # seconds that a process may take to exit once its output has ended


class _Child:
    """One process that this worker has started."""

    def __init__(self, number: int, command: list[str], cookie: str, env: dict[str, str]) -> None:
        self.number = number
        self.pid = 0
        self.named = threading.Event()
        self.address: tuple[str, int] | None = None
        self.said: list[str] = []
        self.settled = threading.Event()  # the header line has come, or never will
        self.lifeline = -1  # while the child lives; our end tells it (`orphans`)
        with no_forks:
            self._start(command, env)
        assert self.process.stdin is not None
        # It may have died at once: its output says why.
        with contextlib.suppress(OSError), quietly(), self.process.stdin as stdin:
            stdin.write(cookie.encode() + b"\n")

    def _start(self, command: list[str], env: dict[str, str]) -> None:
        with contextlib.ExitStack() as passed_on, contextlib.ExitStack() as kept:
            output, writing = os.pipe()
            kept.callback(os.close, output)
            passed_on.callback(os.close, writing)
            waiting, lifeline = os.pipe()
            kept.callback(os.close, lifeline)
            passed_on.callback(os.close, waiting)
            more: dict[str, Any] = {"env": env}
            if sys.platform != "win32":
                more = {"env": {**env, VARIABLE: f"{output},{waiting}"}, "pass_fds": (output, waiting)}
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=writing, stderr=subprocess.STDOUT, **more
            )
            kept.pop_all()
        self._output, self.lifeline = output, lifeline

    def close_lifeline(self) -> None:
        """It is over, or this is a forked child of ours, which may live longer than we."""
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1

    def read(self) -> None:
        """On a thread of its own: the header, then the output, until its end."""
        with open(self._output, "rb") as stream:
            self._read_header(stream)
            self.settled.set()
            if self.address is not None:
                self._relay(stream)
        self.process.wait()
        self.close_lifeline()

    def _read_header(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            self.address = parse_header(line)
            if self.address is not None:
                return
            self.said.append(line)
            if len(self.said) > _MAX_BANNER:
                self.process.kill()
                return

    def _relay(self, stream: IO[bytes]) -> None:
        for raw in stream:
            self.named.wait(config.worker_timeout())
            line = raw.decode("utf-8", "replace").rstrip("\n")
            with contextlib.suppress(OSError, ValueError):
                os.write(1, f"      From worker {self.pid}:\t{line}\n".encode())

    def problem(self) -> list[str]:
        """Why it did not come up, and its last lines."""
        if self.settled.is_set():  # its output has ended, and its exit status says why
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_EXIT_GRACE)
        code = self.process.poll()
        reason = "it printed no header line in time" if code is None else f"exit code {code} before it was ready"
        self.process.kill()
        return [reason, "\n".join(self.said[-config.OUTPUT_LINES :])]


class Siblings:
    """Answers LAUNCH. The methods run on the leader unless they say otherwise."""

    def __init__(self, node: Node, link: Link, bound_to: str) -> None:
        self._node = node
        self._bound_to = bound_to  # the address on which this worker listens: theirs too
        self._link = link
        self._children: dict[int, _Child] = {}
        self._living: set[_Child] = set()
        node.on_fork.append(self._forked)
        node.handlers[Kind.LAUNCH] = self._on_launch
        node.handlers[Kind.NAMED] = self._on_named

    def _on_launch(self, link: Link, frame: Frame) -> None:
        message = messages.Launch.unpack(frame.control)
        self._node.deliver(lambda: self._launch(message))

    def _launch(self, message: messages.Launch) -> None:
        """On a library thread."""
        count = (_cpus() - 1) if message.count == "auto" else int(message.count)
        command = [*(message.command or [sys.executable]), "-m", "distpool", "worker"]
        if self._bound_to:
            command += ["--bind-to", self._bound_to]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([PACKAGE, os.environ.get("PYTHONPATH", "")]).rstrip(":")}
        problems: list[list[str]] = []
        children: list[_Child] = []
        for _ in range(count):
            number = len(self._children)
            try:
                child = _Child(number, command, self._node.cookie, env)
            except OSError as error:
                problems.append([f"{command[0]}: {error}", ""])
                continue
            self._children[number] = child
            children.append(child)
            self._living.add(child)
            self._node.deliver(partial(self._read, child))
        workers: list[list[Any]] = []
        deadline = message.timeout
        for child in children:
            child.settled.wait(deadline)
            if child.address is None:
                problems.append(child.problem())
                deadline = min(deadline, 1.0) if child.process.poll() is None else deadline
            else:
                workers.append([child.number, *child.address])
        self._link.send(Kind.LAUNCHED, messages.Launched(workers, problems).pack())

    def _read(self, child: _Child) -> None:
        """On a library thread."""
        child.read()
        self._living.discard(child)

    def _forked(self) -> None:
        for child in self._living:
            child.close_lifeline()

    def _on_named(self, link: Link, frame: Frame) -> None:
        for number, pid in messages.Named.unpack(frame.control).pids:
            child = self._children.pop(number, None)
            if child is not None:
                child.pid = pid
                child.named.set()


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


__all__ = ["Siblings"]
