"""What the zygote process runs: it forks workers on request and reports their ends (layer 11).

    launcher (master) --socketpair--> zygote: python -c, what workers need at once (the rest later), one thread
      {id, count, settings}    ---->    per worker: socket that listens, pipe for its output, lifeline pipe; os.fork()
      {id, ospid, address}     <----      with the output's read end (and a pidfd) as SCM_RIGHTS
      {id, error, missing}     <----      fork refused, descriptors exhausted: that request fails, the zygote lives
      {kill: ospid, signal}    ---->
      {exited: ospid, status}  <----    at once, from SIGCHLD; status is the exit code or minus the signal
      end of file, or the master's pidfd: kill -9 for all children, wait for them, remove the sockets, exit

Messages are JSON behind a four byte length: nothing is unpickled here. The zygote has one thread, because fork and
threads do not go together; and it runs no user code, so that it can always answer.

A worker dies with its zygote even while it holds the GIL in C (`startup.arm_lifeline`): the zygote holds the write end
of one pipe per worker.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterable

from distpool import config, directories
from distpool.hints import Any, NamedTuple, NoReturn
from distpool.startup import address_of, become_worker, default_signals, ignore, listen, remove, unix_path

if sys.platform != "win32":
    import resource

FEW = 4
"""Workers that are forked before all is loaded, at most: they load the rest themselves when they have time."""

PAUSE = 0.01
"""Seconds until the system may have again what a message takes."""

_SHORT = (errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)  # of memory; of descriptors that may be under way

FRAME = struct.Struct("!I")
"""Length of a control message in front of its JSON."""


class Birth(NamedTuple):
    """What a newly forked child needs to become a worker."""

    listener: socket.socket
    settings: dict[str, Any]
    output: int
    lifeline: int


class Child(NamedTuple):
    """What the zygote keeps of a living worker."""

    lifeline: int
    path: str


# --- the zygote -------------------------------------------------------------------------------------------------------


def main(control: int, master: int, entry: str, own_path: list[str]) -> NoReturn:
    """Serve fork requests on the socket `control` until the process `master` is gone; never returns.

    In each forked child this function goes on as the worker. Called by `-c`, which has set sys.path; `own_path` is
    what it was before.
    """
    gc.disable()
    default_signals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the zygote's own; `serve` undoes it in children
    problem = preload([entry.partition(":")[0]])
    limit = raise_descriptor_limit()
    _stdio_to_null()
    os.chdir("/")  # a zygote keeps no directory busy
    gc.freeze()
    birth = Zygote(control, master, problem).serve()
    # Only children come here. The frozen objects stay frozen: unfreezing would let every full collection write to the
    # headers of all modules' objects, and with that copy the pages that workers share (about 5 MB each).
    gc.enable()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    become_worker(birth.listener, birth.settings, birth.output, birth.lifeline, own_path)


def preload(names: Iterable[str]) -> str:
    """Import what workers need; the text of the problem if that fails (each request is answered with it)."""
    try:
        for name in names:
            importlib.import_module(name)
    except Exception:
        import traceback

        return traceback.format_exc()
    return ""


def raise_descriptor_limit() -> tuple[int, int] | None:
    """A zygote holds one descriptor per worker; the old limits are returned, for the children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        return None
    return soft, hard


def send_signal(ospid: int, signum: int) -> bool:
    """False: it was refused. A child that has become another user (a program with the setuid bit, say) is not ours to
    end any more, and all the others are not to pay for it."""
    try:
        os.kill(ospid, signum)
    except OSError:
        return False
    return True


def _stdio_to_null() -> None:
    """From here on nothing of the zygote may appear anywhere; the launcher sees the end of its start-up output."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


class Zygote:
    """The serving loop. `serve` returns only in a child, as that child's `Birth`."""

    def __init__(self, control: int, master: int, problem: str) -> None:
        self.control = socket.socket(fileno=control)
        self.control.setblocking(False)
        self.directory = ""  # that of the workers' sockets; removed at the end
        self.problem = problem
        self.children: dict[int, Child] = {}
        self.received = bytearray()
        self.count = 0
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(self.wake_write, False)
        self.complete = False  # all that workers may need is loaded
        self.poll = select.poll()
        self.poll.register(self.control, select.POLLIN)
        self.poll.register(self.wake_read, select.POLLIN)
        self.master_gone = -1
        # A process forked by the master may hold copies of the control socket, so its end of file may never come.
        if sys.platform == "linux":
            try:
                self.master_gone = os.pidfd_open(master)
                self.poll.register(self.master_gone, select.POLLIN)
            except OSError:
                pass  # an old kernel, or no descriptor left: the end of file has to do
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler of Python's makes the C one write to the pipe

    def serve(self) -> Birth:
        """Answer requests until the master is gone (then exit), or until this is a new child."""
        while True:
            ready = self.poll.poll(None if self.complete else config.REST_SECONDS * 1000)
            if not ready:
                self._complete()
            for descriptor, _ in ready:
                if descriptor == self.wake_read:
                    self._reap()
                elif descriptor == self.master_gone:
                    self._stop()
                else:
                    birth = self._receive()
                    if birth is not None:
                        return birth

    def _complete(self) -> None:
        """Load the rest, once: with it each worker would start 10 ms later, and without it each would load its own."""
        if not self.complete:
            self.complete = True
            self.problem = self.problem or preload(config.PRELOAD)
            gc.collect()
            gc.freeze()

    def _receive(self) -> Birth | None:
        try:
            data = self.control.recv(65536)
        except BlockingIOError:
            return None
        except OSError:
            self._stop()
        if not data:
            self._stop()
        self.received += data
        while len(self.received) >= FRAME.size:
            (length,) = FRAME.unpack_from(self.received)
            if len(self.received) < FRAME.size + length:
                break
            message = json.loads(self.received[FRAME.size : FRAME.size + length])
            del self.received[: FRAME.size + length]
            birth = self._handle(message)
            if birth is not None:
                return birth
        return None

    def _handle(self, message: dict[str, Any]) -> Birth | None:
        if "count" in message:
            return self._fork(message)
        if "kill" in message:
            # Nobody else reaps, so an id that is in the table cannot have been given to another process.
            if message["kill"] in self.children:
                send_signal(message["kill"], message["signal"])
        elif "keep" in message:
            self.directory = ""  # others still use it: the launcher will remove it
        return None

    def _fork(self, request: dict[str, Any]) -> Birth | None:
        """Fork `count` workers, answering for each as soon as it lives."""
        if request["count"] > FEW:
            self._complete()
        ignore(
            request["settings"].get("ignored") or []
        )  # itself too: what is sent to all must not end it and all workers
        for done in range(request["count"]):
            try:
                if self.problem:
                    raise RuntimeError(self.problem)
                birth = self._fork_one(request)
            except (OSError, RuntimeError) as error:
                self._send({"id": request["id"], "error": str(error), "missing": request["count"] - done})
                return None
            if birth is not None:
                return birth
        return None

    def _fork_one(self, request: dict[str, Any]) -> Birth | None:
        """One worker: `None` in the zygote, which has answered; the `Birth` in the child. OSError: nothing is left."""
        settings = request["settings"]
        if settings["transport"] == "unix":
            if directories.make(settings["directory"]):  # mostly it is there
                self.directory = settings["directory"]
            else:
                settings = {**settings, "transport": "tcp"}
        self.count += 1
        opened: list[int] = []
        listener = listen(settings, f"{os.getpid()}-{self.count}")
        path = unix_path(listener)
        try:
            for _ in range(2):
                opened += os.pipe()
            output, worker_output, lifeline, own_lifeline = opened
            ospid = os.fork()
        except OSError:
            for descriptor in opened:
                os.close(descriptor)
            listener.close()
            remove(path)
            raise
        if ospid == 0:
            self._leave()
            os.close(output)
            os.close(own_lifeline)
            return Birth(listener, settings, worker_output, lifeline)
        self.children[ospid] = Child(own_lifeline, path)
        address = address_of(listener, settings)
        listener.close()
        os.close(worker_output)
        os.close(lifeline)
        descriptors = [output]
        if sys.platform == "linux":
            try:
                descriptors.append(os.pidfd_open(ospid))  # not reaped yet, so it cannot be somebody else
            except OSError:
                pass  # then the launcher sends its signals through us
        answer = {"id": request["id"], "ospid": ospid, "address": address, "fds": len(descriptors)}
        self._send(answer, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    def _leave(self) -> None:
        """In a child: give up everything that is the zygote's. Objects are closed, not only their numbers: a number
        is used again, and the collector would then close the new owner's descriptor."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.control.close()
        for descriptor in (self.wake_read, self.wake_write, self.master_gone):
            if descriptor >= 0:
                os.close(descriptor)
        for child in self.children.values():
            os.close(child.lifeline)
        self.children.clear()

    def _send(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        """Send one message; descriptors travel with its first byte. Waits for room, or the master's end."""
        text = json.dumps(message).encode()
        data = memoryview(FRAME.pack(len(text)) + text)
        while data:
            try:
                if descriptors:
                    sent = socket.send_fds(self.control, [data], descriptors)
                else:
                    sent = self.control.send(data)
            except BlockingIOError:
                self._wait_for_room()
                continue
            except OSError as error:
                if error.errno not in _SHORT:
                    self._stop()
                self._wait_for_room(PAUSE)  # to end here would be the end of all workers
                continue
            descriptors = None
            data = data[sent:]

    def _wait_for_room(self, pause: float | None = None) -> None:
        """With `pause`: for that long, because it is not the socket that has none."""
        poll = select.poll()
        if pause is None:
            poll.register(self.control, select.POLLOUT)
        if self.master_gone >= 0:
            poll.register(self.master_gone, select.POLLIN)
        if any(descriptor == self.master_gone for descriptor, _ in poll.poll(pause and pause * 1000)):
            self._stop()

    def _reap(self) -> None:
        """Report every child that has ended."""
        try:
            while os.read(self.wake_read, 4096):
                pass
        except BlockingIOError:
            pass
        while self.children:
            ospid, status = os.waitpid(-1, os.WNOHANG)
            if not ospid:
                break
            if ospid not in self.children:
                continue  # an import of the preload started it
            self._bury(ospid)
            self._send({"exited": ospid, "status": os.waitstatus_to_exitcode(status)})

    def _bury(self, ospid: int) -> None:
        child = self.children.pop(ospid)
        os.close(child.lifeline)
        remove(child.path)

    def _stop(self) -> NoReturn:
        """The master has closed, or is gone: end everything, tell whoever still listens, leave nothing."""
        for ospid in list(self.children):
            if not send_signal(ospid, signal.SIGKILL):
                self.children.pop(ospid)  # it may run for ever
        for ospid in list(self.children):
            _, status = os.waitpid(ospid, 0)
            self._bury(ospid)
            text = json.dumps({"exited": ospid, "status": os.waitstatus_to_exitcode(status)}).encode()
            try:
                self.control.send(FRAME.pack(len(text)) + text)
            except OSError:
                pass  # nobody is there
        if self.directory:
            try:
                os.rmdir(self.directory)
            except OSError:
                pass  # not empty: another zygote of this master is about to do it; or gone already
        os._exit(0)
