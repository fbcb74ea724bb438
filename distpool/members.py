"""Who is in the process group, asked from any process (layer 6).

    pid 1: tables of the Group (no lock: a snapshot)        worker: the same question, asked of pid 1

Nothing here starts anything: alone, there is no node and no thread, and the answers are those of a group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from distpool.config import as_int, check_cookie
from distpool.node import group as groups
from distpool.node import node as nodes
from distpool.node.group import Group, WorkerInfo
from distpool.node.output import OutputHook

Hook = TypeVar("Hook", bound=Callable[[WorkerInfo], object])


def myid() -> int:
    """The pid of this process: 1 for the program that started the others.

    Example: `remotecall_fetch(myid, 2)` is 2.
    """
    node = nodes.existing()
    return 1 if node is None else node.pid


def myrole() -> str:
    """`"master"` on pid 1, `"worker"` on every worker. Example: `if myrole() == "master": addprocs(4)`"""
    node = nodes.existing()
    return "master" if node is None or node.is_master else "worker"


def procs(pid: int | None = None) -> list[int]:
    """All pids of the group, sorted, 1 included; with `pid`: those on the same machine as that process.

    ValueError: no such process; ProcessExitedException: it is gone. Example: `procs()` is `[1]` alone.
    """
    if pid is not None:
        pid = _check_pid(pid)
    if myrole() == "worker":
        return list(_ask(procs) if pid is None else _ask(procs, pid))
    group = _group()
    if pid is None:
        return [1, *(group.listed() if group is not None else [])]
    site = _site(group, pid)
    members = group.members if group is not None else {}
    near = [other for other in (group.listed() if group is not None else []) if members[other].site == site]
    return [1, *near] if site == "" else near


def workers() -> list[int]:
    """All pids except 1, sorted; `[1]` if there are no others. Example: `for pid in workers(): ...`"""
    everybody = procs()
    return everybody[1:] or everybody


def nprocs() -> int:
    """How many processes there are, 1 included. Example: `nprocs()` is 5 after `addprocs(4)`."""
    return len(procs())


def nworkers() -> int:
    """How many workers there are; 1 if this process is alone. Example: `nworkers()` is 4 after `addprocs(4)`."""
    return len(workers())


def check_same_host(pids: Iterable[int]) -> bool:
    """Whether these processes run on one machine, so that they could share memory.

    ValueError: no such process; ProcessExitedException: it is gone. Example: `check_same_host([1, 2, 3])`
    """
    wanted = [_check_pid(pid) for pid in pids]
    if myrole() == "worker":
        return bool(_ask(check_same_host, wanted))
    group = _group()
    return len({_site(group, pid) for pid in wanted}) <= 1


def cluster_cookie(cookie: str | None = None) -> str:
    """The secret that processes of this group prove to know; with an argument: set it for workers to come.

    ASCII text of 1 to 64 characters, random by default. ValueError for anything else: a newline, carriage return or NUL
    in it too, because workers read it as a line, and the empty text, which would keep nobody out.

    Example: `cluster_cookie()` goes to a worker that is started by hand.
    """
    node = nodes.current()
    if cookie is not None:
        if not isinstance(cookie, str):
            raise TypeError(f"the cookie must be a str, not {type(cookie).__name__}")
        check_cookie(cookie)
        node.cookie = cookie
    return node.cookie


def set_output_hook(f: OutputHook | None) -> None:
    """Call `f(pid, line)` for each line that a worker prints, on a library thread, in order: what it returns is
    printed instead of the line with its prefix; nothing if that is None. `set_output_hook(None)` undoes it.

    RuntimeError on a worker. Example: `set_output_hook(lambda pid, line: f"[{pid}] {line}")`
    """
    if f is not None and not callable(f):
        raise TypeError(f"the hook must be callable, not {type(f).__name__}")
    _master_group("set_output_hook").output_hook = f


def on_worker_started(f: Hook) -> Hook:
    """Call `f(info)` when a worker has joined (also those of executors), on a library thread, in order.

    `info` has `pid`, `host`, `ospid`. Returns `f`, so it can decorate. RuntimeError on a worker.

    Example: `on_worker_started(lambda info: print("new:", info.pid, info.host))`
    """
    return _add_hook(_master_group("on_worker_started").started_hooks, f)


def on_worker_exited(f: Hook) -> Hook:
    """Call `f(info)` when a worker has gone, for whatever reason, on a library thread, in order.

    `info` has `pid`, `host`, `ospid`, `exitcode` (negative: the signal; None: unknown) and `reason` (text). Returns
    `f`, so it can decorate. RuntimeError on a worker.

    Example: `on_worker_exited(lambda info: log.warning("worker %d: %s", info.pid, info.reason))`
    """
    return _add_hook(_master_group("on_worker_exited").exited_hooks, f)


def _add_hook(hooks: list[Callable[[WorkerInfo], object]], function: Hook) -> Hook:
    if not callable(function):
        raise TypeError(f"the function must be callable, not {type(function).__name__}")
    hooks.append(function)
    return function


def _check_pid(pid: Any) -> int:
    pid = as_int(pid)
    if not isinstance(pid, int) or isinstance(pid, bool):
        raise TypeError(f"a pid is an int, not {type(pid).__name__}")
    return pid


def _site(group: Group | None, pid: int) -> str:
    """What identifies the machine of that process; empty for this one."""
    if pid == 1:
        return ""
    if group is None:
        raise ValueError(f"no process with id {pid} exists")
    return group.member(pid).site


def _group() -> Group | None:
    node = nodes.existing()
    return None if node is None else node.group


def _master_group(what: str) -> Group:
    if myrole() != "master":
        raise RuntimeError(f"{what}() works on process 1 only")
    return groups.of(nodes.current())


def _ask(function: Callable[..., Any], *args: Any) -> Any:
    """What pid 1 says; its error as it is: that pid 1 was asked is of no interest to the user."""
    from distpool.calls import remotecall_fetch
    from distpool.errors import RemoteException

    try:
        return remotecall_fetch(function, 1, *args)
    except RemoteException as error:
        raise error.captured.ex from None


__all__ = [
    "check_same_host",
    "cluster_cookie",
    "myid",
    "myrole",
    "nprocs",
    "nworkers",
    "on_worker_exited",
    "on_worker_started",
    "procs",
    "set_output_hook",
    "workers",
]
