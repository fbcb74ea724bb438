"""What `hosts=` and the first argument of `addprocs` may be: turned into a manager (layer 9)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

from distpool import config
from distpool.fields import Fields
from distpool.hints import Any
from distpool.managers.base import ClusterManager
from distpool.managers.local import LocalManager
from distpool.supply import Place, spread

ENTRY_POINTS = "distpool.managers"
"""The group of entry points under which other packages offer managers."""

_SCHEMES = {"local": ("local", "LocalManager"), "ssh": ("ssh", "SSHManager")}
"""Managers of our own, which are found without the metadata of an installation: scheme -> module, class."""


class Plan(Fields):
    """Where an executor gets its workers, and with which parameters.

    `cap`: no more workers than this, where the number is not known before they come. `borrowed`: pids of workers that
    live already, instead of all that.
    """

    places: list[Place]
    params: dict[str, Any]
    cap: int | None = None
    borrowed: list[int] | None = None


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
    machines = usable_cpus() if machines is None else config.as_int(machines)
    if isinstance(machines, int):
        return LocalManager(machines, options.get("restrict", True))
    if isinstance(machines, os.PathLike):
        return ssh_manager(_machines_in(machines))
    if isinstance(machines, Iterable) and not isinstance(machines, str | bytes):
        return ssh_manager(list(machines))
    expected = "an int, a list of machine specs, the Path of a machine file or a ClusterManager"
    raise TypeError(f"addprocs takes {expected}, not {machines!r}")


def _machines_in(path: os.PathLike[str]) -> list[Any]:
    from distpool.managers.specs import load_machine_file  # with all its patterns

    return list(load_machine_file(path))


def ssh_manager(machines: list[Any]) -> ClusterManager:
    """The manager for these machines, which is loaded only where somebody wants it."""
    from distpool.managers.ssh import SSHManager

    return SSHManager(machines)


def plan_for(hosts: Any, max_workers: int | None, options: dict[str, Any]) -> Plan:
    """The plan for these arguments; ValueError and TypeError with the standard library's texts."""
    hosts, max_workers = config.as_int(hosts), config.as_int(max_workers)
    if max_workers is not None:
        check_count(max_workers)
    if callable(getattr(hosts, "prepare", None)):
        return _plan_for_pool(hosts, max_workers, options)
    if hosts is None or (isinstance(hosts, str) and hosts == "local://"):
        hosts = max_workers if max_workers is not None else usable_cpus()
    if isinstance(hosts, int) and not isinstance(hosts, bool):
        check_count(hosts)
        manager: ClusterManager = LocalManager(hosts, options.get("restrict", True))
    else:
        manager = manager_of(hosts)
    check_options(manager, options)
    options = kept(options)
    if options or type(manager) is not LocalManager:  # without any there is nothing to check, and nothing to pay for
        manager.check({**manager.default_addprocs_params(), **options})
    places = [Place(part, count) for part, count in manager.parts()]
    if type(manager) is LocalManager:
        check_count(manager.n)
    return Plan(places, options, _limit(places, max_workers))


def _limit(places: list[Place], most: int | None) -> int | None:
    """Let the places have `most` workers in all; returns what is left to be seen to when they have come."""
    counts = [place.count for place in places]
    if most is None:
        return None
    known = [count for count in counts if count is not None]
    if len(known) < len(places):
        return most
    if sum(known) > most:
        for place, count in zip(places, spread(most, known), strict=True):
            sized = place.manager.sized(count) if count else None
            if count and sized is None:  # a part that cannot be made smaller: surplus workers are sent home
                return most
            place.manager, place.count, place.share = sized or place.manager, count, count
    return None


def manager_of(hosts: Any) -> ClusterManager:
    """The manager for what `hosts=` was given, other than a number or a pool. TypeError, ValueError."""
    if isinstance(hosts, ClusterManager):
        return hosts
    if isinstance(hosts, str):
        return _named(hosts)
    if isinstance(hosts, os.PathLike):
        machines: list[Any] = list(_machines_in(hosts))
        if not machines:
            raise ValueError(f"{hosts}: no machine in this file")
        return ssh_manager(machines)
    if isinstance(hosts, float):
        raise TypeError(f"max_workers must be an int, not {type(hosts).__name__}")
    if isinstance(hosts, Iterable) and not isinstance(hosts, bytes | bytearray | Mapping):
        machines = list(hosts)
        count = config.as_int(machines[1]) if isinstance(hosts, tuple) and len(machines) == 2 else None
        if isinstance(count, int) or count == "auto":
            machines = [hosts]  # one machine, with its number of workers
        if not machines:
            raise ValueError("hosts must name at least one machine")
        return ssh_manager(machines)
    raise TypeError(
        f"hosts must be an int, a list of machine specs, the Path of a machine file, a ClusterManager, a WorkerPool "
        f"or a str, not {type(hosts).__name__}"
    )


def _named(text: str) -> ClusterManager:
    """`"env"`, `"scheme://..."`, or one machine spec."""
    if text == "env":
        from distpool.managers.batch import machines_of_job

        return ssh_manager(list(machines_of_job(os.environ)))
    scheme, separator, rest = text.partition("://")
    if not separator:
        return ssh_manager([text])
    factory = _find_scheme(scheme)
    manager = factory(rest)
    if not isinstance(manager, ClusterManager):
        raise TypeError(f"the entry point {scheme!r} of {ENTRY_POINTS} gave a {type(manager).__name__}, no manager")
    return manager


def _find_scheme(scheme: str) -> Callable[[str], Any]:
    """What makes managers from the text behind `scheme://`: our own, or an entry point of whatever is installed. That
    is a `ClusterManager` subclass (its `from_url` is called) or a function of that text."""
    home = _SCHEMES.get(scheme)
    if home is not None:
        found: Any = getattr(importlib.import_module(f"distpool.managers.{home[0]}"), home[1])
    else:
        from importlib.metadata import entry_points

        points = entry_points(group=ENTRY_POINTS)
        known = sorted({*_SCHEMES, *points.names})
        if scheme not in points.names:
            raise ValueError(f"no manager is called {scheme!r}: known are {', '.join(known)}")
        found = points[scheme].load()
    if isinstance(found, type) and issubclass(found, ClusterManager):
        return found.from_url
    if not callable(found):
        raise TypeError(f"the entry point {scheme!r} of {ENTRY_POINTS} is neither a ClusterManager nor a function")
    return found  # type: ignore[no-any-return]


def _plan_for_pool(pool: Any, max_workers: int | None, options: dict[str, Any]) -> Plan:
    """For a `WorkerPool` (known by its `prepare`): its living workers, at most `max_workers` of them."""
    for name in options:
        raise ValueError(f"Invalid keyword argument {name}: workers of a pool have been started already")
    pids = [pid for pid in pool.workers() if pid != 1][:max_workers]
    if not pids:
        raise RuntimeError("No active worker available in pool")
    return Plan([], {}, None, pids)


def check_count(count: Any) -> None:
    """ValueError, with the standard library's text, unless `count` is a positive int."""
    if not isinstance(count, int):
        raise TypeError(f"max_workers must be an int, not {type(count).__name__}")
    if count <= 0:
        raise ValueError("max_workers must be greater than 0")


_ITERABLES = ("env", "exename", "exeflags", "affinity", "gpus", "ssh", "sshflags", "ship")
"""Keywords that may be any iterable. Others are the manager's own business: a file, say, is an iterator too."""


def kept(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same keywords, with a list for every iterator: they are read more than once, to check them and then for each
    launch."""
    return {name: _kept(value) if name in _ITERABLES else value for name, value in options.items()}


def _kept(value: Any) -> Any:
    if isinstance(value, Iterator):
        value = list(value)
    if isinstance(value, list | tuple):
        found = [_kept(part) for part in value]
        return value if all(new is old for new, old in zip(found, value, strict=True)) else found
    return value


def check_options(manager: ClusterManager, options: dict[str, Any]) -> None:
    """ValueError for a keyword that the manager does not know, before anything is launched."""
    if manager.any_keyword:
        return
    known = manager.default_addprocs_params()
    for name in options:
        if name not in known:
            raise ValueError(f"Invalid keyword argument {name}")
