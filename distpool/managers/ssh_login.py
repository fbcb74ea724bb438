"""One login as the master sees it: brings up its workers, hands out their output, hears of their ends (layer 8).

    thread of the login:  connect -> run -> settings to stdin -> events (`login_protocol`) until the end
                            worker  -> `on_worker(WorkerConfig)`
                            output  -> pipe of that worker, which the group reads like any local worker's
                            exited  -> RemoteProcess.ended
    second thread:        stderr of the login; its last lines explain a failure

The thread of the login may wait for the group to take a worker's output; then the others of that host wait as well.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distpool import config
from distpool.errors import DistpoolError, LaunchWorkerError, VersionMismatchError
from distpool.managers.login_protocol import EventReader, LoginSettings
from distpool.managers.process import SIGKILL, LaunchedProcess, last_lines
from distpool.managers.record import WorkerConfig
from distpool.managers.ssh_client import Connection, LoginError, Session
from distpool.sigpipe import quietly

MAX_BANNER = 1000
"""Lines that the shell may print before our own output begins (CONFORMANCE C201)."""

_CHUNK = 65536
_KILL_SECONDS = 5.0  # that a host has to report the end of a worker which was killed; then it counts as ended
_END_SECONDS = 5.0  # that a login may take to end
_STATUS_SECONDS = 2.0  # for the exit status behind the end of the output
_ERRORS_KEPT = 16384


@dataclass
class Order:
    """What a login runs: the command, the bytes that it reads before its settings, and what it may ask for by digest
    (`bootstrap`)."""

    command: str
    feed: bytes
    parcel: Callable[[str], bytes]


class RemoteProcess(LaunchedProcess):
    """A worker on another host. Its exit status comes through the login; None where that was lost."""

    is_here = False

    def __init__(self, login: HostLogin, number: int, ospid: int, address: tuple[Any, ...]) -> None:
        output, self.sink = os.pipe()
        super().__init__(ospid, address, output, lambda signum: login.send_signal(self, signum))
        self.login = login
        self.number = number
        self.encrypted = False  # its listener takes encrypted links only
        self.gone = threading.Event()

    def show(self, data: bytes) -> None:
        """Its output. On the login's thread, to which `sink` belongs; waits while the group does not take it."""
        view = memoryview(data)
        with contextlib.suppress(OSError), quietly():  # the group has closed it
            while view and self.sink >= 0:
                view = view[os.write(self.sink, view) :]

    def end(self, status: int | None) -> None:
        """It has ended, or nothing will ever be heard of it again. On the login's thread."""
        self.close_sink()
        self.gone.set()
        self.ended(status)

    def close_sink(self) -> None:
        """No more output."""
        sink, self.sink = self.sink, -1
        if sink >= 0:
            os.close(sink)

    def forget(self) -> None:
        """In a forked child: copies of the connection would keep the host's workers alive after the master."""
        super().forget()
        self.login.forget()


class HostLogin:
    """The workers of one host; `begin` starts a thread of its own. `on_settled(error)` is called once: with None when
    all of its workers have been announced, else with why some, or all, will not come."""

    def __init__(
        self,
        machine: str,
        settings: LoginSettings,
        connect: Callable[[float], Connection],
        make_command: Callable[[], Order],
        describe: Callable[[HostLogin, RemoteProcess], WorkerConfig],
        on_worker: Callable[[WorkerConfig], object],
        on_settled: Callable[[list[LaunchWorkerError]], object],
        max_tunnels: int = 10,
    ) -> None:
        self.machine = machine
        self.settings = settings
        self.address = ""  # by which the login reached the host
        self.connection: Connection | None = None
        self.direct: bool | None = None  # whether its workers can be reached without the login, if that was tried
        self.tunnels = threading.Semaphore(max_tunnels)
        self._connect = connect
        self._make_command = make_command
        self._describe = describe
        self._on_worker = on_worker
        self._on_settled = on_settled
        self._order: Order | None = None
        self._session: Session | None = None
        self._sending = ""  # what is on its way to the host, while it is
        self._events = EventReader()
        self._errors = b""
        self._errors_ended = threading.Event()
        self._deadline = 0.0
        self._processes: dict[int, RemoteProcess] = {}  # changed on the login's thread only
        self._problems: list[LaunchWorkerError] = []
        self._expected = 1  # workers that were not announced yet
        # Protects `_settled`, `_closed`, `_users`.
        self._lock = threading.Lock()
        self._settled = False
        self._closed = False
        self._ended = threading.Event()  # `close` is through
        self._users = 0  # workers that the group has not done with

    def begin(self, deadline: float, on_end: Callable[[], object] = lambda: None) -> None:
        """Log in, on a thread of its own. `on_end()` when nothing of it is left."""
        self._deadline = deadline

        def work() -> None:
            try:
                self._run()
            finally:
                on_end()

        threading.Thread(target=work, name=f"distpool-login-{self.machine}", daemon=True).start()

    # -- the login's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._start()
            self._serve()
        except LoginError as error:
            cause = error.__cause__ if isinstance(error.__cause__, DistpoolError) else None  # others hold on to frames
            self._settle(error.reason, error.output or self._said(), cause)
        except ValueError as error:  # bytes that are no events
            reason = "something else than distpool answers there: does a terminal or a program repeat its input?"
            self._settle(f"{reason} ({error})", self._said())
        except Exception as error:  # the client's own
            self._settle(f"{type(error).__name__}: {error}", self._said())
        finally:
            self.close()
            for process in list(self._processes.values()):
                process.end(None)
            self._settle("the login ended", self._said())

    def _start(self) -> None:
        self.connection = self._connect(self._deadline)
        self._order = order = self._make_command()
        self._check_wanted()
        self._session = session = self.connection.run(order.command, self._deadline)
        self._check_wanted()
        threading.Thread(target=self._read_errors, name="distpool-login-errors", daemon=True).start()
        session.write(order.feed + self.settings.to_line())

    def _check_wanted(self) -> None:
        """LoginError if `close` has come meanwhile: it may not have seen the connection, or what runs through it."""
        if self._closed:
            if self.connection is not None:
                self.connection.close()
            raise LoginError("it was given up")

    def _serve(self) -> None:
        session = self._session
        assert session is not None
        while data := session.read(_CHUNK):
            for event, payload in self._events.feed(data):
                self._handle(event, payload)
            if not self._events.begun and self._events.lines > MAX_BANNER:
                raise LoginError(f"it printed more than {MAX_BANNER} lines before anything of ours", self._said())
        if self._settled:
            return
        status = session.status(_STATUS_SECONDS)
        self._errors_ended.wait(_STATUS_SECONDS)
        said = self._said()
        errors = self._errors.decode("utf-8", "replace")
        reason = self.connection.explain(status, errors) if self.connection is not None else ""
        raise LoginError(reason or explain(status, said, self.settings), said)

    def _read_errors(self) -> None:
        session = self._session
        assert session is not None
        with contextlib.suppress(Exception):  # whatever ends it, its end is all that counts
            while data := session.read_errors(_CHUNK):
                self._errors = (self._errors + data)[-_ERRORS_KEPT:]
        self._errors_ended.set()

    def _handle(self, event: dict[str, Any], payload: bytes) -> None:
        if "output" in event:
            process = self._processes.get(event["output"])
            if process is not None:
                process.show(payload)
        elif "worker" in event:
            self._add(event)
        elif "exited" in event:
            process = self._processes.pop(event["exited"], None)
            if process is not None:
                process.end(int(event["status"]))
        elif "wants" in event:
            self._send(event["wants"])
        elif "mismatch" in event:
            there, program = event["mismatch"], event.get("program")
            here = ".".join(map(str, sys.version_info[:3]))
            reason = (
                f"the Python there ({program}) is {there}, that of this program {here}: the same minor version is "
                "needed on both sides; name another one with exename="
            )
            raise LoginError(reason, self._said()) from VersionMismatchError(reason)
        elif "problem" in event:
            self._problems.append(LaunchWorkerError(self.machine, self._said(), str(event["problem"])))
            self._announced()
        elif "address" in event:
            self.address = str(event["address"])
            count = self.settings.count
            self._expected = int(event["cpus"]) if count == "auto" else int(count)

    def _send(self, digests: list[str]) -> None:
        """What is missing on that host. It takes as long as the line needs; `expire` ends it."""
        session, order = self._session, self._order
        assert session is not None and order is not None
        for number, digest in enumerate(digests, 1):
            data = order.parcel(digest)
            for begin in range(0, len(data), _CHUNK):
                if self._settled:
                    return
                sent = f"{begin / 1e6:.1f} of {len(data) / 1e6:.1f} MB"
                self._sending = f"{sent} of archive {number} of {len(digests)} had been sent there"
                session.write(data[begin : begin + _CHUNK])
        self._sending = ""

    def _add(self, event: dict[str, Any]) -> None:
        address = ("tcp", str(event["host"]), int(event["port"]))
        number = int(event["worker"])
        try:
            process = RemoteProcess(self, number, int(event["ospid"]), address)
        except OSError as error:  # no descriptors left here: those that run there are not to pay for it
            assert self._session is not None
            self._session.write(_signal(number, SIGKILL))
            self._problems.append(LaunchWorkerError(self.machine, self._said(), f"no pipe for its output: {error}"))
            self._announced()
            return
        process.encrypted = bool(event.get("tls"))
        self._processes[number] = process
        with self._lock:
            wanted = not self._settled
            self._users += wanted
        if not wanted:  # it comes too late: nobody would connect to it, or read what it prints
            os.close(process.output)
            process.kill()
            return
        self._on_worker(self._describe(self, process))
        self._announced()

    def _announced(self) -> None:
        self._expected -= 1
        if self._expected <= 0:
            self._settle()
            self._end_if_unused()

    def _said(self) -> str:
        """The last lines of what the login printed, of both streams; without our secrets, if it repeats its input."""
        said = self._events.said() + self._errors
        for secret in self.settings.secrets():
            said = said.replace(secret.encode(), b"<secret>")
        return last_lines(said, config.OUTPUT_LINES).strip()

    def last_error(self) -> str:
        """The last line on stderr, where an SSH program says why it could not connect something. Any thread."""
        return last_lines(self._errors, 1).strip()

    # -- any thread --------------------------------------------------------------------------------------------

    def _settle(self, reason: str = "", output: str = "", cause: BaseException | None = None) -> None:
        with self._lock:
            if self._settled:
                return
            self._settled = True
        if reason:
            error = LaunchWorkerError(self.machine, output, reason)
            error.__cause__ = cause
            self._problems.append(error)
        self._on_settled(self._problems)

    def more(
        self,
        count: int,
        on_worker: Callable[[WorkerConfig], object],
        on_settled: Callable[[list[LaunchWorkerError]], object],
    ) -> bool:
        """Start further workers through this login; False if that has ended. One call at a time, as with `begin`."""
        session = self._session
        with self._lock:
            if self._closed or not self._settled or session is None:
                return False
            self._settled = False
            self._problems = []
            self._expected = count
            self._on_worker, self._on_settled = on_worker, on_settled
        try:
            session.write(b'{"start": %d}\n' % count)
        except Exception:  # the client's own: the login is lost
            self.close()
            self._settle("the login was lost")
        return True

    def let_go(self) -> None:
        """No further workers will be wanted: it ends with the last of them."""
        with self._lock:
            self.settings.hold = False
        self._end_if_unused()

    @property
    def lives(self) -> bool:
        """Whether it may start further workers."""
        return not self._closed

    def expire(self, seconds: float) -> None:
        """The time is over: what has not come will not come."""
        if self.connection is None:
            reason = f"the login did not come about within {seconds:g} seconds"
        elif self._sending:
            reason = f"{self._sending} within {seconds:g} seconds: it needs more time (timeout=)"
        elif self._events.begun:
            reason = f"its workers did not start within {seconds:g} seconds"
        else:
            reason = (
                f"the login works, but no worker reported within {seconds:g} seconds: does its shell wait for input?"
            )
        self._settle(reason, self._said())
        if not self._processes:
            threading.Thread(target=self.close, name="distpool-login-close", daemon=True).start()

    def send_signal(self, process: RemoteProcess, signum: int) -> None:
        """Send a signal to a worker. Never waits: the leader calls it, and the network may be gone."""

        def work() -> None:
            session = self._session
            if session is not None:
                session.write(_signal(process.number, signum))
            if signum == SIGKILL and not process.gone.wait(_KILL_SECONDS):
                process.ended(None)

        try:
            threading.Thread(target=work, name="distpool-login-kill", daemon=True).start()
        except RuntimeError:  # no further thread: then here, without waiting for what comes of it
            if self._session is not None:
                self._session.write(_signal(process.number, signum))

    def reachable(self, host: str, port: int, seconds: float) -> bool:
        """Whether a worker can be reached without the login. What the first one shows counts for all."""
        import socket

        if self.direct is None:
            try:
                socket.create_connection((host, port), timeout=seconds).close()
                self.direct = True
            except OSError:
                self.direct = False
        return self.direct

    def dial(self, host: str, port: int, seconds: float) -> Any:
        """A connection through the login. OSError."""
        connection = self.connection
        if connection is None or self._closed:
            raise ConnectionError(f"the login to {self.machine} has ended")
        with self.tunnels:
            return connection.dial(host, port, time.monotonic() + seconds)

    def release(self) -> None:
        """The group has done with one of the workers; after the last one the login ends."""
        with self._lock:
            self._users -= 1
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        """Whoever changes one of the three looks."""
        with self._lock:
            over = self._users <= 0 and self._settled and not self.settings.hold
        if over:
            self.close()

    def close(self) -> None:
        """End the login, and with it everything on that host. It is over when this returns, whoever ends it."""
        with self._lock:
            first, self._closed = not self._closed, True
        if not first:
            self._ended.wait(_END_SECONDS)
            return
        try:
            if self._session is not None:
                self._session.close()
            if self.connection is not None:
                self.connection.close()
        finally:
            self._ended.set()

    def forget(self) -> None:
        """In a forked child of the master."""
        self._closed = True
        if self.connection is not None:
            self.connection.forget()
        for process in self._processes.values():
            process.close_sink()


def _signal(number: int, signum: int) -> bytes:
    return b'{"kill": %d, "signal": %d}\n' % (number, signum)


def explain(status: int | None, said: str, settings: LoginSettings) -> str:
    """Why a login ended before its workers had started, as far as its output tells."""
    low = said.lower()
    last = said.splitlines()[-1] if said else ""
    if "no module named distpool" in low or "no module named 'distpool" in low:
        return (
            "distpool is not installed for the Python there: install it (python -m pip install distpool), "
            "or let it be sent (bootstrap=True)"
        )
    if "no module named" in low:
        return f"a module is missing for the Python there: {last}"
    if "no space left on device" in low or "disk quota exceeded" in low:
        return "its disk is full"
    if "filenotfounderror" in low and "dir=" in low:
        return last.partition(": ")[2] or last
    if status == 127 or "command not found" in low or "no such file or directory" in low or "no python found" in low:
        return "no Python is found there: name its path with exename="
    if status == 126 or "permission denied" in low:
        return "the Python there may not be executed: name another one with exename="
    if status is None or status == 255:  # what ssh programs say of commands that a signal ended
        return "the login ended before a worker had started (the connection was lost, or a signal ended it)"
    return f"the login ended with exit code {status} before a worker had started"


__all__ = ["HostLogin", "Order", "RemoteProcess", "explain"]
