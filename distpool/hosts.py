"""What `hosts=` and the first argument of `addprocs` may be: turned into a manager (layer 9)."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distpool.managers.base import ClusterManager
from distpool.managers.local import LocalManager
from distpool.managers.specs import load_machine_file


@dataclasses.dataclass
class Plan:
    """How an executor gets its workers: how many, from which manager, with which parameters."""

    size: int
    manager: Callable[[int], ClusterManager]
    params: dict[str, Any]
    borrowed: list[int] | None = None
    """Pids of workers that live already, instead of all that."""


def usable_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def manager_for(machines: Any, options: dict[str, Any]) -> ClusterManager:
    """The manager of `addprocs`. TypeError, ValueError: that is nothing to start workers on."""
    if isinstance(machines, ClusterManager):
        return machines
    if machines is None:
        machines = usable_cpus()
    if isinstance(machines, int):
        return LocalManager(machines, options.get("restrict", True))
    if isinstance(machines, Path):
        return ssh_manager(load_machine_file(machines))
    if isinstance(machines, Iterable) and not isinstance(machines, str | bytes):
        return ssh_manager(list(machines))
    expected = "an int, a list of machine specs, the Path of a machine file or a ClusterManager"
    raise TypeError(f"addprocs takes {expected}, not {machines!r}")


def ssh_manager(machines: list[Any]) -> ClusterManager:
    """The manager for these machines; it needs paramiko, so it is loaded only here."""
    name = "distpool.managers.ssh"
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError("machines can be reached only through distpool.managers.ssh, which is not installed") from None
    manager: ClusterManager = found.SSHManager(machines)
    return manager


def plan_for(hosts: Any, max_workers: int | None, options: dict[str, Any]) -> Plan:
    """The plan for these arguments; ValueError and TypeError with the standard library's texts."""
    if max_workers is not None:
        check_count(max_workers)
    if callable(getattr(hosts, "prepare", None)):
        return _plan_for_pool(hosts, max_workers, options)
    if isinstance(hosts, str) and hosts.startswith("local://"):
        text = hosts[len("local://") :]
        if text and not text.isdigit():
            raise ValueError(f"local:// takes a number of workers, not {text!r}")
        hosts = int(text) if text else None
    if hosts is None:
        hosts = max_workers if max_workers is not None else usable_cpus()
    if isinstance(hosts, bool):
        raise TypeError("hosts must not be a bool")
    if isinstance(hosts, int):
        check_count(hosts)
        restrict = options.get("restrict", True)
        check_options(LocalManager(0), options)
        return Plan(hosts, lambda n: LocalManager(n, restrict), options)
    if isinstance(hosts, LocalManager):
        manager = hosts
        check_options(manager, options)
        return Plan(manager.n, lambda n: LocalManager(n, manager.restrict), options)
    if isinstance(hosts, float):
        raise TypeError(f"max_workers must be an int, not {type(hosts).__name__}")
    raise TypeError(f"hosts={hosts!r}: this version starts local workers only (int, None, local://N, LocalManager)")


def _plan_for_pool(pool: Any, max_workers: int | None, options: dict[str, Any]) -> Plan:
    """For a `WorkerPool` (known by its `prepare`): its living workers, at most `max_workers` of them."""
    for name in options:
        raise ValueError(f"Invalid keyword argument {name}: workers of a pool have been started already")
    pids = [pid for pid in pool.workers() if pid != 1][:max_workers]
    if not pids:
        raise RuntimeError("No active worker available in pool")
    return Plan(len(pids), LocalManager, {}, pids)


def check_count(count: Any) -> None:
    """ValueError, with the standard library's text, unless `count` is a positive int."""
    if not isinstance(count, int):
        raise TypeError(f"max_workers must be an int, not {type(count).__name__}")
    if count <= 0:
        raise ValueError("max_workers must be greater than 0")


def check_options(manager: ClusterManager, options: dict[str, Any]) -> None:
    """ValueError for a keyword that the manager does not know, before anything is launched."""
    known = manager.default_addprocs_params()
    for name in options:
        if name not in known:
            raise ValueError(f"Invalid keyword argument {name}")
