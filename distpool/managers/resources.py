"""What each worker of a host may use: memory, cores, GPUs (layer 8).

    addprocs(memory_limit=, affinity=, gpus=) --Wishes--> pid 1: number on the host --Join--> worker: `apply`

The number is the lowest that no other worker of the host has, so that a replacement gets what the dead one had. The
worker itself turns it into cores and GPUs, because it knows what its host has; it does so before any code of the user
runs, and for every manager alike.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from distpool.config import as_int
from distpool.hints import Any, NamedTuple

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"


class Wishes(NamedTuple):
    """The checked keywords; what nobody asked for is None."""

    memory: int | None = None  # bytes
    affinity: int | str | list[list[int]] | None = None  # cores per worker, "auto", or the cores of each in turn
    gpus: int | list[str] | None = None  # how many there are, or their ids

    def __bool__(self) -> bool:
        return self != Wishes()

    def message(self, number: int, of: int | str | None) -> dict[str, Any]:
        """For the worker with this number on its host, where `of` are started (`"auto"`: one for each core)."""
        return {"number": number, "of": of, "memory": self.memory, "affinity": self.affinity, "gpus": self.gpus}


def wishes(params: Mapping[str, Any]) -> Wishes:
    """What these keywords of `addprocs` ask for. ValueError, TypeError: they make no sense.

    Example: `wishes({"affinity": 2, "gpus": [0, 1]})`
    """
    affinity, gpus = params.get("affinity"), params.get("gpus")
    return Wishes(
        memory_bytes(params.get("memory_limit")),
        None if affinity is None else _affinity(affinity),
        None if gpus is None else _gpus(gpus),
    )


_MEMORY = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]*)?|\.[0-9]+)\s*(?:([kmgt])(i?))?b?\s*", re.IGNORECASE | re.ASCII)


def memory_bytes(limit: Any) -> int | None:
    """`memory_limit=` in bytes: an int, or text such as "300MiB", "2 gib", "1.5GB". ValueError, TypeError."""
    if limit is None:
        return None
    limit = as_int(limit)
    if isinstance(limit, str):
        found = _MEMORY.fullmatch(limit)
        if found is None:
            raise ValueError(f"memory_limit must be bytes or text such as '2GiB', not {limit!r}")
        base = 1024 if found[3] else 1000
        limit = int(float(found[1]) * base ** " kmgt".index((found[2] or " ").lower()))
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"memory_limit must be an int or a str, not {type(limit).__name__}")
    if limit <= 0:
        raise ValueError("memory_limit must be greater than 0")
    return limit


def _affinity(value: Any) -> int | str | list[list[int]]:
    """Cores per worker (int), `"auto"`, or a list with the cores of each worker in turn."""
    text = f"affinity must be a number of cores, 'auto' or a list of lists of cores, not {value!r}"
    value = as_int(value)
    if isinstance(value, str) and value == "auto":
        return "auto"
    if isinstance(value, bool | str | bytes):
        raise ValueError(text)
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"affinity must be at least one core, not {value}")
        return value
    if not isinstance(value, Iterable):
        raise TypeError(text)
    lists = [
        [as_int(core) for core in cores] if isinstance(cores, Iterable) and not isinstance(cores, str | bytes) else []
        for cores in value
    ]
    if not lists or not all(cores and all(_is_number(core) for core in cores) for cores in lists):
        raise ValueError(text)
    return lists


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _gpus(value: Any) -> int | list[str]:
    """How many GPUs each host has (int), or their ids: one for each worker in turn, or a list of ids for each."""
    text = f"gpus must be a number of GPUs or a list of their ids, not {value!r}"
    value = value.split(",") if isinstance(value, str) else as_int(value)
    if isinstance(value, bool):
        raise TypeError(text)
    if isinstance(value, int):
        if value < 0:
            raise ValueError(text)
        return value
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise TypeError(text)
    found = [[each] if isinstance(each, int | str) else list(each) for each in map(as_int, value)]
    ids = [[str(as_int(one)).strip() for one in each if not isinstance(one, bool)] for each in found]
    if not all(each and all(re.fullmatch(r"[\w./:-]+", one, re.ASCII) for one in each) for each in ids):
        raise ValueError(text)
    return [",".join(each) for each in ids]


# -- on the worker -------------------------------------------------------------------------------------------------


def apply(message: Mapping[str, Any]) -> None:
    """Bind this process to its cores and show it its GPUs. ValueError: the host does not have them.

    On the leader of a worker that joins. Threads and children to come inherit both.
    """
    if message["affinity"] is not None:
        _bind(cores_of(message["number"], message["of"], message["affinity"], _usable()))
    if message["gpus"] is not None:
        os.environ[GPU_VARIABLE] = gpu_of(message["number"], message["gpus"], os.environ.get(GPU_VARIABLE))


def cores_of(number: int, of: int | str | None, affinity: int | str | list[list[int]], usable: list[int]) -> list[int]:
    """The cores of the worker with this number. ValueError: there are none such."""
    if isinstance(affinity, list):
        cores = affinity[number % len(affinity)]
        if not set(cores) <= set(usable):
            raise ValueError(f"affinity={cores}: this process may use the cores {usable}")
        return cores
    count = len(usable)
    if isinstance(affinity, int):
        if affinity > count:
            raise ValueError(f"affinity={affinity}: this process may use {count} cores")
        first = number % (count // affinity) * affinity
        return usable[first : first + affinity]
    workers = of if isinstance(of, int) and of > 0 else count
    if workers >= count:
        return [usable[number % count]]
    number %= workers
    return usable[number * count // workers : (number + 1) * count // workers]


def gpu_of(number: int, gpus: int | list[str], visible: str | None) -> str:
    """What the worker with this number sees. ValueError: so many are not there.

    A number of GPUs counts those that the surroundings (a batch job, say) let this process see.
    """
    if isinstance(gpus, list):
        return gpus[number % len(gpus)] if gpus else ""
    if gpus == 0:
        return ""
    allowed = [name for name in visible.split(",") if name] if visible is not None else None
    if allowed is None:
        return str(number % gpus)
    if gpus > len(allowed):
        raise ValueError(f"gpus={gpus}: {GPU_VARIABLE}={visible} shows {len(allowed)}")
    return allowed[number % gpus]


def _usable() -> list[int]:
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError("affinity= is not supported by the operating system of this host")
    return sorted(os.sched_getaffinity(0))


def _bind(cores: list[int]) -> None:
    """Every thread of this process: it is set for each of them, and those to come inherit it."""
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("affinity= is not supported by the operating system of this host")
    try:
        threads = [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        threads = [0]
    for thread in threads:
        try:
            os.sched_setaffinity(thread, cores)
        except ProcessLookupError:
            pass  # a thread that has ended meanwhile
        except OSError as error:
            raise ValueError(f"affinity={cores}: {error.strerror}") from None


__all__ = ["GPU_VARIABLE", "Wishes", "apply", "memory_bytes", "wishes"]
