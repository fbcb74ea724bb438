"""distpool: run functions on many processes and many machines.

`ClusterExecutor` is a drop-in for `concurrent.futures.ProcessPoolExecutor`, `DistPool` for `multiprocessing.Pool`,
`pmap` is Julia's parallel map. Names are loaded on first use, so that `import distpool` is cheap.

Example:
    with distpool.ClusterExecutor(4) as ex:
        print(list(ex.map(lambda x: x * x, range(10))))
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name -> module that defines it.
_HOME = {
    "AuthenticationError": "errors",
    "CapturedException": "errors",
    "ChannelClosedError": "errors",
    "CompositeException": "errors",
    "DistpoolError": "errors",
    "LaunchWorkerError": "errors",
    "ProcessExitedException": "errors",
    "RemoteException": "errors",
    "SerializationError": "errors",
    "TopologyError": "errors",
    "VersionMismatchError": "errors",
    "ClusterExecutor": "executor",
    "ClusterManager": "managers.base",
    "ExponentialBackOff": "recovery",
    "DistPool": "pool",
    "Future": "refs.refs",
    "LocalManager": "managers.local",
    "WorkerConfig": "managers.base",
    "pgenerate": "mapping",
    "pmap": "mapping",
    "dump_stacks": "monitor",
    "plot_trace": "traceplot",
    "stats": "monitor",
    "trace": "tracing",
}

if TYPE_CHECKING:
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
    from distpool.managers.base import ClusterManager, WorkerConfig
    from distpool.managers.local import LocalManager
    from distpool.monitor import dump_stacks, stats
    from distpool.pool import DistPool
    from distpool.mapping import pgenerate, pmap
    from distpool.recovery import ExponentialBackOff
    from distpool.refs.refs import Future
    from distpool.traceplot import plot_trace
    from distpool.tracing import trace

__all__ = [
    "AuthenticationError",
    "CapturedException",
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
    "RemoteException",
    "SerializationError",
    "TopologyError",
    "VersionMismatchError",
    "WorkerConfig",
    "__version__",
    "dump_stacks",
    "pgenerate",
    "plot_trace",
    "pmap",
    "stats",
    "trace",
]

logging.getLogger("distpool").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'distpool' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"distpool.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
