"""distpool: run functions on many processes and many machines.

`ClusterExecutor` is a drop-in for `concurrent.futures.ProcessPoolExecutor`, `DistPool` for `multiprocessing.Pool`,
`pmap` is Julia's parallel map. Names are loaded on first use, so that `import distpool` is cheap.

Example:
    with distpool.ClusterExecutor(4) as ex:
        print(list(ex.map(lambda x: x * x, range(10))))
"""

from __future__ import annotations

import atexit
import importlib
import sys

TYPE_CHECKING = False  # not from `typing`: see `hints`

__version__ = "0.1.0"

#: Public name -> module that defines it.
_HOME = {
    "AuthenticationError": "errors",
    "CachingPool": "pools",
    "CapturedException": "errors",
    "Channel": "refs.channel",
    "ChannelClosedError": "errors",
    "ClusterExecutor": "executor",
    "ClusterManager": "managers.base",
    "CompositeException": "errors",
    "DistPool": "pool",
    "DistpoolError": "errors",
    "ExponentialBackOff": "recovery",
    "Future": "refs.refs",
    "LaunchWorkerError": "errors",
    "LocalManager": "managers.local",
    "ProcessExitedException": "errors",
    "RRID": "refs.owner",
    "RemoteChannel": "refs.channels",
    "RemoteException": "errors",
    "SSHManager": "managers.ssh",
    "SerializationError": "errors",
    "TopologyError": "errors",
    "VersionMismatchError": "errors",
    "WorkerConfig": "managers.record",
    "WorkerPool": "pools",
    "addprocs": "cluster",
    "addprocs_async": "cluster",
    "channel_from_id": "verbs",
    "check_same_host": "members",
    "clear": "broadcast",
    "cluster_cookie": "members",
    "default_addprocs_params": "cluster",
    "default_worker_pool": "pools",
    "distributed": "loops",
    "dump_stacks": "monitor",
    "everywhere": "broadcast",
    "fetch": "verbs",
    "fetch_any": "spawning",
    "fetchfrom": "spawning",
    "finalize": "verbs",
    "include": "broadcast",
    "init_worker": "standalone",
    "interrupt": "cluster",
    "isready": "verbs",
    "load_machine_file": "managers.specs",
    "myid": "members",
    "myrole": "members",
    "nprocs": "members",
    "nworkers": "members",
    "on_worker_exited": "members",
    "on_worker_started": "members",
    "parse_machine": "managers.specs",
    "pgenerate": "mapping",
    "plot_trace": "traceplot",
    "pmap": "mapping",
    "process_messages": "standalone",
    "procs": "members",
    "put": "verbs",
    "remote": "pools",
    "remote_do": "calls",
    "remotecall": "calls",
    "remotecall_eval": "broadcast",
    "remotecall_fetch": "calls",
    "remotecall_wait": "calls",
    "remoteref_id": "verbs",
    "rmprocs": "cluster",
    "set_default_worker_pool": "pools",
    "set_output_hook": "members",
    "spawn": "spawning",
    "spawnat": "spawning",
    "splitrange": "loops",
    "start_worker": "standalone",
    "stats": "monitor",
    "sync": "spawning",
    "take": "verbs",
    "trace": "tracing",
    "wait": "verbs",
    "worker_id_from_socket": "verbs",
    "workers": "members",
}

if TYPE_CHECKING:
    from typing import Any

    from distpool.broadcast import clear, everywhere, include, remotecall_eval
    from distpool.calls import remote_do, remotecall, remotecall_fetch, remotecall_wait
    from distpool.cluster import addprocs, addprocs_async, default_addprocs_params, interrupt, rmprocs
    from distpool.errors import (
        AuthenticationError,
        CapturedException,
        ChannelClosedError,
        CompositeException,
        DistpoolError,
        LaunchWorkerError,
        ProcessExitedException,
        RemoteException,
        SerializationError,
        TopologyError,
        VersionMismatchError,
    )
    from distpool.executor import ClusterExecutor
    from distpool.loops import distributed, splitrange
    from distpool.managers.base import ClusterManager
    from distpool.managers.local import LocalManager
    from distpool.managers.record import WorkerConfig
    from distpool.managers.specs import load_machine_file, parse_machine
    from distpool.managers.ssh import SSHManager
    from distpool.mapping import pgenerate, pmap
    from distpool.members import (
        check_same_host,
        cluster_cookie,
        myid,
        myrole,
        nprocs,
        nworkers,
        on_worker_exited,
        on_worker_started,
        procs,
        set_output_hook,
        workers,
    )
    from distpool.monitor import dump_stacks, stats
    from distpool.pool import DistPool
    from distpool.pools import CachingPool, WorkerPool, default_worker_pool, remote, set_default_worker_pool
    from distpool.recovery import ExponentialBackOff
    from distpool.refs.channel import Channel
    from distpool.refs.channels import RemoteChannel
    from distpool.refs.owner import RRID
    from distpool.refs.refs import Future
    from distpool.spawning import fetch_any, fetchfrom, spawn, spawnat, sync
    from distpool.standalone import init_worker, process_messages, start_worker
    from distpool.traceplot import plot_trace
    from distpool.tracing import trace
    from distpool.verbs import (
        channel_from_id,
        fetch,
        finalize,
        isready,
        put,
        remoteref_id,
        take,
        wait,
        worker_id_from_socket,
    )

__all__ = [
    "AuthenticationError",
    "CachingPool",
    "CapturedException",
    "Channel",
    "ChannelClosedError",
    "ClusterExecutor",
    "ClusterManager",
    "CompositeException",
    "DistPool",
    "DistpoolError",
    "ExponentialBackOff",
    "Future",
    "LaunchWorkerError",
    "LocalManager",
    "ProcessExitedException",
    "RRID",
    "RemoteChannel",
    "RemoteException",
    "SSHManager",
    "SerializationError",
    "TopologyError",
    "VersionMismatchError",
    "WorkerConfig",
    "WorkerPool",
    "__version__",
    "addprocs",
    "addprocs_async",
    "channel_from_id",
    "check_same_host",
    "clear",
    "cluster_cookie",
    "debug",
    "default_addprocs_params",
    "default_worker_pool",
    "distributed",
    "dump_stacks",
    "everywhere",
    "fetch",
    "fetch_any",
    "fetchfrom",
    "finalize",
    "include",
    "init_worker",
    "interrupt",
    "isready",
    "load_machine_file",
    "myid",
    "myrole",
    "nprocs",
    "nworkers",
    "on_worker_exited",
    "on_worker_started",
    "parse_machine",
    "pgenerate",
    "plot_trace",
    "pmap",
    "process_messages",
    "procs",
    "put",
    "remote",
    "remote_do",
    "remotecall",
    "remotecall_eval",
    "remotecall_fetch",
    "remotecall_wait",
    "remoteref_id",
    "rmprocs",
    "set_default_worker_pool",
    "set_output_hook",
    "spawn",
    "spawnat",
    "splitrange",
    "start_worker",
    "stats",
    "sync",
    "take",
    "trace",
    "wait",
    "worker_id_from_socket",
    "workers",
]


def __getattr__(name: str) -> Any:
    if name == "debug":
        return importlib.import_module("distpool.debug")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'distpool' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"distpool.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _at_exit() -> None:
    """Registered here and not with the first worker: `atexit` hooks of the user run before it, with the workers."""
    exits = sys.modules.get("distpool.exits")
    if exits is not None:
        exits.end_cluster()
    loops = sys.modules.get("distpool.loops")
    if loops is not None:
        loops.report_failed()  # also those that failed because their workers had to go
    nodes = sys.modules.get("distpool.node.node")
    node = nodes.existing() if nodes is not None else None
    if node is not None:
        node.segments.close()


atexit.register(_at_exit)

if "logging" in sys.modules:  # else whatever loads it will do this
    importlib.import_module("distpool.logs").be_quiet()
