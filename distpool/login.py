"""The process that a login starts on another host: forks that host's workers and watches over them (layer 11).

    master --login's stdin--> LoginSettings, {"kill": ..}     `managers.login_protocol` has the whole conversation
           <--login's stdout- mark, workers, their output, their ends
    per worker: socket that listens, pipe for its output, lifeline pipe; os.fork(), then `startup.become_worker`

One login per host, so this process must outlive any of its workers: it is none itself and runs no user code. (A first
worker that starts the others, as `siblings` does it, takes the way of their output with it when a task kills it.) It is
a zygote as well: what workers need is imported once, and a fork costs a millisecond.

One thread, because fork and threads do not go together. It never blocks: output is taken from workers only as fast as
the master takes it from us, so a worker that prints without end waits, while signals and the end of stdin are seen.

The end of stdin is the end of the login or of the master: all workers are killed, at once. They also die with this
process, however it dies (`startup.arm_lifeline`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from distpool import config, standalone, startup, zygote
from distpool.managers.login_protocol import MARK, MAX_LINE, LoginSettings, pack_event
from distpool.managers.surroundings import BLAS_VARIABLES, routable_address
from distpool.transport.silence import is_loopback

if sys.platform != "win32":
    import resource

_CHUNK = 65536
_PIPE = 1 << 20  # bytes that a pipe holds at most, unless root has enlarged it
_HIGH_WATER = 1 << 20  # bytes that the master has not taken yet: from then on workers' output waits
#: What each worker would load for itself when it joins, and again for encrypted links (20 ms of work).
_JOINING = ("multiprocessing.process",)
_ENCRYPTED = ("ssl", "tempfile", "encodings.idna")
_PORTS = 1000  # ports that are tried after one that is only a hint


def main(cookie: str | None, line: bytes = b"", front: Sequence[str] = (), cache: str = "") -> NoReturn:
    """Read the order from stdin, start the workers, serve until they have ended or stdin does. Does not return.

    `cookie` is the one of the command line, if it stood there. From `bootstrap`: `line` is the order, if it has been
    read already; `front`: directories that come first in the workers' sys.path; `cache`: where they keep modules that
    they fetch.
    """
    _open_standard()
    # Duplicates, so that nothing else can get between our events: whatever prints here prints into stderr.
    orders, events, complaints = os.dup(0), os.dup(1), os.dup(2)
    try:
        line, rest = (line, b"") if line else _read_line(orders)
        settings = LoginSettings.from_line(line)
        settings.cookie = settings.cookie if settings.cookie is not None else cookie
        config.check_cookie(settings.cookie)
        os.dup2(2, 1)
        if not hasattr(os, "fork"):
            raise RuntimeError("logins to hosts without fork (Windows) are not supported by this version of distpool")
        agent = Agent(settings, orders, events, rest, front, cache)
        _quiet()
        birth = agent.run()
    except BaseException:
        import traceback

        os.write(complaints, traceback.format_exc().encode())
        os._exit(1)
    # Only workers come here.
    os.close(complaints)
    gc.enable()
    if agent.limit is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, agent.limit)
    startup.become_worker(birth.listener, birth.settings, birth.output, birth.lifeline, [])


def _open_standard() -> None:
    """A start-up file may have closed stderr: a duplicate would get its number, and `_quiet` would end that."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest one that is free is this one


def _quiet() -> None:
    """From here on the standard streams of this process, and so those of its children, lead nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _read_line(descriptor: int) -> tuple[bytes, bytes]:
    """The first line of the orders, and what came behind it. EOFError: it never came."""
    data = bytearray()
    while b"\n" not in data:
        more = os.read(descriptor, _CHUNK)
        if not more:
            raise EOFError("the login ended before it had said what to do")
        data += more
        if len(data) > MAX_LINE * 16:  # certificates and the like are in it
            raise ValueError("the order is too long")
    line, _, rest = bytes(data).partition(b"\n")
    return line, rest


class _Worker(NamedTuple):
    """What this process keeps of a living worker."""

    number: int
    output: int
    lifeline: int


class Agent:
    """The serving loop. `run` returns only in a child, as that child's `Birth`."""

    def __init__(
        self,
        settings: LoginSettings,
        orders: int,
        events: int,
        rest: bytes,
        front: Sequence[str] = (),
        cache: str = "",
    ) -> None:
        self.settings = settings
        self._front = front
        self._cache = cache
        self.address = reached_address(settings)
        self.limit: tuple[int, int] | None = None
        self._orders = orders
        self._events = events
        self._received = bytearray(rest)
        self._outbox = bytearray()
        self._silence = silent_seconds(settings)
        self._worker_settings: dict[str, Any] = {}
        self._complete = False  # all that workers may need is loaded
        self._next = 0  # number of the next worker
        self._workers: dict[int, _Worker] = {}  # process id -> worker
        self._outputs: dict[int, _Worker] = {}  # descriptor -> worker
        self._wake_read, self._wake_write = os.pipe()
        for descriptor in (orders, events, self._wake_read, self._wake_write):
            os.set_blocking(descriptor, False)

    def run(self) -> zygote.Birth:
        """Start the workers and serve. In this process it ends with `os._exit`."""
        gc.disable()
        startup.default_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a zygote
        cpus = usable_cpus()
        count = cpus if self.settings.count == "auto" else int(self.settings.count)
        self._complete = count > zygote.FEW  # few do not wait for what not all of them need
        names = [startup.ENTRY.partition(":")[0], *_JOINING, *(config.PRELOAD if self._complete else ())]
        names += _ENCRYPTED if self.settings.tls else ()
        problem = zygote.preload(names)
        if problem:
            raise RuntimeError(problem)
        if self.settings.fetch:  # else each worker would load it
            importlib.import_module("distpool.shipping")
        self.limit = zygote.raise_descriptor_limit()
        gc.collect()
        gc.freeze()
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler of Python's makes the C one write to the pipe
        version = ".".join(map(str, sys.version_info[:3]))
        self._say(address=self.address, python=version, ospid=os.getpid(), cpus=cpus, mark=MARK)
        self._worker_settings = worker_settings(self.settings, self._front, self._cache)
        return self._start(count) or self._serve()

    # -- workers -----------------------------------------------------------------------------------------------

    def _start(self, count: int) -> zygote.Birth | None:
        """So many more workers: None in this process; in a child what it needs."""
        for _ in range(count):
            number, self._next = self._next, self._next + 1
            try:
                birth = self._fork(number, self._worker_settings)
            except OSError as error:
                self._say(problem=_why(error, self.settings, self.address))
                continue
            if birth is not None:
                return birth
        return None

    def _fork(self, number: int, settings: dict[str, Any]) -> zygote.Birth | None:
        """One worker: None in this process; in the child what it needs. OSError: no address or no process left."""
        opened: list[int] = []
        listener = listen(self.settings, self.address, number)
        name = listener.getsockname()
        if is_loopback(name[0]) and not self.settings.always_tls:
            settings = {**settings, "tls": None}  # what is said there stays on this host
        try:
            for _ in range(2):
                opened += os.pipe()
            output, worker_output, lifeline, own_lifeline = opened
            ospid = os.fork()
        except OSError:
            for descriptor in opened:
                os.close(descriptor)
            listener.close()
            raise
        if ospid == 0:
            self._leave()
            os.close(output)
            os.close(own_lifeline)
            return zygote.Birth(listener, settings, worker_output, lifeline)
        listener.close()
        os.close(worker_output)
        os.close(lifeline)
        os.set_blocking(output, False)
        self._workers[ospid] = self._outputs[output] = _Worker(number, output, own_lifeline)
        host = self.address if name[0] in ("0.0.0.0", "::") else name[0]
        self._say(worker=number, ospid=ospid, host=host, port=name[1], tls=settings["tls"] is not None)
        return None

    def _leave(self) -> None:
        """In a child: give up everything that is this process's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor in (self._orders, self._events, self._wake_read, self._wake_write):
            os.close(descriptor)
        for worker in self._workers.values():
            os.close(worker.lifeline)
        for output in self._outputs:
            os.close(output)
        self._workers.clear()
        self._outputs.clear()

    def _reap(self) -> None:
        """Report every worker that has ended, behind its last output."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass
        while self._workers:
            ospid, status = os.waitpid(-1, os.WNOHANG)
            if not ospid:
                break
            worker = self._workers.pop(ospid, None)
            if worker is None:
                continue
            # A child of it may hold the other end, and print without end: no more than a pipe holds.
            for _ in range(_PIPE // _CHUNK):
                if worker.output not in self._outputs or not self._take_output(worker):
                    break
            self._drop_output(worker)
            os.close(worker.lifeline)
            self._say(exited=worker.number, status=os.waitstatus_to_exitcode(status))

    # -- the loop ----------------------------------------------------------------------------------------------

    def _serve(self) -> zygote.Birth:
        """Until the last worker has ended; until stdin ends, if the master may want more of them."""
        birth = self._obey()  # they may have come together with the first line
        while birth is None and (self._workers or self._outbox or self.settings.hold):
            poll = select.poll()
            poll.register(self._orders, select.POLLIN)
            poll.register(self._wake_read, select.POLLIN)
            # Only when there is something to write: the end of the reader is then seen as an error of the write.
            if self._outbox:
                poll.register(self._events, select.POLLOUT)
            if len(self._outbox) < _HIGH_WATER:
                for output in self._outputs:
                    poll.register(output, select.POLLIN)
            ready = poll.poll((self._silence if self._complete else config.REST_SECONDS) * 1000)
            if not ready and not self._complete:
                self._complete = True
                zygote.preload(config.PRELOAD)  # for those that come later; who needs what fails will hear of it
                gc.collect()
                gc.freeze()
            elif not ready:
                self._say()  # anything: so the kernel notices that the master's host has vanished
            for descriptor, _ in ready:
                if descriptor == self._wake_read:
                    self._reap()
                elif descriptor == self._orders:
                    birth = self._receive()
                    if birth is not None:
                        return birth
                elif descriptor == self._events:
                    self._flush()
                elif descriptor in self._outputs:
                    worker = self._outputs[descriptor]
                    if not self._take_output(worker):
                        self._drop_output(worker)
        if birth is not None:
            return birth
        os._exit(0)

    def _take_output(self, worker: _Worker) -> bool:
        """Read once what a worker printed; False at the end, or if there is nothing now and it has ended."""
        try:
            data = os.read(worker.output, _CHUNK)
        except BlockingIOError:
            return False
        if data:
            self._say(data, output=worker.number)
        return bool(data)

    def _drop_output(self, worker: _Worker) -> None:
        if self._outputs.pop(worker.output, None) is not None:
            os.close(worker.output)

    def _say(self, payload: bytes = b"", mark: bytes = b"", **event: Any) -> None:
        # What the shell printed last, or prints in the background, may have no end of line.
        self._outbox += b"\n" + mark + pack_event(payload, **event)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._outbox:
                sent = os.write(self._events, self._outbox[:_CHUNK])
                del self._outbox[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._stop()

    def _receive(self) -> zygote.Birth | None:
        try:
            data = os.read(self._orders, _CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self._stop()
        self._received += data
        return self._obey()

    def _obey(self) -> zygote.Birth | None:
        """Whatever orders are complete. In a child that one of them made: what it needs."""
        while (end := self._received.find(b"\n")) >= 0:
            order = json.loads(bytes(self._received[:end]) or b"{}")
            del self._received[: end + 1]
            if "kill" in order:
                for ospid, worker in self._workers.items():
                    if worker.number == order["kill"]:  # nobody else reaps, so the process id is still this worker's
                        zygote.send_signal(ospid, order["signal"])
            if "start" in order:
                birth = self._start(int(order["start"]))
                if birth is not None:
                    return birth
        return None

    def _stop(self) -> NoReturn:
        """Nobody is there any more."""
        for ospid in [ospid for ospid in self._workers if zygote.send_signal(ospid, signal.SIGKILL)]:
            os.waitpid(ospid, 0)
        os._exit(0)


# -- what workers get --------------------------------------------------------------------------------------------


def worker_settings(settings: LoginSettings, front: Sequence[str] = (), cache: str = "") -> dict[str, Any]:
    """The settings of one worker, as `startup` takes them. FileNotFoundError: the directory that was asked for."""
    login = os.getcwd()
    cwd = os.path.expanduser(settings.cwd) or login
    if not (os.path.isdir(cwd) and os.access(cwd, os.X_OK)):
        if settings.strict_cwd:
            raise FileNotFoundError(f"dir={settings.cwd!r} is no directory on this host, or may not be entered")
        cwd = login
    path = [entry for entry in sys.path if entry not in front]
    if path and path[0] == login and not getattr(sys.flags, "safe_path", False):
        path[0] = cwd  # `-m` puts the current directory first
    path[:0] = front
    env = dict(os.environ)
    if not settings.enable_threaded_blas:
        env.update(dict.fromkeys(BLAS_VARIABLES, "1"))
    env.update(settings.env or {})
    if settings.timeout > config.worker_timeout():  # the master may take as long as it gives others
        env.setdefault("DISTPOOL_WORKER_TIMEOUT", str(settings.timeout))
    extra: dict[str, Any] = {}
    if settings.memory_limit is not None:
        extra["memory_limit"] = settings.memory_limit
    if settings.fetch:
        extra["fetch"] = cache
    return {
        "cookie": settings.cookie,
        "cwd": cwd,
        "sys_path": path,
        "own_path": False,
        "env": env,
        "extra": extra,
        "tls": settings.tls,
        "timeout": settings.timeout,
        "entry": startup.ENTRY,
    }


def silent_seconds(settings: LoginSettings) -> float:
    """What `config.silent_seconds` says to the workers."""
    with contextlib.suppress(ValueError):
        return max(0.1, float((settings.env or {}).get("DISTPOOL_SILENT_SECONDS", "")))
    return config.silent_seconds()


def usable_cpus() -> int:
    """CPUs that this login may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


# -- addresses ---------------------------------------------------------------------------------------------------


def reached_address(settings: LoginSettings) -> str:
    """The address of this host that the login came to; what others dial if no bind address was given.

    sshd says it. Without sshd (a program of the user's in place of ssh): what the host's name, as the master knows it,
    stands for, if that is an address of ours. The name that this machine gives itself is no answer: it may be known to
    nobody, or mean the loopback device.
    """
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) == 4:
        return words[2]
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(settings.site, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return str(address[0])
    return routable_address()


def listen(settings: LoginSettings, reached: str, number: int) -> socket.socket:
    """The listener of worker `number`. OSError: it cannot listen there."""
    host = settings.bind or ("127.0.0.1" if settings.loopback else reached)
    if not settings.port:
        return standalone.listen(host, 0)
    if number == 0 and not settings.port_is_hint:
        return standalone.listen(host, settings.port)
    for port in range(settings.port, min(settings.port + _PORTS, 65536)):
        with contextlib.suppress(OSError):
            return standalone.listen(host, port)
    return standalone.listen(host, 0)


def _why(error: OSError, settings: LoginSettings, address: str) -> str:
    host = settings.bind or address
    place = f"{host}:{settings.port}" if settings.port else host
    return f"cannot start a worker that listens on {place}: {error}"


__all__ = ["Agent", "main"]
