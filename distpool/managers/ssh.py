"""Workers on other hosts, reached by SSH (layer 8).

    addprocs(["user@host", ("host2", 8)]) -> SSHManager.launch: one login per host, at most `max_parallel` at a time
        HostLogin (thread) -> client (paramiko here, or an OpenSSH program) -> `python -m distpool worker --login` there
        WorkerConfig for each worker as it comes; after the last host: CompositeException with those that failed
    connect(pid, config): through the login for tunnels, else None: distpool dials the worker itself

`launch` runs on the launch thread of `addprocs` and waits in a queue, with a deadline for each host.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from distpool import config
from distpool.errors import CompositeException, DistpoolError
from distpool.managers import archive, bootstrap
from distpool.managers.base import ClusterManager
from distpool.managers.command import pairs
from distpool.managers.login_protocol import LOGIN_ARGUMENTS, LoginSettings
from distpool.managers.record import WorkerConfig
from distpool.managers.resources import wishes
from distpool.managers.specs import Spec, machine_of, split_spec
from distpool.managers.ssh_client import Connection
from distpool.managers.ssh_command import SHELLS, command_line, words
from distpool.managers.ssh_login import HostLogin, Order, RemoteProcess
from distpool.managers.surroundings import here

_SLACK = 2.0  # seconds that a client's own time-out, which knows more, may come after ours
_PROBE = 3.0  # seconds that tunnel="auto" waits for a direct connection
_NOT_HANDED_ON = ("DISTPOOL_TOP",)  # an address of this program, and no other's


class SSHManager(ClusterManager):
    """Workers on other hosts: `machines` are specs `"[user@]host[:port] [bind_addr[:port]]"`, or `(spec, count)` with
    an int or `"auto"` (one per CPU there). The same spec twice adds up.

    TypeError, ValueError: a machine that is none.

    Example: `addprocs(SSHManager([("node1", 4), "node2"]), tunnel="auto")`, which is what a list of machines does.
    """

    def __init__(self, machines: Iterable[Any]) -> None:
        self.machines = merge(machines)
        self._kept: _Kept | None = None
        self._found: tuple[Any, tuple[list[archive.Source], bool]] | None = None  # `ship`, and what it means

    def __repr__(self) -> str:
        return f"SSHManager(machines={ {_name(spec): count for spec, count in self.machines.items()} })"

    @classmethod
    def from_url(cls, rest: str) -> ClusterManager:
        """`hosts="ssh://4*node1,me@node2:2222"`: lines of a machine file with commas between them."""
        return cls(machine_of(text.strip()) for text in rest.split(","))

    def parts(self) -> list[tuple[ClusterManager, int | None]]:
        """One manager for each host."""
        found: list[tuple[ClusterManager, int | None]] = []
        for spec, count in self.machines.items():
            part = self._only(spec, count)
            part._kept = _Kept()
            found.append((part, None if count == "auto" else count))
        return found

    def sized(self, n: int) -> ClusterManager | None:
        """`n` workers on the host of this manager; `None` if it has several."""
        if len(self.machines) > 1:
            return None
        manager = self._only(next(iter(self.machines)), n)
        manager._kept = self._kept
        return manager

    def close(self) -> None:
        """The login that was kept for further workers ends."""
        if self._kept is not None:
            self._kept.keep(None)

    def _only(self, spec: Spec, count: Any) -> SSHManager:
        manager = type(self)(())
        manager.machines = {spec: count}
        manager._found = self._found
        return manager

    def default_addprocs_params(self) -> dict[str, Any]:
        """The keywords of `addprocs([machine, ...])`. `exename`, None: what is found there (docs/ssh.md)."""
        return {
            **super().default_addprocs_params(),
            "exename": None,
            "tunnel": False,
            "multiplex": False,
            "ssh": None,
            "sshflags": (),
            "max_parallel": 10,
            "shell": "posix",
            "cmdline_cookie": False,
            "bootstrap": "auto",
            "ship": (),
            "encrypt": None,
        }

    def check(self, params: dict[str, Any]) -> None:
        """ValueError, TypeError: keywords that no host could be started with. Nothing is started."""
        if params["tunnel"] not in (False, True, "auto"):
            raise ValueError(f"tunnel must be False, True or 'auto', not {params['tunnel']!r}")
        if params["encrypt"] not in (None, False, True):
            raise ValueError(f"encrypt must be None, False or True, not {params['encrypt']!r}")
        for name in ("multiplex", "cmdline_cookie", "enable_threaded_blas"):
            config.as_flag(name, params[name])
        if params["shell"] not in SHELLS:
            raise ValueError(f"shell must be one of {', '.join(SHELLS)}, not {params['shell']!r}")
        parallel = config.as_int(params["max_parallel"])
        if isinstance(parallel, bool) or not isinstance(parallel, int):
            raise TypeError(f"max_parallel must be an int, not {type(parallel).__name__}")
        if parallel < 1:
            raise ValueError(f"max_parallel must be at least 1, not {parallel}")
        if params["ssh"] is not None and not words(params["ssh"], "ssh"):
            raise ValueError("ssh must be None (the client in this process) or name a program")
        sshflags(params["sshflags"])
        command_line(params["shell"], params["exename"], params["exeflags"], pairs(params["env"]))
        bootstrap.check(params["bootstrap"])
        self._find(params["ship"])
        wishes(params)

    def _find(self, ship: Any) -> tuple[list[archive.Source], bool]:
        """Where the packages are, as of the first time: a host may be replaced when the program works elsewhere."""
        if self._found is None or self._found[0] != ship:
            self._found = (ship, archive.wishes(ship))
        return self._found[1]

    def launch_seconds(self, params: dict[str, Any]) -> float:
        """How long a launch may bring nothing: every round of `max_parallel` logins has its own deadline."""
        rounds = -(-len(self.machines) // max(1, int(params["max_parallel"])))
        return rounds * (_seconds(params) + _SLACK)

    def launch(self, params: dict[str, Any]) -> Iterator[WorkerConfig]:
        """Log in to all hosts; each worker as it comes. `CompositeException` at the end: the hosts that failed."""
        self.check(params)
        if self._kept is not None and (yield from self._launch_more(self._kept, params)):
            return
        clients = client(params)
        parcels = bootstrap.parcels(params["bootstrap"], *self._find(params["ship"]))
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        logins = [self._login(spec, count, params, clients, parcels, events) for spec, count in self.machines.items()]
        waiting = list(logins)
        running: dict[HostLogin, float] = {}
        ends: dict[HostLogin, threading.Event] = {}
        failures: dict[HostLogin, list[Exception]] = {}
        seconds = _seconds(params)
        try:
            while waiting or running:
                while waiting and len(running) < params["max_parallel"]:
                    login = waiting.pop(0)
                    running[login] = time.monotonic() + seconds
                    ends[login] = threading.Event()
                    login.begin(running[login], ends[login].set)
                left = min(running.values()) + _SLACK - time.monotonic()
                try:
                    event = events.get(timeout=max(0.0, left))
                except queue.Empty:
                    now = time.monotonic()
                    for login in [login for login, end in running.items() if end + _SLACK <= now]:
                        login.expire(seconds)
                        running[login] = now + seconds  # it settles at once, behind this round
                    continue
                if isinstance(event, WorkerConfig):
                    yield event
                else:
                    login, problems = event
                    running.pop(login, None)
                    failures[login] = problems
        finally:
            for login in running:
                threading.Thread(target=_abandon, args=(login, ends[login], events), daemon=True).start()
        errors = [error for login in logins for error in failures.get(login, ())]  # in the order of the machines
        if errors:
            raise CompositeException(errors)

    def _launch_more(self, kept: _Kept, params: dict[str, Any]) -> Generator[WorkerConfig, None, bool]:
        """Through the login that is there, if there is one; returns whether that was possible."""
        login = kept.login
        (count,) = self.machines.values()
        seconds = _seconds(params)
        deadline = time.monotonic() + seconds
        if login is None or not login.lives or not kept.turn.acquire(timeout=seconds):
            return False
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        coming = False
        try:
            coming = login.more(count, events.put, events.put)
            if not coming:
                return False
            begun = 0
            while True:
                try:
                    event = events.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    return False  # it does not answer: a new one may
                if isinstance(event, WorkerConfig):
                    begun += 1
                    yield event
                    continue
                coming = False
                if event and begun:
                    raise CompositeException(event)
                return not event
        finally:
            if coming:  # given up, but the host is at it
                threading.Thread(target=_drop, args=(events, kept.turn), name="distpool-ssh-drop", daemon=True).start()
            else:
                kept.turn.release()

    def _login(
        self,
        spec: Spec,
        count: Any,
        params: dict[str, Any],
        clients: _Client,
        parcels: bootstrap.Parcels,
        events: queue.SimpleQueue[Any],
    ) -> HostLogin:
        settings = login_settings(spec, count, params)
        settings.fetch = parcels.fetches

        def describe(login: HostLogin, process: RemoteProcess) -> WorkerConfig:
            _, host, port = process.address
            return WorkerConfig(
                host=host,
                port=port,
                process=process,
                ospid=process.ospid,
                exename=params["exename"],
                exeflags=params["exeflags"],
                userdata=login,
                tunnel=params["tunnel"],
                multiplex=params["multiplex"],
                bind_addr=spec.bind_addr or login.address,
                sshflags=params["sshflags"],
                max_parallel=params["max_parallel"],
                environ={"machine": spec.host, "tls": process.encrypted, "count": count},
                enable_threaded_blas=params["enable_threaded_blas"],
            )

        login = HostLogin(
            spec.host,
            settings,
            lambda deadline: clients(spec, deadline),
            lambda: remote_command(params, parcels),
            describe,
            events.put,
            lambda problems: events.put((login, problems)),
            params["max_parallel"],
        )
        if self._kept is not None and not self._kept.closed:
            settings.hold = True
            self._kept.keep(login)
        return login

    def connect(self, pid: int, config: WorkerConfig) -> Any:
        """A connection through the login where that was asked for, or where there is no other way (`tunnel="auto"`)."""
        login = config.userdata
        if not isinstance(login, HostLogin) or not config.tunnel:
            return None
        host, port = str(config.host), int(config.port or 0)
        if config.tunnel is not True and login.reachable(host, port, _PROBE):
            return None
        return login.dial(host, port, _connect_seconds())

    def unreachable(self, config: WorkerConfig, error: BaseException) -> BaseException:
        """What is said when a worker that listens cannot be reached, or the way to it has ended. Never blocks."""
        login = config.userdata
        if not isinstance(error, OSError) or isinstance(error, DistpoolError) or not isinstance(login, HostLogin):
            return error
        if isinstance(error, ConnectionAbortedError):  # there was a way, for a moment
            said = login.last_error()
            if "administratively prohibited" in said:
                said += " (the sshd there does not allow it: AllowTcpForwarding)"
            return ConnectionError(f"{error}: {said}") if said else error
        why = getattr(error, "strerror", None) or error
        return ConnectionError(
            f"its worker listens on {config.host} port {config.port}, which cannot be reached from here ({why}): open "
            "the port, name another address behind the host, or go through the login (tunnel=True or 'auto')"
        )

    def manage(self, pid: int, config: WorkerConfig, op: str) -> None:
        """After the last worker of a host its login ends. Interrupts reach workers by their own connection."""
        if op == "finalize" and isinstance(config.userdata, HostLogin):
            config.userdata.release()


class _Kept:
    """The login of a host of an executor, which starts replacements. Shared by the managers that `sized` makes."""

    def __init__(self) -> None:
        self.login: HostLogin | None = None
        self.closed = False
        self.turn = threading.Lock()  # held by the launch thread whose workers the login starts
        self._lock = threading.Lock()  # protects the other two

    def keep(self, login: HostLogin | None) -> None:
        """This one from now on; None: none any more. The one before ends with the last of its workers."""
        with self._lock:
            before, self.login, self.closed = self.login, login, self.closed or login is None
        if before is not None:
            before.let_go()
        if login is not None and self.closed:  # meanwhile
            login.let_go()


def _abandon(login: HostLogin, end: threading.Event, events: queue.SimpleQueue[Any]) -> None:
    """End a login whose launch was given up; what it has brought meanwhile is nobody's. On a thread of its own."""
    login.close()
    end.wait(_END_SECONDS)
    with contextlib.suppress(queue.Empty):
        while True:
            event = events.get_nowait()
            if isinstance(event, WorkerConfig):
                os.close(event.process.output)


def _drop(events: queue.SimpleQueue[Any], turn: threading.Lock) -> None:
    """End the workers that a login still starts for a launch which was given up. Otherwise they, and the login, would
    live as long as this program. On a thread of its own, until the login has settled, if only by its end."""
    ends: list[tuple[HostLogin, threading.Event]] = []
    while isinstance(event := events.get(), WorkerConfig):
        ended = threading.Event()
        event.process.add_exit_callback(lambda code, ended=ended: ended.set())
        event.process.kill()
        os.close(event.process.output)
        ends.append((event.userdata, ended))
    turn.release()
    for login, ended in ends:
        ended.wait(_END_SECONDS)
        login.release()


_END_SECONDS = 10.0  # that a host may take to report the end of a worker which was killed
_Client = Callable[[Spec, float], Connection]


def client(params: dict[str, Any]) -> _Client:
    """What logs in: `client(spec, deadline) -> Connection`. ValueError, OSError: the configuration cannot be used."""
    flags = sshflags(params["sshflags"])
    # Loaded here, because whoever only imports the manager shall not pay for a client.
    if params["ssh"] is not None:
        from distpool.managers import ssh_binary

        program = words(params["ssh"], "ssh")
        through = params["tunnel"] or params["multiplex"]
        return lambda spec, deadline: ssh_binary.connect(spec, program, flags, bool(through), deadline)
    from distpool.managers import ssh_config, ssh_paramiko

    found = ssh_config.Config(flags)
    return lambda spec, deadline: ssh_paramiko.connect(found.target(spec), found, deadline)


def remote_command(params: dict[str, Any], parcels: bootstrap.Parcels) -> Order:
    """The command that the login runs, what it reads before its settings, and what it may ask for."""
    arguments = [*LOGIN_ARGUMENTS]
    if params["cmdline_cookie"]:
        arguments.append(f"--worker={params['cookie']}")
    if parcels:
        arguments = bootstrap.arguments(arguments)
    command = command_line(params["shell"], params["exename"], params["exeflags"], environment(params), arguments)
    return Order(command, parcels.feed() if parcels else b"", parcels.parcel)


def environment(params: dict[str, Any]) -> dict[str, str]:
    """The variables that workers get over their login's own: ours for distpool, and the user's wishes."""
    ours = {
        name: value for name, value in os.environ.items() if name.startswith("DISTPOOL_") and name not in _NOT_HANDED_ON
    }
    return {**ours, **pairs(params["env"])}


def login_settings(spec: Spec, count: Any, params: dict[str, Any]) -> LoginSettings:
    """The order for one host."""
    directory = params["dir"]
    # Through the login alone everything is encrypted already.
    encrypt = params["encrypt"] if params["encrypt"] is not None else params["tunnel"] is not True
    return LoginSettings(
        cookie=None if params["cmdline_cookie"] else params["cookie"],
        count=count,
        bind=spec.bind_addr,
        port=spec.bind_port or 0,
        port_is_hint=spec.port_is_hint,
        loopback=params["tunnel"] is True,
        cwd=os.fspath(directory) if directory is not None else here(),
        strict_cwd=directory is not None,
        env=environment(params),
        enable_threaded_blas=bool(params["enable_threaded_blas"]),
        memory_limit=wishes(params).memory,
        tls=params["identity"]().settings() if encrypt else None,
        always_tls=params["encrypt"] is True,
        site=spec.host,
        timeout=_seconds(params),
    )


def merge(machines: Iterable[Any]) -> dict[Spec, Any]:
    """The machines and how many workers each gets. TypeError, ValueError."""
    if isinstance(machines, str | bytes):
        raise TypeError("machines must be a list of machine specs, not one text")
    found: dict[Spec, Any] = {}
    for machine in machines:
        text, count = machine if isinstance(machine, tuple) and len(machine) == 2 else (machine, 1)
        spec, count = split_spec(text), config.as_int(count)
        if count != "auto" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"the number of workers of {text!r} must be a positive int or 'auto', not {count!r}")
        there = found.get(spec, 0)
        if there and there != count and "auto" in (there, count):
            raise ValueError(f"{text!r} is given both a number of workers and 'auto'")
        found[spec] = "auto" if count == "auto" else there + count
    return found


def sshflags(flags: Any) -> list[str]:
    """The flags for the client; one text is split at blanks, as a shell does it."""
    import shlex

    return shlex.split(flags) if isinstance(flags, str) else words(flags, "sshflags")


def _name(spec: Spec) -> str:
    host = f"[{spec.host}]" if ":" in spec.host else spec.host
    text = f"{spec.user}@{host}" if spec.user is not None else host
    text += f":{spec.port}" if spec.port is not None else ""
    if spec.bind_addr is not None:
        text += f" [{spec.bind_addr}]" if ":" in spec.bind_addr else f" {spec.bind_addr}"
        text += f":{spec.bind_port}" if spec.bind_port is not None else ""
    return text


def _seconds(params: dict[str, Any]) -> float:
    return config.launch_timeout(params.get("timeout"))


def _connect_seconds() -> float:
    return config.worker_timeout()


__all__ = ["SSHManager"]
