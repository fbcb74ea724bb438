"""Membership: adding, removing and interrupting workers (layer 9).

    addprocs --> plan (manager, parameters, checked in the caller) --> Adding (`adding`) --> future
    rmprocs  --> leader: Member.remove --> SHUTDOWN, SIGTERM, SIGKILL --> GONE --> manager told --> future
    interrupt --> INTERRUPT to the worker, manage("interrupt") to the manager

The callers' threads check arguments and wait; everything else runs on the leader. Launches of several threads run at
the same time; only pids and the topology are given out one after another.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distpool import config, exits
from distpool.adding import Adding, close_launcher
from distpool.hosts import check_options, kept, manager_for
from distpool.logs import Log
from distpool.managers.base import ClusterManager
from distpool.members import myrole
from distpool.node import group as groups
from distpool.node import node as nodes
from distpool.node.group import Group, Member
from distpool.node.node import Node
from distpool.refs.refs import Future
from distpool.wire import messages
from distpool.wire.frames import Kind

log = Log("cluster")

_PATIENCE = 5.0  # seconds that a worker has to exit when asked
_BUILT_IN = ("distpool.managers.local", "distpool.managers.ssh")
Machine = str | tuple[str, int | str]


def addprocs(machines: int | Iterable[Machine] | Path | ClusterManager | None = None, /, **options: Any) -> list[int]:
    """Start workers and return their pids, sorted, when all of them have joined.

    An int: that many on this machine (default: one per CPU); a list of machine specs, or the `Path` of a machine file:
    through SSH; a `ClusterManager`. Keywords: `topology`, `lazy`, `dir`, `exename`, `exeflags`, `env`,
    `enable_threaded_blas`, `timeout` (seconds), and those of the manager (`default_addprocs_params`).

    ValueError, TypeError: bad arguments, before anything is started. `CompositeException` of `LaunchWorkerError`s: some
    workers did not come up; the others stay. RuntimeError: on a worker, or the topology does not fit.

    Example: `pids = addprocs(4, env={"MODE": "fast"})`
    """
    adding = _plan(machines, options)
    with adding.node.loop.following():
        return adding.future.result()


def addprocs_async(
    machines: int | Iterable[Machine] | Path | ClusterManager | None = None, /, **options: Any
) -> concurrent.futures.Future[list[int]]:
    """As `addprocs`, but return a Future of the pids at once; each worker can be used as soon as it has joined.

    Bad arguments raise here. Example: `future = addprocs_async(100); ...; pids = future.result()`
    """
    return _plan(machines, options).future


def _plan(machines: Any, options: dict[str, Any]) -> Adding:
    """Check everything that can be checked before something is started."""
    if myrole() != "master":
        raise RuntimeError("Only process 1 can add and remove workers")
    exits.check_alive()
    manager = manager_for(machines, options)
    defaults = manager.default_addprocs_params()
    if type(manager).__module__ in _BUILT_IN:
        check_options(manager, options)
    params = kept({**defaults, **options})
    timeout = config.as_int(params.get("timeout"))
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0):
        raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
    manager.check(params)
    node = nodes.current()
    if "DISTPOOL_TOP" in os.environ:
        from distpool.top import serve_if_wanted  # here: hardly anybody is watched

        serve_if_wanted(node)
    group = groups.of(node)
    group.claim_topology(params.get("topology", "all_to_all"), params.get("lazy", True))
    try:
        exits.register_cluster(node, end_workers)
        adding = Adding(node, group, manager, params)
    except BaseException:
        group.release_topology()  # nobody else would: there is no launch that could end
        raise
    adding.start()
    return adding


# -- removing ----------------------------------------------------------------------------------------------------


def rmprocs(*pids: int | Iterable[int], waitfor: float | None = None) -> concurrent.futures.Future[None]:
    """Remove these workers: what runs there is interrupted, they exit; who does not is ended by force. Calls to them
    raise `ProcessExitedException` from now on, and so do those that wait for one, unless it still returns.

    Takes ints and iterables of ints. Unknown and removed pids are ignored; pid 1 brings a warning. Returns a Future,
    done when they are gone: waits for it without `waitfor`, not at all with `waitfor=0`, else that many seconds, then
    `RuntimeError("rmprocs: pids [...] not terminated after S seconds.")` (they go nevertheless).

    Example: `rmprocs(workers())`
    """
    if myrole() != "master":
        raise RuntimeError("Only process 1 can add and remove workers")
    wanted = _flat(pids)
    waitfor = config.as_int(waitfor)
    if waitfor is not None and (isinstance(waitfor, bool) or not isinstance(waitfor, int | float) or not waitfor >= 0):
        raise ValueError(f"waitfor must be a number of seconds, not {waitfor!r}")
    future: Future[None] = Future()  # ours travels: a worker may have pid 1 call this
    future.set_running_or_notify_cancel()
    if 1 in wanted:
        warnings.warn("rmprocs: process 1 not removed", stacklevel=2)
    node = nodes.existing()
    group: Group | None = None if node is None else node.group
    members = [group.members[pid] for pid in wanted if pid in group.members] if group is not None else []
    if node is None or group is None or not members:
        future.set_result(None)
        return future
    for member in members:
        member.strike_off()
        group.drop_default(member.pid)
    removal = _Removal(node, group, members, future)
    node.loop.call_soon(removal.begin)
    if waitfor == 0:
        return future
    with node.loop.following():
        try:
            future.result(None if waitfor is None else min(waitfor, config.LONGEST))
        except TimeoutError:
            left = sorted(member.pid for member in members if member.pid in group.members)
            if left:
                text = f"rmprocs: pids {left} not terminated after {waitfor} seconds."
                raise RuntimeError(text) from None
    return future


class _Removal:
    """Some members on their way out. Leader."""

    def __init__(
        self, node: Node, group: Group, members: list[Member], future: concurrent.futures.Future[None]
    ) -> None:
        self._node = node
        self._group = group
        self._members = members
        self._future = future
        self._left = {member.pid for member in members}

    def begin(self, patience: float = _PATIENCE) -> None:
        """Ask them to go."""
        self._group.gone_watchers.append(self._gone)
        for member in self._members:
            if member.pid in self._group.members:
                member.remove(patience)
            else:
                self._left.discard(member.pid)
        self._check()

    def _gone(self, member: Member) -> None:
        if member.pid in self._left:
            self._left.discard(member.pid)
            self._check()

    def _check(self) -> None:
        if self._left or self._gone not in self._group.gone_watchers:
            return
        self._group.gone_watchers.remove(self._gone)
        told = threading.Semaphore(0)

        def settle() -> None:
            deadline = time.monotonic() + _PATIENCE
            for _ in self._members:
                told.acquire(timeout=max(0.0, deadline - time.monotonic()))
            self._future.set_result(None)

        def after() -> None:
            for member in self._members:
                member.notices.put(told.release)
            self._node.deliver(settle)

        # Behind the `deregister` and `finalize` that their managers are told in this very moment.
        self._node.loop.call_soon(after)
        close_launcher(self._node)


class _EndWarning:
    """Says, once, that workers run something while the program ends. Leader.

    What runs there only they know: who called may have forgotten the call (`remote_do`), or its future.
    """

    said = False

    def __call__(self) -> None:
        if not self.said:
            self.said = True
            log.warning("The program ends: what still runs on its workers is interrupted.")


def end_workers(node: Node, patience: float) -> None:
    """The end of the program: all workers of `addprocs` go, as with `rmprocs`. On the main thread, at exit, until they
    have gone; on the leader, before that, because threads wait for what runs there: at once, and that is said first."""
    group: Group | None = node.group
    if group is None:
        return
    members = [group.members[pid] for pid in list(group.default_members) if pid in group.members]
    others = [member for member in list(group.members.values()) if member not in members and member.borrower is None]
    members += [member for member in others if member.removed or not member.listed]  # going, or still coming
    if not isinstance(group.on_busy, _EndWarning):
        group.on_busy = _EndWarning()
    for member in members:
        member.strike_off()
    if node.loop.leads:
        group.on_busy()
        for member in members:
            member.remove(patience)
        return
    if not members:
        node.tell(_PATIENCE, whole=True)  # of one that has just gone, the last lines may be about to be printed
        return
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    removal = _Removal(node, group, members, future)
    node.loop.call_soon(lambda: removal.begin(patience))
    with node.loop.following():
        concurrent.futures.wait([future], 2 * _PATIENCE)
    node.tell(_PATIENCE, whole=True)


# -- interrupting ------------------------------------------------------------------------------------------------


def interrupt(*pids: int | Iterable[int]) -> None:
    """Raise KeyboardInterrupt in every call that runs on these workers (default: on all). An idle worker is unharmed.

    `interrupt(1)` does nothing. Managers of your own have been told when it returns, as Julia's have, unless that takes
    more than 5 seconds. ValueError: no such process; ProcessExitedException: it is gone; RuntimeError: called on a
    worker.

    Example: `interrupt(2)` ends a `remotecall(time.sleep, 2, 60)`.
    """
    if myrole() != "master":
        raise RuntimeError("Only process 1 can interrupt workers")
    node = nodes.existing()
    group: Group | None = None if node is None else node.group
    if not pids:
        wanted = group.listed() if group is not None else []
    else:
        wanted = [pid for pid in _flat(pids) if pid != 1]
    if wanted and group is None:
        raise ValueError(f"no process with id {wanted[0]} exists")
    members = [group.member(pid) for pid in wanted] if group is not None else []
    for member in members:
        if member.link is not None:
            member.link.send(Kind.INTERRUPT, messages.Interrupt().pack())
        member.tell("interrupt")
    told = [member.notices for member in members if member.tells and not member.notices.is_mine]
    if node is not None and told and node.loop.may_wait:
        deadline = time.monotonic() + _PATIENCE
        with node.loop.following():
            for notices in told:
                notices.join(max(0.0, deadline - time.monotonic()))


def _flat(pids: Iterable[Any]) -> list[int]:
    """Ints and iterables of ints as one list without repetitions; TypeError for anything else."""
    found: dict[int, None] = {}
    for entry in map(config.as_int, pids):
        several = isinstance(entry, Iterable) and not isinstance(entry, str | bytes | bytearray | memoryview)
        if isinstance(entry, bool) or not (several or isinstance(entry, int)):
            raise TypeError(f"a pid is an int, not {type(entry).__name__}")
        for pid in [entry] if isinstance(entry, int) else map(config.as_int, entry):
            if isinstance(pid, bool) or not isinstance(pid, int):
                raise TypeError(f"a pid is an int, not {type(pid).__name__}")
            found[pid] = None
    return list(found)


def default_addprocs_params(manager: ClusterManager | None = None) -> dict[str, Any]:
    """The keywords of `addprocs` that every manager takes, or those of `manager`, with their defaults.

    Example: `default_addprocs_params()["topology"]` is `"all_to_all"`.
    """
    return dict((manager if manager is not None else ClusterManager()).default_addprocs_params())


__all__ = ["addprocs", "addprocs_async", "default_addprocs_params", "interrupt", "rmprocs"]
