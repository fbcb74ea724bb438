"""Functions that the cases run on workers (importable there), and counters that live on them."""

from __future__ import annotations

import gc
import os
from typing import Any

import distpool
from distpool.node import node as nodes

DROPPED: list[str] = []
BOX: dict[str, Any] = {}


def myid() -> int:
    return nodes.current().pid


def ident(x: Any) -> Any:
    return x


def boom(*_: Any) -> Any:
    raise RuntimeError("foobar")


def f_args(v1: int, v2: int = 0, *, kw1: int = 0, kw2: int = 0) -> int:
    return v1 + v2 + kw1 + kw2


class Noticed:
    """Its end is noted in the process where it happens."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __del__(self) -> None:
        DROPPED.append(self.name)


def make_noticed(name: str) -> Noticed:
    return Noticed(name)


def dropped() -> list[str]:
    return list(DROPPED)


def own_nothing(pids: list[int], besides: Any = ()) -> bool:
    """Whether these processes own no references but `besides`, garbage in cycles aside."""
    for pid in pids:
        distpool.remotecall_fetch(gc.collect, pid)
    tables = {pid: {key: held for key, held in distpool.debug.refs(pid).items() if key not in besides} for pid in pids}
    if any(tables.values()):
        print(tables)  # of use when the test fails
    return not any(tables.values())


def table_of(pid: int) -> dict[Any, set[int]]:
    return distpool.debug.refs(pid)


def holders(ref: Any) -> set[int] | None:
    """Pids that the owner of `ref` counts as holding it, or None if it has no entry."""
    return table_of(ref.where).get(distpool.remoteref_id(ref))


def ospid() -> int:
    return os.getpid()


def keep(name: str, value: Any) -> None:
    BOX[name] = value


def kept(name: str) -> Any:
    return BOX[name]


def forget(name: str) -> None:
    BOX.pop(name, None)


class DictChannel:
    """A channel class of a user's own (C56)."""

    def __init__(self) -> None:
        import threading

        self._values: dict[Any, Any] = {}
        self._changed = threading.Condition()

    def put(self, key: Any, value: Any) -> DictChannel:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()
        return self

    def fetch(self, key: Any) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, 30)
            return self._values[key]

    def take(self, key: Any) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, 30)
            return self._values.pop(key)

    def isready(self, key: Any) -> bool:
        return key in self._values

    def wait(self, key: Any) -> None:
        self.fetch(key)

    def isopen(self) -> bool:
        return True

    def close(self) -> None:
        pass
