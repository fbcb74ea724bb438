"""The master's end of one zygote: asks for forks, hands out the processes, hears of their ends (layer 8).

    launch thread --request--> zygote (distpool.zygote) --answers--> leader of the I/O loop --queue--> launch thread
                                                        --exits----> LaunchedProcess.ended

`launch` runs on the caller's thread and waits in a queue, bounded by the order's time-out. Everything that the zygote
says is read on the loop's leader (in `close`: on the closing thread). A zygote that ends takes its workers with it, so
all of them are reported as ended, with an unknown exit status.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from distpool import config
from distpool.errors import LaunchWorkerError
from distpool.hints import Any
from distpool.managers.process import HOST, LaunchedProcess, LaunchSpec, Loop, last_lines, unlink
from distpool.managers.surroundings import limits
from distpool.managers.zygotes import ZygoteProcess
from distpool.sigpipe import QUIET

FRAME = struct.Struct("!I")
"""As in distpool.zygote, which is in a higher layer."""

CLOSE_SECONDS = 5.0
"""What a zygote may take to end its workers; then it is killed."""


class Gone(Exception):
    """The zygote ended before it answered."""


class _Request:
    """One `launch` that waits: its answers, and how many are still to come."""

    def __init__(self, missing: int) -> None:
        self.answers: queue.SimpleQueue[LaunchedProcess | Exception] = queue.SimpleQueue()
        self.missing = missing


class ForkServer:
    """One zygote process. `alive` is False once it has ended or has been told to."""

    def __init__(self, loop: Loop, started: ZygoteProcess, on_end: Callable[[ForkServer], None]) -> None:
        self._loop = loop
        self._on_end = on_end
        self.alive = True
        self.served = False
        self._ended = False
        self._losing = False
        self._epitaph = ""
        self._children: dict[int, LaunchedProcess] = {}
        self._requests: dict[int, _Request] = {}
        self._ids = itertools.count(1)
        self._received = bytearray()
        self._batches: deque[list[int]] = deque()
        self._said = bytearray()
        self._outbox = bytearray()
        # Protects `_children`, `_requests`, `alive`, `_losing`, `_ended`, `_outbox` (so that messages are not mixed).
        self._lock = threading.Lock()
        # Held while reading: by the leader, or by the thread that closes. Never together with a wait.
        self._reading = threading.Lock()
        self._process, self._startup = started.process, started.startup
        self._control = socket.socket(fileno=started.control)
        self._control.setblocking(False)  # the program may have set a default of its own
        self._given = started.given
        self._limits = limits() if started.given is not None else {}
        loop.register(self._startup, self._on_startup)
        loop.register(self._control, self._on_readable)

    # --- the launch thread ---

    def launch(
        self, spec: LaunchSpec, count: int, deadline: float, meanwhile: Callable[[], object]
    ) -> Iterator[LaunchedProcess]:
        """Yield `count` forked workers. LaunchWorkerError: refused, or too late; Gone: the zygote has ended."""
        request = _Request(count)
        with self._lock:
            if self._ended:
                raise Gone(self._epitaph)
            number = next(self._ids)
            self._requests[number] = request
        try:
            settings = {**spec.settings(), "env": spec.env, "given": self._given}
            if self._given is not None:  # what the user's command has changed for its workers stays
                settings["limits"] = {
                    name: value for name, value in limits().items() if self._limits.get(name) != value
                }
            self._send({"id": number, "count": count, "settings": settings}, deadline)
            meanwhile()
            for _ in range(count):
                try:
                    answer = request.answers.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    self._give_up()
                    reason = f"no answer within {spec.timeout:g} seconds"
                    raise LaunchWorkerError(HOST, self.startup_output(), reason) from None
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            self._abandon(number, request)

    def _abandon(self, number: int, request: _Request) -> None:
        """Nobody will take further answers: what has come or still comes is ended."""
        with self._lock:
            self._requests.pop(number, None)
        while True:
            try:
                answer = request.answers.get_nowait()
            except queue.Empty:
                return
            if isinstance(answer, LaunchedProcess):
                discard(answer)

    def _give_up(self) -> None:
        """A zygote that never answered anybody (stuck in an import) would hold up the next launch as well."""
        if not self.served:
            self.alive = False
            self._process.kill()

    def startup_output(self) -> str:
        """What the zygote printed before it began to serve (tracebacks of imports)."""
        return last_lines(bytes(self._said), config.OUTPUT_LINES)

    # --- sending ---

    def _send(self, message: dict[str, Any], deadline: float = 0.0) -> None:
        """Send one message; waits for room until `deadline` (monotonic), without holding the lock."""
        text = json.dumps(message).encode()
        with self._lock:
            self._outbox += FRAME.pack(len(text)) + text
        while not self._flush():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return  # the rest goes out with whoever sends next
            room = select.poll()
            with contextlib.suppress(ValueError):  # it has ended just now, and the socket is closed
                room.register(self._control, select.POLLOUT)
                room.poll(remaining * 1000)

    def _flush(self) -> bool:
        """Send what the socket takes; True when nothing is left."""
        with self._lock:
            try:
                while self._outbox and not self._ended:
                    sent = self._control.send(self._outbox, QUIET)
                    del self._outbox[:sent]
            except BlockingIOError:
                return False
            except OSError:
                pass  # it has ended; the end of file says so to everybody who waits
            return True

    # --- the leader ---

    def _on_startup(self) -> None:
        try:
            data = os.read(self._startup, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._said += data
            del self._said[:-65536]
        else:
            self._close_startup()

    def _close_startup(self) -> None:
        if self._startup >= 0:
            self._loop.unregister(self._startup)
            os.close(self._startup)
            self._startup = -1

    def _on_readable(self) -> None:
        """Take what the zygote has said; at its end, settle everything."""
        ends: list[Callable[[], None]] = []
        with self._reading:
            over = self._ended or self._receive(ends)
        for end in ends:
            end()
        if over:
            self._lost()

    def _receive(self, ends: list[Callable[[], None]]) -> bool:
        """Read until nothing is there; True at the end. `ends` collects what must be told without the lock."""
        while True:
            try:
                data, descriptors, flags, _ = socket.recv_fds(
                    self._control, 65536, 8, getattr(socket, "MSG_CMSG_CLOEXEC", 0)
                )
            except BlockingIOError:
                return False
            except OSError:
                return True
            if descriptors or flags & socket.MSG_CTRUNC:
                # At most one message's descriptors come with one read; fewer than it says: we have run out of them.
                self._batches.append(descriptors)
            if not data:
                return True
            self._received += data
            while len(self._received) >= FRAME.size:
                (length,) = FRAME.unpack_from(self._received)
                if len(self._received) < FRAME.size + length:
                    break
                message = json.loads(self._received[FRAME.size : FRAME.size + length])
                del self._received[: FRAME.size + length]
                self._handle(message, ends)

    def _handle(self, message: dict[str, Any], ends: list[Callable[[], None]]) -> None:
        if "exited" in message:
            with self._lock:
                process = self._children.pop(message["exited"], None)
            if process is not None:
                ends.append(partial(process.ended, message["status"]))
        elif "error" in message:
            with self._lock:
                request = self._requests.pop(message["id"], None)
            if request is not None:
                request.answers.put(LaunchWorkerError(HOST, self.startup_output(), message["error"]))
        else:
            self._born(message)

    def _born(self, message: dict[str, Any]) -> None:
        descriptors = self._batches.popleft()
        ospid = message["ospid"]
        if len(descriptors) < message["fds"]:
            for descriptor in descriptors:
                os.close(descriptor)
            self._send({"kill": ospid, "signal": 9})
            answer: LaunchedProcess | Exception = LaunchWorkerError(HOST, "", "no file descriptors left")
        else:
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            os.set_blocking(descriptors[0], False)
            kind, *where = message["address"]
            pidfd = descriptors[1] if len(descriptors) > 1 else -1
            answer = LaunchedProcess(ospid, (kind, *where), descriptors[0], partial(self._signal, ospid), pidfd)
        with self._lock:
            self.served = True
            if isinstance(answer, LaunchedProcess):
                self._children[ospid] = answer
            request = self._requests.get(message["id"])
            if request is not None:
                request.answers.put(answer)
                request.missing -= 1
                if not request.missing:
                    del self._requests[message["id"]]
        if request is None and isinstance(answer, LaunchedProcess):
            discard(answer)

    def _signal(self, ospid: int, signum: int) -> None:
        self._send({"kill": ospid, "signal": signum})

    def _lost(self) -> None:
        """The zygote is at its end, and with it all its workers. Runs once."""
        with self._lock:
            if self._losing:
                return
            self._losing = True
            self.alive = False
        self._process.kill()  # it closes its end last of all, so this only makes the wait short
        code = self._process.wait()
        with self._lock:
            self._ended = True
            self._epitaph = f"the zygote process ended with code {code}"
            requests, self._requests = list(self._requests.values()), {}
            children, self._children = list(self._children.values()), {}
        self._loop.unregister(self._control)
        self._control.close()
        self._on_end(self)
        if self._startup >= 0:
            self._on_startup()
            self._close_startup()
        for request in requests:
            request.answers.put(Gone(self._epitaph))
        for process in children:
            process.kill()
            if process.address[0] == "unix":
                unlink(process.address[1])
            process.epitaph = self._epitaph
            process.ended(None)

    # --- the end ---

    def idle(self) -> bool:
        """Whether no worker of it lives and none is being started."""
        with self._lock:
            return not self._children and not self._requests

    def retire(self, keep_directory: bool) -> None:
        """Tell it to end, and return at once; used when it is idle."""
        self.alive = False
        if keep_directory:
            self._send({"keep": True})
        self._shutdown()

    def _shutdown(self) -> None:
        """The end of file reaches the zygote even if forked children of ours still hold this socket."""
        try:
            self._control.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has ended by itself

    def close(self) -> None:
        """End the zygote and its workers; returns when they are gone, or after `CLOSE_SECONDS` and a kill."""
        with self._lock:
            self.alive = False
            # A copy of our own, since the leader closes the original as soon as it sees the end.
            said = -1 if self._ended else self._control.dup().detach()
        if said < 0:
            return
        self._shutdown()
        # The loop may have stopped already, so the last reports are read here.
        self._loop.unregister(self._control)
        poll = select.poll()
        poll.register(said, select.POLLIN)
        deadline = time.monotonic() + CLOSE_SECONDS
        while not self._ended:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not poll.poll(remaining * 1000):
                self._process.kill()
                self._lost()
                break
            self._on_readable()
        os.close(said)
        self._process.wait()  # killed by `_lost`, perhaps on another thread

    def forget(self) -> None:
        """In a forked child: close, nothing else. No lock: another thread may have held it at the fork."""
        self._control.close()
        if self._startup >= 0:
            os.close(self._startup)
            self._startup = -1
        for process in self._children.values():
            process.forget()
        self._process.returncode = 0  # not our child any more: there is nothing to wait for


def discard(process: LaunchedProcess) -> None:
    """End a worker that nobody wants."""
    process.kill()
    os.close(process.output)
