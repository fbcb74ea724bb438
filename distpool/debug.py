"""Looking into the library: for tests and for those who look for a leak (layer 6).

Example: `print(distpool.debug.refs(2))`
"""

from __future__ import annotations

from distpool.calls import remotecall_fetch
from distpool.node import node as nodes
from distpool.refs import gc
from distpool.refs.owner import RRID


def refs(pid: int | None = None) -> dict[RRID, set[int]]:
    """The references that process `pid` (default: this one) owns: identity -> pids of the processes that hold it.

    Example: `assert not distpool.debug.refs(2)`
    """
    if pid is None or pid == nodes.current().pid:
        return _table()
    table: dict[RRID, set[int]] = remotecall_fetch(_table, pid)
    return table


def _table() -> dict[RRID, set[int]]:
    return gc.of(nodes.current()).owner.table()
