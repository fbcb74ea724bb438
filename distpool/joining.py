"""Starting workers through a manager and making members of them (layer 9).

    launch thread:   manager.launch(params) -> WorkerConfig --call_soon--> leader: Group.add, Member.begin
    LocalManager     the address is known                                            -> dial (leader) -> Member.connect
    other managers   thread: manager.connect(pid, config) -> streams                 -> Member.connect
                                                          -> None: header line of config.io, unless host and port are
                                                             known -> thread: dial   -> Member.connect
    config.count     the first worker of a host starts the others (`siblings`); then they come up as others do

`launch` and `connect` are user code: they run on library threads. A launch that brings nothing for longer than its
time-out is given up; workers that it brings afterwards are ended.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial

from distpool import config
from distpool.errors import LaunchWorkerError
from distpool.hints import Any
from distpool.managers.base import ClusterManager, parse_header
from distpool.managers.handles import PopenHandle, open_output
from distpool.managers.launch import Launcher
from distpool.managers.local import LocalManager
from distpool.managers.process import LaunchedProcess
from distpool.managers.record import WorkerConfig
from distpool.managers.resources import wishes
from distpool.node import group as groups
from distpool.node.group import Member, State
from distpool.node.node import Node
from distpool.transport.stream import Adopted, adopt, dial
from distpool.wire import codec, messages
from distpool.wire.frames import Frame, Kind

MAX_BANNER = 1000
"""Lines that may come before the header line (CONFORMANCE C201)."""

_SLACK = 5.0  # seconds that a manager's own time-out may come after ours


def launcher(node: Node) -> Launcher:
    """The launcher of local processes of this node, made on first use."""
    if node.launcher is None:
        with node.making_parts:  # of two, nobody would end the zygotes of one
            if node.launcher is None:
                made = Launcher(node.loop)
                node.launcher = node.launcher or made
                node.on_fork.append(node.launcher.forget_after_fork)
    return node.launcher  # type: ignore[no-any-return]


def start_workers(
    node: Node,
    manager: ClusterManager,
    params: dict[str, Any],
    prepare: Callable[[Member], None],
    finished: Callable[[int, BaseException | None], None],
) -> None:
    """Launch on a library thread. `prepare(member)` (leader) sets the member's callbacks before it is started;
    `finished(count, error)` (leader) says how many processes were launched, and what went wrong after those.
    """
    Launch(node, manager, params, prepare, finished).start()


class Launch:
    """One launch: what it needs, and what has come of it. Everything runs on the leader unless it says otherwise."""

    def __init__(
        self,
        node: Node,
        manager: ClusterManager,
        params: dict[str, Any],
        prepare: Callable[[Member], None],
        finished: Callable[[int, BaseException | None], None],
    ) -> None:
        self.node = node
        self.manager = manager
        self.params = {**manager.default_addprocs_params(), **params, "cookie": node.cookie, "launcher": launcher(node)}
        self.params["identity"] = node.own_identity
        self.seconds = config.launch_timeout(self.params.get("timeout"))
        config.silent_seconds()  # ValueError here, and not on the leader when there is a connection
        self._wishes = wishes(self.params)
        # How many workers a host has in the end, where that is not what its `WorkerConfig` says.
        self.per_host = manager.n if isinstance(manager, LocalManager) else None
        self.prepare = prepare
        self._finished = finished
        self._count = 0
        self._over = False
        self._given_up = False
        # A manager with a deadline of its own for each host may bring nothing for longer than one of them.
        patience = getattr(manager, "launch_seconds", None)
        self._patience = (self.seconds if patience is None else max(self.seconds, patience(self.params))) + _SLACK
        self._stalled: Any = None  # the timer that gives it up
        self._handles: dict[int, PopenHandle] = {}

    def start(self) -> None:
        """Begin. Any thread."""
        self._stalled = self.node.loop.call_later(self._patience, self._give_up)
        self.node.deliver(self._launch)

    def _launch(self) -> None:
        """On a library thread."""
        call_soon = self.node.loop.call_soon
        error: BaseException | None = None
        try:
            for worker in self.manager.launch(self.params):
                if not isinstance(worker, WorkerConfig):
                    raise TypeError(f"launch must give WorkerConfig objects, not {type(worker).__name__}")
                _check(worker)
                call_soon(partial(self.begin, worker))
                if self._given_up:
                    break
        except BaseException as caught:  # SystemExit too: whoever waits hears of it now
            error = caught
        call_soon(partial(self._finish, error))

    def _give_up(self) -> None:
        self._given_up = True
        text = f"{type(self.manager).__name__}.launch brought nothing within {self._patience:g} seconds"
        self._finish(LaunchWorkerError("localhost", "", text))

    def abandon(self) -> None:
        """Nobody waits for it any more: what still comes is ended. Leader."""
        self._given_up = True
        self._over = True
        if self._stalled is not None:
            self._stalled.cancel()

    def _finish(self, error: BaseException | None) -> None:
        if not self._over:
            self._over = True
            self._stalled.cancel()
            self._finished(self._count, error)

    # -- one worker --------------------------------------------------------------------------------------------

    def begin(self, worker: WorkerConfig) -> Member:
        """Make a member of it and connect to it."""
        if not self._over:
            self._stalled.cancel()
            self._stalled = self.node.loop.call_later(self._patience, self._give_up)
        self._count += 1
        member = groups.of(self.node).add(self._handle(worker), worker, self.manager)
        self._describe(member, worker)
        if self._given_up:
            member.begin(self.seconds)
            if isinstance(worker.process, LaunchedProcess) and worker.process.output >= 0:
                member.read_output(worker.process.output, worker.process.early_output)
            member.kill("it came too late")
            member.watch_exit()  # or its manager would never hear that it is gone
        else:
            self.prepare(member)
            member.begin(self.seconds)
            self._bring_up(member, worker)
        return member

    def _describe(self, member: Member, worker: WorkerConfig) -> None:
        manager, kind = self.manager, type(self.manager)
        member.tells = kind.manage not in (ClusterManager.manage, LocalManager.manage)
        if kind.kill is not ClusterManager.kill:
            member.kills = partial(manager.kill, member.pid, worker)
        closed = ConnectionAbortedError("the connection was closed before it had joined")
        member.lost_early = partial(self._unreachable, worker, closed)
        member.has_identity = bool((worker.environ or {}).get("tls"))
        member.site = "" if isinstance(manager, LocalManager) else worker.bind_addr or worker.host or ""
        if self._wishes:
            member.resources = partial(self._resources, member, worker)
            if isinstance(manager, LocalManager) or worker.host is not None:  # numbers in the order of the pids
                self.node.group.number(member)
        if not isinstance(manager, LocalManager):
            member.host = _host_of(worker)  # until it says how it calls itself

    def _unreachable(self, worker: WorkerConfig, error: BaseException) -> BaseException:
        """What the manager says of that: user code, also on the leader."""
        try:
            return self.manager.unreachable(worker, error)
        except Exception:
            return error

    def _resources(self, member: Member, worker: WorkerConfig) -> dict[str, Any]:
        """For a worker that joins: now it is known on which host it is, if it was not before."""
        of = self.per_host or (worker.environ or {}).get("count") or worker.count
        number = member.number if member.number is not None else self.node.group.number(member)
        return self._wishes.message(number, of)

    def _handle(self, worker: WorkerConfig) -> Any:
        process = worker.process
        if isinstance(process, subprocess.Popen):
            handle = self._handles.setdefault(id(process), PopenHandle(self.node.loop, process))
            return handle.retain()
        return process if isinstance(process, LaunchedProcess) else None

    def _bring_up(self, member: Member, worker: WorkerConfig) -> None:
        process = worker.process
        if isinstance(process, LaunchedProcess):
            member.address = _listener(member, process.address)
            if process.output >= 0:
                member.read_output(process.output, process.early_output)
            if type(self.manager).connect is ClusterManager.connect:
                self._dial_here(member, process.address)
                member.watch_exit()
                return
        member.watch_exit()
        self.node.deliver(partial(self._connect, member, worker))

    def _dial_here(self, member: Member, address: tuple[Any, ...]) -> None:
        """A local worker, which listens already: connecting does not block."""
        member.address = address
        try:
            member.connect(dial(address, self.seconds))
        except OSError as error:
            member.kill(f"it could not be reached: {error}")
            # It is kept: not with its traceback, whose frames are those of the user who leads the loop.
            member.failed(error.with_traceback(None))

    def _connect(self, member: Member, worker: WorkerConfig) -> None:
        """On a library thread: the manager's own transport, if it has one."""
        call_soon = self.node.loop.call_soon
        adopted: Adopted | None = None
        try:
            given = self.manager.connect(member.pid, worker)
            adopted = None if given is None else self._encrypted(adopt(given), member)
            connect_at = b"" if given is None else codec.encode(worker.connect_at, what="connect_at")[0]
        except BaseException as error:  # SystemExit too
            if adopted is not None:  # or the worker would wait at the other end, and pumps at this one
                adopted.stream.close()
                adopted.end()
            call_soon(partial(self._failed, member, worker, error))
            return
        if adopted is None:
            call_soon(partial(self._find, member, worker))
            return

        def attach() -> None:
            if worker.host is not None and worker.port is not None and worker.connect_at is None:
                # Other workers go there directly, if they can.
                member.address = _listener(member, ("tcp", str(worker.host), worker.port))
            member.address = member.address or ("manager", connect_at.hex())
            self._read_output(member, worker, None)
            member.connect(adopted.stream, adopted)

        call_soon(attach)

    def _encrypted(self, adopted: Adopted, member: Member) -> Adopted:
        """On a library thread: a listener that takes encrypted links only wants them by whatever way they come."""
        if member.has_identity:
            from distpool.transport import tls

            try:
                adopted.stream = tls.connect(adopted.stream, self.node.own_identity(), self.seconds)
            except OSError:
                adopted.end()
                raise
        return adopted

    def _failed(self, member: Member, worker: WorkerConfig, error: BaseException) -> None:
        self._read_output(member, worker, None)  # its last lines may say why
        member.failed(error)

    def _read_output(
        self, member: Member, worker: WorkerConfig, on_line: Callable[[str], bool] | None
    ) -> BaseException | None:
        if worker.io is None or member.output is not None or member.state is State.GONE:
            return None
        try:
            descriptor, early = open_output(worker.io)
            member.read_output(descriptor, early, on_line)
        except Exception as error:  # `io` is an object of the user's, and here an error would be everybody's
            return error
        return None

    def _find(self, member: Member, worker: WorkerConfig) -> None:
        """Where does it listen?"""
        if worker.host is not None and worker.port is not None:
            self._read_output(member, worker, None)
            self._dial(member, worker)
        elif worker.io is None:
            member.failed(ValueError("its WorkerConfig has neither io nor host and port"))
        else:
            error = self._read_output(member, worker, _HeaderLine(self, member, worker))
            if error is not None:
                member.failed(error)

    def _dial(self, member: Member, worker: WorkerConfig) -> None:
        host, port = str(worker.host), worker.port
        is_unix = host.startswith("unix:")
        member.address = ("unix", host[len("unix:") :]) if is_unix else _listener(member, ("tcp", host, port))
        if not isinstance(self.manager, LocalManager):
            member.site = worker.bind_addr or host

        def work() -> None:
            try:
                # A little less than the member has for all, so that its end finds the reason.
                sock = dial(member.address, 0.9 * self.seconds, self.node.identity)
            except (OSError, OverflowError, UnicodeError) as error:
                failure = self._unreachable(worker, error)
                self.node.loop.call_soon(lambda: member.failed(failure))
            else:
                self.node.loop.call_soon(lambda: member.connect(sock))

        self.node.deliver(work)

    # -- further workers of a host -----------------------------------------------------------------------------

    def more(self, member: Member, done: Callable[[int, list[LaunchWorkerError]], None]) -> bool:
        """Let a worker that has joined start the rest of its `config.count`; False if there is nothing to start.

        `done(count, errors)`: how many were begun (each went through `prepare`), and why others were not.
        """
        worker = member.config
        count = worker.count
        if count is None or count == 1 or member.link is None or isinstance(self.manager, LocalManager):
            return False
        command = _words(worker.exename) + _words(worker.exeflags) if worker.exename is not None else []
        wanted = count if count == "auto" else int(count) - 1
        waiting = _waiting(self.node)

        def over(launched: messages.Launched | None) -> None:
            if waiting.pop(member.pid, None) is None:
                return
            timer.cancel()
            if launched is None:
                error = LaunchWorkerError(member.host, member.last_output, "it did not start the others")
                done(0, [error])
                return
            from dataclasses import replace

            names = []
            for number, host, port in launched.workers:
                there = worker.host if worker.bind_addr is None and _is_any(host) else host
                other = replace(worker, io=None, process=None, ospid=None, count=None, host=there, port=port)
                names.append([number, self.begin(other).pid])
            if member.link is not None:
                member.link.send(Kind.NAMED, messages.Named(names).pack())
            done(len(names), [LaunchWorkerError(member.host, output, why) for why, output in launched.problems])

        waiting[member.pid] = over
        timer = self.node.loop.call_later(self.seconds + _SLACK, lambda: over(None))
        member.link.send(Kind.LAUNCH, messages.Launch(wanted, command, self.seconds).pack())
        return True


def _check(worker: WorkerConfig) -> None:
    """What `launch` gave, on its thread: on the leader an error would be nobody's, and who waits would wait on."""
    count = worker.count = config.as_int(worker.count)
    if count is not None and count != "auto" and (isinstance(count, bool) or not isinstance(count, int)):
        raise TypeError(f"WorkerConfig.count must be a number of workers or 'auto', not {count!r}")
    if worker.environ is not None and not isinstance(worker.environ, dict):
        raise TypeError(f"WorkerConfig.environ must be a dict, not {type(worker.environ).__name__}")
    _words(worker.exename), _words(worker.exeflags)
    if worker.connect_idents is not None:
        worker.connect_idents = list(worker.connect_idents)


class _HeaderLine:
    """Looks for the header line among the first lines of a worker."""

    def __init__(self, launch: Launch, member: Member, worker: WorkerConfig) -> None:
        self._launch = launch
        self._member = member
        self._worker = worker
        self._lines = 0

    def __call__(self, line: str) -> bool:
        found = parse_header(line)
        if found is not None:
            self._worker.host, self._worker.port = found
            self._member.host = _host_of(self._worker)
            self._launch._dial(self._member, self._worker)
            return True
        self._lines += 1
        if self._lines > MAX_BANNER:
            self._member.failed(ConnectionError(f"it printed more than {MAX_BANNER} lines before the header line"))
            self._member.kill()
        return False


def _waiting(node: Node) -> dict[int, Callable[[messages.Launched | None], None]]:
    """Workers that start others, and who waits for that. Leader."""
    group = groups.of(node)
    waiting = group.starting_others
    if Kind.LAUNCHED not in node.handlers:

        def on_launched(link: Any, frame: Frame) -> None:
            over = waiting.get(link.peer)
            if over is not None:
                over(messages.Launched.unpack(frame.control))

        def on_gone(member: Member) -> None:
            over = waiting.get(member.pid)
            if over is not None:
                over(None)

        node.handlers[Kind.LAUNCHED] = on_launched
        group.gone_watchers.append(on_gone)
    return waiting


def _host_of(worker: WorkerConfig) -> str:
    """What errors call the host of a worker that has not joined."""
    host = (worker.environ or {}).get("machine") or worker.host
    return "localhost" if not host or str(host).startswith("unix:") else str(host)


def _listener(member: Member, address: tuple[Any, ...]) -> tuple[Any, ...]:
    """The address of its listener, and how one speaks there."""
    return ("tls", *address[1:]) if member.has_identity and address[0] == "tcp" else address


def _words(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(part) for part in value]


def _is_any(host: str) -> bool:
    return host in ("0.0.0.0", "::", "")


__all__ = ["MAX_BANNER", "Launch", "launcher", "start_workers"]
